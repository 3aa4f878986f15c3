"""Weighted reservoirs by definition."""

from __future__ import annotations

import decimal
import functools
import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from leanreplay import (
    WeightedReservoirPolicy,
)
from leanreplay.keys import key_pair

M64 = 2**64 - 1
TINY, HUGE = 5e-324, 1.7976931348623157e308
NONE = np.zeros(0, np.int64)


def fin(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & M64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & M64
    return x ^ x >> 31


@functools.cache
def uniform(position: int, seed: int) -> Fraction:
    """v of a position: the middle of one of 2**52 parts of (0, 1)."""
    k0, k1 = (int(k) for k in key_pair("weighted reservoir", seed))
    h = fin(fin(position * 0x9E3779B97F4A7C15 + k0 & M64) + k1 & M64)
    return Fraction(2 * (h >> 12) + 1, 2**53)


@functools.cache
def exponential(position: int, seed: int) -> Fraction:
    """-log1p(-v) to 50 digits."""
    with decimal.localcontext(decimal.Context(prec=50)):
        u = 1 - uniform(position, seed)
        return Fraction(-(decimal.Decimal(u.numerator) / decimal.Decimal(u.denominator)).ln())


def oracle(weights: Sequence[float], size: int, seed: int = 0, stream: int = 0) -> list[int]:
    """Indices kept of a stream, ascending: those of the smallest E / w, to 50 digits."""
    found = [i for i, w in enumerate(weights) if w > 0]
    best = sorted(found, key=lambda i: (exponential((stream << 48) + i, seed) / Fraction(float(weights[i])), i))
    return sorted(best[:size])


def planned(weights: Any, size: int, seed: int, cuts: Sequence[int] = (), most: int = 2**40, start: int = 0) -> list[int]:
    """Indices that the policy alone comes to hold, the stream cut into batches at `cuts`."""
    policy = WeightedReservoirPolicy(size, seed, {})
    policy.load(NONE, NONE)
    bits = np.asarray(weights, np.float64).view(np.int64)
    holds: dict[int, int] = {}
    for first, last in itertools.pairwise([0, *cuts, len(bits)]):
        done = first
        while done < last:
            rows = policy.plan(start + done, bits[done:last], most).rows
            assert 1 <= len(rows) <= last - done
            holds |= {int(r): done + i for i, r in enumerate(rows) if r >= 0}
            done += len(rows)
    return sorted(holds.values())


def samples(start: int, stop: int) -> Any:
    p = np.arange(start, stop)
    return np.repeat(p[:, None], 3, 1).astype(np.float32), p % 5


def some_weights(n: int, seed: int = 0) -> Any:
    """Weights over the whole range of doubles, denormal and huge ones, zeros, and many of one size."""
    rng = np.random.default_rng([11, seed])
    found = rng.choice([1.0, 3.0, 0.25], n)
    wild = rng.random(n) < 0.3
    found[wild] = np.ldexp(rng.random(n) + 0.5, rng.integers(-1070, 1023, n))[wild]
    found[rng.random(n) < 0.1] = 0.0
    return found


def held(buffer: Any) -> list[int]:
    """Stream indices held, ascending, every row checked."""
    if not len(buffer):
        return []
    assert buffer.check() == []
    (x, y), meta = buffer.get(buffer.get_metadata("idx"))
    p = meta["position"] & (2**48 - 1)
    assert (x == p[:, None]).all()
    assert (y == p % 5).all()
    return sorted(p.tolist())
