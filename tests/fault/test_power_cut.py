# SPDX-License-Identifier: MIT
"""Power cuts of a real file system, as near as they come without pulling a plug.

The disk lies on a file system over a loop device, whose file is cloned (reflink, in one instant)
while a writer is at work. A clone is what a power cut would have left of that file system,
page cache lost: it is mounted, which replays the journal, and must hold every flush that had
returned before.
"""

from __future__ import annotations

import os
import platform
import random
import time
from contextlib import ExitStack
from copy import deepcopy
from typing import TYPE_CHECKING

import pytest

import mmcow.jobs.commit
from tests.fault.disks import KINDS, Subject, explain
from tests.fault.model import decode
from tests.fault.test_kill import SECONDS
from tests.fault.writer import Writer, churn, errors, events, flush, write_batch
from tests.interop.tools import mount_image, mounted, requires, requires_fs, run, sha256

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fault.disks import Kind
    from tests.fault.model import Model
    from tests.fault.writer import Disk, Log

pytestmark = [
    pytest.mark.fault,
    pytest.mark.root,
    pytest.mark.timeout(3600),
]

# In the short form one file system and these.
SHORT = ("v20-16k-garbage", "v7", "cow", "raw")
LONG = SECONDS > 60
CASES = [
    (fs, kind)
    for fs in ("ext4", "xfs", "btrfs")
    for kind in KINDS
    if LONG or (fs == "ext4" and kind.name in SHORT)
]
# Commits of the journal every second: cuts before, in and after them.
OPTIONS = {"ext4": "commit=1", "xfs": "", "btrfs": "commit=1"}


@pytest.fixture
def clones(tmp_path):
    """A folder in which a file can be cloned in one instant."""
    requires("cp", root=True)
    requires_fs("xfs")
    folder = tmp_path / "clones"
    folder.mkdir()
    with mounted("xfs", folder, size=1 << 30) as point:
        yield point


def kernel() -> tuple[int, int]:
    major, minor = platform.release().split(".")[:2]
    return int(major), int("".join(filter(str.isdigit, minor)) or 0)


def judge_cut(subject: Subject, model: Model, clone: Path, point: Path, fs: str) -> list[str]:
    """Mount what the cut left, open the disk, compare; returns what is wrong."""
    options = "nouuid" if fs == "xfs" else ""
    with mount_image(clone, point, options=options) as mount:
        disk = subject.disk._replace(path=str(mount / subject.path.name))
        with disk.open(write=True) as image:
            values = decode(image.read(0, image.size))
            result = image.reactor.run(image.layers[0].driver.check(""))
        wrong = model.judge(values)
        wrong += [f.text for f in result.findings if f.kind != "leak"]
        for path, digest in subject.hashes.items():
            if sha256(mount / os.path.basename(path)) != digest:
                wrong.append(f"{path} was changed")
        return wrong


@pytest.mark.parametrize(("fs", "kind"), CASES, ids=[f"{fs}-{kind.name}" for fs, kind in CASES])
def test_power_cut(clones, rng, fs, kind):
    cache = rng.choice(("none", "writeback"))
    seconds = SECONDS * 0.25 / len(CASES)
    cuts, flushes, wrong = cut(clones, rng, fs, kind, cache=cache, seconds=seconds)
    assert not wrong, explain(wrong)
    print(f"{fs}, {kind.name}: {cuts} cuts, {flushes} flushes before the last")


def test_the_cut_is_real(clones, rng):
    """A flush that does nothing (cache=unsafe) is found out."""
    _, _, wrong = cut(clones, rng, "ext4", KINDS[0], cache="unsafe", seconds=30)
    assert any("sector" in text for text in wrong)


def commit_for_ever(disk: Disk, seed: int, first: int, log: Log) -> None:
    """Write, flush, merge into the base, again and again: the overlay reads the same throughout."""
    mmcow.jobs.commit.BATCH = 64 << 10
    rng = random.Random(seed)
    while True:
        with disk.open(write=True) as image:
            for _ in range(3):
                first = write_batch(image, rng, first, log)
            first = flush(image, first, log)
        mmcow.jobs.commit.commit(disk.path, format=disk.format)


@pytest.mark.parametrize("fs", ["ext4", "xfs", "btrfs"] if LONG else ["ext4"])
def test_power_cut_while_committing(clones, rng, fs):
    kind = rng.choice([k for k in KINDS if k.name in ("v20-4k", "v20-64k", "v20-16k-garbage")])
    cuts, flushes, wrong = cut(
        clones, rng, fs, kind, cache="none", seconds=SECONDS * 0.05, work=commit_for_ever
    )
    assert not wrong, explain(wrong)
    print(f"commit on {fs}, {kind.name}: {cuts} cuts, {flushes} flushes before the last")


def cut(
    clones: Path, rng: random.Random, fs: str, kind: Kind, *, cache: str, seconds: float, work=churn
) -> tuple[int, int, list[str]]:
    """Cut again and again while a writer is at work; stops at the first that went wrong."""
    requires_fs(fs)
    if fs == "btrfs" and kernel() < (6, 7):
        pytest.skip("a clone of a mounted btrfs needs Linux 6.7 to be mounted beside it")
    cuts = 0
    wrong: list[str] = []
    folder = clones / fs
    folder.mkdir()
    end = time.monotonic() + seconds
    with ExitStack() as stack:
        point = stack.enter_context(mounted(fs, folder, options=OPTIONS[fs]))
        subject = Subject(point, kind, cache=cache, backend=rng.choice(("auto", "threads")))
        run("sync", "-f", point)  # the base is not mmcow's to make durable
        seed = rng.randrange(1 << 32)
        disk = subject.disk._replace(size_most=1 << 20)
        if work is commit_for_ever:
            subject.hashes.clear()  # the base is to change
        writer = Writer(lambda log: work(disk, seed, 1, log))
        stack.callback(writer.kill)
        while not wrong and (cuts == 0 or time.monotonic() < end):
            alive = writer.drain(rng.uniform(0.001, 0.15))
            early = writer.take()
            assert alive, errors(early)
            subject.model.replay(events(early))
            clone = clones / "cut.img"
            run("cp", "--reflink=always", folder / "disk.img", clone)
            writer.drain()
            late = events(writer.take())
            model = deepcopy(subject.model)
            model.replay(late, believe=False)
            subject.model.replay(late)
            wrong = judge_cut(subject, model, clone, clones / "mnt-cut", fs)
            if wrong:
                wrong.insert(0, f"{fs}, {kind.name}, cache {cache}, child's seed {seed}:")
            clone.unlink()
            cuts += 1
        return cuts, model.flushes, wrong
