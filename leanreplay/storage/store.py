"""The protocol that all stores keep, and the values that go in and out."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from ..arrays import NO_LOG, NO_ROWS, POLICY_WORDS, Bytes, Ints
from ..errors import ModeError, RowError
from ..samples.schema import Schema
from .layout import NO_LIMIT, Layout
from .state import empty_state

Source = tuple[Bytes, Ints]  # bytes of samples, and which of them each row takes
Sources = Sequence[Source]  # one per field
Arrays = list[np.ndarray[Any, Any]]  # contents of samples, an array per field


class MetadataUpdate(NamedTuple):
    """Live rows that get other values of some fields. sources: by number of the field."""

    rows: Ints
    sources: Mapping[int, Source]


class Change(NamedTuple):
    """One commit. All its rows are distinct, and no more than the journal holds.

    seen, policy: samples seen, and the policy's words, after it.
    rows: rows[i] gets sample samples[i] of every source, positions[i] and tags[i].
    sources: one for every field; or a function that returns those of rows[start:stop]. The commit
        calls it for one piece after the other, so that not all of them are in memory at once.
    freed: live rows that become free. log: (k, 2), entries to append to the policy's log.
    after: samples seen when this was planned; the commit raises ModeError if it is not so any more.
    """

    seen: int
    policy: Sequence[int]
    rows: Ints = NO_ROWS
    positions: Ints = NO_ROWS
    tags: Ints = NO_ROWS
    sources: Sources | Callable[[int, int], Sources] = ()
    freed: Ints = NO_ROWS
    log: Ints = NO_LOG
    update: MetadataUpdate | None = None
    after: int | None = None

    def data_in_order(self) -> list[Bytes] | None:
        """The bytes of each field, if there are rows alone and sample i goes into row i."""
        n, sources = self.rows.shape[0], self.sources
        if not n or self.freed.shape[0] or self.update is not None or self.log.shape[0] or callable(sources):
            return None
        samples = sources[0][1]
        # For read-only memory a kernel would be compiled once more.
        simple = all(which is samples and source.flags.writeable for source, which in sources)
        return [source for source, _ in sources] if simple and np.array_equal(samples, np.arange(n)) else None

    def pieces(self, step: int) -> Iterator[tuple[slice, Sources]]:
        """The rows and their sources, in pieces where these come from a function."""
        if not callable(self.sources):
            yield slice(None), self.sources
            return
        for start in range(0, self.rows.shape[0], step):
            part = slice(start, min(start + step, self.rows.shape[0]))
            yield part, self.sources(part.start, part.stop)


class PlannedBatch(NamedTuple):
    """A plan whose samples are all in memory.

    after: samples seen before. policy: the policy's words afterwards.
    rows: the row that sample i takes, or -1; the later of two that take the same one stays. At most
    `max_rows` rows are taken. Sample i has stream position start + i, and is number first + i in
    tags and data (one array of bytes per field).
    """

    after: int
    policy: Sequence[int]
    rows: Ints
    start: int
    tags: Ints
    first: int
    data: Sequence[Bytes]
    max_rows: int


class Survivors(NamedTuple):
    """The last sample of a plan for each row that is taken.

    n: their number; -1 if a row is outside the buffer; -2 if a freed one is not live, or is taken,
        or freed twice.
    """

    n: int
    rows: Ints
    samples: Ints
    positions: Ints


@dataclass(frozen=True)
class Problem:
    """Something `check` found. rows: the rows it is about, all of them."""

    what: str
    rows: tuple[int, ...] = ()

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.rows[:10])) + (", ..." if len(self.rows) > 10 else "")
        return f"{self.what}: rows {shown}" if self.rows else self.what


class Store(Protocol):
    """What all stores can do. Rows, positions and tags are int64 arrays."""

    @property
    def path(self) -> str | None:
        """The file, or the folder; None for memory."""

    @property
    def writable(self) -> bool:
        """Whether it is a WritableStore."""

    @property
    def layout(self) -> Layout:
        """What never changes. RowError in an EmptyStore."""

    @property
    def schema(self) -> Schema | None:
        """What a sample looks like; None in an EmptyStore."""

    @property
    def seen(self) -> int:
        """Samples offered so far."""

    @property
    def size(self) -> int:
        """Rows that are live."""

    @property
    def high(self) -> int:
        """One past the highest live row."""

    @property
    def extent(self) -> tuple[int, int]:
        """`size` and `high` of one state, whatever a signal handler reads between two looks."""

    @property
    def sequence(self) -> int:
        """Number of the last commit; -1 after an interrupted one."""

    @property
    def policy(self) -> list[int]:
        """The policy's words."""

    @property
    def max_rows(self) -> int:
        """The most rows that a commit may overwrite. NO_LIMIT if the journal holds every row."""

    @property
    def status(self) -> os.stat_result | None:
        """Mode and owner for other files of the same buffer; None in memory."""

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""

    def recover_or_refresh(self) -> None:
        """Make the state in memory that of the file. ModeError within a change, or if closed."""

    def was_replaced(self) -> bool:
        """For readers: whether another file has taken its place, or a part of it is gone."""

    def read(self, rows: Ints, field: int | None = None) -> tuple[Arrays, Ints]:
        """Copies of these rows: an array per field (or of one field), and (2, n) positions and
        tags, verified: by readers at each read, by the writer once, at the first.

        Raises RowError for free rows, CorruptionError, and for readers RecoveryError.
        """

    def index(self) -> tuple[Ints, Ints]:
        """Position (-1: free) and tag of the rows below `high`, read-only, for one call."""

    def positions_of(self, rows: Ints) -> Ints:
        """Positions of some rows, for the writer."""

    def snapshot(self, rows: Ints | slice) -> tuple[Ints, Ints]:
        """Positions and tags of rows as of the header, whatever the writer is doing."""

    def pieces(self) -> Iterator[tuple[int, Ints, Ints]]:
        """The index in pieces of bounded size: (first row, positions, tags), as of `snapshot`."""

    def live_rows(self) -> Ints | None:
        """The live rows in order; None where they are simply 0 to size - 1."""

    def pick_live(self, n: int, draw: Callable[[int, Ints], None]) -> Ints:
        """n live rows by a draw: draw(among, out) fills `out` with numbers below `among`, and of
        more numbers begins with the same."""

    def verify_index(self) -> None:
        """Raise CorruptionError if pages of the index were lost. A writer looks once."""

    def distrust(self) -> None:
        """Have every row verified once more: before rows that are read get new checksums, which
        would otherwise hide what has happened to them."""

    def policy_log(self) -> Ints:
        """The policy's log, (entries, 2): a copy, its hash verified."""

    def state_name(self) -> str:
        """The name that a restore point of this state has."""

    def check(self) -> list[Problem]:
        """Everything wrong with it; an empty list if nothing is. Reads all of it, in pieces."""

    def flush(self) -> None:
        """Make the present state durable. A reader has nothing to flush."""

    def close(self) -> None:
        """Unmap and close."""

    def as_reader(self) -> Store:
        """In a forked child: the same for reading, without the parent's locks and undo files."""


class WritableStore(Store, Protocol):
    """What a Writer and a Folder of Writers can do besides."""

    @property
    def parts(self) -> Sequence[WritableStore]:
        """The stores of its files, by their rows."""

    def stay(self) -> None:
        """Raise MissingError unless its file still stands under its name."""

    def unguard(self) -> None:
        """End the lock of the file itself."""

    def survivors(self, rows: Ints, freed: Ints, start: int) -> Survivors:
        """Which samples of a plan stay to its end. Sample i has stream position start + i."""

    def scratch(self, renew: bool = False) -> npt.NDArray[np.int32]:
        """A number per row, 0 before and after each use. renew: something may be left in it."""

    def commit(self, change: Change) -> None:
        """Make one commit, whole or not at all."""

    def commit_planned(self, batch: PlannedBatch) -> bool:
        """Commit by one kernel call; False, and nothing has changed, where that cannot be."""

    def mark(self, kept: Collection[str] = ()) -> str:
        """Make a restore point of the present state; its name. kept: names of those that stay,
        however old."""

    def trim(self, kept: Collection[str]) -> None:
        """End the restore points beyond the limit, unless they are kept."""

    def has_point(self, name: str) -> bool:
        """Whether there is a restore point of a state."""

    def rollback(self, name: str, seen: int, kept: Collection[str] = ()) -> None:
        """Go back to a state that `mark` named. Raises StateError if that is impossible. Newer
        points end, unless any state is kept."""

    def drop_points(self) -> None:
        """End all restore points."""

    def mark_gone(self) -> None:
        """Tell readers of this shared memory that another piece has replaced it."""


class EmptyStore:
    """The store of a buffer before its first batch: there is nothing to read."""

    path: str | None = None
    writable = False
    schema: Schema | None = None
    status: os.stat_result | None = None
    seen = size = high = sequence = nbytes = 0
    extent = (0, 0)
    max_rows = NO_LIMIT
    policy: list[int] = [0] * POLICY_WORDS

    @property
    def layout(self) -> Layout:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise RowError("the buffer is empty: it has no schema before its first batch")

    def read(self, rows: Ints, field: int | None = None) -> tuple[Arrays, Ints]:
        self._refuse()

    def index(self) -> tuple[Ints, Ints]:
        return NO_ROWS, NO_ROWS

    def positions_of(self, rows: Ints) -> Ints:
        self._refuse()

    def snapshot(self, rows: Ints | slice) -> tuple[Ints, Ints]:
        return NO_ROWS, NO_ROWS

    def pieces(self) -> Iterator[tuple[int, Ints, Ints]]:
        return iter(())

    def live_rows(self) -> Ints | None:
        return None

    def pick_live(self, n: int, draw: Callable[[int, Ints], None]) -> Ints:
        self._refuse()

    def policy_log(self) -> Ints:
        return NO_LOG

    def state_name(self) -> str:
        return empty_state()

    def check(self) -> list[Problem]:
        return []

    def was_replaced(self) -> bool:
        return False

    def recover_or_refresh(self) -> None:
        """Nothing to do, as for those below."""

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def stay(self) -> None: ...

    def mark_gone(self) -> None: ...

    def unguard(self) -> None: ...

    def verify_index(self) -> None: ...

    def distrust(self) -> None: ...

    def as_reader(self) -> EmptyStore:
        return self


def refuse_within(owner: object, changes: Collection[types.CodeType], name: str | None) -> None:
    """Raise ModeError if one of these functions works on `owner` further up the stack."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code in changes and frame.f_locals.get("self") is owner:
            raise ModeError(
                f"{name or 'this buffer'} is in the middle of a change, so that it cannot be used now: a signal handler should "
                "only set a flag, for the training loop to look at between two steps; a dataset should not use the buffer that it feeds"
            )
        frame = frame.f_back  # type: ignore[assignment]
