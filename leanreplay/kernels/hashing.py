"""Hashes of integers: keys of stream positions and ids of groups, which all reservoirs share."""

from __future__ import annotations

import numpy as np

from . import helper

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio, odd
_S0 = np.uint64(0xBF58476D1CE4E5B9)
_S1 = np.uint64(0x94D049BB133111EB)
_27 = np.uint64(27)
_30 = np.uint64(30)
_31 = np.uint64(31)


@helper
def scramble(x):
    """Scramble a uint64 by splitmix64's finaliser (Steele et al., OOPSLA 2014), a bijection."""
    x = (x ^ (x >> _30)) * _S0
    x = (x ^ (x >> _27)) * _S1
    return x ^ (x >> _31)


@helper
def key_of(position, k0, k1):
    """Return the key of a position, or the hash of a group's id (uint64): a bijection, no ties."""
    return scramble(scramble(np.uint64(position) * GOLDEN + k0) + k1)


@helper
def hash_of_draw(k0, k1, seen, counter):
    """Return the hash (uint64) that the numbers of one draw come from."""
    return scramble(scramble(scramble(np.uint64(seen) * GOLDEN + k0) + np.uint64(counter)) + k1)


@helper
def find_slot(table, entry):
    """Return where `entry` stands in an open-addressing table, or would."""
    mask = np.uint64(table.shape[0] - 1)
    at = scramble(np.uint64(entry)) & mask
    while table[at] != -1 and table[at] != entry:
        at = (at + np.uint64(1)) & mask
    return at
