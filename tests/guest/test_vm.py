# SPDX-License-Identifier: MIT
"""The harness itself: what is missing is said, a guest that fails shows its console."""

from __future__ import annotations

import pytest

from tests.guest import vm
from tests.interop.tools import Failed


def test_what_is_missing_is_a_skip_or_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(vm, "KERNEL", tmp_path)
    monkeypatch.setenv("CI", "")
    with pytest.raises(pytest.skip.Exception, match="a guest kernel"):
        vm.requires_guest()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="a guest kernel"):
        vm.requires_guest()


@pytest.mark.interop
def test_a_guest_that_fails_shows_its_console(tmp_path):
    vm.requires_guest()
    with vm.Guest(tmp_path, "echo a last word\nread -r answer\nfalse\n") as guest:
        guest.booted()
        with pytest.raises(Failed, match=r"gave no word for 0.5 s\n(?s:.*)BOOTED"):
            guest.wait("@@ END", 0.5)
        guest.say()
        with pytest.raises(Failed, match=r"the guest ended\n(?s:.*)a last word"):
            guest.finish()
