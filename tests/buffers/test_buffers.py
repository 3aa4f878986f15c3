"""The public interface for each of the four buffers, in RAM and on disk: what holds for one must hold for all.

Then what one of them shows for all, since it is the same code.
"""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from storage_kernels import kernel

import leanreplay
from leanreplay import (
    CapacityWarning,
    ClassBalancedBuffer,
    DataBuffer,
    ExistsError,
    ExperienceBalancedBuffer,
    GreedyClassBalancingBuffer,
    InfiniteBuffer,
    LeanReplayError,
    LockedError,
    MismatchError,
    MissingError,
    ModeError,
    ParametricBuffer,
    Plan,
    Policy,
    ReservoirBuffer,
    RowError,
    Schema,
    SchemaError,
    SlidingWindowBuffer,
    StateError,
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


def digits(start: int, stop: int) -> tuple[Any, Any]:
    """Images of one value, their position, and a label."""
    p = np.arange(start, stop)
    return np.ones((1, 4, 4), np.float32) * p[:, None, None, None].astype(np.float32), p % 3


def logits(start: int, stop: int) -> Any:
    return np.stack([np.arange(start, stop), -np.arange(start, stop)], 1).astype(np.float32)


def feed(buffer: Any, start: int, stop: int) -> None:
    buffer.add(digits(start, stop), metadata={"logits": logits(start, stop)})


def filled(kind: str, path: Any = None, n: int = 30, **options: Any) -> Any:
    buffer = KINDS[kind](path, **options)
    feed(buffer, 0, n)
    return buffer


def assert_samples(batch: Any, meta: Any) -> None:
    """Each row is the sample of its position."""
    x, y = batch
    p = meta["position"]
    assert x.shape == (len(p), 1, 4, 4)
    assert (x == p[:, None, None, None]).all()
    assert (y == p % 3).all()
    assert (meta["logits"] == np.stack([p, -p], 1)).all()


@pytest.fixture(params=["memory", "disk"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return None if request.param == "memory" else tmp_path / "replay.h5"


# -- reading -----------------------------------------------------------------------------------------------------------


@every_kind
def test_sample(kind: str, where: Path | None) -> None:
    """With metadata, rows and positions; distinct without `replace`; none at all; what it returns can be asked for again."""
    with filled(kind, where, seed=0) as buffer:
        batch, meta = buffer.sample(8)
        assert sorted(meta) == ["idx", "logits", "position"]
        assert_samples(batch, meta)
        assert len(set(meta["idx"].tolist())) == 8
        assert_samples(*buffer.get(meta["idx"][::-1]))
        assert_samples(*buffer.get(torch.as_tensor(meta["idx"])))
        assert_samples(*buffer.sample(100, replace=True))
        assert buffer.sample(0)[0][0].shape == (0, 1, 4, 4)
        assert buffer.check() == []


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


@every_kind
def test_map_style_dataset(kind: str) -> None:
    """len, [i], negative i, iteration, and the batched __getitems__ that torch's DataLoader calls."""
    with filled(kind) as buffer:
        n = len(buffer)
        (x, y), meta = buffer[3]
        assert x.shape == (1, 4, 4)
        assert (float(x[0, 0, 0]), int(y)) == (meta["position"], meta["position"] % 3)
        assert isinstance(meta["idx"], int)
        assert buffer[-1][1]["position"] == buffer[n - 1][1]["position"]
        assert [m["idx"] for _, m in buffer.__getitems__([2, 0, -1])] == [2, 0, n - 1]
        assert [m["position"] for _, m in buffer] == buffer.get_metadata("position").tolist()
        assert buffer.__getitems__([]) == []
        with pytest.raises(RowError, match=f"index {n} of a buffer of {n}"):
            buffer[n]
        with pytest.raises(IndexError):
            buffer[-n - 1]


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


# -- metadata ----------------------------------------------------------------------------------------------------------


@every_kind
def test_set_metadata(kind: str, where: Path | None) -> None:
    """All rows, some, a row twice (the last value counts), only where a position still stands; samples are untouched."""
    with filled(kind, where, n=12) as buffer:
        before = buffer.get_metadata("logits")
        buffer.set_metadata("logits", before + 1)
        buffer.set_metadata("logits", np.full((3, 2), 7, np.float32), rows=[4, 1, 2])
        two = np.array([[1, 1], [2, 2]], np.float32)
        buffer.set_metadata("logits", two, rows=[5, 5])
        position = buffer.get_metadata("position", rows=[6, 7])
        buffer.set_metadata("logits", two, rows=[6, 7], positions=[position[0], position[1] + 1])
        wanted = before + 1
        wanted[[1, 2, 4]], wanted[5], wanted[6] = 7, 2, 1
        assert (buffer.get_metadata("logits") == wanted).all()
        assert (buffer.get(range(12))[0][0][:, 0, 0, 0] == buffer.get_metadata("position")).all()
        with pytest.raises(SchemaError, match="no metadata 'logit'; the buffer has \\['logits'\\]"):
            buffer.get_metadata("logit")
        with pytest.raises(RowError, match="rows in use are 0 to"):
            buffer.set_metadata("logits", two, rows=[0, 12])
        assert buffer.check() == []


@bounded
def test_metadata_added_later(kind: str, where: Path | None) -> None:
    """A new name adds a field, for all samples at once; later batches must give it too; restore points end."""
    with filled(kind, where) as buffer:
        state = buffer.state_dict()
        features = np.arange(12 * 5, dtype=np.float64).reshape(12, 5)
        with pytest.raises(SchemaError, match="values for all 12 samples"):
            buffer.set_metadata("features", features[:2], rows=[0, 1])
        buffer.set_metadata("features", features)
        batch, meta = buffer.sample(5)
        assert_samples(batch, meta)
        assert (meta["features"] == features[meta["idx"]]).all()
        with pytest.raises(SchemaError, match=r"missing \['features'\]"):
            feed(buffer, 30, 31)
        buffer.add(digits(30, 31), metadata={"logits": logits(30, 31), "features": features[:1]})
        with pytest.raises(StateError):
            buffer.load_state_dict(state)
        assert buffer.check() == []
    if where is not None:
        with leanreplay.open(where) as buffer:
            assert buffer.get_metadata("features").shape == (12, 5)


# -- states and copies -------------------------------------------------------------------------------------------------


@every_kind
def test_state_dict_in_a_checkpoint(kind: str, where: Path | None, tmp_path: Path) -> None:
    """Train, checkpoint, train on, go back, and go on as if never interrupted: the same rows, the same draws."""
    with filled(kind, where) as buffer:
        buffer.sample(3)
        torch.save(buffer.state_dict(), tmp_path / "checkpoint.pt")
        before = buffer.get_metadata("position").tolist()

        def go_on() -> list[Any]:
            found = [buffer.sample(4)[1]["idx"].tolist()]
            feed(buffer, 30, 55)
            buffer.set_metadata("logits", logits(0, len(buffer)))
            return [*found, buffer.sample(4)[1]["position"].tolist(), buffer.get_metadata("position").tolist()]

        first = go_on()
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        for _ in range(2):
            buffer.load_state_dict(state)
            assert (buffer.seen, buffer.get_metadata("position").tolist()) == (30, before)
            assert_samples(*buffer.get(buffer.get_metadata("idx")))
            assert go_on() == first
        assert buffer.check() == []
    with KINDS[kind]() as other, pytest.raises(StateError, match="another buffer"):
        other.add(digits(0, 1))
        other.load_state_dict(state)


@every_kind
def test_save_and_load(kind: str, where: Path | None, tmp_path: Path) -> None:
    """The whole buffer into a folder and back, draws included; into another buffer of the same parameters, and no other."""
    folder = tmp_path / "copies" / "1"
    with filled(kind, where, seed=4) as buffer:
        buffer.sample(2)
        buffer.save(folder)
        drawn = buffer.sample(6)[1]["position"].tolist()
        kept = buffer.get_metadata("position").tolist()
        feed(buffer, 30, 90)
        buffer.load(folder)
        assert (buffer.seen, buffer.get_metadata("position").tolist()) == (30, kept)
        assert buffer.sample(6)[1]["position"].tolist() == drawn
        feed(buffer, 30, 31)
        assert buffer.check() == []
    with KINDS[kind](tmp_path / "other.h5" if where is None else None, seed=4) as other:
        other.load(folder)
        assert other.sample(6)[1]["position"].tolist() == drawn
        assert other.check() == []
    with KINDS[kind](seed=5) as other, pytest.raises(MismatchError, match="seed"):
        other.load(folder)
    with KINDS[kind](seed=4) as other, pytest.raises(MissingError, match=r"no state\.json"):
        other.load(tmp_path)


# -- files and modes ---------------------------------------------------------------------------------------------------


@every_kind
def test_modes(kind: str, tmp_path: Path) -> None:
    """h5py's modes: x creates and refuses, a opens or creates, r+ opens, r reads beside a writer, w replaces."""
    path, make = tmp_path / "b.h5", KINDS[kind]
    for mode in ("r", "r+"):
        with pytest.raises(MissingError):
            make(path, mode=mode)
    filled(kind, path, seed=6).close()
    with pytest.raises(ExistsError, match="mode='r\\+' or 'a', or replace it with mode='w'"):
        make(path)
    with make(path, mode="r") as buffer:
        assert (buffer.seen, buffer.seed, buffer.mode) == (30, 6, "r")
        with pytest.raises(ModeError, match="reading only"):
            feed(buffer, 30, 31)
    with make(path, mode="a") as buffer:
        assert buffer.seen == 30
        with pytest.raises(LockedError, match="in this very process"):
            make(path, mode="a")
        with make(path, mode="r") as reader:
            feed(buffer, 30, 33)
            assert reader.seen == 33
            assert_samples(*reader.sample(5))
    with make(path, mode="r+", seed=6) as buffer:
        assert buffer.seen == 33
    with pytest.raises(MismatchError, match=r"seed=7 \(file: 6\)"):
        make(path, mode="r+", seed=7)
    with make(path, mode="w", seed=7) as buffer:
        buffer.add(np.zeros(3), group=[0, 0, 0])
        assert (buffer.seen, buffer.seed) == (3, 7)
    with make(tmp_path / "new.h5", mode="a") as buffer:
        assert (len(buffer), buffer.schema) == (0, None)


@every_kind
def test_open_by_path_alone(kind: str, tmp_path: Path) -> None:
    """leanreplay.open finds class and parameters in the file, for reading and for going on."""
    path = tmp_path / "b.h5"
    with filled(kind, path, seed=2, stream=9) as buffer:
        cls, kept = type(buffer), buffer.get_metadata("position").tolist()
    with leanreplay.open(path) as buffer:
        assert type(buffer) is cls
        assert (buffer.mode, buffer.seed, buffer.stream) == ("r", 2, 9)
        assert buffer.get_metadata("position").tolist() == kept
    with leanreplay.open(str(path), mode="r+", transform=lambda x: -x) as buffer:
        feed(buffer, 30, 40)
        assert (buffer[0][0][0] <= 0).all()
    with pytest.raises(MissingError):
        leanreplay.open(tmp_path / "none.h5")


@every_kind
def test_what_a_buffer_says(kind: str, where: Path | None) -> None:
    """repr, path, schema, nbytes, before the first batch, after it, and closed."""
    buffer = KINDS[kind](where, seed=3)
    assert isinstance(buffer, DataBuffer)
    assert (len(buffer), buffer.seen, buffer.nbytes, buffer.schema) == (0, 0, 0, None)
    assert type(buffer).__name__ in repr(buffer)
    buffer.add(digits(0, 30))
    assert str(buffer.schema) == "Schema(data/0: f4[1, 4, 4], data/1: i8[])"
    assert buffer.path == (None if where is None else str(where))
    assert "seen=30" in repr(buffer)
    if where is None:
        assert buffer.nbytes > len(buffer) * (64 + 8)
    else:
        files = [where] if where.is_file() else list(where.glob("part-*.h5"))
        assert buffer.nbytes == sum(os.path.getsize(f) for f in files)
        assert str(where) in repr(buffer)
    buffer.flush()
    with buffer as same:
        assert same is buffer
    buffer.close()  # once more
    assert "closed" in repr(buffer)
    with pytest.raises(ModeError, match="is closed; open it again"):
        len(buffer)


@bounded
def test_resize(kind: str, where: Path | None) -> None:
    """Down and up, samples intact; a reservoir that dropped some says that it cannot use more rows."""
    with filled(kind, where) as buffer:
        before = set(buffer.get_metadata("position").tolist())
        buffer.resize(5)
        assert (len(buffer), buffer.max_size) == (5, 5)
        assert set(buffer.get_metadata("position").tolist()) <= before
        assert_samples(*buffer.sample(5))
        if kind == "reservoir":
            with pytest.warns(CapacityWarning, match="already dropped samples at 5 rows"):
                buffer.resize(20)
        else:
            buffer.resize(20)
        feed(buffer, 30, 60)
        assert (len(buffer), buffer.max_size) == (5 if kind == "reservoir" else 20, 20)
        assert_samples(*buffer.sample(5))
        assert buffer.check() == []
    if where is not None:
        with leanreplay.open(where) as buffer:
            assert buffer.max_size == 20


# -- threads -----------------------------------------------------------------------------------------------------------


@every_kind
def test_threads(kind: str, where: Path | None) -> None:
    """Four threads add, four read at once: every batch counts once, no sample is torn, the file is clean."""
    buffer = KINDS[kind](where, schema=Schema.from_sample((np.zeros((1, 4, 4), np.float32), 0), {"mine": np.int64(0)}))
    errors: list[BaseException] = []
    adding = threading.Event()
    adding.set()

    def guarded(work: Callable[[int], None], number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    def add(number: int) -> None:
        for start in range(number * 1000, number * 1000 + 180, 3):
            value = np.arange(start, start + 3)
            x = np.ones((3, 1, 4, 4), np.float32) * value[:, None, None, None].astype(np.float32)
            buffer.add((x, value), metadata={"mine": value})

    def read(number: int) -> None:
        while adding.is_set():
            if len(buffer) >= 3:
                (x, y), meta = buffer.sample(3)
                assert (x == y[:, None, None, None]).all()
                assert (meta["mine"] == y).all()
                buffer.get_metadata("position")

    adders = [threading.Thread(target=guarded, args=(add, n)) for n in range(4)]
    readers = [threading.Thread(target=guarded, args=(read, n)) for n in range(4)]
    for thread in adders + readers:
        thread.start()
    for thread in adders:
        thread.join()
    adding.clear()
    for thread in readers:
        thread.join()
    assert errors == []
    assert buffer.seen == 4 * 180
    assert buffer.check() == []
    if kind == "infinite":
        assert sorted(buffer.get_metadata("mine").tolist()) == sorted(n * 1000 + i for n in range(4) for i in range(180))
    buffer.close()


# -- what one buffer shows for all ---------------------------------------------------------------------------------------


def test_samples_are_copies(where: Path | None) -> None:
    with ReservoirBuffer(10, where) as buffer:
        feed(buffer, 0, 10)
        (x, _), meta = buffer.get([3])
        x[:] = -1
        meta["logits"][:] = -1
        assert_samples(*buffer.get([3]))
        data = digits(10, 11)
        buffer.add(data, metadata={"logits": logits(10, 11)})
        data[0][:] = -1
        assert_samples(*buffer.get(range(len(buffer))))


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
        assert calls == [(1, 4, 4)] * 4
        np.testing.assert_array_equal(x[:, 0, 0, 0], 2 * meta["position"])
        np.testing.assert_array_equal(y, meta["position"] % 3 + 100)
        (x1, y1), meta1 = buffer[2]
        assert (x1 == 2 * meta1["position"]).all() and y1 == meta1["position"] % 3 + 100
        buffer.transform = buffer.target_transform = None
        assert_samples(*buffer.get(range(10)))


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
        buffer.add(digits(30, 105), metadata={"logits": logits(30, 105)}, at=30)  # 70 of them are known
        assert buffer.seen == 105
        buffer.load_state_dict(states[1])
        assert buffer.seen == 60
        with pytest.raises(leanreplay.StateError, match="30 behind"):
            buffer.load_state_dict(states[2])


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


def test_copies_of_the_object_read(where: Path | None) -> None:
    with ReservoirBuffer(20, where) as buffer:
        feed(buffer, 0, 50)
        with pickle.loads(pickle.dumps(buffer)) as other:
            assert_samples(*other.sample(5))
            assert other.mode == "r"
        assert_samples(*buffer.sample(5))
