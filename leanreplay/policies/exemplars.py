"""Exemplars: groups whose samples a selection strategy ranks; the quotas of the groups say how many stay."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..arrays import Ints
from ..errors import ArgumentError, CorruptionError
from .balanced import BalancedPolicy, group_hash, group_quotas, groups_in
from .base import Plan, Policy


class ParametricPolicy(Policy):
    """The groups and which of them are full. Rows are not planned sample by sample: `ParametricBuffer` chooses among whole groups."""

    @staticmethod
    def log_slots(capacity: int) -> int:
        return BalancedPolicy.log_slots(capacity)

    def load(self, positions: Ints, groups: Ints) -> None:
        self.known, full = groups_in(self.log)
        if not np.isin(groups[positions >= 0], self.known).all():
            raise CorruptionError("the log of groups does not fit the rows; restore the file from a copy")
        self.full = np.zeros(self.known.shape[0], bool)
        self.full[full] = True

    def quotas(self, known: Ints, capacity: int, held: Ints) -> Ints:
        """How many rows each of these groups may hold; `held` by them now."""
        total = 0 if self.params["adaptive_size"] else self.params["total_num_groups"]
        if total and (known.shape[0] > total or capacity < total):
            raise ArgumentError(
                f"{known.shape[0]} groups in {capacity} rows, but this buffer is for a total of {total}; "
                "give a new one the right total, or adaptive_size=True"
            )
        quotas = np.full(known.shape[0], capacity // total) if total else group_quotas(capacity, group_hash(known, self.seed))
        if self.params["uniform"]:  # the capacity rule
            full = np.zeros(known.shape[0], bool)
            full[: self.full.shape[0]] = self.full
            quotas = np.where(full, np.minimum(quotas, held), quotas)
        return quotas

    def keep_ranks(self, capacity: int, groups: Ints, ranks: Ints) -> Ints:
        """For `resize`: which of the live rows stay, given the group and rank of each."""
        held = np.array([(groups == g).sum() for g in self.known], np.int64)
        quotas = self.quotas(self.known, capacity, held)
        quota = dict(zip(self.known.tolist(), quotas.tolist(), strict=True))
        self.full |= held > quotas
        self.log = make_log(self.known, self.full)
        kept = np.flatnonzero(ranks < np.array([quota[g] for g in groups.tolist()], np.int64))
        if kept.shape[0] != np.minimum(held, quotas).sum():
            raise CorruptionError("the ranks of the rows are not 0, 1, 2, ... in each group; restore the file from a copy")
        return kept

    def plan(self, start: int, groups: Ints, max_rows: int) -> Plan:
        raise NotImplementedError("ParametricBuffer plans for itself")


def make_log(known: Ints, full: npt.NDArray[np.bool_]) -> Ints:
    """The log of these groups, `full` saying which may not grow."""
    entries = [(0, g) for g in known.tolist()] + [(1, i) for i in np.flatnonzero(full).tolist()]
    return np.array(entries, np.int64).reshape(-1, 2)
