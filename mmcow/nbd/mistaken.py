# SPDX-License-Identifier: MIT
"""An image file that is about to be served as if it were a raw disk.

After a live snapshot of a raw disk its name leads to an add-cow image. Whoever starts the server
again with the format that was right before would offer the bitmap as the disk; the first write of
a guest destroys the layer.

Owns: how that is told from a raw disk into whose first sectors its guest wrote such a header. A
guest must not be able to keep its own disk from being served.
Never: opens what a header names (it asks for the length of the data file at most).
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from mmcow.errors import MmcowError, StorageError, UsageError
from mmcow.formats import registry
from mmcow.formats.addcow_header import read_header
from mmcow.formats.naming import resolve
from mmcow.jobs.info import length_of
from mmcow.ranges import SECTOR, align_up

if TYPE_CHECKING:
    from mmcow.image import Image
    from mmcow.storage.host import Handle, Host

log = logging.getLogger("mmcow.nbd")


def require_raw_content(image: Image) -> None:
    """UsageError where ``image`` was opened with format raw, and its file is an add-cow image. One
    that only begins like an image is a warning in the log. Blocks."""
    layer = image.layers[0]
    if layer.format != "raw" or layer.probed:
        return
    host = image.opener.host
    try:
        handle = host.open(image.location, write=False, direct=False)
    except StorageError:
        return  # renamed meanwhile: what is open is what is served
    try:
        found = registry.probe(handle.read_at(0, registry.HEAD))
        if found == "raw":
            return
        mistaken = found == "add-cow" and _has_its_length(host, image.location, handle)
    finally:
        handle.close()
    if mistaken:
        raise UsageError(
            f"{image.path}: is an add-cow image (perhaps made one by a live snapshot), and not the "
            "raw disk that it would be served as: leave -f out (a program: format), or say add-cow"
        )
    log.warning(
        "%s: begins like %s, and is served as raw: right only if its guest wrote that",
        image.path, found,
    )  # fmt: skip


def _has_its_length(host: Host, path: str, handle: Handle) -> bool:
    """Whether the file ends where the bitmap for its data file ends. A guest decides what its disk
    begins with; neither the length of its disk nor another file of a fitting length."""
    try:
        header = read_header(path, handle)
        facts = host.stat(resolve(path, "data file", os.fsdecode(header.image)))
    except MmcowError:
        return False
    length = length_of(facts)
    if length is None or facts.identity == handle.identity:
        return False
    size = align_up(length, SECTOR)
    return handle.size() in (header.least_length(size), header.file_length(size))
