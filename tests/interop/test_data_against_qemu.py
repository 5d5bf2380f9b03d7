# SPDX-License-Identifier: MIT
"""What mmcow writes, read by others; what others write, read by mmcow.

Random traffic goes through chains of every format; the flattened disk is then judged by qemu-img
and qemu-io, by fio's own checksums, and by the kernel's ext4.
"""

from __future__ import annotations

import json
import os
import random
from typing import TYPE_CHECKING, NamedTuple

import pytest

import mmcow
from mmcow.jobs.commit import commit
from mmcow.jobs.convert import convert
from mmcow.jobs.detach import detach
from mmcow.jobs.stream import stream
from mmcow.storage.linux import LinuxHost
from tests.interop.tools import allocated, mount_image, qemu_io, requires, run, sha256

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.interop

SECTOR = 512


class Chain(NamedTuple):
    """Layers from the base up: (format, options, size in bytes or None for that of the base)."""

    name: str
    base: int  # length of the raw base file
    layers: tuple[tuple[str, dict[str, str], int | None], ...]
    override: str | None = None  # format of a base that the image above cannot record


CHAINS = (
    Chain("v20 over raw", 3 << 20, (("add-cow", {"cluster_size": "64k"}, None),)),
    Chain("v20 over odd raw", (2 << 20) + 777, (("add-cow", {"cluster_size": "4k"}, 3 << 20),)),
    Chain("v10 over long raw", (4 << 20) + 1, (("add-cow", {"compat": "v10"}, (1 << 20) + 512),)),
    Chain("v7 over short raw", 100_000, (("add-cow", {"compat": "v7"}, (1 << 21) + 1024),)),
    Chain("cow over raw", (2 << 20) + 512 * 3, (("cow", {}, None),)),
    Chain("uml3 over raw", (2 << 20) + 512 * 3, (("cow", {"compat": "uml3"}, None),)),
    Chain(
        "three add-cows over raw",
        (1 << 20) + 1300,
        (
            ("add-cow", {"cluster_size": "64k"}, (2 << 20) + 512),
            ("add-cow", {"cluster_size": "4k"}, (1 << 20) - 512),
            ("add-cow", {"cluster_size": "16k"}, 3 << 20),
        ),
    ),
    Chain(
        "v20 over cow over v7 over raw",
        1 << 20,
        (
            ("add-cow", {"compat": "v7"}, 2 << 20),
            ("cow", {}, None),
            ("add-cow", {"cluster_size": "2M"}, 5 << 20),
        ),
        "add-cow",
    ),
)


class Stack:
    """A chain in a folder, and what its top must read as."""

    def __init__(self, folder: Path, chain: Chain, rng: random.Random) -> None:
        self.base = folder / "base.img"
        self.chain = chain
        self.rng = rng
        content = make_base(self.base, chain.base, rng)
        self.model = bytearray(content + bytes(-len(content) % SECTOR))
        self.hashes = {self.base: sha256(self.base)}
        below, below_format = "base.img", "raw"
        for depth, (format_, options, size) in enumerate(chain.layers):
            self.top = folder / f"layer{depth}"
            self.top_format = format_
            mmcow.create(
                self.top, format=format_, size=size, backing=below, backing_format=below_format,
                options=options, check_backing=size is None or chain.override is None,
            )  # fmt: skip
            if size is not None:
                del self.model[size:]
                self.model += bytes(size - len(self.model))
            below, below_format = self.top.name, format_
            if depth < len(chain.layers) - 1:
                with self.open(write=True) as image:
                    traffic(image, self.model, rng, 30)
                for path in (self.top, folder / f"layer{depth}.raw"):
                    if path.exists():
                        self.hashes[path] = sha256(path)

    def open(self, *, write: bool = False, **options) -> mmcow.Image:
        return mmcow.open(
            self.top, format=self.top_format, write=write,
            backing_format=self.chain.override, **options,
        )  # fmt: skip

    def check_below(self) -> None:
        assert {path: sha256(path) for path in self.hashes} == self.hashes


def make_base(path: Path, length: int, rng: random.Random) -> bytes:
    """A raw disk written by qemu-io, with holes; an odd end, if any, by hand."""
    whole = length // SECTOR * SECTOR
    run("qemu-img", "create", "-q", "-f", "raw", path, str(whole))
    content = bytearray(length)
    commands = []
    for _ in range(20):
        start = rng.randrange(whole // SECTOR) * SECTOR
        size = min(rng.choice((512, 4096, 65536, 12288)), whole - start)
        byte = rng.randrange(1, 256)
        commands.append(f"write -P {byte} {start} {size}")
        content[start : start + size] = bytes([byte]) * size
    qemu_io(path, *commands)
    with path.open("r+b") as file:
        file.seek(whole)
        content[whole:] = tail = rng.randbytes(length - whole)
        file.write(tail)
    return bytes(content)


def traffic(image: mmcow.Image, model: bytearray, rng: random.Random, count: int) -> None:
    """Random requests of any alignment, mirrored in ``model``."""
    resizable = image.layers[0].driver.info.can_resize
    for _ in range(count):
        size = len(model)
        offset = rng.randrange(size)
        length = min(rng.choice((1, 511, 512, 4096, 5000, 65536, 200_000)), size - offset)
        verb = rng.choice(("write", "write", "write", "zero", "discard", "flush", "resize", "read"))
        if verb == "write":
            data = rng.randbytes(length)
            image.write(offset, data)
            model[offset : offset + length] = data
        elif verb == "zero":
            image.write_zeroes(offset, length, may_unmap=rng.random() < 0.5)
            model[offset : offset + length] = bytes(length)
        elif verb == "discard":
            image.discard(offset, length)
            accept_discard(image, model, offset, length)
        elif verb == "flush":
            image.flush()
        elif verb == "resize" and resizable:
            new = rng.randrange(1, (5 << 20) // SECTOR) * SECTOR
            image.resize(new, shrink=True)
            del model[new:]
            model += bytes(new - len(model))
        else:
            assert image.read(offset, length) == model[offset : offset + length]


def accept_discard(image: mmcow.Image, model: bytearray, offset: int, length: int) -> None:
    """Every byte of a discarded range is zero or as before."""
    found = image.read(offset, length)
    for i, byte in enumerate(found):
        if byte != model[offset + i]:
            assert byte == 0
    model[offset : offset + length] = found


def flatten(source: mmcow.Image, path: Path) -> None:
    """Copy a disk to a new raw file."""
    mmcow.create(path, format="raw", size=source.size)
    with mmcow.open(path, format="raw", write=True) as target:
        convert(source, target, target_is_zero=True)


def assert_same_disk(one: Path, other: Path) -> None:
    ended = run("qemu-img", "compare", "-f", "raw", "-F", "raw", one, other, ok=())
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize(("backend", "cache"), [("io_uring", "none"), ("threads", "writeback")])
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.name)
def test_random_traffic_is_read_back_by_qemu(tmp_path, rng, chain, cache, backend):
    requires("qemu-img", "qemu-io")
    stack = Stack(tmp_path, chain, rng)
    host = LinuxHost(backend)
    for _ in range(3):
        with stack.open(write=True, cache=cache, host=host) as image:
            traffic(image, stack.model, rng, 60)
        with stack.open(host=host) as image:
            assert image.size == len(stack.model)
            assert image.read(0, image.size) == stack.model
    expected, flat, again = (tmp_path / name for name in ("expected", "flat", "again"))
    expected.write_bytes(stack.model)
    with stack.open(host=host) as image:
        flatten(image, flat)
    assert flat.read_bytes() == stack.model
    assert_same_disk(expected, flat)
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", flat, again)
    assert sha256(again) == sha256(expected)
    qemu_io(flat, *pattern_reads(bytes(stack.model), rng))
    stack.check_below()


def pattern_reads(content: bytes, rng: random.Random) -> list[str]:
    """qemu-io commands that verify single sectors of one byte value (zeros mostly)."""
    commands = []
    sectors = list(range(len(content) // SECTOR))
    rng.shuffle(sectors)
    for sector in sectors:
        part = content[sector * SECTOR : (sector + 1) * SECTOR]
        if part == part[:1] * SECTOR:
            commands.append(f"read -P {part[0]} {sector * SECTOR} {SECTOR}")
        if len(commands) == 50:
            break
    return commands


def test_the_data_file_is_the_disk_where_bits_are_set(tmp_path, rng):
    """add-cow's promise: qemu-io reads allocated clusters straight from the data file."""
    requires("qemu-img", "qemu-io")
    stack = Stack(tmp_path, CHAINS[0], rng)
    with stack.open(write=True) as image:
        for number in range(1, 20):
            offset = rng.randrange(image.size // 65536) * 65536
            image.write(offset, bytes([number]) * 65536)
            stack.model[offset : offset + 65536] = bytes([number]) * 65536
        image.flush()
        mapped = [s for s in image.block_status(layer=0) if s.kind == mmcow.Kind.DATA]
        commands = [
            f"read -P {stack.model[offset]} {offset} 65536"
            for status in mapped
            for offset in range(status.offset, status.offset + status.length, 65536)
        ]
        assert commands
        assert all(status.host_offset == status.offset for status in mapped)
        # While it is open: a shared reader.
        qemu_io(f"{stack.top}.raw", *commands, options=("-r", "-U"))
    stack.check_below()


@pytest.mark.parametrize("chain", [CHAINS[0], CHAINS[1], CHAINS[3]], ids=lambda chain: chain.name)
def test_stream_and_detach_leave_a_raw_disk_for_qemu(tmp_path, rng, chain):
    requires("qemu-img", "qemu-io")
    stack = Stack(tmp_path, chain, rng)
    with stack.open(write=True) as image:
        traffic(image, stack.model, rng, 60)
        stream(image)
        traffic(image, stack.model, rng, 20)
    stack.check_below()
    raw = detach(stack.top)
    assert not stack.top.exists()
    expected = tmp_path / "expected"
    expected.write_bytes(stack.model)
    assert_same_disk(expected, raw)
    qemu_io(raw, "write -P 0x5a 1k 3k", "flush")
    stack.model[1024:4096] = b"\x5a" * 3072
    with mmcow.open(raw, format="raw") as image:
        assert image.read(0, image.size) == stack.model


def test_commit_into_a_base_that_qemu_reads(tmp_path, rng):
    requires("qemu-img", "qemu-io")
    stack = Stack(tmp_path, CHAINS[0], rng)
    with stack.open(write=True) as image:
        for _ in range(80):
            offset = rng.randrange(len(stack.model) - 5000)
            data = rng.randbytes(rng.randrange(1, 5000))
            image.write(offset, data)
            stack.model[offset : offset + len(data)] = data
    commit(stack.top)
    expected = tmp_path / "expected"
    expected.write_bytes(stack.model)
    assert_same_disk(expected, stack.base)


def test_an_odd_raw_file_has_the_size_and_end_that_qemu_sees(tmp_path, rng):
    requires("qemu-img", "qemu-io")
    path = tmp_path / "odd.raw"
    content = rng.randbytes((1 << 20) + 333)
    path.write_bytes(content)
    info = json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", path).stdout)
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", path, tmp_path / "qemu")
    with mmcow.open(path, format="raw") as image:
        assert image.size == info["virtual-size"]
        assert image.read(0, image.size) == (tmp_path / "qemu").read_bytes()
        flatten(image, tmp_path / "mmcow")
    assert_same_disk(tmp_path / "qemu", tmp_path / "mmcow")


# ---- holes ----


def zero_map_of_qemu(path: Path) -> list[tuple[int, int, bool]]:
    entries = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", path).stdout)
    merged: list[tuple[int, int, bool]] = []
    for entry in entries:
        if merged and merged[-1][2] == entry["zero"]:
            start, length, zero = merged.pop()
            merged.append((start, length + entry["length"], zero))
        else:
            merged.append((entry["start"], entry["length"], entry["zero"]))
    return merged


def test_holes_are_where_qemu_sees_them(tmp_path, rng):
    requires("qemu-img", "qemu-io")
    path = tmp_path / "sparse.raw"
    run("qemu-img", "create", "-q", "-f", "raw", path, "256M")
    offsets = sorted(rng.sample(range(4096), 30))
    qemu_io(path, *[f"write -P 7 {offset << 16} 64k" for offset in offsets], "flush")
    with mmcow.open(path, format="raw") as image:
        mine = [(s.offset, s.length, s.is_zero) for s in image.block_status()]
    assert mine == zero_map_of_qemu(path)


def test_sparse_disks_stay_sparse(tmp_path, rng):
    """Flattened by mmcow and by qemu-img, a disk takes the same room."""
    requires("qemu-img", "qemu-io")
    base = tmp_path / "base.raw"
    run("qemu-img", "create", "-q", "-f", "raw", base, "1G")
    qemu_io(base, *[f"write -P 9 {rng.randrange(16384) << 16} 64k" for _ in range(20)], "flush")
    top = tmp_path / "top"
    mmcow.create(top, backing="base.raw", backing_format="raw")
    with mmcow.open(top, write=True) as image:
        for _ in range(20):
            image.write(rng.randrange(1 << 18) * 4096, rng.randbytes(4096))
        image.write_zeroes(100 << 20, 300 << 20)
        image.flush()
        flatten(image, tmp_path / "mmcow")
    assert allocated(f"{top}.raw") <= 20 * (64 << 10) + (1 << 20)
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", tmp_path / "mmcow", tmp_path / "qemu")
    assert_same_disk(tmp_path / "mmcow", tmp_path / "qemu")
    assert allocated(tmp_path / "mmcow") <= allocated(tmp_path / "qemu") + (1 << 20)
    data = sum(size for _, size, zero in zero_map_of_qemu(tmp_path / "mmcow") if not zero)
    assert data <= 40 * 65536 + (1 << 20)


# ---- fio ----

FIO = ("--name=disk", "--verify=crc32c", "--bs=4k", "--rw=randwrite", "--verify_state_save=0")


def fio(path: Path, size: int, seed: int, *options: str) -> None:
    run("fio", *FIO, f"--filename={path}", f"--size={size}", f"--randseed={seed}", *options)


def test_fio_finds_its_checksums_again(tmp_path, rng):
    """fio writes a raw disk; overlays, a flattened copy and a detached disk verify as fio's."""
    requires("fio")
    size = 16 << 20
    base = tmp_path / "base.raw"
    seed = rng.randrange(1 << 30)
    fio(base, size, seed, "--do_verify=0", "--direct=1", "--ioengine=psync")
    before = sha256(base)
    top = tmp_path / "top"
    mmcow.create(top, backing="base.raw", backing_format="raw")
    with mmcow.open(top, write=True) as image:
        for _ in range(200):  # the same bytes again, copied up around
            offset, length = rng.randrange(size - 9000), rng.randrange(1, 9000)
            image.write(offset, image.read(offset, length))
        flatten(image, tmp_path / "flat")
        stream(image)
    detach(top)
    for path in (tmp_path / "flat", tmp_path / "top.raw"):
        fio(path, size, seed, "--verify_only")
    assert sha256(base) == before


def test_fio_verifies_what_it_wrote_under_mmcow(tmp_path, rng):
    """fio writes into the data file of a complete add-cow: the same disk through mmcow."""
    requires("fio")
    size = 8 << 20
    seed = rng.randrange(1 << 30)
    mmcow.create(tmp_path / "disk", size=size)
    fio(tmp_path / "disk.raw", size, seed, "--do_verify=1", "--direct=1", "--ioengine=psync")
    with mmcow.open(tmp_path / "disk") as image:
        flatten(image, tmp_path / "flat")
    fio(tmp_path / "flat", size, seed, "--verify_only")


# ---- a real file system ----


@pytest.mark.root
def test_ext4_through_overlays(tmp_path, rng):
    """mke2fs makes a base; the flattened overlay is mounted and changed by the kernel; the changed
    blocks go into the overlay; the file system is checked at each step."""
    requires("mke2fs", "e2fsck", "qemu-img", root=True)
    tree = tmp_path / "tree"
    tree.mkdir()
    files = {f"file{n}": rng.randbytes(rng.randrange(200_000)) for n in range(40)}
    for name, content in files.items():
        (tree / name).write_bytes(content)
    base = tmp_path / "base.raw"
    run("mke2fs", "-q", "-t", "ext4", "-d", tree, base, "64M")
    before = sha256(base)
    top = tmp_path / "top"
    mmcow.create(top, backing="base.raw", backing_format="raw")
    for step in range(3):
        flat = tmp_path / f"flat{step}"
        with mmcow.open(top) as image:
            flatten(image, flat)
        original = flat.read_bytes()
        with mount_image(flat, tmp_path / "mnt") as point:
            for name, content in files.items():
                assert (point / name).read_bytes() == content
            change_files(point, files, rng)
        run("e2fsck", "-fn", flat)
        changed = flat.read_bytes()
        with mmcow.open(top, write=True) as image:
            for offset in range(0, len(changed), 4096):
                part = changed[offset : offset + 4096]
                if part != original[offset : offset + 4096]:
                    image.write(offset, part)
        with mmcow.open(top) as image:
            flatten(image, tmp_path / "after")
        assert_same_disk(flat, tmp_path / "after")
        run("e2fsck", "-fn", tmp_path / "after")
        (tmp_path / "after").unlink()
        assert sha256(base) == before
    # And as the raw disk that it becomes.
    with mmcow.open(top, write=True) as image:
        stream(image)
    raw = detach(top)
    run("e2fsck", "-fn", raw)
    with mount_image(raw, tmp_path / "mnt", options="ro") as point:
        for name, content in files.items():
            assert (point / name).read_bytes() == content


def change_files(point: Path, files: dict[str, bytes], rng: random.Random) -> None:
    """Remove some, grow some, add some."""
    for name in rng.sample(sorted(files), 5):
        (point / name).unlink()
        del files[name]
    for name in rng.sample(sorted(files), 5):
        files[name] += rng.randbytes(100_000)
        (point / name).write_bytes(files[name])
    for _ in range(5):
        name = f"new{rng.randrange(1 << 30)}"
        files[name] = rng.randbytes(rng.randrange(300_000))
        (point / name).write_bytes(files[name])
    os.sync()
