"""Numba kernels: plain functions on NumPy arrays, which import nothing else of the library."""

from __future__ import annotations

from typing import Any

import numba

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}


def njit(function: Any) -> Any:
    """`numba.njit` as all kernels are compiled: without the interpreter's lock, dividing as NumPy does, cached on disk.

    A helper, with an underscore in front, exists within the kernels that call it alone: an entry from Python and a place in the cache
    would be half of its compile time. Where no folder for a cache can be written, Numba itself raises, at import: then without.
    """
    if function.__name__.startswith("_"):
        return numba.njit(**_OPTIONS, no_cpython_wrapper=True)(function)  # type: ignore[call-overload]
    return entry(function)


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
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:
        return numba.njit(**_OPTIONS)(function)
