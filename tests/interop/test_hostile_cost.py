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


def cost(*words: str) -> tuple[float, int]:
    """Processor seconds and resident bytes of one command at its most."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mmcow", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10


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
