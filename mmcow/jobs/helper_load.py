# SPDX-License-Identifier: MIT
"""A load that the C helper drives: Python is asked only for what the helper cannot decide.

Owns: the slices in which the helper runs, misses, flushes, completions that came out by the way.
Never: picks requests (csrc/load.c does, the same as ``jobs.load.Requests``).

The reactor's lock is not held, and the interpreter is free, while the helper runs.
"""

from __future__ import annotations

from array import array
from functools import partial
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from mmcow import native
from mmcow.errors import StorageError
from mmcow.jobs.latency import Histogram
from mmcow.jobs.load import Requests, Times
from mmcow.native import ffi, lib

if TYPE_CHECKING:
    from mmcow.image import Image
    from mmcow.jobs.load import Load
    from mmcow.storage.linux import NativeQueue
    from mmcow.tasks import Completion, Task

_MOST = 64  # misses and completions that are taken at once
_ENDLESS = (1 << 64) - 1
_WHAT = {lib.MMC_READ: "read", lib.MMC_WRITE: "write"}


class HelperLoad:
    """One part of a load on an image that has a path, for one thread.

    ``shared``: other threads run loads on the same image. Who collects another's request does not
    wake it, so its waits are short.
    """

    SLICE_MS = 50
    SLICE_SHARED_MS = 2

    def __init__(self, image: Image, part: Load, *, shared: bool = False) -> None:
        path = image.engine.hits.path
        assert path is not None
        self.times = Times()
        self.done = 0
        self.error: Exception | None = None
        self._image = image
        self._engine = image.engine
        self._reactor = image.reactor
        # Where there is a path, the queue is the helper's.
        self._queue: NativeQueue = image.reactor.queue  # type: ignore[assignment]
        self._path = path  # it must outlive the load
        self._part = part
        self._slice_ms = self.SLICE_SHARED_MS if shared else self.SLICE_MS
        self._shared = shared
        self._pending = 0  # what the engine does for this load
        self._relieving = False
        self._misses = ffi.new("struct mmc_miss[]", _MOST)
        self._completions = ffi.new("struct mmc_done[]", _MOST)
        self._collected = ffi.new("uint32_t *")
        self._failure: Any = ffi.new("struct mmc_load_error *")
        error = ffi.new("int *")
        pointer = lib.mmc_load_open(path.pointer, _plan(part, shared), error)
        native.check(error[0], f"{part.depth} buffers of {part.block} bytes", "memory")
        self._load: Any = pointer

    def stop(self) -> None:
        """Begin no more requests; ``run`` ends when those in flight have."""
        lib.mmc_load_stop(self._load)

    def close(self) -> None:
        """Free what it has. With nothing in flight."""
        load, self._load = self._load, ffi.NULL
        lib.mmc_load_close(load)

    def run(self) -> bool:
        """Go on for a while; True when everything is done. Raises what a request failed with."""
        try:
            return self._go_on()
        except Exception:
            raise
        except BaseException as error:
            # Between the helper and the reactor a completion may have been lost.
            self._reactor.interrupted = error
            raise

    def _go_on(self) -> bool:
        now = self.times.go_on(self._part)
        until = now + self.SLICE_MS * 1_000_000
        self._reactor.check()
        while now < until:
            why = self._run_helper(now)
            # Also at the end: what was collected may be another thread's, who waits for it.
            if why or self._collected[0] or self._pending:
                self._attend(why)
            if why & lib.MMC_LOAD_OVER:
                self._finish()
                return True
            now = perf_counter_ns()
        self._relieve()
        self._note_progress()
        return False

    def _run_helper(self, now: int) -> int:
        slice_ms = self._slice_ms
        if self.times.deadline:
            left_ms = (self.times.deadline - now) // 1_000_000
            if self.times.deadline <= now:
                self.stop()
            slice_ms = min(slice_ms, max(left_ms, 1))
        why = int(lib.mmc_load_run(self._load, slice_ms, self._completions, _MOST, self._collected))
        return native.check(why, "measuring", self._image.path)

    def _attend(self, why: int) -> None:
        """Do what the helper does not, as far as that goes without waiting."""
        with self._reactor.lock:
            if self._collected[0]:
                done = ffi.buffer(self._completions)
                self._queue.deliver(self._queue.taken(memoryview(done), self._collected[0]))
            if why & lib.MMC_LOAD_MISSED:
                self._begin_misses()
            flush = self._begin_flush() if why & lib.MMC_LOAD_FLUSH else None
            if flush is not None and self._part.drain and self._pending == 1 and not self._shared:
                self._reactor.drive(flush)  # as Image.flush: there is nothing else to attend to
            else:
                self._reactor.poll()

    # ---- misses ----

    def _begin_misses(self) -> None:
        while count := lib.mmc_load_misses(self._load, self._misses, _MOST):
            for miss in self._misses[0:count]:
                self._begin_miss(miss.slot, miss.code, miss.offset, miss.address)

    def _begin_miss(self, slot: int, code: int, offset: int, address: int) -> None:
        memory = ffi.cast("char *", address)
        buffer = memoryview(ffi.buffer(memory, self._part.block))
        self.times.by_python += 1
        self._pending += 1
        begin = self._engine.read if code == lib.MMC_READ else self._engine.write
        try:
            completion = begin(offset, buffer)
        except Exception as error:  # noqa: BLE001 - raised by ``run`` when the others are over
            self._miss_ended(slot, error)
            return
        completion.on_done(lambda completion: self._miss_ended(slot, completion.error))

    def _miss_ended(self, slot: int, error: BaseException | None) -> None:
        self._pending -= 1
        self._keep(error)
        lib.mmc_load_done(self._load, slot, 0 if error is None else -1)

    def _keep(self, error: BaseException | None) -> None:
        if error is not None and self.error is None:
            if not isinstance(error, Exception):
                raise error
            self.error = error

    # ---- flushes ----

    def _begin_flush(self) -> Task[None]:
        self._pending += 1
        lib.mmc_load_busy(self._load, 1)
        if not self._part.drain:
            lib.mmc_load_resume(self._load)
        task = self._reactor.spawn(self._engine.flush())
        task.on_done(partial(self._flush_ended, perf_counter_ns()))
        return task

    def _flush_ended(self, begin: int, completion: Completion[Any]) -> None:
        if completion.error is None:
            self.times.flushes.add(perf_counter_ns() - begin)
        else:
            self._keep(completion.error)
            self.stop()
        self._pending -= 1
        # First, for another thread may run this: with nothing in flight and the flush still due the
        # helper would ask for one more.
        if self._part.drain:
            lib.mmc_load_resume(self._load)
        lib.mmc_load_busy(self._load, -1)

    def _relieve(self) -> None:
        """Hits leave it to others to write metadata out where much of it has come together."""
        if not self._part.writes or self._relieving:
            return
        with self._reactor.lock:
            self._relieving = True
            self._pending += 1
            lib.mmc_load_busy(self._load, 1)
            self._reactor.spawn(self._engine.relieve()).on_done(self._relieved)
            self._reactor.poll()

    def _relieved(self, completion: Completion[Any]) -> None:
        self._relieving = False
        self._pending -= 1
        self._keep(completion.error)
        lib.mmc_load_busy(self._load, -1)

    # ---- results ----

    def _note_progress(self) -> None:
        self.done = int(lib.mmc_load_finished(self._load, self._failure))

    def _finish(self) -> None:
        self.times.end()
        self._note_progress()
        self.times.reads = _histogram(lib.mmc_load_times(self._load, lib.MMC_READ))
        self.times.writes = _histogram(lib.mmc_load_times(self._load, lib.MMC_WRITE))
        if self.error is not None:
            raise self.error
        failed = self._failure
        # A miss that failed has its own error.
        if failed.number:
            where = (int(failed.offset), self._part.block)
            raise StorageError(-failed.number, _WHAT[failed.code], self._image.path, *where)


def _plan(part: Load, shared: bool) -> Any:
    requests = Requests(part)
    plan = {
        "start": requests.start,
        "length": requests.length,
        "first": requests.first,
        "step": requests.step,
        "block": requests.block,
        "count": _ENDLESS if part.count is None else part.count,
        "seed": part.seed,
        "flush_every": part.flush_every,
        "depth": part.depth,
        "read_percent": part.read_percent,
        "is_random": part.random,
        "pattern": part.pattern,
        "drains": part.drain,
        "is_shared": shared,
    }
    return ffi.new("struct mmc_load_plan *", plan)


def _histogram(times: Any) -> Histogram:
    histogram = Histogram()
    histogram.counts = array("Q")
    histogram.counts.frombytes(ffi.buffer(times.buckets))
    histogram.count = int(times.count)
    histogram.total = int(times.total)
    histogram.least = int(times.least)
    histogram.most = int(times.most)
    return histogram
