"""Who may write: the locks of files and folders, and how long a reader waits for a writer.

Where a platform has no such locks, they keep nobody out.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TypeVar

from ..errors import FormatError, LockedError, StorageError
from . import system

_LOOKS = 20  # at a folder that a writer may be changing
PATIENCE = 1.0  # seconds that a reader waits for a change to end


def lock(path: str, model: os.stat_result | None = None) -> int:
    """Take the writer's lock of a name: a descriptor of `path`.lock, a file that is never removed.
    Raises LockedError if taken.

    model: mode and owner of the lock file, if it has to be made.
    """
    name = path + ".lock"
    try:
        fd = system.open_own(name, system.OPEN_WRITE)
    except FileNotFoundError:
        try:
            fd = system.create(name, model)
        except FileExistsError:  # another writer was faster
            fd = system.open_own(name, system.OPEN_WRITE)
    try:
        if os.fstat(fd).st_size:
            raise FormatError(f"{name} is no lock file of leanreplay: it holds something; move it away, or use another path")
        if not _flock(fd, path, f"lock file {name}"):
            raise StorageError(
                errno.ENOLCK,
                f"{path}: this file system has no locks; give lock=False to go on without, and see to it that there is one writer",
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def _flock(fd: int, path: str, what: str, shared: bool = False) -> bool:
    """Lock a descriptor; False where there are no locks. shared: only keep writers away."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return True
    except OSError as error:
        return _no_lock(error, path, what)


def _no_lock(error: OSError, path: str, what: str) -> bool:
    """False if an error says that there are no locks here; LockedError if one is taken."""
    if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
        raise LockedError(f"{path} is open for writing elsewhere ({what}); close that writer, or read with mode='r'") from None
    if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
        return False
    raise error


class Guard:
    """The writer's lock of a file itself, whatever names it has; it ends when this is closed or
    forgotten.

    It belongs to an open file description of its own (Linux), so a forked child ends its share by
    closing that, and no other close in this process does. It lies on a byte far beyond the end,
    where HDF5's flock does not see it. Where there are no such locks it keeps nobody out.
    """

    def __init__(self, path: str, shared: bool = False) -> None:
        """Raises LockedError if the file has a writer. shared: only keep writers away."""
        self.fd = -1
        self.fd = system.open_own(path, system.OPEN_READ if shared else system.OPEN_WRITE)
        try:
            if not self._lock(path, shared):
                self.close()
            elif not shared:
                _GUARDS.add(self)
        except BaseException:
            self.close()
            raise

    def _lock(self, path: str, shared: bool) -> bool:
        if not system.LINUX or sys.maxsize < 2**32:
            return False
        import fcntl

        if not hasattr(fcntl, "F_OFD_SETLK"):
            return False
        kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, 2**62, 1, 0))
        except OSError as error:
            return _no_lock(error, path, "by another name, or its lock file was removed")
        if not shared:  # a network file system may take both kinds of locks for one, and HDF5's readers come first
            other = os.open(path, system.OPEN_READ)
            try:
                fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return False
            finally:
                os.close(other)
        return True

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        try:  # noqa: SIM105 - when the interpreter ends, contextlib may be empty already, and os too
            self.close()
        except Exception:
            pass


_GUARDS: weakref.WeakSet[Guard] = weakref.WeakSet()


def _after_fork() -> None:
    """In a forked child: the parent's locks are not its own."""
    for guard in list(_GUARDS):
        guard.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def has_writer(path: str) -> bool:
    """Whether another process writes to a file. False if unknown; asking disturbs nobody."""
    if not system.LINUX or sys.maxsize < 2**32:
        return False
    import fcntl

    try:
        fd = os.open(path, system.OPEN_READ)
    except OSError:
        return False
    try:
        question = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 2**62, 1, 0)
        answer = struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question))
        mine = any(guard.fd >= 0 and os.path.sameopenfile(guard.fd, fd) for guard in list(_GUARDS))  # that would be to wait for oneself
        return bool(answer[0] != fcntl.F_UNLCK) and not mine
    except OSError:
        return False
    finally:
        os.close(fd)


class Patience:
    """How long a reader waits for a change of a file to end: PATIENCE, and on as long as the writer
    lives, however slow its disk is."""

    def __init__(self, path: str | None) -> None:
        self.path, self._until = path, time.monotonic() + PATIENCE

    def over(self) -> bool:
        """Whether it makes no sense to go on waiting."""
        if time.monotonic() <= self._until:
            return False
        if self.path is None or not has_writer(self.path):
            return True
        self._until = time.monotonic() + min(PATIENCE, 0.1)
        return False


@contextlib.contextmanager
def replacing(path: str, name: str | None) -> Iterator[None]:
    """While a file is replaced that may be another buffer's: keep writers away from it. Raises
    LockedError if it has one.

    name: look at this name's lock too, if there is one.
    """
    with contextlib.ExitStack() as held:
        with system.storage_errors(f"replacing {path}"):
            system.refuse_alien(path)
            if name is not None and os.path.lexists(name + ".lock"):
                fd = system.open_own(name + ".lock", system.OPEN_READ)
                held.callback(os.close, fd)
                _flock(fd, path, f"lock file {name}.lock", shared=True)
            with contextlib.suppress(FileNotFoundError, PermissionError):
                held.callback(Guard(path, shared=True).close)
        yield


T = TypeVar("T")


def try_again(error: type[Exception], look: Callable[[], T]) -> T:
    """What `look` finds. It tries again after an error, as a writer may be at work."""
    for _ in range(_LOOKS):
        with contextlib.suppress(error):
            return look()
        time.sleep(0.001)
    return look()


class Users:
    """Those who use a folder share a lock on it: who is alone can clear up."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def lock(self, how: str) -> bool | None:
        """Take the lock "SH" or "EX", or end it, "UN". False: another has it; None: no locks."""
        try:
            import fcntl

            fcntl.flock(self._fd, getattr(fcntl, f"LOCK_{how}") | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except (ImportError, OSError):
            return None
        return True

    def alone(self, clear: Callable[[], None]) -> None:
        """Call a function, whose failures do not matter, unless others use the folder."""
        if self._fd >= 0 and self.lock("EX"):
            with contextlib.suppress(OSError):
                clear()
            self.lock("SH")


@contextlib.contextmanager
def users_of(folder: str) -> Iterator[Users]:
    """Be one of those who use a folder, for the time of a block."""
    try:
        fd = os.open(folder, os.O_RDONLY | system.COMMON_FLAGS & ~system.NOFOLLOW)  # the user's own name for it, which may be a link
    except OSError:  # Windows
        fd = -1
    users = Users(fd)
    try:
        deadline = time.monotonic() + 1.0
        while fd >= 0 and users.lock("SH") is False and time.monotonic() < deadline:
            time.sleep(0.01)  # another is clearing up
        yield users
    finally:
        if fd >= 0:
            users.lock("UN")  # a child forked meanwhile has the descriptor too
            os.close(fd)
