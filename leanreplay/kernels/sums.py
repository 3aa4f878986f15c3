"""Kernels of draws by weight: a tree of sums over a weight per row.

tree: float64, in levels as of `heaps.levels`. Level 0 holds a weight per row, 0 where there is none.
Each entry of a level above is the sum of 8 entries below, added in order. So a tree follows from
its weights alone, whatever changed before. starts: int64, where each level begins and ends.
"""

from __future__ import annotations

import numpy as np

from . import compile_kernel, helper
from .hashing import GOLDEN, find_slot, hash_of_draw, scramble
from .heaps import FANOUT

_11 = np.uint64(11)
_ULP = 2.0**-53


@helper
def _sum_of(tree, first):
    """Return the sum of the entries of one parent, added in order."""
    total = 0.0
    for i in range(FANOUT):
        total += tree[first + i]
    return total


@compile_kernel
def weigh(values, alpha, out):
    """Write values ** alpha to out, (n,) float64 both; 0 ** 0 is 1. Returns -1.

    Returns the number of the first value that is negative, infinite or NaN, if there is one.
    """
    for i in range(values.shape[0]):
        v = values[i]
        if not (v >= 0.0 and v < np.inf):
            return i
        out[i] = v if alpha == 1.0 else v**alpha
    return -1


@compile_kernel
def build_sums(tree, starts):
    """Fill all levels above the weights. Returns the sum of all. O(rows)."""
    for level in range(1, starts.shape[0] - 1):
        below, here = starts[level - 1], starts[level]
        for i in range((here - below) // FANOUT):
            tree[here + i] = _sum_of(tree, below + i * FANOUT)
    return tree[starts[-1] - 1]


@compile_kernel
def set_weights(tree, starts, rows, weights):
    """Give `rows`, (k,) int64, these weights, (k,) float64, and mend the sums above them.

    Returns the sum of all. O(k log rows).
    """
    for j in range(rows.shape[0]):
        tree[rows[j]] = weights[j]
    size = FANOUT
    for level in range(1, starts.shape[0] - 1):
        last = -1
        for j in range(rows.shape[0]):
            i = rows[j] // size
            if i != last:
                tree[starts[level] + i] = _sum_of(tree, starts[level - 1] + i * FANOUT)
                last = i
        size *= FANOUT
    return tree[starts[-1] - 1]


@helper
def _descend(tree, starts, targets, out, n):
    """Write to out[:n] the rows whose parts of the sum of all targets[:n] fall into.

    All go down one level together: so the processor waits for several cache lines at once, not for
    one after the other. targets: float64, overwritten. out: int64.
    """
    for j in range(n):
        out[j] = 0
    for level in range(starts.shape[0] - 3, -1, -1):
        for j in range(n):
            first, target = starts[level] + out[j] * FANOUT, targets[j]
            total, before, passed = 0.0, 0.0, 0
            for i in range(FANOUT):  # without a branch, which would be guessed wrong half the time
                total += tree[first + i]
                over = total <= target
                passed += over
                before = total if over else before
            if passed == FANOUT:  # by rounding: the last entry above 0 takes what is left over
                passed -= 1
                while passed > 0 and tree[first + passed] == 0.0:
                    passed -= 1
                before = target
            out[j] = first + passed - starts[level]
            targets[j] = target - before


@compile_kernel
def rows_at(tree, starts, numbers, out):
    """Write the rows whose part of the sum `numbers`, (n,) int64, fall into: to out, (n,) int64.

    Of weights that are 1 or 0 this is the numbers[i]-th row of weight 1.
    """
    _descend(tree, starts, numbers.astype(np.float64), out, numbers.shape[0])


@compile_kernel
def draw_by_weight(tree, starts, k0, k1, seen, counter, replace, out):
    """Draw rows in proportion to their weights into out, (n,) int64; returns how many were found.

    By (k0, k1, seen, counter) and the weights alone. Without replacement rows that came before are
    passed over, which leaves each the chance that it has among the others. After 4 n + 64 numbers
    it ends: fewer rows than n may be found.
    """
    n, total = out.shape[0], tree[starts[-1] - 1]
    base = hash_of_draw(k0, k1, seen, counter)
    slots = 4
    while slots < 4 * n and not replace:
        slots *= 2
    came, targets, rows = np.empty(slots, np.int64), np.empty(n), np.empty(n, np.int64)
    came[:] = -1
    found, number = 0, 0
    while found < n and number < 4 * n + 64:
        m = n - found
        for j in range(m):
            targets[j] = np.float64(scramble(base + np.uint64(number + j) * GOLDEN) >> _11) * _ULP * total
        number += m
        _descend(tree, starts, targets, rows, m)
        for j in range(m):
            if not replace:
                at = find_slot(came, rows[j])
                if came[at] == rows[j]:
                    continue
                came[at] = rows[j]
            out[found] = rows[j]
            found += 1
    return found
