"""Pooled output distillation: what layers gave for a sample is the target of what they give now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ....arguments import choice
from ....errors import ArgumentError
from ..forward import Forward, Replay, check_layers
from ..term import Learner, Term

POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "pixel": lambda a: a,
    "channel": lambda a: a.sum(1),
    "width": lambda a: a.sum(2),
    "height": lambda a: a.sum(3),
    "gap": lambda a: a.mean((2, 3)),
    "spatial": lambda a: torch.cat([a.sum(2).flatten(1), a.sum(3).flatten(1)], 1),
}


class PooledOutputDistillation(Term):
    """Pooled output distillation (Douillard et al. 2020): samples keep their pooled activations.

        p(a) = flatten(pool(a^2)),   n(v) = v / |v|
        loss = mean over layers of the mean over samples of | n(p(a')) - n(p(a)) |

    a is what a layer gave when the sample was trained on, a' what it gives now.

    distillation_type: pool, for activations (n, c, h, w), as in the authors' code: "channel",
    "width" and "height" sum over dimension 1, 2 and 3; "spatial" is width and height, concatenated;
    "gap" is the mean over dimensions 2 and 3; "pixel" pools nothing, and takes activations of any
    shape (n, ...).
    normalize: whether to apply n. layers: names in `model.named_modules()` of layers that run once
    in a pass. A model of torch.compile runs uncompiled here: hooks do not see into compiled code.

    The activations are stored with each sample as "features.<layer>", float32: 4 bytes for each
    output of a layer, often more than the sample itself.
    """

    def __init__(
        self,
        weight: float = 1.0,
        *,
        layers: Sequence[str],
        distillation_type: str = "spatial",
        normalize: bool = True,
        draw: Literal["own", "shared"] = "own",
        name: str = "pod",
    ) -> None:
        choice("distillation_type", distillation_type, sorted(POOLINGS))
        super().__init__(name, weight, draw, layers)
        self.distillation_type, self.normalize = distillation_type, bool(normalize)

    def attach(self, learner: Learner) -> None:
        check_layers(learner.model, self.layers)

    def keep(self, learner: Learner, stream: Forward) -> dict[str, Tensor]:
        return {f"features.{layer}": stream.features[layer].detach().float() for layer in self.layers}

    def loss(self, learner: Learner, replay: Replay) -> Tensor:
        distances = []
        for layer in self.layers:
            now, stored = replay.features[layer], replay.stored(f"features.{layer}")
            if now.shape != stored.shape:
                raise ArgumentError(
                    f"layer {layer!r} gives shape {tuple(now.shape)}, but stored was {tuple(stored.shape)}; it must not change"
                )
            dtype = torch.promote_types(now.dtype, torch.float32)
            difference = self._pool(now.to(dtype), layer) - self._pool(stored.to(dtype), layer)
            distances.append(torch.linalg.vector_norm(difference, dim=1).mean())
        return torch.stack(distances).mean()

    def _pool(self, activations: Tensor, layer: str) -> Tensor:
        """n(p(a)), (n, d)."""
        if activations.ndim != 4 and self.distillation_type != "pixel":
            raise ArgumentError(
                f"distillation_type={self.distillation_type!r} pools activations (n, c, h, w), but layer {layer!r} gives shape "
                f'{tuple(activations.shape)}; use "pixel", or a convolutional layer'
            )
        pooled = POOLINGS[self.distillation_type](activations.square()).flatten(1)
        return normalize(pooled) if self.normalize else pooled
