"""AsyncReservoir: jobs and sources that fail, parts of a source, buffers of entries."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import signal
import struct
import sys
import threading
import time

import numpy as np
import pytest
from async_jobs import METHODS, PATIENCE, Again, Odd, Paths, fails, identity, nothing_left, processes, settle, threads
from torch.utils.data import RandomSampler

from leanreplay import ArgumentError, ReservoirBuffer, SlidingWindowBuffer, StateError, WorkerError
from leanreplay.torch import AsyncReservoir
from leanreplay.torch.loading.async_reservoir import intake as module
from leanreplay.torch.loading.async_reservoir import pool

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif("fork" not in METHODS, reason="needs fork")


# -- errors ------------------------------------------------------------------------------------------------------------


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
        assert not reservoir._intake.jobs.pending


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
        assert reservoir._intake.jobs.pool is None


# -- a part of the source ----------------------------------------------------------------------------------------------


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
        assert list(part) == [7, 3, 11]
        assert (part.max_reservoir_samples, part.min_reservoir_samples, part.sampler) == (3, 3, None)
    with whole.subsample_uids([3, 4], "uid", new_sampler=lambda s: [1, 0]) as part:
        assert list(part) == [4, 3]
    twice = threads([{"uid": i % 5, "place": i} for i in range(10)])
    assert [s["place"] for s in twice.subsample_uids([4, 1, 4], "uid").source] == [4, 9, 1, 6]
    assert [s["place"] for s in twice.subsample_uids({4, 1}, "uid").source] == [1, 4, 6, 9]
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


# -- a buffer ----------------------------------------------------------------------------------------------------------


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
