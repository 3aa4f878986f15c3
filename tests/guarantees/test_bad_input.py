"""G7, bad input: each gets an error of our own that says what came, what was expected and the way out; the buffer stays as it was."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from refusing import MEMORY_AND_DISK, X, Y, batch, feed, items, logits, make, refuses, snapshot

import leanreplay as lr

torch = pytest.importorskip("torch")


# -- batches -----------------------------------------------------------------------------------------------------------


META = logits(20, 4)
BATCHES = {
    "shape": ((X[:, :2], Y), META, ["data/0", "(4, 3)", "(4, 2)", "pad or crop"]),
    "more dimensions": ((X[:, None], Y), META, ["data/0", "(4, 3)", "(4, 1, 3)"]),
    "dtype": ((X.astype(np.float64), Y), META, ["data/0", "expected float32", "got float64", "convert"]),
    "label dtype": ((X, Y.astype(np.int32)), META, ["data/1", "expected int64", "got int32"]),
    "label float": ((X, Y + 0.5), META, ["data/1", "expected int64", "got float64"]),
    "one leaf": (X, META, ["data", "expected a tuple of 2", "ndarray"]),
    "three leaves": ((X, Y, Y), META, ["data", "expected a tuple of 2", "3"]),
    "dict": ({"x": X, "y": Y}, META, ["data", "expected a tuple of 2", "dict"]),
    "nested": ((X, (Y,)), META, ["data/1", "array", "tuple"]),
    "lengths": ((X, Y[:3]), META, ["differ in length", "'data/0': 4", "'data/1': 3"]),
    "metadata length": ((X, Y), logits(20, 3), ["differ in length", "'metadata/logits': 3"]),
    "no metadata": ((X, Y), None, ["metadata", "logits", "missing"]),
    "metadata missing": ((X, Y), {}, ["missing ['logits']", "set_metadata"]),
    "metadata extra": ((X, Y), {**META, "task": Y}, ["unexpected ['task']", "set_metadata"]),
    "metadata other name": ((X, Y), {"logit": META["logits"]}, ["missing ['logits']", "unexpected ['logit']"]),
    "metadata no dict": ((X, Y), [META["logits"]], ["metadata is a dict", "list"]),
    "metadata shape": ((X, Y), {"logits": META["logits"][:, :1]}, ["metadata/logits", "(4, 2)", "(4, 1)"]),
    "metadata None": ((X, Y), {"logits": None}, ["metadata/logits", "NoneType"]),
    "single sample": ((X[0], Y[0]), {"logits": META["logits"][0]}, ["data/1", "leading dimension"]),
    "list of numbers": ((X, list(range(4))), META, ["data/1", "array", "list"]),
    "lists": ((X.tolist(), Y.tolist()), META, ["data/0", "array", "list"]),
    "None": (None, META, ["data", "tuple of 2", "NoneType"]),
    "text": (("ab", "cd"), META, ["data/0", "str", "'S32'"]),
    "object": ((X, Y.astype(object)), META, ["data/1", "object", "np.array(a.tolist())"]),
    "unicode": ((X, Y.astype(str)), META, ["data/1", "np.char.encode"]),
    "datetime": ((X, Y.astype("M8[s]")), META, ["data/1", "datetime64", "astype('int64')"]),
    "timedelta": ((X, Y.astype("m8[s]")), META, ["data/1", "timedelta64", "astype('int64')"]),
    "structured": ((X, np.zeros(4, "i4,f4")), META, ["data/1", "separate arrays"]),
    "longdouble": ((X.astype(np.longdouble), Y), META, ["data/0", "float64"]),
    "masked": ((np.ma.masked_less(X, 61), Y), META, ["data/0", "masked", "filled"]),
    "huge integer": ((X, 2**70), META, ["data/1", "object"]),
    "sparse tensor": ((torch.tensor(X).to_sparse(), Y), META, ["data/0", "sparse", "to_dense"]),
    "bfloat16": ((torch.tensor(X).bfloat16(), Y), META, ["data/0", "expected float32", "got bfloat16"]),
    "meta device": ((torch.empty(4, 3, device="meta"), Y), META, ["data/0", "meta device"]),
    "float8": ((torch.tensor(X).to(torch.float8_e4m3fn), Y), META, ["data/0", "float8", ".float()"]),
}


@pytest.mark.parametrize("case", BATCHES)
def test_batch_that_does_not_fit(buffer, case):
    """G7: another shape, dtype, structure, length or metadata is refused as a whole, naming the leaf."""
    values, metadata, words = BATCHES[case]
    refuses(buffer, lr.SchemaError, words, lambda b: b.add(values, metadata=metadata))


@pytest.mark.parametrize("case", [c for c in BATCHES if c not in ("shape", "more dimensions", "one leaf", "three leaves")])
def test_first_batch(case):
    """G7: what can never be stored is refused in a first batch too, which leaves no schema behind."""
    values, metadata, _ = BATCHES[case]
    with lr.ReservoirBuffer(8) as made:
        try:
            made.add(values, metadata=metadata)
        except lr.SchemaError:
            assert made.schema is None and made.seen == 0
        else:  # fits as a first batch: another dtype or name is no error then
            assert made.seen == 4
    stays = {"dtype", "label dtype", "label float", "dict", "nested", "no metadata", "metadata missing", "metadata extra"}
    stays |= {"metadata other name", "metadata shape", "bfloat16"}
    assert (case in stays) == (made.current.store.schema is not None), case


@pytest.mark.parametrize("cls", [lr.SlidingWindowBuffer, lr.GreedyClassBalancingBuffer, lr.InfiniteBuffer])
@MEMORY_AND_DISK
def test_every_buffer_goes_on_as_if_nothing_came(cls, place, tmp_path):
    """G7: after all these errors, feeding on gives what a buffer gives that never met them."""
    with make(None if place == "memory" else tmp_path / "a", cls) as one, make(None, cls) as other:
        for values, metadata, words in BATCHES.values():
            refuses(one, lr.SchemaError, words, lambda b, v=values, m=metadata: b.add(v, metadata=m))
        for made in (one, other):
            feed(made, 20, 30)
        assert snapshot(one) == snapshot(other)


def test_values_that_are_fine(buffer):
    """G7: NaN, infinities, big-endian and non-contiguous arrays, tensors of any stride or graph are stored as what they are."""
    reference = make(None)
    x = np.array([[np.nan, np.inf, -np.inf], [0.0, -0.0, 1.0], [1, 2, 3], [4, 5, 6]], np.float32)
    forms = [
        (x.astype(">f4"), Y.astype(">i8"), META),
        (np.asfortranarray(x), np.repeat(Y, 2)[::2], {"logits": np.ascontiguousarray(META["logits"][:, ::-1])[:, ::-1]}),
        (torch.tensor(x, requires_grad=True), torch.tensor(Y), {"logits": torch.tensor(META["logits"], requires_grad=True) * 1}),
        (torch.tensor(np.ascontiguousarray(x.T)).T, torch.stack([torch.tensor(Y)] * 2, 1)[:, 0], META),
        (torch.nn.Parameter(torch.tensor(x)), torch.tensor(Y), {"logits": torch.tensor(META["logits"])._neg_view().neg()}),
    ]
    for x_form, y_form, meta in forms:
        buffer.add((x_form, y_form), metadata=meta)
        reference.add((x, Y), metadata=META)
    assert snapshot(buffer) == snapshot(reference)
    assert np.isnan(reference.sample(8)[0][0]).any()


def test_sizes_of_bfloat16_and_expanded_tensors():
    """G7: bfloat16 keeps its bits; a tensor expanded over one element stores its values."""
    values = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    with lr.ReservoirBuffer(6) as made:
        made.add((values[::2], torch.ones(1).expand(3)))
        made.add((values[1::2].requires_grad_(), torch.ones(3)))
        (bits, ones), _ = made.get([0, 1, 2, 3, 4, 5])
        wanted = torch.cat([values[::2], values[1::2]]).detach().view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(bits, wanted) and (ones == 1).all()


@MEMORY_AND_DISK
def test_empty_batch(place, tmp_path):
    """G7: an empty batch is accepted and does nothing, not even create the file; of another shape it is refused all the same."""
    path = None if place == "memory" else str(tmp_path / "replay.h5")
    with lr.ReservoirBuffer(8, path) as made:
        made.add(batch(0, 0))
        assert made.schema is None and (path is None or not os.path.exists(path))
        made.update([])
        feed(made, 0, 12)
        before = snapshot(made)
        feed(made, 0, 0)
        made.update([], metadata=logits(0, 0))
        made.add(batch(5, 0), metadata=logits(0, 0), at=5)
        assert snapshot(made) == before
        refuses(
            made, lr.SchemaError, ["data/0", "(0, 3)", "(0, 4)"], lambda b: b.add((np.zeros((0, 4), "f4"), Y[:0]), metadata=logits(0, 0))
        )


SAMPLES = {
    "slash": ({"a/b": X}, ["a/b", "without '/'"]),
    "empty key": ({"": X}, ["''", "non-empty"]),
    "dot": ({".": X}, ["'.'"]),
    "dots": ({"..": X}, ["'..'"]),
    "NUL": ({"a\0": X}, ["cannot name"]),
    "integer key": ({1: X}, ["1", "non-empty str"]),
    "tuple key": ({("a",): X}, ["cannot name"]),
    "surrogate": ({"\ud800": X}, ["Unicode"]),
    "no leaf": ((), ["at least one array"]),
    "empty dict": ({}, ["at least one array"]),
    "no bytes": ((X, np.zeros((4, 0))), ["data/1", "no bytes"]),
    "S0": ((X, np.zeros(4, "S0")[:, None][:, :0]), ["data/1", "no bytes"]),
    "many dimensions": (np.zeros((4, *[1] * 40)), ["40 dimensions", "31", "reshape"]),
    "set": ((X, {1, 2}), ["data/1", "set"]),
    "generator": ((i for i in range(4)), ["data", "generator"]),
}


@pytest.mark.parametrize("case", SAMPLES)
def test_samples_that_cannot_be_stored(case):
    """G7: keys that cannot be names, leaves without bytes and the like are refused before anything is created."""
    values, words = SAMPLES[case]
    with lr.ReservoirBuffer(8) as made:
        refuses(made, lr.SchemaError, words, lambda b: b.add(values))
        feed(made, 0, 4)
        assert len(made) == 4


def test_deep_nesting():
    """G7: 16 levels are stored; more, or a list that holds itself, is refused rather than recursed into."""
    deep = np.arange(3)
    for _ in range(16):
        deep = [deep]
    with lr.ReservoirBuffer(8) as made:
        made.add(deep)
        assert str(made.schema).count("/0") == 16
        (found, _), level = made[0], 0
        while isinstance(found, list):
            found, level = found[0], level + 1
        assert level == 16 and found == 0
    loop: list = []
    loop.append(loop)
    for values in ([deep], loop):
        with lr.ReservoirBuffer(8) as made:
            refuses(made, lr.SchemaError, ["deeper than 16"], lambda b, v=values: b.add(v))


@pytest.mark.parametrize("name", ["idx", "position", "a/b", "", 5, None])
def test_metadata_names(buffer, name):
    """G7: reserved and impossible metadata names are refused, in a first batch and in set_metadata."""
    refuses(buffer, lr.SchemaError, ["metadata"], lambda b: b.set_metadata(name, np.zeros(8)))
    with lr.ReservoirBuffer(8) as made:
        refuses(made, lr.SchemaError, ["metadata"], lambda b: b.add((X, Y), metadata={name: np.zeros(4)}))


# -- arguments ---------------------------------------------------------------------------------------------------------


RAGGED = [[1], [2, 3]]
CALLS = {
    "sample too many": (lr.ArgumentError, ["sample of 9", "buffer of 8", "at most 8", "replace=True"], lambda b: b.sample(9)),
    "sample negative": (lr.ArgumentError, ["n must be", "-1"], lambda b: b.sample(-1)),
    "sample float": (lr.ArgumentError, ["integer", "2.0"], lambda b: b.sample(2.0)),
    "sample None": (lr.ArgumentError, ["integer", "None"], lambda b: b.sample(None)),
    "sample bool": (lr.ArgumentError, ["integer", "True"], lambda b: b.sample(True)),
    "at beyond": (lr.ArgumentError, ["at=23", "20", "3 between"], lambda b: b.add((X, Y), metadata=META, at=23)),
    "at negative": (lr.ArgumentError, ["at must be", "-1"], lambda b: b.add((X, Y), metadata=META, at=-1)),
    "at float": (lr.ArgumentError, ["at must be", "1.5"], lambda b: b.add((X, Y), metadata=META, at=1.5)),
    "at beyond, empty": (lr.ArgumentError, ["at=23"], lambda b: b.add(batch(0, 0), metadata=logits(0, 0), at=23)),
    "group length": (lr.SchemaError, ["group", "expected 4 integers", "(3,)"], lambda b: b.add((X, Y), metadata=META, group=Y[:3])),
    "group float": (lr.SchemaError, ["group", "float64"], lambda b: b.add((X, Y), metadata=META, group=Y + 0.5)),
    "group text": (lr.SchemaError, ["group"], lambda b: b.add((X, Y), metadata=META, group=list("abcd"))),
    "group ragged": (lr.SchemaError, ["group", "list"], lambda b: b.add((X, Y), metadata=META, group=RAGGED)),
    "group uint64": (lr.SchemaError, ["group", "int64"], lambda b: b.add((X, Y), metadata=META, group=np.full(4, 2**63, np.uint64))),
    "group huge": (lr.SchemaError, ["group", "object"], lambda b: b.add((X, Y), metadata=META, group=[2**70] * 4)),
    "group bfloat16": (lr.SchemaError, ["group"], lambda b: b.add((X, Y), metadata=META, group=torch.zeros(4).bfloat16())),
    "group sparse": (lr.SchemaError, ["group"], lambda b: b.add((X, Y), metadata=META, group=torch.ones(4, dtype=int).to_sparse())),
    "rows beyond": (lr.RowError, ["8", "0 to 7"], lambda b: b.get([0, 8])),
    "rows negative": (lr.RowError, ["-1", "0 to 7"], lambda b: b.get([-1])),
    "rows uint64": (lr.RowError, ["0 to 7"], lambda b: b.get(np.array([2**63], np.uint64))),
    "rows float": (lr.ArgumentError, ["integers", "float64"], lambda b: b.get([0.5])),
    "rows mask": (lr.ArgumentError, ["integers", "bool"], lambda b: b.get(np.ones(8, bool))),
    "rows ragged": (lr.ArgumentError, ["rows"], lambda b: b.get(RAGGED)),
    "rows 2-D": (lr.ArgumentError, ["(1, 1)"], lambda b: b.get([[1]])),
    "rows scalar": (lr.ArgumentError, ["integers", "()"], lambda b: b.get(3)),
    "rows None": (lr.ArgumentError, ["integers"], lambda b: b.get(None)),
    "rows graph": (lr.ArgumentError, ["integers"], lambda b: b.get(torch.zeros(2, requires_grad=True))),
    "index beyond": (lr.RowError, ["index 8", "buffer of 8"], lambda b: b[8]),
    "index before": (lr.RowError, ["index -9"], lambda b: b[-9]),
    "index huge": (lr.RowError, ["buffer of 8"], lambda b: b[2**80]),
    "index float": (lr.ArgumentError, ["integer", "buffer.get"], lambda b: b[1.0]),
    "index slice": (lr.ArgumentError, ["integer", "buffer.get"], lambda b: b[1:3]),
    "index text": (lr.ArgumentError, ["integer"], lambda b: b["x"]),
    "items no list": (lr.ArgumentError, ["integer"], lambda b: b.__getitems__(5)),
    "metadata unknown": (lr.SchemaError, ["'logit'", "['logits']", "position"], lambda b: b.get_metadata("logit")),
    "metadata rows": (lr.RowError, ["0 to 7"], lambda b: b.get_metadata("logits", [99])),
    "set rows": (lr.RowError, ["0 to 7"], lambda b: b.set_metadata("logits", np.zeros((1, 2), "f4"), [8])),
    "set shape": (lr.SchemaError, ["metadata/logits", "(8, 2)"], lambda b: b.set_metadata("logits", np.zeros((8, 3), "f4"))),
    "set dtype": (lr.SchemaError, ["float32", "float64"], lambda b: b.set_metadata("logits", np.zeros((8, 2)))),
    "set length": (lr.SchemaError, ["(2, 2)", "(3, 2)"], lambda b: b.set_metadata("logits", np.zeros((3, 2), "f4"), [0, 1])),
    "set list": (lr.SchemaError, ["metadata/logits", "list"], lambda b: b.set_metadata("logits", [[0.0, 0.0]] * 8)),
    "set positions": (lr.SchemaError, ["positions"], lambda b: b.set_metadata("logits", np.zeros((8, 2), "f4"), positions=[1])),
    "new field, some rows": (lr.SchemaError, ["metadata/new", "all 8 samples"], lambda b: b.set_metadata("new", np.zeros(2), [0, 1])),
    "new field, scalar": (lr.SchemaError, ["metadata/new", "leading dimension"], lambda b: b.set_metadata("new", 1.0)),
    "new field, no bytes": (lr.SchemaError, ["metadata/new", "no bytes"], lambda b: b.set_metadata("new", np.zeros((8, 0)))),
    "new field, object": (lr.SchemaError, ["metadata/new", "object"], lambda b: b.set_metadata("new", np.zeros(8, object))),
    "resize 0": (lr.ArgumentError, ["max_size", "0"], lambda b: b.resize(0)),
    "resize negative": (lr.ArgumentError, ["max_size", "-3"], lambda b: b.resize(-3)),
    "resize None": (lr.ArgumentError, ["max_size"], lambda b: b.resize(None)),
    "resize float": (lr.ArgumentError, ["integer", "4.0"], lambda b: b.resize(4.0)),
    "update no length": (lr.ArgumentError, ["map-style", "generator"], lambda b: b.update(i for i in range(3))),
    "update structure": (lr.SchemaError, ["item 0", "tuple of 2"], lambda b: b.update([X[0]], metadata=logits(0, 1))),
    "update label": (lr.SchemaError, ["data/1", "int64"], lambda b: b.update([(X[0], 0.5)], metadata=logits(0, 1))),
    "update label size": (lr.SchemaError, ["data/1", "does not fit"], lambda b: b.update([(X[0], 2**63)], metadata=logits(0, 1))),
    "update metadata": (lr.SchemaError, ["missing ['logits']"], lambda b: b.update(items(3, 3))),
    "update metadata length": (lr.SchemaError, ["(2, 2)", "(3, 2)"], lambda b: b.update(items(3, 3), metadata=logits(0, 3))),
    "update group": (lr.SchemaError, ["group", "2"], lambda b: b.update(items(3, 3), metadata=logits(0, 2), group=[1])),
    "save nowhere": (lr.ArgumentError, ["folder", "5"], lambda b: b.save(5)),
    "load nowhere": (lr.ArgumentError, ["folder", "None"], lambda b: b.load(None)),
    "load missing": (lr.MissingError, ["state.json", "save()"], lambda b: b.load("/nonexistent/folder")),
}


@pytest.mark.parametrize("case", CALLS)
def test_arguments(buffer, case):
    """G7: arguments out of range or of the wrong kind are refused, and no draw is counted."""
    error, words, action = CALLS[case]
    refuses(buffer, error, words, action)


def test_dataset_with_a_bad_item(tmp_path):
    """G7: an item that does not fit its dataset is named; the samples of that commit are not kept."""
    for place in (None, tmp_path / "replay.h5"):
        with make(place, lr.SlidingWindowBuffer) as made:
            words = ["item 1", "data/0", "(3,)", "(2,)"]
            refuses(made, lr.SchemaError, words, lambda b: b.update(items(3, 2, 3), metadata=logits(0, 3)))
            words = ["item 2", "data/1", "does not fit"]
            refuses(made, lr.SchemaError, words, lambda b: b.update([*items(3, 3), (X[0], 2**63)], metadata=logits(0, 3)))


def test_empty_buffer():
    """G7: a buffer without samples says so."""
    with lr.ReservoirBuffer(8) as made:
        for words, action in [
            (["sample of 1", "buffer of 0", "add samples first"], lambda: made.sample(1)),
            (["buffer of 0"], lambda: made.sample(1, replace=True)),
            (["empty"], lambda: made.get_metadata("idx")),
            (["empty"], lambda: made.set_metadata("a", np.zeros(1))),
            (["index 0"], lambda: made[0]),
            (["rows in use"], lambda: made.get([0])),
            (["nothing to save"], lambda: made.save("/nonexistent")),
            (["empty buffer in memory"], lambda: pickle.dumps(made)),
        ]:
            with pytest.raises(lr.LeanReplayError) as caught:
                action()
            assert all(w in str(caught.value) for w in words), caught.value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_size": 0}, ["max_size", "from 1", "got 0"]),
        ({"max_size": -1}, ["max_size", "got -1"]),
        ({"max_size": 2**41}, ["max_size"]),
        ({"max_size": 1.5}, ["max_size", "integer", "1.5"]),
        ({"max_size": "8"}, ["max_size", "integer", "'8'"]),
        ({"max_size": True}, ["max_size", "integer", "True"]),
        ({"max_size": None}, ["max_size"]),
        ({"seed": 0.5}, ["seed", "integer"]),
        ({"seed": 2**127}, ["seed", "from"]),
        ({"stream": -1}, ["stream", "from 0"]),
        ({"stream": 2**15}, ["stream", "32767"]),
        ({"mode": "rw"}, ["mode", "'rw'", "r+"]),
        ({"mode": None}, ["mode"]),
        ({"mode": "r"}, ["mode 'r'", "path is None"]),
        ({"mode": "r+"}, ["mode 'r+'", "path is None"]),
        ({"schema": (X, Y)}, ["Schema.from_sample", "tuple"]),
        ({"transform": 3}, ["transform", "3"]),
        ({"target_transform": "x"}, ["target_transform", "'x'"]),
        ({"restore_points": 1}, ["restore_points", "from 2"]),
        ({"path": 5}, ["path", "5"]),
        ({"path": ""}, ["path", "non-empty"]),
        ({"path": "a\0b"}, ["path", "NUL"]),
    ],
    ids=str,
)
def test_constructor(options, words):
    """G7: constructor arguments."""
    with pytest.raises(lr.ArgumentError) as caught:
        lr.ReservoirBuffer(**{"max_size": 8, **options})
    assert all(w in str(caught.value) for w in words), caught.value


def test_infinite_constructor(tmp_path):
    """G7: the buffer without a size takes none."""
    for action, words in [
        (lambda: lr.InfiniteBuffer(max_size=5), ["no max_size", "rows_per_part"]),
        (lambda: lr.InfiniteBuffer(10), ["path", "10"]),
        (lambda: lr.InfiniteBuffer(rows_per_part=0), ["rows_per_part", "0"]),
        (lambda: lr.InfiniteBuffer().resize(5), ["no max_size"]),
    ]:
        with pytest.raises(lr.ArgumentError) as caught:
            action()
        assert all(w in str(caught.value) for w in words), caught.value
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(lr.FormatError, match="folder of parts"):
        lr.InfiniteBuffer(tmp_path / "file", mode="r+")
    with pytest.raises(lr.MissingError, match="no buffer"):
        lr.InfiniteBuffer(tmp_path / "no", mode="r+")


def test_labels():
    """G7: a buffer that balances needs integer labels; ones that do not fit int64 are refused."""
    for y, words in [
        (Y + 0.5, ["balances", "group="]),
        (np.full(4, 2**63, np.uint64), ["data/1", "int64"]),
        (np.stack([Y, Y], 1), ["balances"]),
    ]:
        for cls in [lr.GreedyClassBalancingBuffer] + ([lr.ReservoirBuffer] if y.dtype == np.uint64 else []):
            with cls(8) as made:
                with pytest.raises(lr.SchemaError) as caught:
                    made.add((X, y))
                assert all(w in str(caught.value) for w in words), caught.value
                assert made.seen == 0 and made.schema is None
    with lr.GreedyClassBalancingBuffer(8) as made:
        with pytest.raises(lr.SchemaError, match="balances"):
            made.add(X)
        made.add(X, group=torch.tensor(Y, dtype=torch.uint8))
        with pytest.raises(lr.SchemaError, match="balances"):
            made.update([X[0]])
        made.add(X, group=[-(2**63), 2**63 - 1, True, 0])
        assert made.seen == 8


def test_transforms(tmp_path):
    """G7: a transform's own exception comes through; results that cannot be stacked get an error that says so."""
    path = str(tmp_path / "replay.h5")
    make(path).close()
    count = iter(range(100))
    with lr.open(path, transform=lambda x: np.zeros(next(count))) as made:
        with pytest.raises(lr.ArgumentError, match="stacked"):
            made.sample(3)
        assert made[0][0][0].shape  # one by one there is nothing to stack
    with lr.open(path, transform=lambda x: torch.zeros(next(count))) as made, pytest.raises(lr.ArgumentError, match="stacked"):
        made.sample(3)
    with lr.open(path, transform=lambda x: 1 / 0) as made, pytest.raises(ZeroDivisionError):
        made.sample(1)
    with lr.ReservoirBuffer(8, target_transform=str) as made:
        made.add(X)
        with pytest.raises(lr.ArgumentError, match="pairs"):
            made.sample(1)
    with lr.ReservoirBuffer(8, transform=str, target_transform=lambda y: -y) as made:
        made.add((X, Y))
        (x, y), _ = made.get([0, 1])
        assert x == [str(v) for v in X[:2]] and np.array_equal(y, -Y[:2])


# -- states ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"state": ""}, ["not a state"]),
        ({"state": ","}, ["not a state"]),
        ({"state": "0" * 15}, ["not a state"]),
        ({"state": "0" * 16 + "," + "0" * 16}, ["not a state"]),
        ({"state": "x" * 16}, ["not a state"]),
        ({"state": "0" * 16 + "\n"}, ["not a state"]),
        ({"state": 5}, ["not a state"]),
        ({"state": "0" * 16}, ["no restore point"]),
        ({"seen": -1}, ["not a state"]),
        ({"seen": "5"}, ["not a state"]),
        ({"seen": 10**30, "state": "0" * 16}, ["behind"]),
        ({"seen": 5, "state": "0" * 16}, ["ahead", "15 samples", "restore_points", "at="]),
        ({"draws": {"sample": 2**70}}, ["not a state"]),
        ({"draws": {"sample": -1}}, ["not a state"]),
        ({"draws": {1: 2}}, ["not a state"]),
        ({"draws": None}, ["not a state"]),
        ({"format": 2}, ["format 2", "upgrade"]),
        ({"kind": "SlidingWindowBuffer"}, ["SlidingWindowBuffer", "ReservoirBuffer"]),
        ({"uuid": "0" * 32}, ["another buffer", "0" * 32]),
        ({"max_size": 9}, ["max_size 9", "8"]),
        ({"max_size": None}, ["not a state"]),
    ],
    ids=str,
)
def test_states(buffer, change, words):
    """G7: a state dict that is damaged, of another buffer or out of reach is refused."""
    state = buffer.state_dict()
    refuses(buffer, lr.StateError, words, lambda b: b.load_state_dict({**state, **change}))
    buffer.load_state_dict(state)


@pytest.mark.parametrize("state", [None, {}, [], 5, "x", {"format": 1}])
def test_no_states(buffer, state):
    """G7: things that are no state dict."""
    refuses(buffer, lr.StateError, ["not a state", "expected a dict"], lambda b: b.load_state_dict(state))


@pytest.mark.parametrize("cls", [lr.ReservoirBuffer, lr.InfiniteBuffer])
@MEMORY_AND_DISK
def test_states_of_others(cls, place, tmp_path):
    """G7: the state of a twin, of a buffer further on, and one whose points are used up."""
    path = (lambda n: None) if place == "memory" else (lambda n: tmp_path / n)
    with make(path("a"), cls) as one, make(path("b"), cls) as twin:
        refuses(one, lr.StateError, ["another buffer"], lambda b: b.load_state_dict(twin.state_dict()))
        old = one.state_dict()
        for start in (20, 23, 26):
            feed(one, start, 3)
            ahead = one.state_dict()
        if cls is lr.ReservoirBuffer:
            refuses(one, lr.StateError, ["ahead of the state by 9 samples"], lambda b: b.load_state_dict(old))
        feed(one, 29, 3)
        one.load_state_dict(ahead)
        assert one.seen == 29
        names = [*ahead["state"].split(",")[:-1], "ab" * 8]
        refuses(one, lr.StateError, ["behind"], lambda b: b.load_state_dict({**ahead, "seen": 31, "state": ",".join(names)}))
