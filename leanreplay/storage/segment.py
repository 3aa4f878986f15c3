"""One restore point: the state at that moment, then a frame per commit with what rows were that
this point has not seen before.

On disk it is a file beside the buffer (`replay.h5.undo.<n>`), for a buffer in memory it is memory.
Its tail, rewritten before every commit, says up to which state it is complete.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re

import numpy as np
import numpy.typing as npt

from ..arrays import Bytes, Ints
from ..errors import FormatError, StateError
from ..kernels import before_images, checksums
from . import system
from .journal import BeforeImage
from .layout import HEADER_WORDS, PAGE, Layout
from .mapping import Mapping, OpenFile
from .state import State

_MAGIC = np.uint64(0x4F444E55524C8A01)
_FRAME = np.uint64(0x454D4152464C8A01)
CONTROL_WORDS = 3 + HEADER_WORDS  # magic, tag, header, seal
TAIL_WORDS = 6  # magic, tag, count, state that the segment is complete up to, length of the frames, seal
TAILS = (2 * PAGE, 2 * PAGE + 512)
FRAMES = 3 * PAGE
FRAME_WORDS = 7  # magic, sequence, state before, live, rows, hash, seal

_LEAST_CHUNK, _MOST_CHUNK = 1 << 16, 64 << 20  # bytes of memory that are got for frames at a time
MOST_TAILS = 2**62  # of a segment


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
    """Whether what stands there may be removed: it begins like an undo file, or is empty."""
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


def unlink(name: str) -> bool:
    """Remove an undo file; False where the system refuses, which must not end what is done."""
    try:
        if is_undo_file(name):
            os.unlink(name)
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return True


class Segment:
    """One restore point. state: the buffer's then. before, length, count: its tail."""

    def __init__(self, layout: Layout, number: int, state: State, path: str | None, fd: int = -1) -> None:
        self.layout, self.number, self.state, self.path = layout, number, state, path
        self.before, self.length, self.count = state.identity, 0, 0
        self.file = OpenFile(fd, path, system.OPEN_WRITE, StateError, "another file stands under this name now; put the buffer's own back")
        self._chunks: list[tuple[int, Bytes]] = []  # of one in memory: where in its frames each begins, and the bytes

    @staticmethod
    def load(layout: Layout, number: int, path: str) -> Segment | None:
        """The segment in an undo file; None if that is not whole, or of another buffer."""
        fd = system.open_own(path, system.OPEN_WRITE)
        try:
            found = _read_segment(layout, number, path, fd)
        except BaseException:
            os.close(fd)
            raise
        if found is None:
            os.close(fd)
        return found

    @staticmethod
    def make(layout: Layout, number: int, state: State, path: str | None, beside: str | None) -> Segment:
        """A new segment; its file gets mode and owner of the one `beside`."""
        if path is None:
            return Segment(layout, number, state.copy(), None)
        refuse_alien(path)
        unlink(path)
        fd = system.create(path, system.status(str(beside)))
        try:
            made = Segment(layout, number, state.copy(), path, fd)
            control = np.zeros(CONTROL_WORDS, np.uint64)
            control[0], control[1], control[2:-1] = _MAGIC, layout.tag, state.words
            block = np.zeros(FRAMES, np.uint8)
            checksums.seal_block(block, 0, control, 0)
            made._seal_tail(block, made.before, 0, whole=True)
            system.write_all(fd, block, 0)
            return made
        except BaseException:
            os.close(fd)
            unlink(path)
            raise

    # -- writing -----------------------------------------------------------------------------------------------------

    def append(self, before: BeforeImage, state: State, length: int) -> int:
        """Add a frame with the new rows of a journal behind `length` bytes of others; its bytes.

        state: of the buffer, before the commit.
        """
        new, live = before.new, before.live
        frame, records_at = self._frame(before.rows[:new], before.rows[live:])
        frame[records_at:] = before.source[before.records_at :][: new * self.layout.record_bytes]
        return self._write_frame(frame, new, records_at, state, length)

    def append_rows(self, mapping: Mapping, rows: Ints, state: State, length: int) -> int:
        """Add a frame with what stands in these rows now."""
        is_live = mapping.positions[rows] >= 0
        live = rows[is_live]
        frame, records_at = self._frame(live, rows[~is_live])
        before_images.copy_records(mapping.mem, mapping.cols, live, frame, records_at, self.layout.record_bytes)
        return self._write_frame(frame, live.shape[0], records_at, state, length)

    def absorb(self, later: Segment, has: npt.NDArray[np.bool_], durable: bool) -> None:
        """Take over what the next segment has of rows that this one has not: it is needed no more.

        Until the tail says so, nothing of it counts. has: `rows_held`, which is brought up to date.
        durable: it is to survive a power cut.
        """
        length, record = self.length, self.layout.record_bytes
        for image in later.frames():
            fresh, live = ~has[image.rows], image.live
            if fresh.any():
                records = image.source[image.records_at :][: live * record].reshape(live, record)[fresh[:live]]
                frame, records_at = self._frame(image.rows[:live][fresh[:live]], image.rows[live:][fresh[live:]])
                frame[records_at:] = records.reshape(-1)
                length += self._write_frame(frame, records.shape[0], records_at, later.state, length)
                has[image.rows] = True
        if durable:
            self.sync()
        self.write_tail(later.before, length)
        if durable:
            self.sync()

    def rows_held(self) -> npt.NDArray[np.bool_]:
        """Which rows are in its frames."""
        has = np.zeros(self.layout.max_size, np.bool_)
        for frame in self.frames():
            has[frame.rows] = True
        return has

    def _frame(self, live: Ints, free: Ints) -> tuple[Bytes, int]:
        """A frame with the numbers of its rows, and where in it the records of the live ones go."""
        records_at = 8 * (FRAME_WORDS + live.shape[0] + free.shape[0])
        frame = np.zeros(records_at + live.shape[0] * self.layout.record_bytes, np.uint8)
        frame[8 * FRAME_WORDS : records_at] = np.concatenate([live, free]).view(np.uint8)
        return frame, records_at

    def _write_frame(self, frame: Bytes, live: int, records_at: int, state: State, length: int) -> int:
        """Seal a frame and write it behind `length` bytes of others; its bytes."""
        rows = records_at // 8 - FRAME_WORDS
        frozen = frame.view()
        frozen.flags.writeable = False
        image = BeforeImage(self.layout, frozen, 8 * FRAME_WORDS, records_at, live, rows)
        words = np.array([_FRAME, state.sequence + 1, state.identity, live, rows, image.computed_hash(), 0], np.uint64)
        checksums.seal_block(frame, 0, words, 0)
        with system.storage_errors(f"keeping a restore point of {self._buffer}"):
            if self.path is not None:
                with self.file.descriptor() as fd:
                    system.write_all(fd, frame, FRAMES + length)
            else:
                self._write_memory(frame, length)
        return frame.shape[0]

    @property
    def _buffer(self) -> str:
        return "a buffer in memory" if self.path is None else self.path.rpartition(".undo.")[0]

    def _write_memory(self, frame: Bytes, at: int) -> None:
        while self._chunks and self._chunks[-1][0] > at:  # of an `append` that was interrupted
            self._chunks.pop()
        n = frame.shape[0]
        if not self._chunks or at - self._chunks[-1][0] + n > self._chunks[-1][1].shape[0]:
            size = max(n, min(max(at, _LEAST_CHUNK), _MOST_CHUNK))
            self._chunks.append((at, np.frombuffer(mmap.mmap(-1, size), np.uint8)))  # shared memory: private memory must not grow with rows
        start, memory = self._chunks[-1]
        memory[at - start : at - start + n] = frame

    def write_tail(self, before: int, length: int) -> None:
        """Say that the segment is complete up to a state, with so many bytes of frames."""
        if self.path is not None:  # what is in memory nobody opens again
            block = np.zeros(8 * TAIL_WORDS, np.uint8)
            at = self._seal_tail(block, before, length)
            with system.storage_errors(f"keeping a restore point of {self._buffer}"), self.file.descriptor() as fd:
                system.write_all(fd, block, at)
        self.before, self.length = before, length
        if not length:
            self._chunks.clear()

    def _seal_tail(self, block: Bytes, before: int, length: int, whole: bool = False) -> int:
        """Put the next tail into a block, or the whole beginning. Returns its place in the file."""
        self.count += 1
        at = TAILS[self.count % 2]
        words = np.array([_MAGIC, self.layout.tag, self.count, before, length, 0], np.uint64)
        checksums.seal_block(block, at if whole else 0, words, 0)
        return at

    def sync(self) -> None:
        """Make it durable. Memory has nothing to sync."""
        if self.path is not None:
            with self.file.descriptor() as fd:
                system.sync(fd, None)

    # -- reading -----------------------------------------------------------------------------------------------------

    def frames(self) -> list[BeforeImage]:
        """All frames, oldest first. Raises StateError if they are damaged."""
        return [frame for source, at, stop in self._sources() for frame in self._frames_of(source, at, stop)]

    def _sources(self) -> list[tuple[Bytes, int, int]]:
        """Read-only bytes with frames, and from where to where there are some."""
        if self.length == 0:
            return []
        if self.path is not None:
            with self.file.descriptor() as fd:
                view = system.map_file(fd, FRAMES + self.length, False, self.path)
            return [(np.frombuffer(view, np.uint8, FRAMES + self.length), FRAMES, FRAMES + self.length)]
        ends = [start for start, _ in self._chunks[1:]] + [self.length]
        found = []
        for (start, memory), end in zip(self._chunks, ends, strict=True):
            frozen = memory.view()
            frozen.flags.writeable = False
            if start < self.length:
                found.append((frozen, 0, min(end, self.length) - start))
        return found

    def _frames_of(self, source: Bytes, at: int, stop: int) -> list[BeforeImage]:
        frames: list[BeforeImage] = []
        words = np.zeros(FRAME_WORDS, np.uint64)
        while at < stop:
            ok = at + 8 * FRAME_WORDS <= source.shape[0] and checksums.read_block(source, at, words) and words[0] == _FRAME
            live, count = (int(words[3]), int(words[4])) if ok else (0, 0)
            rows_at = at + 8 * FRAME_WORDS
            end = rows_at + 8 * count + live * self.layout.record_bytes
            if not ok or live > count or count > self.layout.max_size or end > source.shape[0]:
                raise StateError(f"{self.path}: this undo file is damaged at byte {at}; load a saved copy instead")
            frame = BeforeImage(self.layout, source, rows_at, rows_at + 8 * count, live, count)
            if frame.names_rows_outside():
                raise StateError(f"{self.path}: this undo file names rows outside the buffer; load a saved copy instead")
            if frame.computed_hash() != int(words[5]):
                raise StateError(f"{self.path}: the undo record at byte {at} fails its checksum; load a saved copy instead")
            frames.append(frame)
            at = end
        return frames

    # -- ending ------------------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """End this restore point."""
        if self.path is not None and not unlink(self.path):
            with contextlib.suppress(OSError, StateError), self.file.descriptor() as fd:
                system.write_all(fd, bytes(FRAMES), 0)  # the file stays, but must not be taken for one in use
        self.file.close()


def _read_segment(layout: Layout, number: int, path: str, fd: int) -> Segment | None:
    block = np.frombuffer(system.read_at(fd, FRAMES, 0).ljust(FRAMES, b"\0"), np.uint8)
    control = np.zeros(CONTROL_WORDS, np.uint64)
    if not checksums.read_block(block, 0, control) or control[0] != _MAGIC or control[1] != np.uint64(layout.tag):
        return None
    found = Segment(layout, number, State(control[2:-1].copy()), path, fd)
    best = -1
    for at in TAILS:
        words = np.zeros(TAIL_WORDS, np.uint64)
        if checksums.read_block(block, at, words) and words[1] == np.uint64(layout.tag) and best < int(words[2]) < MOST_TAILS:
            best = found.count = int(words[2])
            found.before, found.length = int(words[3]), int(words[4])
    wrong = best < 0 or not found.state.is_what_it_says() or found.state.problem(layout)
    if wrong or FRAMES + found.length > os.fstat(fd).st_size:
        return None
    return found
