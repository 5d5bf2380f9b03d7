# SPDX-License-Identifier: MIT
"""Measuring: threads, repeats, sides in turn, figures, and stopping half-way."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import pytest

import mmcow
from mmcow import native
from mmcow.errors import Cancelled, Interrupted, ReadOnlyError, StorageError, UsageError
from mmcow.jobs import bench, helper_load
from mmcow.jobs.bench import Run, Side, Spread, measure
from mmcow.jobs.helper_load import HelperLoad
from mmcow.jobs.latency import Histogram
from mmcow.jobs.load import Load
from mmcow.storage.linux import LinuxHost

KIB, MIB = 1 << 10, 1 << 20
SIZE = MIB


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(b"\1" * SIZE)
    return path


@pytest.fixture(params=[True, False], ids=["hits", "no hits"])
def host(request):
    return LinuxHost(hits=request.param)


def made_up_run(iops, count=1000, cpu=(0.1, 0.2)):
    histogram = Histogram()
    for _ in range(count):
        histogram.add(50_000)
    return Run(4096, count / iops, histogram, Histogram(), Histogram(), 0, *cpu)


def test_figures_of_a_run():
    run = made_up_run(2000.0)
    assert run.count == 1000
    assert run.iops == pytest.approx(2000)
    assert run.bandwidth == pytest.approx(2000 * 4096)
    assert run.cpu_us_per_io == pytest.approx(300)


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [((0.1, 0.09), None), ((0.0, 0.0), None), ((0.1, 0.1), 200), ((0.07, 0.13), 200)],
)
def test_cpu_of_few_steps_of_the_clock_is_no_figure(cpu, expected):
    run = made_up_run(2000.0, cpu=cpu)
    assert run.cpu_us_per_io == (expected and pytest.approx(expected))


def test_cpu_of_a_side_needs_every_run():
    runs = [made_up_run(100, cpu=(0.1, seconds)) for seconds in (0.2, 0.4, 0.9)]
    cpu = Side("a", [], runs).cpu
    assert cpu is not None
    assert (cpu.min, cpu.median, cpu.max) == pytest.approx((300, 500, 1000))
    assert Side("a", [], [*runs, made_up_run(100, cpu=(0.1, 0.05))]).cpu is None


def test_spread_and_ratio():
    assert Spread.of([3.0]) == (3, 3, 3, 3, 3)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 10.0]) == (2, 3, 4, 1, 10)
    first = Side("a", [], [made_up_run(iops) for iops in (100, 200, 400)])
    second = Side("b", [], [made_up_run(iops) for iops in (100, 100, 100)])
    assert second.ratio(first).median == pytest.approx(2)
    assert first.ratio(first) == pytest.approx((1, 1, 1, 1, 1))


def test_sides_are_interleaved(monkeypatch, raw):
    order = []

    def run(side, load, number, tracker):
        order.append((side.name, number))
        return made_up_run(100.0)

    monkeypatch.setattr(bench, "_run", run)
    with mmcow.open(raw, format="raw") as image:
        sides = [Side("a", [image]), Side("b", [image])]
        measure(sides, Load(count=1), repeat=3)
    assert order == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert [len(side.runs) for side in sides] == [3, 3]


def test_measured_run_adds_up(raw, host):
    with mmcow.open(raw, format="raw", host=host) as image:
        side = Side("a", [image])
        measure([side], Load(count=2000, random=True, depth=16), repeat=2)
    for run in side.runs:
        assert run.count == 2000
        assert run.writes.count == run.flushes.count == 0
        # Sixteen at a time: what all requests took together fits sixteen times into the run.
        assert run.reads.total <= 16 * run.seconds * 1e9 * 1.01
        assert run.reads.most <= run.seconds * 1e9
        assert run.user >= 0
        assert run.system >= 0


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_with_images_of_their_own(raw, host, threads):
    load = Load(count=1003, random=True, depth=3, threads=threads)
    with ExitStack() as stack:
        images = [
            stack.enter_context(mmcow.open(raw, format="raw", host=host)) for _ in range(threads)
        ]
        side = Side("a", images)
        measure([side], load)
    assert side.runs[0].count == 1003


@pytest.mark.parametrize("flush_every", [0, 4])
def test_threads_that_write_share_an_image(tmp_path, raw, host, flush_every):
    mmcow.create(
        tmp_path / "top.acow", backing="disk.raw", backing_format="raw",
        options={"cluster_size": "16k"},
    )  # fmt: skip
    load = Load(
        count=600, depth=4, threads=3, read_percent=0, pattern=7, block=4 * KIB,
        length=192 * KIB, flush_every=flush_every,
    )  # fmt: skip
    with mmcow.open(tmp_path / "top.acow", write=True, host=host) as image:
        side = Side("a", [image])
        measure([side], load)
    assert side.runs[0].count == 600
    assert side.runs[0].flushes.count == (150 if flush_every else 0)
    with mmcow.open(tmp_path / "top.acow") as image:
        assert image.read(0, SIZE) == b"\7" * (192 * KIB) + b"\1" * (SIZE - 192 * KIB)


class _Late:
    """The helper, which takes its time to say that something is over."""

    def __getattr__(self, name):
        return getattr(native.lib, name)

    def mmc_load_busy(self, load, change):
        native.lib.mmc_load_busy(load, change)
        if change < 0:
            time.sleep(0.002)


def test_flush_that_another_thread_ends_is_asked_for_once(tmp_path, raw, host, monkeypatch):
    monkeypatch.setattr(helper_load, "lib", _Late())
    mmcow.create(tmp_path / "top.acow", backing="disk.raw", backing_format="raw")
    load = Load(count=120, depth=4, threads=3, read_percent=0, length=192 * KIB, flush_every=4)
    with mmcow.open(tmp_path / "top.acow", write=True, host=host) as image:
        side = Side("a", [image])
        measure([side], load)
    assert side.runs[0].flushes.count == 30


@pytest.mark.timeout(60, method="thread")
def test_what_a_thread_that_ends_has_collected_is_not_lost(tmp_path, raw, host):
    """Misses of four threads: whoever collects last may be another than who waits."""
    load = Load(
        count=200, random=True, depth=16, threads=4, read_percent=0, block=7 * KIB, seed=1
    )  # fmt: skip
    for number in range(20):
        top = tmp_path / f"top{number}.acow"
        mmcow.create(top, backing="disk.raw", backing_format="raw")
        with mmcow.open(top, write=True, host=host) as image:
            side = Side("a", [image])
            measure([side], load)
        assert side.runs[0].count == 200


def test_progress_rises_to_its_end(raw):
    seen = []
    with mmcow.open(raw, format="raw") as image:
        measure(
            [Side("a", [image]), Side("b", [image])],
            Load(count=500), repeat=2, progress=lambda *state: seen.append(state),
        )  # fmt: skip
    assert seen[0] == (0, 4 * 500 * 4096)
    assert seen[-1] == (4 * 500 * 4096,) * 2
    assert sorted(seen) == seen
    assert all(done <= total for done, total in seen)


def test_progress_towards_a_time_begins_below_its_end(raw):
    seen = []
    with mmcow.open(raw, format="raw") as image:
        measure([Side("a", [image])], Load(seconds=0.3), progress=lambda *state: seen.append(state))
    assert seen[0][0] < seen[0][1]
    assert seen[-1][0] == seen[-1][1] > 0


@pytest.mark.parametrize("threads", [1, 3])
def test_progress_may_stop_it_and_nothing_stays_in_flight(raw, host, threads):
    calls = 0

    def progress(done, total):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Cancelled("bench")

    load = Load(seconds=60, random=True, threads=threads, read_percent=0, pattern=3)
    with mmcow.open(raw, format="raw", write=True, host=host) as image:
        with pytest.raises(Cancelled):
            measure([Side("a", [image])], load, progress=progress)
        assert image.read(0, 512)
    assert set(raw.read_bytes()) <= {1, 3}


def test_error_in_one_thread_stops_all(raw, monkeypatch):
    load = Load(seconds=60, random=True, threads=3, depth=2)
    host = LinuxHost(hits=False)
    with ExitStack() as stack:
        images = [stack.enter_context(mmcow.open(raw, format="raw", host=host)) for _ in range(3)]

        def read(offset, into):
            raise StorageError(5, "read", "the-file")

        monkeypatch.setattr(images[1].engine, "read", read)
        with pytest.raises(StorageError, match="the-file"):
            measure([Side("a", images)], load)


@pytest.mark.parametrize("last", [0, 2])
def test_thread_that_cannot_be_started_is_an_error_and_ends_the_others(raw, monkeypatch, last):
    start = threading.Thread.start

    def refuse(thread):
        if thread.name == f"load-{last}":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    load = Load(count=300, threads=3)
    with mmcow.open(raw, format="raw") as image:
        with pytest.raises(StorageError, match=f"thread {last + 1} of 3: Resource temporarily"):
            measure([Side("a", [image] * 3)], load)
        assert image.read(0, 512)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load-")]


def test_interrupt_on_the_way_of_a_completion_hangs_nobody(raw, monkeypatch):
    def attend(self, why):
        raise KeyboardInterrupt

    monkeypatch.setattr(HelperLoad, "_attend", attend)
    load = Load(seconds=60, depth=4, block=1000)  # not aligned: the helper misses
    with mmcow.open(raw, format="raw", host=LinuxHost(hits=True)) as image:
        with pytest.raises(KeyboardInterrupt):
            measure([Side("a", [image])], load)
        with pytest.raises(Interrupted):
            image.read(0, 512)


def test_what_cannot_be_measured_is_refused_before_anything_runs(raw):
    with mmcow.open(raw, format="raw") as image:
        side = Side("the-disk", [image])
        with pytest.raises(ReadOnlyError, match="the-disk"):
            measure([side], Load(count=1, read_percent=0))
        with pytest.raises(UsageError, match="the-disk"):
            measure([side], Load(count=1, start=2 * SIZE))
        with pytest.raises(UsageError, match="repeat 0"):
            measure([side], Load(count=1), repeat=0)
        assert side.runs == []
