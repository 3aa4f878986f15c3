"""A shuffled order that depends on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from ....arguments import integer, length
from ....errors import ArgumentError
from ....kernels import reservoir
from ....keys import key_pair

_CHUNK = 1 << 16  # indices that become Python integers at a time


class ShuffleSampler(Sampler[int]):
    """All indices of a dataset, shuffled by (seed, epoch) alone: a run can resume within an epoch.

    dataset: anything with a length. seed: an integer of 128 bits. The sampler sorts 64-bit hashes
    of the indices. Hashes never tie, so the order is the same on every machine and with every
    version of NumPy. Each epoch begins with a sort: 16 bytes and about 0.1 microseconds an index.

    >>> from leanreplay.torch import ShuffleSampler
    >>> sampler = ShuffleSampler(range(8), seed=1)
    >>> sampler.set_epoch(3)
    >>> list(sampler) == list(sampler), sorted(sampler)
    (True, [0, 1, 2, 3, 4, 5, 6, 7])
    """

    def __init__(self, dataset: Any, seed: int = 0) -> None:
        if length(dataset) < 0:
            raise ArgumentError(f"ShuffleSampler takes a dataset with a length, got {type(dataset).__name__}")
        self.dataset, self.epoch = dataset, 0
        self.seed = integer("seed", seed, -(2**127), 2**127 - 1) or 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order that the next `iter` gives. Epochs count from 0."""
        self.epoch = integer("epoch", epoch, 0, 2**62) or 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        k0, k1 = key_pair(f"shuffle {self.epoch}", self.seed)
        keys = np.empty(len(self.dataset), np.uint64)
        reservoir.position_keys(np.arange(keys.shape[0]), k0, k1, keys)
        order = np.argsort(keys)
        for start in range(0, keys.shape[0], _CHUNK):
            yield from order[start : start + _CHUNK].tolist()
