"""The terms that methods are made of: replay loss, logit matching, consistency."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.functional import mse_loss, pad

from ...errors import ArgumentError, StateError
from ...keys import key_pair
from .replay import Forward, Replay

if TYPE_CHECKING:
    from .base import ReplayLearner


class Term:
    """A part of a loss, and what goes with it. Subclass it, give `loss`, and put it into the `terms` of a `ReplayLearner`.

    name: its key in `Step.losses` and in states. weight: its factor in the loss; may be changed while training; 0 leaves it out.
    draw: "own": it takes a draw of its own from the buffer; "shared": it takes that of the term before (the first one draws in any
    case); None: it has no loss. layers: names of layers whose outputs it needs, in `features`. together: its draw goes
    through the model together with the stream, in one batch.

    >>> import torch
    >>> from leanreplay.torch import Term
    >>> class Entropy(Term):
    ...     "Keeps predictions on replayed samples uncertain: their mean negative entropy."
    ...     def loss(self, learner, replay):
    ...         log_p = replay.outputs.log_softmax(1)
    ...         return (log_p.exp() * log_p).sum(1).mean()
    >>> Entropy("entropy", 0.1).weight
    0.1
    """

    needs_labels = False  # whether labels must be checked to be numbers of outputs

    def __init__(
        self,
        name: str,
        weight: float | None,
        draw: Literal["own", "shared"] | None = "own",
        layers: Sequence[str] = (),
        together: bool = False,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise ArgumentError(f"a term's name is a non-empty str, got {name!r:.200}")
        if draw not in ("own", "shared", None):
            raise ArgumentError(f'draw is "own", "shared" or None, got {draw!r:.200}')
        self.name, self.draw, self.layers, self.together = name, draw, tuple(layers), together
        self.weight = None if weight is None else number(f"weight of the term {name!r}", weight)

    def attach(self, learner: ReplayLearner) -> None:
        """Called once, by the learner that gets this term: the place for checks and copies."""

    def loss(self, learner: ReplayLearner, replay: Replay) -> torch.Tensor:
        """A single number, a mean over the samples of the draw."""
        raise NotImplementedError(f"{type(self).__name__} takes a draw, but has no loss")

    def keep(self, learner: ReplayLearner, stream: Forward) -> dict[str, torch.Tensor]:
        """What to store with each sample of the batch: name -> (n, ...), the same names always."""
        return {}

    def move(self, learner: ReplayLearner, replay: Replay, now: Forward, gamma: float) -> dict[str, torch.Tensor]:
        """What is stored with replayed samples, moved towards `now`: gamma * stored + (1 - gamma) * now."""
        return {name: gamma * replay.stored(name) + (1 - gamma) * value for name, value in self.keep(learner, now).items()}

    def on_task_start(self, learner: ReplayLearner) -> None:
        """Called at the start of a task."""

    def on_task_end(self, learner: ReplayLearner) -> None:
        """Called at the end of a task."""

    def after_step(self, learner: ReplayLearner) -> None:
        """Called after each step that the optimizer made; `learner.steps` counts it, from 1."""

    def modules(self) -> Iterable[torch.nn.Module]:
        """Modules of its own that a loss may pass data through: if it fails, their running statistics are put back."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """Its state for a checkpoint: plain values and tensors."""
        return {}

    def check_state(self, state: Any) -> None:
        """Raise StateError unless `load_state_dict` can take this."""

    def load_state_dict(self, state: Any) -> None:
        """Take a state that `check_state` has passed."""


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
        outputs = replay.outputs if replay.together is None else replay.together.outputs
        return learner.criterion(outputs, replay.y)


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


class Consistency(Term):
    """CLS-ER's consistency loss: mean squared difference of the model's outputs on replayed samples and those of a slow copy of it.

    There are two copies. For each sample the stable one counts where it gives the true class strictly more probability, the plastic
    one otherwise. After step t (from 1), each with its probability, a copy moves:

        theta <- a * theta + (1 - a) * theta_model,   a = min(1 - 1 / (t + 1), its weight)

    Copies stay in train mode, without gradients; only parameters are averaged. A model that grew lets its copies grow: what is new
    starts as the model's.
    """

    needs_labels = True

    def __init__(
        self,
        weight: float = 0.1,
        *,
        stable_model_update_weight: float = 0.999,
        plastic_model_update_weight: float = 0.999,
        stable_model_update_probability: float = 0.7,
        plastic_model_update_probability: float = 0.9,
        draw: Literal["own", "shared"] = "shared",
        name: str = "consistency",
    ) -> None:
        super().__init__(name, weight, draw)
        self.weights = {
            "stable": fraction("stable_model_update_weight", stable_model_update_weight),
            "plastic": fraction("plastic_model_update_weight", plastic_model_update_weight),
        }
        self.probabilities = {
            "stable": fraction("stable_model_update_probability", stable_model_update_probability),
            "plastic": fraction("plastic_model_update_probability", plastic_model_update_probability),
        }
        self.copies: dict[str, torch.nn.Module] = {}

    def attach(self, learner: ReplayLearner) -> None:
        if self.copies:
            raise ArgumentError(f"the term {self.name!r} already belongs to a learner; make another one")
        self.copies = {which: _copy(learner.module) for which in ("stable", "plastic")}

    def modules(self) -> Iterable[torch.nn.Module]:
        return self.copies.values()

    def loss(self, learner: ReplayLearner, replay: Replay) -> torch.Tensor:
        self._follow(learner.module)
        true = replay.y[:, None]
        with torch.no_grad():
            logits, probability = {}, {}
            for which, model in self.copies.items():
                if not model.training:  # after an evaluation
                    model.train()
                logits[which] = z = model(replay.x)
                probability[which] = (z if learner.mask is None else z.masked_fill(~learner.mask, -math.inf)).softmax(1).gather(1, true)
            target = torch.where(probability["stable"] > probability["plastic"], logits["stable"], logits["plastic"])
        return mean_square(replay.outputs, target, learner.mask)

    def after_step(self, learner: ReplayLearner) -> None:
        self._follow(learner.module)
        for which, model in self.copies.items():
            if uniform(f"{self.name} {which}", learner.seed, learner.steps) < self.probabilities[which]:
                a = min(1 - 1 / (learner.steps + 1), self.weights[which])
                with torch.no_grad():
                    mine: list[torch.Tensor] = list(model.parameters())
                    theirs: list[torch.Tensor] = list(learner.module.parameters())
                    torch._foreach_mul_(mine, a)
                    torch._foreach_add_(mine, theirs, alpha=1 - a)

    def _follow(self, model: torch.nn.Module) -> None:
        """Let the copies have the model's shapes and device."""
        for which, old in self.copies.items():
            mine, theirs = list(old.parameters()), list(model.parameters())
            if len(mine) == len(theirs) and all(m.shape == t.shape and m.device == t.device for m, t in zip(mine, theirs, strict=True)):
                continue
            self.copies[which] = new = _copy(model)
            kept = old.state_dict()
            with torch.no_grad():
                for name, value in new.state_dict().items():
                    if name in kept and kept[name].ndim == value.ndim:
                        both = tuple(slice(min(a, b)) for a, b in zip(kept[name].shape, value.shape, strict=True))
                        value[both] = kept[name][both].to(value)

    def state_dict(self) -> dict[str, Any]:
        return {which: {name: value.detach().clone() for name, value in model.state_dict().items()} for which, model in self.copies.items()}

    def check_state(self, state: Any) -> None:
        for which, model in self.copies.items():
            mine, theirs = model.state_dict(), state.get(which) if isinstance(state, Mapping) else None
            fits = isinstance(theirs, Mapping) and all(isinstance(v, torch.Tensor) for v in theirs.values())
            if not fits or {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in theirs.items()}:  # type: ignore[union-attr]
                raise StateError(f"the state of the term {self.name!r} is not that of a {which} copy of this model; is it another model's?")

    def load_state_dict(self, state: Any) -> None:
        for which, model in self.copies.items():
            model.load_state_dict(state[which])


def mean_square(outputs: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared difference, over the entries where `valid` (which broadcasts); in the wider of the two dtypes."""
    dtype = torch.promote_types(outputs.dtype, targets.dtype)
    outputs, targets = outputs.to(dtype), targets.to(dtype)
    if valid is None:
        return mse_loss(outputs, targets)
    valid = valid.expand_as(outputs)
    return torch.where(valid, outputs - targets, 0).square().sum() / valid.sum().clamp(min=1)


def _columns(size: int, widths: torch.Tensor) -> torch.Tensor:
    """Which of `size` columns are below each width, (n, size) bool."""
    return torch.arange(size, device=widths.device) < widths[:, None]


def _copy(model: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(model).train().requires_grad_(False)


def uniform(purpose: str, seed: int, step: int) -> float:
    """A number in [0, 1) that follows from (seed, purpose, step)."""
    return (int(key_pair(f"{purpose} {step}", seed)[0]) >> 11) / 2**53


def number(name: str, value: Any) -> float:
    """A finite number of at least 0. Raises ArgumentError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ArgumentError(f"{name} must be a finite number of at least 0, got {value!r:.200}")
    return float(value)


def fraction(name: str, value: Any) -> float:
    """A number from 0 to 1. Raises ArgumentError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ArgumentError(f"{name} must be from 0 to 1, got {value!r:.200}")
    return float(value)
