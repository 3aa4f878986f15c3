"""Kernels of greedy class balancing: every sample enters, a random member of the largest class leaves."""

from __future__ import annotations

import numpy as np

from . import njit
from .hashing import GOLDEN, key_of, scramble


@njit
def largest_class(labels, counts, base):
    """Index of the largest count; of several, the one whose label hashes highest with `base`: each equally likely."""
    best, best_hash = 0, np.uint64(0)
    for c in range(counts.shape[0]):
        if counts[c] < counts[best]:
            continue
        h = scramble(base + scramble(np.uint64(labels[c]) * GOLDEN + base))
        if c == 0 or counts[c] > counts[best] or h > best_hash:
            best, best_hash = c, h
    return best


@njit
def random_member(row_labels, size, label, base):
    """A row below `size` with this label, each equally likely: draw rows until one has it (1 / its share tries)."""
    for attempt in range(64 * size + 64):
        r = np.int64(scramble(base + np.uint64(attempt) * GOLDEN) % np.uint64(size))
        if row_labels[r] == label:
            return r
    for r in range(size):  # unreachable in practice; without it a wrong count could mean an endless loop
        if row_labels[r] == label:
            return r
    return np.int64(0)


@njit
def plan_greedy(row_labels, size, capacity, labels, counts, k0, k1, start, groups, out):
    """Let sample i, of label groups[i], take row out[i]: a free one, or that of a random member of the largest class.

    row_labels: (capacity,) int64 and counts: (classes,) int64 are updated; labels: (classes,) int64, sorted, holds
    every label of rows and groups. O(classes) a sample. Returns the size.
    """
    for i in range(out.shape[0]):
        if size < capacity:
            r = size
            size += 1
        else:
            base = key_of(start + i, k0, k1)
            c = largest_class(labels, counts, base)
            r = random_member(row_labels, size, labels[c], base)
            counts[c] -= 1
        out[i] = r
        row_labels[r] = groups[i]
        counts[np.searchsorted(labels, groups[i])] += 1
    return size
