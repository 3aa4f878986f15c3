"""The sliding window: the newest samples."""

from __future__ import annotations

import numpy as np

from ..arrays import Ints
from .base import Plan, Policy


class SlidingWindowPolicy(Policy):
    """The last `capacity` samples, as a ring."""

    no_union = "which samples are the last ones of several streams is not defined"

    def load(self, positions: Ints, groups: Ints) -> None:
        n = positions.shape[0]
        self._next = int(np.argmin(positions)) if n == self.capacity else n

    def plan(self, start: int, groups: Ints, max_rows: int) -> Plan:
        n = groups.shape[0] if max_rows >= self.capacity else min(groups.shape[0], max_rows)
        rows = (self._next + np.arange(n)) % self.capacity
        self._next = (self._next + n) % self.capacity
        return Plan(rows)

    def keep(self, capacity: int, positions: Ints, groups: Ints) -> Ints:
        return np.argsort(positions)[-capacity:]
