"""Fixtures that test files of this folder share."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest
from beside import GROUPED, KINDS, feed, feed_groups


@pytest.fixture(scope="module")
def shared_kernels() -> None:
    """Compile all kernels once, before any fork."""
    for make in KINDS.values():
        with tempfile.TemporaryDirectory() as folder, make(os.path.join(folder, "b.h5")) as buffer:
            feed(buffer, 150)
            state = buffer.state_dict()
            feed(buffer, 200)
            buffer.load_state_dict(state)
            buffer.sample(3)
            assert buffer.check() == []
    for make in GROUPED.values():
        with tempfile.TemporaryDirectory() as folder, make(os.path.join(folder, "b.h5")) as buffer:
            feed_groups(buffer, 150)
            state = buffer.state_dict()
            feed_groups(buffer, 200)
            buffer.load_state_dict(state)
            buffer.group_sizes()


@pytest.fixture
def path(tmp_path: Any) -> str:
    return str(tmp_path / "b.h5")
