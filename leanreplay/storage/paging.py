"""When pages of a map come: written ones all at once, read ones ahead where reads are slow."""

from __future__ import annotations

import numpy as np

from ..arrays import Ints
from . import system
from .layout import round_up
from .mapping import Mapping

_AHEAD = 4 << 20  # bytes to fault in ahead of the rows being filled
_LARGE = 512  # bytes of an entry from which on reading ahead of a random one is a waste
SLOW_ROW = 20e-6  # seconds a row: a read that takes longer may have come from the device
_FAST_ROW = 4e-6  # seconds a row: a read that takes less came from memory
_FAST_READS = 16  # so many fast reads in a row end the advice


class WritePages:
    """The pages that a writer is about to write. One by one their faults would cost more than the
    copies.

    The file system makes pages as large as the writes that it gets, so whole huge pages of zeros
    are written first (free rows, and a void journal): a hundred times faster than faults, and
    random reads then miss the TLB less.
    """

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping
        self.journal_ready = 0  # records of the journal whose pages are there
        self.rows_ready = 0  # rows whose pages are there
        self._zeros_to = [0] * len(mapping.layout.columns)  # file offset up to which a column has been written with zeros

    def get(self, rows: Ints, size: int, high: int) -> None:
        """Get the pages for a commit of these rows (-1: none) into `size` rows up to `high`."""
        overwritten = min(int(np.count_nonzero(rows >= 0)), size)
        if overwritten > self.journal_ready:
            self.extend_journal(overwritten)
        top = int(rows.max()) + 1
        if top > self.rows_ready:
            self._extend_rows(top, high)

    def extend_journal(self, rows: int) -> None:
        """Get those of the journal for a commit that overwrites so many rows."""
        first, layout = self.journal_ready, self._mapping.layout
        rows = min(layout.journal_rows, max(rows, 2 * first))
        start = layout.records_at + first * layout.record_bytes if first else layout.journal_rows_at
        stop = layout.records_at + rows * layout.record_bytes
        if self._mapping.path is not None and system.LINUX:
            self._write_zeros(start, stop)
        system.populate(self._mapping.require_map(), start, stop)
        self.journal_ready = rows

    def _extend_rows(self, top: int, high: int) -> None:
        """Get those of the rows up to `top`, and some ahead."""
        layout = self._mapping.layout
        start = max(self.rows_ready, high)
        stop = min(layout.max_size, top + max(1, _AHEAD // layout.row_bytes))
        for c, (at, size) in enumerate(layout.columns):
            first, last = at + start * size, at + stop * size
            if c < layout.fields and self._mapping.path is not None and system.LINUX:
                first = max(first, self._zeros_to[c])
                last = min(at + layout.max_size * size, round_up(last, system.HUGE_PAGE))
                if first < last:
                    self._write_zeros(first, last)
                    self._zeros_to[c] = last
            if first < last:
                system.populate(self._mapping.require_map(), first, last)
        self.rows_ready = stop

    def _write_zeros(self, start: int, stop: int) -> None:
        # A file system that never overwrites in place can be full although the file has its blocks.
        with system.storage_errors(f"writing to {self._mapping.path}"), self._mapping.file.descriptor() as fd:
            system.write_zeros(fd, start, stop)


class ReadAhead:
    """Asks the device for rows before they are read, all at once, where rows were found not to be
    in memory.

    A random read of a mapped file otherwise waits for one page after the other. Advice costs about
    a microsecond a row, which a file in memory would pay for nothing: so it is given only after a
    read that was slow, until several in a row are fast.
    """

    def __init__(self, mapping: Mapping) -> None:
        self._mapping, layout = mapping, mapping.layout
        self.large = [(at, size) for at, size in layout.columns[: layout.fields] if size >= _LARGE]
        self.advised = 0  # reads that are still to be advised
        self._waits = system.waits_for_disk()  # by the last slow read
        if mapping.path is not None:
            for at, size in self.large:
                system.advise(mapping.require_map(), "RANDOM", at, at + size * layout.max_size)
            # Nobody reads the journal but after a kill; reading ahead would make its first write
            # wait.
            system.advise(mapping.require_map(), "RANDOM", layout.journal_rows_at, layout.freed_at)

    def advise_rows(self, rows: Ints, first: int, last: int) -> None:
        """Ask for the large entries of these rows, of the fields first to last."""
        view, layout = self._mapping.require_map(), self._mapping.layout
        order = np.sort(rows)
        ends = np.flatnonzero(np.diff(order, append=order[-1:] + 2) > 1).tolist() if order.shape[0] else []
        for at, size in layout.columns[first:last]:
            begin = 0
            for end in ends if (at, size) in self.large else ():  # neighbours in one call
                system.advise(view, "WILLNEED", at + int(order[begin]) * size, at + (int(order[end]) + 1) * size)
                begin = end + 1

    def note(self, seconds: float, n: int, high: int) -> None:
        """Learn from a read of n rows: whether the next ones want advice."""
        if seconds > 1e-3 + SLOW_ROW * n:
            waits, self._waits = self._waits, system.waits_for_disk()
            if waits is None or self._waits is None or self._waits - waits > n // 8:  # else another process had the processor
                if not self.advised and self._mapping.path is not None:
                    self._advise_small_columns(high)
                self.advised = _FAST_READS
        elif self.advised and seconds < 1e-4 + _FAST_ROW * n:
            self.advised -= 1

    def _advise_small_columns(self, high: int) -> None:
        """Ask for whole columns of small entries: one pass instead of thousands of reads."""
        small = [(at, size) for at, size in self._mapping.layout.columns if size < _LARGE]
        if sum(size for _, size in small) * high <= system.memory_size() // 8:
            for at, size in small:
                system.advise(self._mapping.require_map(), "WILLNEED", at, at + size * high)
