"""Experience replay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...buffers import DataBuffer
from ...errors import LossError, StateError
from ..data import sample


@dataclass(frozen=True)
class Step:
    """What `step` returns. outputs: the model's outputs for the stream's part of the batch, detached."""

    loss: float
    outputs: torch.Tensor


class ERLearner:
    """Experience replay (Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning", algorithm 1).

        L(theta) = 1 / (|B| + |M|) * sum of l(f_theta(x), y) over (x, y) in B + M

    B is the batch from the stream, M as many as `replay_batch_size` samples drawn from the buffer, uniformly and without replacement;
    both go through the model together. Then B is offered to the buffer, so M never holds samples of its own step.

    model: with parameters on the device that batches go to: `device`, or where x is. optimizer: over the model's parameters.
    buffer: of pairs (x, y); any buffer will do, the paper's is a `ReservoirBuffer`. loss_fn: mean loss of (outputs, y).
    What is stored is the batch as it came. A transform of the buffer is thus applied to replayed samples, not to x.

    >>> import torch
    >>> from leanreplay import ReservoirBuffer
    >>> from leanreplay.torch import ERLearner
    >>> model = torch.nn.Linear(4, 2)
    >>> learner = ERLearner(model, torch.optim.SGD(model.parameters(), lr=0.1), ReservoirBuffer(50), replay_batch_size=8)
    >>> for start in range(0, 100, 10):
    ...     step = learner.step(torch.randn(10, 4), torch.arange(start, start + 10) % 2)
    >>> learner.steps, step.outputs.shape, learner.buffer
    (10, torch.Size([10, 2]), ReservoirBuffer(50, seed=0, len=50, seen=100, mode='x', Schema(data/0: f4[4], data/1: i8[])))

    `step` is short for this, which leaves the backward pass to you (for mixed precision, accumulation over batches, and so on):

    >>> learner.optimizer.zero_grad()
    >>> learner.loss(torch.randn(10, 4), torch.arange(10) % 2).backward()
    >>> learner.optimizer.step()
    >>> learner.after_step()
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        buffer: DataBuffer,
        *,
        replay_batch_size: int = 32,
        loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.nn.functional.cross_entropy,
        device: torch.device | str | None = None,
    ) -> None:
        self.model, self.optimizer, self.buffer = model, optimizer, buffer
        self.replay_batch_size, self.loss_fn, self.device = replay_batch_size, loss_fn, device
        self.steps = 0
        self.outputs = torch.empty(0)  # of the last `loss`, for its stream part
        self._queue: list[tuple[torch.Tensor, torch.Tensor]] = []

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The loss of a batch and its replay. The batch is queued for `after_step`; until then the buffer stays as it is.

        Raises LossError for a loss that is not finite; then nothing is queued and the model (running statistics too) is as before.
        """
        before = [b.clone() for b in self.model.buffers()]
        inputs, targets = x.to(self.device or x.device), y.to(self.device or y.device)
        m = min(self.replay_batch_size, len(self.buffer))
        if m:
            (x_old, y_old), _ = sample(self.buffer, m, inputs.device)
            inputs, targets = torch.cat([inputs, x_old]), torch.cat([targets, y_old])
        outputs = self.model(inputs)
        loss = self.loss_fn(outputs, targets)
        if not torch.isfinite(loss):
            with torch.no_grad():
                for buffer, old in zip(self.model.buffers(), before, strict=True):
                    buffer.copy_(old)
            raise LossError(
                f"the loss of step {self.steps} is {loss.item()} (batch of {x.shape[0]}, {m} replayed): this batch was neither trained on "
                "nor stored; look for bad values in it, lower the learning rate, or clip gradients"
            )
        self.outputs = outputs[: x.shape[0]].detach()
        self._queue.append((x, y))
        return loss

    def after_step(self, stepped: bool = True) -> None:
        """Offer the queued batches to the buffer, as one. stepped: False if the optimizer skipped the step, which then does not count."""
        if self._queue:
            xs, ys = zip(*self._queue, strict=True)
            self._queue = []
            self.buffer.add((xs[0], ys[0]) if len(xs) == 1 else (torch.cat(xs), torch.cat(ys)))
        self.steps += bool(stepped)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> Step:
        """One training step on a batch from the stream: x (n, ...), y (n,)."""
        queued = len(self._queue)
        try:
            self.optimizer.zero_grad()
            loss = self.loss(x, y)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        except BaseException:
            del self._queue[queued:]  # a step that failed leaves no sample behind; it can be made again
            raise
        self.after_step()
        return Step(loss.item(), self.outputs)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, beside the model's and the optimizer's: plain values. Marks a restore point of the buffer."""
        if self._queue:
            raise StateError(f"{len(self._queue)} batches wait for after_step; call that first, or the state would lack them")
        return {"format": 1, "steps": self.steps, "buffer": self.buffer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a state that `state_dict` returned, the buffer too. Raises StateError, and changes nothing, where that cannot be."""
        if not isinstance(state, Mapping) or state.get("format") != 1 or type(state.get("steps")) is not int:
            raise StateError(f"not a state of an ERLearner: expected a dict with format=1, steps and buffer, got {state!r:.200}")
        self.buffer.load_state_dict(state.get("buffer"))  # type: ignore[arg-type]
        self.steps, self._queue = state["steps"], []
