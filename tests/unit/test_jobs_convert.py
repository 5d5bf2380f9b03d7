# SPDX-License-Identifier: MIT
"""convert and compare over chains of every format, against bytearrays."""

from __future__ import annotations

import os
import random

import pytest

import mmcow
from mmcow.jobs import copying
from mmcow.jobs import progress as progress_module
from mmcow.jobs.compare import compare
from mmcow.jobs.convert import convert
from tests.unit.jobs_helpers import KIB, MIB, Chain, Stop, check_content, scribble, stop_at

ODD = 3 * MIB + 5 * 512
CHAINS = {
    "raw": [("raw", ODD, {})],
    "raw-odd-end": [("raw", ODD + 100, {})],
    "add-cow-alone": [("add-cow", ODD, {})],
    "add-cow": [("raw", 2 * MIB + 100, {}), ("add-cow", ODD, {"cluster_size": "4k"})],
    "add-cow-shorter": [("raw", 4 * MIB, {}), ("add-cow", ODD, {})],
    "cow": [("raw", 2 * MIB, {}), ("cow", ODD, {})],
    "three": [
        ("raw", 2 * MIB, {}),
        ("add-cow", 1 * MIB + 512, {"cluster_size": "4k"}),
        ("cow", ODD, {}),
    ],
    "cow-below": [
        ("raw", 2 * MIB, {}),
        ("cow", ODD, {}),
        ("add-cow", 4 * MIB, {"cluster_size": "128k"}),
    ],
}
TARGETS = {
    "raw": ("raw", {}),
    "add-cow": ("add-cow", {"cluster_size": "64k"}),
    "cow": ("cow", {}),
}


def make_target(path, format_, size, options, base=None):
    mmcow.create(
        str(path),
        format=format_,
        size=size,
        options=options,
        backing=base,
        backing_format="raw" if base else None,
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", CHAINS)
def test_convert_into_a_new_target(tmp_path, source, target):
    chain = Chain(tmp_path / "source", CHAINS[source], seed=hash_of(source))
    format_, options = TARGETS[target]
    path = tmp_path / "target"
    make_target(path, format_, len(chain.models[-1]), options)
    seen = stop_at(-1)
    with chain.open() as one, mmcow.open(path, format=format_, write=True) as other:
        moved = convert(one, other, target_is_zero=True, progress=seen)
        assert 0 < moved <= one.size
    assert seen.seen[0][0] == 0
    assert seen.seen[-1][0] == seen.seen[-1][1]
    with mmcow.open(path, format=format_) as disk:
        assert disk.read(0, disk.size) == bytes(chain.models[-1])


def hash_of(text):
    return sum(text.encode())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("extra", [0, 512, 2 * MIB + 512])
def test_convert_over_old_content_larger_than_the_source(tmp_path, target, extra):
    chain = Chain(tmp_path / "source", CHAINS["three"], seed=7 + extra)
    format_, options = TARGETS[target]
    size = len(chain.models[-1]) + extra
    rng = random.Random(extra)
    base = None
    if format_ != "raw":
        base = str(tmp_path / "base")
        with open(base, "wb") as file:
            file.write(b"\1" + rng.randbytes(size // 2))
    path = tmp_path / "target"
    make_target(path, format_, size, options, base)
    with chain.open() as one, mmcow.open(path, format=format_, write=True) as other:
        scribble(rng, other, bytearray(size), 30)
        convert(one, other)
    with mmcow.open(path, format=format_) as disk:
        assert disk.read(0, disk.size) == bytes(chain.models[-1]) + bytes(extra)


def test_convert_stays_sparse(tmp_path):
    """This test wants holes kept, and blocks of zeros inside data turned into holes."""
    source, target = tmp_path / "source", tmp_path / "target"
    with open(source, "wb") as file:
        file.truncate(64 * MIB)
        file.seek(10 * MIB)
        file.write(b"x" * 4096 + bytes(1 * MIB) + b"y" * 4096)
    make_target(target, "raw", 64 * MIB, {})
    with (
        mmcow.open(source, format="raw") as one,
        mmcow.open(target, format="raw", write=True) as other,
    ):
        assert convert(one, other, target_is_zero=True) == 8192
    assert os.stat(target).st_blocks * 512 <= 64 * KIB


def test_convert_refuses(tmp_path):
    chain = Chain(tmp_path / "source", CHAINS["raw"], seed=1)
    make_target(tmp_path / "small", "raw", 4096, {})
    with chain.open() as one, mmcow.open(tmp_path / "small", format="raw", write=True) as other:
        with pytest.raises(mmcow.UsageError, match="resize the target first"):
            convert(one, other)
        with pytest.raises(mmcow.UsageError, match="itself"):
            convert(one, one)
    with (
        chain.open() as one,
        mmcow.open(tmp_path / "small", format="raw") as other,
        pytest.raises(mmcow.ReadOnlyError),
    ):
        convert(one, other)


def test_convert_stopped_anywhere_leaves_images_usable(tmp_path, monkeypatch):
    monkeypatch.setattr(progress_module, "_STEP_LEAST", 1)
    monkeypatch.setattr(copying, "PIECE", 64 * KIB)
    monkeypatch.setattr(copying, "DATA_STEP", 128 * KIB)
    chain = Chain(tmp_path / "source", CHAINS["cow-below"], seed=3)
    path = tmp_path / "target"
    number = 0
    while True:
        make_target(path, "add-cow", len(chain.models[-1]), {"cluster_size": "64k"})
        progress = stop_at(number)
        with chain.open() as one, mmcow.open(path, write=True) as other:
            try:
                convert(one, other, progress=progress)
            except Stop:
                stopped = True
            else:
                stopped = False
            if stopped:
                # Both go on after the stop.
                assert one.read(0, one.size) == bytes(chain.models[-1])
                convert(one, other)
            assert other.read(0, other.size) == bytes(chain.models[-1])
        os.unlink(path)
        os.unlink(str(path) + ".raw")
        if not stopped:
            break
        number += 1
    assert number > 5
    check_content(chain, -1, chain.models[-1])


def test_convert_read_error_reaches_the_caller_with_nothing_left_in_flight(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    with open(source, "wb") as file:
        file.write(random.Random(5).randbytes(8 * MIB))
    make_target(target, "raw", 8 * MIB, {})
    monkeypatch.setattr(copying, "PIECE", 64 * KIB)
    with (
        mmcow.open(source, format="raw") as one,
        mmcow.open(target, format="raw", write=True) as other,
    ):
        real = one.engine.read

        def read(offset, part):
            if offset == 1 * MIB:
                raise mmcow.StorageError(5, "read", str(source), offset)
            return real(offset, part)

        monkeypatch.setattr(one.engine, "read", read)
        with pytest.raises(mmcow.StorageError, match="Input/output"):
            convert(one, other)
        assert not one.reactor.queue.busy
        assert not other.reactor.queue.busy


def test_convert_and_compare_empty_disks(tmp_path):
    make_target(tmp_path / "one", "raw", 0, {})
    make_target(tmp_path / "two", "add-cow", 0, {})
    make_target(tmp_path / "three", "raw", 4096, {})
    with (
        mmcow.open(tmp_path / "one", format="raw") as one,
        mmcow.open(tmp_path / "two", write=True) as two,
        mmcow.open(tmp_path / "three", format="raw", write=True) as three,
    ):
        assert convert(one, two) == 0
        assert convert(two, three) == 0
        assert compare(one, two) is None
        assert compare(one, three) is None


def test_convert_stopped_by_the_keyboard(tmp_path):
    """This test wants both images usable after a KeyboardInterrupt between two pieces."""
    chain = Chain(tmp_path / "source", CHAINS["three"], seed=1)
    make_target(tmp_path / "target", "raw", len(chain.models[-1]), {})

    def progress(done, _):
        if done:
            raise KeyboardInterrupt

    with chain.open() as one, mmcow.open(tmp_path / "target", format="raw", write=True) as other:
        with pytest.raises(KeyboardInterrupt):
            convert(one, other, progress=progress)
        convert(one, other)
        assert compare(one, other) is None


# ---- compare ----


def test_compare_equal_over_different_chains(tmp_path):
    for number, source in enumerate(CHAINS):
        chain = Chain(tmp_path / source, CHAINS[source], seed=number)
        path = tmp_path / source / "flat"
        with open(path, "wb") as file:
            file.write(chain.models[-1])
        with chain.open() as one, mmcow.open(path, format="raw") as other:
            assert compare(one, other) is None
            assert compare(other, one) is None


@pytest.mark.parametrize("seed", range(8))
def test_compare_finds_the_first_sector(tmp_path, seed):
    print("seed", seed)
    rng = random.Random(seed)
    chain = Chain(tmp_path / "chain", CHAINS["cow-below"], seed=seed)
    flat = bytearray(chain.models[-1])
    spots = sorted(rng.randrange(len(flat)) for _ in range(rng.randrange(1, 4)))
    for spot in spots:
        flat[spot] ^= 1
    path = tmp_path / "flat"
    path.write_bytes(flat)
    with chain.open() as one, mmcow.open(path, format="raw") as other:
        for pair in ((one, other), (other, one)):
            found = compare(*pair)
            assert found is not None
            assert found.offset == spots[0] // 512 * 512
            assert not one.reactor.queue.busy


def test_compare_sizes(tmp_path):
    long, short, zeros = tmp_path / "long", tmp_path / "short", tmp_path / "zeros"
    short.write_bytes(b"a" * 4096)
    zeros.write_bytes(b"a" * 4096 + bytes(3 * MIB))
    long.write_bytes(b"a" * 4096 + bytes(2 * MIB) + b"b" * 512)
    with (
        mmcow.open(short, format="raw") as one,
        mmcow.open(zeros, format="raw") as two,
        mmcow.open(long, format="raw") as three,
    ):
        assert compare(one, two) is None
        assert compare(two, one) is None
        found = compare(one, three)
        assert found is not None
        assert found.offset == 4096 + 2 * MIB
        strict = compare(two, one, strict=True)
        assert strict is not None
        assert "size" in str(strict)


def test_compare_strict_sees_allocation(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"a" * 65536 + bytes(65536))
    with open(two, "wb") as file:
        file.write(b"a" * 65536)
        file.truncate(131072)
    with mmcow.open(one, format="raw") as first, mmcow.open(two, format="raw") as second:
        assert compare(first, second) is None
        found = compare(first, second, strict=True)
        assert found is not None
        assert found.offset == 65536
        assert compare(first, first, strict=True) is None


def test_compare_stops(tmp_path):
    one = tmp_path / "one"
    one.write_bytes(b"a" * MIB * 4)
    with mmcow.open(one, format="raw") as first, mmcow.open(one, format="raw") as second:
        with pytest.raises(Stop):
            compare(first, second, progress=stop_at(0))
        assert compare(first, second) is None
