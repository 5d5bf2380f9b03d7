# SPDX-License-Identifier: MIT
"""Fixtures of the unit tests."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["pump", "python"])
def way(request, monkeypatch):
    """Who serves the clients of a server: the pump in C, or Python alone. Both must do the same."""
    monkeypatch.setenv("MMCOW_PUMP", "on" if request.param == "pump" else "off")
    if request.param == "pump":
        monkeypatch.setenv("MMCOW_HITS", "on")  # without them there is no pump
    return request.param
