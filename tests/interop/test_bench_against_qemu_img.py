# SPDX-License-Identifier: MIT
"""The same ``bench`` given to mmcow and to qemu-img: the same requests reach the disk."""

from __future__ import annotations

import json
import random
import shlex
import subprocess
import sys

import pytest

from tests.interop.tools import requires, sha256
from tests.interop.tools import run as run_program

pytestmark = pytest.mark.interop

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _programs(tmp_path, monkeypatch):
    requires("qemu-img")
    monkeypatch.chdir(tmp_path)


def bench(*arguments):
    command = [sys.executable, "-m", "mmcow", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize(
    "options",
    [
        "-w -c 100 --pattern 90",
        "-w -c 100 -d 1 --pattern=0x5a --flush-interval=1",
        "-w -c 200 -d 8 -s 2k -S 6k -o 12k --pattern=7 --flush-interval 8 --no-drain",
        # Round the end, again and again: the offset is taken modulo the disk's size.
        "-w -c 90 -d 1 -s 4k -S 60k -o 20k --pattern 4",
        "-w -c 90 -d 5 -s 4k -S 2044k -o 2036k --pattern 5",
        "-w -c 20 -d 2 -s 2k -S 5M --pattern 6",
        "-w -c 7 -d 3 -s 128k --pattern 255 -n -t none",
        "-w -c 33 -d 2 -s 1000 -S 1500 -o 77 --pattern 1 -t writeback",
        "-w -c 50 -t writethrough -i threads --pattern 3",
        "-c 500 -d 16 -t none -i io_uring -q",
        "-c 100 -U",
        # Both take what does nothing there.
        "-c 100 --pattern 5 --no-drain",
        "-w -c 100 --no-drain",
    ],
)
def test_same_options_write_the_same_bytes(options):
    content = random.Random(1).randbytes(2 * MIB)
    for name in ("qemu.raw", "mmcow.raw"):
        with open(name, "wb") as file:
            file.write(content)
    words = [*shlex.split(options), "-f", "raw"]
    run_program("qemu-img", "bench", *words, "qemu.raw")
    bench(*words, "mmcow.raw")
    assert sha256("mmcow.raw") == sha256("qemu.raw")


def test_image_of_a_format_that_is_not_there_is_no_raw_disk():
    """It is refused, not measured (and overwritten) as if it were raw."""
    run_program("qemu-img", "create", "-q", "-f", "qed", "a.qed", "1M")
    command = [sys.executable, "-m", "mmcow", "bench", "-w", "a.qed"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "a.qed" in ended.stderr
    run_program("qemu-img", "check", "-q", "a.qed")


def test_command_line_gives_one_json_object():
    with open("a.raw", "wb") as file:
        file.truncate(MIB)
    found = json.loads(bench("--json", "--random", "--time", "0.2", "-f", "raw", "a.raw"))
    assert found["iops"] > 0
    assert found["count"] == found["runs"][0]["count"]
