"""Complementary learning systems: CLS-ER."""

from __future__ import annotations

from typing import Any

from torch.nn import Module
from torch.optim import Optimizer

from ...buffers.base import DataBuffer
from .learner import ReplayLearner
from .terms import Consistency, ReplayLoss


class CLSLearner(ReplayLearner):
    """CLS-ER.

    Arani, Sarfraz and Zonooz, ICLR 2022, "Learning Fast, Learning Slow", algorithm 1:

        alpha=None:  L = mean of l(f(x), y) over B and M together + beta * |f(x') - Z|^2
        a number:    L = mean of l over B + alpha * mean of l over M + beta * |f(x') - Z|^2

    B is the batch of the stream, M = (x', y') one draw from the buffer. For each of its samples Z
    is the logits of the stable or of the plastic model, two slow averages of the model: see
    `Consistency`. |.|^2 is the mean over samples and logits. B and M go through the model together,
    and M once more alone for the consistency, so batch norm sees two batches. Evaluate the
    `stable_model`.

    The paper's is alpha=None and loss_normalization=False, with its lambda as beta; by default the
    loss is divided by the sum of the weights. Other parameters: see `Consistency` and
    `ReplayLearner`.

    >>> import torch
    >>> from leanreplay import ReservoirBuffer
    >>> from leanreplay.torch import CLSLearner
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> learner = CLSLearner(model, optimizer, ReservoirBuffer(50), alpha=None, beta=2.0)
    >>> for start in range(0, 100, 10):
    ...     step = learner.step(torch.randn(10, 4), torch.arange(start, start + 10) % 2)
    >>> list(step.losses), learner.stable_model(torch.zeros(1, 4)).shape
    (['stream+replay', 'consistency'], torch.Size([1, 2]))
    """

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        buffer: DataBuffer,
        *,
        alpha: float | None = 0.5,
        beta: float = 0.1,
        stable_model_update_weight: float = 0.999,
        plastic_model_update_weight: float = 0.999,
        stable_model_update_probability: float = 0.7,
        plastic_model_update_probability: float = 0.9,
        **options: Any,
    ) -> None:
        self._consistency = Consistency(
            beta,
            stable_model_update_weight=stable_model_update_weight,
            plastic_model_update_weight=plastic_model_update_weight,
            stable_model_update_probability=stable_model_update_probability,
            plastic_model_update_probability=plastic_model_update_probability,
        )
        super().__init__(model, optimizer, buffer, terms=[ReplayLoss(alpha, together=True), self._consistency], **options)

    @property
    def stable_model(self) -> Module:
        """The slowest average of the model, the one to evaluate. It is in train mode."""
        return self._consistency.copies["stable"]

    @property
    def evaluated_model(self) -> Module:
        """The stable model."""
        return self.stable_model

    @property
    def plastic_model(self) -> Module:
        """The faster average of the model."""
        return self._consistency.copies["plastic"]
