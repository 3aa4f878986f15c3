"""Reading rows of a mapped file, and what every reader of rows does around it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from ..arrays import Bytes, Ints, Words
from ..errors import CorruptionError, LeanReplayError, RowError
from ..kernels import checksums
from ..kernels import rows as row_kernels
from . import locks
from .layout import BUCKETS, H_HIGH, H_SIZE, H_STATE, round_up
from .mapping import Mapping
from .paging import ReadAhead
from .state import State
from .store import Arrays

_NARROW = 64  # bytes of a field that is read to verify the index with it
_VERIFIED = 1 << 16  # rows that are read together for that
PIECE = 1 << 18  # rows of the index that are looked at together

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
    """The columns of a mapped file, for reading."""

    def __init__(self, mapping: Mapping) -> None:
        self.mapping, self.layout, self.fields = mapping, mapping.layout, mapping.layout.fields
        self.ahead = ReadAhead(mapping)
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
        """Read rows as they are now, and verify every checksum."""
        found = self.blank(rows, field)
        if self.ahead.advised:
            self.ahead.advise_rows(rows, found.first, found.last)
        start = time.perf_counter()
        found.wrong = row_kernels.read_rows(
            self.mapping.view, self.mapping.cols, found.first, found.last, rows, found.out, found.places, found.index, found.sums, found.bad
        )  # fmt: skip
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


class Indexed(Protocol):
    """What is looked at here: a Reader or a Writer."""

    state: State
    columns: Columns

    def index(self) -> tuple[Ints, Ints]: ...

    def snapshot(self, rows: Ints | slice) -> tuple[Ints, Ints]: ...

    def read(self, rows: Ints, field: int | None = None) -> tuple[Arrays, Ints]: ...


def verify_index(store: Indexed) -> None:
    """Raise CorruptionError unless the index adds up to the header, as it does not if pages were
    lost.

    One pass over the index, and over the narrowest field unless that is large: then a wrong
    position or tag shows when read.
    """
    state, columns = store.state, store.columns
    live, high, digests = columns.scan()
    if live != state.size or high > state.high or not np.array_equal(digests, state.digests):
        raise CorruptionError(
            f"{columns.mapping.path}: the rows do not add up to the header (a power cut since the last flush?); "
            "buffer.check() lists the wrong rows; restore the file from a copy, or read it with mode='r'"
        )
    sizes = [f.nbytes for f in columns.layout.schema.fields]
    narrow = int(np.argmin(sizes))
    if sizes[narrow] <= _NARROW:  # checksums cover position and tag, with the bytes of a field
        positions = store.index()[0]
        for start in range(0, high, _VERIFIED):
            store.read(start + np.flatnonzero(positions[start : start + _VERIFIED] >= 0), narrow)


class LiveRows:
    """Which rows are live, remembered for the last state in which there were gaps.

    error: what is raised where the rows do not add up. A reader may have met a commit or a
        rollback.
    """

    def __init__(self, name: str, error: type[LeanReplayError]) -> None:
        self._name, self._error = name, error
        self.known: tuple[int, Ints] | None = None  # identity of a state, and its live rows

    def pieces(self, store: Indexed) -> list[slice]:
        """The rows below `high` in pieces of bounded size."""
        high = store.state.high
        return [slice(start, min(high, start + PIECE)) for start in range(0, high, PIECE)]

    def all(self, store: Indexed) -> Ints | None:
        """The live rows in order; None where they are simply 0 to size - 1."""
        deadline = time.monotonic() + locks.PATIENCE
        while True:
            now, known = store.state.at, self.known
            size, identity = now[H_SIZE], now[H_STATE]  # the sequence comes again after a commit that could not be made durable
            if size == now[H_HIGH]:
                return None
            if known is not None and known[0] == identity:
                return known[1]
            found, n = np.empty(size, np.int64), 0
            for piece in self.pieces(store):
                live = np.flatnonzero(store.snapshot(piece)[0] >= 0)
                part = found[n : n + live.shape[0]]
                np.add(live[: part.shape[0]], piece.start, out=part)
                n += live.shape[0]
            same = store.state.identity == identity
            if n == size and same:
                self.known = (identity, found)
                return found
            if same or time.monotonic() > deadline:
                raise self._error(
                    f"{self._name}: {n} live rows, but the header counts {size}; "
                    "buffer.check() lists what is wrong; restore the file from a copy made with save()"
                )

    def pick(self, store: Indexed, n: int, draw: Callable[[int, Ints], None]) -> Ints:
        """n live rows by a draw: draw(among, out) fills `out` with numbers below `among`, and of
        more numbers begins with the same.

        Where few of the rows below `high` are free, numbers that hit one are passed over: that
        costs O(n), a list of the live rows O(rows) after every commit. Which way is taken follows
        from the live rows alone.
        """
        state = store.state
        size, high = state.size, state.high
        k = n * high // size + 16 if high < 8 * size and n <= size // 2 else high
        while k < high:
            rows = np.empty(k, np.int64)
            draw(high, rows)
            found = rows[store.snapshot(rows)[0] >= 0]
            self._require_same(store, size, high)
            if found.shape[0] >= n:
                return found[:n].copy()
            k *= 2
        rows = np.empty(n, np.int64)
        draw(size, rows)
        live = self.all(store)
        self._require_same(store, size, high)
        return rows if live is None else live[rows]

    def _require_same(self, store: Indexed, size: int, high: int) -> None:
        """While rows were drawn none may have come or gone: a reader draws again."""
        if (size, high) != (store.state.size, store.state.high):
            raise RowError(f"rows of {self._name} came or went while some were drawn")
