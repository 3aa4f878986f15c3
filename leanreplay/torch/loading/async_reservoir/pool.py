"""The workers: threads that load, or that wait for a process each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

from ....errors import ArgumentError, WorkerError
from .worker import Outcome, attempt, dumps, read_answer, serve

PATIENCE = 5.0  # seconds that running jobs have to end before their processes are killed


class _Worker(NamedTuple):
    process: Any
    pipe: Any

    def hang_up(self) -> None:
        """End the pipe on both sides, whoever else holds a copy of it."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.pipe.fileno())) as pair:
            pair.shutdown(socket.SHUT_RDWR)


class _PipeEnded(Exception):  # noqa: N818 - no error of this library: `outcome` tells why it ended
    """A worker has died, or was told to end."""

    def __init__(self, process: Any) -> None:
        self.process = process


class Pool:
    """Workers that load samples: threads, or processes with a thread and a pipe each.

    The thread of a process hands it one job after another. If the process dies, its pipe ends. So
    the thread notices at once, also in the middle of an answer.

    executor: "process" or "thread". context: of `multiprocessing`; None: its default.
    """

    def __init__(self, workers: int, function: Callable[[Any], Any], executor: str, context: Any) -> None:
        self._size = workers
        self._context: Any = None if executor == "thread" else context or multiprocessing.get_context()
        packed = self._context is not None and self._context.get_start_method() != "fork"
        self._function: Any = _packed(function, "the function") if packed else function
        self._threads = ThreadPoolExecutor(workers, "AsyncReservoir")
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    @property
    def processes(self) -> list[Any]:
        """The processes that were started."""
        return [worker.process for worker in self._workers if worker.process.pid is not None]

    def start(self) -> None:
        """Start the processes, all before the first thread. After an error, `end` clears up."""
        if self._context is None:
            return
        if self._context.get_start_method() != "fork":
            resource_tracker.ensure_running()  # which lets Ctrl-C through again when it starts
        for _ in range(self._size):
            ours, theirs = self._context.Pipe()
            worker = _Worker(self._context.Process(target=serve, args=(theirs, self._function)), ours)
            self._workers.append(worker)
            with theirs, _no_interrupt():  # until the worker ignores it
                worker.process.start()
            self._idle.put(worker)

    def submit(self, sample: Any, seed: int) -> Future[Any]:
        """Queue a job. Raises ArgumentError for a sample that cannot be sent to a process."""
        if self._context is None:
            return self._threads.submit(attempt, self._function, sample)
        return self._threads.submit(self._ask, seed, _packed(sample, f"the sample {sample!r:.200}"))

    def _ask(self, seed: int, sample: bytes) -> bytes:
        worker = self._idle.get()  # there are as many as threads
        try:
            worker.pipe.send(seed)
            worker.pipe.send_bytes(sample)
            return worker.pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise _PipeEnded(worker.process) from error
        finally:
            self._idle.put(worker)

    def outcome(self, job: Future[Any]) -> Outcome:
        """Read the outcome of a job that is done. Raises WorkerError if its worker has died."""
        try:
            return job.result() if self._context is None else read_answer(job.result())
        except _PipeEnded as ended:
            raise _worker_died(ended.process) from ended

    def end(self) -> None:
        """End the workers. Jobs that have not begun are dropped.

        Processes are killed if their jobs last longer than `PATIENCE`; threads are waited for.
        """
        self._threads.shutdown(wait=False, cancel_futures=True)
        until = time.monotonic() + PATIENCE
        started = [worker for worker in self._workers if worker.process.pid is not None]
        try:
            for worker in started:
                worker.hang_up()  # it ends after its job; its thread ends at once
            for worker in started:
                worker.process.join(max(0.0, until - time.monotonic()))
        finally:
            for worker in started:
                if worker.process.is_alive():
                    worker.process.kill()
            self._threads.shutdown()
            for worker in self._workers:
                worker.pipe.close()
            for worker in started:
                worker.process.join()
                worker.process.close()
            self._workers = []


def _worker_died(process: Any) -> WorkerError:
    process.join(PATIENCE)
    code = process.exitcode
    reason = "unknown reason" if code is None else signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return WorkerError(
        f"a worker ended unexpectedly ({reason}); the jobs under way are lost. SIGKILL often means that memory ran out (use fewer "
        "workers or smaller samples), exit code 1 that a worker could not start (it has said why above; spawned workers import the "
        "main script, which needs `if __name__ == '__main__':`). Iterating again starts new workers"
    )


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Let Ctrl-C wait, in this thread and in the processes that it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _packed(value: Any, name: str) -> bytes:
    try:
        return dumps(value)
    except Exception as error:
        raise ArgumentError(
            f"{name} cannot be sent to a worker process: {error!r:.200}; define functions and classes at the top of a module, "
            "or use executor='thread'"
        ) from error


def context_named(value: Any) -> Any:
    """Find a context of `multiprocessing`. Raises ArgumentError for what is none."""
    if isinstance(value, str):
        try:
            return multiprocessing.get_context(value)
        except ValueError:
            raise ArgumentError(f"mp_context is one of {multiprocessing.get_all_start_methods()} here, got {value!r}") from None
    if value is not None and not hasattr(value, "get_start_method"):
        raise ArgumentError(f"mp_context is the name of a start method or a context of multiprocessing, got {value!r:.200}")
    return value
