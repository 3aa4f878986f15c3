"""The state of a buffer: the words of a header, with names."""

from __future__ import annotations

import functools
from typing import Protocol

import numpy as np

from ..arrays import Bytes, Ints, Words
from ..kernels import checksums
from ..keys import STREAM_BITS
from .layout import (
    BUCKETS,
    H_DIGESTS,
    H_HIGH,
    H_LOG,
    H_LOG_HASH,
    H_POLICY,
    H_PREVIOUS,
    H_SEEN,
    H_SEQ,
    H_SIZE,
    H_STATE,
    H_TAG,
    H_TARGET,
    HEADER_WORDS,
    HEADERS,
    Layout,
)

_MOST_COMMITS = 2**62  # nobody makes more, and the numbers of more would not fit
REPLACED = 2**63  # target of shared memory whose place another piece has taken


class Word:
    """A word of a State, as an int."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __get__(self, state: State, _: type) -> int:
        word: int = state.at[self._number]
        return word

    def __set__(self, state: State, value: int) -> None:
        state.at[self._number] = value


class HasState(Protocol):
    """A store: it has a state in force."""

    state: State


class WordInForce:
    """A word of the state in force of a store, as an int."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __get__(self, store: HasState, _: type) -> int:
        word: int = store.state.at[self._number]
        return word


class State:
    """One header. words: uint64. at: a memoryview of them, six times as fast for one word."""

    __slots__ = ("at", "words")

    tag = Word(H_TAG)  # of the file
    sequence = Word(H_SEQ)  # number of the commit that made this state
    target = Word(H_TARGET)  # 0; within a rollback, the number of the restore point that it goes to, plus 1; or REPLACED
    previous = Word(H_PREVIOUS)  # identity of the state before that commit
    identity = Word(H_STATE)  # hash of all words behind it: two states with the same hash are the same
    seen = Word(H_SEEN)  # samples offered so far
    size = Word(H_SIZE)  # rows that are live
    high = Word(H_HIGH)  # one past the highest live row; the rows below are all live if it equals `size`
    log_entries = Word(H_LOG)  # entries of the policy's log that count

    def __init__(self, words: Words | None = None) -> None:
        self.words: Words = np.zeros(HEADER_WORDS, np.uint64) if words is None else words
        self.at = self.words.data

    @property
    def name(self) -> str:
        """The identity as text: what a restore point of this state is called."""
        return f"{self.identity:016x}"

    @property
    def policy(self) -> list[int]:
        """The policy's words."""
        return self.words[H_POLICY:H_DIGESTS].tolist()

    @property
    def digests(self) -> Words:
        """Sums of the mixed checksums of all live rows, by row number modulo BUCKETS: a view."""
        return self.words[H_DIGESTS : H_DIGESTS + BUCKETS]

    @property
    def log_hash(self) -> np.uint64:
        """Hash of the log's entries."""
        found: np.uint64 = self.words[H_LOG_HASH]
        return found

    def append_log(self, entries: Ints) -> None:
        """Count more entries of the policy's log."""
        self.words[H_LOG_HASH] = checksums.hash_log(self.words[H_LOG_HASH], entries)
        self.log_entries += entries.shape[0]

    def copy(self) -> State:
        """A state of its own with the same words."""
        return State(self.words.copy())

    def seal(self, mem: Bytes, at: int) -> None:
        """Compute hash and checksum, and write the header to mem[at:]."""
        checksums.seal_block(mem, at, self.words, H_STATE)

    def is_what_it_says(self) -> bool:
        """Whether the identity is the hash of this state."""
        again = self.copy()
        again.seal(np.zeros(8 * HEADER_WORDS, np.uint8), 0)
        return again.identity == self.identity

    def slot(self) -> int:
        """Byte offset of the header that this state is written to: two take turns."""
        return HEADERS[self.sequence % 2]

    def problem(self, layout: Layout) -> str | None:
        """What is impossible about the counts; None if nothing is. Checksums do not tell."""
        seen, size, high = self.seen, self.size, self.high
        if self.sequence >= _MOST_COMMITS:
            return f"its number is {self.sequence}"
        if not size <= high <= layout.max_size:
            return f"it counts {size} of {layout.max_size} rows, up to row {high}"
        if not size <= seen < 2**STREAM_BITS or ("first" in layout.params and not size == high == seen):
            return f"it has seen {seen} samples and holds {size}"
        if self.log_entries > layout.log[1]:
            return f"its log has {self.log_entries} of {layout.log[1]} entries"
        if any(word >= 2**63 for word in self.policy):
            return "its policy's numbers are out of range"
        return None


@functools.cache
def empty_state() -> str:
    """Name of the state of every buffer that has seen nothing."""
    state = State()
    state.seal(np.zeros(8 * HEADER_WORDS, np.uint8), 0)
    return state.name
