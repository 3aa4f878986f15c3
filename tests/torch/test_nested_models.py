"""Learners on nests of tensors: models of several inputs, models that return objects, labels for each pixel."""

from __future__ import annotations

import functools
import importlib.util
import os
import signal

import numpy as np
import pytest
import torch
from children import child, killed
from nested import IGNORED, KINDS, TwoInputs, batches, loss_fn, model_of
from torch.nn.functional import cross_entropy

from leanreplay import ArgumentError, ReservoirBuffer, SchemaError
from leanreplay.torch import CLSLearner, DERLearner, ERLearner, PODLearner, SuperERLearner
from leanreplay.torch.models import run_model

HERE = [kind for kind in KINDS if kind != "transformers" or importlib.util.find_spec("transformers")]
ALL = pytest.mark.parametrize("kind", HERE)
METHODS = {
    "er": (ERLearner, {}),
    "er-mean": (ERLearner, {"alpha": None, "mask_unused_classes": True}),
    "der": (DERLearner, {"max_outputs": 6}),
    "cls": (CLSLearner, {}),
    "pod": (PODLearner, {"layers": ["head"], "distillation_type": "pixel"}),
    "super": (SuperERLearner, {"pod_layers": ["head"], "pod_distillation_type": "pixel", "ema_memory_update_gamma": 0.5}),
}


def make(kind, method=ERLearner, path=None, model=None, **options):
    model = model_of(kind) if model is None else model
    optimizer = torch.optim.Adam(model.parameters(), KINDS[kind][2])
    options = {"replay_batch_size": 16, "loss_fn": loss_fn, "ignore_index": IGNORED, **options}
    return method(model, optimizer, ReservoirBuffer(60, path, seed=3, mode="a"), **options)


def train(learner, stream):
    return [learner.step(x, y).losses for x, y in stream]


def right(learner, kind, task):
    """The share of a task's labels that the model gives, of those that count."""
    with torch.no_grad():
        found = [(run_model(learner.model, x).argmax(1) == y)[y != IGNORED] for x, y in batches(kind, task, 2, 60)]
    return torch.cat(found).float().mean().item()


@functools.cache
def without(kind):
    """What is left of the first task after the second one if nothing is rehearsed."""
    learner = make(kind, store=False)
    train(learner, batches(kind, 0) + batches(kind, 1))
    return right(learner, kind, 0)


@ALL
@pytest.mark.parametrize("method", [ERLearner, DERLearner])
def test_forgets_less(kind, method):
    """After a second task the first one is known better than without rehearsal, and the second one is learned too."""
    learner = make(kind, method)
    train(learner, batches(kind, 0))
    assert right(learner, kind, 0) > 0.85
    train(learner, batches(kind, 1))
    assert right(learner, kind, 1) > 0.8 and right(learner, kind, 0) > without(kind) + 0.1
    assert not learner.buffer.check()


@ALL
@pytest.mark.parametrize("method", [ERLearner, DERLearner])
def test_killed_and_resumed(kind, method, tmp_path):
    """Killed after a few batches more than the checkpoint knows, and resumed in new objects: the same weights, bit for bit."""
    stream = batches(kind, 0, 6) + batches(kind, 1, 3)
    torch.set_num_threads(1)  # a fork has no other threads

    def work(_):
        learner = make(kind, method, tmp_path / "b.h5")
        train(learner, stream[:4])
        parts = {"model": learner.model, "optimizer": learner.optimizer, "learner": learner}
        torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "c.pt")
        train(learner, stream[4:7])
        os.kill(os.getpid(), signal.SIGKILL)

    killed(*child(work))
    learner = make(kind, method, tmp_path / "b.h5")
    assert learner.buffer.seen == 7 * 16
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    learner.model.load_state_dict(state["model"])
    learner.optimizer.load_state_dict(state["optimizer"])
    learner.load_state_dict(state["learner"])
    assert learner.steps == 4 and learner.buffer.seen == 4 * 16
    train(learner, stream[4:])
    whole = make(kind, method)
    train(whole, stream)
    assert all(map(torch.equal, learner.model.state_dict().values(), whole.model.state_dict().values()))
    (x, y), _ = learner.buffer.get(np.arange(60))
    (wanted, y_wanted), _ = whole.buffer.get(np.arange(60))
    torch.testing.assert_close((x, y), (wanted, y_wanted), rtol=0, atol=0)


class Flat(TwoInputs):
    """The model of two inputs, with both in one tensor."""

    def forward(self, x):
        return super().forward(x[:, :6], x[:, 6:])[0]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_nest_is_only_a_nest(method, named):
    """Every method, with masks, moved metadata, hooks and transforms, computes for two inputs what it computes for both in one tensor."""
    learner_type, options = METHODS[method]

    def same(x):
        if isinstance(x, torch.Tensor):
            return 2 * x
        return {k: 2 * v for k, v in x.items()} if named else [2 * v for v in x]

    def of(model):
        made = learner_type(
            model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), ReservoirBuffer(30, seed=1), replay_batch_size=8,
            transform=same, batch_transform=same, **options,
        )  # fmt: skip
        made.on_task_start(0)
        return made

    nested, flat = of(model_of("two inputs")), of(Flat())
    flat.model.load_state_dict(nested.model.state_dict())
    for term, other in zip(flat.terms, nested.terms, strict=True):
        term.load_state_dict(other.state_dict())
    for i, (pair, y) in enumerate(batches("two inputs", 0, 4) + batches("two inputs", 1, 4)):
        x = dict(zip(("left", "right"), pair, strict=True)) if named else pair
        found = [learner.loss(x if learner is nested else torch.cat(pair, 1), y) for learner in (nested, flat)]
        torch.testing.assert_close(*found)
        for learner, loss in zip((nested, flat), found, strict=True):
            loss.backward()
            if i % 2:  # two batches a step: they are joined on their way into the buffer
                learner.optimizer.step()
                learner.optimizer.zero_grad()
                learner.after_step()
    torch.testing.assert_close(nested.model.state_dict(), flat.model.state_dict())
    rows = np.arange(30)
    ((x, y), meta), ((x_flat, y_flat), meta_flat) = nested.buffer.get(rows), flat.buffer.get(rows)
    x = np.concatenate([x["left"], x["right"]] if named else x, 1)
    torch.testing.assert_close((x, y, meta), (x_flat, y_flat, meta_flat))


class Detector(torch.nn.Module):
    """Several outputs: boxes, and scores of classes in a list."""

    def __init__(self):
        super().__init__()
        self.boxes, self.classes = torch.nn.Linear(6, 2), torch.nn.Linear(6, 4)

    def forward(self, image, scale=1.0):
        return {"boxes": scale * self.boxes(image), "found": [self.classes(image)]}


def detecting(method=ERLearner, **options):
    torch.manual_seed(0)
    model = Detector()
    return method(model, torch.optim.SGD(model.parameters(), 0.1), ReservoirBuffer(50), replay_batch_size=10, **options)


def detections(n=10):
    return {"image": torch.randn(n, 6)}, {"class": torch.arange(n) % 4, "box": torch.randn(n, 2)}


def both(outputs, y):
    return (outputs["boxes"] - y["box"]).square().mean() + cross_entropy(outputs["found"][0], y["class"])


def test_outputs_of_any_nesting():
    """A loss_fn takes any nest of outputs and of y; the step has the batch's part of the outputs, and samples come back as they went in."""
    learner = detecting(loss_fn=both)
    for _ in range(2):
        x, y = detections()
        wanted = both(learner.model(**x), y).item()
        step = learner.step(x, y)
        assert step.losses["stream"] == pytest.approx(wanted, rel=1e-5)
    assert (
        step.outputs["boxes"].shape == (10, 2) and not step.outputs["found"][0].requires_grad and list(step.losses) == ["stream", "replay"]
    )
    (stored, label), meta = learner.buffer.get(np.arange(20))
    last = meta["position"] == 19
    torch.testing.assert_close(stored["image"][last], x["image"][9:].numpy())
    torch.testing.assert_close(label["box"][last], y["box"][9:].numpy())


def test_forward():
    """`forward` calls the model, and its result is the outputs, for every pass: here with an argument, and one of two outputs."""
    for method in (DERLearner, CLSLearner):
        learner = detecting(method, forward=lambda model, x: model(**x, scale=2.0)["boxes"])
        for _ in range(2):
            x, y = detections()
            wanted = 2 * learner.model.boxes(x["image"])
            step = learner.step(x, y["class"] % 2)
            torch.testing.assert_close(step.outputs, wanted.detach())
        assert len(step.losses) == 3


def test_closures_meet_a_nest_once():
    """LBFGS asks for the same dict again and again: it is one batch, and the draws are the same."""
    model = TwoInputs()
    learner = ERLearner(model, torch.optim.LBFGS(model.parameters(), max_iter=4), ReservoirBuffer(50))
    for left, right in [(x[0], x[1]) for x, _ in batches("two inputs", 0, 2)]:
        learner.step({"left": left, "right": right}, torch.arange(16) % 4)
    assert learner.buffer.seen == 32 and learner.buffer.state_dict()["draws"]["sample"] == 1


class Rude(TwoInputs):
    """Works in place on what it gets."""

    def forward(self, left, right):
        return super().forward(left.mul_(2), right.add_(1))


def test_in_place_models_change_no_stored_nest():
    """What is stored is the nest as it came."""
    model = Rude()
    learner = CLSLearner(model, torch.optim.SGD(model.parameters(), 0.1), ReservoirBuffer(50))
    x, y = batches("two inputs", 0, 1)[0]
    before = [v.clone() for v in x]
    learner.step(x, y)
    (stored, _), meta = learner.buffer.get(np.arange(16))
    for mine, wanted in zip(stored, before, strict=True):
        torch.testing.assert_close(mine, wanted[meta["position"]].numpy())


def test_nests_that_do_not_fit():
    """Before anything changed: what it is, and the way out."""
    x, y = detections()
    image, label = x["image"], y["class"]
    learner = detecting()
    wrong = [
        (
            ({"image": image, "task": 3}, label),
            {},
            ArgumentError,
            r"nests of tensors; got dict\(image: torch.float32 of shape .*task: int\)",
        ),
        (({"image": image, "scale": torch.ones(1)}, label), {}, ArgumentError, r"one entry per sample each.*torch.full\(\(n,\), 3\)"),
        (({}, label), {}, ArgumentError, r"nests of tensors; got dict\(\)"),
        (({"picture": image}, label), {}, ArgumentError, "Detector does not take x, a dict.*picture.*forward="),
        (((image, image, image), label), {}, ArgumentError, "too many positional arguments.*forward="),
        ((x, label), {}, ArgumentError, r"loss_fn needs one tensor of outputs.*dict\(boxes: .*forward="),
        ((x, y), {"forward": lambda model, x: model(**x)["boxes"]}, ArgumentError, r"y is dict\(class.*loss_fn=..."),
        ((x, y), {"loss_fn": both, "method": DERLearner}, ArgumentError, "the term 'logits' needs one tensor.*forward="),
        ((x, y), {"loss_fn": both, "mask_unused_classes": True}, ArgumentError, "mask_unused_classes needs one tensor"),
        ((x, label), {"forward": lambda model, x: model(**x)["boxes"][:4]}, ArgumentError, r"\(n, ...\), n being 10,.*\(4, 2\)"),
        ((x, label), {"forward": lambda model, x: None}, ArgumentError, "got NoneType"),
    ]
    for batch, options, error, message in wrong:
        learner = detecting(**options)
        with pytest.raises(error, match=message):
            learner.step(*batch)
        assert learner.buffer.seen == 0 and not learner.pending
    learner = detecting(forward=lambda model, x: model(*x)["boxes"])
    learner.step([image], label % 2)
    for other, options in (({"image": image}, {}), ([image, image], {}), ([image], {"class": label})):
        with pytest.raises(SchemaError, match=r"data/[01]: (expected a|a leaf must be)"):
            learner.step(other, options or label % 2)
    learner.store = False
    with pytest.raises(ArgumentError, match=r"samples of the stream .* differ"):
        learner.step([image, image], label % 2)
    with pytest.raises(ArgumentError, match="forward must be a function"):
        detecting(forward=3)
    learner = detecting(transform=lambda x: x["image"][: int(x["image"][0] > 0) + 1])
    with pytest.raises(ArgumentError, match="transform: its results cannot be stacked"):
        learner.step(x, label)
