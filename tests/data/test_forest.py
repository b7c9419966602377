"""The packed forest against prefix sets, and its attention rule against paths."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rrhf_fast.data.forest import build_forest, forest_tokens
from rrhf_fast.data.tokenise import TokenisedQuery

tokens = st.integers(0, 3)  # a small alphabet, so that prefixes, duplicates and nesting are common
responses = st.lists(st.lists(tokens, min_size=1, max_size=6), min_size=1, max_size=7)
queries = st.lists(
    st.tuples(st.lists(tokens, min_size=1, max_size=4), responses), min_size=1, max_size=3
)


def query(prompt, answers):
    return TokenisedQuery(
        np.array(prompt, np.int32),
        [np.array(ids, np.int32) for ids in answers],
        np.arange(len(answers), dtype=np.float32),
    )


def prefixes(answers):
    """Return all distinct prefixes, the nodes of the trie."""
    return {tuple(ids[: n + 1]) for ids in answers for n in range(len(ids))}


@pytest.mark.parametrize("share", [True, False])
@given(queries)
def test_every_response_reads_back_along_its_path(share, cases):
    pack = build_forest([query(*case) for case in cases], share_prefixes=share)
    answers = [ids for _, group in cases for ids in group]
    for s, ids in enumerate(answers):
        edges = pack.path_edges[pack.path_offsets[s] : pack.path_offsets[s + 1]]
        assert pack.edge_targets[edges].tolist() == ids
    assert pack.group_offsets.diff().tolist() == [len(group) for _, group in cases]
    assert pack.prompt_lengths.tolist() == [len(prompt) for prompt, _ in cases]
    assert pack.rewards.tolist() == [r for _, group in cases for r in range(len(group))]


@given(queries)
def test_a_row_sees_exactly_its_own_prefix(cases):
    """A predicting row sees the prompt and the prefix of its response, in order."""
    pack = build_forest([query(*case) for case in cases])
    n = torch.arange(pack.num_tokens)
    visible = (n[None, :] <= n[:, None]) & (n[:, None] < pack.subtree_end[None, :])
    s = 0
    for prompt, group in cases:
        for ids in group:
            edges = pack.path_edges[pack.path_offsets[s] : pack.path_offsets[s + 1]]
            for t, row in enumerate(pack.edge_rows[edges].tolist()):
                assert pack.input_ids[visible[row]].tolist() == prompt + ids[:t]
                assert pack.position_ids[row].item() == len(prompt) + t - 1
                assert pack.position_ids[visible[row]].tolist() == list(range(len(prompt) + t))
            s += 1


@given(queries)
def test_a_pack_holds_each_distinct_token_once_and_no_leaf(cases):
    built = [query(*case) for case in cases]
    pack = build_forest(built)
    nodes = [prefixes(group) for _, group in cases]
    inner = [{p[:-1] for p in group if len(p) > 1} for group in nodes]
    assert len(pack.edge_rows) == sum(map(len, nodes))
    expected = [len(prompt) + len(i) for (prompt, _), i in zip(cases, inner, strict=True)]
    assert pack.num_tokens == sum(expected)
    assert [forest_tokens(q) for q in built] == expected


@given(queries)
def test_unshared_tokens_are_counted(cases):
    built = [query(*case) for case in cases]
    pack = build_forest(built, share_prefixes=False)
    assert pack.num_tokens == sum(forest_tokens(q, share_prefixes=False) for q in built)
    assert len(pack.edge_rows) == len(pack.path_edges)


@given(queries, st.integers(1, 9))
def test_padding_sees_only_itself_and_predicts_nothing(cases, multiple):
    built = [query(*case) for case in cases]
    plain, padded = build_forest(built), build_forest(built, pad_to_multiple_of=multiple)
    n, total = plain.num_tokens, padded.num_tokens
    assert total % multiple == 0 and 0 <= total - n < multiple
    assert torch.equal(padded.input_ids[:n], plain.input_ids)
    assert torch.equal(padded.subtree_end[:n], plain.subtree_end)
    assert padded.subtree_end[n:].tolist() == list(range(n + 1, total + 1))
    assert not padded.position_ids[n:].any()
    for name in ("edge_rows", "edge_targets", "path_edges", "rewards"):
        assert torch.equal(getattr(padded, name), getattr(plain, name))


def test_dtypes_are_as_documented():
    pack = build_forest([query([1], [[2, 3], [2, 0]])], query_ids=[7])
    int64 = "input_ids position_ids edge_rows edge_targets path_edges path_offsets group_offsets"
    assert {getattr(pack, name).dtype for name in int64.split()} == {torch.int64}
    assert (pack.subtree_end.dtype, pack.rewards.dtype) == (torch.int32, torch.float32)
    assert pack.query_ids.tolist() == [7]
    assert pack.to("cpu").num_queries == 1
