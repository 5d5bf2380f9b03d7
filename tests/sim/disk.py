# SPDX-License-Identifier: MIT
"""Files and directories on a simulated disk, and what of them survives a power cut.

The fault model, in prose
-------------------------
A file is a row of 512-byte sectors. Of each sector the disk keeps one *durable* value; every
change since then (a write, a punched hole, the zeros of a truncation) is a further *version*
in the order in which it became visible to readers. A sync that started at time T replaces the
durable value by the last version not younger than T, or by a later one: what happens during
a sync may be covered by it or not. When the power goes, every sector chooses on its own
between its durable value and any later version. A sector is never torn; a request
of several sectors is. A request that was in flight may have reached any of its sectors.

The length of a file is such a row of versions too, and is chosen independently of the sectors:
a longer file whose new sectors did not survive reads zeros there; sectors beyond the surviving
length are gone. One thing is tied, because every file system ties it: a truncation zeroes
what it cuts off exactly if the shorter length (or a later one) survives. Only a power cut loses
what lies beyond the length that the disk has: a sync that began before a file grew may
cover the new bytes and not the new length, and the next one the length alone.

A directory is a durable table of names and a list of changes since. Each change (a name made,
removed, or a rename, which is one change for both names) may have reached the disk without
those before it. A file without a surviving name is gone, however often it was synced.

A sync that *fails* (``Inode.fail_sync``) does what Linux does: each un-synced version has reached
the disk or is lost, nobody will try again (the pages are clean, the next sync succeeds),
and readers are still shown the lost bytes until ``drop_cache``.

Not modelled: incoherence between the page cache and direct I/O, sectors that go bad or
return stale data, devices that acknowledge a sync and lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import NamedTuple

SECTOR = 512
NOW = 1_700_000_000  # modification time of whatever is written

# How likely the newest and the oldest possible version of a sector is chosen (else: any). Drawn
# once per file and cut: "all of the bitmap, nothing of the data" and the reverse are common.
_MOODS = ((1.0, 0.0), (0.0, 1.0), (0.9, 0.0), (0.0, 0.9), (0.4, 0.4), (0.0, 0.0))
_Mood = tuple[float, float]


class Version(NamedTuple):
    """One un-synced value of a sector."""

    time: int
    data: bytes
    truncation: bool  # zeros that came with a shorter length


class Inode:
    """A file or block device: what readers see, and what the disk has."""

    def __init__(self, number: int, kind: str = "file", content: bytes = b"") -> None:
        self.number = number
        self.kind = kind
        self.mtime = 0
        self.length = len(content)
        self.live = _padded(content)  # bytes beyond ``length`` are zero
        self.durable_length = self.length
        self.durable = bytearray(self.live)
        self.lengths: list[tuple[int, int]] = []  # (time, length), un-synced
        self.versions: dict[int, list[Version]] = {}  # by sector, un-synced
        self.lost: set[int] = set()  # sectors whose readers see what a failed sync lost

    # ---- what readers see ----

    def read(self, offset: int, length: int) -> bytes:
        """Live bytes; shorter only where the file ends."""
        return bytes(self.live[offset : min(offset + length, self.length)])

    def write(self, time: int, offset: int, data: bytes) -> None:
        """Make ``data`` visible; un-synced."""
        self.mtime = NOW
        end = offset + len(data)
        if end > self.length:
            self.set_length(time, end)
        self.live[offset:end] = data
        self._note(time, offset, end)

    def zero(self, time: int, offset: int, length: int) -> None:
        """Make a range read as zeros, without changing the length."""
        end = min(offset + length, self.length)
        if offset < end:
            self.live[offset:end] = bytes(end - offset)
            self._note(time, offset, end)

    def set_length(self, time: int, length: int) -> None:
        """Cut or extend the file; new bytes are zeros."""
        before, self.length = self.length, length
        self.lengths.append((time, length))
        self.mtime = NOW
        if length < before:
            end = len(self.live)
            self.live[length:end] = bytes(end - length)
            self._note(time, length, end, truncation=True)
        missing = -(-length // SECTOR) * SECTOR - len(self.live)
        if missing > 0:
            self.live += bytes(missing)

    def _note(self, time: int, start: int, end: int, truncation: bool = False) -> None:
        live, versions = self.live, self.versions
        for sector in range(start // SECTOR, -(-end // SECTOR)):
            at = sector * SECTOR
            version = Version(time, bytes(live[at : at + SECTOR]), truncation)
            versions.setdefault(sector, []).append(version)
        if self.lost:
            self.lost.difference_update(range(start // SECTOR, -(-end // SECTOR)))

    # ---- what the disk has ----

    @property
    def clean(self) -> bool:
        """Whether everything visible is durable, as far as the kernel knows."""
        return not self.versions and not self.lengths

    def sync(self, rng: Random, since: int) -> None:
        """A sync that started at time ``since`` has succeeded."""
        self._harden(rng, since, rng.choice(_MOODS))

    def sync_range(self, rng: Random, since: int, start: int, end: int) -> None:
        """The same for the sectors of a range alone: what msync promises."""
        inside = range(start // SECTOR, -(-end // SECTOR))
        aside = {s: v for s, v in self.versions.items() if s not in inside}
        self.versions = {s: v for s, v in self.versions.items() if s in inside}
        self._harden(rng, since, rng.choice(_MOODS))
        self.versions.update(aside)

    def fail_sync(self, rng: Random) -> None:
        """A sync has failed: un-synced versions are on the disk or lost, all pages are clean."""
        dirty = list(self.versions)
        self._harden(rng, -1, rng.choice(_MOODS))
        self.versions.clear()
        self.lengths.clear()
        for sector in dirty:
            if self._sector(self.durable, sector) != self._sector(self.live, sector):
                self.lost.add(sector)

    def drop_cache(self) -> None:
        """What is clean is read from the disk again: what a failed sync lost disappears."""
        lost = {sector for sector in self.lost if sector not in self.versions}
        self.lost -= lost
        if not self.lengths and self.length != self.durable_length:
            self.length = self.durable_length
            live, self.live = self.live, bytearray(self.durable)
            for sector in self.versions:
                self.live[sector * SECTOR : (sector + 1) * SECTOR] = self._sector(live, sector)
        for sector in lost:
            end = min((sector + 1) * SECTOR, len(self.live))
            self.live[sector * SECTOR : end] = self.durable[sector * SECTOR : end]

    def survivor(self, rng: Random, in_flight: Iterable[Change]) -> Inode:
        """The file as found after a power cut now."""
        found = self.copy()
        for change in in_flight:
            change.apply(found)
        found.lost.clear()
        found._harden(rng, -1, rng.choice(_MOODS))
        found.versions.clear()
        found.lengths.clear()
        found.length = found.durable_length
        found.live = bytearray(found.durable)
        return found

    def copy(self) -> Inode:
        """An independent file in the same state."""
        other = Inode.__new__(Inode)
        other.number, other.kind, other.mtime = self.number, self.kind, self.mtime
        other.length, other.live = self.length, bytearray(self.live)
        other.durable_length, other.durable = self.durable_length, bytearray(self.durable)
        other.lengths = list(self.lengths)
        other.versions = {sector: list(versions) for sector, versions in self.versions.items()}
        other.lost = set(self.lost)
        return other

    def _harden(self, rng: Random, since: int, mood: _Mood) -> None:
        """Choose what of the un-synced versions the disk has; all up to time ``since`` at least."""
        cut_at = self._harden_length(rng, since, mood)
        durable = self.durable
        missing = max(len(self.live), self.durable_length) - len(durable)
        if missing > 0:
            durable += bytes(-(-missing // SECTOR) * SECTOR)
        left: dict[int, list[Version]] = {}
        for sector, versions in self.versions.items():
            index = _choose(rng, versions, since, mood, cut_at)
            if index >= 0:
                durable[sector * SECTOR : (sector + 1) * SECTOR] = versions[index].data
            # What reached the disk beyond a length that did not is there when the length does.
            hidden = self.lengths and (sector + 1) * SECTOR > self.durable_length
            first = max(index, 0) if hidden else index + 1
            if first < len(versions):
                left[sector] = versions[first:]
        self.versions = left
        # Beyond its end the durable file has nothing: what comes back there later is zeros.
        del durable[-(-self.durable_length // SECTOR) * SECTOR :]
        odd = self.durable_length % SECTOR
        if odd:
            durable[self.durable_length :] = bytes(SECTOR - odd)

    def _harden_length(self, rng: Random, since: int, mood: _Mood) -> int:
        """Choose the length; returns the time up to which truncations have reached the disk."""
        least = -1
        for index, (time, _) in enumerate(self.lengths):
            if time <= since:
                least = index
        index = _pick(rng, mood, range(least, len(self.lengths)))
        reached = since
        if index >= 0:
            reached, self.durable_length = self.lengths[index]
            self.lengths = self.lengths[index + 1 :]
        return max(reached, since)

    @staticmethod
    def _sector(content: bytearray, sector: int) -> bytes:
        found = bytes(content[sector * SECTOR : (sector + 1) * SECTOR])
        return found.ljust(SECTOR, b"\0")


class Change(NamedTuple):
    """What a request in flight will do to a file, as far as it has come: some of its sectors."""

    time: int
    kind: str  # "write", "zero" or "length"
    offset: int
    data: bytes  # of a write; zeros for "zero"; empty for "length"

    def apply(self, inode: Inode) -> None:
        """Do all of it."""
        if self.kind == "write":
            inode.write(self.time, self.offset, self.data)
        elif self.kind == "zero":
            inode.zero(self.time, self.offset, len(self.data))
        else:
            inode.set_length(self.time, self.offset)

    def apply_partly(self, inode: Inode, rng: Random) -> None:
        """Do some sectors of it, as a failed request may."""
        if self.kind == "length":
            return
        end = self.offset + len(self.data)
        at = self.offset
        while at < end:
            stop = min((at // SECTOR + 1) * SECTOR, end)
            if rng.random() < 0.5:
                piece = self.data[at - self.offset : stop - self.offset]
                Change(self.time, self.kind, at, piece).apply(inode)
            at = stop


class Directory:
    """Names: a durable table, and the changes since in their order."""

    def __init__(self, names: dict[str, int] | None = None) -> None:
        self.live: dict[str, int] = dict(names or {})
        self.durable: dict[str, int] = dict(self.live)
        self.changes: list[dict[str, int | None]] = []

    def change(self, names: dict[str, int | None]) -> None:
        """Give names to inodes, or take them away (None), all at once."""
        _enter(self.live, names)
        self.changes.append(names)

    def sync(self) -> None:
        """Every change is durable."""
        self.durable = dict(self.live)
        self.changes.clear()

    def survivor(self, rng: Random) -> Directory:
        """The directory as found after a power cut now."""
        found = dict(self.durable)
        mood = rng.choice(_MOODS)
        for names in self.changes:
            if _pick(rng, mood, (0, 1)):
                _enter(found, names)
        return Directory(found)

    def copy(self) -> Directory:
        """An independent directory in the same state."""
        other = Directory(self.live)
        other.durable = dict(self.durable)
        other.changes = [dict(names) for names in self.changes]
        return other


def _enter(table: dict[str, int], names: dict[str, int | None]) -> None:
    for name, inode in names.items():
        if inode is None:
            table.pop(name, None)
        else:
            table[name] = inode


def _choose(
    rng: Random, versions: list[Version], since: int, mood: _Mood, cut_at: int
) -> int:
    """Index of the version the disk has; -1 for the durable value it had."""
    least = -1
    for index, version in enumerate(versions):
        if version.time <= since or (version.truncation and version.time <= cut_at):
            least = index
    # A truncation that did not reach the disk took no bytes away there.
    possible = [
        index
        for index in range(max(least, 0), len(versions))
        if index == least or not versions[index].truncation or versions[index].time <= cut_at
    ]
    if least < 0:
        possible.insert(0, -1)
    return _pick(rng, mood, possible)


def _pick(rng: Random, mood: _Mood, possible: Sequence[int]) -> int:
    newest, oldest = mood
    roll = rng.random()
    if roll < newest:
        return possible[-1]
    if roll < newest + oldest:
        return possible[0]
    return possible[int(rng.random() * len(possible))]


def _padded(content: bytes) -> bytearray:
    return bytearray(content) + bytes(-len(content) % SECTOR)
