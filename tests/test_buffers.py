"""The public interface, one call after another: what a user does with a buffer."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import leanreplay
from leanreplay import (
    CapacityWarning,
    DataBuffer,
    ExistsError,
    GreedyClassBalancingBuffer,
    InfiniteBuffer,
    ModeError,
    Policy,
    ReservoirBuffer,
    Schema,
    SlidingWindowBuffer,
)

BOUNDED = [ReservoirBuffer, SlidingWindowBuffer, GreedyClassBalancingBuffer]


def batch(start: int, n: int) -> tuple[Any, dict[str, Any]]:
    """Samples that tell their position: ((x, y), metadata)."""
    p = np.arange(start, start + n)
    return (np.stack([p, p * 2], 1).astype("float32"), p % 5), {"logits": np.stack([p, -p, p], 1).astype("float64")}


def feed(buffer: DataBuffer, start: int, stop: int, step: int = 7) -> None:
    for s in range(start, stop, step):
        data, metadata = batch(s, min(step, stop - s))
        buffer.add(data, metadata=metadata)


def assert_true(result: Any) -> None:
    """Every sample and its metadata are those of its position."""
    (x, y), meta = result
    (x_true, y_true), meta_true = batch(0, int(np.max(meta["position"], initial=0)) + 1)
    p = meta["position"]
    np.testing.assert_array_equal(x, x_true[p])
    np.testing.assert_array_equal(y, y_true[p])
    np.testing.assert_array_equal(meta["logits"], meta_true["logits"][p])


@pytest.fixture(params=["RAM", "disk"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return None if request.param == "RAM" else tmp_path / "replay.h5"


@pytest.mark.parametrize("cls", BOUNDED)
def test_add_sample_get(cls: type[DataBuffer], where: Path | None) -> None:
    with cls(20, where, seed=1) as buffer:
        assert (len(buffer), buffer.seen, buffer.schema, buffer.nbytes) == (0, 0, None, 0)
        feed(buffer, 0, 100)
        assert (len(buffer), buffer.seen, buffer.max_size, buffer.seed, buffer.stream) == (20, 100, 20, 1, 0)
        (x, y), meta = result = buffer.sample(12)
        assert x.shape == (12, 2) and y.shape == (12,) and sorted(meta) == ["idx", "logits", "position"]
        assert len(set(meta["idx"])) == 12
        assert_true(result)
        assert_true(buffer.get(meta["idx"][::-1]))
        assert_true(buffer.sample(50, replace=True))
        assert_true(buffer.get(torch.as_tensor(meta["idx"])))
        assert buffer.nbytes > 20 * (8 + 8 + 24) and buffer.check() == []
        assert buffer.schema == Schema.from_batch(*batch(0, 3))
        assert cls.__name__ in repr(buffer) and "seen=100" in repr(buffer)


def test_samples_are_copies(where: Path | None) -> None:
    with ReservoirBuffer(10, where) as buffer:
        feed(buffer, 0, 10)
        (x, _), meta = buffer.get([3])
        x[:] = -1
        meta["logits"][:] = -1
        assert_true(buffer.get([3]))
        data, metadata = batch(10, 1)
        buffer.add(data, metadata=metadata)
        data[0][:] = -1
        assert_true(buffer.get(range(len(buffer))))


@pytest.mark.parametrize("cls", BOUNDED)
def test_a_map_style_dataset(cls: type[DataBuffer], where: Path | None) -> None:
    with cls(20, where) as buffer:
        feed(buffer, 0, 50)
        (x, y), meta = buffer[3]
        assert x.shape == (2,) and y.shape == () and meta["idx"] == 3 and x[0] == meta["position"]
        items = buffer.__getitems__([3, -1, 0])
        assert [m["idx"] for _, m in items] == [3, 19, 0]
        assert len(list(buffer)) == 20
        with pytest.raises(IndexError, match="20"):
            buffer[20]


def test_nested_samples(where: Path | None) -> None:
    sample = {
        "image": np.zeros((5, 2, 3), "uint8"),
        "pair": (np.ones((5, 1), bool), [np.arange(5, dtype="int16"), np.full((5, 4), 1j, "complex64")]),
        "name": np.array([b"abc"] * 5),
    }
    with SlidingWindowBuffer(5, where) as buffer:
        buffer.add(sample)
        data, meta = buffer.get(range(5))
        assert isinstance(data["pair"], tuple) and isinstance(data["pair"][1], list)
        assert data["name"].tolist() == [b"abc"] * 5 and data["pair"][0].dtype == bool
        np.testing.assert_array_equal(data["pair"][1][1], sample["pair"][1][1])
        np.testing.assert_array_equal(meta["position"], np.arange(5))


def test_tensors(where: Path | None) -> None:
    with ReservoirBuffer(8, where) as buffer:
        x = torch.arange(16, dtype=torch.float32, requires_grad=True).reshape(8, 2)
        buffer.add((x, torch.arange(8)), metadata={"h": torch.ones(8, 3, dtype=torch.bfloat16)})
        (got, y), meta = buffer.get(range(8))
        np.testing.assert_array_equal(got, x.detach().numpy())
        assert y.dtype == np.int64 and meta["h"].dtype == np.uint16  # the core keeps bfloat16's bits
        buffer.add((x.detach().numpy(), np.arange(8)), metadata={"h": torch.ones(8, 3, dtype=torch.bfloat16).t().contiguous().t()})
        assert buffer.seen == 16 and buffer.check() == []


def test_transforms_apply_on_reading_only(where: Path | None) -> None:
    calls = []

    def double(x: Any) -> Any:
        calls.append(x.shape)
        return x * 2

    with ReservoirBuffer(10, where, transform=double, target_transform=lambda y: y + 100) as buffer:
        feed(buffer, 0, 10)
        assert not calls
        (x, y), meta = buffer.sample(4)
        assert calls == [(2,)] * 4
        np.testing.assert_array_equal(x[:, 0], 2 * meta["position"])
        np.testing.assert_array_equal(y, meta["position"] % 5 + 100)
        (x1, y1), meta1 = buffer[2]
        assert x1[0] == 2 * meta1["position"] and y1 == meta1["position"] % 5 + 100
        buffer.transform = buffer.target_transform = None
        assert_true(buffer.get(range(10)))


class Counting:
    """A dataset that counts what is loaded."""

    def __init__(self, n: int, targets: bool) -> None:
        self.n, self.loaded = n, []
        if targets:
            self.targets = [i % 5 for i in range(n)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        self.loaded.append(i)
        (x, y), _ = batch(i, 1)
        return x[0], int(y[0])


def test_update_loads_only_what_stays(where: Path | None) -> None:
    schema = Schema.from_sample(Counting(1, False)[0])
    with ReservoirBuffer(20, where, schema=schema) as buffer, ReservoirBuffer(20, schema=schema) as twin:
        dataset = Counting(5000, False)
        buffer.update(dataset)
        (x, y), _ = batch(0, 5000)
        twin.add((x, y))
        np.testing.assert_array_equal(buffer.get_metadata("position"), twin.get_metadata("position"))
        assert sorted(dataset.loaded) == sorted(buffer.get_metadata("position").tolist())
        dataset.loaded.clear()
        buffer.update(dataset, at=5000 - 100)  # 100 are known already
        assert buffer.seen == 4900 + 5000 and len(dataset.loaded) <= 20


def test_update_takes_labels_from_targets_or_the_items(where: Path | None) -> None:
    with GreedyClassBalancingBuffer(10, where) as buffer, GreedyClassBalancingBuffer(10) as twin, GreedyClassBalancingBuffer(10) as third:
        with_targets, without = Counting(300, True), Counting(300, False)
        buffer.update(with_targets)
        twin.update(without)
        third.update(without, group=np.arange(300) % 5)
        for other in (twin, third):
            np.testing.assert_array_equal(buffer.get_metadata("position"), other.get_metadata("position"))
        assert len(with_targets.loaded) < 300 <= len(without.loaded)
        counts = np.bincount(buffer.get(range(10))[0][1], minlength=5)  # the newest may be one more of the largest class
        assert counts.min() >= 1 and counts.max() <= 3


def test_update_with_metadata() -> None:
    with ReservoirBuffer(20) as buffer:
        data, metadata = batch(0, 500)
        buffer.update(list(zip(*data, strict=True)), metadata=metadata)
        assert_true(buffer.get(range(20)))


def test_groups_are_labels_or_what_is_given(tmp_path: Path) -> None:
    path = tmp_path / "g.h5"
    with ReservoirBuffer(10, path) as buffer:
        buffer.add((np.zeros((3, 2)), np.array([7, -2, 2**40])))
        buffer.add((np.zeros((2, 2)), np.array([1, 1])), group=[5, 6])
    import h5py

    with h5py.File(path) as file:
        assert file["index/group"][:5].tolist() == [7, -2, 2**40, 5, 6]


def test_metadata_by_name_and_row(where: Path | None) -> None:
    with ReservoirBuffer(20, where) as buffer:
        feed(buffer, 0, 60)
        logits = buffer.get_metadata("logits")
        assert logits.shape == (20, 3)
        np.testing.assert_array_equal(buffer.get_metadata("idx"), np.arange(20))
        rows = np.array([4, 9, 4])
        buffer.set_metadata("logits", np.array([[1.0] * 3, [2.0] * 3, [3.0] * 3]), rows)
        np.testing.assert_array_equal(buffer.get_metadata("logits", [4, 9])[:, 0], [3, 2])  # of a row given twice the last counts
        untouched = np.setdiff1d(np.arange(20), rows)
        np.testing.assert_array_equal(buffer.get_metadata("logits", untouched), logits[untouched])
        stale = buffer.get_metadata("position", [1, 2])
        buffer.set_metadata("logits", np.zeros((2, 3)), [1, 2], positions=[stale[0], stale[1] + 1])
        np.testing.assert_array_equal(buffer.get_metadata("logits", [1]), np.zeros((1, 3)))
        np.testing.assert_array_equal(buffer.get_metadata("logits", [2]), logits[[2]])
        buffer.set_metadata("logits", np.ones((20, 3)))
        assert (buffer.get_metadata("logits") == 1).all() and buffer.check() == []


def test_a_new_metadata_field(where: Path | None) -> None:
    with ReservoirBuffer(20, where) as buffer:
        feed(buffer, 0, 60)
        before = buffer.get(range(20))
        buffer.set_metadata("features", np.arange(40, dtype="float16").reshape(20, 2))
        (x, _), meta = buffer.get(range(20))
        np.testing.assert_array_equal(x, before[0][0])
        np.testing.assert_array_equal(meta["features"], np.arange(40).reshape(20, 2))
        data, metadata = batch(60, 7)
        buffer.add(data, metadata={**metadata, "features": np.zeros((7, 2), "float16")})
        assert buffer.seen == 67 and buffer.check() == []


@pytest.mark.parametrize("cls", [*BOUNDED, InfiniteBuffer])
def test_state_dict_goes_back(cls: type[DataBuffer], where: Path | None) -> None:
    path = where.with_suffix("") if cls is InfiniteBuffer and where else where
    buffer = InfiniteBuffer(path, rows_per_part=16) if cls is InfiniteBuffer else cls(20, path)
    feed(buffer, 0, 50)
    buffer.sample(3)
    state = buffer.state_dict()
    expected = buffer.get(range(len(buffer))), [buffer.sample(5)[1]["idx"] for _ in range(3)]
    for _ in range(2):
        feed(buffer, 50, 120)
        buffer.set_metadata("logits", np.zeros((len(buffer), 3)))
        buffer.load_state_dict(pickle.loads(pickle.dumps(state)))
        assert buffer.seen == 50 and buffer.check() == []
        found = buffer.get(range(len(buffer))), [buffer.sample(5)[1]["idx"] for _ in range(3)]
        for a, b in zip(torch.utils._pytree.tree_leaves(expected), torch.utils._pytree.tree_leaves(found), strict=True):
            np.testing.assert_array_equal(a, b)
    buffer.close()


def test_past_the_limit_of_restore_points(where: Path | None) -> None:
    with ReservoirBuffer(20, where, restore_points=2) as buffer:
        states = []
        for start in (0, 30, 60):
            feed(buffer, start, start + 30)
            states.append(buffer.state_dict())
        feed(buffer, 90, 100)
        with pytest.raises(leanreplay.StateError, match=r"ahead of the state by 70 samples.*restore_points.*at=position"):
            buffer.load_state_dict(states[0])
        assert buffer.seen == 100
        data, metadata = batch(30, 75)
        buffer.add(data, metadata=metadata, at=30)  # 70 of them are known
        assert buffer.seen == 105
        buffer.load_state_dict(states[1])
        assert buffer.seen == 60
        with pytest.raises(leanreplay.StateError, match="30 behind"):
            buffer.load_state_dict(states[2])


@pytest.mark.parametrize("other_in_memory", [True, False])
def test_save_and_load(where: Path | None, tmp_path: Path, other_in_memory: bool) -> None:
    with ReservoirBuffer(20, where) as buffer:
        feed(buffer, 0, 50)
        buffer.sample(2)
        buffer.save(tmp_path / "copy")
        expected = buffer.get(range(20)), buffer.sample(6)[1]["idx"]
        feed(buffer, 50, 90)
        buffer.load(tmp_path / "copy")
        assert buffer.seen == 50
        np.testing.assert_array_equal(buffer.sample(6)[1]["idx"], expected[1])
    with ReservoirBuffer(20, None if other_in_memory else tmp_path / "other.h5") as other:
        other.load(tmp_path / "copy")
        np.testing.assert_array_equal(other.get(range(20))[0][0], expected[0][0][0])
        np.testing.assert_array_equal(other.sample(6)[1]["idx"], expected[1])
        feed(other, 50, 60)
        assert other.check() == []


def test_resize_and_the_capacity_rule(where: Path | None) -> None:
    with ReservoirBuffer(20, where) as buffer, ReservoirBuffer(8) as small:
        feed(buffer, 0, 15)
        buffer.resize(30)  # nothing was dropped: more rows are fine
        feed(buffer, 15, 100)
        assert (len(buffer), buffer.max_size) == (30, 30)
        buffer.resize(8)
        feed(small, 0, 100)
        np.testing.assert_array_equal(np.sort(buffer.get_metadata("position")), np.sort(small.get_metadata("position")))
        with pytest.warns(CapacityWarning, match="no more than"):
            buffer.resize(50)
        feed(buffer, 100, 200)
        feed(small, 100, 200)
        assert len(buffer) == 8
        np.testing.assert_array_equal(np.sort(buffer.get_metadata("position")), np.sort(small.get_metadata("position")))
        assert buffer.check() == []


@pytest.mark.parametrize("cls", [SlidingWindowBuffer, GreedyClassBalancingBuffer])
def test_resize_of_the_others(cls: type[DataBuffer], where: Path | None) -> None:
    with cls(20, where) as buffer:
        feed(buffer, 0, 50)
        held = set(buffer.get_metadata("position").tolist())
        buffer.resize(9)
        kept = set(buffer.get_metadata("position").tolist())
        assert len(kept) == 9 and kept <= held
        if cls is SlidingWindowBuffer:
            assert kept == set(range(41, 50))
        buffer.resize(25)
        feed(buffer, 50, 100)
        assert len(buffer) == 25 and buffer.check() == []
        if cls is SlidingWindowBuffer:
            assert set(buffer.get_metadata("position").tolist()) == set(range(75, 100))


def test_modes_and_open(tmp_path: Path) -> None:
    path = tmp_path / "replay.h5"
    with ReservoirBuffer(20, path, mode="a", seed=3) as buffer:
        feed(buffer, 0, 30)
    with pytest.raises(ExistsError, match="mode"):
        ReservoirBuffer(20, path)
    with ReservoirBuffer(path=path, mode="a") as buffer:
        assert (buffer.seed, buffer.max_size, buffer.seen) == (3, 20, 30)
        with leanreplay.open(path) as reader:
            assert type(reader) is ReservoirBuffer and reader.mode == "r"
            feed(buffer, 30, 60)
            assert reader.seen == 60
            assert_true(reader.sample(5))
            with pytest.raises(ModeError, match="reading only"):
                feed(reader, 60, 61)
    with ReservoirBuffer(5, path, mode="w") as buffer:
        feed(buffer, 0, 3)
    assert len(leanreplay.open(path)) == 3


def test_infinite_buffer(where: Path | None) -> None:
    path = None if where is None else where.with_suffix("")
    with InfiniteBuffer(path, rows_per_part=16) as buffer:
        feed(buffer, 0, 100)
        assert (len(buffer), buffer.seen, buffer.max_size) == (100, 100, None)
        assert_true(buffer.sample(100))
        assert_true(buffer.get([0, 99, 17, 16, 15]))
        with pytest.raises(leanreplay.ArgumentError, match="grows by itself"):
            buffer.resize(5)
    if path is not None:
        assert len(list(path.glob("part-*.h5"))) == 7
        with leanreplay.open(path, mode="r+") as buffer:
            feed(buffer, 100, 130)
            assert_true(buffer.get(range(130)))


def test_an_own_policy(tmp_path: Path) -> None:
    class FirstPolicy(Policy):
        def load(self, positions: Any, groups: Any) -> None:
            self.size = len(positions)

        def plan(self, start: int, groups: Any, rows: Any, most: int) -> int:
            n = min(len(rows), most)
            for i in range(n):
                rows[i] = self.size if self.size < self.capacity else -1
                self.size += rows[i] >= 0
            return n

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

        def plan(self, start: int, groups: Any, rows: Any, most: int) -> int:
            rows[:] = self.capacity  # one past the last
            return len(rows)

    class BadBuffer(DataBuffer):
        policy_class = BadPolicy

    with BadBuffer(10) as buffer:
        with pytest.raises(leanreplay.ArgumentError, match="from 0 to 9"):
            feed(buffer, 0, 5)
        assert len(buffer) == 0 and buffer.check() == []


def test_threads_take_turns(where: Path | None) -> None:
    failures: list[BaseException] = []
    with ReservoirBuffer(50, where) as buffer:
        feed(buffer, 0, 100)

        def read() -> None:
            try:
                for _ in range(200):
                    assert_true(buffer.sample(10))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        feed(buffer, 100, 2000)
        for thread in threads:
            thread.join()
        assert not failures and buffer.seen == 2000 and buffer.check() == []


def test_copies_of_the_object_read(where: Path | None) -> None:
    with ReservoirBuffer(20, where) as buffer:
        feed(buffer, 0, 50)
        for other in (pickle.loads(pickle.dumps(buffer)), copy.deepcopy(buffer)):
            assert_true(other.sample(5))
            assert other.mode == "r"
            other.close()
        assert_true(buffer.sample(5))


def test_a_closed_buffer_says_so(where: Path | None) -> None:
    buffer = ReservoirBuffer(20, where)
    feed(buffer, 0, 5)
    buffer.close()
    buffer.close()
    with pytest.raises(ModeError, match="closed"):
        buffer.sample(1)
    assert "closed" in repr(buffer)
