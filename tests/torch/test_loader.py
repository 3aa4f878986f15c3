"""ReplayLoader and MixedLoader: which batches come, with what in them, whatever the background does meanwhile.

The oracle is a loader without a background: it plans with the buffer's own draw at the moment that the docstring names, and
copies at once. It works on a twin of the buffer that goes through the same calls.
"""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import linecache
import os
import random
import signal
import sys
import textwrap
import threading
import time
import warnings
import weakref
from typing import NamedTuple

import numpy as np
import pytest
from children import child, result
from interpreter import Script
from laws import assert_even, assert_inclusion

torch = pytest.importorskip("torch")

from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

import leanreplay  # noqa: E402
from leanreplay import (  # noqa: E402
    ArgumentError,
    CapacityWarning,
    ClassBalancedBuffer,
    CorruptionError,
    GreedyClassBalancingBuffer,
    InfiniteBuffer,
    LeanReplayError,
    ModeError,
    ReservoirBuffer,
    SchemaError,
    SlidingWindowBuffer,
    StateError,
    WeightedReservoirBuffer,
    WorkerError,
)
from leanreplay.torch import MixedLoader, ReplayLoader  # noqa: E402
from leanreplay.torch.loading import replay_loader as module  # noqa: E402

pytestmark = pytest.mark.usefixtures("kernels")
PATIENCE = 120  # seconds: no test waits so long unless it is wrong
SIZE = 6  # samples in a batch

KINDS = {
    "reservoir": lambda path: ReservoirBuffer(40, path, seed=1),
    "window": lambda path: SlidingWindowBuffer(40, path, seed=1),
    "greedy": lambda path: GreedyClassBalancingBuffer(40, path, seed=1),
    "balanced": lambda path: ClassBalancedBuffer(40, path, seed=1),
    "weighted": lambda path: WeightedReservoirBuffer(40, path, seed=1),
    "infinite": lambda path: InfiniteBuffer(path, rows_per_part=16, seed=1),
}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


# -- helpers -------------------------------------------------------------------------------------------------------------


def wait_for(condition):
    """Until it holds; whether it does."""
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


def threads():
    return [t for t in threading.enumerate() if t.name == "leanreplay-loader"]


@pytest.fixture(autouse=True)
def nothing_left():
    """A loader that waits for ever is an error, and so is a thread that outlives the test."""
    if hasattr(signal, "setitimer"):
        kept = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"nothing happened for {PATIENCE} seconds"))
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    before = set(threads())  # of another test that failed
    yield
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, kept)
    gc.collect()
    assert wait_for(lambda: before.issuperset(threads())), "a test left the thread of a loader"


def samples(start, n):
    """x[i] holds only the number y[i], so that a torn, old or misplaced row shows."""
    y = np.arange(start, start + n)
    return np.repeat(y[:, None], 5, 1).astype(np.float32), y


def metadata(buffer, start, n):
    """For every metadata field that the buffer has, by default "z" and "task"."""
    names = ("z", "task") if buffer.schema is None else buffer.schema.metadata_names
    y = np.arange(start, start + n)
    return {name: y // 10 % 3 if name == "task" else y + 0.5 for name in names}


def feed(buffer, n, start=None):
    """The next n samples of the stream, with labels 0 to 4."""
    start = buffer.seen if start is None else start
    x, y = samples(start, n)
    options = {"weights": 1.0 + y % 3} if isinstance(buffer, WeightedReservoirBuffer) else {}
    buffer.add((x, y % 5), metadata=metadata(buffer, start, n), **options)


def make(kind="reservoir", where="ram", path=None, n=60):
    """A buffer that has seen n samples."""
    buffer = KINDS[kind](path / f"b{len(os.listdir(path))}" if where == "disk" else None)
    feed(buffer, n)
    return buffer


def plain(value):
    """Any nesting of tensors and arrays as one of (dtype, shape, bytes)."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
        value = value.view(torch.int16).numpy().view(np.uint16)  # as the buffer holds it
    array = np.asarray(value)
    return str(array.dtype), array.shape, array.tobytes()


class Oracle:
    """The batches of a loader without a background."""

    def __init__(self, buffer, size, prefetch=2, batches=None, seed=0, rows=None):
        self.buffer, self.size, self.prefetch, self.batches = buffer, size, prefetch, batches
        self.rows = rows or (lambda number: buffer._draw(buffer._require(), size, False, f"loader {seed}", counter=number))
        self.ahead, self.delivered, self.passed = [], 0, 0

    def plan(self):
        count = self.prefetch if self.batches is None else min(self.prefetch, self.batches - self.passed)
        while len(self.ahead) < count:
            self.ahead.append(plain(self.buffer.get(self.rows(self.delivered + len(self.ahead)))))

    def __next__(self):
        if self.passed == self.batches:
            self.passed = 0
        self.plan()
        found = self.ahead.pop(0)
        self.delivered += 1
        self.passed += 1
        self.plan()
        return found


def balanced_oracle(buffer, size, prefetch, balance, **options):
    """Draws by a loader that is never iterated: it plans, and nothing else."""
    planner = ReplayLoader(buffer, size, balance=balance)
    return Oracle(buffer, size, prefetch, rows=planner._rows, **options)


class Gate:
    """A batch_transform in which the background waits until `release`: batches behind it are planned, and not copied."""

    def __init__(self):
        self.semaphore = threading.Semaphore(0)

    def __call__(self, batch):
        assert self.semaphore.acquire(timeout=PATIENCE)
        return batch

    def release(self, n=1):
        self.semaphore.release(n)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release(10_000)


def finish(loader):
    """Until the background has nothing to do."""
    for job in list(loader._planned):
        assert job.ready.wait(PATIENCE)


def clone(item):
    if isinstance(item, dict):
        return {k: clone(v) for k, v in item.items()}
    if isinstance(item, (tuple, list)):
        return type(item)(clone(v) for v in item)
    return item.clone() if isinstance(item, torch.Tensor) else item


# -- what a batch holds ----------------------------------------------------------------------------------------------------


def rows_of_some(buffer, step):
    return buffer.get_metadata("idx")[step % 3 :: 3]


def change_some(buffer, step, saved):
    rows = rows_of_some(buffer, step)
    buffer.set_metadata("z", -1000.0 * step - np.arange(rows.shape[0]), rows)


def rollback(buffer, step, saved):
    feed(buffer, 30)
    buffer.load_state_dict(saved["state"])


def update(buffer, step, saved):
    x, y = samples(buffer.seen, 25)
    weights = {"weights": np.ones(25)} if isinstance(buffer, WeightedReservoirBuffer) else {}
    buffer.update(list(zip(x, y % 5, strict=True)), metadata=metadata(buffer, buffer.seen, 25), **weights)


OPERATIONS = {
    "add": lambda buffer, step, saved: feed(buffer, 25),
    "update": update,
    "set_metadata": lambda buffer, step, saved: buffer.set_metadata("z", step * 1000.0 + np.arange(len(buffer))),
    "some metadata": change_some,
    "new field": lambda buffer, step, saved: buffer.set_metadata(f"n{step}", np.arange(len(buffer)) + 0.25 * step),
    "rollback": rollback,
    "load": lambda buffer, step, saved: buffer.load(saved["folder"]),
    "resize": lambda buffer, step, saved: buffer.resize([20, 12, 35, 8][step % 4]),
}


def twins(kind, where, path, saved=True):
    """Two buffers in the same state, each with a state and a copy of an older one."""
    found = []
    for i in range(2):
        buffer = make(kind, where, path, 30)
        saved = {"folder": path / f"saved{i}"}
        buffer.save(saved["folder"])
        saved["state"] = buffer.state_dict()
        feed(buffer, 45)
        found.append((buffer, saved))
    return found


def compare(loader, oracle, buffers, apply, pace, steps=8):
    """Batch after batch, with an operation on both buffers in between."""
    for step in range(steps):
        if pace.gate:
            pace.gate.release()
        got, wanted = next(loader), next(oracle)
        assert plain(got) == wanted, f"batch {step}"
        pace.wait(loader)
        for buffer, saved in buffers:
            apply(buffer, step, saved)
        pace.wait(loader)


class Pace:
    """How the background and the training thread meet. held: it is stuck in the batch that comes next, copies of others are not
    begun. done: everything is made before the buffer changes. asleep: anything between.
    """

    def __init__(self, name):
        self.gate = Gate() if name == "held" else None
        self.name, self.random = name, random.Random(name)

    def batch_transform(self, batch):
        if self.gate:
            return self.gate(batch)
        if self.name == "asleep":
            time.sleep(self.random.random() * 0.004)
        return batch

    def wait(self, loader):
        if self.name == "done":
            finish(loader)
        elif self.name == "asleep":
            time.sleep(self.random.random() * 0.003)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.gate:
            self.gate.release(10_000)


@pytest.mark.parametrize("pace", ["held", "done", "asleep"])
@pytest.mark.parametrize("operation", list(OPERATIONS))
@pytest.mark.parametrize("where", ["ram", "disk"])
def test_content_is_that_of_the_plan(where, operation, pace, tmp_path):
    """A batch holds the rows that were drawn when it was planned, as they were then, wherever the background stands when they change."""
    buffers = twins("window", where, tmp_path)
    pace = Pace(pace)
    with ReplayLoader(buffers[0][0], SIZE, prefetch=3, batch_transform=pace.batch_transform) as loader, pace:
        compare(loader, Oracle(buffers[1][0], SIZE, 3), buffers, OPERATIONS[operation], pace)
    assert not buffers[0][0].check()


@pytest.mark.parametrize("pace", ["held", "done", "asleep"])
@pytest.mark.parametrize("kind, where", list(itertools.product(KINDS, ["ram", "disk"])))
def test_every_kind_and_prefetch(kind, where, pace, tmp_path):
    """Any buffer and 1 to 4 batches ahead (in RAM 1 and 3, on disk 2 and 4), with operations in random order."""
    names = ["add", "add", "update", "set_metadata", "some metadata", "rollback", "load"] + ["resize"] * (kind != "infinite")
    for prefetch in (1, 3) if where == "ram" else (2, 4):
        (tmp_path / str(prefetch)).mkdir()
        buffers = twins(kind, where, tmp_path / str(prefetch))
        chosen = random.Random(f"{kind} {prefetch}").choices(names, k=12)

        def apply(buffer, step, saved, chosen=chosen):
            name, before = chosen[step], chosen[:step]
            if name == "load" and "resize" in before:
                name = "add"  # of another size
            elif name == "rollback" and ("resize" in before or "load" in before):
                saved["state"] = buffer.state_dict()  # which ended the points
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CapacityWarning)
                OPERATIONS[name](buffer, step, saved)
            if len(buffer) < SIZE:
                feed(buffer, 30)

        where_to = Pace(pace)
        with ReplayLoader(buffers[0][0], SIZE, prefetch=prefetch, seed=7, batch_transform=where_to.batch_transform) as loader, where_to:
            compare(loader, Oracle(buffers[1][0], SIZE, prefetch, seed=7), buffers, apply, where_to, 12)


@pytest.mark.parametrize("pace", ["held", "done", "asleep"])
@pytest.mark.parametrize("balance", ["class", "task"])
@pytest.mark.parametrize("kind", ["reservoir", "infinite"])
def test_content_of_balanced_batches(kind, balance, pace, tmp_path):
    """The same with `balance`, whose groups are those of the moment of planning."""
    names = ["add", "set_metadata", "rollback", "task", "add"]

    def apply(buffer, step, saved):
        name = names[step % len(names)]
        if name == "task":
            buffer.set_metadata("task", np.arange(len(buffer)) % (2 + step))
        else:
            OPERATIONS[name](buffer, step, saved)

    for prefetch in (1, 3):
        (tmp_path / str(prefetch)).mkdir()
        buffers = twins(kind, "disk", tmp_path / str(prefetch))
        where_to = Pace(pace)
        with (
            ReplayLoader(buffers[0][0], 7, prefetch=prefetch, balance=balance, batch_transform=where_to.batch_transform) as loader,
            where_to,
        ):
            compare(loader, balanced_oracle(buffers[1][0], 7, prefetch, balance), buffers, apply, where_to, 12)


@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_planned_when_the_batch_prefetch_places_before_is_handed_out(prefetch):
    """Batch k is of the buffer as it was when batch k - prefetch was handed out, the first ones as it was at the first call."""
    buffer = SlidingWindowBuffer(SIZE)
    feed(buffer, SIZE, 0)
    with ReplayLoader(buffer, SIZE, prefetch=prefetch) as loader:
        feed(buffer, SIZE)  # before the first call, which plans
        for k in range(10):
            _, meta = next(loader)
            newest = SIZE * (2 + max(0, k - prefetch))
            assert meta["position"].sort().values.tolist() == list(range(newest - SIZE, newest)), k
            feed(buffer, SIZE)


def test_each_batch_is_copied_once_and_no_more_than_prefetch_ahead():
    """Whether the background copies or `add` does, nothing is copied twice; and no batch is made before it is planned."""
    for wait in (False, True):
        buffer, made, reads = make(), [], []
        read = buffer._store.read
        buffer._store.read = lambda *a, read=read, reads=reads: reads.append(1) or read(*a)
        with ReplayLoader(buffer, SIZE, prefetch=3, batch_transform=lambda batch, made=made: made.append(1) or batch) as loader:
            for k in range(20):
                next(loader)
                if wait:
                    finish(loader)
                assert k < len(made) <= k + 4 and len(reads) <= k + 4
                feed(buffer, 5)
                assert len(reads) == k + 4
                feed(buffer, 5)
                finish(loader)
                assert len(reads) == k + 4 == len(made)


def test_add_waits_for_copies_only():
    """`add` ends while a transform of a batch that is planned goes on."""
    buffer = make()
    gate = Gate()
    with ReplayLoader(buffer, SIZE, prefetch=4, batch_transform=gate) as loader, gate:
        gate.release()
        next(loader)
        feed(buffer, 50)
        assert buffer.seen == 110 and not any(job.ready.is_set() for job in loader._planned)


def test_a_transform_may_use_the_buffer():
    """In the background, while the training thread adds."""
    buffer = make()
    buffer.transform = lambda x: x + len(buffer) * 0 + buffer.get_metadata("position").min() * 0
    with ReplayLoader(buffer, SIZE, prefetch=3) as loader:
        for _ in range(30):
            (x, y), meta = next(loader)
            assert torch.equal(x[:, 0], meta["position"].float()) and torch.equal(y, meta["position"] % 5)
            feed(buffer, 3)


def test_add_in_another_thread():
    """Batches that were planned are not passed over when one is handed out just while another thread's `add` copies them."""
    buffer, twin = make("window"), make("window")
    oracle = Oracle(twin, SIZE, 3)
    gate = Gate()
    with ReplayLoader(buffer, SIZE, prefetch=3, batch_transform=gate) as loader, gate:
        gate.release(2)
        assert plain(next(loader)) == next(oracle)
        first = loader._planned[0]
        assert first.ready.wait(PATIENCE)
        copy, looking = first.copy, threading.Event()

        def slow():
            looking.set()
            end = time.monotonic() + 0.3  # the other thread may have to wait for this one
            while loader._planned[0] is first and time.monotonic() < end:
                time.sleep(0.001)
            copy()

        first.copy = slow
        adding = threading.Thread(target=feed, args=(buffer, 40))
        adding.start()
        assert looking.wait(PATIENCE)
        got = next(loader)
        adding.join(PATIENCE)
        gate.release(100)
        wanted = [oracle.ahead.pop(0) for _ in range(3 - 1)]
        assert plain(got) == wanted[0] and plain(next(loader)) == wanted[1]


def test_threads_that_add_while_it_runs():
    """Every sample is whole, and of one state of the buffer, when another thread adds all the time."""
    buffer, stop = make("window"), threading.Event()

    def add():
        while not stop.is_set():
            feed(buffer, 7)
            time.sleep(0)

    adding = threading.Thread(target=add)
    adding.start()
    try:
        with ReplayLoader(buffer, SIZE, prefetch=4) as loader:
            for _ in range(300):
                (x, y), meta = next(loader)
                position = meta["position"]
                assert (x == position[:, None]).all() and torch.equal(y, position % 5) and torch.equal(meta["z"], position + 0.5)
                assert len(set(position.tolist())) == SIZE and position.max() - position.min() < 40
    finally:
        stop.set()
        adding.join(PATIENCE)


def test_groups_after_several_resizes():
    """Another store is not taken for the one whose groups are known because its address and number are the same."""
    for _ in range(20):
        buffer = make("window")
        with ReplayLoader(buffer, SIZE, balance="class", prefetch=1) as loader:
            for start in (40, 30, 20):
                buffer.resize(start)
                next(loader)
                known = loader._groups
                for size in range(start - 1, start - 10, -1):
                    buffer.resize(size)
                    if known and known[0] == (id(buffer._store), buffer._store.sequence):
                        break
                next(loader)  # planned before
                _, meta = next(loader)
                assert meta["idx"].max() < len(buffer)


def test_groups_after_a_rollback_of_parts():
    """The number of an InfiniteBuffer's state is a sum over parts, which a rollback and other commits may bring back."""
    buffer = InfiniteBuffer(rows_per_part=10)
    feed(buffer, 8)
    state = buffer.state_dict()
    feed(buffer, 30)
    with ReplayLoader(buffer, SIZE, balance="class", prefetch=1) as loader:
        next(loader)
        before = buffer._store.sequence
        buffer.load_state_dict(state)
        for i in range(100):
            if buffer._store.sequence >= before:
                break
            buffer.set_metadata("z", np.arange(8.0) + i)
        assert buffer._store.sequence == before
        next(loader)
        assert next(loader)[1]["idx"].max() < 8


# -- draws -------------------------------------------------------------------------------------------------------------------


def take(loader, n):
    return [next(loader) for _ in range(n)]


def test_seeds():
    """The same seed gives the same batches, another seed others; no draw of the buffer is used up."""
    buffer = make()
    with (
        ReplayLoader(buffer, SIZE) as a,
        ReplayLoader(buffer, SIZE, prefetch=4) as b,
        ReplayLoader(buffer, SIZE, seed=1) as c,
        ReplayLoader(buffer, SIZE, seed=-(2**127)) as d,
    ):
        lists = [[meta["position"].tolist() for _, meta in take(loader, 12)] for loader in (a, b, c, d)]
    assert lists[0] == lists[1] and all(p != q for p, q in itertools.combinations([lists[0], *lists[2:]], 2))
    assert len({tuple(p) for p in lists[0]}) == 12
    assert plain(buffer.sample(SIZE)) == plain(make().sample(SIZE))


def test_plain_draws_are_uniform():
    """Every row and pair of rows equally likely, distinct within a batch; first places independent of those of the batch before."""
    buffer = SlidingWindowBuffer(12)
    buffer.add(np.arange(12))
    kept, firsts = np.zeros((4000, 12), bool), np.zeros((12, 12))
    places, last = np.zeros((5, 12)), None
    with ReplayLoader(buffer, 5, prefetch=4) as loader:
        for i in range(4000):
            x, meta = next(loader)
            assert torch.equal(x, meta["idx"])
            kept[i, x] = True
            places[np.arange(5), x] += 1
            if last is not None:
                firsts[last, x[0]] += 1
            last = x[0]
    assert_inclusion(kept, 5, "rows of a batch")
    assert_even(firsts, "batches one after the other")
    for place in places:
        assert_even(place, "one place of the batch")


@pytest.mark.parametrize("balance, size", [("class", 12), ("class", 10), ("task", 7), ("task", 3), ("task", 64)])
def test_balanced_draws(balance, size):
    """Groups of 1 to 30 samples: each as often as the others in a batch, or once more; who that is, which of its samples, and where they
    stand is left to chance; samples repeat only where a group has too few.
    """
    lengths = [30, 1, 9, 4]
    y = np.repeat([5, -3, 7, 0], lengths)
    task = np.concatenate([np.repeat([2**40, 8], [20, 19]), [9, 10, 11, 12, 13]])  # other groups, and more of them
    order = np.random.default_rng(0).permutation(44)
    buffer = SlidingWindowBuffer(44)
    buffer.add((np.arange(44), y[order]), metadata={"task": task[order]})
    values = (y if balance == "class" else task)[order]
    names, number = np.unique(values, return_inverse=True)
    sizes = np.bincount(number)
    each, rest = divmod(size, len(names))
    more, rows, places = np.zeros(len(names)), np.zeros(44), np.zeros((size, len(names)))
    trials = 1500
    with ReplayLoader(buffer, size, balance=balance, prefetch=2) as loader:
        for _ in range(trials):
            (x, label), meta = next(loader)
            assert torch.equal(x, meta["idx"]) and np.array_equal(label.numpy(), y[order][x]) and x.shape == (size,)
            drawn = number[x]
            counts = np.bincount(drawn, minlength=len(names))
            assert ((counts == each) | (counts == each + 1)).all() and (counts > each).sum() == rest
            found = np.bincount(x, minlength=44)
            assert all(found[number == g].max() <= 1 for g in range(len(names)) if counts[g] <= sizes[g])
            more += counts > each
            rows += found
            places[np.arange(size), drawn] += 1
    if rest:
        # of `rest` out of so many groups, the counts' variance is smaller than of independent draws
        assert (abs(more - trials * rest / len(names)) < 5.5 * np.sqrt(trials * 0.25)).all(), more
    for g in np.flatnonzero(sizes > 1):
        counts = rows[number == g]
        assert (abs(counts - counts.mean()) < 5.5 * np.sqrt(counts.mean())).all(), (names[g], counts)
    expected = places.sum(0) / size  # of each group, in every place
    assert (abs(places - expected) < 5.5 * np.sqrt(expected) + 1).all()


def test_balanced_draws_of_one_group_are_uniform():
    """Pairs within a group, by the exact test; with another group beside it that gets its share too."""
    buffer = SlidingWindowBuffer(40)
    buffer.add((np.arange(40), (np.arange(40) < 28).astype(np.int64)))
    kept = np.zeros((3000, 12), bool)
    both = np.zeros((2, 2))
    with ReplayLoader(buffer, 8, balance="class") as loader:
        for i in range(3000):
            (x, y), _ = next(loader)
            kept[i, x[y == 0] - 28] = True
            both[int(x[y == 0][0] - 28 < 6), int(x[y == 1][0] < 14)] += 1
    assert_inclusion(kept, 4, "samples of a group")
    assert_even(both, "one group and the other")


def test_balance_by_other_columns():
    """A metadata field named "class" before the label; floats with NaN; what cannot be balanced over says why."""
    buffer = SlidingWindowBuffer(30)
    z = np.where(np.arange(30) % 10 == 0, np.nan, np.arange(30) % 2)
    buffer.add((np.arange(30), np.zeros(30, np.int64)), metadata={"class": np.arange(30) // 29, "z": z, "wide": np.zeros((30, 2))})
    with ReplayLoader(buffer, 4, balance="class") as loader:
        assert (next(loader)[1]["idx"] == 29).sum() == 2
    with ReplayLoader(buffer, 9, balance="z") as loader:
        found = next(loader)[1]["z"]
        assert found.isnan().sum() == 3 and (found == 0).sum() == 3 and (found == 1).sum() == 3
    for balance, message in (("wide", "single values"), ("nothing", "no metadata 'nothing'"), ("position", "no metadata")):
        with ReplayLoader(buffer, 4, balance=balance) as loader, pytest.raises(SchemaError, match=message):
            next(loader)
    single = SlidingWindowBuffer(30)
    single.add(np.arange(30.0))
    with ReplayLoader(single, 4, balance="class") as loader, pytest.raises(SchemaError, match="pairs with an integer label"):
        next(loader)


# -- errors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", [None, "class"])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_errors_of_planning(prefetch, balance):
    """A buffer that is empty, or too small: the error comes when asked for the batch, and again, and the batch when it can be drawn."""
    buffer, twin = (ReservoirBuffer(40, seed=1) for _ in range(2))
    with ReplayLoader(buffer, SIZE, prefetch=prefetch, balance=balance) as loader:
        for _ in range(2):
            with pytest.raises(ArgumentError, match=f"{SIZE} from a.* empty buffer|{SIZE} from a buffer of 0"):
                next(loader)
        if balance is None:
            feed(buffer, SIZE - 1)
            feed(twin, SIZE - 1)
            with pytest.raises(ArgumentError, match="at most 5"):
                next(loader)
        feed(buffer, 50)
        feed(twin, 50)
        oracle = Oracle(twin, SIZE, prefetch) if balance is None else balanced_oracle(twin, SIZE, prefetch, balance)
        for _ in range(5):
            assert plain(next(loader)) == next(oracle)


def test_an_error_of_planning_waits_for_its_turn():
    """Batches planned before come first; the one that could not be planned is planned when asked for again."""
    buffer, twin = (ReservoirBuffer(40, seed=1) for _ in range(2))
    states = []
    for b in (buffer, twin):
        feed(b, SIZE - 2)
        states.append(b.state_dict())
        feed(b, 30)
    oracle = Oracle(twin, SIZE, 2)
    with ReplayLoader(buffer, SIZE, prefetch=2) as loader:
        assert plain(next(loader)) == next(oracle)
        buffer.load_state_dict(states[0])
        assert plain(next(loader)) == oracle.ahead[0] and plain(next(loader)) == oracle.ahead[1]
        with pytest.raises(ArgumentError, match="buffer of 4"):
            next(loader)
        twin.load_state_dict(states[1])
        feed(buffer, 30)
        feed(twin, 30)
        oracle.ahead, oracle.delivered = [], 3
        for _ in range(4):
            assert plain(next(loader)) == next(oracle)


class Trouble(Exception):
    pass


class Fails:
    """A function of a batch or a sample that raises when its n-th calls come."""

    def __init__(self, *calls, error=Trouble):
        self.calls, self.n, self.error = calls, 0, error
        self.lock = threading.Lock()

    def __call__(self, value):
        with self.lock:
            self.n += 1
            if self.n in self.calls:
                raise self.error(f"call {self.n}")
        return value


@pytest.mark.parametrize("prefetch", [1, 2, 4])
@pytest.mark.parametrize("place", ["transform", "target_transform", "batch_transform"])
@pytest.mark.parametrize("error", [Trouble, SystemExit, KeyboardInterrupt])
def test_errors_of_transforms(place, prefetch, error):
    """They reach the caller at that batch, not before, which then comes again: none is lost or doubled."""
    per_batch = 1 if place == "batch_transform" else SIZE
    function = Fails(2 * per_batch + 1, 3 * per_batch, error=error)
    buffer = make()
    options = {}
    if place == "batch_transform":
        options["batch_transform"] = function
    else:
        setattr(buffer, place, function)
    oracle = Oracle(make(), SIZE, prefetch)
    with ReplayLoader(buffer, SIZE, prefetch=prefetch, **options) as loader:
        raised = []
        for i in range(8):
            wanted = next(oracle)
            while True:
                try:
                    got = loader.__next__()
                    break
                except error as found:
                    assert "call" in str(found)
                    raised.append(i)
            assert plain(got) == wanted
    assert raised and raised[0] == 2 and len(raised) <= 2


def test_a_transform_that_runs_out():
    """StopIteration must not end the loop, as if there were no more batches."""
    buffer, numbers = make(), iter(range(3))
    seen = 0
    with ReplayLoader(buffer, SIZE, batch_transform=lambda batch: (next(numbers), batch)) as loader:
        with pytest.raises(ArgumentError, match="batch_transform raised StopIteration") as caught:
            for _ in loader:
                seen += 1
        assert seen == 3 and isinstance(caught.value.__cause__, StopIteration)
        numbers = iter(range(3, 9))
        oracle = Oracle(make(), SIZE, 2)
        wanted = [next(oracle) for _ in range(4)][3]
        number, batch = next(loader)[0]
        assert number == 3 and plain(batch) == wanted[0]  # the one that failed


def test_a_transform_that_always_fails():
    """It raises every time, until it is put right."""
    buffer = make()
    buffer.transform = lambda x: 1 / 0
    with ReplayLoader(buffer, SIZE, prefetch=3) as loader:
        for _ in range(5):
            with pytest.raises(ZeroDivisionError):
                next(loader)
        buffer.transform = None
        oracle = Oracle(make(), SIZE, 3)
        for _ in range(5):
            assert plain(next(loader)) == next(oracle)
        finish(loader)
        buffer.transform = lambda x: np.zeros(1 + int(x[0]) % 3)
        for _ in range(3):
            assert plain(next(loader)) == next(oracle)  # planned, and made, with the transform before
        with pytest.raises(ArgumentError, match="cannot be stacked"):
            take(loader, 4)


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_a_corrupted_row(prefetch, settled, tmp_path):
    """A batch that holds it raises CorruptionError when its turn comes, in the background or copied by `add`; repaired, it comes."""
    buffer = make("window", "disk", tmp_path)
    expected = Oracle(make("window"), SIZE, prefetch)
    order = [next(expected) for _ in range(10)]
    rows = [np.frombuffer(batch[1]["idx"][2], np.int64) for batch in order]
    row = int(next(r for r in rows[4] if not any(r in earlier for earlier in rows[:4])))
    at = buffer._store.table.columns[0][0] + 20 * row
    with open(buffer.path, "r+b", buffering=0) as file, ReplayLoader(buffer, SIZE, prefetch=prefetch) as loader:

        def flip():
            byte = os.pread(file.fileno(), 1, at)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1]), at)

        flip()
        for i in range(4):
            if settled and i == 4 - prefetch + 1:
                finish(loader)
            assert plain(next(loader)) == order[i]
        if settled:
            loader._settle()
        for _ in range(2):
            with pytest.raises(CorruptionError, match=rf"\[{row}\]"):
                next(loader)
        flip()
        for i in range(4, 10):
            assert plain(next(loader)) == order[i]


def test_a_row_damaged_after_its_copy(tmp_path):
    """A batch that is made is made: what happens to its rows in the file is nothing to it."""
    buffer, oracle = make("window", "disk", tmp_path), Oracle(make("window"), SIZE, 2)
    with open(buffer.path, "r+b", buffering=0) as file, ReplayLoader(buffer, SIZE) as loader:
        assert plain(next(loader)) == next(oracle)
        finish(loader)
        at, nbytes = buffer._store.table.columns[0][0], 20 * 40
        whole = os.pread(file.fileno(), nbytes, at)
        os.pwrite(file.fileno(), bytes(nbytes), at)
        loader._settle()  # as before an `add`
        assert plain(next(loader)) == next(oracle)
        os.pwrite(file.fileno(), whole, at)
        loader._planned[-1].ready.wait(PATIENCE)


def error_of(function):
    try:
        return function()
    except Exception as error:
        return error


def test_bad_arguments():
    """Errors of our own, when the loader is made."""
    buffer = make()
    wrong = [
        {"buffer": [1, 2]}, {"batch_size": 0}, {"batch_size": None}, {"batch_size": True}, {"batch_size": 2.5}, {"batch_size": 2**40},
        {"prefetch": 0}, {"prefetch": None}, {"prefetch": -1}, {"batches": 0}, {"batches": "x"}, {"seed": 2**127}, {"seed": "x"},
        {"batch_transform": 3}, {"balance": 3}, {"device": "nonsense"}, {"device": object()},
    ]  # fmt: skip
    for options in wrong:
        with pytest.raises(ArgumentError, match=next(iter(options))):
            ReplayLoader(**{"buffer": buffer, "batch_size": 4, **options})
    gc.collect()
    assert not buffer._before_write, "a loader that was refused is asked before every write"


# -- ending ------------------------------------------------------------------------------------------------------------------


def test_close():
    """It joins the thread, at whatever the background is, takes back the hook, and may be called again; a closed loader says so."""
    for asked in range(4):
        buffer, slow = make(), lambda batch: (time.sleep(0.02), batch)[1]
        loader = ReplayLoader(buffer, SIZE, prefetch=3, batch_transform=slow)
        take(loader, asked)
        assert len(threads()) == (asked > 0) and len(buffer._before_write) == 1
        loader.close()
        assert not threads() and not buffer._before_write
        loader.close()
        for call in (loader.__next__, loader.state_dict):
            with pytest.raises(ModeError, match="closed"):
                call()
        feed(buffer, 5)
        buffer.close()


@pytest.mark.parametrize("how", ["close", "error", "load"])
def test_batches_that_nobody_will_get_are_not_made(how):
    """Closing waits for the batch that the background is at, not for all that are planned; nor do those after an error or a state."""
    buffer, gate, made = make(), Gate(), []
    loader = ReplayLoader(buffer, SIZE)
    state = loader.state_dict()
    loader.close()

    def transform(batch):
        made.append(gate(batch))
        if len(made) == 2 and how == "error":
            raise Trouble
        return batch

    loader = ReplayLoader(buffer, SIZE, prefetch=6, batch_transform=transform)
    with gate:
        gate.release()
        next(loader)
        if how == "close":
            release = threading.Timer(0.1, gate.release, [100])
            release.start()
            loader.close()
            release.join()
        elif how == "error":
            gate.release()
            with pytest.raises(Trouble):
                next(loader)
        else:
            loader.load_state_dict(state)
        assert loader._queue.qsize() <= 1  # the word to end
        gate.release(100)
        loader.close()
    assert len(made) <= 3


def test_context_manager_and_exceptions():
    """An exception in the loop ends the thread too; a loader within the loop of another is its own."""
    buffer = make()
    with pytest.raises(Trouble), ReplayLoader(buffer, SIZE) as loader:
        for _ in loader:
            with ReplayLoader(buffer, SIZE) as inner:
                next(inner)
            assert len(threads()) == 1
            raise Trouble
    assert not threads() and not buffer._before_write


def test_close_after_errors():
    """Errors that nobody asked for do not keep it from closing."""
    buffer = make()
    buffer.transform = Fails(SIZE + 2, 2 * SIZE + 2)
    loader = ReplayLoader(buffer, SIZE, prefetch=4)
    next(loader)
    finish(loader)
    loader.close()
    assert not threads()


@pytest.mark.parametrize("how", ["never asked", "in a loop", "planning", "transform", "error not asked for", "batches", "loaded"])
def test_forgotten_loaders(how):
    """Without `close`, the thread and the hook go with the loader, also after errors; the buffer can go as well."""
    buffer = make()
    options = {"batches": 2} if how == "batches" else {}
    if how == "transform":
        options["batch_transform"] = Fails(2, 3, 4)
    elif how == "error not asked for":
        options["batch_transform"] = Fails(2)
    loader = ReplayLoader(buffer, 100 if how == "planning" else SIZE, **options)
    if how == "in a loop":
        for _ in loader:
            break
    elif how == "batches":
        assert len(list(loader)) == 2
    elif how == "planning":
        with contextlib.suppress(ArgumentError):
            next(loader)
    elif how == "transform":
        next(loader)
        with contextlib.suppress(Trouble):
            next(loader)
    elif how == "error not asked for":
        next(loader)
        finish(loader)
    elif how == "loaded":
        next(loader)
        loader.load_state_dict(loader.state_dict())
        next(loader)
    gone = weakref.ref(loader)
    del loader
    gc.collect()
    assert wait_for(lambda: gc.collect() >= 0 and gone() is None), "something keeps the loader"
    assert wait_for(lambda: not threads()) and not buffer._before_write
    feed(buffer, 5)
    gone = weakref.ref(buffer)
    del buffer, options
    assert wait_for(lambda: gc.collect() >= 0 and gone() is None), "something keeps the buffer"


def script(text, *arguments):
    """Run Python in another process."""
    return Script(textwrap.dedent(PRELUDE) + textwrap.dedent(text), *arguments)


PRELUDE = """
    import os, signal, sys, time
    import numpy as np, torch
    import leanreplay
    from leanreplay.torch import ReplayLoader
    def feed(buffer, n):
        y = np.arange(buffer.seen, buffer.seen + n)
        buffer.add((np.repeat(y[:, None], 5, 1).astype("f4"), y % 5), metadata={"z": y + 0.5})
    buffer = leanreplay.ReservoirBuffer(40)
    feed(buffer, 60)
"""


def test_the_end_of_the_interpreter():
    """A script that closes nothing ends at once and without a word, whatever the background does."""
    child = script(
        """
        loaders = [ReplayLoader(buffer, 8, prefetch=3, batch_transform=lambda b: (time.sleep(0.01), b)[1]) for _ in range(3)]
        next(loaders[0])
        for _ in range(5):
            next(loaders[1])
        feed(buffer, 5)
        print("end")
        """
    )
    out, err = child.communicate(timeout=PATIENCE)
    assert (child.returncode, out, err) == (0, "end\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("place", ["waiting", "adding"])
def test_ctrl_c(place):
    """SIGINT while the loop waits for a batch, or adds: KeyboardInterrupt, and the process ends."""
    child = script(
        """
        slow = 3600 if sys.argv[1] == "waiting" else 0
        loader = ReplayLoader(buffer, 8, prefetch=3, batch_transform=lambda b: (time.sleep(slow), b)[1])
        print("running", flush=True)
        while True:
            if not slow:
                next(loader)
                feed(buffer, 20)
            else:
                next(loader)
        """,
        place,
    )
    try:
        assert child.stdout.readline() == "running\n"
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=PATIENCE)
        assert child.returncode == -signal.SIGINT and err.rstrip().endswith("KeyboardInterrupt"), err
    finally:
        child.kill()


class Interrupt:
    """Raises KeyboardInterrupt when the n-th line of a file is about to run in this thread."""

    def __init__(self, n):
        self.n, self.count, self.where = n, 0, None

    def trace(self, frame, event, arg):
        if frame.f_code.co_filename != module.__file__:
            return None
        # Python looks for signals after calls, not where it leaves a `with`, enters a `try` or returns; these are lines all the same.
        text = linecache.getline(module.__file__, frame.f_lineno).lstrip()
        if event == "line" and not text.startswith(("with ", "try:", "return job.result")):
            self.count += 1
            if self.count == self.n:
                self.where = f"{frame.f_code.co_name}, line {frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(None)


@pytest.mark.parametrize("place", ["plain", "balance", "transform", "add"])
def test_ctrl_c_at_every_line(place):
    """Wherever Ctrl-C meets the loader, going on gives the same batches: none lost, doubled or waited for without end."""
    before = sys.gettrace()
    oracle = Oracle(make(), SIZE, 3) if place != "balance" else balanced_oracle(make(), SIZE, 3, "class")
    order = []
    for _ in range(6):
        order.append(next(oracle))
        if place == "add" and len(order) < 4:
            feed(oracle.buffer, 20)
    wrong, n, buffer = [], 0, make()
    done = False
    while not done:
        n += 1
        if place == "add":
            buffer = make()
        options = {"balance": "class"} if place == "balance" else {}
        if place == "transform":
            options["batch_transform"] = Fails(2, 5)
        loader = ReplayLoader(buffer, SIZE, prefetch=3, **options)
        got, interrupts, added = [], 0, 0
        with Interrupt(n) as interrupt:
            while len(got) < 4:
                try:
                    if added < len(got) and place == "add":
                        feed(buffer, 20, 60 + 20 * added)
                        added += 1
                        continue
                    got.append(next(loader))
                except KeyboardInterrupt:
                    interrupts += 1
                    added = (buffer.seen - 60) // 20
                except Trouble:
                    pass
                except LeanReplayError as error:
                    wrong.append(f"{interrupt.where}: {error!r}")
                    break
        done = interrupt.where is None
        if interrupts != (not done):
            wrong.append(f"{interrupt.where}: the interrupt was swallowed")
        found = [plain(batch) for batch in got]
        if found != order[: len(found)]:
            wrong.append(f"{interrupt.where}: {[order.index(f) if f in order else '?' for f in found]}")
        loader.close()
    sys.settrace(before)
    assert n > 30 and not wrong, "\n".join(wrong)


def test_ctrl_c_while_add_copies():
    """The interrupt comes out of `add`, which has done nothing, and not of some later batch; the batch is copied when `add` is repeated."""
    buffer, oracle = make("window"), Oracle(make("window"), SIZE, 3)
    gate = Gate()
    with ReplayLoader(buffer, SIZE, prefetch=3, batch_transform=gate) as loader, gate:
        gate.release()
        assert plain(next(loader)) == next(oracle)
        read = buffer._store.read
        main = threading.current_thread()

        def interrupted(*arguments):
            if threading.current_thread() is main:
                raise KeyboardInterrupt
            return read(*arguments)

        buffer._store.read = interrupted
        with pytest.raises(KeyboardInterrupt):
            feed(buffer, 40)
        buffer._store.read = read
        assert buffer.seen == 60
        feed(buffer, 40)
        gate.release(100)
        for wanted in oracle.ahead:
            assert plain(next(loader)) == wanted


# -- processes -----------------------------------------------------------------------------------------------------------------


@needs_fork
@pytest.mark.parametrize("where", ["ram", "disk"])
def test_fork(where, tmp_path):
    """A child says that it must make its own loader, without waiting for a thread that it does not have; its own loader works. The parent
    goes on as if nothing had been.
    """
    buffer, twin = make("window", where, tmp_path), make("window")
    oracle, fresh = Oracle(twin, SIZE, 3), Oracle(twin, SIZE, 3)
    gate = Gate()
    with ReplayLoader(buffer, SIZE, prefetch=3, batch_transform=gate) as loader, gate:
        gate.release()
        assert plain(next(loader)) == next(oracle)  # the background is in a batch, two wait

        def fresh_one(_):
            said = [error_of(call) for call in (lambda: next(loader), loader.state_dict)]
            assert all(isinstance(e, ModeError) and "process" in str(e) for e in said), said
            assert isinstance(error_of(lambda: buffer.add(samples(0, 3))), ModeError)
            with ReplayLoader(buffer, SIZE, prefetch=3) as mine:
                found = [plain(next(mine)) for _ in range(4)]
            loader.close()
            return found == [next(fresh) for _ in range(4)]

        assert result(*child(fresh_one, 20)) is True
        feed(buffer, 20)
        feed(twin, 20)
        gate.release(100)
        for _ in range(6):
            assert plain(next(loader)) == next(oracle)


@needs_fork
def test_fork_at_any_moment(tmp_path):
    """The child's buffer and a loader of its own work wherever the parent's background is."""
    buffer = make("window", "disk", tmp_path)
    rng = random.Random(0)

    def draw(_):
        with ReplayLoader(buffer, SIZE) as mine:
            return sum(len(y) for (_, y), _ in take(mine, 3))

    with ReplayLoader(buffer, SIZE, prefetch=4) as loader:
        for _ in range(25):
            take(loader, rng.randrange(4))
            time.sleep(rng.random() * 0.001)
            assert result(*child(draw)) == 3 * SIZE


@needs_fork
def test_beside_data_loader_workers():
    """Workers that are forked while the background runs, as in most training loops."""
    x, y = samples(0, 60)
    stream = DataLoader(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), 10, num_workers=2, multiprocessing_context="fork")
    buffer, oracle = make(), Oracle(make(), SIZE, 2)
    with ReplayLoader(buffer, SIZE) as loader:
        for _ in range(2):
            for (a, b), got in zip(stream, loader, strict=False):
                assert plain(got) == next(oracle) and torch.equal(a[:, 0].long(), b)
                feed(buffer, 5)
                feed(oracle.buffer, 5)


@pytest.mark.parametrize("kind", ["window", "infinite"])
def test_reader_beside_a_writer(kind, tmp_path, monkeypatch):
    """A loader of a reader: samples are whole and distinct while another process adds, rolls back and resizes, and new ones come."""
    monkeypatch.setattr(leanreplay.storage.store, "_PATIENCE", PATIENCE / 2)  # on a busy machine a writer may stand still for long
    writer = script(
        """
        kind, path = sys.argv[1:]
        if kind == "window":
            buffer = leanreplay.SlidingWindowBuffer(40, path)
        else:
            buffer = leanreplay.InfiniteBuffer(path, rows_per_part=200)
        feed(buffer, 60)
        print("there", flush=True)
        i, parent = 0, os.getppid()
        while os.getppid() == parent:  # until it is killed, or left alone
            i += 1
            if i % 50 == 1:
                state = buffer.state_dict()
            feed(buffer, 7)
            if i % 50 == 30:
                buffer.load_state_dict(state)
            if i % 200 == 0 and kind == "window":
                buffer.resize(20)
                buffer.resize(40)
            time.sleep(0.001)
        """,
        kind,
        tmp_path / "b",
    )
    try:
        assert writer.stdout.readline() == "there\n", writer.stderr.read()
        with leanreplay.open(tmp_path / "b") as buffer:
            for balance in (None, "class"):
                with ReplayLoader(buffer, SIZE, prefetch=4, balance=balance) as loader:
                    seen, batches = set(), 0
                    while batches < 400 or len(seen) <= 100:
                        batches += 1
                        (x, y), meta = next(loader)
                        p = meta["position"]
                        assert (x == p[:, None]).all() and torch.equal(y, p % 5) and torch.equal(meta["z"], p + 0.5)
                        assert balance or len(set(p.tolist())) == SIZE
                        seen |= set(p.tolist())
    finally:
        writer.kill()
        writer.communicate(PATIENCE)
    assert writer.returncode == -signal.SIGKILL, "the writer had ended"


@pytest.mark.parametrize("kind", ["window", "infinite"])
def test_reader_of_fewer_rows(kind, tmp_path):
    """Rows that were planned and are no more, after a resize or a rollback in the writer, are drawn anew: no error."""
    buffer = make(kind, "disk", tmp_path, 8)
    state = buffer.state_dict()
    if kind == "window":
        buffer.resize(5000)
    feed(buffer, 5000 if kind == "window" else 200)
    gate = Gate()
    with leanreplay.open(buffer.path) as reader, ReplayLoader(reader, SIZE, prefetch=3, batch_transform=gate) as loader, gate:
        gate.release()
        next(loader)
        if kind == "window":
            buffer.resize(8)
        else:
            buffer.load_state_dict(state)
        gate.release(100)
        for i in range(8):
            (x, y), meta = next(loader)
            assert (x == meta["position"][:, None]).all() and torch.equal(y, meta["position"] % 5)
            assert i < 1 or meta["idx"].max() < 8
    assert not buffer.check()


def test_reader_of_what_stands_still(tmp_path):
    """A reader's batches are the writer's, as long as nothing changes."""
    buffer = make("window", "disk", tmp_path)
    with leanreplay.open(buffer.path) as reader, ReplayLoader(reader, SIZE, seed=3) as loader:
        oracle = Oracle(buffer, SIZE, 2, seed=3)
        assert [plain(b) for b in take(loader, 5)] == [next(oracle) for _ in range(5)]
        with pytest.raises(ModeError):
            feed(reader, 5)
        assert [plain(b) for b in take(loader, 5)] == [next(oracle) for _ in range(5)]


# -- state ---------------------------------------------------------------------------------------------------------------------


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def play(loader, buffer, steps):
    """So many batches of a training loop that adds in between, and where each pass ended."""
    found, ends = [], []
    while len(found) < steps:
        for batch in loader:
            found.append(plain(batch))
            feed(buffer, 4)
            if len(found) == steps:
                break
        else:
            ends.append(len(found))
    return found, ends


@pytest.mark.parametrize("batches", [None, 3])
@pytest.mark.parametrize("balance", [None, "class", "task"])
@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_resume_at_every_position(prefetch, balance, batches):
    """Checkpoint after p batches, train on, come back through torch.load(weights_only=True): the same batches and ends of passes."""
    options = {"prefetch": prefetch, "balance": balance, "batches": batches}
    whole = make()
    with ReplayLoader(whole, SIZE, **options) as loader:
        wanted, ends = play(loader, whole, 10)
    assert len({str(w) for w in wanted}) == 10 and ends == ([] if batches is None else [3, 6, 9])
    for p in range(9):
        buffer = make()
        with ReplayLoader(buffer, SIZE, **options) as loader:
            found, _ = play(loader, buffer, p)
            state = through_a_file({"loader": loader.state_dict(), "buffer": buffer.state_dict()})
            assert len(state["loader"]["ahead"]) <= prefetch
            assert found == wanted[:p]
            assert play(loader, buffer, 2)[0] == wanted[p : p + 2], "taking the state changed what comes"
            again = loader if p % 2 else ReplayLoader(buffer, SIZE, **options)
            if p % 3:
                buffer.load_state_dict(state["buffer"])
                again.load_state_dict(state["loader"])
            else:
                again.load_state_dict(state["loader"])
                buffer.load_state_dict(state["buffer"])
            assert plain(again.state_dict()["ahead"]) == plain(state["loader"]["ahead"])
            rest, later = play(again, buffer, 10 - p)
            again.close()
        assert rest == wanted[p:], p
        # a pass that was over when the state was taken has no end any more
        assert [p + end for end in later] in ([e for e in ends if e > p], [e for e in ends if e >= p]), (p, later)


@pytest.mark.parametrize("kind", ["reservoir", "infinite"])
def test_resume_in_a_new_process(kind, tmp_path):
    """On disk, the buffer opened anew and another prefetch: what was planned comes first, whatever else is asked for."""
    whole = make(kind)
    with ReplayLoader(whole, SIZE, prefetch=3) as loader:
        wanted, _ = play(loader, whole, 9)
    buffer = make(kind, "disk", tmp_path)
    path = buffer.path
    with ReplayLoader(buffer, SIZE, prefetch=3) as loader:
        play(loader, buffer, 4)
        state = through_a_file({"loader": loader.state_dict(), "buffer": buffer.state_dict()})
        play(loader, buffer, 3)
    buffer.close()
    with leanreplay.open(path, "r+") as buffer:
        buffer.load_state_dict(state["buffer"])
        with ReplayLoader(buffer, SIZE, prefetch=3) as loader:
            loader.load_state_dict(state["loader"])
            assert play(loader, buffer, 5)[0] == wanted[4:]
        buffer.load_state_dict(state["buffer"])
        with ReplayLoader(buffer, SIZE, prefetch=1) as loader:
            loader.load_state_dict(state["loader"])
            assert play(loader, buffer, 3)[0] == wanted[4:7]


def test_state_of_bfloat16_and_dicts():
    """What is planned keeps its dtypes and nesting in a state; a transform's random crops are in it as they were made."""
    buffer = SlidingWindowBuffer(20, transform=lambda s: {**s, "crop": s["x"][(k := next(draws) % 4) : k + 3]})
    draws = itertools.count()
    z = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    buffer.add({"x": np.arange(140.0).reshape(20, 7), "t": [z, np.arange(20)]}, metadata={"logits": -z})
    with ReplayLoader(buffer, SIZE, prefetch=3) as loader:
        next(loader)
        finish(loader)
        state = loader.state_dict()
        wanted = [plain(b) for b in take(loader, 3)]
        loader.load_state_dict(through_a_file(state))
        found = take(loader, 3)
        assert [plain(b) for b in found] == wanted
        assert all(b["t"][0].dtype == m["logits"].dtype == torch.bfloat16 and type(b["t"]) is list for b, m in found)


def test_a_state_is_not_changed_by_what_happens_to_batches():
    """Loops write into their batches. That is no concern of a checkpoint, before it is written or after it was loaded."""
    buffer = make()
    with ReplayLoader(buffer, SIZE, prefetch=2) as loader:
        next(loader)
        state = loader.state_dict()
        wanted = plain(state)
        for _ in range(2):
            for (x, y), meta in take(loader, 2):
                for tensor in (x, y, *meta.values()):
                    tensor.zero_()
            assert plain(state) == wanted
            loader.load_state_dict(state)
        assert [plain(b) for b in take(loader, 2)] == wanted["ahead"]


def test_state_with_errors_ahead():
    """A batch that failed is not in the state: it is planned again, as it would have been without."""
    buffer = make()
    oracle = Oracle(make(), SIZE, 3)
    with ReplayLoader(buffer, SIZE, prefetch=3, batch_transform=Fails(3)) as loader:
        assert plain(next(loader)) == next(oracle)
        state = through_a_file(loader.state_dict())
        assert len(state["ahead"]) == 1
        loader.load_state_dict(state)
        for _ in range(5):
            assert plain(next(loader)) == next(oracle)


def test_state_refusals():
    """States that are none are refused, and what was planned stays."""
    buffer, oracle = make(), Oracle(make(), SIZE, 2)
    with ReplayLoader(buffer, SIZE) as loader:
        assert plain(next(loader)) == next(oracle)
        state = loader.state_dict()
        wrong = [
            None, [], {}, {**state, "format": 2}, {**state, "delivered": "1"}, {**state, "delivered": -1}, {**state, "passed": -1},
            {**state, "delivered": 2**80}, {**state, "passed": True}, {**state, "ahead": [5]}, {**state, "ahead": [{}]},
            {**state, "ahead": [()]}, {**state, "ahead": ()}, {**state, "of": None}, buffer.state_dict(),
        ]  # fmt: skip
        feed(buffer, 20)
        for each in wrong:
            with pytest.raises(StateError, match="not a state"):
                loader.load_state_dict(each)
        for name, value in (("batch_size", SIZE + 1), ("balance", "class"), ("seed", 1)):
            with (
                ReplayLoader(buffer, **{"batch_size": SIZE, name: value}) as other,
                pytest.raises(StateError, match=f"{name}: .*, here {value!r}"),
            ):
                other.load_state_dict(state)
        wanted = oracle.ahead
        assert [plain(b) for b in take(loader, 2)] == wanted


def test_passes():
    """`batches` is what one loop gets; a loop that was broken off leaves the rest to the next; beyond the end only a new loop starts."""
    buffer, oracle = make(), Oracle(make(), SIZE, 2, batches=3)
    with ReplayLoader(buffer, SIZE, batches=3) as loader:
        found = [plain(b) for b in loader]
        assert len(found) == 3
        for _ in range(2):
            with pytest.raises(StopIteration):
                next(loader)
        for batch in loader:
            found.append(plain(batch))
            break
        found += [plain(b) for b in loader]
        assert len(found) == 6
        feed(buffer, 20)
        wanted = [next(oracle) for _ in range(6)]
        feed(oracle.buffer, 20)
        wanted += [next(oracle) for _ in range(3)]  # nothing of a new pass was planned before
        assert found + [plain(b) for b in loader] == wanted


# -- tensors ---------------------------------------------------------------------------------------------------------------------


def test_tensors():
    """Nested samples, every kind of leaf, metadata, on the CPU and pinned where there is no CUDA: as leanreplay.torch.sample gives them."""
    n = 30
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    z[0], z[1] = float("nan"), float("inf")
    leaves = {"x": np.arange(n * 3.0).reshape(n, 3), "more": (np.arange(n) % 2 == 0, [np.arange(n).astype("u1"), z])}
    leaves["words"] = np.array([b"ab", b"c"] * 15, "S3")
    buffer = SlidingWindowBuffer(n)
    buffer.add(leaves, metadata={"logits": 2 * z, "c": np.arange(n) * 1j})
    oracle = Oracle(buffer, n)
    wanted = next(oracle)
    for options in ({}, {"device": "cpu"}, {"device": torch.device("cpu"), "pin_memory": True}, {"pin_memory": True}):
        with ReplayLoader(buffer, n, **options) as loader:
            got, meta = next(loader)
        assert plain((got, meta)) == wanted
        assert type(got["more"]) is tuple and type(got["more"][1]) is list and isinstance(got["words"], np.ndarray)
        assert got["more"][0].dtype == torch.bool and got["more"][1][0].dtype == torch.uint8 and got["x"].dtype == torch.float64
        assert got["more"][1][1].dtype == meta["logits"].dtype == torch.bfloat16 and meta["c"].dtype == torch.complex128
        assert torch.equal(got["more"][1][1].view(torch.int16), z[meta["idx"]].view(torch.int16))
        assert torch.equal(meta["logits"].view(torch.int16), (2 * z)[meta["idx"]].view(torch.int16))


def test_tensors_of_a_batch_are_its_own():
    """Batches may be written into; they share no memory with each other or with the buffer."""
    buffer, oracle = make(), Oracle(make(), SIZE, 4)
    with ReplayLoader(buffer, SIZE, prefetch=4) as loader:
        for _ in range(8):
            (x, y), meta = next(loader)
            assert plain(((x, y), meta)) == next(oracle)
            for tensor in (x, y, *meta.values()):
                tensor.fill_(-1)
    assert not buffer.check()


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def test_device():
    """Every tensor is moved, metadata and what a batch_transform made too."""
    buffer = make()
    with ReplayLoader(buffer, SIZE, device="meta", batch_transform=lambda b: {"pair": b, "n": torch.ones(2), "s": "text"}) as loader:
        batch, meta = next(loader)
    assert {t.device.type for t in (*batch["pair"], batch["n"], *meta.values())} == {"meta"} and batch["s"] == "text"
    with ReplayLoader(buffer, SIZE, device="meta", batch_transform=lambda b: Pair(*b)) as loader:
        (batch, _) = next(loader)
    assert type(batch) is Pair and {batch.x.device.type, batch.y.device.type} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("pin", [False, True])
def test_cuda(pin):
    """On the GPU, pinned on the way or not; the state is on the CPU, and goes back."""
    buffer, oracle = make(), Oracle(make(), SIZE, 3)
    with ReplayLoader(buffer, SIZE, prefetch=3, device="cuda", pin_memory=pin) as loader:
        for _ in range(20):
            got, meta = next(loader)
            assert {t.device.type for t in (*got, *meta.values())} == {"cuda"}
            assert plain((tuple(t.cpu() for t in got), {k: t.cpu() for k, t in meta.items()})) == next(oracle)
            feed(buffer, 9)
            feed(oracle.buffer, 9)
        state = through_a_file(loader.state_dict())
        assert state["ahead"][0][0][0].device.type == "cpu"
        loader.load_state_dict(state)
        got, _ = next(loader)
        assert got[0].device.type == "cuda"
    with ReplayLoader(buffer, SIZE, pin_memory=True) as loader:
        assert next(loader)[0][0].is_pinned()


def test_transforms_per_sample():
    """The buffer's transforms get one sample each, in the background, once per sample: crops differ within a batch. batch_transform then
    gets the batch, without metadata.
    """
    calls, names, batches = itertools.count(), set(), []

    def crop(x):
        names.add(threading.current_thread().name)
        assert x.shape == (8,) and isinstance(x, torch.Tensor)
        k = (next(calls) * 7) % 5
        return x[k : k + 4]

    buffer = SlidingWindowBuffer(30, transform=crop, target_transform=lambda y: int(y) + 100)
    buffer.add((np.arange(30)[:, None] * 100 + np.arange(8.0), np.arange(30)))
    with ReplayLoader(buffer, 10, batch_transform=lambda b: batches.append(b) or (b[0] * 2, b[1])) as loader:
        for i in range(4):
            (x, y), meta = next(loader)
            assert torch.equal(y, meta["position"] + 100) and isinstance(y, torch.Tensor)
            starts = x[:, 0] / 2 - 100 * meta["position"]
            assert torch.equal(x / 2, 100 * meta["position"][:, None] + starts[:, None] + torch.arange(4))
            assert len(set(starts.tolist())) == 5
            assert torch.equal(batches[i][0] * 2, x) and len(batches[i]) == 2
        finish(loader)
        assert next(calls) == 10 * (4 + loader.prefetch) and names == {"leanreplay-loader"}


# -- MixedLoader -------------------------------------------------------------------------------------------------------------------


def stream(n, size=4, start=1000):
    return [tuple(map(torch.from_numpy, samples(start + size * i, size))) for i in range(n)]


def test_mixed():
    """First the stream's samples as they are, then those that the buffer draws at that moment; is_replay and meta tell which they are."""
    buffer, twin = (SlidingWindowBuffer(30, seed=2) for _ in range(2))
    for b in (buffer, twin):
        b.add(samples(0, 30), metadata={"z": np.arange(30.0)})
    loader = MixedLoader(stream(6), buffer, 8)
    assert len(loader) == 6
    for (x, y, is_replay, meta), (a, b) in zip(loader, stream(6), strict=True):
        (c, d), wanted = leanreplay.torch.sample(twin, 8)
        assert plain([x, y, meta]) == plain([torch.cat([a, c]), torch.cat([b, d]), wanted]) and sorted(meta) == ["idx", "position", "z"]
        assert is_replay.dtype == torch.bool and is_replay.tolist() == [False] * 4 + [True] * 8
        for target in (buffer, twin):
            target.add((x[~is_replay], y[~is_replay]), metadata={"z": y[~is_replay].double()})
    assert buffer.seen == 54


def test_mixed_while_the_buffer_fills():
    """Nothing, then as many as there are, then what was asked for; a sample is not replayed in the batch that it comes with."""
    buffer, counts = ReservoirBuffer(50), []
    for x, y, is_replay, meta in MixedLoader(stream(6, start=0), buffer, 10):
        counts.append(int(is_replay.sum()))
        assert x.shape == (4 + counts[-1], 5) and y.shape == is_replay.shape == (4 + counts[-1],) and torch.equal(x[:, 0].long(), y)
        assert len(set(y.tolist())) == len(y) and meta.get("position", torch.zeros(0)).shape == (counts[-1],)
        assert (meta == {}) == (counts[-1] == 0)
        buffer.add((x[~is_replay], y[~is_replay]))
    assert counts == [0, 4, 8, 10, 10, 10]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=needs_fork)])
def test_mixed_with_a_data_loader(workers):
    """A DataLoader of TensorDataset as stream (its batches are lists), with workers, and epoch after epoch."""
    x, y = samples(1000, 24)
    context = {"multiprocessing_context": "fork"} if workers else {}
    data = DataLoader(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), 8, num_workers=workers, **context)
    buffer = ReservoirBuffer(40)
    buffer.add(samples(0, 40))
    mixed = MixedLoader(data, buffer, 5)
    assert len(mixed) == 3
    for _ in range(2):
        got = []
        for a, b, is_replay, meta in mixed:
            assert torch.equal(a[:, 0].long(), b) and torch.equal(b[is_replay], meta["position"])
            got += b[~is_replay].tolist()
        assert got == y.tolist()


def test_mixed_of_lists_and_arrays():
    """Arrays in the stream become tensors; a buffer of what a DataLoader gives, which are lists, will do as well."""
    buffer = ReservoirBuffer(40)
    buffer.add(list(samples(0, 40)))
    for x, y, is_replay, meta in MixedLoader([samples(1000, 3), list(samples(1003, 3))], buffer, 2, device="cpu"):
        assert isinstance(x, torch.Tensor) and torch.equal(x[:, 0].long(), y) and torch.equal(y[is_replay], meta["position"])
        assert is_replay.tolist() == [False] * 3 + [True] * 2


def test_mixed_refusals():
    """Streams and buffers that do not fit, with errors of our own."""
    x, y = samples(0, 10)
    buffer, single = ReservoirBuffer(40), ReservoirBuffer(40)
    buffer.add((x, y))
    single.add(x)
    for arguments in (([], [1], 3), ([], buffer, 0), ([], buffer, None), ([], buffer, 1.5)):
        with pytest.raises(ArgumentError):
            MixedLoader(*arguments)
    pairs = [({"x": x}, y), (x, ["a"] * 10), (x[:, :3], y), (x, y[:4]), (x, y[:, None]), (x[0, 0], y[0])]
    for wrong in (x, (x, y, y), {"x": x, "y": y}, *pairs):
        with pytest.raises(LeanReplayError):
            list(MixedLoader([wrong], buffer, 4))
    with pytest.raises(ArgumentError, match="pairs"):
        list(MixedLoader([(x, y)], single, 4))
    for wrong in ((x.astype(np.float16), y), (x, y.astype(np.int16))):
        with pytest.raises(ArgumentError, match="differ in dtype"):
            list(MixedLoader([wrong], buffer, 4))


def test_mixed_device():
    """Everything on the device."""
    buffer = ReservoirBuffer(40)
    buffer.add(samples(0, 40))
    for x, y, is_replay, meta in MixedLoader(stream(2), buffer, 3, device="meta"):
        assert {t.device.type for t in (x, y, is_replay, *meta.values())} == {"meta"} and x.shape == (7, 5)


def test_a_thread_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more threads: an error of the library that names the limit, and the same loader goes on once there are."""

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with ReservoirBuffer(10) as buffer:
        buffer.add(np.arange(20))
        with ReplayLoader(buffer, 4) as loader:
            with monkeypatch.context() as patched:
                patched.setattr(threading.Thread, "start", start)
                with pytest.raises(WorkerError, match="ulimit -u"):
                    next(iter(loader))
            assert next(iter(loader))[0].shape == (4,)
