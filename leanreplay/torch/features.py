"""Activations of a named layer, as features for selection strategies."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..arguments import instance
from ..buffers.base import DataBuffer
from ..errors import ArgumentError
from .data import BufferDataset, to_torch
from .distributed import innermost, layer_of, uncompiled


def features(
    model: torch.nn.Module,
    layer: str,
    data: Any,
    batch_size: int = 256,
    *,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> npt.NDArray[np.float32]:
    """Activations of one layer for all samples: (n, d) float32, d being whatever the layer gives for a sample, flattened.

    layer: its name in `model.named_modules()`. The model runs in eval mode and without gradients, and is left as it was: the mode of
    every module, and no hook stays, whatever happens.

    data: inputs, as an array or tensor (n, ...); or a map-style dataset (len and [i]) of inputs, or of tuples or lists whose first element
    is the input, (x, y) or ((x, y), metadata) for instance. Inputs are arrays or tensors of one shape, or numbers.
    transform: makes of a batch of inputs, (B, ...), what the model wants; without it they come as they are, so that uint8 images stay
    uint8 and float64 arrays float64, which most models refuse: `transform=lambda x: x.float() / 255`.
    device: where inputs go, before the transform; default: where the model's first parameter is. batch_size: samples at a time.
    progress: a bar on stderr, if tqdm is installed.

    Without samples the result has shape (0, 0). Costs one forward pass of the whole model, and 4 * n * d bytes.
    Raises ArgumentError for an unknown layer, one that runs not once per batch or gives anything but a tensor with one entry per sample,
    and for inputs that are no arrays; what the model or the dataset raises comes through.

    >>> import torch
    >>> from leanreplay.torch import features
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> features(model, "1", [(torch.randn(8), y) for y in range(100)]).shape
    (100, 16)
    """
    module, run = _layer(model, layer), uncompiled(model)
    if isinstance(data, DataBuffer):
        data = BufferDataset(data)  # tensors: an array of bfloat16 would be one of its bits
    if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise ArgumentError(f"batch_size must be an integer of at least 1, got {batch_size!r:.200}")
    n = _length(data)
    if device is None:
        parameter = next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
    found: list[Any] = []
    result: npt.NDArray[np.float32] | None = None
    modes = [(m, m.training) for m in model.modules()]
    handle = module.register_forward_hook(lambda _module, _inputs, output: found.append(_copy(output)))
    try:
        model.eval()
        with torch.no_grad():
            for begin in _steps(n, batch_size, progress):
                batch = _inputs(data, begin, min(begin + batch_size, n)).to(device, copy=True)  # models and transforms may work in place
                found.clear()
                run(batch if transform is None else transform(batch))
                part = _activations(found, layer, batch.shape[0])
                if result is None:
                    result = np.empty((n, part.shape[1]), np.float32)
                if part.shape[1] != result.shape[1]:
                    raise ArgumentError(
                        f"layer {layer!r} gave {result.shape[1]} features a sample, but {part.shape[1]} from sample {begin} on; bring the "
                        "inputs to one shape"
                    )
                result[begin : begin + part.shape[0]] = part.cpu().numpy()
    finally:
        handle.remove()
        for m, training in modes:
            m.training = training
    return np.zeros((0, 0), np.float32) if result is None else result


def _layer(model: Any, layer: Any) -> torch.nn.Module:
    instance(model, torch.nn.Module, "model must be a torch.nn.Module")
    found = layer_of(model, layer) if isinstance(layer, str) else None
    if found is None:
        inner = innermost(model)
        names = [name for name, _ in inner.named_modules(remove_duplicate=False) if name]
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        raise ArgumentError(f"{type(inner).__name__} has no layer {layer!r:.200}; it has: {shown or 'none'} ('' is the model itself)")
    return found


def _length(data: Any) -> int:
    try:
        return len(data)
    except TypeError:
        raise ArgumentError(f"data must be an array of inputs or a map-style dataset with len(), got {type(data).__name__}") from None


def _steps(n: int, batch_size: int, progress: bool) -> Iterator[int]:
    """Where batches begin, with a bar if there is one to be had."""
    begins = range(0, n, batch_size)
    if progress:
        try:
            tqdm = importlib.import_module("tqdm").tqdm  # an extra: not needed, and not missed
        except ImportError:
            pass
        else:
            with tqdm(total=n, desc="features", unit="sample", file=sys.stderr) as bar:
                for begin in begins:
                    yield begin
                    bar.update(min(batch_size, n - begin))
            return
    yield from begins


def _inputs(data: Any, begin: int, end: int) -> torch.Tensor:
    """Inputs begin to end (exclusive), as one tensor."""
    if isinstance(data, (np.ndarray, torch.Tensor)):
        return _tensor(data[begin:end], begin)
    if isinstance(data, Mapping):
        raise ArgumentError("data is a dict: give one array of inputs out of it, data['x'] say")
    which = list(range(begin, end))
    # Several samples in one read where the dataset can do that, as DataLoader does.
    samples = data.__getitems__(which) if hasattr(data, "__getitems__") else [data[i] for i in which]
    inputs = [_tensor(_first(sample, begin + i), begin + i) for i, sample in enumerate(samples)]
    try:
        return torch.stack(inputs)
    except RuntimeError as error:
        raise ArgumentError(f"inputs {begin} to {end - 1} cannot be stacked: {error}; bring them to one shape first") from None


def _first(sample: Any, i: int) -> Any:
    """The input of a sample."""
    while isinstance(sample, (tuple, list)):
        if not sample:
            raise ArgumentError(f"sample {i} is empty: expected an input, or a tuple that begins with one")
        sample = sample[0]
    if isinstance(sample, Mapping):
        raise ArgumentError(
            f"sample {i} is a dict with keys {', '.join(map(str, sample))[:200]}: which is the input? Give a dataset of inputs, "
            "[s['x'] for s in data] say"
        )
    return sample


def _tensor(value: Any, i: int) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    try:
        tensor = to_torch(np.asarray(value), frozenset())
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"input {i}: {type(value).__name__} cannot become a tensor: {error}") from None
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentError(f"input {i}: {type(value).__name__} cannot become a tensor; make arrays of numbers of it in the dataset")
    return tensor


def _copy(output: Any) -> Any:
    """What a layer gave, safe from the next layer: that may work in place, as ReLU(inplace=True) does."""
    return output.detach().clone() if isinstance(output, torch.Tensor) else output


def _activations(found: list[Any], layer: str, size: int) -> torch.Tensor:
    """(B, d) float32 of what the hook saw in one forward pass."""
    if len(found) != 1:
        raise ArgumentError(
            f"layer {layer!r} ran {len(found)} times for one batch, expected once: name a layer that runs exactly once, say one around it"
        )
    output = found[0]
    if not isinstance(output, torch.Tensor) or output.is_complex():
        raise ArgumentError(
            f"layer {layer!r} gives a {type(output).__name__}, expected a tensor of real numbers: name a layer within or after it"
        )
    if output.ndim == 0 or output.shape[0] != size:
        raise ArgumentError(f"layer {layer!r} gives shape {tuple(output.shape)} for {size} samples, expected ({size}, ...)")
    return output.reshape(size, -1).float()
