# SPDX-License-Identifier: MIT
"""Storage that fails for real: a device that loses what was written to it, files cut under us.

The device is a loop device over a sparse file on a file system without room: what the page cache
took for it fails when it is written back. The kernel tells that once, to one sync.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

import mmcow
from mmcow.errors import LayerFailed, SyncFailed
from tests.fault.writer import Writer, errors
from tests.interop.tools import loop_device, mounted, requires_fs

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fault.writer import Log

pytestmark = pytest.mark.fault

SIZE = 16 << 20


@pytest.fixture
def failing(tmp_path):
    """A device of 16 MiB and a function that gives it room again."""
    requires_fs("tmpfs")
    with mounted("tmpfs", tmp_path, size=4 << 20) as point:
        image = point / "device.img"
        with image.open("wb") as file:
            file.truncate(SIZE)
        filler = point / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with loop_device(image) as device:
            yield device, lambda: filler.unlink(missing_ok=True)


@pytest.mark.root
def test_a_failed_sync_is_not_forgotten(failing):
    device, make_room = failing
    image = mmcow.open(device, format="raw", write=True, cache="writeback")
    image.write(0, b"\x55" * 65536)
    with pytest.raises(SyncFailed) as caught:
        image.flush()
    assert caught.value.path == device
    assert caught.value.errno in (errno.EIO, errno.ENOSPC)
    make_room()
    for change in (
        image.flush,
        lambda: image.write(0, b"\x66" * 512),
        lambda: image.write_zeroes(0, 512),
        lambda: image.discard(0, 4096),
    ):
        with pytest.raises(LayerFailed) as again:
            change()
        assert device in str(again.value)
        assert isinstance(again.value.__cause__, SyncFailed)
    image.read(0, 65536)  # reading goes on
    with suppress(LayerFailed):
        image.close()
    with mmcow.open(device, format="raw", write=True, cache="writeback") as image:
        image.write(0, b"\x77" * 65536)
        image.flush()
        assert image.read(0, 65536) == b"\x77" * 65536


@pytest.mark.root
def test_bits_of_data_that_was_lost_are_not_written(failing, tmp_path):
    """The data file's sync fails: the base shows again after reopening, never garbage."""
    device, make_room = failing
    base = tmp_path / "base.raw"
    base.write_bytes(os.urandom(SIZE))
    path = tmp_path / "disk"
    mmcow.create(path, backing="base.raw", backing_format="raw", options={"image_file": device})
    image = mmcow.open(path, write=True, cache="writeback")
    image.write(1 << 20, b"\x55" * (1 << 20))
    with pytest.raises(SyncFailed) as caught:
        image.flush()
    assert caught.value.path == device
    with pytest.raises(LayerFailed):
        image.flush()
    assert image.read(1 << 20, 4096) == b"\x55" * 4096
    with suppress(LayerFailed):
        image.close()
    make_room()
    with mmcow.open(path, write=True) as image:
        assert image.read(0, SIZE) == base.read_bytes()
        image.write(1 << 20, b"\x66" * (1 << 20))
        image.flush()
    with mmcow.open(path) as image:
        assert image.read(1 << 20, 1 << 20) == b"\x66" * (1 << 20)


@pytest.mark.root
@pytest.mark.parametrize("backend", ["io_uring", "threads"])
def test_a_direct_write_that_fails_names_device_and_place(failing, monkeypatch, backend):
    device, make_room = failing
    monkeypatch.setenv("MMCOW_QUEUE", backend)
    with mmcow.open(device, format="raw", write=True, cache="none") as image:
        # The loop device answers from its own cache first, so the sync may be what fails.
        with pytest.raises(mmcow.StorageError) as caught:
            fill(image)
        assert caught.value.path == device
        assert caught.value.errno in (errno.EIO, errno.ENOSPC)
        make_room()
        if isinstance(caught.value, SyncFailed):
            pytest.skip("this kernel tells at the sync")
        image.write(0, b"\x66" * 4096)
        image.flush()
        assert image.read(0, 4096) == b"\x66" * 4096


def fill(image: mmcow.Image) -> None:
    for offset in range(0, SIZE, 1 << 20):
        image.write(offset, b"\x55" * (1 << 20))
    image.flush()


# ---- files that are cut while they are open ----


def in_a_child(work) -> None:
    """Run ``work`` where a signal would kill nobody else; it must end well."""

    def logged(log: Log) -> None:
        work()

    writer = Writer(logged)
    status = writer.wait()
    assert not errors(writer.lines), errors(writer.lines)[0]
    assert status == 0, f"ended with status {status} (a signal: {os.WIFSIGNALED(status)})"


@pytest.fixture
def overlay(tmp_path):
    base = tmp_path / "base.raw"
    with base.open("wb") as file:
        file.truncate(8 << 30)
    path = tmp_path / "disk"
    mmcow.create(
        path, backing="base.raw", backing_format="raw", options={"cluster_size": "4k"}
    )  # 256 KiB of bitmap
    return path


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("length", [0, 4096, 4097, 40_000])
def test_a_bitmap_file_cut_under_a_reader(overlay: Path, write, length):
    """No SIGBUS: an error that names the file, or the old bits if they were in memory."""

    def work() -> None:
        image = mmcow.open(overlay, write=write)
        image.read(0, 4096)
        os.truncate(overlay, length)
        failures = 0
        for offset in range(0, 8 << 30, 128 << 20):
            try:
                assert image.read(offset, 4096) == bytes(4096)
            except (mmcow.CorruptError, mmcow.StorageError) as error:
                failures += 1
                assert str(overlay) in str(error)
        assert failures
        with suppress(mmcow.MmcowError):
            image.close()

    in_a_child(work)


def test_a_bitmap_file_cut_under_a_writer(overlay: Path):
    def work() -> None:
        image = mmcow.open(overlay, write=True)
        image.write(0, b"\x11" * 4096)
        size = overlay.stat().st_size
        os.truncate(overlay, 4096)
        with pytest.raises((SyncFailed, mmcow.CorruptError), match="truncated") as caught:
            image.flush()
        assert caught.value.path == str(overlay)
        os.truncate(overlay, size)  # zeros where bits were: nobody may take that for a success
        for change in (image.flush, lambda: image.write(4096, b"\x22" * 4096)):
            with pytest.raises(LayerFailed):
                change()
        with suppress(mmcow.MmcowError):
            image.close()

    in_a_child(work)
