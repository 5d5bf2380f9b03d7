# SPDX-License-Identifier: MIT
"""What the terminal can do: width, colours, characters.

Owns: those three questions, asked without importing ``shutil`` (a slow import).

Never: writes.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # as type checkers see it; ``typing`` is slow to import
if TYPE_CHECKING:
    from typing import TextIO

DEFAULT_WIDTH = 80


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person looks at ``stream`` (None: it was closed before the program began)."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def width_of(stream: TextIO | None) -> int:
    """Columns: what COLUMNS says, else what the terminal has, else 80."""
    told = os.environ.get("COLUMNS", "")
    if told.isascii() and told.isdigit() and int(told) > 0:
        return int(told)
    if stream is None:
        return DEFAULT_WIDTH
    try:
        return os.get_terminal_size(stream.fileno()).columns or DEFAULT_WIDTH
    except (OSError, ValueError):
        return DEFAULT_WIDTH


def has_colours(stream: TextIO) -> bool:
    """A terminal that is not dumb, and nobody set NO_COLOR."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return is_terminal(stream)


def can_show(stream: TextIO, characters: str) -> bool:
    """Whether ``stream``'s encoding has the characters."""
    try:
        characters.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
