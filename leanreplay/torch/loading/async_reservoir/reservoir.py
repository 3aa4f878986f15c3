"""AsyncReservoir: epochs over what background workers have loaded so far."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import default_collate, default_convert

from .... import SlidingWindowBuffer
from ....arguments import call, choice, function_or_none, instance, integer, length, required, required_function
from ....errors import ArgumentError, ModeError, StateError
from ....keys import key_pair
from ..states import check_state, is_count
from .entries import InBuffer, InMemory
from .intake import FIELDS, Intake
from .jobs import Jobs
from .pool import Pool, context_named
from .source import END, Source, subsample, subsample_uids

_MOST = 2**40
_KEPT = (  # by a reservoir over a part of the source
    *("workers", "max_jobs_at_once", "collate_fn", "maximum_number_of_samples_per_epoch", "max_reservoir_replacement_size"),
    *("executor", "mp_context", "on_error", "flatten", "deterministic", "seed"),
)
Self = TypeVar("Self", bound="AsyncReservoir")  # typing has one of its own from Python 3.11 on


@dataclasses.dataclass
class _Place:
    """How many batches an epoch handed out; None before it, and after its end."""

    batches: int | None


class AsyncReservoir:
    """Loads samples in background workers, and iterates over those that are loaded.

    An epoch is one iteration over a snapshot of the reservoir. It begins (in `iter`) by taking in
    the results that are ready and queueing new jobs. It waits for workers only while there are
    fewer than `min_reservoir_samples`. Entries leave first in, first out, so fresh ones slowly
    replace old ones. Breaking off an epoch loses nothing. Several epochs may run at once, each with
    its own snapshot.

    source: what to load (paths, say): a map-style dataset, or anything that can be iterated again
        and again. The calling thread reads it, and starts over when it ends.
    function: loads one sample. What it returns is one entry of the reservoir, a list too. All
        processes need results that can be pickled; processes that are not forked need it of the
        function and the samples. Before each job a process seeds `random`, `numpy.random` and torch
        from (seed, number of the job). Threads share these generators with the training, and leave
        them alone.
    max_reservoir_samples, min_reservoir_samples: entries that the reservoir holds at most, and at
        least before an epoch.
    workers: processes or threads.
    max_jobs_at_once: jobs begun and not yet taken in. None: as many as workers. 0: no limit; the
        source is queued to its end (never do that with an endless one), and again when all is
        taken in.
    sampler: called with each snapshot (it has a length). It gives the indices of the epoch:
        integers, or lists of them for batches. None: all in order. If it takes a `generator`, like
        torch's RandomSampler, it gets one seeded from (seed, epoch). If what it returns has a
        `set_epoch`, that is called with the number of the epoch.
    collate_fn: makes a list of entries a batch, or converts the one entry of a single index. By
        default torch's `default_collate` and `default_convert`; None: items as they are. An epoch
        hands out copies, which may be changed, except for objects that cannot be copied.
    maximum_number_of_samples_per_epoch: an epoch ends after so many; the last batch is cut.
    max_reservoir_replacement_size: entries taken in per epoch at most, beyond what the minimum
        needs.
    executor: "process" or "thread".
    mp_context: "fork", "spawn", "forkserver", a context of `multiprocessing`, or None: its default.
    on_error: what a failing job does: "raise" a WorkerError, or "skip" it, which is counted
        (`skipped`) and logged.
    flatten: a list that the function returns is one entry for each of its items.
    deterministic: the same batches whatever the workers' speed. An epoch takes in, and waits for,
        the jobs that were queued before it, in their order (at most
        `max_reservoir_replacement_size` entries). Give `max_jobs_at_once` if the number of workers
        may change.
    buffer: a SlidingWindowBuffer of at least `max_reservoir_samples` rows that holds the entries,
        on disk if it has a path, so that they may exceed RAM. They then are samples of one
        structure and come back as tensors. What it already holds counts as loaded. It is not closed
        with the reservoir.
    seed: of the choices above.

    An exception that comes out of an iteration ends the workers first; jobs under way are dropped.
    Iterating again starts new workers. Not for several threads at once. Errors: ArgumentError;
    WorkerError for failing jobs and killed workers; ModeError when closed.

    >>> from leanreplay.torch import AsyncReservoir
    >>> def load(path):
    ...     return {"name": path, "pixels": [len(path)] * 3}
    >>> options = {"min_reservoir_samples": 2, "executor": "thread", "deterministic": True}
    >>> with AsyncReservoir(["a", "bb", "ccc"], load, 2, **options) as reservoir:
    ...     for epoch in range(3):
    ...         print([entry["name"] for entry in reservoir])
    ['a', 'bb']
    ['bb', 'ccc']
    ['ccc', 'a']
    """

    def __init__(
        self,
        source: Any,
        function: Callable[[Any], Any],
        max_reservoir_samples: int,
        *,
        min_reservoir_samples: int = 1,
        workers: int = 1,
        max_jobs_at_once: int | None = None,
        sampler: Callable[..., Iterable[Any]] | None = None,
        collate_fn: Callable[[Any], Any] | str | None = "default",
        maximum_number_of_samples_per_epoch: int | None = None,
        max_reservoir_replacement_size: int | None = None,
        executor: str = "process",
        mp_context: Any = None,
        on_error: str = "raise",
        flatten: bool = False,
        deterministic: bool = False,
        buffer: SlidingWindowBuffer | None = None,
        seed: int = 0,
    ) -> None:
        self._closed = False
        self.source = source
        self.function: Callable[[Any], Any] = required_function("function", function)
        self.max_reservoir_samples = required("max_reservoir_samples", max_reservoir_samples, 1, _MOST)
        self.min_reservoir_samples = required("min_reservoir_samples", min_reservoir_samples, 1, _MOST)
        if self.min_reservoir_samples > self.max_reservoir_samples:
            raise ArgumentError(
                f"min_reservoir_samples={min_reservoir_samples} can never be reached with max_reservoir_samples={max_reservoir_samples}; "
                "lower the one or raise the other"
            )
        self.workers = required("workers", workers, 1, _MOST)
        self.max_jobs_at_once = required("max_jobs_at_once", self.workers if max_jobs_at_once is None else max_jobs_at_once, 0, _MOST)
        self.sampler = function_or_none("sampler", sampler, "a function, for instance torch's RandomSampler class")
        self.collate_fn = collate_fn if collate_fn in (None, "default") else required_function("collate_fn", collate_fn)
        limit, replaced = maximum_number_of_samples_per_epoch, max_reservoir_replacement_size
        self.maximum_number_of_samples_per_epoch = integer("maximum_number_of_samples_per_epoch", limit, 1, _MOST)
        self.max_reservoir_replacement_size = integer("max_reservoir_replacement_size", replaced, 1, _MOST)
        choice("executor", executor, ("process", "thread"))
        choice("on_error", on_error, ("raise", "skip"))
        self.executor, self.on_error, self.mp_context = executor, on_error, context_named(mp_context)
        self.flatten, self.deterministic = bool(flatten), bool(deterministic)
        self.seed = integer("seed", seed, -(2**127), 2**127 - 1) or 0
        self.epoch = 0
        make_pool = functools.partial(Pool, self.workers, self.function, self.executor, self.mp_context)
        entries = InMemory(self.max_reservoir_samples) if buffer is None else InBuffer(buffer, self.max_reservoir_samples)
        jobs = Jobs(make_pool, self.seed, self.deterministic)
        self._intake = Intake(Source(source), jobs, entries, self.max_jobs_at_once, self.flatten, on_error == "skip")
        self._place = _Place(None)  # in the latest epoch
        self._resumes = False  # whether the next epoch goes on from that place

    # -- iterating ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin loading now, not with the first epoch: queue jobs, up to `max_jobs_at_once`.

        >>> from leanreplay.torch import AsyncReservoir
        >>> options = {"max_jobs_at_once": 3, "executor": "thread"}
        >>> with AsyncReservoir(range(9), abs, 5, **options) as reservoir:
        ...     reservoir.start()
        ...     reservoir.queued()
        [0, 1, 2]
        """
        self._check_open()
        with self._stopping_on_error():
            self._intake.queue()

    def queued(self) -> list[Any]:
        """Give the samples whose jobs were begun and not yet taken in, oldest first."""
        self._check_open()
        return [sample for _, sample in self._intake.jobs.pending.values()]

    def __iter__(self) -> Iterator[Any]:
        self._check_open()
        done = self._place.batches or 0 if self._resumes else 0
        with self._stopping_on_error():
            if not self._resumes:
                self._refresh()
            snapshot = self._intake.entries.snapshot()
            order = self._order(snapshot, self.epoch - self._resumes)
        self.epoch += not self._resumes
        self._place, self._resumes = _Place(done), False
        return self._batches(snapshot, order, self._place, done)

    def _refresh(self) -> None:
        """Take in what is ready, and queue new jobs.

        It waits only for what the minimum needs, or for what `deterministic` says.
        """
        intake, pending = self._intake, self._intake.jobs.pending
        free = self.max_reservoir_replacement_size or sys.maxsize
        due = len(pending) if self.deterministic else 0
        while True:
            need = self.min_reservoir_samples - len(intake.entries)
            if free <= 0 and need <= 0:
                break
            if intake.left:
                free -= intake.absorb(max(free, need))
                continue
            if need > 0:
                intake.queue()
            if not intake.receive(wait=bool(pending) and (need > 0 or due > 0)):
                break
            due -= 1
        intake.queue()

    def _order(self, snapshot: Sequence[Any], epoch: int) -> Iterator[Any]:
        if self.sampler is None:
            return iter(range(len(snapshot)))
        seeded = {"generator": self._generator(f"epoch {epoch}")} if _takes_generator(self.sampler) else {}
        order = self.sampler(snapshot, **seeded)
        if hasattr(order, "set_epoch"):
            order.set_epoch(epoch)
        instance(order, Iterable, "sampler(snapshot) must return an iterable of indices")
        return iter(order)

    def _batches(self, snapshot: Sequence[Any], order: Iterator[Any], place: _Place, done: int) -> Iterator[Any]:
        """Give the batches of an epoch but for the first `done`."""
        left = self.maximum_number_of_samples_per_epoch or sys.maxsize
        try:
            for number in itertools.count(1):
                self._check_open()
                with self._stopping_on_error():
                    index: Any = next(order, END) if left > 0 else END
                    if index is END:
                        return
                    batched = isinstance(index, Iterable) and getattr(index, "ndim", 1) > 0
                    indices = [operator.index(i) for i in (index if batched else [index])][:left]
                    left -= len(indices)
                    if number <= done:
                        continue
                    batch = self._collated(snapshot, indices, batched)
                place.batches = number
                yield batch
        finally:
            place.batches = None

    @contextlib.contextmanager
    def _stopping_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._intake.stop()
            raise

    def _collated(self, snapshot: Sequence[Any], indices: list[int], batched: bool) -> Any:
        stacked = batched and self.collate_fn == "default"  # which copies
        try:
            entries = self._intake.entries.pick(snapshot, indices, copies=not stacked)
        except IndexError as error:  # RowError is one
            raise ArgumentError(f"the sampler gave indices {indices!r:.200} for a snapshot of {len(snapshot)} entries") from error
        if stacked:
            return default_collate(entries)
        batch = entries if batched else entries[0]
        if self.collate_fn is None:
            return batch
        return call("collate_fn", self.collate_fn, batch) if callable(self.collate_fn) else default_convert(batch)  # type: ignore[no-untyped-call]

    # -- what it is --------------------------------------------------------------------------------

    def reservoir_size(self) -> int:
        """Count the entries: 0 before the first epoch, unless a `buffer` held some."""
        self._check_open()
        return len(self._intake.entries)

    @property
    def skipped(self) -> int:
        """How many failing jobs were left out, with on_error="skip"."""
        return self._intake.skipped

    @property
    def performance(self) -> dict[str, dict[str, float]]:
        """Where the calling thread spent its time, in seconds.

        {"sending" | "receiving" | "waiting": {"seconds", "count", "average"}}. sending: reading the
        source and handing out jobs, per sample. receiving: unpacking and storing, per job. waiting:
        for workers, per result waited for. average: 0 where there was none.
        """
        return self._intake.times.report()

    # -- state -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Give the state for a checkpoint, within an epoch too.

        It holds the entries, the samples of pending jobs, and how many batches of the latest epoch
        were handed out. `torch.load(weights_only=True)` takes it if samples and entries are tensors
        and plain values. Entries in a `buffer` are not in it: save the buffer's own state with it.

        >>> from leanreplay.torch import AsyncReservoir
        >>> options = {"min_reservoir_samples": 3, "executor": "thread", "deterministic": True}
        >>> def make():
        ...     return AsyncReservoir(range(9), abs, 3, collate_fn=None, **options)
        >>> with make() as reservoir:
        ...     for entry in reservoir:
        ...         if entry == 1:
        ...             state = reservoir.state_dict()
        >>> with make() as again:
        ...     again.load_state_dict(state)
        ...     list(again), list(again)
        ([2], [1, 2, 3])
        """
        self._check_open()
        return {"format": 1, "epoch": self.epoch, "batches": self._place.batches, **self._intake.state(), "of": self._settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, and begin its pending jobs again.

        The next epoch gives the batches that the latest one still had to give, unless that had
        ended or was broken off. If `deterministic`, all epochs then are what they would have been:
        no entry is lost and none comes twice. The source must give the same samples, the function
        the same entries, and the sampler must take a `generator` or have no random order. A
        `buffer` must get its state of the same checkpoint too, before or after. Raises StateError
        for a state of other arguments. `workers` and `executor` may differ.
        """
        self._check_open()
        fields = {"epoch": is_count, "batches": lambda value: value is None or is_count(value), **FIELDS}
        check_state(state, "an AsyncReservoir", fields, self._settings)
        if (state["entries"] is None) != self._settings["buffer"] or len(state["entries"] or ()) > self.max_reservoir_samples:
            raise StateError("the state's entries do not fit this AsyncReservoir; it is damaged")
        with self._stopping_on_error():
            self._intake.resume(state)
        self.epoch, self._place = state["epoch"], _Place(state["batches"])
        self._resumes = state["batches"] is not None

    @property
    def _settings(self) -> dict[str, Any]:
        """The arguments that a state must agree with."""
        names = (
            *("max_reservoir_samples", "min_reservoir_samples", "max_jobs_at_once", "maximum_number_of_samples_per_epoch"),
            *("max_reservoir_replacement_size", "flatten", "deterministic", "seed"),
        )
        return {
            **{name: getattr(self, name) for name in names},
            "samples": length(self.source),
            "buffer": isinstance(self._intake.entries, InBuffer),
        }

    # -- a part of the source ----------------------------------------------------------------------

    def subsample(self, n: int) -> AsyncReservoir:
        """Make a new reservoir over n samples of the source, in the source's order.

        They are drawn from (seed, n) without replacement. The source needs `len` and `[i]`, or a
        `subsample(n)` of its own. Other arguments are the same, except that the sizes of the
        reservoir are n at most (not with `flatten`), and that it is held in memory.

        >>> from leanreplay.torch import AsyncReservoir
        >>> few = AsyncReservoir(list(range(100)), abs, 10, executor="thread").subsample(3)
        >>> len(few.source), few.max_reservoir_samples
        (3, 3)
        """
        self._check_open()
        n = required("n", n, 1, _MOST)
        return self._over(subsample(self.source, n, self._generator(f"subsample {n}")), n)

    def subsample_uids(
        self, uids: Iterable[Any], uids_name: str, new_sampler: Callable[..., Iterable[Any]] | None = None
    ) -> AsyncReservoir:
        """Make a new reservoir over the samples whose `sample[uids_name]` is in uids.

        They come in the order of the uids, samples of one uid in the order of the source; if uids
        is a set, all do. It reads the whole source (not the function), unless that has a
        `subsample_uids(uids, uids_name)` of its own. uids that no sample has are ignored, but
        ArgumentError if none has any. new_sampler: in place of `sampler`. Otherwise as `subsample`.

        >>> from leanreplay.torch import AsyncReservoir
        >>> cases = AsyncReservoir([{"uid": i} for i in range(100)], dict, 10, executor="thread")
        >>> list(cases.subsample_uids([7, 8], "uid").source)
        [{'uid': 7}, {'uid': 8}]
        """
        self._check_open()
        source = subsample_uids(self.source, uids, uids_name)
        return self._over(source, max(0, length(source)), new_sampler)

    def _over(self, source: Any, n: int, sampler: Any = None) -> AsyncReservoir:
        """Make a reservoir over a part of the source, of n samples (0: who knows)."""
        most = n if n and not self.flatten else sys.maxsize
        sizes = min(self.max_reservoir_samples, most), min(self.min_reservoir_samples, most)
        options = {name: getattr(self, name) for name in _KEPT}
        return AsyncReservoir(source, self.function, sizes[0], min_reservoir_samples=sizes[1], sampler=sampler or self.sampler, **options)

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(int(key_pair(f"async reservoir, {purpose}", self.seed)[0] >> np.uint64(1)))

    # -- ending ------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the workers, drop the entries, and close the source if it has a `close`.

        Closing twice is fine. Jobs that have not begun are dropped. Processes get 5 seconds to end
        theirs, then they are killed. Threads can only be waited for.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._intake.stop()
        finally:
            self._intake.close()
            close = getattr(self.source, "close", None)
            if callable(close):
                close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        try:  # noqa: SIM105 - when the interpreter ends, contextlib may be empty already
            self._intake.stop()
        except Exception:
            pass

    def _check_open(self) -> None:
        if self._closed:
            raise ModeError("this AsyncReservoir is closed; make a new one")
        self._intake.jobs.check_process()


def _takes_generator(sampler: Callable[..., Any]) -> bool:
    try:
        return "generator" in inspect.signature(sampler).parameters
    except (ValueError, TypeError):  # not every callable has a signature
        return False
