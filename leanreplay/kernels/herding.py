"""Kernels of herding: rough scores in single precision for all rows, exact ones for the few that could be the next."""

from __future__ import annotations

import numpy as np

from . import njit, reordered

_LANES = 64  # the least score of every 64th row is kept: a minimum lane by lane runs in vector registers, one over all does not
_TINY = 2.0**-53  # rounding of float64
_LOOKS = 8  # an exact score costs as much as this many rough ones (measured)


@reordered
def _dot(a, b):
    """The product of two vectors of one dtype."""
    total = a.dtype.type(0)
    for c in range(a.shape[0]):
        total += a[c] * b[c]
    return total


@reordered
def _dot_moved(row, mean, vector):
    """(row - mean) . vector."""
    total = 0.0
    for c in range(row.shape[0]):
        total += (row[c] - mean[c]) * vector[c]
    return total


@reordered
def _square_moved(row, mean):
    """|row - mean|^2."""
    total = 0.0
    for c in range(row.shape[0]):
        total += (row[c] - mean[c]) ** 2
    return total


@njit
def measure(phi, mean, direction, squares, marks):
    """For each row, in one pass: squares[i] = |phi[i] - mean|^2, and marks[i] = phi[i] . direction, of which equal rows have equal ones."""
    for i in range(phi.shape[0]):
        squares[i] = _square_moved(phi[i], mean)
        marks[i] = _dot(phi[i], direction)


@njit
def make_single(phi, mean, unit, single):
    """single (float32) = (phi - mean) / unit."""
    for i in range(phi.shape[0]):
        row, out = phi[i], single[i]
        for c in range(row.shape[0]):
            out[c] = (row[c] - mean[c]) / unit


@njit
def _least(left, dots, lanes):
    """The least of the scores left[i] + 2 dots[i]; lanes[l] becomes that of rows l, l + _LANES, ..."""
    n = left.shape[0]
    for lane in range(_LANES):
        lanes[lane] = np.inf
    for start in range(0, n - n % _LANES, _LANES):
        for lane in range(_LANES):
            score = left[start + lane] + 2.0 * dots[start + lane]
            lanes[lane] = score if score < lanes[lane] else lanes[lane]
    for i in range(n - n % _LANES, n):
        lanes[i % _LANES] = min(lanes[i % _LANES], left[i] + 2.0 * dots[i])
    least = np.inf
    for lane in range(_LANES):
        least = min(least, lanes[lane])
    return least


@njit
def herd(
    phi, mean, single, products, squares, twin, left, dots, total, moved, error, order, done, count, chosen, unit, rough, radius, far, close
):
    """Choose rows greedily until `count` are chosen, or until the definition in float64 has to say which is the next.

    phi: (n, d) float64. With w for phi - mean, the next in step k is that of the smallest |k 0 - S - w|^2 = |S|^2 + |w|^2 + 2 w . S, S the
    sum of those chosen. single: w / unit in float32, no row longer than 1. products: single @ single.T, or (0, 0). squares: |w|^2.
    twin: (n,) int64, the next equal row or -1. order: (count,) int64, receives the choice.

    Kept from call to call, begun with zeros: left, |w|^2 of the rows to look at, inf for those chosen and for all but the first of equal
    rows; dots: w . S, roughly; total, moved: sums of phi and w of those chosen; error: (2,), how far off dots may be, and how many
    exact products were made since they were made anew. done: how many are chosen; chosen: the next, or -1 to look for it.

    rough: how far off the product of two rows of `single` may be; radius: the greatest |w|; far: at least that of phi. close: (n,) int64,
    receives the rows that are in question. Returns how many are chosen and how many are in question.
    """
    n, d = phi.shape
    lanes, exact, direction = np.empty(_LANES), np.empty(n), np.empty(d, np.float32)
    square = unit * unit
    k = done
    while True:
        if chosen >= 0:
            order[k] = chosen
            k += 1
            left[chosen] = np.inf
            if twin[chosen] >= 0:
                left[twin[chosen]], dots[twin[chosen]] = squares[twin[chosen]], dots[chosen]
            row = phi[chosen]
            for c in range(d):
                moved[c] += row[c] - mean[c]
                total[c] += row[c]
            if k == count:
                return k, 0
            if products.shape[0] > 0 and _LOOKS * error[1] < n:
                gained = products[chosen]
                for j in range(n):
                    dots[j] += square * np.float64(gained[j])
                error[0] += square * rough
            else:  # by one pass over the rows, which is as right as S is short
                length = np.sqrt(_dot(moved, moved))
                for c in range(d):
                    direction[c] = moved[c] / length if length > 0.0 else 0.0
                for j in range(n):
                    if left[j] < np.inf:
                        dots[j] = unit * length * _dot(single[j], direction)
                error[0], error[1] = unit * length * rough, 0.0
        # How far rounding in float64 may take a score: the one made here; that of the definition, which divides S by k; S itself.
        reach, step = radius + np.sqrt(_dot(moved, moved)), k + 1.0
        slack = _TINY * (4.0 * (d + 8.0 + step) * reach * reach + 12.0 * step * far * reach + 2.0 * step * step * far * radius)
        within = _least(left, dots, lanes) + 4.0 * error[0] + 2.0 * slack
        found = 0
        for lane in range(_LANES):
            if lanes[lane] <= within:
                for j in range(lane, n, _LANES):
                    if left[j] + 2.0 * dots[j] <= within:
                        close[found] = j
                        found += 1
        if found > 1:
            error[1] += found
            least = np.inf
            for i in range(found):
                exact[i] = squares[close[i]] + 2.0 * _dot_moved(phi[close[i]], mean, moved)
                least = min(least, exact[i])
            within, among, found = least + 2.0 * slack, found, 0
            for i in range(among):
                if exact[i] <= within:
                    close[found] = close[i]
                    found += 1
            if found > 1:
                return k, found
        chosen = close[0]
