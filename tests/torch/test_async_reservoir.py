"""AsyncReservoir: what an epoch takes in, and how workers make it."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
import weakref
from concurrent.futures import wait

import numpy as np
import pytest
from async_jobs import METHODS, PATIENCE, Again, Paths, identity, processes, settle, threads
from torch.utils.data import BatchSampler, RandomSampler

from leanreplay import ArgumentError, WorkerError
from leanreplay.torch import AsyncReservoir
from leanreplay.torch.loading.async_reservoir import worker
from leanreplay.torch.loading.async_reservoir.jobs import Jobs

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif("fork" not in METHODS, reason="needs fork")


# -- epochs ------------------------------------------------------------------------------------------------------------


def test_an_epoch_takes_in_what_is_ready_and_queues_as_much():
    """Without waiting, once the minimum is there; the oldest entries leave first."""
    with threads(range(100), most=6, min_reservoir_samples=3, workers=2, max_jobs_at_once=2) as reservoir:
        assert sorted(reservoir) == [0, 1, 2]
        seen = []
        for _ in range(4):
            settle(reservoir)
            seen.append(sorted(reservoir))
        assert seen == [[0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8], [5, 6, 7, 8, 9, 10]]
        assert len(reservoir.queued()) == 2


def test_only_what_is_ready():
    """A job that is not done is neither waited for nor lost."""
    gates = [threading.Event() for _ in range(5)]
    gates[0].set()

    def load(i):
        assert gates[i].wait(PATIENCE)
        return i

    with threads(range(5), load, workers=2) as reservoir:
        assert list(reservoir) == [0]
        gates[2].set()
        assert not wait([f for f, (_, s) in reservoir._intake.jobs.pending.items() if s == 2], PATIENCE).not_done
        assert list(reservoir) == [0, 2]
        assert list(reservoir) == [0, 2]
        for gate in gates:
            gate.set()
        settle(reservoir)
        assert sorted(reservoir) == [0, 1, 2, 3]


@pytest.mark.parametrize(("workers", "most", "begun"), [(3, None, 3), (1, 4, 4), (2, 1, 1), (1, 0, 20)])
def test_max_jobs_at_once(workers, most, begun):
    """None: the number of workers. 0: the source to its end, and not once more before all of it is taken in."""
    source = Again(20)
    with threads(source, most=50, workers=workers, max_jobs_at_once=most, max_reservoir_replacement_size=1) as reservoir:
        next(iter(reservoir))
        outstanding = len(reservoir.queued())
        assert reservoir._intake.jobs.count == begun + (0 if most == 0 else 1)
        assert outstanding == begun - (1 if most == 0 else 0)
        if most == 0:
            for _ in range(19):
                settle(reservoir)
                assert source.passes == 1
                list(reservoir)
            list(reservoir)
            assert reservoir._intake.jobs.count == 40


def test_the_source_starts_over():
    with threads(Paths(3), lambda s: s["uid"], most=8, min_reservoir_samples=8, deterministic=True) as reservoir:
        assert list(reservoir) == [0, 1, 2, 0, 1, 2, 0, 1]
    source = Again(3)
    with threads(source, most=8, min_reservoir_samples=8, deterministic=True) as reservoir:
        assert list(reservoir) == [0, 1, 2, 0, 1, 2, 0, 1]
        assert source.passes == 3


def test_max_reservoir_replacement_size():
    """At most so many are taken in, however many are ready; those left over come later."""
    options = {"min_reservoir_samples": 10, "max_jobs_at_once": 30, "max_reservoir_replacement_size": 3}
    with threads(range(1000), most=10, **options) as reservoir:
        before = list(reservoir)
        for _ in range(10):
            settle(reservoir)
            now = list(reservoir)
            assert now[:7] == before[3:]
            assert now[7:] == [now[6] + 1, now[6] + 2, now[6] + 3]
            before = now


def test_replacement_also_limits_parts_of_a_list():
    options = {"flatten": True, "min_reservoir_samples": 4, "max_reservoir_replacement_size": 3, "deterministic": True}
    with threads([0, 10, 20, 30], lambda i: [i + k for k in range(5)], most=6, **options) as reservoir:
        assert list(reservoir) == [0, 1, 2, 3]
        assert list(reservoir) == [1, 2, 3, 4, 10, 11]
        assert list(reservoir) == [4, 10, 11, 12, 13, 14]


def test_flatten():
    """A list is one entry, unless `flatten`; a tuple always is."""
    with threads(["ab"], list, min_reservoir_samples=2) as reservoir:
        assert list(reservoir) == [["a", "b"], ["a", "b"]]
    with threads(["ab"], list, min_reservoir_samples=2, flatten=True) as reservoir:
        assert list(reservoir) == ["a", "b"]
    with threads(["ab"], tuple, flatten=True) as reservoir:
        assert list(reservoir) == [("a", "b")]


def test_waiting_blocks(monkeypatch):
    """A wait of a second is one call, not many."""
    calls = []
    next_done = Jobs.next_done
    monkeypatch.setattr(Jobs, "next_done", lambda self, wait: calls.append(wait) or next_done(self, wait))
    for deterministic in (False, True):
        calls.clear()
        with threads(range(3), lambda i: time.sleep(1), deterministic=deterministic) as reservoir:
            assert list(reservoir) == [None]
        assert calls[0] and not any(calls[1:])


@pytest.mark.parametrize("deterministic", [False, True])
def test_what_has_left_is_forgotten(deterministic):
    """Memory does not grow with what was ever loaded."""
    jobs = weakref.WeakSet()
    with threads(range(99), most=3, deterministic=deterministic, max_jobs_at_once=2) as reservoir:
        for _ in range(20):
            list(reservoir)
            settle(reservoir)
            jobs.update(reservoir._intake.jobs.pending)
        gc.collect()
        assert reservoir._intake.jobs.count > 20
        assert set(jobs) == set(reservoir._intake.jobs.pending), "jobs, with their results, that were taken in long ago"


def test_breaking_off_loses_nothing():
    with threads(range(100), most=5, min_reservoir_samples=5, deterministic=True) as reservoir:
        for entry in reservoir:
            assert entry == 0
            break
        assert reservoir.reservoir_size() == 5
        assert list(reservoir) == [1, 2, 3, 4, 5]


def test_epochs_side_by_side():
    """Each iterates a snapshot of its own."""
    with threads(range(100), most=3, min_reservoir_samples=3, deterministic=True) as reservoir:
        first, second = iter(reservoir), iter(reservoir)
        assert list(zip(first, second, strict=True)) == [(0, 1), (1, 2), (2, 3)]


def test_a_sampler_is_made_anew():
    made = []

    def sampler(snapshot):
        made.append(len(snapshot))
        return [[1, 0], (0,), torch.tensor([1]), np.array([0, 1]), 1, torch.tensor(0), np.int64(1), -1]

    with threads(range(9), most=3, min_reservoir_samples=2, deterministic=True, sampler=sampler) as reservoir:
        assert list(reservoir) == [[0 + 1, 0], [0], [1], [0, 1], 1, 0, 1, 1]
        assert list(reservoir)[:2] == [[1, 0], [0]]
        assert made == [2, 3]


def test_a_sampler_gets_a_seeded_generator_and_the_epoch():
    """Torch's own samplers are reproducible without the global generator, and each epoch has an order of its own."""
    orders = []
    for seed in (0, 0, 1):
        state = torch.get_rng_state()
        with threads(range(30), most=30, min_reservoir_samples=30, deterministic=True, sampler=RandomSampler, seed=seed) as reservoir:
            orders.append([list(reservoir), list(reservoir)])
        assert torch.equal(state, torch.get_rng_state())
    assert sorted(orders[0][0]) == list(range(30))
    assert orders[0] == orders[1]
    assert orders[0][0] != orders[2][0]
    assert orders[0][0] != [(i - 1) % 30 for i in orders[0][1]]  # in the second epoch 0 has been loaded anew, and is the last
    assert orders[0][0] != sorted(orders[0][0])

    class Epochs(list):
        def set_epoch(self, epoch):
            self[:] = [epoch]

    with threads(range(5), most=3, min_reservoir_samples=3, deterministic=True, sampler=Epochs) as reservoir:
        assert [list(reservoir) for _ in range(3)] == [[0], [2], [4]]


def test_collate_fn():
    source = [np.full(2, i, np.float32) for i in range(9)]
    batches = {"sampler": lambda s, generator: BatchSampler(range(len(s)), 2, False), "min_reservoir_samples": 3, "deterministic": True}
    with threads(source, most=3, collate_fn="default", min_reservoir_samples=3) as reservoir:
        entries = list(reservoir)
        assert [type(e) for e in entries] == [torch.Tensor] * 3
        assert entries[1].tolist() == [1, 1]
    with threads(source, most=3, collate_fn="default", **batches) as reservoir:
        assert [b.tolist() for b in reservoir] == [[[0, 0], [1, 1]], [[2, 2]]]
    with threads(source, most=3, **batches) as reservoir:
        found = list(reservoir)
        assert [type(b) for b in found] == [list, list]
        assert type(found[0][0]) is np.ndarray and np.array_equal(found[0][0], source[0])
    with threads(source, most=3, collate_fn=len, **batches) as reservoir:
        assert list(reservoir) == [2, 1]
    assert AsyncReservoir(source, identity, 3).collate_fn == "default"


def test_maximum_number_of_samples_per_epoch():
    options = {"min_reservoir_samples": 6, "deterministic": True, "maximum_number_of_samples_per_epoch": 5}
    with threads(range(9), most=6, **options) as reservoir:
        assert [len(list(reservoir)) for _ in range(3)] == [5, 5, 5]
    with threads(range(9), most=6, sampler=lambda s: BatchSampler(range(6), 2, False), **options) as reservoir:
        assert list(reservoir) == [[0, 1], [2, 3], [4]]
    with threads(range(9), most=6, sampler=lambda s: BatchSampler(range(5), 5, False), **options) as reservoir:
        assert list(reservoir) == [[0, 1, 2, 3, 4]]


# -- workers -----------------------------------------------------------------------------------------------------------


def slow_square(i):
    time.sleep(0.002 * (i * 7919 % 5))
    return {"i": i, "square": torch.full((2,), i * i), "pid": os.getpid()}


@pytest.mark.parametrize(("method", "workers"), [("fork", 1), ("fork", 4), ("spawn", 1), ("forkserver", 4)])
def test_processes(method, workers):
    """Several epochs, with everything loaded elsewhere, each sample once a pass."""
    with AsyncReservoir(range(40), slow_square, 20, workers=workers, mp_context=method, max_jobs_at_once=8) as reservoir:
        taken = {}
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            for entry in reservoir:
                i = entry["i"]
                assert torch.equal(entry["square"], torch.full((2,), i * i))
                taken.setdefault(i, set()).add(entry["pid"])
            pids = set().union(*taken.values())
            if len(taken) == 40 and (workers == 1 or len(pids) > 1):
                break
            time.sleep(0.01)
        assert sorted(taken) == list(range(40))
        assert os.getpid() not in pids
        assert 1 <= len(pids) <= workers
        if workers == 4:
            assert len(pids) > 1


def test_a_closure_goes_to_forked_workers_and_to_threads():
    lock = threading.Lock()  # which cannot be pickled

    def load(i):
        with lock:
            return -i

    for make in (threads, processes):
        with make(range(5), load, min_reservoir_samples=5, deterministic=True) as reservoir:
            assert list(reservoir) == [0, -1, -2, -3, -4]


def test_what_cannot_be_sent_is_an_error_that_says_so():
    with (
        processes(range(3), lambda i: i, mp_context="forkserver") as reservoir,
        pytest.raises(ArgumentError, match=r"the function cannot be sent to a worker process.*executor='thread'"),
    ):
        iter(reservoir)
    with processes([threading.Lock()]) as reservoir, pytest.raises(ArgumentError, match=r"the sample <unlocked.*cannot be sent"):
        iter(reservoir)
    with processes([3], lambda i: threading.Lock()) as reservoir, pytest.raises(WorkerError, match=r"(?s)the sample 3 .*cannot pickle"):
        iter(reservoir)


def draws(i):
    return random.random(), float(np.random.random()), float(torch.rand(()))


def test_each_job_has_its_own_seed():
    """Forked workers would otherwise all draw the same, and which draws a sample gets would depend on the worker."""
    found = []
    for workers, seed in ((1, 0), (4, 0), (1, 1)):
        options = {"workers": workers, "max_jobs_at_once": 4, "min_reservoir_samples": 20, "deterministic": True}
        with processes(range(20), draws, most=20, seed=seed, **options) as reservoir:
            found.append(list(reservoir))
    assert found[0] == found[1]
    for k in range(3):
        assert len({d[k] for d in found[0] + found[2]}) == 40


def jittered(i):
    time.sleep(int.from_bytes(os.urandom(1), "little") / 255 * 0.01)
    return i if i % 7 else [i, i + 0.5]


@pytest.mark.parametrize("make", [threads, processes])
def test_deterministic(make):
    """The same batches whatever the speed of workers and of training, jobs that fail included."""

    def load(i):
        if i % 5 == 3:
            raise ValueError(i)
        return jittered(i)

    found = []
    for workers in (1, 3, 3):
        options = {"workers": workers, "max_jobs_at_once": 5, "min_reservoir_samples": 4, "max_reservoir_replacement_size": 4}
        with make(range(23), load, most=9, deterministic=True, flatten=True, on_error="skip", **options) as reservoir:
            found.append([])
            for epoch in range(12):
                found[-1].append(list(reservoir))
                time.sleep(0.01 * (epoch % workers))
    assert found[0] == found[1] == found[2]
    assert len({str(e) for e in found[0]}) == 12
    assert {0, 0.5} < set(found[0][0])


def test_tensors_hold_no_descriptors():
    """Thousands of loaded tensors must not exhaust the descriptors, as those that multiprocessing shares would."""
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with processes(range(50), lambda i: torch.zeros(1000), most=50, min_reservoir_samples=50) as reservoir:
        held = list(reservoir)
        assert len(held) == 50
        if before:
            assert len(os.listdir("/proc/self/fd")) < before + 25


TENSORS = {
    "plain": lambda: torch.arange(6.0).reshape(2, 3),
    "number": lambda: torch.tensor(3),
    "bool": lambda: torch.tensor([True, False]),
    "empty": lambda: torch.zeros(0, 3),
    "strided": lambda: torch.arange(12).reshape(3, 4).t()[::2],
    "expanded": lambda: torch.tensor([1, 2]).expand(3, 2),
    "bfloat16": lambda: torch.arange(4).to(torch.bfloat16),
    "complex": lambda: torch.tensor([1 + 2j]),
    "conjugate": lambda: torch.tensor([1 + 2j]).conj(),
    "gradient": lambda: torch.ones(3, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.ones(3)),
    "sparse": lambda: torch.eye(3).to_sparse(),
}


def make_tensor(name):
    return TENSORS[name]()


def test_tensors_of_every_kind_come_back_as_they_were():
    with processes(list(TENSORS), make_tensor, most=20, min_reservoir_samples=len(TENSORS), deterministic=True) as reservoir:
        found = dict(zip(TENSORS, reservoir, strict=True))
    for name, tensor in found.items():
        wanted = make_tensor(name)
        assert type(tensor) is type(wanted)
        assert (tensor.dtype, tensor.shape, tensor.layout, tensor.requires_grad) == (
            wanted.dtype, wanted.shape, wanted.layout, wanted.requires_grad,
        )  # fmt: skip
        assert torch.equal(tensor.to_dense(), wanted.to_dense())
    found["plain"].add_(1)  # and can be written to, without a warning


def test_a_view_is_sent_without_the_rest():
    assert len(worker.dumps(torch.zeros(1_000_000)[:10])) < 1000


def test_performance():
    with threads(range(9), min_reservoir_samples=4, deterministic=True) as reservoir:
        assert reservoir.performance["waiting"] == {"seconds": 0.0, "count": 0, "average": 0.0}
        list(reservoir)
        found = reservoir.performance
    assert {name: v["count"] for name, v in found.items()} == {"sending": 5, "receiving": 4, "waiting": 4}
    for part in found.values():
        assert part["seconds"] > 0
        assert part["average"] == part["seconds"] / part["count"]


def test_performance_counts_the_wait(monkeypatch):
    """The job ends 0.2 seconds after somebody waits for it."""
    waiting, next_done = threading.Event(), Jobs.next_done
    monkeypatch.setattr(Jobs, "next_done", lambda self, wait: waiting.set() or next_done(self, wait))
    with threads(range(9), lambda i: waiting.wait(PATIENCE) and time.sleep(0.2)) as reservoir:
        list(reservoir)
        assert reservoir.performance["waiting"]["seconds"] > 0.15
