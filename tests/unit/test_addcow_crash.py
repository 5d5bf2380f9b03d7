# SPDX-License-Identifier: MIT
"""Power cuts and failing calls at every step of what add-cow orders by itself.

Creation, resize, the removal of the base and renaming run on the simulated machine, which is cut
at each of its storage calls. After every cut the image opens, shows the disk before or after and
never a third thing, and ``check`` finds at most leaks.
"""

from __future__ import annotations

import errno
from contextlib import suppress

import pytest

from mmcow.errors import ChainError, StorageError, SyncFailed
from tests.sim.faults import Fault
from tests.sim.host import SimHost
from tests.unit.addcow_support import Rig, disk, kinds, survivors, v7, v10, v20

pytestmark = pytest.mark.crash

TOP, DATA, BASE = "/sim/top", "/sim/disk.raw", "/sim/base.raw"
C = 4096
VARIANTS = {
    "v20": (C, lambda **names: v20(bits=12, **names), C),
    "v18": (512, lambda **names: v20(bits=9, **names), 512),
    "v10": (
        65536,
        lambda **names: v10(features=3 if names.get("backing", b"b") else 0, **names),
        1,
    ),
    "v7": (512, v7, 1),
}


def base_of(length):
    return b"".join(b"base%012d" % n for n in range(-(-length // 16)))[:length]


def machine(variant, clusters, base_clusters, bits, seed, **names):
    """An image of whole clusters over a base; the data file is garbage where no bit is set."""
    step, header, unit = VARIANTS[variant]
    count = -(-clusters // 8)
    host = SimHost(seed)
    host.put(BASE, base_of(base_clusters * step))
    host.put(DATA, b"\xee" * clusters * step)
    padded = bits.to_bytes(count, "little").ljust(-(-count // unit) * unit, b"\0")
    host.put(TOP, header(**names) + padded)
    return host, step


def look(host, base=b""):
    """Reopen: the guest's disk and the findings of check."""
    rig = Rig(host)
    driver = rig.open(TOP)
    try:
        found = rig.run(driver.check("")).findings
        assert all(f.kind == "leak" for f in found), found
        return disk(driver, host.content, base)
    finally:
        rig.close()


# ---- resize ----


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("before", "after", "below"),
    [(10, 40, 30), (10, 40, 5), (10, 11, 40), (40, 10, 30), (40, 39, 60), (10, 0, 30), (0, 20, 10)],
)
def test_resize_cut_anywhere(rng, variant, before, after, below, seed):
    bits = rng.getrandbits(before) if before else 0
    host, step = machine(variant, before, below, bits, seed)
    base = base_of(below * step)
    old = look(host, base)
    rig = Rig(host)
    driver = rig.open(TOP)
    machines = survivors(
        host, rng, lambda: rig.run(driver.resize(after * step, below * step)), each=2
    )
    new = old[: after * step].ljust(after * step, b"\0")
    assert disk(driver, host.content, base) == new
    driver.close()
    assert look(host, base) == new
    for survivor in machines:
        assert look(survivor, base) in (old, new)
    assert look(host.power_cut(rng), base) == new


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [1, 3])
def test_resize_again_after_a_cut(rng, variant, count):
    """This test covers what a cut shrink leaves: stale bits must not turn into content."""
    host, step = machine(variant, 40, 50, (1 << 40) - 1, 1)
    base = base_of(50 * step)
    for _ in range(count):
        rig = Rig(host)
        driver = rig.open(TOP)
        machines = survivors(
            host, rng, lambda d=driver, r=rig: r.run(d.resize(3 * step, 50 * step))
        )
        for survivor in machines:
            rest = Rig(survivor)
            again = rest.open(TOP)
            shown = disk(again, survivor.content, base)
            rest.run(again.resize(60 * step, 50 * step))
            assert disk(again, survivor.content, base) == shown.ljust(60 * step, b"\0")
            rest.close()
        host = machines[len(machines) // 2]


@pytest.mark.parametrize("variant", VARIANTS)
def test_resize_without_base_cut_anywhere(rng, variant):
    host, step = machine(variant, 10, 0, (1 << 10) - 1, 3, backing=b"")
    old = look(host)
    rig = Rig(host)
    driver = rig.open(TOP)
    for survivor in survivors(host, rng, lambda: rig.run(driver.resize(30 * step, 0))):
        assert look(survivor) in (old, old.ljust(30 * step, b"\0"))
    assert driver.allocated() == 30


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize(("before", "after"), [(10, 5000), (5000, 10)])
@pytest.mark.parametrize("once", [True, False])
def test_resize_failing_anywhere_leaves_a_working_disk(rng, variant, code, before, after, once):
    """This test covers the full disk: the old size goes on working, for writes too."""
    most = {"v10": 50, "v20": 300}.get(variant, 5000)  # tens of MiB each time would only be slow
    before, after = min(before, most), min(after, most)
    for at in range(30):
        host, step = machine(variant, before, before // 2, 0b1011, at)
        base = base_of(before // 2 * step)
        rig = Rig(host)
        driver = rig.open(TOP)
        old = disk(driver, host.content, base)
        new = old[: after * step].ljust(after * step, b"\0")
        fault = Fault(at, code, once=once)
        host.faults = [fault]
        try:
            rig.run(driver.resize(after * step, before // 2 * step))
        except SyncFailed:
            host.faults = []
            assert disk(driver, host.content, base)[: 8 * step] == old[: 8 * step]
            continue  # sticky: only what was acknowledged must survive, which the cuts show
        except StorageError:
            host.faults = []
            shown = disk(driver, host.content, base)
            assert shown in (old, new)
            rig.fill(driver, step, b"w" * step)
            rig.flush(driver)
            expected = shown[:step] + b"w" * step + shown[2 * step :]
            driver.close()
            assert look(host.power_cut(rng), base) == expected
            continue
        assert not fault.struck
        break


# ---- the base ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_drop_backing_cut_anywhere(rng, variant):
    host, _ = machine(variant, 9, 5, 0x1FF, 1)
    old = look(host)
    rig = Rig(host)
    driver = rig.open(TOP)
    for survivor in survivors(host, rng, lambda: rig.run(driver.drop_backing()), each=8):
        assert look(survivor) == old
    driver.close()
    assert Rig(host.power_cut(rng)).inspect(TOP).backing is None


@pytest.mark.parametrize("variant", ["v20", "v10"])
def test_drop_backing_of_a_long_name_cut_anywhere(rng, variant):
    """This test covers a removal of more than a sector: whatever is left, the image opens."""
    host, _ = machine(variant, 9, 5, 0x1FF, 1, backing=b"./" * 600 + b"base.raw")
    rig = Rig(host)
    driver = rig.open(TOP)
    for survivor in survivors(host, rng, lambda: rig.run(driver.drop_backing()), each=8):
        again = Rig(survivor).open(TOP)
        assert disk(again, survivor.content) == b"\xee" * len(disk(again, survivor.content))
        assert again.info.has_backing == (again.backing is not None)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("at", range(8))
def test_drop_backing_failing_anywhere_can_be_repeated(rng, variant, at):
    host, _ = machine(variant, 9, 5, 0x1FF, 1)
    rig = Rig(host)
    driver = rig.open(TOP)
    host.faults = [Fault(at, errno.ENOSPC)]
    try:
        rig.run(driver.drop_backing())
    except SyncFailed:
        return
    except StorageError:
        rig.flush(driver)
        rig.run(driver.drop_backing())
    assert driver.backing is None
    driver.close()
    assert Rig(host.power_cut(rng)).inspect(TOP).backing is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_rename_cut_anywhere_shows_one_of_the_two_names(rng, variant):
    host, _ = machine(variant, 9, 5, 0, 1)
    host.put("/sim/other", b"")
    rig = Rig(host)
    machines = survivors(host, rng, lambda: rig.rename(TOP, backing=("./base.raw", "raw")), each=8)
    names = {Rig(m).inspect(TOP).backing for m in machines}
    assert names <= {"base.raw", "./base.raw"}
    assert Rig(machines[-1]).inspect(TOP).backing == "./base.raw"


@pytest.mark.parametrize("variant", ["v20", "v18", "v10"])
@pytest.mark.parametrize(
    ("old", "new"), [(3, 1200), (1200, 3), (600, 700), (1200, 1201), (200, 250), (1900, 10)]
)
def test_rename_of_long_names_cut_anywhere(rng, variant, old, new):
    """This test covers names over several sectors: a torn one might not even open."""
    old_name, new_name = ("./" * (n // 2) + "base.raw" for n in (old, new))
    host, _ = machine(variant, 9, 5, 0, 1, backing=old_name.encode())
    rig = Rig(host)
    machines = survivors(host, rng, lambda: rig.rename(TOP, backing=(new_name, "raw")), each=12)
    found = [Rig(m).inspect(TOP) for m in machines]
    assert {f.backing for f in found} <= {old_name, new_name}
    assert {f.data_file for f in found} == {"disk.raw"}
    assert found[-1].backing == new_name
    driver = rig.open(TOP)
    assert rig.run(driver.check("")).findings == []


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("long", ["", "./" * 480])
def test_rename_to_nothing_cut_anywhere(rng, variant, long):
    host, _ = machine(variant, 9, 5, 0x1FF, 1, backing=long.encode() + b"base.raw")
    rig = Rig(host)
    machines = survivors(host, rng, lambda: rig.rename(TOP, backing=("", None)), each=12)
    assert {Rig(m).inspect(TOP).backing for m in machines} == {None, long + "base.raw"}
    for survivor in machines[::5]:
        again = Rig(survivor).open(TOP)
        assert set(disk(again, survivor.content)) == {0xEE}
    assert b"base" not in host.content(TOP)


def test_rename_without_room_to_spare_still_works(rng):
    """This test covers a header so full that the new names cannot stand beside the old."""
    host, _ = machine("v20", 9, 5, 0, 1, backing=b"./" * 1000 + b"base.raw")
    rig = Rig(host)
    rig.rename(TOP, backing=("./" * 1100 + "base.raw", "raw"))
    assert rig.inspect(TOP).backing == "./" * 1100 + "base.raw"
    driver = rig.open(TOP)
    assert rig.run(driver.check("")).findings == []


# ---- creation ----


@pytest.mark.parametrize("variant", ["v20", "v10", "v7"])
@pytest.mark.parametrize("backing", [None, "base.raw"])
@pytest.mark.parametrize("seed", range(4))
def test_create_cut_anywhere_leaves_a_pair_or_no_image(rng, variant, backing, seed):
    host = SimHost(seed)
    host.put(BASE, base_of(65536))
    rig = Rig(host)
    options = {"cluster_size": "4k"} if variant == "v20" else {}
    machines = survivors(
        host, rng, lambda: rig.create(TOP, 131072, backing=backing, compat=variant, **options)
    )
    base = base_of(65536) if backing else b""
    for survivor in machines:
        if "top" in survivor.names("/sim"):
            assert look(survivor, base) == base.ljust(131072, b"\0")
    assert look(machines[-1], base) == base.ljust(131072, b"\0")


def test_create_cut_while_replacing_leaves_the_old_or_the_new(rng):
    host = SimHost(1)
    host.put(BASE, base_of(65536))
    rig = Rig(host)
    rig.create(TOP, 65536, image_file="old.raw")
    for survivor in survivors(
        host, rng, lambda: rig.create(TOP, 131072, backing="base.raw", image_file="new.raw"), each=6
    ):
        shown = look(survivor, base_of(65536))
        assert shown in (bytes(65536), base_of(65536).ljust(131072, b"\0"))


# ---- flush ----


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_flush_makes_no_bit_durable_before_its_data(rng, variant, seed):
    """This test covers driver defect 1, and v18's flush that wrote the bitmap first."""
    host, step = machine(variant, 12, 12, 0b10, seed)
    base = base_of(12 * step)
    old = look(host, base)
    rig = Rig(host)
    driver = rig.open(TOP)

    def change():
        for cluster in (0, 3, 4, 11):
            rig.fill(driver, cluster * step, b"w" * step)
        rig.flush(driver)

    new = bytearray(old)
    for cluster in (0, 3, 4, 11):
        new[cluster * step : (cluster + 1) * step] = b"w" * step
    for survivor in survivors(host, rng, change):
        shown = look(survivor, base)
        for start in range(0, len(shown), 512):
            part = slice(start, start + 512)
            assert shown[part] in (old[part], new[part]), f"garbage at {start}"
    driver.close()
    assert look(host.power_cut(rng), base) == bytes(new)


def test_full_disk_at_flush_loses_nothing(rng):
    host, step = machine("v20", 12, 12, 0, 1)
    rig = Rig(host)
    driver = rig.open(TOP)
    rig.fill(driver, 0, b"w" * step)
    host.faults = [Fault(0, errno.ENOSPC, kind="write", path=TOP)]
    with pytest.raises(StorageError):
        rig.flush(driver)
    assert kinds(driver, 0, step) == [(0, step, "DATA")]
    rig.flush(driver)
    driver.close()
    assert look(host.power_cut(rng), base_of(12 * step))[:step] == b"w" * step


def test_any_call_failing_at_open_is_told_and_nothing_stays_open():
    for at in range(40):
        host, _ = machine("v20", 12, 12, 0, 1)
        fault = Fault(at)
        host.faults = [fault]
        rig = Rig(host)
        with suppress(StorageError, ChainError):
            rig.open(TOP)
        if not fault.struck:
            return
        host.faults = []
        if not rig.opened:
            rig.open(TOP)
    raise AssertionError("open never finished")


# ---- what a failure leaves behind, looked at from inside ----


def test_failed_grow_gives_the_bitmap_file_back(rng):
    host, step = machine("v7", 10, 5000, 0b1, 1)
    before = host.content(TOP)
    rig = Rig(host)
    driver = rig.open(TOP)
    host.faults = [Fault(0, errno.EFBIG, kind="truncate", path=DATA)]
    with pytest.raises(StorageError):
        rig.run(driver.resize(5000 * step, 5000 * step))
    assert host.faults[0].struck
    assert len(host.content(TOP)) == len(before)
    rig.flush(driver)
    assert host.content(TOP) == before
    assert rig.run(driver.check("")).findings == []


def test_failed_shrink_writes_the_cleared_bits_with_the_next_flush(rng):
    host, step = machine("v20", 16, 16, 0xFFFF, 1)
    rig = Rig(host)
    driver = rig.open(TOP)
    host.faults = [Fault(0, errno.ENOSPC, kind="write", path=TOP)]
    with pytest.raises(StorageError):
        rig.run(driver.resize(4 * step, 16 * step))
    assert driver.info.size == 4 * step
    rig.flush(driver)
    assert host.content(TOP)[C : C + 2] == b"\x0f\x00"


@pytest.mark.parametrize("variant", ["v20", "v10"])
def test_failed_drop_backing_writes_nothing_later(rng, variant):
    host, _ = machine(variant, 9, 5, 0x1FF, 1)
    before = host.content(TOP)
    rig = Rig(host)
    driver = rig.open(TOP)
    host.faults = [Fault(0, errno.ENOSPC, kind="write", path=TOP)]
    with pytest.raises(StorageError):
        rig.run(driver.drop_backing())
    rig.flush(driver)
    assert host.content(TOP) == before
    assert driver.backing is not None
