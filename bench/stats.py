# SPDX-License-Identifier: MIT
"""The arithmetic: ratios of rounds, their median and its interval, verdicts.

Owns: every number that is derived from measured ones.
Never: measures, reads or writes files.

The interval of a median is distribution-free: between two order statistics of the rounds, chosen
as close together as a coverage of 95 % allows (the sign test turned around). With 5 rounds the
widest pair, the smallest and the largest round, covers 93.75 %, which is then what is said.
"""

from __future__ import annotations

import math
import statistics
from math import comb
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

COVERAGE = 0.95

MET = "met"
NOISE = "within noise"
SHORT = "short"
UNSURE = "too noisy"

# An interval that is wider than this (high to low) and has the aim inside says nothing.
_WIDE = 2.0


class Interval(NamedTuple):
    """A median, the interval around it, and how sure that is."""

    median: float
    low: float
    high: float
    coverage: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Of at least one value."""
        ordered = sorted(values)
        count = len(ordered)
        below = max(
            (k for k in range((count + 1) // 2) if _coverage(count, k) >= COVERAGE), default=0
        )
        return cls(
            statistics.median(ordered),
            ordered[below],
            ordered[count - 1 - below],
            _coverage(count, below),
            count,
        )

    def as_json(self) -> dict[str, Any]:
        """Rounded to four digits: more would be noise."""
        found: dict[str, Any] = {k: rounded(v) for k, v in self._asdict().items()}
        return found | {"rounds": self.rounds}


def _coverage(count: int, below: int) -> float:
    """How likely a median lies between the order statistics ``below`` from either end."""
    outside = sum(comb(count, k) for k in range(below + 1))
    return max(0.0, 1.0 - math.ldexp(outside, 1 - count))


def rounded(value: float) -> float:
    """To four significant digits."""
    return float(f"{value:.4g}")


def ratios(ours: Sequence[float], peer: Sequence[float], *, higher_is_better: bool) -> list[float]:
    """Round by round; above 1 where ours is faster (or smaller)."""
    if len(ours) != len(peer):
        raise ValueError(f"{len(ours)} rounds of ours and {len(peer)} of the peer")
    pairs = zip(ours, peer, strict=True)
    return [a / b if higher_is_better else b / a for a, b in pairs]


def best_of(peers: dict[str, Sequence[float]], *, higher_is_better: bool) -> str:
    """The peer whose median is the best."""
    choose = max if higher_is_better else min
    return choose(peers, key=lambda name: statistics.median(peers[name]))


def verdict(interval: Interval, at_least: float) -> str:
    """Met; short; or so near that the noise decides, which counts as met if the noise is small."""
    if interval.low < at_least <= interval.high and interval.high > _WIDE * interval.low:
        return UNSURE
    if interval.median >= at_least:
        return MET
    return NOISE if interval.high >= at_least else SHORT


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive values."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def overall(cells: Sequence[Sequence[float]]) -> Interval:
    """The geometric mean over cells: one for each round, then the median of those."""
    return Interval.of([geometric_mean(round_) for round_ in zip(*cells, strict=True)])
