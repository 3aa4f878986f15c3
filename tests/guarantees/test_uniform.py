"""G1, exact: what a buffer keeps and what it draws is uniform, for seeds 0, 1, 2, ... and every stream number.

Tests are chi-square tests with the exact covariance of sampling without replacement, turned into a standard normal `z` (Wilson
and Hilferty 1931). Seeds are fixed, so a right implementation gives the same z every time: all are below 3.2 here.
The classic off-by-one (`randint(0, count)` where `count + 1` is needed: the first sample after the buffer is full always
enters) gives z of about 10 at capacity 10 and stream 20 with 2,000 seeds, a draw that forgets a moved entry z > 50.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from laws import LIMIT, assert_even, assert_inclusion, z_score
from nightly import times

import leanreplay
from leanreplay import CapacityWarning, GreedyClassBalancingBuffer, ReservoirBuffer, ReservoirPolicy, Schema, SlidingWindowBuffer
from leanreplay.policies.greedy import GreedyClassBalancingPolicy

NUMBER = Schema.from_sample(0)
STREAM = 2**48
NONE = np.zeros(0, np.int64)


# -- helpers -----------------------------------------------------------------------------------------------------------


def planned(capacity: int, n: int, seed: int, stream: int = 0) -> Any:
    """The positions that the policy alone keeps of the first n: (n,) bool."""
    policy = ReservoirPolicy(capacity, seed, {})
    policy.load(NONE, NONE)
    rows = policy.plan(stream * STREAM, np.empty(n, np.int64), n).rows
    assert len(rows) == n
    held = np.full(capacity, -1)
    for i in np.flatnonzero(rows >= 0):
        held[rows[i]] = i
    kept = np.zeros(n, bool)
    kept[held[held >= 0]] = True
    return kept


class Bare:
    """A reservoir's policy without a buffer: the index and the state that it sees, and nothing else. It is a thousand times as fast."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.seed, self.state, self.seen = seed, [0] * 8, 0
        self.positions = NONE
        self.load(capacity)

    def load(self, capacity: int) -> None:
        """As when a file is opened: from positions and state alone."""
        self.capacity = capacity
        self.policy = ReservoirPolicy(capacity, self.seed, {})
        self.policy.state = list(self.state)
        self.policy.load(self.positions, NONE)

    def add(self, n: int) -> None:
        rows = self.policy.plan(self.seen, np.empty(n, np.int64), n).rows
        assert len(rows) == n
        self.state = list(self.policy.state)
        index = np.full(self.capacity, -1)
        index[: self.positions.shape[0]] = self.positions
        for i in np.flatnonzero(rows >= 0):
            index[rows[i]] = self.seen + i
        self.positions, self.seen = index[index >= 0], self.seen + n

    def resize(self, capacity: int) -> None:
        self.positions = self.positions[self.policy.keep(capacity, self.positions, NONE)]
        self.state = list(self.policy.state)
        self.load(capacity)

    def kept(self) -> Any:
        """(seen,) bool."""
        kept = np.zeros(self.seen, bool)
        kept[self.positions] = True
        return kept


SEEDS = times(2000, 5000)  # of a law of one policy; the classic off-by-one is z = 10 with 2,000
IN_BUFFERS = times(50, 200)  # seeds for which buffers are shown to keep what their policy alone does, whose statistics are over 2,000


def held(buffer: Any, n: int) -> Any:
    """The positions that a buffer keeps of the first n: (n,) bool. The samples are their own positions."""
    values, meta = buffer.get(buffer.get_metadata("idx"))
    assert (values == meta["position"] % STREAM).all()
    kept = np.zeros(n, bool)
    kept[values] = True
    return kept


class Broken:
    """A dataset of numbers that fails on one item, in the middle of an update: the commit under way is not made."""

    def __init__(self, start: int, n: int, fails_at: int) -> None:
        self.start, self.n, self.fails_at = start, n, fails_at

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> int:
        if i >= self.fails_at:
            raise RuntimeError("as wanted")
        return self.start + i


# -- the reservoir -----------------------------------------------------------------------------------------------------


def test_the_tests_notice_the_classic_off_by_one() -> None:
    """The statistics have the power that they are used for, on NumPy's own generator."""
    rng = np.random.default_rng(0)

    def algorithm_r(slip: int) -> Any:
        rows = list(range(10))
        for count in range(10, 20):
            j = int(rng.integers(0, count + 1 - slip))
            if j < 10:
                rows[j] = count
        kept = np.zeros(20, bool)
        kept[rows] = True
        return kept

    right = np.array([algorithm_r(0) for _ in range(2000)])
    wrong = np.array([algorithm_r(1) for _ in range(2000)])
    assert_inclusion(right, 10)
    assert abs(wrong[:, :10].mean() / wrong.mean() / 2 - 0.473) < 0.006
    with pytest.raises(AssertionError, match="singles"):
        assert_inclusion(wrong, 10)
    with pytest.raises(AssertionError, match="pairs"):  # even singles, but positions come in couples
        assert_inclusion(np.repeat([planned(5, 10, seed) for seed in range(2000)], 2, axis=1), 10)


@pytest.mark.parametrize(("capacity", "n"), [(10, 20), (1, 2), (1, 9), (2, 30), (10, 11), (19, 20), (33, 64)])
def test_inclusion(capacity: int, n: int) -> None:
    """G1: seeds from 0 on; single positions and pairs."""
    kept = np.array([planned(capacity, n, seed) for seed in range(SEEDS)])
    assert_inclusion(kept, capacity, f"{capacity} of {n}")


def test_inclusion_in_buffers() -> None:
    """G1 at capacity 10 and stream 20: the first half against the second; through the public interface it is the same."""
    seeds = 2000
    kept = np.array([planned(10, 20, seed) for seed in range(seeds)])
    for seed in range(times(100, seeds)):
        with ReservoirBuffer(10, seed=seed, schema=NUMBER) as buffer:
            for start in (0, 9, 11, 14):
                buffer.add(np.arange(start, {0: 9, 9: 11, 11: 14, 14: 20}[start]))
            assert (held(buffer, 20) == kept[seed]).all(), seed
    assert_inclusion(kept, 10)
    # A half's share of the 10 is hypergeometric: variance 10 / 4 * 10 / 19. An off-by-one gives 0.473, that is z = -10 for 2,000 seeds.
    z = (kept[:, :10].sum() - 5 * seeds) / math.sqrt(seeds * 10 / 4 * 10 / 19)
    assert abs(z) < LIMIT, z


@pytest.mark.parametrize("stream", [1, 2, 3, 1000, 32_767])
def test_inclusion_of_streams(stream: int) -> None:
    """G1 for stream numbers, and buffers agree with their policy."""
    assert_inclusion([planned(10, 20, seed, stream) for seed in range(SEEDS)], 10, f"stream {stream}")
    for seed in range(times(20, 50)):
        with ReservoirBuffer(10, seed=seed, stream=stream, schema=NUMBER) as buffer:
            buffer.add(np.arange(20))
            assert (held(buffer, 20) == planned(10, 20, seed, stream)).all(), seed


def test_inclusion_over_streams_of_one_seed() -> None:
    """G1: the randomness may as well come from the stream number alone."""
    assert_inclusion([planned(10, 20, 7, stream) for stream in range(4 * SEEDS)], 10)


@pytest.mark.parametrize("what", ["seeds", "streams", "seed and stream"])
def test_neighbours_are_independent(what: str) -> None:
    """G1: what one seed or stream keeps says nothing about what the next one keeps, for every pair of positions."""
    trials = 2 * SEEDS
    where = {"seeds": lambda i: (i, 0), "streams": lambda i: (5, i), "seed and stream": lambda i: (i, i % 32_768)}[what]
    kept = np.array([planned(6, 12, *where(i)) for i in range(trials + 1)], float) - 0.5
    both = kept[:-1].T @ kept[1:]
    # Of independent subsets of half size: variance of an entry 1/16 each, on the (n - 1)^2 dimensions orthogonal to constants.
    z = z_score((both**2).sum() / (trials / 16) * (11 / 12) ** 2, 11 * 11)
    assert abs(z) < LIMIT, z


def test_later_samples_of_a_long_stream() -> None:
    """G1 where keys are compared with very large ones: 4 of 3,000, in 20 blocks of positions."""
    kept = np.array([planned(4, 3000, seed) for seed in range(SEEDS)])
    blocks, mean = kept.reshape(SEEDS, 20, 150).sum((0, 2)), SEEDS / 5
    z = z_score((((blocks - mean) ** 2) / mean * 2999 / 2996).sum(), 19)
    assert abs(z) < LIMIT, (z, blocks)


def test_inclusion_after_resizing() -> None:
    """G1 with the capacity rule: 12 rows, down to 8 after drops, up to 20, down to 5 and up again."""
    after_up, after_all = [], []
    for seed in range(times(1000, 2000)):
        bare = Bare(12, seed)
        bare.add(16)
        bare.resize(8)
        bare.add(4)
        bare.resize(20)
        bare.add(10)
        after_up.append(bare.kept())
        bare.resize(5)
        bare.resize(9)
        bare.add(4)
        after_all.append(bare.kept())
    for seed in range(IN_BUFFERS):
        with ReservoirBuffer(12, seed=seed, schema=NUMBER) as buffer, warnings.catch_warnings():
            warnings.simplefilter("ignore", CapacityWarning)
            buffer.add(np.arange(16))
            buffer.resize(8)
            assert_rows(buffer, 8, seed)
            buffer.add(np.arange(16, 20))
            buffer.resize(20)
            buffer.add(np.arange(20, 30))
            assert_rows(buffer, 8, seed)
            assert (held(buffer, 30) == after_up[seed]).all(), f"seed {seed}"
            buffer.resize(5)
            buffer.resize(9)
            buffer.add(np.arange(30, 34))
            assert_rows(buffer, 5, seed)
            assert (held(buffer, 34) == after_all[seed]).all(), f"seed {seed}"
    assert_inclusion(after_up, 8, "down and up")
    assert_inclusion(after_all, 5, "down and up twice")


def assert_rows(buffer: Any, size: int, seed: int) -> None:
    assert len(buffer) == size, f"seed {seed}: {len(buffer)} rows, expected {size}"


def test_inclusion_after_resizing_without_drops() -> None:
    """G1: nothing was dropped yet, so the new rows may be used."""
    kept = []
    for seed in range(times(1000, 2000)):
        bare = Bare(6, seed)
        bare.add(6)
        bare.resize(10)
        bare.add(14)
        kept.append(bare.kept())
    for seed in range(IN_BUFFERS):
        with ReservoirBuffer(6, seed=seed, schema=NUMBER) as buffer, warnings.catch_warnings():
            warnings.simplefilter("error", CapacityWarning)
            buffer.add(np.arange(6))
            buffer.resize(10)
            buffer.add(np.arange(6, 20))
            assert (held(buffer, 20) == kept[seed]).all(), f"seed {seed}"
    assert_inclusion(kept, 10)


@pytest.mark.parametrize("dropped", ["rejected by add", "by resize"])
def test_capacity_rule(dropped: str, tmp_path: Any) -> None:
    """G1: after a drop, resizing up adds no rows and says so; also for a file that was closed in between."""
    path = tmp_path / "b.h5"
    with ReservoirBuffer(10, path, seed=1) as buffer:
        buffer.add(np.arange(11 if dropped == "rejected by add" else 10))
        if dropped == "by resize":
            buffer.resize(9)
    bound = 10 if dropped == "rejected by add" else 9
    with ReservoirBuffer(path=path, mode="r+") as buffer:
        with pytest.warns(CapacityWarning, match=f"already dropped samples at {bound} rows"):
            buffer.resize(50)
        assert buffer.max_size == 50
        buffer.add(np.arange(buffer.seen, 200))
        assert len(buffer) == bound
        assert buffer.check() == []
    with ReservoirBuffer(path=path, mode="r+") as buffer:
        buffer.add(np.arange(200, 300))
        assert len(buffer) == bound
        assert (held(buffer, 300) == planned(bound, 300, 1)).all()


def test_inclusion_through_interruptions(tmp_path: Any) -> None:
    """G1; on disk: closed and opened, forgotten without closing, cut off in an update, batches replayed."""
    kept = []
    cuts_of = np.sort(np.random.default_rng(5).integers(1, 20, (times(1000, 2000), 3))).tolist()
    for seed, cuts in enumerate(cuts_of):
        bare = Bare(10, seed)
        for stop in (*cuts, 20):
            bare.add(stop - bare.seen)
            bare.load(10)
        kept.append(bare.kept())
    for seed, cuts in enumerate(cuts_of[:IN_BUFFERS]):
        path = str(tmp_path / "b.h5")
        buffer: Any = ReservoirBuffer(10, path, seed=seed, mode="w", schema=NUMBER)
        buffer.add(np.arange(cuts[0]))
        buffer.close()
        buffer = ReservoirBuffer(path=path, mode="r+")
        start = cuts[0] // 2
        buffer.add(np.arange(start, cuts[1]), at=start)
        with pytest.raises(RuntimeError, match="as wanted"):
            buffer.update(Broken(cuts[1], 1000, 1 + seed % 3))
        seen = buffer.seen
        assert seen == cuts[1], f"seed {seed}"
        buffer.add(np.arange(cuts[1], cuts[2]))
        del buffer
        with ReservoirBuffer(path=path, mode="r+") as buffer:
            buffer.update(range(20), at=0)
            assert buffer.seen == 20
            assert (held(buffer, 20) == kept[seed]).all(), f"seed {seed}"
        assert (kept[seed] == planned(10, 20, seed)).all(), f"seed {seed}"
    assert_inclusion(kept, 10)


# -- drawing -----------------------------------------------------------------------------------------------------------


def draws(size: int, n: int, times: int, replace: bool, over: str) -> Iterable[Any]:
    """Draws of n rows from a buffer of `size`: of one buffer, over seeds, or over the number of samples seen."""
    if over == "seeds":
        for seed in range(times):
            with SlidingWindowBuffer(size, seed=seed, schema=NUMBER) as buffer:
                buffer.add(np.arange(size))
                yield buffer.sample(n, replace=replace)[1]["idx"]
        return
    with SlidingWindowBuffer(size, seed=11, stream=3, schema=NUMBER) as buffer:
        buffer.add(np.arange(size))
        for i in range(times):
            if over == "seen":
                buffer.draws.begin(0, 0)
                buffer.add(np.array([size + i]))
            yield buffer.sample(n, replace=replace)[1]["idx"]


@pytest.mark.parametrize(
    ("over", "size", "n", "times"),
    [
        ("draws", 4, 4, times(2000, 5000)),
        ("draws", 9, 3, times(4500, 8000)),
        ("draws", 20, 20, times(2500, 4000)),
        ("draws", 7, 1, times(1500, 3000)),
        ("draws", 33, 32, 6000),
        ("seeds", 6, 3, times(250, 1000)),
        ("seen", 10, 5, times(1500, 3000)),
    ],
)
def test_sample_without_replacement(over: str, size: int, n: int, times: int) -> None:
    """G1: every order of every subset equally likely: slots, pairs of neighbouring slots, sets, and whole permutations if few."""
    rows = np.array(list(draws(size, n, times, False, over)))
    assert rows.shape == (times, n)
    assert (np.sort(rows, 1)[:, 1:] != np.sort(rows, 1)[:, :-1]).all()
    for slot in {0, n // 2, n - 1}:
        assert_even(np.bincount(rows[:, slot], minlength=size), f"slot {slot}")
    for a, b in {(0, n - 1), (0, 1), (n - 2, n - 1)} if n > 1 else set():
        table = np.zeros((size, size))
        np.add.at(table, (rows[:, a], rows[:, b]), 1)
        off = table[~np.eye(size, dtype=bool)]
        assert off.sum() == times
        assert_even(off, f"slots {a} and {b}")
    if n < size:
        kept = np.zeros((times, size), bool)
        kept[np.arange(times)[:, None], rows] = True
        assert_inclusion(kept, n, "sets")
    if math.perm(size, n) * 8 <= times:
        number = {p: i for i, p in enumerate(itertools.permutations(range(size), n))}
        assert_even(np.bincount([number[tuple(r)] for r in rows.tolist()], minlength=len(number)), "permutations")


@pytest.mark.parametrize(
    ("over", "size", "n", "times"),
    [("draws", 5, 12, times(1000, 2000)), ("seeds", 6, 6, times(250, 1000)), ("seen", 3, 4, times(1000, 2000))],
)
def test_sample_with_replacement(over: str, size: int, n: int, times: int) -> None:
    """G1: each slot uniform, any two independent, more than the buffer holds allowed."""
    rows = np.array(list(draws(size, n, times, True, over)))
    assert rows.shape == (times, n)
    for a, b in itertools.combinations(range(0, n, max(1, n // 4)), 2):
        assert_even(np.bincount(rows[:, a], minlength=size), f"slot {a}")
        assert_even(np.bincount(rows[:, a] * size + rows[:, b], minlength=size * size), f"slots {a} and {b}")


def test_successive_samples_are_independent() -> None:
    """G1: the row drawn first by one draw and by the next, over one buffer, and over neighbouring seeds and streams."""
    rows = np.array(list(draws(6, 3, times(2000, 4000), False, "draws")))[:, 0]
    assert_even(np.bincount(rows[:-1] * 6 + rows[1:], minlength=36), "draws")
    first = []
    for seed, stream in itertools.product(range(times(151, 601)), (0, 1)):
        with SlidingWindowBuffer(4, seed=seed, stream=stream, schema=NUMBER) as buffer:
            buffer.add(np.arange(4))
            first.append(int(buffer.sample(1)[1]["idx"][0]))
    table = np.array(first).reshape(-1, 2)
    assert_even(np.bincount(table[:-1, 0] * 4 + table[1:, 0], minlength=16), "seeds")
    assert_even(np.bincount(table[:, 0] * 4 + table[:, 1], minlength=16), "streams")


def test_sample_is_independent_of_what_is_kept() -> None:
    """G1: keys and draws have purposes of their own: the row of the newest sample is drawn as often as any."""
    counts = np.zeros(5)
    for seed in range(times(250, 1000)):
        with ReservoirBuffer(5, seed=seed, schema=NUMBER) as buffer:
            buffer.add(np.arange(9))
            order = np.argsort(buffer.get_metadata("position"))
            counts[int(np.flatnonzero(order == buffer.sample(1)[1]["idx"][0])[0])] += 1
    assert_even(counts)


# -- greedy class balancing --------------------------------------------------------------------------------------------


def victims(labels: list[int], new: list[int], seeds: int, offset: int = 0) -> Any:
    """The rows that samples of classes `new` take one after another in a buffer filled with `labels`: (seeds, new)."""
    found = np.empty((seeds, len(new)), np.int64)
    for seed in range(seeds):
        policy = GreedyClassBalancingPolicy(len(labels), seed, {})
        policy.load(NONE, NONE)
        assert (policy.plan(offset, np.array(labels), len(labels)).rows == np.arange(len(labels))).all()
        found[seed] = policy.plan(offset + len(labels), np.array(new), len(new)).rows
    return found


BIG = 2**62


@pytest.mark.parametrize(
    ("labels", "new", "largest"),
    [
        ([0, 0, 0, 0, 1, 1], 2, [0, 1, 2, 3]),
        ([1, 0, 1, 2, 1, 2], 1, [0, 2, 4]),
        ([3, 3, 3, 3, 3], 3, [0, 1, 2, 3, 4]),
        ([0, 1, 0, 1, 0, 1], 5, [0, 1, 2, 3, 4, 5]),
        ([0, 1, 2, 3, 4, 5, 6], 7, [0, 1, 2, 3, 4, 5, 6]),
        ([-5, BIG, -BIG, -5, BIG, -BIG, 9], 9, [0, 1, 2, 3, 4, 5]),
        ([0, 1, 1, 2, 2, 0, 3], 1, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_greedy_victims(labels: list[int], new: int, largest: list[int]) -> None:
    """G1: any member of any largest class equally likely, so ties are even, whatever the labels."""
    rows = victims(labels, [new], SEEDS)[:, 0]
    assert set(rows.tolist()) == set(largest)
    assert_even(np.bincount(rows, minlength=len(labels))[largest])


@pytest.mark.parametrize("offset", [0, 12_345 * STREAM])
def test_greedy_victims_in_turn(offset: int) -> None:
    """G1: two victims in turn are any two rows of the one class, in any order."""
    rows = victims([4] * 6, [1, 2], SEEDS, offset)
    pairs = np.bincount(rows[:, 0] * 6 + rows[:, 1], minlength=36)
    assert_even([pairs[6 * a + b] for a, b in itertools.permutations(range(6), 2)])
    assert pairs[[0, 7, 14, 21, 28, 35]].sum() == 0


def test_greedy_ties_in_turn_are_independent() -> None:
    """G1: classes a, b and c of two; three newcomers of new classes take one from each: every order equally likely."""
    rows = victims([0, 1, 2, 0, 1, 2], [3, 4, 5], SEEDS) % 3
    orders = dict.fromkeys(itertools.permutations(range(3)), 0)
    for row in rows.tolist():
        orders[tuple(row)] += 1
    assert_even(list(orders.values()))


def test_greedy_in_buffers() -> None:
    """G1 through the public interface: 2,000 seeds, labels from pairs, in batches that cut the stream; all as planned."""
    schema = Schema.from_sample((0, 0))
    labels = np.array([0, 0, 1, 1, 0, 1, 2])
    found = [victims_one(labels, seed) for seed in range(2000)]
    for seed in range(IN_BUFFERS):
        with GreedyClassBalancingBuffer(6, seed=seed, schema=schema) as buffer:
            for start, stop in ((0, 2), (2, 6), (6, 7)):
                buffer.add((np.arange(start, stop), labels[start:stop]))
            assert np.flatnonzero(buffer.get_metadata("position") == 6).tolist() == [found[seed]], f"seed {seed}"
    assert_even(np.bincount(found, minlength=6))


def victims_one(labels: Any, seed: int) -> int:
    policy = GreedyClassBalancingPolicy(len(labels) - 1, seed, {})
    policy.load(NONE, NONE)
    return int(policy.plan(0, labels, len(labels)).rows[-1])


@pytest.mark.parametrize("seed", range(6))
def test_greedy_step_by_step(seed: int) -> None:
    """Every sample enters; the victim is always of a largest class, so once each class had enough, none has 2 more than its share.

    (With [3, 3] full, a third class-0 sample may evict one of class 1: counts are [4, 2] until the next one of class 1 comes.)
    """
    rng = np.random.default_rng(seed)
    capacity, classes, n = [(10, 3), (7, 7), (24, 5), (3, 5), (1, 2), (50, 1)][seed] + (600,)
    labels = rng.integers(0, classes, n) ** 2 if seed % 2 else np.sort(rng.integers(0, classes, n))
    labels = np.concatenate([labels, np.tile(np.unique(labels), capacity)])
    with GreedyClassBalancingBuffer(capacity, seed=seed, schema=Schema.from_sample((0, 0))) as buffer:
        rows: dict[int, int] = {}
        for i, label in enumerate(labels.tolist()):
            buffer.add((np.array([i]), np.array([label])))
            positions = buffer.get_metadata("position")
            row = int(np.flatnonzero(positions == i)[0])  # it entered
            if len(rows) < capacity:
                assert row == len(rows)
            else:
                counts = {c: list(rows.values()).count(c) for c in set(rows.values())}
                assert counts[rows[row]] == max(counts.values()), f"seed {seed}, sample {i}"
            rows[row] = label
        (_, y), _ = buffer.get(np.arange(len(buffer)))
        assert y.tolist() == [rows[r] for r in range(capacity)]
        final = [y.tolist().count(c) for c in np.unique(labels)]
        assert max(final) <= math.ceil(capacity / len(final)) + 1, final
        assert min(final) >= capacity // len(final) - 1, final


def test_gdumb_keeps_a_uniform_part_of_the_first_of_each_class() -> None:
    """G1: a new class makes random members of the largest leave; what comes above the share never enters, even where rows are free."""
    labels = np.array([0] * 20 + [1] * 20 + [2] * 6 + [0, 1, 2] * 5)
    kept = np.zeros((3000, 12), bool)
    for seed in range(3000):
        policy = GreedyClassBalancingPolicy(12, seed, {"admit": "below_share"})
        policy.load(NONE, NONE)
        rows = policy.plan(0, labels, 99).rows
        last = {int(row): i for i, row in enumerate(rows) if row >= 0}
        assert sorted(labels[i] for i in last.values()) == [0] * 4 + [1] * 4 + [2] * 4
        assert all(i < 12 or 20 <= i < 26 or 40 <= i < 44 for i in last.values())
        kept[seed, [i for i in last.values() if i < 12]] = True
    assert_inclusion(kept, 4)
    policy = GreedyClassBalancingPolicy(10, 0, {"admit": "below_share"})
    policy.load(NONE, NONE)
    rows = policy.plan(0, np.array([0, 0, 0, 0, 0, 1, 2, 0, 1]), 99).rows
    assert rows.tolist() == [0, 1, 2, 3, 4, 5, 6, -1, 7]  # three classes: 5 >= 10 / 3, while three rows are free


def test_greedy_resize_victims_are_even() -> None:
    """G1: resizing down evicts as adding does: from a largest class, then from the tie that is left."""
    labels = np.array([0, 1, 0, 1, 0, 1, 0])
    one, two = np.zeros(7), np.zeros(7)
    for seed in range(SEEDS):
        policy = GreedyClassBalancingPolicy(7, seed, {})
        kept = policy.keep(6, np.arange(7), labels)
        one[np.setdiff1d(np.arange(7), kept)] += 1
        again = kept[policy.keep(5, kept, labels[kept])]
        two[np.setdiff1d(kept, again)] += 1
        if seed < 30:
            with GreedyClassBalancingBuffer(7, seed=seed, schema=Schema.from_sample((0, 0))) as buffer:
                buffer.add((np.arange(7), labels))
                buffer.resize(6)
                assert buffer.get_metadata("position").tolist() == kept.tolist(), f"seed {seed}"
    assert (one[[1, 3, 5]] == 0).all()
    assert_even(one[[0, 2, 4, 6]])
    assert_even(two[[1, 3, 5]])
    assert_even(two[[0, 2, 4, 6]])
    assert_even([two[[1, 3, 5]].sum(), two[[0, 2, 4, 6]].sum()])


# -- the window --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [1, 2, 7, 16])
def test_window_is_exact(capacity: int) -> None:
    """The last `capacity` samples after every batch, whatever the batches, and after resizing."""
    rng = np.random.default_rng(capacity)
    with SlidingWindowBuffer(capacity, schema=NUMBER) as buffer:
        n = 0
        for _ in range(40):
            more = int(rng.integers(0, 2 * capacity + 2))
            buffer.add(np.arange(n, n + more))
            n += more
            assert np.flatnonzero(held(buffer, n)).tolist() == list(range(max(0, n - capacity), n))
        for size in (capacity + 5, max(1, capacity - 3), 2 * capacity + 3, 4):
            before = len(buffer)
            buffer.resize(size)
            first = n - min(before, size)
            assert np.flatnonzero(held(buffer, n)).tolist() == list(range(first, n))
            buffer.add(np.arange(n, n + 3))
            n += 3
            assert np.flatnonzero(held(buffer, n)).tolist() == list(range(max(first, n - size), n))
            assert buffer.check() == []


def test_infinite_keeps_all() -> None:
    """Every sample, in order."""
    with leanreplay.InfiniteBuffer(rows_per_part=7, schema=NUMBER) as buffer:
        buffer.add(np.arange(30))
        assert held(buffer, 30).all()
        assert buffer.get_metadata("position").tolist() == list(range(30))
