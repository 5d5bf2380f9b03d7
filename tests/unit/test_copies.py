# SPDX-License-Identifier: MIT
"""Copying up of fragmented ranges: how many requests, what stays, what an error leaves."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

import mmcow
from mmcow.errors import StorageError
from mmcow.formats.driver import Kind
from mmcow.jobs import stream as stream_module
from mmcow.jobs.stream import missing, stream
from tests.unit.spying import SpyHost

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CLUSTER = 4096
CLUSTERS = 64
SIZE = CLUSTERS * CLUSTER


@pytest.fixture
def host() -> SpyHost:
    return SpyHost("threads")


def image_over(tmp_path: Path, base: bytes) -> Path:
    (tmp_path / "base.raw").write_bytes(base)
    path = tmp_path / "top.acow"
    (tmp_path / "top.acow.raw").write_bytes(b"\xee" * SIZE)  # garbage, adopted
    mmcow.create(path, backing="base.raw", backing_format="raw", options={"cluster_size": "4k"})
    return path


def write_clusters(disk: mmcow.Image, content: bytearray, numbers: range) -> None:
    for number in numbers:
        data = bytes([number + 1]) * CLUSTER
        disk.write(number * CLUSTER, data)
        content[number * CLUSTER : (number + 1) * CLUSTER] = data


@pytest.fixture
def content() -> bytearray:
    return bytearray(os.urandom(SIZE))


@pytest.fixture
def disk(tmp_path: Path, host: SpyHost, content: bytearray) -> Iterator[mmcow.Image]:
    """Every fourth cluster is the top layer's."""
    with mmcow.open(image_over(tmp_path, bytes(content)), write=True, host=host) as image:
        write_clusters(image, content, range(1, CLUSTERS, 4))
        host.spy.log.clear()
        yield image
        host.spy.failures.clear()
        host.spy.release()


def has_all(disk: mmcow.Image) -> bool:
    return all(status.kind is not Kind.BELOW for status in disk.block_status(layer=0))


def test_fragments_are_read_at_once_and_what_lies_between_is_not_written(disk, host, content):
    moved = disk.reactor.run(disk.engine.copy_up(0, SIZE))
    assert moved == 48 * CLUSTER
    assert host.spy.count("read", "base.raw") == 1
    written = sorted(entry[2:4] for entry in host.spy.log if entry[0] == "write")
    holes = [(0, CLUSTER), *((n * CLUSTER, 3 * CLUSTER) for n in range(2, 62, 4))]
    assert written == [*holes, (62 * CLUSTER, 2 * CLUSTER)]
    assert has_all(disk)
    assert disk.read(0, SIZE) == content


def test_few_fragments_far_apart_are_read_alone(tmp_path, host, content):
    with mmcow.open(image_over(tmp_path, bytes(content)), write=True, host=host) as disk:
        write_clusters(disk, content, range(1, CLUSTERS - 1))
        host.spy.log.clear()
        assert disk.reactor.run(disk.engine.copy_up(0, SIZE)) == 2 * CLUSTER
        read = sorted(entry[2:4] for entry in host.spy.log if entry[0] == "read")
        assert read == [(0, CLUSTER), (SIZE - CLUSTER, CLUSTER)]
        assert disk.read(0, SIZE) == content


def test_zeros_among_fragments_hide_the_garbage_of_the_data_file(tmp_path, host, content):
    content[8 * CLUSTER : 16 * CLUSTER] = bytes(8 * CLUSTER)
    with mmcow.open(image_over(tmp_path, bytes(content)), write=True, host=host) as disk:
        write_clusters(disk, content, range(1, CLUSTERS, 4))
        disk.reactor.run(disk.engine.copy_up(0, SIZE))
        assert has_all(disk)
        assert disk.read(0, SIZE) == content


def test_a_base_that_ends_among_the_fragments(tmp_path, host, content):
    short = 30 * CLUSTER + 512
    content[short:] = bytes(SIZE - short)
    with mmcow.open(image_over(tmp_path, bytes(content[:short])), write=True, host=host) as disk:
        write_clusters(disk, content, range(1, CLUSTERS, 4))
        disk.reactor.run(disk.engine.copy_up(0, SIZE))
        assert has_all(disk)
        assert disk.read(0, SIZE) == content


def test_guests_write_to_the_clusters_between_while_fragments_are_copied(disk, host, content):
    host.spy.hold = {"read"}
    with disk.reactor.lock:
        copying = disk.reactor.spawn(disk.engine.copy_up(0, SIZE))
        mine = disk.engine.write(CLUSTER, memoryview(b"g" * CLUSTER))
        waiting = disk.engine.write(2 * CLUSTER, memoryview(b"h" * CLUSTER))
        disk.reactor.poll()
    disk.reactor.wait(mine)  # its cluster is there: it does not wait
    assert not waiting.done  # this one's is being copied
    host.spy.hold = set()
    host.spy.release()
    disk.reactor.wait(copying)
    disk.reactor.wait(waiting)
    content[CLUSTER : 3 * CLUSTER] = b"g" * CLUSTER + b"h" * CLUSTER
    assert disk.read(0, SIZE) == content


@pytest.mark.parametrize("what", ["read", "write"])
def test_an_error_leaves_what_was_read_before(disk, host, content, what):
    host.spy.failures[(what, "base.raw" if what == "read" else ".acow.raw")] = errno.EIO
    with pytest.raises(StorageError):
        disk.reactor.run(disk.engine.copy_up(0, SIZE))
    host.spy.failures.clear()
    assert disk.engine.gate.inside == 0
    assert disk.read(0, SIZE) == content
    assert not has_all(disk)
    assert stream(disk) > 0
    assert disk.read(0, SIZE) == content


def test_the_fragments_of_a_piece_are_one_range(disk, monkeypatch):
    monkeypatch.setattr(stream_module, "PIECE", 16 * CLUSTER)
    step = 16 * CLUSTER
    assert list(missing(disk)) == [(start, step) for start in range(0, SIZE, step)]


def test_ranges_begin_and_end_with_what_is_missing(tmp_path, host, content, monkeypatch):
    monkeypatch.setattr(stream_module, "PIECE", 16 * CLUSTER)
    with mmcow.open(image_over(tmp_path, bytes(content)), write=True, host=host) as disk:
        have = [range(3), range(10, 14), range(20, 40), range(63, 64)]
        for numbers in have:
            write_clusters(disk, content, numbers)
        assert list(missing(disk)) == [
            (3 * CLUSTER, 13 * CLUSTER),
            (16 * CLUSTER, 4 * CLUSTER),
            (40 * CLUSTER, 8 * CLUSTER),
            (48 * CLUSTER, 15 * CLUSTER),
        ]


def test_holes_below_are_not_read(tmp_path, host, content):
    path = image_over(tmp_path, bytes(content))
    os.truncate(tmp_path / "base.raw", 8 * CLUSTER)
    os.truncate(tmp_path / "base.raw", SIZE)
    content[8 * CLUSTER :] = bytes(SIZE - 8 * CLUSTER)
    with mmcow.open(path, write=True, host=host) as disk:
        write_clusters(disk, content, range(1, CLUSTERS, 4))
        host.spy.log.clear()
        assert disk.reactor.run(disk.engine.copy_up(0, SIZE)) == 6 * CLUSTER
        read = [entry[2:4] for entry in host.spy.log if entry[0] == "read"]
        assert sum(length for _, length in read) == 6 * CLUSTER
        assert disk.read(0, SIZE) == content


def test_zeros_and_data_are_not_one_range(tmp_path, host, content):
    base = bytearray(content)
    path = image_over(tmp_path, bytes(base))
    os.truncate(tmp_path / "base.raw", 8 * CLUSTER)
    os.truncate(tmp_path / "base.raw", SIZE)  # a hole from the eighth cluster on
    with mmcow.open(path, write=True, host=host) as disk:
        assert list(missing(disk)) == [(0, 8 * CLUSTER), (8 * CLUSTER, SIZE - 8 * CLUSTER)]
