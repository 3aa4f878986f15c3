"""The training step that all learners share: draw, forward, losses; then moved metadata, the batch and the terms' own updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from ...buffers.balanced import ExperienceBalancedBuffer
from ...buffers.base import DataBuffer
from ...buffers.exemplars import ParametricBuffer
from ...buffers.weighted import WeightedReservoirBuffer
from ...errors import ArgumentError, LossError, ModeError, SchemaError, StateError, StorageError
from ...policies.base import Policy
from ...samples.batch import check_call, required
from ...samples.schema import check_leaf
from ..data import bfloat16_fields, checked, device_named, per_batch, per_sample, to_torch
from ..distributed import check_reach, unwrapped
from . import checks
from .replay import Replay, Statistics, check_layers, forward
from .term import Term, fraction, number

Function = Callable[[Any], Any]
_OUT_OF_RANGE = ("target out of range", "out of bounds for", "Class values")  # what torch says of labels that are no class
_PURE = ("torch.nn.functional", "torch.nn.modules.loss")  # whose losses change nothing that they get
Self = TypeVar("Self", bound="ReplayLearner")  # typing has one of its own from Python 3.11 on
Moved = tuple[Any, Any, dict[str, torch.Tensor]]  # rows, positions, name -> values


@dataclass(slots=True)
class Step:
    """What `step` returns.

    loss: the whole loss. losses: its terms by name, before weights and normalisation; "stream" is that of the batch itself,
    "stream+replay" one mean over batch and replay.
    """

    loss: float
    losses: dict[str, float]
    _outputs: tuple[torch.Tensor, int]  # of a pass, detached, and how many of them are the batch's

    @property
    def outputs(self) -> torch.Tensor:
        """The model's outputs for the batch, (n, ...), detached."""
        return _first(*self._outputs)


@dataclass(slots=True)
class _Queued:
    """A batch whose loss was computed: what `after_step` will write. x, y: arrays, or tensors where there are none of that kind.
    All of it are copies: models, transforms and losses may work in place, and loops fill one batch again and again.
    like: shapes and dtypes of samples. seen: which classes occurred up to here (with masks). offered: whether the samples go to the
    buffer. batch: x and y as they were given, and their versions. ready: what went into the model, for the same batch once more; () if
    that counts as another one. experience: the task's number."""

    x: Any
    y: Any
    stored: dict[str, torch.Tensor]
    moved: list[Moved]
    seen: torch.Tensor | None
    like: Any
    offered: bool
    batch: tuple[Any, ...] = ()
    ready: tuple[Any, ...] = ()
    experience: int | None = None

    def holds(self, x: torch.Tensor, y: torch.Tensor) -> bool:
        """Whether this is that batch: the same memory, not written to since."""
        if not self.ready or _versions(x, y) != self.batch[2]:
            return False
        if not _same_memory(x, self.batch[0]) or not _same_memory(y, self.batch[1]):
            return False
        return _equal(self.x, x) and _equal(self.y, y)  # NumPy counts no writes


class ReplayLearner:
    """Rehearsal with any list of terms; the methods are this class with their papers' terms.

        loss = (loss_weight * l(f(x), y) + sum of weight_i * term_i) / (loss_weight + sum of weight_i)

    over the batch (x, y) from the stream and what the terms make of draws from the buffer; after the step the batch is offered to the
    buffer, so a draw never holds samples of its own step. While the buffer is empty there are no terms.

    model: with parameters, and outputs (n, ...); in a DistributedDataParallel only the stream's pass goes through the wrapper, which is
        what its gradient exchange needs; a model with heads that a pass does not use needs find_unused_parameters=True there.
    optimizer: over the model's parameters.
    buffer: of pairs (x, y); any that asks for no features or weights, the papers use a `ReservoirBuffer`. One that holds samples must
        hold what the terms store. An `ExperienceBalancedBuffer` gets tasks as experiences, so `on_task_start` must be called before the
        first batch of each: a task that is a number is the experience of that number; one of another name, or of none, is the next one.
    terms: see `Term`; ones of weight 0 take no draw. loss_fn: mean loss of (outputs, y).
    replay_batch_size: samples of a draw, uniform and without replacement; as many as the buffer holds, if fewer.
    loss_normalization: divide by the sum of the weights, as above; the papers do not.
    ema_memory_update_gamma: what is stored with replayed samples moves towards what the model gives for them now,
        stored <- gamma * stored + (1 - gamma) * now, where the row still holds that sample. 1: stays as it is.
    mask_unused_classes: outputs of classes that occurred in no batch so far count as -inf in `loss_fn`, and are not matched.
    transform, target_transform: of each x and y of the stream, as tensors. batch_transform: after these, of the x of the whole batch,
        (n, ...), on the device: as a rule several times as fast.
    buffer_transform, buffer_target_transform, buffer_batch_transform: likewise of a draw, anew every time. None: that of the stream, as
        what is stored is the batch before it was transformed; False: none. If the buffer has a `transform` of its own, which gets
        tensors here, None means only that; likewise its `target_transform`. What the model gets must be of one dtype.
        What is stored is the batch as it came, whatever models, transforms and losses change in place.
    store: whether batches are offered to the buffer. False: it is only replayed from. Then any buffer of pairs will do that holds what the
        terms compare with, one of exemplars or one that is open for reading too. May be changed between steps: `learner.store = False`.
    ignore_index: a label that `loss_fn` leaves out; default: what `loss_fn` says, as cross entropy does. Where all labels are that one,
        the loss is 0. Other losses need no labels, and count such samples.
    max_outputs: width of stored logits, for a model whose outputs will become more; without it they must stay as many as they are.
    seed: of the terms' random choices (draws follow from the buffer's seed). The same on all ranks of a distributed run.
    device: where batches go; default: where x is.

    Bad arguments are ArgumentErrors; a batch that is refused has changed nothing.

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

    `step` is short for this, which leaves the backward pass to you (for mixed precision, accumulation over batches, and so on):

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
        if not isinstance(model, torch.nn.Module):
            raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if next(model.parameters(), None) is None:
            raise ArgumentError(f"{type(model).__name__} has no parameters: there is nothing to train")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ArgumentError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        mine = set(model.parameters())
        if not any(p in mine for group in optimizer.param_groups for p in group["params"]):
            raise ArgumentError(f"the optimizer has none of the parameters of this {type(model).__name__}; make it of model.parameters()")
        if not isinstance(buffer, DataBuffer):
            raise ArgumentError(f"buffer must be a buffer of leanreplay, got {type(buffer).__name__}")
        self.transform = checked("transform", transform)
        self.target_transform = checked("target_transform", target_transform)
        self.batch_transform = checked("batch_transform", batch_transform)
        self.buffer_transform = buffer_transform is not False and checked("buffer_transform", buffer_transform)
        self.buffer_target_transform = buffer_target_transform is not False and checked("buffer_target_transform", buffer_target_transform)
        self.buffer_batch_transform = buffer_batch_transform is not False and checked("buffer_batch_transform", buffer_batch_transform)
        if not callable(loss_fn):
            raise ArgumentError(f"loss_fn must be a function of (outputs, targets), got {loss_fn!r:.200}")
        self.model, self.optimizer, self.buffer, self.loss_fn = model, optimizer, buffer, loss_fn
        self._like: Any = None  # shapes and dtypes of samples that the buffer will take
        self._kept: Any = None  # shapes and dtypes of what terms store, which it will take as well
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
        self._check_terms()
        self.steps = 0
        self.task: int | str | None = None
        self._task_begins = True  # until the first loss
        self._by_task = isinstance(buffer, ExperienceBalancedBuffer)
        self._experience: int | None = None  # of the task that is going on
        self._experiences: dict[str, int] = {}  # of all tasks that have names
        self._outputs = torch.empty(0), 0
        self.losses: dict[str, float] = {}
        self.mask: torch.Tensor | None = None  # (outputs,) bool, during a `loss`: the classes that occurred so far
        self._seen: torch.Tensor | None = None
        self._queue: list[_Queued] = []
        self._bits: frozenset[str] | None = None  # its fields that hold bfloat16
        self._statistics = Statistics()
        self._repeats: bool | None = None  # whether losses are asked for several times, as in closures; None: not known yet
        self._picky = buffer.policy_class.check_groups is not Policy.check_groups  # whether it may refuse labels for their values
        self._cross_entropy = loss_fn is torch.nn.functional.cross_entropy or isinstance(loss_fn, torch.nn.CrossEntropyLoss)
        self._labels = self._cross_entropy or mask_unused_classes or any(term.needs_labels for term in self.terms)
        self._ignored: int | None = None  # while `criterion` is to look whether all targets are this
        for term in self.terms:
            term.attach(self)
        self._first = "stream+replay" if any(term.weight is None for term in self.terms) else "stream"
        self._users = [term for term in self.terms if type(term).modules is not Term.modules]
        self._followers = [term for term in self.terms if getattr(term.after_step, "__func__", None) is not Term.after_step]
        self._keepers = [term for term in self.terms if type(term).keep is not Term.keep]
        self._layers = tuple(dict.fromkeys(name for term in self.terms for name in term.layers))

    def _check_terms(self) -> None:
        for term in self.terms:
            if not isinstance(term, Term):
                raise ArgumentError(f"terms are objects of leanreplay.torch.Term, got {type(term).__name__}")
            if term.layers:
                check_layers(self.model, term.layers)
            if term.draw is not None and type(term).loss is Term.loss:
                raise ArgumentError(
                    f"the term {term.name!r} takes a draw, but {type(term).__name__} has no loss; give it one, or draw=None"
                )
        names = ["stream", "stream+replay", *(term.name for term in self.terms)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ArgumentError(f"several terms are called {twice[0]!r}; give each a name of its own: name='...'")
        if sum(term.together for term in self.terms) > 1:
            raise ArgumentError("only one term's draw can go through the model together with the stream")

    @property
    def module(self) -> torch.nn.Module:
        """The model, without a DistributedDataParallel around it."""
        return unwrapped(self.model)

    @property
    def outputs(self) -> torch.Tensor:
        """The model's outputs for the batch of the last `loss`, (n, ...), detached."""
        return _first(*self._outputs)

    @property
    def store(self) -> bool:
        """Whether batches are offered to the buffer. True is refused where the buffer cannot take them."""
        return self._store

    @store.setter
    def store(self, value: bool) -> None:
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
        self._store = value
        self._like = self._kept = None  # what is stored must be checked, what is not need not

    def _refuse_classes(self, why: str) -> None:
        """Raise ArgumentError if the buffer needs classes."""
        if self.buffer.policy_class.needs_groups and not isinstance(self.buffer, ExperienceBalancedBuffer):
            raise ArgumentError(
                f"{type(self.buffer).__name__} balances over classes, but {why}; use a buffer that needs no classes, such as a "
                "ReservoirBuffer or an ExperienceBalancedBuffer"
            )

    # -- the loss ------------------------------------------------------------------------------------------------------

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The loss of a batch x (n, ...), y (n, ...) and its replay, for a backward pass. Queues the batch for `after_step`.

        Nothing else changes, but what a pass through the model changes, running statistics, and the count of the buffer's draws. Several
        calls before one `after_step` accumulate. The values of the terms are in `losses` then, the outputs for x in `outputs`. x and y
        are copied first: they may be overwritten afterwards.

        A batch that waits for `after_step` counts once, however often its loss is asked for, as LBFGS and SAM do: with the same tensors
        (the same memory, not written to since) the draws are the same, and what is stored is that of the first pass, before the
        step. A batch that is to count twice must be another tensor: `x.clone()`. So make tensors outside of a closure.

        Raises LossError for a loss that is not finite, and ArgumentError for what does not fit. Then, as after any
        exception, nothing is queued, and the running statistics are as before.
        """
        if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
            raise ArgumentError(f"a batch is two tensors, x and y; got {type(x).__name__} and {type(y).__name__}")
        if x.is_nested or y.is_nested:
            raise ArgumentError(
                "a batch is two tensors of samples of one shape, got a nested tensor; pad it: torch.nested.to_padded_tensor(x, 0)"
            )
        shapes = x.shape, y.shape
        if not shapes[0] or not shapes[1] or shapes[0][0] != shapes[1][0]:
            raise ArgumentError(f"x and y need one entry per sample each, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
        if shapes[0][0] == 0:
            raise ArgumentError("the batch is empty; leave such a batch out")
        like = shapes[0][1:], x.dtype, shapes[1][1:], y.dtype
        if like != self._like:
            self._check_batch(x, y, like)
        if self._by_task and self._experience is None and self._store:
            raise ArgumentError(
                f"{type(self.buffer).__name__} keeps the same number of samples of each task, but no task has begun: call "
                "on_task_start(task) before the first batch of each, as fit does"
            )
        device = x.device if self.device is None else self.device
        again = next((q for q in self._queue if q.holds(x, y)), None) if self._queue else None
        if again is not None:
            inputs, targets, labels, draws = again.ready
            self._repeats = True
        else:
            inputs, targets, labels = self._ready(x, y, (self.transform, self.target_transform, self.batch_transform), "", device)
            arrays = _copied(x), _copied(y)
            draws = self._draw(inputs, targets)
            ready = inputs, targets, labels, draws
        self._statistics.remember(self.module, self._users)
        if self._repeats is not False:  # the model may work in place, and is to see the same again
            inputs = inputs.clone()
            for _, replay in draws:
                replay.shared = True
        try:
            total, stored, moved, seen = self._compute(x, y, inputs, targets, labels, draws)
        except BaseException as error:
            self._statistics.put_back()
            if isinstance(error, StopIteration):  # which would end somebody's loop in silence
                raise ArgumentError(
                    "model, loss_fn or a term raised StopIteration: an iterator that it reads from has come to its end"
                ) from error
            if isinstance(error, (IndexError, RuntimeError)):
                checks.explain(error, self.module, inputs, targets, self.outputs if self._cross_entropy else None)
                if inputs.is_cpu and (self._labels or any(phrase in str(error) for phrase in _OUT_OF_RANGE)):
                    self._check_labels(targets, draws)
                if str(error).startswith("Target "):  # of another loss_fn that is made of torch's
                    raise ArgumentError(f"loss_fn: {error}: a label is no class of the outputs {tuple(self.outputs.shape)}") from error
            raise
        finally:
            self.mask = None
            for _, replay in draws:
                replay.forget()
        if again is None:
            batch = x, y, _versions(x, y)
            self._queue.append(_Queued(*arrays, stored, moved, seen, like, self._store, batch, ready, self._experience))
        return total

    def _check_batch(self, x: torch.Tensor, y: torch.Tensor, like: Any) -> None:
        """Raise SchemaError for a batch that the buffer would refuse after the step, ArgumentError for a buffer of something else."""
        if self._store and (y.ndim != 1 or y.is_floating_point() or y.dtype is torch.bool):
            self._refuse_classes(f"labels are {y.dtype} of shape {tuple(y.shape)}, where integers (n,) are expected")
        waiting = next((q.like for q in self._queue if q.offered and self._store), like)
        if like != waiting:
            raise SchemaError(f"samples of shapes and dtypes {like}, but those that wait for after_step have {waiting}")
        schema = self.buffer.schema
        if schema is not None:
            if schema.structure not in (["tuple", ["leaf", 0], ["leaf", 1]], ["list", ["leaf", 0], ["leaf", 1]]):
                raise ArgumentError(f"a learner needs a buffer of pairs (x, y) of arrays, but this one's samples are {schema}")
            for leaf, field in zip((x, y), schema.data if self._store else (), strict=self._store):
                check_leaf(leaf, field, x.shape[0])
        self._like = like

    def _ready(
        self, x: torch.Tensor, y: torch.Tensor, functions: Sequence[Function | None], prefix: str, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x and y transformed, and on the device; y also where it was before. functions: of a sample's x, of its y, of a batch's x."""
        transform, target_transform, batch_transform = functions
        if transform is not None:
            x = per_sample(transform, x, f"{prefix}transform")
        if target_transform is not None:
            y = per_sample(target_transform, y, f"{prefix}target_transform")
        if x.device != device:
            x = x.to(device)
        if batch_transform is not None:
            x = per_batch(batch_transform, x, f"{prefix}batch_transform")
        return x, y if y.device == device else y.to(device), y

    def _of_draws(self) -> tuple[Function | None, Function | None, Function | None]:
        """What transforms draws: what was given; else what the stream has, unless the buffer has a transform of its own."""
        own, own_of_targets = self.buffer.transform is not None, self.buffer.target_transform is not None
        x, y, whole = self.buffer_transform, self.buffer_target_transform, self.buffer_batch_transform
        return (
            (None if own else self.transform) if x is None else x or None,
            (None if own_of_targets else self.target_transform) if y is None else y or None,
            (None if own else self.batch_transform) if whole is None else whole or None,
        )

    def _draw(self, inputs: torch.Tensor, targets: torch.Tensor) -> list[tuple[Term, Replay]]:
        """The terms that count now, each with its draw."""
        draws: list[tuple[Term, Replay]] = []
        m, replay = self.replay_batch_size, None
        layers = self._layers if self.ema_memory_update_gamma < 1 else ()
        functions = self._of_draws()
        for term in self.terms if m else ():
            if term.draw is None or term.weight == 0:
                continue
            if replay is None or term.draw == "own":
                drawn = self.buffer._sample(m, at_most=True, convert=to_torch)
                if drawn is None:  # the buffer is empty
                    return []
                pair, metadata = drawn
                x, y, labels = self._ready(*self._tensors(pair), functions, "buffer_", inputs.device)
                replay = Replay(self.module, x, y, metadata, layers)
                replay.labels = labels
                self._check_alike(inputs, targets, x, y, term.together)
                replay.bits = self._bits or frozenset()
            else:
                replay.shared = True
            replay.layers = (*replay.layers, *term.layers)
            draws.append((term, replay))
        return draws

    def _check_alike(self, x: torch.Tensor, y: torch.Tensor, x_old: torch.Tensor, y_old: torch.Tensor, together: bool) -> None:
        """Raise ArgumentError if the model would see two kinds of samples. together: in one batch, where torch would widen dtypes."""
        kinds = [(x.shape[1:], y.shape[1:], y.dtype) for x, y in ((x, y), (x_old, y_old))] if together else []
        if x.dtype == x_old.dtype and kinds[:1] == kinds[1:]:
            return
        stream, draw = (f"x {a.dtype} of {tuple(a.shape[1:])}, y {b.dtype} of {tuple(b.shape[1:])}" for a, b in ((x, y), (x_old, y_old)))
        raise ArgumentError(
            f"samples of the stream ({stream}) and of the buffer ({draw}) differ: the model would see two kinds; let transforms of "
            "the stream (transform, ...) and of draws (buffer_transform, ..., or the buffer's own) make the same"
        )

    def _tensors(self, pair: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What was drawn, as two tensors."""
        if self._bits is None:
            self._bits = bfloat16_fields(self.buffer.schema)  # type: ignore[arg-type]  # it holds samples, so it has one
        if not self._bits and type(pair[0]) is type(pair[1]) is np.ndarray and pair[0].dtype.kind in "biufc":
            try:
                return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])
            except TypeError:
                pass  # of a dtype that this torch lacks, which to_torch says
        x, y = to_torch(pair[0], self._bits, path="data/0"), to_torch(pair[1], self._bits, path="data/1")
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return x, y
        raise ArgumentError(
            f"a learner needs tensors or arrays from its buffer, but drawn were {type(x).__name__} and {type(y).__name__}: "
            "what does the buffer's transform return?"
        )

    def _compute(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        labels: torch.Tensor,
        draws: list[tuple[Term, Replay]],
    ) -> tuple[torch.Tensor, Any, Any, Any]:
        """The loss, checked, and what to queue: what to store, what moves, which classes occurred."""
        n = inputs.shape[0]
        joined = one_mean = None
        for term, replay in draws:
            if term.together:
                joined, one_mean = replay, term.weight is None
        if joined is None:
            all_y, both = targets, forward(self.model, inputs, self._layers)
        else:
            all_x, all_y = joined.behind(inputs, targets)
            both = forward(self.model, all_x, self._layers)
            joined.joined(both)
        self._outputs = both.outputs.detach(), n
        if self._labels and not (inputs.is_cpu or inputs.is_meta):
            self._check_labels(labels, draws)  # before a kernel meets them, which would end the process's use of the device
        self.mask = seen = self._mark_seen(both.outputs, targets, draws) if self.mask_unused_classes else None
        stored: dict[str, torch.Tensor] = {}
        if self._keepers:
            stream = both if joined is None else both.part(0, n, detached=True)
            for term in self._keepers:
                for name, value in term.keep(self, stream).items():
                    if name in stored:
                        raise ArgumentError(
                            f"two terms store metadata as {name!r} with each sample; let keep of {term.name!r} use another name"
                        )
                    stored[name] = value.detach().clone() if isinstance(value, torch.Tensor) else value
        kept = (n, [(name, getattr(v, "shape", None), getattr(v, "dtype", None)) for name, v in stored.items()]) if stored else ()
        new = kept != self._kept or (self._picky and self._store)
        if new:
            self._check_names(stored)

        mean_of = (both.outputs, all_y) if joined is None or one_mean else (both.outputs.narrow(0, 0, n), targets)
        try:
            total = self._weigh(*mean_of, draws, n)
        except LossError as error:
            if self.ignore_index is None and not targets.is_floating_point():
                raise LossError(f"{error}; if none of its labels counts, say which do not: ignore_index=...") from None
            if self.ignore_index is None:
                raise
            self._ignored = self.ignore_index
            try:
                total = self._weigh(*mean_of, draws, n)
            finally:
                self._ignored = None
        if self.model is not self.module:
            check_reach(self.model, both.outputs, total, self._task_begins)
            self._task_begins = False
        if new:  # last, as terms say more clearly what is wrong
            if self._store:
                self._check_stored(x, y, stored)
            self._kept = kept
        moved = self._to_move(draws) if self.ema_memory_update_gamma < 1 else []
        return total, stored, moved, seen

    def _weigh(self, outputs: torch.Tensor, targets: torch.Tensor, draws: list[tuple[Term, Replay]], n: int) -> torch.Tensor:
        """The whole loss. Raises LossError unless it is finite."""
        first = self.criterion(outputs, targets)
        losses: dict[str, torch.Tensor] = {self._first: first}
        total, weights = first if self.loss_weight == 1 else self.loss_weight * first, self.loss_weight
        for term, replay in draws:
            if term.weight is not None:
                losses[term.name] = value = term.loss(self, replay)
                total, weights = total + (value if term.weight == 1 else term.weight * value), weights + term.weight
        if self.loss_normalization and weights not in (0, 1):
            total = total / weights
        if total is first and type(first) is torch.Tensor and not first.ndim and math.isfinite(whole := float(first.item())):
            self._total, self.losses = whole, {self._first: whole}
        else:
            *values, self._total = checks.finite(total, losses, self.steps, n, len(draws[0][1]) if draws else 0)
            self.losses = dict(zip(losses, values, strict=True))
        return total

    def criterion(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """`loss_fn`, with the outputs of unused classes masked if they are to be. It may change what it gets."""
        if self._ignored is not None and bool(targets.eq(self._ignored).all()) and not bool(outputs.isnan().any()):
            return outputs[:0].sum()  # a mean over nothing is NaN; this is 0, and has a gradient
        if self.mask is not None:
            outputs = outputs.masked_fill(~self.mask, -math.inf)
        if getattr(self.loss_fn, "__module__", None) not in _PURE:
            outputs, targets = outputs.clone(), targets.clone()
        return self.loss_fn(outputs, targets)

    def _check_labels(self, labels: torch.Tensor, draws: list[tuple[Term, Replay]]) -> None:
        """Raise ArgumentError unless labels are numbers of outputs. On the CPU this explains an error: there torch notices by itself."""
        drawn = [("replayed samples", replay.y if replay.labels is None else replay.labels) for _, replay in draws]
        checks.labels(self._outputs[0], [("batch", labels), *drawn], self.ignore_index)

    def _mark_seen(self, outputs: torch.Tensor, targets: torch.Tensor, draws: list[tuple[Term, Replay]]) -> torch.Tensor:
        """Which classes occurred up to and with this batch, (outputs,) bool."""
        if outputs.ndim != 2 or targets.ndim != 1 or targets.is_floating_point():
            raise ArgumentError(f"mask_unused_classes needs outputs (n, classes) and integer labels (n,), got {tuple(outputs.shape)}")
        classes = outputs.shape[1]
        seen = torch.zeros(classes + 1, dtype=torch.bool, device=outputs.device)  # the last one stands for what is ignored
        before = self._queue[-1].seen if self._queue else self._seen
        if before is not None:
            k = min(before.shape[0], classes)
            seen[:k] = before[:k].to(seen.device)
        for labels in [targets, *(replay.y for _, replay in draws)]:  # drawn of a buffer that others filled
            y = labels.long()
            if self.ignore_index is not None:
                y = y.masked_fill(y == self.ignore_index, classes)
            seen.scatter_(0, y, True)  # which, unlike an index, takes no -1 for the last one
        return seen[:classes]

    def _to_move(self, draws: list[tuple[Term, Replay]]) -> list[Moved]:
        """(rows, positions, name -> moved values) of every draw that went through the model."""
        moved: list[Moved] = []
        for replay in dict.fromkeys(replay for _, replay in draws):
            now = replay.latest
            if now is not None:
                values: dict[str, torch.Tensor] = {}
                for term in self.terms:
                    moves = term.move(self, replay, now, self.ema_memory_update_gamma)
                    values.update({name: value.detach().clone() for name, value in moves.items()})
                if values:
                    moved.append((replay.metadata["idx"], replay.metadata["position"], values))
        return moved

    def _check_names(self, stored: Mapping[str, Any]) -> None:
        for name, value in stored.items():
            if not isinstance(value, torch.Tensor):
                raise ArgumentError(f"a term stores a {type(value).__name__} as {name!r}; keep must return name -> tensor (n, ...)")
        schema = self.buffer.schema
        if schema is None:
            return
        if self._store and sorted(stored) != schema.metadata_names:
            raise ArgumentError(
                f"{type(self).__name__} stores the metadata {sorted(stored)} with each sample, but the buffer has {schema.metadata_names}; "
                "use a new buffer, or one that such a learner filled"
            )
        if not set(stored) <= set(schema.metadata_names):
            raise ArgumentError(
                f"{type(self).__name__} replays samples with the metadata {sorted(stored)}, but the buffer has {schema.metadata_names}; "
                "use one that such a learner filled"
            )

    def _check_stored(self, x: torch.Tensor, y: torch.Tensor, stored: dict[str, torch.Tensor]) -> None:
        """Raise what the buffer would raise after the step, when it is too late to refuse a batch."""
        waiting = next((q.stored for q in self._queue if q.offered), stored)
        shapes, others = ({name: (tuple(v.shape[1:]), v.dtype) for name, v in each.items()} for each in (stored, waiting))
        if shapes != others:
            raise SchemaError(f"terms store {shapes} with this batch, but with those that wait for after_step {others}")
        self.buffer.check_batch((x, y), metadata=stored or None, **({"experience": self._experience} if self._by_task else {}))

    # -- the step ------------------------------------------------------------------------------------------------------

    def after_step(self, stepped: bool = True) -> None:
        """What follows the optimizer's step: moved metadata and the queued batches go into the buffer, in one commit; then terms update.

        stepped: False if the optimizer skipped the step (as after an overflow in mixed precision), which then does not count: samples
        were seen and are stored, but no copy of the model moves.

        If the buffer cannot take the batches (StorageError: the disk is full), those samples that did not arrive stay queued: call this
        again once it can, or go on, and they are stored with the next batch.
        """
        queue, self._queue = self._queue, []
        if queue:
            before = self.buffer.seen
            try:
                write(self.buffer, queue)
            except StorageError:
                self._queue = _left(queue, self.buffer.seen - before)  # the step is made: the same batch again is another one
                raise
            self._seen = queue[-1].seen
            self._repeats = bool(self._repeats)
        if stepped:
            self.steps += 1
            for term in self._followers:
                term.after_step(self)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> Step:
        """One training step on a batch from the stream, x (n, ...), y (n, ...). Raises what `loss` raises.

        An optimizer that asks for a closure (LBFGS, SAM) gets one; what is returned and stored is that of the first evaluation.
        A step that fails leaves no sample queued, so it can be made again.
        """
        queued = len(self._queue)
        try:
            self._evaluate(x, y)
            made = Step(self._total, self.losses, self._outputs)
            try:
                self.optimizer.step()
            except (AssertionError, RuntimeError, TypeError, ValueError) as error:
                if "closure" not in str(error) and "'NoneType' object is not callable" not in str(error):
                    raise
                closure: Any = partial(self._evaluate, x, y)
                self.optimizer.step(closure)  # it asks for one before it has changed anything
        except BaseException:
            del self._queue[queued:]
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

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def on_task_start(self, task: int | str | None = None) -> None:
        """To be called before the first batch of a task; what happens there is the terms' (shrink-and-perturb, for instance).

        task: a name for it. If that task is the one that is already going on, as after `load_state_dict` in the middle of it, nothing
        happens: a script that names its tasks may call this again when it resumes. Without a name every call starts a task.
        """
        if task is not None and not isinstance(task, str):
            task = required("task", task, -(2**63), 2**63 - 1)
        if task is not None and task == self.task:
            return
        for term in self.terms:
            term.on_task_start(self)
        if isinstance(self.buffer, ExperienceBalancedBuffer):
            self._experience = self._number(self.buffer, task)
        self.task, self._task_begins = task, True

    def on_task_end(self) -> None:
        """To be called after the last step of a task."""
        for term in self.terms:
            term.on_task_end(self)
        self.task = self._experience = None

    def _number(self, buffer: ExperienceBalancedBuffer, task: int | str | None) -> int:
        """The experience that a task is."""
        if isinstance(task, int):
            return task
        number = None if task is None else self._experiences.get(task)
        if number is None:  # beyond all that the buffer holds, and all that have begun and stored nothing yet
            begun = [*self._experiences.values(), *([] if self._experience is None else [self._experience])]
            number = max([int(buffer._experience(None, None, 1)), *(n + 1 for n in begun)])
            if task is not None:
                self._experiences[task] = number
        return number

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, beside the model's and the optimizer's: plain values and tensors, that
        `torch.load(weights_only=True)` takes. Its keys are always the same, as torch.distributed.checkpoint needs them. Marks a restore
        point of the buffer; of one that is open for reading only the draws are kept, and it must hold the same when it is loaded."""
        if self._queue:
            raise StateError(f"{len(self._queue)} batches wait for after_step; call that first, or the state would lack them")
        return {
            "format": 1,
            "steps": self.steps,
            "task": self.task,
            "experience": self._experience,
            "experiences": [[name, number] for name, number in self._experiences.items()],
            "classes": [] if self._seen is None else self._seen.nonzero().flatten().tolist(),
            "terms": {term.name: term.state_dict() for term in self.terms},
            "buffer": _reading(self.buffer) if self.buffer.mode == "r" else self.buffer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a state that `state_dict` returned, the buffer too. Raises StateError, and changes nothing, where that cannot be."""
        kinds: dict[str, Any] = {"format": int, "steps": int, "task": (int, str, type(None)), "classes": list, "terms": dict}
        kinds |= {"experience": (int, type(None)), "experiences": list}
        if not isinstance(state, Mapping) or any(not isinstance(state.get(k, ...), t) for k, t in kinds.items()) or state["format"] != 1:
            raise StateError(
                f"not a state of a {type(self).__name__}: expected a dict with format=1, {', '.join(list(kinds)[1:])} and buffer, "
                f"got {state!r:.200}"
            )
        classes = state["classes"]
        if state["steps"] < 0 or any(type(c) is not int or not 0 <= c < 2**30 for c in classes):
            raise StateError(f"not a state of a {type(self).__name__}: {state['steps']} steps, classes {classes!r:.200}")
        if not all(isinstance(e, list) and [type(v) for v in e] == [str, int] for e in state["experiences"]):
            raise StateError(f"not a state of a {type(self).__name__}: experiences {state['experiences']!r:.200}")
        mine = [term.name for term in self.terms]
        if sorted(state["terms"]) != sorted(mine):
            raise StateError(f"the state of a learner with the terms {sorted(state['terms'])}, but this one has {sorted(mine)}")
        for term in self.terms:
            term.check_state(state["terms"][term.name])
        if self.buffer.mode == "r":
            _read_on(self.buffer, state.get("buffer"))
        else:
            self.buffer.load_state_dict(state.get("buffer"))  # type: ignore[arg-type]
        for term in self.terms:
            term.load_state_dict(state["terms"][term.name])
        self.steps, self.task, self._queue, self._seen = state["steps"], state["task"], [], None
        self._experience, self._experiences = state["experience"], dict(state["experiences"])
        self._kept, self._bits, self._like = None, None, None
        if classes:
            self._seen = torch.zeros(max(classes) + 1, dtype=torch.bool)
            self._seen[classes] = True


def _reading(buffer: DataBuffer) -> dict[str, Any]:
    """The state of a buffer that is open for reading: what it holds, by name, and the count of draws."""
    return {"uuid": buffer._uuid, "seen": buffer.seen, "draws": {"sample": buffer._drawn}}


def _read_on(buffer: DataBuffer, state: Any) -> None:
    """Go back to a state that `_reading` gave. Raises StateError where the buffer holds something else."""
    drawn = state["draws"].get("sample") if isinstance(state, Mapping) and isinstance(state.get("draws"), Mapping) else None
    if type(drawn) is not int or not 0 <= drawn < 2**62 or {**_reading(buffer), "draws": {"sample": drawn}} != state:
        raise StateError(
            f"not the state of a learner that only reads what {buffer!r} holds now: {state!r:.200}; a buffer that was written to "
            "in the meantime goes back only if it is open with mode='r+'"
        )
    buffer._set_counts(drawn, 0)


def _ignored_by(loss_fn: Any) -> int | None:
    """The label that a loss leaves out, where that can be told."""
    given: dict[str, Any] = {}
    while isinstance(loss_fn, partial):
        loss_fn, given = loss_fn.func, {**loss_fn.keywords, **given}
    default = -100 if loss_fn in (torch.nn.functional.cross_entropy, torch.nn.functional.nll_loss) else None
    found = given.get("ignore_index", getattr(loss_fn, "ignore_index", default))
    return found if type(found) is int else None


def write(buffer: DataBuffer, queue: Sequence[_Queued]) -> None:
    """Offer the queued batches to the buffer, as one, after what moved."""
    moves = [m for q in queue for m in q.moved]
    moved = None
    if moves:  # of a row drawn several times the last counts
        rows, positions = np.concatenate([m[0] for m in moves]), np.concatenate([m[1] for m in moves])
        moved = rows, positions, {name: _array(torch.cat([m[2][name] for m in moves])) for name in moves[0][2]}
    queue = [q for q in queue if q.offered]
    if not queue:
        for name, values in moved[2].items() if moved else ():
            buffer.set_metadata(name, values, rows, positions=positions)
        return
    if len(queue) == 1:
        x, y, stored = queue[0].x, queue[0].y, queue[0].stored
    else:
        x, y = (torch.cat([torch.as_tensor(part) for part in parts]) for parts in ([q.x for q in queue], [q.y for q in queue]))
        stored = {name: torch.cat([q.stored[name] for q in queue]) for name in queue[0].stored}
    metadata = {name: _array(value) for name, value in stored.items()} or None
    options: dict[str, Any] = {}
    if queue[0].experience is not None:
        options["experience"] = np.repeat([int(q.experience or 0) for q in queue], [q.x.shape[0] for q in queue])
    buffer.add((x, y), metadata=metadata, moved=moved, **options)


def _left(queue: list[_Queued], arrived: int) -> list[_Queued]:
    """What is left of queued batches, of which so many samples arrived; what moved went with the first of them."""
    left, some = [], bool(arrived)
    for q in queue:
        skip = min(arrived, q.x.shape[0]) if q.offered else 0
        arrived -= skip
        if skip < q.x.shape[0] and (q.offered or not some):
            stored = {name: value[skip:] for name, value in q.stored.items()}
            left.append(_Queued(q.x[skip:], q.y[skip:], stored, [] if some else q.moved, q.seen, q.like, q.offered, (), (), q.experience))
    return left


def _versions(x: torch.Tensor, y: torch.Tensor) -> tuple[int, int]:
    """How often each was written to in place; one made in inference mode does not count that."""
    try:
        return x._version, y._version
    except RuntimeError:
        return 0, 0


def _equal(held: Any, tensor: torch.Tensor) -> bool:
    """Whether values are the same; NaN is the same as NaN."""
    held = torch.as_tensor(held)
    return torch.equal(held, tensor) or bool(((held == tensor) | (held.isnan() & tensor.isnan())).all())


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b:
        return True
    return a.data_ptr() == b.data_ptr() != 0 and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _first(outputs: torch.Tensor, n: int) -> torch.Tensor:
    """The first n: taken when asked for, because in the middle of a step each operation counts."""
    return outputs if outputs.shape[:1] == (n,) else outputs.narrow(0, 0, n)


def _array(tensor: torch.Tensor) -> Any:
    """Its array where it has one (which the buffer takes faster), the tensor otherwise: on a GPU only survivors are copied."""
    try:
        return tensor.numpy()
    except (RuntimeError, TypeError):
        return tensor


def _copied(tensor: torch.Tensor) -> Any:
    """Likewise, a copy. One that requires gradients stays a tensor, so that the batch goes to the model as it is, and gets them."""
    try:
        return tensor.numpy().copy()
    except (RuntimeError, TypeError):
        return tensor.detach().clone()
