# SPDX-License-Identifier: MIT
"""Build the C helper as the extension module mmcow._mmc.

setup.py names ``ffibuilder`` below to setuptools. The declarations are csrc/mmc_api.h as
it stands; this file only says what is compiled, and whether liburing is there. Without it
the helper has the thread pool alone.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent

# Uses what the helper uses, so that a liburing too old to build with counts as missing.
# io_uring_enter2 is public since liburing 2.3, which Debian 12 has.
LIBURING_TEST = """
#define _GNU_SOURCE
#include <liburing.h>
int main(void)
{
    struct io_uring ring;
    return io_uring_queue_init(1, &ring, 0) + (int)ring.sq.ring_mask +
           io_uring_enter2(0, 0, 0, IORING_ENTER_EXT_ARG, 0, 0);
}
"""


def has_liburing() -> bool:
    """Tell whether a program against liburing compiles and links here."""
    compiler = os.environ.get("CC", "cc").split()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "test.c")
        source.write_text(LIBURING_TEST)
        command = [*compiler, str(source), "-o", str(Path(folder, "test")), "-luring"]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            return False


def make_builder() -> FFI:
    """Describe the extension to cffi.

    MMCOW_WITHOUT_LIBURING=1 in the environment builds as if liburing were missing.
    """
    uring = not os.environ.get("MMCOW_WITHOUT_LIBURING") and has_liburing()
    builder = FFI()
    builder.cdef((HERE / "mmc_api.h").read_text())
    # setuptools wants sources relative to setup.py; strict.h makes these files, and not
    # the wrapper that cffi generates, fail on a warning.
    sources = sorted(str(Path("csrc", path.name)) for path in HERE.glob("*.c"))
    if not uring:
        sources.remove(str(Path("csrc", "uring.c")))
    builder.set_source(
        "mmcow._mmc",
        '#include "mmc.h"',
        sources=sources,
        include_dirs=["csrc"],
        depends=sorted(str(Path("csrc", path.name)) for path in HERE.glob("*.h")),
        define_macros=[("MMC_HAVE_URING", "1")] if uring else [],
        libraries=["uring"] if uring else [],
        extra_compile_args=["-std=gnu11", "-O2", "-pthread", "-fvisibility=hidden"],
        extra_link_args=["-pthread"],
    )
    return builder


ffibuilder = make_builder()
