# SPDX-License-Identifier: MIT
"""The ten defects of the driver that QEMU never merged, as a guest would have met them.

Numbers and places: docs/formats/add-cow.md. Each test runs through the whole image, not the driver
alone.
"""

from __future__ import annotations

import os
from random import Random

import pytest

import mmcow
from mmcow.errors import CorruptError, FormatError, StorageError, UsageError
from mmcow.image import open_image
from tests.sim.faults import Fault
from tests.sim.host import SimHost
from tests.unit.addcow_support import KIB, survivors, v7, v10, v20

C = 4 * KIB
TOP = "/sim/top"
BASE = bytes(range(1, 252)) * 400  # 100,400 bytes, no zero in it


@pytest.fixture
def top(tmp_path):
    (tmp_path / "base.raw").write_bytes(BASE)
    return str(tmp_path / "top")


def overlay(top, size, **options):
    options = {"cluster_size": "64k"} | options
    mmcow.create(top, size=size, backing="base.raw", backing_format="raw", options=options)
    return mmcow.open(top, write=True)


def sim(bitmap, *, size=16 * C, base=BASE, header=None):
    host = SimHost(1)
    host.put("/sim/disk.raw", b"\xee" * size)
    host.put("/sim/base.raw", base)
    host.put(TOP, (header or v20(bits=12)) + bitmap.ljust(C, b"\0"))
    return host


def test_defect_1_no_bit_is_durable_before_its_data():
    """QEMU evicted dirty bitmap tables without flushing the image first."""
    host = sim(b"")
    image = open_image(TOP, write=True, host=host)

    def change():
        for cluster in range(16):
            image.write(cluster * C, b"w" * C)
        image.flush()

    for machine in survivors(host, Random(1), change, each=1):
        with open_image(TOP, host=machine) as again:
            shown = again.read(0, 16 * C)
        for start in range(0, 16 * C, 512):
            part = shown[start : start + 512]
            assert part in (b"w" * 512, BASE[start : start + 512]), "garbage of the data file"
    image.close()


@pytest.mark.parametrize("header", [v20(bits=12, backing=b""), v10(backing=b""), v7(backing=b"")])
def test_defect_2_no_base_and_no_bit_reads_zeros(header):
    """QEMU filled a stale vector instead of the guest's buffer."""
    with open_image(TOP, host=sim(b"", header=header)) as image:
        assert image.read(0, 16 * C) == bytes(16 * C)


@pytest.mark.parametrize("length", [100_400, 512, 1000, 1])
def test_defect_3_a_shorter_base_is_padded_with_zeros(tmp_path, top, length):
    """QEMU zeroed the tail and then read the whole length from the base all the same."""
    (tmp_path / "base.raw").write_bytes(BASE[:length])
    with overlay(top, 200_192) as image:
        assert image.read(0, 200_192) == BASE[:length].ljust(200_192, b"\0")


@pytest.mark.parametrize("size", [65536 + 512, 131072 + 65536 - 512, 100_352])
@pytest.mark.parametrize("length", [65536, 65536 + 100, 100_400])
def test_defect_4_copy_up_stops_at_both_ends(tmp_path, top, size, length):
    """QEMU's head and tail copies went past the end of image and base."""
    (tmp_path / "base.raw").write_bytes(BASE[:length])
    expected = bytearray(BASE[:length].ljust(size, b"\0")[:size])
    with overlay(top, size) as image:
        image.write(size - 300, b"w" * 200)
        expected[-300:-100] = b"w" * 200
        assert image.read(0, size) == expected
    assert os.path.getsize(tmp_path / "top.raw") == size
    with mmcow.open(top) as image:
        assert image.read(0, size) == expected


def test_defect_5_an_unreadable_bitmap_is_an_error(tmp_path):
    """QEMU turned a negative errno into "allocated"."""
    path = tmp_path / "top"
    path.write_bytes(v7(bitmap=bytes(1 << 20)))
    (tmp_path / "base.raw").write_bytes(BASE)
    with open(tmp_path / "disk.raw", "wb") as file:
        file.truncate(512 << 23)
    image = mmcow.open(path)
    os.truncate(path, 2560)
    with pytest.raises((CorruptError, StorageError), match="top"):
        image.read(512 << 22, 512)
    image.close()


def test_defect_6_base_equal_to_image_is_an_error():
    """QEMU returned a positive errno, which its callers took for success."""
    host = sim(b"", header=v20(bits=12, backing=b"disk.raw"))
    with pytest.raises(CorruptError, match="equals the backing file's name"):
        open_image(TOP, host=host)


def test_defect_7_names_outside_the_header_are_errors():
    """QEMU never compared the names' offsets and sizes with the header's size."""
    for at in ((4096, 8), (4090, 100), (0xFFFFFFF0, 0x20), (75, 4)):
        with pytest.raises(FormatError, match="_filename_"):
            open_image(TOP, host=sim(b"", header=v20(bits=12, image_at=at)))


def test_defect_8_creation_never_changes_an_existing_data_file(tmp_path, top):
    """QEMU truncated it to the requested size, which qemu-img took from the base."""
    (tmp_path / "top.raw").write_bytes(b"d" * 200_000)
    image = overlay(top, None)
    assert image.size == 200_192
    image.close()
    assert (tmp_path / "top.raw").read_bytes() == b"d" * 200_000
    with pytest.raises(UsageError, match="200000 bytes"):
        overlay(top, 4096)


def test_defect_9_a_reader_that_ignores_the_flag_sees_the_same_disk(tmp_path, top):
    """QEMU left the bitmap of an all-allocated image as it was, yet the flag may be ignored."""
    mmcow.create(top, size=200_192)
    with mmcow.open(top, write=True) as image:
        image.write(0, BASE)
        image.resize(400_384)
        shown = image.read(0, 400_384)
    content = bytearray((tmp_path / "top").read_bytes())
    assert content[32] == 1
    content[32] = 0
    (tmp_path / "top").write_bytes(content)
    with mmcow.open(top) as image:
        assert image.read(0, 400_384) == shown


@pytest.mark.parametrize("seed", range(20))
def test_defect_10_two_writes_into_one_cluster_both_survive(seed):
    """QEMU compared sectors, so two copy-ups of one cluster did not see each other."""
    host = SimHost(seed)
    host.put("/sim/disk.raw", b"\xee" * 65536)
    host.put("/sim/base.raw", BASE)
    host.put(TOP, v20(bits=16, bitmap=bytes(65536)))
    image = open_image(TOP, write=True, host=host)
    expected = bytearray(BASE[:65536])
    writes = []
    for number in range(8):
        data = bytes([200 + number]) * 1024
        offset = number * 7168
        expected[offset : offset + 1024] = data
        writes.append(image.engine.write(offset, memoryview(data)))
    for write in writes:
        image.reactor.wait(write)
    image.flush()
    assert image.read(0, 65536) == expected
    image.close()


def test_defect_fault_in_copy_up_publishes_nothing():
    """A write that fails half-way must leave what was read before."""
    host = sim(b"")
    image = open_image(TOP, write=True, host=host)
    host.faults = [Fault(0, kind="write", path="/sim/disk.raw")]
    with pytest.raises(StorageError):
        image.write(100, b"w" * 512)
    host.faults = []
    assert image.read(0, C) == BASE[:C]
    image.close()
