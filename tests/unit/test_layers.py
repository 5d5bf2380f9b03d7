# SPDX-License-Identifier: MIT
"""Who may import whom, and the rules of style that a linter does not know."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mmcow"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "_mmc.py")
TESTS = sorted((ROOT / "tests").rglob("*.py"))
LINES_MOST = 700
FUNCTION_MOST = 70

# Imports go to lower numbers, or stay inside a rank that allows it.
RANKS = [
    ("mmcow.errors", 0), ("mmcow.ranges", 0), ("mmcow.records", 0), ("mmcow._mmc", 0),
    ("mmcow.tasks", 1), ("mmcow.native", 1),
    ("mmcow.storage", 2),
    ("mmcow.formats", 3),
    ("mmcow.chain", 4), ("mmcow.engine", 4),
    ("mmcow.image", 5),
    ("mmcow.aio", 6), ("mmcow.jobs", 7),
    ("mmcow.nbd", 8),
    ("mmcow.serving", 9),
    ("mmcow.cli", 10),
    ("mmcow.__main__", 11),
]  # fmt: skip
# Within a rank: packages may import their own modules.
PUBLIC = "mmcow"


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rank_of(module: str) -> tuple[int, str]:
    for prefix, rank in RANKS:
        if module == prefix or module.startswith(prefix + "."):
            return rank, prefix
    raise AssertionError(f"{module} has no rank: add it to RANKS in {Path(__file__).name}")


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import of mmcow, those for types included."""
    found = []
    known = {name_of(p) for p in MODULES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names if a.name.split(".")[0] == "mmcow"]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module.split(".")[0] == "mmcow":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    found.append((node.lineno, inner if inner in known else node.module))
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path}:{node.lineno}: relative import")
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_strictly_downward(path):
    me = name_of(path)
    if me == PUBLIC:
        return  # it only hands public names on
    rank, prefix = rank_of(me)
    for line, module in imports_of(path):
        if module == PUBLIC:
            # The public names are for users; the version is the one thing that lives there.
            assert rank >= 7, f"{path}:{line}: {me} imports the public package"
            continue
        other, other_prefix = rank_of(module)
        assert other < rank or other_prefix == prefix, (
            f"{path.name}:{line}: {me} (rank {rank}) imports {module} (rank {other})"
        )


def test_every_module_has_a_rank():
    for path in MODULES:
        if name_of(path) != PUBLIC:
            rank_of(name_of(path))


# ---- banned ---------------------------------------------------------------------------------

# (what, where it is allowed, what to use instead)
BANNED_CALLS = [
    ("print", ("mmcow/cli/",), "cli prints, everything else raises or returns"),
    ("struct.pack_into", (), "the window's store: pack_into zeroes its target first"),
    ("os.pwrite", ("mmcow/storage/", "mmcow/native.py"), "a Handle or the queue"),
    ("os.pread", ("mmcow/storage/", "mmcow/native.py"), "a Handle or the queue"),
    ("os.preadv", ("mmcow/storage/", "mmcow/native.py"), "a Handle or the queue"),
    ("os.pwritev", ("mmcow/storage/", "mmcow/native.py"), "a Handle or the queue"),
    ("os.ftruncate", ("mmcow/storage/",), "Handle.truncate"),
    ("os.fsync", ("mmcow/storage/",), "Handle.sync"),
    ("os.fdatasync", ("mmcow/storage/",), "Handle.datasync or File.sync"),
    ("os.rename", ("mmcow/storage/",), "storage.names"),
    # Sockets, and a copy that failed, need not be removed durably.
    ("os.unlink", ("mmcow/storage/", "mmcow/nbd/", "mmcow/cli/convert.py"), "storage.names.remove"),
    ("fcntl.fcntl", ("mmcow/storage/locks.py",), "storage.locks"),
    ("fcntl.flock", (), "storage.locks: the world's tools use byte locks"),
    ("self._transport.writelines", (), "write of what is joined (CVE-2024-12254)"),
    ("eval", (), "nothing"),
    ("exec", (), "nothing"),
]
BANNED_IMPORTS = [
    ("mmap", (), "the C helper's view: an index into a cut file is a SIGBUS"),
    ("mmcow._mmc", ("mmcow/native.py",), "mmcow.native"),
    ("fcntl", ("mmcow/storage/", "mmcow/cli/", "mmcow/nbd/peers.py"), "storage.locks"),
    ("subprocess", (), "nothing: mmcow starts no programs"),
]


def called(node: ast.Call) -> str:
    try:
        return ast.unparse(node.func)
    except ValueError:
        return ""


def allowed(path: Path, places: tuple[str, ...]) -> bool:
    return str(path.relative_to(ROOT)).startswith(places) if places else False


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_banned_is_called_or_imported(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for name, places, instead in BANNED_CALLS:
                assert called(node) != name or allowed(path, places), (
                    f"{path.name}:{node.lineno}: {name}: use {instead}"
                )
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        for module in modules:
            for name, places, instead in BANNED_IMPORTS:
                assert module != name or allowed(path, places), (
                    f"{path.name}:{node.lineno}: import {name}: use {instead}"
                )
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), (
            f"{path.name}:{node.lineno}: a bare except"
        )


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_assertions_have_no_side_effects(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assert):
            inside = list(ast.walk(node))
            bad = (ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)
            assert not any(isinstance(part, bad) for part in inside), f"{path}:{node.lineno}"


# ---- size -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_and_functions_stay_readable(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES_MOST
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= FUNCTION_MOST, f"{path.name}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_say_what_they_own(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# SPDX-License-Identifier: MIT\n")
    if path.name == "__init__.py" and len(text.splitlines()) < 4:
        return
    assert ast.get_docstring(ast.parse(text)), "a module begins with what it owns"


# ---- the C helper ---------------------------------------------------------------------------

FORMAT_WORDS = re.compile(
    r"add.?cow|\bcow\b|qcow|vhdx|\bACOW\b|\bOOOM\b|\bMOOO\b|\bUML\b", re.IGNORECASE
)


def test_no_format_is_named_in_the_c_helper():
    for path in sorted((ROOT / "csrc").glob("*.[ch]")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found = FORMAT_WORDS.search(line)
            assert not found, f"{path.name}:{number}: {found and found[0]}"


# ---- texts ----------------------------------------------------------------------------------

TEXTS = {".py", ".c", ".h", ".md", ".toml", ".sh", ".yml", ".cfg", ""}
SKIPPED = {".git", ".venv", "build", "__pycache__", "mmcow.egg-info", ".hypothesis",
           ".mypy_cache", ".ruff_cache", ".pytest_cache", "node_modules"}  # fmt: skip
# Paths that belong to one machine or one person.
MACHINE = re.compile(r"/(?:home|Users)/[A-Za-z0-9_]+/|/root/|\bfile:///|/workspace/")


def texts() -> list[Path]:
    found = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if SKIPPED & set(parts) or not path.is_file() or path.suffix not in TEXTS:
            continue
        if path.name.startswith("_mmc") or path == Path(__file__).resolve():
            continue
        if path.stat().st_size < 2_000_000:
            found.append(path)
    return found


def test_no_text_names_a_path_of_one_machine():
    for path in texts():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, 1):
            found = MACHINE.search(line)
            assert not found, f"{path.relative_to(ROOT)}:{number}: {found and found[0]}"


def test_no_fixme_is_left():
    word = "FIX" + "ME"
    for path in MODULES + TESTS:
        if path == Path(__file__).resolve():
            continue
        assert word not in path.read_text(encoding="utf-8"), path


# ---- tests ----------------------------------------------------------------------------------


def test_unit_tests_start_no_programs():
    for path in sorted((ROOT / "tests" / "unit").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = called(node)
                assert name not in ("os.system", "os.popen", "os.posix_spawn"), path
                starts = name.startswith("subprocess.")
                # mmcow itself, by the interpreter that runs the tests, is no other program.
                own = "sys.executable" in ast.unparse(node)
                assert not starts or own, f"{path.name}:{node.lineno}: {name}"
