# SPDX-License-Identifier: MIT
"""docs/guest.md, as it stands: the commands are run, the XML is validated."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.guest.disk import Promises, files_in, fsck, make_base
from tests.guest.vm import KERNEL_LINE, QEMU, ROOT, STEP_SECONDS, boot_files, requires_guest
from tests.interop.tools import Failed, run, sha256, which

pytestmark = [pytest.mark.interop, pytest.mark.timeout(300)]

TEXT = (ROOT / "docs" / "guest.md").read_text(encoding="utf-8")
JOB = """mount -t ext4 /dev/vda /mnt
put /mnt hello 5 7
pause commands
put /mnt again 50 70
umount /mnt
"""


def blocks(heading: str, kind: str) -> list[str]:
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL)
    assert found
    return found


def programs(folder: Path, kernel: Path, initramfs: Path) -> dict[str, str]:
    """An environment in which ``mmcow`` is this one, and QEMU gets a kernel to boot.

    KVM is taken out of its options: there are machines that have it and cannot run a guest with
    it, and QEMU falls back to emulation only where it is missing.
    """
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    kernel_options = f"-kernel {kernel} -initrd {initramfs} -append '{KERNEL_LINE}'"
    qemu = f"""case "$1 $2" in
"-accel kvm") shift 2 ;;
*) echo "no -accel kvm: $*"; exit 1 ;;
esac
exec {which(QEMU)} "$@" {kernel_options}"""
    for name, script in (("mmcow", f'exec {sys.executable} -m mmcow "$@"'), (QEMU, qemu)):
        (bin_folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (bin_folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}


def shell(folder: Path, script: str, environment: dict[str, str]) -> str:
    """A script's output, standard error with it; no process of it outlives this."""
    with subprocess.Popen(
        ["sh", "-eu", "-c", script], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    ) as process:  # fmt: skip
        timer = threading.Timer(2 * STEP_SECONDS, os.killpg, (process.pid, 9))
        timer.start()
        try:
            output = process.communicate()[0].decode(errors="replace")
        finally:
            timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, 9)
    if process.returncode != 0:
        raise Failed(f"{script}\nended with {process.returncode}\n{output}")
    return output


def console(output: str) -> list[str]:
    """Lines of the guest; firmware writes terminal codes before the first."""
    return [line.rstrip("\r") for line in output.splitlines()]


@pytest.fixture
def machine(tmp_path):
    requires_guest()
    base = make_base(tmp_path, random.Random(20260102))
    return base, tmp_path


def test_the_commands_of_the_page(machine):
    base, folder = machine
    setup, boot, live, after = blocks("With QEMU", "sh")
    kernel, initramfs = boot_files(folder, JOB, {"blob": base.blob})
    environment = programs(folder, kernel, initramfs)
    # The guest pauses; the commands "from another terminal" run then, and let it go on.
    script = f"""
{setup}
mkfifo console; exec 3<>console
guest() {{ {boot.strip()} <&3; }}
guest >guest.log 2>&1 & guest=$!
tries=0
until grep -q '@@ PAUSE commands' guest.log; do
    tries=$((tries + 1)); test $tries -lt 600 || {{ cat guest.log; exit 1; }}
    sleep 0.1
done
{live}
echo go >&3
wait $guest
{after}
wait
"""
    shell(folder, script, environment)
    log = (folder / "guest.log").read_text(errors="replace")
    promises = Promises.read(base, console(log))
    assert promises.count == 2, log
    assert sha256(base.path) == base.checksum
    assert not (folder / "vm.acow").exists()
    left = folder / "vm.acow.1.raw"
    fsck(left)
    promises.check(files_in(left))


def test_the_one_command(machine):
    base, folder = machine
    (script,) = blocks("One command", "sh")
    job = JOB.replace("pause commands\n", "")
    kernel, initramfs = boot_files(folder, job, {"blob": base.blob})
    output = shell(folder, script, programs(folder, kernel, initramfs))
    promises = Promises.read(base, console(output))
    assert promises.count == 2, output
    assert sha256(base.path) == base.checksum
    run(sys.executable, "-m", "mmcow", "convert", "-O", "raw", "short.acow", "flat", cwd=folder)
    fsck(folder / "flat")
    promises.check(files_in(folder / "flat"))


def test_the_xml(tmp_path):
    # Not one of the packages that `make` installs: never a failure.
    if not shutil.which("virt-xml-validate") or not shutil.which("xmllint"):
        pytest.skip("needs virt-xml-validate and xmllint (packages libvirt-clients, libxml2-utils)")
    (xml,) = blocks("With libvirt", "xml")
    (tmp_path / "vm.xml").write_text(xml)
    run("virt-xml-validate", tmp_path / "vm.xml", "domain")
