# SPDX-License-Identifier: MIT
"""kill -9 in the middle of commit, stream and detach, again and again until they are through.

The disk reads the same at every stop, and the same call goes on. ``MMCOW_KILL_SECONDS`` as in
``test_kill``.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

import mmcow
import mmcow.jobs.commit
import mmcow.jobs.stream
from tests.fault.disks import KINDS, Subject, explain
from tests.fault.model import BASE, SECTOR, content, decode
from tests.fault.test_kill import SECONDS
from tests.fault.writer import Writer, churn, errors, events

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from tests.fault.writer import Log

pytestmark = [pytest.mark.fault, pytest.mark.timeout(3600)]

WITH_BASE = [kind for kind in KINDS if kind.base and not kind.middle]
ADDCOW = [kind for kind in KINDS if kind.base and kind.format == "add-cow"]
# A run without a kill takes some 20 ms: each try is given a little longer than the one before.
SHORTEST, LONGER = 0.002, 1.25


def scatter(subject: Subject, rng: random.Random) -> list[int]:
    """Write here and there; returns what the disk holds then, sector by sector."""
    with subject.disk.open(write=True) as image:
        for number in range(1, 40):
            first = rng.randrange(image.size // SECTOR)
            length = min(rng.choice((1, 8, 40, 200)), image.size // SECTOR - first)
            if rng.random() < 0.2:
                image.write_zeroes(first * SECTOR, length * SECTOR)
            else:
                image.write(first * SECTOR, content(number, first * SECTOR, length * SECTOR))
        image.flush()
        values = decode(image.read(0, image.size))
    subject.model.accept(values)
    return values


def until_through(work, look, rng: random.Random) -> int:
    """Start ``work(log)``, kill it, ``look()``, until it ends by itself; returns the kills."""
    kills = 0
    patience = SHORTEST
    while True:
        writer = Writer(work)
        alive = writer.drain(rng.uniform(0, patience))
        if alive:
            writer.kill()
            kills += 1
        else:
            writer.wait()
        lines = writer.take()
        assert not errors(lines), errors(lines)[0]
        look(events(lines))
        if any('"end", "op": "job"' in line for line in lines):
            return kills
        patience *= LONGER


def rounds(tmp_path: Path, share: float):
    """Fresh folders until this test's share of the time is over; at least one."""
    end = time.monotonic() + SECONDS * share
    number = 0
    while number == 0 or time.monotonic() < end:
        folder = tmp_path / f"{number}"
        folder.mkdir()
        yield folder
        number += 1


@pytest.mark.parametrize("kind", WITH_BASE, ids=lambda kind: kind.name)
def test_killed_while_committing(tmp_path, rng, kind):
    kills = 0
    for folder in rounds(tmp_path, 0.1 / len(WITH_BASE)):
        subject = Subject(folder, kind, backend=rng.choice(("auto", "threads")))
        values = scatter(subject, rng)
        disk = subject.disk

        def work(log: Log, disk=disk) -> None:
            mmcow.jobs.commit.BATCH = 128 << 10
            mmcow.jobs.commit.BATCH_RANGES = 5
            format_ = None if disk.format == "add-cow" else "raw"
            mmcow.jobs.commit.commit(disk.path, format=disk.format, backing_format=format_)
            log(at="end", op="job", n=0)

        def look(lines: list[str], subject=subject, values=values) -> None:
            with subject.disk.open(write=False) as image:
                found = decode(image.read(0, image.size))
                result = image.reactor.run(image.layers[0].driver.check(""))
            assert found == values, explain(differences(found, values))
            assert not [f.text for f in result.findings if f.kind != "leak"]
            below = decode(subject.base.read_bytes())
            for sector, value in enumerate(below):
                allowed = {BASE, values[sector], 0} if sector < len(values) else {BASE}
                assert value in allowed, f"base, sector {sector}: {value}"

        kills += until_through(work, look, rng)
        below = decode(subject.base.read_bytes())
        assert below[: len(values)] == values
        with disk.open(write=False) as image:
            assert image.layers[0].driver.allocated() == 0
    print(f"commit {kind.name}: {kills} kills")


def differences(found: list[int], wanted: list[int]) -> list[str]:
    return [
        f"sector {n}: {one}, before: {other}"
        for n, (one, other) in enumerate(zip(found, wanted, strict=True))
        if one != other
    ]


@pytest.mark.parametrize("kind", ADDCOW, ids=lambda kind: kind.name)
def test_killed_while_streaming(tmp_path, rng, kind):
    kills = 0
    for folder in rounds(tmp_path, 0.1 / len(ADDCOW)):
        subject = Subject(folder, kind, backend=rng.choice(("auto", "threads")))
        values = scatter(subject, rng)

        def work(log: Log, disk=subject.disk) -> None:
            mmcow.jobs.stream.FLUSH_EVERY = 128 << 10
            mmcow.jobs.stream.PIECE = 32 << 10
            with disk.open(write=True) as image:
                mmcow.jobs.stream.stream(image)
            log(at="end", op="job", n=0)

        def look(lines: list[str], subject=subject) -> None:
            wrong = subject.inspect()
            assert not wrong, explain(wrong)

        kills += until_through(work, look, rng)
        assert subject.model.judge(values) == []
        with subject.disk.open(write=False) as image:
            assert len(image.layers) == 1
            assert image.chain[0].backing is None
        kills += detach(subject, values, rng)
    print(f"stream and detach {kind.name}: {kills} kills")


def detach(subject: Subject, values: list[int], rng: random.Random) -> int:
    from mmcow.jobs.detach import detach as run_detach

    data = subject.path.parent / "top.raw"

    def work(log: Log) -> None:
        if subject.path.exists():
            run_detach(subject.path)
        log(at="end", op="job", n=0)

    def look(lines: list[str]) -> None:
        assert decode(data.read_bytes()) == values
        if subject.path.exists():
            assert not subject.inspect()

    kills = until_through(work, look, rng)
    assert not subject.path.exists()
    with mmcow.open(data, format="raw", write=True) as image:
        assert decode(image.read(0, image.size)) == values
    return kills


def test_killed_while_streaming_under_writes(tmp_path, rng):
    """A guest goes on writing while the disk is streamed."""
    kills = 0
    for folder in rounds(tmp_path, 0.05):
        kind = rng.choice(ADDCOW)
        subject = Subject(folder, kind, cache=rng.choice(("none", "writeback")))
        subject.model.accept(scatter(subject, rng))
        first = 100
        through = False
        while not through and kills < 1000:
            seed = rng.randrange(1 << 32)

            def work(log: Log, disk=subject.disk, seed=seed, first=first) -> None:
                mmcow.jobs.stream.FLUSH_EVERY = 128 << 10
                mmcow.jobs.stream.PIECE = 16 << 10
                opening = type(disk).open

                def stream(image: mmcow.Image) -> None:
                    mmcow.jobs.stream.stream(image)
                    log(at="job")

                class Streamed(type(disk)):
                    def open(self, *, write: bool) -> mmcow.Image:
                        image = opening(self, write=write)
                        threading.Thread(target=stream, args=(image,), daemon=True).start()
                        return image

                churn(Streamed(*disk._replace(resizable=False)), seed, first, log)

            writer = Writer(work)
            writer.drain(rng.uniform(0, 0.15))
            writer.kill()
            lines = writer.take()
            assert not errors(lines), errors(lines)[0]
            through = '{"at": "job"}' in lines
            taken = events(lines)
            first += len(taken) + 1
            subject.model.replay(taken)
            wrong = subject.inspect()
            assert not wrong, f"{kind.name}, child's seed {seed}:\n{explain(wrong)}"
            kills += 1
    print(f"stream under writes: {kills} kills")
