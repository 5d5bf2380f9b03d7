# SPDX-License-Identifier: MIT
"""Every kind of storage under every format: file systems over 512 and 4096 byte sectors, and the
devices themselves, against a bytearray.

Loop devices stand for disks, so this runs as root. Both I/O queues, with and without O_DIRECT.
"""

from __future__ import annotations

import errno
import os
import random
from itertools import product
from typing import TYPE_CHECKING

import pytest

import mmcow
from mmcow.storage.linux import LinuxHost
from tests.interop.test_data_against_qemu import traffic
from tests.interop.tools import QemuIo, loop_device, mounted, requires, requires_fs, run, sha256

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.interop, pytest.mark.root]

SIZE = (3 << 20) + 512 * 5
STORAGE = [
    ("ext4", 512), ("ext4", 4096), ("xfs", 512), ("xfs", 4096), ("btrfs", 512), ("btrfs", 4096),
    ("tmpfs", 512),
]  # fmt: skip
FORMATS = {
    "raw": ("raw", {}),
    "v20-4k": ("add-cow", {"cluster_size": "4k"}),
    "v20-64k": ("add-cow", {"cluster_size": "64k"}),
    "v10": ("add-cow", {"compat": "v10"}),
    "v7": ("add-cow", {"compat": "v7"}),
    "cow": ("cow", {}),
    "uml3": ("cow", {"compat": "uml3"}),
}


@pytest.fixture(scope="module", params=STORAGE, ids=lambda p: f"{p[0]}-{p[1]}")
def storage(request, tmp_path_factory):
    """A folder on a fresh file system, and its sector size."""
    kind, sector = request.param
    requires_fs(kind)
    folder = tmp_path_factory.mktemp(kind)
    with mounted(kind, folder, sector=sector) as point:
        yield point, sector


@pytest.fixture(params=["io_uring", "threads"])
def backend(request):
    return request.param


def takes_direct(folder: Path) -> bool:
    probe = folder / "probe"
    probe.write_bytes(bytes(4096))
    try:
        os.close(os.open(probe, os.O_RDWR | os.O_DIRECT))
    except OSError:
        return False
    finally:
        probe.unlink()
    return True


MODES = list(product(("io_uring", "threads"), ("none", "writeback", "auto")))


def cases() -> list:
    """Format, queue and cache: all of them with MMCOW_STORAGE=all (``make storage``), else each
    format with two of the modes, so that all modes come up."""
    if os.environ.get("MMCOW_STORAGE") == "all":
        return [(name, *mode) for name in FORMATS for mode in MODES]
    return [
        (name, *MODES[(number + shift) % len(MODES)])
        for number, name in enumerate(FORMATS)
        for shift in (0, 4)
    ]


@pytest.mark.parametrize(("name", "backend", "cache"), cases())
def test_a_disk_on_a_file_system(storage, name, backend, cache, rng):
    point, _ = storage
    if cache == "none" and not takes_direct(point):
        pytest.skip("this file system refuses O_DIRECT: only auto and buffered modes")
    format_, options = FORMATS[name]
    host = LinuxHost(backend)
    folder = point / f"{name}-{backend}-{cache}"
    folder.mkdir()
    base = None
    model = bytearray(SIZE)
    if format_ != "raw":
        base = folder / "base"
        # uml3 knows no other size than its base's.
        content = rng.randbytes(SIZE if name == "uml3" else (2 << 20) + 1234)
        base.write_bytes(content)
        model[: len(content)] = content
        before = sha256(base)
    path = folder / "disk"
    mmcow.create(
        path, format=format_, size=SIZE, backing=base, backing_format=base and "raw",
        options=options, host=host,
    )  # fmt: skip
    try:
        for _ in range(3):
            with mmcow.open(path, format=format_, write=True, cache=cache, host=host) as image:
                # A cow's metadata and data may share a block of 4096: then it goes buffered.
                allowed = (cache, "writeback") if format_ == "cow" else (cache,)
                assert cache == "auto" or image.chain[0].cache in allowed
                traffic(image, model, rng, 50)
            with mmcow.open(path, format=format_, host=host) as image:
                assert image.size == len(model)
                assert image.read(0, image.size) == model
                result = image.reactor.run(image.layers[0].driver.check(""))
                assert not [f.text for f in result.findings if f.kind != "leak"]
        if base is not None:
            assert sha256(base) == before
    finally:
        for file in folder.iterdir():  # the file system is small
            file.unlink()


# ---- devices ----


@pytest.fixture(params=[512, 4096])
def device(request, tmp_path, rng):
    """A loop device full of garbage, which is not a multiple of any cluster."""
    requires("losetup", root=True)
    image = tmp_path / "device.img"
    image.write_bytes(rng.randbytes((3 << 20) + 4096 * 5))
    with loop_device(image, sector=request.param) as name:
        yield name


def content_of(device: str) -> bytes:
    run("blockdev", "--flushbufs", device)
    with open(device, "rb") as file:
        return file.read()


@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_a_device_as_a_raw_disk(device, backend, cache, rng):
    host = LinuxHost(backend)
    model = bytearray(content_of(device))
    for _ in range(2):
        with mmcow.open(device, format="raw", write=True, cache=cache, host=host) as image:
            assert image.size == len(model)
            traffic(image, model, rng, 60)
            with pytest.raises(mmcow.UsageError, match="device"):
                image.resize(image.size + 4096)
    assert content_of(device) == model


@pytest.mark.parametrize("cache", ["none", "writeback"])
@pytest.mark.parametrize("name", ["v20-4k", "v20-64k", "v10", "v7"])
def test_a_device_as_the_data_file_over_a_base(device, backend, cache, rng, tmp_path, name):
    """Its garbage never shows; its length is the disk's."""
    host = LinuxHost(backend)
    garbage = content_of(device)
    base = tmp_path / "base.raw"
    content = rng.randbytes((1 << 20) + 999)
    base.write_bytes(content)
    model = bytearray(content + bytes(len(garbage) - len(content)))
    path = tmp_path / "disk"
    options = FORMATS[name][1] | {"image_file": device}
    with pytest.raises(mmcow.UsageError, match="so the disk has"):
        mmcow.create(path, size=len(garbage) + 4096, backing=base, options=options, host=host)
    mmcow.create(path, backing=base, backing_format="raw", options=options, host=host)
    assert content_of(device) == garbage, "adoption changed the device"
    for _ in range(3):
        with mmcow.open(path, write=True, cache=cache, host=host) as image:
            assert image.size == len(garbage)
            assert image.read(0, image.size) == model
            traffic(image, model, rng, 40)
            for size in (image.size + 4096, image.size - 4096):
                with pytest.raises(mmcow.UsageError, match="device"):
                    image.resize(size, shrink=True)
    with mmcow.open(path, cache=cache, host=host) as image:
        assert image.read(0, image.size) == model
        stored = [s for s in image.block_status(layer=0) if s.kind == mmcow.Kind.DATA]
        assert all(s.path == device and s.host_offset == s.offset for s in stored)
    assert base.read_bytes() == content


def test_a_device_adopted_without_a_base_is_the_disk(device, backend, rng, tmp_path):
    host = LinuxHost(backend)
    model = bytearray(content_of(device))
    path = tmp_path / "disk"
    mmcow.create(path, options={"image_file": device}, host=host)
    with mmcow.open(path, write=True, host=host) as image:
        assert image.read(0, image.size) == model
        traffic(image, model, rng, 60)
    assert content_of(device) == model


def test_a_device_as_the_base(device, backend, rng, tmp_path):
    host = LinuxHost(backend)
    before = content_of(device)
    model = bytearray(before)
    path = tmp_path / "disk"
    mmcow.create(path, backing=device, backing_format="raw", host=host)
    with mmcow.open(path, write=True, host=host) as image:
        traffic(image, model, rng, 60)
    with mmcow.open(path, host=host) as image:
        assert image.read(0, image.size) == model
    assert content_of(device) == before


def test_a_device_is_locked_and_the_holder_named(device):
    requires("qemu-io", root=True)
    with QemuIo(device) as qemu, pytest.raises(mmcow.LockedError) as caught:
        mmcow.open(device, format="raw", write=True)
    assert caught.value.holders == (f"qemu-io, pid {qemu.pid}",)
    with mmcow.open(device, format="raw", write=True):
        ended = run("qemu-io", "-f", "raw", "-c", "read 0 512", device, ok=())
        assert ended.returncode != 0
        assert "lock" in ended.stderr


def test_two_nodes_of_one_device_are_the_same_file(device, tmp_path):
    """Image and base through different names of one device: a loop, whatever it is called."""
    facts = os.stat(device)
    node = tmp_path / "node"
    os.mknod(node, facts.st_mode, facts.st_rdev)
    with pytest.raises(mmcow.MmcowError) as caught:
        mmcow.create(
            tmp_path / "disk", backing=node, backing_format="raw", options={"image_file": device}
        )
    assert "same file" in str(caught.value)


@pytest.mark.parametrize("sector", [512, 4096])
def test_direct_io_alignment_is_the_device_s(tmp_path, sector, rng):
    requires("losetup", root=True)
    image = tmp_path / "device.img"
    image.write_bytes(bytes(1 << 20))
    with (
        loop_device(image, sector=sector) as device,
        mmcow.open(device, format="raw", write=True, cache="none") as disk,
    ):
        assert disk.layers[0].driver.data.handle.alignment.offset == sector
        model = bytearray(1 << 20)
        for _ in range(100):  # never aligned to 4096
            offset = rng.randrange((1 << 20) - 9000)
            data = random.Random(offset).randbytes(rng.randrange(1, 9000))
            disk.write(offset, data)
            model[offset : offset + len(data)] = data
        assert disk.read(0, 1 << 20) == model


def test_a_device_in_use_names_the_user(tmp_path):
    """O_EXCL refuses before any lock is looked at: who has it is found all the same."""
    requires("losetup", root=True)
    image = tmp_path / "device.img"
    image.write_bytes(bytes(1 << 20))
    with loop_device(image) as device:
        with mmcow.open(device, format="raw", write=True):
            with pytest.raises(mmcow.LockedError) as caught:
                mmcow.open(device, format="raw", write=True)
            assert f"pid {os.getpid()}" in str(caught.value)
            assert caught.value.errno == errno.EBUSY
        descriptor = os.open(device, os.O_RDWR | os.O_EXCL)  # of a program without QEMU's locks
        reader = os.open(device, os.O_RDONLY)
        try:
            with pytest.raises(mmcow.LockedError, match=f"pid {os.getpid()}"):
                mmcow.open(device, format="raw", write=True)
        finally:
            os.close(descriptor)
        mmcow.open(device, format="raw", write=True).close()  # a reader is in nobody's way
        os.close(reader)


def test_a_read_only_device_is_refused_at_opening(tmp_path):
    """The kernel lets it be opened for writing, and refuses the writes."""
    requires("losetup", root=True)
    image = tmp_path / "device.img"
    image.write_bytes(b"\5" * (1 << 20))
    with loop_device(image, read_only=True) as device:
        with pytest.raises(mmcow.StorageError) as caught:
            mmcow.open(device, format="raw", write=True)
        assert f"{device}: open for writing (the device is read-only)" in str(caught.value)
        assert caught.value.errno == errno.EACCES
        with mmcow.open(device, format="raw") as disk:
            assert disk.read(4096, 512) == b"\5" * 512


def test_a_mounted_device_names_the_mount_point(tmp_path):
    requires_fs("ext4")
    folder = tmp_path / "a folder"
    folder.mkdir()
    with mounted("ext4", folder) as point:
        device = os.stat(point).st_dev
        node = tmp_path / "node"
        os.mknod(node, 0o60600, device)
        with pytest.raises(mmcow.StorageError) as caught:
            mmcow.open(node, format="raw", write=True)
        assert not isinstance(caught.value, mmcow.LockedError)
        assert f"mounted on {point}" in str(caught.value)
