"""The writer of a mapped file: commit, restore points, recovery.

A commit writes five things in this order: the journal (what every row that it changes was), the
journal's seal, the new rows, their index entries, a new header. A memory fence stands between any
two; without it the compiler may reorder the stores. Either each step is a kernel call of its own,
or one kernel call makes them all. If the process dies in between, recovery writes the journal's
rows back.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from ..arrays import NO_ROWS, Bytes, Ints
from ..errors import FormatError, ModeError, StorageError
from ..kernels import commit
from . import locks, system
from .journal import NO_STAMPS, BeforeImage
from .layout import (
    BUCKETS,
    COMMIT_BYTES,
    H_DIGESTS,
    H_HIGH,
    H_POLICY,
    H_PREVIOUS,
    H_SEEN,
    H_SEQ,
    H_SIZE,
    H_STATE,
    H_TARGET,
    HEADER_WORDS,
    HEADERS,
    J_COUNT,
    J_FREED,
    J_HASH,
    J_LIVE,
    J_PREVIOUS,
    J_SEQ,
)
from .mapped import MappedStore
from .mapping import Mapping
from .paging import WritePages
from .reader import Reader, newest_state
from .restore_points import STAYING, RestorePoints
from .segment import Segment
from .state import REPLACED, State
from .store import Change, PlannedBatch, Problem, Survivors, refuse_within

ONE_CALL = True  # whether a commit without anything special is one kernel call; tests that stop within one want the steps
_NO_DATA: list[Bytes] = [np.zeros(0, np.uint8)] * 4  # the kernel that makes a whole commit takes up to four fields
_CHUNK = 4096  # rows that are looked at together


class Writer(MappedStore):
    """A mapped file that this process alone writes to. `state` is in force, `next_state` is being
    made."""

    writable = True

    def __init__(self, mapping: Mapping, points: int, verify_always: bool) -> None:
        super().__init__(mapping)
        if not verify_always:
            self.columns.verified = np.zeros(self.layout.max_size, np.uint8)
        self.durable, self.next_state = mapping.durable, State()
        self.pages, self.points = WritePages(mapping), RestorePoints(mapping, points)
        self.guard: locks.Guard | None = None
        t = self.layout
        words = (J_LIVE, J_COUNT, J_HASH, H_SIZE, H_HIGH, H_STATE, H_DIGESTS, BUCKETS)
        self._offsets: Ints = np.array([t.journal_rows_at, t.records_at, t.record_bytes, t.journal, *words])
        self._policy: list[int] = [-1]  # the policy's words in the next state, if it was made from the state in force
        self._scratch: npt.NDArray[np.int32] | None = None
        self._settled = False  # whether the state in memory is that of the file: not within a commit, nor after one that was interrupted
        self._verified = False

    def begin(self, state: State) -> None:
        """A file that was just made holds nothing: there is nothing to recover or to verify."""
        self.state, self._settled, self._verified = state, True, True

    @property
    def parts(self) -> list[Writer]:
        return [self]

    def unguard(self) -> None:
        if self.guard is not None:
            self.guard.close()

    def close(self) -> None:
        """Unmap and close. Restore points in memory are lost."""
        if self.mapping.map is None:
            return
        if not self._settled:
            self._refuse_within()
        self.points.forget()
        super().close()
        self.unguard()

    def release(self) -> None:
        self.points.release()
        super().release()

    def as_reader(self) -> Reader:
        """In a forked child: never write, and leave the parent's lock and undo files alone."""
        self.points.forget()
        self.unguard()
        reader = Reader(self.mapping)
        reader.state = self.state
        return reader

    # -- state -------------------------------------------------------------------------------------

    @property
    def sequence(self) -> int:
        return self.state.at[H_SEQ] if self._settled else -1

    def stay(self) -> None:
        self.mapping.stay(self.seen)

    def recover_or_refresh(self) -> None:
        if not self._settled:
            self._refuse_within()
            self.recover()
        elif self.mapping.map is None:
            self.mapping.require_map()

    def _refuse_within(self) -> None:
        """Raise ModeError if a change of this file is under way further up the stack."""
        refuse_within(self, _CHANGES, self.path)

    def recover(self) -> None:
        """Undo a commit, finish a rollback, that did not end. It can simply run again."""
        self._settled = False
        self._policy = [-1]
        self.next_state = State()  # the other may be in force twice, after an exception within `swap_headers`
        self.state = newest_state(self.mapping, patient=False)
        if self.state.target != 0:
            target = self.points.attach_for_rollback(self.state)
            self.apply_rollback(target, self.points.frames(target))
        elif (before := self.journal.pending(self.state)) is not None:
            before.write_back(self.mapping)
            self.mapping.barrier()  # before the journal is void, or a power cut could keep only that
        self.journal.clear()
        self.points.renew_stamps()  # rows may have been stamped for a commit that never kept their records
        self.gaps = None
        self.distrust()
        self._settled = True

    def check(self) -> list[Problem]:
        self.recover_or_refresh()
        problems = super().check()
        if problems:
            self.distrust()  # a row that was right when it was read may be among them
        return problems

    def verify_index(self) -> None:
        if not self._verified:
            super().verify_index()
            self._verified = True

    # -- writing -----------------------------------------------------------------------------------

    def scratch(self, renew: bool = False) -> npt.NDArray[np.int32]:
        if renew or self._scratch is None:
            self._scratch = np.zeros(self.layout.max_size, np.int32)
        return self._scratch

    def survivors(self, rows: Ints, freed: Ints, start: int) -> Survivors:
        samples, taken, positions = np.empty((3, rows.shape[0]), np.int64)
        n = int(commit.keep_last(rows, freed, self.mapping.positions, self.scratch(), start, samples, taken, positions))
        k = max(0, n)
        return Survivors(n, taken[:k], samples[:k], positions[:k])

    def commit_planned(self, batch: PlannedBatch) -> bool:
        if not self._fits_one_call(len(batch.data)):
            return False
        after, policy, rows, start, tags, first, data, max_rows = batch
        self._begin(after + rows.shape[0], policy, after)
        return self._commit_at_once(rows, start, NO_ROWS, tags, first, data, max_rows)

    def commit(self, change: Change) -> None:
        """Make one commit, by one kernel call where nothing has to happen between its steps."""
        self._begin(change.seen, change.policy, change.after)
        rows, data = change.rows, change.data_in_order()
        if (
            data and self._fits_one_call(len(data))
            and self._commit_at_once(rows, 0, change.positions, change.tags, 0, data, rows.shape[0])
        ):  # fmt: skip
            return
        before = self._record(change)
        if self.points.must_keep_old_rows(self.state):
            self.points.keep(before, change, self.state)
        if before is not None:
            self.journal.seal(before)
            self._write_rows(change, before)
        if change.log.shape[0]:
            self.append_log(change.log)
        if before is not None or change.log.shape[0]:
            self.mapping.barrier()
        self.publish(self.next_state)
        self.swap_headers()
        self._settled = True

    def _begin(self, seen: int, policy: Sequence[int], after: int | None) -> None:
        """Begin a commit: fill the next state with what is known of it.

        after: samples seen when the commit was planned. From here on a signal handler can change
            nothing; until here it could.
        """
        self.mapping.stay(self.state.at[H_SEEN])
        self._settled = False
        now, coming = self.state.at, self.next_state.at
        if self.mapping.map is None or (after is not None and now[H_SEEN] != after):
            self._settled = True
            raise ModeError(
                f"{self.mapping.name} was changed or closed while a batch was being added, by a signal handler or a dataset; "
                "the batch was not added"
            )
        coming[:] = now
        coming[H_SEQ], coming[H_PREVIOUS], coming[H_TARGET], coming[H_SEEN] = now[H_SEQ] + 1, now[H_STATE], 0, seen
        if policy != self._policy:
            self.next_state.words[H_POLICY:H_DIGESTS] = policy
            self._policy = list(policy)
        seal = self.journal.seal_at
        seal[J_SEQ], seal[J_PREVIOUS], seal[J_FREED] = coming[H_SEQ], now[H_STATE], 0

    def _fits_one_call(self, fields: int) -> bool:
        """Whether a commit needs nothing between its steps, so that one kernel call makes it."""
        return ONE_CALL and fields <= len(_NO_DATA) and not self.durable and not self.points.must_keep_old_rows(self.state)

    def _commit_at_once(
        self, rows: Ints, start: int, positions: Ints, tags: Ints, first: int, data: Sequence[Bytes], max_rows: int
    ) -> bool:  # fmt: skip
        """Make the commit that was begun by one kernel call; False for a wrong plan."""
        mapping, pages, coming = self.mapping, self.pages, self.next_state
        slots = self._scratch if self._scratch is not None else self.scratch()
        s0, s1, s2, s3 = (*data, *_NO_DATA[len(data) :])
        count = -2
        while count == -2:
            count = commit.commit_rows(
                mapping.mem, mapping.cols, rows, slots, start, positions, tags, first, s0, s1, s2, s3, self.journal.seal_words,
                coming.words, HEADERS[coming.at[H_SEQ] % 2], max_rows, pages.journal_ready, pages.rows_ready, self._offsets,
                self.columns.verified,
            )  # fmt: skip
            if count == -2:
                pages.get(rows, self.size, self.high)
        if count < 0:
            return False
        self.swap_headers()
        self._settled = True
        return True

    def _record(self, change: Change) -> BeforeImage | None:
        """Write down in the journal what a change will overwrite; None if that is nothing."""
        if not change.rows.shape[0] and not change.freed.shape[0] and change.update is None:
            return None
        touched = change.rows if change.update is None else np.concatenate([change.rows, change.update.rows])
        if touched.shape[0]:
            self.pages.get(touched, self.size, self.high)
        stamps = self.points.stamps if self.points.must_keep_old_rows(self.state) else NO_STAMPS
        return self.journal.record(change, touched, self.next_state.digests, stamps, self.points.stamp)

    def _write_rows(self, change: Change, before: BeforeImage) -> None:
        """Write what a change says of rows, and count them in the next state."""
        mapping, coming, digests = self.mapping, self.next_state, self.next_state.digests
        for part, sources in change.pieces(max(1, COMMIT_BYTES // self.layout.row_bytes)):
            rows, positions, tags = change.rows[part], change.positions[part], change.tags[part]
            for f, (source, samples) in enumerate(sources):
                commit.write_field(mapping.mem, mapping.cols, f, rows, samples, source, positions, tags, digests)
        if change.rows.shape[0]:
            commit.write_index(mapping.mem, mapping.cols, change.rows, change.positions, change.tags, self.columns.verified)
        if change.update is not None:
            rows = change.update.rows
            same = mapping.positions[rows], mapping.tags[rows]
            for f, (source, samples) in change.update.sources.items():
                commit.write_field(mapping.mem, mapping.cols, f, rows, samples, source, *same, digests)
        high = max(self.high, before.top)
        if before.freed:
            mapping.positions[change.freed] = -1
            while high and not (mapping.positions[max(0, high - _CHUNK) : high] >= 0).any():
                high = max(0, high - _CHUNK)
            while high and mapping.positions[high - 1] < 0:
                high -= 1
        coming.size, coming.high = self.size + before.count - before.live - before.freed, high

    def append_log(self, entries: Ints) -> None:
        """Write entries behind those that the header counts, and count them in the next state."""
        at, slots = self.layout.log
        count = self.state.log_entries
        if count + entries.shape[0] > slots:
            raise FormatError(f"{self.path}: a log of {slots} entries cannot take {entries.shape[0]} more behind {count}")
        start = at + 16 * count
        self.mapping.mem[start : start + 16 * entries.shape[0]].view(np.int64).reshape(-1, 2)[:] = entries
        self.next_state.append_log(entries)

    def publish(self, state: State) -> None:
        """Write a header: its state counts. Where it cannot be made durable, the old one does."""
        at = state.slot()
        before = self.mapping.mem[at : at + 8 * HEADER_WORDS].copy() if self.durable else None
        state.seal(self.mapping.mem, at)
        if before is not None:
            try:
                self.mapping.sync()
            except StorageError:
                self.mapping.mem[at : at + 8 * HEADER_WORDS] = before
                raise

    def swap_headers(self) -> None:
        """The state that was just published is the one in force."""
        self.state, self.next_state = self.next_state, self.state

    def flush(self) -> None:
        self.mapping.require_map()
        self.points.attach(self.state)
        with system.storage_errors(f"flushing {self.path or 'a buffer in memory'}"):
            self.points.flush()
            self.mapping.sync()
        self.points.synced = True

    def mark_gone(self) -> None:
        if self.path is None:
            gone = self.state.copy()
            gone.sequence, gone.target = gone.sequence + 1, REPLACED
            gone.seal(self.mapping.mem, gone.slot())

    # -- restore points ----------------------------------------------------------------------------

    def mark(self, kept: Collection[str] = ()) -> str:
        self.stay()
        self.points.mark(self.state, kept)
        if self.durable and not self.points.synced:
            self.flush()
        return self.state.name

    def trim(self, kept: Collection[str]) -> None:
        self.points.attach(self.state)
        self.points.trim(kept)

    def has_point(self, name: str) -> bool:
        self.points.attach(self.state)
        return any(segment.state.name == name for segment in self.points.segments)

    def rollback(self, name: str, seen: int, kept: Collection[str] = ()) -> None:
        self.stay()
        found = self.points.find(name, seen, self.state)
        if found is None:
            return
        target, frames = found
        self._settled = False
        number = self.points.begin_rollback(self.state, target, frames, kept)
        self._publish_target(target, number, self.state.identity)
        self.apply_rollback(target, frames)
        self._settled = True

    def _publish_target(self, target: Segment, number: int, previous: int) -> None:
        """Publish the target's state. number 0: the rows have arrived there. previous: the state
        that the newest restore point leads back from."""
        coming, sequence = self.next_state, self.state.sequence + 1
        np.copyto(coming.words, target.state.words)
        coming.tag, coming.sequence, coming.target, coming.previous = self.layout.tag, sequence, number, previous
        self._policy = [-1]
        self.publish(coming)
        self.swap_headers()

    def apply_rollback(self, target: Segment, frames: list[BeforeImage]) -> None:
        """Write the rows of a restore point back, and say that they have arrived."""
        for frame in frames:
            frame.write_back(self.mapping)
        self.mapping.barrier()
        stay = self.state.target >= STAYING
        self._publish_target(target, 0, self.state.previous if stay else self.state.identity)
        if not stay:
            self.points.rewind(target)
        self.points.renew_stamps()
        self.gaps = None
        self.distrust()

    def give_away_points(self) -> None:
        """Another writer has taken the restore points over."""
        self.points.disown()

    def drop_points(self) -> None:
        self.points.clear()


_CHANGES = {f.__code__ for f in (Writer.commit, Writer.commit_planned, Writer.recover, Writer.rollback)}  # which nothing may come within
