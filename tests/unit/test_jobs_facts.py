# SPDX-License-Identifier: MIT
"""check, info and rename."""

from __future__ import annotations

import os

import pytest

import mmcow
from mmcow.jobs.check import check
from mmcow.jobs.info import inspect, inspect_chain
from mmcow.jobs.progress import Meter
from mmcow.jobs.rebase import rename
from tests.unit.jobs_helpers import MIB, Chain, check_content, stop_at

ODD = 3 * MIB + 5 * 512
THREE = [("raw", 2 * MIB + 100, {}), ("cow", ODD, {}), ("add-cow", ODD, {"cluster_size": "4k"})]


@pytest.fixture
def three(tmp_path):
    return Chain(tmp_path / "chain", THREE, seed=1)


# ---- progress ----


@pytest.mark.parametrize("total", [0, 1, 10 * MIB, 1 << 40])
def test_meter_calls_at_both_ends_and_not_too_often(total):
    seen = stop_at(-1)
    meter = Meter(seen, total)
    for done in range(0, total + 1, max(total // 100000, 1 << 16)):
        meter.reached(done)
    meter.finish()
    assert seen.seen[0] == (0, total)
    assert seen.seen[-1] == (total, total)
    assert seen.seen == sorted(seen.seen)
    assert len(seen.seen) <= total // MIB + 2
    assert len(set(seen.seen)) >= len(seen.seen) - 1


# ---- check ----


def test_check_finds_nothing(three):
    for number, format_ in enumerate(three.formats):
        report = check(three.path(number), format=format_)
        assert report.is_clean
        assert report.format == format_
        assert report.filename == three.path(number)
        assert report.result.allocated <= report.result.total


def test_check_repairs_a_leak(three):
    with open(three.top, "ab") as file:
        file.write(b"\0" * 4096)
    report = check(three.top)
    assert (report.leaks, report.corruptions, report.leaks_fixed) == (1, 0, 0)
    report = check(three.top, repair="leaks")
    assert (report.leaks, report.corruptions, report.leaks_fixed) == (0, 0, 1)
    assert check(three.top).is_clean
    check_content(three, -1, three.models[-1])


def test_check_does_not_open_what_lies_below(three):
    os.unlink(three.path(0))
    assert check(three.top).is_clean


def test_check_refuses(three):
    with pytest.raises(mmcow.UsageError, match="must be one of"):
        check(three.top, repair="everything")
    with pytest.raises(mmcow.UsageError, match="looking only"):
        check(three.top, repair="all", share=True)
    with three.open(write=True):
        with pytest.raises(mmcow.LockedError):
            check(three.top)
        assert check(three.top, share=True).format == "add-cow"


# ---- info ----


def test_inspect_tells_the_header(three):
    info = inspect(three.top)
    assert info.format == "add-cow"
    assert info.virtual_size == ODD
    assert info.cluster_size == 4096
    assert (info.backing, info.backing_format, info.has_backing) == ("1.cow", "cow", True)
    assert info.backing_path == three.path(1)
    assert info.data_file == "2.add-cow.raw"
    assert info.data_file_path == three.top + ".raw"
    assert info.data_file_size == ODD
    assert info.data_file_actual_size == os.stat(three.top + ".raw").st_blocks * 512
    assert info.actual_size == os.stat(three.top).st_blocks * 512
    raw = inspect(three.path(0))
    assert (raw.format, raw.virtual_size, raw.backing) == ("raw", 2 * MIB + 512, None)


def test_inspect_opens_nothing_that_is_named(tmp_path):
    """This test names a FIFO: opening it would hang or be refused."""
    chain = Chain(tmp_path / "chain", THREE, seed=1)
    for name in ("1.cow", "2.add-cow.raw"):
        os.unlink(tmp_path / "chain" / name)
        os.mkfifo(tmp_path / "chain" / name)
    info = inspect(chain.top)
    assert info.virtual_size is None
    assert info.backing_path == chain.path(1)
    os.unlink(tmp_path / "chain" / "2.add-cow.raw")
    info = inspect(chain.top)
    assert (info.data_file_size, info.virtual_size) == (None, None)
    with pytest.raises(mmcow.ChainError, match=r"1\.cow"):
        inspect_chain(chain.top)


def test_inspect_takes_a_lock(three):
    with three.open(write=True):
        with pytest.raises(mmcow.LockedError):
            inspect(three.top)
        assert inspect(three.top, share=True).virtual_size == ODD
    with three.open():
        assert inspect(three.top).virtual_size == ODD


def test_inspect_chain_follows_names(three):
    chain = inspect_chain(three.top)
    assert [info.format for info in chain] == ["add-cow", "cow", "raw"]
    assert [info.path for info in chain] == [three.path(n) for n in (2, 1, 0)]
    with pytest.raises(mmcow.DeniedError):
        inspect_chain(three.top, policy=mmcow.DenyAll())


def test_inspect_chain_finds_loops(three):
    os.symlink(three.names[2], os.path.join(three.directory, "again"))
    rename(three.path(1), backing="again")
    with pytest.raises(mmcow.ChainError, match="loop"):
        inspect_chain(three.top, backing_format="add-cow")
    with pytest.raises(mmcow.ChainError, match="begins like add-cow"):
        inspect_chain(three.top)


def test_inspect_chain_ends_where_nothing_below_is_in_use(tmp_path):
    alone = tmp_path / "alone"
    mmcow.create(alone, size=MIB)
    assert [info.has_backing for info in inspect_chain(alone)] == [False]


# ---- rename ----


def test_rename_backing_and_its_format(three):
    os.rename(three.path(1), three.path(1) + ".moved")
    rename(three.top, backing="1.cow.moved", backing_format="cow")
    check_content(three, -1, three.models[-1])
    rename(three.top, backing_format="raw")
    assert inspect(three.top).backing_format == "raw"
    assert inspect(three.top).backing == "1.cow.moved"
    rename(three.top, backing_format="cow")
    check_content(three, -1, three.models[-1])


def test_rename_data_file(three):
    os.rename(three.top + ".raw", three.top + ".data")
    rename(three.top, data_file="2.add-cow.data")
    check_content(three, -1, three.models[-1])


def test_rename_removes_the_name_only_where_nothing_is_lost(three):
    with pytest.raises(mmcow.UsageError, match="lost"):
        rename(three.top, backing="")
    with three.open(write=True) as disk:
        disk.write(0, disk.read(0, disk.size))
    rename(three.top, backing="")
    assert inspect(three.top).backing is None
    check_content(three, -1, three.models[-1])


def test_rename_refuses(three):
    with pytest.raises(mmcow.UsageError, match="nothing to change"):
        rename(three.top)
    with pytest.raises(mmcow.UsageError, match="without its name"):
        rename(three.top, backing="x", data_file_format="raw")
    with pytest.raises(mmcow.UsageError, match="records no"):
        rename(three.path(0), backing="x")
    with pytest.raises(mmcow.UsageError, match="records no backing"):
        rename(three.path(0), backing_format="raw")
    with pytest.raises(mmcow.UsageError, match=r"'bogus' of the base.* raw, add-cow, cow .*qcow2"):
        rename(three.top, backing="x", backing_format="bogus")
    with pytest.raises(mmcow.UsageError, match="'bogus' of the base"):
        rename(three.top, backing_format="bogus")
    assert inspect(three.top).backing_format == "cow"
    with three.open(), pytest.raises(mmcow.LockedError):
        rename(three.top, backing="elsewhere")
