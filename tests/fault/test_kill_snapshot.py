# SPDX-License-Identifier: MIT
"""kill -9 of a server in the middle of snapshots, again and again, with a client that writes.

The served name is always the top layer, a frozen layer never changes again, what a client's flush
confirmed is there, and ``check -r leaks`` removes what the kill left. ``MMCOW_KILL_SECONDS`` as
in ``test_kill``.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time

import pytest

import mmcow
from mmcow.jobs.check import check
from tests.fault.test_kill import SECONDS
from tests.fault.writer import Writer, errors
from tests.unit.nbd_client import connect

pytestmark = [pytest.mark.fault, pytest.mark.timeout(3600)]

SIZE = 1 << 20
BLOCK = 4096
LAYERS_MOST = 40  # then a new disk: a chain has an end


def serving(folder, first):
    """A child's work: serve, write ever larger numbers, take snapshots in between, without end."""

    def work(log):
        asyncio.run(whole(log))

    async def whole(log):
        name = str(folder / "vm.acow")
        async with mmcow.serve(name, socket=folder / "sock") as server:
            stop = asyncio.Event()
            client = asyncio.create_task(asyncio.to_thread(write, log, stop))
            for number in range(10**6):
                frozen = f"s{os.getpid()}-{number}"
                await server.snapshot(frozen)
                log(at="frozen", name=frozen)
                if client.done():
                    await client
                await asyncio.sleep(0.002)

    def write(log, stop):
        number = first
        with connect(str(folder / "sock")) as client:
            while not stop.is_set():
                number += 1
                for block in range(8):
                    client.write(block * 5 * BLOCK, number.to_bytes(8, "big") * (BLOCK // 8))
                client.flush()
                log(at="flushed", number=number)

    return work


def numbers(image):
    """What each block holds; a block is never torn."""
    found = []
    for block in range(8):
        data = image.read(block * 5 * BLOCK, BLOCK)
        assert data == data[:8] * (BLOCK // 8)
        found.append(int.from_bytes(data[:8], "big"))
    return found


def digest(path):
    with mmcow.open(path) as image:
        return hashlib.sha256(image.read(0, SIZE)).hexdigest()


def new_disk(folder):
    folder.mkdir()
    (folder / "base.raw").write_bytes(bytes(SIZE))
    mmcow.create(folder / "vm.acow", backing="base.raw", backing_format="raw")


def test_killed_in_the_middle_of_snapshots(tmp_path, rng, record_property):
    end = time.monotonic() + SECONDS / 3
    kills = frozen_layers = leaks = disks = 0
    folder, digests, first, confirmed = None, {}, 0, 0
    while time.monotonic() < end:
        if folder is None or len(digests) > LAYERS_MOST:
            folder = tmp_path / f"{disks}"
            new_disk(folder)
            disks += 1
            digests, first, confirmed = {}, 0, 0
        writer = Writer(serving(folder, first))
        writer.drain(0.25 + rng.uniform(0, 0.15))
        writer.kill()
        kills += 1
        lines = writer.take()
        assert not errors(lines), errors(lines)[0]
        entries = [json.loads(line) for line in lines]
        flushed = [e["number"] for e in entries if e["at"] == "flushed"]
        confirmed = max(flushed, default=confirmed)
        names = {e["name"] for e in entries if e["at"] == "frozen"}

        with mmcow.open(folder / "vm.acow", write=True) as image:  # never a frozen one
            found = numbers(image)
            assert min(found) >= confirmed
            assert max(found) <= max(confirmed, first) + 1
            assert image.size == SIZE
        report = check(folder / "vm.acow", repair="leaks")
        leaks += report.leaks_fixed
        assert (report.leaks, report.corruptions) == (0, 0)
        assert not [name for name in os.listdir(folder) if name.endswith(".mmcow-new")]
        for name in names:
            assert (folder / name).exists()
        for name, known in digests.items():
            assert digest(folder / name) == known, f"{name} changed after it was frozen"
        digests |= {name: digest(folder / name) for name in names}
        frozen_layers += len(names)
        first = max(found)
    record_property("kills", kills)
    record_property("frozen", frozen_layers)
    record_property("leaks removed", leaks)
    print(f"{kills} kills, {frozen_layers} frozen layers, {leaks} leaks removed, {disks} disks")
    assert frozen_layers
