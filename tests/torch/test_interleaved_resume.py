"""InterleavedSampler stopped and resumed everywhere, and its loaders."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import random

import numpy as np
import pytest
import torch
from interleaved_oracle import Numbers, Order, case, flat, own_numbers, random_case, resumed_everywhere, stored, values
from torch.utils.data import DataLoader, SequentialSampler

from leanreplay import ArgumentError, ModeError, ReservoirBuffer, RowError, StateError
from leanreplay.torch import (
    BufferDataset,
    InterleavedSampler,
    InterleavedSamplerConfig,
    SamplerIntervalConfig,
)


def fresh(sampler):
    """The same run, in objects that know nothing of this one."""
    return InterleavedSampler(
        copy.deepcopy(sampler.train_sampler), sampler.config, callback_samplers=copy.deepcopy(sampler.callback_samplers)
    )


# -- stopping and resuming ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_resume_every_position(seed):
    """Loaders without workers, the sampler itself, and its batch_sampler: at every position of 40 random runs, from any start."""
    r = random.Random(100 + seed)
    ways = [
        (lambda s: s.get_data_loader(), lambda b: b.tolist()),
        (lambda s: s.batch_sampler, list),
        (in_batches, list),
    ]
    for k in range(40):
        arguments = random_case(r)
        sampler, expected = case(*arguments)
        begin, take = ways[k % 3]
        if k % 3 == 0:
            expected = own_numbers(expected, sampler)
        resumed_everywhere(lambda sampler=sampler: fresh(sampler), expected, begin, take)


def in_batches(sampler):
    """What the sampler itself gives, cut where it says so."""
    batch = []
    for last, index in sampler:
        batch.append(index)
        if last:
            yield batch
            batch = []
    assert not batch


def test_resume_within_a_batch():
    """Iterating the sampler itself: a batch that was not complete comes again."""
    sampler, expected = case(10, InterleavedSamplerConfig(4, False, max_epochs=2), [(3, {"every_n_updates": 2, "batch_size": 2})])
    items = flat(expected)
    for stop in range(len(items) + 1):
        one, other = fresh(sampler), fresh(sampler)
        had = list(itertools.islice(one, stop))
        other.load_state_dict(one.state_dict())
        complete = max((k + 1 for k, (last, _) in enumerate(had) if last), default=0)
        assert had[:complete] + list(other) == items


SMALL = (7, InterleavedSamplerConfig(3, False, max_epochs=2), [(3, {"every_n_updates": 2, "batch_size": 2}), (1, {"every_n_epochs": 1})])


@pytest.mark.parametrize("arguments", [{}, {"prefetch_factor": 4}], ids=["2", "ahead"])
def test_resume_every_position_with_workers(arguments):
    """What workers have ready does not count: at every position of a small run, with 2 workers that draw ahead of it."""
    sampler, expected = case(*SMALL)
    expected = own_numbers(expected, sampler)
    options = {"num_workers": 2, "multiprocessing_context": "fork", **arguments}
    resumed_everywhere(lambda: fresh(sampler), expected, lambda s: s.get_data_loader(**options), lambda b: b.tolist())


def test_resume_across_worker_counts():
    """A state does not know how many workers there were. Those that are not forked take what is sent to them."""
    sampler, expected = case(*SMALL)
    expected = own_numbers(expected, sampler)
    ways = [{}, {"num_workers": 2, "multiprocessing_context": "fork"}, {"num_workers": 1, "multiprocessing_context": "forkserver"}]
    had, state = [], None
    for way in ways:
        one = fresh(sampler)
        if state is not None:
            one.load_state_dict(state)
        had += [b.tolist() for b in itertools.islice(one.get_data_loader(**way), 3)]
        state = stored(one.state_dict())
    assert had == expected[:9] and len(expected) > 9


def test_resume_persistent_workers():
    """The same loader, with the same processes, goes on where the state says."""
    sampler, expected = case(*SMALL)
    expected = own_numbers(expected, sampler)
    loader = sampler.get_data_loader(num_workers=2, multiprocessing_context="fork", persistent_workers=True)
    for stop in (2, 5):
        assert [b.tolist() for b in itertools.islice(loader, stop)] == expected[:stop]
        sampler.load_state_dict(sampler.state_dict())
        assert len(loader) == len(expected) - stop
        assert values(loader) == expected[stop:]
        assert len(loader) == len(expected)
        assert values(loader) == expected  # without a state: from the start


@pytest.mark.parametrize("persistent", [False, True])
def test_loading_before_the_first_pass(persistent):
    """`start` lets workers read ahead, once; the next pass takes that, unless a state moves its begin. `queued` tells what they have."""
    sampler, expected = case(*SMALL)
    samples = own_numbers(expected, sampler)
    loader = sampler.get_data_loader(2, multiprocessing_context="fork", prefetch_factor=2, persistent_workers=persistent)
    assert loader.queued() == []
    loader.start()
    loader.start()
    assert loader.queued() == expected[:4] and sampler.state_dict()["batches"] == 0
    batches = iter(loader)
    assert next(batches).tolist() == samples[0]
    assert loader.queued() == expected[1:5]
    assert values(batches) == samples[1:] and loader.queued() == []
    loader.start()
    state = sampler.state_dict()
    sampler.load_state_dict({**state, "batches": 3})
    assert values(loader) == samples[3:]
    plain = sampler.get_data_loader()
    plain.start()
    assert plain.queued() == [] and values(plain) == samples


def test_a_loader_of_ones_own_resumes():
    """dataset, batch_sampler and collator in any DataLoader; with workers (which draw ahead), a pass goes on from a state all the same."""
    sampler, expected = case(*SMALL)
    samples = own_numbers(expected, sampler)
    for workers in (0, 2):
        options = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
        for stop in range(len(expected) + 1):
            one, other = fresh(sampler), fresh(sampler)
            list(itertools.islice(one.batch_sampler, stop))
            other.load_state_dict(one.state_dict())
            loader = DataLoader(other.dataset, batch_sampler=other.batch_sampler, collate_fn=other.collator, **options)
            assert len(loader) == len(expected) - stop
            assert values(loader) == samples[stop:]


def test_passes():
    """Each pass begins at the start; only one goes on from a state; an abandoned pass moves nothing."""
    sampler, expected = case(10, InterleavedSamplerConfig(4, max_epochs=3, start_update=2), [(2, {"every_n_updates": 2})])
    expected = own_numbers(expected, sampler)
    loader = sampler.get_data_loader()
    before = sampler.state_dict()
    assert values(loader) == values(loader) == expected
    iterator = iter(loader)
    next(iterator), next(iterator)
    assert iter(iterator) is iterator
    state = sampler.state_dict()
    assert values(loader) == expected
    end = sampler.state_dict()
    sampler.load_state_dict(state)
    assert next(iterator).tolist() == expected[2]  # the old pass goes its own way
    sampler.load_state_dict(state)
    assert values(loader) == expected[2:] and values(loader) == expected
    sampler.load_state_dict(end)
    assert len(sampler) == 0 and values(loader) == []
    sampler.load_state_dict(before)
    assert values(loader) == expected


def test_state_outranks_the_start_and_stands_under_other_limits():
    """A state of a run of 2 epochs goes on in one of 4; the start of the config is not added to it."""
    intervals = [(2, {"every_n_updates": 3})]
    short = case(10, InterleavedSamplerConfig(4, max_epochs=2), intervals)[0]
    state = [short.state_dict() for _ in short.batch_sampler][-1]
    for start in ({}, {"start_update": 1}, {"start_epoch": 3}):
        long, _ = case(10, InterleavedSamplerConfig(4, max_epochs=4, **start), intervals)
        whole = case(10, InterleavedSamplerConfig(4, max_epochs=4), intervals)[1]
        long.load_state_dict(state)
        assert list(long.batch_sampler) == whole[5:]
    shorter = case(10, InterleavedSamplerConfig(4, max_updates=1), intervals)[0]
    shorter.load_state_dict(state)
    assert len(shorter) == 0 and list(shorter) == []
    assert shorter.state_dict() == state


def test_states_of_others():
    """Anything that would give other indices is refused, with what differs; what was planned stays."""
    intervals = [(2, {"every_n_updates": 3})]

    def build(n=10, b=4, drop_last=True, evaluation=False, seed=0, intervals=intervals):
        sampler, _ = case(n, InterleavedSamplerConfig(b, drop_last, max_epochs=2, evaluation=evaluation), intervals)
        return InterleavedSampler(Order(n, seed=seed), sampler.config, callback_samplers=sampler.callback_samplers)

    state = build().state_dict()
    others = {
        "samples": {"n": 11},
        "batch_size": {"b": 5},
        "drop_last": {"drop_last": False},
        "training": {"evaluation": True},
        "seed": {"seed": 1},
        "callbacks": {"intervals": []},
    }
    for key, arguments in others.items():
        with pytest.raises(StateError, match=f"{key}: .*here"):
            build(**arguments).load_state_dict(state)
    for other in ([(2, {"every_n_updates": 4})], [(2, {"every_n_epochs": 3})], [(3, {"every_n_updates": 3})], [*intervals, *intervals]):
        with pytest.raises(StateError, match="callbacks"):
            build(intervals=other).load_state_dict(state)
    sampler = build()
    list(itertools.islice(sampler.batch_sampler, 2))
    here = sampler.state_dict()
    bad = [None, [], {}, {**state, "format": 2}, {**state, "batches": -1}, {**state, "batches": 1.0}, {**state, "batches": True}]
    bad += [{k: v for k, v in state.items() if k != key} for key in state] + [{**state, "of": 3}]
    for wrong in bad:
        with pytest.raises(StateError, match="not a state"):
            sampler.load_state_dict(wrong)
    assert sampler.state_dict() == here
    here["of"]["callbacks"][0]["samples"] = 9  # a state is a copy
    here["of"]["drop_last"] = 5
    here = stored(sampler.state_dict())
    assert here["of"] == state["of"]
    sampler.load_state_dict(here)
    assert sampler.state_dict() == here


# -- loaders -----------------------------------------------------------------------------------------------------------


def tagged(name):
    return lambda samples: (name, list(samples), os.getpid())


class Name:
    """A collator that workers of any kind can take."""

    def __init__(self, name):
        self.name = name

    def __call__(self, samples):
        return self.name, list(samples), os.getpid()


@pytest.mark.parametrize("context", [None, "fork", "forkserver"])
def test_each_dataset_has_its_collator_and_all_share_the_workers(context):
    """Train, callback, and callback without collator, in order; the processes of training are those of the evaluations."""
    names = ["train", "test", None]
    parts = [SequentialSampler(Numbers(n, base)) for n, base in ((6, 0), (3, 100), (2, 200))]
    callbacks = [
        SamplerIntervalConfig(parts[1], Name("test"), every_n_updates=2),
        SamplerIntervalConfig(parts[2], every_n_epochs=1),
    ]
    sampler = InterleavedSampler(parts[0], InterleavedSamplerConfig(2, max_epochs=2), Name("train"), callbacks)
    loader = sampler.get_data_loader(
        num_workers=0 if context is None else 2, multiprocessing_context=context, persistent_workers=context is not None
    )
    for _ in range(2):
        batches = list(loader)
        found = [(b[0], b[1]) if isinstance(b, tuple) else (None, b.tolist()) for b in batches]
        train = [("train", [k, k + 1]) for k in (0, 2, 4)]
        test = [("test", [100, 101]), ("test", [102])]
        assert found == [*train[:2], *test, train[2], (None, [200, 201]), train[0], *test, *train[1:], *test, (None, [200, 201])]
        assert {name for name, _ in found} == set(names)
    processes = {b[2] for b in batches if isinstance(b, tuple)}
    assert len(processes) == 2 if context else processes == {os.getpid()}
    for name in ("train", "test"):
        assert {b[2] for b in batches if b[0] == name} <= processes


def test_dataset_and_collator_by_hand():
    """An item says which dataset it is of; a batch is read at once where its dataset can do that."""
    buffer = ReservoirBuffer(100)
    buffer.add((np.zeros((40, 3), "float32"), np.arange(40)))
    reads = []

    class Counted(BufferDataset):
        def __getitems__(self, indices):
            reads.append(list(indices))
            return super().__getitems__(indices)

    callbacks = [SamplerIntervalConfig(SequentialSampler(Numbers(3, 50)), every_n_updates=1, batch_size=2)]
    callbacks += [SamplerIntervalConfig(SequentialSampler(Counted(buffer)), every_n_epochs=1, batch_size=30)]
    sampler = InterleavedSampler(SequentialSampler(Numbers(4)), InterleavedSamplerConfig(4, max_epochs=1), callback_samplers=callbacks)
    assert len(sampler.dataset) == 47 and sampler.index_offsets == [4, 7]
    assert [sampler.dataset[i] for i in (0, 3, 4, 6)] == [(0, 0), (0, 3), (1, 50), (1, 52)]
    reads.clear()
    batches = list(sampler.get_data_loader())
    assert reads == [list(range(30)), list(range(30, 40))]
    assert [b.tolist() for b in batches[:3]] == [[0, 1, 2, 3], [50, 51], [52]]
    assert [tuple(b[0].shape) for b in batches[3:]] == [(30, 3), (10, 3)]
    assert torch.equal(torch.cat([b[1] for b in batches[3:]]), torch.arange(40))
    assert sampler.dataset.__getitems__([3, 4]) == [(0, 3), (1, 50)]
    mixed = sampler.dataset.__getitems__([8, 7, 4])
    assert [k for k, _ in mixed] == [2, 2, 1] and [int(s[1]) for _, s in mixed[:2]] == [1, 0]
    with pytest.raises(ArgumentError, match=r"datasets \[0, 1\]"):
        sampler.collator(sampler.dataset.__getitems__([3, 4]))
    for index in (-1, 47):
        with pytest.raises(RowError, match="47 samples"):
            sampler.dataset[index]


class Fails(Numbers):
    """One item cannot be read, until a file says so."""

    def __init__(self, n, bad, path):
        super().__init__(n)
        self.bad, self.path = bad, path

    def __getitem__(self, index):
        if index == self.bad and not os.path.exists(self.path):
            raise ValueError("this item is broken")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_ends_the_pass(workers, tmp_path):
    """The batch that failed was not delivered: the state says so, and going on over it is refused; from the state it comes again."""
    path = str(tmp_path / "mended")
    sampler = InterleavedSampler(SequentialSampler(Fails(12, 5, path)), InterleavedSamplerConfig(2, max_epochs=1))
    loader = sampler.get_data_loader(workers, multiprocessing_context="fork" if workers else None)
    iterator, had = iter(loader), []
    with pytest.raises(ValueError, match="broken"):
        had += (b.tolist() for b in iterator)
    assert had == [[0, 1], [2, 3]]
    state = sampler.state_dict()
    assert state["batches"] == 2
    for _ in range(2):
        with pytest.raises(ModeError, match="load_state_dict"):
            next(iterator)
    assert sampler.state_dict() == state
    (tmp_path / "mended").touch()
    sampler.load_state_dict(state)
    assert values(loader) == [[4, 5], [6, 7], [8, 9], [10, 11]]
    done = iter(loader)
    assert len(list(done)) == 6
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(done)


@pytest.mark.filterwarnings("ignore:Got pickle error")
def test_a_loader_that_cannot_start_keeps_the_place():
    sampler = InterleavedSampler(SequentialSampler(range(6)), InterleavedSamplerConfig(2, max_epochs=1), tagged("train"))
    list(itertools.islice(sampler.batch_sampler, 2))
    sampler.load_state_dict(sampler.state_dict())
    with pytest.raises((pickle.PicklingError, AttributeError)):  # a local function cannot be sent to a spawned worker
        iter(sampler.get_data_loader(1, multiprocessing_context="spawn"))
    assert [b[1] for b in sampler.get_data_loader()] == [[4, 5]]


def test_loader_arguments():
    sampler = InterleavedSampler(SequentialSampler(range(6)), InterleavedSamplerConfig(2, max_epochs=1))
    loader = sampler.get_data_loader(0, False, generator=torch.Generator(), timeout=0)
    assert isinstance(loader, DataLoader) and loader.dataset is sampler.dataset and loader.collate_fn is sampler.collator
    assert len(loader) == 3 and loader.num_workers == 0 and not loader.pin_memory
    assert sampler.get_data_loader(1, True).num_workers == 1 and sampler.get_data_loader(1, True).pin_memory
    for name in ("dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "collate_fn"):
        with pytest.raises(ArgumentError, match=name):
            sampler.get_data_loader(**{name: 1})
    with pytest.raises(ArgumentError, match="in_order"):
        sampler.get_data_loader(num_workers=2, in_order=False)
