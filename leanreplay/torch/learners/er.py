"""Experience replay."""

from __future__ import annotations

from typing import Any

from torch.nn import Module
from torch.optim import Optimizer

from ...buffers.base import DataBuffer
from .learner import ReplayLearner
from .terms import ReplayLoss


class ERLearner(ReplayLearner):
    """Experience replay.

    Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning", algorithm 1:

        alpha=None:  L = mean of l(f(x), y) over B and M together: 1 / (|B| + |M|) * sum
        a number:    L = mean of l over B + alpha * mean of l over M, / (1 + alpha)

    B is the batch of the stream, M a draw from the buffer. They go through the model together, as
    in the paper, so batch norm sees one batch. The paper's loss is alpha=None; for |B| = |M| and
    alpha=1 the two are the same. Other parameters: see `ReplayLearner`.

    >>> import torch
    >>> from leanreplay import ReservoirBuffer
    >>> from leanreplay.torch import ERLearner
    >>> model = torch.nn.Linear(4, 2)
    >>> learner = ERLearner(model, torch.optim.SGD(model.parameters(), lr=0.1), ReservoirBuffer(50))
    >>> for start in range(0, 100, 10):
    ...     step = learner.step(torch.randn(10, 4), torch.arange(start, start + 10) % 2)
    >>> learner.steps, step.outputs.shape, learner.buffer.seen
    (10, torch.Size([10, 2]), 100)
    """

    def __init__(self, model: Module, optimizer: Optimizer, buffer: DataBuffer, *, alpha: float | None = 1.0, **options: Any) -> None:
        super().__init__(model, optimizer, buffer, terms=[ReplayLoss(alpha, together=True)], **options)
