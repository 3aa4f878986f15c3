"""Whether a batch suits model and loss, and a state the learner; what is wrong, in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from ...arguments import instance
from ...buffers.base import DataBuffer
from ...errors import ArgumentError, LossError, StateError
from .. import nests
from .forward import check_layers
from .pending import Batch
from .term import Learner, Term

# What torch says of a label that is no class.
_OUT_OF_RANGE = ("target out of range", "out of bounds for", "Class values")


def check_parts(model: Any, optimizer: Any, buffer: Any) -> None:
    """Raise ArgumentError unless this is a model to train, an optimizer of it and a buffer."""
    instance(model, Module, "model must be a torch.nn.Module")
    if next(model.parameters(), None) is None:
        raise ArgumentError(f"{type(model).__name__} has no parameters: there is nothing to train")
    instance(optimizer, Optimizer, "optimizer must be a torch.optim.Optimizer")
    mine = set(model.parameters())
    if not any(p in mine for group in optimizer.param_groups for p in group["params"]):
        raise ArgumentError(f"the optimizer has none of the parameters of this {type(model).__name__}; make it of model.parameters()")
    instance(buffer, DataBuffer, "buffer must be a buffer of leanreplay")


def check_terms(terms: Sequence[Term], model: Module) -> None:
    """Raise ArgumentError unless these terms go together, and with the model."""
    for term in terms:
        instance(term, Term, "terms are objects of leanreplay.torch.Term")
        if term.layers:
            check_layers(model, term.layers)
        if term.draw is not None and type(term).loss is Term.loss:
            raise ArgumentError(f"the term {term.name!r} takes a draw, but {type(term).__name__} has no loss; give it one, or draw=None")
    names = ["stream", "stream+replay", *(term.name for term in terms)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ArgumentError(f"several terms are called {twice[0]!r}; give each a name of its own: name='...'")
    if sum(term.together for term in terms) > 1:
        raise ArgumentError("only one term's draw can go through the model together with the stream")


def ignored_by(loss_fn: Any) -> int | None:
    """The label that a loss leaves out, if it says so."""
    given: dict[str, Any] = {}
    while isinstance(loss_fn, partial):
        loss_fn, given = loss_fn.func, {**loss_fn.keywords, **given}
    default = -100 if loss_fn in (torch.nn.functional.cross_entropy, torch.nn.functional.nll_loss) else None
    found = given.get("ignore_index", getattr(loss_fn, "ignore_index", default))
    return found if type(found) is int else None


def check_tensors(x: Any, y: Any) -> None:
    """Raise ArgumentError unless x and y are nests of tensors, with an entry per sample each."""
    if not nests.is_nest(x) or not nests.is_nest(y):
        raise ArgumentError(f"a batch is two tensors, x and y, or nests of tensors; got {nests.described(x)} and {nests.described(y)}")
    n = -1
    for leaf in (*nests.leaves(x), *nests.leaves(y)):
        if leaf.is_nested:
            raise ArgumentError(
                "a batch is tensors of samples of one shape, got a nested tensor; pad it: torch.nested.to_padded_tensor(x, 0)"
            )
        if not leaf.ndim or n not in (-1, leaf.shape[0]):
            raise ArgumentError(
                f"x and y need one entry per sample each, got {nests.described(x)} and {nests.described(y)}; what belongs to the whole "
                "batch, a task's number say, is given for each sample: torch.full((n,), 3)"
            )
        n = leaf.shape[0]
    if n == 0:
        raise ArgumentError("the batch is empty; leave such a batch out")


def explain(error: Exception, learner: Learner, batch: Batch, cross_entropy: bool, labels: bool) -> None:
    """Raise an ArgumentError for torch's error if the batch does not fit the model or the loss.

    labels: whether the loss needs labels that are numbers of outputs.
    """
    inputs, targets, outputs, message = nests.first(batch.inputs), batch.targets, learner.outputs, str(error)
    places = {p.device for p in learner.module.parameters()}
    if inputs.device not in places:
        where = ", ".join(sorted(map(str, places)))
        raise ArgumentError(f"the batch is on {inputs.device}, the model on {where}; give device=, or move the model") from error
    dtypes = {p.dtype for p in learner.module.parameters()}
    if inputs is batch.inputs and inputs.dtype not in dtypes and "type" in message:
        raise ArgumentError(
            f"the model does not take x of {inputs.dtype}: {message.splitlines()[0]:.200}; its parameters are "
            f"{', '.join(sorted(map(str, dtypes)))}: convert x before, or with transform and buffer_transform"
        ) from error
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return
    if cross_entropy and outputs.shape[:1] == inputs.shape[:1]:
        shape = outputs.shape[:1] + outputs.shape[2:]
        numbers = targets.dtype in (torch.int64, torch.uint8) and targets.shape == shape
        if not numbers and not (targets.is_floating_point() and targets.shape == outputs.shape):
            raise ArgumentError(
                f"labels are {targets.dtype} of shape {tuple(targets.shape)}; for outputs of {tuple(outputs.shape)} expected are "
                f"classes, int64 of shape {tuple(shape)}, or probabilities of the same shape: convert them, or give another loss_fn"
            ) from error
    if inputs.is_cpu and (labels or any(phrase in message for phrase in _OUT_OF_RANGE)):
        check_labels(outputs, batch.all_labels, learner.ignore_index)
    if message.startswith("Target "):  # of another loss_fn that is made of torch's
        raise ArgumentError(f"loss_fn: {error}: a label is no class of the outputs {tuple(outputs.shape)}") from error


def check_labels(outputs: Any, found: Iterable[tuple[str, Any]], ignored: int | None) -> None:
    """Raise ArgumentError unless labels (whose, (n, ...) integers) are numbers of outputs.

    ignored: a label that need not be one. On the CPU torch notices by itself.
    """
    if not isinstance(outputs, Tensor) or outputs.ndim < 2:
        return
    classes = outputs.shape[1]
    for where, y in found:
        if not isinstance(y, Tensor) or y.shape[1:] != outputs.shape[2:] or y.is_floating_point() or y.is_complex() or not y.numel():
            continue
        low, high = (int(v) for v in torch.aminmax(y))
        if ignored is not None and not 0 <= low <= high < classes:  # as cross entropy does
            others = y[y != ignored]
            low, high = (int(v) for v in torch.aminmax(others)) if others.shape[0] else (0, 0)
        if low < 0 or high >= classes:
            raise ArgumentError(
                f"a label of the {where} is {low if low < 0 else high}, but the model has {classes} outputs, for labels 0 to "
                f"{classes - 1}; give the model more outputs, map the labels with target_transform, or leave out those that do not count: "
                "loss_fn=torch.nn.CrossEntropyLoss(ignore_index=...)"
            )


def finite(total: Tensor, losses: Mapping[str, Tensor], step: int, n: int, replayed: int) -> list[float]:
    """The values of the losses and of the total. Raises LossError unless all are finite.

    This is the one place in a step that waits for the device.
    """
    for name, value in losses.items():
        if not isinstance(value, Tensor) or value.ndim:
            shape = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ArgumentError(f"the {name} loss is of {shape}, expected a tensor of a single number: a mean over the batch")
    if len(losses) == 1 and total is value:
        values = [float(total.item())] * 2
    else:
        values = torch.stack([t.detach() for t in (*losses.values(), total)]).tolist()
    if not all(map(math.isfinite, values)):
        wrong, what = next((k, v) for k, v in zip([*losses, "whole"], values, strict=True) if not math.isfinite(v))
        raise LossError(
            f"the {wrong} loss of step {step} is {what} (batch of {n}, {replayed} replayed): this batch "
            "was neither trained on nor stored; look for bad values in it, lower the learning rate, or clip gradients"
        )
    return values


def check_state(state: Any, learner: str, terms: Sequence[Term]) -> None:
    """Raise StateError unless a learner with these terms can take the state."""
    kinds: dict[str, Any] = {"format": int, "steps": int, "task": (int, str, type(None)), "classes": list, "terms": dict}
    kinds |= {"experience": (int, type(None)), "experiences": list}
    if not isinstance(state, Mapping) or any(not isinstance(state.get(k, ...), t) for k, t in kinds.items()) or state["format"] != 1:
        raise StateError(
            f"not a state of a {learner}: expected a dict with format=1, {', '.join(list(kinds)[1:])} and buffer, got {state!r:.200}"
        )
    classes = state["classes"]
    if state["steps"] < 0 or any(type(c) is not int or not 0 <= c < 2**30 for c in classes):
        raise StateError(f"not a state of a {learner}: {state['steps']} steps, classes {classes!r:.200}")
    if not all(isinstance(e, list) and [type(v) for v in e] == [str, int] for e in state["experiences"]):
        raise StateError(f"not a state of a {learner}: experiences {state['experiences']!r:.200}")
    mine = [term.name for term in terms]
    if sorted(state["terms"]) != sorted(mine):
        raise StateError(f"the state of a learner with the terms {sorted(state['terms'])}, but this one has {sorted(mine)}")
    for term in terms:
        term.check_state(state["terms"][term.name])
