"""Kernels of herding: rough scores for all rows, exact ones for the few that could be next."""

from __future__ import annotations

import numpy as np

from . import compile_kernel, helper, reordered

# Lanes of rows have a least score each: their minima run in vector registers, one of all does not.
_LANES = 64
_TINY = 2.0**-53  # rounding of float64
_LOOKS = 8  # an exact score costs as much as this many rough ones (measured)


@reordered
def _dot(a, b):
    """Return the product of two vectors of one dtype."""
    total = a.dtype.type(0)
    for c in range(a.shape[0]):
        total += a[c] * b[c]
    return total


@reordered
def _dot_moved(row, mean, vector):
    """Return (row - mean) . vector."""
    total = 0.0
    for c in range(row.shape[0]):
        total += (row[c] - mean[c]) * vector[c]
    return total


@reordered
def _square_moved(row, mean):
    """Return |row - mean|^2."""
    total = 0.0
    for c in range(row.shape[0]):
        total += (row[c] - mean[c]) ** 2
    return total


@compile_kernel
def measure(phi, mean, direction, squares, marks):
    """Measure each row w of phi - mean in one pass: squares[i] = |w|^2, marks[i] = w . direction.

    phi: (n, d), mean, direction: (d,), squares, marks: (n,) float64. Equal rows have equal marks.
    """
    for i in range(phi.shape[0]):
        squares[i] = _square_moved(phi[i], mean)
        marks[i] = _dot_moved(phi[i], mean, direction)


@compile_kernel
def make_rows(phi, mean, lengths, rows):
    """Write (phi - mean) / lengths to rows, (n, d) float32 or float64: of length 1, or 0."""
    for i in range(phi.shape[0]):
        row, out, length = phi[i], rows[i], lengths[i]
        for c in range(row.shape[0]):
            out[c] = (row[c] - mean[c]) / length if length > 0.0 else 0.0


@helper
def _bounds(left, dots, margins, share, lanes):
    """Return the most that the least score may be; lanes[l]: the least that it may be in lane l.

    The score of row i is left[i] + 2 dots[i], off by up to share * margins[i]. Lane l holds rows l,
    l + _LANES, ...
    """
    n = left.shape[0]
    most = np.empty(_LANES)
    for lane in range(_LANES):
        most[lane] = lanes[lane] = np.inf
    for start in range(0, n - n % _LANES, _LANES):
        for lane in range(_LANES):
            score, margin = left[start + lane] + 2.0 * dots[start + lane], share * margins[start + lane]
            lanes[lane] = score - margin if score - margin < lanes[lane] else lanes[lane]
            most[lane] = score + margin if score + margin < most[lane] else most[lane]
    for i in range(n - n % _LANES, n):
        score, margin = left[i] + 2.0 * dots[i], share * margins[i]
        lanes[i % _LANES] = min(lanes[i % _LANES], score - margin)
        most[i % _LANES] = min(most[i % _LANES], score + margin)
    least = np.inf
    for lane in range(_LANES):
        least = min(least, most[lane])
    return least


@compile_kernel
def herd(
    phi, mean, lengths, squares, rows, products, twin, left, dots, total, moved, error, order, done, count, chosen,
    rough, far, allowed, close,
):  # fmt: skip
    """Choose rows greedily until `count` are chosen, or until only the definition in float64 can.

    phi: (n, d) float64. w stands for phi - mean, S for the sum of w of those chosen. The next is
    the row of the smallest |S + w|^2 = |S|^2 + |w|^2 + 2 w . S.
    lengths, squares: (n,) float64, |w|, |w|^2. rows: (n, d), w / |w|, float32 or float64. products:
    rows @ rows.T, or (0, 0). twin: (n,) int64, the next equal row or -1. order: (count,) int64,
    receives the choice.

    Kept from call to call, begun with zeros, float64: left, (n,), |w|^2 of the rows to look at, inf
    for those chosen and for all but the first of equal rows. dots: (n,), w . S, roughly. total,
    moved: (d,), sums of phi and w of those chosen. error: (3,), how far off dots may be for each
    unit of |w|, how many exact products were made since dots were made anew, and how many in all.
    done: how many are chosen. chosen: the next, or -1 to look for it.

    rough: how far off the product of two of `rows` may be. far: at least the greatest |phi|.
    allowed: how many exact products may be made in all. close: (n,) int64, receives the rows in
    question. Returns how many are chosen and how many are in question. The latter is -1 if it would
    take more exact products: then `rows` are to come in float64.
    """
    n, d = phi.shape
    lanes, exact, direction = np.empty(_LANES), np.empty(n), np.empty(d, rows.dtype)
    radius = lengths.max()
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
                gained, length = products[chosen], lengths[chosen]
                for j in range(n):
                    dots[j] += length * lengths[j] * np.float64(gained[j])
                error[0] += length * rough
            else:  # by one pass over the rows, which is as right as S is short
                length = np.sqrt(_dot(moved, moved))
                for c in range(d):
                    direction[c] = moved[c] / length if length > 0.0 else 0.0
                for j in range(n):
                    if left[j] < np.inf:
                        dots[j] = length * lengths[j] * np.float64(_dot(rows[j], direction))
                error[0], error[1] = length * rough, 0.0
        # How far rounding in float64 may take the score made here, that of the definition, which
        # divides S by k, and S itself.
        reach, step = radius + np.sqrt(_dot(moved, moved)), k + 1.0
        slack = _TINY * (4.0 * (d + 8.0 + step) * reach * reach + 12.0 * step * far * reach + 2.0 * step * step * far * radius)
        share = 2.0 * error[0]
        within = _bounds(left, dots, lengths, share, lanes) + 2.0 * slack
        found = 0
        for lane in range(_LANES):
            if lanes[lane] <= within:
                for j in range(lane, n, _LANES):
                    if left[j] + 2.0 * dots[j] - share * lengths[j] <= within:
                        close[found] = j
                        found += 1
        if found > 1 and rows.itemsize == 4:
            if error[2] + found > allowed:
                return k, -1
            error[1] += found
            error[2] += found
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
