"""The public buffers: a store and a policy, and what samples look like on the way in and out."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import importlib
import json
import operator
import os
import re
import sys
import threading
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from ..arguments import as_path, call, check_call, choice, function_or_none, instance, integer, integers, plain_array, required
from ..arrays import NO_ROWS, Ints
from ..errors import (
    ArgumentError,
    CapacityWarning,
    CorruptionError,
    ExistsError,
    FormatError,
    LeanReplayError,
    LockedError,
    MismatchError,
    MissingError,
    ModeError,
    RowError,
    SchemaError,
    StateError,
    StorageError,
    VolatileStateWarning,
)
from ..kernels import reservoir
from ..keys import MAX_STREAM, STREAM_BITS, key_pair
from ..policies.base import LOG_TOO_SHORT, Parameter, Policy, check_plan, optional_int
from ..policies.greedy import GreedyClassBalancingPolicy
from ..policies.reservoir import ReservoirPolicy
from ..policies.window import SlidingWindowPolicy
from ..samples.batch import Batch, Fetch, flat, stack
from ..samples.dataset import Items
from ..samples.schema import Field, Schema, batch_leaf, check_leaf, leaf_type, metadata_field, to_numpy
from ..storage import system
from ..storage.create import plan_file
from ..storage.layout import KINDS, Table
from ..storage.store import Change, MetadataUpdate, PlannedBatch, Problem, Store, empty_state, read_table, refuse_within

Self = TypeVar("Self", bound="DataBuffer")  # typing has one of its own from Python 3.11 on
Convert = Callable[[Any, frozenset[str], Any, str], Any]  # leanreplay.torch.data.to_torch

MODES = ("x", "a", "r+", "r", "w")
_CHUNK = 1 << 16
_MOST_DRAWS = 2**62
_REMEMBERED = 10_000  # unpickled copies
# What other libraries take as the second argument, and what this one takes by name: nobody means a file by it.
_NO_NAMES = re.compile(r"(class|task|experience|label|group)(e?s)?|none|true|false|cpu|mps|cuda(:\d+)?|in_memory", re.IGNORECASE)
_KINDS: dict[str, type[DataBuffer]] = KINDS
_BUFFERS: weakref.WeakSet[DataBuffer]


def _is_streams(value: object) -> bool:
    return value is None or (type(value) is list and all(type(n) is int and 0 <= n <= MAX_STREAM for n in value))


# What `merge` adds to the parameters: the streams that went in, and `seen` when they did.
MERGED = (Parameter("streams", None, _is_streams), Parameter("merged", None, optional_int(0, 2**STREAM_BITS)))


class DataBuffer:
    """Base class of all buffers: samples in one memory-mapped HDF5 file, or in shared memory.

    A subclass names its policy; that is all an own buffer needs:

    >>> import leanreplay
    >>> class Coin(leanreplay.SlidingWindowPolicy):
    ...     "Rejects every second sample."
    ...     def plan(self, start, groups, max_rows):
    ...         return leanreplay.Plan(np.array([-1])) if start % 2 else super().plan(start, groups[:1], max_rows)
    >>> class CoinBuffer(leanreplay.DataBuffer):
    ...     policy_class = Coin
    >>> buffer = CoinBuffer(10)
    >>> buffer.add(np.arange(8))
    >>> buffer.get_metadata("position")
    array([0, 2, 4, 6])

    Parameters
    ----------
    max_size: rows of the buffer, at least 1.
    path: the file; None keeps the buffer in shared memory, with everything else the same. A word that other libraries take here by
        position, such as "class" or "cpu", is refused: write "./class" for such a file.
    seed: of all random choices, any integer of 128 bits; a new buffer takes 0.
    stream: number of the stream that is fed, 0 to 32767, for several buffers that will be merged; a new buffer takes 0.
    mode: "x" create, refusing an existing file; "a" open or create; "r+" open; "r" open for reading; "w" replace (the old
        file stays until the first batch, or with `schema` goes at once).
        Parameters left at None are those of the file; others that differ from the file's are a MismatchError.
    schema: a `Schema`, to create the file at once; otherwise the first batch decides, and creates it.
    transform, target_transform: called with the first and the second element of each sample (without a pair: with the whole
        sample) whenever it is read, never when it is stored. They get arrays; torch modules, and whatever is read through
        `leanreplay.torch`, get tensors.
    lock: False goes on where the file system has no locks (the error of such a one names this option); then nothing keeps a second writer
        out, and seeing to it is yours. Stored nowhere.
    durable: make every commit survive a power cut, for about 4 ms a commit, and every state that `state_dict` returns with the
        way back to it. Without it `flush` does both when called;
        a killed process loses nothing either way.
    restore_points: how many states that `state_dict` returned can be loaded again, at least 2. The newest ones count.

    Errors are all `LeanReplayError`. A buffer may be used from several threads; calls wait for each other. A signal handler may read,
    in the middle of another reading too, but not write; in the middle of a change it gets a ModeError. Pickled, it goes to other
    processes as a reader of the same file or memory, whatever its mode (ModeError if another buffer stands there by then); to write
    there, send the path, and open it with mode="r+" once this writer is closed. `copy.copy` and `copy.deepcopy` are a ModeError.
    """

    policy_class: ClassVar[type[Policy]]
    kind: ClassVar[str] = "DataBuffer"
    _with_metadata: ClassVar[bool] = True  # items are (sample, metadata)
    _whole: ClassVar[bool] = False  # whether one commit may overwrite all rows: the journal is then as large as the data
    _folder: ClassVar[bool] = False  # whether `path` is a folder of parts, and a state names a point of each

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" not in cls.__dict__:
            cls.kind = cls.__name__
        _KINDS[cls.kind] = cls

    def __new__(cls: type[Self], *args: Any, **options: Any) -> Self:
        check_call(cls, DataBuffer, args, options)
        return super().__new__(cls)

    def __init__(
        self,
        max_size: int | None = None,
        path: str | os.PathLike[str] | None = None,
        *,
        seed: int | None = None,
        stream: int | None = None,
        mode: str = "x",
        schema: Schema | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        durable: bool = False,
        restore_points: int = 2,
        lock: bool = True,
    ) -> None:
        if not hasattr(type(self), "policy_class"):
            raise ArgumentError(f"{type(self).__name__} has no policy; set policy_class, or use one of its subclasses")
        choice("mode", mode, MODES)
        if path is None and mode in ("r", "r+"):
            raise ArgumentError(f"mode {mode!r} opens a file, but path is None; a buffer in memory is new: leave mode out")
        if schema is not None:
            instance(schema, Schema, "schema is a leanreplay.Schema, for instance Schema.from_sample(sample)")
        for name, function in (("transform", transform), ("target_transform", target_transform)):
            function_or_none(name, function, "a function of a sample's element")
        self.max_size: int = 0
        self._seed = integer("seed", seed, -(2**127), 2**127 - 1)
        self._stream = integer("stream", stream, 0, MAX_STREAM)
        self._max_size = integer("max_size", max_size, 1, 2**40)
        self.transform, self.target_transform = transform, target_transform
        self._durable, self._locking = bool(durable), bool(lock)
        self._points = integer("restore_points", restore_points, 2, 2**20) or 2
        self.path = None if path is None else _file_name(path, mode)
        self._where = None if self.path is None else os.path.realpath(self.path)
        self._mode = mode
        self._uuid = uuid.uuid4().hex
        self._store: Any = None
        self._lock_fd: int | None = None
        self._awaits: str | None = None  # of a copy without a file yet: uuid of the one that it waits for
        self._copy = ""  # of a forked or unpickled copy: which one, for draws of its own
        self._set_counts(0, 0)
        self._draw_keys: dict[str, tuple[np.uint64, np.uint64]] = {}
        self._reach = Reach()
        self._marked = False
        self._may_warn = True  # of a state that no other process can load; not where a copy of the buffer goes with it
        self._closed = False
        self._replacing = False  # while `resize` and the like put another file under the name
        self._start()
        self._policy: Policy | None = None
        self._policy_at = -1
        try:
            with system.storage_errors(f"opening {self.path or 'a buffer in memory'}"):
                try:
                    self._open(schema)
                except LockedError:
                    if self._writer_here() is None:
                        raise
                    gc.collect()  # a buffer that nobody refers to any more, but for itself, closes
                    self._unlock()
                    self._open(schema)
        except LockedError as error:
            self.close()
            raise self._locked(error) from None
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        """What a fork needs anew."""
        self._lock = threading.RLock()
        self._no_groups: Ints = np.empty(0, np.int64)
        self._before_write: list[Callable[[], None]] = []  # of those who planned reads of the present rows
        _BUFFERS.add(self)

    # -- opening and closing -----------------------------------------------------------------------------------------

    def _open(self, schema: Schema | None) -> None:
        where, mode = self._where, self._mode
        if mode in ("r", "r+") and not self._exists():
            raise MissingError(f"{self.path} does not exist; create it with mode='x' or 'a'")
        if where is not None and mode != "r" and self._locking:
            with system.storage_errors(f"opening {self.path} for writing"):
                self._lock_fd = system.lock(where, system.status(where))
                self._remove_leftovers(where)
        exists = self._exists()
        if mode == "x" and exists:
            raise ExistsError(f"{self.path} exists; open it with mode='r+' or 'a', or replace it with mode='w'")
        if exists and mode != "w":
            self._store = self._open_store()
            self._adopt(schema)
            return
        if exists:
            with self._replacing_file():
                pass
        if self._max_size is None:
            raise ArgumentError("a new buffer needs max_size")
        self.max_size = self._max_size
        self._seed, self._stream = self._seed or 0, self._stream or 0
        self._settle_params()
        if schema is not None:
            self._create(schema)

    def _replacing_file(self) -> contextlib.AbstractContextManager[None]:
        """Within it, what stands under the name may be replaced: it has no writer. Raises LockedError, or FormatError for no file."""
        file = self._file()
        return contextlib.nullcontext() if file is None or not self._locking else system.replacing(file, None)

    def _file(self) -> str | None:
        """The file whose lock stands for the whole buffer."""
        return self._where

    def _writer_here(self, path: str | None = None) -> DataBuffer | None:
        """The buffer of this process that writes to the file of this one, or to the one under a path."""
        path = path or self._file()
        found = None if path is None else system.status(path)
        for other in list(_BUFFERS):
            if (other is self and path == self._file()) or other._closed or other._mode == "r" or other._where is None:
                continue
            theirs = None if other._store is None else other._store.status
            if other._file() == path or (found is not None and theirs is not None and os.path.samestat(found, theirs)):
                return other
        return None

    def _locked(self, error: LockedError, path: str | None = None) -> LockedError:
        """The error for a file that is locked: "elsewhere" would mislead where the writer is an object of this very process."""
        other = self._writer_here(path)
        if other is None:
            return error
        return LockedError(
            f"{path or self.path} is open for writing in this very process, by the {type(other).__name__} at {id(other):#x} (mode "
            f"{other._mode!r}); close() that object first, or `del` its name if a cell of a notebook is run again; or read with mode='r'"
        )

    def _remove_leftovers(self, where: str) -> None:
        """Remove what killed writers of this file left, and killed savers if it is a copy."""
        system.remove_temporaries(where)
        if os.path.basename(where) == "buffer.h5":
            with system.users_of(os.path.dirname(where)) as users:
                users.alone(lambda: system.remove_temporaries(where + ".saved"))

    def _open_store(self) -> Any:
        assert self._where is not None
        return Store.open(self._where, writable=self._mode != "r", name=self._where, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        """Of every store of this buffer."""
        return {"durable": self._durable, "points": self._points, "guard": self._locking}

    def _adopt(self, schema: Schema | None) -> None:
        """Take parameters from the file, after comparing those that were given."""
        table: Table = self._store.table
        given = {"max_size": self._max_size, "seed": self._seed, "stream": self._stream, **self._params_given()}
        found = {"max_size": self._file_size(table), "seed": table.seed, "stream": table.stream, **table.params}
        differing = [f"{k}={v!r} (file: {found.get(k)!r})" for k, v in given.items() if v is not None and v != found.get(k)]
        if table.kind != self.kind:
            differing.insert(0, f"{self.kind} (file: {table.kind})")
        if schema is not None and schema != table.schema:
            differing.append(f"schema={schema} (file: {table.schema})")
        if differing:
            raise MismatchError(
                f"{self.path} was created with other parameters: {', '.join(differing)}; leave them out, or use another path"
            )
        self.max_size, self._seed, self._stream, self._uuid = found["max_size"], table.seed, table.stream, table.uuid

    def _exists(self) -> bool:
        """Whether there is something to open."""
        return self._where is not None and system.exists(self._where)

    def _params_given(self) -> dict[str, Any]:
        """A subclass's own parameters, None where not given: they stand in the file, and are compared on opening."""
        return {}

    @classmethod
    def _table_problem(cls, table: Table) -> str | None:
        """What is impossible about a table that names this kind: kernels believe the numbers in it. None if nothing is."""
        policy = getattr(cls, "policy_class", Policy)
        rules = {p.name: p.allowed for p in (*policy.parameters, *(() if cls._folder else MERGED))}
        wrong = {k: v for k, v in table.params.items() if k not in rules} or {
            k: table.params.get(k) for k, right in rules.items() if not right(table.params.get(k))
        }
        if wrong:
            return f"a {cls.__name__} has no parameters {wrong!r:.200}"
        if cls._whole and table.journal_rows < table.max_size:
            return f"a journal of {table.journal_rows} rows, but a commit may change all {table.max_size}"
        problem = policy.params_problem(table.params, table.max_size)
        if problem is None and policy.log_slots(table.max_size) and not table.log[1]:
            return f"a {cls.__name__} keeps a log, but there is none"
        return problem

    def _settle_params(self) -> None:
        """For a new buffer: give a subclass's parameters that are still None their values. Raises ArgumentError for a bad combination."""

    def _take_from_file(self) -> None:
        """Forget the parameters, for `_adopt` to find."""
        self._seed = self._stream = self._max_size = None

    def _file_size(self, table: Table) -> Any:
        return table.max_size

    def _create(self, schema: Schema) -> None:
        seed, stream = self._seed, self._stream
        assert seed is not None and stream is not None
        table, pieces = self._plan_file(self._params_given(), self.max_size, seed, stream, schema, self._uuid)
        replace = self._mode == "w" or _is_left_over(self._where, self._uuid)
        with self._replacing_file() if replace else contextlib.nullcontext():
            self._store = self._new_store(self._where, table, pieces, replace)

    def _plan_file(
        self, params: dict[str, Any], size: int, seed: int, stream: int, schema: Schema, identity: str, slots: int = 0
    ) -> tuple[Table, list[tuple[int, bytes]]]:
        """A new file of this kind. slots: the least entries that its log must have room for."""
        slots = max(slots, self.policy_class.log_slots(size))
        return plan_file(self.kind, params, size, seed, stream, schema, identity, slots, size if self._whole else None)

    def _new_store(
        self, path: str | None, table: Table, pieces: Sequence[tuple[int, bytes]], replace: bool, model: os.stat_result | None = None
    ) -> Store:
        """A new file, with a restore point of its empty state if `state_dict` was called before: both or none."""
        options = self._options if self._store is None else self._options | {"guard": False}  # the first part's lock is that of all
        model = model if self._store is None else self._store.status
        store = Store.create(path, table, pieces, replace=replace, model=model, **options)
        try:
            if self._marked:
                store.mark()
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Close the file and release the writer's lock. Closing twice is fine; anything else afterwards is a ModeError."""
        with self._lock:
            if self._store is not None:
                self._store.close()  # refuses in the middle of a change
            self._closed = True
            self._unlock()

    def _unlock(self) -> None:
        held, self._lock_fd = self._lock_fd, None
        if held is not None:
            os.close(held)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Without this a forgotten buffer would hold its lock and descriptors until the interpreter ends.
        try:  # noqa: SIM105 - when it ends, contextlib may be empty already
            self.close()
        except Exception:
            pass

    def _become_reader(self) -> None:
        """In a forked child: the parent goes on writing, so this copy reads, and must not hold the parent's lock."""
        self._start()
        self._own_stream(f"fork {self._copies}")
        if self._mode == "w" and self._store is None:
            self._awaits = self._uuid
        if self._where is not None or self._store is not None:
            self._mode = "r"
        self._unlock()

    def __reduce__(self) -> Any:
        if self._closed:
            raise ModeError(f"{self!r} is closed; open it again with leanreplay.open(path)")
        options = {"transform": self.transform, "target_transform": self.target_transform}
        with self._lock:
            if self._where is None and self._store is None:
                raise ModeError(
                    "an empty buffer in memory cannot be sent to another process before its first batch; give it a schema, or a path"
                )
            where = self._store.link if self._where is None else self._where
            number = self._copies
            self._sent += 1
            told: dict[str, Any] = {
                "uuid": self._uuid,
                "begun": self._store is not None,
                "awaits": self._uuid if self._mode == "w" else self._awaits,
            }
            told["copy"] = f"{self._copy} pickle {number}"
        return _reopen, (type(self), where, self.path, options, self.max_size, told)

    def __copy__(self) -> Any:
        raise ModeError(
            f"{self!r} cannot be copied within a process: the copy would read the same rows, and never write. buffer.save(folder) and "
            "load(folder) of another buffer copy the samples; leanreplay.open(path) reads the same file once more"
        )

    def __deepcopy__(self, memo: Any) -> Any:
        return self.__copy__()

    def _require(self) -> Any:
        """The store, its state settled; None while nothing was added to a new buffer."""
        if self._closed:
            raise ModeError(f"{self!r} is closed; open it again with leanreplay.open(path)")
        if self._replacing:
            self._end_replacing()
        store = self._store
        if store is None:
            if self._mode != "r" or not self._exists():
                return None
            found = self._open_store()
            if self._awaits not in (None, found.table.uuid):  # the file that the writer is going to replace with its first batch
                found.close()
                return None
            self._store = store = found
            self._adopt(None)
        store.ready()
        if not store.writable and store.moved():
            if self._where is None:
                raise ModeError("the buffer in memory was resized; send it to this process again")
            store = self._follow(store)
        return store

    def _follow(self, store: Any) -> Any:
        """A reader whose file was replaced goes on with the new one: the same buffer, or another one of the class, with its parameters.

        Raises MismatchError for one of another class.
        """
        fresh = self._open_store()
        table: Table = fresh.table
        if table.kind != self.kind:
            fresh.close()
            raise MismatchError(
                f"{self.path} was replaced by a {table.kind}, but this reader is a {self.kind}; open it again with leanreplay.open(path)"
            )
        self._store, self.max_size = fresh, self._file_size(table)
        if table.uuid != self._uuid:
            self._draw_keys, self._policy_at = {}, -1
            self._set_counts(0, self._copies)
            self._take_from_file()
            self._adopt(None)
        return fresh  # the other one is closed when nobody reads from it any more

    def _end_replacing(self) -> None:
        """After an exception within `resize` and the like: what stands under the name counts, old or new."""
        refuse_within(self, {DataBuffer._rewrite.__code__, type(self)._copy_from.__code__}, self.path)
        old = self._store
        if old is None and self._mode == "w":
            pass  # whatever it is, the first batch replaces it
        elif self._where is not None and self._exists():
            if old is not None:
                old.unguard()  # the file may be the same
            self._store = self._open_store()
            if old is not None:
                old.close()
            table: Table = self._store.table
            self.max_size = self._max_size = self._file_size(table)
            self._uuid = table.uuid
        elif self._where is not None:
            self._store = None
        self._policy_at = -1
        self._replacing = False

    def _require_writable(self) -> Any:
        if self._before_write:
            for settle in tuple(self._before_write):
                settle()
        store = self._require()
        if self._mode == "r":
            raise ModeError(
                f"{self.path or 'this buffer'} is open for reading only (mode 'r', or a forked or unpickled copy); "
                "open it with mode='r+' in one process to write"
            )
        return store

    # -- what it is --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Samples that the buffer holds now."""
        with self._lock:
            store = self._require()
            return self._reach.told(0 if store is None else int(store.size))

    @property
    def seen(self) -> int:
        """Samples offered so far, kept or not: the position in the stream."""
        with self._lock:
            store = self._require()
            return 0 if store is None else int(store.seen)

    @property
    def seed(self) -> int:
        """Seed of all random choices."""
        return self._seed or 0

    @property
    def stream(self) -> int:
        """Number of the stream that is fed."""
        return self._stream or 0

    @property
    def mode(self) -> str:
        """The mode; "r" in forked and unpickled copies."""
        return self._mode

    @property
    def schema(self) -> Schema | None:
        """What a sample looks like; None before the first batch."""
        with self._lock:
            store = self._require()
            return None if store is None else store.table.schema

    @property
    def nbytes(self) -> int:
        """Bytes of the file, or of shared memory."""
        with self._lock:
            store = self._require()
            return 0 if store is None else int(store.table.file_size)

    def __repr__(self) -> str:
        where = f"{self.max_size}" if self.path is None else repr(self.path) if self._folder else f"{self.max_size}, {self.path!r}"
        if self._closed:
            return f"{type(self).__name__}({where}, closed)"
        try:
            held, seen, schema = len(self), self.seen, self.schema
        except LeanReplayError as error:
            return f"{type(self).__name__}({where}, {type(error).__name__})"
        return f"{type(self).__name__}({where}, seed={self.seed}, len={held}, seen={seen}, mode={self._mode!r}, {schema})"

    # -- writing -----------------------------------------------------------------------------------------------------

    def add(
        self,
        batch: Any,
        *,
        metadata: Mapping[str, Any] | None = None,
        group: Any = None,
        at: int | None = None,
        moved: tuple[Any, Any, Mapping[str, Any]] | None = None,
    ) -> None:
        """Offer a batch to the buffer, in order.

        batch: the nested structure of a sample, each leaf of shape (n, ...): an array, a tensor (any device), or what np.asarray takes.
        A list of samples is no batch: stack them, or call `update`. (For samples that are lists of several alike give a tuple.)
        metadata: name -> (n, ...) array, the same names with every batch. group: (n,) integers that class-balancing
        buffers balance over, and that `index/group` holds; by default the second element of a pair, if that is an integer.
        at: stream position of the first sample; samples that the buffer has already seen are skipped.
        moved: (rows, positions, {name: (k, ...) values}) of samples drawn before, k integers each: metadata to overwrite first, in the
        same commit, where a row still holds the sample of that position (so a kill never leaves one without the other). Not
        done for a batch that was seen before. In an InfiniteBuffer, and beyond half of what a commit may change, it is a commit before.

        Costs a copy of the samples that stay, and about 3 ns for one that does not. A batch that does not fit the schema
        is refused as a whole (SchemaError). An empty batch does nothing. After a StorageError `seen` says what is in: nothing of the
        batch, or the first commits of one that takes several; `add(batch, at=position)` goes on without counting those twice.

        >>> import numpy as np
        >>> from leanreplay import ReservoirBuffer
        >>> buffer = ReservoirBuffer(2)
        >>> buffer.add((np.zeros((3, 4)), np.array([0, 1, 2])))
        >>> len(buffer), buffer.seen
        (2, 3)
        """
        with self._lock:
            store = self._require_writable()
            schema, checked = self._checked(store, batch, metadata, group)
            n, groups = checked.n, checked.groups
            skip = self._skip(at, n, store)
            if n == skip and (n or moved is None):
                return
            moving = None if moved is None else self._moving(store, moved)
            if n == 0:
                if moving is not None:
                    self._move(store, moving)
                return
            if store is None:
                self._new_policy(self._params_given()).check_groups(groups[skip:])
                self._create(schema)
            self._feed(n, skip, groups, checked.fetch, moving, checked.data if checked.simple else None)

    def check_batch(self, batch: Any, *, metadata: Mapping[str, Any] | None = None, group: Any = None) -> None:
        """Raise what `add` would raise for this batch because of what it is; changes nothing.

        >>> import numpy as np
        >>> from leanreplay import ReservoirBuffer
        >>> buffer = ReservoirBuffer(2)
        >>> buffer.add((np.zeros((3, 4)), np.array([0, 1, 2])))
        >>> buffer.check_batch((np.zeros((3, 5)), np.array([0, 1, 2])))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        leanreplay.errors.SchemaError: data/0: expected float64 of shape (3, 4), got float64 of shape (3, 5); ...
        """
        with self._lock:
            store = self._require_writable()
            checked = self._checked(store, batch, metadata, group)[1]
            policy = self._new_policy(self._params_given()) if store is None else self._ready_policy(store)
            policy.check_groups(checked.groups)

    def _checked(self, store: Any, batch: Any, metadata: Any, group: Any) -> tuple[Schema, Batch]:
        """A batch that fits the schema, with its groups; and the schema, which the first batch decides."""
        schema = Schema.from_batch(batch, metadata) if store is None else store.table.schema
        leaves = schema.flatten(batch) + schema.flatten_metadata(metadata)
        checked = Batch(leaves, schema.fields)
        checked.groups = self._groups(checked, schema, group)
        return schema, checked

    def update(self, dataset: Any, *, metadata: Mapping[str, Any] | None = None, group: Any = None, at: int | None = None) -> None:
        """Offer a map-style dataset (`len` and `[i]`, items without metadata) to the buffer, in order.

        A tuple of arrays or tensors of one length, `(x, y)`, is a dataset of pairs, as for `fit`. Items may hold whatever `np.asarray`
        takes, images of PIL too. What `dataset[i]` raises comes through as it is.
        Only samples that stay (to the end of a commit) are loaded. metadata, group, at: as for `add`, for the whole dataset.
        A buffer that balances takes labels from `group`, or from `dataset.targets`; without either, every item is read once more.
        Of a `torch.utils.data.Subset` it looks at the dataset within, and a `TensorDataset` is read as the batch that its tensors are.

        >>> import numpy as np
        >>> from leanreplay import ReservoirBuffer
        >>> buffer = ReservoirBuffer(2)
        >>> buffer.update([(np.zeros(4), label) for label in range(100)])
        >>> buffer.seen
        100
        """
        with self._lock:
            store = self._require_writable()
            items = Items(dataset, metadata, None if store is None else store.table.schema)
            n = items.n
            if n == 0:
                return
            skip = self._skip(at, n, store)
            groups = items.groups(group, self.policy_class.needs_groups, skip)
            if n == skip:
                return
            if store is None:
                if groups is not None:
                    self._new_policy(self._params_given()).check_groups(groups[skip:])
                self._create(items.schema)
            self._feed(n, skip, groups, items.fetch(groups), data=None if groups is None else items.data)

    def _groups(self, batch: Batch, schema: Schema, group: Any) -> Ints:
        n = batch.n
        if group is not None:
            return integers(group, n, "group")
        field = schema.label_field
        if field is not None:
            labels = batch.plain[field]
            return integers(batch.leaves[field] if labels is None else labels, n, schema.fields[field].name)
        if self.policy_class.needs_groups:
            raise SchemaError(
                f"{type(self).__name__} balances over classes: give group=(n,) integers, or samples that are pairs with an integer label"
            )
        return np.full(n, -1, np.int64)

    def _skip(self, at: int | None, n: int, store: Any) -> int:
        seen = 0 if store is None else store.seen
        if seen + n >= 2**STREAM_BITS:
            raise ArgumentError(f"a stream holds at most 2**{STREAM_BITS} samples; go on with another stream number")
        if at is None:
            return 0
        position = integer("at", at, 0, 2**STREAM_BITS - 1) or 0
        if position > seen:
            raise ArgumentError(f"at={position}, but the buffer has seen only {seen} samples: {position - seen} between would be missing")
        return min(n, seen - position)

    def _new_policy(self, params: dict[str, Any]) -> Policy:
        return self.policy_class(self.max_size, self.seed, params)

    def _ready_policy(self, store: Any) -> Policy:
        """The policy in the state of the store: derived anew from the index after anything unexpected."""
        policy = self._policy
        if policy is None or self._policy_at != store.sequence:
            store.verify_index()
            policy = self._policy = self._new_policy(store.table.params)
            policy.state, policy.log, policy.slots = store.policy, store.log(), store.table.log[1]
            vars(store).pop("scratch", None)  # an exception within `plan` may have left something in it
            if policy.slots:  # one that frees rows
                policy.scratch = store.scratch
            try:
                policy.load(*store.index())
            except MemoryError:
                raise StorageError(errno.ENOMEM, f"no memory for the policy of {self.max_size} rows; read with mode='r'") from None
            self._policy_at = store.sequence
        return policy

    def _feed(
        self, n: int, skip: int, groups: Ints | None, fetch: Fetch, moving: MetadataUpdate | None = None, data: list[Any] | None = None
    ) -> None:
        """Plan and commit samples skip to n, in commits of as many as the journal can undo; `moving` goes with the first.

        data: the bytes of all samples, if they are at hand; then a commit is mostly one call, and `fetch` for what is none.
        """
        store = self._store
        if self._no_groups.shape[0] == 0:
            self._no_groups = np.zeros(_CHUNK, np.int64)
        if groups is not None and self.policy_class.check_groups is not Policy.check_groups:
            self._ready_policy(store).check_groups(groups[skip:])
        if data is not None and groups is not None and not groups.flags.carray:
            groups = groups.copy()  # for other memory the kernel would be compiled once more
        if moving is not None and 2 * moving.rows.shape[0] > store.most:
            self._move(store, moving)
            moving = None
        done = skip
        while done < n:
            first = store.seen
            policy = self._ready_policy(store)
            m = min(n - done, _CHUNK)
            start = (self.stream << STREAM_BITS) + first
            most = store.most if moving is None else store.most - moving.rows.shape[0]
            self._policy_at = -1
            plan = policy.plan(start, self._no_groups[:m] if groups is None else groups[done : done + m], most)
            check_plan(policy, plan)
            rows, freed = plan.rows, plan.freed
            used = rows.shape[0]
            if plan is LOG_TOO_SHORT and policy.slots:
                live = self._all_rows(store)
                slots = 4 * store.table.log[1]
                self._rewrite(store, self.max_size, store.table.schema, live, live, store.policy, store.log(), slots, keep_points=True)
                store = self._store
                continue
            if (
                data is not None and groups is not None and moving is None and 0 < used <= m and not len(freed) and not len(plan.log)
                and store.commit_planned(PlannedBatch(first, policy.state, rows, start, groups, done, data, most))
            ):  # fmt: skip
                self._policy_at = store.sequence
                done += used
                continue
            kept = store.survivors(rows, freed, start) if 0 < used <= m else None
            count = -1 if kept is None else kept.n
            if count == -2:
                raise ArgumentError(
                    f"{type(policy).__name__}.plan freed {freed.shape[0]} rows, of which some are not live, taken by the same plan, "
                    "or given twice: rows that are live before it and free after it are allowed"
                )
            if kept is None or not 0 <= count <= most:
                raise ArgumentError(
                    f"{type(policy).__name__}.plan used {used} of {m} samples and took {count} rows: "
                    f"1 to {m} samples, at most {most} rows from 0 to {self.max_size - 1}, or -1, are allowed"
                )
            if moving is not None:
                moving = _without(moving, kept.rows, freed)
            if count:
                before = store.sequence
                sources, tags = fetch(kept.samples + done if done else kept.samples)
                if store.sequence != before:
                    raise ModeError("the dataset changed the buffer that it was feeding, which stops here; feed it from elsewhere")
                store.commit(Change(first + used, policy.state, kept.rows, kept.positions, tags, sources, freed, plan.log, moving, first))
            else:
                store.commit(Change(first + used, policy.state, freed=freed, log=plan.log, update=moving, after=first))
            moving = None
            self._policy_at = store.sequence
            done += used

    def _moving(self, store: Any, moved: Any) -> MetadataUpdate | None:
        """What `add` is to move; None if no row holds its sample any more."""
        try:
            rows, positions, values = moved
            names = list(values)
        except (TypeError, ValueError):
            raise ArgumentError(f"moved is (rows, positions, {{name: values}}), got {moved!r:.200}") from None
        if store is None:
            raise RowError("moved: the buffer is empty, there is nothing to move")
        found = self._live(store, rows)
        fields = [self._metadata_index(store, name) for name in names]
        sources = {f: self._metadata_source(store, f, values[name], found) for f, name in zip(fields, names, strict=True)}
        found, samples = _held(store, found, positions)
        if not found.shape[0] or not fields:
            return None
        store.verify_index()
        for field in fields:
            store.read(found, field)  # a damaged row must not get a checksum that fits it
        return MetadataUpdate(found, {f: (data, samples) for f, data in sources.items()})

    def _metadata_source(self, store: Any, field: int, values: Any, rows: Ints) -> npt.NDArray[np.uint8]:
        """The bytes of values for these rows. Raises SchemaError where they do not fit."""
        schema: Schema = store.table.schema
        return flat(to_numpy(check_leaf(values, schema.fields[field], rows.shape[0]), schema.fields[field]))

    def _move(self, store: Any, moving: MetadataUpdate) -> None:
        """Commit moved metadata, in commits of as many rows as the journal holds."""
        for start in range(0, moving.rows.shape[0], store.most):
            part = slice(start, start + store.most)
            sources = {f: (data, samples[part]) for f, (data, samples) in moving.sources.items()}
            store.commit(Change(store.seen, store.policy, update=MetadataUpdate(moving.rows[part], sources)))
        if self._policy_at != -1:
            self._policy_at = store.sequence  # metadata does not concern the policy

    # -- reading -----------------------------------------------------------------------------------------------------

    def sample(self, n: int, replace: bool = False) -> tuple[Any, dict[str, Any]]:
        """Draw n samples uniformly: (batch, metadata), copies with a leading dimension of n.

        metadata: every metadata field, "idx" (the rows, int64) and "position" (in the stream, int64). Without `replace` the n are
        distinct, and n at most len(buffer). A draw is a function of (seed, stream, seen, number of draws before); the last
        is part of `state_dict`. Costs the copy, its checksums included, and a few microseconds.

        Copies of a buffer in other processes (forked or unpickled) each draw a stream of their own: which one follows from the number
        of forks and pickles before, of the process that unpickles also from its number in multiprocessing and from how often it did
        so, and in a worker of torch's DataLoader from the worker's seed. So a program that starts its workers in the same order draws
        the same again, except where a pool gives jobs to whichever worker is free. Readers that several processes open by path draw
        the same, except in workers of a DataLoader.

        >>> import numpy as np
        >>> from leanreplay import ReservoirBuffer
        >>> buffer = ReservoirBuffer(100)
        >>> buffer.add((np.arange(100.0), np.arange(100)), metadata={"logits": np.zeros((100, 10), "float32")})
        >>> (x, y), meta = buffer.sample(4)
        >>> x.shape, sorted(meta)
        ((4,), ['idx', 'logits', 'position'])
        """
        return self._sample(n, replace)  # type: ignore[return-value]

    def _sample(
        self, n: int, replace: bool = False, at_most: bool = False, convert: Convert | None = None
    ) -> tuple[Any, dict[str, Any]] | None:
        """`sample`; at_most: take as many as there are, if fewer; None if there are none. convert: makes what transforms get."""
        with self._lock:
            store = self._require()
            if at_most:
                if store is None or not store.size:
                    return None
                n = min(n, store.size)
            if type(n) is not int or not 0 <= n <= 2**40:
                n = required("n", n, 0, 2**40)
            if not isinstance(replace, (bool, np.bool_)):
                raise ArgumentError(f"replace must be True or False, got {replace!r:.200}")
            counter = None
            for _ in range(100):
                try:
                    sequence = -1 if store is None else store.sequence
                    self._check_size(store, n, replace)
                    if counter is None:
                        counter = next(self._counter)
                    return self._emit(store, self._draw(store, n, bool(replace), "sample", counter), convert)
                except RowError as error:  # a reader may have met a rollback or resize that freed rows
                    if store is None:
                        raise
                    old, store = store, self._require()
                    if store is old and (store.writable or store.sequence == sequence):
                        raise CorruptionError(
                            f"{self.path or 'this buffer'}: rows that the header counts are free; buffer.check() lists the wrong rows; "
                            "restore the file from a copy made with save()"
                        ) from error
            raise RowError(f"{self.path}: rows keep being freed while they are read")

    def _check_size(self, store: Any, n: int, replace: bool) -> None:
        """Raise ArgumentError for a draw of more than there is."""
        size = 0 if store is None else store.size
        if n > size and not (replace and size):
            raise ArgumentError(
                f"sample of {n} from a buffer of {size}; add samples first"
                + ("" if replace or not size else f", draw at most {size}, or use replace=True")
            )

    def _draw(self, store: Any, n: int, replace: bool, consumer: str, counter: int) -> Ints:
        """The rows of draw number `counter` of a consumer, which has seen that there are enough."""
        if not n:
            return np.empty(0, np.int64)
        k0, k1 = self._keys(consumer)
        size, high = store.extent
        if size != high:
            return store.pick_live(n, lambda among, out: reservoir.draw(among, k0, k1, store.seen, counter, replace, out))
        rows = np.empty(n, np.int64)
        reservoir.draw(size, k0, k1, store.seen, counter, replace, rows)
        return rows

    def _keys(self, consumer: str) -> tuple[np.uint64, np.uint64]:
        """What the draws of a consumer are hashed with: other keys for each copy of a buffer, and for readers in each DataLoader worker."""
        keys = self._draw_keys.get(consumer)
        if keys is None:
            worker = _worker() if self._mode == "r" else ""
            keys = self._draw_keys[consumer] = key_pair(f"draw {self.stream} {consumer}{self._copy}{worker}", self.seed)
        return keys

    def _set_counts(self, drawn: int, copies: int) -> None:
        """So many draws were made, and copies: forks since then and pickles."""
        self._counter = iter(range(drawn + 1, _MOST_DRAWS))  # an iterator: a signal handler cannot get the same number
        self._sent, self._forks_before = copies, system.forks

    @property
    def _drawn(self) -> int:
        return _MOST_DRAWS - 1 - operator.length_hint(self._counter)

    @property
    def _copies(self) -> int:
        return self._sent + system.forks - self._forks_before

    def _own_stream(self, copy: str) -> None:
        """From here on this is a copy of its own: it draws what no other copy does."""
        self._copy += f" {copy}"
        self._draw_keys = {}
        self._set_counts(0, 0)

    def _emit(self, store: Any, rows: Ints, convert: Convert | None = None) -> tuple[Any, dict[str, Any]]:
        if store is None:
            raise RowError("the buffer is empty: it has no schema before its first batch")
        arrays, index = store.read(rows)
        return self._present(store.table.schema, arrays, index, rows, convert)

    def _present(
        self, schema: Schema, arrays: list[Any], index: Ints, rows: Ints, convert: Convert | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """What was read, as `sample` returns it: nested, transformed, with its metadata."""
        split = len(schema.data)
        batch = schema.unflatten(arrays[:split])
        if self.transform is not None or self.target_transform is not None:
            samples = [self._transform_one(schema, [a[i] for a in arrays[:split]], convert) for i in range(rows.shape[0])]
            batch = stack(samples) if samples else batch
        meta = dict(zip(schema.metadata_names, arrays[split:], strict=True)) if schema.metadata else {}
        meta["idx"] = rows
        meta.update(self._index_meta(index))
        return batch, meta

    def _index_meta(self, index: Ints) -> dict[str, Any]:
        """What the metadata of samples tells of their entries in the index, (2, n)."""
        return {"position": index[0]}

    def _transform_one(self, schema: Schema, leaves: list[Any], convert: Convert | None) -> Any:
        sample = schema.unflatten(leaves)
        if isinstance(sample, (tuple, list)) and len(sample) == 2:
            x, y = sample
            x = _apply(self.transform, x, "data/0", schema, convert)
            y = _apply(self.target_transform, y, "data/1", schema, convert)
            return (x, y) if isinstance(sample, tuple) else [x, y]
        if self.target_transform is not None:
            raise ArgumentError("target_transform needs samples that are pairs; use transform, which gets the whole sample")
        return _apply(self.transform, sample, "data", schema, convert)

    def get(self, rows: Any) -> tuple[Any, dict[str, Any]]:
        """The samples in these rows (as in meta["idx"]), like `sample`. Raises RowError for rows that hold none."""
        with self._lock:
            store = self._require()
            return self._emit(store, self._live(store, rows))

    def _live(self, store: Any, rows: Any) -> Ints:
        """Rows as an int64 array, each within the rows in use."""
        array = plain_array(rows, "rows", ArgumentError)
        if array.size == 0:
            array = array.astype(np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ArgumentError(f"rows are a list or array of integers, got {array.dtype} of shape {array.shape}")
        array = array.astype(np.int64)
        high = 0 if store is None else store.high
        if array.size and (array.min() < 0 or array.max() >= high):
            raise RowError(f"rows from {array.min()} to {array.max()}, but the rows in use are 0 to {high - 1}")
        return array

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        """The index-th sample and its metadata, without a batch dimension; the order is that of the rows."""
        return self._items_at([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, dict[str, Any]]]:
        """Several samples in one read: what torch's DataLoader calls.

        An index that was below a length told before, and is beyond the samples that are there now, gets another live sample: rows
        may go while a DataLoader goes on, as when a balanced buffer meets a new class. `buffer[i]` is a RowError then.
        """
        return self._items_at(indices, self._reach.now())

    def _items_at(self, indices: Sequence[int], reach: int = 0, convert: Convert | None = None) -> list[tuple[Any, dict[str, Any]]]:
        """The i-th live samples. reach: as of `places`."""
        with self._lock:
            for _ in range(100):
                store = self._require()
                size, before = (0, -1) if store is None else (store.size, store.sequence)
                rows = places(indices, size, reach, functools.partial(self._stand_in, store, size))
                if not rows.shape[0]:
                    return []
                try:
                    live = store.live_rows()
                    rows = rows if live is None else live[rows]
                    arrays, index = store.read(rows)
                    return self._items_of(store.table.schema, arrays, index, rows, convert)
                except RowError:  # a reader may have met a commit that freed rows
                    if store.writable or store.sequence == before:
                        raise
            raise RowError(f"{self.path}: rows keep being freed while they are read")

    def _stand_in(self, store: Any, size: int, index: int) -> int:
        """Which of `size` samples a dataset shows instead of one that is there no more: a uniform draw of its own for each index."""
        out = np.empty(1, np.int64)
        reservoir.draw(size, *key_pair(f"draw {self.stream} dataset", self.seed), store.seen, index, False, out)
        return int(out[0])

    def _items_of(
        self, schema: Schema, arrays: list[Any], index: Ints, rows: Ints, convert: Convert | None = None
    ) -> list[tuple[Any, dict[str, Any]]]:
        """What was read, sample by sample."""
        split = len(schema.data)
        names, told = schema.metadata_names, self._index_meta(index)
        items = []
        for i in range(rows.shape[0]):
            sample = self._transform_one(schema, [a[i] for a in arrays[:split]], convert)
            meta = {name: a[i] for name, a in zip(names, arrays[split:], strict=True)}
            meta["idx"] = int(rows[i])
            meta |= {name: values[i].item() for name, values in told.items()}
            items.append((sample, meta))
        return items

    def __iter__(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        for i in range(len(self)):
            yield self[i]

    def get_metadata(self, name: str, rows: Any = None) -> np.ndarray[Any, Any]:
        """One metadata field, "idx" or "position" of these rows, by default of all samples in row order: a copy, (n, ...)."""
        with self._lock:
            store = self._require()
            if store is None:
                raise RowError("the buffer is empty: it has no schema before its first batch")
            found = self._all_rows(store) if rows is None else self._live(store, rows)
            if name == "idx":
                return found
            field = self._metadata_index(store, name if name != "position" else None)
            arrays, index = store.read(found, field)
            return index[0].copy() if name == "position" else arrays[0]

    def _all_rows(self, store: Any) -> Ints:
        live = store.live_rows()
        return np.arange(store.size) if live is None else live.copy()

    def _metadata_index(self, store: Any, name: str | None) -> int:
        """Field number of a metadata name; None: the field that costs least to read."""
        schema: Schema = store.table.schema
        if name is None:
            return int(np.argmin([f.nbytes for f in schema.fields]))
        names = schema.metadata_names
        if name not in names:
            raise SchemaError(f"no metadata {name!r}; the buffer has {names}, and 'idx' and 'position'")
        return len(schema.data) + names.index(name)

    def set_metadata(self, name: str, values: Any, rows: Any = None, *, positions: Any = None) -> None:
        """Overwrite one metadata field of these rows, by default of all samples in row order. values: (n, ...).

        positions: skip rows that no longer hold the sample of that stream position. Rows are written in commits of as many as the
        journal holds (8 MiB), each whole or not at all; in an InfiniteBuffer each part is at least one commit of its own. A name that
        the buffer does not have yet adds a field, which needs values for all samples, rewrites the file and ends all restore points.
        """
        with self._lock:
            store = self._require_writable()
            if store is None:
                raise RowError("the buffer is empty: give metadata with its first batch")
            found = self._all_rows(store) if rows is None else self._live(store, rows)
            schema: Schema = store.table.schema
            if f"metadata/{name}" not in [f.name for f in schema.metadata]:
                self._add_field(store, name, values, found)
                return
            field = self._metadata_index(store, name)
            data = self._metadata_source(store, field, values, found)
            found, samples = _held(store, found, positions)
            if not found.shape[0]:
                return
            if (store.positions_of(found) < 0).any():
                raise RowError("set_metadata: some of these rows are free; the live ones are in meta['idx'] of a sample")
            store.verify_index()
            for start in range(0, found.shape[0], store.most):
                store.read(found[start : start + store.most], field)  # a damaged row must not get a checksum that fits it
            self._move(store, MetadataUpdate(found, {field: (data, samples)}))

    # -- structure ---------------------------------------------------------------------------------------------------

    def resize(self, max_size: int) -> None:
        """Change the number of rows: writes a new file and renames it over. Ends all restore points. Costs a copy of the samples.

        Too many samples are dropped as the policy says (a reservoir keeps its largest keys, so stays uniform). A reservoir that has
        dropped or rejected samples cannot use additional rows (the capacity rule), and says so in a CapacityWarning.
        """
        with self._lock:
            store = self._require_writable()
            size = integer("max_size", max_size, 1, 2**40)
            if size is None:
                raise ArgumentError("resize needs the new max_size")
            if store is None:
                before, self.max_size = self.max_size, size
                try:
                    self._settle_params()
                except BaseException:
                    self.max_size = before
                    raise
                self._max_size = size
                return
            if size == self.max_size:
                return
            policy = self._ready_policy(store)
            if type(policy).keep is Policy.keep and type(self)._keep is DataBuffer._keep:
                raise ArgumentError(f"{type(self).__name__} cannot be resized: {type(policy).__name__}.keep does not say which rows stay")
            self._policy_at = -1  # `keep` changes its state: should anything fail from here on, it is derived anew
            live = self._all_rows(store)
            keep = live[_checked_keep(policy, self._keep(store, policy, size, live), size, live.shape[0])]
            warning = policy.capacity_warning(size)
            if warning:
                warnings.warn(f"resize to {size}: {warning}", CapacityWarning, stacklevel=2)
            self._rewrite(store, size, store.table.schema, keep, np.arange(keep.shape[0]), policy.state, policy.log)

    def _keep(self, store: Any, policy: Policy, size: int, live: Ints) -> Ints:
        """Which of the live rows `resize` keeps, as the policy says."""
        positions, groups = store.index()
        return policy.keep(size, positions[live], groups[live])

    def _add_field(self, store: Any, name: str, values: Any, rows: Ints) -> None:
        values = batch_leaf(values, f"metadata/{name}")
        dtype, shape, torch = leaf_type(values, f"metadata/{name}")
        field = metadata_field(name, Field(f"metadata/{name}", dtype, tuple(shape[1:]), torch))
        if field.nbytes == 0:
            raise SchemaError(f"metadata/{name}: entries of shape {field.shape} have no bytes")
        everything = self._all_rows(store)
        if not np.array_equal(np.sort(rows), everything):
            raise SchemaError(f"metadata/{name} is new: give values for all {store.size} samples (rows=None), not for {rows.shape[0]}")
        check_leaf(values, field, rows.shape[0])
        schema = store.table.schema.with_metadata(field)
        order = np.argsort(rows, kind="stable")
        extra = to_numpy(values, field)[order]
        self._rewrite(store, self.max_size, schema, everything, everything, store.policy, store.log(), store.table.log[1], (field, extra))

    def _rewrite(
        self,
        store: Any,
        size: int,
        schema: Schema,
        rows: Ints,
        new_rows: Ints,
        state: Sequence[int],
        log: Ints,
        slots: int = 0,
        extra: Any = None,
        keep_points: bool = False,
    ) -> None:
        """Replace the file by one of another size or schema: rows[i] becomes new_rows[i]. Whole or not at all.

        keep_points: restore points stay, because neither rows nor schema change.
        """
        old: Table = store.table
        table, pieces = self._plan_file(old.params, size, old.seed, old.stream, schema, old.uuid, max(slots, 2 * log.shape[0]))
        fields = schema.fields

        def fill(new: Store) -> None:
            for start in range(0, rows.shape[0], new.most):
                these = rows[start : start + new.most]
                arrays, index = store.read(these)
                if extra is not None:
                    arrays.insert(fields.index(extra[0]), np.ascontiguousarray(extra[1][start : start + new.most]))
                where = np.arange(these.shape[0])
                sources = [(flat(a), where) for a in arrays]
                new.commit(Change(store.seen, state, new_rows[start : start + new.most], index[0], index[1], sources))
            if new.seen != store.seen or not rows.shape[0] or log.shape[0]:
                new.commit(Change(store.seen, state, log=log))

        store.stay()
        self._replacing = True
        heir_of = store if keep_points else None
        created = Store.create(self._where, table, pieces, replace=True, fill=fill, heir_of=heir_of, **self._options)
        self._store, self.max_size, self._max_size = created, size, size
        if keep_points:
            store.give_away_points()
        self._policy_at = -1
        self._replacing = False
        store.mark_gone()
        store.close()

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Mark a restore point and describe it: a small dict of plain values, to be kept in a checkpoint.

        From now on the old bytes of rows that change are kept in a file beside the buffer, each once. Costs under a millisecond.
        The state of a buffer in memory can be loaded while its process lives, as the samples are not in it: the first call says so in
        a VolatileStateWarning. To resume in another process give the buffer a path, or use `save` and `load`.
        """
        with self._lock:
            store = self._require_writable()
            if self._where is None and self._may_warn and store is not None and store.seen:
                self._may_warn = False
                warnings.warn(
                    "the state of a buffer in memory can be loaded only while this process lives: the samples are not in it; give the "
                    "buffer a path to resume in another process, or copy it with save(folder)",
                    VolatileStateWarning,
                    stacklevel=_outside(),
                )
            self._marked = True
            return {
                "format": 1,
                "kind": self.kind,
                "uuid": self._uuid,
                "max_size": self.max_size or 0,
                "seen": 0 if store is None else store.seen,
                "state": empty_state() if store is None else store.mark(),
                "draws": {"sample": self._drawn},
                "copies": self._copies,
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Bring the buffer back to the state of `state_dict`: samples, metadata, `seen`, and the draws that follow.

        Raises StateError, and changes nothing, for a state of another buffer, one that the buffer is behind of, or one whose
        restore point is gone. Costs a copy of the rows that changed since.

        >>> import numpy as np, os, tempfile
        >>> from leanreplay import ReservoirBuffer
        >>> buffer = ReservoirBuffer(2, os.path.join(tempfile.mkdtemp(), "replay.h5"))
        >>> buffer.add(np.arange(5.0))
        >>> state = buffer.state_dict()
        >>> buffer.add(np.arange(5.0, 100.0))
        >>> buffer.load_state_dict(state)
        >>> buffer.seen
        5
        """
        with self._lock:
            store = self._require_writable()
            seen, name = self._check_state(state)
            if store is None:
                if name != empty_state():
                    raise StateError(f"this buffer is empty, and so {seen} samples behind the state; open its file with mode='r+'")
                self._marked = True  # the way back here must be there again
            else:
                if name != store.mark_name():
                    self._policy_at = -1  # not left to the sequence: that of a folder is a sum, which may come out the same
                store.rollback(name, seen)
                store.mark()
            self._set_counts(*_counts(state))

    def _check_state(self, state: Any) -> tuple[int, str]:
        """`seen` and the restore point of a state. Raises StateError for one that is not of this buffer."""
        wanted = {"format": int, "kind": str, "uuid": str, "max_size": int, "seen": int, "state": str, "draws": dict, "copies": int}
        if not isinstance(state, Mapping) or any(type(state.get(k)) is not t for k, t in wanted.items()):
            raise StateError(f"not a state of a buffer: expected a dict with {sorted(wanted)}, got {state!r:.200}")
        if state["format"] != 1:
            raise StateError(f"state of format {state['format']}, but this release reads 1; upgrade leanreplay")
        if state["kind"] != self.kind:
            raise StateError(f"the state of a {state['kind']}, but this is a {self.kind}")
        try:
            _counts(state)
        except ValueError as error:
            raise StateError(f"not a state of a buffer: {error}") from None
        if state["seen"] < 0:
            raise StateError(f"not a state of a buffer: {state!r:.200}")
        if not re.fullmatch("[0-9a-f]{16}(,[0-9a-f]{16})*" if self._folder else "[0-9a-f]{16}", state["state"]):
            raise StateError(f"not a state of a buffer: {state['state']!r:.200}")
        empty = state["state"] == empty_state()  # every buffer begins in this one
        if state["uuid"] != self._uuid and not empty:
            raise StateError(f"the state of another buffer (uuid {state['uuid']}, this one's is {self._uuid})")
        if state["max_size"] != (self.max_size or 0):
            raise StateError(f"the state of this buffer with max_size {state['max_size']}, but it was resized to {self.max_size}")
        return state["seen"], state["state"]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Copy the whole buffer into a folder, made if missing; shares disk blocks where the file system can.

        A copy that stood there is replaced at once, when the new one is complete. Raises LockedError if somebody writes to that.
        Killed at any moment, this leaves one of the two whole, each with its own draws. The next save, load or opening removes the rest.
        """
        with self._lock:
            store = self._require()
            if store is None:
                raise ModeError("the buffer is empty: there is nothing to save before its first batch")
            folder = as_path(folder, "folder")
            with system.storage_errors(f"saving to {folder}"), contextlib.ExitStack() as held:
                system.make_folders(folder)
                system.refuse_alien(os.path.join(folder, "state.json"))
                for copy, name in self._saved_in(folder):
                    if os.path.realpath(copy) == self._where:
                        raise ArgumentError(f"save to another folder: {copy} is this buffer itself")
                    try:
                        held.enter_context(system.replacing(copy, name))
                    except LockedError as error:
                        raise self._locked(error, copy) from None
                users = held.enter_context(system.users_of(folder))
                users.alone(lambda: _remove_leftovers(folder))
                self._save_to(store, folder)
                users.alone(lambda: _remove_leftovers(folder))

    def _saved_in(self, folder: str) -> list[tuple[str, str]]:
        """Of each copy that a save into a folder replaces: the file that its writer locks, and the name of his other lock."""
        path = os.path.join(folder, "buffer.h5")
        return [(path, path)]

    def _save_to(self, store: Any, folder: str) -> None:
        """Make a copy. Until the new file has its name, state.json speaks of both copies, and each has draws of its own there."""
        path = os.path.join(folder, "buffer.h5")
        temp = _copy_aside(store, path + ".saved", store.status)
        try:
            state = self._copy_state(store)
            older = [s for s in _saved_states(folder) if not _same_copy(s, state)]
            _write_state(folder, state | {"older": older}, store.status)
            system.publish(temp, path, True)
        except BaseException:
            system.discard(temp)
            raise
        system.sync_folder(path)
        if older:
            with contextlib.suppress(OSError):  # which is only longer than it need be
                _write_state(folder, state, store.status)

    def _copy_state(self, store: Any) -> dict[str, Any]:
        """What state.json tells of a copy, and by which it knows its file."""
        draws = {"draws": {"sample": self._drawn}, "copies": self._copies}
        return {"format": 1, "kind": self.kind, **draws, "uuid": self._uuid, "max_size": self.max_size, "state": store.mark_name()}

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Replace this buffer's contents by a copy that `save` made, draws included. Ends all restore points.

        Raises MismatchError for a copy of other parameters (parameters of a buffer that is still empty are compared too).
        """
        with self._lock:
            store = self._require_writable()
            if store is not None:
                store.stay()
            folder = as_path(folder, "folder")
            with contextlib.ExitStack() as stack:
                with system.storage_errors(f"loading from {folder}"):
                    if os.path.isdir(folder):
                        stack.enter_context(system.users_of(folder)).alone(lambda: _remove_leftovers(folder))
                    states = _saved_states(folder, strict=True)
                    counts = [_counts(state) for state in states]
                    self._replacing = True
                    self._copy_from(store, folder, states[0])
                self._policy_at = -1
                self._replacing = False
                now = self._copy_state(self._store)
                self._set_counts(*next((c for s, c in zip(states, counts, strict=True) if _same_copy(s, now)), (0, 0)))

    def _compare(self, table: Table, path: str) -> None:
        """Raise MismatchError unless a saved file fits this buffer."""
        mine = {"max_size": self.max_size, "seed": self.seed, "stream": self.stream, "kind": self.kind}
        found = {"max_size": self._file_size(table), "seed": table.seed, "stream": table.stream, "kind": table.kind}
        if self._store is not None:
            mine["schema"], found["schema"] = str(self._store.table.schema), str(table.schema)
        mine |= {k: v for k, v in self._params_given().items() if v is not None}
        found |= {k: v for k, v in table.params.items() if k in mine}
        if mine != found:
            differing = [f"{k}={found.get(k)!r} (this buffer: {v!r})" for k, v in mine.items() if found.get(k) != v]
            raise MismatchError(f"{path} is a copy of a buffer with {', '.join(differing)}; load it into one created like that")

    def _copy_from(self, store: Any, folder: str, state: Mapping[str, Any]) -> None:
        path = os.path.join(folder, "buffer.h5")
        if os.path.realpath(path) == self._where:
            raise ArgumentError(f"load from another folder: {path} is this buffer itself")
        if not system.exists(path):
            raise MissingError(f"{path} does not exist: there is no whole copy made by save() in {folder}; load another one")
        saved = Store.open(path, writable=False, name=path)
        try:
            self._compare(saved.table, path)
            if self._where is None:
                created = _copy_to_memory(saved, self._durable, self._points)
            else:
                temp = _copy_aside(saved, self._where, system.status(self._where) or saved.status)
                try:  # mapped, and locked, before it has its name: from then on nothing can fail
                    created = Store.open(temp, writable=True, name=self._where, **self._options)
                    try:
                        system.publish(temp, self._where, True)
                    except BaseException:
                        created.close()
                        raise
                except BaseException:
                    system.discard(temp)
                    raise
                system.sync_folder(self._where)
                created.drop_points()
        finally:
            saved.close()
        self._store, self._uuid = created, created.table.uuid
        if store is not None:
            store.mark_gone()
            store.close()

    def flush(self) -> None:
        """Make the present state survive a power cut: everything up to here, restore points too, is on the disk when this returns."""
        with self._lock:
            store = self._require()
            if store is not None:
                store.flush()

    def check(self) -> list[Problem]:
        """Everything wrong with the file, each `Problem` with the rows it is about; an empty list if nothing is. Reads all of it.

        A reader beside a writer reports no row that a commit is changing. Where commits leave it no pause within a second, it does not
        compare the rows as a whole with the header: the writer's own `check` does.
        """
        with self._lock:
            store = self._require()
            return [] if store is None else store.check()


class ReservoirBuffer(DataBuffer):
    """A uniform sample without replacement of everything seen: at every moment each stream position is held with equal probability.

    >>> import numpy as np
    >>> from leanreplay import ReservoirBuffer
    >>> buffer = ReservoirBuffer(100, seed=0)
    >>> for start in range(0, 10_000, 50):
    ...     buffer.add((np.random.rand(50, 3), np.arange(start, start + 50)))
    >>> (x, y), meta = buffer.sample(32)
    """

    policy_class = ReservoirPolicy


class SlidingWindowBuffer(DataBuffer):
    """The last `max_size` samples of the stream."""

    policy_class = SlidingWindowPolicy


class GreedyClassBalancingBuffer(DataBuffer):
    """Every sample enters; once full, a random member of the largest class is replaced, ties broken at random.

    Classes are the second element of a sample that is a pair, or `group`. This is the greedy sampler of GDumb
    (Prabhu, Torr and Dokania, ECCV 2020): balanced, but not uniform within a class; early samples are favoured.
    """

    policy_class = GreedyClassBalancingPolicy


def _file_name(path: Any, mode: str) -> str:
    """A path as str. What other libraries have in its place, given by position, is refused with the way out."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise ArgumentError(f"path must be a str or os.PathLike, got {path!r:.200}; give anything else by name: seed=0, adaptive_size=True")
    if isinstance(path, str) and mode not in ("r", "r+") and _NO_NAMES.fullmatch(path) and not os.path.lexists(path):
        raise ArgumentError(
            f"path={path!r} would make a file of that name; give what you mean by name (groupby='class', transform=None), "
            f"or write './{path}' for such a file"
        )
    return as_path(path)


def _held(store: Any, rows: Ints, positions: Any) -> tuple[Ints, Ints]:
    """Of given rows, each once: (rows, where the last value for each stands). positions: only those that hold these; None: all."""
    samples = np.arange(rows.shape[0])
    if positions is not None:
        same = store.positions_of(rows) == integers(positions, rows.shape[0], "positions")
        rows, samples = rows[same], samples[same]
    _, last = np.unique(rows[::-1], return_index=True)
    order = np.sort(rows.shape[0] - 1 - last)
    return rows[order], samples[order]


def _apply(function: Any, value: Any, path: str, schema: Schema, convert: Convert | None) -> Any:
    """What a transform makes of an element."""
    if function is None:
        return value
    if convert is None and _takes_tensors(function):  # torchvision's, for instance, hand arrays back as they are
        convert = importlib.import_module("leanreplay.torch.data").to_torch
    return call(f"the transform of {path}", function, value if convert is None else convert(value, schema.bfloat16, None, path))


def _takes_tensors(function: Any) -> bool:
    """Whether a transform is a torch module, or begins with one."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    steps = getattr(function, "transforms", None)
    function = getattr(function, "__self__", getattr(function, "func", function))
    return isinstance(function, torch.nn.Module) or (isinstance(steps, list) and any(map(_takes_tensors, steps)))


def _without(moving: MetadataUpdate, *gone: Ints) -> MetadataUpdate | None:
    """What is left to move when these rows get other samples, or none."""
    stays = ~np.isin(moving.rows, np.concatenate(gone))
    if stays.all():
        return moving
    sources = {f: (data, samples[stays]) for f, (data, samples) in moving.sources.items()}
    return MetadataUpdate(moving.rows[stays], sources) if stays.any() else None


def _checked_keep(policy: Policy, kept: Any, size: int, held: int) -> Ints:
    """What `keep` of a policy, perhaps of the user's own, said. Raises ArgumentError for what no kernel must see."""
    rows = np.asarray(kept)
    right = rows.ndim == 1 and rows.shape[0] <= size and (rows.dtype.kind in "iu" or not rows.shape[0])
    rows = rows.astype(np.int64) if right else NO_ROWS
    if not right or ((rows < 0) | (rows >= held)).any() or np.unique(rows).shape[0] != rows.shape[0]:
        raise ArgumentError(
            f"{type(policy).__name__}.keep gave {kept!r:.200}: at most {size} different numbers from 0 to {held - 1} are allowed"
        )
    return rows


def places(indices: Sequence[int], size: int, reach: int = 0, stand_in: Callable[[int], int] | None = None) -> Ints:
    """Indices into `size` samples, negative ones counting from the end, as (n,) int64. Raises RowError outside.

    reach: those from `size` to below this were within when they were chosen: each gets the place that `stand_in` gives for it.
    """
    try:
        found = [operator.index(i) for i in indices]
    except TypeError:
        raise ArgumentError(f"buffer[i] takes an integer, got {indices!r}; use buffer.get(rows) for several") from None
    wrong = [i for i in found if not -size <= i < max(size, reach if size else 0)]
    if wrong:
        raise RowError(f"index {wrong[0]} of a buffer of {size}")
    return np.array([i % size if i < size or stand_in is None else stand_in(i) for i in found], np.int64)


class Reach:
    """Up to which index a dataset answers: below the largest length that it has told, because rows go while a sampler goes on.

    In a DataLoader's worker every index: they were chosen in another process, from the length that was told there.
    """

    def __init__(self) -> None:
        self._most = 0

    def told(self, length: int) -> int:
        """Note the length that `__len__` is to tell, which calls this.

        torch's RandomSampler asks for it once more when its pass is over, and takes one that has changed for the wish for some more
        samples: within a pass it is told the length that this began with, its variable n.
        """
        asks = sys._getframe(2)
        if asks.f_code.co_name == "num_samples" and asks.f_globals.get("__name__") == "torch.utils.data.sampler" and asks.f_back:
            length = asks.f_back.f_locals.get("n", length)
        self._most = max(self._most, length)
        return length

    def now(self) -> int:
        """One past the last index."""
        return 2**62 if _worker() else self._most


def open_buffer(path: str | os.PathLike[str], mode: str = "r", **options: Any) -> DataBuffer:
    """Open an existing buffer with the class that its file names. options: as for `DataBuffer`. mode "a" is "r+": it creates nothing.

    A class of your own must have been imported before.

    >>> import leanreplay, numpy as np, tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "replay.h5")
    >>> with leanreplay.ReservoirBuffer(10, path) as buffer:
    ...     buffer.add(np.arange(5))
    >>> len(leanreplay.open(path))
    5
    """
    choice("mode", mode, MODES)
    if mode in ("x", "w"):
        raise ArgumentError(
            f"leanreplay.open opens existing buffers; create one with a class, for instance ReservoirBuffer(n, path, mode={mode!r})"
        )
    where = os.path.realpath(as_path(path))
    if mode == "a" and not os.path.lexists(where):
        raise MissingError(
            f"{path} does not exist, and leanreplay.open cannot tell what to create; "
            f"create it with its class, for instance ReservoirBuffer(n, path, mode='a')"
        )
    kind = "InfiniteBuffer" if os.path.isdir(where) else read_table(where).kind
    if kind not in _KINDS:
        raise MismatchError(f"{where} is a {kind}; import the module that defines this class first. Known here: {sorted(_KINDS)}")
    return _KINDS[kind](path=path, mode="r+" if mode == "a" else mode, **options)


def _reopen(
    cls: type[DataBuffer], where: str, path: str | None, options: dict[str, Any], max_size: int, told: dict[str, Any]
) -> DataBuffer:
    """A reader of the same file or shared memory in another process: what unpickling calls.

    told: of the buffer that was pickled, its uuid, whether it had begun its file, whose file it awaits, and which copy this is.
    """
    buffer = cls.__new__(cls)
    DataBuffer.__init__(buffer, max_size, None, **options)
    buffer._mode, buffer._uuid, buffer._awaits = "r", told["uuid"], told["awaits"]
    buffer._own_stream(told["copy"] + _loading(told["copy"] + told["uuid"]))
    if path is not None:
        buffer.path, buffer._where = path, where
        buffer._take_from_file()
        if told["begun"] and buffer._exists():
            buffer._store = buffer._open_store()
    else:
        try:
            buffer._store = Store.open(where, writable=False, name=None)
        except LeanReplayError as error:
            raise ModeError(f"the process that holds this buffer in memory has ended or closed it ({error})") from None
        buffer._take_from_file()
    if buffer._store is not None:
        if buffer._store.table.uuid != told["uuid"]:
            raise ModeError(
                f"{path} holds another buffer than the one that was pickled; open what is there now with leanreplay.open(path)"
                if path is not None
                else "this buffer in memory was closed, or its process has ended, and another buffer has taken its place; send that one"
            )
        buffer._adopt(None)
    return buffer


def _loading(copy: str) -> str:
    """Which unpickling of a copy this is: the same bytes may arrive in several processes, and several times."""
    times = _loaded.pop(copy, -1) + 1
    while len(_loaded) >= _REMEMBERED:
        _loaded.pop(next(iter(_loaded)))
    _loaded[copy] = times
    processes = sys.modules.get("multiprocessing.process")
    number = () if processes is None else processes.current_process()._identity
    return f" in {_process}/{'.'.join(map(str, number))} {times}"


def _outside() -> int:
    """For `warnings.warn`, the `stacklevel` of the code that called into this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(os.path.dirname(os.path.dirname(__file__))):
        level, frame = level + 1, frame.f_back
    return level


def _worker() -> str:
    """Which worker of a DataLoader this process is: its seed, which follows from torch's generator."""
    workers = sys.modules.get("torch.utils.data")
    info = None if workers is None else workers.get_worker_info()
    return "" if info is None else f" worker {info.seed}"


def _counts(state: Mapping[str, Any]) -> tuple[int, int]:
    """Draws and copies of a state. Raises ValueError for what cannot be such."""
    draws, copies = state["draws"], state.get("copies", 0)
    if not isinstance(draws, Mapping) or not set(draws) <= {"sample"}:
        raise ValueError(f"draws {draws!r:.200}")
    found = draws.get("sample", 0), copies
    if any(type(v) is not int or not 0 <= v < _MOST_DRAWS - 1 for v in found):
        raise ValueError(f"draws {draws!r:.200}, copies {copies!r:.200}")
    return found


def _is_left_over(path: str | None, identity: str) -> bool:
    """Whether a file is one that this very buffer made when an exception came before it was told: it holds nothing yet."""
    if path is None or not os.path.exists(path):
        return False
    try:
        found = Store.open(path, writable=False, name=path)
    except LeanReplayError:
        return False
    same = found.table.uuid == identity and found.seen == 0
    found.close()
    return same


def _copy_aside(store: Any, path: str, model: os.stat_result | None) -> str:
    """Copy a store's file, with mode and owner of `model`, to a temporary one for a path, whole and durable; its name."""
    for _ in range(100):
        before = store.sequence
        fd, temp = system.temporary(path, model)
        try:
            try:
                store.copy_to(fd)
                os.fsync(fd)
            finally:
                os.close(fd)
            store.ready()
            if store.writable or (store.sequence == before and not store.pending()):
                return temp
            os.unlink(temp)
        except BaseException:
            system.discard(temp)
            raise
    raise ModeError(f"{store.path} is being written to; save it from the process that writes, or close that first")


def _copy_store(store: Any, path: str, model: os.stat_result | None = None) -> None:
    """Copy a store's file so that it appears whole under another name, with mode and owner of `model`, or its own."""
    temp = _copy_aside(store, path, model or store.status)
    try:
        system.publish(temp, path, True)
    except BaseException:
        system.discard(temp)
        raise
    system.sync_folder(path)


def _copy_to_memory(store: Any, durable: bool, points: int) -> Store:
    """A copy of a store in memory."""
    fd = system.memory_file("leanreplay", store.table.file_size)
    created = None
    try:
        store.copy_to(fd)
        created = Store(None, fd, store.table, True, durable, points)
        created.recover()
        return created
    except BaseException:
        if created is not None:
            created.close()
        else:
            os.close(fd)
        raise


def _saved_states(folder: str, strict: bool = False) -> list[dict[str, Any]]:
    """What state.json says: of the last copy, then of older ones. strict: errors for one that is missing or damaged."""
    try:
        opener = lambda path, _: system.open_own(path, system.OPEN_READ)  # noqa: E731
        with open(os.path.join(folder, "state.json"), encoding="utf-8", opener=opener) as file:
            state = json.load(file)
        if state["format"] != 1:
            raise ValueError(f"format {state['format']!r:.100}, but this release reads 1")
        states = [state, *state.pop("older", [])]
        for one in states:
            _counts(one)
            if not isinstance(one.get("parts", ""), str):
                raise ValueError(f"parts {one['parts']!r:.100}")
        return states
    except FileNotFoundError:
        if strict:
            raise MissingError(f"{folder} holds no copy made by save(): there is no state.json in it") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if strict:
            raise FormatError(f"{folder}/state.json: {error}; load another copy") from None
    return []


def _same_copy(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two states of `save` are of files that hold the same."""
    return all(one.get(name) == other[name] for name in ("uuid", "max_size", "state"))


def _write_state(folder: str, state: Mapping[str, Any], model: os.stat_result | None) -> None:
    """Put state.json into a folder, whole and durable."""
    path = os.path.join(folder, "state.json")
    fd, temp = system.temporary(path, model)
    try:
        try:
            system.write_all(fd, json.dumps(state).encode(), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        system.publish(temp, path, True)
    except BaseException:
        system.discard(temp)
        raise
    system.sync_folder(path)


def _remove_leftovers(folder: str) -> None:
    """Remove what killed savers left in a folder, and what older copies did, while nobody saves or loads there."""
    system.remove_temporaries(os.path.join(folder, "buffer.h5.saved"))
    system.remove_temporaries(os.path.join(folder, "state.json"))
    states = _saved_states(folder)
    named = {state.get("parts") for state in states}
    for name in os.listdir(folder):
        unknown = re.fullmatch("parts-[0-9a-f]{8}", name) and name not in named
        if unknown and (states or not os.path.lexists(os.path.join(folder, "state.json"))):  # else a damaged one may name it
            system.remove_folder(os.path.join(folder, name))


_BUFFERS = weakref.WeakSet()
_process = ""  # which fork of which fork this process is
_loaded: dict[str, int] = {}  # how often this process has unpickled a copy, the newest last


def _after_fork() -> None:
    global _process  # noqa: PLW0603
    _process += f" {system.forks}"
    for buffer in list(_BUFFERS):
        buffer._become_reader()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
