"""`DataBuffer`: how a buffer is made, and every method that changes one.

It adds two objects to those of a `ReadableBuffer`: feeder (the way in) | checkpoints (states)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

from ..arguments import as_path, check_call, choice, function_or_none, instance, integer
from ..arrays import Ints
from ..errors import ArgumentError, RowError
from ..policies.base import Policy
from ..samples.schema import Schema
from ..storage.layout import KIND_CHECKS
from ..storage.opening import Options
from ..storage.store import WritableStore
from . import rewriting
from .checkpoint import Checkpoints
from .copies import State
from .feeding import Feeder, Moved
from .location import checked_path
from .parameters import Parameters
from .readable import ReadableBuffer
from .reading import Transform, Transforms, parse_rows
from .values import all_rows

Self = TypeVar("Self", bound="DataBuffer")  # typing has one of its own from Python 3.11 on

KINDS: dict[str, type[DataBuffer]] = {}  # the class of each kind that is known
MODES = ("x", "a", "r+", "r", "w")


class DataBuffer(ReadableBuffer):
    """Base class of all buffers: samples in one memory-mapped HDF5 file, or in shared memory.

    A subclass names its policy; that is all an own buffer needs:

    >>> import leanreplay, numpy as np
    >>> class Coin(leanreplay.SlidingWindowPolicy):
    ...     "Rejects every second sample."
    ...     def plan(self, start, groups, max_rows):
    ...         if start % 2:
    ...             return leanreplay.Plan(np.array([-1]))
    ...         return super().plan(start, groups[:1], max_rows)
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
        that other libraries take here, such as "class" or "cpu", is refused: write "./class".
    seed: of all random choices, any integer of 128 bits; a new buffer takes 0.
    stream: number, 0 to 32767, of the stream that is fed; a new buffer takes 0. See `merge`.
    mode: "x" create, refusing an existing file; "a" open or create; "r+" open; "r" open to read;
        "w" replace (the old file stays until the first batch, or with `schema` goes at once).
        Parameters left at None are those of the file; others that differ are a MismatchError.
    schema: a `Schema`, to create the file at once; otherwise the first batch does both.
    transform, target_transform: called with the first and the second element of each sample
        (without a pair: with the whole sample) whenever it is read, never when it is stored. They
        get arrays; torch modules, and whatever is read through `leanreplay.torch`, get tensors.
    lock: False goes on where the file system has no locks (the error then names this option).
        Nothing keeps a second writer out then: that is up to you. Stored nowhere.
    durable: make every commit survive a power cut, for about 4 ms a commit, and every state of
        `state_dict`. Without it `flush` does both. A killed process loses nothing either way.
    restore_points: how many states of `state_dict`, the newest, can be loaded again; at least 2.
    verify: "once" compares a row with its checksums when it is first read after opening, which
        costs a byte of memory a row; "always" at every read, as readers always do. Stored nowhere.

    Errors are all `LeanReplayError`. Threads may share a buffer; calls wait for each other. A
    signal handler may read, even in the middle of another reading, but not write; in the middle of
    a change it gets a ModeError. Pickled, a buffer becomes a reader of the same file or memory in
    another process (ModeError if another buffer stands there by then). To write there, send the
    path, and open it with mode="r+" once this writer is closed. It cannot be copied with `copy`.
    """

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" not in cls.__dict__:
            cls.kind = cls.__name__
        KINDS[cls.kind] = cls
        KIND_CHECKS[cls.kind] = cls.table_problem

    def __new__(cls: type[Self], *args: object, **options: object) -> Self:
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
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        durable: bool = False,
        restore_points: int = 2,
        lock: bool = True,
        verify: str = "once",
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
        choice("verify", verify, ("once", "always"))
        options = Options(bool(durable), integer("restore_points", restore_points, 2, 2**20) or 2, bool(lock), verify == "always")
        given = None if path is None else checked_path(path, mode)
        self._compose(parameters, given, os.path.realpath(given or ""), options, mode, (transform, target_transform))
        self.current.begin(schema)

    def _compose(self, parameters: Parameters, path: str | None, where: str, options: Options, mode: str, transforms: Transforms) -> None:
        super()._compose(parameters, path, where, options, mode, transforms)
        self.feeder = Feeder(self.current, self.draws.values.tag)
        self.checkpoints = Checkpoints(self.current, self.feeder)

    def _rows_to_keep(self, store: WritableStore, policy: Policy, size: int, live: Ints) -> Ints:
        """Return which of the live rows `resize` keeps, as numbers into `live`."""
        return rewriting.kept_by_policy(type(self).__name__, store, policy, size, live)

    def add(
        self,
        batch: Any,
        *,
        metadata: Mapping[str, Any] | None = None,
        group: object = None,
        at: int | None = None,
        moved: Moved | None = None,
    ) -> None:
        """Offer a batch to the buffer, in order.

        batch: the nested structure of a sample, each leaf of shape (n, ...): an array, a tensor
            (any device), what exports its numbers to np.asarray, or a list of n images of PIL. A
            list of samples is no batch: stack them, or call `update`. (For samples that are lists
            of several alike give a tuple.)
        metadata: name -> (n, ...) array, the same names with every batch.
        group: (n,) integers that class-balancing buffers balance over, and that `index/group`
            holds; by default the second element of a pair, if that is an integer.
        at: stream position of the first sample; samples that were seen already are skipped.
        moved: (rows, positions, {name: (k, ...) values}) of samples drawn before: metadata to
            overwrite first, in the same commit, where a row still holds the sample of that position
            (a kill never leaves one without the other). Not done for a batch that was seen before.
            In an InfiniteBuffer, and beyond half of what a commit may change, a commit before.

        Costs a copy of the samples that stay, and about 3 ns for one that does not. A batch that
        does not fit the schema is refused as a whole (SchemaError). An empty batch does nothing.
        After a StorageError `seen` says what is in: nothing of the batch, or the first commits of
        one that takes several; `add(batch, at=position)` goes on without counting those twice.

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
        """Raise what `add` would raise for this batch because of what it is; change nothing."""
        with self.current.lock:
            self.feeder.check(batch, metadata, group)

    def update(self, dataset: Any, *, metadata: Mapping[str, Any] | None = None, group: object = None, at: int | None = None) -> None:
        """Offer a map-style dataset (`len` and `[i]`, items without metadata), in order.

        A tuple of arrays or tensors of one length, `(x, y)`, is a dataset of pairs. Items may hold
        whatever `np.asarray` takes, images of PIL too. What `dataset[i]` raises comes through. Only
        samples that stay (to the end of a commit) are loaded, and from a dataset that has
        `__getitems__(indices)`, as for torch's DataLoader, many at once: there worker processes can
        decode them. metadata, group, at: as for `add`,
        for the whole dataset. A buffer that balances takes labels from `group`, or from
        `dataset.targets`; without either, every item is read once more. Of a
        `torch.utils.data.Subset` it looks at the dataset within, and a `TensorDataset` is read as
        the batch that its tensors are.

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
        """Overwrite one metadata field of these rows, by default of all samples in row order.

        values: (n, ...). positions: skip rows that no longer hold the sample of that stream
        position. Rows are written in commits of as many as the journal holds (8 MiB), each whole or
        not at all; in an InfiniteBuffer each part is at least one commit of its own. A name that
        the buffer does not have yet adds a field, which needs values for all samples, rewrites the
        file (all parts, for which there must be disk space once more) and ends all restore points.
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

    def resize(self, max_size: int) -> None:
        """Change the number of rows: copy the samples to a new file, which takes the name.

        Ends all restore points. Too many samples are dropped as the policy says (a reservoir keeps
        its largest keys, so stays uniform). A reservoir that has dropped or rejected samples cannot
        use additional rows (the capacity rule), and says so in a CapacityWarning.
        """
        with self.current.lock:
            rewriting.resize(self.current, self.feeder.take_policy, self._rows_to_keep, max_size)

    def state_dict(self) -> dict[str, Any]:
        """Mark a restore point and describe it: a small dict of plain values, for a checkpoint.

        From now on the old bytes of rows that change are kept in a file beside the buffer, each
        once. Costs under a millisecond. The state of a buffer in memory can be loaded while its
        process lives, as the samples are not in it: the first call says so in a
        VolatileStateWarning. To resume in another process use a path, or `save` and `load`.
        """
        with self.current.lock:
            return self.checkpoints.mark()

    def load_state_dict(self, state: State) -> None:
        """Go back to a state of `state_dict`: samples, metadata, `seen`, and draws that follow.

        Raises StateError, and changes nothing, for a state of another buffer, one that the buffer
        is behind of, or one whose restore point is gone. Newer states end, unless there are kept
        ones. Costs a copy of the rows that changed; of those before too, if there are kept states.

        >>> import numpy as np
        >>> from leanreplay import ReservoirBuffer
        >>> buffer = ReservoirBuffer(2)
        >>> state = buffer.state_dict()
        >>> buffer.add(np.arange(5.0))
        >>> buffer.load_state_dict(state)
        >>> buffer.seen
        0
        """
        with self.current.lock:
            self.checkpoints.roll_back(state)

    def keep(self, state: State) -> None:
        """Keep the restore point of a state of `state_dict` until `release`, however old it gets.

        For the best of many checkpoints, while `restore_points` are enough for the newest. Kept are
        the old bytes of the rows that changed since: at most each row once for each point that is
        kept, beside the buffer. `load_state_dict` of an older state leaves it (in an InfiniteBuffer
        unless a part of it goes); `resize`, `load` and a new metadata field end it, as all. A list
        of kept states stands beside the buffer, so it does not matter where the program is killed:
        keep the state first, then write the checkpoint, then release the one that it replaces.
        Raises StateError if the state cannot be loaded any more.

        >>> import numpy as np
        >>> from leanreplay import ReservoirBuffer
        >>> buffer = ReservoirBuffer(2)
        >>> buffer.add(np.arange(3.0))
        >>> best = buffer.state_dict()
        >>> buffer.keep(best)
        >>> for epoch in range(20):
        ...     buffer.add(np.arange(5.0))
        ...     state = buffer.state_dict()
        >>> buffer.load_state_dict(best)
        >>> buffer.seen, [state["seen"] for state in buffer.kept_states()]
        (3, [3])
        >>> buffer.release(best)
        """
        with self.current.lock:
            self.checkpoints.keep(state)

    def release(self, state: State | None = None) -> None:
        """Keep the restore point of this state no longer, or of any state: free its disk space.

        It stays while it is one of the newest. What older points need of its bytes moves to them,
        which costs a copy. A state that is not kept is none to release: nothing happens.
        """
        with self.current.lock:
            self.checkpoints.release(state)

    def kept_states(self) -> list[State]:
        """The states that are kept and can be loaded, the last one given to `keep` last."""
        with self.current.lock:
            return list(self.checkpoints.kept(self.current.writing()).values())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Copy the buffer into a folder, made if missing. Disk blocks are shared where they can be.

        A copy that stood there is replaced at once, when the new one is complete. Raises
        LockedError if somebody writes to that copy. Killed at any moment, this leaves one of the
        two whole, each with its own draws. The next save, load or opening removes the rest.
        """
        with self.current.lock:
            self.checkpoints.save(as_path(folder, "folder"))

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Replace the contents by a copy that `save` made, draws too. Ends all restore points.

        Call it before `load_state_dict`, not after: it replaces what that brought back.
        Raises MismatchError for a copy of other parameters; an empty buffer's are compared too.
        """
        with self.current.lock:
            self.checkpoints.load(as_path(folder, "folder"))

    def flush(self) -> None:
        """Put the present state on the disk, restore points too: it survives a power cut."""
        with self.current.lock:
            self.current.reading().flush()
