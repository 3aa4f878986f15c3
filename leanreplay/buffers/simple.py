"""Buffers that are a policy and nothing else."""

from __future__ import annotations

import os
from typing import Any, Literal

from ..arguments import choice
from ..policies.greedy import ADMIT, GreedyClassBalancingPolicy
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
    """A sample enters; once full, a random member of the largest class leaves. Ties are broken at
    random.

    Classes are the second element of a sample, or `group`. Which samples enter is `admit`, besides
    the parameters of `DataBuffer`; a new buffer takes "all":

    - "all": every sample. Classes are balanced, but within a class recent samples are favoured: an
      old one stays only as long as no eviction hits it. Where all classes come again in each part
      of a stream (domain-incremental), soon only samples of the last part are left.
    - "below_share": a sample whose class holds fewer than max_size / classes rows, even if rows are
      free. This is the greedy sampler of GDumb (Prabhu, Torr and Dokania, ECCV 2020, Algorithm 1).
      Early samples are favoured: once a class has its share it stays as it is, until new classes
      make random members leave. A domain-incremental stream ends with its first part only.

    For a uniform sample of each class use `ClassBalancedBuffer`.

    >>> import numpy as np
    >>> from leanreplay import GreedyClassBalancingBuffer
    >>> for admit in ("all", "below_share"):
    ...     buffer = GreedyClassBalancingBuffer(4, admit=admit)
    ...     for domain in range(100):
    ...         buffer.add((np.full(2, domain), np.array([0, 1])))
    ...     (x, y), _ = buffer.get(range(4))
    ...     print(bool(x.min() > 50), bool(x.max() < 2))
    True False
    False True
    """

    policy_class = GreedyClassBalancingPolicy

    def __init__(
        self,
        max_size: int | None = None,
        path: str | os.PathLike[str] | None = None,
        *,
        admit: Literal["all", "below_share"] | None = None,
        **options: Any,
    ) -> None:
        self._params = {"admit": choice("admit", admit, (None, *ADMIT))}
        super().__init__(max_size, path, **options)
