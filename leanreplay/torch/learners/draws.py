"""Draws from the buffer for the terms: as tensors on the device, transformed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ...buffers.base import DataBuffer
from ...errors import ArgumentError, StateError
from ..data import Function, per_batch, per_sample, to_torch
from .pending import Draws
from .replay import Replay
from .term import Term


class Transforms(NamedTuple):
    """What samples go through before the model.

    sample: of the x of each. target: of the y of each. batch: of the x of a batch. prefix: of their
    names, for messages.
    """

    sample: Function | None
    target: Function | None
    batch: Function | None
    prefix: str = ""

    def apply(self, x: torch.Tensor, y: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x and y transformed and on the device; then y before it went there."""
        if self.sample is not None:
            x = per_sample(self.sample, x, f"{self.prefix}transform")
        if self.target is not None:
            y = per_sample(self.target, y, f"{self.prefix}target_transform")
        if x.device != device:
            x = x.to(device)
        if self.batch is not None:
            x = per_batch(self.batch, x, f"{self.prefix}batch_transform")
        return x, y if y.device == device else y.to(device), y


class Drawer:
    """Draws from one buffer."""

    def __init__(self, buffer: DataBuffer) -> None:
        self.buffer = buffer
        self._bits: frozenset[str] | None = None  # names of fields that hold bfloat16; None: not known yet

    def forget(self) -> None:
        """The buffer was loaded: its schema may be another one."""
        self._bits = None

    def transforms(self, stream: Transforms, sample: Any, target: Any, batch: Any) -> Transforms:
        """What transforms draws. None means the stream's, False none.

        If the buffer has a `transform` of its own, None means none; likewise its `target_transform`.
        """
        own, own_target = self.buffer.transform is not None, self.buffer.target_transform is not None
        return Transforms(
            (None if own else stream.sample) if sample is None else sample or None,
            (None if own_target else stream.target) if target is None else target or None,
            (None if own else stream.batch) if batch is None else batch or None,
            "buffer_",
        )

    def draw(
        self,
        terms: Sequence[Term],
        m: int,
        stream: tuple[torch.Tensor, torch.Tensor],
        transforms: Transforms,
        module: torch.nn.Module,
        layers: Sequence[str],
    ) -> Draws:
        """The terms that count now, each with its draw of m samples; none while the buffer is empty.

        stream: inputs and targets of the batch. layers: what each pass must look at, beside a term's own.
        """
        draws: Draws = []
        replay: Replay | None = None
        for term in terms if m else ():
            if term.draw is None or term.weight == 0:
                continue
            if replay is None or term.draw == "own":
                drawn = self.buffer.view.sample(m, at_most=True, convert=to_torch)
                if drawn is None:  # the buffer is empty
                    return []
                x, y, labels = transforms.apply(*self._tensors(drawn[0]), stream[0].device)
                replay = Replay(module, x, y, drawn[1], layers)
                replay.labels, replay.bits = labels, self._bits or frozenset()
                _check_alike(*stream, x, y, term.together)
            else:
                replay.shared = True
            replay.layers = (*replay.layers, *term.layers)
            draws.append((term, replay))
        return draws

    def _tensors(self, pair: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What was drawn, as two tensors."""
        if self._bits is None:
            schema = self.buffer.schema
            self._bits = frozenset() if schema is None else schema.bfloat16
        x, y = to_torch(pair[0], self._bits, path="data/0"), to_torch(pair[1], self._bits, path="data/1")
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return x, y
        raise ArgumentError(
            f"a learner needs tensors or arrays from its buffer, but drawn were {type(x).__name__} and {type(y).__name__}: "
            "what does the buffer's transform return?"
        )


def _check_alike(x: torch.Tensor, y: torch.Tensor, x_old: torch.Tensor, y_old: torch.Tensor, together: bool) -> None:
    """Raise ArgumentError if the model would see two kinds of samples.

    together: in one batch, where torch would widen dtypes.
    """
    if x.dtype == x_old.dtype and (not together or (x.shape[1:], y.shape[1:], y.dtype) == (x_old.shape[1:], y_old.shape[1:], y_old.dtype)):
        return
    stream, draw = (f"x {a.dtype} of {tuple(a.shape[1:])}, y {b.dtype} of {tuple(b.shape[1:])}" for a, b in ((x, y), (x_old, y_old)))
    raise ArgumentError(
        f"samples of the stream ({stream}) and of the buffer ({draw}) differ: the model would see two kinds; let transforms of "
        "the stream (transform, ...) and of draws (buffer_transform, ..., or the buffer's own) make the same"
    )


def reading_state(buffer: DataBuffer) -> dict[str, Any]:
    """The state of a buffer that is open for reading: what it holds, by name, and the count of draws."""
    return {"uuid": buffer.parameters.identity, "seen": buffer.seen, "draws": {"sample": buffer.draws.drawn}}


def load_reading_state(buffer: DataBuffer, state: Any) -> None:
    """Go back to a state of `reading_state`. Raises StateError if the buffer holds something else now."""
    drawn = state["draws"].get("sample") if isinstance(state, Mapping) and isinstance(state.get("draws"), Mapping) else None
    if type(drawn) is not int or not 0 <= drawn < 2**62 or {**reading_state(buffer), "draws": {"sample": drawn}} != state:
        raise StateError(
            f"not the state of a learner that only reads what {buffer!r} holds now: {state!r:.200}; a buffer that was written to "
            "in the meantime goes back only if it is open with mode='r+'"
        )
    buffer.draws.begin(drawn, 0)
