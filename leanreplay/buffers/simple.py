"""Buffers that are a policy and nothing else."""

from __future__ import annotations

from ..policies.greedy import GreedyClassBalancingPolicy
from ..policies.reservoir import ReservoirPolicy
from ..policies.window import SlidingWindowPolicy
from .base import DataBuffer


class ReservoirBuffer(DataBuffer):
    """A uniform sample without replacement of everything seen.

    At every moment each stream position is held with equal probability.

    >>> import numpy as np
    >>> from leanreplay import ReservoirBuffer
    >>> buffer = ReservoirBuffer(100, seed=0)
    >>> for start in range(0, 10_000, 50):
    ...     buffer.add((np.random.rand(50, 3), np.arange(start, start + 50)))
    >>> (x, y), meta = buffer.sample(32)
    """

    policy_class = ReservoirPolicy


class SlidingWindowBuffer(DataBuffer):
    """The last `max_size` samples of the stream."""

    policy_class = SlidingWindowPolicy


class GreedyClassBalancingBuffer(DataBuffer):
    """Every sample enters; once full, a random member of the largest class is replaced.

    Ties are broken at random. Classes are the second element of a sample that is a pair, or
    `group`. This is the greedy sampler of GDumb (Prabhu, Torr and Dokania, ECCV 2020): balanced,
    but not uniform within a class; early samples are favoured.
    """

    policy_class = GreedyClassBalancingPolicy
