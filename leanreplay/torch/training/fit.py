"""fit: a short loop around `learner.step`, for people who have none; resumed exactly after a
kill."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from ...arguments import choice, function_or_none, instance, integer, required
from ...buffers.base import DataBuffer
from ...errors import ArgumentError
from ..data import Transforms, device_named
from ..learners import ReplayLearner
from .evaluation import device_of
from .history import History
from .reading import EpochBatches, Reader
from .run import Run
from .settings import Settings, TaskId, autocast, checked_scheduler, clipping, place, shares, watching
from .states import StateFolder
from .validation import Metrics, Validation


def fit(
    learner: ReplayLearner,
    train_dataset: Any,
    *,
    val_dataset: Any = None,
    val_memory: DataBuffer | None = None,
    label: str | None = None,
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
    metrics: Metrics | None = None,
    train_metrics: Metrics | None = None,
    gradient_clip_val: float | None = None,
    gradient_clip_algorithm: str | None = None,
    precision: str = "32",
    device: torch.device | str | None = None,
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

    **Batches.** train_dataset: a map-style dataset of pairs (x, y), or a pair of tensors or arrays
    (n, ...); x may be any nesting of them. label: samples are dicts (or what train_collate_fn makes
    is one): the entry of this name is y, the dict of the others x. train_collate_fn: makes (x, y)
    of a list of samples. batch_size: of the whole step. The share `batch_memory_frac` of it is
    replayed, rounded but at least one sample (0: none); it is the `replay_batch_size` of each draw
    during the call. A buffer that can never hold that many (with store=False: that does not) leaves
    the rest to new samples. While one that can is filling up, a draw is what there is, and a step
    is smaller. None: batch_size new samples, and the learner's own `replay_batch_size` on top. An
    epoch is cut into as few batches as that allows, of sizes that differ by at most one: each
    sample comes once. Orders depend on (seed, task_id, epoch) alone.

    **What is stored.** store: "first epoch": each sample is offered to the buffer once, in the
    first epoch of this task; later epochs only replay. "every epoch": once in each epoch, so after
    k epochs the buffer has seen each sample k times. False: nothing, so the buffer may be one of
    exemplars, or open for reading. A learner with store=False overrules this. Data that are rows of
    the learner's own buffer, in a BufferDataset say, need store=False, or would be offered to it
    again.

    **Optimisation.** scheduler: a torch scheduler of the learner's optimizer, stepped after each
    "epoch" or "step"; ReduceLROnPlateau gets the metric. gradient_clip_algorithm: "norm" (the
    default) or "value", with `gradient_clip_val`. precision: "bf16" makes each step and the
    validation in torch.autocast; "fp16" too, with a GradScaler: where it skips the optimizer's step
    because gradients overflow, the samples are stored, but the step does not count, and the
    scheduler waits. device: where model, its copies and the optimizer's state go, and stay;
    default: the learner's own device, or where the model is. deterministic: use torch's
    deterministic algorithms during the call. A model in eval mode is in train mode during the call;
    single layers in eval mode stay in it.

    **Validation** of `learner.evaluated_model` (CLS-ER: the stable copy) on val_dataset after each
    epoch, in eval mode. metrics: name -> function(outputs, targets) -> number. They and the
    learner's `loss_fn` get the whole set at once, as float32 in autocast. train_metrics: the same
    of the outputs of each step, before it; their means over the new samples are in the records, by
    their names. val_memory: a buffer of your choice, balanced over classes or a reservoir say. When
    a task ends, its whole validation set is offered to it; each validation is on val_dataset and on
    what it holds, so that one number watches all tasks. It is part of each state. test_transform,
    test_target_transform: of the x and of the y of each sample; test_batch_transform: then, of the
    x of a batch. The learner's own transforms are for training only. val_collate_fn, label: as for
    train_dataset. metric: what is watched, "loss" (of validation) or a name in `metrics`; mode:
    whether "min" or "max" is good. early_stopping: end after so many epochs in a row without a
    better metric (True: 5). The weights are those of the last epoch; the best epoch's, of the model
    that is validated, are in `best.pt` in the output folder. restore_best=True puts them back into
    that model in the end, with its buffers (batch norm's statistics); all else stays, the optimizer
    and copies of the model. Without `metric` it looks at the validation loss. Each state then holds
    these weights too.

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
    learner, with equal weights and a buffer of its own (`stream=rank`, the same seed; a val_memory
    of its own that is just alike). batch_size is that of one process. The samples of an epoch are
    divided among them, the model is in a DistributedDataParallel during the call, and all return
    the same history.

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
    store = choice("store", store, ("first epoch", "every epoch", False)) if learner.store else False
    new, replayed = shares(batch_size, batch_memory_frac, learner, store)
    of_test = Transforms(test_transform, test_target_transform, test_batch_transform, "val_dataset: ")
    validation = None
    if val_dataset is not None:
        validation = Validation(Reader("val_dataset", val_dataset, val_collate_fn, of_test, label), val_memory, task_id)
    elif val_memory is not None:
        raise ArgumentError("val_memory keeps samples of val_dataset; give one")
    device = device_named(device) or learner.device or device_of(learner.module)
    cast, scaler = autocast(precision, device, learner.optimizer)
    settings = Settings(
        learner=learner,
        task_id=task_id,
        max_epochs=required("max_epochs", max_epochs, 1, 2**31),
        batch_size=batch_size,
        replayed=replayed,
        batches=EpochBatches(Reader("train_dataset", train_dataset, train_collate_fn, label=label), new, seed, f"fit {task_id!r}"),
        store=store,
        scheduler=checked_scheduler(scheduler, learner.optimizer),
        scheduler_interval=choice("scheduler_interval", scheduler_interval, ("epoch", "step")),
        clip=clipping(gradient_clip_val, gradient_clip_algorithm, learner.optimizer),
        validation=validation,
        watch=watching(metric, mode, early_stopping, restore_best, metrics, train_metrics, validation, scheduler),
        device=device,
        cast=cast,
        scaler=scaler,
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
    place(learner, device)
    return Run(settings).train()
