"""Buffers as torch Datasets, and batches as tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.utils.data import Dataset

from ..arguments import call, function_or_none, instance
from ..buffers.base import DataBuffer
from ..buffers.drawing import Draw
from ..buffers.groups import Group
from ..buffers.reading import Reach, Read
from ..errors import ArgumentError
from ..samples.batch import stack
from ..samples.schema import Schema
from . import nests

Function = Callable[[Any], Any]


class BufferDataset(Dataset[Any]):
    """A buffer, or one group of it (`buffer.groups[g]`), as a map-style Dataset.

    Item i is the i-th sample, as tensors and numbers.

    metadata: items are (sample, metadata).
    batch_transform: called with the x of all samples that are read together, (n, ...): of a batch
        of the DataLoader (without a pair: with the whole batch), after the buffer's own transforms,
        which get tensors. Each sample gets its entry of the result.

    It works in a DataLoader with any number of workers, forked or spawned. They read the file (or
    shared memory) themselves, and see what was committed in the meantime. With workers, a buffer in
    memory needs its first batch, or a schema, before they start. An InfiniteBuffer in memory can
    only be forked, and its workers see the parts that were there then. Fixed-width bytes stay
    NumPy's; arrays of them need a `collate_fn` of your own.

    The buffer may change while a DataLoader goes through it. An epoch has as many items as the
    buffer had when it began. Each is what the buffer holds when it is read: item i of the live
    samples in the order of rows. Where there are fewer by then (a new class takes rows of a balanced
    buffer, a rollback, a smaller `resize`), indices up to the largest length that this dataset told
    are answered by other live samples, each a uniform draw that follows from (seed, stream, seen,
    index). So with shuffle=True every item is uniform over what is there, while some samples come
    twice in such an epoch and others not. With workers, which read ahead, the moment of reading
    depends on their speed. A buffer without any sample left is a RowError, and so is an index
    beyond. `buffer[i]` itself knows the present samples only.

    >>> import numpy as np
    >>> from torch.utils.data import DataLoader
    >>> from leanreplay import ReservoirBuffer
    >>> from leanreplay.torch import BufferDataset
    >>> buffer = ReservoirBuffer(100)
    >>> buffer.add((np.zeros((40, 3), "float32"), np.arange(40)))
    >>> x, y = next(iter(DataLoader(BufferDataset(buffer), batch_size=8)))
    >>> x.shape, y
    (torch.Size([8, 3]), tensor([0, 1, 2, 3, 4, 5, 6, 7]))
    """

    def __init__(self, buffer: DataBuffer | Group, metadata: bool = False, batch_transform: Function | None = None) -> None:
        instance(buffer, (DataBuffer, Group), "BufferDataset takes a buffer of leanreplay, or one of its groups")
        self._group = buffer.group if isinstance(buffer, Group) else None
        self.buffer, self.metadata, self.batch_transform = buffer, metadata, function_or_none("batch_transform", batch_transform)
        self._reach = Reach()
        len(self)

    def __len__(self) -> int:
        return self._reach.told(len(self.buffer))

    def __iter__(self) -> Iterator[Any]:
        for i in range(len(self)):
            yield self[i]

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Several items in one read: what DataLoader calls."""
        items = self.buffer.view.items_at(indices, self._reach.now(), to_torch, self._group)
        bits = _bfloat16(self.buffer)
        samples = [to_torch(sample, bits) for sample, _ in items]
        if self.batch_transform is not None and samples:
            batch = transformed(self.batch_transform, stack(samples), len(samples))
            samples = [each_tensor(batch, operator.itemgetter(i)) for i in range(len(samples))]
        if not self.metadata:
            return samples
        return [(sample, to_torch(meta, bits, path="metadata")) for sample, (_, meta) in zip(samples, items, strict=True)]


def sample(
    buffer: DataBuffer,
    n: int,
    device: torch.device | str | None = None,
    replace: bool = False,
    *,
    balance: str | None = None,
    where: tuple[str, object] | None = None,
    by: str | None = None,
    alpha: float | None = None,
    batch_transform: Function | None = None,
) -> tuple[Any, dict[str, Any]]:
    """`buffer.sample` with tensors in place of arrays, on `device`; where it takes the same names.

    On the CPU nothing is copied once more. The buffer's own transforms get tensors.
    batch_transform: then called with x, (n, ...), on the device (without a pair: the whole batch).

    >>> import numpy as np
    >>> import leanreplay.torch
    >>> buffer = leanreplay.ReservoirBuffer(100)
    >>> buffer.add((np.zeros((40, 3), "float32"), np.arange(40)))
    >>> (x, y), meta = leanreplay.torch.sample(buffer, 8)
    >>> x.shape, y.dtype, sorted(meta)
    (torch.Size([8, 3]), torch.int64, ['idx', 'position'])
    """
    function_or_none("batch_transform", batch_transform)
    return cast(Read, draw_tensors(buffer, n, Draw.of(replace, balance, where, by, alpha), device, batch_transform))


def draw_tensors(
    buffer: DataBuffer,
    n: int,
    draw: Draw,
    device: torch.device | str | None,
    batch_transform: Function | None = None,
    at_most: bool = False,
) -> Read | None:
    """A draw as tensors, as of `sample`. at_most: as `View.sample`: None if no row can be drawn."""
    drawn = buffer.view.sample(n, draw, at_most, to_torch)
    if drawn is None:
        return None
    bits = _bfloat16(buffer)
    batch, meta = to_torch(drawn[0], bits, device), to_torch(drawn[1], bits, device, "metadata")
    return batch if batch_transform is None else transformed(batch_transform, batch, len(meta["idx"])), meta


def device_named(device: torch.device | str | None) -> torch.device | None:
    """A device; None for none. Raises ArgumentError for one that is not there."""
    try:
        if device is None:
            return None
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ArgumentError(f"device: {error}") from None


def transformed(function: Function, batch: Any, n: int) -> Any:
    """A batch whose x, or all of it if it is no pair, went through a function of batches. n: how many samples."""
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    x = call("batch_transform", function, batch[0] if pair else batch)

    def check(tensor: torch.Tensor) -> None:
        if tensor.shape[:1] != (n,):
            raise ArgumentError(f"batch_transform: it must keep the {n} samples of its batch apart, (n, ...), got {tuple(tensor.shape)}")

    each_tensor(x, check)
    return type(batch)((x, batch[1])) if pair else x  # type: ignore[call-arg]


def per_sample(function: Function, values: Any, name: str) -> Any:
    """The function's results for each entry of a nest, stacked. It gets copies, as it may work in
    place."""
    values = nests.copied(values)
    results = [call(name, function, nests.each_leaf(operator.itemgetter(i), values)) for i in range(nests.first(values).shape[0])]
    try:
        return nests.each_leaf(lambda *leaves: torch.stack([torch.as_tensor(leaf) for leaf in leaves]), *results)
    except (ArgumentError, RuntimeError, TypeError, ValueError) as error:
        raise ArgumentError(f"{name}: its results cannot be stacked: {error}; it must return a tensor of one shape and dtype") from error


def per_batch(function: Function, values: Any, name: str) -> Any:
    """The function's result for all entries of a nest, (n, ...). It gets a copy."""
    result, n = call(name, function, nests.copied(values)), nests.first(values).shape[0]
    if not nests.is_nest(result) or any(leaf.shape[:1] != (n,) for leaf in nests.leaves(result)):
        raise ArgumentError(f"{name}: it gets (n, ...) and must return a tensor (n, ...), n being {n}, got {nests.described(result)}")
    return result


class Transforms(NamedTuple):
    """What samples go through before the model: functions of tensors, or None.

    transform: of the x of each sample. target_transform: of its y. batch_transform: of the x of a
    batch. prefix: of these names, in messages.
    """

    transform: Function | None
    target_transform: Function | None
    batch_transform: Function | None
    prefix: str = ""

    def apply(self, x: Any, y: Any, device: torch.device) -> tuple[Any, Any, Any]:
        """x and y, nests of tensors, transformed, on the device; then y before it went there."""
        if self.transform is not None:
            x = per_sample(self.transform, x, f"{self.prefix}transform")
        if self.target_transform is not None:
            y = per_sample(self.target_transform, y, f"{self.prefix}target_transform")
        x = nests.placed(x, device)
        if self.batch_transform is not None:
            x = per_batch(self.batch_transform, x, f"{self.prefix}batch_transform")
        return x, nests.placed(y, device), y


def each_tensor(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """What a function makes of each tensor in any nesting; all else as it is."""
    return nests.each_leaf(lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, value)


def _bfloat16(buffer: DataBuffer | Group) -> frozenset[str]:
    schema = buffer.schema
    return frozenset() if schema is None else bfloat16_fields(schema)


def bfloat16_fields(schema: Schema) -> frozenset[str]:
    """Names of the fields that hold the bits of torch.bfloat16."""
    return schema.bfloat16


def to_torch(value: Any, bits: frozenset[str], device: torch.device | str | None = None, path: str = "data") -> Any:
    """Arrays in any nesting as tensors that share their memory.

    What a transform made of a sample may be anything, and stays.

    bits: paths of arrays that hold bfloat16.
    """
    if type(value) is np.ndarray and not bits and value.dtype.kind in "biufc" and value.flags.writeable and value.flags.c_contiguous:
        try:
            tensor = torch.from_numpy(value)  # what a buffer hands out, without a detour
            return tensor if device is None else tensor.to(device)
        except TypeError:
            pass  # of a dtype that this torch lacks, as said below
    if type(value) is tuple or type(value) is list:
        return type(value)([to_torch(v, bits, device, f"{path}/{i}") for i, v in enumerate(value)])
    if type(value) is dict or isinstance(value, Mapping):
        return {key: to_torch(v, bits, device, f"{path}/{key}") for key, v in value.items()}
    if isinstance(value, torch.Tensor):
        return value.to(device) if device is not None else value
    if not isinstance(value, (np.ndarray, np.generic)) or value.dtype.kind not in "biufc":
        return value
    array = np.asarray(value)
    if not array.flags.writeable or any(step < 0 for step in array.strides):
        array = array.copy()  # torch takes neither
    if path in bits and array.dtype == np.uint16:
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        try:
            tensor = torch.from_numpy(array)
        except TypeError:
            raise ArgumentError(
                f"{path}: torch {torch.__version__} has no {array.dtype}; upgrade torch, or convert before samples are stored"
            ) from None
    return tensor.to(device) if device is not None else tensor
