"""The kernels that `storage` calls, as one namespace for tests that replace them."""

from __future__ import annotations

from typing import Any

from leanreplay.kernels import before_images, checksums, commit, memory, rows

MODULES = (before_images, checksums, commit, rows)
FILES = tuple(module.__file__ for module in (memory, *MODULES))


_REAL = {name: value for module in MODULES for name, value in vars(module).items() if callable(value)}


class _Kernels:
    def __getattr__(self, name: str) -> Any:
        for module in MODULES:
            if name in vars(module):
                return vars(module)[name]
        raise AttributeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Replace a kernel wherever it can be called from."""
        getattr(self, name)
        for module in MODULES:
            if name in vars(module):
                setattr(module, name, value)

    def __delattr__(self, name: str) -> None:
        """Put the kernel back. (This is how pytest undoes what it patched.)"""
        setattr(self, name, _REAL[name])


kernel = _Kernels()
