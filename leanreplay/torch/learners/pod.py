"""Pooled output distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.nn import Module
from torch.optim import Optimizer

from ...buffers.base import DataBuffer
from .learner import ReplayLearner
from .terms import PooledOutputDistillation


class PODLearner(ReplayLearner):
    """Pooled output distillation.

    Douillard et al., ECCV 2020, "PODNet: Pooled Outputs Distillation for Small-Tasks Incremental
    Learning":

        L = l(f(x), y) + alpha * POD(x')

    x' is a draw from the buffer. POD compares what the named layers give for it now with what they
    gave when it was trained on: see `PooledOutputDistillation` for the formula and the parameters.
    Stream and draw have passes through the model of their own.

    Different from the paper: it compares with the model as it was before the task, this with the
    model as it was when it saw the sample. It weights distillation by the number of classes. It
    trains on the labels of the memory too; for that, use `ReplayLearner` with one term more:
    terms=[ReplayLoss(1.0), PooledOutputDistillation(...)]. The loss is divided by 1 + alpha, unless
    loss_normalization=False. Other parameters: see `ReplayLearner`.

    >>> import torch
    >>> from leanreplay import ReservoirBuffer
    >>> from leanreplay.torch import PODLearner
    >>> conv, flatten = torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten()
    >>> model = torch.nn.Sequential(conv, torch.nn.ReLU(), flatten, torch.nn.Linear(144, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> learner = PODLearner(model, optimizer, ReservoirBuffer(50), layers=["1"])
    >>> for start in range(0, 30, 10):
    ...     step = learner.step(torch.randn(10, 1, 8, 8), torch.arange(start, start + 10) % 2)
    >>> list(step.losses), learner.buffer.schema.metadata_names
    (['stream', 'pod'], ['features.1'])
    """

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        buffer: DataBuffer,
        *,
        layers: Sequence[str],
        alpha: float = 1.0,
        distillation_type: str = "spatial",
        normalize: bool = True,
        **options: Any,
    ) -> None:
        term = PooledOutputDistillation(alpha, layers=layers, distillation_type=distillation_type, normalize=normalize)
        super().__init__(model, optimizer, buffer, terms=[term], **options)
