"""InterleavedSampler and ShuffleSampler: against a plain loop over epochs, updates and samples, stopped and resumed everywhere."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import json
import math
import os
import pickle
import random

import numpy as np
import pytest
import torch
from compiled import call_helpers
from interpreter import Script
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from leanreplay import ArgumentError, ModeError, ReservoirBuffer, RowError, StateError
from leanreplay.kernels import reservoir
from leanreplay.keys import key_pair
from leanreplay.torch import (
    BufferDataset,
    InterleavedSampler,
    InterleavedSamplerConfig,
    SamplerIntervalConfig,
    ShuffleSampler,
)
from leanreplay.torch.loading.interleaved.config import trains

KINDS = ("every_n_epochs", "every_n_updates", "every_n_samples")
STOPS = ("max_epochs", "max_updates", "max_samples")
STARTS = ("start_epoch", "start_update", "start_sample")
TEST_BASE = 1000


class Numbers(Dataset):
    """Item i is base + i."""

    def __init__(self, n, base=0):
        self.n, self.base = n, base

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if not 0 <= index < self.n:
            raise IndexError(index)
        return self.base + index


class Order:
    """A sampler with an order for each epoch, and no more than torch asks for; remembers what it was told."""

    def __init__(self, n, name="dataset", seed=0):
        self.n, self.epoch, self.seed, self.told = n, None, seed, []
        setattr(self, name, Numbers(n))

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.told.append(epoch)

    def of(self, epoch):
        return random.Random(f"{self.seed} {epoch}").sample(range(self.n), self.n)

    def __len__(self):
        return self.n

    def __iter__(self):
        return iter(self.of(self.epoch))


def naive(orders, n, config, callbacks):
    """The batches, by a loop that counts samples one by one. orders(epoch): n indices; callbacks: of (config, its indices, offset)."""
    b = min(config.batch_size, n) if config.drop_last else config.batch_size

    def passes(callback, indices, offset):
        size = callback.batch_size or b
        return [[offset + i for i in indices[k : k + size]] for k in range(0, len(indices), size)]

    limits = [getattr(config, k) for k in STOPS]
    if config.evaluation or 0 in limits:
        return [batch for c in callbacks for batch in passes(*c)]
    starts = [getattr(config, k) or 0 for k in STARTS]
    out, done = [], [0, 0, 0]  # epochs, updates, samples
    while True:
        order = orders(done[0])
        if config.drop_last:
            order = order[: n - n % b]
        for k in range(0, len(order), b):
            if any(limit is not None and count >= limit for count, limit in zip(done, limits, strict=True)):
                return out
            batch = order[k : k + b]
            wanted = all(count >= start for count, start in zip(done, starts, strict=True))
            before = list(done)
            done[1] += 1
            done[2] += len(batch)
            done[0] += k + b >= len(order)
            if wanted:
                out.append(batch)
                for c in callbacks:
                    i, every = next((i, getattr(c[0], kind)) for i, kind in enumerate(KINDS) if getattr(c[0], kind))
                    if any(count % every == 0 for count in range(before[i] + 1, done[i] + 1)):
                        out += passes(*c)


def case(n, config, intervals, name="dataset"):
    """A sampler, and what it should give. intervals: of (number of samples, arguments)."""
    callbacks, parts, offset = [], [], n
    for i, (m, arguments) in enumerate(intervals):
        sampler = Order(m, name, seed=i + 1)
        sampler.set_epoch(0)
        callbacks.append(SamplerIntervalConfig(sampler, **arguments))
        parts.append((callbacks[-1], sampler.of(0), offset))
        offset += m
    train = Order(n, name)
    return InterleavedSampler(train, config, callback_samplers=callbacks), naive(train.of, n, config, parts)


def flat(batches):
    return [(k == len(batch) - 1, i) for batch in batches for k, i in enumerate(batch)]


def fresh(sampler):
    """The same run, in objects that know nothing of this one."""
    return InterleavedSampler(
        copy.deepcopy(sampler.train_sampler), sampler.config, callback_samplers=copy.deepcopy(sampler.callback_samplers)
    )


def values(loader):
    return [batch.tolist() for batch in loader]


def stored(state):
    """Through a checkpoint that holds no code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert json.loads(json.dumps(state)) == loaded == state
    return loaded


def random_case(r, starts=True):
    n, b = r.choice([1, 2, 3, 5, 7, 10, 12]), r.choice([1, 2, 3, 4, 5, 8, 15])
    limits = {STOPS[0]: r.randrange(1, 6), STOPS[1]: r.randrange(1, 16), STOPS[2]: r.randrange(1, 50)}
    arguments = {k: limits[k] for k in r.sample(STOPS, r.choice([1, 1, 2, 3]))}
    if r.random() < 0.05:
        arguments[r.choice(STOPS)] = 0
    drop_last = r.random() < 0.5
    if starts and r.random() < 0.6:
        kind = r.choice(STARTS)
        size = min(b, n) if drop_last else b
        samples = n // size * size if drop_last else n
        ends = [e * samples + k for e in range(5) for k in range(0, samples, size)]
        arguments[kind] = r.choice(ends) if kind == "start_sample" else r.randrange(0, {"start_epoch": 4, "start_update": 14}[kind])
    config = InterleavedSamplerConfig(b, drop_last, evaluation=r.random() < 0.05, **arguments)
    intervals = []
    for _ in range(r.randrange(4)):
        kind = r.choice(KINDS)
        size = r.choice([1, 2, 3, 7]) if kind == "every_n_samples" or r.random() < 0.5 else None
        intervals.append((r.choice([0, 1, 2, 4, 5]), {kind: r.choice([1, 2, 3, 4, 5, 7, 10, 11, 20]), "batch_size": size}))
    return n, config, intervals


# -- against the plain loop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_any_run(seed):
    """Order, offsets, flags, limits, starts, intervals of all kinds, and the length, of 500 random runs."""
    r = random.Random(seed)
    for _ in range(500):
        arguments = random_case(r)
        sampler, expected = case(*arguments)
        assert list(sampler) == flat(expected), arguments
        assert list(sampler.batch_sampler) == expected, arguments
        assert len(sampler) == len(sampler.batch_sampler) == len(expected), arguments


def test_random_runs_cover_what_matters():
    """The sweep above meets each kind of run, some of them where the callbacks of a resumed run could differ."""
    met = set()
    for seed in range(8):
        r = random.Random(seed)
        for _ in range(500):
            n, config, intervals = random_case(r)
            met |= {k for k in STOPS + STARTS if getattr(config, k) is not None}
            met |= {("cut", config.drop_last) for _ in [0] if config.batch_size > n}
            met |= {("short", config.drop_last) for _ in [0] if n % config.batch_size}
            met |= {("no training", config.evaluation) for _ in [0] if not trains(config)}
            for _, a in intervals:
                if a.get("every_n_samples", n) < config.batch_size:
                    met.add(("several multiples at once", config.drop_last))
            met.add(("callbacks", len(intervals)))
    wanted = {*STOPS, *STARTS, *(("callbacks", i) for i in range(4))}
    wanted |= {(k, v) for k in ("cut", "short", "no training", "several multiples at once") for v in (False, True)}
    assert met >= wanted


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("kind", STARTS)
def test_starting_gives_the_rest_of_the_run(kind, drop_last):
    """From every start, also within an epoch: the same batches and callbacks as the uninterrupted run, after those it had."""
    intervals = [(3, {"every_n_samples": 7, "batch_size": 2}), (2, {"every_n_updates": 3}), (1, {"every_n_epochs": 2})]
    config = InterleavedSamplerConfig(4, drop_last, max_epochs=5)
    whole = case(10, config, intervals)[1]
    per_epoch = 8 if drop_last else 10
    starts = {"start_epoch": range(5), "start_update": range(5 * (2 if drop_last else 3))}.get(
        kind, [e * per_epoch + k for e in range(5) for k in range(0, per_epoch, 4)]
    )
    lengths = []
    for start in starts:
        sampler, expected = case(10, dataclasses.replace(config, **{kind: start}), intervals)
        assert whole[len(whole) - len(expected) :] == expected
        assert list(sampler.batch_sampler) == expected and len(sampler) == len(expected)
        lengths.append(len(expected))
    assert lengths[0] == len(whole) and sorted(set(lengths), reverse=True) == lengths  # each start is another place


@pytest.mark.parametrize("limit", STOPS)
def test_start_at_or_beyond_the_limit(limit):
    intervals = [(3, {"every_n_updates": 1})]
    for start in STARTS:
        for value in (40, 80):  # 20 updates, 80 samples and 10 epochs are the limits
            config = InterleavedSamplerConfig(4, **{start: value, limit: {"max_epochs": 10, "max_updates": 20, "max_samples": 80}[limit]})
            at = {"start_epoch": value * 2, "start_update": value, "start_sample": value // 4}[start]
            sampler = case(10, config, intervals)[0]
            assert (len(sampler) == 0) == (at >= 20) == (list(sampler) == [])


@pytest.mark.parametrize("arguments", [{"max_epochs": 0}, {"max_updates": 0}, {"max_samples": 0}, {"evaluation": True, "max_epochs": 3}])
def test_no_training(arguments):
    """A limit of 0, or evaluation=True: each callback once, in order, whatever its interval, the start and the other limits say."""
    callbacks = [SamplerIntervalConfig(SequentialSampler(range(m)), every_n_epochs=9, batch_size=b) for m, b in ((5, None), (3, 2))]
    for more in ({}, {"start_update": 7}, {"max_updates": 0}):
        config = InterleavedSamplerConfig(4, **{**arguments, **more})
        sampler = InterleavedSampler(SequentialSampler(range(10)), config, callback_samplers=callbacks)
        assert list(sampler.batch_sampler) == [[10, 11, 12, 13], [14], [15, 16], [17]]
        assert len(sampler) == 4
        assert (sampler.start_epoch, sampler.start_update, sampler.start_sample) == (0, 0, 0)
    empty = InterleavedSampler(SequentialSampler(range(0)), InterleavedSamplerConfig(4, **arguments), callback_samplers=callbacks)
    assert list(empty.batch_sampler) == [[0, 1, 2, 3], [4], [5, 6], [7]]
    assert list(InterleavedSampler(SequentialSampler(range(10)), InterleavedSamplerConfig(4, **arguments))) == []


def test_by_hand():
    """Written out: an epoch's short last batch, a multiple of samples passed but not met, callbacks in the order given."""
    callbacks = [
        SamplerIntervalConfig(SequentialSampler(range(3)), every_n_samples=5, batch_size=2),
        SamplerIntervalConfig(SequentialSampler(range(1)), every_n_epochs=1),
    ]
    sampler = InterleavedSampler(
        SequentialSampler(range(7)), InterleavedSamplerConfig(3, False, max_samples=13), callback_samplers=callbacks
    )
    a, b = [[7, 8], [9]], [[10]]  # samples after each update: 3, 6, 7, 10, 13
    assert list(sampler.batch_sampler) == [[0, 1, 2], [3, 4, 5], *a, [6], *b, [0, 1, 2], *a, [3, 4, 5]]
    assert list(sampler)[:4] == [(False, 0), (False, 1), (True, 2), (False, 3)]
    assert all(type(flag) is bool and type(index) is int for flag, index in sampler)
    assert sampler.index_offsets == [7, 10] and sampler.batch_size == 3


@pytest.mark.parametrize(("n", "b", "drop_last", "size"), [(5, 8, True, 5), (5, 8, False, 8), (5, 5, True, 5), (5, 4, True, 4)])
def test_batch_size_above_the_dataset(n, b, drop_last, size):
    sampler = InterleavedSampler(
        SequentialSampler(range(n)),
        InterleavedSamplerConfig(b, drop_last, max_epochs=2),
        callback_samplers=[SamplerIntervalConfig(SequentialSampler(range(9)), every_n_epochs=2)],
    )
    assert sampler.batch_size == size
    lengths = [len(batch) for batch in sampler.batch_sampler]
    training = [min(size, n)] * 2
    assert lengths == training + [size] * (9 // size) + ([9 % size] if 9 % size else [])


def test_calculate_start():
    """All three units, for every kind; against counting."""
    for n, b, drop_last in itertools.product([1, 4, 5, 10], [1, 3, 4, 5, 16], [False, True]):
        size = min(b, n) if drop_last else b
        cuts = [min(size, n - k) for k in range(0, n, size) if not drop_last or k + size <= n]
        epoch = update = sample = 0
        seen = {0}
        for epoch in range(4):
            for k, cut in enumerate(cuts):
                here = (epoch, update, sample)
                base = InterleavedSamplerConfig(b, drop_last, max_epochs=9)
                assert InterleavedSampler.calculate_start(dataclasses.replace(base, start_update=update), n) == here
                assert InterleavedSampler.calculate_start(dataclasses.replace(base, start_sample=sample), n) == here
                if k == 0:
                    assert InterleavedSampler.calculate_start(dataclasses.replace(base, start_epoch=epoch), n) == here
                update, sample = update + 1, sample + cut
                seen.add(sample)
        for start in range(sample):
            if start not in seen:
                with pytest.raises(ArgumentError, match=f"start_sample={start} lies within a batch") as error:
                    InterleavedSampler(SequentialSampler(range(n)), dataclasses.replace(base, start_sample=start))
                low, high = max(s for s in seen if s < start), min(s for s in seen if s > start)
                assert f"take {low} or {high}" in str(error.value)
    sampler = InterleavedSampler(SequentialSampler(range(10)), InterleavedSamplerConfig(4, False, max_epochs=9, start_update=4))
    assert (sampler.start_epoch, sampler.start_update, sampler.start_sample) == (1, 4, 14)


def test_epochs_are_told_before_they_begin():
    """set_epoch before each epoch where there is one, from the epoch of the start; never for a callback's sampler."""
    train, test = Order(5), Order(3)
    test.set_epoch(0)
    config = InterleavedSamplerConfig(2, False, max_updates=8, start_update=4)  # epochs of 3 updates
    sampler = InterleavedSampler(train, config, callback_samplers=[SamplerIntervalConfig(test, every_n_updates=1)])
    told = [list(train.told) for _ in sampler.batch_sampler]
    assert train.told == [1, 2] and test.told == [0]
    assert told[0] == [1] and told.count([1]) == 2 * 3  # 2 updates, each with two batches of the callback
    train.set_epoch = 5  # not a method: not called
    train.epoch = 0
    assert len(list(sampler)) > 0


def test_samplers_of_torch():
    """Those with data_source and those with dataset; without set_epoch too, and a shuffled one."""
    train = RandomSampler(range(10), generator=torch.Generator().manual_seed(3))
    order = list(RandomSampler(range(10), generator=torch.Generator().manual_seed(3)))
    callbacks = [SamplerIntervalConfig(SequentialSampler(range(2)), every_n_updates=2)]
    sampler = InterleavedSampler(train, InterleavedSamplerConfig(4, False, max_epochs=1), callback_samplers=callbacks)
    assert list(sampler.batch_sampler) == [order[:4], order[4:8], [10, 11], order[8:]]
    replacing = RandomSampler(range(3), replacement=True, num_samples=8)  # longer than its dataset
    config = InterleavedSamplerConfig(4, max_epochs=1)
    batches = list(InterleavedSampler(replacing, config, callback_samplers=callbacks).batch_sampler)
    assert [len(b) for b in batches] == [4, 4, 2] and batches[2] == [3, 4]
    both = Order(4, "dataset")
    both.data_source = Numbers(6)
    assert InterleavedSampler(both, config).dataset.datasets[0] is both.data_source
    both.data_source = None
    assert InterleavedSampler(both, config).dataset.datasets[0] is both.dataset


def test_long_runs_cost_nothing_to_measure():
    """Lengths of runs that nobody can wait for, against sums worked out by hand; and the last batches of one of them."""
    many = 10**12

    def build(**arguments):
        callbacks = [
            SamplerIntervalConfig(SequentialSampler(range(5)), every_n_samples=3, batch_size=2),  # due at every update but some short ones
            SamplerIntervalConfig(SequentialSampler(range(2)), every_n_updates=7),
            SamplerIntervalConfig(SequentialSampler(range(2)), every_n_epochs=10),
        ]
        config = InterleavedSamplerConfig(4, False, max_epochs=many, **arguments)
        return InterleavedSampler(SequentialSampler(range(10)), config, callback_samplers=callbacks)

    sampler = build()
    # Epochs of 4 + 4 + 2 samples; the short batch holds a multiple of 3 unless the epoch ends at 2 modulo 3.
    short = sum(1 for e in range(1, 4) if any(k % 3 == 0 for k in (10 * e - 1, 10 * e)))
    assert many % 3 == 1 and any(k % 3 == 0 for k in (9, 10))
    fired = 2 * many + short * (many // 3) + 1
    assert len(sampler) == 3 * many + 3 * fired + 3 * many // 7 + many // 10
    tail = list(build(start_epoch=many - 2).batch_sampler)
    assert len(tail) == len(build(start_epoch=many - 2)) and tail[-1] == [17, 18]
    endless = InterleavedSampler(SequentialSampler(range(10)), InterleavedSamplerConfig(5, max_epochs=2**62))
    state = endless.state_dict()
    endless.load_state_dict({**state, "batches": 2**62 + 2})
    assert list(itertools.islice(endless.batch_sampler, 3)) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [0, 1, 2, 3, 4]]


def test_batches_far_above_the_dataset():
    """How often a callback is due is counted in samples that there are, not in those of a batch that can never be full."""
    callbacks = [SamplerIntervalConfig(SequentialSampler(range(2)), every_n_samples=n, batch_size=1) for n in (10**15 - 1, 35)]
    config = InterleavedSamplerConfig(10**15, False, max_epochs=8)
    sampler = InterleavedSampler(SequentialSampler(range(10)), config, callback_samplers=callbacks)
    assert sampler.batch_size == 10**15
    assert [len(batch) for batch in sampler.batch_sampler] == [10, 10, 10, 10, 1, 1, 10, 10, 10, 1, 1, 10]
    assert len(sampler) == 12


@pytest.mark.parametrize("batch_size", [1, 3, 63, 64, 100])
def test_how_far_it_reads_ahead(batch_size):
    """A sampler whose order depends on what training has learnt: small batches are cut from at most 64 indices, none of another epoch
    or from after a callback that is due.
    """
    read, epochs = [], []

    class Counted(SequentialSampler):
        def set_epoch(self, epoch):
            epochs.append(epoch)

        def __iter__(self):
            for i in super().__iter__():
                read.append(i)
                yield i

    train, test = Counted(range(1000)), Counted(range(3))
    config = InterleavedSamplerConfig(batch_size, False, max_epochs=2)
    callbacks = [SamplerIntervalConfig(test, every_n_updates=40, batch_size=3)]
    taken = updates = 0
    for batch in InterleavedSampler(train, config, callback_samplers=callbacks).batch_sampler:
        taken += len(batch)
        updates += batch[0] < 1000
        assert 0 <= len(read) - taken < max(64, batch_size) and epochs == list(range(1 + (updates - 1) // -(-1000 // batch_size)))
        if batch[0] >= 1000 or updates % 40 == 0:
            assert len(read) == taken


def test_settings_are_copied():
    config = InterleavedSamplerConfig(2, max_epochs=1)
    callback = SamplerIntervalConfig(SequentialSampler(range(2)), every_n_epochs=1)
    sampler = InterleavedSampler(SequentialSampler(range(4)), config, callback_samplers=[callback])
    config.max_epochs, callback.batch_size = 7, 1
    assert list(sampler.batch_sampler) == [[0, 1], [2, 3], [4, 5]]
    assert (sampler.config.max_epochs, sampler.callback_samplers[0].batch_size) == (1, None)


# -- stopping and resuming -------------------------------------------------------------------------------------------------


def resumed_everywhere(make, expected, begin, take):
    """Break off after every number of batches; another object goes on. begin(sampler): an iterable; take: its batch as a list."""
    for stop in range(len(expected) + 1):
        sampler = make()
        had = [take(batch) for batch in itertools.islice(begin(sampler), stop)]
        state = stored(sampler.state_dict())
        other = make()
        other.load_state_dict(state)
        assert other.state_dict() == state
        assert len(other) == len(expected) - stop
        rest = [take(batch) for batch in begin(other)]
        assert had + rest == expected, stop
        assert len(other) == len(other.batch_sampler) == len(expected)  # the next pass is a whole one
        assert state["batches"] + len(rest) == other.state_dict()["batches"]


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


def own_numbers(expected, sampler):
    """Indices of the concatenated dataset as the samples there."""
    return [[sampler.dataset[i][1] for i in batch] for batch in expected]


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


# -- loaders ---------------------------------------------------------------------------------------------------------------


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


# -- torch.distributed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("rank", "drop_last"), [(0, False), (1, False), (2, True)])
def test_distributed_sampler(rank, drop_last, shuffle):
    """Each rank's share of each epoch, and of each callback; resumed at every position; the same schedule on all ranks."""

    def build(rank):
        train = DistributedSampler(Numbers(20), 3, rank, shuffle, seed=5, drop_last=drop_last)
        test = DistributedSampler(Numbers(7, 100), 3, rank, shuffle=False)
        callbacks = [SamplerIntervalConfig(test, every_n_samples=5, batch_size=2)]
        return InterleavedSampler(train, InterleavedSamplerConfig(2, drop_last, max_epochs=3), callback_samplers=callbacks)

    def order(epoch):
        other = DistributedSampler(Numbers(20), 3, rank, shuffle, seed=5, drop_last=drop_last)
        other.set_epoch(epoch)
        return list(other)

    sampler = build(rank)
    callback = sampler.callback_samplers[0]
    expected = naive(order, len(order(0)), sampler.config, [(callback, list(callback.sampler), 20)])
    if shuffle:
        assert order(0) != order(1)
    assert list(sampler.batch_sampler) == expected
    resumed_everywhere(lambda: build(rank), own_numbers(expected, sampler), lambda s: s.get_data_loader(), lambda b: b.tolist())
    shapes = {tuple(len(batch) for batch in build(r).batch_sampler) for r in range(3)}
    assert len(shapes) == 1  # else a collective call would wait for ever
    assert build(0).state_dict() == build(1).state_dict()  # so the checkpoint of one rank serves all


DISTRIBUTED = """
import sys, torch, torch.distributed as dist
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler
from leanreplay.torch import InterleavedSampler, InterleavedSamplerConfig, SamplerIntervalConfig

class Numbers(Dataset):
    def __init__(self, n, base): self.n, self.base = n, base
    def __len__(self): return self.n
    def __getitem__(self, i): return self.base + i

rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)

def build():
    train, test = Numbers(21, 0), Numbers(5, 100)
    callbacks = [SamplerIntervalConfig(DistributedSampler(test, shuffle=False), every_n_updates=3)]
    return InterleavedSampler(DistributedSampler(train, seed=2), InterleavedSamplerConfig(4, False, max_epochs=2), None, callbacks)

def gathered(batch):
    both = [torch.zeros_like(batch) for _ in range(2)]
    dist.all_gather(both, batch)  # fails if the ranks are not in step
    return [b.tolist() for b in both]

whole = [gathered(b) for b in build().get_data_loader()]
stopped, sampler = [], build()
for batch in sampler.get_data_loader():
    stopped.append(gathered(batch))
    if len(stopped) == 5:
        break
state = [sampler.state_dict()]
dist.broadcast_object_list(state, src=0)
sampler = build()
sampler.load_state_dict(state[0])
stopped += [gathered(b) for b in sampler.get_data_loader()]
assert stopped == whole, (stopped, whole)
epochs = [[], []]
count = 0
for both in whole:
    if both[0][0] < 100:
        epochs[count // 3] += both[0] + both[1]
        count += 1
assert count == 6 and all(sorted(set(e)) == list(range(21)) and len(e) == 22 for e in epochs), epochs
assert epochs[0] != epochs[1]
assert [b for b in whole if b[0][0] >= 100] == [[[100, 102, 104], [101, 103, 100]]] * 2, whole
dist.destroy_process_group()
print("in step")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_torch_distributed(tmp_path):
    """Two real processes: in step, every sample once an epoch (but for the padding), resumed from the state of one rank."""
    runs = [Script(DISTRIBUTED, rank, tmp_path / "meet") for rank in range(2)]
    try:
        for run in runs:
            out, errors = run.communicate(timeout=240)
            assert (run.returncode, out) == (0, "in step\n"), errors
    finally:
        for run in runs:
            run.kill()


# -- checks ----------------------------------------------------------------------------------------------------------------

FIVE = SequentialSampler(range(5))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "exactly one of every_n_epochs, every_n_updates, every_n_samples is needed, got none"),
        ({"every_n_epochs": 1, "every_n_updates": 1}, "got every_n_epochs, every_n_updates"),
        ({"every_n_epochs": 1, "every_n_samples": 1, "batch_size": 1}, "got every_n_epochs, every_n_samples"),
        ({"every_n_samples": 4}, "every_n_samples needs a batch_size"),
        *(({kind: bad, "batch_size": 2}, f"{kind} must be") for kind in KINDS for bad in (0, -1, 1.5, "2", True)),
        *(({"every_n_epochs": 1, "batch_size": bad}, "batch_size must be") for bad in (0, -3, 2.0, False)),
        ({"every_n_epochs": 1, "pipeline": 3}, "pipeline must be a function"),
        ({"every_n_epochs": 1, "sampler": None}, "sampler must be a torch sampler"),
        ({"every_n_epochs": 1, "sampler": iter([1])}, "sampler must be a torch sampler"),
        ({"every_n_epochs": 1, "sampler": 5}, "sampler must be a torch sampler"),
    ],
)
def test_interval_is_checked(arguments, says):
    with pytest.raises(ArgumentError, match=says):
        SamplerIntervalConfig(**{"sampler": FIVE, **arguments})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"max_epochs": None}, "at least one of max_epochs, max_updates, max_samples is needed, got none"),
        ({"max_epochs": None, "evaluation": True}, "at least one of max_epochs"),
        ({"start_epoch": 0, "start_update": 0}, "at most one of start_epoch, .*, got start_epoch, start_update"),
        ({"start_sample": 4, "start_update": 0}, "got start_update, start_sample"),
        *(({"batch_size": bad}, "batch_size must be") for bad in (0, -1, None, 2.5, "4", True)),
        *(({name: bad}, f"{name} must be") for name in STOPS + STARTS for bad in (-1, 1.0, "1", True)),
        *(({name: bad}, f"{name} must be True or False") for name in ("drop_last", "evaluation") for bad in (None, 1, "yes")),
    ],
)
def test_config_is_checked(arguments, says):
    with pytest.raises(ArgumentError, match=says):
        InterleavedSamplerConfig(**{"batch_size": 4, "max_epochs": 1, **arguments})


@pytest.mark.parametrize(
    ("config", "name", "bad", "good"),
    [
        (SamplerIntervalConfig(FIVE, every_n_epochs=2), "every_n_epochs", 0, 3),
        (SamplerIntervalConfig(FIVE, every_n_epochs=2), "every_n_epochs", None, np.int64(3)),
        (SamplerIntervalConfig(FIVE, every_n_epochs=2), "every_n_updates", 2, None),
        (SamplerIntervalConfig(FIVE, every_n_samples=2, batch_size=3), "batch_size", None, 1),
        (SamplerIntervalConfig(FIVE, every_n_samples=2, batch_size=3), "sampler", 3, range(4)),
        (SamplerIntervalConfig(FIVE, every_n_samples=2, batch_size=3), "pipeline", 3, list),
        (InterleavedSamplerConfig(4, max_epochs=1), "max_epochs", None, 0),
        (InterleavedSamplerConfig(4, max_epochs=1), "batch_size", 0, 1),
        (InterleavedSamplerConfig(4, max_epochs=1, start_epoch=3), "start_sample", 0, None),
        (InterleavedSamplerConfig(4, max_epochs=1), "drop_last", 0, False),
        (InterleavedSamplerConfig(4, max_epochs=1), "evaluation", None, np.bool_(True)),
        (InterleavedSamplerConfig(4, max_epochs=1), "max_epoch", 3, None),
        (InterleavedSamplerConfig(4, max_epochs=1), "_trains", 3, None),
    ],
)
def test_assignment_is_checked(config, name, bad, good):
    """What is refused leaves the config as it was; integers of NumPy become plain ones."""
    before = dataclasses.asdict(config)
    with pytest.raises(ArgumentError):
        setattr(config, name, bad)
    assert dataclasses.asdict(config).keys() == before.keys()
    assert all(v is before[k] or v == before[k] for k, v in vars(config).items() if k != "sampler")
    if name in before:
        for other in (config, copy.copy(config)):
            setattr(other, name, good)
            assert getattr(other, name) == good
            assert not isinstance(getattr(other, name), np.generic)
    assert dataclasses.replace(config) == config and dataclasses.is_dataclass(config)


def test_configs_are_plain_dataclasses():
    config = InterleavedSamplerConfig(batch_size=4, max_epochs=1)
    assert config == pickle.loads(pickle.dumps(config)) and config != InterleavedSamplerConfig(4, max_epochs=2)
    assert repr(config).startswith("InterleavedSamplerConfig(batch_size=4, drop_last=True, max_epochs=1, max_updates=None")
    restored = pickle.loads(pickle.dumps(config))
    with pytest.raises(ArgumentError, match="max_epochs"):
        restored.max_epochs = -1
    assert [f.name for f in dataclasses.fields(InterleavedSamplerConfig)] == ["batch_size", "drop_last", *STOPS, *STARTS, "evaluation"]
    assert [f.name for f in dataclasses.fields(SamplerIntervalConfig)] == ["sampler", "pipeline", *KINDS, "batch_size"]


class Endless(IterableDataset):
    def __len__(self):
        return 5

    def __iter__(self):
        return itertools.count()


@pytest.mark.parametrize(
    ("train", "callback", "says"),
    [
        (range(5), FIVE, "train_sampler: range has neither data_source nor dataset"),
        (FIVE, range(5), r"callback_samplers\[0\]: range has neither data_source nor dataset"),
        (iter([]), FIVE, "train_sampler must be a torch sampler"),
        (None, FIVE, "train_sampler must be a torch sampler"),
        (SequentialSampler([]), FIVE, "train_sampler is empty; .*evaluation=True"),
    ],
)
def test_samplers_are_checked(train, callback, says):
    with pytest.raises(ArgumentError, match=says):
        InterleavedSampler(
            train, InterleavedSamplerConfig(4, max_epochs=1), callback_samplers=[SamplerIntervalConfig(callback, every_n_epochs=1)]
        )


def test_arguments_are_checked():
    config = InterleavedSamplerConfig(4, max_epochs=1)
    with pytest.raises(ArgumentError, match="config must be an InterleavedSamplerConfig, got dict"):
        InterleavedSampler(FIVE, {"batch_size": 4})
    with pytest.raises(ArgumentError, match="SamplerIntervalConfigs, got SequentialSampler"):
        InterleavedSampler(FIVE, config, callback_samplers=[FIVE])
    with pytest.raises(ArgumentError, match="train_collator must be a function"):
        InterleavedSampler(FIVE, config, train_collator=3)
    for dataset in (Endless(), iter([])):
        sampler = Order(5)
        sampler.dataset = dataset
        with pytest.raises(ArgumentError, match="train_sampler: its dataset must have a length and be read by index"):
            InterleavedSampler(sampler, config)


class Given(SequentialSampler):
    """Gives these, says another length."""

    def __init__(self, indices, says, dataset):
        self.indices, self.says, self.data_source = indices, says, dataset

    def __len__(self):
        return self.says

    def __iter__(self):
        return iter(self.indices)


@pytest.mark.parametrize(
    ("indices", "says", "error"),
    [
        ([0, 1, 2], 4, "fewer indices"),
        ([], 4, "fewer indices"),
        ([0, 1, 2, 5], 4, r"out of range \(2 to 5\), but its dataset has 5|out of range \(0 to 5\), but its dataset has 5"),
        ([0, 1, 2, -1], 4, r"out of range \(-1 to 2\)"),
        ([0, 1, 2, (3, 4)], 4, "single indices"),
        ([[0, 1], [2, 3]], 2, "single indices"),
    ],
)
@pytest.mark.parametrize("where", ["train", "callback"])
def test_indices_that_would_read_the_neighbour(where, indices, says, error):
    """A sampler that is wrong about its dataset would silently read another one's samples."""
    bad = Given(indices, says, range(5))
    train, callback = (bad, FIVE) if where == "train" else (FIVE, bad)
    name = {"train": "train_sampler", "callback": r"callback_samplers\[0\]"}[where]
    sampler = InterleavedSampler(
        train, InterleavedSamplerConfig(2, max_epochs=1), callback_samplers=[SamplerIntervalConfig(callback, every_n_epochs=1)]
    )
    with pytest.raises(ArgumentError, match=f"{name} gave .*({error})"):
        list(sampler)


def test_a_callback_that_grows():
    """All of an evaluation, or an error: never silently a part of it."""
    samples = list(range(3))
    callbacks = [SamplerIntervalConfig(SequentialSampler(samples), every_n_updates=1)]
    sampler = InterleavedSampler(FIVE, InterleavedSamplerConfig(2, max_epochs=1), callback_samplers=callbacks)
    assert len(list(sampler.batch_sampler)) == 6
    samples.append(3)
    with pytest.raises(ArgumentError, match="more than the 3 indices"):
        list(sampler)


# -- ShuffleSampler --------------------------------------------------------------------------------------------------------


def test_shuffle_is_sorting_by_key():
    """The order by definition: hashes of (seed, epoch, index) in plain Python."""
    mask = 2**64 - 1

    def fin(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    for n, seed, epoch in itertools.product([0, 1, 2, 50], [0, 7, -1, 2**126], [0, 3, 10**12]):
        sampler = ShuffleSampler(Numbers(n), seed)
        sampler.set_epoch(epoch)
        k0, k1 = (int(k) for k in key_pair(f"shuffle {epoch}", seed))
        keys = [fin(fin((i * 0x9E3779B97F4A7C15 + k0) & mask) + k1 & mask) for i in range(n)]
        assert list(sampler) == list(sampler) == sorted(range(n), key=keys.__getitem__)
        assert len(sampler) == n and all(type(i) is int for i in sampler)


GOLDEN = [[4, 2, 9, 3, 10, 0, 11, 8, 6, 1, 7, 5], [7, 4, 5, 0, 11, 8, 1, 9, 6, 10, 3, 2]]


def test_shuffle_stays_what_it_was():
    """Stored runs resume with later versions only if orders never change."""
    sampler = ShuffleSampler(range(12), seed=3)
    orders = [list(sampler)]
    sampler.set_epoch(1)
    orders.append(list(sampler))
    assert orders == GOLDEN


def test_shuffle_is_uniform():
    """All 120 orders of 5, over seeds and over epochs of one seed; chi-square below its quantile of 1 - 1e-6 (119 degrees: 207)."""
    for pairs in ([(s, 0) for s in range(12000)], [(1, e) for e in range(12000)]):
        counts = dict.fromkeys(itertools.permutations(range(5)), 0)
        for seed, epoch in pairs:
            sampler = ShuffleSampler(range(5), seed)
            sampler.set_epoch(epoch)
            counts[tuple(sampler)] += 1
        assert len(counts) == math.factorial(5)
        assert sum((c - 100) ** 2 / 100 for c in counts.values()) < 207


def test_shuffle_large():
    """More than it converts at a time."""
    order = list(ShuffleSampler(range(200_000), 4))
    assert sorted(order) == list(range(200_000))
    assert order[:3] != [0, 1, 2]


def test_shuffle_resumes_in_the_middle_of_an_epoch():
    def build():
        callbacks = [SamplerIntervalConfig(ShuffleSampler(Numbers(3, 100), 8), every_n_updates=2, batch_size=2)]
        config = InterleavedSamplerConfig(4, False, max_epochs=3)
        return InterleavedSampler(ShuffleSampler(Numbers(10), 9), config, callback_samplers=callbacks)

    expected = values(build().get_data_loader())
    training = [i for b in expected for i in b if i < 100]
    epochs = [training[k : k + 10] for k in (0, 10, 20)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and epochs[0] != epochs[1] != epochs[2]
    resumed_everywhere(build, expected, lambda s: s.get_data_loader(), lambda b: b.tolist())


def test_shuffle_is_checked():
    with pytest.raises(ArgumentError, match="dataset with a length"):
        ShuffleSampler(iter([]))
    for seed in (1.5, "1", 2**127):
        with pytest.raises(ArgumentError, match="seed must be"):
            ShuffleSampler(range(3), seed)
    for epoch in (-1, 0.5, True):
        with pytest.raises(ArgumentError, match="epoch must be"):
            ShuffleSampler(range(3)).set_epoch(epoch)
    big = InterleavedSampler(ShuffleSampler(range(3), -(2**127)), InterleavedSamplerConfig(2, max_epochs=1))
    assert stored(big.state_dict())["of"]["seed"] == -(2**127)


@pytest.mark.parametrize("f", [reservoir.position_keys, getattr(reservoir.position_keys, "py_func", reservoir.position_keys)])
def test_shuffle_kernel_compiled_and_not(f, monkeypatch):
    call_helpers(reservoir, monkeypatch)
    monkeypatch.setattr(reservoir, "position_keys", f)
    with np.errstate(over="ignore"):
        assert list(ShuffleSampler(range(12), seed=3)) == GOLDEN[0]
