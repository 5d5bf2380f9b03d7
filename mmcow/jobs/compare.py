# SPDX-License-Identifier: MIT
"""Whether two disks read the same, as ``qemu-img compare`` means it.

Owns: the comparison. Never: changes either image.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Self

from mmcow.errors import Mismatch, MmcowError
from mmcow.formats.driver import Kind
from mmcow.image import BlockStatus, Image
from mmcow.jobs.copying import DATA_STEP, DEPTH, PIECE, ZERO_STEP
from mmcow.jobs.progress import Meter, Progress
from mmcow.native import aligned, is_zero
from mmcow.ranges import SECTOR, align_down

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mmcow.tasks import Completion

_ZEROS = memoryview(bytes(PIECE))


class _Pair(NamedTuple):
    """A piece of both disks: a request in flight each, None where it is known to be zero."""

    offset: int
    length: int
    buffers: tuple[memoryview, memoryview]
    requests: tuple[Completion[int] | None, Completion[int] | None]


def compare(
    first: Image, second: Image, *, strict: bool = False, progress: Progress | None = None
) -> Mismatch | None:
    """Find the first sector in which two disks differ; None if there is none.

    What one disk has more must read as zeros. ``strict``: sizes must be equal, and so must be
    which ranges are allocated and which are known to be zero. Ranges known to be zero in both
    are not read. The result's ``offset`` is a multiple of 512 for content.
    """
    common, total = sorted((first.size, second.size))
    if strict and common != total:
        return Mismatch(common, "image size mismatch")
    meter = Meter(progress, total)
    with _Comparer(first, second) as comparer:
        for one, other in _both(first, second):
            if strict and _flags(one) != _flags(other):
                return comparer.finish() or Mismatch(one.offset, "block status mismatch")
            found = comparer.add(one, other)
            if found is not None:
                return found
            meter.reached(one.offset + one.length)
        found = comparer.finish()
        if found is not None:
            return found
    meter.finish()
    return None


def _flags(status: BlockStatus) -> tuple[bool, bool]:
    """Allocated in some layer; known to be zero."""
    return status.kind is not Kind.BELOW, status.is_zero


def _both(first: Image, second: Image) -> Iterator[tuple[BlockStatus, BlockStatus]]:
    """The statuses of both disks, cut to the same ranges; past its end a disk has zeros."""
    left, right = _statuses(first, second.size), _statuses(second, first.size)
    one, other = next(left, None), next(right, None)
    while one is not None and other is not None:
        length = min(one.length, other.length)
        yield one._replace(length=length), other._replace(length=length)
        one = _rest(one, length) or next(left, None)
        other = _rest(other, length) or next(right, None)


def _rest(status: BlockStatus, length: int) -> BlockStatus | None:
    if status.length == length:
        return None
    return status._replace(offset=status.offset + length, length=status.length - length)


def _statuses(image: Image, least: int) -> Iterator[BlockStatus]:
    for status in image.block_status():
        yield from _cut(status)
    if least > image.size:
        yield from _cut(BlockStatus(image.size, least - image.size, Kind.BELOW, 0, None, None))


def _cut(status: BlockStatus) -> Iterator[BlockStatus]:
    """Bounded lengths, for progress and stopping."""
    step = ZERO_STEP if status.is_zero else DATA_STEP
    end = status.offset + status.length
    for start in range(status.offset, end, step):
        yield status._replace(offset=start, length=min(step, end - start))


class _Comparer:
    """Pieces of both disks in flight, compared in order. On leaving nothing is in flight."""

    def __init__(self, first: Image, second: Image) -> None:
        self._images = (first, second)
        self._pairs: deque[_Pair] = deque()
        self._free: list[tuple[memoryview, memoryview]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pair in self._pairs:
            for image, request in zip(self._images, pair.requests, strict=True):
                if request is not None:
                    try:
                        image.reactor.wait(request)
                    except MmcowError:
                        pass  # the result is known, or another error is on its way
        self._pairs.clear()

    def add(self, one: BlockStatus, other: BlockStatus) -> Mismatch | None:
        """Start comparing a range; returns a difference found meanwhile in an earlier one."""
        offset, length = one.offset, one.length
        statuses = (one, other)
        if one.is_zero and other.is_zero:
            return None
        while length:
            step = min(length, PIECE - offset % PIECE)
            buffers = self._free.pop() if self._free else (aligned(PIECE), aligned(PIECE))
            requests = [
                None if status.is_zero else _start(image, offset, buffer[:step])
                for image, status, buffer in zip(self._images, statuses, buffers, strict=True)
            ]
            self._pairs.append(_Pair(offset, step, buffers, (requests[0], requests[1])))
            if len(self._pairs) >= DEPTH:
                found = self._settle()
                if found is not None:
                    return found
            offset, length = offset + step, length - step
        return None

    def finish(self) -> Mismatch | None:
        """Compare what is left."""
        while self._pairs:
            found = self._settle()
            if found is not None:
                return found
        return None

    def _settle(self) -> Mismatch | None:
        pair = self._pairs[0]
        parts: list[memoryview | None] = []
        for image, request, buffer in zip(self._images, pair.requests, pair.buffers, strict=True):
            if request is not None:
                image.reactor.wait(request)
            parts.append(None if request is None else buffer[: pair.length])
        self._pairs.popleft()
        self._free.append(pair.buffers)
        at = _difference(parts[0], parts[1])
        return None if at is None else Mismatch(pair.offset + at)


def _start(image: Image, offset: int, part: memoryview) -> Completion[int]:
    with image.reactor.lock:
        request = image.engine.read(offset, part)
        image.reactor.poll()
    return request


def _difference(one: memoryview | None, other: memoryview | None) -> int | None:
    """The first sector in which two pieces differ; None stands for zeros."""
    if one is None or other is None:
        there = other if one is None else one
        assert there is not None
        if is_zero(there):
            return None
        one, other = there, _ZEROS[: len(there)]
    # bytearray compares by memcmp, memoryviews byte by byte: 20 times slower.
    elif bytearray(one) == other:
        return None
    start, end = 0, len(one)
    while end - start > SECTOR:
        middle = start + max(align_down((end - start) // 2, SECTOR), SECTOR)
        if bytearray(one[start:middle]) == other[start:middle]:
            start = middle
        else:
            end = middle
    return start
