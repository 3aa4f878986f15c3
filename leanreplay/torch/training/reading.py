"""Map-style datasets read in batches, in an order of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, TensorDataset, default_collate

from ...arguments import call, length
from ...arrays import Ints
from ...errors import ArgumentError
from ...keys import key_pair
from ..data import Transforms
from ..distributed import rank_and_size
from ..loading.interleaved import ShuffleSampler


class Reader:
    """A dataset of pairs, in batches (x, y).

    name: what errors call it. dataset: with len() and [i], or a tuple (x, y) of tensors or arrays.
    collate: of a list of samples; None: torch's default. transforms: of a batch that was read.
    """

    def __init__(
        self, name: str, dataset: Any, collate: Callable[[list[Any]], Any] | None = None, transforms: Transforms | None = None
    ) -> None:
        if isinstance(dataset, tuple) and len(dataset) == 2 and all(isinstance(v, (torch.Tensor, np.ndarray)) and v.ndim for v in dataset):
            dataset = _pair(name, dataset)
        if isinstance(dataset, (IterableDataset, Mapping)) or length(dataset) < 0 or not hasattr(dataset, "__getitem__"):
            raise ArgumentError(f"{name} must be a dataset with len() and [i], or a pair (x, y) of tensors, got {type(dataset).__name__}")
        if length(dataset) == 0:
            raise ArgumentError(f"{name} has no samples")
        self.name, self.dataset, self.collate, self.transforms = name, dataset, collate, transforms

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Ints) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the samples `indices`, in this order."""
        x, y = self._read(indices)
        if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
            raise ArgumentError(
                f"{self.name}: expected a tensor of inputs and one of targets, got {type(x).__name__} and {type(y).__name__}; "
                "give a collate function that makes tensors"
            )
        return (x, y) if self.transforms is None else self.transforms.apply(x, y, x.device)[:2]

    def _read(self, indices: Ints) -> tuple[Any, Any]:
        if self.collate is None and type(self.dataset) is TensorDataset and len(self.dataset.tensors) == 2:
            rows = torch.from_numpy(indices)  # as collating would, but at once
            return self.dataset.tensors[0][rows], self.dataset.tensors[1][rows]
        # Like DataLoader, read several samples at once where the dataset can do that.
        several: Any = getattr(self.dataset, "__getitems__", lambda indices: [self.dataset[i] for i in indices])
        samples = call(self.name, several, indices.tolist())
        if self.collate is not None:
            batch = call(f"{self.name}: the collate function", self.collate, samples)
        else:
            try:
                batch = default_collate(samples)
            except (RuntimeError, TypeError) as error:
                raise ArgumentError(
                    f"{self.name}: its samples do not make a batch: {error}; give them one shape and dtype, or give a collate function"
                ) from error
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            what = "its samples" if self.collate is None else "the collate function"
            raise ArgumentError(f"{self.name}: expected pairs (x, y), but {what} gave {type(batch).__name__} {batch!r:.100}")
        return batch[0], batch[1]


class EpochBatches:
    """The batches of each epoch that one rank trains on.

    An order is cut into steps * ranks pieces, whose sizes differ by at most one. size: of the
    largest. name: orders depend on (seed, name, epoch) alone.
    """

    def __init__(self, reader: Reader, size: int, seed: int, name: str) -> None:
        self.reader, self.size = reader, size
        self.rank, self.ranks = rank_and_size()
        self.steps = -(-len(reader) // (size * self.ranks))
        if len(reader) < self.steps * self.ranks:
            raise ArgumentError(
                f"train_dataset: {len(reader)} samples are too few for {self.ranks} processes with batches of {size}; use fewer processes"
            )
        k0, k1 = key_pair(name, seed)
        self.sampler = ShuffleSampler(reader, seed=(int(k0) << 64 | int(k1)) - 2**127)

    def of(self, epoch: int, first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Read an epoch from step `first` on."""
        self.sampler.set_epoch(epoch)
        order = np.fromiter(self.sampler, np.int64, len(self.sampler))
        for step in range(first, self.steps):
            yield self.reader.batch(piece(order, step * self.ranks + self.rank, self.steps * self.ranks))


def piece(order: Ints, i: int, pieces: int) -> Ints:
    """The i-th of so many pieces, of sizes that differ by at most one."""
    n = len(order)
    return order[i * n // pieces : (i + 1) * n // pieces]


def _pair(name: str, arrays: tuple[Any, Any]) -> TensorDataset:
    """Make a dataset of (x, y). Arrays become tensors, in the machine's byte order, without
    negative strides."""
    try:
        x, y = (v if isinstance(v, torch.Tensor) else torch.as_tensor(np.ascontiguousarray(v, v.dtype.newbyteorder("="))) for v in arrays)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"{name}: not an array that torch takes: {error}; make it one of numbers, a.astype('float32'), "
            "or of labels that are texts np.unique(y, return_inverse=True)[1]"
        ) from None
    if len(x) != len(y):
        raise ArgumentError(f"{name}: x has {len(x)} samples, y has {len(y)}; they must be as many")
    return TensorDataset(x, y)
