"""A balanced buffer whose exemplars are chosen by a strategy: herding, closeness to the centre, at
random, or the user's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np

from ..arguments import choice, integers
from ..arrays import NO_ROWS, Ints
from ..errors import ArgumentError, ModeError, SchemaError
from ..keys import STREAM_BITS
from ..policies.base import Policy
from ..policies.exemplars import GROUPBY, ParametricPolicy
from ..policies.selection import ClosestToCenterSelection, HerdingSelection, RandomSelection, SelectionStrategy
from ..samples.batch import Batch, Fetch
from ..samples.dataset import Items
from ..samples.schema import Schema
from ..storage.layout import Layout
from ..storage.store import Store, WritableStore
from .balanced import BalancedBuffer
from .base import DataBuffer
from .feeding import Moved, skipped
from .rewriting import lengthen_log
from .units import RANK, Unit, ranks_of, read_exemplars, with_rank, without_rank
from .values import Array

_BUILT_IN = {c.__name__: c for c in (ClosestToCenterSelection, HerdingSelection, RandomSelection)}


def _refuse_rank(metadata: Any) -> None:
    if isinstance(metadata, Mapping) and "rank" in metadata:
        raise SchemaError('metadata "rank" is kept by the buffer itself: the place of a sample in its group; use another name')


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
        DataBuffer.__init__(self, max_size, path, **options)

    @classmethod
    def table_problem(cls, table: Layout) -> str | None:
        return super().table_problem(table) or (None if RANK in table.schema.metadata else "there is no rank in the metadata")

    @classmethod
    def _stored_schema(cls, schema: Schema) -> Schema:
        return with_rank(schema)

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

    # -- feeding -----------------------------------------------------------------------------------

    def add(
        self,
        batch: Any,
        *,
        features: Any = None,
        metadata: Mapping[str, Any] | None = None,
        group: object = None,
        experience: int | None = None,
        at: int | None = None,
        moved: Moved | None = None,
    ) -> None:
        """Feed a batch as one unit. features: (n, d), or a function of a batch of samples as
        stored, (B, ...) -> (B, d)."""
        if moved is not None:
            raise ArgumentError("this buffer takes no moved=...: overwrite metadata with set_metadata before the batch is added")
        with self.lock:
            schema, checked, groups = self._unit(batch, metadata, group, experience, at)
            self._feed_unit(schema, checked.n, checked.fetch, features, groups, at)

    def check_batch(
        self, batch: Any, *, metadata: Mapping[str, Any] | None = None, group: object = None, experience: int | None = None
    ) -> None:
        """As `DataBuffer.check_batch`; features are not looked at."""
        with self.lock:
            self._unit(batch, metadata, group, experience, None)

    def _unit(self, batch: Any, metadata: Any, group: object, experience: object, at: object) -> tuple[Schema, Batch, Ints]:
        """A batch that fits, and the groups of its samples."""
        store = self.current.writing()
        _refuse_rank(metadata)
        schema = Schema.from_batch(batch, metadata) if store.schema is None else without_rank(store.schema)
        leaves = schema.flatten(batch) + schema.flatten_metadata(metadata)
        checked = Batch(leaves, schema.fields)
        checked.groups = np.zeros(checked.n, np.int64)
        if group is None:
            group = self._default_group(schema, lambda field: leaves[field], experience, at, 0)
        return schema, checked, integers(group, checked.n, "group")

    def update(
        self,
        dataset: Any,
        *,
        features: Any = None,
        metadata: Mapping[str, Any] | None = None,
        group: object = None,
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
            items = Items(dataset, metadata, None if store.schema is None else without_rank(store.schema))
            n, schema = items.n, items.schema
            if n == 0:
                return

            def leaf(field: int) -> Any:
                targets = items.targets() if field == schema.label_field else None
                return items.column(field) if targets is None else targets

            if group is None:
                group = self._default_group(schema, leaf, experience, at, 1)
            fetch = items.fetch(np.zeros(n, np.int64))
            self._feed_unit(schema, n, fetch, features, integers(group, n, "group"), at)

    def _default_group(self, schema: Schema, leaf: Callable[[int], Any], experience: object, at: object, step: int) -> int | Array:
        """Group ids as `groupby` says. leaf(field): all values of a field."""
        by = self.groupby
        if by is None:
            return 0
        if by == "experience":
            return self.experience_number(experience, at, step)
        if by == "task" and "task" in schema.metadata_names:
            return leaf(len(schema.data) + schema.metadata_names.index("task"))
        field = schema.integer_element(1 if by == "class" else 2)
        if field is None:
            where = "the second element of each sample" if by == "class" else 'metadata "task", or the third element of each sample'
            raise SchemaError(f"groupby={by!r} wants an integer as {where}; there is none: give group=(n,) integers")
        return leaf(field)

    def _feed_unit(self, schema: Schema, n: int, fetch: Fetch, features: Any, groups: Ints, at: int | None) -> None:
        """Rank the samples of each group in the unit together with those held, and commit what
        changes."""
        store, strategy = cast(WritableStore, self.current.store), self.selection_strategy
        if strategy is None:
            raise ArgumentError(f"give selection_strategy={self.parameters.own['selection_strategy']} when opening this buffer to feed it")
        skip = skipped(at, n, store)
        if n == skip:
            return
        if store.schema is None:
            store = self._begin(schema, groups[skip:])
        policy = self.feeder.take_policy(store)
        assert isinstance(policy, ParametricPolicy)
        start = (self.stream << STREAM_BITS) + store.seen
        unit = Unit(schema, n, skip, fetch, features, strategy, self.seed, start)
        unit.stand_beside(store)
        sequence = store.sequence
        held = read_exemplars(store)
        choice = policy.choose(held, groups[skip:], unit.rank)
        if self.current.store is not store or store.sequence != sequence:
            raise ModeError(
                "the dataset or the features changed the buffer that they were feeding, which stops here; feed it from elsewhere"
            )
        slots = store.layout.log[1]
        if store.policy_log().shape[0] + choice.log.shape[0] > slots:
            store = lengthen_log(self.current, store, max(4 * slots, 4 * choice.known.shape[0]))
            unit.stand_beside(store)
        store.commit(unit.change(choice, held, store.seen + n - skip))
        policy.accept(choice)
        self.feeder.keep_policy(policy, store)

    def _begin(self, schema: Schema, groups: Ints) -> WritableStore:
        """Make the store of a new buffer, unless the policy refuses these groups."""
        policy = self.parameters.new_policy()
        policy.load(NO_ROWS, NO_ROWS)
        policy.check_groups(groups)
        self.current.create(schema)
        return cast(WritableStore, self.current.store)

    def _rows_to_keep(self, store: Store, policy: Policy, size: int, live: Ints) -> Ints:
        assert isinstance(policy, ParametricPolicy)
        return policy.keep_ranks(size, store.index()[1][live], ranks_of(store, live))

    def set_metadata(self, name: str, values: Any, rows: object = None, *, positions: object = None) -> None:
        """As `DataBuffer.set_metadata`; "rank" is the buffer's own."""
        if name == "rank":
            raise SchemaError('metadata "rank" is kept by the buffer itself; feed the group again to rank it anew')
        super().set_metadata(name, values, rows, positions=positions)
