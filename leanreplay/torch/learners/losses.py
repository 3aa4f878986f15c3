"""From outputs to one loss: `loss_fn` with its masks and ignored labels, and the weighted sum."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError, LossError
from .. import nests
from ..models import single
from . import checks
from .pending import Draws
from .term import Learner

# Modules of losses that take two tensors and change nothing that they get.
_OF_TORCH = ("torch.nn.functional", "torch.nn.modules.loss")


class Losses:
    """The losses of a learner's step. name: of the stream's own.

    values: of the last step, by name. value: of their weighted sum.
    """

    def __init__(self, learner: Learner, name: str) -> None:
        self._learner, self._name = learner, name
        self._ignored: int | None = None  # while all targets may be this label
        self.values: dict[str, float] = {}
        self.value = 0.0

    def total(self, outputs: Any, targets: Any, draws: Draws, n: int) -> Tensor:
        """The whole loss. Raises LossError unless it is finite.

        A mean over ignored labels only is NaN in torch. Only then is it computed once more, as 0.
        """
        ignored = self._learner.ignore_index
        try:
            return self._weigh(outputs, targets, draws, n)
        except LossError as error:
            if ignored is None:
                labels = isinstance(targets, Tensor) and not targets.is_floating_point()
                hint = "; if none of its labels counts, say which do not: ignore_index=..." if labels else ""
                raise LossError(f"{error}{hint}") from None
        self._ignored = ignored
        try:
            return self._weigh(outputs, targets, draws, n)
        finally:
            self._ignored = None

    def _weigh(self, outputs: Any, targets: Any, draws: Draws, n: int) -> Tensor:
        """The weighted sum of the losses, whose values go into `values`."""
        learner = self._learner
        total = first = self.criterion(outputs, targets)
        losses, weights = {self._name: first}, learner.loss_weight
        if weights != 1:
            total = weights * first
        for term, replay in draws:
            if term.weight is not None:
                losses[term.name] = value = term.loss(learner, replay)
                total, weights = total + (value if term.weight == 1 else term.weight * value), weights + term.weight
        if learner.loss_normalization and weights not in (0, 1):
            total = total / weights
        *values, self.value = checks.finite(total, losses, learner.steps, n, len(draws[0][1]) if draws else 0)
        self.values = dict(zip(losses, values, strict=True))
        return total

    def criterion(self, outputs: Any, targets: Any) -> Tensor:
        """`loss_fn`, with unused classes masked if they are to be. It may change what it gets."""
        learner = self._learner
        if self._ignored is not None and isinstance(targets, Tensor) and bool(targets.eq(self._ignored).all()):
            found = nests.leaves(outputs)
            if not any(bool(leaf.isnan().any()) for leaf in found):
                return torch.stack([leaf[:0].sum() for leaf in found]).sum()  # 0, with a gradient
        if learner.mask is not None:
            outputs = outputs.masked_fill(~learner.mask, -math.inf)
        if getattr(learner.loss_fn, "__module__", None) not in _OF_TORCH:
            outputs, targets = nests.copied(outputs), nests.copied(targets)
        elif isinstance(targets, Tensor):
            outputs = single(outputs, "loss_fn")
        else:
            raise ArgumentError(f"y is {nests.described(targets)}, but this loss_fn takes a tensor; give one that takes both: loss_fn=...")
        return learner.loss_fn(outputs, targets)
