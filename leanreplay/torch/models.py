"""How a model is called on a nest of inputs, and which of its results are the outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..errors import ArgumentError
from .nests import described, first, is_nest, leaves

ForwardFunction = Callable[[Any, Any], Any]  # of (model, x)

_WAY_OUT = "give forward=, a function of (model, x) that returns the outputs: lambda model, x: model(x)[0] for instance"


def run_model(model: Any, x: Any, forward: ForwardFunction | None = None) -> Any:
    """The outputs of a model for x, a nest of tensors (n, ...): a tensor (n, ...), or a nest of
    such.

    forward: a function of (model, x) that returns them. None: a dict of inputs is passed by name, a
    tuple or list by position. Outputs are then the result's `logits` if it has that, as an
    attribute or a key, else the result; a nest of one tensor is that tensor. Raises ArgumentError
    for results that are no outputs.
    """
    outputs = call_model(model, x, forward)
    if forward is None and not isinstance(outputs, Tensor):
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
        outputs = logits if logits is not None else leaves(outputs)[0] if len(leaves(outputs)) == 1 else outputs
    n = first(x).shape[:1]
    if not is_nest(outputs) or any(leaf.shape[:1] != n for leaf in leaves(outputs)):
        raise ArgumentError(
            f"the model must return a tensor of outputs (n, ...), n being {n[0]}, or a nest of such, got {described(outputs)}; {_WAY_OUT}"
        )
    return outputs


def call_model(model: Any, x: Any, forward: ForwardFunction | None = None) -> Any:
    """What a model, or `forward`, returns for x."""
    if forward is not None:
        return forward(model, x)
    if isinstance(x, Tensor):
        return model(x)
    args, named = ((), x) if isinstance(x, Mapping) else (x, {})
    try:
        return model(*args, **named)
    except TypeError as error:
        try:
            inspect.signature(getattr(model, "forward", model)).bind(*args, **named)
        except TypeError as wrong:
            raise ArgumentError(f"{type(model).__name__} does not take x, a {described(x)}: {wrong}; {_WAY_OUT}") from error
        except ValueError:
            pass  # a callable that does not tell
        raise


def single(outputs: Any, who: str) -> Tensor:
    """The outputs, if they are one tensor. Raises ArgumentError for a nest. who: needs them so."""
    if isinstance(outputs, Tensor):
        return outputs
    raise ArgumentError(f"{who} needs one tensor of outputs (n, ...), but the model gives a {described(outputs)}; {_WAY_OUT}")
