"""Each method of the learners, made and trained in small."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from learner_oracle import batches, conv, held

from leanreplay import (
    ReservoirBuffer,
)
from leanreplay.torch import (
    CLSLearner,
    DERLearner,
    ERLearner,
    PODLearner,
    SuperERLearner,
)

METHODS = {
    "er": (ERLearner, {}),
    "er-mean": (ERLearner, {"alpha": None, "mask_unused_classes": True}),
    "der": (DERLearner, {"beta": 0.0, "max_outputs": 5}),
    "der++": (DERLearner, {"mask_unused_classes": True, "ema_memory_update_gamma": 0.9}),
    "pod": (PODLearner, {"layers": ["2"]}),
    "cls": (CLSLearner, {"stable_model_update_probability": 0.5, "plastic_model_update_probability": 0.5}),
    "super": (SuperERLearner, {"pod_layers": ["2"], "ema_memory_update_gamma": 0.9, "mask_unused_classes": True}),
}
ALL = pytest.mark.parametrize("method", METHODS)


def make(method, buffer=None, model=None, **options):
    kind, parameters = METHODS[method]
    model = conv() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    buffer = ReservoirBuffer(25, seed=5) if buffer is None else buffer
    return kind(model, optimizer, buffer, **{"replay_batch_size": 8, **parameters, **options})


def images(n, size=6, seed=0):
    return batches(n, size, (1, 5, 6), seed=seed)


def everything(learner):
    """All tensors and arrays that a learner stands for."""
    found = {f"model {k}": v.numpy() for k, v in learner.module.state_dict().items()}
    for term in learner.terms:
        for i, module in enumerate(term.modules()):
            found |= {f"{term.name} {i} {k}": v.numpy() for k, v in module.state_dict().items()}
    found |= {f"momentum {i}": s["momentum_buffer"].numpy() for i, s in learner.optimizer.state_dict()["state"].items()}
    if len(learner.buffer):
        found |= {f"buffer {k}": v for k, v in held(learner.buffer).items()}
    found["counts"] = np.array([learner.steps, learner.buffer.seen])
    return {k: v.copy() for k, v in found.items()}


def differing(a, b):
    """Names of what differs in a bit."""
    assert a.keys() == b.keys()
    return [k for k in a if a[k].dtype != b[k].dtype or a[k].shape != b[k].shape or a[k].tobytes() != b[k].tobytes()]


def train(learner, stream, start=0):
    """Three tasks of four batches; every task is announced, also the one that is going on."""
    losses = []
    for i, (x, y) in enumerate(stream, start):
        if i % 4 == 0 or i == start:
            learner.on_task_start(i // 4)
        losses.append(learner.step(x, y).losses)
    return losses
