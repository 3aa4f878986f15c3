"""Kernels of keyed sampling: keys of positions, the reservoir of the largest keys, and draws."""

from __future__ import annotations

import numpy as np

from . import compile_kernel
from .hashing import GOLDEN, find_slot, hash_of_draw, key_of, scramble
from .heaps import sink


@compile_kernel
def position_keys(positions, k0, k1, out):
    """Write the key of positions[i] to out[i]. positions: (n,) int64; out: (n,) uint64."""
    for i in range(positions.shape[0]):
        out[i] = key_of(positions[i], k0, k1)


@compile_kernel
def build_heap(positions, k0, k1, keys, rows):
    """Make the min-heap (keys, rows) of all live rows; returns its size. O(rows).

    positions: int64 per row, below 0 for free ones. keys: uint64, rows: int64, as long.
    """
    size = 0
    for r in range(positions.shape[0]):
        if positions[r] >= 0:
            keys[size] = key_of(positions[r], k0, k1)
            rows[size] = r
            size += 1
    for i in range(size // 2 - 1, -1, -1):
        sink(keys, rows, size, i)
    return size


@compile_kernel
def plan_reservoir(keys, rows, size, limit, k0, k1, start, max_rows, out):
    """Offer positions start, start + 1, ... to the heap; returns the samples used and the size.

    out: (n,) int64, receives the row that sample i takes, or -1. It stops after n samples, or after
    `max_rows` of them took a row. keys, rows: the heap, of `size` entries. Rows are filled in order
    up to `limit`. Then a larger key replaces the row of the smallest key.
    """
    taken = 0
    for i in range(out.shape[0]):
        if taken == max_rows:
            return i, size
        key = key_of(start + i, k0, k1)
        out[i] = -1
        if size < limit:
            j = size
            while j > 0 and keys[(j - 1) // 2] > key:
                keys[j], rows[j] = keys[(j - 1) // 2], rows[(j - 1) // 2]
                j = (j - 1) // 2
            keys[j], rows[j] = key, size
            out[i] = size
            size += 1
            taken += 1
        elif size > 0 and key > keys[0]:
            out[i] = rows[0]
            keys[0] = key
            sink(keys, rows, size, 0)
            taken += 1
    return out.shape[0], size


@compile_kernel
def draw(size, k0, k1, seen, counter, replace, out):
    """Draw numbers below `size` uniformly into out, (n,) int64: by (k0, k1, seen, counter) alone.

    Without replacement it is a sparse Fisher-Yates shuffle, with its moved entries in an
    open-addressing table: O(n), not O(size).
    """
    n = out.shape[0]
    base = hash_of_draw(k0, k1, seen, counter)
    if replace:
        for i in range(n):
            out[i] = np.int64(scramble(base + np.uint64(i) * GOLDEN) % np.uint64(size))
        return
    slots = 4
    while slots < 4 * n:
        slots *= 2
    moved = np.empty(slots, np.int64)
    value = np.empty(slots, np.int64)
    for i in range(slots):
        moved[i] = -1
    for i in range(n):
        pick = i + np.int64(scramble(base + np.uint64(i) * GOLDEN) % np.uint64(size - i))
        at = find_slot(moved, i)
        mine = value[at] if moved[at] == i else np.int64(i)
        at = find_slot(moved, pick)
        out[i] = value[at] if moved[at] == pick else pick
        moved[at] = pick
        value[at] = mine
