# SPDX-License-Identifier: MIT
"""The same commands given to mmcow and to qemu-img or qemu-io: equal files, JSON, exit statuses.

Where both know the format (raw) they get the same file or copies of it; an add-cow image is
compared with a qcow2 image of the same cluster size that was written in the same way.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from mmcow.cli.main import main
from tests.interop.tools import requires, sha256
from tests.interop.tools import run as run_program

pytestmark = pytest.mark.interop

KIB, MIB = 1 << 10, 1 << 20
DEMO = Path(__file__).parents[2] / "docs" / "demo.sh"
MAP_KEYS = ("start", "length", "depth", "present", "zero", "data")
# What differs from run to run: times and rates.
TIMES = re.compile(r"\d+ ops; .*\)$", flags=re.MULTILINE)


@pytest.fixture(autouse=True)
def _programs(tmp_path, monkeypatch):
    requires("qemu-img", "qemu-io")
    monkeypatch.chdir(tmp_path)


class Ended(NamedTuple):
    """How a program ended."""

    status: int
    out: str
    err: str


def mmcow(*arguments, stdin=""):
    """The command in this process: starting two hundred interpreters takes too long."""
    out, err, before = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(stdin)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            status = main(list(map(str, arguments)))
    finally:
        sys.stdin = before
    assert "Traceback" not in err.getvalue()
    # As the programs' output comes through a pipe in text mode.
    return Ended(status, out.getvalue().replace("\r", "\n"), err.getvalue())


def mmcow_process(*arguments, stdin=""):
    """The command as a process of its own."""
    words = [sys.executable, "-m", "mmcow", *map(str, arguments)]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, input=stdin)
    assert "Traceback" not in ended.stderr
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def qemu(program, *arguments, stdin=None):
    ended = run_program(program, *arguments, ok=(), stdin=stdin)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def ok(ended):
    assert ended.status == 0, ended
    return ended.out


def both(*arguments):
    """The same command for both; their statuses must be equal."""
    mine, theirs = mmcow(*arguments), qemu("qemu-img", *arguments)
    assert mine.status == theirs.status, (mine, theirs)
    return mine, theirs


def both_json(*arguments):
    mine, theirs = both(*arguments)
    assert mine.status == 0, mine
    return json.loads(mine.out), json.loads(theirs.out)


def make_raw(path, size, *writes):
    """A sparse file; each of ``writes`` is (offset, length, byte)."""
    with open(path, "wb") as file:
        file.truncate(size)
        for offset, length, byte in writes:
            file.seek(offset)
            file.write(bytes((byte,)) * length)


def io_both(mine, theirs, *commands, options=()):
    """The same commands on two images; returns both outputs without times."""
    words = [word for command in commands for word in ("-c", command)]
    first = mmcow("io", *mine[1:], *options, *words, mine[0])
    second = qemu("qemu-io", *theirs[1:], *options, *words, theirs[0])
    assert first.status == second.status, (first, second)
    return TIMES.sub("", first.out), TIMES.sub("", second.out)


# ---- create and resize ----


@pytest.mark.parametrize(
    "size",
    ["0", "1", "511", "512", "1000", "64k", "1.5k", "0.5K", "1.0005k", "2.25M", "1G", "1.5T",
     "0x1000", "07", "1b", "1.0", "1.0b", "1.k", "", "x", "1x", "1kb", "1e3", ".5k", "1.5",
     "1.5b", "-1", "8E", "16E", "99999999E", "1 k"],
)  # fmt: skip
def test_create_raw_understands_the_same_sizes(size):
    both("create", "-f", "raw", "-q", "--", "both.raw", size)
    ok_or_not = [
        mmcow("create", "-f", "raw", "-q", "--", "mine.raw", size).status,
        qemu("qemu-img", "create", "-f", "raw", "-q", "--", "theirs.raw", size).status,
    ]
    assert ok_or_not[0] == ok_or_not[1]
    assert os.path.exists("mine.raw") == os.path.exists("theirs.raw") == (not ok_or_not[0])
    if not ok_or_not[0]:
        assert os.stat("mine.raw").st_size == os.stat("theirs.raw").st_size


@pytest.mark.parametrize(
    "arguments",
    [
        ["a.raw"],
        ["-f", "raw", "-b", "base.raw", "a.raw"],
        ["-f", "nosuch", "a.raw", "1M"],
        ["-f", "raw", "-o", "nosuch=1", "a.raw", "1M"],
        ["-f", "raw", "a.raw", "1M", "2M"],
        ["-f", "raw", "nosuch/a.raw", "1M"],
        ["-f", "raw"],
        ["-f", "raw", "-o", "help"],
        ["-f", "raw", "-o", "size=1M", "a.raw"],
        ["-f", "raw", "a.raw", "-q", "1M"],
    ],
)
def test_create_ends_alike(arguments):
    both("create", *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["a.raw", "2M"],
        ["a.raw", "+1M"],
        ["a.raw", "+512"],
        ["a.raw", "1000k"],
        ["a.raw", "1M"],
        ["--shrink", "a.raw", "1000k"],
        ["--shrink", "a.raw", "-4k"],
        ["a.raw", "-4k"],
        ["--shrink", "a.raw", "-1M"],
        ["--shrink", "a.raw", "-2M"],
        ["a.raw", "x"],
        ["a.raw", ""],
        ["a.raw"],
        ["nosuch", "1M"],
        ["-q", "a.raw", "3M"],
    ],
)
def test_resize_raw_ends_alike_and_makes_the_same_size(arguments):
    sizes = []
    for tool in (mmcow, lambda *words: qemu("qemu-img", *words)):
        make_raw("a.raw", MIB, (0, MIB, 1))
        status = tool("resize", "-f", "raw", *arguments).status
        sizes.append((status, os.stat("a.raw").st_size, sha256("a.raw")))
    assert sizes[0] == sizes[1]


# ---- info ----


def test_info_of_raw_has_the_same_facts():
    make_raw("a.raw", 3 * MIB, (64 * KIB, 64 * KIB, 1))
    mine, theirs = both_json("info", "-f", "raw", "--output=json", "a.raw")
    assert {key: mine[key] for key in theirs} == theirs
    mine, theirs = both_json("info", "--backing-chain", "--output=json", "a.raw")
    assert isinstance(mine, list)
    assert len(mine) == len(theirs) == 1


def test_info_of_an_overlay_has_the_same_keys():
    make_raw("base.raw", MIB)
    ok(mmcow("create", "-q", "-b", "base.raw", "-F", "raw", "-o", "cluster_size=64k", "a.acow"))
    ok(qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "a.qcow2"))
    mine = json.loads(ok(mmcow("info", "--output=json", "a.acow")))
    theirs = json.loads(ok(qemu("qemu-img", "info", "--output=json", "a.qcow2")))
    assert set(theirs) <= set(mine)
    same = ("virtual-size", "cluster-size", "backing-filename", "full-backing-filename",
            "backing-filename-format", "dirty-flag")  # fmt: skip
    assert {key: mine[key] for key in same} == {key: theirs[key] for key in same}
    assert set(mine["format-specific"]) == set(theirs["format-specific"])


@pytest.mark.parametrize(
    "arguments",
    [["nosuch"], [], ["a", "b"], ["--nosuch", "a"], ["--output=xml", "a.raw"],
     ["-f", "zip", "a.raw"], ["-U", "a.raw"], ["--help"]],
)  # fmt: skip
def test_info_ends_alike(arguments):
    make_raw("a.raw", MIB)
    both("info", *arguments)


# ---- map ----


@pytest.mark.parametrize(
    "writes",
    [
        [],
        [(0, MIB, 1)],
        [(64 * KIB, 64 * KIB, 1)],
        [(0, 4 * KIB, 1), (1020 * KIB, 4 * KIB, 2)],
        [(100 * KIB, 4 * KIB, 1), (108 * KIB, 4 * KIB, 1), (116 * KIB, 4 * KIB, 1)],
    ],
)
@pytest.mark.parametrize("part", [[], ["-s", "70k"], ["-l", "70k"], ["-s", "66k", "-l", "1k"],
                                  ["--start-offset=1M"], ["-s", "3M"]])  # fmt: skip
def test_map_of_raw_is_equal(writes, part):
    make_raw("a.raw", MIB, *writes)
    mine, theirs = both_json("map", "-f", "raw", *part, "--output=json", "a.raw")
    assert mine == theirs
    table = mmcow("map", "-f", "raw", "--no-picture", *part, "a.raw")
    assert table.out == ok(qemu("qemu-img", "map", "-f", "raw", *part, "a.raw"))


def test_json_of_map_is_equal_character_by_character():
    make_raw("a.raw", MIB, (64 * KIB, 64 * KIB, 1), (512 * KIB, 4 * KIB, 1))
    mine, theirs = both("map", "-f", "raw", "--output=json", "a.raw")
    assert mine.out == theirs.out


class Twins:
    """An add-cow chain and a qcow2 chain over copies of one raw base, written alike."""

    def __init__(self, base_size, *sizes):
        writes = [(64 * KIB, 192 * KIB, 1), (512 * KIB, 100 * KIB, 2)]
        make_raw("base.raw", base_size, *(w for w in writes if w[0] + w[1] <= base_size))
        below = {"acow": ("base.raw", "raw"), "qcow2": ("base.raw", "raw")}
        for number, size in enumerate(sizes):
            words = ["-o", "cluster_size=64k", f"{number}.acow", size]
            ok(mmcow("create", "-q", "-f", "add-cow", *_over(below["acow"]), *words))
            words = ["-o", "cluster_size=64k", f"{number}.qcow2", size]
            ok(qemu("qemu-img", "create", "-q", "-f", "qcow2", *_over(below["qcow2"]), *words))
            below = {"acow": (f"{number}.acow", "add-cow"), "qcow2": (f"{number}.qcow2", "qcow2")}
        self.mine, self.theirs = below["acow"][0], below["qcow2"][0]

    def io(self, *commands):
        return io_both((self.mine, "-f", "add-cow"), (self.theirs, "-f", "qcow2"), *commands)

    def maps(self):
        mine = json.loads(ok(mmcow("map", "--output=json", self.mine)))
        theirs = json.loads(ok(qemu("qemu-img", "map", "--output=json", self.theirs)))
        return _without_places(mine), _without_places(theirs)


def _over(below):
    return ["-b", below[0], "-F", below[1]]


def _without_places(entries):
    """Entries without their place in a file; where only that differs, neighbours are one."""
    found = []
    for entry in entries:
        item = [entry[key] for key in MAP_KEYS]
        if found and found[-1][2:] == item[2:]:
            found[-1][1] += item[1]
        else:
            found.append(item)
    return found


CHAINS = [
    (MIB, MIB),
    (512 * KIB, MIB),
    (2 * MIB, MIB),
    (MIB, MIB, 2 * MIB),
    (2 * MIB, MIB, 3 * MIB),
    (300 * KIB, MIB, 512 * KIB),
]


@pytest.mark.parametrize("sizes", CHAINS, ids=lambda sizes: "-".join(str(s >> 10) for s in sizes))
def test_map_of_an_untouched_overlay_is_equal(sizes):
    mine, theirs = Twins(*sizes).maps()
    assert mine == theirs


@pytest.mark.parametrize("sizes", CHAINS, ids=lambda sizes: "-".join(str(s >> 10) for s in sizes))
def test_map_of_an_overlay_written_alike_is_equal(sizes):
    twins = Twins(*sizes)
    twins.io("write -q -P 3 128k 64k", "write -q -P 4 260k 4k", "write -q -P 5 384k 64k")
    mine, theirs = twins.maps()
    assert mine == theirs


def test_map_of_an_overlay_with_zeroes_and_discards_is_equal():
    twins = Twins(MIB, MIB)
    twins.io("write -q -P 3 128k 128k", "write -q -z 512k 128k", "discard -q 192k 64k",
             "write -q -z -u 704k 64k")  # fmt: skip
    mine, theirs = twins.maps()
    assert mine == theirs


def _random_commands(rng, size, lengths):
    """Writes and zeroing; what of a cluster is zeroed is always all of it: zeroing a part is done
    by each format in its own way."""
    for _ in range(15):
        length = rng.choice(lengths)
        unit = 64 * KIB if length % (64 * KIB) == 0 else 512
        start = rng.randrange(0, size) // unit * unit
        length = min(length, size - start)
        if rng.random() < 0.3:
            start -= start % (64 * KIB)
            yield f"write -z {start} {min(64 * KIB, size - start)}"
        else:
            yield f"write -P {rng.randrange(1, 256)} {start} {length}"


def _size(path):
    return json.loads(ok(mmcow("info", "--output=json", path)))["virtual-size"]


def _assert_equal_contents(twins):
    ok(mmcow("convert", twins.mine, "mine.raw"))
    ok(qemu("qemu-img", "convert", "-O", "raw", twins.theirs, "theirs.raw"))
    assert sha256("mine.raw") == sha256("theirs.raw")


@pytest.mark.parametrize("seed", range(6))
def test_maps_and_contents_after_random_writes_of_clusters_are_equal(seed):
    rng = random.Random(seed)
    twins = Twins(*CHAINS[seed])
    lengths = [64 * KIB, 128 * KIB, 512 * KIB]
    mine, theirs = twins.io(*_random_commands(rng, _size(twins.mine), lengths), "length")
    assert mine == theirs
    mine, theirs = twins.maps()
    assert mine == theirs
    _assert_equal_contents(twins)


@pytest.mark.parametrize("seed", range(6))
def test_layers_and_contents_after_random_writes_are_equal(seed):
    """This test looks only at which layer has what: where a cluster is filled up from a hole, an
    add-cow data file keeps the hole, and its map says zeros where qcow2's says data."""
    rng = random.Random(seed)
    twins = Twins(*CHAINS[seed])
    lengths = [512, 4 * KIB, 64 * KIB, 100 * KIB]
    mine, theirs = twins.io(*_random_commands(rng, _size(twins.mine), lengths), "length")
    assert mine == theirs
    mine, theirs = twins.maps()
    assert _layers(mine) == _layers(theirs)
    _assert_equal_contents(twins)


def _layers(entries):
    found = []
    for start, length, depth, present, _, _ in entries:
        if found and found[-1][2:] == [depth, present]:
            found[-1][1] += length
        else:
            found.append([start, length, depth, present])
    return found


# ---- convert and compare ----


def test_convert_of_raw_is_equal_and_as_sparse():
    make_raw("a.raw", 5 * MIB, (64 * KIB, 64 * KIB, 1), (MIB, MIB, 0), (3 * MIB, 100 * KIB, 7))
    ok(mmcow("convert", "-f", "raw", "-O", "raw", "a.raw", "mine.raw"))
    ok(qemu("qemu-img", "convert", "-f", "raw", "-O", "raw", "a.raw", "theirs.raw"))
    assert sha256("mine.raw") == sha256("theirs.raw") == sha256("a.raw")
    assert os.stat("mine.raw").st_blocks <= os.stat("theirs.raw").st_blocks
    both("compare", "-f", "raw", "-F", "raw", "mine.raw", "theirs.raw")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nosuch", "b.raw"],
        ["a.raw"],
        [],
        ["-O", "nosuch", "a.raw", "b.raw"],
        ["-f", "raw", "a.raw", "a.raw"],
        ["-n", "-f", "raw", "-O", "raw", "a.raw", "large.raw"],
        ["-n", "-f", "raw", "-O", "raw", "a.raw", "small.raw"],
        ["-n", "-f", "raw", "-O", "raw", "a.raw", "nosuch"],
        ["-q", "-f", "raw", "-t", "none", "-T", "writeback", "a.raw", "b.raw"],
        ["-f", "raw", "-t", "fast", "a.raw", "b.raw"],
        ["-f", "raw", "-O", "raw", "a.raw", "nosuch/b.raw"],
        ["-m", "4", "-W", "-f", "raw", "a.raw", "b.raw"],
        ["-U", "-f", "raw", "a.raw", "b.raw"],
    ],
)
def test_convert_ends_alike(arguments):
    make_raw("a.raw", MIB, (0, MIB, 1))
    make_raw("small.raw", MIB // 2)
    make_raw("large.raw", 2 * MIB)
    both("convert", *arguments)


def test_progress_for_programs_has_the_same_shape():
    make_raw("a.raw", MIB, (0, MIB, 1))
    mine, theirs = both("convert", "-p", "-f", "raw", "a.raw", "b.raw")
    # The line ends are \r, which text mode turns into \n.
    shape = re.compile(r"(    \(\d{1,3}\.\d\d/100%\)\n)+\n?")
    assert shape.fullmatch(theirs.out)
    assert shape.fullmatch(mine.out)
    assert mine.out.startswith("    (0.00/100%)\n")
    assert mine.out.rstrip("\n").endswith("    (100.00/100%)")


@pytest.mark.parametrize(
    ("second", "size"),
    [
        ([(0, MIB, 1)], MIB),
        ([(0, MIB, 1)], 2 * MIB),
        ([(0, MIB, 1), (MIB, 512, 1)], 2 * MIB),
        ([(0, MIB, 1), (700 * KIB + 513, 1, 2)], MIB),
        ([(0, MIB - 1, 1)], MIB),
        ([], MIB),
        ([], 0),
    ],
)
@pytest.mark.parametrize("strict", [[], ["-s"]])
def test_compare_ends_alike_and_finds_the_same_place(second, size, strict):
    make_raw("a.raw", MIB, (0, MIB, 1))
    make_raw("b.raw", size, *second)
    mine, theirs = both("compare", *strict, "-f", "raw", "-F", "raw", "a.raw", "b.raw")
    places = [re.findall(r"offset (\d+)", text) for text in (mine.out, theirs.out)]
    if places[1]:
        assert places[0] == places[1]


@pytest.mark.parametrize(
    "arguments", [["nosuch", "a.raw"], ["a.raw", "nosuch"], ["-f", "nosuch", "a.raw", "a.raw"]]
)
def test_compare_that_fails_ends_alike(arguments):
    make_raw("a.raw", MIB)
    both("compare", *arguments)


def test_compare_with_an_overlay_of_each_kind():
    twins = Twins(MIB, MIB)
    twins.io("write -q -P 3 128k 64k")
    ok(qemu("qemu-img", "convert", "-O", "raw", twins.theirs, "flat.raw"))
    ok(mmcow("compare", "-F", "raw", twins.mine, "flat.raw"))
    twins.io("write -q -P 9 200k 512")
    assert "204800" in mmcow("compare", "-F", "raw", twins.mine, "flat.raw").out


# ---- check, commit ----


def test_check_of_raw_ends_alike():
    make_raw("a.raw", MIB)
    mine, _ = both("check", "-f", "raw", "a.raw")
    assert mine.status == 63
    both("check", "nosuch")


def test_check_has_the_same_keys():
    twins = Twins(MIB, MIB)
    twins.io("write -q -P 3 128k 128k")
    mine = json.loads(ok(mmcow("check", "--output=json", twins.mine)))
    theirs = json.loads(ok(qemu("qemu-img", "check", "--output=json", twins.theirs)))
    assert set(theirs) - {"fragmented-clusters"} <= set(mine)
    for key in ("total-clusters", "allocated-clusters", "check-errors"):
        assert mine[key] == theirs[key]


@pytest.mark.parametrize("keep", [[], ["-d"]])
def test_commit_leaves_the_same_base(keep):
    twins = Twins(MIB, MIB)
    twins.io("write -q -P 3 100k 200k", "write -q -z 512k 64k")
    with open("base.raw", "rb") as file:
        base = file.read()
    ok(mmcow("commit", "-q", *keep, twins.mine))
    mine = sha256("base.raw")
    with open("base.raw", "wb") as file:
        file.write(base)
    ok(qemu("qemu-img", "commit", "-q", *keep, twins.theirs))
    assert mine == sha256("base.raw")
    found = json.loads(ok(mmcow("check", "--output=json", twins.mine)))
    assert found["allocated-clusters"] == (5 if keep else 0)
    if not keep:
        mine, theirs = twins.maps()
        assert mine == theirs


# ---- io ----

IO_COMMANDS = [
    ["read 0 4k"],
    ["read -q 0 4k"],
    ["read -v 65528 40"],
    ["read -v 0 512"],
    ["read -P 1 64k 4k"],
    ["read -P 2 64k 4k", "length"],
    ["read -P 1 -s 100 -l 10 65436 200"],
    ["read -P 1 -s 100 65436 200"],
    ["read -P 1 -l 100 65436 200"],
    ["read 10 1"],
    ["read 0 0"],
    ["read 0x1000 1.5k"],
    ["write -P 0xab 0 4k", "read -v 4080 32"],
    ["write 4k 4k", "read -v 4k 16"],
    ["write 3 1", "read -v 0 16"],
    ["write -z 64k 4k", "read -P 0 64k 4k"],
    ["write -z -u 64k 4k", "read -P 0 64k 4k"],
    ["write -f 64k 4k"],
    ["discard 64k 4k"],
    ["discard -q 64k 4k"],
    ["flush"],
    ["length"],
    ["map"],
    ["alloc 0 64k", "alloc 60k 64k", "alloc 60k", "alloc 60k 1M"],
    ["r 0 4k", "w 0 4k", "l", "d 0 4k", "q", "length"],
    ["quit", "length"],
]

# What is said on failure is each program's own.
IO_FAILURES = [
    ["read -P 1 -s 300 65436 200"],
    ["read 0 2M"],
    ["read 2M 4k"],
    ["read 0"],
    ["read 0 abc", "length"],
    ["read abc 4k"],
    ["read -P 300 0 4k"],
    ["read -z 0 4k"],
    ["read 0 3G"],
    ["nosuch", "length"],
    ["write -u 64k 4k"],
    ["write -z -P 3 64k 4k"],
    ["write -P 256 0 1"],
    ["flush 1"],
]


@pytest.mark.parametrize("commands", IO_COMMANDS, ids="; ".join)
def test_io_on_raw_says_the_same(commands):
    writes = (64 * KIB, 128 * KIB, 1), (512 * KIB, 4 * KIB, 65)
    for name in ("mine.raw", "theirs.raw"):
        make_raw(name, MIB, *writes)
    mine, theirs = io_both(("mine.raw", "-f", "raw"), ("theirs.raw", "-f", "raw"), *commands)
    assert mine == theirs
    assert sha256("mine.raw") == sha256("theirs.raw")


@pytest.mark.parametrize("commands", IO_FAILURES, ids="; ".join)
def test_io_on_raw_fails_alike_and_goes_on(commands):
    for name in ("mine.raw", "theirs.raw"):
        make_raw(name, MIB, (64 * KIB, 128 * KIB, 1))
    files = ("mine.raw", "-f", "raw"), ("theirs.raw", "-f", "raw")
    mine, theirs = io_both(*files, *commands, "length")
    assert mine.endswith("1 MiB\n")
    assert theirs.endswith("1 MiB\n")
    assert sha256("mine.raw") == sha256("theirs.raw")


def test_io_reports_times_in_the_same_shape():
    make_raw("a.raw", MIB)
    shape = re.compile(
        r"4 KiB, 1 ops; \d\d\.\d\d sec "
        r"\(\d+(\.\d+)? ([KMGT]i)?B/sec and \d+\.\d{4} ops/sec\)"
    )
    for text in (
        ok(mmcow("io", "-f", "raw", "-c", "read 0 4k", "a.raw")),
        ok(qemu("qemu-io", "-f", "raw", "-c", "read 0 4k", "a.raw")),
    ):
        assert shape.fullmatch(text.splitlines()[1]), text


def test_io_on_an_overlay_says_the_same():
    twins = Twins(MIB, MIB)
    mine, theirs = twins.io(
        "write -P 3 128k 64k", "write -P 4 300k 1k", "map", "alloc 0 1M", "alloc 128k 512k",
        "read -v 299k 32", "length", "read -P 9 128k 4k",
    )  # fmt: skip
    assert mine == theirs


def test_io_from_standard_input_ends_alike():
    make_raw("a.raw", MIB)
    for text in ("length\n", "read -q -P 5 0 4k\nlength\n", "quit\nlength\n", "", "nosuch\n"):
        mine = mmcow("io", "-f", "raw", "a.raw", stdin=text)
        theirs = qemu("qemu-io", "-f", "raw", "a.raw", stdin=text)
        assert mine.status == theirs.status
        assert mine.out == theirs.out.replace("qemu-io> ", "")


@pytest.mark.parametrize(
    "arguments",
    [["-f", "raw", "-c", "length", "nosuch"], ["-r", "-f", "raw", "-c", "write 0 4k", "a.raw"],
     ["-f", "nosuch", "-c", "length", "a.raw"], ["-t", "fast", "-c", "length", "a.raw"],
     ["-t", "writeback", "-f", "raw", "-c", "length", "a.raw"],
     ["-U", "-r", "-f", "raw", "-c", "length", "a.raw"],
     ["-n", "-f", "raw", "-c", "length", "a.raw"], ["--nosuch", "a.raw"]],
)  # fmt: skip
def test_io_ends_alike(arguments):
    make_raw("a.raw", MIB)
    mine, theirs = mmcow("io", *arguments), qemu("qemu-io", *arguments)
    assert mine.status == theirs.status, (mine, theirs)


# ---- the command itself ----


@pytest.mark.parametrize("arguments", [[], ["nosuch"], ["--help"], ["--version"], ["--nosuch"]])
def test_general_command_lines_end_alike(arguments):
    assert mmcow_process(*arguments).status == qemu("qemu-img", *arguments).status


def test_command_as_a_process():
    make_raw("a.raw", MIB, (0, 4 * KIB, 1))
    theirs = qemu("qemu-img", "map", "-f", "raw", "--output=json", "a.raw")
    assert mmcow_process("map", "-f", "raw", "--output=json", "a.raw")[:2] == theirs[:2]
    text = "read -q -P 1 0 4k\nread -q -P 2 0 512\nlength\n"
    theirs = qemu("qemu-io", "-f", "raw", "a.raw", stdin=text)
    mine = mmcow_process("io", "-f", "raw", "a.raw", stdin=text)
    assert mine.status == theirs.status == 1
    assert mine.out == theirs.out.replace("qemu-io> ", "")
    assert mmcow_process("compare", "a.raw", "nosuch").status == 2


def test_ctrl_c_ends_a_process_cleanly():
    """This test interrupts a copy for good: twice, from outside, at its first report."""
    make_raw("a.raw", 256 * MIB, (0, 256 * MIB, 1))
    words = ["convert", "-f", "raw", "--progress=json", "a.raw", "b.raw"]
    command = [sys.executable, "-m", "mmcow", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert json.loads(process.stderr.readline())["done"] == 0
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        lines = process.stderr.read().splitlines()
    assert process.returncode == 130
    assert lines[-1] == "mmcow: a.raw: convert: cancelled"
    assert not os.path.exists("b.raw")


def test_demo_runs_to_its_end():
    requires("mke2fs", "e2fsck", "debugfs")
    ended = run_program("bash", DEMO)
    assert ended.stdout.endswith("\ndemo: done\n")
    assert ended.stdout.count("base.raw: OK\n") == 2
