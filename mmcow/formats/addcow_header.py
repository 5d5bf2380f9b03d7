# SPDX-License-Identifier: MIT
"""The header of an add-cow file, read from the file; cheap to import.

Owns: how much is read, and what of it ``info`` tells.
Never: opens what the header names, knows its bytes (``addcow_meta`` does).
"""

from __future__ import annotations

import os

from mmcow.formats import addcow_meta as meta
from mmcow.formats.naming import Inspection

TYPE_CHECKING = False  # as type checkers see it; ``typing`` is slow to import
if TYPE_CHECKING:
    from typing import Any

    from mmcow.storage.host import Handle


def read_header(path: str, handle: Handle) -> meta.Header:
    """Read and check the header of the add-cow file ``handle``."""
    data = handle.read_at(0, 4096)
    wanted = meta.header_bytes(data)
    if wanted > len(data) == 4096:
        data = handle.read_at(0, wanted)
    # What was read counts, not the length: the file may be cut between the two calls.
    length = handle.size() if len(data) >= wanted else len(data)
    return meta.parse(path, data, length)


def details(header: meta.Header) -> dict[str, Any]:
    """Format-specific facts, as JSON-ready values."""
    return {
        "compat": header.variant,
        "all-allocated": header.all_allocated,
        "data-file": os.fsdecode(header.image),
        "data-file-format": header.image_format,
    }


def inspect(path: str, handle: Handle) -> Inspection:
    """The header's facts; the size is the data file's and stays unknown."""
    header = read_header(path, handle)
    return Inspection(
        "add-cow",
        header.variant,
        None,
        header.cluster_size,
        os.fsdecode(header.backing) if header.backing else None,
        header.backing_format,
        os.fsdecode(header.image),
        details(header),
    )
