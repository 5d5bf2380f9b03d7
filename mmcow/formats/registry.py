# SPDX-License-Identifier: MIT
"""Which formats exist, and which one a file's first bytes claim.

Owns: the table of format modules, imported when first asked for, and the table of magics,
also those of formats mmcow does not have: a file that begins with one of them is that
format or an error, never raw.

Never: opens a file, looks at more than the first 4096 bytes, guesses from names.

::

    at 0   "ACOW" | "ADD_COW" FF           add-cow      "LUKS" BA BE             luks
           "OOOM" | "MOOO"                 cow          "conectix"               vpc
           "QFI" FB, version 1 big-endian  qcow         "WithoutFreeSpace"
           "QFI" FB, any other             qcow2        "WithouFreSpacExt"       parallels
           "vhdxfile"                      vhdx         "Bochs Virtual HD Image" bochs
           "KDMV" | "COWD" | "# Disk DescriptorFile"    vmdk
           "QED" 00                        qed
    at 64  7F 10 DA BE                     vdi
"""

from __future__ import annotations

from mmcow.errors import UsageError

TYPE_CHECKING = False  # as type checkers see it; ``typing`` is slow to import
if TYPE_CHECKING:
    from mmcow.formats.naming import Inspection
    from mmcow.formats.opening import Format
    from mmcow.storage.host import Handle

# How much of a file's beginning ``probe`` wants to see.
HEAD = 4096

# name: (module, class)
_FORMATS: dict[str, tuple[str, str]] = {
    "raw": ("mmcow.formats.raw", "RawFormat"),
    "add-cow": ("mmcow.formats.addcow", "AddCowFormat"),
    "cow": ("mmcow.formats.cow", "CowFormat"),
}

# (offset, magic, name), the first match counts.
_MAGICS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"ACOW", "add-cow"),
    (0, b"ADD_COW\xff", "add-cow"),
    (0, b"OOOM", "cow"),
    (0, b"MOOO", "cow"),  # UML v1 on a little-endian machine
    (0, b"QFI\xfb\0\0\0\1", "qcow"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"QED\0", "qed"),
    (0, b"conectix", "vpc"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
)

_loaded: dict[str, Format] = {}


def names() -> tuple[str, ...]:
    """The formats that ``get`` gives."""
    return tuple(_FORMATS)


def get(name: str) -> Format:
    """The format called ``name``.

    UsageError lists the formats there are, and says of a known one that it is not supported.
    """
    try:
        return _loaded[name]
    except KeyError:
        pass
    try:
        module, attribute = _FORMATS[name]
    except KeyError:
        listed = ", ".join(_FORMATS)
        if any(name == known for _, _, known in _MAGICS):
            raise UsageError(
                f"format {name!r} is not supported yet; supported are {listed}"
            ) from None
        raise UsageError(f"unknown format {name!r}: must be one of {listed}") from None
    from importlib import import_module  # noqa: PLC0415 - not needed to inspect

    made: Format = getattr(import_module(module), attribute)()
    _loaded[name] = made
    return made


def inspect(name: str, path: str, handle: Handle) -> Inspection:
    """What the header of ``path`` tells, read as format ``name``; as that format's ``inspect``."""
    if name == "add-cow":
        from mmcow.formats import addcow_header  # noqa: PLC0415 - without all of the format

        return addcow_header.inspect(path, handle)
    return get(name).inspect(path, handle)


def known() -> list[str]:
    """Names of formats that are recognised by their magic, supported or not; sorted."""
    return sorted({name for _, _, name in _MAGICS})


def probe(head: bytes) -> str:
    """The name of the format whose magic ``head`` carries, else "raw".

    ``head`` is the file's first bytes, up to ``HEAD`` of them. The magic alone decides, so a
    damaged or cut image is still that format and its opening an error; the name may be one
    that ``get`` refuses.
    """
    for offset, magic, name in _MAGICS:
        if head.startswith(magic, offset):
            return name
    return "raw"
