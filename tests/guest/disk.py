# SPDX-License-Identifier: MIT
"""An ext4 as base, what the guest promised about it, and judges of what came out.

Owns: the seeded content, the promises read off the console, fsck and reading without root.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.guest.vm import Guest, file_drive, run_mmcow
from tests.interop.tools import Failed, run, sha256

BASE_SIZE = 48 << 20
BASE_FILES = 40
BLOB_KIB = 2048


def digest(content: bytes) -> str:
    """What the guest's sha256sum says."""
    return hashlib.sha256(content).hexdigest()


@dataclass
class Base:
    """A raw file with an ext4 on it. ``files``: path to checksum. ``blob``: more content."""

    path: Path
    files: dict[str, str] = field(repr=False)
    blob: bytes = field(repr=False)
    checksum: str

    def untouched(self, folder: Path) -> None:
        """The copy that a test worked over is still what it was."""
        assert sha256(folder / "base.raw") == self.checksum


def make_base(folder: Path, rng: random.Random, *, size: int = BASE_SIZE) -> Base:
    """An ext4 with ``BASE_FILES`` files, made without root."""
    tree = folder / "tree"
    tree.mkdir()
    files = {}
    for number in range(BASE_FILES):
        content = rng.randbytes(rng.choice((0, 1, 700, 5000, 70_000, 400_000, 1_500_000)))
        name = f"old{number:02}"
        (tree / name).write_bytes(content)
        files[name] = digest(content)
    path = folder / "base.raw"
    with path.open("wb") as file:
        file.truncate(size)
    run(
        "mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", tree, "-E", "root_owner=0:0", path
    )  # fmt: skip
    shutil.rmtree(tree)
    return Base(path, files, rng.randbytes(BLOB_KIB << 10), sha256(path))


def copy_folder(source: Path, target: Path) -> Path:
    """The images of a folder in another one, holes as holes."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in (".raw", ".acow"):
            run("cp", "--sparse=always", path, target)
    return target


@dataclass
class Promises:
    """What a console said is durable: ``files`` as Base.files, ``doubtful`` names in between."""

    files: dict[str, str]
    doubtful: set[str] = field(default_factory=set)
    count: int = 0  # promises, also those that later ones replaced

    @classmethod
    def read(cls, base: Base, lines: list[str], start: dict[str, str] | None = None) -> Self:
        """From a console's lines. Checks each checksum against the content that was meant."""
        self = cls(dict(base.files if start is None else start))
        for line in lines:
            words = line.split()
            if words[:2] == ["@@", "BEGIN"] and len(words) == 3:
                self.doubtful.add(words[2])
            elif words[:2] == ["@@", "SYNCED"] and len(words) == 6:
                name, first, count, checksum = words[2:]
                content = base.blob[int(first) << 10 :][: int(count) << 10]
                if digest(content) != checksum:
                    raise Failed(f"the guest read back something else: {line}")
                self.files[name] = checksum
                self.doubtful.discard(name)
                self.count += 1
            elif words[:2] == ["@@", "GONE"] and len(words) == 3:
                self.files.pop(words[2], None)
                self.doubtful.discard(words[2])
                self.count += 1
        return self

    def check(self, found: dict[str, str], *, others: str = "") -> None:
        """Every promise is kept, and there is nothing else but ``others`` (a name's start)."""
        for name, checksum in self.files.items():
            if name not in self.doubtful and found.get(name) != checksum:
                raise Failed(f"{name}: promised {checksum}, found {found.get(name)}")
        extra = set(found) - set(self.files) - self.doubtful
        if others:
            extra = {name for name in extra if not name.startswith(others)}
        if extra:
            raise Failed(f"files that nobody wrote, or that were removed: {sorted(extra)}")


def touched(lines: list[str]) -> set[str]:
    """Names that a part of a console tells about."""
    marks = ("@@ BEGIN", "@@ SYNCED", "@@ GONE")
    return {line.split()[2] for line in lines if line.startswith(marks) and len(line.split()) > 2}


def fsck(path: Path) -> None:
    """The ext4 in a raw file has nothing to repair, to the letter."""
    run("e2fsck", "-fn", path)


def files_in(path: Path) -> dict[str, str]:
    """Path: checksum of all files of an ext4 in a raw file."""
    out = path.with_name(f"{path.name}.tree")
    out.mkdir()
    ended = run("debugfs", "-R", f"rdump / {out}", path)
    problems = [line for line in ended.stderr.splitlines() if not line.startswith("debugfs ")]
    if [line for line in problems if "while changing ownership" not in line]:
        raise Failed(f"debugfs {path}: {ended.stderr}")
    found = {
        str(one.relative_to(out)): sha256(one) for one in sorted(out.rglob("*")) if one.is_file()
    }
    shutil.rmtree(out)
    return found


def judge(path: Path, promises: Promises, *, others: str = "") -> None:
    """Clean to fsck, and holds what was promised."""
    fsck(path)
    promises.check(files_in(path), others=others)


def flattened(folder: Path, image: str) -> Path:
    """``image`` read through mmcow into a raw file."""
    run_mmcow(folder, "convert", "-O", "raw", image, f"{image}.flat")
    return folder / f"{image}.flat"


def mounts(count: int) -> str:
    """A job: mount and unmount disk after disk, for the kernel to replay their journals."""
    return "".join(
        f"mount -t ext4 /dev/vd{letter} /mnt\numount /mnt\n" for letter in "abcdefgh"[:count]
    )


def replay(folder: Path, *paths: Path) -> None:
    """Let a kernel replay the journals of raw files."""
    with Guest(folder, mounts(len(paths)), *map(file_drive, paths)) as guest:
        guest.finish()
