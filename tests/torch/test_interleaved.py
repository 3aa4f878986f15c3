"""InterleavedSampler against a plain loop over epochs, updates and samples."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch
from interleaved_oracle import STARTS, STOPS, Numbers, Order, case, flat, random_case
from torch.utils.data import RandomSampler, SequentialSampler

from leanreplay import ArgumentError
from leanreplay.torch import (
    InterleavedSampler,
    InterleavedSamplerConfig,
    SamplerIntervalConfig,
)
from leanreplay.torch.loading.interleaved.config import trains


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
