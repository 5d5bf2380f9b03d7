# SPDX-License-Identifier: MIT
"""Names: of files, given or found in images, and of formats: shown, refused, adopted."""

from __future__ import annotations

import json
import os

import pytest

import mmcow
from mmcow.cli.check import _tell
from mmcow.cli.ui import Ui, printable
from mmcow.formats.driver import CheckResult, Finding
from mmcow.jobs.check import CheckReport
from tests.unit.test_cli import KIB, MIB, pair, run, template  # noqa: F401

pytestmark = pytest.mark.usefixtures("pair")

EVIL = "b\x1b[2J\nfile format: raw\r\x9b\u202e\u2028\U000e0001"
SHOWN = r"b\x1b[2J\nfile format: raw\r\u009b\u202e\u2028\U000e0001"


# ---- shown ----


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("a b-ü€語.raw", "a b-ü€語.raw"),
        (EVIL, SHOWN),
        ("\t\0\x7f", r"\t\x00\x7f"),
        (os.fsdecode(b"\xff\x1b"), r"\xff\x1b"),
        ("a\\b", "a\\b"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


def test_names_in_images_cannot_forge_output(capsys):
    os.rename("base.raw", EVIL)
    mmcow.create(
        "evil.acow", backing=EVIL, backing_format="raw", options={"image_file": "d" + EVIL}
    )
    lines = run(capsys, "info", "evil.acow").out.splitlines()
    assert f"backing file: {SHOWN}" in lines
    assert f"data file: d{SHOWN}" in lines
    assert sum(line.startswith("file format") for line in lines) == 1
    shown = json.loads(run(capsys, "info", "--output=json", "evil.acow").out)
    assert shown["backing-filename"] == EVIL
    chain = run(capsys, "info", "--backing-chain", "evil.acow").out
    assert f"\n\nimage: {SHOWN}\n" in chain
    table = run(capsys, "map", "--no-picture", "evil.acow").out
    assert SHOWN in table
    assert EVIL not in table
    assert run(capsys, "probe", EVIL).out == f"{SHOWN}: raw\n"


def test_names_in_errors_cannot_forge_output(capsys):
    err = run(capsys, "info", EVIL, status=1).err
    assert err.startswith(f"mmcow: {SHOWN}: ")
    assert err.count("\n") == 1


def test_findings_of_check_cannot_forge_output(capsys):
    finding = Finding("leak", f"x: data file {EVIL}", False)
    result = CheckResult(1, 1, 0, 0, 0, (finding,))
    _tell(CheckReport("x\n", "add-cow", result, 0, 1, 0, 0), Ui())
    out = capsys.readouterr().out
    assert f"leak: x: data file {SHOWN}\n" in out
    assert "x\\n: " in out


# ---- probe ----


def test_probe_tells_what_can_be_told(capsys):
    result = run(capsys, "probe", "base.raw", "nosuch", "top.acow", "../nor/this", status=1)
    assert result.out == "base.raw: raw\ntop.acow: add-cow\n"
    first, second = result.err.splitlines()
    assert first.startswith("mmcow: nosuch: open: ")
    assert second.startswith("mmcow: ../nor/this: open: ")
    out = run(capsys, "probe", "--output=json", "nosuch", "top.acow", status=1).out
    assert json.loads(out) == [{"filename": "top.acow", "format": "add-cow"}]
