"""Helpers of kernels, for tests that call them: on their own they are compiled without an entry from Python."""

from __future__ import annotations

import functools
from types import FunctionType, ModuleType
from typing import Any

import numba
import pytest


def call_helpers(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put one with an entry in the place of each."""
    for name, value in list(vars(module).items()):
        if name.startswith("_") and hasattr(value, "py_func"):
            monkeypatch.setattr(module, name, with_entry(value.py_func))


@functools.cache
def with_entry(helper: FunctionType) -> Any:
    return numba.njit(nogil=True, error_model="numpy")(helper)
