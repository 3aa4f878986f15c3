"""Experience replay."""

from __future__ import annotations

from typing import Any

import torch

from ...buffers.base import DataBuffer
from .learner import ReplayLearner
from .terms import ReplayLoss


class ERLearner(ReplayLearner):
    """Experience replay (Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning", algorithm 1).

        alpha=None:  L = mean of l(f(x), y) over B and M together: 1 / (|B| + |M|) * sum
        a number:    L = mean of l over B + alpha * mean of l over M, / (1 + alpha)

    B is the batch from the stream, M a draw from the buffer; in both cases they go through the model together, as in the paper, so batch
    norm sees one batch. The paper's is alpha=None; for |B| = |M| and alpha=1 the two are the same.

    Other parameters: see `ReplayLearner`.

    >>> import torch
    >>> from leanreplay import ReservoirBuffer
    >>> from leanreplay.torch import ERLearner
    >>> model = torch.nn.Linear(4, 2)
    >>> learner = ERLearner(model, torch.optim.SGD(model.parameters(), lr=0.1), ReservoirBuffer(50), replay_batch_size=8)
    >>> for start in range(0, 100, 10):
    ...     step = learner.step(torch.randn(10, 4), torch.arange(start, start + 10) % 2)
    >>> learner.steps, step.outputs.shape, learner.buffer
    (10, torch.Size([10, 2]), ReservoirBuffer(50, seed=0, len=50, seen=100, mode='x', Schema(data/0: f4[4], data/1: i8[])))
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, buffer: DataBuffer, *, alpha: float | None = 1.0, **options: Any
    ) -> None:
        super().__init__(model, optimizer, buffer, terms=[ReplayLoss(alpha, together=True)], **options)
