# SPDX-License-Identifier: MIT
"""Every error mmcow raises on purpose, in one tree.

::

    MmcowError
    |-- UsageError (ValueError)     the caller's mistake: range, mode, option
    |   |-- ClosedError             the object was closed
    |   |-- ForkedError             an image opened before fork, used in the child
    |   `-- ReadOnlyError           a change asked of an image opened read-only
    |-- FormatError                 the bytes of an image are wrong
    |   |-- UnsupportedError        valid, but a version or feature mmcow does not have
    |   `-- CorruptError            contradicts its own format
    |-- ChainError                  an image names a file that cannot be used
    |   `-- DeniedError             ... because the open policy says no
    |-- StorageError (OSError)      the system refused a call; errno is kept
    |   |-- SyncFailed              a sync failed: what it covered may be lost
    |   `-- LockedError             another process is using the file
    |-- LayerFailed                 an earlier sync failed; reopen to go on
    |-- Interrupted                 an earlier KeyboardInterrupt broke in; reopen to go on
    `-- JobError
        |-- Cancelled               the user stopped a long job; the image is valid
        `-- Mismatch                compare found a difference

A class keeps its parts as attributes and owns its sentence; raise sites pass
values. Programmer errors inside mmcow are assertions and are never caught.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # as type checkers see it; ``typing`` is slow to import
if TYPE_CHECKING:
    from typing import Any


class MmcowError(Exception):
    """Base of every error that mmcow raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Parts instead of arguments: a class's arguments are not what its text was made from."""
        return _restore, (type(self), self.args, vars(self), self.__cause__)


def _restore(
    kind: type[MmcowError], args: tuple[Any, ...], parts: dict[str, Any], cause: Any
) -> MmcowError:
    error = kind.__new__(kind)
    error.args = args
    vars(error).update(parts)
    error.__cause__ = cause
    return error


class UsageError(MmcowError, ValueError):
    """The caller asked for something that cannot be: the text says what and how to mend it."""


class ClosedError(UsageError):
    """The image, file or queue was closed before this call."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name}: is closed")
        self.name = name


class ForkedError(UsageError):
    """An image was used in a child of the process that opened it."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name}: was opened before this process was forked; open it again in the child"
        )
        self.name = name


class ReadOnlyError(UsageError):
    """A change was asked of an image that was opened for reading."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"{name}: {what} refused: the image is open read-only")
        self.name = name
        self.what = what


class FormatError(MmcowError):
    """The bytes of an image do not follow its format.

    ``path`` is the file, ``field`` the specification's name of the field (or of the
    area), ``value`` what stands there (integers are shown in hex too).
    """

    def __init__(self, path: str, field: str, value: object, problem: str) -> None:
        shown = f"{value} ({value:#x})" if type(value) is int and abs(value) > 9 else repr(value)
        if type(value) is int and abs(value) <= 9:
            shown = str(value)
        super().__init__(f"{path}: {field} is {shown}: {problem}")
        self.path = path
        self.field = field
        self.value = value
        self.problem = problem


class UnsupportedError(FormatError):
    """A valid image that uses a version or a feature mmcow does not have."""


class CorruptError(FormatError):
    """An image that contradicts its own format."""


class ChainError(MmcowError):
    """``path`` names ``name``, which cannot be used as its base or data file."""

    def __init__(self, path: str, role: str, name: str, problem: str) -> None:
        super().__init__(f"{path}: {role} {name!r}: {problem}")
        self.path = path
        self.role = role
        self.name = name
        self.problem = problem


class DeniedError(ChainError):
    """The open policy refuses a file that an image names."""


class StorageError(MmcowError, OSError):
    """A system call failed. ``errno`` is the kernel's; ``offset`` and ``length`` are bytes."""

    def __init__(
        self,
        errno: int,
        what: str,
        path: str,
        offset: int | None = None,
        length: int | None = None,
    ) -> None:
        super().__init__(errno, os.strerror(errno), path)
        self.what = what
        self.path = path
        self.offset = offset
        self.length = length

    def __reduce__(self) -> tuple[Any, ...]:
        """As OSError does: its number and its file are no ordinary attributes."""
        reduced = OSError.__reduce__(self)
        assert isinstance(reduced, tuple)
        return (*reduced[:2], vars(self))

    def __str__(self) -> str:
        where = "" if self.offset is None else f" at {self.offset}"
        if self.length is not None:
            where += f"+{self.length}"
        return f"{self.path}: {self.what}{where}: {self.strerror}"


class SyncFailed(StorageError):
    """A sync failed: the kernel has dropped what it covered, a second try would lie."""


class LockedError(StorageError):
    """Another opener's lock excludes this one. ``holders`` names processes where known."""

    def __init__(self, errno: int, what: str, path: str, holders: tuple[str, ...] = ()) -> None:
        super().__init__(errno, what, path)
        self.holders = holders

    def __str__(self) -> str:
        own = f"pid {os.getpid()}"
        if any(holder.endswith(own) for holder in self.holders):
            return f"{self.path}: {self.what}: this process is using it already ({own})"
        who = f" (held by {', '.join(self.holders)})" if self.holders else ""
        return f"{self.path}: {self.what}: another process is using it{who}"


class LayerFailed(MmcowError):
    """An earlier failure of ``path`` made further changes unsafe; ``__cause__`` is that failure.

    Reads go on. Everything else raises this until the image is opened again.
    """

    def __init__(self, path: str, cause: BaseException) -> None:
        super().__init__(f"{path}: refused after an earlier failure: {cause}")
        self.path = path
        self.__cause__ = cause


class Interrupted(MmcowError):
    """A KeyboardInterrupt struck while requests were being handled; ``__cause__`` is it.

    A result may have been lost on its way, so everything is refused until the image is opened
    again. The image itself is valid: what was flushed is there.
    """

    def __init__(self, cause: BaseException) -> None:
        super().__init__("interrupted in the middle of a request; open the image again")
        self.__cause__ = cause


class JobError(MmcowError):
    """A long job ended early."""


class Cancelled(JobError):
    """The user stopped the job. What was done stays done and the image is valid."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: cancelled")
        self.what = what


class Mismatch(JobError):
    """Two images differ, first at ``offset``."""

    def __init__(self, offset: int, problem: str = "content mismatch") -> None:
        super().__init__(f"{problem} at offset {offset}")
        self.offset = offset
