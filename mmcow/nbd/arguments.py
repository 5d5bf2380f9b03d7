# SPDX-License-Identifier: MIT
"""What programs and control clients give as arguments, checked before anything is done with it.

Owns: that a value is what its argument takes; the words that name both where it is not.
Never: knows what an argument is for.
"""

from __future__ import annotations

import os
from contextlib import suppress
from operator import index
from typing import Any

from mmcow.errors import UsageError


def whole_number(name: str, value: Any, of: str, *, least: int = 0) -> int:
    """``value`` as an integer of at least ``least``; ``of`` says what it is a number of."""
    try:
        number = least - 1 if isinstance(value, bool) else index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise UsageError(f"{name} {value!r}: must be a number of {of}, {least} or more")
    return number


def file_name(name: str, value: Any) -> str:
    """``value`` as a path. JSON can hold text that is none: half of a surrogate pair."""
    with suppress(TypeError, UnicodeEncodeError):
        path = os.fsdecode(value)
        if b"\0" not in os.fsencode(path):
            return path
    raise UsageError(f"{name} {value!r}: must be the name of a file")


def same_path(one: str, other: str) -> bool:
    """Whether two names lead to one place, where there need not be anything yet."""
    return os.path.realpath(one) == os.path.realpath(other)
