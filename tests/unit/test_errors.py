# SPDX-License-Identifier: MIT
"""Every error of the tree: made, formatted, caught by the classes it promises."""

from __future__ import annotations

import errno
import inspect
import pickle
import re

import pytest

import mmcow
from mmcow import errors
from mmcow.errors import MmcowError

CAUSE = OSError(errno.EIO, "the disk")

# One of each, with the parts that its text must show.
EXAMPLES: dict[type[MmcowError], tuple[MmcowError, tuple[str, ...]]] = {
    errors.MmcowError: (errors.MmcowError("text"), ("text",)),
    errors.UsageError: (errors.UsageError("disk.acow: what to do"), ("what to do",)),
    errors.ClosedError: (errors.ClosedError("disk.acow"), ("disk.acow", "closed")),
    errors.ForkedError: (errors.ForkedError("disk.acow"), ("disk.acow", "forked", "child")),
    errors.ReadOnlyError: (
        errors.ReadOnlyError("disk.acow", "resize"), ("disk.acow", "resize", "read-only"),
    ),
    errors.FormatError: (
        errors.FormatError("disk.acow", "HEADER_SIZE", 8192, "must be 4096"),
        ("disk.acow", "HEADER_SIZE", "8192", "0x2000", "must be 4096"),
    ),
    errors.UnsupportedError: (
        errors.UnsupportedError("disk.acow", "features", 2, "unknown"),
        ("disk.acow", "features is 2:", "unknown"),
    ),
    errors.CorruptError: (
        errors.CorruptError("disk.acow", "magic", b"\0x", "no"), ("magic", r"b'\x00x'", "no"),
    ),
    errors.ChainError: (
        errors.ChainError("top", "backing file", "base.raw", "is gone"),
        ("top", "backing file", "'base.raw'", "is gone"),
    ),
    errors.DeniedError: (
        errors.DeniedError("top", "data file", "/etc/x", "the policy"), ("top", "/etc/x", "policy"),
    ),
    errors.StorageError: (
        errors.StorageError(errno.ENOSPC, "write", "disk.raw", 4096, 512),
        ("disk.raw", "write", "4096+512", "No space left"),
    ),
    errors.SyncFailed: (
        errors.SyncFailed(errno.EIO, "fdatasync", "disk.raw"), ("disk.raw", "fdatasync", "Input"),
    ),
    errors.LockedError: (
        errors.LockedError(errno.EAGAIN, "lock", "disk.raw", ("qemu, pid 7",)),
        ("disk.raw", "another process", "qemu, pid 7"),
    ),
    errors.LayerFailed: (
        errors.LayerFailed("disk.acow", CAUSE), ("disk.acow", "earlier failure", "the disk"),
    ),
    errors.Interrupted: (errors.Interrupted(KeyboardInterrupt()), ("interrupted", "open")),
    errors.JobError: (errors.JobError("text"), ("text",)),
    errors.Cancelled: (errors.Cancelled("convert"), ("convert", "cancelled")),
    errors.Mismatch: (errors.Mismatch(4096), ("content mismatch", "4096")),
}  # fmt: skip


def classes() -> list[type[MmcowError]]:
    found = [c for _, c in inspect.getmembers(errors, inspect.isclass)]
    return [c for c in found if c.__module__ == "mmcow.errors"]


def test_every_class_has_an_example():
    assert set(classes()) == set(EXAMPLES)


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_error_shows_its_parts(kind):
    error, parts = EXAMPLES[kind]
    text = str(error)
    for part in parts:
        assert part in text
    assert "\n" not in text
    assert repr(error)


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_class_is_exported_documented_and_in_the_tree(kind):
    assert issubclass(kind, MmcowError)
    assert getattr(mmcow, kind.__name__, None) is kind or kind.__name__ == "MmcowError"
    assert kind.__name__ in mmcow.__all__
    assert kind.__doc__
    assert re.search(rf"\b{kind.__name__}\b", errors.__doc__)


def test_tree_in_the_docstring_is_the_tree():
    """This test reads the drawing by its indentation and compares it with the classes."""
    parents: dict[str, str] = {}
    stack: list[tuple[int, str]] = [(-1, "")]
    for line in errors.__doc__.splitlines():
        match = re.match(r"^( {4}(?:[| ] {3})*)(?:\|-- |`-- |)(\w+)(?: \((\w+)\))?", line)
        if not match or match[2] not in errors.__dict__:
            continue
        depth = line.index(match[2])
        while stack[-1][0] >= depth:
            stack.pop()
        parents[match[2]] = stack[-1][1]
        stack.append((depth, match[2]))
        if match[3]:
            builtin = {"ValueError": ValueError, "OSError": OSError}[match[3]]
            assert issubclass(getattr(errors, match[2]), builtin)
    for kind in classes():
        parent = parents[kind.__name__]
        assert (kind.__bases__[0].__name__ if parent else "") == parent, kind


def test_storage_errors_are_os_errors_with_their_number():
    for kind in (errors.StorageError, errors.SyncFailed, errors.LockedError):
        error = EXAMPLES[kind][0]
        assert isinstance(error, OSError)
        assert error.errno == error.args[0]
        assert error.filename == error.path
        assert error.strerror


def test_causes_are_kept():
    assert EXAMPLES[errors.LayerFailed][0].__cause__ is CAUSE
    assert isinstance(EXAMPLES[errors.Interrupted][0].__cause__, KeyboardInterrupt)


@pytest.mark.parametrize("value", [0, 9, -1], ids=str)
def test_small_numbers_are_shown_once(value):
    assert str(errors.FormatError("x", "f", value, "p")) == f"x: f is {value}: p"


def test_errors_of_one_argument_survive_pickling():
    for kind in (errors.UsageError, errors.MmcowError):
        error = pickle.loads(pickle.dumps(EXAMPLES[kind][0]))
        assert str(error) == str(EXAMPLES[kind][0])


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_error_survives_pickling(kind):
    """This test sends each error to another process, as multiprocessing does."""
    error, _ = EXAMPLES[kind]
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    for name, value in vars(error).items():
        if name not in ("__cause__", "__notes__"):
            assert getattr(copy, name) == value
