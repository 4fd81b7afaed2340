"""Means over pairs of seeds: `copra_llm.bands`."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from copra_llm.bands import Band, curve_band, pair_band
from copra_llm.estimates import t_975
from copra_llm.results import Result


def all_pairs(n: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(n), 2))


def half_width(band: Band) -> float:
    assert band.mean - band.low == pytest.approx(band.high - band.mean)
    return float(band.high - band.mean)


def student(values: np.ndarray) -> float:
    """Half the 95 % interval of a mean of independent values."""
    return t_975(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))


# --- the interval -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 4, 7])
def test_means_of_two_seeds_have_the_seeds_own_interval(n):
    """Pairs then say nothing that the n seeds do not: Student's t over the seeds, exactly."""
    seeds = np.random.default_rng(0).normal(size=n)
    band = pair_band([(seeds[i] + seeds[j]) / 2 for i, j in all_pairs(n)], all_pairs(n))
    assert band.mean == pytest.approx(seeds.mean())
    assert half_width(band) == pytest.approx(student(seeds))


def test_three_seeds_by_hand():
    """Leaving a seed out leaves one pair: values 1, 2, 6 have mean 3, squares 4 + 1 + 9, times 2 / 3."""
    band = pair_band([1.0, 2.0, 6.0], [(0, 1), (0, 2), (1, 2)])
    assert band.mean == 3.0
    assert half_width(band) == pytest.approx(4.303 * math.sqrt(14 * 2 / 3))


def test_pairs_without_a_common_seed_are_independent():
    values = np.array([1.0, 4.0, 5.0])
    for pairs in ([(0, 1), (2, 3), (4, 5)], None):
        band = pair_band(values, pairs)
        assert (band.mean, half_width(band)) == (pytest.approx(10 / 3), pytest.approx(student(values)))


def test_both_orders_of_a_pair_are_one_value():
    pairs = all_pairs(3)
    both = pair_band([1.0, 2.0, 6.0, 3.0, 2.0, 4.0], pairs + [(j, i) for i, j in pairs])
    once = pair_band([2.0, 2.0, 5.0], pairs)
    assert (both.mean, both.low, both.high) == (once.mean, once.low, once.high)


@pytest.mark.parametrize("pairs", [[(0, 1)], [(0, 1), (1, 0)], [(0, 1), (0, 2), (0, 3)]], ids=str)
def test_where_every_pair_has_one_seed_there_is_no_interval(pairs):
    """Nothing says what another seed in its place would do."""
    band = pair_band(np.arange(len(pairs), dtype=float), pairs)
    assert band.mean == (len(pairs) - 1) / 2 and math.isnan(band.low) and math.isnan(band.high)


def test_points_of_a_curve_are_taken_each_alone():
    values = np.random.default_rng(1).normal(size=(3, 5))
    band = pair_band(values, all_pairs(3))
    for point in range(5):
        alone = pair_band(values[:, point], all_pairs(3))
        assert (band.low[point], band.high[point]) == pytest.approx((alone.low, alone.high))


@pytest.mark.parametrize("n, naive_at_most", [(3, 0.86), (5, 0.65)])
def test_the_interval_holds_the_truth_where_students_t_over_pairs_does_not(n, naive_at_most):
    """4000 draws: the noise of a share is 0.004 near 0.95 and 0.008 near 0.6."""
    seeds = np.random.default_rng(2).normal(size=(n, 4000))
    values = np.array([(seeds[i] + seeds[j]) / 2 for i, j in all_pairs(n)])

    def coverage(band: Band) -> float:
        return float(np.mean((band.low <= 0) & (band.high >= 0)))

    assert coverage(pair_band(values, all_pairs(n))) == pytest.approx(0.95, abs=0.016)
    assert coverage(pair_band(values)) < naive_at_most


@pytest.mark.parametrize("values, pairs", [([], None), ([1.0], [(0, 1), (1, 2)])])
def test_values_that_do_not_fit_their_pairs_are_refused(values, pairs):
    with pytest.raises(ValueError, match="values were given for"):
        pair_band(values, pairs)


# --- curves -----------------------------------------------------------------------------------------------

SEEDS = (10.0, 20.0, 60.0)
"""A value a seed."""


def line_of(i: int, j: int, middle: float, seeds: bool = True) -> Result:
    """Three points between two seeds; alpha = 1 is the first."""
    data = {"alpha": [0.0, 0.5, 1.0], "accuracy": [SEEDS[j], middle, SEEDS[i]], "loss": [0.1, None, 0.3]}
    return Result("interpolation", {"seeds": [i, j]} if seeds else {}, {}, data=data)


def test_both_ends_of_a_mean_curve_are_the_mean_over_the_seeds():
    """Which adapter of a pair is the first says nothing: without mirror images the ends would be 40 and 13.3."""
    alpha, band = curve_band([line_of(*pair, middle) for pair, middle in zip(all_pairs(3), (1, 2, 6), strict=True)],
                             "accuracy")  # fmt: skip
    assert alpha.tolist() == [0.0, 0.5, 1.0]
    assert band.mean == pytest.approx([30.0, 3.0, 30.0])
    assert band.high[0] - 30.0 == pytest.approx(student(np.array(SEEDS)))


def test_lines_of_unknown_seeds_are_averaged_as_they_are():
    _, band = curve_band([line_of(0, 1, 5, seeds=False), line_of(0, 2, 7, seeds=False)], "accuracy")
    assert band.mean == pytest.approx([40.0, 6.0, 10.0])
    assert band.high[1] - 6.0 == pytest.approx(student(np.array([5.0, 7.0])))


def test_a_value_that_was_not_finite_leaves_a_gap_and_another_grid_is_left_out():
    other = Result("interpolation", {"seeds": [1, 2]}, {}, data={"alpha": [0, 1], "accuracy": [0, 0], "loss": [9, 9]})
    _, band = curve_band([line_of(0, 1, 5), other], "loss")
    assert band.mean == pytest.approx([0.2, math.nan, 0.2], nan_ok=True)
