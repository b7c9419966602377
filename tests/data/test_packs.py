"""Packs hold every query once per epoch, unsplit and within the budget, in an order by the seed."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rrhf_fast.data.packs import Batch, PackPlanner, ahead, batches, steps_per_epoch
from rrhf_fast.data.tokenise import TokenisedQuery


def make_query(prompt_length, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return TokenisedQuery(
        rng.integers(0, 50, prompt_length, dtype=np.int32),
        [rng.integers(0, 50, length, dtype=np.int32) for length in lengths],
        np.arange(len(lengths), dtype=np.float32),
    )


shapes = st.tuples(st.integers(1, 20), st.lists(st.integers(1, 9), min_size=2, max_size=4))


def make_planner(packing, cases, max_tokens=60):
    queries = [make_query(*case, seed=i) for i, case in enumerate(cases)]
    return PackPlanner(queries, packing=packing, max_tokens_per_pack=max_tokens)


@pytest.mark.parametrize("packing", ["forest", "none"])
@given(cases=st.lists(shapes, min_size=1, max_size=12), max_tokens=st.integers(1, 200))
def test_every_query_is_in_one_pack_within_the_budget(packing, cases, max_tokens):
    planner = make_planner(packing, cases, max_tokens)
    groups = planner.group(range(len(cases)))
    assert sorted(i for group in groups for i in group) == list(range(len(cases)))
    for group in groups:
        pack = planner.build(group)
        assert pack.query_ids.tolist() == group and pack.num_queries == len(group)
        assert pack.num_tokens <= max_tokens or len(group) == 1
        if len(group) == 1:
            assert pack.num_tokens == planner.sizes[group[0]]


@given(st.lists(shapes, min_size=1, max_size=12), st.randoms())
def test_grouping_wastes_no_pack(cases, random):
    planner = make_planner("forest", cases)
    order = list(range(len(cases)))
    random.shuffle(order)
    groups = planner.group(order)
    filled = sorted(sum(planner.sizes[i] for i in group) for group in groups)
    # First fit leaves no two packs that would fit into one.
    assert len(filled) < 2 or filled[0] + filled[1] > planner.max_tokens


@pytest.mark.parametrize("packing", ["forest", "none"])
@given(
    cases=st.lists(shapes, min_size=1, max_size=20),
    num_ranks=st.integers(1, 5),
    max_tokens=st.integers(1, 200),
)
def test_ranks_get_equally_many_packs_within_the_budget(packing, cases, num_ranks, max_tokens):
    planner = make_planner(packing, cases, max_tokens)
    ranks = planner.deal(range(len(cases)), num_ranks)
    assert len(ranks) == num_ranks and len({len(packs) for packs in ranks}) == 1
    groups = [group for packs in ranks for group in packs]
    assert sorted(i for group in groups for i in group) == list(range(len(cases)))
    # There are as few rounds as the budget allows.
    assert len(ranks[0]) == -(-len(planner.group(range(len(cases)))) // num_ranks)
    for group in groups:
        pack = planner.build(group)
        assert pack.num_queries == len(group)
        if group:
            assert pack.num_tokens == planner.num_tokens(group)
            assert pack.num_tokens <= max_tokens or len(group) == 1


def test_ranks_get_similar_numbers_of_tokens():
    rng = np.random.default_rng(0)
    cases = [(int(n), [int(m), 5]) for n, m in zip(*rng.integers(5, 300, (2, 256)), strict=True)]
    planner = make_planner("forest", cases, max_tokens=4000)
    ranks = planner.deal(range(len(cases)), 8)
    # All ranks wait for the largest of the packs that run at the same time.
    taken = sum(max(map(planner.num_tokens, packs)) for packs in zip(*ranks, strict=True))
    assert taken < 1.03 * sum(planner.sizes) / 8


def test_a_resumed_run_continues_with_the_same_steps():
    planner = make_planner("forest", [(5, [3, 4])] * 10)
    options = {"train_batch_size": 4, "seed": 1, "num_steps": 7}
    whole = ids(batches(planner, **options))
    for step in range(7):
        assert ids(batches(planner, first_step=step, **options)) == whole[step:]


def ids(steps):
    return [[i for pack in batch.packs for i in pack.query_ids.tolist()] for batch in steps]


def test_an_epoch_holds_every_query_once_and_the_next_has_another_order():
    planner = make_planner("forest", [(5, [3, 4])] * 10)
    assert steps_per_epoch(10, 4) == 3
    steps = ids(batches(planner, train_batch_size=4, seed=1, num_steps=6))
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    first, second = np.concatenate(steps[:3]), np.concatenate(steps[3:])
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()
    again = ids(batches(planner, train_batch_size=4, seed=1, num_steps=6))
    assert steps == again
    assert steps != ids(batches(planner, train_batch_size=4, seed=2, num_steps=6))


def test_the_queries_of_a_step_do_not_depend_on_the_budget():
    cases = [(5, [3, 4])] * 10
    small, large = (
        batches(make_planner("forest", cases, size), train_batch_size=4, seed=1, num_steps=3)
        for size in (12, 500)
    )
    assert [sorted(step) for step in ids(small)] == [sorted(step) for step in ids(large)]


def test_the_background_thread_yields_the_same_packs():
    planner = make_planner("forest", [(5, [3, 4])] * 10, max_tokens=12)  # several packs per step
    options = {"train_batch_size": 4, "seed": 1, "num_steps": 7}
    plain = list(batches(planner, **options))
    built_ahead = list(ahead(batches(planner, **options), pin_memory=False))
    assert len(built_ahead) == 7
    for ours, theirs in zip(plain, built_ahead, strict=True):
        for a, b in zip(ours.packs, theirs.packs, strict=True):
            assert a.bounds == b.bounds is not None
            tensors = {name for name, value in vars(a).items() if value is not None} - {"bounds"}
            assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


def test_the_background_thread_passes_errors_on_and_ends_with_its_reader():
    def broken():
        yield Batch([], 0)
        raise RuntimeError("out of packs")

    loader = ahead(broken(), pin_memory=False)
    assert next(loader) == Batch([], 0)
    with pytest.raises(RuntimeError, match="out of packs"):
        next(loader)

    planner = make_planner("forest", [(5, [3, 4])] * 10)
    endless = batches(planner, train_batch_size=4, seed=1, num_steps=10**9)
    loader = ahead(endless, pin_memory=False)
    next(loader)
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("packs")]
