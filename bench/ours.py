# SPDX-License-Identifier: MIT
"""mmcow's side: the command lines, and how to read what they say.

Owns: every command line of mmcow that is measured or that makes an image.
Never: keeps files or processes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.model import MIB, Requests, Sample
from bench.process import Failed, run

if TYPE_CHECKING:
    from bench.process import Ended

FORMAT = "add-cow"
INSIDE = (sys.executable, str(Path(__file__).with_name("inside.py")))


def command() -> tuple[str, ...]:
    """The command, of the mmcow that this interpreter imports."""
    return (sys.executable, "-m", "mmcow")


def info_command(image: Path) -> list[str]:
    """``mmcow info`` as it is installed, since starting it is what is measured."""
    script = Path(sys.executable).with_name("mmcow")
    return [*((str(script),) if script.exists() else command()), "info", str(image)]


def create(path: Path, base: Path) -> None:
    """A new layer over a raw base, with default options."""
    run(*command(), "create", "-q", "-f", FORMAT, "-b", base, "-F", "raw", path)


def fill(path: Path, source: Path) -> None:
    """Write all of a raw file into an image."""
    run(
        *command(), "convert", "-q", "-n", "-f", "raw", "-O", FORMAT, "-T", "none", "-t", "none",
        source, path,
    )  # fmt: skip


def bench(image: Path, form: str, work: Requests, count: int, seed: int) -> Sample:
    """``mmcow bench``, which times itself from the first request to the last.

    Where qemu-img bench strides, this is random, as fio is.
    """
    options = ["-w", "--pattern", "171"] if work.op == "write" else []
    if not work.sequential:
        options += ["--random", "--seed", str(seed)]
    if work.flush:
        options += ["--flush-interval", "1"]
    ended = run(
        *command(), "bench", "-f", form, "-t", "none", "-c", str(count), "-d", str(work.depth),
        "-s", str(work.size), *options, "--json", image,
    )  # fmt: skip
    return read_bench(ended)


def read_bench(ended: Ended) -> Sample:
    """What ``mmcow bench --json`` says."""
    try:
        said: dict[str, Any] = json.loads(ended.output)
        value = float(said["iops"])
    except (ValueError, KeyError, TypeError) as error:
        raise Failed(f"mmcow bench said {ended.output[:200]!r}") from error
    return Sample(value, {"cpu_s": ended.cpu})


def serve(image: Path, form: str, cache: str, socket: Path) -> list[str]:
    """The server's command line."""
    return [*command(), "serve", "-q", "-f", form, "-t", cache, "--socket", str(socket), str(image)]


def convert(source: Path, form: str, target: Path, target_form: str) -> float:
    """Seconds."""
    return run(
        *command(), "convert", "-q", "-f", form, "-O", target_form, "-T", "none", "-t", "none",
        source, target,
    ).wall  # fmt: skip


def commit(image: Path) -> float:
    """Seconds."""
    return run(*command(), "commit", "-q", "-f", FORMAT, "-t", "none", image).wall


def stream(image: Path) -> float:
    """Seconds."""
    return run(*command(), "stream", "-q", "-f", FORMAT, "-t", "none", image).wall


def map_command(image: Path) -> float:
    """Seconds of the command, its output thrown away."""
    return run(
        *command(), "map", "-f", FORMAT, "--output=json", image, keep_output=False
    ).wall  # fmt: skip


def extents_of(image: Path) -> list[dict[str, Any]]:
    """What ``mmcow map`` says."""
    found: list[dict[str, Any]] = json.loads(
        run(*command(), "map", "-f", FORMAT, "--output=json", image).output
    )
    return found


def inside(*words: str | Path) -> dict[str, float]:
    """What bench/inside.py measured in a process of its own."""
    found: dict[str, float] = json.loads(run(*INSIDE, *words).output)
    return found


def write_bits(path: Path, disk: int, period: int) -> None:
    """Say of the first 64 KiB of each ``period`` that the layer has them; their bytes are holes.

    Written as docs/formats/add-cow.md has it, since writing half a million times takes long.
    """
    cluster, header = 4096, 4096
    one = b"\xff" * (65536 // cluster // 8) + bytes((period - 65536) // cluster // 8)
    block = one * (MIB // len(one))
    left = disk // cluster // 8
    with path.open("r+b") as file:
        file.seek(header)
        while left:
            left -= file.write(block[: min(left, len(block))])
