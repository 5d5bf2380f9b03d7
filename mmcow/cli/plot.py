# SPDX-License-Identifier: MIT
"""Latency histograms as a picture in a file: SVG by ourselves, PNG through Pillow.

Owns: the drawing (a few shapes on a plane, the same for both kinds), writing the file.
Never: measures; leaves half a picture.
"""

from __future__ import annotations

import io
import os
import stat
from importlib import import_module
from math import log2
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.sax.saxutils import escape

from mmcow.cli.chart import Scale, human_time
from mmcow.cli.ui import CommandLineError, printable
from mmcow.errors import StorageError
from mmcow.jobs.latency import Histogram
from mmcow.storage.linux import LinuxHost
from mmcow.storage.names import directory_of, make_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mmcow.jobs.bench import Side

WIDTH, HEIGHT = 900, 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 76, 56
_ROWS_MOST = 120
_NAME_MOST = 60
# Told apart by those who see no colours well, too (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_GREY, _PALE, _BLACK, _WHITE = "#666666", "#dddddd", "#111111", "#ffffff"


class Line(NamedTuple):
    """Joined points."""

    points: tuple[tuple[float, float], ...]
    colour: str
    width: float


class Text(NamedTuple):
    """One line of text. ``anchor``: which end is at x: "start", "middle" or "end"."""

    x: float
    y: float  # of the base line
    text: str
    size: int
    anchor: str
    colour: str


Picture = list[Line | Text]


def latencies(sides: Sequence[Side], title: str) -> Picture:
    """The picture: shares of requests over latency, one line for each side."""
    found = [Histogram.merged(run.latency for run in side.runs) for side in sides]
    scale = Scale.for_all(found, _ROWS_MOST)
    shares = [scale.shares(histogram) for histogram in found]
    tallest = max((share for each in shares for share in each), default=0.0) or 1.0
    picture: Picture = [Text(_LEFT, 24, f"mmcow bench: {title}", 16, "start", _BLACK)]
    picture += _axes(scale, tallest)
    for number, (side, histogram) in enumerate(zip(sides, found, strict=True)):
        colour = _COLOURS[number % len(_COLOURS)]
        picture.append(Line(tuple(_steps(shares[number], tallest)), colour, 2))
        picture += _legend(side, histogram, number, colour)
    return picture


def _x(share: float) -> float:
    return _LEFT + share * (WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def _steps(shares: Sequence[float], tallest: float) -> list[tuple[float, float]]:
    points = [(_x(0.0), _y(0.0))]
    for row, share in enumerate(shares):
        height = _y(share / tallest)
        points += [(_x(row / len(shares)), height), (_x((row + 1) / len(shares)), height)]
    return [*points, (_x(1.0), _y(0.0))]


def _axes(scale: Scale, tallest: float) -> Picture:
    marks: Picture = []
    for quarter in range(5):
        y = _y(quarter / 4)
        marks.append(Line(((_x(0.0), y), (_x(1.0), y)), _PALE if quarter else _GREY, 1))
        marks.append(
            Text(_LEFT - 8, y + 4, f"{100 * tallest * quarter / 4:.1f} %", 12, "end", _GREY)
        )
    if scale.rows:
        for ns in _round_times(scale.edge(0), scale.edge(scale.rows)):
            x = _x((log2(ns) * scale.steps - scale.first) / scale.rows)
            marks.append(Line(((x, _y(0.0)), (x, _y(0.0) + 5)), _GREY, 1))
            marks.append(Text(x, HEIGHT - _BOTTOM + 20, human_time(ns), 12, "middle", _GREY))
    axis = "latency (logarithmic; the slowest thousandth stands at the right end)"
    marks.append(Text(_x(0.5), HEIGHT - 12, axis, 12, "middle", _GREY))
    return marks


def _round_times(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... as far as they are inside; where those are few, quarter octaves too."""
    found = [m * 10.0**e for e in range(13) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    return found if len(found) >= 2 else [low, (low * high) ** 0.5, high]


def _legend(side: Side, histogram: Histogram, number: int, colour: str) -> Picture:
    y = _TOP + 12 + 18 * number
    name = printable(side.name)
    if len(name) > _NAME_MOST:
        name = "..." + name[3 - _NAME_MOST :]
    text = f"{name}: {side.spread(attrgetter('iops')).median:.0f} IOPS"
    if histogram.count:
        p50, p99 = (human_time(histogram.percentile(percent)) for percent in (50, 99))
        text += f", p50 {p50}, p99 {p99}"
    right = WIDTH - _RIGHT - 8
    return [
        Text(right - 30, y, text, 13, "end", _BLACK),
        Line(((right - 24, y - 4), (right, y - 4)), colour, 3),
    ]


# ---- files ----


# What the pictures made here begin with.
_MAGIC = {".svg": b"<svg xmlns=", ".png": b"\x89PNG\r\n\x1a\n"}


def writer(path: str) -> Callable[[Picture], None]:
    """What writes a picture to ``path``; refuses what cannot work before anything is measured."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in (".svg", ".png"):
        raise CommandLineError(f"bench: --plot {path!r}: the name must end in .svg or .png")
    if suffix == ".png":
        _pillow(path)
    host = LinuxHost()
    target = host.real_path(path)
    folder = directory_of(target)
    if not os.path.isdir(folder):
        raise CommandLineError(f"bench: --plot {path!r}: {folder!r} is no directory")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CommandLineError(f"bench: --plot {path!r}: {folder!r} takes no new files")
    _refuse_other(path, suffix)
    encode = as_png if suffix == ".png" else as_svg

    def write(picture: Picture) -> None:
        _refuse_other(path, suffix)
        content = encode(picture)
        try:
            make_file(host, target, lambda handle: handle.write_at(0, content), replace=True)
        except StorageError as error:  # which may name the temporary file
            raise StorageError(error.errno or 0, "write", path) from error

    return write


def _refuse_other(path: str, suffix: str) -> None:
    """Only a picture is overwritten: anything else may be a disk, even the one that is measured."""
    magic = _MAGIC[suffix]
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CommandLineError(f"bench: --plot {path!r}: exists and is no regular file")
        with open(path, "rb") as file:
            head = file.read(len(magic))
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(error.errno or 0, "read", path) from error
    if head and head != magic:
        raise CommandLineError(
            f"bench: --plot {path!r}: exists and is no {suffix[1:].upper()} picture: remove it, or "
            "take another name"
        )


def as_svg(picture: Picture) -> bytes:
    """A file for browsers and documents."""
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">',
        f'<rect {size} fill="{_WHITE}"/>',
    ]
    for shape in picture:
        if isinstance(shape, Line):
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
            lines.append(
                f'<polyline points="{points}" fill="none" stroke="{shape.colour}" '
                f'stroke-width="{shape.width:g}"/>'
            )
        else:
            lines.append(
                f'<text x="{shape.x:.1f}" y="{shape.y:.1f}" font-size="{shape.size}" '
                f'text-anchor="{shape.anchor}" fill="{shape.colour}">{escape(shape.text)}</text>'
            )
    return "\n".join([*lines, "</svg>", ""]).encode("utf-8", "backslashreplace")


def as_png(picture: Picture) -> bytes:
    """The same as pixels."""
    image_module, draw_module, font_module = _pillow("")
    image = image_module.new("RGB", (WIDTH, HEIGHT), _WHITE)
    canvas = draw_module.Draw(image)
    fonts: dict[int, Any] = {}
    anchors = {"start": "ls", "middle": "ms", "end": "rs"}
    for shape in picture:
        if isinstance(shape, Line):
            canvas.line(shape.points, fill=shape.colour, width=round(shape.width))
            continue
        font = fonts.setdefault(shape.size, font_module.load_default(shape.size))
        # The font that comes with Pillow is not asked for more than it surely has.
        text = shape.text.encode("ascii", "backslashreplace").decode("ascii")
        canvas.text((shape.x, shape.y), text, shape.colour, font, anchors[shape.anchor])
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


def _pillow(path: str) -> tuple[Any, Any, Any]:
    try:
        image, draw, font, features = (
            import_module(f"PIL.{name}") for name in ("Image", "ImageDraw", "ImageFont", "features")
        )
    except ImportError:
        raise CommandLineError(
            f"bench: --plot {path!r}: PNG needs Pillow, which is not installed; "
            "pip install 'mmcow[plot]', or name a .svg file"
        ) from None
    if not features.check("freetype2"):
        raise CommandLineError(
            f"bench: --plot {path!r}: this Pillow was built without FreeType, which text needs; "
            "name a .svg file"
        )
    return image, draw, font
