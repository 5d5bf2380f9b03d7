# SPDX-License-Identifier: MIT
"""The other programs: their command lines, and how to read what they say.

Owns: every command line of qemu-img, qemu-nbd, qemu-io, fio, nbdkit and nbdcopy.
Never: keeps files or processes.

All use io_uring and cache=none, except where a program cannot (README.md tells where).
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from bench.model import QCOW2_EL2, Op, Requests, Sample, Served
from bench.process import Failed, run

if TYPE_CHECKING:
    from pathlib import Path

    from bench.process import Ended

_DIRECT = ("-T", "none", "-t", "none")
_COMPLETED = re.compile(r"Run completed in ([0-9.]+) seconds")
SEED = 20


# ---- qemu -----------------------------------------------------------------------------------


def create(path: Path, base: Path, side: str) -> None:
    """A new qcow2 layer over a raw base."""
    options = ["-o", "extended_l2=on,cluster_size=128k"] if side == QCOW2_EL2 else []
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, "-b", base, "-F", "raw", path)


def create_alone(path: Path, form: str, size: int) -> None:
    """An image without a base."""
    run("qemu-img", "create", "-q", "-f", form, path, str(size))


def fill(path: Path, source: Path) -> None:
    """Write all of a raw file into an image."""
    run("qemu-img", "convert", "-q", "-n", "-f", "raw", "-O", "qcow2", *_DIRECT, source, path)


def bench(image: Path, work: Requests, count: int, step: int) -> Sample:
    """``qemu-img bench``, which times itself from the first request to the last."""
    options = ["-w", "--pattern=171"] if work.op == "write" else []
    if work.flush:
        options.append("--flush-interval=1")
    ended = run(
        "qemu-img", "bench", "-f", "qcow2", "-t", "none", "-i", "io_uring", "-c", str(count),
        "-d", str(work.depth), "-s", str(work.size), "-S", str(step), *options, image,
    )  # fmt: skip
    return read_bench(ended, count)


def read_bench(ended: Ended, count: int) -> Sample:
    """What ``qemu-img bench`` says."""
    found = _COMPLETED.search(ended.output)
    seconds = float(found[1]) if found else 0.0
    if not seconds:
        raise Failed(f"qemu-img bench said {ended.output[-200:]!r}")
    return Sample(count / seconds, {"cpu_s": ended.cpu})


def qemu_nbd(image: Path, socket: Path) -> list[str]:
    """The server's command line."""
    return [
        "qemu-nbd", "-t", "-e", "16", "-k", str(socket), "--aio=io_uring", "--cache=none",
        "-f", "qcow2", str(image),
    ]  # fmt: skip


def convert(
    source: Path, form: str, target: Path, target_form: str, *, parallel: bool
) -> float:  # fmt: skip
    """Seconds; into an image that exists, because only so io_uring can be asked for."""
    options = ["-W", "-m", "8"] if parallel else []
    return run(
        "qemu-img", "convert", "-q", "-n", "--image-opts", "--target-image-opts", *_DIRECT,
        *options, _image_options(source, form), _image_options(target, target_form),
    ).wall  # fmt: skip


def _image_options(path: Path, form: str) -> str:
    return f"driver={form},file.driver=file,file.filename={path},file.aio=io_uring"


def commit(image: Path, base: Path) -> float:
    """Seconds."""
    return run(
        "qemu-img", "commit", "-q", "-t", "none", "--image-opts", _chain_options(image, base)
    ).wall


def stream(image: Path, base: Path) -> float:
    """Seconds of a rebase to nothing, which copies all of the base."""
    return run(
        "qemu-img", "rebase", "-q", *_DIRECT, "-b", "", "--image-opts", _chain_options(image, base)
    ).wall


def _chain_options(image: Path, base: Path) -> str:
    below = _image_options(base, "raw").split(",")
    return ",".join([_image_options(image, "qcow2"), *(f"backing.{word}" for word in below)])


def map_command(image: Path) -> float:
    """Seconds of the command, its output thrown away."""
    return run("qemu-img", "map", "-f", "qcow2", "--output=json", image, keep_output=False).wall


def extents_of(image: Path) -> list[dict[str, Any]]:
    """What ``qemu-img map`` says."""
    found: list[dict[str, Any]] = json.loads(
        run("qemu-img", "map", "-f", "qcow2", "--output=json", image).output
    )
    return found


def write_zero_clusters(path: Path, disk: int, period: int) -> None:
    """Make the first 64 KiB of each ``period`` zeros that the layer holds itself."""
    commands = "\n".join(f"write -qz {offset} 64k" for offset in range(0, disk, period))
    run(
        "qemu-io", "-t", "unsafe", "-f", "qcow2", path, stdin=commands + "\nquit\n",
        keep_output=False, seconds_most=600,
    )  # fmt: skip


# ---- fio ------------------------------------------------------------------------------------


def fio_file(path: Path, disk: int, work: Requests, count: int) -> Sample:
    """On a raw file."""
    return _fio(
        work.op, count, "--ioengine=io_uring", "--direct=1", f"--filename={path}",
        f"--size={disk}", f"--bs={work.size}", f"--iodepth={work.depth}",
        sequential=work.sequential, once=False,
    )  # fmt: skip


def fio_nbd(
    socket: Path, work: Served, count: int, *, once: bool = False, connections: int = 1
) -> Sample:
    """As a client. ``once``: no block twice. ``count``: of all connections together."""
    return _fio(
        work.op, count // connections, "--ioengine=nbd", f"--uri=nbd+unix:///?socket={socket}",
        f"--bs={work.size}", f"--iodepth={work.depth // connections}", f"--numjobs={connections}",
        "--group_reporting", sequential=work.sequential, once=once,
    )  # fmt: skip


def _fio(op: Op, count: int, *options: str, sequential: bool, once: bool) -> Sample:
    order = [f"--rw={op}"] if sequential else [f"--rw=rand{op}"]
    if not sequential and not once:
        order.append("--norandommap")
    ended = run(
        "fio", "--name=bench", *order, f"--randseed={SEED}", f"--number_ios={count}",
        "--output-format=json", *options,
    )  # fmt: skip
    return read_fio(ended, op)


def read_fio(ended: Ended, op: Op) -> Sample:
    """What fio says; a line of its NBD engine stands before the JSON."""
    try:
        job = json.loads(ended.output[ended.output.index("{") :])["jobs"][0]
        done = job[op]
        requests, seconds = int(done["total_ios"]), float(done["runtime"]) / 1000
        # Percent of the time of all its jobs; what fio does before and after is not in it.
        busy = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
        if job["error"] or not requests or not seconds:
            raise Failed(f"fio: error {job['error']}, {requests} requests, {seconds} s")
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise Failed(f"fio said {ended.output[:200]!r}") from error
    return Sample(requests / seconds, {"requests": requests, "seconds": seconds, "cpu_s": busy})


# ---- nbdkit, nbdcopy ------------------------------------------------------------------------


def nbdkit(path: Path, socket: Path) -> list[str]:
    """The server's command line."""
    return ["nbdkit", "--foreground", "--unix", str(socket), "file", str(path)]


def nbdcopy_out(socket: Path) -> Ended:
    """A whole disk to nowhere."""
    return run("nbdcopy", _uri(socket), "null:")


def nbdcopy_in(source: Path, socket: Path) -> Ended:
    """A file to a server, flushed."""
    return run("nbdcopy", "--flush", source, _uri(socket))


def _uri(socket: Path) -> str:
    return f"nbd+unix:///?socket={socket}"
