# SPDX-License-Identifier: MIT
"""Which cluster size should add-cow have by default?

Measures, for each cluster size and at 1 and 16 requests in flight: first writes over a base (4 KiB
and 64 KiB at random, 1 MiB in sequence), pairs of write and flush, and reads of 1 MiB where small
writes have scattered the disk over two layers; also what an image of 1 TiB costs to create and
open. In process, through the engine. Prints a table, writes ``bench/results/cluster_size.json``.

    .venv/bin/python -m bench.cluster_size [--rounds N] [--dir FOLDER] [--conditions TEXT]
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mmcow
from bench.common import Spread, describe_host, interleave, save, size_name
from bench.options import add_conditions, ended, folder, seconds, whole_number
from mmcow.native import aligned

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
CLUSTER_SIZES = [4 * KIB << n for n in range(10)]  # 4 KiB to 2 MiB


class Workload(NamedTuple):
    """``most``: requests at 1 in flight; four times as many at 16. Time may end a cell early."""

    name: str
    length: int
    sequential: bool
    flush: bool  # after each write
    most: int
    scatter: int = 0  # 4 KiB writes put into the range first; the requests are then reads


WORKLOADS = (
    Workload("4 KiB random", 4 * KIB, sequential=False, flush=False, most=400),
    Workload("64 KiB random", 64 * KIB, sequential=False, flush=False, most=300),
    Workload("1 MiB sequential", MIB, sequential=True, flush=False, most=100),
    Workload("4 KiB write+flush", 4 * KIB, sequential=False, flush=True, most=150),
    Workload("1 MiB read, scattered", MIB, sequential=True, flush=False, most=100, scatter=1500),
)
DEPTHS = (1, 16)


class Cell(NamedTuple):
    """One figure of the table."""

    workload: Workload
    depth: int
    cluster: int


class Bench:
    """A folder with a base, in which images come and go."""

    def __init__(self, folder: Path, base_size: int, seconds: float, seed: int) -> None:
        self.folder = folder
        self.base = folder / "base.raw"
        self.base_size = base_size
        self.seconds = seconds
        self.rng = random.Random(seed)
        block = self.rng.randbytes(MIB)
        with self.base.open("wb") as file:
            for number in range(base_size // MIB):
                file.write(number.to_bytes(8, "little") + block[8:])
            os.fsync(file.fileno())

    def measure(self, cell: Cell) -> dict[str, float]:
        """Run one cell on a new image."""
        path = self.folder / "image"
        for name in (path, self.folder / "image.raw"):
            with suppress(FileNotFoundError):
                name.unlink()
        mmcow.create(
            path, backing="base.raw", backing_format="raw",
            options={"cluster_size": str(cell.cluster)},
        )  # fmt: skip
        offsets = self._offsets(cell)
        with mmcow.open(path, write=True, cache="none") as image:
            self._scatter(image, cell)
            wall, cpu = time.perf_counter(), time.process_time()
            done = _drive(image, cell, offsets, wall + self.seconds)
            image.flush()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            stored = (self.folder / "image.raw").stat().st_blocks * 512
        return {
            "per_second": done / wall,
            "cpu_us": cpu / done * 1e6,
            "stored_per_write": stored / done,
        }

    def _scatter(self, image: mmcow.Image, cell: Cell) -> None:
        """One write per 64 KiB or so, over what the cell at 1 in flight reads."""
        workload = cell.workload
        if not workload.scatter:
            return
        blocks = self.rng.sample(range(workload.most * MIB // (4 * KIB)), workload.scatter)
        _drive(image, Cell(WORKLOADS[0], 16, cell.cluster), iter([b * 4 * KIB for b in blocks]))
        image.flush()

    def _offsets(self, cell: Cell) -> Iterator[int]:
        """Every write meets a cluster that is not allocated yet (or several)."""
        workload = cell.workload
        most = workload.most * (4 if cell.depth > 1 and not workload.scatter else 1)
        if workload.sequential:
            return iter(range(0, min(most * workload.length, self.base_size), workload.length))
        unit = max(cell.cluster, workload.length)
        units = self.rng.sample(range(self.base_size // unit), min(most, self.base_size // unit))
        step = unit // workload.length
        offsets = [u * unit + self.rng.randrange(step) * workload.length for u in units]
        return iter(offsets)


def _drive(
    image: mmcow.Image, cell: Cell, offsets: Iterator[int], end: float = float("inf")
) -> int:
    """Keep ``depth`` requests in flight until the offsets or the time run out."""
    engine, reactor = image.engine, image.reactor
    done = 0

    async def worker() -> None:
        nonlocal done
        data = aligned(cell.workload.length)
        data[:] = random.Random(1).randbytes(len(data))
        for offset in offsets:
            if cell.workload.scatter:
                await engine.read(offset, data)
            else:
                await engine.write(offset, data)
            if cell.workload.flush:
                await engine.flush()
            done += 1
            if time.perf_counter() > end:
                return

    with reactor.lock:
        workers = [reactor.spawn(worker()) for _ in range(cell.depth)]
    for task in workers:
        reactor.wait(task)
    return done


def measure_large(folder: Path, cluster: int) -> dict[str, float]:
    """Create and open a disk of 1 TiB over a base as large; all sparse."""
    base, path = folder / "large-base.raw", folder / "large"
    with base.open("wb") as file:
        file.truncate(TIB)
    options = {"cluster_size": str(cluster)}
    start = time.perf_counter()
    mmcow.create(path, backing=base.name, backing_format="raw", options=options)
    created = time.perf_counter()
    with mmcow.open(path, write=True) as image:
        opened = time.perf_counter()
        image.read(TIB // 2, 4096)
    found = {
        "create_ms": (created - start) * 1000,
        "open_ms": (opened - created) * 1000,
        "bitmap_bytes": float(path.stat().st_size),
        "bitmap_stored": float(path.stat().st_blocks * 512),
    }
    for name in (base, path, folder / "large.raw"):
        name.unlink()
    start = time.perf_counter()
    mmcow.create(path, size=TIB, options=options)  # no base: a bitmap of ones
    found["create_without_base_ms"] = (time.perf_counter() - start) * 1000
    for name in (path, folder / "large.raw"):
        name.unlink()
    return found


def table(cells: dict[Cell, dict[str, Spread]], large: dict[int, dict[str, Spread]]) -> str:
    """For people."""
    lines = []
    for workload in WORKLOADS:
        for depth in DEPTHS:
            lines.append(f"\n{workload.name}, {depth} in flight")
            lines.append(
                f"{'cluster':>8} {'per s':>8} {'quartiles':>15} {'CPU us':>7} {'KiB stored':>11}"
            )
            for cluster in CLUSTER_SIZES:
                found = cells[Cell(workload, depth, cluster)]
                speed = found["per_second"]
                lines.append(
                    f"{size_name(cluster):>8} {speed.median:>8.0f} "
                    f"{f'{speed.low:.0f}-{speed.high:.0f}':>15} {found['cpu_us'].median:>7.0f} "
                    f"{found['stored_per_write'].median / 1024:>11.0f}"
                )
    lines.append("\nan image of 1 TiB")
    lines.append(
        f"{'cluster':>8} {'create ms':>10} {'open ms':>8} {'bitmap KiB':>11} {'ms, no base':>12}"
    )
    for cluster in CLUSTER_SIZES:
        found = large[cluster]
        lines.append(
            f"{size_name(cluster):>8} {found['create_ms'].median:>10.1f} "
            f"{found['open_ms'].median:>8.1f} {found['bitmap_bytes'].median / 1024:>11.0f} "
            f"{found['create_without_base_ms'].median:>12.1f}"
        )
    return "\n".join(lines)


def as_json(
    cells: dict[Cell, dict[str, Spread]], large: dict[int, dict[str, Spread]]
) -> dict[str, list[dict[str, Any]]]:
    """For programs."""
    return {
        "cells": [
            {
                "workload": cell.workload.name,
                "in_flight": cell.depth,
                "cluster_size": cell.cluster,
                **{name: spread.as_json() for name, spread in found.items()},
            }
            for cell, found in cells.items()
        ],
        "image_of_1_tib": [
            {"cluster_size": cluster, **{name: s.as_json() for name, s in found.items()}}
            for cluster, found in large.items()
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Status 2: it could not be done."""
    args = _parse(argv)
    return ended("bench.cluster_size", partial(_main, args))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cluster_size", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--rounds", type=whole_number(1), default=9, metavar="N", help="runs of each cell (9)"
    )
    parser.add_argument(
        "--seconds", type=seconds, default=1.0, metavar="S", help="longest time of one cell (1)"
    )
    parser.add_argument(
        "--base-size", type=whole_number(1), default=1, metavar="N", help="GiB of the disk (1)"
    )
    parser.add_argument(
        "--dir", type=folder, metavar="DIR", help="where to measure (default: a temporary folder)"
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=1, metavar="N", help="of content and order (1)"
    )
    add_conditions(parser)
    parser.add_argument("--name", default="cluster_size", help="of the result file (cluster_size)")
    return parser.parse_args(argv)


def _main(args: argparse.Namespace) -> int:
    place = Path(tempfile.mkdtemp(prefix="mmcow-bench-", dir=args.dir))
    try:
        bench = Bench(place, args.base_size * GIB, args.seconds, args.seed)
        matrix = [Cell(w, depth, c) for w in WORKLOADS for depth in DEPTHS for c in CLUSTER_SIZES]
        cells = interleave(matrix, bench.measure, rounds=args.rounds, seed=args.seed)
        large = interleave(
            CLUSTER_SIZES, lambda c: measure_large(place, c), rounds=args.rounds, seed=args.seed
        )
        host = describe_host(place)
    finally:
        shutil.rmtree(place)
    print(table(cells, large))
    result = {
        "bench": "cluster_size",
        "when": datetime.now(UTC).strftime("%Y-%m-%d"),
        "host": host,
        "conditions": args.conditions,
        "parameters": {
            "rounds": args.rounds, "seconds": args.seconds, "base_gib": args.base_size,
            "seed": args.seed, "cache": "none",
        },
        **as_json(cells, large),
    }  # fmt: skip
    print(f"\nwritten to {save(args.name, result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
