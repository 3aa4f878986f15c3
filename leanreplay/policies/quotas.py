"""Quotas: how rows are shared by groups, and the log of the groups seen.

Groups are classes, experiences, or whatever the samples are grouped by. A file's log holds what its
index does not tell: groups that hold no row, and groups that may not grow.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ..arrays import Ints, Words
from ..errors import ArgumentError, CorruptionError
from ..kernels.reservoir import position_keys
from ..keys import key_pair
from .base import Parameter, Params, Policy, optional_int

_MAX_ROWS = 2**31 - 2  # links between rows are int32


def group_hash(ids: npt.ArrayLike, seed: int) -> Words:
    """Hash of each group id, (n,): the groups of the smallest hashes get the remainder of the
    rows."""
    groups = np.asarray(ids, np.int64).reshape(-1)
    out = np.empty(groups.shape[0], np.uint64)
    position_keys(groups, *key_pair("group", seed), out)
    return out


def group_quotas(max_size: int, hashes: Words) -> Ints:
    """Rows for each of n groups: max_size // n, and one more for the max_size % n groups of the
    smallest hashes."""
    n = hashes.shape[0]
    quotas = np.full(n, max_size // max(n, 1), np.int64)
    quotas[np.argsort(hashes)[: max_size % max(n, 1)]] += 1
    return quotas


def is_flag(value: object) -> bool:
    """Return whether a parameter in a file is True or False."""
    return type(value) is bool


ADAPTIVE_SIZE = Parameter("adaptive_size", True, is_flag)
BORROW = Parameter("borrow", False, lambda value: value is None or is_flag(value))


def total_of(name: str) -> Parameter:
    """Return the parameter for the number of groups that will come, which fixed quotas need."""
    return Parameter(name, None, optional_int(1, 2**31))


def groups_in(log: Ints) -> tuple[Ints, Ints]:
    """Ids of the groups in a log, in order of appearance, and numbers of those that are full.
    CorruptionError for what is no log."""
    known, full = log[log[:, 0] == 0, 1], log[log[:, 0] == 1, 1]
    n = known.shape[0]
    if n + full.shape[0] != log.shape[0] or np.unique(known).shape[0] != n or (full < 0).any() or (full >= n).any():
        raise CorruptionError("the log of groups is wrong; restore the file from a copy")
    return known, full


def make_log(known: Ints, full: npt.NDArray[np.bool_]) -> Ints:
    """The log of these groups, `full` saying which may not grow."""
    entries = [(0, g) for g in known.tolist()] + [(1, i) for i in np.flatnonzero(full).tolist()]
    return np.array(entries, np.int64).reshape(-1, 2)


class QuotaPolicy(Policy):
    """Groups share the rows, each up to its quota: what the policies of balanced buffers have in
    common.

    total: the number of groups that will come, each with capacity // total rows; 0 divides the
    capacity over the groups seen so far (`group_quotas`).
    """

    total_name: ClassVar[str] = "total_num_groups"  # of the parameter for `total`

    @classmethod
    def settle(cls, given: Params, max_size: int) -> Params:
        cls.log_slots(max_size)  # too many rows?
        name = cls.total_name
        total, adaptive = given.get(name), given.get("adaptive_size")
        if total is not None and adaptive is None:
            raise ArgumentError(f"{name}={total} is for fixed quotas: give adaptive_size=False too, or leave it out")
        if adaptive is not None and not adaptive:
            if total is None:
                raise ArgumentError(f"adaptive_size=False needs {name}: each group gets max_size // {name} rows")
            if total > max_size:
                raise ArgumentError(f"{total} groups in {max_size} rows: each would hold none; raise max_size, or use adaptive_size=True")
        return super().settle(given, max_size)

    @classmethod
    def params_problem(cls, params: Params, max_size: int) -> str | None:
        total = params.get(cls.total_name)
        if params.get("adaptive_size", True) or (total is not None and total <= max_size):
            return None
        return f"{total} groups in {max_size} rows"

    @staticmethod
    def log_slots(capacity: int) -> int:
        """Two entries per group; a file with more groups than rows is given a longer log when it
        needs one. Raises ArgumentError for more rows than links can name."""
        if capacity > _MAX_ROWS:
            raise ArgumentError(f"{capacity} rows, but groups share at most {_MAX_ROWS}; lower max_size")
        return 2 * max(capacity, 2048)

    def __init__(self, capacity: int, seed: int, params: Params) -> None:
        super().__init__(capacity, seed, params)
        self.total: int = 0 if params.get("adaptive_size", True) else params[self.total_name]

    @property
    def known(self) -> Ints:
        """Ids of the groups seen, in order of appearance."""
        raise NotImplementedError

    def check_groups(self, groups: Ints) -> None:
        if not self.total:
            return
        known = self.known
        new = np.setdiff1d(groups, known)
        if known.shape[0] + new.shape[0] > self.total:
            raise ArgumentError(
                f"{new.shape[0]} new groups ({', '.join(map(str, new[:10]))}), but {known.shape[0]} of a total of {self.total} are there "
                "already; give a new buffer the right total, or adaptive_size=True"
            )

    def quotas(self, ids: Ints, capacity: int) -> Ints:
        """Return how many rows each of these groups may hold."""
        if self.total:
            return np.full(ids.shape[0], capacity // self.total)
        return group_quotas(capacity, group_hash(ids, self.seed))

    def check_capacity(self, capacity: int) -> None:
        """Raise ArgumentError for a capacity of which no group would have a row."""
        if capacity < self.total:
            raise ArgumentError(f"resize to {capacity} rows for {self.total} groups: each would hold none; give at least {self.total}")
