"""Map-style datasets read in batches, in an order of one's own."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate

from ...arguments import call, length
from ...arrays import Ints
from ...errors import ArgumentError
from ...keys import key_pair
from .. import nests
from ..data import Transforms
from ..distributed import rank_and_size
from ..loading.interleaved import ShuffleSampler


class Reader:
    """A dataset of pairs, in batches (x, y), each a nest of tensors (n, ...).

    name: what errors call it. dataset: with len() and [i], or a pair (x, y) of arrays or tensors,
    of which x may be a nest. collate: of a list of samples; None: torch's default. transforms: of a
    batch that was read. label: samples, or what collate makes, are dicts; this entry is y.
    """

    def __init__(
        self,
        name: str,
        dataset: Any,
        collate: Callable[[list[Any]], Any] | None = None,
        transforms: Transforms | None = None,
        label: str | None = None,
    ) -> None:
        if label is not None and not isinstance(label, str):
            raise ArgumentError(f"label is the name of an entry of each sample, got {label!r:.200}")
        self.name, self.collate, self.transforms, self.label = name, collate, transforms, label
        if label is not None and isinstance(dataset, Mapping):
            dataset, self.label = self._split(dataset), None
        if type(dataset) is TensorDataset and len(dataset.tensors) == 2:
            dataset = dataset.tensors
        if isinstance(dataset, tuple) and len(dataset) == 2 and _are_arrays(dataset[0]) and _is_array(dataset[1]):
            if self.label is not None:
                raise ArgumentError(f"{name} is a pair (x, y), and y the label; leave label={label!r} out")
            dataset = Columns(name, *dataset)
        if isinstance(dataset, (IterableDataset, Mapping)) or length(dataset) < 0 or not hasattr(dataset, "__getitem__"):
            raise ArgumentError(f"{name} must be a dataset with len() and [i], or a pair (x, y) of tensors, got {type(dataset).__name__}")
        if length(dataset) == 0:
            raise ArgumentError(f"{name} has no samples")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Ints) -> tuple[Any, Any]:
        """Read the samples `indices`, in this order."""
        x, y = self.samples(indices)
        return (x, y) if self.transforms is None else self.transforms.apply(x, y, nests.first(x).device)[:2]

    def samples(self, indices: Ints) -> tuple[Any, Any]:
        """The same before transforms."""
        x, y = self._read(indices)
        if not nests.is_nest(x) or not nests.is_nest(y):
            raise ArgumentError(
                f"{self.name}: expected tensors of inputs and of targets, got {nests.described(x)} and {nests.described(y)}; "
                "give a collate function that makes tensors"
            )
        return x, y

    def _read(self, indices: Ints) -> tuple[Any, Any]:
        if self.collate is None and isinstance(self.dataset, Columns):
            return self.dataset.rows(torch.from_numpy(indices))  # as collating would, but at once
        # Like DataLoader, read several samples at once where the dataset can do that.
        several: Any = getattr(self.dataset, "__getitems__", lambda indices: [self.dataset[i] for i in indices])
        samples = call(self.name, several, indices.tolist())
        if self.collate is not None:
            return self._split(call(f"{self.name}: the collate function", self.collate, samples))
        try:
            return self._split(default_collate(samples))
        except (RuntimeError, TypeError) as error:
            raise ArgumentError(
                f"{self.name}: its samples do not make a batch: {error}; give them one shape and dtype, or give a collate function"
            ) from error

    def _split(self, batch: Any) -> tuple[Any, Any]:
        """(x, y) of a batch."""
        if self.label is None and isinstance(batch, (tuple, list)) and len(batch) == 2:
            return batch[0], batch[1]
        if self.label is not None and isinstance(batch, Mapping) and self.label in batch:
            return {key: value for key, value in batch.items() if key != self.label}, batch[self.label]
        wanted = "pairs (x, y)" if self.label is None else f"dicts with the label {self.label!r}"
        hint = "; label= names the entry that is y" if self.label is None and isinstance(batch, Mapping) else ""
        what = "its samples" if self.collate is None else "the collate function"
        raise ArgumentError(f"{self.name}: expected {wanted}, but {what} gave {type(batch).__name__} {batch!r:.100}{hint}")


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

    def of(self, epoch: int, first: int) -> Iterator[tuple[Any, Any]]:
        """Read an epoch from step `first` on."""
        self.sampler.set_epoch(epoch)
        order = np.fromiter(self.sampler, np.int64, len(self.sampler))
        for step in range(first, self.steps):
            yield self.reader.batch(piece(order, step * self.ranks + self.rank, self.steps * self.ranks))


def piece(order: Ints, i: int, pieces: int) -> Ints:
    """The i-th of so many pieces, of sizes that differ by at most one."""
    n = len(order)
    return order[i * n // pieces : (i + 1) * n // pieces]


class Columns(Dataset[Any]):
    """A dataset of the pairs of x, a nest of arrays or tensors (n, ...), and y (n, ...).

    Arrays become tensors, in the machine's byte order, without negative strides.
    """

    def __init__(self, name: str, x: Any, y: Any) -> None:
        try:
            self.x, self.y = nests.each_leaf(_as_tensor, x), _as_tensor(y)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"{name}: not an array that torch takes: {error}; make it one of numbers, a.astype('float32'), "
                "or of labels that are texts np.unique(y, return_inverse=True)[1]"
            ) from None
        others = {len(leaf) for leaf in nests.leaves(self.x)} - {len(self.y)}
        if others:
            raise ArgumentError(f"{name}: x has {others.pop()} samples, y has {len(self.y)}; they must be as many")

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return nests.each_leaf(operator.itemgetter(index), self.x), self.y[index]

    def rows(self, rows: torch.Tensor) -> tuple[Any, Any]:
        """Several samples."""
        return nests.each_leaf(operator.itemgetter(rows), self.x), self.y[rows]


def _is_array(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim > 0


def _are_arrays(nest: Any) -> bool:
    return _is_array(nest) or all(map(_is_array, nests.leaves(nest)))


def _as_tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(np.ascontiguousarray(value, value.dtype.newbyteorder("=")))
