# SPDX-License-Identifier: MIT
"""Snapshots of an open image: nothing is lost, the served name is the top, a failure changes
nothing."""

from __future__ import annotations

import errno
import os
import threading

import pytest

import mmcow
from mmcow.jobs.snapshot import snapshot
from mmcow.storage.linux import LinuxHost

SIZE = 1 << 20


@pytest.fixture
def disk(tmp_path):
    base = tmp_path / "base.raw"
    base.write_bytes(os.urandom(SIZE))
    path = tmp_path / "vm.acow"
    mmcow.create(path, backing="base.raw", backing_format="raw")
    return path


def content(path, **options):
    with mmcow.open(path, **options) as image:
        return image.read(0, image.size)


@pytest.mark.parametrize("top", ["add-cow", "raw"])
def test_snapshot_keeps_content_and_separates_later_writes(tmp_path, disk, top):
    path = disk if top == "add-cow" else tmp_path / "base.raw"
    with mmcow.open(path, format=top, write=True) as image:
        image.write(1000, b"before")
        before = image.read(0, SIZE)
        frozen = snapshot(image, "frozen")
        assert image.read(0, SIZE) == before
        image.write(1000, b"after!")
        assert image.chain[0].path == str(path)
        assert image.chain[1].path == frozen == str(tmp_path / "frozen")
        after = image.read(0, SIZE)
    assert content(path) == after
    assert content(frozen, format=top) == before


def test_snapshot_covers_what_was_not_flushed(disk, tmp_path):
    with mmcow.open(disk, write=True) as image:
        image.write(0, b"x" * 70000)
        snapshot(image, "frozen")
        image.flush()
        # Read as after a crash: nothing of this process's memory, only the files.
        shared = content(disk, share=True)
    assert shared[:70000] == b"x" * 70000


def test_snapshot_chain_of_many(disk, rng):
    model = bytearray(content(disk))
    with mmcow.open(disk, write=True) as image:
        for number in range(8):
            for _ in range(5):
                offset = rng.randrange(SIZE - 5000)
                data = rng.randbytes(rng.randrange(1, 5000))
                image.write(offset, data)
                model[offset : offset + len(data)] = data
            snapshot(image, f"s{number}")
            assert image.read(0, SIZE) == model
        assert len(image.chain) == 10
    assert content(disk) == model


def test_snapshot_while_threads_write(disk):
    stop = threading.Event()
    counts = [0] * 4

    def write(image, number):
        while not stop.is_set():
            counts[number] += 1
            image.write(number * 4096, counts[number].to_bytes(8, "little"))

    with mmcow.open(disk, write=True) as image:
        threads = [threading.Thread(target=write, args=(image, n)) for n in range(4)]
        for thread in threads:
            thread.start()
        for number in range(5):
            snapshot(image, f"s{number}")
        stop.set()
        for thread in threads:
            thread.join()
        for number, count in enumerate(counts):
            assert int.from_bytes(image.read(number * 4096, 8), "little") == count


def test_snapshot_frozen_layer_is_locked_as_a_base(disk, tmp_path):
    with mmcow.open(disk, write=True) as image:
        frozen = snapshot(image, "frozen")
        with pytest.raises(mmcow.LockedError):
            mmcow.open(frozen, write=True)
        assert content(frozen) == content(disk, share=True)


@pytest.mark.parametrize("name", ["", "sub/frozen", "/elsewhere/frozen", "vm.acow"])
def test_snapshot_refuses_name(disk, name):
    with mmcow.open(disk, write=True) as image, pytest.raises(mmcow.UsageError):
        snapshot(image, name)


def test_snapshot_refuses_taken_name_and_read_only(disk, tmp_path):
    (tmp_path / "taken").write_bytes(b"mine")
    files = sorted(os.listdir(tmp_path))
    with mmcow.open(disk, write=True) as image:
        with pytest.raises(mmcow.StorageError) as caught:
            snapshot(image, "taken")
        assert caught.value.errno == errno.EEXIST
    with mmcow.open(disk) as image, pytest.raises(mmcow.ReadOnlyError):
        snapshot(image, "frozen")
    assert (tmp_path / "taken").read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == files


def test_snapshot_refuses_a_name_that_leads_elsewhere_now(disk, tmp_path):
    """This test renames the open image and puts another under its name: that one is not ours to
    freeze, and what was written must not lose its name to it."""
    other = tmp_path / "other.acow"
    mmcow.create(other, size=SIZE)
    with mmcow.open(disk, write=True) as image:
        image.write(0, b"mine")
        disk.rename(tmp_path / "moved.acow")
        other.rename(disk)
        before = sorted(os.listdir(tmp_path))
        with pytest.raises(mmcow.UsageError, match="another file now"):
            snapshot(image, "frozen")
        assert sorted(os.listdir(tmp_path)) == before
    assert content(disk) == bytes(SIZE)


class _FailingHost(LinuxHost):
    """Fails the n-th call of one method, once."""

    def __init__(self, method: str, after: int) -> None:
        super().__init__()
        self.method, self.left = method, after

    def __getattribute__(self, name):
        if name == object.__getattribute__(self, "__dict__").get("method"):
            self.left -= 1
            if self.left == 0:
                raise mmcow.StorageError(errno.ENOSPC, name, "planted")
        return super().__getattribute__(name)


@pytest.mark.parametrize(
    ("method", "after"),
    [("create", 1), ("create", 2), ("link", 1), ("link", 2), ("rename", 1), ("rename", 2),
     ("sync_directory", 1), ("sync_directory", 2), ("sync_directory", 3)],
)  # fmt: skip
def test_snapshot_failing_before_the_pivot_changes_nothing(disk, tmp_path, method, after):
    host = _FailingHost("", 0)
    with mmcow.open(disk, write=True, host=host) as image:
        image.write(5, b"kept")
        host.method, host.left = method, after
        files = sorted(os.listdir(tmp_path))
        with pytest.raises(mmcow.StorageError):
            snapshot(image, "frozen")
        host.method = ""
        assert sorted(os.listdir(tmp_path)) == files
        image.write(6, b"EP")
        assert image.read(5, 4) == b"kEPt"
        image.flush()
    assert content(disk)[5:9] == b"kEPt"


@pytest.mark.parametrize(("method", "after"), [("create", 1), ("link", 1), ("rename", 2)])
def test_snapshot_that_fails_leaves_the_data_file_it_was_given(disk, tmp_path, method, after):
    mine = tmp_path / "mine.raw"
    mine.write_bytes(b"m" * SIZE)
    host = _FailingHost("", 0)
    with mmcow.open(disk, write=True, host=host) as image:
        host.method, host.left = method, after
        files = sorted(os.listdir(tmp_path))
        with pytest.raises(mmcow.StorageError):
            snapshot(image, "frozen", data_file="mine.raw")
        host.method = ""
        assert sorted(os.listdir(tmp_path)) == files
        assert mine.read_bytes() == b"m" * SIZE
        snapshot(image, "frozen", data_file="mine.raw")
        assert image.chain[0].data_file == str(mine)


def test_snapshot_directory_sync_failing_after_the_pivot_is_sticky(disk):
    host = _FailingHost("", 0)
    with mmcow.open(disk, write=True, host=host) as image:
        host.method, host.left = "sync_directory", 4
        with pytest.raises(mmcow.StorageError):
            snapshot(image, "frozen")
        host.method = ""
        with pytest.raises(mmcow.LayerFailed):
            image.write(0, b"x")
        assert len(image.read(0, 512)) == 512


def test_snapshot_interrupted_after_the_second_name_can_be_repeated(disk, tmp_path):
    """A cut between the second name and the pivot leaves the frozen name on the served layer."""
    os.link(disk, tmp_path / "frozen")
    with mmcow.open(disk, write=True) as image:
        image.write(0, b"old")
        snapshot(image, "frozen")
        image.write(0, b"new")
    assert content(tmp_path / "frozen")[:3] == b"old"
    assert content(disk)[:3] == b"new"
