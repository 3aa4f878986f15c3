"""Buffers as torch Datasets, and batches as tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..buffers import DataBuffer, Reach
from ..errors import ArgumentError
from ..schema import Schema


class BufferDataset(Dataset[Any]):
    """A buffer as a map-style Dataset: item i is the i-th sample, or (sample, metadata), as tensors and numbers.

    Works in a DataLoader with any number of workers, forked or spawned; they read the file (or shared memory) themselves and
    see what was committed in the meantime. Fixed-width bytes stay NumPy's; arrays of them need a `collate_fn` of your own.
    With workers, a buffer in memory needs its first batch, or a schema, before they start; an InfiniteBuffer in memory can only be
    forked, and its workers see the parts that were there then.

    The buffer may change while a DataLoader goes through it. An epoch has as many items as the buffer had when it began, and each is
    what the buffer holds when it is read: item i of the live samples in the order of rows. Where there are fewer by then (a new class
    takes rows of a balanced buffer, a rollback, a smaller `resize`), indices up to the largest length that this dataset told are
    answered by other live samples, each a uniform draw that follows from (seed, stream, seen, index). So with shuffle=True every item
    is uniform over what is there, while some samples come twice in such an epoch and others not. A buffer without any sample left is a
    RowError, and so is an index beyond. With workers, which read ahead, the moment of reading depends on their speed. `buffer[i]`
    itself knows the present samples only.

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

    def __init__(self, buffer: DataBuffer, metadata: bool = False) -> None:
        if not isinstance(buffer, DataBuffer):
            raise ArgumentError(f"BufferDataset takes a buffer of leanreplay, got {type(buffer).__name__}")
        self.buffer, self.metadata = buffer, metadata
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
        items = self.buffer._items_at(indices, self._reach.now())
        bits = _bfloat16(self.buffer)
        if not self.metadata:
            return [to_torch(sample, bits) for sample, _ in items]
        return [(to_torch(sample, bits), to_torch(meta, bits, path="metadata")) for sample, meta in items]


def sample(buffer: DataBuffer, n: int, device: torch.device | str | None = None, replace: bool = False) -> tuple[Any, dict[str, Any]]:
    """`buffer.sample(n, replace)` with tensors in place of arrays, moved to `device`. On the CPU nothing is copied once more.

    >>> import numpy as np
    >>> import leanreplay.torch
    >>> buffer = leanreplay.ReservoirBuffer(100)
    >>> buffer.add((np.zeros((40, 3), "float32"), np.arange(40)))
    >>> (x, y), meta = leanreplay.torch.sample(buffer, 8)
    >>> x.shape, y.dtype, sorted(meta)
    (torch.Size([8, 3]), torch.int64, ['idx', 'position'])
    """
    batch, meta = buffer.sample(n, replace)
    bits = _bfloat16(buffer)
    return to_torch(batch, bits, device), to_torch(meta, bits, device, "metadata")


def _bfloat16(buffer: DataBuffer) -> frozenset[str]:
    schema = buffer.schema
    return frozenset() if schema is None else bfloat16_fields(schema)


def bfloat16_fields(schema: Schema) -> frozenset[str]:
    """Names of the fields that hold the bits of torch.bfloat16."""
    return schema.bfloat16


def to_torch(value: Any, bits: frozenset[str], device: torch.device | str | None = None, path: str = "data") -> Any:
    """Arrays in any nesting as tensors that share their memory; what a transform made of a sample may be anything, and stays.

    bits: paths of arrays that hold bfloat16.
    """
    if type(value) is np.ndarray and not bits and value.dtype.kind in "biufc" and value.flags.writeable and value.flags.c_contiguous:
        tensor = torch.from_numpy(value)  # what a buffer hands out, without a detour
        return tensor if device is None else tensor.to(device)
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
        tensor = torch.from_numpy(array)
    return tensor.to(device) if device is not None else tensor
