# SPDX-License-Identifier: MIT
"""Every operation, in any order, on every format, against a bytearray.

A Hypothesis state machine drives one disk: a chain of three whose layers have odd sizes, the data
files full of garbage wherever a format may have garbage. ``MMCOW_HYPOTHESIS`` picks how long: quick
(default), ci or soak. A failure prints the steps, and how to repeat them.

What concurrent requests may leave behind, per 512-byte sector of the disk:

- Requests that overlap in a sector took effect there in *some* serial order; different sectors may
  have seen different orders.
- A read that runs beside them sees, per sector, what some of them left in some order.
- A discarded sector holds what it held, or zeros; from then on it is stable.
"""

from __future__ import annotations

import itertools
import os
import shutil
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import mmcow
from mmcow.formats.driver import Kind
from mmcow.image import Image
from mmcow.ranges import align_up
from mmcow.storage.linux import LinuxHost
from tests.conftest import SEED

SECTOR = 512

_BASICS = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "database": None,
    "print_blob": True,
}
PROFILES = {
    "quick": settings(max_examples=12, stateful_step_count=20, **_BASICS),
    "ci": settings(max_examples=40, stateful_step_count=30, **_BASICS),
    "soak": settings(max_examples=1500, stateful_step_count=60, **_BASICS),
}
PROFILE = os.environ.get("MMCOW_HYPOTHESIS", "quick")
_SECTORS = st.integers(-40, 40).map(lambda sectors: sectors * SECTOR)


@dataclass(frozen=True)
class Variant:
    """A format of the top layer, and the sizes that are interesting for it."""

    name: str
    format: str
    options: tuple[tuple[str, str], ...]
    cluster: int


VARIANTS = (
    Variant("raw", "raw", (), 512),
    Variant("v20-4k", "add-cow", (("cluster_size", "4k"),), 4096),
    Variant("v20-64k", "add-cow", (("cluster_size", "64k"),), 65536),
    Variant("v20-2m", "add-cow", (("cluster_size", "2M"),), 2 << 20),
    Variant("v18-512", "add-cow", (), 512),
    Variant("v10", "add-cow", (("compat", "v10"),), 65536),
    Variant("v7", "add-cow", (("compat", "v7"),), 512),
    Variant("cow-x86-64", "cow", (("compat", "x86-64"),), 512),
    Variant("cow-i386", "cow", (("compat", "i386"),), 512),
    Variant("cow-uml3", "cow", (("compat", "uml3"),), 512),
)


def v18_image(path: Path, size: int, backing: str, backing_format: str, image: str) -> None:
    """Write a v18 add-cow file with clusters of 512 bytes, which mmcow reads but never makes."""
    names = (backing + image).encode()
    head = struct.pack(
        "<4sIIIIIQQI16s16s",
        b"ACOW", 76, len(backing), 76 + len(backing), len(image), 9, 0, 0, 4096,
        backing_format.encode(), b"raw",
    )  # fmt: skip
    bitmap = align_up(-(-(align_up(size, SECTOR) // SECTOR) // 8), 512)
    path.write_bytes((head + names).ljust(4096, b"\0") + bytes(bitmap))


def pattern(tag: int, length: int) -> bytes:
    """Bytes that differ from sector to sector and from tag to tag, and hardly ever are zero."""
    block = bytes((tag * 37 + i * 11) % 255 + 1 for i in range(509))
    return (block * (length // 509 + 1))[:length]


class DiskMachine(RuleBasedStateMachine):
    """One disk, its chain and its model. Subclasses by ``machine`` fix the format."""

    variant: Variant
    cache: str
    backend: str

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="mmcow-model-"))
        self.host = LinuxHost(self.backend)
        self.image: Image | None = None
        self.model = bytearray()
        self.tag = 0
        self.depth = 0
        self.top = self.directory / "none"
        self.open_args: dict[str, str] = {}

    # ---- setting up ----

    @initialize(data=st.data())
    def build(self, data: st.DataObject) -> None:
        cluster = max(self.variant.cluster, 4096)
        size = st.integers(cluster + 1, 4 * cluster + 3000)
        base_length = data.draw(size, label="base length")
        if data.draw(st.booleans(), label="base has no odd end"):
            base_length = align_up(base_length, SECTOR)
        base = self.directory / "base.raw"
        base.write_bytes(pattern(1, base_length))
        if self.variant.format == "raw":
            self.top = base
            self.open_args = {"format": "raw"}
            self.model = bytearray(pattern(1, base_length).ljust(align_up(base_length, SECTOR)))
            self.model[base_length:] = bytes(len(self.model) - base_length)
        else:
            middle_size = data.draw(size, label="middle size")
            content = self.fit(pattern(1, base_length), middle_size)
            middle = self.make_middle(base, middle_size)
            content = self.fill_middle(middle, content)
            top_size = data.draw(size, label="top size")
            if self.variant.name == "cow-uml3":
                top_size = len(content)  # it refuses any other
            self.model = self.fit(content, top_size)
            self.make_top(middle, top_size)
        self.reopen()

    @staticmethod
    def fit(content: bytes, size: int) -> bytearray:
        """What a disk of ``size`` shows over a disk of ``content``."""
        size = align_up(size, SECTOR)
        return bytearray(content[:size].ljust(size, b"\0"))

    def make_middle(self, base: Path, size: int) -> Path:
        """A v20 layer over ``base`` with an adopted data file: garbage under every unset bit."""
        middle = self.directory / "middle.acow"
        (self.directory / "middle.acow.raw").write_bytes(pattern(2, size))
        mmcow.create(
            middle, backing=base.name, backing_format="raw", options={"cluster_size": "4k"}
        )
        return middle

    def fill_middle(self, middle: Path, content: bytearray) -> bytearray:
        with mmcow.open(middle, write=True, host=self.host) as image:
            for offset in range(1000, len(content), 23000):
                data = pattern(3, min(5000, len(content) - offset))
                image.write(offset, data)
                content[offset : offset + len(data)] = data
        return content

    def make_top(self, backing: Path, size: int) -> None:
        self.depth += 1
        self.top = self.directory / f"top{self.depth}"
        name = f"{self.top.name}.raw"
        variant = self.variant
        if variant.format == "add-cow":
            (self.directory / name).write_bytes(pattern(4, size))
        if variant.name == "v18-512":
            v18_image(self.top, size, backing.name, "add-cow", name)
            return
        mmcow.create(
            self.top,
            format=variant.format,
            backing=backing.name,
            backing_format="add-cow",
            size=None if variant.format == "add-cow" else size,
            options=dict(variant.options),
        )
        if variant.format == "cow":
            self.fill_cow_with_garbage(size)
        if variant.name in ("v10", "v7") or variant.format == "cow":
            self.open_args = {"backing_format": "add-cow"}

    def fill_cow_with_garbage(self, size: int) -> None:
        """What a crash leaves: bytes under clear bits."""
        with mmcow.open(self.top, backing=False, host=self.host) as image:
            start = image.layers[0].driver.describe()["data-offset"]
        with self.top.open("r+b") as file:
            file.seek(start)
            file.write(pattern(5, align_up(size, SECTOR)))

    def teardown(self) -> None:
        try:
            if self.image is not None:
                with self.image:
                    self.verify()
        finally:
            shutil.rmtree(self.directory)

    # ---- helpers ----

    @property
    def disk(self) -> Image:
        assert self.image is not None
        return self.image

    def fresh(self, length: int) -> bytes:
        self.tag += 1
        return pattern(self.tag + 10, length)

    def draw_range(self, data: st.DataObject, most: int = 3) -> tuple[int, int]:
        """A range with ends near borders: of sectors, blocks, clusters, and of the disk."""
        size = len(self.model)
        unit = data.draw(st.sampled_from((SECTOR, 4096, self.variant.cluster)), label="unit")
        near = st.integers(-2, 2) | st.integers(-700, 700) | st.just(0)

        def border(label: str) -> int:
            at = data.draw(st.integers(0, size // unit + 1), label=label) * unit
            return min(max(at + data.draw(near), 0), size)

        start, end = sorted((border("from"), border("to")))
        longest = max(most * self.variant.cluster, 60000)
        return start, min(end - start, longest)

    def verify(self) -> None:
        found = self.disk.read(0, len(self.model))
        assert self.disk.size == len(self.model)
        if found != bytes(self.model):
            at = next(
                i
                for i, pair in enumerate(zip(found, self.model, strict=True))
                if pair[0] != pair[1]
            )
            raise AssertionError(
                f"byte {at} is {found[at : at + 8]!r}, should be {self.model[at : at + 8]!r}"
            )

    # ---- rules ----

    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        offset, length = self.draw_range(data)
        assert self.disk.read(offset, length) == self.model[offset : offset + length]

    @rule(data=st.data(), skew=st.sampled_from((0, 1, 512)))
    def readinto(self, data: st.DataObject, skew: int) -> None:
        offset, length = self.draw_range(data)
        buffer = bytearray(b"\xaa" * (length + skew + 8))
        view = memoryview(buffer)[skew : skew + length]
        assert self.disk.readinto(offset, view) == length
        assert view == self.model[offset : offset + length]
        assert buffer[:skew] == b"\xaa" * skew
        assert buffer[skew + length :] == b"\xaa" * 8

    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        offset, length = self.draw_range(data)
        content = self.fresh(length)
        assert self.disk.write(offset, content) == length
        self.model[offset : offset + length] = content

    @rule(data=st.data(), may_unmap=st.booleans())
    def write_zeroes(self, data: st.DataObject, may_unmap: bool) -> None:
        offset, length = self.draw_range(data)
        self.disk.write_zeroes(offset, length, may_unmap=may_unmap)
        self.model[offset : offset + length] = bytes(length)

    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        offset, length = self.draw_range(data)
        self.disk.discard(offset, length)
        self.settle_discard(offset, length)

    def settle_discard(self, offset: int, length: int) -> None:
        """Each block inside is old or zero; whichever it is, it stays so."""
        found = self.disk.read(offset, length)
        at = 0
        while at < length:
            step = min(SECTOR - (offset + at) % SECTOR, length - at)
            part = found[at : at + step]
            old = self.model[offset + at : offset + at + step]
            assert part in (bytes(old), bytes(step)), (
                f"discard showed a third thing at {offset + at}"
            )
            self.model[offset + at : offset + at + step] = part
            at += step

    @rule()
    def flush(self) -> None:
        self.disk.flush()

    @precondition(
        lambda self: self.image is not None and self.disk.layers[0].driver.info.can_resize
    )
    @rule(data=st.data())
    def resize(self, data: st.DataObject) -> None:
        size = data.draw(st.integers(0, 5 * max(self.variant.cluster, 4096) + 700), label="size")
        before = len(self.model)
        self.disk.resize(size, shrink=True)
        size = align_up(size, SECTOR)
        assert self.disk.size == size
        self.model = self.model[:size] + bytes(max(size - before, 0))

    @rule(write=st.booleans())
    def reopen(self, write: bool = True) -> None:
        if self.image is not None:
            self.image.close()
        if not write:
            with mmcow.open(
                self.top, cache=self.cache, host=self.host, **self.open_args
            ) as self.image:
                self.verify()
        self.image = mmcow.open(
            self.top, write=True, cache=self.cache, host=self.host, **self.open_args
        )

    @precondition(lambda self: self.depth < 4)
    @rule(data=st.data())
    def overlay(self, data: st.DataObject) -> None:
        """A snapshot: the disk so far becomes the base of a new, empty top of another size."""
        self.disk.close()
        self.image = None
        if self.variant.name in ("cow-uml3", "raw"):
            size = len(self.model)
        else:
            size = data.draw(st.integers(1, len(self.model) + 70000), label="overlay size")
        self.depth += 1
        below, self.top = self.top, self.directory / f"over{self.depth}"
        (self.directory / f"over{self.depth}.raw").write_bytes(pattern(6, size))
        recorded = self.open_args.pop("format", None) or self.variant.format
        chained = self.depth > 1 and below.name.startswith("over")
        mmcow.create(
            self.top,
            backing=below.name,
            backing_format="add-cow" if chained else recorded,
            size=align_up(size, SECTOR),
            check_backing=False,
            options={"cluster_size": "4k"},
        )
        self.model = self.fit(bytes(self.model), size)
        self.reopen()

    @rule(data=st.data())
    def block_status(self, data: st.DataObject) -> None:
        offset, length = self.draw_range(data)
        position = offset
        for status in self.disk.block_status(offset, length):
            assert status.offset == position
            assert status.length > 0
            assert (status.path is None) == (status.host_offset is None)
            part = self.model[position : position + status.length]
            if status.is_zero:
                assert not any(part), f"said to be zero: {status}"
            if status.kind is Kind.DATA and self.cache == "writeback":
                assert self.host_bytes(status) == part
            position += status.length
        assert position == offset + length

    def host_bytes(self, status: mmcow.BlockStatus) -> bytes:
        assert status.path is not None
        with open(status.path, "rb") as file:
            file.seek(status.host_offset or 0)
            return file.read(status.length).ljust(status.length, b"\0")

    @rule(data=st.data(), count=st.integers(2, 4))
    def concurrent(self, data: st.DataObject, count: int) -> None:
        """Requests that overlap, begun at once; the rule stands at the top of this file."""
        middle, _ = self.draw_range(data)
        changes: list[tuple[str, int, bytes]] = []
        reads: list[tuple[int, memoryview]] = []
        disk, engine = self.disk, self.disk.engine
        waits = []
        # All is drawn before anything is begun: Hypothesis may break off in any draw, and then the
        # disk would have, or not have yet, what the model has not.
        plan = [self.draw_request(data, middle) for _ in range(count)]
        order = data.draw(st.permutations(range(count)), label="wait order")
        with disk.reactor.lock:
            for kind, offset, length in plan:
                if kind == "write":
                    content = self.fresh(length)
                    changes.append((kind, offset, content))
                    waits.append(engine.write(offset, memoryview(content)))
                elif kind == "read":
                    into = memoryview(bytearray(length))
                    reads.append((offset, into))
                    waits.append(engine.read(offset, into))
                elif kind == "flush":
                    waits.append(disk.reactor.spawn(engine.flush()))
                else:
                    changes.append((kind, offset, bytes(length)))
                    start = engine.write_zeroes if kind == "zero" else engine.discard
                    waits.append(start(offset, length))
            for i in order:
                disk.reactor.wait(waits[i])
        for offset, into in reads:
            self.check_overlapped(offset, bytes(into), changes, final=False)
        lowest = min((offset for _, offset, _ in changes), default=0) // SECTOR * SECTOR
        highest = align_up(max((o + len(c) for _, o, c in changes), default=0), SECTOR)
        found = disk.read(lowest, highest - lowest)
        self.check_overlapped(lowest, found, changes, final=True)
        self.model[lowest:highest] = found

    def draw_request(self, data: st.DataObject, middle: int) -> tuple[str, int, int]:
        shift = data.draw(st.integers(-9000, 9000) | _SECTORS)
        offset = min(max(middle + shift, 0), len(self.model))
        length = data.draw(st.integers(0, 20000) | _SECTORS.map(abs))
        kind = data.draw(st.sampled_from(("write", "write", "zero", "discard", "read", "flush")))
        return kind, offset, min(length, len(self.model) - offset)

    def check_overlapped(
        self, offset: int, found: bytes, changes: list[tuple[str, int, bytes]], *, final: bool
    ) -> None:
        at = offset
        while at < offset + len(found):
            sector = at // SECTOR * SECTOR
            end = min(sector + SECTOR, offset + len(found))
            part = found[at - offset : end - offset]
            old = bytes(self.model[sector : sector + SECTOR])
            touching = [c for c in changes if c[1] < sector + SECTOR and sector < c[1] + len(c[2])]
            allowed = possible(old, sector, touching, final=final)
            cut = slice(at - sector, end - sector)
            assert any(state[cut] == part for state in allowed), (
                f"sector at {sector} is no serial order of {len(touching)} requests"
            )
            at = end

    @invariant()
    def size_is_right(self) -> None:
        if self.image is not None:
            assert self.image.size == len(self.model)


def possible(
    old: bytes, sector: int, changes: list[tuple[str, int, bytes]], *, final: bool
) -> set[bytes]:
    """What a sector may hold after the changes, in any order; ``final``: after all of them."""
    states = set()
    for count in (len(changes),) if final else range(len(changes) + 1):
        for order in itertools.permutations(changes, count):
            now = {old}
            for kind, offset, content in order:
                done = {apply(state, sector, offset, content) for state in now}
                now = now | done if kind == "discard" else done
            states |= now
    return states


def apply(state: bytes, sector: int, offset: int, content: bytes) -> bytes:
    start, end = max(offset, sector), min(offset + len(content), sector + SECTOR)
    new = bytearray(state)
    new[start - sector : end - sector] = content[start - offset : end - offset]
    return bytes(new)


def _cases() -> list[object]:
    """Every variant meets every cache mode and every queue, in half the combinations each."""
    cases = []
    for i, variant in enumerate(VARIANTS):
        for j, (cache, backend) in enumerate(
            itertools.product(("none", "writeback"), ("io_uring", "threads"))
        ):
            if PROFILE == "quick" and (i + j // 2 + j) % 2:
                continue
            cases.append(
                pytest.param(variant, cache, backend, id=f"{variant.name}-{cache}-{backend}")
            )
    return cases


@pytest.mark.timeout(0 if PROFILE == "soak" else 600)
@pytest.mark.parametrize(("variant", "cache", "backend"), _cases())
def test_disk_behaves_like_a_bytearray(
    variant: Variant, cache: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hypothesis.core.global_force_seed", SEED)
    chosen = {"variant": variant, "cache": cache, "backend": backend}
    machine = type("Disk", (DiskMachine,), chosen)
    run_state_machine_as_test(machine, settings=PROFILES[PROFILE])
