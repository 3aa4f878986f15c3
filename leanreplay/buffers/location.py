"""Where a buffer is kept: in memory, in one file, or in a folder of parts (see `infinite`)."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from typing import cast

from ..arguments import as_path
from ..errors import ArgumentError, ModeError
from ..samples.schema import Schema
from ..storage import locks, system
from ..storage.layout import Layout
from ..storage.opening import Options, copy_to_memory, create_file, open_for_writing
from ..storage.reader import Reader
from ..storage.store import Store, WritableStore
from ..storage.writer import Writer
from .copies import State, copy_aside, is_left_over, save_file, saved_file
from .parameters import Parameters, Pieces

# What other libraries take as the second argument. Nobody means a file by it.
_NO_NAMES = re.compile(r"(class|task|experience|label|group)(e?s)?|none|true|false|cpu|mps|cuda(:\d+)?|in_memory", re.IGNORECASE)

Planned = tuple[Layout, Pieces, Callable[[Writer], None]]  # a file to be made, and what fills it
Claim = contextlib.AbstractContextManager[None]


def new_store(
    path: str | None, table: Layout, pieces: Pieces, options: Options, marked: bool, replace: bool, model: os.stat_result | None = None
) -> Writer:
    """Make a store. marked: with a restore point of its empty state; both or none."""
    store = create_file(path, table, pieces, options, replace=replace, model=model)
    try:
        if marked:
            store.mark()
    except BaseException:
        store.close()
        raise
    return store


class Location:
    """Where a buffer is kept: here in shared memory. A place on the disk overrides what differs.

    path: as the user wrote it, None in memory. where: that path, whatever the current folder is.
    marked: new stores begin with a restore point.
    """

    def __init__(self, path: str | None, where: str, options: Options, parameters: Parameters) -> None:
        self.path, self.where, self.options, self.marked = path, where, options, False
        self._parameters = parameters

    @property
    def file(self) -> str | None:
        """The file, or first part, whose lock stands for the buffer; None in memory."""
        return None

    @property
    def stem(self) -> str | None:
        """What the names of the files beside the buffer begin with; None in memory."""
        return None

    def exists(self) -> bool:
        """Whether there is a buffer to open."""
        return False

    def absent(self) -> str:
        """Say that there is nothing to open."""
        return f"{self.path} does not exist; create it with mode='x' or 'a'"

    def taken(self) -> str:
        """Say that a buffer is in the way of a new one."""
        return f"{self.path} exists; open it with mode='r+' or 'a', or replace it with mode='w'"

    def lock(self, create: bool) -> int | None:
        """Take the writer's lock; return its descriptor. create: there may be no buffer yet."""
        return None

    def remove_leftovers(self) -> None:
        """Remove what killed writers left. The lock is held."""

    def open(self, writable: bool) -> Store:
        """Open what is there."""
        raise ModeError("the buffer in memory was resized; send it to this process again")

    def create(self, schema: Schema, replace: bool) -> WritableStore:
        """Make a store, whole before it appears. replace: it takes the place of what is there."""
        return new_store(None, *self._parameters.plan_file(schema), self.options, self.marked, False)

    def rewrite(self, planned: Sequence[Planned], heir_of: Writer | None) -> WritableStore:
        """Put a store of newly written files in place of the present one. heir_of: whose restore
        points go on."""
        ((table, pieces, fill),) = planned
        return create_file(self.file, table, pieces, self.options, replace=True, fill=fill, heir_of=heir_of)

    def replacing(self) -> Claim:
        """Keep writers away from what is to be replaced. LockedError if it has one."""
        guarded = self.file if self.options.guard else None
        return contextlib.nullcontext() if guarded is None else locks.replacing(guarded, None)

    def sendable(self, store: Store) -> str:
        """Return a name by which another process finds the store, or raise ModeError."""
        if store.schema is None:
            raise ModeError(
                "an empty buffer in memory cannot be sent to another process before its first batch; give it a schema, or a path"
            )
        return cast(Writer, store).mapping.link

    def saved_in(self, folder: str) -> list[tuple[str, str]]:
        """Return the names of both locks of the writer of each copy that a save replaces."""
        path = os.path.join(folder, "buffer.h5")
        if self.path is not None and os.path.realpath(path) == self.where:
            raise ArgumentError(f"save to another folder: {path} is this buffer itself")
        return [(path, path)]

    def save(self, store: Store, folder: str, state: State) -> None:
        """Make a copy in a folder, with this state in its state.json."""
        save_file(cast("Reader | Writer", store), folder, state)

    def load(self, old: Store, folder: str, state: State) -> WritableStore:
        """Replace the old store by a copy of `save`, or raise MismatchError."""
        with saved_file(folder, None, self._parameters, old) as saved:
            return copy_to_memory(saved, self.options)


class OneFile(Location):
    """One file. Beside it stand the writer's lock and, for restore points, undo files."""

    @property
    def file(self) -> str:
        return self.where

    stem = file

    def exists(self) -> bool:
        return system.exists(self.where)

    def lock(self, create: bool) -> int | None:
        return locks.lock(self.stem, system.status(self.where)) if self.options.guard else None

    def remove_leftovers(self) -> None:
        system.remove_temporaries(self.where)
        if os.path.basename(self.where) == "buffer.h5":  # a copy: maybe of a killed saver
            with locks.users_of(os.path.dirname(self.where)) as users:
                users.alone(lambda: system.remove_temporaries(self.where + ".saved"))

    def open(self, writable: bool) -> Store:
        return open_for_writing(self.where, self.options) if writable else Reader.open(self.where, name=self.where)

    def create(self, schema: Schema, replace: bool) -> WritableStore:
        table, pieces = self._parameters.plan_file(schema)
        replace = replace or is_left_over(self.where, table.uuid)
        with self.replacing() if replace else contextlib.nullcontext():
            return new_store(self.where, table, pieces, self.options, self.marked, replace)

    def sendable(self, store: Store) -> str:
        return self.where

    def load(self, old: Store, folder: str, state: State) -> WritableStore:
        with saved_file(folder, self.where, self._parameters, old) as saved:
            temp = copy_aside(saved, self.where, system.status(self.where) or saved.status)
            try:  # mapped and locked before it has its name: from then on nothing can fail
                created = open_for_writing(temp, self.options, name=self.where)
                try:
                    system.publish(temp, self.where, True)
                except BaseException:
                    created.close()
                    raise
            except BaseException:
                system.discard(temp)
                raise
            system.sync_folder(self.where)
            created.drop_points()
            return created


def checked_path(path: object, mode: str) -> str:
    """A path as str. What other libraries have in its place, given by position, is refused with the
    way out."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise ArgumentError(f"path must be a str or os.PathLike, got {path!r:.200}; give anything else by name: seed=0, adaptive_size=True")
    if isinstance(path, str) and mode not in ("r", "r+") and _NO_NAMES.fullmatch(path) and not os.path.lexists(path):
        raise ArgumentError(
            f"path={path!r} would make a file of that name; give what you mean by name (groupby='class', transform=None), "
            f"or write './{path}' for such a file"
        )
    return as_path(path)
