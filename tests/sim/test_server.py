# SPDX-License-Identifier: MIT
"""The simulated server in its short form, and the bugs put into it that it must see.

``python -m tests.sim.crash --format server`` is the long form. Each bug replaces a few lines of the
real server by lines that somebody might have written; ``test_control`` runs the same cases without.
"""

from __future__ import annotations

import pytest

import mmcow.image
from mmcow import aio
from mmcow.chain import close_layers
from mmcow.engine import gate
from mmcow.engine.engine import Engine
from mmcow.engine.flush import Flusher
from mmcow.engine.gate import Gate
from mmcow.jobs import snapshot
from mmcow.native import aligned
from mmcow.nbd import connection as connections
from mmcow.nbd import export as exports
from mmcow.nbd import protocol as wire
from mmcow.nbd.connection import Connection
from mmcow.nbd.export import Export
from mmcow.nbd.live import Stream
from mmcow.nbd.requests import Agreed
from mmcow.storage import names
from mmcow.tasks import Completion, completed
from tests.sim.model import Violation
from tests.sim.serving import ServerCase
from tests.sim.test_planted import _pivot_without

FIRST = 7_000_000
MOST = 1500  # within so many cases a bug must be seen
CONTROL = 60  # cases without a bug
OWN = ("AttributeError", "TypeError", "NameError")


@pytest.fixture(autouse=True)
def _checked_drivers(monkeypatch):
    monkeypatch.setattr(mmcow.image, "CHECK_DRIVERS", False)  # the rig is on its own here


def cases_until_seen() -> tuple[int, int, str] | None:
    """Cases and power cuts until a violation, and its text; None if there was none."""
    cuts = 0
    for number in range(MOST):
        case = ServerCase(FIRST + number)
        try:
            case.run()
        except Violation as violation:
            return number + 1, cuts + case.cuts, str(violation)
        cuts += case.cuts
    return None


# ---- the bugs ----


def fua_answered_before_its_flush(patch) -> None:
    """A write with FUA is answered when it is written, not when it is durable."""
    patch.setattr(Export, "_durably", lambda self, completion, durable: completion)


def flush_of_own_writes_only(patch) -> None:
    """A flush of a connection that has written nothing itself does nothing."""
    start = Connection._start

    def narrow(self, export, request, payload):
        if request.command in (wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES):
            self.has_written = True
        if request.command == wire.CMD_FLUSH and not getattr(self, "has_written", False):
            self._send(self._agreed.done(request.cookie))
            return
        start(self, export, request, payload)

    patch.setattr(Connection, "_start", narrow)


def answered_before_it_is_done(patch) -> None:
    """A write is answered when it has begun."""

    def write(self, offset, data, *, durable):
        completion = self.image.engine.write(offset, data)
        return self._durably(completion, durable) if durable else completed(0)

    patch.setattr(Export, "write", write)


def cookie_of_another_request(patch) -> None:
    """An answer carries the cookie of the one before it."""
    done, last = Agreed.done, [0]

    def stale(self, cookie):
        last.append(cookie)
        return done(self, last.pop(0))

    patch.setattr(Agreed, "done", stale)


def requests_lost_while_layers_change(patch) -> None:
    """A request that comes while a snapshot or a resize runs is never woken."""

    async def enter(self) -> None:
        if self.closed:
            await Completion()
        self.inside += 1

    patch.setattr(Gate, "enter", enter)


def one_buffer_for_all(patch) -> None:
    """Buffers are used again while their replies wait to be sent, or their writes are under way."""
    buffers: dict[int, memoryview] = {}

    def shared(length):
        return buffers.setdefault(length, aligned(length))

    patch.setattr(connections, "aligned", shared)


def not_handed_to_the_kernel(patch) -> None:
    """What a turn has begun is not submitted."""
    start = Connection._start

    def forgetful(self, *arguments):
        start(self, *arguments)
        self._started = False

    patch.setattr(Connection, "_start", forgetful)


def errors_answered_as_success(patch) -> None:
    """A request that failed is answered as one that did not."""

    def failed(self, export, request, error) -> None:
        self._done(request)
        if request.command == wire.CMD_READ:
            self._send_error(request, wire.EIO, "")
        else:
            self._send(self._agreed.done(request.cookie))

    patch.setattr(Connection, "_failed", failed)


def every_error_is_einval(patch) -> None:
    """The cause of an error is lost on its way to the client."""
    patch.setattr(wire, "error_of", lambda error: wire.EINVAL)


def failure_not_sticky(patch) -> None:
    """After a failed sync the next one is believed."""
    patch.setattr(Flusher, "fail", lambda self, cause: None)


def never_resumed(patch) -> None:
    """A client that read its replies late is not read from any more."""
    patch.setattr(Connection, "resume_writing", lambda self: None)


def half_closed_is_gone(patch) -> None:
    """A client that sends no more gets no answers."""

    def eof_received(self) -> bool:
        self._transport.abort()
        return False

    patch.setattr(Connection, "eof_received", eof_received)


def everything_is_a_hole(patch) -> None:
    """BLOCK_STATUS tells zeros where there is data."""
    patch.setattr(exports, "_allocation", lambda segment: wire.STATE_HOLE | wire.STATE_ZERO)


def base_closed_a_step_later(patch) -> None:
    """Between dropping the base and closing its files a snapshot may put a layer on top."""

    async def let_go(self, top) -> bool:
        image = self._export.image
        await image.perform(lambda: image.reactor.spawn(image.engine.drop_backing()))
        below = image.image.layers[1:]
        del image.image.layers[1:]
        close_layers(below)
        return True

    patch.setattr(Stream, "_let_go", let_go)


def stream_overwrites_guests(patch) -> None:
    """A piece is copied up while a guest writes there."""
    patch.setattr(gate, "overlaps", lambda *_: False)


def snapshot_without_flush(patch) -> None:
    """The frozen layer's un-flushed bits stay behind: nobody will ever write them."""
    patch.setattr(snapshot, "_pivot", _pivot_without("flush"))


def snapshot_renames_too_early(patch) -> None:
    """The served name changes hands before the frozen layer's own name is durable."""
    patch.setattr(snapshot, "_pivot", _pivot_without("sync"))


def frozen_layer_still_written(patch) -> None:
    """The layers change places on disk, and the server goes on in the old one."""

    async def pivot(image, fresh, frozen) -> None:
        host = image.opener.host
        await image.engine.flusher.flush()
        host.link(image.path, frozen)
        host.sync_directory(names.directory_of(frozen))
        host.rename(fresh.path, image.path)
        host.sync_directory(names.directory_of(frozen))

    patch.setattr(snapshot, "_pivot", pivot)


def name_believed(patch) -> None:
    """The served name, which a killed process gave last, is not made durable at opening."""
    patch.setattr(names, "confirm", lambda host, path: None)


def resize_answered_too_early(patch) -> None:
    """The operator is told of a new size before it is durable."""

    async def resize(self, size) -> None:
        work = self.perform(lambda: self._reactor.spawn(self._engine.resize(size)))
        work.add_done_callback(lambda done: done.exception())

    patch.setattr(aio.Image, "resize", resize)


def stopped_without_flush(patch) -> None:
    """The server ends as if what it acknowledged were nobody's business."""

    async def close(self) -> None:
        await self.gate.close()
        self.gate.open()

    patch.setattr(Engine, "close", close)


BUGS = (
    fua_answered_before_its_flush,
    flush_of_own_writes_only,
    answered_before_it_is_done,
    cookie_of_another_request,
    requests_lost_while_layers_change,
    one_buffer_for_all,
    not_handed_to_the_kernel,
    errors_answered_as_success,
    every_error_is_einval,
    failure_not_sticky,
    never_resumed,
    half_closed_is_gone,
    everything_is_a_hole,
    base_closed_a_step_later,
    stream_overwrites_guests,
    snapshot_without_flush,
    snapshot_renames_too_early,
    frozen_layer_still_written,
    name_believed,
    resize_answered_too_early,
    stopped_without_flush,
)


@pytest.mark.crash
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_bug_is_seen(bug, monkeypatch) -> None:
    bug(monkeypatch)
    seen = cases_until_seen()
    assert seen is not None, f"{bug.__doc__} Not seen in {MOST} cases."
    head = seen[2].partition("disk:")[0]
    assert not any(word in head for word in OWN), f"a mistake of the bug itself: {head}"
    print(f"{bug.__name__}: seen after {seen[0]} cases, {seen[1]} power cuts: {seen[2][:300]}")


def test_control() -> None:
    """This test runs the same cases without any bug."""
    replies = 0
    for number in range(CONTROL):
        case = ServerCase(FIRST + number)
        case.run()
        replies += case.replies
    assert replies > 20 * CONTROL


def test_new_seed(rng) -> None:
    """This test serves where nobody has served before; its seed is in the failure's text."""
    first = rng.randrange(1 << 40)
    for number in range(first, first + 20):
        ServerCase(number).run()


def test_case_is_repeated_exactly() -> None:
    """This test needs the same conversation and the same storage calls whenever a case is run."""

    def story(number: int) -> tuple[list[str], int, int, list[str]]:
        case = ServerCase(number)
        case.run()
        # Temporary names are drawn from the system, not from the seed.
        calls = [line for line in case.host.story() if "mmcow-new" not in line]
        talk = [line for line in case.talk if "mmcow-new" not in line]
        return talk, case.cuts, case.replies, calls

    for number in range(FIRST, FIRST + 15):
        assert story(number) == story(number)
