"""What `check` looks for: wrong rows, rows that do not fit together, a damaged structure."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..arrays import Bytes, Ints
from ..errors import CorruptionError
from ..kernels import rows as row_kernels
from ..kernels.hashing import GOLDEN
from ..keys import STREAM_BITS
from . import system
from .columns import Columns
from .create import hash_structure
from .layout import BUCKETS, Layout
from .mapping import Mapping
from .state import State
from .store import Problem

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


PIECE = 1 << 18  # rows of the index that are looked at together
_PIECE_BYTES = 16 << 20  # of rows that are verified together
SORTED = 1 << 20  # positions that are sorted together


class Logged(Protocol):
    """Something with a policy's log."""

    def policy_log(self) -> Ints: ...


def pieces(layout: Layout) -> Iterator[slice]:
    """All rows, in pieces of bounded size."""
    step = min(PIECE, max(1, _PIECE_BYTES // layout.row_bytes))
    for start in range(0, layout.max_size, step):
        yield slice(start, min(layout.max_size, start + step))


def row_problems(rows: list[int]) -> list[Problem]:
    """The problem of rows that failed."""
    return [Problem("bytes do not match their checksums", tuple(rows))] if rows else []


def wrong_rows(columns: Columns, piece: slice) -> list[int]:
    """Which of these rows do not match their checksums."""
    view, start, stop = columns.mapping.require_map(), piece.start, piece.stop
    for at, size in columns.ahead.large:
        system.advise(view, "WILLNEED", at + start * size, at + stop * size)
    bad = np.zeros(stop - start, np.uint8)
    row_kernels.verify_rows(columns.mapping.view, columns.mapping.cols, start, stop, bad)
    found: list[int] = (start + np.flatnonzero(bad)).tolist()
    return found


def log_problems(store: Logged) -> list[Problem]:
    """What is wrong with the policy's log."""
    try:
        store.policy_log()
    except CorruptionError as error:
        return [Problem(str(error))]
    return []


def index_problems(columns: Columns, state: State) -> list[Problem]:
    """What is wrong with the rows together."""
    t, problems = columns.layout, []
    positions = columns.mapping.positions
    live, high, digests = columns.scan()
    late, first = [], t.params.get("first", 0)
    for start in range(0, t.max_size, PIECE):
        part = positions[start : start + PIECE]
        mine = (part >= 0) & (part >> STREAM_BITS == t.stream)
        late += (start + np.flatnonzero(mine & (part & (2**STREAM_BITS - 1) >= state.seen + first))).tolist()
    if late:
        problems.append(Problem(f"positions beyond seen={state.seen}", tuple(late)))
    twice = _held_twice(positions, live)
    if twice:
        problems.append(Problem("positions held twice", tuple(twice)))
    off = np.flatnonzero(digests != state.digests)
    if off.shape[0]:
        suspects = np.sort(np.concatenate([np.arange(bucket, t.max_size, BUCKETS) for bucket in off]))
        text = "rows that do not add up to the header's digests: among these are stale ones"
        problems.append(Problem(text, tuple(suspects.tolist())))
    if live != state.size:
        problems.append(Problem(f"{live} live rows, but the header counts {state.size}"))
    if high > state.high:
        problems.append(Problem(f"row {high - 1} is live, but the header's highest is {state.high - 1}"))
    return problems


def _held_twice(positions: Ints, live: int) -> list[int]:
    """Rows that hold a position twice. Sorted class by class: memory does not grow with rows."""
    classes = 1 + live // SORTED
    starts = range(0, positions.shape[0], PIECE)
    double = []
    for number in range(classes):
        parts = []
        for start in starts:
            part = positions[start : start + PIECE]
            part = part[part >= 0]
            if classes > 1:
                part = part[(part.view(np.uint64) * GOLDEN >> np.uint64(40)) % np.uint64(classes) == number]
            parts.append(part)
        ordered = np.sort(np.concatenate(parts))
        double.append(np.unique(ordered[1:][ordered[1:] == ordered[:-1]]))
    found = np.concatenate(double)
    if not found.shape[0]:
        return []
    return [row for start in starts for row in (start + np.flatnonzero(np.isin(positions[start : start + PIECE], found))).tolist()]


def structure_problems(mapping: Mapping) -> list[Problem]:
    """Compare HDF5's view with the table. Damaged bytes of its own can crash HDF5: those come
    first."""
    t = mapping.layout
    if hash_structure(lambda at, n: mapping.view[at : at + n], t) != t.structure_hash:
        return [Problem("the HDF5 structure was changed or damaged (leanreplay itself does not need it)")]
    import h5py

    problems = []
    try:
        with h5py.File(_Raw(mapping.view), "r") as file:
            for (at, _), column in zip(t.columns, t.dataset_names(), strict=True):
                dataset = file[column]
                if dataset.id.get_offset() != at or dataset.shape[0] != t.max_size:
                    problems.append(Problem(f"HDF5 sees {column} elsewhere than the table"))
    except (OSError, KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        problems.append(Problem(f"HDF5 cannot read {mapping.name}: {error}"))
    return problems


class _Raw(io.RawIOBase):
    """Bytes as a file that is only read."""

    def __init__(self, view: Bytes) -> None:
        self._view, self._at = view, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._view.shape[0]}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, into: WriteableBuffer) -> int:
        room = memoryview(into).cast("B")
        found = self._view[self._at : self._at + len(room)]
        room[: found.shape[0]] = found.data
        self._at += found.shape[0]
        return found.shape[0]
