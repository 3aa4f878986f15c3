"""Numba kernels: plain functions on NumPy arrays, which import nothing else of the library."""

from __future__ import annotations

from typing import Any

import numba


def njit(function: Any) -> Any:
    """`numba.njit` as all kernels are compiled: without the interpreter's lock, dividing as NumPy does, cached on disk.

    A helper, with an underscore in front, exists within the kernels that call it alone: an entry from Python and a place in the cache
    would be half of its compile time. Where no folder for a cache can be written, Numba itself raises, at import: then without.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
    if function.__name__.startswith("_"):
        return numba.njit(**options | {"no_cpython_wrapper": True})(function)
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:
        return numba.njit(**options)(function)
