"""AsyncReservoir: epochs over what background workers have loaded so far."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import operator
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import default_collate, default_convert

from .... import SlidingWindowBuffer
from ....arguments import call, choice, function_or_none, instance, integer, length, required, required_function
from ....errors import ArgumentError, ModeError, SchemaError, WorkerError
from ....keys import key_pair
from .entries import InBuffer, InMemory
from .jobs import Jobs
from .pool import Pool, context_named
from .source import END, Source, subsample, subsample_uids

ENDLESS = 10_000  # failures in a row that end a source whose length is not known
_MOST = 2**40
_LOG = logging.getLogger("leanreplay")
_KEPT = (  # by a reservoir over a part of the source
    *("workers", "max_jobs_at_once", "collate_fn", "maximum_number_of_samples_per_epoch", "max_reservoir_replacement_size"),
    *("executor", "mp_context", "on_error", "flatten", "deterministic", "seed"),
)
Self = TypeVar("Self", bound="AsyncReservoir")  # typing has one of its own from Python 3.11 on


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
        self._source = Source(source)
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
        size = self.max_reservoir_samples
        self._entries: InMemory | InBuffer = InMemory(size) if buffer is None else InBuffer(buffer, size)
        self.epoch = 0
        self.skipped = 0
        make_pool = functools.partial(Pool, self.workers, self.function, self.executor, self.mp_context)
        self._jobs = Jobs(make_pool, self.seed, self.deterministic)
        self._good = -1  # number of the newest job that gave an entry
        self._left: deque[tuple[Any, int, Any]] = deque()  # (entry, number, sample) of a later epoch
        self._times = {name: [0.0, 0] for name in ("sending", "receiving", "waiting")}

    # -- iterating ---------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        self._check_open()
        try:
            self._refresh()
            snapshot = self._entries.snapshot()
            order = self._order(snapshot)
        except BaseException:
            self._stop()
            raise
        self.epoch += 1
        return self._batches(snapshot, order)

    def _refresh(self) -> None:
        """Take in what is ready, and queue new jobs.

        It waits only for what the minimum needs, or for what `deterministic` says.
        """
        free = self.max_reservoir_replacement_size or sys.maxsize
        due = len(self._jobs.pending) if self.deterministic else 0
        while True:
            need = self.min_reservoir_samples - len(self._entries)
            if free <= 0 and need <= 0:
                break
            if self._left:
                free -= self._absorb(max(free, need))
                continue
            if need > 0:
                self._queue()
            wait = bool(self._jobs.pending) and (need > 0 or due > 0)
            with self._timed("waiting") if wait else contextlib.nullcontext():
                job = self._jobs.next_done(wait)
            if job is None:
                break
            due -= 1
            self._receive(job)
        self._queue()

    def _order(self, snapshot: Sequence[Any]) -> Iterator[Any]:
        if self.sampler is None:
            return iter(range(len(snapshot)))
        seeded = {"generator": self._generator(f"epoch {self.epoch}")} if _takes_generator(self.sampler) else {}
        order = self.sampler(snapshot, **seeded)
        if hasattr(order, "set_epoch"):
            order.set_epoch(self.epoch)
        instance(order, Iterable, "sampler(snapshot) must return an iterable of indices")
        return iter(order)

    def _batches(self, snapshot: Sequence[Any], order: Iterator[Any]) -> Iterator[Any]:
        left = self.maximum_number_of_samples_per_epoch or sys.maxsize
        while left > 0:
            self._check_open()
            try:
                index: Any = next(order, END)
                if index is END:
                    return
                batched = isinstance(index, Iterable) and getattr(index, "ndim", 1) > 0
                indices = [operator.index(i) for i in (index if batched else [index])][:left]
                left -= len(indices)
                batch = self._collated(snapshot, indices, batched)
            except BaseException:
                self._stop()
                raise
            yield batch

    def _collated(self, snapshot: Sequence[Any], indices: list[int], batched: bool) -> Any:
        stacked = batched and self.collate_fn == "default"  # which copies
        try:
            entries = self._entries.pick(snapshot, indices, copies=not stacked)
        except IndexError as error:  # RowError is one
            raise ArgumentError(f"the sampler gave indices {indices!r:.200} for a snapshot of {len(snapshot)} entries") from error
        if stacked:
            return default_collate(entries)
        batch = entries if batched else entries[0]
        if self.collate_fn is None:
            return batch
        return call("collate_fn", self.collate_fn, batch) if callable(self.collate_fn) else default_convert(batch)  # type: ignore[no-untyped-call]

    # -- jobs --------------------------------------------------------------------------------------

    def _queue(self) -> None:
        """Begin jobs, up to `max_jobs_at_once`."""
        pending = self._jobs.pending
        while len(pending) < (self.max_jobs_at_once or sys.maxsize):
            if self.max_jobs_at_once == 0 and pending and self._source.between_passes:
                return  # this pass is queued; the next one begins when it is taken in
            with self._timed("sending", 0):
                sample = self._source.next_sample()
            if sample is not END:
                with self._timed("sending"):
                    self._jobs.begin(sample)

    def _receive(self, job: Future[Any]) -> None:
        """Take the result of a job that is done."""
        with self._timed("receiving"):
            number, sample, (text, value) = self._jobs.take(job)
        if text is not None:
            self._failed(sample, text, value)
            return
        entries = value if self.flatten and isinstance(value, list) else [value]
        self._left.extend((entry, number, sample) for entry in entries)
        if not entries:
            self._gave_nothing(f"the last sample {sample!r:.200} gave an empty list")

    def _absorb(self, n: int) -> int:
        """Move up to n results into the reservoir, and count them."""
        taken = 0
        with self._timed("receiving", 0):
            while self._left and taken < n:
                entry, number, sample = self._left.popleft()
                try:
                    self._entries.append(entry)
                except SchemaError as error:
                    self._failed(sample, traceback.format_exc(), error)
                    continue
                self._good = max(self._good, number)
                taken += 1
        return taken

    def _failed(self, sample: Any, text: str, error: BaseException | None) -> None:
        message = f"loading the sample {sample!r:.200} failed in a worker:\n{text}"
        if self.on_error == "raise":
            raise _worker_error(f"{message}(on_error='skip' leaves such samples out)", sample) from error
        self.skipped += 1
        _LOG.warning("skipped (%d so far): %s", self.skipped, message)
        self._gave_nothing(message)

    def _gave_nothing(self, message: str) -> None:
        """Raise WorkerError if a whole pass of jobs in a row is done and gave nothing."""
        waiting = [self._left[0][1]] if self._left else []
        failed = min([*waiting, self._jobs.oldest]) - 1 - self._good
        if failed >= (self._source.samples_of_a_pass or ENDLESS):
            raise WorkerError(f"none of the last {failed} jobs, a whole pass through the source, gave an entry; of the last: {message}")

    # -- what it is --------------------------------------------------------------------------------

    def reservoir_size(self) -> int:
        """Count the entries: 0 before the first epoch, unless a `buffer` held some."""
        self._check_open()
        return len(self._entries)

    @property
    def performance(self) -> dict[str, dict[str, float]]:
        """Where the calling thread spent its time, in seconds.

        {"sending" | "receiving" | "waiting": {"seconds", "count", "average"}}. sending: reading the
        source and handing out jobs, per sample. receiving: unpacking and storing, per job. waiting:
        for workers, per result waited for. average: 0 where there was none.
        """
        return {
            name: {"seconds": spent, "count": count, "average": spent / count if count else 0.0}
            for name, (spent, count) in self._times.items()
        }

    @contextlib.contextmanager
    def _timed(self, name: str, count: int = 1) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._times[name][0] += time.perf_counter() - start
            self._times[name][1] += count

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
        """Make a new reservoir over the samples whose `sample[uids_name]` is in uids, in order.

        It reads the whole source (not the function), unless that has a `subsample_uids(uids,
        uids_name)` of its own. uids that no sample has are ignored, but ArgumentError if none has
        any. new_sampler: in place of `sampler`. Otherwise as `subsample`.

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
            self._stop()
        finally:
            self._source.end_pass()
            self._left.clear()
            self._entries = InMemory(1)
            close = getattr(self.source, "close", None)
            if callable(close):
                close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        try:  # noqa: SIM105 - when the interpreter ends, contextlib may be empty already
            self._stop()
        except Exception:
            pass

    def _check_open(self) -> None:
        if self._closed:
            raise ModeError("this AsyncReservoir is closed; make a new one")
        self._jobs.check_process()

    def _stop(self) -> None:
        self._jobs.stop()
        self._good = self._jobs.count - 1  # what was dropped did not fail


def _takes_generator(sampler: Callable[..., Any]) -> bool:
    try:
        return "generator" in inspect.signature(sampler).parameters
    except (ValueError, TypeError):  # not every callable has a signature
        return False


def _worker_error(message: str, sample: Any) -> WorkerError:
    error = WorkerError(message)  # a variable of the frame that raises it would make a cycle
    error.sample = sample
    return error
