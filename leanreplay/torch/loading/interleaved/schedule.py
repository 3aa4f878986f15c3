"""Which batch comes when, as a closed form: a run can resume at any batch without replaying it.

Everything follows from `Interval.times_due`, a pure function of the number of updates: what is due,
how many batches there are, and where the n-th batch lies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

EVERY = ("every_n_epochs", "every_n_updates", "every_n_samples")  # the kinds of intervals


class Epochs:
    """How epochs (of n >= 1 samples), updates and samples count each other."""

    def __init__(self, n: int, batch_size: int, drop_last: bool) -> None:
        self.batch_size = min(batch_size, n)  # a batch that holds the whole epoch counts as full
        self.full = n // self.batch_size  # full batches of an epoch
        self.samples = self.full * self.batch_size if drop_last else n
        self.updates = -(-self.samples // self.batch_size)

    def samples_after(self, updates: int) -> int:
        """Count the samples of so many updates."""
        epochs, rest = divmod(updates, self.updates)
        return epochs * self.samples + rest * self.batch_size

    def updates_for(self, samples: int) -> int:
        """Count the fewest updates that reach so many samples."""
        epochs, rest = divmod(samples, self.samples)
        return epochs * self.updates + -(-rest // self.batch_size)


class Interval:
    """How often a callback is due. kind: a name of `EVERY`; n: the number of that name."""

    def __init__(self, epochs: Epochs, kind: str, n: int) -> None:
        self.epochs, self.kind, self.n = epochs, kind, n
        self.every_full_batch = kind == "every_n_samples" and n < epochs.batch_size
        if self.every_full_batch:
            # Every full batch holds a multiple of n, so the callback is due. The short last batch
            # of epoch e holds one if e * samples % n is less than its size. This repeats after at
            # most n epochs: hits[e] counts the short batches of the first e epochs that hold one.
            short, period = epochs.samples % epochs.batch_size, n // math.gcd(n, epochs.samples)
            self.hits = [0, *itertools.accumulate(int(e * epochs.samples % n < short) for e in range(1, period + 1))]

    def times_due(self, updates: int) -> int:
        """Count how often the callback is due in the first so many updates."""
        if self.kind == "every_n_updates":
            return updates // self.n
        epochs, rest = divmod(updates, self.epochs.updates)
        if self.kind == "every_n_epochs":
            return epochs // self.n
        if not self.every_full_batch:  # an update reaches at most one multiple
            return self.epochs.samples_after(updates) // self.n
        periods, beyond = divmod(epochs, len(self.hits) - 1)
        return epochs * self.epochs.full + rest + periods * self.hits[-1] + self.hits[beyond]

    def next_due(self, updates: int) -> int:
        """Find the first update after so many at which the callback is due."""
        if self.kind == "every_n_updates":
            return (updates // self.n + 1) * self.n
        if self.kind == "every_n_epochs":
            return (updates // self.epochs.updates // self.n + 1) * self.n * self.epochs.updates
        return self.epochs.updates_for((self.epochs.samples_after(updates) // self.n + 1) * self.n)


class Schedule:
    """The order of all batches: `end` updates, and behind each update the callbacks that are due.

    callbacks: (interval, batches of one pass) of each.
    """

    def __init__(self, epochs: Epochs, end: int, callbacks: list[tuple[Interval, int]]) -> None:
        self.epochs, self.end, self.callbacks = epochs, end, callbacks

    def batches_after(self, updates: int) -> int:
        """Count the batches of the first so many updates and of all callbacks due in them."""
        return updates + sum(interval.times_due(updates) * n for interval, n in self.callbacks)

    def locate(self, position: int) -> tuple[int, int]:
        """Find batch `position`: (updates that come before it, batches after these updates)."""
        updates = _last(0, min(position, self.end), lambda u: self.batches_after(u) <= position)
        return updates, position - self.batches_after(updates)


def _last(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Find the last number from low to high for which `holds` is true; it is true up to somewhere.

    (`bisect` takes no numbers of more than 63 bits.)
    """
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low
