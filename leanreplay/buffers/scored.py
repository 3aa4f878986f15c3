"""The buffer with a score per row, which says who leaves and who is drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arguments import choice
from ..arrays import Ints
from ..errors import SchemaError
from ..policies.base import Policy
from ..policies.scored import ADMIT, EVICT, ScoredPolicy
from ..samples.leaves import Field
from ..samples.schema import Schema
from ..storage.store import WritableStore
from .base import DataBuffer
from .feeding import Moved
from .tag import SCORE, Score, checked_scores

_FIELD = Field(f"metadata/{SCORE}", np.dtype(np.float64), ())


class ScoredBuffer(DataBuffer):
    """Samples with scores: numbers that may change while training goes on.

    Once the buffer is full, one of its samples or the new one leaves:

    - evict="lowest": the one of the lowest score; of equal ones the oldest.
    - evict="proportional": each with a chance in proportion to how far its score lies below the
      highest: (top - score) / sum of (top - score). So the highest stays; if all are equal, any
      leaves. This is the law of loss-aware reservoirs (Buzzega et al., ICPR 2020).
    - evict="oldest": the oldest. evict="random": any, each alike.

    admit="reservoir": sample number t of the stream, from 0, enters with the chance
    max_size / (t + 1) only, as in a reservoir; if it does, one of those held leaves, by `evict`.

    Scores are finite float64, "score" in the metadata of samples. They come with every batch, and
    `set_scores`, `set_metadata("score", ...)` and `add(moved=...)` change them. They are part of
    the input: what is held follows from seed, stream and the scores given, however the stream was
    cut. (A tag in `index/group` is part of every checksum of its row, and could not change without
    reading the sample. So scores are metadata, and `index/group` holds labels as elsewhere.)
    Draws: `sample(n, by="score", alpha=0.6)`, of scores that are not negative. It takes 18.3 bytes
    a row in memory, and 9.2 for such draws. `resize` keeps the highest scores, with "oldest" the
    youngest samples. It cannot be merged.

    >>> import numpy as np
    >>> from leanreplay import ScoredBuffer
    >>> buffer = ScoredBuffer(3, evict="lowest")
    >>> buffer.add(np.arange(5), scores=[0.5, 0.1, 0.9, 0.7, 0.3])
    >>> buffer.get_metadata("position"), buffer.get_metadata("score")
    (array([0, 3, 2]), array([0.5, 0.7, 0.9]))
    >>> x, meta = buffer.sample(2)
    >>> buffer.set_scores(meta["idx"], np.zeros(2), positions=meta["position"])
    """

    policy_class = ScoredPolicy
    tag_class = Score

    def __init__(
        self,
        max_size: int | None = None,
        path: str | os.PathLike[str] | None = None,
        *,
        evict: str | None = None,
        admit: str | None = None,
        **options: Any,
    ) -> None:
        given = (("evict", evict, EVICT), ("admit", admit, ADMIT))
        self._params = {name: None if value is None else choice(name, value, allowed) for name, value, allowed in given}
        super().__init__(max_size, path, **options)

    @classmethod
    def _stored_schema(cls, schema: Schema) -> Schema:
        if SCORE not in schema.metadata_names:
            return schema.with_metadata(_FIELD)
        if schema.fields[len(schema.data) + schema.metadata_names.index(SCORE)] != _FIELD:
            raise SchemaError(f"metadata/{SCORE}: this buffer keeps its scores there, one float64 a sample; choose another name")
        return schema

    def add(
        self,
        batch: Any,
        *,
        scores: object = None,
        metadata: Mapping[str, Any] | None = None,
        group: object = None,
        at: int | None = None,
        moved: Moved | None = None,
    ) -> None:
        """As `DataBuffer.add`. scores: (n,) finite numbers, which must be given: here, or as "score"
        in the metadata.

        moved: may hold {"score": (k,) numbers}: those count before the batch comes in.
        """
        super().add(batch, metadata=_with_scores(metadata, scores), group=group, at=at, moved=moved)

    def check_batch(self, batch: Any, *, scores: object = None, metadata: Mapping[str, Any] | None = None, group: object = None) -> None:
        """As `DataBuffer.check_batch`."""
        super().check_batch(batch, metadata=_with_scores(metadata, scores), group=group)

    def update(
        self,
        dataset: Any,
        *,
        scores: object = None,
        metadata: Mapping[str, Any] | None = None,
        group: object = None,
        at: int | None = None,
    ) -> None:
        """As `DataBuffer.update`, with the scores of the whole dataset, as for `add`."""
        super().update(dataset, metadata=_with_scores(metadata, scores), group=group, at=at)

    def set_scores(self, rows: object, scores: object, *, positions: object = None) -> None:
        """Overwrite the scores of these rows, in one commit; see `set_metadata`.

        scores: (n,) finite numbers. positions: skip rows that no longer hold the sample of that
        stream position, meta["position"] of the draw.
        """
        self.set_metadata(SCORE, scores, rows, positions=positions)

    def _rows_to_keep(self, store: WritableStore, policy: Policy, size: int, live: Ints) -> Ints:
        positions, scores = self.feeder.policys_index(store)
        return policy.keep(size, positions[live], scores[live])


def _with_scores(metadata: Mapping[str, Any] | None, scores: object) -> Mapping[str, object]:
    """Metadata with the scores in it."""
    if metadata is not None and not isinstance(metadata, Mapping):
        return metadata  # which is refused
    if metadata and SCORE in metadata:
        if scores is not None:
            raise SchemaError(f"metadata/{SCORE}: the scores are given twice, as scores= too")
        scores = metadata[SCORE]
    return {**(metadata or {}), SCORE: checked_scores(scores)}
