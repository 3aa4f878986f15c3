"""The reservoir whose samples have weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arguments import plain_array
from ..arrays import Ints
from ..errors import ArgumentError, RowError, SchemaError
from ..policies.weighted import WeightedReservoirPolicy
from ..samples.batch import Batch
from ..samples.dataset import as_dataset
from ..samples.schema import Schema
from ..storage.layout import Table
from .base import DataBuffer


def checked_weights(weights: Any, n: int) -> Ints:
    """The bits of n weights, a copy. Raises SchemaError for anything but n numbers, ArgumentError
    for a negative or non-finite one."""
    if weights is None:
        raise ArgumentError("a weighted reservoir needs weights=(n,) numbers with every batch; use ReservoirBuffer for equal ones")
    array = plain_array(weights, "weights")
    if array.shape != (n,) or (array.dtype.kind not in "iufb" and n):
        raise SchemaError(f"weights: expected {n} real numbers, got {array.dtype} of shape {array.shape}")
    with np.errstate(over="ignore"):  # of a longdouble: it is then infinite, which is refused
        found = array.astype(np.float64)
    wrong = np.flatnonzero(~((found >= 0) & (found < np.inf)))
    if wrong.shape[0]:
        i = int(wrong[0])
        raise ArgumentError(
            f"weights[{i}] is {found[i]} ({wrong.shape[0]} of {n} are wrong): weights must be finite and not negative; 0 never stays"
        )
    return found.view(np.int64)


class WeightedReservoirBuffer(DataBuffer):
    """A weighted sample without replacement of everything seen: as if `max_size` samples were drawn
    one after the other, each with a chance in proportion to its weight among those not yet drawn
    (Efraimidis and Spirakis, Information Processing Letters 2006).

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

    def add(  # type: ignore[override]
        self,
        batch: Any,
        *,
        weights: Any = None,
        metadata: Mapping[str, Any] | None = None,
        at: int | None = None,
    ) -> None:
        """As `DataBuffer.add`. weights: (n,) numbers, which must be given: finite, 0 or more.

        Raises ArgumentError, naming the row, for a negative, infinite or NaN weight, and
        SchemaError for weights of another length or type; nothing of that batch is kept.

        >>> import numpy as np
        >>> from leanreplay import WeightedReservoirBuffer
        >>> buffer = WeightedReservoirBuffer(2)
        >>> buffer.add(np.arange(4), weights=[0, 0.5, 0, 1e-300])
        >>> buffer.get_metadata("position"), buffer.seen
        (array([1, 3]), 4)
        """
        super().add(batch, metadata=metadata, group=weights, at=at)

    def check_batch(  # type: ignore[override]
        self, batch: Any, *, weights: Any = None, metadata: Mapping[str, Any] | None = None
    ) -> None:
        """As `DataBuffer.check_batch`."""
        super().check_batch(batch, metadata=metadata, group=weights)

    def update(  # type: ignore[override]
        self,
        dataset: Any,
        *,
        weights: Any = None,
        metadata: Mapping[str, Any] | None = None,
        at: int | None = None,
    ) -> None:
        """As `DataBuffer.update`, with the weights of the whole dataset, as for `add`."""
        dataset = as_dataset(dataset)
        super().update(dataset, metadata=metadata, group=checked_weights(weights, len(dataset)), at=at)

    def _groups(self, batch: Batch, schema: Schema, group: Any) -> Ints:
        return checked_weights(group, batch.n)

    def _plan_file(
        self, params: dict[str, Any], size: int, seed: int, stream: int, schema: Schema, identity: str, slots: int = 0
    ) -> tuple[Table, list[tuple[int, bytes]]]:
        if "weight" in schema.metadata_names:
            raise SchemaError("metadata/weight: this buffer keeps the weights themselves under that name; choose another")
        return super()._plan_file(params, size, seed, stream, schema, identity, slots)

    def _index_meta(self, index: Ints) -> dict[str, Any]:
        return {"position": index[0], "weight": index[1].view(np.float64)}

    def get_metadata(self, name: str, rows: Any = None) -> np.ndarray[Any, Any]:
        """As `DataBuffer.get_metadata`, and "weight", float64."""
        if name != "weight":
            return super().get_metadata(name, rows)
        with self._lock:
            store = self._require()
            if store is None:
                raise RowError("the buffer is empty: it has no schema before its first batch")
            found = self._all_rows(store) if rows is None else self._live(store, rows)
            _, index = store.read(found, self._metadata_index(store, None))
            return index[1].copy().view(np.float64)
