# SPDX-License-Identifier: MIT
"""A real Linux guest on a disk that mmcow serves: what it wrote is there, whatever happened.

The guest's promises stand on its console: a line per file that it has synced, with a checksum.
Judges: e2fsck to the letter, and the files' checksums, read without mmcow from flattened copies.
``MMCOW_GUEST_ROUNDS`` makes more rounds of the killed server.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest

from tests.guest.disk import (
    BASE_SIZE,
    Base,
    Promises,
    copy_folder,
    flattened,
    judge,
    make_base,
    mounts,
    replay,
    touched,
)
from tests.guest.vm import (
    STEP_SECONDS,
    Guest,
    Server,
    file_drive,
    nbd_drive,
    requires_guest,
    run_mmcow,
    with_libraries,
)
from tests.interop.tools import allocated, run

pytestmark = [pytest.mark.interop, pytest.mark.timeout(300)]

ROUNDS = int(os.environ.get("MMCOW_GUEST_ROUNDS", "1"))
MIB = 1 << 20
CLUSTERS = ("4k", "64k", "1M")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    requires_guest()
    return make_base(tmp_path_factory.mktemp("base"), random.Random(20260101))


@pytest.fixture
def folder(base, tmp_path, rng) -> Path:
    """A folder with the base and an overlay vm.acow, of small or large clusters."""
    work = tmp_path / "w"
    work.mkdir()
    run("cp", "--sparse=always", base.path, work / "base.raw")
    (work / "base.raw").chmod(0o444)
    overlay(work, "vm.acow", rng.choice(CLUSTERS))
    return work


def overlay(folder: Path, name: str, cluster: str) -> None:
    print(name, "has clusters of", cluster)
    options = ("-o", f"cluster_size={cluster}", "-b", "base.raw", "-F", "raw")
    run_mmcow(folder, "create", "-f", "add-cow", *options, name)


def chosen(rng: random.Random) -> str:
    """Words for ``put``: where in the blob and how much, in KiB."""
    count = rng.choice((1, 3, 60, 64, 200, 900))
    return f"{rng.randrange(2048 - count)} {count}"


def puts(rng: random.Random, names: list[str]) -> str:
    return "".join(f"put /mnt {name} {chosen(rng)}\n" for name in names)


def merged(folder: Path, target: Path) -> Path:
    """A copy of everything, the overlay merged into the base there; returns that base."""
    copy_folder(folder, target)
    (target / "base.raw").chmod(0o644)
    run_mmcow(target, "commit", "vm.acow")
    return target / "base.raw"


def detached(folder: Path, target: Path) -> Path:
    """A copy of everything, pulled together there; returns the raw file that is left."""
    copy_folder(folder, target)
    run_mmcow(target, "stream", "vm.acow")
    run_mmcow(target, "detach", "vm.acow")
    (target / "base.raw").unlink()
    assert [path.name for path in target.iterdir()] == ["vm.acow.raw"]
    return target / "vm.acow.raw"


def around(base: Base, before: list[str], after: list[str]) -> Promises:
    """What a snapshot between two states of the console must hold."""
    promises = Promises.read(base, before)
    promises.doubtful |= touched(after[len(before) :])
    return promises


def wait_for_stream(server: Server) -> None:
    """Until it has let go of what lies below."""
    end = time.monotonic() + STEP_SECONDS
    while (stream := server.export()["stream"])["state"] == "running":
        assert time.monotonic() < end, stream
        time.sleep(0.1)
    assert stream["state"] == "completed", stream


def test_what_a_guest_wrote_is_there_in_every_form(base, folder, tmp_path, rng):
    job = "mount -t ext4 /dev/vda /mnt\n"
    job += puts(rng, [f"new{n}" for n in range(12)])
    job += puts(rng, ["old03", "old07", "new2"])  # over what is there
    job += "".join(f"gone /mnt {name}\n" for name in ("old01", "old02", "old11", "new5"))
    job += "fstrim -v /mnt\n"
    job += puts(rng, ["late0", "late1"])
    job += "umount /mnt\nsync\n"
    with Server(folder, "vm.acow") as server:
        with Guest(folder, job, nbd_drive(), payload={"blob": base.blob}) as guest:
            guest.finish()
        seen = server.export()
        assert seen["operations"]["trim"] > 0 and seen["operations"]["flush"] > 0
        assert seen["errors"] == 0
        server.stop()
    promises = Promises.read(base, guest.lines)
    assert promises.count == 21 and not promises.doubtful

    base.untouched(folder)
    run_mmcow(folder, "check", "vm.acow")
    judge(flattened(folder, "vm.acow"), promises)
    judge(detached(folder, tmp_path / "alone"), promises)
    judge(merged(folder, tmp_path / "merged"), promises)
    base.untouched(folder)


def test_stream_and_snapshots_while_the_guest_writes(base, folder, rng):
    """One snapshot while the guest writes, one while it stands still, a slow stream around both;
    at the end the raw file alone, and the frozen layers as they were at their moments."""
    job = "mount -t ext4 /dev/vda /mnt\n"
    job += puts(rng, [f"a{n}" for n in range(4)]) + "pause a\n"
    job += puts(rng, [f"b{n}" for n in range(24)]) + "gone /mnt old03\n"
    job += "sync\npause b\n"  # nothing is written from here on ...
    job += puts(rng, [f"c{n}" for n in range(4)]) + "gone /mnt a1\npause c\n"
    job += puts(rng, ["d0", "old07"]) + "fstrim /mnt\numount /mnt\n"
    with Server(folder, "vm.acow") as server:
        with Guest(folder, job, nbd_drive(), payload={"blob": base.blob}) as guest:
            guest.wait("@@ PAUSE a")
            server.ctl("stream", "--rate", "512k")
            guest.say()
            guest.wait("@@ SYNCED b5 ")
            before = list(guest.lines)
            server.ctl("snapshot", "--as", "live.acow")
            after = list(guest.lines)
            guest.wait("@@ PAUSE b")
            still = list(guest.lines)
            assert server.export()["stream"]["state"] == "running"
            server.ctl("snapshot", "--as", "still.acow")
            guest.say()
            guest.wait("@@ PAUSE c")
            assert server.export()["stream"]["state"] == "running", "the stream did not overlap"
            server.ctl("stream", "resume", "--rate", "1G")
            wait_for_stream(server)
            guest.say()
            guest.finish()
        chain = server.export()["chain"]
        assert chain == ["vm.acow (add-cow)"], chain
        server.stop()
    everything = Promises.read(base, guest.lines)
    assert not everything.doubtful

    base.untouched(folder)
    for name in ("vm.acow", "live.acow", "still.acow"):
        run_mmcow(folder, "check", name)
    live = flattened(folder, "live.acow")
    quiet = flattened(folder, "still.acow")
    replay(folder, live, quiet)
    judge(quiet, Promises.read(base, still))
    # Of what was written around the moment of the first one, only what came before is promised.
    judge(live, around(base, before, after))

    data = (
        folder
        / json.loads(run_mmcow(folder, "info", "--output=json", "vm.acow"))["format-specific"][
            "data"
        ]["data-file"]
    )
    run_mmcow(folder, "detach", "vm.acow")
    for path in folder.glob("*.acow"):
        path.unlink()
    (folder / "base.raw").unlink()
    judge(data, everything)


def test_a_larger_disk_after_connecting_again(base, folder, tmp_path, rng):
    larger = 64 * MIB
    first = "mount -t ext4 /dev/vda /mnt\n" + puts(rng, ["a0"]) + "pause resized\n"
    first += puts(rng, ["a1"]) + 'echo "@@ SIZE $(blockdev --getsize64 /dev/vda)"\numount /mnt\n'
    second = 'echo "@@ SIZE $(blockdev --getsize64 /dev/vda)"\nmount -t ext4 /dev/vda /mnt\n'
    # More than the old size could hold.
    second += "resize2fs /dev/vda\n" + "".join(f"put /mnt big{n} {n} 2000\n" for n in range(17))
    second += "umount /mnt\n"
    payload = {"blob": base.blob, **with_libraries("resize2fs")}
    with Server(folder, "vm.acow") as server:
        with Guest(folder, first, nbd_drive(), payload=payload) as guest:
            guest.wait("@@ PAUSE resized")
            assert server.ctl("resize", "+16M")["size"] == larger
            guest.say()
            guest.finish()
        assert guest.wait("@@ SIZE") == [f"@@ SIZE {base.path.stat().st_size}"]
        with Guest(folder, second, nbd_drive(), payload=payload) as again:
            again.finish()
        assert again.wait("@@ SIZE") == [f"@@ SIZE {larger}"]
        server.stop()
    promises = Promises.read(base, again.lines, Promises.read(base, guest.lines).files)
    assert promises.count == 17

    base.untouched(folder)
    run_mmcow(folder, "check", "vm.acow")
    flat = flattened(folder, "vm.acow")
    assert flat.stat().st_size == larger
    assert allocated(flat) > BASE_SIZE  # the new part is in use
    judge(flat, promises)
    judge(detached(folder, tmp_path / "alone"), promises)
    judge(merged(folder, tmp_path / "merged"), promises)


def busy_job(rng: random.Random) -> str:
    """Promises until the plug is pulled, beside writes that nobody promises."""
    job = "mount -t ext4 /dev/vda /mnt\n" + puts(rng, ["s0", "s1", "s2"]) + "sync\n"
    # On the disk before the pause, but only flushed after it.
    job += "echo @@ BEGIN direct\n"
    job += "dd if=/blob of=/mnt/direct bs=64k skip=1 count=20 oflag=direct 2>/dev/null\n"
    job += "pause start\nsync\nsum=$(sha256sum /mnt/direct)\n"
    job += 'echo "@@ SYNCED direct 64 1280 ${sum%% *}"\n'
    job += "(while dd if=/blob of=/mnt/bulk bs=64k count=12 2>/dev/null; do usleep 30000; done) &\n"
    there: list[str] = []
    for number in range(600):
        if there and rng.random() < 0.15:
            job += f"gone /mnt {there.pop(rng.randrange(len(there)))}\n"
            continue
        name = f"w{rng.randrange(40)}"
        there += [] if name in there else [name]
        job += puts(rng, [name])
        if number % 40 == 39:
            job += "fstrim /mnt\n"
    return job


@pytest.mark.parametrize("number", range(ROUNDS))
@pytest.mark.parametrize("snapshots", ["none", "done", "racing"])
def test_a_killed_server_loses_nothing_that_was_synced(base, folder, rng, snapshots, number):
    """Killed while the guest writes: without snapshots; after one while the guest stood still and
    one while it wrote, with a stream on its way, which then starts again; in the middle of one."""
    moments: dict[str, Promises] = {}
    job, payload = busy_job(rng), {"blob": base.blob}
    with (
        Server(folder, "vm.acow") as server,
        Guest(folder, job, nbd_drive(), payload=payload) as guest,
    ):
        guest.wait("@@ PAUSE start")
        if snapshots == "done":
            server.ctl("snapshot", "--as", "still.acow")
            moments["still.acow"] = Promises.read(base, guest.lines)
            server.ctl("stream", "--rate", "1M")
        guest.say()
        guest.wait("@@ SYNCED w")
        time.sleep(rng.uniform(0, 1))
        before = list(guest.lines)
        if snapshots == "done":
            server.ctl("snapshot", "--as", "live.acow")
            moments["live.acow"] = around(base, before, guest.lines)
            time.sleep(rng.uniform(0, 1))
        elif snapshots == "racing":
            with server.send("snapshot", name="live.acow"):
                time.sleep(rng.uniform(0, 0.012))
                server.kill()
        server.kill()
        time.sleep(0.2)  # a promise made by mistake would come now
        guest.kill()
    promises = Promises.read(base, guest.lines)
    assert promises.count > 3
    base.untouched(folder)
    # Killed between two of its steps, a snapshot leaves one disk under two names.
    live = folder / "live.acow"
    if snapshots == "racing" and live.exists() and not live.samefile(folder / "vm.acow"):
        moments["live.acow"] = around(base, before, guest.lines)

    frozen = [flattened(folder, name) for name in moments]
    job = mounts(1 + len(frozen)) + "dmesg | grep EXT4-fs\n"
    with Server(folder, "vm.acow") as server:
        with Guest(folder, job, nbd_drive(), *map(file_drive, frozen)) as again:
            if snapshots == "done":
                server.ctl("stream")
            again.finish()
        if snapshots == "done":
            wait_for_stream(server)
            assert server.export()["chain"] == ["vm.acow (add-cow)"]
        server.stop()
    assert sum("recovery complete" in line for line in again.lines) == 1 + len(frozen)

    run_mmcow(folder, "check", "-r", "leaks", "vm.acow")  # a temporary file may be left
    run_mmcow(folder, "check", "vm.acow")
    judge(flattened(folder, "vm.acow"), promises, others="bulk")
    for path, moment in zip(frozen, moments.values(), strict=True):
        judge(path, moment, others="bulk")
    base.untouched(folder)


def test_two_guests_over_one_base(base, folder, rng):
    """One server with two exports, and another one, over the same base."""
    overlay(folder, "one.acow", "4k")
    overlay(folder, "two.acow", "64k")
    jobs = [
        "mount -t ext4 /dev/vda /mnt\n" + puts(rng, [f"{who}{n}" for n in range(10)] + ["old05"])
        + f"gone /mnt old{15 + len(who)}\nfstrim /mnt\numount /mnt\n"
        for who in ("a", "bb")
    ]  # fmt: skip
    payload = {"blob": base.blob}
    with (
        Server(folder, "one.acow", "vm.acow") as first,
        Server(folder, "two.acow", name="other") as second,
        Guest(folder, jobs[0], nbd_drive(export="one.acow"), payload=payload) as one,
        Guest(folder, jobs[1], nbd_drive("other.sock"), payload=payload) as two,
    ):
        one.finish()
        two.finish()
        first.stop()
        second.stop()
    base.untouched(folder)
    for name, guest in (("one", one), ("two", two)):
        promises = Promises.read(base, guest.lines)
        assert promises.count == 12
        judge(flattened(folder, f"{name}.acow"), promises)
    judge(flattened(folder, "vm.acow"), Promises(base.files))
