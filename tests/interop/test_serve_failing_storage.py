# SPDX-License-Identifier: MIT
"""``mmcow serve`` over storage that fails for real: who asked is told, everything else goes on.

The failing file is a FUSE mount whose server answers EIO, the full one lies on a small ext4.
"""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

import pytest

import mmcow
from tests.interop.failing import FailingFile, Filler, requires_failing_file
from tests.interop.tools import TIMEOUT, Failed, mounted, requires_fs, run
from tests.unit import nbd_client as nbd
from tests.unit.nbd_client import connect

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB
CLUSTER = 64 * KIB
BROKEN = (2 * MIB, 3 * MIB)
MMCOW = [sys.executable, "-m", "mmcow"]
EIO, ENOSPC = 5, 28


class Served:
    """A running ``mmcow serve`` on s.sock and s.ctl in the working directory, and its clients."""

    def __init__(self, stack, *images):
        words = ["serve", "--socket", "s.sock", "--control", "s.ctl", *images]
        self._stack = stack
        self._process = subprocess.Popen(
            [*MMCOW, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        stack.callback(self._kill)
        if not self._process.stdout.readline().startswith("nbd"):
            raise Failed(self._process.communicate(timeout=TIMEOUT)[1])

    def _kill(self):
        self._process.kill()
        self._process.communicate()

    def connect(self, export="", *, structured=True):
        return self._stack.enter_context(connect("s.sock", export, structured=structured))

    def errors(self, export=""):
        """What status counts."""
        told = json.loads(run(*MMCOW, "ctl", "--output=json", "s.ctl", "status").stdout)
        return {one["name"]: one["errors"] for one in told["exports"]}[export]

    def stop(self):
        """SIGTERM; its exit status and what it said."""
        self._process.send_signal(signal.SIGTERM)
        _, said = self._process.communicate(timeout=TIMEOUT)
        assert "Traceback" not in said
        return self._process.returncode, said


@contextmanager
def serving(*images):
    with ExitStack() as stack:
        yield Served(stack, *images)


@pytest.fixture
def base(tmp_path, monkeypatch, rng):
    """Content of base.raw, in the working directory."""
    monkeypatch.chdir(tmp_path)
    content = rng.randbytes(SIZE)
    (tmp_path / "base.raw").write_bytes(content)
    return bytearray(content)


@pytest.fixture
def data(tmp_path, base):
    """vm.acow over base.raw; its data file can be made to fail."""
    requires_failing_file()
    with FailingFile(tmp_path / "data", SIZE) as data:
        mmcow.create(
            "vm.acow", backing="base.raw", backing_format="raw",
            options={"image_file": "data", "cluster_size": str(CLUSTER)},
        )  # fmt: skip
        yield data


def random_bytes(seed, length):
    return random.Random(seed).randbytes(length)


def whole(client):
    return b"".join(client.read(at, MIB) for at in range(0, SIZE, MIB))


@pytest.mark.root
def test_a_full_disk_is_told_to_who_writes_and_to_nobody_else(base, tmp_path, rng):
    requires_fs("ext4")
    with mounted("ext4", tmp_path) as point:
        options = {"cluster_size": str(CLUSTER)}
        for path in ("mnt/full.acow", "other.acow"):
            mmcow.create(
                path, backing=str(tmp_path / "base.raw"), backing_format="raw", options=options
            )
        filler = Filler(point)
        with serving("mnt/full.acow", "other.acow") as served:
            client, beside = (served.connect("full.acow") for _ in range(2))
            other = served.connect("other.acow")
            client.write(0, early := rng.randbytes(CLUSTER))
            client.flush()
            base[:CLUSTER] = early
            filler.fill(leave=MIB)
            failed = []
            for at in range(CLUSTER, SIZE, CLUSTER):
                piece = rng.randbytes(CLUSTER - 512)
                error = client.error_of(nbd.WRITE, at + 512, data=piece)
                if error:
                    failed.append((at + 512, piece))
                    assert error == ENOSPC
                else:
                    base[at + 512 : at + CLUSTER] = piece
            assert len(failed) >= 3 * MIB // CLUSTER, "it was never full"
            assert client.error_of(nbd.WRITE, failed[0][0], data=failed[0][1], flags=nbd.FUA)
            assert whole(beside) == base
            beside.write(100, b"in place")  # what it has already needs no room
            base[100:108] = b"in place"
            beside.flush()
            other.write(CLUSTER, b"elsewhere")
            other.flush()
            assert other.read(CLUSTER, 9) == b"elsewhere"
            assert served.errors("full.acow") == len(failed) + 1
            assert served.errors("other.acow") == 0
            filler.free()
            for at, piece in failed:
                client.write(at, piece)
                base[at : at + len(piece)] = piece
            client.flush()
            assert whole(beside) == base
            status, said = served.stop()
        assert status == 0
        assert "No space left on device" in said
        for path in ("mnt/full.acow", "other.acow"):
            run(*MMCOW, "check", path)
        with mmcow.open("mnt/full.acow") as image:
            assert image.read(0, SIZE) == base


def test_reads_of_a_broken_part_of_the_base(base, tmp_path):
    """They fail, also as the rest of a cluster that is written to; a stream fails and can be
    started again."""
    requires_failing_file()
    with FailingFile(tmp_path / "broken.raw", SIZE) as broken:
        broken.content.write_bytes(base)
        mmcow.create(
            "vm.acow", backing="broken.raw", backing_format="raw",
            options={"cluster_size": str(CLUSTER)},
        )  # fmt: skip
        start, end = BROKEN
        with serving("vm.acow") as served:
            client, beside = served.connect(), served.connect(structured=False)
            broken.fail("pread", start, end)
            for one in (client, beside):
                for at, length in ((start, 512), (end - 1, 1), (start - 4096, 8192), (0, SIZE)):
                    assert one.error_of(nbd.READ, at, length) == EIO
                assert one.read(0, start) == base[:start]
                assert one.read(end, SIZE - end) == base[end:]
            assert client.error_of(nbd.WRITE, start + 512, data=b"needs the rest") == EIO
            client.write(start, fresh := random_bytes(1, CLUSTER))  # needs nothing
            base[start : start + CLUSTER] = fresh
            assert beside.read(start, CLUSTER) == fresh
            client.flush()
            assert served.errors() == 9
            said = run(*MMCOW, "ctl", "s.ctl", "stream", "--wait", ok=(1,)).stderr
            assert f"{broken.path.name}: read at" in said
            broken.mend()
            assert whole(beside) == base
            run(*MMCOW, "ctl", "s.ctl", "stream", "--wait")
            broken.fail("pread")  # nobody needs it any more
            assert whole(beside) == base
            status, said = served.stop()
        assert status == 0
        assert f"{broken.path.name}: read at" in said


def test_writes_that_fail(base, data):
    start, end = BROKEN
    with serving("vm.acow") as served:
        client, beside = served.connect(), served.connect(structured=False)
        client.write(start, there := random_bytes(2, CLUSTER))
        client.flush()
        base[start : start + CLUSTER] = there
        data.fail("pwrite", start, end)
        for at in (start, end - CLUSTER, end - 512):  # it has the first, and not the others
            assert client.error_of(nbd.WRITE, at, data=bytes(512)) == EIO
            assert beside.error_of(nbd.WRITE, at, data=bytes(512), flags=nbd.FUA) == EIO
        assert client.error_of(nbd.WRITE_ZEROES, start, CLUSTER, flags=nbd.NO_HOLE) == EIO
        client.write(0, early := random_bytes(3, CLUSTER))
        beside.write(end + 5, late := random_bytes(4, 100))
        base[:CLUSTER], base[end + 5 : end + 105] = early, late
        beside.flush()
        data.mend()
        # Of a write that failed over what was there the disk may have kept either; over what was
        # not there nothing may show.
        client.write(start, there)
        assert whole(client) == whole(beside) == base
        assert served.errors() == 7
        client.flush()
        assert served.stop()[0] == 0
    run(*MMCOW, "check", "vm.acow")
    with mmcow.open("vm.acow") as image:
        assert image.read(0, SIZE) == base


@pytest.mark.parametrize("client_there", [True, False])
def test_a_sync_that_failed_is_the_end_of_writing(base, data, client_there):
    """Until the server is started again: it reads on, refuses what changes, tells so at its end."""
    mmcow.create("other.acow", backing="base.raw", backing_format="raw")
    with serving("vm.acow", "other.acow") as served:
        client, beside = served.connect("vm.acow"), served.connect("vm.acow")
        other = served.connect("other.acow")
        client.write(0, durable := random_bytes(5, CLUSTER))
        client.flush()
        client.write(CLUSTER, lost := random_bytes(6, CLUSTER))
        data.fail("flush")
        assert client.error_of(nbd.FLUSH) == EIO
        data.mend()  # too late: the kernel has forgotten what it could not write
        for one in (client, beside):
            assert one.error_of(nbd.FLUSH) == EIO
            assert one.error_of(nbd.WRITE, 5 * MIB, data=b"x" * 512) == EIO
            assert one.error_of(nbd.WRITE, 0, data=b"x" * 512, flags=nbd.FUA) == EIO
            assert one.error_of(nbd.WRITE_ZEROES, 6 * MIB, CLUSTER) == EIO
            assert one.error_of(nbd.TRIM, 0, CLUSTER) == EIO
            assert one.read(CLUSTER, CLUSTER) == lost
            assert one.read(2 * CLUSTER, MIB) == base[2 * CLUSTER :][:MIB]
        for words in (("flush",), ("snapshot", "--as", "x.acow"), ("resize", "+1M")):
            said = run(*MMCOW, "ctl", "s.ctl", "--export", "vm.acow", *words, ok=(1,)).stderr
            assert "refused after an earlier failure" in said
        other.write(0, b"goes on")
        other.flush()
        assert served.errors("vm.acow") == 11
        assert served.errors("other.acow") == 0
        if not client_there:
            for one in (client, beside, other):
                one.disconnect()
        status, said = served.stop()
    assert status == 1
    assert re.search(r"vm\.acow: .*refused after an earlier failure: .*data: fdatasync", said)
    with mmcow.open("other.acow") as image:
        assert image.read(0, 7) == b"goes on"
    run(*MMCOW, "check", "vm.acow")
    with serving("vm.acow") as served:
        client = served.connect()
        assert client.read(0, CLUSTER) == durable
        client.write(CLUSTER, lost)
        client.flush()
        assert served.stop()[0] == 0
    with mmcow.open("vm.acow") as image:
        assert image.read(0, 2 * CLUSTER) == durable + lost


def test_the_last_flush_fails(base, data):
    """Nobody asked for it but the server itself, at its end."""
    with serving("vm.acow") as served:
        served.connect().write(0, b"x" * CLUSTER)
        data.fail("flush")
        began = time.monotonic()
        status, said = served.stop()
    assert status == 1
    assert time.monotonic() - began < 10
    assert "data: fdatasync: Input/output error" in said
    data.mend()
    run(*MMCOW, "check", "vm.acow")
