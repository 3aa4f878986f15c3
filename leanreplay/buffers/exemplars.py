"""A balanced buffer whose exemplars are chosen by a strategy: herding, closeness to the centre, at
random, or the user's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arguments import choice, integers, plain_array
from ..arrays import NO_ROWS, Ints
from ..errors import ArgumentError, ModeError, SchemaError
from ..keys import STREAM_BITS
from ..policies.balanced import make_log
from ..policies.exemplars import GROUPBY, ParametricPolicy
from ..policies.selection import ClosestToCenterSelection, HerdingSelection, RandomSelection, SelectionStrategy, checked_order
from ..samples.batch import Batch, Fetch, flat
from ..samples.dataset import Items
from ..samples.schema import Field, Schema
from ..storage.layout import Table
from ..storage.store import Change
from .balanced import BalancedBuffer
from .feeding import skipped
from .reading import all_rows
from .rewriting import lengthen_log

Arrays = list[np.ndarray[Any, Any]]

_RANK = Field("metadata/rank", np.dtype(np.int64), ())
_NO_FLAGS = np.zeros(0, bool)
_BUILT_IN = {c.__name__: c for c in (ClosestToCenterSelection, HerdingSelection, RandomSelection)}
_BATCH = 256  # samples that a function of features is given at a time


def _with_rank(schema: Schema) -> Schema:
    """The schema as stored: with the rank of each sample in its group."""
    return schema if "rank" in schema.metadata_names else schema.with_metadata(_RANK)


def _without_rank(schema: Schema) -> Schema:
    """The schema of samples as they are fed."""
    return Schema(schema.data, tuple(f for f in schema.metadata if f.name != _RANK.name), schema.structure)


def _rank_field(schema: Schema) -> int:
    return [f.name for f in schema.fields].index(_RANK.name)


def _refuse_rank(metadata: Any) -> None:
    if isinstance(metadata, Mapping) and "rank" in metadata:
        raise SchemaError('metadata "rank" is kept by the buffer itself: the place of a sample in its group; use another name')


def _element(schema: Schema, i: int) -> int | None:
    """Field of the i-th element of a sample that is a tuple or list, if that is a single
    integer."""
    s = schema.structure
    if s[0] not in ("tuple", "list") or len(s) < i + 2 or s[i + 1][0] != "leaf":
        return None
    field = schema.data[s[i + 1][1]]
    return int(s[i + 1][1]) if field.shape == () and field.dtype.kind in "iu" and field.torch is None else None


def _new_ones(ids: Ints, known: Ints) -> Ints:
    """Those that are not known, in order."""
    return ids[~np.isin(ids, known)]


class Candidates:
    """The samples of one group that a strategy chooses from: rows of the buffer first, by rank,
    then new samples."""

    def __init__(self, seed: int, positions: Ints, schema: Schema, read: Callable[[Ints], Arrays], features: Callable[[], Any]) -> None:
        self.seed, self.positions = seed, positions
        self._schema, self.read, self._features = schema, read, features

    def __len__(self) -> int:
        return int(self.positions.shape[0])

    def features(self) -> Any:
        """(n, d) features. Raises ArgumentError where there are none."""
        return self._features()

    @property
    def dataset(self) -> Candidates:
        """Itself: a map-style dataset of the samples, as stored."""
        return self

    def __getitem__(self, i: int) -> Any:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return self._schema.unflatten([a[0] for a in self.read(np.array([i % len(self)]))[: len(self._schema.data)]])


class ParametricBuffer(BalancedBuffer):
    """Exemplars of each group, chosen by a selection strategy from the whole group whenever it is
    fed.

    Each `update` (or `add`) is one unit: the samples of each group in it are ranked together with
    those that the buffer holds of that group, and the best up to the group's quota stay, in one
    commit. Other groups shrink to their new quotas by dropping their last ranks. So the rows of a
    group are at any time the best prefix of its ranking; `meta["rank"]` (0 is the best) says where
    each stands.

    Parameters, besides those of `DataBuffer`
    ----------
    groupby: None (one group), "class" (second element of a pair), "task" (metadata "task", else the
        third element of a triple), "experience" (each update is one, or experience=...). `group`
        given with the data, (n,) integers, comes before all of them.
    selection_strategy: a `SelectionStrategy`; a new buffer takes `RandomSelection()`.
    adaptive_size, total_num_groups: quotas, as for `ClassBalancedBuffer`.

    Features, for strategies that need them, are the first found of: the argument `features`;
    metadata "features"; the strategy's model and layer. For a group that is fed again those of the
    old samples are needed too, so a plain array will not do then.

    Because one commit may change every row, the file has a journal as large as its data: twice the
    size of other buffers. Costs, an update: the ranking, and a copy of the exemplars that come, go
    or change their rank.

    >>> import numpy as np
    >>> from leanreplay import HerdingSelection, ParametricBuffer
    >>> buffer = ParametricBuffer(4, groupby="class", selection_strategy=HerdingSelection())
    >>> x = np.arange(12.0).reshape(6, 2)
    >>> buffer.add((x, np.array([0, 0, 0, 1, 1, 1])), features=x)
    >>> buffer.group_sizes(), buffer.get_metadata("position").tolist()
    ({0: 2, 1: 2}, [0, 1, 3, 4])
    """

    policy_class = ParametricPolicy
    whole_journal = True
    _strategy: SelectionStrategy | None = None

    def __init__(
        self,
        max_size: int | None = None,
        path: str | os.PathLike[str] | None = None,
        *,
        groupby: str | None = "",
        selection_strategy: SelectionStrategy | None = None,
        adaptive_size: bool | None = None,
        total_num_groups: int | None = None,
        **options: Any,
    ) -> None:
        if groupby != "":
            choice("groupby", groupby, GROUPBY, "; give group ids of your own with the data: group=...")
        if selection_strategy is not None and not isinstance(selection_strategy, SelectionStrategy):
            raise ArgumentError(f"selection_strategy must be a SelectionStrategy, got {selection_strategy!r:.200}")
        self._strategy = selection_strategy
        self._given(total_num_groups, adaptive_size=adaptive_size)
        self._params["groupby"] = None if groupby == "" else groupby or "nothing"
        if selection_strategy is not None:
            self._params |= {"selection_strategy": selection_strategy.name, "uniform": bool(selection_strategy.uniform)}
        super().__init__(max_size, path, **options)

    @classmethod
    def table_problem(cls, table: Table) -> str | None:
        return super().table_problem(table) or (None if _RANK in table.schema.metadata else "there is no rank in the metadata")

    @classmethod
    def _stored_schema(cls, schema: Schema) -> Schema:
        return _with_rank(schema)

    @property
    def selection_strategy(self) -> SelectionStrategy | None:
        """The strategy that was given, else the built-in one that the file names; None if there is
        no such."""
        built_in = _BUILT_IN.get(self.parameters.own.get("selection_strategy", ""))
        if self._strategy is None and built_in is not None:
            self._strategy = built_in()
        return self._strategy

    @property
    def groupby(self) -> str | None:
        """What samples are grouped by."""
        name = self.parameters.own["groupby"]
        return None if name == "nothing" else name

    # -- feeding -----------------------------------------------------------------------------------------------------

    def add(  # type: ignore[override]
        self,
        batch: Any,
        *,
        features: Any = None,
        metadata: Mapping[str, Any] | None = None,
        group: Any = None,
        experience: int | None = None,
        at: int | None = None,
    ) -> None:
        """Feed a batch as one unit. features: (n, d), or a function of a batch of samples as
        stored, (B, ...) -> (B, d)."""
        with self.lock:
            schema, checked, groups = self._unit(batch, metadata, group, experience, at)
            self._feed_unit(schema, checked.n, checked.fetch, features, groups, at)

    def check_batch(  # type: ignore[override]
        self, batch: Any, *, metadata: Mapping[str, Any] | None = None, group: Any = None, experience: int | None = None
    ) -> None:
        """As `DataBuffer.check_batch`; features are not looked at."""
        with self.lock:
            self._unit(batch, metadata, group, experience, None)

    def _unit(self, batch: Any, metadata: Any, group: Any, experience: Any, at: Any) -> tuple[Schema, Batch, Ints]:
        """A batch that fits, and the groups of its samples."""
        store = self.current.writing()
        _refuse_rank(metadata)
        schema = Schema.from_batch(batch, metadata) if store.schema is None else _without_rank(store.schema)
        leaves = schema.flatten(batch) + schema.flatten_metadata(metadata)
        checked = Batch(leaves, schema.fields)
        checked.groups = np.zeros(checked.n, np.int64)
        if group is None:
            group = self._default_group(schema, lambda field: leaves[field], experience, at, 0)
        return schema, checked, integers(group, checked.n, "group")

    def update(  # type: ignore[override]
        self,
        dataset: Any,
        *,
        features: Any = None,
        metadata: Mapping[str, Any] | None = None,
        group: Any = None,
        experience: int | None = None,
        at: int | None = None,
    ) -> None:
        """Feed a map-style dataset as one unit; only exemplars are loaded, besides what functions
        of features, and labels, look at.

        features: (n, d), or a function of a batch of samples as stored, (B, ...) -> (B, d). The
            rest as for `DataBuffer.update`.
        """
        with self.lock:
            store = self.current.writing()
            _refuse_rank(metadata)
            items = Items(dataset, metadata, None if store.schema is None else _without_rank(store.schema))
            n, schema = items.n, items.schema
            if n == 0:
                return

            def leaf(field: int) -> Any:
                targets = items.targets() if field == _element(schema, 1) else None
                return items.column(field) if targets is None else targets

            if group is None:
                group = self._default_group(schema, leaf, experience, at, 1)
            fetch = items.fetch(np.zeros(n, np.int64))
            self._feed_unit(schema, n, fetch, features, integers(group, n, "group"), at)

    def _default_group(self, schema: Schema, leaf: Callable[[int], Any], experience: Any, at: Any, step: int) -> Any:
        """Group ids as `groupby` says. leaf(field): all values of a field."""
        by = self.groupby
        if by is None:
            return 0
        if by == "experience":
            return self.experience_number(experience, at, step)
        if by == "task" and "task" in schema.metadata_names:
            return leaf(len(schema.data) + schema.metadata_names.index("task"))
        field = _element(schema, 1 if by == "class" else 2)
        if field is None:
            where = "the second element of each sample" if by == "class" else 'metadata "task", or the third element of each sample'
            raise SchemaError(f"groupby={by!r} wants an integer as {where}; there is none: give group=(n,) integers")
        return leaf(field)

    def _feed_unit(self, schema: Schema, n: int, fetch: Fetch, features: Any, groups: Ints, at: Any) -> None:
        """Rank the samples of each group in it together with those held, and commit what
        changes."""
        store = self.current.store
        strategy = self.selection_strategy
        if strategy is None:
            raise ArgumentError(f"give selection_strategy={self.parameters.own['selection_strategy']} when opening this buffer to feed it")
        skip = skipped(at, n, store)
        if n == skip:
            return
        if store.schema is None:
            fresh: Any = self.parameters.new_policy()
            fresh.load(NO_ROWS, NO_ROWS)
            ids = np.unique(groups[skip:])
            fresh.quotas(ids, self.max_size, np.zeros_like(ids))
            self.current.create(schema)
            store = self.current.store
        policy: Any = self.feeder.take_policy(store)
        start = (self.stream << STREAM_BITS) + store.seen - skip
        before = self._by_group()[1]
        fed = groups[skip:]
        ids, first = np.unique(fed, return_index=True)
        known = np.concatenate([policy.known, _new_ones(ids[np.argsort(first)], policy.known)])
        held = np.array([before[g].shape[0] if g in before else 0 for g in known.tolist()], np.int64)
        quotas = policy.quotas(known, self.max_size, held)
        full = np.concatenate([policy.full, np.zeros(known.shape[0] - policy.full.shape[0], bool)])
        source = _Source(self.seed, store, schema, n, fetch, features, strategy, start)
        sequence = store.sequence
        new, old, old_ranks, dropped = _Picks(), [NO_ROWS], [NO_ROWS], [NO_ROWS]
        everything = set(ids.tolist())
        for i, (group, quota) in enumerate(zip(known.tolist(), quotas.tolist(), strict=True)):
            rows = before.get(group, NO_ROWS)
            ranks = self._ranks(store, rows)
            rows, ranks = rows[np.argsort(ranks)], np.sort(ranks)
            if group not in everything:
                dropped.append(rows[quota:])
                full[i] |= rows.shape[0] > quota
                continue
            fresh = skip + np.flatnonzero(fed == group)
            candidates = source.candidates(rows, fresh)
            order = checked_order(strategy.order(candidates, quota), len(candidates), strategy)[:quota]
            full[i] |= len(candidates) > quota
            rank = np.full(len(candidates), -1, np.int64)
            rank[order] = np.arange(order.shape[0])
            mine, theirs = rank[: rows.shape[0]], rank[rows.shape[0] :]
            dropped.append(rows[mine < 0])
            moved = (mine >= 0) & (mine != ranks)
            old.append(rows[moved])
            old_ranks.append(mine[moved])
            new.take(fresh[theirs >= 0], theirs[theirs >= 0], group)
        seen = store.seen
        if self.current.store is not store or store.sequence != sequence:
            raise ModeError(
                "the dataset or the features changed the buffer that they were feeding, which stops here; feed it from elsewhere"
            )
        self._commit_unit(
            store, policy, source, new, np.concatenate(old), np.concatenate(old_ranks), np.concatenate(dropped), known, full, seen, n - skip
        )

    def _commit_unit(
        self,
        store: Any,
        policy: Any,
        source: _Source,
        new: _Picks,
        old: Ints,
        old_ranks: Ints,
        dropped: Ints,
        known: Ints,
        full: Any,
        seen: int,
        fed: int,
    ) -> None:
        """One commit: new samples take dropped rows and free ones, the lowest first; old ones get
        their new ranks."""
        newly = full.copy()
        newly[: policy.full.shape[0]] &= ~policy.full
        log = np.concatenate([make_log(_new_ones(known, policy.known), _NO_FLAGS), make_log(NO_ROWS, newly)])
        slots = store.layout.log[1]
        if store.policy_log().shape[0] + log.shape[0] > slots:
            source.store = store = lengthen_log(self.current, store, max(4 * slots, 4 * known.shape[0]))
        samples, ranks, groups = new.sorted()
        free = np.ones(self.max_size, bool)
        free[all_rows(store)] = False
        free[dropped] = True
        rows = np.concatenate([np.flatnonzero(free)[: samples.shape[0]], old])
        positions, row_groups = store.index()
        positions = np.concatenate([samples + source.start, positions[old]])
        row_groups = np.concatenate([groups, row_groups[old]])
        ranks = np.concatenate([ranks, old_ranks])
        freed = np.setdiff1d(dropped, rows)
        rank_field = _rank_field(store.layout.schema)

        def pieces(begin: int, stop: int) -> list[tuple[npt.NDArray[np.uint8], Ints]]:
            k = samples.shape[0]
            arrays = source.read(rows[max(begin, k) : stop], samples[begin : min(stop, k)])
            arrays.insert(rank_field, ranks[begin:stop])
            where = np.arange(stop - begin)
            return [(flat(np.ascontiguousarray(a)), where) for a in arrays]

        store.commit(Change(seen + fed, store.policy, rows, positions, row_groups, pieces, freed, log=log, after=seen))

    def _ranks(self, store: Any, rows: Ints) -> Ints:
        arrays, _ = store.read(rows, _rank_field(store.layout.schema))
        return np.asarray(arrays[0], np.int64)

    def _rows_to_keep(self, store: Any, policy: Any, size: int, live: Ints) -> Ints:
        kept: Ints = policy.keep_ranks(size, store.index()[1][live], self._ranks(store, live))
        return kept

    def set_metadata(self, name: str, values: Any, rows: Any = None, *, positions: Any = None) -> None:
        """As `DataBuffer.set_metadata`; "rank" is the buffer's own."""
        if name == "rank":
            raise SchemaError('metadata "rank" is kept by the buffer itself; feed the group again to rank it anew')
        super().set_metadata(name, values, rows, positions=positions)


def _numbers(array: np.ndarray[Any, Any], field: Field) -> np.ndarray[Any, Any]:
    """The values of a field: of bfloat16 as float32, whose upper half it is."""
    return (array.astype(np.uint32) << np.uint32(16)).view(np.float32) if field.torch else array


class _Picks:
    """New samples that stay: their numbers in what is fed, ranks and groups."""

    def __init__(self) -> None:
        self._parts: list[tuple[Ints, Ints, Ints]] = []

    def take(self, samples: Ints, ranks: Ints, group: int) -> None:
        self._parts.append((samples, ranks, np.full(samples.shape[0], group, np.int64)))

    def sorted(self) -> tuple[Ints, Ints, Ints]:
        """All of them, in the order of the samples."""
        samples, ranks, groups = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        order = np.argsort(samples)
        return samples[order], ranks[order], groups[order]


class _Source:
    """Where samples and features come from: rows of the buffer, and what is being fed."""

    def __init__(
        self, seed: int, store: Any, schema: Schema, n: int, fetch: Fetch, features: Any, strategy: SelectionStrategy, start: int
    ) -> None:
        self.store, self.schema, self.start = store, schema, start
        self._seed, self._fetch, self._strategy, self._given = seed, fetch, strategy, features
        if features is not None and not callable(features):
            self._given = plain_array(features, "features")
            if self._given.ndim != 2 or self._given.shape[0] != n:
                raise SchemaError(f"features: expected an array of shape ({n}, d), got {self._given.dtype} of shape {self._given.shape}")

    def read(self, rows: Ints, samples: Ints) -> Arrays:
        """Fields, without the rank, of new samples and then of rows of the buffer."""
        fields = self.schema.fields
        parts: list[Arrays] = []
        if samples.shape[0]:
            sources, _ = self._fetch(samples)
            k = samples.shape[0]
            parts.append([
                np.ascontiguousarray(data.reshape(-1, f.nbytes)[where]).view(f.dtype).reshape(k, *f.shape)
                for f, (data, where) in zip(fields, sources, strict=True)
            ])  # fmt: skip
        if rows.shape[0] or not parts:
            arrays, _ = self.store.read(rows)
            del arrays[_rank_field(self.store.layout.schema)]
            parts.append(arrays)
        return parts[0] if len(parts) == 1 else [np.concatenate(both) for both in zip(*parts, strict=True)]

    def candidates(self, rows: Ints, fresh: Ints) -> Candidates:
        """Rows of the buffer, then new samples."""
        k = rows.shape[0]

        def read(which: Ints) -> Arrays:
            """For which in ascending order."""
            newer, older = self.read(NO_ROWS, fresh[which[which >= k] - k]), self.read(rows[which[which < k]], NO_ROWS)
            return [np.concatenate(both) for both in zip(older, newer, strict=True)]

        positions = np.concatenate([self.store.index()[0][rows], fresh + self.start])
        candidates = Candidates(self._seed, positions, self.schema, read, lambda: self._features(rows, fresh, candidates))
        return candidates

    def _features(self, rows: Ints, fresh: Ints, candidates: Candidates) -> Any:
        n, read = len(candidates), candidates.read
        split, names = len(self.schema.data), self.schema.metadata_names
        function = self._given
        if function is None and "features" in names:
            at = split + names.index("features")
            kept = [read(np.arange(i, min(i + _BATCH, n)))[at] for i in range(0, n, _BATCH)]
            return _numbers(np.concatenate(kept), self.schema.fields[at])
        if function is not None and not callable(function):
            if not rows.shape[0]:
                return function[fresh]
            if "features" not in names:
                raise ArgumentError(
                    "this group is fed again, and the features of the samples that it holds are not known: give features as a function "
                    'of a batch, or keep them with the samples: metadata={"features": features}'
                )
            at = split + names.index("features")
            stored = _numbers(self.read(rows, NO_ROWS)[at], self.schema.fields[at])
            return np.concatenate([stored, function[fresh].astype(stored.dtype)])
        if function is None:
            if getattr(self._strategy, "model", None) is None:
                raise ArgumentError(
                    f"{type(self._strategy).__name__} chooses by features: give features=(n, d) or a function of a batch, "
                    'metadata "features", or the strategy a model and layer'
                )
            return self._strategy.features_of(candidates)  # type: ignore[attr-defined]  # it has a model, see above
        parts = []
        for i in range(0, n, _BATCH):
            batch = self.schema.unflatten(read(np.arange(i, min(i + _BATCH, n)))[:split])
            part = plain_array(function(batch), "features")
            if part.ndim != 2 or part.shape[0] != min(_BATCH, n - i):
                raise SchemaError(f"features: expected ({min(_BATCH, n - i)}, d) from the function, got shape {part.shape}")
            parts.append(part)
        return np.concatenate(parts)
