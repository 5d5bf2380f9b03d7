# SPDX-License-Identifier: MIT
"""One guest disk, synchronously: what ``mmcow.open`` returns.

Owns: opening and creating (host, reactor, queue and chain put together), argument checks at
the boundary, the synchronous verbs, closing.

Never: contains a request algorithm (``engine``), knows formats.
"""

from __future__ import annotations

import io
import os
import warnings as python_warnings
from functools import partial
from itertools import islice
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from mmcow.chain import ChainOptions, Layer, close_layers, open_chain, probe_file
from mmcow.engine.engine import Engine
from mmcow.errors import ClosedError, ForkedError, UsageError
from mmcow.formats import registry
from mmcow.formats.driver import Kind
from mmcow.formats.opening import CreateRequest, Opener, Policy, resolve
from mmcow.native import aligned
from mmcow.ranges import SECTOR, SIZE_MOST, align_up
from mmcow.storage.file import Cache
from mmcow.storage.linux import LinuxHost
from mmcow.storage.names import exists
from mmcow.storage.path import READ, WRITE
from mmcow.tasks import Reactor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from mmcow.engine.lookup import Segment
    from mmcow.engine.survey import Regions
    from mmcow.formats.driver import Driver
    from mmcow.storage.host import Buffer, Host, Identity
    from mmcow.tasks import Completion

# Segments looked up under one hold of the lock: others get a turn, memory stays bounded.
STATUS_BATCH = 1024
# The same where a survey may go on behind them.
STATUS_SMALL = 32

# The tests set this: every driver then runs behind the wrapper that asserts its contract.
CHECK_DRIVERS = False


class BlockStatus(NamedTuple):
    """What a range of the disk is made of.

    ``kind``: DATA (bytes in ``path`` at ``host_offset``), ZERO (reads as zeros, said by the layer
    at ``depth``), BELOW (no layer has it: zeros; or, asked of one layer, not in this layer),
    SPECIAL (compressed). ``depth`` counts layers from the asked-for top (0).
    """

    offset: int
    length: int
    kind: Kind
    depth: int
    host_offset: int | None
    path: str | None

    @property
    def is_zero(self) -> bool:
        """Reads as zeros for certain (over the whole chain)."""
        return self.kind in (Kind.ZERO, Kind.BELOW)


# From a row of a survey: a third of the time that ``BlockStatus(*row)`` takes, by the million.
_MAKE_STATUS: partial[BlockStatus] = partial(tuple.__new__, BlockStatus)


class LayerReport(NamedTuple):
    """Facts about one layer of an open image, for people and tools."""

    path: str
    format: str
    variant: str
    size: int
    cluster_size: int
    data_file: str
    cache: str
    backing: str | None
    backing_format: str | None
    probed: bool


class Image:
    """A guest disk. Every method may be called from any thread; close it when done.

    Offsets and lengths are bytes; a range beyond the disk is a UsageError. Writes are visible
    at once and durable after ``flush`` (or ``close``). Errors: ``mmcow.errors``.
    """

    def __init__(self, opener: Opener, layers: list[Layer], path: str, *, write: bool) -> None:
        self.path = path
        self.location = opener.host.absolute(path)  # the program may change its directory
        self.reactor = opener.reactor
        self.layers = layers
        self._opener = opener
        self._pid = os.getpid()
        self._closed = False
        drivers = [_guarded(layer.driver) for layer in layers]
        self.engine = Engine(opener.reactor, drivers, writable=write, name=path)
        if write and layers[0].probed and layers[0].format == "raw":
            self.engine.first_sector_guard = _other_format
        self.engine.hits.refresh()
        self._hit = self.engine.hits.transfer

    # ---- facts ----

    @property
    def size(self) -> int:
        """Of the disk, in bytes; a multiple of 512."""
        return self.engine.size

    @property
    def opener(self) -> Opener:
        """What the layers were opened with, for jobs that open or make further files."""
        return self._opener

    def push(self, layer: Layer) -> None:
        """Put a layer on top. Only alone in the engine, with everything flushed."""
        self.layers.insert(0, layer)
        self.engine.push(_guarded(layer.driver))

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    @property
    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self.engine.writable

    @property
    def format(self) -> str:
        """Of the top layer."""
        return self.layers[0].format

    @property
    def queue_backend(self) -> str:
        """What moves the data: "io_uring" or "threads"."""
        return str(getattr(self._opener.queue, "backend", ""))

    @property
    def warnings(self) -> list[str]:
        """What is odd about the chain, though it could be opened (a base that changed)."""
        return list(self._opener.warnings)

    @property
    def chain(self) -> tuple[LayerReport, ...]:
        """The layers, top first."""
        return tuple(_report(layer) for layer in self.layers)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.size} bytes"
        return f"<mmcow.Image {self.path!r} {self.format} {state}>"

    # ---- data ----

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``."""
        offset, length = index(offset), index(length)
        self._check()
        self.engine.check_range(offset, length)  # before a buffer of that size is made
        buffer = aligned(length)
        if not self._hit(READ, offset, buffer):
            self._perform(lambda: self.engine.read(offset, buffer))
        return bytes(buffer)

    def readinto(self, offset: int, buffer: bytearray | memoryview) -> int:
        """Fill ``buffer`` (any writable contiguous buffer) from ``offset``; returns its length.

        Nothing is copied where the buffer is aligned as direct I/O demands: ``aligned_buffer``.
        """
        offset = index(offset)
        view = writable(self.path, buffer)
        if not self._hit(READ, offset, view):
            self._perform(lambda: self.engine.read(offset, view))
        return len(view)

    def write(self, offset: int, data: Buffer) -> int:
        """Write all of ``data`` at ``offset``; returns its length."""
        offset = index(offset)
        view = flat(data)
        if not self._hit(WRITE, offset, view):
            self._perform(lambda: self.engine.write(offset, view))
        elif self.engine.hits.wants_relief():
            self._perform(lambda: self.reactor.spawn(self.engine.relieve()))
        return len(view)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        """Make a range read as zeros. ``may_unmap`` False keeps its space reserved."""
        offset, length = index(offset), index(length)
        self._perform(lambda: self.engine.write_zeroes(offset, length, may_unmap))

    def discard(self, offset: int, length: int) -> None:
        """Tell that a range's content is no longer needed. A hint: afterwards each block of it
        reads as zeros or as before; never does older content of a base show."""
        offset, length = index(offset), index(length)
        self._perform(lambda: self.engine.discard(offset, length))

    def flush(self) -> None:
        """Make every change durable that returned before this call."""
        self._perform(lambda: self.reactor.spawn(self.engine.flush()))

    def resize(self, size: int, *, shrink: bool = False) -> None:
        """Change the disk's size, durably; rounded up to 512 bytes. New bytes read as zeros.

        ``shrink`` must be True where the end is to be cut off.
        """
        size = check_size(self.path, size)
        self._perform(lambda: self.reactor.spawn(self.engine.resize(size, shrink=shrink)))

    def _perform(self, begin: Callable[[], Completion[Any]]) -> None:
        """Begin a request and wait for it; the image cannot be closed in between."""
        self._check_process()  # before the lock, which a thread may have held at the fork
        with self.reactor.lock:
            self._check()
            self.reactor.perform(begin)

    def block_status(
        self, offset: int = 0, length: int | None = None, *, layer: int | None = None
    ) -> Iterator[BlockStatus]:
        """What the range is made of, in order and without gaps.

        Over the whole chain, or what one layer alone says (``layer`` 0 is the top; BELOW is then
        what the layer does not have). Extents are those of the moment they are asked for.
        """
        self._check()
        offset = index(offset)
        length = self.size - offset if length is None else index(length)
        self.engine.check_range(offset, length)
        self._check_layer(layer)
        return self._statuses(offset, offset + length, layer)

    def _check_layer(self, layer: int | None) -> None:
        if layer is not None and not 0 <= layer < len(self.engine.layers):
            raise UsageError(f"{self.path}: layer {layer} of {len(self.engine.layers)}")

    def _statuses(self, offset: int, end: int, layer: int | None) -> Iterator[BlockStatus]:
        pending: BlockStatus | None = None
        regions: dict[int, Regions] = {}
        while offset < end:
            with self.reactor.lock:  # the chain that the depths count in may change outside
                self._check()
                self._check_layer(layer)
                if self.writable:
                    regions.clear()
                batch = self._status_batch(offset, end - offset, layer, regions)
            offset = batch[-1].offset + batch[-1].length
            if pending is not None:
                if _continues(pending, batch[0]):
                    batch[0] = _joined(pending, batch[0])
                else:
                    yield pending
            pending = batch.pop()
            yield from batch
        if pending is not None:
            yield pending

    def _status_batch(
        self, offset: int, length: int, layer: int | None, regions: dict[int, Regions]
    ) -> list[BlockStatus]:
        """The next statuses, merged among themselves."""
        lookup, depth, alone = self.engine.lookup, layer or 0, layer is not None
        surveyed = lookup.survey(offset, length, depth, _MAKE_STATUS, alone=alone, regions=regions)
        if surveyed:
            return surveyed
        most = STATUS_BATCH if surveyed is None else STATUS_SMALL
        walk = lookup.block_status(offset, length, depth, alone=alone, regions=regions)
        batch: list[BlockStatus] = []
        for status in map(self._status, islice(walk, most)):
            if batch and _continues(batch[-1], status):
                batch[-1] = _joined(batch[-1], status)
            else:
                batch.append(status)
        return batch

    def _status(self, segment: Segment) -> BlockStatus:
        if segment.host < 0:
            return BlockStatus(
                segment.offset, segment.length, segment.kind, segment.depth, None, None
            )
        path = self.engine.layers[segment.depth].data.path
        return BlockStatus(
            segment.offset, segment.length, segment.kind, segment.depth, segment.host, path
        )

    def as_file(self) -> io.RawIOBase:
        """A seekable binary file over the disk, for libraries that want one.

        Closing it flushes but leaves the image open. The disk does not grow by writing.
        """
        self._check()
        return _DiskFile(self)

    # ---- life ----

    def close(self) -> None:
        """Wait for requests in flight, flush, release files and locks. Later calls do nothing.

        Everything is released even when the flush fails; its error is raised then.
        """
        self._check_process()
        with self.reactor.lock:
            if self._closed:
                return
            self._closed = True
        try:
            if self.reactor.interrupted is None:
                self.reactor.run(self.engine.close())
        finally:
            self._release()

    def _release(self) -> None:
        """Give everything back; no request may be wanted any more."""
        self._closed = True
        self.reactor.quiesce()
        self.engine.hits.shut()
        try:
            self._opener.queue.close()  # waits for what the kernel still holds
            self.reactor.abandon_tasks()
        finally:
            close_layers(self.layers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as second:  # noqa: BLE001 - the first error is the one to see
            error.add_note(f"closing {self.path} failed too: {second}")

    def __del__(self) -> None:
        if getattr(self, "_closed", True) or self._pid != os.getpid():
            return
        python_warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
        self._release()  # as a dropped file would be: its descriptors and locks, no flush

    def _check(self) -> None:
        if self._closed:
            raise ClosedError(self.path)
        self._check_process()

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise ForkedError(self.path)


class _DiskFile(io.RawIOBase):
    """``Image.as_file``."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._position = 0

    def readable(self) -> bool:
        self._check_open()
        return True

    def writable(self) -> bool:
        self._check_open()
        return self._image.writable

    def seekable(self) -> bool:
        self._check_open()
        return True

    def tell(self) -> int:
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._check_open()
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._image.size}
        if whence not in bases:
            raise ValueError(f"whence {whence} is not one of 0, 1, 2")
        position = bases[whence] + index(offset)
        if position < 0:
            raise ValueError(f"negative position {position}")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        self._check_open()
        view = flat(buffer)
        length = min(len(view), self._image.size - self._position)
        if length <= 0:  # at the end, or behind it
            return 0
        self._image.readinto(self._position, view[:length])
        self._position += length
        return length

    def write(self, data: Any) -> int:
        self._check_open()
        if not self._image.writable:
            raise io.UnsupportedOperation("the image is open read-only")
        written = self._image.write(self._position, flat(data))
        self._position += written
        return written

    def flush(self) -> None:
        self._check_open()
        # Nothing is kept here, and an image that was closed has flushed itself.
        if self._image.writable and not self._image.closed:
            self._image.flush()

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")


def _guarded(driver: Driver) -> Driver:
    if not CHECK_DRIVERS:
        return driver
    from mmcow.formats.guard import Guard  # noqa: PLC0415 - for tests; others need not load it

    return Guard(driver)


def flat(buffer: Any) -> memoryview:
    """``buffer`` as bytes; TypeError where it has no contiguous memory."""
    view = memoryview(buffer)
    return view if view.format == "B" and view.ndim == 1 and view.contiguous else view.cast("B")


def writable(path: str, buffer: Any) -> memoryview:
    """``buffer`` as bytes that can be written to; UsageError where it is read-only."""
    view = flat(buffer)
    if view.readonly:
        raise UsageError(f"{path}: the buffer is read-only")
    return view


def check_size(path: str, size: int) -> int:
    """``size`` rounded up to 512; UsageError outside 0 to 2^63-512."""
    size = index(size)
    if not 0 <= size <= SIZE_MOST:
        raise UsageError(f"{path}: size {size} is not between 0 and {SIZE_MOST}")
    return align_up(size, SECTOR)


def _continues(first: BlockStatus, second: BlockStatus) -> bool:
    return (
        first.kind is second.kind
        and first.depth == second.depth
        and first.path == second.path
        and (first.host_offset is None or first.host_offset + first.length == second.host_offset)
    )


def _joined(first: BlockStatus, second: BlockStatus) -> BlockStatus:
    return first._replace(length=first.length + second.length)


def _report(layer: Layer) -> LayerReport:
    driver = layer.driver
    info = driver.info
    backing = driver.backing
    return LayerReport(
        driver.path,
        layer.format,
        info.variant,
        info.size,
        info.cluster_size,
        driver.data.path,
        driver.data.cache.value,
        backing[0] if backing else None,
        backing[1] if backing else None,
        layer.probed,
    )


def _other_format(head: bytes) -> str | None:
    """The format that a disk beginning with ``head`` would be taken for, unless raw."""
    found = registry.probe(head)
    return None if found == "raw" else found


def _base_caches(
    mode: Cache, given: str | Cache | Sequence[str | Cache] | None
) -> tuple[Cache, ...]:
    if given is None:
        return (mode,)
    if isinstance(given, str | Cache):
        return (Cache.parse(given),)
    if not given:
        raise UsageError("base_cache is an empty list of cache modes")
    return tuple(Cache.parse(one) for one in given)


def make_opener(host: Host | None, policy: Policy | None) -> Opener:
    """A host's queue and reactor, ready to open one image."""
    host = LinuxHost() if host is None else host
    queue = host.queue()
    return Opener(host, Reactor(queue), queue, policy)


def open_image(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    write: bool = False,
    cache: str | Cache = Cache.AUTO,
    base_cache: str | Cache | Sequence[str | Cache] | None = None,
    policy: Policy | None = None,
    share: bool = False,
    backing: bool = True,
    backing_format: str | None = None,
    host: Host | None = None,
) -> Image:
    """Open a disk image and the chain below it.

    ``format``: "raw", "add-cow", "cow"; None looks at the first bytes (a file with a known magic
    is that format or an error, any other is raw, and a guest may then not write a magic).
    ``cache``: "none" (O_DIRECT), "writeback", "writethrough", "directsync", "unsafe", or "auto":
    none, falling back to writeback where O_DIRECT is refused. ``base_cache``: the same for the
    layers below (default: like ``cache``), or a list of modes from the first base down, whose last
    goes on. ``policy`` decides about every file that an image
    names (``mmcow.DenyAll``, ``mmcow.Within``; the default allows files and block devices).
    ``share``: read a disk that somebody else is writing; what is read may be inconsistent.
    ``backing`` False opens the top layer alone. ``backing_format``: format of a base where the
    image above cannot record it.
    """
    name = os.fsdecode(path)
    if share and write:
        raise UsageError(f"{name}: share is for reading only")
    mode = Cache.parse(cache)
    options = ChainOptions(
        format=format,
        write=write,
        cache=mode,
        base_caches=_base_caches(mode, base_cache),
        share=share,
        backing=backing,
        backing_format=backing_format,
    )
    opener = make_opener(host, policy)
    try:
        layers = open_chain(opener, name, options)
    except BaseException:
        opener.queue.close()
        raise
    return Image(opener, layers, name, write=write)


class _Base(NamedTuple):
    """What creating an overlay needs to know of the base."""

    format: str
    size: int | None
    mtime: int
    identities: dict[Identity, str]


def create_image(
    path: str | os.PathLike[str],
    *,
    format: str = "add-cow",
    size: int | None = None,
    backing: str | os.PathLike[str] | None = None,
    backing_format: str | None = None,
    options: Mapping[str, str] | None = None,
    check_backing: bool = True,
    policy: Policy | None = None,
    host: Host | None = None,
) -> int:
    """Create an image; durable on return. Returns the disk's size in bytes.

    ``size`` in bytes, rounded up to 512; without it the base's size (or the adopted data file's).
    ``backing`` is recorded as given and looked up relative to the new image's directory;
    ``backing_format`` is probed if not given. ``options``: the format's ``-o`` options as strings.
    ``check_backing`` False does not open the base (``backing_format`` is then needed, and
    ``size`` unless a data file is adopted). An existing image of that name is replaced, unless
    somebody has it open.
    """
    name = os.fsdecode(path)
    target = registry.get(format)
    chosen = dict(options or {})
    known = {option.name for option in target.options}
    for key in chosen:
        if key not in known:
            raise UsageError(
                f"format {format} has no option {key!r}; it has: {', '.join(sorted(known))}"
            )
    if size is not None:
        size = check_size(name, size)
    opener = make_opener(host, policy)
    name = opener.host.real_path(name)  # what a link leads to is replaced, not the link
    try:
        base = None
        if backing is not None:
            base = _examine_base(opener, name, os.fspath(backing), backing_format, check_backing)
            _refuse_own_base(opener, name, base)
        request = CreateRequest(
            size=size,
            backing=None if backing is None else os.fspath(backing),
            backing_format=None if base is None else base.format,
            backing_size=None if base is None else base.size,
            backing_mtime=0 if base is None else base.mtime,
            backing_is_raw=base is not None and base.format == "raw",
            options=chosen,
        )
        return target.create(opener, name, request)
    finally:
        opener.queue.close()


def _examine_base(
    opener: Opener, path: str, backing: str, format_: str | None, check: bool
) -> _Base:
    resolved = resolve(path, "backing file", backing)
    if not check:
        if format_ is None:
            raise UsageError(
                f"{path}: the base's format must be given where the base is not opened"
            )
        return _Base(format_, None, 0, {})
    format_ = probe_file(opener.host, resolved) if format_ is None else format_
    layers = open_chain(opener, resolved, ChainOptions(format=format_))
    try:
        identities = {}
        for layer in layers:
            for name in (layer.driver.path, layer.driver.data.path):
                identities[opener.host.stat(name).identity] = name
        driver = layers[0].driver
        # Of the file that is named: ``check`` and ``rebase -u`` look at no other.
        mtime = opener.host.stat(driver.path).mtime
        return _Base(format_, driver.info.size, mtime, identities)
    finally:
        close_layers(layers)


def _refuse_own_base(opener: Opener, path: str, base: _Base) -> None:
    """Creating over a file of the base's own chain would destroy the base."""
    if base.identities and exists(opener.host, path):
        found = base.identities.get(opener.host.stat(path).identity)
        if found is not None:
            raise UsageError(f"{path}: is {found}, a part of its own base")
