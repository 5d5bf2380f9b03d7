# SPDX-License-Identifier: MIT
"""What a disk may hold after its writer was stopped, told from the writer's log.

Every sector says itself which write it is from, so a disk is judged by reading it once. The log is
what ``tests.fault.writer`` wrote to its pipe before each operation and after it returned.

Rule: a sector holds the last value that a completed flush covers, or one that was issued later.
A discarded sector may also be zeros.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

SECTOR = 512
# Values: 0 is zeros, others the number of the write; these two were there before all writes.
BASE = 1 << 62
GARBAGE = 1 << 61
_HEAD = struct.Struct("<QQ")


def sector_bytes(value: int, sector: int) -> bytes:
    """One sector as write ``value`` makes it."""
    return bytes(SECTOR) if value == 0 else _HEAD.pack(value, sector) * (SECTOR // _HEAD.size)


def content(value: int, offset: int, length: int) -> bytes:
    """A range of whole sectors as write ``value`` makes it."""
    first = offset // SECTOR
    return b"".join(sector_bytes(value, first + i) for i in range(length // SECTOR))


def decode(data: bytes, first: int = 0) -> list[int]:
    """The value of each sector; -1 for a sector that is of no write, or of another place."""
    values = []
    for i in range(0, len(data), SECTOR):
        part = data[i : i + SECTOR]
        value, sector = _HEAD.unpack_from(part)
        whole = part == sector_bytes(value, first + i // SECTOR)
        values.append(value if whole and (value == 0 or sector == first + i // SECTOR) else -1)
    return values


class _Write:
    """One change of one sector. ``weak``: a discard, which may have done nothing."""

    __slots__ = ("operation", "value", "weak")

    def __init__(self, value: int, operation: int, *, weak: bool = False) -> None:
        self.value = value
        self.operation = operation
        self.weak = weak


class Model:
    """The admissible content of a disk, sector by sector."""

    def __init__(self, values: list[int], *, write_through: bool = False) -> None:
        self.sectors = [[_Write(value, 0)] for value in values]
        self.sizes = {len(values)}  # in sectors; two while a resize is under way
        self.write_through = write_through
        self.flushes = 0
        self._completed = {0}
        self._pending_flush: dict[int, set[int]] = {}
        self._pending_resize: tuple[int, int] | None = None

    def replay(self, lines: Iterable[str], *, believe: bool = True) -> None:
        """Take the writer's log. ``believe`` False: what it says of success came too late to
        count, what it says of intentions widens what is allowed."""
        if not believe and self._pending_resize is not None:
            self._maybe_cut_off(*self._pending_resize)
        for line in lines:
            entry = json.loads(line)
            if entry["at"] == "begin":
                self._begin(entry, believe)
            elif believe:
                self._end(entry)

    def _begin(self, entry: dict[str, Any], believe: bool) -> None:
        kind, number = entry["op"], entry["n"]
        if kind in ("write", "zero", "discard"):
            value = number if kind == "write" else 0
            first = entry["offset"] // SECTOR
            for sector in range(first, first + entry["length"] // SECTOR):
                change = _Write(value, number, weak=kind == "discard")
                self.sectors[sector].append(change)
        elif kind == "flush":
            self._pending_flush[number] = set(self._completed)
        elif kind == "resize":
            self._pending_flush[number] = set(self._completed)
            size = entry["size"] // SECTOR
            self._pending_resize = (number, size)
            self.sizes.add(size)
            if not believe:
                self._maybe_cut_off(number, size)
            for _ in range(len(self.sectors), size):
                self.sectors.append([_Write(0, 0)])

    def _maybe_cut_off(self, number: int, size: int) -> None:
        """A shrink of which nobody knows whether it has happened, or been grown over since."""
        for writes in self.sectors[size:]:
            writes.append(_Write(0, number, weak=True))

    def _end(self, entry: dict[str, Any]) -> None:
        kind, number = entry["op"], entry["n"]
        self._completed.add(number)
        if kind in ("flush", "resize"):
            self.flushes += 1
            self._settle(self._pending_flush.pop(number))
        elif self.write_through:
            self._settle(self._completed)
        if kind == "resize":
            assert self._pending_resize is not None
            assert self._pending_resize[0] == number
            size = self._pending_resize[1]
            self.sizes = {size}
            del self.sectors[size:]
            self._pending_resize = None

    def _settle(self, covered: set[int]) -> None:
        """A flush covers these operations: what they replaced is gone."""
        for writes in self.sectors:
            for i in range(len(writes) - 1, 0, -1):
                if writes[i].operation in covered and not writes[i].weak:
                    del writes[:i]
                    break

    def judge(self, values: list[int]) -> list[str]:
        """What is wrong with a disk of these sectors; empty if nothing is."""
        if len(values) not in self.sizes:
            return [f"size {len(values)} sectors, allowed are {sorted(self.sizes)}"]
        wrong = []
        for sector, value in enumerate(values):
            allowed = {write.value for write in self.sectors[sector]}
            if value not in allowed:
                names = ", ".join(_name(v) for v in sorted(allowed))
                wrong.append(f"sector {sector}: {_name(value)}, allowed: {names}")
        return wrong

    def accept(self, values: list[int]) -> None:
        """Go on from what was found."""
        self.__init__(values, write_through=self.write_through)  # type: ignore[misc]


def _name(value: int) -> str:
    names = {0: "zeros", -1: "torn or foreign bytes", BASE: "the base", GARBAGE: "garbage"}
    return names.get(value, f"write {value}")
