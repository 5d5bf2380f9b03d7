# SPDX-License-Identifier: MIT
"""The benchmarks' rounds, what programs say, and the report; no program is started."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager, nullcontext
from xml.etree import ElementTree as ET

import pytest

import mmcow
from bench import ours, peers, plots, process, report, runner
from bench.common import save
from bench.lab import Lab, Scale, Skipped
from bench.model import KIB, MIB, MMCOW, QCOW2, QCOW2_EL2, Aim, Cell, Requests, Sample, Start, Suite
from bench.process import Ended, Failed
from bench.suites import SUITES

READ = Requests("read", 4 * KIB, 1)
CELL = Cell("cell", READ, (MMCOW, QCOW2, QCOW2_EL2), (Aim((QCOW2, QCOW2_EL2), 1.0),))


@pytest.fixture
def run(monkeypatch):
    """Runs a cell by a function that stands in for all programs."""
    monkeypatch.setattr(runner, "installed", lambda _program: True)

    def run_cell(cell, measure, rounds=5):
        @contextmanager
        def session(_lab, _cell):
            yield measure

        monkeypatch.setitem(runner.SESSIONS, type(cell.work), session)
        return runner.run_cell(None, cell, rounds)

    return run_cell


def test_sides_take_turns_forwards_and_backwards(run):
    order = []

    def measure(side):
        order.append(side)
        return Sample(1.0)

    run(CELL, measure)
    forth = [MMCOW, QCOW2, QCOW2_EL2]
    assert order == (forth + forth[::-1]) * 2 + forth


def test_the_ratio_is_to_the_better_peer_and_every_run_is_kept(run):
    speeds = {MMCOW: iter([30.0, 60.0, 20.0, 30.0, 30.0])}

    def measure(side):
        value = next(speeds[side]) if side in speeds else {QCOW2: 10.0, QCOW2_EL2: 20.0}[side]
        return Sample(value, {"cpu_s": value / 10})

    result = run(CELL, measure)
    [ratio] = result["ratios"]
    assert (ratio["peer"], ratio["verdict"]) == (QCOW2_EL2, "met")
    assert ratio["values"] == [1.5, 3.0, 1.0, 1.5, 1.5]
    assert (ratio["median"], ratio["low"], ratio["high"]) == (1.5, 1.0, 3.0)
    assert result["sides"][MMCOW]["values"] == [30.0, 60.0, 20.0, 30.0, 30.0]
    assert result["sides"][MMCOW]["cpu_s"] == 3.0


def test_a_limit_is_kept_where_less_is_used(run):
    cell = Cell("start", Start(), (MMCOW,), limit=5.0)
    [ratio] = run(cell, lambda _side: Sample(10.0))["ratios"]
    assert (ratio["peer"], ratio["limit"]) == ("limit", 5.0)
    assert (ratio["median"], ratio["verdict"]) == (0.5, "short")


@pytest.mark.parametrize(
    ("error", "word", "text"),
    [
        (Failed("qemu-img: status 1: no"), "failed", "Failed: qemu-img: status 1: no"),
        (OSError(28, "No space left"), "failed", "OSError: [Errno 28] No space left"),
        (Skipped("needs root"), "skipped", "needs root"),
    ],
)
def test_what_goes_wrong_is_the_cells_result(run, error, word, text):
    def measure(_side):
        raise error

    assert run(CELL, measure) == {"name": "cell", word: text}


def test_a_cell_that_takes_too_long_ends(run, monkeypatch):
    monkeypatch.setattr(runner, "CELL_SECONDS_MOST", 0.1)
    begin = time.monotonic()
    result = run(CELL, lambda _side: time.sleep(30))
    assert result["failed"] == "not done after 0 s"
    assert time.monotonic() - begin < 10


def test_a_short_program_is_ended_with_whoever_waits_for_it(monkeypatch):
    """Neither it nor the thread that watches over it outlives an interrupt."""
    killed = []

    class Program(nullcontext):
        def wait(self):
            raise KeyboardInterrupt

        def kill(self):
            killed.append(self)

        def __enter__(self):
            return self

    monkeypatch.setattr(process.subprocess, "Popen", lambda *_, **__: Program())
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        process.seconds_of(["sleep", "1000"])
    assert len(killed) == 1
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(10)
    assert threading.active_count() == before


def test_a_missing_program_skips_the_cell(monkeypatch):
    monkeypatch.setattr(runner, "installed", lambda program: program != "qemu-img")
    assert runner.run_cell(None, CELL, 5) == {
        "name": "cell",
        "skipped": "qemu-img not installed",
    }


def test_overall_tells_how_many_cells_it_is_of(run):
    values = {MMCOW: 40.0, QCOW2: 10.0, QCOW2_EL2: 5.0}
    cells = [
        run(CELL, lambda side: Sample(values[side])),
        run(CELL, lambda _side: Sample(1.0)),
        {"name": "broken", "failed": "why"},
    ]
    suite = Suite("s", "S", (CELL,), (Aim((QCOW2, QCOW2_EL2), 1.5),))
    [found] = runner.overall(suite, cells)
    assert (found["median"], found["cells"], found["of"]) == (2.0, 2, 3)
    assert found["verdict"] == "met"
    assert runner.overall(suite, cells[2:]) == []


# ---- what programs say ----------------------------------------------------------------------


def test_qemu_img_bench_is_read():
    said = "Sending 2000 write requests, 4096 bytes each\nRun completed in 0.500 seconds.\n"
    assert peers.read_bench(Ended(said, 1.0, 0.25), 2000) == Sample(4000.0, {"cpu_s": 0.25})
    for bad in ("", "Run completed in 0.000 seconds."):
        with pytest.raises(Failed, match="qemu-img bench said"):
            peers.read_bench(Ended(bad, 1.0, 0.25), 2000)


def fio_said(**changes):
    job = {
        "error": 0, "read": {"total_ios": 500, "runtime": 250}, "write": {"total_ios": 0},
        "usr_cpu": 2.0, "sys_cpu": 8.0, "job_runtime": 1000,
    }  # fmt: skip
    return "nbd+unix:///?socket=/s\n" + json.dumps({"jobs": [job | changes]})


def test_fio_is_read_behind_the_line_of_its_nbd_engine():
    found = peers.read_fio(Ended(fio_said(), 1.0, 0.25), "read")
    assert found.value == 2000.0
    assert found.extras == {"requests": 500, "seconds": 0.25, "cpu_s": 0.1}


@pytest.mark.parametrize(
    "said", ["", "fio: no such engine", fio_said(error=5), fio_said(read={"total_ios": 0}), "{}"]
)
def test_fio_that_failed_is_no_figure(said):
    with pytest.raises(Failed, match="fio"):
        peers.read_fio(Ended(said, 1.0, 0.25), "read")


def test_mmcow_bench_is_read():
    assert ours.read_bench(Ended('{"iops": 1234.5}', 1.0, 0.5)) == Sample(1234.5, {"cpu_s": 0.5})
    for bad in ("", "[]", '{"iops": null}', "{}"):
        with pytest.raises(Failed, match="mmcow bench said"):
            ours.read_bench(Ended(bad, 1.0, 0.5))


def test_bits_are_written_where_the_format_has_them(tmp_path):
    """This test reads the bitmap back through the library."""
    disk, period = 8 * MIB, 2 * MIB
    with (tmp_path / "base.raw").open("wb") as base:
        base.truncate(disk)
    mmcow.create(tmp_path / "a", backing="base.raw", backing_format="raw")
    size = (tmp_path / "a").stat().st_size
    ours.write_bits(tmp_path / "a", disk, period)
    assert (tmp_path / "a").stat().st_size == size
    with mmcow.open(tmp_path / "a") as image:
        extents = list(image.block_status(layer=0))
    found = [(e.offset, e.length) for e in extents if e.kind is not mmcow.Kind.BELOW]
    assert found == [(n * period, 64 * KIB) for n in range(4)]


# ---- the lab --------------------------------------------------------------------------------


def test_the_lab_leaves_nothing_behind(tmp_path):
    with Lab(tmp_path, Scale(2 * MIB, MIB, MIB, 0.1), 1) as lab:
        path = lab.raw("base", 2 * MIB)
        data = path.read_bytes()
        assert lab.raw("base", 2 * MIB) == path
        assert data != lab.raw("base", MIB).read_bytes() * 2
        assert data == lab.raw("flat", 2 * MIB).read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_of_before_anything_is_made(tmp_path):
    with pytest.raises(Failed, match="MiB are needed"):
        Lab(tmp_path, Scale(1 << 60, MIB, MIB, 0.1), 1)
    assert list(tmp_path.iterdir()) == []


# ---- the report -----------------------------------------------------------------------------

HOST = {
    "cpu": "a CPU", "cpus": 2, "memory_gib": 4.0, "kernel": "6.1", "machine": "x86_64",
    "file_system": "ext4", "device": "virtio", "python": "3.11", "mmcow": "0.1", "commit": "",
    "programs": {"fio": "fio-3.33"},
}  # fmt: skip


def result_of(run, cells):
    suite = next(s for s in SUITES if s.name == "first")
    return {
        "suite": suite.name, "title": "A <title> & more", "note": "", "host": HOST,
        "conditions": "quiet", "parameters": {}, "overall": runner.overall(suite, cells),
        "cells": cells,
    }  # fmt: skip


def test_the_report_is_made_of_results_alone(run, tmp_path):
    cells = [
        run(CELL, lambda side: Sample(30.0 if side == MMCOW else 20.0)),
        {"name": "broken", "failed": "a | b\nc"},
        {"name": "absent", "skipped": "fio not installed"},
    ]
    save("first", result_of(run, cells), tmp_path)
    page = report.write(tmp_path).read_text(encoding="utf-8")
    lines = page.splitlines()
    assert any(
        "mmcow 30; qcow2 20; qcow2 el2 20 requests/s | qcow2 | 1.5 | 1.5 to 1.5 (94%) | 1 | met |"
        in line for line in lines
    )  # fmt: skip
    assert "| broken | failed: a \\| b c | | | | | |" in lines
    assert "| absent | skipped: fio not installed | | | | | |" in lines
    assert "| all 1 of 3, geometric mean | | qcow2 or qcow2 el2 | 1.5 |" in page
    assert "results/first.svg" in page
    picture = ET.parse(tmp_path / "results" / "first.svg").getroot()
    texts = [part.text for part in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert "A <title> & more" in texts
    assert "cell" in texts
    before = (tmp_path / "report.md").read_bytes()
    assert report.write(tmp_path).read_bytes() == before


def test_a_report_of_nothing_says_so(tmp_path):
    (tmp_path / "results").mkdir()
    assert "Nothing has been measured yet." in report.write(tmp_path).read_text(encoding="utf-8")


def test_a_line_for_the_terminal(run):
    result = run(CELL, lambda _side: Sample(1.0))
    assert report.line(result).startswith("cell: 1 (1 to 1) of qcow2, aim 1: met [mmcow 1, ")
    assert report.line({"name": "x", "failed": "why"}) == "x: failed: why"


def test_points_are_drawn_in_the_order_of_their_ratios():
    rows = [plots.Row(str(n), n, n * 0.9, n * 1.1, 1.0, "met") for n in (0.2, 1.0, 30.0)]
    picture = ET.fromstring(plots.draw("t", rows))
    name = "{http://www.w3.org/2000/svg}circle"
    places = [float(point.attrib["cx"]) for point in picture.iter(name)]
    assert places == sorted(places)
    assert 300 <= places[0] < places[-1] <= 740
