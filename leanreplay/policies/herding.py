"""The order of herding, exactly that of its definition: rough scores for all rows, exact ones where
rounding could matter."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ..arrays import Floats, Ints
from ..kernels import herding as kernel

MATRIX_BYTES = 256 << 20  # the most that the products of all pairs of rows may take
STEPS_PER_MATRIX = 8  # all products at once cost as much as n / 8 products of the rows with a vector (measured)
ROUNDING = {np.float32: 2.0**-24, np.float64: 2.0**-53}

Real = npt.NDArray[np.floating]  # of single or double precision


def herd(phi: Floats, top: float, count: int) -> Ints:
    """Return the first `count` of the order. phi: (n, d), n and count at least 1; top: the largest
    absolute value."""
    n, d = phi.shape
    mean = phi.mean(axis=0)
    # Distances do not change when all features are moved. Around their mean features are small, and
    # so are rounding errors.
    squares, marks = np.empty(n), np.empty(n)
    kernel.measure(phi, mean, np.cos(np.arange(d, dtype=np.float64)), squares, marks)
    lengths = np.sqrt(squares)
    left, twin = find_twins(phi, squares, marks)
    order, close = np.empty(count, np.int64), np.empty(n, np.int64)
    dots, total, moved, error = np.zeros(n), np.zeros(d), np.zeros(d), np.zeros(3)
    rows, products, rough = unit_rows(phi, mean, lengths, count, np.float32)
    done, chosen = 0, -1
    while done < count:
        done, doubt = kernel.herd(
            phi, mean, lengths, squares, rows, products, twin, left, dots, total, moved, error, order, done, count, chosen,
            rough, math.sqrt(d) * top, n + n * count // 16, close,
        )  # fmt: skip
        chosen = -1
        if doubt > 0:
            chosen = choose_by_definition(phi, mean, total, done + 1, np.sort(close[:doubt]))
        elif doubt < 0:  # single precision cannot tell too many rows apart
            rows, products, rough = unit_rows(phi, mean, lengths, count, np.float64)
            dots, error[0] = lengths * (rows @ moved), math.sqrt(moved @ moved) * rough
    return order


def unit_rows(phi: Floats, mean: Floats, lengths: Floats, count: int, dtype: type[np.floating]) -> tuple[Real, Real, float]:
    """Return the rows around their mean, of length 1; their products, if these pay; and how far off
    the products may be."""
    n, d = phi.shape
    rows = np.empty((n, d), dtype)
    kernel.make_rows(phi, mean, lengths, rows)
    pays = STEPS_PER_MATRIX * count > n and rows.itemsize * n * n <= MATRIX_BYTES
    return rows, rows @ rows.T if pays else np.empty((0, 0), dtype), 1.01 * (d + 4) * ROUNDING[dtype]


def choose_by_definition(phi: Floats, mean: Floats, total: Floats, k: int, close: Ints) -> int:
    """Return which of these rows is the k-th to choose. total: the sum of those chosen before."""
    return int(close[np.argmin(np.linalg.norm(mean - (phi[close] + total) / k, axis=1))])


def find_twins(phi: Floats, squares: Floats, marks: Floats) -> tuple[Floats, Ints]:
    """Return (squares, but inf for all but the first of equal rows; the next equal row, or -1).

    Of equal rows only the first need be looked at until it is chosen. marks: (n,), the same for
    equal rows; few others share a mark.
    """
    n = phi.shape[0]
    left, twin = squares.copy(), np.full(n, -1, np.int64)
    found, which, times = np.unique(marks, return_inverse=True, return_counts=True)
    if found.shape[0] < n:
        for same in np.split(np.argsort(which, kind="stable"), np.cumsum(times)[:-1]):
            if same.shape[0] > 1 and (phi[same] == phi[same[0]]).all():
                left[same[1:]] = np.inf
                twin[same[:-1]] = same[1:]
    return left, twin
