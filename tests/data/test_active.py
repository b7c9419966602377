"""The part of a forest that has a gradient, against paths followed one token at a time."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from rrhf_fast.data.active import active_part, join, kept_rows, without_weight
from rrhf_fast.data.forest import build_forest
from rrhf_fast.data.tokenise import TokenisedQuery

tokens = st.integers(0, 3)  # a small alphabet, so that prefixes, duplicates and nesting are common
responses = st.lists(st.lists(tokens, min_size=1, max_size=6), min_size=1, max_size=6)
queries = st.lists(
    st.tuples(st.lists(tokens, min_size=1, max_size=4), responses), min_size=1, max_size=3
)


def forest(cases, **options):
    built = [
        TokenisedQuery(
            np.array(prompt, np.int32),
            [np.array(ids, np.int32) for ids in answers],
            np.arange(len(answers), dtype=np.float32),
        )
        for prompt, answers in cases
    ]
    return build_forest(built, **options)


def contexts(pack):
    """For each edge, the tokens that its row sees, itself included, and the token it predicts."""
    ends, ids = pack.subtree_end.tolist(), pack.input_ids.tolist()
    seen = [[ids[j] for j in range(i + 1) if i < ends[j]] for i in range(len(ids))]
    edges = zip(pack.edge_rows.tolist(), pack.edge_targets.tolist(), strict=True)
    return [(seen[row], target) for row, target in edges]


@given(cases=queries, data=st.data(), padding=st.sampled_from([1, 8]))
def test_the_active_part_keeps_each_prediction_and_its_context(cases, data, padding):
    pack = forest(cases, pad_to_multiple_of=padding)
    chosen = data.draw(
        st.lists(st.booleans(), min_size=len(pack.edge_rows), max_size=len(pack.edge_rows))
    )
    weights = torch.arange(1.0, len(chosen) + 1) * torch.tensor(chosen)
    part = active_part(pack, weights)
    expected = [c for c, is_chosen in zip(contexts(pack), chosen, strict=True) if is_chosen]
    assert contexts(part) == expected
    assert part.edge_weights.tolist() == weights[weights != 0].tolist()
    assert part.num_tokens == kept_rows(pack, weights != 0).sum()
    # Only the paths are kept: every row is seen by one that predicts.
    ends = part.subtree_end.tolist()
    for j in range(part.num_tokens):
        assert any(j <= row < ends[j] for row in part.edge_rows.tolist())
    assert part.position_ids.tolist() == [
        sum(j <= i < end for j, end in enumerate(ends)) - 1 for i in range(part.num_tokens)
    ]


@given(cases=st.lists(queries, min_size=1, max_size=4), max_tokens=st.integers(1, 40))
def test_joining_keeps_each_prediction_and_its_context(cases, max_tokens):
    packs = [forest(case) for case in cases]
    parts = [active_part(pack, torch.ones(len(pack.edge_rows))) for pack in packs]
    plans = []
    joined = join(parts, max_tokens=max_tokens, pad_to_multiple_of=8, plan=plans.append)
    assert [c for pack in joined for c in contexts(pack)] == [
        c for part in parts for c in contexts(part)
    ]
    assert len(plans) == len(joined)
    largest = max(part.num_tokens for part in parts)
    assert all(pack.num_tokens % 8 == 0 for pack in joined)
    assert all(pack.num_tokens < max(max_tokens, largest) + 8 for pack in joined)
    if sum(part.num_tokens for part in parts) <= max_tokens:
        assert len(joined) == 1


def test_parts_without_tokens_are_left_out_and_one_token_is_a_filler():
    pack = forest([([1, 2], [[3], [0, 1]])])
    assert join([active_part(pack, torch.zeros(3))], max_tokens=10) == []
    (filler,) = join([without_weight(pack)], max_tokens=1, pad_to_multiple_of=4)
    assert filler.num_tokens == 4 and filler.edge_weights.tolist() == [0]
