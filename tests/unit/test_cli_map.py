# SPDX-License-Identifier: MIT
"""``mmcow map``: JSON and table in qemu-img's shape, and the picture."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest

import mmcow
from mmcow.cli import drawing, terminal
from mmcow.cli.main import main
from mmcow.cli.map import _deepest
from mmcow.errors import Cancelled
from tests.unit.test_cli import KIB, MIB, pair, run, template, written  # noqa: F401

KEYS = ["start", "length", "depth", "present", "zero", "data"]


def entries(capsys, *arguments):
    return json.loads(run(capsys, "map", "--output=json", *arguments).out)


def rows(found):
    """(start, length, depth, present, zero, data) in KiB."""
    return [
        (e["start"] // KIB, e["length"] // KIB, e["depth"], e["present"], e["zero"], e["data"])
        for e in found
    ]


DATA, ZERO, NOTHING = (True, False, True), (True, True, False), (False, True, False)
TOP = [
    (0, 64, 1, *ZERO),
    (64, 64, 1, *DATA),
    (128, 384, 1, *ZERO),
    (512, 128, 0, *DATA),
    (640, 384, 1, *ZERO),
    (1024, 1024, 1, *DATA),
    (2048, 2048, 1, *ZERO),
]


# ---- JSON and table ----


def test_json_of_a_chain(capsys, pair):  # noqa: F811
    found = entries(capsys, "top.acow")
    assert rows(found) == TOP
    assert list(found[0]) == [*KEYS, "offset"]
    assert all(e["offset"] == e["start"] for e in found)


def test_json_is_one_entry_a_line(capsys, pair):  # noqa: F811
    lines = run(capsys, "map", "--output=json", "top.acow").out.splitlines()
    assert len(lines) == len(TOP)
    assert lines[0] == (
        '[{ "start": 0, "length": 65536, "depth": 1, "present": true, "zero": true, '
        '"data": false, "offset": 0},'
    )
    assert lines[-1].endswith("}]")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["-s", "520k", "-l", "8k"], [(520, 8, 0, *DATA)]),
        (["-s", "3M"], [(3072, 1024, 1, *ZERO)]),
        (["-l", "96k"], [(0, 64, 1, *ZERO), (64, 32, 1, *DATA)]),
        (["--start-offset=4M"], [(4096, 0, 0, False, False, False)]),
        (["--start-offset=9M", "--max-length=1"], [(9216, 0, 0, False, False, False)]),
    ],
)
def test_json_of_a_part(capsys, pair, options, expected):  # noqa: F811
    assert rows(entries(capsys, *options, "top.acow")) == expected


def test_json_past_the_end_of_shorter_layers_names_the_deepest_that_reaches(
    capsys,
    pair,  # noqa: F811
):
    mmcow.create("mid.acow", size=6 * MIB, backing="base.raw", backing_format="raw")
    mmcow.create("high.acow", size=8 * MIB, backing="mid.acow", backing_format="add-cow")
    found = rows(entries(capsys, "high.acow"))
    assert found[-3:] == [
        (2048, 2048, 2, *ZERO),
        (4096, 2048, 1, *NOTHING),
        (6144, 2048, 0, *NOTHING),
    ]
    assert "offset" not in entries(capsys, "high.acow")[-1]


def test_json_of_an_image_without_base(capsys, pair):  # noqa: F811
    run(capsys, "create", "-q", "-f", "cow", "alone.cow", "1M")
    assert rows(entries(capsys, "alone.cow")) == [(0, 1024, 0, *NOTHING)]


@pytest.mark.parametrize(
    ("offset", "expected"), [(0, (2, 10)), (9, (2, 10)), (10, (1, 20)), (25, (0, 30))]
)
def test_deepest(offset, expected):
    assert _deepest([30, 20, 10], offset) == expected


def test_deepest_below_a_shorter_layer_does_not_count():
    """This test has a base that is longer than the layer above it, which hides its end."""
    assert _deepest([30, 20, 40], 25) == (0, 30)
    assert _deepest([30, 20, 40], 5) == (2, 20)


def test_table_in_the_shape_of_qemu_img(capsys, pair):  # noqa: F811
    out = run(capsys, "map", "--no-picture", "top.acow").out
    assert out == (
        "Offset          Length          Mapped to       File\n"
        "0x10000         0x10000         0x10000         base.raw\n"
        "0x80000         0x20000         0x80000         top.acow.raw\n"
        "0x100000        0x100000        0x100000        base.raw\n"
    )
    assert run(capsys, "map", "top.acow").out.endswith("\n\n" + out)


def test_table_writes_zero_without_prefix(capsys, pair):  # noqa: F811
    with written("base.raw", format="raw") as image:
        image.write(0, b"x" * 512)
    line = run(capsys, "map", "--no-picture", "base.raw").out.splitlines()[1]
    assert re.fullmatch(r"0               0x[0-9a-f]+ +0               base\.raw", line)


# ---- the picture ----


@pytest.mark.parametrize("width", [40, 60, 80, 133, 400])
def test_picture_is_as_wide_as_the_terminal(capsys, pair, monkeypatch, width):  # noqa: F811
    monkeypatch.setenv("COLUMNS", str(width))
    picture = run(capsys, "map", "top.acow").out.split("\n\n")[0].splitlines()
    bars = picture[1:4]
    assert all(len(line) <= width for line in picture)
    assert max(map(len, bars)) == width
    assert len({line.index("│") for line in bars}) == 1
    assert len({line.rindex("│") for line in bars}) == 1


@pytest.mark.parametrize("width", ["1", "x", "", "-5", "0"])
def test_picture_on_a_strange_width(capsys, pair, monkeypatch, width):  # noqa: F811
    monkeypatch.setenv("COLUMNS", width)
    assert "A top.acow" in run(capsys, "map", "top.acow").out


def test_picture_shows_layers_and_what_is_read(capsys, pair, monkeypatch):  # noqa: F811
    # 32 columns of 128 KiB.
    monkeypatch.setenv("COLUMNS", str(32 + len("A top.acow ││ 100 %")))
    lines = run(capsys, "map", "top.acow").out.splitlines()
    assert lines[0] == "4 MiB from 0: 32 columns of 128 KiB"
    assert lines[1] == "A top.acow │    █                           │   3 %"
    assert lines[2] == "B base.raw │▓·······████████················│  27 %"
    assert lines[3] == "  together │B···A···BBBBBBBB················│"
    assert lines[4].startswith("  ░ ▒ ▓ █ held in part .. all")


def test_picture_of_one_layer_has_no_merged_row(capsys, pair):  # noqa: F811
    out = run(capsys, "map", "base.raw").out
    assert "together" not in out
    assert "letters:" not in out


def test_picture_of_a_part(capsys, pair):  # noqa: F811
    lines = run(capsys, "map", "-s", "512k", "-l", "2k", "top.acow").out.splitlines()
    assert lines[0] == "2 KiB from 524288: 4 columns of 512 B"
    assert lines[1] == "A top.acow │████│ 100 %"
    assert lines[3] == "  together │AAAA│"


def test_picture_of_nothing(capsys, pair):  # noqa: F811
    assert run(capsys, "map", "-s", "4M", "top.acow").out.startswith("Offset ")
    run(capsys, "create", "-q", "empty.raw", "0")
    assert run(capsys, "map", "empty.raw").out.startswith("Offset ")


def test_shorter_and_longer_layers(capsys, pair, monkeypatch):  # noqa: F811
    mmcow.create("long.acow", size=8 * MIB, backing="base.raw", backing_format="raw")
    mmcow.create("short.acow", size=2 * MIB, backing="long.acow", backing_format="add-cow")
    monkeypatch.setenv("COLUMNS", str(32 + len("A short.acow ││ 100 %")))
    lines = run(capsys, "map", "short.acow").out.splitlines()
    assert lines[:5] == [
        "2 MiB from 0: 32 columns of 64 KiB",
        "A short.acow │                                │   0 %",
        "B long.acow  │                                │   0 %",
        "C base.raw   │·█··············████████████████│  53 %",
        "  together   │·C··············CCCCCCCCCCCCCCCC│",
    ]
    lines = run(capsys, "map", "long.acow").out.splitlines()
    bar = lines[2].split("│")[1]
    assert len(bar) == 33
    assert bar.rstrip(" ") == bar[:17]  # the base is half as long
    assert bar[:2] == "▒·"


def _redirect(monkeypatch, encoding, *, tty):
    class Stream(io.TextIOWrapper):
        def isatty(self):
            return tty

    stream = Stream(io.BytesIO(), encoding=encoding, errors="strict", newline="\n")
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_picture_without_utf_8_is_ascii(pair, monkeypatch, encoding):  # noqa: F811
    stream = _redirect(monkeypatch, encoding, tty=False)
    assert main(["map", "top.acow"]) == 0
    text = stream.buffer.getvalue().decode(encoding)
    assert text.isascii()
    assert re.search(r"^A top\.acow \|.*#.*\| +3 %$", text, flags=re.MULTILINE)
    assert "0 zeros" in text


@pytest.mark.parametrize(
    ("tty", "environment", "coloured"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (True, {"NO_COLOR": ""}, True),
    ],
)
def test_colours(pair, monkeypatch, tty, environment, coloured):  # noqa: F811
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = _redirect(monkeypatch, "utf-8", tty=tty)
    assert main(["map", "top.acow"]) == 0
    text = stream.buffer.getvalue().decode()
    assert ("\x1b[" in text) is coloured
    assert "\x1b" not in re.sub(r"\x1b\[\d+m", "", text)


def test_name_with_control_characters_does_not_reach_the_terminal(capsys, pair):  # noqa: F811
    run(capsys, "create", "-q", "a\x1b[31m.raw", "1M")
    with written("a\x1b[31m.raw", format="raw") as image:
        image.write(0, b"\1" * 4096)
    picture, table = run(capsys, "map", "a\x1b[31m.raw").out.split("\n\n")
    assert "\x1b" not in picture + table
    assert "A a\\x1b[31m.raw " in picture
    assert table.endswith(" a\\x1b[31m.raw\n")


@pytest.mark.parametrize("characters", [drawing.UNICODE, drawing.ASCII])
def test_long_names_are_cut_in_the_middle(characters):
    name = drawing._short("x/" + "a" * 20 + "b" * 20, characters)
    assert len(name) == 24
    assert name.startswith("aaa")
    assert name.endswith("bbb")


def test_columns_share_the_range_without_gaps():
    for start, end, columns in [(0, 1000, 7), (512, 1536, 3), (0, 512, 1), (3, 10, 7)]:
        grid = drawing._Grid(start, end, columns)
        parts = list(grid.parts(start, end - start))
        assert [column for column, _ in parts] == list(range(columns))
        assert sum(length for _, length in parts) == end - start
        for offset in range(start, end, max((end - start) // 13, 1)):
            column = next(grid.parts(offset, 1))[0]
            assert grid.edge(column) <= offset < grid.edge(column + 1)


def test_picture_can_be_stopped(pair, monkeypatch):  # noqa: F811
    def stop():
        raise Cancelled("map")

    with mmcow.open("top.acow") as image:
        style = drawing.Style(80, unicode=True, colours=False)
        with pytest.raises(Cancelled):
            list(drawing.draw(image, 0, image.size, style, stop))


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0"), (0.001, "<1"), (0.5, "<1"), (1.4, "1"), (99.9, "100")]
)
def test_percent(share, text):
    assert drawing._percent(share) == text


def test_width_of_no_terminal_is_80(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert terminal.width_of(io.StringIO()) == 80
    assert terminal.width_of(None) == 80


def test_more_than_26_layers_have_letters(capsys, pair):  # noqa: F811
    below = ("base.raw", "raw")
    for index in range(27):
        mmcow.create(f"l{index}", backing=below[0], backing_format=below[1])
        below = (f"l{index}", "add-cow")
    lines = run(capsys, "map", "l26").out.splitlines()
    assert lines[26].startswith("Z l1 ")
    assert lines[27].startswith("+ l0 ")
    assert lines[28].startswith("+ base.raw ")
    assert "+" in lines[29]
