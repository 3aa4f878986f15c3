"""Numba kernels: plain functions on NumPy arrays, which import nothing else of the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def njit(*, cache: bool, **options: Any) -> Callable[[Any], Any]:
    """`numba.njit`, which goes without a cache where no folder for one can be written: Numba itself raises then, at import."""

    def decorate(function: Any) -> Any:
        try:
            return numba.njit(cache=cache, **options)(function)
        except RuntimeError:
            return numba.njit(**options)(function)

    return decorate
