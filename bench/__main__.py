# SPDX-License-Identifier: MIT
"""``python -m bench``: run suites, write their results and the report.

Owns: the command line, which cells are run, the results' files.
Never: measures.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bench import report
from bench.common import RESULTS, describe_host, load_result, save
from bench.lab import FULL, QUICK, Lab
from bench.options import add_conditions, ended, folder, whole_number
from bench.process import Failed
from bench.runner import overall, run_cell
from bench.suites import SUITES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.model import Cell, Suite

HERE = Path(__file__).parent
QUICK_OUT = HERE.parent / "build" / "bench"
ROUNDS = 6
ROUNDS_QUICK = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Status 0: measured, whatever the verdicts; 1: a cell failed; 2: nothing could be done."""
    args = _parse(argv)
    said = "interrupted; the suites that were complete are written"
    return ended("bench", partial(_main, args), interrupted=said)


def _main(args: argparse.Namespace) -> int:
    suites = [s for s in SUITES if not args.suite or s.name in args.suite]
    if not any(_cells(suite, args) for suite in suites):
        patterns = ", ".join(map(repr, args.cell))
        raise Failed(f"--cell {patterns}: no such cell here; --list shows which there are")
    if args.list:
        _list(suites, args)
        return 0
    out = args.out or (QUICK_OUT if args.quick else HERE)
    (out / RESULTS).mkdir(parents=True, exist_ok=True)
    for suite in SUITES:
        load_result(out, suite.name)  # what is damaged is told now, not when all is measured
    signal.signal(signal.SIGTERM, _terminated)  # so that everything is cleaned up
    with Lab(args.dir, QUICK if args.quick else FULL, args.seed) as lab:
        try:
            failed = _run(lab, suites, args, out)
        finally:
            print(f"report: {report.write(out)}")
    return 1 if failed else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure mmcow beside other programs."
    )
    names = [suite.name for suite in SUITES]
    parser.add_argument("--quick", action="store_true", help="a few cells, small disks, short runs")
    parser.add_argument(
        "--suite", action="append", choices=names, metavar="NAME",
        help=f"only this one; may be given several times ({', '.join(names)})",
    )  # fmt: skip
    parser.add_argument(
        "--cell", action="append", metavar="PATTERN",
        help="only cells whose names match (* ? []); may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=whole_number(5), metavar="N",
        help=f"runs of each side of a cell, at least 5 ({ROUNDS}; quick: {ROUNDS_QUICK})",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="where results/ and report.md go (default: bench, or build/bench for --quick)",
    )  # fmt: skip
    parser.add_argument(
        "--dir", type=folder, default=Path("/var/tmp"), metavar="DIR",
        help="on the file system that is measured (default: /var/tmp)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=whole_number(0), default=1, metavar="N", help="of the disks' content"
    )
    add_conditions(parser)
    parser.add_argument("--list", action="store_true", help="show what would be measured")
    args = parser.parse_args(argv)
    args.repeats = args.repeats or (ROUNDS_QUICK if args.quick else ROUNDS)
    return args


def _terminated(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _cells(suite: Suite, args: argparse.Namespace) -> list[Cell]:
    return [
        cell
        for cell in suite.cells
        if (cell.quick or not args.quick)
        and (not args.cell or any(fnmatch(cell.name, pattern) for pattern in args.cell))
    ]


def _list(suites: Sequence[Suite], args: argparse.Namespace) -> None:
    for suite in suites:
        for cell in _cells(suite, args):
            print(f"{suite.name}: {cell.name}: {', '.join(cell.sides)}")


def _run(lab: Lab, suites: Sequence[Suite], args: argparse.Namespace, out: Path) -> bool:
    """Whether anything failed."""
    host = describe_host(lab.folder)
    begin = time.monotonic()
    failed = False
    for suite in suites:
        cells = _cells(suite, args)
        results = []
        for cell in cells:
            result = run_cell(lab, cell, args.repeats)
            results.append(result | {"when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M")})
            failed |= "failed" in result
            print(f"{time.monotonic() - begin:5.0f} s  {suite.name}: {report.line(result)}")
            sys.stdout.flush()
        # Where nothing could be measured an earlier result is better than none.
        if not all("failed" in result for result in results):
            _save(suite, results, host, args, out)
    return failed


def _save(
    suite: Suite, results: list[dict[str, Any]], host: dict[str, Any], args: argparse.Namespace,
    out: Path,
) -> None:  # fmt: skip
    """Cells of an earlier call stay, if it was the same host and mmcow and they were not run."""
    parameters = {"quick": args.quick, "seed": args.seed}
    old = load_result(out, suite.name)
    if old and old["host"] == host and old["parameters"] == parameters and args.cell:
        new = {cell["name"]: cell for cell in results}
        kept = {cell["name"]: cell for cell in old["cells"]} | new
        results = [kept[cell.name] for cell in suite.cells if cell.name in kept]
    result = {
        "suite": suite.name,
        "title": suite.title,
        "note": suite.note,
        "host": host,
        "conditions": args.conditions,
        "parameters": parameters,
        "overall": overall(suite, results),
        "cells": results,
    }
    save(suite.name, result, out)


if __name__ == "__main__":
    sys.exit(main())
