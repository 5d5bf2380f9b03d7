# SPDX-License-Identifier: MIT
"""Copy a whole disk, whatever its chain, into another image.

Owns: what is copied, what is zeroed, what is left out; that a new target takes its name only when
it is complete.
Never: changes a target's size.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mmcow.errors import ReadOnlyError, UsageError
from mmcow.formats.addcow_create import default_data_name
from mmcow.formats.opening import Access, lock_sets, resolve
from mmcow.image import create_image, open_image
from mmcow.jobs.copying import ZERO_STEP, Copier, ranges, write_unit
from mmcow.jobs.progress import Meter, Progress
from mmcow.storage import names
from mmcow.storage.file import Cache
from mmcow.storage.linux import LinuxHost

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mmcow.image import Image
    from mmcow.storage.host import Host


def convert(
    source: Image, target: Image, *, progress: Progress | None = None, target_is_zero: bool = False
) -> int:
    """Copy the content of ``source`` (all its layers) to ``target``; durable on return.

    ``target`` is open for writing and at least as large; what it has more reads as zeros
    afterwards. Known zeros are not read, and blocks of 4 KiB (or the target's clusters) that
    hold only zeros are not written but punched. ``target_is_zero``: the caller knows that the
    target reads as zeros everywhere (it is new), so zeros are left out altogether.

    Returns the number of bytes written as data. A stop leaves a target that is partly written.
    """
    _check(source, target)
    unit = write_unit(target)
    meter = Meter(progress, target.size)
    with Copier(target, block=unit, target_is_zero=target_is_zero) as copier:
        for found in ranges(source, unit):
            if found.zero:
                copier.zero(found.offset, found.length)
            else:
                copier.copy(source, found.offset, found.length)
            meter.reached(found.offset + found.length)
        for start in range(source.size, target.size, ZERO_STEP):
            copier.zero(start, min(ZERO_STEP, target.size - start))
            meter.reached(start)
    target.flush()
    meter.finish()
    return copier.moved


def _check(source: Image, target: Image) -> None:
    if source is target:
        raise UsageError(f"{source.path}: cannot be converted into itself")
    if not target.writable:
        raise ReadOnlyError(target.path, "convert")
    if target.size < source.size:
        raise UsageError(
            f"{target.path}: has {target.size} bytes, the source {source.path} has {source.size}: "
            "resize the target first"
        )


def convert_to(
    source: Image,
    path: str | os.PathLike[str],
    *,
    format: str = "raw",
    options: Mapping[str, str] | None = None,
    cache: str | Cache = Cache.AUTO,
    progress: Progress | None = None,
    host: Host | None = None,
) -> int:
    """Copy ``source`` into a new image ``path``; returns the bytes written as data.

    The copy has a temporary name until it is complete and durable; only then it takes the name
    from what had it before, whose owner and mode it keeps. So after an error or a stop an existing
    target is as it was. A block device is written in place. ``options``: as for ``create``; an
    add-cow target's data file must not exist, unless ``image_file`` names it.
    """
    host = LinuxHost() if host is None else host
    cache = Cache.parse(cache)  # a wrong word costs nothing yet
    final = host.real_path(os.fsdecode(path))
    there = names.exists(host, final)
    if there and host.stat(final).kind == "block":
        create_image(final, format=format, size=source.size, options=options, host=host)
        with open_image(final, format=format, write=True, cache=cache, host=host) as target:
            return convert(source, target, progress=progress)
    chosen = dict(options or {})
    data_path = _data_path(host, final, format, chosen)
    adopted = data_path is not None and names.exists(host, data_path)
    held = host.open(final, write=True, direct=False) if there else None
    temporary = names.temporary_name(final)
    try:
        if held is not None:  # nobody may be using what is replaced
            held.lock(*lock_sets(Access(True, True, False, cache), raw=format == "raw"))
        create_image(temporary, format=format, size=source.size, options=chosen, host=host)
        with open_image(temporary, format=format, write=True, cache=cache, host=host) as target:
            moved = convert(source, target, progress=progress, target_is_zero=not adopted)
        names.install(host, temporary, final)
    except BaseException:
        names.discard(host, temporary)
        if data_path is not None and not adopted:
            names.discard(host, data_path)
        raise
    finally:
        if held is not None:
            held.close()
    return moved


def _data_path(host: Host, final: str, format: str, options: dict[str, str]) -> str | None:
    """Where an add-cow target's data will be; written into ``options``."""
    if format != "add-cow":
        return None
    own = default_data_name(final)
    name = options.setdefault("image_file", own)
    path = resolve(final, "data file", name)
    if name == own and names.exists(host, path):
        raise UsageError(
            f"{final}: the data file {path} exists already and would be overwritten: remove it, or "
            "name another (image_file)"
        )
    return path
