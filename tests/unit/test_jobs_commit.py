# SPDX-License-Identifier: MIT
"""commit: over chains of every format and sizes that differ, stopped anywhere, cut anywhere."""

from __future__ import annotations

import os
import random
import shutil

import pytest

import mmcow
from mmcow.jobs import commit as commit_module
from mmcow.jobs import copying
from mmcow.jobs import progress as progress_module
from mmcow.jobs.commit import commit
from mmcow.jobs.rebase import rename
from tests.sim.host import SimHost
from tests.unit.jobs_helpers import (
    KIB,
    MIB,
    Chain,
    Stop,
    check_content,
    fitted,
    scribble,
    stop_at,
)

ODD = 3 * MIB + 5 * 512
SMALL = {"cluster_size": "4k"}
CHAINS = {
    "add-cow-over-raw": [("raw", ODD, {}), ("add-cow", ODD, SMALL)],
    "v10-over-raw": [("raw", ODD, {}), ("add-cow", ODD, {"compat": "v10"})],
    "v7-over-raw": [("raw", ODD, {}), ("add-cow", ODD, {"compat": "v7"})],
    "add-cow-over-odd-raw": [("raw", ODD + 100, {}), ("add-cow", ODD + 512, {})],
    "add-cow-over-longer-raw": [("raw", 4 * MIB + 100, {}), ("add-cow", ODD, {})],
    "add-cow-over-shorter-raw": [("raw", 1 * MIB + 100, {}), ("add-cow", ODD, SMALL)],
    "cow-over-raw": [("raw", ODD, {}), ("cow", ODD, {})],
    "cow-over-shorter-raw": [("raw", MIB, {}), ("cow", ODD, {})],
    "add-cow-over-cow": [("raw", 2 * MIB, {}), ("cow", ODD, {}), ("add-cow", ODD, {})],
    "cow-over-add-cow": [("raw", 2 * MIB, {}), ("add-cow", ODD, {}), ("cow", ODD, {})],
    "cow-over-shorter-add-cow": [
        ("raw", 4 * MIB, {}),
        ("add-cow", 1 * MIB + 512, {}),
        ("cow", ODD, {}),
    ],
    "add-cow-over-complete": [("add-cow", MIB, {}), ("add-cow", ODD, SMALL)],
}
DEEP = {
    "same-sizes": [
        ("raw", ODD, {}),
        ("cow", ODD, {}),
        ("add-cow", ODD, SMALL),
        ("add-cow", ODD, {}),
    ],
    "short-in-between": [
        ("raw", ODD, {}),
        ("add-cow", 1 * MIB + 512, SMALL),
        ("add-cow", ODD + 512, {}),
    ],
    "long-in-between": [
        ("raw", MIB, {}),
        ("add-cow", 4 * MIB, SMALL),
        ("cow", ODD, {}),
    ],
}


def committed(base, top):
    """What the base shows afterwards."""
    return bytearray(top) + base[len(top) :]


def allocated(chain, number=-1):
    with chain.open(number) as disk:
        return disk.engine.top.allocated()


def options(chain, number=-1):
    """How ``commit`` must be called."""
    number %= len(chain.names)
    if chain.formats[number] == "cow":
        return {"backing_format": chain.formats[number - 1]}
    return {}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("case", CHAINS)
def test_commit(tmp_path, case, keep):
    chain = Chain(tmp_path / "chain", CHAINS[case], seed=len(case))
    before = allocated(chain)
    seen = stop_at(-1)
    moved = commit(chain.top, keep=keep, progress=seen, **options(chain))
    assert 0 < moved <= len(chain.models[-1])
    assert seen.seen[0] == (0, len(chain.models[-1]))
    assert seen.seen[-1] == (len(chain.models[-1]), len(chain.models[-1]))
    assert allocated(chain) == (before if keep else 0)
    check_content(chain, -1, chain.models[-1])
    check_content(chain, -2, committed(chain.models[-2], chain.models[-1]))
    if len(chain.names) > 2:
        check_content(chain, 0, chain.models[0])
    # Nothing is left to be done, and nothing is done.
    assert keep or commit(chain.top, **options(chain)) == 0


@pytest.mark.parametrize("format_", ["add-cow", "cow"])
def test_commit_of_many_small_ranges(tmp_path, format_):
    """This test has more ranges than one buffer takes, and gaps that must stay the base's."""
    options_ = SMALL if format_ == "add-cow" else {}
    layers = [("raw", 2 * MIB, {}), (format_, 2 * MIB, options_)]
    chain = Chain(tmp_path / "chain", layers, seed=2, writes=3)
    step, length = (8192, 4096) if format_ == "add-cow" else (1536, 512)
    rng = random.Random(3)
    with chain.open(write=True) as disk:
        for offset in range(MIB, 2 * MIB - step, step):
            data = rng.randbytes(length)
            disk.write(offset, data)
            chain.models[-1][offset : offset + length] = data
    commit(chain.top)
    assert allocated(chain) == 0
    check_content(chain, 0, chain.models[-1])
    check_content(chain, 1, chain.models[-1])


def test_commit_interrupted_by_the_keyboard(tmp_path, monkeypatch):
    monkeypatch.setattr(commit_module, "BATCH", 256 * KIB)
    monkeypatch.setattr(progress_module, "_STEP_LEAST", 1)
    chain = Chain(tmp_path / "chain", CHAINS["add-cow-over-raw"], seed=4)

    def progress(done, _):
        if done > MIB:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        commit(chain.top, progress=progress)
    check_content(chain, -1, chain.models[-1])
    commit(chain.top)
    check_content(chain, 0, chain.models[-1])


def test_commit_of_an_empty_disk(tmp_path):
    chain = Chain(tmp_path / "chain", CHAINS["add-cow-over-raw"], seed=4)
    mmcow.create(
        tmp_path / "chain" / "top",
        size=0,
        backing=chain.names[0],
        backing_format="raw",
    )
    assert commit(tmp_path / "chain" / "top") == 0
    check_content(chain, 0, chain.models[0])


def test_commit_grows_a_base_for_an_empty_longer_image(tmp_path):
    chain = Chain(tmp_path / "chain", [("raw", 8192, {}), ("add-cow", 8192, SMALL)], seed=4)
    with chain.open(write=True, cache="writeback") as disk:
        disk.resize(65536)
        content = disk.read(0, 65536)
    commit(chain.top)
    check_content(chain, 0, content)
    check_content(chain, 1, content)


def test_commit_gives_the_space_back(tmp_path):
    chain = Chain(tmp_path / "chain", CHAINS["add-cow-over-raw"], seed=1)
    commit(chain.top)
    assert os.stat(chain.top + ".raw").st_blocks == 0


def test_commit_of_a_magic_into_an_unrecorded_raw_base_is_refused(tmp_path):
    """This test wants a guest unable to turn the raw base below a cow image into another format."""
    chain = Chain(tmp_path / "chain", CHAINS["cow-over-raw"], seed=1)
    with chain.open(write=True) as disk:
        disk.write(0, b"QFI\xfb\0\0\0\3")
    with pytest.raises(mmcow.UsageError, match="look like qcow2"):
        commit(chain.top)
    commit(chain.top, backing_format="raw")


def test_commit_keeps_a_cow_image_in_step_with_its_base(tmp_path):
    chain = Chain(tmp_path / "chain", CHAINS["cow-over-raw"], seed=1)
    os.utime(chain.path(0), (10**9, 10**9))
    mmcow.open(chain.top).close()
    rename(chain.top, backing=chain.names[0])
    with chain.open() as disk:
        assert disk.warnings == []
    commit(chain.top)
    with chain.open() as disk:
        assert disk.warnings == []
    os.utime(chain.path(0), (10**9, 10**9))
    rename(chain.top, backing=chain.names[0])
    os.utime(chain.path(0), (10**9 + 5, 10**9 + 5))
    with chain.open(write=True) as disk:
        assert disk.warnings != []
        disk.write(0, b"\1")
    commit(chain.top)
    with chain.open() as disk:
        assert disk.warnings != []  # it had changed before; that is still to be told


@pytest.mark.parametrize("case", DEEP)
def test_commit_into_a_deeper_base(tmp_path, case):
    chain = Chain(tmp_path / "chain", DEEP[case], seed=len(case))
    before = allocated(chain)
    commit(chain.top, base=chain.path(0), **options(chain))
    check_content(chain, 0, committed(chain.models[0], chain.models[-1]))
    assert allocated(chain) == before
    check_content(chain, -1, chain.models[-1])  # what it showed it still shows


def test_commit_into_the_middle(tmp_path):
    chain = Chain(tmp_path / "chain", DEEP["same-sizes"], seed=11)
    commit(chain.top, base=chain.path(1))
    check_content(chain, 0, chain.models[0])
    check_content(chain, 1, committed(chain.models[1], chain.models[-1]))
    check_content(chain, -1, chain.models[-1])


def test_commit_into_the_named_immediate_base_empties(tmp_path):
    chain = Chain(tmp_path / "chain", DEEP["same-sizes"], seed=12)
    commit(chain.top, base=chain.path(2))
    assert allocated(chain) == 0
    check_content(chain, -1, chain.models[-1])


def test_commit_refuses(tmp_path):
    chain = Chain(tmp_path / "chain", CHAINS["add-cow-over-raw"], seed=1)
    other = tmp_path / "other"
    other.write_bytes(b"\1" * 512)
    with pytest.raises(mmcow.UsageError, match="no backing file"):
        commit(chain.path(0))
    with pytest.raises(mmcow.UsageError, match="not in its backing chain"):
        commit(chain.top, base=other)
    alone = tmp_path / "alone"
    mmcow.create(alone, size=MIB)
    with pytest.raises(mmcow.UsageError, match="all-allocated"):
        commit(alone)
    with pytest.raises(mmcow.DeniedError):
        commit(chain.top, policy=mmcow.DenyAll())
    with chain.open(0), pytest.raises(mmcow.LockedError):
        commit(chain.top)
    with chain.open(), pytest.raises(mmcow.LockedError):
        commit(chain.top)
    check_content(chain, -1, chain.models[-1])


def test_commit_of_a_loop_is_refused(tmp_path):
    chain = Chain(tmp_path / "chain", CHAINS["add-cow-over-raw"], seed=1)
    os.symlink(chain.names[1], tmp_path / "chain" / "again")
    rename(chain.top, backing="again", backing_format="add-cow")
    with pytest.raises(mmcow.ChainError, match="loop"):
        commit(chain.top)


@pytest.mark.parametrize(
    ("case", "base"),
    [
        ("add-cow-over-shorter-raw", None),
        ("cow-over-shorter-add-cow", None),
        ("add-cow-over-cow", None),
        ("short-in-between", 0),
    ],
)
def test_commit_stopped_at_every_batch(tmp_path, monkeypatch, case, base):
    monkeypatch.setattr(progress_module, "_STEP_LEAST", 1)
    monkeypatch.setattr(commit_module, "BATCH", 256 * KIB)
    monkeypatch.setattr(copying, "PIECE", 64 * KIB)
    original = Chain(tmp_path / "original", {**CHAINS, **DEEP}[case], seed=5)
    target = -2 if base is None else base
    number, stopped = 0, True
    while stopped:
        chain = original.copy(tmp_path / "chain")
        where = None if base is None else chain.path(base)
        try:
            commit(chain.top, base=where, progress=stop_at(number), **options(chain))
            stopped = False
        except Stop:
            pass
        check_content(chain, -1, chain.models[-1])
        commit(chain.top, base=where, **options(chain))
        check_content(chain, -1, chain.models[-1])
        check_content(chain, target, committed(chain.models[target], chain.models[-1]))
        if base is None:
            assert allocated(chain) == 0
        shutil.rmtree(tmp_path / "chain")
        number += 1
    assert number > 10


# ---- power cuts ----

SIM_CHAINS = [
    [("raw", 96 * KIB, {}), ("add-cow", 96 * KIB, SMALL)],
    [("raw", 40 * KIB + 100, {}), ("add-cow", 96 * KIB + 512, SMALL)],
    [("raw", 96 * KIB, {}), ("add-cow", 64 * KIB, {"cluster_size": "16k"})],
    [("raw", 40 * KIB, {}), ("cow", 64 * KIB, {})],
    [("raw", 64 * KIB, {}), ("add-cow", 40 * KIB, SMALL), ("add-cow", 96 * KIB, SMALL)],
    [("raw", 64 * KIB, {}), ("cow", 64 * KIB, {}), ("add-cow", 64 * KIB, SMALL)],
]


def simulated_chain(host, layers, rng):
    """The layers on a simulated machine, under /d; paths and models, base first."""
    host.put("/d/0", bytes(layers[0][1]))
    paths, models = ["/d/0"], [bytearray(-(-layers[0][1] // 512) * 512)]
    for number, (format_, size, opts) in enumerate(layers):
        path = f"/d/{number}"
        if number:
            mmcow.create(
                path,
                format=format_,
                size=size,
                backing=str(number - 1),
                backing_format=layers[number - 1][0],
                options=opts,
                host=host,
            )
            paths.append(path)
            models.append(fitted(models[-1], size))
        backing_format = layers[number - 1][0] if number and format_ == "cow" else None
        with mmcow.open(
            path, format=format_, write=True, host=host, backing_format=backing_format
        ) as disk:
            scribble(rng, disk, models[-1], 6, most=24 * KIB)
            disk.write(0, b"\1")
            models[-1][0] = 1
    return paths, models


def read_all(path, format_, host):
    with mmcow.open(path, format=format_, host=host) as disk:
        return disk.read(0, disk.size), disk.engine.top.allocated()


def run_commit_with_cuts(seed, kind):
    print("seed", seed, kind)
    rng = random.Random(seed)
    layers = rng.choice(SIM_CHAINS)
    host = SimHost(seed)
    paths, models = simulated_chain(host, layers, rng)
    cuts = []

    def watch(_):
        if rng.random() < 0.12:
            cuts.append(getattr(host, kind)(rng))

    host.watch = watch
    commit(paths[-1], host=host)
    host.watch = None
    after = committed(models[-2], models[-1])
    format_ = layers[-1][0]
    assert read_all(paths[-1], format_, host) == (models[-1], 0)
    assert read_all(paths[-2], layers[-2][0], host)[0] == after
    for cut in cuts:
        same = read_all(paths[-1], format_, cut)[0] == models[-1]
        assert same, "content after the cut"  # a diff of bytes takes minutes
        commit(paths[-1], host=cut)
        assert read_all(paths[-1], format_, cut) == (models[-1], 0), "after the second run"
        assert read_all(paths[-2], layers[-2][0], cut)[0] == after
    return len(cuts)


@pytest.mark.parametrize("kind", ["power_cut", "kill"])
def test_commit_cut_anywhere(monkeypatch, kind):
    monkeypatch.setattr(commit_module, "BATCH", 16 * KIB)
    monkeypatch.setattr(copying, "PIECE", 8 * KIB)
    cuts = sum(run_commit_with_cuts(seed, kind) for seed in range(60))
    print(cuts, "cuts")
    assert cuts > 100


def test_commit_in_the_wrong_order_is_caught(monkeypatch):
    """This test gives the overlay's clusters up before the base is durable, and wants that seen."""
    monkeypatch.setattr(commit_module, "BATCH", 16 * KIB)
    monkeypatch.setattr(copying, "PIECE", 8 * KIB)
    monkeypatch.setattr(mmcow.Image, "flush", lambda _: None)

    def unordered():
        for seed in range(40):
            run_commit_with_cuts(seed, "power_cut")

    with pytest.raises(AssertionError, match="content after the cut"):
        unordered()
