"""The greedy sampler: a sample enters, the largest class shrinks."""

from __future__ import annotations

import numpy as np

from ..arrays import Ints
from ..kernels import greedy as kernel
from ..keys import key_pair
from .base import Parameter, Params, Plan, Policy

ADMIT = ("all", "below_share")


class GreedyClassBalancingPolicy(Policy):
    """A sample enters; once full, a random member of the largest class leaves.

    admit: "all" samples enter, or those whose class is "below_share", which is the greedy sampler
    of GDumb (Prabhu et al. 2020, Algorithm 1). Ties between largest classes are broken at random.
    Costs O(classes) a sample; 8 bytes per row.

    Nothing but the index is needed to go on. The algorithm divides by the number of classes seen;
    here it is that of classes held. They differ once there are more classes than rows: then both
    shares are at most one row, and only a class without any enters.
    """

    needs_groups = True
    parameters = (Parameter("admit", "all", lambda value: value in (None, *ADMIT)),)
    no_union = "which samples it holds depends on the order in which all streams arrive"

    def __init__(self, capacity: int, seed: int, params: Params) -> None:
        super().__init__(capacity, seed, params)
        self._k0, self._k1 = key_pair("greedy", seed)
        self._below_share = params.get("admit") == "below_share"

    def load(self, positions: Ints, groups: Ints) -> None:
        self._row_labels = np.zeros(self.capacity, np.int64)
        self._size = groups.shape[0]
        self._row_labels[: self._size] = groups
        self._labels, self._counts = np.unique(groups, return_counts=True)

    def plan(self, start: int, groups: Ints, max_rows: int) -> Plan:
        groups = groups if max_rows >= self.capacity else groups[:max_rows]
        self._add_classes(groups)
        rows = np.empty(groups.shape[0], np.int64)
        self._size = kernel.plan_greedy(
            self._row_labels, self._size, self.capacity, self._labels, self._counts, self._below_share,
            self._k0, self._k1, start, groups, rows,
        )  # fmt: skip
        return Plan(rows)

    def _add_classes(self, groups: Ints) -> None:
        """Count the classes among these groups that are new with 0 samples."""
        at = np.minimum(np.searchsorted(self._labels, groups), max(0, self._labels.shape[0] - 1))
        if not self._labels.shape[0] or (self._labels[at] != groups).any():
            labels = np.union1d(self._labels, groups)
            counts = np.zeros(labels.shape[0], np.int64)
            counts[np.searchsorted(labels, self._labels)] = self._counts
            self._labels, self._counts = labels, counts

    def keep(self, capacity: int, positions: Ints, groups: Ints) -> Ints:
        """Evict as `plan` does, once for each row too many."""
        rows, row_labels = np.arange(groups.shape[0]), groups.copy()
        labels, counts = np.unique(groups, return_counts=True)
        k0, _ = key_pair(f"greedy resize to {capacity}", self.seed)
        newest = np.uint64(positions.max() if positions.shape[0] else 0)
        for size in range(rows.shape[0], capacity, -1):
            base = np.uint64((int(k0) ^ int(newest) * 2**20 + size) % 2**64)
            c = kernel.largest_class(labels, counts, base)
            r = kernel.random_member(row_labels, size, labels[c], base)
            rows[r], row_labels[r] = rows[size - 1], row_labels[size - 1]
            counts[c] -= 1
        return np.sort(rows[:capacity])
