# SPDX-License-Identifier: MIT
"""A picture of ratios: one row each, a point with its interval, on a logarithmic axis.

Owns: SVG as text.
Never: reads results.
"""

from __future__ import annotations

import math
from typing import NamedTuple
from xml.sax.saxutils import escape

from bench.stats import MET, NOISE, SHORT, UNSURE

_COLOURS = {MET: "#1a7f5a", NOISE: "#b7791f", SHORT: "#c0392b", UNSURE: "#7d5ba6", None: "#5b6770"}
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
_WIDTH, _ROW, _TOP, _LEFT, _RIGHT, _BOTTOM = 900, 22, 40, 310, 150, 44

_HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
    'height="{height}" font-family="system-ui, sans-serif" font-size="12">'
)
_SPAN = (
    '<line x1="{low}" y1="{y}" x2="{high}" y2="{y}" stroke="{colour}" stroke-width="3" '
    'stroke-linecap="round" stroke-opacity="0.45"/>'
)


class Row(NamedTuple):
    """What is drawn in one line."""

    label: str
    median: float
    low: float
    high: float
    aim: float | None
    verdict: str | None


def draw(title: str, rows: list[Row]) -> str:
    """The SVG."""
    low = min([0.5, *(r.low for r in rows), *(r.aim for r in rows if r.aim)])
    high = max([2.0, *(r.high for r in rows), *(r.aim for r in rows if r.aim)])
    axis = _Axis(math.log(low / 1.1), math.log(high * 1.1))
    bottom = _TOP + _ROW * len(rows)
    parts = [
        _HEAD.format(width=_WIDTH, height=bottom + _BOTTOM),
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="12" y="22" font-size="14" font-weight="600">{escape(title)}</text>',
    ]
    parts += _axis_parts(axis, bottom)
    for number, row in enumerate(rows):
        parts += _row_parts(axis, row, _TOP + _ROW * number + _ROW / 2)
    return "\n".join([*parts, "</svg>", ""])


class _Axis(NamedTuple):
    low: float
    high: float

    def x(self, ratio: float) -> float:
        part = (math.log(ratio) - self.low) / (self.high - self.low)
        return round(_LEFT + part * (_WIDTH - _LEFT - _RIGHT), 1)

    def shows(self, ratio: float) -> bool:
        return self.low <= math.log(ratio) <= self.high


def _axis_parts(axis: _Axis, bottom: int) -> list[str]:
    parts = []
    for tick in filter(axis.shows, _TICKS):
        x = axis.x(tick)
        colour, width = ("#222222", 1.2) if tick == 1 else ("#dde1e4", 1)
        parts.append(
            f'<line x1="{x}" y1="{_TOP - 4}" x2="{x}" y2="{bottom + 4}" stroke="{colour}" '
            f'stroke-width="{width}"/>'
            f'<text x="{x}" y="{bottom + 18}" text-anchor="middle" fill="#555">{tick:g}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{bottom + 36}" text-anchor="middle" fill="#555">'
        "ratio to the peer: right of 1 mmcow is faster; the bar is the aim</text>"
    )
    return parts


def _row_parts(axis: _Axis, row: Row, y: float) -> list[str]:
    colour = _COLOURS[row.verdict]
    figures = f"{row.median:.3g} ({row.low:.3g}-{row.high:.3g})"
    parts = [
        f'<text x="{_LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(row.label)}</text>',
        _SPAN.format(low=axis.x(row.low), high=axis.x(row.high), y=y, colour=colour),
        f'<circle cx="{axis.x(row.median)}" cy="{y}" r="4.5" fill="{colour}"/>',
        f'<text x="{_WIDTH - _RIGHT + 12}" y="{y + 4}" fill="{colour}">{figures}</text>',
    ]
    if row.aim:
        x = axis.x(row.aim)
        parts.append(
            f'<line x1="{x}" y1="{y - 8}" x2="{x}" y2="{y + 8}" stroke="#222" stroke-width="2"/>'
        )
    return parts
