"""A buffer that refuses: the error says what came, and nothing has changed."""

from __future__ import annotations

import numpy as np
import pytest

import leanreplay as lr

MEMORY_AND_DISK = pytest.mark.parametrize("place", ["memory", "disk"])


def batch(start, n):
    """n samples: (float32[3], int64 label)."""
    x = (np.arange(start * 3, (start + n) * 3, dtype=np.float32) * 0.5).reshape(n, 3)
    return x, np.arange(start, start + n) % 4


def logits(start, n):
    return {"logits": np.arange(start * 2, (start + n) * 2, dtype=np.float32).reshape(n, 2)}


def make(path=None, cls=lr.ReservoirBuffer, fed=20, **options):
    """A buffer of 8 rows fed 20 samples with metadata."""
    buffer = cls(path, rows_per_part=8, **options) if cls is lr.InfiniteBuffer else cls(8, path, **options)
    if fed:
        buffer.add(batch(0, fed), metadata=logits(0, fed))
    return buffer


def feed(buffer, start, n):
    buffer.add(batch(start, n), metadata=logits(start, n))


def snapshot(buffer):
    """Everything that a buffer holds, as one comparable value."""
    if buffer.schema is None:
        return None
    store = buffer.current.store  # after that call: a failed resize may have left another one
    rows = buffer.get_metadata("idx")
    (x, y), meta = buffer.get(rows)
    index = store.index()
    held = [a.tobytes() for a in (x, y, meta["logits"], meta["idx"], meta["position"], index[0], index[1])]
    return held, buffer.seen, len(buffer), store.state_name(), buffer.draws.drawn, store.policy, buffer.max_size, str(buffer.schema)


def refuses(buffer, error, words, action):
    """The action raises `error` with all of `words` in its message, and leaves the buffer as it was and usable."""
    before = snapshot(buffer)
    with pytest.raises(error) as caught:
        action(buffer)
    assert isinstance(caught.value, lr.LeanReplayError), caught.value
    message = str(caught.value)
    for word in words:
        assert word in message, (word, message)
    assert snapshot(buffer) == before, message
    return message


X, Y = batch(20, 4)


def items(*widths):
    """A dataset whose i-th item has an x of widths[i] numbers."""
    return [(np.zeros(w, np.float32), 1) for w in widths]
