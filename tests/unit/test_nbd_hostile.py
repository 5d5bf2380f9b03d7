# SPDX-License-Identifier: MIT
"""Clients that break every rule, beside one that keeps them."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from contextlib import ExitStack, suppress

import pytest

from mmcow.nbd import connection, handshake, memory
from tests.fuzz import nbd as fuzz
from tests.unit import nbd_client as nbd
from tests.unit.nbd_client import Client, connect
from tests.unit.nbd_serving import MIB, make_overlay, make_raw, resident, serving, wait_for

pytestmark = [pytest.mark.hostile, pytest.mark.usefixtures("way")]

SIZE = 64 * MIB


@pytest.fixture
def served(tmp_path):
    """A disk that a good client uses all the time; what it sees is checked, to the end."""
    base = make_raw(tmp_path / "base.raw", b"b" * MIB)
    top = make_overlay(tmp_path, base, SIZE, cluster_size="64k")
    with serving(top, tmp_path / "s") as served:
        good = GoodClient(served.path)
        good.start()
        try:
            yield served
            before = good.done
            assert wait_for(lambda: good.done > before + 1 or good.failure is not None)
        finally:
            good.end.set()
            good.join()
        assert good.failure is None, good.failure
        with connect(served.path) as client:
            assert client.read(0, SIZE // 2) == bytes(b"b" * MIB) + bytes(SIZE // 2 - MIB)


class GoodClient(threading.Thread):
    """Uses the last MiB; the first half of the disk is nobody's to change."""

    def __init__(self, path):
        super().__init__()
        self.end = threading.Event()
        self.failure = None
        self.done = 0
        self.slowest = 0.0
        self.path = path

    def run(self):
        model = bytearray(MIB)
        rng = random.Random(5)
        try:
            with connect(self.path) as client:
                while not self.end.is_set():
                    began = time.monotonic()
                    at, data = rng.randrange(MIB - 4096), rng.randbytes(4096)
                    client.write(SIZE - MIB + at, data)
                    model[at : at + 4096] = data
                    assert client.read(SIZE - MIB, 65536) == model[:65536]
                    self.done += 1
                    self.slowest = max(self.slowest, time.monotonic() - began)
                    time.sleep(0.002)
                assert client.read(SIZE - MIB, MIB) == model
        except BaseException as error:  # noqa: BLE001
            self.failure = error


def test_vanish_in_the_middle(served):
    session = nbd.request(nbd.WRITE, 1, SIZE // 2, 200000) + b"v" * 200000
    for cut in (1, 27, 28, 29, 5000, 100000, 200027):
        for how in ("close", "reset", "half"):
            with Client(served.path) as client:
                client.go()
                client.send(session[:cut])
                if how == "reset":
                    linger = struct.pack("ii", 1, 0)
                    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                if how == "half":
                    client.socket.shutdown(socket.SHUT_WR)
                    assert client.at_end()
    with connect(served.path) as client:
        assert client.read(SIZE // 2, 200000) == bytes(200000)  # none of them was whole


def test_vanish_with_requests_in_flight(served):
    for number in range(30):
        with connect(served.path, structured=number % 2 == 0) as client:
            client.send(b"".join(nbd.request(nbd.READ, n, n * 4096, MIB) for n in range(50)))
            time.sleep(random.Random(number).random() / 100)


@pytest.mark.parametrize("structured", [True, False])
def test_never_read_replies(served, structured):
    """Memory stays bounded, and what they hold is given back when they go."""
    with connect(served.path) as client:
        client.write(32 * MIB, b"x" * MIB)
    before = resident()
    clients = []
    for _ in range(20):
        client = connect(served.path, structured=structured)
        client.socket.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                client.socket.send(nbd.request(nbd.READ, 1, 32 * MIB, MIB) * 100)
        clients.append(client)
    time.sleep(1)
    held = served.run(lambda: served.server.memory.used)
    unsent = served.run(
        lambda: sum(c.unsent for c in served.server.connections)
    )
    assert unsent > 16 * MIB  # they do fill it
    assert unsent <= held + 21 * memory.SHARE  # and what has not left still counts
    assert held <= memory.MEMORY_MOST + 21 * memory.SHARE
    assert resident() - before < 3 * memory.MEMORY_MOST
    for client in clients:
        client.close()
    assert wait_for(lambda: served.server.memory.used < MIB)


@pytest.mark.parametrize("command", [nbd.BLOCK_STATUS, nbd.READ, nbd.CACHE, 99])
def test_never_read_replies_that_need_no_buffer(served, command):
    """Holes, statuses, errors: small answers to small questions pile up as well."""
    before = resident()
    with connect(served.path) as client:
        client.socket.setblocking(False)
        one = nbd.request(command, 1, SIZE // 2, MIB)
        sent, end = 0, time.monotonic() + 1
        while time.monotonic() < end:
            with suppress(BlockingIOError):
                sent += client.socket.send(one * 1000)
        assert resident() - before < 16 * MIB
        assert sent < 64 * MIB  # it was stopped


def test_options_without_end(served, monkeypatch):
    """Their answers are not kept without end either; the bound on the options is another matter."""
    monkeypatch.setattr(handshake, "OPTIONS_MOST", 1 << 40)
    before = resident()
    with Client(served.path) as client:
        client.socket.setblocking(False)
        end = time.monotonic() + 1
        while time.monotonic() < end:
            with suppress(BlockingIOError):
                client.socket.send(struct.pack(">8sII", nbd.IHAVEOPT, nbd.LIST, 0) * 1000)
        assert resident() - before < 16 * MIB


def test_lengths_of_all_ones(served):
    for command in range(10):
        with connect(served.path) as client:
            client.send(nbd.request(command, 1, 0, 0xFFFFFFFF))
            if command == nbd.DISC:
                assert client.at_end()
            elif command == nbd.WRITE:  # what follows is its payload, passed over
                client.send(bytes(1 << 20))
                assert served.server.memory.used < MIB
            else:
                client.sent[1] = nbd.Sent(command, 0, 0, 0xFFFFFFFF)
                assert client.next_reply()[1].error


def test_declared_but_not_sent(served):
    """A header of 28 bytes makes the server set memory aside: not without end."""
    before = resident()
    clients = []
    for _ in range(50):
        client = connect(served.path, contexts=False)
        client.send(nbd.request(nbd.WRITE, 1, SIZE // 2, 32 * MIB))
        clients.append(client)
    assert wait_for(lambda: served.server.memory.used >= memory.MEMORY_MOST - 32 * MIB)
    time.sleep(0.3)
    assert served.server.memory.used <= memory.MEMORY_MOST + memory.SHARE
    assert resident() - before < 2 * memory.MEMORY_MOST
    for client in clients:
        client.close()
    assert wait_for(lambda: served.server.memory.used < MIB)


def connected(stack, path):
    """A socket on which nothing was said yet."""
    one = stack.enter_context(socket.socket(socket.AF_UNIX))
    one.connect(path)
    return one


def test_a_thousand_connects(served):
    for _ in range(10):
        with ExitStack() as stack:
            for number in range(100):
                one = connected(stack, served.path)
                if number % 3 == 0:
                    one.send(b"\0\0\0\3")
    assert wait_for(lambda: len(served.server.connections) == 1)


def test_a_thousand_at_once_that_never_finish(served, monkeypatch):
    monkeypatch.setattr(connection, "HANDSHAKE_SECONDS", 3.0)
    before = resident()
    with ExitStack() as stack:
        for _ in range(800):
            connected(stack, served.path)
        with connect(served.path) as client:
            assert client.read(0, 1) == b"b"
        assert resident() - before < 100 * MIB
        assert wait_for(lambda: len(served.server.connections) == 1, seconds=20)


def test_what_came_before_the_garbage_is_finished(tmp_path):
    """Requests begun in the same piece as the end of the session do not stay begun."""
    with serving(make_raw(tmp_path / "d", bytes(MIB)), tmp_path / "t") as served:
        with connect(served.path) as client:
            client.send(nbd.request(nbd.READ, 1, 0, 4096) * 3 + b"garbage" * 4)
            with suppress(ConnectionError):
                while client.socket.recv(65536):
                    pass
        assert wait_for(lambda: served.engine().gate.inside == 0)


def test_half_open(served):
    """Both ways of being half there."""
    reading, writing = Client(served.path), Client(served.path)
    for one in (reading, writing):
        one.go()
    reading.socket.shutdown(socket.SHUT_WR)
    writing.socket.shutdown(socket.SHUT_RD)
    writing.send(nbd.request(nbd.READ, 1, 0, MIB) * 10)
    assert reading.at_end()
    assert wait_for(lambda: len(served.server.connections) == 1)
    for one in (reading, writing):
        one.close()


def test_block_status_of_everything_for_ever_leaves_others_their_turn(tmp_path):
    top = make_overlay(tmp_path, make_raw(tmp_path / "b", bytes(SIZE)), cluster_size="4k")
    with serving(top, tmp_path / "s") as served, connect(served.path) as good:
        for at in range(0, 16 * MIB, 8192):
            good.start(nbd.WRITE, at, data=b"x" * 4096)
            good.next_reply()
        bad = connect(served.path)
        bad.send(nbd.request(nbd.BLOCK_STATUS, 1, 0, SIZE) * 200)
        slowest = 0.0
        for _ in range(20):
            began = time.monotonic()
            assert good.read(0, 1) == b"x"
            slowest = max(slowest, time.monotonic() - began)
        bad.close()
        assert slowest < 1, slowest


# (For the pump: test_turns_are_bounded in tests/c/test_pump.c.)
@pytest.mark.parametrize("way", ["python"], indirect=True)
@pytest.mark.parametrize("command", [nbd.READ, nbd.TRIM, nbd.CACHE, 99])
def test_many_that_are_answered_at_once_leave_others_their_turn(tmp_path, command):
    """All of them come to the server before what another client asks; that is not done last."""
    top = make_overlay(tmp_path, make_raw(tmp_path / "b", b"b" * MIB), SIZE)
    with (
        serving(top, tmp_path / "s") as served,
        connect(served.path) as good,
        connect(served.path) as bad,
    ):
        began, refusal = [], connection.Connection._refusal

        def recorded(self, export, request):
            began.append(request.cookie)
            return refusal(self, export, request)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(connection.Connection, "_refusal", recorded)
            stopped = threading.Event()
            served.loop.call_soon_threadsafe(stopped.wait, 30)  # until both have asked
            bad.send(nbd.request(command, 1, SIZE // 2, MIB) * 2000)
            cookie = good.start(nbd.READ, 0, 1)
            stopped.set()
            assert good.next_reply()[1].data == b"b"
            assert wait_for(lambda: len(began) >= 2001)
        assert began.index(cookie) <= 4 * connection.TURN_MOST


def test_fuzz(tmp_path, rng):
    seed = rng.randrange(1 << 32)
    print("seed", seed)
    assert fuzz.run(tmp_path, seed, 8) > 50
