# SPDX-License-Identifier: MIT
"""What changes under a served disk: stream, snapshot, resize, and the control socket."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import socket
import threading
import time
from contextlib import ExitStack

import pytest

import mmcow
from mmcow.jobs.detach import detach
from mmcow.nbd import live
from mmcow.nbd.control import CLIENTS_MOST, LINE_MOST, Control
from mmcow.nbd.live import Stream
from tests.unit.nbd_client import Client
from tests.unit.nbd_serving import open_descriptors, serving

MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture
def disk(tmp_path, rng):
    (tmp_path / "base.raw").write_bytes(rng.randbytes(SIZE - 1000))
    path = tmp_path / "vm.acow"
    mmcow.create(path, size=SIZE, backing="base.raw", backing_format="raw")
    return path


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Controlled:
    """A served disk with a control socket and one client."""

    def __init__(self, served, path):
        self.served = served
        self.quits = []
        self.closed = False
        self.control = served.run(lambda: Control(served.server, lambda: self.quits.append(1)))
        served.run(lambda: self.control.listen(path))
        self.path = path
        self.connect()

    def connect(self):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(30)
        self.socket.connect(self.path)
        self.lines = self.socket.makefile("rb")
        self.greeting = json.loads(self.lines.readline())

    def say(self, text):
        self.socket.sendall(text)
        return json.loads(self.lines.readline())

    def execute(self, command, **arguments):
        message = {"execute": command, "arguments": arguments, "id": 7}
        answer = self.say(json.dumps(message).encode() + b"\n")
        assert answer.pop("id") == 7
        if "error" in answer:
            raise RuntimeError(answer["error"]["desc"])
        return answer["return"]

    def export(self):
        return self.execute("status")["exports"][0]

    def wait_for_stream(self, *states):
        deadline = time.monotonic() + 30
        while (stream := self.export()["stream"])["state"] not in states:
            assert time.monotonic() < deadline, stream
            time.sleep(0.01)
        return stream

    def wait_for_moved(self):
        deadline = time.monotonic() + 30
        while not self.export()["stream"]["moved"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def close(self):
        if not self.closed:
            self.closed = True
            self.lines.close()
            self.socket.close()
            self.served.run(self.control.close)


@pytest.fixture
def controlled(disk, tmp_path):
    with serving(disk, tmp_path / "nbd.sock") as served:
        control = Controlled(served, str(tmp_path / "ctl.sock"))
        yield control
        control.close()


def client_of(controlled):
    client = Client(controlled.served.path)
    client.negotiate_structured()
    client.go()
    return client


# ---- stream ----


def test_stream_completes_while_a_client_writes(controlled, disk, tmp_path):
    base, before = tmp_path / "base.raw", digest(tmp_path / "base.raw")
    model = bytearray(base.read_bytes().ljust(SIZE, b"\0"))
    with client_of(controlled) as client:
        controlled.execute("stream", rate=8 * MIB)
        for number in range(64):
            offset = (number * 977) % 8000 * 512
            client.write(offset, bytes([number]) * 512)
            model[offset : offset + 512] = bytes([number]) * 512
        assert controlled.wait_for_stream("completed", "failed")["state"] == "completed"
        assert client.read(0, SIZE) == model
        client.write(5, b"alone")
        model[5:10] = b"alone"
        client.disconnect()
    assert controlled.export()["chain"] == [f"{disk} (add-cow)"]
    assert digest(base) == before
    os.unlink(base)
    controlled.close()
    controlled.served.stop()
    raw = detach(disk)
    with open(raw, "rb") as file:
        assert file.read() == model


def test_stream_lets_go_of_the_base(controlled, tmp_path):
    with pytest.raises(mmcow.LockedError):
        mmcow.open(tmp_path / "base.raw", format="raw", write=True)
    controlled.execute("stream")
    controlled.wait_for_stream("completed")
    mmcow.open(tmp_path / "base.raw", format="raw", write=True).close()


@pytest.mark.parametrize(
    ("command", "arguments", "text"),
    [
        ("stream", {"rte": MIB}, "stream: unknown argument 'rte'; known: action, export, rate"),
        ("resize", {"size": 64 * MIB, "force": True}, "resize: unknown argument 'force'"),
        ("quit", {"export": ""}, "quit: unknown argument 'export'; known: none"),
    ],
)
def test_unknown_argument_is_refused_and_nothing_begins(controlled, command, arguments, text):
    before = controlled.export()
    with pytest.raises(RuntimeError, match=re.escape(text)):
        controlled.execute(command, **arguments)
    after = controlled.export()
    assert (after["stream"], after["size"]) == (before["stream"], before["size"])
    assert controlled.quits == []


def test_bytes_that_are_no_utf8_are_no_json(controlled):
    answer = controlled.say(b"\xff\xfe{\x00}\x00\n")
    assert "not JSON: 'utf-8' codec can't decode" in answer["error"]["desc"]


def test_stream_pauses_resumes_and_is_cancelled(controlled):
    controlled.execute("stream", rate=MIB)
    assert controlled.execute("stream", action="pause")["state"] == "paused"
    time.sleep(0.05)
    there = controlled.export()["stream"]["done"]
    time.sleep(0.1)
    assert controlled.export()["stream"]["done"] <= there + MIB  # the piece in hand
    with pytest.raises(RuntimeError, match="a stream is paused"):
        controlled.execute("stream")
    assert controlled.execute("stream", action="resume")["state"] == "running"
    controlled.execute("stream", action="cancel")
    controlled.wait_for_stream("cancelled")
    assert len(controlled.export()["chain"]) == 2
    controlled.execute("stream")
    stream = controlled.wait_for_stream("completed")
    assert controlled.execute("stream") == stream  # who comes later finds it done
    with pytest.raises(RuntimeError, match="no stream is running"):
        controlled.execute("stream", action="pause")
    controlled.execute("snapshot", name="s")
    assert controlled.execute("stream")["state"] == "running"  # of the new layer
    assert controlled.wait_for_stream("completed")["done"] == SIZE


def test_start_with_a_rate_changes_that_of_the_stream_that_runs(controlled):
    controlled.execute("stream", rate=1)  # one piece, then twelve days of rest
    controlled.wait_for_moved()
    with pytest.raises(RuntimeError, match="a stream is running already; given a rate"):
        controlled.execute("stream")
    assert controlled.export()["stream"]["rate"] == 1
    assert controlled.execute("stream", action="pause")["state"] == "paused"
    changed = controlled.execute("stream", action="start", rate=2)
    assert (changed["state"], changed["rate"]) == ("paused", 2)
    controlled.execute("stream", action="resume")
    assert controlled.execute("stream", rate=0)["rate"] == 0
    controlled.wait_for_stream("completed")
    assert controlled.execute("stream", rate=1)["state"] == "completed"


def test_stream_of_a_disk_that_never_had_a_base(tmp_path):
    path = tmp_path / "alone.acow"
    mmcow.create(path, size=SIZE)
    with serving(path, tmp_path / "nbd.sock") as served:
        control = Controlled(served, str(tmp_path / "ctl.sock"))
        with pytest.raises(RuntimeError, match="has no base"):
            control.execute("stream")
        assert control.export()["stream"] is None
        control.close()


def set_bits(disk):
    """Clusters that a server killed now would leave behind."""
    return int.from_bytes(disk.read_bytes()[4096:], "big").bit_count()


@pytest.mark.parametrize("how", ["bytes", "seconds", "pause", "cancel"])
def test_stream_makes_its_progress_durable_as_it_goes(controlled, disk, monkeypatch, how):
    if how == "bytes":
        monkeypatch.setattr(live, "FLUSH_EVERY", MIB)
    if how == "seconds":
        monkeypatch.setattr(live, "FLUSH_SECONDS", 0.2)
    controlled.execute("stream", rate=1)  # one piece, then twelve days of rest
    controlled.wait_for_moved()
    if how == "pause":
        assert set_bits(disk) == 0
        controlled.execute("stream", action="pause")
        controlled.execute("stream", rate=0)
    elif how == "cancel":
        assert set_bits(disk) == 0
        controlled.execute("stream", action="cancel")
    deadline = time.monotonic() + 20
    while set_bits(disk) < MIB // 4096:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert controlled.export()["stream"]["moved"] == MIB
    controlled.execute("stream", action="start" if how == "cancel" else "cancel")


def test_stream_tells_of_a_flush_that_failed(controlled, monkeypatch, caplog):
    async def fail():
        raise mmcow.StorageError(errno.EIO, "write", "vm.acow")

    monkeypatch.setattr(live, "FLUSH_EVERY", MIB)
    engine = controlled.served.engine()
    with monkeypatch.context() as patch:
        patch.setattr(engine.flusher, "flush", fail)
        controlled.execute("stream")
        stream = controlled.wait_for_stream("completed", "failed")
    assert (stream["state"], stream["moved"]) == ("failed", MIB)
    assert "vm.acow: write: Input/output error" in stream["error"]
    assert "stream failed: " in caplog.text
    controlled.execute("stream")  # it goes on where storage does
    assert controlled.wait_for_stream("completed", "failed")["state"] == "completed"


@pytest.mark.parametrize("action", ["resume", "cancel"])
def test_stream_after_a_snapshot_has_done_nothing_of_the_new_layer(controlled, action):
    controlled.execute("stream", rate=1)
    controlled.wait_for_moved()
    assert controlled.execute("stream", action="pause")["done"] == MIB
    controlled.execute("snapshot", name="s")
    assert controlled.export()["stream"]["done"] == 0
    assert controlled.execute("stream", action=action)["done"] == 0
    if action == "cancel":
        assert controlled.wait_for_stream("cancelled")["done"] == 0
    else:
        controlled.execute("stream", rate=0)
        assert controlled.wait_for_stream("completed")["done"] == SIZE


def test_stream_that_rests_for_long_hears_commands(controlled):
    controlled.execute("stream", rate=1)  # one piece, then twelve days of rest
    controlled.wait_for_moved()
    controlled.execute("stream", action="cancel")
    controlled.wait_for_stream("cancelled")
    controlled.execute("stream", rate=1)
    controlled.wait_for_moved()
    controlled.execute("stream", action="resume", rate=1 << 40)
    controlled.wait_for_stream("completed")


def test_stream_of_a_disk_that_grows(controlled, disk):
    """Before the last piece, and behind it: what is new has to be in the top layer too."""
    for size in (2 * SIZE, 3 * SIZE):
        controlled.execute("stream", rate=1)
        controlled.wait_for_moved()
        controlled.execute("resize", size=size)
        controlled.execute("stream", action="cancel")
        controlled.wait_for_stream("cancelled")
    controlled.execute("stream", rate=1)
    controlled.wait_for_moved()
    controlled.execute("resize", size=4 * SIZE)
    controlled.execute("stream", action="resume", rate=1 << 40)
    stream = controlled.wait_for_stream("completed", "failed")
    assert (stream["state"], stream["error"], stream["total"]) == ("completed", None, 4 * SIZE)
    assert controlled.export()["chain"] == [f"{disk} (add-cow)"]


@pytest.mark.parametrize("what", ["snapshot", "resize"])
def test_stream_that_is_overtaken_just_before_its_end(controlled, disk, monkeypatch, what):
    """The change takes its turn when all is copied and the base is not let go of yet."""
    pull, overtaken = Stream._pull, []

    async def then_overtaken(self, top):
        done = await pull(self, top)
        if done and not overtaken:
            words = {"snapshot": {"name": "late"}, "resize": {"size": 2 * SIZE}}[what]
            line = json.dumps({"execute": what, "arguments": words}).encode()
            overtaken.append(await controlled.control.execute(line))
        return done

    monkeypatch.setattr(Stream, "_pull", then_overtaken)
    controlled.execute("stream")
    stream = controlled.wait_for_stream("completed", "failed")
    assert (stream["state"], stream["error"]) == ("completed", None)
    assert "return" in overtaken[0]
    assert controlled.export()["chain"] == [f"{disk} (add-cow)"]


def test_stream_keeps_its_rate(controlled):
    began = time.monotonic()
    controlled.execute("stream", rate=8 * MIB)
    controlled.wait_for_stream("completed")
    # The last piece needs no rest behind it.
    assert time.monotonic() - began >= (SIZE - MIB) / (8 * MIB) * 0.8


def test_server_ends_in_the_middle_of_a_stream(disk, tmp_path):
    content = (tmp_path / "base.raw").read_bytes().ljust(SIZE, b"\0")
    with serving(disk, tmp_path / "nbd.sock") as served:
        control = Controlled(served, str(tmp_path / "ctl.sock"))
        control.execute("stream", rate=MIB)
        control.close()
    with mmcow.open(disk) as image:
        assert len(image.chain) == 2
        assert image.read(0, SIZE) == content


# ---- snapshot ----


def test_snapshot_under_a_writing_client_freezes_one_moment(controlled, disk, tmp_path):
    stop, seen = threading.Event(), []

    def write():
        with client_of(controlled) as client:
            number = 0
            while not stop.is_set():
                number += 1
                client.write(0, number.to_bytes(4, "big") * 256)
            seen.append(number)
            client.disconnect()

    writer = threading.Thread(target=write)
    writer.start()
    frozen = []
    for number in range(4):
        time.sleep(0.05)
        answer = controlled.execute("snapshot", name=f"s{number}")
        assert answer == {"frozen": str(tmp_path / f"s{number}"), "top": str(disk)}
        frozen.append(answer["frozen"])
    stop.set()
    writer.join()
    last = 0
    for path in frozen:
        with mmcow.open(path) as image:
            block = image.read(0, 1024)
        assert block == block[:4] * 256, "a request was torn by the snapshot"
        assert last <= int.from_bytes(block[:4], "big") <= seen[0]
        last = int.from_bytes(block[:4], "big")
    with client_of(controlled) as client:
        assert int.from_bytes(client.read(0, 4), "big") == seen[0]


def test_snapshot_in_the_middle_of_a_stream(controlled, disk, tmp_path):
    model = bytearray((tmp_path / "base.raw").read_bytes().ljust(SIZE, b"\0"))
    with client_of(controlled) as client:
        client.write(100, b"before")
        model[100:106] = b"before"
        controlled.execute("stream", rate=4 * MIB)
        time.sleep(0.3)
        controlled.execute("snapshot", name="middle")
        client.write(100, b"after!")
        assert controlled.wait_for_stream("completed", "failed")["state"] == "completed"
        model[100:106] = b"after!"
        assert client.read(0, SIZE) == model
        client.disconnect()
    assert controlled.export()["chain"] == [f"{disk} (add-cow)"]
    with mmcow.open(tmp_path / "middle") as image:
        assert image.read(100, 6) == b"before"


def test_snapshot_that_is_refused_changes_nothing(controlled, tmp_path):
    (tmp_path / "taken").write_bytes(b"")
    files = sorted(os.listdir(tmp_path))
    for name in ("taken", "a/b", "", 5, None):
        with pytest.raises(RuntimeError):
            controlled.execute("snapshot", name=name)
    assert sorted(os.listdir(tmp_path)) == files


# ---- resize ----


def test_resize_is_seen_by_the_next_client(controlled):
    with client_of(controlled) as old:
        assert controlled.execute("resize", size=2 * SIZE)["size"] == 2 * SIZE
        with client_of(controlled) as new:
            assert (old.size, new.size) == (SIZE, 2 * SIZE)
            new.write(2 * SIZE - 512, b"e" * 512)
            assert new.read(SIZE, 4096) == bytes(4096)
            new.disconnect()
        old.disconnect()
    with pytest.raises(RuntimeError, match="can only grow"):
        controlled.execute("resize", size=SIZE)


# ---- the socket ----


def test_control_greets_and_speaks_qmp(controlled):
    assert controlled.greeting == {"mmcow": {"version": mmcow.__version__, "exports": [""]}}
    assert controlled.execute("qmp_capabilities") == {}
    assert controlled.execute("flush") == {}
    controlled.execute("quit")
    deadline = time.monotonic() + 10
    while not controlled.quits:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "line",
    [b"nonsense", b"[]", b"5", b'{"execute": 5}', b'{"execute": "nosuch"}', b"\xff\xfe",
     b'{"execute": "stream", "arguments": []}', b'{"execute": "resize", "arguments": {"size": -1}}',
     b'{"execute": "resize", "arguments": {"size": 1e99}}', b'{"execute": "resize"}',
     b'{"execute": "resize", "arguments": {"size": true}}',
     b'{"execute": "flush", "arguments": {"export": "nosuch"}}',
     b'{"execute": "flush", "arguments": {"export": ["x"]}}',
     b'{"execute": "stream", "arguments": {"action": "fly"}}',
     b'{"execute": "stream", "arguments": {"action": {}}}', b"[" * 5000,
     b'{"execute": "snapshot", "arguments": {"name": "a\\u0000b"}}',
     b'{"execute": "snapshot", "arguments": {"name": "\\ud800"}}',
     b'{"execute": "snapshot", "arguments": {"name": "a", "data_file": "\\ud800"}}',
     b'{"execute": "snapshot", "arguments": {"name": "a", "data_file": "\\u0000"}}',
     b'{"execute": "snapshot", "arguments": {"name": "a", "data_file": 5}}',
     b'{"execute": "resize", "arguments": {"size": ' + b"9" * 5000 + b"}}"],
)  # fmt: skip
def test_control_answers_nonsense_with_an_error(controlled, line):
    answer = controlled.say(line + b"\n")
    assert set(answer["error"]) == {"class", "desc"}
    assert controlled.export()["stream"] is None


def test_control_drops_who_sends_an_endless_line(controlled):
    controlled.socket.sendall(b"x" * (LINE_MOST + 10) + b"\n")
    assert "too long" in json.loads(controlled.lines.readline())["error"]["desc"]
    assert controlled.lines.read() == b""
    controlled.lines.close()
    controlled.socket.close()
    controlled.connect()
    assert controlled.execute("flush") == {}


def test_control_socket_is_its_owners_alone(controlled):
    assert os.stat(controlled.path).st_mode & 0o077 == 0


def test_control_clients_without_end_keep_nobody_out(controlled):
    """The silent ones give way, in the order of their silence; who speaks stays."""
    before = open_descriptors()
    with ExitStack() as stack:
        for _ in range(CLIENTS_MOST + 40):
            silent = stack.enter_context(socket.socket(socket.AF_UNIX))
            silent.settimeout(30)
            silent.connect(controlled.path)
            assert silent.recv(1000).startswith(b'{"mmcow"')
            assert controlled.execute("flush") == {}
        # Two descriptors each: both ends are in this process.
        assert open_descriptors() - before <= CLIENTS_MOST + 40 + CLIENTS_MOST
        assert controlled.execute("status")["connections"] == 0


def test_control_removes_nobody_elses_socket(controlled):
    os.unlink(controlled.path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(controlled.path)
        controlled.close()
        assert os.path.exists(controlled.path)


def test_status_counts(controlled):
    with client_of(controlled) as client:
        client.write(0, bytes(4096))
        client.read(0, 512)
        client.flush()
        export = controlled.export()
        assert export["connections"] == 1
        client.disconnect()
    assert export["operations"]["write"] == 1
    assert export["bytes"]["write"] == 4096
    assert sum(export["latency-log2-us"]) == sum(export["operations"].values())
    assert (export["allocated-clusters"], export["total-clusters"]) == (1, SIZE // 4096)
