# SPDX-License-Identifier: MIT
"""The folder in which it happens: images made once, new ones for each run, and the end of it all.

Owns: files, their sizes and content, the loop-mounted XFS; removes everything it made.
Never: measures.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from bench import ours, peers
from bench.model import GIB, MIB, MMCOW, TIB
from bench.process import Failed, installed, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

# Of the disk's size: images over it, a raw one, what first writes add, and the jobs' images.
_SPACE = 8


class Skipped(Exception):
    """What a cell needs is not here."""


@dataclass(frozen=True)
class Scale:
    """How much is done. ``seconds``: what a run is to take, about."""

    disk: int
    job_disk: int
    wide: int
    seconds: float


FULL = Scale(2 * GIB, GIB, TIB, 1.0)
QUICK = Scale(512 * MIB, 256 * MIB, 256 * GIB, 0.3)
PERIOD = 2 * MIB  # of the wide disk's extents


class Lab:
    """A temporary folder below ``parent``, gone at the end."""

    def __init__(self, parent: Path, scale: Scale, seed: int) -> None:
        self.scale = scale
        self.seed = seed
        self._stack = ExitStack()
        self._made: dict[str, Path] = {}
        if "," in str(parent):
            raise Failed(f"{parent}: a comma in a name means something to qemu-img")
        free = shutil.disk_usage(parent).free
        need = _SPACE * scale.disk
        if free < need:
            raise Failed(f"{parent}: {free >> 20} MiB are free, {need >> 20} MiB are needed")
        self.folder = Path(tempfile.mkdtemp(prefix="mmcow-bench-", dir=parent))
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    # ---- what every run shares ----

    def raw(self, name: str, size: int) -> Path:
        """A raw file without holes; equal sizes have equal content."""
        path = self.folder / f"{name}-{size}.raw"
        if path.name not in self._made:
            _write_content(path, size, self.seed)
            self._made[path.name] = path
        return path

    def base(self) -> Path:
        """Below what is measured."""
        return self.raw("base", self.scale.disk)

    def mapped(self, side: str, size: int) -> Path:
        """A layer over the base that has everything itself."""
        base = self.raw("base", size)
        path = self.folder / f"mapped-{side.replace(' ', '-')}-{size}"
        if path.name not in self._made:
            self.fill(side, path, base)
            extents = ours.extents_of(path) if side == MMCOW else peers.extents_of(path)
            if sum(e["length"] for e in extents if e["depth"] == 0 and e["data"]) != size:
                raise Failed(f"{path.name}: not all of it is in the top layer: {extents[:3]}")
            self._made[path.name] = path
        return path

    def wide(self, side: str) -> Path:
        """A disk of very many extents; all read as zeros, none has bytes on the disk."""
        path = self.folder / f"wide-{side}"
        if path.name not in self._made:
            base = self.sparse("wide-base.raw", self.scale.wide)
            self.create(side, path, base)
            if side == MMCOW:
                ours.write_bits(path, self.scale.wide, PERIOD)
            else:
                peers.write_zero_clusters(path, self.scale.wide, PERIOD)
            self.settle(path)
            self._made[path.name] = path
        return path

    def sparse(self, name: str, size: int, folder: Path | None = None) -> Path:
        """A raw file of holes."""
        path = (folder or self.folder) / name
        with path.open("wb") as file:
            file.truncate(size)
        return path

    # ---- new in each run ----

    def create(self, side: str, path: Path, base: Path) -> Path:
        """An empty layer of a side's format; one of the same name is removed first."""
        self.remove(path)
        if side == MMCOW:
            ours.create(path, base)
        else:
            peers.create(path, base, side)
        return path

    def fresh(self, side: str) -> Path:
        """An empty layer over the base."""
        return self.create(side, self.folder / f"new-{side.replace(' ', '-')}", self.base())

    def fill(self, side: str, path: Path, base: Path) -> Path:
        """A layer that has all of its base's content itself."""
        self.create(side, path, base)
        (ours if side == MMCOW else peers).fill(path, base)
        self.settle(path)
        return path

    def remove(self, path: Path) -> None:
        """An image and its data file, if they are there."""
        for name in (path, data_file(path)):
            with suppress(FileNotFoundError):
                name.unlink()

    def settle(self, path: Path) -> None:
        """Nothing of an image is left to be written, or in the page cache."""
        for name in (path, data_file(path)):
            if name.exists():
                with name.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def data_bytes(self, path: Path) -> int:
        """What an image occupies."""
        return sum(name.stat().st_blocks * 512 for name in (path, data_file(path)) if name.exists())

    def sync(self, path: Path) -> None:
        """Nothing is left to be written."""
        with path.open("rb") as file:
            os.fsync(file.fileno())

    @contextmanager
    def cached(self, path: Path) -> Iterator[None]:
        """The page cache has all of a file while the block runs."""
        self.warm(path)
        try:
            yield
        finally:
            self.settle(path)

    @staticmethod
    def warm(path: Path) -> None:
        """Read all of a file into the page cache."""
        with path.open("rb") as file:
            while file.read(MIB):
                pass

    # ---- a file system for the largest disk ----

    def place(self, name: str) -> Path:
        """The folder itself, or a loop-mounted XFS."""
        if name == "here":
            return self.folder
        if name not in self._made:
            self._made[name] = self._mount_xfs()
        return self._made[name]

    def _mount_xfs(self) -> Path:
        if os.geteuid() != 0 or not installed("mkfs.xfs") or not installed("losetup"):
            raise Skipped("needs root, mkfs.xfs and losetup for an XFS")
        image = self.sparse("xfs.img", 16 * GIB)
        point = self.folder / "xfs"
        point.mkdir()
        run("mkfs.xfs", "-q", "-f", image)
        device = run("losetup", "-f", "--show", image).output.strip()
        self._stack.callback(run, "losetup", "-d", device)
        try:
            run("mount", "-t", "xfs", device, point)
        except Failed as error:
            raise Skipped(str(error)) from error
        self._stack.callback(run, "umount", point)
        return point


def data_file(path: Path) -> Path:
    """Where an add-cow image keeps its data by default."""
    return path.with_name(path.name + ".raw")


def _write_content(path: Path, size: int, seed: int) -> None:
    """No two blocks of 1 MiB are equal, none compresses or is zero."""
    block = random.Random(seed).randbytes(MIB)
    with path.open("wb") as file:
        for number in range(size // MIB):
            file.write(number.to_bytes(8, "little") + block[8:])
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
