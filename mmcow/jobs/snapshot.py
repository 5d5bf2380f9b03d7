# SPDX-License-Identifier: MIT
"""Freeze the running layer under a new name, and go on in a new one under the old name.

Owns: the order of file creation, names and pivot; taking everything back when a step fails.
Never: copies guest data; loses a request (they wait while the layers change places).

The name a person opens is always the top layer. Steps, and what a power cut leaves after each:

1. data file and add-cow file of the new layer, the latter under a temporary name: the old disk,
   and two files nobody refers to
2. requests drained, everything of the old layer flushed: the old disk
3. the old layer gets the frozen name as a second name, durable: the old disk, under two names
4. the temporary name replaces the served name, in one step: either the old disk, or the new layer
   over the frozen one, which read the same
5. the directory synced: the new layer

A flush confirmed after the snapshot covers what was still unpersisted before it, because step 2
persisted that. A server killed before step 4 finds, under the served name, the layer it served.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from mmcow.chain import Layer
from mmcow.errors import MmcowError, ReadOnlyError, StorageError, UsageError
from mmcow.formats import registry
from mmcow.formats.opening import Access, CreateRequest, lock_sets, resolve
from mmcow.storage import names

if TYPE_CHECKING:
    from mmcow.formats.driver import Driver
    from mmcow.formats.opening import Opener
    from mmcow.image import Image
    from mmcow.storage.host import Host

FORMAT = "add-cow"


def snapshot(image: Image, name: str, *, data_file: str | None = None) -> str:
    """Freeze ``image``'s top layer as ``name`` and continue in a new add-cow layer over it.

    ``name`` lies in the image's directory (names inside images are relative to it) and must be
    free. ``data_file`` names the new layer's data file; by default the first free of
    IMAGE.1.raw, IMAGE.2.raw ... Returns the path of the frozen layer, which nobody may write to
    any more. Durable on return; after an error the image goes on as it was.
    """
    return image.reactor.run(take(image, name, data_file=data_file))


async def take(image: Image, name: str, *, data_file: str | None = None) -> str:
    """``snapshot`` as a coroutine of the image's reactor, for servers."""
    if not image.writable:
        raise ReadOnlyError(image.path, "snapshot")
    opener = image.opener
    _require_own_name(opener.host, image)
    frozen = _frozen_path(opener.host, image, name)
    top = image.layers[0]
    data_name = data_file or _free_data_name(opener.host, image.location)
    # What was there already, a block device above all, stays there also when a step fails.
    made = not names.exists(opener.host, resolve(image.location, "data file", data_name))
    fresh = _make_layer(opener, image, os.path.basename(frozen), data_name, made=made)
    try:
        await image.engine.gate.close()
        try:
            if image.layers[0] is not top:
                raise UsageError(f"{image.path}: another snapshot came first: ask again")
            await _pivot(image, fresh, frozen)
        finally:
            image.engine.gate.open()
    except BaseException:
        if image.layers[0].driver is not fresh:
            _take_back(opener.host, fresh, made=made)
        raise
    return _as_opened(image, frozen)


def _as_opened(image: Image, path: str) -> str:
    """A path in the image's directory, as the caller calls that."""
    return os.path.join(os.path.dirname(image.path), os.path.basename(path))


def _require_own_name(host: Host, image: Image) -> None:
    """The name must lead to the file that is open: another's must not be frozen or replaced."""
    real = host.real_path(image.location)
    if real != image.location:
        raise UsageError(
            f"{image.path}: is a symbolic link, which cannot change places with a file: open {real}"
        )
    handle = image.layers[0].driver.locked_handles()[0]
    if host.stat(image.location).identity != handle.identity:
        raise UsageError(
            f"{image.path}: is another file now than the one that is open: it was renamed or "
            "replaced meanwhile"
        )


def _frozen_path(host: Host, image: Image, name: str) -> str:
    if not name or os.path.dirname(name) not in (
        "",
        os.path.dirname(image.path),
        os.path.dirname(image.location),
    ):
        raise UsageError(
            f"{image.path}: snapshot {name!r}: must be a name in the image's own directory"
        )
    path = os.path.join(os.path.dirname(image.location), os.path.basename(name))
    if names.exists(host, path) and host.stat(path).identity != host.stat(image.location).identity:
        raise StorageError(errno.EEXIST, "snapshot", _as_opened(image, path))
    if os.path.basename(path) == os.path.basename(image.path):
        raise UsageError(f"{image.path}: snapshot {name!r}: is the image's own name")
    return path


def _free_data_name(host: Host, path: str) -> str:
    base, number = os.path.basename(path), 1
    while names.exists(host, os.path.join(os.path.dirname(path), f"{base}.{number}.raw")):
        number += 1
    # "./" because a colon in a name would read as a protocol.
    return f"./{base}.{number}.raw" if ":" in base else f"{base}.{number}.raw"


def _make_layer(
    opener: Opener, image: Image, backing: str, data_name: str, *, made: bool
) -> Driver:
    """Create and open the new layer under a temporary name."""
    driver = image.layers[0].driver
    temporary = names.temporary_name(image.location)
    request = CreateRequest(
        size=image.size,
        backing=f"./{backing}" if ":" in backing else backing,
        backing_format=image.format,
        backing_size=image.size,
        backing_mtime=0,
        backing_is_raw=image.format == "raw",
        options={"image_file": data_name},
    )
    target = registry.get(FORMAT)
    target.create(opener, temporary, request)
    try:
        return target.open(opener, temporary, Access(True, True, False, driver.data.cache))
    except BaseException:
        names.discard(opener.host, temporary)
        if made:
            names.discard(opener.host, resolve(image.location, "data file", data_name))
        raise


async def _pivot(image: Image, fresh: Driver, frozen: str) -> None:
    """Steps 2 to 5; the engine is closed to requests."""
    host, engine = image.opener.host, image.engine
    old, directory = image.layers[0].driver, names.directory_of(image.location)
    if fresh.info.size != image.size:
        raise UsageError(f"{image.path}: was resized while the snapshot was prepared")
    await engine.flusher.flush()
    _require_own_name(host, image)
    linked = not names.exists(host, frozen)
    if linked:
        host.link(image.location, frozen)
    try:
        host.sync_directory(directory)
        host.rename(fresh.path, image.location)
    except BaseException:
        if linked:
            names.discard(host, frozen)
        raise
    # From here the served name is the new layer's: nothing may be written to the old one.
    old.moved(_as_opened(image, frozen))
    fresh.moved(image.path)
    image.push(Layer(fresh, FORMAT, False))
    try:
        host.sync_directory(directory)
        _lock_as_base(old)
    except MmcowError as error:
        engine.flusher.fail(error)  # a flush could not promise what the name leads to
        raise


def _lock_as_base(driver: Driver) -> None:
    access = Access(write=False, top=False, share=False, cache=driver.data.cache)
    for handle in driver.locked_handles():
        handle.lock(*lock_sets(access, raw=False))


def _take_back(host: Host, fresh: Driver, *, made: bool) -> None:
    """Remove the new layer's files that were made for it: no name leads to them."""
    image_path, data_path = fresh.path, fresh.data.path
    fresh.close()
    names.discard(host, image_path)
    if made:
        names.discard(host, data_path)
