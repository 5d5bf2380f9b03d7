# SPDX-License-Identifier: MIT
"""The command as a whole: verbs found, help and its documentation, errors, exit statuses."""

from __future__ import annotations

import argparse
import errno
import os
import random
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

import mmcow
from mmcow import errors
from mmcow.cli import exits
from mmcow.cli.main import main
from mmcow.cli.ui import CommandLineError, OutputError
from mmcow.cli.verbs import VERBS, make_parser

KIB, MIB = 1 << 10, 1 << 20
# Verbs that have no counterpart in QEMU's tools, so that nobody tries their options there.
OWN_VERBS = ("probe", "serve", "ctl")
DOCUMENT = Path(__file__).parents[2] / "docs" / "cli.md"


class Result(NamedTuple):
    """What a run of the command gave."""

    status: int
    out: str
    err: str


def run(capsys, *arguments, status=0):
    """Run the command in this process; its status must be ``status``."""
    capsys.readouterr()
    given = main([str(argument) for argument in arguments])
    result = Result(given, *capsys.readouterr())
    assert result.status == status, result
    assert "Traceback" not in result.err
    return result


@contextmanager
def written(path, **options):
    """An image opened for writing, to prepare a test."""
    with mmcow.open(path, write=True, **options) as image:
        yield image


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """The files of ``pair``, made once."""
    directory = tmp_path_factory.mktemp("cli")
    before = Path.cwd()
    os.chdir(directory)
    try:
        _make_pair()
    finally:
        os.chdir(before)
    return directory


def _make_pair():
    mmcow.create("base.raw", format="raw", size=4 * MIB)
    with written("base.raw", format="raw") as image:
        image.write(64 * KIB, b"\1" * (64 * KIB))
        image.write(MIB, b"\2" * MIB)
    mmcow.create(
        "top.acow", backing="base.raw", backing_format="raw", options={"cluster_size": "64k"}
    )
    with written("top.acow") as image:
        image.write(512 * KIB, b"\3" * (128 * KIB))


@pytest.fixture
def pair(template, tmp_path, monkeypatch):
    """In an empty directory: base.raw with data at 64k, 1M; top.acow over it with data at 512k."""
    for name in ("base.raw", "top.acow", "top.acow.raw"):
        _copy_sparse(template / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _copy_sparse(source, target):
    """Holes stay holes: maps show them."""
    data = source.read_bytes()
    with target.open("wb") as file:
        for offset in range(0, len(data), 4 * KIB):
            part = data[offset : offset + 4 * KIB]
            if part.count(0) != len(part):
                file.seek(offset)
                file.write(part)
        file.truncate(len(data))


# ---- verbs and help ----


def test_version_names_the_queue(capsys):
    out = run(capsys, "--version").out
    assert re.fullmatch(rf"mmcow {re.escape(mmcow.__version__)}\nI/O queue: \w+\n", out)
    assert run(capsys, "-V").out == out


def test_help_lists_every_verb(capsys):
    out = run(capsys, "--help").out
    assert run(capsys, "-h").out == run(capsys, "help").out == out
    for name, verb in VERBS.items():
        assert f"  {name} " in out
        assert verb.summary in out


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_shows_operands_options_and_examples(capsys, verb):
    out = run(capsys, verb, "--help").out
    assert out.startswith(f"usage: mmcow {verb} [-h]")
    assert VERBS[verb].summary in out
    assert f"examples:\n  mmcow {verb}" in out
    usage = " ".join(out.split("\n\n")[0].split())
    assert usage.split()[-1].strip("[]").isupper() or usage.endswith("...]"), usage


@pytest.mark.parametrize("verb", VERBS)
def test_examples_of_help_can_be_parsed(verb):
    import shlex

    parser = make_parser(verb).full()
    for line in parser.epilog.splitlines()[1:]:
        for command in line.split("&&"):
            words = shlex.split(command)
            assert words[0] == "mmcow"
            make_parser(words[1]).parse(words[2:])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "mmcow: a verb is missing; see 'mmcow --help'"),
        (["frobnicate"], "mmcow: unknown verb 'frobnicate'; the verbs are create, info,"),
        (["--frobnicate"], "mmcow: unknown option '--frobnicate'"),
        (["info"], "mmcow: info: the following arguments are required: FILE"),
        (["info", "a", "b"], "mmcow: info: unrecognized arguments: b"),
        (["info", "--frobnicate"], "mmcow: info: unknown option --frobnicate;"),
        (["info", "-z", "a"], "mmcow: info: unknown option -z;"),
        (["info", "--output=xml", "a"], "mmcow: info: argument --output: invalid choice: 'xml'"),
        (["ctl", "s", "--", "-x"], "mmcow: ctl: argument COMMAND: invalid choice: '-x'"),
        (["check", "-r", "some", "a"], "mmcow: check: argument -r/--repair: invalid choice"),
        (["create"], "mmcow: create: FILE is missing"),
        (["convert", "a"], "mmcow: convert: SRC and DST are needed"),
        (["convert", "a", "b", "c"], "mmcow: convert: unrecognized arguments: c"),
        (["map", "-s", "1x", "a"], "start offset '1x': must be a number of bytes"),
    ],
)
def test_wrong_command_line_says_what_is_wrong(capsys, arguments, text):
    result = run(capsys, *arguments, status=1)
    assert text in result.err
    assert result.out == ""
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in OWN_VERBS])
@pytest.mark.parametrize("option", ["--image-opts", "--object=secret,id=x"])
def test_options_of_qemu_that_are_missing_are_refused_by_name(capsys, verb, option):
    status = 2 if verb == "compare" else 1
    err = (
        run(capsys, verb, option, "a", "b", status=1).err
        if status == 1
        else (run(capsys, verb, option, "a", "b", status=2).err)
    )
    assert f"mmcow: {verb}: {option.partition('=')[0]} is not supported: " in err


def test_options_and_operands_may_mix(capsys, tmp_path):
    path = tmp_path / "a.raw"
    run(capsys, "create", path, "-f", "raw", "1M", "-q")
    assert path.stat().st_size == MIB
    out = run(capsys, "info", path, "--output=json", "-f", "raw").out
    assert '"virtual-size": 1048576' in out


def test_operands_behind_two_dashes_are_no_options(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(capsys, "create", "-q", "--", "-f", "1M")
    assert (tmp_path / "-f").stat().st_size == MIB


# ---- documentation ----


def _visible_options(verb):
    options = set()
    for action in make_parser(verb).full()._actions:
        if action.help is not argparse.SUPPRESS:
            options.update(action.option_strings)
    return options


def _sections():
    """verb -> text of its section in docs/cli.md."""
    parts = re.split(r"^## (.+)$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {
        title.strip("` ").removeprefix("mmcow "): text
        for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_help_is_documented_and_every_documented_one_is_real(verb):
    sections = _sections()
    rows = re.findall(r"^\| (`-.*?) \|", sections[verb], flags=re.MULTILINE)
    documented = {option for row in rows for option in re.findall(r"`(-[-\w]+)[^`]*`", row)}
    # -h stands once, for all verbs.
    assert documented == _visible_options(verb) - {"-h", "--help"}


@pytest.mark.parametrize("verb", VERBS)
def test_every_refused_option_is_documented(verb):
    refused = make_parser(verb).full().refused
    text = _sections()[verb] + _sections()["Differences from qemu-img"]
    for option in refused:
        assert f"`{option}`" in text, option


def test_every_verb_has_a_section_and_the_other_way_round():
    assert set(VERBS) <= set(_sections())
    text = DOCUMENT.read_text(encoding="utf-8")
    assert set(re.findall(r"^## `mmcow (\w+)`$", text, flags=re.MULTILINE)) == set(VERBS)


def test_commands_of_io_are_documented():
    from mmcow.cli.io import COMMANDS

    text = _sections()["io"]
    for command in COMMANDS:
        assert f"`{command.usage}`" in text, command.usage


# ---- errors and exit statuses ----


def _tree(kind):
    yield kind
    for child in kind.__subclasses__():
        yield from _tree(child)


def test_every_error_class_has_an_exit_status():
    """This test wants every documented class in the table; classes that single modules have for
    themselves may inherit their status, but must have one."""
    kinds = [kind for kind in _tree(errors.MmcowError) if kind.__module__.startswith("mmcow.")]
    documented = [kind for kind in kinds if kind.__module__ == "mmcow.errors"]
    assert len(documented) > 15
    missing = [kind.__name__ for kind in documented if kind not in exits.STATUS]
    assert not missing, f"add to mmcow/cli/exits.py: {missing}"
    for kind in kinds:
        error = kind.__new__(kind)
        assert exits.status_of(error) in (exits.FAILED, exits.INTERRUPTED)
        assert exits.status_of(error, "compare") in (1, 2, exits.INTERRUPTED)


def test_every_line_of_the_table_is_an_error_class():
    assert set(exits.STATUS) <= set(_tree(errors.MmcowError))


@pytest.mark.parametrize(
    ("error", "verb", "status"),
    [
        (errors.UsageError("x"), "info", 1),
        (errors.CorruptError("a", "b", 1, "c"), "check", 1),
        (errors.StorageError(5, "read", "a"), "compare", 2),
        (errors.Mismatch(0), "compare", 1),
        (errors.Cancelled("x"), "compare", 130),
        (errors.Cancelled("x"), "convert", 130),
        (ValueError("x"), "info", 70),
        (OSError(5, "x"), "info", 70),
    ],
)
def test_status_of_an_error(error, verb, status):
    assert exits.status_of(error, verb) == status


def test_missing_file_is_named(capsys, tmp_path):
    path = tmp_path / "no such"
    err = run(capsys, "info", path, status=1).err
    assert err == f"mmcow: {path}: open: No such file or directory\n"


def test_error_below_names_the_opened_image_and_the_file_at_fault(capsys, pair):
    mmcow.create("upper.acow", backing="top.acow", backing_format="add-cow")
    os.unlink("base.raw")
    err = run(capsys, "map", "upper.acow", status=1).err
    assert err.startswith("mmcow: upper.acow: top.acow: backing file 'base.raw': ")
    assert "No such file or directory" in err


def test_damaged_header_names_file_field_and_value(capsys, pair):
    with open("top.acow", "r+b") as file:
        file.seek(8)
        file.write(b"\xff" * 8)
    err = run(capsys, "map", "top.acow", status=1).err
    assert err.startswith("mmcow: top.acow: ")
    assert re.search(r"0xf+", err), err


def test_error_while_working_names_the_opened_image_first(capsys, pair, monkeypatch):
    def fail(*_, **__):
        raise errors.StorageError(errno.EIO, "read", "base.raw", 4096, 512)

    monkeypatch.setattr("mmcow.cli.compare.compare", fail)
    run(capsys, "convert", "base.raw", "flat.raw")
    result = run(capsys, "compare", "top.acow", "flat.raw", status=2)
    assert result.err == ("mmcow: top.acow: base.raw: read at 4096+512: Input/output error\n")


def test_error_of_the_second_image_does_not_name_the_first(capsys, pair, monkeypatch):
    def fail(*_, **__):
        raise errors.StorageError(errno.EIO, "read", "flat.raw", 0, 512)

    run(capsys, "convert", "top.acow", "flat.raw")
    monkeypatch.setattr("mmcow.cli.compare.compare", fail)
    err = run(capsys, "compare", "top.acow", "flat.raw", status=2).err
    assert err == "mmcow: flat.raw: read at 0+512: Input/output error\n"


def test_bug_prints_one_line_and_a_hint(capsys, pair, monkeypatch):
    def crash(*_, **__):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("mmcow.cli.compare.compare", crash)
    monkeypatch.delenv("MMCOW_DEBUG", raising=False)
    err = run(capsys, "compare", "base.raw", "top.acow", status=70).err
    assert err.startswith("mmcow: internal error: ZeroDivisionError: oops\n")
    monkeypatch.setenv("MMCOW_DEBUG", "1")
    assert main(["compare", "base.raw", "top.acow"]) == 70
    assert "Traceback (most recent call last):" in capsys.readouterr().err


def test_warning_of_an_image_is_told(capsys, pair, monkeypatch):
    monkeypatch.setattr(mmcow.Image, "warnings", ["base.raw: is newer than it should be"])
    result = run(capsys, "map", "--output=json", "top.acow")
    assert result.err == ("mmcow: warning: top.acow: base.raw: is newer than it should be\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "top.acow", "top.acow"],
        ["convert", "top.acow", "flat"],
        ["resize", "top.acow", "8M"],
        ["stream", "top.acow"],
        ["bench", "-c", "1", "-d", "1", "top.acow"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_warning_of_an_image_is_told_even_if_quiet(capsys, pair, monkeypatch, arguments):
    monkeypatch.setattr(mmcow.Image, "warnings", ["base.raw: is newer than it should be"])
    result = run(capsys, *arguments, "-q")
    assert set(result.err.splitlines()) == {
        "mmcow: warning: top.acow: base.raw: is newer than it should be"
    }
    assert result.out == ""
    words = " ".join(run(capsys, arguments[0], "--help").out.split())
    assert "-q, --quiet say nothing but warnings and errors" in words


def test_probed_raw_is_warned_of_only_when_written(capsys, pair):
    assert "warning: base.raw: taken as raw" in run(capsys, "resize", "base.raw", "5M").err
    assert run(capsys, "resize", "-f", "raw", "base.raw", "6M").err == ""
    assert run(capsys, "map", "base.raw").err == ""


# ---- standard output ----


class _Stream:
    encoding = "utf-8"

    def __init__(self, number):
        self._error = OSError(number, os.strerror(number))

    def write(self, text):
        raise self._error

    def flush(self):
        pass

    def isatty(self):
        return False

    def fileno(self):
        raise OSError(errno.EINVAL, "no file")


def test_full_disk_under_standard_output_is_told(capsys, pair, monkeypatch):
    monkeypatch.setattr(sys, "stdout", _Stream(errno.ENOSPC))
    assert main(["info", "base.raw"]) == 1
    assert capsys.readouterr().err == "mmcow: standard output: No space left on device\n"


@pytest.mark.parametrize("arguments", [["info", "base.raw"], ["io", "-c", "length", "top.acow"]])
def test_closed_pipe_is_quiet(capsys, pair, monkeypatch, arguments):
    monkeypatch.setattr(sys, "stdout", _Stream(errno.EPIPE))
    assert main(arguments) == 141
    assert capsys.readouterr().err == ""


def test_missing_standard_streams_are_survived(capsys, pair, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["map", "base.raw"]) == 1
    assert capsys.readouterr().err == "mmcow: standard output: Bad file descriptor\n"
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["map", "base.raw"]) == 1
    assert main(["convert", "-q", "base.raw", "other.raw"]) == 0


def test_names_that_are_no_text_are_shown_escaped(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"disk-\xff.raw")
    run(capsys, "create", name, "1M")
    assert "image: disk-\\xff.raw" in run(capsys, "info", name).out
    assert '"filename": "disk-\\udcff.raw"' in run(capsys, "info", "--output=json", name).out


def test_errors_of_the_command_line_can_be_made_and_shown():
    assert str(CommandLineError("x")) == "x"
    assert "No space" in str(OutputError(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))


def test_quick_verbs_import_no_slow_modules():
    """This test keeps the start of ``mmcow info`` fast."""
    import subprocess

    code = (
        "import sys; from mmcow.cli.main import main; main(['info', sys.argv[1]]); "
        "slow = {'asyncio', 'dataclasses', 'inspect', 'json', 'shutil', 'subprocess', 'psutil', "
        "'logging', 'mmcow.jobs.convert', 'mmcow.cli.convert', 'mmcow.cli.map'}; "
        "sys.exit(', '.join(sorted(slow & set(sys.modules))) or None)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, __file__], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


# ---- plain command lines ----

PLAIN_WORDS = [
    "a", "b", "1M", "-f", "-F", "-U", "-q", "-s", "-t", "--output=json", "--output", "--share",
    "json", "human", "raw", "add-cow", "--format=raw", "--format", "-h", "--", "-", "", "-1",
    "--no-picture", "--backing-chain", "-o", "k=v", "--cache=none", "-p", "--progress=bar", "-ab",
    "-fraw", "--force-share", "--quiet=1", "--object", "x=y",
]  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_a_plain_line_means_what_argparse_makes_of_it(verb):
    chance = random.Random(f"plain {verb}")
    read = 0
    for _ in range(400):
        words = chance.choices(PLAIN_WORDS, k=chance.randrange(5))
        plain = make_parser(verb).parse_plain(words)
        if plain is not None:
            full = vars(make_parser(verb).full().parse(words))
            # argparse also has a name for each option that only ever raises.
            others = {name for name in full if name not in vars(plain)}
            assert all(full[name] is None for name in others), words
            assert {**vars(plain), **dict.fromkeys(others)} == full, words
            read += 1
    assert read > 5 or verb not in {"info", "map", "check"}, "hardly any line was plain"
