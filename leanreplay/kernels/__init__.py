"""Numba kernels: plain functions on NumPy arrays. They import nothing else of the library.

Python calls kernels, made by `compile_kernel`. Only kernels call the other functions here:
those made by `helper`, `reordered` and `inlined`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import numba
from numba.core.compiler_lock import global_compiler_lock

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
_HELPER: dict[str, Any] = {**_OPTIONS, "no_cpython_wrapper": True}

if hasattr(os, "register_at_fork"):
    # A child that is forked while another thread compiles would wait for Numba's lock for ever.
    # So a fork waits for the compiler.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


def helper(function: Any) -> Any:
    """Make a function for kernels alone.

    Python cannot call it, and the cache does not hold it: these would be half of its compile time.
    """
    return numba.njit(**_HELPER)(function)


def reordered(function: Any) -> Any:
    """Make a helper whose sums may be added in any order, and whose numbers are never NaN.

    So its loops run in vector registers.
    """
    return numba.njit(**_HELPER, fastmath={"reassoc", "contract", "nnan", "nsz"})(function)


def inlined(function: Any) -> Any:
    """Make a helper that becomes part of its kernel before the kernel is compiled, not after.

    A long helper with a single caller compiles in half the time so.
    """
    return numba.njit(**_HELPER, inline="always")(function)


def compile_kernel(function: Any) -> Any:
    """Make a kernel, or from a helper a kernel of its own. Its first call compiles it.

    Kernels run without the interpreter's lock, divide as NumPy does, and are cached on disk: beside
    the library, or if that folder cannot be written, in the user's folder of caches. Where none can
    be had, kernels work without.
    """
    function = getattr(function, "py_func", function)
    try:
        kernel = numba.njit(cache=True, **_OPTIONS)(function)
        if hasattr(kernel, "_cache"):  # private; and with NUMBA_DISABLE_JIT there is none
            _watch_folder(kernel._cache)
            kernel._cache = _Cache(kernel._cache)
    except (RuntimeError, OSError, ValueError) as error:  # no folder for a cache can be written
        _warn(error)
        kernel = numba.njit(**_OPTIONS)(function)
    compiler: Any = getattr(kernel, "_compiler", None)
    if hasattr(compiler, "compile"):  # private
        compiler.compile = functools.partial(compile_aloud, compiler.compile)
    return kernel


PATIENCE = 1.0  # seconds that kernels compile without a word
_LOG = logging.getLogger("leanreplay")
spent: list[float] = []  # seconds that each kernel took


def compile_aloud(compile_it: Callable[..., Any], *arguments: Any) -> Any:
    """Compile a kernel, under Numba's lock. If it takes long, one line on the log says so.

    Python's garbage collector, which finds nothing but would take a tenth of the time, waits.
    """
    start, collects = time.monotonic(), gc.isenabled()
    timer = threading.Timer(max(0.0, PATIENCE - sum(spent)), tell)
    timer.daemon = True
    with contextlib.suppress(RuntimeError):  # no thread can start
        timer.start()
    gc.disable()
    try:
        return compile_it(*arguments)
    finally:
        if collects:
            gc.enable()
        timer.cancel()
        spent.append(time.monotonic() - start)


@functools.cache
def tell() -> None:
    """Say that kernels are being compiled, once in a process."""
    _LOG.warning("compiling kernels for this processor: this takes some seconds, once; they are kept in Numba's cache")


def _stamp_of(folder: str) -> tuple[tuple[str, int, int], ...]:
    """Return name, time and size of every source file in a folder."""
    with os.scandir(folder) as entries:
        sources = [(e.name, e.stat()) for e in entries if e.name.endswith(".py")]
    return tuple(sorted((name, stat.st_mtime_ns, stat.st_size) for name, stat in sources))


def _watch_folder(cache: Any) -> None:
    """Let a change in any file of this folder void a cached kernel.

    Numba looks at the kernel's own file only, but its helpers stand in others.
    """
    file: Any = getattr(cache, "_cache_file", None)
    if hasattr(file, "_source_stamp"):  # private
        file._source_stamp = (file._source_stamp, _stamp_of(os.path.dirname(__file__)))


class _Cache:
    """Numba's cache of one kernel. Where its files fail, the kernel is compiled; no call fails."""

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
