"""Reading rows of a mapped file."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ..arrays import Bytes, Ints, Words
from ..errors import CorruptionError, LeanReplayError, RowError
from ..kernels import checksums
from ..kernels import rows as row_kernels
from .layout import BUCKETS, round_up
from .mapping import Mapping
from .paging import ReadAhead
from .state import State
from .store import Arrays

ALWAYS: Bytes = np.zeros(0, np.uint8)  # no row is known to be right

_Arrangement = tuple[tuple[int, int, int], Ints, list[tuple[tuple[int, ...], np.dtype[Any], int]], int]


class Reading:
    """Rows that were read: fields first to last of each, in one piece of memory; where a row is
    bad, not what they should be."""

    __slots__ = ("_blocks", "bad", "first", "index", "last", "out", "places", "rows", "sums", "wrong")

    def __init__(self, rows: Ints, arrangement: _Arrangement) -> None:
        n = rows.shape[0]
        self.rows, ((_, self.first, self.last), self.places, self._blocks, size) = rows, arrangement
        self.out: Bytes = np.empty(size, np.uint8)
        self.index: Ints = np.empty((2, n), np.int64)  # positions and tags
        self.sums: Words = np.empty(n, np.uint64)
        self.bad: Bytes = np.empty(n, np.uint8)
        self.wrong = 0  # how many are bad

    def arrays(self) -> Arrays:
        """An array per field."""
        return [np.ndarray(shape, dtype, self.out, place) for shape, dtype, place in self._blocks]

    def replace(self, i: int, other: Reading) -> None:
        """Put the single row of another reading, of all fields, in the place of the i-th row."""
        for array, single in zip(self.arrays(), other.arrays()[self.first : self.last], strict=True):
            array[i] = single[0]
        self.index[:, i] = other.index[:, 0]


class Columns:
    """The columns of a mapped file, for reading.

    verified: a byte per row, 1 if it need not be verified any more; empty: each read verifies.
    """

    def __init__(self, mapping: Mapping) -> None:
        self.mapping, self.layout, self.fields = mapping, mapping.layout, mapping.layout.fields
        self.ahead, self.verified = ReadAhead(mapping), ALWAYS
        self._arrangement = self._arrange(0, 0, 0)  # the last one, as many batches are alike

    def blank(self, rows: Ints, field: int | None = None) -> Reading:
        """A reading of rows, of all fields or of one, to be filled."""
        n = rows.shape[0]
        first, last = (0, self.fields) if field is None else (field, field + 1)
        arrangement = self._arrangement  # taken and put back whole, since a signal handler may read, too
        if arrangement[0] != (n, first, last):
            arrangement = self._arrangement = self._arrange(n, first, last)
        return Reading(rows, arrangement)

    def read(self, rows: Ints, field: int | None, high: int) -> Reading:
        """Read rows as they are now, and verify those that are not known to be right."""
        found = self.blank(rows, field)
        if self.ahead.advised:
            self.ahead.advise_rows(rows, found.first, found.last)
        start = time.perf_counter()
        found.wrong = row_kernels.read_rows(
            self.mapping.view, self.mapping.cols, found.first, found.last, rows, found.out, found.places, found.index, found.sums,
            found.bad, high, self.verified,
        )  # fmt: skip
        if found.wrong < 0:
            raise outside(rows, high, self.mapping.name)
        seconds = time.perf_counter() - start
        if seconds > 1e-4 or self.ahead.advised:
            self.ahead.note(seconds, rows.shape[0], high)
        return found

    def find_changed(self, found: Reading) -> None:
        """Mark rows bad whose position, tag or checksums are others by now."""
        found.wrong = int(
            row_kernels.find_changed(
                self.mapping.view, self.mapping.cols, found.first, found.last, found.rows, found.index, found.sums, found.bad
            )
        )  # fmt: skip

    def _arrange(self, n: int, first: int, last: int) -> _Arrangement:
        """Where in one piece of memory each field's array lies, at multiples of 64 bytes."""
        at, places, blocks = 0, [], []
        for field in self.layout.schema.fields[first:last]:
            blocks.append(((n, *field.shape), field.dtype, at))
            places.append(at)
            at = round_up(at + n * field.nbytes, 64)
        return (n, first, last), np.array(places, np.int64), blocks, at

    def scan(self) -> tuple[int, int, Words]:
        """Live rows, one past the highest of them, and their digests: one pass over the index."""
        digests = np.zeros(BUCKETS, np.uint64)
        live, high = row_kernels.scan_index(self.mapping.view, self.mapping.cols, self.layout.max_size, digests)
        return int(live), int(high), digests

    def log(self, state: State) -> Ints | None:
        """The policy's log, a copy; None if its hash is not the one that the state names."""
        at = self.layout.log[0]
        entries = self.mapping.view[at : at + 16 * state.log_entries].view(np.int64).reshape(-1, 2).copy()
        return entries if checksums.hash_log(np.uint64(0), entries) == state.log_hash else None

    def log_error(self) -> CorruptionError:
        """The error for a log whose hash is another."""
        return CorruptionError(f"{self.mapping.name}: the log fails its checksum; restore the file from a copy")

    def error(self, found: Reading) -> LeanReplayError:
        """The error for bad rows: free ones, else wrong checksums."""
        bad = np.flatnonzero(found.bad)
        free = found.rows[bad[found.index[0, bad] < 0]].tolist()
        if free:
            return RowError(f"rows {free[:10]} of {self.mapping.name} are free; the live ones are in meta['idx'] of a sample")
        return CorruptionError(
            f"{self.mapping.name}: rows {found.rows[bad][:10].tolist()} do not match their checksums; "
            "buffer.check() lists all wrong rows; restore the file from a copy made with save()"
        )


def outside(rows: Ints, high: int, name: str) -> RowError:
    """The error for rows that are not all in use: maybe chosen before the writer went back."""
    return RowError(f"rows from {rows.min()} to {rows.max()} of {name}, but the rows in use are 0 to {high - 1} now")
