"""A draw from the buffer, as terms get it, with what the model makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..data import to_torch
from .forward import Forward, forward


class Replay:
    """Samples drawn from the buffer: x (m, ...) and y (m, ...), transformed, on the model's device.

    Several terms may share a draw. `outputs` and `features` come from the draw's own pass through the
    model. The first term that asks for them starts that pass; terms that share the draw share the pass.
    metadata: what the buffer returned for these samples, NumPy arrays; see `stored`.
    """

    def __init__(
        self, module: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, metadata: dict[str, Any], layers: Sequence[str] = ()
    ) -> None:
        self.x, self.y, self.metadata, self.layers = x, y, metadata, layers
        self.labels = y  # the targets where reading them does not wait for a device
        self.bits: frozenset[str] = frozenset()  # names of fields that hold bfloat16
        self.shared = False  # whether each pass gets a copy of x, because a model may work in place
        self.joint: Forward | None = None  # the pass of the stream's batch followed by this draw
        self._module = module
        self._own: Forward | None = None

    def __len__(self) -> int:
        return len(self.metadata["idx"])

    def stored(self, name: str) -> torch.Tensor:
        """A copy of what was stored with these samples as `name`, (m, ...), on their device."""
        tensor: torch.Tensor = to_torch(self.metadata[name], self.bits, path=f"metadata/{name}")
        return tensor.to(self.x.device, copy=True)

    @property
    def together(self) -> Forward | None:
        """The draw's part of a pass that it made together with the stream's batch; None without one."""
        return None if self.joint is None else self.joint.part(-len(self), len(self))

    @property
    def alone(self) -> Forward:
        """The draw's own pass through the model."""
        if self._own is None:
            self._own = forward(self._module, self.x.clone() if self.shared else self.x, tuple(dict.fromkeys(self.layers)))
        return self._own

    @property
    def outputs(self) -> torch.Tensor:
        """The model's outputs in the draw's own pass."""
        return self.alone.outputs

    @property
    def features(self) -> dict[str, torch.Tensor]:
        """The layers' outputs in the draw's own pass."""
        return self.alone.features

    @property
    def latest(self) -> Forward | None:
        """A pass of this step: the draw's own, else the joint one; None if there was none."""
        return self.together if self._own is None else self._own

    def forget(self) -> None:
        """Drop the passes: a closure may ask for this draw again, and graphs must not live until then."""
        self._own = self.joint = None
