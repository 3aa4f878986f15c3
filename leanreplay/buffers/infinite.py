"""The buffer without a size: a folder of parts, each a complete buffer file of a fixed number of
rows."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from ..arguments import integer
from ..errors import (
    ArgumentError,
    CorruptionError,
    FormatError,
    MissingError,
    ModeError,
    RecoveryError,
)
from ..policies.append import AppendPolicy
from ..samples.schema import Schema
from ..storage import locks, system
from ..storage.folder import Folder
from ..storage.layout import Layout
from ..storage.opening import Options, copy_to_memory, create_file
from ..storage.parts import LOADING, finish_loading, is_loading, open_part, own_folder, part_path, parts_there
from ..storage.reader import Reader
from ..storage.store import Store, WritableStore
from ..storage.writer import Writer
from .base import DataBuffer
from .copies import State, copy_store, is_left_over, state_path, write_json
from .location import Location, Planned, new_store
from .parameters import Parameters, Pieces

_IS_COPY = re.compile("parts-[0-9a-f]{8}").fullmatch


class PartsInMemory(Location):
    """An InfiniteBuffer in shared memory."""

    def create(self, schema: Schema, replace: bool) -> WritableStore:
        make = functools.partial(self._new_part, schema)
        return Folder(None, [make(0)], make)

    def _new_part(self, schema: Schema, number: int) -> Writer:
        store = new_store(None, *self._plan_part(schema, number), self.options, self.marked, False)
        store.release()
        return store

    def rewrite(self, planned: Sequence[Planned], heir_of: Writer | None) -> WritableStore:
        stores = [create_file(None, table, pieces, self.options, fill=fill) for table, pieces, fill in planned]
        for store in stores:
            store.release()
        return Folder(None, stores, functools.partial(self._new_part, planned[0][0].schema))

    def _plan_part(self, schema: Schema, number: int) -> tuple[Layout, Pieces]:
        parameters = self._parameters
        return parameters.plan_file(schema, own=parameters.own | {"first": number * parameters.capacity})

    def sendable(self, store: Store) -> str:
        raise ModeError("an InfiniteBuffer in memory cannot be sent to another process; give it a path, or fork")

    def saved_in(self, folder: str) -> list[tuple[str, str]]:
        if self.path is not None and os.path.realpath(folder) == self.where:
            raise ArgumentError(f"save to another folder: {folder} is this buffer itself")
        copies = [os.path.join(folder, name) for name in os.listdir(folder) if _IS_COPY(name)]
        return [(part_path(copy, 0), os.path.join(copy, "parts")) for copy in copies if own_folder(copy)]

    def save(self, store: Store, folder: str, state: State) -> None:
        """Copy all parts into a subfolder of its own, which state.json will name: an older copy
        stays till then."""
        name = f"parts-{secrets.token_hex(4)}"
        fresh = os.path.join(folder, name)
        os.mkdir(fresh)
        try:
            for i, part in enumerate(cast(Folder, store).stores):
                copy_store(part, part_path(fresh, i), store.status)
            write_json(state_path(folder), {**state, "parts": name}, store.status)
        except BaseException:
            system.remove_folder(fresh)
            raise

    def load(self, old: Store, folder: str, state: State) -> WritableStore:
        with self._saved_parts(folder, state, old) as saved:
            stores = []
            for part in saved:
                stores.append(copy_to_memory(part, self.options))
                stores[-1].release()
            return Folder(None, stores, functools.partial(self._new_part, saved[0].layout.schema))

    @contextlib.contextmanager
    def _saved_parts(self, folder: str, state: State, old: Store) -> Iterator[list[Reader | Writer]]:
        """Open the parts of a copy. Raises MismatchError unless they fit the buffer."""
        name = str(state.get("parts"))
        source = os.path.join(folder, name)
        if not _IS_COPY(name) or not own_folder(source):
            raise MissingError(f"{folder} holds no copy of an InfiniteBuffer")
        saved: list[Reader | Writer] = []
        try:
            for number in range(parts_there(source)):
                path = part_path(source, number)
                saved.append(open_part(path, number, saved[0] if saved else None, None))
                saved[-1].release()
                self._parameters.compare(saved[-1].layout, old.schema, path)
            if not saved:
                raise MissingError(f"{part_path(source, 0)} is missing: the copy in {folder} is not complete")
            yield saved
        finally:
            for part in saved:
                part.close()


class PartsInFolder(PartsInMemory):
    """An InfiniteBuffer in a folder. The locks beside its parts, and of the first, stand for
    all."""

    @property
    def file(self) -> str:
        return part_path(self.where, 0)

    @property
    def stem(self) -> str:
        return os.path.join(self.where, "parts")

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
        return locks.lock(self.stem, system.status(self.file))

    def remove_leftovers(self) -> None:
        system.remove_folder(os.path.join(self.where, LOADING + ".tmp"))
        for number in (n := parts_there(self.where)) - 1, n:  # a kill may leave both names
            system.remove_temporaries(part_path(self.where, number))

    def open(self, writable: bool) -> Store:
        if writable:
            return self._open(True)
        # A writer that goes back removes parts that were there just now.
        return locks.try_again(MissingError, lambda: self._open(False))

    @system.storage_errors("opening the parts of an InfiniteBuffer")
    def _open(self, writable: bool) -> Folder:
        guard: locks.Guard | bool = writable and self.options.guard
        if writable:
            guard = finish_loading(self.where, bool(guard)) or guard
        else:
            self._await_loading()
        stores: list[Reader | Writer] = []
        try:
            there = parts_there(self.where)
            while len(stores) < there:
                path, first = part_path(self.where, len(stores)), stores[0] if stores else None
                options = self.options._replace(guard=guard if first is None else False) if writable else None
                stores.append(open_part(path, len(stores), first, options))
                if not writable or len(stores) < there:
                    stores[-1].release()
            if not stores:
                raise MissingError(f"{self.file} is missing; restore the folder from a copy")
            found = Folder(self.where, stores, functools.partial(self._new_part, stores[0].layout.schema))
            if writable and (gaps := found.gaps()):
                raise CorruptionError(
                    f"{gaps[0].what} (a power cut since the last flush?); buffer.check() lists the rows that are missing; "
                    "restore the folder from a copy, or read it with mode='r'"
                )
            return found
        except BaseException:
            for store in stores:
                store.close()
            raise

    def _await_loading(self) -> None:
        """For a reader: wait until a load has ended."""
        waiting = locks.Patience(self.file)
        while is_loading(self.where) and system.exists(os.path.join(self.where, LOADING, "count")):
            if waiting.over() and not locks.has_writer(part_path(os.path.join(self.where, LOADING), 0)):
                raise RecoveryError(f"{self.path}: a load was cut off; open it for writing once, to finish it")
            time.sleep(0.005)

    def create(self, schema: Schema, replace: bool) -> WritableStore:
        if not replace or not self.exists():
            make = functools.partial(self._new_part, schema)
            return Folder(self.where, [make(0)], make)
        marked, self.marked = self.marked, False  # a point would have the name of a file that moves
        try:
            with self.replacing():
                made = self._replace_parts(1, lambda folder: self._new_part(schema, 0, folder).close())
        finally:
            self.marked = marked
        if marked:
            made.mark()
        return made

    def rewrite(self, planned: Sequence[Planned], heir_of: Writer | None) -> WritableStore:
        def make(folder: str) -> None:
            options, model = self.options._replace(guard=False), system.status(self.file)
            for number, (table, pieces, fill) in enumerate(planned):
                create_file(part_path(folder, number), table, pieces, options, fill=fill, model=model).close()

        return self._replace_parts(len(planned), make)

    def _new_part(self, schema: Schema, number: int, folder: str | None = None) -> Writer:
        """Make a part; in a folder, so that it is moved from there."""
        path = part_path(folder or self.where, number)
        ours = not os.path.islink(path) and is_left_over(path, self._parameters.identity)
        if not ours and system.exists(path):
            raise FormatError(f"{path} is where the next part goes, and it is none of this buffer; move it away, nothing was changed")
        options = self.options._replace(guard=self.options.guard and number == 0)
        planned, model = self._plan_part(schema, number), system.status(self.file)
        return new_store(path, *planned, options, self.marked, ours, model)

    def _replace_parts(self, count: int, make: Callable[[str], None]) -> WritableStore:
        """Put others in place of all parts. They count once their subfolder gets its name."""
        fresh = os.path.join(self.where, LOADING)
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
        return self._open(True)

    def sendable(self, store: Store) -> str:
        return self.where

    def load(self, old: Store, folder: str, state: State) -> WritableStore:
        def copy(fresh: str) -> None:
            for i, part in enumerate(saved):
                copy_store(part, part_path(fresh, i), old.status)

        with self._saved_parts(folder, state, old) as saved:
            return self._replace_parts(len(saved), copy)


class InfiniteBuffer(DataBuffer):
    """Keeps every sample: a folder of parts of `rows_per_part` rows, the next one made when the
    last is full.

    path: the folder. rows_per_part: of every part, 65,536 unless given. There is no `max_size`, and
    no `resize`.

    All parts are mapped, while descriptors are kept of the last one only, and in memory of none.
    (Before Python 3.13 each costs one where it is not Linux.) Linux maps 65,530 pieces for a
    process unless vm.max_map_count says otherwise, and a part takes about four: beyond 10,000 parts
    choose larger ones. A folder whose parts are not all there is refused (FormatError), and for
    writing one with a part that is not full before the last, as a power cut may leave it
    (CorruptionError); a reader says so for the rows that are missing. With mode="w" the old parts
    stay until the first batch, or with `schema` go at once.

    >>> import numpy as np
    >>> from leanreplay import InfiniteBuffer
    >>> buffer = InfiniteBuffer(rows_per_part=4)
    >>> buffer.add(np.arange(10))
    >>> len(buffer), buffer.max_size
    (10, None)
    """

    policy_class = AppendPolicy
    sized = False

    def __init__(self, path: str | os.PathLike[str] | None = None, *, rows_per_part: int | None = None, **options: object) -> None:
        if "max_size" in options:
            raise ArgumentError("an InfiniteBuffer has no max_size; rows_per_part is the size of its files")
        self._params = {"rows_per_part": integer("rows_per_part", rows_per_part, 1, 2**40)}
        super().__init__(None, path, **cast("dict[str, Any]", options))

    @staticmethod
    def _location(path: str | None, where: str, options: Options, parameters: Parameters) -> Location:
        return (PartsInMemory if path is None else PartsInFolder)(path, where, options, parameters)

    def resize(self, max_size: int) -> None:
        """Always an error: there is nothing to resize."""
        raise ArgumentError("an InfiniteBuffer has no max_size; it grows by itself")
