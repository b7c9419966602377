"""Measures against slow definitions, intervals against their nominal coverage."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rrhf_fast.evaluate.measures import (
    Bootstrap,
    best_of,
    pairs_in_order,
    win_tie_lose,
    within_correlation,
)

REWARDS = st.lists(st.integers(-3, 3), min_size=1, max_size=6).map(np.array)


@given(REWARDS)
def test_best_of_n_is_the_mean_over_all_subsets(rewards):
    for n in range(1, len(rewards) + 1):
        slow = np.mean([max(chosen) for chosen in combinations(rewards.tolist(), n)])
        assert best_of(rewards, n) == pytest.approx(slow)


@given(REWARDS, REWARDS)
def test_wins_ties_and_losses_are_shares_of_all_pairs(model, baseline):
    pairs = [(m, b) for m in model for b in baseline]
    slow = [
        np.mean([m > b for m, b in pairs]),
        np.mean([m == b for m, b in pairs]),
        np.mean([m < b for m, b in pairs]),
    ]
    assert win_tie_lose(model, baseline) == pytest.approx(slow)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6))
def test_ranking_counts_pairs_with_different_scores(items):
    p, scores = np.array(items).T
    pairs = [(i, j) for i in range(len(p)) for j in range(len(p)) if scores[i] > scores[j]]
    assert pairs_in_order(p, scores) == (sum(p[i] > p[j] for i, j in pairs), len(pairs))


def test_correlation_is_within_prompts():
    # Across prompts longer answers are better, within each prompt the shorter one is.
    lengths = [np.array([1.0, 2.0]), np.array([11.0, 12.0])]
    rewards = [np.array([1.0, 0.0]), np.array([9.0, 8.0])]
    assert within_correlation(lengths, rewards) == pytest.approx(-1)
    assert np.isnan(within_correlation([np.ones(2)], [np.arange(2.0)]))


def test_values_are_ratios_of_sums():
    bootstrap = Bootstrap(3, draws=50, seed=0)
    assert bootstrap.ratio([1, 2, 6]).value == 3
    assert bootstrap.ratio([1, 2, 6], [1, 1, 4]).value == 1.5
    assert bootstrap.ratio([0, 0, 0], transform=np.exp).value == 1
    same = bootstrap.ratio([5, 5, 5])
    assert (same.low, same.value, same.high) == (5, 5, 5)
    nothing = bootstrap.ratio([0, 0, 0], [0, 0, 0])
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()


def test_intervals_have_about_their_nominal_coverage():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        interval = Bootstrap(60, draws=400, seed=seed).ratio(rng.normal(1.0, 2.0, size=60))
        hits += interval.low <= 1.0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_equal_seeds_give_equal_intervals():
    values = np.random.default_rng(0).normal(size=20)
    one, same, other = (Bootstrap(20, 100, seed).ratio(values) for seed in (0, 0, 1))
    assert one == same != other
