# SPDX-License-Identifier: MIT
"""raw disks: files and devices, sizes, creation."""

from __future__ import annotations

import errno
import os

import pytest

from mmcow.errors import LockedError, StorageError, UsageError
from mmcow.formats.driver import Extent, Kind
from mmcow.formats.guard import Guard
from mmcow.formats.opening import Access
from mmcow.formats.raw import RawFormat
from mmcow.storage.file import Cache
from tests.sim.faults import Fault
from tests.sim.host import SimHost
from tests.unit.addcow_support import MIB, Rig, request, survivors

WRITER = Access(write=True, top=True, share=False, cache=Cache.WRITEBACK)
READER = WRITER._replace(write=False)


@pytest.fixture
def rig():
    made = Rig()
    yield made
    made.close()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "disk.raw")


def opened(rig, path, access=WRITER):
    driver = Guard(RawFormat().open(rig.opener, path, access))
    rig.opened.append(driver)
    return driver


def create(rig, path, size=None, backing=None, **options):
    return RawFormat().create(rig.opener, path, request(size, backing, **options))


def device(size=64 * 512):
    host = SimHost()
    host.put("/sim/dev", b"d" * size, kind="block")
    return host


@pytest.mark.parametrize(("length", "size"), [(0, 0), (1, 512), (512, 512), (100_000, 100_352)])
def test_open_size_is_the_length_rounded_up(rig, path, length, size):
    with open(path, "wb") as file:
        file.write(b"x" * length)
    driver = opened(rig, path)
    assert driver.info.size == size
    assert not driver.info.can_allocate
    assert (driver.backing, driver.stage(), driver.window) == (None, None, None)
    assert driver.allocated() == size // 512
    if size:
        assert driver.map(0, size) == [Extent(0, size, Kind.DATA, 0)]
    assert rig.run(driver.check("")).findings == ()
    assert os.path.getsize(path) == length


def test_open_locks_out_a_second_writer_but_not_readers_of_a_reader(rig, path):
    create(rig, path, MIB)
    first = opened(rig, path, READER)
    opened(rig, path, READER)
    with pytest.raises(LockedError):
        opened(rig, path)
    first.close()


def test_recognises_nothing():
    assert not RawFormat().recognises(b"\0" * 4096)


def test_inspect_tells_the_size(rig, path):
    create(rig, path, MIB)
    handle = rig.host.open(path, write=False, direct=False)
    assert RawFormat().inspect(path, handle).size == MIB
    handle.close()


# ---- resize ----


@pytest.mark.parametrize("size", [0, 512, 3 * MIB])
def test_resize_sets_the_length(rig, path, size):
    create(rig, path, MIB)
    driver = opened(rig, path)
    rig.run(driver.resize(size, 0))
    assert os.path.getsize(path) == driver.info.size == size


def test_resize_cut_anywhere_keeps_what_remains(rng):
    host = SimHost(1)
    host.put("/sim/raw", b"d" * 4096)
    rig = Rig(host)
    driver = opened(rig, "/sim/raw")
    for machine in survivors(host, rng, lambda: rig.run(driver.resize(8192, 0))):
        assert machine.content("/sim/raw") in (b"d" * 4096, (b"d" * 4096).ljust(8192, b"\0"))


def test_resize_failing_keeps_the_size(rig):
    host = SimHost(1)
    host.put("/sim/raw", b"d" * 4096)
    driver = opened(Rig(host), "/sim/raw")
    host.faults = [Fault(0, errno.EFBIG, kind="truncate")]
    with pytest.raises(StorageError):
        rig.run(driver.resize(1 << 60, 0))
    assert driver.info.size == 4096


def test_resize_of_a_device_is_refused():
    rig = Rig(device())
    driver = opened(rig, "/sim/dev")
    with pytest.raises(UsageError, match="is a block device of 32768 bytes"):
        rig.run(driver.resize(512, 0))
    rig.run(driver.resize(64 * 512, 0))


# ---- creation ----


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
def test_create(rig, path, preallocation):
    assert create(rig, path, 3 * MIB - 100, preallocation=preallocation) == 3 * MIB
    with open(path, "rb") as file:
        assert file.read() == bytes(3 * MIB)
    blocks = os.stat(path).st_blocks * 512
    assert blocks == 0 if preallocation == "off" else blocks >= 3 * MIB
    assert os.listdir(os.path.dirname(path)) == ["disk.raw"]


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
def test_create_size_zero(rig, path, preallocation):
    assert create(rig, path, 0, preallocation=preallocation) == 0


def test_create_replaces_a_file_that_nobody_uses(rig, path):
    create(rig, path, MIB)
    create(rig, path, 2 * MIB)
    assert os.path.getsize(path) == 2 * MIB
    driver = opened(rig, path)
    with pytest.raises(LockedError):
        create(rig, path, MIB)
    assert driver.data.refresh_size() == 2 * MIB


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"size": None}, "size of a raw disk must be given"),
        ({"size": MIB, "preallocation": "metadata"}, "must be one of off, falloc, full"),
        ({"size": MIB, "backing": "base"}, "cannot record a backing file"),
    ],
)
def test_create_refuses(rig, path, arguments, text):
    with pytest.raises(UsageError, match=text):
        create(rig, path, **arguments)
    assert not os.path.exists(path)


def test_create_on_a_device_uses_it_as_it_is():
    host = device()
    rig = Rig(host)
    assert create(rig, "/sim/dev") == create(rig, "/sim/dev", 512) == 64 * 512
    for arguments in ({"size": 65 * 512}, {"preallocation": "full"}):
        with pytest.raises(UsageError, match="device"):
            create(rig, "/sim/dev", **arguments)
    assert host.content("/sim/dev") == b"d" * 64 * 512


def test_create_cut_anywhere_leaves_the_old_or_the_new(rng):
    host = SimHost(1)
    host.put("/sim/raw", b"d" * 512)
    rig = Rig(host)
    for machine in survivors(host, rng, lambda: create(rig, "/sim/raw", 8192), each=6):
        assert machine.content("/sim/raw") in (b"d" * 512, bytes(8192))
