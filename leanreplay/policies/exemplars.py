"""Exemplars: groups whose samples a strategy ranks; the quotas of the groups say how many stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..arrays import Bools, Ints
from ..errors import CorruptionError
from .base import Parameter, Plan
from .quotas import ADAPTIVE_SIZE, QuotaPolicy, groups_in, is_flag, make_log, total_of

GROUPBY = (None, "class", "task", "experience")

Rank = Callable[[Ints, Ints, int], Ints]  # (rows, samples, quota) -> the order of both, the best first


class Exemplars(NamedTuple):
    """What a buffer holds, sorted by group and then by rank. (n,) int64 each."""

    rows: Ints
    groups: Ints
    ranks: Ints

    @classmethod
    def sort(cls, rows: Ints, groups: Ints, ranks: Ints) -> Exemplars:
        """Return these rows in order."""
        order = np.lexsort((ranks, groups))
        return cls(rows[order], groups[order], ranks[order])


class Choice(NamedTuple):
    """What feeding one unit changes.

    samples, groups, ranks: of new samples that stay; numbers of samples in the unit, ascending.
    rows, new_ranks: of held rows whose rank changes. dropped: rows that leave.
    known, full: the groups afterwards, and which of them may not grow. log: the entries that say
    so.
    """

    samples: Ints
    groups: Ints
    ranks: Ints
    rows: Ints
    new_ranks: Ints
    dropped: Ints
    known: Ints
    full: Bools
    log: Ints


class ParametricPolicy(QuotaPolicy):
    """Groups, and which of them are full. `choose` ranks whole groups; samples are not planned one
    by one."""

    parameters = (
        total_of(QuotaPolicy.total_name),
        ADAPTIVE_SIZE,
        Parameter("groupby", "nothing", lambda value: value in ("nothing", *GROUPBY[1:])),
        Parameter("selection_strategy", "RandomSelection", lambda value: type(value) is str),
        Parameter("uniform", True, is_flag),
    )

    def load(self, positions: Ints, groups: Ints) -> None:
        self._known, full = groups_in(self.log)
        if not np.isin(groups[positions >= 0], self._known).all():
            raise CorruptionError("the log of groups does not fit the rows; restore the file from a copy")
        self.full = np.zeros(self._known.shape[0], bool)
        self.full[full] = True

    @property
    def known(self) -> Ints:
        return self._known

    def _known_with(self, fed: Ints) -> Ints:
        """Return the groups seen, and behind them those that are new among these, in order of
        appearance."""
        ids, first = np.unique(fed, return_index=True)
        ids = ids[np.argsort(first)]
        return np.concatenate([self._known, ids[~np.isin(ids, self._known)]])

    def _quotas(self, known: Ints, capacity: int, held: Ints) -> Ints:
        """Return how many rows each of these groups may hold. held: how many it holds now."""
        quotas = self.quotas(known, capacity)
        if self.params["uniform"]:  # the capacity rule
            quotas = np.where(self._full_of(known), np.minimum(quotas, held), quotas)
        return quotas

    def _full_of(self, known: Ints) -> Bools:
        """Return which of these groups may not grow. The new ones at the end may."""
        full = np.zeros(known.shape[0], bool)
        full[: self.full.shape[0]] = self.full
        return full

    def choose(self, held: Exemplars, fed: Ints, rank: Rank) -> Choice:
        """Rank the samples of each group that is fed together with those held; other groups shrink
        to their quotas.

        fed: (n,), the groups of the samples of the unit.
        """
        self.check_groups(fed)
        known = self._known_with(fed)
        first, last = np.searchsorted(held.groups, known), np.searchsorted(held.groups, known, "right")
        quotas = self._quotas(known, self.capacity, last - first)
        full = self._full_of(known)
        by_group = np.argsort(fed, kind="stable")
        starts, stops = np.searchsorted(fed[by_group], known), np.searchsorted(fed[by_group], known, "right")
        new, moved, dropped = [], [], []
        for i in range(known.shape[0]):
            rows, ranks = held.rows[first[i] : last[i]], held.ranks[first[i] : last[i]]
            samples, n, quota = by_group[starts[i] : stops[i]], rows.shape[0], int(quotas[i])
            full[i] |= n + samples.shape[0] > quota
            if not samples.shape[0]:
                dropped.append(rows[quota:])
                continue
            order = rank(rows, samples, quota)[:quota]
            places = np.full(n + samples.shape[0], -1)
            places[order] = np.arange(order.shape[0])
            mine, theirs = places[:n], places[n:]
            dropped.append(rows[mine < 0])
            changed = (mine >= 0) & (mine != ranks)
            moved.append((rows[changed], mine[changed]))
            stays = theirs >= 0
            new.append((samples[stays], np.full(int(stays.sum()), known[i]), theirs[stays]))
        samples, groups, ranks = (np.concatenate(column) for column in zip(*new, strict=True))
        order = np.argsort(samples)
        rows, new_ranks = (np.concatenate(column) for column in zip(*moved, strict=True))
        log = make_log(known[self._known.shape[0] :], full & ~self._full_of(known))
        return Choice(samples[order], groups[order], ranks[order], rows, new_ranks, np.concatenate(dropped), known, full, log)

    def accept(self, choice: Choice) -> None:
        """Note a choice that was committed."""
        self._known, self.full = choice.known, choice.full

    def keep_ranks(self, capacity: int, groups: Ints, ranks: Ints) -> Ints:
        """For `resize`: return which of the live rows stay, given the group and rank of each."""
        self.check_capacity(capacity)
        sorter = np.argsort(self._known)
        group = sorter[np.searchsorted(self._known, groups, sorter=sorter)]
        held = np.bincount(group, minlength=self._known.shape[0])
        quotas = self._quotas(self._known, capacity, held)
        self.full |= held > quotas
        self.log = make_log(self._known, self.full)
        kept = np.flatnonzero(ranks < quotas[group])
        if kept.shape[0] != np.minimum(held, quotas).sum():
            raise CorruptionError("the ranks of the rows are not 0, 1, 2, ... in each group; restore the file from a copy")
        return kept

    def plan(self, start: int, groups: Ints, max_rows: int) -> Plan:
        raise NotImplementedError("ParametricBuffer plans for itself")
