"""What goes into the model: batches of the stream and draws, as transformed tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...buffers.base import DataBuffer
from ...errors import ArgumentError, StateError
from .. import nests
from ..data import Transforms, to_torch
from .forward import Replay
from .pending import Draws
from .term import Learner


def prepare(learner: Learner, x: Any, y: Any) -> tuple[Any, Any, Any]:
    """A batch of the stream, transformed, on the device; then y before it went there."""
    stream = Transforms(learner.transform, learner.target_transform, learner.batch_transform)
    return stream.apply(x, y, nests.first(x).device if learner.device is None else learner.device)


def draw(learner: Learner, inputs: Any, targets: Any) -> Draws:
    """The terms that count now, each with its draw; none if the buffer is empty.

    inputs, targets: the prepared batch, which draws must resemble.
    """
    draws, replay, transforms = Draws(), None, _transforms_of_draws(learner)
    layers = learner.layers if learner.ema_memory_update_gamma < 1 else ()
    for term in learner.terms if learner.replay_batch_size else ():
        if term.draw is None or term.weight == 0:
            continue
        if replay is None or term.draw == "own":
            drawn = learner.buffer.view.sample(learner.replay_batch_size, learner.replay_draw, at_most=True, convert=to_torch)
            if drawn is None:  # the buffer is empty
                return []
            schema = learner.buffer.schema
            bits = schema.bfloat16 if schema is not None else frozenset()
            x, y, labels = transforms.apply(*_tensors(drawn[0], bits), nests.first(inputs).device)
            _check_alike(inputs, targets, x, y, term.together)
            replay = Replay(learner.module, x, y, drawn[1], layers, labels, bits, learner.forward)
        else:
            replay.shared = True
        replay.layers = (*replay.layers, *term.layers)
        draws.append((term, replay))
    return draws


def _transforms_of_draws(learner: Learner) -> Transforms:
    """What was given; else the stream's, unless the buffer has a transform of its own."""
    own, own_target = learner.buffer.transform is not None, learner.buffer.target_transform is not None
    x, y, batch = learner.buffer_transform, learner.buffer_target_transform, learner.buffer_batch_transform
    return Transforms(
        (None if own else learner.transform) if x is None else x or None,
        (None if own_target else learner.target_transform) if y is None else y or None,
        (None if own else learner.batch_transform) if batch is None else batch or None,
        "buffer_",
    )


def _tensors(pair: Any, bits: frozenset[str]) -> tuple[Any, Any]:
    """What was drawn, as two nests of tensors. bits: names of bfloat16 fields."""
    x, y = to_torch(pair[0], bits, path="data/0"), to_torch(pair[1], bits, path="data/1")
    if nests.is_nest(x) and nests.is_nest(y):
        return x, y
    raise ArgumentError(
        f"a learner needs tensors or arrays from its buffer, but drawn were {nests.described(x)} and {nests.described(y)}: "
        "what does the buffer's transform return?"
    )


def _check_alike(x: Any, y: Any, x_old: Any, y_old: Any, together: bool) -> None:
    """Raise ArgumentError if the model would see two kinds of samples.

    together: in one batch, where torch would widen dtypes.
    """
    if nests.kind(x, together) == nests.kind(x_old, together) and (not together or nests.kind(y) == nests.kind(y_old)):
        return
    stream, draw = (f"x {nests.described(a)}, y {nests.described(b)}" for a, b in ((x, y), (x_old, y_old)))
    raise ArgumentError(
        f"samples of the stream ({stream}) and of the buffer ({draw}) differ: the model would see two kinds; let transforms of "
        "the stream (transform, ...) and of draws (buffer_transform, ..., or the buffer's own) make the same"
    )


def reading_state(buffer: DataBuffer) -> dict[str, Any]:
    """The state of a buffer that is open for reading: the name of its contents, and its draws."""
    return {"uuid": buffer.parameters.identity, "seen": buffer.seen, "draws": {"sample": buffer.draws.drawn}}


def load_reading_state(buffer: DataBuffer, state: Any) -> None:
    """Go back to a state of `reading_state`. Raises StateError if the contents are others now."""
    drawn = state["draws"].get("sample") if isinstance(state, Mapping) and isinstance(state.get("draws"), Mapping) else None
    if type(drawn) is not int or not 0 <= drawn < 2**62 or {**reading_state(buffer), "draws": {"sample": drawn}} != state:
        raise StateError(
            f"not the state of a learner that only reads what {buffer!r} holds now: {state!r:.200}; a buffer that was written to "
            "in the meantime goes back only if it is open with mode='r+'"
        )
    buffer.draws.begin(drawn, 0)
