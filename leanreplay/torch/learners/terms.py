"""The terms that methods are made of: replay loss, logit matching, pooled output distillation, shrink and perturb."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.functional import normalize, pad

from ...errors import ArgumentError, StateError
from .replay import Forward, Replay, check_initialized, check_layers
from .term import Term, fraction, key, mean_square, number

if TYPE_CHECKING:
    from .base import ReplayLearner


class ReplayLoss(Term):
    """The learner's `loss_fn` on replayed samples.

    together: stream and replay go through the model in one batch (batch norm then sees both), with a mean for each; otherwise the
    draw has a pass of its own. weight None: one batch and one mean over both, in which every sample counts the same.
    """

    def __init__(
        self, weight: float | None = 1.0, *, together: bool = False, draw: Literal["own", "shared"] = "own", name: str = "replay"
    ) -> None:
        super().__init__(name, weight, draw, together=together or weight is None)

    def loss(self, learner: ReplayLearner, replay: Replay) -> torch.Tensor:
        together = replay.together
        return learner.criterion(replay.outputs if together is None else together.outputs, replay.y)


class LogitMatching(Term):
    """Mean squared difference, over replayed samples and outputs, of the model's outputs and those stored with the samples.

    Stored are the outputs of the pass at which a sample was trained on, before that step and before any mask, as float32. They are those of
    `transform(x)`, as it came out then; on replay the model sees `buffer_transform(x)`, anew.
    With the learner's `max_outputs` they are stored that wide, zero-padded, with the number of valid ones as "logits_width"; the mean is
    then over the entries that both have. Masked classes are left out likewise.
    """

    def __init__(self, weight: float = 1.0, *, draw: Literal["own", "shared"] = "own", name: str = "logits") -> None:
        super().__init__(name, weight, draw)

    def keep(self, learner: ReplayLearner, stream: Forward) -> dict[str, torch.Tensor]:
        outputs = stream.outputs.detach().float()
        if learner.max_outputs is None:
            return {"logits": outputs}
        if outputs.ndim != 2 or outputs.shape[1] > learner.max_outputs:
            raise ArgumentError(f"max_outputs={learner.max_outputs}, but the model's outputs have shape {tuple(outputs.shape)}")
        n, width = outputs.shape
        return {
            "logits": pad(outputs, (0, learner.max_outputs - width)),
            "logits_width": torch.full((n,), width, dtype=torch.int64, device=outputs.device),
        }

    def move(self, learner: ReplayLearner, replay: Replay, now: Forward, gamma: float) -> dict[str, torch.Tensor]:
        stored, new = replay.stored("logits"), self.keep(learner, now)["logits"]
        moved = gamma * stored + (1 - gamma) * new
        if learner.max_outputs is not None:
            widths = replay.stored("logits_width").clamp(max=now.outputs.shape[1])
            both = _columns(stored.shape[1], widths)
            moved = torch.where(both, moved, stored)
        return {"logits": moved}

    def loss(self, learner: ReplayLearner, replay: Replay) -> torch.Tensor:
        outputs, stored, valid = replay.outputs, replay.stored("logits"), None
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


class PooledOutputDistillation(Term):
    """Pooled output distillation (Douillard et al. 2020): keeps what layers give for replayed samples as it was, up to pooling.

        for each layer, a what it gave when the sample was trained on, a' what it gives now, p(a) = flatten(pool(a^2)), n(v) = v / |v|:
        mean over samples of | n(p(a')) - n(p(a)) |,   then the mean over the layers

    distillation_type: what pool is, for activations (n, c, h, w) as the authors' code has it: "channel", "width", "height" sum over
    dimension 1, 2, 3; "spatial" is width and height, concatenated; "gap" is the mean over dimensions 2 and 3; "pixel" pools nothing, and
    takes activations of any shape (n, ...). normalize: whether there is an n. layers: names in `model.named_modules()` of layers
    that run once in a pass. A model of torch.compile runs as it was before it was compiled, because hooks do not see into compiled code.

    Stored with each sample are the activations as "features.<layer>", float32, of the pass at which it was trained on: 4 bytes for each
    of a layer's outputs, often more than the sample itself.
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
        if distillation_type not in POOLINGS:
            raise ArgumentError(f"distillation_type is one of {sorted(POOLINGS)}, got {distillation_type!r:.200}")
        super().__init__(name, weight, draw, layers)
        self.distillation_type, self.normalize = distillation_type, bool(normalize)

    def attach(self, learner: ReplayLearner) -> None:
        check_layers(learner.model, self.layers)

    def keep(self, learner: ReplayLearner, stream: Forward) -> dict[str, torch.Tensor]:
        return {f"features.{layer}": stream.features[layer].detach().float() for layer in self.layers}

    def loss(self, learner: ReplayLearner, replay: Replay) -> torch.Tensor:
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

    def _pool(self, activations: torch.Tensor, layer: str) -> torch.Tensor:
        """(n, d): squared, pooled, flattened, normalised."""
        if activations.ndim != 4 and self.distillation_type != "pixel":
            raise ArgumentError(
                f"distillation_type={self.distillation_type!r} pools activations (n, c, h, w), but layer {layer!r} gives shape "
                f'{tuple(activations.shape)}; use "pixel", or a convolutional layer'
            )
        pooled = POOLINGS[self.distillation_type](activations.square()).flatten(1)
        return normalize(pooled) if self.normalize else pooled


POOLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "pixel": lambda a: a,
    "channel": lambda a: a.sum(1),
    "width": lambda a: a.sum(2),
    "height": lambda a: a.sum(3),
    "gap": lambda a: a.mean((2, 3)),
    "spatial": lambda a: torch.cat([a.sum(2).flatten(1), a.sum(3).flatten(1)], 1),
}


class ShrinkAndPerturb(Term):
    """Shrink and perturb (Ash and Adams, NeurIPS 2020): at the start of a task, theta <- shrink_factor * theta + noise of N(0, sigma^2).

    For every parameter that is trained, at every start, the first one too. The noise follows from the learner's seed and the number of
    starts before. It has no loss.
    """

    def __init__(self, shrink_factor: float = 0.95, sigma: float = 0.001, *, name: str = "shrink and perturb") -> None:
        super().__init__(name, 0.0, None)
        self.shrink_factor, self.sigma = fraction("shrink_factor", shrink_factor), number("sigma", sigma)
        self.starts = 0

    def attach(self, learner: ReplayLearner) -> None:
        check_initialized(learner.module, self.name)

    def on_task_start(self, learner: ReplayLearner) -> None:
        generator = torch.Generator().manual_seed(key(self.name, learner.seed, self.starts))
        with torch.no_grad():
            for p in learner.module.parameters():
                if p.requires_grad:
                    noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                    p.mul_(self.shrink_factor).add_((self.sigma * noise).to(p))
        self.starts += 1

    def state_dict(self) -> dict[str, Any]:
        return {"starts": self.starts}

    def check_state(self, state: Any) -> None:
        if not isinstance(state, Mapping) or type(state.get("starts")) is not int or state["starts"] < 0:
            raise StateError(f"not a state of the term {self.name!r}: expected a dict with starts, got {state!r:.200}")

    def load_state_dict(self, state: Any) -> None:
        self.starts = state["starts"]


def _columns(size: int, widths: torch.Tensor) -> torch.Tensor:
    """Which of `size` columns are below each width, (n, size) bool."""
    return torch.arange(size, device=widths.device) < widths[:, None]
