"""Exemplars: groups whose samples a selection strategy ranks; the quotas of the groups say how many
stay."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ..arrays import Ints
from ..errors import ArgumentError, CorruptionError
from .balanced import (
    ADAPTIVE_SIZE,
    BalancedPolicy,
    group_hash,
    group_quotas,
    groups_in,
    is_flag,
    make_log,
    quotas_problem,
    settle_quotas,
    total_of,
)
from .base import Parameter, Params, Plan, Policy

GROUPBY = (None, "class", "task", "experience")


class ParametricPolicy(Policy):
    """The groups and which of them are full. Rows are not planned sample by sample:
    `ParametricBuffer` chooses among whole groups."""

    total_name: ClassVar[str] = "total_num_groups"
    parameters = (
        total_of(total_name),
        ADAPTIVE_SIZE,
        Parameter("groupby", "nothing", lambda value: value in ("nothing", *GROUPBY[1:])),
        Parameter("selection_strategy", "RandomSelection", lambda value: type(value) is str),
        Parameter("uniform", True, is_flag),
    )

    @classmethod
    def settle(cls, given: Params, max_size: int) -> Params:
        settle_quotas(cls.total_name, given, max_size)
        return super().settle(given, max_size)

    @classmethod
    def params_problem(cls, params: Params, max_size: int) -> str | None:
        return quotas_problem(cls.total_name, params, max_size)

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
