"""Samples on their way in and out: batches to the bytes of rows, lists of samples to batches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arguments import is_tensor
from ..arrays import Ints
from ..errors import ArgumentError, SchemaError
from .leaves import Field, as_leaf, batch_leaf, batch_length, check_leaf, leaf_type, to_numpy

Sources = list[tuple[npt.NDArray[np.uint8], Ints]]
Fetch = Callable[[Ints], tuple[Sources, Ints]]

_NO_BYTES = np.zeros(0, np.uint8)
_NO_GROUPS: Ints = np.zeros(0, np.int64)
_BYTE = np.dtype(np.uint8)


def as_batch(value: Any, name: str) -> Any:
    value = as_leaf(value, f"metadata/{name}")
    shape = leaf_type(value, f"metadata/{name}")[1]
    if not shape or shape[0] == 0:
        raise SchemaError(f"metadata/{name}: one entry per sample is needed, got shape {shape}")
    return value


def flat(array: np.ndarray[Any, Any]) -> npt.NDArray[np.uint8]:
    """The bytes of a C-contiguous array. (The cheapest of several ways.)"""
    return np.frombuffer(array, _BYTE) if array.size else _NO_BYTES


def _shared(leaf: Any, field: Field) -> np.ndarray[Any, Any] | None:
    """Return a tensor on the CPU as an array of the same memory; None for anything less simple.

    It costs a tenth of `to_numpy`.
    """
    torch = sys.modules.get("torch")
    if torch is None or type(leaf) not in (torch.Tensor, torch.nn.Parameter) or not leaf.is_cpu:
        return None
    try:
        if leaf.requires_grad:
            leaf = leaf.detach()
        if field.torch:
            return leaf.view(torch.int16).numpy().view(np.uint16) if leaf.dtype is torch.bfloat16 else None
        return leaf.numpy()  # type: ignore[no-any-return]
    except (TypeError, RuntimeError):  # conjugate or sparse, or a dtype that NumPy does not have
        return None


class Batch:
    """The leaves of a batch in memory.

    n: how many samples. groups: int64, one for each sample, set by its user. Raises SchemaError for
    leaves that do not fit the fields.
    """

    def __init__(self, leaves: Sequence[Any], fields: Sequence[Field]) -> None:
        self.leaves, self.fields = leaves, fields
        self.groups = _NO_GROUPS
        # Leaves whose bytes can be read as they lie.
        self.plain: list[np.ndarray[Any, Any] | None] = []
        self.simple = True  # all of them can, and the memory is as kernels are compiled for
        n = -1
        for leaf, field in zip(leaves, fields, strict=True):
            array = leaf if type(leaf) is np.ndarray else _shared(leaf, field)
            if array is None or (field.torch and array is leaf):
                break
            shape = array.shape
            if not shape or shape[1:] != field.shape or (n != shape[0] and n != -1):
                break
            if array.dtype is not field.dtype and array.dtype != field.dtype:
                break
            n = shape[0]
            if array.flags.carray:
                self.plain.append(array)
            else:
                self.simple = False
                self.plain.append(array if array.flags.c_contiguous else None)
        else:
            self.n = n
            return
        self._look_closer()

    @property
    def data(self) -> list[npt.NDArray[np.uint8]]:
        """Bytes of all leaves, if the batch is simple."""
        return [np.frombuffer(array, _BYTE) for array in self.plain]  # type: ignore[arg-type]

    def _look_closer(self) -> None:
        """Look at leaves that are no arrays or tensors in memory of the right type."""
        self.leaves = [batch_leaf(leaf, field.name) for leaf, field in zip(self.leaves, self.fields, strict=True)]
        self.n = batch_length(self.leaves, self.fields)
        self.plain, self.simple = [], False
        for leaf, field in zip(self.leaves, self.fields, strict=True):
            check_leaf(leaf, field, self.n)
            if is_tensor(leaf):
                simple = leaf.device.type == "cpu" and leaf.is_contiguous() and not leaf.is_conj() and not leaf.is_neg()
            else:
                simple = type(leaf) is np.ndarray and leaf.flags.c_contiguous and leaf.dtype.isnative
            self.plain.append(to_numpy(leaf, field) if simple else None)
            if not simple and is_tensor(leaf) and leaf.device.type == "cpu":
                to_numpy(leaf, field, _NO_GROUPS)  # raises for one without values

    def fetch(self, picks: Ints) -> tuple[Sources, Ints]:
        """Return sources of these samples, and their groups."""
        return self.sources(picks), self.groups[picks]

    def sources(self, picks: Ints) -> Sources:
        """Return sources: plain leaves as they are, of others only the samples that stay."""
        sources, where = [], np.arange(picks.shape[0])
        for i, ready in enumerate(self.plain):
            if ready is not None:
                sources.append((flat(ready), picks))
            else:
                sources.append((flat(to_numpy(self.leaves[i], self.fields[i], picks)), where))
        return sources


def stack(samples: list[Any]) -> Any:
    """Return a batch of samples of any nesting: arrays and numbers stacked, others as a list."""
    first = samples[0]
    if isinstance(first, Mapping):
        keys = first.keys()  # of a TensorDict, `in` goes over samples
        return {key: stack([s[key] for s in samples]) for key in keys}
    if isinstance(first, (tuple, list)):
        children = [stack([s[i] for s in samples]) for i in range(len(first))]
        return tuple(children) if isinstance(first, tuple) else children
    if isinstance(first, (np.ndarray, np.generic, bool, int, float, complex)):
        return _stacked(np.stack, [np.asarray(s) for s in samples])
    if is_tensor(first):
        return _stacked(sys.modules["torch"].stack, samples)
    return samples


def _stacked(join: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    try:
        return join(samples)
    except (TypeError, ValueError, RuntimeError) as error:
        shapes = sorted({str(tuple(getattr(s, "shape", ()))) for s in samples})
        raise ArgumentError(
            f"the transformed samples cannot be stacked ({error}; shapes {', '.join(shapes[:4])}); "
            "a transform must return the same shape and type for every sample, or read them one by one with buffer[i]"
        ) from None
