"""States, layouts and restore points refuse numbers that no writer writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from leanreplay import Schema
from leanreplay.policies.append import AppendPolicy
from leanreplay.storage.create import plan_file
from leanreplay.storage.layout import H_POLICY, HEADER_WORDS, Layout
from leanreplay.storage.segment import MOST_TAILS, Segment
from leanreplay.storage.state import State


@pytest.fixture
def layout() -> Layout:
    return plan_file("ReservoirBuffer", {}, 5, 0, 0, Schema.from_sample(0))[0]


@pytest.mark.parametrize("word", range(8))
def test_policy_words_out_of_range(layout: Layout, word: int) -> None:
    """Policies take their words as int64: what is beyond would wrap."""
    state = State()
    state.words[H_POLICY + word] = 2**63 - 1
    assert state.problem(layout) is None
    state.words[H_POLICY + word] = 2**63
    assert "out of range" in str(state.problem(layout))


def test_tails_beyond_the_last_number(layout: Layout, tmp_path: Path) -> None:
    """A tail of a number that no writer reaches does not count: the next one's number would not fit."""
    path, beside = str(tmp_path / "b.h5.undo.0"), tmp_path / "b.h5"
    beside.touch()
    state = State()
    state.tag = layout.tag
    state.seal(np.zeros(8 * HEADER_WORDS, np.uint8), 0)
    made = Segment.make(layout, 0, state, path, str(beside))
    for start, whole in ((0, True), (MOST_TAILS - 3, True), (MOST_TAILS - 1, False)):
        made.count = start
        for _ in range(2):
            made.write_tail(state.identity, 0)
        found = Segment.load(layout, 0, path)
        assert (found is not None) == whole, start
        if found is not None:
            found.file.close()
    made.file.close()


def test_rows_of_a_part_are_those_of_its_file() -> None:
    """A part of fewer rows than its file, or of more, is none."""
    params = {"rows_per_part": 4, "first": 8}
    assert AppendPolicy.params_problem(params, 4) is None
    for max_size in (3, 5):
        assert f"in a file of {max_size}" in str(AppendPolicy.params_problem(params, max_size))
