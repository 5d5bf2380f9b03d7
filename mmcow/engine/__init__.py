# SPDX-License-Identifier: MIT
"""Requests on a chain of layers: read, write, zero, discard, flush, resize."""
