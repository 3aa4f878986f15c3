"""What leaves the repository: the source archive, the wheel, an editable install, and types as a user's checker sees them."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

SCRIPT = ROOT / "tests" / "typing" / "user_script.py"

BUILD = """
import sys
from setuptools import build_meta
(out,) = sys.argv[1:]  # which a build changes
for build in (build_meta.build_sdist, build_meta.build_wheel, build_meta.build_editable):
    build(out)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], zipfile.ZipFile, zipfile.ZipFile]:
    """Names in the source archive, the wheel, and the wheel of an editable install; made of a copy."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("setuptools 77 or later builds this project")
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("only tests are here, no project to build")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("out")
    for name in ("leanreplay", "tests", "examples", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tree)
    ran = subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=tree, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "Deprecat" not in ran.stderr, ran.stderr
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    plain, editable = sorted(out.glob("*.whl"), key=lambda path: "editable" in path.name)
    return names, zipfile.ZipFile(plain), zipfile.ZipFile(editable)


def test_source_archive_is_whole(built: tuple[set[str], zipfile.ZipFile, zipfile.ZipFile]) -> None:
    """Its own tests need their data and helpers, the examples and the benchmarks."""
    wanted = {
        str(path.relative_to(ROOT))
        for folder, endings in (
            ("leanreplay", (".py", ".typed")),
            ("tests", (".py", ".gz", ".md")),
            ("examples", (".py",)),
            ("benchmarks", (".py",)),
        )
        for path in (ROOT / folder).rglob("*")
        if path.suffix in endings and "__pycache__" not in path.parts
    }
    assert len(wanted) > 100 and "tests/data/replay_v1.h5.gz" in wanted
    assert wanted | {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml"} <= built[0]
    assert not [name for name in built[0] if "__pycache__" in name]


def test_wheel_is_typed_and_licensed(built: tuple[set[str], zipfile.ZipFile, zipfile.ZipFile]) -> None:
    names = set(built[1].namelist())
    assert "leanreplay/py.typed" in names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "leanreplay").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}
    text = built[1].read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert "License-Expression: MIT\n" in text and "License-File: LICENSE\n" in text
    assert "Author: " in text and "Keywords: " in text


def test_editable_install_is_a_plain_path(built: tuple[set[str], zipfile.ZipFile, zipfile.ZipFile]) -> None:
    """Editors and type checkers follow a path, and run no import hook."""
    names = [name for name in built[2].namelist() if "dist-info" not in name]
    assert len(names) == 1 and names[0].endswith(".pth"), names
    assert os.path.isdir(built[2].read(names[0]).decode().strip())


def test_all_leaves_open_alone() -> None:
    """After `from leanreplay import *`, `open` is Python's own; `leanreplay.open` is there."""
    names: dict[str, object] = {}
    exec("from leanreplay import *", names)
    assert "open" not in names and "ReservoirBuffer" in names
    import leanreplay

    assert leanreplay.open is leanreplay.buffers.registry.open_buffer


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_types_of_a_users_script(checker: str, tmp_path: Path) -> None:
    """Strictly checked from outside of the project, with none of its settings."""
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    script = shutil.copy(SCRIPT, tmp_path)
    options = ["--strict", "--config-file=", f"--cache-dir={tmp_path / 'cache'}"] if checker == "mypy" else ["--pythonpath", sys.executable]
    command = [sys.executable, "-m", checker, *options, script]
    environment = os.environ | {"MYPYPATH": str(ROOT), "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_users_script_runs() -> None:
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_commits_are_checked_as_in_ci() -> None:
    """The hooks before a commit run the commands of `.ci/run` for lint and types, all of them."""
    hooks, script = ROOT / ".pre-commit-config.yaml", ROOT / ".ci" / "run"
    if not (hooks.exists() and script.exists()):
        pytest.skip("the source archive has neither")
    commands = {line.strip().removeprefix("entry: ") for line in hooks.read_text().splitlines() if "entry:" in line}
    assert commands == {line for line in script.read_text().splitlines() if line.startswith(("ruff", "mypy"))}
