"""What the tests of inputs share: samples, and what becomes of a batch or dataset."""

from __future__ import annotations

import numpy as np
import pytest

import leanreplay as lr

N = 12
X, Y = np.arange(N * 4, dtype=np.float32).reshape(N, 4), np.arange(N) % 3
IMAGES = [np.full((3, 8, 8), i, np.uint8) for i in range(6)]


def added(batch, **options):
    """What a window holds after this batch: (samples, schema)."""
    with lr.SlidingWindowBuffer(100) as buffer:
        buffer.add(batch, **options)
        return buffer.get(range(len(buffer)))[0], str(buffer.schema)


def updated(dataset, cls=lr.SlidingWindowBuffer, **options):
    with cls(100) as buffer:
        buffer.update(dataset, **options)
        return buffer.get(range(len(buffer)))[0], str(buffer.schema)


def refused(action, error=lr.SchemaError):
    """The message of an error, after which nothing is held and the buffer can be fed."""
    with lr.ReservoirBuffer(5) as buffer:
        with pytest.raises(error) as caught:
            action(buffer)
        assert isinstance(caught.value, lr.LeanReplayError)
        assert buffer.schema is None and buffer.seen == 0
        buffer.add((X, Y))
        assert buffer.seen == N
    return str(caught.value)


class Frame:
    """As a data frame behaves: labels in [], columns, an array of all."""

    columns = ("a", "b")

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, key):
        raise KeyError(key)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)

    def to_numpy(self):
        return np.asarray(self.values)
