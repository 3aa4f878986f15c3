"""The step that all learners share: draws, forward, losses; then the buffer, the terms' updates."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from ...arguments import call, check_call, fraction, function_or_none, integer, number, required, required_function
from ...buffers.base import DataBuffer
from ...buffers.drawing import Draw
from ...errors import ArgumentError, ModeError, StateError, StorageError
from .. import nests
from ..data import Function, device_named
from ..distributed import check_reach, unwrapped
from ..models import ForwardFunction
from . import checks
from .draws import draw, load_reading_state, prepare, reading_state
from .forward import Statistics, forward
from .intake import Experiences, Intake
from .losses import Losses
from .optimizing import make_step
from .pending import Batch, classes_seen, copied_array, unwritten, values_to_keep, values_to_move, versions, write
from .term import Term

_MANY_WAIT = 1000  # batches: their memory grows until after_step is called
Self = TypeVar("Self", bound="ReplayLearner")  # typing has one of its own from Python 3.11 on


@dataclass(slots=True)
class Step:
    """What `step` returns.

    loss: the whole loss. losses: its terms by name, before weights and normalisation; "stream" is
    the batch's own, "stream+replay" one mean over batch and replay. outputs: the model's for the
    batch, (n, ...), detached. targets: what the loss compared them with, transformed. Both are
    tensors, or nests of them. stepped: False if a scaler of gradients skipped the optimizer's step.
    """

    loss: float
    losses: dict[str, float]
    outputs: Any = field(repr=False, compare=False)
    targets: Any = field(repr=False, compare=False)
    stepped: bool = True


class ReplayLearner:
    """Rehearsal with any list of terms. The methods are this class with their papers' terms.

        (loss_weight * l(f(x), y) + sum of weight_i * term_i) / (loss_weight + sum of weight_i)

    (x, y) is the batch of the stream; the terms draw from the buffer, unless it is empty. After the
    step the batch is offered to the buffer, so a draw never holds samples of its own step. The
    batch is stored as it came, whatever models, transforms and losses change in place. x, y and the
    model's outputs are tensors (n, ...), or nests of them (dicts, lists, tuples).

    model: has parameters, and outputs (n, ...). In a DistributedDataParallel only the stream's pass
        goes through the wrapper; if a pass leaves a head out, it needs find_unused_parameters=True.
    optimizer: over the model's parameters.
    buffer: of pairs (x, y), of a kind that needs no features or weights; the papers use a
        `ReservoirBuffer`. Its samples must have what the terms store. An `ExperienceBalancedBuffer`
        needs `on_task_start` before the first batch of each task: a task that is a number is the
        experience of that number, any other the next one.
    terms: see `Term`; one of weight 0 takes no draw. loss_fn: the mean loss of (outputs, y).
    replay_batch_size: samples of a draw, uniform, without replacement; at most what there is.
    balance: draw evenly over groups, labels or a metadata field, as `buffer.sample(balance=)` does.
    loss_normalization: divide by the sum of the weights, as above; the papers do not. While the
        buffer is empty the loss is then l(f(x), y), whatever loss_weight is. Renate's learners,
        whose parameters have these names, multiply it by loss_weight then, too.
    ema_memory_update_gamma: if below 1, what is stored with replayed samples (if they are still
        there) moves: stored <- gamma * stored + (1 - gamma) * what the model gives now.
    mask_unused_classes: outputs of classes that occurred in no batch so far count as -inf in
        `loss_fn`, and are not matched.
    transform, target_transform: of each x and y of the stream, as tensors. batch_transform: after
        them, of the x of the whole batch, (n, ...), on the device: as a rule several times as fast.
    buffer_transform, buffer_target_transform, buffer_batch_transform: of a draw, anew every time.
        None: the stream's, as samples are stored untransformed; but only its own, which gets
        tensors, if the buffer has a `transform` (`target_transform`). False: none. The model must
        see one dtype of stream and draw.
    store: whether batches are offered to the buffer; may be set between steps. False: it can be any
        buffer of pairs that holds what terms compare with: of exemplars, or open for reading.
    ignore_index: a label that `loss_fn` leaves out; default: what `loss_fn` says, as cross entropy
        does. If all labels are this one, the loss is 0. Without one all samples count.
    forward: a function of (model, x) that returns the outputs. None: a dict x is passed by name, a
        tuple by position; the outputs are the result's `logits`, if it has that, else the result.
    max_outputs: width of stored logits, for a model that will get more outputs.
    seed: of the terms' random choices, the same on all ranks; draws follow from the buffer's seed.
    device: where batches go; default: where x is.

    Bad arguments are ArgumentErrors. A batch that is refused has changed nothing.

    >>> import torch
    >>> from leanreplay import ReservoirBuffer
    >>> from leanreplay.torch import LogitMatching, ReplayLearner, ReplayLoss
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> terms = [ReplayLoss(0.5), LogitMatching(0.5)]
    >>> learner = ReplayLearner(model, optimizer, ReservoirBuffer(50), terms=terms)
    >>> for start in range(0, 100, 10):
    ...     step = learner.step(torch.randn(10, 4), torch.arange(start, start + 10) % 2)
    >>> learner.steps, sorted(step.losses), step.outputs.shape
    (10, ['logits', 'replay', 'stream'], torch.Size([10, 2]))

    `step` is short for this; do it yourself for mixed precision, accumulation, and so on:

    >>> learner.optimizer.zero_grad()
    >>> learner.loss(torch.randn(10, 4), torch.arange(10) % 2).backward()
    >>> learner.optimizer.step()
    >>> learner.after_step()
    """

    def __new__(cls: type[Self], *args: Any, **options: Any) -> Self:
        check_call(cls, ReplayLearner, args, options)
        method: Any = cls.__init__
        if "terms" in options and method is not ReplayLearner.__init__ and method.__module__.startswith(f"{__package__}."):
            raise ArgumentError(f"{cls.__name__} has terms of its own; a ReplayLearner takes any: ReplayLearner(..., terms=[...])")
        return super().__new__(cls)

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        buffer: DataBuffer,
        *,
        terms: Sequence[Term] = (),
        loss_fn: Callable[[Tensor, Tensor], Tensor] = torch.nn.functional.cross_entropy,
        replay_batch_size: int = 32,
        balance: str | None = None,
        loss_weight: float = 1.0,
        loss_normalization: bool = True,
        ema_memory_update_gamma: float = 1.0,
        mask_unused_classes: bool = False,
        transform: Function | None = None,
        target_transform: Function | None = None,
        batch_transform: Function | None = None,
        buffer_transform: Function | Literal[False] | None = None,
        buffer_target_transform: Function | Literal[False] | None = None,
        buffer_batch_transform: Function | Literal[False] | None = None,
        store: bool = True,
        ignore_index: int | None = None,
        forward: ForwardFunction | None = None,
        max_outputs: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        checks.check_parts(model, optimizer, buffer)
        self.transform = function_or_none("transform", transform)
        self.target_transform = function_or_none("target_transform", target_transform)
        self.batch_transform = function_or_none("batch_transform", batch_transform)
        self.buffer_transform, self.buffer_target_transform, self.buffer_batch_transform = (
            value is not False and function_or_none(name, value)
            for name, value in (
                ("buffer_transform", buffer_transform),
                ("buffer_target_transform", buffer_target_transform),
                ("buffer_batch_transform", buffer_batch_transform),
            )
        )
        required_function("loss_fn", loss_fn, "a function of (outputs, targets)")
        self.model, self.optimizer, self.buffer, self.loss_fn = model, optimizer, buffer, loss_fn
        self._intake = Intake(buffer, type(self).__name__)
        self.store = store
        self.replay_batch_size = required("replay_batch_size", replay_batch_size, 0, 2**40)
        self.replay_draw = Draw.of(balance=balance)
        self.loss_weight = number("loss_weight", loss_weight)
        self.ema_memory_update_gamma = fraction("ema_memory_update_gamma", ema_memory_update_gamma)
        if self.ema_memory_update_gamma < 1 and buffer.mode == "r":
            raise ModeError(f"ema_memory_update_gamma below 1 changes what is stored, but this buffer is open for reading only: {buffer!r}")
        self.loss_normalization, self.mask_unused_classes = bool(loss_normalization), bool(mask_unused_classes)
        self.ignore_index = (
            checks.ignored_by(loss_fn) if ignore_index is None else required("ignore_index", ignore_index, -(2**63), 2**63 - 1)
        )
        self.forward = function_or_none("forward", forward)
        self.max_outputs = integer("max_outputs", max_outputs, 1, 2**30)
        self.seed = required("seed", seed, -(2**127), 2**127 - 1)
        self.device = device_named(device)
        if not isinstance(terms, Iterable):
            raise ArgumentError(f"terms must be a list of leanreplay.torch.Term, got {terms!r:.200}")
        self.terms = list(terms)
        checks.check_terms(self.terms, model)

        self.steps = 0
        self.task: int | str | None = None
        self.outputs: Any = torch.empty(0)
        self.targets: Any = self.outputs
        self.losses: dict[str, float] = {}
        self.mask: Tensor | None = None
        self.pending: list[Batch] = []
        self._seen: Tensor | None = None  # which classes occurred in written batches
        self._task_begins = True  # until the first loss
        self._experiences = Experiences(buffer)
        self._statistics = Statistics()
        self._repeats: bool | None = None  # whether closures ask again; None: not known yet
        self._cross_entropy = loss_fn is torch.nn.functional.cross_entropy or isinstance(loss_fn, torch.nn.CrossEntropyLoss)
        self._labels = self._cross_entropy or mask_unused_classes or any(term.needs_labels for term in self.terms)
        for term in self.terms:
            term.attach(self)
        self._losses = Losses(self, "stream+replay" if any(term.weight is None for term in self.terms) else "stream")
        self._with_modules = [term for term in self.terms if type(term).modules is not Term.modules]
        self._with_after_step = [term for term in self.terms if getattr(term.after_step, "__func__", None) is not Term.after_step]
        self._with_keep = [term for term in self.terms if type(term).keep is not Term.keep]
        self.layers = tuple(dict.fromkeys(name for term in self.terms for name in term.layers))

    @property
    def module(self) -> Module:
        """The model, without a DistributedDataParallel around it."""
        return unwrapped(self.model)

    @property
    def evaluated_model(self) -> Module:
        """What the method evaluates: the model, or a copy of it that the method says is better."""
        return self.module

    @property
    def store(self) -> bool:
        """Whether batches are offered to the buffer. True is refused if it cannot take them."""
        return self._intake.store

    @store.setter
    def store(self, value: bool) -> None:
        self._intake.set_store(value)

    def loss(self, x: Any, y: Any) -> Tensor:
        """The loss of a batch x (n, ...), y (n, ...) and its replay, for a backward pass.

        Queues a copy of the batch for `after_step`; several calls before that accumulate. Changes
        nothing else but running statistics and the count of the buffer's draws. `losses` then has
        the values of the terms, `outputs` the model's outputs for x.

        A queued batch counts once, however often its loss is asked for, as LBFGS and SAM do: the
        same tensors (the same memory, not written to since) meet the same draws, and what the first
        pass gave is stored. Make tensors outside of a closure; to count a batch twice, clone it.

        Raises LossError for a loss that is not finite, ArgumentError for what does not fit. Then,
        as after any exception, nothing is queued, and the running statistics are as before.
        """
        checks.check_tensors(x, y)
        kind = self._intake.kind(x, y, self.pending)
        if self._intake.by_task and self.store:
            self._experiences.check()
        again = next((batch for batch in self.pending if batch.is_same(x, y)), None) if self.pending else None
        if again is None:
            inputs, targets, labels = prepare(self, x, y)
            # Before the model can change them.
            arrays = nests.each_leaf(copied_array, x), nests.each_leaf(copied_array, y)
            given, draws = ((x, y), versions(x, y)), draw(self, inputs, targets)
            batch = Batch(nests.first(x).shape[0], arrays, given, inputs, targets, labels, draws, kind, self.store, self._experiences.now)
        else:
            batch, self._repeats = again, True
        inputs = batch.inputs
        self._statistics.remember([self.module, *(module for term in self._with_modules for module in term.modules())])
        if self._repeats is not False:  # the model may work in place, and is to see the same again
            inputs = nests.copied(inputs)
            for _, replay in batch.draws:
                replay.shared = True
        try:
            total, *results = call("model, loss_fn or a term", self._compute, batch, inputs)
        except BaseException as error:
            self._statistics.put_back()
            if isinstance(error, (IndexError, RuntimeError)):
                checks.explain(error, self, batch, self._cross_entropy, self._labels)
            raise
        finally:
            self.mask = None
            for _, replay in batch.draws:
                replay.forget()
        if again is None:
            batch.stored, batch.moved, batch.seen = results
            self.pending.append(batch)
            if len(self.pending) == _MANY_WAIT:
                warnings.warn(
                    f"{_MANY_WAIT} batches wait for after_step, and none of them is in the buffer; call after_step() after each step of "
                    "the optimizer, and the model itself, not loss(), to look at data",
                    stacklevel=2,
                )
        return total

    def _compute(self, batch: Batch, inputs: Any) -> tuple[Tensor, Any, Any, Any]:
        """The loss, checked; what to store with the batch, what moves, which classes occurred."""
        n, draws = batch.size, batch.draws
        joined = next((draw for draw in draws if draw[0].together), None)
        if joined is None:
            all_y, run = batch.targets, forward(self.model, inputs, self.layers, self.forward)
        else:
            replay = joined[1]
            all_y = nests.joined([batch.targets, replay.y])
            replay.joint = run = forward(self.model, nests.joined([inputs, replay.x]), self.layers, self.forward)
        outputs = run.outputs if joined is None else nests.part(run.outputs, 0, n)
        self.outputs, self.targets = nests.each_leaf(Tensor.detach, outputs), batch.targets
        if self._labels and nests.first(inputs).device.type not in ("cpu", "meta"):
            # A kernel on a device would abort.
            checks.check_labels(self.outputs, batch.all_labels, self.ignore_index)
        before = self.pending[-1].seen if self.pending else self._seen
        self.mask = classes_seen(self, run.outputs, batch, before) if self.mask_unused_classes else None
        stored = values_to_keep(self, self._with_keep, run.detached().part(0, n) if joined and self._with_keep else run)
        new = self._intake.is_new(stored, n)
        if new:
            self._intake.check_names(stored)

        one_mean = joined is not None and joined[0].weight is None
        total = self._losses.total(*((run.outputs, all_y) if one_mean else (outputs, batch.targets)), draws, n)
        self.losses = self._losses.values
        if self.model is not self.module:
            check_reach(self.model, run.outputs, total, self._task_begins)
            self._task_begins = False
        if new:
            self._intake.check_values(batch, stored, self.pending)
        return total, stored, values_to_move(self, draws) if self.ema_memory_update_gamma < 1 else [], self.mask

    def criterion(self, outputs: Any, targets: Any) -> Tensor:
        """`loss_fn`, with unused classes masked if they are to be. It may change what it gets."""
        return self._losses.criterion(outputs, targets)

    def after_step(self, stepped: bool = True) -> None:
        """Write the queued batches and moved metadata, in one commit; then the terms update.

        To be called after the optimizer's step. stepped: False if the optimizer skipped it (an
        overflow in mixed precision): samples were seen and are stored, but the step does not count,
        and no copy of the model moves.

        StorageError (the disk is full): samples that did not arrive stay queued. Call this again
        once they fit, or go on: they are stored with the next batch.
        """
        batches, self.pending = self.pending, []
        if batches:
            before = self.buffer.seen
            try:
                write(self.buffer, batches)
            except StorageError:
                self.pending = unwritten(batches, self.buffer.seen - before)
                raise
            self._seen = batches[-1].seen
            self._repeats = bool(self._repeats)
        if stepped:
            self.steps += 1
            for term in self._with_after_step:
                term.after_step(self)

    def step(self, x: Any, y: Any, scaler: Any = None) -> Step:
        """One training step on a batch x (n, ...), y (n, ...) of the stream. Raises as `loss` does.

        An optimizer that needs a closure (LBFGS, SAM) gets one; the first evaluation is returned
        and stored. A step that fails leaves no sample queued, so it can be made again.

        scaler: a torch.amp.GradScaler, for a step within torch.autocast of float16. Where gradients
        overflow it skips the optimizer's step: the samples are stored, but the step does not count.
        """
        queued = len(self.pending)
        try:
            self._evaluate(x, y, scaler)
            made = Step(self._losses.value, self.losses, self.outputs, self.targets)
            made.stepped = make_step(self.optimizer, partial(self._evaluate, x, y), scaler)
        except BaseException:
            del self.pending[queued:]
            raise
        self.after_step(made.stepped)
        return made

    def _evaluate(self, x: Any, y: Any, scaler: Any = None) -> Tensor:
        """The loss of a batch, and its gradients, scaled if there is a scaler."""
        self.optimizer.zero_grad()
        loss = self.loss(x, y)
        if not loss.requires_grad:
            raise ArgumentError("nothing to train: all parameters are frozen by requires_grad_(False), or this is within torch.no_grad()")
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    def on_task_start(self, task: int | str | None = None) -> None:
        """To be called before the first batch of a task; some terms act then (shrink-and-perturb).

        task: its name; without one every call starts a task. If it is going on, nothing happens: a
        script that resumes in the middle of a task may call this again.
        """
        if task is not None and not isinstance(task, str):
            task = required("task", task, -(2**63), 2**63 - 1)
        if task is not None and task == self.task:
            return
        for term in self.terms:
            term.on_task_start(self)
        self._experiences.start(task)
        self.task, self._task_begins = task, True

    def on_task_end(self) -> None:
        """To be called after the last step of a task."""
        for term in self.terms:
            term.on_task_end(self)
        self.task = self._experiences.now = None

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, beside the model's and the optimizer's: plain values and tensors.

        `torch.load(weights_only=True)` takes it; its keys are always the same, as
        torch.distributed.checkpoint needs. Marks a restore point of the buffer. Of a buffer that is
        open for reading only the draws are kept; it must hold the same when the state is loaded.
        """
        if self.pending:
            raise StateError(f"{len(self.pending)} batches wait for after_step; call that first, or the state would lack them")
        return {
            "format": 1,
            "steps": self.steps,
            "task": self.task,
            **self._experiences.state(),
            "classes": [] if self._seen is None else self._seen.nonzero().flatten().tolist(),
            "terms": {term.name: term.state_dict() for term in self.terms},
            "buffer": reading_state(self.buffer) if self.buffer.mode == "r" else self.buffer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a state of `state_dict`, the buffer too. A StateError has changed nothing."""
        checks.check_state(state, type(self).__name__, self.terms)
        if self.buffer.mode == "r":
            load_reading_state(self.buffer, state.get("buffer"))
        else:
            self.buffer.load_state_dict(state.get("buffer"))  # type: ignore[arg-type]
        for term in self.terms:
            term.load_state_dict(state["terms"][term.name])
        self.steps, self.task, self.pending, self._seen = state["steps"], state["task"], [], None
        self._experiences.load(state)
        self._intake.forget()
        if classes := state["classes"]:
            self._seen = torch.zeros(max(classes) + 1, dtype=torch.bool)
            self._seen[classes] = True
