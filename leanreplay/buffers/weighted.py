"""The reservoir whose samples have weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ArgumentError, SchemaError
from ..policies.weighted import WeightedReservoirPolicy
from ..samples.schema import Schema
from .base import DataBuffer
from .feeding import Moved
from .tag import Weight


class WeightedReservoirBuffer(DataBuffer):
    """A weighted sample without replacement of everything seen.

    As if `max_size` samples were drawn one after the other, each with a chance in proportion to its
    weight among those not yet drawn (Efraimidis and Spirakis, Information Processing Letters 2006).

    Weights come with every batch, (n,) numbers, finite and not negative; only their ratios matter.
    A sample of weight 0 is never kept. The weights of what is kept are "weight" in the metadata of
    samples, float64. Costs as `ReservoirBuffer`, and 70 ns for a sample that may stay.
    `index/group` of the file holds the bits of the weights.

    >>> import numpy as np
    >>> from leanreplay import WeightedReservoirBuffer
    >>> buffer = WeightedReservoirBuffer(100, seed=0)
    >>> buffer.add(np.arange(1000), weights=np.where(np.arange(1000) < 500, 9.0, 1.0))
    >>> x, meta = buffer.sample(4)
    >>> sorted(meta), bool((meta["weight"] == np.where(x < 500, 9.0, 1.0)).all())
    (['idx', 'position', 'weight'], True)
    >>> bool((buffer.get_metadata("weight") == 9.0).sum() > 80)
    True
    """

    policy_class = WeightedReservoirPolicy
    tag_class = Weight

    @classmethod
    def _stored_schema(cls, schema: Schema) -> Schema:
        if "weight" in schema.metadata_names:
            raise SchemaError("metadata/weight: this buffer keeps the weights themselves under that name; choose another")
        return schema

    def add(
        self,
        batch: Any,
        *,
        weights: object = None,
        metadata: Mapping[str, Any] | None = None,
        group: object = None,
        at: int | None = None,
        moved: Moved | None = None,
    ) -> None:
        """As `DataBuffer.add`. weights: (n,) numbers, which must be given: finite, 0 or more. No
        `group`.

        Raises ArgumentError, naming the row, for a negative, infinite or NaN weight, and
        SchemaError for weights of another length or type; nothing of that batch is kept.

        >>> import numpy as np
        >>> from leanreplay import WeightedReservoirBuffer
        >>> buffer = WeightedReservoirBuffer(2)
        >>> buffer.add(np.arange(4), weights=[0, 0.5, 0, 1e-300])
        >>> buffer.get_metadata("position"), buffer.seen
        (array([1, 3]), 4)
        """
        _refuse_groups(group)
        super().add(batch, metadata=metadata, group=weights, at=at, moved=moved)

    def check_batch(self, batch: Any, *, weights: object = None, metadata: Mapping[str, Any] | None = None, group: object = None) -> None:
        """As `DataBuffer.check_batch`."""
        _refuse_groups(group)
        super().check_batch(batch, metadata=metadata, group=weights)

    def update(
        self,
        dataset: Any,
        *,
        weights: object = None,
        metadata: Mapping[str, Any] | None = None,
        group: object = None,
        at: int | None = None,
    ) -> None:
        """As `DataBuffer.update`, with the weights of the whole dataset, as for `add`."""
        _refuse_groups(group)
        super().update(dataset, metadata=metadata, group=weights, at=at)


def _refuse_groups(group: object) -> None:
    if group is not None:
        raise ArgumentError("a weighted reservoir has no groups; give weights=(n,) numbers")
