"""Statistics of experiments: intervals, tests and choices, by simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments.statistics import Table, best_column, estimate, holm, seeds_test


def table(values):
    return Table(values, np.ones_like(values))


def draw(rng, shape=(5, 60), seeds=0.0, prompts=0.0, noise=1.0):
    """Cells with effects of seeds and prompts of these standard deviations; the mean is 0."""
    return (
        seeds * rng.standard_normal((shape[0], 1))
        + prompts * rng.standard_normal((1, shape[1]))
        + noise * rng.standard_normal(shape)
    )


@pytest.mark.parametrize(
    "effects",
    [{}, {"seeds": 1.0, "noise": 0.5}, {"prompts": 1.0}, {"seeds": 0.2, "prompts": 0.5}],
    ids=str,
)
def test_intervals_have_their_nominal_coverage(effects):
    rng, trials = np.random.default_rng(0), 400
    intervals = [estimate(table(draw(rng, **effects)), draws=300) for _ in range(trials)]
    assert np.mean([e.low <= 0 <= e.high for e in intervals]) >= 0.93
    # Not wider than needed: some must miss.
    assert not all(e.low <= 0 <= e.high for e in intervals)


def test_a_paired_difference_is_narrower_than_its_sides():
    rng = np.random.default_rng(0)
    shared = draw(rng, seeds=1.0, prompts=1.0, noise=0.0)
    a, b = (table(shared + draw(rng, noise=0.1) + gain) for gain in (0.2, 0.0))
    gain, alone = estimate(a, b), estimate(a)
    assert gain.low > 0.1 and gain.high < 0.3
    assert alone.high - alone.low > 5 * (gain.high - gain.low)


@given(st.integers(0, 2**32 - 1))
def test_equal_arms_do_not_differ(seed):
    values = draw(np.random.default_rng(seed), shape=(3, 8))
    gain = estimate(table(values), table(values.copy()), draws=50)
    assert gain.low == gain.value == gain.high == 0
    assert seeds_test(table(values), table(values)) == 1


@given(st.integers(0, 2**32 - 1))
def test_order_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    above, below = rng.random((2, 4, 12)) + 0.1
    rows, columns = rng.permutation(4), rng.permutation(12)
    a = Table(above, below)
    b = Table(above[rows][:, columns], below[rows][:, columns])
    one, other = estimate(a), estimate(b)
    assert one.value == pytest.approx(other.value) == pytest.approx(above.sum() / below.sum())
    # The draws differ.
    assert one.high - one.low == pytest.approx(other.high - other.low, rel=0.25)


@given(st.integers(0, 2**32 - 1), st.integers(2, 8))
def test_p_is_that_of_a_paired_t_test_over_seeds(seed, seeds):
    rng = np.random.default_rng(seed)
    above, below = rng.random((2, 2, seeds, 12)) + 0.1
    sides = [Table(*both) for both in zip(above, below, strict=True)]
    by_seed = above.sum(-1) / below.sum(-1)
    expected = stats.ttest_rel(by_seed[0], by_seed[1]).pvalue
    assert seeds_test(*sides) == pytest.approx(expected)


def test_p_is_uniform_where_seeds_differ_and_arms_do_not():
    """Training runs that differ a lot on many alike prompts: a test over prompts would find a
    difference nearly always."""
    rng = np.random.default_rng(0)
    p_values = []
    for _ in range(400):
        shared = draw(rng, prompts=1.0, noise=0.0)
        sides = [table(shared + draw(rng, seeds=1.0, noise=0.1)) for _ in range(2)]
        p_values.append(seeds_test(*sides))
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(p_values) <= level) == pytest.approx(level, abs=0.07)
    shifted = table(draw(rng) + 1.0)
    assert seeds_test(shifted, table(draw(rng))) < 0.01


def test_an_arm_without_data_and_a_single_seed_do_not_differ():
    empty, other = Table(*np.zeros((2, 3, 8))), table(np.ones((3, 8)))
    assert seeds_test(empty, other) == 1
    for seeds in (1, 3):  # nor do seeds that change nothing
        assert seeds_test(table(np.ones((seeds, 8))), table(np.zeros((seeds, 8)))) == 1


def halves_of(shape):
    return np.broadcast_to(np.arange(shape[1]) % 2 == 1, shape)


@pytest.mark.parametrize("shape", [(5, 20), (1, 40)], ids=["five seeds", "one seed"])
def test_the_best_of_equal_columns_is_no_better_than_they_are(shape):
    rng, honest, naive = np.random.default_rng(0), [], []
    for _ in range(400):
        columns = [rng.standard_normal(shape) for _ in range(3)]
        chosen = best_column(columns, halves_of(shape))
        honest.append(np.choose(chosen, columns).mean())
        naive.append(max(column.mean() for column in columns))
    error = np.std(honest) / np.sqrt(len(honest))
    assert np.mean(honest) == pytest.approx(0, abs=3 * error)
    assert np.mean(naive) > 6 * error  # so this can tell


def test_the_best_column_is_found_and_does_not_depend_on_the_cell():
    rng = np.random.default_rng(0)
    columns = [rng.standard_normal((3, 40)) + gain for gain in (0.0, 2.0, 1.0)]
    columns[0][:, 33:] = columns[1][:, 33:] = columns[2][:, 33:] = np.nan
    assert (best_column(columns, halves_of((3, 40))) == 1).all()
    # Its own figures do not choose for a cell: those of seed 0 and even prompts change nothing.
    changed = [column.copy() for column in columns]
    changed[2][0, ::2] = 1e6
    assert (best_column(changed, halves_of((3, 40)))[0, ::2] == 1).all()


def test_a_ratio_of_sums_counts_cells_by_their_denominators():
    above, below = np.array([[1.0, 3.0], [0.0, 2.0]]), np.array([[1.0, 6.0], [0.0, 3.0]])
    assert estimate(Table(above, below)).value == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (10, 2.228), (100, 1.984)],
)
def test_few_seeds_widen_the_interval_by_students_quantile(freedom, expected):
    values = np.random.default_rng(0).standard_normal((freedom + 1, 1))
    interval = estimate(table(values), draws=40_000)
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert interval.high - interval.value == pytest.approx(expected * error, rel=0.01)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_lowers_and_keeps_the_order(p_values):
    adjusted = holm(p_values)
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
    assert min(adjusted) == pytest.approx(min(1.0, len(p_values) * min(p_values)))
    pairs = sorted(zip(p_values, adjusted, strict=True))
    assert [a for _, a in pairs] == sorted(a for _, a in pairs)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
