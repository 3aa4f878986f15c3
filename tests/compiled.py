"""Helpers of kernels, for tests that call them: on their own they are compiled without an entry from Python."""

from __future__ import annotations

from types import ModuleType

import numba
import pytest


def call_helpers(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put one with an entry in the place of each."""
    for name, value in list(vars(module).items()):
        if name.startswith("_") and hasattr(value, "py_func"):
            monkeypatch.setattr(module, name, numba.njit(nogil=True, error_model="numpy")(value.py_func))
