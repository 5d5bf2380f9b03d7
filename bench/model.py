# SPDX-License-Identifier: MIT
"""The words of a suite: what is done (work), by whom (sides), and what is aimed at.

Owns: frozen data, and which unit each kind of work is counted in.
Never: starts anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

Op = Literal["read", "write"]
# mapped: the top layer has everything. first: it has nothing, a base lies below. raw: no layers.
Layout = Literal["mapped", "first", "raw"]


@dataclass(frozen=True)
class Work:
    """What every side of a cell does."""

    unit: ClassVar[str]
    higher_is_better: ClassVar[bool]


@dataclass(frozen=True)
class Transfers(Work):
    """Requests of one kind, ``depth`` of them in flight."""

    unit: ClassVar[str] = "requests/s"
    higher_is_better: ClassVar[bool] = True
    op: Op
    size: int
    depth: int
    layout: Layout = "mapped"
    sequential: bool = False


@dataclass(frozen=True)
class Requests(Transfers):
    """Inside one process; ``flush`` after each."""

    flush: bool = False


@dataclass(frozen=True)
class Served(Transfers):
    """Of fio to a server. ``depth`` is that of all connections together, unless a side says how
    many it uses."""


@dataclass(frozen=True)
class WholeDisk(Work):
    """nbdcopy between a server and nothing ("out") or a file and a server ("in")."""

    unit: ClassVar[str] = "s"
    higher_is_better: ClassVar[bool] = False
    direction: Literal["out", "in"]


@dataclass(frozen=True)
class Extents(Work):
    """A report of every extent of a large disk."""

    unit: ClassVar[str] = "s"
    higher_is_better: ClassVar[bool] = False
    how: Literal["in process", "command"]


@dataclass(frozen=True)
class Life(Work):
    """Creating or opening a disk over a base of the same size, in process."""

    unit: ClassVar[str] = "ms"
    higher_is_better: ClassVar[bool] = False
    act: Literal["create", "open"]
    size: int
    place: Literal["here", "xfs"] = "here"


@dataclass(frozen=True)
class Memory(Work):
    """Growth of resident memory by opening a disk and reading 4 KiB in its middle."""

    unit: ClassVar[str] = "KiB"
    higher_is_better: ClassVar[bool] = False
    size: int
    place: Literal["here", "xfs"] = "here"


@dataclass(frozen=True)
class Job(Work):
    """A long verb as a command, from its start to its end."""

    unit: ClassVar[str] = "s"
    higher_is_better: ClassVar[bool] = False
    verb: Literal["convert out", "convert in", "commit", "stream"]


@dataclass(frozen=True)
class Start(Work):
    """``mmcow info`` as a new process."""

    unit: ClassVar[str] = "ms"
    higher_is_better: ClassVar[bool] = False


@dataclass(frozen=True)
class Aim:
    """The ratio to the best of ``peers`` that is wanted; None: only shown."""

    peers: tuple[str, ...]
    at_least: float | None


@dataclass(frozen=True)
class Cell:
    """One line of the report. ``sides[0]`` is the one that the ratios are of.

    ``limit``: instead of a peer, a value in the work's unit that is not to be exceeded.
    """

    name: str
    work: Work
    sides: tuple[str, ...]
    aims: tuple[Aim, ...] = ()
    limit: float | None = None
    quick: bool = False


@dataclass(frozen=True)
class Suite:
    """Cells with one subject. ``overall``: aims for the geometric mean over the cells."""

    name: str
    title: str
    cells: tuple[Cell, ...]
    overall: tuple[Aim, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """What one side did once: ``value`` in the work's unit, and what else is worth a look."""

    value: float
    extras: dict[str, float] = field(default_factory=dict)


# ---- sides ----------------------------------------------------------------------------------

MMCOW = "mmcow"
QCOW2 = "qcow2"  # 64 KiB clusters, which is qemu-img's default
QCOW2_EL2 = "qcow2 el2"  # extended L2 entries, clusters of 128 KiB
FIO = "fio"
NBDKIT = "nbdkit"
PYTHON = "python"
PARALLEL = "qcow2 -W"  # qemu-img convert -W -m 8
FOUR = " x4"  # a suffix: four connections
AGAIN = " again"  # a suffix: the same once more, to see how wide noise is

PROGRAMS = {
    QCOW2: "qemu-img", QCOW2_EL2: "qemu-img", PARALLEL: "qemu-img", FIO: "fio", NBDKIT: "nbdkit",
}  # fmt: skip


def base_side(side: str) -> str:
    """Without its suffix."""
    return side.removesuffix(AGAIN).removesuffix(FOUR)


def programs(cell: Cell) -> set[str]:
    """What has to be installed for a cell."""
    found = {PROGRAMS[s] for side in cell.sides if (s := base_side(side)) in PROGRAMS}
    if isinstance(cell.work, Served | WholeDisk):
        found.discard("qemu-img")
        found |= {"qemu-nbd", "qemu-img"} if _uses_qemu(cell) else set()
        found.add("fio" if isinstance(cell.work, Served) else "nbdcopy")
    if isinstance(cell.work, Extents):
        found.add("qemu-io")
    return found


def _uses_qemu(cell: Cell) -> bool:
    return any(base_side(side).startswith(QCOW2) for side in cell.sides)
