# SPDX-License-Identifier: MIT
"""Operations on a small disk, and what must hold at every moment of them.

A ``Case`` is one simulated machine with one disk on it (``images.Shape``), the oracle (``Model``)
that follows what was done, and a sequence of operations: a short one over a small alphabet
(``short_sequences`` are all of them), or a long random one (``random_sequence``). At points that
the seed chooses the power is cut: a surviving copy of the machine is opened and compared with
the oracle, and the run goes on as if nothing had happened. Some runs move over to a survivor and go
on there, so that what one crash leaves behind meets the next.

After every cut: the disk opens; every sector is its last flushed value or a later written one; the
base is what it was, byte for byte; ``check`` finds no corruption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from random import Random
from typing import Any

from mmcow.errors import MmcowError, SyncFailed
from mmcow.image import Image, open_image
from mmcow.jobs.commit import commit
from mmcow.jobs.snapshot import snapshot
from mmcow.jobs.stream import stream
from mmcow.tasks import Completion, Task
from tests.sim import images
from tests.sim.host import Machine, SimHost
from tests.sim.images import Shape, pattern
from tests.sim.model import Model, Violation

Op = tuple[Any, ...]
SECTOR = 512
STORY = 60  # storage calls shown with a violation
CACHES = ("none", "none", "none", "none", "writeback", "writeback", "directsync", "writethrough")


class Case:
    """One run. ``density``: how likely a cut is at each point; ``cell``: the oracle's grain."""

    def __init__(
        self,
        seed: int,
        shape: Shape,
        *,
        density: float = 1.0,
        cell: int = SECTOR,
        machine: Machine | None = None,
        cache: str | None = None,
    ) -> None:
        self.seed = seed
        self.shape = shape
        self.rng = Random(seed)
        self.cut_rng = Random(seed + 1)
        self.density = density
        self.cache = cache or self.rng.choice(CACHES)
        self.through = self.cache in ("directsync", "writethrough")
        self.snapshots = 0  # from the first one on the served name is another layer's
        self.machine = machine or random_machine(self.rng)
        self.cuts = 0
        self.calls = 0  # storage calls until the process ended
        self.done: list[str] = []
        self.host = SimHost(seed, self.machine)
        content = images.put(self.host, shape)
        self.model = Model.of(content, cell)
        self.bases = [self.base_on(self.host)]  # what each sector of the base may be
        self.image: Image | None = None
        self.tasks: list[Task[Any]] = []
        self.tolerant = False  # whether operations may fail: for faults
        self.errors: list[MmcowError] = []
        self._writes = 0
        self._watch()

    # ---- running ----

    def run(self, ops: list[Op]) -> None:
        """Do the operations one after another, then look once more."""
        try:
            self.open()
            for op in ops:
                self.done.append(show(op))
                self.do(op)
                self.point("between")
            self.close()
            self.point("closed")
        except Exception as error:
            raise Violation(self.tell(error)) from error
        finally:
            self.abandon()

    def do(self, op: Op) -> None:
        """Do one operation."""
        name, *arguments = op
        getattr(self, f"do_{name}")(*arguments)

    def open(self) -> None:
        """Open the disk for writing and read it all."""
        self.image = self.open_writer()
        self.size_known(self.image.size)
        self.observe()

    def open_writer(self) -> Image:
        """Open the disk for the operations to come, and keep an eye on its tasks."""
        image = self.open_on(self.host, write=True)
        spawn = image.reactor.spawn

        def follow(coroutine: Any) -> Task[Any]:
            task = spawn(coroutine)
            if not task.done:
                self.tasks.append(task)
            return task

        image.reactor.spawn = follow  # type: ignore[method-assign]
        return image

    def open_on(self, host: SimHost, *, write: bool) -> Image:
        """Open the disk on some machine."""
        return open_image(
            images.TOP,
            format=None if self.snapshots else self.shape.format,
            write=write,
            cache=self.cache,
            backing_format="add-cow" if self.shape.chain else None,  # where it cannot be recorded
            host=host,
        )

    def close(self) -> bool:
        """Close the image if it is open: that flushes, unless an earlier sync has failed. Returns
        whether everything is durable."""
        image, self.image = self.image, None
        if image is None:
            return True
        began = self.model.begin_flush()
        failed = image.engine.flusher.failure is not None
        try:
            image.close()
        except MmcowError as error:
            self._failed(error)
            return False
        if not failed:
            self.model.flushed(began)
        return not failed

    def abandon(self) -> None:
        """The process that had the image open is gone: nothing is flushed, nothing released."""
        image, self.image = self.image, None
        if image is None:
            return
        image._closed = True
        self.host.watch = None
        self.host.locks.clear()
        # Left to the garbage collector, a coroutine's clean-up could meet metadata freed before it.
        for task in self.tasks:
            if not task.done:
                with suppress(RuntimeError):
                    task._coroutine.close()
        image.reactor.ready.clear()
        self.tasks.clear()

    def size_known(self, size: int) -> None:
        """After an opening: which of the possible sizes it is."""
        if size not in self.model.sizes:
            raise Violation(f"size is {size}, allowed: {self.model.sizes}")
        if size != self.model.size:
            self.model.resized(size)

    def observe(self) -> None:
        """Read the whole disk while nothing is under way."""
        assert self.image is not None
        self.model.observe(read_all(self.image))

    # ---- operations ----

    def do_write(self, offset: int, length: int) -> None:
        self._alone("write", offset, length)

    def do_zero(self, offset: int, length: int) -> None:
        self._alone("zero", offset, length)

    def do_discard(self, offset: int, length: int) -> None:
        self._alone("discard", offset, length)

    def do_flush(self) -> None:
        self._alone("flush")

    def do_read(self, offset: int, length: int) -> None:
        self._alone("read", offset, length)

    def do_together(self, *ops: Op) -> None:
        """Start several at once, then wait for all."""
        started = [self._start(*op) for op in ops]
        for wait in started:
            self._finish(wait)

    def do_threads(self, *sequences: tuple[Op, ...]) -> None:
        """Run several sequences side by side, each one operation after another."""
        assert self.image is not None
        tasks = [self.image.reactor.spawn(self._thread(ops)) for ops in sequences]
        for task in tasks:
            self.image.reactor.wait(task)

    async def _thread(self, ops: tuple[Op, ...]) -> None:
        for op in ops:
            try:
                request = self._begin(*op)
                if request is not None:
                    await request
            except MmcowError as error:
                self._failed(error)

    def do_interrupted(self, how: str, after: int, *ops: Op) -> None:
        """Cut the power ("power_cut") or kill the process ("kill") in the middle of something: at
        the point number ``after``. Go on with what is left."""
        host, left, found = self.host, after, None

        def strike(_: str) -> None:
            nonlocal left, found
            left -= 1
            if left <= 0:
                found = found or getattr(host, how)(self.cut_rng)
                raise Stopped

        host.watch = strike
        try:
            for op in ops:
                self.do(op)
        except BaseException:
            if found is None:
                raise
            # The process is dead: what its clean-up came to is nobody's business.
        self._go_on(how, found or getattr(host, how)(self.cut_rng))

    def do_look(self) -> None:
        try:
            self.observe()
        except MmcowError as error:
            self._failed(error)

    def do_resize(self, size: int) -> None:
        assert self.image is not None
        if not self.image.engine.top.info.can_resize:
            return
        self.model.begin_resize(size)
        try:
            self.image.resize(size, shrink=True)
        except SyncFailed as error:
            self._failed(error)  # either size from now on, until the disk is opened again
        except MmcowError as error:
            self._failed(error)
            self.model.resized(self.image.size)
        else:
            self.model.resized(size)

    def do_stream(self, *ops: Op) -> None:
        """Pull everything up from below while other requests are under way."""
        assert self.image is not None
        started = [self._start(*op) for op in ops]
        try:
            stream(self.image)
        except MmcowError as error:
            self._failed(error)
        else:
            assert not self.image.engine.top.info.has_backing
        for wait in started:
            self._finish(wait)

    def do_snapshot(self, *ops: Op) -> None:
        """Freeze the layer under another name while requests are under way."""
        assert self.image is not None
        self.snapshots += 1
        started = [self._start(*op) for op in ops]
        try:
            snapshot(self.image, f"frozen{self.snapshots}")
        except MmcowError as error:
            self._failed(error)
        for wait in started:
            self._finish(wait)

    def do_commit(self) -> None:
        """Merge the top layer down. The disk stays as it is; the base may change to that."""
        assert self.image is not None
        top, *below = self.image.engine.layers
        if not below or (below[0].info.size < top.info.size and not below[0].info.can_resize):
            return
        into_base = below[0].path == images.BASE
        try:
            content = read_all(self.image)
        except MmcowError as error:
            self._failed(error)
            return
        if not self.close():
            self.reopen(clean=False)
            return
        if into_base:
            self.bases.append(content)
        try:
            commit(
                images.TOP,
                format=None if self.snapshots else self.shape.format,
                cache=self.cache,
                backing_format="add-cow" if self.shape.chain else None,
                host=self.host,
            )
        except MmcowError as error:
            self._failed(error)
        else:
            if into_base:
                self._check_merged(content)
        self.reopen(clean=True)

    def _check_merged(self, content: bytes) -> None:
        """After a commit the base alone is the disk, and keeps what it has beyond its end."""
        found = self.host.content(images.BASE)
        if found[: len(content)].ljust(len(content), b"\0") != content:
            raise Violation("after the commit the base is not what the disk was")
        self.check_base(self.host)
        self.bases = [found]

    def do_reopen(self) -> None:
        self.reopen(clean=self.close())

    def reopen(self, *, clean: bool) -> None:
        """Open the disk after it was closed; without a fault that was always ``clean``."""
        assert clean
        self.open()

    def do_crash(self) -> None:
        """Cut the power here and go on with what survived."""
        self._go_on("power_cut", self.host.power_cut(self.cut_rng))

    def do_kill(self) -> None:
        """Kill the process here and go on with what the page cache holds."""
        self._go_on("kill", self.host.kill(self.cut_rng))

    def _go_on(self, how: str, host: SimHost) -> None:
        self._move_to(host)
        host.watch = None
        self.image = self.open_writer()
        self.check_base(host)
        content = read_all(self.image)
        if how == "power_cut":
            self.model.check_survivor(content)
            self.model = self.model.survivor(content)
            self.bases = [self.base_on(host)]
        else:
            if len(self.model.sizes) > 1:
                self.image.flush()  # else a later cut could still bring the other size back
            self.model.killed(content)
            self.bases.append(self.base_on(host))  # not durable before the next commit
        self._watch()

    def _move_to(self, host: SimHost) -> None:
        self.abandon()
        self.host.watch = None
        self.calls += self.host.calls
        host.log.extend(self.host.log)
        self.host = host
        self._watch()

    def _alone(self, *op: Any) -> None:
        self._finish(self._start(*op))

    def _start(self, *op: Any) -> Callable[[], None]:
        """Start one request; returns what waits for it."""
        assert self.image is not None
        try:
            request = self._begin(*op)
        except MmcowError as error:
            failed = error
            return lambda: self._failed(failed)
        if request is None:
            return lambda: None
        image = self.image
        return lambda: image.reactor.wait(request)

    def _finish(self, wait: Callable[[], None]) -> None:
        try:
            wait()
        except MmcowError as error:
            self._failed(error)

    def _begin(self, name: str, *arguments: int) -> Completion[Any] | None:
        """Start one request and tell the oracle. None if nothing of it lies inside the disk: a
        crash or a resize may have left a smaller one than was planned for."""
        if arguments:
            offset, length = arguments
            length = min(length, self.model.size - offset)
            if length <= 0:
                return None
            arguments = offset, length
        request: Completion[Any] = getattr(self, f"_start_{name}")(*arguments)
        return request

    def _failed(self, error: MmcowError) -> None:
        if not self.tolerant:
            raise error
        self.errors.append(error)

    def _start_write(self, offset: int, length: int) -> Completion[Any]:
        self._writes += 1
        skip = offset % SECTOR
        data = pattern(f"w{self._writes}", skip + length, offset // SECTOR)[skip:]
        operation = self.model.begin_write(offset, data)
        return self._follow(operation, lambda e: e.write(offset, memoryview(data)))

    def _start_zero(self, offset: int, length: int) -> Completion[Any]:
        operation = self.model.begin_zero(offset, length)
        may_unmap = self.rng.random() < 0.8
        return self._follow(operation, lambda e: e.write_zeroes(offset, length, may_unmap))

    def _start_discard(self, offset: int, length: int) -> Completion[Any]:
        operation = self.model.begin_zero(offset, length)
        return self._follow(operation, lambda e: e.discard(offset, length), sure=False)

    def _start_flush(self) -> Completion[Any]:
        assert self.image is not None
        model = self.model
        began = model.begin_flush()
        request = _completion(self.image, self.image.engine.flush())
        request.on_done(lambda done: model.flushed(began) if done.error is None else None)
        return request

    def _start_read(self, offset: int, length: int) -> Completion[Any]:
        assert self.image is not None
        first = offset // self.model.cell * self.model.cell
        end = -(-(offset + length) // self.model.cell) * self.model.cell
        into = bytearray(end - first)
        model = self.model
        began = model.begin_read()
        request = _completion(self.image, self.image.engine.read(first, memoryview(into)))

        def compare(done: Completion[Any]) -> None:
            model.end_read(began)
            if done.error is None:
                model.check_read(first, bytes(into), began)

        request.on_done(compare)
        return request

    def _follow(
        self, operation: Any, start: Callable[[Any], Any], *, sure: bool = True
    ) -> Completion[Any]:
        """Start a change, and tell the oracle how it ends when it ends."""
        assert self.image is not None
        model = self.model
        try:
            request = _completion(self.image, start(self.image.engine))
        except MmcowError:
            model.failed(operation)
            raise

        def end(done: Completion[Any]) -> None:
            if done.error is not None:
                model.failed(operation)
                return
            model.done(operation, sure=sure)
            if self.through:  # what was acknowledged is durable
                model.flushed(model.begin_flush())

        request.on_done(end)
        return request

    # ---- cutting the power ----

    def _watch(self) -> None:
        self.host.watch = self.point if self.density else None

    def point(self, kind: str) -> None:
        """A moment at which the power may fail."""
        if self.cut_rng.random() < self.density:
            self.cut()

    def cut(self) -> None:
        """Cut the power, examine what survives, and go back."""
        self.cuts += 1
        survivor = self.host.power_cut(self.cut_rng)
        try:
            content = self.examine(survivor, write=self.cut_rng.random() < 0.3)
            if self.cut_rng.random() < 0.05:
                self._same_again(survivor, content)
        except Exception as error:
            raise CutFailed(f"power cut {self.cuts}: {type(error).__name__}: {error}") from error

    def _same_again(self, host: SimHost, content: bytes) -> None:
        """Nothing was changed since: a second cut must find the same."""
        again = self.examine(host.power_cut(self.cut_rng), write=False)
        if again != content:
            raise Violation("a second power cut, with nothing written, found other bytes")

    def examine(self, host: SimHost, *, write: bool) -> bytes:
        """Open what survived and compare it with the oracle; returns the disk's content."""
        content = examine(self.open_on(host, write=write), self.model)
        self.check_base(host)
        return content

    def check_base(self, host: SimHost) -> None:
        """The base is untouched. During a commit each sector may be the disk's already."""
        found = self.base_on(host)
        if found in self.bases:
            return
        if len(self.bases) == 1:
            raise Violation("the base has changed")
        if len(found) < min(len(base) for base in self.bases):
            raise Violation("during the commit the base was cut")
        for at in range(0, len(found), SECTOR):
            sector = found[at : at + SECTOR]  # the last one may be odd
            allowed = (base[at : at + len(sector)] for base in self.bases)
            if all(sector != value.ljust(len(sector), b"\0") for value in allowed):
                raise Violation(f"during the commit the base got other bytes at {at}")

    def base_on(self, host: SimHost) -> bytes:
        """The base file's content."""
        return b"" if self.shape.base is None else host.content(images.BASE)

    # ---- telling ----

    def tell(self, error: Exception) -> str:
        """Everything a reader needs to understand and repeat a violation."""
        lines = [
            f"{type(error).__name__}: {error}",
            f"disk: {self.shape}",
            f"machine: {self.machine}, cache={self.cache}",
            f"seed {self.seed}; operations: {'; '.join(self.done)}",
            f"the last {STORY} storage calls, oldest first:",
            *(f"  {line}" for line in self.host.story()[-STORY:]),
        ]
        return "\n".join(lines)


class Stopped(BaseException):
    """The process ends here. No ``Exception``: nothing on the way may live on."""


class CutFailed(AssertionError):
    """A disk examined after a power cut broke its promise."""


def random_machine(rng: Random) -> Machine:
    """A machine with one of the characters storage has."""
    return Machine(
        direct_align=rng.choice((512, 512, 512, 4096)),
        can_punch=rng.random() < 0.8,
        can_zero=rng.random() < 0.6,
        mapped=rng.random() < 0.5,
    )


def read_all(image: Image) -> bytes:
    """The whole disk."""
    content = bytearray(image.size)
    image.reactor.wait(_completion(image, image.engine.read(0, memoryview(content))))
    return bytes(content)


def check_clean(image: Image) -> None:
    """``check`` of every layer finds no corruption."""
    for layer in image.engine.layers:
        for finding in image.reactor.run(layer.check("")).findings:
            if finding.kind == "corruption":
                raise Violation(f"check of {layer.path}: {finding.text}")


def examine(image: Image, model: Model) -> bytes:
    """Compare what survived with the oracle, and close the image; returns the disk's content."""
    try:
        content = read_all(image)
        model.check_survivor(content)
        # A commit changes the base before a cow file can note the base's new time.
        check_clean(image)
    finally:
        image.close()
    return content


def _completion(image: Image, request: Any) -> Completion[Any]:
    """The engine answers with a completion, or with a coroutine that wants to be started."""
    return request if isinstance(request, Completion) else image.reactor.spawn(request)


def show(op: Op) -> str:
    """An operation in one word or two."""
    name, *arguments = op
    if name in ("stream", "snapshot") and arguments:
        return f"{name} with ({'; '.join(show(inner) for inner in arguments)})"
    if name == "together":
        return "(" + " with ".join(show(inner) for inner in arguments) + ")"
    if name == "threads":
        threads = ("; ".join(show(inner) for inner in thread) for thread in arguments)
        return "(" + " | ".join(threads) + ")"
    if name == "interrupted":
        how, after, *ops = arguments
        return f"{how} at point {after} of [{'; '.join(show(inner) for inner in ops)}]"
    return " ".join([name, *("+".join(str(a) for a in arguments).split())])


# ---- sequences ----


def alphabet(shape: Shape) -> list[Op]:
    """A few operations that meet at the borders of two clusters."""
    cluster, size = shape.cluster, shape.size
    inside = SECTOR if cluster > SECTOR else 0
    last = (size - 1) // SECTOR * SECTOR
    grown = size + cluster + SECTOR if size % cluster else size + cluster
    return [
        ("write", cluster, min(cluster, size - cluster)),
        ("write", inside, SECTOR),
        ("write", max(cluster - SECTOR, 0), 2 * SECTOR),
        ("write", last, SECTOR),
        ("zero", 0, cluster),
        ("zero", inside, 2 * SECTOR),
        ("discard", 0, 2 * cluster),
        ("flush",),
        ("resize", grown),
        ("resize", cluster + SECTOR),
        ("together", ("write", 0, SECTOR), ("write", 0, cluster)),
        ("together", ("write", inside, SECTOR), ("flush",), ("write", cluster, SECTOR)),
        ("crash",),
        ("commit",),
        ("stream",),
        ("snapshot",),
    ]


def short_sequences(shape: Shape, length: int) -> Iterator[list[Op]]:
    """All sequences of a length over the alphabet."""
    for ops in product(alphabet(shape), repeat=length):
        yield list(ops)


def random_sequence(rng: Random, shape: Shape, count: int, grain: int = SECTOR) -> list[Op]:
    """A long story. Requests are multiples of ``grain``; below a sector nothing runs together."""
    ops: list[Op] = []
    size = shape.size
    while len(ops) < count:
        roll = rng.random()
        if roll < 0.35:
            ops.append(_request(rng, shape, size, grain))
        elif roll < 0.65 and grain == SECTOR:
            ops.append(_side_by_side(rng, shape, size))
        elif roll < 0.8:
            ops.append(("flush",))
        elif roll < 0.84:
            size = _other_size(rng, shape, size)
            ops.append(("resize", size))
        elif roll < 0.88:
            ops.append(rng.choice((("reopen",), ("look",))))
        elif roll < 0.91:
            ops.append((rng.choice(("crash", "kill")),))
        elif roll < 0.93:
            ops.append(("commit",))
        elif roll < 0.935:
            ops.append(("stream", *_requests(rng, shape, size, 3)))
        elif roll < 0.945:
            ops.append(("snapshot", *_requests(rng, shape, size, 3)))
        elif grain == SECTOR:
            ops.append(_interrupted(rng, shape, size))
    return ops


def _requests(rng: Random, shape: Shape, size: int, most: int) -> list[Op]:
    """Some requests and perhaps a flush among them."""
    found = [_request(rng, shape, size, SECTOR) for _ in range(rng.randint(1, most))]
    found += [("flush",)] * (rng.random() < 0.6)
    rng.shuffle(found)
    return found


def _side_by_side(rng: Random, shape: Shape, size: int) -> Op:
    if rng.random() < 0.5:
        return ("together", *_requests(rng, shape, size, 4))
    threads = (tuple(_requests(rng, shape, size, 3)) for _ in range(rng.randint(2, 3)))
    return ("threads", *threads)


def _interrupted(rng: Random, shape: Shape, size: int) -> Op:
    how = rng.choice(("power_cut", "kill"))
    roll = rng.random()
    if roll < 0.3:
        what: list[Op] = [("resize", _other_size(rng, shape, size))]
    elif roll < 0.5:
        what = [("commit",)]
    elif roll < 0.58:
        what = [("stream",)]
    elif roll < 0.65:
        what = [("snapshot",)]
    else:
        what = [_side_by_side(rng, shape, size), ("flush",)]
    return ("interrupted", how, rng.randint(1, rng.choice((12, 40))), *what)


def _other_size(rng: Random, shape: Shape, size: int) -> int:
    change = rng.randint(1, 2 * shape.cluster // SECTOR) * SECTOR
    return min(max(size + rng.choice((-change, change)), SECTOR), 2 * shape.size)


def _request(rng: Random, shape: Shape, size: int, grain: int) -> Op:
    name = rng.choice(("write", "write", "write", "zero", "discard", "read"))
    cluster = min(shape.cluster, size)
    if rng.random() < 0.4:  # whole clusters
        offset = rng.randrange(-(-size // cluster)) * cluster
        length = rng.randint(1, 3) * cluster
    else:
        offset = rng.randrange(size // grain) * grain
        length = rng.randint(1, max(cluster // grain, 4)) * grain
    offset = min(offset, size - grain)
    return (name, offset, min(length, size - offset))

