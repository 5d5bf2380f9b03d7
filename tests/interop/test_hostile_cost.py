# SPDX-License-Identifier: MIT
"""What a hostile image may cost a whole process: under a second of processor time and 64 MiB."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import mmcow

pytestmark = [pytest.mark.interop, pytest.mark.hostile]

MEMORY = 64 << 20
VERBS = [["info"], ["map", "--output=json"], ["check"], ["probe"]]


# The most memory that this program's own address space had (VmHWM, KiB): wait4's figure would
# include the test process that it was forked from.
PROGRAM = """
import resource, sys
from mmcow.cli.main import main
main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
with open("/proc/self/status") as status:
    peak = next(line for line in status if line.startswith("VmHWM:"))
print(used.ru_utime + used.ru_stime, peak.split()[1], file=sys.__stderr__)
"""


def cost(*words: str) -> tuple[float, int]:
    """Processor seconds and resident bytes of one command at its most."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds, peak = done.stderr.splitlines()[-1].split()
    return float(seconds), int(peak) << 10


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("base", "wb") as file:
        file.truncate(8 << 40)
    mmcow.create("sparse", backing="base", backing_format="raw")
    length = os.path.getsize("sparse")
    os.truncate("sparse", 4096)  # a bitmap of 256 MiB that takes no space
    os.truncate("sparse", length)
    mmcow.create("plain", size=1 << 20, backing="base", backing_format="raw")
    with open("plain", "rb") as file:
        header = file.read(4096)
    for number, field in enumerate(range(4, 44, 4)):
        with open(f"field-{number}", "wb") as file:
            file.write(header[:field] + b"\xff\xff\xff\x7f" + header[field + 4 :])
            file.truncate(1 << 40)
    return sorted(name for name in os.listdir() if not name.endswith(".raw") and name != "base")


def test_hostile_images_cost_little(images):
    for name in images:
        for verb in VERBS:
            seconds, memory = cost(*verb, name)
            assert seconds < 1.0, (verb, name, seconds)
            assert memory < MEMORY, (verb, name, memory)
