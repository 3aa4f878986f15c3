"""Transforms get tensors wherever torch reads; what transforms draws if nothing was said; batch_transform."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from learner_oracle import sgd
from torch.utils.data import DataLoader

import leanreplay
from leanreplay import ArgumentError, ReservoirBuffer, SlidingWindowBuffer
from leanreplay.torch import BufferDataset, CLSLearner, DERLearner, ERLearner, MixedLoader, ReplayLoader, evaluate, fit, sample

SIZE = 8
IMAGES = torch.arange(SIZE * 48).reshape(SIZE, 3, 4, 4).to(torch.uint8)
LABELS = torch.arange(SIZE)


class Flip(torch.nn.Module):
    """As torchvision's: what is no tensor comes back as it is."""

    def forward(self, x):
        return x.flip(-1) if isinstance(x, torch.Tensor) else x


class Steps:
    """As torchvision's older Compose, which is no module."""

    def __init__(self, *transforms):
        self.transforms = list(transforms)

    def __call__(self, x):
        for transform in self.transforms:
            x = transform(x)
        return x


def flips():
    flip = Flip()
    return {"module": flip, "steps": Steps(Steps(flip)), "bound": flip.forward}


READERS = {
    "dataset": lambda b: DataLoader(BufferDataset(b), batch_size=SIZE),
    "sample": lambda b: [(sample(b, SIZE)[0])],
    "loader": lambda b: (batch for batch, _ in ReplayLoader(b, SIZE, batches=1)),
    "mixed": lambda b: [(x[1:], y[1:]) for x, y, *_ in MixedLoader([(IMAGES[:1], LABELS[:1])], b, SIZE)],
    "core": lambda b: [b.sample(SIZE)[0]],
    "core, items": lambda b: DataLoader([b[i][0] for i in range(SIZE)], batch_size=SIZE),
    "core, rows": lambda b: [b.get(np.arange(SIZE))[0]],
}


@pytest.mark.parametrize("how", [*flips(), "torchvision"])
@pytest.mark.parametrize("reader", READERS)
def test_modules_see_tensors(how, reader):
    """A module that does nothing to arrays does its work, whoever reads; the stored bytes are as they came."""
    if how == "torchvision":
        v2 = pytest.importorskip("torchvision.transforms.v2")
        transform = v2.Compose([v2.RandomHorizontalFlip(1.0)])
    else:
        transform = flips()[how]
    buffer = ReservoirBuffer(SIZE, transform=transform)
    buffer.add((IMAGES, LABELS))
    for x, y in READERS[reader](buffer):
        x, y = torch.as_tensor(x), torch.as_tensor(y)
        assert x.dtype == torch.uint8 and torch.equal(x, IMAGES.flip(-1)[y])
    buffer.transform = None
    assert np.array_equal(buffer.get(np.arange(SIZE))[0][0], IMAGES)


@pytest.mark.parametrize("reader", READERS)
def test_functions_see_tensors(reader):
    """transform and target_transform get tensors from the torch side, arrays and numbers from the core."""
    kind = (np.ndarray, np.generic) if reader.startswith("core") else torch.Tensor

    def target(y):
        assert isinstance(y, kind) and y.shape == () and y.dtype in (np.int64, torch.int64)
        return y + 10

    def transform(x):
        assert isinstance(x, kind) and x.shape == (3, 4, 4)
        return x

    buffer = ReservoirBuffer(SIZE, transform=transform, target_transform=target)
    buffer.add((IMAGES, LABELS))
    for x, y in READERS[reader](buffer):
        assert torch.equal(torch.as_tensor(x), IMAGES[torch.as_tensor(y) - 10])


def test_samples_that_are_no_pairs():
    """Nested samples, with bfloat16: tensors at every leaf."""
    seen = []
    buffer = SlidingWindowBuffer(4, transform=lambda s: seen.append(s) or s)
    buffer.add({"a": torch.ones(4, 2, dtype=torch.bfloat16), "b": [np.arange(4)]})
    batch, _ = sample(buffer, 3, batch_transform=lambda s: {"c": s["a"] * 2})
    assert torch.equal(batch["c"], torch.full((3, 2), 2.0, dtype=torch.bfloat16)) and len(seen) == 3
    assert all(s["a"].dtype is torch.bfloat16 and s["b"][0].dtype is torch.int64 for s in seen)
    item = BufferDataset(buffer, batch_transform=lambda s: {**s, "b": s["b"][0] + 1})[2]
    assert item["b"] == 3 and item["a"].shape == (2,)


def scaled(x):
    assert isinstance(x, torch.Tensor)
    return x.float() / 255


def test_batch_transform():
    """One call for all that is read together, after the transforms of single samples; of x alone."""
    calls = []

    def batch_transform(x):
        calls.append(tuple(x.shape))
        return x.mul_(2)

    buffer = ReservoirBuffer(SIZE, transform=scaled)
    buffer.add((IMAGES, LABELS))
    options = {"batch_transform": batch_transform}
    found = [next(iter(DataLoader(BufferDataset(buffer, **options), batch_size=SIZE)))]
    found.append(sample(buffer, SIZE, **options)[0])
    stream = [(IMAGES[:1].float() / 255, LABELS[:1])]
    for _ in range(2):
        found += [(x, y) for x, y, *_ in MixedLoader(stream, buffer, SIZE, **options)]
    for x, y in found:
        torch.testing.assert_close(x, 2 * scaled(IMAGES[y]))
    assert calls == [(SIZE, 3, 4, 4)] * 2 + [(SIZE + 1, 3, 4, 4)] * 2
    assert next(iter(MixedLoader(stream, ReservoirBuffer(2), 2, **options)))[0].max() < 1  # an empty buffer: the stream's, 2 * 47 / 255
    (x, y), meta = BufferDataset(buffer, metadata=True, batch_transform=Flip())[3]
    assert torch.equal(x, scaled(IMAGES[3]).flip(-1)) and y == 3 and meta["position"] == 3
    result = evaluate(torch.nn.Flatten(), [(torch.eye(4), torch.arange(4))], transform=lambda x: x * 0 + x, batch_transform=Flip())
    assert result.average_accuracy == 0


@pytest.mark.parametrize("wrong", [lambda x: x[:2], lambda x: x.sum(), lambda x: x[0]])
def test_batch_transforms_that_lose_samples(wrong):
    buffer = ReservoirBuffer(SIZE)
    buffer.add((IMAGES, LABELS))
    for call in (
        lambda: sample(buffer, SIZE, batch_transform=wrong),
        lambda: BufferDataset(buffer, batch_transform=wrong).__getitems__([1, 2, 3, 4]),
        lambda: list(MixedLoader([(IMAGES, LABELS)], buffer, 3, batch_transform=wrong)),
        lambda: make(ERLearner, batch_transform=wrong)[0].step(IMAGES, LABELS % 3),
        lambda: evaluate(torch.nn.Flatten(), [(IMAGES, LABELS)], batch_transform=wrong),
    ):
        with pytest.raises(ArgumentError, match="batch_transform: it"):
            call()
    for call in (
        lambda: sample(buffer, 3, batch_transform=3),
        lambda: BufferDataset(buffer, batch_transform="x"),
        lambda: MixedLoader([], buffer, 3, batch_transform=3),
        lambda: make(ERLearner, batch_transform=3),
        lambda: make(ERLearner, buffer_batch_transform=3),
        lambda: evaluate(torch.nn.Flatten(), [(IMAGES, LABELS)], batch_transform=3),
        lambda: fit(make(ERLearner)[0], (IMAGES, LABELS), test_batch_transform=3),
    ):
        with pytest.raises(ArgumentError, match="batch_transform must be a function"):
            call()


# -- learners ----------------------------------------------------------------------------------------------------------------


def make(kind, buffer=None, **options):
    """A learner, and a list of what its model gets: (dtype, largest value) of each pass."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    passes = []
    model.register_forward_pre_hook(lambda _, inputs: passes.append((inputs[0].dtype, inputs[0].max().item())) or (inputs[0].float(),))
    return kind(model, sgd(model), ReservoirBuffer(20) if buffer is None else buffer, replay_batch_size=4, **options), passes


BRIGHT = torch.full((6, 3, 4, 4), 255, dtype=torch.uint8)
Y = torch.arange(6) % 3
ALL = pytest.mark.parametrize("kind", [ERLearner, CLSLearner, DERLearner])


@ALL
@pytest.mark.parametrize("name", ["transform", "batch_transform"])
def test_draws_are_transformed_as_the_stream(kind, name):
    """Nothing said: what the stream has. The buffer keeps the bytes that came."""
    learner, passes = make(kind, **{name: scaled})
    for _ in range(3):
        learner.step(BRIGHT, Y)
    assert set(passes) == {(torch.float32, 1.0)} and len(passes) >= 3
    assert learner.buffer.get(np.arange(18))[0][0].min() == 255


@ALL
def test_targets_of_draws_are_mapped_as_the_stream(kind):
    seen = []
    learner, _ = make(kind, transform=scaled, target_transform=lambda y: y - 10, ignore_index=-1)
    learner.loss_fn = lambda outputs, y: seen.extend(y.tolist()) or torch.nn.functional.cross_entropy(outputs, y)
    for _ in range(3):
        learner.step(BRIGHT, Y + 10)
    assert set(seen) == {0, 1, 2} and learner.buffer.get(np.arange(18))[0][1].min() == 10


@ALL
def test_false_means_none(kind):
    """An explicit False leaves draws as they are, which is refused if the model would see two kinds of samples; unless it is one."""
    learner, _ = make(kind, transform=scaled, buffer_transform=False)
    learner.step(BRIGHT, Y)
    with pytest.raises(ArgumentError, match=r"stream \(x torch.float32 .* buffer \(x torch.uint8"):
        learner.step(BRIGHT, Y)
    assert learner.buffer.seen == 6
    learner, passes = make(kind, transform=lambda x: x // 5, buffer_transform=False)
    for _ in range(3):
        learner.step(BRIGHT, Y)
    assert {m for _, m in passes} <= {51, 255} and max(m for _, m in passes) == 255
    learner, passes = make(kind, batch_transform=lambda x: x // 5, buffer_batch_transform=False, transform=scaled)
    for _ in range(3):
        learner.step(BRIGHT, Y)
    assert {m for _, m in passes} <= {0.0, 1.0} and max(m for _, m in passes) == 1
    for name in ("buffer_transform", "buffer_target_transform", "buffer_batch_transform"):
        for value in (0, [], True):
            with pytest.raises(ArgumentError, match=f"{name} must be a function"):
                make(kind, **{name: value})


@ALL
def test_a_buffer_with_its_own_transform(kind):
    """It counts as said: draws are not transformed twice. Labels likewise."""
    buffer = ReservoirBuffer(20, transform=scaled, target_transform=lambda y: y - 10)
    learner, passes = make(kind, buffer, transform=scaled, target_transform=lambda y: y - 10, ignore_index=-100)
    for _ in range(3):
        learner.step(BRIGHT, Y + 10)
    assert set(passes) == {(torch.float32, 1.0)}
    learner, passes = make(kind, ReservoirBuffer(20, transform=lambda x: x // 5), batch_transform=scaled, buffer_batch_transform=scaled)
    for _ in range(3):
        learner.step(BRIGHT, Y)
    assert {round(m, 6) for _, m in passes} <= {1.0, 0.2}
    learner, passes = make(kind, ReservoirBuffer(20, transform=scaled), batch_transform=scaled)
    for _ in range(3):
        learner.step(BRIGHT, Y)
    assert set(passes) == {(torch.float32, 1.0)}
    learner, passes = make(kind, ReservoirBuffer(20, transform=scaled))
    learner.step(BRIGHT, Y)
    with pytest.raises(ArgumentError, match="two kinds"):
        learner.step(BRIGHT, Y)


def test_shapes_and_targets_of_one_batch():
    """What goes through the model together has one shape, and labels of one dtype; torch would widen them."""
    narrow = {"transform": lambda x: x[:, :2], "buffer_transform": False}
    for options in (narrow, {"target_transform": float, "buffer_target_transform": False}):
        learner, _ = make(ERLearner, **options, loss_fn=lambda outputs, y: outputs.sum())
        learner.model[1] = torch.nn.Linear(24 if options is narrow else 48, 3)
        learner.step(BRIGHT, Y)
        with pytest.raises(ArgumentError, match="two kinds"):
            learner.step(BRIGHT, Y)


def test_torchvision_in_a_learner():
    """v2 transforms for each sample and for batches, as documented: the model sees what they make."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    to_float = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3, inplace=True)])
    for name in ("transform", "batch_transform"):
        learner, passes = make(ERLearner, **{name: to_float})
        for _ in range(3):
            learner.step(BRIGHT, Y)
        assert set(passes) == {(torch.float32, 1.0)} and learner.buffer.get(np.arange(18))[0][0].min() == 255
    with leanreplay.ReservoirBuffer(9, transform=to_float) as buffer:
        learner, passes = make(DERLearner, buffer, batch_transform=to_float)
        for _ in range(3):
            learner.step(BRIGHT, Y)
        assert set(passes) == {(torch.float32, 1.0)}


def test_validation_of_fit():
    """test_batch_transform after test_transform; the learner's own are for training only."""
    learner, passes = make(ERLearner, transform=scaled)
    history = fit(
        learner, (BRIGHT, Y), val_dataset=(BRIGHT, Y), max_epochs=1, progress=False, test_transform=lambda x: x // 5,
        test_batch_transform=scaled,
    )  # fmt: skip
    assert passes[-1] == (torch.float32, pytest.approx(0.2)) and np.isfinite(history["val_loss"][0])
