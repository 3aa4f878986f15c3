"""The files in a folder of parts: their names, and a copy on its way into the folder."""

from __future__ import annotations

import contextlib
import os
import re
import stat

from ..errors import FormatError
from . import locks, system
from .opening import Options, open_for_writing
from .reader import Reader
from .segment import is_undo_file, undo_files
from .writer import Writer

LOADING = ".loading"  # a complete copy on its way into the folder


def part_path(folder: str, number: int) -> str:
    """The file of a part."""
    return os.path.join(folder, f"part-{number:06d}.h5")


def parts_there(folder: str) -> int:
    """How many parts are in a folder. Raises FormatError unless they are regular files of numbers
    from 0 on; touches nothing."""
    return locks.try_again(FormatError, lambda: _count_parts(folder))  # a writer may make or remove parts while they are listed


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
    """Whether there is a folder under a name of ours. Raises FormatError for anything else
    there."""
    if not system.exists(path):
        return False
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise FormatError(f"{path} is no folder of ours; move it away, nothing was changed")
    return True


def is_loading(folder: str) -> bool:
    """Whether there is a copy on its way into a folder."""
    return own_folder(os.path.join(folder, LOADING))


def remove_points(path: str) -> None:
    """Remove the restore points of a part."""
    with contextlib.suppress(OSError):  # one that stays is not believed: it is of another file
        for _, name in undo_files(path):
            if is_undo_file(name):
                system.discard(name)


def open_part(path: str, number: int, first: Reader | Writer | None, options: Options | None) -> Reader | Writer:
    """Open a part; for reading, if there are no options. FormatError for one that is not that part
    of the buffer `first` belongs to."""
    if os.path.islink(path):
        raise FormatError(f"{path} is a link; a part is a file of its own: move it away, nothing was changed")
    store = Reader.open(path, name=path) if options is None else open_for_writing(path, options)
    t, wanted = store.layout, (first or store).layout
    same = all(getattr(t, name) == getattr(wanted, name) for name in ("kind", "uuid", "schema", "seed", "stream", "max_size"))
    if not same or t.params.get("first") != number * t.max_size:
        store.close()
        raise FormatError(f"{path} is not part {number} of this buffer, but {t.kind} {t.params} of another; put the right file there")
    return store


def finish_loading(folder: str, guard: bool = False) -> locks.Guard | None:
    """Move the parts of a copy that `load` made complete into place. Cut off anywhere, it can
    simply run again.

    guard: lock the first part itself, before it appears. Returns that lock.
    """
    fresh, held = os.path.join(folder, LOADING), None
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
        if system.exists(path):
            remove_points(part_path(folder, number))
            if guard and number == 0:
                held = locks.Guard(path)
            system.publish(path, part_path(folder, number), replace=True)
    for number in reversed(range(count, parts_there(folder))):
        remove_points(part_path(folder, number))
        os.unlink(part_path(folder, number))
    system.sync_folder(part_path(folder, 0))
    os.unlink(os.path.join(fresh, "count"))
    system.remove_folder(fresh)
    return held


def _loading_count(folder: str, fresh: str) -> int:
    """How many parts a load has, of which some are in place; 0 if none is under way. FormatError
    for a number that the parts belie.

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
