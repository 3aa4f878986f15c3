"""What `fit` was asked for, checked: its arguments as the values that a run works with."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import ConcatDataset, StackDataset, Subset

from ...arguments import choice, function_or_none, number, required
from ...buffers.base import DataBuffer
from ...buffers.groups import Group, Groups
from ...errors import ArgumentError, LossError
from .. import distributed
from ..data import BufferDataset
from ..learners import ReplayLearner
from .reading import EpochBatches
from .states import StateFolder
from .validation import Metrics, Validation

TaskId = int | str | None
Cast = Callable[[], contextlib.AbstractContextManager[Any]]

# Datasets whose samples are those of their attributes.
_VIEWS = (BufferDataset, Group, Groups, Subset, ConcatDataset, StackDataset)


@dataclass(frozen=True)
class Watch:
    """What is measured besides the loss, and what the values of validation decide.

    monitor: the watched quantity's name in records; None if nothing depends on one. mode: whether
    "min" or "max" is good. patience: how many epochs without a better value end the training.
    """

    metrics: Metrics
    train_metrics: Metrics
    monitor: str | None
    mode: str
    patience: int | None
    restore_best: bool


@dataclass(frozen=True)
class Settings:
    """The arguments of `fit`, checked. What is not explained here has the name that it has there.

    replayed: samples of each draw. batches: those of one epoch. store: False if the learner says
    so. validation: `val_dataset` and `val_memory`. clip: what is called before each step of the
    optimizer. cast: makes the context of each forward pass. scaler: of gradients, if any.
    """

    learner: ReplayLearner
    task_id: TaskId
    max_epochs: int
    batch_size: int
    replayed: int
    batches: EpochBatches
    store: str | bool
    scheduler: Any
    scheduler_interval: str
    clip: Callable[..., None] | None
    validation: Validation | None
    watch: Watch
    device: torch.device
    cast: Cast
    scaler: Any
    precision: str
    deterministic: bool
    seed: int
    input: StateFolder | None
    output: StateFolder | None
    save_every: int | None
    save_buffer: bool
    logger: Callable[[dict[str, Any]], Any] | None
    progress: bool

    def __post_init__(self) -> None:
        """Check what several arguments make together."""
        function_or_none("logger", self.logger)
        buffer, reader = self.learner.buffer, self.batches.reader
        if self.store and reads_buffer(reader.dataset, buffer):
            raise ArgumentError(
                "train_dataset has rows of the learner's own buffer, which would be offered to it once more; give store=False, and where "
                "other samples are to be stored, train on these alone: the buffer is replayed anyway"
            )
        if self.has_plateau and (self.scheduler_interval != "epoch" or self.validation is None):
            raise ArgumentError("ReduceLROnPlateau needs a val_dataset and scheduler_interval='epoch'")
        if self.has_plateau and self.scheduler.mode != self.watch.mode:
            raise ArgumentError(
                f"ReduceLROnPlateau(mode={self.scheduler.mode!r}) would watch a metric for which mode={self.watch.mode!r}; "
                "give both the same"
            )
        if self.buffers.get("val_memory") is buffer:
            raise ArgumentError("val_memory is the learner's own buffer; give another one")
        distributed.check_ranks(self.learner.module, buffer)
        len(buffer)  # an error for one that is closed
        if self.output is not None and not self.save_buffer and any(b.path is None for b in self.buffers.values()):
            raise ArgumentError("output_state_folder: a buffer in memory ends with its process; give it a path, or save_buffer=True")

    @property
    def has_plateau(self) -> bool:
        """Whether the scheduler is one that gets the metric."""
        return isinstance(self.scheduler, ReduceLROnPlateau)

    @property
    def buffers(self) -> dict[str, DataBuffer]:
        """The buffers that a run changes, by the names that their copies have in a state."""
        memory = None if self.validation is None else self.validation.memory
        return {"buffer": self.learner.buffer} | ({} if memory is None else {"val_memory": memory})

    @property
    def parts(self) -> dict[str, Any]:
        """What a state holds the `state_dict` of, by name, beside those with a buffer."""
        parts: dict[str, Any] = {"model": self.learner.module, "optimizer": self.learner.optimizer}
        parts |= {"scheduler": self.scheduler, "scaler": self.scaler}
        return {name: part for name, part in parts.items() if part is not None}

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same where a run goes on from a state, by the names that errors give
        it."""
        return {
            "seed": self.seed,
            "samples": len(self.batches.reader),
            "new samples a step": self.batches.size,
            "replayed ones": self.replayed,
            "processes": self.batches.ranks,
            "store": self.store,
            "restore_best": f"{self.watch.mode} {self.watch.monitor}" if self.watch.restore_best else False,
            "precision": self.precision,
            "val_memory": len(self.buffers) > 1,
            "optimizer": type(self.learner.optimizer).__name__,
            "scheduler": type(self.scheduler).__name__,
        }


def shares(batch_size: Any, fraction: Any, learner: ReplayLearner, store: Any) -> tuple[int, int]:
    """How many samples of a step are new, and how many are replayed.

    No more are replayed than the buffer can ever hold: what it holds now, if nothing is stored.
    """
    size = required("batch_size", batch_size, 1, 2**40)
    if fraction is None:
        return size, learner.replay_batch_size
    replayed = math.floor(size * number("batch_memory_frac", fraction, 0, 1) + 0.5)
    replayed = max(replayed, 1) if fraction > 0 else 0
    if replayed >= size:
        raise ArgumentError(
            f"batch_size={size} with batch_memory_frac={fraction} leaves no room for new samples; lower the fraction, or raise batch_size"
        )
    most = learner.buffer.max_size if store else len(learner.buffer)
    replayed = replayed if most is None else min(replayed, most)
    return size - replayed, replayed


def reads_buffer(dataset: Any, buffer: DataBuffer) -> bool:
    """Whether samples of a dataset are this buffer's, read through this object or another one.

    They are where the dataset is the buffer, or a view of it, or has such a view in an attribute,
    at any depth. A buffer in an attribute of any other dataset may serve another purpose: it does
    not count.
    """
    seen: dict[int, Any] = {}
    waiting = [(dataset, True)]  # and whether a buffer there is where samples come from
    while waiting and len(seen) <= 10_000:
        value, is_source = waiting.pop()
        if id(value) in seen:
            continue
        if isinstance(value, DataBuffer):
            if is_source and (value is buffer or value.parameters.identity == buffer.parameters.identity):
                return True
            continue
        seen[id(value)] = value
        if isinstance(value, MethodType):
            waiting.append((value.__self__, is_source))
        elif isinstance(value, (list, tuple, set, dict)):
            values = value.values() if isinstance(value, dict) else value
            waiting += [(v, is_source) for v in values] if len(value) < 1000 else []
        elif not isinstance(value, (torch.Tensor, np.ndarray, str, bytes)):
            values = getattr(value, "__dict__", {}).values()
            waiting += [(v, isinstance(value, _VIEWS)) for v in values if hasattr(v, "__getitem__") or isinstance(v, (set, MethodType))]
    return False


def checked_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer) -> Any:
    """Return a scheduler of this optimizer, or None."""
    if scheduler is None:
        return None
    methods = ("step", "state_dict", "load_state_dict")
    if isinstance(scheduler, type) or not all(callable(getattr(scheduler, name, None)) for name in methods):
        raise ArgumentError(f"scheduler must be a torch learning rate scheduler, made with learner.optimizer, got {scheduler!r:.200}")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ArgumentError("scheduler belongs to another optimizer than the learner's; make it with learner.optimizer")
    return scheduler


def clipping(value: Any, algorithm: Any, optimizer: torch.optim.Optimizer) -> Callable[..., None] | None:
    """The function that clips gradients before a step of the optimizer, or None."""
    choice("gradient_clip_algorithm", algorithm, (None, "norm", "value"))
    if value is None:
        if algorithm is not None:
            raise ArgumentError(f"gradient_clip_algorithm={algorithm!r} needs a gradient_clip_val")
        return None
    limit = number("gradient_clip_val", value, 0, math.inf)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ArgumentError("gradient_clip_val: LBFGS computes gradients within its step, where nothing clips them; leave it out")

    def clip(*_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, limit)
            return
        try:
            torch.nn.utils.clip_grad_norm_(parameters, limit, error_if_nonfinite=True)
        except RuntimeError as error:
            raise LossError(f"{error}; this step was not made, and its batch not stored") from None

    return clip


def watching(
    metric: Any,
    mode: Any,
    early_stopping: Any,
    restore_best: Any,
    metrics: Any,
    train_metrics: Any,
    validation: Validation | None,
    scheduler: Any,
) -> Watch:
    """What to watch. Raises ArgumentError where something is to be watched without a validation
    set."""
    choice("mode", mode, ("min", "max"))
    _check_metrics("metrics", metrics, lambda name: name == "loss")
    _check_metrics("train_metrics", train_metrics, lambda name: name in ("loss", "lr", "epoch") or name.startswith(("val_", "loss/")))
    patience = None if early_stopping is False else 5 if early_stopping is True else required("early_stopping", early_stopping, 1, 2**31)
    names = ["loss", *(metrics or {})]
    if metric is not None and metric not in names:
        raise ArgumentError(f"metric is one of {', '.join(names)}, got {metric!r:.200}")
    choice("restore_best", restore_best, (True, False))
    given = {"metrics": metrics, "early_stopping": patience, "restore_best": restore_best, f"metric={metric!r}": metric}
    asked = [name for name, value in given.items() if value]
    if validation is None and asked:
        raise ArgumentError(f"{asked[0]}: there is nothing to measure it on; give a val_dataset")
    watches = metric is not None or patience or restore_best or isinstance(scheduler, ReduceLROnPlateau)
    return Watch(metrics or {}, train_metrics or {}, f"val_{metric or 'loss'}" if watches else None, mode, patience, restore_best)


def _check_metrics(argument: str, metrics: Any, is_taken: Callable[[str], bool]) -> None:
    """Raise ArgumentError unless these are functions by names of their own."""
    if metrics is None:
        return
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) and callable(f) for name, f in metrics.items()):
        raise ArgumentError(f"{argument} must be a dict: name -> function(outputs, targets), got {metrics!r:.200}")
    for name in filter(is_taken, metrics):
        raise ArgumentError(f"{argument}: {name!r} is a quantity of fit's own; give this one another name")


def autocast(precision: Any, device: torch.device, optimizer: torch.optim.Optimizer) -> tuple[Cast, Any]:
    """What makes the context of each forward pass; then the scaler of gradients, if there is to be
    one."""
    choice("precision", precision, ("32", "bf16", "fp16"))
    if precision == "32":
        return contextlib.nullcontext, None
    if precision == "bf16":
        if device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise ArgumentError(f"precision='bf16': {torch.cuda.get_device_name(device)} has no bfloat16; use precision='fp16' or '32'")
        return lambda: torch.autocast(device.type, torch.bfloat16), None
    if not hasattr(torch.amp, "GradScaler"):
        raise ArgumentError(f"precision='fp16' needs torch 2.3 or later, but this is {torch.__version__}; use precision='bf16'")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ArgumentError("precision='fp16': a scaler of gradients takes no optimizer with a closure, such as LBFGS; use 'bf16'")
    return lambda: torch.autocast(device.type, torch.float16), torch.amp.GradScaler(device.type)


def place(learner: ReplayLearner, device: torch.device) -> None:
    """Move a learner's model, its copies, and the optimizer's state to a device."""
    if all(p.device == device for p in learner.module.parameters()):
        return
    learner.module.to(device)
    for module in (module for term in learner.terms for module in term.modules()):
        module.to(device)
    learner.optimizer.load_state_dict(learner.optimizer.state_dict())  # which goes where its parameters are
