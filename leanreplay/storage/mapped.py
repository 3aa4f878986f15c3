"""One mapped file as a store: what a reader and a writer of it have in common."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np

from ..arrays import NO_LOG, Ints
from ..errors import CorruptionError, LeanReplayError, RowError
from . import audit, locks
from .columns import Columns
from .journal import Journal
from .layout import H_HIGH, H_SEEN, H_SIZE, H_STATE
from .mapping import Mapping
from .state import State, WordInForce
from .store import Arrays, Problem

_NARROW = 64  # bytes of a field that is read to verify the index with it
_VERIFIED = 1 << 16  # rows that are read together for that


class MappedStore:
    """One mapped file as a store, as whoever is alone with it reads it. `state` is the one in force.

    uneven: what is raised where the live rows are not as many as the header counts.
    gaps: identity of the last state in which some rows below `high` were free, and its live rows.
    """

    writable: ClassVar[bool]
    uneven: ClassVar[type[LeanReplayError]] = CorruptionError
    seen, size, high = WordInForce(H_SEEN), WordInForce(H_SIZE), WordInForce(H_HIGH)

    def __init__(self, mapping: Mapping) -> None:
        self.mapping, self.path, self.layout = mapping, mapping.path, mapping.layout
        self.schema, self.max_rows, self.nbytes = self.layout.schema, self.layout.max_rows, self.layout.file_size
        self.state = State()
        self.columns, self.journal = Columns(mapping), Journal(mapping)
        self.gaps: tuple[int, Ints] | None = None

    def close(self) -> None:
        """Unmap and close."""
        self.mapping.close()

    def release(self) -> None:
        """Keep no descriptor open from now on: the map needs none."""
        self.mapping.file.close()

    # -- state -------------------------------------------------------------------------------------

    @property
    def extent(self) -> tuple[int, int]:
        now = self.state.at
        return now[H_SIZE], now[H_HIGH]

    @property
    def policy(self) -> list[int]:
        return self.state.policy

    @property
    def status(self) -> os.stat_result | None:
        return self.mapping.status

    def state_name(self) -> str:
        return self.state.name

    def was_replaced(self) -> bool:
        return False

    # -- reading -----------------------------------------------------------------------------------

    def read(self, rows: Ints, field: int | None = None) -> tuple[Arrays, Ints]:
        found = self.columns.read(rows, field, self.state.at[H_HIGH])
        if found.wrong:
            raise self.columns.error(found)
        return found.arrays(), found.index

    def index(self) -> tuple[Ints, Ints]:
        return self.mapping.index(self.high)

    def positions_of(self, rows: Ints) -> Ints:
        return self.mapping.positions[rows]

    def snapshot(self, rows: Ints | slice) -> tuple[Ints, Ints]:
        return self.mapping.positions[rows], self.mapping.tags[rows]

    def pieces(self) -> Iterator[tuple[int, Ints, Ints]]:
        high = self.high
        for start in range(0, high, audit.PIECE):
            yield start, *self.snapshot(slice(start, min(high, start + audit.PIECE)))

    def policy_log(self) -> Ints:
        entries = self.columns.log(self.state) if self.layout.log[1] else NO_LOG
        if entries is None:
            raise self.columns.log_error()
        return entries

    # -- live rows ---------------------------------------------------------------------------------

    def live_rows(self) -> Ints | None:
        deadline = time.monotonic() + locks.PATIENCE
        while True:
            now, known = self.state.at, self.gaps
            size, identity = now[H_SIZE], now[H_STATE]  # the sequence comes again after a commit that could not be made durable
            if size == now[H_HIGH]:
                return None
            if known is not None and known[0] == identity:
                return known[1]
            found, n = np.empty(size, np.int64), 0
            for start, positions, _ in self.pieces():
                live = np.flatnonzero(positions >= 0)
                part = found[n : n + live.shape[0]]
                np.add(live[: part.shape[0]], start, out=part)
                n += live.shape[0]
            same = self.state.identity == identity
            if n == size and same:
                self.gaps = (identity, found)
                return found
            if same or time.monotonic() > deadline:
                raise self.uneven(
                    f"{self.mapping.name}: {n} live rows, but the header counts {size}; "
                    "buffer.check() lists what is wrong; restore the file from a copy made with save()"
                )

    def pick_live(self, n: int, draw: Callable[[int, Ints], None]) -> Ints:
        """As the protocol says.

        Where few of the rows below `high` are free, numbers that hit one are passed over: that
        costs O(n), a list of the live rows O(rows) after every commit. Which way is taken follows
        from the live rows alone.
        """
        size, high = self.extent
        k = n * high // size + 16 if high < 8 * size and n <= size // 2 else high
        while k < high:
            rows = np.empty(k, np.int64)
            draw(high, rows)
            found = rows[self.snapshot(rows)[0] >= 0]
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
            raise RowError(f"rows of {self.mapping.name} came or went while some were drawn")

    # -- verifying ---------------------------------------------------------------------------------

    def verify_index(self) -> None:
        """As the protocol says.

        One pass over the index, and over the narrowest field unless that is large: then a wrong
        position or tag shows when read.
        """
        state, columns = self.state, self.columns
        live, high, digests = columns.scan()
        if live != state.size or high > state.high or not np.array_equal(digests, state.digests):
            raise CorruptionError(
                f"{self.path}: the rows do not add up to the header (a power cut since the last flush?); "
                "buffer.check() lists the wrong rows; restore the file from a copy, or read it with mode='r'"
            )
        sizes = [f.nbytes for f in self.schema.fields]
        narrow = int(np.argmin(sizes))
        if sizes[narrow] <= _NARROW:  # checksums cover position and tag, with the bytes of a field
            positions = self.index()[0]
            for start in range(0, high, _VERIFIED):
                self.read(start + np.flatnonzero(positions[start : start + _VERIFIED] >= 0), narrow)

    def check(self) -> list[Problem]:
        problems = audit.row_problems(self.wrong_rows()) + self.index_problems()
        return problems + audit.log_problems(self) + audit.structure_problems(self.mapping)

    def distrust(self) -> None:
        if self.columns.verified.shape[0]:
            self.columns.verified = np.zeros(self.layout.max_size, np.uint8)

    def wrong_rows(self) -> list[int]:
        """Rows whose bytes do not match their checksums."""
        return [row for piece in audit.pieces(self.layout) for row in audit.wrong_rows(self.columns, piece)]

    def index_problems(self) -> list[Problem]:
        """What is wrong with the rows together."""
        return audit.index_problems(self.columns, self.state)
