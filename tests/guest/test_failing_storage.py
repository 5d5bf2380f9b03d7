# SPDX-License-Identifier: MIT
"""A real Linux guest whose disk's storage fails for real: full, unreadable, not to be synced.

What the guest is told depends on QEMU's policies: by default a machine whose disk finds no room
is stopped until somebody has made room, and everything else is reported to the guest.
"""

from __future__ import annotations

import json
import random
import socket
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.guest.disk import (
    BASE_SIZE,
    Base,
    Promises,
    digest,
    flattened,
    judge,
    make_base,
)
from tests.guest.vm import STEP_SECONDS, Guest, Server, nbd_drive, requires_guest, run_mmcow
from tests.interop.failing import FailingFile, Filler, requires_failing_file
from tests.interop.tools import Failed, mounted, requires_fs, run

pytestmark = [pytest.mark.interop, pytest.mark.timeout(300)]

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 64 * KIB
REPORT = ",werror=report,rerror=report"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    requires_guest()
    return make_base(tmp_path_factory.mktemp("base"), random.Random(20260102))


@pytest.fixture
def folder(base, tmp_path) -> Path:
    """A folder with the base in it."""
    work = tmp_path / "w"
    work.mkdir()
    run("cp", "--sparse=always", base.path, work / "base.raw")
    return work


def overlay(folder: Path, name: str, below: Path | str = "base.raw", **options: str) -> None:
    words = [f"-ocluster_size={CLUSTER}", *(f"-o{key}={text}" for key, text in options.items())]
    run_mmcow(folder, "create", "-q", "-f", "add-cow", *words, "-b", str(below), "-F", "raw", name)


def status(server: Server) -> dict[str, dict]:
    return {one["name"]: one for one in server.ctl("status")["exports"]}


def told(guest: Guest, word: str) -> list[list[str]]:
    """What follows a word on the console."""
    return [line.split()[2:] for line in guest.lines if line.startswith(f"@@ {word} ")]


class Qmp:
    """QEMU's monitor."""

    OPTIONS = ("-qmp", "unix:qmp.sock,server=on,wait=off")

    def __init__(self, lines) -> None:
        self._lines = lines
        self.events: list[dict] = []

    @classmethod
    @contextmanager
    def of(cls, folder: Path):
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(STEP_SECONDS)
            line.connect(str(folder / "qmp.sock"))
            with line.makefile("rw") as lines:
                self = cls(lines)
                assert "QMP" in self._read()
                self.do("qmp_capabilities")
                yield self

    def _read(self) -> dict:
        return json.loads(self._lines.readline())

    def do(self, command: str):
        self._lines.write(json.dumps({"execute": command}) + "\n")
        self._lines.flush()
        while "return" not in (answer := self._read()):
            if "error" in answer:
                raise Failed(f"{command}: {answer}")
            self.events.append(answer)
        return answer["return"]

    def wait(self, event: str) -> dict:
        """For an event that came since the last wait for it, or comes."""
        while True:
            for number, one in enumerate(self.events):
                if one.get("event") == event:
                    return self.events.pop(number)
            self.events.append(self._read())


@pytest.mark.root
def test_a_guest_without_room_stops_and_goes_on_when_there_is_some(base, folder, rng):
    """QEMU stops a machine for ENOSPC, and for that alone; the guest never hears of it."""
    requires_fs("ext4")
    job = "mount -t ext4 /dev/vda /mnt\nput /mnt early 0 200\npause full\n"
    job += "".join(f"put /mnt late{n} {rng.randrange(1000)} 1000\n" for n in range(6))
    job += "umount /mnt\n"
    with mounted("ext4", folder) as point:
        overlay(folder, "mnt/vm.acow", folder / "base.raw")
        filler = Filler(point)
        payload = {"blob": base.blob}
        with (
            Server(folder, "mnt/vm.acow") as server,
            Guest(folder, job, nbd_drive(), payload=payload, options=Qmp.OPTIONS) as guest,
        ):
            guest.wait("@@ PAUSE full")
            filler.fill(leave=2 * MIB)
            guest.say()
            with Qmp.of(folder) as qmp:
                error = qmp.wait("BLOCK_IO_ERROR")["data"]
                assert (error["operation"], error["action"], error["nospace"]) == (
                    "write", "stop", True,
                )  # fmt: skip
                qmp.wait("STOP")
                assert qmp.do("query-status")["status"] == "io-error"
                assert server.export()["errors"] >= 1
                filler.free()
                qmp.do("cont")
                guest.finish()
            assert "No space left on device" in server.log()
            server.stop()
        promises = Promises.read(base, guest.lines)
        assert promises.count == 7 and not promises.doubtful
        run_mmcow(folder, "check", "mnt/vm.acow")
        run_mmcow(folder, "convert", "-O", "raw", "mnt/vm.acow", "flat.raw")
    judge(folder / "flat.raw", promises)
    base.untouched(folder)


@pytest.mark.root
def test_a_guest_that_is_told_of_no_room_uses_its_other_disk_and_tries_again(base, folder, rng):
    requires_fs("ext4")
    steps = 48
    job = f"""
    mount -t ext4 /dev/vdb /mnt
    step() {{ dd if=/blob of=/dev/vda bs=64k skip=$(($1 % 32)) seek=$1 count=1 conv=notrunc \
        oflag=direct 2>/err; }}
    pause full
    for n in $(seq 0 {steps - 1}); do
        if step $n; then echo "@@ WROTE $n"; else echo "@@ FAILED $n $(grep error /err)"; fi
    done
    put /mnt beside {rng.randrange(1000)} 1000
    blockdev --flushbufs /dev/vda
    pause free
    for n in $(seq 0 {steps - 1}); do step $n; done
    sync
    echo 3 >/proc/sys/vm/drop_caches
    sum=$(dd if=/dev/vda bs=64k count={steps} 2>/dev/null | sha256sum)
    echo "@@ SUM ${{sum%% *}}"
    umount /mnt
    """
    drives = [nbd_drive(export=name) + REPORT for name in ("full.acow", "vm.acow")]
    with mounted("ext4", folder) as point:
        overlay(folder, "mnt/full.acow", folder / "base.raw")
        overlay(folder, "vm.acow")
        filler = Filler(point)
        with (
            Server(folder, "mnt/full.acow", "vm.acow") as server,
            Guest(folder, job, *drives, payload={"blob": base.blob}) as guest,
        ):
            guest.wait("@@ PAUSE full")
            filler.fill(leave=MIB)
            guest.say()
            guest.wait("@@ PAUSE free")
            wrote, failed = told(guest, "WROTE"), told(guest, "FAILED")
            assert len(wrote) + len(failed) == steps
            assert len(failed) >= 2 * MIB // CLUSTER, "it was never full"
            assert all("Input/output error" in " ".join(line) for line in failed)
            seen = status(server)
            assert seen["full.acow"]["errors"] >= len(failed)
            assert seen["vm.acow"]["errors"] == 0
            filler.free()
            guest.say()
            guest.finish()
            server.stop()
        content = b"".join(base.blob[n % 32 * CLUSTER :][:CLUSTER] for n in range(steps))
        assert told(guest, "SUM") == [[digest(content)]]
        run_mmcow(folder, "check", "mnt/full.acow")
        run_mmcow(folder, "convert", "-O", "raw", "mnt/full.acow", "flat.raw")
    flat = (folder / "flat.raw").read_bytes()
    assert flat == content + base.path.read_bytes()[len(content) :]
    promises = Promises.read(base, guest.lines)
    assert promises.count == 1
    judge(flattened(folder, "vm.acow"), promises)
    base.untouched(folder)


def test_a_guest_over_storage_that_cannot_be_read_and_then_not_synced(base, folder, rng):
    """vda: its data file's sync fails, which ends its writing; what was synced before is there
    after a restart. vdb: a part of its base cannot be read."""
    requires_failing_file()
    first, count, last = 100, 8, BASE_SIZE // CLUSTER - 1
    job = "mount -t ext4 /dev/vda /mnt\n"
    job += "".join(f"put /mnt s{n} {rng.randrange(1500)} 500\n" for n in range(3))
    job += f"""
    sync
    pause broken
    for n in 0 $(seq {first - 9} {first + count + 9}) {last}; do
        dd if=/dev/vdb of=/dev/null bs=64k skip=$n count=1 iflag=direct 2>/err ||
            echo "@@ FAILED $n $(grep error /err)"
    done
    pause unsynced
    put /mnt s3 0 100 || echo "@@ REFUSED s3"
    put /mnt s4 0 100 || echo "@@ REFUSED s4"
    pause mended
    put /mnt s5 0 100 || echo "@@ REFUSED s5"
    echo 3 >/proc/sys/vm/drop_caches
    for name in s0 s1 s2; do
        sum=$(sha256sum /mnt/$name)
        echo "@@ READ $name ${{sum%% *}}"
    done
    umount /mnt
    """
    names = ("vm.acow", "other.acow")
    drives = [nbd_drive(export=name) + REPORT for name in names]
    with (
        FailingFile(folder / "data", BASE_SIZE) as data,
        FailingFile(folder / "below.raw", BASE_SIZE) as below,
    ):
        below.content.write_bytes(base.path.read_bytes())
        overlay(folder, "vm.acow", image_file="data")
        overlay(folder, "other.acow", "below.raw")
        with (
            Server(folder, *names) as server,
            Guest(folder, job, *drives, payload={"blob": base.blob}) as guest,
        ):
            guest.wait("@@ PAUSE broken")
            below.fail("pread", first * CLUSTER + 512, (first + count) * CLUSTER - 512)
            guest.say()
            guest.wait("@@ PAUSE unsynced")
            failed = told(guest, "FAILED")
            assert [int(line[0]) for line in failed] == list(range(first, first + count))
            assert all("Input/output error" in " ".join(line) for line in failed)
            seen = status(server)
            assert seen["other.acow"]["errors"] >= count
            assert seen["vm.acow"]["errors"] == 0
            data.fail("flush")
            guest.say()
            guest.wait("@@ PAUSE mended")
            data.mend()
            before = status(server)["vm.acow"]["errors"]
            assert before >= 1
            guest.say()
            guest.finish()
            assert status(server)["other.acow"]["errors"] == seen["other.acow"]["errors"]
            assert "data: fdatasync: Input/output error" in server.log()
            server.stop(status=1)
            assert "refused after an earlier failure" in server.log()
        assert told(guest, "REFUSED") == [["s3"], ["s4"], ["s5"]]
        promises = Promises.read(base, guest.lines)
        assert promises.count == 3
        assert told(guest, "READ") == [[f"s{n}", promises.files[f"s{n}"]] for n in range(3)]
        run_mmcow(folder, "check", "vm.acow")
        flat = flattened(folder, "vm.acow")
    run("e2fsck", "-y", "-E", "journal_only", flat)
    judge(flat, promises)
    base.untouched(folder)
