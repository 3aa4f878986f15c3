"""Rows shared evenly over groups: one reservoir of the largest keys per group, with quotas.

Groups are classes, experiences, or whatever the samples are grouped by. All groups live in the same rows; a new group shrinks the
quotas of the others. The file's log holds what the index does not tell: groups that hold no row, and groups that may not grow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import NO_LOG, NO_ROWS, Ints
from ..errors import ArgumentError, CorruptionError
from ..kernels import balanced as kernel
from ..keys import key_pair
from .base import LOG_TOO_SHORT, Plan, Policy

_TOTALS = ("total_num_classes", "num_experiences", "total_num_groups")
_MOST_ROWS = 2**31 - 2  # links between rows are int32


def group_hash(ids: Any, seed: int) -> npt.NDArray[np.uint64]:
    """Hash of each group id, (n,): the groups of the smallest hashes get the remainder of the rows."""
    groups = np.asarray(ids, np.int64).reshape(-1)
    out = np.empty(groups.shape[0], np.uint64)
    kernel.hash_groups(groups, *key_pair("group", seed), out)
    return out


def group_quotas(max_size: int, hashes: npt.NDArray[np.uint64]) -> Ints:
    """Rows for each of n groups: max_size // n, and one more for the max_size % n groups of the smallest hashes."""
    n = hashes.shape[0]
    quotas = np.full(n, max_size // max(n, 1), np.int64)
    quotas[np.argsort(hashes)[: max_size % max(n, 1)]] += 1
    return quotas


def groups_in(log: Ints) -> tuple[Ints, Ints]:
    """Ids of the groups in a log, in order of appearance, and numbers of those that are full. CorruptionError for what is no log."""
    known, full = log[log[:, 0] == 0, 1], log[log[:, 0] == 1, 1]
    n = known.shape[0]
    if n + full.shape[0] != log.shape[0] or np.unique(known).shape[0] != n or (full < 0).any() or (full >= n).any():
        raise CorruptionError("the log of groups is wrong; restore the file from a copy")
    return known, full


class BalancedPolicy(Policy):
    """A reservoir of the largest keys per group, with quotas; `params` say how these come about.

    adaptive_size: the capacity divided over the groups seen so far; otherwise over a total that is known. borrow: groups may take
    free rows beyond their quota until others need them. 20 bytes per row and 64 per group; O(log rows) for a sample that stays,
    about 10 ns for one that does not.
    """

    needs_groups = True

    def __init__(self, capacity: int, seed: int, params: dict[str, Any]) -> None:
        super().__init__(capacity, seed, params)
        self._mode = kernel.BORROW if params.get("borrow") else kernel.QUOTA
        self._total = 0 if params.get("adaptive_size", True) else next(params[name] for name in _TOTALS if name in params)
        self._fixed = bool(self._total)
        self._keys01 = (*key_pair("reservoir", seed), *key_pair("group", seed))
        self._groups: Ints = np.zeros((0, kernel.COLUMNS), np.int64)
        self._rest: Ints = np.zeros(1, np.int64)
        self._table = np.zeros(0, np.int32)
        self._counters: Ints = np.zeros(kernel.COUNTERS, np.int64)

    @staticmethod
    def log_slots(capacity: int) -> int:
        """Two entries per group; a file with more groups than rows is given a longer log when it needs one."""
        if capacity > _MOST_ROWS:
            raise ArgumentError(f"{capacity} rows, but groups share at most {_MOST_ROWS}; lower max_size")
        return 2 * max(capacity, 2048)

    def load(self, positions: Ints, groups: Ints) -> None:
        n = self.capacity
        self._counters = np.zeros(kernel.COUNTERS, np.int64)
        self._make_room(int((self.log[:, 0] == 0).sum()) + 1)
        self._keys, self._links = np.empty(n, np.uint64), np.empty((n, 2), np.int32)
        if self.scratch.shape[0] != n:
            self.scratch = np.zeros(n, np.int32)
        fits = kernel.load_groups(self.log, self._groups, self._table, self._counters, *self._keys01[2:])
        if not fits or not kernel.load_rows(
            positions, groups, self._keys, self._links, self._groups, self._table, self._counters, *self._keys01
        ):
            raise CorruptionError("the log of groups does not fit the rows; restore the file from a copy")
        self._share(n)

    def _make_room(self, least: int) -> None:
        """Arrays for at least so many groups; those that are there stay."""
        n = int(self._counters[kernel.GROUPS])
        room = max(64, 1 << (least - 1).bit_length())
        groups_before, rest_before = self._groups[:n], self._rest[:n]
        self._groups, self._rest = np.zeros((room, kernel.COLUMNS), np.int64), np.zeros(room + 1, np.int64)
        self._groups[:n], self._rest[:n] = groups_before, rest_before
        self._new: Ints = np.zeros((2 * room, 2), np.int64)
        self._table = np.full(4 * room, -1, np.int32)
        kernel.index_groups(self._groups, self._table, n)

    def _share(self, capacity: int) -> None:
        """Quotas for this capacity and the present groups."""
        if self._fixed:
            self._counters[kernel.SHARE] = self._fixed_share(capacity)
        elif self._counters[kernel.GROUPS]:
            kernel.share(self._groups, self._rest, self._counters, capacity)
        else:
            self._counters[kernel.SHARE] = -1  # that of no group: the first one makes it

    def _fixed_share(self, capacity: int) -> int:
        return capacity // self._total

    def _known(self) -> Ints:
        """Ids of the groups seen, in order of appearance."""
        return self._groups[: int(self._counters[kernel.GROUPS]), kernel.ID]

    def check_groups(self, groups: Ints) -> None:
        if not self._total:
            return
        new = np.setdiff1d(groups, self._known())
        known = int(self._counters[kernel.GROUPS])
        if known + new.shape[0] > self._total:
            raise ArgumentError(
                f"{new.shape[0]} new groups ({', '.join(map(str, new[:10]))}), but {known} of a total of {self._total} are there already; "
                "give a new buffer the right total, or adaptive_size=True"
            )

    def plan(self, start: int, groups: Ints, max_rows: int) -> Plan:
        rows = np.empty(groups.shape[0], np.int64)
        while True:
            known = min(self._groups.shape[0], self.slots // 2)
            used, freed = kernel.plan_balanced(
                self._keys, self._links, self.scratch, self._groups, known, self._table, self._rest,
                self._counters, self._new, self._mode, self._fixed, self.capacity, *self._keys01, start, max_rows, groups, rows,
            )  # fmt: skip
            if used:
                break
            if known == self.slots // 2:
                return LOG_TOO_SHORT
            self._make_room(2 * known)
        logged = int(self._counters[kernel.LOGGED])
        return Plan(rows[:used], freed if freed.shape[0] else NO_ROWS, self._new[:logged] if logged else NO_LOG)

    def keep(self, capacity: int, positions: Ints, groups: Ints) -> Ints:
        if self._total and self._mode != kernel.LARGEST and capacity < self._total:
            raise ArgumentError(f"resize to {capacity} rows for {self._total} groups: each would hold none; give at least {self._total}")
        self.log = self._whole_log()
        self.load(positions, groups)  # with the rows numbered as here
        self._share(capacity)
        lost = np.empty(positions.shape[0], np.int64)
        count = kernel.keep_balanced(self._keys, self._links, self._groups, self._counters, capacity, self._mode, lost)
        self.log = self._whole_log()
        stays = np.ones(positions.shape[0], bool)
        stays[lost[:count]] = False
        return np.flatnonzero(stays)

    def _whole_log(self) -> Ints:
        """A log that says what the arrays do."""
        full = np.flatnonzero(self._groups[: int(self._counters[kernel.GROUPS]), kernel.FULL])
        return np.array([(0, g) for g in self._known()] + [(1, i) for i in full], np.int64).reshape(-1, 2)

    def capacity_warning(self, capacity: int) -> str | None:
        n = int(self._counters[kernel.GROUPS])
        held, full = self._groups[:n, kernel.HELD], self._groups[:n, kernel.FULL] != 0
        if capacity <= self.capacity or not full.any():
            return None
        return (
            f"{int(full.sum())} of {n} groups have already dropped samples and will hold no more than the {int(held[full].sum())} rows "
            "that they hold now, because they would no longer be uniform; only the others, and new groups, use more"
        )


class ClassBalancingReservoirPolicy(BalancedPolicy):
    """Class-balancing reservoir sampling (CBRS; Chrysakis and Moens, ICML 2020, Algorithm 1).

    While there are free rows every sample takes one. Then a class is full for ever once it is one of the largest: a sample of a full
    class competes within its class, one of another class takes a row of the largest. With keys instead of draws: the row of the
    smallest key, and a sample enters its full class if its key exceeds the smallest there; both have the same law. Of several largest
    classes a hash of the position chooses. O(classes) for a sample of a class that is not full, which happens `max_size` times or so.
    """

    no_union = "which samples it holds depends on the order in which all streams arrive"

    def __init__(self, capacity: int, seed: int, params: dict[str, Any]) -> None:
        super().__init__(capacity, seed, params)
        self._mode, self._fixed = kernel.LARGEST, True

    def _fixed_share(self, capacity: int) -> int:
        return 0
