# SPDX-License-Identifier: MIT
"""kill -9 in the middle of everything.

A child changes a disk without pause and logs what it does; it is killed at a random moment. What a
returned flush covers must be there, nothing else than what was written may be, the base must
be as it was. The disk then goes through the next round as it is.

``MMCOW_KILL_SECONDS`` makes the run longer (``make fault``); the seed is printed by pytest.
"""

from __future__ import annotations

import os
import time
from itertools import count, cycle
from typing import TYPE_CHECKING

import pytest

import mmcow
from mmcow.jobs.rebase import rename
from mmcow.storage.linux import LinuxHost
from tests.fault.disks import KINDS, Subject, explain
from tests.fault.writer import Disk, Writer, churn, errors, events

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from tests.fault.writer import Log

pytestmark = [pytest.mark.fault, pytest.mark.timeout(3600)]

# Shared by the tests of this file: short enough for `make test`.
SECONDS = float(os.environ.get("MMCOW_KILL_SECONDS", "25"))
# A round's length is drawn from these: the start of the child, the first requests, the flow.
MOMENTS = ((0.0, 0.03), (0.0, 0.03), (0.03, 0.3))


def kill_sometime(writer: Writer, rng: random.Random) -> list[str]:
    """Let it run for a random while; returns its whole log."""
    writer.drain(rng.uniform(*rng.choice(MOMENTS)))
    writer.kill()
    lines = writer.take()
    assert not errors(lines), errors(lines)[0]
    return events(lines)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_killed_while_writing(tmp_path, rng, kind, record_property):
    end = time.monotonic() + SECONDS * 0.8 / len(KINDS)
    rounds = flushes = operations = disks = 0
    while time.monotonic() < end:
        folder = tmp_path / f"{disks}"
        folder.mkdir()
        disks += 1
        cache = rng.choice(("none", "none", "writeback", "directsync", "writethrough"))
        backend = rng.choice(("auto", "threads"))
        subject = Subject(folder, kind, cache=cache, backend=backend)
        first = 1
        for _ in range(8):
            seed = rng.randrange(1 << 32)
            writer = Writer(
                lambda log, s=subject, seed=seed, first=first: churn(s.disk, seed, first, log)
            )
            lines = kill_sometime(writer, rng)
            subject.model.replay(lines)
            first += len(lines) + 1
            rounds += 1
            operations += len(lines) // 2
            flushes += subject.model.flushes
            story = (
                f"{kind.name}, cache {cache}, queue {backend}, child's seed {seed}, {len(lines)}"
            )
            wrong = subject.inspect(write=rng.random() < 0.5)
            assert not wrong, f"{story} log lines:\n{explain(wrong)}"
            if time.monotonic() > end:
                break
    print(f"{kind.name}: {rounds} kills, {operations} operations, {flushes} flushes")
    record_property("kills", rounds)
    assert rounds


def create_for_ever(folder: Path, backend: str, log: Log) -> None:
    """Make image after image, some of them over files that are there."""
    number = 0
    host = LinuxHost(backend)
    while True:
        name = f"made-{number}"
        log(at="begin", op="create", n=number)
        mmcow.create(
            folder / name,
            size=(1 << 20) + 512 * number,
            backing="base",
            backing_format="raw",
            host=host,
        )
        log(at="end", op="create", n=number)
        number += 1


def test_killed_while_creating(tmp_path, rng):
    end = time.monotonic() + SECONDS * 0.1
    rounds = 0
    while time.monotonic() < end:
        folder = tmp_path / f"{rounds}"
        folder.mkdir()
        (folder / "base").write_bytes(os.urandom(1 << 20))
        backend = rng.choice(("auto", "threads"))
        writer = Writer(lambda log, f=folder, b=backend: create_for_ever(f, b, log))
        lines = kill_sometime(writer, rng)
        rounds += 1
        ended = sum('"end"' in line for line in lines)
        begun = sum('"begin"' in line for line in lines)
        content = (folder / "base").read_bytes()
        for number in range(begun):
            path = folder / f"made-{number}"
            size = (1 << 20) + 512 * number
            if number < ended or path.exists():
                with mmcow.open(path, write=True) as image:
                    assert image.size == size
                    assert image.read(0, size) == content + bytes(size - len(content))
            else:
                # At worst the data file is there; the same command makes the image then.
                mmcow.create(path, size=size, backing="base", backing_format="raw")
                with mmcow.open(path) as image:
                    assert image.read(0, size) == content + bytes(size - len(content))
        left = [name for name in os.listdir(folder) if name.endswith(".mmcow-new")]
        assert len(left) <= 1, left
    print(f"create: {rounds} kills")


def test_killed_while_renaming(tmp_path, rng):
    """A pair that moves to and fro (rebase -u): the image names the one base or the other."""
    content = os.urandom(1 << 20)
    names = ["base", "a-base-with-a-longer-name", "b" * 200]
    for name in names:
        (tmp_path / name).write_bytes(content)
    path = tmp_path / "disk"

    def work(log: Log) -> None:
        for number in count():
            rename(path, backing=names[number % 3])

    end = time.monotonic() + SECONDS * 0.05
    kills = 0
    for format_, options in cycle((("add-cow", {}), ("add-cow", {"compat": "v7"}), ("cow", {}))):
        mmcow.create(path, format=format_, backing="base", backing_format="raw", options=options)
        with mmcow.open(path, format=format_, write=True) as image:
            image.write(5000, b"\x5a" * 5000)
        for _ in range(5):
            kill_sometime(Writer(work), rng)
            kills += 1
            with mmcow.open(path, format=format_, write=True) as image:
                assert image.read(0, 1 << 20) == content[:5000] + b"\x5a" * 5000 + content[10000:]
                assert image.chain[0].backing in names
        path.unlink()
        (tmp_path / "disk.raw").unlink(missing_ok=True)
        if time.monotonic() > end:
            break
    print(f"rename: {kills} kills")


def test_a_killed_writer_leaves_no_lock(tmp_path, rng):
    subject = Subject(tmp_path, KINDS[0])
    writer = Writer(lambda log: churn(subject.disk, 1, 1, log))
    while not writer.lines:
        assert writer.drain(0.05)
    with pytest.raises(mmcow.LockedError) as caught:
        subject.disk.open(write=True)
    assert f"pid {writer.pid}" in caught.value.holders[0]
    writer.kill()
    subject.disk.open(write=True).close()


def test_the_model_sees_a_lost_flush(tmp_path):
    """The proof is worth what it catches: a bitmap put back to before the last flush."""
    subject = Subject(tmp_path, KINDS[0])
    before = subject.path.read_bytes()
    writer = Writer(lambda log: churn(Disk(*subject.disk), 3, 1, log))
    while sum('"end", "op": "flush"' in line for line in writer.lines) < 5:
        assert writer.drain(0.05)
    writer.kill()
    subject.model.replay(events(writer.take()))
    assert not subject.inspect()
    with subject.path.open("r+b") as file:
        file.write(before)
    assert subject.inspect()
