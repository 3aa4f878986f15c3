"""A weight per row, for draws in proportion to a value, or of some rows only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..arguments import plain_array
from ..arrays import Bools, Floats, Ints
from ..errors import ArgumentError, SchemaError
from ..kernels import reservoir, sums
from ..kernels.heaps import levels
from ..storage.store import Store
from .values import Array, Values

Number = bool | int | float

MAX_PENDING = 4  # rows that changed since are looked at one by one up to this part of all, 1 / 4


class Where(NamedTuple):
    """Which rows are drawn: those whose value is one of `values`, or from `low` to below `high`."""

    name: str
    values: tuple[Number, ...] | None = None
    low: Number | None = None
    high: Number | None = None

    @staticmethod
    def of(given: object) -> Where | None:
        """What `where=(name, values)` says; None for None. Raises ArgumentError for anything else."""
        if given is None or isinstance(given, Where):
            return given
        if not isinstance(given, (tuple, list)) or len(given) != 2 or not isinstance(given[0], str):
            raise ArgumentError(
                'where is a pair of a name and what its value may be, as ("label", [3, 5]) or ("position", range(0, 1000)), '
                f"got {given!r:.200}"
            )
        name, wanted = given
        if isinstance(wanted, range) and wanted.step == 1:
            wanted = slice(wanted.start, wanted.stop)
        if isinstance(wanted, slice):
            ends = [_number(name, end) if end is not None else None for end in (wanted.start, wanted.stop)]
            if wanted.step is not None:
                raise ArgumentError(f"where={given!r:.200}: a slice from low to high has no step; give the values themselves as a list")
            return Where(name, None, *ends)
        values = np.atleast_1d(plain_array(wanted, f"where={name!r}", ArgumentError))
        return Where(name, tuple(_number(name, v) for v in values.ravel().tolist()))

    def fits(self, found: Array) -> Bools:
        """Which of these values fit, (n,) bool."""
        if self.values is not None:
            return np.isin(found, np.array(self.values))
        inside = np.ones(found.shape[0], np.bool_)
        if self.low is not None:
            inside &= found >= self.low
        if self.high is not None:
            inside &= found < self.high
        return inside

    def __str__(self) -> str:
        if self.values is not None:
            return f"{self.name!r} in {list(self.values)}"
        return f"{self.name!r} from {self.low} to below {self.high}"


def _number(name: str, value: object) -> Number:
    if not isinstance(value, (bool, int, float, np.bool_, np.integer, np.floating)) or math.isnan(value):
        raise ArgumentError(f"where={name!r}: its values are numbers, got {value!r:.200}")
    return value.item() if isinstance(value, np.generic) else value


class Weighted(NamedTuple):
    """The weights of one state of a store.

    tree, starts: see `kernels.sums`. fits: how many weights are above 0. total: their sum. changed:
    rows that commits have changed since, up to `commit`: its number, or in a reader the name of the
    state, as the number of a folder, a sum, may come out equal after a rollback.
    """

    store: Store
    commit: int | str
    tree: Floats
    starts: Ints
    fits: int
    total: float
    changed: tuple[Ints, ...] = ()

    @property
    def room(self) -> int:
        """How many rows the tree has room for."""
        return int(self.starts[1])


class Weights:
    """The weight of each row for one kind of draw: its value ** alpha where it fits, else 0.

    They belong to a commit. The writer mends what its commits change; all else derives them anew, by
    reading the columns that they follow from. They take 9.2 bytes a row. They are replaced as a
    whole, since a signal handler may draw, too.
    """

    def __init__(self, values: Values, where: Where | None, by: str | None, alpha: float) -> None:
        self._values, self._where, self._by, self._alpha = values, where, by, alpha
        self._now: Weighted | None = None

    def note(self, store: Store, before: int, rows: Sequence[Ints]) -> None:
        """Note that a commit on top of number `before` has changed these rows (-1: none)."""
        now, self._now = self._now, None
        if now is None or now.store is not store or now.commit != before:
            return
        changed = (*now.changed, *rows)
        if sum(map(len, changed)) * MAX_PENDING <= now.room + 1024:
            self._now = now._replace(commit=store.sequence, changed=changed)

    def of(self, store: Store) -> Weighted:
        """Return the weights in the state of the store."""
        now, self._now = self._now, None
        if now is None or now.store is not store or now.commit != _commit_of(store) or now.room < store.high:
            now = self._derived(store)
        elif now.changed:
            now = self._mended(now, store)
        self._now = now
        if not now.total < np.inf:
            raise ArgumentError(f"by={self._by!r}: the sum of all values ** {self._alpha:g} is beyond float64; divide the values")
        return now

    def _derived(self, store: Store) -> Weighted:
        if store.writable:
            store.verify_index()
        commit, high = _commit_of(store), store.high
        starts = levels(high if store.layout.max_size >= high else 2 * high)
        tree = np.zeros(starts[-1])
        for first, positions, tags in store.pieces():
            rows = np.flatnonzero(positions >= 0)
            if rows.shape[0]:
                tree[first + rows] = self._weigh(store, first + rows, (positions[rows], tags[rows]))
        total = sums.build_sums(tree, starts)
        # A reader may have met a commit: each weight is right, but not all of one commit.
        return Weighted(store, commit if _commit_of(store) == commit else -2, tree, starts, int(np.count_nonzero(tree[:high])), total)

    def _mended(self, now: Weighted, store: Store) -> Weighted:
        rows = np.unique(np.concatenate(now.changed))
        rows = rows[np.searchsorted(rows, 0) :]
        index = store.snapshot(rows)
        live = index[0] >= 0
        weights = np.zeros(rows.shape[0])
        if live.any():
            weights[live] = self._weigh(store, rows[live], (index[0][live], index[1][live]))
        fits = now.fits + int(np.count_nonzero(weights)) - int(np.count_nonzero(now.tree[rows]))
        total = sums.set_weights(now.tree, now.starts, rows, weights)
        return now._replace(fits=fits, total=total, changed=())

    def _weigh(self, store: Store, rows: Ints, index: tuple[Ints, Ints]) -> Floats:
        """Return the weights of live rows, (n,) float64. index: their positions and tags."""
        weights = np.ones(rows.shape[0])
        if self._by is not None:
            values = self._numbers(store, self._by, rows, index).astype(np.float64)
            wrong = sums.weigh(values, self._alpha, weights)
            if wrong >= 0:
                raise ArgumentError(
                    f"by={self._by!r}: row {rows[wrong]} holds {values[wrong]}, but a draw in proportion to a value needs finite ones that "
                    "are not negative; set_metadata overwrites them"
                )
        if self._where is not None:
            weights[~self._where.fits(self._numbers(store, self._where.name, rows, index))] = 0.0
        return weights

    def _numbers(self, store: Store, name: str, rows: Ints, index: tuple[Ints, Ints]) -> Array:
        return _numbers(store, name, self._values.of_rows(store, name, rows, index))


def _commit_of(store: Store) -> int | str:
    return store.sequence if store.writable else store.state_name()


def _numbers(store: Store, name: str, values: Array) -> Array:
    """Return the values of a column as one real number a row. SchemaError where they are not."""
    if values.shape[1:] == (1,):
        values = values[:, 0]
    if values.ndim != 1 or values.dtype.kind not in "biuf" or f"metadata/{name}" in store.layout.schema.bfloat16:
        raise SchemaError(f"{name!r} holds {values.dtype} of shape {values.shape[1:]} a row: a draw looks at one real number a row")
    return values


def drawn_last(left: Floats, n: int, k0: np.uint64, k1: np.uint64) -> Ints:
    """Draw n rows without replacement in proportion to these weights, in one pass over all of them.

    Each row of weight w gets a time, exponential of rate w: the earliest come first (Efraimidis and
    Spirakis, 2006). This is the law of one draw after the other.
    """
    rows = np.flatnonzero(left)
    keys = np.empty(rows.shape[0], np.uint64)
    reservoir.position_keys(rows, k0, k1, keys)
    with np.errstate(over="ignore", divide="ignore"):
        times = -np.log1p(-((keys >> np.uint64(11)) + 0.5) * 2.0**-53) / left[rows]
    return rows[np.argsort(times, kind="stable")[:n]]
