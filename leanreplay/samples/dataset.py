"""A map-style dataset on its way into a buffer: its labels are read, and the items that stay.

Of `torch.utils.data.Subset` the dataset within is looked at. A `TensorDataset`, and a tuple of
arrays, are read as the batch that they are: no item is made for its label, nor for its bytes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..arguments import call, integers, is_tensor, length, plain_array
from ..arrays import Ints
from ..errors import ArgumentError, SchemaError
from .batch import Batch, Fetch, Sources, as_batch, flat
from .leaves import check_leaf, entry, leaf_type, to_numpy
from .schema import Schema

_AT_ONCE, _BYTES = 1024, 8 << 20  # items that are asked for together, at most
_TABLES = (("iloc",), ("to_pydict",), ("columns", "to_numpy"))  # of pandas, pyarrow, polars


class Columns:
    """Arrays of one length as a dataset of tuples, as TensorDataset is for tensors.

    They may lie in files (of h5py, zarr).
    """

    def __init__(self, tensors: tuple[Any, ...]) -> None:
        # Of tables, [i] means a label.
        self.tensors = tensors = tuple(v.to_numpy() if hasattr(v, "to_numpy") else v for v in tensors)
        shapes = [leaf_type(v, f"data/{i}")[1] if is_tensor(v) else tuple(v.shape) for i, v in enumerate(tensors)]
        lengths = [shape[0] for shape in shapes]
        if len(set(lengths)) > 1:
            raise ArgumentError(f"update: a tuple of arrays is a dataset of tuples, but they differ in length: {lengths}")
        if len(tensors) > 2 and all((v.dtype, shape) == (tensors[0].dtype, shapes[0]) for v, shape in zip(tensors, shapes, strict=True)):
            raise ArgumentError(
                f"update: {len(tensors)} arrays alike, of shape {shapes[0]}, in a tuple: are they samples, or what samples "
                "are made of? Give a list of samples, update(list(arrays)), or a batch, add(arrays)"
            )

    def __len__(self) -> int:
        return int(self.tensors[0].shape[0])

    def __getitem__(self, i: int) -> tuple[Any, ...]:
        return tuple(column[i] for column in self.tensors)


def as_dataset(dataset: Any) -> Any:
    """Return what `update` takes as a dataset with len() and [i]; ArgumentError otherwise."""
    if isinstance(dataset, tuple) and len(dataset) > 1 and all(map(_is_column, dataset)):
        return Columns(dataset)
    torch = sys.modules.get("torch.utils.data")
    own, within = getattr(type(dataset), "__getitem__", None), [dataset]
    if torch is not None:
        for each in within:
            within += [each.dataset] if type(each) is torch.Subset else each.datasets if type(each) is torch.ConcatDataset else []
    if isinstance(dataset, Mapping):
        hint = "a dict of arrays is a batch: add(batch); of a dict of datasets choose one; of samples under keys: update(list(d.values()))"
    elif any(getattr(type(each), "with_metadata", False) for each in within):
        hint = "its items are (sample, metadata); leanreplay.torch.BufferDataset(buffer) has samples alone, as has [s for s, _ in buffer]"
    elif any(all(hasattr(type(dataset), n) for n in names) for names in _TABLES):
        # Its [i] means a label, or a column.
        hint = "give its columns as a batch, add({c: df[c].to_numpy() for c in df.columns}), or update(df.to_numpy())"
    elif torch is not None and isinstance(dataset, torch.DataLoader):
        hint = "loop over it, `for batch in loader: buffer.add(batch)`, or update(loader.dataset)"
    elif length(dataset) < 0 or own is None or (torch is not None and own is torch.Dataset.__getitem__):
        hint = "loop over it and call add for batches; of single samples make a list: update(list(samples))"
    else:
        return dataset
    raise ArgumentError(f"update needs a map-style dataset with len() and [i], got {type(dataset).__name__}; {hint}")


def _is_column(value: Any) -> bool:
    return hasattr(value, "to_numpy") or (getattr(value, "ndim", 0) > 0 and all(hasattr(value, n) for n in ("dtype", "__getitem__")))


class Items:
    """The items of a map-style dataset with their metadata, `(n, ...)` each.

    n: how many. schema: of a buffer, or of the first item.
    """

    def __init__(self, dataset: Any, metadata: Any, schema: Schema | None) -> None:
        dataset = as_dataset(dataset)
        n = len(dataset)
        self.n, self.dataset, self.schema, self.metadata = n, dataset, schema or Schema((), (), None), []
        if not n:
            return
        if schema is None:
            first = {k: as_batch(v, k)[0] for k, v in metadata.items()} if isinstance(metadata, Mapping) else metadata
            try:
                self.schema = Schema.from_sample(self._item(0), first)
            except SchemaError as error:
                raise SchemaError(
                    str(error) if str(error)[:8] == "metadata" else f"item 0 of the dataset: {error}{self._hint()}"
                ) from error
        both = zip(self.schema.flatten_metadata(metadata), self.schema.metadata, strict=True)
        self.metadata = [check_leaf(leaf, field, n) for leaf, field in both]
        self._parts = list(_parts(dataset))
        inner, self._which = self._parts[-1]
        torch = sys.modules.get("torch.utils.data")
        self._tensors: Batch | None = None
        if type(inner) is Columns:
            in_memory = all(isinstance(v, np.ndarray) or is_tensor(v) for v in inner.tensors)
        else:
            in_memory = torch is not None and type(inner) is torch.TensorDataset
        if in_memory:
            self._tensors = Batch(self.schema.flatten(inner.tensors), self.schema.data)

    def targets(self) -> Any:
        """Return n `targets` of the dataset, or of one that it is a subset of. None without."""
        for dataset, which in self._parts:
            if which is None:
                found = getattr(dataset, "targets", None)
                if length(found) == self.n:
                    return found
                continue
            # A dataset within may have anything under that name; its items will tell.
            with contextlib.suppress(Exception):
                array = plain_array(dataset.targets, "targets")
                if array.shape[0] == len(dataset):
                    return array[which]
        return None

    def groups(self, group: Any, needed: bool, skip: int) -> Ints | None:
        """Return groups as `update` takes them: `group`, `targets`, or the tensor of labels.

        Where they are needed, the labels of items from `skip` are read. None means the label of
        each item when it is loaded.
        """
        if group is not None:
            return integers(group, self.n, "group")
        targets = self.targets()
        if targets is not None:
            with contextlib.suppress(SchemaError):  # targets need not be one integer each
                return integers(targets, self.n, "targets")
        field = self.schema.label_field
        if field is None:
            if needed and skip < self.n:
                raise SchemaError(
                    "this buffer balances over classes: give group=(n,) integers, or samples that are pairs with an integer label"
                )
            return None if self._tensors is None else np.full(self.n, -1, np.int64)
        if self._tensors is not None or needed:
            return integers(self.column(field, skip), self.n, self.schema.data[field].name)
        return None

    def column(self, number: int, skip: int = 0) -> Any:
        """Return all values of a field, (n, ...); those of data before `skip` may be anything."""
        split = len(self.schema.data)
        if number >= split:
            return self.metadata[number - split]
        field = self.schema.fields[number]
        if self._tensors is not None:
            leaf = self._tensors.leaves[number]
            return leaf if self._which is None else to_numpy(leaf, field, self._which)
        values = np.zeros((self.n, *field.shape), field.dtype)
        for i in range(skip, self.n):
            values[i] = self._entry(i, number)
        return values

    def _entry(self, i: int, number: int) -> Any:
        item = self._item(i)
        try:
            return entry(self.schema.flatten(item)[number], self.schema.fields[number])
        except SchemaError as error:
            raise SchemaError(f"item {i} of the dataset: {error}{self._hint()}") from error

    def _item(self, i: int) -> Any:
        try:
            return self.dataset[i]
        except StopIteration as error:  # which would end a loop of the caller's in silence
            raise ArgumentError(f"item {i} of the dataset: {type(self.dataset).__name__}[{i}] raised StopIteration") from error
        except Exception as error:
            if hasattr(error, "add_note"):  # from Python 3.11 on
                error.add_note(f"raised by item {i} of a dataset of {self.n} that was given to update()")
            raise

    def _hint(self) -> str:
        if hasattr(self.dataset, "with_format"):  # of Hugging Face, which makes lists of arrays
            return "; dataset.with_format('numpy') gives arrays"
        pair = isinstance(self.dataset, (tuple, list)) and self.n == 2 and type(self.dataset[0]) is not tuple
        return "; a dataset of pairs is a list of samples, or a tuple (x, y) of arrays" if pair else ""

    @property
    def data(self) -> list[Any] | None:
        """Bytes of all fields of all items, if they lie in memory as they would in a batch."""
        if self._tensors is None or self._which is not None or not self._tensors.simple:
            return None
        metadata = Batch(self.metadata, self.schema.metadata)
        return self._tensors.data + metadata.data if metadata.simple else None

    def fetch(self, groups: Ints | None) -> Fetch:
        """Return what loads items. groups: of all items, or None for the labels of those loaded."""

        def fetch(picks: Ints) -> tuple[Sources, Ints]:
            where, found = np.arange(picks.shape[0]), np.full(picks.shape[0], -1, np.int64)
            if self._tensors is None:
                sources = [(flat(array), where) for array in self._load(picks)]
            else:
                sources = self._tensors.sources(picks if self._which is None else self._which[picks])
            if groups is not None:
                found = groups[picks]
            elif self._tensors is None and (label := self.schema.label_field) is not None:
                field = self.schema.data[label]
                found = integers(sources[label][0].view(field.dtype), picks.shape[0], field.name)
            both = zip(self.metadata, self.schema.metadata, strict=True)
            return sources + [(flat(to_numpy(v, f, picks)), where) for v, f in both], found

        return fetch

    def _load(self, picks: Ints) -> list[np.ndarray[Any, Any]]:
        fields = self.schema.data
        arrays = [np.empty((picks.shape[0], *f.shape), f.dtype) for f in fields]
        for i, (pick, item) in enumerate(self._items(picks.tolist())):
            try:
                for array, leaf, field in zip(arrays, self.schema.flatten(item), fields, strict=True):
                    array[i] = entry(leaf, field)
            except SchemaError as error:
                raise SchemaError(f"item {pick} of the dataset: {error}{self._hint()}") from error
        return arrays

    def _items(self, picks: list[int]) -> Iterator[tuple[int, Any]]:
        """The items with their numbers: one by one, or as many at a time as a dataset of
        `__getitems__` is asked for."""
        own: Mapping[str, Any] = next((vars(c) for c in type(self.dataset).__mro__ if vars(c).keys() & {"__getitem__", "__getitems__"}), {})
        many = own.get("__getitems__")  # not that of a base class of which [i] was overridden
        if many is None:
            yield from ((pick, self._item(pick)) for pick in picks)
            return
        at_once = max(1, min(_AT_ONCE, _BYTES // sum(field.nbytes for field in self.schema.data)))
        for start in range(0, len(picks), at_once):
            some = picks[start : start + at_once]
            try:
                items = call("the dataset's __getitems__", many, self.dataset, some)
            except NotImplementedError:  # what a dataset says whose base class has it
                items = [self._item(pick) for pick in some]
            if length(items) != len(some):
                raise ArgumentError(
                    f"{type(self.dataset).__name__}.__getitems__ gave {length(items)} items for {len(some)} indices; "
                    "it returns a list with one for each"
                )
            yield from zip(some, items, strict=True)


def _parts(dataset: Any) -> Sequence[tuple[Any, Ints | None]]:
    """Return the dataset and, as long as it is a Subset, the one within, from the outside in.

    With each comes which of its items the outermost dataset has (None: all, in order).
    """
    found: list[tuple[Any, Ints | None]] = [(dataset, None)]
    torch = sys.modules.get("torch.utils.data")
    while torch is not None and type(dataset) is torch.Subset:
        before, inner = found[-1][1], dataset.dataset
        n = length(inner)
        try:
            indices = plain_array(dataset.indices, "indices")
        except SchemaError:
            break  # whatever they mean, the items will tell
        if indices.ndim != 1 or indices.dtype.kind not in "iu" or not indices.size or indices.min() < -n or indices.max() >= n:
            break
        indices = indices.astype(np.int64)  # a copy
        indices[indices < 0] += n
        dataset = inner
        found.append((dataset, indices if before is None else indices[before]))
    return found
