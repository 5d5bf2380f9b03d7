# SPDX-License-Identifier: MIT
"""Disks to be stopped in the middle: every format, over bases of odd sizes, over garbage."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import mmcow
from tests.fault.model import BASE, GARBAGE, SECTOR, Model, content, decode
from tests.fault.writer import Disk
from tests.interop.tools import sha256

if TYPE_CHECKING:
    from pathlib import Path


class Kind(NamedTuple):
    """A way to make a disk. ``base``: sectors of the base, 0 for none."""

    name: str
    format: str
    options: dict[str, str]
    base: int
    size: int  # sectors
    garbage: bool = False
    middle: bool = False  # a second overlay below the one that is written
    resizable: bool = True


KINDS = (
    Kind("v20-4k", "add-cow", {"cluster_size": "4k"}, base=1501, size=2003),
    Kind("v20-64k", "add-cow", {"cluster_size": "64k"}, base=2907, size=2003),
    Kind("v20-2M-garbage", "add-cow", {"cluster_size": "2M"}, base=1203, size=3001, garbage=True),
    Kind("v20-16k-garbage", "add-cow", {"cluster_size": "16k"}, base=3001, size=3001, garbage=True),
    Kind("v20-no-base", "add-cow", {}, base=0, size=1777),
    Kind("v10", "add-cow", {"compat": "v10"}, base=2003, size=1003, garbage=True),
    Kind("v7", "add-cow", {"compat": "v7"}, base=999, size=2222),
    Kind("three-layers", "add-cow", {"cluster_size": "8k"}, base=1111, size=2222, middle=True),
    Kind("cow", "cow", {}, base=2049, size=2049, resizable=False),
    Kind("uml3", "cow", {"compat": "uml3"}, base=2049, size=2049, resizable=False),
    Kind("raw", "raw", {}, base=0, size=2003),
)


class Subject:
    """A disk in a folder, the model of it, and what must not change."""

    def __init__(
        self, folder: Path, kind: Kind, *, cache: str = "auto", backend: str = "auto"
    ) -> None:
        self.kind = kind
        self.path = folder / "top"
        self.base = folder / "base"
        below = self._make_base(folder)
        if kind.garbage:
            data = content(GARBAGE, 0, kind.size * SECTOR)
            (folder / "top.raw").write_bytes(data)
        backing, format_ = below if below is not None else (None, None)
        mmcow.create(
            self.path, format=kind.format, size=None if kind.garbage else kind.size * SECTOR,
            backing=backing, backing_format=format_, options=kind.options,
        )  # fmt: skip
        self.disk = Disk(str(self.path), kind.format, cache, backend, kind.resizable, 2 << 20)
        self.hashes = self._hash()
        shown = min(kind.base, kind.size)
        self.model = Model(
            [BASE] * shown + [0] * (kind.size - shown),
            write_through=cache in ("directsync", "writethrough"),
        )

    def _make_base(self, folder: Path) -> tuple[str, str] | None:
        if not self.kind.base:
            return None
        self.base.write_bytes(content(BASE, 0, self.kind.base * SECTOR))
        if not self.kind.middle:
            return "base", "raw"
        path = folder / "middle"
        mmcow.create(path, backing="base", backing_format="raw")
        with mmcow.open(path, write=True) as image:  # same content, from another layer
            image.write(8192, content(BASE, 8192, 32768))
        return "middle", "add-cow"

    def _hash(self) -> dict[str, str]:
        return {
            str(path): sha256(path)
            for path in self.path.parent.iterdir()
            if path.name in ("base", "middle", "middle.raw")
        }

    def inspect(self, disk: Disk | None = None, *, write: bool = False) -> list[str]:
        """Open the disk, judge its content, check it; returns what is wrong. The model goes on
        from what was found."""
        with (self.disk if disk is None else disk).open(write=write) as image:
            values = decode(image.read(0, image.size))
            result = image.reactor.run(image.layers[0].driver.check(""))
        wrong = self.model.judge(values)
        wrong += [f.text for f in result.findings if f.kind != "leak"]
        if self._hash() != self.hashes:
            wrong.append("the base was changed")
        self.model.accept(values)
        return wrong


def explain(wrong: list[str], most: int = 12) -> str:
    """For an assertion's message."""
    return "\n".join([*wrong[:most], *([f"... {len(wrong)} in all"] if len(wrong) > most else [])])
