"""Restore points: what the rows held when `state_dict` was called, kept beside the buffer until it is needed.

Each restore point is one segment (`replay.h5.undo.<n>`; shared memory for a buffer in RAM): the header's state at that
moment, then a frame per commit with the old bytes of the rows that this segment has not seen before. Going back to a point applies
the frames of its segment and of all later ones, the oldest record of each row last. A segment says in its tail, rewritten
before every commit, up to which state it is complete; it is believed only if the file's header is in that state, or one
commit further. Before anything is changed, the rows to restore must add up to the digests of the point.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..arrays import Bytes, Ints, Words
from ..errors import FormatError, StateError, StorageError
from ..kernels import rows as kernel
from . import system
from .layout import BUCKETS, H_DIGESTS, H_PREVIOUS, H_SEEN, H_STATE, HEADER_WORDS, PAGE, Table, header_problem

_MAGIC = np.uint64(0x4F444E55524C8A01)
_FRAME = np.uint64(0x454D4152464C8A01)
_CONTROL_WORDS = 3 + HEADER_WORDS  # magic, tag, header, seal
_TAIL_WORDS = 6  # magic, tag, count, state that the segment is complete up to, length of the frames, seal
_TAILS = (2 * PAGE, 2 * PAGE + 512)
_FRAMES = 3 * PAGE
_FRAME_WORDS = 7  # magic, sequence, state before, live, rows, hash, seal

_LEAST_CHUNK, _MOST_CHUNK = 1 << 16, 64 << 20  # bytes of memory that are got for frames at a time
_MOST = 2**62  # tails of a segment
_FRAME_BYTES = 4 << 20  # of freed rows kept at a time


def undo_files(path: str) -> list[tuple[int, str]]:
    """Numbers and names of the undo files of a buffer's file, in order."""
    folder, name = os.path.split(path)
    with system.storage_errors(f"looking for the restore points of {path}"):
        try:
            names = os.listdir(folder or ".")
        except FileNotFoundError:
            names = []
    found = (re.fullmatch(re.escape(name) + r"\.undo\.(\d{1,15})", one) for one in names if one.startswith(name))
    return sorted((int(match[1]), os.path.join(folder, match[0])) for match in found if match)


def is_undo_file(name: str) -> bool:
    """Whether what stands there may be removed: it begins like an undo file, or a kill came before anything was in it."""
    try:
        fd = system.open_own(name, system.OPEN_READ)
    except (FileNotFoundError, FormatError):
        return False
    try:
        start = system.read_at(fd, 8, 0)
    finally:
        os.close(fd)
    return start == bytes(8) or _MAGIC.tobytes().startswith(start)


def refuse_alien(name: str) -> None:
    """Raise FormatError for what stands under the name of an undo file and is none."""
    with system.storage_errors(f"opening {name}"):
        system.refuse_alien(name)
        if os.path.lexists(name) and not is_undo_file(name):
            raise FormatError(f"{name} stands where a restore point would be kept, and is none; move it away, nothing was changed")


@dataclass
class Segment:
    """One restore point. head: the header at that point. before, length, count: its tail."""

    fd: int  # -1: none is kept open
    inode: int
    number: int
    path: str | None
    head: Words
    before: int = 0
    length: int = 0
    count: int = 0
    chunks: list[tuple[int, Bytes]] = field(default_factory=list)  # of one in memory: where in its frames each begins, and the bytes

    @property
    def state(self) -> int:
        """Hash of the state at this point."""
        return int(self.head[H_STATE])

    @contextlib.contextmanager
    def file(self) -> Iterator[int]:
        """A descriptor of the file, for the time of a block. Raises StateError if another stands under its name."""
        if self.fd >= 0:
            yield self.fd
            return
        assert self.path is not None
        with system.storage_errors(f"opening {self.path} again"):
            fd = os.open(self.path, system.OPEN_WRITE)
        try:
            with system.storage_errors(f"looking at {self.path}"):
                same = os.fstat(fd).st_ino == self.inode
            if not same:
                raise StateError(f"{self.path}: another file stands under this name now; put the buffer's own back")
            yield fd
        finally:
            os.close(fd)

    def write(self, frame: Bytes, at: int) -> None:
        """Write a frame behind `at` bytes of others. Memory needs no descriptor, and is not private."""
        if self.path is not None:
            with self.file() as fd:
                system.write_all(fd, frame, _FRAMES + at)
            return
        n = frame.shape[0]
        while self.chunks and self.chunks[-1][0] > at:  # of an `append` that was interrupted
            self.chunks.pop()
        if not self.chunks or at - self.chunks[-1][0] + n > self.chunks[-1][1].shape[0]:
            size = max(n, min(max(at, _LEAST_CHUNK), _MOST_CHUNK))
            self.chunks.append((at, np.frombuffer(mmap.mmap(-1, size), np.uint8)))
        start, memory = self.chunks[-1]
        memory[at - start : at - start + n] = frame

    def sources(self) -> list[tuple[Bytes, int, int]]:
        """Read-only bytes with frames, and from where to where there are some."""
        if self.length == 0:
            return []
        if self.path is not None:
            with self.file() as fd:
                view = system.map_file(fd, _FRAMES + self.length, False, self.path)
            return [(np.frombuffer(view, np.uint8, _FRAMES + self.length), _FRAMES, _FRAMES + self.length)]
        ends = [start for start, _ in self.chunks[1:]] + [self.length]
        found = []
        for (start, memory), end in zip(self.chunks, ends, strict=True):
            frozen = memory.view()
            frozen.flags.writeable = False
            if start < self.length:
                found.append((frozen, 0, min(end, self.length) - start))
        return found

    def close(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)


@dataclass
class Frame:
    """One commit's records in a mapped segment: where the row numbers and the records lie, and which of them to use."""

    source: Bytes
    list_at: int
    record_at: int
    live: int
    count: int
    use: Bytes = field(default_factory=lambda: np.zeros(0, np.uint8))

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        return self.source[self.list_at : self.list_at + 8 * self.count].view(np.int64)


class UndoLog:
    """The restore points of one store, oldest first. `path` None: in shared memory."""

    def __init__(self, path: str | None, table: Table, limit: int) -> None:
        self.path, self.table, self.limit = path, table, limit
        self.segments: list[Segment] = []
        self._kept = True  # whether descriptors are
        self._cols = np.array(table.columns, np.uint64)
        self._words = np.zeros(_TAIL_WORDS, np.uint64)

    # -- opening -----------------------------------------------------------------------------------------------------

    def _paths(self) -> list[tuple[int, str]]:
        return [] if self.path is None else undo_files(self.path)

    def _refuse_aliens(self) -> None:
        for _, name in self._paths():
            refuse_alien(name)

    def attach(self, head: Words) -> None:
        """Take over the segments of an earlier writer, as far as they lead up to this header; the others are removed."""
        self._refuse_aliens()
        segments = self._load_all()
        here = (int(head[H_STATE]), int(head[H_PREVIOUS]))
        chain: list[Segment] = []
        for segment in reversed(segments):
            if not chain:
                if segment.state == here[0]:
                    segment.length = 0  # the buffer is at this point itself: whatever came after does not matter
                    chain.append(segment)
                elif segment is segments[-1] and segment.before in here:
                    chain.append(segment)
            elif segment.before == chain[-1].state:
                chain.append(segment)
            else:
                break
        self.segments = chain[::-1]
        for segment in segments:
            if not any(segment is s for s in chain):
                self._remove(segment)
        for number, name in self._paths():
            if not any(number == s.number for s in chain):
                self._unlink(name)
        if self.segments and self.segments[-1].state == here[0]:
            self._write_tail(self.segments[-1], here[0], 0)
        if not self._kept:
            self.release()

    def attach_for_rollback(self, head: Words) -> None:
        """Take over the segments for finishing a rollback that was cut off. Changes nothing on disk."""
        self._refuse_aliens()
        self.segments = self._load_all()
        for older, newer in zip(self.segments[:-1], self.segments[1:], strict=True):
            if older.before != newer.state:
                self.segments = self.segments[self.segments.index(newer) :]
        if not self.segments or self.segments[-1].before != int(head[H_PREVIOUS]):
            self.forget()

    def _load_all(self) -> list[Segment]:
        """The segments beside the buffer that are whole, oldest first. One that cannot be read now is an error: later it could be."""
        self.forget()
        segments: list[Segment] = []
        try:
            with system.storage_errors(f"reading the restore points of {self.path}"):
                for number, name in self._paths():
                    with contextlib.suppress(FileNotFoundError):
                        fd = system.open_own(name, system.OPEN_WRITE)
                        try:
                            segment = self._load(fd, number, name)
                        except BaseException:
                            os.close(fd)
                            raise
                        if segment is None:
                            os.close(fd)
                        else:
                            segments.append(segment)
        except BaseException:
            for segment in segments:
                segment.close()
            raise
        return segments

    def _load(self, fd: int, number: int, name: str) -> Segment | None:
        block = np.frombuffer(system.read_at(fd, _FRAMES, 0).ljust(_FRAMES, b"\0"), np.uint8)
        control = np.zeros(_CONTROL_WORDS, np.uint64)
        segment = None
        if kernel.read_block(block, 0, control) and control[0] == _MAGIC and control[1] == self.table.tag:
            segment = Segment(fd, os.fstat(fd).st_ino, number, name, control[2:-1].copy())
            again = segment.head.copy()
            kernel.seal_block(np.zeros(8 * HEADER_WORDS, np.uint8), 0, again, H_STATE)
            best = -1
            for at in _TAILS:
                words = np.zeros(_TAIL_WORDS, np.uint64)
                if kernel.read_block(block, at, words) and words[1] == self.table.tag and best < int(words[2]) < _MOST:
                    best = segment.count = int(words[2])
                    segment.before, segment.length = int(words[3]), int(words[4])
            bad_head = again[H_STATE] != segment.head[H_STATE] or header_problem(segment.head, self.table)
            if best < 0 or bad_head or _FRAMES + segment.length > os.fstat(fd).st_size:
                segment = None
        return segment

    # -- writing -----------------------------------------------------------------------------------------------------

    def mark(self, head: Words) -> bool:
        """Make a restore point of this header's state. False where the newest point is that state already."""
        state = int(head[H_STATE])
        if self.segments and self.segments[-1].state == state:
            return False
        if self.segments:
            self._write_tail(self.segments[-1], state, self.segments[-1].length)
        number = self.segments[-1].number + 1 if self.segments else 0
        name = None if self.path is None else f"{self.path}.undo.{number}"
        segment = Segment(-1, 0, number, name, head.copy(), state)
        if name is not None:
            with system.storage_errors(f"making a restore point of {self.path}"):
                self._make(segment, name)
        self.segments.append(segment)
        while len(self.segments) > self.limit:
            self._remove(self.segments.pop(0))
        if not self._kept:
            self.release()
        return True

    def _make(self, segment: Segment, name: str) -> None:
        """The file of a new segment."""
        refuse_alien(name)
        self._unlink(name)
        segment.fd = system.create(name, system.status(str(self.path)))
        try:
            segment.inode = os.fstat(segment.fd).st_ino
            control = np.zeros(_CONTROL_WORDS, np.uint64)
            control[0], control[1], control[2:-1] = _MAGIC, self.table.tag, segment.head
            block = np.zeros(_FRAMES, np.uint8)
            kernel.seal_block(block, 0, control, 0)
            self._tail_words(segment, segment.before, 0)
            kernel.seal_block(block, _TAILS[segment.count % 2], self._words, 0)
            system.write_all(segment.fd, block, 0)
        except BaseException:
            segment.close()
            self._unlink(name)
            raise

    def append(self, mem: Bytes, head: Words, sequence: int, new: int, live: int, count: int, freed: Ints) -> None:
        """Keep the first `new` records of the journal in mem, its free rows, and the rows `freed`, before a commit on top of `head`."""
        t, segment = self.table, self.segments[-1]
        rows = new + count - live
        length = segment.length
        state = int(head[H_STATE])
        if rows:
            frame, listed, recorded = self._frame(new, rows)
            frame[listed : listed + 8 * new] = mem[t.list_at : t.list_at + 8 * new]
            frame[listed + 8 * new : recorded] = mem[t.list_at + 8 * live : t.list_at + 8 * count]
            frame[recorded:] = mem[t.record_at : t.record_at + new * t.record]
            length += self._write_frame(frame, sequence, state, new, rows, length)
        step = max(1, _FRAME_BYTES // t.record)
        for start in range(0, freed.shape[0], step):
            these = freed[start : start + step]
            frame, listed, recorded = self._frame(these.shape[0], these.shape[0])
            frame[listed:recorded] = these.view(np.uint8)
            kernel.copy_records(mem, self._cols, these, frame, recorded, t.record)
            length += self._write_frame(frame, sequence, state, these.shape[0], these.shape[0], length)
        if length != segment.length or state != segment.before:
            self._write_tail(segment, state, length)

    def _frame(self, live: int, rows: int) -> tuple[Bytes, int, int]:
        """An empty frame, and where in it row numbers and records go."""
        listed = 8 * _FRAME_WORDS
        recorded = listed + 8 * rows
        return np.zeros(recorded + live * self.table.record, np.uint8), listed, recorded

    def _write_frame(self, frame: Bytes, sequence: int, state: int, live: int, rows: int, length: int) -> int:
        """Seal a frame and write it behind `length` bytes of others; its bytes."""
        words = np.zeros(_FRAME_WORDS, np.uint64)
        words[:5] = (_FRAME, sequence, state, live, rows)
        frozen = frame.view()
        frozen.flags.writeable = False
        listed = 8 * _FRAME_WORDS
        words[5] = kernel.hash_records(frozen, listed, listed + 8 * rows, self.table.record, live, rows)
        kernel.seal_block(frame, 0, words, 0)
        segment = self.segments[-1]
        with system.storage_errors(f"keeping a restore point of {self.path or 'a buffer in memory'}"):
            segment.write(frame, length)
        return int(frame.shape[0])

    def _tail_words(self, segment: Segment, before: int, length: int) -> None:
        segment.count += 1
        self._words[:5] = (_MAGIC, self.table.tag, segment.count, before, length)

    def _write_tail(self, segment: Segment, before: int, length: int) -> None:
        if segment.path is not None:  # what is in memory nobody opens again
            self._tail_words(segment, before, length)
            block = np.zeros(8 * _TAIL_WORDS, np.uint8)
            kernel.seal_block(block, 0, self._words, 0)
            with system.storage_errors(f"keeping a restore point of {self.path}"), segment.file() as fd:
                system.write_all(fd, block, _TAILS[segment.count % 2])
        segment.before, segment.length = before, length
        if not length:
            segment.chunks.clear()

    def sync(self, everything: bool = False) -> None:
        """Make the newest segment durable, the only one that commits write to. everything: the others and all names too."""
        if self.path is None or not self.segments:
            return
        for segment in self.segments if everything else self.segments[-1:]:
            with segment.file() as fd:
                system.sync(fd, None)
        if everything:
            system.sync_folder(self.path, strict=True)

    # -- going back --------------------------------------------------------------------------------------------------

    def find(self, state: int) -> Segment | None:
        """The newest restore point of this state."""
        return next((s for s in reversed(self.segments) if s.state == state), None)

    def frames(self, target: Segment) -> list[Frame]:
        """All frames since a point, oldest first, each using only rows that no older one has. Raises StateError if damaged."""
        frames: list[Frame] = []
        for segment in self.segments[self.segments.index(target) :]:
            for source, at, stop in segment.sources():
                frames += self._frames_of(segment, source, at, stop)
        if frames:
            rows = np.concatenate([f.rows for f in frames])
            first = np.zeros(rows.shape[0], np.uint8)
            first[np.unique(rows, return_index=True)[1]] = 1
            at = 0
            for frame in frames:
                frame.use = first[at : at + frame.count]
                at += frame.count
        return frames

    def _frames_of(self, segment: Segment, source: Bytes, at: int, stop: int) -> list[Frame]:
        """The frames in some bytes. Raises StateError if they are damaged."""
        frames: list[Frame] = []
        words = np.zeros(_FRAME_WORDS, np.uint64)
        while at < stop:
            ok = at + 8 * _FRAME_WORDS <= source.shape[0] and kernel.read_block(source, at, words) and words[0] == _FRAME
            live, count = (int(words[3]), int(words[4])) if ok else (0, 0)
            listed = at + 8 * _FRAME_WORDS
            recorded = listed + 8 * count
            end = recorded + live * self.table.record
            frame = Frame(source, listed, recorded, live, count)
            if not ok or live > count or count > self.table.max_size or end > source.shape[0]:
                raise StateError(f"{segment.path}: this undo file is damaged at byte {at}; load a saved copy instead")
            if count and not (int(frame.rows.min()) >= 0 and int(frame.rows.max()) < self.table.max_size):
                raise StateError(f"{segment.path}: this undo file names rows outside the buffer; load a saved copy instead")
            found = kernel.hash_records(source, listed, recorded, self.table.record, live, count)
            if found != words[5]:
                raise StateError(f"{segment.path}: the undo record at byte {at} fails its checksum; load a saved copy instead")
            frames.append(frame)
            at = end
        return frames

    def verify(self, target: Segment, frames: list[Frame], mem: Bytes, head: Words) -> None:
        """Raise StateError unless restoring these rows gives exactly the point's digests."""
        digests = head[H_DIGESTS : H_DIGESTS + BUCKETS].copy()
        for f in frames:
            kernel.exchange_digests(f.source, self._cols, f.list_at, f.record_at, self.table.record, f.live, f.use, mem, digests)
        if not np.array_equal(digests, target.head[H_DIGESTS : H_DIGESTS + BUCKETS]):
            raise StateError(
                f"the restore point at seen={int(target.head[H_SEEN])} does not lead back from this file "
                "(file and undo files come from different copies); load a saved copy instead"
            )

    def take_over(self, other: UndoLog) -> None:
        """Go on with the segments of a store that this one's replaces, row for row the same. Until `disown` both have them."""
        self.segments = list(other.segments)

    def disown(self) -> None:
        """Another log has taken the segments over: do not close them."""
        self.segments = []

    def close_tail(self, state: int) -> None:
        """Say that the log is complete up to this state, with no commit pending."""
        self._write_tail(self.segments[-1], state, self.segments[-1].length)

    def rewind(self, target: Segment) -> None:
        """After the rows went back to a point: drop the newer ones, and start this one's frames anew. That is clearing up: no errors."""
        while self.segments[-1] is not target:
            self._remove(self.segments.pop())
        with contextlib.suppress(StorageError, StateError):  # `attach` knows a point that the buffer is at, whatever its tail says
            self._write_tail(target, target.state, 0)
        target.before, target.length = target.state, 0

    # -- ending ------------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Remove all restore points, those of other files under this name too."""
        while self.segments:
            self._remove(self.segments.pop())
        with contextlib.suppress(StorageError):
            for _, name in self._paths():
                self._unlink(name)

    def release(self) -> None:
        """Keep no descriptor of a file open from now on."""
        self._kept = False
        for segment in self.segments:
            if segment.path is not None:
                segment.close()

    def forget(self) -> None:
        """Close all descriptors; the files stay."""
        while self.segments:
            self.segments.pop().close()

    def _remove(self, segment: Segment) -> None:
        if segment.path is not None and not self._unlink(segment.path):
            with contextlib.suppress(OSError, StateError), segment.file() as fd:  # it stays, but must not be taken for one in use
                system.write_all(fd, bytes(_FRAMES), 0)
        segment.close()

    def _unlink(self, name: str) -> bool:
        """Remove a file; False where the system refuses, which must not end what is done already: `mark` and `attach` try again."""
        try:
            if is_undo_file(name):
                os.unlink(name)
        except OSError as error:
            return isinstance(error, FileNotFoundError)
        return True
