"""LARSLearner: the step is ER's; scores are the losses of the pass, of new and of replayed samples, written in the step's commit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from leanreplay import ArgumentError, ReservoirBuffer, ScoredBuffer
from leanreplay.torch import LARSLearner, sample


def make(**options):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 4).double()
    buffer = ScoredBuffer(12, evict="proportional", admit="reservoir", seed=2)
    return LARSLearner(model, torch.optim.SGD(model.parameters(), lr=0.1), buffer, replay_batch_size=5, **options)


def batch(i: int):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(6, 3, generator=generator, dtype=torch.float64), torch.randint(0, 4, (6,), generator=generator)


@pytest.mark.parametrize("mask", [False, True])
def test_a_step_by_hand(mask):
    """In float64: the loss and its gradient, the scores of new samples, and of those replayed where they still are."""
    learner, twin = make(mask_unused_classes=mask), make(mask_unused_classes=mask)
    for i in range(4):
        learner.step(*batch(i))
        twin.step(*batch(i))
    x, y = batch(9)
    (x_old, y_old), meta = sample(twin.buffer, 5)
    weight, bias = (p.detach().clone().requires_grad_() for p in learner.model.parameters())

    def losses(x, y):
        return cross_entropy(x @ weight.T + bias, y, reduction="none")

    new, old = losses(x, y), losses(x_old, y_old)
    loss = (new.mean() + old.mean()) / 2
    loss.backward()
    before = {int(p): float(s) for p, s in zip(learner.buffer.get_metadata("position"), learner.buffer.get_metadata("score"), strict=True)}
    assert learner.step(x, y).loss == pytest.approx(loss.item(), rel=1e-12)
    assert torch.allclose(learner.model.weight, weight - 0.1 * weight.grad, rtol=1e-12)
    wanted = before | dict(zip(meta["position"].tolist(), old.tolist(), strict=True)) | {24 + i: s.item() for i, s in enumerate(new)}
    position, score = learner.buffer.get_metadata("position").tolist(), learner.buffer.get_metadata("score").tolist()
    assert np.allclose(score, [wanted[p] for p in position], rtol=1e-12)
    assert len(position) == 12
    assert learner.buffer.seen == 30


def test_it_goes_on_where_it_was():
    learner, twin = make(), make()
    for i in range(3):
        learner.step(*batch(i))
        twin.step(*batch(i))
    state, weights = learner.state_dict(), {k: v.clone() for k, v in learner.model.state_dict().items()}
    learner.step(*batch(7))
    learner.load_state_dict(state)
    learner.model.load_state_dict(weights)
    for i in range(3, 6):
        assert learner.step(*batch(i)).loss == twin.step(*batch(i)).loss
    for name in ("position", "score"):
        assert (learner.buffer.get_metadata(name) == twin.buffer.get_metadata(name)).all()


def test_it_needs_scores():
    with pytest.raises(ArgumentError, match="ScoredBuffer"):
        LARSLearner(torch.nn.Linear(3, 4), torch.optim.SGD([torch.zeros(1)], lr=1.0), ReservoirBuffer(3))
