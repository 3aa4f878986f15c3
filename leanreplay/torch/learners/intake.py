"""Whether the buffer takes what a learner offers: after the step it is too late to ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...buffers.balanced import ExperienceBalancedBuffer
from ...buffers.base import DataBuffer
from ...buffers.exemplars import ParametricBuffer
from ...buffers.weighted import WeightedReservoirBuffer
from ...errors import ArgumentError, ModeError, SchemaError
from ...policies.base import Policy
from ...samples.leaves import check_leaf
from .. import nests
from .pending import Batch
from .term import is_labels


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
        """Begin or end to offer batches. Raises an error if the buffer cannot take any."""
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

    def kind(self, x: Any, y: Any, pending: Sequence[Batch]) -> Any:
        """Shapes and dtypes of the samples of a batch, checked.

        Raises SchemaError for a batch that the buffer would refuse after the step, ArgumentError
        for a buffer of something else.
        """
        kind = nests.kind(x), nests.kind(y)
        if kind == self._kind:
            return kind
        if self.store and (not is_labels(y) or y.dtype is torch.bool):
            self._refuse_classes(f"labels are {nests.described(y)}, where integers (n,) are expected")
        waiting = next((batch.kind for batch in pending if batch.offered and self.store), kind)
        if kind != waiting:
            raise SchemaError(f"samples of shapes and dtypes {kind}, but those that wait for after_step have {waiting}")
        schema = self.buffer.schema
        if schema is not None:
            if schema.structure[0] not in ("tuple", "list") or len(schema.structure) != 3:
                raise ArgumentError(f"a learner needs a buffer of pairs (x, y), but this one's samples are {schema}")
            for leaf, field in zip(schema.flatten((x, y)), schema.data, strict=True) if self.store else ():
                check_leaf(leaf, field, nests.first(x).shape[0])
        self._kind = kind
        return kind

    def is_new(self, stored: Mapping[str, Any], n: int) -> bool:
        """Whether this metadata of n samples must be checked: its kind is new, or labels matter."""
        self._asked = (n, [(name, getattr(v, "shape", None), getattr(v, "dtype", None)) for name, v in stored.items()]) if stored else ()
        return self._asked != self._metadata or (self._may_refuse_labels and self.store)

    def check_names(self, stored: Mapping[str, Any]) -> None:
        """Raise ArgumentError for metadata that the buffer lacks; before terms read theirs."""
        for name, value in stored.items():
            if not isinstance(value, Tensor):
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

    def check_values(self, batch: Batch, stored: dict[str, Tensor], pending: Sequence[Batch]) -> None:
        """Raise what the buffer would raise after the step. Terms' errors are clearer."""
        if self.store:
            waiting = next((b.stored for b in pending if b.offered), stored)
            shapes, others = ({name: (tuple(v.shape[1:]), v.dtype) for name, v in each.items()} for each in (stored, waiting))
            if shapes != others:
                raise SchemaError(f"terms store {shapes} with this batch, but with those that wait for after_step {others}")
            options: dict[str, Any] = {"experience": batch.experience} if self.by_task else {}
            self.buffer.check_batch(batch.pair, metadata=stored or None, **options)
        self._metadata = self._asked


class Experiences:
    """Numbers tasks as experiences; for other buffers there are none.

    A task that is a number is the experience of that number. A task with another name, or without
    one, gets the next number, and a name keeps its number. now: the experience of the task that is
    going on.
    """

    def __init__(self, buffer: DataBuffer) -> None:
        self._buffer = buffer if isinstance(buffer, ExperienceBalancedBuffer) else None
        self.now: int | None = None
        self._named: dict[str, int] = {}

    def start(self, task: int | str | None) -> None:
        """A task begins."""
        if self._buffer is None:
            return
        number = task if isinstance(task, int) else self._named.get(task) if task is not None else None
        if number is None:  # beyond what the buffer holds, and what has stored nothing yet
            begun = [*self._named.values(), *([] if self.now is None else [self.now])]
            number = max([int(self._buffer.experience_number(None, None, 1)), *(n + 1 for n in begun)])
            if isinstance(task, str):
                self._named[task] = number
        self.now = number

    def check(self) -> None:
        """Raise ArgumentError if the buffer needs experiences and no task has begun."""
        if self._buffer is not None and self.now is None:
            raise ArgumentError(
                f"{type(self._buffer).__name__} keeps the same number of samples of each task, but no task has begun: call "
                "on_task_start(task) before the first batch of each, as fit does"
            )

    def state(self) -> dict[str, Any]:
        """For the learner's state."""
        return {"experience": self.now, "experiences": [[name, number] for name, number in self._named.items()]}

    def load(self, state: Any) -> None:
        """Take a learner's state."""
        self.now, self._named = state["experience"], dict(state["experiences"])
