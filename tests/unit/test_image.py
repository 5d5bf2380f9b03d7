# SPDX-License-Identifier: MIT
# ruff: noqa: B023, BLE001, PLW0108, PT012, PT031 - threads and calls are made in loops, on purpose
"""The synchronous API at its boundary: arguments, closing, threads, forks, signals, leaks."""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import io
import os
import random
import shutil
import signal
import threading
import time
import tracemalloc
import warnings
from pathlib import Path

import pytest

import mmcow
from mmcow import (
    ChainError,
    ClosedError,
    ForkedError,
    Interrupted,
    LockedError,
    ReadOnlyError,
    UsageError,
    native,
)
from mmcow.formats.driver import Kind
from mmcow.storage.linux import BACKENDS, LinuxHost

KIB, MIB = 1 << 10, 1 << 20
SIZE = MIB + 1536


@pytest.fixture(params=["io_uring", "threads"])
def host(request):
    return LinuxHost(request.param)


@pytest.fixture
def base(tmp_path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(bytes(range(1, 252)) * (SIZE // 251 + 1))
    os.truncate(path, SIZE)
    return path


@pytest.fixture
def overlay(base) -> Path:
    path = base.with_name("top.acow")
    mmcow.create(path, backing="base.raw", backing_format="raw", options={"cluster_size": "4k"})
    return path


@pytest.fixture
def disk(overlay, host):
    with mmcow.open(overlay, write=True, host=host) as image:
        yield image


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# ---- arguments ----------------------------------------------------------------------------

RANGES = (
    pytest.param(-1, 512, id="negative-offset"),
    pytest.param(0, -1, id="negative-length"),
    pytest.param(-512, 1024, id="negative-offset-that-reaches-inside"),
    pytest.param(SIZE, 1, id="behind-the-end"),
    pytest.param(SIZE - 1, 2, id="across-the-end"),
    pytest.param(0, SIZE + 1, id="too-long"),
    pytest.param(1 << 63, 1, id="beyond-63-bits"),
    pytest.param(SIZE + 1, 0, id="nothing-behind-the-end"),
    pytest.param(0, 1 << 70, id="beyond-64-bits"),
)


@pytest.mark.parametrize(("offset", "length"), RANGES)
@pytest.mark.parametrize("verb", ["read", "write_zeroes", "discard", "block_status"])
def test_range_outside_the_disk_is_a_usage_error(disk, verb, offset, length):
    with pytest.raises(UsageError, match=r"top\.acow"):
        getattr(disk, verb)(offset, length)


@pytest.mark.parametrize("offset", [-1, SIZE, SIZE - 9, 1 << 63, 1 << 70])
def test_write_outside_the_disk_is_a_usage_error(disk, offset):
    before = disk.read(0, SIZE)
    with pytest.raises(UsageError):
        disk.write(offset, b"0123456789")
    assert disk.read(0, SIZE) == before


@pytest.mark.parametrize("offset", [-1, SIZE, 1 << 63])
def test_readinto_outside_the_disk_is_a_usage_error(disk, offset):
    buffer = bytearray(b"x" * 10)
    with pytest.raises(UsageError):
        disk.readinto(offset, buffer)
    assert buffer == b"x" * 10


WRONG = [1.0, "0", None, b"0", 0.5, [0]]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_offset_that_is_no_integer_is_a_type_error(disk, wrong):
    for call in (
        lambda: disk.read(wrong, 1),
        lambda: disk.readinto(wrong, bytearray(1)),
        lambda: disk.write(wrong, b"x"),
        lambda: disk.write_zeroes(wrong, 1),
        lambda: disk.discard(wrong, 1),
        lambda: list(disk.block_status(wrong, 1)),
        lambda: disk.read(0, wrong),
        lambda: disk.write_zeroes(0, wrong),
        lambda: disk.resize(wrong),
    ):
        with pytest.raises(TypeError):
            call()


def test_integers_of_other_types_are_taken(disk):
    class Number:
        def __index__(self):
            return 4096

    assert disk.read(Number(), Number()) == disk.read(4096, 4096)
    assert disk.write(Number(), b"abc") == 3
    assert disk.read(True, True) == disk.read(1, 1)


@pytest.mark.parametrize(
    "wrong", ["text", 5, None, [1, 2], object()], ids=lambda wrong: type(wrong).__name__
)
def test_data_without_a_buffer_is_a_type_error(disk, wrong):
    with pytest.raises(TypeError):
        disk.write(0, wrong)
    with pytest.raises(TypeError):
        disk.readinto(0, wrong)


@pytest.mark.parametrize(
    "buffer", [b"12345678", memoryview(b"12345678"), memoryview(bytearray(8)).toreadonly()]
)
def test_readinto_a_read_only_buffer_is_a_usage_error(disk, buffer):
    with pytest.raises(UsageError, match="read-only"):
        disk.readinto(0, buffer)


def test_memory_that_is_not_contiguous_is_a_type_error(disk):
    strided = memoryview(bytearray(4096))[::2]
    backwards = memoryview(bytearray(4096))[::-1]
    for view in (strided, backwards):
        with pytest.raises(TypeError):
            disk.readinto(0, view)
        with pytest.raises(TypeError):
            disk.write(0, view)


def test_every_contiguous_buffer_is_taken(disk):
    for data in (
        bytearray(b"\x01" * 800),
        memoryview(b"\x02" * 800),
        array.array("I", [3] * 200),
        (ctypes.c_uint16 * 400)(*range(400)),
        memoryview(bytearray(b"\x04" * 800)).cast("B", (20, 40)),
    ):
        assert disk.write(1000, data) == 800
        assert disk.read(1000, 800) == bytes(data)
    into = array.array("H", [0] * 400)
    assert disk.readinto(1000, into) == 800
    assert into.tobytes() == b"\x04" * 800


@pytest.mark.parametrize("offset", [0, 1, 512, 5000, SIZE])
def test_requests_of_no_bytes_do_nothing(disk, offset):
    """This test asks for nothing, everywhere: drivers must not be asked for empty ranges."""
    before = disk.read(0, SIZE)
    assert disk.read(offset, 0) == b""
    assert disk.readinto(offset, bytearray()) == 0
    assert disk.write(offset, b"") == 0
    disk.write_zeroes(offset, 0)
    disk.discard(offset, 0)
    assert list(disk.block_status(offset, 0)) == []
    assert disk.read(0, SIZE) == before


@pytest.mark.parametrize("size", [-1, 1 << 63, (1 << 63) - 511])
def test_resize_to_an_impossible_size_is_a_usage_error(disk, size):
    with pytest.raises(UsageError):
        disk.resize(size, shrink=True)
    assert disk.size == SIZE


def test_resize_shrinks_only_when_told_to(disk):
    with pytest.raises(UsageError, match="shrink"):
        disk.resize(SIZE - 512)
    assert disk.size == SIZE
    disk.resize(SIZE - 512, shrink=True)
    assert disk.size == SIZE - 512


def test_resize_rounds_up(disk):
    disk.resize(SIZE + 1)
    assert disk.size == SIZE + 512
    assert disk.read(SIZE, 512) == bytes(512)


@pytest.mark.parametrize("layer", [-1, 2, 99])
def test_block_status_of_a_layer_that_is_not_there_is_a_usage_error(disk, layer):
    with pytest.raises(UsageError):
        disk.block_status(layer=layer)


def test_changes_of_a_read_only_image_are_refused(overlay):
    with mmcow.open(overlay) as image:
        for change in (
            lambda: image.write(0, b"x"),
            lambda: image.write_zeroes(0, 1),
            lambda: image.discard(0, 1),
            lambda: image.resize(SIZE + 512),
        ):
            with pytest.raises(ReadOnlyError, match="read-only"):
                change()
        image.flush()
        assert not image.writable


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "fast"}, "writeback"),
        ({"format": "qcow9"}, "must be one of"),
        ({"format": "vhdx"}, "not supported"),
        ({"share": True, "write": True}, "reading only"),
    ],
)
def test_open_with_a_wrong_option_is_a_usage_error(overlay, options, message):
    before = descriptors()
    with pytest.raises(UsageError, match=message):
        mmcow.open(overlay, **options)
    assert descriptors() == before


def test_unknown_queue_is_a_usage_error(monkeypatch):
    monkeypatch.setenv("MMCOW_QUEUE", "aio")
    with pytest.raises(UsageError, match="io_uring"):
        LinuxHost()
    assert set(BACKENDS) == {"auto", "io_uring", "threads"}


# ---- a base that was left out ---------------------------------------------------------------


def test_partial_write_without_the_base_is_refused_and_hides_nothing(overlay, base):
    """This test opens a top alone for writing: filling the rest of a cluster with zeros would
    hide the base's bytes for good."""
    with mmcow.open(overlay, write=True, backing=False) as image:
        with pytest.raises(UsageError, match="left out"):
            image.write(100, b"x")
        with pytest.raises(UsageError, match="left out"):
            image.write_zeroes(4096, 512)
        image.write(8192, b"y" * 4096)
        image.write_zeroes(16384, 4096)
    with mmcow.open(overlay) as image:
        expected = bytearray(base.read_bytes())
        expected[8192:12288] = b"y" * 4096
        expected[16384:20480] = bytes(4096)
        assert image.read(0, SIZE) == expected


# ---- closing --------------------------------------------------------------------------------


def test_every_verb_of_a_closed_image_is_an_error(overlay, host):
    image = mmcow.open(overlay, write=True, host=host)
    walk = image.block_status()
    image.close()
    image.close()
    assert image.closed
    assert "closed" in repr(image)
    for call in (
        lambda: image.read(0, 1),
        lambda: image.readinto(0, bytearray(1)),
        lambda: image.write(0, b"x"),
        lambda: image.write_zeroes(0, 1),
        lambda: image.discard(0, 1),
        lambda: image.flush(),
        lambda: image.resize(SIZE),
        lambda: image.block_status(),
        lambda: next(walk),
        lambda: image.as_file(),
    ):
        with pytest.raises(ClosedError):
            call()


def test_close_makes_writes_durable_and_gives_everything_back(overlay, host):
    before = descriptors()
    with mmcow.open(overlay, write=True, host=host) as image:
        image.write(5000, b"kept")
    assert descriptors() == before
    with mmcow.open(overlay) as image:
        assert image.read(5000, 4) == b"kept"


def test_error_inside_the_context_is_the_one_that_comes_out(overlay):
    def fail():
        with mmcow.open(overlay, write=True) as image:
            image.engine.flusher.fail(OSError("flush"))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()


def test_unclosed_image_warns_and_gives_its_files_and_locks_back(overlay):
    before = descriptors()
    image = mmcow.open(overlay, write=True)
    with pytest.warns(ResourceWarning, match=r"unclosed.*top\.acow"):
        del image
        gc.collect()
    assert descriptors() == before
    mmcow.open(overlay, write=True).close()


def test_two_hundred_openings_leave_no_descriptor_and_no_memory(overlay, host):
    def once():
        with mmcow.open(overlay, write=True, host=host) as image:
            image.write(0, b"x")

    for _ in range(20):
        once()
    before = descriptors()
    tracemalloc.start()
    try:
        once()
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
        for _ in range(180):
            once()
        gc.collect()
        now, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert descriptors() == before
    assert now - held < 200_000
    assert threading.active_count() < 5


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def test_big_requests_give_their_memory_back(overlay, host):
    with mmcow.open(overlay, write=True, host=host) as image:
        image.resize(256 * MIB)
        image.read(0, 64 * MIB)
        before = _resident()
        for _ in range(6):
            image.read(0, 64 * MIB)
            image.write(MIB + 7, bytes(16 * MIB))
    gc.collect()
    assert _resident() - before < 80 * MIB


# ---- errors while opening -------------------------------------------------------------------


def _damaged(tmp_path: Path) -> list[tuple[str, Path, dict]]:
    base = tmp_path / "b.raw"
    base.write_bytes(bytes(8192))
    cases: list[tuple[str, Path, dict]] = []

    def make(name: str, **options) -> Path:
        path = tmp_path / name
        mmcow.create(path, backing="b.raw", backing_format="raw", **options)
        return path

    missing_base = make("missing-base.acow")
    cases.append(("gone.raw", missing_base, {}))
    mmcow.create(tmp_path / "gone.acow", size=8192, backing="gone.raw", backing_format="raw",
                 check_backing=False)  # fmt: skip
    cases[-1] = ("base missing", tmp_path / "gone.acow", {})
    no_data = make("no-data.acow")
    (tmp_path / "no-data.acow.raw").unlink()
    cases.append(("data file missing", no_data, {}))
    short = make("short.acow")
    os.truncate(short, 4096)
    cases.append(("bitmap cut", short, {}))
    header = make("header.acow")
    os.truncate(header, 50)
    cases.append(("header cut", header, {}))
    cases.append(("policy", make("policy.acow"), {"policy": mmcow.DenyAll()}))
    cow = make("cut.cow", format="cow")
    os.truncate(cow, 900)
    cases.append(("cow cut", cow, {}))
    cases.append(("not there", tmp_path / "nothing", {}))
    cases.append(("directory", tmp_path, {}))
    return cases


@pytest.mark.parametrize("write", [False, True])
def test_errors_while_opening_leave_nothing_open(tmp_path, host, write):
    for what, path, options in _damaged(tmp_path):
        before = descriptors()
        with pytest.raises(mmcow.MmcowError):
            mmcow.open(path, write=write, host=host, **options)
        gc.collect()
        assert descriptors() == before, what


def test_locked_image_leaves_nothing_open(overlay, host):
    with mmcow.open(overlay, write=True, host=host):
        before = descriptors()
        for write in (False, True):
            with pytest.raises(LockedError):
                mmcow.open(overlay, write=write, host=host)
        assert descriptors() == before


# ---- a file object --------------------------------------------------------------------------


def test_as_file_reads_seeks_and_ends_like_a_file(disk):
    whole = disk.read(0, SIZE)
    with disk.as_file() as file:
        assert file.readable()
        assert file.writable()
        assert file.seekable()
        assert file.read(10) == whole[:10]
        assert file.tell() == 10
        assert file.seek(-5, os.SEEK_END) == SIZE - 5
        assert file.read() == whole[-5:]
        assert file.read(1) == b""
        assert file.seek(3, os.SEEK_CUR) == SIZE + 3
        assert file.read(1) == b""
        assert file.readinto(bytearray(4)) == 0
        assert file.seek(0) == 0
        assert file.readall() == whole
        with pytest.raises(ValueError, match="negative"):
            file.seek(-1)
        with pytest.raises(ValueError, match="whence"):
            file.seek(0, 7)
        with pytest.raises(TypeError):
            file.seek(1.5)
    assert not disk.closed


def test_as_file_closed_is_a_value_error(disk):
    file = disk.as_file()
    file.close()
    for call in (file.tell, file.read, file.readable, lambda: file.write(b"x"), file.flush,
                 lambda: file.seek(0), lambda: file.readinto(bytearray(1))):  # fmt: skip
        with pytest.raises(ValueError, match="closed"):
            call()


def test_as_file_of_a_read_only_image_does_not_write(overlay):
    with mmcow.open(overlay) as image, image.as_file() as file:
        assert not file.writable()
        with pytest.raises(io.UnsupportedOperation):
            file.write(b"x")
        with pytest.raises(io.UnsupportedOperation):
            io.BufferedWriter(file)


def test_as_file_closed_after_its_image_is_quiet(overlay):
    image = mmcow.open(overlay, write=True)
    file = image.as_file()
    image.close()
    file.close()


def test_as_file_does_not_grow_the_disk(disk):
    with disk.as_file() as file:
        file.seek(0, os.SEEK_END)
        with pytest.raises(UsageError):
            file.write(b"x")
    assert disk.size == SIZE


def test_buffered_reader_over_a_disk(disk, rng):
    whole = disk.read(0, SIZE)
    with io.BufferedReader(disk.as_file(), 3000) as file:
        for _ in range(50):
            at = rng.randrange(SIZE)
            length = rng.randrange(9000)
            file.seek(at)
            assert file.read(length) == whole[at : at + length]
        file.seek(0)
        assert file.peek(1)[:1] == whole[:1]


def test_buffered_random_over_a_disk(disk, rng):
    model = bytearray(disk.read(0, SIZE))
    with io.BufferedRandom(disk.as_file(), 5000) as file:
        for i in range(100):
            at = rng.randrange(SIZE)
            file.seek(at)
            if rng.random() < 0.5:
                data = bytes([i + 1]) * min(rng.randrange(9000), SIZE - at)
                file.write(data)
                model[at : at + len(data)] = data
            else:
                assert file.read(700) == model[at : at + 700]
    assert disk.read(0, SIZE) == model


def test_copyfileobj_from_and_to_a_disk(disk, tmp_path):
    copy = tmp_path / "copy"
    with disk.as_file() as source, copy.open("wb") as target:
        shutil.copyfileobj(source, target)
    assert copy.read_bytes() == disk.read(0, SIZE)
    content = random.Random(5).randbytes(SIZE)
    with disk.as_file() as target:
        shutil.copyfileobj(io.BytesIO(content), target, 70001)
    assert disk.read(0, SIZE) == content


# ---- what it is made of ---------------------------------------------------------------------


def test_block_status_tells_layers_apart(overlay, base, host):
    with mmcow.open(overlay, write=True, host=host) as image:
        image.resize(SIZE + 65536)
        image.write(8192, b"x" * 4096)
        found = list(image.block_status())
        # The resize copied the last, partial cluster up, and what lies behind the base is a hole.
        own = [e for e in found if e.depth == 0 and e.kind is Kind.DATA]
        assert (own[0].offset, own[0].length) == (8192, 4096)
        assert own[0].path == f"{overlay}.raw"
        assert found[0] == mmcow.BlockStatus(0, 8192, Kind.DATA, 1, 0, str(base))
        assert sum(e.length for e in found) == image.size
        assert found[-1].is_zero
        alone = list(image.block_status(0, 16384, layer=0))
        assert [e.kind for e in alone] == [Kind.BELOW, Kind.DATA, Kind.BELOW]
        assert [e.kind for e in image.block_status(0, 16384, layer=1)] == [Kind.DATA]


def test_facts_of_a_chain(overlay, base, host):
    with mmcow.open(overlay, host=host, cache="writeback") as image:
        top, below = image.chain
        assert (top.path, top.format, top.variant) == (str(overlay), "add-cow", "v20")
        assert (top.backing, top.backing_format) == ("base.raw", "raw")
        assert (below.path, below.format, below.backing) == (str(base), "raw", None)
        assert top.probed
        assert not below.probed
        assert image.queue_backend == host.backend
        assert image.warnings == []
        assert top.cache == below.cache == "writeback"
        assert image.format == "add-cow"


def test_base_cache_is_a_choice_of_its_own(overlay):
    with mmcow.open(overlay, cache="none", base_cache="writeback") as image:
        assert [layer.cache for layer in image.chain] == ["none", "writeback"]


# ---- threads --------------------------------------------------------------------------------


def run_threads(count: int, work) -> None:
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_threads_on_disjoint_ranges_do_not_disturb_each_other(overlay, host, cache, rng):
    """This test gives eight threads a range each, whose borders lie inside shared clusters."""
    seeds = [rng.randrange(1 << 30) for _ in range(8)]
    share = SIZE // 8 - 37
    with mmcow.open(overlay, write=True, host=host, cache=cache) as image:

        def work(number: int) -> None:
            own = random.Random(seeds[number])
            low = number * share
            model = bytearray(image.read(low, share))
            for i in range(60):
                at = own.randrange(share)
                length = min(own.randrange(1, 9000), share - at)
                kind = own.randrange(8)
                if kind < 4:
                    model[at : at + length] = bytes([own.randrange(1, 256)]) * length
                    image.write(low + at, model[at : at + length])
                elif kind == 4:
                    model[at : at + length] = bytes(length)
                    image.write_zeroes(low + at, length)
                elif kind == 5 and i % 10 == 0:
                    image.flush()
                else:
                    assert image.read(low + at, length) == model[at : at + length]
            assert image.read(low, share) == model

        run_threads(8, work)


@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_threads_on_the_same_clusters_leave_whole_sectors(overlay, host, cache, rng):
    """This test lets eight threads write sectors of the same few clusters: each sector must end
    up as one thread wrote it, and never show what lies below again."""
    seeds = [rng.randrange(1 << 30) for _ in range(8)]
    sectors = 64
    written = set()
    with mmcow.open(overlay, write=True, host=host, cache=cache) as image:

        def work(number: int) -> None:
            own = random.Random(seeds[number])
            for i in range(50):
                sector = own.randrange(sectors)
                count = own.randrange(1, 9)
                data = b"".join(
                    bytes([number + 1]) * 256 + bytes([i + 1]) * 256 for _ in range(count)
                )
                image.write(sector * 512, data)
                written.update(range(sector, sector + count))

        run_threads(8, work)
        found = image.read(0, (sectors + 9) * 512)
    base = (overlay.parent / "base.raw").read_bytes()
    for sector in range(sectors + 9):
        part = found[sector * 512 : sector * 512 + 512]
        if sector not in written:
            assert part == base[sector * 512 : sector * 512 + 512]
            continue
        assert 1 <= part[0] <= 8
        assert part[:256] == part[:1] * 256
        assert part[256:] == part[256:257] * 256


def test_closing_beside_other_threads_ends_them_with_an_error(overlay, host):
    """This test closes an image under the feet of four threads, many times."""
    for _ in range(15):
        image = mmcow.open(overlay, write=True, host=host)
        started = threading.Barrier(5)

        def work(number: int, image=image, started=started) -> None:
            if number == 4:
                started.wait()
                time.sleep(0.002)
                image.close()
                return
            started.wait()
            with pytest.raises(ClosedError):
                while True:
                    image.write(number * 4096 + 100, b"x" * 5000)
                    image.flush() if number == 3 else image.read(0, 10000)

        run_threads(5, work)
        assert image.closed


# ---- fork -----------------------------------------------------------------------------------


def in_child(work) -> str:
    """Run ``work`` in a forked child; what it returned, or its exception's class."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # threads of the queue, of pytest-timeout
        pid = os.fork()
    if pid == 0:
        try:
            try:
                answer = repr(work())
            except BaseException as error:
                answer = type(error).__name__
            os.write(writer, answer.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "r") as file:
        answer = file.read()
    assert os.waitpid(pid, 0)[1] == 0
    return answer


def test_every_verb_in_a_forked_child_is_an_error(disk):
    walk = disk.block_status()
    for call in (
        lambda: disk.read(0, 1),
        lambda: disk.readinto(0, bytearray(1)),
        lambda: disk.write(0, b"x"),
        lambda: disk.write_zeroes(0, 1),
        lambda: disk.discard(0, 1),
        lambda: disk.flush(),
        lambda: disk.resize(SIZE),
        lambda: disk.block_status(),
        lambda: next(walk),
        lambda: disk.as_file().read(1),
        lambda: disk.close(),
    ):
        assert in_child(call) == "ForkedError"
    disk.write(0, b"still here")
    disk.flush()
    assert disk.read(0, 10) == b"still here"
    assert issubclass(ForkedError, UsageError)


def test_child_that_drops_the_image_disturbs_nothing(overlay, host):
    """This test lets a child run its finalizers and end: locks, mappings, ring and staged bits of
    the parent stay."""
    image = mmcow.open(overlay, write=True, host=host)
    image.write(4096, b"staged" * 1000)

    def work():
        nonlocal image
        del image
        gc.collect()
        return "done"

    assert in_child(work) == "'done'"
    assert image.read(4096, 6) == b"staged"
    with pytest.raises(LockedError):
        mmcow.open(overlay, write=True)
    image.write(100, b"more")
    image.close()
    with mmcow.open(overlay) as again:
        assert again.read(4096, 6000) == b"staged" * 1000
        assert again.read(100, 4) == b"more"


def test_fork_while_another_thread_is_inside(overlay, host):
    """This test forks while the reactor's lock and the queue may be held: the child must not hang
    on a lock whose holder it does not have."""
    stop = threading.Event()
    with mmcow.open(overlay, write=True, host=host) as image:

        def work() -> None:
            while not stop.is_set():
                image.write(0, bytes(20000))

        thread = threading.Thread(target=work)
        thread.start()
        try:
            for _ in range(10):
                assert in_child(lambda: image.read(0, 1)) == "ForkedError"
        finally:
            stop.set()
            thread.join()


def test_image_opened_in_the_child_works_there(overlay, host):
    def work():
        with mmcow.open(overlay, write=True, host=LinuxHost(host.backend)) as image:
            image.write(0, b"child")
            return image.read(0, 5)

    with mmcow.open(overlay, host=host, share=True) as image:
        image.read(0, 1)
        assert in_child(work) == "b'child'"


# ---- KeyboardInterrupt ----------------------------------------------------------------------


def interrupts(test):
    """The timer is this test's own; an interrupt may strike in a destructor, which says so."""
    for mark in (
        pytest.mark.timeout(60, method="thread"),
        pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
        pytest.mark.filterwarnings("ignore:coroutine .* was never awaited"),
    ):
        test = mark(test)
    return test


@pytest.fixture
def interrupting():
    """Raises KeyboardInterrupt in the main thread after a time, as Ctrl-C does."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    gc.collect()  # what an interrupt left behind is said here and not in a later test


@interrupts
@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_interrupt_anywhere_leaves_a_valid_image(overlay, base, host, cache, interrupting, rng):
    """This test breaks into big I/O at forty moments: no hang, a sticky error, a close that works,
    and an image whose every sector is old or new."""
    original = base.read_bytes()
    hits = 0
    for _ in range(40):
        image = mmcow.open(overlay, write=True, host=host, cache=cache)
        try:
            interrupting(rng.uniform(0.0002, 0.006))
            for _ in range(200):
                image.write(700, b"n" * 300_000)
                image.read(0, SIZE)
                image.write_zeroes(400_000, 50_000)
            interrupting(0)
        except KeyboardInterrupt:
            hits += 1
            sticky = image.reactor.interrupted is not None
            for call in (
                lambda: image.read(0, 1),
                lambda: image.write(0, b"x"),
                image.flush,
            ):
                if sticky:
                    with pytest.raises(Interrupted):
                        call()
                else:
                    call()  # it struck between two requests
            if not sticky:
                image.write(0, original[:1])
        interrupting(0)
        image.close()
        with mmcow.open(overlay) as again:
            found = again.read(0, SIZE)
        for sector in range(SIZE // 512):
            part = found[sector * 512 : sector * 512 + 512]
            old = original[sector * 512 : sector * 512 + 512]
            if part == old or not any(part) or part == b"n" * 512:
                continue
            # Where a write or a zeroing begins or ends.
            assert sector in (1, 587, 781, 878), sector
            assert all(new in (0, ord("n"), was) for new, was in zip(part, old, strict=True))
    assert hits >= 10, "the interrupts came too late to prove anything"


def test_interrupt_among_results_does_not_crash_a_later_collection(overlay, host):
    """CPython before 3.12.7 crashes where the collector meets a memoryview whose export is garbage
    with it: what a traceback keeps must export none."""

    class BreakingIn(dict[int, object]):
        def pop(self, *_: object) -> object:
            raise KeyboardInterrupt

    def strike(image) -> int:
        queue = image.reactor.queue
        one = native.aligned(4096)
        request = queue.read(image.engine.layers[0].data.handle, 0, [one])
        queue._in_flight = BreakingIn(queue._in_flight)
        try:
            image.reactor.wait(request)
        except KeyboardInterrupt as error:
            queue._in_flight = dict(queue._in_flight)
            kept = error  # by its own traceback: garbage that only the collector finds
            image.reactor.interrupted = KeyboardInterrupt()
            return kept is not None
        return False

    def work() -> int:
        struck = 0
        for _ in range(20):
            with contextlib.suppress(Interrupted), mmcow.open(overlay, host=host) as image:
                struck += strike(image)
                gc.collect()
        return struck

    assert in_child(work) == "20"


@interrupts
def test_interrupt_of_the_main_thread_frees_the_others(overlay, host, interrupting):
    """This test breaks into the main thread while four others are inside."""
    for _ in range(10):
        image = mmcow.open(overlay, write=True, host=host)
        ends: list[object] = []

        def work(image=image, ends=ends) -> None:
            try:
                while True:
                    image.write(50_000, bytes(9000))
            except BaseException as error:
                ends.append(error)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            interrupting(0.005)
            for _ in range(2000):  # bounded: an interrupt in a destructor is lost
                image.read(0, 200_000)
        except KeyboardInterrupt:
            pass
        interrupting(0)
        image.close()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive(), "a thread hangs"
        assert all(isinstance(error, Interrupted | ClosedError) for error in ends), ends


@interrupts
def test_interrupt_leaves_the_lock_as_it_was(overlay, host, interrupting):
    """This test breaks in a hundred times where the lock is given up for the wait: a wrong depth
    would come out as RuntimeError."""
    for attempt in range(100):
        image = mmcow.open(overlay, host=host, cache="none")
        try:
            interrupting(0.0003 + attempt * 0.00001)
            for _ in range(2000):
                image.read(0, 512)
        except KeyboardInterrupt:
            pass
        interrupting(0)
        taken: list[bool] = []
        helper = threading.Thread(
            target=lambda: taken.append(image.reactor.lock.acquire(timeout=5))
        )
        helper.start()
        helper.join()
        assert taken == [True]
        # The helper ended holding it; what close needs is a lock of its own.
        image.reactor.lock = threading.RLock()
        image.close()


@interrupts
def test_signal_with_a_handler_of_its_own_does_not_break_a_request(overlay, host):
    """This test interrupts system calls without an exception: requests go on."""
    count = 0

    def note(*_):
        nonlocal count
        count += 1

    before = signal.signal(signal.SIGALRM, note)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        with mmcow.open(overlay, write=True, host=host) as image:
            for i in range(100):
                image.write(i * 777, b"z" * 7000)
                assert image.read(i * 777, 7000) == b"z" * 7000
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert count


# ---- creating -------------------------------------------------------------------------------


def test_create_with_an_unknown_option_lists_the_known_ones(tmp_path):
    with pytest.raises(UsageError, match="cluster_size"):
        mmcow.create(tmp_path / "x", size=512, options={"clustersize": "4k"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [-1, 1 << 63])
def test_create_with_an_impossible_size_is_a_usage_error(tmp_path, size):
    with pytest.raises(UsageError):
        mmcow.create(tmp_path / "x", size=size)


def test_create_over_a_part_of_its_own_base_is_refused(overlay, base):
    before = base.read_bytes()
    for name in ("base.raw", "link"):
        if name == "link":
            os.link(base, base.with_name("link"))
        with pytest.raises(UsageError, match=r"own base|same file"):
            mmcow.create(base.with_name(name), backing="top.acow", backing_format="add-cow")
    assert base.read_bytes() == before


def test_create_without_opening_the_base_takes_the_size_of_an_adopted_data_file(tmp_path):
    (tmp_path / "x.raw").write_bytes(bytes(5000))
    made = mmcow.create(
        tmp_path / "x", backing="not-there", backing_format="raw", check_backing=False
    )
    assert made == 5120


def test_create_without_opening_the_base_needs_a_size_otherwise(tmp_path):
    with pytest.raises(UsageError, match="size"):
        mmcow.create(tmp_path / "x", backing="no", backing_format="raw", check_backing=False)
    with pytest.raises(UsageError, match="format"):
        mmcow.create(tmp_path / "x", size=512, backing="no", check_backing=False)


def test_create_over_a_missing_base_names_both(tmp_path):
    with pytest.raises(mmcow.MmcowError, match="missing"):
        mmcow.create(tmp_path / "x", backing="missing.raw", backing_format="raw")
    assert list(tmp_path.iterdir()) == []
    assert issubclass(ChainError, mmcow.MmcowError)
