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
from mmcow.jobs.info import inspect
from tests.unit.test_cli import MIB, pair, run, template, written  # noqa: F401

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


# ---- names that look like a protocol ----


def test_name_with_a_colon_is_refused_with_the_way_out(capsys):
    mmcow.create("./a:b.acow", size=MIB)
    for verb in (["create"], ["create", "-u"], ["rebase", "-u"]):
        path = ["top.acow"] if verb[0] == "rebase" else ["new.acow"]
        size = ["1M"] if "-u" in verb and verb[0] == "create" else []
        words = [*verb, "-b", "a:b.acow", "-F", "add-cow", *path, *size]
        err = run(capsys, *words, status=1).err
        assert "; write ./a:b.acow for a file of that name\n" in err
    assert not os.path.exists("new.acow")
    run(capsys, "create", "-b", "./a:b.acow", "-F", "add-cow", "new.acow")
    err = run(capsys, "create", "-f", "add-cow", "-o", "image_file=a:\x1b", "n", "1M", status=1).err
    assert r"; write ./a:\x1b for a file of that name" in err


# ---- formats of bases ----


@pytest.mark.parametrize("name", ["bogus", "", "RAW"])
@pytest.mark.parametrize(
    "words",
    [
        ["rebase", "-u", "top.acow"],
        ["rebase", "-u", "-b", "base.raw", "top.acow"],
        ["create", "-u", "-b", "base.raw", "top.acow", "1M"],
        ["create", "-b", "base.raw", "top.acow"],
    ],
)
def test_format_that_nobody_knows_is_not_recorded(capsys, name, words):
    with open("top.acow", "rb") as file:
        before = file.read()
    err = run(capsys, words[0], "-F", name, *words[1:], status=1).err
    assert err.startswith(f"mmcow: top.acow: unknown format {name!r} of the base: must be one of ")
    assert "raw, add-cow, cow (known, but not opened: bochs, " in err
    with open("top.acow", "rb") as file:
        assert file.read() == before


def test_format_that_is_known_but_not_supported_may_be_recorded(capsys):
    run(capsys, "rebase", "-u", "-b", "x", "-F", "qcow2", "top.acow")
    assert inspect("top.acow").backing_format == "qcow2"
    run(capsys, "create", "-u", "-b", "x", "-F", "vmdk", "new.acow", "1M")
    assert inspect("new.acow").backing_format == "vmdk"


@pytest.mark.parametrize("compat", ["v20", "v10"])
def test_rebase_does_not_take_the_old_format_for_the_new_base(capsys, compat):
    mmcow.create("a", backing="base.raw", backing_format="raw", options={"compat": compat})
    err = run(capsys, "rebase", "-u", "-b", "moved", "a", status=1).err
    assert "mmcow: a: say the new base's format (-F): raw is what is recorded" in err
    assert inspect("a").backing == "base.raw"
    run(capsys, "rebase", "-u", "-b", "moved", "-F", "raw", "a")
    assert inspect("a").backing == "moved"


@pytest.mark.parametrize(("format_", "options"), [("add-cow", {"compat": "v7"}), ("cow", {})])
def test_rebase_needs_no_format_where_none_is_recorded(capsys, format_, options):
    mmcow.create("a", format=format_, backing="base.raw", backing_format="raw", options=options)
    run(capsys, "rebase", "-u", "-b", "moved", "a")
    assert inspect("a").backing == "moved"


def test_rebase_needs_no_format_to_remove_the_base(capsys):
    with written("top.acow") as image:
        image.write(0, image.read(0, image.size))
    run(capsys, "rebase", "-u", "-b", "", "top.acow")
    assert inspect("top.acow").backing is None


# ---- data files ----


def test_create_without_an_existing_data_file_warns_of_nothing(capsys):
    assert run(capsys, "create", "-b", "base.raw", "-F", "raw", "new.acow").err == ""


def test_create_tells_that_it_adopted_a_data_file(capsys):
    with open("new.acow.raw", "wb") as file:
        file.write(b"x" * (MIB + 5))
    warning = "mmcow: warning: new.acow: existing data file new.acow.raw (1048581 bytes) adopted: "
    err = run(capsys, "create", "-q", "-f", "add-cow", "new.acow").err
    assert err == warning + "what it holds is the disk\n"
    words = ["-b", "base.raw", "-F", "raw"]
    first, second = run(capsys, "create", *words, "new.acow").err.splitlines()
    assert first == (warning + "it is hidden by the base, and overwritten by writes to the disk")
    assert second == (
        "mmcow: warning: new.acow: the disk is as long as the data file, 1 MiB (1049088 bytes): "
        "the end of the base base.raw, 4 MiB (4194304 bytes), is not visible"
    )
    err = run(capsys, "create", "-u", *words, "new.acow").err
    assert err.splitlines() == [first]


def test_create_tells_that_it_adopted_a_named_data_file_as_long_as_the_base(capsys):
    os.mkdir("there")
    with open("there/data", "wb") as file:
        file.truncate(4 * MIB)
    words = ["-b", "../base.raw", "-F", "raw", "-o", "image_file=data", "there/new.acow"]
    (line,) = run(capsys, "create", *words).err.splitlines()
    assert "there/new.acow: existing data file there/data (4194304 bytes) adopted" in line


def test_create_adopts_a_data_file_with_a_colon(capsys):
    with open("a:b.raw", "wb") as file:
        file.truncate(MIB)
    err = run(capsys, "create", "-f", "add-cow", "./a:b").err
    assert "existing data file ././a:b.raw (1048576 bytes) adopted" in err


def test_create_that_fails_adopted_nothing(capsys):
    with open("new.acow.raw", "wb") as file:
        file.truncate(MIB)
    err = run(capsys, "create", "-f", "add-cow", "new.acow", "2M", status=1).err
    assert "warning" not in err


@pytest.mark.parametrize(
    "words", [["create", "-f", "add-cow"], ["rebase", "-u"], ["convert", "-O", "add-cow"]]
)
def test_data_file_without_a_name_is_refused(capsys, words):
    names = ["base.raw", "new"] if words[0] == "convert" else ["top.acow"]
    err = run(capsys, *words, "-o", "image_file=", *names, status=1).err
    assert "-o image_file=: the name of the data file is missing" in err


# ---- nothing to resize ----


@pytest.mark.parametrize("change", ["+0", "-0"])
def test_resize_of_an_empty_disk_by_nothing(capsys, change):
    with open("empty", "wb"):
        pass
    out = run(capsys, "resize", "-f", "raw", "empty", change).out
    assert out == "empty: resized from 0 B (0 bytes) to 0 B (0 bytes)\n"
    err = run(capsys, "resize", "-f", "raw", "--shrink", "empty", "-1k", status=1).err
    assert "-1k leaves nothing of 0 B" in err
