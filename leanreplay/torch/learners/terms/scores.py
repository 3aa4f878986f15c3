"""The loss of each sample, as its score in a ScoredBuffer."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from ...models import single
from ..forward import Forward, Replay
from ..term import Learner, Term


class LossScore(Term):
    """Stores the cross entropy of each sample as "score", float64, and that of replayed samples anew.

    It has no loss. Unused classes are left out where the learner masks them. The score of an
    ignored label is 0.
    """

    needs_labels = True

    def __init__(self, name: str = "score") -> None:
        super().__init__(name, 0.0, None)

    def keep(self, learner: Learner, stream: Forward) -> dict[str, Tensor]:
        return {"score": self._losses(learner, stream.outputs, learner.targets)}

    def move(self, learner: Learner, replay: Replay, now: Forward, gamma: float) -> dict[str, Tensor]:
        new = self._losses(learner, now.outputs, replay.y)
        return {"score": gamma * replay.stored("score") + (1 - gamma) * new if gamma else new}

    def _losses(self, learner: Learner, outputs: Any, targets: Tensor) -> Tensor:
        logits = single(outputs, f"the term {self.name!r}").detach().double()
        if learner.mask is not None:
            logits = logits.masked_fill(~learner.mask, -float("inf"))
        ignored = -100 if learner.ignore_index is None else learner.ignore_index
        return cross_entropy(logits, targets.long(), reduction="none", ignore_index=ignored)
