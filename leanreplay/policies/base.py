"""Policies: which row, if any, each incoming sample takes. They see positions and groups, never the samples.

A policy is a deterministic function of (seed, stream): what it plans must not depend on how the stream is cut into batches, and
`load` must bring it to the same state from the index alone, because that is all a killed process leaves behind.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..arrays import NO_LOG, NO_ROWS, POLICY_WORDS, Ints
from ..errors import CorruptionError
from ..kernels import balance, reservoir
from ..keys import key_pair


class Policy:
    """Base class of policies. Override `load` and `plan`, and `keep` if the buffer is to be resized.

    capacity: rows of the buffer. seed: the buffer's seed. state: 8 non-negative ints that are committed with every plan and handed
    back by `load`, for what cannot be derived from the index. needs_groups: whether `plan` looks at the groups.
    One whose state grows keeps a log: `log`, (entries, 2) int64, is there when `load` is called, and `plan` sets `new_log`, the
    entries to append; `slots` says how many the file has room for. One with a log, be it of one slot, may give rows up: `plan` sets
    `freed`, (n,) int64, rows that are live now and free afterwards. It also has scratch: int32 per row, all 0, for `plan` to use and
    to leave so, there when `load` is called.

    A policy that keeps the first `capacity` samples and rejects all others:

    >>> class First(Policy):
    ...     def load(self, positions, groups):
    ...         self.size = len(positions)
    ...     def plan(self, start, groups, rows, most):
    ...         n = min(len(rows), most)
    ...         for i in range(n):
    ...             rows[i] = self.size if self.size < self.capacity else -1
    ...             self.size += rows[i] >= 0
    ...         return n
    """

    needs_groups: ClassVar[bool] = False

    def __init__(self, capacity: int, seed: int, params: dict[str, Any]) -> None:
        self.capacity, self.seed, self.params = capacity, seed, params
        self.state: list[int] = [0] * POLICY_WORDS
        self.log: Ints = NO_LOG
        self.slots = 0
        self.new_log: Ints = NO_LOG
        self.freed: Ints = NO_ROWS
        self.scratch: npt.NDArray[np.int32] = np.zeros(0, np.int32)

    @staticmethod
    def log_slots(capacity: int) -> int:
        """How many entries of a log a new file of this capacity has room for; 0 for a policy without one."""
        return 0

    def check_groups(self, groups: Ints) -> None:
        """Raise ArgumentError if a batch of these groups must be refused as a whole. Called before its first plan."""

    def load(self, positions: Ints, groups: Ints) -> None:
        """Derive what `plan` needs from the index: (rows in use so far,) int64 each, position -1 where a row is free.

        Called before the first plan, and again after anything that interrupted a commit. Keep no reference to the arrays.
        """
        raise NotImplementedError

    def plan(self, start: int, groups: Ints, rows: Ints, most: int) -> int:
        """Say where samples start, start + 1, ... go: rows[i] is a row, or -1 to reject the sample. Returns how many are planned.

        At least one, and so many that no more than `most` rows are taken. Two samples may take the same row: the later stays.
        0 asks for a longer log: the file is rewritten with one, and `plan` called again.
        """
        raise NotImplementedError

    def keep(self, capacity: int, positions: Ints, groups: Ints) -> Ints:
        """For `resize`: the rows to keep, at most `capacity`, in the order that they get their new rows in. Updates `state`."""
        raise NotImplementedError(f"{type(self).__name__} cannot be resized: its policy does not say which rows to keep")

    def room(self, capacity: int) -> int:
        """How many rows a buffer of this capacity could come to hold in the present state."""
        return capacity

    def capacity_warning(self, capacity: int) -> str | None:
        """What the user who resizes to this capacity should know of the capacity rule; None if it changes nothing."""
        room = self.room(capacity)
        if room >= capacity:
            return None
        return (
            f"this buffer has already dropped samples at {room} rows and will hold no more than that, because a larger sample would no "
            "longer be uniform; start a new buffer to use more rows"
        )


def check_dense(live: int, positions: Ints) -> None:
    """Raise CorruptionError for free rows among those in use: a reservoir fills rows in order, and would take one that is live."""
    if live != positions.shape[0]:
        raise CorruptionError(
            f"{positions.shape[0] - live} free rows among those in use, which no reservoir leaves; restore the file from a copy"
        )


class ReservoirPolicy(Policy):
    """The `capacity` samples of the largest keys: a uniform sample without replacement of the stream (Vitter's problem, 1985).

    state[0] is the capacity rule's bound: 0, or the most rows that may ever be held again, because others were dropped at that size.
    24 bytes per row; a heap of the keys gives the row to replace.
    """

    def __init__(self, capacity: int, seed: int, params: dict[str, Any]) -> None:
        super().__init__(capacity, seed, params)
        self._k0, self._k1 = key_pair("reservoir", seed)
        self._keys = np.zeros(0, np.uint64)
        self._rows: Ints = np.zeros(0, np.int64)
        self._size = 0

    def load(self, positions: Ints, groups: Ints) -> None:
        if not self._keys.shape[0]:
            self._keys, self._rows = np.empty(self.capacity, np.uint64), np.empty(self.capacity, np.int64)
        if not positions.shape[0]:
            self._size = 0
            return
        self._size = reservoir.build_heap(positions, self._k0, self._k1, self._keys, self._rows)
        check_dense(self._size, positions)

    def room(self, capacity: int) -> int:
        return min(capacity, self.state[0] or capacity)

    def plan(self, start: int, groups: Ints, rows: Ints, most: int) -> int:
        limit = self.room(self.capacity)
        full_from = limit - self._size
        used, self._size = reservoir.plan_reservoir(self._keys, self._rows, self._size, limit, self._k0, self._k1, start, most, rows)
        if used > full_from:
            self.state[0] = limit
        return int(used)

    def keep(self, capacity: int, positions: Ints, groups: Ints) -> Ints:
        if positions.shape[0] <= capacity:
            return np.arange(positions.shape[0])
        keys = np.empty(positions.shape[0], np.uint64)
        reservoir.position_keys(positions, self._k0, self._k1, keys)
        self.state[0] = capacity
        return np.sort(np.argpartition(keys, -capacity)[-capacity:])


class SlidingWindowPolicy(Policy):
    """The last `capacity` samples, as a ring."""

    def load(self, positions: Ints, groups: Ints) -> None:
        n = positions.shape[0]
        self._next = int(np.argmin(positions)) if n == self.capacity else n

    def plan(self, start: int, groups: Ints, rows: Ints, most: int) -> int:
        n = min(rows.shape[0], most) if most < self.capacity else rows.shape[0]
        rows[:n] = (self._next + np.arange(n)) % self.capacity
        self._next = (self._next + n) % self.capacity
        return n

    def keep(self, capacity: int, positions: Ints, groups: Ints) -> Ints:
        return np.argsort(positions)[-capacity:]


class GreedyClassBalancingPolicy(Policy):
    """Every sample enters; once full, a random member of the largest class leaves (the greedy sampler of GDumb, Prabhu et al. 2020).

    Ties between largest classes are broken at random. Costs O(classes) a sample; 8 bytes per row.
    """

    needs_groups = True

    def __init__(self, capacity: int, seed: int, params: dict[str, Any]) -> None:
        super().__init__(capacity, seed, params)
        self._k0, self._k1 = key_pair("greedy", seed)

    def load(self, positions: Ints, groups: Ints) -> None:
        self._row_labels = np.zeros(self.capacity, np.int64)
        self._size = groups.shape[0]
        self._row_labels[: self._size] = groups
        self._labels, self._counts = np.unique(groups, return_counts=True)

    def plan(self, start: int, groups: Ints, rows: Ints, most: int) -> int:
        n = min(rows.shape[0], most) if most < self.capacity else rows.shape[0]
        at = np.minimum(np.searchsorted(self._labels, groups[:n]), max(0, self._labels.shape[0] - 1))
        if not self._labels.shape[0] or (self._labels[at] != groups[:n]).any():
            labels = np.union1d(self._labels, groups[:n])
            counts = np.zeros(labels.shape[0], np.int64)
            counts[np.searchsorted(labels, self._labels)] = self._counts
            self._labels, self._counts = labels, counts
        self._size = balance.plan_greedy(
            self._row_labels, self._size, self.capacity, self._labels, self._counts, self._k0, self._k1, start, groups[:n], rows[:n]
        )  # fmt: skip
        return n

    def keep(self, capacity: int, positions: Ints, groups: Ints) -> Ints:
        """Evict as `plan` does, once for each row too many."""
        rows, row_labels = np.arange(groups.shape[0]), groups.copy()
        labels, counts = np.unique(groups, return_counts=True)
        k0, _ = key_pair(f"greedy resize to {capacity}", self.seed)
        newest = np.uint64(positions.max() if positions.shape[0] else 0)
        for size in range(rows.shape[0], capacity, -1):
            base = np.uint64((int(k0) ^ int(newest) * 2**20 + size) % 2**64)
            c = balance.largest_class(labels, counts, base)
            r = balance.random_member(row_labels, size, labels[c], base)
            rows[r], row_labels[r] = rows[size - 1], row_labels[size - 1]
            counts[c] -= 1
        return np.sort(rows[:capacity])


class AppendPolicy(Policy):
    """Every sample takes the next row, without end: the policy of `InfiniteBuffer`. `capacity` is that of one part."""

    def load(self, positions: Ints, groups: Ints) -> None:
        self.start_at(positions.shape[0])

    def start_at(self, row: int) -> None:
        """`load` without the index: the number of rows in use is all it needs."""
        self._next = row

    def plan(self, start: int, groups: Ints, rows: Ints, most: int) -> int:
        n = min(rows.shape[0], most, self.capacity - self._next % self.capacity)
        rows[:n] = np.arange(self._next, self._next + n)
        self._next += n
        return n
