"""What people who come from elsewhere give to constructors, `add` and `update`: taken as meant, or refused with a way out that works."""

from __future__ import annotations

import functools
import os
import pickle
from collections import namedtuple
from collections.abc import MutableMapping
from unittest import mock

import numpy as np
import pytest
from inputs import IMAGES, Frame, N, X, Y, added, refused, updated

import leanreplay as lr

torch = pytest.importorskip("torch")

from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset  # noqa: E402

from leanreplay.torch import BufferDataset  # noqa: E402

# -- constructors ---------------------------------------------------------------------------------------------------------

SIZED = [
    lr.ReservoirBuffer, lr.SlidingWindowBuffer, lr.GreedyClassBalancingBuffer, lr.ClassBalancedBuffer, lr.ExperienceBalancedBuffer,
    lr.ClassBalancingReservoirBuffer, lr.WeightedReservoirBuffer, lr.ParametricBuffer,
]  # fmt: skip


@pytest.mark.parametrize("cls", [*SIZED, lr.InfiniteBuffer])
def test_what_others_take_in_the_place_of_the_path(cls, tmp_path, monkeypatch):
    """Grouping words, seeds, flags, devices, storage modes, schemas, datasets: refused, and no file is made, nor a descriptor taken."""
    monkeypatch.chdir(tmp_path)
    size = () if cls is lr.InfiniteBuffer else (6,)
    words = ["class", "Experience", "task", "labels", "cuda:0", "cpu", "in_memory", "None"]
    for path in words:
        for mode in ("x", "a", "w"):
            with pytest.raises(lr.ArgumentError, match=r"by name .*or write '\./"):
                cls(*size, path, mode=mode)
    for path in (True, False, 0, 1, 7, np.int64(1), 1.5, torch.device("cpu"), lr.Schema.from_sample(X), {"obs": {}}, [(X, 0)], lambda x: x):
        with pytest.raises(lr.ArgumentError, match=r"(?s)path must be a str or os.PathLike, got .*by name"):
            cls(*size, path)
    assert os.listdir() == []
    with cls(*size, "./class", mode="w") as buffer:  # the way out
        assert buffer.path == "./class"
    with cls(*size, tmp_path / "task") as buffer:
        assert buffer.path == str(tmp_path / "task")


def test_a_file_of_such_a_name_opens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with lr.ReservoirBuffer(5, "./class") as buffer:
        buffer.add((X, Y))
    with lr.open("class") as buffer, lr.ReservoirBuffer(5, "class", mode="r") as other:
        assert buffer.seen == other.seen == N
    with lr.ReservoirBuffer(5, "class", mode="a") as buffer:  # who resumes means what stands there
        assert buffer.seen == N
    with lr.ReservoirBuffer(5, "class", mode="w") as buffer:
        buffer.add((X[:3], Y[:3]))
        assert buffer.seen == 3


@pytest.mark.parametrize(
    "name", ["data", "train", "replay", "memory", "reservoir", "random", "file", "disk", "a", "x", "class0", "task.h5"]
)
def test_names_of_files_are_the_users(name, tmp_path, monkeypatch):
    """Words that no other library takes in the place of the path."""
    monkeypatch.chdir(tmp_path)
    for cls, size in ((lr.ReservoirBuffer, (5,)), (lr.InfiniteBuffer, ())):
        with cls(*size, name, mode="w") as buffer:
            assert buffer.path == name


@pytest.mark.parametrize(
    ("cls", "args", "names"),
    [
        (lr.ClassBalancedBuffer, (100, True, 10), ["max_size and path", "adaptive_size", "total_num_classes", "(100, True, 10)"]),
        (lr.ExperienceBalancedBuffer, (100, True, 5), ["adaptive_size", "num_experiences"]),
        (lr.ParametricBuffer, (6, "class", None), ["groupby", "selection_strategy"]),
        (lr.ParametricBuffer, (6, None, lr.HerdingSelection()), ["groupby", "selection_strategy"]),
        (lr.ReservoirBuffer, (100, None, 0), ["seed", "transform"]),
        (lr.GreedyClassBalancingBuffer, (100, 0, None, None), ["seed", "transform"]),
        (lr.InfiniteBuffer, (100, 0), ["only path", "rows_per_part"]),
    ],
)
def test_more_positional_arguments(cls, args, names):
    with pytest.raises(lr.ArgumentError) as caught:
        cls(*args)
    assert all(name in str(caught.value) for name in (cls.__name__, "by name", *names)), caught.value


@pytest.mark.parametrize("cls", [*SIZED, lr.InfiniteBuffer])
def test_options_that_do_not_exist(cls):
    """Named with the class that was asked, and with what was meant."""
    for option, meant in (("restore_point", "restore_points"), ("target_transforms", "target_transform"), ("storage_mode", "mode")):
        with pytest.raises(lr.ArgumentError) as caught:
            cls(**{option: None})
        assert str(caught.value).startswith(f"{cls.__name__} takes no '{option}'") and meant in str(caught.value)


def test_a_class_of_ones_own_takes_what_it_says(tmp_path):
    class Mine(lr.ReservoirBuffer):
        def __init__(self, a, b, c, **rest):
            self.a, self.own = (a, b, c), rest.pop("own")
            super().__init__(5, tmp_path / "mine", **rest)

    with Mine(1, 2, 3, own=4, seed=7) as buffer:
        assert (buffer.a, buffer.own, buffer.seed) == ((1, 2, 3), 4, 7)


def test_a_constructor_that_is_replaced():
    with mock.patch.object(lr.ReservoirBuffer, "__init__", return_value=None) as made:
        lr.ReservoirBuffer(1, 2, 3, own=4)
    made.assert_called_once_with(1, 2, 3, own=4)


def wrapped(function):
    """What `functools.wraps` gives names the module of what it wraps as its own."""

    @functools.wraps(function)
    def init(self, *args, tag, **options):
        self.tag = tag
        function(self, *args, **options)

    return init


class Wrapped(lr.ReservoirBuffer):
    __init__ = wrapped(lr.ReservoirBuffer.__init__)


class Tagged:
    def __init__(self, *args, tag, **options):
        super().__init__(*args, **options)
        self.tag = tag


class Mixed(Tagged, lr.ReservoirBuffer):
    pass


class New(lr.ReservoirBuffer):
    def __new__(cls, *args, **options):
        options.pop("tag", None)
        made = super().__new__(cls, *args, **options)
        made.tag = 3
        return made

    def __init__(self, *args, tag, **options):
        super().__init__(*args, **options)


class Partial(lr.ReservoirBuffer):
    __init__ = functools.partialmethod(wrapped(lr.ReservoirBuffer.__init__), seed=5)


@pytest.mark.parametrize("cls", [Wrapped, Mixed, New, Partial])
def test_classes_of_the_users_in_other_ways(cls):
    with cls(5, None, tag=3) as buffer:
        assert buffer.tag == 3 and buffer.max_size == 5
        buffer.add((X, Y))
        with pickle.loads(pickle.dumps(buffer)) as copy:
            assert type(copy) is cls and copy.seen == N


# -- lists ----------------------------------------------------------------------------------------------------------------


def test_lists_of_samples_in_place_of_a_batch():
    """Refused with both ways out, which work: stacked, or given to `update`; a tuple says that it is no list of samples."""
    for batch in (IMAGES, IMAGES[:3], IMAGES[:2], [i.transpose(1, 2, 0) for i in IMAGES[:2]], list(X), [torch.tensor(i) for i in IMAGES]):
        message = refused(lambda b, batch=batch: b.add(batch))
        assert "stack them, np.stack(batch), or call" in message and "update(batch)" in message and "tuple(batch)" in message
        one, two = added(np.stack(batch)), updated(batch)
        assert one[1] == two[1] and np.array_equal(one[0], two[0])
        assert len(added(tuple(batch))[0]) == len(batch)
    pairs = [(x, np.eye(4, dtype=np.float32)[i % 4]) for i, x in enumerate(X)]
    for listed in (pairs, pairs[:3], [(np.eye(4), x) for x in X[:3]], [{"x": x, "y": x} for x in X], list(X[:3])):
        message = refused(lambda b, listed=listed: b.add(listed))
        assert "call update(batch)" in message and ("np.stack" in message) == (type(listed[0]) is np.ndarray)
    assert np.array_equal(updated(pairs)[0][0], X)
    assert "update()" in refused(lambda b: b.add([(i, 0) for i in IMAGES]))
    assert "stack" in refused(lambda b: b.add((tuple(IMAGES), Y[:6])))
    for batch in ([], (), [()] * 3, [[]] * 20, {}):
        assert "at least one array" in refused(lambda b, batch=batch: b.add(batch))
    with lr.ReservoirBuffer(5) as buffer:
        buffer.add((X, Y))
        with pytest.raises(lr.SchemaError, match=r"list of samples to update\(\)"):
            buffer.add([(X[0], 0)] * 6)


def test_samples_that_are_lists():
    """What a DataLoader makes of pairs and of several views, and samples of a few arrays in lists, are what they were."""
    views = DataLoader(TensorDataset(torch.tensor(X), torch.tensor(X)), batch_size=N)
    (one, two), schema = added(next(iter(views)))
    assert "data/0: f4[4], data/1: f4[4]" in schema and np.array_equal(one, X) and np.array_equal(two, X)
    assert len(added([X, Y])[0]) == 2
    assert len(added([X, X, Y])[0]) == 3
    for column, size in ((X, N), (np.zeros((9, 3, 8, 8), np.uint8), 9), (np.zeros((1, 10, 7)), 1), (np.zeros((3, 10, 7)), 3)):
        tensors = [torch.tensor(column)] * 3
        triplet, _ = added(next(iter(DataLoader(TensorDataset(*tensors), batch_size=size))))
        assert len(triplet) == 3 and np.array_equal(triplet[2], column)
        assert len(added([column, column])[0]) == 2
    assert len(added([np.zeros((8, 10, 3), np.uint8)] * 2)[0]) == 2
    assert len(added([[X, X, X], Y])[0][0]) == 3
    boxes, schema = updated([([1, 2, 3, 4], 0)] * 5)
    assert schema.count("i8[]") == 5 and boxes[0][2].tolist() == [3] * 5


@pytest.mark.parametrize(
    "values",
    [
        [0.5] * 17,
        (0.5,) * 17,
        [0, 0.5, True] * 6,
        [np.float32(1)] * 20,
        [[1] * 28] * 28,
        [[1] * 8] * 8,
        [[[0] * 2] * 3] * 3,
        [torch.tensor(1)] * 17,
        [{"x": 1, "y": 2}] * 9,
    ],
)
def test_long_lists_are_arrays(values):
    """A list of more than 16 numbers, in rows of a dataset and in schemas: an error instead of hundreds of fields, and arrays work."""
    for item in ((values, 3), {"image": values, "label": 3}, values):
        message = refused(lambda b, item=item: b.update([item] * 9))
        assert "item 0" in message and "np.array(values)" in message
        with pytest.raises(lr.SchemaError, match=r"np\.array\(values\)"):
            lr.Schema.from_sample(item)
    if not isinstance(values[0], dict):
        right = np.array(values)
        assert np.array_equal(updated([(right, 3)] * 9)[0][0], np.stack([right] * 9))


def test_long_lists_in_batches_are_arrays():
    """As torch's default_collate makes them of lists of numbers. Each way out does what it says."""
    (batch,) = DataLoader([{"ids": list(range(i, i + 20)), "label": i % 3} for i in range(N)], batch_size=N)
    message = refused(lambda b: b.add(batch))
    assert "np.stack(values, 1)" in message and "tuple(values)" in message
    found, _ = added({"ids": np.stack(batch["ids"], 1), "label": batch["label"]})
    assert found["ids"].shape == (N, 20) and found["ids"][3].tolist() == list(range(3, 23))
    found, _ = added({"ids": tuple(batch["ids"]), "label": batch["label"]})
    assert len(found["ids"]) == 20 and found["ids"][4].tolist() == list(range(4, 4 + N))


Record = namedtuple("Record", [f"c{i}" for i in range(20)])


def test_samples_of_many_fields():
    """Records are no arrays: names, tuples of arrays, TensorDatasets, lists of arrays such as the hidden states of a model."""
    columns = [X[:, 0] + i for i in range(20)]
    tensors = TensorDataset(*map(torch.tensor, columns))
    rows = [Record(*(float(c[i]) for c in columns)) for i in range(N)]
    for found, schema in (
        added(tuple(columns)),
        updated(tensors),
        updated([tensors[i] for i in range(N)]),
        updated(rows),
        added(Record(*columns)),
    ):
        assert schema.count("f4[]") + schema.count("f8[]") == 20 and all(np.array_equal(a, b) for a, b in zip(found, columns, strict=True))
    for many in ([X] * 24, tuple([X] * 24)):
        assert len(added((X, many))[0][1]) == 24
        assert len(updated([(X[0], [v[0] for v in many])] * 3)[0][1]) == 24
    ragged, schema = updated([[[1] * 10, [2] * 10, 3]] * 3)
    assert schema.count("i8[]") == 21 and ragged[1][9].tolist() == [2] * 3


def test_names_say_that_they_are_different_things():
    row = {f"c{i}": float(i) for i in range(40)}
    found, _ = updated([row] * 3)
    assert len(found) == 40 and found["c39"].tolist() == [39.0] * 3


def test_rows_of_a_hugging_face_dataset():
    class Rows:
        """Rows of lists, as `datasets` gives them without a format."""

        def __init__(self, format=None):
            self.format = format

        def with_format(self, format):
            return Rows(format)

        def __len__(self):
            return 5

        def __getitem__(self, i):
            image = [[i] * 28] * 28
            return {"image": np.array(image) if self.format == "numpy" else image, "label": i}

    assert "dataset.with_format('numpy')" in refused(lambda b: b.update(Rows()))
    found, schema = updated(Rows().with_format("numpy"))
    assert "data/image: i8[28, 28], data/label: i8[]" in schema and found["image"][3, 5, 5] == 3


def test_lists_of_two_lengths():
    with lr.ReservoirBuffer(5) as buffer:
        with pytest.raises(lr.SchemaError, match=r"item 1 .*padded to one"):
            buffer.update([([1, 2, 3], 0), ([1, 2, 3, 4, 5], 1)])
        assert buffer.check() == []


# -- update ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [np.asarray, torch.tensor, lambda v: torch.tensor(v)[::2].repeat_interleave(2, 0), np.asfortranarray])
@pytest.mark.parametrize("cls", [lr.ReservoirBuffer, lr.ClassBalancedBuffer, lr.ExperienceBalancedBuffer, lr.ParametricBuffer])
def test_a_pair_of_arrays_is_a_dataset_of_pairs(cls, make):
    x, y = make(X), make(Y)
    want = TensorDataset(torch.as_tensor(np.asarray(x)), torch.as_tensor(np.asarray(y)))
    options = {"groupby": "class"} if cls is lr.ParametricBuffer else {}
    with cls(7, seed=1, **options) as one, cls(7, seed=1, **options) as two:
        for buffer, dataset in ((one, (x, y)), (two, want), (one, (x[:5], y[:5])), (two, [want[i] for i in range(5)])):
            buffer.update(dataset, metadata={"z": np.arange(len(dataset[0]) if type(dataset) is tuple else len(dataset))})
        assert one.seen == N + 5 and str(one.schema) == str(two.schema)
        for a, b in zip(one.get(range(7))[0], two.get(range(7))[0], strict=True):
            assert np.array_equal(a, b)


def test_pairs_with_weights_and_features():
    with lr.WeightedReservoirBuffer(4) as buffer:
        buffer.update((X, Y), weights=np.arange(N))
        assert buffer.seen == N and len(buffer) == 4
        with pytest.raises(lr.ArgumentError, match="map-style"):
            buffer.update({"x": X}, weights=np.arange(N))
    with lr.ParametricBuffer(6, groupby="class", selection_strategy=lr.HerdingSelection()) as buffer:
        buffer.update((X, Y), features=X)
        assert buffer.seen == N


@pytest.mark.filterwarnings("ignore::UserWarning")  # of nested tensors
def test_pairs_of_arrays_in_files(tmp_path):
    """Of h5py, whose rows are read one by one as they stay, and memmaps; their neighbours in kind too."""
    h5py = pytest.importorskip("h5py")
    x, y = np.memmap(tmp_path / "x", np.float32, "w+", shape=X.shape), np.memmap(tmp_path / "y", np.int64, "w+", shape=Y.shape)
    x[:], y[:] = X, Y
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["x"], file["y"] = X, Y
        for pair in ((x, y), (file["x"], file["y"]), (x, file["y"]), (torch.tensor(X), file["y"])):
            with lr.ClassBalancedBuffer(6, seed=2) as buffer, lr.ClassBalancedBuffer(6, seed=2) as want:
                buffer.update(pair)
                want.update((X, Y))
                for a, b in zip(buffer.get(range(6))[0], want.get(range(6))[0], strict=True):
                    assert np.array_equal(a, b)
    for column in (torch.eye(N).to_sparse(), torch.nested.nested_tensor([torch.rand(2), torch.rand(3)]), np.ma.masked_array(Y, Y == 0)):
        assert "data/1" in refused(lambda b, column=column: b.update((X, column)))


class Lazy:
    """A column in a file of some kind: rows are read one by one, and no one takes all of it."""

    shape, dtype, ndim = X.shape, X.dtype, 2

    def __getitem__(self, i):
        assert isinstance(i, int)
        return X[i]

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("the whole column was read")


def test_columns_in_files_are_read_by_row():
    (x, y), _ = updated((Lazy(), Y))
    assert np.array_equal(x, X) and np.array_equal(y, Y)


def test_pairs_of_tables_and_named_pairs():
    """Columns of pandas or xarray are arrays; a named tuple is a tuple."""
    pair = namedtuple("Pair", "x y")
    for dataset in (pair(X, Y), (Frame(X), Frame(Y)), (X, Frame(Y)), pair(Frame(X), torch.tensor(Y))):
        (x, y), schema = updated(dataset)
        assert np.array_equal(x, X) and np.array_equal(y, Y) and "data/0: f4[4], data/1: i8[]" in schema
    assert len(updated(pair(Y, Y))[0][0]) == N


def test_subsets_of_buffers():
    """Their items have metadata too, which would become samples."""
    buffer = held(lr.ReservoirBuffer(5))
    for dataset in (Subset(buffer, [0, 1]), Subset(Subset(buffer, [0, 1]), [0]), ConcatDataset([[(X[0], 0)], buffer])):
        assert "BufferDataset(buffer)" in refused(lambda b, dataset=dataset: b.update(dataset), lr.ArgumentError)
    (x, _), _ = updated(Subset(BufferDataset(buffer), [0, 1]))
    assert len(x) == 2


def test_tuples_of_arrays_that_are_not_clear():
    assert "differ in length: [12, 11]" in refused(lambda b: b.update((X, Y[:11])), lr.ArgumentError)
    message = refused(lambda b: b.update(tuple(IMAGES)), lr.ArgumentError)
    assert "update(list(arrays))" in message and "add(arrays)" in message
    assert len(updated(list(IMAGES))[0]) == 6 and len(added(tuple(IMAGES))[0]) == 6
    (x, y, t), _ = updated((X, Y, np.arange(N)))
    assert np.array_equal(x, X) and np.array_equal(y, Y) and t.tolist() == list(range(N))
    assert updated(((X[0], 0), (X[1], 1)))[0][1].tolist() == [0, 1]  # a tuple of samples
    assert "tuple (x, y) of arrays" in refused_later([X, Y])


def refused_later(dataset):
    with lr.ReservoirBuffer(5) as buffer, pytest.raises(lr.SchemaError) as caught:
        buffer.update(dataset)
    return str(caught.value)


class Endless(IterableDataset):
    def __iter__(self):
        return iter([(x, 0) for x in X])


class Counted(Endless):
    def __len__(self):
        return N


class Columns(MutableMapping):
    """As a TensorDict behaves: a mapping of names, whose length and items are those of a batch."""

    def __init__(self, **columns):
        self.columns = columns

    def __getitem__(self, key):
        return self.columns[key] if isinstance(key, str) else Columns(**{k: v[key] for k, v in self.columns.items()})

    def keys(self):
        return self.columns.keys()

    def items(self):
        return self.columns.items()

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __contains__(self, key):
        raise NotImplementedError

    def __setitem__(self, key, value):
        raise NotImplementedError

    __delitem__ = None


def test_mappings_that_iterate_over_samples():
    columns = Columns(x=X, y=Y)
    with lr.SlidingWindowBuffer(30) as buffer:
        buffer.add(columns)
        buffer.add(columns)
        buffer.add({"y": Y, "x": X})
        buffer.update([{"x": X[0], "y": Y[0]}])
        assert np.array_equal(buffer.get(range(N, 2 * N))[0]["x"], X) and buffer.seen == 3 * N + 1
        with pytest.raises(lr.SchemaError, match=r"missing \['y'\], unexpected \['z'\]"):
            buffer.add(Columns(x=X, z=Y))


def held(buffer):
    buffer.add((X, Y))
    return buffer


class Indexed(Endless):
    """As datasets that stream and can be indexed too; with what tables have, and whatever else it is asked for."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return X[i], int(Y[i])

    def to_numpy(self):
        return X

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args: None


def test_datasets_with_more_than_a_length_and_items():
    for dataset in (Indexed(), Subset(Indexed(), range(N))):
        (x, y), _ = updated(dataset)
        assert np.array_equal(x, X) and np.array_equal(y, Y)


def test_the_hint_of_pairs_stands_where_it_helps():
    assert "tuple (x, y) of arrays" in refused_later([X, Y.tolist()])
    assert "tuple (x, y)" not in refused_later([(X[0], 0), (X[1], 0.5)])


class NoLength:
    def __len__(self):
        return -1  # noqa: PLE0303

    def __getitem__(self, i):
        return X[i]


@pytest.mark.parametrize(
    ("dataset", "hint"),
    [
        (DataLoader(TensorDataset(torch.tensor(X), torch.tensor(Y)), batch_size=4), "update(loader.dataset)"),
        (DataLoader(Endless(), batch_size=4), "for batch in loader: buffer.add(batch)"),
        ({"x": X, "y": Y}, "add(batch)"),
        ({0: X}, "add(batch)"),
        ({"a": (X[0], 0)}, "update(list(d.values()))"),
        (Frame(X), "update(df.to_numpy())"),
        (type("Series", (list,), {"iloc": None})(Y), "update(df.to_numpy())"),  # of pandas
        (type("Table", (list,), {"to_pydict": None})([X, Y]), "update(df.to_numpy())"),  # of pyarrow
        (held(lr.ReservoirBuffer(5)), "BufferDataset(buffer)"),
        (held(lr.ClassBalancedBuffer(5)).groups[1], "BufferDataset(buffer)"),
        (((x, 0) for x in X), "update(list(samples))"),
        (iter(X), "update(list(samples))"),
        (zip(X, Y, strict=True), "update(list(samples))"),
        (Endless(), "add for batches"),
        (Counted(), "add for batches"),
        ({1, 2}, "update(list(samples))"),
        (NoLength(), "len() and [i]"),
        (7, "len() and [i]"),
        (None, "len() and [i]"),
        (torch.tensor(1.0), "len() and [i]"),
    ],
)
@pytest.mark.parametrize("fed", [False, True])
def test_what_update_does_not_take(dataset, hint, fed):
    with lr.ReservoirBuffer(5) as buffer:
        if fed:
            buffer.add((X, Y))
        with pytest.raises(lr.ArgumentError, match=r"map-style dataset") as caught:
            buffer.update(dataset)
        assert hint in str(caught.value) and type(dataset).__name__ in str(caught.value)
        assert buffer.seen == (N if fed else 0)


def test_the_ways_out_of_update():
    loader = DataLoader(TensorDataset(torch.tensor(X), torch.tensor(Y)), batch_size=5)
    with lr.SlidingWindowBuffer(100) as one, lr.SlidingWindowBuffer(100) as two, lr.SlidingWindowBuffer(100) as three:
        for batch in loader:
            one.add(batch)
        two.update(loader.dataset)
        three.update(list(zip(X, Y, strict=True)))
        for buffer in (one, two, three):
            assert np.array_equal(buffer.get(range(N))[0][0], X) and buffer.seen == N
    assert np.array_equal(updated(Frame(X).to_numpy())[0], X)
    assert added({"x": X, "y": Y})[0].keys() == {"x", "y"}


@pytest.mark.parametrize("error", [KeyError("x"), IndexError("x"), OSError(5, "x"), RuntimeError("x"), ValueError("x")])
@pytest.mark.parametrize("at", [0, 4])
def test_what_a_dataset_raises_comes_through(error, at):
    """It is the user's own, and handlers of the user's are for it; the item is in a note. What was committed before stays whole."""
    with lr.ReservoirBuffer(5) as buffer:
        with pytest.raises(type(error)) as caught:
            buffer.update(Failing(error, at))
        assert caught.value is error
        assert not hasattr(error, "__notes__") or f"item {at} of a dataset of 9" in error.__notes__[-1]
        assert buffer.seen == 0 and buffer.check() == []
        buffer.add((X, Y))


class Failing:
    def __init__(self, error, at):
        self.error, self.at = error, at

    def __len__(self):
        return 9

    def __getitem__(self, i):
        if i == self.at:
            raise self.error
        return X[i], 0


def test_stop_iteration_does_not_leak():
    """It would end a loop of the caller's in silence."""
    for at in (0, 4):
        with lr.ReservoirBuffer(5) as buffer, pytest.raises(lr.ArgumentError, match=f"item {at} .*StopIteration"):
            buffer.update(Failing(StopIteration(), at))
