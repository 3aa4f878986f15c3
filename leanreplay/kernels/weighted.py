"""Kernels of the weighted reservoir: keys of samples by weight, and the best of them.

After Efraimidis and Spirakis (2006): with v uniform in (0, 1), E = -log1p(-v) / w is exponential of
rate w. The samples of the smallest E are a weighted sample without replacement. The key is E as a
uint64 of 12 bits of exponent and 52 of mantissa: a double could not hold E for all weights that it
can hold. Its order is reversed, so that the largest keys stay, as in all reservoirs.
"""

from __future__ import annotations

import math

import numpy as np

from . import compile_kernel, helper
from .hashing import key_of
from .heaps import is_worse, sift_down, sift_up

_12 = np.uint64(12)
_52 = np.uint64(52)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_MANTISSA = np.uint64(0xFFFFFFFFFFFFF)
_BIAS = 2048
_LN2 = math.log(2.0)
_ULP = 2.0**-53


@helper
def uniform_of(position, k0, k1):
    """Return v, the middle of one of 2**52 parts of (0, 1): v and 1 - v are exact, and never 0."""
    h = key_of(position, k0, k1)
    return (2.0 * np.float64(h >> _12) + 1.0) * _ULP


@helper
def exponential_of(v):
    """Return -log1p(-v) within 3 units in the last place.

    It only adds, multiplies and divides, which gives the same bits everywhere. Logarithms of C
    libraries do not, and what a buffer holds would depend on the machine.
    1 - v = m 2**e with m about 1, and log m = 2 atanh((m - 1) / (m + 1)).
    """
    m, e = math.frexp(1.0 - v)
    if m < 0.7071067811865476:
        m *= 2.0
        e -= 1
    s = (m - 1.0) / (m + 1.0)
    t = s * s
    y = 1.0 / 23.0
    for k in (21.0, 19.0, 17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0):
        y = y * t + 1.0 / k
    return -(np.float64(e) * _LN2 + 2.0 * s * y)


@helper
def _key(v, weight):
    """Return the key: larger is better. weight: finite and above 0, denormal or huge."""
    m, e = math.frexp(exponential_of(v))
    n, f = math.frexp(weight)
    q, g = math.frexp(m / n)
    exponent = np.int64(e) - np.int64(f) + np.int64(g) + _BIAS
    return (np.uint64(exponent) << _52 | np.uint64((2.0 * q - 1.0) / (2.0 * _ULP))) ^ _ALL


@helper
def _bound(key):
    """Return a bit more than the E of a key, as a double; inf where that would not be exact."""
    k = key ^ _ALL
    exponent = np.int64(k >> _52) - _BIAS
    if exponent < -900 or exponent > 900:
        return np.inf
    return (1.0 + np.float64(k & _MANTISSA) * (2.0 * _ULP)) * math.pow(2.0, np.float64(exponent - 1)) * 1.000000001


@compile_kernel
def weighted_keys(positions, weights, k0, k1, out):
    """Write keys of positions (int64) to out (uint64). False if a weight is not above 0."""
    for i in range(positions.shape[0]):
        w = weights[i]
        if not (w > 0.0 and w < np.inf):
            return False
        out[i] = _key(uniform_of(positions[i], k0, k1), w)
    return True


@compile_kernel
def build_weighted_heap(positions, weights, k0, k1, keys, held, rows):
    """Make the heap of all live rows (position >= 0), the worst on top; returns its size. O(rows).

    keys: uint64, held: int64, positions, rows: int64. Of equal keys, which are rare, the younger is
    worse. Returns -1 if a weight is not finite and above 0.
    """
    size = 0
    for r in range(positions.shape[0]):
        if positions[r] >= 0:
            w = weights[r]
            if not (w > 0.0 and w < np.inf):
                return -1
            keys[size] = _key(uniform_of(positions[r], k0, k1), w)
            held[size], rows[size] = positions[r], r
            size += 1
    for i in range(size // 2 - 1, -1, -1):
        sift_down(keys, held, rows, size, i, keys[i], held[i], rows[i])
    return size


@compile_kernel
def plan_weighted(keys, held, rows, size, limit, k0, k1, start, max_rows, weights, out):
    """Offer positions start, start + 1, ... of `weights`, (n,) float64, to the heap.

    out: (n,) int64, receives the row that sample i takes, or -1. It stops after n samples, or after
    `max_rows` of them took a row. Rows are filled in order up to `limit`. Then a better sample
    replaces the worst. Weight 0 is passed over. Returns the samples used, the size, and whether a
    sample of a weight above 0 was rejected or dropped.
    """
    taken = 0
    dropped = False
    bound = _bound(keys[0]) if size >= limit and size > 0 else np.inf
    for i in range(out.shape[0]):
        if taken == max_rows:
            return i, size, dropped
        out[i] = -1
        w = weights[i]
        if not w > 0.0:
            continue
        position = start + i
        v = uniform_of(position, k0, k1)
        if size < limit:
            key = _key(v, w)
            sift_up(keys, held, rows, size, key, position, size)
            out[i] = size
            size += 1
            taken += 1
            if size == limit:
                bound = _bound(keys[0])
            continue
        dropped = True
        # E >= v / w, so such a sample is worse: most samples of a long stream need no logarithm.
        if size == 0 or v > w * bound:
            continue
        key = _key(v, w)
        if is_worse(keys[0], held[0], key, position):
            out[i] = rows[0]
            sift_down(keys, held, rows, size, 0, key, position, rows[0])
            taken += 1
            bound = _bound(keys[0])
    return out.shape[0], size, dropped
