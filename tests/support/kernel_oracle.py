"""Kernels in plain Python: what the compiled ones must agree with."""

from __future__ import annotations

from typing import Any

import numpy as np

from leanreplay.keys import key_pair

M64 = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
FREE = M64


def fin(x: int) -> int:
    """The finaliser of splitmix64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & M64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & M64
    return x ^ x >> 31


def key(position: int, k0: int, k1: int) -> int:
    return fin(fin(position * GOLDEN + k0 & M64) + k1 & M64)


def mix(x: int) -> int:
    """The finaliser of MurmurHash3."""
    x = (x ^ x >> 33) * 0xFF51AFD7ED558CCD & M64
    x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53 & M64
    return x ^ x >> 33


def digest(data: bytes) -> int:
    """The hash of some bytes: words of 8, then single bytes."""
    whole = len(data) // 8
    words = [int.from_bytes(data[8 * i : 8 * i + 8], "little") for i in range(whole)]
    entries = list(enumerate(words)) + [(i, data[i]) for i in range(8 * whole, len(data))]
    total = len(data)
    for i, word in entries:
        y = word + (i + 1) * GOLDEN & M64
        total += y + (y & 0xFFFFFFFF) * (y >> 32)
    return mix(total & M64)


def words(*values: int) -> Any:
    return np.array(values, np.uint64)


def keys(name: str = "x", seed: int = 0) -> tuple[Any, int, int]:
    pair = key_pair(name, seed)
    return pair, int(pair[0]), int(pair[1])


def read_only(array: Any) -> Any:
    view = array.view()
    view.flags.writeable = False
    return view


PINNED = (
    10040559449599729520,
    10848882084572388447,
    12776931632207974167,
    13936921488996283878,
    1861119234195132896,
    6592977253062345186,
    3290457699690052627,
    8456461171567981145,
)
