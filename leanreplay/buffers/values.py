"""Values of rows by name: position, group, label, weight, or a metadata field; one for each row."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import NO_ROWS, Ints
from ..errors import GroupError, RowError, SchemaError
from ..policies.quotas import QuotaPolicy, groups_in
from ..samples.schema import Schema
from ..storage.store import Store
from .parameters import Parameters
from .tag import Label

_NO_LABEL = (
    "the samples have no group or label: give group=(n,) integers with the data, or pairs with an integer label (samples whose second "
    "element is one integer)"
)

Array = npt.NDArray[Any]
Groups = dict[Any, Ints]  # rows by value

_TRIES = 100  # of a reader, at the index of a store that is written to


class Values:
    """The columns of one buffer, by name, and its rows grouped by them.

    Names: any metadata field; "position", "group" and "weight", which the index holds; "idx", the
    rows; "label", which is the group where groups are classes, else the label field of samples.
    "class" is another word for "label". Rows are grouped once per commit, O(rows log rows).
    """

    def __init__(self, tag: Label, parameters: Parameters) -> None:
        self.tag, self._parameters = tag, parameters
        self._grouped: dict[str, tuple[Store, int, Groups]]
        self._sizes: tuple[Store, int, dict[int, int]] | None
        self.forget()

    def forget(self) -> None:
        """Have the groups worked out anew."""
        self._grouped, self._sizes = {}, None

    # -- values ------------------------------------------------------------------------------------

    def read(self, store: Store, name: str, rows: Ints) -> Array:
        """Return the values of these rows, (n, ...), a copy, their checksums verified."""
        schema = store.layout.schema
        if name == "idx":
            return rows
        field = self._field(schema, name)
        arrays, index = store.read(rows, cheapest_field(schema) if field is None else field)
        return arrays[0] if field is not None else self._of_index(name, *index).copy()

    def of_rows(self, store: Store, name: str, rows: Ints, index: tuple[Ints, Ints]) -> Array:
        """Return the values of rows whose positions and tags are known."""
        field = self._field(store.layout.schema, name)
        return self._of_index(name, *index) if field is None else store.read(rows, field)[0][0]

    def of_read(self, schema: Schema, name: str, arrays: Sequence[Array], index: Ints) -> Array:
        """Return the values of rows that were read whole."""
        field = self._field(schema, name)
        return self._of_index(name, *index) if field is None else arrays[field]

    def live(self, store: Store, name: str) -> tuple[Ints, Array]:
        """Return the live rows in order, and the value of each, of one moment. No sample is read
        where the index holds the values."""
        field = self._field(store.layout.schema, name)
        if field is not None:
            rows = all_rows(store)
            return rows, store.read(rows, field)[0][0]
        if store.writable:
            store.verify_index()
        positions, tags = store.snapshot(slice(0, store.high))
        rows, values = np.flatnonzero(positions >= 0), self._of_index(name, positions, tags)
        values = values.copy() if rows.shape[0] == values.shape[0] else values[rows]  # no view of the map
        if name not in ("position", *self.tag.shown) and values.size and values[0] == -1 and (values == -1).all():
            self._require_groups()
        return rows, values

    def _field(self, schema: Schema, name: str) -> int | None:
        """Return the number of the field that holds these values; None if the index does."""
        if name in schema.metadata_names:
            return metadata_index(schema, name)
        if name in ("label", "class") and not self._groups_are_classes:
            if schema.label_field is None:
                raise SchemaError(_NO_LABEL)
            return schema.label_field
        if name == "position" or name in self.tag.shown or (self.tag.groups and name in ("group", "label", "class")):
            return None
        if name in ("group", "label", "class"):
            raise SchemaError(f"a {self._parameters.kind.name} keeps no groups; its metadata fields are {schema.metadata_names}")
        return metadata_index(schema, name)

    def _of_index(self, name: str, positions: Ints, tags: Ints) -> Array:
        if name == "position":
            return positions
        return self.tag.show(tags)[name] if name in self.tag.shown else tags

    @property
    def _groups_are_classes(self) -> bool:
        return self.tag.groups == "class" and self._parameters.own.get("groupby", "class") == "class"

    # -- groups ------------------------------------------------------------------------------------

    def grouped(self, store: Store, name: str) -> Groups:
        """Return the live rows of each value, both ascending.

        Raises SchemaError where a value is no single number.
        """
        for _ in range(_TRIES):
            known = self._grouped.get(name)
            if known is not None and known[0] is store and known[1] == store.sequence:
                return known[2]
            sequence = store.sequence
            rows, values = self.live(store, name)
            if values.shape[1:] == (1,):
                values = values[:, 0]
            if values.ndim != 1:
                raise SchemaError(f"{name!r}: entries must be single values, got shape {values.shape[1:]}")
            found, counts = _count(values)
            parts = np.split(rows[np.argsort(_short(values), kind="stable")], np.cumsum(counts)[:-1])
            groups = dict(zip(found.tolist(), parts, strict=False))
            # Else a reader met a commit: what is found is right, but of which state?
            if store.sequence == sequence:
                self._grouped[name] = (store, sequence, groups)
                return groups
        raise _too_fast(store)

    def groups(self, store: Store) -> dict[int, Ints]:
        """Return the rows of each group, also of those that were seen and hold none."""
        rows = self.grouped(store, "group")
        known = dict.fromkeys(self._seen(store), NO_ROWS)
        return dict(sorted((known | rows).items())) if known.keys() - rows.keys() else rows

    def rows_of(self, store: Store, group: object) -> Ints:
        """Return the rows of a group. GroupError for one never seen."""
        groups = {} if store.schema is None else self.groups(store)
        try:
            return groups[operator.index(group)]  # type: ignore[arg-type]
        except (KeyError, TypeError):
            raise GroupError(f"no group {group!r:.200}; this buffer has seen {len(groups)}: {list(groups)[:10]}") from None

    def sizes(self, store: Store) -> dict[int, int]:
        """Return how many rows each group holds. It reads the index in pieces of bounded size."""
        known = self._sizes
        if known is not None and known[0] is store and known[1] == store.sequence:
            return known[2].copy()
        self._field(store.layout.schema, "group")
        if store.writable:
            store.verify_index()
        for _ in range(_TRIES):
            sequence, sizes = store.sequence, dict.fromkeys(self._seen(store), 0)
            for _, positions, tags in store.pieces():
                for g, count in zip(*map(np.ndarray.tolist, _count(tags[positions >= 0])), strict=True):
                    sizes[g] = sizes.get(g, 0) + count
            if store.sequence == sequence:
                if list(sizes) == [-1]:
                    self._require_groups()
                sizes = dict(sorted(sizes.items()))
                self._sizes = (store, sequence, sizes)
                return sizes.copy()
        raise _too_fast(store)

    def _require_groups(self) -> None:
        """Raise SchemaError unless -1 is a group like any other."""
        kind = self._parameters.kind
        if not kind.policy_class.needs_groups and not issubclass(kind.policy_class, QuotaPolicy):
            raise SchemaError(_NO_LABEL)

    def _seen(self, store: Store) -> list[int]:
        """Return the groups that the policy's log knows, in order of appearance."""
        logged = issubclass(self._parameters.kind.policy_class, QuotaPolicy)
        return groups_in(store.policy_log())[0].tolist() if logged else []


def _short(values: Array) -> Array:
    """Return integers that lie close together as 16 bits that have the same order: NumPy sorts and
    counts those several times as fast."""
    if values.dtype.kind in "iu" and values.shape[0] and int(values.max()) - int(values.min()) < 2**16:
        wide = values.astype(np.int64 if values.dtype.kind == "i" else np.uint64, copy=False)
        return (wide - wide.min()).astype(np.uint16)
    return values


def _count(values: Array) -> tuple[Array, Ints]:
    """Return the values that there are, ascending, and how often each."""
    short = _short(values)
    if short is values:
        return np.unique(values, return_counts=True)
    counts = np.bincount(short)
    found = np.flatnonzero(counts)
    return found.astype(values.dtype) + values.min(), counts[found]


def _too_fast(store: Store) -> RowError:
    return RowError(f"{store.path or 'this buffer'} changes faster than its groups can be read; try again")


def all_rows(store: Store) -> Ints:
    """Return the live rows in order, a copy."""
    live = store.live_rows()
    return np.arange(store.size) if live is None else live.copy()


def metadata_index(schema: Schema, name: str) -> int:
    """Return the field number of a metadata name."""
    names = schema.metadata_names
    if name not in names:
        raise SchemaError(f"no metadata {name!r}; the buffer has {names}, and 'idx' and 'position'")
    return len(schema.data) + names.index(name)


def cheapest_field(schema: Schema) -> int:
    """Return the number of the field that costs least to read."""
    return int(np.argmin([f.nbytes for f in schema.fields]))
