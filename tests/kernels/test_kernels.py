"""Kernels as a whole: each has a test, and each works with other settings of Numba."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from paths import ROOT, TESTS

from leanreplay import kernels
from leanreplay.kernels import memory


def test_every_kernel_is_tested() -> None:
    """A new kernel needs a test that calls it, here or in another file."""
    text = "".join(file.read_text(encoding="utf-8") for file in TESTS.rglob("test_*.py"))
    names = [m.name for m in pkgutil.iter_modules(kernels.__path__)]
    assert {"balanced", "before_images", "checksums", "commit", "greedy", "merge", "reservoir", "rows"} <= set(names)
    for module in names:
        for name in public_kernels(importlib.import_module(f"{kernels.__name__}.{module}")):
            assert re.search(rf"\b{module}\.{name}\(", text), f"{module}.{name} has no test"


def public_kernels(module: ModuleType) -> list[str]:
    """Kernels and helpers of a module; the machine instructions of `memory` are tested by what calls them."""
    found = [
        n
        for n, v in vars(module).items()
        if not n.startswith("_") and getattr(v, "__module__", "") == module.__name__ and n not in memory.PLAIN
    ]
    assert found
    return found


def test_kernel_tests_without_jit() -> None:
    """The tests of single kernels, as plain Python, hold with NUMBA_DISABLE_JIT=1 as well."""
    files = sorted(map(str, Path(__file__).parent.glob("test_*_kernels.py")))
    assert len(files) == 3
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "-k",
        "python and (reservoir or greedy or balanced or freed or log or journal or scan)",
    ]
    done = subprocess.run(
        [*command, *files],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "......" in done.stdout


@pytest.fixture
def library(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Settings under which a copy of the library is imported, and no folder can hold a cache: files stand in their places."""

    def make() -> dict[str, str]:
        copy = tmp_path / "library" / "leanreplay"
        shutil.copytree(ROOT / "leanreplay", copy, ignore=shutil.ignore_patterns("__pycache__"))
        blocked = tmp_path / "a file"
        blocked.touch()
        (copy / "kernels" / "__pycache__").touch()
        places = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"), str(blocked))
        return {**places, "PYTHONPATH": str(copy.parent), "PYTHONDONTWRITEBYTECODE": "1", "EXPECTED": str(copy), "NUMBA_OPT": "0"}

    return make


def test_no_folder_for_a_cache(library: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    """Where Numba finds no folder that it may write its cache to, the library compiles anew, and works."""
    settings = library()
    command = (
        "import os, numpy as np, leanreplay as lr; assert lr.__file__.startswith(os.environ['EXPECTED']), lr.__file__;"
        "from leanreplay.kernels import checksums; mem, words = np.zeros(64, np.uint8), np.arange(8, dtype=np.uint64);"
        "checksums.seal_block(mem, 0, words, 0); print(checksums.read_block(mem, 0, np.zeros(8, np.uint64)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], env={**os.environ, **settings}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "True\n"
