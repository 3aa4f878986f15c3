"""Datasets and loaders over buffers that lose rows while they go on: new classes, rollbacks, a smaller size."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from laws import assert_even

torch = pytest.importorskip("torch")

from torch.utils.data import ConcatDataset, DataLoader, Subset, random_split  # noqa: E402

import leanreplay  # noqa: E402
from leanreplay import (  # noqa: E402
    ClassBalancedBuffer,
    ExperienceBalancedBuffer,
    GroupError,
    InfiniteBuffer,
    ReservoirBuffer,
    RowError,
)
from leanreplay.torch import BufferDataset, MixedLoader, ReplayLoader  # noqa: E402

pytestmark = pytest.mark.usefixtures("kernels")
HERE = pytest.param({}, id="here")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
FORK: dict[str, Any] = {"num_workers": 2, "multiprocessing_context": "fork"}
FORKED = pytest.param(FORK, id="forked", marks=needs_fork)
WORKERS = [
    HERE,
    FORKED,
    pytest.param(
        {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True}, id="forked-persistent", marks=needs_fork
    ),
    pytest.param({"num_workers": 1, "multiprocessing_context": "forkserver", "persistent_workers": True}, id="forkserver"),
]


def samples(start: int, n: int, classes: tuple[int, ...]) -> tuple[Any, Any]:
    """x[i] holds its label and its position, so that a torn or misplaced row shows."""
    y = np.array(classes)[np.arange(n) % len(classes)]
    return np.stack([y, np.arange(start, start + n)] * 3, 1).astype(np.float32), y


def whole(x: Any, y: Any) -> bool:
    return bool((x[:, ::2] == y[:, None]).all() and (x[:, 1::2] == x[:, 1:2]).all())


def feed(buffer: Any, n: int, *classes: int) -> None:
    options = {"experience": classes[0] // 2} if isinstance(buffer, ExperienceBalancedBuffer) else {}
    buffer.add(samples(buffer.seen, n, classes), **options)


# -- the class-incremental loop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["disk", "ram"])
@pytest.mark.parametrize("workers", WORKERS)
def test_new_classes_within_an_epoch(tmp_path: Path, workers: dict[str, Any], where: str) -> None:
    """One shuffled DataLoader for all tasks, whose loop adds batches of new classes: each epoch has the items that it began with."""
    with ClassBalancedBuffer(60, tmp_path / "b.h5" if where == "disk" else None, seed=1) as buffer:
        feed(buffer, 100, 0, 1)
        loader = DataLoader(BufferDataset(buffer), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3), **workers)
        for task in range(1, 4):
            length, count = len(buffer), 0
            for i, (x, y) in enumerate(loader):
                assert whole(x, y) and int(y.max()) < 2 * task + 2
                count += len(y)
                feed(buffer, 1 if i else 2, 2 * task, 2 * task + 1)
                assert i or len(buffer) < length, "no row fell free, and the test tests nothing"
            assert count == length
            feed(buffer, 100, 2 * task, 2 * task + 1)
            assert len(buffer) == 60
        assert buffer.check() == []


def test_an_epoch_that_loses_rows_repeats_itself() -> None:
    """What stands in for rows that are gone follows from seed, stream, samples seen and index; the rest comes in order."""

    def epoch(seed: int) -> tuple[list[float], list[int]]:
        with ClassBalancedBuffer(60, seed=seed) as buffer:
            feed(buffer, 100, 0, 1)
            found = []
            for i, (x, _) in enumerate(DataLoader(BufferDataset(buffer), batch_size=10)):
                found += x[:, 1].tolist()
                if i == 1:
                    feed(buffer, 2, 2, 3)
            return found, buffer.get_metadata("position").tolist()

    (first, held), again, (other, _) = epoch(1), epoch(1)[0], epoch(2)
    assert len(held) == 32
    assert first == again and first[32:] != other[32:]
    assert first[20:32] == held[20:32] and set(first[32:]) <= set(held)


def test_what_stands_in_is_uniform() -> None:
    """Each live sample answers for an index that is gone as often as any other, whatever the index."""
    counts = np.zeros(15)
    for seed in range(60):
        with ClassBalancedBuffer(60, seed=seed) as buffer:
            feed(buffer, 60, 0)
            dataset = BufferDataset(buffer, metadata=True)
            buffer.add(samples(60, 3, (1, 2, 3)))  # 15 of class 0 stay
            assert len(buffer) == 18
            rows = buffer.get_metadata("idx").tolist()
            shown = [rows.index(int(meta["idx"])) for _, meta in dataset.__getitems__(range(18, 60))]
            counts += np.bincount(shown, minlength=18)[:15]
    assert_even(counts)


@pytest.mark.parametrize("options", [HERE, FORKED])
def test_a_buffer_itself_under_a_data_loader(options: dict[str, Any], tmp_path: Path) -> None:
    """The core's buffers are datasets of (sample, metadata) too: an epoch has the items that it began with."""
    with ClassBalancedBuffer(60, tmp_path / "b.h5") as buffer:
        feed(buffer, 100, 0, 1)
        items = 0
        for (x, y), meta in DataLoader(buffer, batch_size=6, shuffle=True, **options):
            assert whole(x.numpy(), y.numpy()) and (x[:, 1] == meta["position"]).all()
            items += len(y)
            if items == 18:
                feed(buffer, 2, 2, 3)
        assert items == 60 and len(buffer) < 60


def test_buffers_and_indices_stay_strict(tmp_path: Path) -> None:
    """`buffer[i]` knows what is there; a dataset answers below what it told, and an index that never was within is a RowError."""
    with ClassBalancedBuffer(60, tmp_path / "b.h5") as buffer:
        dataset = BufferDataset(buffer)
        with pytest.raises(RowError, match="buffer of 0"):
            dataset[0]
        feed(buffer, 100, 0, 1)
        assert len(dataset) == 60
        feed(buffer, 1, 2)
        size = len(buffer)
        assert size < 60
        for i in (60, 10**9, -size - 1):
            with pytest.raises(RowError, match=f"buffer of {size}"):
                dataset[i]
        with pytest.raises(RowError, match=f"index 59 of a buffer of {size}"):
            buffer[59]
        with pytest.raises(RowError):
            BufferDataset(buffer)[59]  # it never told so much
        assert len(dataset[59]) == 2 and len(dataset.__getitems__([59, 0, size, -1])) == 4
        assert len(list(dataset)) == len(dataset) == size
        assert torch.equal(dataset[59][0], dataset[59][0])


def test_lengths_that_others_remember() -> None:
    """Splits, subsets and joins of datasets keep the length of when they were made."""
    with ClassBalancedBuffer(60) as buffer:
        feed(buffer, 100, 0, 1)
        dataset = BufferDataset(buffer)
        first, second = random_split(dataset, [50, 10])
        joined = ConcatDataset([dataset, BufferDataset(buffer)])
        subset = Subset(dataset, range(60))
        feed(buffer, 1, 2)
        for some, n in ((first, 50), (second, 10), (joined, 120), (subset, 60)):
            assert sum(len(y) for _, y in DataLoader(some, batch_size=16)) == n


# -- rollbacks, resize, other buffers ---------------------------------------------------------------------------------------


def rollback(buffer: Any, state: Any) -> None:
    buffer.load_state_dict(state)


LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "rollback": rollback,
    "resize": lambda buffer, state: buffer.resize(10),
    "resize down and up": lambda buffer, state: (buffer.resize(10), buffer.resize(100)),
}


@pytest.mark.parametrize("workers", [HERE, FORKED])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["reservoir", "balanced", "infinite"])
def test_rows_lost_in_the_middle(tmp_path: Path, kind: str, loss: str, workers: dict[str, Any]) -> None:
    """A rollback or another size within an epoch: it ends with as many items as it began with, all of them whole."""
    if kind == "infinite" and loss != "rollback":
        pytest.skip("has no size")
    makes: dict[str, Any] = {
        "reservoir": lambda path: ReservoirBuffer(60, path),
        "balanced": lambda path: ClassBalancedBuffer(60, path),
        "infinite": lambda path: InfiniteBuffer(path, rows_per_part=16),
    }
    with makes[kind](tmp_path / "b") as buffer:
        feed(buffer, 12, 0, 1)
        state = buffer.state_dict()
        feed(buffer, 48, 0, 1)
        count = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", leanreplay.CapacityWarning)
            for i, (x, y) in enumerate(DataLoader(BufferDataset(buffer), batch_size=6, shuffle=True, **workers)):
                assert whole(x, y)
                count += len(y)
                if i == 2:
                    LOSSES[loss](buffer, state)
        assert count == 60 and len(buffer) <= 12


def test_nothing_left() -> None:
    """No sample can stand in where there is none."""
    with ReservoirBuffer(20) as buffer:
        state = buffer.state_dict()
        feed(buffer, 20, 0)
        epoch = iter(DataLoader(BufferDataset(buffer), batch_size=4))
        next(epoch)
        buffer.load_state_dict(state)
        with pytest.raises(RowError, match="buffer of 0"):
            next(epoch)


@needs_fork
def test_parts_in_memory_that_a_worker_cannot_see() -> None:
    """Forked workers of an InfiniteBuffer in memory know the parts of then: other samples do not pass for newer ones."""
    with InfiniteBuffer(rows_per_part=8) as buffer:
        feed(buffer, 16, 0)
        loader = DataLoader(BufferDataset(buffer), batch_size=8, num_workers=1, multiprocessing_context="fork", persistent_workers=True)
        assert sum(len(y) for _, y in loader) == 16
        feed(buffer, 16, 0)
        with pytest.raises(RowError, match="buffer of 16"):
            list(loader)


# -- groups ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [HERE, FORKED])
def test_groups_that_give_rows_away(tmp_path: Path, workers: dict[str, Any]) -> None:
    """`buffer.groups[g]` in a DataLoader while other groups come: always samples of this group, as many as when the epoch began."""
    for buffer in (ClassBalancedBuffer(60, tmp_path / "c.h5"), ExperienceBalancedBuffer(60, tmp_path / "e.h5")):
        with buffer:
            feed(buffer, 100, 0)
            loader = DataLoader(buffer.groups[0], batch_size=10, shuffle=True, **workers)
            for task in (2, 4, 6):
                length, count = len(buffer.groups[0]), 0
                for (x, y), _ in loader:
                    assert whole(x, y) and not y.any()
                    count += len(y)
                    feed(buffer, 1, task)
                assert count == length
                assert len(buffer.groups[0]) < length


def test_groups_stay_strict() -> None:
    with ClassBalancedBuffer(4) as buffer:
        feed(buffer, 20, 0)
        group = buffer.groups[0]
        feed(buffer, 1, 1)
        assert len(group.__getitems__([0, 3])) == 2
        for index in (4, -3):
            with pytest.raises(RowError):
                group[index]
        with pytest.raises(RowError):
            buffer.groups[0][3]
        with pytest.raises(GroupError):
            buffer.groups[7]
        with pytest.raises(GroupError):
            buffer.groups["cat"]
        feed(buffer, 30, *range(2, 12))  # more groups than rows
        gone = next(g for g, n in buffer.group_sizes().items() if n == 0)
        with pytest.raises(RowError, match="buffer of 0"):
            buffer.groups[gone][0]


# -- readers and loaders -----------------------------------------------------------------------------------------------------


def test_a_reader_met_by_a_commit_reads_again(tmp_path: Path) -> None:
    """A commit that frees the rows between choosing and reading them is no error of a reader: neither for items nor for datasets."""
    with ClassBalancedBuffer(60, tmp_path / "b.h5") as buffer:
        feed(buffer, 100, 0, 1)
        with leanreplay.open(tmp_path / "b.h5") as reader:
            dataset = BufferDataset(reader)
            assert len(dataset) == 60
            for label, ask in ((2, lambda: reader.__getitems__(range(20))), (3, lambda: dataset.__getitems__(range(60)))):
                live_rows = reader.current.store.live_rows

                def late(label: int = label, live_rows: Any = live_rows) -> Any:
                    found = live_rows()
                    del reader.current.store.live_rows
                    feed(buffer, 1, label)
                    return found

                reader.current.store.live_rows = late
                before = len(buffer)
                assert len(ask()) in (20, 60)
                assert len(buffer) < before


def test_loaders_while_classes_come() -> None:
    """ReplayLoader and MixedLoader draw from what is there."""
    with ClassBalancedBuffer(60, seed=1) as buffer:
        feed(buffer, 100, 0, 1)
        with ReplayLoader(buffer, 12, prefetch=3) as loader, ReplayLoader(buffer, 12, balance="class") as even:
            for label in range(2, 6):
                for _ in range(3):
                    for (x, y), _ in (next(loader), next(even)):
                        assert whole(x, y) and len(y) == 12
                    feed(buffer, 1, label)
        stream = [tuple(map(torch.from_numpy, samples(1000, 4, (label,)))) for label in range(6, 12)]
        for x, y, is_replay, _ in MixedLoader(stream, buffer, 12):
            assert whole(x, y) and int(is_replay.sum()) == 12
            buffer.add((x[~is_replay], y[~is_replay]))
        assert buffer.check() == []
