# SPDX-License-Identifier: MIT
"""Change the names that an image records, and nothing else (``qemu-img rebase -u``).

Never: opens what is named, compares contents: the caller vouches that they fit.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mmcow.errors import UsageError
from mmcow.formats import registry
from mmcow.image import make_opener
from mmcow.jobs.info import inspect

if TYPE_CHECKING:
    from mmcow.formats.opening import Policy
    from mmcow.storage.host import Host


def check_format_name(path: str, format_: str | None) -> None:
    """Refuse to record, in ``path``, a base's format that nobody knows: no opening would succeed.

    Formats that mmcow only knows by their magic may be recorded.
    """
    supported = registry.names()
    others = sorted(set(registry.known()) - set(supported))
    if format_ is not None and format_ not in (*supported, *others):
        raise UsageError(
            f"{path}: unknown format {format_!r} of the base: must be one of "
            f"{', '.join(supported)} (known, but not opened: {', '.join(others)})"
        )


def rename(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    backing: str | os.PathLike[str] | None = None,
    backing_format: str | None = None,
    data_file: str | os.PathLike[str] | None = None,
    data_file_format: str | None = None,
    policy: Policy | None = None,
    host: Host | None = None,
) -> None:
    """Record other names and formats; durable on return. None leaves as it is.

    ``backing`` "" removes the name, where the image can do without. A format alone re-records it
    for the present name, and a name alone keeps the recorded format. Needs the image for itself.
    """
    name = os.fsdecode(path)
    if backing is None and data_file is None and backing_format is None:
        raise UsageError(f"{name}: nothing to change: give a backing file or a data file")
    if data_file is None and data_file_format is not None:
        raise UsageError(f"{name}: a format of the data file without its name")
    check_format_name(name, backing_format)
    present = inspect(name, format=format, host=host)
    if backing is None and backing_format is not None:
        if present.backing is None:
            raise UsageError(f"{name}: records no backing file to give a format to")
        backing = present.backing
    opener = make_opener(host, policy)
    try:
        registry.get(present.format).rename(
            opener,
            name,
            backing=None if backing is None else (os.fspath(backing), backing_format),
            data_file=None if data_file is None else (os.fspath(data_file), data_file_format),
        )
    finally:
        opener.queue.close()
