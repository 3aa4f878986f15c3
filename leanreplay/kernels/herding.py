"""Kernels of herding: scores kept up to date in O(n) a step, and a stop wherever rounding could decide."""

from __future__ import annotations

import numpy as np

from . import njit

_G = np.uint64(0x9E3779B97F4A7C15)
_S0 = np.uint64(0xBF58476D1CE4E5B9)
_29 = np.uint64(29)


@njit
def hash_rows(words, out):
    """out[i] (uint64) = a hash of row i of `words`, (n, d) uint64: equal rows have equal hashes."""
    for i in range(words.shape[0]):
        h = _G
        for k in range(words.shape[1]):
            h = (h ^ words[i, k]) * _S0
            h ^= h >> _29
        out[i] = h


@njit
def take(products, dots, alive, twin, row):
    """Choose a row: `dots` gains its products with all, and the next equal row, if there is one, is looked at in its place."""
    alive[row] = 0
    if twin[row] >= 0:
        alive[twin[row]] = 1
    for j in range(dots.shape[0]):
        dots[j] += products[row, j]


@njit
def herd(products, squares, dots, alive, twin, order, done, count, slack):
    """Choose rows greedily until `count` are chosen, or until rounding could decide which is the next.

    The rows w have mean 0: in step k the next is that of the smallest |k 0 - S - w|^2 = |S|^2 + |w|^2 + 2 w . S, S the sum of those
    chosen. squares: |w|^2; dots: w . S, updated; both (n,) float64. products: (n, n), of all rows with all. alive: (n,) uint8, 1
    for rows not chosen, of equal ones the first alone; twin: (n,) int64, the next equal row or -1. order: int64, receives the
    choice. slack: how far rounding may take a score, for each step done. Returns how many are chosen, and whether the next is in doubt.
    """
    for k in range(done, count):
        best, least, second = -1, np.inf, np.inf
        for j in range(squares.shape[0]):
            if alive[j] == 1:
                score = squares[j] + 2.0 * dots[j]
                if score < least:
                    best, least, second = j, score, least
                elif score < second:
                    second = score
        if second - least <= 2.0 * slack * (k + 1.0):
            return k, True
        order[k] = best
        take(products, dots, alive, twin, best)
    return count, False
