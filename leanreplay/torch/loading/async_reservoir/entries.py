"""What an AsyncReservoir has loaded: the last entries, in memory or in a buffer."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .... import SlidingWindowBuffer
from ....arguments import instance
from ....errors import ArgumentError, StateError
from ....keys import STREAM_BITS
from ....samples.batch import stack
from ...data import BufferDataset


class InMemory:
    """The last `size` entries, in RAM."""

    def __init__(self, size: int) -> None:
        self._entries: deque[Any] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._entries)

    def append(self, entry: Any) -> None:
        self._entries.append(entry)

    def snapshot(self) -> Sequence[Any]:
        return tuple(self._entries)

    def state(self) -> list[Any] | None:
        return list(self._entries)

    def load_state(self, entries: list[Any] | None) -> None:
        self._entries = deque(entries or (), maxlen=self._entries.maxlen)

    def pick(self, snapshot: Any, indices: list[int], copies: bool) -> list[Any]:
        """Give entries of a snapshot. copies: whether the caller may change them."""
        return [_copied(snapshot[i]) if copies else snapshot[i] for i in indices]


class InBuffer:
    """The last `size` entries, in the newest rows of a buffer."""

    def __init__(self, buffer: SlidingWindowBuffer, size: int) -> None:
        instance(buffer, SlidingWindowBuffer, "buffer must be a leanreplay.SlidingWindowBuffer")
        if buffer.max_size < size:
            raise ArgumentError(f"buffer has {buffer.max_size} rows, but max_reservoir_samples is {size}; give it as many rows")
        self._buffer, self._size = buffer, size

    def __len__(self) -> int:
        return min(self._size, len(self._buffer))

    def append(self, entry: Any) -> None:
        self._buffer.add(stack([entry]))

    def snapshot(self) -> Sequence[Any]:
        return _Rows(self._buffer, len(self))

    def state(self) -> list[Any] | None:
        return None  # the buffer has states of its own

    def load_state(self, entries: list[Any] | None) -> None:
        pass

    def pick(self, snapshot: Any, indices: list[int], copies: bool) -> list[Any]:
        return snapshot.pick(indices)  # what is read is a copy anyway


class _Rows(Sequence[Any]):
    """The newest n samples of a buffer, oldest first. They are read when they are asked for.

    Raises StateError for a sample that has been replaced since.
    """

    def __init__(self, buffer: SlidingWindowBuffer, n: int) -> None:
        self._data, self._n, self._capacity = BufferDataset(buffer, metadata=True), n, buffer.max_size
        self._first = buffer.seen - n
        # The rows are a ring: the position of row 0 tells where each position stands.
        self._row_0 = int(buffer.get_metadata("position", [0])[0]) % 2**STREAM_BITS

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: Any) -> Any:
        return self.pick([index])[0]

    def pick(self, indices: list[int]) -> list[Any]:
        """Read several in one go."""
        positions = [self._first + range(self._n)[i] for i in indices]
        found = self._data.__getitems__([(p - self._row_0) % self._capacity for p in positions])
        for (_, meta), position in zip(found, positions, strict=True):
            if meta["position"] % 2**STREAM_BITS != position:
                raise StateError("a later epoch has replaced this entry in the buffer: end one epoch before beginning the next")
        return [sample for sample, _ in found]


def _copied(value: Any) -> Any:
    """Copy an entry, so that later epochs do not see what this one changes."""
    if type(value) in (list, tuple):
        return type(value)([_copied(v) for v in value])
    if type(value) is dict:
        return {key: _copied(v) for key, v in value.items()}
    if type(value) is torch.Tensor:
        # deepcopy would copy all that the tensor is a view of.
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return value.copy()
    try:
        return copy.deepcopy(value)
    except Exception:  # a lock or an open file, say, or something that holds one
        return value
