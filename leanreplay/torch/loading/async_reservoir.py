"""Slow loading in background workers, while training iterates over what is loaded."""

from __future__ import annotations

import atexit
import contextlib
import copy
import inspect
import io
import logging
import multiprocessing
import operator
import os
import pickle
import queue
import random
import signal
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures import wait as first_done
from multiprocessing.connection import wait as first_ready
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Subset, default_collate, default_convert

from ...arguments import call, choice, instance, integer, length, required, required_function
from ...buffers.base import SlidingWindowBuffer
from ...errors import ArgumentError, LeanReplayError, ModeError, SchemaError, StateError, WorkerError
from ...keys import STREAM_BITS, key_pair
from ...samples.batch import stack
from ..data import BufferDataset

_PATIENCE = 5.0  # seconds that running jobs have to end before their processes are killed
_LOOK = 2.0  # seconds between looks at the workers, while waiting for them
_ENDLESS = 10_000  # failures in a row that end a source whose length is not known
_MOST = 2**40
_END = object()
_LOG = logging.getLogger("leanreplay")
_RUNNING: weakref.WeakSet[AsyncReservoir] = weakref.WeakSet()
Self = TypeVar("Self", bound="AsyncReservoir")  # typing has one of its own from Python 3.11 on


class AsyncReservoir:
    """Loads samples in background workers, and iterates over those that are loaded: fresh ones slowly replace old ones.

    An epoch is one iteration over a snapshot of the reservoir. It begins (in `iter`) by taking in the results that are ready and
    queueing new jobs, and waits for workers only while fewer than `min_reservoir_samples` are there. Entries leave first in, first
    out. Breaking off an epoch loses nothing; several may run at once, each with its own snapshot.

    source: what to load (paths, say): a map-style dataset, or anything that can be iterated again and again. It is read in
        the calling thread, and starts over when it ends.
    function: loads one sample; what it returns is one entry of the reservoir, a list too. With processes that are not forked it and
        the samples must be picklable, and with all processes its results. Before each job a process seeds `random`, `numpy.random`
        and torch from (seed, number of the job); threads share these generators with the training, and leave them alone.
    max_reservoir_samples, min_reservoir_samples: entries that the reservoir holds at most, and at least before an epoch.
    workers: processes or threads. max_jobs_at_once: jobs begun and not yet taken in; None: as many as workers; 0: no limit, the
        source is queued to its end (never do that with an endless one), and again when all is taken in.
    sampler: called with each snapshot (it has a length), gives the indices of the epoch: integers, or lists of them for batches.
        None: all in order. If it takes a `generator`, like torch's RandomSampler, it gets one seeded from (seed, epoch); if what it
        returns has a `set_epoch`, that is called with the number of the epoch.
    collate_fn: makes a list of entries a batch, or converts the one entry of a single index. By default torch's `default_collate`
        and `default_convert`; None: items as they are. What an epoch hands out are copies, which may be changed, but for objects that
        cannot be copied.
    maximum_number_of_samples_per_epoch: an epoch ends after so many; the last batch is cut.
    max_reservoir_replacement_size: entries taken in per epoch at most, beyond what the minimum needs.
    executor: "process" or "thread". mp_context: "fork", "spawn", "forkserver", a context of `multiprocessing`, or None: its default.
    on_error: what a failing job does: "raise" a WorkerError, or "skip" it, which is counted (`skipped`) and logged.
    flatten: a list that the function returns is one entry for each of its items.
    deterministic: the same batches whatever the workers' speed: an epoch takes in, and waits for, the jobs that were queued before
        it, in their order (at most `max_reservoir_replacement_size` entries). Give `max_jobs_at_once` if the number of workers may change.
    buffer: a SlidingWindowBuffer of at least `max_reservoir_samples` rows that holds the entries, on disk if it has a path, so that
        they may exceed RAM. They then are samples of one structure and come back as tensors. What it already holds counts
        as loaded. It is not closed with the reservoir.
    seed: of the choices above.

    Any exception that comes out of an iteration ends the workers first; jobs under way are dropped. Iterating again starts new ones.
    Not for use in several threads at once. Errors: ArgumentError; WorkerError for failing jobs and killed workers; ModeError when closed.

    >>> from leanreplay.torch import AsyncReservoir
    >>> def load(path):
    ...     return {"name": path, "pixels": [len(path)] * 3}
    >>> with AsyncReservoir(["a", "bb", "ccc"], load, 2, min_reservoir_samples=2, executor="thread", deterministic=True) as reservoir:
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
        self._pool: Executor | None = None
        if isinstance(source, Iterator):
            raise ArgumentError(f"source must be able to start over, but {type(source).__name__} can be iterated only once; give a list")
        if not isinstance(source, Iterable) and not (length(source) >= 0 and hasattr(source, "__getitem__")):
            raise ArgumentError(f"source must be iterable, or a map-style dataset with len(), got {type(source).__name__}")
        if length(source) == 0:
            raise ArgumentError("source is empty: there is nothing to load")
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
        self.sampler = (
            None if sampler is None else required_function("sampler", sampler, "a function, for instance torch's RandomSampler class")
        )
        self._seeded = self.sampler is not None and _takes_generator(self.sampler)
        self.collate_fn = collate_fn if collate_fn in (None, "default") else required_function("collate_fn", collate_fn)
        limit, replaced = maximum_number_of_samples_per_epoch, max_reservoir_replacement_size
        self.maximum_number_of_samples_per_epoch = integer("maximum_number_of_samples_per_epoch", limit, 1, _MOST)
        self.max_reservoir_replacement_size = integer("max_reservoir_replacement_size", replaced, 1, _MOST)
        for name, value, allowed in (("executor", executor, ("process", "thread")), ("on_error", on_error, ("raise", "skip"))):
            choice(name, value, allowed)
        self.executor, self.on_error, self.mp_context = executor, on_error, _context(mp_context)
        self.flatten, self.deterministic = bool(flatten), bool(deterministic)
        self.seed = integer("seed", seed, -(2**127), 2**127 - 1) or 0
        self._entries = _Memory(self.max_reservoir_samples) if buffer is None else _Window(buffer, self.max_reservoir_samples)
        self.epoch = 0
        self.skipped = 0
        self._items: Iterator[Any] | None = None  # of the source
        self._given = 0  # samples of this pass through the source
        self._pass = max(0, length(source))  # samples of a whole pass; 0: not known yet
        self._jobs: dict[Future[Any], tuple[int, Any]] = {}  # (number, sample) of those not yet taken in, oldest first
        self._number = 0  # of jobs so far
        self._good = -1  # number of the newest job that gave an entry
        self._done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()  # of the present pool, unless `deterministic`
        self._processes = _Processes(self.mp_context)  # of the present pool
        self._left: deque[tuple[Any, int, Any]] = deque()  # (entry, number, sample) of results that had no room in their epoch
        self._times = {name: [0.0, 0] for name in ("sending", "receiving", "waiting")}

    # -- iterating ---------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        self._require()
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
        """Take in what is ready, and queue new jobs; wait only for what the minimum needs, or for those that `deterministic` says."""
        room = self.max_reservoir_replacement_size or sys.maxsize
        due = len(self._jobs) if self.deterministic else 0
        while True:
            need = self.min_reservoir_samples - len(self._entries)
            if room <= 0 and need <= 0:
                break
            if self._left:
                room -= self._absorb(max(room, need))
                continue
            if need > 0:
                self._queue()
            job = self._next_job(wait=need > 0 or due > 0)
            if job is None:
                break
            due -= 1
            self._receive(job)
        self._queue()

    def _order(self, snapshot: Sequence[Any]) -> Iterator[Any]:
        if self.sampler is None:
            return iter(range(len(snapshot)))
        order = self.sampler(snapshot, **({"generator": self._generator(f"epoch {self.epoch}")} if self._seeded else {}))
        if hasattr(order, "set_epoch"):
            order.set_epoch(self.epoch)
        instance(order, Iterable, "sampler(snapshot) must return an iterable of indices")
        return iter(order)

    def _batches(self, snapshot: Sequence[Any], order: Iterator[Any]) -> Iterator[Any]:
        room = self.maximum_number_of_samples_per_epoch or sys.maxsize
        while room > 0:
            self._require()
            try:
                index: Any = next(order, _END)
                if index is _END:
                    return
                batched = isinstance(index, Iterable) and getattr(index, "ndim", 1) > 0
                indices = [operator.index(i) for i in (index if batched else [index])][:room]
                room -= len(indices)
                batch = self._collated(_picked(snapshot, indices), batched)
            except BaseException:
                self._stop()
                raise
            yield batch

    def _collated(self, entries: list[Any], batched: bool) -> Any:
        if batched and self.collate_fn == "default":
            return default_collate(entries)
        if not isinstance(self._entries, _Window):  # what is read from a buffer is a copy already
            entries = [_own(entry) for entry in entries]
        batch = entries if batched else entries[0]
        if self.collate_fn is None:
            return batch
        return call("collate_fn", self.collate_fn, batch) if callable(self.collate_fn) else default_convert(batch)  # type: ignore[no-untyped-call]

    # -- jobs --------------------------------------------------------------------------------------------------------

    def _queue(self) -> None:
        """Begin jobs, up to `max_jobs_at_once`."""
        while len(self._jobs) < (self.max_jobs_at_once or sys.maxsize):
            unlimited = self.max_jobs_at_once == 0 and len(self._jobs) > 0
            if unlimited and self._items is None:
                return  # this pass is queued; the next one begins when it is taken in
            with self._timed("sending", 0):
                sample = self._next_sample()
            if sample is not _END:
                with self._timed("sending"):
                    self._submit(sample)

    def _next_sample(self) -> Any:
        """From the source; _END at the end of each pass."""
        if self._items is None:
            mapped = not isinstance(self.source, Iterable)
            self._items = (call("source", self.source.__getitem__, i) for i in range(len(self.source))) if mapped else iter(self.source)
            self._given = 0
        try:
            sample = next(self._items)
        except BaseException as error:
            self._items = None
            if not isinstance(error, StopIteration):
                raise
            if not self._given:
                raise ArgumentError("source is empty: there is nothing to load; it must be able to start over") from None
            self._pass = self._given
            return _END
        self._given += 1
        return sample

    def _submit(self, sample: Any) -> None:
        try:
            if self._pool is None:
                self._pool = self._start()
            if self.executor == "thread":
                job: Future[Any] = self._pool.submit(_attempt, self.function, sample)
            else:
                seed = int(key_pair(f"async reservoir, job {self._number}", self.seed)[0])
                packed = _pickled(sample, f"the sample {sample!r:.200}")
                with _no_interrupt():  # a process that begins now must not meet it before it ignores it
                    job = self._pool.submit(_job, packed, seed)
        except BrokenExecutor as error:
            raise self._killed() from error
        except LeanReplayError:
            raise
        except (OSError, RuntimeError) as error:
            self._stop()
            raise WorkerError(
                f"a worker cannot start: {error}; use fewer workers, or raise the limits of processes and descriptors (ulimit -u, -n). "
                "The jobs under way are lost"
            ) from error
        self._jobs[job] = self._number, sample
        self._number += 1
        if not self.deterministic:
            job.add_done_callback(self._done.put)

    def _start(self) -> Executor:
        self._pid = os.getpid()
        _RUNNING.add(self)
        if self.executor == "thread":
            return ThreadPoolExecutor(self.workers, "AsyncReservoir")
        self._processes = _Processes(self.mp_context)
        context: Any = self._processes
        function = self.function if context.get_start_method() == "fork" else _pickled(self.function, "the function")
        return ProcessPoolExecutor(self.workers, context, _start_worker, (function,))

    def _next_job(self, wait: bool) -> Future[Any] | None:
        """The job to take in next: the first that is done, or the oldest if `deterministic`. None: not now."""
        if not self._jobs or (self.deterministic and not wait):
            return None
        with self._timed("waiting") if wait else contextlib.nullcontext():
            stuck = False
            while (job := self._finished(_LOOK if wait else 0)) is None:
                if stuck:
                    raise self._killed()
                # The pool notices a dead worker at once, unless it died while sending: then the pool waits for the rest.
                stuck = self._processes.one_ended(self._pool)
                if not wait and not stuck:
                    return None
                wait = True
            return job

    def _finished(self, seconds: float) -> Future[Any] | None:
        """A job that is done, or will be within so many seconds."""
        if self.deterministic:
            oldest = next(iter(self._jobs))
            return oldest if first_done([oldest], seconds).done else None
        try:
            return self._done.get(seconds > 0, seconds)  # Python 3.10 waits for ever if it may wait for 0 seconds
        except queue.Empty:
            return None

    def _receive(self, job: Future[Any]) -> None:
        """Take the result of a job that is done."""
        number, sample = self._jobs.pop(job)
        with self._timed("receiving"):
            error: Any = None
            try:
                result = job.result()
                text, value = result if self.executor == "thread" else pickle.loads(result)
                if text is not None:
                    error = value if self.executor == "thread" else _unpickled(value)
            except BrokenExecutor as broken:
                raise self._killed() from broken
            except Exception as unreadable:
                text, error = traceback.format_exc(), unreadable
        if text is not None:
            self._failed(sample, text, error)
            return
        entries = value if self.flatten and isinstance(value, list) else [value]
        self._left.extend((entry, number, sample) for entry in entries)
        if not entries:
            self._gave_nothing(f"the last sample {sample!r:.200} gave an empty list")

    def _absorb(self, n: int) -> int:
        """Move up to n results into the reservoir; how many."""
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
        """Raise WorkerError if as many jobs as a whole pass has, one after the other, are done and gave nothing."""
        pending = [self._left[0][1]] if self._left else []
        pending.append(next(iter(self._jobs.values()))[0] if self._jobs else self._number)
        failed = min(pending) - 1 - self._good
        if failed >= (self._pass or _ENDLESS):
            raise WorkerError(f"none of the last {failed} jobs, a whole pass through the source, gave an entry; of the last: {message}")

    def _killed(self) -> WorkerError:
        self._stop()  # after which all of them have ended
        codes = [p.exitcode for p in self._processes.started() if p.exitcode]
        ends = sorted({signal.Signals(-c).name if c < 0 else f"exit code {c}" for c in codes})
        # The pool ends the other workers by SIGTERM.
        reason = ", ".join([e for e in ends if e != "SIGTERM"] or ends) or "unknown reason"
        return WorkerError(
            f"a worker ended unexpectedly ({reason}); the jobs under way are lost. SIGKILL often means that memory ran out (use fewer "
            "workers or smaller samples), exit code 1 that a worker could not start (it has said why above; spawned workers import the "
            "main script, which needs `if __name__ == '__main__':`). Iterating again starts new workers"
        )

    # -- what it is --------------------------------------------------------------------------------------------------

    def reservoir_size(self) -> int:
        """Entries that the reservoir holds now: 0 before the first epoch, unless a `buffer` held some."""
        self._require()
        return len(self._entries)

    @property
    def performance(self) -> dict[str, dict[str, float]]:
        """Where the calling thread's time went: {"sending" | "receiving" | "waiting": {"seconds", "count", "average"}}.

        sending: reading the source and handing out jobs, per sample. receiving: unpacking and storing, per job. waiting: for workers,
        per result waited for. average: seconds each, 0 where there was none.
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
        """A new reservoir over n samples of the source, drawn from (seed, n) without replacement, in the source's order.

        The source needs `len` and `[i]`, or a `subsample(n)` of its own. Other arguments are the same, except that the sizes of the
        reservoir are n at most (not with `flatten`), and that it is held in memory.

        >>> from leanreplay.torch import AsyncReservoir
        >>> few = AsyncReservoir(list(range(100)), abs, 10, executor="thread").subsample(3)
        >>> len(few.source), few.max_reservoir_samples
        (3, 3)
        """
        self._require()
        n = required("n", n, 1, _MOST)
        if hasattr(self.source, "subsample"):
            return self._like(self.source.subsample(n), n)
        size = self._indexable("subsample")
        if n > size:
            raise ArgumentError(f"subsample({n}) of a source of {size} samples; ask for {size} at most")
        picked = torch.randperm(size, generator=self._generator(f"subsample {n}"))[:n]
        return self._like(Subset(self.source, sorted(picked.tolist())), n)

    def subsample_uids(
        self, uids: Iterable[Any], uids_name: str, new_sampler: Callable[..., Iterable[Any]] | None = None
    ) -> AsyncReservoir:
        """A new reservoir over those samples of the source whose `sample[uids_name]` is in uids, in the source's order.

        Reads the whole source (not the function), unless that has a `subsample_uids(uids, uids_name)` of its own. uids that no sample has
        are ignored, but ArgumentError if none has any. new_sampler: in place of `sampler`. Otherwise as `subsample`.

        >>> from leanreplay.torch import AsyncReservoir
        >>> cases = AsyncReservoir([{"uid": i} for i in range(100)], dict, 10, executor="thread")
        >>> list(cases.subsample_uids([7, 8], "uid").source)
        [{'uid': 7}, {'uid': 8}]
        """
        self._require()
        if hasattr(self.source, "subsample_uids"):
            source = self.source.subsample_uids(uids, uids_name)
            return self._like(source, max(0, length(source)), new_sampler)
        wanted = {_uid(uid) for uid in uids}
        found = []
        for i in range(self._indexable("subsample_uids")):
            sample = self.source[i]
            try:
                uid = _uid(sample[uids_name])
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise ArgumentError(f"sample {i} of the source has no {uids_name!r} that is one uid: {error!r:.200}") from error
            if uid in wanted:
                found.append(i)
        if not found:
            raise ArgumentError(f"no sample of the source has a {uids_name!r} among {list(wanted)!r:.200}")
        return self._like(Subset(self.source, found), len(found), new_sampler)

    def _indexable(self, name: str) -> int:
        size = length(self.source)
        if size < 0 or not hasattr(self.source, "__getitem__"):
            raise ArgumentError(f"{name} needs a source with len() and [i], or with a {name} of its own, got {type(self.source).__name__}")
        return size

    def _like(self, source: Any, n: int, sampler: Any = None) -> AsyncReservoir:
        most = n if n and not self.flatten else sys.maxsize
        return AsyncReservoir(
            source,
            self.function,
            min(self.max_reservoir_samples, most),
            min_reservoir_samples=min(self.min_reservoir_samples, most),
            workers=self.workers,
            max_jobs_at_once=self.max_jobs_at_once,
            sampler=sampler or self.sampler,
            collate_fn=self.collate_fn,
            maximum_number_of_samples_per_epoch=self.maximum_number_of_samples_per_epoch,
            max_reservoir_replacement_size=self.max_reservoir_replacement_size,
            executor=self.executor,
            mp_context=self.mp_context,
            on_error=self.on_error,
            flatten=self.flatten,
            deterministic=self.deterministic,
            seed=self.seed,
        )

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(int(key_pair(f"async reservoir, {purpose}", self.seed)[0] >> np.uint64(1)))

    # -- ending ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the workers, drop the entries, and close the source if it has a `close`. Closing twice is fine.

        Jobs that have not begun are dropped. Processes get 5 seconds to end theirs, then they are killed; threads can only be waited for.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._stop()
        finally:
            self._items = None
            self._left.clear()
            self._entries = _Memory(1)
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

    def _require(self) -> None:
        if self._closed:
            raise ModeError("this AsyncReservoir is closed; make a new one")
        if self._pool is not None and self._pid != os.getpid():
            raise ModeError("this AsyncReservoir is a forked copy of one whose workers belong to another process; make a new one here")

    def _stop(self) -> None:
        """End the pool and forget its jobs: afterwards no thread, process, descriptor or semaphore of it is left."""
        pool = self._pool
        if pool is None or self._pid != os.getpid():
            return
        self._pool = None
        self._jobs.clear()
        self._done = queue.SimpleQueue()
        self._good = self._number - 1  # what is dropped did not fail
        _RUNNING.discard(self)
        if isinstance(pool, ProcessPoolExecutor):
            self._processes.end(pool)
        else:
            pool.shutdown(cancel_futures=True)


# -- the processes ---------------------------------------------------------------------------------------------------


class _Processes:
    """A context of multiprocessing for one pool, which keeps what the pool makes by it: the processes, and the pipe of their results."""

    def __init__(self, context: Any) -> None:
        self._context = context or multiprocessing.get_context()
        self._made: list[Any] = []
        self._results: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def Process(self, *arguments: Any, **named: Any) -> Any:  # noqa: N802
        self._made.append(self._context.Process(*arguments, **named))
        return self._made[-1]

    def SimpleQueue(self) -> Any:  # noqa: N802
        self._results = self._context.SimpleQueue()
        return self._results

    def started(self) -> list[Any]:
        return [process for process in self._made if process.pid is not None]

    def one_ended(self, pool: Any) -> bool:
        """Whether a process has, or the pool's thread, which does when it cannot start another one."""
        manager = getattr(pool, "_executor_manager_thread", None)
        if manager is not None and not manager.is_alive():
            return True
        return bool(first_ready([process.sentinel for process in self.started()], 0)) if self._made else False

    def end(self, pool: ProcessPoolExecutor) -> None:
        """Shut the pool down, whatever its jobs do within `_PATIENCE`; `shutdown` would wait for them (Python 3.14 has `kill_workers`)."""
        manager = getattr(pool, "_executor_manager_thread", None)  # private; without it, its end would not be waited for
        pool.shutdown(wait=False, cancel_futures=True)
        until = time.monotonic() + _PATIENCE
        try:
            for process in self.started():
                process.join(max(0.0, until - time.monotonic()))
        finally:
            for process in self.started():
                if process.is_alive():
                    process.kill()
            writer = self._results._writer.fileno()
            os.set_blocking(writer, False)
            while manager is not None and manager.is_alive():
                # A worker that died while sending leaves the manager reading for ever: give it something to read, until it gives up.
                with contextlib.suppress(BlockingIOError):
                    os.write(writer, bytes(1 << 16))
                manager.join(0.01)
            self._results.close()
            self._results = None  # and with it its semaphores
            for process in self.started():
                process.join()


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Ctrl-C waits, in this thread and for the processes that it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop_all() -> None:
    """When the interpreter ends, before the pools' own handler, which would wait for every job that is queued."""
    for reservoir in list(_RUNNING):
        reservoir._stop()


getattr(threading, "_register_atexit", atexit.register)(_stop_all)

_work: Any = None  # of a worker process: the function, pickled until the first job unless it was forked


def _start_worker(function: Any) -> None:
    global _work  # noqa: PLW0603
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends these
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # as DataLoader does: OpenMP's threads do not survive a fork, and workers share the cores
    _work = function


def _end_with_parent() -> None:
    """A worker that waits for a job would not notice that the parent was killed: its pipe is open in the other workers, too."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _job(sample: bytes, seed: int) -> bytes:
    """In a worker process: (None, result) or (traceback, pickled exception), pickled.

    Pickled here and plainly: multiprocessing's own pickling would send tensors by shared memory, with a descriptor each for as
    long as they live, and a result that cannot be pickled would not be known as that of its sample.
    """
    global _work  # noqa: PLW0603
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed >> 1)
    text: str | None = None
    try:
        if isinstance(_work, bytes):
            _work = pickle.loads(_work)
        text, value = _attempt(_work, pickle.loads(sample))
        if text is None:
            return _dumps((None, value))
        error = value
    except BaseException as wrong:
        text, error = traceback.format_exc(), wrong
    packed = None
    with contextlib.suppress(Exception):
        packed = _dumps(error)
    return _dumps((text, packed))


def _attempt(function: Callable[[Any], Any], sample: Any) -> tuple[str | None, Any]:
    """(None, result) or (traceback, exception)."""
    try:
        return None, function(sample)
    except BaseException as error:
        return traceback.format_exc(), error


# -- the entries -----------------------------------------------------------------------------------------------------


class _Memory:
    """The last `size` entries, in RAM."""

    def __init__(self, size: int) -> None:
        self._entries: deque[Any] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._entries)

    def append(self, entry: Any) -> None:
        self._entries.append(entry)

    def snapshot(self) -> Sequence[Any]:
        return tuple(self._entries)


class _Window(_Memory):
    """The last `size` entries, in a buffer."""

    def __init__(self, buffer: SlidingWindowBuffer, size: int) -> None:
        instance(buffer, SlidingWindowBuffer, "buffer must be a leanreplay.SlidingWindowBuffer")
        if buffer.max_size < size:
            raise ArgumentError(f"buffer has {buffer.max_size} rows, but max_reservoir_samples is {size}; give it as many rows")
        self._buffer, self._size = buffer, size

    def __len__(self) -> int:
        return min(self._size, len(self._buffer))

    def append(self, entry: Any) -> None:
        self._buffer.add(stack([entry]))

    def snapshot(self) -> Sequence[Any]:
        return _Rows(self._buffer, len(self))


class _Rows(Sequence[Any]):
    """The newest n samples of a buffer, oldest first: read when asked for, and an error if they have been replaced since."""

    def __init__(self, buffer: SlidingWindowBuffer, n: int) -> None:
        self._data, self._n, self._capacity = BufferDataset(buffer, metadata=True), n, buffer.max_size
        self._first = buffer.seen - n
        # The rows are a ring, in which the position of this row is one place.
        self._row_0 = int(buffer.get_metadata("position", [0])[0]) % 2**STREAM_BITS

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: Any) -> Any:
        return self.pick([index])[0]

    def pick(self, indices: list[int]) -> list[Any]:
        """Several in one read."""
        positions = [self._first + range(self._n)[i] for i in indices]
        found = self._data.__getitems__([(p - self._row_0) % self._capacity for p in positions])
        for (_, meta), position in zip(found, positions, strict=True):
            if meta["position"] % 2**STREAM_BITS != position:
                raise StateError("a later epoch has replaced this entry in the buffer: end one epoch before beginning the next")
        return [sample for sample, _ in found]


# -- small things ----------------------------------------------------------------------------------------------------


def _picked(snapshot: Sequence[Any], indices: list[int]) -> list[Any]:
    try:
        return snapshot.pick(indices) if isinstance(snapshot, _Rows) else [snapshot[i] for i in indices]
    except IndexError as error:  # RowError is one
        raise ArgumentError(f"the sampler gave indices {indices!r:.200} for a snapshot of {len(snapshot)} entries") from error


def _own(value: Any) -> Any:
    """A copy of an entry, in which later epochs do not see what this one changes."""
    if type(value) in (list, tuple):
        return type(value)([_own(v) for v in value])
    if type(value) is dict:
        return {key: _own(v) for key, v in value.items()}
    if type(value) is torch.Tensor:
        return value.detach().clone().requires_grad_(value.requires_grad)  # deepcopy takes all that it is a view of
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return value.copy()
    try:
        return copy.deepcopy(value)
    except Exception:  # a lock or an open file, say, or something that holds one
        return value


def _takes_generator(sampler: Callable[..., Any]) -> bool:
    try:
        return "generator" in inspect.signature(sampler).parameters
    except (ValueError, TypeError):  # not every callable has a signature
        return False


def _context(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return multiprocessing.get_context(value)
        except ValueError:
            raise ArgumentError(f"mp_context is one of {multiprocessing.get_all_start_methods()} here, got {value!r}") from None
    if value is not None and not hasattr(value, "get_start_method"):
        raise ArgumentError(f"mp_context is the name of a start method or a context of multiprocessing, got {value!r:.200}")
    return value


def _uid(value: Any) -> Any:
    """A uid as a plain value that can be looked up: of an array or tensor its one number."""
    value = value.item() if hasattr(value, "item") else value
    hash(value)
    return value


def _pickled(value: Any, name: str) -> bytes:
    try:
        return _dumps(value)
    except Exception as error:
        raise ArgumentError(
            f"{name} cannot be sent to a worker process: {error!r:.200}; define functions and classes at the top of a module, "
            "or use executor='thread'"
        ) from error


class _Pickler(pickle.Pickler):
    """Plain tensors go as arrays: twenty times as fast as torch's own way for small ones, and a view without what it is a view of."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is torch.Tensor:
            with contextlib.suppress(TypeError, RuntimeError):  # bfloat16, on another device, sparse, with a gradient, ...
                return _tensor, (value.numpy(),)
        return NotImplemented


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(array)


def _dumps(value: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file, 5).dump(value)
    return file.getvalue()


def _unpickled(value: bytes | None) -> Any:
    if value is None:
        return None
    try:
        error = pickle.loads(value)
    except Exception:  # an exception whose class cannot make it anew; there still is its traceback
        return None
    return error if isinstance(error, BaseException) else None


def _worker_error(message: str, sample: Any) -> WorkerError:
    error = WorkerError(message)  # no variable of the frame that raises it, which would keep the reservoir in a cycle
    error.sample = sample
    return error
