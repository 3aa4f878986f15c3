"""Reservoirs: the samples of the largest keys; of keys of positions, a uniform sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ..arrays import Ints, Words
from ..kernels import reservoir as kernel
from ..keys import key_pair
from .base import Params, Plan, Policy, check_dense
from .union import Holder, Union, bounded_union


class KeyedPolicy(Policy):
    """The `capacity` samples of the largest keys, and of equal ones the oldest.

    A subclass says what the keys are, and plans by a heap of them. purpose: of `key_pair`. state[0]
    is the capacity rule's bound: 0, or the most rows that may ever be held again, because others
    were dropped at that size.
    """

    purpose: ClassVar[str]

    def __init__(self, capacity: int, seed: int, params: Params) -> None:
        super().__init__(capacity, seed, params)
        self._k0, self._k1 = key_pair(self.purpose, seed)

    def keys(self, positions: Ints, groups: Ints) -> Words:
        """Return the keys of these samples, (n,)."""
        raise NotImplementedError

    def size_limit(self, capacity: int) -> int:
        return min(capacity, self.state[0] or capacity)

    def keep(self, capacity: int, positions: Ints, groups: Ints) -> Ints:
        if positions.shape[0] <= capacity:
            return np.arange(positions.shape[0])
        self.state[0] = capacity
        return np.sort(np.lexsort((positions, ~self.keys(positions, groups)))[:capacity])

    def union(self, holders: Sequence[Holder]) -> Union:
        return bounded_union(holders, self.capacity, self.keys)


class ReservoirPolicy(KeyedPolicy):
    """The `capacity` samples of the largest keys of positions: a uniform sample without replacement
    of the stream (Vitter's problem, 1985).

    24 bytes per row; a heap of the keys gives the row to replace.
    """

    purpose = "reservoir"
    no_union = ""

    def load(self, positions: Ints, groups: Ints) -> None:
        self._keys, self._rows = np.empty(self.capacity, np.uint64), np.empty(self.capacity, np.int64)
        self._size = 0
        if positions.shape[0]:
            self._size = kernel.build_heap(positions, self._k0, self._k1, self._keys, self._rows)
            check_dense(self._size, positions)

    def plan(self, start: int, groups: Ints, max_rows: int) -> Plan:
        rows = np.empty(groups.shape[0], np.int64)
        limit = self.size_limit(self.capacity)
        full_from = limit - self._size
        used, self._size = kernel.plan_reservoir(self._keys, self._rows, self._size, limit, self._k0, self._k1, start, max_rows, rows)
        if used > full_from:
            self.state[0] = limit
        return Plan(rows[:used])

    def keys(self, positions: Ints, groups: Ints) -> Words:
        keys = np.empty(positions.shape[0], np.uint64)
        kernel.position_keys(positions, self._k0, self._k1, keys)
        return keys
