"""Kernels of grouped reservoirs and of merging against an oracle in plain Python, compiled and as Python."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from kernel_oracle import M64, PINNED, fin, key, keys, read_only

import leanreplay
from leanreplay.kernels import balanced, merge, reservoir
from leanreplay.keys import key_pair

# -- balanced ----------------------------------------------------------------------------------------------------------


MODES = {"quota": balanced.QUOTA, "borrow": balanced.BORROW, "largest": balanced.LARGEST}
IDS = [7, -3, 0, 2**40, -(2**63), 2**63 - 1, 1, 2, *range(100, 160)]


class Shared:
    """Groups that share rows, by the definition alone: dicts, quotas counted anew whenever one is needed."""

    def __init__(self, capacity: int, mode: str, total: int, seed: int) -> None:
        self.capacity, self.mode, self.total = capacity, mode, total
        _, self.k0, self.k1 = keys("reservoir", seed)
        _, self.g0, self.g1 = keys("group", seed)
        self.held: dict[int, dict[int, int]] = {}  # of each group, in order of appearance: position -> row
        self.full: set[int] = set()

    def key(self, position: int) -> int:
        return key(position, self.k0, self.k1)

    def hash(self, group: int) -> int:
        return key(group & M64, self.g0, self.g1)

    def quota(self, group: int) -> int:
        if self.mode == "largest":
            return 0
        if self.total:
            return self.capacity // self.total
        n = len(self.held)
        return self.capacity // n + (sorted(self.held, key=self.hash).index(group) < self.capacity % n)

    def excess(self, group: int) -> int:
        return len(self.held[group]) - self.quota(group)

    def least(self, group: int) -> int:
        return min(self.held[group], key=self.key)

    def drop(self, group: int) -> int:
        self.full.add(group)
        return self.held[group].pop(self.least(group))

    def free(self) -> int | None:
        taken = {row for mine in self.held.values() for row in mine.values()}
        return min(set(range(self.capacity)) - taken, default=None)

    def offer(self, position: int, group: int) -> None:
        if group not in self.held:
            self.held[group] = {}
            for other in self.held if self.mode == "quota" and not self.total else []:
                while self.excess(other) > 0:
                    self.drop(other)
        mine, row = self.held[group], None
        if group not in self.full:
            below = len(mine) < self.quota(group)
            if below or self.mode != "quota":
                row = self.free()
            if row is None and self.mode == "largest":
                most = max(map(len, self.held.values()))
                largest = [g for g in self.held if len(self.held[g]) == most]
                self.full.update(largest)
                if group not in self.full:
                    row = self.drop(min(largest, key=lambda g: fin(self.hash(g) ^ self.key(position))))
            elif row is None and self.mode == "borrow" and below:
                most = max(map(self.excess, self.held))
                row = self.drop(min((g for g in self.held if self.excess(g) == most), key=self.hash))
            elif row is None:
                self.full.add(group)
        if row is None and mine and self.key(position) > self.key(self.least(group)):
            row = self.drop(group)
        if row is not None:
            mine[position] = row

    def rows(self) -> dict[int, tuple[int, int]]:
        return {row: (position, group) for group, mine in self.held.items() for position, row in mine.items()}

    def resize(self, capacity: int) -> None:
        """What `keep` does for fewer rows; they keep their numbers."""
        self.capacity = capacity
        for group in self.held if self.mode == "quota" else []:
            while self.excess(group) > 0:
                self.drop(group)
        while sum(map(len, self.held.values())) > capacity:
            most = max(map(self.excess, self.held))
            self.drop(min((g for g in self.held if self.excess(g) == most), key=self.hash))


class Arrays:
    """The arrays that the kernels work on, and the index and log of a file that gets what they plan."""

    def __init__(self, capacity: int, mode: str, total: int, seed: int, room: int) -> None:
        self.capacity, self.mode, self.total = capacity, mode, total
        self.keys01 = (*key_pair("reservoir", seed), *key_pair("group", seed))
        self.positions, self.ids = np.full(capacity, -1), np.zeros(capacity, np.int64)
        self.log: list[list[int]] = []
        self.room = room
        self.load()

    def load(self) -> None:
        """Everything anew from index and log, as after a kill."""
        n, room = self.capacity, self.room
        self.counters = np.zeros(balanced.COUNTERS, np.int64)
        self.groups, self.table = np.zeros((room, balanced.COLUMNS), np.int64), np.full(4 * room, -1, np.int32)
        self.rest, self.new = np.zeros(room + 1, np.int64), np.full((2 * room, 2), -9)
        self.keys, self.links = np.zeros(n, np.uint64), np.full((n, 2), -9, np.int32)
        self.holder = np.zeros(n, np.int32)
        log = np.array(self.log, np.int64).reshape(-1, 2)
        assert balanced.load_groups(read_only(log), self.groups, self.table, self.counters, *self.keys01[2:])
        assert balanced.load_rows(
            read_only(self.positions), read_only(self.ids), self.keys, self.links, self.groups, self.table, self.counters,
            *self.keys01,
        )  # fmt: skip
        self.share()

    def share(self) -> None:
        if self.mode == "largest" or self.total:
            self.counters[balanced.SHARE] = self.capacity // self.total if self.total else 0
        elif self.counters[balanced.GROUPS]:
            balanced.share(self.groups, self.rest, self.counters, self.capacity)
        else:
            self.counters[balanced.SHARE] = -1

    def grow(self) -> None:
        """Room for twice as many groups."""
        n, before = int(self.counters[balanced.GROUPS]), (self.groups, self.rest)
        self.room *= 2
        self.groups, self.rest = np.zeros((self.room, balanced.COLUMNS), np.int64), np.zeros(self.room + 1, np.int64)
        self.groups[:n], self.rest[:n] = before[0][:n], before[1][:n]
        self.new, self.table = np.full((2 * self.room, 2), -9), np.full(4 * self.room, -1, np.int32)
        balanced.index_groups(self.groups, self.table, n)

    def plan(self, start: int, ids: Any, most: int) -> int:
        """One plan, applied; how many samples it used."""
        live = {r for r in range(self.capacity) if self.positions[r] >= 0}
        known = {g for what, g in self.log if what == 0}
        out = np.full(len(ids), -9)
        used, freed = balanced.plan_balanced(
            self.keys, self.links, self.holder, self.groups, self.room, self.table, self.rest, self.counters,
            self.new, MODES[self.mode], bool(self.total) or self.mode == "largest", self.capacity, *self.keys01, start, most,
            read_only(np.array(ids, np.int64)), out,
        )  # fmt: skip
        out, gone = out[:used].tolist(), freed.tolist()
        taken = [r for r in out if r >= 0]
        assert not self.holder.any()
        assert len(set(taken)) == len(taken) <= most
        assert len(set(gone)) == len(gone)
        assert set(gone) <= live - set(taken)
        if used < len(ids) and len(known | {int(i) for i in ids[: used + 1]}) <= self.room:
            assert most <= used, "stopped for no reason"
        for i, row in enumerate(out):
            if row >= 0:
                self.positions[row], self.ids[row] = start + i, ids[i]
        self.positions[gone] = -1
        self.log += self.new[: int(self.counters[balanced.LOGGED])].tolist()
        return int(used)

    def same(self, model: Shared) -> None:
        """Everything is what the definition says, heaps and counts too."""
        held = np.flatnonzero(self.positions >= 0)
        assert {int(r): (int(self.positions[r]), int(self.ids[r])) for r in held} == model.rows()
        names = [g for what, g in self.log if what == 0]
        assert names == list(model.held)
        full = [names[i] for what, i in self.log if what == 1]
        assert len(full) == len(set(full))
        assert set(full) == model.full
        assert self.counters[balanced.GROUPS] == len(names)
        for i, name in enumerate(names):
            record, mine = self.groups[i], model.held[name]
            assert record[balanced.ID] == name
            assert int(record[balanced.HASH]) & M64 == model.hash(name)
            assert record[balanced.HELD] == len(mine)
            assert bool(record[balanced.FULL]) == (name in model.full)
            assert self.counters[balanced.SHARE] + record[balanced.EXTRA] == model.quota(name)
            assert self.heap(int(record[balanced.ROOT])) == {r: model.key(p) for p, r in mine.items()}
            assert int(record[balanced.LEAST]) & M64 == (model.key(model.least(name)) if mine else 0)
        free = self.heap(int(self.counters[balanced.FREE]) - 1)
        assert all(row == key for row, key in free.items())
        assert sorted(free) + list(range(int(self.counters[balanced.FRESH]), self.capacity)) == sorted(
            set(range(self.capacity)) - set(held)
        )

    def heap(self, root: int, above: int = 0) -> dict[int, int]:
        """Rows and keys of a heap; no key is below that of its parent."""
        if root < 0:
            return {}
        mine = int(self.keys[root])
        assert mine >= above
        found = {root: mine}
        for child in self.links[root].tolist():
            below = self.heap(child, mine)
            assert not found.keys() & below.keys()
            found |= below
        return found


def long_tail(n: int, count: int, seed: int, total: int) -> list[int]:
    """n labels of `count` groups, some frequent, some met once, the first ones more often at the beginning; the last is of one more."""
    rng = random.Random(seed)
    found = []
    for i in range(n):
        seen = max(1, min(count, 1 + count * i // max(1, n - 20)))
        found.append(IDS[min(int(rng.expovariate(1) * seen / 2), seen - 1)])
    if n and not total:
        found[-1] = IDS[count]
    return found


CASES = [
    (mode, total, capacity, count, n)
    for mode, total in (("quota", 0), ("quota", 6), ("quota", 64), ("borrow", 0), ("borrow", 5), ("largest", 0))
    for capacity, count, n in ((1, 1, 20), (1, 4, 40), (7, 3, 120), (7, 30, 120), (12, 5, 150), (20, 40, 300), (64, 6, 60), (5, 1, 0))
    if not total or (count <= total <= capacity)
]


@pytest.mark.parametrize(("mode", "total", "capacity", "count", "n"), CASES)
def test_plan_balanced(run: None, mode: str, total: int, capacity: int, count: int, n: int) -> None:
    """One plan, pieces, limits on rows taken, no room for groups, and arrays rebuilt from index and log: always the definition."""
    start, seed = 5 * 2**48, capacity + n
    ids = long_tail(n, count, seed, total)
    model = Shared(capacity, mode, total, seed)
    moments = {0: (model.rows(), dict(model.held), set())}
    for i, group in enumerate(ids):
        model.offer(start + i, group)
        moments[i + 1] = (model.rows(), {g: len(m) for g, m in model.held.items()}, set(model.full))
    logs = []
    for pieces in ("whole", "single", "pieces", "most", "rebuilt"):
        rng = random.Random(pieces)
        arrays = Arrays(capacity, mode, total, seed, room=64 if pieces == "whole" else 1)
        at = 0
        while at < n:
            step = {"whole": n, "single": 1, "most": n}.get(pieces, rng.randint(1, 30))
            used = arrays.plan(start + at, ids[at : at + step], rng.randint(1, 4) if pieces == "most" else n)
            if used == 0:
                assert len(set(ids[: at + 1])) > arrays.room
                arrays.grow()
            at += used
            assert pieces != "whole" or used == n
            assert {int(r): (int(arrays.positions[r]), int(arrays.ids[r])) for r in np.flatnonzero(arrays.positions >= 0)} == moments[at][0]
            if pieces == "rebuilt":
                arrays.load()
        arrays.same(model)
        logs.append(arrays.log)
    assert all(log == logs[0] for log in logs[:-1])  # also the order of the log does not depend on how the stream is cut


@pytest.mark.parametrize(("mode", "total", "capacity", "count", "n"), [c for c in CASES if c[2] > 1 and c[4]])
def test_keep_balanced(run: None, mode: str, total: int, capacity: int, count: int, n: int) -> None:
    """Fewer rows: of every group its largest keys stay; the same number and more take nothing away."""
    seed = n
    ids = long_tail(n, count, seed, total)
    for fewer in sorted({capacity + 5, capacity, capacity - 1, capacity // 2, max(1, capacity // 4), 1}):
        if total and fewer < total:
            continue
        arrays, model = Arrays(capacity, mode, total, seed, 64), Shared(capacity, mode, total, seed)
        arrays.plan(0, ids, n)
        for i, group in enumerate(ids):
            model.offer(i, group)
        before = model.rows()
        model.resize(fewer)
        arrays.capacity = fewer
        arrays.share()
        lost = np.full(capacity, -9)
        count_lost = balanced.keep_balanced(arrays.keys, arrays.links, arrays.groups, arrays.counters, fewer, MODES[mode], lost)
        gone = lost[:count_lost].tolist()
        assert sorted(gone) == sorted(before.keys() - model.rows().keys())
        assert set(arrays.groups[: len(model.held), balanced.ID][arrays.groups[: len(model.held), balanced.FULL] != 0]) == model.full
        for i, mine in enumerate(model.held.values()):
            assert arrays.heap(int(arrays.groups[i, balanced.ROOT])) == {r: model.key(p) for p, r in mine.items()}


@pytest.mark.parametrize("salt", [0, 1, fin(5)])
def test_largest_excess(run: None, salt: int) -> None:
    """The most rows beyond the quota; of several groups the smallest hash, mixed with a salt or not. Excess may be negative."""
    rng = random.Random(salt)
    chosen = set()
    for n in [1, 2, 3, *[9] * 40]:
        groups = np.zeros((n, balanced.COLUMNS), np.int64)
        hashes = [rng.getrandbits(64) for _ in range(n)]
        groups[:, balanced.HASH] = np.array(hashes, np.uint64).view(np.int64)
        groups[:, balanced.HELD] = [rng.randrange(4) for _ in range(n)]
        groups[:, balanced.EXTRA] = [rng.randrange(2) for _ in range(n)]
        share_of_each = rng.choice([0, 2, 9])
        excess = [int(g[balanced.HELD]) - share_of_each - int(g[balanced.EXTRA]) for g in groups]
        best = [g for g in range(n) if excess[g] == max(excess)]
        wanted = min(best, key=lambda g: fin(hashes[g] ^ salt) if salt else hashes[g])
        assert balanced.largest_excess(read_only(groups), n, share_of_each, np.uint64(salt)) == wanted
        chosen.add(best.index(wanted))
    assert len(chosen) > 2  # there were ties, and not always the first one won


@pytest.mark.parametrize("n", [1, 2, 3, 7, 50])
def test_share(run: None, n: int) -> None:
    """Quotas of 0 to 130 rows: equal ones, the remainder to the smallest hashes; whatever was there before."""
    rng = random.Random(n)
    groups, rest = np.zeros((n, balanced.COLUMNS), np.int64), np.full(n + 1, -9)
    hashes = [rng.getrandbits(64) for _ in range(n)]
    groups[:, balanced.HASH] = np.array(hashes, np.uint64).view(np.int64)
    groups[:, balanced.EXTRA] = 1
    counters = np.full(balanced.COUNTERS, 3)
    counters[balanced.GROUPS] = n
    for capacity in (*range(12), 49, 50, 51, 99, 130):
        balanced.share(groups, rest, counters, capacity)
        smallest = sorted(range(n), key=hashes.__getitem__)[: capacity % n]
        assert counters[balanced.SHARE] == capacity // n
        assert np.flatnonzero(groups[:, balanced.EXTRA]).tolist() == sorted(smallest)
        assert counters[balanced.REST] == len(smallest)
        assert sorted(rest[: len(smallest)].tolist()) == sorted(smallest)
    counters[balanced.GROUPS] = 0
    balanced.share(groups, rest, counters, 9)
    assert (counters[balanced.SHARE], counters[balanced.REST]) == (0, 0)


def test_hash_groups(run: None) -> None:
    """Hashes of group ids of any int64 are the oracle's; they are part of the format: who gets the remainder."""
    pair, g0, g1 = keys("group", 3)
    out = np.zeros(len(IDS), np.uint64)
    reservoir.position_keys(read_only(np.array(IDS, np.int64)), *pair, out)
    assert out.tolist() == [key(g & M64, g0, g1) for g in IDS]
    assert [int(h) for h in leanreplay.policies.quotas.group_hash(IDS[:2], 3)] == [PINNED[6], PINNED[7]]


@pytest.mark.parametrize(
    ("log", "fits"),
    [
        ([], True),
        ([(0, 5)], True),
        ([(0, 5), (1, 0), (0, -5), (0, 0), (1, 2)], True),
        ([(1, 0)], False),  # full before it is there
        ([(0, 5), (1, 1)], False),
        ([(0, 5), (1, -1)], False),
        ([(0, 5), (0, 5)], False),  # new twice
        ([(2, 5)], False),
        ([(-1, 5)], False),
        ([(2**40, 0)], False),
        ([(0, g) for g in range(4)], True),
        ([(0, g) for g in range(5)], False),  # more than there is room for
    ],
)
def test_load_groups(run: None, log: list[tuple[int, int]], fits: bool) -> None:
    """Groups in order, full or not; a log of anything else is refused."""
    pair, g0, g1 = keys("group", 1)
    groups, table, counters = np.full((4, balanced.COLUMNS), 99), np.full(16, -1, np.int32), np.zeros(balanced.COUNTERS, np.int64)
    entries = read_only(np.array(log, np.int64).reshape(-1, 2))
    assert balanced.load_groups(entries, groups, table, counters, *pair) == fits
    if not fits:
        return
    names = [g for what, g in log if what == 0]
    assert counters[balanced.GROUPS] == len(names)
    for i, name in enumerate(names):
        at = balanced.find_group(groups, table, name, np.uint64(key(name & M64, g0, g1)))
        assert table[at] == i
        record = groups[i].tolist()
        assert (record[balanced.ID], record[balanced.HASH] & M64) == (name, key(name & M64, g0, g1))
        assert (record[balanced.ROOT], record[balanced.HELD], record[balanced.EXTRA], record[balanced.LEAST]) == (-1, 0, 0, 0)
        assert bool(record[balanced.FULL]) == ((1, i) in log)
    again = np.full(16, -1, np.int32)
    balanced.index_groups(groups, again, len(names))
    assert again.tolist() == table.tolist()


def test_load_rows_of_an_unknown_group(run: None) -> None:
    """A row of a group that the log does not name is refused, free rows of any group are not."""
    for position, fits in ((4, False), (-1, True)):
        arrays = Arrays(3, "quota", 0, 1, 8)
        arrays.plan(0, [7, 7, -3], 3)
        arrays.positions[1], arrays.ids[1] = position, 8
        arrays.counters[:], arrays.table[:] = 0, -1
        assert balanced.load_groups(np.array(arrays.log), arrays.groups, arrays.table, arrays.counters, *arrays.keys01[2:])
        found = balanced.load_rows(
            arrays.positions, arrays.ids, arrays.keys, arrays.links, arrays.groups, arrays.table, arrays.counters,
            *arrays.keys01,
        )  # fmt: skip
        assert found == fits


@pytest.mark.parametrize("n", [0, 1, 2, 3, 40, 300])
def test_heaps_of_groups(run: None, n: int) -> None:
    """Rows put into a group in any order, and ties of keys, come out by their keys, whatever happens in between."""
    rng = random.Random(n)
    groups, keys_of, links = np.zeros((1, balanced.COLUMNS), np.int64), np.zeros(n, np.uint64), np.full((n, 2), -9, np.int32)
    groups[0, balanced.ROOT] = -1
    inside: dict[int, int] = {}
    outside = list(range(n))
    for _ in range(3 * n):
        if outside and (not inside or rng.random() < 0.6):
            row, value = outside.pop(rng.randrange(len(outside))), rng.choice([rng.getrandbits(64), 5, 2**63, M64])
            balanced.insert_row(keys_of, links, groups, 0, row, np.uint64(value))
            inside[row] = value
        else:
            row = int(balanced.remove_least(keys_of, links, groups, 0))
            assert inside.pop(row) <= min(inside.values(), default=M64)
            outside.append(row)
        assert groups[0, balanced.HELD] == len(inside)
        assert int(groups[0, balanced.LEAST]) & M64 == min(inside.values(), default=0)
    last = -1
    while inside:
        value = inside.pop(int(balanced.remove_least(keys_of, links, groups, 0)))
        assert value >= last
        last = value
    assert (groups[0, balanced.ROOT], groups[0, balanced.HELD]) == (-1, 0)


# -- merge -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caps", [[0], [1], [5], [3, 0, 1, 20]])
@pytest.mark.parametrize("n", [0, 1, 4, 60])
def test_offer(run: None, caps: list[int], n: int) -> None:
    """Offered in pieces, each heap holds the largest keys of its group, and of equal ones the oldest samples."""
    rng = random.Random(n)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(caps)])
    counts, room = np.zeros(len(caps), np.int64), int(starts[-1])
    best, held, places = np.zeros(room, np.uint64), np.full(room, -9), np.full(room, -9)
    everything = [(rng.choice([5, 2**63, rng.getrandbits(64)]), p, rng.randrange(len(caps)), rng.randrange(99)) for p in range(n)]
    rng.shuffle(everything)
    for source, at in enumerate(range(0, n, 23)):
        part = everything[at : at + 23]
        columns = [np.array([e[c] for e in part], np.uint64 if c == 0 else np.int64) for c in range(4)]
        merge.offer(*map(read_only, columns), source << 40, starts, counts, best, held, places)
    offered = [(k, p, g, i // 23 << 40 | row) for i, (k, p, g, row) in enumerate(everything)]
    for g, cap in enumerate(caps):
        wanted = sorted((e for e in offered if e[2] == g), key=lambda e: (-e[0], e[1]))[:cap]
        assert counts[g] == len(wanted)
        at = slice(int(starts[g]), int(starts[g]) + len(wanted))
        found = zip(best[at].tolist(), held[at].tolist(), places[at].tolist(), strict=True)
        assert sorted(found) == sorted((k, p, place) for k, p, _, place in wanted)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 101])
def test_sort_places(run: None, n: int) -> None:
    """Both arrays in the order of the first."""
    held = np.random.default_rng(n).permutation(n) * 3
    places = held * 7 + 1
    merge.sort_places(held, places)
    assert held.tolist() == [3 * i for i in range(n)]
    assert places.tolist() == [21 * i + 1 for i in range(n)]
