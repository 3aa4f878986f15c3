"""Dark experience replay."""

from __future__ import annotations

from typing import Any

from torch.nn import Module
from torch.optim import Optimizer

from ...buffers.base import DataBuffer
from .learner import ReplayLearner
from .terms import LogitMatching, ReplayLoss


class DERLearner(ReplayLearner):
    """Dark experience replay, DER and DER++.

    Buzzega et al., NeurIPS 2020, "Dark Experience for General Continual Learning", eq. 5 and 6:

        L = l(f(x), y) + alpha * |f(x') - z'|^2 + beta * l(f(x''), y'')

    (x', z') and (x'', y'') are two independent draws from the buffer. z' are the logits that the
    model gave for x' when it was trained on it, before that step. |.|^2 is the mean over samples
    and logits, as the authors compute it. beta=0, with no second draw, is DER, else DER++. The
    stream and each draw have passes through the model of their own, so batch norm sees three
    batches.

    The stored logits are those of `transform(x)` as the stream saw it; on replay the model sees
    `buffer_transform(x)` anew.

    Different from the paper: the loss is divided by 1 + alpha + beta, unless
    loss_normalization=False. Other parameters: see `ReplayLearner`.

    >>> import torch
    >>> from leanreplay import ReservoirBuffer
    >>> from leanreplay.torch import DERLearner
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> learner = DERLearner(model, optimizer, ReservoirBuffer(50), alpha=0.5, beta=0.5)
    >>> for start in range(0, 100, 10):
    ...     step = learner.step(torch.randn(10, 4), torch.arange(start, start + 10) % 2)
    >>> list(step.losses), learner.buffer.schema.metadata_names
    (['stream', 'logits', 'replay'], ['logits'])
    """

    def __init__(
        self, model: Module, optimizer: Optimizer, buffer: DataBuffer, *, alpha: float = 1.0, beta: float = 1.0, **options: Any
    ) -> None:
        super().__init__(model, optimizer, buffer, terms=[LogitMatching(alpha), ReplayLoss(beta)], **options)
