"""ReplayLoader: which batches come, with what in them, whatever the background does meanwhile."""

from __future__ import annotations

import itertools
import random
import threading
import time
import warnings
from typing import NamedTuple

import numpy as np
import pytest
from loaders import KINDS, PATIENCE, SIZE, Gate, Oracle, balanced_oracle, feed, finish, make, metadata, plain, samples, through_a_file

from leanreplay import (
    CapacityWarning,
    InfiniteBuffer,
    SlidingWindowBuffer,
    WeightedReservoirBuffer,
)
from leanreplay.torch import ReplayLoader

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("kernels", "nothing_left")


# -- what a batch holds ------------------------------------------------------------------------------------------------


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
        read = buffer.current.store.read
        buffer.current.store.read = lambda *a, read=read, reads=reads: reads.append(1) or read(*a)
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
                for size in range(start - 1, start - 10, -1):
                    buffer.resize(size)
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
        before = buffer.current.store.sequence
        buffer.load_state_dict(state)
        for i in range(100):
            if buffer.current.store.sequence >= before:
                break
            buffer.set_metadata("z", np.arange(8.0) + i)
        assert buffer.current.store.sequence == before
        next(loader)
        assert next(loader)[1]["idx"].max() < 8


# -- tensors -----------------------------------------------------------------------------------------------------------


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
