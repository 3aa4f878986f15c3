"""Buffers that several processes use at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from leanreplay import (
    ClassBalancedBuffer,
    ClassBalancingReservoirBuffer,
    GreedyClassBalancingBuffer,
    InfiniteBuffer,
    ReservoirBuffer,
    SlidingWindowBuffer,
)

KINDS: dict[str, Callable[..., Any]] = {
    "reservoir": lambda path, **o: ReservoirBuffer(60, path, seed=1, **o),
    "window": lambda path, **o: SlidingWindowBuffer(60, path, seed=1, **o),
    "greedy": lambda path, **o: GreedyClassBalancingBuffer(60, path, seed=1, **o),
    "infinite": lambda path, **o: InfiniteBuffer(path, rows_per_part=100, seed=1, **o),
}


def stream(start: int, stop: int) -> dict[str, Any]:
    """Every byte is a function of position, so a row says whether it is whole."""
    p = np.arange(start, stop)
    x = ((p[:, None] * 40503 + np.arange(1500) * 2654435761) >> 9).astype(np.uint8)
    return {"batch": (x, p % 7), "metadata": {"z": np.stack([p, -p], 1).astype(np.float64)}}


def assert_whole(drawn: Any) -> None:
    """The rows of a sample are those of their positions."""
    (x, y), meta = drawn
    p = meta["position"]
    assert (x == ((p[:, None] * 40503 + np.arange(1500) * 2654435761) >> 9).astype(np.uint8)).all(), p
    assert (y == p % 7).all(), p
    assert (meta["z"] == np.stack([p, -p], 1)).all(), p


def feed(buffer: Any, stop: int, step: int = 20) -> None:
    while buffer.seen < stop:
        buffer.add(**stream(buffer.seen, min(stop, buffer.seen + step)))


GROUPED: dict[str, Callable[..., Any]] = {
    "balanced": lambda path, **o: ClassBalancedBuffer(60, path, seed=1, **o),
    "borrowing": lambda path, **o: ClassBalancedBuffer(60, path, seed=1, borrow=True, **o),
    "cbrs": lambda path, **o: ClassBalancingReservoirBuffer(60, path, seed=1, **o),
}


def group(p: Any) -> Any:
    """Ever more groups, 20 in the end."""
    return p * 31 % np.minimum(1 + p // 40, 20)


def feed_groups(buffer: Any, stop: int, step: int = 20) -> None:
    while buffer.seen < stop:
        start, end = buffer.seen, min(stop, buffer.seen + step)
        buffer.add(**stream(start, end), group=group(np.arange(start, end)))
