# SPDX-License-Identifier: MIT
"""Small disks of every format, written byte by byte from the specifications.

These writers share nothing with mmcow: a format module that misplaces a field is found out by the
first read. What a disk holds names its origin in readable bytes ("base.3", "data.5", "junk.2"), so
that a violation tells where the wrong bytes came from.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from tests.sim.host import SimHost

DIRECTORY = "/sim"
TOP = f"{DIRECTORY}/top"
DATA = f"{DIRECTORY}/top.raw"
MIDDLE = f"{DIRECTORY}/middle"
MIDDLE_DATA = f"{DIRECTORY}/middle.raw"
BASE = f"{DIRECTORY}/base.raw"
SECTOR = 512
MTIME = 1_000_000

ADD_COW = ("v20", "v18", "v10", "v7")
COW = ("x86-64", "i386", "uml3")
VARIANTS = (*ADD_COW, *COW, "raw")


@dataclass(frozen=True)
class Shape:
    """One disk and what lies below it."""

    variant: str
    size: int
    cluster: int
    base: int | None  # length of the base file
    allocated: frozenset[int] = frozenset()  # clusters that the top layer has from the start
    chain: bool = False  # a middle layer (v20) between top and base
    device: bool = False  # data on a block device

    @property
    def format(self) -> str:
        """mmcow's name of the format."""
        return "add-cow" if self.variant in ADD_COW else "cow" if self.variant in COW else "raw"

    @property
    def clusters(self) -> int:
        """How many clusters the disk has."""
        return -(-self.size // self.cluster)

    def __str__(self) -> str:
        below = "no base" if self.base is None else f"base {self.base}"
        extra = (", chain of three" if self.chain else "") + (", device" if self.device else "")
        return (
            f"{self.variant}, {self.size} bytes in clusters of {self.cluster}, {below}{extra}, "
            f"allocated {sorted(self.allocated)}"
        )


def pattern(label: str, length: int, first: int = 0) -> bytes:
    """Bytes that name their origin, sector by sector."""
    sectors = -(-length // SECTOR)
    parts = (f"{label}.{first + i}".encode().ljust(16, b"\0")[:16] * 32 for i in range(sectors))
    return b"".join(parts)[:length]


def put(host: SimHost, shape: Shape) -> bytes:
    """Place the files of a disk on a host; returns what the guest reads."""
    content = b""
    if shape.base is not None:
        content = pattern("base", shape.base)
        host.put(BASE, content, mtime=MTIME)
    if shape.chain:
        middle = Shape("v20", shape.size, 4096, shape.base)
        every_second = range(0, middle.clusters, 2)
        content = _put_layer(host, middle, MIDDLE, MIDDLE_DATA, content, every_second, BASE)
        return _put_layer(host, shape, TOP, DATA, content, shape.allocated, MIDDLE)
    return _put_layer(host, shape, TOP, DATA, content, shape.allocated, BASE)


def _put_layer(
    host: SimHost,
    shape: Shape,
    path: str,
    data_path: str,
    below: bytes,
    allocated: Iterable[int],
    backing: str,
) -> bytes:
    """One layer over ``below``; returns what is read through it."""
    label = "data" if path == TOP else "middle"
    content = bytearray(below[: shape.size].ljust(shape.size, b"\0"))
    data = bytearray(pattern("junk", shape.size))
    mine = range(shape.clusters) if shape.variant == "raw" else sorted(allocated)
    bits = bytearray(-(-shape.clusters // 8))
    for cluster in mine:
        start, end = cluster * shape.cluster, min((cluster + 1) * shape.cluster, shape.size)
        content[start:end] = data[start:end] = pattern(label, end - start, start // SECTOR)
        bits[cluster // 8] |= 1 << cluster % 8
    name = os.path.basename(backing) if shape.base is not None else ""
    image_name = os.path.basename(data_path)
    kind = "block" if shape.device else "file"
    if shape.variant == "raw":
        host.put(path, bytes(data), kind=kind)
    elif shape.variant in ADD_COW:
        is_raw = backing == BASE
        host.put(path, add_cow(shape, name, is_raw, image_name, bytes(bits)), mtime=MTIME)
        host.put(data_path, bytes(data), kind=kind, mtime=MTIME)
    else:
        head, data_start = cow(shape, name, bytes(bits))
        host.put(path, head.ljust(data_start, b"\0") + bytes(data), mtime=MTIME)
    return bytes(content)


def add_cow(shape: Shape, backing: str, backing_is_raw: bool, image: str, bits: bytes) -> bytes:
    """An add-cow file."""
    if shape.variant == "v10":
        return _v10(backing, backing_is_raw, image) + bits
    if shape.variant == "v7":
        head = b"ADD_COW\xff" + struct.pack(">I", 1)
        head += backing.encode().ljust(1024, b"\0") + image.encode().ljust(1024, b"\0")
        return head.ljust(2560, b"\0") + bits
    header = max(4096, shape.cluster)
    backing_format = (b"raw" if backing_is_raw else b"add-cow") if backing else b""
    fixed = struct.pack(
        "<4sIIIIIQQI16s16s",
        b"ACOW",
        76 if backing else 0,
        len(backing),
        76 + len(backing),
        len(image),
        shape.cluster.bit_length() - 1,
        0,
        0 if backing else 1,
        header,
        backing_format,
        b"raw",
    )
    padded = bits.ljust(-(-len(bits) // shape.cluster) * shape.cluster, b"\0")
    if not backing:
        full = (1 << shape.clusters) - 1
        padded = full.to_bytes(len(padded), "little")
    return (fixed + (backing + image).encode()).ljust(header, b"\0") + padded


def _v10(backing: str, backing_is_raw: bool, image: str) -> bytes:
    features = (1 | 2 * backing_is_raw) if backing else 0
    head = b"ADD_COW\xff" + struct.pack(
        "<IIIIIQ", 1, 36 if backing else 0, len(backing), 36 + len(backing), len(image), features
    )
    return (head + (backing + image).encode()).ljust(4096, b"\0")


def cow(shape: Shape, backing: str, bits: bytes) -> tuple[bytes, int]:
    """Header and bitmap of a cow file, and where its data begins."""
    if shape.variant == "uml3":
        alignment = 4096 if shape.size % 4096 == 0 else 512
        head = struct.pack(
            ">4sIIQIII4096s",
            b"OOOM", 3, MTIME, shape.size, SECTOR, alignment, 0, backing.encode(),
        )  # fmt: skip
        start = -(-len(head) // alignment) * alignment
        whole = head.ljust(start, b"\0") + bits
        return whole, -(-len(whole) // alignment) * alignment
    gap = b"\0" * 4 if shape.variant == "x86-64" else b""
    head = b"OOOM" + struct.pack(">I1024sI", 2, backing.encode(), MTIME) + gap
    head += struct.pack(">QI", shape.size, SECTOR) + gap
    whole = head + bits
    return whole, -(-len(whole) // SECTOR) * SECTOR


def random_shape(variant: str, rng: Random) -> Shape:
    """A small disk of a variant, with whatever lies below it, at random."""
    cluster = {"v20": 4096, "v18": rng.choice((512, 1024, 2048)), "v10": 65536}.get(variant, SECTOR)
    if variant == "raw":
        return Shape("raw", SECTOR * rng.randint(12, 40), SECTOR, None, device=rng.random() < 0.2)
    if variant == "v10":
        size = rng.choice((65536 * 2, 65536 * 2 + 1536, 65536 + 512))
    elif variant == "v20":
        size = rng.choice((8192, 12288, 20480, 8192 + 512, 16384 + 3584))
    else:
        size = SECTOR * rng.randint(12, 40)
    if variant == "uml3":
        base: int | None = size  # it refuses any other
    else:
        longer = size + rng.choice((512, cluster, 3000))
        shorter = rng.choice((size // 2, size // 3 // 512 * 512, size // 2 // cluster * cluster))
        base = rng.choice((size, longer, shorter, size - rng.randint(1, 511)))
        if variant == "v20" and rng.random() < 0.1:
            base = None
    chain = base is not None and variant != "uml3" and rng.random() < 0.2
    count = -(-size // cluster)
    allocated = frozenset(c for c in range(count) if rng.random() < rng.choice((0, 0, 0.3)))
    if base is None and variant == "v20":
        allocated = frozenset(range(count))
    device = variant in ADD_COW and rng.random() < 0.1
    return Shape(variant, size, cluster, base, allocated, chain, device)
