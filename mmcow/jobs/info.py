# SPDX-License-Identifier: MIT
"""What an image file says about itself, without opening any file that it names.

Owns: ``ImageInfo`` and the walk along a chain by headers alone.
Never: opens what a header names, other than as the next image of ``inspect_chain``, which asks
the policy first.
"""

from __future__ import annotations

import os

from mmcow.errors import ChainError, LockedError, StorageError, UsageError
from mmcow.formats import registry
from mmcow.formats.naming import Inspection, reader_locks, resolve
from mmcow.ranges import SECTOR, align_up
from mmcow.records import Record
from mmcow.storage.handle import FileHost

TYPE_CHECKING = False  # as type checkers see it; ``typing`` is slow to import
if TYPE_CHECKING:
    from typing import Any

    from mmcow.formats.opening import Opener, Policy
    from mmcow.storage.host import Host, Identity, Stat


class ImageInfo(Record):
    """Facts of one image file. Sizes in bytes.

    ``virtual_size`` None: only the data file knows, and it is not there. ``actual_size``: what the
    image file occupies (its data file apart: ``data_file_actual_size``). Paths are names resolved;
    None where there is no name or it may not be followed. ``backing`` is what the header records,
    ``has_backing`` whether it is in use.
    """

    path: str
    format: str
    variant: str
    virtual_size: int | None
    actual_size: int
    cluster_size: int | None
    backing: str | None
    backing_format: str | None
    backing_path: str | None
    has_backing: bool
    data_file: str | None
    data_file_path: str | None
    data_file_size: int | None
    data_file_actual_size: int | None
    details: dict[str, Any]


def inspect(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    share: bool = False,
    host: Host | None = None,
) -> ImageInfo:
    """Read the header of ``path``; files it names are at most looked up (``stat``), never opened.

    Takes a reader's lock; ``share`` tolerates a writer.
    """
    return _inspect(host or FileHost(), os.fsdecode(path), format, share)[0]


def inspect_chain(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    share: bool = False,
    policy: Policy | None = None,
    backing_format: str | None = None,
    host: Host | None = None,
) -> list[ImageInfo]:
    """The same for ``path`` and everything below it, top first. Each base is opened only if the
    policy agrees; loops and dead ends are a ChainError."""
    from mmcow.chain import DEPTH_MOST  # noqa: PLC0415 - one image alone needs none of this
    from mmcow.image import make_opener  # noqa: PLC0415

    opener = make_opener(host, policy)
    try:
        info, identity = _inspect(opener.host, os.fsdecode(path), format, share)
        chain = [info]
        seen = {identity}
        while info.has_backing and info.backing is not None:
            if len(chain) >= DEPTH_MOST:
                raise ChainError(info.path, "backing file", info.backing, "the chain is too deep")
            above = info
            info, identity = _inspect_base(opener, above, backing_format, share)
            if identity in seen:
                raise ChainError(
                    above.path, "backing file", above.backing or "",
                    "is already part of this chain (a loop)",
                )  # fmt: skip
            seen.add(identity)
            chain.append(info)
        return chain
    finally:
        opener.queue.close()


def _inspect_base(
    opener: Opener, above: ImageInfo, override: str | None, share: bool
) -> tuple[ImageInfo, Identity]:
    name = above.backing or ""
    recorded = (name, above.backing_format)
    from mmcow.chain import find_backing  # noqa: PLC0415

    where, format_ = find_backing(opener, above.path, above.format, recorded, override)
    try:
        return _inspect(opener.host, where, format_, share, top=False)
    except LockedError:
        raise
    except StorageError as error:
        raise ChainError(
            above.path, "backing file", name, f"{error.what}: {error.strerror}"
        ) from error
    except UsageError as error:
        raise ChainError(above.path, "backing file", name, str(error)) from error


def _inspect(
    host: Host | FileHost, path: str, format_: str | None, share: bool, *, top: bool = True
) -> tuple[ImageInfo, Identity]:
    handle = host.open(path, write=False, direct=False)
    try:
        handle.lock(*reader_locks(top=top, share=share))
        if format_ is None:
            format_ = registry.probe(handle.read_at(0, registry.HEAD))
        found = registry.inspect(format_, path, handle)
        return _join(host, path, found, handle.allocated()), handle.identity
    finally:
        handle.close()


def _join(host: Host | FileHost, path: str, found: Inspection, actual: int) -> ImageInfo:
    """Header and ``stat`` together."""
    data_path = _resolved(path, "data file", found.data_file)
    facts = None if data_path is None else _look_up(host, data_path)
    data_size = None if facts is None else length_of(facts)
    size = found.size
    if size is None and data_size is not None:
        size = align_up(data_size, SECTOR)
    return ImageInfo(
        path=path,
        format=found.format,
        variant=found.variant,
        virtual_size=size,
        actual_size=actual,
        cluster_size=found.cluster_size,
        backing=found.backing,
        backing_format=found.backing_format,
        backing_path=_resolved(path, "backing file", found.backing),
        has_backing=found.backing is not None and not found.details.get("all-allocated", False),
        data_file=found.data_file,
        data_file_path=data_path,
        data_file_size=data_size,
        data_file_actual_size=None if facts is None else facts.allocated,
        details=found.details,
    )


def _resolved(path: str, role: str, name: str | None) -> str | None:
    if name is None:
        return None
    try:
        return resolve(path, role, name)
    except ChainError:
        return None


def _look_up(host: Host | FileHost, path: str) -> Stat | None:
    try:
        return host.stat(path)
    except StorageError:
        return None


def length_of(facts: Stat) -> int | None:
    """A file's length. Of a device ``stat`` does not know it, but the kernel tells without opening
    the device."""
    if facts.kind == "file":
        return facts.size
    if facts.kind != "block":
        return None
    device = facts.identity.inode
    try:
        with open(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/size") as file:
            return int(file.read()) * SECTOR
    except (OSError, ValueError):
        return None
