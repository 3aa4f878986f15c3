"""`DataBuffer`: what every buffer does. It is put together from objects that each do one thing.

current (the store, modes, lock) | location | parameters | tag | feeder (the way in) | draws | view (the way out) | checkpoints
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from ..arguments import as_path, check_call, choice, function_or_none, instance, integer
from ..arrays import Ints
from ..errors import ArgumentError, LeanReplayError, ModeError, RowError
from ..policies.base import Params, Policy
from ..samples.schema import Schema
from ..storage.layout import KINDS, Table
from ..storage.store import Problem, Store
from . import rewriting
from .checkpoint import Checkpoints
from .current import Current, Packed
from .drawing import Draws
from .feeding import Feeder
from .location import InMemory, Location, OneFile, Options, checked_path
from .parameters import Kind, Parameters
from .reading import Array, Reach, View, all_rows, parse_rows
from .tag import Label

Self = TypeVar("Self", bound="DataBuffer")  # typing has one of its own from Python 3.11 on

MODES = ("x", "a", "r+", "r", "w")


class DataBuffer:
    """Base class of all buffers: samples in one memory-mapped HDF5 file, or in shared memory.

    A subclass names its policy; that is all an own buffer needs:

    >>> import leanreplay, numpy as np
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
    path: the file; None keeps the buffer in shared memory, with everything else the same. A word
        that other libraries take here by position, such as "class" or "cpu", is refused: write
        "./class" for such a file.
    seed: of all random choices, any integer of 128 bits; a new buffer takes 0.
    stream: number of the stream that is fed, 0 to 32767, for several buffers that will be merged;
        a new buffer takes 0.
    mode: "x" create, refusing an existing file; "a" open or create; "r+" open; "r" open for reading;
        "w" replace (the old file stays until the first batch, or with `schema` goes at once).
        Parameters left at None are those of the file; others that differ are a MismatchError.
    schema: a `Schema`, to create the file at once; otherwise the first batch decides, and creates it.
    transform, target_transform: called with the first and the second element of each sample (without
        a pair: with the whole sample) whenever it is read, never when it is stored. They get arrays;
        torch modules, and whatever is read through `leanreplay.torch`, get tensors.
    lock: False goes on where the file system has no locks (the error then names this option).
        Nothing keeps a second writer out then: that is up to you. Stored nowhere.
    durable: make every commit survive a power cut, for about 4 ms a commit, and every state that
        `state_dict` returns with the way back to it. Without it `flush` does both when called; a
        killed process loses nothing either way.
    restore_points: how many states that `state_dict` returned can be loaded again, at least 2. The
        newest ones count.

    Errors are all `LeanReplayError`. A buffer may be used from several threads; calls wait for each
    other. A signal handler may read, in the middle of another reading too, but not write; in the
    middle of a change it gets a ModeError. Pickled, a buffer goes to other processes as a reader of
    the same file or memory, whatever its mode (ModeError if another buffer stands there by then).
    To write there, send the path, and open it with mode="r+" once this writer is closed.
    `copy.copy` and `copy.deepcopy` are a ModeError.
    """

    policy_class: ClassVar[type[Policy]]
    kind: ClassVar[str] = "DataBuffer"
    tag_class: ClassVar[type[Label]] = Label
    whole_journal: ClassVar[bool] = False  # whether one commit may overwrite all rows
    sized: ClassVar[bool] = True  # whether there is a max_size; an InfiniteBuffer has none
    _with_metadata: ClassVar[bool] = True  # items are (sample, metadata)
    _params: Params = {}  # noqa: RUF012 - the policy's parameters, as a subclass was given them

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" not in cls.__dict__:
            cls.kind = cls.__name__
        KINDS[cls.kind] = cls

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
        parameters = Parameters(self._declared(), max_size, seed, stream, dict(self._params))
        options = Options(bool(durable), integer("restore_points", restore_points, 2, 2**20) or 2, bool(lock))
        self._compose(parameters, None if path is None else checked_path(path, mode), options, mode, transform, target_transform)
        self.current.begin(schema)

    def _compose(
        self,
        parameters: Parameters,
        path: str | None,
        options: Options,
        mode: str,
        transform: Callable[[Any], Any] | None,
        target_transform: Callable[[Any], Any] | None,
        where: str = "",
    ) -> None:
        """Put the buffer together. None of its parts refers to it, so it is closed as soon as nobody else does."""
        self.parameters, self.draws = parameters, Draws(parameters)
        self.location = self._location(path, where or os.path.realpath(path or ""), options, parameters)
        self.current = Current(f"{type(self).__name__} at {id(self):#x}", self.location, parameters, self.draws, mode)
        tag = self.tag_class(type(self).__name__, self.policy_class.needs_groups)
        self.view = View(self.current, tag, transform, target_transform)
        self.feeder = Feeder(self.current, tag)
        self.checkpoints = Checkpoints(self.current, self.feeder)
        self._reach = Reach()

    # -- what a class declares ---------------------------------------------------------------------------------------

    @classmethod
    def _declared(cls) -> Kind:
        return Kind(cls.kind, cls.policy_class, cls.whole_journal, cls.sized, cls._stored_schema)

    @classmethod
    def table_problem(cls, table: Table) -> str | None:
        """Return what is impossible about the table of a file of this kind; None if nothing is."""
        return cls._declared().table_problem(table) if hasattr(cls, "policy_class") else None

    @classmethod
    def _stored_schema(cls, schema: Schema) -> Schema:
        """Return the schema of the file, given that of samples."""
        return schema

    @staticmethod
    def _location(path: str | None, where: str, options: Options, parameters: Parameters) -> Location:
        return InMemory(options, parameters) if path is None else OneFile(path, where, options, parameters)

    def _rows_to_keep(self, store: Store, policy: Policy, size: int, live: Ints) -> Ints:
        """Return which of the live rows `resize` keeps, as numbers into `live`."""
        if type(policy).keep is Policy.keep:
            raise ArgumentError(f"{type(self).__name__} cannot be resized: {type(policy).__name__}.keep does not say which rows stay")
        positions, tags = store.index()
        return policy.keep(size, positions[live], tags[live])

    # -- opening and closing -----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the file and release the writer's lock. Closing twice is fine; else a ModeError follows."""
        self.current.close()

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

    def __reduce__(self) -> tuple[Callable[..., DataBuffer], tuple[object, ...]]:
        return type(self)._unpickle, (self.current.pack(), self.transform, self.target_transform)

    @classmethod
    def _unpickle(cls: type[Self], packed: Packed, transform: Any, target_transform: Any) -> Self:
        """Make a reader of the same file or shared memory in another process."""
        buffer = cls.__new__(cls)
        parameters = Parameters(cls._declared(), None, None, None, {})
        buffer._compose(parameters, packed.path, Options(False, 2, True), "r", transform, target_transform, packed.where)
        buffer.current.unpack(packed)
        return buffer

    def __copy__(self) -> DataBuffer:
        raise ModeError(
            f"{self!r} cannot be copied within a process: the copy would read the same rows, and never write. buffer.save(folder) and "
            "load(folder) of another buffer copy the samples; leanreplay.open(path) reads the same file once more"
        )

    def __deepcopy__(self, memo: object) -> DataBuffer:
        return self.__copy__()

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def lock(self) -> threading.RLock:  # type: ignore[valid-type]
        """The lock that whoever uses the store holds."""
        return self.current.lock

    @property
    def path(self) -> str | None:
        """The path as it was given; None in memory."""
        return self.location.path

    @property
    def max_size(self) -> int:
        """Rows of the buffer; None in an InfiniteBuffer."""
        return self.parameters.max_size  # type: ignore[return-value]

    @property
    def transform(self) -> Callable[[Any], Any] | None:
        """What the first element of a sample goes through when it is read. May be set."""
        return self.view.transform

    @transform.setter
    def transform(self, transform: Callable[[Any], Any] | None) -> None:
        self.view.transform = transform

    @property
    def target_transform(self) -> Callable[[Any], Any] | None:
        """What the second element of a sample goes through when it is read. May be set."""
        return self.view.target_transform

    @target_transform.setter
    def target_transform(self, transform: Callable[[Any], Any] | None) -> None:
        self.view.target_transform = transform

    def __len__(self) -> int:
        """Samples that the buffer holds now."""
        with self.current.lock:
            return self._reach.told(self.current.reading().size)

    @property
    def seen(self) -> int:
        """Samples offered so far, kept or not: the position in the stream."""
        with self.current.lock:
            return self.current.reading().seen

    @property
    def seed(self) -> int:
        """Seed of all random choices."""
        return self.parameters.seed

    @property
    def stream(self) -> int:
        """Number of the stream that is fed."""
        return self.parameters.stream

    @property
    def mode(self) -> str:
        """The mode; "r" in forked and unpickled copies."""
        return self.current.mode

    @property
    def schema(self) -> Schema | None:
        """What a sample looks like; None before the first batch."""
        with self.current.lock:
            return self.current.reading().schema

    @property
    def nbytes(self) -> int:
        """Bytes of the file, of all parts, or of shared memory."""
        with self.current.lock:
            return self.current.reading().nbytes

    def __repr__(self) -> str:
        if self.current.closed:
            return repr(self.current)
        name, where = type(self).__name__, self.current.place
        try:
            held, seen, schema = len(self), self.seen, self.schema
        except LeanReplayError as error:
            return f"{name}({where}, {type(error).__name__})"
        return f"{name}({where}, seed={self.seed}, len={held}, seen={seen}, mode={self.mode!r}, {schema})"

    # -- writing -----------------------------------------------------------------------------------------------------

    def add(
        self,
        batch: Any,
        *,
        metadata: Mapping[str, Any] | None = None,
        group: object = None,
        at: int | None = None,
        moved: tuple[object, object, Mapping[str, Any]] | None = None,
    ) -> None:
        """Offer a batch to the buffer, in order.

        batch: the nested structure of a sample, each leaf of shape (n, ...): an array, a tensor (any
        device), or what np.asarray takes. A list of samples is no batch: stack them, or call `update`.
        (For samples that are lists of several alike give a tuple.)
        metadata: name -> (n, ...) array, the same names with every batch.
        group: (n,) integers that class-balancing buffers balance over, and that `index/group` holds;
        by default the second element of a pair, if that is an integer.
        at: stream position of the first sample; samples that the buffer has already seen are skipped.
        moved: (rows, positions, {name: (k, ...) values}) of samples drawn before, k integers each:
        metadata to overwrite first, in the same commit, where a row still holds the sample of that
        position (so a kill never leaves one without the other). Not done for a batch that was seen
        before. In an InfiniteBuffer, and beyond half of what a commit may change, it is a commit before.

        Costs a copy of the samples that stay, and about 3 ns for one that does not. A batch that does
        not fit the schema is refused as a whole (SchemaError). An empty batch does nothing. After a
        StorageError `seen` says what is in: nothing of the batch, or the first commits of one that
        takes several; `add(batch, at=position)` goes on without counting those twice.

        >>> import numpy as np
        >>> from leanreplay import ReservoirBuffer
        >>> buffer = ReservoirBuffer(2)
        >>> buffer.add((np.zeros((3, 4)), np.array([0, 1, 2])))
        >>> len(buffer), buffer.seen
        (2, 3)
        """
        with self.current.lock:
            self.feeder.add(batch, metadata, group, at, moved)

    def check_batch(self, batch: Any, *, metadata: Mapping[str, Any] | None = None, group: object = None) -> None:
        """Raise what `add` would raise for this batch because of what it is; changes nothing.

        >>> import numpy as np
        >>> from leanreplay import ReservoirBuffer
        >>> buffer = ReservoirBuffer(2)
        >>> buffer.add((np.zeros((3, 4)), np.array([0, 1, 2])))
        >>> buffer.check_batch((np.zeros((3, 5)), np.array([0, 1, 2])))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        leanreplay.errors.SchemaError: data/0: expected float64 of shape (3, 4), got float64 of shape (3, 5); ...
        """
        with self.current.lock:
            self.feeder.check(batch, metadata, group)

    def update(self, dataset: Any, *, metadata: Mapping[str, Any] | None = None, group: object = None, at: int | None = None) -> None:
        """Offer a map-style dataset (`len` and `[i]`, items without metadata) to the buffer, in order.

        A tuple of arrays or tensors of one length, `(x, y)`, is a dataset of pairs, as for `fit`. Items
        may hold whatever `np.asarray` takes, images of PIL too. What `dataset[i]` raises comes through.
        Only samples that stay (to the end of a commit) are loaded. metadata, group, at: as for `add`,
        for the whole dataset. A buffer that balances takes labels from `group`, or from
        `dataset.targets`; without either, every item is read once more. Of a
        `torch.utils.data.Subset` it looks at the dataset within, and a `TensorDataset` is read as the
        batch that its tensors are.

        >>> import numpy as np
        >>> from leanreplay import ReservoirBuffer
        >>> buffer = ReservoirBuffer(2)
        >>> buffer.update([(np.zeros(4), label) for label in range(100)])
        >>> buffer.seen
        100
        """
        with self.current.lock:
            self.feeder.update(dataset, metadata, group, at)

    def set_metadata(self, name: str, values: Any, rows: object = None, *, positions: object = None) -> None:
        """Overwrite one metadata field of these rows, by default of all samples in row order. values: (n, ...).

        positions: skip rows that no longer hold the sample of that stream position. Rows are written in
        commits of as many as the journal holds (8 MiB), each whole or not at all; in an InfiniteBuffer
        each part is at least one commit of its own. A name that the buffer does not have yet adds a
        field, which needs values for all samples, rewrites the file and ends all restore points.
        """
        with self.current.lock:
            store = self.current.writing()
            if store.schema is None:
                raise RowError("the buffer is empty: give metadata with its first batch")
            found = all_rows(store) if rows is None else parse_rows(store, rows)
            if name in store.schema.metadata_names:
                self.feeder.set_metadata(store, name, values, found, positions)
            else:
                rewriting.add_field(self.current, store, name, values, found)

    # -- reading -----------------------------------------------------------------------------------------------------

    def sample(self, n: int, replace: bool = False) -> tuple[Any, dict[str, Any]]:
        """Draw n samples uniformly: (batch, metadata), copies with a leading dimension of n.

        metadata: every metadata field, "idx" (the rows, int64) and "position" (in the stream, int64).
        Without `replace` the n are distinct, and n at most len(buffer). A draw is a function of (seed,
        stream, seen, number of draws before); the last is part of `state_dict`. Costs the copy, its
        checksums included, and a few microseconds.

        Copies of a buffer in other processes (forked or unpickled) each draw a stream of their own.
        Which one follows from the number of forks and pickles before, of the process that unpickles also
        from its number in multiprocessing and from how often it did so, and in a worker of torch's
        DataLoader from the worker's seed. So a program that starts its workers in the same order draws
        the same again, except where a pool gives jobs to whichever worker is free. Readers that several
        processes open by path draw the same, except in workers of a DataLoader.

        >>> import numpy as np
        >>> from leanreplay import ReservoirBuffer
        >>> buffer = ReservoirBuffer(100)
        >>> buffer.add((np.arange(100.0), np.arange(100)), metadata={"logits": np.zeros((100, 10), "float32")})
        >>> (x, y), meta = buffer.sample(4)
        >>> x.shape, sorted(meta)
        ((4,), ['idx', 'logits', 'position'])
        """
        return self.view.sample(n, replace)  # type: ignore[return-value]  # it is None for `at_most` only

    def get(self, rows: object) -> tuple[Any, dict[str, Any]]:
        """The samples in these rows (as in meta["idx"]), like `sample`. Raises RowError for rows that hold none."""
        return self.view.get(rows)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        """The index-th sample and its metadata, without a batch dimension; the order is that of the rows."""
        return self.view.items_at([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, dict[str, Any]]]:
        """Several samples in one read: what torch's DataLoader calls.

        Rows may go while a DataLoader goes on, as when a balanced buffer meets a new class. An index that
        was below a length told before, and is beyond the samples that are there now, gets another live
        sample; `buffer[i]` is a RowError then.
        """
        return self.view.items_at(indices, self._reach.now())

    def __iter__(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        for i in range(len(self)):
            yield self[i]

    def get_metadata(self, name: str, rows: object = None) -> Array:
        """One metadata field, "idx" or "position" of these rows, by default of all samples in row order: a copy, (n, ...)."""
        return self.view.metadata(name, rows)

    # -- structure and state -----------------------------------------------------------------------------------------

    def resize(self, max_size: int) -> None:
        """Change the number of rows: writes a new file and renames it over. Costs a copy of the samples.

        Ends all restore points. Too many samples are dropped as the policy says (a reservoir keeps its
        largest keys, so stays uniform). A reservoir that has dropped or rejected samples cannot use
        additional rows (the capacity rule), and says so in a CapacityWarning.
        """
        with self.current.lock:
            rewriting.resize(self.current, self.feeder.take_policy, self._rows_to_keep, max_size)

    def state_dict(self) -> dict[str, Any]:
        """Mark a restore point and describe it: a small dict of plain values, to be kept in a checkpoint.

        From now on the old bytes of rows that change are kept in a file beside the buffer, each once.
        Costs under a millisecond. The state of a buffer in memory can be loaded while its process lives,
        as the samples are not in it: the first call says so in a VolatileStateWarning. To resume in
        another process give the buffer a path, or use `save` and `load`.
        """
        with self.current.lock:
            return self.checkpoints.mark()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Bring the buffer back to the state of `state_dict`: samples, metadata, `seen`, and the draws that follow.

        Raises StateError, and changes nothing, for a state of another buffer, one that the buffer is
        behind of, or one whose restore point is gone. Costs a copy of the rows that changed since.

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
        with self.current.lock:
            self.checkpoints.roll_back(state)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Copy the whole buffer into a folder, made if missing; shares disk blocks where the file system can.

        A copy that stood there is replaced at once, when the new one is complete. Raises LockedError if
        somebody writes to that copy. Killed at any moment, this leaves one of the two whole, each with
        its own draws. The next save, load or opening removes the rest.
        """
        with self.current.lock:
            self.checkpoints.save(as_path(folder, "folder"))

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Replace this buffer's contents by a copy that `save` made, draws included. Ends all restore points.

        Raises MismatchError for a copy of other parameters (those of an empty buffer are compared too).
        """
        with self.current.lock:
            self.checkpoints.load(as_path(folder, "folder"))

    def flush(self) -> None:
        """Make the present state, restore points too, survive a power cut: it is on the disk when this returns."""
        with self.current.lock:
            self.current.reading().flush()

    def check(self) -> list[Problem]:
        """Everything wrong with the file, each `Problem` with the rows it is about. Reads all of it.

        An empty list if nothing is wrong. A reader beside a writer reports no row that a commit is
        changing. Where commits leave it no pause within a second, it does not compare the rows as a whole
        with the header: the writer's own `check` does.
        """
        with self.current.lock:
            return self.current.reading().check()
