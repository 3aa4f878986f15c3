"""Which rows a draw takes: a function of (seed, stream, consumer, copy, samples seen, number)."""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..arrays import Ints
from ..errors import ArgumentError
from ..kernels import reservoir
from ..keys import key_pair
from ..storage import system
from ..storage.store import Store
from .parameters import Parameters
from .values import Values

MAX_DRAWS = 2**62
MAX_REMEMBERED = 10_000  # unpickled copies

Keys = tuple[np.uint64, np.uint64]


@dataclass(frozen=True)
class Draw:
    """How rows are drawn. The value goes from `sample`, loaders and learners down to `Draws`.

    replace: whether a row may come more than once. balance: name of the value by which rows are
    grouped, and drawn evenly; see `Values` and `Draws.balanced`.
    """

    replace: bool = False
    balance: str | None = None

    @staticmethod
    def of(replace: object = False, balance: object = None) -> Draw:
        """The draw of these arguments. Raises ArgumentError for wrong ones."""
        if not isinstance(replace, (bool, np.bool_)):
            raise ArgumentError(f"replace must be True or False, got {replace!r:.200}")
        if balance is not None and not isinstance(balance, str):
            raise ArgumentError(f'balance is "group", "label" or the name of a metadata field, got {balance!r:.200}')
        return Draw(bool(replace), balance)


UNIFORM = Draw()


class Drawn(NamedTuple):
    """Rows that were drawn, and what the metadata of samples says of the draw: (n,) arrays."""

    rows: Ints
    shown: dict[str, npt.NDArray[Any]]


class Draws:
    """The draws of one copy of a buffer: their count, their keys, and the count of its copies."""

    def __init__(self, parameters: Parameters, values: Values) -> None:
        self.copy = ""  # of a forked or unpickled copy: which one, for draws of its own
        self._parameters, self.values = parameters, values
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
        size = store.size
        if n > size and not ((draw.replace or draw.balance) and size):
            raise ArgumentError(
                f"sample of {n} from a buffer of {size}; add samples first"
                + ("" if draw.replace or not size else f", draw at most {size}, or use replace=True")
            )

    def rows(self, store: Store, n: int, draw: Draw, consumer: str, number: int) -> Drawn:
        """n live rows, of which there are enough: draw `number` of a consumer."""
        rows = np.empty(n, np.int64)
        if not n:
            return Drawn(rows, {})
        if draw.balance is not None:
            return Drawn(self.balanced(store, n, draw, draw.balance, consumer, number), {})
        size, high = store.extent
        k0, k1 = self.keys(store, consumer)
        if size != high:
            rows = store.pick_live(n, lambda among, out: reservoir.draw(among, k0, k1, store.seen, number, draw.replace, out))
        else:
            reservoir.draw(size, k0, k1, store.seen, number, draw.replace, rows)
        return Drawn(rows, {})

    def balanced(self, store: Store, n: int, draw: Draw, name: str, consumer: str, number: int) -> Ints:
        """n live rows, spread evenly over the values of a column.

        Of k values that a row has, each gets n // k rows, and n % k of them, a uniform draw of the
        k, get one more. Rows of one value are a uniform draw: distinct, unless there are fewer than
        that or `replace`. All come in uniformly shuffled order. So at each place of the batch every
        value is equally likely, and every row that has it.
        """
        groups = list(self.values.grouped(store, name).values())
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
