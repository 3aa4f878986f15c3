"""Heaps and trees in arrays: steps that kernels of reservoirs, merging and sorting share."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import helper

FANOUT = 8  # entries below an entry of a tree: a cache line of 8-byte numbers


def levels(rows: int) -> Any:
    """Return where each level of a tree over so many rows begins, and where the highest ends.

    Level 0 are the rows. Levels are padded to multiples of FANOUT, but the highest is one entry.
    """
    starts, size = [0], max(1, rows)
    while size > 1 or len(starts) == 1:
        size = -(-size // FANOUT)
        starts.append(starts[-1] + size * FANOUT)
    return np.array([*starts, starts[-1] + 1])


@helper
def sink(keys, rows, size, i):
    """Let entry i of a min-heap of (key, row) sink to where it belongs."""
    key, row = keys[i], rows[i]
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and keys[child + 1] < keys[child]:
            child += 1
        if keys[child] >= key:
            break
        keys[i], rows[i] = keys[child], rows[child]
        i = child
    keys[i], rows[i] = key, row


@helper
def is_worse(key, position, than, other):
    """Whether a sample leaves before another: the smaller key does, of equal ones the younger."""
    return key < than or (key == than and position > other)


@helper
def sift_up(keys, held, rows, i, key, position, row):
    """Add a sample behind the i samples of a heap, the worst on top, and let it rise."""
    while i > 0:
        above = (i - 1) // 2
        if not is_worse(key, position, keys[above], held[above]):
            break
        keys[i], held[i], rows[i] = keys[above], held[above], rows[above]
        i = above
    keys[i], held[i], rows[i] = key, position, row


@helper
def sift_down(keys, held, rows, size, i, key, position, row):
    """Put a sample in the place of sample i of a heap, the worst on top, and let it sink."""
    while 2 * i + 1 < size:
        c = 2 * i + 1
        if c + 1 < size and is_worse(keys[c + 1], held[c + 1], keys[c], held[c]):
            c += 1
        if not is_worse(keys[c], held[c], key, position):
            break
        keys[i], held[i], rows[i] = keys[c], held[c], rows[c]
        i = c
    keys[i], held[i], rows[i] = key, position, row
