"""Statistical laws, as tests that a right implementation passes.

Tests are chi-square tests with the exact covariance of sampling without replacement, turned into a standard normal `z` (Wilson
and Hilferty 1931). Seeds are fixed, so a right implementation gives the same z every time: all are below 3.2 here.
The classic off-by-one (`randint(0, count)` where `count + 1` is needed: the first sample after the buffer is full always
enters) gives z of about 10 at capacity 10 and stream 20 with 2,000 seeds, a draw that forgets a moved entry z > 50.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

LIMIT = 4.5  # of z: 1 in 300,000 for a right implementation with new seeds


def z_score(statistic: float, df: int) -> float:
    """A chi-square statistic as a standard normal."""
    return ((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


def assert_even(counts: Any, note: str = "") -> None:
    """Independent draws over equally likely cells."""
    assert_shares(counts, np.ones(np.asarray(counts).size), note)


def assert_shares(counts: Any, shares: Any, note: str = "") -> None:
    """Independent draws over cells that are likely in proportion to `shares`; cells of share 0 are never hit."""
    counts, shares = np.asarray(counts, float).ravel(), np.asarray(shares, float).ravel()
    assert not counts[shares == 0].any(), f"{note}: counts {counts.astype(int).tolist()[:40]} where none can be"
    counts, shares = counts[shares > 0], shares[shares > 0]
    wanted = counts.sum() * shares / shares.sum()
    assert wanted.min() >= 5, f"too few draws for chi-square: {wanted.min()} a cell"
    z = z_score(((counts - wanted) ** 2 / wanted).sum(), counts.shape[0] - 1)
    assert abs(z) < LIMIT, f"{note}: z={z:.1f}, counts {counts.astype(int).tolist()[:40]}, not {wanted.tolist()[:40]}"


def assert_inclusion(kept: Any, k: int, note: str = "") -> None:
    """kept: (trials, n) bool with k True a row. Each subset of k equally likely, tested on single positions and on pairs.

    With pair counts C, the part that is not the sum of two single effects has the covariance S (p2 - 2 p3 + p4) times a projection
    of n (n - 3) / 2 dimensions, pm being the chance that m given positions are all kept (the eigenspaces of the Johnson scheme).
    """
    kept = np.asarray(kept, float)
    trials, n = kept.shape
    assert (kept.sum(1) == k).all(), f"{note}: {np.unique(kept.sum(1))} kept instead of {k}"
    p = k / n
    singles = kept.sum(0)
    z = z_score(((singles - trials * p) ** 2).sum() * (n - 1) / n / (trials * p * (1 - p)), n - 1)
    assert abs(z) < LIMIT, f"{note}: singles, z={z:.1f}, counts {singles.astype(int).tolist()[:40]}"
    if n <= 3:
        return
    chance = [math.prod((k - j) / (n - j) for j in range(m)) for m in range(5)]
    variance = trials * (chance[2] - 2 * chance[3] + chance[4])
    if variance < 5:  # one kept, or all but one: the pairs say nothing more
        return
    pairs = kept.T @ kept
    np.fill_diagonal(pairs, 0)
    mean = pairs.sum() / (n * (n - 1))
    effect = (pairs.sum(0) - (n - 1) * mean) / (n - 2)
    rest = pairs - mean - effect[:, None] - effect[None, :]
    np.fill_diagonal(rest, 0)
    z = z_score((rest**2).sum() / 2 / variance, n * (n - 3) // 2)
    assert abs(z) < LIMIT, f"{note}: pairs, z={z:.1f}"
