# SPDX-License-Identifier: MIT
"""Requests that C finishes by itself: which they are, that the engine's own way gives the same
answers, and that neither runs over the other.

What C does alone (holds, transfers in flight, forks) is in tests/c/test_path.c.
"""

from __future__ import annotations

import random
import threading
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import mmcow
from mmcow.errors import LayerFailed, ReadOnlyError, SyncFailed, UsageError
from mmcow.jobs.helper_load import HelperLoad
from mmcow.jobs.load import Load
from mmcow.jobs.snapshot import snapshot
from mmcow.jobs.stream import stream
from mmcow.native import aligned
from mmcow.storage.linux import LinuxHost, NativeView
from mmcow.storage.path import HOLD_ALL, READ, WRITE, NativePath
from mmcow.tasks import Reactor

if TYPE_CHECKING:
    from collections.abc import Iterator

KIB = 1 << 10
CLUSTER = 64 * KIB
# Of the disks: the last cluster is cut.
SIZE = 9 * CLUSTER + 20 * KIB
BASE_SIZE = 6 * CLUSTER
FORMATS = {
    "raw": ("raw", {}),
    "4k": ("add-cow", {"cluster_size": "4k"}),
    "64k": ("add-cow", {"cluster_size": "64k"}),
    "cow": ("cow", {"compat": "x86-64"}),
}


@pytest.fixture(params=["io_uring", "threads"])
def backend(request) -> str:
    return request.param


def content(length: int) -> bytes:
    return (bytes(range(1, 252)) * (length // 251 + 1))[:length]


def make_base(directory: Path, size: int = BASE_SIZE) -> Path:
    base = directory / "base.raw"
    base.write_bytes(content(size))
    return base


def make(directory: Path, kind: str, size: int = SIZE) -> Path:
    """A disk over a base that is shorter; raw: a file alone."""
    format_, options = FORMATS[kind]
    top = directory / "top"
    if kind == "raw":
        top.write_bytes(content(BASE_SIZE).ljust(size, b"\0"))
        return top
    make_base(directory)
    mmcow.create(
        top, format=format_, backing="base.raw", backing_format="raw", size=size, options=options
    )
    return top


def open_top(top: Path, kind: str = "64k", **options):
    options.setdefault("format", FORMATS[kind][0])
    if kind == "cow":
        options.setdefault("backing_format", "raw")
    return mmcow.open(top, **({"write": True, "host": LinuxHost(hits=True)} | options))


@pytest.fixture
def top(tmp_path) -> Path:
    return make(tmp_path, "64k")


def reads(image, offset: int, length: int) -> bool:
    """Whether a read is a hit."""
    return image.engine.hits.transfer(READ, offset, aligned(length))


def writes(image, offset: int, length: int) -> bool:
    """Whether a write of letters w is a hit."""
    buffer = aligned(length)
    buffer[:] = b"w" * length
    return image.engine.hits.transfer(WRITE, offset, buffer)


def own(image) -> int:
    """Clusters of the top layer."""
    return image.engine.top.allocated()


# ---- what is a hit ---------------------------------------------------------


def test_reads_that_are_hits(top):
    with open_top(top) as image:
        assert reads(image, 0, BASE_SIZE)
        assert reads(image, BASE_SIZE, SIZE - BASE_SIZE)  # zeros, past the end of the base
        assert reads(image, BASE_SIZE - 512, 4096)
        image.write(CLUSTER, b"x" * CLUSTER)
        assert reads(image, CLUSTER, CLUSTER)
        assert not reads(image, CLUSTER - 512, 1024)  # two files
        assert not reads(image, 0, 0)
        assert not reads(image, SIZE - 512, 1024)
        assert not reads(image, -512, 512)
        assert not reads(image, 1 << 63, 512)
        assert not reads(image, 1 << 70, 512)


def test_writes_that_are_hits(top):
    with open_top(top) as image:
        assert not writes(image, 0, 4096)  # the rest of the cluster has to be copied
        assert not writes(image, 4096, CLUSTER)
        assert own(image) == 0
        assert writes(image, 0, 2 * CLUSTER)
        assert own(image) == 2
        assert writes(image, 4096, 4096)  # there now
        assert not writes(image, CLUSTER + 4096, CLUSTER)
        assert writes(image, CLUSTER, 2 * CLUSTER)
        assert own(image) == 3
        last = 9 * CLUSTER
        assert not writes(image, last, SIZE - last - 512)
        assert writes(image, last, SIZE - last)  # whole as far as it exists
        assert own(image) == 4
        assert not writes(image, SIZE - 512, 1024)
        assert image.read(0, 3 * CLUSTER) == b"w" * 3 * CLUSTER
        assert image.read(3 * CLUSTER, CLUSTER) == content(BASE_SIZE)[3 * CLUSTER : 4 * CLUSTER]
    with open_top(top) as image:
        assert own(image) == 4
        assert image.read(last, SIZE - last) == b"w" * (SIZE - last)


def test_image_verbs_use_hits(top):
    """What is a hit never reaches the engine; everything else does."""
    with open_top(top) as image:
        calls = []
        read, write = image.engine.read, image.engine.write
        image.engine.read = lambda *a: calls.append("read") or read(*a)
        image.engine.write = lambda *a: calls.append("write") or write(*a)
        image.write(0, aligned(CLUSTER))
        image.read(0, CLUSTER)
        image.readinto(4096, aligned(4096))
        assert calls == []
        image.write(CLUSTER, aligned(512))
        image.read(0, 3 * CLUSTER)
        assert calls == ["write", "read"]


def test_direct_io_needs_alignment(tmp_path):
    top = make(tmp_path, "raw", SIZE + 100)
    with open_top(top, "raw", cache="none") as image:
        align = image.engine.top.data.handle.alignment.offset
        end = (SIZE + 100) // align * align
        assert writes(image, 0, align)
        assert not writes(image, align // 2, align)
        assert not writes(image, 0, align + align // 2)
        assert not image.engine.hits.transfer(READ, 0, aligned(align + 1)[1:])
        assert reads(image, end - align, align)
        # The odd end, which O_DIRECT must not touch.
        assert image.size > end
        assert not reads(image, image.size - 512, 512)
        assert not writes(image, image.size - 512, 512)
        image.write(image.size - 512, b"e" * 512)
        assert image.read(image.size - 512, 512) == b"e" * 512


@pytest.mark.parametrize("cache", ["writethrough", "directsync"])
def test_no_write_is_a_hit_where_each_is_durable(top, cache):
    with open_top(top, cache=cache) as image:
        assert not writes(image, 0, CLUSTER)
        assert reads(image, 0, CLUSTER)


def test_read_only(top):
    with open_top(top, write=False) as image:
        assert reads(image, 0, CLUSTER)
        assert not writes(image, 0, CLUSTER)
        with pytest.raises(ReadOnlyError):
            image.write(0, aligned(CLUSTER))


def test_first_sector_of_a_disk_taken_for_raw_is_looked_at(tmp_path):
    top = make(tmp_path, "raw")
    with open_top(top, "raw", format=None) as image:
        assert not writes(image, 0, 4096)
        assert writes(image, 512, 4096)
        magic = aligned(4096)
        magic[:4] = b"QFI\xfb"
        with pytest.raises(UsageError):
            image.write(0, magic)
    with open_top(top, "raw") as image:
        assert writes(image, 0, 4096)


def test_switched_off(top, monkeypatch):
    with open_top(top, host=LinuxHost(hits=False)) as image:
        assert image.engine.hits.path is None
        assert not reads(image, 0, CLUSTER)
    monkeypatch.setenv("MMCOW_HITS", "off")
    with open_top(top, host=LinuxHost()) as image:
        assert not writes(image, 0, CLUSTER)
        image.write(0, b"x" * CLUSTER)
        assert image.read(0, CLUSTER) == b"x" * CLUSTER


def test_chain_that_is_too_deep_has_none(tmp_path):
    make_base(tmp_path, CLUSTER)
    below, backing_format = "base.raw", "raw"
    for number in range(16):
        mmcow.create(
            tmp_path / f"{number}.acow", backing=below, backing_format=backing_format,
            options={"cluster_size": "4k"},
        )  # fmt: skip
        below, backing_format = f"{number}.acow", "add-cow"
        with open_top(tmp_path / below, write=False) as image:
            assert len(image.layers) == number + 2
            assert reads(image, 0, 4096) is (number < 15)
            assert image.read(0, CLUSTER) == content(CLUSTER)


def test_base_left_out(top):
    with open_top(top, backing=False) as image:
        assert reads(image, 0, CLUSTER)
        assert not writes(image, 0, 4096)
        assert writes(image, 0, CLUSTER)
        with pytest.raises(UsageError):
            image.write(CLUSTER, aligned(4096))


def test_after_a_failed_sync_no_write_is_a_hit(top):
    image = open_top(top)
    assert writes(image, 0, CLUSTER)
    image.engine.flusher.fail(SyncFailed(5, "fdatasync", "top.raw"))
    assert not writes(image, 0, CLUSTER)
    assert reads(image, 0, CLUSTER)
    with pytest.raises(LayerFailed):
        image.write(0, aligned(CLUSTER))
    image.close()


def test_table_follows_resize_stream_and_snapshot(top):
    with open_top(top) as image:
        image.resize(SIZE + CLUSTER)
        assert reads(image, SIZE, CLUSTER)
        image.resize(CLUSTER, shrink=True)
        assert not reads(image, CLUSTER, 512)
        assert not writes(image, CLUSTER, CLUSTER)
        image.resize(2 * CLUSTER)
        assert image.read(CLUSTER, CLUSTER) == bytes(CLUSTER)
        stream(image)
        assert len(image.layers) == 1
        assert writes(image, 0, 4096)  # every byte is this layer's
        snapshot(image, "frozen")
        assert own(image) == 0
        assert writes(image, CLUSTER, CLUSTER)
        assert own(image) == CLUSTER // image.engine.top.info.cluster_size
        assert reads(image, 0, CLUSTER)
        assert image.read(CLUSTER, CLUSTER) == b"w" * CLUSTER
    with open_top(top.with_name("frozen"), write=False) as image:
        assert image.read(0, 4096) == b"w" * 4096
        assert image.read(CLUSTER, CLUSTER) == bytes(CLUSTER)


# ---- the engine keeps them out where it works --------------------------------


@contextmanager
def pretending(image) -> Iterator[None]:
    """Let the path say that a transfer is in flight."""
    image.engine.hits.path.busy = lambda *_: True
    try:
        yield
    finally:
        del image.engine.hits.path.busy


@pytest.mark.parametrize(
    ("cache", "begin"),
    [
        ("writeback", lambda e: e.write(0, memoryview(b"part"))),
        ("writeback", lambda e: e.write_zeroes(CLUSTER, CLUSTER)),
        ("writeback", lambda e: e.discard(0, CLUSTER)),
        ("writeback", lambda e: e.reactor.spawn(e.copy_up(0, CLUSTER))),
        ("writeback", lambda e: e.reactor.spawn(e.resize(SIZE + 512))),
        ("writeback", lambda e: e.reactor.spawn(e.give_up(0, CLUSTER))),
        ("none", lambda e: e.write(8 * CLUSTER + 7, memoryview(b"read-modify-write"))),
    ],
    ids=["fill", "zero", "discard", "copy-up", "resize", "give-up", "block"],
)
def test_changes_wait_for_hits_in_flight(top, cache, begin):
    with open_top(top, cache=cache) as image:
        image.write(8 * CLUSTER, b"x" * CLUSTER)
        before = own(image), image.size
        with image.reactor.lock:
            with pretending(image):
                completion = begin(image.engine)
                image.reactor.poll()
                while image.opener.queue.busy:
                    image.reactor.poll()
                assert not completion.done
                assert (own(image), image.size) == before
            image.reactor.wait(completion)


def test_reads_plain_writes_and_flushes_do_not_wait(top):
    with open_top(top, cache="writeback") as image:
        image.write(0, b"x" * CLUSTER)
        with image.reactor.lock, pretending(image):
            for completion in (
                image.engine.read(0, aligned(SIZE)),
                image.engine.write(5, memoryview(b"mapped")),
                image.reactor.spawn(image.engine.flush()),
            ):
                image.reactor.wait(completion)


def test_who_waits_for_a_hit_does_not_sleep_in_the_queue():
    """The hit may be another thread's, of which the queue says nothing."""
    looks = []

    class Queue:
        busy = True

        def turn(self, wait):
            assert not wait
            return []

    reactor = Reactor(Queue())

    async def work():
        await reactor.watch(lambda: looks.append(1) or len(looks) > 3)
        return "done"

    assert reactor.run(work()) == "done"


# ---- durability ----------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_flush_syncs_what_hits_wrote(tmp_path, kind, monkeypatch):
    with open_top(make(tmp_path, kind), kind) as image:
        data, queue = image.engine.top.data, image.opener.queue
        synced = []
        datasync = queue.datasync
        monkeypatch.setattr(queue, "datasync", lambda h: synced.append(h) or datasync(h))
        image.flush()
        synced.clear()
        assert writes(image, CLUSTER, CLUSTER)
        image.flush()
        assert data.handle in synced
        synced.clear()
        assert reads(image, CLUSTER, CLUSTER)
        image.flush()
        assert synced == []
        assert writes(image, CLUSTER, CLUSTER)
        data.follow(None)  # as a snapshot leaves the old top
        assert data.unsynced


def test_a_flush_takes_one_copy_of_a_unit(tmp_path):
    """Another thread publishes while the copy is made: that is for the next flush. Two copies of
    one unit would be written side by side."""

    class Racing(NativeView):
        def dirty(self, offset, length):
            units = super().dirty(offset, length)
            if units and not raced:
                raced.append(units)
            elif len(raced) == 1:
                raced.append(0)
                self.bits_write(0, 5, 1, 1)
                units = super().dirty(offset, length)
            return units

    raced: list[int] = []
    path = tmp_path / "bits"
    path.write_bytes(bytes(1 << 20))
    host = LinuxHost()
    with closing(host.open(str(path), write=True, direct=False)) as handle:
        view = host.view(handle, 1 << 20, 1 << 20, 512, mapped=False)
        for bit in (0, 512 * 8 * 700):
            view.bits_write(0, bit, 1, 1)
        view.__class__ = Racing
        runs = view.snapshot(0, 1 << 20)
        assert raced == [2, 0]
        assert [start for start, _ in runs] == [0, 512 * 700]
        assert runs[0][1][0] == 1
        assert view.snapshot(0, 512)[0][1][0] == 1 | 1 << 5
        view.close()


def test_no_hit_after_the_last_flush(top):
    """A write that another thread begins while the image is being closed is refused, or durable."""
    image = open_top(top)
    image.reactor.run(image.engine.close())
    assert not writes(image, 0, CLUSTER)
    assert not reads(image, 0, CLUSTER)
    image.close()


def test_closing_collects_what_an_interrupt_left_in_the_queue(top, backend):
    image = open_top(top, host=LinuxHost(backend, hits=True))
    load = HelperLoad(image, Load(count=1 << 40, random=True, length=BASE_SIZE))
    load.SLICE_MS = 1
    for _ in range(1000):
        load.run()
        if image.engine.hits.path.busy(0, SIZE, HOLD_ALL):
            break
    else:
        pytest.fail("nothing was in flight")
    image.reactor.interrupted = KeyboardInterrupt()
    image.close()
    load.close()


def test_path_that_was_collected_answers(top):
    """Coroutines of a dropped image may be collected after its path."""
    with open_top(top) as image:
        path = NativePath(image.opener.queue._queue)
        path.__del__()
        path.fail()
        path.release(path.hold(0, 4096, HOLD_ALL))
        path.awaited(True)
        path.set(SIZE, (), 0)
        assert not path.busy(0, 4096, HOLD_ALL)
        assert not path.take_written()
        assert path.transfer(READ, 0, aligned(4096)) < 0


def test_relief_is_asked_for_again_and_again(top):
    with open_top(top) as image:
        hits = image.engine.hits
        for start in (3, 1, 0, -5):  # threads may count it past zero
            hits._until_relief = start
            answers = [hits.wants_relief() for _ in range(max(start, 1))]
            assert answers == [False] * (len(answers) - 1) + [True]
            assert not hits.wants_relief()


# ---- both ways give the same answers ---------------------------------------------


class Pair:
    """One disk with hits, one without, and what both must hold."""

    def __init__(self, with_hits, without, model: bytes) -> None:
        self.disks = (with_hits, without)
        self.model = bytearray(model)

    def do(self, verb: str, *arguments) -> list:
        return [getattr(disk, verb)(*arguments) for disk in self.disks]

    def write(self, offset: int, data: memoryview) -> None:
        self.do("write", offset, data)
        self.model[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int) -> None:
        self.do("write_zeroes", offset, length)
        self.model[offset : offset + length] = bytes(length)

    def discard(self, offset: int, length: int) -> None:
        self.do("discard", offset, length)
        found = self.check(0, len(self.model), known=False)
        outside = bytearray(found)
        outside[offset : offset + length] = self.model[offset : offset + length]
        assert outside == self.model
        self.model[:] = found

    def check(self, offset: int, length: int, known: bool = True) -> bytes:
        found, other = self.do("read", offset, length)
        assert found == other
        assert not known or found == self.model[offset : offset + length]
        return found

    def resize(self, size: int) -> None:
        for disk in self.disks:
            disk.resize(size, shrink=True)
        self.model = self.model[:size].ljust(size, b"\0")


def aligned_letters(rng: random.Random, length: int) -> memoryview:
    data = aligned(length)
    data[:] = rng.randbytes(length)
    return data


def drawn_range(rng: random.Random, size: int) -> tuple[int, int]:
    unit = rng.choice((1, 512, 4096, 4096, CLUSTER, CLUSTER))
    offset = rng.randrange(size // unit + 1) * unit
    length = rng.randrange(3 * CLUSTER // unit) * unit
    if rng.random() < 0.1:
        length = size - offset
    return offset, max(min(length, size - offset), 0)


def random_step(pair: Pair, rng: random.Random, *, resizes: bool) -> None:
    offset, length = drawn_range(rng, len(pair.model))
    draw = rng.random()
    if draw < 0.5:
        data = aligned_letters(rng, length)
        pair.write(offset, data if rng.random() < 0.8 else memoryview(bytes(data)))
    elif draw < 0.8:
        pair.check(offset, length)
    elif draw < 0.88:
        pair.zero(offset, length)
    elif draw < 0.94:
        pair.discard(offset, length)
    elif draw < 0.97 or not resizes:
        pair.do("flush")
    else:
        pair.resize(rng.randrange(CLUSTER // 512, SIZE // 256) * 512)


@pytest.mark.parametrize("cache", ["none", "writeback", "unsafe"])
@pytest.mark.parametrize("kind", FORMATS)
def test_same_with_and_without(tmp_path, kind, cache, rng):
    tops = []
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
        tops.append(make(tmp_path / name, kind))
    hosts = [LinuxHost(hits=True), LinuxHost(hits=False)]
    model = content(BASE_SIZE).ljust(SIZE, b"\0")
    for _ in range(3):
        with ExitStack() as stack:
            disks = [
                stack.enter_context(open_top(top, kind, cache=cache, host=host))
                for top, host in zip(tops, hosts, strict=True)
            ]
            pair = Pair(*disks, model)
            pair.check(0, len(model))
            for _ in range(60):
                random_step(pair, rng, resizes=kind != "cow")
            assert own(disks[0]) == own(disks[1])
            model = bytes(pair.model)


# ---- threads ----------------------------------------------------------------------

WRITERS = 3
BLOCK = 4 * KIB


class Writer(threading.Thread):
    """Writes and reads blocks that are its own: in the first half every third block, in the second
    every third cluster."""

    def __init__(self, image, number: int, seed: int, base: bytes) -> None:
        super().__init__()
        self.image, self.number = image, number
        self.rng = random.Random(seed)
        self.model = {
            at: base[at : at + BLOCK] for at in range(0, len(base), BLOCK) if self.owns(at)
        }
        self.over = threading.Event()
        self.error: BaseException | None = None

    def owns(self, at: int) -> bool:
        unit = BLOCK if at < 4 * CLUSTER else CLUSTER
        return at // unit % WRITERS == self.number

    def run(self) -> None:
        try:
            while not self.over.is_set():
                self.step()
        except BaseException as error:
            self.error = error
            raise

    def step(self) -> None:
        at = self.rng.choice(list(self.model))
        if self.rng.random() < 0.4:
            self.check(at)
            return
        length = BLOCK
        if at >= 4 * CLUSTER and self.rng.random() < 0.6:
            at, length = at // CLUSTER * CLUSTER, CLUSTER
        data = aligned_letters(self.rng, length)
        self.image.write(at, data)
        for start in range(at, at + length, BLOCK):
            self.model[start] = bytes(data[start - at : start - at + BLOCK])

    def check(self, at: int) -> None:
        buffer = aligned(BLOCK)
        self.image.readinto(at, buffer)
        assert buffer == self.model[at], f"block at {at}"


def disturb(image, rng: random.Random, steps: int) -> None:
    """What the engine does alone in its ranges, all over the disk, and changes no byte of it."""
    end = image.size // CLUSTER * CLUSTER
    for _ in range(steps):
        at = rng.randrange(end // CLUSTER) * CLUSTER
        draw = rng.random()
        if draw < 0.5:
            image.reactor.run(image.engine.copy_up(at, 2 * CLUSTER))
        elif draw < 0.7:
            image.flush()
        elif draw < 0.8:
            image.resize(image.size + 512)
        elif draw < 0.9:
            image.write_zeroes(end, image.size - end)
        else:
            image.write(end + 7, b"unaligned")


@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_threads_beside_everything_else(tmp_path, backend, cache, rng):
    size = 12 * CLUSTER
    for _ in range(4):
        directory = tmp_path / str(rng.random())
        directory.mkdir()
        top = make(directory, "64k", size + 512)
        base = content(BASE_SIZE).ljust(size, b"\0")
        with open_top(top, cache=cache, host=LinuxHost(backend, hits=True)) as image:
            writers = [Writer(image, n, rng.random(), base) for n in range(WRITERS)]
            for writer in writers:
                writer.start()
            try:
                disturb(image, rng, 60)
            finally:
                for writer in writers:
                    writer.over.set()
                    writer.join()
            assert [writer.error for writer in writers] == [None] * WRITERS
        with open_top(top, write=False) as image:
            for writer in writers:
                writer.image = image
                for at in writer.model:
                    writer.check(at)


def test_threads_that_flush_while_others_write(tmp_path, backend, rng):
    """After a thread's own flush its bits are in the file, though others are setting more."""
    top = make(tmp_path, "4k", 24 * CLUSTER)
    errors: list[BaseException] = []

    def work(image, number: int) -> None:
        try:
            for at in range(number * BLOCK, image.size, WRITERS * BLOCK):
                data = aligned(BLOCK)
                data[:] = bytes([number + 1]) * BLOCK
                image.write(at, data)
                if at // BLOCK % 8 == number:
                    image.flush()
                    bit = top.read_bytes()[bitmap + at // BLOCK // 8] >> at // BLOCK % 8 & 1
                    assert bit, f"bit of {at} was flushed"
        except BaseException as error:
            errors.append(error)
            raise

    with open_top(top, "4k", host=LinuxHost(backend, hits=True)) as image:
        bitmap = image.engine.top.table().bits
        threads = [threading.Thread(target=work, args=(image, n)) for n in range(WRITERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert own(image) == image.size // BLOCK
    with open_top(top, "4k", write=False) as image:
        for at in range(0, image.size, BLOCK):
            assert image.read(at, BLOCK) == bytes([at // BLOCK % WRITERS + 1]) * BLOCK
