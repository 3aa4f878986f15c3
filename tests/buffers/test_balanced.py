"""Grouped buffers: class- and experience-balanced ones, with and without borrowing, and class-balancing reservoir sampling.

The rule is that of grouped_oracle.py, which knows no batches, no files and no kernels. Against it: lengths, rows and positions of random
streams (long tails, more groups than rows, groups in any order), and any history of a buffer (G2). By enumeration of all orders of
keys, and by statistics over seeds: each group is a uniform sample of its own stream (G1), through new groups and `resize`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import pickle
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grouped_oracle import BORROW, LARGEST, QUOTA, Grouped, keyed, quotas
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import assert_inclusion
from nightly import times
from paths import in_memory

import leanreplay
from leanreplay import (
    ArgumentError,
    BalancedBuffer,
    CapacityWarning,
    ClassBalancedBuffer,
    ClassBalancingReservoirBuffer,
    ExperienceBalancedBuffer,
    GroupError,
    MismatchError,
    ModeError,
    RowError,
    Schema,
    SchemaError,
    StateError,
)
from leanreplay.arrays import NO_LOG
from leanreplay.buffers import (
    base as buffers,
)
from leanreplay.kernels import rows as kernel
from leanreplay.policies.balanced import ClassBalancedPolicy, ClassBalancingReservoirPolicy, group_hash, group_quotas
from leanreplay.storage import (
    create,
    store,
)

# kind -> (mode, whether quotas are fixed)
KINDS = {
    "adaptive": (QUOTA, False),
    "fixed": (QUOTA, True),
    "borrow": (BORROW, False),
    "fixed borrow": (BORROW, True),
    "cbrs": (LARGEST, False),
}
STREAM = 2**48


# -- helpers -----------------------------------------------------------------------------------------------------------


def made(kind: str, size: int | None, path: str | None = None, total: int = 0, **options: Any) -> BalancedBuffer:
    """A buffer of a kind."""
    mode, fixed = KINDS[kind]
    if mode == LARGEST:
        return ClassBalancingReservoirBuffer(size, path, **options)
    if fixed and size is not None:
        options |= {"adaptive_size": False, "total_num_classes": total}
    return ClassBalancedBuffer(size, path, borrow=None if size is None else mode == BORROW, **options)


def model(kind: str, size: int, seed: int, total: int = 0, **options: Any) -> Grouped:
    mode, fixed = KINDS[kind]
    return Grouped(size, seed, mode, total if fixed else 0, **options)


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


def samples(start: int, stop: int) -> Any:
    """What is fed at these positions: bytes of an odd number."""
    return ((np.arange(start, stop)[:, None] * 40503 + np.arange(13) * 2654435761) >> 9).astype(np.uint8)


def assert_agree(buffer: BalancedBuffer, wanted: Grouped, note: str = "") -> None:
    """The buffer is the model: rows, positions, samples, groups, and all it says of them."""
    assert [str(p) for p in buffer.check()] == [], note
    assert (buffer.seen, len(buffer), buffer.max_size) == (wanted.seen, len(wanted.rows), wanted.size), note
    sizes = buffer.group_sizes()
    assert list(sizes.items()) == sorted(wanted.sizes().items()), note
    if wanted.seen == 0:
        return
    assert buffer._store.high == max(wanted.rows, default=-1) + 1, note  # draws depend on it, and must not on how batches were cut
    rows, positions = buffer.get_metadata("idx").tolist(), buffer.get_metadata("position").tolist()
    assert dict(zip(rows, positions, strict=True)) == wanted.rows, note
    x, meta = buffer.get(rows)
    assert (x == np.concatenate([samples(p - wanted.first, p - wanted.first + 1) for p in positions] or [x])).all(), note
    assert meta["position"].tolist() == positions, note
    assert [buffer.group_rows(g).tolist() for g in wanted.streams] == [wanted.members(g) for g in wanted.streams], note


def tail(rng: random.Random, groups: int) -> Iterator[int]:
    """Labels with a long tail."""
    while True:
        yield min(groups - 1, int(rng.paretovariate(0.7)) - 1)


def blocks(rng: random.Random, groups: int) -> Iterator[int]:
    """One group after the other, some of them again."""
    while True:
        group = rng.randrange(groups)
        yield from [group] * rng.choice([1, 4, 15])


def growing(rng: random.Random, groups: int) -> Iterator[int]:
    """New groups all the time, among samples of those that are there."""
    for i in itertools.count():
        yield min(i // 3, groups - 1) if i % 3 == 0 else rng.randrange(min(i // 3 + 1, groups))


def even(rng: random.Random, groups: int) -> Iterator[int]:
    while True:
        yield rng.randrange(groups)


def ids(rng: random.Random, groups: int) -> list[int]:
    """Ids that groups may have: any integers."""
    wild = [-(2**63), 2**63 - 1, 2**40, -1, 0, -(2**40) + 7]
    return rng.choice([list(range(groups)), (wild + [rng.randrange(-(2**62), 2**62) for _ in range(groups)])[:groups]])


@contextlib.contextmanager
def tiny(journal: int, chunk: int = 1 << 16) -> Iterator[None]:
    """Small journals and plans, so that one add is many commits."""
    before = create._JOURNAL_BYTES, buffers._CHUNK
    create._JOURNAL_BYTES, buffers._CHUNK = journal, chunk
    try:
        yield
    finally:
        create._JOURNAL_BYTES, buffers._CHUNK = before


def quiet(buffer: BalancedBuffer, size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CapacityWarning)
        buffer.resize(size)


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
        rank = np.array([sorted(groups, key=hashed).index(g) for g in groups])
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
    """1,000 short streams, with sizes that change in between: row for row what the definition says."""
    for seed in range(1000):
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


# -- any history -------------------------------------------------------------------------------------------------------

OPS = st.one_of(
    st.tuples(st.just("feed"), st.integers(0, 40), st.sampled_from(["add", "update", "list"]), st.integers(0, 20)),
    st.tuples(st.just("feed"), st.integers(1, 40), st.just("add"), st.just(0)),
    st.tuples(
        st.just("interrupt"),
        st.integers(1, 40),
        st.sampled_from(["commit_rows", "save_rows", "save_freed", "write_field", "write_index", "seal_block", "hash_log", "keep_last"]),
        st.integers(0, 8),
        st.booleans(),
    ),
    st.tuples(st.just("reopen"), st.sampled_from(["close", "forget", "open"])),
    st.tuples(
        st.just("kill"), st.integers(1, 40), st.sampled_from(["save_freed", "write_field", "seal_block", "hash_log"]), st.integers(0, 6)
    ),
    st.tuples(st.just("resize"), st.integers(1, 12)),
    st.tuples(st.just("mark")),
    st.tuples(st.just("back")),
    st.tuples(st.just("save"), st.integers(0, 30)),
)


class History:
    """A buffer, its model, and what happens to both."""

    def __init__(self, kind: str, seed: int, size: int, folder: str | None) -> None:
        self.kind, self.seed, self.total = kind, seed, max(1, size // 2)
        rng = random.Random(seed)
        groups = rng.choice([2, 5, 25])
        groups = min(groups, self.total) if KINDS[kind][1] else groups
        numbers = ids(rng, groups)
        self.labels = [numbers[g] for g in itertools.islice(rng.choice([tail, blocks, growing])(rng, groups), 2000)]
        self.folder = folder
        self.path = None if folder is None else os.path.join(folder, "b.h5")
        self.model = model(kind, size, seed, self.total)
        self.points: list[tuple[Any, Grouped]] = []
        self.buffer: Any = made(kind, size, self.path, self.total, seed=seed)

    def feed(self, n: int, way: str = "add", back: int = 0) -> None:
        start = max(0, self.model.seen - back)
        stop = self.model.seen + n
        group, x = self.labels[start:stop], samples(start, stop)
        at = start if back else None
        if way == "add":
            self.buffer.add(x, group=np.array(group, np.int64), at=at)
        else:
            self.buffer.update(Dataset(x, group if way == "update" else None), group=group if way == "list" else None, at=at)

    def advance(self) -> None:
        """Bring the model to where the buffer is."""
        seen = self.buffer.seen
        assert seen >= self.model.seen
        self.model.add(self.labels[self.model.seen : seen])

    def do(self, name: str, *args: Any) -> None:
        if name == "feed":
            self.feed(*args)
            assert self.buffer.seen == self.model.seen + args[0]
        elif name == "interrupt":
            n, step, after, done = args
            with contextlib.suppress(KeyboardInterrupt), hooked(step, after, done, interrupt):
                self.feed(n)
        elif name == "reopen":
            self.reopen(*args)
        elif name == "kill":
            self.kill(*args)
        elif name == "resize":
            size = max(args[0], self.total) if KINDS[self.kind][1] else args[0]
            if self.model.seen:
                self.points = self.points if size == self.model.size else []
                quiet(self.buffer, size)
                self.model.resize(size)
        elif name == "mark" and self.model.seen:
            content = self.model.state()
            state = self.buffer.state_dict()
            if not self.points or self.points[-1][1].state() != content:
                self.points = [*self.points, (state, self.model.copy())][-2:]
        elif name == "back" and self.points:
            state, self.model = self.points[-1][0], self.points[-1][1].copy()
            self.buffer.load_state_dict(state)
            assert self.buffer.seen == self.model.seen
            if len(self.points) > 1 and self.model.seen % 2:
                self.points.pop()
        elif name == "save" and self.model.seen:
            with tempfile.TemporaryDirectory() as folder:
                self.buffer.save(folder)
                self.feed(args[0])
                self.buffer.load(folder)
            self.points = []
        self.advance()
        self.model.check()

    def reopen(self, how: str) -> None:
        if self.path is None or self.buffer.schema is None:
            return
        if how != "forget":
            self.buffer.close()
        self.buffer = None
        self.buffer = leanreplay.open(self.path, mode="r+") if how == "open" else made(self.kind, None, self.path, mode="a")

    def kill(self, n: int, step: str, after: int) -> None:
        """A child goes on, and is killed at some step of a commit."""
        if self.path is None or self.buffer.schema is None or not hasattr(os, "fork"):
            return
        self.buffer.close()
        pid = os.fork()
        if pid == 0:
            try:
                self.buffer = leanreplay.open(self.path, mode="r+")
                with hooked(step, after, False, die):
                    self.feed(n)
                die()
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), status
        self.buffer = leanreplay.open(self.path, mode="r+")


class Dataset:
    def __init__(self, x: Any, targets: Sequence[int] | None) -> None:
        self.x = x
        if targets is not None:
            self.targets = targets

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i]


def interrupt() -> None:
    raise KeyboardInterrupt


def die() -> None:
    os.kill(os.getpid(), 9)


@contextlib.contextmanager
def hooked(step: str, after: int, done: bool, action: Callable[[], None]) -> Iterator[None]:
    """Do something at the given call of a kernel, before or after it has run."""
    real = getattr(kernel, step)
    calls = 0
    store._AT_ONCE = step == "commit_rows"

    def call(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != after + 1:
            return real(*args)
        if done:
            real(*args)
        return action()

    setattr(kernel, step, call)
    try:
        yield
    finally:
        setattr(kernel, step, real)
        store._AT_ONCE = True


FIXED = settings(derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("kind", KINDS)
@settings(FIXED, max_examples=times(5, 15))
@given(
    history=st.lists(OPS, min_size=2, max_size=14),
    seed=st.integers(0, 50),
    size=st.sampled_from([1, 2, 4, 9, 20]),
    journal=st.sampled_from([1, 8 << 20]),
    chunk=st.sampled_from([1, 5, 1 << 16]),
)
def test_any_history(kind: str, where: str, history: list[Any], seed: int, size: int, journal: int, chunk: int) -> None:
    """G2, G3: however the stream is cut, whatever is interrupted, killed, opened again and rolled back: the model after each step."""
    with tiny(journal, chunk), tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        h = History(kind, seed, size, folder if where == "disk" else None)
        try:
            for op in history:
                h.do(*op)
                assert_agree(h.buffer, h.model, str(op))
            h.do("feed", 60)
            h.do("reopen", "close")
            h.do("feed", 30)
            assert_agree(h.buffer, h.model, "in the end")
        finally:
            if h.buffer is not None:
                h.buffer.close()


def image(buffer: Any) -> list[Any]:
    """All live bytes: state, row numbers, fields, index, checksums, log."""
    store = buffer._require()
    rows = np.flatnonzero(store.index()[0] >= 0)
    found = [store.mark_name(), buffer.seen, rows.tolist(), store.log().tolist()]
    return found + [store._mem[at : at + n * store.table.max_size].reshape(-1, n)[rows].tobytes() for at, n in store.table.columns]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_do_not_depend_on_batches(kind: str, tmp_path: Path) -> None:
    """G2: the same bytes from one add in memory, from batches of one on disk, and from anything between."""
    for seed in range(16):
        rng = random.Random(seed)
        end = rng.choice([150, *range(8, 40)])  # with free rows at the end as well
        groups = 4 if KINDS[kind][1] else 12
        labels = np.array(list(itertools.islice(growing(rng, groups), end)))
        found = []
        for way in range(4):
            path = None if way == 0 else str(tmp_path / f"{kind} {seed} {way}.h5")
            with tiny(1 if way == 2 else 8 << 20, 3 if way == 3 else 1 << 16), made(kind, 9, path, 4, seed=seed) as buffer:
                start = 0
                while start < end:
                    n = min([end, 1, end, rng.randint(1, 30)][way], end - start)
                    buffer.add(samples(start, start + n), group=labels[start : start + n])
                    start += n
                found.append(image(buffer))
        assert all(other == found[0] for other in found[1:]), seed


@pytest.mark.parametrize("kind", KINDS)
def test_refused_batches_change_nothing(kind: str) -> None:
    """A batch with a wrong label, shape or group is refused whole, new groups included."""
    with made(kind, 6, total=3) as buffer:
        labels = np.arange(40) % 3
        buffer.add(samples(0, 40), group=labels)
        before = image(buffer)
        for wrong in (labels.astype(float), labels[:-1], labels[:, None], labels.astype(np.uint64) + 2**63, labels.astype(str)):
            with pytest.raises(SchemaError):
                buffer.add(samples(40, 80), group=wrong)
        with pytest.raises(SchemaError):
            buffer.add(samples(40, 80).astype(np.int16), group=labels + 7)
        if KINDS[kind][1]:
            with pytest.raises(ArgumentError, match="of a total of 3"):
                buffer.add(samples(40, 80), group=np.append(labels[:-1], 3))
            with pytest.raises(ArgumentError, match="of a total of 3"):
                buffer.update(Dataset(samples(40, 80), [0] * 39 + [99]))
        assert image(buffer) == before
        assert sorted(buffer.group_sizes()) == [0, 1, 2]
        assert buffer.check() == []


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
        more = np.array([group_quotas(size, group_hash(np.arange(n), seed)) > size // n for seed in range(20_000)])
        assert_inclusion(more, size % n, f"{size} rows, {n} groups")
    held = np.zeros((3000, 9), bool)
    for seed in range(3000):
        bare = Bare("adaptive", 3, seed)
        bare.add(np.arange(9))
        held[seed, bare.positions] = True
    assert_inclusion(held, 3, "nine groups of one sample in three rows")


# -- resize ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_resize(kind: str, tmp_path: Path) -> None:
    """Down, up and down again: the model each time; groups that have dropped samples do not grow, the others do."""
    for seed in range(6):
        rng = random.Random(f"{kind} {seed}")
        labels = list(itertools.islice(tail(rng, 4), 400))
        wanted = model(kind, 20, seed, 4)
        with made(kind, 20, str(tmp_path / f"{kind}{seed}.h5"), 4, seed=seed) as buffer:
            for size in [20, 9, 9, 33, 5, 4, 60]:
                quiet(buffer, size)
                if wanted.seen:
                    wanted.resize(size)
                    assert_agree(buffer, wanted, f"seed {seed}, size {size}")
                n = rng.choice([1, 12, 40])
                buffer.add(samples(wanted.seen, wanted.seen + n), group=np.array(labels[wanted.seen : wanted.seen + n]))
                wanted.add(labels[wanted.seen : wanted.seen + n])
                wanted.check()
                assert_agree(buffer, wanted, f"seed {seed}, size {size}, fed")


def test_groups_that_dropped_never_grow() -> None:
    """The capacity rule per group: a group of 3 that dropped stays at 3 in a larger buffer, one that did not takes the rows."""
    with ClassBalancedBuffer(6) as buffer:
        buffer.add(np.zeros(22, np.int8), group=np.repeat([7, 8], [20, 2]))
        assert buffer.group_sizes() == {7: 3, 8: 2}
        quiet(buffer, 20)
        buffer.add(np.zeros(60, np.int8), group=np.tile([7, 8], 30))
        assert buffer.group_sizes() == {7: 3, 8: 10}
        assert buffer.get_group_lengths(2) == [10, 10]


def test_a_warning_when_nothing_can_grow() -> None:
    """With fixed quotas and all groups there and full, more rows are of no use, and `resize` says so; otherwise it does not."""
    with ClassBalancedBuffer(4, adaptive_size=False, total_num_classes=2) as buffer:
        buffer.add(np.zeros(20, np.int8), group=np.arange(20) % 2)
        with pytest.warns(CapacityWarning, match="already dropped samples.* 4 rows"):
            buffer.resize(10)
        buffer.add(np.zeros(20, np.int8), group=np.arange(20) % 2)
        assert len(buffer) == 4
    with ClassBalancedBuffer(8) as buffer, warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer.add(np.zeros(6, np.int8), group=np.arange(6) % 2)
        buffer.resize(30)
        buffer.resize(6)


def test_resize_of_an_empty_buffer() -> None:
    """Before the first sample only the size changes, and it must fit a total."""
    with ClassBalancedBuffer(4) as buffer:
        buffer.resize(9)
        buffer.add(np.zeros(20, np.int8), group=np.zeros(20, int))
        assert buffer.group_sizes() == {0: 9}
    with ClassBalancedBuffer(10, adaptive_size=False, total_num_classes=5) as buffer:
        with pytest.raises(ArgumentError, match="5"):
            buffer.resize(3)
        buffer.add(np.zeros(20, np.int8), group=np.arange(20) % 5)
        before = image(buffer)
        with pytest.raises(ArgumentError, match="resize to 3 rows for 5 groups"):
            buffer.resize(3)
        assert image(buffer) == before
        assert buffer.check() == []


# -- the interface -----------------------------------------------------------------------------------------------------


def test_parameters() -> None:
    """What does not go together is refused before anything else, with a way out."""
    for options, words in [
        ({"adaptive_size": False}, "needs total_num_classes"),
        ({"adaptive_size": False, "total_num_classes": 0}, "from 1"),
        ({"adaptive_size": False, "total_num_classes": 11}, "raise max_size, or use adaptive_size=True"),
        ({"total_num_classes": 3}, "give adaptive_size=False too"),
        ({"adaptive_size": False, "total_num_classes": 2.0}, "must be an integer"),
        ({"adaptive_size": 1}, "True or False"),
        ({"borrow": "no"}, "True or False"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            ClassBalancedBuffer(10, **options)
    with pytest.raises(ArgumentError, match="needs num_experiences"):
        ExperienceBalancedBuffer(10, adaptive_size=False)
    with pytest.raises(ArgumentError, match="max_size"):
        BalancedBuffer()


def test_parameters_stand_in_the_file(tmp_path: Path) -> None:
    """Reopened without them they are those of the file; others are an error that shows both."""
    path = str(tmp_path / "b.h5")
    with ClassBalancedBuffer(10, path, adaptive_size=False, total_num_classes=5, borrow=True) as buffer:
        buffer.add((np.arange(30.0), np.arange(30) % 5))
    with ClassBalancedBuffer(path=path, mode="r+") as buffer:
        assert not buffer.adaptive_size
        assert buffer.get_group_lengths(5) == [2] * 5
        with pytest.raises(ArgumentError, match="of a total of 5"):
            buffer.add((np.arange(1.0), np.array([5])))
    with ClassBalancedBuffer(10, path, mode="a", adaptive_size=False, total_num_classes=5, borrow=True) as buffer:
        assert buffer.seen == 30
    for options in ({"adaptive_size": True}, {"total_num_classes": 4}, {"borrow": False}, {"max_size": 11}, {"seed": 2}):
        with pytest.raises(MismatchError, match=next(iter(options))):
            ClassBalancedBuffer(path=path, mode="r+", **options)  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match=r"ExperienceBalancedBuffer \(file: ClassBalancedBuffer\)"):
        ExperienceBalancedBuffer(path=path, mode="r+")
    with leanreplay.open(path) as buffer:
        assert isinstance(buffer, ClassBalancedBuffer)
        assert buffer.group_sizes() == dict.fromkeys(range(5), 2)
        with pytest.raises(ModeError):
            buffer.add((np.arange(1.0), np.array([1])))


LABELS: dict[str, Any] = {
    "negative and large": np.array([-1, -(2**63), 2**40, 2**63 - 1, 0, -1]),
    "bytes": np.array([255, 0, 1, 1, 1, 7], np.uint8),
    "unsigned": np.array([2**63 - 1, 0, 1, 1, 1, 7], np.uint64),
    "big-endian": np.array([3, 0, 1, 1, 1, 7], ">i4"),
    "not contiguous": np.arange(12)[::2],
    "read-only": np.broadcast_to(np.int64(5), 6),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels(name: str) -> None:
    """Any integers are labels, as arrays, tensors or lists, in the samples or beside them."""
    labels = LABELS[name]
    wanted = dict(sorted(Counter(labels.tolist()).items()))
    ways: list[Any] = [labels, labels.tolist()]
    if name not in ("unsigned", "big-endian", "read-only"):
        import torch

        ways.append(torch.as_tensor(labels.copy()))
    for given_labels in ways:
        with ClassBalancedBuffer(30) as buffer:
            buffer.add(np.zeros(6), group=given_labels)
            assert buffer.group_sizes() == wanted
            assert {type(g) for g in buffer.groups} == {int}
        with ClassBalancedBuffer(30) as buffer:
            buffer.update(Dataset(np.zeros(6), given_labels))
            assert buffer.group_sizes() == wanted
        if not isinstance(given_labels, list):
            with ClassBalancingReservoirBuffer(30) as cbrs:
                cbrs.add((np.zeros(6), given_labels))
                assert cbrs.group_sizes() == wanted
                assert cbrs.check() == []


def test_labels_that_are_not_integers() -> None:
    """Refused, with nothing kept and no file made: floats, text, objects, wrong shapes, unsigned ones beyond int64, none at all."""
    import torch

    n = 6
    wrong = [np.zeros(n), torch.zeros(n), np.array([2**63] * n, np.uint64), np.array(["a"] * n), np.zeros((n, 1), int), np.zeros(5, int)]
    masked = np.ma.masked_array(np.arange(n), [0, 1] * 3)
    for labels in [*wrong, np.array([None] * n), np.array([2**70] * n, object), [0.5] * n, "abcdef", 2**63, masked]:
        with ClassBalancedBuffer(30) as buffer:
            with pytest.raises(SchemaError):
                buffer.add(np.zeros(n), group=labels)
            assert buffer.schema is None
    for labels in wrong:
        with ClassBalancedBuffer(30) as buffer:
            with pytest.raises(SchemaError):
                buffer.add((np.zeros(n), labels))
            assert buffer.schema is None
    for batch in (np.zeros(n), {"x": np.zeros(n), "y": np.zeros(n, int)}, (np.zeros(n),)):
        with ClassBalancedBuffer(30) as buffer, pytest.raises(SchemaError, match="give group="):
            buffer.add(batch)
    with ClassBalancedBuffer(30) as buffer, pytest.raises(SchemaError, match="give group="):
        buffer.update([1.0, 2.0])


def test_one_label_for_all() -> None:
    with ClassBalancedBuffer(30) as buffer:
        buffer.add(np.zeros(6), group=-3)
        buffer.update([1.0, 2.0], group=4)
        assert buffer.group_sizes() == {-3: 6, 4: 2}


def test_a_refused_first_batch_leaves_nothing(tmp_path: Path) -> None:
    """Too many groups in the very first batch: no schema is taken from it, and no file is there."""
    path = tmp_path / "b.h5"
    with ClassBalancedBuffer(4, path, adaptive_size=False, total_num_classes=2) as buffer:
        with pytest.raises(ArgumentError, match="of a total of 2"):
            buffer.add((np.arange(6.0), np.arange(6)))
        with pytest.raises(ArgumentError, match="of a total of 2"):
            buffer.update([(1.0, 0), (1.0, 1), (1.0, 2)])
        assert buffer.schema is None
        assert not path.exists()
        buffer.add((np.arange(6, dtype=np.float32), np.arange(6) % 2))
        assert buffer.group_sizes() == {0: 2, 1: 2}


class Watched:
    """A dataset of pairs that notes which items are read."""

    def __init__(self, labels: Sequence[int], targets: Any) -> None:
        self.labels, self.read = labels, list[int]()
        if targets is not None:
            self.targets = targets

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Any:
        self.read.append(i)
        return float(i), self.labels[i]


def test_only_survivors_are_loaded() -> None:
    """Labels come from `group` or `targets` without a look at the samples; failing both, every item is read once more."""
    labels = [i % 5 for i in range(1000)]
    for targets, group in [(labels, None), (np.array(labels), None), (None, labels), (["cat"] * 1000, labels)]:
        data = Watched(labels, targets)
        with ClassBalancedBuffer(10, schema=Schema.from_sample((0.0, 0))) as buffer:
            buffer.update(data, group=group)
            assert sorted(data.read) == sorted(buffer.get_metadata("position").tolist())
            assert buffer.group_sizes() == dict.fromkeys(range(5), 2)
    for targets in (None, [0.5] * 1000, labels[:-1]):  # not one integer for each
        data = Watched(labels, targets)
        with ClassBalancedBuffer(10, schema=Schema.from_sample((0.0, 0))) as buffer:
            buffer.update(data)
            assert set(data.read) == set(range(1000))
            assert buffer.group_sizes() == dict.fromkeys(range(5), 2)


def test_groups_are_a_live_view() -> None:
    """A mapping of id to dataset; both follow what happens to the buffer."""
    with ClassBalancedBuffer(10, seed=1) as buffer:
        groups = buffer.groups
        assert (len(groups), list(groups), buffer.group_sizes()) == (0, [], {})
        for missing in (0, "a", None):
            with pytest.raises(GroupError, match="this buffer has seen 0"):
                groups[missing]  # type: ignore[index]
        buffer.add((np.arange(30.0), np.arange(30) % 3), metadata={"z": np.arange(30)})
        assert list(groups) == [0, 1, 2]
        assert (1 in groups, 9 in groups, "a" in groups) == (True, False, False)
        assert groups.get(9) is None
        with pytest.raises(GroupError, match=r"no group 9; this buffer has seen 3: \[0, 1, 2\]"):
            groups[9]
        with pytest.raises(KeyError):
            buffer.group_rows(-1)
        one = groups[np.int64(1)]
        assert len(one) == buffer.group_sizes()[1] == buffer.group_rows(1).shape[0] == one.rows.shape[0]
        (x, y), meta = buffer.get(buffer.group_rows(1))
        for i in range(-len(one), len(one)):
            (a, b), m = one[i]
            assert (a, b, m) == (x[i], y[i], {"z": meta["z"][i], "idx": meta["idx"][i], "position": meta["position"][i]})
        both = one.__getitems__([0, -1, 0])
        assert [m["position"] for _, m in both] == meta["position"][[0, -1, 0]].tolist()
        assert [s[1]["position"] for s in one] == meta["position"].tolist()
        for outside in (len(one), -len(one) - 1):
            with pytest.raises(RowError):
                one[outside]
        with pytest.raises(ArgumentError):
            one[0.5]  # type: ignore[index]
        rows = buffer.group_rows(1)
        rows[:] = 99  # a copy
        assert 99 not in buffer.group_rows(1)
        state = buffer.state_dict()
        before = one.rows.tolist()
        buffer.add((np.arange(100.0), np.arange(100)), metadata={"z": np.arange(100)})
        assert len(groups) == 100
        assert len(one) == buffer.group_sizes()[1] < len(before)
        buffer.load_state_dict(state)
        assert len(groups) == 3
        assert one.rows.tolist() == before
        quiet(buffer, 3)
        assert len(one) == 1
    with pytest.raises(ModeError):
        len(one)


def test_groups_in_a_data_loader() -> None:
    """What a group gives goes through torch's DataLoader, and through transforms."""
    import torch

    with ClassBalancedBuffer(12, transform=lambda x: x + 1000) as buffer:
        buffer.add((np.arange(60.0), np.arange(60) % 4))
        found = []
        for (x, y), meta in torch.utils.data.DataLoader(buffer.groups[2], batch_size=2):
            assert (y == 2).all()
            assert (x == meta["position"] + 1000).all()
            found += meta["idx"].tolist()
        assert found == buffer.group_rows(2).tolist()


def test_copies_that_read(tmp_path: Path) -> None:
    """A reader, a pickled copy and one in memory see the groups, and new ones as they come."""
    for path in (None, str(tmp_path / "b.h5")):
        with ClassBalancedBuffer(10, path) as buffer:
            buffer.add((np.arange(30.0), np.arange(30) % 3))
            copies = [pickle.loads(pickle.dumps(buffer))] + ([leanreplay.open(path)] if path else [])
            for round_ in range(3):
                for copy in copies:
                    assert copy.group_sizes() == buffer.group_sizes()
                    assert copy.groups[0][0] == buffer.groups[0][0]
                    assert copy.group_rows(1).tolist() == buffer.group_rows(1).tolist()
                buffer.add((np.arange(5.0), np.arange(5) + 10 * round_))
            for copy in copies:
                copy.close()


def test_get_group_lengths_wants_a_number() -> None:
    for buffer in (ClassBalancedBuffer(10), ClassBalancingReservoirBuffer(10)):
        for wrong in (-1, 2.5, "3", None, True):
            with pytest.raises(ArgumentError, match="num_groups"):
                buffer.get_group_lengths(wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="for a total of 3"):
        ClassBalancedBuffer(10, adaptive_size=False, total_num_classes=3).get_group_lengths(4)


def test_experiences() -> None:
    """Numbered on from 0: `update` begins the next one, `add` goes on with the newest; any can be named."""
    with ExperienceBalancedBuffer(100) as buffer:
        steps: list[tuple[str, dict[str, Any], int]] = [
            ("add", {}, 0), ("add", {}, 0), ("update", {}, 1), ("add", {}, 1), ("update", {}, 2),
            ("update", {"experience": 7}, 7), ("add", {}, 7), ("add", {"experience": 1}, 1), ("add", {}, 7),
            ("update", {"experience": -3}, -3), ("update", {}, 8), ("add", {"experience": 2**40}, 2**40), ("update", {}, 2**40 + 1),
        ]  # fmt: skip
        counts: Counter[int] = Counter()
        for way, options, number in steps:
            getattr(buffer, way)(np.arange(3.0) if way == "add" else [0.0, 1.0, 2.0], **options)
            counts[number] += 3
            assert buffer.group_sizes() == dict(sorted(counts.items())), (way, options)
        buffer.update([])
        assert buffer.group_sizes() == dict(sorted(counts.items()))
    with ExperienceBalancedBuffer(100) as buffer:
        buffer.update([0.0])
        assert list(buffer.groups) == [0]
    with ExperienceBalancedBuffer(100) as buffer:  # the labels of samples do not matter
        buffer.update([(0.0, 5), (0.0, 6)], experience=3)
        assert buffer.group_sizes() == {3: 2}


def test_numbering_experiences_looks_at_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """G4: the newest one stands in the log. A list of the rows of each would be ten times the memory of the heaps, every time."""
    with ExperienceBalancedBuffer(2) as buffer:
        monkeypatch.setattr(BalancedBuffer, "_by_group", None)
        for _ in range(4):
            buffer.update([0.0, 1.0])
        buffer.add(np.arange(3.0))
        monkeypatch.undo()
        assert list(buffer.groups) == [0, 1, 2, 3]  # of which two have no row
        buffer.update([0.0])
        assert list(buffer.groups) == [0, 1, 2, 3, 4]
    with ExperienceBalancedBuffer(2) as buffer:
        buffer.update([0.0, 1.0, 2.0], experience=-9)  # full, which the log tells by the number of its entry
        buffer.add(np.arange(3.0))
        assert list(buffer.groups) == [-9]


def test_experiences_again_at_a_position() -> None:
    """A stream that is replayed from an older position names its experiences, and is counted once."""
    with ExperienceBalancedBuffer(100) as buffer:
        buffer.add(np.arange(4.0))
        buffer.add(np.arange(2.0, 8.0), experience=0, at=2)
        assert (buffer.seen, buffer.group_sizes()) == (8, {0: 8})
        for feed in (lambda: buffer.add(np.arange(3.0), at=8), lambda: buffer.update([0.0], at=8)):
            with pytest.raises(ArgumentError, match="experience="):
                feed()
        for wrong in (1.5, "1", 2**63, -(2**63) - 1, True):
            with pytest.raises(ArgumentError, match="experience"):
                buffer.add(np.arange(3.0), experience=wrong)  # type: ignore[arg-type]
        assert buffer.seen == 8


def test_experiences_are_balanced() -> None:
    """The same quotas and the same samples as with group ids by hand."""
    with ExperienceBalancedBuffer(10, seed=4) as one, ClassBalancedBuffer(10, seed=4) as other:
        for number, n in enumerate((100, 3, 40, 1, 60)):
            data = [float(i) for i in range(n)]
            one.update(data)
            other.update(data, group=number)
            assert one.group_sizes() == other.group_sizes()
            assert one.get_metadata("position").tolist() == other.get_metadata("position").tolist()
    with ExperienceBalancedBuffer(10, adaptive_size=False, num_experiences=2) as buffer:
        buffer.update([0.0] * 20)
        buffer.update([0.0] * 20)
        with pytest.raises(ArgumentError, match="of a total of 2"):
            buffer.update([0.0])
        assert buffer.group_sizes() == {0: 5, 1: 5}
        assert buffer.seen == 40


def test_the_rest_of_the_interface() -> None:
    """Rows given up are no samples: reading, drawing and metadata leave them out."""
    with ClassBalancedBuffer(20) as buffer:
        buffer.add((np.arange(20.0), np.zeros(20, int)), metadata={"z": np.arange(20)})
        buffer.add((np.arange(20.0, 21.0), np.ones(1, int)), metadata={"z": np.arange(20, 21)})
        assert len(buffer) == 11
        rows = buffer.get_metadata("idx")
        free = sorted(set(range(20)) - set(rows.tolist()))
        assert len(free) == 9
        assert [m["idx"] for _, m in buffer] == rows.tolist()
        drawn = Counter(i for _ in range(200) for i in buffer.sample(5)[1]["idx"].tolist())
        assert sorted(drawn) == rows.tolist()
        assert sorted(buffer.sample(11)[1]["idx"].tolist()) == rows.tolist()
        with pytest.raises(RowError):
            buffer.get([min(free)])
        with pytest.raises(RowError):
            buffer.set_metadata("z", np.zeros(1, int), rows=[min(free)])
        buffer.set_metadata("z", np.arange(11) * 3)
        buffer.set_metadata("new", np.arange(11) * 0.5)
        assert buffer.group_sizes() == {0: 10, 1: 1}
        assert (buffer.get_metadata("new") * 6 == buffer.get_metadata("z")).all()
        buffer.add((np.arange(21.0, 51.0), np.repeat([1, 2, 3], 10)), metadata={"z": np.arange(30), "new": np.arange(30.0)})
        assert buffer.group_sizes() == {0: 5, 1: 5, 2: 5, 3: 5}
        assert buffer.check() == []


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_draws_of_sparse_rows_are_even(where: str, tmp_path: Path) -> None:
    """Draws from a buffer with free rows between: each live row equally often."""
    path = None if where == "memory" else tmp_path / "b.h5"
    with ClassBalancedBuffer(40, path) as buffer:
        buffer.add(np.arange(41), group=np.array([0] * 40 + [1]))
        live = buffer.get_metadata("idx")
        assert live.shape[0] == 21
        kept = np.zeros((3000, 40), bool)
        for trial in range(3000):
            kept[trial, buffer.sample(4)[1]["idx"]] = True
        assert_inclusion(kept[:, live], 4)


@pytest.mark.parametrize("kind", KINDS)
def test_restore_points(kind: str) -> None:
    """Back to any of several marks, and on another way from there: groups, sizes and who may grow are those of then."""
    for seed in range(6):
        rng = random.Random(f"{kind} {seed}")
        groups = 4 if KINDS[kind][1] else 30
        labels = list(itertools.islice(growing(rng, groups), 300))
        wanted = model(kind, 12, seed, 4)
        with made(kind, 12, total=4, seed=seed, restore_points=4) as buffer:
            marks: list[tuple[Any, Grouped]] = [(buffer.state_dict(), wanted.copy())]
            for _ in range(25):
                if rng.random() < 0.3:
                    number = rng.randrange(len(marks))
                    state, then = marks[number]
                    buffer.load_state_dict(state)
                    wanted = then.copy()
                    del marks[number + 1 :]
                    rng.shuffle(labels)  # another stream from here
                else:
                    n = rng.randint(1, 20)
                    buffer.add(samples(wanted.seen, wanted.seen + n), group=np.array(labels[:n]))
                    wanted.add(labels[:n])
                    labels = labels[n:] + labels[:n]
                    if len(marks) < 4 and rng.random() < 0.5:
                        marks.append((buffer.state_dict(), wanted.copy()))
                assert_agree(buffer, wanted, f"{kind} {seed}")


def test_restore_points_of_many_groups(tmp_path: Path) -> None:
    """More groups than the log has room for: the way back is still there."""
    for path in (None, tmp_path / "b.h5"):
        with ClassBalancedBuffer(10, path) as buffer:
            buffer.add(np.arange(100), group=np.arange(100))
            state, before = buffer.state_dict(), image(buffer)
            buffer.add(np.arange(4000), group=np.arange(4000))
            assert len(buffer.group_sizes()) == 4000
            buffer.load_state_dict(state)
            assert image(buffer) == before


def test_states_of_others_are_refused() -> None:
    with ClassBalancedBuffer(10) as buffer, ClassBalancingReservoirBuffer(10) as other:
        buffer.add(np.arange(20), group=np.arange(20))
        other.add(np.arange(20), group=np.arange(20))
        with pytest.raises(StateError, match="ClassBalancingReservoirBuffer"):
            buffer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_a_row(kind: str) -> None:
    """G4: what policy and store keep in memory for each row, restore points included, is at most 24 bytes."""
    rows = 50_000
    with made(kind, rows, total=4) as buffer:
        for _ in range(2):
            buffer.add(np.zeros(40_000, np.uint8), group=np.arange(40_000) % 4)
            buffer.state_dict()
        buffer.add(np.zeros(40_000, np.uint8), group=np.arange(40_000) % 3)
        parts = [*vars(buffer._policy).values(), *vars(buffer._store).values()]
        large = {id(a): a.nbytes for a in parts if isinstance(a, np.ndarray) and a.base is None and a.nbytes >= rows}
    assert 16 * rows <= sum(large.values()) <= 24 * rows
