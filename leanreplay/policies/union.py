"""Which samples one buffer over several streams would hold, given what the buffer of each stream
holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ..arrays import NO_LOG, POLICY_WORDS, Ints, Words

Keys = Callable[[Ints, Ints], Words]  # of (positions, groups)


class Holder(Protocol):
    """One of the buffers to be merged, as a policy sees it. state, log: those of its policy."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def state(self) -> Sequence[int]: ...
    @property
    def log(self) -> Ints: ...
    def chunks(self) -> Iterator[tuple[Ints, Ints, Ints]]:
        """Yield (rows, positions, groups) of all live rows, in copies of bounded size."""


class Union(NamedTuple):
    """Of each group, the samples of the largest keys stay.

    caps: (groups,), how many stay of each. keys: makes the keys. ids: the groups, ascending; None:
        all samples are one group.
    state, log: of the policy of the result. size_limit: rows that the result can come to hold.
    """

    caps: Ints
    keys: Keys
    state: list[int]
    size_limit: int
    ids: Ints | None = None
    log: Ints = NO_LOG


def bounded_union(holders: Sequence[Holder], capacity: int, keys: Keys) -> Union:
    """The best `capacity` of all, or as few as the smallest buffer that dropped samples holds (the
    capacity rule)."""
    bounds = [h.state[0] for h in holders if h.state[0]]
    limit = min([capacity, *bounds])
    total = sum(h.size for h in holders)
    state = [limit if bounds or total > limit else 0] + [0] * (POLICY_WORDS - 1)
    return Union(np.array([min(limit, total)]), keys, state, limit)
