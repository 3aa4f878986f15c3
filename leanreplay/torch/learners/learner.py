"""The training step that all learners share: draw, forward, losses; then the buffer and the terms' own updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import torch

from ...arguments import call, check_call, fraction, function_or_none, number, required, required_function
from ...buffers.base import DataBuffer
from ...errors import ArgumentError, LossError, ModeError, StateError, StorageError
from ..data import Function, device_named
from ..distributed import check_reach, unwrapped
from . import checks
from .draws import Drawer, Transforms, load_reading_state, reading_state
from .experiences import Experiences
from .forward import Forward, Statistics, forward
from .intake import Intake
from .pending import Batch, Draws, Moved, copied, unwritten, versions, write
from .term import Term

_LEAVES_ARGUMENTS_ALONE = ("torch.nn.functional", "torch.nn.modules.loss")  # modules of losses that do
Self = TypeVar("Self", bound="ReplayLearner")  # typing has one of its own from Python 3.11 on


@dataclass(slots=True)
class Step:
    """What `step` returns.

    loss: the whole loss. losses: its terms by name, before weights and normalisation; "stream" is the
    batch's own, "stream+replay" one mean over batch and replay. outputs: the model's for the batch,
    (n, ...), detached.
    """

    loss: float
    losses: dict[str, float]
    outputs: torch.Tensor = field(repr=False, compare=False)


class ReplayLearner:
    """Rehearsal with any list of terms; the methods are this class with their papers' terms.

        loss = (loss_weight * l(f(x), y) + sum of weight_i * term_i) / (loss_weight + sum of weight_i)

    over the batch (x, y) of the stream and the terms' draws from the buffer. After the step the batch is
    offered to the buffer, so a draw never holds samples of its own step. While the buffer is empty there
    are no terms. The buffer gets each batch as it came, whatever models, transforms and losses change in place.

    model: has parameters, and outputs (n, ...). In a DistributedDataParallel only the stream's pass goes
        through the wrapper, which suffices for its exchange of gradients; a model with heads that some
        pass does not use needs find_unused_parameters=True there.
    optimizer: over the model's parameters.
    buffer: of pairs (x, y), of any kind that needs no features or weights; the papers use a
        `ReservoirBuffer`. If it holds samples, it must hold what the terms store. An
        `ExperienceBalancedBuffer` gets tasks as experiences: call `on_task_start` before the first batch of
        each. A task that is a number is the experience of that number; any other is the next one.
    terms: see `Term`; one of weight 0 takes no draw. loss_fn: the mean loss of (outputs, y).
    replay_batch_size: samples of a draw, uniform, without replacement; all of them if there are fewer.
    loss_normalization: divide by the sum of the weights, as above; the papers do not.
    ema_memory_update_gamma: what is stored with replayed samples moves to what the model gives for them,
        stored <- gamma * stored + (1 - gamma) * now, if the row still holds that sample. 1: it stays.
    mask_unused_classes: outputs of classes that occurred in no batch so far count as -inf in `loss_fn`, and
        are not matched.
    transform, target_transform: of each x and y of the stream, as tensors. batch_transform: after them, of
        the x of the whole batch, (n, ...), on the device: as a rule several times as fast.
    buffer_transform, buffer_target_transform, buffer_batch_transform: of a draw, computed anew every time.
        None: the stream's, as samples are stored before they are transformed. False: none. If the buffer
        has a `transform` of its own, which gets tensors here, None means only that one; likewise its
        `target_transform`. Stream and draw must have one dtype when the model sees them.
    store: whether batches are offered to the buffer; may change between steps: `learner.store = False`.
        False: the buffer is only replayed from. Then any buffer of pairs will do that holds what the terms
        compare with, also one of exemplars, or one that is open for reading.
    ignore_index: a label that `loss_fn` leaves out; default: what `loss_fn` says, as cross entropy does. If
        all labels are this one, the loss is 0. Losses without such a label count all samples.
    max_outputs: width of stored logits, for a model that will get more outputs.
    seed: of the terms' random choices; draws follow from the buffer's seed. The same on all ranks.
    device: where batches go; default: where x is.

    Bad arguments are ArgumentErrors. A batch that is refused has changed nothing.

    >>> import torch
    >>> from leanreplay import ReservoirBuffer
    >>> from leanreplay.torch import LogitMatching, ReplayLearner, ReplayLoss
    >>> model = torch.nn.Linear(4, 2)
    >>> learner = ReplayLearner(model, torch.optim.SGD(model.parameters(), lr=0.1), ReservoirBuffer(50),
    ...                         terms=[ReplayLoss(0.5), LogitMatching(0.5)], replay_batch_size=8)
    >>> for start in range(0, 100, 10):
    ...     step = learner.step(torch.randn(10, 4), torch.arange(start, start + 10) % 2)
    >>> learner.steps, sorted(step.losses), step.outputs.shape
    (10, ['logits', 'replay', 'stream'], torch.Size([10, 2]))

    `step` is short for this, in which the backward pass is yours (mixed precision, accumulation, ...):

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
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        buffer: DataBuffer,
        *,
        terms: Sequence[Term] = (),
        loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.nn.functional.cross_entropy,
        replay_batch_size: int = 32,
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
        self.loss_weight = number("loss_weight", loss_weight)
        self.loss_normalization = bool(loss_normalization)
        self.ema_memory_update_gamma = fraction("ema_memory_update_gamma", ema_memory_update_gamma)
        if self.ema_memory_update_gamma < 1 and buffer.mode == "r":
            raise ModeError(f"ema_memory_update_gamma below 1 changes what is stored, but this buffer is open for reading only: {buffer!r}")
        self.mask_unused_classes = bool(mask_unused_classes)
        self.ignore_index = _ignored_by(loss_fn) if ignore_index is None else required("ignore_index", ignore_index, -(2**63), 2**63 - 1)
        self.max_outputs = None if max_outputs is None else required("max_outputs", max_outputs, 1, 2**30)
        self.seed = required("seed", seed, -(2**127), 2**127 - 1)
        self.device = device_named(device)
        if not isinstance(terms, Iterable):
            raise ArgumentError(f"terms must be a list of leanreplay.torch.Term, got {terms!r:.200}")
        self.terms = list(terms)
        checks.check_terms(self.terms, model)

        self.steps = 0
        self.task: int | str | None = None
        self.outputs = torch.empty(0)
        self.losses: dict[str, float] = {}
        self.mask: torch.Tensor | None = None
        self.pending: list[Batch] = []
        self._seen: torch.Tensor | None = None  # which classes occurred in written batches
        self._task_begins = True  # until the first loss
        self._experiences = Experiences(buffer)
        self._drawer = Drawer(buffer)
        self._statistics = Statistics()
        self._repeats: bool | None = None  # whether losses are asked for several times, as in closures; None: not known yet
        self._ignored: int | None = None  # while `criterion` is to look whether all targets are this
        self._cross_entropy = loss_fn is torch.nn.functional.cross_entropy or isinstance(loss_fn, torch.nn.CrossEntropyLoss)
        self._labels = self._cross_entropy or mask_unused_classes or any(term.needs_labels for term in self.terms)
        for term in self.terms:
            term.attach(self)
        self._first = "stream+replay" if any(term.weight is None for term in self.terms) else "stream"
        self._with_modules = [term for term in self.terms if type(term).modules is not Term.modules]
        self._with_after_step = [term for term in self.terms if getattr(term.after_step, "__func__", None) is not Term.after_step]
        self._with_keep = [term for term in self.terms if type(term).keep is not Term.keep]
        self._layers = tuple(dict.fromkeys(name for term in self.terms for name in term.layers))

    @property
    def module(self) -> torch.nn.Module:
        """The model, without a DistributedDataParallel around it."""
        return unwrapped(self.model)

    @property
    def store(self) -> bool:
        """Whether batches are offered to the buffer. True is refused where the buffer cannot take them."""
        return self._intake.store

    @store.setter
    def store(self, value: bool) -> None:
        self._intake.set_store(value)

    # -- the loss ------------------------------------------------------------------------------------------------------

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The loss of a batch x (n, ...), y (n, ...) and its replay, for a backward pass. Queues the batch for `after_step`.

        Changes nothing else but running statistics of the model and the count of the buffer's draws.
        Several calls before one `after_step` accumulate. `losses` then has the values of the terms,
        `outputs` the model's outputs for x. x and y are copied first: they may be overwritten afterwards.

        A batch that waits for `after_step` counts once, however often its loss is asked for, as LBFGS and
        SAM do. With the same tensors (the same memory, not written to since) the draws are the same, and
        the first pass, before the step, is the one that is stored. So make tensors outside of a closure.
        A batch that is to count twice must be another tensor: `x.clone()`.

        Raises LossError for a loss that is not finite, and ArgumentError for what does not fit. Then, as
        after any exception, nothing is queued, and the running statistics are as before.
        """
        checks.check_tensors(x, y)
        kind = self._intake.kind(x, y, self.pending)
        if self._intake.by_task and self.store:
            self._experiences.check()
        again = next((batch for batch in self.pending if batch.is_same(x, y)), None) if self.pending else None
        if again is None:
            batch = self._prepare(x, y, kind)
        else:
            batch, self._repeats = again, True
        inputs = batch.inputs
        self._statistics.remember([self.module, *(module for term in self._with_modules for module in term.modules())])
        if self._repeats is not False:  # the model may work in place, and is to see the same again
            inputs = inputs.clone()
            for _, replay in batch.draws:
                replay.shared = True
        try:
            total, *results = call("model, loss_fn or a term", self._compute, batch, inputs)
        except BaseException as error:
            self._statistics.put_back()
            if isinstance(error, (IndexError, RuntimeError)):
                self._explain(error, batch)
            raise
        finally:
            self.mask = None
            for _, replay in batch.draws:
                replay.forget()
        if again is None:
            batch.stored, batch.moved, batch.seen = results
            self.pending.append(batch)
        return total

    def _prepare(self, x: torch.Tensor, y: torch.Tensor, kind: Any) -> Batch:
        """A new batch, transformed, with its draws."""
        stream = Transforms(self.transform, self.target_transform, self.batch_transform)
        inputs, targets, labels = stream.apply(x, y, x.device if self.device is None else self.device)
        arrays = copied(x), copied(y)  # before the model can change them
        of_draws = self._drawer.transforms(stream, self.buffer_transform, self.buffer_target_transform, self.buffer_batch_transform)
        looked_at = self._layers if self.ema_memory_update_gamma < 1 else ()
        draws = self._drawer.draw(self.terms, self.replay_batch_size, (inputs, targets), of_draws, self.module, looked_at)
        given = x, y, versions(x, y)
        return Batch(*arrays, given, inputs, targets, labels, draws, kind, self.store, self._experiences.now)

    def _compute(self, batch: Batch, inputs: torch.Tensor) -> tuple[torch.Tensor, Any, Any, Any]:
        """The loss, checked; then what to store with the batch, what moves, which classes occurred."""
        n, draws = inputs.shape[0], batch.draws
        joined = next((draw for draw in draws if draw[0].together), None)
        if joined is None:
            all_y, run = batch.targets, forward(self.model, inputs, self._layers)
        else:
            replay = joined[1]
            all_y = torch.cat([batch.targets, replay.y])
            replay.joint = run = forward(self.model, torch.cat([inputs, replay.x]), self._layers)
        outputs = run.outputs if joined is None else run.outputs.narrow(0, 0, n)
        self.outputs = outputs.detach()
        if self._labels and not (inputs.is_cpu or inputs.is_meta):
            self._check_labels(batch)  # before a kernel meets them, which would end the process's use of the device
        self.mask = seen = self._classes_seen(run.outputs, batch) if self.mask_unused_classes else None
        stored = self._values_to_keep(run, n, joined is not None)
        new = self._intake.is_new(stored, n)
        if new:
            self._intake.check_names(stored)

        one_mean = joined is not None and joined[0].weight is None
        total = self._total(run.outputs, all_y, draws, n) if one_mean else self._total(outputs, batch.targets, draws, n)
        if self.model is not self.module:
            check_reach(self.model, run.outputs, total, self._task_begins)
            self._task_begins = False
        if new:
            self._intake.check_values(batch, stored, self.pending)
        return total, stored, self._values_to_move(draws) if self.ema_memory_update_gamma < 1 else [], seen

    def _total(self, outputs: torch.Tensor, targets: torch.Tensor, draws: Draws, n: int) -> torch.Tensor:
        """The whole loss. Raises LossError unless it is finite.

        A mean over ignored labels only is NaN in torch. Only then is the loss computed once more, as 0.
        """
        try:
            return self._weigh(outputs, targets, draws, n)
        except LossError as error:
            if self.ignore_index is None and not targets.is_floating_point():
                raise LossError(f"{error}; if none of its labels counts, say which do not: ignore_index=...") from None
            if self.ignore_index is None:
                raise
        self._ignored = self.ignore_index
        try:
            return self._weigh(outputs, targets, draws, n)
        finally:
            self._ignored = None

    def _weigh(self, outputs: torch.Tensor, targets: torch.Tensor, draws: Draws, n: int) -> torch.Tensor:
        """The weighted sum of the losses, whose values go into `losses`."""
        total = first = self.criterion(outputs, targets)
        losses, weights = {self._first: first}, self.loss_weight
        if weights != 1:
            total = weights * first
        for term, replay in draws:
            if term.weight is not None:
                losses[term.name] = value = term.loss(self, replay)
                total, weights = total + (value if term.weight == 1 else term.weight * value), weights + term.weight
        if self.loss_normalization and weights not in (0, 1):
            total = total / weights
        *values, self._loss = checks.finite(total, losses, self.steps, n, len(draws[0][1]) if draws else 0)
        self.losses = dict(zip(losses, values, strict=True))
        return total

    def criterion(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """`loss_fn`, with the outputs of unused classes masked if they are to be. It may change what it gets."""
        if self._ignored is not None and bool(targets.eq(self._ignored).all()) and not bool(outputs.isnan().any()):
            return outputs[:0].sum()  # 0, with a gradient
        if self.mask is not None:
            outputs = outputs.masked_fill(~self.mask, -math.inf)
        if getattr(self.loss_fn, "__module__", None) not in _LEAVES_ARGUMENTS_ALONE:
            outputs, targets = outputs.clone(), targets.clone()
        return self.loss_fn(outputs, targets)

    def _explain(self, error: Exception, batch: Batch) -> None:
        """Raise an ArgumentError in place of torch's error if the batch is what does not fit."""
        checks.explain(error, self.module, batch.inputs, batch.targets, self.outputs if self._cross_entropy else None)
        if batch.inputs.is_cpu and (self._labels or checks.speaks_of_labels(error)):
            self._check_labels(batch)
        if str(error).startswith("Target "):  # of another loss_fn that is made of torch's
            raise ArgumentError(f"loss_fn: {error}: a label is no class of the outputs {tuple(self.outputs.shape)}") from error

    def _check_labels(self, batch: Batch) -> None:
        """Raise ArgumentError unless labels are numbers of outputs. On the CPU torch notices by itself, and this explains it."""
        labels = [("batch", batch.labels), *(("replayed samples", replay.labels) for _, replay in batch.draws)]
        checks.check_labels(self.outputs, labels, self.ignore_index)

    def _classes_seen(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Which classes occurred up to and with this batch, (outputs,) bool."""
        if outputs.ndim != 2 or batch.targets.ndim != 1 or batch.targets.is_floating_point():
            raise ArgumentError(f"mask_unused_classes needs outputs (n, classes) and integer labels (n,), got {tuple(outputs.shape)}")
        classes = outputs.shape[1]
        seen = torch.zeros(classes + 1, dtype=torch.bool, device=outputs.device)  # the last one stands for what is ignored
        before = self.pending[-1].seen if self.pending else self._seen
        if before is not None:
            k = min(before.shape[0], classes)
            seen[:k] = before[:k].to(seen.device)
        for labels in [batch.targets, *(replay.y for _, replay in batch.draws)]:  # others may have filled the buffer
            y = labels.long()
            if self.ignore_index is not None:
                y = y.masked_fill(y == self.ignore_index, classes)
            seen.scatter_(0, y, True)  # which, unlike an index, takes no -1 for the last one
        return seen[:classes]

    def _values_to_keep(self, run: Forward, n: int, joined: bool) -> dict[str, torch.Tensor]:
        """Name -> copies of what the terms store with each sample of the batch."""
        stored: dict[str, torch.Tensor] = {}
        stream = run.detached().part(0, n) if joined and self._with_keep else run
        for term in self._with_keep:
            for name, value in term.keep(self, stream).items():
                if name in stored:
                    raise ArgumentError(
                        f"two terms store metadata as {name!r} with each sample; let keep of {term.name!r} use another name"
                    )
                stored[name] = value.detach().clone() if isinstance(value, torch.Tensor) else value
        return stored

    def _values_to_move(self, draws: Draws) -> list[Moved]:
        """(rows, positions, name -> new values) of every draw that went through the model."""
        moved: list[Moved] = []
        for replay in dict.fromkeys(replay for _, replay in draws):
            now = replay.latest
            if now is None:
                continue
            values: dict[str, torch.Tensor] = {}
            for term in self.terms:
                moves = term.move(self, replay, now, self.ema_memory_update_gamma)
                values.update({name: value.detach().clone() for name, value in moves.items()})
            if values:
                moved.append((replay.metadata["idx"], replay.metadata["position"], values))
        return moved

    # -- the step ------------------------------------------------------------------------------------------------------

    def after_step(self, stepped: bool = True) -> None:
        """What follows the optimizer's step: the queued batches and moved metadata go into the buffer in one commit; then terms update.

        stepped: False if the optimizer skipped the step (as after an overflow in mixed precision). Such a
        step does not count: its samples were seen and are stored, but no copy of the model moves.

        If the buffer cannot take the batches (StorageError: the disk is full), the samples that did not
        arrive stay queued. Call this again once it can, or go on: the next call stores them too.
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

    def step(self, x: torch.Tensor, y: torch.Tensor) -> Step:
        """One training step on a batch from the stream, x (n, ...), y (n, ...). Raises what `loss` raises.

        An optimizer that asks for a closure (LBFGS, SAM) gets one; the first evaluation is returned and
        stored. A step that fails leaves no sample queued, so it can be made again.
        """
        queued = len(self.pending)
        try:
            self._evaluate(x, y)
            made = Step(self._loss, self.losses, self.outputs)
            try:
                self.optimizer.step()
            except (AssertionError, RuntimeError, TypeError, ValueError) as error:
                if "closure" not in str(error) and "'NoneType' object is not callable" not in str(error):
                    raise
                closure: Any = partial(self._evaluate, x, y)
                self.optimizer.step(closure)  # it asks for one before it has changed anything
        except BaseException:
            del self.pending[queued:]
            raise
        self.after_step()
        return made

    def _evaluate(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, and its gradients."""
        self.optimizer.zero_grad()
        loss = self.loss(x, y)
        if not loss.requires_grad:
            raise ArgumentError("nothing to train: all parameters are frozen by requires_grad_(False), or this is within torch.no_grad()")
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    # -- tasks and states ----------------------------------------------------------------------------------------------

    def on_task_start(self, task: int | str | None = None) -> None:
        """To be called before the first batch of a task; the terms say what happens there (shrink-and-perturb, for instance).

        task: a name for it. If this task is going on already, as after `load_state_dict` in the middle of
        it, nothing happens: a script that names its tasks may call this again when it resumes. Without a
        name every call starts a task.
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

        `torch.load(weights_only=True)` takes it. Its keys are always the same, as
        torch.distributed.checkpoint needs them. Marks a restore point of the buffer. Of a buffer that is
        open for reading it keeps the count of draws; that buffer must hold the same when it is loaded.
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
        """Go back to a state that `state_dict` returned, the buffer too. Raises StateError, and changes nothing, where that cannot be."""
        checks.check_state(state, type(self).__name__, self.terms)
        if self.buffer.mode == "r":
            load_reading_state(self.buffer, state.get("buffer"))
        else:
            self.buffer.load_state_dict(state.get("buffer"))  # type: ignore[arg-type]
        for term in self.terms:
            term.load_state_dict(state["terms"][term.name])
        self.steps, self.task, self.pending, self._seen = state["steps"], state["task"], [], None
        self._experiences.load(state)
        self._drawer.forget()
        self._intake.forget()
        if classes := state["classes"]:
            self._seen = torch.zeros(max(classes) + 1, dtype=torch.bool)
            self._seen[classes] = True


def _ignored_by(loss_fn: Any) -> int | None:
    """The label that a loss leaves out, where that can be told."""
    given: dict[str, Any] = {}
    while isinstance(loss_fn, partial):
        loss_fn, given = loss_fn.func, {**loss_fn.keywords, **given}
    default = -100 if loss_fn in (torch.nn.functional.cross_entropy, torch.nn.functional.nll_loss) else None
    found = given.get("ignore_index", getattr(loss_fn, "ignore_index", default))
    return found if type(found) is int else None
