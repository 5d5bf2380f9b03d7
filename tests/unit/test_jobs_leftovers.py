# SPDX-License-Identifier: MIT
"""What killed processes leave beside an image: check names it, and removes what nobody can miss."""

from __future__ import annotations

import os

import pytest

import mmcow
from mmcow.jobs import leftovers
from mmcow.jobs.check import check
from mmcow.jobs.snapshot import snapshot
from mmcow.storage import names
from mmcow.storage.linux import LinuxHost

SIZE = 1 << 20


class Killed(BaseException):
    """The process is gone: nothing is cleaned up."""


class DyingHost(LinuxHost):
    """Dies at the n-th call of one method."""

    def __init__(self) -> None:
        super().__init__()
        self.method, self.left = "", 0

    def __getattribute__(self, name):
        if name == object.__getattribute__(self, "__dict__").get("method"):
            self.left -= 1
            if self.left == 0:
                raise Killed
        return super().__getattribute__(name)


@pytest.fixture
def disk(tmp_path):
    (tmp_path / "base.raw").write_bytes(os.urandom(SIZE))
    path = tmp_path / "vm.acow"
    mmcow.create(path, backing="base.raw", backing_format="raw")
    with mmcow.open(path, write=True) as image:
        image.write(100, b"mine")
    return path


def content(path):
    with mmcow.open(path) as image:
        return image.read(0, image.size)


def kill_in_snapshot(disk, monkeypatch, method, after):
    """Leave what a killed snapshot leaves."""
    host = DyingHost()
    with monkeypatch.context() as patch:
        patch.setattr(names, "discard", lambda *_: None)
        patch.setattr("mmcow.formats.addcow_create._remove_new", lambda *_: None)
        with mmcow.open(disk, write=True, host=host) as image:
            host.method, host.left = method, after
            with pytest.raises((Killed, mmcow.Interrupted)):
                snapshot(image, "frozen")
            host.method = ""


def texts(report):
    return [found.text for found in report.result.findings]


@pytest.mark.parametrize(
    ("method", "after"),
    [("create", 1), ("create", 2), ("link", 1), ("sync_directory", 1), ("rename", 1),
     ("sync_directory", 2), ("link", 2), ("sync_directory", 3), ("rename", 2)],
)  # fmt: skip
def test_rests_of_a_killed_snapshot(disk, tmp_path, monkeypatch, method, after):
    before, files = content(disk), set(os.listdir(tmp_path))
    kill_in_snapshot(disk, monkeypatch, method, after)
    left = set(os.listdir(tmp_path)) - files
    temporary = {name for name in left if name.endswith(".mmcow-new")}
    report = check(disk)
    assert report.leaks == len(report.result.findings)
    assert report.corruptions == 0
    for name in temporary:
        assert any(name in text for text in texts(report)), name
    assert set(os.listdir(tmp_path)) == files | left  # looking removes nothing
    repaired = check(disk, repair="leaks")
    assert repaired.leaks == 0
    assert repaired.leaks_fixed == report.leaks
    now = set(os.listdir(tmp_path)) - files
    # Whatever no temporary file vouches for stays, and is told.
    assert now <= {"vm.acow.1.raw", "frozen"}
    assert all(any(name in note for note in repaired.notes) for name in now)
    assert content(disk) == before
    with mmcow.open(disk, write=True) as image:
        snapshot(image, "frozen")
    assert content(tmp_path / "frozen") == before == content(disk)


def test_the_usual_rests_are_removed_wholly(disk, tmp_path, monkeypatch):
    """Killed once both files of the new layer are there: nothing is left after the repair."""
    files = sorted(os.listdir(tmp_path))
    kill_in_snapshot(disk, monkeypatch, "link", 2)
    assert "vm.acow.1.raw" in os.listdir(tmp_path)
    assert check(disk, repair="leaks").leaks_fixed == 2
    assert sorted(os.listdir(tmp_path)) == files
    assert check(disk).is_clean


@pytest.fixture
def rests(disk, tmp_path, monkeypatch):
    """The two files, (temporary, data)."""
    kill_in_snapshot(disk, monkeypatch, "link", 2)
    temporary = next(n for n in os.listdir(tmp_path) if n.endswith(".mmcow-new"))
    return tmp_path / temporary, tmp_path / "vm.acow.1.raw"


def keeps(disk, *paths):
    before = [path.read_bytes() for path in paths]
    report = check(disk, repair="all")
    assert [path.read_bytes() for path in paths] == before
    return report


def test_a_data_file_with_a_byte_in_it_is_kept(disk, rests):
    temporary, data = rests
    with open(data, "r+b") as file:
        file.seek(70000)
        file.write(b"x")
    keeps(disk, data)
    assert not temporary.exists()


def test_a_data_file_with_space_but_no_data_is_kept(disk, rests):
    with open(rests[1], "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, 65536)
    keeps(disk, rests[1])


def test_a_layer_that_was_written_to_is_kept(disk, rests, tmp_path):
    """Somebody has opened the temporary file and used it: it holds clusters."""
    os.link(disk, tmp_path / "frozen")
    with mmcow.open(rests[0], write=True) as image:
        image.write(0, b"precious")
    report = keeps(disk, *rests)
    assert report.leaks == 1
    assert "may hold data" in texts(report)[0]
    assert check(disk, repair="leaks").leaks == 1


def test_what_somebody_uses_is_kept(disk, rests, tmp_path):
    os.link(disk, tmp_path / "frozen")
    with mmcow.open(rests[0], format="add-cow", backing=False):
        assert keeps(disk, *rests).result.findings == []
    with mmcow.open(rests[1], format="raw"):
        keeps(disk, rests[1])


@pytest.mark.parametrize("name", ["other.acow", "damaged.acow"])
def test_a_data_file_that_an_image_beside_it_names_is_kept(disk, rests, tmp_path, name):
    other = tmp_path / name
    mmcow.create(
        other, backing="base.raw", backing_format="raw", options={"image_file": rests[1].name}
    )
    if name == "damaged.acow":  # who knows what it names
        with open(other, "r+b") as file:
            file.seek(4)
            file.write(b"\xff" * 64)
    keeps(disk, rests[1], other)


def test_unused_data_files_are_told_not_removed(disk, tmp_path):
    for name in ("vm.acow.7.raw", "vm.acow.x.raw", "vm.acow.07.raw", "other.acow.1.raw"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, SIZE)
    report = check(disk, repair="all")
    assert report.is_clean
    assert [note.split(": ")[0] for note in report.notes] == [str(tmp_path / "vm.acow.7.raw")]
    assert (tmp_path / "vm.acow.7.raw").exists()


def test_the_layers_of_real_snapshots_are_no_rests(disk, tmp_path):
    with mmcow.open(disk, write=True) as image:
        snapshot(image, "a")
        snapshot(image, "b")
    files = sorted(os.listdir(tmp_path))
    for path in (disk, tmp_path / "a", tmp_path / "b"):
        report = check(path, repair="all")
        assert (report.notes, report.result.findings) == ((), [])
    assert sorted(os.listdir(tmp_path)) == files


@pytest.mark.parametrize(
    "name",
    [".vm.acow.0123456.mmcow-new", ".vm.acow.0123456G.mmcow-new", "vm.acow.01234567.mmcow-new",
     ".vm.acow.01234567.mmcow-new.bak", ".vm2.acow.01234567.mmcow-new", ".vm.acow.01234567",
     ".base.raw.01234567.mmcow-new"],
)  # fmt: skip
def test_names_that_are_no_rests_of_this_image(disk, tmp_path, name):
    (tmp_path / name).touch()
    assert check(disk, repair="all").result.findings == []
    assert (tmp_path / name).exists()


def test_links_and_directories_are_not_touched(disk, tmp_path):
    (tmp_path / "precious").touch()
    (tmp_path / ".vm.acow.01234567.mmcow-new").symlink_to("precious")
    (tmp_path / ".vm.acow.01234568.mmcow-new").mkdir()
    (tmp_path / ".vm.acow.01234569.mmcow-new").symlink_to("nowhere")
    os.mkfifo(tmp_path / ".vm.acow.0123456a.mmcow-new")
    files = sorted(os.listdir(tmp_path))
    assert check(disk, repair="all").result.findings == []
    assert sorted(os.listdir(tmp_path)) == files


def test_rests_of_a_copy_may_hold_data(disk, tmp_path):
    rest = tmp_path / ".vm.acow.01234567.mmcow-new"
    rest.write_bytes(b"half a copy")
    report = keeps(disk, rest)
    assert report.leaks == 1
    assert "may hold data" in texts(report)[0]


def test_an_empty_rest_of_anything_is_removed(disk, tmp_path):
    for name in (".vm.acow.01234567.mmcow-new", ".vm.acow.raw.01234567.mmcow-new",
                 "..vm.acow.01234567.mmcow-new.89abcdef.mmcow-new"):  # fmt: skip
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, SIZE)
    report = check(disk, repair="leaks")
    assert (report.leaks, report.leaks_fixed) == (0, 3)
    assert not [name for name in os.listdir(tmp_path) if name.endswith("new")]


def test_a_large_directory_is_not_looked_through(disk, tmp_path, monkeypatch):
    (tmp_path / ".vm.acow.01234567.mmcow-new").touch()
    monkeypatch.setattr(leftovers, "NAMES_MOST", 2)
    assert check(disk).is_clean


def test_a_second_name_is_told(disk, tmp_path):
    os.link(disk, tmp_path / "frozen")
    (tmp_path / "link").symlink_to("vm.acow")
    notes = check(disk).notes
    assert len(notes) == 1
    assert notes[0].startswith(f"{tmp_path / 'frozen'}: is another name")


def test_relative_names(disk, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".vm.acow.01234567.mmcow-new").touch()
    assert check("vm.acow", repair="leaks").leaks_fixed == 1
