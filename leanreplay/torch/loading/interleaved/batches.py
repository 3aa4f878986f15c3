"""The batches of indices that a schedule asks for, read from the samplers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from ....errors import ArgumentError
from .schedule import Schedule

_AHEAD = 64  # indices that small batches are cut from at a time


class Reader:
    """One sampler, read in batches. Its indices must lie in its own dataset: beyond lies another.

    name: what errors call the sampler. offset: where its dataset begins among all datasets.
    """

    def __init__(self, name: str, sampler: Any, dataset: Any, batch_size: int, offset: int) -> None:
        self.name, self.sampler, self.dataset = name, sampler, dataset
        self.length, self.batch_size, self.offset = len(sampler), batch_size, offset
        self.batches = -(-self.length // batch_size)

    def read_once(self) -> Iterator[list[int]]:
        """Read the whole sampler. Raises ArgumentError if it gives more than its length says."""
        indices = iter(self.sampler)
        yield from self.cut(indices, self.length, self.batch_size)
        if next(indices, None) is not None:
            raise ArgumentError(
                f"{self.name} gave more than the {self.length} indices that its length was; the length must be right, and stay the same"
            )

    def cut(self, indices: Iterator[int], count: int, batch_size: int) -> Iterator[list[int]]:
        """Cut the next `count` indices into batches. Raises ArgumentError for wrong indices."""
        step, size = batch_size * max(1, _AHEAD // batch_size), len(self.dataset)
        for start in range(0, count, step):
            n = min(step, count - start)
            some = self._checked(list(itertools.islice(indices, n)), n, size)
            for first in range(0, n, batch_size):
                yield some[first : first + batch_size]

    def _checked(self, some: list[int], n: int, size: int) -> list[int]:
        if len(some) < n:
            raise ArgumentError(f"{self.name} gave fewer indices than its length says; the length must be right, and stay the same")
        try:
            low, high = min(some), max(some)
            inside = low >= 0 and high < size
        except TypeError:
            raise ArgumentError(f"{self.name} gave {some[0]!r:.200}; a sampler must give single indices") from None
        if not inside:
            raise ArgumentError(f"{self.name} gave an index out of range ({low} to {high}), but its dataset has {size} samples")
        return [self.offset + index for index in some] if self.offset else some


class Batches:
    """All batches of indices of a run; `since` begins with any of them.

    schedule: None if nothing is trained; then each callback comes once.
    """

    def __init__(self, schedule: Schedule | None, training: Reader, callbacks: list[Reader]) -> None:
        self.schedule, self.training, self.callbacks = schedule, training, callbacks
        self.total = schedule.batches_after(schedule.end) if schedule else sum(callback.batches for callback in callbacks)

    def since(self, position: int) -> Iterator[list[int]]:
        """Give batch `position` and all that follow."""
        if self.schedule is None:
            everything = itertools.chain.from_iterable(callback.read_once() for callback in self.callbacks)
            return itertools.islice(everything, position, None)
        update, done = self.schedule.locate(position)
        return itertools.islice(self._updates(update, self.schedule), done, None)

    def _updates(self, update: int, schedule: Schedule) -> Iterator[list[int]]:
        """Give the batches of updates `update`, update + 1, ... and what is due after each."""
        epochs, sampler = schedule.epochs, self.training.sampler
        set_epoch = getattr(sampler, "set_epoch", None)
        due = [interval.next_due(update) for interval, _ in schedule.callbacks]
        while update < schedule.end:
            epoch, done = divmod(update, epochs.updates)
            if callable(set_epoch):
                set_epoch(epoch)
            indices = itertools.islice(sampler, done * epochs.batch_size, None)
            end = min(schedule.end, (epoch + 1) * epochs.updates)
            while update < end:
                stop = min([end, *due])
                yield from self.training.cut(indices, epochs.samples_after(stop) - epochs.samples_after(update), epochs.batch_size)
                update = stop
                for i, (interval, _) in enumerate(schedule.callbacks):
                    if due[i] == update:
                        yield from self.callbacks[i].read_once()
                        due[i] = interval.next_due(update)
