# SPDX-License-Identifier: MIT
"""stream and detach: over chains of every format, stopped anywhere, cut anywhere."""

from __future__ import annotations

import os
import random
import shutil
import threading

import pytest

import mmcow
from mmcow.jobs import progress as progress_module
from mmcow.jobs import stream as stream_module
from mmcow.jobs.detach import detach
from mmcow.jobs.info import inspect
from mmcow.jobs.stream import stream
from tests.sim.host import SimHost
from tests.unit.jobs_helpers import KIB, MIB, Chain, Stop, check_content, stop_at
from tests.unit.test_jobs_commit import SIM_CHAINS, simulated_chain

ODD = 3 * MIB + 5 * 512
SMALL = {"cluster_size": "4k"}
CHAINS = {
    "add-cow-over-raw": [("raw", ODD, {}), ("add-cow", ODD, SMALL)],
    "add-cow-v10": [("raw", ODD, {}), ("add-cow", ODD, {"compat": "v10"})],
    "add-cow-v7": [("raw", ODD, {}), ("add-cow", ODD, {"compat": "v7"})],
    "add-cow-over-odd-raw": [("raw", ODD + 100, {}), ("add-cow", ODD + 512, {})],
    "add-cow-over-longer-raw": [("raw", 4 * MIB + 100, {}), ("add-cow", ODD, {})],
    "add-cow-over-shorter-raw": [("raw", 1 * MIB + 100, {}), ("add-cow", ODD, {})],
    "cow-over-raw": [("raw", ODD, {}), ("cow", ODD, {})],
    "three": [("raw", 2 * MIB, {}), ("cow", 1 * MIB + 512, {}), ("add-cow", ODD, {})],
    "small-below-large": [
        ("raw", 2 * MIB, {}),
        ("add-cow", ODD, SMALL),
        ("add-cow", ODD, {"cluster_size": "256k"}),
    ],
    "cow-over-add-cow": [("raw", 2 * MIB, {}), ("add-cow", ODD, SMALL), ("cow", ODD, {})],
}


def remove_below(chain):
    for number in range(len(chain.names) - 1):
        os.unlink(chain.path(number))


@pytest.mark.parametrize("case", CHAINS)
def test_stream(tmp_path, case):
    chain = Chain(tmp_path / "chain", CHAINS[case], seed=len(case), writes=6)
    model = chain.models[-1]
    seen = stop_at(-1)
    with chain.open(write=True) as disk:
        moved = stream(disk, progress=seen)
        assert 0 < moved <= disk.size
        assert len(disk.chain) == 1
        assert disk.read(0, disk.size) == bytes(model)
        disk.write(4096, b"still usable")
        model[4096 : 4096 + 12] = b"still usable"
        assert stream(disk) == 0
    assert seen.seen[0] == (0, len(model))
    assert seen.seen[-1] == (len(model), len(model))
    remove_below(chain)
    assert inspect(chain.top).backing is None
    with mmcow.open(chain.top) as disk:
        assert disk.read(0, disk.size) == bytes(model)
        assert disk.chain[0].backing is None


def test_stream_keeps_holes(tmp_path):
    base = tmp_path / "base"
    with open(base, "wb") as file:
        file.write(b"\1" * 4096)
        file.truncate(64 * MIB)
    top = tmp_path / "top"
    mmcow.create(top, backing="base", backing_format="raw", options=SMALL)
    with mmcow.open(top, write=True) as disk:
        assert stream(disk) == 4096
    assert os.stat(str(top) + ".raw").st_blocks * 512 <= 64 * KIB


def test_block_status_asked_while_the_chain_is_cut(tmp_path):
    """This test streams between two extents: those of the moment are told, then those of the
    shorter chain, and a layer that is gone is an error."""
    (tmp_path / "base").write_bytes(b"z" * (40 << 20))
    path = tmp_path / "top"
    mmcow.create(path, backing="base", backing_format="raw", options=SMALL)
    with mmcow.open(path, write=True) as disk:
        for offset in range(0, disk.size, 8192):
            disk.write(offset, b"x" * 4096)
        whole, layer = disk.block_status(), disk.block_status(layer=1)
        found = [next(whole)]
        unasked = disk.block_status(layer=1)
        next(layer)
        stream(disk)
        found += whole
        assert sum(status.length for status in found) == disk.size
        assert found[1].depth == 1
        assert found[-1].depth == 0
        with pytest.raises(mmcow.UsageError, match="layer 1 of 1"):
            next(unasked)


def test_stream_refuses(tmp_path):
    chain = Chain(tmp_path / "chain", CHAINS["add-cow-over-raw"], seed=1)
    with chain.open() as disk, pytest.raises(mmcow.ReadOnlyError):
        stream(disk)
    refused = pytest.raises(mmcow.UsageError, match="without its backing file")
    with chain.open(write=True, backing=False) as disk, refused:
        stream(disk)
    with chain.open(0, write=True) as disk:
        assert stream(disk) == 0


@pytest.mark.parametrize("case", ["small-below-large", "cow-over-raw"])
def test_stream_stopped_at_every_piece(tmp_path, monkeypatch, case):
    monkeypatch.setattr(progress_module, "_STEP_LEAST", 1)
    monkeypatch.setattr(stream_module, "PIECE", 128 * KIB)
    monkeypatch.setattr(stream_module, "FLUSH_EVERY", 512 * KIB)
    original = Chain(tmp_path / "original", CHAINS[case], seed=5, writes=8)
    model = bytes(original.models[-1])
    number, stopped = 0, True
    while stopped:
        chain = original.copy(tmp_path / "chain")
        with chain.open(write=True) as disk:
            try:
                stream(disk, progress=stop_at(number))
                stopped = False
            except Stop:
                assert disk.read(0, disk.size) == model
        check_content(chain, -1, model)
        with chain.open(write=True) as disk:
            stream(disk)
        check_content(chain, -1, model)
        shutil.rmtree(tmp_path / "chain")
        number += 1
    assert number > 5


def test_stream_under_traffic(tmp_path):
    """This test writes and reads in other threads while the disk is streamed."""
    chain = Chain(tmp_path / "chain", CHAINS["small-below-large"], seed=9, writes=6)
    model = chain.models[-1]
    half = len(model) // 2 // 512 * 512
    errors, done = [], threading.Event()

    def traffic(start, end, seed):
        rng = random.Random(seed)
        try:
            while not done.is_set():
                length = rng.randrange(1, 64 * KIB)
                offset = rng.randrange(start, end - length)
                if rng.random() < 0.5:
                    data = rng.randbytes(length)
                    disk.write(offset, data)
                    model[offset : offset + length] = data
                elif disk.read(offset, length) != model[offset : offset + length]:
                    errors.append(offset)
                if rng.random() < 0.05:
                    disk.flush()
        except Exception as error:  # noqa: BLE001 - whatever it is, the test has failed
            errors.append(error)

    with chain.open(write=True) as disk:
        threads = [
            threading.Thread(target=traffic, args=(0, half, 1)),
            threading.Thread(target=traffic, args=(half, len(model), 2)),
        ]
        for thread in threads:
            thread.start()
        stream(disk)
        done.set()
        for thread in threads:
            thread.join()
        assert not errors
        assert disk.read(0, disk.size) == bytes(model)
    remove_below(chain)
    with mmcow.open(chain.top) as disk:
        assert disk.read(0, disk.size) == bytes(model)


def run_stream_with_cuts(seed, kind):
    print("seed", seed, kind)
    rng = random.Random(seed)
    layers = rng.choice(SIM_CHAINS)
    host = SimHost(seed)
    paths, models = simulated_chain(host, layers, rng)
    top, model, format_ = paths[-1], bytes(models[-1]), layers[-1][0]
    cuts = []

    def watch(_):
        if rng.random() < 0.15:
            cuts.append(getattr(host, kind)(rng))

    def finish(machine):
        with mmcow.open(top, format=format_, write=True, host=machine) as disk:
            same = disk.read(0, disk.size) == model
            assert same, "content after the cut"  # a diff of bytes takes minutes
            stream(disk)
            assert disk.read(0, disk.size) == model
        with mmcow.open(top, format=format_, backing=False, host=machine) as disk:
            assert disk.read(0, disk.size) == model, "not all in the top layer"
            assert not disk.engine.top.info.has_backing

    host.watch = watch
    with mmcow.open(top, format=format_, write=True, host=host) as disk:
        stream(disk)
    host.watch = None
    for machine in (host, *cuts):
        finish(machine)
    return len(cuts)


@pytest.mark.parametrize("kind", ["power_cut", "kill"])
def test_stream_cut_anywhere(monkeypatch, kind):
    monkeypatch.setattr(stream_module, "PIECE", 8 * KIB)
    monkeypatch.setattr(stream_module, "FLUSH_EVERY", 24 * KIB)
    assert sum(run_stream_with_cuts(seed, kind) for seed in range(60)) > 100


def test_stream_that_forgets_to_flush_is_caught(monkeypatch):
    """This test drops the base without making the bits durable, and wants that seen."""

    async def drop_backing(engine):
        await engine.top.drop_backing()
        del engine.layers[1:]

    monkeypatch.setattr("mmcow.image.CHECK_DRIVERS", False)
    monkeypatch.setattr("mmcow.storage.window.Window.dirty", lambda _: 0)
    monkeypatch.setattr("mmcow.engine.engine.Engine.drop_backing", drop_backing)

    def forgetful():
        for seed in range(40):
            run_stream_with_cuts(seed, "power_cut")

    with pytest.raises(AssertionError, match=r"content after the cut|not all in the top"):
        forgetful()


# ---- detach ----


def test_detach_leaves_a_raw_disk(tmp_path):
    chain = Chain(tmp_path / "chain", CHAINS["three"], seed=1)
    with pytest.raises(mmcow.UsageError, match=r"\d+ of 769 clusters .*mmcow stream"):
        detach(chain.top)
    with chain.open(write=True) as disk:
        stream(disk)
    assert detach(chain.top) == chain.top + ".raw"
    assert not os.path.exists(chain.top)
    with mmcow.open(chain.top + ".raw", format="raw") as disk:
        assert disk.read(0, disk.size) == bytes(chain.models[-1])


def test_detach_wants_every_bit_not_the_flag(tmp_path):
    chain = Chain(tmp_path / "chain", CHAINS["add-cow-over-raw"], seed=1)
    with chain.open(write=True) as disk:
        content = disk.read(0, disk.size)
        disk.write(0, content)
    assert detach(chain.top) == chain.top + ".raw"


def test_detach_refuses(tmp_path):
    chain = Chain(tmp_path / "chain", CHAINS["cow-over-raw"], seed=1)
    for number in (0, 1):
        with pytest.raises(mmcow.UsageError, match="only add-cow"):
            detach(chain.path(number))
    alone = tmp_path / "alone"
    mmcow.create(alone, size=MIB)
    with mmcow.open(alone), pytest.raises(mmcow.LockedError):
        detach(alone)
    with pytest.raises(mmcow.DeniedError):
        detach(alone, policy=mmcow.DenyAll())
    assert detach(alone) == str(alone) + ".raw"


def test_detach_cut_anywhere():
    for seed in range(30):
        rng = random.Random(seed)
        host = SimHost(seed)
        host.put("/d/base", rng.randbytes(64 * KIB))
        mmcow.create("/d/top", backing="base", backing_format="raw", options=SMALL, host=host)
        with mmcow.open("/d/top", write=True, host=host) as disk:
            model = disk.read(0, disk.size)
            stream(disk)
        cuts = []
        host.watch = lambda _, host=host, cuts=cuts, rng=rng: cuts.append(host.power_cut(rng))
        assert detach("/d/top", host=host) == "/d/top.raw"
        host.watch = None
        assert "top" not in host.names("/d")
        for cut in (host, *cuts):
            assert cut.content("/d/top.raw") == model
        assert "top" not in host.power_cut(rng).names("/d")
