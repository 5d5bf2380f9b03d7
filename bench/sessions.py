# SPDX-License-Identifier: MIT
"""How each kind of work is done: what is set up for a cell, and what one side does once.

Owns: the way from a cell to a function ``measure(side) -> Sample``; strides, counts.
Never: decides the order of sides, computes ratios.
"""

from __future__ import annotations

import math
import random
import sys
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from bench import ours, peers
from bench.lab import PERIOD, data_file
from bench.model import (
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
    Cell,
    Extents,
    Job,
    Life,
    Memory,
    Requests,
    Sample,
    Served,
    Start,
    Transfers,
    WholeDisk,
    Work,
    base_side,
)
from bench.process import Failed, seconds_of
from bench.servers import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from bench.lab import Lab
    from bench.servers import Server

    Measure = Callable[[str], Sample]
    Session = Callable[[Lab, Cell], AbstractContextManager[Measure]]

_TRIAL_BYTES = 64 * MIB
_TRIAL_MOST = 3000
_TRIAL_SLOW = 200  # of what allocates or flushes
_LEAST = 50
_SLOWER_MOST = 4  # times as long as asked for, for the slowest side
_GOLDEN_NEAR = 64
_LARGEST_CLUSTER = 128 * KIB
_CLUSTERS_MOST = 8000
_REPEATED_MOST = 0.02  # of random first writes; n of N blocks repeat n / 2N of them
_STARTS = 20


# ---- counts and strides ---------------------------------------------------------------------


@lru_cache
def stride(disk: int, size: int, *, sequential: bool = False) -> int:
    """The step between requests. Not in sequence: about the golden part of the disk, so that
    every block is visited once before any a second time, and never near the one before; of such
    steps the one that meets the most clusters before it comes back to any."""
    if sequential:
        return size
    blocks = disk // size
    golden = round(blocks * (math.sqrt(5) - 1) / 2)
    near = range(max(1, golden - _GOLDEN_NEAR), golden + _GOLDEN_NEAR + 1)
    steps = [step * size for step in near if math.gcd(step, blocks) == 1]
    return max(steps, key=lambda step: clusters_met(disk, step))


def clusters_met(disk: int, step: int) -> int:
    """How many requests of a stride are each in another one of the largest clusters."""
    met: set[int] = set()
    offset = 0
    while offset // _LARGEST_CLUSTER not in met and len(met) < _CLUSTERS_MOST:
        met.add(offset // _LARGEST_CLUSTER)
        offset = (offset + step) % disk
    return len(met)


def count_most(work: Transfers, disk: int) -> int:
    """Beyond that a stride would meet blocks (for first writes: clusters) a second time, and
    random first writes would too often do so."""
    if work.layout == "first" and not work.sequential:
        met = clusters_met(disk, stride(disk, work.size))
        return min(met, int(2 * _REPEATED_MOST * disk / work.size))
    return disk // work.size


def trial_count(work: Transfers, most: int) -> int:
    """How many requests tell the speed."""
    slow = work.layout == "first" or (isinstance(work, Requests) and work.flush)
    return min(_TRIAL_BYTES // work.size, _TRIAL_SLOW if slow else _TRIAL_MOST, most)


def count_for(rates: list[float], seconds: float, most: int) -> int:
    """As many as the fastest side does in that time, unless the slowest would take far longer."""
    wanted = min(max(rates) * seconds, min(rates) * seconds * _SLOWER_MOST, most)
    return max(_LEAST, int(wanted))


def _calibrate(
    lab: Lab, cell: Cell, work: Transfers, measure: Callable[[str, int], Sample]
) -> Measure:
    """Each side runs once unrecorded, which also warms what is warm in every run after."""
    most = count_most(work, lab.scale.disk)
    trial = trial_count(work, most)
    rates = [measure(side, trial).value for side in cell.sides]
    return partial(_with_count, measure, count_for(rates, lab.scale.seconds, most))


def _warmed(cell: Cell, measure: Measure) -> Measure:
    """Each side runs once unrecorded, which warms what is warm in every run after."""
    for side in cell.sides:
        measure(side)
    return measure


def _with_count(measure: Callable[[str, int], Sample], count: int, side: str) -> Sample:
    sample = measure(side, count)
    return Sample(sample.value, {**sample.extras, "requests": count})


# ---- requests in one process ----------------------------------------------------------------


@contextmanager
def requests(lab: Lab, cell: Cell) -> Iterator[Measure]:
    """``mmcow bench``, ``qemu-img bench``, fio."""
    work, disk = cell.work, lab.scale.disk
    assert isinstance(work, Requests)
    step = stride(disk, work.size, sequential=work.sequential)

    def measure(side: str, count: int) -> Sample:
        side = base_side(side)
        if side == FIO:
            return peers.fio_file(lab.raw("flat", disk), disk, work, count)
        if work.layout == "raw":
            return ours.bench(lab.raw("flat", disk), "raw", work, count, lab.seed)
        image = lab.fresh(side) if work.layout == "first" else lab.mapped(side, disk)
        if side == MMCOW:
            return ours.bench(image, ours.FORMAT, work, count, lab.seed)
        return peers.bench(image, work, count, step)

    yield _calibrate(lab, cell, work, measure)


# ---- NBD ------------------------------------------------------------------------------------


def _server(lab: Lab, side: str, layout: str, size: int) -> AbstractContextManager[Server]:
    socket = lab.folder / "socket"
    if layout == "raw":
        path = lab.raw("flat", size)
        if side == NBDKIT:
            return serving(peers.nbdkit(path, socket), socket)
        return serving(ours.serve(path, "raw", "writeback", socket), socket)
    image = lab.fresh(side) if layout == "first" else lab.mapped(side, size)
    return _layer_server(side, image, socket)


def _layer_server(side: str, image: Path, socket: Path) -> AbstractContextManager[Server]:
    if side == MMCOW:
        return serving(ours.serve(image, ours.FORMAT, "none", socket), socket)
    return serving(peers.qemu_nbd(image, socket), socket)


@contextmanager
def served(lab: Lab, cell: Cell) -> Iterator[Measure]:
    """Requests of fio at a server of its own in each run."""
    work = cell.work
    assert isinstance(work, Served)

    def measure(side: str, count: int) -> Sample:
        connections = 4 if side.endswith(FOUR) else 1
        with _server(lab, base_side(side), work.layout, lab.scale.disk) as server:
            if work.layout == "raw":
                # mmcow reads what the disk has, not what a sync that failed in another process
                # left in the page cache: as a writer it empties that of the file it opens.
                lab.warm(lab.raw("flat", lab.scale.disk))
            before = server.cpu()
            sample = peers.fio_nbd(
                server.socket, work, count, once=work.layout == "first", connections=connections
            )
            used, memory = server.cpu() - before, server.memory()
        if work.layout == "raw":
            lab.sync(lab.raw("flat", lab.scale.disk))  # what was written is not the next one's
        done = sample.extras["requests"]
        client = sample.extras["cpu_s"]
        extras = {
            "server_us": used / done * 1e6,
            "client_us": client / done * 1e6,
            "client_load": client / sample.extras["seconds"],
            "server_mib": memory / MIB,
        }
        return Sample(sample.value, extras)

    cached = lab.cached(lab.raw("flat", lab.scale.disk)) if work.layout == "raw" else nullcontext()
    with cached:
        yield _calibrate(lab, cell, work, measure)


@contextmanager
def whole_disk(lab: Lab, cell: Cell) -> Iterator[Measure]:
    """Copies by nbdcopy."""
    work, size = cell.work, lab.scale.job_disk
    assert isinstance(work, WholeDisk)
    source = lab.raw("flat", size)

    def measure(side: str) -> Sample:
        if work.direction == "out":
            serve = _server(lab, side, "mapped", size)
        else:
            image = lab.create(side, lab.folder / f"copy-{side}", lab.raw("base", size))
            serve = _layer_server(side, image, lab.folder / "socket")
        with serve as server:
            before = server.cpu()
            ended = (
                peers.nbdcopy_out(server.socket)
                if work.direction == "out"
                else peers.nbdcopy_in(source, server.socket)
            )
            used = server.cpu() - before
        return Sample(ended.wall, {"server_cpu_s": used, "client_cpu_s": ended.cpu})

    yield _warmed(cell, measure)


# ---- extents --------------------------------------------------------------------------------


@contextmanager
def extents(lab: Lab, cell: Cell) -> Iterator[Measure]:
    """In process, or as commands."""
    work = cell.work
    assert isinstance(work, Extents)
    expected = 2 * (lab.scale.wide // PERIOD)
    found = len(peers.extents_of(lab.wide(QCOW2)))
    if found != expected:
        raise Failed(f"qemu-img map tells of {found} extents, not {expected}")

    def measure(side: str) -> Sample:
        image = lab.wide(side)
        if side == QCOW2:
            return Sample(peers.map_command(image))
        if work.how == "command":
            return Sample(ours.map_command(image))
        said = ours.inside("extents", image)
        if said["extents"] != expected:
            raise Failed(f"block_status tells of {said['extents']:.0f} extents, not {expected}")
        return Sample(said["seconds"])

    yield _warmed(cell, measure)


# ---- creating, opening, starting ------------------------------------------------------------


@contextmanager
def life(lab: Lab, cell: Cell) -> Iterator[Measure]:
    """A process of its own for each figure."""
    work = cell.work
    assert isinstance(work, Life | Memory)
    folder = lab.place(work.place)
    base = lab.sparse("life-base.raw", work.size, folder)

    def measure(side: str) -> Sample:
        del side
        lab.remove(folder / "life")
        if isinstance(work, Memory):
            said = ours.inside("memory", folder, str(work.size))
            return Sample(max(said["kib"], 4.0), {"process_mib": said["process_kib"] / KIB})
        return Sample(ours.inside(work.act, folder, str(work.size))["ms"])

    try:
        yield measure
    finally:
        for name in (folder / "life", data_file(folder / "life"), base):
            name.unlink(missing_ok=True)


@contextmanager
def start(lab: Lab, cell: Cell) -> Iterator[Measure]:
    """The mean of a few processes."""
    assert isinstance(cell.work, Start)
    image = lab.create(MMCOW, lab.folder / "info", lab.sparse("info-base.raw", GIB))

    def measure(side: str) -> Sample:
        command = [sys.executable, "-c", "pass"]
        if side != PYTHON:
            command = ours.info_command(image)
        seconds = 0.0
        for _ in range(_STARTS):
            lab.settle(image)
            seconds += seconds_of(command)
        return Sample(seconds / _STARTS * 1000)

    yield _warmed(cell, measure)


# ---- jobs -----------------------------------------------------------------------------------


@contextmanager
def job(lab: Lab, cell: Cell) -> Iterator[Measure]:
    """Whatever a run needs anew is made, and settled, before its clock starts."""
    work = cell.work
    assert isinstance(work, Job)
    action = {
        "convert out": _convert_out, "convert in": _convert_in,
        "commit": _commit, "stream": _stream,
    }[work.verb]  # fmt: skip
    yield _warmed(cell, lambda side: Sample(action(lab, side)))


def _convert_out(lab: Lab, side: str) -> float:
    size, target = lab.scale.job_disk, lab.folder / "converted.raw"
    target.unlink(missing_ok=True)
    if side == MMCOW:
        seconds = ours.convert(lab.mapped(MMCOW, size), ours.FORMAT, target, "raw")
    else:
        peers.create_alone(target, "raw", size)
        source = lab.mapped(QCOW2, size)
        seconds = peers.convert(source, "qcow2", target, "raw", parallel=side == PARALLEL)
    _expect_same(target, lab.raw("base", size), lab.seed)
    target.unlink()
    return seconds


def _convert_in(lab: Lab, side: str) -> float:
    size, target = lab.scale.job_disk, lab.folder / "converted"
    source = lab.raw("flat", size)
    lab.remove(target)
    if side == MMCOW:
        seconds = ours.convert(source, "raw", target, ours.FORMAT)
    else:
        peers.create_alone(target, "qcow2", size)
        seconds = peers.convert(source, "raw", target, "qcow2", parallel=side == PARALLEL)
    lab.remove(target)
    return seconds


def _commit(lab: Lab, side: str) -> float:
    base = lab.raw("base", lab.scale.job_disk)
    image = lab.fill(side, lab.folder / f"job-{side}", base)
    seconds = ours.commit(image) if side == MMCOW else peers.commit(image, base)
    lab.remove(image)
    return seconds


def _stream(lab: Lab, side: str) -> float:
    base = lab.raw("base", lab.scale.job_disk)
    image = lab.create(side, lab.folder / f"job-{side}", base)
    seconds = ours.stream(image) if side == MMCOW else peers.stream(image, base)
    if lab.data_bytes(image) < lab.scale.job_disk:
        raise Failed(f"{side}: stream left {lab.data_bytes(image)} bytes in the layer")
    lab.remove(image)
    return seconds


def _expect_same(found: Path, wanted: Path, seed: int) -> None:
    """A look at some blocks: a job that copies nothing would be very fast."""
    rng = random.Random(seed)
    size = wanted.stat().st_size
    if found.stat().st_size != size:
        raise Failed(f"{found.name} has {found.stat().st_size} bytes, not {size}")
    with found.open("rb") as one, wanted.open("rb") as other:
        for _ in range(64):
            offset = rng.randrange(size // MIB) * MIB
            one.seek(offset)
            other.seek(offset)
            if one.read(4 * KIB) != other.read(4 * KIB):
                raise Failed(f"{found.name} differs from {wanted.name} at {offset}")


SESSIONS: dict[type[Work], Session] = {
    Requests: requests, Served: served, WholeDisk: whole_disk, Extents: extents, Life: life,
    Memory: life, Job: job, Start: start,
}  # fmt: skip
