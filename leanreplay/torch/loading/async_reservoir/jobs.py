"""The jobs of an AsyncReservoir: those begun and not yet taken in, and the pool that does them."""

from __future__ import annotations

import atexit
import os
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as first_done
from typing import Any

from ....errors import LeanReplayError, ModeError, WorkerError
from ....keys import key_pair
from .pool import Pool
from .worker import Outcome

_RUNNING: weakref.WeakSet[Jobs] = weakref.WeakSet()


class Jobs:
    """Loads samples in a pool, which starts with the first job and again after `stop`.

    make_pool: makes a pool that is not started. ordered: jobs are taken in as they were begun.
    """

    def __init__(self, make_pool: Callable[[], Pool], seed: int, ordered: bool) -> None:
        self._make_pool, self._seed, self._ordered = make_pool, seed, ordered
        self.pool: Pool | None = None
        self.pending: dict[Future[Any], tuple[int, Any]] = {}  # (number, sample), oldest first
        self.count = 0  # of all jobs so far
        self._done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()  # unless ordered

    @property
    def oldest(self) -> int:
        """The number of the oldest pending job, or of the next one."""
        return next(iter(self.pending.values()))[0] if self.pending else self.count

    def check_process(self) -> None:
        """Raise ModeError in a forked copy of running jobs."""
        if self.pool is not None and self._pid != os.getpid():
            raise ModeError("this AsyncReservoir is a forked copy of one whose workers belong to another process; make a new one here")

    def begin(self, sample: Any, number: int | None = None) -> None:
        """Queue the next job, or one of a number again. WorkerError if no worker can start."""
        number = self.count if number is None else number
        try:
            pool = self.pool or self._start()
            job = pool.submit(sample, int(key_pair(f"async reservoir, job {number}", self._seed)[0]))
        except LeanReplayError:
            raise
        except (OSError, RuntimeError) as error:
            raise WorkerError(
                f"a worker cannot start: {error}; use fewer workers, or raise the limits of processes and descriptors (ulimit -u, -n). "
                "The jobs under way are lost"
            ) from error
        self.pending[job] = number, sample
        self.count = number + 1
        if not self._ordered:
            job.add_done_callback(self._done.put)

    def _start(self) -> Pool:
        self._pid, self.pool = os.getpid(), self._make_pool()
        _RUNNING.add(self)
        self.pool.start()
        return self.pool

    def next_done(self, wait: bool) -> Future[Any] | None:
        """Choose the job to take in next: the first that is done, or the oldest if ordered.

        None: none is done, and the caller does not want to wait.
        """
        if not self.pending or (self._ordered and not wait):
            return None
        if self._ordered:
            oldest = next(iter(self.pending))
            first_done([oldest])
            return oldest
        try:
            return self._done.get(wait)
        except queue.Empty:
            return None

    def take(self, job: Future[Any]) -> tuple[int, Any, Outcome]:
        """Take a done job: (number, sample, outcome). Raises WorkerError if its worker died."""
        assert self.pool is not None
        return *self.pending.pop(job), self.pool.outcome(job)

    def stop(self) -> None:
        """End the pool and forget its jobs: no thread, process or descriptor of it is left."""
        pool = self.pool
        if pool is None or self._pid != os.getpid():
            return
        self.pool = None
        self.pending.clear()
        self._done = queue.SimpleQueue()
        _RUNNING.discard(self)
        pool.end()


def _stop_all() -> None:
    """End all workers with the interpreter, before it waits for every job that is queued."""
    for jobs in list(_RUNNING):
        jobs.stop()


getattr(threading, "_register_atexit", atexit.register)(_stop_all)
