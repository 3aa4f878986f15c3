"""What the buffer takes from a learner: looked at before the step, when a batch can still be refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...buffers.balanced import ExperienceBalancedBuffer
from ...buffers.base import DataBuffer
from ...buffers.exemplars import ParametricBuffer
from ...buffers.weighted import WeightedReservoirBuffer
from ...errors import ArgumentError, ModeError, SchemaError
from ...policies.base import Policy
from ...samples.schema import check_leaf
from .pending import Batch

_PAIRS = (["tuple", ["leaf", 0], ["leaf", 1]], ["list", ["leaf", 0], ["leaf", 1]])


class Intake:
    """Checks each kind of batch, and of metadata with it, the first time that it comes.

    learner: its class, for messages. store: whether batches are offered to the buffer.
    """

    def __init__(self, buffer: DataBuffer, learner: str) -> None:
        self.buffer, self.learner, self.store = buffer, learner, False
        self.by_task = isinstance(buffer, ExperienceBalancedBuffer)
        self._may_refuse_labels = buffer.policy_class.check_groups is not Policy.check_groups
        self.forget()

    def forget(self) -> None:
        """Check all kinds anew: the buffer may be another one, or `store` has changed."""
        self._kind: Any = None
        self._metadata: Any = None

    def set_store(self, value: bool) -> None:
        """Raise ArgumentError or ModeError if batches are to be offered to a buffer that cannot take them."""
        if not isinstance(value, bool):
            raise ArgumentError(f"store must be True or False, got {value!r:.200}")
        if value and isinstance(self.buffer, (ParametricBuffer, WeightedReservoirBuffer)):
            raise ArgumentError(
                f"a learner has no features or weights to give to a {type(self.buffer).__name__} with each batch; use a buffer "
                "that needs none, such as a ReservoirBuffer, or only replay from this one: store=False"
            )
        if value and self.buffer.mode == "r":
            raise ModeError(
                f"a learner adds to its buffer, but this one is open for reading only: {self.buffer!r}; open it with mode='r+', or only "
                "replay from it: store=False"
            )
        schema = self.buffer.schema
        if value and schema is not None and schema.label_field is None:
            self._refuse_classes(f"the samples that it holds, {schema}, have no label that is an integer")
        self.store = value
        self.forget()

    def _refuse_classes(self, why: str) -> None:
        """Raise ArgumentError if the buffer needs classes."""
        if self.buffer.policy_class.needs_groups and not self.by_task:
            raise ArgumentError(
                f"{type(self.buffer).__name__} balances over classes, but {why}; use a buffer that needs no classes, such as a "
                "ReservoirBuffer or an ExperienceBalancedBuffer"
            )

    def kind(self, x: torch.Tensor, y: torch.Tensor, pending: Sequence[Batch]) -> Any:
        """Shapes and dtypes of the samples of a batch, checked.

        Raises SchemaError for a batch that the buffer would refuse after the step, ArgumentError for a
        buffer of something else.
        """
        kind = x.shape[1:], x.dtype, y.shape[1:], y.dtype
        if kind == self._kind:
            return kind
        if self.store and (y.ndim != 1 or y.is_floating_point() or y.dtype is torch.bool):
            self._refuse_classes(f"labels are {y.dtype} of shape {tuple(y.shape)}, where integers (n,) are expected")
        waiting = next((batch.kind for batch in pending if batch.offered and self.store), kind)
        if kind != waiting:
            raise SchemaError(f"samples of shapes and dtypes {kind}, but those that wait for after_step have {waiting}")
        schema = self.buffer.schema
        if schema is not None:
            if schema.structure not in _PAIRS:
                raise ArgumentError(f"a learner needs a buffer of pairs (x, y) of arrays, but this one's samples are {schema}")
            for leaf, field in zip((x, y), schema.data, strict=True) if self.store else ():
                check_leaf(leaf, field, x.shape[0])
        self._kind = kind
        return kind

    def is_new(self, stored: Mapping[str, Any], n: int) -> bool:
        """Whether metadata for n samples is of another kind than the last checked, or labels may be refused for their values."""
        self._asked = (n, [(name, getattr(v, "shape", None), getattr(v, "dtype", None)) for name, v in stored.items()]) if stored else ()
        return self._asked != self._metadata or (self._may_refuse_labels and self.store)

    def check_names(self, stored: Mapping[str, Any]) -> None:
        """Raise ArgumentError for metadata that the buffer does not have. To be called before the terms read theirs."""
        for name, value in stored.items():
            if not isinstance(value, torch.Tensor):
                raise ArgumentError(f"a term stores a {type(value).__name__} as {name!r}; keep must return name -> tensor (n, ...)")
        schema = self.buffer.schema
        if schema is None:
            return
        names = schema.metadata_names
        if self.store and sorted(stored) != names:
            raise ArgumentError(
                f"{self.learner} stores the metadata {sorted(stored)} with each sample, but the buffer has {names}; "
                "use a new buffer, or one that such a learner filled"
            )
        if not set(stored) <= set(names):
            raise ArgumentError(
                f"{self.learner} replays samples with the metadata {sorted(stored)}, but the buffer has {names}; "
                "use one that such a learner filled"
            )

    def check_values(self, batch: Batch, stored: dict[str, torch.Tensor], pending: Sequence[Batch]) -> None:
        """Raise what the buffer would raise after the step. To be called after the losses: terms say more clearly what is wrong."""
        if self.store:
            waiting = next((b.stored for b in pending if b.offered), stored)
            shapes, others = ({name: (tuple(v.shape[1:]), v.dtype) for name, v in each.items()} for each in (stored, waiting))
            if shapes != others:
                raise SchemaError(f"terms store {shapes} with this batch, but with those that wait for after_step {others}")
            options: dict[str, Any] = {"experience": batch.experience} if self.by_task else {}
            self.buffer.check_batch((batch.x, batch.y), metadata=stored or None, **options)
        self._metadata = self._asked
