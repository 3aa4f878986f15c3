"""Fixtures that several files of this folder use."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
import warnings

import grouped_killing
import killing
import pytest
import refusing
from stored_files import GROUPED, write_stored_file


@pytest.fixture(scope="module")
def kill_kernels() -> None:
    """Compile all kernels once, before any fork."""
    for kind, make in killing.KINDS.items():
        with tempfile.TemporaryDirectory() as folder, make(os.path.join(folder, "b.h5")) as buffer:
            killing.feed(buffer, 0, 90)
            state = buffer.state_dict()
            killing.feed(buffer, 90, 180)
            buffer.load_state_dict(state)
            buffer.sample(3)
            killing.assert_prefix(kind, buffer, "warm-up")


@pytest.fixture(scope="module")
def grouped_kernels() -> None:
    """Compile all kernels of grouped buffers once, before any fork."""
    for kind, make in grouped_killing.KINDS.items():
        with tempfile.TemporaryDirectory() as folder, make(os.path.join(folder, "b.h5")) as buffer:
            grouped_killing.feed(kind, buffer, 0, 60)
            state = buffer.state_dict()
            grouped_killing.feed(kind, buffer, 60, 120)
            buffer.load_state_dict(state)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                buffer.resize(10)
                buffer.resize(grouped_killing.ROWS)
            buffer.sample(3)


@pytest.fixture
def all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(killing, "Steps", grouped_killing.AllSteps)


@pytest.fixture(params=["memory", "disk"])
def buffer(request, tmp_path):
    with refusing.make(None if request.param == "memory" else tmp_path / "replay.h5") as made:
        yield made


@pytest.fixture
def grouped(tmp_path):
    """A copy of the file of version 1 with groups."""
    assert os.path.getsize(GROUPED) < 60_000
    path = str(tmp_path / "grouped.h5")
    with gzip.open(GROUPED) as packed, open(path, "wb") as file:
        shutil.copyfileobj(packed, file)
    return path


@pytest.fixture
def path(tmp_path):
    made = str(tmp_path / "replay.h5")
    write_stored_file(made)
    return made
