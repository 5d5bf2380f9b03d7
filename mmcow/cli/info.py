# SPDX-License-Identifier: MIT
"""``mmcow info`` and ``mmcow probe``: what files are, without opening what they name.

Owns: the two verbs, and which cache mode ``auto`` will mean for a data file.
Never: opens a data file or (without --backing-chain) a base: their names may come from a
stranger. Whether a file can do direct I/O is asked of the kernel by name alone.
"""

from __future__ import annotations

import os

from mmcow import native
from mmcow.cli import exits
from mmcow.cli.options import (
    Parser,
    add_backing_format,
    add_format,
    add_output,
    add_share,
    refuse_qemu,
)
from mmcow.cli.sizes import exact_size, human_size
from mmcow.cli.ui import printable
from mmcow.errors import MmcowError, UsageError
from mmcow.jobs.info import ImageInfo, inspect, inspect_chain

TYPE_CHECKING = False  # as type checkers see it; ``typing`` is slow to import
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from mmcow.cli.ui import Ui


# Details that the text has lines of their own for.
_TOLD = ("compat", "data-file")


def configure_info(parser: Parser) -> None:
    """Add the verb's options."""
    add_format(parser)
    add_backing_format(parser)
    parser.add_argument(
        "--backing-chain", action="store_true", help="the image and everything below it"
    )
    add_share(parser)
    add_output(parser)
    refuse_qemu(parser)
    parser.add_argument("file", metavar="FILE", help="the image")
    parser.examples("mmcow info vm.acow", "mmcow info --backing-chain --output=json vm.acow")


def run_info(arguments: argparse.Namespace, ui: Ui) -> int:
    """Show what the headers say."""
    ui.subject = path = arguments.file
    if arguments.backing_chain:
        chain = inspect_chain(
            path,
            format=arguments.format,
            share=arguments.share,
            backing_format=arguments.backing_format,
        )
    else:
        chain = [inspect(path, format=arguments.format, share=arguments.share)]
    queue = queue_backend()
    if arguments.output == "json":
        shown = [as_json(info, queue) for info in chain]
        ui.out_json(shown if arguments.backing_chain else shown[0])
    else:
        ui.out("\n\n".join(as_text(info, queue) for info in chain))
    return exits.OK


def queue_backend() -> str:
    """Which I/O queue this machine gives."""
    choice = os.environ.get("MMCOW_QUEUE", "auto")
    if choice not in native.BACKENDS:
        listed = ", ".join(native.BACKENDS)
        raise UsageError(f"I/O queue {choice!r}: must be one of {listed}")
    return native.queue_backend(choice)


def cache_mode(path: str) -> str | None:
    """What cache mode auto comes to for a file; None where only opening it would tell.

    O_PATH gives a name to ask about, not the file: nothing of it is opened.
    """
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        alignment = native.direct_alignment(descriptor)
    except MmcowError:
        return None
    finally:
        os.close(descriptor)
    if alignment is None:
        return None
    return "none" if alignment[1] else "writeback"


def as_json(info: ImageInfo, queue: str) -> dict[str, Any]:
    """qemu-img's keys; what it does not have stands under format-specific and mmcow."""
    shown: dict[str, Any] = {
        "virtual-size": info.virtual_size,
        "filename": info.path,
        "format": info.format,
        "actual-size": info.actual_size,
        "dirty-flag": False,
    }
    if info.cluster_size is not None:
        shown["cluster-size"] = info.cluster_size
    if info.backing is not None:
        shown["backing-filename"] = info.backing
    if info.backing_path is not None:
        shown["full-backing-filename"] = info.backing_path
    if info.backing_format is not None:
        shown["backing-filename-format"] = info.backing_format
    data = _specific(info)
    if data:
        shown["format-specific"] = {"type": info.format, "data": data}
    shown["mmcow"] = {"cache": cache_mode(_data_path(info)) or "auto", "io-queue": queue}
    return shown


def _specific(info: ImageInfo) -> dict[str, Any]:
    data = dict(info.details)
    if info.variant:
        data["compat"] = info.variant
    if info.data_file is not None:
        data["data-file"] = info.data_file
        data["data-file-path"] = info.data_file_path
        data["data-file-size"] = info.data_file_size
        data["data-file-actual-size"] = info.data_file_actual_size
    return data


def _data_path(info: ImageInfo) -> str:
    return info.path if info.data_file is None else info.data_file_path or ""


def as_text(info: ImageInfo, queue: str) -> str:
    """One fact a line."""
    known = info.virtual_size is not None
    lines = [
        f"image: {info.path}",
        f"file format: {info.format}" + (f" ({info.variant})" if info.variant else ""),
        f"virtual size: {exact_size(info.virtual_size or 0) if known else 'unknown'}",
        f"disk size: {human_size(info.actual_size)}",
    ]
    if info.cluster_size is not None:
        lines.append(f"cluster size: {exact_size(info.cluster_size)}")
    lines += _backing_lines(info)
    lines += _data_lines(info)
    lines.append(f"cache mode: {_cache_text(info)}")
    lines.append(f"I/O queue: {queue}")
    rest = {key: value for key, value in info.details.items() if key not in _TOLD}
    if rest:
        lines.append("format specific information:")
        lines += [f"    {key}: {_plain(value)}" for key, value in rest.items()]
    return "\n".join(map(printable, lines))


def _backing_lines(info: ImageInfo) -> list[str]:
    if info.backing is None:
        return []
    unused = "" if info.has_backing else " (not in use: every cluster is in this image)"
    return [
        f"backing file: {info.backing}{_actual(info.backing, info.backing_path)}{unused}",
        f"backing file format: {info.backing_format or 'not recorded'}",
    ]


def _data_lines(info: ImageInfo) -> list[str]:
    if info.data_file is None:
        return []
    if info.data_file_path is None:
        return [f"data file: {info.data_file} (a name that is not followed)"]
    lines = [f"data file: {info.data_file}{_actual(info.data_file, info.data_file_path)}"]
    if info.data_file_size is None:
        return [*lines, "data file size: missing"]
    occupied = info.data_file_actual_size or 0
    size = f"{exact_size(info.data_file_size)}, {human_size(occupied)} on disk"
    return [*lines, f"data file size: {size}"]


def _actual(name: str, path: str | None) -> str:
    return "" if path in (None, name) else f" (actual path: {path})"


def _cache_text(info: ImageInfo) -> str:
    mode = cache_mode(_data_path(info))
    if mode is None:
        return "auto: none, or writeback where the file system refuses direct I/O"
    reason = "" if mode == "none" else ": the file system has no direct I/O"
    return f"{mode} (auto{reason})"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool | None) else str(value)


def configure_probe(parser: Parser) -> None:
    """Add the verb's options."""
    add_output(parser)
    parser.add_argument("files", metavar="FILE", nargs="+", help="files to look at")
    parser.examples("mmcow probe disk.img", "mmcow probe --output=json *.img")


def run_probe(arguments: argparse.Namespace, ui: Ui) -> int:
    """Tell formats by magic; takes no locks, opens nothing that a file names."""
    from mmcow.chain import probe_file  # noqa: PLC0415 - not for info
    from mmcow.storage.linux import LinuxHost  # noqa: PLC0415

    host = LinuxHost()
    found = []
    status = exits.OK
    for path in arguments.files:
        ui.subject = path
        try:
            format_ = probe_file(host, path)
        except MmcowError as error:  # the other files can still be told
            ui.note(ui.describe(error))
            status = exits.FAILED
            continue
        found.append({"filename": path, "format": format_})
        if arguments.output == "human":
            ui.out(printable(f"{path}: {format_}"))
    if arguments.output == "json":
        ui.out_json(found)
    return status
