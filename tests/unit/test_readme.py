# SPDX-License-Identifier: MIT
"""Every Python snippet of the documentation runs, in order, in a directory of its own."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import mmcow

ROOT = Path(__file__).resolve().parents[2]
PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if p.exists()]
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets(page: Path) -> list[tuple[int, str]]:
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(1)) + 1, m[1]) for m in SNIPPET.finditer(text)]


WITH_SNIPPETS = [page for page in PAGES if snippets(page)]


@pytest.mark.skipif(not WITH_SNIPPETS, reason="no page has a Python snippet yet")
@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=lambda page: page.name)
def test_snippets_of_a_page_run(page, tmp_path, monkeypatch):
    """This test runs each snippet in a directory of its own, which has what the page has made by
    then: a base, and an overlay over it."""
    for line, code in snippets(page):
        directory = tmp_path / f"line-{line}"
        directory.mkdir()
        monkeypatch.chdir(directory)
        Path("base.img").write_bytes(bytes(range(256)) * (4 << 12))
        os.truncate("base.img", 64 << 20)
        if 'create("disk.acow"' not in code:
            mmcow.create("disk.acow", backing="base.img", backing_format="raw")
        # Empty lines first, so that a traceback names the line of the page.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), {"__name__": "__main__"})


def test_readme_shows_python():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not written yet")
    assert snippets(readme), "README.md shows no Python"
