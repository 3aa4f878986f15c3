"""What rows were before a commit: in the file's journal, and, in the same form, in the frames of
restore points.

Recovery writes a BeforeImage back, and so does a rollback; a reader that meets a commit looks a row
up in it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np

from ..arrays import Bytes, Ints, Words
from ..kernels import before_images, checksums, commit
from ..kernels import rows as row_kernels
from .layout import J_COUNT, J_FREED, J_HASH, J_LIVE, J_TAG, SEAL_WORDS, Layout, round_up
from .mapping import Mapping
from .state import State
from .store import Change

NO_STAMPS: Bytes = np.zeros(0, np.uint8)
_NO_USE: Bytes = np.zeros(0, np.uint8)


@dataclass(eq=False)
class BeforeImage:
    """The old bytes of rows, where they stand in `source`.

    count: rows listed at rows_at. The first `live` of them have records at records_at, the others
        were free.
    freed: rows listed at the layout's `freed_at`, with position and tag: they were live, and their
        bytes are still in the columns.
    new: of the live rows the first ones, which the newest restore point does not have yet. top: one
        past the highest row listed.
    hash: of all this.
    use: (count,) of uint8, 1 for rows to write back.
    """

    layout: Layout
    source: Bytes
    rows_at: int
    records_at: int
    live: int
    count: int
    freed: int = 0
    new: int = 0
    top: int = 0
    hash: int = 0
    use: Bytes = field(default_factory=lambda: _NO_USE)

    @property
    def rows(self) -> Ints:
        """The rows listed: a view."""
        return self.source[self.rows_at : self.rows_at + 8 * self.count].view(np.int64)

    @property
    def freed_index(self) -> Ints:
        """(freed, 3) of row, position and tag: a view."""
        at = self.layout.freed_at
        return self.source[at : at + 24 * self.freed].view(np.int64).reshape(self.freed, 3)

    def names_rows_outside(self) -> bool:
        """Whether some row is none of the buffer."""
        rows = np.concatenate([self.rows, self.freed_index[:, 0]])
        return rows.shape[0] > 0 and (int(rows.min()) < 0 or int(rows.max()) >= self.layout.max_size)

    def computed_hash(self) -> int:
        """The hash of what stands there now."""
        found = int(
            before_images.hash_records(self.source, self.rows_at, self.records_at, self.layout.record_bytes, self.live, self.count)
        )  # fmt: skip
        if self.freed:
            found += int(before_images.hash_freed(self.source, self.layout.freed_at, self.freed))
        return found % 2**64

    def write_back(self, mapping: Mapping) -> None:
        """Make the rows what they were."""
        record = self.layout.record_bytes
        before_images.restore_rows(self.source, mapping.cols, self.rows_at, self.records_at, record, self.live, self.use, mapping.mem)
        if self.freed:
            before_images.restore_freed(self.source, mapping.cols, self.layout.freed_at, self.freed, mapping.mem)

    def exchange_digests(self, mapping: Mapping, digests: Words) -> None:
        """Do to the digests what `write_back` would do to them."""
        record = self.layout.record_bytes
        before_images.exchange_digests(
            self.source, mapping.cols, self.rows_at, self.records_at, record, self.live, self.use, mapping.view, digests
        )  # fmt: skip

    @functools.cached_property
    def index(self) -> tuple[Ints, Ints]:
        """All rows, freed ones last, and (n, 2) of position (-1: was free) and tag before."""
        before = np.full((self.count, 2), -1, np.int64)
        stride = self.layout.record_bytes
        at = self.records_at + stride - 16 - 8 * self.layout.fields
        before[: self.live] = np.ndarray((self.live, 2), np.int64, self.source, at, (stride, 8))
        freed = self.freed_index
        return np.concatenate([self.rows, freed[:, 0]]), np.concatenate([before, freed[:, 1:]])

    @functools.cached_property
    def free_rows(self) -> Ints:
        """Those of the rows that were free."""
        rows, before = self.index
        return rows[before[:, 0] < 0]

    def put_over(self, rows: Ints | slice, positions: Ints, tags: Ints) -> None:
        """Undo the commit in copies of the index of some rows."""
        changed, before = self.index
        if isinstance(rows, slice):
            mine = (changed >= rows.start) & (changed < rows.stop)
            at, before = changed[mine] - rows.start, before[mine]
        else:
            order = np.argsort(changed)
            at = np.flatnonzero(np.isin(rows, changed))
            before = before[order[np.searchsorted(changed, rows[at], sorter=order)]]
        positions[at], tags[at] = before.T

    def read_row(self, row: int, mapping: Mapping, out: Bytes, places: Ints, index: Ints) -> bool:
        """The old bytes of a row, field f to out[places[f]:], position and tag to index[:, 0];
        whether they match their checksums."""
        layout, size = self.layout, self.layout.record_bytes
        at = np.flatnonzero(self.rows[: self.live] == row)
        if at.shape[0]:
            start = self.records_at + int(at[0]) * size
            record = self.source[start : start + size].copy()
        else:
            freed = self.freed_index
            at = np.flatnonzero(freed[:, 0] == row)
            if at.shape[0] == 0:
                return False
            record = np.zeros(size, np.uint8)
            before_images.copy_records(mapping.view, mapping.cols, np.array([row]), record, 0, size)
            place = size - 16 - 8 * layout.fields
            record[place : place + 16].view(np.int64)[:] = freed[int(at[0]), 1:]
        # The record's columns stand one after the other: the columns of a file of one row, which
        # has the number `row`.
        cols = mapping.cols.copy()
        cols[:, 0] = np.cumsum([0, *[round_up(width, 8) for _, width in layout.columns[:-1]]])
        index[:, 0] = record[int(cols[-3, 0]) :][:16].view(np.int64)
        return bool(row_kernels.read_record(record, cols, row, out, places))


class Journal:
    """The journal of a file: what rows were before a commit, sealed before they change."""

    def __init__(self, mapping: Mapping) -> None:
        self._mapping, self.layout = mapping, mapping.layout
        self.seal_words: Words = np.zeros(SEAL_WORDS, np.uint64)  # of the commit that is being made
        self.seal_at = self.seal_words.data
        self.seal_at[J_TAG] = self.layout.tag
        self._counts: Ints = np.zeros(4, np.int64)
        self._changing: Bytes = np.zeros(self.layout.fields, np.uint8)

    def record(
        self, change: Change, touched: Ints, digests: Words, stamps: Bytes, stamp: int
    ) -> BeforeImage:  # fmt: skip
        """Write down what the rows that a change touches are, and take off the digests what it
        replaces.

        touched: its rows, then those of its update. stamps: per row; one other than `stamp` makes a
            row new to the newest restore point.
        """
        t, mapping, freed = self.layout, self._mapping, change.freed
        if change.update is not None:
            self._changing[:] = 0
            self._changing[list(change.update.sources)] = 1
        found = commit.save_rows(
            mapping.mem, mapping.cols, touched, change.rows.shape[0], self._changing, stamps, stamp,
            t.journal_rows_at, t.records_at, t.record_bytes, digests, self._counts,
        )  # fmt: skip
        new, live, count, top = self._counts.tolist()
        if freed.shape[0]:
            found = int(found) + int(before_images.save_freed(mapping.mem, mapping.cols, freed, t.freed_at, digests))
        return BeforeImage(
            t, mapping.view, t.journal_rows_at, t.records_at, live, count, freed.shape[0], new, top, int(found) % 2**64
        )  # fmt: skip

    def seal(self, before: BeforeImage) -> None:
        """Seal what was recorded: from here on recovery undoes the commit."""
        seal = self.seal_at
        seal[J_LIVE], seal[J_COUNT], seal[J_FREED], seal[J_HASH] = before.live, before.count, before.freed, before.hash
        checksums.seal_block(self._mapping.mem, self.layout.journal, self.seal_words, 0)
        self._mapping.barrier()

    def raw_seal(self) -> bytes:
        """The seal's bytes, valid or not."""
        return self._mapping.require_map()[self.layout.journal : self.layout.journal + 8 * SEAL_WORDS]

    def clear(self) -> None:
        """Void the journal."""
        self._mapping.mem[self.layout.journal : self.layout.journal + 8 * SEAL_WORDS] = 0

    def pending(self, state: State) -> BeforeImage | None:
        """What the journal holds, if that is a whole commit on top of this state."""
        t, s = self.layout, np.empty(SEAL_WORDS, np.uint64)
        if not checksums.read_block(self._mapping.view, t.journal, s):
            return None
        tag, sequence, previous, live, count, freed, digest, _ = s.tolist()
        if tag != t.tag or sequence != state.sequence + 1 or previous != state.identity:
            return None
        if live > count or count > t.journal_rows or freed > (t.max_size if t.log[1] else 0):
            return None
        before = BeforeImage(t, self._mapping.view, t.journal_rows_at, t.records_at, live, count, freed, hash=digest)
        before.use = np.ones(count, np.uint8)
        return None if before.names_rows_outside() or before.computed_hash() != digest else before
