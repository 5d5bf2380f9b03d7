# SPDX-License-Identifier: MIT
"""Only what pyproject.toml cannot say: the C helper is built by cffi, the command is a script."""

from setuptools import setup

setup(cffi_modules=["csrc/build_mmc.py:ffibuilder"], scripts=["bin/mmcow"])
