"""Fixtures that test files of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from compiled import as_python, call_helpers

from leanreplay.kernels import balance, balanced, hashing, merge, reservoir, rows


@pytest.fixture(params=["compiled", "python"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a test with compiled kernels, and with every one of them replaced by the Python function it is made from."""
    if request.param == "compiled":
        for module in (balance, balanced, hashing, reservoir, rows):
            call_helpers(module, monkeypatch)
        yield
        return
    as_python(monkeypatch, balance, balanced, merge, reservoir, rows)
    for name, function in rows.PLAIN.items():
        monkeypatch.setattr(rows, name, function)
    with np.errstate(over="ignore"):  # unsigned words wrap around, as they should
        yield
