# SPDX-License-Identifier: MIT
"""Views of metadata for the simulated machine.

The simulator uses the C helper's memory view, so that the real bit scans and dirty marks are under
test. ``PlainView`` says in the fewest words of Python what ``storage.host.View`` means; it is the
oracle which the C one is compared with.
"""

from __future__ import annotations

import errno

from mmcow._mmc import ffi, lib
from mmcow.errors import StorageError
from mmcow.storage.linux import NativeView


class PlainView:
    """Bytes, and a mark per ``unit`` of them."""

    def __init__(self, content: bytes, size: int, reserve: int, unit: int, path: str = "") -> None:
        self.mapped = False
        self._path = path
        self._unit = unit
        self._reserve = reserve
        self._bytes = bytearray(content[:size].ljust(size, b"\0"))
        self._marks: set[int] = set()

    def size(self) -> int:
        """Bytes covered."""
        return len(self._bytes)

    def set_size(self, size: int) -> bool:
        """Cover more (zeros) or fewer bytes; marks beyond the end are forgotten."""
        if size > self._reserve:
            return False
        del self._bytes[size:]
        self._bytes += bytes(size - len(self._bytes))
        self._marks = {unit for unit in self._marks if unit * self._unit < size}
        return True

    def load(self, offset: int, length: int) -> bytes:
        """Bytes of a range."""
        self._inside(offset, length)
        return bytes(self._bytes[offset : offset + length])

    def store(self, offset: int, data: bytes) -> None:
        """Change bytes and mark their units."""
        self._inside(offset, len(data))
        self._bytes[offset : offset + len(data)] = data
        self.mark(offset, len(data))

    def bit_runs(self, base: int, first: int, count: int, most: int) -> list[tuple[int, int, int]]:
        """Runs of equal bits; at most ``most``."""
        runs: list[tuple[int, int, int]] = []
        for bit in range(first, first + count):
            value = self._bit(base, bit)
            if runs and runs[-1][2] == value:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, value)
            elif len(runs) == most:
                break
            else:
                runs.append((bit, 1, value))
        return runs

    def bits_write(self, base: int, first: int, count: int, value: int) -> None:
        """Set or clear bits and mark the units of their bytes."""
        for bit in range(first, first + count):
            at, mask = base + bit // 8, 1 << bit % 8
            self._inside(at, 1)
            self._bytes[at] = self._bytes[at] | mask if value else self._bytes[at] & ~mask
            self._marks.add(at // self._unit)

    def bits_count(self, base: int, first: int, count: int) -> int:
        """Number of set bits."""
        return sum(self._bit(base, bit) for bit in range(first, first + count))

    def dirty(self, offset: int, length: int) -> int:
        """Number of marked units that a range touches."""
        return sum(1 for unit in self._units(offset, length) if unit in self._marks)

    def mark(self, offset: int, length: int) -> None:
        """Mark the units that a range touches."""
        self._marks.update(self._units(offset, length))

    def snapshot(self, offset: int, length: int) -> list[tuple[int, memoryview]]:
        """Clear the marks of a range and copy their units out, adjacent ones together."""
        runs: list[tuple[int, bytearray]] = []
        for unit in self._units(offset, length):
            if unit not in self._marks:
                continue
            self._marks.remove(unit)
            at = unit * self._unit
            piece = self._bytes[at : at + self._unit]
            if runs and runs[-1][0] + len(runs[-1][1]) == at:
                runs[-1][1].extend(piece)
            else:
                runs.append((at, bytearray(piece)))
        return [(at, memoryview(bytes(data))) for at, data in runs]

    def release(self) -> None:
        """Nothing to give back."""

    def close(self) -> None:
        """Nothing to release."""

    def _bit(self, base: int, bit: int) -> int:
        at = base + bit // 8
        self._inside(at, 1)
        return self._bytes[at] >> bit % 8 & 1

    def _units(self, offset: int, length: int) -> range:
        end = min(offset + length, len(self._bytes))
        if offset >= end:
            return range(0)
        return range(offset // self._unit, (end - 1) // self._unit + 1)

    def _inside(self, offset: int, length: int) -> None:
        if offset < 0 or offset + length > len(self._bytes):
            raise StorageError(errno.ERANGE, "view", self._path, offset, length)


def native_view(content: bytes, size: int, reserve: int, unit: int, path: str) -> NativeView:
    """The C helper's view over plain memory: its bit scans and dirty marks are the real ones."""
    error = ffi.new("int *")
    pointer = lib.mmc_view_memory(size, reserve, unit, error)
    if pointer == ffi.NULL:
        raise MemoryError(f"mmc_view_memory: errno {-error[0]}")
    view = NativeView(pointer, path, unit)
    view.fill(0, content[:size])
    return view
