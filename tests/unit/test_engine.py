# SPDX-License-Identifier: MIT
"""Request algorithms: what is asked of the queue, in which order, and what an error leaves."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import mmcow
from mmcow import LayerFailed, StorageError, SyncFailed, UsageError
from mmcow.engine import engine as engine_module
from mmcow.engine import flush as flush_module
from mmcow.engine.gate import Claims, Gate
from mmcow.engine.hits import Hits
from mmcow.errors import MmcowError
from mmcow.formats.driver import Kind
from mmcow.storage.window import Window
from mmcow.tasks import Reactor
from tests.unit.spying import SpyHost

CLUSTER = 65536
SIZE = 8 * CLUSTER


@pytest.fixture(params=["io_uring", "threads"])
def host(request) -> SpyHost:
    return SpyHost(request.param)


@pytest.fixture
def base(tmp_path) -> bytes:
    content = os.urandom(SIZE)
    (tmp_path / "base.raw").write_bytes(content)
    return content


@pytest.fixture
def overlay(tmp_path, base) -> Path:
    path = tmp_path / "top.acow"
    (tmp_path / "top.acow.raw").write_bytes(b"\xee" * SIZE)  # garbage, adopted
    mmcow.create(path, backing="base.raw", backing_format="raw", options={"cluster_size": "64k"})
    return path


@pytest.fixture
def disk(overlay, host):
    with mmcow.open(overlay, write=True, host=host) as image:
        host.spy.log.clear()
        yield image
        host.spy.failures.clear()
        host.spy.release()


# ---- writes ---------------------------------------------------------------------------------


def test_write_of_whole_clusters_reads_nothing(disk, host):
    disk.write(CLUSTER, b"w" * (2 * CLUSTER))
    assert host.spy.count("read") == 0
    assert [entry[0] for entry in host.spy.log] == ["write"]


def test_first_write_into_a_cluster_goes_out_once_with_its_fills(disk, host, base):
    disk.write(CLUSTER + 1000, b"w" * 100)
    writes = [entry for entry in host.spy.log if entry[0] == "write"]
    assert [(e[2], e[3]) for e in writes] == [(CLUSTER, CLUSTER)]
    expected = bytearray(base)
    expected[CLUSTER + 1000 : CLUSTER + 1100] = b"w" * 100
    assert disk.read(0, SIZE) == expected


def test_second_write_into_a_cluster_is_plain(disk, host):
    disk.write(CLUSTER, b"w" * 512)
    host.spy.log.clear()
    disk.write(CLUSTER + 4096, b"v" * 4096)
    assert [entry[0] for entry in host.spy.log] == ["write"]


def test_concurrent_writes_into_one_new_cluster_fill_it_once(disk, host, base):
    """This test begins eight writes to one unallocated cluster: the others wait for the first."""
    expected = bytearray(base)
    with disk.reactor.lock:
        waits = []
        for i in range(8):
            data = bytes([i + 1]) * 4096
            waits.append(disk.engine.write(CLUSTER + i * 8192, memoryview(data)))
            expected[CLUSTER + i * 8192 : CLUSTER + i * 8192 + 4096] = data
        for wait in waits:
            disk.reactor.wait(wait)
    assert host.spy.count("write", ".raw") == 8
    assert host.spy.count("read", "base.raw") == 1
    assert disk.read(0, SIZE) == expected


def test_readers_see_the_old_content_until_a_first_write_is_done(disk, host, base):
    host.spy.hold = {"write"}
    with disk.reactor.lock:
        writing = disk.engine.write(CLUSTER, memoryview(b"n" * CLUSTER))
    assert disk.read(CLUSTER, 100) == base[CLUSTER : CLUSTER + 100]
    host.spy.release()
    disk.reactor.wait(writing)
    assert disk.read(CLUSTER, 100) == b"n" * 100


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_failed_first_write_leaves_the_old_content_and_is_not_sticky(disk, host, base, number):
    host.spy.failures[("write", ".raw")] = number
    with pytest.raises(StorageError) as caught:
        disk.write(CLUSTER + 5, b"n" * 10)
    assert caught.value.errno == number
    host.spy.failures.clear()
    assert disk.read(0, SIZE) == base
    disk.write(CLUSTER + 5, b"n" * 10)
    assert disk.read(CLUSTER + 5, 10) == b"n" * 10
    disk.flush()


def test_failed_fill_leaves_the_old_content(disk, host, base):
    host.spy.failures[("read", "base.raw")] = errno.EIO
    for change in (
        lambda: disk.write(CLUSTER + 5, b"n" * 10),
        lambda: disk.write_zeroes(CLUSTER + 5, 10),
    ):
        with pytest.raises(StorageError, match=r"base\.raw"):
            change()
    host.spy.failures.clear()
    assert disk.read(0, SIZE) == base


def test_error_of_one_of_several_writes_waits_for_the_others(disk, host):
    """This test fails one part of a request: nothing of it may still be in flight afterwards."""
    disk.write(0, bytes(SIZE))
    host.spy.failures[("write", ".raw")] = errno.EIO
    with pytest.raises(StorageError):
        disk.write(0, b"x" * SIZE)
    assert not disk._opener.queue.busy


# ---- zeroes ---------------------------------------------------------------------------------


def test_zeroes_over_new_clusters_never_show_the_garbage_below_them(disk, host):
    disk.write_zeroes(CLUSTER, 2 * CLUSTER)
    assert disk.read(CLUSTER, 2 * CLUSTER) == bytes(2 * CLUSTER)
    assert host.spy.count("write") == 0
    assert host.spy.count("fallocate") == 1


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV])
def test_zeroes_are_written_where_nothing_can_be_punched(disk, host, number):
    host.spy.failures[("fallocate", ".raw")] = number
    disk.write_zeroes(CLUSTER, CLUSTER)
    disk.write_zeroes(3 * CLUSTER, CLUSTER)
    assert disk.read(CLUSTER, CLUSTER) == bytes(CLUSTER)
    assert disk.read(3 * CLUSTER, CLUSTER) == bytes(CLUSTER)
    assert host.spy.count("fallocate") == 2, "punch and zero range, each refused once"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_failed_zeroes_leave_the_old_content(disk, host, base, number):
    host.spy.failures[("fallocate", ".raw")] = number
    with pytest.raises(StorageError):
        disk.write_zeroes(CLUSTER, CLUSTER)
    host.spy.failures.clear()
    assert disk.read(0, SIZE) == base


def test_zeroes_that_keep_their_space_do_not_punch(disk, overlay):
    disk.write_zeroes(0, SIZE, may_unmap=False)
    disk.flush()
    assert disk.read(0, SIZE) == bytes(SIZE)
    data = overlay.with_name("top.acow.raw")
    assert data.stat().st_blocks * 512 >= SIZE


def test_discard_of_a_cluster_does_not_show_the_base_again(disk, host):
    disk.write(CLUSTER, b"w" * CLUSTER)
    disk.discard(CLUSTER, CLUSTER)
    assert disk.read(CLUSTER, CLUSTER) == bytes(CLUSTER)
    host.spy.log.clear()
    disk.discard(4 * CLUSTER, CLUSTER)  # not in this layer: stays as it is
    assert host.spy.log == []


# ---- flush ----------------------------------------------------------------------------------


def test_flush_syncs_data_before_bits(disk, host):
    disk.write(0, b"x" * CLUSTER)
    host.spy.log.clear()
    disk.flush()
    assert [(op, Path(name).name) for op, name, _, _ in host.spy.log] == [
        ("datasync", "top.acow.raw"),
        ("write", "top.acow"),
        ("msync", "top.acow"),
    ]


def test_flush_of_nothing_does_nothing(disk, host):
    disk.flush()
    host.spy.log.clear()
    disk.flush()
    assert host.spy.log == []


def test_bit_published_during_the_data_sync_waits_for_the_next_flush(disk, host):
    disk.write(0, b"x" * CLUSTER)
    host.spy.hold = {"datasync"}
    with disk.reactor.lock:
        flushing = disk.reactor.spawn(disk.engine.flush())
    host.spy.hold = set()
    disk.write(4 * CLUSTER, b"y" * CLUSTER)
    host.spy.release()
    disk.reactor.wait(flushing)
    window = disk.engine.top.window
    assert window.dirty() == 512
    with open(disk.path, "rb") as file:
        file.seek(CLUSTER)
        assert file.read(1) == b"\x01"


def test_concurrent_flushes_share_a_run(disk, host):
    disk.write(0, b"x" * 512)
    host.spy.log.clear()
    host.spy.hold = {"datasync"}
    with disk.reactor.lock:
        flushes = [disk.reactor.spawn(disk.engine.flush()) for _ in range(10)]
        host.spy.release()
        for flush in flushes:
            disk.reactor.wait(flush)
    assert host.spy.count("datasync") == 1, "nothing was written after the first run began"


def test_flush_waits_for_an_exclusive_operation(disk, host):
    """This test asks for a flush in the middle of a resize: it would take the new bits along and
    break the order in which the resize makes its steps durable."""
    reactor, engine = disk.reactor, disk.engine
    reactor.run(engine.gate.close())
    engine.top.window.store(CLUSTER, b"\x01")
    host.spy.log.clear()
    with reactor.lock:
        flushing = reactor.spawn(engine.flush())
        reactor.poll()
    assert not flushing.done
    assert host.spy.log == []
    with reactor.lock:
        engine.gate.open()
    reactor.wait(flushing)
    assert host.spy.count("datasync") == 1


def test_flush_of_a_write_through_mode_is_a_part_of_its_request(overlay, host):
    with mmcow.open(overlay, write=True, host=host, cache="writethrough") as disk:
        engine = disk.engine
        inside = []
        flush = engine.flusher.flush

        async def watched():
            inside.append(engine.gate.inside)
            await flush()

        engine.flusher.flush = watched
        disk.write(0, b"x")
        disk.write_zeroes(CLUSTER, CLUSTER)
        assert inside == [1, 1]
        engine.flusher.flush = flush


@pytest.mark.parametrize("cache", ["writethrough", "directsync"])
def test_write_through_modes_are_durable_at_once(overlay, host, cache):
    with mmcow.open(overlay, write=True, host=host, cache=cache) as disk:
        host.spy.log.clear()
        disk.write(0, b"x" * CLUSTER)
        assert host.spy.count("datasync", ".raw") == 1
        assert host.spy.count("msync") == 1
        disk.write(0, b"y" * CLUSTER)
        assert host.spy.count("datasync", ".raw") == 2


def test_unsafe_mode_never_syncs(overlay, host):
    with mmcow.open(overlay, write=True, host=host, cache="unsafe") as disk:
        host.spy.log.clear()
        disk.write(0, b"x" * CLUSTER)
        disk.flush()
        assert host.spy.count("datasync") == host.spy.count("msync") == 0


def test_failed_data_sync_is_sticky(disk, host, base):
    disk.write(0, b"x" * CLUSTER)
    host.spy.failures[("datasync", ".raw")] = errno.EIO
    with pytest.raises(SyncFailed):
        disk.flush()
    host.spy.failures.clear()
    for change in (
        disk.flush,
        lambda: disk.write(0, b"x"),
        lambda: disk.write(4 * CLUSTER, b"x"),
        lambda: disk.write_zeroes(0, 1),
        lambda: disk.discard(0, 1),
        lambda: disk.resize(2 * SIZE),
    ):
        with pytest.raises(LayerFailed, match="earlier failure"):
            change()
    assert disk.read(CLUSTER, 100) == base[CLUSTER : CLUSTER + 100]
    assert disk.read(0, 3) == b"xxx"


def test_failed_barrier_is_sticky(disk, host):
    disk.write(0, b"x" * CLUSTER)
    host.spy.failures[("msync", "")] = errno.EIO
    with pytest.raises(SyncFailed):
        disk.flush()
    host.spy.failures.clear()
    with pytest.raises(LayerFailed):
        disk.flush()


def test_full_disk_while_bits_are_written_may_be_tried_again(disk, host, overlay, base):
    disk.write(0, b"x" * CLUSTER)
    host.spy.failures[("write", "top.acow")] = errno.ENOSPC
    for _ in range(2):
        with pytest.raises(StorageError) as caught:
            disk.flush()
        assert caught.value.errno == errno.ENOSPC
    host.spy.failures.clear()
    disk.flush()
    assert disk.engine.top.window.dirty() == 0


def test_failed_sync_of_an_odd_end_is_sticky(tmp_path, host):
    """This test writes the odd end of a file, which is synced at once: a flush that forgot that
    failure would lie."""
    path = tmp_path / "odd.raw"
    path.write_bytes(bytes(10_000))
    with mmcow.open(path, format="raw", write=True, host=host, cache="none") as disk:
        host.spy.failures[("datasync", "odd.raw")] = errno.EIO
        with pytest.raises(SyncFailed):
            disk.write(9_900, b"x" * 50)
        host.spy.failures.clear()
        with pytest.raises(LayerFailed):
            disk.flush()
        with pytest.raises(LayerFailed):
            disk.write(0, b"y" * 512)


def test_staged_metadata_is_bounded(overlay, host, monkeypatch):
    monkeypatch.setattr(engine_module, "STAGED_MOST", 0)
    with mmcow.open(overlay, write=True, host=host) as disk:
        host.spy.log.clear()
        disk.write(0, b"x" * CLUSTER)
        disk.read(0, CLUSTER)
        disk.reactor.run(disk.engine.gate.close())  # waits for the flush that began by itself
        with disk.reactor.lock:
            disk.engine.gate.open()
        assert disk.engine.top.window.dirty() == 0
        assert host.spy.count("msync") == 1


def test_memory_of_written_metadata_is_given_back(overlay, host, monkeypatch):
    """This test gives it back after every flush: changes stay, also those that came meanwhile.
    After a failed barrier nothing is given back, for the file may not have it."""
    monkeypatch.setattr(flush_module, "RELEASE_AFTER", 1)
    real, released = Window.release, []

    def release(window):
        released.append(window)
        real(window)

    monkeypatch.setattr(Window, "release", release)
    with mmcow.open(overlay, write=True, host=host) as disk:
        disk.write(0, b"x" * CLUSTER)
        host.spy.hold.add("msync")
        with disk.reactor.lock:
            flushing = disk.reactor.spawn(disk.engine.flush())
            while not host.spy.held:
                disk.reactor.poll()
            disk.write(2 * CLUSTER, b"y" * CLUSTER)
            host.spy.release()
            disk.reactor.wait(flushing)
        assert len(released) == 1
        assert disk.read(0, CLUSTER) == b"x" * CLUSTER
        assert disk.read(2 * CLUSTER, CLUSTER) == b"y" * CLUSTER
        disk.flush()
        assert len(released) == 2
        disk.write(4 * CLUSTER, b"z" * CLUSTER)
        host.spy.failures["msync", ""] = errno.EIO
        with pytest.raises(SyncFailed):
            disk.flush()
        assert len(released) == 2
        assert disk.read(4 * CLUSTER, CLUSTER) == b"z" * CLUSTER
        host.spy.failures.clear()
        with pytest.raises(LayerFailed):
            disk.flush()


# ---- the first sector of a disk nobody vouched for ------------------------------------------

MAGICS = {
    "add-cow v20": b"ACOW",
    "add-cow v7": b"ADD_COW\xff",
    "cow": b"OOOM",
    "cow, uml": b"MOOO",
    "qcow": b"QFI\xfb\0\0\0\x01",
    "qcow2": b"QFI\xfb\0\0\0\x03",
    "vhdx": b"vhdxfile",
    "vmdk": b"KDMV",
    "vmdk, old": b"COWD",
    "vmdk, text": b"# Disk DescriptorFile",
    "qed": b"QED\0",
    "vpc": b"conectix",
    "luks": b"LUKS\xba\xbe",
    "parallels": b"WithoutFreeSpace",
    "parallels, new": b"WithouFreSpacExt",
    "bochs": b"Bochs Virtual HD Image",
}
PLACES = [pytest.param(0, magic, id=name) for name, magic in MAGICS.items()]
PLACES.append(pytest.param(64, b"\x7f\x10\xda\xbe", id="vdi"))


@pytest.fixture(params=["none", "writeback"])
def plain(tmp_path, host, request):
    path = tmp_path / "plain"
    path.write_bytes(b"\x55" * 10_000)
    with mmcow.open(path, write=True, host=host, cache=request.param) as image:
        yield image


def is_still_raw(path: str) -> bool:
    with mmcow.open(path, share=True) as image:
        return image.format == "raw"


@pytest.mark.parametrize(("at", "magic"), PLACES)
def test_magic_into_the_first_sector_is_refused_whole(plain, at, magic):
    with pytest.raises(UsageError, match="first sector"):
        plain.write(at, magic)
    with pytest.raises(UsageError, match="first sector"):
        plain.write(0, (b"\x55" * at + magic).ljust(5000, b"x"))
    assert plain.read(0, 600) == b"\x55" * 600


@pytest.mark.parametrize(("at", "magic"), PLACES)
def test_magic_into_the_first_sector_is_refused_in_pieces(plain, at, magic):
    cut = 2
    plain.write(at, magic[:cut])
    with pytest.raises(UsageError, match="first sector"):
        plain.write(at + cut, magic[cut:])
    plain.write(at, b"\0" * cut)
    plain.write(at + cut, magic[cut:])
    with pytest.raises(UsageError, match="first sector"):
        plain.write(at, magic[:cut])
    plain.flush()
    assert is_still_raw(plain.path)


@pytest.mark.parametrize(("at", "magic"), PLACES)
def test_magic_into_the_first_sector_is_refused_in_concurrent_pieces(plain, at, magic):
    """This test begins the writes of all bytes of a magic at once: each alone is harmless."""
    with plain.reactor.lock:
        waits = [
            plain.engine.write(at + i, memoryview(magic[i : i + 1])) for i in range(len(magic))
        ]
        errors = 0
        for wait in waits:
            try:
                plain.reactor.wait(wait)
            except UsageError:
                errors += 1
    assert errors >= 1
    plain.flush()
    assert is_still_raw(plain.path)


def test_zeros_that_complete_a_magic_are_refused(plain):
    plain.write(0, b"QEDx")
    with pytest.raises(UsageError, match="first sector"):
        plain.write_zeroes(3, 1)
    with pytest.raises(UsageError, match="first sector"):
        plain.write_zeroes(3, 9000)
    assert plain.read(0, 5) == b"QEDxU"
    plain.write_zeroes(0, 9000)
    assert plain.read(0, 9000) == bytes(9000)


def test_first_sector_of_a_disk_that_was_said_to_be_raw_is_free(tmp_path, host):
    path = tmp_path / "said"
    path.write_bytes(bytes(4096))
    with mmcow.open(path, format="raw", write=True, host=host) as image:
        image.write(0, b"ACOW")
    with pytest.raises(MmcowError):
        mmcow.open(path)


def test_magic_behind_the_first_sector_is_nobodys_business(plain):
    plain.write(512, b"ACOW")
    plain.write(1, b"ACOW")
    plain.write(4096, b"QFI\xfb")
    assert plain.read(512, 4) == b"ACOW"


def test_other_writes_of_the_first_sector_work(plain, rng):
    model = bytearray(plain.read(0, 10_240))
    for _ in range(100):
        at = rng.randrange(700)
        data = rng.randbytes(rng.randrange(1, 3000))
        plain.write(at, data)
        model[at : at + len(data)] = data
    assert plain.read(0, 10_240) == model


# ---- size -----------------------------------------------------------------------------------


def test_growing_copies_up_the_partial_end_before_a_longer_base_could_show(tmp_path, host):
    base = os.urandom(3 * CLUSTER)
    (tmp_path / "base.raw").write_bytes(base)
    path = tmp_path / "t"
    mmcow.create(path, size=CLUSTER + 512, backing="base.raw", backing_format="raw")
    with mmcow.open(path, write=True, host=host) as disk:
        disk.resize(3 * CLUSTER)
        assert disk.read(0, CLUSTER + 512) == base[: CLUSTER + 512]
        assert not any(disk.read(CLUSTER + 512, 2 * CLUSTER - 512))
    with mmcow.open(path, host=host) as disk:
        assert not any(disk.read(CLUSTER + 512, 2 * CLUSTER - 512))


def test_resize_waits_for_requests_and_requests_for_it(disk, host):
    host.spy.hold = {"write"}
    reactor, engine = disk.reactor, disk.engine
    with reactor.lock:
        writing = engine.write(0, memoryview(b"x" * CLUSTER))
        resizing = reactor.spawn(engine.resize(SIZE + CLUSTER))
        reading = engine.read(0, memoryview(bytearray(10)))
        reactor.poll()
        assert not resizing.done
        assert not reading.done
        host.spy.release()
        reactor.wait(resizing)
        reactor.wait(reading)
        assert writing.done
    assert disk.size == SIZE + CLUSTER


def test_growing_without_the_base_is_refused(overlay, host):
    with mmcow.open(overlay, write=True, backing=False, host=host) as disk:
        with pytest.raises(UsageError, match="left out"):
            disk.resize(2 * SIZE)
        assert disk.size == SIZE


# ---- copy-up and giving up ------------------------------------------------------------------


def test_copy_up_brings_what_is_below_and_punches_zeros(tmp_path, host):
    content = bytearray(os.urandom(SIZE))
    content[2 * CLUSTER : 3 * CLUSTER] = bytes(CLUSTER)
    (tmp_path / "base.raw").write_bytes(content)
    path = tmp_path / "t"
    mmcow.create(path, backing="base.raw", backing_format="raw")
    with mmcow.open(path, write=True, host=host) as disk:
        disk.write(0, b"mine")
        content[:4] = b"mine"
        disk.reactor.run(disk.engine.copy_up(0, SIZE))
        assert disk.read(0, SIZE) == content
        kinds = {status.kind for status in disk.block_status(layer=0)}
        assert Kind.BELOW not in kinds
        disk.flush()
    (tmp_path / "base.raw").write_bytes(bytes(SIZE))
    with mmcow.open(path, host=host) as disk:
        assert disk.read(0, SIZE) == content


def test_give_up_shows_the_base_again_and_gives_the_space_back(disk, host, base, overlay):
    disk.write(CLUSTER, b"x" * CLUSTER)
    disk.flush()
    disk.reactor.run(disk.engine.give_up(0, SIZE))
    assert disk.read(0, SIZE) == base
    assert disk.engine.top.allocated() == 0


# ---- the gate and the claims ----------------------------------------------------------------


class IdleQueue:
    busy = False

    def submit(self):
        return

    def turn(self, wait):
        return []

    def deliver(self, finished):
        return


def test_claims_that_overlap_are_served_in_order():
    reactor, claims, order = Reactor(IdleQueue()), Claims(Hits()), []

    async def take(name, start, end):
        claim = await claims.take(start, end)
        order.append(name)
        return claim

    first = reactor.spawn(take("first", 0, 10))
    second = reactor.spawn(take("second", 5, 15))
    third = reactor.spawn(take("third", 14, 20))
    apart = reactor.spawn(take("apart", 30, 40))
    assert order == ["first", "apart"]
    claims.drop(first.result())
    reactor.wait(second)
    assert order == ["first", "apart", "second"]
    claims.drop(second.result())
    reactor.wait(third)
    claims.drop(third.result())
    claims.drop(apart.result())
    assert order[-1] == "third"


def test_gate_lets_one_in_alone_and_starves_nobody():
    reactor, gate, order = Reactor(IdleQueue()), Gate(Hits()), []

    async def enter(name):
        await gate.enter()
        order.append(name)

    async def close(name):
        await gate.close()
        order.append(name)

    reactor.spawn(enter("one"))
    alone = reactor.spawn(close("alone"))
    late = reactor.spawn(enter("late"))
    again = reactor.spawn(close("alone again"))
    assert gate.closed
    assert order == ["one"]
    gate.leave()
    reactor.wait(alone)
    assert order == ["one", "alone"]
    gate.open()
    reactor.wait(late)
    gate.leave()
    reactor.wait(again)
    gate.open()
    assert sorted(order) == ["alone", "alone again", "late", "one"]
    assert gate.inside == 0
