"""Which rows a draw takes: a function of (seed, stream, consumer, copy, samples seen, number)."""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..arguments import number as real_number
from ..arrays import Ints
from ..errors import ArgumentError, RowError, SchemaError
from ..kernels import reservoir, sums
from ..keys import key_pair
from ..storage import system
from ..storage.store import Arrays, Store
from .parameters import Parameters
from .values import Values
from .weights import Weighted, Weights, Where, drawn_last

MAX_DRAWS = 2**62
MAX_WEIGHTS = 2  # kinds of draws whose weights are kept: 9.2 bytes a row each
MAX_REMEMBERED = 10_000  # unpickled copies

Keys = tuple[np.uint64, np.uint64]


@dataclass(frozen=True)
class Draw:
    """How rows are drawn. The value goes from `sample`, loaders and learners down to `Draws`.

    replace: whether a row may come more than once. balance: name of the value by which rows are
    grouped, and drawn evenly; see `Values` and `Draws.balanced`. where: which rows can be drawn. by:
    name of the value in proportion to whose power alpha they are drawn.
    """

    replace: bool = False
    balance: str | None = None
    where: Where | None = None
    by: str | None = None
    alpha: float = 1.0

    @staticmethod
    def of(
        replace: object = False, balance: object = None, where: object = None, by: object = None, alpha: object = None
    ) -> Draw:  # fmt: skip
        """The draw of these arguments. Raises ArgumentError for wrong ones."""
        if by is not None and not isinstance(by, str):
            raise ArgumentError(f'by is the name of a value that each row has, such as "score", got {by!r:.200}')
        if by is None and alpha is not None:
            raise ArgumentError(f"alpha={alpha!r:.200} is a power of the value that by= names; give by, or leave alpha out")
        if by is not None and balance is not None:
            raise ArgumentError(f"balance={balance!r:.200} and by={by!r} are two ways to choose; give one of them")
        if not isinstance(replace, (bool, np.bool_)):
            raise ArgumentError(f"replace must be True or False, got {replace!r:.200}")
        if balance is not None and not isinstance(balance, str):
            raise ArgumentError(f'balance is "group", "label" or the name of a metadata field, got {balance!r:.200}')
        return Draw(bool(replace), balance, Where.of(where), by, 1.0 if alpha is None else real_number("alpha", alpha))

    @property
    def name(self) -> str:
        """Which rows, and in proportion to what, in words."""
        parts = ([str(self.where)] if self.where is not None else []) + ([f"{self.by!r} ** {self.alpha} above 0"] if self.by else [])
        return " and ".join(parts)

    @property
    def weighted(self) -> bool:
        """Whether not every row can be drawn alike."""
        return self.where is not None or self.by is not None


UNIFORM = Draw()


class Drawn(NamedTuple):
    """Rows that were drawn. shown: what the metadata of samples says of the draw, (n,) arrays."""

    rows: Ints
    shown: dict[str, npt.NDArray[Any]]
    where: Where | None = None


class Draws:
    """The draws of one copy of a buffer: their count, their keys, and the count of its copies."""

    def __init__(self, parameters: Parameters, values: Values) -> None:
        self.copy = ""  # of a forked or unpickled copy: which one, for draws of its own
        self._parameters, self.values = parameters, values
        self._weights: dict[tuple[Where | None, str | None, float], Weights] = {}
        self.begin(0, 0)

    def begin(self, drawn: int, copies: int) -> None:
        """Go on after so many draws and copies, with keys of the present seed and stream."""
        self._keys: dict[str, Keys] = {}
        # An iterator: a signal handler that draws cannot get the same number.
        self._numbers = iter(range(drawn + 1, MAX_DRAWS))
        self.pickles, self._forks_before = copies, system.forks

    @property
    def drawn(self) -> int:
        """How many draws `sample` made."""
        return MAX_DRAWS - 1 - operator.length_hint(self._numbers)

    @property
    def copies(self) -> int:
        """How many copies were made: by forks and by pickling."""
        return self.pickles + system.forks - self._forks_before

    def next_number(self) -> int:
        """The number of the next draw of `sample`."""
        return next(self._numbers)

    def become_copy(self, copy: str) -> None:
        """From here on this is a copy of its own, which draws what no other copy draws."""
        self.copy += f" {copy}"
        self.begin(0, 0)

    def keys(self, store: Store, consumer: str) -> Keys:
        """The keys of a consumer. Each copy, and each DataLoader worker that reads, has others."""
        keys = self._keys.get(consumer)
        if keys is None:
            copy = self.copy if store.writable else self.copy + data_loader_worker()
            keys = self._keys[consumer] = self._hashed(consumer + copy)
        return keys

    def _hashed(self, consumer: str) -> Keys:
        return key_pair(f"draw {self._parameters.stream} {consumer}", self._parameters.seed)

    def check_size(self, store: Store, n: int, draw: Draw) -> None:
        """Raise ArgumentError for a draw of more than there is."""
        size = self.available(store, draw)
        if n > size and not ((draw.replace or draw.balance) and size):
            held, more = f"a buffer of {size}", "add samples first"
            if draw.weighted and store.size:
                held, more = f"{size} rows with {draw.name}", f"the buffer holds {store.size}"
            hint = "" if draw.replace or not size else f", draw at most {size}, or use replace=True"
            raise ArgumentError(f"sample of {n} from {held}; {more}{hint}")

    def available(self, store: Store, draw: Draw) -> int:
        """How many rows a draw can take."""
        return self.weights(store, draw).fits if draw.weighted and store.size else store.size

    def weights(self, store: Store, draw: Draw) -> Weighted:
        """The weights of all rows in the state of the store. Those of the last two kinds are kept."""
        key = draw.where, draw.by, draw.alpha
        weights = self._weights.pop(key, None) or Weights(self.values, *key)
        self._weights[key] = weights
        while len(self._weights) > MAX_WEIGHTS:
            self._weights.pop(next(iter(self._weights)))
        return weights.of(store)

    def forget(self) -> None:
        """Have all that follows from the rows worked out anew."""
        self._weights.clear()
        self.values.forget()

    def committed(self, store: Store, before: int, rows: Sequence[Ints]) -> None:
        """Note that a commit on top of number `before` has changed these rows (-1: none)."""
        for weights in self._weights.values():
            weights.note(store, before, rows)

    def read(self, store: Store, drawn: Drawn) -> tuple[Arrays, Ints]:
        """Read what was drawn. RowError in a reader that met a commit, so that a row fits no more."""
        arrays, index = store.read(drawn.rows)
        where = drawn.where
        if where is None or store.writable or not drawn.rows.shape[0]:
            return arrays, index
        if where.fits(self.values.of_read(store.layout.schema, where.name, arrays, index).reshape(-1)).all():
            return arrays, index
        raise RowError(f"rows of {store.path} changed while they were read")

    def rows(self, store: Store, n: int, draw: Draw, consumer: str, number: int) -> Drawn:
        """n live rows, of which there are enough: draw `number` of a consumer."""
        rows = np.empty(n, np.int64)
        if not n:
            return Drawn(rows, {})
        if draw.weighted and draw.balance is None:
            return self._by_weight(store, n, draw, consumer, number)
        if draw.balance is not None:
            return Drawn(self.balanced(store, n, draw, draw.balance, consumer, number), {}, draw.where)
        size, high = store.extent
        k0, k1 = self.keys(store, consumer)
        if size != high:
            rows = store.pick_live(n, lambda among, out: reservoir.draw(among, k0, k1, store.seen, number, draw.replace, out))
        else:
            reservoir.draw(size, k0, k1, store.seen, number, draw.replace, rows)
        return Drawn(rows, {})

    def _by_weight(self, store: Store, n: int, draw: Draw, consumer: str, number: int) -> Drawn:
        """n rows by their weights. Where those are 0 or 1, it is the uniform draw of the rows that
        fit, in order."""
        weights, rows, (k0, k1) = self.weights(store, draw), np.empty(n, np.int64), self.keys(store, consumer)
        if draw.by is None:
            reservoir.draw(weights.fits, k0, k1, store.seen, number, draw.replace, rows)
            sums.rows_at(weights.tree, weights.starts, rows.copy(), rows)
            return Drawn(rows, {}, draw.where)
        found = sums.draw_by_weight(weights.tree, weights.starts, k0, k1, store.seen, number, draw.replace, rows)
        if found < n:  # few rows weigh nearly everything
            left = weights.tree[: store.high].copy()
            left[rows[:found]] = 0.0
            rows[found:] = drawn_last(left, n - found, *self._hashed(f"{consumer} {self.copy} {store.seen} {number} last"))
        if "probability" in store.layout.schema.metadata_names:
            raise SchemaError(
                "metadata/probability: a draw by= puts the probabilities of its rows there; this buffer has a field of that name"
            )
        return Drawn(rows, {"probability": weights.tree[rows] / weights.total}, draw.where)

    def balanced(self, store: Store, n: int, draw: Draw, name: str, consumer: str, number: int) -> Ints:
        """n live rows, spread evenly over the values of a column.

        Of k values that a row has, each gets n // k rows, and n % k of them, a uniform draw of the
        k, get one more. Rows of one value are a uniform draw: distinct, unless there are fewer than
        that or `replace`. All come in uniformly shuffled order. So at each place of the batch every
        value is equally likely, and every row that has it.
        """
        groups = list(self.values.grouped(store, name).values())
        if draw.where is not None:
            fits = self.weights(store, draw).tree > 0.0
            groups = [rows for group in groups if (rows := group[fits[group]]).shape[0]]
        k0, k1 = self.keys(store, f"{consumer} balanced")
        step = 2 * len(groups) + 2  # draws that one batch may need

        def drawn(among: int, count: int, which: int, replace: bool = False) -> Ints:
            out = np.empty(count, np.int64)
            reservoir.draw(among, k0, k1, store.seen, number * step + which, replace, out)
            return out

        each, rest = divmod(n, len(groups))
        counts = np.full(len(groups), each)
        counts[drawn(len(groups), rest, 0)] += 1
        parts = [
            rows[drawn(rows.shape[0], count, 2 + i, draw.replace or count > rows.shape[0])]
            for i, (rows, count) in enumerate(zip(groups, counts.tolist(), strict=True))
            if count
        ]
        return np.concatenate(parts)[drawn(n, n, 1)]

    def stand_in(self, store: Store, size: int, index: int) -> int:
        """Which of `size` samples stands in for one that is gone: a uniform draw by its index."""
        out = np.empty(1, np.int64)
        reservoir.draw(size, *self._hashed("dataset"), store.seen, index, False, out)
        return int(out[0])


def data_loader_worker() -> str:
    """The DataLoader worker that this process is, by its seed; "" elsewhere."""
    workers = sys.modules.get("torch.utils.data")
    info = None if workers is None else workers.get_worker_info()
    return "" if info is None else f" worker {info.seed}"


class Process:
    """Which process this is, and how often it has unpickled which copy."""

    def __init__(self) -> None:
        self.forks = ""  # which fork of which fork
        self.loaded: dict[str, int] = {}  # by copy, the newest last

    def loading(self, copy: str) -> str:
        """The name of this unpickling of a copy."""
        times = self.loaded.pop(copy, -1) + 1
        while len(self.loaded) >= MAX_REMEMBERED:
            self.loaded.pop(next(iter(self.loaded)))
        self.loaded[copy] = times
        processes = sys.modules.get("multiprocessing.process")
        number = () if processes is None else processes.current_process()._identity
        return f" in {self.forks}/{'.'.join(map(str, number))} {times}"


PROCESS = Process()
