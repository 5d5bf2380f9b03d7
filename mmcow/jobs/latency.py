# SPDX-License-Identifier: MIT
"""How long requests took: a histogram that is small, exact to 3 %, and can be added up.

Owns: the buckets (each power of two of nanoseconds in 32 equal parts, as csrc/load.c has them),
percentiles.
Never: measures time.
"""

from __future__ import annotations

from array import array
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PARTS_BITS = 5
PARTS = 1 << PARTS_BITS
# Times of 64 bits: the first two rows are exact, then one row for each further bit.
BUCKETS = (64 - PARTS_BITS + 1) * PARTS

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9}


def bucket_of(ns: int) -> int:
    """The bucket of a time."""
    shift = max(ns.bit_length() - PARTS_BITS - 1, 0)
    return (shift << PARTS_BITS) + (ns >> shift)


def lower_bound(bucket: int) -> int:
    """The shortest time of a bucket, in ns; of the next one: where this one ends."""
    shift = max((bucket >> PARTS_BITS) - 1, 0)
    return (bucket - (shift << PARTS_BITS)) << shift


class Bucket(NamedTuple):
    """How many requests took at least ``start`` and less than ``end`` ns."""

    start: int
    end: int
    requests: int


class Histogram:
    """Times of requests, in ns."""

    def __init__(self) -> None:
        self.counts = array("Q", bytes(8 * BUCKETS))
        self.count = 0
        self.total = 0
        self.least = 0
        self.most = 0

    def add(self, ns: int) -> None:
        """Count one request."""
        self.counts[bucket_of(ns)] += 1
        self.least = min(self.least, ns) if self.count else ns
        self.most = max(self.most, ns)
        self.count += 1
        self.total += ns

    def merge(self, other: Histogram) -> None:
        """Count another histogram's requests too."""
        if not other.count:
            return
        self.counts = array("Q", map(sum, zip(self.counts, other.counts, strict=True)))
        self.least = min(self.least, other.least) if self.count else other.least
        self.most = max(self.most, other.most)
        self.count += other.count
        self.total += other.total

    @classmethod
    def merged(cls, parts: Iterable[Histogram]) -> Histogram:
        """One histogram of all."""
        whole = cls()
        for part in parts:
            whole.merge(part)
        return whole

    @property
    def mean(self) -> float:
        """In ns; 0 of nothing."""
        return self.total / self.count if self.count else 0.0

    def percentile(self, percent: float) -> float:
        """The time in ns that ``percent`` of the requests did not exceed; 0 of nothing."""
        if not self.count:
            return 0.0
        wanted = max(self.count * percent / 100, 1.0)
        for bucket, reached in enumerate(accumulate(self.counts)):
            if reached >= wanted:
                start, end = lower_bound(bucket), lower_bound(bucket + 1)
                inside = 1 - (reached - wanted) / self.counts[bucket]
                return min(max(start + inside * (end - start), self.least), self.most)
        raise AssertionError("the counts do not add up")

    def summary_us(self) -> dict[str, float]:
        """Mean, extremes and percentiles in microseconds, for people's programs."""
        found = {"mean": self.mean, "min": float(self.least), "max": float(self.most)}
        found |= {name: self.percentile(percent) for name, percent in PERCENTILES.items()}
        return {name: round(ns / 1000, 3) for name, ns in found.items()}

    def buckets(self) -> Iterator[Bucket]:
        """Those that are not empty, in order."""
        for bucket, count in enumerate(self.counts):
            if count:
                yield Bucket(lower_bound(bucket), lower_bound(bucket + 1), count)
