"""Kernels of keys, reservoirs and greedy balancing against an oracle in plain Python, compiled and as Python."""

from __future__ import annotations

import random

import numpy as np
import pytest
from kernel_oracle import GOLDEN, M64, PINNED, digest, fin, key, keys, read_only, words

from leanreplay.kernels import greedy, hashing, heaps, reservoir, scored, sums
from leanreplay.keys import key_pair


def fin_inverse(x: int) -> int:
    """What `fin` came from."""
    x ^= x >> 31 ^ x >> 62
    x = x * pow(0x94D049BB133111EB, -1, 2**64) & M64
    x ^= x >> 27 ^ x >> 54
    x = x * pow(0xBF58476D1CE4E5B9, -1, 2**64) & M64
    return x ^ x >> 30 ^ x >> 60


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


def test_heaps(run: None) -> None:
    """The worst is on top: the smallest key, of equal ones the youngest; what is put in its place sinks."""
    rng = random.Random(3)
    assert heaps.is_worse(np.uint64(1), 5, np.uint64(2), 0) and not heaps.is_worse(np.uint64(2), 0, np.uint64(1), 5)
    assert heaps.is_worse(np.uint64(1), 5, np.uint64(1), 4) and not heaps.is_worse(np.uint64(1), 4, np.uint64(1), 4)
    held_keys, held, rows = np.zeros(20, np.uint64), np.zeros(20, np.int64), np.zeros(20, np.int64)
    inside: list[tuple[int, int, int]] = []
    for i in range(200):
        entry = (rng.randrange(5), -i, i)  # of equal keys the one of the smaller -position stays longer
        if len(inside) < 20:
            heaps.sift_up(held_keys, held, rows, len(inside), np.uint64(entry[0]), i, i)
        else:
            inside.remove((int(held_keys[0]), -int(held[0]), int(rows[0])))
            heaps.sift_down(held_keys, held, rows, 20, 0, np.uint64(entry[0]), i, i)
        inside.append(entry)
        assert (int(held_keys[0]), -int(held[0]), int(rows[0])) == min(inside)
    values, numbers = np.array(rng.sample(range(1000), 31)), np.arange(31)
    pairs = set(zip(values.tolist(), numbers.tolist(), strict=True))
    for i in range(15, -1, -1):
        heaps.sink(values, numbers, 31, i)
    assert all(values[(i - 1) // 2] < values[i] for i in range(1, 31))
    assert set(zip(values.tolist(), numbers.tolist(), strict=True)) == pairs


# -- greedy ------------------------------------------------------------------------------------------------------------


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
        found = greedy.largest_class(np.array(labels), np.array(counts), np.uint64(base))
        assert labels[found] == largest(dict(zip(labels, counts, strict=True)), base)


@pytest.mark.parametrize("size", [1, 2, 30])
def test_random_member(run: None, size: int) -> None:
    """A row of the class, the same one as the oracle's; a class of one row among many is found."""
    row_labels = np.array([7] + [3] * (size - 1) + [7] * 2)  # rows beyond `size` do not count
    for i in range(60):
        base = fin(i)
        assert greedy.random_member(read_only(row_labels), size, 7, np.uint64(base)) == 0
        if size > 1:
            assert greedy.random_member(row_labels, size, 3, np.uint64(base)) == member(row_labels[:size].tolist(), 3, base)


def test_random_member_with_a_wrong_count_ends(run: None) -> None:
    """A class that is nowhere: no endless loop."""
    assert greedy.random_member(np.zeros(4, np.int64), 4, 9, np.uint64(1)) == 0


@pytest.mark.parametrize(("capacity", "n"), [(1, 0), (1, 1), (1, 20), (4, 3), (4, 4), (4, 40), (25, 150)])
@pytest.mark.parametrize("below_share", [False, True])
def test_plan_greedy(run: None, capacity: int, n: int, below_share: bool) -> None:
    """In one piece and in pieces: rows, labels and counts of a reservoir of lists. below_share: of GDumb's Algorithm 1, which
    divides by the classes seen."""
    pair, k0, k1 = keys("greedy", capacity)
    groups = np.random.default_rng(n).choice(LABELS, n)
    start = 3 * 2**48
    row_labels: list[int] = []
    wanted = []
    for i, label in enumerate(groups.tolist()):
        if below_share and row_labels.count(label) >= capacity / len(set(groups[: i + 1].tolist())):
            wanted.append(-1)
            continue
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
            size = greedy.plan_greedy(
                held, size, capacity, np.array(LABELS), counts, below_share, *pair, start + at, read_only(groups[piece]), rows_taken[piece]
            )
        assert rows_taken.tolist() == wanted
        assert held[:size].tolist() == row_labels
        assert counts.tolist() == [row_labels.count(c) for c in LABELS]


# -- scores ------------------------------------------------------------------------------------------------------------


def test_slots_and_hashes_of_draws(run: None) -> None:
    """Entries are found where they were put, in a table that is half full; the hash of a draw is pinned by its definition."""
    table = np.full(16, -1, np.int64)
    for entry in range(0, 80, 10):
        table[hashing.find_slot(table, entry)] = entry
    assert all(table[hashing.find_slot(table, entry)] == entry for entry in range(0, 80, 10))
    assert table[hashing.find_slot(table, 5)] == -1
    wanted = fin((fin((fin((9 * GOLDEN + 3) & M64) + 7) & M64) + 5) & M64)
    assert int(hashing.hash_of_draw(np.uint64(3), np.uint64(5), 9, 7)) == wanted


@pytest.mark.parametrize("n", [1, 7, 8, 9, 65, 600])
def test_ranks(run: None, n: int) -> None:
    """The lowest score, of equal ones the oldest, and the highest, of equal ones the youngest: built, and changed row by row."""
    rng = np.random.default_rng(n)
    starts = heaps.levels(n + 3)
    assert starts[0] == 0
    assert starts[-1] == starts[-2] + 1
    starts = starts[1:] - starts[1]
    scores, held = rng.choice([0.0, 1.0, -1.0, 5.0], n + 3), rng.permutation(n + 3)
    lows, highs = np.full((2, starts[-1]), -1, np.int64)
    scored.build_ranks(scores, held, lows, highs, starts, n)
    for _ in range(20):
        order = np.lexsort((held[:n], scores[:n]))
        assert (lows[-1], highs[-1]) == (order[0], order[-1])
        rows = rng.integers(0, n, 2)
        scored.set_scores(scores, held, lows, highs, starts, n, rows, rng.choice([0.0, -2.0, 7.0], 2))
    rows = np.empty(5, np.int64)
    new = np.array([9.0, -9.0, 9.0, 9.0, 9.0])
    k = np.uint64(1)
    used, size = scored.plan_scored(scores, held, lows, highs, starts, n, n + 3, scored.LOWEST, False, k, k, 1000, 3, new, rows)
    assert (used, size, rows[:3].tolist()) == (3, n + 3, [n, n + 1, n + 2])


@pytest.mark.parametrize("n", [1, 8, 9, 100, 700])
def test_sums(run: None, n: int) -> None:
    """A tree of sums finds what adding up finds, and follows from its weights alone, whatever changed before."""
    rng = np.random.default_rng(n)
    starts = heaps.levels(n)
    values = rng.integers(0, 5, n).astype(np.float64)
    values[0] = 3.0
    tree, again = np.zeros((2, starts[-1]))
    assert sums.weigh(values, 2.0, tree[:n]) == -1
    assert (tree[:n] == values**2).all()
    assert sums.weigh(np.array([1.0, np.nan, -1.0]), 1.0, np.empty(3)) == 1
    assert sums.build_sums(tree, starts) == (values**2).sum()
    rows = np.unique(rng.integers(0, n, 9))
    new = rng.integers(0, 9, rows.shape[0]).astype(np.float64)
    values = values**2
    values[rows] = new
    again[:n] = values
    assert sums.set_weights(tree, starts, rows, new) == sums.build_sums(again, starts) == values.sum()
    assert (tree == again).all()
    numbers = np.arange(int(values.sum()))
    found = np.empty(numbers.shape[0], np.int64)
    sums.rows_at(tree, starts, numbers, found)
    assert (found == np.repeat(np.arange(n), values.astype(np.int64))).all()
    drawn = np.empty(min(20, n), np.int64)
    assert sums.draw_by_weight(tree, starts, np.uint64(1), np.uint64(2), 3, 4, True, drawn) == drawn.shape[0]
    base = fin((fin((fin((3 * GOLDEN + 1) & M64) + 4) & M64) + 2) & M64)
    targets = [(fin((base + i * GOLDEN) & M64) >> 11) / 2**53 * values.sum() for i in range(drawn.shape[0])]
    assert drawn.tolist() == np.searchsorted(np.cumsum(values), targets, side="right").tolist()
    few = np.empty(n, np.int64)
    distinct = sums.draw_by_weight(tree, starts, np.uint64(1), np.uint64(2), 3, 4, False, few)
    assert 0 < distinct <= (values > 0).sum()
    assert few[:distinct].tolist() == list(dict.fromkeys(drawn.tolist()))[:distinct] or distinct > len(set(drawn.tolist()))
