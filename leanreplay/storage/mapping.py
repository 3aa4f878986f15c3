"""One file of a buffer, mapped: its bytes, its name, and whether it still stands there.

No view of the map leaves `storage`, except read-only ones for policies: closing a map under a live
view would crash Python.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import time
from collections.abc import Iterator

import numpy as np

from ..arrays import NO_ROWS, Bytes, Ints, Words
from ..errors import FormatError, LeanReplayError, MissingError, ModeError
from . import system
from .layout import Layout, decode

LOOK = 2e-4  # seconds from one look at the name of the file that is written to until the next one, unless the file itself says more


class OpenFile:
    """One very file: by its descriptor, or, once that is released, by its name and inode. fd -1: of
    memory that needs none.

    gone, text: the error where another file, or none, stands under the name.
    """

    def __init__(self, fd: int, path: str | None, flags: int, gone: type[LeanReplayError], text: str) -> None:
        self.fd, self.path = fd, path
        self._flags, self._gone, self._text = flags, gone, text
        self.inode = os.fstat(fd).st_ino if fd >= 0 else 0

    @contextlib.contextmanager
    def descriptor(self) -> Iterator[int]:
        """A descriptor of the file, for the time of a block."""
        if self.fd >= 0:
            yield self.fd
            return
        assert self.path is not None
        fd = -1
        try:
            with system.storage_errors(f"opening {self.path} again"), contextlib.suppress(FileNotFoundError):
                fd = os.open(self.path, self._flags)
            if fd < 0 or os.fstat(fd).st_ino != self.inode:
                raise self._gone(f"{self.path}: {self._text}")
            yield fd
        finally:
            if fd >= 0:
                os.close(fd)

    def stands(self) -> bool:
        """Whether this very file still stands under its name."""
        return self.inode_there() == self.inode

    def inode_there(self) -> int | None:
        """Inode of what stands under the name now; None for nothing."""
        try:
            return None if self.path is None else os.stat(self.path).st_ino
        except OSError:
            return None

    def close(self) -> None:
        """Close the descriptor. What needs one later opens the file again for a moment."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def buffer_file(fd: int, path: str | None, writable: bool) -> OpenFile:
    """The file of a buffer, which owns its descriptor from here on. path: its name."""
    gone = "the file of this buffer is gone from under this name; put it back, or open the buffer again"
    try:
        with system.storage_errors(f"opening {path or 'a buffer in memory'}"):
            return OpenFile(fd, path, system.OPEN_WRITE if writable else system.OPEN_READ, ModeError, gone)
    except BaseException:
        os.close(fd)
        raise


def open_file(path: str, name: str | None, writable: bool) -> tuple[OpenFile, Layout]:
    """The file of a buffer, opened, and its layout. name: what it is called; None if `path` is a
    link to shared memory."""
    flags = system.OPEN_WRITE if writable else system.OPEN_READ
    try:
        fd = os.open(path, flags & ~system.NOFOLLOW) if name is None else system.open_own(path, flags)
    except FileNotFoundError:
        raise MissingError(f"{path} does not exist; create it with mode='x' or 'a'") from None
    except OSError as error:
        with system.storage_errors(f"opening {path}"):
            raise error
    try:
        with system.storage_errors(f"reading {path}"):
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise FormatError(f"{path}: no regular file")
            layout = decode(lambda at, n: system.read_at(fd, n, at), found.st_size, path)
    except BaseException:
        os.close(fd)
        raise
    return buffer_file(fd, name, writable), layout


def read_layout(path: str) -> Layout:
    """The layout of a buffer's file."""
    file, layout = open_file(path, path, False)
    file.close()
    return layout


class Mapping:
    """The map of a file, or of shared memory (path None), and what identifies the file. It closes
    both when it is forgotten.

    mem: all bytes; view: the same, read-only (kernels that read get read-only arrays, so each
        compiles once).
    positions, tags: these columns. watched: a writer's file, which must stay under its name.
    """

    def __init__(self, file: OpenFile, layout: Layout, writable: bool, durable: bool = False) -> None:
        self.map: mmap.mmap | None = None
        self.file, self.path, self.layout, self.durable, self.watched = file, file.path, layout, durable, False
        path = self.path
        self.name = path or "this buffer"
        part = path is not None and layout.params.get("first")
        self.guarded = os.path.join(os.path.dirname(str(path)), "part-000000.h5") if part else path  # the file that has the writer's lock
        self._stood = os.fstat(file.fd)  # when the file was last seen under its name
        self._look = 0.0  # when to look again, at the latest
        self.map = system.map_file(file.fd, layout.file_size, writable, path or "a buffer in memory")
        self.mem: Bytes = np.frombuffer(self.map, np.uint8, layout.file_size)
        self.view: Bytes = self.mem.view()
        self.view.flags.writeable = False
        self.cols: Words = np.array(layout.columns, np.uint64)
        self.positions, self.tags = (self.mem[at : at + 8 * layout.max_size].view(np.int64) for at, _ in layout.columns[-3:-1])

    def require_map(self) -> mmap.mmap:
        """The map. Raises ModeError if it is closed."""
        if self.map is None:
            raise ModeError("the buffer is closed; open it again with leanreplay.open(path)")
        return self.map

    def close(self) -> None:
        """Unmap and close."""
        view, self.map = self.map, None
        if view is None:
            return
        self.mem = self.view = np.zeros(0, np.uint8)
        self.positions = self.tags = NO_ROWS
        with contextlib.suppress(BufferError):  # a policy kept a view: the map lives until that is gone
            view.close()
        self.file.close()

    def __del__(self) -> None:
        # A reader drops a file that was replaced; a read of it further up, within which a signal
        # handler came, keeps it open.
        try:  # noqa: SIM105 - when the interpreter ends, contextlib may be empty already
            self.close()
        except Exception:
            pass

    def index(self, high: int) -> tuple[Ints, Ints]:
        """Read-only views of position and tag of the rows below `high`."""
        (p, _), (t, _) = self.layout.columns[-3:-1]
        return self.view[p : p + 8 * high].view(np.int64), self.view[t : t + 8 * high].view(np.int64)

    def sync(self) -> None:
        """Make the file's bytes durable. Memory has nothing to sync."""
        if self.path is not None:
            with self.file.descriptor() as fd:
                system.sync(fd, self.map)

    def barrier(self) -> None:
        """Where every commit is durable: put what was written on the disk before going on."""
        if self.durable:
            self.sync()

    def copy_to(self, fd: int) -> None:
        """Copy all bytes to another file, and what HDF5 tools have added behind them."""
        if self.path is None or (self.file.fd < 0 and not self.file.stands()):
            system.write_all(fd, self.view, 0)
            return
        with self.file.descriptor() as source:
            system.copy_file(source, fd, max(self.layout.file_size, os.fstat(source).st_size))

    @property
    def link(self) -> str:
        """A path by which another process can open shared memory, while this one lives."""
        if not system.LINUX:
            raise ModeError("a buffer in memory can be sent to another process on Linux only; give it a path, or fork")
        return f"/proc/{os.getpid()}/fd/{self.file.fd}"

    @property
    def status(self) -> os.stat_result | None:
        """Mode and owner for other files of the same buffer; None in memory."""
        if self.path is None:
            return None
        found = os.fstat(self.file.fd) if self.file.fd >= 0 else system.status(self.path)
        return found if found is not None and found.st_ino == self.file.inode else self._stood

    def stands(self) -> bool:
        """Whether this very file still stands under its name; memory does always."""
        return self.path is None or self.file.stands()

    def stay(self, seen: int) -> None:
        """For a writer: raise MissingError if its file stands under its name no more. seen: what
        the message tells.

        The descriptor says most of it, at a third of the cost: a name that comes or goes changes
        the time of the file's last change. The name itself is looked up when that happened, and
        some time after the last look, as a folder above may have another name by then.
        """
        if not self.watched:
            return
        now, found, stands, fd = time.perf_counter(), self._stood, False, self.file.fd
        try:
            if now < self._look and fd >= 0:
                found = os.fstat(fd)
                if found.st_ctime_ns == self._stood.st_ctime_ns and found.st_nlink == self._stood.st_nlink:
                    return
            there = os.stat(str(self.path))
            stands = there.st_ino == self.file.inode or (fd >= 0 and os.path.samestat(there, os.fstat(fd)))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            with system.storage_errors(f"looking at {self.path}"):
                raise error
        if not stands:
            raise MissingError(
                f"{self.path}: the file that this buffer writes to stands there no more: it was removed or renamed, or another one took "
                f"its place; nothing was written. All that was added before (seen={seen}) is still in this buffer while it is open: "
                "save(folder) keeps it; or give the file its name back"
            )
        self._stood, self._look = found, now + LOOK
