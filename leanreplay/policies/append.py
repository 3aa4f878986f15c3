"""The policy that keeps everything."""

from __future__ import annotations

import numpy as np

from ..arrays import Ints
from .base import Plan, Policy


class AppendPolicy(Policy):
    """Every sample takes the next row, without end: the policy of `InfiniteBuffer`. `capacity` is the number of rows of one part."""

    no_union = "it keeps everything; read several of them one after the other, for instance with torch's ConcatDataset"

    def load(self, positions: Ints, groups: Ints) -> None:
        self.start_at(positions.shape[0])

    def start_at(self, row: int) -> None:
        """Do what `load` does, without the index: the number of rows in use is all that is needed."""
        self._next = row

    def plan(self, start: int, groups: Ints, max_rows: int) -> Plan:
        n = min(groups.shape[0], max_rows, self.capacity - self._next % self.capacity)
        rows = np.arange(self._next, self._next + n)
        self._next += n
        return Plan(rows)
