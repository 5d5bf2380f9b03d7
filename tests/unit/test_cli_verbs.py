# SPDX-License-Identifier: MIT
"""Every verb but ``io`` and the pictures of ``map``: what it does, says, returns and refuses."""

from __future__ import annotations

import errno
import json
import os

import pytest

import mmcow
from mmcow import errors
from mmcow.cli import exits
from mmcow.cli.check import as_json, status_of
from mmcow.formats.driver import CheckResult, Finding
from mmcow.jobs.check import CheckReport
from tests.unit.test_cli import KIB, MIB, pair, run, template, written  # noqa: F401

pytestmark = pytest.mark.usefixtures("pair")


def content(path, **options):
    with mmcow.open(path, **options) as image:
        return image.read(0, image.size)


# ---- create ----


def test_create_raw_is_the_default_without_a_base(capsys):
    out = run(capsys, "create", "new.raw", "1.5M").out
    assert out == "created new.raw: raw, 1.5 MiB (1572864 bytes)\n"
    assert os.stat("new.raw").st_size == 3 * MIB // 2


def test_create_add_cow_is_the_default_with_a_base(capsys):
    out = run(capsys, "create", "-b", "base.raw", "-F", "raw", "new.acow").out
    assert out == "created new.acow: add-cow, 4 MiB (4194304 bytes), over base.raw (raw)\n"
    with mmcow.open("new.acow") as image:
        assert [layer.format for layer in image.chain] == ["add-cow", "raw"]


def test_create_larger_than_the_base(capsys):
    run(capsys, "create", "-q", "-b", "base.raw", "-F", "raw", "new.acow", "6M")
    assert content("new.acow") == content("base.raw", format="raw") + bytes(2 * MIB)


@pytest.mark.parametrize("options", [["-o", "compat=v7"], ["-o", "cluster_size=4k"],
                                     ["-o", "image_file=else.raw"]])  # fmt: skip
def test_create_with_options(capsys, options):
    run(capsys, "create", "-q", "-f", "add-cow", *options, "new.acow", "1M")
    with mmcow.open("new.acow") as image:
        (layer,) = image.chain
    assert layer.variant == ("v7" if "v7" in options[1] else "v20")
    assert layer.data_file.endswith("else.raw" if "else" in options[1] else "new.acow.raw")


def test_create_takes_size_and_base_as_options_like_qemu_img(capsys):
    words = ["-o", "backing_file=base.raw,backing_fmt=raw", "-o", "size=5M"]
    out = run(capsys, "create", *words, "new.acow").out
    assert out == "created new.acow: add-cow, 5 MiB (5242880 bytes), over base.raw (raw)\n"


def test_create_doubled_comma_is_one(capsys):
    run(capsys, "create", "-q", "-f", "add-cow", "-o", "image_file=a,,b.raw", "new.acow", "1M")
    assert os.path.exists("a,b.raw")


@pytest.mark.parametrize("format_", ["raw", "add-cow", "cow"])
def test_create_options_help(capsys, format_):
    out = run(capsys, "create", "-f", format_, "-o", "help").out
    assert out.startswith((f"options of format {format_}:\n", f"format {format_} has no options"))


def test_create_without_the_format_of_a_raw_base_warns(capsys):
    result = run(capsys, "create", "-b", "base.raw", "new.acow")
    assert result.err == (
        "mmcow: warning: new.acow: the base base.raw is taken and recorded as raw; -F raw says so\n"
    )
    assert "over base.raw (raw)" in result.out


def test_create_without_the_format_of_another_base_is_refused(capsys):
    err = run(capsys, "create", "-b", "top.acow", "new.acow", status=1).err
    assert "new.acow: the base top.acow begins like add-cow: say its format (-F add-cow" in err
    assert not os.path.exists("new.acow")


def test_create_unsafe_does_not_open_the_base(capsys):
    words = ["create", "-q", "-u", "-b", "later.raw"]
    err = run(capsys, *words, "new.acow", "1M", status=1).err
    assert "format must be given" in err
    run(capsys, *words, "-F", "raw", "new.acow", "1M")
    assert '"backing-filename": "later.raw"' in run(capsys, "info", "--output=json", "new.acow").out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["new"], "new: the size of a raw disk must be given"),
        (["new", "1x"], "new: size '1x': must be a number of bytes"),
        (["new", "8E"], "new: size '8E': must be below"),
        (["new", "1.5"], "new: size '1.5': a fraction of a byte"),
        (["--", "new", "-5"], "new: size '-5': must be"),
        (["new", "-5"], "new: size '-5': must be"),
        (["-f", "zip", "new", "1M"], "new: unknown format 'zip'"),
        (["-f", "qcow2", "new", "1M"], "new: format 'qcow2' is not supported yet"),
        (["-f", "raw", "-b", "base.raw", "new"], "new: a raw disk cannot record a base (base.raw)"),
        (["-o", "nosuch=1", "new", "1M"], "new: format raw has no option 'nosuch'"),
        (["-o", "nosuch", "new", "1M"], "-o 'nosuch': must be name=value"),
        (["-o", "size=1M", "new", "2M"], "create: size is given twice: 2M and 1M"),
        (["-F", "raw", "new", "1M"], "create: -F is the format of a base, and there is none"),
        (["-u", "new", "1M"], "create: -u leaves the base unopened, and there is none"),
        (["-b", "nosuch", "new"], "new: nosuch: open: No such file"),
        (["-b", "nosuch", "-F", "raw", "new"], "new: nosuch: open: No such file"),
        (["nosuch/new", "1M"], "nosuch/new: "),
    ],
)
def test_create_refuses(capsys, arguments, text):
    result = run(capsys, "create", *arguments, status=1)
    assert text in result.err
    assert not os.path.exists("new")


# ---- info and probe ----


def test_info_text(capsys):
    lines = run(capsys, "info", "top.acow").out.splitlines()
    assert lines[:3] == [
        "image: top.acow",
        "file format: add-cow (v20)",
        "virtual size: 4 MiB (4194304 bytes)",
    ]
    facts = dict(line.split(": ", 1) for line in lines if ": " in line)
    assert facts["backing file"] == "base.raw"
    assert facts["backing file format"] == "raw"
    assert facts["data file"] == "top.acow.raw"
    assert facts["data file size"].startswith("4 MiB (4194304 bytes), ")
    assert facts["cache mode"].startswith(("none (auto)", "writeback (auto", "auto: none"))
    assert facts["I/O queue"] in ("io_uring", "threads")


def test_info_json_has_the_keys_of_qemu_img(capsys):
    shown = json.loads(run(capsys, "info", "--output=json", "top.acow").out)
    assert shown["filename"] == "top.acow"
    assert shown["format"] == "add-cow"
    assert shown["virtual-size"] == 4 * MIB
    assert shown["actual-size"] == os.stat("top.acow").st_blocks * 512
    assert shown["backing-filename"] == shown["full-backing-filename"] == "base.raw"
    assert shown["backing-filename-format"] == "raw"
    assert shown["dirty-flag"] is False
    assert shown["format-specific"]["type"] == "add-cow"
    data = shown["format-specific"]["data"]
    assert data["compat"] == "v20"
    assert data["data-file"] == "top.acow.raw"
    assert data["data-file-size"] == 4 * MIB
    assert shown["mmcow"]["cache"] in ("none", "writeback", "auto")


def test_info_of_the_chain(capsys):
    shown = json.loads(run(capsys, "info", "--backing-chain", "--output=json", "top.acow").out)
    assert [item["filename"] for item in shown] == ["top.acow", "base.raw"]
    text = run(capsys, "info", "--backing-chain", "top.acow").out
    assert text.count("image: ") == 2
    assert "\n\nimage: base.raw\nfile format: raw\n" in text


def test_info_does_not_need_what_the_image_names(capsys):
    os.unlink("base.raw")
    os.unlink("top.acow.raw")
    out = run(capsys, "info", "top.acow").out
    assert "data file size: missing" in out
    assert "virtual size: unknown" in out
    assert json.loads(run(capsys, "info", "--output=json", "top.acow").out)["virtual-size"] is None
    err = run(capsys, "info", "--backing-chain", "top.acow", status=1).err
    assert err.startswith("mmcow: top.acow: backing file 'base.raw': ")


def test_info_of_an_image_in_another_directory_shows_where_names_lead(capsys, tmp_path):
    os.mkdir("elsewhere")
    os.chdir("elsewhere")
    out = run(capsys, "info", "../top.acow").out
    assert "backing file: base.raw (actual path: ../base.raw)\n" in out
    assert "data file: top.acow.raw (actual path: ../top.acow.raw)\n" in out


def test_info_in_use_needs_force_share(capsys):
    with written("top.acow"):
        err = run(capsys, "info", "top.acow", status=1).err
        assert "this process is using it already" in err
        assert err.endswith("; -U reads it nevertheless\n")
        run(capsys, "info", "-U", "top.acow")


@pytest.mark.parametrize(
    ("arguments", "is_hinted"),
    [
        (["bench", "-c", "1"], True),
        (["bench", "-c", "1", "-w"], False),
        (["bench", "-c", "1", "--mix", "50"], False),
        (["io", "-r", "-c", "read 0 512"], True),
        (["io", "-c", "write 0 512"], False),
        (["check"], True),
        (["check", "-r", "all"], False),
        (["map"], True),
        (["resize"], False),
        (["commit"], False),
        (["stream"], False),
    ],
    ids=str,
)
def test_force_share_is_named_only_to_who_reads(capsys, arguments, is_hinted):
    operands = ["+1M"] if arguments == ["resize"] else []
    with written("top.acow"):
        err = run(capsys, *arguments, "top.acow", *operands, status=1).err
    assert "is using it" in err
    assert ("-U" in err) is is_hinted


def test_probe(capsys):
    with open("other", "wb") as file:
        file.write(b"QFI\xfb\0\0\0\3")
    result = run(capsys, "probe", "base.raw", "top.acow", "other")
    assert result.out == "base.raw: raw\ntop.acow: add-cow\nother: qcow2\n"
    shown = json.loads(run(capsys, "probe", "--output=json", "top.acow").out)
    assert shown == [{"filename": "top.acow", "format": "add-cow"}]
    assert "mmcow: nosuch: open: " in run(capsys, "probe", "nosuch", status=1).err


# ---- check ----


def test_check_of_a_clean_image(capsys):
    out = run(capsys, "check", "top.acow").out
    assert out.startswith("top.acow: no errors\n")
    assert "2 of 64 clusters: 3.12 % allocated, 0.00 % fragmented" in out
    assert run(capsys, "check", "-q", "top.acow").out == ""
    run(capsys, "check", "-r", "all", "top.acow")
    run(capsys, "check", "-U", "top.acow")


def test_check_json(capsys):
    shown = json.loads(run(capsys, "check", "--output=json", "top.acow").out)
    assert shown["filename"] == "top.acow"
    assert shown["format"] == "add-cow"
    assert shown["check-errors"] == 0
    assert shown["total-clusters"] == 64
    assert shown["allocated-clusters"] == 2
    assert shown["image-end-offset"] == os.stat("top.acow").st_size
    assert "leaks" not in shown


def test_check_of_raw_has_a_status_of_its_own(capsys):
    assert "no metadata to check" in run(capsys, "check", "base.raw", status=63).err


def test_check_of_what_cannot_be_opened(capsys):
    run(capsys, "check", "nosuch", status=1)
    with open("cut.acow", "wb") as file:
        file.write(b"ACOW")
    assert "mmcow: cut.acow: " in run(capsys, "check", "cut.acow", status=1).err


def test_check_share_and_repair_exclude_each_other(capsys):
    assert (
        "-r needs the image for itself"
        in run(capsys, "check", "-U", "-r", "all", "top.acow", status=1).err
    )


def report(*findings):
    counts = [
        sum(f.kind == kind and f.fixed is fixed for f in findings)
        for fixed in (False, True)
        for kind in ("corruption", "leak")
    ]
    result = CheckResult(10, 4, 1, 0, 4096, findings)
    return CheckReport("x.acow", "add-cow", result, *counts)


LEAK, CORRUPTION = Finding("leak", "a", fixed=False), Finding("corruption", "b", fixed=False)
FIXED = Finding("leak", "c", fixed=True)


@pytest.mark.parametrize(
    ("findings", "status"),
    [((), 0), ((FIXED,), 0), ((LEAK,), 3), ((CORRUPTION,), 2), ((LEAK, CORRUPTION, FIXED), 2)],
)
def test_check_status_and_report(capsys, monkeypatch, findings, status):
    made = report(*findings)
    assert status_of(made) == status
    shown = as_json(made)
    assert shown.get("leaks", 0) == made.leaks
    assert shown.get("corruptions", 0) == made.corruptions
    assert shown.get("leaks-fixed", 0) == made.leaks_fixed
    monkeypatch.setattr("mmcow.cli.check.check", lambda *_, **__: made)
    out = run(capsys, "check", "x.acow", status=status).out
    for finding in findings:
        assert f"{finding.kind}{' (repaired)' if finding.fixed else ''}: {finding.text}\n" in out
    assert "4 of 10 clusters: 40.00 % allocated, 25.00 % fragmented, 0.00 % compressed" in out


# ---- resize ----


@pytest.mark.parametrize(
    ("arguments", "size"),
    [(["8M"], 8 * MIB), (["+1M"], 5 * MIB), (["--shrink", "-1M"], 3 * MIB),
     (["--shrink", "--", "-1M"], 3 * MIB), (["--shrink", "1M"], MIB), (["4M"], 4 * MIB),
     (["+1"], 4 * MIB + 512)],
)  # fmt: skip
@pytest.mark.parametrize("name", ["base.raw", "top.acow"])
def test_resize(capsys, name, arguments, size):
    option = ["-f", "raw"] if name == "base.raw" else []
    out = (
        run(capsys, "resize", *option, *arguments[:-1], name, arguments[-1]).out
        if ("--" not in arguments)
        else run(capsys, "resize", *option, "--shrink", "--", name, "-1M").out
    )
    assert f"({size} bytes)\n" in out
    with mmcow.open(name, format=option[1] if option else None) as image:
        assert image.size == size


@pytest.mark.parametrize(
    ("size", "text"),
    [("1M", "1 MiB (1048576 bytes) is less than the present 4 MiB"),
     ("-1M", "--shrink does it all the same"),
     ("-4M", "-4M leaves nothing of 4 MiB"),
     ("x", "size 'x': must be"), ("+x", "change of size 'x': must be")],
)  # fmt: skip
def test_resize_refuses(capsys, size, text):
    err = run(capsys, "resize", "top.acow", size, status=1).err
    assert err.startswith("mmcow: top.acow: ")
    assert text in err
    assert content("top.acow") == content("top.acow")


def test_resize_of_cow_is_refused_and_says_why(capsys):
    run(capsys, "create", "-q", "-f", "cow", "a.cow", "1M")
    assert "mmcow: a.cow: " in run(capsys, "resize", "a.cow", "2M", status=1).err


# ---- convert ----


@pytest.mark.parametrize("format_", ["raw", "add-cow", "cow"])
def test_convert_makes_one_image_of_the_chain(capsys, format_):
    words = [] if format_ == "raw" else ["-O", format_]
    assert run(capsys, "convert", *words, "top.acow", "flat").out == ""
    assert content("flat", format=format_) == content("top.acow")
    with mmcow.open("flat", format=format_) as image:
        assert len(image.chain) == 1


def test_convert_to_raw_is_sparse(capsys):
    run(capsys, "convert", "top.acow", "flat")
    assert os.stat("flat").st_blocks * 512 <= (64 + 128 + 1024) * KIB


def test_convert_replaces_a_target(capsys):
    with open("flat", "wb") as file:
        file.write(b"x" * 8 * MIB)
    run(capsys, "convert", "top.acow", "flat")
    assert content("flat", format="raw") == content("top.acow")


def test_convert_adopts_a_data_file_only_by_name(capsys):
    for name in ("new.acow.raw", "other"):
        with open(name, "wb") as file:
            file.write(b"x" * 4 * MIB)
    err = run(capsys, "convert", "-O", "add-cow", "top.acow", "new.acow", status=1).err
    assert "new.acow.raw exists already" in err
    words = ["-o", "image_file=other", "top.acow", "new.acow"]
    run(capsys, "convert", "-O", "add-cow", *words)
    assert content("new.acow") == content("top.acow")


def test_convert_that_fails_keeps_the_old_target(capsys):
    """This test fails and stops conversions to a file that is there, before and in the middle."""
    with open("precious", "wb") as file:
        file.write(b"precious")
    before = sorted(os.listdir())
    run(capsys, "convert", "-t", "bogus", "top.acow", "precious", status=1)
    run(capsys, "convert", "-o", "preallocation=bogus", "top.acow", "precious", status=1)
    assert sorted(os.listdir()) == before
    with open("precious", "rb") as file:
        assert file.read() == b"precious"


def test_convert_keeps_mode_and_link(capsys):
    with open("secret", "wb") as file:
        file.write(b"old")
    os.chmod("secret", 0o600)
    os.symlink("secret", "link")
    run(capsys, "convert", "top.acow", "link")
    assert os.path.islink("link")
    assert os.stat("secret").st_mode & 0o777 == 0o600
    assert content("secret", format="raw") == content("top.acow")
    run(capsys, "create", "-f", "raw", "link", "1M")
    assert os.path.islink("link")
    assert os.stat("secret").st_mode & 0o777 == 0o600
    assert os.path.getsize("secret") == MIB


def test_convert_into_an_existing_image(capsys):
    mmcow.create("other.acow", size=5 * MIB)
    with written("other.acow") as image:
        image.write(0, b"x" * 5 * MIB)
    err = run(capsys, "convert", "-n", "top.acow", "other.acow", status=1).err
    assert "other.acow: begins like add-cow: say what it is (-O add-cow, or -O raw" in err
    run(capsys, "convert", "-n", "-O", "add-cow", "top.acow", "other.acow")
    assert content("other.acow") == content("top.acow") + bytes(MIB)


def test_convert_into_an_existing_raw_disk(capsys):
    with open("other", "wb") as file:
        file.write(b"x" * 4 * MIB)
    assert run(capsys, "convert", "-n", "top.acow", "other").err == ""
    assert content("other", format="raw") == content("top.acow")


def test_convert_into_a_target_in_use_is_refused(capsys):
    mmcow.create("other.raw", format="raw", size=4 * MIB)
    with written("other.raw", format="raw"):
        err = run(capsys, "convert", "top.acow", "other.raw", status=1).err
    assert err.startswith("mmcow: other.raw: ")
    assert "-U" not in err
    assert os.path.exists("other.raw")


def test_convert_into_a_smaller_image_is_refused(capsys):
    mmcow.create("other.raw", format="raw", size=MIB)
    err = run(capsys, "convert", "-n", "-O", "raw", "top.acow", "other.raw", status=1).err
    assert "other.raw: has 1048576 bytes" in err
    assert os.path.exists("other.raw")


@pytest.mark.parametrize("target", ["base.raw", "top.acow", "top.acow.raw", "link"])
@pytest.mark.parametrize("options", [[], ["-n", "-O", "raw"], ["-U"]])
def test_convert_onto_a_file_of_its_own_chain_is_refused(capsys, target, options):
    os.link("base.raw", "link")
    before = content("top.acow")
    err = run(capsys, "convert", *options, "top.acow", target, status=1).err
    assert f"{target}: is a file of the source top.acow" in err
    assert content("top.acow") == before


def test_convert_with_a_data_file_of_its_own_chain_is_refused(capsys):
    words = ["-O", "add-cow", "-o", "image_file=base.raw"]
    err = run(capsys, "convert", *words, "top.acow", "new.acow", status=1).err
    assert "base.raw: is a file of the source" in err
    assert not os.path.exists("new.acow")


@pytest.mark.parametrize(
    "error",
    [
        errors.Cancelled("convert"),
        RuntimeError("bug"),
        errors.StorageError(errno.ENOSPC, "write", "flat", 0, 1),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("format_", ["raw", "add-cow"])
def test_convert_that_fails_removes_what_it_made(capsys, monkeypatch, format_, error):
    def fail(*_, **__):
        raise error

    before = sorted(os.listdir())
    monkeypatch.setattr("mmcow.jobs.convert.convert", fail)
    run(capsys, "convert", "-O", format_, "top.acow", "flat", status=exits.status_of(error))
    assert sorted(os.listdir()) == before


def test_convert_that_fails_leaves_what_was_there(capsys, monkeypatch):
    def fail(*_, **__):
        raise errors.Cancelled("convert")

    monkeypatch.setattr("mmcow.cli.convert.convert", fail)
    mmcow.create("other.raw", format="raw", size=4 * MIB)
    run(capsys, "convert", "-n", "-O", "raw", "top.acow", "other.raw", status=130)
    assert os.path.exists("other.raw")
    monkeypatch.setattr("mmcow.jobs.convert.convert", fail)
    words = ["-o", "image_file=other.raw", "top.acow", "new.acow"]
    run(capsys, "convert", "-O", "add-cow", *words, status=130)
    assert os.path.exists("other.raw")
    assert not os.path.exists("new.acow")
    run(capsys, "convert", "top.acow", "other.raw", status=130)
    assert content("other.raw", format="raw") == bytes(4 * MIB)


def test_convert_options_help(capsys):
    assert "options of format add-cow:" in run(capsys, "convert", "-O", "add-cow", "-o", "help").out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-c", "a", "b"], "-c is not supported: no format that mmcow writes is compressed"),
        (["-B", "x", "a", "b"], "-B is not supported"),
        (["-n", "-o", "a=b", "base.raw", "b"], "-o is for a new target, and -n makes none"),
        (["-O", "zip", "base.raw", "b"], "b: unknown format 'zip'"),
        (["-f", "add-cow", "base.raw", "b"], "mmcow: base.raw: "),
        (["-n", "base.raw", "nosuch"], "mmcow: nosuch: open: No such file"),
        (["-t", "fast", "base.raw", "b"], "b: cache mode 'fast'"),
        (["-T", "fast", "base.raw", "b"], "base.raw: cache mode 'fast'"),
    ],
)
def test_convert_refuses(capsys, arguments, text):
    assert text in run(capsys, "convert", *arguments, status=1).err
    assert not os.path.exists("b")


def test_convert_takes_the_hints_of_qemu_img(capsys):
    run(capsys, "convert", "-m", "16", "-W", "top.acow", "flat")


# ---- compare ----


def test_compare(capsys):
    run(capsys, "convert", "top.acow", "flat")
    words = ["-f", "add-cow", "-F", "raw", "top.acow", "flat"]
    assert run(capsys, "compare", *words).out == "top.acow and flat are identical\n"
    assert run(capsys, "compare", "-q", *words).out == ""
    out = run(capsys, "compare", "top.acow", "base.raw", status=1).out
    assert out == "top.acow and base.raw differ: content mismatch at offset 524288\n"


def test_compare_of_different_sizes(capsys):
    run(capsys, "convert", "-q", "top.acow", "flat")
    run(capsys, "resize", "-q", "-f", "raw", "flat", "+1M")
    result = run(capsys, "compare", "top.acow", "flat")
    assert "warning: the sizes differ: top.acow has 4 MiB (4194304 bytes), flat 5 MiB" in result.err
    assert run(capsys, "compare", "-q", "top.acow", "flat").err == ""
    out = run(capsys, "compare", "-s", "top.acow", "flat", status=1).out
    assert "image size mismatch at offset 4194304" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["nosuch", "base.raw"],
        ["base.raw", "nosuch"],
        ["base.raw"],
        ["-T", "fast", "base.raw", "top.acow"],
    ],
)
def test_compare_that_fails_has_a_status_of_its_own(capsys, arguments):
    run(capsys, "compare", *arguments, status=2)


# ---- commit, stream, detach, rebase ----


def test_commit(capsys):
    before = content("top.acow")
    out = run(capsys, "commit", "top.acow").out
    assert out == "top.acow: 128 KiB (131072 bytes) committed\n"
    assert content("base.raw", format="raw") == before == content("top.acow")
    assert run(capsys, "commit", "-q", "top.acow").out == ""


def test_commit_keeping_the_overlay(capsys):
    run(capsys, "commit", "-q", "-d", "top.acow")
    assert '"allocated-clusters": 2' in run(capsys, "check", "--output=json", "top.acow").out


def test_commit_into_a_deeper_base(capsys):
    mmcow.create("upper.acow", backing="top.acow", backing_format="add-cow")
    with written("upper.acow") as image:
        image.write(0, b"\4" * 64 * KIB)
    before = content("upper.acow")
    run(capsys, "commit", "-q", "-b", "base.raw", "upper.acow")
    assert content("base.raw", format="raw") == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["base.raw"], "base.raw: has no backing file"), (["-b", "nosuch", "top.acow"], "nosuch"),
     (["nosuch"], "nosuch: open: No such"), (["-r", "1M", "top.acow"], "-r is not supported")],
)  # fmt: skip
def test_commit_refuses(capsys, arguments, text):
    assert text in run(capsys, "commit", *arguments, status=1).err


def test_stream_and_detach(capsys):
    before = content("top.acow")
    err = run(capsys, "detach", "top.acow", status=1).err
    assert "top.acow: " in err
    assert "62" in err  # clusters are missing
    out = run(capsys, "stream", "top.acow").out
    assert out.startswith("top.acow: 1.06 MiB (1114112 bytes) copied from below")
    os.unlink("base.raw")
    assert content("top.acow") == before
    assert run(capsys, "stream", "top.acow").out.startswith("top.acow: 0 B (0 bytes) copied")
    assert run(capsys, "detach", "top.acow").out == (
        "top.acow: removed; top.acow.raw is the whole disk, raw\n"
    )
    assert not os.path.exists("top.acow")
    assert content("top.acow.raw", format="raw") == before


def test_rebase_records_another_base_and_data_file(capsys):
    before = content("top.acow")
    os.mkdir("moved")
    os.rename("base.raw", "moved/base.raw")
    os.rename("top.acow.raw", "moved/data")
    out = run(capsys, "rebase", "-u", "-b", "moved/base.raw", "-F", "raw", "top.acow").out
    assert out == (
        "top.acow: base is now moved/base.raw\ntop.acow: format of the base is now raw\n"
    )
    out = run(capsys, "rebase", "-u", "-o", "image_file=moved/data", "top.acow").out
    assert out == "top.acow: data file is now moved/data\n"
    assert content("top.acow") == before


def test_rebase_records_another_format_of_the_base(capsys):
    mmcow.create("upper.acow", backing="top.acow", backing_format="add-cow")
    run(capsys, "rebase", "-q", "-u", "-F", "raw", "upper.acow")
    assert content("upper.acow").startswith(b"ACOW")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-b", "x", "top.acow"], "rebase: only -u is there so far"),
        (["-u", "top.acow"], "rebase: nothing to change; see -b, -F and -o"),
        (["-u", "-o", "size=1", "top.acow"], "rebase: -o takes image_file=NAME, not size"),
        (["-u", "-b", "x", "-F", "raw", "base.raw"], "base.raw: format raw records no names"),
        (["-u", "-b", "x", "-F", "raw", "nosuch"], "nosuch: open: No such file"),
    ],
)
def test_rebase_refuses(capsys, arguments, text):
    assert text in run(capsys, "rebase", *arguments, status=1).err
