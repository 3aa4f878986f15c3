"""Tasks, models and learners for fit."""

from __future__ import annotations

import hashlib
import os
import signal

import numpy as np
import torch
from torch.utils.data import Dataset

from leanreplay import ReservoirBuffer
from leanreplay.torch import CLSLearner, DERLearner, ERLearner, SuperERLearner, fit
from leanreplay.torch.training.states import StateFolder
from leanreplay.torch.training.validation import Validation

N = 103


class Super(SuperERLearner):
    """Copies of the model, logits that move, and weights that are perturbed when a task starts."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, pod_alpha=0.0, ema_memory_update_gamma=0.9, **options)


KINDS = [ERLearner, DERLearner, CLSLearner, Super]


def data(n=N, seed=0):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()


def network(dropout=0.0):
    torch.manual_seed(1)
    layers = [torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Dropout(dropout), torch.nn.Linear(16, 4)]
    return torch.nn.Sequential(*layers)


def make(kind=ERLearner, path=None, *, dropout=0.0, model=None, stream=0, **options):
    model = network(dropout) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return kind(model, optimizer, ReservoirBuffer(40, path, seed=3, stream=stream, mode="a"), **options)


def bits(learner):
    """Everything that training makes: weights, statistics, momenta, the method's own state, the buffer's rows."""
    digest = hashlib.sha256()
    state = {k: v for k, v in learner.state_dict().items() if k != "buffer"}
    buffer = learner.buffer
    (x, y), meta = buffer.get(buffer.get_metadata("idx")) if len(buffer) else ((0, 0), {})
    flat(digest, [learner.model.state_dict(), learner.optimizer.state_dict(), state, x, y, dict(meta), buffer.seen])
    return digest.hexdigest()


def flat(digest, value):
    if isinstance(value, dict):
        flat(digest, [v for k in sorted(value, key=str) for v in (k, value[k])])
    elif isinstance(value, (list, tuple)):
        for v in value:
            flat(digest, v)
    else:
        digest.update(np.asarray(value).tobytes() if isinstance(value, (torch.Tensor, np.ndarray)) else repr(value).encode())


def run(learner, task=0, **options):
    return fit(learner, data(seed=task), **{"max_epochs": 3, "batch_size": 20, "progress": False, "task_id": task, **options})


class Bytes(Dataset):
    """Samples one by one, of another kind than the model takes."""

    def __init__(self, n=30):
        self.x, self.y = data(n)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "y": int(self.y[i])}


def accuracy(outputs, targets):
    return (outputs.argmax(1) == targets).float().mean()


def die_at(kind, when, name, call):
    """Make the call-th call of a function this process's last: before it, or right after it."""
    place = {"replace": os, "unlink": os, "save": StateFolder, "fsync": os, "remember_task": Validation}.get(name, kind)
    inner, calls = getattr(place, name), [0]

    def wrapped(*arguments, **options):
        calls[0] += 1
        if calls[0] == call and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = inner(*arguments, **options)
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(place, name, wrapped)
