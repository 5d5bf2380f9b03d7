# SPDX-License-Identifier: MIT
"""A process that changes a disk and says so, until somebody kills it.

Owns: ``Writer`` (forked, logging to a pipe), the seeded workload.

Log lines are JSON: ``begin`` before an operation is issued, ``end`` after it returned.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import mmcow
from mmcow.storage.linux import LinuxHost
from tests.fault.model import SECTOR, content

Log = Callable[..., None]


class Disk(NamedTuple):
    """How the workload opens its image, and what it may do to it."""

    path: str
    format: str
    cache: str = "auto"
    backend: str = "auto"
    resizable: bool = True
    size_most: int = 4 << 20

    def open(self, *, write: bool) -> mmcow.Image:
        """Open it."""
        return mmcow.open(
            self.path,
            format=self.format,
            write=write,
            cache=self.cache,
            backing_format=None if self.format == "add-cow" else "raw",
            host=LinuxHost(self.backend),
        )


class Writer:
    """Runs ``work(log)`` in a forked child. Kill it with ``kill``, read on with ``drain``."""

    def __init__(self, work: Callable[[Log], None]) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            _child(work, writing)
        os.close(writing)
        self._pipe = reading
        self._rest = b""
        self.lines: list[str] = []

    def drain(self, seconds: float = 0.0) -> bool:
        """Read the log for a while; with 0 what is there now. False once the child has ended."""
        end = time.monotonic() + seconds
        while True:
            left = max(end - time.monotonic(), 0)
            if not select.select([self._pipe], [], [], left)[0]:
                return True
            part = os.read(self._pipe, 1 << 16)
            if not part:
                return False
            *whole, self._rest = (self._rest + part).split(b"\n")
            self.lines += [line.decode() for line in whole]

    def take(self) -> list[str]:
        """The log lines read since the last call."""
        lines, self.lines = self.lines, []
        return lines

    def kill(self) -> None:
        """SIGKILL, wait for the end, read the rest of the log."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """Wait for the end; returns the exit status. The log is then complete."""
        while self.drain(60.0):
            pass
        _, status = os.waitpid(self.pid, 0)
        os.close(self._pipe)
        assert not self._rest or os.WIFSIGNALED(status)
        return status


def _child(work: Callable[[Log], None], pipe: int) -> None:
    code = 1
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)  # the test's time limit is the parent's

        def log(**entry: Any) -> None:
            os.write(pipe, json.dumps(entry).encode() + b"\n")

        try:
            work(log)
            code = 0
        except BaseException:  # noqa: BLE001 - the parent shall see it
            log(at="error", text=traceback.format_exc())
    finally:
        os._exit(code)


def errors(lines: list[str]) -> list[str]:
    """Tracebacks of the child among its log lines."""
    entries = [json.loads(line) for line in lines]
    return [entry["text"] for entry in entries if entry["at"] == "error"]


def events(lines: list[str]) -> list[str]:
    """The log lines that a model takes."""
    return [line for line in lines if '"at": "begin"' in line or '"at": "end"' in line]


def churn(disk: Disk, seed: int, first: int, log: Log) -> None:
    """Change a disk for ever: batches of concurrent requests, flushes, resizes.

    Requests of one batch do not overlap. ``first``: number of the first operation.
    """
    rng = random.Random(seed)
    number = first
    with disk.open(write=True) as image:
        while True:
            roll = rng.random()
            if roll < 0.12 and disk.resizable:
                number = _resize(image, disk, rng, number, log)
            elif roll < 0.35:
                number = flush(image, number, log)
            else:
                number = write_batch(image, rng, number, log)


def flush(image: mmcow.Image, number: int, log: Log) -> int:
    """Flush; returns the next operation's number."""
    log(at="begin", op="flush", n=number)
    image.flush()
    log(at="end", op="flush", n=number)
    return number + 1


def _resize(image: mmcow.Image, disk: Disk, rng: random.Random, number: int, log: Log) -> int:
    size = rng.randrange(1, disk.size_most // SECTOR + 1) * SECTOR
    log(at="begin", op="resize", n=number, size=size)
    image.resize(size, shrink=True)
    log(at="end", op="resize", n=number, size=size)
    return number + 1


def write_batch(image: mmcow.Image, rng: random.Random, number: int, log: Log) -> int:
    """Up to eight requests at once, perhaps with a flush among them."""
    running = []
    for offset, length in _ranges(rng, image.size, rng.randrange(1, 9)):
        kind = rng.choices(("write", "zero", "discard"), (6, 2, 2))[0]
        log(at="begin", op=kind, n=number, offset=offset, length=length)
        running.append((kind, number, _start(image, kind, number, offset, length)))
        number += 1
        if rng.random() < 0.1:
            log(at="begin", op="flush", n=number)
            with image.reactor.lock:
                running.append(("flush", number, image.reactor.spawn(image.engine.flush())))
            number += 1
    rng.shuffle(running)
    for kind, n, request in running:
        image.reactor.wait(request)
        log(at="end", op=kind, n=n)
    return number


def _start(image: mmcow.Image, kind: str, number: int, offset: int, length: int) -> Any:
    with image.reactor.lock:
        if kind == "write":
            return image.engine.write(offset, memoryview(content(number, offset, length)))
        if kind == "zero":
            return image.engine.write_zeroes(offset, length, may_unmap=bool(number % 2))
        return image.engine.discard(offset, length)


def _ranges(rng: random.Random, size: int, count: int) -> list[tuple[int, int]]:
    """Ranges of whole sectors that do not overlap, small ones mostly."""
    sectors = size // SECTOR
    found: list[tuple[int, int]] = []
    for _ in range(count):
        first = rng.randrange(sectors)
        length = min(rng.choice((1, 1, 3, 8, 8, 16, 128, 300)), sectors - first)
        if all(first + length <= a or a + b <= first for a, b in found):
            found.append((first, length))
    return [(first * SECTOR, length * SECTOR) for first, length in found]
