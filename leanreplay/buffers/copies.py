"""Copies of buffers: files that appear whole, and folders made by `save`, with a state.json."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import ArgumentError, FormatError, LeanReplayError, MissingError, ModeError
from ..storage import system
from ..storage.reader import Reader
from ..storage.store import Store
from ..storage.writer import Writer
from .drawing import MAX_DRAWS
from .parameters import Parameters

State = Mapping[str, Any]  # JSON values


def counts(state: State) -> tuple[int, int]:
    """Return the draws and the copies of a state. Raises ValueError for what cannot be such."""
    draws, copies = state["draws"], state.get("copies", 0)
    if not isinstance(draws, Mapping) or not set(draws) <= {"sample"}:
        raise ValueError(f"draws {draws!r:.200}")
    found = draws.get("sample", 0), copies
    if any(type(v) is not int or not 0 <= v < MAX_DRAWS - 1 for v in found):
        raise ValueError(f"draws {draws!r:.200}, copies {copies!r:.200}")
    return found


def is_left_over(path: str, identity: str) -> bool:
    """Whether this very buffer made a file, still empty, before an exception came."""
    if not os.path.exists(path):
        return False
    try:
        found = Reader.open(path, name=path)
    except LeanReplayError:
        return False
    same = found.layout.uuid == identity and found.seen == 0
    found.close()
    return same


def copy_aside(store: Reader | Writer, path: str, model: os.stat_result | None) -> str:
    """Copy a store's file to a temporary one for `path`, whole and durable; return its name.

    model: whose mode and owner the copy gets.
    """
    for _ in range(100):
        before = store.sequence
        fd, temp = system.temporary(path, model)
        try:
            try:
                store.mapping.copy_to(fd)
                os.fsync(fd)
            finally:
                os.close(fd)
            store.recover_or_refresh()
            if isinstance(store, Writer) or (store.sequence == before and not store.pending()):
                return temp
            os.unlink(temp)
        except BaseException:
            system.discard(temp)
            raise
    raise ModeError(f"{store.path} is being written to; save it from the process that writes, or close that first")


def copy_store(store: Reader | Writer, path: str, model: os.stat_result | None = None) -> None:
    """Copy a store's file so that it appears whole under another name. model: as above."""
    publish(copy_aside(store, path, model or store.status), path)


def publish(temp: str, path: str) -> None:
    """Give a temporary file its name, durably. Where that fails the file goes."""
    try:
        system.publish(temp, path, True)
    except BaseException:
        system.discard(temp)
        raise
    system.sync_folder(path)


@contextlib.contextmanager
def saved_file(folder: str, where: str | None, parameters: Parameters, old: Store) -> Iterator[Reader]:
    """Open the file of a copy. Raises MismatchError unless it fits the buffer at `where`."""
    path = os.path.join(folder, "buffer.h5")
    if os.path.realpath(path) == where:
        raise ArgumentError(f"load from another folder: {path} is this buffer itself")
    if not system.exists(path):
        raise MissingError(f"{path} does not exist: there is no whole copy made by save() in {folder}; load another one")
    saved = Reader.open(path, name=path)
    try:
        parameters.compare(saved.layout, old.schema, path)
        yield saved
    finally:
        saved.close()


def save_file(store: Reader | Writer, folder: str, state: State) -> None:
    """Save a single file. Until it has its name, state.json describes the old copy too."""
    path = os.path.join(folder, "buffer.h5")
    temp = copy_aside(store, path + ".saved", store.status)
    try:
        older = [s for s in saved_states(folder) if not is_same_copy(s, state)]
        write_json(state_path(folder), {**state, "older": older}, store.status)
    except BaseException:
        system.discard(temp)
        raise
    publish(temp, path)
    if older:
        with contextlib.suppress(OSError):  # state.json is then only longer than it need be
            write_json(state_path(folder), state, store.status)


def state_path(folder: str) -> str:
    """The file in a folder of `save` that describes the copy."""
    return os.path.join(folder, "state.json")


def read_json(path: str) -> object:
    """Read a file that `write_json` wrote. ValueError or RecursionError for anything else."""
    with open(path, encoding="utf-8", opener=lambda name, _: system.open_own(name, system.OPEN_READ)) as file:
        return json.load(file)


def saved_states(folder: str, strict: bool = False) -> list[State]:
    """The states in state.json, the last copy's first. strict: raise if it is missing or
    damaged."""
    try:
        state: Any = read_json(state_path(folder))
        if state["format"] != 1:
            raise ValueError(f"format {state['format']!r:.100}, but this release reads 1")
        states = [state, *state.pop("older", [])]
        for one in states:
            counts(one)
            if not isinstance(one.get("parts", ""), str):
                raise ValueError(f"parts {one['parts']!r:.100}")
        return states
    except FileNotFoundError:
        if strict:
            raise MissingError(f"{folder} holds no copy made by save(): there is no state.json in it") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if strict:
            raise FormatError(f"{folder}/state.json: {error}; load another copy") from None
    return []


def is_same_copy(one: State, other: State) -> bool:
    """Whether two states of `save` are of files that hold the same."""
    return all(one.get(name) == other[name] for name in ("uuid", "max_size", "state"))


def write_json(path: str, value: object, model: os.stat_result | None) -> None:
    """Put a value into a file, whole and durable. model: whose mode and owner it gets."""
    fd, temp = system.temporary(path, model)
    try:
        try:
            system.write_all(fd, json.dumps(value).encode(), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        system.discard(temp)
        raise
    publish(temp, path)


def remove_leftovers(folder: str) -> None:
    """Remove what killed savers left, and older copies, while nobody saves or loads there."""
    system.remove_temporaries(os.path.join(folder, "buffer.h5.saved"))
    system.remove_temporaries(state_path(folder))
    states = saved_states(folder)
    named = {state.get("parts") for state in states}
    for name in os.listdir(folder):
        unknown = re.fullmatch("parts-[0-9a-f]{8}", name) and name not in named
        # A state.json that is damaged may name it.
        if unknown and (states or not os.path.lexists(state_path(folder))):
            system.remove_folder(os.path.join(folder, name))
