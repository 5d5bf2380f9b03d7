# SPDX-License-Identifier: MIT
"""What ``mmcow bench`` found, for people and for programs.

Owns: the texts, and the JSON object (docs/cli.md lists its keys; programs rely on them).
Never: measures, writes.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from mmcow.cli import chart
from mmcow.cli.sizes import human_size
from mmcow.cli.ui import printable
from mmcow.jobs.bench import CPU_LEAST

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mmcow.image import Image
    from mmcow.jobs.bench import Run, Side, Spread
    from mmcow.jobs.latency import Histogram
    from mmcow.jobs.load import Load


# Of a run, for ``Side.spread``,
_iops = attrgetter("iops")
_bandwidth = attrgetter("bandwidth")
# and for ``Side.merged``.
_latency = attrgetter("latency")
_reads = attrgetter("reads")
_writes = attrgetter("writes")
_flushes = attrgetter("flushes")


class Style(NamedTuple):
    """What the terminal can do."""

    width: int
    unicode: bool


# ---- for people ----


def plan(load: Load) -> str:
    """The load in one line."""
    words = [operation(load)]
    if load.random:
        words.append(f"random (seed {load.seed})")
    elif load.order == "strided":
        words.append(f"every {human_size(load.step or 0)}")
    else:
        words.append("sequential")
    words += [human_size(load.block), f"depth {load.depth}"]
    if load.threads > 1:
        words.append(f"{load.threads} threads")
    if load.flush_every:
        how = "" if load.drain else " (not drained)"
        words.append(f"flush every {load.flush_every} writes{how}")
    return ", ".join(words)


def operation(load: Load) -> str:
    """In a word; for a mix with its shares."""
    if load.read_percent in (0, 100):
        return "read" if load.read_percent else "write"
    return f"{load.read_percent} % read, {100 - load.read_percent} % write"


def warning(load: Load, side: Side) -> str:
    """What a load that writes does to the disk."""
    start, end = load.reach(side.images[0].size)
    amount = ""
    if load.count is not None:
        writes = load.count * (100 - load.read_percent) // 100
        amount = f"{writes} x " if load.read_percent == 0 else f"about {writes} x "
    return (
        f"{side.name}: writing {amount}{human_size(load.block)} of bytes {load.pattern:#04x} "
        f"between {start} and {end}: what is there is lost"
    )


def runs_over(sides: Sequence[Side], repeat: int) -> str:
    """How far a measurement of ``repeat`` runs of each side came."""
    total = repeat * len(sides)
    over = sum(len(side.runs) for side in sides)
    if not over:
        return "no run was over, so there are no figures"
    return f"{over} of {total} runs were over" if over < total else "every run was over"


def text(sides: Sequence[Side], load: Load, style: Style, *, stopped: str = "") -> Iterator[str]:
    """All lines. ``stopped``: how far it came, where it did not come to its end."""
    yield plan(load)
    if stopped:
        yield f"interrupted: {stopped}"
    scale = chart.Scale.for_all([side.merged(_latency) for side in sides])
    for side in sides:
        yield ""
        yield from _side_text(side, load)
        yield from chart.draw(side.merged(_latency), scale, style.width, unicode=style.unicode)
    first = sides[0]
    for side in sides[1:]:
        yield ""
        yield _ratio_text(first, side)


def _queue(image: Image, load: Load) -> str:
    """What moved the data: one request at a time goes without a queue, as ``Image.read`` does."""
    if load.depth == 1 and image.engine.hits.path is not None:
        return "synchronous"
    return image.queue_backend


def _side_text(side: Side, load: Load) -> Iterator[str]:
    image = side.images[0]
    layer = image.chain[0]
    depth = f" over {len(image.chain) - 1} more" if len(image.chain) > 1 else ""
    yield (
        f"{printable(side.name)}: {layer.format}{depth}, cache {layer.cache}, "
        f"{_queue(image, load)}, {human_size(image.size)}"
    )
    rates = side.spread(_iops)
    seconds = sum(run.seconds for run in side.runs)
    count = sum(run.count for run in side.runs)
    bandwidth = human_size(int(side.spread(_bandwidth).median))
    yield f"  {_rate(rates.median)} IOPS, {bandwidth}/s ({count} requests in {seconds:.2f} s)"
    if len(side.runs) > 1:
        yield (
            f"  {len(side.runs)} runs: middle half {_rate(rates.low)} to {_rate(rates.high)}, "
            f"all {_rate(rates.min)} to {_rate(rates.max)} IOPS"
        )
    cpu = side.cpu
    if cpu is None:
        yield f"  CPU - per request (less than {CPU_LEAST:g} s in a run: --time makes longer ones)"
    else:
        yield f"  CPU {cpu.median:.2f} us per request"
    yield from _latency_text(side, load)
    by_python = sum(run.by_python for run in side.runs)
    if 0 < by_python < count:
        yield f"  {100 * by_python / count:.1f} % of the requests needed the engine's decision"


def _latency_text(side: Side, load: Load) -> Iterator[str]:
    rows = [("latency", side.merged(_latency))]
    if 0 < load.read_percent < 100:
        rows += [("reads", side.merged(_reads)), ("writes", side.merged(_writes))]
    flushes = side.merged(_flushes)
    if flushes.count:
        rows.append((f"{flushes.count} flushes", flushes))
    width = max(len(name) for name, _ in rows)
    for name, found in rows:
        if not found.count:
            continue
        marks = {"mean": found.mean, "min": float(found.least)}
        marks |= {f"p{p:g}": found.percentile(p) for p in (50, 90, 99, 99.9)}
        marks["max"] = float(found.most)
        figures = ", ".join(f"{key} {chart.human_time(ns)}" for key, ns in marks.items())
        yield f"  {name:<{width}} {figures}"


def _rate(value: float) -> str:
    """Four significant digits are more than repeats agree on."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _ratio_text(first: Side, side: Side) -> str:
    ratio = side.ratio(first)
    line = f"{printable(first.name)} has {ratio.median:.3f} times the IOPS of"
    line += f" {printable(side.name)}"
    if len(side.runs) > 1:
        line += (
            f" (middle half {ratio.low:.3f} to {ratio.high:.3f}, "
            f"all {ratio.min:.3f} to {ratio.max:.3f})"
        )
    return line


# ---- for programs ----


def as_json(sides: Sequence[Side], load: Load, *, interrupted: bool) -> dict[str, Any]:
    """One object: the load, the first side's figures, and the others' in "vs"."""
    first = sides[0]
    found = _load_json(load) | {"interrupted": interrupted} | _side_json(first, load)
    if len(sides) > 1:
        found["vs"] = [
            _side_json(side, load) | {"ratio": _spread_json(side.ratio(first))}
            for side in sides[1:]
        ]
    return found


def _load_json(load: Load) -> dict[str, Any]:
    mixed = 0 < load.read_percent < 100
    return {
        "operation": "mixed" if mixed else operation(load),
        "read_percent": load.read_percent,
        "order": load.order,
        "seed": load.seed if load.random or mixed else None,
        "buffer_size": load.block,
        "step_size": None if load.random else load.step or load.block,
        "depth": load.depth,
        "threads": load.threads,
        "offset": load.start,
        "length": load.length,
        "pattern": load.pattern if load.writes else None,
        "flush_interval": load.flush_every,
        "drain": load.drain,
    }


def _side_json(side: Side, load: Load) -> dict[str, Any]:
    """Figures of a side: medians of its runs; ``count``, ``seconds`` and latencies of all."""
    image = side.images[0]
    latency = side.merged(_latency)
    found: dict[str, Any] = {
        "filename": side.name,
        "format": image.format,
        "size": image.size,
        "layers": len(image.chain),
        "cache": image.chain[0].cache,
        "queue": _queue(image, load),
        "iops": _rounded(side.spread(_iops).median),
        "bandwidth": _rounded(side.spread(_bandwidth).median),
        "latency_us": latency.summary_us(),
        "cpu_us_per_io": None if side.cpu is None else _rounded(side.cpu.median),
        "count": sum(run.count for run in side.runs),
        "seconds": round(sum(run.seconds for run in side.runs), 6),
        "by_python": sum(run.by_python for run in side.runs),
        "spread": {
            "iops": _spread_json(side.spread(_iops)),
            "bandwidth": _spread_json(side.spread(_bandwidth)),
            "cpu_us_per_io": None if side.cpu is None else _spread_json(side.cpu),
        },
    }
    if 0 < load.read_percent < 100:
        found["reads"] = _kind_json(side.merged(_reads))
        found["writes"] = _kind_json(side.merged(_writes))
    if load.flush_every:
        found["flushes"] = _kind_json(side.merged(_flushes))
    found["runs"] = [_run_json(run) for run in side.runs]
    found["latency_histogram"] = [
        [bucket.start / 1000, bucket.end / 1000, bucket.requests] for bucket in latency.buckets()
    ]
    return found


def _run_json(run: Run) -> dict[str, Any]:
    return {
        "iops": _rounded(run.iops),
        "bandwidth": _rounded(run.bandwidth),
        "latency_us": run.latency.summary_us(),
        "cpu_us_per_io": _rounded_cpu(run, run.user + run.system),
        "user_us_per_io": _rounded_cpu(run, run.user),
        "system_us_per_io": _rounded_cpu(run, run.system),
        "count": run.count,
        "flushes": run.flushes.count,
        "seconds": round(run.seconds, 6),
        "by_python": run.by_python,
    }


def _kind_json(histogram: Histogram) -> dict[str, Any]:
    return {"count": histogram.count, "latency_us": histogram.summary_us()}


def _spread_json(spread: Spread) -> dict[str, float]:
    return {name: _rounded(value) for name, value in spread._asdict().items()}


def _rounded(value: float) -> float:
    """Every figure that stands in more than one place: equal ones stay equal."""
    return float(f"{value:.7g}")


def _rounded_cpu(run: Run, seconds: float) -> float | None:
    return None if run.cpu_us_per_io is None else _rounded(1e6 * seconds / run.count)
