"""One mapped file (or piece of shared memory): create, open, read, commit, roll back, recover, check.

A commit goes journal, seal, rows, index, header: steps with a fence between, or a kernel call each, because otherwise the compiler
reorders and drops stores. Whatever stops it, `recover` brings the rows back to what the newest header says. No view of
the map leaves this file except read-only ones for policies: callers get copies.
"""

from __future__ import annotations

import contextlib
import functools
import io
import mmap
import os
import stat
import sys
import time
import types
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from ..arrays import NO_LOG, NO_ROWS, POLICY_WORDS, Bytes, Ints, Words
from ..errors import CorruptionError, FormatError, LockedError, MissingError, ModeError, RecoveryError, RowError, StateError, StorageError
from ..kernels import rows as kernel
from ..kernels.hashing import GOLDEN
from ..keys import STREAM_BITS
from ..samples.schema import Schema
from . import system
from .create import hash_structure
from .layout import (
    BUCKETS,
    H_DIGESTS,
    H_HIGH,
    H_LOG,
    H_LOG_HASH,
    H_POLICY,
    H_PREVIOUS,
    H_SEEN,
    H_SEQ,
    H_SIZE,
    H_STATE,
    H_TAG,
    H_TARGET,
    HEADER_WORDS,
    HEADERS,
    J_COUNT,
    J_FREED,
    J_HASH,
    J_LIVE,
    J_PREVIOUS,
    J_SEQ,
    J_TAG,
    SEAL_WORDS,
    Table,
    decode,
    header_problem,
    round_up,
)
from .restore_points import Frame, Segment, UndoLog

_NO_DATA: list[Bytes] = [np.zeros(0, np.uint8)] * 4
_NOBODY: npt.NDArray[np.int32] = np.zeros(0, np.int32)
_AHEAD = 4 << 20  # bytes to fault in ahead of the rows being filled
_PATIENCE = 1.0  # seconds that a reader waits for a commit to end
_LOOK = 2e-4  # seconds from one look at the name of the file that is written to until the next one, unless the file itself says more
_NEVER = float("inf")
_SURVIVOR_BYTES = 8 << 20  # of samples loaded for one commit
_NO_LIMIT = 2**40
_CHUNK = 4096
_PIECE = 1 << 18  # rows of the index that are looked at together
_SORTED = 1 << 20  # positions that are sorted together
_LARGE = 512  # bytes of an entry from which on reading ahead of a random one is a waste
_COLD, _WARM = 20e-6, 4e-6  # seconds a row: reads that take longer may have come from the device, ones that do not came from memory
_WARM_READS = 16
_NARROW = 64  # bytes of a field that is read once, when a file is opened for writing, to verify the index with it
_AT_ONCE = True  # whether a commit without anything special is one kernel call; tests that stop within one want the steps
_GONE = 2**63  # target word of shared memory that resize has replaced

_STORES: weakref.WeakSet[Store]

_Arrangement = tuple[tuple[int, int, int, int], Ints, list[tuple[tuple[int, ...], np.dtype[Any], int]], int]
Source = tuple[Bytes, Ints]  # bytes of samples, and which of them each row takes


Sources = Sequence[Source]  # one per field


class MetadataUpdate(NamedTuple):
    """Live rows that keep their samples, but for some fields. sources: by field, (bytes, samples) with samples[i] for rows[i]."""

    rows: Ints
    sources: Mapping[int, Source]


class Change(NamedTuple):
    """One commit. All its rows are distinct, and no more than the journal holds.

    seen, policy: samples seen, and the policy's words, after it.
    rows: rows[i] gets sample samples[i] of every source, positions[i] and tags[i].
    sources: one for every field; or a function that returns those of rows[start:stop]. The commit calls it for one piece after the
        other, so that not all of them are in memory at once.
    freed: live rows that become free. log: (k, 2), entries to append to the policy's log.
    after: samples seen when this was planned; the commit raises ModeError if it is not so any more.
    """

    seen: int
    policy: Sequence[int]
    rows: Ints = NO_ROWS
    positions: Ints = NO_ROWS
    tags: Ints = NO_ROWS
    sources: Sources | Callable[[int, int], Sources] = ()
    freed: Ints = NO_ROWS
    log: Ints = NO_LOG
    update: MetadataUpdate | None = None
    after: int | None = None


class PlannedBatch(NamedTuple):
    """A plan whose samples are all in memory.

    after: samples seen before. policy: the policy's words afterwards.
    rows: the row that sample i takes, or -1; the later of two that take the same one stays. At most `max_rows` rows are taken.
    Sample i has stream position start + i, and is number first + i in tags and data (one array of bytes per field).
    """

    after: int
    policy: Sequence[int]
    rows: Ints
    start: int
    tags: Ints
    first: int
    data: Sequence[Bytes]
    max_rows: int


class Survivors(NamedTuple):
    """The last sample of a plan for each row that is taken.

    n: their number; -1 if a row is outside the buffer; -2 if a freed one is not live, or is taken, or freed twice.
    """

    n: int
    rows: Ints
    samples: Ints
    positions: Ints


@dataclass(frozen=True)
class Problem:
    """Something `check` found. rows: the rows it is about, all of them."""

    what: str
    rows: tuple[int, ...] = ()

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.rows[:10])) + (", ..." if len(self.rows) > 10 else "")
        return f"{self.what}: rows {shown}" if self.rows else self.what


def _open_file(path: str, writable: bool, follow: bool = False) -> tuple[int, Table]:
    """A descriptor of a buffer's file, and its table. follow: it is a link, to shared memory."""
    flags = system.OPEN_WRITE if writable else system.OPEN_READ
    try:
        fd = os.open(path, flags & ~system.NOFOLLOW) if follow else system.open_own(path, flags)
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
            return fd, decode(lambda at, n: system.read_at(fd, n, at), found.st_size, path)
    except BaseException:
        os.close(fd)
        raise


def read_table(path: str) -> Table:
    """The table of a buffer's file."""
    fd, table = _open_file(path, False)
    os.close(fd)
    return table


class Store:
    """A mapped buffer file. Made by `Store.create` and `Store.open`; not part of the public interface."""

    def __init__(self, path: str | None, fd: int, table: Table, writable: bool, durable: bool, points: int) -> None:
        self.path, self.table, self.writable, self.durable = path, table, writable, durable
        self._fd = fd
        self._guard: system.Guard | None = None
        part = path is not None and table.params.get("first")
        self.guarded = os.path.join(os.path.dirname(str(path)), "part-000000.h5") if part else path  # the file that has the writer's lock
        self._stood = os.fstat(fd)  # when the file was last seen under its name
        self._look = _NEVER  # when to look again, at the latest; only a writer's file that has its name must stay under it
        self._inode = self._stood.st_ino
        self._map: mmap.mmap | None = system.map_file(fd, table.file_size, writable, path or "a buffer in memory")
        self._mem: Bytes = np.frombuffer(self._map, np.uint8, table.file_size)
        self._view: Bytes = self._mem.view()  # kernels that read get read-only arrays, so each compiles once
        self._view.flags.writeable = False
        self._cols = np.array(table.columns, np.uint64)
        (p, _), (g, _) = table.columns[-3:-1]
        self._positions = self._mem[p : p + 8 * table.max_size].view(np.int64)
        self._groups = self._mem[g : g + 8 * table.max_size].view(np.int64)
        self._fields = len(table.schema.fields)
        # Headers in force and to come: through a memoryview a single word comes and goes as an int at a sixth of the cost. A reader never
        # changes them, it puts others in their place: what is being read when a signal handler reads, too, stays as it is.
        self._now, self._next = (np.zeros(HEADER_WORDS, np.uint64).data for _ in range(2))
        self._seal: Words = np.zeros(SEAL_WORDS, np.uint64)  # of the commit that is being made
        self._seal_words = self._seal.data
        self._tag = int(table.tag)
        self._journal = (table.list_at, table.record_at, table.record)
        self._layout: Ints = np.array([*self._journal, table.journal, J_LIVE, J_COUNT, J_HASH, H_SIZE, H_HIGH, H_STATE, H_DIGESTS, BUCKETS])
        self._row_bytes = sum(size for _, size in table.columns)
        self._counts: Ints = np.zeros(4, np.int64)
        self._changing: Bytes = np.zeros(self._fields, np.uint8)
        self._policy: list[int] = [-1]  # the policy's words in self.head
        self._settled = False
        self._checked = False
        self._stamps: npt.NDArray[np.int32] = _NOBODY
        self._stamp = 1
        self._journal_ready = 0  # records of the journal whose pages are there for writing
        self._faulted = 0  # rows whose pages are there for writing
        self._written = [0] * len(table.columns)  # file offset up to which a column has been written with zeros ahead
        self._live_rows: tuple[int, Ints] | None = None
        self._known = b""  # the headers as a reader last found them, both valid
        self._log = UndoLog(path, table, points)
        self._large = [(at, size) for at, size in table.columns[: self._fields] if size >= _LARGE]
        self._cold = 0  # reads that are still to be advised
        self._waits = system.waits_for_disk()  # by the last slow read
        if path is not None:
            for at, size in self._large:
                system.advise(self._map, "RANDOM", at, at + size * table.max_size)
            # Nobody reads the journal but after a kill; reading ahead would make its first write wait.
            system.advise(self._map, "RANDOM", table.list_at, table.record_at + table.journal_rows * table.record)
        self._attached = False
        self._synced = False  # whether all that the restore points need is on the disk, if every commit is
        self._arrangement = self._arrange(0, 0, 0, 0)  # the last one, as many batches are alike
        limit = max(1, min(table.journal_rows, _SURVIVOR_BYTES // self._row_bytes))
        # How many samples of one commit may take a row. If all rows fit into the journal, rows may be taken again and again.
        self.most = limit if limit < table.max_size else _NO_LIMIT
        _STORES.add(self)
        self._made = True

    # -- making and opening ------------------------------------------------------------------------------------------

    @staticmethod
    def create(
        path: str | None,
        table: Table,
        pieces: Sequence[tuple[int, bytes]],
        *,
        replace: bool = False,
        durable: bool = False,
        points: int = 2,
        fill: Any = None,
        heir_of: Store | None = None,
        model: os.stat_result | None = None,
        guard: bool = False,
    ) -> Store:
        """Make a file, complete before it appears under its name, and open it for writing.

        fill: called with the store before it appears; the rows that it commits are there from the beginning.
        heir_of: a store of the same state, whose restore points go on with the new file.
        model: whose mode and owner it gets; by default those of the file that it replaces.
        guard: lock the file itself, before it appears.
        """
        with system.storage_errors(f"creating {path or 'a buffer in memory'} of {table.file_size} bytes"):
            fd, temp = (system.memory_file("leanreplay", table.file_size), "") if path is None else system.temporary(path, model)
            store = None
            try:
                if path is not None:
                    system.allocate(fd, table.file_size)
                at, size = table.columns[-3]
                free = np.full(min(table.max_size, 1 << 17), -1, np.int64)
                for start in range(0, table.max_size, free.shape[0]):
                    system.write_all(fd, free[: table.max_size - start], at + start * size)
                for at, data in pieces:
                    system.write_all(fd, data, at)
                head = np.zeros(HEADER_WORDS, np.uint64)
                head[H_TAG] = table.tag
                first = np.zeros(8 * HEADER_WORDS, np.uint8)
                kernel.seal_block(first, 0, head, H_STATE)
                system.write_all(fd, first, HEADERS[0])
                store = Store(path, fd, table, True, durable, points)
                # There is nothing to read ahead, which the first writes would do otherwise: 2 ms for 8 MiB.
                system.advise(store._require_map(), "RANDOM", 0, table.file_size)
                store._begin(head)
                store._attached = True  # undo files under this name belong to the file that is being replaced
                if fill is not None:
                    fill(store)
                if heir_of is not None:
                    heir_of._attach()
                    if heir_of._log.segments:
                        heir_of._log.close_tail(int(heir_of.head[H_STATE]))
                if path is not None:
                    os.fsync(fd)
                    store._guard = system.Guard(temp) if guard else None
                    system.publish(temp, path, replace)
                    store._look = 0.0
                    system.sync_folder(path)
                    if heir_of is None:
                        store._log.clear()
                if heir_of is not None:
                    store._log.take_over(heir_of._log)
                    store._stamps, store._stamp = heir_of._stamps, heir_of._stamp
                return store
            except BaseException:
                if store is not None:
                    if heir_of is not None:
                        store.give_away_points()
                    store.close()
                else:
                    os.close(fd)
                if temp:
                    with contextlib.suppress(OSError):
                        os.unlink(temp)
                raise

    def _begin(self, head: Words) -> None:
        """A file that was just made holds nothing: there is nothing to recover or to verify."""
        self.head[:] = head
        self._settled = self._checked = True

    @staticmethod
    @system.storage_errors("opening a buffer")
    def open(
        path: str, *, writable: bool, durable: bool = False, points: int = 2, name: str | None = None, guard: system.Guard | bool = False
    ) -> Store:
        """Map an existing file. For writing, what a killed writer left is undone.

        name: the path that the store goes by; None where `path` is a descriptor of shared memory.
        guard: lock the file itself; or the lock that this process has already.
        """
        fd, table = _open_file(path, writable, follow=name is None)
        store = None
        try:
            with system.storage_errors(f"opening {path} for writing"):
                held = guard if isinstance(guard, system.Guard) else system.Guard(path) if guard and writable else None
            if held is not None and held.fd >= 0 and not os.path.samestat(os.fstat(held.fd), os.fstat(fd)):
                raise LockedError(f"{path} was replaced while it was being opened; open it again")
            if writable:
                with system.storage_errors(f"opening {path} for writing"):
                    system.allocate(fd, table.file_size)  # a copy may have left holes
            store = Store(name, fd, table, writable, durable, points)
            store._guard = held
            if writable:
                store._look = 0.0
                store.recover()
            else:
                store.refresh()
            return store
        except BaseException:
            if store is not None:
                store.close()
            else:
                os.close(fd)
            raise

    def unguard(self) -> None:
        """End the lock of the file itself."""
        if self._guard is not None:
            self._guard.close()

    def close(self) -> None:
        """Unmap and close. Restore points in memory are lost."""
        if self._map is None:
            return
        if self.writable and not self._settled:
            self._refuse_within()
        self._log.forget()
        view, self._map = self._map, None
        self._mem = self._view = np.zeros(0, np.uint8)
        self._positions = self._groups = NO_ROWS
        with contextlib.suppress(BufferError):  # a policy kept a view: the map lives until that is gone
            view.close()
        if self._fd >= 0:
            os.close(self._fd)
        self.unguard()
        _STORES.discard(self)

    def release(self) -> None:
        """Keep no descriptor open from now on: the map needs none, and what does opens the file again for a moment."""
        self._log.release()
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    @contextlib.contextmanager
    def file(self) -> Iterator[int]:
        """A descriptor of the file, for the time of a block. Raises ModeError if that file no longer stands under its name."""
        if self._fd >= 0:
            yield self._fd
            return
        assert self.path is not None
        fd = -1
        try:
            same = False
            with system.storage_errors(f"opening {self.path} again"), contextlib.suppress(FileNotFoundError):
                fd = os.open(self.path, system.OPEN_WRITE if self.writable else system.OPEN_READ)
                same = os.fstat(fd).st_ino == self._inode
            if not same:
                raise ModeError(f"{self.path}: the file of this buffer is gone from under this name; put it back, or open the buffer again")
            yield fd
        finally:
            if fd >= 0:
                os.close(fd)

    def copy_to(self, fd: int) -> None:
        """Copy all bytes to another file, and what HDF5 tools have added behind them, which its superblock counts."""
        if self.path is None or (self._fd < 0 and not self.stands()):
            system.write_all(fd, self._view, 0)
            return
        with self.file() as source:
            system.copy_file(source, fd, max(self.table.file_size, os.fstat(source).st_size))

    def _sync(self) -> None:
        """Make the file's bytes durable."""
        if self.path is not None:
            with self.file() as fd:
                system.sync(fd, self._map)

    def become_reader(self) -> None:
        """In a forked child: never write, and do not keep the parent's descriptors of undo files."""
        self.writable = False
        self._log.forget()
        self.unguard()

    def __del__(self) -> None:
        # A reader drops a store whose file was replaced; a read of it further up, within which a signal handler came, keeps it open.
        try:  # when the interpreter ends, contextlib may be empty already
            if getattr(self, "_made", False):
                self.close()
        except Exception:
            pass

    @property
    def link(self) -> str:
        """A path by which another process on this machine can open shared memory, while this one lives."""
        if not system.LINUX:
            raise ModeError("a buffer in memory can be sent to another process on Linux only; give it a path, or fork")
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    @property
    def status(self) -> os.stat_result | None:
        """Mode and owner for other files of the same buffer; None in memory."""
        if self.path is None:
            return None
        found = os.fstat(self._fd) if self._fd >= 0 else system.status(self.path)
        return found if found is not None and found.st_ino == self._inode else self._stood

    def _inode_there(self) -> int | None:
        """Inode of what stands under the name now; None if nothing does, or if there is no name."""
        if self.path is None:
            return None
        try:
            return os.stat(self.path).st_ino
        except OSError:
            return None

    def moved(self) -> bool:
        """Whether another file stands under the name by now."""
        if self.path is None:
            return int(self.head[H_TARGET]) == _GONE
        return self._inode_there() not in (None, self._inode)

    def stay(self) -> None:
        """For a writer: raise MissingError if its file stands under its name no more.

        The descriptor says most of it, at a third of the cost: a name that comes or goes changes the time of the file's last change. The
        name itself is looked up when that happened, and some time after the last look, for then a folder above may have another name.
        """
        if self._look is _NEVER:
            return
        now, found, stands = time.perf_counter(), self._stood, False
        try:
            if now < self._look and self._fd >= 0:
                found = os.fstat(self._fd)
                if found.st_ctime_ns == self._stood.st_ctime_ns and found.st_nlink == self._stood.st_nlink:
                    return
            there = os.stat(str(self.path))
            stands = there.st_ino == self._inode or (self._fd >= 0 and os.path.samestat(there, os.fstat(self._fd)))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            with system.storage_errors(f"looking at {self.path}"):
                raise error
        if not stands:
            raise MissingError(
                f"{self.path}: the file that this buffer writes to stands there no more: it was removed or renamed, or another one took "
                f"its place; nothing was written. All that was added before (seen={self.seen}) is still in this buffer while it is open: "
                "save(folder) keeps it; or give the file its name back"
            )
        self._stood, self._look = found, now + _LOOK

    def stands(self) -> bool:
        """Whether this very file still stands under its name."""
        return self.path is None or self._inode_there() == self._inode

    # -- state -------------------------------------------------------------------------------------------------------

    def _require_map(self) -> mmap.mmap:
        if self._map is None:
            raise ModeError("the buffer is closed; open it again with leanreplay.open(path)")
        return self._map

    @property
    def head(self) -> Words:
        """The header in force."""
        return self._now.obj  # type: ignore[return-value]

    @property
    def _work(self) -> Words:
        """The header to come."""
        return self._next.obj  # type: ignore[return-value]

    def _newest(self) -> Words:
        """The newest valid header of the map, a copy."""
        self._require_map()
        found = False
        newest, other = (np.zeros(HEADER_WORDS, np.uint64) for _ in range(2))
        for _ in range(3):
            valid = 0
            for at in HEADERS:
                if not kernel.read_block(self._view, at, other) or other[H_TAG] != self.table.tag:
                    continue
                valid += 1
                if not found or other[H_SEQ] > newest[H_SEQ]:
                    newest, other = other, newest
                    found = True
            # One that is not valid may be in the middle of being written, long after the other was read: look again.
            if valid == len(HEADERS) or self.writable:
                break
        if not found:
            raise FormatError(f"{self.path}: neither header is valid; restore the file from a copy")
        problem = header_problem(newest, self.table)
        if problem:
            raise FormatError(f"{self.path}: the header is wrong: {problem}; restore the file from a copy")
        return newest

    def refresh(self) -> None:
        """For readers: take the newest header, waiting for a rollback under way."""
        raw = self._raw_headers()
        if raw == self._known:  # nothing was written since: a tenth of the cost
            return
        deadline, waiting = time.monotonic() + _PATIENCE, system.Patience(self.guarded, _PATIENCE)
        while True:
            try:
                head = self._newest()
            except FormatError:
                if time.monotonic() > deadline:
                    raise
            else:
                if head[H_TARGET] in (0, _GONE):
                    known = raw if raw == self._raw_headers() else b""  # b"": written while they were read
                    self._now = head.data
                    self._known = known  # afterwards: should a signal handler come between, this is not what stands there, or right
                    return
                if waiting.over():
                    raise RecoveryError(f"{self.path}: a rollback was cut off; open it for writing once, to finish it")
            time.sleep(0.001)
            raw = self._raw_headers()

    def _raw_headers(self) -> bytes:
        view, size = self._require_map(), 8 * HEADER_WORDS
        return b"".join([view[at : at + size] for at in HEADERS])

    def ready(self) -> None:
        """Make the state in memory that of the file: for a writer after an interrupted commit, for a reader always."""
        if not self.writable:
            self._require_map()
            self.refresh()
        elif not self._settled:
            self._refuse_within()
            self.recover()
        elif self._map is None:
            self._require_map()

    def _refuse_within(self) -> None:
        """Raise ModeError if a change of this store is under way further up: it was not interrupted, it goes on when the caller is done."""
        refuse_within(self, _CHANGES, self.path)

    @property
    def sequence(self) -> int:
        """Number of the last commit; what other in-memory state belongs to."""
        return self._now[H_SEQ] if self._settled or not self.writable else -1

    @property
    def layout(self) -> Table:
        """What never changes in the file."""
        return self.table

    @property
    def schema(self) -> Schema | None:
        """What a sample looks like."""
        return self.table.schema

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.table.file_size

    @property
    def max_rows(self) -> int:
        """How many rows one commit may overwrite."""
        return self.most

    def recover_or_refresh(self) -> None:
        self.ready()

    def was_replaced(self) -> bool:
        return self.moved()

    def policy_log(self) -> Ints:
        return self.log()

    def state_name(self) -> str:
        return self.mark_name()

    @property
    def seen(self) -> int:
        return self._now[H_SEEN]

    @property
    def size(self) -> int:
        return self._now[H_SIZE]

    @property
    def high(self) -> int:
        """One past the highest row ever in use; the rows below are all live if it equals `size`."""
        return self._now[H_HIGH]

    @property
    def extent(self) -> tuple[int, int]:
        """`size` and `high` of one state: a signal handler that reads may bring another between two looks."""
        now = self._now
        return now[H_SIZE], now[H_HIGH]

    @property
    def policy(self) -> list[int]:
        """The policy's words of the state."""
        return self.head[H_POLICY : H_POLICY + POLICY_WORDS].tolist()

    def recover(self) -> None:
        """Undo a commit that did not end, finish a rollback that did not. Interrupted, it can simply run again."""
        self._settled = False
        self._policy = [-1]
        self._next = np.zeros(HEADER_WORDS, np.uint64).data  # which may be `_now`, after an exception within `_take_over`
        self._now = self._newest().data
        if self.head[H_TARGET] != 0:
            self._finish_rollback()
        elif (seal := self._read_seal()) is not None:
            live, count, freed = int(seal[J_LIVE]), int(seal[J_COUNT]), int(seal[J_FREED])
            use = np.ones(count, np.uint8)
            t = self.table
            kernel.restore_rows(self._view, self._cols, t.list_at, t.record_at, t.record, live, use, self._mem)
            if freed:
                kernel.restore_freed(self._view, self._cols, t.freed_at, freed, self._mem)
            if self.durable:
                self._sync()  # before the journal is void, or a power cut could keep only that
        self._mem[self.table.journal : self.table.journal + 8 * SEAL_WORDS] = 0
        self._stamp += 1  # rows may have been stamped for a commit that never kept their records
        self._live_rows = None
        self._settled = True

    def _read_seal(self) -> Words | None:
        """The seal of the journal, if that holds a commit on top of the present header, whole and within bounds."""
        t, s, head = self.table, np.empty(SEAL_WORDS, np.uint64), self.head
        if not kernel.read_block(self._view, t.journal, s):
            return None
        live, count, freed = int(s[J_LIVE]), int(s[J_COUNT]), int(s[J_FREED])
        if s[J_TAG] != t.tag or s[J_SEQ] != head[H_SEQ] + np.uint64(1) or s[J_PREVIOUS] != head[H_STATE]:
            return None
        if live > count or count > t.journal_rows or freed > (t.max_size if t.log[1] else 0):
            return None
        rows = np.concatenate([self._view[t.list_at : t.list_at + 8 * count].view(np.int64), self._freed(freed)[:, 0]])
        if rows.shape[0] and (rows.min() < 0 or rows.max() >= t.max_size):
            return None
        found = int(kernel.hash_records(self._view, t.list_at, t.record_at, t.record, live, count))
        if freed:
            found += int(kernel.hash_freed(self._view, t.freed_at, freed))
        return s if found % 2**64 == int(s[J_HASH]) else None

    def _freed(self, count: int) -> Ints:
        """The journal's freed rows: (count, 3) of row, position and group, a view."""
        at = self.table.freed_at
        return self._view[at : at + 24 * count].view(np.int64).reshape(count, 3)

    @functools.cached_property
    def scratch(self) -> npt.NDArray[np.int32]:
        """A number per row, all 0 before and after each use."""
        return np.zeros(self.table.max_size, np.int32)

    def survivors(self, rows: Ints, freed: Ints, start: int) -> Survivors:
        """Which samples of a plan stay in it to its end: rows[i] is the row of stream position start + i, or -1."""
        samples, taken, positions = np.empty((3, rows.shape[0]), np.int64)
        count = int(kernel.keep_last(rows, freed, self._positions, self.scratch, start, samples, taken, positions))
        n = max(0, count)
        return Survivors(count, taken[:n], samples[:n], positions[:n])

    # -- reading -----------------------------------------------------------------------------------------------------

    def index(self) -> tuple[Ints, Ints]:
        """Read-only views of position and group of all rows up to `high`: for the time of one call only."""
        high = self.high
        (p, _), (g, _) = self.table.columns[-3:-1]
        return self._view[p : p + 8 * high].view(np.int64), self._view[g : g + 8 * high].view(np.int64)

    def positions_of(self, rows: Ints) -> Ints:
        """Positions of some rows, for the writer."""
        return self._positions[rows]

    def snapshot(self, rows: Ints | slice) -> tuple[Ints, Ints]:
        """Positions and groups of rows exactly as the header says: for a reader whatever the writer does meanwhile, or did when it was
        killed, and copies."""
        if self.writable:
            positions, groups = self.index()
            return positions[rows], groups[rows]
        deadline = time.monotonic() + _PATIENCE
        columns = self._positions, self._groups
        while True:
            self.refresh()
            headers, seal = self._known, self._raw_seal()
            positions, groups = (np.array(column[rows]) for column in columns)
            changed, before = self._journal_index()
            if changed.shape[0]:  # undo the commit in the copies
                if isinstance(rows, slice):
                    places, mine = changed - rows.start, (changed >= rows.start) & (changed < rows.stop)
                    places, before = places[mine], before[mine]
                else:
                    order = np.argsort(changed)
                    places = np.flatnonzero(np.isin(rows, changed))
                    before = before[order[np.searchsorted(changed, rows[places], sorter=order)]]
                positions[places], groups[places] = before.T
            if self._is_now(headers, seal):
                return positions, groups
            if time.monotonic() > deadline:
                raise RowError(f"{self.path or 'this buffer'} changes faster than its index can be read; try again")

    def pieces(self) -> Iterator[tuple[int, Ints, Ints]]:
        """The index up to `high` in pieces of bounded size: (first row, positions, groups), each as of `snapshot`."""
        high = self.high
        for start in range(0, high, _PIECE):
            yield start, *self.snapshot(slice(start, min(high, start + _PIECE)))

    def live_rows(self) -> Ints | None:
        """The live rows in order; None where they are simply 0 to size - 1."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            now, known = self._now, self._live_rows
            size, state = now[H_SIZE], now[H_STATE]  # the sequence comes again after a commit that could not be made durable
            if size == now[H_HIGH]:
                return None
            if known is not None and known[0] == state:
                return known[1]
            found, n = np.empty(size, np.int64), 0
            for start, positions, _ in self.pieces():
                live = np.flatnonzero(positions >= 0)
                part = found[n : n + live.shape[0]]
                np.add(live[: part.shape[0]], start, out=part)
                n += live.shape[0]
            if n == size and self._now[H_STATE] == state:
                self._live_rows = (state, found)
                return found
            if self._now[H_STATE] == state or time.monotonic() > deadline:
                # A reader may have met a commit or rollback under way; `sample` tries again after a RowError.
                raise (CorruptionError if self.writable else RowError)(
                    f"{self.path or 'this buffer'}: {n} live rows, but the header counts {size}; "
                    "buffer.check() lists what is wrong; restore the file from a copy made with save()"
                )

    def pick_live(self, n: int, draw: Callable[[int, Ints], None]) -> Ints:
        """n live rows by a draw: draw(among, out) fills `out` with numbers below `among`, and of more numbers begins with the same.

        Where few of the rows below `high` are free, numbers that hit one are passed over: that costs O(n), a list of the live
        rows O(rows) after every commit. Which way is taken follows from the live rows alone.
        """
        size, high = self.extent
        k = n * high // size + 16 if high < 8 * size and n <= size // 2 else high
        while k < high:
            rows = np.empty(k, np.int64)
            draw(high, rows)
            found = rows[(self._positions[rows] if self.writable else self.snapshot(rows)[0]) >= 0]
            self._require_same(size, high)
            if found.shape[0] >= n:
                return found[:n].copy()
            k *= 2
        rows = np.empty(n, np.int64)
        draw(size, rows)
        live = self.live_rows()
        self._require_same(size, high)
        return rows if live is None else live[rows]

    def _require_same(self, size: int, high: int) -> None:
        """While rows were drawn none may have come or gone: a reader draws again."""
        if (size, high) != self.extent:
            raise RowError(f"rows of {self.path or 'this buffer'} came or went while some were drawn")

    def read(self, rows: Ints, field: int | None = None, room: int = 0) -> tuple[list[np.ndarray[Any, Any]], Ints]:
        """Copies of these rows: an array per field (or of one field), and (2, n) positions and groups, every checksum verified.

        room: entries, of any content, that the arrays of data fields begin with: for a batch to stand before what is read.
        Raises RowError for free rows, CorruptionError, and for readers RecoveryError.
        """
        n = rows.shape[0]
        if not self.writable and n and int(rows.max()) >= self.high:  # chosen before the writer went back, or made the file smaller
            raise RowError(
                f"rows up to {int(rows.max())} of {self.path or 'this buffer'}, but the rows in use are 0 to {self.high - 1} now"
            )
        first, last = (0, self._fields) if field is None else (field, field + 1)
        arrangement = self._arrangement  # taken and put back whole, since a signal handler may read, too
        if arrangement[0] != (n, first, last, room):
            arrangement = self._arrangement = self._arrange(n, first, last, room)
        _, places, blocks, size = arrangement
        out = np.empty(size, np.uint8)
        index = np.empty((2, n), np.int64)
        sums, bad = np.empty(n, np.uint64), np.empty(n, np.uint8)
        cold = self._cold
        if cold:
            self._fetch(rows, first, last)
        start = time.perf_counter()
        wrong = kernel.read_rows(self._view, self._cols, first, last, rows, out, places, index, sums, bad)
        taken = time.perf_counter() - start
        if taken > 1e-3 + _COLD * n:
            waits, self._waits = self._waits, system.waits_for_disk()
            if waits is None or self._waits is None or self._waits - waits > n // 8:  # else another process had the processor
                if not cold and self.path is not None:
                    self._fetch_columns()
                self._cold = _WARM_READS
        elif cold and taken < 1e-4 + _WARM * n:
            self._cold = cold - 1
        if not self.writable:
            wrong = self._find_changed(rows, first, last, index, sums, bad)
        if wrong:
            self._reread(rows, first, last, out, places, index, bad)
        return [np.ndarray(shape, dtype, out, place) for shape, dtype, place in blocks], index

    def _find_changed(self, rows: Ints, first: int, last: int, index: Ints, sums: Words, bad: Bytes) -> int:
        """After a reader's `read_rows`: mark rows that a commit changed meanwhile, and those of one under way, which are whole and yet not
        what the header speaks of. How many are bad. What is compared must not change meanwhile either: else once more.
        """
        deadline = time.monotonic() + _PATIENCE
        while True:
            self.refresh()
            headers, seal = self._known, self._raw_seal()
            wrong = int(kernel.find_changed(self._view, self._cols, first, last, rows, index, sums, bad))
            changing = self._journal_index()[0]
            if changing.shape[0]:
                bad[np.isin(rows, changing)] = 1
                wrong = int(np.count_nonzero(bad))
            if self._is_now(headers, seal):
                return wrong
            if time.monotonic() > deadline:
                raise RowError(f"{self.path or 'this buffer'} changes faster than rows can be compared; try again")

    def _is_now(self, headers: bytes, seal: bytes) -> bool:
        """Whether no commit began or ended since these were read."""
        return headers != b"" and headers == self._raw_headers() and seal == self._raw_seal()

    def _raw_seal(self) -> bytes:
        return self._require_map()[self.table.journal : self.table.journal + 8 * SEAL_WORDS]

    def _arrange(self, n: int, first: int, last: int, room: int) -> _Arrangement:
        """Where in one piece of memory each field's array lies, at multiples of 64 bytes, and where the rows that are read go."""
        schema = self.table.schema
        at, places, blocks = 0, [], []
        for f in range(first, last):
            field = schema.fields[f]
            before = room if f < len(schema.data) else 0
            blocks.append(((before + n, *field.shape), field.dtype, at))
            places.append(at + before * field.nbytes)
            at = round_up(at + (before + n) * field.nbytes, 64)
        return (n, first, last, room), np.array(places, np.int64), blocks, at

    def _fetch_columns(self) -> None:
        """Ask for the columns of small entries, each of which every batch needs, as a whole: one pass instead of thousands of reads."""
        small = [(at, size) for at, size in self.table.columns if size < _LARGE]
        if sum(size for _, size in small) * self.high <= system.memory_size() // 8:
            for at, size in small:
                system.advise(self._require_map(), "WILLNEED", at, at + size * self.high)

    def _fetch(self, rows: Ints, first: int, last: int) -> None:
        """Ask the device for the large entries of these rows all at once, where rows were found not to be in memory.

        A random read of a mapped file otherwise waits for one page after the other. Advice costs about a microsecond a row, which
        a file in memory would pay for nothing: so it is given only after a read that was slow, until several in a row are fast.
        """
        view = self._require_map()
        for at, size in self._large if (first, last) == (0, self._fields) else self.table.columns[first:last]:
            if size < _LARGE:
                continue
            order = np.sort(rows)
            ends = np.flatnonzero(np.diff(order, append=order[-1:] + 2) > 1) if order.shape[0] else order
            begin = 0
            for end in ends.tolist():  # neighbours in one call
                system.advise(view, "WILLNEED", at + int(order[begin]) * size, at + (int(order[end]) + 1) * size)
                begin = end + 1

    def _reread(self, rows: Ints, first: int, last: int, out: Bytes, places: Ints, index: Ints, bad: Bytes) -> None:
        """Bad rows: an error for the writer; a reader may have met a commit under way, so it tries again for a while."""
        deadline = time.monotonic() + (0.0 if self.writable else _PATIENCE)
        wait = 0.0001
        while True:
            wrong = np.flatnonzero(bad)
            if time.monotonic() >= deadline:
                break
            self.refresh()
            headers, seal = self._known, self._raw_seal()
            old, free_before = self._journal_rows()
            for i in wrong:
                if rows[i] in free_before:
                    index[0, i] = -1
                else:
                    bad[i] = not self._reread_one(rows, int(i), first, last, out, places, index, bool(rows[i] in old))
            if not bad.any():
                return
            left = bad == 1
            free = np.isin(rows[left], free_before).all() or ((index[0, left] < 0).all() and not self.pending())
            if free and self._is_now(headers, seal):
                break  # they are free in the state of the header: no commit began or ended since
            time.sleep(wait)
            wait = min(2 * wait, 0.01)
        wrong = np.flatnonzero(bad)
        names = [int(rows[i]) for i in wrong if index[0, i] < 0]
        if names:
            raise RowError(f"rows {names[:10]} of {self.path or 'this buffer'} are free; the live ones are in meta['idx'] of a sample")
        names = [int(rows[i]) for i in wrong]
        if not self.writable and self.pending():
            raise RecoveryError(f"{self.path}: rows {names[:10]} are in the middle of a commit; open it for writing once, to undo it")
        raise CorruptionError(
            f"{self.path or 'this buffer'}: rows {names[:10]} do not match their checksums; "
            "buffer.check() lists all wrong rows; restore the file from a copy made with save()"
        )

    def _reread_one(self, rows: Ints, i: int, first: int, last: int, out: Bytes, places: Ints, index: Ints, from_journal: bool) -> bool:
        """Read one row again, from the journal if its old bytes are there; whether it is right now."""
        row = rows[i : i + 1]
        fields = self.table.schema.fields
        sizes = [f.nbytes for f in fields[first:last]]
        found, sums, flag = np.empty((2, 1), np.int64), np.empty(1, np.uint64), np.empty(1, np.uint8)
        mine = np.cumsum([0, *[round_up(f.nbytes, 8) for f in fields]])
        block = np.empty(mine[-1], np.uint8)
        if from_journal:  # whose records stay as they are until the commit has ended
            headers, seal = self._known, self._raw_seal()
            wrong = not (self._read_journal(int(row[0]), block, mine, found) and self._is_now(headers, seal))
        else:
            kernel.read_rows(self._view, self._cols, 0, self._fields, row, block, mine, found, sums, flag)
            wrong = bool(self._find_changed(row, 0, self._fields, found, sums, flag))
        for f, size in enumerate(sizes):
            out[places[f] + i * size :][:size] = block[mine[first + f] :][:size]
        index[:, i] = found[:, 0]
        return not wrong

    def pending(self) -> bool:
        """Whether the file has a commit that has not ended."""
        return int(self.head[H_TARGET]) not in (0, _GONE) or self._read_seal() is not None

    def _journal_rows(self) -> tuple[Ints, Ints]:
        """Of a commit that has not ended: the rows whose old state the journal holds, and those that were free before."""
        changed, before = self._journal_index()
        free = before[:, 0] < 0
        return changed[~free], changed[free]

    def _journal_index(self) -> tuple[Ints, Ints]:
        """Of a commit that has not ended: the rows that it changes, and their positions and groups before, (n, 2)."""
        t, seal = self.table, self._read_seal()
        if seal is None:
            return NO_ROWS, NO_LOG
        live, count = int(seal[J_LIVE]), int(seal[J_COUNT])
        rows = self._view[t.list_at : t.list_at + 8 * count].view(np.int64)
        before = np.full((count, 2), -1, np.int64)
        before[:live] = np.ndarray((live, 2), np.int64, self._view, t.record_at + t.record - 16 - 8 * self._fields, (t.record, 8))
        freed = self._freed(int(seal[J_FREED]))
        return np.concatenate([rows, freed[:, 0]]), np.concatenate([before, freed[:, 1:]])

    def _read_journal(self, row: int, out: Bytes, mine: Ints, index: Ints) -> bool:
        """Take the old bytes of a row from the journal: undo them into a file of one row, and read that."""
        t, seal = self.table, self._read_seal()
        if seal is None:
            return False
        live, count = int(seal[J_LIVE]), int(seal[J_COUNT])
        listed = self._view[t.list_at : t.list_at + 8 * count].view(np.int64)
        at = np.flatnonzero(listed[:live] == row)
        if at.shape[0]:
            start = t.record_at + int(at[0]) * t.record
            record = self._view[start : start + t.record].copy()
        else:
            freed = self._freed(int(seal[J_FREED]))
            at = np.flatnonzero(freed[:, 0] == row)
            if at.shape[0] == 0:
                return False
            record = np.zeros(t.record, np.uint8)  # its bytes are where they were, its position and group in the journal
            kernel.copy_records(self._view, self._cols, np.array([row]), record, 0, t.record)
            place = t.record - 16 - 8 * self._fields
            record[place : place + 16].view(np.int64)[:] = freed[int(at[0]), 1:]
        # The record's columns stand one after the other, so they are columns of one row, shifted to row number `row`.
        cols = self._cols.copy()
        cols[:, 0] = np.cumsum([0, *[round_up(size, 8) for _, size in t.columns[:-1]]])
        index[:, 0] = record[int(cols[-3, 0]) :][:16].view(np.int64)
        return bool(kernel.read_record(record, cols, row, out, mine))

    # -- writing -----------------------------------------------------------------------------------------------------

    def require_writable(self) -> None:
        """Raise ModeError in a reader."""
        self._require_map()
        if not self.writable:
            raise ModeError(
                f"{self.path or 'this buffer'} is open for reading only (mode 'r', or a forked or unpickled copy); "
                "open it with mode='r+' in one process to write"
            )

    def verify_index(self) -> None:
        """Before the first write: the index must add up to the header, or pages were lost. Raises CorruptionError.

        One pass over the index, and over the narrowest field unless that is large: then a wrong position or group shows when read.
        """
        if self._checked:
            return
        digests = np.zeros(BUCKETS, np.uint64)
        live, high = kernel.scan_index(self._view, self._cols, self.table.max_size, digests)
        if live != self.size or high > self.high or not np.array_equal(digests, self.head[H_DIGESTS : H_DIGESTS + BUCKETS]):
            raise CorruptionError(
                f"{self.path}: the rows do not add up to the header (a power cut since the last flush?); "
                "buffer.check() lists the wrong rows; restore the file from a copy, or read it with mode='r'"
            )
        narrow = int(np.argmin([f.nbytes for f in self.table.schema.fields]))
        if self.table.schema.fields[narrow].nbytes <= _NARROW:  # checksums cover position and group, with the bytes of a field
            positions = self.index()[0]
            for start in range(0, high, _CHUNK * 16):
                part = np.flatnonzero(positions[start : start + _CHUNK * 16] >= 0)
                self.read(start + part, narrow)
        self._checked = True

    def commit(self, change: Change) -> None:
        """Make one commit, by one kernel call where nothing has to happen between its steps."""
        seen, policy, rows, positions, groups, sources, freed, log, moved, after = change
        sequence = self._coming(seen, policy, after)
        whole, freeing = rows.shape[0], freed.shape[0]
        if whole and not freeing and moved is None and not log.shape[0] and not callable(sources) and self._unbroken(len(sources)):
            data, samples = [source for source, _ in sources], sources[0][1]
            # For read-only memory the kernel would be compiled once more.
            simple = all(which is samples and source.flags.writeable for source, which in sources)
            if simple and np.array_equal(samples, np.arange(whole)) and self._at_once(rows, 0, positions, groups, 0, data, whole):
                return
        mem, cols, table = self._mem, self._cols, self.table
        head, work, now, coming = self.head, self._work, self._now, self._next
        size, high = now[H_SIZE], now[H_HIGH]
        if whole or freeing or moved is not None:
            digests = work[H_DIGESTS : H_DIGESTS + BUCKETS]
            logging = self._logging()
            counts, changing, touched = self._counts, self._changing, rows
            if moved is not None:
                touched = np.concatenate([rows, moved.rows])
                changing[:] = 0
                changing[list(moved.sources)] = 1
            if touched.shape[0]:
                self._get_pages(touched)
            stamps = self._stamps if logging else _NOBODY
            found = int(kernel.save_rows(mem, cols, touched, whole, changing, stamps, self._stamp, *self._journal, digests, counts))
            new, live, count, top = counts.tolist()
            if freeing:
                found = (found + int(kernel.save_freed(mem, cols, freed, table.freed_at, digests))) % 2**64
            if logging:
                fresh = self._stamps[freed] != self._stamp
                self._log.append(mem, head, sequence, new, live, count, freed if fresh.all() else freed[fresh])  # mostly all, and many
                self._stamps[freed] = self._stamp
                if self.durable:
                    self._log.sync()
            seal = self._seal_words
            seal[J_TAG], seal[J_SEQ], seal[J_PREVIOUS] = self._tag, sequence, now[H_STATE]
            seal[J_LIVE], seal[J_COUNT], seal[J_FREED], seal[J_HASH] = live, count, freeing, found
            kernel.seal_block(mem, table.journal, self._seal, 0)
            if self.durable:
                self._sync()
            high = max(high, top)
            if callable(sources):
                self._write_pieces(sources, rows, positions, groups, digests)
            else:
                for f, (source, samples) in enumerate(sources):
                    kernel.write_field(mem, cols, f, rows, samples, source, positions, groups, digests)
            if whole:
                kernel.write_index(mem, cols, rows, positions, groups)
            if moved is not None:
                same = self._positions[moved.rows], self._groups[moved.rows]
                for f, (source, samples) in moved.sources.items():
                    kernel.write_field(mem, cols, f, moved.rows, samples, source, *same, digests)
            size += count - live - freeing
            if freeing:
                self._positions[freed] = -1
                while high and not (self._positions[max(0, high - _CHUNK) : high] >= 0).any():
                    high = max(0, high - _CHUNK)
                while high and self._positions[high - 1] < 0:
                    high -= 1
            if self.durable and not log.shape[0]:
                self._sync()
        elif self._logging():
            self._log.append(mem, head, sequence, 0, 0, 0, NO_ROWS)
        if log.shape[0]:
            self._append_log(log, work)
            if self.durable:
                self._sync()
        coming[H_SIZE], coming[H_HIGH] = size, high
        self._write_header(work)
        self._take_over()
        self._settled = True

    def _coming(self, seen: int, policy: Sequence[int], after: int | None = None) -> int:
        """Begin a commit: fill the next header with what is known of it. Returns its number.

        after: samples seen when the commit was planned. From here on a signal handler can change nothing; until here it could.
        """
        self.stay()
        self._settled = False
        now, coming = self._now, self._next
        if self._map is None or (after is not None and now[H_SEEN] != after):
            self._settled = True
            raise ModeError(
                f"{self.path or 'this buffer'} was changed or closed while a batch was being added, by a signal handler or a dataset; "
                "the batch was not added"
            )
        coming[:] = now
        sequence: int = now[H_SEQ] + 1
        coming[H_SEQ], coming[H_PREVIOUS], coming[H_TARGET], coming[H_SEEN] = sequence, now[H_STATE], 0, seen
        if policy != self._policy:
            self._work[H_POLICY:H_DIGESTS] = policy
            self._policy = list(policy)
        return sequence

    def commit_planned(self, batch: PlannedBatch) -> bool:
        """Commit a planned batch by one kernel call; False, and nothing has changed, where that cannot be or the plan is wrong."""
        after, policy, rows, start, groups, first, data, most = batch
        if not self._unbroken(len(data)):
            return False
        self._coming(after + rows.shape[0], policy, after)
        return self._at_once(rows, start, NO_ROWS, groups, first, data, most)

    def _unbroken(self, fields: int) -> bool:
        """Whether a commit needs nothing between its steps, so that one kernel call makes it."""
        return not self.durable and fields <= len(_NO_DATA) and _AT_ONCE and not self._logging()

    def _at_once(self, rows: Ints, start: int, positions: Ints, groups: Ints, first: int, data: Sequence[Bytes], most: int) -> bool:
        """Make the commit that `_coming` began by one kernel call; False, and nothing has changed, for a wrong plan."""
        seal, sequence = self._seal_words, self._next[H_SEQ]
        seal[J_TAG], seal[J_SEQ], seal[J_PREVIOUS], seal[J_FREED] = self._tag, sequence, self._now[H_STATE], 0
        s0, s1, s2, s3 = (*data, *_NO_DATA[len(data) :])
        count = -2
        while count == -2:
            count = kernel.commit_rows(
                self._mem, self._cols, rows, self.scratch, start, positions, groups, first, s0, s1, s2, s3,
                self._seal, self._work, HEADERS[sequence % 2], most, self._journal_ready, self._faulted, self._layout,
            )  # fmt: skip
            if count == -2:
                self._get_pages(rows)
        if count < 0:
            return False
        self._take_over()
        self._settled = True
        return True

    def _get_pages(self, rows: Ints) -> None:
        """For a commit of these rows, -1 among them."""
        overwritten = min(int(np.count_nonzero(rows >= 0)), self._now[H_SIZE])
        if overwritten > self._journal_ready:
            self._extend_journal(overwritten)
        top = int(rows.max()) + 1
        if top > self._faulted:
            self._fault_in(top)

    def _take_over(self) -> None:
        """The header that was just written is the one in force."""
        self._now, self._next = self._next, self._now

    def _write_pieces(self, fetch: Any, rows: Ints, positions: Ints, groups: Ints, digests: Words) -> None:
        """Write rows in pieces of bounded size, each fetched when its turn comes."""
        step = max(1, _SURVIVOR_BYTES // self._row_bytes)
        for start in range(0, rows.shape[0], step):
            part = slice(start, min(start + step, rows.shape[0]))
            sources = fetch(part.start, part.stop)
            for f in range(self._fields):
                source, samples = sources[f]
                kernel.write_field(self._mem, self._cols, f, rows[part], samples, source, positions[part], groups[part], digests)

    def _append_log(self, entries: Ints, work: Words) -> None:
        """Write entries behind those that the header counts, and count them in `work`."""
        at, slots = self.table.log
        count = int(work[H_LOG])
        if count + entries.shape[0] > slots:
            raise FormatError(f"{self.path}: a log of {slots} entries cannot take {entries.shape[0]} more behind {count}")
        start = at + 16 * count
        self._mem[start : start + 16 * entries.shape[0]].view(np.int64).reshape(-1, 2)[:] = entries
        work[H_LOG] = count + entries.shape[0]
        work[H_LOG_HASH] = kernel.hash_log(work[H_LOG_HASH], entries)

    def log(self) -> Ints:
        """The policy's log, (entries, 2): a copy, its hash verified. A reader may meet a rollback, so it tries again for a while."""
        deadline = time.monotonic() + (0.0 if self.writable else _PATIENCE)
        at, slots = self.table.log
        while slots:
            entries = self._view[at : at + 16 * int(self.head[H_LOG])].view(np.int64).reshape(-1, 2).copy()
            if kernel.hash_log(np.uint64(0), entries) == self.head[H_LOG_HASH]:
                return entries
            if time.monotonic() >= deadline:
                raise CorruptionError(f"{self.path or 'this buffer'}: the log fails its checksum; restore the file from a copy")
            time.sleep(0.001)
            self.refresh()
        return NO_LOG

    def _write_header(self, words: Words) -> None:
        """Make a state the one in force. Where it cannot be made durable it is not: the error then agrees with `seen`."""
        slot = slice(at := HEADERS[words.item(H_SEQ) % 2], at + 8 * HEADER_WORDS)
        before = self._mem[slot].copy() if self.durable else None
        kernel.seal_block(self._mem, slot.start, words, H_STATE)
        if before is not None:
            try:
                self._sync()
            except StorageError:
                self._mem[slot] = before
                raise

    def _extend_journal(self, rows: int) -> None:
        """Get the pages for the journal of a commit that overwrites so many rows, all at once; what stands there is void."""
        first, table = self._journal_ready, self.table
        rows = min(table.journal_rows, max(rows, 2 * first))
        start, stop = table.record_at + first * table.record if first else table.list_at, table.record_at + rows * table.record
        if self.path is not None and system.LINUX:
            self._write_zeros(start, stop)
        system.populate(self._require_map(), start, stop)
        self._journal_ready = rows

    def _fault_in(self, top: int) -> None:
        """Get the pages of the rows up to `top`, and some ahead, for writing: one by one they would cost more than the copies.

        The file system makes pages as large as the writes that it gets, so whole huge pages of zeros are written first (these
        rows are free): a hundred times faster than faults, and random reads then miss the TLB less.
        """
        start = max(self._faulted, self.high)
        stop = min(self.table.max_size, top + max(1, _AHEAD // self._row_bytes))
        view = self._require_map()
        for c, (at, size) in enumerate(self.table.columns):
            first, last = at + start * size, at + stop * size
            if c < self._fields and self.path is not None and system.LINUX:
                end = at + self.table.max_size * size
                first = max(first, self._written[c])
                last = min(end, round_up(last, system.HUGE_PAGE))
                if first < last:
                    self._write_zeros(first, last)
                    self._written[c] = last
            if first < last:
                system.populate(view, first, last)
        self._faulted = stop

    def _write_zeros(self, start: int, stop: int) -> None:
        # A file system that never overwrites in place can be full although the file has its blocks.
        with system.storage_errors(f"writing to {self.path}"), self.file() as fd:
            system.write_zeros(fd, start, stop)

    def flush(self) -> None:
        """Make the present state durable."""
        self._require_map()
        if self.writable:
            self._attach()
            with system.storage_errors(f"flushing {self.path or 'a buffer in memory'}"):
                self._log.sync(everything=True)
                self._sync()
            self._synced = True

    # -- restore points ----------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        if not self._attached:
            self.stay()  # undo files that stand there are not this file's otherwise
            self._log.attach(self.head)
            self._attached = True

    def _logging(self) -> bool:
        """Whether commits must keep what they overwrite for a restore point."""
        if not self._attached:
            self._attach()
        if not self._log.segments:
            return False
        if self._stamps.shape[0] == 0:
            self._stamps = np.zeros(self.table.max_size, np.int32)
        return True

    def mark(self) -> str:
        """Make a restore point of the present state; its name."""
        self.stay()
        self._attach()
        self._stamp += 1  # before the mark: an exception in between must not leave rows that count as kept
        if self._log.mark(self.head):
            self._synced = False
        if self.durable and not self._synced:
            self.flush()
        return self.mark_name()

    def mark_name(self) -> str:
        """The name that `mark` would give the present state."""
        return f"{int(self.head[H_STATE]):016x}"

    def find_point(self, state: str, seen: int) -> tuple[Segment, list[Frame]] | None:
        """The restore point of a state that `mark` named, and what leads back to it; None if the buffer is there already.

        Raises StateError where there is no way back. Changes nothing but the restore points that do not belong to this file.
        """
        if state == self.mark_name():
            return None
        self._attach()
        target = self._log.find(int(state, 16))
        where = self.path or "this buffer"
        if target is None and seen > self.seen:
            raise StateError(
                f"{where} has seen {self.seen} samples, the state {seen}: the buffer is {seen - self.seen} behind it; "
                "load a copy of that age, or an older state"
            )
        if target is None:
            ahead, way = self.seen - seen, "raise restore_points, or "
            if self.path is not None and not self._log.segments:
                way = (
                    f"no file {self.path}.undo.* stands beside it: bring them here if it was copied or moved without them (resize, load "
                    "and new fields end them), load a copy made with save(), or "
                )
            raise StateError(
                f"{where} is ahead of the state by {ahead} samples (seen {self.seen}, state {seen}), and no restore point of it is left; "
                f"{way}go on from here: add(batch, at=position) skips the {ahead} samples it already holds"
                if ahead
                else f"{where} has seen {seen} samples like the state, but holds others or other metadata; no restore point is left; {way}"
                "go on from here"
            )
        frames = self._log.frames(target)
        self._log.verify(target, frames, self._view, self.head)
        return target, frames

    def rollback(self, state: str, seen: int) -> None:
        """Go back to a state that `mark` named. Raises StateError, the buffer unchanged, where that is impossible."""
        self.stay()
        found = self.find_point(state, seen)
        if found is None:
            return
        target, frames = found
        self._settled = self._synced = False
        self._log.close_tail(int(self.head[H_STATE]))
        if self.durable:
            self._log.sync(everything=True)
        self._write_target(target, target.number + 1)
        self._apply_rollback(target, frames)
        self._log.rewind(target)
        self._settled = True

    def _write_target(self, target: Any, number: int) -> None:
        """Header of the target's state; number > 0: going there, PREVIOUS being where from; 0: arrived."""
        work = self._work
        sequence, start = self.head[H_SEQ] + np.uint64(1), self.head[H_STATE]
        np.copyto(work, target.head)
        work[H_TAG], work[H_SEQ], work[H_TARGET], work[H_PREVIOUS] = self.table.tag, sequence, number, start
        self._policy = [-1]
        self._write_header(work)
        self._take_over()

    def _apply_rollback(self, target: Any, frames: list[Any]) -> None:
        for f in frames:
            kernel.restore_rows(f.source, self._cols, f.list_at, f.record_at, self.table.record, f.live, f.use, self._mem)
        if self.durable:
            self._sync()
        self._write_target(target, 0)
        self._stamp += 1
        self._live_rows = None

    def _finish_rollback(self) -> None:
        """After a kill within `rollback`: the records are still there, so do it again."""
        if not self._log.segments:
            self._log.attach_for_rollback(self.head)
        target = self._log.find(int(self.head[H_STATE]))
        if target is None:
            raise RecoveryError(
                f"{self.path}: a rollback was cut off, and the undo files it needs ({self.path}.undo.*) are not those beside it; "
                "put them back, or restore the file from a copy"
            )
        self._apply_rollback(target, self._log.frames(target))
        self._log.rewind(target)
        self._attached = True

    def give_away_points(self) -> None:
        """Another store has taken the restore points over."""
        self._log.disown()

    def drop_points(self) -> None:
        """End all restore points."""
        self._log.clear()
        self._attached = True

    def mark_gone(self) -> None:
        """Tell readers of this shared memory that another piece has replaced it."""
        if self.path is None:
            work = self.head.copy()
            work[H_SEQ] += np.uint64(1)
            work[H_TARGET] = _GONE
            kernel.seal_block(self._mem, HEADERS[work.item(H_SEQ) % 2], work, H_STATE)

    # -- auditing ----------------------------------------------------------------------------------------------------

    def check(self) -> list[Problem]:
        """Everything wrong with this file; an empty list if nothing is. Reads all of it, in pieces.

        A reader beside a writer finds what is wrong with a row in a moment in which no commit changes that row; what concerns the rows
        together, in a moment without any commit. Where there is none within a second, it leaves that to the writer. It waits for a
        single commit as long as its writer lives.
        """
        self.ready()
        wrong = self._wrong_rows()
        problems = [Problem("bytes do not match their checksums", tuple(wrong))] if wrong else []
        deadline, waiting, first = time.monotonic() + _PATIENCE, system.Patience(self.guarded, _PATIENCE), None
        while True:
            headers, seal, pending = self._known, self._raw_seal(), not self.writable and self.pending()
            found = [] if pending else self._check_index()
            if self.writable or (not pending and self._is_now(headers, seal)):
                problems += found
                break
            first = first or (headers, seal)
            same = pending and first == (headers, seal)
            if time.monotonic() > deadline and (not same or waiting.over()):
                if same:
                    changed = tuple(self._journal_index()[0].tolist())
                    problems.append(Problem("a commit was cut off: open the file for writing once, to undo it", changed))
                    problems += self._check_index()  # some of which may be due to that
                break
            time.sleep(0.001 if pending else 0)
            self.refresh()
        try:
            self.log()
        except CorruptionError as error:
            problems.append(Problem(str(error)))
        return problems + self._check_structure()

    def _wrong_rows(self) -> list[int]:
        """Rows whose bytes do not match their checksums."""
        t, wrong = self.table, []
        step = min(_PIECE, max(1, (16 << 20) // self._row_bytes))
        bad = np.zeros(step, np.uint8)
        for start in range(0, t.max_size, step):
            stop = min(t.max_size, start + step)
            for at, size in self._large:
                system.advise(self._require_map(), "WILLNEED", at + start * size, at + stop * size)
            headers, seal = self._known, self._raw_seal()
            kernel.verify_rows(self._view, self._cols, start, stop, bad)
            rows = (start + np.flatnonzero(bad[: stop - start])).tolist()
            if not self.writable and rows and (self.pending() or not self._is_now(headers, seal)):
                rows = [row for row in rows if self._is_wrong(row)]
            wrong += rows
        return wrong

    def _is_wrong(self, row: int) -> bool:
        """Whether a row that failed is wrong, and not in the middle of a commit."""
        deadline = time.monotonic() + _PATIENCE
        _, places, _, size = self._arrange(1, 0, self._fields, 0)
        rows, out, index = np.array([row]), np.empty(size, np.uint8), np.empty((2, 1), np.int64)
        while True:
            self.refresh()
            headers, seal = self._known, self._raw_seal()
            old, free_before = self._journal_rows()
            right = row in free_before or self._reread_one(rows, 0, 0, self._fields, out, places, index, row in old)
            if right or index[0, 0] < 0 or self._is_now(headers, seal):
                return not right and index[0, 0] >= 0
            if time.monotonic() > deadline:
                return False

    def _check_index(self) -> list[Problem]:
        """What is wrong with the rows together, as they are now."""
        t, problems = self.table, []
        digests = np.zeros(BUCKETS, np.uint64)
        live, high = kernel.scan_index(self._view, self._cols, t.max_size, digests)
        late = []
        for start in range(0, t.max_size, _PIECE):
            positions = self._positions[start : start + _PIECE]
            mine = (positions >= 0) & (positions >> STREAM_BITS == t.stream)
            late += (start + np.flatnonzero(mine & (positions & (2**STREAM_BITS - 1) >= self.seen + t.params.get("first", 0)))).tolist()
        if late:
            problems.append(Problem(f"positions beyond seen={self.seen}", tuple(late)))
        twice = self._held_twice(live)
        if twice:
            problems.append(Problem("positions held twice", tuple(twice)))
        off = np.flatnonzero(digests != self.head[H_DIGESTS : H_DIGESTS + BUCKETS])
        if off.shape[0]:
            suspects = np.sort(np.concatenate([np.arange(bucket, t.max_size, BUCKETS) for bucket in off]))
            problems.append(
                Problem("rows that do not add up to the header's digests: among these are stale ones", tuple(map(int, suspects)))
            )
        if live != self.size:
            problems.append(Problem(f"{live} live rows, but the header counts {self.size}"))
        if high > self.high:
            problems.append(Problem(f"row {high - 1} is live, but the header's highest is {self.high - 1}"))
        return problems

    def _held_twice(self, live: int) -> list[int]:
        """Rows that hold a position that another one holds, too. Positions are sorted class by class: memory does not grow with rows."""
        classes = 1 + live // _SORTED
        starts = range(0, self.table.max_size, _PIECE)
        double = []
        for number in range(classes):
            parts = []
            for start in starts:
                part = self._positions[start : start + _PIECE]
                part = part[part >= 0]
                if classes > 1:
                    part = part[(part.view(np.uint64) * GOLDEN >> np.uint64(40)) % np.uint64(classes) == number]
                parts.append(part)
            positions = np.concatenate(parts)
            positions.sort()
            double.append(np.unique(positions[1:][positions[1:] == positions[:-1]]))
        found = np.concatenate(double)
        if not found.shape[0]:
            return []
        return [
            row for start in starts for row in (start + np.flatnonzero(np.isin(self._positions[start : start + _PIECE], found))).tolist()
        ]

    def _check_structure(self) -> list[Problem]:
        """Compare HDF5's view with the table. Its own bytes are compared first: damaged ones can crash the HDF5 library."""
        t = self.table
        if hash_structure(lambda at, n: self._view[at : at + n], t) != t.structure_hash:
            return [Problem("the HDF5 structure was changed or damaged (leanreplay itself does not need it)")]
        import h5py

        problems = []
        try:
            with h5py.File(_Raw(self._view), "r") as file:
                for (at, _), column in zip(t.columns, t.dataset_names(), strict=True):
                    dataset = file[column]
                    if dataset.id.get_offset() != at or dataset.shape[0] != t.max_size:
                        problems.append(Problem(f"HDF5 sees {column} elsewhere than the table"))
        except (OSError, KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            problems.append(Problem(f"HDF5 cannot read {self.path or 'this buffer'}: {error}"))
        return problems


class EmptyStore:
    """The store of a buffer before its first batch. It has seen nothing, and there is nothing to read."""

    path: str | None = None
    writable = False
    schema: Schema | None = None
    status: os.stat_result | None = None
    seen = size = high = sequence = nbytes = 0
    extent = (0, 0)
    max_rows = _NO_LIMIT
    policy: list[int] = [0] * POLICY_WORDS

    @property
    def layout(self) -> Table:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise RowError("the buffer is empty: it has no schema before its first batch")

    def read(self, rows: Ints, field: int | None = None) -> tuple[list[np.ndarray[Any, Any]], Ints]:
        self._refuse()

    def index(self) -> tuple[Ints, Ints]:
        return NO_ROWS, NO_ROWS

    def positions_of(self, rows: Ints) -> Ints:
        self._refuse()

    def snapshot(self, rows: Ints | slice) -> tuple[Ints, Ints]:
        return NO_ROWS, NO_ROWS

    def pieces(self) -> Iterator[tuple[int, Ints, Ints]]:
        return iter(())

    def live_rows(self) -> Ints | None:
        return None

    def pick_live(self, n: int, draw: Callable[[int, Ints], None]) -> Ints:
        self._refuse()

    def policy_log(self) -> Ints:
        return NO_LOG

    def state_name(self) -> str:
        return empty_state()

    def check(self) -> list[Problem]:
        return []

    def was_replaced(self) -> bool:
        return False

    def recover_or_refresh(self) -> None:
        """Nothing to do, as for those below."""

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def stay(self) -> None: ...

    def mark_gone(self) -> None: ...

    def as_reader(self) -> EmptyStore:
        return self


class _Raw(io.RawIOBase):
    """Bytes as a file that is only read."""

    def __init__(self, view: Bytes) -> None:
        self._view, self._at = view, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._view.shape[0]}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, into: Any) -> int:
        found = self._view[self._at : self._at + len(into)]
        memoryview(into)[: found.shape[0]] = found.data
        self._at += found.shape[0]
        return found.shape[0]


def refuse_within(owner: Any, changes: Collection[types.CodeType], name: str | None) -> None:
    """Raise ModeError if one of these functions works on `owner` further up: a signal handler, or a dataset, came in the middle of it."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code in changes and frame.f_locals.get("self") is owner:
            raise ModeError(
                f"{name or 'this buffer'} is in the middle of a change, so that it cannot be used now: a signal handler should "
                "only set a flag, for the training loop to look at between two steps; a dataset should not use the buffer that it feeds"
            )
        frame = frame.f_back  # type: ignore[assignment]


_CHANGES = {f.__code__ for f in (Store.commit, Store.commit_planned, Store.recover, Store.rollback)}  # which nothing may come within


@functools.cache
def empty_state() -> str:
    """Name of the state of every buffer that has seen nothing."""
    head = np.zeros(HEADER_WORDS, np.uint64)
    kernel.seal_block(np.zeros(8 * HEADER_WORDS, np.uint8), 0, head, H_STATE)
    return f"{int(head[H_STATE]):016x}"


_STORES = weakref.WeakSet()


def _after_fork() -> None:
    for store in list(_STORES):
        store.become_reader()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
