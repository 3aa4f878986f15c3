"""Buffers that share their rows evenly over groups: classes, experiences, or whatever the samples
are grouped by."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from ..arguments import integer, required
from ..arrays import Ints
from ..errors import ArgumentError
from ..policies.balanced import (
    BalancedPolicy,
    ClassBalancedPolicy,
    ClassBalancingReservoirPolicy,
    ExperienceBalancedPolicy,
)
from ..policies.quotas import QuotaPolicy, group_quotas
from .base import DataBuffer
from .feeding import Moved
from .tag import Experience
from .values import Array


class BalancedBuffer(DataBuffer):
    """The same number of rows for each group, and within a group a uniform sample: the base class
    of balanced buffers.

    The group of a sample is `group`, else the second element of a pair. Parameters as for
    `ClassBalancedBuffer`; total_num_groups is what its total_num_classes is.

    >>> import numpy as np
    >>> from leanreplay import BalancedBuffer
    >>> buffer = BalancedBuffer(12, adaptive_size=False, total_num_groups=4)
    >>> buffer.add(np.arange(30.0), group=np.arange(30) % 2)
    >>> buffer.group_sizes()
    {0: 3, 1: 3}
    """

    policy_class: ClassVar[type[QuotaPolicy]] = BalancedPolicy

    def __init__(
        self,
        max_size: int | None = None,
        path: str | os.PathLike[str] | None = None,
        *,
        adaptive_size: bool | None = None,
        total_num_groups: int | None = None,
        borrow: bool | None = None,
        **options: Any,
    ) -> None:
        self._given(total_num_groups, adaptive_size=adaptive_size, borrow=borrow)
        super().__init__(max_size, path, **options)

    def _given(self, total: object, **flags: object) -> None:
        """Note the parameters, before anything else; what is None is taken from the file, or
        settled by the policy."""
        name = self.policy_class.total_name
        self._params = {name: integer(name, total, 1, 2**31)}
        for name, value in flags.items():
            if value is not None and not isinstance(value, (bool, np.bool_)):
                raise ArgumentError(f"{name} must be True or False, got {value!r:.200}")
            self._params[name] = None if value is None else bool(value)

    @property
    def adaptive_size(self) -> bool:
        """Whether `max_size` is divided over the groups seen so far, and not over a total known
        beforehand."""
        return bool(self.parameters.own.get("adaptive_size", True))

    def get_group_lengths(self, num_groups: int) -> list[int]:
        """Quotas of so many groups, the largest first.

        >>> from leanreplay import ClassBalancedBuffer
        >>> ClassBalancedBuffer(10).get_group_lengths(3)
        [4, 3, 3]
        """
        n = required("num_groups", num_groups, 0, 2**31)
        if self.adaptive_size:
            return sorted(group_quotas(self.max_size, np.arange(n, dtype=np.uint64)).tolist(), reverse=True)
        total = self.parameters.own[self.policy_class.total_name]
        if n > total:
            raise ArgumentError(f"{n} groups, but this buffer is for a total of {total}")
        return [self.max_size // total] * n

    def experience_number(self, given: object, at: object, step: int) -> int | Array:
        """The number of an experience: given, or `step` beyond the largest seen. An array, one for
        each sample, is `_groups`' concern."""
        if isinstance(given, np.ndarray) and given.ndim:
            return given
        number = integer("experience", given, -(2**63), 2**63 - 1)
        if number is not None:
            return number
        if at is not None:
            raise ArgumentError("with at= say which experience the samples are of: experience=...; the number may have moved on")
        store = self.current.reading()
        log = store.policy_log()
        seen = log[log[:, 0] == 0, 1]  # without a look at the rows, which would take memory for each
        newest = int(seen.max()) + step if seen.shape[0] else 0
        if newest >= 2**63:
            raise ArgumentError(f"experience {newest} does not fit into int64; give the number: experience=...")
        return newest


class ClassBalancedBuffer(BalancedBuffer):
    """The same number of rows for each class, and within a class a uniform sample of all its
    samples.

    The class of a sample is the second element of a pair, or `group`. Of max_size // classes rows
    for each class seen so far, the remainder goes to the classes whose hash(seed, class) is
    smallest; with more classes than rows, these have one each. A class that comes new takes its
    rows from all others at once. Whenever you look, each class is an exact uniform sample without
    replacement of its own stream, and so it stays through `resize`: a class that dropped or
    rejected a sample never grows again (the capacity rule).

    Parameters, besides those of `DataBuffer`
    ----------
    adaptive_size: divide the rows over the classes seen so far; a new buffer takes True.
    total_num_classes: with adaptive_size=False, each class gets max_size // total_num_classes rows;
        more classes are an ArgumentError.
    borrow: rows that small classes leave free are used by others until needed; a new buffer takes
        False. Each class is still uniform, but which classes have more than their share depends on
        the order in which they came, and so `merge` refuses such buffers. Without it len(buffer)
        drops at the first sample of a new class, from 500 to 260 where the third and fourth of
        equal classes come, until that class has its share. On S-MNIST, class by class, that made no
        difference: with 200 rows 79.3 % without and 79.6 % with it, with 500 rows 84.2 % and 85.0 %
        (5 seeds, of which the spread is 1.2 and 5); updates with it took 1.2 times as long. Classes
        that stay small for long are the case for it.

    Costs O(log max_size) for a sample that stays, about 10 ns for one that does not.

    >>> import numpy as np
    >>> from leanreplay import ClassBalancedBuffer
    >>> buffer = ClassBalancedBuffer(6, seed=0)
    >>> buffer.add((np.zeros((90, 4)), np.repeat([0, 1], [80, 10])))
    >>> buffer.group_sizes()
    {0: 3, 1: 3}
    >>> buffer.add((np.zeros((5, 4)), np.full(5, 2)))
    >>> buffer.group_sizes()
    {0: 2, 1: 2, 2: 2}
    """

    policy_class = ClassBalancedPolicy

    def __init__(
        self,
        max_size: int | None = None,
        path: str | os.PathLike[str] | None = None,
        *,
        adaptive_size: bool | None = None,
        total_num_classes: int | None = None,
        borrow: bool | None = None,
        **options: Any,
    ) -> None:
        self._given(total_num_classes, adaptive_size=adaptive_size, borrow=borrow)
        DataBuffer.__init__(self, max_size, path, **options)


class ExperienceBalancedBuffer(BalancedBuffer):
    """The same number of rows for each experience, and within one a uniform sample. Parameters as
    for `ClassBalancedBuffer`.

    >>> import numpy as np
    >>> from leanreplay import ExperienceBalancedBuffer
    >>> buffer = ExperienceBalancedBuffer(10)
    >>> for size in (100, 200, 300):
    ...     buffer.update([(np.zeros(4), i) for i in range(size)])
    >>> buffer.group_sizes()
    {0: 4, 1: 3, 2: 3}
    """

    policy_class = ExperienceBalancedPolicy
    tag_class = Experience

    def __init__(
        self,
        max_size: int | None = None,
        path: str | os.PathLike[str] | None = None,
        *,
        adaptive_size: bool | None = None,
        num_experiences: int | None = None,
        borrow: bool | None = None,
        **options: Any,
    ) -> None:
        self._given(num_experiences, adaptive_size=adaptive_size, borrow=borrow)
        DataBuffer.__init__(self, max_size, path, **options)

    def add(
        self,
        batch: Any,
        *,
        metadata: Mapping[str, Any] | None = None,
        group: object = None,
        experience: int | Ints | None = None,
        at: int | None = None,
        moved: Moved | None = None,
    ) -> None:
        """As `DataBuffer.add`. experience: number of the experience that the batch is of, or one
        for each sample;
        None: the newest, at first 0. No `group`."""
        _refuse_group(group)
        with self.lock:
            super().add(batch, metadata=metadata, group=self.experience_number(experience, at, 0), at=at, moved=moved)

    def check_batch(
        self, batch: Any, *, metadata: Mapping[str, Any] | None = None, group: object = None, experience: int | None = None
    ) -> None:
        """As `DataBuffer.check_batch`."""
        _refuse_group(group)
        with self.lock:
            super().check_batch(batch, metadata=metadata, group=self.experience_number(experience, None, 0))

    def update(
        self,
        dataset: Any,
        *,
        metadata: Mapping[str, Any] | None = None,
        group: object = None,
        experience: int | None = None,
        at: int | None = None,
    ) -> None:
        """As `DataBuffer.update`. experience: number of the experience that the dataset is; None:
        the next, from 0 on."""
        _refuse_group(group)
        with self.lock:
            super().update(dataset, metadata=metadata, group=self.experience_number(experience, at, 1), at=at)


def _refuse_group(group: object) -> None:
    if group is not None:
        raise ArgumentError("this buffer groups samples by experience: give its number, experience=..., not group=...")


class ClassBalancingReservoirBuffer(BalancedBuffer):
    """Class-balancing reservoir sampling for long-tailed online streams (CBRS; Chrysakis and Moens,
    ICML 2020).

    Fills up with whatever comes, then keeps the classes as equal as the stream allows: small
    classes are held whole, and each of the large ones, which stopped growing when they were the
    largest, is a uniform sample of its stream. The class is the second element of a pair, or
    `group`.

    >>> import numpy as np
    >>> from leanreplay import ClassBalancingReservoirBuffer
    >>> buffer = ClassBalancingReservoirBuffer(100, seed=0)
    >>> buffer.add((np.zeros((1000, 4)), np.repeat([0, 1, 2], [900, 90, 10])))
    >>> buffer.group_sizes()
    {0: 45, 1: 45, 2: 10}
    """

    policy_class = ClassBalancingReservoirPolicy
    __init__ = DataBuffer.__init__  # there are no quotas to give
