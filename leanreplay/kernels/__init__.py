"""Numba kernels: plain functions on NumPy arrays, which import nothing else of the library."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numba
from numba.core.compiler_lock import global_compiler_lock

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}

if hasattr(os, "register_at_fork"):
    # A child that is forked while another thread compiles would wait for Numba's lock for ever. So a fork waits for the compiler.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


def njit(function: Any) -> Any:
    """`numba.njit` as all kernels are compiled: without the interpreter's lock, dividing as NumPy does, cached on disk.

    A name with an underscore in front makes it a helper. Where a cache cannot be had, kernels work without.
    """
    return helper(function) if function.__name__.startswith("_") else entry(function)


def helper(function: Any) -> Any:
    """A function for kernels alone. It has no entry from Python and no place in the cache, which would be half of its compile time."""
    return numba.njit(**_OPTIONS, no_cpython_wrapper=True)(function)  # type: ignore[call-overload]


def reordered(function: Any) -> Any:
    """A helper whose sums may be added up in any order, and whose numbers are no NaN: so they run in vector registers."""
    loose = {"reassoc", "contract", "nnan", "nsz"}
    return numba.njit(**_OPTIONS, no_cpython_wrapper=True, fastmath=loose)(function)  # type: ignore[call-overload]


def inlined(function: Any) -> Any:
    """A helper that becomes part of the kernel before that is compiled, not after: for a long one with a single caller, half the time."""
    return numba.njit(**_OPTIONS, no_cpython_wrapper=True, inline="always")(function)  # type: ignore[call-overload]


def entry(helper: Any) -> Any:
    """A helper as a kernel of its own, for callers that want it alone; those that never do, never compile it."""
    function = getattr(helper, "py_func", helper)
    try:
        kernel = numba.njit(cache=True, **_OPTIONS)(function)
        if hasattr(kernel, "_cache"):  # private; and with NUMBA_DISABLE_JIT there is none
            _watch_folder(kernel._cache)
            kernel._cache = _Cache(kernel._cache)
        return kernel
    except (RuntimeError, OSError, ValueError) as error:  # no folder for a cache can be written
        _warn(error)
        return numba.njit(**_OPTIONS)(function)


def _stamp_of(folder: str) -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of every source file in a folder."""
    with os.scandir(folder) as entries:
        found = [(e.name, e.stat().st_mtime_ns, e.stat().st_size) for e in entries if e.name.endswith(".py")]
    return tuple(sorted(found))


def _watch_folder(cache: Any) -> None:
    """Let a change in any file of this folder void a cached kernel: Numba looks at the kernel's own file, but helpers stand in others."""
    file: Any = getattr(cache, "_cache_file", None)
    if hasattr(file, "_source_stamp"):  # private
        file._source_stamp = (file._source_stamp, _stamp_of(os.path.dirname(__file__)))


class _Cache:
    """Numba's cache of one kernel. What goes wrong with its files, at the kernel's first call, ends nothing: then it is compiled."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def load_overload(self, *arguments: Any) -> Any:
        try:
            return self._cache.load_overload(*arguments)
        except Exception:  # a damaged file can raise anything
            return None

    def save_overload(self, *arguments: Any) -> None:
        try:
            try:
                self._cache.save_overload(*arguments)
            except OSError:
                raise
            except Exception:  # a damaged index, which Numba would read before each write
                self._cache.flush()
                self._cache.save_overload(*arguments)
        except Exception as error:
            _warn(error)


_warned: list[Exception] = []


def _warn(error: Exception) -> None:
    """Say once why kernels are not cached."""
    if not _warned:
        _warned.append(error)
        text = f"Numba cannot keep compiled kernels ({error}), so every process compiles them again, which takes seconds to minutes"
        warnings.warn(f"{text}; set NUMBA_CACHE_DIR to a folder with free space that can be written", stacklevel=3)
