"""Copies of a buffer in other processes: forked, unpickled, in workers of a DataLoader. Each draws what no other does."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from children import child, result
from torch.utils.data import DataLoader, IterableDataset

import leanreplay
import leanreplay.torch
from leanreplay import ClassBalancedBuffer, InfiniteBuffer, ModeError, ReservoirBuffer
from leanreplay.buffers import drawing
from leanreplay.torch import BufferDataset, ERLearner, MixedLoader, ReplayLoader, sample

KINDS = {
    "reservoir": lambda where: ReservoirBuffer(400, where, seed=3),
    "sparse": lambda where: ClassBalancedBuffer(400, where, seed=3, adaptive_size=False, total_num_classes=3),
    "infinite": lambda where: InfiniteBuffer(where, rows_per_part=150, seed=3),
}


@pytest.fixture(params=["memory", "disk"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return None if request.param == "memory" else tmp_path / "b.h5"


def fed(kind: str, where: Path | None) -> Any:
    buffer = KINDS[kind](where)
    buffer.add((np.arange(400.0), np.arange(400) % 2))
    return buffer


def drawn(buffer: Any, times: int = 2) -> list[list[int]]:
    return [buffer.sample(6)[1]["position"].tolist() for _ in range(times)]


def distinct(batches: list[list[int]]) -> bool:
    return len({tuple(b) for b in batches}) == len(batches)


def forks(buffer: Any) -> list[list[int]]:
    """What two forks draw, and a fork of a fork."""

    def nested(_: int) -> Any:
        inner = result(*child(lambda _: drawn(buffer)))
        return drawn(buffer) + inner

    return [*result(*child(lambda _: drawn(buffer))), *result(*child(nested))]


@pytest.mark.parametrize("kind", KINDS)
def test_forks_draw_streams_of_their_own(kind: str, where: Path | None) -> None:
    found = []
    for attempt in range(2):
        there = where and where.with_name(f"{attempt}.h5")
        with fed(kind, there) as buffer:
            found.append([*forks(buffer), *drawn(buffer)])
            assert distinct(found[-1])
    assert found[0] == found[1]  # the same program draws the same
    with fed(kind, None) as never_forked:
        assert drawn(never_forked) == found[0][-2:]  # and the writer what it would draw alone


def test_threads_that_fork_at_once() -> None:
    with fed("reservoir", None) as buffer:
        found: list[list[int]] = []

        def work() -> None:
            for _ in range(5):
                found.extend(result(*child(lambda _: drawn(buffer, 1))))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 15
        assert distinct(found)


@pytest.mark.parametrize("kind", KINDS)
def test_pickles_draw_streams_of_their_own(kind: str, where: Path | None) -> None:
    if kind == "infinite" and where is None:
        pytest.skip("cannot be pickled")
    found = []
    for attempt in range(2):
        there = where and where.with_name(f"{attempt}.h5")
        with fed(kind, there) as buffer:
            packed = [pickle.dumps(buffer) for _ in range(2)]
            batches = drawn(buffer)
            for data in packed:
                with pickle.loads(data) as other:
                    batches += drawn(other)
                    with pickle.loads(pickle.dumps(other)) as third:
                        batches += drawn(third)
            found.append(batches)
            assert distinct(batches)
    assert found[0] == found[1]


def test_the_same_bytes_in_several_places() -> None:
    with fed("reservoir", None) as buffer:
        packed = pickle.dumps(buffer)
        batches = [b for _ in range(2) for b in drawn(pickle.loads(packed))]
        for _ in range(2):
            batches += result(*child(lambda _: drawn(pickle.loads(packed)) + drawn(pickle.loads(packed))))
        assert distinct(batches)

        def work(number: int) -> Any:
            drawing.PROCESS.forks = ""
            multiprocessing.current_process()._identity = (number,)  # type: ignore[attr-defined]  # as of a spawned worker
            return drawn(pickle.loads(packed))

        for number in range(2):
            batches += result(*child(lambda _, n=number: work(n)))  # type: ignore[misc]
        assert distinct(batches)


def test_copies_are_remembered_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "MAX_REMEMBERED", 3)
    monkeypatch.setattr(drawing.PROCESS, "loaded", {})
    with fed("reservoir", None) as buffer:
        for _ in range(9):
            pickle.loads(pickle.dumps(buffer)).close()
        assert len(drawing.PROCESS.loaded) == 3


class Replay(IterableDataset[Any]):
    """Draws in the worker."""

    def __init__(self, buffer: Any, draw: Any = None) -> None:
        self.buffer, self.draw = buffer, draw or (lambda b: sample(b, 8)[1]["position"])

    def __iter__(self) -> Any:
        return (self.draw(self.buffer) for _ in range(3))


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_of_a_data_loader(persistent: bool, where: Path | None) -> None:
    found = []
    for attempt in range(2):
        torch.manual_seed(5)
        with fed("reservoir", where and where.with_name(f"{attempt}.h5")) as buffer:
            loader = DataLoader(
                Replay(buffer), batch_size=None, num_workers=2, persistent_workers=persistent, multiprocessing_context="fork"
            )
            found.append([batch.tolist() for _ in range(2) for batch in loader])
            del loader
    assert len(found[0]) == 12
    assert distinct(found[0])
    assert found[0] == found[1]


class Opened(IterableDataset[Any]):
    """Each worker opens the file for itself."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Any:
        with leanreplay.open(self.path) as reader:
            yield from (sample(reader, 8)[1]["position"] for _ in range(3))


def test_readers_that_workers_open(tmp_path: Path) -> None:
    with fed("reservoir", tmp_path / "b.h5"):
        loader = DataLoader(Opened(tmp_path / "b.h5"), batch_size=None, num_workers=2, multiprocessing_context="fork")
        found = []
        for _ in range(2):
            torch.manual_seed(5)
            found.append([batch.tolist() for _ in range(2) for batch in loader])
    assert len(found[0]) == 12
    assert distinct(found[0])
    assert found[0] == found[1]


def replayed(buffer: Any, balance: str | None) -> list[list[int]]:
    with ReplayLoader(buffer, 6, batches=2, balance=balance) as loader:
        return [meta["position"].tolist() for _, meta in loader]


@pytest.mark.parametrize("balance", [None, "class"])
def test_replay_loaders_in_forks(balance: str | None) -> None:
    with fed("reservoir", None) as buffer, ReplayLoader(buffer, 6, balance=balance, batches=2) as ours:

        def refused(_: int) -> None:
            with pytest.raises(ModeError, match="another process"):
                next(ours)

        result(*child(refused))
        batches = [meta["position"].tolist() for _, meta in ours]
        for _ in range(2):
            batches += result(*child(lambda _: replayed(buffer, balance)))
        assert distinct(batches)
        assert batches[:2] == replayed(buffer, balance)


def test_mixed_loaders_in_forks() -> None:
    with fed("reservoir", None) as buffer:
        stream = [(torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))] * 2
        mixed = MixedLoader(stream, buffer, 6)
        batches = []
        for _ in range(2):
            batches += result(*child(lambda _: [meta["position"].tolist() for *_, meta in mixed]))
        assert distinct([*batches, *drawn(buffer)])


# -- which buffer a copy is of -------------------------------------------------------------------------------------------


def test_an_unpickled_buffer_in_memory_is_no_other() -> None:
    first = fed("reservoir", None)
    packed = pickle.dumps(first)
    descriptor = first.current.store.mapping.file.fd
    first.close()
    with fed("reservoir", None) as other:
        assert other.current.store.mapping.file.fd == descriptor  # the case
        with pytest.raises(ModeError, match="another buffer"):
            pickle.loads(packed)
    with pytest.raises(ModeError, match="ended or closed"):
        pickle.loads(packed)


def test_what_else_may_stand_on_the_descriptor_of_a_buffer_in_memory(tmp_path: Path) -> None:
    with fed("reservoir", tmp_path / "b.h5") as other:
        ends = os.pipe()
        first = fed("reservoir", None)
        packed = pickle.dumps(first)
        descriptor = first.current.store.mapping.file.fd
        first.close()
        for what, told in ((other.current.store.mapping.file.fd, "another buffer"), (ends[0], "ended or closed")):
            os.dup2(what, descriptor)
            with pytest.raises(ModeError, match=told):
                pickle.loads(packed)
        for fd in (*ends, descriptor):
            os.close(fd)


def test_a_buffer_in_memory_that_was_resized_meanwhile() -> None:
    with fed("reservoir", None) as buffer:
        packed = pickle.dumps(buffer)
        buffer.resize(300)
        try:
            with pickle.loads(packed) as other:  # its descriptor is that of the resized one
                assert other.max_size == 300
                assert sorted(other.get_metadata("position")) == sorted(buffer.get_metadata("position"))
        except ModeError as error:
            assert "ended or closed" in str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_another_buffer_has_replaced(kind: str, tmp_path: Path) -> None:
    with fed(kind, tmp_path / "b.h5") as first:
        packed = pickle.dumps(first)
    with pickle.loads(packed) as same:
        assert len(same) == len(fed(kind, None))
    with fed(kind, tmp_path / "other.h5"):
        pass
    os.rename(tmp_path / "b.h5", tmp_path / "away")
    os.rename(tmp_path / "other.h5", tmp_path / "b.h5")
    with pytest.raises(ModeError, match="another buffer"):
        pickle.loads(packed)


def test_copies_of_an_empty_buffer_wait_for_its_own_file(tmp_path: Path) -> None:
    """Until the first batch the file that mode="w" replaces stands there."""
    with fed("reservoir", tmp_path / "b.h5"):
        pass
    with ReservoirBuffer(10, tmp_path / "b.h5", mode="w") as buffer:
        copies = [pickle.loads(pickle.dumps(buffer))]
        copies.append(pickle.loads(pickle.dumps(copies[0])))
        for held in (0, 3):
            assert [*map(len, copies), result(*child(lambda _: len(buffer)))] == [held] * 3
            buffer.add((np.zeros(3), np.zeros(3)))


# -- copies within a process ---------------------------------------------------------------------------------------------


def test_copy_is_refused(where: Path | None) -> None:
    model = torch.nn.Linear(1, 2)
    with fed("reservoir", where) as buffer:
        learner = ERLearner(model, torch.optim.SGD(model.parameters(), 0.1), buffer)
        for holder in (buffer, BufferDataset(buffer), MixedLoader([], buffer, 2), learner, {"buffer": buffer}):
            with pytest.raises(ModeError, match="save"):
                copy.deepcopy(holder)
        with pytest.raises(ModeError, match="save"):
            copy.copy(buffer)
        with ReplayLoader(buffer, 2) as loader:
            for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(ModeError, match="make a new one"):
                    attempt(loader)


def test_a_buffer_that_is_empty_is_not_copied() -> None:
    for buffer in (ReservoirBuffer(3), InfiniteBuffer()):
        with pytest.raises(ModeError, match="save"):
            copy.deepcopy(buffer)


# -- the counts ----------------------------------------------------------------------------------------------------------


def test_copies_are_counted_in_the_state(tmp_path: Path) -> None:
    with fed("reservoir", tmp_path / "b.h5") as buffer:
        drawn(buffer)
        first = result(*child(lambda _: drawn(buffer)))
        state = buffer.state_dict()
        buffer.save(tmp_path / "copy")
        assert state["draws"] == {"sample": 2}
        second, ours = result(*child(lambda _: drawn(buffer))), drawn(buffer)
        for restore in (lambda: buffer.load_state_dict(state), lambda: buffer.load(tmp_path / "copy")):
            restore()
            assert [result(*child(lambda _: drawn(buffer))), drawn(buffer)] == [second, ours]
        assert distinct([*first, *second, *ours])
        with pickle.loads(pickle.dumps(buffer)) as other:
            assert other.draws.drawn == 0
