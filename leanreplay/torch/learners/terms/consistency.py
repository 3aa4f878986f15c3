"""The consistency loss of CLS-ER, with the two slow copies of the model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules import batchnorm

from ....arguments import fraction
from ....errors import ArgumentError, StateError
from ...models import single
from ...nests import copied, described
from ..forward import Replay, check_initialized, forward
from ..term import Learner, Term, is_labels, mean_square, random_bits


class Consistency(Term):
    """CLS-ER's consistency loss: the mean squared difference of the outputs of model and slow copy.

    There are two copies. For each replayed sample the stable copy counts where it gives the true
    class strictly more probability, otherwise the plastic one; the plastic one too where the label
    is the learner's `ignore_index`. After step t (from 1), each with its own probability, a copy
    moves:

        theta <- a * theta + (1 - a) * theta_model,   a = min(1 - 1 / (t + 1), its weight)

    The copies stay in train mode, without gradients. Only parameters are averaged. Parameters that
    are integers are copied from the model; so are buffers of integers and bools, except those of
    batch norm. If the model grew, its copies grow: their new entries start as the model's. A model
    that `copy.deepcopy` cannot copy, or that has lazy layers without weights yet, is an
    ArgumentError.
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
        self.copies: dict[str, Module] = {}
        self._learner: Learner | None = None

    def attach(self, learner: Learner) -> None:
        if self._learner is not None:
            raise ArgumentError(f"the term {self.name!r} already belongs to a learner; make another one")
        check_initialized(learner.module, self.name)
        self.copies = {which: _copy(learner.module) for which in ("stable", "plastic")}
        self._learner = learner

    def modules(self) -> Iterable[Module]:
        return self.copies.values()

    def loss(self, learner: Learner, replay: Replay) -> Tensor:
        outputs = single(replay.outputs, f"the term {self.name!r}")
        if not is_labels(replay.y) or outputs.ndim != 2:
            raise ArgumentError(
                f"the term {self.name!r} needs outputs (n, classes) and integer labels (n,), got {tuple(outputs.shape)} and "
                f"{described(replay.y)}"
            )
        self._follow(learner.module)
        labelled, true = None, replay.y.long()
        if learner.ignore_index is not None:
            labelled = true != learner.ignore_index
            true = true.where(labelled, 0)
        with torch.no_grad():
            logits, probability = {}, {}
            for which, model in self.copies.items():
                if not model.training:  # after an evaluation
                    model.train()
                # A copy, because the model may work in place.
                logits[which] = z = forward(model, copied(replay.x), (), learner.forward).outputs
                z = z if learner.mask is None else z.masked_fill(~learner.mask, -math.inf)
                probability[which] = z.softmax(1).gather(1, true[:, None])
            stable = probability["stable"] > probability["plastic"]
            if labelled is not None:
                stable &= labelled[:, None]
            target = torch.where(stable, logits["stable"], logits["plastic"])
        return mean_square(outputs, target, learner.mask)

    def after_step(self, learner: Learner) -> None:
        self._follow(learner.module)
        for which, model in self.copies.items():
            if random_bits(f"{self.name} {which}", learner.seed, learner.steps) < self.probabilities[which] * 2**64:
                _average(model, learner.module, min(1 - 1 / (learner.steps + 1), self.weights[which]))

    def _follow(self, model: Module) -> None:
        """Give the copies the model's shapes, dtypes and device."""
        for which, old in self.copies.items():
            mine, theirs = list(old.parameters()), list(model.parameters())
            if len(mine) == len(theirs) and all(_alike(m, t) for m, t in zip(mine, theirs, strict=True)):
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
        model = self.copies["stable"] if self._learner is None else self._learner.module
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        for which in self.copies:
            theirs = state.get(which) if isinstance(state, Mapping) else None
            found = theirs.items() if isinstance(theirs, Mapping) else ()
            if {name: value.shape if isinstance(value, Tensor) else None for name, value in found} != shapes:
                raise StateError(f"the state of the term {self.name!r} is not that of a {which} copy of this model; is it another model's?")

    def load_state_dict(self, state: Any) -> None:
        if self._learner is not None:
            self._follow(self._learner.module)
        for which, model in self.copies.items():
            model.load_state_dict(state[which])


def _copy(model: Module) -> Module:
    try:
        return copy.deepcopy(model).train().requires_grad_(False)
    except Exception as error:
        raise ArgumentError(
            f"this method keeps slow copies of the model, but {type(model).__name__} cannot be copied with copy.deepcopy: {error!r:.200}; "
            "keep what cannot be copied out of the module, give it a __deepcopy__, or use a method without copies, such as DERLearner"
        ) from error


@torch.no_grad()
def _average(slow: Module, model: Module, a: float) -> None:
    """Move a slow copy towards the model; a: how much of the copy stays."""
    mine: list[Tensor] = list(slow.parameters())
    theirs: list[Tensor] = list(model.parameters())
    if not all(map(_has_means, mine)):
        pairs = list(zip(mine, theirs, strict=True))
        for m, t in pairs:
            if not _has_means(m):
                m.copy_(t)
        mine, theirs = ([p[i] for p in pairs if _has_means(p[0])] for i in range(2))
    torch._foreach_mul_(mine, a)
    torch._foreach_add_(mine, theirs, alpha=1 - a)
    for m, t in _integer_buffers(slow, model):
        m.copy_(t)


def _has_means(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _alike(m: Tensor, t: Tensor) -> bool:
    return m.shape == t.shape and m.dtype == t.dtype and m.device == t.device


def _integer_buffers(mine: Module, theirs: Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of buffers of integers or bools, such as masks; batch norm counts by itself."""
    for m, t in zip(mine.modules(), theirs.modules(), strict=False):
        if m._buffers and not isinstance(m, batchnorm._NormBase):
            for name, buffer in m._buffers.items():
                other = t._buffers.get(name)
                if buffer is not None and other is not None and not _has_means(buffer) and _alike(buffer, other):
                    yield buffer, other
