"""G7, bad input: each gets an error of our own that says what came, what was expected and the way out; the buffer stays as it was."""

from __future__ import annotations

import ctypes
import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings

import h5py
import numpy as np
import pytest

import leanreplay as lr
from leanreplay.storage import system

torch = pytest.importorskip("torch")

MEMORY_AND_DISK = pytest.mark.parametrize("place", ["memory", "disk"])


def batch(start, n):
    """n samples: (float32[3], int64 label)."""
    x = (np.arange(start * 3, (start + n) * 3, dtype=np.float32) * 0.5).reshape(n, 3)
    return x, np.arange(start, start + n) % 4


def logits(start, n):
    return {"logits": np.arange(start * 2, (start + n) * 2, dtype=np.float32).reshape(n, 2)}


def make(path=None, cls=lr.ReservoirBuffer, fed=20, **options):
    """A buffer of 8 rows fed 20 samples with metadata."""
    buffer = cls(path, rows_per_part=8, **options) if cls is lr.InfiniteBuffer else cls(8, path, **options)
    if fed:
        buffer.add(batch(0, fed), metadata=logits(0, fed))
    return buffer


def feed(buffer, start, n):
    buffer.add(batch(start, n), metadata=logits(start, n))


def snapshot(buffer):
    """Everything that a buffer holds, as one comparable value."""
    if buffer.schema is None:
        return None
    store = buffer._store  # after that call: a failed resize may have left another one
    rows = buffer.get_metadata("idx")
    (x, y), meta = buffer.get(rows)
    index = store.index()
    held = [a.tobytes() for a in (x, y, meta["logits"], meta["idx"], meta["position"], index[0], index[1])]
    return held, buffer.seen, len(buffer), store.mark_name(), buffer._drawn, store.policy, buffer.max_size, str(buffer.schema)


def refuses(buffer, error, words, action):
    """The action raises `error` with all of `words` in its message, and leaves the buffer as it was and usable."""
    before = snapshot(buffer)
    with pytest.raises(error) as caught:
        action(buffer)
    assert isinstance(caught.value, lr.LeanReplayError), caught.value
    message = str(caught.value)
    for word in words:
        assert word in message, (word, message)
    assert snapshot(buffer) == before, message
    return message


@pytest.fixture(params=["memory", "disk"])
def buffer(request, tmp_path):
    with make(None if request.param == "memory" else tmp_path / "replay.h5") as made:
        yield made


# -- batches -------------------------------------------------------------------------------------------------------------

X, Y = batch(20, 4)
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
    assert (case in stays) == (made._store is not None), case


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


# -- arguments -----------------------------------------------------------------------------------------------------------

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


def items(*widths):
    """A dataset whose i-th item has an x of widths[i] numbers."""
    return [(np.zeros(w, np.float32), 1) for w in widths]


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
        (Y[:, None], ["balances"]),
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


# -- states --------------------------------------------------------------------------------------------------------------


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


# -- saved copies --------------------------------------------------------------------------------------------------------


def damage_json(text):
    return lambda folder: (folder / "state.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "error", "word"),
    [
        (lambda f: (f / "buffer.h5").unlink(), lr.MissingError, "does not exist"),
        (lambda f: (f / "state.json").unlink(), lr.MissingError, "save()"),
        (lambda f: (f / "buffer.h5").write_bytes(b"x" * 9000), lr.FormatError, "no leanreplay file"),
        (lambda f: os.truncate(f / "buffer.h5", 30000), lr.FormatError, "cut short"),
        (damage_json("{"), lr.FormatError, "state.json"),
        (damage_json("[]"), lr.FormatError, "state.json"),
        (damage_json("[" * 100000), lr.FormatError, "state.json"),
        (damage_json('{"format": 1, "draws": {"sample": -1}}'), lr.FormatError, "draws"),
        (damage_json('{"draws": {"sample": "x"}}'), lr.FormatError, "state.json"),
        (damage_json('{"draws": 5}'), lr.FormatError, "state.json"),
    ],
)
def test_damaged_copies(buffer, damage, error, word, tmp_path):
    """G7: load from a folder where something is missing or damaged."""
    folder = tmp_path / "saved"
    buffer.save(folder)
    damage(folder)
    feed(buffer, 20, 9)
    refuses(buffer, error, [word], lambda b: b.load(folder))


def test_copies_of_others(buffer, tmp_path):
    """G7: load of a copy with another max_size, seed, stream, policy or schema shows both."""
    for i, (other, word) in enumerate(
        [
            (lr.ReservoirBuffer(9), "max_size=9"),
            (lr.ReservoirBuffer(8, seed=1), "seed=1"),
            (lr.ReservoirBuffer(8, stream=1), "stream=1"),
            (lr.SlidingWindowBuffer(8), "SlidingWindowBuffer"),
        ]
    ):
        feed(other, 0, 3)
        other.save(tmp_path / str(i))
        refuses(buffer, lr.MismatchError, [word, "this buffer"], lambda b, f=tmp_path / str(i): b.load(f))
    with lr.ReservoirBuffer(8) as other:
        other.add(X)
        other.save(tmp_path / "schema")
    refuses(buffer, lr.MismatchError, ["schema="], lambda b: b.load(tmp_path / "schema"))


# -- files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [lr.ReservoirBuffer, lr.InfiniteBuffer])
def test_existing_and_missing_files(cls, tmp_path):
    """G7: mode x refuses an existing buffer, r and r+ a missing one; both say what to do."""
    path = tmp_path / "replay"
    with make(path, cls) as made:
        before = snapshot(made)
    with pytest.raises(lr.ExistsError, match=r"exists|holds a buffer") as caught:
        make(path, cls)
    assert all(f"'{m}'" in str(caught.value) for m in ("r+", "a", "w")) and isinstance(caught.value, FileExistsError)
    with lr.open(path) as made:
        assert snapshot(made) == before
    for mode in ("r", "r+"):
        with pytest.raises(lr.MissingError, match="'x' or 'a'") as caught:
            make(tmp_path / "none", cls, mode=mode)
        assert isinstance(caught.value, FileNotFoundError) and not (tmp_path / "none").exists()
        with pytest.raises(lr.MissingError):
            lr.open(tmp_path / "none", mode=mode)
    with pytest.raises(lr.ArgumentError, match="create one with a class"):
        lr.open(path, mode="x")
    with pytest.raises(lr.ArgumentError, match="mode"):
        lr.open(path, mode="q")


def test_file_that_appears_later(tmp_path):
    """G7: of two buffers created under mode x without a first batch, only one can ever be: the lock is there from the start."""
    path = str(tmp_path / "replay.h5")
    with lr.ReservoirBuffer(8, path) as first:
        with pytest.raises(lr.LockedError, match="this very process"):
            lr.ReservoirBuffer(8, path)
        with open(path, "wb") as other:  # something that knows no locks
            other.write(b"mine")
        with pytest.raises(lr.ExistsError, match="exists"):
            feed(first, 0, 5)
        assert first.schema is None and first.seen == 0
    with open(path, "rb") as other:
        assert other.read() == b"mine"
    assert not [n for n in os.listdir(tmp_path) if n.endswith(".tmp")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_size": 9}, ["max_size=9", "file: 8"]),
        ({"seed": 1}, ["seed=1", "file: 0"]),
        ({"stream": 2}, ["stream=2", "file: 0"]),
        ({"seed": 1, "stream": 2}, ["seed=1", "stream=2"]),
        ({"schema": lr.Schema.from_sample(X)}, ["schema="]),
        ({"schema": lr.Schema.from_sample((X[0], 1))}, ["schema="]),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["a", "r", "r+"])
def test_other_parameters_than_the_files(options, words, mode, tmp_path):
    """G7: parameters that differ from the file's are an error that shows both."""
    path = str(tmp_path / "replay.h5")
    make(path).close()
    with pytest.raises(lr.MismatchError) as caught:
        lr.ReservoirBuffer(path=path, mode=mode, **options)
    assert all(w in str(caught.value) for w in [*words, "leave them out"]), caught.value
    with lr.ReservoirBuffer(
        8, path, seed=0, stream=0, schema=lr.Schema.from_sample((X[0], 1), {"logits": np.zeros(2, "f4")}), mode="r+"
    ) as b:
        assert len(b) == 8


def test_other_policy_than_the_files(tmp_path):
    """G7: the class is one of the parameters; `rows_per_part` too; a class that is not imported is named."""
    path = str(tmp_path / "replay.h5")
    make(path).close()
    for mode in ("a", "r", "r+"):
        with pytest.raises(lr.MismatchError, match=r"SlidingWindowBuffer \(file: ReservoirBuffer\)"):
            lr.SlidingWindowBuffer(8, path, mode=mode)
    make(tmp_path / "parts", lr.InfiniteBuffer).close()
    with pytest.raises(lr.MismatchError, match=r"rows_per_part=9 \(file: 8\)"):
        lr.InfiniteBuffer(tmp_path / "parts", rows_per_part=9, mode="r+")

    from leanreplay.buffers import base as buffers

    class Stranger(lr.DataBuffer):
        policy_class = lr.SlidingWindowPolicy

    strange = tmp_path / "strange.h5"
    make(strange, Stranger).close()
    del buffers._KINDS["Stranger"]
    with pytest.raises(lr.MismatchError, match="import the module"):
        lr.open(strange)
    with pytest.raises(lr.ArgumentError, match="policy"):
        lr.DataBuffer(8)


@pytest.mark.parametrize("cls", [lr.ReservoirBuffer, lr.InfiniteBuffer])
def test_second_writer(cls, tmp_path):
    """G7: a second writer is refused, in the same process and in another; readers are welcome; closing frees the lock."""
    path = tmp_path / "replay"
    with make(path, cls) as made:
        before = snapshot(made)
        for mode in ("r+", "a", "x", "w"):
            with pytest.raises(lr.LockedError) as caught:
                make(path, cls, fed=0, mode=mode)
            assert all(w in str(caught.value) for w in ("open for writing in this very process", f"{id(made):#x}", "close()", "mode='r'"))
        code = "import leanreplay, sys\ntry: leanreplay.open(sys.argv[1], 'r+')\nexcept leanreplay.LockedError as e: print('refused')"
        ran = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True, timeout=60)
        assert ran.stdout == "refused\n"
        with lr.open(path) as reader:
            assert snapshot(reader)[0] == before[0]
        assert snapshot(made) == before
        feed(made, 20, 3)
    with lr.open(path, "r+") as made:
        feed(made, 23, 3)


WRITES = {
    "add": lambda b: feed(b, 20, 1),
    "add nothing": lambda b: feed(b, 20, 0),
    "update": lambda b: b.update(items(3), metadata=logits(0, 1)),
    "set_metadata": lambda b: b.set_metadata("logits", np.zeros((8, 2), "f4")),
    "resize": lambda b: b.resize(5),
    "state_dict": lambda b: b.state_dict(),
    "load_state_dict": lambda b: b.load_state_dict({}),
    "load": lambda b: b.load("/nonexistent"),
}


@pytest.mark.parametrize("case", WRITES)
def test_writing_in_mode_r(case, tmp_path):
    """G7: a buffer open for reading refuses every write, as do unpickled copies."""
    path = str(tmp_path / "replay.h5")
    with make(path) as made:
        for reader in (lr.open(path), pickle.loads(pickle.dumps(made))):
            refuses(reader, lr.ModeError, ["reading only", "mode='r+'"], WRITES[case])
            reader.close()
    with make(None) as made:
        refuses(pickle.loads(pickle.dumps(made)), lr.ModeError, ["reading only"], WRITES[case])


USES = {
    **WRITES,
    "sample": lambda b: b.sample(1),
    "len": len,
    "seen": lambda b: b.seen,
    "schema": lambda b: b.schema,
    "nbytes": lambda b: b.nbytes,
    "[]": lambda b: b[0],
    "iter": list,
    "get": lambda b: b.get([0]),
    "get_metadata": lambda b: b.get_metadata("logits"),
    "save": lambda b: b.save("/nonexistent"),
    "flush": lambda b: b.flush(),
    "check": lambda b: b.check(),
    "pickle": pickle.dumps,
}


@pytest.mark.parametrize("cls", [lr.ReservoirBuffer, lr.InfiniteBuffer])
@MEMORY_AND_DISK
def test_closed(cls, place, tmp_path):
    """G7: a closed buffer refuses every use, and says so; closing twice is fine, and so is looking at its repr."""
    for fed in (20, 0):
        made = make(None if place == "memory" else tmp_path / f"replay{fed}", cls, fed=fed)
        made.close()
        for case, use in USES.items():
            if cls is lr.InfiniteBuffer and case in ("resize", "pickle"):
                continue
            with pytest.raises(lr.ModeError, match="closed") as caught:
                use(made)
            assert "leanreplay.open" in str(caught.value), case
        made.close()
        assert "closed" in repr(made)


def test_no_regular_file(tmp_path):
    """G7: a folder, a pipe and a device are refused at once, not waited for."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in (tmp_path / "pipe", tmp_path / "folder", "/dev/null", "/dev/zero"):
        if os.path.lexists(name):
            with pytest.raises(lr.FormatError, match=r"no regular file|no leanreplay file|a folder"):
                lr.ReservoirBuffer(path=name, mode="r")
    for mode in ("r+", "a"):
        for name in ("pipe", "folder"):
            with pytest.raises(lr.FormatError, match=r"no regular file|a folder"):
                lr.ReservoirBuffer(8, tmp_path / name, mode=mode)
    with pytest.raises(lr.StorageError, match="create the folder first"):
        lr.ReservoirBuffer(8, tmp_path / "no" / "replay.h5")
    with pytest.raises(lr.StorageError):
        lr.ReservoirBuffer(8, tmp_path / ("x" * 300))


def test_failed_resize_changes_nothing(buffer, monkeypatch):
    """G1, G7: a resize that fails leaves the reservoir's bound alone: the buffer goes on as if it had not been tried."""

    def full(*args, **kwargs):
        raise lr.StorageError(28, "no space")

    with make(None) as other:
        with monkeypatch.context() as patch:
            patch.setattr("leanreplay.storage.store.Store.create", full)
            refuses(buffer, lr.StorageError, ["no space"], lambda b: b.resize(3))
        with warnings.catch_warnings():
            warnings.simplefilter("error", lr.CapacityWarning)
            before = snapshot(buffer)
            with pytest.raises(lr.CapacityWarning):
                buffer.resize(20)
        assert snapshot(buffer) == before
        for made in (buffer, other):
            feed(made, 20, 500)
        assert snapshot(buffer) == snapshot(other) and len(buffer) == 8


# -- two creators --------------------------------------------------------------------------------------------------------


def _create(folder, number, barrier, results, rounds, locked):
    schema = lr.Schema.from_sample((X[0], 1))
    for i in range(rounds):
        barrier.wait(60)
        made = None
        try:
            made = lr.ReservoirBuffer(8, os.path.join(folder, f"{i}.h5"), seed=number, schema=schema, lock=locked)
            outcome = "won"
        except (lr.ExistsError, lr.LockedError) as error:
            outcome = type(error).__name__
        except BaseException as error:
            outcome = repr(error)
        results.put((i, number, outcome))
        barrier.wait(60)
        if made is not None:
            made.close()


@pytest.mark.parametrize("locked", [True, False], ids=["locks", "no locks"])
def test_two_creators_at_once(locked, tmp_path):
    """G7: of two processes that create the same file at once exactly one wins, also where locks do not work (some network disks)."""
    rounds = 60
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    children = [context.Process(target=_create, args=(str(tmp_path), n, barrier, results, rounds, locked), daemon=True) for n in (0, 1)]
    for child in children:
        child.start()
    outcomes = sorted(results.get(timeout=60) for _ in range(2 * rounds))
    for child in children:
        child.join(60)
    for i in range(rounds):
        both = outcomes[2 * i : 2 * i + 2]
        winners = [number for _, number, outcome in both if outcome == "won"]
        assert len(winners) == 1, both
        assert {outcome for _, _, outcome in both} <= {"won", "ExistsError", "LockedError"}, both
        with lr.open(tmp_path / f"{i}.h5") as made:
            assert made.seed == winners[0] and made.check() == []
    assert not [n for n in os.listdir(tmp_path) if n.endswith(".tmp")]


# -- folders and disks ---------------------------------------------------------------------------------------------------


def in_child(function, other_user=True):
    """Run function() in a forked child, as another user if we are root; what it returned, its traceback, or the signal that ended it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        text = "nothing"
        try:
            signal.alarm(60)
            if other_user and os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            text = function()
        except BaseException:
            text = traceback.format_exc()
        os.write(write, json.dumps(text).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else f"ended by signal {os.WTERMSIG(status)}"


@pytest.fixture
def open_folder():
    """A folder that other users can reach, unlike pytest's own."""
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o755)
    yield folder
    os.chmod(folder, 0o755)
    shutil.rmtree(folder)


def error_of(action):
    try:
        action()
    except lr.LeanReplayError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_read_only_folder(open_folder):
    """G7: in a folder without permission to write, creating and opening for writing fail cleanly, and reading works."""
    path = os.path.join(open_folder, "replay.h5")
    with make(path) as made:
        made.state_dict()
        before = [a.tolist() for a in made.get([0, 1, 2])[0]]
    os.chmod(path, 0o444)
    os.chmod(path + ".lock", 0o444)
    os.chmod(open_folder, 0o555)
    tried = in_child(
        lambda: [
            error_of(lambda: make(os.path.join(open_folder, "new.h5"))),
            error_of(lambda: lr.open(path, "r+")),
            error_of(lambda: make(path, mode="w")),
            error_of(lambda: make(os.path.join(open_folder, "parts"), lr.InfiniteBuffer)),
            error_of(lambda: make(None).save(os.path.join(open_folder, "saved"))),
            [a.tolist() for a in lr.open(path).get([0, 1, 2])[0]],
            error_of(lambda: lr.open(path).check()),
        ]
    )
    assert isinstance(tried, list), tried
    for message in tried[:5]:
        assert message.startswith("StorageError") and "ermission" in message and "permissions" in message, message
    assert tried[5] == before and tried[6] == "no error"
    assert sorted(os.listdir(open_folder)) == ["replay.h5", "replay.h5.lock", "replay.h5.undo.0"]


def test_file_without_permission_to_read(open_folder):
    """G7: a file that may not be read, and a copy that may not."""
    path = os.path.join(open_folder, "replay.h5")
    with make(path) as made:
        made.save(os.path.join(open_folder, "saved"))
    os.chmod(path, 0)
    os.chmod(os.path.join(open_folder, "saved", "state.json"), 0)
    tried = in_child(lambda: [error_of(lambda: lr.open(path)), error_of(lambda: make(None).load(os.path.join(open_folder, "saved")))])
    assert isinstance(tried, list), tried
    assert all(message.startswith("StorageError") and "permissions" in message for message in tried), tried


FULL = ["No space", "free some space"]


def test_pages_come_before_anything_is_written(tmp_path, monkeypatch):
    """A disk that is full when a commit asks for pages, of any kind of commit: nothing has changed, and the same call works later."""

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    path = str(tmp_path / "replay.h5")
    with lr.ReservoirBuffer(5, path) as made:
        made.add((np.zeros((3, 2)), np.zeros(3, int)), metadata={"logits": np.zeros(3)})
        for values, rows in ((np.ones(3), None), (np.full(1, 2.0), [1])):
            before = snapshot(made)
            made.close()
            made = lr.open(path, mode="r+")  # it has asked for no pages yet
            with monkeypatch.context() as patch:
                patch.setattr(system, "write_zeros", full)
                patch.setattr(system, "LINUX", True)
                with pytest.raises(lr.StorageError, match="free some space"):
                    made.set_metadata("logits", values, rows)
            assert snapshot(made) == before and made.check() == []
            made.set_metadata("logits", values, rows)
            assert made.check() == []
        assert made.get_metadata("logits").tolist() == [1, 2, 1]
        made.close()


class Disk(str):
    """A folder on a small file system."""

    def fill(self):
        """Take all space that is left."""
        block = 1 << 16
        with open(self / "filler", "ab", buffering=0) as file:
            while block:
                try:
                    if file.write(b"x" * block) < block:
                        block //= 2
                except OSError:
                    block //= 2

    def free(self, n=None):
        """Give back n bytes, by default all."""
        if n is None:
            os.unlink(self / "filler")
        else:
            os.truncate(self / "filler", os.path.getsize(self / "filler") - n)

    def __truediv__(self, name):
        return os.path.join(self, name)

    def leftovers(self):
        return [n for n in os.listdir(self) if n.endswith(".tmp")]


def full_creation(disk, elsewhere):
    path = disk / "replay.h5"
    for room in (0, 30_000):
        disk.fill()
        if room:
            disk.free(room)
        made = make(path, fed=0)
        refuses(made, lr.StorageError, FULL, lambda b: feed(b, 0, 5))
        assert not os.path.exists(path) and disk.leftovers() == [] and made.schema is None
        disk.free()
        feed(made, 0, 5)
        assert len(made) == 5 and made.check() == []
        made.close()
        os.unlink(path)
    made = make(path, fed=0, mode="w")
    made.close()


def full_larger_than_the_disk(disk, elsewhere):
    path = disk / "replay.h5"
    made = lr.ReservoirBuffer(10**7, path)
    refuses(made, lr.StorageError, FULL, lambda b: feed(b, 0, 5))
    made.resize(8)
    feed(made, 0, 20)
    assert snapshot(made)[0] == snapshot(make(None))[0]


def full_new_undo_file(disk, elsewhere):
    path = disk / "replay.h5"
    with make(path) as made, make(None) as twin:
        disk.fill()
        for _ in range(2):
            refuses(made, lr.StorageError, FULL, lambda b: b.state_dict())
        assert not [n for n in os.listdir(disk) if "undo" in n]
        disk.free()
        for buffer in (made, twin):
            feed(buffer, 20, 200)
        state = made.state_dict()
        feed(made, 220, 50)
        made.load_state_dict(state)
        assert snapshot(made)[0] == snapshot(twin)[0] and made.check() == []


def full_growing_undo_file(disk, elsewhere):
    path = disk / "replay.h5"
    size = 4000

    def big(start, n):
        return np.arange(start, start + n)[:, None] * np.ones((1, size // 8), np.int64)

    with lr.SlidingWindowBuffer(40, path) as made, lr.SlidingWindowBuffer(40) as twin:
        for buffer in (made, twin):
            buffer.add(big(0, 60))
        state = made.state_dict()
        disk.fill()
        before = made.get(range(40))[0].tobytes(), made.seen, made._store.mark_name(), made._store.policy
        for _ in range(3):
            try:
                made.add(big(60, 40))
            except lr.StorageError as error:
                assert all(word in str(error) for word in FULL), error
            else:
                raise AssertionError("no error on a full disk")
            assert (made.get(range(40))[0].tobytes(), made.seen, made._store.mark_name(), made._store.policy) == before
        assert made.check() == []
        made.load_state_dict(state)
        disk.free()
        for buffer in (made, twin):
            buffer.add(big(60, 70))
        assert made.get(range(40))[0].tobytes() == twin.get(range(40))[0].tobytes() and made.check() == []
        made.load_state_dict(state)
        assert made.get(range(40))[0].tobytes() == before[0] and made.seen == 60 and made.check() == []


def full_resize_and_a_new_field(disk, elsewhere):
    path = disk / "replay.h5"
    with make(path) as made, make(None) as twin:
        disk.fill()
        refuses(made, lr.StorageError, FULL, lambda b: b.resize(4))
        refuses(made, lr.StorageError, FULL, lambda b: b.set_metadata("new", np.zeros(8)))
        assert disk.leftovers() == [] and made.check() == []
        feed(made, 20, 300)
        disk.free()
        feed(twin, 20, 300)
        for buffer in (made, twin):
            buffer.resize(4)
        assert snapshot(made)[0] == snapshot(twin)[0] and made.check() == []


def full_next_part(disk, elsewhere):
    with make(disk / "parts", lr.InfiniteBuffer, fed=8) as made, make(None, lr.InfiniteBuffer, fed=8) as twin:
        disk.fill()
        refuses(made, lr.StorageError, FULL, lambda b: feed(b, 8, 3))
        refuses(made, lr.StorageError, FULL, lambda b: feed(b, 8, 3))
        disk.free()
        for buffer in (made, twin):
            feed(buffer, 8, 20)
        assert snapshot(made)[0] == snapshot(twin)[0] and made.check() == []


def full_save_and_load(disk, elsewhere):
    path = disk / "replay.h5"
    with make(path) as made:
        made.save(elsewhere)
        feed(made, 20, 100)
        disk.fill()
        refuses(made, lr.StorageError, FULL, lambda b: b.save(disk / "saved"))
        refuses(made, lr.StorageError, FULL, lambda b: b.load(elsewhere))
        assert disk.leftovers() == [] and made.check() == []
        disk.free()
        made.load(elsewhere)
        assert made.seen == 20 and snapshot(made)[0] == snapshot(make(None))[0]
        made.save(disk / "saved")


def full_holes(disk, elsewhere):
    path = disk / "replay.h5"
    # A copy that made holes: opening for writing must take the blocks, or say that there are none.
    with make(path) as made:
        before = snapshot(made)[0]
    with open(path, "rb") as file:
        data = file.read()
    os.unlink(path)
    with open(path, "wb") as file:
        for at in range(0, len(data), 4096):
            if data[at : at + 4096].strip(b"\0"):
                file.seek(at)
                file.write(data[at : at + 4096])
        file.truncate(len(data))
    assert os.stat(path).st_blocks * 512 < len(data)
    disk.fill()
    try:
        lr.open(path, "r+")
    except lr.StorageError as error:
        assert all(word in str(error) for word in FULL), error
    else:
        raise AssertionError("no error on a full disk")
    with lr.open(path) as made:
        assert snapshot(made)[0] == before
    disk.free()
    with lr.open(path, "r+") as made:
        disk.fill()
        feed(made, 20, 200)
        assert made.check() == []


SCENARIOS = [
    full_creation,
    full_larger_than_the_disk,
    full_new_undo_file,
    full_growing_undo_file,
    full_resize_and_a_new_field,
    full_next_part,
    full_save_and_load,
    full_holes,
]


def mount_small(folder):
    """Mount 2 MiB of tmpfs in a mount namespace of this process alone. Raises OSError where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    newns, newuser, private, recursive = 0x00020000, 0x10000000, 1 << 18, 1 << 14

    def check(result):
        if result != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    user, group = os.geteuid(), os.getegid()
    check(libc.unshare(newns | (newuser if user else 0)))
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    check(libc.mount(None, b"/", None, recursive | private, None))
    check(libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, b"size=2m"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts a small file system, which this test can do on Linux only")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_full_disk(scenario, tmp_path):
    """G7: on a full disk every write fails cleanly (no SIGBUS), the buffer stays as it was and goes on once space is free."""
    for name in ("disk", "elsewhere"):
        (tmp_path / name).mkdir()

    def run():
        try:
            mount_small(tmp_path / "disk")
        except OSError as error:
            return f"cannot mount: {error}"
        scenario(Disk(tmp_path / "disk"), str(tmp_path / "elsewhere"))
        return "passed"

    outcome = in_child(run, other_user=False)
    if outcome.startswith("cannot mount"):
        pytest.skip(f"a small file system cannot be mounted here: {outcome}")
    assert outcome == "passed", outcome


def test_h5py_files_are_refused(tmp_path):
    """G7: HDF5 but not ours, under every mode that opens."""
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["data/0"] = np.zeros(3)
    before = (tmp_path / "other.h5").read_bytes()
    for mode in ("r", "r+", "a"):
        with pytest.raises(lr.FormatError, match="plain HDF5 file"):
            lr.ReservoirBuffer(8, tmp_path / "other.h5", mode=mode)
    assert (tmp_path / "other.h5").read_bytes() == before


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="Linux only")
def test_no_descriptor_is_left(tmp_path):
    """Of files that are refused, and of those that open."""
    good, cut = str(tmp_path / "good.h5"), tmp_path / "cut.h5"
    with lr.ReservoirBuffer(5, good) as buffer:
        buffer.add(np.zeros((3, 2)))
    cut.write_bytes((tmp_path / "good.h5").read_bytes()[:5000])
    before = len(os.listdir("/proc/self/fd"))
    for mode in ("r", "r+"):
        lr.open(good, mode=mode).close()
        with pytest.raises(lr.FormatError):
            lr.open(cut, mode=mode)
        with pytest.raises(lr.FormatError):
            lr.ReservoirBuffer(None, cut, mode=mode)
    assert len(os.listdir("/proc/self/fd")) == before
