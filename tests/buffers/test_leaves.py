"""What stands for an array in a sample or batch: taken if it can become one; what cannot is refused with a way out that works."""

from __future__ import annotations

import array
import datetime
import decimal
import fractions
from collections import deque

import numpy as np
import pytest
from inputs import Frame, N, X, Y, added, refused, updated

import leanreplay as lr

torch = pytest.importorskip("torch")

# -- leaves ---------------------------------------------------------------------------------------------------------------


def test_images_of_pil():
    Image = pytest.importorskip("PIL.Image")
    images = [Image.fromarray(np.full((8, 6, 3), i, np.uint8)) for i in range(9)]
    (x, y), schema = updated([(image, i) for i, image in enumerate(images)])
    assert "data/0: u1[8, 6, 3]" in schema and np.array_equal(x, np.stack([np.asarray(i) for i in images])) and y.tolist() == list(range(9))
    assert updated(images)[0].shape == (9, 8, 6, 3)
    assert updated([{"image": i.convert("L")} for i in images])[0]["image"].shape == (9, 8, 6)
    with lr.ClassBalancedBuffer(6) as buffer:
        buffer.update([(image, i % 3) for i, image in enumerate(images)])
        assert buffer.group_sizes() == {0: 2, 1: 2, 2: 2}
        with pytest.raises(lr.SchemaError, match=r"item 0 .*expected uint8"):
            buffer.update([(images[0].convert("L"), 0)])
    assert lr.Schema.from_sample((images[0], 0)).data[0].shape == (8, 6, 3)
    for batch in (images[0], (images[0], Y[:8])):
        assert "a list of images, or call update" in refused(lambda b, batch=batch: b.add(batch))
    for batch in (images, tuple(images), np.stack([np.asarray(i) for i in images])):
        assert np.array_equal(added(batch)[0], x)
    with lr.ReservoirBuffer(20) as buffer:
        for _ in range(2):
            buffer.add({"image": images, "y": np.arange(9)}, metadata={"before": images[::-1]})
        assert len(buffer) == 18 and np.array_equal(buffer[9][0]["image"], x[0]) and np.array_equal(buffer[9][1]["before"], x[8])
        for wrong in (images[0].convert("L"), images[0].resize((5, 5))):
            with pytest.raises(lr.SchemaError, match="data/image: the images of a batch differ in size or mode"):
                buffer.add({"image": [*images[:8], wrong], "y": np.arange(9)}, metadata={"before": images})
        with pytest.raises(lr.SchemaError, match="differ in length"):
            buffer.add({"image": images[:8], "y": np.arange(9)}, metadata={"before": images})


class Exports:
    """An object that says how it becomes an array, once."""

    def __init__(self, values):
        self.values, self.times = values, 0

    def __array__(self, dtype=None, copy=None):
        self.times += 1
        return np.array(self.values, dtype)


def test_what_numpy_takes_is_taken():
    for values in (Exports(Y), array.array("q", Y.tolist()), memoryview(Y), np.arange(N).view(np.recarray) * 0 + Y):
        (x, y), _ = added((X, values))
        assert np.array_equal(y, Y) and np.array_equal(x, X)
    assert added(bytearray(b"abc"))[0].tolist() == [97, 98, 99]
    items = [(Exports(x), array.array("f", x.tolist())) for x in X]
    (a, b), schema = updated(items)
    assert np.array_equal(a, X) and np.array_equal(b, X) and "data/0: f4[4], data/1: f4[4]" in schema
    with lr.ReservoirBuffer(5) as buffer:
        buffer.add((X, Y), metadata={"z": Exports(Y)})
        z = Exports(np.arange(5.0))
        buffer.set_metadata("w", z)
        buffer.set_metadata("w", Exports(np.ones(5)))
        assert buffer.get_metadata("w").tolist() == [1] * 5
    with lr.ReservoirBuffer(5, schema=lr.Schema.from_batch(X)) as buffer:
        leaf = Exports(X)
        buffer.add(leaf)
        assert leaf.times == 1  # it may be slow, and give something else the next time


class Raises:
    def __array__(self, dtype=None, copy=None):
        raise OSError("cannot read the image")


@pytest.mark.parametrize("values", [Raises(), Frame(np.array([["a", 1]] * N, object)), Frame([[1, 2], [3]] * 6)])
def test_what_cannot_become_an_array(values):
    for action in (lambda b: b.add((X, values)), lambda b: b.update([(X[0], values)] * 3), lambda b: b.add((X, Y), metadata={"z": values})):
        message = refused(action)
        assert "cannot become an array" in message or "df[c].to_numpy()" in message or "expected" in message, message


TENSORS = {
    "nested": (
        lambda: torch.nested.nested_tensor([torch.rand(2), torch.rand(3), torch.rand(1)]),
        lambda t: torch.nested.to_padded_tensor(t, 0.0),
    ),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.rand(2), torch.rand(3), torch.rand(1)], layout=torch.jagged),
        lambda t: torch.nested.to_padded_tensor(t, 0.0),
    ),
    "sparse": (lambda: torch.eye(3).to_sparse(), lambda t: t.to_dense()),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), lambda t: t.to_dense()),
    "csc": (lambda: torch.eye(3).to_sparse_csc(), lambda t: t.to_dense()),
    "quantized": (lambda: torch.quantize_per_tensor(torch.rand(3, 4), 0.1, 0, torch.quint8), lambda t: t.dequantize()),
    "quantized, as it is": (lambda: torch.quantize_per_tensor(torch.rand(3, 4), 0.1, 0, torch.qint8), lambda t: t.int_repr()),
    "complex32": (lambda: torch.zeros(3, 2, dtype=torch.complex32), lambda t: t.to(torch.complex64)),
    "float8": (lambda: torch.zeros(3, 2).to(torch.float8_e5m2), lambda t: t.float()),
}
HINTS = {
    "nested": "torch.nested.to_padded_tensor(t, 0.0)", "jagged": "torch.nested.to_padded_tensor(t, 0.0)", "quantized": ".dequantize()",
    "quantized, as it is": ".int_repr()", "complex32": ".to(torch.complex64)", "float8": ".float()",
}  # fmt: skip


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_of_other_kinds(kind):
    """Each is refused with a conversion, which works."""
    make, convert = TENSORS[kind]
    try:
        tensor = make()
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torch {torch.__version__} has none: {error}")
    hint = HINTS.get(kind, ".to_dense()")
    for action in (lambda b: b.add((tensor, Y[:3])), lambda b: b.add(tensor), lambda b: b.add((X[:3], Y[:3]), metadata={"z": tensor})):
        assert hint in refused(action)
    with lr.ReservoirBuffer(5) as buffer:
        buffer.add((X, Y))
        with pytest.raises(lr.SchemaError):
            buffer.add((tensor, Y[:3]))
        assert buffer.seen == N
    assert len(added((convert(tensor), Y[:3]))[0][1]) == 3


@pytest.mark.parametrize("strided", [False, True])
def test_tensors_without_values(strided):
    """Those of a tracing mode or within a transformation of torch, and parameters that wait for their shape: no file is made for them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.rand(3, 4, 2)[:, :, 0] if strided else torch.rand(3, 4)
    assert "cannot be read" in refused(lambda b: b.add((fake, Y[:3])))

    def within(action):
        def seen(x):
            action(x[:, :, 0] if strided else x)
            return x

        return lambda b: torch.vmap(seen)(torch.rand(2, 3, 4, 2) if strided else torch.rand(2, 3, 4))

    with lr.ReservoirBuffer(5) as buffer:
        message = refused(within(lambda x: buffer.add((x, Y[:3]))))
        assert "cannot be read" in message and buffer.schema is None
    assert "has no shape" in refused(lambda b: b.add((torch.nn.UninitializedParameter(), Y[:3])))


def test_bfloat16_beside_the_samples():
    """Features and weights: as float32, which holds all values; stored features of bfloat16 rank as their values, not as their bits."""
    features = torch.randn(N, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    kept = []
    for given in (
        {"features": features},
        {"features": features.float()},
        {"features": lambda batch: features[: len(batch[0])] if len(batch[0]) == N else features[batch[1]]},
        {"metadata": {"features": features}},
        {"metadata": {"features": features.float()}},
    ):
        with lr.ParametricBuffer(4, selection_strategy=lr.HerdingSelection()) as buffer:
            buffer.update([(x, i) for i, x in enumerate(X)], **given)
            kept.append(buffer.get_metadata("position").tolist())
    assert all(k == kept[0] for k in kept), kept
    again = []
    for both in (features, features.float()):  # a group that is fed again: of those held, and of new ones
        with lr.ParametricBuffer(4, selection_strategy=lr.HerdingSelection()) as buffer:
            buffer.update((X[:6], Y[:6]), metadata={"features": both[:6]})
            buffer.update((X[6:], Y[6:]), metadata={"features": both[6:]}, features=both[6:])
            again.append(sorted(buffer.get_metadata("position").tolist()))
    assert again[0] == again[1]
    weights = torch.rand(N).bfloat16()
    with lr.WeightedReservoirBuffer(N) as buffer:
        buffer.add(X, weights=weights)
        assert np.array_equal(buffer.get_metadata("weight"), weights.double().numpy())


# -- messages -------------------------------------------------------------------------------------------------------------

TEXTS = np.array(["a", "bé", "ccc"])
TABLE = np.zeros(3, "i4,f4")
FOLLOWED = {  # what is refused -> (words of the message, what they say to do)
    "numbers": ([0, 1, 2], "np.array(values)", lambda v: np.array(v)),
    "a range": (range(3), "np.array(values)", lambda v: np.array(v)),
    "a deque": (deque([0, 1, 2]), "np.array(values)", lambda v: np.array(v)),
    "rows of numbers": ([[0.5, 1], [2, 3], [4, 5]], "np.array(values)", lambda v: np.array(v)),
    "unicode": (TEXTS, "np.char.encode(a, 'utf-8').astype('S32')", lambda a: np.char.encode(a, "utf-8").astype("S32")),
    "datetime64": (np.arange(3).astype("M8[s]"), "a.astype('int64')", lambda a: a.astype("int64")),
    "timedelta64": (np.arange(3).astype("m8[s]"), "a.astype('int64')", lambda a: a.astype("int64")),
    "objects": (np.array([1, 2, 3], object), "np.array(a.tolist())", lambda a: np.array(a.tolist())),
    "bytes of a type": (np.zeros(3, "V8"), "a[..., None].view('u1')", lambda a: a[..., None].view("u1")),
    "fields": (TABLE, "{name: a[name] for name in a.dtype.names}", lambda a: {name: a[name] for name in a.dtype.names}),
    "longdouble": (np.zeros(3, np.longdouble), "a.astype('float64')", lambda a: a.astype("float64")),
    "masked": (np.ma.masked_array([1, 2, 3], [0, 1, 0]), ".filled(value)", lambda a: a.filled(0)),
}


@pytest.mark.parametrize("kind", FOLLOWED)
def test_hints_work_in_batches(kind):
    values, hint, follow = FOLLOWED[kind]
    if kind == "longdouble" and np.dtype(np.longdouble).itemsize == 8:
        pytest.skip("longdouble is float64 here")
    message = refused(lambda b: b.add((X[:3], values)))
    assert hint in message and "data/1" in message
    with lr.SlidingWindowBuffer(9) as buffer:
        buffer.add((X[:3], follow(values)))
        buffer.add((X[:3], follow(values)))
        assert len(buffer) == 6 and buffer.check() == []


def test_one_value_for_all():
    with lr.SlidingWindowBuffer(30) as buffer:
        for batch, metadata in (((X, 1), None), ((X, Y), {"task": 1}), ((X, np.float32(1)), None), ((X, [torch.tensor(1)] * N), None)):
            with pytest.raises(lr.SchemaError, match=r"np\.full\(n, value\).*np\.stack\(values\)"):
                buffer.add(batch, metadata=metadata)
        buffer.add((X, np.stack([torch.tensor(1)] * N)), metadata={"task": np.full(N, 1)})
        assert buffer.get_metadata("task").tolist() == [1] * N


def test_text_of_another_length_fits():
    """The hint names a width: of one that NumPy chooses the next batch would be refused."""
    with lr.SlidingWindowBuffer(9) as buffer:
        for texts in (["a", "b"], ["long", "é" * 10]):
            buffer.add((X[:2], np.char.encode(texts, "utf-8").astype("S32")))
        assert [t.decode() for t in buffer.get(range(4))[0][1].tolist()] == ["a", "b", "long", "é" * 10]
        with pytest.raises(lr.SchemaError, match=r"\.astype\('S32'\)") as caught:
            buffer.add((X[:2], np.array([b"x", b"y"])))
        assert "cuts" in str(caught.value)
        buffer.add((X[:2], np.array([b"x", b"y"]).astype("S32")))


@pytest.mark.parametrize(
    ("leaf", "hint", "follow"),
    [
        ("text é", "np.char.encode(text, 'utf-8').astype('S32')", lambda v: np.char.encode(v, "utf-8").astype("S32")),
        (b"bytes", "np.array(value, 'S32')", lambda v: np.array(v, "S32")),
        (None, "leave it out, or give a number", lambda v: -1),
        (datetime.datetime(2020, 1, 1), ".timestamp()", lambda v: v.timestamp()),
        (datetime.date(2020, 1, 1), ".toordinal()", lambda v: v.toordinal()),
        (np.datetime64("2020-01-01"), ".astype('int64')", lambda v: v.astype("int64")),
        (np.str_("x"), "np.char.encode(a, 'utf-8').astype('S32')", lambda v: np.char.encode(v, "utf-8").astype("S32")),
        (range(3), "np.array(values)", lambda v: np.array(v)),
        (2**70, "make larger integers floats", float),
        (decimal.Decimal("0.5"), "float(value)", float),
        (fractions.Fraction(1, 3), "float(value)", float),
        (np.array([[1], [2, 3]], object), "pad them", lambda v: np.array([[1, 0], [2, 3]])),
    ],
)
def test_hints_work_in_samples(leaf, hint, follow):
    message = refused(lambda b: b.update([(X[0], leaf)] * 3))
    assert hint in message and "item 0" in message and "data/1" in message
    found, _ = updated([(X[0], follow(leaf))] * 3)
    assert len(found[1]) == 3


def test_sparse_matrices():
    scipy = pytest.importorskip("scipy.sparse")
    matrix = scipy.csr_matrix(X)
    assert ".toarray()" in refused(lambda b: b.add((matrix, Y)))
    assert np.array_equal(added((matrix.toarray(), Y))[0][0], X)


def test_a_missing_key_is_named():
    with lr.ReservoirBuffer(5) as buffer:
        buffer.add({"x": X, "y": Y})
        for batch, missing, extra in (
            ({"x": X}, ["y"], []), ({"x": X, "z": Y}, ["y"], ["z"]), ({"x": X, "y": Y, "z": Y}, [], ["z"]), ({"x": X, 5: Y}, ["y"], [5]),
        ):  # fmt: skip
            with pytest.raises(lr.SchemaError) as caught:
                buffer.add(batch)
            assert f"missing {missing}, unexpected {extra}" in str(caught.value)
        assert buffer.seen == N


def test_byte_order():
    """Big-endian arrays are converted wherever arrays go in."""
    big = X.astype(">f4"), Y.astype(">i8")
    for (x, y), _ in (
        added(big),
        updated(big),
        updated(list(zip(*big, strict=True))),
        updated([(big[0][i], np.int64(Y[i])) for i in range(N)]),
    ):
        assert np.array_equal(x, X) and np.array_equal(y, Y) and x.dtype.isnative and y.dtype.isnative
    with lr.ReservoirBuffer(N) as buffer:
        buffer.add(big, metadata={"z": big[0]})
        buffer.set_metadata("z", -big[0])
        buffer.set_metadata("w", big[1])
        assert np.array_equal(buffer.get_metadata("z"), -X) and np.array_equal(buffer.get_metadata("w"), Y)
    from leanreplay.torch import evaluate

    whole = evaluate(torch.nn.Identity(), [(np.eye(4, dtype=">f4"), np.arange(4).astype(">i8"))])
    assert whole.average_accuracy == 1.0
    assert evaluate(torch.nn.Identity(), [(np.eye(4)[::-1], np.arange(4)[::-1])]).average_accuracy == 1.0
    with pytest.raises(lr.ArgumentError, match=r"np\.unique\(y, return_inverse=True\)\[1\]"):
        evaluate(torch.nn.Identity(), [(np.eye(4), np.array(list("abca")))])
    labels = np.unique(np.array(list("abca")), return_inverse=True)[1]
    assert evaluate(torch.nn.Identity(), [(np.eye(4), labels)]).average_accuracy == 0.75
