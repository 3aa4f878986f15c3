"""The way into an AsyncReservoir: samples of the source become jobs, and their results entries."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ....errors import SchemaError, WorkerError
from ..states import is_count
from .entries import InBuffer, InMemory
from .jobs import Jobs
from .source import END, Source

ENDLESS = 10_000  # failures in a row that end a source whose length is not known
_LOG = logging.getLogger("leanreplay")

FIELDS: dict[str, Callable[[Any], bool]] = {  # of a state, and which values are right
    "entries": lambda value: value is None or type(value) is list,
    "left": lambda value: type(value) is list and all(type(v) is tuple and len(v) == 3 and is_count(v[1]) for v in value),
    "pending": lambda value: type(value) is list and all(type(v) is tuple and len(v) == 2 and is_count(v[0]) for v in value),
    "jobs": is_count,
    "good": lambda value: type(value) is int and value >= -1,
    "skipped": is_count,
    "given": lambda value: value is None or is_count(value),
    "samples_of_a_pass": is_count,
}


class Times:
    """Where the calling thread spent its time."""

    def __init__(self) -> None:
        self._times = {name: [0.0, 0] for name in ("sending", "receiving", "waiting")}

    @contextlib.contextmanager
    def measured(self, name: str, count: int = 1) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._times[name][0] += time.perf_counter() - start
            self._times[name][1] += count

    def report(self) -> dict[str, dict[str, float]]:
        return {
            name: {"seconds": spent, "count": count, "average": spent / count if count else 0.0}
            for name, (spent, count) in self._times.items()
        }


class Intake:
    """Reads samples, begins jobs, and moves their results into the entries.

    skips: failing jobs are left out. Other arguments are those of the reservoir.
    """

    def __init__(self, source: Source, jobs: Jobs, entries: InMemory | InBuffer, max_jobs_at_once: int, flatten: bool, skips: bool) -> None:
        self.source, self.jobs, self.entries, self.times = source, jobs, entries, Times()
        self._most, self._flatten, self._skips = max_jobs_at_once, flatten, skips
        self.skipped = 0
        self._good = -1  # number of the newest job that gave an entry
        self.left: deque[tuple[Any, int, Any]] = deque()  # (entry, number, sample) of a later epoch

    def queue(self) -> None:
        """Begin jobs, up to `max_jobs_at_once`."""
        pending = self.jobs.pending
        while len(pending) < (self._most or sys.maxsize):
            if self._most == 0 and pending and self.source.between_passes:
                return  # this pass is queued; the next one begins when it is taken in
            with self.times.measured("sending", 0):
                sample = self.source.next_sample()
            if sample is not END:
                with self.times.measured("sending"):
                    self.jobs.begin(sample)

    def receive(self, wait: bool) -> bool:
        """Take the result of a job, if one is done or `wait` says so; whether there was one."""
        with self.times.measured("waiting") if wait else contextlib.nullcontext():
            job = self.jobs.next_done(wait)
        if job is None:
            return False
        with self.times.measured("receiving"):
            number, sample, (text, value) = self.jobs.take(job)
        if text is not None:
            self._failed(sample, text, value)
            return True
        entries = value if self._flatten and isinstance(value, list) else [value]
        self.left.extend((entry, number, sample) for entry in entries)
        if not entries:
            self._gave_nothing(f"the last sample {sample!r:.200} gave an empty list")
        return True

    def absorb(self, n: int) -> int:
        """Move up to n results into the entries, and count them."""
        taken = 0
        with self.times.measured("receiving", 0):
            while self.left and taken < n:
                entry, number, sample = self.left.popleft()
                try:
                    self.entries.append(entry)
                except SchemaError as error:
                    self._failed(sample, traceback.format_exc(), error)
                    continue
                self._good = max(self._good, number)
                taken += 1
        return taken

    def _failed(self, sample: Any, text: str, error: BaseException | None) -> None:
        message = f"loading the sample {sample!r:.200} failed in a worker:\n{text}"
        if not self._skips:
            raise _worker_error(f"{message}(on_error='skip' leaves such samples out)", sample) from error
        self.skipped += 1
        _LOG.warning("skipped (%d so far): %s", self.skipped, message)
        self._gave_nothing(message)

    def _gave_nothing(self, message: str) -> None:
        """Raise WorkerError if a whole pass of jobs in a row is done and gave nothing."""
        waiting = [self.left[0][1]] if self.left else []
        failed = min([*waiting, self.jobs.oldest]) - 1 - self._good
        if failed >= (self.source.samples_of_a_pass or ENDLESS):
            raise WorkerError(f"none of the last {failed} jobs, a whole pass through the source, gave an entry; of the last: {message}")

    def stop(self) -> None:
        """End the workers and drop their jobs."""
        self.jobs.stop()
        self._good = self.jobs.count - 1  # what was dropped did not fail

    def close(self) -> None:
        """Drop what was loaded."""
        self.source.end_pass()
        self.left.clear()
        self.entries = InMemory(1)

    # -- state -------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Give what `resume` goes on from. Entries are not copied: they never change."""
        return {
            "entries": self.entries.state(),
            "left": list(self.left),
            "pending": list(self.jobs.pending.values()),
            "jobs": self.jobs.count,
            "good": self._good,
            "skipped": self.skipped,
            "given": self.source.given,
            "samples_of_a_pass": self.source.samples_of_a_pass,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, and begin its pending jobs again, under their numbers."""
        self.jobs.stop()
        self.entries.load_state(state["entries"])
        self.left, self.skipped, self._good = deque(state["left"]), state["skipped"], state["good"]
        self.source.resume(state["given"], state["samples_of_a_pass"])
        for number, sample in state["pending"]:
            self.jobs.begin(sample, number)
        self.jobs.count = state["jobs"]


def _worker_error(message: str, sample: Any) -> WorkerError:
    error = WorkerError(message)  # a variable of the frame that raises it would make a cycle
    error.sample = sample
    return error
