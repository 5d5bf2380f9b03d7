# SPDX-License-Identifier: MIT
"""The real programs: found or skipped, run with a time limit, and cleaned up after.

Owns: ``requires`` (a skip on a laptop, a failure where CI=true), running programs, a qemu-io that
keeps a file open, loop devices, mounts, file hashes.

Everything made here is undone by a context manager, also when the test fails.
"""

from __future__ import annotations

import hashlib
import os
import select
import shutil
import subprocess
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMEOUT = 60

# What to install for a program, on Debian.
_PACKAGES = {
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "fio": "fio",
    "mkfs.xfs": "xfsprogs",
    "mkfs.ext4": "e2fsprogs",
    "mke2fs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "mkfs.btrfs": "btrfs-progs",
    "losetup": "mount",
}


def requires(*programs: str, root: bool = False) -> None:
    """Skip the test where something is missing; fail it where CI=true."""
    missing = [
        f"{name} (package {_PACKAGES.get(name, name)})" for name in programs if not which(name)
    ]
    if root and os.geteuid() != 0:
        missing.append("root")
    if root and not missing and not _loop_works():
        missing.append("loop devices")
    if not missing:
        return
    reason = "needs " + ", ".join(missing)
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(reason)
    pytest.skip(reason)


def which(name: str) -> str | None:
    """Where a program is; also looks where root's tools are when PATH does not."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


_loop_checked: list[bool] = []


def _loop_works() -> bool:
    if not _loop_checked:
        found = which("losetup")
        ended = found and subprocess.run([found, "-f"], capture_output=True, check=False)
        _loop_checked.append(bool(ended) and ended.returncode == 0)
    return _loop_checked[0]


class Failed(AssertionError):
    """A program ended with another exit code than expected."""


def run(
    *command: str | Path,
    ok: tuple[int, ...] = (0,),
    timeout: float = TIMEOUT,
    cwd: str | Path | None = None,
    stdin: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end. Its exit code must be one of ``ok`` (empty: any)."""
    words = [str(word) for word in command]
    words[0] = which(words[0]) or words[0]
    ended = subprocess.run(
        words, text=True, capture_output=True, timeout=timeout, cwd=cwd, check=False, input=stdin
    )
    if ok and ended.returncode not in ok:
        raise Failed(
            f"{' '.join(words)} ended with {ended.returncode}\n{ended.stdout}{ended.stderr}"
        )
    return ended


def qemu_io(
    path: str | Path, *commands: str, fmt: str = "raw", options: tuple[str, ...] = ()
) -> str:
    """Run qemu-io commands on a file; returns what it printed.

    qemu-io's exit code does not tell of a failed pattern, its text does.
    """
    words: list[str] = []
    for command in commands:
        words += ["-c", command]
    ended = run("qemu-io", *options, "-f", fmt, path, *words)
    if "verification failed" in ended.stdout:
        raise Failed(f"qemu-io {path} {commands}\n{ended.stdout}")
    return ended.stdout


class QemuIo:
    """A qemu-io that has a file open until ``close``. ``pid`` is its process."""

    def __init__(self, path: str | Path, *options: str, fmt: str = "raw") -> None:
        program = which("qemu-io") or "qemu-io"
        self._process = subprocess.Popen(
            [program, *options, "-f", fmt, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.pid = self._process.pid
        try:
            self._await_prompt()
        except BaseException:
            self.close()
            raise

    def _await_prompt(self) -> bytes:
        assert self._process.stdout is not None
        seen = b""
        end = time.monotonic() + TIMEOUT
        while b"qemu-io> " not in seen:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise Failed(f"qemu-io gave no prompt: {seen!r}")
            part = os.read(self._process.stdout.fileno(), 65536)
            if not part:
                assert self._process.stderr is not None
                raise Failed(self._process.stderr.read().decode())
            seen += part
        return seen

    def do(self, command: str) -> str:
        """Run one command; returns what it printed."""
        assert self._process.stdin is not None
        self._process.stdin.write(command.encode() + b"\n")
        self._process.stdin.flush()
        return self._await_prompt().decode()

    def close(self) -> None:
        """End it; its locks go with it."""
        with suppress(OSError, ValueError):
            self._process.communicate(b"quit\n", timeout=10)
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---- devices and mounts ----


@contextmanager
def loop_device(
    backing: str | Path, *, sector: int = 512, direct: bool = False, read_only: bool = False
) -> Iterator[str]:
    """A loop device over a file; detached at the end."""
    options = ["--direct-io=on"] if direct else []
    options += ["-r"] if read_only else []
    device = run("losetup", "-f", "--show", "-b", str(sector), *options, backing).stdout.strip()
    try:
        yield device
    finally:
        _retry("losetup", "-d", device)


# The smallest that each mkfs takes, rounded up.
FS_SIZE = {"ext4": 32 << 20, "xfs": 320 << 20, "btrfs": 128 << 20, "tmpfs": 64 << 20}
_MKFS = {
    "ext4": ("mkfs.ext4", "-q", "-F"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}


def requires_fs(kind: str) -> None:
    """Root, and what makes a file system of that kind."""
    programs = () if kind == "tmpfs" else (_MKFS[kind][0], "losetup")
    requires(*programs, root=True)
    if kind != "tmpfs" and which("modprobe"):
        run("modprobe", "-q", kind, ok=())
    known = Path("/proc/filesystems").read_text(encoding="ascii").split()
    if kind not in known:
        reason = f"needs a kernel with {kind}"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(reason)
        pytest.skip(reason)


@contextmanager
def mounted(
    kind: str, folder: Path, *, size: int | None = None, sector: int = 512, options: str = ""
) -> Iterator[Path]:
    """A new small file system over a loop device, mounted; yields its mount point.

    The file under the loop device is ``folder / "disk.img"``.
    """
    size = FS_SIZE[kind] if size is None else size
    point = folder / "mnt"
    point.mkdir()
    with ExitStack() as stack:
        if kind == "tmpfs":
            run("mount", "-t", "tmpfs", "-o", f"size={size}", "mmcow-test", point)
        else:
            image = folder / "disk.img"
            with image.open("wb") as file:
                file.truncate(size)
            device = stack.enter_context(loop_device(image, sector=sector))
            extra = ("-s", f"size={sector}") if kind == "xfs" and sector != 512 else ()
            run(*_MKFS[kind], *extra, device)
            run("mount", "-t", kind, *(("-o", options) if options else ()), device, point)
        stack.callback(_unmount, point)
        yield point


@contextmanager
def mount_image(image: Path, point: Path, *, options: str = "") -> Iterator[Path]:
    """Mount a file with a file system in it, through a loop device."""
    point.mkdir(exist_ok=True)
    with loop_device(image) as device:
        run("mount", *(("-o", options) if options else ()), device, point)
        try:
            yield point
        finally:
            _unmount(point)


def fs_kind(point: Path) -> str:
    """The kind of file system mounted at ``point``."""
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        if line.split()[1] == str(point):
            return line.split()[2]
    raise Failed(f"nothing is mounted at {point}")


def _unmount(point: Path) -> None:
    _retry("umount", str(point))


def _retry(*command: str) -> None:
    """What is busy for a moment (a scanner, a late writeback) is not for long."""
    for _ in range(50):
        ended = run(*command, ok=())
        if ended.returncode == 0:
            return
        time.sleep(0.1)
    raise Failed(f"{' '.join(command)}: {ended.stderr}")


# ---- files ----


def sha256(path: str | Path) -> str:
    """Of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def allocated(path: str | Path) -> int:
    """Bytes that a file occupies."""
    return Path(path).stat().st_blocks * 512


def lock_bytes(pid: int, path: str | Path) -> set[int]:
    """Which bytes of a file a process has locked through open file descriptions."""
    inode = f":{Path(path).stat().st_ino} "
    found: set[int] = set()
    for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
        with suppress(OSError):
            for line in entry.read_text(encoding="ascii").splitlines():
                if line.startswith("lock:") and inode in line:
                    first, last = line.split()[-2:]
                    found |= set(range(int(first), int(last) + 1))
    return found
