# SPDX-License-Identifier: MIT
"""Loads: which requests are made, by the engine's loop and by the helper's; latencies."""

from __future__ import annotations

import errno
import itertools
import os
import random
from collections import Counter
from contextlib import suppress

import pytest

import mmcow
from mmcow.errors import LayerFailed, StorageError, UsageError
from mmcow.jobs.helper_load import HelperLoad
from mmcow.jobs.latency import BUCKETS, Histogram, bucket_of, lower_bound
from mmcow.jobs.load import Load, PythonLoad, Requests, draw
from mmcow.storage.linux import LinuxHost

KIB, MIB = 1 << 10, 1 << 20
SIZE = 2 * MIB
PATTERN = 0xA5


@pytest.fixture(params=["engine", "helper"])
def driver(request):
    """How to make a driver: ``driver(image, part)``."""
    return PythonLoad if request.param == "engine" else HelperLoad


@pytest.fixture(params=["raw", "add-cow", "cow"])
def path(request, tmp_path):
    """A disk whose every block of 4 KiB begins with its number; the layered ones over a base."""
    base = tmp_path / "base.raw"
    with base.open("wb") as file:
        file.writelines(number.to_bytes(4, "big") * KIB for number in range(SIZE // (4 * KIB)))
    if request.param == "raw":
        return base
    top = tmp_path / "top"
    options = {"cluster_size": "16k"} if request.param == "add-cow" else {}
    mmcow.create(
        top, format=request.param, backing="base.raw", backing_format="raw", options=options
    )
    return top


def opened(path, **options):
    """With hits, whatever the environment says: there is no helper's load without."""
    options.setdefault("host", LinuxHost(hits=True))
    options.setdefault("format", "raw" if path.suffix == ".raw" else None)
    return mmcow.open(path, **options)


def finish(driver):
    """Run to the end; what it measured."""
    try:
        while not driver.run():
            pass
    finally:
        driver.close()
    return driver.times


def only_part(load, size=SIZE):
    """The load as its only thread has it."""
    load.check()
    (part,) = load.parts(size, "test")
    return part


# ---- which requests ----


def test_draw_is_splitmix64():
    """The values that the generator's authors' program prints for this seed."""
    assert [draw(1234567, number) for number in range(5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def first_requests(part, count):
    return list(itertools.islice(Requests(part), count))


def first_offsets(part, count):
    return [request.offset for request in first_requests(part, count)]


def test_random_requests_reach_every_block_of_the_range_and_no_other():
    part = only_part(Load(random=True, count=1, start=8 * KIB, length=64 * KIB, seed=3))
    found = Counter(first_offsets(part, 1600))
    assert set(found) == set(range(8 * KIB, 72 * KIB, 4 * KIB))
    assert all(50 < count < 150 for count in found.values())


# What strace shows of qemu-img 7.2: bench -d 1 -f raw -c 40 -s 4k, on a file of 64 KiB.
SEEN_OF_QEMU_IMG = [
    (12, 8, [8, 20, 32, 44, 56, 4, 16, 28, 40, 52, 0, 12, 24, 36, 48, 60, 8, 20]),
    (4, 8, [*range(8, 64, 4), 0, 4, 8, 12]),
    (80, 0, [0, 16, 32, 48, 0, 16]),
    (64, 4, [4, 4, 4]),
]


@pytest.mark.parametrize(("step", "start", "seen"), SEEN_OF_QEMU_IMG)
def test_requests_in_order_go_round_the_disk_as_qemu_imgs_do(step, start, seen):
    part = only_part(Load(count=40, step=step * KIB, start=start * KIB), size=64 * KIB)
    assert first_offsets(part, len(seen)) == [offset * KIB for offset in seen]


def test_requests_of_a_range_go_round_in_it():
    part = only_part(Load(count=9, step=12 * KIB, start=KIB, length=32 * KIB))
    assert first_offsets(part, 6) == [n * KIB for n in (1, 13, 25, 5, 17, 29)]


def test_requests_begin_again_where_the_next_one_would_pass_the_end():
    part = only_part(Load(count=9, start=KIB, step=10 * KIB), size=24 * KIB)
    assert first_offsets(part, 5) == [n * KIB for n in (1, 11, 1, 11, 1)]
    # A disk that is no multiple of the block: no pass is at other places than the first.
    part = only_part(Load(count=9), size=14 * KIB)
    assert first_offsets(part, 5) == [n * KIB for n in (0, 4, 8, 0, 4)]


@pytest.mark.parametrize(
    ("load", "reach"),
    [
        (Load(count=14, start=8 * KIB), (8 * KIB, 64 * KIB)),
        (Load(count=15, start=8 * KIB), (0, 64 * KIB)),
        (Load(count=5, start=8 * KIB, step=12 * KIB), (8 * KIB, 64 * KIB)),
        (Load(count=6, start=8 * KIB, step=12 * KIB), (0, 64 * KIB)),
        (Load(seconds=1, start=8 * KIB), (0, 64 * KIB)),
        (Load(count=999, start=8 * KIB, length=32 * KIB), (8 * KIB, 40 * KIB)),
        (Load(count=999, start=8 * KIB, random=True), (8 * KIB, 64 * KIB)),
        (Load(count=999, start=8 * KIB, threads=2), (8 * KIB, 64 * KIB)),
    ],
)
def test_no_request_is_outside_of_what_the_load_says_it_reaches(load, reach):
    assert load.reach(64 * KIB) == reach
    for part in load.parts(64 * KIB, "test"):
        for offset in first_offsets(part, part.count or 1000):
            assert reach[0] <= offset <= reach[1] - load.block


@pytest.mark.parametrize("percent", [1, 30, 99])
def test_mix_has_its_share_of_reads(percent):
    part = only_part(Load(count=1, read_percent=percent))
    reads = sum(request.is_read for request in first_requests(part, 20000))
    assert abs(reads / 200 - percent) < 1.5


def test_parts_of_threads_are_disjoint_and_together_the_whole():
    load = Load(count=100, random=True, threads=3, start=4 * KIB, length=100 * KIB)
    parts = load.parts(SIZE, "test")
    assert sum(part.count for part in parts) == 100
    assert [part.start for part in parts] == [4 * KIB, 36 * KIB, 68 * KIB]
    assert {part.length for part in parts} == {32 * KIB}
    assert len({part.seed for part in parts}) == 3
    assert load.parts(SIZE, "test", run=0) == parts
    assert load.parts(SIZE, "test", run=1)[0].seed != parts[0].seed


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"count": None}, "neither a count nor a time"),
        ({"count": 0}, "count 0"),
        ({"seconds": 0.0}, "time 0"),
        ({"seconds": float("nan")}, "time nan"),
        ({"block": 0}, "buffer size 0"),
        ({"depth": 0}, "depth 0"),
        ({"depth": 5000}, "depth 5000"),
        ({"pattern": 256}, "pattern 256"),
        ({"read_percent": 101}, "percentage of reads 101"),
        ({"flush_every": 64}, "needs writes"),
        ({"flush_every": 63, "read_percent": 0}, "flush interval 63"),
        ({"random": True, "step": 4096}, "no step size"),
        ({"block": 64 * MIB, "depth": 64}, "memory"),
        ({"start": -1}, "offset -1"),
    ],
)
def test_loads_that_make_no_sense_are_refused(wrong, text):
    with pytest.raises(UsageError, match=text):
        Load(**{"count": 1, **wrong}).check()


@pytest.mark.parametrize(
    "wrong", [{"start": SIZE + 1}, {"start": 1, "length": SIZE}, {"block": SIZE + 1},
              {"length": 0}, {"threads": 3, "length": 8 * KIB}],
)  # fmt: skip
def test_ranges_that_the_disk_does_not_have_are_refused(wrong):
    with pytest.raises(UsageError, match="the-disk"):
        Load(count=1, **wrong).parts(SIZE, "the-disk")


def test_an_offset_behind_the_disk_is_told_as_it_was_given():
    with pytest.raises(UsageError, match=f"offset {SIZE + 7}: is behind the disk of {SIZE} bytes"):
        Load(count=1, start=SIZE + 7).parts(SIZE, "the-disk")


# ---- both loops do the same ----


LOADS = [
    Load(count=300, random=True, depth=7, read_percent=0, pattern=PATTERN),
    Load(count=700, random=True, depth=64, read_percent=40, pattern=PATTERN, seed=9),
    Load(count=600, depth=16, read_percent=0, pattern=PATTERN, start=64 * KIB, length=MIB),
    Load(count=90, depth=3, read_percent=0, pattern=PATTERN, block=20 * KIB, step=28 * KIB),
    # Round the disk, back to other places than at first; then into one that is too near its end.
    Load(count=400, depth=6, read_percent=0, pattern=PATTERN, step=44 * KIB, start=24 * KIB),
    Load(count=90, depth=1, read_percent=50, pattern=PATTERN, step=148 * KIB, block=12 * KIB),
    # Nothing here is aligned to anything.
    Load(count=70, depth=4, read_percent=0, pattern=PATTERN, block=999, step=77_777, start=3),
    Load(count=150, random=True, depth=5, read_percent=50, pattern=PATTERN, block=1000, start=77),
    Load(count=300, random=True, depth=8, read_percent=0, pattern=PATTERN, flush_every=40),
    Load(count=300, random=True, depth=8, read_percent=0, flush_every=8, drain=False),
]


@pytest.mark.parametrize("load", LOADS, ids=range(len(LOADS)))
def test_what_a_load_writes_is_what_its_requests_say(driver, path, load):
    part = only_part(load)
    with opened(path) as image:
        model = bytearray(image.read(0, SIZE))
    writes = 0
    for offset, is_read in first_requests(part, load.count):
        if not is_read:
            model[offset : offset + load.block] = bytes([load.pattern]) * load.block
            writes += 1
    with opened(path, write=True) as image:
        times = finish(driver(image, part))
    assert times.writes.count == writes
    assert times.reads.count == load.count - writes
    assert times.flushes.count == (writes // load.flush_every if load.flush_every else 0)
    assert 0 < times.began < times.ended
    with opened(path) as image:
        assert image.read(0, SIZE) == model


def test_aligned_requests_are_left_to_the_helper(path):
    with opened(path) as image:
        times = finish(HelperLoad(image, only_part(Load(count=200, random=True))))
        if path.suffix == ".raw":
            assert times.by_python == 0
        assert finish(PythonLoad(image, only_part(Load(count=200)))).by_python == 200


def test_without_hits_there_is_no_helper(path):
    from mmcow.jobs.bench import make_driver

    part = only_part(Load(count=10))
    with opened(path, host=LinuxHost(hits=False)) as image:
        made = make_driver(image, part)
        assert isinstance(made, PythonLoad)
        finish(made)
    with opened(path) as image:
        made = make_driver(image, part)
        assert isinstance(made, HelperLoad)
        finish(made)


def test_time_ends_a_load(driver, path):
    with opened(path) as image:
        load = driver(image, only_part(Load(seconds=0.15, random=True, depth=2)))
        times = finish(load)
    assert times.reads.count > 0
    assert 0.15 <= (times.ended - times.began) / 1e9 < 2.0


def test_stopping_leaves_nothing_in_flight(driver, path):
    with opened(path, write=True) as image:
        load = driver(image, only_part(Load(count=10**9, random=True, read_percent=50)))
        load.SLICE = 0.01
        load.SLICE_MS = 10
        assert load.run() is False
        load.stop()
        times = finish(load)
        assert load.done == times.reads.count + times.writes.count < 10**9
        image.flush()


def test_disk_without_anything_is_zeros_and_comes_to_an_end(driver, tmp_path):
    """Nothing here ever waits for the kernel: neither the count nor the time may be missed."""
    mmcow.create(tmp_path / "empty.acow", size=MIB)
    with opened(tmp_path / "empty.acow") as image:
        assert finish(driver(image, only_part(Load(count=5000), MIB))).reads.count == 5000
        times = finish(driver(image, only_part(Load(seconds=0.1, depth=4), MIB)))
        assert (times.ended - times.began) / 1e9 < 1.0


# ---- errors ----


def spoil(image, flags):
    """Make every transfer of the top layer's file fail with EBADF."""
    null = os.open(os.devnull, flags)
    os.dup2(null, image.engine.top.data.handle.descriptor)
    os.close(null)


def test_failed_request_ends_the_load_and_is_told(driver, path):
    image = opened(path, write=True, cache="writeback")
    part = only_part(Load(count=10**6, random=True, depth=9, read_percent=0, block=16 * KIB))
    spoil(image, os.O_RDONLY)
    load = driver(image, part)
    with pytest.raises(StorageError) as caught:
        finish(load)
    assert caught.value.errno == errno.EBADF
    assert "write" in str(caught.value)
    assert load.done == 0
    with suppress(StorageError, LayerFailed):  # of the flush, where one is due
        image.close()


def test_failed_flush_ends_the_load_and_is_told(driver, path, monkeypatch):
    with opened(path, write=True) as image:

        async def flush():
            raise StorageError(errno.EIO, "fdatasync", "the-file")

        part = only_part(Load(count=1000, depth=4, read_percent=0, flush_every=10))
        load = driver(image, part)
        with monkeypatch.context() as patched:
            patched.setattr(image.engine, "flush", flush)
            with pytest.raises(StorageError, match="the-file"):
                finish(load)
        assert load.done <= 10


def test_refused_request_ends_the_load_and_is_told(driver, path):
    """The engine refuses at once, before anything is in flight."""
    with opened(path, write=True) as image:
        part = only_part(Load(count=1000, read_percent=0))
        image.engine.writable = False
        image.engine.hits.refresh()
        with pytest.raises(UsageError, match="read-only"):
            finish(driver(image, part))
        image.engine.writable = True


# ---- latencies ----


def test_every_time_has_a_bucket_that_holds_it():
    rng = random.Random(5)
    times = [*range(300), *(rng.getrandbits(rng.randint(1, 64)) for _ in range(5000))]
    times += [(1 << bits) + step for bits in range(6, 64) for step in (-1, 0, 1)] + [2**64 - 1]
    for ns in times:
        bucket = bucket_of(ns)
        assert 0 <= bucket < BUCKETS
        low, high = lower_bound(bucket), lower_bound(bucket + 1)
        assert low <= ns < high
        assert high - low <= max(1, low / 32)


def test_percentiles_are_those_of_the_times_to_three_percent():
    rng = random.Random(6)
    times = sorted(int(rng.lognormvariate(11, 1)) for _ in range(20000))
    histogram = Histogram()
    for ns in times:
        histogram.add(ns)
    assert histogram.count == 20000
    assert histogram.mean == pytest.approx(sum(times) / 20000)
    assert (histogram.least, histogram.most) == (times[0], times[-1])
    for percent in (0.1, 25, 50, 90, 99, 99.9):
        exact = times[int(20000 * percent / 100) - 1]
        assert histogram.percentile(percent) == pytest.approx(exact, rel=0.035)
    assert histogram.percentile(100) == times[-1]


def test_merged_histograms_are_as_if_all_had_been_one():
    rng = random.Random(7)
    parts = [Histogram() for _ in range(3)]
    whole = Histogram()
    for _ in range(3000):
        ns = rng.getrandbits(20)
        rng.choice(parts).add(ns)
        whole.add(ns)
    merged = Histogram.merged([Histogram(), *parts])
    assert vars(merged) == vars(whole)


def test_nothing_has_no_latency():
    summary = Histogram().summary_us()
    assert list(summary) == ["mean", "min", "max", "p50", "p90", "p99", "p99.9"]
    assert set(summary.values()) == {0.0}
