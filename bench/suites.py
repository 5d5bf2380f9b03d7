# SPDX-License-Identifier: MIT
"""What is measured, beside whom, and what is aimed at.

Owns: the suites, as data; README.md of this folder tells what they mean.
Never: starts anything.
"""

from __future__ import annotations

from itertools import product

from bench.model import (
    AGAIN,
    FIO,
    FOUR,
    GIB,
    KIB,
    MIB,
    MMCOW,
    NBDKIT,
    PARALLEL,
    PYTHON,
    QCOW2,
    QCOW2_EL2,
    TIB,
    Aim,
    Cell,
    Extents,
    Job,
    Layout,
    Life,
    Memory,
    Op,
    Requests,
    Served,
    Start,
    Suite,
    WholeDisk,
    Work,
)

OPS: tuple[Op, Op] = ("read", "write")
DEPTHS = (1, 16, 64)
EITHER_QCOW2 = (QCOW2, QCOW2_EL2)
_AS_QCOW2 = Aim((QCOW2,), 1.0)
SIZES = {4 * KIB: "4K", 64 * KIB: "64K", MIB: "1M"}


def _mapped() -> Suite:
    cells = tuple(
        Cell(
            f"4K {op}, QD {depth}",
            Requests(op, 4 * KIB, depth),
            (MMCOW, QCOW2, FIO),
            (Aim((QCOW2,), 1.0), Aim((FIO,), 0.95)),
            quick=depth == 16,
        )
        for op, depth in product(OPS, DEPTHS)
    )
    return Suite(
        "mapped", "Random requests to what is there, in process", cells,
        note="add-cow against `qemu-img bench` on qcow2, and against fio on a raw file.",
    )  # fmt: skip


def _raw() -> Suite:
    cells = tuple(
        Cell(
            f"4K {op}, QD 64",
            Requests(op, 4 * KIB, 64, "raw"),
            (MMCOW, FIO),
            (Aim((FIO,), 0.95),),
            quick=op == "write",
        )
        for op in OPS
    )
    return Suite(
        "raw", "Random requests to a raw file, in process", cells,
        note="How near `mmcow bench` comes to fio with no format between it and the disk.",
    )  # fmt: skip


def _first() -> Suite:
    cells = tuple(
        Cell(
            f"{SIZES[size]} first write, QD {depth}",
            Requests("write", size, depth, "first"),
            (MMCOW, *EITHER_QCOW2),
            (Aim(EITHER_QCOW2, 1.0),),
            quick=size == 4 * KIB,
        )
        for size, depth in product((4 * KIB, 64 * KIB), (1, 16))
    )
    return Suite(
        "first", "First writes over a base, in process", cells, (Aim(EITHER_QCOW2, 1.5),),
        note="Against the better of qcow2 with 64 KiB clusters and with extended L2 entries at "
        "128 KiB; add-cow with its default clusters.",
    )  # fmt: skip


def _flush() -> Suite:
    return Suite(
        "flush", "Pairs of a 4 KiB write and a flush, in process",
        (
            Cell(
                "first write + flush", Requests("write", 4 * KIB, 1, "first", flush=True),
                (MMCOW, *EITHER_QCOW2), (Aim(EITHER_QCOW2, 1.2),), quick=True,
            ),
            Cell(
                "mapped write + flush", Requests("write", 4 * KIB, 1, "mapped", flush=True),
                (MMCOW, QCOW2), (Aim((QCOW2,), 1.0),), quick=True,
            ),
        ),
        note="Each flush makes the write before it durable.",
    )  # fmt: skip


def _sequential() -> Suite:
    cells = tuple(
        Cell(
            f"1M {op}, in sequence, QD 8",
            Requests(op, MIB, 8, sequential=True),
            (MMCOW, FIO),
            (Aim((FIO,), 0.95),),
            quick=op == "read",
        )
        for op in OPS
    )
    return Suite("sequential", "Large requests in sequence, in process", cells)


def _served(op: Op, size: int, depth: int, layout: Layout = "mapped", aim: Aim = _AS_QCOW2) -> Cell:
    """Requests over NBD, beside the one peer of the aim; of 1 MiB in sequence, others not."""
    what = "first write" if layout == "first" else op
    return Cell(
        f"{SIZES[size]} {what}, QD {depth}",
        Served(op, size, depth, layout, sequential=size == MIB),
        (MMCOW, *aim.peers),
        (aim,),
        quick=(size, depth) == (4 * KIB, 16),
    )


def _nbd() -> Suite:
    """The grid, 1 MiB requests, and four connections."""
    cells = [
        _served(op, size, depth) for op, size, depth in product(OPS, (4 * KIB, 64 * KIB), DEPTHS)
    ]
    cells += [
        _served("write", size, depth, "first")
        for size, depth in product((4 * KIB, 64 * KIB), DEPTHS)
    ]
    cells += [
        _served("read", MIB, 8), _served("write", MIB, 8), _served("write", MIB, 8, "first"),
    ]  # fmt: skip
    return Suite(
        "nbd", "Requests over NBD", tuple(cells), (Aim((QCOW2,), 1.5),),
        note="`mmcow serve` on add-cow against qemu-nbd on qcow2; fio is the client of both.",
    )  # fmt: skip


def _connections() -> Suite:
    cells = tuple(
        Cell(
            f"4K {op}, QD 64 over four connections",
            Served(op, 4 * KIB, 64),
            (MMCOW + FOUR, MMCOW, QCOW2 + FOUR),
            (Aim((MMCOW,), 1.0), Aim((QCOW2 + FOUR,), None)),
            quick=op == "read",
        )
        for op in OPS
    )
    return Suite(
        "connections", "Four NBD connections", cells,
        note="Four connections of 16 requests against one of 64, on the same server.",
    )  # fmt: skip


def _nbd_raw() -> Suite:
    cells = tuple(
        _served(op, size, depth, "raw", Aim((NBDKIT,), 0.8))
        for op, (size, depth) in product(
            OPS, ((4 * KIB, 1), (4 * KIB, 16), (4 * KIB, 64), (MIB, 8))
        )
    )
    return Suite(
        "nbd_raw", "A raw file over NBD", cells,
        note="`mmcow serve` against nbdkit's file plugin, which has no direct I/O: both use the "
        "page cache (`-t writeback`).",
    )  # fmt: skip


def _copy() -> Suite:
    return Suite(
        "copy", "nbdcopy of a whole disk",
        (
            Cell("out", WholeDisk("out"), (MMCOW, QCOW2), (Aim((QCOW2,), 1.0),), quick=True),
            Cell("in", WholeDisk("in"), (MMCOW, QCOW2), (Aim((QCOW2,), 1.0),)),
        ),
        note="Out: a mapped disk to nowhere (`null:`). In: a file to a new layer over a base, "
        "flushed.",
    )  # fmt: skip


def _extents() -> Suite:
    return Suite(
        "extents", "Every extent of 1 TiB, a million of them",
        (
            Cell(
                "in process", Extents("in process"), (MMCOW, QCOW2), (Aim((QCOW2,), 10.0),),
                quick=True,
            ),
            Cell("command", Extents("command"), (MMCOW, QCOW2), (Aim((QCOW2,), 1.0),), quick=True),
        ),
        note="64 KiB of each 2 MiB are in the top layer, the rest in a base. "
        "`Image.block_status()` and `mmcow map --output=json` against `qemu-img map "
        "--output=json`.",
    )  # fmt: skip


def _life() -> Suite:
    places = (
        ("1 GiB", GIB, "here"), ("1 TiB", TIB, "here"),
        ("15 TiB", 15 * TIB, "here"), ("64 TiB on XFS", 64 * TIB, "xfs"),
    )  # fmt: skip
    cells = [
        Cell(f"{act} {name}", Life(act, size, place), (MMCOW,), limit=5.0, quick=size <= TIB)  # type: ignore[arg-type]
        for act in ("create", "open")
        for name, size, place in places
    ]
    cells += [
        Cell(f"memory, {name}", Memory(size, place), (MMCOW,), limit=1024.0, quick=size <= TIB)  # type: ignore[arg-type]
        for name, size, place in places
    ]
    return Suite(
        "life", "Creating and opening", tuple(cells),
        note="Over a base of the same size, so that no bitmap has to be filled; in process, with "
        "the library imported. `create` returns when the image is durable. Memory is what "
        "opening for writing and one 4 KiB read and write in the disk's middle add to the process; "
        "its limit is the same for every size.",
    )  # fmt: skip


def _jobs() -> Suite:
    peer = (Aim((QCOW2,), 1.0),)
    either = (Aim((QCOW2, PARALLEL), 1.0),)
    return Suite(
        "jobs", "Long verbs over 1 GiB, as commands",
        (
            Cell(
                "convert to raw", Job("convert out"), (MMCOW, QCOW2, PARALLEL), either, quick=True
            ),
            Cell("convert from raw", Job("convert in"), (MMCOW, QCOW2, PARALLEL), either),
            Cell("commit", Job("commit"), (MMCOW, QCOW2), peer),
            Cell("stream", Job("stream"), (MMCOW, QCOW2), peer),
        ),
        note="Against qemu-img with cache=none (convert: with io_uring, and the better of that "
        "and `-W -m 8`). qemu-img has no stream: `rebase -b ''` does the same.",
    )  # fmt: skip


def _start() -> Suite:
    return Suite(
        "start", "A short command",
        (
            Cell(
                "mmcow info", Start(), (MMCOW, PYTHON), (Aim((PYTHON,), 1 / 1.5),), quick=True
            ),
        ),
        note="A new process, the image's pages not in the cache, against `python -c pass`. The aim "
        "of 0.667 says: at most 1.5 times as long.",
    )  # fmt: skip


def _twice(name: str, work: Work, *, quick: bool = False) -> Cell:
    again = QCOW2 + AGAIN
    return Cell(name, work, (QCOW2, again), (Aim((again,), None),), quick=quick)


def _noise() -> Suite:
    return Suite(
        "noise", "A peer against itself",
        (
            _twice("4K read, QD 16, in process", Requests("read", 4 * KIB, 16), quick=True),
            _twice("4K write, QD 1, in process", Requests("write", 4 * KIB, 1)),
            _twice("4K first write, QD 16, in process", Requests("write", 4 * KIB, 16, "first")),
            _twice("4K read, QD 16, NBD", Served("read", 4 * KIB, 16), quick=True),
        ),
        note="How wide the interval is where the true ratio is 1.",
    )  # fmt: skip


SUITES: tuple[Suite, ...] = (
    _noise(), _mapped(), _raw(), _first(), _flush(), _sequential(), _nbd(), _connections(),
    _nbd_raw(), _copy(), _extents(), _life(), _jobs(), _start(),
)  # fmt: skip
