"""Fixtures that test files of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from compiled import as_python, call_helpers

from leanreplay.kernels import balanced, before_images, checksums, commit, greedy, hashing, heaps, memory, merge, reservoir, rows


@pytest.fixture(params=["compiled", "python"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a test with compiled kernels, and with every one of them replaced by the Python function it is made from."""
    if request.param == "compiled":
        for module in (balanced, checksums, greedy, hashing, heaps, memory, reservoir):
            call_helpers(module, monkeypatch)
        yield
        return
    as_python(monkeypatch, balanced, before_images, commit, greedy, merge, reservoir, rows)
    with np.errstate(over="ignore"):  # unsigned words wrap around, as they should
        yield
