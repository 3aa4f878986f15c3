"""Whether a batch suits the model and the loss, and a state the learner. Errors say what is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ...arguments import instance
from ...buffers.base import DataBuffer
from ...errors import ArgumentError, LossError, StateError
from .forward import check_layers
from .term import Term

_OUT_OF_RANGE = ("target out of range", "out of bounds for", "Class values")  # torch's words for a label that is no class


def check_parts(model: Any, optimizer: Any, buffer: Any) -> None:
    """Raise ArgumentError unless this is a model to train, an optimizer of it and a buffer."""
    instance(model, torch.nn.Module, "model must be a torch.nn.Module")
    if next(model.parameters(), None) is None:
        raise ArgumentError(f"{type(model).__name__} has no parameters: there is nothing to train")
    instance(optimizer, torch.optim.Optimizer, "optimizer must be a torch.optim.Optimizer")
    mine = set(model.parameters())
    if not any(p in mine for group in optimizer.param_groups for p in group["params"]):
        raise ArgumentError(f"the optimizer has none of the parameters of this {type(model).__name__}; make it of model.parameters()")
    instance(buffer, DataBuffer, "buffer must be a buffer of leanreplay")


def check_terms(terms: Sequence[Term], model: torch.nn.Module) -> None:
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


def check_tensors(x: Any, y: Any) -> None:
    """Raise ArgumentError unless x and y are tensors of samples, as many of each."""
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


def speaks_of_labels(error: Exception) -> bool:
    """Whether this error of torch's is about a label that is no class."""
    return any(phrase in str(error) for phrase in _OUT_OF_RANGE)


def explain(error: Exception, model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor, outputs: torch.Tensor | None) -> None:
    """Raise an ArgumentError in place of torch's error if the batch does not fit the model or the loss.

    outputs: the model's, if the loss is cross entropy.
    """
    places = {p.device for p in model.parameters()}
    if inputs.device not in places:
        where = ", ".join(sorted(map(str, places)))
        raise ArgumentError(f"the batch is on {inputs.device}, the model on {where}; give device=, or move the model") from error
    if targets.device != inputs.device:
        raise ArgumentError(f"x is on {inputs.device}, y on {targets.device}; give device=, or move one of them") from error
    dtypes = {p.dtype for p in model.parameters()}
    if inputs.dtype not in dtypes and "type" in str(error):
        raise ArgumentError(
            f"the model does not take x of {inputs.dtype}: {str(error).splitlines()[0]:.200}; its parameters are "
            f"{', '.join(sorted(map(str, dtypes)))}: convert x before, or with transform and buffer_transform"
        ) from error
    if outputs is not None and outputs.shape[:1] == inputs.shape[:1]:
        numbers = targets.dtype in (torch.int64, torch.uint8) and targets.shape == outputs.shape[:1] + outputs.shape[2:]
        if not numbers and not (targets.is_floating_point() and targets.shape == outputs.shape):
            raise ArgumentError(
                f"labels are {targets.dtype} of shape {tuple(targets.shape)}; for outputs of {tuple(outputs.shape)} expected are "
                f"classes, int64 of shape {tuple(outputs.shape[:1] + outputs.shape[2:])}, or probabilities of the same shape: "
                "convert them, or give another loss_fn"
            ) from error


def check_labels(outputs: torch.Tensor, found: Iterable[tuple[str, torch.Tensor]], ignored: int | None) -> None:
    """Raise ArgumentError unless labels are numbers of outputs (n, classes, ...).

    found: (whose labels, (n, ...) integers). ignored: a label that need not be one.
    """
    if outputs.ndim < 2:
        return
    classes = outputs.shape[1]
    for where, y in found:
        if y.shape[1:] != outputs.shape[2:] or y.is_floating_point() or y.is_complex() or not y.numel():
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


def finite(total: torch.Tensor, losses: Mapping[str, torch.Tensor], step: int, n: int, replayed: int) -> list[float]:
    """The values of the losses and of the total. Raises LossError unless all are finite.

    This is the one place in a step that waits for the device.
    """
    for name, value in losses.items():
        if not isinstance(value, torch.Tensor) or value.ndim:
            shape = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
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
    """Raise StateError unless a learner of this class and these terms can take the state; the buffer checks its own part."""
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
