"""Shrink and perturb: weights that can learn the next task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ....arguments import fraction, number
from ....errors import StateError
from ..forward import check_initialized
from ..term import Learner, Term, random_bits


class ShrinkAndPerturb(Term):
    """Shrink and perturb (Ash and Adams, NeurIPS 2020): at the start of every task, the first too,

        theta <- shrink_factor * theta + noise of N(0, sigma^2)

    for every parameter that is trained. The noise follows from the learner's seed and the number of
    starts before. The term has no loss.
    """

    def __init__(self, shrink_factor: float = 0.95, sigma: float = 0.001, *, name: str = "shrink and perturb") -> None:
        super().__init__(name, 0.0, None)
        self.shrink_factor, self.sigma = fraction("shrink_factor", shrink_factor), number("sigma", sigma)
        self.starts = 0

    def attach(self, learner: Learner) -> None:
        check_initialized(learner.module, self.name)

    def on_task_start(self, learner: Learner) -> None:
        generator = torch.Generator().manual_seed(random_bits(self.name, learner.seed, self.starts))
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
