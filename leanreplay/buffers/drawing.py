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

MAX_DRAWS = 2**62
MAX_REMEMBERED = 10_000  # unpickled copies

Keys = tuple[np.uint64, np.uint64]


@dataclass(frozen=True)
class Draw:
    """How rows are drawn. The value goes from `sample`, loaders and learners down to `Draws`.

    replace: whether a row may come more than once.
    """

    replace: bool = False

    @staticmethod
    def of(replace: object = False) -> Draw:
        """The draw of these arguments. Raises ArgumentError for wrong ones."""
        if not isinstance(replace, (bool, np.bool_)):
            raise ArgumentError(f"replace must be True or False, got {replace!r:.200}")
        return Draw(bool(replace))


UNIFORM = Draw()


class Drawn(NamedTuple):
    """Rows that were drawn, and what the metadata of samples says of the draw: (n,) arrays."""

    rows: Ints
    shown: dict[str, npt.NDArray[Any]]


class Draws:
    """The draws of one copy of a buffer: their count, their keys, and the count of its copies."""

    def __init__(self, parameters: Parameters) -> None:
        self.copy = ""  # of a forked or unpickled copy: which one, for draws of its own
        self._parameters = parameters
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
        if n > size and not (draw.replace and size):
            raise ArgumentError(
                f"sample of {n} from a buffer of {size}; add samples first"
                + ("" if draw.replace or not size else f", draw at most {size}, or use replace=True")
            )

    def rows(self, store: Store, n: int, draw: Draw, consumer: str, number: int) -> Drawn:
        """n live rows, of which there are enough: draw `number` of a consumer."""
        rows = np.empty(n, np.int64)
        if not n:
            return Drawn(rows, {})
        size, high = store.extent
        k0, k1 = self.keys(store, consumer)
        if size != high:
            rows = store.pick_live(n, lambda among, out: reservoir.draw(among, k0, k1, store.seen, number, draw.replace, out))
        else:
            reservoir.draw(size, k0, k1, store.seen, number, draw.replace, rows)
        return Drawn(rows, {})

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
