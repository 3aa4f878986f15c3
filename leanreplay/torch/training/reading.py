"""Map-style datasets read in batches, in an order of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset, TensorDataset, default_collate

from ...arguments import call, length
from ...errors import ArgumentError
from ..data import per_batch, per_sample


class Reader:
    """A dataset of pairs, in batches (x, y).

    name: what errors call it. dataset: with len() and [i], or a tuple (x, y) of tensors or arrays. collate: of a list of samples; None:
    torch's default. transform, target_transform: of the x and of the y of each sample, as tensors, like those of a learner; then
    batch_transform, of the x of a batch.
    """

    def __init__(
        self,
        name: str,
        dataset: Any,
        collate: Callable[[list[Any]], Any] | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        batch_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        if isinstance(dataset, tuple) and len(dataset) == 2 and all(isinstance(v, (torch.Tensor, np.ndarray)) and v.ndim for v in dataset):
            try:
                x, y = (torch.as_tensor(_native(v)) for v in dataset)
            except (TypeError, ValueError) as error:
                raise ArgumentError(
                    f"{name}: not an array that torch takes: {error}; make it one of numbers, a.astype('float32'), "
                    "or of labels that are texts np.unique(y, return_inverse=True)[1]"
                ) from None
            if len(x) != len(y):
                raise ArgumentError(f"{name}: x has {len(x)} samples, y has {len(y)}; they must be as many")
            dataset = TensorDataset(x, y)
        if isinstance(dataset, (IterableDataset, Mapping)) or length(dataset) < 0 or not hasattr(dataset, "__getitem__"):
            raise ArgumentError(f"{name} must be a dataset with len() and [i], or a pair (x, y) of tensors, got {type(dataset).__name__}")
        if length(dataset) == 0:
            raise ArgumentError(f"{name} has no samples")
        self.name, self.dataset = name, dataset
        self.collate, self.transform, self.target_transform, self.batch_transform = collate, transform, target_transform, batch_transform

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples `indices`, in this order."""
        x, y = self._read(indices)
        if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
            raise ArgumentError(
                f"{self.name}: expected a tensor of inputs and one of targets, got {type(x).__name__} and {type(y).__name__}; "
                "give a collate function that makes tensors"
            )
        if self.transform is not None:
            x = per_sample(self.transform, x, f"{self.name}: transform")
        if self.target_transform is not None:
            y = per_sample(self.target_transform, y, f"{self.name}: target_transform")
        return x if self.batch_transform is None else per_batch(self.batch_transform, x, f"{self.name}: batch_transform"), y

    def _read(self, indices: npt.NDArray[np.int64]) -> tuple[Any, Any]:
        if self.collate is None and type(self.dataset) is TensorDataset and len(self.dataset.tensors) == 2:
            rows = torch.from_numpy(indices)
            return self.dataset.tensors[0][rows], self.dataset.tensors[1][rows]  # what collating would give, without a loop over samples
        which = indices.tolist()
        # Several samples in one read where the dataset can do that, as DataLoader does.
        several: Any = getattr(self.dataset, "__getitems__", lambda indices: [self.dataset[i] for i in indices])
        samples = call(self.name, several, which)
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


def _native(values: Any) -> Any:
    """An array in the machine's byte order and without negative strides, which are all that torch takes."""
    return values if isinstance(values, torch.Tensor) else np.ascontiguousarray(values, values.dtype.newbyteorder("="))
