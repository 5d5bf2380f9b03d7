# SPDX-License-Identifier: MIT
"""Progress in all its forms, and how signals stop a command."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import sys
import threading

import pytest

from mmcow.cli import progress
from mmcow.cli.main import main
from mmcow.cli.signals import Signals
from mmcow.cli.ui import Ui
from mmcow.errors import Cancelled
from tests.unit.test_cli import MIB, pair, run, template, written  # noqa: F401

LONG = [
    ["convert", "top.acow", "flat"],
    ["compare", "top.acow", "top.acow"],
    ["commit", "top.acow"],
    ["stream", "top.acow"],
]


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def arguments(**given):
    return argparse.Namespace(**{"progress": None, "show_progress": False, **given})


# ---- forms ----


@pytest.mark.parametrize("command", LONG, ids=lambda command: command[0])
def test_json_is_a_line_for_each_report(capsys, pair, command):  # noqa: F811
    result = run(capsys, *command, "--progress=json")
    lines = [json.loads(line) for line in result.err.splitlines()]
    assert lines[0]["done"] == 0
    assert lines[-1] == {"done": 4 * MIB, "total": 4 * MIB, "percent": 100.0}
    assert all(set(line) == {"done", "total", "percent"} for line in lines)
    done = [line["done"] for line in lines]
    assert done == sorted(done)


@pytest.mark.parametrize("command", LONG, ids=lambda command: command[0])
@pytest.mark.parametrize("options", [[], ["--progress=none"], ["-q"], ["-q", "-p"]])
def test_nothing_is_shown_where_nobody_looks(capsys, pair, command, options):  # noqa: F811
    result = run(capsys, *command, *options)
    assert result.err == ""
    assert "%" not in result.out


@pytest.mark.parametrize("command", LONG, ids=lambda command: command[0])
def test_p_without_a_terminal_is_as_qemu_img(capsys, pair, command):  # noqa: F811
    out = run(capsys, *command, "-p").out
    assert re.match(r"    \(0\.00/100%\)\r(    \(\d+\.\d\d/100%\)\r)*    \(100\.00/100%\)\r\n", out)


def test_json_is_shown_even_if_quiet(capsys, pair):  # noqa: F811
    assert '"percent": 100.00' in run(capsys, *LONG[0], "-q", "--progress=json").err


@pytest.mark.parametrize("command", LONG, ids=lambda command: command[0])
def test_bar(capsys, pair, monkeypatch, command):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "70")
    err = run(capsys, *command, "--progress=bar").err
    lines = [line for line in re.split(r"[\r\n]|\x1b\[K", err) if line]
    assert lines[-1].startswith(f"{command[0]} [█")
    assert "100.0 %  4 MiB/4 MiB" in lines[-1]
    assert all(len(line) < 70 for line in lines)
    assert err.endswith("\n")


def test_reports_are_not_shown_more_often_than_ten_times_a_second(capsys):
    clock = Clock()
    meter = progress.JsonMeter(Ui(), "x", clock)
    for done in range(100):
        meter(done + 1, 100)
        clock.now += 0.01
    meter.finish()
    shown = [json.loads(line)["done"] for line in capsys.readouterr().err.splitlines()]
    assert 10 <= len(shown) <= 12
    assert shown[0] == 1
    assert shown[-1] == 100


def test_last_report_is_not_repeated(capsys):
    clock = Clock()
    meter = progress.JsonMeter(Ui(), "x", clock)
    meter(5, 5)
    meter.finish()
    assert capsys.readouterr().err.count("\n") == 1


def test_compare_that_finds_a_difference_does_not_claim_to_have_read_all(capsys, pair):  # noqa: F811
    err = run(capsys, "compare", "--progress=json", "top.acow", "base.raw", status=1).err
    assert json.loads(err.splitlines()[-1])["percent"] < 100


def test_job_without_work_is_done(capsys):
    meter = progress.JsonMeter(Ui(), "x", Clock())
    meter(0, 0)
    meter.finish()
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["percent"] == 100


def test_bar_shows_rate_and_time_left(monkeypatch):
    clock = Clock()
    meter = progress.BarMeter(Ui(), "convert", clock)
    clock.now += 2
    meter.done, meter.total = 256 * MIB, 1024 * MIB
    assert meter.line(100).endswith(" 25.0 %  256 MiB/1 GiB  128 MiB/s  0:06 left")
    meter.done = meter.total
    assert meter.line(100).endswith("100.0 %  1 GiB/1 GiB  512 MiB/s  in 0:02")
    for width in range(10, 120):
        assert len(meter.line(width)) <= width


def test_bar_of_a_job_that_others_began_shows_the_rate_of_now():
    clock = Clock()
    bar = progress.BarMeter(Ui(), "stream", clock)
    bar.show = lambda: None
    bar.begun = None
    bar(512 * MIB, 1024 * MIB)
    clock.now += 2
    assert "/s" not in bar.line(100)
    bar(768 * MIB, 1024 * MIB)
    assert bar.line(100).endswith(" 75.0 %  768 MiB/1 GiB  128 MiB/s  0:02 left")


def test_bar_without_utf_8(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    meter = progress.BarMeter(Ui(), "convert", Clock())
    meter.done, meter.total = 1, 2
    assert re.search(r"\[#+-+\]", meter.line(80))


def test_bar_that_nobody_takes_does_not_stop_the_job(monkeypatch):
    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Broken())
    meter = progress.BarMeter(Ui(), "convert", Clock())
    meter(0, 10)
    meter.finish()


def test_bar_is_chosen_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    ui = Ui()
    assert progress._choose(ui, arguments()) is progress.Meter
    assert progress._choose(ui, arguments(show_progress=True)) is progress.QemuMeter
    for output, chosen in (("human", progress.QemuMeter), ("json", progress.JsonMeter)):
        assert progress._choose(ui, arguments(show_progress=True, output=output)) is chosen
    assert progress._choose(ui, arguments(output="json")) is progress.Meter
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert progress._choose(ui, arguments()) is progress.BarMeter
    assert progress._choose(ui, arguments(progress="none")) is progress.Meter
    ui.quiet = True
    assert progress._choose(ui, arguments()) is progress.Meter
    assert progress._choose(ui, arguments(progress="bar")) is progress.BarMeter


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (720, "12:00"), (3723, "1:02:03")]
)
def test_clock_time(seconds, text):
    assert progress.clock_time(seconds) == text


# ---- signals ----


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", LONG, ids=lambda command: command[0])
def test_signal_stops_a_job_with_the_image_valid(
    capsys,
    pair,  # noqa: F811
    monkeypatch,
    command,
    number,
    status,
):
    """This test sends the signal at the first report, and again: the second changes nothing."""
    real = progress.Meter.__call__

    def interrupt(self, done, total):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        real(self, done, total)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(progress.Meter, "__call__", interrupt)
    err = run(capsys, *command, status=status).err
    assert err == f"mmcow: top.acow: {command[0]}: cancelled\n"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not os.path.exists("flat")
    monkeypatch.setattr(progress.Meter, "__call__", real)
    run(capsys, "check", "top.acow")
    run(capsys, *command)


def test_signal_leaves_the_bar_on_a_line_of_its_own(capsys, pair, monkeypatch):  # noqa: F811
    real = progress.Meter.__call__

    def interrupt(self, done, total):
        real(self, done, total)
        os.kill(os.getpid(), signal.SIGINT)
        real(self, done, total)

    monkeypatch.setattr(progress.Meter, "__call__", interrupt)
    err = run(capsys, "stream", "--progress=bar", "top.acow", status=130).err
    assert err.endswith("\nmmcow: top.acow: stream: cancelled\n")


def test_signal_between_commands_of_io(capsys, pair, monkeypatch):  # noqa: F811

    class Lines(io.StringIO):
        def readline(self, *_):
            os.kill(os.getpid(), signal.SIGINT)
            return "write -q 0 4k\n"

    monkeypatch.setattr(sys, "stdin", Lines())
    assert run(capsys, "io", "top.acow", status=130).err == "mmcow: top.acow: io: cancelled\n"
    assert '"allocated-clusters": 2' in run(capsys, "check", "--output=json", "top.acow").out


def test_signal_during_a_long_map(capsys, pair, monkeypatch):  # noqa: F811
    import mmcow

    real = mmcow.Image.block_status

    def interrupt(self, *given, **named):
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, *given, **named)

    monkeypatch.setattr(mmcow.Image, "block_status", interrupt)
    for words in (["--output=json"], ["--no-picture"], []):
        run(capsys, "map", *words, "top.acow", status=130)


def test_ignored_signals_stay_ignored(pair, monkeypatch):  # noqa: F811
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        signals = Signals()
        with signals.watched(for_good=False):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == signals._note
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.number == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_of_a_process_that_ends_ignore_further_signals():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    try:
        with Signals().watched(for_good=True):
            pass
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_check_raises_once_asked():
    signals = Signals()
    signals.check("x")
    signals.number = signal.SIGINT
    with pytest.raises(Cancelled, match="x: cancelled"):
        signals.check("x")


def test_command_runs_in_another_thread(pair, capsys):  # noqa: F811
    status = []
    thread = threading.Thread(target=lambda: status.append(main(["info", "base.raw"])))
    thread.start()
    thread.join()
    assert status == [0]
