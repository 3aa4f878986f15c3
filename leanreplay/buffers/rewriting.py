"""What changes the structure of a buffer: a new file is written, and takes the old one's name."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from ..arguments import integer
from ..arrays import NO_ROWS, Ints
from ..errors import ArgumentError, CapacityWarning, SchemaError
from ..policies.base import Policy
from ..samples.batch import flat
from ..samples.leaves import Field, batch_leaf, check_leaf, leaf_type, to_numpy
from ..samples.schema import metadata_field
from ..storage.layout import Layout
from ..storage.store import Change, WritableStore
from ..storage.writer import Writer
from .current import Current
from .parameters import Parameters, Pieces
from .values import Array, all_rows


@dataclass(frozen=True)
class Rewritten:
    """One file of a buffer as it is to be written anew: rows[i] of the old one becomes new_rows[i].

    policy, log: what the new state says of the policy. slots: the least entries of the log. extra:
    a new field, and its values for `rows`.
    """

    store: WritableStore
    rows: Ints
    new_rows: Ints
    size: int
    policy: Sequence[int]
    log: Ints
    slots: int = 0
    extra: tuple[Field, Array] | None = None

    def plan(self, parameters: Parameters) -> tuple[Layout, Pieces]:
        """Plan the file."""
        old = self.store.layout
        schema = old.schema if self.extra is None else old.schema.with_metadata(self.extra[0])
        return parameters.plan_file(schema, self.size, old.params, max(self.slots, 2 * self.log.shape[0]))

    def fill(self, new: Writer) -> None:
        """Write the rows."""
        store = self.store
        store.distrust()
        for start in range(0, self.rows.shape[0], new.max_rows):
            part = slice(start, start + new.max_rows)
            arrays, index = store.read(self.rows[part])
            if self.extra is not None:
                arrays.insert(new.schema.fields.index(self.extra[0]), np.ascontiguousarray(self.extra[1][part]))
            samples = np.arange(index.shape[1])
            sources = [(flat(a), samples) for a in arrays]
            new.commit(Change(store.seen, self.policy, self.new_rows[part], index[0], index[1], sources))
        if new.seen != store.seen or not self.rows.shape[0] or self.log.shape[0]:
            new.commit(Change(store.seen, self.policy, log=self.log))


def rewrite(current: Current, files: Sequence[Rewritten], keep_points: bool = False) -> None:
    """Replace the store by one of another size, schema or log.

    keep_points: restore points stay, because neither rows nor schema change.
    """
    planned = [(*file.plan(current.parameters), file.fill) for file in files]
    old = cast(WritableStore, current.store)
    old.stay()
    current.replace(lambda: current.location.rewrite(planned, cast(Writer, old) if keep_points else None), keep_points)


def resize(
    current: Current,
    take_policy: Callable[[WritableStore], Policy],
    rows_to_keep: Callable[[WritableStore, Policy, int, Ints], Ints],
    max_size: int,
) -> None:
    """Change the number of rows; see `DataBuffer.resize`. rows_to_keep(store, policy, size, live
    rows): which of the live ones."""
    store, parameters = current.writing(), current.parameters
    size = integer("max_size", max_size, 1, 2**40)
    if size is None:
        raise ArgumentError("resize needs the new max_size")
    if store.schema is None:
        parameters.resize_empty(size)
        return
    if size == parameters.max_size:
        return
    policy = take_policy(store)  # which nobody puts back, as `keep` changes its state
    live = all_rows(store)
    kept = live[_checked_keep(policy, rows_to_keep(store, policy, size, live), size, live.shape[0])]
    warning = policy.capacity_warning(size)
    if warning:
        warnings.warn(f"resize to {size}: {warning}", CapacityWarning, stacklevel=outside())
    rewrite(current, [Rewritten(store, kept, np.arange(kept.shape[0]), size, policy.state, policy.log)])


def kept_by_policy(buffer: str, store: WritableStore, policy: Policy, size: int, live: Ints) -> Ints:
    """Return which live rows the policy keeps. buffer: the name of its class, for the error."""
    if type(policy).keep is Policy.keep:
        raise ArgumentError(f"{buffer} cannot be resized: {type(policy).__name__}.keep does not say which rows stay")
    positions, tags = store.index()
    return policy.keep(size, positions[live], tags[live])


def _checked_keep(policy: Policy, kept: object, size: int, held: int) -> Ints:
    """Return what `keep` of a policy, perhaps of the user's own, said. ArgumentError for what no
    kernel must see."""
    rows = np.asarray(kept)
    right = rows.ndim == 1 and rows.shape[0] <= size and (rows.dtype.kind in "iu" or not rows.shape[0])
    rows = rows.astype(np.int64) if right else NO_ROWS
    if not right or ((rows < 0) | (rows >= held)).any() or np.unique(rows).shape[0] != rows.shape[0]:
        raise ArgumentError(
            f"{type(policy).__name__}.keep gave {kept!r:.200}: at most {size} different numbers from 0 to {held - 1} are allowed"
        )
    return rows


def lengthen_log(current: Current, store: WritableStore, slots: int) -> WritableStore:
    """Rewrite the store with a log of so many entries. Returns the new one."""
    live = all_rows(store)
    rewrite(current, [Rewritten(store, live, live, store.layout.max_size, store.policy, store.policy_log(), slots)], keep_points=True)
    return cast(WritableStore, current.store)


def add_field(current: Current, store: WritableStore, name: str, values: Any, rows: Ints) -> None:
    """Rewrite the store, all parts of it, with one more metadata field, of these values for all
    rows."""
    values = batch_leaf(values, f"metadata/{name}")
    dtype, shape, torch = leaf_type(values, f"metadata/{name}")
    field = metadata_field(name, Field(f"metadata/{name}", dtype, tuple(shape[1:]), torch))
    if field.nbytes == 0:
        raise SchemaError(f"metadata/{name}: entries of shape {field.shape} have no bytes")
    live = all_rows(store)
    if not np.array_equal(np.sort(rows), live):
        raise SchemaError(f"metadata/{name} is new: give values for all {store.size} samples (rows=None), not for {rows.shape[0]}")
    check_leaf(values, field, rows.shape[0])
    ordered, files = to_numpy(values, field)[np.argsort(rows, kind="stable")], []
    for part in store.parts:
        mine, ordered = ordered[: part.size], ordered[part.size :]
        live, size, slots = all_rows(part), part.layout.max_size, part.layout.log[1]
        files.append(Rewritten(part, live, live, size, part.policy, part.policy_log(), slots, (field, mine)))
    rewrite(current, files)


def outside() -> int:
    """For `warnings.warn`, the `stacklevel` of the code that called into this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(os.path.dirname(os.path.dirname(__file__))):
        level, frame = level + 1, frame.f_back
    return level
