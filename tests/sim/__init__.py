# SPDX-License-Identifier: MIT
"""A simulated machine below mmcow: storage that loses power and fails on demand, from a seed."""
