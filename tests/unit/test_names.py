# SPDX-License-Identifier: MIT
"""Making, replacing and removing files so that a power cut finds the old one or the new one."""

from __future__ import annotations

import errno
import os

import pytest

import mmcow
from mmcow import StorageError
from mmcow.storage import names
from mmcow.storage.linux import LinuxHost


class Recorder(LinuxHost):
    """Notes the order of what makes a name durable."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.refuse_link = 0

    def create(self, path):
        handle = super().create(path)
        sync = handle.sync
        handle.sync = lambda: (self.calls.append("sync"), sync())
        self.calls.append("create")
        return handle

    def link(self, source, target):
        if self.refuse_link:
            raise StorageError(self.refuse_link, "create", target)
        super().link(source, target)
        self.calls.append("link")

    def rename(self, source, target):
        super().rename(source, target)
        self.calls.append("rename")

    def unlink(self, path):
        super().unlink(path)
        self.calls.append("unlink")

    def sync_directory(self, path):
        super().sync_directory(path)
        self.calls.append("sync directory")


@pytest.fixture
def host():
    return Recorder()


def fill(handle):
    handle.write_at(0, b"content")


def test_new_file_is_synced_before_it_has_its_name(host, tmp_path):
    path = tmp_path / "new"
    names.make_file(host, str(path), fill, replace=False)
    assert path.read_bytes() == b"content"
    assert host.calls == ["create", "sync", "link", "unlink", "sync directory"]
    assert os.listdir(tmp_path) == ["new"]


def test_replacing_is_one_rename(host, tmp_path):
    path = tmp_path / "old"
    path.write_bytes(b"old")
    names.make_file(host, str(path), fill, replace=True)
    assert path.read_bytes() == b"content"
    assert host.calls == ["create", "sync", "rename", "sync directory"]


def test_existing_name_is_kept_without_replace(host, tmp_path):
    path = tmp_path / "old"
    path.write_bytes(b"old")
    for refused in (0, errno.EPERM, errno.EOPNOTSUPP):
        host.refuse_link = refused
        with pytest.raises(StorageError) as caught:
            names.make_file(host, str(path), fill, replace=False)
        assert caught.value.errno == errno.EEXIST
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["old"]


def test_file_system_without_hard_links(host, tmp_path):
    host.refuse_link = errno.EPERM
    names.make_file(host, str(tmp_path / "new"), fill, replace=False)
    assert os.listdir(tmp_path) == ["new"]
    assert host.calls[-2:] == ["rename", "sync directory"]


def test_failed_filling_leaves_nothing(host, tmp_path):
    def fail(handle):
        handle.write_at(0, b"half")
        raise StorageError(errno.ENOSPC, "write", handle.path)

    for replace in (True, False):
        with pytest.raises(StorageError):
            names.make_file(host, str(tmp_path / "new"), fail, replace=replace)
        assert os.listdir(tmp_path) == []


def test_name_as_long_as_the_file_system_allows(host, tmp_path):
    names.make_file(host, str(tmp_path / ("n" * 255)), fill, replace=False)
    assert os.listdir(tmp_path) == ["n" * 255]


def test_name_of_many_bytes_per_letter(host, tmp_path):
    """This test makes a file whose 85 letters take 255 bytes: the temporary name must fit too."""
    name = "\u20ac" * 85
    names.make_file(host, str(tmp_path / name), fill, replace=False)
    assert os.listdir(tmp_path) == [name]


def test_relative_name_in_the_current_directory(host, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names.make_file(host, "here", fill, replace=False)
    assert names.exists(host, "here")
    names.remove(host, "here")
    assert not names.exists(host, "here")
    assert host.calls[-2:] == ["unlink", "sync directory"]


def test_missing_directory_is_an_error(host, tmp_path):
    with pytest.raises(StorageError) as caught:
        names.make_file(host, str(tmp_path / "gone" / "x"), fill, replace=False)
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("cache", ["none", "writeback", "unsafe"])
@pytest.mark.parametrize("format_", ["add-cow", "cow", "raw"])
def test_name_is_made_durable_when_a_writer_opens_it(host, tmp_path, format_, cache):
    """Whoever gave it last may have been killed before that."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = tmp_path / "disk"
    base = tmp_path / "base"
    base.write_bytes(bytes(8192))
    mmcow.create(path, format=format_, size=8192, backing=None if format_ == "raw" else base)
    (elsewhere / "link").symlink_to(path)
    synced = []
    host.sync_directory = synced.append
    with mmcow.open(elsewhere / "link", host=host):
        assert synced == []
    with mmcow.open(elsewhere / "link", write=True, cache=cache, host=host):
        assert synced == ([] if cache == "unsafe" else [str(tmp_path)])


@pytest.mark.parametrize("code", [errno.EACCES, errno.EINVAL, errno.EIO])
def test_name_in_a_directory_that_cannot_be_synced(host, tmp_path, code):
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))

    def refuse(directory):
        raise StorageError(code, "fsync of the directory", directory)

    host.sync_directory = refuse
    if code != errno.EIO:  # the directory is not ours, or its file system has no such thing
        with mmcow.open(path, write=True, format="raw", host=host) as image:
            image.write(0, b"x")
            image.flush()
        return
    with pytest.raises(StorageError) as caught:
        mmcow.open(path, write=True, format="raw", host=host)
    assert caught.value.errno == code
