# SPDX-License-Identifier: MIT
"""``mmcow serve`` and ``mmcow ctl`` as processes: signals, readiness, the ways in, the end."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import mmcow
from tests.interop.tools import requires
from tests.unit.nbd_client import Client

pytestmark = pytest.mark.interop

MIB = 1 << 20
MMCOW = [sys.executable, "-m", "mmcow"]


@pytest.fixture
def disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.raw").write_bytes(b"base" * (MIB // 4))
    mmcow.create("vm.acow", backing="base.raw", backing_format="raw")
    return "vm.acow"


class Server:
    """A running ``mmcow serve``."""

    def __init__(self, *arguments, wait=True, **options):
        self.process = subprocess.Popen(
            [*MMCOW, "serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        self.ready = self.process.stdout.readline().strip() if wait else ""

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.end()

    def end(self):
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def ctl(*words, status=0):
    done = subprocess.run(
        [*MMCOW, "ctl", "ctl.sock", *words], capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def attach(path="nbd.sock", export=""):
    client = Client(path)
    client.negotiate_structured()
    client.go(export)
    return client


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_flushes_and_leaves_with_0(disk, number):
    with Server("--socket", "nbd.sock", disk) as server:
        assert server.ready == "nbd+unix:///?socket=nbd.sock"
        with attach() as client:
            client.write(5, b"hello")
            status, _, err = server.stop(number)
            assert status == 0, err
    last = err.splitlines()[-1]
    assert last.startswith(f"mmcow: server ended ({number.name}), all is flushed: 1 client in ")
    assert not os.path.exists("nbd.sock")
    with mmcow.open(disk) as image:
        assert image.read(5, 5) == b"hello"


def test_second_server_is_refused_and_told_who(disk):
    with Server("--socket", "nbd.sock", disk) as server:
        with Server("--socket", "other.sock", disk, wait=False) as second:
            status, _, err = second.end()
        assert status == 1
        assert disk in err
        assert f"pid {server.process.pid}" in err
        assert "Traceback" not in err
        with Server("--socket", "nbd.sock", "base.raw", "-r", wait=False) as third:
            status, _, err = third.end()
        assert status == 1
        assert "another server listens there" in err
        assert server.stop()[0] == 0


def test_killed_server_is_replaced(disk):
    with Server("--socket", "nbd.sock", disk) as server, attach() as client:
        client.write(0, b"flushed")
        client.flush()
        server.process.kill()
        server.process.wait()
    with Server("--socket", "nbd.sock", disk) as server:
        with attach() as client:
            assert client.read(0, 7) == b"flushed"
            client.disconnect()
        assert server.stop()[0] == 0


def test_control_verbs(disk):
    with Server("--socket", "nbd.sock", "--control", "ctl.sock", disk) as server:
        assert "vm.acow" in ctl("status")
        wrong = subprocess.run(
            [*MMCOW, "ctl", "nbd.sock", "status"], capture_output=True, text=True, check=False,
            timeout=20,  # far less than what the server gives a client that says nothing
        )  # fmt: skip
        assert wrong.returncode == 1 and "name the socket of --control" in wrong.stderr
        with attach() as client:
            client.write(0, b"x" * 4096)
            client.disconnect()
        assert "frozen: monday" in ctl("snapshot", "--as", "monday")
        assert "completed: 100.0 %" in ctl("stream", "--rate", "100M", "--wait")
        assert json.loads(ctl("status", "--output=json"))["exports"][0]["chain"] == [
            "vm.acow (add-cow)"
        ]
        assert "2 MiB" in ctl("resize", "+1M")
        ctl("flush")
        assert "completed: 100.0 %" in ctl("stream")
        assert "completed: 100.0 %" in ctl("stream", "--wait")
        assert "must be" in ctl("stream", "fly", status=1)
        assert "--as" in ctl("snapshot", status=1)
        assert "--rate goes with stream" in ctl("flush", "--rate", "5", status=1)
        assert "--wait goes with stream" in ctl("snapshot", "--as", "n", "--wait", status=1)
        top = subprocess.Popen(
            [*MMCOW, "ctl", "ctl.sock", "top"], stdout=subprocess.PIPE, text=True
        )
        assert "vm.acow" in top.stdout.readline()
        top.send_signal(signal.SIGINT)
        top.communicate(timeout=10)
        ctl("quit")
        assert server.end()[0] == 0
    assert "ctl.sock" in ctl("status", status=1)
    long = subprocess.run(
        [*MMCOW, "ctl", "c" * 120, "status"], capture_output=True, text=True, check=False
    )
    assert long.returncode == 1 and "too long" in long.stderr
    assert subprocess.run([*MMCOW, "detach", "vm.acow"], check=False).returncode == 0


def test_command_runs_against_the_export_and_its_status_is_ours(disk):
    script = "import sys, os; assert os.path.exists(sys.argv[1].split('socket=')[1]); sys.exit(7)"
    with Server(disk, "--", sys.executable, "-c", script, "{uri}", wait=False) as server:
        status, _, err = server.end()
    assert status == 7, err
    assert f"server ended ({sys.executable} ended)" in err
    with Server(disk, "--", "/nosuch/command", wait=False) as server:
        status, _, err = server.end()
    assert status == 1
    assert "/nosuch/command" in err


def test_signal_ends_the_command_too(disk):
    with Server(disk, "--", "sleep", "60", wait=False) as server:
        deadline = time.monotonic() + 20
        while not subprocess.run(
            ["pgrep", "-P", str(server.process.pid)], capture_output=True, check=False
        ).stdout:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        status, _, _ = server.stop()
    assert status == 128 + signal.SIGTERM


def test_several_images_have_their_file_names(disk):
    with Server("--socket", "nbd.sock", "-r", disk, "base.raw") as server:
        for name in ("vm.acow", "base.raw"):
            with attach(export=name) as client:
                assert client.read(0, 4) == b"base"
                client.disconnect()
        assert server.stop()[0] == 0


def test_exits_when_idle(disk):
    with Server("--socket", "nbd.sock", "--exit-when-idle", "0.3", disk) as server:
        with attach() as client:
            time.sleep(0.6)
            assert client.read(0, 4) == b"base"
            client.disconnect()
        assert server.end()[0] == 0


def test_tcp_on_a_free_port(disk):
    with Server("--bind", "127.0.0.1:0", disk) as server:
        host, port = server.ready.removeprefix("nbd://").rstrip("/").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            assert connection.recv(8) == b"NBDMAGIC"
        assert server.stop()[0] == 0


def test_socket_activation_and_ready_notification(disk, tmp_path):
    with (
        socket.socket(socket.AF_UNIX) as listening,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify,
    ):
        listening.bind("given.sock")
        listening.listen()
        notify.bind(str(tmp_path / "notify.sock"))
        notify.settimeout(20)
        # What systemd does: the socket is descriptor 3, LISTEN_PID is the program's own.
        script = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); "
            "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); "
            "os.execv(sys.executable, [sys.executable, '-m', 'mmcow', 'serve', 'vm.acow'])"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(listening.fileno())],
            pass_fds=[listening.fileno()],
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify.sock")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            assert b"READY=1" in notify.recv(100)
            with attach("given.sock") as client:
                assert client.read(0, 4) == b"base"
                client.disconnect()
            process.terminate()
            _, err = process.communicate(timeout=30)
            assert process.returncode == 0, err
        finally:
            process.kill()
            process.communicate()


def test_descriptors_that_are_no_listening_sockets_are_told(disk):
    script = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); "
        "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); "
        "os.execv(sys.executable, [sys.executable, '-m', 'mmcow', 'serve', 'vm.acow'])"
    )
    with socket.socket(socket.AF_UNIX) as deaf, open("base.raw", "rb") as file:
        for given, text in ((deaf, "does not listen"), (file, "non-socket")):
            ended = subprocess.run(
                [sys.executable, "-c", script, str(given.fileno())], pass_fds=[given.fileno()],
                capture_output=True, text=True, timeout=30, check=False,
            )  # fmt: skip
            assert ended.returncode == 1, ended.stderr
            assert "LISTEN_FDS" in ended.stderr and "descriptor 3" in ended.stderr
            assert text in ended.stderr


def activated(*arguments, descriptors=(), count=None, **environment):
    """``mmcow serve`` as systemd starts it: its sockets are descriptors from 3 on."""
    script = (
        "import os, sys\n"
        "number = int(sys.argv[1])\n"
        "given = [int(n) for n in sys.argv[2:2 + number]]\n"
        "kept = [os.dup2(n, 100 + at) for at, n in enumerate(given)]\n"
        "for at, n in enumerate(kept): os.dup2(n, 3 + at)\n"
        "os.environ.update(LISTEN_FDS=os.environ['COUNT'], LISTEN_PID=str(os.getpid()))\n"
        "rest = sys.argv[2 + number:]\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'mmcow', 'serve', *rest])"
    )
    words = [str(len(descriptors)), *map(str, descriptors), *arguments]
    return subprocess.Popen(
        [sys.executable, "-c", script, *words],
        pass_fds=descriptors,
        env={**os.environ, "COUNT": str(len(descriptors) if count is None else count)}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_command_is_given_the_uri_of_an_activated_socket(disk, tmp_path):
    script = (
        "import os, sys, socket; "
        "assert not [n for n in os.environ if n.startswith('LISTEN_')]; "
        "path = sys.argv[1].removeprefix('nbd+unix:///?socket='); "
        "s = socket.socket(socket.AF_UNIX); s.connect(path); print(s.recv(8).decode())"
    )
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "given.sock"))
        listening.listen()
        process = activated(
            disk, "--", sys.executable, "-c", script, "{uri}", descriptors=[listening.fileno()]
        )
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out.strip()) == (0, "NBDMAGIC"), err


def test_both_ends_are_told_to_the_service_manager(disk, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(b"\0mmcow-test-" + os.urandom(8).hex().encode())  # abstract, as "@" says
        notify.settimeout(20)
        name = notify.getsockname().decode().replace("\0", "@")
        with Server("--socket", "s", disk, env={**os.environ, "NOTIFY_SOCKET": name}) as server:
            assert b"READY=1" in notify.recv(100)
            assert server.stop()[0] == 0
            assert notify.recv(100) == b"STOPPING=1"


def test_control_of_one_of_several(disk):
    with open("other.raw", "wb") as file:
        file.truncate(MIB)
    with Server("--socket", "nbd.sock", "--control", "ctl.sock", disk, "other.raw") as server:
        assert "say which export" in ctl("flush", status=1)
        ctl("flush", "--export", "other.raw")
        ctl("snapshot", "--export", "vm.acow", "--as", "s1")
        assert "completed" in ctl("stream", "--export", "vm.acow", "--wait")
        assert "2 MiB" in ctl("resize", "--export", "other.raw", "2M")
        assert "no export 'nosuch'" in ctl("status", "--export", "nosuch", status=1)
        assert ctl("status", "--export", "other.raw").startswith("export 'other.raw': other.raw")
        found = json.loads(ctl("status", "--output=json"))["exports"]
        assert [export["name"] for export in found] == ["vm.acow", "other.raw"]
        assert server.stop()[0] == 0


def test_status_tells_the_throughput_of_now(disk):
    with (
        Server("--socket", "nbd.sock", "--control", "ctl.sock", disk) as server,
        attach() as client,
    ):
        for _ in range(100):
            client.write(0, b"x" * 65536)
        time.sleep(0.6)
        stop = threading.Event()

        def work():
            while not stop.wait(0.001):
                client.read(0, 4096)

        worker = threading.Thread(target=work)
        worker.start()
        now = [line for line in ctl("status").splitlines() if "now:" in line]
        stop.set()
        worker.join()
        assert "read" in now[0] and "/s)" in now[0]
        server.stop()


def test_a_paused_stream_and_one_that_is_cancelled(disk):
    with open("large.raw", "wb") as file:
        file.write(b"l" * 4 * MIB)
    mmcow.create("large.acow", backing="large.raw", backing_format="raw")
    with Server("--socket", "nbd.sock", "--control", "ctl.sock", "large.acow") as server:
        ctl("stream", "--rate", "1")
        assert "paused" in ctl("stream", "pause")
        assert "a stream is paused" in ctl("stream", status=1)
        waiting = subprocess.Popen(
            [*MMCOW, "ctl", "ctl.sock", "stream", "resume", "--wait"],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        deadline = time.monotonic() + 20
        while "running" not in ctl("status"):
            assert time.monotonic() < deadline
        time.sleep(0.5)
        another = subprocess.Popen(
            [*MMCOW, "ctl", "ctl.sock", "stream", "--wait"], stderr=subprocess.PIPE, text=True
        )
        time.sleep(0.7)
        assert another.poll() is None  # it joins in the waiting
        assert "running" not in ctl("stream", "cancel")
        for one in (waiting, another):
            _, err = one.communicate(timeout=20)
            assert one.returncode == 1
            assert "was cancelled" in err
        assert "completed" in ctl("stream", "--wait")
        assert server.stop()[0] == 0


def test_requests_that_come_while_it_stops_are_told(disk):
    """SIGTERM under load: every request is answered, with success or ESHUTDOWN, until the end."""
    with Server("--socket", "nbd.sock", disk) as server, attach() as client:
        done = refused = 0
        server.process.send_signal(signal.SIGTERM)
        try:
            while True:
                client.start(1, 0, data=b"y" * 4096)
                _, reply = client.next_reply()
                assert reply.error in (0, 108)
                done += not reply.error
                refused += bool(reply.error)
        except (EOFError, ConnectionError):
            pass
        assert server.end()[0] == 0
    if done:
        with mmcow.open(disk) as image:
            assert image.read(0, 4096) == b"y" * 4096


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["vm.acow"], "say where to listen"),
        (["--socket", "s", "nosuch"], "nosuch"),
        (["--socket", "/nosuch/dir/s", "vm.acow"], "mmcow: /nosuch/dir/s: "),
        (["--socket", "s" * 120, "vm.acow"], "too long"),
        (["--socket", "s", "--control", "c" * 120, "vm.acow"], "too long"),
        (["--bind", "nowhere", "vm.acow"], "HOST:PORT"),
        (["--bind", "localhost:\u00b2", "vm.acow"], "HOST:PORT"),
        (["--bind", "localhost:99999", "vm.acow"], "from 0 to 65535"),
        (["--bind", "[::zz]:0", "vm.acow"], "::zz:0: cannot listen"),
        (["--bind", "no..name:0", "vm.acow"], "no..name:0: cannot listen"),
        (["--socket", "s", "--exit-when-idle", "nan", "vm.acow"], "--exit-when-idle: 'nan'"),
        (["--socket", "s", "--exit-when-idle", "-1", "vm.acow"], "0 or more"),
        (["--socket", "s", "--max-connections", "0", "vm.acow"], "--max-connections 0"),
        (["--socket", "s", "--export-name", "a", "vm.acow", "base.raw"], "export names"),
        (["--socket", "s", "-r", "vm.acow", "vm.acow"], "two exports"),
        (["--socket", "s", "--tls-verify-peer", "vm.acow"], "--tls-certs"),
        (["--bind", "localhost:0", "--tls-certs", "/nosuch", "vm.acow"], "/nosuch"),
        (["--socket", "base.raw", "vm.acow"], "base.raw"),
    ],
)
def test_wrong_arguments_are_told(disk, arguments, text):
    with Server(*arguments, wait=False) as server:
        status, _, err = server.end()
    assert status == 1
    assert text in err
    assert "Traceback" not in err
    assert os.path.getsize("base.raw") == MIB


def test_log_lines_carry_priorities_for_the_journal(disk):
    environment = {**os.environ, "JOURNAL_STREAM": "8:1"}
    with Server("--socket", "nbd.sock", disk, env=environment) as server:
        with attach() as client:
            client.disconnect()
        _, _, err = server.stop()
    assert "<6>mmcow.nbd: client attached" in err


def test_nbdinfo_as_the_command(disk):
    requires("nbdinfo")
    with Server(disk, "--", "nbdinfo", "--size", "{uri}", wait=False) as server:
        status, out, err = server.end()
    assert (status, out.strip()) == (0, str(MIB)), err


def resident(pid):
    """MiB of memory that are a process's own."""
    with open(f"/proc/{pid}/status") as file:
        line = next(line for line in file if line.startswith("RssAnon:"))
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_memory_of_clients_that_are_gone_goes_back(disk):
    with Server("--socket", "nbd.sock", disk) as server:
        before = resident(server.process.pid)
        for _ in range(4):
            clients = [attach() for _ in range(600)]
            for client in clients:
                client.close()
        held = resident(server.process.pid)
        until = time.monotonic() + 20
        while (after := resident(server.process.pid)) > before + 8 and time.monotonic() < until:
            time.sleep(0.1)
        assert after <= before + 8, f"{before} MiB, then {held}, and still {after}"
        assert server.stop()[0] == 0


@pytest.mark.parametrize("gap", [0.0, 0.001, 0.005, 0.02, 0.05])
def test_second_signal_changes_nothing(disk, gap):
    for _ in range(8):
        with Server("--socket", "nbd.sock", disk) as server, attach() as client:
            client.write(5, b"hello")
            until = time.monotonic() + gap
            server.process.send_signal(signal.SIGTERM)
            while server.process.poll() is None:  # till the very end of the process
                if time.monotonic() >= until:
                    server.process.send_signal(signal.SIGTERM)
                    server.process.send_signal(signal.SIGINT)
                    time.sleep(0.002)
            status, _, err = server.end()
            assert status == 0, err
            assert ", all is flushed: 1 client" in err.splitlines()[-1]
    with mmcow.open(disk) as image:
        assert image.read(5, 5) == b"hello"


def test_signal_that_a_script_made_it_ignore_ends_it_too(disk):
    ignore = "import os, signal, sys; signal.signal(2, signal.SIG_IGN); "
    ignore += "os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", ignore, *MMCOW, "serve", "--socket", "nbd.sock", disk],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err


def test_service_manager_that_is_not_there_stops_nobody(disk):
    with Server(
        "--socket", "nbd.sock", disk, env={**os.environ, "NOTIFY_SOCKET": "/nosuch/notify"}
    ) as server:
        with attach() as client:
            assert client.read(0, 4) == b"base"
            client.disconnect()
        status, _, err = server.stop()
    assert status == 0
    assert err.count("warning: /nosuch/notify: ready notification: No such file") == 1


@pytest.mark.parametrize("output", [">&-", ">/dev/full", "| true", ">&- 2>&-"])
def test_output_that_nobody_takes_stops_nobody(disk, output):
    words = " ".join([*MMCOW, "serve", "--socket", "nbd.sock", "--control", "ctl.sock", disk])
    script = f"({words}; echo $? >status) {output}"
    process = subprocess.Popen(["sh", "-c", script], stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 20
        while not os.path.exists("ctl.sock") and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.3)  # by now it has tried to say its URI
        with attach() as client:
            assert client.read(0, 4) == b"base"
            client.disconnect()
    finally:
        ctl("quit")
    _, err = process.communicate(timeout=30)
    until = time.monotonic() + 20
    while not os.path.exists("status") and time.monotonic() < until:
        time.sleep(0.02)
    with open("status") as file:
        assert file.read().strip() == "0", err
    assert "Traceback" not in err
    if "2>&-" not in output:
        assert err.count("mmcow: warning: standard output: ") == 1


def limited(disk, soft, hard, *arguments):
    """A server with so many open files at most."""
    limit = f"import os, resource, sys; resource.setrlimit(7, ({soft}, {hard})); "
    return subprocess.Popen(
        [sys.executable, "-c", limit + "os.execv(sys.argv[1], sys.argv[1:])", *MMCOW, "serve",
         "--socket", "nbd.sock", disk, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_soft_limit_of_open_files_is_raised(disk):
    process = limited(disk, 140, 1024, "--max-connections", "200")
    try:
        assert process.stdout.readline()
        clients = [attach() for _ in range(200)]
        for client in clients:
            client.close()
    finally:
        process.terminate()
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "warning" not in err


def test_too_few_open_files_are_told_in_few_lines(disk):
    process = limited(disk, 64, 64)
    clients = []
    try:
        assert process.stdout.readline()
        for _ in range(100):
            clients.append(socket.socket(socket.AF_UNIX))
            clients[-1].connect("nbd.sock")
        time.sleep(1.5)
    finally:
        process.terminate()
        _, err = process.communicate(timeout=30)
        for client in clients:
            client.close()
    assert process.returncode == 0
    assert "Traceback" not in err
    warning = "mmcow: warning: clients at once: 1, not 1024 (--max-connections)"
    assert err.count(warning) == 1
    assert len(err.splitlines()) < 30
    assert "tries to accept a client failed" in err
    assert err.splitlines()[-1].startswith("mmcow: server ended (SIGTERM)")
