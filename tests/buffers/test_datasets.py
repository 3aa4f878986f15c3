"""`update`: the same rows however the items lie, and no item made that is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset  # noqa: E402

from leanreplay import (  # noqa: E402
    ArgumentError,
    ClassBalancedBuffer,
    ExperienceBalancedBuffer,
    GreedyClassBalancingBuffer,
    HerdingSelection,
    InfiniteBuffer,
    ParametricBuffer,
    ReservoirBuffer,
    Schema,
    SchemaError,
    SlidingWindowBuffer,
)
from leanreplay.storage import writer as writer_module  # noqa: E402

N = 90
BUFFERS = {
    "reservoir": lambda path: ReservoirBuffer(20, path, seed=3),
    "window": lambda path: SlidingWindowBuffer(20, path, seed=3),
    "greedy": lambda path: GreedyClassBalancingBuffer(20, path, seed=3),
    "balanced": lambda path: ClassBalancedBuffer(20, path, seed=3),
    "experience": lambda path: ExperienceBalancedBuffer(20, path, seed=3),
    "parametric": lambda path: ParametricBuffer(20, path, seed=3, groupby="class"),
    "infinite": lambda path: InfiniteBuffer(path, rows_per_part=32, seed=3),
}


def tensors(n: int = N) -> tuple[Any, Any]:
    p = torch.arange(n)
    return (p[:, None] * torch.arange(1, 13) % 251).to(torch.uint8).reshape(n, 3, 4), p * 7919 % 5


class Counted(Dataset[Any]):
    """The items of another dataset, counting how many are made."""

    def __init__(self, items: Any, targets: Any = None) -> None:
        self.items, self.made = items, 0
        if targets is not None:
            self.targets = targets

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        self.made += 1
        return self.items[i]


def image(buffer: Any) -> list[Any]:
    (x, y), meta = buffer.get(buffer.get_metadata("idx"))
    groups = buffer.current.store.index()[1][buffer.get_metadata("idx")]
    return [buffer.seen, x.tolist(), y.tolist(), groups.tolist(), *(meta[name].tolist() for name in sorted(meta))]


def fed(kind: str, path: Any, datasets: Any, **options: Any) -> list[Any]:
    with BUFFERS[kind](path) as buffer:
        for dataset in datasets:
            buffer.update(dataset, **options)
        assert [str(p) for p in buffer.check()] == []
        return image(buffer)


@pytest.mark.parametrize("kind", BUFFERS)
def test_however_they_lie(kind: str, tmp_path: Path) -> None:
    """Tensors, subsets of tensors, items: in two parts the same buffer, and the one that `add` makes."""
    x, y = tensors()
    whole, order = TensorDataset(x, y), torch.randperm(N, generator=torch.Generator().manual_seed(0)).tolist()
    scattered = TensorDataset(x[order], y[order])
    back = [order.index(i) for i in range(N)]
    inner = Subset(scattered, range(N))
    ways: dict[str, Any] = {
        "items": Counted(whole),
        "tensors": whole,
        "a subset": Subset(scattered, back),
        "of a subset": Subset(inner, [i - N if i % 2 else i for i in back]),
        "of a tensor of indices": Subset(scattered, torch.tensor(back)),  # type: ignore[arg-type]
        "items of a subset": Subset(Counted(scattered), back),
        "strided tensors": TensorDataset(torch.stack([x, x], 1)[:, 0], torch.stack([y, y], 1)[:, 1]),
    }
    logits = np.arange(3 * N, dtype=np.float32).reshape(N, 3)
    found = {}
    for name, dataset in ways.items():
        with BUFFERS[kind](tmp_path / name) as buffer:
            for part in (range(40), range(40, N)):
                given: Any = Subset(dataset, part)
                if name in ("tensors", "strided tensors"):
                    given = TensorDataset(*(t[part.start : part.stop] for t in dataset.tensors))
                buffer.update(given, metadata={"logits": logits[part.start : part.stop]})
            assert [str(p) for p in buffer.check()] == []
            found[name] = image(buffer)
    with BUFFERS[kind](tmp_path / "add") as buffer:
        for part in (slice(0, 40), slice(40, N)):
            extra = {"experience": part.start // 40} if kind == "experience" else {}
            buffer.add((x[part], y[part]), metadata={"logits": logits[part]}, **extra)
        found["add"] = image(buffer)
    assert len(found["items"][2]) == (N if kind == "infinite" else 20)
    for name, one in found.items():
        assert one == found["items"], name


class Decoding(Counted):
    """A dataset whose items two processes make, in the order of the indices."""

    asked = 0

    def __getitems__(self, indices: list[int]) -> list[Any]:
        self.asked += 1
        return list(DataLoader(Subset(self.items, indices), batch_size=None, num_workers=2))


class Short(Counted):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self.items[indices[0]]]


class Shifted(Decoding):
    """Its [i] is its own, but not `__getitems__`, which would give other samples."""

    def __getitem__(self, i: int) -> Any:
        x, y = super().__getitem__(i)
        return x + 1, y


def test_many_items_at_once(tmp_path: Path) -> None:
    """Made by worker processes, the same rows; what is wrong with an item, or their number, is said."""
    x, y = tensors()
    dataset = Decoding(TensorDataset(x, y))
    assert fed("reservoir", tmp_path / "many", [dataset]) == fed("reservoir", tmp_path / "one", [Counted(TensorDataset(x, y))])
    assert dataset.asked == 1
    shifted = fed("reservoir", tmp_path / "shifted", [Shifted(TensorDataset(x, y))])
    assert shifted == fed("reservoir", tmp_path / "plus one", [TensorDataset(x + 1, y)])
    with ReservoirBuffer(20) as buffer:
        buffer.add((x, y))
        with pytest.raises(SchemaError, match="item 1 of the dataset: data/0"):
            buffer.update(Decoding(Counted(list(zip([x[0], x[1, :1], x[2]], y[:3], strict=True)))))
        with pytest.raises(ArgumentError, match=r"Short.__getitems__ gave 1 items for \d+ indices"):
            buffer.update(Short(TensorDataset(x, y)))


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("kind", ["reservoir", "balanced"])
def test_what_was_seen_is_skipped(kind: str, at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`at` falls within the tensors, and commits begin anywhere in them."""
    monkeypatch.setattr(writer_module, "ONE_CALL", at_once)
    monkeypatch.setattr("leanreplay.buffers.feeding.MAX_PLANNED", 7)
    x, y = tensors()
    want = fed(kind, None, [Counted(TensorDataset(x, y))])
    with BUFFERS[kind](tmp_path / "b.h5") as buffer:
        buffer.update(TensorDataset(x[:31], y[:31]))
        buffer.update(TensorDataset(x[11:60], y[11:60]), at=11)
        buffer.update(Subset(TensorDataset(x, y), range(N)), at=0)
        assert image(buffer) == want


def test_no_item_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors none but the first, which tells the schema; of a subset of something else those that stay."""
    x, y = tensors()
    made = []
    item = TensorDataset.__getitem__
    monkeypatch.setattr(TensorDataset, "__getitem__", lambda self, i: made.append(i) or item(self, i))
    for kind in BUFFERS:
        if kind != "infinite":
            made.clear()
            fed(kind, None, [TensorDataset(x, y), Subset(TensorDataset(x, y), range(50))])
            assert made == [0], kind
    with ClassBalancedBuffer(10) as buffer:
        items = Counted(TensorDataset(x, y), y.tolist())
        buffer.update(Subset(Subset(items, range(1, N)), range(0, N - 1, 2)))
        assert buffer.seen == 45
        assert items.made == 11
    with ClassBalancedBuffer(10) as buffer:  # nobody says the labels: each item is made for its own, and again if it stays
        items = Counted(TensorDataset(x, y))
        buffer.update(Subset(items, range(45)))
        assert items.made == 1 + 45 + 10


def test_one_of_its_own_is_asked_for_items() -> None:
    """A TensorDataset of somebody's own may make its items otherwise."""

    class Halved(TensorDataset):
        def __getitem__(self, i: int) -> Any:
            x, y = super().__getitem__(i)
            return x // 2, y

    class Backwards(Subset[Any]):
        def __getitem__(self, i: Any) -> Any:
            return super().__getitem__(len(self) - 1 - i)

        def __getitems__(self, indices: Any) -> Any:
            raise NotImplementedError

    x, y = tensors()
    with SlidingWindowBuffer(N) as buffer:
        buffer.update(Halved(x, y))
        assert (buffer.get(range(N))[0][0] == (x // 2).numpy()).all()
    with SlidingWindowBuffer(N) as buffer:
        buffer.update(Backwards(TensorDataset(x, y), range(N)))
        assert (buffer.get(range(N))[0][0] == x.flip(0).numpy()).all()


def test_tensors_that_do_not_fit() -> None:
    x, y = tensors()
    with SlidingWindowBuffer(N) as buffer:
        buffer.update(TensorDataset(x, y))
        for other in (TensorDataset(x.float(), y), TensorDataset(x[:, :2], y), TensorDataset(x, y.int()), TensorDataset(x)):
            for dataset in (other, Subset(other, range(5))):
                with pytest.raises(SchemaError, match=r"data/0|data/1|data: "):
                    buffer.update(dataset)
        assert buffer.seen == N
        with pytest.raises(IndexError):
            buffer.update(Subset(TensorDataset(x, y), [0, N]))
        with pytest.raises(SchemaError, match="metadata/z"):
            ReservoirBuffer(5).update(TensorDataset(x, y), metadata={"z": np.zeros(N - 1)})
        assert buffer.check() == []


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to(torch.bfloat16),
        lambda x: x.to(torch.float64).requires_grad_(),
        lambda x: torch.complex(x.float(), -x.float()).conj(),
        lambda x: x.transpose(1, 2),
        lambda x: x[:, 0, 0] > 100,
    ],
)
def test_kinds_of_tensors(change: Any) -> None:
    x = change(tensors()[0])
    found = []
    for dataset in (TensorDataset(x), Subset(TensorDataset(x), range(N)), Counted(TensorDataset(x))):
        with ReservoirBuffer(30, seed=1) as buffer:
            buffer.update(dataset)
            (rows,), meta = buffer.get(buffer.get_metadata("idx"))
            found.append((rows.dtype, rows.tobytes(), meta["position"].tolist()))
    assert found[0] == found[1] == found[2]


def test_no_labels_in_tensors() -> None:
    """Single tensors have none: a balanced buffer says so, others go on without."""
    x, _ = tensors()
    with pytest.raises(SchemaError, match="pairs with an integer label"):
        ClassBalancedBuffer(5).update(TensorDataset(x))
    with pytest.raises(SchemaError, match="pairs with an integer label"):
        ClassBalancedBuffer(5).update(Counted(TensorDataset(x)))
    with ReservoirBuffer(5) as buffer:
        buffer.update(TensorDataset(x))
        assert (buffer.current.store.index()[1] == -1).all()


def test_features_of_tensors() -> None:
    x, y = tensors()
    orders = []
    for dataset in (TensorDataset(x, y), Counted(TensorDataset(x, y)), Subset(TensorDataset(x, y), range(N))):
        with ParametricBuffer(12, groupby="class", selection_strategy=HerdingSelection()) as buffer:
            buffer.update(dataset, features=x.reshape(N, -1).numpy().astype(np.float32))
            orders.append({g: buffer.get_metadata("position", buffer.group_rows(g)).tolist() for g in buffer.group_sizes()})
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda() -> None:
    x, y = tensors()
    found = [fed("reservoir", None, [TensorDataset(a.to(where), b.to(where))]) for a, b in [(x, y)] for where in ("cpu", "cuda")]
    found.append(fed("reservoir", None, [Subset(TensorDataset(x.cuda(), y.cuda()), range(N))]))
    assert found[0] == found[1] == found[2]


class Labelled(Counted):
    """Targets that a test chooses, a property that raises among them; items say the label, too."""

    def __init__(self, targets: Any) -> None:
        super().__init__(TensorDataset(*tensors()))
        self.given = targets

    @property
    def targets(self) -> Any:
        if self.given is NotImplementedError:
            raise NotImplementedError
        return self.given


ODD = {
    "raises": NotImplementedError,
    "none": None,
    "too few": [0] * (N - 1),
    "boxes": [[1, 2], [3]] * (N // 2),
    "pairs": np.zeros((N, 2), int),
    "text": "x" * N,
    "a dict": dict.fromkeys(range(N), 1),
    "a set": set(range(N)),
    "floats": np.linspace(0, 1, N),
    "a gradient": torch.rand(N, requires_grad=True),
    "conjugates": torch.zeros(N, dtype=torch.complex64).conj(),
    "bfloat16": torch.zeros(N, dtype=torch.bfloat16),
    "sparse": torch.zeros(N).to_sparse(),
    "meta": torch.zeros(N, dtype=torch.long, device="meta"),
    "masked": np.ma.masked_array(np.zeros(N, int), np.arange(N) % 2),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("kind", ["reservoir", "balanced"])
def test_targets_that_are_no_labels(kind: str, name: str) -> None:
    """Within a Subset they are left alone, as those of the dataset itself are: the items tell their labels."""
    want = fed(kind, None, [Counted(TensorDataset(*tensors()))])
    assert fed(kind, None, [Subset(Labelled(ODD[name]), range(N))]) == want
    if name != "raises":
        assert fed(kind, None, [Labelled(ODD[name])]) == want


def test_targets_within_count() -> None:
    """Those of the outermost dataset that has as many as items."""
    inner = Labelled((tensors()[1] + 10).tolist())
    with ClassBalancedBuffer(20) as buffer:
        buffer.update(Subset(Subset(inner, range(5, N)), range(40)))
        assert set(buffer.group_sizes()) == {10, 11, 12, 13, 14}
        outer = Subset(inner, range(40))
        outer.targets = [7] * 40  # type: ignore[attr-defined]
        buffer.update(outer)
        assert set(buffer.group_sizes()) == {7, 10, 11, 12, 13, 14}


@pytest.mark.parametrize(
    "indices",
    [
        np.arange(N)[::-1],
        np.arange(N, dtype=np.uint8),
        torch.arange(N),
        [-1, 0, 1, -N, N - 1] * 3,
        [True, False] * 5,
        [np.int64(3), 4],
        np.zeros(3, bool),
        [],
        [0, N],
        [-N - 1],
        [0.0, 1.0],
    ],
)
def test_odd_indices(indices: Any) -> None:
    """As the items of the same Subset have it, errors too; the indices are left as they are."""
    whole = TensorDataset(*tensors())
    before = list(indices)
    ends = []
    for dataset in (Subset(whole, indices), Subset(Counted(whole), indices)):
        with ReservoirBuffer(12, seed=1) as buffer:
            try:
                buffer.update(dataset)
                ends.append(image(buffer) if buffer.seen else 0)
            except Exception as error:
                ends.append(type(error))
    assert ends[0] == ends[1]
    assert all(a == b for a, b in zip(before, list(indices), strict=True))


def test_keys_that_are_no_indices() -> None:
    class Keyed(Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, key: Any) -> Any:
            return np.array(key[0]), len(key)

    for keys in ([(0, 1), (2,)], [(0, 1), (2, 3)], ["a", "b"]):
        with SlidingWindowBuffer(5) as buffer:
            buffer.update(Subset(Keyed(), keys if keys[0] != "a" else [(5,), (6,)]))  # type: ignore[arg-type]
            assert buffer.seen == 2


@pytest.mark.parametrize(
    "change", [np.asfortranarray, lambda z: np.repeat(z, 2, 1)[:, ::2], lambda z: z.tolist(), lambda z: z.astype(">f4")]
)
def test_metadata_beside_tensors(change: Any) -> None:
    x, y = tensors()
    z = np.arange(3 * N, dtype=np.float32).reshape(N, 3)
    schema = Schema.from_batch((x, y), {"z": z})
    ends = []
    for dataset in (TensorDataset(x, y), Counted(TensorDataset(x, y))):
        with ReservoirBuffer(30, seed=1, schema=schema) as buffer:
            try:
                buffer.update(dataset, metadata={"z": change(z)})
                ends.append(image(buffer))
            except SchemaError as error:
                ends.append(str(error))
    assert ends[0] == ends[1]


def test_items_seen_before_are_not_made() -> None:
    x, y = tensors()
    items = Counted(TensorDataset(x, y))
    with ClassBalancedBuffer(4) as buffer:
        buffer.update(items)
        items.made = 0
        buffer.update(items, at=0)
        assert items.made == 0
        buffer.update(Counted(TensorDataset(*tensors(N + 3))), at=0)
        assert buffer.seen == N + 3
    single = Counted(TensorDataset(x))
    with ReservoirBuffer(4) as buffer:
        buffer.update(single)
        buffer.update(single, at=0)
        assert buffer.seen == N


def test_tasks_beside_tensors() -> None:
    """groupby="task" of metadata that comes with a dataset."""
    x, y = tensors()
    with ParametricBuffer(12, groupby="task") as buffer:
        buffer.update(TensorDataset(x, y), metadata={"task": np.arange(N) // 30})
        assert buffer.group_sizes() == {0: 4, 1: 4, 2: 4}
