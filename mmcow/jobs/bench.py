# SPDX-License-Identifier: MIT
"""Measure disks: run a load on one or on several in turn, and say what came out.

Owns: threads of a load, repeats, the order of sides that are compared, figures and their spread.
Never: prints, opens images; decides which requests are made (``jobs.load``).
"""

from __future__ import annotations

import errno
import os
import statistics
import threading
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import TYPE_CHECKING, NamedTuple, Protocol

import psutil

from mmcow.errors import ReadOnlyError, StorageError, UsageError
from mmcow.jobs.helper_load import HelperLoad
from mmcow.jobs.latency import Histogram
from mmcow.jobs.load import Load, PythonLoad, Times

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mmcow.image import Image
    from mmcow.jobs.progress import Progress

# How often a run with several threads reports its progress, in seconds.
_PULSE = 0.05
# psutil has the kernel's figures in whole steps of USER_HZ, 10 ms, cut off: two figures, each read
# twice, are wrong by up to two steps, which shall be a tenth at most. In seconds.
CPU_LEAST = 20 / os.sysconf("SC_CLK_TCK")


class Driver(Protocol):
    """One thread's part of a load: ``PythonLoad``, or the helper's."""

    times: Times
    done: int

    def run(self) -> bool:
        """Go on for a while; True when everything is done. Raises what a request failed with."""

    def stop(self) -> None:
        """Begin no more requests; ``run`` ends when those in flight have."""

    def close(self) -> None:
        """Free what it has. With nothing in flight."""


@dataclass
class Run:
    """One run's figures. ``user`` and ``system``: CPU seconds of the whole process."""

    block: int
    seconds: float
    reads: Histogram
    writes: Histogram
    flushes: Histogram
    by_python: int
    user: float
    system: float

    @property
    def count(self) -> int:
        """Requests done, flushes not counted."""
        return self.reads.count + self.writes.count

    @property
    def iops(self) -> float:
        """Requests a second."""
        return self.count / self.seconds

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.iops * self.block

    @property
    def cpu_us_per_io(self) -> float | None:
        """Microseconds of CPU for each request, the kernel's on our account included.

        None where the run used less than ``CPU_LEAST``.
        """
        # Seconds that came from steps: what is at the limit but for its last bit is not below it.
        if not self.count or round(self.user + self.system, 6) < CPU_LEAST:
            return None
        return 1e6 * (self.user + self.system) / self.count

    @property
    def latency(self) -> Histogram:
        """Of reads and writes together."""
        return Histogram.merged((self.reads, self.writes))


class Spread(NamedTuple):
    """Of repeated runs: quartiles and extremes."""

    low: float
    median: float
    high: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high, min(values), max(values))


@dataclass
class Side:
    """One disk that is measured. ``images``: one, or one for each thread."""

    name: str
    images: Sequence[Image]
    runs: list[Run] = field(default_factory=list)

    def spread(self, figure: Callable[[Run], float]) -> Spread:
        """Of one figure over the runs."""
        return Spread.of([figure(run) for run in self.runs])

    @property
    def cpu(self) -> Spread | None:
        """Of ``cpu_us_per_io``; None where a run has none: to leave just those out that used least
        would make the figure too high."""
        found = [run.cpu_us_per_io for run in self.runs]
        known = [value for value in found if value is not None]
        return Spread.of(known) if len(known) == len(found) else None

    def ratio(self, first: Side) -> Spread:
        """How many times this side's IOPS ``first`` has, by pairs of runs. Of a measurement that
        was stopped the last run may have no partner."""
        pairs = zip(first.runs, self.runs, strict=False)
        return Spread.of([a.iops / b.iops if b.iops else 0.0 for a, b in pairs])

    def merged(self, which: Callable[[Run], Histogram]) -> Histogram:
        """One histogram of all runs."""
        return Histogram.merged(map(which, self.runs))


def measure(
    sides: Sequence[Side], load: Load, *, repeat: int = 1, progress: Progress | None = None
) -> None:
    """Run the load ``repeat`` times on every side; the results are added to ``side.runs``.

    Sides are interleaved, A B B A: what drifts on the machine meets all of them alike.
    ``progress`` is called with bytes; whatever it raises ends the measurement, with no request
    left in flight. The runs that were over stay in ``side.runs``.
    """
    load.check()
    for side in sides:
        load.parts(side.images[0].size, side.name)
        if load.writes and not side.images[0].writable:
            raise ReadOnlyError(side.name, "writing")
    if repeat < 1:
        raise UsageError(f"repeat {repeat}: must be at least 1")
    tracker = _Tracker(progress, load, repeat * len(sides))
    for number in range(repeat):
        for side in sides if number % 2 == 0 else reversed(sides):
            side.runs.append(_run(side, load, number, tracker))
            tracker.next_run()
    tracker.finish()


class _Tracker:
    """Progress of several runs, in bytes; where the end is a time, in guessed bytes."""

    def __init__(self, progress: Progress | None, load: Load, runs: int) -> None:
        self._progress = progress
        self._load = load
        self._runs = runs
        self._runs_done = 0
        self._before = 0  # requests of finished runs
        self._now = 0
        self.reached(0, 0.0)

    def reached(self, count: int, seconds: float) -> None:
        """So many requests of this run are done, after so many seconds."""
        self._now = count
        if self._progress is None:
            return
        shares = [0.0]
        if self._load.count is not None:
            shares.append(count / self._load.count)
        if self._load.seconds is not None:
            shares.append(min(seconds / self._load.seconds, 1.0))
        share = (self._runs_done + max(shares)) / self._runs
        if not share and self._load.count is None:
            return  # nothing yet to guess the end from
        done = self._before + count
        total = max(int(done / share), done) if share else (self._load.count or 0) * self._runs
        self._progress(done * self._load.block, total * self._load.block)

    def next_run(self) -> None:
        """A run has ended."""
        self._runs_done += 1
        self._before += self._now
        self._now = 0

    def finish(self) -> None:
        """All have."""
        if self._progress is not None:
            self._progress(self._before * self._load.block, self._before * self._load.block)


def make_driver(image: Image, part: Load, *, shared: bool = False) -> Driver:
    """The fastest one for this disk. ``shared``: other threads have theirs on the same image."""
    if image.engine.hits.path is None:
        return PythonLoad(image, part)
    return HelperLoad(image, part, shared=shared)


def _run(side: Side, load: Load, number: int, tracker: _Tracker) -> Run:
    parts = load.parts(side.images[0].size, side.name, number)
    drivers: list[Driver] = []
    process = psutil.Process()
    try:
        for index, part in enumerate(parts):
            image = side.images[index % len(side.images)]
            drivers.append(make_driver(image, part, shared=len(side.images) < len(parts)))
        before = process.cpu_times()
        if len(drivers) == 1:
            _drive(drivers[0], tracker)
        else:
            _Threads(drivers).run(tracker)
        after = process.cpu_times()
    finally:
        for driver in drivers:
            driver.close()
    times = [driver.times for driver in drivers]
    seconds = max(t.ended for t in times) - min(t.began for t in times)
    return Run(
        block=load.block,
        seconds=max(seconds, 1) / 1e9,
        reads=Histogram.merged(t.reads for t in times),
        writes=Histogram.merged(t.writes for t in times),
        flushes=Histogram.merged(t.flushes for t in times),
        by_python=sum(t.by_python for t in times),
        user=after.user - before.user,
        system=after.system - before.system,
    )


def _drive(driver: Driver, tracker: _Tracker) -> None:
    """In this thread."""
    try:
        while not driver.run():
            seconds = (perf_counter_ns() - driver.times.began) / 1e9
            tracker.reached(driver.done, seconds)
        tracker.reached(driver.done, 0.0)
    except BaseException:
        _drain(driver)
        raise


def _drain(driver: Driver) -> None:
    """Leave nothing in flight."""
    driver.stop()
    try:
        while not driver.run():
            pass
    except Exception:  # noqa: BLE001 - the first error is the one to tell
        pass


class _Threads:
    """Several parts of a load, each in a thread of its own."""

    def __init__(self, drivers: Sequence[Driver]) -> None:
        self._drivers = drivers
        self._errors: list[BaseException] = []
        self._start = threading.Barrier(len(drivers))
        self._threads = [
            threading.Thread(target=self._main, args=(driver,), name=f"load-{index}")
            for index, driver in enumerate(drivers)
        ]

    def run(self, tracker: _Tracker) -> None:
        """All of them, to their end."""
        try:
            self._begin()
            began = perf_counter_ns()
            for thread in self._threads:
                while thread.is_alive():
                    thread.join(_PULSE)
                    self._pulse(tracker, began)
        except BaseException:
            self._start.abort()  # some may wait there for one that cannot be started
            self._stop()
            raise
        finally:
            for thread in self._threads:
                if thread.ident is not None:
                    thread.join()
        if self._errors:
            raise self._errors[0]

    def _begin(self) -> None:
        for number, thread in enumerate(self._threads, 1):
            try:
                thread.start()
            except RuntimeError as error:  # so Python says that the system has none left
                what = f"start of thread {number} of {len(self._threads)}"
                raise StorageError(errno.EAGAIN, what, "bench") from error

    def _pulse(self, tracker: _Tracker, began: int) -> None:
        done = sum(driver.done for driver in self._drivers)
        tracker.reached(done, (perf_counter_ns() - began) / 1e9)

    def _stop(self) -> None:
        for driver in self._drivers:
            driver.stop()

    def _main(self, driver: Driver) -> None:
        try:
            self._start.wait()
        except threading.BrokenBarrierError:  # not all could be started
            return
        try:
            while not driver.run():
                pass
        except BaseException as error:  # noqa: BLE001 - raised in the thread that started all
            self._errors.append(error)
            self._stop()
            _drain(driver)
