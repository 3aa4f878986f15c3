"""What `fit` measures: on the validation set, on what is kept of earlier ones, and in each step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ...arguments import instance
from ...buffers.base import DataBuffer
from ...errors import ArgumentError, ModeError
from .. import nests
from ..data import BufferDataset
from ..distributed import gather, rank_and_size
from ..learners import ReplayLearner
from ..learners.intake import Experiences
from .evaluation import evaluating, predictions
from .reading import Reader, piece

Metrics = Mapping[str, Callable[[Any, Any], Any]]


class Validation:
    """The validation set of a task, and a memory of those of earlier tasks.

    memory: a buffer that is offered the whole set when its task has ended; None: nothing is kept.
    task_id: the task's, for a memory that is balanced over experiences. Raises what the memory
    would raise when it is offered these samples.
    """

    def __init__(self, reader: Reader, memory: DataBuffer | None, task_id: int | str | None) -> None:
        self.reader, self.memory, self.task_id = reader, memory, task_id
        if memory is not None:
            instance(memory, DataBuffer, "val_memory must be a buffer of leanreplay")
            if memory.mode == "r":
                raise ModeError(f"val_memory takes samples when a task ends, but it is open for reading only: {memory!r}")
            memory.check_batch(self._samples(0, 1), **self._options(memory))

    def readers(self) -> list[Reader]:
        """The set, and what the memory holds."""
        if self.memory is None or not len(self.memory):
            return [self.reader]
        return [self.reader, Reader("val_memory", BufferDataset(self.memory), None, self.reader.transforms)]

    def remember_task(self) -> None:
        """Offer the set to the memory, as it is before transforms."""
        if self.memory is not None:
            options = self._options(self.memory)
            for start in range(0, len(self.reader), 256):
                self.memory.add(self._samples(start, start + 256), **options)

    def _options(self, memory: DataBuffer) -> dict[str, Any]:
        """For `add`: the number of the task, where the memory balances over experiences."""
        experiences = Experiences(memory)
        experiences.start(self.task_id)
        return {} if experiences.now is None else {"experience": experiences.now}

    def _samples(self, start: int, stop: int) -> tuple[Any, Any]:
        return self.reader.samples(np.arange(start, min(stop, len(self.reader))))


def validate(
    learner: ReplayLearner,
    readers: list[Reader],
    metrics: Metrics,
    batch_size: int,
    device: torch.device,
    cast: Callable[[], contextlib.AbstractContextManager[Any]],
) -> dict[str, float]:
    """Compute loss and metrics on all sets at once, as "val_<name>".

    Each rank computes the outputs of its part, and all get the same numbers. cast: makes the
    context of the forward passes.
    """
    rank, ranks = rank_and_size()
    model = learner.evaluated_model
    parts: list[tuple[Any, Any]] = []
    with evaluating(model):
        with cast():
            for reader in readers:
                indices = piece(np.arange(len(reader)), rank, ranks)
                parts += predictions(model, reader, indices, batch_size, device, learner.forward)
        if ranks > 1:
            parts = [nests.placed(part, device) for parts in gather(nests.placed(parts, torch.device("cpu"))) for part in parts]
        outputs, targets = nests.joined(parts)
        outputs = _widened(outputs)
        try:
            values = {"val_loss": float(learner.loss_fn(nests.copied(outputs), nests.copied(targets)))}
        except (IndexError, RuntimeError) as error:
            raise ArgumentError(
                f"{readers[0].name}: the learner's loss_fn does not take outputs, {nests.described(outputs)}, and targets, "
                f"{nests.described(targets)}: {str(error).splitlines()[0]:.200}; map them with test_target_transform"
            ) from error
        return values | {f"val_{name}": value for name, value in measured("metrics", metrics, outputs, targets).items()}


def measured(argument: str, metrics: Metrics, outputs: Any, targets: Any) -> dict[str, float]:
    """The value of each metric, by name. argument: which they are of, for messages."""
    values: dict[str, float] = {}
    for name, function in metrics.items():
        value = function(nests.copied(_widened(outputs)), nests.copied(targets))  # it may work in place
        try:
            values[name] = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise ArgumentError(f"{argument}[{name!r}] must give a number, got {value!r:.200}") from None
    return values


def _widened(outputs: Any) -> Any:
    """Outputs of autocast as float32, which all metrics take."""
    return nests.each_leaf(lambda leaf: leaf.float() if leaf.dtype in (torch.bfloat16, torch.float16) else leaf, outputs)
