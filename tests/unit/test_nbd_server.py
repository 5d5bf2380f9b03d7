# SPDX-License-Identifier: MIT
"""The server around its connections: sockets, limits, memory, the end."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
import struct
import threading
import time
from contextlib import ExitStack, suppress

import pytest

import mmcow
import mmcow.aio
from mmcow.errors import LockedError, UsageError
from mmcow.nbd import connection, memory, peers, server
from mmcow.tasks import Completion
from tests.unit import nbd_client as nbd
from tests.unit.nbd_client import Client, connect
from tests.unit.nbd_serving import MIB, Serving, make_overlay, make_raw, serving, wait_for

pytestmark = pytest.mark.usefixtures("way")


@pytest.fixture
def image(tmp_path):
    return make_raw(tmp_path / "disk.raw", b"d" * MIB)


class TestExports:
    def test_several(self, tmp_path):
        names = ("a", "b", "")
        images = {n: make_raw(tmp_path / f"{n}.raw", (n or "x").encode() * MIB) for n in names}
        with serving(images, tmp_path / "s") as served:
            clients = [connect(served.path, name) for name in names]
            for name, client in zip(names, clients, strict=True):
                assert client.read(0, 5) == (name or "x").encode() * 5
                client.write(0, b"new" + name.encode())
            for name, client in zip(names, clients, strict=True):
                assert client.read(0, 4) == (b"new" + name.encode() + b"x")[:4]
                client.close()

    def test_none(self):
        async def nothing():
            server.Server({})

        with pytest.raises(UsageError):
            asyncio.run(nothing())

    def test_a_second_server_is_refused_by_the_locks(self, tmp_path, image):
        overlay = make_overlay(tmp_path, image)
        with serving(overlay, tmp_path / "s") as served:
            for path in (overlay, overlay + ".raw"):
                with pytest.raises(LockedError):
                    Serving({"": path}, tmp_path / "t")
            with connect(served.path) as client:
                assert client.read(0, 1) == b"d"
        with serving(overlay, tmp_path / "t"):
            pass


class TestSockets:
    def test_a_file_in_the_way_is_left_alone(self, tmp_path, image):
        (tmp_path / "precious").write_text("data")
        with pytest.raises(UsageError, match="no socket"):
            Serving({"": image}, tmp_path / "precious")
        assert (tmp_path / "precious").read_text() == "data"

    def test_a_stale_socket_is_replaced_a_live_one_is_not(self, tmp_path, image):
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(str(tmp_path / "s"))
        stale.close()
        other = make_raw(tmp_path / "other.raw", bytes(MIB))
        with serving(image, tmp_path / "s") as served:
            with pytest.raises(UsageError, match="another server"):
                Serving({"": other}, tmp_path / "s")
            with connect(served.path) as client:
                assert client.read(0, 1) == b"d"
        assert not (tmp_path / "s").exists()

    def test_one_with_a_full_queue_is_live_too(self, tmp_path, image):
        with socket.socket(socket.AF_UNIX) as busy:
            busy.bind(str(tmp_path / "s"))
            busy.listen(0)
            waiting = []
            while True:
                one = socket.socket(socket.AF_UNIX)
                waiting.append(one)
                one.setblocking(False)
                if one.connect_ex(str(tmp_path / "s")):
                    break
            with pytest.raises(UsageError, match="another server"):
                Serving({"": image}, tmp_path / "s")
            for one in waiting:
                one.close()

    def test_somebody_elses_socket_of_the_same_name_stays(self, tmp_path, image):
        with serving(image, tmp_path / "s"):
            (tmp_path / "s").unlink()
            (tmp_path / "s").write_text("another's")
        assert (tmp_path / "s").read_text() == "another's"

    def test_the_log_names_who_attached(self, tmp_path, image, caplog):
        caplog.set_level(logging.INFO, "mmcow.nbd")
        with serving({"a": image}, tmp_path / "s") as served:
            uri = served.run(lambda: served.server.listen_tcp("127.0.0.1", 0))
            port = int(uri.split(":")[2].partition("/")[0])
            connect(served.path, "a").disconnect()
            with socket.create_connection(("127.0.0.1", port), timeout=10) as one:
                mine = one.getsockname()[1]
                one.sendall(struct.pack(">I8sII", 3, nbd.IHAVEOPT, nbd.EXPORT_NAME, 1) + b"a")
                with one.makefile("rb") as answers:
                    assert len(answers.read(18 + 10)) == 28
                    one.sendall(bytes(28))  # which is no request
                    assert answers.read(1) == b""
        lines = [r.message for r in caplog.records if r.name == "mmcow.nbd"]
        assert [line.partition(", not")[0] for line in lines] == [
            f"client attached to export 'a' (pid {os.getpid()}, uid {os.getuid()})",
            f"client attached to export 'a' (127.0.0.1:{mine})",
            f"client dropped (127.0.0.1:{mine}): request begins with 0x0",
        ]

    def test_names_are_quoted_in_the_uri(self, tmp_path, image):
        with serving({"a?b#c/d": image}, tmp_path / "so ck%t") as served:
            assert served.uri.startswith("nbd+unix:///a%3Fb%23c%2Fd?socket=")
            assert served.uri.endswith("/so%20ck%25t")
        with serving(image, tmp_path / "not UTF-8 \udcff") as served:
            assert served.uri.endswith("/not%20UTF-8%20%FF")

    def test_given_ones(self, tmp_path, image):
        """As systemd hands them over; their names are not the server's to remove."""
        given = [socket.socket(socket.AF_UNIX), socket.socket(socket.AF_INET)]
        given[0].bind(str(tmp_path / "given"))
        given[1].bind(("127.0.0.1", 0))
        for one in given:
            one.listen()

        async def main():
            disk = await mmcow.aio.open(image)
            async with server.Server({"": disk}) as served:
                await served.listen_on(given)
                uri = await served.listen_tcp("127.0.0.1", 0)
                await asyncio.to_thread(self.check, tmp_path)
                return uri

        assert asyncio.run(main()).startswith("nbd://127.0.0.1:")
        assert (tmp_path / "given").exists()

    @staticmethod
    def check(tmp_path):
        with connect(str(tmp_path / "given")) as client:
            assert client.read(0, 1) == b"d"


class TestLimits:
    def test_too_many_clients(self, tmp_path, image):
        with serving(image, tmp_path / "s", max_connections=3) as served:
            good = [connect(served.path) for _ in range(3)]
            with Client(served.path, greet=False) as more:
                assert more.at_end()
            assert good[0].read(0, 1) == b"d"
            good.pop().disconnect()
            with connect(served.path) as client:
                assert client.read(0, 1) == b"d"
            for client in good:
                client.close()

    def test_who_is_refused_is_in_the_log(self, tmp_path, image, caplog):
        with serving(image, tmp_path / "s", max_connections=1) as served:
            with connect(served.path), Client(served.path, greet=False) as more:
                assert more.at_end()
            lines = [r for r in caplog.records if "refused" in r.message]
            who = f"(pid {os.getpid()}, uid {os.getuid()})"
            assert [r.message for r in lines] == [
                f"client refused {who}: no more than 1 at once (max-connections)"
            ]
            assert lines[0].levelno == logging.WARNING

    def test_the_limit_of_open_files_is_told_as_such(self, tmp_path, image, caplog, monkeypatch):
        monkeypatch.setattr(server.resource, "getrlimit", lambda _: (129, 4096))
        with (
            serving(image, tmp_path / "s", max_connections=5) as served,
            connect(served.path),
            Client(served.path, greet=False) as more,
        ):
            assert more.at_end()
        assert "no more than 1 at once (limit of open files)" in caplog.text

    @pytest.mark.parametrize("attached", [1, 0])
    def test_a_flood_of_clients_does_not_fill_the_log(self, tmp_path, image, caplog, attached):
        """Refused where all places are taken, else dropped in favour of who comes later."""
        with serving(image, tmp_path / "s", max_connections=1) as served:
            good = [connect(served.path) for _ in range(attached)]
            flood = [Client(served.path, greet=False) for _ in range(300)]
            turned_away = flood if attached else flood[:-1]
            for client in turned_away:
                assert attached or client.receive(18)
                assert client.at_end()
            for client in good + flood:
                client.close()
        lines = [r.message for r in caplog.records if r.name == "mmcow.nbd"]
        assert len(lines) == peers.LINES_MOST + 1
        left = len(turned_away) - peers.LINES_MOST
        assert lines[-1] == f"{left} more clients were refused or dropped"

    @pytest.mark.parametrize("at_once", [True, False])
    def test_nor_do_those_who_attach_and_send_no_request(
        self, tmp_path, image, caplog, monkeypatch, at_once
    ):
        """And a client that was served, and breaks the protocol meanwhile, has its line."""
        monkeypatch.setattr(peers, "SERVED_LINES_MOST", 40)
        caplog.set_level(logging.INFO, "mmcow.nbd")
        attach = struct.pack(">I8sII", 3, nbd.IHAVEOPT, nbd.EXPORT_NAME, 0)
        with serving(image, tmp_path / "s") as served:
            served_once = connect(served.path)
            served_once.read(0, MIB)
            for _ in range(100):
                with Client(served.path, greet=False) as client:
                    client.send(attach + bytes(28 * at_once))
                    assert client.receive(18 + 10)
                    if not at_once:
                        client.send(bytes(28))
                    assert client.at_end()
            served_once.send(b"\xde\xad\xbe\xef" + bytes(24))
            assert served_once.at_end()
            served_once.close()
        lines = [r.message for r in caplog.records if r.name == "mmcow.nbd"]
        assert sum(line.startswith("client attached") for line in lines) == 40
        dropped = [line for line in lines if line.startswith("client dropped")]
        assert len(dropped) == peers.LINES_MOST + 1
        assert "request begins with 0xdeadbeef" in dropped[-1]
        assert lines[-2:] == [
            "61 more clients attached",
            "90 more clients were refused or dropped",
        ]
        assert len(lines) == 40 + len(dropped) + 2

    def test_the_silent_give_way(self, tmp_path, image):
        with serving(image, tmp_path / "s", max_connections=3) as served:
            good = connect(served.path)
            silent = [Client(served.path) for _ in range(10)]
            with connect(served.path) as client:
                assert client.read(0, 1) == b"d"
                assert good.read(0, 1) == b"d"
            good.close()
            for one in silent:
                one.close()

    def test_never_more_than_there_are_descriptors_for(self, monkeypatch):
        monkeypatch.setattr(server.resource, "getrlimit", lambda _: (1024, 4096))
        assert server.affordable(5000) == 896
        assert server.affordable(10) == 10

    @pytest.mark.parametrize("length", [512, 4 * MIB])
    def test_what_one_client_may_have_in_flight(self, tmp_path, length):
        """While the disk does not answer, no more is begun, and all is answered in the end."""
        disk = make_raw(tmp_path / "big.raw", bytes(4 * MIB))
        with (
            serving(disk, tmp_path / "s", hits=False) as served,
            connect(served.path) as client,
        ):
            reads = HeldReads(served)
            client.sent = {n: nbd.Sent(nbd.READ, 0, 0, length) for n in range(300)}
            client.send(b"".join(nbd.request(nbd.READ, n, 0, length) for n in range(300)))
            time.sleep(0.3)
            most = min(connection.REQUESTS_MOST, connection.BYTES_MOST // length)
            begun = len(reads.held)
            one = served.run(lambda: next(iter(served.server.connections)))
            memory_used = one.memory, served.server.memory.used
            for _ in range(300):
                while not client_has_data(client):
                    reads.let_go()
                assert client.next_reply()[1].data == bytes(length)
        assert begun == most
        assert memory_used == (most * length, most * length)

    def test_memory_is_shared_out(self, tmp_path, image, monkeypatch):
        """Clients that take all of it and do not move stop nobody for long."""
        monkeypatch.setattr(memory, "MEMORY_MOST", 2 * MIB)
        monkeypatch.setattr(memory, "PATIENCE_SECONDS", 0.3)
        disk = make_raw(tmp_path / "big.raw", bytes(8 * MIB))
        with serving(disk, tmp_path / "s") as served:
            hogs = [connect(served.path) for _ in range(2)]
            for hog in hogs:  # room is taken, the payload never comes
                hog.send(nbd.request(nbd.WRITE, 1, 0, MIB) + b"z")
            with connect(served.path) as client:
                assert client.read(0, 65536) == bytes(65536)  # within its share: at once
                began = time.monotonic()
                client.write(4 * MIB, b"g" * MIB)
                assert client.read(4 * MIB, MIB) == b"g" * MIB
                assert time.monotonic() - began < 10
                assert client.read(0, MIB) == bytes(MIB)
            assert all(hog.at_end() for hog in hogs)
            for hog in hogs:
                hog.close()

    @pytest.mark.parametrize("move", ["send", "read"])
    def test_moving_a_little_is_not_enough(self, tmp_path, monkeypatch, move):
        monkeypatch.setattr(memory, "MEMORY_MOST", 8 * MIB)
        monkeypatch.setattr(memory, "PATIENCE_SECONDS", 0.5)
        disk = make_raw(tmp_path / "big.raw", bytes(8 * MIB))
        with serving(disk, tmp_path / "s") as served, ExitStack() as stack:
            hogs = [stack.enter_context(connect(served.path)) for _ in range(2)]
            for hog in hogs:
                if move == "send":
                    hog.send(nbd.request(nbd.WRITE, 1, 0, 4 * MIB) + b"z")
                else:
                    hog.send(nbd.request(nbd.READ, 1, 0, 4 * MIB))
            assert wait_for(lambda: served.server.memory.used == 8 * MIB)
            client = stack.enter_context(connect(served.path))
            client.send(nbd.request(nbd.READ, 1, 0, 2 * MIB))
            until = time.monotonic() + 10
            while not client_has_data(client) and time.monotonic() < until:
                with suppress(OSError):  # some are dropped by now
                    for hog in hogs:
                        hog.send(b"z") if move == "send" else hog.socket.recv(100)
                time.sleep(0.05)
            client.sent[1] = nbd.Sent(nbd.READ, 0, 0, 2 * MIB)
            assert client.next_reply()[1].data == bytes(2 * MIB)

    def test_many_that_do_not_move_are_gone_soon(self, tmp_path, monkeypatch):
        monkeypatch.setattr(memory, "MEMORY_MOST", 2 * MIB)
        monkeypatch.setattr(memory, "PATIENCE_SECONDS", 1.5)
        disk = make_raw(tmp_path / "big.raw", bytes(8 * MIB))
        with serving(disk, tmp_path / "s") as served, ExitStack() as stack:
            for _ in range(40):  # two at a time have room
                hog = stack.enter_context(connect(served.path))
                hog.send(nbd.request(nbd.WRITE, 1, 0, MIB) + b"z")
            client = stack.enter_context(connect(served.path))
            began = time.monotonic()
            assert client.read(0, MIB) == bytes(MIB)
            assert time.monotonic() - began < 10, "one patience for each two of them would be 30 s"

    def test_share_is_there_for_one_request_after_the_other(self, tmp_path, monkeypatch):
        """Nobody is dropped here, and room never comes: only the share is left."""
        monkeypatch.setattr(memory, "MEMORY_MOST", 2 * MIB)
        monkeypatch.setattr(memory, "PATIENCE_SECONDS", 1000.0)
        disk = make_raw(tmp_path / "big.raw", bytes(8 * MIB))
        with serving(disk, tmp_path / "s") as served, ExitStack() as stack:
            for _ in range(2):
                hog = stack.enter_context(connect(served.path))
                hog.send(nbd.request(nbd.WRITE, 1, 0, MIB) + b"z")
            assert wait_for(lambda: served.server.memory.used == 2 * MIB)
            client = stack.enter_context(connect(served.path))
            for number in range(20):
                client.sent[number] = nbd.Sent(nbd.READ, 0, 0, memory.SHARE)
                client.send(nbd.request(nbd.READ, number, 0, memory.SHARE))
            for _ in range(20):
                assert client.next_reply()[1].data == bytes(memory.SHARE)

    def test_who_waits_for_memory_gets_it_in_order(self):
        loop = asyncio.new_event_loop()

        class Holder:
            def __init__(self):
                self.memory = 0
                self.calls = 0

            def room_came(self):
                self.calls += 1

            def moved(self):
                return None

        one, two, three = Holder(), Holder(), Holder()
        pool = memory.Memory(loop, {one, two, three})
        try:
            assert pool.take(one, memory.MEMORY_MOST)
            one.memory = memory.MEMORY_MOST
            assert pool.take(two, memory.SHARE)  # always
            two.memory = memory.SHARE
            assert not pool.take(two, memory.MEMORY_MOST // 2)
            assert not pool.take(three, memory.MEMORY_MOST // 2)
            pool.give(one.memory)
            one.memory = 0
            loop.run_until_complete(asyncio.sleep(0))
            assert (two.calls, three.calls) == (1, 0)
            assert not pool.take(one, memory.MEMORY_MOST // 8)  # it is not its turn
            assert pool.take(two, memory.MEMORY_MOST // 2)
            loop.run_until_complete(asyncio.sleep(0))
            pool.forget(three)
            loop.run_until_complete(asyncio.sleep(0))
            assert one.calls == 1
            assert pool.take(one, memory.MEMORY_MOST // 8)
        finally:
            pool.close()
            loop.close()


class TestClose:
    def test_finishes_what_is_in_flight_and_flushes(self, tmp_path, image):
        served = Serving({"": image}, tmp_path / "s", hits=False)
        engine = served.engine()
        held = []
        write = engine.top.data.write

        def slow(offset, buffers):
            completion = Completion()
            held.append((completion, write, offset, buffers))
            return completion

        def let_go():
            for completion, do, offset, buffers in held:
                with engine.reactor.lock:
                    do(offset, buffers).on_done(lambda r, c=completion: c.set(r.value))
            engine.reactor.poll()

        engine.top.data.write = slow
        with connect(served.path) as client:
            client.start(nbd.WRITE, 512, data=b"w" * 4096)
            while not held:
                time.sleep(0.01)
            served.loop.call_soon_threadsafe(served._end.set)
            time.sleep(0.2)
            assert served._thread.is_alive()
            served.loop.call_soon_threadsafe(let_go)
            assert not client.next_reply()[1].error
            assert client.at_end()
        assert served.stop() is None
        with mmcow.open(image) as disk:
            assert disk.read(512, 4096) == b"w" * 4096

    @pytest.mark.parametrize("structured", [True, False])
    def test_a_request_that_comes_meanwhile_is_told(self, tmp_path, image, structured):
        """What was begun is finished; what comes later, and the rest of a payload, is refused."""
        served = Serving({"": image}, tmp_path / "s", hits=False)
        reads = HeldReads(served)
        with connect(served.path, structured=structured) as client:
            first = client.start(nbd.READ, 0, 512)
            client.sent[7] = nbd.Sent(nbd.WRITE, 0, 4096, 4096)
            client.send(nbd.request(nbd.WRITE, 7, 4096, 4096) + b"w" * 1000)
            reads.wait()
            while served.server.memory.used < 4096 + 512:
                time.sleep(0.01)
            begin_to_end(served)
            client.send(b"w" * 3096)
            for command in (nbd.WRITE, nbd.FLUSH, nbd.READ):
                data = b"x" * 4096 if command == nbd.WRITE else b""
                client.start(command, 0, 512 * (command == nbd.READ), data=data)
            answers = [client.next_reply() for _ in range(4)]
            assert [reply.error for _, reply in answers] == [108] * 4
            assert answers[0][0] == 7
            reads.let_go()
            cookie, reply = client.next_reply()
            assert (cookie, reply.error) == (first, 0)
            assert client.at_end()
        assert served.stop() is None
        with mmcow.open(image) as disk:
            assert disk.read(0, 8192) == b"d" * 8192

    def test_who_negotiates_meanwhile_is_told(self, tmp_path, image, monkeypatch):
        """While the last requests are finished; also the option that is half there. Then all are
        let go at once."""
        monkeypatch.setattr(server, "PARTING_SECONDS", 60.0)  # longer than a client waits
        served = Serving({"": image}, tmp_path / "s", hits=False)
        reads = HeldReads(served)
        silent, early = Client(served.path, greet=False), Client(served.path)
        go = struct.pack(">8sII", nbd.IHAVEOPT, nbd.GO, 6)
        with connect(served.path) as client, Client(served.path) as halfway:
            client.start(nbd.READ, 0, 512)
            halfway.send(go)
            early.negotiate_structured()
            reads.wait()
            begin_to_end(served)
            halfway.send(bytes(6))
            assert halfway.receive_option_reply(nbd.GO)[0] == nbd.ERR_SHUTDOWN
            ((kind, text),) = early.option(nbd.LIST)
            assert (kind, text) == (nbd.ERR_SHUTDOWN, b"the server is stopping")
            assert early.option(nbd.ABORT) == [(nbd.ACK, b"")]
            assert early.at_end()
            reads.let_go()
            assert not client.next_reply()[1].error
            assert client.at_end()
            assert halfway.at_end()  # who does not take the hint
            assert silent.receive(18)
            assert silent.at_end()
        silent.close()
        early.close()
        assert served.stop() is None

    @pytest.mark.parametrize("last", [nbd.LIST, nbd.ABORT, nbd.EXPORT_NAME])
    def test_does_not_wait_for_who_reads_not_even_the_negotiation(
        self, tmp_path, image, monkeypatch, last
    ):
        """Whatever its last option was."""
        monkeypatch.setattr(server, "PARTING_SECONDS", 20.0)
        served = Serving({"": image}, tmp_path / "s")
        with Client(served.path) as deaf:
            fill_with_answers(served, deaf)
            deaf.send_option(last)
            time.sleep(0.1)
            began = time.monotonic()
            served.end()
            assert time.monotonic() - began < 10
        assert served.stop() is None

    def test_nor_for_who_asks_on_and_reads_nothing_when_it_is_told(
        self, tmp_path, image, monkeypatch
    ):
        """While the last requests are finished."""
        monkeypatch.setattr(server, "PARTING_SECONDS", 20.0)
        served = Serving({"": image}, tmp_path / "s", hits=False)
        reads = HeldReads(served)
        with connect(served.path) as client, Client(served.path) as deaf:
            assert deaf.option(nbd.LIST)
            client.start(nbd.READ, 0, 512)
            reads.wait()
            begin_to_end(served)
            with pytest.raises(ConnectionError):  # it is left
                fill_with_answers(served, deaf)
            began = time.monotonic()
            reads.let_go()
            assert not client.next_reply()[1].error
            assert client.at_end()
            served.end()
            assert time.monotonic() - began < 10
        assert served.stop() is None

    def test_does_not_wait_for_who_reads_no_replies(self, tmp_path, monkeypatch):
        """But for who reads slowly; and what was written is there."""
        monkeypatch.setattr(server, "PARTING_SECONDS", 60.0)
        disk = make_raw(tmp_path / "big.raw", b"d" * 32 * MIB)
        served = Serving({"": disk}, tmp_path / "s")
        deaf, slow = (connect(served.path, structured=False) for _ in range(2))
        deaf.write(0, b"w" * 4096)
        deaf.start(nbd.WRITE, 8192, data=b"v" * 4096)
        for client in (deaf, slow):
            for _ in range(12):
                client.start(nbd.READ, 16 * MIB, MIB)
        while served.run(lambda: sum(one.memory for one in served.server.connections)) < 24 * MIB:
            time.sleep(0.01)  # until all of them are begun
        reader = threading.Thread(target=self.read_slowly, args=(slow, answers := []))
        reader.start()
        began = time.monotonic()
        served.end()
        took = time.monotonic() - began
        reader.join()
        deaf.close()
        slow.close()
        assert answers == [b"d" * MIB] * 12
        assert 2 * server.DEAF_SECONDS < took < 30  # by the slow one
        assert served.stop() is None
        with mmcow.open(disk) as image:
            assert image.read(0, 12288) == b"w" * 4096 + b"d" * 4096 + b"v" * 4096

    @staticmethod
    def read_slowly(client, answers):
        for _ in range(12):
            time.sleep(0.25)
            answers.append(client.next_reply()[1].data)
        assert client.at_end()

    def test_who_reads_little_by_little_does_read(self, tmp_path, monkeypatch):
        """So little that the kernel takes nothing more for a while."""
        monkeypatch.setattr(server, "PARTING_SECONDS", 60.0)
        monkeypatch.setattr(server, "DEAF_SECONDS", 0.4)
        disk = make_raw(tmp_path / "big.raw", b"d" * MIB)
        served = Serving({"": disk}, tmp_path / "s")
        with connect(served.path, structured=False) as slow:
            slow.start(nbd.READ, 0, MIB // 2)
            while not client_has_data(slow):
                pass
            begin_to_end(served)
            head, parts = slow.receive(16), []
            while sum(map(len, parts)) < MIB // 2:
                time.sleep(0.2)
                parts.append(slow.receive(min(48 << 10, MIB // 2 - sum(map(len, parts)))))
            assert head[:8] == struct.pack(">II", 0x67446698, 0)
            assert b"".join(parts) == b"d" * (MIB // 2)
            assert slow.at_end()
        assert served.stop() is None

    def test_ends_at_once_where_nobody_reads(self, tmp_path, monkeypatch):
        """Not when ``PARTING_SECONDS`` are over."""
        monkeypatch.setattr(server, "PARTING_SECONDS", 60.0)
        disk = make_raw(tmp_path / "big.raw", bytes(32 * MIB))
        served = Serving({"": disk}, tmp_path / "s")
        with connect(served.path, structured=False) as deaf:
            for _ in range(40):
                deaf.start(nbd.READ, 0, MIB)
            began = time.monotonic()
            served.end()
            assert server.DEAF_SECONDS < time.monotonic() - began < 20
        assert served.stop() is None

    def test_ends_clients_of_every_kind(self, tmp_path, image, monkeypatch):
        monkeypatch.setattr(server, "PARTING_SECONDS", 0.5)
        disk = make_raw(tmp_path / "big.raw", bytes(32 * MIB))
        served = Serving({"": disk}, tmp_path / "s")
        idle = connect(served.path)
        silent = Client(served.path, greet=False)
        halfway = connect(served.path)
        halfway.send(nbd.request(nbd.WRITE, 1, 0, MIB) + b"z" * 1000)
        deaf = connect(served.path, structured=False)
        for _ in range(40):
            deaf.start(nbd.READ, 0, MIB)
        with connect(served.path) as client:
            client.write(0, b"z")
            began = time.monotonic()
            served.end()
            assert time.monotonic() - began < 10
        for one in (idle, silent, halfway, deaf):
            one.close()
        assert served.stop() is None

    def test_twice_and_at_once(self, image, tmp_path):
        async def main():
            disk = await mmcow.aio.open(image, write=True)
            served = server.Server({"": disk})
            await served.listen_unix(str(tmp_path / "s"))
            await asyncio.gather(served.close(), served.close())
            await served.close()

        asyncio.run(main())

    def test_within_somebody_elses_loop_nothing_is_left(self, image, tmp_path):
        async def main():
            loop = asyncio.get_running_loop()
            descriptors = len(os.listdir("/proc/self/fd"))
            for _ in range(3):
                disk = await mmcow.aio.open(image, write=True)
                async with server.Server({"": disk}) as served:
                    await served.listen_unix(str(tmp_path / "s"))
                    await asyncio.to_thread(self.use, str(tmp_path / "s"))
            assert asyncio.all_tasks(loop) == {asyncio.current_task()}
            assert len(os.listdir("/proc/self/fd")) == descriptors

        asyncio.run(main())

    @staticmethod
    def use(path):
        with connect(path) as client:
            client.write(0, b"z")
            client.disconnect()


class HeldReads:
    """The reads of a server's disk, none of which ends before it is let go. They leave the buffers
    as they are."""

    def __init__(self, served):
        self.held = []
        self._served = served
        served.engine().top.data.read = self._begin

    def _begin(self, _offset, buffers):
        completion = Completion()
        self.held.append((completion, len(buffers[0])))
        return completion

    def wait(self):
        """Until there is one."""
        while not self.held:
            time.sleep(0.01)

    def let_go(self):
        """End those that there are."""
        self._served.run(self._end)

    def _end(self):
        while self.held:
            completion, length = self.held.pop()
            completion.set(length)
        self._served.engine().reactor.poll()


def begin_to_end(served):
    """Return when the server has begun to close."""
    served.loop.call_soon_threadsafe(served._end.set)
    while not served.server._closed:
        time.sleep(0.01)


def client_has_data(client):
    return bool(select.select([client.socket], [], [], 0.001)[0])


def fill_with_answers(served, client):
    """Ask for lists and read none, until an answer does not even leave the server."""
    for _ in range(20000):
        client.send_option(nbd.LIST)
        if served.run(lambda: sum(one.unsent for one in served.server.connections)):
            return
    raise AssertionError("all of it left")


def test_idle_means_idle(tmp_path, image):
    """With clients attached and nothing asked the loop has no timer and takes no turn."""
    with serving(image, tmp_path / "s") as served, connect(served.path) as client:
        assert client.read(0, 1) == b"d"

        def timers():
            return [t for t in served.loop._scheduled if not t.cancelled()]

        assert served.run(timers) == []
        usage = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - usage < 0.1


def test_large_requests_beyond_what_one_client_may_have_in_flight(tmp_path):
    count = 3 * connection.BYTES_MOST // (8 * MIB)
    content = os.urandom(8 * MIB)
    image = make_raw(tmp_path / "disk.raw", content)
    with serving(image, tmp_path / "s") as served, connect(served.path) as client:
        for _ in range(count):
            client.start(nbd.READ, 0, 8 * MIB)
        for _ in range(count):
            assert client.next_reply()[1].data == content
