# SPDX-License-Identifier: MIT
"""The pump in C: that it does what the connection in Python does, and only it, and what it leaves
to Python. What it does with clients that break rules is in tests/c/test_pump.c too."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import struct
import threading
import time

import pytest

import mmcow
from mmcow.engine import engine as engines
from mmcow.nbd import pump
from mmcow.nbd.pump import Pump
from tests.unit import nbd_client as nbd
from tests.unit.nbd_client import Client, connect
from tests.unit.nbd_serving import KIB, MIB, make_overlay, make_raw, serving

SIZE = 4 * MIB


@pytest.fixture(autouse=True)
def _with_hits(monkeypatch):
    """Also where the others run without: what the pump does by itself is the subject."""
    monkeypatch.setenv("MMCOW_HITS", "on")
    monkeypatch.setenv("MMCOW_PUMP", "on")


def make_disk(folder, rng, cluster="4k"):
    """An overlay that has some of its clusters; returns its path and its content."""
    content = bytearray(rng.randbytes(3 * MIB) + bytes(SIZE - 3 * MIB))
    path = make_overlay(
        folder, make_raw(folder / "base.raw", bytes(content[: 3 * MIB])), SIZE,
        cluster_size=cluster,
    )  # fmt: skip
    with mmcow.open(path, write=True) as disk:
        for at in range(0, SIZE, 256 * KIB):
            disk.write(at, b"t" * 64 * KIB)
            content[at : at + 64 * KIB] = b"t" * 64 * KIB
    return path, content


class TestHits:
    @pytest.mark.parametrize("plain", [False, True])
    def test_need_no_python(self, tmp_path, rng, plain):
        path, content = make_disk(tmp_path, rng)
        with serving(path, tmp_path / "s", in_plain_loop=plain) as served:
            export = served.server.exports[""]
            with connect(served.path) as client:
                export.read = export.write = None
                for at in (0, 4 * KIB, 64 * KIB, MIB, SIZE - 4 * KIB):
                    data = rng.randbytes(4 * KIB)
                    assert client.read(at, 4 * KIB) == content[at : at + 4 * KIB]
                    client.write(at, data)  # where it has the cluster, and where it has not
                    assert client.read(at, 4 * KIB) == data
                counters = export.counters
                assert counters.operations == {"read": 10, "write": 5}
                assert counters.bytes == {"read": 40 * KIB, "write": 20 * KIB}
                assert sum(counters.latency) == counters.requests == 15

    def test_holes_are_told(self, tmp_path, rng):
        path, _ = make_disk(tmp_path, rng)
        with serving(path, tmp_path / "s") as served:
            with connect(served.path) as client:
                assert client.ask(nbd.READ, SIZE - 64 * KIB, 4 * KIB).kinds == [2]
            with connect(served.path, structured=False) as client:
                assert client.read(SIZE - 128 * KIB, 128 * KIB) == bytes(128 * KIB)

    def test_metadata_that_they_leave_is_written_out(self, tmp_path, monkeypatch):
        monkeypatch.setattr(engines, "STAGED_MOST", 0)
        size = 64 * MIB
        path = make_overlay(
            tmp_path, make_raw(tmp_path / "b", bytes(4 * KIB)), size, cluster_size="4k"
        )
        with serving(path, tmp_path / "s") as served, connect(served.path) as client:
            flushed = []
            engine = served.engine()
            flush = engine.flush
            engine.flush = lambda: flushed.append(1) or flush()
            for at in range(0, size, 4 * KIB):
                client.start(nbd.WRITE, at, data=b"m" * 4 * KIB)
                client.next_reply()
            assert served.server.exports[""].counters.hits.operations[1] == size // (4 * KIB)
            assert len(flushed) >= 2


def requests(rng, count):
    """Sequences of requests, each of which touches another part of the disk."""
    made = []
    while len(made) < count:
        batch = []
        places = rng.sample(range(16), rng.randrange(1, 12))
        for place in places:
            start = place * 256 * KIB
            command = rng.choice((0, 0, 0, 1, 1, 1, 3, 4, 5, 6, 7, 9))
            unit = rng.choice((1, 512, 4096, 4096))
            length = rng.choice((4 * KIB, rng.randrange(20_000), rng.randrange(128 * KIB)))
            length -= length % unit
            at = start + (rng.randrange(128 * KIB) // unit) * unit
            if rng.random() < 0.03:
                at = rng.choice((SIZE, SIZE - 1, 1 << 63))
            flags = rng.choice((0, 0, 0, 0, 0, nbd.FUA, nbd.DF, nbd.NO_HOLE, 1 << 15))
            if command == nbd.FLUSH:
                at, length = rng.choice(((0, 0), (0, 0), (512, 0)))
            data = rng.randbytes(length) if command == nbd.WRITE else b""
            batch.append((command, at, length, flags, data))
        made.append(batch)
    return made


def answers(served, batches, structured):
    """What a client is told: errors and data, by request."""
    told = []
    with connect(served.path, structured=structured) as client:
        for batch in batches:
            cookies = []
            for command, at, length, flags, data in batch:
                cookies.append(client.start(command, at, length, flags=flags, data=data))
            replies = dict(client.next_reply() for _ in batch)
            for cookie in cookies:
                reply = replies[cookie]
                data = None if reply.data is None or reply.error else bytes(reply.data)
                told.append((reply.error, reply.text, data, reply.status))
        client.flush()
        told.append(client.read(0, SIZE))
        client.disconnect()
    return told


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("cluster", ["4k", "64k"])
def test_all_ways_answer_alike(tmp_path, rng, monkeypatch, structured, cluster):
    """The pump in a loop of its own, in a plain one, without a single hit, and Python alone."""
    seed = rng.randrange(1 << 32)
    print("seed", seed)
    batches = requests(random.Random(seed), 60)
    told = []
    ways = ({}, {"in_plain_loop": True}, {"hits": False}, {"pump": "off"})
    for number, way in enumerate(ways):
        monkeypatch.setenv("MMCOW_PUMP", way.get("pump", "on"))
        options = {key: value for key, value in way.items() if key != "pump"}
        folder = tmp_path / str(number)
        folder.mkdir()
        path, _ = make_disk(folder, random.Random(seed), cluster)
        with serving(path, folder / "s", **options) as served:
            told.append(answers(served, batches, structured))
            assert (served.server.memory.pump is None) == ("pump" in way)
        with mmcow.open(path) as disk:
            assert disk.read(0, SIZE) == told[-1][-1]
    for others in told[1:]:
        assert others == told[0]


def test_beside_snapshot_and_stream(tmp_path, rng):
    """Hits and misses while layers are put on top and the base is pulled in."""
    path, content = make_disk(tmp_path, rng)
    failures = []
    end = threading.Event()

    def work(number):
        try:
            one = random.Random(number)
            start = number * MIB
            with connect(served.path) as client:
                while not end.is_set():
                    unit = one.choice((4096, 4096, 512, 1))
                    length = max(one.randrange(40_000) // unit, 1) * unit
                    at = start + one.randrange(MIB - length) // unit * unit
                    if one.random() < 0.5:
                        data = one.randbytes(length)
                        client.write(at, data)
                        content[at : at + length] = data
                    else:
                        assert client.read(at, length) == content[at : at + length]
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    with serving(path, tmp_path / "s") as served:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        export = served.server.exports[""]
        try:
            for number in range(3):
                time.sleep(0.1)
                name = str(tmp_path / f"frozen{number}.acow")
                served.run(lambda name=name: take_snapshot(export.image, name))
            time.sleep(0.1)
            served.run(export.image.flush)
        finally:
            end.set()
            for thread in threads:
                thread.join()
        assert failures == []
        assert export.counters.hits.operations[0] > 0
        with connect(served.path) as client:
            assert client.read(0, SIZE) == content


async def take_snapshot(image, name):
    from mmcow.jobs.snapshot import take

    await image.perform(lambda: image.reactor.spawn(take(image.image, name)))


def test_a_client_that_does_not_read_the_negotiation(tmp_path):
    """Its requests are served once it has, and in order behind it."""
    names = {f"{n:04}" + "x" * 3000: make_raw(tmp_path / f"{n}", b"n" * MIB) for n in range(3)}
    with serving(names, tmp_path / "s") as served, Client(served.path) as client:
        one = struct.pack(">8sII", nbd.IHAVEOPT, nbd.LIST, 0)
        name = nbd.string(next(iter(names))) + bytes(2)
        go = struct.pack(">8sII", nbd.IHAVEOPT, nbd.GO, len(name)) + name
        count = 100
        client.send(one * count + go + nbd.request(nbd.READ, 1, 0, 4096))
        time.sleep(0.2)
        for _ in range(count):
            while client.receive_option_reply(nbd.LIST)[0] != nbd.ACK:
                pass
        while client.receive_option_reply(nbd.GO)[0] != nbd.ACK:
            pass
        client.sent[1] = nbd.Sent(nbd.READ, 0, 0, 4096)
        assert client.next_reply()[1].data == b"n" * 4096


def test_an_image_that_is_closed_under_its_server(tmp_path):
    """That is a mistake, but clients are told errors, and nothing crashes."""
    image = make_raw(tmp_path / "d", bytes(MIB))
    with serving(image, tmp_path / "s") as served, connect(served.path) as client:
        client.write(0, b"x" * 4096)
        served.run(served.server.exports[""].image.close)
        assert client.error_of(nbd.READ, 0, 4096) == 108
        assert client.error_of(nbd.WRITE, 0, data=b"y" * 4096) == 108


def test_a_result_that_a_turn_has_told_when_the_image_is_closed(tmp_path, monkeypatch):
    """Between the turn and what the loop does about it: else its request would never end, and the
    image would wait for that for ever."""
    image = make_raw(tmp_path / "d", bytes(MIB))
    turn = Pump._turn
    closing = []

    def told(self, ms):
        turn(self, ms)
        if not closing and any(event.kind == pump.RESULT for event in self._todo):
            closing.append(self._loop.create_task(disk.close()))

    with serving(image, tmp_path / "s", hits=False) as served, connect(served.path) as client:
        disk = served.server.exports[""].image
        monkeypatch.setattr(Pump, "_turn", told)
        client.write(MIB - 4096, b"x" * 4096)
        served.run(lambda: asyncio.wait_for(asyncio.shield(closing[0]), 10))
        monkeypatch.undo()
    assert (tmp_path / "d").read_bytes() == bytes(MIB - 4096) + b"x" * 4096


def test_a_bug_over_one_request_ends_its_client_only(tmp_path):
    def broken():
        raise RuntimeError("a bug")

    image = make_raw(tmp_path / "d", bytes(MIB))
    with serving(image, tmp_path / "s") as served, connect(served.path) as other:
        with connect(served.path) as client:
            served.server.exports[""].flush = broken
            client.start(nbd.FLUSH)
            assert client.at_end()
        assert other.read(0, 4096) == bytes(4096)
        assert [str(problem["exception"]) for problem in served.problems] == ["a bug"]
        served.problems.clear()


class TestLoop:
    def test_a_handler_without_a_wakeup_runs_soon(self, tmp_path):
        """The interpreter's own handlers, which nothing but a return from C lets run."""
        image = make_raw(tmp_path / "d", bytes(MIB))
        called = []

        async def main():
            disk = await mmcow.aio.open(image, write=True)
            async with mmcow.nbd.server.Server({"": disk}) as served:
                await served.listen_unix(str(tmp_path / "s"))
                with await asyncio.to_thread(connect, str(tmp_path / "s")) as client:
                    assert isinstance(served.memory.pump, Pump)
                    await asyncio.to_thread(client.read, 0, 512)
                    killer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
                    killer.start()
                    began = time.monotonic()
                    await asyncio.sleep(1)
                    assert 0 <= called[0] - began < 0.5
                    killer.join()

        before = signal.signal(signal.SIGUSR1, lambda *_: called.append(time.monotonic()))
        try:
            pump.run(main())
        finally:
            signal.signal(signal.SIGUSR1, before)

    def test_timers_and_threads_are_not_kept_waiting_by_hits(self, tmp_path):
        image = make_raw(tmp_path / "d", bytes(MIB))
        with serving(image, tmp_path / "s") as served, connect(served.path) as client:
            end = threading.Event()

            def load():
                while not end.is_set():
                    for _ in range(16):
                        client.start(nbd.READ, 0, 4096)
                    for _ in range(16):
                        client.next_reply()

            async def sleep():
                began = time.monotonic()
                await asyncio.sleep(0.05)
                return time.monotonic() - began

            thread = threading.Thread(target=load)
            thread.start()
            try:
                for _ in range(5):
                    assert 0.04 < served.run(sleep) < 1
            finally:
                end.set()
                thread.join()
