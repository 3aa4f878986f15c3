"""What the model gave for a sample when it was trained on it is the target of what it gives now."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ....errors import ArgumentError
from ...models import single
from ..forward import Forward, Replay
from ..term import Learner, Term, mean_square


class LogitMatching(Term):
    """The mean squared difference of the model's outputs for replayed samples and the stored ones.

    Stored as "logits" are the outputs of the pass at which a sample was trained on, before that
    step and before any mask, as float32. They belong to `transform(x)` of that pass; on replay the
    model sees `buffer_transform(x)`, computed anew.

    With the learner's `max_outputs` the logits are stored that wide, padded with zeros, and the
    number of valid ones as "logits_width". The mean is then over the entries that both have. Masked
    classes are left out in the same way.
    """

    def __init__(self, weight: float = 1.0, *, draw: Literal["own", "shared"] = "own", name: str = "logits") -> None:
        super().__init__(name, weight, draw)

    def keep(self, learner: Learner, stream: Forward) -> dict[str, Tensor]:
        outputs = single(stream.outputs, f"the term {self.name!r}").detach().float()
        if learner.max_outputs is None:
            return {"logits": outputs}
        if outputs.ndim != 2 or outputs.shape[1] > learner.max_outputs:
            raise ArgumentError(f"max_outputs={learner.max_outputs}, but the model's outputs have shape {tuple(outputs.shape)}")
        n, width = outputs.shape
        return {
            "logits": pad(outputs, (0, learner.max_outputs - width)),
            "logits_width": torch.full((n,), width, dtype=torch.int64, device=outputs.device),
        }

    def move(self, learner: Learner, replay: Replay, now: Forward, gamma: float) -> dict[str, Tensor]:
        stored, new = replay.stored("logits"), self.keep(learner, now)["logits"]
        moved = gamma * stored + (1 - gamma) * new
        if learner.max_outputs is not None:
            widths = replay.stored("logits_width").clamp(max=now.outputs.shape[1])
            moved = torch.where(_columns(stored.shape[1], widths), moved, stored)
        return {"logits": moved}

    def loss(self, learner: Learner, replay: Replay) -> Tensor:
        outputs, stored, valid = single(replay.outputs, f"the term {self.name!r}"), replay.stored("logits"), None
        if learner.max_outputs is not None:
            stored = stored[:, : outputs.shape[1]]
            valid = _columns(outputs.shape[1], replay.stored("logits_width"))
        elif outputs.shape != stored.shape:
            raise ArgumentError(
                f"the model's outputs have shape {tuple(outputs.shape)}, the stored logits {tuple(stored.shape)}; for a model whose "
                "outputs become more, give max_outputs from the start"
            )
        if learner.mask is not None:
            valid = learner.mask if valid is None else learner.mask & valid
        return mean_square(outputs, stored, valid)


def _columns(size: int, widths: Tensor) -> Tensor:
    """Which of `size` columns are below each width, (n, size) bool."""
    return torch.arange(size, device=widths.device) < widths[:, None]
