"""Grouped buffers by definition, as naive as possible: dicts and sorted lists, one sample at a time, no NumPy, no kernels.

`Grouped` is a model of the buffers: rows, positions, groups, and who may not grow. Keys and hashes can be injected.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from leanreplay.keys import key_pair

M64 = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15

QUOTA, BORROW, LARGEST = "quota", "borrow", "largest"


def fin(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & M64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & M64
    return x ^ x >> 31


def keyed(purpose: str, seed: int) -> Callable[[int], int]:
    """The keys for one purpose: number -> 64 bits."""
    k0, k1 = (int(k) for k in key_pair(purpose, seed))
    return lambda number: fin(fin(number * GOLDEN + k0 & M64) + k1 & M64)


def mixed(key: int, hashed: int) -> int:
    """What decides between several largest groups: of the position's key and the group's hash."""
    return fin(key ^ hashed)


def quotas(size: int, groups: Iterable[int], hashed: Callable[[int], int]) -> dict[int, int]:
    """size // groups for each, and one more for the size % groups of the smallest hashes."""
    known = list(groups)
    if not known:
        return {}
    share, rest = divmod(size, len(known))
    lucky = sorted(known, key=hashed)[:rest]
    return {g: share + (g in lucky) for g in known}


class Grouped:
    """What a grouped buffer holds.

    size: its rows. mode: QUOTA; BORROW, groups may take free rows beyond their quota; LARGEST, class-balancing reservoir sampling.
    total: the number of groups for fixed quotas, 0 for adaptive ones. first: the stream position of the first sample.
    key, hashed: of a position and of a group's id; tie: of a position's key and a group's hash, the smaller one is taken.
    """

    def __init__(
        self,
        size: int,
        seed: int = 0,
        mode: str = QUOTA,
        total: int = 0,
        first: int = 0,
        key: Callable[[int], int] | None = None,
        hashed: Callable[[int], int] | None = None,
        tie: Callable[[int, int], int] = mixed,
    ) -> None:
        self.size, self.mode, self.total, self.first, self.seen = size, mode, total, first, 0
        self.keys: dict[int, int] = {}  # of all positions seen
        self.key = key or keyed("reservoir", seed)
        self.hashed, self.tie = hashed or keyed("group", seed), tie
        self.streams: dict[int, list[int]] = {}  # group -> all of its positions
        self.rows: dict[int, int] = {}  # row -> position
        self.held: dict[int, dict[int, int]] = {}  # group -> row -> position
        self.frozen: set[int] = set()
        self.quota: dict[int, int] = {}

    def copy(self) -> Grouped:
        found = copy.copy(self)
        for name in ("keys", "streams", "rows", "held", "frozen", "quota"):
            setattr(found, name, copy.deepcopy(getattr(self, name)))
        return found

    def state(self) -> Any:
        """Everything that another buffer must agree on."""
        return (self.size, self.seen, self.rows, {g: self.members(g) for g in self.streams}, self.frozen, self.quota)

    # What it is:

    def members(self, group: int) -> list[int]:
        """Rows of a group, ascending."""
        return sorted(self.held[group])

    def sizes(self) -> dict[int, int]:
        return {g: len(rows) for g, rows in self.held.items()}

    def label(self, position: int) -> int:
        return next(g for g, positions in self.streams.items() if position in positions)

    def check(self) -> None:
        """The rule, put another way: of its stream each group holds the largest keys; and no more than it may."""
        assert sorted(self.rows.items()) == sorted(item for rows in self.held.values() for item in rows.items())
        assert all(0 <= row < self.size for row in self.rows)
        for g, positions in self.streams.items():
            held = set(self.held[g].values())
            assert held == set(sorted(positions, key=self.keys.__getitem__)[len(positions) - len(held) :]), g
            assert len(held) == len(positions) or g in self.frozen, g
            if self.mode == QUOTA:
                assert len(held) <= self.quota[g], g
                assert g in self.frozen or len(held) == min(self.quota[g], len(positions)), g

    # What happens:

    def share(self) -> None:
        if self.mode == LARGEST:
            self.quota = dict.fromkeys(self.streams, 0)
        elif self.total:
            self.quota = dict.fromkeys(self.streams, self.size // self.total)
        else:
            self.quota = quotas(self.size, self.streams, self.hashed)

    def least(self, group: int) -> int:
        """The row of a group's smallest key."""
        rows = self.held[group]
        return min(rows, key=lambda row: self.keys[rows[row]])

    def drop(self, group: int) -> int:
        """Take a group's smallest key away; its row, free now."""
        self.frozen.add(group)
        row = self.least(group)
        del self.held[group][row], self.rows[row]
        return row

    def largest(self) -> list[int]:
        """The groups with most rows beyond their quota."""
        excess = {g: len(rows) - self.quota[g] for g, rows in self.held.items()}
        return [g for g in excess if excess[g] == max(excess.values())]

    def free(self) -> int | None:
        return next((row for row in range(self.size) if row not in self.rows), None) if len(self.rows) < self.size else None

    def place(self, group: int, key: int) -> int | None:
        """The row that a sample takes, already free; None if it is rejected."""
        if group not in self.frozen:
            below = len(self.held[group]) < self.quota[group]
            row = self.free()
            if row is not None and (below or self.mode != QUOTA):
                return row
            if self.mode == QUOTA and below:
                raise AssertionError("quotas exceed the rows")
            if self.mode == BORROW and below:
                return self.drop(min(self.largest(), key=self.hashed))
            if self.mode == LARGEST:
                largest = self.largest()
                self.frozen |= set(largest)
                if group not in largest:
                    return self.drop(min(largest, key=lambda g: self.tie(key, self.hashed(g))))
            self.frozen.add(group)
        if self.held[group] and key > self.keys[self.held[group][self.least(group)]]:
            return self.drop(group)
        return None

    def add(self, labels: Iterable[int]) -> None:
        """Offer the next samples, of these groups."""
        for group in labels:
            position = self.first + self.seen
            if group not in self.streams:
                self.streams[group], self.held[group] = [], {}
                self.share()
                for g in self.streams if self.mode == QUOTA else ():
                    while len(self.held[g]) > self.quota[g]:
                        self.drop(g)
            self.streams[group].append(position)
            key = self.keys[position] = self.key(position)
            row = self.place(group, key)
            if row is not None:
                self.rows[row] = self.held[group][row] = position
            self.seen += 1

    def resize(self, size: int) -> None:
        """Rows that exceed the new quotas go, or those of the largest groups until the rest fits; the others close up."""
        if size == self.size:
            return
        self.size = size
        self.share()
        while any(len(self.held[g]) > self.quota[g] for g in self.held) if self.mode == QUOTA else len(self.rows) > size:
            self.drop(min(self.largest(), key=self.hashed))
        where = {row: i for i, row in enumerate(sorted(self.rows))}
        self.rows = {where[row]: position for row, position in self.rows.items()}
        self.held = {g: {where[row]: position for row, position in rows.items()} for g, rows in self.held.items()}
