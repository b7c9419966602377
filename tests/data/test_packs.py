"""Packs: every query once an epoch, none split, budgets kept, one order for one seed."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rrhf_fast.data.packs import PackPlanner, ahead, steps_of_packs, steps_per_epoch
from rrhf_fast.data.tokenise import TokenisedQuery


def make_query(prompt_length, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return TokenisedQuery(
        rng.integers(0, 50, prompt_length, dtype=np.int32),
        [rng.integers(0, 50, length, dtype=np.int32) for length in lengths],
        np.arange(len(lengths), dtype=np.float32),
    )


shapes = st.tuples(st.integers(1, 20), st.lists(st.integers(1, 9), min_size=2, max_size=4))


def planner(packing, cases, max_tokens=60):
    queries = [make_query(*case, seed=i) for i, case in enumerate(cases)]
    return PackPlanner(queries, packing=packing, max_tokens_per_pack=max_tokens)


@pytest.mark.parametrize("packing", ["forest", "none"])
@given(cases=st.lists(shapes, min_size=1, max_size=12), max_tokens=st.integers(1, 200))
def test_every_query_in_one_pack_within_the_budget(packing, cases, max_tokens):
    plan = planner(packing, cases, max_tokens)
    groups = plan.plan(range(len(cases)))
    assert sorted(i for group in groups for i in group) == list(range(len(cases)))
    for group in groups:
        pack = plan.build(group)
        assert pack.query_ids.tolist() == group and pack.num_queries == len(group)
        assert pack.num_tokens <= max_tokens or len(group) == 1
        if len(group) == 1:
            assert pack.num_tokens == plan.sizes[group[0]]


@given(st.lists(shapes, min_size=1, max_size=12), st.randoms())
def test_the_plan_does_not_waste_packs(cases, random):
    plan = planner("forest", cases)
    order = list(range(len(cases)))
    random.shuffle(order)
    groups = plan.plan(order)
    filled = sorted(sum(plan.sizes[i] for i in group) for group in groups)
    # First fit leaves no two packs that would fit into one.
    assert len(filled) < 2 or filled[0] + filled[1] > plan.max_tokens


def ids(steps):
    return [[i for pack in packs for i in pack.query_ids.tolist()] for packs in steps]


def test_an_epoch_holds_every_query_once_and_the_next_is_shuffled_anew():
    plan = planner("forest", [(5, [3, 4])] * 10)
    assert steps_per_epoch(10, 4) == 3
    steps = ids(steps_of_packs(plan, train_batch_size=4, seed=1, num_steps=6))
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    first, second = np.concatenate(steps[:3]), np.concatenate(steps[3:])
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()
    again = ids(steps_of_packs(plan, train_batch_size=4, seed=1, num_steps=6))
    assert steps == again
    assert steps != ids(steps_of_packs(plan, train_batch_size=4, seed=2, num_steps=6))


def test_which_queries_make_a_step_does_not_depend_on_the_budget():
    cases = [(5, [3, 4])] * 10
    small, large = (
        steps_of_packs(planner("forest", cases, size), train_batch_size=4, seed=1, num_steps=3)
        for size in (12, 500)
    )
    assert [sorted(step) for step in ids(small)] == [sorted(step) for step in ids(large)]


def test_the_background_thread_yields_the_same_packs():
    plan = planner("forest", [(5, [3, 4])] * 10, max_tokens=12)  # several packs a step
    options = {"train_batch_size": 4, "seed": 1, "num_steps": 7}
    plain = list(steps_of_packs(plan, **options))
    built_ahead = list(ahead(steps_of_packs(plan, **options), pin_memory=False))
    assert len(built_ahead) == 7
    for ours, theirs in zip(plain, built_ahead, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            tensors = {name for name, value in vars(a).items() if value is not None}
            assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


def test_the_background_thread_hands_errors_on_and_ends_with_its_reader():
    def broken():
        yield []
        raise RuntimeError("out of packs")

    loader = ahead(broken(), pin_memory=False)
    assert next(loader) == []
    with pytest.raises(RuntimeError, match="out of packs"):
        next(loader)

    plan = planner("forest", [(5, [3, 4])] * 10)
    endless = steps_of_packs(plan, train_batch_size=4, seed=1, num_steps=10**9)
    loader = ahead(endless, pin_memory=False)
    next(loader)
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("packs")]
