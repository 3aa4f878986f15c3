"""Kernels of scored buffers: which row leaves by its score, with the lowest and highest at hand.

scores: float64 per row. held: int64 per row, stream positions. A row comes before another if its
score is lower, and of equal scores if its position is. `lows` and `highs` are trees of the first
and of the last row: int64, -1 for none, the levels of `heaps.levels` above the rows. Each entry is one
out of 8 rows or entries below. starts: int64, where each of these levels begins and ends.
"""

from __future__ import annotations

import numpy as np

from . import compile_kernel, helper
from .hashing import GOLDEN, key_of, scramble
from .heaps import FANOUT

_11 = np.uint64(11)
_ULP = 2.0**-53
TRIES = 64
LOWEST, PROPORTIONAL, RANDOM = 0, 1, 2
RULES = {"lowest": LOWEST, "proportional": PROPORTIONAL, "random": RANDOM, "oldest": LOWEST}  # of positions


@helper
def _is_first(scores, held, row, other):
    """Whether a row comes before another."""
    return scores[row] < scores[other] or (scores[row] == scores[other] and held[row] < held[other])


@helper
def _wins(scores, held, row, other, high):
    """Whether a row, rather than another, stands for both in one of the trees."""
    return _is_first(scores, held, other, row) if high else _is_first(scores, held, row, other)


@helper
def _winner(scores, held, tree, starts, level, i, size, high):
    """Return the row that entry i of a level is to hold, from what is below; -1 for none."""
    best = np.int64(-1)
    end = size if level == 0 else starts[level] - starts[level - 1]
    for j in range(i * FANOUT, min(end, (i + 1) * FANOUT)):
        row = np.int64(j) if level == 0 else tree[starts[level - 1] + j]
        if row >= 0 and (best < 0 or _wins(scores, held, row, best, high)):
            best = row
    return best


@helper
def _mend(scores, held, tree, starts, row, size, high):
    """Mend a tree after the score of a row has changed. It ends where the row neither stood before,
    nor is to stand now: mostly at once."""
    i = row
    for level in range(starts.shape[0] - 1):
        i //= FANOUT
        at = starts[level] + i
        best = tree[at]
        if best == row:
            tree[at] = _winner(scores, held, tree, starts, level, i, size, high)
        elif best < 0 or _wins(scores, held, row, best, high):
            tree[at] = row
        else:
            return


@compile_kernel
def build_ranks(scores, held, lows, highs, starts, size):
    """Make both trees of the first `size` rows. O(rows)."""
    for level in range(starts.shape[0] - 1):
        for i in range(starts[level + 1] - starts[level]):
            lows[starts[level] + i] = _winner(scores, held, lows, starts, level, i, size, False)
            highs[starts[level] + i] = _winner(scores, held, highs, starts, level, i, size, True)


@compile_kernel
def set_scores(scores, held, lows, highs, starts, size, rows, new):
    """Give `rows`, (k,) int64, the scores `new`, (k,) float64. O(k log rows)."""
    for j in range(rows.shape[0]):
        scores[rows[j]] = new[j]
        if lows.shape[0] > 0:
            _mend(scores, held, lows, starts, rows[j], size, False)
            _mend(scores, held, highs, starts, rows[j], size, True)


@helper
def _fraction(h):
    """Return a uint64 as a number from 0 to below 1."""
    return np.float64(h >> _11) * _ULP


@helper
def _proportional(scores, score, size, among, lowest, highest, base):
    """Return the number below `among` that leaves: a row below `size`, or `size`, the new sample.

    Each leaves in proportion to highest - its score. A number is drawn, and kept with the chance of
    what it has of the most; if none of 64 is kept, one pass over all decides. Halves, as the
    difference of two doubles may be none.
    """
    most = 0.5 * highest - 0.5 * lowest
    for attempt in range(TRIES):
        h = scramble(base + np.uint64(2 * attempt + 1) * GOLDEN)
        r = np.int64(h % np.uint64(among))
        s = score if r == size else scores[r]
        if most == 0.0 or _fraction(scramble(base + np.uint64(2 * attempt + 2) * GOLDEN)) * most < 0.5 * highest - 0.5 * s:
            return r
    total = 0.0
    for r in range(among):
        total += (0.5 * highest - 0.5 * (score if r == size else scores[r])) / most
    target, last = _fraction(scramble(base + np.uint64(2 * TRIES + 1) * GOLDEN)) * total, 0
    for r in range(among):
        w = (0.5 * highest - 0.5 * (score if r == size else scores[r])) / most
        if w > 0.0:
            last = r
            if target < w:
                break
            target -= w
    return last


@compile_kernel
def plan_scored(
    scores, held, lows, highs, starts, size, capacity, evict, reservoir, k0, k1, start, max_rows, new, out
):  # fmt: skip
    """Offer positions start, start + 1, ... of scores `new`, (n,) float64; returns used, size.

    out: (n,) int64, receives the row that sample i takes, or -1. It stops after n samples, or after
    `max_rows` of them took a row. While there is room, samples take rows in order. Then one of the
    rows and the new sample leaves. reservoir: sample number t enters with the chance
    capacity / (t + 1), and if it does, one of the rows leaves.
    """
    taken = 0
    for i in range(new.shape[0]):
        if taken == max_rows:
            return i, size
        position, score = start + i, new[i]
        row = size
        if size < capacity:
            size += 1
        else:
            base = key_of(position, k0, k1)
            among = capacity if reservoir else capacity + 1
            if reservoir:
                t = np.uint64(position & 0xFFFFFFFFFFFF) + np.uint64(1)
                if scramble(base) % t >= np.uint64(capacity):
                    out[i] = -1
                    continue
            if evict == RANDOM:
                row = np.int64(scramble(base + GOLDEN) % np.uint64(among))
            else:
                row, high = lows[starts[-1] - 1], highs[starts[-1] - 1]
                if evict == LOWEST:
                    row = size if not reservoir and score < scores[row] else row
                else:
                    lowest, highest = scores[row], scores[high]
                    if not reservoir:
                        lowest, highest = min(lowest, score), max(highest, score)
                    row = _proportional(scores, score, size, among, lowest, highest, base)
            if row == capacity:
                out[i] = -1
                continue
        out[i], scores[row], held[row] = row, score, position
        taken += 1
        if lows.shape[0] > 0:
            _mend(scores, held, lows, starts, row, size, False)
            _mend(scores, held, highs, starts, row, size, True)
    return new.shape[0], size
