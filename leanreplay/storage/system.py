"""The system calls behind a store: shared memory, maps, allocation, copies, names, durable syncs.

Where a platform lacks one, the nearest that keeps the guarantees stands in for it; each function
says which.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import glob
import mmap
import os
import re
import secrets
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator

import numpy as np

from ..arrays import BytesLike
from ..errors import ExistsError, FormatError, LeanReplayError, StorageError
from .layout import round_up

_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000  # Linux; not named by Python's mmap module before 3.13
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not named by Python's mmap module
_FICLONE = 0x40049409
_CHUNK = 64 << 20
LINUX = sys.platform == "linux"
HUGE_PAGE = 2 << 20
_ZEROS = bytes(2 * HUGE_PAGE)
# O_NONBLOCK: opening a pipe by mistake must be an error, not a hang. Regular files ignore it.
# O_NOFOLLOW: paths that users give are resolved before; a link under a name of ours is not ours.
NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
COMMON_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | NOFOLLOW
OPEN_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | COMMON_FLAGS
OPEN_WRITE = os.O_RDWR | COMMON_FLAGS
OPEN_READ = os.O_RDONLY | COMMON_FLAGS

forks = 0  # children that this process has forked so far
_forking = threading.RLock()


def _count_fork() -> None:
    global forks  # noqa: PLW0603
    forks += 1
    _forking.release()


if hasattr(os, "register_at_fork"):  # threads fork one after another, so that each child sees another number
    os.register_at_fork(before=_forking.acquire, after_in_parent=_count_fork, after_in_child=_forking.release)


@contextlib.contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn an OSError into a StorageError that says what was being done."""
    try:
        yield
    except LeanReplayError:
        raise
    except OSError as error:
        hint = {
            errno.ENOSPC: "free some space on that disk and try again",
            errno.EDQUOT: "raise the quota or free some space",
            errno.EROFS: "choose a writable folder, or open with mode='r'",
            errno.EACCES: "check the permissions, or open with mode='r'",
            errno.EPERM: "check the permissions, or open with mode='r'",
            errno.ENOMEM: "use a smaller max_size, or give a path: files may be larger than memory",
            errno.ENOENT: "create the folder first",
            errno.EEXIST: "move away what stands there",
        }.get(error.errno or 0, "see the system's message")
        raise StorageError(error.errno, f"{what}: {os.strerror(error.errno or 0)}; {hint}") from error


def memory_size() -> int:
    """Bytes of physical memory; 2**62 where that is not known."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**62


def waits_for_disk() -> int | None:
    """How often this process has waited for a page from a disk; None if unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def memory_file(name: str, size: int) -> int:
    """A descriptor of `size` zeros in shared memory, or in an unlinked temporary file."""
    if size > memory_size():
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
    else:  # macOS, Windows
        fd, path = tempfile.mkstemp(prefix="leanreplay-")
        with contextlib.suppress(OSError):
            os.unlink(path)
    try:
        os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd


def map_file(fd: int, size: int, writable: bool, name: str) -> mmap.mmap:
    """Map a file. The map needs no descriptor: `fd` may be closed, and on Linux, or from Python
    3.13 on, it keeps none of its own. It may be longer than `size`: what lies behind is nothing's.

    Raises StorageError where the system refuses.
    """
    try:
        return _map(fd, size, writable)
    except (OSError, ValueError, OverflowError) as error:
        number = getattr(error, "errno", None) or errno.EINVAL
        hint = "see the system's message"
        if number == errno.ENOMEM:  # it is not memory that lacks: a mapped file takes none
            hint = "a limit of this process is reached: raise it (ulimit -v, vm.max_map_count), or close other buffers"
        raise StorageError(number, f"mapping {size} bytes of {name}: {getattr(error, 'strerror', error)}; {hint}") from error


def _map(fd: int, size: int, writable: bool) -> mmap.mmap:
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
    if sys.version_info >= (3, 13) and os.name == "posix":
        return mmap.mmap(fd, size, access=access, trackfd=False)
    if LINUX and os.uname().machine in ("x86_64", "aarch64", "riscv64", "s390x"):  # where the numbers below mean what they say
        with contextlib.suppress(OSError):  # where memory is never overcommitted, a large file takes the other way
            return _map_over(fd, size, mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
    return mmap.mmap(fd, size, access=access)


def _map_over(fd: int, size: int, protection: int) -> mmap.mmap:
    """Map the file over untouched memory, as Python's mmap would duplicate its descriptor."""
    # Only from a multiple of a huge page on can a file be mapped by huge pages, which makes adding
    # three times as fast. Linux gives such a place to whole huge pages of memory. Older ones hand
    # out places downwards: something small, taken first, moves the next.
    length = size if size < HUGE_PAGE else round_up(size, HUGE_PAGE)
    view = _reserve(length, protection)
    place = np.frombuffer(view, np.uint8).ctypes.data
    if size >= HUGE_PAGE and place % HUGE_PAGE:
        view.close()
        spacer = _reserve(place % HUGE_PAGE, protection)
        view = _reserve(length, protection)
        spacer.close()
        place = np.frombuffer(view, np.uint8).ctypes.data
    if _libc_mmap()(place, size, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) != place:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return view


def _reserve(size: int, protection: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, prot=protection)


@functools.cache
def _libc_mmap() -> Callable[..., int | None]:
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    return function


def allocate(fd: int, size: int) -> None:
    """Reserve the file's blocks: else a full disk is a SIGBUS later, not an OSError now."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    if os.fstat(fd).st_size < size:
        os.ftruncate(fd, size)


def write_all(fd: int, data: BytesLike, at: int) -> None:
    """Write all of `data` (bytes-like) at an offset."""
    view = memoryview(data).cast("B")  # type: ignore[arg-type]  # of an array, type checkers know it from Python 3.12 on
    while view:
        if hasattr(os, "pwrite"):
            n = os.pwrite(fd, view[:_CHUNK], at)
        else:
            os.lseek(fd, at, os.SEEK_SET)
            n = os.write(fd, view[:_CHUNK])
        view, at = view[n:], at + n


def read_at(fd: int, n: int, at: int) -> bytes:
    """Up to n bytes from an offset."""
    if hasattr(os, "pread"):
        return os.pread(fd, n, at)
    os.lseek(fd, at, os.SEEK_SET)
    return os.read(fd, n)


def copy_file(source: int, target: int, size: int) -> str:
    """Copy `size` bytes between descriptors: shared blocks where the file system can, else in the
    kernel, else by hand.

    Returns which: "reflink", "copy_file_range" or "copy".
    """
    if sys.platform == "linux":
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.ioctl(target, _FICLONE, source)
            return "reflink"
    if hasattr(os, "copy_file_range"):
        done = 0
        with contextlib.suppress(OSError):
            while done < size:
                n = os.copy_file_range(source, target, min(_CHUNK, size - done), done, done)
                if n == 0:
                    break
                done += n
        if done == size:
            return "copy_file_range"
    done = 0
    while done < size:
        data = read_at(source, min(4 << 20, size - done), done)
        if not data:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write_all(target, data, done)
        done += len(data)
    return "copy"


def sync(fd: int, view: mmap.mmap | None) -> None:
    """Make the file's bytes durable. Only on Linux does that cover mapped pages."""
    with storage_errors("making a commit durable"):
        if sys.platform == "linux":
            os.fdatasync(fd)
            return
        if view is not None:
            view.flush()
        os.fsync(fd)


def sync_folder(path: str, strict: bool = False) -> None:
    """Make a new, renamed or removed name durable, where a folder can be opened. strict: a failing
    device is a StorageError.

    Not strict is for after the step that counts: what is done must not look as if it were not.
    """
    try:
        fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if strict and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            with storage_errors(f"making the names beside {path} durable"):
                raise
    finally:
        os.close(fd)


def make_folders(path: str) -> None:
    """Make a folder, and those above it that are missing, each durable under its name."""
    missing, above = [], os.path.abspath(path)
    while not os.path.isdir(above) and os.path.dirname(above) != above:
        missing.append(above)
        above = os.path.dirname(above)
    os.makedirs(path, exist_ok=True)
    for folder in reversed(missing):
        sync_folder(folder)


def write_zeros(fd: int, start: int, stop: int) -> None:
    """Write zeros to a part of a file, cut at huge pages."""
    at = start
    while at < stop:
        end = min(stop, at - at % HUGE_PAGE + len(_ZEROS))
        write_all(fd, memoryview(_ZEROS)[: end - at], at)
        at = end


def populate(view: mmap.mmap, start: int, stop: int) -> None:
    """Fault in pages for writing, all at once: half the cost of one fault a page."""
    start -= start % mmap.PAGESIZE
    if sys.platform == "linux":
        with contextlib.suppress(OSError, ValueError):
            view.madvise(_MADV_POPULATE_WRITE, start, stop - start)


def advise(view: mmap.mmap, advice: str, start: int, stop: int) -> None:
    """madvise with MADV_<advice> on bytes of a map. Does nothing where there is no such advice."""
    option = getattr(mmap, f"MADV_{advice}", None)
    if option is not None and start < stop:
        start -= start % mmap.PAGESIZE
        with contextlib.suppress(OSError, ValueError):
            view.madvise(option, start, stop - start)


def exists(path: str) -> bool:
    """Whether anything stands under a name. StorageError where that cannot be known."""
    try:
        with storage_errors(f"looking for {path}"):
            os.lstat(path)
    except StorageError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise
        return False
    return True


def status(path: str) -> os.stat_result | None:
    """What stands under a name, links not followed; None for nothing."""
    try:
        return os.lstat(path)
    except OSError:
        return None


def refuse_alien(path: str) -> None:
    """Raise FormatError for what is no regular file under a name of ours."""
    found = status(path)
    if found is not None and not stat.S_ISREG(found.st_mode):
        what = next((name for is_it, name in _ALIENS if is_it(found.st_mode)), "a device")
        raise FormatError(f"{path}: no regular file but {what}, which leanreplay did not make; move it away, or use another path")


_ALIENS = ((stat.S_ISLNK, "a symbolic link"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))


def open_own(path: str, flags: int) -> int:
    """Open a file under a name of ours. Raises FormatError for what is no regular file."""
    refuse_alien(path)
    fd = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):  # it has just come
            refuse_alien(path)
        return fd
    except BaseException:
        os.close(fd)
        raise


def create(path: str, model: os.stat_result | None) -> int:
    """Make a file, from the beginning with mode and owner of another one, if given."""
    fd = os.open(path, OPEN_NEW, 0o666 if model is None else 0o600)
    if model is not None and hasattr(os, "fchown"):
        mode = model.st_mode & 0o777 | 0o600  # its owner is to write to it
        with contextlib.suppress(OSError):  # the user's own owner is the best that most users can give
            mine = os.fstat(fd)
            if mine.st_gid != model.st_gid:
                try:
                    os.fchown(fd, -1, model.st_gid)
                except OSError:
                    mode = mode & 0o707 | (mode & 0o007) << 3  # another group: it gets what all others get
            os.fchmod(fd, mode)
            if mine.st_uid != model.st_uid:
                os.fchown(fd, model.st_uid, -1)
    return fd


def temporary(path: str, model: os.stat_result | None = None) -> tuple[int, str]:
    """A new file beside `path`, to be renamed; with mode and owner of `model`, or its own."""
    folder, name = os.path.split(os.path.abspath(path))
    temp = os.path.join(folder, f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    return create(temp, model or status(path)), temp


def remove_temporaries(path: str) -> None:
    """Remove what killed creators of `path` left. Call it with the lock held."""
    folder, name = os.path.split(os.path.abspath(path))
    for temp in glob.glob(os.path.join(glob.escape(folder), f".{glob.escape(name)}.*-*.tmp")):
        rest = os.path.basename(temp)[len(name) + 2 :]
        with contextlib.suppress(OSError):
            if re.fullmatch(r"\d+-[0-9a-f]{8}\.tmp", rest) and stat.S_ISREG(os.lstat(temp).st_mode):
                os.unlink(temp)


def remove_folder(path: str) -> None:
    """Remove a folder of parts, as far as that can be. What is not ours stays."""
    found = status(path)
    if found is None or not stat.S_ISDIR(found.st_mode):
        return
    with contextlib.suppress(OSError):
        for entry in os.scandir(path):
            if re.fullmatch(r"\.?parts?(-\d{6,}\.h5)?(\..+)?|count", entry.name) and entry.is_file(follow_symlinks=False):
                discard(entry.path)
        os.rmdir(path)


def discard(temp: str) -> None:
    """Remove a temporary file after an error, as far as that can be."""
    with contextlib.suppress(OSError):
        os.unlink(temp)


def publish(temp: str, path: str, replace: bool) -> None:
    """Give a complete file its name. Without `replace`, of two creators one wins."""
    if replace:
        refuse_alien(path)
        os.replace(temp, path)
    else:
        try:
            os.link(temp, path)
        except FileExistsError:
            raise ExistsError(f"{path} exists; open it with mode='r+' or 'a', or replace it with mode='w'") from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            # A file system without hard links: claim the name with an empty file, then rename over
            # it.
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                raise ExistsError(f"{path} exists; open it with mode='r+' or 'a', or replace it with mode='w'") from None
            os.replace(temp, path)
            return
        discard(temp)
