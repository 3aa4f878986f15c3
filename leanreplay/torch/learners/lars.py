"""Experience replay from a loss-aware reservoir."""

from __future__ import annotations

from typing import Any

from torch.nn import Module
from torch.optim import Optimizer

from ...arguments import instance
from ...buffers.scored import ScoredBuffer
from .learner import ReplayLearner
from .terms import ReplayLoss
from .terms.scores import LossScore


class LARSLearner(ReplayLearner):
    """Loss-aware reservoir sampling: what the model knows well leaves.

    Buzzega et al., ICPR 2020, "Rethinking Experience Replay: a Bag of Tricks for Continual
    Learning", section III-C. A sample enters as in a reservoir; in a full buffer it takes the place
    of one that is drawn in proportion to (highest loss - its loss). The scores are losses: of a new
    sample in the pass that trained on it, of replayed ones in the pass that replayed them, which the
    commit of the same step writes. The loss is that of `ERLearner`.

    buffer: a ScoredBuffer with evict="proportional" and admit="reservoir" as in the paper; others
    are other methods. Scores are the cross entropy of each sample, before the step, whatever
    `loss_fn` is. Different from the paper: ties with the highest loss never leave, unless all are
    equal; labels are not balanced over (LABRS). Other parameters: see `ReplayLearner`.

    >>> import torch
    >>> from leanreplay import ScoredBuffer
    >>> from leanreplay.torch import LARSLearner
    >>> model = torch.nn.Linear(4, 2)
    >>> buffer = ScoredBuffer(50, evict="proportional", admit="reservoir")
    >>> learner = LARSLearner(model, torch.optim.SGD(model.parameters(), lr=0.1), buffer)
    >>> for start in range(0, 100, 10):
    ...     step = learner.step(torch.randn(10, 4), torch.arange(start, start + 10) % 2)
    >>> buffer.schema.metadata_names, bool((buffer.get_metadata("score") > 0).all())
    (['score'], True)
    """

    def __init__(self, model: Module, optimizer: Optimizer, buffer: ScoredBuffer, *, alpha: float | None = 1.0, **options: Any) -> None:
        instance(buffer, ScoredBuffer, "LARSLearner takes a ScoredBuffer")
        terms = [ReplayLoss(alpha, together=True), LossScore()]
        super().__init__(model, optimizer, buffer, terms=terms, **{"ema_memory_update_gamma": 0.0, **options})
