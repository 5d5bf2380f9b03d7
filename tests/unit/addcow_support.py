# SPDX-License-Identifier: MIT
"""What the add-cow tests share: a rig over a real or simulated host, and headers from the spec."""

from __future__ import annotations

import struct
from random import Random

from mmcow.engine.flush import Flusher
from mmcow.engine.hits import Hits
from mmcow.formats.addcow import AddCowFormat
from mmcow.formats.driver import Kind
from mmcow.formats.guard import Guard
from mmcow.formats.opening import Access, CreateRequest, Opener
from mmcow.ranges import align_up
from mmcow.storage.file import Cache
from mmcow.storage.linux import LinuxHost
from mmcow.tasks import Reactor

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


def request(size=None, backing=None, backing_format="raw", backing_size=None, **options):
    return CreateRequest(
        size=size,
        backing=backing,
        backing_format=backing_format if backing else None,
        backing_size=backing_size,
        backing_mtime=0,
        backing_is_raw=backing_format == "raw",
        options=options,
    )


class Rig:
    """An opener, a reactor, and the format under test."""

    def __init__(self, host=None, policy=None):
        self.host = host or LinuxHost()
        self.queue = self.host.queue()
        self.reactor = Reactor(self.queue)
        self.opener = Opener(self.host, self.reactor, self.queue, policy)
        self.format = AddCowFormat()
        self.opened = []

    def create(self, path, size=None, **rest):
        return self.format.create(self.opener, str(path), request(size, **rest))

    def open(self, path, *, write=True, top=True, share=False, cache=Cache.WRITEBACK):
        driver = Guard(self.format.open(self.opener, str(path), Access(write, top, share, cache)))
        self.opened.append(driver)
        return driver

    def inspect(self, path):
        handle = self.host.open(str(path), write=False, direct=False)
        try:
            return self.format.inspect(str(path), handle)
        finally:
            handle.close()

    def rename(self, path, **names):
        self.format.rename(self.opener, str(path), **names)

    def run(self, coroutine):
        return self.reactor.run(coroutine)

    def flush(self, driver):
        self.run(Flusher(self.reactor, driver, Hits()).flush())

    def fill(self, driver, offset, data):
        """What the engine does for whole clusters: reserve, write, publish."""
        length = align_up(len(data), driver.info.cluster_size)
        reservation = driver.reserve(offset, length)
        self.reactor.wait(driver.data.write(offset, (memoryview(data),)))
        driver.publish(reservation)

    def close(self):
        for driver in self.opened:
            if not driver._closed:
                driver.close()
        self.queue.close()


def kinds(driver, offset=0, length=None):
    """The layer's answer for a range as (offset, length, kind name)."""
    end = driver.info.size if length is None else offset + length
    found = []
    while offset < end:
        for extent in driver.map(offset, end - offset):
            found.append((extent.offset, extent.length, extent.kind.name))
            offset += extent.length
    return found


def disk(driver, content, base=b""):
    """What a guest reads: ``content(path)`` gives a file's bytes."""
    data = content(driver.data.path)
    result = bytearray()
    for offset, length, kind in kinds(driver):
        source = data if kind == Kind.DATA.name else base
        result += source[offset : offset + length].ljust(length, b"\0")
    return bytes(result[: driver.info.size])


def v20(
    *,
    bits=16,
    backing=b"base.raw",
    image=b"disk.raw",
    features=0,
    compat=0,
    header_size=None,
    backing_fmt=b"raw",
    image_fmt=b"raw",
    backing_at=None,
    image_at=None,
    bitmap=b"",
):
    """A v20 file by the specification's table, sharing nothing with mmcow's writer."""
    size = max(4096, 1 << bits) if header_size is None else header_size
    offset, length = backing_at or ((76, len(backing)) if backing else (0, 0))
    image_offset, image_length = image_at or (76 + len(backing), len(image))
    fixed = struct.pack(
        "<4sIIIIIQQI16s16s",
        b"ACOW",
        offset,
        length,
        image_offset,
        image_length,
        bits,
        features,
        compat,
        size,
        backing_fmt if backing else b"",
        image_fmt,
    )
    return (fixed + backing + image).ljust(max(4096, 1 << bits), b"\0") + bitmap


def v10(*, backing=b"base.raw", image=b"disk.raw", features=1, version=1, bitmap=b"", at=None):
    offset = 36 if backing else 0
    fields = at or (offset, len(backing), 36 + len(backing), len(image))
    fixed = b"ADD_COW\xff" + struct.pack("<IIIIIQ", version, *fields, features if backing else 0)
    return (fixed + backing + image).ljust(4096, b"\0") + bitmap


def v7(*, backing=b"base.raw", image=b"disk.raw", version=1, bitmap=b""):
    fixed = b"ADD_COW\xff" + struct.pack(">I1024s1024s", version, backing, image)
    return fixed.ljust(2560, b"\0") + bitmap


def survivors(host, rng: Random, action, each=3):
    """Run ``action``; yield machines that lost power at each of its storage calls, and after it."""
    machines = []

    def watch(_kind):
        host.watch = None  # a cut is no call of the run
        machines.extend(host.power_cut(Random(rng.getrandbits(48))) for _ in range(each))
        host.watch = watch

    host.watch = watch
    try:
        action()
    finally:
        host.watch = None
    machines.extend(host.power_cut(Random(rng.getrandbits(48))) for _ in range(each))
    return machines
