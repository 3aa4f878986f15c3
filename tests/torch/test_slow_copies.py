"""Slow copies of odd models: integer parameters, masks, tied weights, lazy layers, what cannot be copied. And heads under DDP."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from learner_oracle import batches, dense, sgd
from torch import nn

from leanreplay import ArgumentError, ReservoirBuffer
from leanreplay.torch import CLSLearner, DERLearner, ERLearner, PODLearner, ReplayLearner, ShrinkAndPerturb, SuperERLearner

COPYING = [(CLSLearner, {}), (SuperERLearner, {"pod_alpha": 0})]
ALWAYS = {"stable_model_update_probability": 1.0, "plastic_model_update_probability": 1.0}


class Odd(nn.Module):
    """A frozen backbone of bytes, a mask and a counter as buffers, and two layers that share their weights."""

    def __init__(self):
        super().__init__()
        self.bytes = nn.Parameter(torch.arange(16, dtype=torch.uint8).reshape(4, 4), requires_grad=False)
        self.frozen = nn.Parameter(torch.ones(4, dtype=torch.float64), requires_grad=False)
        self.inner = dense(norm=True)
        self.first, self.second = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
        self.second.weight = self.first.weight
        self.register_buffer("mask", torch.tensor([True, True, True]))
        self.register_buffer("tasks", torch.tensor(0))
        self.register_buffer("table", torch.arange(4, dtype=torch.int16))

    def forward(self, x):
        x = self.second(self.first(x * self.frozen)) @ (self.bytes.double() / 16)
        return self.inner(x).masked_fill(~self.mask, -5.0)


@pytest.mark.parametrize(("kind", "options"), COPYING)
def test_parameters_that_are_no_floats(kind, options):
    """Integers are copied, also masks that the user changes; floats averaged; what is tied stays tied; batch norm counts for itself."""
    model = Odd()
    names = ALWAYS if kind is CLSLearner else {f"cls_{name}": p for name, p in ALWAYS.items()}
    learner = kind(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1), ReservoirBuffer(20), **options, **names)
    before = {name: p.clone() for name, p in learner.stable_model.named_parameters()}
    for i, (x, y) in enumerate(batches(3, 6)):
        with torch.no_grad():
            model.bytes += 1
            model.mask[2] = i == 0
            model.tasks += 1
        learner.step(x, y.clamp(max=1))
    for copy in (learner.stable_model, learner.plastic_model):
        assert torch.equal(copy.bytes, model.bytes) and copy.bytes.dtype == torch.uint8
        assert copy.mask.tolist() == [True, True, False] and copy.tasks == 3 and torch.equal(copy.table, model.table)
        assert copy.second.weight is copy.first.weight and torch.allclose(copy.frozen, model.frozen)
        assert copy.inner[1].num_batches_tracked == 2 < model.inner[1].num_batches_tracked, "of its own passes"
        assert not torch.equal(copy.first.weight, model.first.weight) and not torch.equal(copy.first.weight, before["first.weight"])
        assert not any(p.requires_grad for p in copy.parameters())
    state = learner.state_dict()
    learner.load_state_dict(state)


@pytest.mark.parametrize(("kind", "options"), COPYING)
def test_models_that_cannot_be_copied(kind, options):
    """Refused when the learner is made, with the way out; other methods do."""
    model = dense()
    model.lock = threading.Lock()
    with pytest.raises(ArgumentError, match=r"cannot be copied with copy.deepcopy: .*lock.*; keep what cannot"):
        kind(model, sgd(model), ReservoirBuffer(9), **options)
    for other in (ERLearner, DERLearner):
        other(model, sgd(model), ReservoirBuffer(9)).step(*batches(1, 6)[0])
    model = dense()
    model[0].extra = model[0].weight * 2  # as older weight_norm has
    with pytest.raises(ArgumentError, match=r"cannot be copied with copy.deepcopy"):
        kind(model, sgd(model), ReservoirBuffer(9), **options)


def lazy():
    return nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(3))


def test_lazy_models():
    """Refused before the first step where weights are needed; all others learn, and are fine once they have seen a batch."""
    learners = [*COPYING, (ReplayLearner, {"terms": lambda: [ShrinkAndPerturb()]})]
    for kind, options in learners:
        model = lazy()
        options = {k: v() if callable(v) else v for k, v in options.items()}
        with pytest.raises(ArgumentError, match=r"0.weight of Sequential is lazy and has no shape yet: pass a batch through the model"):
            kind(model, sgd(model), ReservoirBuffer(9), **options)
        model(torch.zeros(2, 4))
        options = {k: [ShrinkAndPerturb()] if k == "terms" else v for k, v in options.items()}
        learner = kind(model, sgd(model), ReservoirBuffer(9), **options)
        for x, y in batches(2, 6):
            learner.step(x.float(), y)
    for kind in (ERLearner, DERLearner):
        model = lazy()
        learner = kind(model, sgd(model), ReservoirBuffer(9))
        for x, y in batches(3, 6):
            learner.step(x.float(), y)
        assert model[1].num_batches_tracked >= 3 and learner.buffer.seen == 18


# -- heads in a DistributedDataParallel ------------------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Heads(nn.Module):
    """A head for each task; or, without a task, for each kind of batch."""

    def __init__(self, task=0):
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.heads = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])
        self.task = task

    def forward(self, x):
        task = int((x > 0).all()) if self.task is None else self.task
        return self.heads[task](self.body(x))


METHODS = [
    (ERLearner, {}),
    (DERLearner, {}),
    (CLSLearner, {}),
    (PODLearner, {"layers": ["body"], "distillation_type": "pixel"}),
    (SuperERLearner, {"pod_layers": ["body"], "pod_distillation_type": "pixel"}),
]
DDP = pytest.mark.skipif(not torch.distributed.is_available() or os.name != "posix", reason="no torch.distributed")


@DDP
@pytest.mark.parametrize(("kind", "options"), METHODS)
def test_unused_heads(kind, options, group):
    """Refused before the first step, with the way out, by which it works, as without the wrapper; or the head is frozen."""
    x, y = torch.randn(6, 4), torch.arange(6) % 3

    def make(**how):
        torch.manual_seed(0)
        model = Heads()
        wrapped = nn.parallel.DistributedDataParallel(model, **how)
        return model, kind(wrapped, sgd(model), ReservoirBuffer(20), **options)

    model, learner = make(find_unused_parameters=False)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ArgumentError, match=r"does not reach 2 parameters \(heads.1.weight, heads.1.bias\).*find_unused_parameters=True"):
        learner.step(x, y)
    assert all(map(torch.equal, before, model.parameters())) and learner.buffer.seen == 0
    model, learner = make(find_unused_parameters=True)
    for task in range(2):
        model.task = task
        learner.on_task_start(task)
        for _ in range(2):
            learner.step(x, y)
    assert learner.steps == 4
    model = Heads()
    model.heads[1].requires_grad_(False)
    learner = kind(nn.parallel.DistributedDataParallel(model), sgd(model), ReservoirBuffer(20), **options)
    for _ in range(3):
        learner.step(x, y)
    model.task = 1
    learner.on_task_start(1)
    with pytest.raises(ArgumentError, match=r"does not reach 2 parameters \(heads.0.weight"):
        learner.step(x, y)


@DDP
@pytest.mark.parametrize("kind", [ERLearner, DERLearner, SuperERLearner])
def test_draws_that_reach_other_heads(kind, group):
    """With passes of their own they would end the run within torch; one pass for both works."""
    model = Heads(task=None)
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    learner = kind(wrapped, sgd(model), ReservoirBuffer(20), **({"pod_alpha": 0} if kind is SuperERLearner else {}))
    for _ in range(2):
        learner.step(-torch.rand(6, 4), torch.arange(6) % 3)
    before = [p.clone() for p in model.parameters()]
    if kind is ERLearner:
        learner.step(torch.rand(6, 4), torch.arange(6) % 3)
    else:
        with pytest.raises(ArgumentError, match=r"replayed samples reach 2 parameters that the batch from the stream does not \(heads.0"):
            learner.step(torch.rand(6, 4), torch.arange(6) % 3)
        assert all(map(torch.equal, before, model.parameters())) and learner.steps == 2
        learner.step(-torch.rand(6, 4), torch.arange(6) % 3)  # and it goes on
