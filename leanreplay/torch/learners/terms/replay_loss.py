"""The learner's own loss on replayed samples."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..forward import Replay
from ..term import Learner, Term


class ReplayLoss(Term):
    """The learner's `loss_fn` on replayed samples.

    together: stream and replay go through the model in one batch, so batch norm sees both, and each
    has a mean of its own; otherwise the draw has a pass of its own. weight=None: one batch and one
    mean over both, in which every sample counts the same.
    """

    def __init__(
        self, weight: float | None = 1.0, *, together: bool = False, draw: Literal["own", "shared"] = "own", name: str = "replay"
    ) -> None:
        super().__init__(name, weight, draw, together=together or weight is None)

    def loss(self, learner: Learner, replay: Replay) -> Tensor:
        together = replay.together
        return learner.criterion(replay.outputs if together is None else together.outputs, replay.y)
