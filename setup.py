# SPDX-License-Identifier: MIT
"""Only what pyproject.toml cannot say: the C helper is built by cffi."""

from setuptools import setup

setup(cffi_modules=["csrc/build_mmc.py:ffibuilder"])
