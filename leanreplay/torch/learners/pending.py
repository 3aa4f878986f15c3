"""Batches whose loss was computed, until `after_step` writes them to the buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ...buffers.base import DataBuffer
from .replay import Replay
from .term import Term

Draws = list[tuple[Term, Replay]]
Moved = tuple[Any, Any, dict[str, torch.Tensor]]  # rows, positions, name -> values
Versions = tuple[int, int]


@dataclass(slots=True)
class Batch:
    """A batch, what the model sees of it, and what will be written.

    x, y: to be stored: arrays, or tensors where no array can share the memory. They are copies: models,
    transforms and losses may work in place, and a loop may fill one batch again and again.
    given: x and y as the caller has them, with their versions; None if this batch cannot come again.
    inputs, targets: x and y transformed, on the device. labels: the targets before they went there.
    kind: shapes and dtypes of samples. offered: whether the samples go to the buffer.
    experience: the number of the task. stored, moved, seen: results of the pass: metadata of the batch,
    new metadata of drawn samples, the classes that occurred up to here (with masks).
    """

    x: Any
    y: Any
    given: tuple[torch.Tensor, torch.Tensor, Versions] | None
    inputs: torch.Tensor
    targets: torch.Tensor
    labels: torch.Tensor
    draws: Draws
    kind: Any
    offered: bool
    experience: int | None
    stored: dict[str, torch.Tensor] = field(default_factory=dict)
    moved: list[Moved] = field(default_factory=list)
    seen: torch.Tensor | None = None

    def is_same(self, x: torch.Tensor, y: torch.Tensor) -> bool:
        """Whether x and y are this batch: the same memory, not written to since."""
        if self.given is None or versions(x, y) != self.given[2]:
            return False
        if not _same_memory(x, self.given[0]) or not _same_memory(y, self.given[1]):
            return False
        return _equal(self.x, x) and _equal(self.y, y)  # NumPy does not count its writes


def write(buffer: DataBuffer, batches: Sequence[Batch]) -> None:
    """Give the buffer what moved and the offered batches, in one commit if there are any."""
    moves = [m for batch in batches for m in batch.moved]
    moved = None
    if moves:  # if a row was drawn several times, the last values count
        rows, positions = (np.concatenate([m[i] for m in moves]) for i in range(2))
        moved = rows, positions, {name: _shared(torch.cat([m[2][name] for m in moves])) for name in moves[0][2]}
    batches = [batch for batch in batches if batch.offered]
    if not batches:
        for name, values in moved[2].items() if moved else ():
            buffer.set_metadata(name, values, rows, positions=positions)
        return
    first = batches[0]
    if len(batches) == 1:
        x, y, stored = first.x, first.y, first.stored
    else:
        x, y = (torch.cat([torch.as_tensor(part) for part in parts]) for parts in zip(*((b.x, b.y) for b in batches), strict=True))
        stored = {name: torch.cat([batch.stored[name] for batch in batches]) for name in first.stored}
    metadata = {name: _shared(value) for name, value in stored.items()} or None
    options: dict[str, Any] = {}
    if first.experience is not None:
        options["experience"] = np.repeat([int(b.experience or 0) for b in batches], [b.x.shape[0] for b in batches])
    buffer.add((x, y), metadata=metadata, moved=moved, **options)


def unwritten(batches: Sequence[Batch], arrived: int) -> list[Batch]:
    """What is left of batches of which so many samples arrived; what moved went with the first samples.

    The optimizer has made its step, so the same tensors are another batch from now on.
    """
    left, some = [], arrived > 0
    for batch in batches:
        skip = min(arrived, batch.x.shape[0]) if batch.offered else 0
        arrived -= skip
        if skip < batch.x.shape[0] and (batch.offered or not some):
            stored = {name: value[skip:] for name, value in batch.stored.items()}
            moved = [] if some else batch.moved
            left.append(replace(batch, x=batch.x[skip:], y=batch.y[skip:], stored=stored, moved=moved, given=None, draws=[]))
    return left


def versions(x: torch.Tensor, y: torch.Tensor) -> Versions:
    """How often each was written to in place; a tensor made in inference mode does not count that."""
    try:
        return x._version, y._version
    except RuntimeError:
        return 0, 0


def copied(tensor: torch.Tensor) -> Any:
    """A copy: an array where possible, which the buffer takes faster.

    Of a tensor that requires gradients the copy is a tensor.
    """
    try:
        return tensor.numpy().copy()
    except (RuntimeError, TypeError):
        return tensor.detach().clone()


def _shared(tensor: torch.Tensor) -> Any:
    """The tensor's array where it has one, else the tensor: from a GPU the buffer copies survivors only."""
    try:
        return tensor.numpy()
    except (RuntimeError, TypeError):
        return tensor


def _equal(held: Any, tensor: torch.Tensor) -> bool:
    """Whether values are the same; NaN is the same as NaN."""
    held = torch.as_tensor(held)
    return torch.equal(held, tensor) or bool(((held == tensor) | (held.isnan() & tensor.isnan())).all())


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b:
        return True
    return a.data_ptr() == b.data_ptr() != 0 and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
