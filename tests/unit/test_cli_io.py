# SPDX-License-Identifier: MIT
"""``mmcow io``: qemu-io's commands, their reports, and what they refuse."""

from __future__ import annotations

import io
import re

import pytest

import mmcow
from mmcow.cli.io import COMMANDS, dump
from tests.unit.test_cli import KIB, pair, run, template  # noqa: F401

IO = ("io", "top.acow")
RATE = r"(?:\d+(?:\.\d+)?|\d\.\d+e\+\d+) \w+/sec and \d+\.\d{4} ops/sec"


@pytest.fixture(autouse=True)
def _in_pair(pair):  # noqa: F811
    return pair


def io_run(capsys, *commands, status=0, options=()):
    words = [word for command in commands for word in ("-c", command)]
    return run(capsys, "io", *options, *words, "top.acow", status=status)


def test_write_and_read_report_like_qemu_io(capsys):
    out = io_run(capsys, "write -P 0xab 0 64k", "read -P 0xab 0 64k").out
    assert re.fullmatch(
        r"wrote 65536/65536 bytes at offset 0\n"
        rf"64 KiB, 1 ops; 00\.\d\d sec \({RATE}\)\n"
        r"read 65536/65536 bytes at offset 0\n"
        rf"64 KiB, 1 ops; 00\.\d\d sec \({RATE}\)\n",
        out,
    ), out
    with mmcow.open("top.acow") as image:
        assert image.read(0, 64 * KIB) == b"\xab" * (64 * KIB)


def test_default_pattern(capsys):
    io_run(capsys, "write -q 4k 4k", "read -q -P 0xcd 4k 4k")


def test_quiet_says_nothing(capsys):
    commands = ("write -q 0 4k", "read -q 0 4k", "write -qz 0 4k", "discard -q 0 64k", "flush")
    assert io_run(capsys, *commands).out == ""


def test_pattern_that_is_not_there_fails_and_the_rest_is_run(capsys):
    result = io_run(capsys, "read -q -P 9 512k 4k", "length", status=1)
    assert result.out == "Pattern verification failed at offset 524288, 4096 bytes\n4 MiB\n"
    assert result.err == ""


def test_pattern_in_a_part_of_what_is_read(capsys):
    io_run(capsys, "read -q -P 3 -s 4k -l 1k 508k 8k")
    io_run(capsys, "read -q -P 3 -s 4k 508k 8k")
    result = io_run(capsys, "read -q -P 3 -s 3k -l 2k 508k 8k", status=1)
    assert "failed at offset 523264, 2048 bytes" in result.out


def test_dump_like_qemu_io(capsys):
    out = io_run(capsys, "write -q -P 0x41 8 4", "read -v 0 20").out.splitlines()
    assert out[0] == "00000000:  00 00 00 00 00 00 00 00 41 41 41 41 00 00 00 00  ........AAAA...."
    assert out[1] == "00000010:  00 00 00 00  ...."
    assert list(dump(memoryview(b"aZ0 _~\x80"), 1 << 32)) == [
        "100000000:  61 5a 30 20 5f 7e 80  aZ0...."
    ]


@pytest.mark.parametrize("flags", ["-z", "-z -u", "-zu"])
def test_write_zeroes(capsys, flags):
    out = io_run(capsys, f"write {flags} 64k 64k", "read -q -P 0 64k 64k").out
    assert out.startswith("wrote 65536/65536 bytes at offset 65536\n")


def test_discard_of_allocated_reads_zero(capsys):
    out = io_run(capsys, "discard 512k 64k", "read -q -P 0 512k 64k").out
    assert out.startswith("discard 65536/65536 bytes at offset 524288\n")


def test_map_alloc_and_length(capsys):
    out = io_run(capsys, "map", "alloc 0 1M", "alloc 512k", "alloc 4M", "length").out
    assert out.splitlines() == [
        "512 KiB (0x80000) bytes not allocated at offset 0 bytes (0x0)",
        "128 KiB (0x20000) bytes     allocated at offset 512 KiB (0x80000)",
        "3.375 MiB (0x360000) bytes not allocated at offset 640 KiB (0xa0000)",
        "131072/1048576 bytes allocated at offset 0 bytes",
        "512/512 bytes allocated at offset 512 KiB",
        "0/0 bytes allocated at offset 4 MiB",
        "4 MiB",
    ]


def test_fua_flushes(capsys, monkeypatch):
    flushed = []
    monkeypatch.setattr(mmcow.Image, "flush", lambda self: flushed.append(self.path))
    io_run(capsys, "write -q 0 4k")
    assert not flushed
    io_run(capsys, "write -f -q 0 4k", "flush")
    assert flushed == ["top.acow", "top.acow"]


def test_short_names(capsys):
    out = io_run(capsys, "w -q 0 4k", "r -q 0 4k", "d -q 0 4k", "f", "l", "q", "length").out
    assert out == "4 MiB\n"


def test_help_shows_all_commands_and_one_with_its_options(capsys):
    lines = io_run(capsys, "help").out.splitlines()
    assert len(lines) == len(COMMANDS)
    assert "  -P BYTE  every byte read must be BYTE" in io_run(capsys, "help read").out


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("frobnicate", "frobnicate: unknown command; 'help' lists them"),
        ("help frobnicate", "frobnicate: unknown command"),
        ("read 0", "read: 1 operands; it is: read [-qv]"),
        ("flush 1", "flush: 1 operands; it is: flush"),
        ("read -y 0 4k", "read: option -y not recognized"),
        ("read -P", "read: option -P requires argument"),
        ("read 0 abc", "length 'abc': must be a number of bytes"),
        ("read x 4k", "offset 'x': must be a number of bytes"),
        ("read -1 4k", "read: option -1 not recognized"),
        ("read 0 3G", "length '3G': must not be above 2147483136"),
        ("read -P 256 0 4k", "pattern '256': must be a byte"),
        ("read -P x 0 4k", "pattern 'x': must be a byte"),
        ("read -s 1 0 4k", "-s and -l say where to look"),
        ("read -P 0 -s 4k -l 1 0 4k", "the pattern's range 4096+1 exceeds the 4096 bytes"),
        ("read -P 0 -s 5k 0 4k", "the pattern's range 5120+0 exceeds"),
        ("write -u 0 4k", "-u says how -z may zero"),
        ("write -z -P 1 0 4k", "-z writes zeros, -P another byte"),
        ("read 4M 1", "top.acow: 4194304+1 reaches past the end of the disk (4194304 bytes)"),
        ("write 1M 4M", "top.acow: 1048576+4194304 reaches past the end"),
        ("write -z 4M 1", "top.acow: "),
        ("discard 4M 512", "top.acow: "),
        ("alloc 0 x", "count 'x': must be"),
    ],
)
def test_command_that_cannot_be_is_told_and_the_rest_is_run(capsys, command, text):
    result = io_run(capsys, command, "length", status=1)
    assert text in result.err
    assert result.err.startswith("mmcow: ")
    assert result.out == "4 MiB\n"


@pytest.mark.parametrize("option", ["-r", "-U"])
def test_writing_to_a_read_only_disk_is_refused(capsys, option):
    result = io_run(capsys, "write 0 4k", status=1, options=(option,))
    assert "read-only" in result.err


def test_commands_from_standard_input(capsys, monkeypatch):
    text = "length\n\n  read -q -P 3 512k 4k\nquit\nlength\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert run(capsys, *IO).out == "4 MiB\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("read -q -P 4 512k 4k"))
    assert run(capsys, *IO, status=1).out.startswith("Pattern verification failed")


def test_no_standard_input_is_the_end_of_it(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    result = run(capsys, *IO)
    assert (result.out, result.err) == ("", "")


def test_prompt_only_for_people(capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal("length\n"))
    assert run(capsys, *IO).out == "mmcow> 4 MiB\nmmcow> "


def test_what_was_written_is_durable_at_the_end(capsys):
    io_run(capsys, "write -q -P 5 100 1000")
    with mmcow.open("top.acow") as image:
        assert image.read(99, 1002) == b"\0" + b"\5" * 1000 + b"\0"


@pytest.mark.parametrize("cache", ["none", "writeback", "writethrough", "directsync", "unsafe"])
def test_cache_modes(capsys, cache):
    io_run(capsys, "write -q -P 1 1 1", "read -q -P 1 1 1", options=("-t", cache))


def test_nocache_is_cache_none(capsys, monkeypatch):
    seen = []
    real = mmcow.open
    monkeypatch.setattr(mmcow, "open", lambda *a, **k: seen.append(k["cache"]) or real(*a, **k))
    io_run(capsys, "length", options=("-n",))
    io_run(capsys, "length")
    assert seen == ["none", "auto"]


def test_cache_mode_that_is_none(capsys):
    err = io_run(capsys, "length", status=1, options=("-t", "fast")).err
    assert "cache mode 'fast': must be one of" in err


def test_first_sector_of_a_probed_raw_disk_keeps_its_format(capsys):
    words = ["io", "-c", "write -q -P 0x51 0 1", "base.raw"]
    run(capsys, *words)
    with open("magic", "wb") as file:
        file.write(b"QFI\xfb")
    with mmcow.open("base.raw", write=True) as image, pytest.raises(mmcow.UsageError):
        image.write(0, b"QFI\xfb\0\0\0\3")
