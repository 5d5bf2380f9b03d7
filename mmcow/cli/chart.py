# SPDX-License-Identifier: MIT
"""Latency histograms as bars of characters.

Owns: the rows (equal steps of the logarithm, chosen so that a screen holds them), their labels.
Never: writes, asks the terminal.

::

    less than 76.1 us ██████████▍                    18.2 %
    76.1 us - 90.5 us ██████████████████████████████ 52.6 %
     90.5 us and more ███▏                            5.6 %
"""

from __future__ import annotations

from math import floor, log2
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mmcow.jobs.latency import Histogram

_ROWS_MOST = 16
# Rows to an octave; finer than 8 would show the histogram's own buckets.
_STEPS = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25)
_EIGHTHS = " ▏▎▍▌▋▊▉█"
# What a terminal must be able to show for the finer bars.
CHARACTERS = _EIGHTHS
_BAR_MOST = 50


def human_time(ns: float) -> str:
    """Three significant digits: "850 ns", "76.1 us", "1.02 ms", "12.0 s"."""
    if ns < 999.5:
        return f"{ns:.0f} ns"
    # Where three digits would round up to a fourth the next unit begins.
    unit, scale = ("us", 1e3) if ns < 999.5e3 else ("ms", 1e6) if ns < 999.5e6 else ("s", 1e9)
    value = ns / scale
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


class Scale(NamedTuple):
    """Rows of equal width on a logarithmic scale: ``steps`` to an octave, from ``first`` on."""

    steps: float
    first: int
    rows: int

    @classmethod
    def for_all(cls, histograms: Sequence[Histogram], rows_most: int = _ROWS_MOST) -> Scale:
        """One scale on which all the histograms fit: the fastest and the slowest thousandth share
        the first and the last row."""
        filled = [histogram for histogram in histograms if histogram.count]
        if not filled:
            return cls(1.0, 0, 0)
        low = max(min(histogram.percentile(0.1) for histogram in filled), 1.0)
        high = max(low, *(histogram.percentile(99.9) for histogram in filled))
        first = rows = 0
        for steps in _STEPS:
            first = floor(log2(low) * steps)
            rows = floor(log2(high) * steps) - first + 1
            if rows <= rows_most:
                return cls(steps, first, rows)
        return cls(_STEPS[-1], first, rows)

    def edge(self, row: int) -> float:
        """Where a row begins, in ns."""
        return float(2 ** ((self.first + row) / self.steps))

    def shares(self, histogram: Histogram) -> list[float]:
        """Per row, which part of the requests is in it. They add up to 1."""
        counts = [0] * self.rows
        for bucket in histogram.buckets():
            middle = max((bucket.start + bucket.end) / 2, 1.0)
            row = floor(log2(middle) * self.steps) - self.first
            counts[min(max(row, 0), self.rows - 1)] += bucket.requests
        return [count / max(histogram.count, 1) for count in counts]


def draw(histogram: Histogram, scale: Scale, width: int, *, unicode: bool) -> Iterator[str]:
    """The lines, at most ``width`` characters each."""
    shares = scale.shares(histogram)
    if not shares:
        return
    tallest = max(shares)
    labels = [_label(scale, row) for row in range(scale.rows)]
    label_width = max(map(len, labels))
    room = min(max(width - label_width - len("    99.9 %"), 8), _BAR_MOST)
    for label, share in zip(labels, shares, strict=True):
        bar = _bar(share / tallest * room if tallest else 0.0, unicode=unicode)
        yield f"  {label:>{label_width}} {bar:<{room}} {_percent(share):>4} %".rstrip()


def _label(scale: Scale, row: int) -> str:
    start = human_time(scale.edge(row))
    if row == scale.rows - 1:
        return f"{start} and more"
    if row == 0:
        return f"less than {human_time(scale.edge(1)):>7}"
    return f"{start} - {human_time(scale.edge(row + 1)):>7}"


def _percent(share: float) -> str:
    if 0 < share < 0.001:
        return "<0.1"
    return f"{100 * share:.1f}" if share else "0"


def _bar(length: float, *, unicode: bool) -> str:
    if not unicode:
        return "#" * round(length)
    eighths = round(length * 8)
    part = _EIGHTHS[eighths % 8] if eighths % 8 else ""
    return _EIGHTHS[8] * (eighths // 8) + part
