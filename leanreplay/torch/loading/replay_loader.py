"""Replay batches for a training loop: copied ahead in the background, or joined to the batches of the stream."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch

from ...arguments import call, function_or_none, instance, integer, required
from ...arrays import Ints
from ...buffers.base import DataBuffer
from ...errors import ArgumentError, ModeError, RowError, SchemaError, StateError, WorkerError
from ...kernels import reservoir
from ...storage.store import refuse_within
from ..data import Function, bfloat16_fields, device_named, each_tensor, per_batch, sample, to_torch

Self = TypeVar("Self", bound="ReplayLoader")  # typing has one of its own from Python 3.11 on


class _Job:
    """One planned batch. First its rows are copied, under the buffer's lock; then it becomes tensors, outside of it."""

    def __init__(self, buffer: DataBuffer, plan: Callable[[], Any], finish: Callable[[Any], Any]) -> None:
        self.buffer, self._plan, self._finish = buffer, plan, finish
        self.ready = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None
        self._read: Any = None
        self._copied = False
        self._rows: Any = None
        try:
            self._rows = plan()
        except Exception as error:
            if isinstance(error, RowError) and buffer.mode == "r":
                return  # a reader met a rollback: it plans again when it copies
            self.error = error.with_traceback(None)  # whose frames would keep the loader

    def copy(self) -> None:
        """Copy the rows, unless that is done: called before the buffer changes, by whoever comes first."""
        with self.buffer._lock:
            if self._copied or self.error is not None:
                return
            try:
                self._read = self._copy()
                self._copied = True
            except Exception as error:
                self.error = error

    def _copy(self) -> Any:
        for _ in range(100):
            store = self.buffer._require()
            try:
                if self._rows is None:
                    self._rows = self._plan()
                return (store.table.schema, *store.read(self._rows), self._rows)
            except RowError:  # a reader may find that the writer has freed a row: its batches are not reproducible anyway
                if store.writable:
                    raise
                self._rows = None
        raise RowError(f"{self.buffer.path}: rows keep being freed while they are read")

    def run(self) -> None:
        """Make the batch. Nothing is raised here: the error waits for the batch's turn."""
        try:
            self.copy()
            if self.error is None:
                self.result = self._finish(self._read)
        except BaseException as error:
            self.error = error
        self._read = None
        self._plan = self._finish = list  # the loader must not be kept by what it has planned
        self.ready.set()


class _Made(_Job):
    """A batch that a state held."""

    def __init__(self, buffer: DataBuffer, result: Any) -> None:
        super().__init__(buffer, list, list)
        self.result, self._copied = result, True
        self.ready.set()


def _work(jobs: queue.SimpleQueue[_Job | None]) -> None:
    """The background thread. It holds on to no loader, so that a forgotten one can go."""
    while (job := jobs.get()) is not None:
        job.run()
        del job
    jobs.put(None)  # an interrupt may have started a second one


class ReplayLoader:
    """An endless iterator of replay batches, copied ahead in the background while the model trains.

    Each item is (batch, metadata) as of `leanreplay.torch.sample`. Which rows a batch holds is planned when the batch `prefetch` places
    before it is handed out (the first ones, when the first is asked for), and it holds what these rows held then: before the buffer
    changes, planned copies are finished, so `add` in the training thread waits for at most `prefetch` of them. So a run depends on
    the order of calls in the training thread alone, not on the background's timing.

    buffer: any buffer, with at least `batch_size` samples when the first batch is asked for.
    batch_size: samples in a batch, distinct ones unless `balance` needs more than a group has.
    device, pin_memory: where the tensors go; copies to a GPU are queued on its default stream. prefetch: batches planned ahead, at least 1.
    batch_transform: called with each whole batch (x and y of pairs, without metadata), in the background; the buffer's own transforms ran
        before, on the tensors of each sample.
    balance: "class" (the label, second element of a pair) or the name of a metadata field: every batch draws evenly over its values.
        Costs a pass over that column after every change of the buffer.
    batches: how many batches one `for` loop gets (after one that was broken off, the next gets the rest of them); None: without end.
    seed: of the draws; two loaders of one buffer want different ones.

    A batch that cannot be planned or made raises its error when its turn comes; the next call tries that batch again. Errors of its own:
    ArgumentError for arguments and for a buffer that is too small, SchemaError for a `balance` that the buffer cannot give, ModeError
    when closed. `state_dict` resumes at the next undelivered batch, bit for bit: it holds the batches that were planned already.
    For one thread; any thread may change the buffer.

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
        batches: int | None = None,
        seed: int = 0,
    ) -> None:
        instance(buffer, DataBuffer, "ReplayLoader takes a buffer of leanreplay")
        if balance is not None and not isinstance(balance, str):
            raise ArgumentError(f'balance is "class" or the name of a metadata field, got {balance!r:.200}')
        self.buffer, self.device, self.pin_memory = buffer, device_named(device), bool(pin_memory)
        self.batch_size = required("batch_size", batch_size, 1, 2**31)
        self.prefetch = required("prefetch", prefetch, 1, 2**31)
        self.batches = integer("batches", batches, 1, 2**62)
        self.seed = integer("seed", seed, -(2**127), 2**127 - 1) or 0
        self.batch_transform, self.balance = function_or_none("batch_transform", batch_transform), balance
        self._consumer = f"loader {self.seed}"
        self._planned: list[_Job] = []
        self._delivered = 0  # batches handed out, ever
        self._passed = 0  # of them in this pass
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._groups: tuple[Any, int, list[Ints]] | None = None
        self._pid = os.getpid()
        self._closed = False
        self._taking = False  # whether a batch is being taken: no signal handler may take one as well
        self._hook = functools.partial(_call, weakref.WeakMethod(self._settle))
        buffer._before_write.append(self._hook)
        # Whoever forgets to close it leaves no thread behind.
        self._finalizer = weakref.finalize(self, _give_up, self._queue, weakref.ref(buffer), self._hook)

    # -- iterating ---------------------------------------------------------------------------------------------------

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
            error, job.error = job.error, None  # a cycle through the traceback would keep the loader, and its thread
            del job
            try:
                raise error
            finally:
                del error
        # The next one is planned while this one still stands in front, so that an interrupt anywhere loses and doubles nothing.
        self._plan_to(self.prefetch + 1)
        done = self._delivered + 1, self._passed + 1, self._planned[1:], False
        self._delivered, self._passed, self._planned, self._taking = done
        return job.result  # type: ignore[no-any-return]

    def _check_open(self) -> None:
        if self._closed or self._pid != os.getpid():
            raise ModeError("this ReplayLoader is closed, or was made in another process; make a new one here")

    def _plan_to(self, count: int) -> None:
        """Have that many batches planned, fewer at the end of a pass."""
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
            with self.buffer._lock:
                job = _Job(self.buffer, functools.partial(self._rows, number), self._finish)
                self._queue.put(job)  # before it counts: an interrupt in between must not leave one that nobody makes
                self._planned = [*self._planned, job]

    def _settle(self) -> None:
        """Called by the buffer, under its lock, before it changes."""
        if self._pid == os.getpid():
            for job in self._planned:
                job.copy()
            self._groups = None

    def _finish(self, read: Any) -> tuple[Any, dict[str, Any]]:
        """Arrays to what is handed out."""
        schema, arrays, index, rows = read
        batch, meta = self.buffer._present(schema, arrays, index, rows, to_torch)
        bits = bfloat16_fields(schema)
        tensors, told = to_torch(batch, bits), to_torch(meta, bits, path="metadata")
        if self.batch_transform is not None:
            tensors = call("batch_transform", self.batch_transform, tensors)
        return self._placed((tensors, told))  # type: ignore[no-any-return]

    def _placed(self, value: Any) -> Any:
        """Tensors in any nesting on the device; pinned on the way where that helps."""
        pin = self.pin_memory and torch.cuda.is_available()

        def place(tensor: torch.Tensor) -> torch.Tensor:
            if pin and tensor.device.type == "cpu":
                tensor = tensor.pin_memory()
            return tensor if self.device is None else tensor.to(self.device, non_blocking=pin)

        return each_tensor(value, place)

    # -- planning ----------------------------------------------------------------------------------------------------

    def _rows(self, number: int) -> Ints:
        """The rows of batch `number`, drawn from what the buffer holds now."""
        store = self.buffer._require()
        if self.balance is None:
            self.buffer._check_size(store, self.batch_size, False)
            return self.buffer._draw(store, self.batch_size, False, self._consumer, number)
        if store is None or store.size == 0:
            raise ArgumentError(f"a batch of {self.batch_size} from an empty buffer; add samples first")
        groups = self._rows_by_value(store)
        k0, k1 = self.buffer._keys(f"{self._consumer} balanced")
        step = 2 * len(groups) + 2  # draws that one batch may need

        def draw(among: int, count: int, which: int, replace: bool = False) -> Ints:
            out = np.empty(count, np.int64)
            reservoir.draw(among, k0, k1, store.seen, number * step + which, replace, out)
            return out

        each, rest = divmod(self.batch_size, len(groups))
        counts = np.full(len(groups), each)
        counts[draw(len(groups), rest, 0)] += 1
        parts = [
            rows[draw(rows.shape[0], int(count), 2 + i, replace=bool(count > rows.shape[0]))]
            for i, (rows, count) in enumerate(zip(groups, counts, strict=True))
        ]
        return np.concatenate(parts)[draw(self.batch_size, self.batch_size, 1)]

    def _rows_by_value(self, store: Any) -> list[Ints]:
        """The live rows of each value of the column that `balance` names."""
        known = self._groups
        if known is None or known[0] is not store or known[1] != store.sequence:
            sequence = store.sequence
            schema = store.table.schema
            rows = self.buffer._all_rows(store)
            if self.balance == "class" and "class" not in schema.metadata_names:
                field = schema.label_field
                if field is None:
                    raise SchemaError('balance="class" needs samples that are pairs with an integer label; or name a metadata field')
            else:
                field = self.buffer._metadata_index(store, str(self.balance))
            values = store.read(rows, field)[0][0]
            if values.ndim != 1:
                raise SchemaError(f"balance={self.balance!r}: entries must be single values, got shape {values.shape[1:]}")
            order = np.argsort(values, kind="stable")
            starts = np.unique(values[order], return_index=True)[1]
            groups = np.split(rows[order], starts[1:])
            self._groups = (store, sequence, groups)
            return groups
        return known[2]

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, taken together with the buffer's: batches handed out, and those that are planned, as tensors on the CPU.

        `torch.load(weights_only=True)` takes it, unless samples hold fixed-width bytes, which stay NumPy's.
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
        """Go on with the batch that would have come next. Bring the buffer to its state of the same checkpoint first, or after.

        Raises StateError for what is no such state, and for one of another `batch_size`, `balance` or `seed`. `prefetch`, `batches` and
        `device` may differ.
        """
        self._check_open()
        wanted = {"format": int, "delivered": int, "passed": int, "ahead": list, "of": dict}
        right = isinstance(state, Mapping) and all(type(state.get(k)) is t for k, t in wanted.items()) and state["format"] == 1
        right = right and all(0 <= state[k] < 2**62 for k in ("delivered", "passed"))
        if not right or any(type(item) is not tuple or len(item) != 2 for item in state["ahead"]):
            raise StateError(f"not a state of a ReplayLoader: expected a dict with {sorted(wanted)}, got {state!r:.200}")
        wrong = [f"{key}: {state['of'].get(key)!r}, here {value!r}" for key, value in self._same.items() if state["of"].get(key) != value]
        if wrong:
            raise StateError(f"the state is of another ReplayLoader ({'; '.join(wrong)}); make this one with the same arguments")
        ahead: list[_Job] = [_Made(self.buffer, self._placed(each_tensor(item, _copied))) for item in state["ahead"]]
        self._delivered, self._passed, self._planned = state["delivered"], state["passed"], ahead
        _drain(self._queue)

    @property
    def _same(self) -> dict[str, Any]:
        """What a state must agree with."""
        return {"batch_size": self.batch_size, "balance": self.balance, "seed": self.seed}

    # -- closing -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the background thread, as soon as the batch that it is at is made. Closing twice is fine."""
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
    if there is not None and hook in there._before_write:
        there._before_write.remove(hook)


def _drain(jobs: queue.SimpleQueue[_Job | None]) -> None:
    """What is planned no more need not be made."""
    with contextlib.suppress(queue.Empty):
        while True:
            jobs.get_nowait()


def _call(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    """Call a method if its object still exists."""
    found = method()
    if found is not None:
        found()


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, in memory of its own."""
    return tensor.to("cpu", copy=True)


class MixedLoader:
    """The batches of a stream, each with a replay batch behind it: (x, y, is_replay, meta), for the simplest loops.

    stream_loader: yields pairs (x, y) of tensors or arrays, a DataLoader for instance. Of each, x and y are followed by those of
    `replay_batch_size` samples drawn from the buffer at that moment (fewer while it holds fewer); is_replay, (n,) bool, says which they
    are, and meta is the metadata of these. batch_transform: of the x of both together, (n, ...); the buffer's own transforms ran before,
    on the tensors of each replayed sample. The batch is the loop's own, which may change it. What goes into the buffer is up to the
    loop, after the step for instance, so no sample is replayed in the batch that it comes with. device: where the batch goes. Draws are
    the buffer's own, so they are part of its state.
    Raises ArgumentError for what is not such pairs, and for samples of the stream and the buffer that differ in shape or dtype.

    >>> import torch
    >>> from leanreplay import ReservoirBuffer
    >>> from leanreplay.torch import MixedLoader
    >>> buffer, stream = ReservoirBuffer(100), [(torch.zeros(4, 3), torch.arange(4))] * 2
    >>> for x, y, is_replay, meta in MixedLoader(stream, buffer, 2):
    ...     print(tuple(x.shape), is_replay.tolist())
    ...     buffer.add((x[~is_replay], y[~is_replay]))
    (4, 3) [False, False, False, False]
    (6, 3) [False, False, False, False, True, True]
    """

    def __init__(
        self,
        stream_loader: Iterable[Any],
        buffer: DataBuffer,
        replay_batch_size: int,
        device: torch.device | str | None = None,
        *,
        batch_transform: Function | None = None,
    ) -> None:
        instance(buffer, DataBuffer, "MixedLoader takes a buffer of leanreplay")
        self.stream_loader, self.buffer, self.device = stream_loader, buffer, device_named(device)
        self.replay_batch_size = required("replay_batch_size", replay_batch_size, 1, 2**31)
        self.batch_transform = function_or_none("batch_transform", batch_transform)

    def __len__(self) -> int:
        return len(self.stream_loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]]:
        for item in self.stream_loader:
            x, y = self._pair(item, "the stream")
            n = min(self.replay_batch_size, len(self.buffer))
            is_replay = torch.zeros(x.shape[0] + n, dtype=torch.bool, device=x.device)
            meta: dict[str, Any] = {}
            if n:
                batch, meta = sample(self.buffer, n, x.device)
                x_old, y_old = self._pair(batch, "the buffer")
                if x_old.shape[1:] != x.shape[1:] or y_old.shape[1:] != y.shape[1:]:
                    raise ArgumentError(
                        f"samples of the stream (x {tuple(x.shape[1:])}, y {tuple(y.shape[1:])}) and of the buffer "
                        f"(x {tuple(x_old.shape[1:])}, y {tuple(y_old.shape[1:])}) differ in shape; transform one of them"
                    )
                if x_old.dtype != x.dtype or y_old.dtype != y.dtype:  # torch would make both of the wider one
                    raise ArgumentError(
                        f"samples of the stream (x {x.dtype}, y {y.dtype}) and of the buffer (x {x_old.dtype}, y {y_old.dtype}) differ in "
                        "dtype; transform one of them"
                    )
                x, y = torch.cat([x, x_old]), torch.cat([y, y_old])
                is_replay[-n:] = True
            else:
                x, y = x.clone(), y.clone()  # the loop may change what it gets, and the stream come again
            if self.batch_transform is not None:
                x = per_batch(self.batch_transform, x, "batch_transform")
            yield x, y, is_replay, meta

    def _pair(self, item: Any, where: str) -> tuple[torch.Tensor, torch.Tensor]:
        """x and y of a batch, as tensors of equal length."""
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise ArgumentError(
                f"MixedLoader wants pairs (x, y), {where} gave a {type(item).__name__}; use ReplayLoader beside your loader"
            )
        try:
            x, y = (torch.as_tensor(part, device=self.device) for part in item)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(f"MixedLoader wants pairs of arrays or tensors, {where} gave others: {error}") from None
        if not x.ndim or not y.ndim or x.shape[0] != y.shape[0]:
            raise ArgumentError(f"{where} gave x of shape {tuple(x.shape)} and y of {tuple(y.shape)}: they must have the same length")
        return x, y
