"""WeightedReservoirBuffer: any batches, kills, weights of any kind."""

from __future__ import annotations

import math
import os
import pickle
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from weighted_oracle import HUGE, TINY, held, oracle, planned, samples, some_weights

import leanreplay
from leanreplay import (
    ArgumentError,
    CapacityWarning,
    CorruptionError,
    Schema,
    SchemaError,
    WeightedReservoirBuffer,
)
from leanreplay.storage.store import Change


@pytest.fixture(params=["memory", "disk"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return None if request.param == "memory" else tmp_path / "w.h5"


@pytest.mark.parametrize("cuts", [1, 7, 300])
def test_any_batches(cuts: int, where: Path | None) -> None:
    """G2: in memory and on disk, by `add` and `update`, in any batches: the oracle's samples, each in the row it always has."""
    n, weights = 300, some_weights(300, 3)
    with WeightedReservoirBuffer(25, seed=4, stream=6) as one:
        one.add(samples(0, n), weights=weights)
        rows = one.get_metadata("position").tolist()
    with WeightedReservoirBuffer(25, where, seed=4, stream=6) as buffer:
        for start in range(0, n, cuts):
            stop = min(n, start + cuts)
            if start % 2:
                buffer.update([(x, int(y)) for x, y in zip(*samples(start, stop), strict=True)], weights=weights[start:stop])
            else:
                buffer.add(samples(start, stop), weights=weights[start:stop])
        assert held(buffer) == oracle(weights, 25, 4, 6)
        assert buffer.get_metadata("position").tolist() == rows
        assert buffer.seen == n


def test_the_weight_of_each_sample(where: Path | None) -> None:
    """`sample`, `get`, `[i]`, `get_metadata` and the file give each sample's weight, bit for bit."""
    weights = some_weights(100, 1)
    with WeightedReservoirBuffer(20, where) as buffer:
        buffer.add(samples(0, 100), weights=weights, metadata={"z": np.arange(100)})
        for _ in range(5):
            _, meta = buffer.sample(8)
            assert sorted(meta) == ["idx", "position", "weight", "z"]
            assert meta["weight"].dtype == np.float64
            assert (meta["weight"] == weights[meta["position"]]).all()
            assert (buffer.get_metadata("weight", meta["idx"]) == meta["weight"]).all()
        assert (buffer.get_metadata("weight") == weights[buffer.get_metadata("position")]).all()
        item = buffer[3][1]
        assert type(item["weight"]) is float
        assert item["weight"] == weights[item["position"]]
        again = pickle.loads(pickle.dumps(buffer))
        assert (again.get_metadata("weight") == buffer.get_metadata("weight")).all()
        again.close()
        if where is not None:
            h5py = pytest.importorskip("h5py")
            with h5py.File(where) as file:
                live = file["index/position"][:] >= 0
                assert (file["index/group"][:][live].view(np.float64) == buffer.get_metadata("weight")).all()


def test_going_on(where: Path | None, tmp_path: Path) -> None:
    """Reopened, resized, rolled back and loaded from a copy, it holds what the oracle says, and goes on from there."""
    weights = some_weights(200, 8)

    def feed(buffer: Any, stop: int) -> None:
        start = buffer.seen
        buffer.add(samples(start, stop), weights=weights[start:stop])

    with WeightedReservoirBuffer(20, where, seed=1) as buffer:
        feed(buffer, 60)
        state = buffer.state_dict()
        feed(buffer, 120)
        assert held(buffer) == oracle(weights[:120], 20, 1)
        buffer.load_state_dict(state)
        assert held(buffer) == oracle(weights[:60], 20, 1)
        buffer.save(tmp_path / "copy")
        feed(buffer, 120)
        buffer.resize(12)
        assert held(buffer) == oracle(weights[:120], 12, 1)
        feed(buffer, 150)
        assert held(buffer) == oracle(weights[:150], 12, 1)
        with pytest.warns(CapacityWarning, match="12"):
            buffer.resize(20)
        feed(buffer, 200)
        assert held(buffer) == oracle(weights, 12, 1)
    if where is not None:
        with leanreplay.open(where, "r+") as buffer:
            assert type(buffer) is WeightedReservoirBuffer
            buffer.add(samples(150, 260), weights=np.concatenate([weights[150:], np.full(60, HUGE)]), at=150)
            assert held(buffer) == oracle([*weights, *[HUGE] * 60], 12, 1)
    with WeightedReservoirBuffer(20, seed=1) as buffer:
        buffer.load(tmp_path / "copy")
        feed(buffer, 200)
        assert held(buffer) == oracle(weights, 20, 1)


def test_killed(tmp_path: Path) -> None:
    """G3: killed at any time, it opens, holds the oracle's samples of the first `seen`, and goes on to the same end."""
    path, n = tmp_path / "w.h5", 12_000
    weights = some_weights(n, 2)
    weights = np.where(weights < 1e-3, 1.0, np.minimum(weights, 4.0))
    for kill in range(12):
        pid = os.fork()
        if pid == 0:
            try:
                buffer = WeightedReservoirBuffer(40, path, mode="a", seed=2)
                for start in range(buffer.seen, n, 3):
                    buffer.add(samples(start, start + 3), weights=weights[start : start + 3])
            finally:
                os._exit(0)
        time.sleep(0.02 + 0.01 * kill)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if not path.exists():
            continue
        with WeightedReservoirBuffer(path=path, mode="r+") as buffer:
            assert held(buffer) == planned(weights[: buffer.seen], 40, 2)
    with WeightedReservoirBuffer(40, path, mode="a", seed=2) as buffer:
        start = buffer.seen
        buffer.add(samples(start, n), weights=weights[start:])
        assert held(buffer) == planned(weights, 40, 2)


def test_zero_weights() -> None:
    """They count as seen and are never kept; passing them over is no reason for the capacity rule."""
    with WeightedReservoirBuffer(5) as buffer:
        buffer.add(samples(0, 50), weights=np.zeros(50))
        assert (len(buffer), buffer.seen) == (0, 50)
        buffer.add(samples(50, 53), weights=[1, TINY, -0.0])
        buffer.add(samples(53, 300), weights=[0] * 247)
        assert held(buffer) == [50, 51]
        buffer.resize(2)
        buffer.add(samples(300, 310), weights=np.zeros(10))  # the buffer is full, and yet has dropped nothing
        assert buffer.current.store.policy[0] == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error", CapacityWarning)
            buffer.resize(30)
        buffer.add(samples(310, 330), weights=np.ones(20))
        assert held(buffer) == [50, 51, *range(310, 330)]
        assert buffer.current.store.policy[0] == 0
        buffer.add(samples(330, 350), weights=np.ones(20))
        assert len(buffer) == 30
        assert buffer.current.store.policy[0] == 30


def test_scale_does_not_matter() -> None:
    """Weights times a power of two keep the same samples, from denormal to huge ones."""
    weights = np.arange(1, 401) % 17 + 1.0
    wanted = planned(weights, 30, 0)
    assert wanted == oracle(weights, 30, 0)
    for e in (-1074, -1040, -1000, -300, 300, 1000, 1018):
        assert planned(np.ldexp(weights, e), 30, 0) == wanted, e


def test_only_survivors_are_loaded() -> None:
    """`update` asks the dataset for what stays, nothing else."""
    asked = []

    class Data:
        targets = np.zeros(1000)

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, i: int) -> Any:
            asked.append(i)
            return tuple(a[0] for a in samples(i, i + 1))

    with WeightedReservoirBuffer(10) as buffer:
        buffer.update(Data(), weights=np.ones(1000))
        assert held(buffer) == oracle(np.ones(1000), 10)
        assert sorted(asked[1:]) == held(buffer)  # the first was asked for the schema


@pytest.mark.parametrize("kind", ["list", "float32", "int", "tensor", "bool", "bfloat16", "strided"])
def test_weights_of_any_kind(kind: str) -> None:
    """Numbers of any type count as their doubles; the caller's array is not touched."""
    plain = np.array([1.0, 0.5, 0.0, 2.0, 4.0] * 10)
    given: Any = {
        "list": plain.tolist(),
        "float32": plain.astype(np.float32),
        "int": (plain * 2).astype(np.int64),
        "tensor": torch.tensor(plain, requires_grad=True),
        "bool": plain > 0,
        "bfloat16": torch.tensor(plain).float(),
        "strided": np.repeat(plain, 2)[::2],
    }[kind]
    wanted = {"int": plain * 2, "bool": (plain > 0) * 1.0}.get(kind, plain)
    with WeightedReservoirBuffer(6) as buffer:
        buffer.add(samples(0, 50), weights=given)
        assert held(buffer) == oracle(wanted, 6)
        assert (buffer.get_metadata("weight") == wanted[buffer.get_metadata("position")]).all()


@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        (None, ArgumentError, ["weights=(n,)", "ReservoirBuffer"]),
        ([1, -1, 2, 3], ArgumentError, ["weights[1]", "-1.0", "1 of 4"]),
        ([1, 2, math.nan, -1], ArgumentError, ["weights[2]", "nan", "2 of 4"]),
        ([1, 2, 3, math.inf], ArgumentError, ["weights[3]", "inf"]),
        ([1, 2, 3, -TINY], ArgumentError, ["weights[3]", "-5e-324"]),
        (np.array([1, 2, 3, HUGE * np.longdouble(4)], np.longdouble), ArgumentError, ["weights[3]", "inf"]),
        ([1, 2, 3], SchemaError, ["expected 4", "(3,)"]),
        (np.ones((4, 1)), SchemaError, ["expected 4", "(4, 1)"]),
        (2.0, SchemaError, ["expected 4", "()"]),
        (["a", "b", "c", "d"], SchemaError, ["expected 4 real numbers", "<U1"]),
        (np.ones(4, complex), SchemaError, ["real", "complex128"]),
        (np.ma.masked_array(np.ones(4), [0, 1, 0, 0]), SchemaError, ["weights", "masked", "filled"]),
        ([[1], [2, 3], [1], [1]], SchemaError, ["weights"]),
    ],
    ids=lambda v: str(v)[:24],
)
@pytest.mark.parametrize("how", ["add", "update"])
def test_refused_weights(weights: Any, error: type[Exception], words: list[str], how: str, tmp_path: Path) -> None:
    """Each is refused with its reason, for the first batch and for a later one; nothing of the batch is kept, no file appears."""
    path = tmp_path / "w.h5"
    with WeightedReservoirBuffer(5, path) as buffer:
        for _ in range(2):
            before = buffer.seen
            with pytest.raises(error) as caught:
                if how == "add":
                    buffer.add(samples(0, 4), weights=weights)
                else:
                    buffer.update([(x, int(y)) for x, y in zip(*samples(0, 4), strict=True)], weights=weights)
            assert all(word in str(caught.value) for word in words), caught.value
            assert buffer.seen == before
            assert path.exists() == bool(before)
            buffer.add(samples(0, 4), weights=np.ones(4))
        assert buffer.get_metadata("weight").tolist() == [1.0] * 5


def test_refused_otherwise() -> None:
    """`group` is no argument here, datasets need a length, "weight" is no name for metadata, whichever way it comes."""
    with WeightedReservoirBuffer(5) as buffer:
        with pytest.raises(ArgumentError, match="group"):
            buffer.add(samples(0, 4), weights=np.ones(4), group=np.ones(4))
        with pytest.raises(ArgumentError, match="map-style"):
            buffer.update(iter([1]), weights=[1])
        with pytest.raises(SchemaError, match="weight"):
            buffer.add(samples(0, 4), weights=np.ones(4), metadata={"weight": np.ones(4)})
        with pytest.raises(leanreplay.RowError, match="empty"):
            buffer.get_metadata("weight")
        buffer.add(samples(0, 4), weights=np.ones(4))
        with pytest.raises(SchemaError, match="weight"):
            buffer.set_metadata("weight", np.ones(4))
        with pytest.raises(SchemaError, match="no metadata"):
            buffer.get_metadata("weights")
        buffer.set_metadata("loss", np.arange(4.0))
        assert (buffer.get_metadata("weight") == 1).all()
    with pytest.raises(SchemaError, match="weight"):
        WeightedReservoirBuffer(5, schema=Schema.from_sample(0, {"weight": 1.0}))


def test_a_file_that_lies() -> None:
    """Weights that no weighted reservoir can hold, with checksums that fit: an error, whatever is done next."""
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with WeightedReservoirBuffer(5) as buffer:
            buffer.add(samples(0, 4), weights=np.ones(4))
            store = buffer.current.store
            arrays, index = store.read(np.arange(4))
            index[1, 2] = np.array(wrong).view(np.int64)
            sources = [(np.ascontiguousarray(a).ravel().view(np.uint8), np.arange(4)) for a in arrays]
            store.commit(Change(4, store.policy, np.arange(4), index[0], index[1], sources))
            with pytest.raises(CorruptionError, match="weights"):
                buffer.add(samples(4, 8), weights=np.ones(4))
