"""What a DataLoader gets: the datasets, the batches, and the count of those it handed out."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import ConcatDataset, DataLoader, Sampler

from ....arguments import call
from ....errors import ArgumentError, ModeError, RowError
from .batches import Batches


class Datasets(ConcatDataset[Any]):
    """Datasets one after the other. An item is (number of the dataset, its sample)."""

    def _locate(self, index: int) -> tuple[int, int, int]:
        """Find the dataset of an index: (its number, its first index, the index after its last)."""
        if not 0 <= index < len(self):
            raise RowError(f"index {index} out of range: the datasets have {len(self)} samples")
        which = bisect.bisect_right(self.cumulative_sizes, index)
        return which, self.cumulative_sizes[which - 1] if which else 0, self.cumulative_sizes[which]

    def __getitem__(self, index: int) -> tuple[int, Any]:
        which, first, _ = self._locate(index)
        return which, call(f"dataset {which}", self.datasets[which].__getitem__, index - first)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, Any]]:
        """Read a batch at once if its dataset can. All of a batch come from one dataset."""
        which, first, end = self._locate(indices[0])
        dataset: Any = self.datasets[which]
        if not callable(getattr(dataset, "__getitems__", None)) or min(indices) < first or max(indices) >= end:
            return [self[i] for i in indices]
        return [(which, sample) for sample in call(f"dataset {which}", dataset.__getitems__, [i - first for i in indices])]


class Collator:
    """Collates a batch of `Datasets` with the collator of its dataset."""

    def __init__(self, collators: list[Callable[[Any], Any]]) -> None:
        self.collators = collators

    def __call__(self, items: Sequence[tuple[int, Any]]) -> Any:
        which = {number for number, _ in items}
        if len(which) != 1:
            raise ArgumentError(f"a batch must come from one dataset, got samples of datasets {sorted(which)}; use batch_sampler as it is")
        number = which.pop()
        return call(f"the collator of dataset {number}", self.collators[number], [sample for _, sample in items])


class Progress:
    """How many batches were delivered, and where the next pass begins.

    Batches count from the start of a run that is never interrupted. start: where every pass begins,
    except the one after `resume`.
    """

    def __init__(self, start: int, total: int) -> None:
        self.start, self.total = start, total
        self.delivered = self.next = start

    @property
    def remaining(self) -> int:
        return max(0, self.total - self.next)

    def resume(self, position: int) -> None:
        """Let the next pass begin at batch `position`."""
        self.next = self.delivered = position

    def begin(self) -> int:
        """Begin a pass, and tell where."""
        self.delivered, self.next = self.next, self.start
        return self.delivered


class Pass:
    """One pass over batches. It tells its `Progress` what it delivered; an error ends it.

    queued: batches of indices that are read ahead; the first one goes with each delivery.
    """

    def __init__(self, progress: Progress, batches: Iterator[Any], queued: deque[list[int]] | None = None) -> None:
        self._progress, self._batches, self._queued = progress, batches, queued
        self._position = progress.begin()
        self._failed = False

    def __iter__(self) -> Pass:
        return self

    def __next__(self) -> Any:
        if self._failed:  # going on would skip a batch, uncounted
            raise ModeError("this pass ended with an error; to try that batch again: sampler.load_state_dict(sampler.state_dict()), iter()")
        try:
            batch = next(self._batches)
        except StopIteration:
            raise
        except BaseException:
            self._failed = True
            raise
        if self._queued:
            self._queued.popleft()
        self._position += 1
        self._progress.delivered = self._position
        return batch


class BatchSampler(Sampler[list[int]]):
    """Batches of indices for a DataLoader of the user's own.

    A batch counts as delivered when it is drawn, except if `position` says where to begin: then our
    own loader counts what it hands out, and its workers draw ahead of that.
    """

    def __init__(self, batches: Batches, progress: Progress) -> None:
        self.batches, self.progress = batches, progress
        self.position: int | None = None
        self.queued: deque[list[int]] = deque()  # batches that were drawn since then

    def __iter__(self) -> Iterator[list[int]]:
        if self.position is None:
            return self._drawn()
        self.queued = deque()
        return self._queueing(self.position, self.queued)

    def _queueing(self, position: int, queued: deque[list[int]]) -> Iterator[list[int]]:
        for batch in self.batches.since(position):
            queued.append(batch)
            yield batch

    def _drawn(self) -> Iterator[list[int]]:
        # The pass begins with its first batch: a DataLoader with workers calls iter() twice.
        yield from Pass(self.progress, self.batches.since(self.progress.next))

    def __len__(self) -> int:
        return self.progress.remaining


class Loader(DataLoader[Any]):
    """A DataLoader that counts which batches it handed out."""

    def __init__(self, datasets: Datasets, batches: Batches, progress: Progress, collator: Collator, **arguments: Any) -> None:
        self._indices, self._progress = BatchSampler(batches, progress), progress
        self._started: tuple[int, Any] | None = None  # where a pass begins, and its batches
        super().__init__(datasets, batch_sampler=self._indices, collate_fn=collator, **arguments)

    def start(self) -> None:
        """Begin loading the next pass now: its workers start, and read `prefetch_factor` batches.

        Without workers nothing is read ahead.
        """
        position = self._progress.next
        if self._started is None or self._started[0] != position:
            self._indices.position = position
            self._started = position, super().__iter__()

    def queued(self) -> list[list[int]]:
        """Give the batches that workers were given and that were not handed out yet, as indices.

        They are those of the latest pass, in order, and indices of `sampler.dataset`.
        """
        return list(self._indices.queued)

    def __iter__(self) -> Any:
        self.start()  # if that raises, no pass has begun
        assert self._started is not None
        (_, batches), self._started = self._started, None
        return Pass(self._progress, batches, self._indices.queued)
