# SPDX-License-Identifier: MIT
"""What ``mmcow info`` may import: its start should cost little more than the interpreter's."""

import subprocess
import sys
from pathlib import Path

import mmcow

SCRIPT = Path(__file__).resolve().parents[2] / "bin/mmcow"

# Each of these takes a noticeable part of the time that a bare interpreter takes to start.
HEAVY = {
    "argparse", "asyncio", "collections", "contextlib", "ctypes", "dataclasses", "enum",
    "functools", "hashlib", "inspect", "json", "logging", "pathlib", "psutil", "re", "shutil",
    "signal", "socket", "subprocess", "tempfile", "threading", "typing",
}  # fmt: skip
# Of our own: what the verb has a use for.
OURS = {
    "mmcow", "mmcow._mmc", "mmcow._mmc.lib", "mmcow.cli", "mmcow.cli.exits",
    "mmcow.cli.info", "mmcow.cli.main",
    "mmcow.cli.options", "mmcow.cli.sizes", "mmcow.cli.terminal", "mmcow.cli.ui",
    "mmcow.cli.verbs", "mmcow.errors", "mmcow.formats", "mmcow.formats.addcow_header",
    "mmcow.formats.addcow_meta", "mmcow.formats.naming", "mmcow.formats.registry", "mmcow.jobs",
    "mmcow.jobs.info", "mmcow.native", "mmcow.ranges", "mmcow.records", "mmcow.storage",
    "mmcow.storage.facts", "mmcow.storage.handle", "mmcow.storage.locks",
}  # fmt: skip

# An editable install and coverage have imported much before this; so what is there is forgotten.
CODE = """
import sys
for name in set(sys.modules) & set(sys.argv[2].split()):
    del sys.modules[name]
from mmcow.cli.main import main
assert main(["info", sys.argv[1]]) == 0
print("\\n".join(sys.modules))
"""


def test_info_imports_only_what_it_needs(tmp_path):
    base, top = tmp_path / "base.raw", tmp_path / "top.acow"
    mmcow.create(base, size=1 << 20, format="raw")
    mmcow.create(top, backing="base.raw", backing_format="raw")
    ended = subprocess.run(
        [sys.executable, "-c", CODE, top, " ".join(HEAVY)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "file format: add-cow" in ended.stdout
    modules = set(ended.stdout.split())
    assert not modules & HEAVY
    assert {name for name in modules if name.split(".")[0] == "mmcow"} - OURS == set()


def test_the_script_tells_everything_before_it_leaves(tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False
        )

    path = tmp_path / "disk.raw"
    mmcow.create(path, size=1 << 20, format="raw")
    told = run("info", "--output=json", path)
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.endswith("}\n")
    failed = run("info", tmp_path / "missing")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "No such file" in failed.stderr
    assert run("create", "-q", tmp_path / "other.raw", "1M").returncode == 0
