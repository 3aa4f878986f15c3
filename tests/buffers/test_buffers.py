"""Buffers: draws of many fields, nested samples, labels of updates, what one buffer shows for all. See test_contract.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from contract import assert_samples, digits, logits
from storage_kernels import kernel

import leanreplay
from leanreplay import (
    CapacityWarning,
    ClassBalancedBuffer,
    ExperienceBalancedBuffer,
    GreedyClassBalancingBuffer,
    InfiniteBuffer,
    LeanReplayError,
    ParametricBuffer,
    ReservoirBuffer,
    Schema,
    SchemaError,
    SlidingWindowBuffer,
    WeightedReservoirBuffer,
)

KINDS: dict[str, Callable[..., Any]] = {
    "reservoir": lambda path=None, **o: ReservoirBuffer(12, path, **o),
    "window": lambda path=None, **o: SlidingWindowBuffer(12, path, **o),
    "greedy": lambda path=None, **o: GreedyClassBalancingBuffer(12, path, **o),
    "infinite": lambda path=None, **o: InfiniteBuffer(path, rows_per_part=8, **o),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
bounded = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "infinite"])


# -- helpers -----------------------------------------------------------------------------------------------------------


def feed(buffer: Any, start: int, stop: int) -> None:
    buffer.add(digits(start, stop), metadata={"logits": logits(start, stop)})


def filled(kind: str, path: Any = None, n: int = 30, **options: Any) -> Any:
    buffer = KINDS[kind](path, **options)
    feed(buffer, 0, n)
    return buffer


@pytest.fixture(params=["memory", "disk"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return None if request.param == "memory" else tmp_path / "replay.h5"


# -- reading -----------------------------------------------------------------------------------------------------------


@every_kind
def test_a_draw_of_many_fields(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in a writer, in readers, and in a reader that meets a commit and so reads every row again."""
    read_rows = kernel.read_rows

    def met_a_commit(*args: Any) -> int:
        rows, out, sums, bad = args[4], args[5], args[8], args[9]
        if rows.shape[0] == 1:
            return int(read_rows(*args))
        out[:], sums[:], bad[:] = 255, 0, 1
        return int(rows.shape[0])

    p = np.arange(30)
    x = (p[:, None] * np.arange(1, 14) % 251).astype(np.uint8)
    fields = (x, p % 3, {"c": p.astype("S3"), "d": np.stack([p, -p], 1).astype(np.float32)})
    metadata = {"a": p.astype(np.int8), "b": np.stack([p, p, -p], 1).astype(np.float16)}
    with KINDS[kind](tmp_path / "b", seed=0) as buffer, KINDS[kind](seed=0) as twin:
        for one in (buffer, twin):
            one.add(fields, metadata=metadata, group=p % 3)
        with leanreplay.open(tmp_path / "b") as reader, leanreplay.open(tmp_path / "b") as again:
            for n in (7, 12, 1, 0, 12):
                (x, y, z), meta = twin.sample(n)
                for one in (buffer, reader, again):
                    with monkeypatch.context() as patch:
                        if one is again:
                            patch.setattr(kernel, "read_rows", met_a_commit)
                        (x2, y2, z2), meta2 = one.sample(n)
                    for left, right in ((x, x2), (y, y2), (z["c"], z2["c"]), (z["d"], z2["d"])):
                        assert right.shape == (n, *left.shape[1:])
                        assert right.dtype == left.dtype
                        assert (right == left).all()
                    assert meta.keys() == meta2.keys()
                    assert all(meta[name].tolist() == meta2[name].tolist() for name in meta)


def test_check_batch() -> None:
    """It raises what `add` would, for buffers too that ask for more than a batch, and changes nothing."""
    x, y = digits(0, 4)
    for make, options, wrong in (
        (ReservoirBuffer, {}, {"group": [0]}),
        (WeightedReservoirBuffer, {"weights": [1, 2, 0, 3]}, {"weights": [1, 2, -1, 3]}),
        (ParametricBuffer, {"group": [0, 1, 0, 1]}, {"group": [0]}),
        (ParametricBuffer, {"experience": 2, "metadata": {"z": x}}, {"metadata": {"rank": x}}),
        (ExperienceBalancedBuffer, {"experience": 2}, {"experience": "a"}),
        (lambda n: ClassBalancedBuffer(n, adaptive_size=False, total_num_classes=3), {}, {"group": [0, 1, 2, 3]}),
    ):
        buffer = make(5)
        for _ in range(2):  # before and after the first batch
            seen, schema = buffer.seen, buffer.schema
            buffer.check_batch((x, y), **options)
            errors = []
            for call in (buffer.check_batch, buffer.add):
                with pytest.raises(LeanReplayError) as error:
                    call((x, y), **{**options, **wrong})
                errors.append((type(error.value), str(error.value)))
            assert errors[0] == errors[1]
            assert (buffer.seen, buffer.schema) == (seen, schema)
            buffer.add((x, y), **options)


@pytest.mark.parametrize(
    "nested",
    [
        lambda a: a,
        lambda a: (a, a[:, 0]),
        lambda a: [a, {"mask": a > 3, "deep": (a.astype(np.complex64), [a[:, 1].astype("S5")])}],
        lambda a: {"ids": a.astype(np.uint16), "a": (a, a, a)},
    ],
)
def test_nested_samples(nested: Callable[[Any], Any], where: Path | None) -> None:
    """Tuples, lists and dicts of any number type, bool, complex and fixed-width bytes come back as they went in."""
    wanted = nested(np.arange(20.0).reshape(5, 4))
    with SlidingWindowBuffer(5, where) as buffer:
        buffer.add(wanted)
        assert_same(buffer.get(range(5))[0], wanted)
        assert_same(buffer[2][0], nested_map(wanted, lambda leaf: leaf[2]))


def nested_map(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {k: nested_map(v, function) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(nested_map(v, function) for v in value)
    return function(value)


def assert_same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, (np.ndarray, np.generic)):
        assert (np.asarray(found).dtype, np.shape(found)) == (wanted.dtype, wanted.shape)
        assert np.array_equal(found, wanted)
        return
    assert type(found) is type(wanted)
    assert len(found) == len(wanted)
    for key in wanted if isinstance(wanted, dict) else range(len(wanted)):
        assert_same(found[key], wanted[key])


def test_transform_of_a_whole_sample() -> None:
    """Samples that are no pairs: `transform` gets the whole sample."""
    with SlidingWindowBuffer(3, transform=lambda sample: {"twice": sample["a"] * 2}) as buffer:
        buffer.add({"a": np.arange(3)})
        assert buffer.get([0, 2])[0]["twice"].tolist() == [0, 4]
        assert buffer[2][0] == {"twice": 4}


# -- update ------------------------------------------------------------------------------------------------------------


class Images:
    """A map-style dataset that counts what is loaded."""

    def __init__(self, n: int, targets: bool = True) -> None:
        self.n, self.loaded = n, [0] * n
        self.x, self.y = digits(0, n)
        if targets:
            self.targets = self.y.tolist()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Any, int]:
        self.loaded[i] += 1
        return self.x[i], int(self.y[i])


@every_kind
def test_update_loads_only_what_stays(kind: str) -> None:
    """Of 5,000 items (500 where all stay) only those that stay are loaded, once each; the buffer is the same as after `add`."""
    n = 500 if kind == "infinite" else 5000
    dataset = Images(n)
    with KINDS[kind](seed=1, schema=Schema.from_sample((dataset.x[0], 0))) as buffer, KINDS[kind](seed=1) as other:
        buffer.update(dataset)
        other.add(digits(0, n))
        assert buffer.seen == other.seen == n
        kept = buffer.get_metadata("position")
        assert (kept == other.get_metadata("position")).all()
        assert max(dataset.loaded) == 1
        # A reservoir commits as many samples as take 12 rows, and loads what a commit keeps; the others plan all 5,000 at once.
        assert sum(dataset.loaded) <= {"reservoir": 100, "window": 12, "greedy": 12, "infinite": n}[kind]
        assert all(dataset.loaded[p] for p in kept)


@pytest.mark.parametrize("label", [int, np.int64, np.array, torch.tensor])
def test_update_from_items_of_any_number(label: Callable[[Any], Any]) -> None:
    """Labels of a dataset's items may be Python numbers, NumPy numbers, arrays or tensors without dimensions."""
    x, y = digits(0, 9)
    with GreedyClassBalancingBuffer(6) as buffer:
        buffer.update([(x[i], label(int(y[i]))) for i in range(9)], metadata={"logits": logits(0, 9)})
        assert_samples(*buffer.sample(6))


def test_labels_come_from_group_then_targets_then_items() -> None:
    """A buffer that balances: `group=` goes first, `targets` cost nothing, failing both every item is read."""
    plain, with_targets = Images(300, targets=False), Images(300)
    with GreedyClassBalancingBuffer(6) as a, GreedyClassBalancingBuffer(6) as b, GreedyClassBalancingBuffer(6) as c:
        a.update(with_targets)
        assert sum(with_targets.loaded) < 300
        b.update(plain)
        assert (a.get_metadata("position") == b.get_metadata("position")).all()
        assert min(plain.loaded) >= 1
        c.update(with_targets, group=np.arange(300) >= 299)  # one sample of a class of its own
        assert 299 in c.get_metadata("position")
    with GreedyClassBalancingBuffer(4) as buffer:
        with pytest.raises(SchemaError, match="balances over classes: give group"):
            buffer.add(np.zeros((2, 3)))
        buffer.add(np.arange(8.0), group=[0, 0, 0, 0, 0, 0, 7, 9])
        assert {6, 7} <= set(buffer.get_metadata("position").tolist())


# -- what one buffer shows for all ---------------------------------------------------------------------------------------


def test_tensors(where: Path | None) -> None:
    with ReservoirBuffer(8, where) as buffer:
        x = torch.arange(16, dtype=torch.float32, requires_grad=True).reshape(8, 2)
        buffer.add((x, torch.arange(8)), metadata={"h": torch.ones(8, 3, dtype=torch.bfloat16)})
        (got, y), meta = buffer.get(range(8))
        np.testing.assert_array_equal(got, x.detach().numpy())
        assert y.dtype == np.int64 and meta["h"].dtype == np.uint16  # the core keeps bfloat16's bits
        buffer.add((x.detach().numpy(), np.arange(8)), metadata={"h": torch.ones(8, 3, dtype=torch.bfloat16).t().contiguous().t()})
        assert buffer.seen == 16 and buffer.check() == []


def test_update_at_a_position() -> None:
    """What is known already is not loaded, nor counted."""
    dataset = Images(5000)
    with ReservoirBuffer(20, schema=Schema.from_sample(dataset[0])) as buffer:
        buffer.update(dataset)
        dataset.loaded = [0] * 5000
        buffer.update(dataset, at=5000 - 100)
        assert buffer.seen == 4900 + 5000 and sum(dataset.loaded) <= 20


def test_groups_are_labels_or_what_is_given(tmp_path: Path) -> None:
    path = tmp_path / "g.h5"
    with ReservoirBuffer(10, path) as buffer:
        buffer.add((np.zeros((3, 2)), np.array([7, -2, 2**40])))
        buffer.add((np.zeros((2, 2)), np.array([1, 1])), group=[5, 6])
    with h5py.File(path) as file:
        assert file["index/group"][:5].tolist() == [7, -2, 2**40, 5, 6]


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


def test_infinite_buffer(where: Path | None) -> None:
    path = None if where is None else where.with_suffix("")
    with InfiniteBuffer(path, rows_per_part=16) as buffer:
        feed(buffer, 0, 100)
        assert (len(buffer), buffer.seen, buffer.max_size) == (100, 100, None)
        assert_samples(*buffer.sample(100))
        assert_samples(*buffer.get([0, 99, 17, 16, 15]))
        with pytest.raises(leanreplay.ArgumentError, match="grows by itself"):
            buffer.resize(5)
    if path is not None:
        assert len(list(path.glob("part-*.h5"))) == 7
        with leanreplay.open(path, mode="r+") as buffer:
            feed(buffer, 100, 130)
            assert_samples(*buffer.get(range(130)))
