"""The buffer without a size: a folder of parts, each a complete buffer file of a fixed number of rows."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np

from ..arguments import integer
from ..arrays import NO_LOG, Ints
from ..errors import (
    ArgumentError,
    CorruptionError,
    FormatError,
    MissingError,
    ModeError,
    RecoveryError,
    RowError,
    StateError,
)
from ..policies.append import AppendPolicy
from ..samples.schema import Schema
from ..storage import system
from ..storage.layout import Table
from ..storage.restore_points import is_undo_file, undo_files
from ..storage.store import Change, MetadataUpdate, PlannedBatch, Problem, Store, Survivors, empty_state, refuse_within
from .base import DataBuffer
from .copies import copy_store, copy_to_memory, is_left_over, write_state
from .location import Claim, Location, Options, new_store
from .parameters import Parameters, Pieces

_PATIENCE = 1.0  # seconds that a reader waits for a load to end
_LOOKS = 20  # at a folder that a writer may be changing
_LOADING = ".loading"  # a complete copy on its way into the folder


class Parts:
    """Several stores end to end, with the interface of one: row r is row r % n of part r // n. Rows are only ever appended."""

    def __init__(self, folder: str | None, stores: list[Store], make: Callable[[int], Store]) -> None:
        self.folder, self.stores = folder, stores
        self._make = make
        self.rows = stores[0].table.max_size
        self._parts = 0  # how many are to stay, while a rollback removes the others

    # What a part says for all:

    @property
    def table(self) -> Table:
        return self.stores[0].table

    @property
    def writable(self) -> bool:
        return self.stores[0].writable

    def stay(self) -> None:
        for store in self.stores:
            store.stay()

    def unguard(self) -> None:
        self.stores[0].unguard()

    @property
    def status(self) -> os.stat_result | None:
        return self.stores[0].status

    @property
    def most(self) -> int:
        return self.stores[0].most

    @property
    def layout(self) -> Table:
        return self.table

    @property
    def schema(self) -> Schema | None:
        return self.table.schema

    @property
    def nbytes(self) -> int:
        return sum(store.nbytes for store in self.stores)

    @property
    def max_rows(self) -> int:
        return self.most

    def recover_or_refresh(self) -> None:
        self.ready()

    def was_replaced(self) -> bool:
        return self.moved()

    def policy_log(self) -> Ints:
        return self.log()

    def state_name(self) -> str:
        return self.mark_name()

    @property
    def policy(self) -> list[int]:
        return self.stores[-1].policy

    @property
    def seen(self) -> int:
        last = len(self.stores) - 1
        return last * self.rows + self.stores[last].seen

    @property
    def size(self) -> int:
        return self.seen

    @property
    def high(self) -> int:
        return self.seen

    @property
    def extent(self) -> tuple[int, int]:
        return (n := self.seen), n

    @property
    def sequence(self) -> int:
        each = [s.sequence for s in self.stores]
        return -1 if -1 in each else sum(each) + len(each)

    def live_rows(self) -> None:
        return None

    def index(self) -> tuple[Ints, Ints]:
        """Copies, since the parts lie apart."""
        each = [s.index() for s in self.stores]
        return np.concatenate([p for p, _ in each]), np.concatenate([g for _, g in each])

    def positions_of(self, rows: Ints) -> Ints:
        found = np.empty_like(rows)
        for store, where, local in self._split(rows):
            found[where] = store.positions_of(local)
        return found

    def log(self) -> Ints:
        return NO_LOG

    def survivors(self, rows: Ints, freed: Ints, start: int) -> Survivors:
        """Every sample has a row of its own."""
        n = rows.shape[0]
        return Survivors(n, rows, np.arange(n), np.arange(start, start + n))

    def ready(self) -> None:
        if self._parts:
            refuse_within(self, {Parts.rollback.__code__}, self.folder)
            self._cut(self._parts)
        for store in self.stores:
            store.ready()
        if not self.writable and self.folder is not None and self.stores[-1].seen == self.rows:
            while system.exists(path := part_path(self.folder, number := len(self.stores))):
                part = open_part(path, number, self.stores[0], writable=False)
                part.release()
                self.stores[number : number + 1] = [part]  # not appended: a signal handler that reads may have put it there, too

    def moved(self) -> bool:
        """For readers: whether a part is another file by now, or gone, after a rollback or `load`."""
        return not all(s.stands() for s in self.stores)

    def verify_index(self) -> None:
        for store in self.stores:
            store.verify_index()

    def _split(self, rows: Ints) -> list[tuple[Store, Ints, Ints]]:
        """(part, where in `rows`, rows of the part) of each part that is touched."""
        part = rows // self.rows
        found = []
        for p in np.unique(part):
            where = np.flatnonzero(part == p)
            found.append((self.stores[int(p)], where, rows[where] - p * self.rows))
        return found

    def read(self, rows: Ints, field: int | None = None, room: int = 0) -> tuple[list[np.ndarray[Any, Any]], Ints]:
        if rows.shape[0] and int(rows.max()) >= self.size:
            raise RowError(f"rows up to {int(rows.max())}, but the rows in use are 0 to {self.size - 1} now")
        pieces = self._split(rows)
        try:
            if len(pieces) == 1:
                return pieces[0][0].read(pieces[0][2], field, room)
            return self._read_pieces(pieces, rows.shape[0], field, room)
        except RowError:
            if (problem := self.gap()) is not None and not self.moved():
                raise CorruptionError(f"{problem}; buffer.check() lists the rows; restore the folder from a copy") from None
            raise

    def gap(self) -> str | None:
        """What is wrong if a part that is not full has another behind it, as after a power cut; None if nothing is."""
        for i, store in enumerate(self.stores[:-1]):
            if not store.writable:
                store.refresh()
            if store.seen != self.rows:
                return f"part {i} of {self.folder or 'this buffer'} holds {store.seen} of {self.rows} rows, but there is a part after it"
        return None

    def _read_pieces(
        self, pieces: list[tuple[Store, Ints, Ints]], n: int, field: int | None, room: int
    ) -> tuple[list[np.ndarray[Any, Any]], Ints]:
        schema = self.table.schema
        fields = schema.fields if field is None else schema.fields[field : field + 1]
        before = [room if f in schema.data else 0 for f in fields]
        arrays = [np.empty((k + n, *f.shape), f.dtype) for k, f in zip(before, fields, strict=True)]
        index = np.empty((2, n), np.int64)
        for store, where, local in pieces:
            some, some_index = store.read(local, field)
            for k, array, values in zip(before, arrays, some, strict=True):
                array[k:][where] = values
            index[:, where] = some_index
        return arrays, index

    def commit(self, change: Change) -> None:
        """As `Store.commit`; new rows lie in one part, which is made when it is needed. Other parts in which rows move commit before."""
        rows, moved, after = change.rows, change.update, change.after
        if after is not None and after != self.seen:
            raise ModeError("the buffer was changed while a batch was being added; the batch was not added")
        if rows.shape[0] and rows[0] // self.rows == len(self.stores):
            self.stores[-1].stay()  # else the new part could come into another buffer's folder
            store = self._make(len(self.stores))
            self.stores[-1].release()
            self.stores.append(store)
        last = self.stores[-1] if rows.shape[0] else None
        moving = None
        if moved is not None:
            self.stay()
        for store, where, local in self._split(moved.rows) if moved is not None else []:
            there = MetadataUpdate(local, {f: (flat, samples[where]) for f, (flat, samples) in moved.sources.items()})  # type: ignore[union-attr]
            if store is last:
                moving = there
            else:
                store.commit(Change(store.seen, store.policy, update=there))
        if last is not None:
            first = (len(self.stores) - 1) * self.rows
            now = None if after is None else after - first
            last.commit(change._replace(seen=change.seen - first, rows=rows - first, update=moving, after=now))

    def commit_planned(self, batch: PlannedBatch) -> bool:
        """As `Store.commit_planned`; not if the part of these rows is still to be made."""
        before = (len(self.stores) - 1) * self.rows
        if batch.rows[0] >= before + self.rows:
            return False
        return self.stores[-1].commit_planned(batch._replace(after=batch.after - before, rows=batch.rows - before))

    def flush(self) -> None:
        for store in self.stores:
            store.flush()

    def mark_name(self) -> str:
        return ",".join(s.mark_name() for s in self.stores)

    def mark(self) -> str:
        self.stay()
        return ",".join(s.mark() for s in self.stores)

    def rollback(self, state: str, seen: int) -> None:
        """Later parts go, the last first, then the others go back: cut off anywhere, it holds the first `seen` samples all the same."""
        self.stay()
        names = state.split(",") if state != empty_state() else [state]
        if len(names) > len(self.stores):
            raise StateError(f"the buffer has seen {self.seen} samples, the state {seen}: it is {seen - self.seen} behind it")
        for i, (store, name) in enumerate(zip(self.stores, names, strict=False)):
            store.find_point(name, max(0, min(self.rows, seen - i * self.rows)))  # raises, before anything is changed
        self._cut(len(names))
        for store, name in zip(reversed(self.stores), reversed(names), strict=True):
            store.rollback(name, 0)

    @system.storage_errors("removing parts of an InfiniteBuffer")
    def _cut(self, parts: int) -> None:
        """Remove the parts from this number on, the last first. After an exception within, `ready` ends it."""
        self._parts = parts
        removed = None
        while len(self.stores) > parts:
            store = self.stores[-1]
            removed = store.path
            if store.path is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(store.path)
            store.drop_points()
            self.stores.pop()
            store.close()
        if removed is not None and self.stores[0].durable:
            system.sync_folder(removed)
        self._parts = 0

    def drop_points(self) -> None:
        for store in self.stores:
            store.drop_points()

    def mark_gone(self) -> None:
        for store in self.stores:
            store.mark_gone()

    def check(self) -> list[Problem]:
        problems = []
        for i, store in enumerate(self.stores):
            problems += [Problem(f"part {i}: {p.what}", tuple(i * self.rows + r for r in p.rows)) for p in store.check()]
            # As `gap` says, with the rows; unless the part after it has gone in a rollback meanwhile.
            if i + 1 < len(self.stores) and store.seen != self.rows and self.stores[i + 1].stands():
                missing = tuple(range(i * self.rows + store.seen, (i + 1) * self.rows))
                problems.append(Problem(f"part {i} holds {store.seen} of {self.rows} rows, but there is a part after it", missing))
        if self.folder is not None:
            try:
                there = parts_there(self.folder)
            except FormatError as error:
                problems.append(Problem(str(error)))
            else:
                if self.writable and there != len(self.stores):
                    problems.append(Problem(f"{self.folder} holds {there} parts, of which {len(self.stores)} are this buffer's"))
        return problems

    def close(self) -> None:
        for store in reversed(self.stores):  # the last is the one that may refuse
            store.close()


def part_path(folder: str, number: int) -> str:
    """The file of a part."""
    return os.path.join(folder, f"part-{number:06d}.h5")


def parts_there(folder: str) -> int:
    """How many parts are in a folder. Raises FormatError unless they are regular files of numbers from 0 on; touches nothing."""
    for _ in range(_LOOKS):
        with contextlib.suppress(FormatError):  # a writer made or removed parts while they were listed
            return _count_parts(folder)
        time.sleep(0.001)
    return _count_parts(folder)


@system.storage_errors("looking for the parts of an InfiniteBuffer")
def _count_parts(folder: str) -> int:
    found = {}
    for entry in os.scandir(folder):
        match = re.fullmatch(r"part-(\d{6,})\.h5", entry.name)
        if match and (entry.path != part_path(folder, int(match[1])) or not entry.is_file(follow_symlinks=False)):
            raise FormatError(
                f"{entry.path} is no part of a buffer (a link, a folder, or under another number than its own); move it away, nothing "
                "was changed"
            )
        if match:
            found[int(match[1])] = entry.path
    for number, last in zip(range(len(found)), sorted(found), strict=True):
        if number != last:
            raise FormatError(
                f"{part_path(folder, number)} is missing, and {found[last]} is there; restore the folder from a copy, or move that file "
                "away if it belongs elsewhere"
            )
    return len(found)


def own_folder(path: str) -> bool:
    """Whether there is a folder under a name of ours. Raises FormatError for anything else there."""
    if not system.exists(path):
        return False
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise FormatError(f"{path} is no folder of ours; move it away, nothing was changed")
    return True


def is_loading(folder: str) -> bool:
    """Whether there is a copy on its way into a folder."""
    return own_folder(os.path.join(folder, _LOADING))


def remove_points(path: str) -> None:
    """Remove the restore points of a part."""
    with contextlib.suppress(OSError):  # one that stays is not believed: it is of another file
        for _, name in undo_files(path):
            if is_undo_file(name):
                system.discard(name)


def open_part(path: str, number: int, first: Store | None, **options: Any) -> Store:
    """Open a part. Raises FormatError for one that is not that part of the buffer that `first` belongs to."""
    if os.path.islink(path):
        raise FormatError(f"{path} is a link; a part is a file of its own: move it away, nothing was changed")
    store = Store.open(path, name=path, **options)
    t, wanted = store.table, (first or store).table
    same = (t.kind, t.uuid, t.schema, t.seed, t.stream, t.max_size) == (
        wanted.kind, wanted.uuid, wanted.schema, wanted.seed, wanted.stream, wanted.max_size,
    )  # fmt: skip
    if not same or t.params.get("first") != number * t.max_size:
        store.close()
        raise FormatError(f"{path} is not part {number} of this buffer, but {t.kind} {t.params} of another; put the right file there")
    return store


def finish_loading(folder: str, guard: bool = False) -> system.Guard | None:
    """Move the parts of a copy that `load` made complete into place. Cut off anywhere, it can simply run again.

    guard: lock the first part itself, before it appears. Returns that lock.
    """
    fresh, held = os.path.join(folder, _LOADING), None
    if not is_loading(folder):
        return None
    count = _loading_count(folder, fresh)
    if not count:
        system.remove_folder(fresh)  # emptied already
        return None
    for entry in os.scandir(fresh):
        system.refuse_alien(entry.path)
    for number in range(count):
        path = part_path(fresh, number)
        if os.path.exists(path):
            remove_points(part_path(folder, number))
            if guard and number == 0:
                held = system.Guard(path)
            system.publish(path, part_path(folder, number), replace=True)
    for number in reversed(range(count, parts_there(folder))):
        remove_points(part_path(folder, number))
        os.unlink(part_path(folder, number))
    system.sync_folder(part_path(folder, 0))
    os.unlink(os.path.join(fresh, "count"))
    system.remove_folder(fresh)
    return held


def _loading_count(folder: str, fresh: str) -> int:
    """How many parts a load has, of which some are in place; 0 if none is under way. FormatError for a number that the parts belie.

    Parts beyond it are about to be removed, so it is not believed alone.
    """
    path = os.path.join(fresh, "count")
    with system.storage_errors(f"reading {path}"):
        try:
            fd = system.open_own(path, system.OPEN_READ)
        except FileNotFoundError:
            return 0
        try:
            text = system.read_at(fd, 32, 0)
        finally:
            os.close(fd)
    count = int(text) if re.fullmatch(rb"[1-9][0-9]{0,14}", text) else 0
    names = (re.fullmatch(r"part-(\d{6,})\.h5", name) for name in os.listdir(fresh))
    last = max((int(m[1]) for m in names if m), default=count - 1)  # they leave in order
    there = (any(os.path.lexists(part_path(where, n)) for where in (fresh, folder)) for n in range(count))
    if not count or last != count - 1 or not all(there):
        raise FormatError(f"{path} says {text!r}, but other parts are there; restore the folder from a copy")
    return count


class PartsInMemory:
    """An InfiniteBuffer in shared memory."""

    path: str | None = None
    where: str | None = None
    locked_file: str | None = None

    def __init__(self, options: Options, parameters: Parameters) -> None:
        self.options, self._parameters, self.marked = options, parameters, False

    def exists(self) -> bool:
        return False

    def absent(self) -> str:
        return "a buffer in memory is new"

    taken = absent

    def lock(self, create: bool) -> int | None:
        return None

    def remove_leftovers(self) -> None:
        pass

    def open(self, writable: bool) -> Store:
        raise ModeError("the buffer in memory was replaced; send it to this process again")

    def create(self, schema: Schema, replace: bool) -> Store:
        make = functools.partial(self._new_part, schema)
        return cast(Store, Parts(None, [make(0)], make))

    def _new_part(self, schema: Schema, number: int) -> Store:
        store = new_store(None, *_plan_part(self._parameters, schema, number), self.options, self.marked, False)
        store.release()
        return store

    def replacing(self) -> Claim:
        return contextlib.nullcontext()

    def saved_in(self, folder: str) -> list[tuple[str, str]]:
        return _saved_in(folder)

    def sendable(self, store: Store) -> str:
        raise ModeError("an InfiniteBuffer in memory cannot be sent to another process; give it a path, or fork")

    def save(self, store: Store, folder: str, state: dict[str, Any]) -> None:
        _save(store, folder, state)

    def load(self, old: Store, folder: str, state: dict[str, Any]) -> Store:
        with _saved_parts(folder, state, self._parameters, old) as saved:
            stores = []
            for part in saved:
                stores.append(copy_to_memory(part, self.options.durable, self.options.points))
                stores[-1].release()
            return cast(Store, Parts(None, stores, functools.partial(self._new_part, saved[0].layout.schema)))


class PartsInFolder:
    """An InfiniteBuffer in a folder. The lock beside its parts stands for all of them, as does the one of the first part."""

    def __init__(self, path: str, where: str, options: Options, parameters: Parameters) -> None:
        self.path, self.where = path, where
        self.options, self._parameters, self.marked = options, parameters, False

    @property
    def locked_file(self) -> str:
        return part_path(self.where, 0)

    def exists(self) -> bool:
        return self._is_folder() and (is_loading(self.where) or parts_there(self.where) > 0)

    def _is_folder(self) -> bool:
        if not system.exists(self.where):
            return False
        if not os.path.isdir(self.where):
            raise FormatError(f"{self.path} is a file; an InfiniteBuffer is a folder of parts")
        return True

    def absent(self) -> str:
        return f"{self.path} holds no buffer; create one with mode='x' or 'a'"

    def taken(self) -> str:
        return f"{self.path} holds a buffer; open it with mode='r+' or 'a', or replace it with mode='w'"

    def lock(self, create: bool) -> int | None:
        if not self._is_folder() and create:
            system.make_folders(self.where)
        if not self.options.guard or not os.path.isdir(self.where):
            return None
        return system.lock(os.path.join(self.where, "parts"), system.status(self.locked_file))

    def remove_leftovers(self) -> None:
        system.remove_folder(os.path.join(self.where, _LOADING + ".tmp"))
        for number in (n := parts_there(self.where)) - 1, n:  # a kill right after a part got its name leaves its other one
            system.remove_temporaries(part_path(self.where, number))

    def replacing(self) -> Claim:
        return system.replacing(self.locked_file, None) if self.options.guard else contextlib.nullcontext()

    # -- opening and making ------------------------------------------------------------------------------------------

    def open(self, writable: bool) -> Store:
        for _ in range(0 if writable else _LOOKS):
            with contextlib.suppress(MissingError):  # a writer that goes back removes parts that were there just now
                return cast(Store, self._open(writable))
            time.sleep(0.001)
        return cast(Store, self._open(writable))

    @system.storage_errors("opening the parts of an InfiniteBuffer")
    def _open(self, writable: bool) -> Parts:
        guard: system.Guard | bool = writable and self.options.guard
        if writable:
            guard = finish_loading(self.where, bool(guard)) or guard
        else:
            self._await_loading()
        stores: list[Store] = []
        try:
            there = parts_there(self.where)
            while len(stores) < there:
                path, first = part_path(self.where, len(stores)), stores[0] if stores else None
                options = self.options._asdict() | {"guard": first is None and guard}
                stores.append(open_part(path, len(stores), first, writable=writable, **options))
                if not writable or len(stores) < there:
                    stores[-1].release()
            if not stores:
                raise MissingError(f"{self.locked_file} is missing; restore the folder from a copy")
            found = Parts(self.where, stores, functools.partial(self._new_part, stores[0].layout.schema))
            if writable and (problem := found.gap()) is not None:
                raise CorruptionError(
                    f"{problem} (a power cut since the last flush?); buffer.check() lists the rows that are missing; restore the folder "
                    "from a copy, or read it with mode='r'"
                )
            return found
        except BaseException:
            for store in stores:
                store.close()
            raise

    def _await_loading(self) -> None:
        """For a reader: wait until a load has ended."""
        waiting = system.Patience(self.locked_file, _PATIENCE)
        while is_loading(self.where) and os.path.exists(os.path.join(self.where, _LOADING, "count")):
            if waiting.over() and not system.has_writer(part_path(os.path.join(self.where, _LOADING), 0)):
                raise RecoveryError(f"{self.path}: a load was cut off; open it for writing once, to finish it")
            time.sleep(0.005)

    def create(self, schema: Schema, replace: bool) -> Store:
        if not replace or not self.exists():
            make = functools.partial(self._new_part, schema)
            return cast(Store, Parts(self.where, [make(0)], make))
        marked, self.marked = self.marked, False  # a point would have the name of a file that moves
        try:
            with self.replacing():
                made = self._replace_parts(1, lambda folder: self._new_part(schema, 0, folder).close())
        finally:
            self.marked = marked
        if marked:
            made.mark()
        return made

    def _new_part(self, schema: Schema, number: int, folder: str | None = None) -> Store:
        """Make a part; in a folder, so that it is moved from there."""
        path = part_path(folder or self.where, number)
        ours = not os.path.islink(path) and is_left_over(path, self._parameters.identity)
        if not ours and system.exists(path):
            raise FormatError(f"{path} is where the next part goes, and it is none of this buffer; move it away, nothing was changed")
        options = self.options._replace(guard=self.options.guard and number == 0)
        planned, model = _plan_part(self._parameters, schema, number), system.status(self.locked_file)
        return new_store(path, *planned, options, self.marked, ours, model)

    def _replace_parts(self, count: int, make: Callable[[str], None]) -> Store:
        """Put others in place of all parts: made in a subfolder first, complete. From the moment that this gets its name they count."""
        fresh = os.path.join(self.where, _LOADING)
        with system.storage_errors(f"replacing the parts in {self.path}"):
            finish_loading(self.where)
            own_folder(fresh + ".tmp")
            system.remove_folder(fresh + ".tmp")
            os.mkdir(fresh + ".tmp")
            try:
                make(fresh + ".tmp")
                with open(os.path.join(fresh + ".tmp", "count"), "w", encoding="ascii") as file:
                    file.write(str(count))
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(fresh + ".tmp", fresh)
            except BaseException:
                system.remove_folder(fresh + ".tmp")
                raise
            system.sync_folder(fresh)
        return self.open(True)

    # -- copies ------------------------------------------------------------------------------------------------------

    def saved_in(self, folder: str) -> list[tuple[str, str]]:
        if os.path.realpath(folder) == self.where:
            raise ArgumentError(f"save to another folder: {folder} is this buffer itself")
        return _saved_in(folder)

    def sendable(self, store: Store) -> str:
        return self.where

    def save(self, store: Store, folder: str, state: dict[str, Any]) -> None:
        _save(store, folder, state)

    def load(self, old: Store, folder: str, state: dict[str, Any]) -> Store:
        def copy(fresh: str) -> None:
            for i, part in enumerate(saved):
                copy_store(part, part_path(fresh, i), old.status)

        with _saved_parts(folder, state, self._parameters, old) as saved:
            return self._replace_parts(len(saved), copy)


def _plan_part(parameters: Parameters, schema: Schema, number: int) -> tuple[Table, Pieces]:
    return parameters.plan_file(schema, own=parameters.own | {"first": number * parameters.capacity})


def _saved_in(folder: str) -> list[tuple[str, str]]:
    found = [os.path.join(folder, name) for name in os.listdir(folder) if re.fullmatch("parts-[0-9a-f]{8}", name)]
    return [(part_path(copy, 0), os.path.join(copy, "parts")) for copy in found if own_folder(copy)]


def _save(store: Store, folder: str, state: dict[str, Any]) -> None:
    """Copy all parts into a subfolder of its own, which state.json will name: until then an older copy stays as it is."""
    name = f"parts-{secrets.token_hex(4)}"
    fresh = os.path.join(folder, name)
    os.mkdir(fresh)
    try:
        for i, part in enumerate(cast(Parts, store).stores):
            copy_store(part, part_path(fresh, i), store.status)
        write_state(folder, state | {"parts": name}, store.status)
    except BaseException:
        system.remove_folder(fresh)
        raise


@contextlib.contextmanager
def _saved_parts(folder: str, state: dict[str, Any], parameters: Parameters, old: Store) -> Iterator[list[Store]]:
    """Open the parts of a copy in a folder, for the time of a block. Raises MismatchError unless they fit the buffer."""
    source = os.path.join(folder, str(state.get("parts")))
    if not re.fullmatch("parts-[0-9a-f]{8}", str(state.get("parts"))) or not own_folder(source):
        raise MissingError(f"{folder} holds no copy of an InfiniteBuffer")
    saved: list[Store] = []
    try:
        for number in range(parts_there(source)):
            path = part_path(source, number)
            saved.append(open_part(path, number, saved[0] if saved else None, writable=False))
            saved[-1].release()
            parameters.compare(saved[-1].layout, old.schema, path)
        if not saved:
            raise MissingError(f"{part_path(source, 0)} is missing: the copy in {folder} is not complete")
        yield saved
    finally:
        for part in saved:
            part.close()


class InfiniteBuffer(DataBuffer):
    """Keeps every sample: a folder of parts of `rows_per_part` rows, the next one made when the last is full.

    path: the folder. rows_per_part: of every part, 65,536 unless given. There is no `max_size`, and no
    `resize`.

    All parts are mapped, while descriptors are kept of the last one only, and in memory of none. (Before
    Python 3.13 each costs one where it is not Linux.) Linux maps 65,530 pieces for a process unless
    vm.max_map_count says otherwise, and a part takes about four: beyond 10,000 parts choose larger ones.
    A folder whose parts are not all there is refused (FormatError), and for writing one with a part that
    is not full before the last, as a power cut may leave it (CorruptionError); a reader says so for the
    rows that are missing. With mode="w" the old parts stay until the first batch, or with `schema` go at
    once.

    >>> import numpy as np
    >>> from leanreplay import InfiniteBuffer
    >>> buffer = InfiniteBuffer(rows_per_part=4)
    >>> buffer.add(np.arange(10))
    >>> len(buffer), buffer.max_size
    (10, None)
    """

    policy_class = AppendPolicy
    sized = False

    def __init__(self, path: str | os.PathLike[str] | None = None, *, rows_per_part: int | None = None, **options: Any) -> None:
        if "max_size" in options:
            raise ArgumentError("an InfiniteBuffer has no max_size; rows_per_part is the size of its files")
        self._params = {"rows_per_part": integer("rows_per_part", rows_per_part, 1, 2**40)}
        super().__init__(None, path, **options)

    @staticmethod
    def _location(path: str | None, where: str, options: Options, parameters: Parameters) -> Location:
        return PartsInMemory(options, parameters) if path is None else PartsInFolder(path, where, options, parameters)

    def resize(self, max_size: int) -> None:
        """Always an error: there is nothing to resize."""
        raise ArgumentError("an InfiniteBuffer has no max_size; it grows by itself")
