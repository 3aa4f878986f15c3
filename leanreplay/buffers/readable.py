"""`ReadableBuffer`: how a buffer is put together, and every method that only reads.

It is put together from objects that each do one thing:
location (memory, file, folder) | parameters | current (the store) | draws | view (the way out)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any, ClassVar, TypeVar, cast

from ..arrays import Ints
from ..errors import LeanReplayError, ModeError
from ..policies.base import Params, Policy
from ..samples.schema import Schema
from ..storage.layout import Layout
from ..storage.opening import Options
from ..storage.store import Problem
from .current import Current, LockType, Packed
from .drawing import Draw, Draws
from .groups import Groups
from .location import Location, OneFile
from .parameters import Kind, Parameters
from .reading import Reach, Read, Transform, Transforms, View
from .tag import Label
from .values import Array, Values

T = TypeVar("T")
Self = TypeVar("Self", bound="ReadableBuffer")  # typing has one of its own from Python 3.11 on


def _part(name: str, kind: type[T], says: str, settable: bool = False) -> T:
    """Return a property that is an attribute of one of the buffer's parts. kind: its type."""
    part, attribute = name.split(".")
    setter = (lambda buffer, value: setattr(getattr(buffer, part), attribute, value)) if settable else None
    return cast(T, property(attrgetter(name), setter, doc=says))


def _of_store(name: str, kind: type[T], says: str) -> T:
    """Return a property that is an attribute of the buffer's store. kind: its type."""
    return cast(T, property(lambda buffer: buffer.current.look_up(name), doc=says))


class ReadableBuffer:
    """What a buffer is, and what it shows. `DataBuffer` makes it, and adds what changes it."""

    policy_class: ClassVar[type[Policy]]
    kind: ClassVar[str] = "DataBuffer"
    tag_class: ClassVar[type[Label]] = Label
    whole_journal: ClassVar[bool] = False  # whether one commit may overwrite all rows
    sized: ClassVar[bool] = True  # whether there is a max_size; an InfiniteBuffer has none
    with_metadata: ClassVar[bool] = True  # items are (sample, metadata)
    _params: Params = {}  # noqa: RUF012 - the policy's parameters, as a subclass was given them

    def _compose(self, parameters: Parameters, path: str | None, where: str, options: Options, mode: str, transforms: Transforms) -> None:
        """Put the buffer together. No part refers to it: it closes as soon as nobody does."""
        tag = self.tag_class(type(self).__name__, self.policy_class.needs_groups)
        self.parameters, self.draws = parameters, Draws(parameters, Values(tag, parameters))
        self.location = self._location(path, where, options, parameters)
        self.current = Current(f"{type(self).__name__} at {id(self):#x}", self.location, parameters, self.draws, mode)
        self.view = View(self.current, tag, transforms)
        self._reach = Reach()

    @classmethod
    def _declared(cls) -> Kind:
        return Kind(cls.kind, cls.policy_class, cls.whole_journal, cls.sized, cls._stored_schema)

    @classmethod
    def table_problem(cls, table: Layout) -> str | None:
        """Return what is impossible about the table of a file of this kind; None if nothing is."""
        return cls._declared().table_problem(table) if hasattr(cls, "policy_class") else None

    @classmethod
    def _stored_schema(cls, schema: Schema) -> Schema:
        """Return the schema of the file, given that of samples."""
        return schema

    @staticmethod
    def _location(path: str | None, where: str, options: Options, parameters: Parameters) -> Location:
        return (Location if path is None else OneFile)(path, where, options, parameters)

    # -- what it is --------------------------------------------------------------------------------

    path: str | None = _part("location.path", str, "The path as it was given; None in memory.")
    max_size = _part("parameters.max_size", int, "Rows of the buffer; None in an InfiniteBuffer.")
    seed = _part("parameters.seed", int, "Seed of all random choices.")
    stream = _part("parameters.stream", int, "Number of the stream that is fed.")
    mode = _part("current.mode", str, 'The mode; "r" in forked and unpickled copies.')
    seen = _of_store("seen", int, "Samples offered so far, kept or not: the position in the stream.")
    schema: Schema | None = _of_store("schema", Schema, "What a sample looks like; None before the first batch.")
    nbytes = _of_store("nbytes", int, "Bytes of the file, of all parts, or of shared memory.")
    transform: Transform | None = _part("view.transform", type(None), "For first elements that are read; may be set.", True)
    target_transform: Transform | None = _part("view.target_transform", type(None), "For second elements; may be set.", True)

    @property
    def lock(self) -> LockType:
        """The lock that whoever uses the store holds."""
        return self.current.lock

    def __len__(self) -> int:
        """Samples that the buffer holds now."""
        with self.current.lock:
            return self._reach.told(self.current.reading().size)

    def __repr__(self) -> str:
        if self.current.closed:
            return repr(self.current)
        name, where = type(self).__name__, self.current.place
        try:
            held, seen, schema = len(self), self.seen, self.schema
        except LeanReplayError as error:
            return f"{name}({where}, {type(error).__name__})"
        return f"{name}({where}, seed={self.seed}, len={held}, seen={seen}, mode={self.mode!r}, {schema})"

    # -- what it holds -----------------------------------------------------------------------------

    def sample(
        self,
        n: int,
        replace: bool = False,
        *,
        balance: str | None = None,
        where: tuple[str, object] | None = None,
        by: str | None = None,
        alpha: float | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Draw n samples uniformly: (batch, metadata), copies with a leading dimension of n.

        metadata: every metadata field, "idx" (the rows, int64) and "position" (in the stream,
        int64). Without `replace` the n are distinct, and n at most len(buffer). A draw is a
        function of (seed, stream, seen, number of draws before); the last is part of `state_dict`.
        Costs the copy, its checksums included, and a few microseconds.

        balance: "group", "label" or the name of a metadata field: draw evenly over its values. Of k
        values, each gets n // k samples, and n % k of them, chosen uniformly, one more. Samples of
        one value are drawn uniformly, and are distinct unless the buffer holds fewer than that (or
        `replace`); their order is shuffled. So at each place every value is equally likely, and so
        is every sample that has it. Rows are sorted by value once per commit: 1 ms for 10,000 rows.

        where: draw only rows whose value fits: ("label", [3, 5]), ("task", 2), ("position",
        range(0, 1000)), ("score", slice(0.5, None)). The first is "label", "group", "position",
        "weight" or a metadata field of one number a row; the second is a number, a list of them, or
        from where to below where. It is the uniform draw of the rows that fit, in their order.
        by: a metadata field ("weight" of a weighted reservoir): draw in proportion to value ** alpha
        (alpha 1 unless given), in float64. Values are finite and not negative; one of 0 is never
        drawn, but 0 ** 0 is 1. Without `replace`, rows are drawn one after the other, each in
        proportion among those left; with it, each of the n independently. "probability" in the
        metadata is value ** alpha divided by the sum over all rows that fit: the chance of each of
        n independent draws, for importance weights. Both keep a sum tree, 9.2 bytes a row, which
        the writer mends after each commit, and others build again: O(rows). ArgumentError, naming
        the row, for a value that cannot be; and where n rows that fit, above 0, are not there.

        Forked and unpickled copies of a buffer each draw a stream of their own. It follows from the
        number of forks and pickles before; when unpickled also from the number of that process in
        multiprocessing, and of unpicklings there; in a DataLoader's worker from the worker's seed.
        So a program that starts its workers in the same order draws the same again, except where a
        pool gives jobs to whichever worker is free. Readers that are opened by path draw the same.

        >>> import numpy as np
        >>> from leanreplay import ReservoirBuffer
        >>> buffer = ReservoirBuffer(100)
        >>> x, y = np.arange(100.0), np.arange(100)
        >>> buffer.add((x, y), metadata={"logits": np.zeros((100, 10), "float32")})
        >>> (x, y), meta = buffer.sample(4)
        >>> x.shape, sorted(meta)
        ((4,), ['idx', 'logits', 'position'])
        """
        return cast(Read, self.view.sample(n, Draw.of(replace, balance, where, by, alpha)))

    def get(self, rows: object) -> tuple[Any, dict[str, Any]]:
        """The samples in these rows (meta["idx"]), like `sample`. RowError for free rows."""
        return self.view.get(rows)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        """The index-th sample in the order of rows, and its metadata: no batch dimension."""
        return self.view.items_at([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, dict[str, Any]]]:
        """Several samples in one read: what torch's DataLoader calls.

        Rows may go while a DataLoader goes on, as when a balanced buffer meets a new class. An
        index that was below a length told before, and is beyond the samples that are there now,
        gets another live sample; `buffer[i]` is a RowError then.
        """
        return self.view.items_at(indices, self._reach.now())

    def __iter__(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        for i in range(len(self)):
            yield self[i]

    def get_metadata(self, name: str, rows: object = None) -> Array:
        """A metadata field, "idx", "position", "group" (-1 for none), "label", or the "weight" of a
        weighted reservoir: of these rows, by default of all, (n, ...), a copy. A field of the
        user's comes first."""
        return self.view.metadata(name, rows)

    # -- its groups --------------------------------------------------------------------------------

    def labels(self) -> Array:
        """The class of each sample in the order of `buffer[i]`, (len,), a copy.

        It is the second element of a sample, or `group` where that was given. Only the index is
        read: 10 ms for a million rows. A buffer that groups by anything but classes (experiences,
        tasks) reads the labels themselves. SchemaError where there are none.

        >>> import numpy as np
        >>> from leanreplay import ReservoirBuffer
        >>> buffer = ReservoirBuffer(10)
        >>> buffer.add((np.zeros((4, 3)), np.array([7, 8, 7, 7])))
        >>> buffer.labels(), buffer.group_sizes(), buffer.group_rows(8)
        (array([7, 8, 7, 7]), {7: 3, 8: 1}, array([1]))
        """
        return self.view.live("label")

    def group_sizes(self) -> dict[int, int]:
        """Rows that each group holds, by id. Balanced buffers tell all groups seen, also those
        without a row.

        Groups are what the policy balances over; elsewhere labels, or what was given as `group`.
        Reads the index only, once per commit: 10 ms for a million rows. SchemaError where no sample
        has a group.
        """
        with self.current.lock:
            store = self.current.reading()
            return {} if store.schema is None else self.draws.values.sizes(store)

    def group_rows(self, group: int) -> Ints:
        """The rows of a group, (n,) int64, ascending: for `get`, `get_metadata` and `set_metadata`.

        GroupError for one never seen. All rows are sorted by group once per commit: 0.1 s for a
        million.
        """
        with self.current.lock:
            return self.draws.values.rows_of(self.current.reading(), group).copy()

    @property
    def groups(self) -> Groups:
        """The groups as a mapping of id -> map-style dataset, a live view.

        >>> import numpy as np
        >>> from leanreplay import ClassBalancedBuffer
        >>> buffer = ClassBalancedBuffer(10)
        >>> buffer.add((np.arange(20.0), np.arange(20) % 4))
        >>> len(buffer.groups), len(buffer.groups[3]), buffer.groups[3][0][0][1]
        (4, 2, np.int64(3))
        """
        return Groups(self)

    def check(self) -> list[Problem]:
        """Everything wrong with the file, each `Problem` with its rows; [] if nothing is.

        Reads all of the file. A reader beside a writer reports no row that a commit is
        changing. Where commits leave it no pause within a second, it does not compare the rows as a
        whole with the header: the writer's own `check` does.
        """
        with self.current.lock:
            return self.current.reading().check()

    # -- closing, and copies in other processes ----------------------------------------------------

    def close(self) -> None:
        """Close the file and release the lock. Afterwards all but `close` is a ModeError."""
        self.current.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A forgotten buffer would hold its lock and descriptors until the interpreter ends.
        try:  # noqa: SIM105 - when it ends, contextlib may be empty already
            self.close()
        except Exception:
            pass

    def __reduce__(self) -> tuple[Callable[..., ReadableBuffer], tuple[object, ...]]:
        return type(self)._unpickle, (self.current.pack(), (self.transform, self.target_transform))

    @classmethod
    def _unpickle(cls: type[Self], packed: Packed, transforms: Transforms) -> Self:
        """Make a reader of the same file or shared memory in another process."""
        buffer = cls.__new__(cls)
        parameters = Parameters(cls._declared(), None, None, None, {})
        buffer._compose(parameters, packed.path, packed.where, Options(False, 2, True), "r", transforms)
        buffer.current.unpack(packed)
        return buffer

    def __copy__(self, memo: object = None) -> ReadableBuffer:
        raise ModeError(
            f"{self!r} cannot be copied within a process: the copy would read the same rows, and never write. buffer.save(folder) and "
            "load(folder) of another buffer copy the samples; leanreplay.open(path) reads the same file once more"
        )

    __deepcopy__ = __copy__
