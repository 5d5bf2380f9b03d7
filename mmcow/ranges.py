# SPDX-License-Identifier: MIT
"""Arithmetic on half-open byte ranges. Owns nothing; every conversion of units has a name here."""

from __future__ import annotations

SECTOR = 512
# Largest disk: offsets are signed 64-bit in every interface below.
SIZE_MOST = (1 << 63) - SECTOR


def align_down(value: int, unit: int) -> int:
    """The greatest multiple of ``unit`` not above ``value``."""
    return value - value % unit


def align_up(value: int, unit: int) -> int:
    """The least multiple of ``unit`` not below ``value``."""
    return -(-value // unit) * unit


def units_for(length: int, unit: int) -> int:
    """How many units of ``unit`` bytes hold ``length`` bytes."""
    return -(-length // unit)


def overlaps(start: int, end: int, other_start: int, other_end: int) -> bool:
    """Whether two half-open ranges share a byte."""
    return start < other_end and other_start < end
