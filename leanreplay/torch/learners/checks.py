"""Whether a batch suits model and loss: what is wrong with one that does not, in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from ...errors import ArgumentError, LossError


def explain(error: Exception, model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor, outputs: torch.Tensor | None) -> None:
    """Raise an ArgumentError for an error of torch's that comes from a batch which does not fit the model or the loss.

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


def labels(outputs: torch.Tensor, found: Iterable[tuple[str, torch.Tensor]], ignored: int | None) -> None:
    """Raise ArgumentError unless labels, (whose, (n, ...) integers), are numbers of outputs, (n, classes, ...). ignored: one that need
    not be."""
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
    """The values of the losses, and of the whole; LossError unless all are finite. The one place that waits for the device."""
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
