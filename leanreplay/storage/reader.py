"""A reader of a mapped file, beside a writer in another process or without one.

A reader verifies every row that it reads. What it reads counts if no commit began or ended
meanwhile: else it looks again. The rows that a commit under way changes it takes from the journal.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..arrays import NO_LOG, NO_ROWS, Ints
from ..errors import FormatError, RecoveryError, RowError
from ..kernels import checksums
from . import audit, locks, system
from .columns import Reading
from .journal import BeforeImage
from .layout import H_SEQ, HEADER_WORDS, HEADERS
from .mapped import MappedStore
from .mapping import Mapping, open_file
from .state import REPLACED, State, WordInForce
from .store import Arrays, Problem

_TRIES = 3  # at a pair of headers of which one is being written


def newest_state(mapping: Mapping, patient: bool) -> State:
    """The state of the newest valid header. patient: one may be in the middle of being written."""
    mapping.require_map()
    newest, other = None, State()
    for _ in range(_TRIES if patient else 1):
        valid = 0
        for at in HEADERS:
            if not checksums.read_block(mapping.view, at, other.words) or other.tag != mapping.layout.tag:
                continue
            valid += 1
            if newest is None or other.sequence > newest.sequence:
                newest, other = other, newest or State()
        if valid == len(HEADERS):  # else the other one may have been read long before: look again
            break
    if newest is None:
        raise FormatError(f"{mapping.path}: neither header is valid; restore the file from a copy")
    problem = newest.problem(mapping.layout)
    if problem:
        raise FormatError(f"{mapping.path}: the header is wrong: {problem}; restore the file from a copy")
    return newest


class Moment(NamedTuple):
    """What a file said at one look. before: what a commit under way is changing."""

    headers: bytes
    seal: bytes
    before: BeforeImage | None


class Reader(MappedStore):
    """A mapped file that is only read. `state` is replaced as a whole: what is read when a signal
    handler reads, too, stays as it is."""

    writable = False
    uneven = RowError  # it may have met a commit or a rollback
    sequence = WordInForce(H_SEQ)

    def __init__(self, mapping: Mapping) -> None:
        super().__init__(mapping)
        self._known = b""  # the headers as last found, both valid

    @staticmethod
    @system.storage_errors("opening a buffer")
    def open(path: str, *, name: str | None = None) -> Reader:
        """Map an existing file. name: of the store; None if `path` is shared memory."""
        file, layout = open_file(path, name, writable=False)
        try:
            found = Reader(Mapping(file, layout, writable=False))
            found.refresh()
        except BaseException:
            file.close()
            raise
        return found

    def as_reader(self) -> Reader:
        """Itself."""
        return self

    # -- state -------------------------------------------------------------------------------------

    def recover_or_refresh(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        """Take the newest header; wait for a rollback under way."""
        raw = self._raw_headers()
        if raw == self._known:  # nothing was written since: a tenth of the cost
            return
        deadline, waiting = time.monotonic() + locks.PATIENCE, locks.Patience(self.mapping.guarded)
        while True:
            try:
                state = newest_state(self.mapping, patient=True)
            except FormatError:
                if time.monotonic() > deadline:
                    raise
            else:
                if state.target in (0, REPLACED):
                    known = raw if raw == self._raw_headers() else b""  # b"": written while they were read
                    self.state = state
                    self._known = known  # afterwards: should a signal handler come between, this is not what stands there, or right
                    return
                if waiting.over():
                    raise RecoveryError(f"{self.path}: a rollback was cut off; open it for writing once, to finish it")
            time.sleep(0.001)
            raw = self._raw_headers()

    def _raw_headers(self) -> bytes:
        view, size = self.mapping.require_map(), 8 * HEADER_WORDS
        return b"".join([view[at : at + size] for at in HEADERS])

    def was_replaced(self) -> bool:
        if self.path is None:
            return self.state.target == REPLACED
        return self.mapping.file.inode_there() not in (None, self.mapping.file.inode)

    def pending(self) -> bool:
        """Whether the file has a commit that has not ended."""
        return self.state.target not in (0, REPLACED) or self.journal.pending(self.state) is not None

    # -- moments -----------------------------------------------------------------------------------

    def moment(self) -> Moment:
        """What the file says now."""
        self.refresh()
        headers, seal = self._known, self.journal.raw_seal()
        return Moment(headers, seal, self.journal.pending(self.state))

    def is_now(self, moment: Moment) -> bool:
        """Whether no commit began or ended since."""
        return moment.headers != b"" and moment.headers == self._raw_headers() and moment.seal == self.journal.raw_seal()

    def _in_one_moment(self, look: Callable[[BeforeImage | None], None], what: str) -> None:
        """Look until no commit began or ended meanwhile. Raises RowError where there is no such
        moment for long."""
        deadline = time.monotonic() + locks.PATIENCE
        while True:
            moment = self.moment()
            look(moment.before)
            if self.is_now(moment):
                return
            if time.monotonic() > deadline:
                raise RowError(f"{self.mapping.name} changes faster than {what}; try again")

    # -- reading -----------------------------------------------------------------------------------

    def snapshot(self, rows: Ints | slice) -> tuple[Ints, Ints]:
        positions = tags = np.empty(0, np.int64)

        def look(before: BeforeImage | None) -> None:
            nonlocal positions, tags
            positions, tags = np.array(self.mapping.positions[rows]), np.array(self.mapping.tags[rows])
            if before is not None:
                before.put_over(rows, positions, tags)

        self._in_one_moment(look, "its index can be read")
        return positions, tags

    def read(self, rows: Ints, field: int | None = None) -> tuple[Arrays, Ints]:
        found = self.columns.read(rows, field, self.high)
        self._mark_changed(found)
        if found.wrong:
            self._read_again(found)
        return found.arrays(), found.index

    def _mark_changed(self, found: Reading) -> None:
        """Mark rows bad that a commit changed while they were read, and those of one under way.

        The latter are whole, and yet not what the header speaks of.
        """

        def look(before: BeforeImage | None) -> None:
            self.columns.find_changed(found)
            if before is not None:
                found.bad[np.isin(found.rows, before.index[0])] = 1
                found.wrong = int(np.count_nonzero(found.bad))

        self._in_one_moment(look, "rows can be compared")

    def _read_again(self, found: Reading) -> None:
        """Bad rows may have met a commit under way: try again for a while, longer while commits
        go on."""
        start, wait = time.monotonic(), 0.0001
        while True:
            moment = self.moment()
            for i in np.flatnonzero(found.bad).tolist():
                self._read_row_again(found, i, moment)
            if not found.bad.any():
                return
            left = found.bad == 1
            free_before = NO_ROWS if moment.before is None else moment.before.free_rows
            free = np.isin(found.rows[left], free_before).all() or ((found.index[0, left] < 0).all() and not self.pending())
            waited, settled = time.monotonic() - start, self.is_now(moment)
            if settled and (free or waited > locks.PATIENCE):
                break  # no commit began or ended since: they are free in the state of the header, or damaged
            if waited > 10 * locks.PATIENCE:
                break
            time.sleep(wait)
            wait = min(2 * wait, 0.01)
        rows = found.rows[found.bad == 1].tolist()
        if self.pending() and not (found.index[0, found.bad == 1] < 0).any():
            raise RecoveryError(
                f"{self.path}: rows {rows[:10]} are in the middle of a commit; open it for writing once, to undo it"
            )  # fmt: skip
        raise self.columns.error(found)

    def _read_row_again(self, found: Reading, i: int, moment: Moment) -> None:
        """Read the i-th row once more, from the journal if a commit is changing it."""
        row, before = found.rows[i : i + 1], moment.before
        if before is not None and row[0] in before.free_rows:
            found.index[0, i] = -1
            return
        if before is not None and row[0] in before.index[0]:  # its records stay as they are until the commit has ended
            again = self.columns.blank(row)
            again.index[:] = 0
            right = before.read_row(int(row[0]), self.mapping, again.out, again.places, again.index) and self.is_now(moment)
        else:
            again = self.columns.read(row, None, self.high)
            self._mark_changed(again)
            right = not again.wrong
        found.replace(i, again)
        found.bad[i] = not right

    def policy_log(self) -> Ints:
        deadline = time.monotonic() + locks.PATIENCE
        while self.layout.log[1]:
            entries = self.columns.log(self.state)
            if entries is not None:
                return entries
            if time.monotonic() >= deadline:
                raise self.columns.log_error()
            time.sleep(0.001)  # it may be a rollback
            self.refresh()
        return NO_LOG

    # -- auditing ----------------------------------------------------------------------------------

    def check(self) -> list[Problem]:
        """Everything wrong with this file.

        What is wrong with a row is found in a moment in which no commit changes that row; what
        concerns the rows together, in a moment without any commit. Where there is none for long,
        that is left to the writer. A single commit is waited for as long as its writer lives.
        """
        self.refresh()
        return super().check()

    def wrong_rows(self) -> list[int]:
        wrong = []
        for piece in audit.pieces(self.layout):
            moment = self.moment()
            rows = audit.wrong_rows(self.columns, piece)
            if rows and (moment.before is not None or not self.is_now(moment)):
                rows = [row for row in rows if self._is_wrong(row)]
            wrong += rows
        return wrong

    def _is_wrong(self, row: int) -> bool:
        """Whether a row that failed is wrong, and not in the middle of a commit."""
        deadline = time.monotonic() + locks.PATIENCE
        found = self.columns.blank(np.array([row]))
        while True:
            moment = self.moment()
            found.bad[0], found.index[:] = 1, 0
            self._read_row_again(found, 0, moment)
            wrong = bool(found.bad[0]) and found.index[0, 0] >= 0
            if not wrong or self.is_now(moment):
                return wrong
            if time.monotonic() > deadline:
                return False

    def index_problems(self) -> list[Problem]:
        deadline, waiting, first = time.monotonic() + locks.PATIENCE, locks.Patience(self.mapping.guarded), None
        while True:
            moment = self.moment()
            pending = moment.before is not None
            found = [] if pending else super().index_problems()
            if not pending and self.is_now(moment):
                return found
            first = first or moment
            same = pending and first[:2] == moment[:2]
            if time.monotonic() > deadline and (not same or waiting.over()):
                break
            time.sleep(0.001 if pending else 0)
        if not same or moment.before is None:
            return []
        changed = tuple(moment.before.index[0].tolist())
        cut_off = Problem("a commit was cut off: open the file for writing once, to undo it", changed)
        return [cut_off, *super().index_problems()]  # some of which may be due to that

    def flush(self) -> None:
        """Nothing: what a reader reads is its writer's to flush."""
        self.mapping.require_map()
