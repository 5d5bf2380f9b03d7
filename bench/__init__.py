# SPDX-License-Identifier: MIT
"""Measurements of mmcow beside other programs. ``python -m bench --help``; see bench/README.md.

Imports go downward: __main__, runner, sessions, (ours, peers, servers, lab), options, process; the
data (suites, model) and the arithmetic (stats, report, plots) start no programs.
"""
