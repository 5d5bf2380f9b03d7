# SPDX-License-Identifier: MIT
"""What the machine tells of a file: the values of ``storage.host``, cheap to import.

Owns: their names. Never: asks.
"""

from __future__ import annotations

from mmcow.records import Record


class Identity(Record):
    """What makes two names the same file: device and inode (of a block device: its number)."""

    device: int
    inode: int


class Stat(Record):
    """What a name stands for. ``kind``: "file", "block", "directory" or "other"."""

    kind: str
    size: int
    identity: Identity
    mtime: int  # whole seconds
    allocated: int  # bytes the file occupies


class Alignment(Record):
    """What direct I/O demands, in bytes (1 and 1 for buffered I/O)."""

    memory: int
    offset: int
