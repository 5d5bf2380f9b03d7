# SPDX-License-Identifier: MIT
"""The benchmarks' command lines: help, what is wrong with arguments, and with files."""

from __future__ import annotations

import json
import subprocess

import pytest

from bench import __main__ as everything
from bench import cluster_size, inside, report
from bench.common import save

COMMANDS = {
    "bench": everything.main,
    "bench.report": report.main,
    "bench.cluster_size": cluster_size.main,
    "bench.inside": inside.main,
}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Nothing is measured, nothing written elsewhere: no test may get so far."""

    def started(*_words, **_options):
        raise AssertionError("a program was started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", started)
    (tmp_path / "file").touch()


def said(capsys, main, *words):
    """Status, and what went to the two streams."""
    try:
        status = main(list(words))
    except SystemExit as ended:  # argparse does
        status = ended.code
    return status, *capsys.readouterr()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help(capsys, name):
    status, out, err = said(capsys, COMMANDS[name], "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: python -m {name} ")


@pytest.mark.parametrize(
    ("name", "words", "text"),
    [
        ("bench", ["--repeats", "4"], "--repeats: '4' is no whole number of at least 5"),
        ("bench", ["--repeats", "0"], "--repeats: '0' is no whole number of at least 5"),
        ("bench", ["--seed", "-1"], "--seed: '-1' is no whole number of at least 0"),
        ("bench", ["--suite", "nbt"], "argument --suite: invalid choice: 'nbt'"),
        ("bench", ["--dir", "none"], "--dir: 'none' does not exist"),
        ("bench", ["--dir", "file"], "--dir: 'file' is no folder"),
        ("bench", ["--cell", "5K*"], "bench: --cell '5K*': no such cell here; --list"),
        ("bench", ["--list", "--cell", "5K*"], "bench: --cell '5K*': no such cell here"),
        ("bench", ["--out", "file"], "bench: [Errno 20] Not a directory: 'file/results'"),
        ("bench", ["more"], "unrecognized arguments: more"),
        ("bench.report", ["none"], "DIR: 'none' does not exist"),
        ("bench.report", ["file"], "DIR: 'file' is no folder"),
        ("bench.report", ["."], ": has no results/*.json"),
        ("bench.report", [""], "DIR: '' is no name"),
        ("bench.report", [".", "."], "unrecognized arguments: ."),
        ("bench.cluster_size", ["--rounds", "0"], "'0' is no whole number of at least 1"),
        ("bench.cluster_size", ["--base-size", "1.5"], "--base-size: '1.5' is no whole number"),
        ("bench.cluster_size", ["--seconds", "nan"], "--seconds: 'nan' is no time in seconds"),
        ("bench.cluster_size", ["--dir", "none"], "--dir: 'none' does not exist"),
        ("bench.inside", [], "arguments are required: WHAT"),
        ("bench.inside", ["extent", "a"], "invalid choice: 'extent'"),
        ("bench.inside", ["extents"], "arguments are required: IMAGE"),
        ("bench.inside", ["extents", "none"], "bench.inside: none: open: No such file"),
        ("bench.inside", ["open", "."], "arguments are required: SIZE"),
        ("bench.inside", ["open", ".", "1G"], "argument SIZE: invalid int value: '1G'"),
        ("bench.inside", ["open", ".", "-5"], "'-5' is no size"),
        ("bench.inside", ["open", "none", "4096"], "No such file or directory: 'none/"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(capsys, name, words, text):
    status, out, err = said(capsys, COMMANDS[name], *words)
    assert status == 2
    assert out == ""
    assert text in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "results/noise.json: is no JSON: "),
        ("[]", "results/noise.json: is no result of a suite: 'suite' is missing or wrong"),
        ('{"suite": 5}', "results/noise.json: is no result of a suite: 'suite' is missing"),
        ('{"suite": "noise"}', "'title' is missing or wrong"),
    ],
)
@pytest.mark.parametrize("name", ["bench", "bench.report"])
def test_damaged_results_are_named_before_anything_is_done(capsys, tmp_path, name, content, text):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "noise.json").write_text(content, encoding="utf-8")
    options = ["--out", "."] if name == "bench" else ["."]
    status, out, err = said(capsys, COMMANDS[name], *options)
    assert (status, out) == (2, "")
    assert err.startswith(f"{name}: ")
    assert text in err
    assert not (tmp_path / "report.md").exists()


def test_report_is_written_where_it_is_told_to(capsys, tmp_path):
    result = {
        "suite": "noise", "title": "Noise", "note": "", "conditions": "none", "parameters": {},
        "host": json.loads((report.HERE / "results" / "noise.json").read_text("utf-8"))["host"],
        "overall": [], "cells": [{"name": "x", "failed": "why"}],
    }  # fmt: skip
    save("noise", result, tmp_path)
    assert said(capsys, report.main, str(tmp_path)) == (0, f"{tmp_path}/report.md\n", "")
    assert "| x | failed: why |" in (tmp_path / "report.md").read_text(encoding="utf-8")
