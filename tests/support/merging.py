"""Buffers to merge, and what the merge must hold by definition."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np

from leanreplay import (
    ClassBalancedBuffer,
    ExperienceBalancedBuffer,
    ReservoirBuffer,
    WeightedReservoirBuffer,
)
from leanreplay.keys import key_pair

M64 = 2**64 - 1
STREAM = 2**48
SEED = 5


def fin(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & M64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & M64
    return x ^ x >> 31


@functools.cache
def key(number: int, purpose: str = "reservoir", seed: int = SEED) -> int:
    k0, k1 = (int(k) for k in key_pair(purpose, seed))
    return fin(fin(number * 0x9E3779B97F4A7C15 + k0 & M64) + k1 & M64)


def label(position: int) -> int:
    """Labels of a long tail, and more of them in later streams; negative and large ones too."""
    return [0, 0, 0, 0, -7, -7, 2**40, 3, *range(10, 15)][position * 7919 % min(13, 7 + 2 * (position // STREAM))]


def weight(position: int) -> float:
    return [1.0, 2.0, 0.0, 2.0**-1060, 2.0**1000, 3.0, 1.0][position * 31 % 7]


def positions(streams: dict[int, int]) -> list[int]:
    """All positions of streams: number -> length."""
    return [s * STREAM + i for s, n in streams.items() for i in range(n)]


def largest(among: Iterable[int], size: int) -> list[int]:
    return sorted(sorted(among, key=key)[-size:] if size else [])


def quotas(groups: Iterable[int], size: int) -> dict[int, int]:
    order = sorted(set(groups), key=lambda g: key(g & M64, "group"))
    return {g: size // len(order) + (i < size % len(order)) for i, g in enumerate(order)}


def expected(kind: str, streams: dict[int, int], size: int, more: Iterable[int] = ()) -> list[int]:
    """Positions that one buffer over all streams, and some more positions, holds, ascending."""
    everything = [*positions(streams), *more]
    if kind == "reservoir":
        return largest(everything, size)
    if kind == "weighted":
        v = {p: (2 * (key(p, "weighted reservoir") >> 12) + 1) / 2**53 for p in everything if weight(p)}
        return sorted(sorted(v, key=lambda p: Fraction(-math.log1p(-v[p])) / Fraction(weight(p)))[:size])
    each: dict[int, list[int]] = {}
    for p in everything:
        each.setdefault(label(p), []).append(p)
    limit = dict.fromkeys(each, size // 12) if kind == "fixed" else quotas(each, size)
    return sorted(p for g, members in each.items() for p in largest(members, limit[g]))


KINDS: dict[str, Any] = {
    "reservoir": ReservoirBuffer,
    "weighted": WeightedReservoirBuffer,
    "classes": ClassBalancedBuffer,
    "fixed": functools.partial(ClassBalancedBuffer, adaptive_size=False, total_num_classes=12),
    "experiences": ExperienceBalancedBuffer,
}
STREAMS = {0: 90, 1: 7, 2: 200, 3: 41}


def samples(start: int, stop: int) -> Any:
    """Payload of positions start to stop: floats of the position in its stream, bytes of an odd number, the stream."""
    p = np.arange(start, stop)
    return {
        "x": np.repeat((p % STREAM)[:, None], 3, 1).astype(np.float32),
        "b": (p[:, None] * [1, 3, 5] % 251).astype(np.uint8),
        "s": p // STREAM,
    }


def feed(kind: str, buffer: Any, stop: int, batch: int = 40) -> None:
    """Feed the buffer's own stream up to index `stop` of it."""
    start = buffer.seen
    for here in range(start, stop, batch):
        first, last = (buffer.stream * STREAM + i for i in (here, min(stop, here + batch)))
        data, meta = samples(first, last), {"m": np.arange(first, last)}
        if kind == "reservoir":
            buffer.add(data, metadata=meta)
        elif kind == "weighted":
            buffer.add(data, metadata=meta, weights=[weight(p) for p in range(first, last)])
        elif kind == "experiences":
            for p in range(first, last):
                one = {name: a[p - first : p - first + 1] for name, a in data.items()}
                buffer.add(one, metadata={"m": meta["m"][p - first : p - first + 1]}, experience=label(p))
        else:
            buffer.add(data, metadata=meta, group=[label(p) for p in range(first, last)])


def made(kind: str, folder: Any, streams: dict[int, int], size: int = 30, **options: Any) -> list[Any]:
    """A buffer per stream, fed: paths, or in memory the open buffers if `folder` is None."""
    found = []
    for number, n in streams.items():
        path = None if folder is None else os.path.join(folder, f"{kind}{number}.h5")
        buffer = KINDS[kind](size, path, seed=SEED, stream=number, **options)
        feed(kind, buffer, n)
        if path:
            buffer.close()
        found.append(path or buffer)
    return found


def held(buffer: Any) -> list[int]:
    """Positions in row order, every row and the file checked."""
    assert buffer.check() == []
    if not len(buffer):
        return []
    found = buffer.get_metadata("position")
    data, meta = buffer.get(buffer.get_metadata("idx"))
    for p, x, b, s, m in zip(found.tolist(), data["x"], data["b"], data["s"], meta["m"], strict=True):
        assert (x == p % STREAM).all()
        assert (b == samples(p, p + 1)["b"][0]).all()
        assert (s, m) == (p // STREAM, p)
    if isinstance(buffer, WeightedReservoirBuffer):
        assert buffer.get_metadata("weight").tolist() == [weight(p) for p in found.tolist()]
    elif not isinstance(buffer, ReservoirBuffer):
        for g in buffer.group_sizes():
            assert {label(p) for p in buffer.get_metadata("position", buffer.group_rows(g)).tolist()} <= {g}
    return found.tolist()
