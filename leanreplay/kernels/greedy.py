"""Kernels of greedy class balancing: a sample enters, a random one of the largest class leaves."""

from __future__ import annotations

import numpy as np

from . import compile_kernel, helper
from .hashing import GOLDEN, key_of, scramble


@helper
def _largest_class(labels, counts, base):
    """Return the index of the largest count. labels, counts: (classes,) int64.

    Of several the one whose label hashes highest with `base` (uint64): each is equally likely.
    """
    best, best_hash = 0, np.uint64(0)
    for c in range(counts.shape[0]):
        if counts[c] < counts[best]:
            continue
        h = scramble(base + scramble(np.uint64(labels[c]) * GOLDEN + base))
        if c == 0 or counts[c] > counts[best] or h > best_hash:
            best, best_hash = c, h
    return best


@helper
def _random_member(row_labels, size, label, base):
    """Return a row below `size` with this label, each equally likely. row_labels: int64 per row.

    It draws rows, by hash with `base` (uint64), until one has the label: 1 / its share tries.
    """
    for attempt in range(64 * size + 64):
        r = np.int64(scramble(base + np.uint64(attempt) * GOLDEN) % np.uint64(size))
        if row_labels[r] == label:
            return r
    for r in range(size):  # practically unreachable, but a wrong count must not loop for ever
        if row_labels[r] == label:
            return r
    return np.int64(0)


largest_class = compile_kernel(_largest_class)
random_member = compile_kernel(_random_member)


@compile_kernel
def plan_greedy(row_labels, size, capacity, labels, counts, below_share, k0, k1, start, groups, out):
    """Let sample i, of label groups[i], take row out[i]; returns the size. O(classes) a sample.

    It is a free row, or that of a random member of the largest class; -1 if `below_share` and its
    class has capacity / classes rows or more. row_labels: (capacity,) int64 and counts: (classes,)
    int64 are updated. labels: (classes,) int64, sorted, holds every label of rows and groups.
    groups, out: (n,) int64. k0, k1: uint64.
    """
    held = 0  # classes that have a row
    for c in range(counts.shape[0]):
        held += counts[c] > 0
    for i in range(out.shape[0]):
        mine = np.searchsorted(labels, groups[i])
        if below_share and counts[mine] * held >= capacity:
            out[i] = -1
            continue
        if size < capacity:
            r = size
            size += 1
        else:
            base = key_of(start + i, k0, k1)
            c = _largest_class(labels, counts, base)
            r = _random_member(row_labels, size, labels[c], base)
            counts[c] -= 1
            held -= counts[c] == 0
        out[i] = r
        row_labels[r] = groups[i]
        held += counts[mine] == 0
        counts[mine] += 1
    return size
