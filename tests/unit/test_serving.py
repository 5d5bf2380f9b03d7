# SPDX-License-Identifier: MIT
"""``mmcow.serve`` inside a program's own asyncio loop."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import socket
import stat
import time
from contextlib import suppress

import pytest

import mmcow
import mmcow.aio
from mmcow.jobs.detach import detach
from mmcow.nbd import live
from mmcow.tasks import Completion
from tests.unit.nbd_client import Client, connect
from tests.unit.nbd_serving import MIB, open_descriptors

SIZE = 4 * MIB


@pytest.fixture
def disk(tmp_path, rng):
    (tmp_path / "base.raw").write_bytes(rng.randbytes(SIZE))
    path = tmp_path / "vm.acow"
    mmcow.create(path, backing="base.raw", backing_format="raw")
    return path


@pytest.fixture
def sock(tmp_path):
    return str(tmp_path / "vm.sock")


def run(main):
    """Run a coroutine function; no descriptor and no task may be left."""

    async def whole():
        before = open_descriptors()
        await main()
        for _ in range(3):  # transports close in the loop's next turn
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert open_descriptors() == before

    asyncio.run(whole())


async def until(true):
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def use(path, *steps, export=""):
    """A client in a thread: reads are (offset, length), writes (offset, bytes)."""

    def talk():
        found = []
        with connect(path, export) as client:
            for offset, what in steps:
                if isinstance(what, bytes):
                    client.write(offset, what)
                else:
                    found.append(client.read(offset, what))
            client.disconnect()
        return found

    return asyncio.to_thread(talk)


def test_the_whole_life_of_a_disk(disk, sock, tmp_path):
    model = bytearray((tmp_path / "base.raw").read_bytes())

    async def main():
        async with mmcow.serve(disk, socket=sock) as server:
            assert server.uri == f"nbd+unix:///?socket={sock}"
            assert server.exports == ("",)
            await use(sock, (5, b"one"))
            model[5:8] = b"one"
            frozen = await server.snapshot(as_="before.acow")
            assert frozen == str(tmp_path / "before.acow")
            await use(sock, (5, b"two"))
            model[5:8] = b"two"
            await server.flush()
            await server.stream()
            assert await server.resize(SIZE + 1000) == SIZE + 1024
            status = server.status()["exports"][0]
            assert status["chain"] == [f"{disk} (add-cow)"]
            assert status["stream"]["state"] == "completed"
            assert status["allocated-clusters"] == status["total-clusters"]
            assert await use(sock, (0, SIZE + 1024)) == [model + bytes(1024)]

    run(main)
    assert not os.path.exists(sock)
    with mmcow.open(tmp_path / "before.acow") as image:
        assert image.read(5, 3) == b"one"
    with open(detach(disk), "rb") as file:
        assert file.read() == model + bytes(1024)


@pytest.mark.parametrize("how", ["path", "image", "aio", "list", "mapping"])
def test_what_may_be_served(disk, sock, how):
    async def main():
        path = str(disk)
        given = {
            "path": lambda: path,
            "image": lambda: mmcow.open(path, write=True),
            "list": lambda: [path],
            "mapping": lambda: {"vm": path},
        }
        disks = await mmcow.aio.open(path, write=True) if how == "aio" else given[how]()
        async with mmcow.serve(disks, socket=sock) as server:
            assert server.exports == (("vm",) if how == "mapping" else ("",))
            await use(sock, (0, b"hello"), export=server.exports[0])
        if how in ("image", "aio"):  # was the server's
            with pytest.raises(mmcow.ClosedError):
                disks.block_status()

    run(main)
    with mmcow.open(disk) as image:
        assert image.read(0, 5) == b"hello"


def test_several_have_their_file_names(disk, sock, tmp_path):
    other = tmp_path / "other.raw"
    other.write_bytes(b"o" * MIB)

    async def main():
        async with mmcow.serve([disk, other], socket=sock, bind="127.0.0.1:0") as server:
            assert server.exports == ("vm.acow", "other.raw")
            assert server.uris[1].startswith("nbd://127.0.0.1:")
            assert await use(sock, (0, 3), export="other.raw") == [b"ooo"]
            with pytest.raises(mmcow.UsageError, match=r"say which.*'vm.acow', 'other.raw'"):
                server.stream()
            with pytest.raises(mmcow.UsageError, match="no export 'nosuch'"):
                await server.flush("nosuch")
            await server.snapshot("s", export="vm.acow")
            assert [e["name"] for e in server.status("vm.acow")["exports"]] == ["vm.acow"]
            assert len(server.status()["exports"]) == 2
            await server.flush()

    run(main)


def test_read_only_and_options_of_opening(disk, sock):
    async def main():
        async with mmcow.serve(disk, socket=sock, read_only=True, cache="writeback") as server:
            assert server.status()["exports"][0]["read-only"]
            with pytest.raises(mmcow.ReadOnlyError):
                server.stream()
            with pytest.raises(mmcow.ReadOnlyError):
                await server.snapshot("s")
        with pytest.raises(mmcow.ChainError):
            async with mmcow.serve(disk, socket=sock, policy=mmcow.DenyAll()):
                pass

    run(main)


# ---- errors ----


def test_outside_of_a_loop_it_says_what_to_do(disk, sock):
    with pytest.raises(mmcow.UsageError, match="async with"):
        mmcow.serve(disk, socket=sock)


@pytest.mark.parametrize(
    ("disks", "options", "text"),
    [
        ("vm.acow", {"socket": None}, "where to listen"),
        ([], {}, "nothing to serve"),
        ({}, {}, "nothing to serve"),
        (["a/vm.acow", "b/vm.acow"], {}, "two exports would be called 'vm.acow'"),
        ("vm.acow", {"bind": "nowhere"}, "HOST:PORT"),
        ("vm.acow", {"tls": "/nosuch"}, "/nosuch"),
        ("vm.acow", {"tls_verify_peer": True}, "tls="),
        ("vm.acow", {"max_connections": 0}, "max_connections 0"),
        ("vm.acow", {"exit_when_idle": float("nan")}, "exit_when_idle nan"),
        ("vm.acow", {"exit_when_idle": -1}, "exit_when_idle -1"),
        ("vm.acow", {"exit_when_idle": "3"}, "exit_when_idle '3'"),
        ("vm.acow", {"exit_when_idle": True}, "exit_when_idle True"),
        ("vm.acow", {"exit_when_idle": 10**400}, "exit_when_idle 10"),
        ("vm.acow", {"max_connections": "5"}, "max_connections '5'"),
        ("vm.acow", {"max_connections": True}, "max_connections True"),
        ("vm.acow", {"max_connections": 1.5}, "max_connections 1.5"),
        ("vm.acow", {"socket": 3}, "socket 3: must be the name of a file"),
        ("vm.acow", {"socket": "a\0b"}, r"socket 'a\\x00b'"),
        ("vm.acow", {"control": ["c"]}, r"control \['c'\]"),
        ("vm.acow", {"control": "./s"}, "socket and control are both ./s"),
        ("vm.acow", {"bind": 10809}, "bind 10809"),
        ("vm.acow", {"bind": ("localhost", "10809")}, r"bind \('localhost', '10809'\)"),
        ("vm.acow", {"bind": ("localhost",)}, "bind"),
        ("vm.acow", {"bind": "localhost:" + "9" * 5000}, "bind 'localhost:999"),
        ("vm.acow", {"sockets": 5}, "sockets 5"),
        ("vm.acow", {"sockets": [5]}, "sockets: 5"),
        ("vm.acow", {"tls": 3}, "tls 3"),
        (3, {}, "disks 3"),
        (None, {}, "disks None"),
        ({"vm.acow"}, {}, "disks {'vm.acow'}"),
        ([3], {}, "disks: 3"),
        (["vm.acow", None], {}, "disks: None"),
        (["vm.acow", "a\0b"], {}, "disks: 'a"),
        ({"a": 3}, {}, "disks: 3"),
        ({3: "vm.acow"}, {}, "export name 3"),
    ],
)
def test_wrong_arguments(disks, options, text):
    async def main():
        with pytest.raises(mmcow.UsageError, match=text):
            mmcow.serve(disks, **{"socket": "s"} | options)

    run(main)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda server: server.stream(rate="5M"), "rate '5M': must be a number of bytes a second"),
        (lambda server: server.stream(rate=True), "rate True"),
        (lambda server: server.stream(rate=1.5), "rate 1.5"),
        (lambda server: server.stream(rate=None), "rate None"),
        (lambda server: server.stream(rate=-1), "rate -1"),
        (lambda server: server.stream(3), "export 3: must be a name"),
        (lambda server: server.status([]), r"export \[\]: must be a name"),
        (lambda server: server.flush({}), "export {}: must be a name"),
        (lambda server: server.snapshot(as_=3), "as_ 3: must be the name of a file"),
        (lambda server: server.snapshot("a\0b"), "as_ 'a"),
        (lambda server: server.snapshot("s", data_file=3), "data_file 3"),
        (lambda server: server.snapshot("s", export=b""), "export b''"),
        (lambda server: server.resize("10G"), "size '10G': must be a number of bytes"),
        (lambda server: server.resize(True), "size True"),
        (lambda server: server.resize(-1), "size -1"),
    ],
)
def test_wrong_arguments_of_what_is_done_to_a_disk(disk, sock, call, text):
    """Nothing is begun."""

    async def main():
        async with mmcow.serve(disk, socket=sock) as server:
            before = sorted(os.listdir(disk.parent))
            with pytest.raises(mmcow.UsageError, match=text):
                await call(server)
            assert server.status()["exports"][0]["stream"] is None
            assert server.status()["exports"][0]["size"] == SIZE
            assert sorted(os.listdir(disk.parent)) == before

    run(main)


@pytest.mark.parametrize("rate", ["5M", -1, True, 2.0])
def test_wrong_rates_of_a_stream_that_runs(disk, sock, rate):
    async def main():
        async with mmcow.serve(disk, socket=sock) as server:
            job = server.stream(rate=1)
            job.pause()
            for change in (job.set_rate, job.resume):
                with pytest.raises(mmcow.UsageError, match=f"rate {rate!r}: must be"):
                    change(rate)
            assert (job.state, job.rate) == ("paused", 1)
            job.set_rate(7)
            assert (job.state, job.rate) == ("paused", 7)

    run(main)


@pytest.mark.parametrize("given", ["path", "image", "aio"])
@pytest.mark.parametrize("broken", ["socket", "control", "sockets", "bind", "second disk"])
def test_a_start_that_fails_leaves_nothing_open(disk, sock, tmp_path, given, broken):
    async def main():
        opened = {
            "path": lambda: str(disk),
            "image": lambda: mmcow.open(disk, write=True),
        }
        first = await mmcow.aio.open(disk, write=True) if given == "aio" else opened[given]()
        disks, options = {"a": first}, {"socket": sock}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
            if broken == "second disk":
                disks["b"] = tmp_path / "nosuch"
            elif broken == "bind":
                options["bind"] = ("localhost", 70000)
            elif broken == "sockets":
                options["sockets"] = [datagrams]
            else:
                options[broken] = tmp_path / "nosuch" / "s"
            server = mmcow.serve(disks, **options)
            with pytest.raises((mmcow.StorageError, mmcow.UsageError)):
                await server.start()
            await server.close()
        mmcow.open(disk, write=True).close()  # the locks are gone

    run(main)
    assert not os.path.exists(sock)


def test_methods_before_and_after(disk, sock):
    async def main():
        server = mmcow.serve(disk, socket=sock)
        with pytest.raises(mmcow.UsageError, match="async with"):
            server.uri  # noqa: B018
        with pytest.raises(mmcow.UsageError, match="async with"):
            await server.snapshot("s")
        async with server:
            with pytest.raises(mmcow.UsageError, match="already"):
                await server.start()
            with pytest.raises(mmcow.UsageError, match="event loop that serves"):
                await asyncio.to_thread(server.status)
        await server.close()
        with pytest.raises(mmcow.ClosedError):
            server.status()
        with pytest.raises(mmcow.UsageError, match="already"):
            await server.start()

    run(main)


def test_an_image_of_another_loop_is_refused_and_left_alone(disk, sock):
    async def main():
        image = await asyncio.to_thread(asyncio.run, mmcow.aio.open(disk))
        with pytest.raises(mmcow.UsageError, match="another event loop"):
            await mmcow.serve(image, socket=sock).start()
        image.image.close()

    asyncio.run(main())


def test_an_error_inside_the_block_is_the_one_to_see(disk, sock):
    async def main():
        with pytest.raises(ZeroDivisionError):
            async with mmcow.serve(disk, socket=sock):
                raise ZeroDivisionError

    run(main)
    assert not os.path.exists(sock)


def test_a_second_server_is_refused(disk, sock, tmp_path):
    async def main():
        async with mmcow.serve(disk, socket=sock):
            with pytest.raises(mmcow.LockedError) as caught:
                await mmcow.serve(disk, socket=tmp_path / "other").start()
            assert f"pid {os.getpid()}" in str(caught.value)

    run(main)


# ---- the ways in and the end ----


def test_control_socket_and_quit(disk, sock, tmp_path):
    async def main():
        path = tmp_path / "ctl"
        before = os.umask(0)
        os.umask(before)
        async with mmcow.serve(disk, socket=sock, control=path) as server:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert os.umask(before) == before
            reader, writer = await asyncio.open_unix_connection(path)
            await reader.readline()
            writer.write(b'{"execute": "quit"}\n')
            assert await reader.readline() == b'{"return": {}}\n'
            await asyncio.wait_for(server.wait_quit(), 10)
            assert await use(sock, (0, 1))  # it is up to the program
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        assert not path.exists()

    run(main)


def test_wait_quit_when_idle(disk, sock):
    async def main():
        async with mmcow.serve(disk, socket=sock, exit_when_idle=0.2) as server:
            client = await asyncio.to_thread(connect, sock)
            await asyncio.sleep(0.4)
            waiting = asyncio.create_task(server.wait_quit())
            await asyncio.sleep(0)
            assert not waiting.done()
            client.close()
            await asyncio.wait_for(waiting, 10)

    run(main)


def last_line(caplog):
    lines = [record.message for record in caplog.records if record.name == "mmcow.nbd"]
    assert sum("ended" in line for line in lines) == 1
    return re.sub(r"in \d+ s$", "in N s", lines[-1])


@pytest.mark.parametrize("how", ["block", "error", "reasons", "command", "idle"])
def test_the_log_says_why_it_ended(disk, sock, tmp_path, caplog, how):
    caplog.set_level(logging.INFO, "mmcow.nbd")

    async def main():
        options = {"exit_when_idle": 0.05} if how == "idle" else {"control": tmp_path / "c"}
        with suppress(ZeroDivisionError):
            async with mmcow.serve(disk, socket=sock, **options) as server:
                if how == "command":
                    _, writer = await asyncio.open_unix_connection(tmp_path / "c")
                    writer.write(b'{"execute": "quit"}\n')
                if how in ("command", "idle"):
                    await asyncio.wait_for(server.wait_quit(), 10)
                if how == "command":
                    writer.close()
                    await writer.wait_closed()
                await use(sock, (0, b"x"))
                if how == "block":
                    await use(sock, (0, b"x"))
                if how == "reasons":
                    server.quit("SIGTERM")
                    server.quit("SIGINT")
                if how == "error":
                    raise ZeroDivisionError
        await server.close()

    run(main)
    why, count = {
        "block": ("closed by its program", "2 clients"),
        "error": ("after ZeroDivisionError", "1 client"),
        "reasons": ("SIGTERM", "1 client"),
        "command": ("quit command", "1 client"),
        "idle": ("idle for 0.05 s", "1 client"),
    }[how]
    assert last_line(caplog) == f"server ended ({why}), all is flushed: {count} in N s"


def test_the_log_of_an_end_that_fails_says_so(disk, sock, caplog):
    async def fail():
        raise mmcow.StorageError(errno.EIO, "write", "vm.acow")

    async def main():
        server = mmcow.serve(disk, socket=sock)
        await server.start()
        await use(sock, (0, b"x"))
        server.quit("SIGTERM")
        server._server.exports[""].image.engine.flusher.flush = fail
        with pytest.raises(mmcow.StorageError):
            await server.close()

    run(main)
    assert last_line(caplog) == "server ended (SIGTERM), with an error: 1 client in N s"


def test_too_many_clients(disk, sock):
    async def main():
        async with mmcow.serve(disk, socket=sock, max_connections=1):
            client = await asyncio.to_thread(connect, sock)

            def refused():
                with Client(sock, greet=False) as more:
                    return more.at_end()

            assert await asyncio.to_thread(refused)
            client.close()

    run(main)


def test_relative_names_and_a_program_that_changes_its_directory(disk, tmp_path, monkeypatch):
    """Everything is found and removed where it was when the serving began."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    async def main():
        async with mmcow.serve("vm.acow", socket="s", control="c") as server:
            monkeypatch.chdir(tmp_path / "elsewhere")
            await use(str(tmp_path / "s"), (0, b"old"))
            assert await server.snapshot("frozen") == "frozen"
            await use(str(tmp_path / "s"), (0, b"new"))
            await server.snapshot("again")

    run(main)
    assert os.listdir(tmp_path / "elsewhere") == []
    assert not {"s", "c"} & set(os.listdir(tmp_path))
    for name, content in (("frozen", b"old"), ("again", b"new"), ("vm.acow", b"new")):
        with mmcow.open(tmp_path / name) as image:
            assert image.read(0, 3) == content


# ---- stream ----


def test_stream_pauses_goes_on_and_is_cancelled(disk, sock):
    async def main():
        async with mmcow.serve(disk, socket=sock) as server:
            job = server.stream(rate=MIB)
            with pytest.raises(mmcow.UsageError, match="a stream is running"):
                server.stream()
            job.pause()
            await asyncio.sleep(0.1)
            there = job.done
            await asyncio.sleep(0.1)
            assert job.done == there
            assert job.state == "paused"
            job.resume()
            job.cancel()
            with pytest.raises(mmcow.Cancelled):
                await job
            assert job.state == "cancelled"
            whole = server.stream()
            await whole
            assert server.stream() is whole
            await server.stream()
            with pytest.raises(mmcow.UsageError, match="rate -1"):
                server.stream(rate=-1)

    run(main)


def test_a_resting_stream_listens(disk, sock):
    """At 1 byte a second a piece rests for days: another rate counts at once."""

    async def main():
        async with mmcow.serve(disk, socket=sock) as server:
            job = server.stream(rate=1)
            await until(lambda: job.moved)
            moved = job.moved
            job.pause()
            job.resume()
            await asyncio.sleep(0.1)
            assert job.moved == moved  # which no asking may hurry
            job.resume(rate=0)
            await asyncio.wait_for(job.wait(), 20)
        assert job.state == "completed"

    run(main)


def test_cancelling_a_resting_stream(disk, sock):
    async def main():
        async with mmcow.serve(disk, socket=sock) as server:
            job = server.stream(rate=1)
            await until(lambda: job.moved)
            job.cancel()
            with pytest.raises(mmcow.Cancelled):
                await asyncio.wait_for(job.wait(), 5)

    run(main)


def test_the_end_of_the_server_is_the_end_of_a_stream(disk, sock):
    async def main():
        async with mmcow.serve(disk, socket=sock) as server:
            running, fresh = server.stream(rate=1), None
            await asyncio.sleep(0.05)
            running.cancel()
            with pytest.raises(mmcow.Cancelled):
                await running
            fresh = server.stream(rate=1)  # its task has not begun when the server ends
        with pytest.raises(mmcow.Cancelled):
            await asyncio.wait_for(fresh.wait(), 5)

    run(main)


@pytest.mark.parametrize("error", [mmcow.FormatError("base", "x", 1, "bad"), RuntimeError("bug")])
def test_a_stream_that_fails_tells_it(disk, sock, monkeypatch, error):
    async def main():
        async with mmcow.serve(disk, socket=sock) as server:

            def broken(_image):
                raise error

            monkeypatch.setattr(live, "missing", broken)
            job = server.stream()
            with pytest.raises(mmcow.MmcowError, match=r"bad|bug"):
                await job
            assert (job.state, job.active) == ("failed", False)
            assert str(error) in server.status()["exports"][0]["stream"]["error"]
            monkeypatch.undo()
            await server.stream()

    run(main)


def test_guests_come_first(disk, sock, tmp_path):
    """While a guest is active the stream rests at least as long as each piece took."""

    async def main():
        async with mmcow.serve(disk, socket=sock) as server:
            export = server._server.exports[""]
            rests = []
            rest = live.Stream._rest

            async def watched(self, moved, began, guests):
                rests.append(guests)
                await rest(self, moved, began, guests)

            live.Stream._rest = watched
            try:
                job = server.stream(rate=2 * MIB)
                while job.active:
                    export.counters.count("read", 0, 0.0)  # a request is finished all the time
                    await asyncio.sleep(0.0005)
                await job
            finally:
                live.Stream._rest = rest
            assert len(rests) == 3
            assert max(rests) > 0

    run(main)


# ---- throughput ----


def test_throughput_is_of_the_time_since_the_last_look(disk, sock):
    async def main():
        async with mmcow.serve(disk, socket=sock) as server:
            assert server.activity()["exports"][0]["throughput"]["operations"] == {}
            await asyncio.sleep(0.5)
            await use(sock, (0, b"x" * MIB), (0, MIB), (0, MIB))
            rates = server.status()["exports"][0]["throughput"]
            assert 0.5 <= rates["seconds"] < 30
            seconds = rates["seconds"]
            assert rates["bytes"]["read"] == pytest.approx(2 * MIB / seconds, rel=0.02)
            assert rates["bytes"]["write"] == pytest.approx(MIB / seconds, rel=0.02)
            assert rates["operations"]["read"] == pytest.approx(2 / seconds, abs=0.1)
            await asyncio.sleep(0.5)
            rates = server.status()["exports"][0]["throughput"]
            assert rates["operations"] == {}  # nothing since then
            assert 0.4 <= rates["seconds"] < 0.5 + 5

    run(main)


def test_two_snapshots_at_once(disk, sock):
    """One of them is refused, or both are in the chain: never a layer over the wrong base."""

    async def main():
        async with mmcow.serve(disk, socket=sock) as server:
            engine = server._server.exports[""].image.engine
            flush, held = engine.flusher.flush, []

            async def slow():
                held.append(Completion())
                await held[-1]
                await flush()

            engine.flusher.flush = slow
            both = [asyncio.create_task(server.snapshot(name)) for name in ("a", "b")]
            await until(lambda: held)
            engine.flusher.flush = flush
            held[0].set(None)
            engine.reactor.poll()
            results = await asyncio.gather(*both, return_exceptions=True)
            assert isinstance(results[0], str)
            assert isinstance(results[1], mmcow.UsageError)
            assert "another snapshot" in str(results[1])
            before = time.monotonic()
            await server.snapshot("b")
            assert time.monotonic() - before < 30

    run(main)
    assert sorted(os.listdir(disk.parent)) == [
        "a", "b", "base.raw", "vm.acow", "vm.acow.1.raw", "vm.acow.2.raw", "vm.acow.raw",
    ]  # fmt: skip
