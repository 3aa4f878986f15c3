"""The policy that keeps everything."""

from __future__ import annotations

import numpy as np

from ..arrays import Ints
from ..keys import STREAM_BITS
from .base import Parameter, Params, Plan, Policy, optional_int


class AppendPolicy(Policy):
    """Every sample takes the next row, without end: the policy of `InfiniteBuffer`. `capacity` is
    the number of rows of one part."""

    no_union = "it keeps everything; read several of them one after the other, for instance with torch's ConcatDataset"

    parameters = (
        Parameter("rows_per_part", 1 << 16, optional_int(1, 2**40)),
        Parameter("first", None, optional_int(0, 2**STREAM_BITS)),  # row of the buffer that a part begins with
    )

    @classmethod
    def params_problem(cls, params: Params, max_size: int) -> str | None:
        rows, first = params.get("rows_per_part"), params.get("first")
        if rows == max_size and first is not None and first % rows == 0 and first + rows < 2**STREAM_BITS:
            return None
        return f"a part of {rows} rows from {first} on, in a file of {max_size}"

    def load(self, positions: Ints, groups: Ints) -> None:
        self.start_at(positions.shape[0])

    def start_at(self, row: int) -> None:
        """Do what `load` does, without the index: the number of rows in use is all that is
        needed."""
        self._next = row

    def plan(self, start: int, groups: Ints, max_rows: int) -> Plan:
        n = min(groups.shape[0], max_rows, self.capacity - self._next % self.capacity)
        rows = np.arange(self._next, self._next + n)
        self._next += n
        return Plan(rows)
