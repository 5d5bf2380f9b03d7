# SPDX-License-Identifier: MIT
"""Names found inside images, the locks of each role, and what a header tells; cheap to import.

Owns: ``resolve`` (what a name stands for), ``lock_sets``, ``Inspection``.
Never: opens anything, asks the policy (``opening`` does).
"""

from __future__ import annotations

import os

from mmcow.errors import ChainError, DeniedError
from mmcow.records import Record

TYPE_CHECKING = False  # as type checkers see it; ``typing`` is slow to import
if TYPE_CHECKING:
    from typing import Any

    from mmcow.formats.opening import Access


class Inspection(Record):
    """What a header tells without opening anything it names. ``size`` None: not in the header."""

    format: str
    variant: str
    size: int | None
    cluster_size: int | None
    backing: str | None
    backing_format: str | None
    data_file: str | None
    details: dict[str, Any]


# QEMU's permission bits: 0 consistent read, 1 write, 3 resize.
_READ, _WRITE, _RESIZE = 0, 1, 3
_PUNCTUATION = str.maketrans("", "", "+.-")


def lock_sets(access: Access, *, raw: bool) -> tuple[frozenset[int], frozenset[int]]:
    """Permission bits (used, denied to others) of a file opened for ``access``.

    ``raw``: the file is a raw disk of its own, not an image's metadata or data file: others may
    still resize it.
    """
    if access.write and not access.share:
        if raw:
            return frozenset({_READ, _WRITE}), frozenset({_WRITE})
        return frozenset({_READ, _WRITE, _RESIZE}), frozenset({_WRITE, _RESIZE})
    return reader_locks(top=access.top, share=access.share)


def reader_locks(*, top: bool, share: bool) -> tuple[frozenset[int], frozenset[int]]:
    """The same of a file that is only read; ``share`` tolerates writers."""
    if share:
        return frozenset({_READ}), frozenset()
    if top:
        return frozenset({_READ}), frozenset({_WRITE})
    return frozenset({_READ}), frozenset({_WRITE, _RESIZE})


def _has_protocol(name: str) -> bool:
    """A letter, then letters, digits, "+", "." and "-", then a colon."""
    scheme, colon, _ = name.partition(":")
    rest = scheme.translate(_PUNCTUATION)
    return bool(colon) and scheme.isascii() and scheme[:1].isalpha() and rest.isalnum()


def resolve(path: str, role: str, name: str) -> str:
    """The path that ``name``, found in image ``path``, stands for.

    Relative names are relative to the directory of the image itself, not of a symbolic link to it:
    a bitmap must not meet another disk's data file. Names with a protocol prefix
    ("nbd:", "json:", "file:") are refused: an image must not choose how it is opened.
    """
    if not name:
        raise ChainError(path, role, name, "the name is empty")
    if "\0" in name:
        raise ChainError(path, role, name, "the name contains a NUL byte")
    if _has_protocol(name):
        shown = repr(f"./{name}")[1:-1]
        problem = f"names with a protocol prefix are not followed; write {shown} for a file of"
        raise DeniedError(path, role, name, f"{problem} that name")
    own = os.path.realpath(path) if os.path.islink(path) else path
    return os.path.join(os.path.dirname(own), name)
