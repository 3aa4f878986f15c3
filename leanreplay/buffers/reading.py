"""Rows on their way out: from arrays to batches, items and metadata, through transforms."""

from __future__ import annotations

import functools
import importlib
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..arguments import call, plain_array, required
from ..arrays import Ints
from ..errors import ArgumentError, CorruptionError, RowError
from ..samples.batch import stack
from ..samples.schema import Schema
from ..storage.store import Store
from .current import Current
from .drawing import UNIFORM, Draw, Drawn, data_loader_worker
from .tag import Label
from .values import Array, all_rows

Sample = Any  # or an element of one
Metadata = dict[str, Any]
Read = tuple[Any, Metadata]  # a batch or a sample, with its metadata
Transform = Callable[[Any], Any]
Transforms = tuple[Transform | None, Transform | None]  # of the two elements of a sample
Convert = Callable[[Any, frozenset[str], Any, str], Any]  # leanreplay.torch.data.to_torch

_TRIES = 100  # of a reader whose rows a writer takes away meanwhile


class View:
    """What a buffer shows of its rows, transformed.

    convert, of the methods: makes what the transforms get.
    """

    def __init__(self, current: Current, tag: Label, transforms: Transforms) -> None:
        self._current, self._tag = current, tag
        self.transform, self.target_transform = transforms

    def sample(self, n: int, draw: Draw = UNIFORM, at_most: bool = False, convert: Convert | None = None) -> Read | None:
        """Draw a batch of n. at_most: of as many as there are if fewer; None if there are none."""
        current = self._current
        with current.lock:
            store = current.reading()
            if at_most:
                available = current.draws.available(store, draw)
                if not available:
                    return None
                n = min(n, available)
            if type(n) is not int or not 0 <= n <= 2**40:
                n = required("n", n, 0, 2**40)
            number = None
            for _ in range(_TRIES):
                sequence = store.sequence
                try:
                    current.draws.check_size(store, n, draw)
                    if number is None:
                        number = current.draws.next_number()
                    drawn = current.draws.rows(store, n, draw, "sample", number)
                    arrays, index = current.draws.read(store, drawn)
                    return self.batch(store.layout.schema, arrays, index, drawn, convert)
                except RowError as error:  # a reader met a rollback or a resize
                    if store.schema is None:
                        raise
                    old, store = store, current.reading()
                    if store is old and (store.writable or store.sequence == sequence):
                        raise CorruptionError(
                            f"{current.location.path or 'this buffer'}: rows that the header counts are free; buffer.check() lists "
                            "the wrong rows; restore the file from a copy made with save()"
                        ) from error
            raise self._keeps_changing()

    def _keeps_changing(self) -> RowError:
        return RowError(f"{self._current.location.path}: rows keep being freed while they are read")

    def get(self, rows: object) -> Read:
        """The samples in these rows."""
        with self._current.lock:
            store = self._current.reading()
            found = parse_rows(store, rows)
            arrays, index = store.read(found)
            return self.batch(store.layout.schema, arrays, index, Drawn(found, {}))

    def items_at(self, indices: Sequence[int], reach: int = 0, convert: Convert | None = None, group: int | None = None) -> list[Read]:
        """The i-th live samples, of a group or of all. reach: as of `parse_indices`."""
        current = self._current
        if current.mode == "r" and current.location.path is None and not current.parameters.kind.sized:
            reach = 0  # a forked copy in memory does not see later parts: nothing stands in
        with current.lock:
            for _ in range(_TRIES):
                store = current.reading()
                of_group = None if group is None else current.draws.values.rows_of(store, group)
                size, before = store.size if of_group is None else of_group.shape[0], store.sequence
                rows = parse_indices(indices, size, reach, functools.partial(current.draws.stand_in, store, size))
                if not rows.shape[0]:
                    return []
                try:
                    live = store.live_rows() if of_group is None else of_group
                    rows = rows if live is None else live[rows]
                    arrays, index = store.read(rows)
                except RowError:  # a reader may have met a commit that freed rows
                    if store.writable or store.sequence == before:
                        raise
                    continue
                # A reader may have met a commit that gave rows of the group to another one.
                if group is None or (index[1] == group).all():
                    return self.items(store.layout.schema, arrays, index, rows, convert)
            raise self._keeps_changing()

    def metadata(self, name: str, rows: object) -> Array:
        """One metadata field of these rows, of all samples for None."""
        with self._current.lock:
            store = self._current.reading()
            found = all_rows(store) if rows is None else parse_rows(store, rows)
            return self._current.draws.values.read(store, name, found)

    def live(self, name: str) -> Array:
        """The value of each live row, in order."""
        with self._current.lock:
            return self._current.draws.values.live(self._current.reading(), name)[1]

    def batch(self, schema: Schema, arrays: Sequence[Array], index: Ints, drawn: Drawn, convert: Convert | None = None) -> Read:
        """Assemble what was read: nested, transformed, with its metadata."""
        split = len(schema.data)
        batch = schema.unflatten(arrays[:split])
        if self.transform is not None or self.target_transform is not None:
            samples = [self._transformed(schema, [a[i] for a in arrays[:split]], convert) for i in range(index.shape[1])]
            batch = stack(samples) if samples else batch
        meta = dict(zip(schema.metadata_names, arrays[split:], strict=True)) if schema.metadata else {}
        meta["idx"], meta["position"] = drawn.rows, index[0]
        if self._tag.shown:
            meta.update(self._tag.show(index[1]))
        meta.update(drawn.shown)
        return batch, meta

    def items(self, schema: Schema, arrays: Sequence[Array], index: Ints, rows: Ints, convert: Convert | None = None) -> list[Read]:
        """Assemble what was read, sample by sample."""
        split = len(schema.data)
        tags, items = self._tag.show(index[1]), []
        for i, row in enumerate(rows.tolist()):
            sample = self._transformed(schema, [a[i] for a in arrays[:split]], convert)
            meta: Metadata = {name: a[i] for name, a in zip(schema.metadata_names, arrays[split:], strict=True)}
            meta["idx"], meta["position"] = row, index[0, i].item()
            meta |= {name: values[i].item() for name, values in tags.items()}
            items.append((sample, meta))
        return items

    def _transformed(self, schema: Schema, leaves: list[Array], convert: Convert | None) -> Sample:
        sample = schema.unflatten(leaves)
        if isinstance(sample, (tuple, list)) and len(sample) == 2:
            x = _apply(self.transform, sample[0], "data/0", schema, convert)
            y = _apply(self.target_transform, sample[1], "data/1", schema, convert)
            return (x, y) if isinstance(sample, tuple) else [x, y]
        if self.target_transform is not None:
            raise ArgumentError("target_transform needs samples that are pairs; use transform, which gets the whole sample")
        return _apply(self.transform, sample, "data", schema, convert)


def _apply(function: Transform | None, value: Any, path: str, schema: Schema, convert: Convert | None) -> Sample:
    """Return what a transform makes of an element."""
    if function is None:
        return value
    if convert is None and _takes_tensors(function):  # torchvision hands arrays back
        convert = importlib.import_module("leanreplay.torch.data").to_torch
    return call(f"the transform of {path}", function, value if convert is None else convert(value, schema.bfloat16, None, path))


def _takes_tensors(transform: Any) -> bool:
    """Whether a transform is a torch module, or begins with one."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    steps = getattr(transform, "transforms", None)
    transform = getattr(transform, "__self__", getattr(transform, "func", transform))
    return isinstance(transform, torch.nn.Module) or (isinstance(steps, list) and any(map(_takes_tensors, steps)))


def parse_rows(store: Store, rows: object) -> Ints:
    """Rows as an int64 array, each within the rows in use, live or not."""
    array = plain_array(rows, "rows", ArgumentError)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ArgumentError(f"rows are a list or array of integers, got {array.dtype} of shape {array.shape}")
    array = array.astype(np.int64)
    if array.size and (array.min() < 0 or array.max() >= store.high):
        raise RowError(f"rows from {array.min()} to {array.max()}, but the rows in use are 0 to {store.high - 1}")
    return array


def parse_indices(indices: Sequence[int], size: int, reach: int = 0, stand_in: Callable[[int], int] | None = None) -> Ints:
    """Indices into `size` samples, negative ones counting from the end, as (n,) int64. Raises
    RowError outside.

    reach: indices from `size` to below this were within when they were chosen. Each becomes what
        `stand_in` gives for it.
    """
    try:
        found = [operator.index(i) for i in indices]
    except TypeError:
        raise ArgumentError(f"buffer[i] takes an integer, got {indices!r}; use buffer.get(rows) for several") from None
    wrong = [i for i in found if not -size <= i < max(size, reach if size else 0)]
    if wrong:
        raise RowError(f"index {wrong[0]} of a buffer of {size}")
    return np.array([i % size if i < size or stand_in is None else stand_in(i) for i in found], np.int64)


class Reach:
    """The index up to which a dataset answers: rows go while a sampler goes on.

    It is the largest length that was told; in a DataLoader's worker, where another process has
    told the length, there is no limit.
    """

    def __init__(self) -> None:
        self._longest = 0

    def told(self, length: int) -> int:
        """Note the length that `__len__`, which calls this, is to tell.

        torch's RandomSampler asks for the length once more when its pass is over. It takes a length
        that has changed for the wish for more samples. So within a pass it is told the length that
        the pass began with, its variable n.
        """
        asks = sys._getframe(2)
        if asks.f_code.co_name == "num_samples" and asks.f_globals.get("__name__") == "torch.utils.data.sampler" and asks.f_back:
            length = asks.f_back.f_locals.get("n", length)
        self._longest = max(self._longest, length)
        return length

    def now(self) -> int:
        """One past the last index."""
        return 2**62 if data_loader_worker() else self._longest
