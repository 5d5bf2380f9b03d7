# SPDX-License-Identifier: MIT
"""A real file system that fills up, and is given room again.

The small file system is mounted over a loop device, as root. Whatever runs out of room says so with
ENOSPC and the file's name, what was flushed is intact, nothing is half-done, and the same open
image goes on once there is room.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

import mmcow
from mmcow.errors import LayerFailed, StorageError
from tests.interop import failing
from tests.interop.tools import fs_kind, mounted, requires_fs, sha256

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.fault, pytest.mark.root]

SIZE = 8 << 20
CLUSTER = 64 << 10
FILE_SYSTEMS = ("ext4", "xfs", "btrfs")


class Filler(failing.Filler):
    """One that can take the last byte, too."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.more = folder / "filler-more"

    def fill(self, leave: int = 0) -> None:
        super().fill(leave)
        if not leave:
            self._fill_rest()

    def _fill_rest(self) -> None:
        """What allocation in blocks does not reach: small files until nothing goes any more."""
        with suppress(OSError), self.more.open("wb") as file:
            for _ in range(1 << 12):
                file.write(os.urandom(4096))
                file.flush()
        with suppress(OSError):
            os.sync()

    def free(self) -> None:
        super().free()
        self.more.unlink(missing_ok=True)
        os.sync()


@pytest.fixture(params=FILE_SYSTEMS)
def small(request, tmp_path):
    requires_fs(request.param)
    with mounted(request.param, tmp_path) as point:
        yield point


@pytest.fixture
def base(tmp_path, rng):
    path = tmp_path / "base.raw"
    path.write_bytes(rng.randbytes(SIZE))
    yield path
    assert path.stat().st_size == SIZE


def is_full(error: BaseException) -> bool:
    return isinstance(error, StorageError) and error.errno == errno.ENOSPC


def write_until_full(image, model: bytearray, rng, order: list[int]) -> tuple[int, StorageError]:
    """Write whole and part clusters in this order; returns which one failed and how."""
    for n, cluster in enumerate(order):
        start = rng.randrange(0, CLUSTER // 2, 512)
        data = rng.randbytes(rng.randrange(512, CLUSTER - start, 512))
        try:
            image.write(cluster * CLUSTER + start, data)
        except StorageError as error:
            return n, error
        model[cluster * CLUSTER + start : cluster * CLUSTER + start + len(data)] = data
    raise AssertionError("the file system never filled up")


@pytest.mark.parametrize("cache", ["none", "writeback"])
@pytest.mark.parametrize("kind", ["add-cow", "cow"])
def test_data_runs_out_of_room(small, base, rng, kind, cache):
    before = sha256(base)
    path = small / "disk"
    options = {"cluster_size": str(CLUSTER)} if kind == "add-cow" else {}
    mmcow.create(path, format=kind, backing=str(base), backing_format="raw", options=options)
    model = bytearray(base.read_bytes())
    filler = Filler(small)
    order = list(range(SIZE // CLUSTER))
    rng.shuffle(order)
    with mmcow.open(path, write=True, cache=cache, base_cache="auto") as image:
        data_path = image.chain[0].data_file
        for cluster in order[:8]:  # before it is tight
            model[cluster * CLUSTER : (cluster + 1) * CLUSTER] = data = rng.randbytes(CLUSTER)
            image.write(cluster * CLUSTER, data)
        image.flush()
        filler.fill(leave=1 << 20)
        failed, error = write_until_full(image, model, rng, order[8:])
        assert is_full(error)
        assert error.path == data_path
        assert str(data_path) in str(error)
        assert image.read(0, SIZE) == model, "a write that failed is visible"
        failed += 8
        broken = False
        try:
            image.flush()
        except mmcow.SyncFailed:
            broken = True  # said so for good; what was flushed before is what counts
            assert fs_kind(small) == "btrfs", "only btrfs needs room to make room durable"
        except StorageError as second:
            assert is_full(second)
        assert image.read(0, SIZE) == model
        filler.free()
        if broken:
            with suppress(LayerFailed):
                image.close()
        else:
            for cluster in order[failed:]:
                data = rng.randbytes(CLUSTER)
                image.write(cluster * CLUSTER, data)
                model[cluster * CLUSTER : (cluster + 1) * CLUSTER] = data
            image.flush()
    with mmcow.open(path) as image:
        for cluster in order[:8] if broken else order:
            start = cluster * CLUSTER
            assert image.read(start, CLUSTER) == model[start : start + CLUSTER]
        check_clean(image)
    assert sha256(base) == before


def check_clean(image) -> None:
    result = image.reactor.run(image.layers[0].driver.check(""))
    assert not [f.text for f in result.findings if f.kind != "leak"]


def test_the_bitmap_file_cannot_be_made(small, base, tmp_path):
    filler = Filler(small)
    filler.fill()
    path = small / "disk"
    data = tmp_path / "disk.data"
    with pytest.raises(StorageError) as caught:
        # 16 MiB of ones: a disk without base
        mmcow.create(
            path, size=64 << 30, options={"image_file": str(data), "cluster_size": "4k"}
        )  # fmt: skip
    assert is_full(caught.value)
    assert "disk" in os.path.basename(caught.value.path)
    assert os.path.dirname(caught.value.path) == str(small)
    assert sorted(p.name for p in small.iterdir() if "disk" in p.name) == []
    assert not data.exists(), "a data file was left behind"
    filler.free()
    mmcow.create(path, backing=str(base), backing_format="raw", options={"image_file": str(data)})
    with mmcow.open(path) as image:
        assert image.read(0, SIZE) == base.read_bytes()


def test_a_failed_create_leaves_the_old_image(small, base, rng, tmp_path):
    path = small / "disk"
    options = {"image_file": str(tmp_path / "disk.data"), "cluster_size": "4k"}
    mmcow.create(path, backing=str(base), backing_format="raw", options=options)
    with mmcow.open(path, write=True) as image:
        image.write(0, b"\xee" * 4096)
    before = path.read_bytes()
    filler = Filler(small)
    filler.fill()
    with pytest.raises(StorageError) as caught:
        mmcow.create(path, size=64 << 30, options={"image_file": str(tmp_path / "other")} | {
            "cluster_size": "4k"
        })  # fmt: skip
    assert is_full(caught.value)
    filler.free()
    assert path.read_bytes() == before
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("preallocation", ["falloc", "full"])
def test_a_raw_disk_that_does_not_fit_is_not_made(small, preallocation):
    with pytest.raises(StorageError) as caught:
        mmcow.create(
            small / "disk", format="raw", size=2 << 30, options={"preallocation": preallocation}
        )
    assert is_full(caught.value)
    assert not [p for p in small.iterdir() if "disk" in p.name]


def bitmap_on(small: Path, base: Path, tmp_path: Path, size: int) -> Path:
    """An image whose bitmap (4 MiB, sparse) is on the small file system, its data elsewhere."""
    path = small / "disk"
    mmcow.create(
        path, size=size, backing=str(base), backing_format="raw",
        options={"image_file": str(tmp_path / "disk.data"), "cluster_size": "4k"},
    )  # fmt: skip
    return path


def test_the_bitmap_runs_out_of_room(small, base, rng, tmp_path):
    """Bits lie in holes of the bitmap file, as others make it: a flush has to find blocks."""
    size = 128 << 30
    path = bitmap_on(small, base, tmp_path, size)
    length = path.stat().st_size
    os.truncate(path, 4096)  # the header; create itself reserves the rest
    os.truncate(path, length)
    filler = Filler(small)
    with mmcow.open(path, write=True, cache="none") as image:
        image.write(0, b"\x11" * 4096)
        image.flush()
        filler.fill()
        written = {}
        for step in range(300):  # each sets a bit in another block of the bitmap
            offset = step * (size // 300) // 4096 * 4096
            written[offset] = rng.randbytes(4096)
            image.write(offset, written[offset])
        with pytest.raises(StorageError) as caught:
            image.flush()
        assert is_full(caught.value)
        assert caught.value.path == str(path)
        sticky = isinstance(caught.value, mmcow.SyncFailed)
        assert not sticky or fs_kind(small) == "btrfs"
        for offset, data in written.items():
            assert image.read(offset, 4096) == data
        filler.free()
        if sticky:  # said so for good; the flushed state is what counts
            with suppress(LayerFailed):
                image.close()
            with mmcow.open(path) as again:
                assert again.read(0, 4096) in (b"\x11" * 4096, written[0])
            return
        image.flush()
    with mmcow.open(path) as image:
        for offset, data in written.items():
            assert image.read(offset, 4096) == data
        check_clean(image)


def test_growing_the_bitmap_runs_out_of_room(small, base, rng, tmp_path):
    path = bitmap_on(small, base, tmp_path, SIZE)
    data_file = tmp_path / "disk.data"
    filler = Filler(small)
    with mmcow.open(path, write=True) as image:
        image.write(4096, b"\x22" * 8192)
        image.flush()
        length = path.stat().st_size
        filler.fill()
        for _ in range(2):
            with pytest.raises(StorageError) as caught:
                image.resize(1 << 40)  # 32 MiB of bitmap
            assert is_full(caught.value)
            assert caught.value.path == str(path)
            assert image.size == SIZE
            assert data_file.stat().st_size == SIZE
            assert path.stat().st_size == length
        assert image.read(4096, 8192) == b"\x22" * 8192
        filler.free()
        image.resize(1 << 36)
        assert image.size == 1 << 36
        image.write((1 << 36) - 4096, b"\x33" * 4096)
    with mmcow.open(path) as image:
        assert image.size == 1 << 36
        assert image.read(0, 4096) == base.read_bytes()[:4096]
        assert image.read(4096, 8192) == b"\x22" * 8192
        assert image.read(SIZE, 65536) == bytes(65536)
        assert image.read((1 << 36) - 4096, 4096) == b"\x33" * 4096
        check_clean(image)


@pytest.mark.parametrize("cache", ["none", "writeback", "directsync"])
def test_a_raw_disk_runs_out_of_room(small, rng, cache):
    path = small / "disk.raw"
    mmcow.create(path, format="raw", size=SIZE)
    filler = Filler(small)
    model = bytearray(SIZE)
    with mmcow.open(path, format="raw", write=True, cache=cache) as image:
        image.write(0, b"\x44" * 65536)
        model[:65536] = b"\x44" * 65536
        image.flush()
        filler.fill(leave=1 << 20)
        full = []
        for start in range(65536, SIZE, 65536):
            try:
                image.write(start, b"\x55" * 65536)
                model[start : start + 65536] = b"\x55" * 65536
            except StorageError as error:
                full.append((start, error))
        assert full
        assert all(is_full(error) and error.path == str(path) for _, error in full)
        image.flush()
        assert image.read(0, 65536) == b"\x44" * 65536
        filler.free()
        for start, _ in full:
            image.write(start, b"\x66" * 65536)
            model[start : start + 65536] = b"\x66" * 65536
    assert path.read_bytes() == model
