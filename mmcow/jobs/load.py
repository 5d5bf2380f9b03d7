# SPDX-License-Identifier: MIT
"""Requests for measuring: which ones, and keeping a number of them in flight.

Owns: ``Load`` (what is asked for), ``Requests`` (which ones that are, in their order),
``PythonLoad`` (the loop over the engine).
Never: opens images, reports, draws conclusions (``jobs.bench``).

``PythonLoad`` is what runs where the engine has no path, and what the helper's load (csrc/load.c,
``jobs.helper_load``) is compared with in tests: both do the same requests in the same order.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NamedTuple

from mmcow.errors import UsageError
from mmcow.jobs.latency import Histogram
from mmcow.native import aligned
from mmcow.tasks import Completion

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mmcow.image import Image

DEPTH_MOST = 4096
BLOCK_MOST = 1 << 30
SECONDS_MOST = 1e7
# Of all buffers together.
MEMORY_MOST = 1 << 30

_64_BITS = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def draw(seed: int, number: int) -> int:
    """The ``number``-th value of a seed's sequence, 64 bits (splitmix64: any may be asked for)."""
    value = (seed + (number + 1) * _GOLDEN) & _64_BITS
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _64_BITS
    return value ^ (value >> 31)


@dataclass(frozen=True)
class Load:
    """What to do to a disk. Sizes are bytes.

    Ends after ``count`` requests, or ``seconds``, whichever comes first; one must be given.
    ``read_percent`` of the requests are reads, the others write ``pattern``. After every
    ``flush_every`` writes comes a flush (0: none), for which ``drain`` lets the requests in flight
    end first.

    In order: the first at ``start``, ``step`` from each to the next (None: ``block``, one after
    the other), modulo the disk's size, as qemu-img bench has it. With a ``length`` they keep to so
    many bytes from ``start`` on, and it is modulo those. Where one would pass the end, which
    qemu-img makes an error of, they begin again at ``start``. ``random``: any multiple of
    ``block`` from ``start`` on, up to the end of the disk or of ``length``.

    ``threads``: what is from ``start`` on is cut into as many parts, each with ``depth`` requests
    in flight that keep to it.

    ``first``: of a part, how far from ``start`` its first request in order is (``parts`` sets it).
    """

    block: int = 4096
    depth: int = 64
    count: int | None = None
    seconds: float | None = None
    read_percent: int = 100
    random: bool = False
    step: int | None = None
    start: int = 0
    length: int | None = None
    seed: int = 0
    pattern: int = 0
    flush_every: int = 0
    drain: bool = True
    threads: int = 1
    first: int = 0

    @property
    def writes(self) -> bool:
        """Whether anything is written."""
        return self.read_percent < 100

    @property
    def order(self) -> str:
        """In a word."""
        if self.random:
            return "random"
        return "strided" if self.step not in (None, 0, self.block) else "sequential"

    def check(self) -> None:
        """Raise UsageError for what makes no sense, whatever the disk."""
        _check_number("buffer size", self.block, 1, BLOCK_MOST)
        _check_number("depth", self.depth, 1, DEPTH_MOST)
        _check_number("threads", self.threads, 1, 256)
        _check_number("percentage of reads", self.read_percent, 0, 100)
        _check_number("pattern", self.pattern, 0, 255)
        _check_number("offset", self.start, 0)
        _check_number("step size", self.step or 0, 0)
        _check_number("flush interval", self.flush_every, 0)
        if self.count is None and self.seconds is None:
            raise UsageError("neither a count nor a time is given")
        if self.count is not None:
            _check_number("count", self.count, 1, 1 << 53)
        if self.seconds is not None and not 0 < self.seconds <= SECONDS_MOST:
            raise UsageError(
                f"time {self.seconds}: must be more than 0 and at most {SECONDS_MOST:.0f} seconds"
            )
        if self.random and self.step:
            raise UsageError("random requests have no step size")
        if self.flush_every and not self.writes:
            raise UsageError("a flush interval needs writes")
        if 0 < self.flush_every < self.depth:
            raise UsageError(
                f"flush interval {self.flush_every}: must not be smaller than the depth, "
                f"{self.depth}"
            )
        if self.block * self.depth * self.threads > MEMORY_MOST:
            raise UsageError(
                f"{self.depth * self.threads} buffers of {self.block} bytes are more memory than "
                f"{MEMORY_MOST} bytes"
            )

    def reach(self, size: int) -> tuple[int, int]:
        """Start and end of what may be met on a disk of ``size`` bytes."""
        if self.length is not None:
            return self.start, self.start + self.length
        last = self.start + ((self.count or 0) - 1) * (self.step or self.block)
        ends_before = self.count is not None and last + self.block <= size
        stays_behind = self.random or self.threads > 1 or ends_before
        return self.start if stays_behind else 0, size

    def parts(self, size: int, name: str, run: int = 0) -> list[Load]:
        """What each thread does in run number ``run`` on a disk of ``size`` bytes."""
        if self.start > size:
            raise UsageError(f"{name}: offset {self.start}: is behind the disk of {size} bytes")
        length = size - self.start if self.length is None else self.length
        if length > size - self.start:
            raise UsageError(
                f"{name}: range {self.start}+{length} is not inside the disk of {size} bytes"
            )
        share = length // self.threads // self.block * self.block if self.threads > 1 else length
        if share < self.block:
            raise UsageError(
                f"{name}: {length} bytes from {self.start} have no room for {self.threads} x "
                f"{self.block} bytes"
            )
        if self.threads > 1:
            return [self._part(number, share, run) for number in range(self.threads)]
        low, end = self.reach(size)
        part = self._part(0, share, run)
        return [replace(part, start=low, length=end - low, first=self.start - low)]

    def _part(self, number: int, share: int, run: int) -> Load:
        count = self.count
        if count is not None:
            count = count * (number + 1) // self.threads - count * number // self.threads
        return replace(
            self,
            start=self.start + number * share,
            length=share,
            count=count,
            # Every run draws anew: one that repeats the last meets what that left in caches.
            seed=draw(draw(self.seed & _64_BITS, run), number),
            threads=1,
        )


def _check_number(what: str, value: int, least: int, most: int | None = None) -> None:
    if value < least or (most is not None and value > most):
        upto = f"and at most {most}" if most is not None else ""
        raise UsageError(f"{what} {value}: must be at least {least} {upto}".rstrip())


class Request(NamedTuple):
    """One of a load: where it begins on the disk, and whether it reads."""

    offset: int
    is_read: bool


class Requests:
    """The requests of one part of a load, in their order and without an end."""

    def __init__(self, part: Load) -> None:
        assert part.length is not None
        self.start = part.start
        self.length = part.length
        self.first = part.first
        self.block = part.block
        self.step = part.step or part.block
        self.read_percent = part.read_percent
        self._random = part.random
        self._seed = part.seed

    def __iter__(self) -> Iterator[Request]:
        """From the first one on."""
        places = self._random_places() if self._random else self._places()
        for number, place in enumerate(places):
            yield Request(self.start + place, self._is_read(number))

    def _places(self) -> Iterator[int]:
        place = self.first
        while True:
            yield place
            place = (place + self.step) % self.length
            if place > self.length - self.block:
                place = self.first

    def _random_places(self) -> Iterator[int]:
        places = self.length // self.block
        for number in itertools.count():
            yield (draw(self._seed, 2 * number) * places >> 64) * self.block

    def _is_read(self, number: int) -> bool:
        if self.read_percent in (0, 100):
            return self.read_percent == 100
        return draw(self._seed, 2 * number + 1) * 100 >> 64 < self.read_percent


class Times:
    """What a load has measured so far. ``by_python``: requests that took the long way, through
    the engine; times from ``perf_counter_ns``. ``deadline``: when a load of so many seconds is to
    end; 0: there is none."""

    def __init__(self) -> None:
        self.reads = Histogram()
        self.writes = Histogram()
        self.flushes = Histogram()
        self.by_python = 0
        self.began = 0
        self.deadline = 0
        self.ended = 0

    def go_on(self, part: Load) -> int:
        """The time, which is when the load began where this is the first call."""
        now = perf_counter_ns()
        if not self.began:
            self.began = now
            if part.seconds is not None:
                self.deadline = now + int(part.seconds * 1e9)
        return now

    def end(self) -> None:
        """The load is over; later calls do nothing."""
        if not self.ended:
            self.ended = perf_counter_ns()


class _Slot(NamedTuple):
    """Memory of one request in flight: what a read fills, what a write takes."""

    buffer: memoryview
    source: memoryview


class PythonLoad:
    """One part of a load, driven over the engine from one thread."""

    # How long ``run`` goes on before it returns, in seconds.
    SLICE = 0.05

    def __init__(self, image: Image, part: Load) -> None:
        assert part.length is not None
        self.times = Times()
        self.done = 0
        self.error: Exception | None = None
        self._engine = image.engine
        self._reactor = image.reactor
        self._part = part
        self._requests = iter(Requests(part))
        self._issued = 0
        self._writes_to_flush = part.flush_every
        self._flush_due = False
        self._in_flight = 0  # flushes included
        self._stopping = False
        self._wake: Completion[Any] = Completion()
        self._free = [self._make_slot() for _ in range(part.depth)]

    def _make_slot(self) -> _Slot:
        part = self._part
        slot = _Slot(
            aligned(part.block if part.read_percent else 0),
            aligned(part.block if part.writes else 0),
        )
        if part.pattern:
            slot.source[:] = bytes([part.pattern]) * len(slot.source)
        return slot

    def stop(self) -> None:
        """Begin no more requests; ``run`` ends when those in flight have."""
        self._stopping = True

    def close(self) -> None:
        """Nothing to free."""

    def run(self) -> bool:
        """Go on for a while; True when everything is done. Raises what a request failed with."""
        until = self.times.go_on(self._part) + int(self.SLICE * 1e9)
        with self._reactor.lock:
            self._reactor.check()
            while True:
                self._begin_some(until)
                if not self._in_flight and self._is_over():
                    break
                if perf_counter_ns() >= until:
                    return False
                if self._in_flight:
                    self._wake = Completion()
                    self._reactor.wait(self._wake)
        self.times.end()
        if self.error is not None:
            raise self.error
        return True

    def _is_over(self) -> bool:
        deadline = self.times.deadline
        if not self._stopping and deadline and perf_counter_ns() >= deadline:
            self._stopping = True
        if self._stopping:
            return True
        return self._issued == self._part.count and not self._flush_due

    def _begin_some(self, until: int) -> None:
        """Fill the depth, up to the next flush or the end of the slice."""
        while not self._is_over() and self.error is None:
            if self._flush_due:
                if self._part.drain and self._in_flight:
                    return
                self._begin_flush()
                if self._part.drain:
                    return
            elif self._issued == self._part.count or not self._free:
                return
            else:
                self._begin_one(self._free.pop())
            if perf_counter_ns() >= until:
                return

    def _begin_one(self, slot: _Slot) -> None:
        offset, is_read = next(self._requests)
        self._issued += 1
        times = self.times.reads if is_read else self.times.writes
        begin = perf_counter_ns()
        self._in_flight += 1
        self.times.by_python += 1
        try:
            if is_read:
                completion = self._engine.read(offset, slot.buffer)
            else:
                completion = self._engine.write(offset, slot.source)
        except Exception as error:  # noqa: BLE001 - raised by ``run`` when the others are over
            self._ended(slot, error)
            return
        completion.on_done(partial(self._request_ended, slot, times, begin))
        if not is_read and self._part.flush_every:
            self._writes_to_flush -= 1
            if self._writes_to_flush == 0:
                self._writes_to_flush = self._part.flush_every
                self._flush_due = True

    def _request_ended(
        self, slot: _Slot, times: Histogram, begin: int, completion: Completion[int]
    ) -> None:
        if completion.error is None:
            times.add(perf_counter_ns() - begin)
            self.done += 1
        self._ended(slot, completion.error)

    def _begin_flush(self) -> None:
        self._flush_due = False
        self._in_flight += 1
        begin = perf_counter_ns()
        task = self._reactor.spawn(self._engine.flush())
        task.on_done(partial(self._flush_ended, begin))

    def _flush_ended(self, begin: int, completion: Completion[Any]) -> None:
        if completion.error is None:
            self.times.flushes.add(perf_counter_ns() - begin)
        self._ended(None, completion.error)

    def _ended(self, slot: _Slot | None, error: BaseException | None) -> None:
        self._in_flight -= 1
        if slot is not None:
            self._free.append(slot)
        if error is not None:
            self._stopping = True
            if self.error is None:
                if not isinstance(error, Exception):
                    raise error
                self.error = error
        if not self._wake.done:
            self._wake.set(None)
