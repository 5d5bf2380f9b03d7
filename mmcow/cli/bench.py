# SPDX-License-Identifier: MIT
"""``mmcow bench``.

Owns: the verb's options (qemu-img bench's mean the same), opening what is measured, what is said.
Never: makes requests (``jobs.load``), counts (``jobs.bench``), draws (``plot``, ``chart``).
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from mmcow.cli import bench_report, chart, exits, plot, terminal
from mmcow.cli.images import opened
from mmcow.cli.options import (
    Parser,
    add_backing_format,
    add_cache,
    add_format,
    add_progress,
    add_quiet,
    add_share,
    number_argument,
    refuse_qemu,
    size_argument,
)
from mmcow.cli.progress import meter
from mmcow.cli.ui import CommandLineError
from mmcow.errors import Cancelled, UsageError
from mmcow.jobs.bench import Side, measure
from mmcow.jobs.load import SECONDS_MOST, Load
from mmcow.storage.linux import LinuxHost, NativeQueue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mmcow.cli.ui import Ui
    from mmcow.image import Image

COUNT = 75000
REPEAT_VS = 5
# qemu-img's words for how requests reach the kernel, and the queue that is meant.
_QUEUES = {"threads": "threads", "native": "auto", "io_uring": "io_uring"}


def configure_bench(parser: Parser) -> None:
    """Add the verb's options."""
    add_format(parser)
    add_backing_format(parser)
    _add_requests(parser)
    _add_writes(parser)
    add_cache(parser)
    parser.add_argument(
        "-i", "--aio", choices=tuple(_QUEUES),
        help="how requests reach the kernel (native: as its default is, io_uring where it can)",
    )  # fmt: skip
    parser.add_argument(
        "-n",
        "--native",
        dest="aio",
        action="store_const",
        const="native",
        help="short for -i native",
    )
    add_share(parser)
    parser.add_argument(
        "--vs", metavar="FILE2", action="append", default=[],
        help="measure this one too, in turn with FILE, and compare; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--vs-format", metavar="FMT", help="format of what --vs names (default: by its first bytes)"
    )
    parser.add_argument(
        "--repeat", type=number_argument("repeat", 1, 10**6), metavar="N",
        help=f"how many runs; figures are their medians (1; {REPEAT_VS} with --vs)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--plot", metavar="PICTURE",
        help="draw the latencies into this file, named .svg or .png (which needs Pillow)",
    )  # fmt: skip
    add_progress(parser, short=False)
    add_quiet(parser)
    refuse_qemu(parser)
    parser.add_argument("file", metavar="FILE", help="an image, a raw file or a block device")
    parser.examples(
        "mmcow bench --random disk.raw",
        "mmcow bench -c 10000 -d 1 -w --pattern 0xaa --flush-interval=1 scratch.acow",
        "mmcow bench --random --mix 70 --time 30 --json scratch.raw",
        "mmcow bench --random -d 16 a.acow --vs b.raw --plot compared.svg",
    )


def _add_requests(parser: Parser) -> None:
    parser.add_argument(
        "-c", "--count", type=number_argument("count", 1), metavar="COUNT",
        help=f"how many requests ({COUNT}; without --time)",
    )  # fmt: skip
    parser.add_argument(
        "--time", type=_seconds, metavar="SECONDS",
        help="end after so long; with -c at what comes first",
    )  # fmt: skip
    parser.add_argument(
        "-d", "--depth", type=number_argument("depth", 1), default=64, metavar="DEPTH",
        help="how many requests are in flight (64)",
    )  # fmt: skip
    parser.add_argument(
        "-s", "--buffer-size", type=size_argument("buffer size"), default=4096, metavar="SIZE",
        help="bytes of a request (4k)",
    )  # fmt: skip
    parser.add_argument(
        "-S", "--step-size", type=size_argument("step size"), metavar="SIZE",
        help="from the start of one request to the next, round the disk (as -s)",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--offset", type=size_argument("offset"), default=0, metavar="OFF",
        help="where to begin (0)",
    )  # fmt: skip
    parser.add_argument(
        "--length", type=size_argument("length"), metavar="LEN",
        help="keep to so many bytes from there (to the end)",
    )  # fmt: skip
    parser.add_argument("--random", action="store_true", help="in random order")
    parser.add_argument(
        "--seed", type=number_argument("seed", 0), metavar="N",
        help="of the random order and the mix (0): the same requests every time",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=number_argument("threads", 1), default=1, metavar="N",
        help="so many threads, each with its part of the range and its own depth (1)",
    )  # fmt: skip


def _add_writes(parser: Parser) -> None:
    parser.add_argument(
        "-w", "--write", action="store_true",
        help="write instead of reading: WHAT IS IN THE IMAGE IS LOST",
    )  # fmt: skip
    parser.add_argument(
        "--mix", type=number_argument("mix", 0, 100), metavar="PERCENT",
        help="so many percent of the requests are reads, the others write as -w does",
    )  # fmt: skip
    parser.add_argument(
        "--pattern", type=number_argument("pattern", 0, 255), metavar="BYTE",
        help="what is written (0)",
    )  # fmt: skip
    parser.add_argument(
        "--flush-interval", type=number_argument("flush interval", 0), default=0, metavar="N",
        help="flush after every N writes (0: never)",
    )  # fmt: skip
    parser.add_argument(
        "--no-drain", dest="drain", action="store_false",
        help="flush without first waiting for the requests in flight",
    )  # fmt: skip


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= SECONDS_MOST:  # "nan" is neither
        raise argparse.ArgumentTypeError(f"time {text!r}: must be seconds, more than 0")
    return value


def run_bench(arguments: argparse.Namespace, ui: Ui) -> int:
    """Measure; then print, then draw: after Ctrl-C what the runs say that were over."""
    _refuse_idle(arguments)
    load = _load(arguments)
    _check(load, arguments)
    for text in _idle_as_qemu(arguments):
        ui.warn(text)
    names = [arguments.file, *arguments.vs]
    repeat = arguments.repeat or (REPEAT_VS if arguments.vs else 1)
    write_picture = plot.writer(arguments.plot) if arguments.plot else None
    with ExitStack() as stack:
        sides = [
            Side(name, _open(stack, arguments, ui, name, load, is_first=index == 0))
            for index, name in enumerate(names)
        ]
        ui.subject = None
        if load.writes and not arguments.quiet:
            for side in sides:
                ui.note(bench_report.warning(load, side))
        stopped = ""
        try:
            with meter(ui, arguments, "bench") as progress:
                measure(sides, load, repeat=repeat, progress=progress)
        except Cancelled:
            stopped = bench_report.runs_over(sides, repeat)
        measured = [side for side in sides if side.runs]
        if measured:
            _print(measured, load, arguments, ui, stopped)
        if measured and write_picture is not None:
            picture = plot.latencies(measured, bench_report.plan(load))
            write_picture(picture)
    if stopped:
        raise Cancelled(f"bench: {stopped}")
    return exits.OK


def _refuse_idle(arguments: argparse.Namespace) -> None:
    """Our own options must do something: who gives one believes that it does."""
    given = vars(arguments)
    if given["write"] and given["mix"] is not None:
        raise CommandLineError(
            "bench: -w writes only, --mix reads and writes; use one (-w is --mix 0)"
        )
    if given["seed"] is not None and not given["random"] and given["mix"] is None:
        raise CommandLineError("bench: --seed needs --random or --mix")
    if given["vs_format"] is not None and not given["vs"]:
        raise CommandLineError("bench: --vs-format needs --vs")


def _idle_as_qemu(arguments: argparse.Namespace) -> Iterator[str]:
    """What to say about qemu-img's options that do nothing here, which it takes without a word."""
    if arguments.pattern is not None and not arguments.write and arguments.mix is None:
        yield "bench: --pattern does nothing without -w or --mix"
    if not arguments.drain and not arguments.flush_interval:
        yield "bench: --no-drain does nothing without --flush-interval"


def _check(load: Load, arguments: argparse.Namespace) -> None:
    """What options contradict each other, whatever the disk."""
    try:
        load.check()
    except UsageError as error:
        raise CommandLineError(f"bench: {error}") from error
    if load.writes and arguments.share:
        raise CommandLineError("bench: -U is for reading only, and this writes")


def _load(arguments: argparse.Namespace) -> Load:
    count = arguments.count
    if count is None and arguments.time is None:
        count = COUNT
    read_percent = 0 if arguments.write else 100
    if arguments.mix is not None:
        read_percent = arguments.mix
    return Load(
        block=arguments.buffer_size,
        depth=arguments.depth,
        count=count,
        seconds=arguments.time,
        read_percent=read_percent,
        random=arguments.random,
        step=arguments.step_size,
        start=arguments.offset,
        length=arguments.length,
        seed=arguments.seed or 0,
        pattern=arguments.pattern or 0,
        flush_every=arguments.flush_interval,
        drain=arguments.drain,
        threads=arguments.threads,
    )


def _open(
    stack: ExitStack,
    arguments: argparse.Namespace,
    ui: Ui,
    name: str,
    load: Load,
    *,
    is_first: bool,
) -> list[Image]:
    """Once; for reading, once for each thread, so that each has a queue of its own."""
    users = load.threads if load.writes else 1
    host = LinuxHost(
        _QUEUES.get(arguments.aio),
        depth=max(load.depth * users, NativeQueue.DEPTH),
        one_thread=users == 1,
    )
    images: list[Image] = []
    for _ in range(load.threads // users):
        images.append(
            stack.enter_context(
                opened(
                    ui,
                    name,
                    format=arguments.format if is_first else arguments.vs_format,
                    write=load.writes,
                    cache=arguments.cache,
                    share=arguments.share,
                    backing_format=arguments.backing_format,
                    host=host,
                    quiet=bool(images),
                )
            )
        )
    return images


def _print(
    sides: list[Side], load: Load, arguments: argparse.Namespace, ui: Ui, stopped: str
) -> None:
    if arguments.json:
        ui.out_json(bench_report.as_json(sides, load, interrupted=bool(stopped)))
    elif not arguments.quiet:
        unicode = terminal.can_show(ui.stdout, chart.CHARACTERS)
        style = bench_report.Style(terminal.width_of(sys.stdout), unicode)
        for line in bench_report.text(sides, load, style, stopped=stopped):
            ui.out(line)
    ui.flush()
