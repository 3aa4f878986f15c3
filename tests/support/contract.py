"""Every kind of buffer, in memory and on disk: what the contract suite runs on. A new buffer gets a line in KINDS.

A stream of samples stands for all data: the sample at position p is an image of p's, its label p % 3, its logits (p, -p).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import leanreplay as lr

KINDS: dict[str, Callable[..., Any]] = {
    "reservoir": lambda path=None, **o: lr.ReservoirBuffer(12, path, **o),
    "window": lambda path=None, **o: lr.SlidingWindowBuffer(12, path, **o),
    "greedy": lambda path=None, **o: lr.GreedyClassBalancingBuffer(12, path, **o),
    "gdumb": lambda path=None, **o: lr.GreedyClassBalancingBuffer(12, path, admit="below_share", **o),
    "class": lambda path=None, **o: lr.ClassBalancedBuffer(12, path, **o),
    "experience": lambda path=None, **o: lr.ExperienceBalancedBuffer(12, path, **o),
    "cbrs": lambda path=None, **o: lr.ClassBalancingReservoirBuffer(12, path, **o),
    "weighted": lambda path=None, **o: lr.WeightedReservoirBuffer(12, path, **o),
    "scored": lambda path=None, **o: lr.ScoredBuffer(12, path, evict="proportional", **o),
    "parametric": lambda path=None, **o: lr.ParametricBuffer(12, path, **o),
    "infinite": lambda path=None, **o: lr.InfiniteBuffer(path, rows_per_part=8, **o),
}
OWN = {"weighted": ["weight"], "scored": ["score"], "parametric": ["rank"]}  # metadata that a buffer adds of its own
AN_EXPERIENCE = 30  # samples


def digits(start: int, stop: int) -> tuple[Any, Any]:
    """Images of one value, their position, and a label."""
    p = np.arange(start, stop)
    return np.ones((1, 4, 4), np.float32) * p[:, None, None, None].astype(np.float32), p % 3


def logits(start: int, stop: int) -> Any:
    return np.stack([np.arange(start, stop), -np.arange(start, stop)], 1).astype(np.float32)


def assert_samples(batch: Any, meta: Any) -> None:
    """Each row is the sample of its position."""
    x, y = batch
    p = meta["position"] % 2**48  # without the stream
    assert x.shape == (len(p), 1, 4, 4)
    assert (x == p[:, None, None, None]).all()
    assert (y == p % 3).all()
    assert (meta["logits"] == np.stack([p, -p], 1)).all()


def held(buffer: Any) -> list[Any]:
    """All that can be read: positions by row, contents, samples seen."""
    rows = buffer.get_metadata("idx")
    (x, y), meta = buffer.get(rows)
    assert_samples((x, y), meta)
    own = [meta[name].tolist() for name in sorted(meta)]
    return [buffer.seen, len(buffer), x.tobytes(), y.tolist(), own]


@dataclass(frozen=True)
class Case:
    """A kind of buffer and a place for it: None is memory."""

    kind: str
    path: Path | None

    @property
    def own(self) -> list[str]:
        return OWN.get(self.kind, [])

    @property
    def bounded(self) -> bool:
        return self.kind != "infinite"

    def new(self, path: Any = None, **options: Any) -> Any:
        """A buffer of this kind in memory, or at another path."""
        return KINDS[self.kind](path, **options)

    def make(self, **options: Any) -> Any:
        return KINDS[self.kind](self.path, **options)

    def given(self, start: int, stop: int) -> dict[str, Any]:
        """What `add` wants to know beside the batch. Samples of one call are of one experience."""
        if self.kind == "weighted":
            return {"weights": 1.0 + np.arange(start, stop) % 4}
        if self.kind == "scored":
            return {"scores": 1.0 + np.arange(start, stop) % 4}
        return {"experience": start // AN_EXPERIENCE} if self.kind == "experience" else {}

    def feed(self, buffer: Any, start: int, stop: int, **metadata: Any) -> None:
        ends = [*range((start // AN_EXPERIENCE + 1) * AN_EXPERIENCE, stop, AN_EXPERIENCE), stop] if stop > start else [stop]
        for end in ends:
            part = {name: values[: end - start] for name, values in metadata.items()}
            buffer.add(digits(start, end), metadata={"logits": logits(start, end), **part}, **self.given(start, end))
            start = end

    def filled(self, n: int = AN_EXPERIENCE, **options: Any) -> Any:
        buffer = self.make(**options)
        self.feed(buffer, 0, n)
        return buffer

    def resize(self, buffer: Any, max_size: int) -> None:
        """Without the warning of what has dropped samples already."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lr.CapacityWarning)
            buffer.resize(max_size)

    def files(self) -> list[Path]:
        assert self.path is not None
        return [self.path] if self.path.is_file() else sorted(self.path.glob("part-*.h5"))

    def bytes_on_disk(self) -> int:
        return sum(os.path.getsize(file) for file in self.files())
