# SPDX-License-Identifier: MIT
"""Who uses a file or a device, as far as the kernel tells this user.

Owns: reading /proc and /sys for that. Every answer is a help for people and may be incomplete:
other users' processes are out of reach without privileges.
Never: decides whether a use is in the way (the kernel has said so before somebody asks here).
"""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING

from mmcow.storage.host import Identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


def lock_holders(
    identity: Identity, lock_bytes: Iterable[int], *, but: tuple[int, int] = (-1, -1)
) -> list[int]:
    """Processes that hold a lock on one of the bytes.

    The kernel reports no owner for locks of open file descriptions; /proc/PID/fdinfo lists them.
    ``but``: a (process, descriptor) that does not count.
    """
    wanted = set(lock_bytes)

    def holds(pid: int, descriptor: str) -> bool:
        # The device number in the line is not stat's on btrfs, the inode not the disk's on a
        # block device: only the file itself tells.
        return (pid, int(descriptor)) != but and any(
            _covers(line, wanted)
            for line in _read_lines(f"/proc/{pid}/fdinfo/{descriptor}")
            if line.startswith("lock:")
        )

    return _processes_with(identity, holds)


def device_writers(identity: Identity) -> list[int]:
    """Processes that have a block device open for writing."""

    def writes(pid: int, descriptor: str) -> bool:
        for line in _read_lines(f"/proc/{pid}/fdinfo/{descriptor}"):
            if line.startswith("flags:"):
                return int(line.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
        return False

    return _processes_with(identity, writes)


def device_use(identity: Identity) -> str | None:
    """What of the kernel's own owns a block device (a mounted file system, swap, another device
    above it), in words; None where nothing is found."""
    device = identity.inode
    own = os.path.realpath(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for line in _read_lines("/proc/self/mountinfo"):
        fields = line.split()
        source = fields[fields.index("-") + 2] if "-" in fields else ""
        if _is_in(own, fields[2]) or _is_in(own, _number_of(_unescaped(source))):
            return f"mounted on {_unescaped(fields[4])}"
    for line in _read_lines("/proc/swaps")[1:]:
        if _is_in(own, _number_of(_unescaped(line.split()[0]))):
            return "used as swap space"
    try:
        above = sorted(os.listdir(f"{own}/holders"))
    except OSError:
        above = []
    return f"used by the device {', '.join(above)}" if above else None


def describe(pid: int) -> str:
    """A process, for people."""
    lines = _read_lines(f"/proc/{pid}/comm")
    return f"{lines[0].strip()}, pid {pid}" if lines else f"pid {pid}"


def _processes_with(identity: Identity, matches: Callable[[int, str], bool]) -> list[int]:
    """Processes with a descriptor of the file that ``matches``."""
    found = []
    for pid in _processes():
        try:
            descriptors = os.listdir(f"/proc/{pid}/fdinfo")
        except OSError:
            continue  # ended, or another user's
        for descriptor in descriptors:
            try:
                if matches(pid, descriptor) and _is(f"/proc/{pid}/fd/{descriptor}", identity):
                    found.append(pid)
                    break
            except OSError:
                continue
    return sorted(found)


def _processes() -> Iterator[int]:
    try:
        names = os.listdir("/proc")
    except OSError:
        return
    for name in names:
        if name.isdigit():
            yield int(name)


def _is(path: str, identity: Identity) -> bool:
    facts = os.stat(path)
    if stat.S_ISBLK(facts.st_mode):
        return identity == Identity(-1, facts.st_rdev)
    return identity == Identity(facts.st_dev, facts.st_ino)


def _covers(line: str, wanted: set[int]) -> bool:
    """``line``: "lock: 1: OFDLCK ADVISORY READ -1 fe:00:123 100 100"."""
    fields = line.split()
    first, last = fields[-2], fields[-1]
    end = max(wanted) if last == "EOF" else int(last)
    return any(int(first) <= byte <= end for byte in wanted)


def _is_in(own: str, number: str) -> bool:
    """Whether device ``number`` ("8:1") is the one whose place in /sys is ``own``, or a partition
    of it."""
    place = os.path.realpath(f"/sys/dev/block/{number}") if number else ""
    return place == own or place.startswith(f"{own}/")


def _number_of(path: str) -> str:
    """Of a block device; empty for anything else."""
    try:
        facts = os.stat(path)
    except (OSError, ValueError):
        return ""
    if not stat.S_ISBLK(facts.st_mode):
        return ""
    return f"{os.major(facts.st_rdev)}:{os.minor(facts.st_rdev)}"


def _unescaped(text: str) -> str:
    """Of a file of /proc: spaces and backslashes are octal there."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _read_lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.readlines()
    except OSError:
        return []
