"""What a term of a loss is: its base class, what it sees of a learner, and what terms share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import mse_loss

from ...arguments import number
from ...buffers.base import DataBuffer
from ...buffers.drawing import Draw
from ...errors import ArgumentError
from ...keys import key_pair
from ..models import ForwardFunction
from .forward import Forward, Replay


class Learner(Protocol):
    """What terms, and the parts of a `ReplayLearner`, see of it. Its docstring has the parameters.

    layers: names of all layers that its terms ask for. mask: during a `loss`, (outputs,) bool: the
    classes that occurred so far; None without `mask_unused_classes`. outputs: of the last `loss`,
    a tensor or a nest of tensors; targets: what it was compared with. steps: how many the optimizer made.
    """

    model: Module
    buffer: DataBuffer
    terms: list[Term]
    loss_fn: Any
    loss_weight: float
    loss_normalization: bool
    replay_batch_size: int
    replay_draw: Draw
    ema_memory_update_gamma: float
    transform: Any
    target_transform: Any
    batch_transform: Any
    buffer_transform: Any
    buffer_target_transform: Any
    buffer_batch_transform: Any
    ignore_index: int | None
    max_outputs: int | None
    seed: int
    device: torch.device | None
    layers: tuple[str, ...]
    mask: Tensor | None
    outputs: Any
    targets: Any
    forward: ForwardFunction | None
    steps: int

    @property
    def module(self) -> Module:
        """The model, without a DistributedDataParallel around it."""

    def criterion(self, outputs: Any, targets: Any) -> Tensor:
        """`loss_fn`, with the outputs of unused classes masked."""


class Term:
    """A part of a loss. Subclass it, write `loss`, put it into the `terms` of a `ReplayLearner`.

    name: its key in `Step.losses` and in states. weight: its factor in the loss; 0 leaves it out;
    may change during training. draw: "own": a draw of its own from the buffer; "shared": the draw
    of the term before (the first term always draws); None: it has no loss. layers: names of layers
    whose outputs it needs in `features`. together: its draw goes through the model in one batch
    with the stream; with weight=None the loss is then one mean over both.

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
        if weight is None and not together:
            raise ArgumentError(f"the term {name!r} has no weight (None); only a draw that goes together with the stream needs none")
        names: list[Any] = [None] if isinstance(layers, str) or not isinstance(layers, Iterable) else list(layers)
        if not all(isinstance(layer, str) for layer in names):
            raise ArgumentError(f"layers is a list of names, as in model.named_modules(), got {layers!r:.200}")
        self.name, self.draw, self.layers, self.together = name, draw, tuple(names), together
        self.weight = None if weight is None else number(f"weight of the term {name!r}", weight)

    def attach(self, learner: Learner) -> None:
        """Called once, by the learner that gets this term: the place for checks and copies."""

    def loss(self, learner: Learner, replay: Replay) -> Tensor:
        """A single number, a mean over the samples of the draw."""
        raise ArgumentError(f"{type(self).__name__} has no loss")

    def keep(self, learner: Learner, stream: Forward) -> dict[str, Tensor]:
        """What to store with each sample of the batch: name -> (n, ...), the same names always."""
        return {}

    def move(self, learner: Learner, replay: Replay, now: Forward, gamma: float) -> dict[str, Tensor]:
        """What replaces the stored values of a draw: gamma * stored + (1 - gamma) * now."""
        return {name: gamma * replay.stored(name) + (1 - gamma) * value for name, value in self.keep(learner, now).items()}

    def on_task_start(self, learner: Learner) -> None:
        """Called at the start of a task."""

    def on_task_end(self, learner: Learner) -> None:
        """Called at the end of a task."""

    def after_step(self, learner: Learner) -> None:
        """Called after each step that the optimizer made; `learner.steps` counts it, from 1."""

    def modules(self) -> Iterable[Module]:
        """Its own modules that see data: a loss that fails restores their running statistics."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """Its state for a checkpoint: plain values and tensors."""
        return {}

    def check_state(self, state: Any) -> None:
        """Raise StateError unless `load_state_dict` can take this."""

    def load_state_dict(self, state: Any) -> None:
        """Take a state that `check_state` has passed."""


def mean_square(outputs: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """The mean squared difference where `valid`, which broadcasts; in the wider dtype."""
    dtype = torch.promote_types(outputs.dtype, targets.dtype)
    outputs, targets = outputs.to(dtype), targets.to(dtype)
    if valid is None:
        return mse_loss(outputs, targets)
    valid = valid.expand_as(outputs)
    return torch.where(valid, outputs - targets, 0).square().sum() / valid.sum().clamp(min=1)


def is_labels(y: Any) -> bool:
    """Whether these are integers (n,), one tensor."""
    return isinstance(y, Tensor) and y.ndim == 1 and not y.is_floating_point()


def random_bits(purpose: str, seed: int, step: int) -> int:
    """A random number of 64 bits that follows from (seed, purpose, step)."""
    return int(key_pair(f"{purpose} {step}", seed)[0])
