# SPDX-License-Identifier: MIT
"""Formats by name and by magic."""

from __future__ import annotations

import pytest

from mmcow.errors import UsageError
from mmcow.formats import registry

MAGICS = {
    b"ACOW": "add-cow",
    b"ADD_COW\xff": "add-cow",
    b"OOOM": "cow",
    b"MOOO": "cow",
    b"QFI\xfb\0\0\0\1": "qcow",
    b"QFI\xfb\0\0\0\2": "qcow2",
    b"QFI\xfb\0\0\0\3": "qcow2",
    b"QFI\xfb": "qcow2",
    b"vhdxfile": "vhdx",
    b"KDMV": "vmdk",
    b"COWD": "vmdk",
    b"# Disk DescriptorFile\n": "vmdk",
    b"QED\0": "qed",
    b"conectix": "vpc",
    b"LUKS\xba\xbe\0\1": "luks",
    b"WithoutFreeSpace": "parallels",
    b"WithouFreSpacExt": "parallels",
    b"Bochs Virtual HD Image": "bochs",
    b"<<< Oracle VM VirtualBox >>>".ljust(64, b"\0") + b"\x7f\x10\xda\xbe": "vdi",
}


@pytest.mark.parametrize(("head", "name"), MAGICS.items())
def test_probe_knows_the_magic_however_short_the_file(head, name):
    for rest in (b"", b"\0" * 4000, b"\xff" * 4000):
        assert registry.probe(head + rest) == name


@pytest.mark.parametrize(
    "head", [b"", b"\0" * 4096, b"ACO", b"ADD_COW", b"acow", b"\x55\xaa" * 300]
)
def test_probe_anything_else_is_raw(head):
    assert registry.probe(head) == "raw"


@pytest.mark.parametrize(("head", "name"), MAGICS.items())
def test_probe_agrees_with_the_format(head, name):
    if name in registry.names():
        assert registry.get(name).recognises(head)
    for other in registry.names():
        assert other == name or not registry.get(other).recognises(head)


def test_get_gives_the_same_object():
    assert [registry.get(name).name for name in registry.names()] == list(registry.names())
    assert registry.get("raw") is registry.get("raw")


def test_get_unknown_lists_the_names():
    with pytest.raises(UsageError, match="unknown format 'zip': must be one of raw, add-cow"):
        registry.get("zip")


@pytest.mark.parametrize("name", sorted(set(MAGICS.values())))
def test_get_known_but_unsupported_says_so(name):
    if name in registry.names():
        return
    with pytest.raises(UsageError, match=f"format '{name}' is not supported yet"):
        registry.get(name)
