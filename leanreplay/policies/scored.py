"""Who leaves by a number per row: the lowest score, one in proportion, the oldest, or any."""

from __future__ import annotations

import numpy as np

from ..arrays import Floats, Ints
from ..errors import CorruptionError
from ..kernels import scored as kernel
from ..kernels.heaps import levels
from ..keys import STREAM_BITS, key_pair
from .base import Parameter, Params, Plan, Policy, check_dense

EVICT = ("lowest", "proportional", "oldest", "random")
ADMIT = ("all", "reservoir")


class ScoredPolicy(Policy):
    """Fills its rows in order. Then, of the rows and the new sample, one leaves.

    evict="lowest": the lowest score, of equal ones the oldest. "proportional": each with a chance
    in proportion to highest score - its score; if all are equal, any. "oldest": the oldest.
    "random": any. admit="reservoir": sample number t (from 0) enters with chance capacity / (t + 1)
    only, and one of the rows leaves (Buzzega et al., ICPR 2020).

    `groups` of `load` and `plan` are the bits of the scores, float64, all finite. 18.3 bytes a row.
    """

    parameters = (
        Parameter("evict", "lowest", EVICT.__contains__),
        Parameter("admit", "all", ADMIT.__contains__),
    )
    no_union = "which samples leave follows from scores at the time, which are gone"

    def __init__(self, capacity: int, seed: int, params: Params) -> None:
        super().__init__(capacity, seed, params)
        self._evict, self._reservoir = params.get("evict") or "lowest", params.get("admit") == "reservoir"
        self._rule = kernel.RULES[self._evict]
        self._k0, self._k1 = key_pair("scored eviction", seed)
        self._size = 0

    def load(self, positions: Ints, groups: Ints) -> None:
        ranked = self._evict != "random"
        self._size = n = positions.shape[0]
        self._scores: Floats = np.empty(self.capacity)
        self._held: Ints = np.empty(self.capacity, np.int64)
        starts = levels(self.capacity)[1:]
        self._starts = starts - starts[0]
        self._lows, self._highs = np.full((2, self._starts[-1] if ranked else 0), -1, np.int64)
        check_dense(int(np.count_nonzero(positions >= 0)), positions)
        if not np.isfinite(groups.view(np.float64)).all():
            raise CorruptionError("scores that are not finite, which no scored buffer holds; restore the file from a copy")
        self._scores[:n], self._held[:n] = self._ranks(positions, groups), positions
        if ranked:
            kernel.build_ranks(self._scores, self._held, self._lows, self._highs, self._starts, n)

    def _ranks(self, positions: Ints, groups: Ints) -> Floats:
        """Return what the kernels take for scores. The oldest is the lowest position."""
        if self._evict == "oldest":
            return (positions & (2**STREAM_BITS - 1)).astype(np.float64)
        return groups.view(np.float64)

    def plan(self, start: int, groups: Ints, max_rows: int) -> Plan:
        n = groups.shape[0]
        rows = np.empty(n, np.int64)
        scores = self._ranks(np.arange(start, start + n) if self._evict == "oldest" else rows, groups)
        used, self._size = kernel.plan_scored(
            self._scores, self._held, self._lows, self._highs, self._starts, self._size, self.capacity, self._rule, self._reservoir,
            self._k0, self._k1, start, max_rows, scores, rows,
        )  # fmt: skip
        return Plan(rows[:used])

    def retag(self, rows: Ints, groups: Ints) -> None:
        if self._evict != "oldest":
            kernel.set_scores(
                self._scores, self._held, self._lows, self._highs, self._starts, self._size, rows, groups.view(np.float64)
            )  # fmt: skip

    def keep(self, capacity: int, positions: Ints, groups: Ints) -> Ints:
        """The highest scores, of equal ones the youngest; with "oldest" the youngest."""
        return np.sort(np.lexsort((positions, self._ranks(positions, groups)))[-capacity:])
