# SPDX-License-Identifier: MIT
"""Exit statuses: the one table from error class to what the process returns.

Owns: the table (every class of the error tree is in it; a test walks the tree), and the
statuses that no error stands for.

Never: prints.

qemu-img's meanings where it has the verb: 0 done, 1 failed; ``compare`` 1 differs, 2 failed;
``check`` 2 corrupt, 3 leaks, 63 the format has nothing to check.
"""

from __future__ import annotations

from mmcow import errors
from mmcow.cli import sizes, ui

OK = 0
FAILED = 1
DIFFER = 1
COMPARE_FAILED = 2
CORRUPT = 2
LEAKS = 3
NO_CHECKS = 63
INTERNAL = 70  # sysexits.h: EX_SOFTWARE
INTERRUPTED = 130  # 128 + SIGINT, as a shell shows a program that a signal ended
PIPE_CLOSED = 141  # 128 + SIGPIPE

# class: status of most verbs
STATUS: dict[type[BaseException], int] = {
    errors.MmcowError: FAILED,
    errors.UsageError: FAILED,
    errors.ClosedError: FAILED,
    errors.ForkedError: FAILED,
    errors.ReadOnlyError: FAILED,
    sizes.SizeError: FAILED,
    ui.CommandLineError: FAILED,
    ui.OutputError: FAILED,
    errors.FormatError: FAILED,
    errors.UnsupportedError: FAILED,
    errors.CorruptError: FAILED,
    errors.ChainError: FAILED,
    errors.DeniedError: FAILED,
    errors.StorageError: FAILED,
    errors.SyncFailed: FAILED,
    errors.LockedError: FAILED,
    errors.LayerFailed: FAILED,
    errors.JobError: FAILED,
    errors.Cancelled: INTERRUPTED,
    errors.Mismatch: DIFFER,
    errors.Interrupted: INTERRUPTED,
}


def status_of(error: BaseException, verb: str = "") -> int:
    """The exit status for ``error`` under ``verb``; INTERNAL for what is no error of mmcow."""
    for kind in type(error).__mro__:
        status = STATUS.get(kind)
        if status is not None:
            break
    else:
        return INTERNAL
    if verb == "compare" and status == FAILED and not isinstance(error, errors.Mismatch):
        return COMPARE_FAILED
    return status
