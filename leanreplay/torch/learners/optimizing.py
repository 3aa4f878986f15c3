"""How an optimizer makes its step: plainly, with a closure, or through a scaler of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


def make_step(optimizer: Optimizer, evaluate: Callable[[], Any], scaler: Any = None) -> bool:
    """Let the optimizer step; return whether it did. A scaler skips the step of an overflow.

    evaluate: computes loss and gradients once more, for an optimizer that asks (LBFGS, SAM).
    """
    if scaler is not None:
        scale = scaler.get_scale()
        scaler.unscale_(optimizer)  # before hooks clip the gradients
        try:
            scaler.step(optimizer)
        finally:
            scaler.update()  # also after a hook that raised
        return bool(scaler.get_scale() >= scale)
    try:
        optimizer.step()
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if "closure" not in str(error) and "'NoneType' object is not callable" not in str(error):
            raise
        optimizer.step(evaluate)  # it asks for a closure before it has changed anything
    return True
