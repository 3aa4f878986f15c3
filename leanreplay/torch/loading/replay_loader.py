"""Replay batches for a training loop, copied ahead in the background."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from ...arguments import call, function_or_none, instance, integer, required
from ...buffers.base import DataBuffer
from ...buffers.drawing import Draw, Drawn
from ...errors import ModeError, RowError, WorkerError
from ...storage.store import refuse_within
from ..data import bfloat16_fields, device_named, each_tensor, to_torch
from .states import check_state, is_count

Self = TypeVar("Self", bound="ReplayLoader")  # typing has one of its own from Python 3.11 on


class _Job:
    """One planned batch. Its rows are copied under the buffer's lock; then it becomes tensors."""

    def __init__(self, buffer: DataBuffer, plan: Callable[[], Any], finish: Callable[[Any], Any]) -> None:
        self.buffer, self._plan, self._finish = buffer, plan, finish
        self.ready = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None
        self._read: Any = None
        self._copied = False
        self._rows: Drawn | None = None
        try:
            self._rows = plan()
        except Exception as error:
            if isinstance(error, RowError) and buffer.mode == "r":
                return  # a reader met a rollback: it plans again when it copies
            self.error = error.with_traceback(None)  # its frames would keep the loader

    def copy(self) -> None:
        """Copy the rows, unless that is done. It must be done before the buffer changes."""
        with self.buffer.lock:
            if self._copied or self.error is not None:
                return
            try:
                self._read = self._copy()
                self._copied = True
            except Exception as error:
                self.error = error

    def _copy(self) -> Any:
        for _ in range(100):
            store = self.buffer.current.reading()
            try:
                if self._rows is None:
                    self._rows = self._plan()
                return (store.layout.schema, *self.buffer.draws.read(store, self._rows), self._rows)
            except RowError:
                if store.writable:
                    raise
                self._rows = None  # the writer has freed a row of this reader, which draws others
        raise RowError(f"{self.buffer.path}: rows keep being freed while they are read")

    def run(self) -> None:
        """Make the batch, or note the error, which is raised when the batch's turn comes."""
        try:
            self.copy()
            if self.error is None:
                self.result = self._finish(self._read)
        except BaseException as error:
            self.error = error
        self._read = None
        self._plan = self._finish = list  # a planned batch must not keep its loader
        self.ready.set()


class _Made(_Job):
    """A batch that a loaded state held."""

    def __init__(self, buffer: DataBuffer, result: Any) -> None:
        super().__init__(buffer, list, list)
        self.result, self._copied = result, True
        self.ready.set()


def _work(jobs: queue.SimpleQueue[_Job | None]) -> None:
    """Be the background thread. It holds no loader, so that a forgotten loader can go."""
    while (job := jobs.get()) is not None:
        job.run()
        del job
    jobs.put(None)  # an interrupt may have started a second one


class ReplayLoader:
    """An endless iterator of replay batches, copied in the background while the model trains.

    Each item is (batch, metadata) as of `leanreplay.torch.sample`. Rows are chosen `prefetch`
    batches ahead (those of the first batches when the first is asked for). A batch shows the buffer
    as it was when its rows were chosen: before the buffer changes, the chosen rows are copied. So
    `add` in the training thread waits for at most `prefetch` copies, and a run depends on the order
    of calls in the training thread alone, not on the timing of the background.

    buffer: any buffer. It needs `batch_size` samples when the first batch is asked for.
    batch_size: samples of a batch. They are distinct, unless `balance` needs more than a group has.
    device, pin_memory: where the tensors go. Copies to a GPU are queued on its default stream.
    prefetch: batches planned ahead, at least 1.
    batch_transform: called in the background with each whole batch (x and y of pairs, without
        metadata). Before that, the buffer's own transforms get the tensors of each sample.
    balance: "group", "label" ("class" is the same) or the name of a metadata field: every batch
        draws evenly over its values, as `buffer.sample` does. where, by, alpha: as for it, too.
    batches: how many batches one `for` loop gets. If a loop is broken off, the next one gets the
        rest. None: without end.
    seed: of the draws. Two loaders of one buffer want different seeds.

    If a batch cannot be planned or made, its error is raised when its turn comes; the next call
    tries that batch again. Errors of the loader: ArgumentError for arguments and for a buffer that
    is too small, SchemaError for a `balance` that the buffer cannot give, ModeError when closed.
    `state_dict` resumes at the next undelivered batch, bit for bit: it holds the batches that were
    planned already. The loader is for one thread; any thread may change the buffer.

    >>> import numpy as np
    >>> from leanreplay import ReservoirBuffer
    >>> from leanreplay.torch import ReplayLoader
    >>> buffer = ReservoirBuffer(100)
    >>> buffer.add((np.zeros((40, 3), "float32"), np.arange(40)))
    >>> with ReplayLoader(buffer, 8, batches=2) as loader:
    ...     [tuple(x.shape) for (x, y), meta in loader]
    [(8, 3), (8, 3)]
    """

    def __init__(
        self,
        buffer: DataBuffer,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        prefetch: int = 2,
        pin_memory: bool = False,
        batch_transform: Callable[[Any], Any] | None = None,
        balance: str | None = None,
        where: tuple[str, object] | None = None,
        by: str | None = None,
        alpha: float | None = None,
        batches: int | None = None,
        seed: int = 0,
    ) -> None:
        instance(buffer, DataBuffer, "ReplayLoader takes a buffer of leanreplay")
        self.buffer, self.device, self.pin_memory = buffer, device_named(device), bool(pin_memory)
        self.batch_size = required("batch_size", batch_size, 1, 2**31)
        self.prefetch = required("prefetch", prefetch, 1, 2**31)
        self.batches = integer("batches", batches, 1, 2**62)
        self.seed = integer("seed", seed, -(2**127), 2**127 - 1) or 0
        self.batch_transform, self.balance = function_or_none("batch_transform", batch_transform), balance
        self._draw = Draw.of(False, balance, where, by, alpha)
        self._consumer = f"loader {self.seed}"
        self._planned: list[_Job] = []
        self._delivered = 0  # batches handed out, ever
        self._passed = 0  # of them in this pass
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._closed = False
        self._taking = False  # whether a batch is being taken: no signal handler may take one then
        self._hook = functools.partial(_call, weakref.WeakMethod(self._settle))
        buffer.current.before_write.append(self._hook)
        # A loader that is never closed leaves no thread behind.
        self._finalizer = weakref.finalize(self, _give_up, self._queue, weakref.ref(buffer), self._hook)

    # -- iterating ---------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        if self.batches is not None and self._passed >= self.batches:
            self._passed = 0
        return self

    def __next__(self) -> tuple[Any, dict[str, Any]]:
        self._check_open()
        if self._taking:  # or an exception left it so
            refuse_within(self, {ReplayLoader.__next__.__code__}, "this ReplayLoader")
        self._taking = True
        if self.batches is not None and self._passed >= self.batches:
            raise StopIteration
        self._plan_to(self.prefetch)
        job = self._planned[0]
        job.ready.wait()
        if job.error is not None:
            self._planned = []
            _drain(self._queue)
            error, job.error = job.error, None  # the traceback would keep the loader
            del job
            try:
                raise error
            finally:
                del error
        # The next batch is planned while this one is still the first of the planned ones. So an
        # interrupt loses and doubles nothing, wherever it comes.
        self._plan_to(self.prefetch + 1)
        done = self._delivered + 1, self._passed + 1, self._planned[1:], False
        self._delivered, self._passed, self._planned, self._taking = done
        return job.result  # type: ignore[no-any-return]

    def _check_open(self) -> None:
        if self._closed or self._pid != os.getpid():
            raise ModeError("this ReplayLoader is closed, or was made in another process; make a new one here")

    def _plan_to(self, count: int) -> None:
        """Plan until so many batches are planned, or all that the pass has left."""
        if self.batches is not None:
            count = min(count, self.batches - self._passed)
        while len(self._planned) < count:
            number = self._delivered + len(self._planned)
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(target=_work, args=(self._queue,), name="leanreplay-loader", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    raise WorkerError(f"the loader's thread cannot start: {error}; raise the limit of threads (ulimit -u)") from error
                self._thread = thread
            with self.buffer.lock:
                job = _Job(self.buffer, functools.partial(self._rows, number), self._finish)
                self._queue.put(job)  # first: a planned job must be made, whatever interrupts
                self._planned = [*self._planned, job]

    def _settle(self) -> None:
        """Copy the chosen rows. The buffer calls this, under its lock, before it changes."""
        if self._pid == os.getpid():
            for job in self._planned:
                job.copy()

    def _finish(self, read: Any) -> tuple[Any, dict[str, Any]]:
        """Make the arrays of a batch what is handed out."""
        schema, arrays, index, drawn = read
        batch, meta = self.buffer.view.batch(schema, arrays, index, drawn, to_torch)
        bits = bfloat16_fields(schema)
        tensors, told = to_torch(batch, bits), to_torch(meta, bits, path="metadata")
        if self.batch_transform is not None:
            tensors = call("batch_transform", self.batch_transform, tensors)
        return self._placed((tensors, told))  # type: ignore[no-any-return]

    def _placed(self, value: Any) -> Any:
        """Move the tensors of a nesting to the device, over pinned memory where that helps."""
        pin = self.pin_memory and torch.cuda.is_available()

        def place(tensor: torch.Tensor) -> torch.Tensor:
            if pin and tensor.device.type == "cpu":
                tensor = tensor.pin_memory()
            return tensor if self.device is None else tensor.to(self.device, non_blocking=pin)

        return each_tensor(value, place)

    # -- planning ----------------------------------------------------------------------------------

    def _rows(self, number: int) -> Drawn:
        """Draw the rows of batch `number` from what the buffer holds now."""
        store = self.buffer.current.reading()
        self.buffer.draws.check_size(store, self.batch_size, self._draw)
        return self.buffer.draws.rows(store, self.batch_size, self._draw, self._consumer, number)

    # -- state -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Give the state for a checkpoint, to be taken together with the buffer's.

        It holds the number of batches handed out, and the planned batches as tensors on the CPU.
        `torch.load(weights_only=True)` takes it, unless samples hold fixed-width bytes, which stay
        NumPy's.
        """
        self._check_open()
        ahead = []
        for job in self._planned:
            job.ready.wait()
            if job.error is not None:
                break
            ahead.append(each_tensor(job.result, _copied))
        return {"format": 1, "delivered": self._delivered, "passed": self._passed, "ahead": ahead, "of": self._same}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the batch that would have come next.

        The buffer must get its state of the same checkpoint too, before or after. Raises StateError
        for anything else, and for a state of another `batch_size`, `seed` or kind of draw. `prefetch`,
        `batches` and `device` may differ.
        """
        self._check_open()
        check_state(state, "a ReplayLoader", {"delivered": _counts, "passed": _counts, "ahead": _are_batches}, self._same)
        ahead: list[_Job] = [_Made(self.buffer, self._placed(each_tensor(item, _copied))) for item in state["ahead"]]
        self._delivered, self._passed, self._planned = state["delivered"], state["passed"], ahead
        _drain(self._queue)

    @property
    def _same(self) -> dict[str, Any]:
        """The arguments that a state must agree with."""
        return {"batch_size": self.batch_size, "balance": self.balance, "seed": self.seed, "draw": self._draw.name or None}

    # -- closing -----------------------------------------------------------------------------------

    def close(self) -> None:
        """End the background thread after the batch that it is making. Closing twice is fine."""
        self._closed = True
        self._finalizer()
        if self._thread is not None and self._pid == os.getpid():
            self._thread.join()
            self._thread = None
        self._planned = []

    def __reduce__(self) -> Any:
        raise ModeError("a ReplayLoader cannot be copied or sent to another process; make a new one there, of the buffer")

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _give_up(jobs: queue.SimpleQueue[_Job | None], buffer: weakref.ref[DataBuffer], hook: Callable[[], None]) -> None:
    """Tell the background thread to end, and the buffer not to wait for it."""
    _drain(jobs)
    jobs.put(None)
    there = buffer()
    if there is not None and hook in there.current.before_write:
        there.current.before_write.remove(hook)


def _drain(jobs: queue.SimpleQueue[_Job | None]) -> None:
    """Drop the jobs that nobody has begun."""
    with contextlib.suppress(queue.Empty):
        while True:
            jobs.get_nowait()


def _call(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    """Call a method if its object still exists."""
    found = method()
    if found is not None:
        found()


def _counts(value: Any) -> bool:
    return is_count(value) and value < 2**62


def _are_batches(value: Any) -> bool:
    return type(value) is list and all(type(item) is tuple and len(item) == 2 for item in value)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to the CPU."""
    return tensor.to("cpu", copy=True)
