"""Restore points: what the rows held when `state_dict` was called, kept beside the buffer until it
is needed.

Going back to a point writes back the frames of its segment and of all later ones; of each row the
oldest record counts. A segment is believed only if the file's header is in the state that its tail
names, or one commit further. Before anything is changed, the rows to restore must add up to the
digests of the point.

The newest points stay, and those that are kept. The frames of a point that goes are moved to the
point before it, which needs them: those of rows that it has not itself. So a point never holds more
than each row once, and a point before which there is none leaves nothing behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import NO_ROWS, Bytes, Ints
from ..errors import RecoveryError, StateError, StorageError
from . import system
from .journal import NO_STAMPS, BeforeImage
from .mapping import Mapping
from .segment import Segment, refuse_alien, undo_files, unlink
from .state import State
from .store import Change

_FRAME_BYTES = 4 << 20  # of rows in the columns that are kept at a time
STAYING = 2**62  # added to the target of a rollback after which the newer points are there still


class RestorePoints:
    """The restore points of one file, oldest first."""

    def __init__(self, mapping: Mapping, limit: int) -> None:
        self._mapping, self._limit = mapping, limit
        self.segments: list[Segment] = []
        self.attached = False  # whether the segments of an earlier writer were looked for
        self._keeps_descriptors = True
        self._absorbing: tuple[Segment | None, npt.NDArray[Any]] = None, NO_ROWS  # which point absorbed others last, and the rows it has
        self.synced = False  # whether all that the points need is on the disk, if every commit is
        self.stamps: Bytes = NO_STAMPS  # per row, once there is a point: `stamp` if the newest point has the row
        self.stamp = 1

    # -- opening -----------------------------------------------------------------------------------------------------

    def attach(self, state: State) -> None:
        """Take over an earlier writer's segments that lead to this state; remove the others."""
        if self.attached:
            return
        self._mapping.stay(state.seen)  # undo files that stand there are not this file's otherwise
        segments = self._load_all()
        here = state.identity
        self.segments = _chain(segments, (here, state.previous), here)
        for segment in segments:
            if segment not in self.segments:
                segment.remove()
        for number, name in self._files():
            if not any(number == s.number for s in self.segments):
                unlink(name)
        if self.segments and self.segments[-1].state.identity == here:
            self.segments[-1].write_tail(here, 0)
        if not self._keeps_descriptors:
            self.release()
        self.attached = True

    def attach_for_rollback(self, state: State) -> Segment:
        """The point that a rollback was going to when it was cut off. Changes nothing on disk."""
        if not self.segments:
            self.segments = _chain(self._load_all(), (state.previous,))
        target = self._newest(state.identity)
        if target is None:
            raise RecoveryError(
                f"{self._mapping.path}: a rollback was cut off, and the undo files it needs ({self._mapping.path}.undo.*) are not those "
                "beside it; put them back, or restore the file from a copy"
            )
        self.attached = True
        return target

    def _files(self) -> list[tuple[int, str]]:
        return [] if self._mapping.path is None else undo_files(self._mapping.path)

    def _load_all(self) -> list[Segment]:
        """The whole segments beside the buffer, oldest first. One that cannot be read is an
        error."""
        self.forget()
        for _, name in self._files():
            refuse_alien(name)
        segments: list[Segment] = []
        try:
            with system.storage_errors(f"reading the restore points of {self._mapping.path}"):
                for number, name in self._files():
                    with contextlib.suppress(FileNotFoundError):
                        segment = Segment.load(self._mapping.layout, number, name)
                        segments += [] if segment is None else [segment]
        except BaseException:
            for segment in segments:
                segment.file.close()
            raise
        return segments

    # -- keeping -----------------------------------------------------------------------------------------------------

    def must_keep_old_rows(self, state: State) -> bool:
        """Whether commits must keep what they overwrite."""
        if not self.attached:
            self.attach(state)
        if not self.segments:
            return False
        if self.stamps.shape[0] == 0:
            self.stamps = np.zeros(self._mapping.layout.max_size, np.uint8)
        return True

    def mark(self, state: State, kept: Collection[str]) -> None:
        """Make a restore point of this state, unless the newest point is that already. kept: names
        of states."""
        self.attach(state)
        self.renew_stamps()  # before: an exception in between must not leave rows that count as kept
        if not self.segments or self.segments[-1].state.identity != state.identity:
            self._add(state)
            self.synced = False
        self.trim(kept)

    def _add(self, state: State) -> None:
        path, number = self._mapping.path, 0
        if self.segments:
            self.segments[-1].write_tail(state.identity, self.segments[-1].length)
            number = self.segments[-1].number + 1
        with system.storage_errors(f"making a restore point of {path}"):
            name = None if path is None else f"{path}.undo.{number}"
            self.segments.append(Segment.make(self._mapping.layout, number, state, name, path))
        if not self._keeps_descriptors:
            self.release()

    def trim(self, kept: Collection[str]) -> None:
        """End the points beyond the limit, the oldest first, unless they are kept."""
        newest = {segment.state.name: segment for segment in self.segments}
        for segment in self.segments[: -self._limit]:
            if segment.state.name in kept and newest[segment.state.name] is segment:
                segment.file.close()  # there may be many
                continue
            at = self.segments.index(segment)
            if at:
                (into, has), self._absorbing = self._absorbing, (None, NO_ROWS)
                if into is not self.segments[at - 1]:
                    into = self.segments[at - 1]
                    has = into.rows_held()
                into.absorb(segment, has, self._mapping.durable)
                self._absorbing = into, has
            del self.segments[at]
            segment.remove()

    def renew_stamps(self) -> None:
        """No row counts as kept from here on."""
        if self.stamp == 255:
            self.stamps, self.stamp = np.zeros_like(self.stamps), 1
        else:
            self.stamp += 1

    def keep(self, before: BeforeImage | None, change: Change, state: State) -> None:
        """Keep what a change is about to overwrite, before the journal is sealed. None: no row."""
        segment, length = self.segments[-1], self.segments[-1].length
        if before is not None and before.new + before.count - before.live:
            length += segment.append(before, state, length)
        self._keep_rows(change.freed, state, length)
        if before is not None and self._mapping.durable:
            segment.sync()

    def _keep_rows(self, rows: Ints, state: State, length: int) -> None:
        """Keep what stands in these rows, behind `length` bytes of frames of the newest point."""
        segment = self.segments[-1]
        if rows.shape[0]:
            fresh = self.stamps[rows] != self.stamp
            new = rows if fresh.all() else rows[fresh]  # mostly all, and many
            step = max(1, _FRAME_BYTES // self._mapping.layout.record_bytes)
            for start in range(0, new.shape[0], step):
                length += segment.append_rows(self._mapping, new[start : start + step], state, length)
        if length != segment.length or state.identity != segment.before:
            segment.write_tail(state.identity, length)
        self.stamps[rows] = self.stamp

    def flush(self) -> None:
        """Make all points durable, and their names."""
        if self._mapping.path is not None and self.segments:
            for segment in self.segments:
                segment.sync()
            system.sync_folder(self._mapping.path, strict=True)

    # -- going back --------------------------------------------------------------------------------------------------

    def find(self, name: str, seen: int, state: State) -> tuple[Segment, list[BeforeImage]] | None:
        """The restore point of a name, and the frames that lead back to it; None if the buffer is
        in that state already.

        seen: of that state. Raises StateError where there is no way back. Changes nothing but the
        restore points that do not belong to this file.
        """
        if name == state.name:
            return None
        self.attach(state)
        target = self._newest(int(name, 16))
        if target is None:
            raise StateError(self._no_way_back(seen, state))
        frames = self.frames(target)
        digests = state.digests.copy()
        for frame in frames:
            frame.exchange_digests(self._mapping, digests)
        if not np.array_equal(digests, target.state.digests):
            raise StateError(
                f"the restore point at seen={target.state.seen} does not lead back from this file "
                "(file and undo files come from different copies); load a saved copy instead"
            )
        return target, frames

    def _newest(self, identity: int) -> Segment | None:
        return next((s for s in reversed(self.segments) if s.state.identity == identity), None)

    def _no_way_back(self, seen: int, state: State) -> str:
        """Why, and what to do instead."""
        where, path, ahead = self._mapping.name, self._mapping.path, state.seen - seen
        if ahead < 0:
            return (
                f"{where} has seen {state.seen} samples, the state {seen}: the buffer is {-ahead} behind it; "
                "load a copy of that age, or an older state"
            )
        way = (
            f"{len(self.segments)} are there: the newest {self._limit} (restore_points={self._limit}), and those given to keep(state) "
            "until release(state); keep what is to be loaded later, raise restore_points, or "
        )
        if path is not None and not self.segments:
            way = (
                f"no file {path}.undo.* stands beside it: bring them here if it was copied or moved without them (resize, load "
                "and new fields end them), load a copy made with save(), or "
            )
        if ahead:
            return (
                f"{where} is ahead of the state by {ahead} samples (seen {state.seen}, state {seen}), and no restore point of it is left; "
                f"{way}go on from here: add(batch, at=position) skips the {ahead} samples it already holds"
            )
        return (
            f"{where} has seen {seen} samples like the state, but holds others or other metadata; no restore point is left; {way}"
            "go on from here"
        )

    def frames(self, target: Segment) -> list[BeforeImage]:
        """All frames since a point, oldest first; each uses rows that no older one has."""
        frames = [frame for segment in self.segments[self.segments.index(target) :] for frame in segment.frames()]
        if frames:
            rows = np.concatenate([f.rows for f in frames])
            first = np.zeros(rows.shape[0], np.uint8)
            first[np.unique(rows, return_index=True)[1]] = 1
            ends = np.cumsum([f.count for f in frames])
            for frame, use in zip(frames, np.split(first, ends[:-1]), strict=True):
                frame.use = use
        return frames

    def close_tail(self, state: State) -> None:
        """Say that the points are complete up to this state, with no commit pending."""
        if self.segments:
            self.segments[-1].write_tail(state.identity, self.segments[-1].length)

    def begin_rollback(self, state: State, target: Segment, frames: list[BeforeImage], kept: Collection[str]) -> int:
        """A rollback begins: make what it needs durable, where every commit is. Returns the number
        for its header.

        If any state is kept, the newest point gets what the rollback overwrites, as of any other
        commit, and all points stay.
        """
        self.synced = False
        stay = bool(kept) and target is not self.segments[-1]
        if stay and self.must_keep_old_rows(state):
            rows = np.concatenate([NO_ROWS, *(frame.rows[frame.use == 1] for frame in frames)])
            self._keep_rows(rows, state, self.segments[-1].length)
        self.close_tail(state)
        if self._mapping.durable:
            self.flush()
        return target.number + 1 + stay * STAYING

    def rewind(self, target: Segment) -> None:
        """After a rollback: drop newer points, empty this one. Clearing up raises no errors."""
        self._absorbing = None, NO_ROWS
        while self.segments[-1] is not target:
            self.segments.pop().remove()
        with contextlib.suppress(StorageError, StateError):  # `attach` knows a point that the buffer is at, whatever its tail says
            target.write_tail(target.state.identity, 0)
        target.before, target.length = target.state.identity, 0

    # -- ending ------------------------------------------------------------------------------------------------------

    def take_over(self, other: RestorePoints) -> None:
        """Go on with the points of a file that this one replaces. Both have them until `disown`."""
        self.segments, self.stamps, self.stamp = list(other.segments), other.stamps, other.stamp

    def disown(self) -> None:
        """Another file has taken the points over: do not close them."""
        self.segments = []

    def clear(self) -> None:
        """Remove all restore points, those of other files under this name too."""
        while self.segments:
            self.segments.pop().remove()
        with contextlib.suppress(StorageError):
            for _, name in self._files():
                unlink(name)
        self.attached = True

    def release(self) -> None:
        """Keep no descriptor open from now on."""
        self._keeps_descriptors = False
        for segment in self.segments:
            segment.file.close()

    def forget(self) -> None:
        """Close all descriptors; the files stay."""
        while self.segments:
            self.segments.pop().file.close()


def _chain(segments: Sequence[Segment], ends: tuple[int, ...], here: int = -1) -> list[Segment]:
    """Those of the segments, oldest first, that lead back from one of the states `ends`; or from
    `here`, if one of them is that very point.

    Between two of them there may be one whose frames the older one has absorbed.
    """
    chain: list[Segment] = []
    for segment in reversed(segments):
        if not chain:
            if segment.state.identity == here:
                segment.length = 0  # the buffer is at this point itself: whatever came after does not matter
                chain = [segment]
            elif segment is segments[-1] and segment.before in ends:
                chain = [segment]
            continue
        leads_to = [i for i, later in enumerate(chain) if later.state.identity == segment.before]
        if not leads_to:
            break
        chain = [segment, *chain[leads_to[0] :]]
    return chain
