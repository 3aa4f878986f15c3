"""The store that a buffer works with at present: opening, following, replacing, forks."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, cast

from ..errors import ExistsError, LeanReplayError, LockedError, MismatchError, MissingError, ModeError
from ..samples.schema import Schema
from ..storage import system
from ..storage.reader import Reader
from ..storage.store import EmptyStore, Store, WritableStore, refuse_within
from ..storage.writer import Writer
from .drawing import PROCESS, Draws
from .location import Location
from .parameters import Parameters

LockType = AbstractContextManager[bool]  # threading.RLock is no type before Python 3.13
_LIVING: weakref.WeakSet[Current]


class Packed(NamedTuple):
    """A buffer on its way to another process. begun: it has a store. copy: which copy it is."""

    path: str | None
    where: str
    max_size: int | None
    identity: str
    begun: bool
    awaits: str | None
    copy: str


class Current:
    """The store of one buffer, its mode, and whether it is closed or being replaced.

    store: an `EmptyStore` until there is a file. lock: whoever uses the store holds it.
    before_write: called before every write, by those who planned reads of the present rows. awaits:
    of a copy that waits for the first batch of a buffer, whose.
    """

    def __init__(self, name: str, location: Location, parameters: Parameters, draws: Draws, mode: str) -> None:
        self.name, self.location, self.parameters, self.draws, self.mode = name, location, parameters, draws, mode
        self.lock: LockType = threading.RLock()
        self.before_write: list[Callable[[], None]] = []
        self.store: Store = EmptyStore()
        self.awaits: str | None = None
        self.closed = False
        self._replacing = False
        self._lock_fd: int | None = None
        _LIVING.add(self)

    # -- opening and closing -----------------------------------------------------------------------

    def begin(self, schema: Schema | None) -> None:
        """Open what is there, or begin a new buffer, with a store if there is a schema."""
        try:
            with system.storage_errors(f"opening {self.location.path or 'a buffer in memory'}"):
                try:
                    self._begin(schema)
                except LockedError:
                    if self._writer_here() is None:
                        raise
                    gc.collect()  # a buffer that nobody refers to any more, but for itself, closes
                    self.unlock()
                    self._begin(schema)
        except LockedError as error:
            self.close()
            raise self.explain(error) from None
        except BaseException:
            self.close()
            raise

    def _begin(self, schema: Schema | None) -> None:
        here, mode = self.location, self.mode
        if mode in ("r", "r+") and not here.exists():
            raise MissingError(here.absent())
        if mode != "r":
            with system.storage_errors(f"opening {here.path} for writing"):
                self._lock_fd = here.lock(create=mode != "r+")
                if self._lock_fd is not None:
                    here.remove_leftovers()
        exists = here.exists()
        if exists and mode == "x":
            raise ExistsError(here.taken())
        if exists and mode != "w":
            self.store = here.open(mode != "r")
            self.parameters.adopt(self.store.layout, schema, here.path)
            return
        if exists:
            with here.replacing():
                pass
        self.parameters.settle()
        if schema is not None:
            self.create(schema)

    def create(self, schema: Schema) -> None:
        """Make the store of a new buffer."""
        self.store = self.location.create(schema, replace=self.mode == "w")

    def close(self) -> None:
        """Close the store and release the writer's lock."""
        with self.lock:
            self.store.close()  # refuses in the middle of a change
            self.closed = True
            self.unlock()

    def unlock(self) -> None:
        """Release the writer's lock."""
        held, self._lock_fd = self._lock_fd, None
        if held is not None:
            os.close(held)

    def explain(self, error: LockedError, path: str | None = None) -> LockedError:
        """Return the error for a locked file: it names a writer of this very process."""
        other = self._writer_here(path)
        if other is None:
            return error
        return LockedError(
            f"{path or self.location.path} is open for writing in this very process, by the {other.name} (mode {other.mode!r}); "
            "close() that object first, or `del` its name if a cell of a notebook is run again; or read with mode='r'"
        )

    def _writer_here(self, path: str | None = None) -> Current | None:
        """The buffer of this process that writes to the file under a path, or to this one's."""
        mine = self.location.file
        path = path or mine
        found = None if path is None else system.status(path)
        for other in list(_LIVING):
            theirs = other.location.file
            if theirs is None or (other is self and path == mine) or other.closed or other.mode == "r":
                continue
            status = other.store.status
            if theirs == path or (found is not None and status is not None and os.path.samestat(found, status)):
                return other
        return None

    # -- using it ----------------------------------------------------------------------------------

    def reading(self) -> Store:
        """Return the store, its state that of the file."""
        if self.closed:
            raise ModeError(f"{self!r} is closed; open it again with leanreplay.open(path)")
        if self._replacing:
            self._end_replacing()
        store = self.store
        store.recover_or_refresh()
        return store if store.writable else self._newest(store)

    def look_up(self, name: str) -> object:
        """Return an attribute of the store."""
        with self.lock:
            return getattr(self.reading(), name)

    def writing(self) -> WritableStore:
        """Return the store for writing. Raises ModeError in a reader."""
        if self.before_write:
            for settle in tuple(self.before_write):
                settle()
        store = self.reading()
        if self.mode == "r":
            raise ModeError(
                f"{self.location.path or 'this buffer'} is open for reading only (mode 'r', or a forked or unpickled copy); "
                "open it with mode='r+' in one process to write"
            )
        return cast(WritableStore, store)

    def _newest(self, store: Store) -> Store:
        """For a reader: what stands under the name now."""
        if store.schema is not None:
            return self._follow() if store.was_replaced() else store
        if self.mode != "r" or not self.location.exists():
            return store
        found = self.location.open(False)
        if self.awaits not in (None, found.layout.uuid):  # to be replaced
            found.close()
            return store
        self.store = found
        self.parameters.adopt(found.layout, None, self.location.path)
        return found

    def _follow(self) -> Store:
        """Go on with the file that has replaced the present one: maybe another buffer's."""
        fresh = self.location.open(False)
        table, mine = fresh.layout, self.parameters
        if table.kind != mine.kind.name:
            fresh.close()
            raise MismatchError(
                f"{self.location.path} was replaced by a {table.kind}, but this reader is a {mine.kind.name}; "
                "open it again with leanreplay.open(path)"
            )
        # The other one is closed when nobody reads from it any more.
        self.store = fresh
        if table.uuid == mine.identity:
            mine.take_size(table)
        else:
            mine.forget()
            mine.adopt(table, None, self.location.path)
            self.draws.begin(0, self.draws.copies)
        return fresh

    def replace(self, make: Callable[[], WritableStore], keep_points: bool = False) -> None:
        """Put another store in place of the present one. `make` does so on the disk, or raises.

        keep_points: the new one has taken the restore points over. Until it counts both have them.
        """
        old = self.store
        self._replacing = True
        self.store = made = make()
        if isinstance(old, Writer) and keep_points:
            old.give_away_points()
        self.parameters.take_size(made.layout)
        self._replacing = False
        cast(WritableStore, old).mark_gone()
        old.close()

    def _end_replacing(self) -> None:
        """After an exception within `replace`: what stands under the name counts, old or new."""
        refuse_within(self, {Current.replace.__code__}, self.location.path)
        old, here = self.store, self.location
        if here.path is not None and not (old.schema is None and self.mode == "w"):  # still to go
            if here.exists():
                cast(WritableStore, old).unguard()  # the file may be the same
                self.store = here.open(True)
                old.close()
            else:
                self.store = EmptyStore()
        if self.store.schema is not None:
            self.parameters.take_size(self.store.layout)
        self._replacing = False

    # -- copies ------------------------------------------------------------------------------------

    def become_reader(self) -> None:
        """In a forked child: the parent writes on, so this copy reads, and drops the lock."""
        self.lock = threading.RLock()
        self.before_write = []
        self.draws.become_copy(f"fork {self.draws.copies}")
        begun = self.store.schema is not None
        if self.mode == "w" and not begun:
            self.awaits = self.parameters.identity
        if self.location.path is not None or begun:
            self.mode = "r"
        self.unlock()
        if not self.closed:  # a closed store has no map to read from
            self.store = self.store.as_reader()

    def pack(self) -> Packed:
        """Return what another process needs to read the same."""
        if self.closed:
            raise ModeError(f"{self!r} is closed; open it again with leanreplay.open(path)")
        with self.lock:
            here, begun, identity = self.location, self.store.schema is not None, self.parameters.identity
            copy = f"{self.draws.copy} pickle {self.draws.copies}"
            awaits = identity if self.mode == "w" else self.awaits
            where = here.sendable(self.store)
            self.draws.pickles += 1
            return Packed(here.path, where, self.parameters.max_size, identity, begun, awaits, copy)

    def unpack(self, packed: Packed) -> None:
        """Become the reader that another process packed."""
        parameters, here, identity = self.parameters, self.location, packed.identity
        parameters.identity, self.awaits = identity, packed.awaits
        self.draws.become_copy(packed.copy + PROCESS.loading(packed.copy + identity))
        parameters.max_size, parameters.given_size = packed.max_size, None
        if here.path is not None:
            if packed.begun and here.exists():
                self.store = here.open(False)
        else:
            try:
                self.store = Reader.open(packed.where, name=None)
            except LeanReplayError as error:
                raise ModeError(f"the process that holds this buffer in memory has ended or closed it ({error})") from None
        if self.store.schema is not None:
            if self.store.layout.uuid != identity:
                raise ModeError(
                    f"{here.path} holds another buffer than the one that was pickled; open what is there now with leanreplay.open(path)"
                    if here.path is not None
                    else "this buffer in memory was closed, or its process has ended, and another buffer has taken its place; send that one"
                )
            parameters.adopt(self.store.layout, None, here.path)

    def __repr__(self) -> str:
        return f"{self.name.split()[0]}({self.place}{', closed' if self.closed else ''})"

    @property
    def place(self) -> str:
        """Size and path, as an error shows them."""
        size, path = self.parameters.max_size, self.location.path
        return f"{size}" if path is None else f"{size}, {path!r}" if self.parameters.kind.sized else repr(path)


_LIVING = weakref.WeakSet()


def _after_fork() -> None:
    PROCESS.forks += f" {system.forks}"
    for current in list(_LIVING):
        current.become_reader()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
