# SPDX-License-Identifier: MIT
"""Real NBD clients on a served disk: libnbd's tools, QEMU's, fio, a FUSE mount, TLS."""

from __future__ import annotations

import json
import os
import random
import socket
import ssl
import struct
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

import mmcow
from tests.interop.tools import Failed, qemu_io, requires, run, sha256, which

pytestmark = pytest.mark.interop

KIB, MIB = 1 << 10, 1 << 20
SIZE = 64 * MIB
SERVE = Path(__file__).with_name("nbd_serve.py")


@contextmanager
def serving(*words):
    """A server process; yields its URI. Its end must be clean."""
    process = subprocess.Popen(
        [sys.executable, SERVE, *map(str, words)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(SERVE.parents[2]), "PYTHONDEVMODE": ""},
    )  # fmt: skip
    try:
        uri = process.stdout.readline().strip()
        if not uri:
            raise Failed(process.communicate()[1])
        process.uri = uri
        yield process
        _, errors = process.communicate("", timeout=30)
        assert (process.returncode, errors) == (0, "")
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture
def content():
    """A base with holes; shorter than the disk on it."""
    data = bytearray(SIZE // 2)
    rng = random.Random(8)
    for at in range(0, SIZE // 2, 8 * MIB):
        data[at : at + 3 * MIB] = rng.randbytes(3 * MIB)
    return data


@pytest.fixture
def disk(tmp_path, content):
    """An add-cow over a raw base, some clusters its own; with ``content`` made what it shows."""
    base = tmp_path / "base.raw"
    with base.open("wb") as file:
        for at in range(0, len(content), MIB):
            if any(content[at : at + MIB]):
                file.seek(at)
                file.write(content[at : at + MIB])
        file.truncate(len(content))
    path = str(tmp_path / "vm.acow")
    mmcow.create(path, format="add-cow", size=SIZE, backing=str(base), backing_format="raw")
    content += bytes(SIZE - len(content))
    with mmcow.open(path, write=True) as image:
        for at in (MIB, 7 * MIB + 5, 50 * MIB):
            data = random.Random(at).randbytes(300 * KIB)
            image.write(at, data)
            content[at : at + len(data)] = data
    return path


@pytest.fixture
def served(tmp_path, disk):
    with serving("--socket", tmp_path / "s", disk) as process:
        yield process


def merged(extents):
    """(start, length, what), neighbours that are alike joined."""
    out = []
    for start, length, what in extents:
        if out and out[-1][2] == what:
            out[-1][1] += length
        else:
            out.append([start, length, what])
    return out


class TestLibnbd:
    def test_nbdinfo(self, served):
        requires("nbdinfo")
        (export,) = json.loads(run("nbdinfo", "--json", served.uri).stdout)["exports"]
        assert export["export-size"] == SIZE
        assert export["contexts"] == ["base:allocation", "qemu:allocation-depth"]
        assert not export["is_read_only"]
        for feature in ("flush", "fua", "trim", "zero", "fast_zero", "df", "cache", "multi_conn"):
            assert export[f"can_{feature}"]
        assert export["block_size_minimum"] == 1
        assert export["block_size_maximum"] == 32 * MIB
        assert run("nbdinfo", "--size", served.uri).stdout == f"{SIZE}\n"
        listed = json.loads(run("nbdinfo", "--list", "--json", served.uri).stdout)["exports"]
        assert [one["export-name"] for one in listed] == [""]

    def test_map_says_what_mmcow_says(self, disk, served):
        requires("nbdinfo")

        def told(context):
            found = json.loads(run("nbdinfo", f"--map={context}", "--json", served.uri).stdout)
            return merged((e["offset"], e["length"], e["type"]) for e in found)

        with mmcow.open(disk, share=True) as image:
            status = list(image.block_status())
        assert told("base:allocation") == merged(
            (s.offset, s.length, 3 if s.is_zero else 0) for s in status
        )
        depths = merged(
            (s.offset, s.length, 0 if s.kind is mmcow.Kind.BELOW else s.depth + 1) for s in status
        )
        assert told("qemu:allocation-depth") == depths
        assert {what for _, _, what in depths} == {0, 1, 2}

    def test_nbdcopy_both_ways_over_several_connections(self, tmp_path, served, content):
        requires("nbdcopy")
        many = ("--connections=4", "--requests=32")
        run("nbdcopy", *many, served.uri, tmp_path / "out.raw")
        assert (tmp_path / "out.raw").read_bytes() == content
        back = tmp_path / "back.raw"
        other = bytes(reversed(content))
        back.write_bytes(other)
        run("nbdcopy", *many, "--flush", back, served.uri)
        run("nbdcopy", *many, served.uri, tmp_path / "again.raw")
        assert (tmp_path / "again.raw").read_bytes() == other

    def test_nbdsh(self, served, content):
        requires("nbdsh")
        script = f"""
h.connect_uri({served.uri!r})
assert h.get_structured_replies_negotiated()
assert h.pread(1000, 12345) == bytes.fromhex({bytes(content[12345:13345]).hex()!r})
buf = bytes(range(256)) * 16
h.pwrite(buf, 777, nbd.CMD_FLAG_FUA)
assert h.pread(4096, 777) == buf
h.zero(4096, 777, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(4096, 777) == bytes(4096)
h.trim(1 << 20, 1 << 20)
h.cache(4096, 0)
h.flush()
for bad in (lambda: h.pread(1, h.get_size()), lambda: h.pwrite(b"x", h.get_size())):
    try:
        bad()
    except nbd.Error:
        pass
    else:
        raise AssertionError
chunks = []
h.pread_structured(1 << 20, 60 << 20, lambda data, off, status, err: chunks.append(status))
assert chunks == [nbd.READ_HOLE], chunks
h.shutdown()
"""
        run("env", "PATH=/usr/bin:/bin", "nbdsh", "-c", script)  # with the system's Python

    def test_several_exports(self, tmp_path):
        requires("nbdinfo", "nbdcopy")
        for name in ("one", "two"):
            (tmp_path / name).write_bytes(name.encode() * 4096)
        with serving(f"one={tmp_path / 'one'}", f"two={tmp_path / 'two'}") as process:
            listed = json.loads(run("nbdinfo", "--list", "--json", process.uri).stdout)["exports"]
            assert sorted(one["export-name"] for one in listed) == ["one", "two"]
            run("nbdcopy", process.uri + "two", tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == b"two" * 4096

    def test_nbdfuse(self, tmp_path, served, content):
        requires("nbdfuse", "umount" if os.geteuid() == 0 else "fusermount3")
        if not os.access("/dev/fuse", os.W_OK):
            requires("a FUSE device")
        point = tmp_path / "mnt"
        point.mkdir()
        fuse = subprocess.Popen([which("nbdfuse"), str(point), served.uri])
        try:
            whole = point / "nbd"
            end = time.monotonic() + 20
            while not whole.exists() and time.monotonic() < end:
                time.sleep(0.05)
            assert whole.stat().st_size == SIZE
            assert whole.read_bytes() == content
            with whole.open("r+b") as file:
                file.seek(12345)
                file.write(b"through FUSE")
                file.flush()
                os.fsync(file.fileno())
            assert whole.read_bytes()[12345:12357] == b"through FUSE"
        finally:
            with suppress(Failed):
                run(*(("umount",) if os.geteuid() == 0 else ("fusermount3", "-u")), point)
            fuse.wait(20)


class TestQemu:
    def test_convert_map_compare(self, tmp_path, disk, served, content):
        requires("qemu-img")
        out = tmp_path / "out.raw"
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "--target-is-zero", served.uri,
            make_empty(out))  # fmt: skip
        assert out.read_bytes() == content
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", served.uri, out)
        found = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", served.uri).stdout)
        told = merged((e["start"], e["length"], e["zero"]) for e in found)
        with mmcow.open(disk, share=True) as image:
            assert told == merged((s.offset, s.length, s.is_zero) for s in image.block_status())
        source = tmp_path / "source.raw"
        source.write_bytes(bytes(reversed(content)))
        run("qemu-img", "convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw", source,
            served.uri)  # fmt: skip
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", served.uri, source)

    def test_qemu_io(self, served):
        requires("qemu-io")
        qemu_io(
            served.uri,
            "write -P 1 0 64k", "write -f -P 2 12345 678", "write -z 1M 100k", "write -z -u 2M 1M",
            "discard 3M 1M", "flush", "read -P 1 0 12345", "read -P 2 12345 678",
            "read -P 0 1M 100k", "read -P 0 2M 1M", "aio_write -P 9 10M 4M", "aio_read 10M 4M",
            "aio_flush", "read -P 9 10M 4M",
        )  # fmt: skip

    def test_what_was_written_is_on_the_disk_and_the_base_is_not_touched(self, tmp_path, disk):
        requires("qemu-io")
        before = sha256(tmp_path / "base.raw")
        with serving("--socket", tmp_path / "s", disk) as process:
            qemu_io(process.uri, "write -P 7 30M 3M", "write -z 0 1M")
        with mmcow.open(disk) as image:
            assert image.read(30 * MIB, 3 * MIB) == b"\7" * 3 * MIB
            assert image.read(0, MIB) == bytes(MIB)
        assert sha256(tmp_path / "base.raw") == before


def make_empty(path):
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


def test_fio_verifies(tmp_path, served):
    requires("fio")
    if "nbd" not in run("fio", "--enghelp").stdout.split():
        requires("fio with the nbd engine")
    run(
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={served.uri}", "--rw=randwrite",
        "--bsrange=512-128k", "--bs_unaligned=1", "--iodepth=32", "--size=48M", "--verify=crc32c",
        "--verify_fatal=1", "--randrepeat=0", "--serialize_overlap=1", "--numjobs=1",
        cwd=tmp_path, timeout=100,
    )  # fmt: skip


class TestTls:
    @pytest.fixture
    def certificates(self, tmp_path):
        """A CA, a server and a client of it, and a stranger that another CA knows."""
        requires("openssl", "nbdinfo")
        for owner in ("ours", "theirs"):
            folder = tmp_path / owner
            folder.mkdir()
            new = ("openssl", "req", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj")
            run(*new, f"/CN={owner}", "-x509", "-keyout", folder / "ca-key.pem",
                "-out", folder / "ca-cert.pem")  # fmt: skip
            for who in ("server", "client"):
                extension = folder / "extension"
                extension.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
                run(*new, "/CN=localhost", "-keyout", folder / f"{who}-key.pem",
                    "-out", folder / "request.pem")  # fmt: skip
                run("openssl", "x509", "-req", "-in", folder / "request.pem", "-days", "2",
                    "-CA", folder / "ca-cert.pem", "-CAkey", folder / "ca-key.pem",
                    "-CAcreateserial", "-extfile", extension,
                    "-out", folder / f"{who}-cert.pem")  # fmt: skip
        stranger = tmp_path / "stranger"  # trusts our server, but is not known here
        stranger.mkdir()
        for name, folder in (
            ("ca-cert", "ours"),
            ("client-cert", "theirs"),
            ("client-key", "theirs"),
        ):
            (stranger / f"{name}.pem").write_bytes((tmp_path / folder / f"{name}.pem").read_bytes())
        anonymous = tmp_path / "anonymous"
        anonymous.mkdir()
        (anonymous / "ca-cert.pem").write_bytes((tmp_path / "ours" / "ca-cert.pem").read_bytes())
        return tmp_path

    def uri(self, process, folder):
        return f"{process.uri}{'&' if '?' in process.uri else '?'}tls-certificates={folder}"

    @pytest.mark.parametrize("how", ["unix", "tcp"])
    def test_data_both_ways(self, certificates, disk, content, how):
        requires("nbdcopy")
        where = ("--socket", certificates / "s") if how == "unix" else ()
        with serving(*where, "--tls", certificates / "ours", "--verify", disk) as process:
            assert process.uri.startswith("nbds")
            uri = self.uri(process, certificates / "ours")
            if how == "unix":
                uri += "&tls-hostname=localhost"
            out = certificates / "out.raw"
            run("nbdcopy", "--connections=3", uri, out)
            assert out.read_bytes() == content
            other = bytes(reversed(content))
            out.write_bytes(other)
            run("nbdcopy", "--flush", out, uri)
            run("nbdcopy", uri, certificates / "again.raw")
            assert (certificates / "again.raw").read_bytes() == other

    @pytest.mark.parametrize("where", [(), ("--socket", "s"), ("--bind", "localhost:0")])
    def test_a_command_of_serve_is_given_an_encrypted_way_in(
        self, certificates, disk, where, monkeypatch
    ):
        monkeypatch.chdir(certificates)
        unix = where[:1] != ("--bind",)
        tls = f"{'&' if unix else '?'}tls-certificates=ours{'&tls-hostname=localhost' * unix}"
        given = run(
            sys.executable, "-m", "mmcow", "serve", "-q", *where,
            "--tls-certs", "ours", "--tls-verify-peer", disk,
            "--", "nbdinfo", "--json", f"{{uri}}{tls}",
        )  # fmt: skip
        assert json.loads(given.stdout)["TLS"] is True

    def test_who_is_refused(self, certificates, disk):
        refused = []
        process_words = ("--tls", certificates / "ours", "--verify", disk)
        with ExitStack() as stack:
            process = stack.enter_context(quiet_serving(*process_words))
            for folder in ("stranger", "anonymous"):
                uri = self.uri(process, certificates / folder)
                refused.append(run("nbdinfo", uri, ok=()).returncode)
            plain = process.uri.replace("nbds://", "nbd://")
            refused.append(run("nbdinfo", plain, ok=()).returncode)
            assert all(refused)
            run("nbdinfo", self.uri(process, certificates / "ours"))

    def test_without_verified_peers_anybody_may_come_encrypted(self, certificates, disk):
        with quiet_serving("--tls", certificates / "ours", disk) as process:
            run("nbdinfo", self.uri(process, certificates / "anonymous"))
            assert run("nbdinfo", process.uri.replace("nbds://", "nbd://"), ok=()).returncode

    def test_the_first_option_in_the_same_piece_as_the_end_of_tls_handshake(
        self, certificates, disk
    ):
        """What arrives together with the client's Finished must be answered, and encrypted."""
        context = ssl.create_default_context(cafile=certificates / "ours" / "ca-cert.pem")
        with quiet_serving("--tls", certificates / "ours", disk) as process:
            port = int(process.uri.split(":")[2].rstrip("/"))
            for _ in range(5):
                with socket.create_connection(("127.0.0.1", port), timeout=10) as one:
                    one.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 5, 0))
                    one.recv(18, socket.MSG_WAITALL)
                    one.recv(20, socket.MSG_WAITALL)
                    come, go = ssl.MemoryBIO(), ssl.MemoryBIO()
                    tls = context.wrap_bio(come, go, server_hostname="localhost")
                    while True:
                        try:
                            tls.do_handshake()
                            break
                        except ssl.SSLWantReadError:
                            one.sendall(go.read())
                            come.write(one.recv(65536))
                    tls.write(struct.pack(">8sII", b"IHAVEOPT", 3, 0))
                    one.sendall(go.read())
                    answer = b""
                    while len(answer) < 44:  # SERVER with an empty name, and ACK
                        try:
                            answer += tls.read(100)
                        except ssl.SSLWantReadError:
                            come.write(one.recv(65536))
                    assert struct.unpack_from(">QII", answer) == (0x3E889045565A9, 3, 2)

    def test_clients_that_leave_in_the_middle_of_it(self, certificates, disk):
        """At every length of the first flight; afterwards the server is whole."""
        start = struct.pack(">I8sII", 3, b"IHAVEOPT", 5, 0)
        hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(600)
        with quiet_serving("--tls", certificates / "ours", disk) as process:
            port = int(process.uri.split(":")[2].rstrip("/"))
            for cut in (0, 1, 5, 11, 300):
                for reset in (False, True):
                    with socket.create_connection(("127.0.0.1", port)) as one:
                        one.sendall(start)
                        one.recv(18, socket.MSG_WAITALL)
                        one.recv(20, socket.MSG_WAITALL)
                        one.sendall(hello[:cut])
                        if reset:
                            linger = struct.pack("ii", 1, 0)
                            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            run("nbdinfo", self.uri(process, certificates / "anonymous"))
            end = time.monotonic() + 10
            while sockets_of(process.pid) > 2 and time.monotonic() < end:
                time.sleep(0.05)
            assert sockets_of(process.pid) <= 2  # the listener, and the loop's own pair


def sockets_of(pid):
    """How many sockets to clients a process has, its own pairs left out."""
    count = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            count += os.readlink(entry).startswith("socket:")
    return count - 1


@contextmanager
def quiet_serving(*words):
    """As ``serving``, but what it logs about strangers is no failure; a traceback is."""
    with ExitStack() as stack:
        try:
            process = stack.enter_context(serving(*words))
            yield process
        finally:
            try:
                stack.close()
            except AssertionError as error:
                assert "Traceback" not in str(error)


def test_an_idle_server_costs_nothing(tmp_path, disk):
    """No processor time, and less memory than the 40 MiB promised."""
    requires("nbdinfo")
    with serving("--socket", tmp_path / "s", disk) as process:
        run("nbdinfo", process.uri)
        usage = Path(f"/proc/{process.pid}/stat")
        before = usage.read_text().rsplit(")", 1)[1].split()
        time.sleep(2)
        after = usage.read_text().rsplit(")", 1)[1].split()
        assert after[11:13] == before[11:13]
        status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        (resident,) = [int(line.split()[1]) for line in status if line.startswith("VmRSS")]
        print(f"resident: {resident / 1024:.1f} MiB")
        assert resident < 40 * 1024
