# SPDX-License-Identifier: MIT
"""Fuzzers with a printed seed. Each has a short form in the unit tier and a long one here."""
