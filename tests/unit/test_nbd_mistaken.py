# SPDX-License-Identifier: MIT
"""An image file that is served as raw by mistake, and a raw disk that only looks like one."""

from __future__ import annotations

import asyncio
import logging
import os

import pytest

import mmcow
import mmcow.aio
from tests.unit.nbd_client import connect
from tests.unit.nbd_serving import MIB, open_descriptors

SIZE = 4 * MIB
REFUSED = "vm.raw: is an add-cow image .perhaps made one by a live snapshot.*leave -f out"
CHANGED = "vm.raw was opened as raw and is an add-cow image from now on"


def serve(disk, tmp_path, work=None, **options):
    """Serve ``disk`` and do ``work``, a coroutine function of the server."""

    async def main():
        async with mmcow.serve(disk, socket=tmp_path / "s", **options) as server:
            if work is not None:
                await work(server)

    before = open_descriptors()
    try:
        asyncio.run(main())
    finally:
        assert open_descriptors() == before


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.fixture
def vm(tmp_path, rng):
    path = tmp_path / "vm.raw"
    path.write_bytes(rng.randbytes(SIZE))
    return path


def snapshot(server):
    return server.snapshot("old.raw")


@pytest.mark.parametrize("how", ["path", "open"])
def test_raw_disk_after_its_snapshot_is_refused_as_raw(vm, tmp_path, caplog, how):
    content = vm.read_bytes()
    serve(vm, tmp_path, snapshot, format="raw")
    assert [CHANGED in line for line in warnings_of(caplog)] == [True]
    caplog.clear()
    bitmap = vm.read_bytes()
    if how == "path":
        with pytest.raises(mmcow.UsageError, match=REFUSED):
            serve(vm, tmp_path, format="raw")
    else:

        async def given():
            image = await mmcow.aio.open(vm, format="raw", write=True)
            async with mmcow.serve(image, socket=tmp_path / "s"):
                pass

        with pytest.raises(mmcow.UsageError, match=REFUSED):
            asyncio.run(given())
    assert vm.read_bytes() == bitmap
    assert not os.path.exists(tmp_path / "s")

    async def read(_):
        def talk():
            with connect(str(tmp_path / "s"), "") as client:
                found = client.read(0, SIZE)
                client.disconnect()
                return found

        assert await asyncio.to_thread(talk) == content

    serve(vm, tmp_path, read)
    assert warnings_of(caplog) == []


def test_snapshot_of_a_disk_of_another_format_warns_of_nothing(vm, tmp_path, caplog):
    path = tmp_path / "vm.acow"
    mmcow.create(path, backing="vm.raw", backing_format="raw")
    serve(path, tmp_path, lambda server: server.snapshot("old.acow"))
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("compat", ["v20", "v10", "v7"])
def test_every_add_cow_image_is_refused_as_raw(tmp_path, compat):
    path = tmp_path / "vm.raw"
    mmcow.create(path, format="add-cow", size=SIZE, options={"compat": compat})
    with pytest.raises(mmcow.UsageError, match=REFUSED):
        serve(path, tmp_path, format="raw")


@pytest.mark.parametrize("what", ["image", "itself", "nothing", "damaged", "cow"])
def test_guest_cannot_lock_its_disk(vm, tmp_path, caplog, what):
    """It has written an image's header, whole and right, to the start of its disk."""
    guests = tmp_path / "guests"
    options = {}
    if what == "itself":  # as long as the image of so small a disk
        vm.write_bytes(bytes(8192))
        options = {"image_file": "vm.raw"}
    format_ = "cow" if what == "cow" else "add-cow"
    mmcow.create(guests, format=format_, size=8192, options=options)
    head = bytearray(guests.read_bytes()[:8192])
    if what == "nothing":
        os.unlink(tmp_path / "guests.raw")
    elif what == "damaged":
        head[8:16] = b"\xff" * 8
    with open(vm, "r+b") as file:
        file.write(head)
    before = vm.read_bytes()
    serve(vm, tmp_path, format="raw")
    begins = f"begins like {format_}, and is served as raw"
    assert [begins in line for line in warnings_of(caplog)] == [True]
    assert vm.read_bytes() == before
