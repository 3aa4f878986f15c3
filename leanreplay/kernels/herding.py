"""Kernels of herding: hashes of rows, to find equal ones, and the greedy steps, which stop where rounding could decide."""

from __future__ import annotations

import numpy as np

from . import njit

_SIGN = np.uint64(0x8000000000000000)
_ZERO = np.uint64(0)
_32 = np.uint64(32)


@njit(cache=True, nogil=True, error_model="numpy")
def hash_rows(words, factors, out):
    """out[i] = a hash of row i, the same for equal rows. words: (n, d) float64 seen as uint64; factors: (d,), out: (n,) uint64.

    A sum of products, so that the loop needs no order. 0.0 and -0.0 count as equal; the high half of a word is mixed into the low one,
    because in small integers only a few high bits differ.
    """
    for i in range(words.shape[0]):
        h = _ZERO
        for j in range(words.shape[1]):
            w = words[i, j]
            if w == _SIGN:
                w = _ZERO
            h += (w ^ (w >> _32)) * factors[j]
        out[i] = h


@njit(cache=True, nogil=True, error_model="numpy")
def herd(products, last, step, stop, weight, drift, lengths, total, mean_length, terms, unit, scores, head, follow, order):
    """Greedy steps `step` to `stop` (exclusive) over u distinct rows; returns (steps done, last row chosen, total of their lengths).

    products: (u, u) of all rows, or (1, u) those with the row chosen last, `last` being 0 then. drift: (u,) `weight` times the products
    with the mean. scores: (u,) float64, at first `weight` times the squared lengths; becomes `weight` times (|x|^2 - 2 r x), r being
    k * mean - sum of chosen: the order of |r - x|. head: (u,) the lowest index of the samples equal to row u that are not chosen yet,
    else -1; follow: (n,) the next index of an equal sample, else -1. order: (n,) int64, the indices chosen.

    unit: 0 if nothing here is ever rounded, else 2**-53: scores are then known within lengths * (a + b * lengths), and a step where that
    does not decide is left to the caller: returns with fewer steps done, the scores being those of the step that is left.
    terms: d + u, what a product of rows and the mean add up.
    """
    while step < stop:
        k = step + 1
        a = unit * (2.0 * k * mean_length * (terms + 4 + 2 * k) + 2.0 * total * (terms + 3 + 2 * k))
        b = unit * (terms + 4 + 2 * k)
        if step == 0:
            for u in range(scores.shape[0]):
                scores[u] -= 2.0 * drift[u]
        else:
            for u in range(scores.shape[0]):
                scores[u] += 2.0 * (weight * products[last, u] - drift[u])
        best = np.inf
        for u in range(scores.shape[0]):
            best = min(best, scores[u] + lengths[u] * (a + b * lengths[u]))
        found = 0
        pick = -1
        for u in range(scores.shape[0]):
            if scores[u] - lengths[u] * (a + b * lengths[u]) <= best:
                found += 1
                if pick < 0 or head[u] < head[pick]:
                    pick = u
        if found != 1 and unit > 0.0:
            return step, last, total
        order[step] = head[pick]
        head[pick] = follow[head[pick]]
        if head[pick] < 0:
            scores[pick] = np.inf  # stays so: no step chooses it any more
        total += lengths[pick]
        last = pick
        step += 1
    return step, last, total
