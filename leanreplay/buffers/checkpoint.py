"""States of a buffer: restore points, which of them are kept, and copies in a folder."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

from ..errors import FormatError, LockedError, ModeError, StateError, VolatileStateWarning
from ..storage import locks, system
from ..storage.state import empty_state
from ..storage.store import WritableStore
from .copies import State, counts, is_same_copy, read_json, remove_leftovers, saved_states, write_json
from .current import Current
from .feeding import Feeder
from .rewriting import outside

Described = dict[str, Any]  # the same, new

# What a state holds.
_KINDS = {"format": int, "kind": str, "uuid": str, "max_size": int, "seen": int, "state": str, "draws": dict, "copies": int}


class Checkpoints:
    """The states of one buffer.

    may_warn: whether to warn of a state in memory; not where a copy of the buffer goes with it.
    """

    def __init__(self, current: Current, feeder: Feeder) -> None:
        self._current, self._feeder, self._parameters, self._draws = current, feeder, current.parameters, current.draws
        self.may_warn = True
        self._kept: list[State] | None = None  # as they were given, or stand in the file

    def mark(self) -> Described:
        """Mark a restore point; see `DataBuffer.state_dict`."""
        store = self._current.writing()
        if self._current.location.path is None and self.may_warn and store.seen:
            self.may_warn = False
            warnings.warn(
                "the state of a buffer in memory can be loaded only while this process lives: the samples are not in it; give the "
                "buffer a path to resume in another process, or copy it with save(folder)",
                VolatileStateWarning,
                stacklevel=outside(),
            )
        self._current.location.marked = True
        name = empty_state() if store.schema is None else store.mark(self.kept(store))
        return self._described(name) | {"seen": store.seen, "max_size": self._parameters.max_size or 0}

    def _described(self, name: str) -> Described:
        """Describe the present state, which has this name."""
        return {
            "format": 1,
            "kind": self._parameters.kind.name,
            "uuid": self._parameters.identity,
            "max_size": self._parameters.max_size,
            "state": name,
            "draws": {"sample": self._draws.drawn},
            "copies": self._draws.copies,
        }

    def roll_back(self, state: State) -> None:
        """Go back to a state; see `DataBuffer.load_state_dict`."""
        store = self._current.writing()
        seen, name = self._check(state)
        if store.schema is None:
            if name != empty_state():
                raise StateError(
                    f"this buffer is empty, and so {seen} samples behind the state; open its file with mode='r+', or load(folder) first"
                )
            self._current.location.marked = True  # the way back here must be there again
        else:
            if name != store.state_name():
                self._feeder.forget_policy()  # a folder's sequence, a sum, may come out equal
                self._draws.forget()
            store.rollback(name, seen, self.kept(store))
            store.mark(self.kept(store))
        self._draws.begin(*counts(state))

    def keep(self, state: State) -> None:
        """Keep the restore point of a state; see `DataBuffer.keep`."""
        store = self._current.writing()
        seen, name = self._check(state)
        kept = self.kept(store)
        if name == store.state_name():
            if store.schema is not None:
                store.mark(kept)
        elif not store.has_point(name):
            raise StateError(
                f"no restore point is left of this state (seen={seen}), so it cannot be kept: keep a state while it is one of the newest "
                f"{self._current.location.options.points} (restore_points), right after state_dict() for instance"
            )
        self._keep_only([*(other for other in kept if other != name), name], kept | {name: state})

    def release(self, state: State | None) -> None:
        """Keep the restore point of a state, or of all, no longer; see `DataBuffer.release`."""
        store = self._current.writing()
        kept = self.kept(store)
        stay = [] if state is None else [name for name in kept if name != self._parse(state)]
        self._keep_only(stay, kept)
        if store.schema is not None:
            store.trim(stay)

    def kept(self, store: WritableStore) -> dict[str, Described]:
        """Return the states that are kept, by name, the latest last."""
        path = self._kept_file
        if self._kept is None:
            found: Any = []
            try:
                with system.storage_errors(f"reading {path}"), contextlib.suppress(FileNotFoundError):
                    found = [] if path is None else read_json(path)
                if not isinstance(found, list):
                    raise ValueError("no list")
            except (ValueError, RecursionError) as error:
                raise FormatError(f"{path} should say which restore points are kept: {error}; move it away, and none is") from None
            self._kept = found
        states = {}
        for state in self._kept:
            with contextlib.suppress(StateError):  # of a buffer that was here before, or had another size
                _, name = self._check(state)
                if store.schema is None or store.has_point(name):
                    states[name] = {key: state[key] for key in _KINDS}
        return states

    @property
    def _kept_file(self) -> str | None:
        stem = self._current.location.stem
        return None if stem is None else f"{stem}.undo.kept"

    def _keep_only(self, names: list[str], states: Mapping[str, State]) -> None:
        """Keep these of some states, by name."""
        path = self._kept_file
        kept: list[State] = [{key: states[name][key] for key in _KINDS} for name in names]
        if path is not None:
            with system.storage_errors(f"writing {path}"):
                system.remove_temporaries(path)
                if kept:
                    write_json(path, kept, self._current.store.status)
                else:
                    system.refuse_alien(path)
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
        self._kept = kept

    def _parse(self, state: State) -> str:
        """Return the restore point of a state of such a buffer, or raise StateError."""
        if not isinstance(state, Mapping) or any(type(state.get(k)) is not t for k, t in _KINDS.items()):
            raise StateError(f"not a state of a buffer: expected a dict with {sorted(_KINDS)}, got {state!r:.200}")
        if state["format"] != 1:
            raise StateError(f"state of format {state['format']}, but this release reads 1; upgrade leanreplay")
        kind = self._parameters.kind
        if state["kind"] != kind.name:
            raise StateError(f"the state of a {state['kind']}, but this is a {kind.name}")
        try:
            counts(state)
        except ValueError as error:
            raise StateError(f"not a state of a buffer: {error}") from None
        if state["seen"] < 0:
            raise StateError(f"not a state of a buffer: {state!r:.200}")
        if not re.fullmatch("[0-9a-f]{16}" if kind.sized else "[0-9a-f]{16}(,[0-9a-f]{16})*", state["state"]):
            raise StateError(f"not a state of a buffer: {state['state']!r:.200}")
        return str(state["state"])

    def _check(self, state: State) -> tuple[int, str]:
        """Return `seen` and the restore point of a state of this buffer, or raise StateError."""
        name = self._parse(state)
        max_size, identity = self._parameters.max_size, self._parameters.identity
        if state["uuid"] != identity and name != empty_state():  # where all begin
            raise StateError(
                f"the state of another buffer (uuid {state['uuid']}, this one's is {identity}); open the file that it was made with, "
                "path=... and mode='r+'; or if save(folder) copied that buffer call load(folder) first, and load_state_dict after it"
            )
        if state["max_size"] != (max_size or 0):
            raise StateError(f"the state of this buffer with max_size {state['max_size']}, but it was resized to {max_size}")
        return state["seen"], name

    def save(self, folder: str) -> None:
        """Copy the buffer into a folder; see `DataBuffer.save`."""
        current = self._current
        store, here = current.reading(), current.location
        if store.schema is None:
            raise ModeError("the buffer is empty: there is nothing to save before its first batch")
        with system.storage_errors(f"saving to {folder}"), contextlib.ExitStack() as held:
            system.make_folders(folder)
            system.refuse_alien(os.path.join(folder, "state.json"))
            for copy, name in here.saved_in(folder):
                try:
                    held.enter_context(locks.replacing(copy, name))
                except LockedError as error:
                    raise current.explain(error, copy) from None
            users = held.enter_context(locks.users_of(folder))
            users.alone(lambda: remove_leftovers(folder))
            here.save(store, folder, self._described(store.state_name()))
            users.alone(lambda: remove_leftovers(folder))

    def load(self, folder: str) -> None:
        """Replace the contents by a copy; see `DataBuffer.load`."""
        current = self._current
        current.writing().stay()
        with contextlib.ExitStack() as stack, system.storage_errors(f"loading from {folder}"):
            if os.path.isdir(folder):
                stack.enter_context(locks.users_of(folder)).alone(lambda: remove_leftovers(folder))
            states = saved_states(folder, strict=True)
            old = current.store
            current.replace(lambda: current.location.load(old, folder, states[0]))
        now = self._described(current.store.state_name())
        self._draws.begin(*next((counts(state) for state in states if is_same_copy(state, now)), (0, 0)))
