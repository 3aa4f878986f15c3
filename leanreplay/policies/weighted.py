"""The weighted reservoir: a sample without replacement with chances in proportion to weights."""

from __future__ import annotations

import numpy as np

from ..arrays import Ints, Words
from ..errors import CorruptionError
from ..kernels import weighted as kernel
from .base import Plan, check_dense
from .reservoir import KeyedPolicy

_WRONG_WEIGHTS = (
    "the index holds weights that are not finite and above 0; buffer.check() lists the wrong rows; restore the file from a copy made "
    "with save()"
)


class WeightedReservoirPolicy(KeyedPolicy):
    """The `capacity` samples of the smallest -log1p(-v) / w, v being uniform in (0, 1) and w the
    weight (Efraimidis and Spirakis 2006).

    Groups are the bits of the weights, float64. A sample of weight 0 is rejected. 24 bytes per row;
    a heap of the keys gives the row to replace.
    """

    purpose = "weighted reservoir"
    needs_groups = True
    no_union = ""

    def load(self, positions: Ints, groups: Ints) -> None:
        self._keys = np.empty(self.capacity, np.uint64)
        self._held, self._rows = np.empty(self.capacity, np.int64), np.empty(self.capacity, np.int64)
        self._size = 0
        if positions.shape[0]:
            weights = groups.view(np.float64)
            self._size = kernel.build_weighted_heap(positions, weights, self._k0, self._k1, self._keys, self._held, self._rows)
            if self._size < 0:
                raise CorruptionError(_WRONG_WEIGHTS)
            check_dense(self._size, positions)

    def plan(self, start: int, groups: Ints, max_rows: int) -> Plan:
        rows = np.empty(groups.shape[0], np.int64)
        limit = self.size_limit(self.capacity)
        used, self._size, dropped = kernel.plan_weighted(
            self._keys, self._held, self._rows, self._size, limit, self._k0, self._k1, start, max_rows, groups.view(np.float64), rows
        )
        if dropped:
            self.state[0] = limit
        return Plan(rows[:used])

    def keys(self, positions: Ints, groups: Ints) -> Words:
        keys = np.empty(positions.shape[0], np.uint64)
        if not kernel.weighted_keys(positions, groups.view(np.float64), self._k0, self._k1, keys):
            raise CorruptionError(_WRONG_WEIGHTS)
        return keys
