"""The plain loop that an InterleavedSampler must agree with."""

from __future__ import annotations

import io
import itertools
import json
import random

import torch
from torch.utils.data import Dataset

from leanreplay.torch import (
    InterleavedSampler,
    InterleavedSamplerConfig,
    SamplerIntervalConfig,
)

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


def own_numbers(expected, sampler):
    """Indices of the concatenated dataset as the samples there."""
    return [[sampler.dataset[i][1] for i in batch] for batch in expected]
