"""fit: a short loop around `learner.step`, for people who have none; resumed exactly after a kill."""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
import os
import random
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...arguments import choice, function_or_none, instance, integer, number, required
from ...buffers.base import DataBuffer
from ...errors import ArgumentError, ExistsError, LossError, MissingError, StateError
from ...keys import key_pair
from .. import distributed
from ..learners import ReplayLearner
from ..loading.interleaved import ShuffleSampler
from .evaluation import device_of, evaluating, predictions
from .reading import Reader
from .states import StateFolder

TaskId = int | str | None

# Which state each learner is at: (folder, number) of the one that it wrote or loaded last.
_AT: weakref.WeakKeyDictionary[ReplayLearner, tuple[str, int]] = weakref.WeakKeyDictionary()


@dataclass
class History:
    """What `fit` saw, epoch by epoch. `history["loss"]` is one quantity over the epochs.

    records: a dict for each epoch: "epoch" (from 0), "lr" (of the first parameter group, at the epoch's end), "loss" and "loss/<term>"
    (means over the new samples, of the losses before each step), and with a validation set "val_loss" and "val_<metric>".
    monitor, mode: the quantity that early stopping looks at, if any. stopped_early: whether training ended before `max_epochs`.
    """

    task_id: TaskId = None
    records: list[dict[str, Any]] = field(default_factory=list)
    monitor: str | None = None
    mode: str = "min"
    stopped_early: bool = False

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, name: str) -> list[Any]:
        if not any(name in record for record in self.records):
            raise ArgumentError(
                f"no {name!r} in this history; it has {', '.join(sorted({k for r in self.records for k in r})) or 'no epochs'}"
            )
        return [record.get(name, math.nan) for record in self.records]

    @property
    def best_epoch(self) -> int | None:
        """The first epoch with the best value of the monitored quantity; None without one. NaN is never best."""
        if self.monitor is None:
            return None
        sign = 1 if self.mode == "min" else -1
        values = [(sign * record.get(self.monitor, math.nan), epoch) for epoch, record in enumerate(self.records)]
        return min((v for v in values if not math.isnan(v[0])), default=(0, None))[1]

    @property
    def best(self) -> float | None:
        """The best value of the monitored quantity."""
        epoch = self.best_epoch
        return None if epoch is None or self.monitor is None else self.records[epoch][self.monitor]


def fit(
    learner: ReplayLearner,
    train_dataset: Any,
    *,
    val_dataset: Any = None,
    max_epochs: int = 50,
    batch_size: int = 32,
    batch_memory_frac: float | None = 0.5,
    store: str | bool = "first epoch",
    scheduler: Any = None,
    scheduler_interval: str = "epoch",
    metric: str | None = None,
    mode: str = "min",
    early_stopping: bool | int = False,
    restore_best: bool = False,
    metrics: Mapping[str, Callable[[torch.Tensor, torch.Tensor], Any]] | None = None,
    gradient_clip_val: float | None = None,
    gradient_clip_algorithm: str | None = None,
    precision: str = "32",
    train_collate_fn: Callable[[list[Any]], Any] | None = None,
    val_collate_fn: Callable[[list[Any]], Any] | None = None,
    test_transform: Callable[[Any], Any] | None = None,
    test_target_transform: Callable[[Any], Any] | None = None,
    test_batch_transform: Callable[[Any], Any] | None = None,
    input_state_folder: str | os.PathLike[str] | None = None,
    output_state_folder: str | os.PathLike[str] | None = None,
    logger: Callable[[dict[str, Any]], Any] | None = None,
    progress: bool = True,
    seed: int = 0,
    deterministic: bool = False,
    task_id: TaskId = None,
    save_every: int | None = 500,
    save_buffer: bool = False,
) -> History:
    """Train a learner on one task: a loop around `learner.step`, with validation, early stopping, and states to resume from.

    >>> import torch
    >>> from leanreplay import ReservoirBuffer
    >>> from leanreplay.torch import ERLearner, fit
    >>> model = torch.nn.Linear(4, 2)
    >>> learner = ERLearner(model, torch.optim.SGD(model.parameters(), lr=0.1), ReservoirBuffer(50))
    >>> x = torch.randn(100, 4)
    >>> history = fit(learner, (x, (x[:, 0] > 0).long()), max_epochs=3, batch_size=20, progress=False)
    >>> len(history["loss"]), learner.buffer.seen, sorted(history.records[0])
    (3, 100, ['epoch', 'loss', 'loss/replay', 'loss/stream', 'lr'])

    **Batches.** train_dataset: a map-style dataset of pairs, or a pair (x, y) of tensors; train_collate_fn makes (x, y) of a list of
    samples. batch_size: of the whole step. The share `batch_memory_frac` of it is replayed, rounded to the nearest number but at least one
    (0: none); for the time of the call that is the learner's `replay_batch_size`, so each draw of a learner that makes several. None:
    batch_size new samples, and the learner's own `replay_batch_size` on top. An epoch is cut into as few batches of at most the new
    samples' share as will do, of sizes that differ by at most one: each sample once, no tiny last batch. Their order depends on (seed,
    task_id, epoch) alone.

    **What is stored.** store: "first epoch": each sample is offered to the buffer once, as it came in the first epoch of this task; later
    epochs only replay. "every epoch": once in each epoch, so after k epochs the buffer has seen each of them k times. False: nothing, so
    the buffer may be one of exemplars, or open for reading: see the learner's `store`, which in False overrules this. Data that
    are rows of the learner's own buffer already, in a BufferDataset say, need store=False, or would be offered to it again.

    **Optimisation.** scheduler: a torch scheduler of the learner's optimizer, stepped after each "epoch" or "step"; ReduceLROnPlateau
    gets the metric. gradient_clip_algorithm: "norm" (the default) or "value", with `gradient_clip_val`. precision: "bf16" makes each step
    and the validation in torch.autocast; there is no scaler, bfloat16 needs none. deterministic: torch's deterministic algorithms, for the
    time of the call. A model in eval mode is in train mode for that time; single layers in eval mode stay in it.

    **Validation** of `learner.model` on val_dataset after each epoch, in eval mode. metrics: name -> function(outputs, targets) -> number;
    they and the learner's `loss_fn` get the whole set at once, never as bfloat16. test_transform, test_target_transform: of the x and of
    the y of each sample, and then test_batch_transform of the x of a batch, as the learner's transforms are, which are for training only;
    val_collate_fn likewise. metric: what is watched, "loss" (of validation) or a
    name in `metrics`; mode: whether "min" or "max" is good. early_stopping: end after so many epochs in a row without a better metric
    (True: 5). The weights are those of the last epoch; those of the best are in `best.pt` in the output folder. restore_best=True puts
    those back in the end, the model's buffers (batch norm's statistics) too; the optimizer, and copies that a learner has of the
    model, stay as they are. Without `metric` it looks at the validation loss; each state then holds these weights too.

    **States.** output_state_folder: where to keep the newest state, written at the start, after every `save_every` steps of an epoch (None:
    not), after each epoch, and at the end. It holds model, optimizer, scheduler, learner, position, history, and the states of the
    global generators of torch, NumPy and Python, so that random transforms and dropout go on as they would have. The buffer is not
    copied: its restore points bring it back (after a power cut only if it is `durable`; save_buffer=True copies it with each state, for
    use without its file). A state costs writing model and optimizer, reading them back, and an fsync.

    input_state_folder: the state to go on from. One of this task is continued where it was; if the task was finished, it is loaded, and
    that is all. A finished one of another task is loaded, and this task begins from there - unless this learner itself wrote or loaded it
    last: so what you change between tasks counts (a new optimizer, a larger head).

    With both folders the same, a first start finds no state and begins anew. Then a run that was killed at any time is simply started
    again, with the buffer opened in mode "a", and ends with the same weights, bit for bit on a CPU. For several tasks see `saved_task`.

    **Several processes** under torchrun: each calls `fit` with the same arguments and its own learner, with equal weights and a buffer of
    its own (`stream=rank`, the same seed). batch_size is that of one process. The samples of an epoch are divided among them, the model is
    in a DistributedDataParallel for the time of the call, and all return the same history.

    logger: called with each epoch's record and task_id, by rank 0 only; `print` for instance. After a kill an epoch may be logged twice.
    progress: a bar on stderr, if tqdm is installed. task_id: a name for the task, told to `learner.on_task_start`.

    Raises ArgumentError, before anything is trained, for an argument that is out of range or does not fit the others; ExistsError for an
    output folder whose state would be lost; MissingError if there is no state to load; StateError for one that does not fit; and
    what a step raises, LossError for instance: the learner is then as after the last whole step.
    """
    # -- what was asked for ----------------------------------------------------------------------------------------------
    rank, ranks = distributed.rank_and_size()
    instance(learner, ReplayLearner, "learner must be a ReplayLearner, such as ERLearner")
    model, optimizer, buffer = learner.module, learner.optimizer, learner.buffer
    task_id = task_id if isinstance(task_id, str) else integer("task_id", task_id, -(2**63), 2**63 - 1)
    seed = required("seed", seed, -(2**127), 2**127 - 1)
    functions = {"train_collate_fn": train_collate_fn, "val_collate_fn": val_collate_fn, "logger": logger}
    of_test = {"transform": test_transform, "target_transform": test_target_transform, "batch_transform": test_batch_transform}
    for name, function in {**functions, **{f"test_{name}": function for name, function in of_test.items()}}.items():
        function_or_none(name, function)
    training = Reader("train_dataset", train_dataset, train_collate_fn)
    required("max_epochs", max_epochs, 1, 2**31)
    integer("save_every", save_every, 1, 2**62)
    choice("store", store, ("first epoch", "every epoch", False))
    store = learner.store and store
    if store and _holds_rows(train_dataset, buffer):
        raise ArgumentError(
            "train_dataset has rows of the learner's own buffer, which would be offered to it once more; give store=False, and where "
            "other samples are to be stored, train on these alone: the buffer is replayed anyway"
        )
    new, replayed = _shares(batch_size, batch_memory_frac, learner.replay_batch_size)
    epochs = _Epochs(training, new, rank, ranks, seed, task_id)
    _check_scheduler(scheduler, scheduler_interval, optimizer)
    clip = _clipping(gradient_clip_val, gradient_clip_algorithm, optimizer)
    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    validation = None if val_dataset is None else Reader("val_dataset", val_dataset, val_collate_fn, **of_test)
    monitor, patience = _watched(metric, mode, early_stopping, metrics, validation, plateau, restore_best)
    if plateau and (scheduler_interval != "epoch" or validation is None):
        raise ArgumentError("ReduceLROnPlateau needs a val_dataset and scheduler_interval='epoch'")
    if plateau and scheduler.mode != mode:
        raise ArgumentError(f"ReduceLROnPlateau(mode={scheduler.mode!r}) would watch a metric for which mode={mode!r}; give both the same")
    device = torch.device(learner.device or device_of(model))
    cast = _autocast(precision, device)
    distributed.check_ranks(model, buffer)
    len(buffer)  # an error for one that is closed
    settings: dict[str, Any] = {
        "seed": seed,
        "samples": len(training),
        "new samples a step": new,
        "replayed ones": replayed,
        "processes": ranks,
        "store": store,
        "restore_best": f"{mode} {monitor}" if restore_best else False,
    }
    settings |= {"precision": precision, "optimizer": type(optimizer).__name__, "scheduler": type(scheduler).__name__}

    # -- where it begins -------------------------------------------------------------------------------------------------
    history = History(task_id, [], monitor, mode)
    epoch = step = 0
    sums: dict[str, list[float]] = {}  # of each loss: its sum over samples, and how many those are
    best: dict[str, Any] = {}  # the model of the best epoch, if it is to be put back
    output = None if output_state_folder is None else StateFolder(output_state_folder, "output_state_folder")
    if output is not None and buffer.path is None and not save_buffer:
        raise ArgumentError("output_state_folder: a buffer in memory ends with its process; give it a path, or save_buffer=True")
    if save_buffer:
        buffer._may_warn = False  # a copy goes with each state
    state = _initial_state(learner, input_state_folder, output, task_id)
    parts = {"model": model, "optimizer": optimizer, **({} if scheduler is None else {"scheduler": scheduler})}
    begun = state is not None and state["task_id"] == task_id
    if state is not None:
        # Of another task's state, what it has to do with this one: its scheduler and the rest of its settings are over.
        _compare(settings if begun else {"optimizer": settings["optimizer"]}, state["settings"])
        _restore(learner, parts if begun else {"model": model, "optimizer": optimizer}, state, device)
        _AT[learner] = state["at"]
    if state is not None and begun:
        history.records, history.stopped_early = state["records"], state["stopped_early"]
        epoch, step, sums, best = state["epoch"], state["step"], state["sums"], state["best"]
        if state["finished"]:
            return history

    def save(finished: bool = False) -> None:
        if output is None:
            return
        state = {
            "format": 1,
            "settings": settings,
            "task_id": task_id,
            "finished": finished,
            "stopped_early": history.stopped_early,
            "epoch": epoch,
            "step": step,
            "sums": sums,
            "best": best,
            "records": history.records,
            "learner": learner.state_dict(),
            "random": _random_states(device),
            **{name: part.state_dict() for name, part in parts.items()},
        }
        number = output.save(state, buffer if save_buffer and len(buffer) else None)
        _AT[learner] = os.path.realpath(output.folder), number

    # -- the loop --------------------------------------------------------------------------------------------------------
    with _prepared(learner, replayed, device, clip, deterministic):
        if not begun:
            distributed.share_statistics(model)
            learner.on_task_start(task_id)
            if output is not None and rank == 0:
                output.remove("best.pt")
        save()  # a kill before the next one must not leave a buffer that is ahead of every state
        while epoch < max_epochs and not _waited(history, patience):
            learner.store = store == "every epoch" or (store == "first epoch" and epoch == 0)
            with _bar(progress and rank == 0, f"epoch {epoch + 1}/{max_epochs}", step, epochs.steps) as bar:
                for x, y in epochs.batches(epoch, step):
                    with cast():
                        out = learner.step(x, y)
                    for name, value in [("loss", out.loss), *((f"loss/{term}", v) for term, v in out.losses.items())]:
                        total, samples = sums.get(name, (0.0, 0))
                        sums[name] = [total + value * len(y), samples + len(y)]
                    if scheduler is not None and scheduler_interval == "step":
                        scheduler.step()
                    step += 1
                    bar(out.loss)
                    if save_every is not None and step % save_every == 0 and step < epochs.steps:
                        save()
            record = {"epoch": epoch, "lr": float(optimizer.param_groups[0].get("lr", math.nan)), **_means(sums)}
            distributed.share_statistics(model)
            if validation is not None:
                record |= _validate(model, cast, learner.loss_fn, validation, metrics or {}, batch_size, device)
            history.records.append(record)
            if scheduler is not None and scheduler_interval == "epoch":
                scheduler.step(*([record[monitor]] if plateau and monitor else []))
            if rank == 0 and logger is not None:
                logger({"task_id": task_id, **record})
            if output is not None and rank == 0 and history.best_epoch == epoch:
                output.write("best.pt", model.state_dict())
            if restore_best and history.best_epoch == epoch:
                best = copy.deepcopy(model.state_dict())
            epoch, step, sums = epoch + 1, 0, {}
            save()
        history.stopped_early = epoch < max_epochs
        if best:
            model.load_state_dict(best)
            best = {}
        learner.on_task_end()
        save(finished=True)
    return history


def saved_task(folder: str | os.PathLike[str]) -> TaskId:
    """The task of the state in a folder that `fit` wrote, begun or finished; None if there is no state. Under torchrun: on all ranks.

    With it, a run of several tasks that was killed at any time is simply started again (tasks being numbers):

        for task in range(saved_task("run") or 0, 5):
            fit(learner, datasets[task], task_id=task, input_state_folder="run", output_state_folder="run")
    """
    states = StateFolder(folder)
    number = states.newest()
    return None if number is None else _checked(states, number)["task_id"]


# -- arguments -----------------------------------------------------------------------------------------------------------


def _shares(batch_size: Any, fraction: Any, own: int) -> tuple[int, int]:
    """How many samples of a step are new, and how many replayed."""
    size = required("batch_size", batch_size, 1, 2**40)
    if fraction is None:
        return size, own
    replayed = math.floor(size * number("batch_memory_frac", fraction, 0, 1) + 0.5)
    replayed = max(replayed, 1) if fraction > 0 else 0
    if replayed >= size:
        raise ArgumentError(
            f"batch_size={size} with batch_memory_frac={fraction} leaves no room for new samples; lower the fraction, or raise batch_size"
        )
    return size - replayed, replayed


def _holds_rows(dataset: Any, buffer: DataBuffer) -> bool:
    """Whether a dataset, or one within, reads this buffer, through this object or another one: as far as attributes tell."""
    seen: dict[int, Any] = {}
    several = [dataset]
    while several:
        found = several.pop()
        if id(found) in seen or len(seen) > 10_000:
            continue
        seen[id(found)] = found
        if isinstance(found, DataBuffer):
            if found is buffer or found._uuid == buffer._uuid:
                return True
        elif isinstance(found, (list, tuple, set, dict)):
            several += (found.values() if isinstance(found, dict) else found) if len(found) < 1000 else ()
        elif isinstance(found, MethodType):
            several.append(found.__self__)
        elif not isinstance(found, (torch.Tensor, np.ndarray, str, bytes)):
            values = getattr(found, "__dict__", {}).values()
            several += [v for v in values if hasattr(v, "__getitem__") or isinstance(v, (set, MethodType))]
    return False


def _check_scheduler(scheduler: Any, interval: Any, optimizer: torch.optim.Optimizer) -> None:
    choice("scheduler_interval", interval, ("epoch", "step"))
    if scheduler is None:
        return
    if isinstance(scheduler, type) or not all(
        callable(getattr(scheduler, name, None)) for name in ("step", "state_dict", "load_state_dict")
    ):
        raise ArgumentError(f"scheduler must be a torch learning rate scheduler, made with learner.optimizer, got {scheduler!r:.200}")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ArgumentError("scheduler belongs to another optimizer than the learner's; make it with learner.optimizer")


def _clipping(value: Any, algorithm: Any, optimizer: torch.optim.Optimizer) -> Callable[..., None] | None:
    """What is called before each step of the optimizer."""
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


def _watched(
    metric: Any, mode: Any, early_stopping: Any, metrics: Any, validation: Reader | None, plateau: bool, restore_best: Any
) -> tuple[str | None, int | None]:
    """The watched quantity's name in records, and how many epochs without a better one end the training."""
    choice("mode", mode, ("min", "max"))
    if metrics is not None and (
        not isinstance(metrics, Mapping) or not all(isinstance(name, str) and callable(f) for name, f in metrics.items())
    ):
        raise ArgumentError(f"metrics must be a dict: name -> function(outputs, targets), got {metrics!r:.200}")
    if metrics and "loss" in metrics:
        raise ArgumentError("metrics: 'loss' is the learner's own loss; give this one another name")
    patience = None if early_stopping is False else 5 if early_stopping is True else required("early_stopping", early_stopping, 1, 2**31)
    names = ["loss", *(metrics or {})]
    if metric is not None and metric not in names:
        raise ArgumentError(f"metric is one of {', '.join(names)}, got {metric!r:.200}")
    choice("restore_best", restore_best, (True, False))
    if validation is None and (metric is not None or patience is not None or metrics or restore_best):
        what = (
            "metrics" if metrics else "early_stopping" if patience is not None else "restore_best" if restore_best else f"metric={metric!r}"
        )
        raise ArgumentError(f"{what}: there is nothing to measure it on; give a val_dataset")
    watches = metric is not None or patience is not None or plateau or restore_best
    return (f"val_{metric or 'loss'}" if watches else None), patience


def _autocast(precision: Any, device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    choice("precision", precision, ("32", "bf16"))
    if precision == "32":
        return contextlib.nullcontext
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ArgumentError(f"precision='bf16': {torch.cuda.get_device_name(device)} has no bfloat16; use precision='32'")
    return lambda: torch.autocast(device.type, torch.bfloat16)


# -- parts of the loop ---------------------------------------------------------------------------------------------------


class _Epochs:
    """The batches of each epoch for one rank: the order is cut into steps * ranks pieces, whose sizes differ by at most one."""

    def __init__(self, training: Reader, most: int, rank: int, ranks: int, seed: int, task_id: TaskId) -> None:
        self.training, self.rank, self.ranks = training, rank, ranks
        self.steps = -(-len(training) // (most * ranks))
        if len(training) < self.steps * ranks:
            raise ArgumentError(
                f"train_dataset: {len(training)} samples are too few for {ranks} processes with batches of {most}; use fewer processes"
            )
        k0, k1 = key_pair(f"fit {task_id!r}", seed)
        self.sampler = ShuffleSampler(training, seed=(int(k0) << 64 | int(k1)) - 2**127)

    def batches(self, epoch: int, first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """From step `first` on."""
        self.sampler.set_epoch(epoch)
        order = np.fromiter(self.sampler, np.int64, len(self.sampler))
        for step in range(first, self.steps):
            x, y = self.training.batch(_piece(order, step * self.ranks + self.rank, self.steps * self.ranks))
            yield x, y


def _piece(order: npt.NDArray[np.int64], i: int, pieces: int) -> npt.NDArray[np.int64]:
    n = len(order)
    return order[i * n // pieces : (i + 1) * n // pieces]


@contextlib.contextmanager
def _prepared(learner: Any, replayed: int, device: torch.device, clip: Callable[..., None] | None, deterministic: bool) -> Iterator[None]:
    """The learner and torch as `fit` needs them; afterwards as they were."""
    cudnn, modes = torch.backends.cudnn, [(m, m.training) for m in learner.module.modules()]
    before, store = (learner.replay_batch_size, learner.device, cudnn.benchmark), learner.store
    was, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    handle = None if clip is None else learner.optimizer.register_step_pre_hook(clip)
    try:
        learner.replay_batch_size, learner.device = replayed, device
        if not learner.module.training:  # else a single layer in eval mode is there on purpose
            learner.module.train()
        if deterministic:
            cudnn.benchmark = False
            torch.use_deterministic_algorithms(True)
        with distributed.parallel(learner):
            yield
    finally:
        learner.replay_batch_size, learner.device, cudnn.benchmark = before
        learner.store = store
        torch.use_deterministic_algorithms(was, warn_only=warn_only)
        for module, mode in modes:
            module.training = mode
        if handle is not None:
            handle.remove()


def _means(sums: dict[str, list[float]]) -> dict[str, float]:
    """Means over the samples of all ranks."""
    parts = distributed.gather(sums)
    names = dict.fromkeys(name for part in parts for name in part)
    total = {name: np.sum([part[name] for part in parts if name in part], axis=0) for name in names}
    return {name: float(value / samples) for name, (value, samples) in total.items()}


def _validate(
    model: torch.nn.Module,
    cast: Callable[[], contextlib.AbstractContextManager[Any]],
    loss_fn: Callable[..., Any],
    reader: Reader,
    metrics: Mapping[str, Any],
    batch_size: int,
    device: torch.device,
) -> dict[str, float]:
    """Loss and metrics on the whole set. Each rank computes the outputs of its part, and all get the same numbers."""
    rank, ranks = distributed.rank_and_size()
    mine = _piece(np.arange(len(reader)), rank, ranks)
    with evaluating(model):
        with cast():
            parts = list(predictions(model, reader, mine, batch_size, device))
        if ranks > 1:
            everyone = distributed.gather([(outputs.cpu(), targets.cpu()) for outputs, targets in parts])
            parts = [(outputs.to(device), targets.to(device)) for part in everyone for outputs, targets in part]
        outputs, targets = (torch.cat(column) for column in zip(*parts, strict=True))
        outputs = outputs.float() if outputs.dtype is torch.bfloat16 else outputs
        try:
            values = {"val_loss": float(loss_fn(outputs.clone(), targets.clone()))}
        except (IndexError, RuntimeError) as error:
            raise ArgumentError(
                f"{reader.name}: the learner's loss_fn does not take outputs of shape {tuple(outputs.shape)} and {targets.dtype} "
                f"targets of shape {tuple(targets.shape)}: {str(error).splitlines()[0]:.200}; map them with test_target_transform"
            ) from error
        for name, function in metrics.items():
            value = function(outputs.clone(), targets.clone())  # it may work in place, as may the loss
            try:
                values[f"val_{name}"] = float(value)
            except (TypeError, ValueError, RuntimeError):
                raise ArgumentError(f"metrics[{name!r}] must give a number, got {value!r:.200}") from None
    return values


def _waited(history: History, patience: int | None) -> bool:
    """Whether `patience` epochs have passed without a better metric."""
    best = history.best_epoch
    return patience is not None and len(history) - 1 - (-1 if best is None else best) >= patience


@contextlib.contextmanager
def _bar(show: bool, title: str, done: int, steps: int) -> Iterator[Callable[[float], None]]:
    """What is called with the loss after each step."""
    tqdm = None
    if show:
        with contextlib.suppress(ImportError):  # an extra: not needed, and not missed
            tqdm = importlib.import_module("tqdm").tqdm
    if tqdm is None:
        yield lambda loss: None
        return
    with tqdm(initial=done, total=steps, desc=title, unit="step", file=sys.stderr) as bar:

        def advance(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            bar.update()

        yield advance


# -- states --------------------------------------------------------------------------------------------------------------


def _initial_state(learner: ReplayLearner, folder: Any, output: StateFolder | None, task_id: TaskId) -> dict[str, Any] | None:
    """The state to load; None to begin with the learner as it is."""
    states = None if folder is None else StateFolder(folder, "input_state_folder")
    same = states is not None and output is not None and os.path.realpath(states.folder) == os.path.realpath(output.folder)
    if output is not None and not same:
        number = output.newest()
        if number is not None and _AT.get(learner) != (os.path.realpath(output.folder), number):
            raise ExistsError(
                f"{output.folder} holds a state already, which would be lost; give it as input_state_folder to go on from it, or remove it"
            )
    if states is None:
        return None
    number = states.newest()
    if number is None:
        if same:
            return None
        raise MissingError(f"{states.folder} holds no state of fit; only where it is output_state_folder, too, may that be")
    state = _checked(states, number)
    own = _AT.get(learner) == (os.path.realpath(states.folder), number)
    if state["task_id"] == task_id and state["finished"] and own:
        raise StateError(f"this learner has just finished task_id={task_id!r}; give each task a task_id of its own")
    if state["task_id"] != task_id and not state["finished"]:
        raise StateError(
            f"{states.folder} holds a state in the middle of task_id={state['task_id']!r} (epoch {state['epoch']}, step {state['step']}), "
            f"but this is task_id={task_id!r}; finish that task first (saved_task says which it is)"
        )
    if state["task_id"] != task_id and own:
        return None
    return {**state, "copy": states.buffer_copy(number), "at": (os.path.realpath(states.folder), number)}


def _checked(states: StateFolder, number: int) -> dict[str, Any]:
    """A state that looks like one of `fit`."""
    state = states.load(number)
    wanted = {"format": int, "finished": bool, "stopped_early": bool, "epoch": int, "step": int, "records": list, "sums": dict}
    wanted["best"] = dict
    wanted |= dict.fromkeys(("settings", "learner", "model", "optimizer", "random"), dict)
    wrong = [k for k, kind in wanted.items() if not isinstance(state, dict) or not isinstance(state.get(k), kind)]
    if wrong or "task_id" not in state:
        raise StateError(f"{states.folder}: state {number} was not written by fit: no {(wrong or ['task_id'])[0]} in it")
    if state["format"] != 1:
        raise StateError(f"{states.folder}: a state of format {state['format']}, but this release reads 1; upgrade leanreplay")
    return state


def _compare(mine: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    differing = [f"{name}={value!r} (state: {found.get(name)!r})" for name, value in mine.items() if found.get(name) != value]
    if differing:
        raise StateError(f"the state is of a run with other settings: {', '.join(differing)}; give the same, or begin anew")


def _restore(learner: ReplayLearner, parts: Mapping[str, Any], state: Mapping[str, Any], device: torch.device) -> None:
    """Bring everything to a state. Raises StateError for one that does not fit, mostly before anything has changed."""
    mine, found = ({k: getattr(v, "shape", None) for k, v in m.items()} for m in (parts["model"].state_dict(), state["model"]))
    if mine != found:
        name = next(k for k in [*mine, *found] if mine.get(k) != found.get(k) or k not in mine or k not in found)
        raise StateError(
            f"the state is of another model: {name} has shape {found.get(name)} there and {mine.get(name)} here; make the model alike"
        )
    try:
        learner.load_state_dict(state["learner"])
    except StateError:
        if not os.path.isdir(state["copy"]):
            raise
        learner.buffer.load(state["copy"])
        learner.load_state_dict(state["learner"])
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise StateError(f"the state does not fit the {name} {type(part).__name__}: {error}") from error
    _set_random_states(state["random"], device)


def _random_states(device: torch.device) -> dict[str, Any]:
    """Of all global generators: not used here, but transforms and dropout may."""
    kind, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    kind, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
