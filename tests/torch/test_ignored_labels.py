"""Labels that the loss leaves out: draws and batches that have no others, and the terms that look at labels themselves."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from learner_oracle import batches, dense, sgd
from torch.nn.functional import cross_entropy

from leanreplay import ArgumentError, ReservoirBuffer
from leanreplay.errors import LossError
from leanreplay.torch import CLSLearner, Consistency, DERLearner, ERLearner, ReplayLearner, ReplayLoss, SuperERLearner
from leanreplay.torch.learners.checks import check_labels

LOSSES = {
    "the default": (cross_entropy, {}, -100),
    "a module": (torch.nn.CrossEntropyLoss(ignore_index=255), {}, 255),
    "label 1": (torch.nn.CrossEntropyLoss(ignore_index=1), {}, 1),
    "smoothed": (torch.nn.CrossEntropyLoss(label_smoothing=0.1), {}, -100),
    "partial": (functools.partial(cross_entropy, ignore_index=255), {}, 255),
    "own": (lambda outputs, y: cross_entropy(outputs, y, ignore_index=-7), {"ignore_index": -7}, -7),
}
METHODS = {
    "er": (ERLearner, {}),
    "er, one mean": (ERLearner, {"alpha": None}),
    "er, masked": (ERLearner, {"mask_unused_classes": True}),
    "der": (DERLearner, {}),
    "der, masked": (DERLearner, {"mask_unused_classes": True}),
    "cls": (CLSLearner, {}),
    "super": (SuperERLearner, {"pod_alpha": 0, "mask_unused_classes": True}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", LOSSES)
def test_batches_of_ignored_labels_only(method, which):
    """The mean over no label is 0, for the stream, for draws, for both; with other labels it is as ever."""
    (kind, options), (loss_fn, more, ignored) = METHODS[method], LOSSES[which]
    model = dense()
    learner = kind(model, sgd(model), ReservoirBuffer(6), replay_batch_size=6, loss_fn=loss_fn, **options, **more)
    stream = batches(5, 6)
    for i, (x, y) in enumerate(stream):
        step = learner.step(x, torch.full_like(y, ignored) if i < 3 else y.clamp(0, 2) * 2 % 3 if ignored == 1 else y)
        assert np.isfinite(step.loss) and all(map(np.isfinite, step.losses.values()))
        first = step.losses.get("stream", step.losses.get("stream+replay"))
        assert (first == 0) == (i < 3), "batches 0 to 2 have no labels"
        if 0 < i < 3 and "replay" in step.losses:
            assert step.losses["replay"] == 0
    assert learner.buffer.seen == 30
    if kind is ERLearner and not options:  # two of six are left out: the mean of the others
        x, y = batches(1, 6, seed=9)[0]
        y[:2] = ignored
        kept = y != ignored
        wanted = loss_fn(model(x)[kept], y[kept]).item()
        assert learner.step(x, y).losses["stream"] == pytest.approx(wanted)


def test_nothing_moves_without_labels():
    """A step on ignored labels alone changes no weight."""
    model = dense()
    learner = ERLearner(model, sgd(model), ReservoirBuffer(9))
    before = [p.clone() for p in model.parameters()]
    for x, y in batches(3, 6):
        learner.step(x, torch.full_like(y, -100))
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("labels", [-100, 0])
def test_real_nan_is_an_error(labels):
    """Only the mean over nothing is forgiven: not NaN in the outputs, nor another loss that is NaN, with ignored labels beside it."""
    model, (x, y) = dense(), batches(1, 6)[0]
    learner = ERLearner(model, sgd(model), ReservoirBuffer(9))
    with pytest.raises(LossError):
        learner.step(x * float("nan"), y * 0 + labels)
    learner.step(x, y)
    with pytest.raises(LossError):
        learner.step(x * float("inf"), y * 0 + labels)
    term = ReplayLoss(name="bad")
    term.loss = lambda learner, replay: replay.outputs.sum() * float("nan")
    learner = ReplayLearner(model, sgd(model), ReservoirBuffer(9), terms=[ReplayLoss(), term])
    learner.step(x, y * 0 + labels)
    with pytest.raises(LossError, match="the bad loss"):
        learner.step(x, y * 0 + labels)
    learner = ERLearner(model, sgd(model), ReservoirBuffer(9), loss_fn=lambda outputs, y: outputs.sum() * float("nan"))
    with pytest.raises(LossError, match=r"the stream loss .* say which do not: ignore_index="):
        learner.step(x, y * 0 - 100)


def test_which_copy_counts():
    """Of samples without a label it is the plastic one; the others' choice is what it is without them."""
    model = dense()
    term = Consistency(1.0, draw="own")
    learner = ReplayLearner(model, sgd(model), ReservoirBuffer(6), terms=[term], replay_batch_size=6)
    for shift, which in ((3.0, "stable"), (-3.0, "plastic")):
        with torch.no_grad():
            term.copies[which][-1].bias[0] += shift  # which makes the stable one right for label 0
    x, y = batches(1, 6)[0]
    y = torch.tensor([0, -100, 0, -100, -100, 0])
    learner.step(x, y)
    with torch.no_grad():
        logits = {which: copy(x) for which, copy in term.copies.items()}
        target = torch.where((y == 0)[:, None], logits["stable"], logits["plastic"])
        wanted = (model(x) - target).square().mean()
    assert learner.step(x, y).losses["consistency"] == pytest.approx(wanted.item())


@pytest.mark.parametrize("kind", [ERLearner, CLSLearner])
def test_other_labels_are_still_out_of_range(kind):
    """Also where the ignored one lies beyond the outputs: what devices ask that cannot raise."""
    model, (x, y) = dense(), batches(1, 6)[0]
    learner = kind(model, sgd(model), ReservoirBuffer(9), loss_fn=torch.nn.CrossEntropyLoss(ignore_index=255))
    y[0] = 255
    learner.step(x, y)
    check_labels(learner.outputs, [("batch", y)], learner.ignore_index)
    for label in (3, -1, 254, 256):
        y[1] = label
        with pytest.raises(ArgumentError, match=f"a label of the batch is {label}"):
            check_labels(learner.outputs, [("batch", y)], learner.ignore_index)
    with pytest.raises(ArgumentError, match="ignore_index must be an integer"):
        kind(model, sgd(model), ReservoirBuffer(9), ignore_index="none")
