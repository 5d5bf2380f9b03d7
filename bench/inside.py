# SPDX-License-Identifier: MIT
"""What is measured inside a process that has nothing else to do: run by the harness.

Owns: the library's calls between two readings of the clock (or of the memory), printed as JSON.
Never: decides what is measured, cleans up.

    python bench/inside.py extents IMAGE
    python bench/inside.py create FOLDER SIZE
    python bench/inside.py open FOLDER SIZE
    python bench/inside.py memory FOLDER SIZE

FOLDER has a sparse "life-base.raw" of SIZE bytes; the image is "life".

The parser of arguments is imported only to say what is wrong with them: it takes 1.3 MiB, and the
process's memory is measured.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path

import mmcow

TYPE_CHECKING = False  # as type checkers see it; ``typing`` would count, too
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

_SMALL = 64 << 20


def extents(image: str) -> dict[str, float]:
    """Walk all extents."""
    with mmcow.open(image) as disk:
        start = time.perf_counter()
        count = sum(1 for _ in disk.block_status())
        return {"seconds": time.perf_counter() - start, "extents": count}


def create(folder: Path, size: int) -> dict[str, float]:
    """Create one, durably."""
    _warm_up(folder)
    start = time.perf_counter()
    _create(folder, "life")
    return {"ms": (time.perf_counter() - start) * 1000, "size": size}


def open_(folder: Path, size: int) -> dict[str, float]:
    """Open one for writing."""
    _warm_up(folder)
    _create(folder, "life")
    start = time.perf_counter()
    with mmcow.open(folder / "life", write=True) as disk:
        seconds = time.perf_counter() - start
        if disk.size != size:
            raise SystemExit(f"the disk has {disk.size} bytes, not {size}")
    return {"ms": seconds * 1000}


def memory(folder: Path, size: int) -> dict[str, float]:
    """Open one, read and write 4 KiB in its middle."""
    _warm_up(folder)
    _create(folder, "life")
    gc.collect()
    before = _resident_kib()
    with mmcow.open(folder / "life", write=True) as disk:
        disk.read(size // 2, 4096)
        disk.write(size // 2, b"m" * 4096)
        disk.flush()
        return {"kib": _resident_kib() - before, "process_kib": _resident_kib()}


def _create(folder: Path, name: str) -> None:
    mmcow.create(folder / name, backing="life-base.raw", backing_format="raw")


def _warm_up(folder: Path) -> None:
    """Whatever a first call imports or sets up, on a small disk."""
    small = folder / "small"
    with (folder / "small-base.raw").open("wb") as file:
        file.truncate(_SMALL)
    mmcow.create(small, backing="small-base.raw", backing_format="raw")
    with mmcow.open(small, write=True) as disk:
        disk.read(_SMALL // 2, 4096)
        disk.write(_SMALL // 2, b"m" * 4096)
        disk.flush()
    for name in ("small", "small.raw", "small-base.raw"):
        (folder / name).unlink()


def _resident_kib() -> int:
    """Exactly: statm is behind by what each CPU has not yet added."""
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1])
    raise SystemExit("smaps_rollup has no Rss")


_LIVES = {"create": create, "open": open_, "memory": memory}


def _explain(words: Sequence[str]) -> NoReturn:
    """Help, or what is wrong with the arguments."""
    import argparse  # noqa: PLC0415 - see the top

    parser = argparse.ArgumentParser(
        prog="python -m bench.inside", description="Measure one thing, print it as JSON."
    )
    verbs = parser.add_subparsers(required=True, metavar="WHAT")
    verb = verbs.add_parser("extents", help="walk all extents of an image")
    verb.add_argument("image", metavar="IMAGE")
    for name, work in _LIVES.items():
        about = (work.__doc__ or "").rstrip(".")
        verb = verbs.add_parser(name, help=about[0].lower() + about[1:])
        verb.add_argument("folder", metavar="FOLDER", help='with a sparse "life-base.raw"')
        verb.add_argument("size", metavar="SIZE", type=int, help="of the disk, bytes")
    parser.parse_args(words)
    parser.error(f"{words[-1]!r} is no size")


def _is_size(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the arguments say. Status 2: it could not be done."""
    words = sys.argv[1:] if argv is None else argv
    try:
        match words:
            case ["extents", image] if not image.startswith("-"):
                found = extents(image)
            case [what, folder, size] if what in _LIVES and _is_size(size):
                found = _LIVES[what](Path(folder), int(size))
            case _:
                _explain(words)
    except (OSError, mmcow.MmcowError) as error:
        print(f"bench.inside: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
