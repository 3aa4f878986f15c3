"""`add(..., moved=)`: metadata of samples drawn before, overwritten in the commit that takes the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from storage_kernels import kernel

import leanreplay
from leanreplay.storage import create

KINDS: dict[str, Callable[..., Any]] = {
    "reservoir": lambda path=None: leanreplay.ReservoirBuffer(20, path, seed=3),
    "window": lambda path=None: leanreplay.SlidingWindowBuffer(20, path, seed=3),
    "balanced": lambda path=None: leanreplay.ClassBalancedBuffer(20, path, seed=3),
    "infinite": lambda path=None: leanreplay.InfiniteBuffer(path, rows_per_part=16, seed=3),
}


def batch(start: int, n: int) -> dict[str, Any]:
    p = np.arange(start, start + n)
    data = (p[:, None] * np.ones(9, np.uint8)).astype(np.uint8), p % 3
    return {"batch": data, "metadata": {"age": np.zeros(n, np.int32), "logits": p[:, None] + np.zeros(4, np.float32)}}


def contents(buffer: Any) -> Any:
    rows = buffer.get_metadata("idx")
    (x, y), meta = buffer.get(rows)
    return {int(p): (x[i].tolist(), int(y[i]), int(meta["age"][i]), meta["logits"][i].tolist()) for i, p in enumerate(meta["position"])}


def draw(buffer: Any, n: int) -> tuple[Any, Any, dict[str, Any]]:
    _, meta = buffer.sample(n)
    return meta["idx"], meta["position"], {"logits": meta["logits"] + 1000, "age": meta["age"] + 1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("disk", [False, True])
def test_as_two_calls_would(kind: str, disk: bool, tmp_path: Any) -> None:
    one, two = (KINDS[kind](tmp_path / name if disk else None) for name in ("one", "two"))
    for buffer in (one, two):
        buffer.add(**batch(0, 35))
    for start in range(35, 140, 7):
        moved = draw(one, 6)
        assert [a.tolist() for a in draw(two, 6)[:2]] == [a.tolist() for a in moved[:2]]
        commits = one.current.store.sequence
        one.add(**batch(start, 7), moved=moved)
        if kind != "infinite":
            assert one.current.store.sequence == commits + 1
        for name, values in moved[2].items():
            two.set_metadata(name, values, moved[0], positions=moved[1])
        two.add(**batch(start, 7))
        assert contents(one) == contents(two)
        assert one.check() == two.check() == []
    assert any(age > 0 for _, _, age, _ in contents(one).values())
    one.close(), two.close()


def test_a_row_that_is_replaced_keeps_what_came_with_the_new_sample() -> None:
    buffer = leanreplay.SlidingWindowBuffer(10)
    buffer.add(**batch(0, 10))
    rows, positions = np.arange(10), np.arange(10)
    buffer.add(**batch(10, 4), moved=(rows, positions, {"age": np.arange(100, 110, dtype=np.int32)}))
    assert buffer.get_metadata("age").tolist() == [0] * 4 + list(range(104, 110))
    # Rows that hold others by now are left alone, and of a row given twice the last value counts.
    buffer.add(**batch(14, 0), moved=([0, 5, 5], [0, 5, 5], {"age": np.array([1, 2, 3], np.int32)}))
    assert buffer.get_metadata("age").tolist() == [0] * 4 + [104, 3, *range(106, 110)]
    assert buffer.seen == 14 and buffer.check() == []


def test_not_done_again_for_a_batch_that_was_seen() -> None:
    buffer = leanreplay.SlidingWindowBuffer(10)
    buffer.add(**batch(0, 8))
    buffer.add(**batch(4, 4), at=4, moved=([0], [0], {"age": np.array([7], np.int32)}))
    assert buffer.get_metadata("age").tolist() == [0] * 8


@pytest.mark.parametrize("kind", ["reservoir", "balanced"])
def test_both_or_none_wherever_it_stops(kind: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off before and after each call of a kernel, a buffer holds what it held, or all of both."""
    names, outcomes = ("save_rows", "save_freed", "write_field", "write_index", "seal_block"), set()
    for stop in range(40):
        buffer = KINDS[kind](tmp_path / f"{stop}.h5")
        buffer.add(**batch(0, 35))
        state = buffer.state_dict()
        before, moved = contents(buffer), draw(buffer, 8)
        calls = [0]

        def cut(function: Any, calls: list[int] = calls, stop: int = stop) -> Any:
            def call(*args: Any) -> Any:
                for _ in range(2):
                    calls[0] += 1
                    if calls[0] == stop + 1:
                        raise KeyboardInterrupt
                    if calls[0] % 2:
                        found = function(*args)
                return found

            return call

        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(kernel, name, cut(getattr(kernel, name)))
            try:
                buffer.add(**batch(35, 30), moved=moved)
                done = True
            except KeyboardInterrupt:
                done = False
        found = contents(buffer)
        fresh = KINDS[kind]()
        fresh.add(**batch(0, 35))
        fresh.add(**batch(35, 30), moved=draw(fresh, 8))
        assert found in (before, contents(fresh))
        assert buffer.seen == (35 if found == before else 65)
        assert buffer.check() == []
        outcomes.add((found == before, done))
        buffer.load_state_dict(state)
        assert contents(buffer) == before
        buffer.close()
        if done:
            break
    assert outcomes >= {(True, False), (False, True)}


def test_more_than_half_a_commit_is_a_commit_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(create, "JOURNAL_BYTES", 1500)
    buffer = leanreplay.ReservoirBuffer(100)
    buffer.add(**batch(0, 200))
    assert buffer.current.store.max_rows < 60
    rows, positions = buffer.get_metadata("idx"), buffer.get_metadata("position")
    buffer.add(**batch(200, 50), moved=(rows, positions, {"age": np.arange(100, dtype=np.int32)}))
    held = dict(zip(positions.tolist(), range(100), strict=True))
    for position, (_, _, age, _) in contents(buffer).items():
        assert age == (held[position] if position < 200 else 0)
    assert buffer.check() == []


@pytest.mark.parametrize(
    ("moved", "error"),
    [
        (([0], [0]), leanreplay.ArgumentError),
        (3, leanreplay.ArgumentError),
        (([0], [0], {"nothing": np.zeros(1)}), leanreplay.SchemaError),
        (([0], [0], {"age": np.zeros(1)}), leanreplay.SchemaError),
        (([0, 1], [0, 1], {"age": np.zeros(1, np.int32)}), leanreplay.SchemaError),
        (([0, 1], [0], {"age": np.zeros(2, np.int32)}), leanreplay.SchemaError),
        (([99], [0], {"age": np.zeros(1, np.int32)}), leanreplay.RowError),
        (([-1], [0], {"age": np.zeros(1, np.int32)}), leanreplay.RowError),
    ],
)
def test_refused_as_a_whole(moved: Any, error: type[Exception]) -> None:
    buffer = leanreplay.ReservoirBuffer(20)
    buffer.add(**batch(0, 12))
    before = contents(buffer)
    with pytest.raises(error):
        buffer.add(**batch(12, 5), moved=moved)
    assert buffer.seen == 12 and contents(buffer) == before and buffer.check() == []


def test_nothing_to_move_in_an_empty_buffer() -> None:
    buffer = leanreplay.ReservoirBuffer(20)
    with pytest.raises(leanreplay.RowError, match="empty"):
        buffer.add(**batch(0, 5), moved=([0], [0], {"age": np.zeros(1, np.int32)}))
    assert buffer.seen == 0
