"""Nests of tensors, leaf by leaf: what a sample, a batch and a model's outputs may be.

A nest is a leaf, or a dict, list or tuple of nests. No other file of `torch/` looks inside one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError


def each_leaf(function: Callable[..., Any], nest: Any, *others: Any) -> Any:
    """What a function makes of each leaf, in the same nesting. A mapping becomes a dict.

    others: nests like the first, whose leaves the function gets too. Raises ArgumentError if they
    are nested in another way; a tuple and a list of one length are nested alike.
    """
    if isinstance(nest, Tensor) and not others:  # nearly always
        return function(nest)
    if not isinstance(nest, (tuple, list, Mapping)):
        if any(isinstance(other, (tuple, list, Mapping)) for other in others):
            raise _unlike(nest, others)
        return function(nest, *others)
    if isinstance(nest, Mapping):
        if any(not isinstance(other, Mapping) or other.keys() != nest.keys() for other in others):
            raise _unlike(nest, others)
        return {key: each_leaf(function, value, *(other[key] for other in others)) for key, value in nest.items()}
    if any(not isinstance(other, (tuple, list)) or len(other) != len(nest) for other in others):
        raise _unlike(nest, others)
    values = [each_leaf(function, *each) for each in zip(nest, *others, strict=True)]
    if isinstance(nest, list):
        return values
    return type(nest)(*values) if hasattr(nest, "_fields") else tuple(values)


def _unlike(nest: Any, others: Any) -> ArgumentError:
    return ArgumentError(f"expected one nesting, got {' and '.join(dict.fromkeys(map(described, (nest, *others))))}")


def leaves(nest: Any) -> list[Any]:
    """The leaves in order."""
    if isinstance(nest, Tensor):
        return [nest]
    found: list[Any] = []
    each_leaf(found.append, nest)
    return found


def first(nest: Any) -> Tensor:
    """The first leaf, which has the length and the device of all."""
    while not isinstance(nest, Tensor):
        nest = next(iter(nest.values() if isinstance(nest, Mapping) else nest))
    return nest


def is_nest(value: Any) -> bool:
    """Whether all leaves are tensors, and there is one."""
    found = leaves(value)
    return bool(found) and all(isinstance(leaf, Tensor) for leaf in found)


def part(nest: Any, start: int, n: int) -> Any:
    """n of the entries, from `start` on."""
    return each_leaf(lambda leaf: leaf.narrow(0, start, n), nest)


def joined(nests: Any) -> Any:
    """One nest with the entries of all, of tensors or arrays."""
    if isinstance(nests[0], Tensor) and isinstance(nests[1], Tensor):
        return torch.cat(nests)
    return each_leaf(lambda *parts: torch.cat([torch.as_tensor(p) for p in parts]), *nests)


def placed(nest: Any, device: torch.device) -> Any:
    """The nest on a device; what is there stays as it is."""
    if isinstance(nest, Tensor):
        return nest if nest.device == device else nest.to(device)
    return each_leaf(lambda leaf: leaf if leaf.device == device else leaf.to(device), nest)


def copied(nest: Any) -> Any:
    """A copy of each tensor: functions that get it may work in place."""
    return nest.clone() if isinstance(nest, Tensor) else each_leaf(Tensor.clone, nest)


def kind(nest: Any, shapes: bool = True) -> Any:
    """Dtypes, and shapes of entries, in the nesting; the same for batches that can be joined."""
    if isinstance(nest, Tensor):
        return (nest.shape[1:], nest.dtype) if shapes else nest.dtype
    values = nest.items() if isinstance(nest, Mapping) else enumerate(nest)
    return {key: kind(value, shapes) for key, value in values}


def described(nest: Any) -> str:
    """A nest in a few words, for messages."""
    if isinstance(nest, Tensor):
        return f"{nest.dtype} of shape {tuple(nest.shape)}"
    if isinstance(nest, Mapping):
        inside = ", ".join(f"{key}: {described(value)}" for key, value in nest.items())
    elif isinstance(nest, (tuple, list)):
        inside = ", ".join(map(described, nest))
    else:
        return type(nest).__name__
    return f"{type(nest).__name__}({inside:.300})"
