"""Fixtures that test files of this folder share."""

from __future__ import annotations

import numpy as np
import pytest
from compiled import call_helpers

from leanreplay.kernels import herding, reservoir
from leanreplay.policies import herding as ordering


@pytest.fixture(params=["compiled", "python"])
def run(request, monkeypatch):
    """Run a test with compiled kernels, and with the Python functions that they are made from."""
    if request.param == "python":
        for module, names in ((herding, ("measure", "make_rows", "herd")), (reservoir, ("position_keys",))):
            call_helpers(module, monkeypatch)
            for name in names:
                kernel = getattr(module, name)
                plain = getattr(kernel, "py_func", kernel)

                def quiet(*args, plain=plain):
                    with np.errstate(over="ignore"):  # keys wrap around
                        return plain(*args)

                monkeypatch.setattr(module, name, quiet)


@pytest.fixture(params=["matrix", "vectors"])
def path(request, monkeypatch):
    """Run a test with one matrix of all products, and with the products of one row at a time."""
    if request.param == "vectors":
        monkeypatch.setattr(ordering, "MATRIX_BYTES", 0)
    else:
        monkeypatch.setattr(ordering, "STEPS_PER_MATRIX", 10**9)
