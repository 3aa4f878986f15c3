"""Grouped policies: quotas, lengths, and exactness by enumeration and by statistics."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from grouped import KINDS, assert_agree, blocks, growing, ids, made, model, quiet, samples, tail, tiny
from grouped_oracle import BORROW, LARGEST, QUOTA, Grouped, keyed, quotas
from laws import assert_inclusion
from nightly import times

from leanreplay import (
    ClassBalancedBuffer,
    ClassBalancingReservoirBuffer,
)
from leanreplay.arrays import NO_LOG
from leanreplay.policies.balanced import ClassBalancedPolicy, ClassBalancingReservoirPolicy
from leanreplay.policies.quotas import group_hash, group_quotas

STREAM = 2**48


class Bare:
    """A policy without a buffer: the index and the log that it sees, and nothing else."""

    def __init__(self, kind: str, size: int, seed: int, total: int = 0, stream: int = 0) -> None:
        mode, fixed = KINDS[kind]
        self.cls = ClassBalancingReservoirPolicy if mode == LARGEST else ClassBalancedPolicy
        self.params: dict[str, Any] = {} if mode == LARGEST else {"adaptive_size": not fixed, "borrow": mode == BORROW}
        self.params |= {"total_num_classes": total} if fixed else {}
        self.seed, self.start, self.log = seed, stream * STREAM, NO_LOG
        self.positions, self.groups = np.full(size, -1), np.zeros(size, np.int64)
        self.load(size)

    def load(self, size: int) -> None:
        self.policy = self.cls(size, self.seed, self.params)
        self.policy.log, self.policy.slots = self.log, 1 << 20
        high = int(np.flatnonzero(self.positions >= 0).max(initial=-1)) + 1
        self.policy.load(self.positions[:high], self.groups[:high])

    def add(self, labels: Any) -> None:
        labels = np.asarray(labels, np.int64)
        plan = self.policy.plan(self.start, labels, labels.shape[0] + 1)
        rows = plan.rows
        assert rows.shape[0] == labels.shape[0]
        self.positions[plan.freed] = -1
        taken = rows >= 0
        self.positions[rows[taken]], self.groups[rows[taken]] = self.start + np.flatnonzero(taken), labels[taken]
        self.log = np.concatenate([self.log, plan.log])
        self.start += labels.shape[0]

    def resize(self, size: int) -> None:
        live = np.flatnonzero(self.positions >= 0)
        kept = live[self.policy.keep(size, self.positions[live], self.groups[live])]
        self.log = self.policy.log
        positions, groups = np.full(size, -1), np.zeros(size, np.int64)
        positions[: kept.shape[0]], groups[: kept.shape[0]] = self.positions[kept], self.groups[kept]
        self.positions, self.groups = positions, groups
        self.load(size)

    def rows(self) -> dict[int, int]:
        return {row: int(p) for row, p in enumerate(self.positions) if p >= 0}


def even(rng: random.Random, groups: int) -> Iterator[int]:
    while True:
        yield rng.randrange(groups)


# -- lengths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, -(2**127)])
def test_hashes(seed: int) -> None:
    """Hashes of group ids are those of keys.py, by definition; distinct; for any int64."""
    numbers = [0, 1, 2, 3, 1000, 2**40, 2**63 - 1, -1, -(2**63)]
    found = group_hash(numbers, seed)
    assert found.dtype == np.uint64
    assert found.tolist() == [keyed("group", seed)(g) for g in numbers]
    assert len(set(group_hash(np.arange(-5000, 5000), seed).tolist())) == 10_000


def test_quotas() -> None:
    """1 to 200 groups and sizes 0 to 5,000: size // groups each, one more for those of the smallest hashes."""
    hashed = keyed("group", 7)
    for n in range(1, 201):
        groups = [g * g - 50 for g in range(n)]
        hashes = group_hash(groups, 7)
        places = {g: i for i, g in enumerate(sorted(groups, key=hashed))}
        rank = np.array([places[g] for g in groups])
        sizes = {*range(n % 97, 5001, 97), *range(0, 5001, max(n, 9)), *range(n - 1, 5001, 7 * n), 5000} if n > 2 else range(5001)
        for size in sorted(sizes):
            found = group_quotas(size, hashes)
            assert (found == size // n + (rank < size % n)).all(), (n, size)
        assert dict(zip(groups, found.tolist(), strict=True)) == quotas(size, groups, hashed)
    assert group_quotas(5, np.zeros(0, np.uint64)).tolist() == []


@pytest.mark.parametrize("size", [1, 2, 3, 7, 60, 199, 200, 201, 1000, 4999, 5000])
def test_group_lengths(size: int) -> None:
    """1 to 200 groups that all have samples enough hold their quotas exactly, after each new group."""
    hashed = keyed("group", size)
    for borrow in (False, True):
        with ClassBalancedBuffer(size, seed=size, borrow=borrow) as buffer:
            for n in range(1, 201):
                group = 3 * n - 100
                fed = size if size <= 1000 or n % 20 == 0 else 2 * size // n
                buffer.add(np.zeros(fed, np.int8), group=np.full(fed, group))
                wanted = quotas(size, range(-97, group + 1, 3), hashed)
                sizes = buffer.group_sizes()
                assert sum(sizes.values()) == len(buffer) == size
                if not borrow:
                    assert sizes == wanted, n
                assert buffer.get_group_lengths(n) == sorted(wanted.values(), reverse=True)
            assert buffer.check() == []


@pytest.mark.parametrize("borrow", [False, True])
def test_fixed_lengths(borrow: bool) -> None:
    """max_size // total rows for each; what that leaves over is used by those who borrow only."""
    for size, total in [(1, 1), (7, 7), (7, 3), (10, 4), (5000, 199)]:
        with ClassBalancedBuffer(size, adaptive_size=False, total_num_classes=total, borrow=borrow) as buffer:
            for group in range(total):
                buffer.add(np.zeros(size, np.int8), group=np.full(size, group))
                sizes = list(buffer.group_sizes().values())
                assert sum(sizes) == size if borrow else sizes == [size // total] * (group + 1)
                assert buffer.get_group_lengths(group + 1) == [size // total] * (group + 1)
                assert not buffer.adaptive_size
            assert buffer.get_group_lengths(0) == []


def test_borrowed_rows_are_given_back() -> None:
    """A group takes all free rows; each that comes later gets its quota from those with the largest excess."""
    with ClassBalancedBuffer(12, borrow=True) as buffer:
        for group, wanted in enumerate([[12], [6, 6], [4, 4, 4], [3, 3, 3, 3]]):
            buffer.add(np.zeros(50, np.int8), group=np.full(50, group))
            assert list(buffer.group_sizes().values()) == wanted
    with ClassBalancedBuffer(12, borrow=True) as buffer:  # small groups: their rows go on being used by others
        buffer.add(np.zeros(13, np.int8), group=np.array([1, 2, *[3] * 11]))
        assert buffer.group_sizes() == {1: 1, 2: 1, 3: 10}
        buffer.add(np.zeros(2, np.int8), group=np.array([2, 1]))
        assert buffer.group_sizes() == {1: 2, 2: 2, 3: 8}


def test_largest_class_gives_way() -> None:
    """CBRS on a long tail: small classes are held whole, the large ones end up equal."""
    with ClassBalancingReservoirBuffer(100) as buffer:
        buffer.add(np.zeros(1310, np.int8), group=np.repeat([0, 1, 2, 3], [1000, 200, 100, 10]))
        assert buffer.group_sizes() == {0: 30, 1: 30, 2: 30, 3: 10}
        assert buffer.group_rows(3).shape[0] == 10
        assert buffer.get_group_lengths(3) == [34, 33, 33]


# -- against the oracle ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [tail, blocks, growing, even])
@pytest.mark.parametrize("kind", KINDS)
def test_random_streams(kind: str, labels: Callable[..., Iterator[int]]) -> None:
    """After every batch the buffer is the model, row for row; with many more groups than rows too."""
    for seed in range(8):
        rng = random.Random(f"{kind} {labels.__name__} {seed}")
        size = rng.choice([1, 2, 5, 16, 40])
        groups = rng.choice([1, 3, 10, 3 * size + 5])
        total = rng.choice([1, size, max(1, size // 3)])
        groups = min(groups, total) if KINDS[kind][1] else groups
        numbers, stream = ids(rng, groups), rng.choice([0, 0, 3, 32767])
        wanted = model(kind, size, seed, total, first=stream * STREAM)
        coming = labels(rng, groups)
        with tiny(rng.choice([1, 8 << 20]), rng.choice([1, 7, 1 << 16])), made(kind, size, total=total, seed=seed, stream=stream) as buffer:
            for batch in range(10):
                n = rng.choice([1, 2, 13, 40])
                group = [numbers[g] for g in itertools.islice(coming, n)]
                buffer.add(samples(wanted.seen, wanted.seen + n), group=np.array(group))
                wanted.add(group)
                wanted.check()
                assert_agree(buffer, wanted, f"{kind}, {labels.__name__}, seed {seed}, batch {batch}")


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_on_many_seeds(kind: str) -> None:
    """Many short streams, with sizes that change in between: row for row what the definition says."""
    for seed in range(times(400, 1000)):
        rng = random.Random(f"{kind} {seed}")
        size, total = rng.randint(1, 8), 1
        if KINDS[kind][1]:
            total = rng.randint(1, size)
        groups = total if KINDS[kind][1] else rng.choice([1, 2, 4, 12])
        bare, wanted = Bare(kind, size, seed, total), model(kind, size, seed, total)
        for _ in range(rng.randint(1, 4)):
            labels = [rng.randrange(groups) for _ in range(rng.randint(1, 15))]
            bare.add(labels)
            wanted.add(labels)
            assert bare.rows() == wanted.rows, seed
            if rng.random() < 0.4:
                new = rng.randint(total, 10)
                bare.resize(new)
                wanted.resize(new)
                wanted.check()
                assert bare.rows() == wanted.rows, seed
        assert {g for w, g in bare.log.tolist() if w == 0} == set(wanted.streams)
        assert {bare.log[bare.log[:, 0] == 0, 1][g] for w, g in bare.log.tolist() if w == 1} == wanted.frozen, seed


@pytest.mark.parametrize("kind", ["adaptive", "borrow", "cbrs"])
def test_ten_thousand_groups(kind: str) -> None:
    """Far more groups than the log and the tables begin with, some of them back again; in one add and in many."""
    size = 300
    rng = np.random.default_rng(5)
    labels = np.concatenate([np.arange(10_000), rng.integers(0, 10_000, 3000), np.arange(200)])
    mode = KINDS[kind][0]
    hashed, key = keyed("group", 0), keyed("reservoir", 0)
    with made(kind, size) as whole, made(kind, size) as pieces:
        whole.add(labels, group=labels)
        for start in range(0, labels.shape[0], 601):
            pieces.add(labels[start : start + 601], group=labels[start : start + 601])
        assert whole.check() == pieces.check() == []
        assert len(whole.group_sizes()) == 10_000
        assert whole.group_sizes() == pieces.group_sizes()
        assert whole.get_metadata("idx").tolist() == pieces.get_metadata("idx").tolist()
        assert whole.get_metadata("position").tolist() == pieces.get_metadata("position").tolist()
        if mode == QUOTA:
            lucky = sorted(range(10_000), key=hashed)[:size]
            assert {g for g, n in whole.group_sizes().items() if n} == set(lucky)
            best = {g: max(np.flatnonzero(labels == g).tolist(), key=key) for g in lucky}
            assert sorted(whole.get_metadata("position").tolist()) == sorted(best.values())


# -- exactness by enumeration ------------------------------------------------------------------------------------------


Script = list[tuple[str, Any]]


def enumerate_orders(make: Callable[..., Grouped], script: Script, n: int) -> Counter[Any]:
    """What is held in the end, as a set per group, for each order that the keys of n samples can have."""
    found: Counter[Any] = Counter()
    for order in itertools.permutations(range(n)):
        buffer = make(key=lambda p, order=order: order[p])
        for what, value in script:
            buffer.add(value) if what == "add" else buffer.resize(value)
        buffer.check()
        found[tuple((g, frozenset(rows.values())) for g, rows in sorted(buffer.held.items()))] += 1
    return found


def assert_uniform(found: Counter[Any], streams: dict[int, list[int]], note: str) -> None:
    """Numbers held do not depend on keys; each group is uniform, and independent of the others."""
    sizes = {tuple(len(held) for _, held in outcome) for outcome in found}
    assert len(sizes) == 1, f"{note}: {sizes}"
    ways = math.prod(math.comb(len(streams[g]), len(held)) for g, held in next(iter(found)))
    assert len(found) == ways, note
    assert len(set(found.values())) == 1, f"{note}: {found}"


def scripts(rng: random.Random, n: int, groups: int, smallest: int) -> tuple[Script, dict[int, list[int]]]:
    """Samples of random groups with a resize here and there."""
    labels = [rng.randrange(groups) for _ in range(n)]
    script: Script = []
    at = 0
    while at < n:
        step = rng.randint(1, n - at)
        script.append(("add", labels[at : at + step]))
        at += step
        if rng.random() < 0.6:
            script.append(("resize", rng.randint(smallest, 5)))
    return script, {g: [p for p in range(n) if labels[p] == g] for g in set(labels)}


@pytest.mark.parametrize("kind", KINDS)
def test_all_orders_of_keys(kind: str) -> None:
    """G1: of streams of up to 6 samples every subset of a group comes equally often, all groups jointly."""
    for trial in range(40):
        rng = random.Random(f"{kind} {trial}")
        n = rng.choice([4, 5, 5, 6])
        size = rng.randint(1, 4)
        total = rng.randint(1, size) if KINDS[kind][1] else 0
        groups = total or rng.choice([1, 2, 2, 3, 4])
        script, streams = scripts(rng, n, groups, max(total, 1))
        hashes = rng.sample(range(100), groups)
        found = enumerate_orders(
            lambda key: model(kind, size, 0, total, key=key, hashed=hashes.__getitem__, tie=lambda key, h: (h * 7919) % 101),  # noqa: B023
            script,
            n,
        )
        assert_uniform(found, streams, f"{kind}, {size} rows, total {total}, {script}, hashes {hashes}")


def test_all_short_streams() -> None:
    """Every sequence of groups of length 5 (up to names), every size and every order of hashes: with shrinking quotas."""
    for labels in itertools.product(range(3), repeat=5):
        first = list(dict.fromkeys(labels))
        if first != sorted(first) or len(first) != 3:
            continue
        for size, hashes in itertools.product([2, 3, 4], [(0, 1, 2), (2, 1, 0)]):
            for mode in (QUOTA, BORROW):
                found = enumerate_orders(
                    lambda key: Grouped(size, mode=mode, key=key, hashed=hashes.__getitem__),  # noqa: B023
                    [("add", labels)],
                    5,
                )
                streams = {g: [p for p in range(5) if labels[p] == g] for g in first}
                assert_uniform(found, streams, f"{mode} {labels} {size} {hashes}")


def test_the_enumeration_notices() -> None:
    """Without the capacity rule groups are not uniform after a resize down and up; nor with the oldest sample dropped."""

    class Forgetful(Grouped):
        def resize(self, size: int) -> None:
            super().resize(size)
            self.frozen = set()

        def check(self) -> None:
            """It would fail."""

    script: Script = [("add", [0, 0, 0]), ("resize", 1), ("resize", 2), ("add", [0])]
    streams = {0: [0, 1, 2, 3]}
    assert_uniform(enumerate_orders(lambda key: Grouped(2, key=key), script, 4), streams, "")
    with pytest.raises(AssertionError):
        assert_uniform(enumerate_orders(lambda key: Forgetful(2, key=key), script, 4), streams, "")
    with pytest.raises(AssertionError):
        Forgetful.check = Grouped.check  # type: ignore[method-assign]
        enumerate_orders(lambda key: Forgetful(2, key=key), script, 4)

    class Oldest(Grouped):
        def least(self, group: int) -> int:
            rows = self.held[group]
            return min(rows, key=rows.__getitem__)

        def check(self) -> None:
            """It would fail."""

    with pytest.raises(AssertionError):
        assert_uniform(enumerate_orders(lambda key: Oldest(2, key=key), [("add", [0, 0, 1, 0])], 4), {0: [0, 1, 3], 1: [2]}, "")


# -- exactness by statistics -------------------------------------------------------------------------------------------


# kind -> labels, and sizes: the first, then (samples fed before, size) of each resize
LONG = [0] * 9 + [1, 0, 1, 1, 2] + [0, 1, 2] * 4 + [3] * 6 + [0, 3]  # shrinking quotas: new groups at 9, 13, 26
RESIZES = {"": (), "down and up": ((12, 4), (20, 10)), "up and down": ((9, 11), (25, 5))}


def assert_each_uniform(kept: Any, streams: dict[int, list[int]], note: str, least: int = 400) -> None:
    """kept: (seeds, n) bool. Per group, for each number of rows that enough seeds gave it: uniform, singles and pairs."""
    tested = 0
    for g, positions in streams.items():
        mine = kept[:, positions]
        counts = mine.sum(1)
        for k in np.unique(counts):
            chosen = mine[counts == k]
            if 0 < k < len(positions) and chosen.shape[0] >= least:
                assert_inclusion(chosen, int(k), f"{note}, group {g}")
                tested += 1
    assert tested, note


@pytest.mark.parametrize("resizes", RESIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_uniform_within_groups(kind: str, resizes: str) -> None:
    """G1: 2,000 seeds through shrinking quotas and changes of size; single positions and pairs of each group."""
    labels = np.array(LONG)
    streams = {g: np.flatnonzero(labels == g).tolist() for g in range(4)}
    kept = np.zeros((2000, labels.shape[0]), bool)
    for seed in range(kept.shape[0]):
        bare = Bare(kind, 8, seed, total=4)
        for at, size in RESIZES[resizes]:
            bare.add(labels[bare.start : at])
            bare.resize(size)
        bare.add(labels[bare.start :])
        kept[seed, bare.positions[bare.positions >= 0]] = True
    assert_each_uniform(kept, streams, f"{kind}, {resizes}")
    # Nor does one group's choice tell of another's: given how many rows each has, no correlation between samples of different groups.
    scores = kept.astype(float)
    for positions in streams.values():
        scores[:, positions] -= scores[:, positions].mean(1, keepdims=True)
    both, spread = scores.T @ scores, (scores**2).T @ scores**2
    other = (labels[:, None] != labels[None, :]) & (spread > 50)
    assert np.abs(both[other] / np.sqrt(spread[other])).max() < 5


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_in_buffers(kind: str) -> None:
    """Buffers hold what their policy alone does, whose statistics these are: batches, a resize down and up."""
    labels = np.array(LONG)
    for seed in range(40):
        bare = Bare(kind, 8, seed, total=4)
        with made(kind, 8, total=4, seed=seed) as buffer:
            for start, stop, size in ((0, 10, 8), (10, 20, 4), (20, len(labels), 9)):
                if size != buffer.max_size:
                    quiet(buffer, size)
                    bare.resize(size)
                buffer.add(np.arange(start, stop), group=labels[start:stop])
                bare.add(labels[start:stop])
            values, meta = buffer.get(buffer.get_metadata("idx"))
            assert (values == meta["position"]).all()
            assert dict(zip(meta["idx"].tolist(), values.tolist(), strict=True)) == bare.rows(), f"{kind}, seed {seed}"


def test_the_remainder_is_uniform() -> None:
    """Which groups get the remainder, or a row at all, is a uniform choice of the seed; order of arrival says nothing."""
    for size, n in [(10, 4), (11, 4), (3, 9), (1, 6)]:
        more = np.array([group_quotas(size, group_hash(np.arange(n), seed)) > size // n for seed in range(times(5000, 20_000))])
        assert_inclusion(more, size % n, f"{size} rows, {n} groups")
    held = np.zeros((times(1500, 3000), 9), bool)
    for seed in range(held.shape[0]):
        bare = Bare("adaptive", 3, seed)
        bare.add(np.arange(9))
        held[seed, bare.positions] = True
    assert_inclusion(held, 3, "nine groups of one sample in three rows")
