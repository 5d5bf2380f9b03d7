# SPDX-License-Identifier: MIT
"""``mmcow bench``: options, output, JSON, pictures, and what it does to a disk."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import pytest

import mmcow
from mmcow.cli import chart, plot
from mmcow.errors import StorageError
from mmcow.jobs import bench
from mmcow.jobs.latency import Histogram
from mmcow.storage.linux import LinuxHandle, LinuxHost, NativeQueue
from tests.unit.test_cli import KIB, MIB, pair, run, template  # noqa: F401

QUICK = ("-c", "400", "-d", "8")


@pytest.fixture
def raw(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.raw").write_bytes(b"\1" * MIB)
    return tmp_path / "a.raw"


def measured(capsys, *arguments):
    """The JSON object."""
    return json.loads(run(capsys, "bench", "--json", *arguments).out)


# ---- JSON ----


def test_json_has_what_programs_rely_on(capsys, raw):
    found = measured(capsys, *QUICK, "--random", "--seed", "7", "-f", "raw", "a.raw")
    assert type(found["iops"]) is float
    assert type(found["bandwidth"]) is float
    assert found["bandwidth"] == pytest.approx(found["iops"] * 4096, rel=1e-3)
    assert found["iops"] == pytest.approx(found["count"] / found["seconds"], rel=1e-3)
    latency = found["latency_us"]
    assert list(latency) == ["mean", "min", "max", "p50", "p90", "p99", "p99.9"]
    assert 0 < latency["min"] <= latency["p50"] <= latency["p90"] <= latency["p99"]
    assert latency["p99"] <= latency["p99.9"] <= latency["max"] < found["seconds"] * 1e6
    assert found["queue"] in ("io_uring", "threads", "synchronous")
    expected = {
        "operation": "read", "read_percent": 100, "order": "random", "seed": 7, "count": 400,
        "buffer_size": 4096, "step_size": None, "depth": 8, "threads": 1, "offset": 0,
        "length": None, "pattern": None, "flush_interval": 0, "drain": True,
        "filename": "a.raw", "format": "raw", "size": MIB, "layers": 1,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert sum(count for _, _, count in found["latency_histogram"]) == 400
    assert len(found["runs"]) == 1
    assert found["runs"][0]["count"] == 400
    assert "vs" not in found


def cpu_used(monkeypatch, *, user, system):
    """Make every run use so many seconds of CPU."""

    class Process:
        now = 0

        def cpu_times(self):
            Process.now += 1
            return SimpleNamespace(user=user * Process.now, system=system * Process.now)

    monkeypatch.setattr(bench.psutil, "Process", Process)


def test_cpu_per_request(capsys, raw, monkeypatch):
    cpu_used(monkeypatch, user=0.25, system=0.75)
    found = measured(capsys, "-c", "100", "-d", "1", "a.raw")
    names = ("cpu_us_per_io", "user_us_per_io", "system_us_per_io")
    assert [found["runs"][0][name] for name in names] == [10000, 2500, 7500]
    assert found["cpu_us_per_io"] == found["spread"]["cpu_us_per_io"]["median"] == 10000
    out = run(capsys, "bench", "-c", "100", "-d", "1", "a.raw").out
    assert "\n  CPU 10000.00 us per request\n" in out


def test_cpu_that_cannot_be_told_is_not(capsys, raw, monkeypatch):
    cpu_used(monkeypatch, user=0.125, system=0.0)
    found = measured(capsys, "-c", "100", "-d", "1", "a.raw", "--repeat", "2")
    names = ("cpu_us_per_io", "user_us_per_io", "system_us_per_io")
    assert [found["runs"][0][name] for name in names] == [None] * 3
    assert found["cpu_us_per_io"] is found["spread"]["cpu_us_per_io"] is None
    out = run(capsys, "bench", "-c", "100", "-d", "1", "a.raw").out
    assert "\n  CPU - per request (less than 0.2 s in a run: --time makes longer ones)\n" in out


@pytest.mark.parametrize(("count", "seconds"), [(400, 0.001234567), (123_457, 1.9876543)])
def test_json_of_one_run_has_each_figure_once(capsys, raw, monkeypatch, count, seconds):
    """Also where there are more digits than are shown."""
    cpu_used(monkeypatch, user=0.25, system=0.123456789)
    monkeypatch.setattr(bench.Run, "iops", property(lambda _: count / seconds))
    found = measured(capsys, "-c", "100", "-d", "1", "a.raw")
    for name in ("iops", "bandwidth", "cpu_us_per_io"):
        assert {found[name], found["runs"][0][name]} == set(found["spread"][name].values()), name
        assert len({found[name], found["runs"][0][name]}) == 1


def test_json_of_repeats_has_medians_and_their_spread(capsys, raw):
    found = measured(capsys, *QUICK, "--repeat", "3", "-f", "raw", "a.raw")
    rates = sorted(run["iops"] for run in found["runs"])
    assert len(rates) == 3
    assert found["iops"] == pytest.approx(rates[1])
    assert found["spread"]["iops"]["min"] == pytest.approx(rates[0], rel=1e-5)
    assert found["spread"]["iops"]["max"] == pytest.approx(rates[2], rel=1e-5)
    assert found["count"] == 1200


def test_json_of_a_comparison_has_the_other_sides_and_ratios(capsys, pair):  # noqa: F811
    found = measured(
        capsys, *QUICK, "--repeat", "2", "top.acow", "--vs", "base.raw", "--vs", "top.acow",
        "--vs-format", "raw",
    )  # fmt: skip
    assert found["format"] == "add-cow"
    assert found["layers"] == 2
    assert [side["filename"] for side in found["vs"]] == ["base.raw", "top.acow"]
    # --vs-format is that of the other sides.
    assert [side["format"] for side in found["vs"]] == ["raw", "raw"]
    assert found["vs"][1]["size"] < MIB
    for side in found["vs"]:
        pairs = zip(found["runs"], side["runs"], strict=True)
        ratios = sorted(mine["iops"] / other["iops"] for mine, other in pairs)
        assert side["ratio"]["min"] == pytest.approx(ratios[0], rel=1e-4)
        assert side["ratio"]["max"] == pytest.approx(ratios[1], rel=1e-4)


def test_comparison_runs_five_times_by_itself(capsys, raw):
    found = measured(capsys, "-c", "20", "-d", "1", "a.raw", "--vs", "a.raw")
    assert len(found["runs"]) == len(found["vs"][0]["runs"]) == 5


def test_json_of_a_mix_tells_reads_and_writes_apart(capsys, raw):
    found = measured(
        capsys, *QUICK, "--mix", "30", "--flush-interval", "10", "-q", "-f", "raw", "a.raw"
    )
    assert found["operation"] == "mixed"
    assert found["reads"]["count"] + found["writes"]["count"] == found["count"] == 400
    assert 60 < found["reads"]["count"] < 180
    assert found["flushes"]["count"] == found["writes"]["count"] // 10
    assert found["flushes"]["latency_us"]["p50"] > 0


def test_json_stays_json_when_progress_is_asked_for(capsys, raw):
    result = run(capsys, "bench", "--json", "--progress=json", *QUICK, "a.raw")
    json.loads(result.out)
    assert '"percent": 100.00' in result.err


# ---- what is done to the disk ----


def test_write_tells_first_and_writes_the_pattern_where_it_was_told(capsys, raw):
    result = run(
        capsys, "bench", "-w", "--pattern", "0x5a", "-c", "16", "-d", "2", "-s", "2k", "-S", "8k",
        "-o", "256k", "--length", "64k", "-f", "raw", "a.raw",
    )  # fmt: skip
    assert (
        "mmcow: a.raw: writing 16 x 2 KiB of bytes 0x5a between 262144 and 327680: "
        "what is there is lost\n" in result.err
    )
    expected = bytearray(b"\1" * MIB)
    for start in range(256 * KIB, 320 * KIB, 8 * KIB):
        expected[start : start + 2 * KIB] = b"\x5a" * (2 * KIB)
    assert raw.read_bytes() == expected


def test_warning_names_what_is_before_the_offset_where_writes_get_there(capsys, raw):
    for count, start in (("192", 256 * KIB), ("193", 0)):
        result = run(
            capsys, "bench", "-w", "-c", count, "-d", "1", "-o", "256k", "-f", "raw", "a.raw"
        )
        assert f" between {start} and {MIB}: " in result.err
        assert raw.read_bytes()[0] == (1 if start else 0)


def test_reading_changes_nothing_and_warns_of_nothing(capsys, raw):
    result = run(capsys, "bench", *QUICK, "a.raw")
    assert result.err == ""
    assert raw.read_bytes() == b"\1" * MIB


def test_image_in_use_is_not_written_to(capsys, raw):
    with mmcow.open(raw, format="raw"):
        err = run(capsys, "bench", "-w", *QUICK, "-f", "raw", "a.raw", status=1).err
    assert "a.raw" in err
    assert raw.read_bytes() == b"\1" * MIB


def test_disk_in_use_is_measured_where_sharing_is_allowed(capsys, raw):
    with mmcow.open(raw, format="raw", write=True):
        run(capsys, "bench", *QUICK, "-f", "raw", "a.raw", status=1)
        run(capsys, "bench", *QUICK, "-U", "-f", "raw", "a.raw")


# ---- Ctrl-C ----


@pytest.fixture
def stopped_in_run(monkeypatch):
    """Say how many runs are over when the signal comes."""

    def stop(runs, number=signal.SIGINT):
        def stopping(side, *arguments):
            nonlocal runs
            if runs == 0:
                signal.raise_signal(number)
            runs -= 1
            return real(side, *arguments)

        real = bench._run
        monkeypatch.setattr(bench, "_run", stopping)

    return stop


@pytest.mark.parametrize("options", [[], ["--json"], ["-q"], ["--plot", "p.svg"]])
def test_signal_before_a_run_is_over_leaves_nothing_to_show(capsys, raw, stopped_in_run, options):
    stopped_in_run(0)
    result = run(capsys, "bench", "--time", "60", *options, "a.raw", status=130)
    assert result.out == ""
    assert result.err == "mmcow: bench: no run was over, so there are no figures: cancelled\n"
    assert not raw.with_name("p.svg").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_keeps_the_runs_that_were_over(capsys, raw, stopped_in_run, number, status):
    stopped_in_run(3, number)
    result = run(
        capsys, "bench", "-c", "50", "--repeat", "7", "a.raw", "--plot", "p.svg", status=status
    )
    assert "\ninterrupted: 3 of 7 runs were over\n" in result.out
    assert " (150 requests in " in result.out
    assert "  3 runs: middle half " in result.out
    assert result.err == "mmcow: bench: 3 of 7 runs were over: cancelled\n"
    assert ET.parse("p.svg").getroot().tag.endswith("svg")


def test_comparison_that_was_stopped_has_the_ratios_of_its_pairs(capsys, raw, stopped_in_run):
    # A B, B A, A: the third run of the first side has no partner.
    stopped_in_run(5)
    (raw.parent / "b.raw").write_bytes(raw.read_bytes())
    arguments = ("-c", "50", "a.raw", "--vs", "b.raw")
    result = run(capsys, "bench", "--json", *arguments, status=130)
    found = json.loads(result.out)
    assert found["interrupted"] is True
    assert (found["count"], found["vs"][0]["count"]) == (150, 100)
    pairs = zip(found["runs"], found["vs"][0]["runs"], strict=False)
    ratios = [mine["iops"] / other["iops"] for mine, other in pairs]
    assert found["vs"][0]["ratio"]["min"] == pytest.approx(min(ratios), rel=1e-4)
    assert found["vs"][0]["ratio"]["max"] == pytest.approx(max(ratios), rel=1e-4)
    stopped_in_run(1)
    out = run(capsys, "bench", *arguments, status=130).out
    assert "interrupted: 1 of 10 runs were over" in out
    assert "b.raw" not in out
    assert measured(capsys, "-c", "50", "a.raw")["interrupted"] is False


# ---- options ----


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-c", "0"], "count '0': must be a number of at least 1"),
        (["-c", "1e3"], "count '1e3'"),
        (["-d", "-1"], "depth '-1'"),
        (["-d", "5000"], "depth 5000: must be at least 1 and at most 4096"),
        (["-s", "0"], "buffer size 0"),
        (["-s", "4x"], "buffer size '4x'"),
        (["--time", "0"], "time '0'"),
        (["--time", "nan"], "time 'nan'"),
        (["--pattern", "256"], "pattern '256': must be a number from 0 to 255"),
        (["--mix", "101"], "mix '101'"),
        (["--flush-interval", "64"], "a flush interval needs writes"),
        (["-w", "--flush-interval", "8"], "flush interval 8: must not be smaller than the depth"),
        (["--random", "-S", "8k"], "random requests have no step size"),
        (["-w", "--mix", "70"], "-w writes only, --mix reads and writes; use one (-w is --mix 0)"),
        (["--seed", "0"], "--seed needs --random or --mix"),
        (["-w", "--seed", "7"], "--seed needs --random or --mix"),
        (["--vs-format", "raw"], "--vs-format needs --vs"),
        (["-o", "2M"], "a.raw: offset 2097152"),
        (["--length", "1k"], "have no room for 1 x 4096 bytes"),
        (["-i", "aio"], "argument -i/--aio: invalid choice: 'aio'"),
        (["-t", "fast"], "fast"),
        (["--plot", "a.jpg"], "--plot 'a.jpg': the name must end in .svg or .png"),
        (["--plot", "no/such/a.svg"], "'no/such' is no directory"),
        (["--vs", "missing.raw"], "missing.raw: open: No such file or directory"),
        (["-U", "-w"], "-U is for reading only, and this writes"),
    ],
)
def test_wrong_options_say_what_is_wrong(capsys, raw, arguments, text):
    result = run(capsys, "bench", *arguments, "a.raw", status=1)
    assert text in result.err
    assert result.out == ""
    assert raw.read_bytes() == b"\1" * MIB


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--flush-interval", "64"], "a flush interval needs writes"),
        (["-d", "5000"], "depth 5000: must be at least 1 and at most 4096"),
        (["--random", "-S", "8k"], "random requests have no step size"),
        (["--vs-format", "raw"], "--vs-format needs --vs"),
        (["--plot", "a.jpg"], "--plot 'a.jpg': the name must end in .svg or .png"),
        (["-U", "--mix", "50"], "-U is for reading only, and this writes"),
    ],
)
def test_wrong_options_are_told_in_one_style(capsys, raw, arguments, text):
    assert run(capsys, "bench", *arguments, "a.raw", status=1).err == f"mmcow: bench: {text}\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--pattern", "0"], "--pattern does nothing without -w or --mix"),
        (["--no-drain"], "--no-drain does nothing without --flush-interval"),
        (["--mix", "50", "--no-drain"], "--no-drain does nothing without --flush-interval"),
        (["--mix", "100", "--pattern", "7", "--seed", "7"], ""),  # one of a row of mixes
        (["-w", "--pattern", "7", "--flush-interval", "8", "--no-drain"], ""),
    ],
)
def test_options_that_qemu_img_ignores_are_warned_of(capsys, raw, arguments, text):
    err = run(capsys, "bench", *QUICK, *arguments, "-f", "raw", "a.raw").err
    warnings = [line for line in err.splitlines() if line.startswith("mmcow: warning: ")]
    assert warnings == ([f"mmcow: warning: bench: {text}"] if text else [])


@pytest.mark.parametrize(
    ("option", "queue"), [(["-i", "threads"], "threads"), (["-n"], "auto"), ([], None)]
)
def test_queue_can_be_chosen(capsys, raw, option, queue):
    with mmcow.open(raw, format="raw", host=LinuxHost(queue)) as image:
        expected = image.queue_backend
    assert measured(capsys, *QUICK, *option, "a.raw")["queue"] == expected


def test_one_at_a_time_needs_no_queue(capsys, raw, monkeypatch):
    monkeypatch.setenv("MMCOW_HITS", "on")
    assert measured(capsys, "-c", "100", "-d", "1", "-w", "a.raw")["queue"] == "synchronous"
    assert raw.read_bytes() == bytes(100 * 4096) + b"\1" * (MIB - 100 * 4096)
    monkeypatch.setenv("MMCOW_HITS", "off")
    assert measured(capsys, "-c", "100", "-d", "1", "a.raw")["queue"] != "synchronous"


def test_threads_and_every_size_are_accepted(capsys, raw):
    found = measured(capsys, *QUICK, "--threads", "3", "-s", "1000", "-o", "7", "a.raw")
    assert found["count"] == 400
    assert found["threads"] == 3


def test_queue_is_as_deep_as_the_load(capsys, raw):
    assert measured(capsys, "-c", "2000", "-d", "1000", "a.raw")["count"] == 2000


@pytest.mark.parametrize(
    ("options", "opened"),
    [
        (("-w",), [True]),
        (("--threads", "2"), [True, True]),  # a queue for each
        (("--threads", "2", "-w"), [False]),  # one image, one queue: they wait for each other's
    ],
)
def test_queue_of_one_thread_is_known_as_such(capsys, raw, monkeypatch, options, opened):
    queues = []

    class Spy(NativeQueue):
        def __init__(self, *arguments, one_thread, **rest):
            queues.append(one_thread)
            super().__init__(*arguments, one_thread=one_thread, **rest)

    monkeypatch.setattr("mmcow.storage.linux.NativeQueue", Spy)
    assert measured(capsys, *QUICK, *options, "a.raw")["count"] == 400
    assert queues == opened


# ---- text and pictures ----


def test_text_has_the_figures_and_a_histogram(capsys, raw, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = run(capsys, "bench", *QUICK, "--random", "a.raw", "--vs", "a.raw", "--repeat", "2").out
    lines = out.splitlines()
    assert lines[0] == "read, random (seed 0), 4 KiB, depth 8"
    assert (
        len(re.findall(r"^a\.raw: raw, cache \w+, (io_uring|threads), 1 MiB$", out, re.MULTILINE))
        == 2
    )
    assert (
        len(re.findall(r"^  \d+ IOPS, [\d.]+ [KM]iB/s \(800 requests in ", out, re.MULTILINE)) == 2
    )
    assert "2 runs: middle half" in out
    assert re.search(r"p50 .*, p90 .*, p99 .*, p99\.9 .*, max", out)
    assert "a.raw has " in lines[-1]
    shares = re.findall(r" ([<\d.]+) %$", out, re.MULTILINE)
    assert sum(float(share) for share in shares if "<" not in share) == pytest.approx(200, abs=3)


def test_quiet_says_nothing(capsys, raw):
    result = run(capsys, "bench", "-q", "-w", *QUICK, "-f", "raw", "a.raw")
    assert result.out == result.err == ""


def test_names_cannot_forge_lines(capsys, raw):
    name = "x\n1000000 IOPS\x1b[2J<&.raw"
    raw.rename(name)
    out = run(capsys, "bench", *QUICK, name, "--plot", "p.svg").out
    assert "x\\n1000000 IOPS\\x1b[2J<&.raw: raw" in out
    assert "x\\n1000000 IOPS" in "".join(ET.parse("p.svg").getroot().itertext())


def spread_out(*times):
    histogram = Histogram()
    for ns, count in times:
        for _ in range(count):
            histogram.add(ns)
    return histogram


def test_bars_are_as_long_as_their_shares():
    histogram = spread_out((100_000, 600), (400_000, 300), (1_500_000, 100))
    scale = chart.Scale.for_all([histogram])
    assert sum(scale.shares(histogram)) == pytest.approx(1)
    lines = list(chart.draw(histogram, scale, 80, unicode=False))
    assert len(lines) == scale.rows <= 16
    assert all(len(line) <= 80 for line in lines)
    found = {line.rsplit("  ", 1)[-1].split()[-2]: line.count("#") for line in lines if "#" in line}
    assert set(found) == {"60.0", "30.0", "10.0"}
    assert found["60.0"] == 2 * found["30.0"]
    assert found["10.0"] == pytest.approx(found["60.0"] / 6, abs=1)


def test_slowest_thousandth_shares_the_last_row():
    histogram = spread_out((100_000, 5000), (3_000_000_000, 4))
    scale = chart.Scale.for_all([histogram])
    assert scale.edge(scale.rows) < 200_000
    *_, last = chart.draw(histogram, scale, 80, unicode=True)
    assert "and more" in last


@pytest.mark.parametrize(
    ("ns", "text"),
    [(0, "0 ns"), (999, "999 ns"), (999.6, "1.00 us"), (1000, "1.00 us"), (76_130, "76.1 us"),
     (9_996, "10.0 us"), (99_960, "100 us"), (999_499, "999 us"), (999_500, "1.00 ms"),
     (1.5e9, "1.50 s"), (125e9, "125 s")],
)  # fmt: skip
def test_times_have_three_digits(ns, text):
    assert chart.human_time(ns) == text


def test_plot_as_svg(capsys, raw):
    run(capsys, "bench", *QUICK, "-q", "a.raw", "--vs", "a.raw", "--plot", "p.svg")
    root = ET.parse("p.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = list(root.itertext())
    assert any("mmcow bench: read, sequential, 4 KiB, depth 8" in text for text in texts)
    assert sum(1 for text in texts if text.startswith("a.raw: ")) == 2
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    for line in lines:
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= plot.WIDTH
            assert 0 <= y <= plot.HEIGHT


def test_plot_as_png(capsys, raw):
    image_module = pytest.importorskip("PIL.Image")
    run(capsys, "bench", *QUICK, "-q", "a.raw", "--plot", "p.PNG")
    with image_module.open("p.PNG") as image:
        assert image.size == (plot.WIDTH, plot.HEIGHT)
        assert len(image.convert("RGB").getcolors(100_000)) > 10


def test_png_without_pillow_is_refused_before_anything_is_written(capsys, raw, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "PIL"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    err = run(capsys, "bench", "-w", *QUICK, "-f", "raw", "a.raw", "--plot", "p.png", status=1).err
    assert "PNG needs Pillow, which is not installed; pip install 'mmcow[plot]'" in err
    assert raw.read_bytes() == b"\1" * MIB


@pytest.mark.parametrize("name", ["disk.svg", "disk.png", "link.svg"])
def test_plot_overwrites_no_disk(capsys, raw, name):
    if name == "link.svg":
        Path(name).symlink_to(raw)
    else:
        raw.rename(name)
        Path("a.raw").write_bytes(bytes(MIB))
    before = Path(name).read_bytes()
    err = run(capsys, "bench", *QUICK, "-f", "raw", "a.raw", "--plot", name, status=1).err
    assert f"--plot {name!r}: exists and is no {name[-3:].upper()} picture" in err
    assert Path(name).read_bytes() == before


@pytest.mark.parametrize("name", ["p.svg", "p.png"])
def test_plot_is_drawn_over_an_earlier_one(capsys, raw, name):
    for _ in range(2):
        run(capsys, "bench", *QUICK, "-f", "raw", "a.raw", "--plot", name)
    assert Path(name).stat().st_size > 1000


@pytest.mark.parametrize("is_there", [False, True])
def test_plot_on_a_full_disk_leaves_what_was_there(capsys, raw, monkeypatch, is_there):
    def fills_up(handle, offset, data):
        real(handle, offset, data[:100])
        raise StorageError(errno.ENOSPC, "write", handle.path, offset + 100, len(data) - 100)

    if is_there:
        run(capsys, "bench", *QUICK, "a.raw", "--plot", "p.svg")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    assert ("p.svg" in before) is is_there
    real = LinuxHandle.write_at
    monkeypatch.setattr(LinuxHandle, "write_at", fills_up)
    result = run(capsys, "bench", *QUICK, "a.raw", "--plot", "p.svg", status=1)
    assert result.err == "mmcow: p.svg: write: No space left on device\n"
    assert "IOPS" in result.out
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_plot_is_drawn_where_a_link_leads(capsys, raw):
    Path("pictures").mkdir()
    Path("p.svg").symlink_to("pictures/first.svg")
    run(capsys, "bench", *QUICK, "a.raw", "--plot", "p.svg")
    assert Path("p.svg").is_symlink()
    assert Path("pictures/first.svg").read_bytes().startswith(b"<svg")


def test_plot_replaces_only_files_and_waits_for_no_pipe(capsys, raw):
    os.mkfifo("p.svg")
    err = run(capsys, "bench", *QUICK, "a.raw", "--plot", "p.svg", status=1).err
    assert err == "mmcow: bench: --plot 'p.svg': exists and is no regular file\n"
    assert Path("p.svg").is_fifo()


def test_plot_without_leave_to_make_files_is_refused_first(capsys, raw, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != ".")
    err = run(capsys, "bench", "-w", *QUICK, "a.raw", "--plot", "p.svg", status=1).err
    assert err == "mmcow: bench: --plot 'p.svg': '.' takes no new files\n"
    assert raw.read_bytes() == b"\1" * MIB
