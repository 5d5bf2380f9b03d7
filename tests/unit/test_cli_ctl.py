# SPDX-License-Identifier: MIT
"""``mmcow ctl`` against a server in this process: what it shows, and where; and what
``mmcow serve`` says of its command line."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from types import SimpleNamespace

import pytest

from mmcow.cli import ctl
from mmcow.errors import UsageError
from mmcow.nbd.control import Control
from tests.unit.nbd_serving import MIB, Serving, make_overlay, make_raw, serving
from tests.unit.test_cli import run

SIZE = 8 * MIB


@pytest.fixture
def control(tmp_path, rng):
    """Path of the control socket of a served overlay, all of which is in its base."""
    base = make_raw(tmp_path / "base.raw", rng.randbytes(SIZE))
    path = str(tmp_path / "ctl.sock")
    with serving(make_overlay(tmp_path, base), tmp_path / "nbd.sock") as served:
        control = served.run(lambda: Control(served.server, lambda: None))
        served.run(lambda: control.listen(path))
        yield path
        served.run(control.close)


class Terminal(io.StringIO):
    """A standard stream that a person looks at."""

    encoding = "utf-8"

    def isatty(self):
        return True


# ---- stream --wait ----


def test_waiting_for_a_stream_shows_the_bar_on_a_terminal(capsys, control, monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("COLUMNS", "70")
    out = run(capsys, "ctl", control, "stream", "--rate", "16M", "--wait").out
    assert out == "stream completed: 100.0 % of 8 MiB (8388608 bytes)\n"
    lines = [line for line in re.split(r"[\r\n]|\x1b\[K", shown.getvalue()) if line]
    assert len(lines) > 1
    assert all(line.startswith("stream [") for line in lines)
    assert "100.0 %  8 MiB/8 MiB" in lines[-1]
    assert shown.getvalue().endswith("\n")


def test_waiting_for_a_stream_shows_nothing_more_elsewhere(capsys, control):
    result = run(capsys, "ctl", control, "stream", "--wait")
    assert result.err == ""
    assert result.out == "stream completed: 100.0 % of 8 MiB (8388608 bytes)\n"


def test_waiting_for_a_stream_tells_programs(capsys, control):
    given = ("--rate", "16M", "--wait", "--progress=json", "--output=json")
    result = run(capsys, "ctl", control, "stream", *given)
    told = [json.loads(line) for line in result.err.splitlines()]
    done = [line["done"] for line in told]
    assert len(told) > 1
    assert done == sorted(done)
    assert told[-1] == {"done": SIZE, "total": SIZE, "percent": 100.0}
    assert json.loads(result.out)["state"] == "completed"


def test_p_leaves_standard_output_to_the_result_in_json(capsys, control):
    given = ("-p", "--rate", "16M", "--wait", "--output=json")
    result = run(capsys, "ctl", *given, control, "stream")
    assert json.loads(result.out)["state"] == "completed"  # nothing else is there
    told = [json.loads(line) for line in result.err.splitlines()]
    assert told[-1] == {"done": SIZE, "total": SIZE, "percent": 100.0}


def test_p_is_for_people_as_everywhere(capsys, control):
    result = run(capsys, "ctl", "-p", "--rate", "16M", "--wait", control, "stream")
    assert result.err == ""
    assert re.fullmatch(
        r"(    \(\d+\.\d\d/100%\)\r)+\nstream completed: 100.0 % of 8 MiB \(8388608 bytes\)\n",
        result.out,
    )


def test_a_rate_is_that_of_the_stream_that_runs_and_the_wait_is_for_it(capsys, control):
    run(capsys, "ctl", control, "stream", "--rate", "1")  # for days
    err = run(capsys, "ctl", control, "stream", status=1).err
    assert "a stream is running already; given a rate, this changes its own" in err
    assert run(capsys, "ctl", control, "stream", "--rate", "2").out.startswith("stream running: ")
    out = run(capsys, "ctl", control, "stream", "start", "--rate", "16M", "--wait").out
    assert out == "stream completed: 100.0 % of 8 MiB (8388608 bytes)\n"


@pytest.mark.parametrize("words", [["stream"], ["stream", "start"]])
def test_waiting_for_a_stream_that_runs(capsys, control, words):
    run(capsys, "ctl", control, "stream", "--rate", "16M")
    out = run(capsys, "ctl", control, *words, "--wait").out
    assert out.startswith("stream completed: ")


def test_ending_the_wait_leaves_the_stream_and_the_line(capsys, control, monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    stop = SimpleNamespace(sleep=lambda _: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(ctl, "time", stop)
    run(capsys, "ctl", control, "stream", "--rate", "1", "--wait", status=130)
    assert shown.getvalue().endswith(f"\nmmcow: {control}: ctl: cancelled\n")
    monkeypatch.undo()
    assert "stream paused" in run(capsys, "ctl", control, "stream", "pause").out  # it ran on
    run(capsys, "ctl", control, "stream", "cancel")


@pytest.mark.parametrize("option", ["-p", "--progress=bar"])
def test_progress_is_of_a_wait(capsys, control, option):
    err = run(capsys, "ctl", control, "stream", option, status=1).err
    assert f"ctl: {option.partition('=')[0]} goes with stream --wait, not with stream" in err
    assert "goes with stream --wait" in run(capsys, "ctl", control, "flush", option, status=1).err


@pytest.mark.parametrize("words", [["top"], ["status"], ["snapshot", "--as", "s"], ["quit"]])
def test_argument_that_a_command_does_not_take(capsys, control, words):
    before = run(capsys, "ctl", control, "status", "--output=json").out
    err = run(capsys, "ctl", control, words[0], "x", *words[1:], status=1).err
    assert f"ctl: {words[0]} takes no argument (x)" in err
    after = run(capsys, "ctl", control, "status", "--output=json").out
    chains = [json.loads(told)["exports"][0]["chain"] for told in (before, after)]
    assert chains[0] == chains[1]


@pytest.mark.parametrize("command", ["status", "top", "flush", "quit"])
def test_waiting_is_for_a_stream(capsys, control, command):
    err = run(capsys, "ctl", control, "--wait", command, status=1).err
    assert f"ctl: --wait goes with stream, not with {command}" in err


def test_waiting_for_a_stream_that_is_over(capsys, control):
    run(capsys, "ctl", control, "stream", "--wait")
    for words in (["stream", "--wait"], ["stream"], ["stream", "--wait", "--rate", "5"]):
        out = run(capsys, "ctl", control, *words).out
        assert out == "stream completed: 100.0 % of 8 MiB (8388608 bytes)\n"


# ---- top ----


@pytest.fixture
def thrice(monkeypatch):
    """The third rest of ``top`` is its last."""
    rests = []

    def rest(seconds):
        rests.append(seconds)
        if len(rests) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ctl, "time", SimpleNamespace(sleep=rest))


@pytest.mark.usefixtures("thrice")
def test_top_in_a_pipe_ends_each_report_with_an_empty_line(capsys, control):
    out = run(capsys, "ctl", control, "top").out
    assert "\x1b" not in out
    assert out.endswith("\n\n")
    reports = out.removesuffix("\n\n").split("\n\n")
    assert len(reports) == 3
    for report in reports:
        assert report.startswith("export '':")
        assert "now: idle" in report


@pytest.mark.usefixtures("thrice")
def test_top_as_json_is_a_line_for_each_report(capsys, control):
    lines = run(capsys, "ctl", control, "top", "--output=json").out.splitlines()
    assert [json.loads(line)["exports"][0]["name"] for line in lines] == [""] * 3


@pytest.mark.usefixtures("thrice")
def test_top_on_a_terminal_is_drawn_over_itself(capsys, control, monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    run(capsys, "ctl", control, "top")
    assert shown.getvalue().count("\x1b[H\x1b[J") == 3
    assert "\n\n" not in shown.getvalue()


# ---- serve ----


@pytest.mark.parametrize("value", ["-1", "-0.5", "nan", "inf", "soon", ""])
def test_idleness_that_is_no_time(capsys, value):
    err = run(capsys, "serve", "--socket", "s", f"--exit-when-idle={value}", "x", status=1).err
    assert f"argument --exit-when-idle: {value!r}: must be a number of seconds, 0 or more" in err


@pytest.mark.parametrize("control", ["s", "./s", "link/s"])
def test_one_name_for_both_sockets(capsys, tmp_path, monkeypatch, control):
    """Nothing is opened before that is told: there is no such image."""
    monkeypatch.chdir(tmp_path)
    os.symlink(".", "link")
    given = ["--socket", "s", "--control", control]
    err = run(capsys, "serve", *given, "nosuch.raw", status=1).err
    assert f"--socket and --control are both {control}: each needs a name of its own" in err
    assert os.listdir() == ["link"]


@pytest.mark.parametrize("order", [1, -1])
def test_a_file_name_that_is_no_export_name_is_the_one_to_blame(capsys, order):
    """Clients are told names in UTF-8, which a file name need not be."""
    images = ["bad\udcff.raw", "good.raw"][::order]
    err = run(capsys, "serve", "--socket", "s", *images, status=1).err
    assert err.startswith("mmcow: bad\\xff.raw: export name ")
    assert "is not UTF-8: use --export-name" in err
    assert "good.raw" not in err
    given = ["--export-name", "a", "--export-name", "b\udcff"]
    err = run(capsys, "serve", "--socket", "s", *given, "one.raw", "two.raw", status=1).err
    assert err.startswith("mmcow: two.raw: export name ")


def test_the_library_blames_the_same_one(tmp_path):
    images = {
        name: make_raw(tmp_path / f"{number}.raw", bytes(MIB))
        for number, name in enumerate(("good", "\udcff", "fine"))
    }
    with pytest.raises(UsageError, match=r"1\.raw: export name .* is not UTF-8"):
        Serving(images, tmp_path / "s")
