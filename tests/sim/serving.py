# SPDX-License-Identifier: MIT
"""The server on a simulated machine: guests, an operator, errors, and the power failing.

A ``ServerCase`` serves one small disk (``images.Shape``) with the real server, connections,
exports, live work and control commands, over ``loop.SimLoop``. Several guests read and write at
once, an operator streams, snapshots and resizes meanwhile (``guest``); the oracle (``model``)
follows what was asked and answered.

A case has a few *eras*, each one process: it ends by an orderly stop, at any moment; by a kill; or
by a power cut at any storage call, after which the next era serves what survived. In some eras a
storage call fails. At points that the seed chooses the power is cut on a copy besides, and the
copy is examined, as in ``workload``.

What must hold:

- a read brings what the disk may have held since it was asked; an answer has its own request's
  cookie; wrong requests are refused with the right error; whoever half-closes gets every answer
- after a cut: what was acknowledged, to whomever, before a successful FLUSH was sent, by anybody,
  or with FUA, is there; every other sector is old or new
- the served name opens; layers below are, byte for byte, what they were when they were frozen
- an error reaches those it concerns as the NBD error of its cause; who asks later is not concerned,
  unless a sync has failed: then no change and no flush succeeds any more
"""

from __future__ import annotations

import asyncio
import errno
import logging
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Any
from unittest import mock

from mmcow import aio
from mmcow.errors import MmcowError
from mmcow.image import Image
from mmcow.nbd import connection as connections
from mmcow.nbd import live
from mmcow.nbd.control import LINE_MOST, Control
from mmcow.nbd.export import Export
from mmcow.nbd.protocol import NotFast
from mmcow.nbd.server import Server
from tests.sim import images
from tests.sim.disk import Inode
from tests.sim.faults import Fault
from tests.sim.guest import CHANGES, Asked, Guest, Operator
from tests.sim.host import SYNCS, SimHost
from tests.sim.loop import Move, SimLoop
from tests.sim.model import Violation
from tests.sim.workload import (
    SECTOR,
    STORY,
    Case,
    CutFailed,
    Op,
    check_clean,
    examine,
    read_all,
)
from tests.unit import nbd_client as nbd

GUESTS_MOST = 4
TALK = 60  # lines of the conversation shown with a violation
REPLY = {errno.EIO: 5, errno.ENOSPC: 28}
# After a failure of one of these nothing that changes the disk may succeed.
STICKY = ("queue datasync", "msync")
MAY_STICK = (*SYNCS, "sync_directory", "lock")  # of some step of a resize or a snapshot
FAULT_KINDS = (None, None, "read", "write", "fallocate", "queue datasync", "msync", "write_at")


@dataclass
class TimedFault(Fault):
    """A failing call, and the oracle's time of the last failure."""

    clock: Callable[[], int] = int
    last: int = -1
    sticky: int | None = None  # since when the layer has failed

    def strikes(self, kind: str, path: str) -> bool:
        """Whether this call fails."""
        hit = super().strikes(kind, path)
        if hit:
            self.last = self.clock()
            if kind in STICKY and self.sticky is None:
                self.sticky = self.last
        return hit


class InOrder(dict[Any, None]):
    """A set whose order does not depend on addresses."""

    def add(self, item: Any) -> None:
        """Put it behind the others."""
        self[item] = None

    def remove(self, item: Any) -> None:
        """Take it out."""
        del self[item]


class ServerCase(Case):
    """One disk, served."""

    loop: SimLoop

    def __init__(self, seed: int) -> None:
        rng = Random(seed)
        shape = images.random_shape(rng.choice(images.VARIANTS), rng)
        super().__init__(seed, shape, density=rng.choice((0.05, 0.2, 1.0)))
        self.host.watch = None
        self.eras = self.rng.choice((1, 2, 3))  # to come
        self.replies = self.sessions = self.writes = 0
        self.talk: list[str] = []
        self.guests: list[Guest] = []
        self.operator: Operator | None = None
        self.live: aio.Image | None = None
        self.fault: TimedFault | None = None
        self.budget = self.commands = 0
        self.over = self.closing = self.resizing = False
        self.pivoting = False  # the new layer takes the served name
        self.strike: int | None = None  # storage calls until the process ends,
        self.strike_in: str | None = None  # counted while this command is being carried out
        self.struck: tuple[str, SimHost] | None = None
        self.grown: list[int] = []  # sizes that were asked for
        self.frozen_names: list[str] = []
        self.tried_names: list[str] = []
        self._orphans: list[tuple[Any, list[Asked]]] = []
        self._touched: Counter[int] = Counter()  # sectors that changes under way touch
        self._parted: Counter[int] = Counter()  # those of them that a change covers in part
        # What lies below the top layer, byte for byte, by inode.
        tops = (images.TOP, images.DATA)
        own = {self.host._find(path, "").number for path in tops if self._is_there(path)}
        self.frozen = {
            number: bytes(inode.live[: inode.length])
            for number, inode in self.host.inodes.items()
            if number not in own
        }

    def _is_there(self, path: str) -> bool:
        return path.rpartition("/")[2] in self.host.names(images.DIRECTORY)

    # ---- eras ----

    def run(self, ops: list[Op] | None = None) -> None:
        """Serve, era by era, then look once more. What is asked is drawn as it goes."""
        assert ops is None
        bounds = {
            "REQUESTS_MOST": self.rng.choice((2, 5, 128)),
            "BYTES_MOST": self.rng.choice((4096, 20_000, 32 << 20)),
            "HOLE_LEAST": self.rng.choice((512, 4096)),
            "TURN_MOST": self.rng.choice((1, 3, 64)),
            "JOIN_MOST": self.rng.choice((100, 3000, 64 << 10)),
        }
        # A stream of its own, so that a seed's story is the one it was before.
        flush_every = Random(f"{self.seed} stream").choice((512, 8192, 256 << 20))
        log = logging.getLogger("mmcow.nbd")
        was, log.disabled = log.disabled, True
        try:
            with (
                mock.patch.multiple(connections, **bounds),
                mock.patch.object(live, "FLUSH_EVERY", flush_every),
                # A status tells of times: how long they are must not depend on this machine.
                mock.patch("time.monotonic", self._time),
                mock.patch.object(Export, "failed", self._failed_inside(Export.failed)),
            ):
                while self.eras:
                    self.eras -= 1
                    self._era()
            self.cut()
        except Exception as error:
            raise Violation(self.tell(error)) from error
        finally:
            log.disabled = was
            self.host.watch = None

    def _time(self) -> float:
        return self.loop.time()

    def _failed_inside(self, failed: Callable[..., None]) -> Callable[..., None]:
        """What a client is told as an I/O error may be a bug of the server."""

        def look(export: Export, error: BaseException) -> None:
            if not isinstance(error, (MmcowError, NotFast)):
                self.loop.fail(error)
            failed(export, error)

        return look

    def _era(self) -> None:
        rng = self.rng
        self.budget = rng.choice((15, 40, 80))
        self.commands = rng.choice((0, 2, 6))
        self.strike, self.strike_in = None, None
        roll = rng.random()
        if roll < 0.25:
            self.strike = rng.randrange(1, rng.choice((40, 200, 600)))
        elif roll < 0.5:
            self.strike = rng.randrange(1, rng.choice((10, 40, 70)))
            self.strike_in = rng.choice(("stream", "snapshot", "snapshot", "resize"))
            self.commands = 6
        elif roll < 0.65:
            self.strike = rng.randrange(1, 4)
            self.strike_in = "pivot"
            self.commands = 6
            self.eras += 1  # what it leaves behind shows in the next one
        self.fault = self._draw_fault() if rng.random() < 0.35 else None
        self.host.faults = [] if self.fault is None else [self.fault]
        self.tolerant = self.fault is not None
        when = f"{self.strike} {f'of a {self.strike_in}' if self.strike_in else ''}"
        self.say(f"---- era: the process ends at call {when}, fault {self.fault} ----")
        self._run_process()
        self.host.faults = []
        if self.struck is None and self.fault is not None:
            # Whatever it had failed at has ended with it.
            how = rng.choice(("kill", "power_cut"))
            self.struck = how, getattr(self.host, how)(self.cut_rng)
        if self.struck is not None:
            (how, host), self.struck = self.struck, None
            self.say(f"---- {how} ----")
            self._go_on(how, host)

    def _draw_fault(self) -> TimedFault:
        rng = self.rng
        fault = TimedFault(
            rng.randrange(rng.choice((15, 60, 250))),
            rng.choice((errno.EIO, errno.ENOSPC)),
            rng.random() < 0.6,
            rng.choice(FAULT_KINDS),
            clock=lambda: self.model.now,
        )
        self.model.sync_failed = lambda: not fault.kinds.isdisjoint(SYNCS)
        return fault

    def _run_process(self) -> None:
        self.over = self.closing = self.resizing = self.pivoting = False
        self.guests, self.operator, self.live = [], None, None
        self._orphans = []
        self._touched.clear()
        self._parted.clear()
        loop = self.loop = SimLoop(Random(self.rng.getrandbits(64)), self.host)
        main = loop.create_task(self._serve())
        main.add_done_callback(lambda _: loop.stop())
        self._watch()
        try:
            loop.run_forever()
        finally:
            self.over = True
            self.host.watch = None
            self._bury(main)
        if loop.failure is not None:
            raise loop.failure
        if self.struck is None:
            main.result()

    async def _serve(self) -> None:
        """What a program does that serves a disk."""
        try:
            image = self.live = await aio.open(
                images.TOP,
                format=None if self.snapshots else self.shape.format,
                write=True,
                cache=self.cache,
                backing_format="add-cow" if self.shape.chain else None,
                host=self.host,
            )
        except MmcowError as error:
            self._failed(error)
            return
        self.size_known(image.size)
        server = Server({"": image})
        server.connections = server.memory._holders = InOrder()  # type: ignore[assignment]
        stop = self._stop = self.loop.create_future()
        control = Control(server, lambda: None)
        # Not the methods that listen: those look at sockets and names of the machine underneath.
        server._listeners.append(self.loop.listen("nbd", server._connect))
        listener = await asyncio.start_unix_server(control._serve, "control", limit=LINE_MOST)
        self.loop.actors.append(self._moves)
        await stop
        self.closing = True
        self.say("---- the server stops ----")
        listener.close()
        await control.close()
        try:
            await server.close()
        except MmcowError as error:
            self._failed(error)
        else:
            self._stopped()

    def _stopped(self) -> None:
        """The server has closed, without an error: everything acknowledged is durable."""
        for guest in self.guests:
            if not guest.over:
                guest.gone()
        self._settle(everything=True)
        if self.fault is None or self.fault.sticky is None:
            self.model.flushed(self.model.begin_flush())

    def _bury(self, main: asyncio.Task[None]) -> None:
        """The process is gone. What its clean-up comes to is nobody's business."""
        self.host.locks.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # coroutines that nobody will ever await
            for task in sorted(asyncio.all_tasks(self.loop), key=lambda task: task.get_name()):
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                with suppress(Exception):
                    task.get_coro().close()  # type: ignore[union-attr]
            for opened in self.loop.results:
                if isinstance(opened, Image):  # perhaps nobody has got it
                    opened._closed = True
            if self.live is not None:
                with suppress(Exception):
                    self.live.reactor.abandon_tasks()
        self.loop.set_exception_handler(lambda *_: None)
        self.loop.close()
        if main.done() and not main.cancelled():
            main.exception()

    def _go_on(self, how: str, host: SimHost) -> None:
        """Serve what is left from here on."""
        self.calls += self.host.calls
        host.log.extend(self.host.log)
        self.host = host
        # Where a sync has failed a reader is shown what is not on the disk, a writer is not. And a
        # later cut could still bring the other size back.
        write = how == "kill" and (self.tolerant or len(self.model.sizes) > 1)
        self.tolerant = False
        self.model.sync_failed = lambda: False
        image = self.open_on(host, write=write)
        try:
            if write:
                image.flush()
            content = read_all(image)
            if how == "kill":
                self.model.killed(content)
            else:
                self.model.check_survivor(content)
                self.model = self.model.survivor(content)
            check_clean(image)
            self._check_frozen(image.engine.layers)
        finally:
            image.close()
        self.check_base(host)

    # ---- what may happen ----

    def _moves(self) -> list[Move]:
        if self.over or self.closing or self._stop.done():
            return []
        self._settle()
        moves: list[Move] = []
        self.guests = [guest for guest in self.guests if not guest.over]
        for guest in self.guests:
            moves += guest.moves()
        if self.operator is None:
            moves.append((0.2, self._new_operator))
        else:
            moves += self.operator.moves()
        if self.budget:
            if len(self.guests) < GUESTS_MOST:
                moves.append((0.8 if not self.guests else 0.1, self._new_guest))
            moves.append((0.002, self._end))
        elif self._quiet():
            moves.append((1.0, self._end))
        return moves

    def _quiet(self) -> bool:
        """Whether everybody has got all answers."""
        return (
            not self._orphans
            and not any(guest.asked or guest.finished or not guest.up for guest in self.guests)
            and self.operator is not None
            and not self.operator.doing
        )

    def _new_guest(self) -> None:
        if "nbd" in self.loop.listeners:
            self.sessions += 1
            self.guests.append(Guest(self, self.sessions))

    def _new_operator(self) -> None:
        if self.operator is None and "control" in self.loop.listeners:
            self.operator = Operator(self)

    def _end(self) -> None:
        if not self._stop.done():
            self._stop.set_result(None)

    # ---- what guests and the operator tell ----

    def say(self, line: str) -> None:
        """A line of the conversation."""
        self.talk.append(line)

    def wrong(self, error: Exception, who: Guest | Operator) -> None:
        """A promise was broken to somebody."""
        name = getattr(who, "name", "operator")
        self.loop.fail(Violation(f"{name}: {type(error).__name__}: {error}"))

    def attached(self, guest: Guest) -> None:
        """A guest was told the disk's size."""
        allowed = {*guest.sizes, *self.grown[guest.growths :], *self.model.sizes}
        if guest.size not in allowed:
            raise Violation(f"size is {guest.size}, allowed: {sorted(allowed)}")

    def may_change(self, offset: int, length: int) -> bool:
        """Whether the oracle can follow a change of a range beside those under way."""
        cells = _cells(offset, length)
        if any(self._parted[cell] for cell in cells):
            return False
        return not any(self._touched[cell] for cell in _partly(offset, length))

    def begun(self, asked: Asked) -> None:
        """A change was sent."""
        self._touched.update(_cells(asked.offset, asked.length))
        self._parted.update(_partly(asked.offset, asked.length))

    def _ended(self, asked: Asked) -> None:
        self._touched.subtract(_cells(asked.offset, asked.length))
        self._parted.subtract(_partly(asked.offset, asked.length))

    def answered_change(self, asked: Asked) -> None:
        """A change has succeeded."""
        assert asked.operation is not None
        self._ended(asked)
        self.answered_sync(asked)
        durable = bool(asked.flags & nbd.FUA) or self.through
        self.model.done(asked.operation, sure=asked.command != nbd.TRIM, durable=durable)

    def answered_sync(self, asked: Asked) -> None:
        """A change or a flush has succeeded: may it?"""
        fault = self.fault
        if fault is not None and fault.sticky is not None and asked.began > fault.sticky:
            raise Violation(f"{asked}: succeeded after a sync had failed")

    def unanswered(self, asked: Asked) -> None:
        """A request has ended without success: it may have been done or not."""
        if asked.operation is not None:
            self._ended(asked)
            self.model.failed(asked.operation)
        elif asked.command in (nbd.READ, nbd.BLOCK_STATUS) and not asked.refusal:
            self.model.end_read(asked.began)

    def answered_error(self, asked: Asked, number: int) -> None:
        """A request has failed: for a reason?"""
        fault = self.fault
        if fault is None or not fault.struck:
            raise Violation(f"{asked}: error {number}, and nothing has failed")
        allowed = {REPLY[fault.errno]}
        changes = asked.command in (*CHANGES, nbd.FLUSH)
        if changes and not fault.kinds.isdisjoint(MAY_STICK):
            allowed.add(5)  # that the layer has failed before
        elif fault.once and asked.began > fault.last:
            raise Violation(f"{asked}: error {number}, after the only failure was over")
        if number not in allowed:
            raise Violation(f"{asked}: error {number}, must be one of {sorted(allowed)}")

    def left(self, guest: Guest) -> None:
        """A guest's connection has ended; what it asked may be under way for a while."""
        left = list(guest.asked.values())
        for asked in left:
            if asked.operation is None:
                self.unanswered(asked)
        changes = [asked for asked in left if asked.operation is not None]
        guest.asked.clear()
        if changes:
            self._orphans.append((guest.transport.protocol, changes))

    def _settle(self, *, everything: bool = False) -> None:
        """What vanished guests had asked, as far as the server has done with it."""
        under_way = []
        for connection, changes in self._orphans:
            if everything or (connection._gone and not connection._requests):
                for asked in changes:
                    self.unanswered(asked)
            else:
                under_way.append((connection, changes))
        self._orphans = under_way

    def new_name(self) -> str:
        """For a frozen layer; perhaps one that an earlier era did not come to the end with."""
        again = [name for name in self.tried_names if name not in self.frozen_names]
        if again and self.rng.random() < 0.5:
            return again[-1]
        self.tried_names.append(f"frozen{len(self.tried_names) + 1}")
        return self.tried_names[-1]

    def command_failed(self, name: str, arguments: dict[str, Any], error: dict[str, str]) -> None:
        """The operator was answered with an error: for a reason?"""
        kind, text = error["class"], error["desc"]
        refused = kind in ("UsageError", "UnsupportedError")
        struck = self.fault is not None and self.fault.struck > 0
        expected = {
            "stream": refused,
            "resize": refused and not self._can_resize(),
            "snapshot": (refused and "was resized" in text)
            or (arguments.get("name") in self.tried_names and "File exists" in text),
        }.get(name, False)
        if not (expected or struck):
            raise Violation(f"operator: {name} {arguments}: {kind}: {text}")
        if name == "resize" and kind not in ("SyncFailed", "LayerFailed"):
            assert self.live is not None
            self.model.resized(self.live.size)

    def _can_resize(self) -> bool:
        assert self.live is not None
        return self.live.engine.top.info.can_resize

    # ---- cutting the power ----

    def point(self, kind: str) -> None:
        """A moment at which the power may fail."""
        if self.over:
            return
        self._note_frozen(kind)
        if self.strike is not None and self._counts():
            self.strike -= 1
            if self.strike <= 0:
                how = self.cut_rng.choice(("kill", "power_cut"))
                self.struck = how, getattr(self.host, how)(self.cut_rng)
                self.over = True
                self.loop.stop()
                return
        try:
            super().point(kind)
        except CutFailed as error:
            self.loop.fail(error)  # whoever makes the call would take it for a failure of it

    def _counts(self) -> bool:
        """Whether the call that comes may be one at which the process ends."""
        if self.strike_in in (None, "pivot"):
            return self.strike_in is None or self.pivoting
        operator = self.operator
        return operator is not None and self.strike_in in (operator.doing, operator.streaming)

    def _note_frozen(self, kind: str) -> None:
        """Before the new layer takes the served name: the old one is complete, for ever."""
        if kind == "rename" and self.host.log[-1][1] == "top" and self.live is not None:
            self.pivoting = True
            for inode in _files(self.live.image.layers[0].driver):
                self.frozen[inode.number] = bytes(inode.live[: inode.length])

    def examine(self, host: SimHost, *, write: bool) -> bytes:
        """Open what survived and compare it with the oracle; returns the disk's content."""
        image = self.open_on(host, write=write)
        content = examine(image, self.model)
        self._check_frozen(image.engine.layers)
        self.check_base(host)
        return content

    def _check_frozen(self, layers: list[Any]) -> None:
        for driver in layers[1:]:
            for inode in _files(driver):
                content = self.frozen.get(inode.number)
                if content is None:
                    raise Violation(f"{driver.path} lies below, and was never frozen")
                if content != inode.live[: inode.length]:
                    raise Violation(f"{driver.path} was changed after it was frozen")

    # ---- telling ----

    def tell(self, error: Exception) -> str:
        """Everything a reader needs to understand and repeat a violation."""
        lines = [
            f"{type(error).__name__}: {error}",
            f"disk: {self.shape}",
            f"machine: {self.machine}, cache={self.cache}",
            f"seed {self.seed}; the last {TALK} lines of the conversation, oldest first:",
            *(f"  {line}" for line in self.talk[-TALK:]),
            f"the last {STORY} storage calls, oldest first:",
            *(f"  {line}" for line in self.host.story()[-STORY:]),
        ]
        return "\n".join(lines)


def _files(driver: Any) -> list[Inode]:
    handles = [*driver.locked_handles(), driver.data.handle]
    found = {handle.inode.number: handle.inode for handle in handles}
    return list(found.values())


def _cells(offset: int, length: int) -> range:
    return range(offset // SECTOR, -(-(offset + length) // SECTOR))


def _partly(offset: int, length: int) -> set[int]:
    """Sectors that a range covers in part."""
    end = offset + length
    found = set()
    if offset % SECTOR:
        found.add(offset // SECTOR)
    if end % SECTOR:
        found.add(end // SECTOR)
    return found
