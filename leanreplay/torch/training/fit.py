"""fit: a short loop around `learner.step`, for people who have none; resumed exactly after a
kill."""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ...arguments import choice, function_or_none, instance, integer, required
from ...errors import ArgumentError
from .. import distributed
from ..data import Transforms
from ..learners import ReplayLearner
from .evaluation import device_of, validate
from .reading import EpochBatches, Reader
from .resume import Position, remember, resume, state_of
from .settings import Settings, TaskId, autocast, checked_scheduler, clipping, shares, watching
from .states import StateFolder


@dataclass
class History:
    """What `fit` saw, epoch by epoch. `history["loss"]` is one quantity over the epochs.

    records: a dict for each epoch: "epoch" (from 0), "lr" (of the first parameter group, at the
    epoch's end), "loss" and "loss/<term>" (means over the new samples, of the losses before each
    step), and with a validation set "val_loss" and "val_<metric>". monitor, mode: the quantity that
    early stopping looks at, if any. stopped_early: whether training ended before `max_epochs`.
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
        """The first epoch with the best value of the monitored quantity; None without one. NaN is
        never best."""
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
    """Train a learner on one task: a loop around `learner.step`, with validation and states to
    resume from.

    >>> import torch
    >>> from leanreplay import ReservoirBuffer
    >>> from leanreplay.torch import ERLearner, fit
    >>> model = torch.nn.Linear(4, 2)
    >>> learner = ERLearner(model, torch.optim.SGD(model.parameters(), lr=0.1), ReservoirBuffer(50))
    >>> x = torch.randn(100, 4)
    >>> history = fit(learner, (x, (x[:, 0] > 0).long()), max_epochs=3, batch_size=20, progress=False)
    >>> len(history["loss"]), learner.buffer.seen, sorted(history.records[0])
    (3, 100, ['epoch', 'loss', 'loss/replay', 'loss/stream', 'lr'])

    **Batches.** train_dataset: a map-style dataset of pairs, or a pair (x, y) of tensors.
    train_collate_fn: makes (x, y) of a list of samples. batch_size: of the whole step. The share
    `batch_memory_frac` of it is replayed, rounded but at least one sample (0: none); it is the
    `replay_batch_size` of each draw during the call. None: batch_size new samples, and the
    learner's own `replay_batch_size` on top. An epoch is cut into as few batches as that allows, of
    sizes that differ by at most one: each sample comes once. Orders depend on (seed, task_id,
    epoch) alone.

    **What is stored.** store: "first epoch": each sample is offered to the buffer once, in the
    first epoch of this task; later epochs only replay. "every epoch": once in each epoch, so after
    k epochs the buffer has seen each sample k times. False: nothing, so the buffer may be one of
    exemplars, or open for reading. A learner with store=False overrules this. Data that are rows of
    the learner's own buffer, in a BufferDataset say, need store=False, or would be offered to it
    again.

    **Optimisation.** scheduler: a torch scheduler of the learner's optimizer, stepped after each
    "epoch" or "step"; ReduceLROnPlateau gets the metric. gradient_clip_algorithm: "norm" (the
    default) or "value", with `gradient_clip_val`. precision: "bf16" makes each step and the
    validation in torch.autocast; bfloat16 needs no scaler. deterministic: use torch's deterministic
    algorithms during the call. A model in eval mode is in train mode during the call; single layers
    in eval mode stay in it.

    **Validation** of `learner.model` on val_dataset after each epoch, in eval mode. metrics: name
    -> function(outputs, targets) -> number. They and the learner's `loss_fn` get the whole set at
    once, never as bfloat16. test_transform, test_target_transform: of the x and of the y of each
    sample; test_batch_transform: then, of the x of a batch. The learner's own transforms are for
    training only. val_collate_fn: as train_collate_fn. metric: what is watched, "loss" (of
    validation) or a name in `metrics`; mode: whether "min" or "max" is good. early_stopping: end
    after so many epochs in a row without a better metric (True: 5). The weights are those of the
    last epoch; the best epoch's are in `best.pt` in the output folder. restore_best=True puts the
    best weights back in the end, with the model's buffers (batch norm's statistics); the optimizer,
    and a learner's copies of the model, stay. Without `metric` it looks at the validation loss.
    Each state then holds these weights too.

    **States.** output_state_folder: where to keep the newest state, written at the start, after
    every `save_every` steps of an epoch (None: not), after each epoch, and at the end. It holds
    model, optimizer, scheduler, learner, position, history, and the states of the global generators
    of torch, NumPy and Python, so that random transforms and dropout go on as they would have. The
    buffer is not copied: its restore points bring it back (after a power cut only if it is
    `durable`). save_buffer=True copies it with each state, for use without its file. A state costs
    writing model and optimizer, reading them back, and an fsync.

    input_state_folder: the state to go on from. A state of this task is loaded and continued,
    unless the task was finished. A finished state of another task is loaded, and this task begins
    from there - unless this learner itself wrote or loaded it last: so what you change between
    tasks counts (a new optimizer, a larger head).

    With both folders the same, a first start finds no state and begins anew. A run that was killed
    is simply started again, with the buffer opened in mode "a", and ends with the same weights, bit
    for bit on a CPU. For several tasks see `saved_task`.

    **Several processes** under torchrun: each calls `fit` with the same arguments and its own
    learner, with equal weights and a buffer of its own (`stream=rank`, the same seed). batch_size
    is that of one process. The samples of an epoch are divided among them, the model is in a
    DistributedDataParallel during the call, and all return the same history.

    logger: rank 0 calls it with each epoch's record and task_id; `print` for instance. After a kill
    an epoch may be logged twice. progress: a bar on stderr, if tqdm is installed. task_id: a name
    for the task, passed to `learner.on_task_start`.

    Raises ArgumentError, before anything is trained, for an argument that is out of range or does
    not fit the others; ExistsError for an output folder whose state would be lost; MissingError if
    there is no state to load; StateError for one that does not fit; and what a step raises,
    LossError for instance: the learner is then as after the last whole step.
    """
    instance(learner, ReplayLearner, "learner must be a ReplayLearner, such as ERLearner")
    task_id = task_id if isinstance(task_id, str) else integer("task_id", task_id, -(2**63), 2**63 - 1)
    seed = required("seed", seed, -(2**127), 2**127 - 1)
    functions = {
        "train_collate_fn": train_collate_fn, "val_collate_fn": val_collate_fn, "test_transform": test_transform,
        "test_target_transform": test_target_transform, "test_batch_transform": test_batch_transform, "logger": logger,
    }  # fmt: skip
    for name, function in functions.items():
        function_or_none(name, function)
    new, replayed = shares(batch_size, batch_memory_frac, learner.replay_batch_size)
    of_test = Transforms(test_transform, test_target_transform, test_batch_transform, "val_dataset: ")
    validation = None if val_dataset is None else Reader("val_dataset", val_dataset, val_collate_fn, of_test)
    device = torch.device(learner.device or device_of(learner.module))
    settings = Settings(
        learner=learner,
        task_id=task_id,
        max_epochs=required("max_epochs", max_epochs, 1, 2**31),
        batch_size=batch_size,
        replayed=replayed,
        batches=EpochBatches(Reader("train_dataset", train_dataset, train_collate_fn), new, seed, f"fit {task_id!r}"),
        store=choice("store", store, ("first epoch", "every epoch", False)) if learner.store else False,
        scheduler=checked_scheduler(scheduler, learner.optimizer),
        scheduler_interval=choice("scheduler_interval", scheduler_interval, ("epoch", "step")),
        clip=clipping(gradient_clip_val, gradient_clip_algorithm, learner.optimizer),
        validation=validation,
        watch=watching(metric, mode, early_stopping, restore_best, metrics, validation, scheduler),
        device=device,
        cast=autocast(precision, device),
        precision=precision,
        deterministic=deterministic,
        seed=seed,
        input=None if input_state_folder is None else StateFolder(input_state_folder, "input_state_folder"),
        output=None if output_state_folder is None else StateFolder(output_state_folder, "output_state_folder"),
        save_every=integer("save_every", save_every, 1, 2**62),
        save_buffer=save_buffer,
        logger=logger,
        progress=progress,
    )
    return Run(settings).train()


class Run:
    """One call of `fit`: what was asked for, and where the run is."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.learner, self.model = settings, settings.learner, settings.learner.module
        self.is_first_rank = settings.batches.rank == 0
        self.position = Position()
        self.history = History(settings.task_id, self.position.records, settings.watch.monitor, settings.watch.mode)

    def train(self) -> History:
        """Train from where the state to go on from ends; return the history of the whole task."""
        found = resume(self.settings)
        if found is not None:
            self.position = found
            self.history.records, self.history.stopped_early = found.records, found.stopped_early
        if self.position.finished:
            return self.history
        with _prepared(self.settings):
            if found is None:
                self.begin_task()
            self.save()  # else a kill could leave a buffer ahead of every state
            while self.position.epoch < self.settings.max_epochs and not self.has_waited():
                self.train_epoch()
                self.end_epoch()
                self.save()
            self.end_task()
        return self.history

    def begin_task(self) -> None:
        distributed.share_statistics(self.model)
        self.learner.on_task_start(self.settings.task_id)
        if self.settings.output is not None and self.is_first_rank:
            self.settings.output.remove("best.pt")

    def train_epoch(self) -> None:
        """Train on what is left of this epoch."""
        s, at = self.settings, self.position
        self.learner.store = s.store == "every epoch" or (s.store == "first epoch" and at.epoch == 0)
        with _bar(s.progress and self.is_first_rank, f"epoch {at.epoch + 1}/{s.max_epochs}", at.step, s.batches.steps) as bar:
            for x, y in s.batches.of(at.epoch, at.step):
                with s.cast():
                    out = self.learner.step(x, y)
                for name, value in [("loss", out.loss), *((f"loss/{term}", v) for term, v in out.losses.items())]:
                    total, samples = at.sums.get(name, (0.0, 0))
                    at.sums[name] = [total + value * len(y), samples + len(y)]
                if s.scheduler is not None and s.scheduler_interval == "step":
                    s.scheduler.step()
                at.step += 1
                bar(out.loss)
                if s.save_every is not None and at.step % s.save_every == 0 and at.step < s.batches.steps:
                    self.save()

    def end_epoch(self) -> None:
        """Validate, record, and do what depends on the record."""
        s, at, history = self.settings, self.position, self.history
        lr = float(self.learner.optimizer.param_groups[0].get("lr", math.nan))
        record = {"epoch": at.epoch, "lr": lr, **_means(at.sums)}
        distributed.share_statistics(self.model)
        if s.validation is not None:
            record |= validate(self.model, s.validation, self.learner.loss_fn, s.watch.metrics, s.batch_size, s.device, s.cast)
        history.records.append(record)
        if s.scheduler is not None and s.scheduler_interval == "epoch":
            s.scheduler.step(*([record[history.monitor]] if s.has_plateau and history.monitor else []))
        if s.logger is not None and self.is_first_rank:
            s.logger({"task_id": s.task_id, **record})
        if history.best_epoch == at.epoch:
            if s.output is not None and self.is_first_rank:
                s.output.write("best.pt", self.model.state_dict())
            if s.watch.restore_best:
                at.best = copy.deepcopy(self.model.state_dict())
        at.epoch, at.step, at.sums = at.epoch + 1, 0, {}

    def end_task(self) -> None:
        self.history.stopped_early = self.position.stopped_early = self.position.epoch < self.settings.max_epochs
        if self.position.best:
            self.model.load_state_dict(self.position.best)
            self.position.best = {}
        self.learner.on_task_end()
        self.position.finished = True
        self.save()

    def has_waited(self) -> bool:
        """Whether so many epochs as `patience` says have passed without a better metric."""
        patience, best = self.settings.watch.patience, self.history.best_epoch
        return patience is not None and len(self.history) - 1 - (-1 if best is None else best) >= patience

    def save(self) -> None:
        """Write a state, if states are asked for."""
        output, buffer = self.settings.output, self.learner.buffer
        if output is None:
            return
        with warnings.catch_warnings():
            if self.settings.save_buffer:  # then its samples are kept too
                warnings.filterwarnings("ignore", "the state of a buffer in memory")
            state = state_of(self.settings, self.position)
        number = output.save(state, buffer if self.settings.save_buffer and len(buffer) else None)
        remember(self.learner, output, number)


@contextlib.contextmanager
def _prepared(settings: Settings) -> Iterator[None]:
    """Set learner and torch as `fit` needs them; afterwards put them back as they were."""
    learner: Any = settings.learner
    cudnn, modes = torch.backends.cudnn, [(m, m.training) for m in learner.module.modules()]
    before, store = (learner.replay_batch_size, learner.device, cudnn.benchmark), learner.store
    was, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    handle = None if settings.clip is None else learner.optimizer.register_step_pre_hook(settings.clip)
    try:
        learner.replay_batch_size, learner.device = settings.replayed, settings.device
        if not learner.module.training:  # else a single layer in eval mode is there on purpose
            learner.module.train()
        if settings.deterministic:
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


@contextlib.contextmanager
def _bar(show: bool, title: str, done: int, steps: int) -> Iterator[Callable[[float], None]]:
    """Show a progress bar; yield what is called with the loss after each step."""
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
