"""Helpers of kernels, for tests that call them: on their own they are compiled without an entry from Python."""

from __future__ import annotations

import functools
from types import FunctionType, ModuleType
from typing import Any

import pytest

from leanreplay.kernels import checksums, compile_kernel, hashing, heaps, memory


def call_helpers(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put one with an entry in the place of each."""
    for name, value in list(vars(module).items()):
        if getattr(value, "targetoptions", {}).get("no_cpython_wrapper"):
            monkeypatch.setattr(module, name, with_entry(value.py_func))


def as_python(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """Put the Python functions that they are made from in the places of kernels and helpers."""
    for module in {*modules, checksums, hashing, heaps, memory}:
        for name, value in list(vars(module).items()):
            if hasattr(value, "py_func"):
                monkeypatch.setattr(module, name, value.py_func)
            elif name in memory.PLAIN:
                monkeypatch.setattr(module, name, memory.PLAIN[name])


@functools.cache
def with_entry(helper: FunctionType) -> Any:
    return compile_kernel(helper)  # which a cache holds
