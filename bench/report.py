# SPDX-License-Identifier: MIT
"""The report: results/*.json as one page with tables and pictures.

Owns: report.md and the SVG files beside the results.
Never: measures, changes a result.

    python -m bench.report [DIR]
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from bench import plots
from bench.common import HERE, RESULTS, load_result
from bench.options import ended, folder
from bench.process import Failed
from bench.stats import MET, NOISE, SHORT, UNSURE
from bench.suites import SUITES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_MARKS = {
    MET: "met",
    NOISE: "met (within noise)",
    SHORT: "**short**",
    UNSURE: "too noisy to tell",
    None: "",
}
_EXTRAS = {
    "server_us": "server CPU, µs each", "client_us": "client CPU, µs each",
    "client_load": "client busy", "server_mib": "server memory, MiB",
    "server_cpu_s": "server CPU, s", "client_cpu_s": "client CPU, s", "process_mib": "process, MiB",
}  # fmt: skip
_INTRODUCTION = (
    "Made by `make bench` from `results/*.json`; how to read it: `bench/README.md`. Ratios "
    "above 1 mean that mmcow is faster (or smaller). Each is a median of rounds, with its interval."
)


def write(out: Path) -> Path:
    """Write the page and its pictures; returns the page."""
    results = [found for suite in SUITES if (found := load_result(out, suite.name))]
    parts = [_head(results)]
    for result in results:
        rows = _rows(result)
        if rows:
            picture = plots.draw(result["title"], rows)
            (out / RESULTS / f"{result['suite']}.svg").write_text(picture, encoding="utf-8")
        parts.append(_suite(result, has_picture=bool(rows)))
    path = out / "report.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def line(cell: dict[str, Any]) -> str:
    """A cell in one line, for a terminal."""
    for word in ("skipped", "failed"):
        if word in cell:
            return f"{cell['name']}: {word}: {cell[word]}"
    sides = ", ".join(f"{s} {_number(f['median'])}" for s, f in cell["sides"].items())
    found = "; ".join(
        f"{r['median']:.3g} ({r['low']:.3g} to {r['high']:.3g}) of {r['peer']}"
        + (f", aim {r['aim']:.3g}: {r['verdict']}" if r["aim"] else "")
        for r in cell["ratios"]
    )
    return f"{cell['name']}: {found} [{sides} {cell['unit']}, {cell['seconds']:.0f} s]"


# ---- the page -------------------------------------------------------------------------------


def _head(results: list[dict[str, Any]]) -> str:
    lines = ["# mmcow beside its peers", "", _INTRODUCTION, ""]
    if not results:
        return "\n".join([*lines, "Nothing has been measured yet.", ""])
    for host, suites in _hosts(results):
        lines += [f"**Host** ({', '.join(suites)}): {host}", ""]
    for text in dict.fromkeys(result["conditions"] for result in results):
        lines += [f"**Conditions**: {text}.", ""]
    lines += [
        "| suite | met | within noise | short | too noisy | not measured |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        counted = _count(result)
        lines.append(
            f"| [{result['title']}](#{result['suite']}) | {counted[MET]} | {counted[NOISE]} | "
            f"{counted[SHORT]} | {counted[UNSURE]} | {counted['none']} |"
        )
    return "\n".join([*lines, ""])


def _hosts(results: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Suites by the host that they were measured on: nothing is compared across hosts."""
    found: dict[str, list[str]] = {}
    for result in results:
        found.setdefault(_host(result["host"]), []).append(result["suite"])
    return list(found.items())


def _host(host: dict[str, Any]) -> str:
    programs = "; ".join(said for said in host["programs"].values() if said)
    return (
        f"{host['cpus']} CPUs {host['cpu']}, {host['memory_gib']} GiB; Linux {host['kernel']} "
        f"({host['machine']}); {host['file_system']} on {host['device']}; Python "
        f"{host['python']}; mmcow {host['mmcow']} ({host['commit'] or 'no commit'}); {programs}."
    )


def _count(result: dict[str, Any]) -> Counter[str]:
    counted: Counter[str] = Counter()
    for cell in [*result["cells"], {"ratios": result["overall"]}]:
        if "ratios" not in cell:
            counted["none"] += 1
            continue
        counted.update(ratio["verdict"] for ratio in cell["ratios"] if ratio["verdict"])
    return counted


def _suite(result: dict[str, Any], *, has_picture: bool) -> str:
    lines = [f'<a id="{result["suite"]}"></a>', "", f"## {result['title']}", ""]
    if result["note"]:
        lines += [result["note"], ""]
    if has_picture:
        lines += [f"![{result['title']}]({RESULTS}/{result['suite']}.svg)", ""]
    lines += [
        "| cell | measured | peer | ratio | interval | aim | |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in result["cells"]:
        lines += _cell_lines(cell)
    lines += [
        f"| all {found['cells']} of {found['of']}, geometric mean | | {found['peer']} | "
        f"{_ratio_columns(found)} |"
        for found in result["overall"]
    ]
    return "\n".join([*lines, "", *_extras(result)])


def _cell_lines(cell: dict[str, Any]) -> list[str]:
    for word in ("skipped", "failed"):
        if word in cell:
            reason = cell[word].replace("|", "\\|").replace("\n", " ")
            return [f"| {cell['name']} | {word}: {reason} | | | | | |"]
    measured = "; ".join(f"{s} {_number(f['median'])}" for s, f in cell["sides"].items())
    lines = []
    for number, ratio in enumerate(cell["ratios"]):
        first = f"{cell['name']} | {measured} {cell['unit']}" if not number else " | "
        peer = f"limit {ratio['limit']:g} {cell['unit']}" if "limit" in ratio else ratio["peer"]
        lines.append(f"| {first} | {peer} | {_ratio_columns(ratio)} |")
    return lines


def _ratio_columns(ratio: dict[str, Any]) -> str:
    aim = "" if ratio["aim"] is None else f"{ratio['aim']:.3g}"
    return (
        f"{ratio['median']:.3g} | {ratio['low']:.3g} to {ratio['high']:.3g} "
        f"({ratio['coverage']:.0%}) | {aim} | {_MARKS[ratio['verdict']]}"
    )


def _extras(result: dict[str, Any]) -> list[str]:
    """What else was seen, where there is something: mostly CPU time."""
    names = [
        name for name in _EXTRAS
        if any(name in side for c in result["cells"] for side in c.get("sides", {}).values())
    ]  # fmt: skip
    if not names:
        return []
    lines = [
        "| cell | side | " + " | ".join(_EXTRAS[name] for name in names) + " |",
        "|---|---" + "|---" * len(names) + "|",
    ]
    for cell in result["cells"]:
        for side, found in cell.get("sides", {}).items():
            shown = [_number(found[name]) if name in found else "" for name in names]
            if any(shown):
                lines.append(f"| {cell['name']} | {side} | {' | '.join(shown)} |")
    return [*lines, ""]


def _rows(result: dict[str, Any]) -> list[plots.Row]:
    rows = []
    for cell in result["cells"]:
        for ratio in cell.get("ratios", []):
            several = len(cell["ratios"]) > 1
            label = f"{cell['name']} : {ratio['peer']}" if several else cell["name"]
            rows.append(_row(label, ratio))
    return rows + [_row(f"all : {found['peer']}", found) for found in result["overall"]]


def _row(label: str, ratio: dict[str, Any]) -> plots.Row:
    return plots.Row(
        label, ratio["median"], ratio["low"], ratio["high"], ratio["aim"], ratio["verdict"]
    )


def _number(value: float) -> str:
    """1234.5 as 1,234 and 1.2345 as 1.23."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page again. Status 2: it could not be done."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description="Write report.md from results/*.json."
    )
    parser.add_argument(
        "dir", nargs="?", type=folder, default=HERE, metavar="DIR",
        help="where results/ is and report.md goes (default: bench)",
    )  # fmt: skip
    args = parser.parse_args(argv)

    def work() -> int:
        if not any((args.dir / RESULTS).glob("*.json")):
            raise Failed(f"{args.dir}: has no results/*.json")
        print(write(args.dir))
        return 0

    return ended("bench.report", work)


if __name__ == "__main__":
    sys.exit(main())
