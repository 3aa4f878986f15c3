"""Making and opening the files of buffers for writing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..errors import LockedError
from . import locks, system
from .layout import HEADER_WORDS, HEADERS, Layout
from .mapping import Mapping, OpenFile, buffer_file, open_file
from .reader import Reader
from .state import State
from .writer import Writer


class Options(NamedTuple):
    """durable: commits survive a power cut. points: how many are kept. guard: lock the file.
    verify_always: hash every row at every read, not only at the first one."""

    durable: bool = False
    points: int = 2
    guard: bool | locks.Guard = False
    verify_always: bool = False


def _writer(file: OpenFile, layout: Layout, options: Options) -> Writer:
    return Writer(Mapping(file, layout, True, options.durable), options.points, options.verify_always)


def create_file(
    path: str | None,
    layout: Layout,
    pieces: Sequence[tuple[int, bytes]],
    options: Options = Options(),  # noqa: B008 - immutable
    *,
    replace: bool = False,
    fill: Callable[[Writer], None] | None = None,
    heir_of: Writer | None = None,
    model: os.stat_result | None = None,
) -> Writer:
    """Make a file, complete before it appears under its name, and open it for writing.

    fill: called with the writer before the file appears; the rows that it commits are there from
        the beginning.
    heir_of: a writer of the same state, whose restore points go on with the new file.
    model: whose mode and owner it gets; by default those of the file that it replaces.
    """
    with system.storage_errors(f"creating {path or 'a buffer in memory'} of {layout.file_size} bytes"):
        fd, temp = (system.memory_file("leanreplay", layout.file_size), "") if path is None else system.temporary(path, model)
        file, made = buffer_file(fd, path, True), None
        try:
            state = _write_empty(fd, layout, pieces, allocate=path is not None)
            made = _writer(file, layout, options)
            # There is nothing to read ahead, which the first writes would do otherwise: 2 ms for 8
            # MiB.
            system.advise(made.mapping.require_map(), "RANDOM", 0, layout.file_size)
            made.begin(state)
            made.points.attached = True  # undo files under this name belong to the file that is being replaced
            if fill is not None:
                fill(made)
            if heir_of is not None:
                heir_of.points.attach(heir_of.state)
                heir_of.points.close_tail(heir_of.state)
            if path is not None:
                os.fsync(fd)
                made.guard = locks.Guard(temp) if options.guard else None
                system.publish(temp, path, replace)
                made.mapping.watched = True
                system.sync_folder(path)
                if heir_of is None:
                    made.points.clear()
            if heir_of is not None:
                made.points.take_over(heir_of.points)
            return made
        except BaseException:
            if made is not None:
                if heir_of is not None:
                    made.give_away_points()
                made.close()
            file.close()
            if temp:
                system.discard(temp)
            raise


@system.storage_errors("opening a buffer")
def open_for_writing(path: str, options: Options = Options(), *, name: str | None = None) -> Writer:  # noqa: B008 - immutable
    """Map an existing file, and undo what a killed writer left. name: of the store, if another."""
    file, layout = open_file(path, name or path, writable=True)
    found = None
    try:
        with system.storage_errors(f"opening {path} for writing"):
            guard = options.guard if isinstance(options.guard, locks.Guard) else locks.Guard(path) if options.guard else None
        if guard is not None and guard.fd >= 0 and not os.path.samestat(os.fstat(guard.fd), os.fstat(file.fd)):
            raise LockedError(f"{path} was replaced while it was being opened; open it again")
        with system.storage_errors(f"opening {path} for writing"):
            system.allocate(file.fd, layout.file_size)  # a copy may have left holes
        found = _writer(file, layout, options)
        found.guard, found.mapping.watched = guard, True
        found.recover()
        return found
    except BaseException:
        if found is not None:
            found.close()
        file.close()
        raise


def _write_empty(fd: int, layout: Layout, pieces: Sequence[tuple[int, bytes]], allocate: bool) -> State:
    """Write a file that holds nothing: HDF5's structure, free rows, a header. Returns the header's
    state."""
    if allocate:
        system.allocate(fd, layout.file_size)
    at, size = layout.columns[-3]
    free = np.full(min(layout.max_size, 1 << 17), -1, np.int64)
    for start in range(0, layout.max_size, free.shape[0]):
        system.write_all(fd, free[: layout.max_size - start], at + start * size)
    for at, data in pieces:
        system.write_all(fd, data, at)
    state, block = State(), np.zeros(8 * HEADER_WORDS, np.uint8)
    state.tag = layout.tag
    state.seal(block, 0)
    system.write_all(fd, block, HEADERS[0])
    return state


def copy_to_memory(store: Reader | Writer, options: Options) -> Writer:
    """A copy of a file in memory."""
    file = buffer_file(system.memory_file("leanreplay", store.layout.file_size), None, True)
    try:
        store.mapping.copy_to(file.fd)
        made = _writer(file, store.layout, options)
        made.recover()
    except BaseException:
        file.close()
        raise
    return made
