"""One unit that is fed to a buffer of exemplars: its samples, what a strategy sees of them, and the
change that a choice makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arguments import plain_array
from ..arrays import Bytes, Ints
from ..errors import ArgumentError, SchemaError
from ..policies.exemplars import Choice, Exemplars
from ..policies.selection import SelectionStrategy, checked_order
from ..samples.batch import Fetch, flat
from ..samples.leaves import Field
from ..samples.schema import Schema
from ..storage.store import Change, Store
from .values import all_rows

Arrays = Sequence[npt.NDArray[Any]]

RANK = Field("metadata/rank", np.dtype(np.int64), ())
_BATCH = 256  # samples that a function of features is given at a time


def with_rank(schema: Schema) -> Schema:
    """Return the schema as stored: with the rank of each sample in its group."""
    return schema if RANK in schema.metadata else schema.with_metadata(RANK)


def without_rank(schema: Schema) -> Schema:
    """Return the schema of samples as they are fed."""
    return Schema(schema.data, tuple(f for f in schema.metadata if f != RANK), schema.structure)


def ranks_of(store: Store, rows: Ints) -> Ints:
    """Return the rank of each of these rows in its group."""
    ranks: Ints = store.read(rows, store.layout.schema.fields.index(RANK))[0][0]
    return ranks


def read_exemplars(store: Store) -> Exemplars:
    """Return what a buffer holds, by group and rank."""
    store.verify_index()
    rows = all_rows(store)
    return Exemplars.sort(rows, store.index()[1][rows], ranks_of(store, rows))


class Unit:
    """Samples that are fed together, beside a store of samples that are ranked with them.

    schema: of samples as they are fed. n: how many samples `fetch` and `features` are of; the first
    `skip` were seen before, and samples are numbered from there. start: stream position of sample
    0. seed: of the buffer.
    """

    def __init__(
        self, schema: Schema, n: int, skip: int, fetch: Fetch, features: Any, strategy: SelectionStrategy, seed: int, start: int
    ) -> None:
        self.schema, self.strategy, self.seed, self.start = schema, strategy, seed, start
        self._fetch, self._skip, self.features = fetch, skip, features
        if features is not None and not callable(features):
            given = plain_array(features, "features")
            if given.ndim != 2 or given.shape[0] != n:
                raise SchemaError(f"features: expected an array of shape ({n}, d), got {given.dtype} of shape {given.shape}")
            self.features = given[skip:]
        self._store: Store
        self._positions: Ints

    def stand_beside(self, store: Store) -> None:
        """Take the samples that this unit is ranked with from a store."""
        self._store, self._positions = store, store.index()[0]

    def load(self, samples: Ints) -> Arrays:
        """Return the fields of new samples."""
        k = samples.shape[0]
        sources, _ = self._fetch(samples + self._skip)
        return [
            np.ascontiguousarray(data.reshape(-1, f.nbytes)[where]).view(f.dtype).reshape(k, *f.shape)
            for f, (data, where) in zip(self.schema.fields, sources, strict=True)
        ]

    def read(self, rows: Ints) -> Arrays:
        """Return the fields of rows of the buffer, without the rank."""
        arrays, _ = self._store.read(rows)
        del arrays[self._store.layout.schema.fields.index(RANK)]
        return arrays

    def rank(self, rows: Ints, samples: Ints, quota: int) -> Ints:
        """Return the order that the strategy gives to rows of the buffer and new samples of one
        group, the best first."""
        positions = np.concatenate([self._positions[rows], samples + self.start])
        order = self.strategy.order(Candidates(self, rows, samples, positions), quota)
        return checked_order(order, positions.shape[0], self.strategy)

    def change(self, choice: Choice, held: Exemplars, seen: int) -> Change:
        """Return the change that a choice makes. New samples take dropped rows and free ones, the
        lowest first.

        seen: samples that the buffer has seen afterwards.
        """
        store, k = self._store, choice.samples.shape[0]
        store.distrust()
        free = np.ones(store.layout.max_size, bool)
        free[held.rows] = False
        free[choice.dropped] = True
        rows = np.concatenate([np.flatnonzero(free)[:k], choice.rows])
        positions, groups = store.index()
        ranks = np.concatenate([choice.ranks, choice.new_ranks])
        rank_field = store.layout.schema.fields.index(RANK)

        def sources(begin: int, stop: int) -> list[tuple[Bytes, Ints]]:
            parts = []
            if begin < k:
                parts.append(self.load(choice.samples[begin:stop]))
            if stop > k:
                parts.append(self.read(rows[max(begin, k) : stop]))
            arrays = list(_join(parts))
            arrays.insert(rank_field, ranks[begin:stop])
            where = np.arange(stop - begin)
            return [(flat(np.ascontiguousarray(a)), where) for a in arrays]

        return Change(
            seen,
            store.policy,
            rows,
            np.concatenate([choice.samples + self.start, positions[choice.rows]]),
            np.concatenate([choice.groups, groups[choice.rows]]),
            sources,
            freed=np.setdiff1d(choice.dropped, rows),
            log=choice.log,
            after=store.seen,
        )


class Candidates:
    """The samples of one group that a strategy chooses from: rows of the buffer first, by rank,
    then new samples.

    It is a map-style dataset of the samples, as stored. positions: (n,), those in the stream.
    """

    def __init__(self, unit: Unit, rows: Ints, samples: Ints, positions: Ints) -> None:
        self.seed, self.positions = unit.seed, positions
        self._unit, self._rows, self._samples = unit, rows, samples

    def __len__(self) -> int:
        return int(self.positions.shape[0])

    @property
    def dataset(self) -> Candidates:
        """Itself."""
        return self

    def __getitem__(self, i: int) -> Any:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        schema, i = self._unit.schema, i % len(self)
        return schema.unflatten([a[0] for a in self._read(i, i + 1)[: len(schema.data)]])

    def _read(self, begin: int, stop: int) -> Arrays:
        """Return the fields of candidates `begin` to `stop`."""
        k = self._rows.shape[0]
        parts = []
        if begin < k:
            parts.append(self._unit.read(self._rows[begin:stop]))
        if stop > k:
            parts.append(self._unit.load(self._samples[max(begin, k) - k : stop - k]))
        return _join(parts)

    def features(self) -> npt.NDArray[Any]:
        """Return (n, d) features: given, of the metadata, or of the strategy's model. Raises
        ArgumentError where there are none."""
        unit, given, strategy = self._unit, self._unit.features, self._unit.strategy
        names, kept = unit.schema.metadata_names, -1
        if "features" in names:
            kept = len(unit.schema.data) + names.index("features")
        if given is None and kept >= 0:
            return np.concatenate([_numbers(arrays[kept], unit.schema.fields[kept]) for arrays in self._batches()])
        if callable(given):
            return np.concatenate([self._computed(arrays) for arrays in self._batches()])
        if given is not None:
            return self._given(given, kept)
        if getattr(strategy, "model", None) is None:
            raise ArgumentError(
                f"{type(strategy).__name__} chooses by features: give features=(n, d) or a function of a batch, "
                'metadata "features", or the strategy a model and layer'
            )
        found: npt.NDArray[Any] = strategy.features_of(self)  # type: ignore[attr-defined]  # it has a model, see above
        return found

    def _batches(self) -> Iterator[Arrays]:
        """Read all candidates, some at a time."""
        for i in range(0, len(self), _BATCH):
            yield self._read(i, min(i + _BATCH, len(self)))

    def _given(self, given: npt.NDArray[Any], kept: int) -> npt.NDArray[Any]:
        """Return the features given for new samples, behind those kept with the rows of the
        buffer."""
        new = given[self._samples]
        if not self._rows.shape[0]:
            return new
        if kept < 0:
            raise ArgumentError(
                "this group is fed again, and the features of the samples that it holds are not known: give features as a function "
                'of a batch, or keep them with the samples: metadata={"features": features}'
            )
        stored = _numbers(self._unit.read(self._rows)[kept], self._unit.schema.fields[kept])
        return np.concatenate([stored, new.astype(stored.dtype)])

    def _computed(self, arrays: Arrays) -> npt.NDArray[Any]:
        """Return what the user's function makes of some candidates."""
        schema, n = self._unit.schema, arrays[0].shape[0]
        part = plain_array(self._unit.features(schema.unflatten(list(arrays[: len(schema.data)]))), "features")
        if part.ndim != 2 or part.shape[0] != n:
            raise SchemaError(f"features: expected ({n}, d) from the function, got shape {part.shape}")
        return part


def _join(parts: Sequence[Arrays]) -> Arrays:
    return parts[0] if len(parts) == 1 else [np.concatenate(both) for both in zip(*parts, strict=True)]


def _numbers(array: npt.NDArray[Any], field: Field) -> npt.NDArray[Any]:
    """Return the values of a field: of bfloat16 as float32, whose upper half it is."""
    return (array.astype(np.uint32) << np.uint32(16)).view(np.float32) if field.torch else array
