"""States of a buffer: restore points, and copies in a folder."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

from ..errors import LockedError, ModeError, StateError, VolatileStateWarning
from ..storage import locks, system
from ..storage.state import empty_state
from .copies import State, counts, is_same_copy, remove_leftovers, saved_states
from .current import Current
from .feeding import Feeder
from .rewriting import outside

Described = dict[str, Any]  # the same, new


class Checkpoints:
    """The states of one buffer.

    may_warn: whether to warn of a state in memory; not where a copy of the buffer goes with it.
    """

    def __init__(self, current: Current, feeder: Feeder) -> None:
        self._current, self._feeder, self._parameters, self._draws = current, feeder, current.parameters, current.draws
        self.may_warn = True

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
        name = empty_state() if store.schema is None else store.mark()
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
                raise StateError(f"this buffer is empty, and so {seen} samples behind the state; open its file with mode='r+'")
            self._current.location.marked = True  # the way back here must be there again
        else:
            if name != store.state_name():
                self._feeder.forget_policy()  # a folder's sequence, a sum, may come out equal
            store.rollback(name, seen)
            store.mark()
        self._draws.begin(*counts(state))

    def _check(self, state: State) -> tuple[int, str]:
        """Return `seen` and the restore point of a state, or raise StateError."""
        wanted = {"format": int, "kind": str, "uuid": str, "max_size": int, "seen": int, "state": str, "draws": dict, "copies": int}
        if not isinstance(state, Mapping) or any(type(state.get(k)) is not t for k, t in wanted.items()):
            raise StateError(f"not a state of a buffer: expected a dict with {sorted(wanted)}, got {state!r:.200}")
        if state["format"] != 1:
            raise StateError(f"state of format {state['format']}, but this release reads 1; upgrade leanreplay")
        kind, max_size, identity = self._parameters.kind, self._parameters.max_size, self._parameters.identity
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
        if state["uuid"] != identity and state["state"] != empty_state():  # where all begin
            raise StateError(f"the state of another buffer (uuid {state['uuid']}, this one's is {identity})")
        if state["max_size"] != (max_size or 0):
            raise StateError(f"the state of this buffer with max_size {state['max_size']}, but it was resized to {max_size}")
        return state["seen"], state["state"]

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
