# SPDX-License-Identifier: MIT
"""``mmcow.storage.host`` over memory: the machine below mmcow, under the control of a seed.

Owns: ``SimHost`` (names, handles, views, queues of one machine), its clock, its faults, its
log. What survives a power cut is in ``disk``, whose docstring states the fault model.

Time is a counter that moves with every effect. Requests of a queue are *in flight* from their
submission until ``turn`` completes them, in any order and any number per turn; a write changes
what readers see when it completes, a read sees what is there when it completes. A sync
covers what had completed when it was submitted, and of later changes what the seed says; it
is slow, so that others usually complete meanwhile. Buffers are looked at on completion,
as a kernel may do: whoever reuses them earlier is found out.

Direct handles insist on their alignment. The memory of buffers has none: nothing is asked.

Every storage call and every completion announces itself to ``SimHost.watch`` before it takes
effect. A test may take a surviving copy of the machine there (``power_cut``), examine it, and let
the run go on: one run serves hundreds of cuts. ``faults`` decides which calls fail.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from mmcow.errors import LockedError, StorageError, SyncFailed
from mmcow.storage.host import (
    FALLOCATE_PUNCH,
    FALLOCATE_RESERVE,
    FALLOCATE_ZERO,
    Alignment,
    Identity,
    Stat,
)
from mmcow.tasks import Completion
from tests.sim.disk import SECTOR, Change, Directory, Inode
from tests.sim.faults import Fault
from tests.sim.view import native_view

BLOCK = 4096  # of the simulated file system: what a hole is made of
LOG = 400  # calls remembered for a story

SYNCS = ("datasync", "sync", "msync", "queue datasync")


class Machine:
    """What the copies of a host have in common: how it behaves, not what it holds."""

    def __init__(
        self,
        *,
        direct_align: int | None = 512,
        can_punch: bool = True,
        can_zero: bool = True,
        mapped: bool = False,
        make_view: Callable[[bytes, int, int, int, str], Any] = native_view,
    ) -> None:
        self.direct_align = direct_align  # None: O_DIRECT is refused
        self.can_punch = can_punch
        self.can_zero = can_zero
        self.mapped = mapped  # whether views take msync or datasync as their barrier
        self.make_view = make_view

    def __str__(self) -> str:
        return (
            f"direct I/O alignment {self.direct_align}, punch {self.can_punch}, "
            f"zero range {self.can_zero}, msync {self.mapped}"
        )


class SimHost:
    """One machine. ``seed`` decides everything that is left open."""

    def __init__(self, seed: int = 0, machine: Machine | None = None) -> None:
        self.rng = Random(seed)
        self.machine = machine or Machine()
        self.now = 0
        self.calls = 0
        self.inodes: dict[int, Inode] = {}
        self.directories: dict[str, Directory] = {}
        self.locks: dict[int, list[tuple[SimHandle, frozenset[int], frozenset[int]]]] = {}
        self.in_flight: list[_Request] = []
        self.queues: dict[int, SimQueue] = {}
        self.underway: tuple[Inode, Change] | None = None  # of a synchronous call
        self.faults: list[Fault] = []
        self.watch: Callable[[str], None] | None = None
        self.log: deque[tuple[Any, ...]] = deque(maxlen=LOG)
        self._next_inode = 1

    # ---- for tests: what is there ----

    def put(self, path: str, content: bytes, *, kind: str = "file", mtime: int = 0) -> None:
        """Place a file or device that has been there, durably, for ever."""
        directory, name = self._split(path)
        inode = self._new_inode(kind, content)
        inode.mtime = mtime
        table = self.directories.setdefault(directory, Directory())
        table.live[name] = table.durable[name] = inode.number

    def content(self, path: str) -> bytes:
        """What readers see in a file."""
        inode = self._find(path, "content")
        return inode.read(0, inode.length)

    def drop_cache(self, path: str) -> None:
        """Readers see what the disk has, wherever nothing waits to be written."""
        self._find(path, "drop_cache").drop_cache()

    def names(self, directory: str) -> list[str]:
        """Names in a directory."""
        return sorted(self.directories[os.path.normpath(directory)].live)

    def story(self) -> list[str]:
        """The last calls, oldest first."""
        return [" ".join(str(part) for part in entry) for entry in self.log]

    # ---- for tests: the end of the world ----

    def power_cut(self, rng: Random) -> SimHost:
        """The machine after a power cut now: what survives is durable, nothing is open."""
        other = SimHost(rng.getrandbits(48), self.machine)
        other.directories = {path: d.survivor(rng) for path, d in self.directories.items()}
        named = {n for d in other.directories.values() for n in d.live.values()}
        for number, inode in self.inodes.items():
            if number in named:
                other.inodes[number] = inode.survivor(rng, self._changes(inode))
        other._next_inode = self._next_inode
        return other

    def kill(self, rng: Random) -> SimHost:
        """The machine after the process died now: the page cache stays, un-synced as it is."""
        other = SimHost(rng.getrandbits(48), self.machine)
        other.now = self.now
        other.directories = {path: d.copy() for path, d in self.directories.items()}
        for number, inode in self.inodes.items():
            left = other.inodes[number] = inode.copy()
            for change in self._changes(inode):
                other.now += 1
                if rng.random() < 0.5:
                    change._replace(time=other.now).apply(left)
                else:
                    change._replace(time=other.now).apply_partly(left, rng)
        other._next_inode = self._next_inode
        return other

    def _changes(self, inode: Inode) -> list[Change]:
        """What requests in flight may have done to a file."""
        changes = []
        if self.underway is not None and self.underway[0] is inode:
            changes.append(self.underway[1])
        for request in self.in_flight:
            if request.handle.inode is inode:
                change = request.change(self.now + 1)
                if change is not None:
                    changes.append(change)
        return changes

    # ---- every call passes here ----

    def announce(self, kind: str, path: str, *detail: Any) -> int:
        """Note a call and let the test look; returns the errno with which it fails, or 0."""
        self.calls += 1
        self.log.append((kind, os.path.basename(path), *detail))
        if self.watch is not None:
            self.watch(kind)
        for fault in self.faults:
            if fault.strikes(kind, path):
                self.log.append(("  ... fails:", errno.errorcode[fault.errno]))
                return fault.errno
        return 0

    def check(self, kind: str, path: str, *detail: Any) -> None:
        """``announce``, and raise if the call fails."""
        code = self.announce(kind, path, *detail)
        if code:
            raise failure(code, kind, path)

    def tick(self) -> int:
        """The next moment."""
        self.now += 1
        return self.now

    # ---- Host ----

    def open(self, path: str, *, write: bool, direct: bool) -> SimHandle:
        """Open an existing file."""
        self.check("open", path, "write" if write else "read", "direct" if direct else "")
        inode = self._find(path, "open")
        if direct and self.machine.direct_align is None:
            raise StorageError(errno.EINVAL, "open", path)
        return SimHandle(self, path, inode, write, direct)

    def reopen(self, handle: SimHandle) -> SimHandle:
        """A buffered handle on a file that is open."""
        self.check("open", handle.path, "again")
        return SimHandle(self, handle.path, handle.inode, handle.writable, False)

    def create(self, path: str) -> SimHandle:
        """Make an empty file."""
        self.check("create", path)
        table, name = self._table(path, "create")
        if name in table.live:
            raise StorageError(errno.EEXIST, "create", path)
        inode = self._new_inode("file", b"")
        table.change({name: inode.number})
        return SimHandle(self, path, inode, True, False)

    def stat(self, path: str) -> Stat:
        """What a name stands for."""
        self.check("stat", path)
        if os.path.normpath(path) in self.directories:
            return Stat("directory", 0, Identity(1, 0), 0, 0)
        inode = self._find(path, "stat")
        return Stat(inode.kind, inode.length, Identity(1, inode.number), inode.mtime, inode.length)

    def link(self, source: str, target: str) -> None:
        """A second name."""
        self.check("link", target, "from", os.path.basename(source))
        inode = self._find(source, "link")
        table, name = self._table(target, "link")
        if name in table.live:
            raise StorageError(errno.EEXIST, "link", target)
        table.change({name: inode.number})

    def real_path(self, path: str) -> str:
        """There are no symbolic links."""
        return path

    def absolute(self, path: str) -> str:
        return path

    def take_over(self, old: str, new: str) -> None:
        """There are no owners and modes."""

    def rename(self, source: str, target: str) -> None:
        """Another name, within one directory."""
        self.check("rename", target, "from", os.path.basename(source))
        inode = self._find(source, "rename")
        table, name = self._table(target, "rename")
        old_table, old_name = self._table(source, "rename")
        assert old_table is table, "the simulated machine renames within a directory only"
        table.change({old_name: None, name: inode.number})

    def unlink(self, path: str) -> None:
        """Take a name away."""
        self.check("unlink", path)
        self._find(path, "unlink")
        table, name = self._table(path, "unlink")
        table.change({name: None})

    def sync_directory(self, path: str) -> None:
        """Make the names of a directory durable."""
        self.check("sync_directory", path)
        self.directories[os.path.normpath(path)].sync()

    def view(self, handle: SimHandle, size: int, reserve: int, unit: int, *, mapped: bool) -> Any:
        """The live state of a metadata area."""
        self.check("view", handle.path, size)
        content = bytes(handle.inode.live[:size]).ljust(size, b"\0")
        view = self.machine.make_view(content, size, reserve, unit, handle.path)
        view.mapped = self.machine.mapped and mapped and not handle.direct
        return view

    def queue(self) -> SimQueue:
        """A new queue."""
        queue = SimQueue(self)
        self.queues[queue.fileno()] = queue
        return queue

    # ---- names ----

    def _new_inode(self, kind: str, content: bytes) -> Inode:
        inode = Inode(self._next_inode, kind, content)
        self.inodes[inode.number] = inode
        self._next_inode += 1
        return inode

    @staticmethod
    def _split(path: str) -> tuple[str, str]:
        directory, name = os.path.split(os.path.normpath(path))
        return directory or ".", name

    def _table(self, path: str, what: str) -> tuple[Directory, str]:
        directory, name = self._split(path)
        if directory not in self.directories:
            raise StorageError(errno.ENOENT, what, path)
        return self.directories[directory], name

    def _find(self, path: str, what: str) -> Inode:
        table, name = self._table(path, what)
        if name not in table.live:
            raise StorageError(errno.ENOENT, what, path)
        return self.inodes[table.live[name]]


class SimHandle:
    """An open file of a simulated machine."""

    def __init__(self, host: SimHost, path: str, inode: Inode, write: bool, direct: bool) -> None:
        self.host = host
        self.path = path
        self.inode = inode
        self.writable = write
        self.direct = direct
        self.kind = inode.kind
        self.identity = Identity(1, inode.number)
        self.alignment = Alignment(1, (host.machine.direct_align or 1) if direct else 1)
        self.closed = False

    def size(self) -> int:
        """Length in bytes."""
        assert not self.closed
        return self.inode.length

    def mtime(self) -> int:
        """Modification time."""
        return self.inode.mtime

    def allocated(self) -> int:
        """Bytes that are not in holes."""
        content = self.inode.read(0, self.inode.length)
        return sum(
            BLOCK for at in range(0, len(content), BLOCK) if any(content[at : at + BLOCK])
        )

    def read_at(self, offset: int, length: int) -> bytes:
        """Read now."""
        self._check("read_at", offset, length)
        return self.inode.read(offset, length)

    def write_at(self, offset: int, data: Any) -> None:
        """Write now."""
        self._change("write_at", Change(0, "write", offset, bytes(data)), offset, len(data))

    def truncate(self, size: int) -> None:
        """Set the length now."""
        if self.inode.kind == "block":
            raise StorageError(errno.EINVAL, "truncate", self.path)
        self._change("truncate", Change(0, "length", size, b""), size)

    def reserve(self, offset: int, length: int) -> None:
        """Nothing but a chance to fail."""
        self._check("reserve", offset, length)

    def datasync(self) -> None:
        """fdatasync."""
        self._sync("datasync")

    def sync(self) -> None:
        """fsync."""
        self._sync("sync")

    def drop_cache(self) -> None:
        """Read clean sectors from the disk again."""
        self.inode.drop_cache()

    def next_data(self, offset: int) -> int:
        """Where data begins."""
        return self._next(offset, data=True)

    def next_hole(self, offset: int) -> int:
        """Where a hole begins."""
        return self._next(offset, data=False)

    def lock(self, use: frozenset[int], deny: frozenset[int]) -> None:
        """QEMU's rule: nobody may use what another denies."""
        self._check("lock")
        held = self.host.locks.setdefault(self.inode.number, [])
        for other, their_use, their_deny in held:
            if other is not self and (use & their_deny or deny & their_use):
                raise LockedError(errno.EAGAIN, "lock", self.path)
        held[:] = [entry for entry in held if entry[0] is not self]
        held.append((self, use, deny))

    def close(self) -> None:
        """Close and unlock."""
        self.closed = True
        held = self.host.locks.get(self.inode.number, [])
        held[:] = [entry for entry in held if entry[0] is not self]

    def insist(self, offset: int, length: int) -> None:
        """Direct I/O has whole blocks only, and a closed handle none at all."""
        assert not self.closed, f"{self.path}: used after close"
        align = self.alignment.offset
        assert offset % align == 0 and length % align == 0, (
            f"{self.path}: direct request {offset}+{length} is not aligned to {align}"
        )

    def _check(self, kind: str, *detail: Any) -> None:
        assert not self.closed, f"{self.path}: {kind} after close"
        self.host.check(kind, self.path, *detail)

    def _change(self, kind: str, change: Change, *detail: Any) -> None:
        assert self.writable, f"{self.path}: {kind} through a read-only handle"
        if change.kind == "write":
            self.insist(change.offset, len(change.data))
        host = self.host
        change = change._replace(time=host.now + 1)
        host.underway = self.inode, change
        try:
            self._check(kind, *detail)
        except StorageError:
            host.tick()
            change.apply_partly(self.inode, host.rng)
            raise
        finally:
            host.underway = None
        host.tick()
        change.apply(self.inode)

    def _sync(self, kind: str) -> None:
        try:
            self._check(kind)
        except StorageError:
            self.inode.fail_sync(self.host.rng)
            raise
        self.inode.sync(self.host.rng, self.host.tick())

    def _next(self, offset: int, *, data: bool) -> int:
        inode = self.inode
        while offset < inode.length:
            end = min((offset // BLOCK + 1) * BLOCK, inode.length)
            block = inode.read(offset // BLOCK * BLOCK, BLOCK)
            if any(block) == data:
                return offset
            offset = end
        return inode.length


class _Request(Completion[int]):
    """A request of a queue, and the completion its owner awaits."""

    __slots__ = ("buffers", "code", "handle", "kind", "length", "mode", "offset", "since")

    def __init__(
        self, kind: str, handle: SimHandle, offset: int, length: int, buffers: Sequence[Any] = ()
    ) -> None:
        super().__init__()
        self.kind = kind
        self.handle = handle
        self.offset = offset
        self.length = length
        self.buffers = buffers
        self.mode = 0
        self.since = 0

    def change(self, time: int) -> Change | None:
        """What it does to its file."""
        if self.kind == "write":
            return Change(time, "write", self.offset, self.data())
        if self.kind == "fallocate" and self.mode != FALLOCATE_RESERVE:
            return Change(time, "zero", self.offset, bytes(self.length))
        return None

    def data(self) -> bytes:
        """The bytes of a write, as they are in its buffers now."""
        return b"".join(bytes(buffer) for buffer in self.buffers)


class SimQueue:
    """Requests in flight on a simulated machine."""

    backend = "simulated"

    def __init__(self, host: SimHost) -> None:
        self.host = host
        self._pending: list[_Request] = []
        self._handed = 0  # requests that a turn has handed to the machine; they alone can complete
        self._number = len(host.queues) + 1
        self.closed = False

    def path(self) -> None:
        """No request gets past the simulator."""
        return

    @property
    def busy(self) -> bool:
        """Whether anything is in flight."""
        return bool(self._pending)

    def fileno(self) -> int:
        """What a simulated loop knows the queue by: no descriptor of this machine."""
        return self._number

    @property
    def readable(self) -> bool:
        """Whether something may complete without another turn: then a loop's reader is called."""
        return self._handed > 0

    def read(self, handle: SimHandle, offset: int, buffers: Sequence[Any]) -> Completion[int]:
        """Fill buffers on completion."""
        length = sum(len(buffer) for buffer in buffers)
        handle.insist(offset, length)
        return self._submit(_Request("read", handle, offset, length, tuple(buffers)))

    def write(self, handle: SimHandle, offset: int, buffers: Sequence[Any]) -> Completion[int]:
        """Change the file on completion."""
        assert handle.writable, f"{handle.path}: write through a read-only handle"
        length = sum(len(buffer) for buffer in buffers)
        handle.insist(offset, length)
        return self._submit(_Request("write", handle, offset, length, tuple(buffers)))

    def datasync(self, handle: SimHandle) -> Completion[int]:
        """Cover what has completed by now, at least."""
        return self._submit(_Request("queue datasync", handle, 0, 0))

    def fallocate(
        self, handle: SimHandle, mode: int, offset: int, length: int
    ) -> Completion[int]:
        """Punch, zero or reserve on completion."""
        assert handle.writable, f"{handle.path}: fallocate through a read-only handle"
        assert length > 0, f"{handle.path}: fallocate of nothing"
        request = _Request("fallocate", handle, offset, length)
        request.mode = mode
        return self._submit(request)

    def msync(self, handle: SimHandle, view: Any, offset: int, length: int) -> Completion[int]:
        """Cover a range of what has completed by now, at least."""
        assert view.mapped and offset % BLOCK == 0
        return self._submit(_Request("msync", handle, offset, length))

    def changes_in_flight(self, handle: Any, start: int, end: int) -> list[Completion[Any]]:
        """Changes of a range that are not complete."""
        return [
            request
            for request in self._pending
            if request.handle is handle
            and request.kind in ("write", "fallocate")
            and request.offset < end
            and start < request.offset + request.length
        ]

    def turn(self, wait: bool) -> list[tuple[Completion[Any], int]]:
        """Complete some of what is in flight: at least one if ``wait``."""
        rng = self.host.rng
        finished: list[tuple[Completion[Any], int]] = []
        while self._pending and (rng.random() < 0.3 or (wait and not finished)):
            request = self._draw(rng)
            result = self._complete(request)
            self._pending.remove(request)
            self.host.in_flight.remove(request)
            finished.append((request, result))
        self._handed = len(self._pending)
        return finished

    def deliver(self, finished: list[tuple[Completion[Any], int]]) -> None:
        """Tell those who wait."""
        for request, result in finished:
            assert isinstance(request, _Request)
            if result >= 0:
                request.set(result)
            else:
                path = request.handle.path
                request.fail(failure(-result, request.kind, path, request.offset, request.length))

    def close(self) -> None:
        """Let everything in flight complete, and drop the results."""
        while self._pending:
            self.turn(True)
        self.closed = True

    def _submit(self, request: _Request) -> _Request:
        assert not self.closed
        request.since = self.host.now
        self._pending.append(request)
        self.host.in_flight.append(request)
        return request

    def _draw(self, rng: Random) -> _Request:
        request = rng.choice(self._pending)
        if request.kind in SYNCS and len(self._pending) > 1 and rng.random() < 0.6:
            request = rng.choice(self._pending)
        return request

    def _complete(self, request: _Request) -> int:
        host, handle, inode = self.host, request.handle, request.handle.inode
        detail = (request.offset, request.length) if request.length else ()
        code = host.announce(request.kind, handle.path, *detail)
        assert not handle.closed, f"{handle.path}: closed with a {request.kind} in flight"
        if not code:
            code = self._refused(request)
        elif request.kind in SYNCS:
            inode.fail_sync(host.rng)
        else:
            change = request.change(host.tick())
            if change is not None:
                change.apply_partly(inode, host.rng)
        return -code if code else self._effect(request)

    def _refused(self, request: _Request) -> int:
        if request.kind != "fallocate":
            return 0
        machine = self.host.machine
        able = {
            FALLOCATE_PUNCH: machine.can_punch,
            FALLOCATE_ZERO: machine.can_zero,
            FALLOCATE_RESERVE: True,
        }
        return 0 if able[request.mode] else errno.EOPNOTSUPP

    def _effect(self, request: _Request) -> int:
        host, inode = self.host, request.handle.inode
        if request.kind == "read":
            return self._read(request)
        if request.kind == "queue datasync":
            inode.sync(host.rng, request.since)
            return 0
        if request.kind == "msync":
            end = request.offset + request.length
            inode.sync_range(host.rng, request.since, request.offset, end)
            return 0
        change = request.change(host.tick())
        if change is None:
            return 0
        if inode.kind == "block":
            assert change.offset + len(change.data) <= inode.length, "write past the device's end"
        change.apply(inode)
        return request.length if request.kind == "write" else 0

    @staticmethod
    def _read(request: _Request) -> int:
        found = request.handle.inode.read(request.offset, request.length)
        data = found.ljust(request.length, b"\0")
        at = 0
        for buffer in request.buffers:
            buffer[:] = data[at : at + len(buffer)]
            at += len(buffer)
        return len(found)


def failure(
    code: int, kind: str, path: str, offset: int | None = None, length: int | None = None
) -> StorageError:
    """The error of a call that failed."""
    if kind in SYNCS:
        return SyncFailed(code, kind, path)
    return StorageError(code, kind, path, offset, length)


__all__ = ["SECTOR", "Machine", "SimHandle", "SimHost", "SimQueue", "failure"]
