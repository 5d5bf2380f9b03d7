# SPDX-License-Identifier: MIT
"""Metadata of an image in memory, and its way back to the file in order.

Owns: dirty tracking, the copy taken for a flush, the write-out with its barrier, the
checks around it. A ``Window`` covers the first bytes of a metadata file: header, then
bitmap or tables. Changes land in the view (a private mapping, or memory) and reach the
file only through ``write_out``; nothing else ever writes there.

Never: decides when or in which order groups are written (the engine's flush does), knows
what the bytes mean (the drivers do).

Order of a flush, and why (measured; docs/ARCHITECTURE.md "The window"): ``take`` copies dirty
units BEFORE the data is synced; a bit published during the sync would otherwise be made
durable by it while its data is not. ``pwrite`` instead of a store into a shared mapping: a
full disk is then an errno and not a SIGBUS. One barrier per group.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, NamedTuple

from mmcow.errors import CorruptError, StorageError, SyncFailed
from mmcow.ranges import align_down, align_up

if TYPE_CHECKING:
    from mmcow.storage.host import Handle, Host, IOQueue, View
    from mmcow.tasks import Completion

UNIT = 512
# Bits that are counted without asking for the file's holes: a bitmap of 128 KiB.
# Address space for growth; a window that outgrows it is mapped anew.
RESERVE_MOST = 64 << 30
SMALL_COUNT = 1 << 20


class Group(NamedTuple):
    """Copies of dirty units, taken together and written together."""

    window: Window
    runs: list[tuple[int, memoryview]]

    @property
    def length(self) -> int:
        """Bytes to write."""
        return sum(len(data) for _, data in self.runs)


class Window:
    """The first ``size`` bytes of a metadata file, live.

    ``handle`` is the descriptor that write-out uses. Where metadata and O_DIRECT data share
    the file it must be the direct one (dirtying the page cache of a file under direct
    writes lost acknowledged data), and units are then the direct alignment.
    """

    def __init__(
        self, host: Host, queue: IOQueue, handle: Handle, size: int, *, durable: bool = True
    ) -> None:
        self.path = handle.path
        self.size = size
        self._host = host
        self._queue = queue
        self._handle = handle
        self._durable = durable
        self._outstanding = 0  # groups taken and neither written nor put back
        self._unit = max(UNIT, handle.alignment.offset)
        self._expected = handle.size()
        self._view = self._make_view(size)

    def _make_view(self, size: int) -> View:
        # Address space is free, remapping is not: set room for growth aside.
        reserve = align_up(size + min(max(size * 15, 1 << 20), RESERVE_MOST), 4096)
        return self._host.view(self._handle, size, reserve, self._unit, mapped=True)

    @property
    def native_view(self) -> Any:
        """The C view, for tables that C reads; None where the host has none."""
        return getattr(self._view, "pointer", None)

    # ---- lookups and changes: memory only ----

    def load(self, offset: int, length: int) -> bytes:
        """Current bytes, changes included."""
        try:
            return self._view.load(offset, length)
        except StorageError as error:
            raise self._explain(error, offset) from error

    def store(self, offset: int, data: bytes) -> None:
        """Change bytes; they are dirty until written out."""
        try:
            self._view.store(offset, data)
        except StorageError as error:
            raise self._explain(error, offset) from error

    def bit_runs(
        self, base: int, first: int, count: int, most: int = 64
    ) -> list[tuple[int, int, int]]:
        """Runs of equal bits (first, how many, 0 or 1) from bit ``first``; at most ``most``, so the
        answer may stop early. Bits count from byte ``base``, least significant first."""
        if count > SMALL_COUNT and self._file_is_current():
            hole, bits = self._hole_at(base, first, count)
            if hole:
                return [(first, bits, 0)]
            count = bits
        try:
            return self._view.bit_runs(base, first, count, most)
        except StorageError as error:
            raise self._explain(error, base + first // 8) from error

    def _hole_at(self, base: int, first: int, count: int) -> tuple[bool, int]:
        """Whether bit ``first`` lies in a hole of the file, and how many bits from there do not
        differ in that. A sparse bitmap of gigabytes costs neither time nor memory that way."""
        byte, rest = base + first // 8, first % 8
        data = self._handle.next_data(byte)
        if data > byte:
            return True, min((data - byte) * 8 - rest, count)
        hole = self._handle.next_hole(byte)
        return False, min((hole - byte) * 8 - rest, count) if hole > byte else count

    def bits_write(self, base: int, first: int, count: int, value: int) -> None:
        """Set (1) or clear (0) bits; their units are dirty until written out."""
        try:
            self._view.bits_write(base, first, count, value)
        except StorageError as error:
            raise self._explain(error, base + first // 8) from error

    def bits_count(self, base: int, first: int, count: int) -> int:
        """How many bits of the range are set.

        Holes of the file have none, unless something is staged: a sparse bitmap of gigabytes, be
        it honest or not, is counted in no time.
        """
        if count <= SMALL_COUNT or not self._file_is_current():
            return self._bits_count(base, first, count)
        total, end = 0, first + count
        while first < end:
            data = self._handle.next_data(base + first // 8)
            first = max(first, (data - base) * 8)
            hole = (self._handle.next_hole(data) - base) * 8
            stop = min(end, hole) if hole > first else end
            if first < stop:
                total += self._bits_count(base, first, stop - first)
            first = stop
        return total

    def _file_is_current(self) -> bool:
        """Whether the file has what the view has: nothing is staged, nothing is on its way."""
        return not self._outstanding and not self.dirty()

    def _bits_count(self, base: int, first: int, count: int) -> int:
        try:
            return self._view.bits_count(base, first, count)
        except StorageError as error:
            raise self._explain(error, base + first // 8) from error

    def dirty(self) -> int:
        """Bytes changed and not yet taken for write-out."""
        return self._view.dirty(0, self.size) * self._unit

    # ---- write-out ----

    def take(self, offset: int = 0, length: int | None = None) -> Group | None:
        """Copy the dirty units of a range and clear their marks; None if there are none.

        The caller must pass the group to ``write_out``, or to ``put_back`` if it fails first.
        """
        end = self.size if length is None else offset + length
        try:
            runs = self._view.snapshot(offset, end - offset)
        except StorageError as error:
            raise self._explain(error, offset) from error
        if not runs:
            return None
        self._outstanding += 1
        return Group(self, runs)

    def put_back(self, group: Group) -> None:
        """Mark a taken group dirty again: it was not written, the next flush will try."""
        for offset, data in group.runs:
            if offset < self.size:
                self._view.mark(offset, min(len(data), self.size - offset))
        self._outstanding -= 1

    async def write_out(self, group: Group) -> None:
        """Write a group and make it durable.

        Raises StorageError where nothing is lost (a full disk: put the group back and try
        again later), SyncFailed where the file's state is no longer known.
        """
        self._check_length()
        writes = [self._queue.write(self._handle, offset, (data,)) for offset, data in group.runs]
        await settle(writes)
        if self._durable:
            await self._barrier(group)
        self._check_length()
        self._outstanding -= 1

    async def _barrier(self, group: Group) -> None:
        if not self._view.mapped or self._handle.direct:
            await self._queue.datasync(self._handle)
            return
        start = align_down(group.runs[0][0], 4096)
        last_offset, last_data = group.runs[-1]
        end = align_up(last_offset + len(last_data), 4096)
        await self._queue.msync(self._handle, self._view, start, end - start)

    async def write_through(self, offset: int, data: bytes) -> None:
        """Store bytes and make them, alone, durable: for header changes outside a flush."""
        self.store(offset, data)
        start = align_down(offset, self._unit)
        group = self.take(start, min(align_up(offset + len(data), self._unit), self.size) - start)
        if group is None:
            return
        try:
            await self.write_out(group)
        except SyncFailed:
            raise
        except StorageError:
            self.put_back(group)
            raise

    def release(self) -> None:
        """Give clean pages back to the system. Never after a failed sync."""
        self._view.release()

    # ---- length ----

    def grow(self, size: int) -> None:
        """Cover ``size`` bytes: the file gets that length (new bytes zero, space reserved, durable)
        before the window does. Undone if there is no room."""
        if size <= self.size:
            return
        before = self._handle.size()
        if before < size:
            try:
                self._handle.truncate(size)
                self._handle.reserve(before, size - before)
                self._handle.sync()
            except SyncFailed:
                raise
            except StorageError:
                self._handle.truncate(before)
                raise
        self._expected = max(before, size)
        if not self._view.set_size(size):
            assert self.dirty() == 0, "grow past the reserve only after a flush"
            old, self._view = self._view, self._make_view(size)
            old.close()
        self.size = size

    def shrink(self, size: int) -> None:
        """Cover fewer bytes and cut the file there. Flush before."""
        assert size <= self.size
        self.size = size
        self._view.set_size(size)
        self._expected = size
        self._handle.truncate(size)
        self._handle.sync()

    def _check_length(self) -> None:
        """A truncation by someone else throws staged pages away without any fault: compare."""
        length = self._handle.size()
        if length < min(self._expected, self.size):
            raise SyncFailed(errno.ESTALE, "file was truncated while open", self.path)

    def _explain(self, error: StorageError, offset: int) -> Exception:
        """Find out why a mapped page could not be read: the file ends there, or the disk failed."""
        if error.errno != errno.EFAULT:
            return error
        length = self._handle.size()
        if length < min(self._expected, self.size):
            return CorruptError(self.path, "length", length, "the file was truncated while open")
        try:
            self._handle.read_at(align_down(offset, self._unit), self._unit)
        except StorageError as cause:
            return cause
        return StorageError(errno.EIO, "read of metadata", self.path, offset)

    def close(self) -> None:
        """Drop the view; unwritten changes are lost."""
        self._view.close()


async def settle(completions: list[Completion[int]]) -> None:
    """Wait for all, then raise the first error: nothing is in flight when a caller cleans up."""
    first: BaseException | None = None
    for completion in completions:
        try:
            await completion
        except Exception as error:  # noqa: BLE001 - the first is raised below
            first = first or error
    if first is not None:
        raise first
