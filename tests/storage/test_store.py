"""What every store answers: one file, in memory or on disk, and a folder of parts; as a writer and as a reader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import leanreplay
from leanreplay import InfiniteBuffer, ModeError, RowError, SlidingWindowBuffer, StateError
from leanreplay.storage.store import Change, EmptyStore, MetadataUpdate

N = 50
PLACES = ("memory", "file", "folder", "folder in memory")


def stream(start: int, stop: int) -> Any:
    p = np.arange(start, stop)
    return (np.stack([p * 3, p * 5, p * 7], 1).astype(np.uint8), p % 4)


def make(place: str, path: Path) -> Any:
    """A buffer that keeps all: sample p stands in row p."""
    where = None if "memory" in place else path
    return InfiniteBuffer(where, rows_per_part=16) if "folder" in place else SlidingWindowBuffer(64, where)


def feed(buffer: Any, start: int, stop: int) -> None:
    buffer.add(stream(start, stop), metadata={"z": np.arange(start, stop)})


def store_of(buffer: Any) -> Any:
    return buffer.current.store


@pytest.fixture(params=PLACES)
def buffer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    with make(request.param, tmp_path / "b") as made:
        feed(made, 0, N)
        yield made


def answers(store: Any) -> list[Any]:
    """All that a store says of what it holds."""
    rows = np.arange(N)
    arrays, index = store.read(rows)
    one, _ = store.read(rows[::-1].copy(), 1)
    positions, tags = store.index()
    pieces = list(store.pieces())
    picked = store.pick_live(7, lambda among, out: out.__setitem__(slice(None), np.arange(out.shape[0]) * 3 % among))
    some = store.snapshot(np.array([3, 17, 40]))
    return [
        (store.seen, store.size, store.high, tuple(store.extent)),
        [a.tolist() for a in arrays], index.tolist(), [a.tolist() for a in one],
        positions[:N].tolist(), tags[:N].tolist(), [a.tolist() for a in some], picked.tolist(),
        [first for first, _, _ in pieces][:1], np.concatenate([p for _, p, _ in pieces])[:N].tolist(),
        store.live_rows() is None, store.policy_log().tolist(), str(store.schema), store.check(),
    ]  # fmt: skip


def test_all_stores_answer_alike(buffer: Any, tmp_path: Path) -> None:
    with make("memory", tmp_path) as other:
        feed(other, 0, N)
        wanted = answers(store_of(other))
    store = store_of(buffer)
    assert answers(store) == wanted
    x, y = stream(0, N)
    assert wanted[1] == [x.tolist(), y.tolist(), list(range(N))]
    assert wanted[4] == list(range(N))
    assert store.writable
    assert store.positions_of(np.array([4, 2])).tolist() == [4, 2]
    assert store.nbytes > 0
    assert not store.was_replaced()


@pytest.mark.parametrize("place", ["file", "folder"])
def test_readers_answer_as_the_writer(place: str, tmp_path: Path) -> None:
    """Beside it, after more commits, and after it has closed."""
    with make(place, tmp_path / "b") as writer:
        feed(writer, 0, 20)
        with leanreplay.open(tmp_path / "b") as reader:
            assert len(reader) == 20
            feed(writer, 20, N)
            store_of(reader).recover_or_refresh()
            assert not store_of(reader).writable
            assert answers(store_of(reader)) == answers(store_of(writer))
            assert store_of(reader).state_name() == store_of(writer).state_name()
            wanted = answers(store_of(writer))
            writer.close()
            assert answers(store_of(reader)) == wanted


def test_rows_that_are_not_live_are_refused(buffer: Any) -> None:
    for rows in ([N], [0, 63], [-1], [0, -(2**62)]):
        with pytest.raises(RowError):
            store_of(buffer).read(np.array(rows))


def test_a_commit_of_metadata(buffer: Any) -> None:
    """Other values of one field: samples and positions stay, the state gets a number and a name of its own."""
    store = store_of(buffer)
    before, name, sequence = answers(store), store.state_name(), store.sequence
    rows = np.array([1, 15, 14])  # in one part
    values = np.array([100, 200, 300]).view(np.uint8)
    store.commit(Change(store.seen, store.policy, update=MetadataUpdate(rows, {2: (values, np.arange(3))})))
    after = answers(store)
    assert after[1][2] == [{1: 100, 15: 200, 14: 300}.get(p, p) for p in range(N)]
    assert after[1][:2] == before[1][:2]
    assert after[2] == before[2]
    assert store.sequence > sequence
    assert store.state_name() != name
    assert store.check() == []


def test_points_to_go_back_to(buffer: Any) -> None:
    """mark, change, rollback: as if nothing had been. Names of other states are refused and change nothing."""
    store = store_of(buffer)
    wanted, name, seen = answers(store), store.mark(), store.seen
    feed(buffer, N, N + 9)
    buffer.set_metadata("z", np.zeros(5, np.int64), rows=np.arange(5))
    later = answers(store)
    with pytest.raises(StateError):
        store.rollback("0" * 16, 3)
    assert answers(store) == later
    store.rollback(name, seen)
    assert answers(store) == wanted
    feed(buffer, N, N + 9)
    store.drop_points()
    with pytest.raises(StateError):
        store.rollback(name, seen)
    assert (store.seen, store.check()) == (N + 9, [])


def test_closed(buffer: Any) -> None:
    store = store_of(buffer)
    store.flush()
    store.close()
    store.close()
    with pytest.raises(ModeError):
        store.recover_or_refresh()


def test_an_empty_store_holds_nothing() -> None:
    store = EmptyStore()
    assert (store.seen, store.size, store.high, store.nbytes, store.schema) == (0, 0, 0, 0, None)
    assert (list(store.pieces()), store.check(), store.live_rows()) == ([], [], None)
    for action in (lambda: store.read(np.zeros(1, np.int64)), lambda: store.layout, lambda: store.positions_of(np.zeros(1, np.int64))):
        with pytest.raises(RowError, match="empty"):
            action()
