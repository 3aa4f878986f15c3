"""Rows shared evenly over groups: one reservoir of the largest keys per group, with quotas.

All groups live in the same rows; a new group shrinks the quotas of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ..arrays import NO_LOG, NO_ROWS, POLICY_WORDS, Ints, Words
from ..errors import CorruptionError, MismatchError
from ..kernels import balanced as kernel
from ..kernels.reservoir import position_keys
from ..keys import key_pair
from .base import LOG_TOO_SHORT, Parameter, Params, Plan
from .quotas import ADAPTIVE_SIZE, BORROW, QuotaPolicy, groups_in, make_log, total_of
from .union import Holder, Union


class BalancedPolicy(QuotaPolicy):
    """A reservoir of the largest keys per group, with quotas; `params` say how these come about.

    adaptive_size: the capacity divided over the groups seen so far; otherwise over a total that is
    known. borrow: groups may take free rows beyond their quota until others need them. 20 bytes per
    row and 64 per group; O(log rows) for a sample that stays, about 10 ns for one that does not.
    """

    needs_groups = True
    parameters: ClassVar[tuple[Parameter, ...]] = (total_of(QuotaPolicy.total_name), ADAPTIVE_SIZE, BORROW)
    no_union = ""

    def __init__(self, capacity: int, seed: int, params: Params) -> None:
        super().__init__(capacity, seed, params)
        self._mode = kernel.BORROW if params.get("borrow") else kernel.QUOTA
        self._fixed = bool(self.total)
        self._keys01 = (*key_pair("reservoir", seed), *key_pair("group", seed))
        self._groups: Ints = np.zeros((0, kernel.COLUMNS), np.int64)
        self._rest: Ints = np.zeros(1, np.int64)
        self._table = np.zeros(0, np.int32)
        self._counters: Ints = np.zeros(kernel.COUNTERS, np.int64)

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
            self._counters[kernel.SHARE] = capacity // self.total if self.total else 0
        elif self._counters[kernel.GROUPS]:
            kernel.share(self._groups, self._rest, self._counters, capacity)
        else:
            self._counters[kernel.SHARE] = -1  # that of no group: the first one makes it

    @property
    def known(self) -> Ints:
        return self._groups[: int(self._counters[kernel.GROUPS]), kernel.ID]

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
        self.check_capacity(capacity)
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
        """Return a log that says what the arrays do."""
        known = self.known
        return make_log(known, self._groups[: known.shape[0], kernel.FULL] != 0)

    def union(self, holders: Sequence[Holder]) -> Union:
        """Of each group as many stay as its quota says, or as few as the smallest buffer holds in
        which the group is full."""
        names = " and ".join([h.name for h in holders][:2])
        if self._mode == kernel.BORROW:
            raise MismatchError(
                f"{names}: with borrow=True, which groups hold more than their share depends on the order in which all streams arrive; "
                "merge buffers without it"
            )
        logs = [groups_in(h.log) for h in holders]
        ids = np.unique(np.concatenate([known for known, _ in logs]))
        if 0 < self.total < ids.shape[0]:
            raise MismatchError(
                f"{' and '.join(h.name for h in holders)} cannot be merged: {ids.shape[0]} groups together, but they were created for a "
                f"total of {self.total}"
            )
        limits = self.quotas(ids, self.capacity)
        spare = self.capacity - int(limits.sum()) if self.total else 0
        held = np.array([_count_groups(h, ids) for h in holders])
        full = np.zeros(ids.shape[0], bool)
        for (known, full_here), held_here in zip(logs, held, strict=True):
            stopped = np.searchsorted(ids, known[full_here])
            full[stopped] = True
            limits[stopped] = np.minimum(limits[stopped], held_here[stopped])
        offered = held.sum(axis=0)
        full |= offered > limits
        state = [0] * POLICY_WORDS
        return Union(np.minimum(limits, offered), self._position_keys, state, int(limits.sum()) + spare, ids, make_log(ids, full))

    def _position_keys(self, positions: Ints, groups: Ints) -> Words:
        keys = np.empty(positions.shape[0], np.uint64)
        position_keys(positions, *self._keys01[:2], keys)
        return keys

    def capacity_warning(self, capacity: int) -> str | None:
        n = int(self._counters[kernel.GROUPS])
        held, full = self._groups[:n, kernel.HELD], self._groups[:n, kernel.FULL] != 0
        if capacity <= self.capacity or not full.any():
            return None
        return (
            f"{int(full.sum())} of {n} groups have already dropped samples and will hold no more than the {int(held[full].sum())} rows "
            "that they hold now, because they would no longer be uniform; only the others, and new groups, use more"
        )


def _count_groups(holder: Holder, ids: Ints) -> Ints:
    """Return how many rows of a buffer each of these groups holds."""
    held = np.zeros(ids.shape[0], np.int64)
    for _, _, groups in holder.chunks():
        at = np.searchsorted(ids, groups)
        if at.shape[0] and (at.max() == ids.shape[0] or (ids[at] != groups).any()):
            raise CorruptionError(f"{holder.name}: the log of groups does not fit the rows; restore the file from a copy")
        held += np.bincount(at, minlength=ids.shape[0])
    return held


class ClassBalancedPolicy(BalancedPolicy):
    """The policy of `ClassBalancedBuffer`."""

    total_name = "total_num_classes"
    parameters = (total_of(total_name), ADAPTIVE_SIZE, BORROW)
    no_union = ""


class ExperienceBalancedPolicy(BalancedPolicy):
    """The policy of `ExperienceBalancedBuffer`."""

    total_name = "num_experiences"
    parameters = (total_of(total_name), ADAPTIVE_SIZE, BORROW)
    no_union = ""


class ClassBalancingReservoirPolicy(BalancedPolicy):
    """Class-balancing reservoir sampling (CBRS; Chrysakis and Moens, ICML 2020, Algorithm 1).

    While there are free rows every sample takes one. Then a class is full for ever once it is one
    of the largest: a sample of a full class competes within its class, one of another class takes a
    row of the largest. With keys instead of draws: the row of the smallest key, and a sample enters
    its full class if its key exceeds the smallest there; both have the same law. Of several largest
    classes a hash of the position chooses. O(classes) for a sample of a class that is not full,
    which happens `max_size` times or so.
    """

    no_union = "which samples it holds depends on the order in which all streams arrive"

    parameters = ()

    def __init__(self, capacity: int, seed: int, params: Params) -> None:
        super().__init__(capacity, seed, params)
        self._mode, self._fixed = kernel.LARGEST, True
