"""Numba's cache of compiled kernels: what is wrong with its disk or its files ends no call."""

from __future__ import annotations

import errno
import gc
import logging
import os
import pathlib
import shutil
import sys
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest

from leanreplay import kernels

pytestmark = pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="nothing is compiled")


@pytest.fixture
def make(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Makes a small kernel whose cache is in tmp_path, anew each time as in another process."""
    source = tmp_path / "source.py"
    source.write_text("def double(a):\n    return 2 * a[0]\n")
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "_warned", [])
    monkeypatch.setitem(sys.modules, "source", types.ModuleType("source"))  # which Numba imports when it loads a kernel

    def made() -> Any:
        space: dict[str, Any] = {"__name__": "source"}
        exec(compile(source.read_text(), str(source), "exec"), space)
        return kernels.compile_kernel(space["double"])

    return made


def call(kernel: Any) -> list[str]:
    """Call it; the warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert kernel(np.array([21])) == 42
    return [str(w.message) for w in seen]


def files(tmp_path: Any, ending: str) -> list[pathlib.Path]:
    return sorted((tmp_path / "cache").rglob(f"*{ending}"))


def test_a_kernel_is_cached(make: Callable[[], Any], tmp_path: Any) -> None:
    assert call(make()) == []
    again = make()
    assert call(again) == []
    assert sum(again.stats.cache_hits.values()) == 1
    assert str(tmp_path) in again.stats.cache_path


def test_a_helper_that_changed(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is compiled anew when another file of the kernels' folder changed: a helper of its may stand there."""
    call(make())
    real = kernels._stamp_of
    monkeypatch.setattr(kernels, "_stamp_of", lambda folder: (*real(folder), ("hashing.py", 1, 2)))
    changed = make()
    call(changed)
    assert sum(changed.stats.cache_hits.values()) == 0
    again = make()
    call(again)
    assert sum(again.stats.cache_hits.values()) == 1


def test_every_kernel_file_is_watched() -> None:
    folder = os.path.dirname(kernels.__file__)
    assert {name for name, _, _ in kernels._stamp_of(folder)} == {n for n in os.listdir(folder) if n.endswith(".py")}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_disk_that_takes_nothing(number: int, make: Callable[[], Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk of the cache is full or read-only: kernels work, and one warning says why starts are slow, for all of them."""
    first, second = make(), make()
    real = os.replace

    def replace(old: Any, new: Any, **options: Any) -> None:
        if str(new).startswith(str(tmp_path)):
            raise OSError(number, os.strerror(number), str(new))
        real(old, new, **options)

    monkeypatch.setattr(os, "replace", replace)
    (told,) = call(first)
    assert os.strerror(number) in told
    assert "NUMBA_CACHE_DIR" in told
    assert call(second) == []
    assert files(tmp_path, "") == [d for d in files(tmp_path, "") if d.is_dir()]


def test_a_folder_that_goes(make: Callable[[], Any], tmp_path: Any) -> None:
    """What was a folder at import is a file at the first call."""
    kernel = make()
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").touch()
    assert len(call(kernel)) == 1
    (tmp_path / "cache").unlink()
    assert call(make()) == []


@pytest.mark.parametrize("ending", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "folder"])
def test_damaged_files(ending: str, damage: str, make: Callable[[], Any], tmp_path: Any) -> None:
    """A file of the cache is damaged: the kernel is compiled, and what can be written anew is, without a word."""
    assert call(make()) == []
    (path,) = files(tmp_path, ending)
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "garbage": b"\x80\x04garbage" + data[8:]}[damage])
    told = call(make())
    assert len(told) == (damage == "folder")
    if damage != "folder":
        again = make()
        assert call(again) == []
        assert sum(again.stats.cache_hits.values()) == 1


def test_a_package_that_cannot_be_written(make: Callable[[], Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the source takes no cache: the user's folder of caches does, without a word."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "__pycache__").touch()  # so that no folder can be made of this name, by root neither
    assert call(make()) == []
    again = make()
    assert call(again) == []
    assert sum(again.stats.cache_hits.values()) == 1
    assert again.stats.cache_path.startswith(str(tmp_path / "home"))


def test_compiling_for_long_is_told_once(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """While it lasts, not afterwards; what is quick is not told. The garbage collector rests meanwhile."""
    told, lines = threading.Event(), []

    def note(record: logging.LogRecord) -> bool:
        lines.append(record.getMessage())
        told.set()
        return True

    def slow() -> int:
        assert not gc.isenabled() and told.wait(60)
        return 1

    monkeypatch.setattr(kernels, "spent", [])
    kernels.tell.cache_clear()
    logging.getLogger("leanreplay").addFilter(note)
    try:
        monkeypatch.setattr(kernels, "PATIENCE", 60)
        assert call(make()) == []
        assert len(kernels.spent) == 1 and lines == [] and gc.isenabled()
        monkeypatch.setattr(kernels, "PATIENCE", 0)
        assert kernels.compile_aloud(slow) == kernels.compile_aloud(slow) == 1
        assert gc.isenabled()
    finally:
        logging.getLogger("leanreplay").removeFilter(note)
    (line,) = lines
    assert "compiling kernels" in line


def test_no_cache_at_all(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba refuses when a kernel is made: no folder can be written."""
    real = numba.njit

    def njit(*arguments: Any, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function 'double': no locator available")
        return real(*arguments, **options)

    monkeypatch.setattr(numba, "njit", njit)
    with pytest.warns(UserWarning, match="NUMBA_CACHE_DIR"):
        kernel = make()
    assert call(kernel) == []
