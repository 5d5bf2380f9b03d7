# SPDX-License-Identifier: MIT
"""Every request algorithm, once for all formats: read, write, copy-up, zero, discard, resize.

Owns: the split of a request over a chain of layers, two-phase allocation (reserve, write,
publish), fills of partial clusters, the order of resize. A layer's driver says where bytes are;
the engine moves them.

Never: knows a format, decides what a mode or option means, blocks (every wait is an await).

Rules of the request paths (docs/ARCHITECTURE.md "Requests"):

- A cluster is published only after its bytes were written, and becomes durable only by a flush
  that synced those bytes first. Until then readers see the old content.
- Concurrent requests to a cluster that is being allocated wait (``Claims``), then find it there.
- A write that covers whole clusters reads nothing from below; otherwise head, guest data and
  tail go out as one write.
- Bytes of the data file in an unallocated cluster are garbage: nothing ever shows them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from mmcow.engine.copies import Copies
from mmcow.engine.flush import Flusher
from mmcow.engine.gate import Claims, Gate
from mmcow.engine.hits import Hits
from mmcow.engine.lookup import Lookup, Segment
from mmcow.errors import ReadOnlyError, SyncFailed, UsageError
from mmcow.formats.driver import Driver, Extent, Kind, Reservation
from mmcow.native import aligned
from mmcow.ranges import align_down, align_up
from mmcow.storage.window import settle
from mmcow.tasks import completed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mmcow.tasks import Completion, Reactor

# A larger request is done in pieces, so that bounce buffers and claims stay bounded.
PIECE = 4 << 20
READ_PIECE = 16 << 20
# Zeroing moves no data: larger pieces, still bounded so that others get a turn.
ZERO_PIECE = 1 << 30
# Metadata changed and not yet written out; a flush starts by itself at this bound.
STAGED_MOST = 16 << 20

_ZEROS = bytes(1 << 16)


class Engine:
    """Requests on a chain of layers, top first. Methods run under the reactor's lock."""

    def __init__(
        self, reactor: Reactor, layers: list[Driver], *, writable: bool, name: str
    ) -> None:
        self.reactor = reactor
        self.layers = layers
        self.top = layers[0]
        self.writable = writable
        self.name = name
        # Of no use before ``hits.refresh`` was called once.
        self.hits = Hits(self)
        self.gate = Gate(self.hits)
        self.flusher = Flusher(reactor, self.top, self.hits)
        # Set by the opener where nobody vouched for "raw": see _guard_first_sector.
        self.first_sector_guard: Callable[[bytes], str | None] | None = None
        self.lookup = Lookup(layers)
        self._claims = Claims(self.hits)
        self._copies = Copies(self, self._read_from, self._write_reserved)

    @property
    def size(self) -> int:
        """Of the disk, in bytes; a multiple of 512."""
        return self.top.info.size

    # ---- read ----

    def read(self, offset: int, into: memoryview) -> Completion[int]:
        """Fill ``into`` from the disk. Starts at once; completes with a number to be ignored."""
        self.check_range(offset, len(into))
        if not len(into):
            return completed(0)
        if not self.gate.closed and len(into) <= READ_PIECE:
            first = self.top.map(offset, len(into))[0]  # the common case, without the walk
            if first.kind is Kind.DATA and first.length >= len(into):
                return self._counted(self.top.data.read(first.host, (into,)))
            segments = self.lookup.resolve(offset, len(into))
            if len(segments) == 1 and segments[0].kind is Kind.DATA:
                segment = segments[0]
                file = self.layers[segment.depth].data
                return self._counted(file.read(segment.host, (into,)))
        return self.reactor.spawn(self._read(offset, into))

    def _counted(self, completion: Completion[int]) -> Completion[int]:
        """Count a request that needs no coroutine as inside until it is done."""
        self.gate.inside += 1
        completion.on_done(self._leave)
        return completion

    def _leave(self, completion: Completion[int]) -> None:
        if isinstance(completion.error, SyncFailed):
            self.flusher.fail(completion.error)
        self.gate.leave()

    async def _read(self, offset: int, into: memoryview) -> int:
        await self.gate.enter()
        try:
            await self._read_from(0, offset, into)
        finally:
            self.gate.leave()
        return len(into)

    async def _read_from(self, depth: int, offset: int, into: memoryview) -> None:
        """Read as seen from layer ``depth``, in pieces: a fragmented range is many requests."""
        for start in range(0, len(into), READ_PIECE):
            await self._read_piece(depth, offset + start, into[start : start + READ_PIECE])

    async def _read_piece(self, depth: int, offset: int, into: memoryview) -> None:
        waits: list[Completion[int]] = []
        for segment in self.lookup.resolve(offset, len(into), depth):
            at = segment.offset - offset
            part = into[at : at + segment.length]
            if segment.kind is Kind.DATA:
                waits.append(self.layers[segment.depth].data.read(segment.host, (part,)))
            elif segment.kind is Kind.SPECIAL:
                waits.append(self.reactor.spawn(self._read_special(segment, part)))
            else:
                _fill_zeros(part)
        await settle(waits)

    async def _read_special(self, segment: Segment, into: memoryview) -> int:
        """A part of a special extent: the driver reads the whole, the part is copied."""
        driver = self.layers[segment.depth]
        cluster = align_down(segment.offset, driver.info.cluster_size)
        end = align_up(segment.offset + segment.length, driver.info.cluster_size)
        for extent in driver.map(cluster, end - cluster):
            whole = memoryview(bytearray(extent.length))
            await driver.read_special(extent, whole)
            first = max(extent.offset, segment.offset)
            last = min(extent.offset + extent.length, segment.offset + segment.length)
            into[first - segment.offset : last - segment.offset] = whole[
                first - extent.offset : last - extent.offset
            ]
        return len(into)

    # ---- write ----

    def write(self, offset: int, data: memoryview) -> Completion[int]:
        """Write ``data``. Starts at once; ``data`` must stay unchanged until completion."""
        self._check_change("write", offset, len(data))
        if not self.gate.closed and not self.top.data.cache.write_through and len(data) <= PIECE:
            extents = self.top.map(offset, len(data)) if len(data) else []
            if (
                extents
                and extents[0].kind is Kind.DATA
                and extents[0].length >= len(data)
                and (offset >= 512 or self.first_sector_guard is None)
            ):
                return self._counted(self.top.data.write(extents[0].host, (data,)))
        return self.reactor.spawn(self._write(offset, data))

    async def _write(self, offset: int, data: memoryview) -> int:
        return await self._change(self._write_pieces(offset, data), len(data))

    async def _change(self, work: Awaitable[None], length: int) -> int:
        """Run one change inside the gate, and flush it if the cache mode wants that."""
        await self.gate.enter()
        try:
            await work
            if self.top.data.cache.write_through:
                await self.flusher.flush()
        except SyncFailed as error:  # also of the odd end of a file, which is synced at once
            self.flusher.fail(error)
            raise
        finally:
            self.gate.leave()
        return length

    async def _write_pieces(self, offset: int, data: memoryview) -> None:
        self.flusher.check()
        while len(data):
            stop = align_down(offset + PIECE, self.top.info.cluster_size)
            length = min(len(data), stop - offset)
            if offset < 512 and self.first_sector_guard is not None:
                await self._write_guarded(offset, data[:length])
            else:
                await self._write_piece(offset, data[:length])
            offset, data = offset + length, data[length:]

    async def _write_guarded(self, offset: int, data: memoryview) -> None:
        """Look at the first sector and write it, alone: two halves of a magic, each harmless, must
        not meet. A raw disk claims nothing else: nothing is allocated there."""
        claim = await self._claims.take(0, 512)
        try:
            await self._guard_first_sector(offset, data)
            await self._write_piece(offset, data)
        finally:
            self._claims.drop(claim)

    async def _guard_first_sector(self, offset: int, data: memoryview) -> None:
        """A disk taken for raw only because it had no magic must not be given one by its guest:
        the next opening would follow names that the guest wrote."""
        assert self.first_sector_guard is not None
        head = aligned(512)
        await self._read_from(0, 0, head)
        part = data[: 512 - offset]
        head[offset : offset + len(part)] = part
        found = self.first_sector_guard(bytes(head))
        if found is not None:
            raise UsageError(
                f"{self.name}: write to the first sector refused: it would make this disk look "
                f"like {found}; open it with the format 'raw' given to allow that"
            )

    async def _write_piece(self, offset: int, data: memoryview) -> None:
        extents = self.lookup.extents(offset, offset + len(data))
        if all(extent.kind is Kind.DATA for extent in extents):
            await self._write_mapped(offset, data, extents)
        else:
            await self._write_allocating(offset, data)

    async def _write_mapped(self, offset: int, data: memoryview, extents: list[Extent]) -> None:
        writes = []
        for extent in extents:
            at = extent.offset - offset
            part = data[at : at + extent.length]
            writes.append(self.top.data.write(extent.host, (part,)))
        await settle(writes)

    async def _write_allocating(self, offset: int, data: memoryview) -> None:
        """Write where at least one cluster is not this layer's yet: reserve, write, publish."""
        cluster = self.top.info.cluster_size
        end = offset + len(data)
        start, stop = align_down(offset, cluster), align_up(end, cluster)
        claim = await self._claims.take(start, stop)
        try:
            extents = self.lookup.extents(start, stop)
            if all(extent.kind is Kind.DATA for extent in extents):
                inner = self.lookup.extents(offset, end)
                await self._write_mapped(offset, data, inner)
                return
            head, tail = await self._fills(offset, end, start, stop, extents)
            reservation = self.top.reserve(start, stop - start)
            try:
                await self._write_reserved(reservation, offset - len(head), (head, data, tail))
                self.flusher.check()  # a flush may have failed meanwhile
            except BaseException:
                self.top.abandon(reservation)
                raise
            self.top.publish(reservation)
        finally:
            self._claims.drop(claim)
        self._bound_staged()

    async def _fills(
        self, offset: int, end: int, start: int, stop: int, extents: list[Extent]
    ) -> tuple[memoryview, memoryview]:
        """Content that the first and last cluster need around the guest's bytes."""
        stop = min(stop, self.size)  # nothing is needed behind the disk's end
        head_length = offset - start if extents[0].kind is not Kind.DATA else 0
        tail_length = max(stop - end, 0) if extents[-1].kind is not Kind.DATA else 0
        if head_length or tail_length:
            self._require_base()
        head, tail = aligned(head_length), aligned(tail_length)
        if head_length:
            await self._read_from(0, start, head)
        if tail_length:
            await self._read_from(0, end, tail)
        return head, tail

    @property
    def _lacks_base(self) -> bool:
        return self.top.info.has_backing and len(self.layers) == 1

    def _require_base(self) -> None:
        """Refuse to fill the rest of a cluster from a base that was left out: zeros would hide it
        for good."""
        if self._lacks_base:
            raise UsageError(
                f"{self.name}: changing a part of a cluster of {self._cluster} bytes needs the "
                "backing file, which was left out at opening"
            )

    async def _write_reserved(
        self, reservation: Reservation, offset: int, buffers: tuple[memoryview, ...]
    ) -> None:
        """Write consecutive buffers from ``offset`` into reserved room, piece by piece."""
        end = offset + sum(len(buffer) for buffer in buffers)
        writes = []
        for piece_offset, piece_length, host in reservation.pieces:
            first, last = max(piece_offset, offset), min(piece_offset + piece_length, end)
            if first < last:
                parts = _slice(buffers, first - offset, last - offset)
                writes.append(self.top.data.write(host + first - piece_offset, parts))
        await settle(writes)

    def _bound_staged(self) -> None:
        """Staged metadata is bounded: past the bound it is written out without being asked."""
        window = self.top.window
        if window is not None and self.flusher.idle and window.dirty() > STAGED_MOST:
            self.reactor.spawn(self._flush_quietly())

    async def relieve(self) -> None:
        """Write staged metadata out where there is much of it: hits leave that to others."""
        window = self.top.window
        if window is not None and window.dirty() > STAGED_MOST:
            await self._flush_quietly()

    async def _flush_quietly(self) -> None:
        try:
            await self.flush()
        except Exception:  # noqa: BLE001 - kept by the flusher, or comes again at the next flush
            pass

    # ---- zeroes and discard ----

    def write_zeroes(self, offset: int, length: int, may_unmap: bool = True) -> Completion[int]:
        """Make a range read as zeros. ``may_unmap`` False keeps its space reserved."""
        self._check_change("write_zeroes", offset, length)
        work = self._zero_pieces(offset, offset + length, may_unmap)
        return self.reactor.spawn(self._change(work, length))

    async def _zero_pieces(self, offset: int, end: int, may_unmap: bool) -> None:
        zero = partial(self._zero_extent, may_unmap=may_unmap)
        if offset < min(end, 512) and self.first_sector_guard is not None:
            # Zeros complete a magic as well as letters do ("QED" and a NUL).
            claim = await self._claims.take(0, 512)
            try:
                await self._guard_first_sector(offset, memoryview(bytes(min(end, 512) - offset)))
                for extent in self.top.map(offset, min(end, 512) - offset):
                    await zero(extent)
            finally:
                self._claims.drop(claim)
            offset = min(end, 512)
        await self._in_claims(offset, end, zero)
        self._bound_staged()

    async def _in_claims(
        self, offset: int, end: int, work: Callable[[Extent], Awaitable[None]]
    ) -> None:
        """Do ``work`` on every extent of the top layer in a range, its clusters claimed.

        Extents are asked for a few at a time: a hostile bitmap may hold millions of them.
        """
        self.flusher.check()
        cluster = self.top.info.cluster_size
        while offset < end:
            stop = min(end, align_down(offset + max(ZERO_PIECE, cluster), cluster))
            claim = await self._claims.take(align_down(offset, cluster), align_up(stop, cluster))
            try:
                while offset < stop:
                    for extent in self.top.map(offset, stop - offset):
                        await work(extent)
                        offset = extent.offset + extent.length
            finally:
                self._claims.drop(claim)

    async def _zero_extent(self, extent: Extent, may_unmap: bool) -> None:
        """Zero one extent of the top layer; its clusters are claimed by the caller."""
        if extent.kind is Kind.DATA:
            await self.top.data.zero(extent.host, extent.length, may_punch=may_unmap)
            return
        if extent.kind is Kind.ZERO and may_unmap:
            return
        if may_unmap and self._reads_zero_below(extent.offset, extent.length):
            return  # nothing anywhere below: it reads as zeros already
        cluster = self.top.info.cluster_size
        end = extent.offset + extent.length
        first, last = align_up(extent.offset, cluster), align_down(end, cluster)
        if end == self.size:
            last = align_up(end, cluster)  # a last partial cluster is whole as far as it exists
        if first >= last:
            await self._zero_partial(extent.offset, end)
            return
        await self._zero_partial(extent.offset, first)
        await self._zero_clusters(first, last, may_unmap)
        await self._zero_partial(min(last, end), end)

    def _reads_zero_below(self, offset: int, length: int) -> bool:
        if self._lacks_base:
            return False
        segments = self.lookup.resolve(offset, length)
        return all(segment.kind in (Kind.BELOW, Kind.ZERO) for segment in segments)

    async def _zero_partial(self, start: int, end: int) -> None:
        """Zero part of a cluster that is not this layer's yet: the rest is filled from below."""
        cluster = self.top.info.cluster_size
        while start < end:
            stop = min(end, align_up(start + 1, cluster))
            first = align_down(start, cluster)
            content = aligned(min(first + cluster, self.size) - first)
            if stop - start < len(content):
                self._require_base()
            await self._read_from(0, first, content)
            _fill_zeros(content[start - first : stop - first])
            reservation = self.top.reserve(first, cluster)
            try:
                await self._write_reserved(reservation, first, (content,))
            except BaseException:
                self.top.abandon(reservation)
                raise
            self.top.publish(reservation)
            start = stop

    async def _zero_clusters(self, first: int, last: int, may_unmap: bool) -> None:
        """Zero whole clusters. By a mark where the format has one; else their room is emptied
        first (what lies there under an unset bit is garbage), and published then."""
        if self.top.info.can_zero and may_unmap:
            self.top.unmap(first, last - first, Kind.ZERO)
            return
        reservation = self.top.reserve(first, last - first)
        try:
            for _, length, host in reservation.pieces:
                await self.top.data.zero(host, length, may_punch=may_unmap)
        except BaseException:
            self.top.abandon(reservation)
            raise
        self.top.publish(reservation)

    def zeroes_fast(self, may_unmap: bool) -> bool:
        """Whether ``write_zeroes`` costs less than writing zeros, as far as is known."""
        return (self.top.info.can_zero and may_unmap) or self.top.data.zeroes_fast(may_unmap)

    def discard(self, offset: int, length: int) -> Completion[int]:
        """Give space back where this layer has the range; what lies below stays hidden.

        Whole blocks inside read as zeros afterwards, the rest keeps its content: a hint.
        """
        self._check_change("discard", offset, length)
        work = self._in_claims(offset, offset + length, self._discard_extent)
        return self.reactor.spawn(self._change(work, length))

    async def _discard_extent(self, extent: Extent) -> None:
        if extent.kind is not Kind.DATA:
            return
        if not self.top.info.can_zero:
            await self.top.data.discard(extent.host, extent.length)
            return
        cluster = self.top.info.cluster_size
        first = align_up(extent.offset, cluster)
        last = align_down(extent.offset + extent.length, cluster)
        if first < last:
            self.top.unmap(first, last - first, Kind.ZERO)

    # ---- flush, copy-up, giving up, resize ----

    async def flush(self) -> None:
        """Make every change durable that was acknowledged before this call."""
        if not self.writable:
            return
        # Not beside a resize: its steps are durable in an order that a flush would break.
        await self.gate.enter()
        try:
            await self.flusher.flush()
        finally:
            self.gate.leave()

    async def copy_up(self, offset: int, length: int) -> int:
        """Bring a range of whole clusters into the top layer from below; returns the bytes moved.

        What is there already stays. Zeros are punched, not written. Not durable before a flush.
        """
        await self.gate.enter()
        try:
            self.flusher.check()
            return await self._copy_up(offset, min(offset + length, self.size))
        finally:
            self.gate.leave()

    async def _copy_up(self, offset: int, end: int) -> int:
        self._require_base()
        cluster = self.top.info.cluster_size
        claim = await self._claims.take(offset, align_up(end, cluster))
        try:
            extents = self.lookup.extents(offset, align_up(end, cluster))
            moved = await self._copies.run([e for e in extents if e.kind is Kind.BELOW])
        finally:
            self._claims.drop(claim)
        self._bound_staged()
        return moved

    async def give_up(self, offset: int, length: int) -> None:
        """Show the base again in a range whose content is there already, durably.

        Alone in the engine: the bits are cleared, that is made durable, and only then is the
        space given back. A stop anywhere leaves the same disk.
        """
        await self.gate.close()
        try:
            self.flusher.check()
            given: list[Extent] = []
            for extent in self.lookup.extents(offset, align_up(offset + length, self._cluster)):
                if extent.kind is not Kind.BELOW:
                    self.top.unmap(extent.offset, extent.length, Kind.BELOW)
                    if extent.kind is Kind.DATA:
                        given.append(extent)
            await self.flusher.flush()
            if given and not self.top.info.can_zero:
                # A bitmap format: each cluster has its own place, so between two that were given up
                # lies garbage. One punch: 8192 of 4 KiB took 10.9 s, one over all of them 1.0 s.
                first, last = given[0], given[-1]
                await self.top.data.discard(first.host, last.host + last.length - first.host)
        finally:
            self.gate.open()

    def push(self, driver: Driver) -> None:
        """Put a layer on top of the chain; the one below is only read from here on.

        Only inside ``gate.close``, with everything flushed: no request knows the old top.
        """
        assert self.gate.closed
        self.layers.insert(0, driver)
        self.top = driver
        self.flusher = Flusher(self.reactor, driver, self.hits)
        self.first_sector_guard = None

    async def drop_backing(self) -> None:
        """Stop depending on what lies below, durably: every cluster must be in the top layer.

        Alone in the engine. Afterwards the chain is the top layer; the caller closes the others.
        """
        self._check_writable("drop_backing")
        await self.gate.close()
        try:
            await self.flusher.flush()
            await self.top.drop_backing()
            del self.layers[1:]
        except SyncFailed as error:
            self.flusher.fail(error)
            raise
        finally:
            self.gate.open()

    @property
    def _cluster(self) -> int:
        return self.top.info.cluster_size

    async def resize(self, size: int, *, shrink: bool = False) -> None:
        """Change the disk's size (rounded up to 512), durably. ``shrink`` allows losing its end."""
        self._check_writable("resize")
        size = align_up(size, 512)
        if size < self.size and not shrink:
            raise UsageError(
                f"{self.name}: resize from {self.size} to {size} would lose data at the end: "
                "allow it explicitly (shrink)"
            )
        await self.gate.close()
        try:
            await self.flusher.flush()
            below = self._size_below(size)
            edge = align_down(self.size, self._cluster)
            if size > self.size and edge != self.size and below > self.size:
                await self._copy_up(edge, self.size)
                await self.flusher.flush()
            if size != self.size:
                await self.top.resize(size, below)
        except SyncFailed as error:
            self.flusher.fail(error)
            raise
        finally:
            self.gate.open()

    def _size_below(self, size: int) -> int:
        """Length of what lies below the top, 0 without a base. A grow must know it: the base must
        not show behind the old end."""
        if not self.top.info.has_backing:
            return 0
        if len(self.layers) > 1:
            return self.layers[1].info.size
        if size > self.size:
            raise UsageError(
                f"{self.name}: growing needs the backing file, which was left out at opening"
            )
        return 0

    async def close(self) -> None:
        """Wait for requests in flight, then flush. Resources are released by the caller."""
        await self.gate.close()
        try:
            if self.writable and self.flusher.failure is None:
                await self.flusher.flush()
        finally:
            self.hits.keep_out()  # another thread's write, begun now, would never be flushed
            self.gate.open()

    # ---- checks ----

    def check_range(self, offset: int, length: int) -> None:
        """Raise UsageError unless the range lies inside the disk."""
        if offset < 0 or length < 0 or offset + length > self.top.info.size:
            raise UsageError(
                f"{self.name}: range {offset}+{length} is not inside the disk of "
                f"{self.top.info.size} bytes"
            )

    def _check_writable(self, what: str) -> None:
        if not self.writable:
            raise ReadOnlyError(self.name, what)
        self.reactor.check()
        self.flusher.check()

    def _check_change(self, what: str, offset: int, length: int) -> None:
        self.check_range(offset, length)
        self._check_writable(what)


def _fill_zeros(part: memoryview) -> None:
    for start in range(0, len(part), len(_ZEROS)):
        stop = min(start + len(_ZEROS), len(part))
        part[start:stop] = _ZEROS[: stop - start]


def _slice(buffers: tuple[memoryview, ...], start: int, end: int) -> list[memoryview]:
    """The bytes [start, end) of consecutive buffers, without copying."""
    parts = []
    for buffer in buffers:
        first, last = max(start, 0), min(end, len(buffer))
        if first < last:
            parts.append(buffer[first:last])
        start, end = start - len(buffer), end - len(buffer)
    return parts
