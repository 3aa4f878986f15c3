"""Batches between their loss and `after_step`: what is written to the buffer, and with what."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...buffers.base import DataBuffer
from ...errors import ArgumentError
from .. import nests
from ..models import single
from .forward import Forward, Replay
from .term import Learner, Term, is_labels

Draws = list[tuple[Term, Replay]]  # the terms that count, each with its draw
Moved = tuple[Any, Any, dict[str, Tensor]]  # rows, positions, name -> values
Versions = list[int]


@dataclass(slots=True)
class Batch:
    """A batch, what the model sees of it, and what will be written.

    size: how many samples. pair: copies of x and y to be stored, because models, transforms and
    losses may work in place, and a loop may fill one batch again and again. given: x and y as they
    came, and their versions; None if this batch cannot come again. inputs, targets: x and y
    transformed, on the device. All of them are nests. labels: the targets before they went there.
    kind: shapes and dtypes of samples. offered: whether the samples go to the buffer.
    experience: the task's number. stored, moved, seen: what the pass gave: metadata of the batch,
    new metadata of drawn samples, the classes that occurred up to here (with masks).
    """

    size: int
    pair: tuple[Any, Any]
    given: tuple[Any, Versions] | None
    inputs: Any
    targets: Any
    labels: Any
    draws: Draws
    kind: Any
    offered: bool
    experience: int | None
    stored: dict[str, Tensor] = field(default_factory=dict)
    moved: list[Moved] = field(default_factory=list)
    seen: Tensor | None = None

    @property
    def all_labels(self) -> list[tuple[str, Any]]:
        """(whose, labels) of the batch and its draws, where reading does not wait for a device."""
        return [("batch", self.labels), *(("replayed samples", replay.labels) for _, replay in self.draws)]

    def is_same(self, x: Any, y: Any) -> bool:
        """Whether x and y are this batch: the same memory, not written to since."""
        pair = x, y
        if self.given is None or not _same_memory(nests.first(x), nests.first(self.given[0][0])):
            return False  # nearly always
        if versions(x, y) != self.given[1] or nests.kind(pair) != nests.kind(self.given[0]):
            return False
        same_memory = all(nests.leaves(nests.each_leaf(_same_memory, pair, self.given[0])))
        # NumPy counts no writes.
        return same_memory and all(nests.leaves(nests.each_leaf(_equal, self.pair, pair)))


def values_to_keep(learner: Learner, terms: Sequence[Term], stream: Forward) -> dict[str, Tensor]:
    """Name -> a copy of what the terms store with each sample of the stream's pass."""
    stored: dict[str, Tensor] = {}
    for term in terms:
        for name, value in term.keep(learner, stream).items():
            if name in stored:
                raise ArgumentError(f"two terms store metadata as {name!r} with each sample; let keep of {term.name!r} use another name")
            stored[name] = value.detach().clone() if isinstance(value, Tensor) else value
    return stored


def values_to_move(learner: Learner, draws: Draws) -> list[Moved]:
    """(rows, positions, name -> new values) of every draw that went through the model."""
    moved: list[Moved] = []
    for replay in dict.fromkeys(replay for _, replay in draws):
        now = replay.latest
        moves = [] if now is None else [term.move(learner, replay, now, learner.ema_memory_update_gamma) for term in learner.terms]
        values = {name: value.detach().clone() for values in moves for name, value in values.items()}
        if values:
            moved.append((replay.metadata["idx"], replay.metadata["position"], values))
    return moved


def classes_seen(learner: Learner, outputs: Any, batch: Batch, before: Tensor | None) -> Tensor:
    """Which classes occurred up to and with this batch, (outputs,) bool."""
    outputs = single(outputs, "mask_unused_classes")
    if outputs.ndim != 2 or not is_labels(batch.targets):
        raise ArgumentError(f"mask_unused_classes needs outputs (n, classes) and integer labels (n,), got {tuple(outputs.shape)}")
    classes = outputs.shape[1]
    seen = torch.zeros(classes + 1, dtype=torch.bool, device=outputs.device)  # the last: ignored
    if before is not None:
        before = before[:classes]
        seen[: before.shape[0]] = before.to(seen.device)
    for labels in [batch.targets, *(replay.y for _, replay in batch.draws)]:
        y = labels.long()
        if learner.ignore_index is not None:
            y = y.masked_fill(y == learner.ignore_index, classes)
        seen.scatter_(0, y, True)  # which, unlike an index, takes no -1 for the last one
    return seen[:classes]


def write(buffer: DataBuffer, batches: Sequence[Batch]) -> None:
    """Give the buffer what moved and the offered batches, in one commit if there are any."""
    moves = [m for batch in batches for m in batch.moved]
    moved = None
    if moves:  # if a row was drawn several times, the last values count
        rows, positions = (np.concatenate([m[i] for m in moves]) for i in range(2))
        moved = rows, positions, {name: as_array(torch.cat([m[2][name] for m in moves])) for name in moves[0][2]}
    batches = [batch for batch in batches if batch.offered]
    if not batches:
        for name, values in moved[2].items() if moved else ():
            buffer.set_metadata(name, values, rows, positions=positions)
        return
    first = batches[0]
    if len(batches) == 1:
        pair, stored = first.pair, first.stored
    else:
        pair = nests.joined([batch.pair for batch in batches])
        stored = {name: torch.cat([batch.stored[name] for batch in batches]) for name in first.stored}
    metadata = {name: as_array(value) for name, value in stored.items()} or None
    options: dict[str, Any] = {}
    if first.experience is not None:
        options["experience"] = np.repeat([int(b.experience or 0) for b in batches], [b.size for b in batches])
    buffer.add(pair, metadata=metadata, moved=moved, **options)


def unwritten(batches: Sequence[Batch], arrived: int) -> list[Batch]:
    """What is left of batches of which so many samples arrived; moved metadata went with the first.

    The optimizer has made its step, so the same tensors are another batch from now on.
    """
    left, some = [], arrived > 0
    for batch in batches:
        skip = min(arrived, batch.size) if batch.offered else 0
        arrived -= skip
        if skip < batch.size and (batch.offered or not some):
            stored = {name: value[skip:] for name, value in batch.stored.items()}
            moved = [] if some else batch.moved
            pair = nests.each_leaf(operator.itemgetter(slice(skip, None)), batch.pair)
            left.append(replace(batch, size=batch.size - skip, pair=pair, stored=stored, moved=moved, given=None, draws=[]))
    return left


def versions(x: Any, y: Any) -> Versions:
    """How often each was written to in place; tensors of inference mode do not count that."""
    try:
        return [leaf._version for leaf in (*nests.leaves(x), *nests.leaves(y))]
    except RuntimeError:
        return []


def as_array(tensor: Tensor) -> Any:
    """The tensor's array, which the buffer takes faster; else the tensor.

    A tensor on a GPU has none: there the buffer copies only the samples that it keeps.
    """
    try:
        return tensor.numpy()
    except (RuntimeError, TypeError):
        return tensor


def copied_array(tensor: Tensor) -> Any:
    """A copy of the tensor, as an array if it has one."""
    array = as_array(tensor)
    return array.copy() if array is not tensor else tensor.detach().clone()


def _equal(held: Any, tensor: Tensor) -> bool:
    """Whether values are the same; NaN is the same as NaN."""
    held = torch.as_tensor(held)
    return torch.equal(held, tensor) or bool(((held == tensor) | (held.isnan() & tensor.isnan())).all())


def _same_memory(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    return a.data_ptr() == b.data_ptr() != 0 and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
