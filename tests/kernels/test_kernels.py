"""Every kernel against an obvious oracle in plain Python, compiled and as the plain Python that it is written in.

The kernels of rows.py are compared on a file image of several fields, whose row sizes are 1, 3, 7, 8, 9, 40 and 785 bytes. All
oracles use Python's own integers and bytes; they are also what another program would need to check the checksums of a file.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from compiled import as_python, call_helpers
from paths import ROOT, TESTS

import leanreplay
from leanreplay import kernels
from leanreplay.kernels import balance, balanced, hashing, merge, reservoir, rows
from leanreplay.keys import key_pair

M64 = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
FREE = M64
SIZES = (1, 3, 7, 8, 9, 40, 785)
FIELDS = len(SIZES)


# -- helpers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["compiled", "python"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a test with compiled kernels, and with every one of them replaced by the Python function it is made from."""
    if request.param == "compiled":
        for module in (balance, balanced, hashing, reservoir, rows):
            call_helpers(module, monkeypatch)
        yield
        return
    as_python(monkeypatch, balance, balanced, merge, reservoir, rows)
    for name, function in rows.PLAIN.items():
        monkeypatch.setattr(rows, name, function)
    with np.errstate(over="ignore"):  # unsigned words wrap around, as they should
        yield


def fin(x: int) -> int:
    """The finaliser of splitmix64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & M64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & M64
    return x ^ x >> 31


def fin_inverse(x: int) -> int:
    """What `fin` came from."""
    x ^= x >> 31 ^ x >> 62
    x = x * pow(0x94D049BB133111EB, -1, 2**64) & M64
    x ^= x >> 27 ^ x >> 54
    x = x * pow(0xBF58476D1CE4E5B9, -1, 2**64) & M64
    return x ^ x >> 30 ^ x >> 60


def key(position: int, k0: int, k1: int) -> int:
    return fin(fin(position * GOLDEN + k0 & M64) + k1 & M64)


def mix(x: int) -> int:
    """The finaliser of MurmurHash3."""
    x = (x ^ x >> 33) * 0xFF51AFD7ED558CCD & M64
    x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53 & M64
    return x ^ x >> 33


def digest(data: bytes) -> int:
    """The hash of some bytes: words of 8, then single bytes."""
    whole = len(data) // 8
    words = [int.from_bytes(data[8 * i : 8 * i + 8], "little") for i in range(whole)]
    entries = list(enumerate(words)) + [(i, data[i]) for i in range(8 * whole, len(data))]
    total = len(data)
    for i, word in entries:
        y = word + (i + 1) * GOLDEN & M64
        total += y + (y & 0xFFFFFFFF) * (y >> 32)
    return mix(total & M64)


def checksum(data: bytes, row: int, position: int, group: int, field: int) -> int:
    tag = mix(mix((row * GOLDEN & M64) ^ group & M64) + position & M64)
    return mix((digest(data) + field & M64) ^ tag)


def share(value: int) -> int:
    return mix(value ^ GOLDEN)


def words(*values: int) -> Any:
    return np.array(values, np.uint64)


def keys(name: str = "x", seed: int = 0) -> tuple[Any, int, int]:
    pair = key_pair(name, seed)
    return pair, int(pair[0]), int(pair[1])


def read_only(array: Any) -> Any:
    view = array.view()
    view.flags.writeable = False
    return view


class Image:
    """A file image with rows of random bytes, every second of them free if `holes`, right checksums, and room for a journal."""

    def __init__(self, capacity: int, seed: int, holes: bool = False, live: int | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.capacity = capacity
        self.widths = [*SIZES, 8, 8, 8 * FIELDS]
        offsets, at = [], 64
        for width in self.widths:
            offsets.append(at)
            at += -(-width * capacity // 64) * 64
        self.record = sum(-(-w // 8) * 8 for w in self.widths)
        self.list_at = at
        self.record_at = at + 8 * capacity
        self.mem = rng.integers(0, 256, self.record_at + capacity * self.record + 3, np.uint8)
        self.offsets = offsets
        self.cols = np.array(list(zip(offsets, self.widths, strict=True)), np.uint64)
        stop = capacity if live is None else live
        for r in range(capacity):
            free = r >= stop or (holes and r % 2 == 1)
            position = -1 if free else int(rng.integers(0, 2**40))
            self.write(r, [self.field(r, f) for f in range(FIELDS)], position, int(rng.integers(-5, 5)))

    def entry(self, r: int, column: int) -> bytes:
        at = self.offsets[column] + r * self.widths[column]
        return self.mem[at : at + self.widths[column]].tobytes()

    field = entry

    def put(self, r: int, column: int, data: bytes) -> None:
        at = self.offsets[column] + r * self.widths[column]
        self.mem[at : at + self.widths[column]] = np.frombuffer(data, np.uint8)

    def number(self, r: int, column: int) -> int:
        return int.from_bytes(self.entry(r, column), "little", signed=True)

    def position(self, r: int) -> int:
        return self.number(r, FIELDS)

    def group(self, r: int) -> int:
        return self.number(r, FIELDS + 1)

    def stored(self, r: int, f: int) -> int:
        return int.from_bytes(self.entry(r, FIELDS + 2)[8 * f : 8 * f + 8], "little")

    def write(self, r: int, data: list[bytes], position: int, group: int) -> None:
        for f, entry in enumerate(data):
            self.put(r, f, entry)
        self.put(r, FIELDS, position.to_bytes(8, "little", signed=True))
        self.put(r, FIELDS + 1, group.to_bytes(8, "little", signed=True))
        sums = [checksum(data[f], r, position, group, f) for f in range(FIELDS)]
        self.put(r, FIELDS + 2, b"".join(s.to_bytes(8, "little") for s in sums))

    def live(self) -> list[int]:
        return [r for r in range(self.capacity) if self.position(r) >= 0]

    def digests(self, buckets: int) -> list[int]:
        found = [0] * buckets
        for r in self.live():
            for f in range(FIELDS):
                found[r % buckets] = found[r % buckets] + share(self.stored(r, f)) & M64
        return found

    def columns(self) -> bytes:
        """All columns, without the journal."""
        return self.mem[: self.list_at].tobytes()


def journal(image: Image, order: list[int], live: int) -> int:
    """The hash of a journal with these rows: record by record, its columns padded with zeros, then the list."""
    total = 0
    for r in order[:live]:
        entries = [image.entry(r, column) for column in range(FIELDS + 3)]
        total = mix(total + digest(b"".join(e + bytes(-len(e) % 8) for e in entries)) & M64)
    return mix(total + digest(b"".join(r.to_bytes(8, "little") for r in order)) & M64)


# -- keys --------------------------------------------------------------------------------------------------------------


def test_scramble_is_a_bijection(run: None) -> None:
    """It is splitmix64's finaliser, and can be inverted: so no two positions share a key."""
    rng = random.Random(0)
    for x in [0, 1, M64, M64 - 1, 2**63, 2**31, *(rng.getrandbits(64) for _ in range(500))]:
        assert int(hashing.scramble(np.uint64(x))) == fin(x)
        assert int(hashing.key_of(np.uint64(x), np.uint64(3), np.uint64(5))) == fin((fin((x * GOLDEN + 3) & M64) + 5) & M64)
        assert fin_inverse(fin(x)) == x


def test_splitmix64_is_the_published_one() -> None:
    """The first outputs of splitmix64 with seed 1234567, as published with many implementations."""
    state, found = 1234567, []
    for _ in range(3):
        state = state + GOLDEN & M64
        found.append(fin(state))
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**127 - 1, -(2**127)])
def test_position_keys(run: None, seed: int) -> None:
    """Keys of positions, of every stream number, are those of the oracle, and lead back to the position."""
    pair, k0, k1 = keys("reservoir", seed)
    positions = np.array([0, 1, 2, 2**48 - 1, 2**48, 32_767 * 2**48 + 5, 2**63 - 1], np.int64)
    out = np.zeros(7, np.uint64)
    reservoir.position_keys(read_only(positions), *pair, out)
    assert out.tolist() == [key(p, k0, k1) for p in positions.tolist()]
    for p, k in zip(positions.tolist(), out.tolist(), strict=True):
        assert (fin_inverse(fin_inverse(k) - k1 & M64) - k0) * pow(GOLDEN, -1, 2**64) & M64 == p
    reservoir.position_keys(positions[:0], *pair, out[:0])


def test_key_pairs_are_fixed() -> None:
    """Files outlive releases: the keys of a seed must never change."""
    assert [int(k) for k in key_pair("reservoir", 0)] == [PINNED[0], PINNED[1]]
    assert [int(k) for k in key_pair("greedy", -7)] == [PINNED[2], PINNED[3]]
    assert key(5, PINNED[0], PINNED[1]) == PINNED[4]
    assert digest(bytes(range(21))) == PINNED[5]


PINNED = (
    10040559449599729520,
    10848882084572388447,
    12776931632207974167,
    13936921488996283878,
    1861119234195132896,
    6592977253062345186,
    3290457699690052627,
    8456461171567981145,
)


@pytest.mark.parametrize("what", ["positions", "seeds", "negative seeds", "streams", "purposes"])
def test_neighbouring_keys_do_not_correlate(what: str) -> None:
    """Of 20,000 neighbours: each bit even, no bit of a key tells one of the next (64 x 64), values do not correlate."""
    n = 20_000
    out = np.zeros(n, np.uint64)
    if what in ("positions", "streams"):
        step = 2**48 if what == "streams" else 1
        count = min(n, 32_767) if what == "streams" else n
        reservoir.position_keys(np.arange(count) * step, *key_pair("reservoir", 0), out)
    else:
        one, at = np.zeros(1, np.uint64), np.array([3])
        for i in range(n):
            seed = {"seeds": i, "negative seeds": -i, "purposes": 0}[what]
            reservoir.position_keys(at, *key_pair(f"draw {i}" if what == "purposes" else "reservoir", seed), one)
            out[i] = one[0]
    assert np.unique(out).shape[0] == n
    bits = np.unpackbits(out.view(np.uint8).reshape(n, 8), axis=1).astype(float) - 0.5
    assert np.abs(bits.sum(0)).max() < 4.5 * np.sqrt(n / 4)
    assert np.abs(bits[:-1].T @ bits[1:]).max() < 5.5 * np.sqrt(n / 16)
    inside = bits.T @ bits
    np.fill_diagonal(inside, 0)
    assert np.abs(inside).max() < 5.5 * np.sqrt(n / 16)
    values = out / 2.0**64 - 0.5
    assert abs((values[:-1] * values[1:]).sum()) < 4.5 * np.sqrt(n) / 12


# -- reservoir ---------------------------------------------------------------------------------------------------------


class Naive:
    """A reservoir in a dict."""

    def __init__(self, limit: int, k0: int, k1: int) -> None:
        self.limit, self.k0, self.k1 = limit, k0, k1
        self.rows: dict[int, int] = {}

    def offer(self, position: int) -> int:
        k = key(position, self.k0, self.k1)
        if len(self.rows) < self.limit:
            row = len(self.rows)
        else:
            row = min(self.rows, key=self.rows.__getitem__, default=-1)
            if row < 0 or self.rows[row] > k:
                return -1
        self.rows[row] = k
        return row


@pytest.mark.parametrize(("limit", "n"), [(1, 0), (1, 1), (1, 50), (2, 50), (3, 3), (8, 7), (8, 200), (31, 400), (64, 64)])
def test_plan_reservoir(run: None, limit: int, n: int) -> None:
    """Planning whole, in pieces, limited by `most`, and after rebuilding the heap from the index: always the oracle's rows."""
    pair, k0, k1 = keys("reservoir", n)
    start = 9 * 2**48 + 4
    naive = Naive(limit, k0, k1)
    wanted = [naive.offer(start + i) for i in range(n)]
    rng = random.Random(n)
    for pieces in ("whole", "pieces", "most", "rebuilt"):
        heap, held, size = np.zeros(limit, np.uint64), np.zeros(limit, np.int64), 0
        positions = np.full(limit, -1)
        found: list[int] = []
        while len(found) < n:
            out = np.full(n - len(found) if pieces in ("whole", "most") else rng.randint(1, n - len(found)), -9)
            most = rng.randint(1, 5) if pieces == "most" else n
            if pieces == "rebuilt":
                size = reservoir.build_heap(read_only(positions[:size]), *pair, heap, held)
            used, size = reservoir.plan_reservoir(heap, held, size, limit, *pair, start + len(found), most, out)
            taken = [r for r in out[:used].tolist() if r >= 0]
            assert len(taken) <= most
            assert used == out.shape[0] or len(taken) == most
            for i, r in enumerate(out[:used].tolist()):
                if r >= 0:
                    positions[r] = start + len(found) + i
            found += out[:used].tolist()
            assert {int(r): int(k) for r, k in zip(held[:size], heap[:size], strict=True)} == {
                r: key(int(positions[r]), k0, k1) for r in range(size)
            }
            assert all(heap[(j - 1) // 2] <= heap[j] for j in range(1, size))
        assert found == wanted, pieces


def test_reservoir_without_rows(run: None) -> None:
    """A limit of 0 takes nothing, and fails nowhere."""
    out = np.zeros(5, np.int64)
    used, size = reservoir.plan_reservoir(words(), np.zeros(0, np.int64), 0, 0, *key_pair("x", 0), 0, 5, out)
    assert (used, size, out.tolist()) == (5, 0, [-1] * 5)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 101])
def test_build_heap(run: None, n: int) -> None:
    """A heap of the live rows, holes left out."""
    pair, k0, k1 = keys()
    positions = np.random.default_rng(n).permutation(n).astype(np.int64) * 7
    positions[1::3] = -1
    heap, held = np.zeros(n, np.uint64), np.zeros(n, np.int64)
    size = reservoir.build_heap(read_only(positions), *pair, heap, held)
    assert sorted(held[:size].tolist()) == [r for r in range(n) if positions[r] >= 0]
    assert heap[:size].tolist() == [key(int(positions[r]), k0, k1) for r in held[:size]]
    assert all(heap[(j - 1) // 2] < heap[j] for j in range(1, size))


@pytest.mark.parametrize("size", [1, 2, 5, 64, 1000, 10**12])
@pytest.mark.parametrize("replace", [False, True])
def test_draw(run: None, size: int, replace: bool) -> None:
    """0, 1, some and all: the numbers of a shuffle of a list, or of independent draws."""
    pair, k0, k1 = keys("draw", 4)
    for n in {0, 1, min(size, 3), min(size, 64), *([] if not replace else [2 * min(size, 50)])}:
        for seen, counter in ((0, 1), (7 * 2**20, 2), (2**48 - 1, 2**62)):
            base = fin(fin(fin(seen * GOLDEN + k0 & M64) + counter & M64) + k1 & M64)
            hashes = [fin(base + i * GOLDEN & M64) for i in range(n)]
            if replace:
                wanted = [h % size for h in hashes]
            else:
                shuffled: dict[int, int] = {}
                wanted = []
                for i, h in enumerate(hashes):
                    pick = i + h % (size - i)
                    wanted.append(shuffled.get(pick, pick))
                    shuffled[pick] = shuffled.get(i, i)
                assert len(set(wanted)) == n
            out = np.full(n, -9)
            reservoir.draw(size, *pair, seen, counter, replace, out)
            assert out.tolist() == wanted, (n, seen, counter)


# -- balance -----------------------------------------------------------------------------------------------------------

LABELS = [-(2**63), -3, 0, 1, 10**12]


def largest(counts: dict[int, int], base: int) -> int:
    top = max(counts.values())
    return max((c for c in counts if counts[c] == top), key=lambda c: fin(base + fin((c & M64) * GOLDEN + base & M64) & M64))


def member(row_labels: list[int], label: int, base: int) -> int:
    attempt = 0
    while True:
        r = fin(base + attempt * GOLDEN & M64) % len(row_labels)
        if row_labels[r] == label:
            return r
        attempt += 1


@pytest.mark.parametrize("counts", [[1], [3, 3], [0, 2, 2, 1, 2], [5, 5, 5, 5, 5], [0, 0, 7, 0, 0]])
def test_largest_class(run: None, counts: list[int]) -> None:
    """One of the largest, the same one as the oracle's, whatever the order of the labels' values."""
    labels = LABELS[: len(counts)]
    for i in range(40):
        base = fin(i)
        found = balance.largest_class(np.array(labels), np.array(counts), np.uint64(base))
        assert labels[found] == largest(dict(zip(labels, counts, strict=True)), base)


@pytest.mark.parametrize("size", [1, 2, 30])
def test_random_member(run: None, size: int) -> None:
    """A row of the class, the same one as the oracle's; a class of one row among many is found."""
    row_labels = np.array([7] + [3] * (size - 1) + [7] * 2)  # rows beyond `size` do not count
    for i in range(60):
        base = fin(i)
        assert balance.random_member(read_only(row_labels), size, 7, np.uint64(base)) == 0
        if size > 1:
            assert balance.random_member(row_labels, size, 3, np.uint64(base)) == member(row_labels[:size].tolist(), 3, base)


def test_random_member_with_a_wrong_count_ends(run: None) -> None:
    """A class that is nowhere: no endless loop."""
    assert balance.random_member(np.zeros(4, np.int64), 4, 9, np.uint64(1)) == 0


@pytest.mark.parametrize(("capacity", "n"), [(1, 0), (1, 1), (1, 20), (4, 3), (4, 4), (4, 40), (25, 150)])
def test_plan_greedy(run: None, capacity: int, n: int) -> None:
    """In one piece and in pieces: rows, labels and counts of a reservoir of lists."""
    pair, k0, k1 = keys("greedy", capacity)
    groups = np.random.default_rng(n).choice(LABELS, n)
    start = 3 * 2**48
    row_labels: list[int] = []
    wanted = []
    for i, label in enumerate(groups.tolist()):
        if len(row_labels) < capacity:
            row_labels.append(label)
            wanted.append(len(row_labels) - 1)
            continue
        base = key(start + i, k0, k1)
        out = largest({c: row_labels.count(c) for c in LABELS}, base)
        wanted.append(member(row_labels, out, base))
        row_labels[wanted[-1]] = label
    for step in (max(1, n), 1, 7):
        held, counts, size = np.zeros(capacity, np.int64), np.zeros(len(LABELS), np.int64), 0
        rows_taken = np.full(n, -9)
        for at in range(0, n, step):
            piece = slice(at, at + step)
            size = balance.plan_greedy(
                held, size, capacity, np.array(LABELS), counts, *pair, start + at, read_only(groups[piece]), rows_taken[piece]
            )
        assert rows_taken.tolist() == wanted
        assert held[:size].tolist() == row_labels
        assert counts.tolist() == [row_labels.count(c) for c in LABELS]


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
    balanced.hash_groups(read_only(np.array(IDS, np.int64)), *pair, out)
    assert out.tolist() == [key(g & M64, g0, g1) for g in IDS]
    assert [int(h) for h in leanreplay.policies.balanced.group_hash(IDS[:2], 3)] == [PINNED[6], PINNED[7]]


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
        at = balanced._find(groups, table, name, np.uint64(key(name & M64, g0, g1)))
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
            balanced._insert(keys_of, links, groups, 0, row, np.uint64(value))
            inside[row] = value
        else:
            row = int(balanced._remove_least(keys_of, links, groups, 0))
            assert inside.pop(row) <= min(inside.values(), default=M64)
            outside.append(row)
        assert groups[0, balanced.HELD] == len(inside)
        assert int(groups[0, balanced.LEAST]) & M64 == min(inside.values(), default=0)
    last = -1
    while inside:
        value = inside.pop(int(balanced._remove_least(keys_of, links, groups, 0)))
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


# -- blocks and hashes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9, 15, 16, 17, 40, 64, 785])
def test_hashes(run: None, n: int) -> None:
    """Copy and hash, at any offset, are the oracle's; nothing beyond the copied bytes is touched."""
    rng = np.random.default_rng(n)
    src, before = rng.integers(0, 256, n + 40, np.uint8), rng.integers(0, 256, n + 40, np.uint8)
    for s, d in ((0, 0), (3, 5), (8, 16), (1, 8)):
        data = src[s : s + n].tobytes()
        assert int(rows._hash(read_only(src), np.uint64(s), np.uint64(n))) == digest(data)
        dst = before.copy()
        assert int(rows._copy(read_only(src), np.uint64(s), dst, np.uint64(d), np.uint64(n))) == digest(data)
        assert dst.tobytes() == before[:d].tobytes() + data + before[d + n :].tobytes()
    if n % 8 == 0:
        source, data = src[: (n + 40) // 8 * 8].view(np.uint64), src[8 : 8 + n].tobytes()
        assert int(rows._hash_words(read_only(source), np.uint64(8), np.uint64(n))) == digest(data)


def test_hash_notices_every_change_of_a_byte(run: None) -> None:
    """Every value of every byte of an odd number of them, and every swap of neighbours."""
    src = np.random.default_rng(0).integers(0, 256, 19, np.uint8)
    reference = int(rows._hash(src, np.uint64(0), np.uint64(19)))
    step = 1 if hasattr(rows.verify_rows, "py_func") and hasattr(rows._hash, "py_func") else 37
    for i in range(19):
        for change in range(1, 256, step):
            other = src.copy()
            other[i] ^= change
            assert int(rows._hash(other, np.uint64(0), np.uint64(19))) != reference
        other = src.copy()
        other[i], other[i - 1] = src[i - 1], src[i]
        assert src[i] == src[i - 1] or int(rows._hash(other, np.uint64(0), np.uint64(19))) != reference


@pytest.mark.parametrize(("count", "state"), [(1, 0), (2, 0), (7, 0), (7, 3), (40, 4)])
def test_blocks(run: None, count: int, state: int) -> None:
    """A sealed block reads back, and any changed byte makes it invalid."""
    rng = np.random.default_rng(count)
    mem = rng.integers(0, 256, 1003, np.uint8)
    before = mem.copy()
    block = rng.integers(0, 2**63, count, np.uint64)
    wanted = block.tolist()
    if state:
        wanted[state] = digest(np.array(wanted[state + 1 : -1], np.uint64).tobytes())
    wanted[-1] = digest(np.array(wanted[:-1], np.uint64).tobytes())
    rows.seal_block(mem, 64, block, state)
    assert mem[64 : 64 + 8 * count].view(np.uint64).tolist() == wanted == block.tolist()
    assert mem[:64].tobytes() == before[:64].tobytes()
    assert mem[64 + 8 * count :].tobytes() == before[64 + 8 * count :].tobytes()
    found = np.zeros(count, np.uint64)
    assert rows.read_block(read_only(mem), 64, found)
    assert found.tolist() == wanted
    for i in range(8 * count):
        mem[64 + i] ^= 1 + i % 255
        assert not rows.read_block(read_only(mem), 64, found), i
        mem[64 + i] ^= 1 + i % 255


# -- rows --------------------------------------------------------------------------------------------------------------


def reader(image: Image, chosen: list[int], first: int, last: int) -> tuple[int, list[list[bytes]], Any, list[int]]:
    """Call read_rows: number of bad rows, fields of each row, index, flags."""
    n = len(chosen)
    sizes = SIZES[first:last]
    places = np.cumsum([0] + [-(-n * s // 64) * 64 for s in sizes])
    out, index, bad = np.full(places[-1], 0xEE, np.uint8), np.full((2, n), -9), np.full(n, 7, np.uint8)
    sums = np.full(n, 9, np.uint64)
    wrong = rows.read_rows(read_only(image.mem), image.cols, first, last, np.array(chosen, np.int64), out, places, index, sums, bad)
    found = [[out[places[f] + i * s :][:s].tobytes() for f, s in enumerate(sizes)] for i in range(n)]
    return int(wrong), found, index, bad.tolist()


@pytest.mark.parametrize("chosen", [[], [0], [5], [3, 3, 3], [5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5] * 3])
def test_read_rows(run: None, chosen: list[int]) -> None:
    """None, one, all, and more than all rows in any order; all fields and each alone; from a read-only map."""
    image = Image(6, 1)
    before = image.mem.copy()
    for first, last in [(0, FIELDS), *((f, f + 1) for f in range(FIELDS))]:
        wrong, found, index, bad = reader(image, chosen, first, last)
        assert (wrong, bad) == (0, [0] * len(chosen))
        assert found == [[image.entry(r, f) for f in range(first, last)] for r in chosen]
        assert index.tolist() == [[image.position(r) for r in chosen], [image.group(r) for r in chosen]]
    assert (image.mem == before).all()


def changed(image: Image, found: tuple[Any, ...], flags: list[int]) -> tuple[int, list[int]]:
    """Call find_changed: number of bad rows, flags."""
    first, last, chosen, index, sums = found
    bad = np.array(flags, np.uint8)
    wrong = rows.find_changed(read_only(image.mem), image.cols, first, last, chosen, index, sums, bad)
    return int(wrong), bad.tolist()


@pytest.mark.parametrize("first, last", [(0, FIELDS), *((f, f + 1) for f in range(FIELDS))])
def test_find_changed(run: None, first: int, last: int) -> None:
    """After a read, another position, group or checksum of a field that was read makes a row bad, and no other does."""
    image = Image(6, 1)
    chosen = np.array([4, 2, 0, 2])
    out, places = np.empty(4 * sum(SIZES) + 64 * FIELDS, np.uint8), np.zeros(FIELDS, np.int64)
    index, sums, bad = np.empty((2, 4), np.int64), np.empty(4, np.uint64), np.empty(4, np.uint8)
    assert rows.read_rows(read_only(image.mem), image.cols, first, last, chosen, out, places, index, sums, bad) == 0
    found = first, last, chosen, index, sums
    assert changed(image, found, [0, 0, 0, 0]) == (0, [0, 0, 0, 0]) and changed(image, found, [0, 0, 1, 0]) == (1, [0, 0, 1, 0])
    words = [(image.offsets[FIELDS] + 16, True), (image.offsets[FIELDS + 1] + 16, True)]  # of row 2
    words += [(image.offsets[FIELDS + 2] + 8 * (2 * FIELDS + f), first <= f < last) for f in range(FIELDS)]
    for at, seen in words:
        image.mem[at + 3] ^= 1
        assert changed(image, found, [0, 0, 0, 0]) == ((2, [0, 1, 0, 1]) if seen else (0, [0, 0, 0, 0]))
        image.mem[at + 3] ^= 1


def test_read_rows_finds_what_is_wrong(run: None) -> None:
    """Free rows and any changed byte of a field, the index or the checksum make a row bad; of other fields not."""
    image = Image(7, 2, holes=True)
    assert reader(image, list(range(7)), 0, FIELDS)[3] == [0, 1, 0, 1, 0, 1, 0]
    for f in range(FIELDS):
        for at in {0, SIZES[f] // 2, SIZES[f] - 1}:
            image.mem[image.offsets[f] + 2 * SIZES[f] + at] ^= 4
            assert reader(image, [4, 2, 0, 2], 0, FIELDS)[::3] == (2, [0, 1, 0, 1])
            assert reader(image, [4, 2, 0, 2], f, f + 1)[0] == 2
            assert reader(image, [4, 2, 0, 2], (f + 1) % FIELDS, (f + 1) % FIELDS + 1)[0] == 0
            image.mem[image.offsets[f] + 2 * SIZES[f] + at] ^= 4
    for column in (FIELDS, FIELDS + 1):
        image.mem[image.offsets[column] + 8 * 2 + 1] ^= 16
        assert reader(image, [2, 4], 0, 1)[3] == [1, 0]
        image.mem[image.offsets[column] + 8 * 2 + 1] ^= 16
    moved = Image(7, 2, holes=True)
    for column in range(FIELDS + 3):
        moved.put(4, column, image.entry(2, column))
    assert reader(moved, [2, 4], 0, FIELDS)[3] == [0, 1]  # a right row in the wrong place


@pytest.mark.parametrize(
    ("taken", "wanted"),
    [
        ([], []),
        ([-1, -1], []),
        ([4], [(4, 0)]),
        ([0, 1, 2, 3, 4], [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]),
        ([2, -1, 2, 0, 2, 0], [(2, 4), (0, 5)]),
        ([1] * 9, [(1, 8)]),
        ([0, 5], None),
        ([0, -2], None),
    ],
)
def test_keep_last(run: None, taken: list[int], wanted: list[tuple[int, int]] | None) -> None:
    """Of the samples that take one row the last survives; rows outside are refused before anything is noted."""
    slots = np.zeros(5, np.int32)
    samples, found, positions = (np.full(len(taken), -9) for _ in range(3))
    index = read_only(np.zeros(5, np.int64))
    count = rows.keep_last(read_only(np.array(taken, np.int64)), np.zeros(0, np.int64), index, slots, 1000, samples, found, positions)
    assert not slots.any()
    if wanted is None:
        assert count == -1
    else:
        assert list(zip(found[:count].tolist(), samples[:count].tolist(), strict=True)) == wanted
        assert positions[:count].tolist() == [1000 + s for _, s in wanted]


@pytest.mark.parametrize(
    ("freed", "right"),
    [
        ([], True),
        ([3], True),
        ([3, 0], True),
        ([3, 3], False),
        ([0, 1], False),  # taken
        ([0, 2], False),  # free before
        ([0, 5], False),
        ([0, -1], False),
        ([2**62, 0], False),
    ],
)
def test_keep_last_looks_at_freed_rows(run: None, freed: list[int], right: bool) -> None:
    """Rows that a policy gives up are live, not taken, and there once: else the journal could not undo them, nor hold them."""
    slots, index = np.zeros(5, np.int32), np.array([7, 8, -1, 9, 0])
    samples, found, positions = (np.full(3, -9) for _ in range(3))
    given = np.array(freed, np.int64)
    count = rows.keep_last(np.array([4, -1, 1]), given, index, slots, 1000, samples, found, positions)
    assert not slots.any()
    assert count == (2 if right else -2)
    assert given.tolist() == freed


@pytest.mark.parametrize("chosen", [[], [0], [1], [6, 2, 5, 0, 3], [6, 5, 4, 3, 2, 1, 0]])
@pytest.mark.parametrize(("whole", "changing"), [(7, []), (0, [4]), (2, [0, 3])])
def test_journal(run: None, chosen: list[int], whole: int, changing: list[int]) -> None:
    """save_rows, hash_records, exchange_digests, read_record and restore_rows: list, records, digests, and all bytes back."""
    image = Image(7, 3, holes=True)
    marks = np.zeros(FIELDS, np.uint8)
    marks[changing] = 1
    stamps = np.zeros(7, np.int32)
    stamps[[0, 2]] = 4
    before = image.mem.copy()
    digests = words(*image.digests(3))
    counts = np.full(4, -9)
    new = [r for r in chosen if image.position(r) >= 0 and stamps[r] != 4]
    old = [r for r in chosen if image.position(r) >= 0 and stamps[r] == 4]
    free = [r for r in chosen if image.position(r) < 0]
    order, live = new + old + free, len(new) + len(old)
    wanted = image.digests(3)
    for r in new + old:
        for f in range(FIELDS) if r in chosen[:whole] else changing:
            wanted[r % 3] = wanted[r % 3] - share(image.stored(r, f)) & M64
    place = (image.list_at, image.record_at, image.record)
    found = rows.save_rows(image.mem, image.cols, np.array(chosen, np.int64), whole, marks, stamps, 4, *place, digests, counts)
    assert int(found) == journal(image, order, live)
    assert counts.tolist() == [len(new), live, len(order), max(chosen, default=-1) + 1]
    assert digests.tolist() == wanted
    assert image.mem[image.list_at : image.list_at + 8 * len(order)].view(np.int64).tolist() == order
    assert image.columns() == before[: image.list_at].tobytes()
    assert [r for r in range(7) if stamps[r] == 4] == sorted({0, 2} | set(chosen))
    for i, r in enumerate(order[:live]):
        at = image.record_at + i * image.record
        for column, width in enumerate(image.widths):
            assert image.mem[at : at + width].tobytes() == image.entry(r, column)
            at += -(-width // 8) * 8

    # The records alone, as they lie in an undo file, have the same hash.
    copy = np.concatenate([image.mem[image.list_at :][: 8 * len(order)], image.mem[image.record_at :][: live * image.record]])
    assert int(rows.hash_records(read_only(copy), 0, 8 * len(order), image.record, live, len(order))) == int(found)
    if live:
        for at in (8 * len(order), copy.shape[0] - 1):
            copy[at] ^= 1
            assert int(rows.hash_records(read_only(copy), 0, 8 * len(order), image.record, live, len(order))) != int(found)
            copy[at] ^= 1

    # Each record reads as a row of a file of its own.
    own = image.cols.copy()
    own[:, 0] = np.cumsum([0] + [-(-w // 8) * 8 for w in image.widths[:-1]])
    places = np.cumsum([0] + [-(-s // 8) * 8 for s in SIZES])
    for i, r in enumerate(order[:live]):
        record = image.mem[image.record_at + i * image.record :][: image.record].copy()
        out = np.zeros(places[-1], np.uint8)
        assert rows.read_record(record, own, r, out, places)
        assert [out[places[f] :][: SIZES[f]].tobytes() for f in range(FIELDS)] == [image.entry(r, f) for f in range(FIELDS)]
        assert not rows.read_record(record, own, r + 1, out, places)
        record[int(own[6, 0]) + 784] ^= 1
        assert not rows.read_record(record, own, r, out, places)

    # Overwrite the rows; the records bring everything back, those in use only.
    rng = random.Random(9)
    for r in order:
        image.write(r, [rng.randbytes(s) for s in SIZES], 1000 + r, 1)
    present = words(*image.digests(3))
    use = np.ones(len(order), np.uint8)
    use[1::3] = 0
    source = read_only(image.mem.copy())
    rows.exchange_digests(source, image.cols, *place, live, use, read_only(image.mem), present)
    rows.restore_rows(source, image.cols, *place, live, use, image.mem)
    assert present.tolist() == image.digests(3)
    reference = Image(7, 3, holes=True)
    for i, r in enumerate(order):
        if not use[i]:
            assert image.position(r) == 1000 + r
        elif i < live:
            assert all(image.entry(r, c) == reference.entry(r, c) for c in range(FIELDS + 3))
        else:
            assert image.position(r) == -1
    rows.restore_rows(source, image.cols, *place, live, np.ones(len(order), np.uint8), image.mem)
    for r in range(7):
        columns = range(FIELDS + 3) if reference.position(r) >= 0 or r not in chosen else [FIELDS]
        assert all(image.entry(r, c) == reference.entry(r, c) for c in columns)


def test_journal_without_stamps(run: None) -> None:
    """Without restore points every live row counts as new."""
    image = Image(4, 5)
    counts = np.zeros(4, np.int64)
    rows.save_rows(
        image.mem, image.cols, np.array([2, 0]), 2, np.zeros(FIELDS, np.uint8), np.zeros(0, np.int32), 1,
        image.list_at, image.record_at, image.record, words(0), counts,
    )  # fmt: skip
    assert counts.tolist() == [2, 2, 2, 3]


@pytest.mark.parametrize("chosen", [[], [3], [4, 0, 2], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("f", range(FIELDS))
def test_write_field(run: None, f: int, chosen: list[int]) -> None:
    """Bytes, checksums and digests of the rows written, and nothing else; sources in any order, repeated, read-only."""
    image = Image(5, 6)
    reference = Image(5, 6)
    rng = np.random.default_rng(f)
    source = rng.integers(0, 256, 8 * SIZES[f], np.uint8)
    samples = rng.integers(0, 8, len(chosen))
    digests = words(10, 20, 30)
    positions, groups = (
        np.array([reference.position(r) for r in chosen], np.int64),
        np.array([reference.group(r) for r in chosen], np.int64),
    )
    wanted = [10, 20, 30]
    for r, s in zip(chosen, samples.tolist(), strict=True):
        data = source[s * SIZES[f] : (s + 1) * SIZES[f]].tobytes()
        reference.put(r, f, data)
        value = checksum(data, r, reference.position(r), reference.group(r), f)
        sums = bytearray(reference.entry(r, FIELDS + 2))
        sums[8 * f : 8 * f + 8] = value.to_bytes(8, "little")
        reference.put(r, FIELDS + 2, bytes(sums))
        wanted[r % 3] = wanted[r % 3] + share(value) & M64
    rows.write_field(image.mem, image.cols, f, np.array(chosen, np.int64), samples, read_only(source), positions, groups, digests)
    assert image.mem.tobytes() == reference.mem.tobytes()
    assert digests.tolist() == wanted


@pytest.mark.parametrize("chosen", [[], [3], [4, 0, 2]])
def test_write_index(run: None, chosen: list[int]) -> None:
    """Position and group of the rows written, and nothing else."""
    image, reference = Image(5, 6), Image(5, 6)
    positions, groups = np.arange(len(chosen)) + 2**40, -np.arange(len(chosen)) - 1
    for r, p, g in zip(chosen, positions.tolist(), groups.tolist(), strict=True):
        reference.put(r, FIELDS, p.to_bytes(8, "little"))
        reference.put(r, FIELDS + 1, g.to_bytes(8, "little", signed=True))
    rows.write_index(image.mem, image.cols, np.array(chosen, np.int64), positions, groups)
    assert image.mem.tobytes() == reference.mem.tobytes()


PLANS = [[-1], [3], [4, -1, 0, 6], [0, 1, 2, 3, 4, 5, 6], [2, -1, 2, 6, 2, -1, 6, 0]]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("fields", [1, 2, 4])
def test_commit_rows(run: None, fields: int, given: bool, plan: list[int]) -> None:
    """What the steps leave, each called for itself: journal, seal, rows, index, header. Nothing, for a wrong plan or without pages."""
    seal_at, header_at = 8, 8 + 8 * 8  # words of their own, in place of the first two columns
    shift = header_at + 8 * 20
    rng = np.random.default_rng(1)
    first, start, n = 5, 2**41, len(plan)
    sources = [rng.integers(0, 256, (first + n) * size, np.uint8) for size in SIZES[3:7][:fields]]
    positions, groups = rng.integers(0, 2**41, n), -np.arange(first + n)
    planned = np.array(plan, np.int64)
    count = len(set(plan) - {-1})
    live = sum(0 <= r < 5 for r in set(plan))

    def made() -> tuple[Any, ...]:
        image = Image(7, 8, live=5)
        memory = np.concatenate([np.zeros(shift, np.uint8), image.mem])
        memory = np.concatenate([memory, np.zeros(-len(memory) % 8, np.uint8)])
        which = [*range(3, 3 + fields), FIELDS, FIELDS + 1, FIELDS + 2]
        cols = image.cols[which].copy()
        cols[:, 0] += np.uint64(shift)
        cols[-1, 1] = 8 * fields
        place = (image.list_at + shift, image.record_at + shift, sum(-(-int(size) // 8) * 8 for _, size in cols))
        head, seal = np.arange(20, dtype=np.uint64), np.arange(8, dtype=np.uint64)
        head[2] = 5
        return memory, cols, place, head, seal, np.zeros(7, np.int32)

    def call(plan: Any, most: int = 7, ready: int = 5, faulted: int = 7) -> tuple[int, tuple[Any, ...]]:
        memory, cols, place, head, seal, slots = made()
        data = [*sources, *[np.zeros(0, np.uint8)] * (4 - fields)]
        at = np.array([*place, seal_at, 1, 3, 5, 2, 4, 6, 8, 3])
        where = positions if given else positions[:0]
        limits = most, ready, faulted
        found = rows.commit_rows(memory, cols, plan, slots, start, where, groups, first, *data, seal, head, header_at, *limits, at)
        return found, (memory.tobytes(), seal.tolist(), head.tolist(), slots.tolist())

    def steps() -> tuple[Any, ...]:
        memory, cols, place, head, seal, slots = made()
        digests, none, counts = head[8:11], np.zeros(0, np.int32), np.zeros(4, np.int64)
        samples, taken, places = (np.zeros(n, np.int64) for _ in range(3))
        assert rows.keep_last(planned, planned[:0], planned[:0], slots, start, samples, taken, places) == count
        samples, taken, places = samples[:count], taken[:count], positions[samples[:count]] if given else places[:count]
        if count:
            seal[5] = rows.save_rows(memory, cols, taken, count, np.zeros(fields, np.uint8), none, 0, *place, digests, counts)
            seal[1], seal[3] = counts[1], counts[2]
            rows.seal_block(memory, seal_at, seal, 0)
            for f, source in enumerate(sources):
                rows.write_field(memory, cols, f, taken, samples + first, source, places, groups[samples + first], digests)
            rows.write_index(memory, cols, taken, places, groups[samples + first])
        head[2] += np.uint64(counts[2] - counts[1])
        head[4] = max(int(head[4]), int(counts[3]))
        rows.seal_block(memory, header_at, head, 6)
        return memory.tobytes(), seal.tolist(), head.tolist(), slots.tolist()

    found, left = call(planned)
    assert found == count
    assert left == steps()
    assert left[2][2] == 5 + count - live and left[2][4] == max(4, *plan, max(plan) + 1)
    memory, _, _, head, seal, slots = made()
    before = memory.tobytes(), seal.tolist(), head.tolist(), slots.tolist()
    for wrong in (7, -2):
        assert call(np.array([*plan[:-1], wrong])) == (-1, before)
    if count:
        assert call(planned, most=count - 1) == (-1, before)
        assert call(planned, ready=min(count, 5) - 1) == (-2, before)
        assert call(planned, faulted=max(plan)) == (-2, before)
        assert call(planned, most=count, ready=min(count, 5), faulted=max(plan) + 1) == (count, left)


@pytest.mark.parametrize(
    ("capacity", "live", "holes"), [(1, 0, False), (1, 1, False), (6, 0, False), (6, 4, False), (9, 9, True), (8, 8, True)]
)
def test_scan_and_verify(run: None, capacity: int, live: int, holes: bool) -> None:
    """Empty, partly filled, full, with holes: counts and digests; and verify_rows names exactly the wrong rows."""
    image = Image(capacity, 7, holes, live)
    digests = np.zeros(4, np.uint64)
    alive = image.live()
    found = rows.scan_index(read_only(image.mem), image.cols, capacity, digests)
    assert (int(found[0]), int(found[1])) == (len(alive), max(alive, default=-1) + 1)
    assert digests.tolist() == image.digests(4)
    bad = np.full(capacity, 7, np.uint8)
    rows.verify_rows(read_only(image.mem), image.cols, 0, capacity, bad)
    assert not bad.any()
    for r in range(capacity):
        column = r % (FIELDS + 3)
        image.mem[image.offsets[column] + r * image.widths[column]] ^= 2
        for start, stop in {(0, capacity), (r, r + 1), (r // 2, capacity)}:
            bad = np.full(stop - start, 7, np.uint8)
            rows.verify_rows(read_only(image.mem), image.cols, start, stop, bad)
            wrong = [start + int(i) for i in np.flatnonzero(bad)]
            assert wrong == ([r] if image.position(r) != -1 else [])
        image.mem[image.offsets[column] + r * image.widths[column]] ^= 2


@pytest.mark.parametrize("chosen", [[], [0], [6, 2, 4], [0, 2, 4, 6]])
def test_freed_rows(run: None, chosen: list[int]) -> None:
    """save_freed, hash_freed, restore_freed, copy_records: three words a row, digests, and position and group back."""
    image = Image(7, 8, holes=True)
    reference = Image(7, 8, holes=True)
    digests, wanted = words(*image.digests(3)), image.digests(3)
    for r in chosen:
        for f in range(FIELDS):
            wanted[r % 3] = wanted[r % 3] - share(image.stored(r, f)) & M64
    at, before = image.list_at + 16, image.mem.copy()
    data = b"".join(v.to_bytes(8, "little", signed=True) for r in chosen for v in (r, image.position(r), image.group(r)))
    found = int(rows.save_freed(image.mem, image.cols, np.array(chosen, np.int64), at, digests))
    assert found == digest(data)
    assert digests.tolist() == wanted
    assert image.mem.tobytes() == before[:at].tobytes() + data + before[at + len(data) :].tobytes()
    assert int(rows.hash_freed(read_only(image.mem), at, len(chosen))) == found
    for place in {at, at + len(data) // 2, at + len(data) - 1} if chosen else ():
        image.mem[place] ^= 8
        assert int(rows.hash_freed(read_only(image.mem), at, len(chosen))) != found
        image.mem[place] ^= 8

    record = np.zeros(8 + len(chosen) * image.record, np.uint8)
    rows.copy_records(read_only(image.mem), image.cols, np.array(chosen, np.int64), record, 8, image.record)
    padded = [b"".join(e + bytes(-len(e) % 8) for e in (image.entry(r, c) for c in range(FIELDS + 3))) for r in chosen]
    assert record.tobytes() == bytes(8) + b"".join(padded)

    for r in chosen:
        image.put(r, FIELDS, (-1).to_bytes(8, "little", signed=True))
        image.put(r, FIELDS + 1, bytes(8))
    assert image.digests(3) == wanted
    rows.restore_freed(read_only(image.mem.copy()), image.cols, at, len(chosen), image.mem)
    assert image.columns() == reference.columns()


@pytest.mark.parametrize("count", [0, 1, 2, 30])
def test_hash_log(run: None, count: int) -> None:
    """The hash of a log goes on from that of its beginning, and any entry that changes, moves or is missing changes it."""
    rng = random.Random(count)
    log = [(rng.randrange(2), rng.choice([0, 1, -1, 2**40, -(2**63), rng.randrange(50)])) for _ in range(count)]
    value = 0
    for what, entry in log:
        value = mix(mix(value + (what & M64) * GOLDEN & M64) + (entry & M64) & M64)
    entries = np.array(log, np.int64).reshape(-1, 2)
    assert int(rows.hash_log(np.uint64(0), read_only(entries))) == value
    for cut in {0, count // 2, count}:
        first = np.uint64(rows.hash_log(np.uint64(0), entries[:cut]))
        assert int(rows.hash_log(first, entries[cut:])) == value
    for i in range(count):
        for column in (0, 1):
            other = entries.copy()
            other[i, column] ^= 1 << (5 * i % 64)
            assert int(rows.hash_log(np.uint64(0), other)) != value
        swapped = entries.copy()
        swapped[[i, i - 1]] = entries[[i - 1, i]]
        assert (swapped == entries).all() or int(rows.hash_log(np.uint64(0), swapped)) != value


# -- every kernel, and processes of other settings ---------------------------------------------------------------------


def test_every_kernel_is_tested() -> None:
    """A new kernel needs a test that calls it, here or in another file."""
    text = "".join(file.read_text(encoding="utf-8") for file in TESTS.rglob("test_*.py"))
    names = [m.name for m in pkgutil.iter_modules(kernels.__path__)]
    assert {"balance", "balanced", "merge", "reservoir", "rows"} <= set(names)
    for module in names:
        for name in public_kernels(importlib.import_module(f"{kernels.__name__}.{module}")):
            assert re.search(rf"\b{module}\.{name}\(", text), f"{module}.{name} has no test"


def public_kernels(module: ModuleType) -> list[str]:
    found = [n for n, v in vars(module).items() if not n.startswith("_") and getattr(v, "__module__", "") == module.__name__]
    assert found
    return found


def test_kernel_tests_without_jit() -> None:
    """The tests of this file, of kernels as plain Python, hold with NUMBA_DISABLE_JIT=1 as well."""
    here = Path(__file__)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "-k",
        "python and (reservoir or greedy or balanced or freed or log or journal or scan)",
    ]
    done = subprocess.run(
        [*command, str(here)],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "......" in done.stdout


@pytest.fixture
def library(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Settings under which a copy of the library is imported, and no folder can hold a cache: files stand in their places."""

    def make() -> dict[str, str]:
        copy = tmp_path / "library" / "leanreplay"
        shutil.copytree(ROOT / "leanreplay", copy, ignore=shutil.ignore_patterns("__pycache__"))
        blocked = tmp_path / "a file"
        blocked.touch()
        (copy / "kernels" / "__pycache__").touch()
        places = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"), str(blocked))
        return {**places, "PYTHONPATH": str(copy.parent), "PYTHONDONTWRITEBYTECODE": "1", "EXPECTED": str(copy), "NUMBA_OPT": "0"}

    return make


def test_no_folder_for_a_cache(library: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    """Where Numba finds no folder that it may write its cache to, the library compiles anew, and works."""
    settings = library()
    command = (
        "import os, numpy as np, leanreplay as lr; assert lr.__file__.startswith(os.environ['EXPECTED']), lr.__file__;"
        "b = lr.ReservoirBuffer(3); b.add(np.arange(9)); print(len(b.sample(3)[0]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], env={**os.environ, **settings}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "3\n"
