# SPDX-License-Identifier: MIT
"""The arithmetic of the benchmarks."""

from __future__ import annotations

import random
import statistics

import pytest

from bench import stats
from bench.stats import MET, NOISE, SHORT, UNSURE, Interval


@pytest.mark.parametrize(
    ("count", "low", "high", "coverage"),
    [
        # From tables of the sign test: how many are left out at each end, and what is covered.
        (5, 1, 5, 0.9375),
        (6, 1, 6, 0.96875),
        (9, 2, 8, 0.9609375),
        (12, 3, 10, 0.9614257812),
        (20, 6, 15, 0.9586105347),
    ],
)
def test_interval_is_between_the_order_statistics_of_the_sign_test(count, low, high, coverage):
    values = [float(n) for n in range(1, count + 1)]
    random.Random(count).shuffle(values)
    found = Interval.of(values)
    assert (found.low, found.high) == (low, high)
    assert found.coverage == pytest.approx(coverage)
    assert found.median == statistics.median(values)
    assert found.rounds == count


def test_interval_holds_the_true_median_as_often_as_it_says():
    rng = random.Random(7)
    tries, inside = 4000, 0
    for _ in range(tries):
        found = Interval.of([rng.lognormvariate(0, 0.3) for _ in range(9)])
        inside += found.low <= 1.0 <= found.high
    assert inside / tries == pytest.approx(0.961, abs=0.012)


def test_interval_of_one_value_is_that_value_and_covers_nothing():
    assert Interval.of([3.0]) == (3.0, 3.0, 3.0, 0.0, 1)


def test_ratios_are_above_one_where_ours_is_better():
    assert stats.ratios([20.0, 30.0], [10.0, 60.0], higher_is_better=True) == [2.0, 0.5]
    assert stats.ratios([20.0, 30.0], [10.0, 60.0], higher_is_better=False) == [0.5, 2.0]


def test_ratios_of_unequal_rounds_are_refused():
    with pytest.raises(ValueError, match="2 rounds of ours and 1 of the peer"):
        stats.ratios([1.0, 2.0], [1.0], higher_is_better=True)


def test_best_peer_is_the_one_with_the_best_median():
    peers = {"a": [1.0, 50.0, 2.0], "b": [3.0, 4.0, 3.5]}
    assert stats.best_of(peers, higher_is_better=True) == "b"
    assert stats.best_of(peers, higher_is_better=False) == "a"


@pytest.mark.parametrize(
    ("low", "median", "high", "aim", "expected"),
    [
        (1.1, 1.2, 1.3, 1.0, MET),
        (0.9, 1.0, 1.1, 1.0, MET),
        (0.9, 0.95, 1.0, 1.0, NOISE),
        (0.8, 0.9, 0.99, 1.0, SHORT),
        # An interval that says nothing is no success, on whichever side its median is.
        (0.1, 0.5, 3.0, 1.0, UNSURE),
        (0.4, 1.2, 3.0, 1.0, UNSURE),
        # However wide, all of it is on one side.
        (1.0, 4.0, 9.0, 1.0, MET),
        (0.1, 0.3, 0.9, 1.0, SHORT),
    ],
)
def test_verdict(low, median, high, aim, expected):
    assert stats.verdict(Interval(median, low, high, 0.95, 5), aim) == expected


def test_overall_is_the_median_of_each_rounds_geometric_mean():
    assert stats.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    found = stats.overall([[1.0, 4.0, 9.0], [1.0, 1.0, 1.0]])
    assert (found.low, found.median, found.high) == pytest.approx((1.0, 2.0, 3.0))


def test_overall_refuses_cells_of_unequal_rounds():
    with pytest.raises(ValueError, match="zip"):
        stats.overall([[1.0, 2.0], [1.0]])
