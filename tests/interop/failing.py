# SPDX-License-Identifier: MIT
"""Storage that really fails: a file whose reads, writes and syncs do, a file system without room.

Owns: ``FailingFile`` (nbdkit with a plugin of its own, mounted by nbdfuse: what fails is a system
call of whoever uses the file), ``Filler``.
Never: leaves a mount or a process behind.
"""

from __future__ import annotations

import errno
import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from tests.interop.tools import TIMEOUT, Failed, requires, run, which

# nbdkit's sh plugin. "pread" and "pwrite" beside it hold "first end" of what fails, in bytes;
# "flush", if it is there, makes every sync fail.
_PLUGIN = r"""#!/bin/sh
here={here}
broken() { echo "EIO broken" >&2; exit 1; }
meets() { [ -e "$here/$1" ] && read -r first end < "$here/$1" &&
    [ "$3" -lt "$end" ] && [ $(($3 + $2)) -gt "$first" ]; }
case "$1" in
thread_model) echo parallel ;;
get_size) stat -c %s "$here/content" ;;
can_write|can_flush) ;;
pread) meets pread "$3" "$4" && broken
    dd if="$here/content" bs=64k skip="$4" count="$3" \
        iflag=skip_bytes,count_bytes,fullblock status=none ;;
pwrite) meets pwrite "$3" "$4" && broken
    dd of="$here/content" bs=64k seek="$4" oflag=seek_bytes conv=notrunc status=none ;;
flush) [ ! -e "$here/flush" ] || broken ;;
*) exit 2 ;;
esac
"""


def requires_failing_file() -> None:
    """nbdkit and nbdfuse, and who may mount."""
    requires("nbdkit", "nbdfuse", "dd", "umount" if os.geteuid() == 0 else "fusermount3")
    if not os.access("/dev/fuse", os.W_OK):
        requires("a FUSE device")


class FailingFile:
    """``path`` of ``size`` bytes, zeros at first; ``content`` is the file that it shows."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._here = path.with_name(f"{path.name}.below")
        self._here.mkdir()
        self.content = self._here / "content"
        with self.content.open("wb") as file:
            file.truncate(size)
        plugin = self._here / "plugin"
        plugin.write_text(_PLUGIN.replace("{here}", f"'{self._here}'"), encoding="utf-8")
        plugin.chmod(0o755)
        path.touch()
        nbdkit = [which("nbdkit") or "nbdkit", "-f", "--exit-with-parent", "sh", str(plugin)]
        nbdfuse = [which("nbdfuse") or "nbdfuse", str(path), "--socket-activation", *nbdkit]
        self._log = self._here / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(nbdfuse, stdin=subprocess.DEVNULL, stderr=log)
        try:
            self._await_mount(size)
        except BaseException:
            self.close()
            raise

    def _await_mount(self, size: int) -> None:
        end = time.monotonic() + TIMEOUT
        while self.path.stat().st_size != size:
            if self._process.poll() is not None or time.monotonic() > end:
                raise Failed(f"nbdfuse: {self._log.read_text(encoding='utf-8')}")
            time.sleep(0.02)

    def fail(self, verb: str, start: int = 0, end: int = 1 << 62) -> None:
        """From now on EIO for "pread" or "pwrite" where it meets a range, or for "flush"."""
        fresh = self._here / "fresh"
        fresh.write_text(f"{start} {end}\n", encoding="ascii")
        fresh.rename(self._here / verb)

    def mend(self) -> None:
        """Everything works again."""
        for verb in ("pread", "pwrite", "flush"):
            (self._here / verb).unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it."""
        words = ("umount",) if os.geteuid() == 0 else ("fusermount3", "-u")
        end = time.monotonic() + 10
        while self._process.poll() is None:
            run(*words, self.path, ok=())  # refused while it is not mounted yet, or busy
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.2)
            if time.monotonic() > end:
                run(*words, *(("-l",) if os.geteuid() == 0 else ("-z",)), self.path, ok=())
                self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Filler:
    """A file that takes all the room of a file system but ``leave`` bytes."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "filler"

    def fill(self, leave: int = 0) -> None:
        """Take it."""
        with self._path.open("wb") as file:
            end, step = 0, 64 << 20
            while step >= 4096:
                try:
                    os.posix_fallocate(file.fileno(), end, step)
                    end += step
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    step //= 2
            file.truncate(max(end - leave, 0))
            os.fsync(file.fileno())

    def free(self) -> None:
        """Give it back."""
        self._path.unlink(missing_ok=True)
        os.sync()
