"""Policies of one's own: what works, and that nonsense is stopped before it reaches the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract import assert_samples, digits, logits

import leanreplay
from leanreplay import DataBuffer, Plan, Policy


def feed(buffer: Any, start: int, stop: int) -> None:
    buffer.add(digits(start, stop), metadata={"logits": logits(start, stop)})


def test_an_own_policy(tmp_path: Path) -> None:
    class FirstPolicy(Policy):
        def load(self, positions: Any, groups: Any) -> None:
            self.size = len(positions)

        def plan(self, start: int, groups: Any, max_rows: int) -> Plan:
            rows = np.empty(min(len(groups), max_rows), np.int64)
            for i in range(len(rows)):
                rows[i] = self.size if self.size < self.capacity else -1
                self.size += rows[i] >= 0
            return Plan(rows)

    class FirstBuffer(DataBuffer):
        policy_class = FirstPolicy

    with FirstBuffer(10, tmp_path / "first.h5") as buffer:
        feed(buffer, 0, 25)
    with leanreplay.open(tmp_path / "first.h5", mode="r+") as buffer:
        assert type(buffer) is FirstBuffer
        feed(buffer, 25, 50)
        np.testing.assert_array_equal(buffer.get_metadata("position"), np.arange(10))
        with pytest.raises(leanreplay.LeanReplayError, match="cannot be resized"):
            buffer.resize(5)


def test_a_policy_that_plans_nonsense_is_stopped() -> None:
    class BadPolicy(Policy):
        def load(self, positions: Any, groups: Any) -> None: ...

        def plan(self, start: int, groups: Any, max_rows: int) -> Plan:
            return Plan(np.full(len(groups), self.capacity))  # one past the last

    class BadBuffer(DataBuffer):
        policy_class = BadPolicy

    with BadBuffer(10) as buffer:
        with pytest.raises(leanreplay.ArgumentError, match="from 0 to 9"):
            feed(buffer, 0, 5)
        assert len(buffer) == 0 and buffer.check() == []


@pytest.mark.parametrize("wrong", [3, None, [0], np.zeros(1), np.zeros((1, 1), np.int64), np.arange(4)[::2]], ids=str)
def test_a_policy_that_returns_no_plan_is_stopped(wrong: Any) -> None:
    """Kernels believe what they get: a number, a list, floats, a matrix, and a stride are refused before."""

    class WrongPolicy(Policy):
        def load(self, positions: Any, groups: Any) -> None: ...

        def plan(self, start: int, groups: Any, max_rows: int) -> Any:
            return wrong if wrong is None or isinstance(wrong, int) else Plan(wrong)

    class WrongBuffer(DataBuffer):
        policy_class = WrongPolicy

    with WrongBuffer(10) as buffer:
        with pytest.raises(leanreplay.ArgumentError, match=r"WrongPolicy\.plan (returned|set rows to)"):
            feed(buffer, 0, 5)
        assert len(buffer) == 0 and buffer.check() == []


@pytest.mark.parametrize("slots", [0, 1])
def test_a_policy_that_frees_rows(slots: int) -> None:
    """Without a log the file has no room to undo that: what is not refused is written beyond the journal, or beyond the map."""

    class ClearingPolicy(Policy):
        """Fills up; then every sample leaves the first row alone."""

        log_slots = staticmethod(lambda capacity: slots)

        def load(self, positions: Any, groups: Any) -> None:
            self.live = np.flatnonzero(positions >= 0)

        def plan(self, start: int, groups: Any, max_rows: int) -> Plan:
            freed = self.live[1:] if len(self.live) == self.capacity else np.zeros(0, np.int64)
            rows = np.array([-1 if freed.shape[0] else len(self.live)])
            self.live = np.append(self.live, rows) if rows[0] >= 0 else self.live[:1]
            return Plan(rows, freed)

    class ClearingBuffer(DataBuffer):
        policy_class = ClearingPolicy

    with ClearingBuffer(5000) as buffer:  # rows enough for a write outside to be one beyond the map
        buffer.add(np.zeros((5000, 1), np.uint8))
        if slots:
            buffer.add(np.zeros((1, 1), np.uint8))
        else:
            with pytest.raises(leanreplay.ArgumentError, match="ClearingPolicy frees rows, but its log_slots are 0"):
                buffer.add(np.zeros((1, 1), np.uint8))
        assert (len(buffer), buffer.seen) == ((1, 5001) if slots else (5000, 5000))
        assert buffer.check() == []


def test_a_policy_that_takes_and_frees_rows() -> None:
    """In one commit, without a word for the log, also with restore points: each sample takes a row, and the oldest is given up."""

    class WanderingPolicy(Policy):
        log_slots = staticmethod(lambda capacity: 1)

        def load(self, positions: Any, groups: Any) -> None:
            self.live = np.flatnonzero(positions >= 0)

        def plan(self, start: int, groups: Any, max_rows: int) -> Plan:
            rows = np.array([start % self.capacity])
            freed = self.live[:1] if len(self.live) > 2 else np.zeros(0, np.int64)
            self.live = np.append(self.live[len(freed) :], rows)
            return Plan(rows, freed)

    class WanderingBuffer(DataBuffer):
        policy_class = WanderingPolicy

    def held(buffer: DataBuffer) -> list[tuple[int, int]]:
        assert buffer.check() == []
        rows = buffer.get_metadata("idx")
        assert_samples(*buffer.get(rows))
        return list(zip(rows.tolist(), buffer.get_metadata("position").tolist(), strict=True))

    with WanderingBuffer(10) as buffer:
        states = []
        for step in (6, 2, 1):
            feed(buffer, buffer.seen, buffer.seen + step)
            wanted = sorted((p % 10, p) for p in range(buffer.seen - 3, buffer.seen))
            assert held(buffer) == wanted
            states = [*states, (buffer.state_dict(), wanted)][-2:]
        feed(buffer, 9, 10)
        for state, wanted in reversed(states):
            buffer.load_state_dict(state)
            assert held(buffer) == wanted


@pytest.mark.parametrize(
    "wrong", ["out of range", "below", "far out", "free", "taken", "twice", "a list", "floats", "a matrix", "a stride"]
)
def test_a_policy_that_frees_nonsense_is_stopped(wrong: str) -> None:
    """And the next plan is that of the state before, scratch included."""
    freed: Any = {
        "out of range": [2, 10], "below": [2, -1], "far out": [2**62, 2], "free": [2, 7], "taken": [2, 3], "twice": [2, 2], "a list": [2],
        "floats": [2.0], "a matrix": [[2]], "a stride": [2, 0, 1],
    }[wrong]  # fmt: skip
    freed = freed if wrong == "a list" else np.array(freed)[:: 2 if wrong == "a stride" else 1]
    scratch = []

    class WrongPolicy(Policy):
        log_slots = staticmethod(lambda capacity: 1)

        def load(self, positions: Any, groups: Any) -> None:
            self.size = len(positions)
            scratch.append(self.scratch)

        def plan(self, start: int, groups: Any, max_rows: int) -> Plan:
            self.size += 1
            return Plan(np.array([self.size - 1])) if self.size < 6 else Plan(np.array([3]), freed)

    class WrongBuffer(DataBuffer):
        policy_class = WrongPolicy

    with WrongBuffer(10) as buffer:
        feed(buffer, 0, 5)
        for _ in range(2):
            with pytest.raises(leanreplay.ArgumentError, match=r"WrongPolicy\.plan (set freed to|freed \d rows)"):
                feed(buffer, 5, 6)
            assert (len(buffer), buffer.seen, buffer.check()) == (5, 5, [])
        assert len(scratch) == 2
        assert all(s.shape == (10,) and not s.any() for s in scratch)
        assert_samples(*buffer.get(range(5)))
