"""ShuffleSampler: sorting by key, uniform, resumed within an epoch."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from compiled import call_helpers
from interleaved_oracle import Numbers, resumed_everywhere, stored, values

from leanreplay import ArgumentError
from leanreplay.kernels import reservoir
from leanreplay.keys import key_pair
from leanreplay.torch import (
    InterleavedSampler,
    InterleavedSamplerConfig,
    SamplerIntervalConfig,
    ShuffleSampler,
)


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
