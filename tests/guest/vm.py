# SPDX-License-Identifier: MIT
"""A real Linux in a virtual machine, and the mmcow server that its disk comes from.

Owns: the initramfs (busybox, modules, a job, payload), QEMU with a captured console, the server as
a process, ``requires_guest``.
Never: waits without a limit; leaves a process behind.

The guest runs a shell script, the job. What it prints reaches ``Guest.lines``; what the test says
to it arrives at the job's ``read``. KVM is not used: emulation boots in seconds everywhere.
"""

from __future__ import annotations

import functools
import json
import lzma
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import pytest

from tests.interop import tools

ROOT = Path(__file__).parents[2]
KERNEL = ROOT / ".cache" / "guest"  # filled by `make deps-interop`
QEMU = "qemu-system-x86_64"
BOOT_SECONDS = 60.0
STEP_SECONDS = 60.0

_PROGRAMS = {QEMU: "qemu-system-x86", "mke2fs": "e2fsprogs", "debugfs": "e2fsprogs"}
# In order of loading. What is not there as a file is built into the kernel.
_MODULES = (
    "virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci",
    "virtio_blk", "crc16", "crc32c_generic", "libcrc32c", "mbcache", "jbd2", "ext4",
)  # fmt: skip

_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /proc /sys /mnt /mnt2
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
stty -echo -onlcr
for module in $(cat /modules/order); do insmod /modules/$module.ko || echo "@@ no $module"; done
echo "@@ BOOTED"
sh -eu /job
echo "@@ END $?"
poweroff -f
"""

# Words for jobs. Each prints its line after what it says is durable: a promise.
_WORDS = r"""
# put FOLDER NAME START COUNT: a file from the payload's blob, in KiB, synced
put() {
    echo "@@ BEGIN $2"
    dd if=/blob "of=$1/$2" bs=1k "skip=$3" "count=$4" conv=fsync 2>/dev/null || return 1
    sync "$1" || return 1
    sum=$(sha256sum "$1/$2") || return 1
    echo "@@ SYNCED $2 $3 $4 ${sum%% *}"
}
# gone FOLDER NAME: removed for good
gone() {
    echo "@@ BEGIN $2"
    rm "$1/$2" && sync "$1" || return 1
    echo "@@ GONE $2"
}
# pause NAME: until the host says go
pause() {
    echo "@@ PAUSE $1"
    read -r answer
}
"""


def requires_guest(*programs: str) -> None:
    """Skip the test where it cannot boot a guest; fail it where CI=true."""
    missing = [
        f"{name} (package {_PROGRAMS.get(name, name)})"
        for name in (*_PROGRAMS, "e2fsck", *programs)
        if not tools.which(name)
    ]
    if os.uname().machine != "x86_64":
        missing.append("an x86-64 machine")
    if not _busybox():
        missing.append("a static busybox (package busybox-static)")
    if not (KERNEL / "complete").exists():
        missing.append("a guest kernel (make deps-interop)")
    if not missing:
        return
    reason = "needs " + ", ".join(missing)
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(reason)
    pytest.skip(reason)


@functools.cache
def _busybox() -> Path | None:
    found = tools.which("busybox")
    # A program with an interpreter would need libraries in the guest.
    if found is None or b"/ld-linux" in Path(found).read_bytes()[:4096]:
        return None
    return Path(found)


# ---- the initramfs ----


def _archive(files: dict[str, tuple[int, bytes]]) -> bytes:
    """A cpio archive ("newc") of name: (mode, content)."""
    out = bytearray()
    for number, (name, (mode, content)) in enumerate([*files.items(), ("TRAILER!!!", (0, b""))], 1):
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields)
        out += name.encode() + b"\0"
        out += bytes(-len(out) % 4) + content
        out += bytes(-len(out) % 4)
    return bytes(out)


def _with_folders(files: dict[str, bytes]) -> dict[str, tuple[int, bytes]]:
    """Names to entries, every folder before what lies in it."""
    entries: dict[str, tuple[int, bytes]] = {}
    for name, content in files.items():
        parts = name.split("/")
        for depth in range(1, len(parts)):
            entries.setdefault("/".join(parts[:depth]), (0o040755, b""))
        entries[name] = (0o100755, content)
    return entries


@functools.cache
def _system() -> bytes:
    """What every guest has: busybox, modules, init."""
    busybox = _busybox()
    assert busybox is not None
    files = {"bin/busybox": busybox.read_bytes(), "init": _INIT.encode(), "words": _WORDS.encode()}
    order = []
    for name in _MODULES:
        for found in KERNEL.glob(f"lib/modules/*/kernel/**/{name}.ko*"):
            content = found.read_bytes()
            files[f"modules/{name}.ko"] = (
                lzma.decompress(content) if found.suffix == ".xz" else content
            )
            order.append(name)
    files["modules/order"] = "\n".join(order).encode()
    return _archive(_with_folders(files))


def with_libraries(program: str) -> dict[str, bytes]:
    """A program of this machine and the libraries it loads, as payload."""
    where = tools.which(program)
    assert where is not None
    files = {f"bin/{program}": Path(where).read_bytes()}
    for path in re.findall(r"(/\S+) \(0x", tools.run("ldd", where).stdout):
        files[path[1:]] = Path(path).read_bytes()
    return files


def boot_files(
    folder: Path, job: str, payload: dict[str, bytes] | None = None
) -> tuple[Path, Path]:
    """The kernel, and an initramfs made in ``folder`` that runs ``job``."""
    initramfs = folder / f"initramfs.{time.monotonic_ns()}"
    files = {**(payload or {}), "job": b". /words\n" + job.encode()}
    initramfs.write_bytes(_system() + _archive(_with_folders(files)))
    return next(KERNEL.glob("boot/vmlinuz-*")), initramfs


KERNEL_LINE = "console=ttyS0 quiet loglevel=3 panic=-1"


# ---- the guest ----


def nbd_drive(socket: str = "vm.sock", export: str = "") -> str:
    """A -drive of QEMU for a server's socket."""
    return (
        f"file=nbd+unix:///{export}?socket={socket},format=raw,if=virtio,cache=none,discard=unmap"
    )


def file_drive(path: str | Path) -> str:
    """A -drive for a raw file."""
    return f"file={path},format=raw,if=virtio,cache=none,discard=unmap"


class Guest:
    """A virtual machine that runs ``job`` and powers off. Drives become /dev/vda, /dev/vdb ..."""

    def __init__(
        self,
        folder: Path,
        job: str,
        *drives: str,
        payload: dict[str, bytes] | None = None,
        options: tuple[str, ...] = (),
    ) -> None:
        kernel, initramfs = boot_files(folder, job, payload)
        words = [QEMU, "-accel", "tcg", "-m", "256", "-nodefaults", "-display", "none"]
        words += ["-serial", "stdio", "-no-reboot", "-kernel", str(kernel)]
        words += ["-initrd", str(initramfs), "-append", KERNEL_LINE]
        for drive in drives:
            words += ["-drive", drive]
        words += options
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._process = subprocess.Popen(
            words, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            with self._changed:
                self.lines.append(raw.decode(errors="replace").rstrip("\r\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait(self, start: str, seconds: float = STEP_SECONDS) -> list[str]:
        """Until a line begins with ``start``; returns those that do."""
        end = time.monotonic() + seconds
        with self._changed:
            while True:
                found = [line for line in self.lines if line.startswith(start)]
                if found:
                    return found
                left = end - time.monotonic()
                if self._ended or left <= 0:
                    state = "ended" if self._ended else f"gave no word for {seconds:g} s"
                    raise tools.Failed(f"waited for {start!r}: the guest {state}\n{self.console()}")
                self._changed.wait(left)

    def booted(self) -> Self:
        """Until the job begins."""
        self.wait("@@ BOOTED", BOOT_SECONDS)
        return self

    def say(self, text: str = "go") -> None:
        """To whoever reads in the guest."""
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode() + b"\n")
        self._process.stdin.flush()

    def finish(self, seconds: float = STEP_SECONDS) -> Self:
        """Until it has powered off; the job must have gone well."""
        self.wait("@@ END 0", BOOT_SECONDS + seconds)
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise tools.Failed(f"the guest does not power off\n{self.console()}") from None
        self._reader.join(STEP_SECONDS)
        assert status == 0, self.console()
        return self

    def console(self) -> str:
        """All that it printed."""
        return "\n".join(["---- the guest's console:", *self.lines, "----"])

    def kill(self) -> None:
        """Pull its plug."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join(STEP_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()


# ---- the server ----


class Server:
    """``mmcow serve`` in ``folder``, on the sockets vm.sock and vm.ctl there."""

    def __init__(self, folder: Path, *images: str, name: str = "vm") -> None:
        self._folder, self._name = folder, name
        self._log = folder / f"{name}.{time.monotonic_ns()}.log"
        words = [sys.executable, "-m", "mmcow", "serve"]
        words += ["--socket", f"{name}.sock", "--control", f"{name}.ctl", *images]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                words, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
            )
        assert self._process.stdout is not None
        self._timer = threading.Timer(BOOT_SECONDS, self._process.kill)
        self._timer.start()
        line = self._process.stdout.readline()
        self._timer.cancel()
        if not line.startswith(b"nbd"):
            self.kill()
            raise tools.Failed(f"the server did not start: {line!r}\n{self.log()}")

    def log(self) -> str:
        """What it said on standard error."""
        return self._log.read_text(errors="replace")

    def ctl(self, *words: str) -> dict[str, Any]:
        """A command over the control socket; its answer."""
        ended = run_mmcow(self._folder, "ctl", "--output", "json", f"{self._name}.ctl", *words)
        answer: dict[str, Any] = json.loads(ended)
        return answer

    @contextmanager
    def send(self, command: str, **arguments: str) -> Iterator[None]:
        """A command whose answer nobody awaits, on its way when this is entered."""
        with socket.socket(socket.AF_UNIX) as line, chdir(self._folder):
            line.connect(f"{self._name}.ctl")
            line.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
            yield

    def export(self) -> dict[str, Any]:
        """The status of the only export."""
        exports = self.ctl("status")["exports"]
        assert len(exports) == 1
        found: dict[str, Any] = exports[0]
        return found

    def stop(self, status: int = 0) -> None:
        """The friendly end, which must be clean."""
        self._process.terminate()
        try:
            ended = self._process.wait(STEP_SECONDS)
        except subprocess.TimeoutExpired:
            raise tools.Failed(f"the server does not end\n{self.log()}") from None
        assert ended == status, f"the server ended with {ended}\n{self.log()}"
        assert "Traceback" not in self.log(), self.log()

    def kill(self) -> None:
        """kill -9."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()


def run_mmcow(folder: Path, *words: str) -> str:
    """One command in ``folder``, which must succeed; what it printed."""
    return tools.run(sys.executable, "-m", "mmcow", *words, cwd=folder).stdout
