"""AsyncReservoir: what an epoch takes in, what fails, what is left behind, and that none of it depends on the workers' speed."""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import logging
import multiprocessing
import os
import random
import signal
import struct
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import wait
from multiprocessing.synchronize import SemLock

import numpy as np
import pytest
from interpreter import Script

torch = pytest.importorskip("torch")

from torch.utils.data import BatchSampler, Dataset, RandomSampler  # noqa: E402

from leanreplay import ArgumentError, ModeError, ReservoirBuffer, SlidingWindowBuffer, StateError, WorkerError  # noqa: E402
from leanreplay.torch import AsyncReservoir  # noqa: E402
from leanreplay.torch.loading.async_reservoir import pool, worker  # noqa: E402
from leanreplay.torch.loading.async_reservoir import reservoir as module  # noqa: E402
from leanreplay.torch.loading.async_reservoir.jobs import Jobs  # noqa: E402

# A fork server hands over what a spawned process would be sent, but has torch imported already.
METHODS = [m for m in ("fork", "forkserver") if m in multiprocessing.get_all_start_methods()]
pytestmark = pytest.mark.skipif("fork" not in METHODS, reason="needs fork")
PATIENCE = 120  # seconds: no test waits so long unless it is wrong


def identity(sample):
    return sample


def threads(source, function=identity, most=10, **options):
    """A reservoir whose items are what the function returned, loaded by threads."""
    return AsyncReservoir(source, function, most, **{"executor": "thread", "collate_fn": None, **options})


def processes(source, function=identity, most=10, **options):
    return AsyncReservoir(source, function, most, **{"mp_context": "fork", "collate_fn": None, **options})


def settle(reservoir):
    """Wait until every job that was begun is done, and no longer held by its worker."""
    assert not wait(list(reservoir._jobs.pending), PATIENCE).not_done


class Paths(Dataset):
    """Map-style, and without an end that __getitem__ would know."""

    def __init__(self, n):
        self.n = n
        self.closed = 0

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return {"uid": i}

    def close(self):
        self.closed += 1


class Again:
    """Can be iterated again and again; says how often it was."""

    def __init__(self, n):
        self.n, self.passes = n, 0

    def __iter__(self):
        self.passes += 1
        yield from range(self.n)


# -- epochs ----------------------------------------------------------------------------------------------------------


def test_an_epoch_takes_in_what_is_ready_and_queues_as_much():
    """Without waiting, once the minimum is there; the oldest entries leave first."""
    with threads(range(100), most=6, min_reservoir_samples=3, workers=2, max_jobs_at_once=2) as reservoir:
        assert sorted(reservoir) == [0, 1, 2]
        seen = []
        for _ in range(4):
            settle(reservoir)
            seen.append(sorted(reservoir))
        assert seen == [[0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8], [5, 6, 7, 8, 9, 10]]
        assert len(reservoir._jobs.pending) == 2


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
        assert not wait([f for f, (_, s) in reservoir._jobs.pending.items() if s == 2], PATIENCE).not_done
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
        outstanding = len(reservoir._jobs.pending)
        assert reservoir._jobs.count == begun + (0 if most == 0 else 1)
        assert outstanding == begun - (1 if most == 0 else 0)
        if most == 0:
            for _ in range(19):
                settle(reservoir)
                assert source.passes == 1
                list(reservoir)
            list(reservoir)
            assert reservoir._jobs.count == 40


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
            jobs.update(reservoir._jobs.pending)
        gc.collect()
        assert reservoir._jobs.count > 20
        assert set(jobs) == set(reservoir._jobs.pending), "jobs, with their results, that were taken in long ago"


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


# -- workers ---------------------------------------------------------------------------------------------------------


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


# -- errors ----------------------------------------------------------------------------------------------------------


class Odd(Exception):
    """Pickles, but does not unpickle."""

    def __init__(self, a, b):
        super().__init__(f"odd {a} {b}")


def fails(i):
    if i == 2:
        raise KeyError("no such volume")
    if i == 5:
        raise Odd(1, 2)
    if i == 7:
        sys.exit("not so fast")
    return i


@pytest.mark.parametrize("make", [threads, processes])
def test_a_failing_job_raises(make):
    """With the sample, the worker's traceback and the cause; and one can go on."""
    with make(range(10), fails, min_reservoir_samples=3, deterministic=True) as reservoir:
        with pytest.raises(WorkerError, match=r"(?s)the sample 2 .*in fails\n.*no such volume.*on_error='skip'") as caught:
            iter(reservoir)
        assert caught.value.sample == 2
        assert isinstance(caught.value.__cause__, KeyError)
        assert list(reservoir) == [0, 1, 3]
        with pytest.raises(WorkerError, match=r"(?s)the sample 5 .*odd 1 2") as caught:
            for _ in range(5):
                list(reservoir)
        assert make is processes or isinstance(caught.value.__cause__, Odd)
        with pytest.raises(WorkerError, match=r"(?s)the sample 7 .*not so fast"):
            for _ in range(5):
                list(reservoir)


@pytest.mark.parametrize("make", [threads, processes])
def test_a_failing_job_is_skipped(make, caplog):
    with (
        caplog.at_level(logging.WARNING, "leanreplay"),
        make(range(9), fails, min_reservoir_samples=8, deterministic=True, on_error="skip") as reservoir,
    ):
        assert list(reservoir) == [0, 1, 3, 4, 6, 8, 0, 1]
        assert reservoir.skipped == 3
    text = [record.getMessage() for record in caplog.records]
    assert len(text) == 3
    assert "the sample 2 failed" in text[0]
    assert "no such volume" in text[0]
    assert "in fails" in text[0]


def test_one_good_sample_is_enough():
    def load(i):
        if i != 8:
            raise ValueError(i)
        return i

    with threads(range(9), load, min_reservoir_samples=4, on_error="skip", workers=3) as reservoir:
        assert list(reservoir) == [8] * 4
        assert reservoir.skipped >= 27


@pytest.mark.parametrize("source", [range(7), Again(7)])
def test_if_every_job_fails_it_ends(source):
    """After one pass, for a source that has a length; after that pass or a few more jobs where it must be found out."""

    def load(i):
        raise ValueError("the disk is gone")

    with threads(source, load, on_error="skip") as reservoir:
        with pytest.raises(WorkerError, match=r"(?s)none of the last \d+ jobs, a whole pass.*the disk is gone"):
            iter(reservoir)
        assert 7 <= reservoir.skipped <= 9
        with pytest.raises(WorkerError, match=r"none of the last (7|8|9) jobs"):
            iter(reservoir)
        assert reservoir.skipped >= 14


def test_an_endless_source_of_failures_ends(monkeypatch):
    monkeypatch.setattr(module, "ENDLESS", 30)

    class Endless:
        def __iter__(self):
            while True:
                yield 1

    text = r"(?s)none of the last 30 jobs.*ZeroDivisionError"
    with threads(Endless(), lambda i: 1 // 0, on_error="skip") as reservoir, pytest.raises(WorkerError, match=text):
        iter(reservoir)


def test_empty_lists_for_ever_are_an_error():
    with threads(range(4), lambda i: [], flatten=True) as reservoir, pytest.raises(WorkerError, match="none of the last 4 jobs"):
        iter(reservoir)


def test_a_source_that_fails_or_runs_dry():
    class Dry(Again):
        def __iter__(self):
            self.passes += 1
            yield from range(3 if self.passes == 1 else 0)

    with threads(Dry(3), min_reservoir_samples=5) as reservoir, pytest.raises(ArgumentError, match=r"source is empty.*start over"):
        iter(reservoir)

    class Bad(Paths):
        def __getitem__(self, i):
            if i == 2:
                raise OSError("gone")
            return i

    with threads(Bad(3), min_reservoir_samples=5) as reservoir:
        with pytest.raises(OSError, match="gone"):
            iter(reservoir)
        assert not reservoir._jobs.pending


def dies(i):
    if i == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return i


def dies_sending(i):
    """Ends in the middle of sending its result: the length of a message, and not all of it."""
    if i == 2:
        frame = sys._getframe()
        while "pipe" not in frame.f_locals:
            frame = frame.f_back
        os.write(frame.f_locals["pipe"].fileno(), struct.pack("!i", 300_000) + b"a part")
        os.kill(os.getpid(), signal.SIGKILL)
    return i


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("load", [dies, dies_sending])
def test_a_killed_worker_is_noticed(load, deterministic, workers, monkeypatch):
    """Also by on_error="skip", and also where the pool itself would wait for ever; then one can go on."""
    monkeypatch.setattr(pool, "PATIENCE", 0.3)
    options = {"min_reservoir_samples": 3, "workers": workers, "deterministic": deterministic, "on_error": "skip"}
    with processes(range(6), load, **options) as reservoir:
        with pytest.raises(WorkerError, match=r"a worker ended unexpectedly \(SIGKILL\)"):
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until:
                iter(reservoir)
                time.sleep(0.001)
        nothing_left()
        assert len(list(reservoir)) >= 3


def test_an_idle_worker_that_is_killed_is_noticed():
    with processes(range(50)) as reservoir:
        list(reservoir)
        settle(reservoir)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        with pytest.raises(WorkerError, match="SIGKILL"):
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until:
                list(reservoir)
                time.sleep(0.001)
        assert list(reservoir)


def test_a_function_that_a_worker_cannot_load():
    class Unloadable:
        def __reduce__(self):
            return importlib.import_module, ("no_such_module",)

        def __call__(self, sample):
            return sample

    text = r"(?s)the sample 0 .*no_such_module"
    with processes(range(5), Unloadable(), mp_context="forkserver") as reservoir, pytest.raises(WorkerError, match=text):
        iter(reservoir)


@pytest.mark.parametrize(
    ("source", "options", "text"),
    [
        (iter([1]), {}, "can be iterated only once"),
        (5, {}, "source must be iterable"),
        ([], {}, "source is empty"),
        ([1], {"function": 3}, "function must be a function"),
        ([1], {"most": 0}, "max_reservoir_samples must be from 1"),
        ([1], {"most": None}, "max_reservoir_samples must be an integer"),
        ([1], {"min_reservoir_samples": 11}, "min_reservoir_samples=11 can never be reached with max_reservoir_samples=10"),
        ([1], {"min_reservoir_samples": 0}, "min_reservoir_samples"),
        ([1], {"workers": 0}, "workers must be from 1"),
        ([1], {"workers": 1.5}, "workers must be an integer"),
        ([1], {"max_jobs_at_once": -1}, "max_jobs_at_once must be from 0"),
        ([1], {"sampler": [1]}, "sampler must be a function, for instance torch's RandomSampler class"),
        ([1], {"collate_fn": "stack"}, "collate_fn must be a function"),
        ([1], {"maximum_number_of_samples_per_epoch": 0}, "maximum_number_of_samples_per_epoch"),
        ([1], {"max_reservoir_replacement_size": 0}, "max_reservoir_replacement_size"),
        ([1], {"executor": "gpu"}, r"executor is one of \('process', 'thread'\), got 'gpu'"),
        ([1], {"on_error": "ignore"}, "on_error is one of"),
        ([1], {"mp_context": "knife"}, "mp_context is one of"),
        ([1], {"mp_context": 3}, "mp_context is the name"),
        ([1], {"seed": "x"}, "seed must be an integer"),
        ([1], {"buffer": {}}, "buffer must be a leanreplay.SlidingWindowBuffer, got dict"),
    ],
)
def test_bad_arguments(source, options, text):
    with pytest.raises(ArgumentError, match=text):
        threads(source, **options)
    assert threading.active_count() >= 1


def test_bad_buffers():
    with pytest.raises(ArgumentError, match="got ReservoirBuffer"):
        threads([1], buffer=ReservoirBuffer(10))
    with pytest.raises(ArgumentError, match="buffer has 9 rows, but max_reservoir_samples is 10"):
        threads([1], buffer=SlidingWindowBuffer(9))


def test_bad_samplers():
    with threads(range(9), sampler=lambda s: 5) as reservoir, pytest.raises(ArgumentError, match="an iterable of indices, got int"):
        iter(reservoir)
    with threads(range(9), sampler=lambda s: [0, 7]) as reservoir:
        found = iter(reservoir)
        assert next(found) == 0
        with pytest.raises(ArgumentError, match=r"indices \[7\] for a snapshot of 1 entries"):
            next(found)
        assert reservoir._jobs.pool is None


# -- a part of the source --------------------------------------------------------------------------------------------


def test_subsample():
    """n distinct samples, by seed and n alone; sizes are cut."""
    whole = threads(range(1000), most=50, min_reservoir_samples=20, deterministic=True, seed=3)
    part, same = whole.subsample(10), whole.subsample(10)
    with part, same:
        first = list(part)
        assert len(set(first)) == 10
        assert first == list(same) == sorted(first)
        assert first != list(range(10))
        assert (part.max_reservoir_samples, part.min_reservoir_samples, part.deterministic) == (10, 10, True)
    assert list(threads(range(1000), seed=4).subsample(10).source) != list(part.source)
    assert list(whole.subsample(60).source)[:10] != first
    with pytest.raises(ArgumentError, match="of a source of 1000 samples"):
        whole.subsample(1001)
    with pytest.raises(ArgumentError, match="n must be from 1"):
        whole.subsample(0)
    with pytest.raises(ArgumentError, match=r"subsample needs a source with len\(\) and \[i\]"):
        threads(Again(5)).subsample(2)


def test_subsample_is_uniform():
    """Chi-square over which of 10 samples are among 3, 5,000 seeds."""
    counts = np.zeros(10)
    for seed in range(5000):
        for i in threads(range(10), seed=seed).subsample(3).source:
            counts[i] += 1
    # Three of ten without replacement: the statistic is that of 9 degrees of freedom, times 7/9.
    statistic = ((counts - 1500) ** 2 / 1500).sum() * 9 / 7
    assert statistic < 45  # p = 1e-6


def test_subsample_uids():
    whole = threads(Paths(100), lambda s: s["uid"], most=50, min_reservoir_samples=20, deterministic=True)
    with whole.subsample_uids(np.array([7, 3, 11, 1000]), "uid") as part:
        assert list(part) == [3, 7, 11]
        assert (part.max_reservoir_samples, part.min_reservoir_samples, part.sampler) == (3, 3, None)
    with whole.subsample_uids([3, 4], "uid", new_sampler=lambda s: [1, 0]) as part:
        assert list(part) == [4, 3]
    tensors = threads([{"uid": torch.tensor(i)} for i in range(5)], lambda s: int(s["uid"]), deterministic=True)
    assert [int(s["uid"]) for s in tensors.subsample_uids([torch.tensor(2)], "uid").source] == [2]
    with pytest.raises(ArgumentError, match=r"no sample of the source has a 'uid' among \[1000\]"):
        whole.subsample_uids([1000], "uid")
    with pytest.raises(ArgumentError, match="sample 0 of the source has no 'name'"):
        whole.subsample_uids([1], "name")


def test_a_source_that_can_do_it_itself():
    class Own(Paths):
        def subsample(self, n):
            return Own(n)

        def subsample_uids(self, uids, uids_name):
            return [(u, uids_name) for u in uids]

    whole = threads(Own(10), most=5)
    assert len(whole.subsample(3).source) == 3
    assert whole.subsample(3).max_reservoir_samples == 3
    assert whole.subsample_uids([1], "uid").source == [(1, "uid")]


def test_subsample_keeps_every_option():
    """An option that is forgotten would silently fall back to its default."""
    options = {
        "min_reservoir_samples": 2,
        "workers": 3,
        "max_jobs_at_once": 7,
        "sampler": RandomSampler,
        "collate_fn": len,
        "maximum_number_of_samples_per_epoch": 6,
        "max_reservoir_replacement_size": 5,
        "executor": "thread",
        "mp_context": multiprocessing.get_context("spawn"),
        "on_error": "skip",
        "flatten": True,
        "deterministic": True,
        "seed": 9,
    }
    whole = AsyncReservoir(range(20), identity, 10, **options)
    part = whole.subsample(3)
    assert {name: getattr(part, name) for name in options} == options
    assert part.function is identity
    assert part.max_reservoir_samples == 10  # of entries, of which a sample may give many


# -- a buffer --------------------------------------------------------------------------------------------------------


def volume(i):
    return {"x": np.full((3, 2), i, np.float32), "y": i}


def numbers(entries):
    for e in entries:
        assert (e["x"] == e["y"]).all()
        assert e["x"].shape == (3, 2)
    return [int(e["y"]) for e in entries]


@pytest.mark.parametrize("rows", [4, 7])
def test_a_buffer_holds_the_entries(tmp_path, rows):
    """The same entries as without, as tensors; also with more rows than entries."""
    path = tmp_path / "reserve.h5"
    options = {"min_reservoir_samples": 3, "max_jobs_at_once": 2, "deterministic": True}
    with SlidingWindowBuffer(rows, path) as buffer:
        with threads(range(50), volume, most=4, buffer=buffer, **options) as stored, threads(range(50), volume, most=4, **options) as plain:
            for _ in range(8):
                entries = list(stored)
                assert type(entries[0]["x"]) is torch.Tensor
                assert numbers(entries) == numbers(list(plain))
            assert stored.reservoir_size() == 4
        assert len(buffer) == rows
        assert buffer.check() == []
    with (
        SlidingWindowBuffer(path=path, mode="r+") as buffer,
        threads(range(50, 99), volume, most=4, min_reservoir_samples=4, deterministic=True, buffer=buffer) as stored,
    ):
        assert stored.reservoir_size() == 4
        before = numbers(entries)
        assert numbers(list(stored)) == before
        assert numbers(list(stored)) == [*before[1:], 50]


def test_a_buffer_that_was_resized(tmp_path):
    """Its rows then begin at another place of the ring."""
    with SlidingWindowBuffer(7, tmp_path / "a.h5", stream=3) as buffer:
        with threads(range(50), volume, most=7, min_reservoir_samples=7, deterministic=True, buffer=buffer) as reservoir:
            for _ in range(5):
                last = numbers(list(reservoir))
        buffer.resize(5)
        with threads(range(50, 99), volume, most=4, deterministic=True, buffer=buffer) as reservoir:
            assert numbers(list(reservoir)) == last[-4:]
            assert numbers(list(reservoir)) == [*last[-3:], 50]
            assert numbers(list(reservoir)) == [*last[-2:], 50, 51]


def test_batches_from_a_buffer():
    with threads(
        range(50), volume, most=6, min_reservoir_samples=6, deterministic=True, buffer=SlidingWindowBuffer(6),
        sampler=lambda s: [[5, 0], [2]], collate_fn="default",
    ) as reservoir:  # fmt: skip
        for k in range(9):
            found = [b["y"].tolist() for b in reservoir]
            assert found == [[k + 5, k], [k + 2]]


def test_an_older_epoch_over_a_buffer():
    """What has been replaced is an error, never another sample."""
    with threads(range(50), volume, most=3, min_reservoir_samples=3, deterministic=True, buffer=SlidingWindowBuffer(3)) as reservoir:
        first, second = iter(reservoir), iter(reservoir)
        with pytest.raises(StateError, match="a later epoch has replaced this entry"):
            next(first)
        assert numbers([next(second)]) == [1]


def test_entries_that_do_not_fit_the_buffer():
    def load(i):
        return np.zeros(3 if i != 2 else 4)

    with threads(range(9), load, min_reservoir_samples=3, deterministic=True, buffer=SlidingWindowBuffer(10)) as reservoir:
        with pytest.raises(WorkerError, match=r"(?s)the sample 2 .*shape"):
            iter(reservoir)
        assert len(list(reservoir)) == 3
    options = {"buffer": SlidingWindowBuffer(10), "on_error": "skip"}
    with threads(range(9), load, min_reservoir_samples=5, deterministic=True, **options) as reservoir:
        assert len(list(reservoir)) == 5
        assert reservoir.skipped == 1
    buffer = SlidingWindowBuffer(10)
    buffer.add(np.zeros((1, 7)))
    options = {"buffer": buffer, "on_error": "skip"}
    with (
        threads(range(9), load, min_reservoir_samples=3, **options) as reservoir,
        pytest.raises(WorkerError, match="none of the last 9 jobs"),
    ):
        iter(reservoir)


# -- ending ----------------------------------------------------------------------------------------------------------


def descriptors():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def semaphore(name):
    """Where a named one lies."""
    return "/dev/shm/sem." + name.lstrip("/")


def nothing_left():
    assert multiprocessing.active_children() == []
    assert [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon] == []


def start(make, method, load):
    options = {"mp_context": method} if make is processes else {}
    return make(range(9), load, workers=2, min_reservoir_samples=3, **options)


ENDS = [(m, method, how) for m, method in ((threads, ""), (processes, "fork")) for how in ("close", "fail", "abandon")]
ENDS += [(processes, m, "fail") for m in METHODS if m != "fork"]


@pytest.mark.parametrize(("make", "method", "how"), ENDS)
def test_nothing_is_left(make, method, how, monkeypatch):
    """No thread, process, descriptor or semaphore: after close, after an exception, after it was forgotten."""
    name, semaphores = SemLock._make_name, []
    monkeypatch.setattr(SemLock, "_make_name", staticmethod(lambda: semaphores.append(name()) or semaphores[-1]))
    gc.collect()  # what other tests left
    nothing_left()
    if sys.platform == "linux":
        lock = multiprocessing.get_context("spawn").Lock()
        assert os.path.exists(semaphore(semaphores[-1]))  # so those left would be noticed below
        del lock, semaphores[:]
    before = 0
    for attempt in range(3):
        reservoir = start(make, method, identity if how != "fail" else fails)
        found = None
        with contextlib.suppress(WorkerError):
            found = iter(reservoir)
            next(found)
            while how == "fail":
                list(reservoir)
        if how == "close":
            assert reservoir._jobs.pool is not None
            reservoir.close()
        elif how == "abandon":
            del reservoir, found
            gc.collect()
        nothing_left()
        assert semaphores == [], "pipes need none, so that none can be left"
        if attempt == 0:
            before = descriptors()  # the first one starts multiprocessing's resource tracker and fork server, which stay
        assert descriptors() == before


def sleeps(i):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as libraries in C sometimes do
    if i:
        time.sleep(1000)
    return i


@pytest.mark.parametrize("method", METHODS)
def test_close_does_not_wait_for_long_jobs(method, monkeypatch):
    """Processes that are busy for longer are killed, those that wait in the queue never begin."""
    monkeypatch.setattr(pool, "PATIENCE", 0.2)
    with processes(range(1000), sleeps, workers=2, max_jobs_at_once=0, mp_context=method) as reservoir:
        assert list(reservoir) == [0]
    nothing_left()


def finishes(pair):
    path, i = pair
    if i:
        while not os.path.exists(path + ".go"):
            time.sleep(0.01)
        time.sleep(0.2)
        with open(path, "w", encoding="utf-8") as file:
            file.write("whole")
    return i


def test_close_lets_short_jobs_end(tmp_path, monkeypatch):
    """What a job is writing is not cut off."""
    monkeypatch.setattr(pool, "PATIENCE", PATIENCE)
    path = str(tmp_path / "cache")
    with processes([(path, 0), (path, 1)], finishes) as reservoir:
        assert list(reservoir) == [0]
        while not next(iter(reservoir._jobs.pending)).running():
            time.sleep(0.01)
        open(path + ".go", "w").close()
    with open(path, encoding="utf-8") as file:
        assert file.read() == "whole"


def notes(path):
    with open(path, "ab") as file:
        file.write(b"x")
    while os.path.getsize(path) > 40:
        time.sleep(0.01)


def test_close_drops_what_has_not_begun(tmp_path, monkeypatch):
    """Of 400 jobs the first 40 end, two more run on until they are ended, and no other begins."""
    monkeypatch.setattr(pool, "PATIENCE", 0.2)
    path = str(tmp_path / "notes")
    with processes([path] * 400, notes, workers=2, max_jobs_at_once=0) as reservoir:
        assert set(reservoir) == {None}
        while os.path.getsize(path) < 42:
            time.sleep(0.01)
        reservoir.close()
    assert os.path.getsize(path) < 60


def test_close():
    source = Paths(9)
    with threads(source) as reservoir:
        found = iter(reservoir)
    assert source.closed == 1
    reservoir.close()
    assert source.closed == 1
    for use in (lambda: next(found), lambda: iter(reservoir), reservoir.reservoir_size, lambda: reservoir.subsample(1)):
        with pytest.raises(ModeError, match="closed"):
            use()
    assert reservoir.performance["sending"]["count"] > 0
    buffer = SlidingWindowBuffer(10)
    with threads(range(3), float, buffer=buffer) as reservoir:
        list(reservoir)
    assert len(buffer) == 1


def test_close_before_the_first_epoch():
    source = Paths(9)
    threads(source).close()
    assert source.closed == 1


def test_the_source_is_closed_whatever_happens(monkeypatch):
    source = Paths(9)
    reservoir = threads(source)
    iter(reservoir)
    stop = reservoir._stop

    def broken():
        stop()
        raise OSError

    monkeypatch.setattr(reservoir, "_stop", broken)
    with pytest.raises(OSError):
        reservoir.close()
    assert source.closed == 1


def test_an_error_in_the_training_loop_ends_it():
    with pytest.raises(ZeroDivisionError), processes(range(9), workers=2) as reservoir:
        for _ in reservoir:
            raise ZeroDivisionError
    nothing_left()


def test_an_error_in_collate_ends_it():
    with processes(range(9), collate_fn=lambda e: e / 0) as reservoir:
        with pytest.raises(ZeroDivisionError):
            next(iter(reservoir))
        nothing_left()


def test_a_forked_copy():
    """Leaves the workers alone, and says that they are not its own."""
    with processes(range(9)) as reservoir:
        list(reservoir)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                iter(reservoir)
            except ModeError:
                reservoir.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        settle(reservoir)
        assert len(list(reservoir)) == 2


SCRIPT = """
    import os, signal, sys, time
    from leanreplay.torch import AsyncReservoir
    from leanreplay.torch.loading.async_reservoir import pool

    pool.PATIENCE = 0.5

    def load(i):
        if i > 1 and sys.argv[1] != "idle":
            time.sleep(1000)
        return i

    def say(text):
        os.write(1, f"{text}\\n".encode())  # print may not be interrupted while it holds its buffer

    if __name__ == "__main__":
        place, method, close = sys.argv[1:]
        most = 2 if place == "idle" else 0
        workers = 1 if (place, method) == ("train", "spawn") else 2  # which take seconds to start
        reservoir = AsyncReservoir(range(500), load, 9, workers=workers, max_jobs_at_once=most, min_reservoir_samples=2, mp_context=method)
        try:
            if place == "begin":
                reservoir._queue()
                say(f"children {[p.pid for p in reservoir._jobs.pool.processes]}")
            for entry in reservoir:
                pass
            children = [p.pid for p in reservoir._jobs.pool.processes]
            say(f"children {children}")
            if place == "wait":
                reservoir.min_reservoir_samples = 3
                iter(reservoir)
            elif place != "end":
                time.sleep(1000)
            say("the end")
        finally:
            if close == "close":
                reservoir.close()
"""


def gone(pids):
    """Wait until none of these processes runs."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if not [p for p in pids if os.path.exists(f"/proc/{p}") and "\nState:\tZ" not in read(f"/proc/{p}/status")]:
            return True
        time.sleep(0.05)
    return False


def read(path):
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return "\nState:\tZ"


def script(tmp_path, *arguments):
    path = tmp_path / "script.py"  # which spawned workers import
    path.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    run = Script(path.read_text(encoding="utf-8"), *arguments, file=path)
    line = run.stdout.readline()
    assert line.startswith("children"), run.stderr.read()
    return run, [int(c) for c in line.split("[")[1].rstrip("]\n").split(",")]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
@pytest.mark.parametrize(
    ("place", "method", "close"),
    [("wait", "fork", "close"), ("begin", "spawn", "no"), ("train", "fork", "close"), ("train", "fork", "no"), ("idle", "fork", "no")],
)
def test_ctrl_c(tmp_path, place, method, close):
    """To the whole group, as a terminal sends it: one traceback, no wait for the 500 jobs of 1,000 s, nothing left."""
    run, children = script(tmp_path, place, method, close)
    time.sleep(0.3)
    os.killpg(run.pid, signal.SIGINT)
    out, error = run.communicate(PATIENCE)
    assert error.count("KeyboardInterrupt") == 1, error
    assert error.count("Traceback") == 1, error
    assert run.returncode == -signal.SIGINT
    assert "the end" not in out
    assert "leaked" not in error
    assert gone(children)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_the_end_of_the_interpreter(tmp_path):
    """Without close, jobs that are queued are not waited for."""
    run, children = script(tmp_path, "end", "fork", "no")
    out, error = run.communicate(PATIENCE)
    assert (out, error, run.returncode) == ("the end\n", "", 0)
    assert gone(children)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_end_with_a_killed_parent(tmp_path, method):
    """Also those in the middle of a job."""
    run, children = script(tmp_path, "train", method, "no")
    run.kill()
    run.wait(PATIENCE)
    assert gone(children)
    for pipe in (run.stdout, run.stderr):
        pipe.close()


@pytest.mark.parametrize(("executor", "number"), [("thread", 0), ("process", 0), ("process", 1)])
def test_threads_that_cannot_start(executor, number, monkeypatch):
    """No more threads, for the first worker or for a further one: an error, no hang; later it works."""
    real, calls = threading.Thread.start, []

    def start(thread):
        calls.append(thread)
        if len(calls) == number + 1:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(pool, "PATIENCE", 0.2)
    with AsyncReservoir(list(range(10)), abs, 2, executor=executor, workers=number + 1, min_reservoir_samples=2) as reservoir:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", start)
            with pytest.raises(WorkerError, match="cannot start"):
                list(reservoir)
        assert len(list(reservoir)) == 2


def test_processes_that_cannot_start(monkeypatch):
    def fork():
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with AsyncReservoir(list(range(10)), abs, 2, mp_context="fork", min_reservoir_samples=2) as reservoir:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fork", fork)
            with pytest.raises(WorkerError, match=r"cannot start: .*ulimit"):
                list(reservoir)
        assert len(list(reservoir)) == 2
