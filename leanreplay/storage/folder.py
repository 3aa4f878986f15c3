"""A folder of parts, each a file of a fixed number of rows, as one store."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from ..arrays import NO_LOG, Ints
from ..errors import CorruptionError, FormatError, ModeError, RowError, StateError
from . import system
from .columns import outside
from .parts import open_part, part_path, parts_there
from .reader import Reader
from .state import empty_state
from .store import Arrays, Change, MetadataUpdate, PlannedBatch, Problem, Survivors, refuse_within
from .writer import Writer


class Folder:
    """Several stores end to end: row r is row r % n of part r // n. Rows are only ever appended.
    path None: in memory.

    stores: Writers, or Readers. make(number): makes the next part.
    """

    def __init__(self, path: str | None, stores: Sequence[Writer | Reader], make: Callable[[int], Writer]) -> None:
        self.path, self.stores, self._make = path, list(stores), make
        self.layout = stores[0].layout
        self.schema, self.max_rows, self.rows = self.layout.schema, self.layout.max_rows, self.layout.max_size
        self.writable = stores[0].writable
        self._writers = cast(list[Writer], self.stores)  # the same list, where it is written to
        self._keep = 0  # how many parts are to stay, while a rollback removes the others

    # -- what it says for all parts ----------------------------------------------------------------

    @property
    def seen(self) -> int:
        last = len(self.stores) - 1
        return last * self.rows + self.stores[last].seen

    size = high = seen

    @property
    def extent(self) -> tuple[int, int]:
        return (n := self.seen), n

    @property
    def sequence(self) -> int:
        each = [s.sequence for s in self.stores]
        return -1 if -1 in each else sum(each) + len(each)

    @property
    def policy(self) -> list[int]:
        return self.stores[-1].policy

    @property
    def status(self) -> os.stat_result | None:
        return self.stores[0].status

    @property
    def nbytes(self) -> int:
        return sum(store.nbytes for store in self.stores)

    @property
    def parts(self) -> list[Writer]:
        return self._writers

    def state_name(self) -> str:
        return ",".join(s.state_name() for s in self.stores)

    def live_rows(self) -> None:
        return None

    def pick_live(self, n: int, draw: Callable[[int, Ints], None]) -> Ints:
        rows = np.empty(n, np.int64)
        draw(self.size, rows)
        return rows

    def policy_log(self) -> Ints:
        return NO_LOG

    def survivors(self, rows: Ints, freed: Ints, start: int) -> Survivors:
        """Every sample has a row of its own."""
        n = rows.shape[0]
        return Survivors(n, rows, np.arange(n), np.arange(start, start + n))

    def scratch(self, renew: bool = False) -> npt.NDArray[np.int32]:
        return self._writers[-1].scratch(renew)

    # -- opening and closing -----------------------------------------------------------------------

    def recover_or_refresh(self) -> None:
        if self._keep:
            refuse_within(self, {Folder.rollback.__code__}, self.path)
            self._cut(self._keep)
        for store in self.stores:
            store.recover_or_refresh()
        if not self.writable and self.path is not None and self.stores[-1].seen == self.rows:
            while system.exists(path := part_path(self.path, number := len(self.stores))):
                part = open_part(path, number, self.stores[0], None)
                part.release()
                self.stores[number : number + 1] = [part]  # not appended: a signal handler that reads may have put it there, too

    def was_replaced(self) -> bool:
        """For readers: whether a part is another file by now, or gone."""
        return not all(s.mapping.stands() for s in self.stores)

    def as_reader(self) -> Folder:
        return Folder(self.path, [s.as_reader() for s in self.stores], self._make)

    def close(self) -> None:
        for store in reversed(self.stores):  # the last is the one that may refuse
            store.close()

    def unguard(self) -> None:
        self._writers[0].unguard()

    def stay(self) -> None:
        for store in self._writers:
            store.stay()

    def mark_gone(self) -> None:
        for store in self._writers:
            store.mark_gone()

    # -- reading -----------------------------------------------------------------------------------

    def index(self) -> tuple[Ints, Ints]:
        """Copies, since the parts lie apart."""
        return self.snapshot(slice(0, self.size))

    def snapshot(self, rows: Ints | slice) -> tuple[Ints, Ints]:
        rows = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        index = np.empty((2, rows.shape[0]), np.int64)
        for store, where, local in self._split(rows):
            index[:, where] = store.snapshot(local)
        return index[0], index[1]

    def pieces(self) -> Iterator[tuple[int, Ints, Ints]]:
        for i, store in enumerate(self.stores):
            for start, positions, tags in store.pieces():
                yield i * self.rows + start, positions, tags

    def positions_of(self, rows: Ints) -> Ints:
        return self.snapshot(rows)[0]

    def _split(self, rows: Ints) -> list[tuple[Writer | Reader, Ints, Ints]]:
        """(part, where in `rows`, rows of the part) of each part that is touched."""
        part = rows // self.rows
        found: list[tuple[Writer | Reader, Ints, Ints]] = []
        for p in np.unique(part).tolist():
            where = np.flatnonzero(part == p)
            found.append((self.stores[p], where, rows[where] - p * self.rows))
        return found

    def read(self, rows: Ints, field: int | None = None) -> tuple[Arrays, Ints]:
        if rows.shape[0] and (rows.min() < 0 or rows.max() >= self.size):
            raise outside(rows, self.size, self.path or "this buffer")
        pieces = self._split(rows)
        try:
            if len(pieces) == 1:
                return pieces[0][0].read(pieces[0][2], field)
            return self._read_pieces(pieces, rows.shape[0], field)
        except RowError:
            if gaps := self.gaps():
                raise CorruptionError(f"{gaps[0].what}; buffer.check() lists the rows; restore the folder from a copy") from None
            raise

    def _read_pieces(self, pieces: list[tuple[Writer | Reader, Ints, Ints]], n: int, field: int | None) -> tuple[Arrays, Ints]:
        fields = self.schema.fields if field is None else self.schema.fields[field : field + 1]
        arrays: Arrays = [np.empty((n, *f.shape), f.dtype) for f in fields]
        index = np.empty((2, n), np.int64)
        for store, where, local in pieces:
            some, index[:, where] = store.read(local, field)
            for array, values in zip(arrays, some, strict=True):
                array[where] = values
        return arrays, index

    def gaps(self) -> list[Problem]:
        """Parts that are not full although another is behind them (a power cut). A rollback removes
        that one first."""
        found = []
        for i, store in enumerate(self.stores[:-1]):
            store.recover_or_refresh()
            if store.seen != self.rows and self.stores[i + 1].mapping.stands():
                text = f"part {i} of {self.path or 'this buffer'} holds {store.seen} of {self.rows} rows, but there is a part after it"
                found.append(Problem(text, tuple(range(i * self.rows + store.seen, (i + 1) * self.rows))))
        return found

    def check(self) -> list[Problem]:
        problems = self.gaps()
        for i, store in enumerate(self.stores):
            problems += [Problem(f"part {i}: {p.what}", tuple(i * self.rows + r for r in p.rows)) for p in store.check()]
        if self.path is not None:
            try:
                there = parts_there(self.path)
            except FormatError as error:
                problems.append(Problem(str(error)))
            else:
                if self.writable and there != len(self.stores):
                    problems.append(Problem(f"{self.path} holds {there} parts, of which {len(self.stores)} are this buffer's"))
        return problems

    # -- writing -----------------------------------------------------------------------------------

    def verify_index(self) -> None:
        for store in self._writers:
            store.verify_index()

    def distrust(self) -> None:
        for store in self.stores:
            store.distrust()

    def commit(self, change: Change) -> None:
        """New rows lie in one part. An update of rows in other parts is a commit of each before."""
        rows, update, after = change.rows, change.update, change.after
        if after is not None and after != self.seen:
            raise ModeError("the buffer was changed while a batch was being added; the batch was not added")
        if rows.shape[0] and rows[0] // self.rows == len(self.stores):
            self._append_part()
        last = self._writers[-1] if rows.shape[0] else None
        if update is not None:
            self.stay()
            update = self._commit_update(update, last)
        if last is not None:
            first = (len(self.stores) - 1) * self.rows
            now = None if after is None else after - first
            last.commit(change._replace(seen=change.seen - first, rows=rows - first, update=update, after=now))

    def _append_part(self) -> None:
        last = self._writers[-1]
        last.stay()  # else the new part could come into another buffer's folder
        made = self._make(len(self.stores))
        last.release()
        self._writers.append(made)

    def _commit_update(self, update: MetadataUpdate, last: Writer | None) -> MetadataUpdate | None:
        """Commit an update part by part. Returns what the last part has to do with its new rows."""
        left = None
        for store, where, local in self._split(update.rows):
            mine = MetadataUpdate(local, {f: (data, samples[where]) for f, (data, samples) in update.sources.items()})
            if store is last:
                left = mine
            else:
                cast(Writer, store).commit(Change(store.seen, store.policy, update=mine))
        return left

    def commit_planned(self, batch: PlannedBatch) -> bool:
        """Not if the part of these rows is still to be made."""
        before = (len(self.stores) - 1) * self.rows
        if batch.rows[0] >= before + self.rows:
            return False
        return self._writers[-1].commit_planned(batch._replace(after=batch.after - before, rows=batch.rows - before))

    def flush(self) -> None:
        for store in self.stores:
            store.flush()

    # -- restore points ----------------------------------------------------------------------------

    def mark(self, kept: Collection[str] = ()) -> str:
        self.stay()
        return ",".join(s.mark(_of_part(i, kept)) for i, s in enumerate(self._writers))

    def trim(self, kept: Collection[str]) -> None:
        for i, store in enumerate(self._writers):
            store.trim(_of_part(i, kept))

    def has_point(self, name: str) -> bool:
        names = name.split(",")
        return len(names) <= len(self.stores) and all(s.has_point(one) for s, one in zip(self._writers, names, strict=False))

    def rollback(self, name: str, seen: int, kept: Collection[str] = ()) -> None:
        """Later parts go, the last first, then the others go back: cut off anywhere, it holds the
        first `seen` samples all the same. Points of states with later parts end, kept or not."""
        self.stay()
        names = name.split(",") if name != empty_state() else [name]
        if len(names) > len(self.stores):
            raise StateError(f"the buffer has seen {self.seen} samples, the state {seen}: it is {seen - self.seen} behind it")
        for i, (store, one) in enumerate(zip(self._writers, names, strict=False)):
            store.points.find(one, max(0, min(self.rows, seen - i * self.rows)), store.state)  # raises, before anything is changed
        self._cut(len(names))
        kept = [one for one in kept if one.count(",") < len(names)]
        for i in reversed(range(len(names))):
            self._writers[i].rollback(names[i], 0, _of_part(i, kept))

    @system.storage_errors("removing parts of an InfiniteBuffer")
    def _cut(self, parts: int) -> None:
        """Remove the parts from this number on. `recover_or_refresh` ends it after an exception."""
        self._keep = parts
        removed = None
        while len(self.stores) > parts:
            store = self._writers[-1]
            removed = store.path
            if removed is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(removed)
            store.drop_points()
            self.stores.pop()
            store.close()
        if removed is not None and self._writers[0].durable:
            system.sync_folder(removed)
        self._keep = 0

    def drop_points(self) -> None:
        for store in self._writers:
            store.drop_points()


def _of_part(number: int, names: Collection[str]) -> set[str]:
    """What states of the folder, by name, are called in one part."""
    return {parts[number] for parts in (name.split(",") for name in names) if number < len(parts)}
