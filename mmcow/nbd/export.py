# SPDX-License-Identifier: MIT
"""One disk that a server offers, and what has been asked of it.

Owns: the export's flags and limits, its counters, the mapping from commands to the engine's verbs.
Never: speaks the wire format (``protocol``), knows connections.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from mmcow.errors import UsageError
from mmcow.formats.driver import Kind
from mmcow.native import ffi, lib
from mmcow.nbd import protocol as wire
from mmcow.tasks import Completion, completed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mmcow.aio import Image
    from mmcow.engine.lookup import Segment
    from mmcow.nbd.live import Stream

log = logging.getLogger("mmcow.nbd")

# Errors come in swarms, and some a guest can cause at will: not more than one line in this time.
LOG_SECONDS = 1.0

# Throughput is told over the time since a look that is at least so old.
RATE_SECONDS = 0.4

# Of a range that may read as zeros this much is looked at before all of it is.
GLANCE = 16 << 10

# Extents told in one answer to BLOCK_STATUS: bounds the answer and the time under the lock.
EXTENTS_MOST = 2048


class _Look(NamedTuple):
    """The counters at one moment."""

    at: float
    operations: dict[str, int]
    bytes: dict[str, int]


class Counters:
    """What has been done for clients: operations and bytes per verb, latency in powers of two."""

    BUCKETS = 32  # of microseconds: bucket n counts [2^(n-1), 2^n)

    def __init__(self) -> None:
        self.errors = 0
        self.started = time.monotonic()
        # What the pump has done by itself, counted by it; the rest is counted here.
        self.hits: Any = ffi.new("struct mmc_pump_counts *")
        self._operations: dict[str, int] = {}
        self._bytes: dict[str, int] = {}
        self._latency = [0] * self.BUCKETS
        self._looks: deque[_Look] = deque([_Look(self.started, {}, {})])

    @property
    def operations(self) -> dict[str, int]:
        """Finished requests by verb."""
        return self._with_hits(self._operations, self.hits.operations)

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes that they were about."""
        return self._with_hits(self._bytes, self.hits.bytes)

    @property
    def latency(self) -> list[int]:
        """Finished requests by how long they took."""
        return [sum(pair) for pair in zip(self._latency, self.hits.latency, strict=True)]

    def _with_hits(self, counted: dict[str, int], hits: Any) -> dict[str, int]:
        total = dict(counted)
        for code, verb in ((lib.MMC_READ, "read"), (lib.MMC_WRITE, "write")):
            if self.hits.operations[code]:
                total[verb] = total.get(verb, 0) + hits[code]
        return total

    @property
    def requests(self) -> int:
        """Finished requests of all verbs."""
        return sum(self.operations.values())

    def count(self, verb: str, length: int, seconds: float) -> None:
        """One finished request."""
        self._operations[verb] = self._operations.get(verb, 0) + 1
        self._bytes[verb] = self._bytes.get(verb, 0) + length
        self._latency[min(int(seconds * 1e6).bit_length(), self.BUCKETS - 1)] += 1

    def throughput(self) -> dict[str, Any]:
        """Operations and bytes per second since somebody last asked (at least ``RATE_SECONDS``
        ago, however many ask), else since the start; ``seconds`` says how long that is. Nothing is
        sampled while nobody asks."""
        now = time.monotonic()
        looks = self._looks
        while len(looks) > 1 and looks[1].at <= now - RATE_SECONDS:
            looks.popleft()
        if now - looks[-1].at >= RATE_SECONDS / 4:
            looks.append(_Look(now, dict(self.operations), dict(self.bytes)))
        seconds = max(now - looks[0].at, 1e-3)
        return {
            "seconds": round(seconds, 3),
            "operations": _rates(self.operations, looks[0].operations, seconds),
            "bytes": _rates(self.bytes, looks[0].bytes, seconds),
        }


def _rates(now: dict[str, int], before: dict[str, int], seconds: float) -> dict[str, float]:
    """Per second, of what has changed."""
    return {
        verb: round((count - before.get(verb, 0)) / seconds, 1)
        for verb, count in now.items()
        if count != before.get(verb, 0)
    }


class Export:
    """``image`` under ``name``. Methods run in the server's loop; ``begin`` ones under the lock."""

    def __init__(self, name: str, image: Image, *, read_only: bool = False) -> None:
        try:
            encoded = name.encode()
        except UnicodeEncodeError:  # of a file name that is not UTF-8
            raise UsageError(
                f"{image.path}: export name {name!r} is not UTF-8; give another one"
            ) from None
        if len(encoded) > wire.STRING_MOST or "\0" in name:
            raise UsageError(
                f"{image.path}: export name {name[:64]!r}: longer than 4096 bytes, or NUL in it"
            )
        self.name = name
        self.image = image
        self.read_only = read_only or not image.writable
        self.connections = 0
        self.counters = Counters()
        self.stream: Stream | None = None  # the last one started
        self._logged = -LOG_SECONDS
        self._unlogged = 0

    @property
    def size(self) -> int:
        """What clients are told when they attach."""
        return self.image.size

    @property
    def preferred_block(self) -> int:
        """Smaller requests cost a read-modify-write or a fill: one cluster, at least a page."""
        return min(max(self.image.engine.top.info.cluster_size, 4096), 1 << 20)

    def flags(self, *, structured: bool) -> int:
        """Transmission flags. Multi-conn holds because a flush covers every connection's writes."""
        flags = wire.HAS_FLAGS | wire.SEND_FLUSH | wire.CAN_MULTI_CONN | wire.SEND_CACHE
        if structured:
            flags |= wire.SEND_DF
        if self.read_only:
            return flags | wire.READ_ONLY
        return flags | wire.SEND_FUA | wire.SEND_TRIM | wire.SEND_WRITE_ZEROES | wire.SEND_FAST_ZERO

    def block_sizes(self) -> tuple[int, int, int]:
        """Least, preferred and greatest request, in bytes. Any byte range is served."""
        return 1, self.preferred_block, wire.PAYLOAD_MOST

    # ---- verbs: each starts at once ----

    def read(self, offset: int, into: memoryview) -> Completion[int]:
        """Fill ``into``."""
        return self.image.engine.read(offset, into)

    def reads_zero(self, offset: int, length: int) -> bool:
        """Whether a range is known to read as zeros, without asking the disk for holes."""
        if self.image.engine.gate.closed:
            return False
        # Its beginning first: most often that tells already, and a long range has many segments.
        return self._all_zero(offset, min(length, GLANCE)) and self._all_zero(offset, length)

    def _all_zero(self, offset: int, length: int) -> bool:
        segments = self.image.engine.lookup.resolve(offset, length)
        return all(segment.kind in (Kind.ZERO, Kind.BELOW) for segment in segments)

    def write(self, offset: int, data: memoryview, *, durable: bool) -> Completion[Any]:
        """Write ``data``; durable on completion if ``durable`` (FUA)."""
        return self._durably(self.image.engine.write(offset, data), durable)

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fast: bool, durable: bool
    ) -> Completion[Any]:
        """Zero a range; with ``fast`` only if that costs no writing of zeros."""
        engine = self.image.engine
        if fast and not engine.zeroes_fast(may_unmap):
            return _failed(wire.NotFast("zeroing would not be faster than writing"))
        return self._durably(engine.write_zeroes(offset, length, may_unmap), durable)

    def trim(self, offset: int, length: int, *, durable: bool) -> Completion[Any]:
        """Discard a range."""
        return self._durably(self.image.engine.discard(offset, length), durable)

    def flush(self) -> Completion[Any]:
        """Make durable what was acknowledged before."""
        return self.image.reactor.spawn(self.image.engine.flush())

    def cache(self) -> Completion[Any]:
        """Nothing to do: reading ahead for a client that asks for it gains nothing here."""
        return completed(0)

    def _durably(self, completion: Completion[Any], durable: bool) -> Completion[Any]:
        if not durable:
            return completion
        return self.image.reactor.spawn(self._then_flush(completion))

    async def _then_flush(self, completion: Completion[Any]) -> None:
        await completion
        await self.image.engine.flush()

    def failed(self, error: BaseException) -> None:
        """A request ended with an error: count it, tell the log."""
        if isinstance(error, wire.NotFast):
            return
        self.counters.errors += 1
        now = time.monotonic()
        if now - self._logged < LOG_SECONDS:
            self._unlogged += 1
            return
        more = f" (and {self._unlogged} errors before it)" if self._unlogged else ""
        log.error("export %r: %s%s", self.name, error, more)
        self._logged, self._unlogged = now, 0

    def extents(
        self, offset: int, length: int, context: str, *, one: bool
    ) -> list[tuple[int, int]]:
        """(length, flags) of a range for a metadata context; may stop short of ``length``."""
        of = _allocation if context == wire.BASE_ALLOCATION else _depth
        walk = self.image.engine.lookup.block_status(offset, length)
        merged: list[tuple[int, int]] = []
        for extent_length, flags in _limited(walk, of):
            if merged and merged[-1][1] == flags:
                merged[-1] = (merged[-1][0] + extent_length, flags)
            elif one and merged:
                break
            else:
                merged.append((extent_length, flags))
        return merged


def _limited(walk: Iterator[Segment], of: Any) -> Iterator[tuple[int, int]]:
    for segment in islice(walk, EXTENTS_MOST):
        yield segment.length, of(segment)


def _allocation(segment: Segment) -> int:
    if segment.kind in (Kind.ZERO, Kind.BELOW):
        return wire.STATE_HOLE | wire.STATE_ZERO
    return 0


def _depth(segment: Segment) -> int:
    return 0 if segment.kind is Kind.BELOW else segment.depth + 1


def _failed(error: Exception) -> Completion[Any]:
    completion: Completion[Any] = Completion()
    completion.fail(error)
    return completion
