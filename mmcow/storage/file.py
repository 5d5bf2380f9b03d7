# SPDX-License-Identifier: MIT
"""Guest data in a file or on a block device, whatever its alignment demands.

Owns: cache modes, the split of a request into what O_DIRECT can do and what it cannot,
read-modify-write of partial blocks under an exclusive range, the odd end of a file (which
O_DIRECT must never touch: it would change the length), the ladder for zeroing.

Never: knows what the bytes are, changes a file's length except by ``truncate`` or by a
write past the end, retries a failed sync.

Exclusive ranges: a block read-modify-written by one request must not be written by another
in between. A read-modify-write lists its range in ``_exclusive``, waits for overlapping
writes that are in flight in the queue, and holds writes that come later. Ranges are taken in
arrival order and one at a time per request, so they cannot deadlock.
"""

from __future__ import annotations

import errno
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from mmcow import native
from mmcow.errors import StorageError, SyncFailed, UsageError
from mmcow.ranges import align_down, align_up, overlaps
from mmcow.storage.host import FALLOCATE_PUNCH, FALLOCATE_ZERO, Handle, Host, IOQueue
from mmcow.storage.window import settle
from mmcow.tasks import Completion, Reactor, completed

if TYPE_CHECKING:
    from collections.abc import Sequence

# Bounce buffers are bounded: a request that needs one is done in pieces of this size.
BOUNCE = 1 << 20
# The page cache's largest folio on ext4 and xfs: what a buffered write may disturb around it.
FOLIO = 2 << 20
# Punching moves whole blocks of the file system; partial ones would dirty the page cache.
PUNCH_UNIT = 4096

_REFUSED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.ENOTTY)


class Cache(Enum):
    """How guest data meets the page cache and the disk's own cache (QEMU's names)."""

    AUTO = "auto"  # NONE, or WRITEBACK where the file system refuses O_DIRECT
    NONE = "none"  # O_DIRECT; durable at flush
    DIRECTSYNC = "directsync"  # O_DIRECT; durable at every write
    WRITEBACK = "writeback"  # page cache; durable at flush
    WRITETHROUGH = "writethrough"  # page cache; durable at every write
    UNSAFE = "unsafe"  # page cache; flush does nothing

    @classmethod
    def parse(cls, name: str | Cache) -> Cache:
        """The mode called ``name``; UsageError lists the modes."""
        try:
            return cls(name)
        except ValueError:
            names = ", ".join(mode.value for mode in cls)
            raise UsageError(f"cache mode {name!r}: must be one of {names}") from None

    @property
    def direct(self) -> bool:
        """Whether guest data goes past the page cache."""
        return self in (Cache.AUTO, Cache.NONE, Cache.DIRECTSYNC)

    @property
    def write_through(self) -> bool:
        """Whether every write is durable before it is acknowledged."""
        return self in (Cache.DIRECTSYNC, Cache.WRITETHROUGH)


class Outside(Protocol):
    """Who else writes to the file, past this module (``engine.hits``). Offsets are the file's."""

    def hold_host(self, start: int, end: int) -> int:
        """Keep those writes out of a range, until ``release``."""

    async def drained_host(self, start: int, end: int) -> None:
        """Wait for those in flight in a held range."""

    def release(self, hold: int) -> None: ...
    def take_written(self) -> bool:
        """Whether there were some since the last call, or are some in flight."""


class _Exclusive:
    """A range under read-modify-write."""

    __slots__ = ("end", "hold", "released", "start")

    def __init__(self, start: int, end: int) -> None:
        self.hold: int | None = None
        self.start = start
        self.end = end
        self.released: Completion[None] = Completion()


class File:
    """Guest data of one layer. ``read`` and ``write`` return at once with a completion.

    ``handle`` is the main descriptor; ``cache`` the mode in effect (never AUTO).
    """

    def __init__(
        self, host: Host, reactor: Reactor, queue: IOQueue, handle: Handle, cache: Cache
    ) -> None:
        self.path = handle.path
        self.handle = handle
        self.cache = cache
        self.size = handle.size()
        self._host = host
        self._reactor = reactor
        self._queue = queue
        self._align = handle.alignment.offset
        self._memory = handle.alignment.memory
        self._exclusive: list[_Exclusive] = []
        self._buffered: Handle | None = None if handle.direct else handle
        self._can_punch = True
        self._can_zero_range = True
        self._hits: Outside | None = None
        self.sync_failure: SyncFailed | None = None
        self.unsynced = True  # a crash before this opening may have left unsynced writes

    @classmethod
    def open(
        cls, host: Host, reactor: Reactor, queue: IOQueue, path: str, cache: Cache, *, write: bool
    ) -> File:
        """Open an existing file or device. AUTO falls back only where O_DIRECT is refused."""
        try:
            handle = host.open(path, write=write, direct=cache.direct)
        except StorageError as error:
            if error.errno != errno.EINVAL or not cache.direct:
                raise
            if cache is not Cache.AUTO:
                raise StorageError(
                    error.errno,
                    f"cache={cache.value}: O_DIRECT is not supported by this file system "
                    "(cache=auto or cache=writeback work there)",
                    path,
                ) from error
            return cls(
                host, reactor, queue, host.open(path, write=write, direct=False), Cache.WRITEBACK
            )
        return cls(host, reactor, queue, handle, Cache.NONE if cache is Cache.AUTO else cache)

    # ---- reading ----

    def read(self, offset: int, buffers: Sequence[memoryview]) -> Completion[int]:
        """Fill ``buffers`` from ``offset``; what lies past the end of the file reads as zeros.

        Completes with the number of bytes the file had.
        """
        length = _total(buffers)
        if self._fits(offset, length, buffers) and offset + length <= self._direct_end():
            return self._queue.read(self.handle, offset, buffers)
        if not self.handle.direct:
            return self._queue.read(self.handle, offset, buffers)
        return self._reactor.spawn(self._read_bounced(offset, length, buffers))

    async def _read_bounced(self, offset: int, length: int, buffers: Sequence[memoryview]) -> int:
        target = _Cursor(buffers)
        end = offset + length
        found = 0
        while offset < end:
            piece = min(end - offset, BOUNCE)
            data, had = await self._read_any(offset, piece)
            target.put(data)
            found += had
            offset += piece
        return found

    async def _read_any(self, offset: int, length: int) -> tuple[memoryview, int]:
        """Read any range; returns the bytes (zero-padded) and how many the file had."""
        start, end = align_down(offset, self._align), align_up(offset + length, self._align)
        buffer = native.aligned(end - start, max(self._memory, 4096))
        cut = min(max(self._direct_end(), start), end)
        parts: list[Completion[int]] = []
        if cut > start:
            parts.append(self._queue.read(self.handle, start, (buffer[: cut - start],)))
        if cut < end:
            tail = self._queue.read(self._tail_handle(), cut, (buffer[cut - start :],))
            parts.append(tail)
        await settle(parts)
        had = sum(part.result() for part in parts)
        skip = offset - start
        return buffer[skip : skip + length], min(max(had - skip, 0), length)

    # ---- writing ----

    def write(self, offset: int, buffers: Sequence[memoryview]) -> Completion[int]:
        """Write all of ``buffers`` at ``offset``. Visible at once, durable after ``sync``."""
        length = _total(buffers)
        if not self._exclusive:
            if not self.handle.direct:
                return self._write_now(offset, length, buffers)
            if self._fits(offset, length, buffers) and offset + length <= self._write_end():
                return self._write_now(offset, length, buffers)
        return self._reactor.spawn(self._write_slow(offset, length, buffers))

    def _write_now(
        self, offset: int, length: int, buffers: Sequence[memoryview]
    ) -> Completion[int]:
        self.unsynced = True
        self.size = max(self.size, offset + length)
        return self._queue.write(self.handle, offset, buffers)

    async def _write_slow(self, offset: int, length: int, buffers: Sequence[memoryview]) -> int:
        """A write that is unaligned, touches the odd end, or meets an exclusive range."""
        if not self.handle.direct or (
            self._fits(offset, length, buffers) and offset + length <= self._write_end()
        ):
            await self._wait_exclusive(offset, offset + length)
            return await self._write_now(offset, length, buffers)
        source = _Cursor(buffers)
        position, end = offset, offset + length
        while position < end:
            piece = min(align_down(position + BOUNCE, self._align), end) - position
            await self._write_piece(position, source.get(piece))
            position += piece
        return length

    async def _write_piece(self, offset: int, data: memoryview) -> None:
        """Write up to BOUNCE bytes through an aligned copy, reading partial blocks first."""
        end = offset + len(data)
        cut = min(max(self._write_end(), offset), end)
        if cut > offset:
            await self._write_blocks(offset, data[: cut - offset])
        if cut < end:
            await self._write_tail(cut, data[cut - offset :])

    async def _write_blocks(self, offset: int, data: memoryview) -> None:
        end = offset + len(data)
        start, stop = align_down(offset, self._align), align_up(end, self._align)
        buffer = native.aligned(stop - start, max(self._memory, 4096))
        partial = start != offset or stop != end
        held = await self._take_exclusive(start, stop) if partial else None
        try:
            if held is None:
                await self._wait_exclusive(start, stop)
            else:
                await self._read_edges(start, stop, offset, end, buffer)
            buffer[offset - start : end - start] = data
            await self._write_now(start, stop - start, (buffer,))
        finally:
            if held is not None:
                self._release_exclusive(held)

    async def _read_edges(
        self, start: int, stop: int, offset: int, end: int, buffer: memoryview
    ) -> None:
        reads = []
        if start != offset:
            reads.append(self._queue.read(self.handle, start, (buffer[: self._align],)))
        if stop != end and (stop - start > self._align or start == offset):
            last = stop - self._align
            reads.append(self._queue.read(self.handle, last, (buffer[last - start :],)))
        await settle(reads)

    async def _write_tail(self, offset: int, data: memoryview) -> None:
        """Write into the odd end through the page cache, and clean it at once.

        A dirty cached page beside O_DIRECT writes in the same folio lost acknowledged data on
        ext4 and xfs, so nothing else may write in that folio until the page is on the disk.
        """
        held = await self._take_exclusive(align_down(offset, FOLIO), 1 << 63)
        try:
            handle = self._tail_handle()
            try:
                await self._queue.write(handle, offset, (data,))
            except StorageError:
                self.unsynced = True  # some of it may have been written all the same
                raise
            try:
                await self._queue.datasync(handle)
            except SyncFailed as error:
                self.sync_failure = error  # another sync would succeed, and lie
                raise
            handle.drop_cache()
            self.size = max(self.size, offset + len(data))
        finally:
            self._release_exclusive(held)

    # ---- zeroing ----

    async def zero(self, offset: int, length: int, *, may_punch: bool = True) -> None:
        """Make a range read as zeros: punch, else convert, else write zeros.

        ``may_punch`` False keeps the space allocated. What lies past the end reads as zeros
        anyway and is left alone. Durable after ``sync``.
        """
        end = min(offset + length, self.size)
        unit = max(self._align, PUNCH_UNIT)
        first, last = align_up(offset, unit), align_down(end, unit)
        if first < last:
            await self._write_zeros(offset, first)
            if not await self._zero_blocks(first, last - first, may_punch):
                await self._write_zeros(first, last)
            offset = last
        await self._write_zeros(offset, end)

    def zeroes_fast(self, may_punch: bool) -> bool:
        """Whether zeroing needs no writing of zeros: True until the file system has refused."""
        return (may_punch and self._can_punch) or self._can_zero_range

    async def discard(self, offset: int, length: int) -> None:
        """Give the space of whole blocks inside the range back; they read as zeros afterwards.

        Blocks that are only partly inside keep their bytes. Where the file system cannot punch,
        nothing happens: discard is a hint.
        """
        unit = max(self._align, PUNCH_UNIT)
        first = align_up(offset, unit)
        last = align_down(min(offset + length, self.size), unit)
        if first < last:
            await self._zero_blocks(first, last - first, may_punch=True, only_punch=True)

    async def _zero_blocks(
        self, offset: int, length: int, may_punch: bool, only_punch: bool = False
    ) -> bool:
        if may_punch and self._can_punch:
            if await self._fallocate(FALLOCATE_PUNCH, offset, length):
                return True
            self._can_punch = False
        if not only_punch and self._can_zero_range:
            if await self._fallocate(FALLOCATE_ZERO, offset, length):
                return True
            self._can_zero_range = False
        return False

    async def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """False where this file cannot do it (the caller remembers); other errors are raised."""
        await self._wait_exclusive(offset, offset + length)
        self.unsynced = True  # not before: a sync while this waited does not cover it
        try:
            await self._queue.fallocate(self.handle, mode, offset, length)
        except StorageError as error:
            if error.errno in _REFUSED:
                return False
            raise
        return True

    async def _write_zeros(self, offset: int, end: int) -> None:
        zeros = memoryview(bytes(min(max(end - offset, 0), BOUNCE)))
        while offset < end:
            piece = min(end - offset, BOUNCE)
            await self.write(offset, (zeros[:piece],))
            offset += piece

    # ---- durability and length ----

    def sync(self) -> Completion[int]:
        """Make everything written so far durable. Raises SyncFailed, after which the state of
        what was not durable before is unknown."""
        if self.sync_failure is not None:
            failed: Completion[int] = Completion()
            failed.fail(self.sync_failure)
            return failed
        if self._hits is not None and self._hits.take_written():
            self.unsynced = True
        if not self.unsynced or self.cache is Cache.UNSAFE:
            return completed(0)
        # A write still in flight may land behind this sync: the next one must not be skipped.
        # (Of hits ``take_written`` knows that.)
        self.unsynced = bool(self._queue.changes_in_flight(self.handle, 0, 1 << 63))
        return self._queue.datasync(self.handle)

    def truncate(self, size: int) -> None:
        """Set the length, durably. No request may be in flight."""
        self.handle.truncate(size)
        self.size = size
        self.handle.sync()

    def refresh_size(self) -> int:
        """Ask the system for the length again."""
        self.size = self.handle.size()
        return self.size

    def region(self, offset: int) -> tuple[bool, int]:
        """Whether ``offset`` lies in a hole, and where that, or the data there, ends. Past the end
        of the file is a hole without an end."""
        if offset >= self.size:
            return True, 1 << 63
        data = self.handle.next_data(offset)
        if data > offset:
            return True, (1 << 63 if data >= self.size else data)
        hole = self.handle.next_hole(offset)
        return False, hole if hole > offset else 1 << 63

    def close(self) -> None:
        """Close every descriptor. No request may be in flight."""
        if self._buffered is not None and self._buffered is not self.handle:
            self._buffered.close()
        self.handle.close()

    # ---- writes past this object ----

    def follow(self, hits: Outside | None) -> None:
        """Know of writes that do not come through here; None: there are none any more."""
        if self._hits is not None and hits is None and self._hits.take_written():
            self.unsynced = True
        self._hits = hits

    def plain_ends(self) -> tuple[int, int]:
        """Up to where an aligned read, and a write, needs nothing but a transfer."""
        return min(self._direct_end(), self.size), min(self._write_end(), self.size)

    # ---- alignment and exclusion ----

    def _direct_end(self) -> int:
        """Where the part begins that O_DIRECT must not touch."""
        return align_down(self.size, self._align) if self.handle.direct else 1 << 63

    def _write_end(self) -> int:
        """The same for writes: a file whose length is aligned may grow under O_DIRECT."""
        if self.size % self._align == 0:
            return 1 << 63
        return self._direct_end()

    def _fits(self, offset: int, length: int, buffers: Sequence[memoryview]) -> bool:
        """Whether O_DIRECT takes this as it is."""
        align = self._align
        if offset % align or length % align:
            return False
        if len(buffers) > 1 and any(len(buffer) % align for buffer in buffers):
            return False
        memory = self._memory
        return memory == 1 or not any(native.address_of(b) % memory for b in buffers)

    def _tail_handle(self) -> Handle:
        if self._buffered is None:
            self._buffered = self._host.reopen(self.handle)
        return self._buffered

    async def _wait_exclusive(self, start: int, end: int) -> None:
        while True:
            for held in self._exclusive:
                if overlaps(start, end, held.start, held.end):
                    break
            else:
                return
            await held.released

    async def _take_exclusive(self, start: int, end: int) -> _Exclusive:
        mine = _Exclusive(start, end)
        earlier = [h for h in self._exclusive if overlaps(start, end, h.start, h.end)]
        self._exclusive.append(mine)
        if self._hits is not None:
            mine.hold = self._hits.hold_host(start, end)
        for held in earlier:
            await held.released
        await self._drain_writes(start, end)
        if self._hits is not None:
            await self._hits.drained_host(start, end)
        return mine

    async def _drain_writes(self, start: int, end: int) -> None:
        """Wait for plain writes of the range that were submitted before."""
        for request in self._queue.changes_in_flight(self.handle, start, end):
            try:
                await request
            except StorageError:
                pass  # its own caller hears of it

    def _release_exclusive(self, held: _Exclusive) -> None:
        self._exclusive.remove(held)
        if self._hits is not None and held.hold is not None:
            self._hits.release(held.hold)
        held.released.set(None)


def _total(buffers: Sequence[Any]) -> int:
    if len(buffers) == 1:
        return len(buffers[0])
    return sum(len(buffer) for buffer in buffers)


class _Cursor:
    """Copies to or from a list of buffers as if it were one."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._left = list(buffers)

    def put(self, data: memoryview) -> None:
        while len(data):
            head = self._left[0]
            n = min(len(head), len(data))
            head[:n] = data[:n]
            data = data[n:]
            self._advance(n)

    def get(self, length: int) -> memoryview:
        head = self._left[0]
        if len(head) >= length:
            self._advance(length)
            return head[:length]
        out = bytearray()
        while len(out) < length:
            part = self._left[0][: length - len(out)]
            out += part
            self._advance(len(part))
        return memoryview(out)

    def _advance(self, count: int) -> None:
        if count == len(self._left[0]):
            self._left.pop(0)
        else:
            self._left[0] = self._left[0][count:]


__all__ = ["Cache", "File", "SyncFailed"]
