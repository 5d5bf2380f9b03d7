# SPDX-License-Identifier: MIT
"""``mmcow check``.

Owns: the verb, the report's two forms, and its exit statuses: 0 clean, 1 could not be checked,
2 corrupt, 3 leaks, 63 a format with nothing to check.
Never: examines an image itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmcow.cli import exits
from mmcow.cli.options import (
    Parser,
    add_format,
    add_output,
    add_quiet,
    add_share,
    refuse_qemu,
)
from mmcow.cli.ui import CommandLineError, printable
from mmcow.jobs.check import CheckReport, check

if TYPE_CHECKING:
    import argparse

    from mmcow.cli.ui import Ui


def configure_check(parser: Parser) -> None:
    """Add the verb's options."""
    add_format(parser)
    parser.add_argument(
        "-r", "--repair", choices=("leaks", "all"), default="",
        help="repair: only lost space, or everything that can be",
    )  # fmt: skip
    add_share(parser)
    add_output(parser)
    add_quiet(parser)
    refuse_qemu(parser)
    parser.refuse("metadata is mapped, not cached", "-T", argument=True)
    parser.add_argument("file", metavar="FILE", help="the image")
    parser.examples("mmcow check vm.acow", "mmcow check -r all --output=json vm.acow")


def run_check(arguments: argparse.Namespace, ui: Ui) -> int:
    """Check, and repair if asked."""
    ui.subject = path = arguments.file
    if arguments.repair and arguments.share:
        raise CommandLineError("check: -r needs the image for itself, -U shares it; use one")
    ui.can_share = not (arguments.repair or arguments.share)
    report = check(path, format=arguments.format, repair=arguments.repair, share=arguments.share)
    if report.format == "raw" and not report.result.findings:
        ui.note(f"{path}: a raw disk has no metadata to check")
        return exits.NO_CHECKS
    if arguments.output == "json":
        ui.out_json(as_json(report))
    else:
        _tell(report, ui)
    return status_of(report)


def status_of(report: CheckReport) -> int:
    """The exit status that what is still wrong stands for."""
    if report.corruptions:
        return exits.CORRUPT
    return exits.LEAKS if report.leaks else exits.OK


def as_json(report: CheckReport) -> dict[str, Any]:
    """qemu-img's keys: counts that are 0 are left out where it leaves them out."""
    result = report.result
    shown: dict[str, Any] = {
        "filename": report.filename,
        "format": report.format,
        "check-errors": 0,
        "image-end-offset": result.image_end,
        "total-clusters": result.total,
        "allocated-clusters": result.allocated,
    }
    optional = {
        "fragmented-clusters": result.fragmented,
        "compressed-clusters": result.compressed,
        "corruptions": report.corruptions,
        "leaks": report.leaks,
        "corruptions-fixed": report.corruptions_fixed,
        "leaks-fixed": report.leaks_fixed,
    }
    shown.update({key: count for key, count in optional.items() if count})
    if result.findings:
        shown["findings"] = [
            {"kind": found.kind, "text": found.text, "fixed": found.fixed}
            for found in result.findings
        ]
    if report.notes:
        shown["notes"] = list(report.notes)
    return shown


def _tell(report: CheckReport, ui: Ui) -> None:
    result = report.result
    name = printable(report.filename)
    for found in result.findings:
        ui.say(printable(f"{found.kind}{' (repaired)' if found.fixed else ''}: {found.text}"))
    for note in report.notes:
        ui.say(printable(f"note: {note}"))
    if report.is_clean:
        ui.say(f"{name}: no errors" + (" left" if result.findings else ""))
    if report.corruptions:
        ui.say(f"{name}: {report.corruptions} corruptions: data is at risk")
    if report.leaks:
        ui.say(f"{name}: {report.leaks} leaks: space is lost, data is not")
    if result.total:
        share = [f"{100 * result.allocated / result.total:.2f} % allocated"]
        if result.allocated:
            share.append(f"{100 * result.fragmented / result.allocated:.2f} % fragmented")
            share.append(f"{100 * result.compressed / result.allocated:.2f} % compressed")
        ui.say(f"{result.allocated} of {result.total} clusters: {', '.join(share)}")
    if result.image_end:
        ui.say(f"image end offset: {result.image_end}")
