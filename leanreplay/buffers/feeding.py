"""The way in: a batch is parsed, the policy plans what stays, each plan becomes one commit."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from ..arguments import integer, integers
from ..arrays import Bytes, Ints
from ..errors import ArgumentError, ModeError, RowError, StorageError
from ..keys import STREAM_BITS
from ..policies.append import AppendPolicy
from ..policies.base import LOG_TOO_SHORT, Plan, Policy, check_plan
from ..samples.batch import Batch, Fetch, flat
from ..samples.dataset import Items
from ..samples.leaves import check_leaf, to_numpy
from ..samples.schema import Schema
from ..storage.store import Change, MetadataUpdate, PlannedBatch, Store, WritableStore
from .current import Current
from .reading import parse_rows
from .rewriting import lengthen_log
from .tag import Label, checked_scores
from .values import metadata_index

Moved = tuple[object, object, Mapping[str, Any]]  # rows, their positions, values by name

MAX_PLANNED = 1 << 16  # samples in one plan


class Fed(NamedTuple):
    """What is fed: n samples. fetch: loads some of them, for the commits that want more than a
    kernel call.

    tags: of all; None if `fetch` finds them. data: the bytes of all, if they are at hand. offered:
    what the policy sees of all, if that is not the tags.
    """

    n: int
    tags: Ints | None
    fetch: Fetch
    data: Sequence[Bytes] | None
    offered: Ints | None = None


class Feeder:
    """Feeds a buffer. It keeps the policy between two commits.

    The policy belongs to one state of one store. `take_policy` hands it out, and whoever has
    committed what it planned puts it back with `keep_policy`. After an exception nobody does, so
    the policy is derived anew from the index.
    """

    def __init__(self, current: Current, tag: Label) -> None:
        self._current, self._tag, self._parameters = current, tag, current.parameters
        self._policy: Policy | None = None
        self._store: Store = current.store  # whose policy it is, and at which sequence
        self._sequence = -1
        self._no_tags: Ints = np.zeros(0, np.int64)

    # -- the policy --------------------------------------------------------------------------------

    def policy(self, store: WritableStore) -> Policy:
        """The policy in the state of the store, to look at."""
        policy = self.take_policy(store)
        self.keep_policy(policy, store)
        return policy

    def take_policy(self, store: WritableStore) -> Policy:
        """The policy in the state of the store, to plan with."""
        policy, self._policy = self._policy, None
        if policy is None or self._store is not store or self._sequence != store.sequence:
            policy = self._derive(store)
        return policy

    def keep_policy(self, policy: Policy, store: WritableStore) -> None:
        """Keep a policy whose state is now that of the store."""
        self._policy, self._store, self._sequence = policy, store, store.sequence

    def forget_policy(self) -> None:
        """Have the policy derived anew."""
        self._policy = None

    def _derive(self, store: WritableStore) -> Policy:
        store.verify_index()
        layout = store.layout
        policy = self._parameters.new_policy(layout.params)
        policy.state, policy.log, policy.slots = store.policy, store.policy_log(), layout.log[1]
        scratch = store.scratch(renew=True)
        if policy.slots:  # one that frees rows
            policy.scratch = scratch
        try:
            if isinstance(policy, AppendPolicy):
                policy.start_at(store.seen)  # the index of all parts would take memory for each row
            else:
                policy.load(*self.policys_index(store))
        except MemoryError:
            raise StorageError(errno.ENOMEM, f"no memory for the policy of {layout.max_size} rows; read with mode='r'") from None
        return policy

    def policys_index(self, store: WritableStore) -> tuple[Ints, Ints]:
        """Position (-1: free), and what the policy sees, of the rows below `high`: for one call."""
        positions, tags = store.index()
        if not self._tag.ranked:
            return positions, tags
        seen = np.zeros(positions.shape[0], np.int64)
        for start in range(0, seen.shape[0], MAX_PLANNED):
            rows = start + np.flatnonzero(positions[start : start + MAX_PLANNED] >= 0)
            seen[rows] = store.read(rows, metadata_index(store.layout.schema, self._tag.ranked))[0][0].view(np.int64)
        return positions, seen

    # -- batches and datasets ----------------------------------------------------------------------

    def add(self, batch: Any, metadata: Any, group: object, at: int | None, moved: Moved | None) -> None:
        """Feed a batch; see `DataBuffer.add`."""
        store = self._current.writing()
        schema, checked = self.parse(store, batch, metadata, group)
        n, tags = checked.n, checked.groups
        skip = skipped(at, n, store)
        if n == skip and (n or moved is None):
            return
        update = None if moved is None else self._parse_update(store, moved)
        if n == 0:
            if update is not None:
                self.commit_update(store, update)
            return
        self.begin(store, schema, tags[skip:])
        offered = self._offered(schema, checked.leaves)
        self.feed(Fed(n, tags, checked.fetch, checked.data if checked.simple else None, offered), skip, update)

    def check(self, batch: Any, metadata: Any, group: object) -> None:
        """Raise what `add` would raise for this batch because of what it is."""
        store = self._current.writing()
        checked = self.parse(store, batch, metadata, group)[1]
        policy = self._parameters.new_policy() if store.schema is None else self.policy(store)
        policy.check_groups(checked.groups)

    def parse(self, store: WritableStore, batch: Any, metadata: Any, group: object) -> tuple[Schema, Batch]:
        """Return the schema, which the first batch decides, and the batch with its tags."""
        schema = store.schema
        if schema is None:
            schema = Schema.from_batch(batch, metadata)
        checked = Batch(schema.flatten(batch) + schema.flatten_metadata(metadata), schema.fields)
        checked.groups = self._tag.of_batch(group, checked, schema)
        return schema, checked

    def update(self, dataset: Any, metadata: Any, group: object, at: int | None) -> None:
        """Feed a dataset; see `DataBuffer.update`."""
        store = self._current.writing()
        items = Items(dataset, metadata, store.schema)
        n = items.n
        if n == 0:
            return
        skip = skipped(at, n, store)
        tags = self._tag.of_dataset(group, items, skip)
        if n == skip:
            return
        self.begin(store, items.schema, None if tags is None else tags[skip:])
        offered = self._offered(items.schema, [*items.schema.data, *items.metadata])
        self.feed(Fed(n, tags, items.fetch(tags), None if tags is None else items.data, offered), skip)

    def _offered(self, schema: Schema, leaves: Sequence[Any]) -> Ints | None:
        """What the policy sees of samples, if that is a field of theirs; None if it is the tags."""
        if not self._tag.ranked:
            return None
        values: npt.NDArray[np.float64] = leaves[metadata_index(schema, self._tag.ranked)]
        return values.view(np.int64)

    def begin(self, store: WritableStore, schema: Schema, tags: Ints | None) -> None:
        """Make the store of a new buffer, unless the policy refuses these tags."""
        if store.schema is None:
            if tags is not None:
                self._parameters.new_policy().check_groups(tags)
            self._current.create(schema)

    def feed(self, fed: Fed, skip: int, update: MetadataUpdate | None = None) -> None:
        """Plan and commit all samples but the first `skip`. `update` goes with the first commit."""
        store, n, tags = cast(WritableStore, self._current.store), fed.n, fed.tags
        offered = tags if fed.offered is None else fed.offered
        if offered is None and not self._no_tags.shape[0]:
            self._no_tags = np.zeros(MAX_PLANNED, np.int64)
        if tags is not None:
            if self._parameters.kind.policy_class.check_groups is not Policy.check_groups:
                self.policy(store).check_groups(tags[skip:])
            if not tags.flags.carray:  # for other memory the kernels would be compiled once more
                tags = tags.copy()
        if update is not None and 2 * update.rows.shape[0] > store.max_rows:
            self.commit_update(store, update)
            update = None
        done, stream = skip, self._parameters.stream << STREAM_BITS
        while done < n:
            seen, before, policy = store.seen, store.sequence, self.take_policy(store)
            m, start = min(n - done, MAX_PLANNED), stream + seen
            max_rows = store.max_rows if update is None else store.max_rows - update.rows.shape[0]
            self._retag(policy, update)
            plan = policy.plan(start, self._no_tags[:m] if offered is None else offered[done : done + m], max_rows)
            check_plan(policy, plan)
            if plan is LOG_TOO_SHORT and policy.slots:
                store = lengthen_log(self._current, store, 4 * policy.slots)
                continue
            used = plan.rows.shape[0]
            changed: tuple[Ints, ...] = (plan.rows,)
            if not (
                fed.data is not None and tags is not None and update is None and 0 < used <= m and not len(plan.freed) and not len(plan.log)
                and store.commit_planned(PlannedBatch(seen, policy.state, plan.rows, start, tags, done, fed.data, max_rows))
            ):  # fmt: skip
                store.commit(self._change(store, policy, plan, fed.fetch, done, m, max_rows, update))
                changed = (plan.rows, plan.freed) if update is None else (plan.rows, plan.freed, update.rows)
                update = None
            self._current.draws.committed(store, before, changed)
            self.keep_policy(policy, store)
            done += used

    def _change(
        self,
        store: WritableStore,
        policy: Policy,
        plan: Plan,
        fetch: Fetch,
        done: int,
        m: int,
        max_rows: int,
        update: MetadataUpdate | None,
    ) -> Change:
        """Turn a plan for m samples, of which the first is number `done` of what is fed, into a
        change."""
        used, freed, seen, name = plan.rows.shape[0], plan.freed, store.seen, type(policy).__name__
        start = (self._parameters.stream << STREAM_BITS) + seen
        kept = store.survivors(plan.rows, freed, start) if 0 < used <= m else None
        count = -1 if kept is None else kept.n
        if count == -2:
            raise ArgumentError(
                f"{name}.plan freed {freed.shape[0]} rows, of which some are not live, taken by the same plan, "
                "or given twice: rows that are live before it and free after it are allowed"
            )
        if kept is None or not 0 <= count <= max_rows:
            raise ArgumentError(
                f"{name}.plan used {used} of {m} samples and took {count} rows: 1 to {m} samples, "
                f"at most {max_rows} rows from 0 to {(self._parameters.max_size or 2**40) - 1}, or -1, are allowed"
            )
        if update is not None:
            update = _except_rows(update, kept.rows, freed)
        after = seen + used
        if not count:
            return Change(after, policy.state, freed=freed, log=plan.log, update=update, after=seen)
        sequence = store.sequence
        sources, tags = fetch(kept.samples + done if done else kept.samples)
        if store.sequence != sequence:
            raise ModeError("the dataset changed the buffer that it was feeding, which stops here; feed it from elsewhere")
        return Change(after, policy.state, kept.rows, kept.positions, tags, sources, freed, plan.log, update, seen)

    # -- metadata ----------------------------------------------------------------------------------

    def set_metadata(self, store: WritableStore, name: str, values: Any, rows: Ints, positions: object) -> None:
        """Overwrite a metadata field of rows; see `DataBuffer.set_metadata`."""
        field = metadata_index(store.layout.schema, name)
        data = self._source(store, field, values, rows)
        rows, samples = _rows_still_holding(store, rows, positions)
        if not rows.shape[0]:
            return
        if (store.positions_of(rows) < 0).any():
            raise RowError("set_metadata: some of these rows are free; the live ones are in meta['idx'] of a sample")
        store.verify_index()
        for start in range(0, rows.shape[0], store.max_rows):
            store.read(rows[start : start + store.max_rows], field)  # no new checksum for damage
        self.commit_update(store, MetadataUpdate(rows, {field: (data, samples)}))

    def _parse_update(self, store: WritableStore, moved: Moved) -> MetadataUpdate | None:
        """Parse the metadata that `add` is to overwrite; None if no row holds its sample now."""
        try:
            rows, positions, values = moved
            names: list[str] = list(values)
        except (TypeError, ValueError):
            raise ArgumentError(f"moved is (rows, positions, {{name: values}}), got {moved!r:.200}") from None
        if store.schema is None:
            raise RowError("moved: the buffer is empty, there is nothing to move")
        found = parse_rows(store, rows)
        fields = [metadata_index(store.schema, name) for name in names]
        sources = {f: self._source(store, f, values[name], found) for f, name in zip(fields, names, strict=True)}
        found, samples = _rows_still_holding(store, found, positions)
        if not found.shape[0] or not fields:
            return None
        store.verify_index()
        for field in fields:
            store.read(found, field)  # no new checksum for damage
        return MetadataUpdate(found, {f: (data, samples) for f, data in sources.items()})

    def commit_update(self, store: WritableStore, update: MetadataUpdate) -> None:
        """Commit new metadata, in commits of as many rows as the journal holds."""
        policy = self.take_policy(store) if self._tag.ranked else None
        fits = self._store is store and self._sequence == store.sequence
        for start in range(0, update.rows.shape[0], store.max_rows):
            part = slice(start, start + store.max_rows)
            sources = {f: (data, samples[part]) for f, (data, samples) in update.sources.items()}
            before = store.sequence
            store.commit(Change(store.seen, store.policy, update=MetadataUpdate(update.rows[part], sources)))
            self._current.draws.committed(store, before, (update.rows[part],))
        if policy is not None:
            self._retag(policy, update)
            self.keep_policy(policy, store)
        elif fits:
            self._sequence = store.sequence  # metadata does not concern the policy

    def _retag(self, policy: Policy, update: MetadataUpdate | None) -> None:
        """Tell the policy of new metadata, if it looks at that."""
        if update is None or not self._tag.ranked:
            return
        for field, (data, samples) in update.sources.items():
            if self._current.store.layout.schema.fields[field].name == f"metadata/{self._tag.ranked}":
                policy.retag(update.rows, data.view(np.int64)[samples])

    def _source(self, store: WritableStore, field: int, values: Any, rows: Ints) -> npt.NDArray[np.uint8]:
        """The bytes of a field's values for these rows. SchemaError where they do not fit."""
        f = store.layout.schema.fields[field]
        if self._tag.ranked and f.name == f"metadata/{self._tag.ranked}":
            values = checked_scores(values, rows.shape[0])
        return flat(to_numpy(check_leaf(values, f, rows.shape[0]), f))


def skipped(at: int | None, n: int, store: Store) -> int:
    """How many of n samples were seen already. at: position of the first; None: the next."""
    if store.seen + n >= 2**STREAM_BITS:
        raise ArgumentError(f"a stream holds at most 2**{STREAM_BITS} samples; go on with another stream number")
    if at is None:
        return 0
    seen, position = store.seen, integer("at", at, 0, 2**STREAM_BITS - 1) or 0
    if position > seen:
        raise ArgumentError(f"at={position}, but the buffer has seen only {seen} samples: {position - seen} between would be missing")
    return min(n, seen - position)


def _rows_still_holding(store: WritableStore, rows: Ints, positions: object) -> tuple[Ints, Ints]:
    """Return each row once, and where its last value stands. positions: what it must still hold."""
    samples = np.arange(rows.shape[0])
    if positions is not None:
        same = store.positions_of(rows) == integers(positions, rows.shape[0], "positions")
        rows, samples = rows[same], samples[same]
    _, last = np.unique(rows[::-1], return_index=True)
    order = np.sort(rows.shape[0] - 1 - last)
    return rows[order], samples[order]


def _except_rows(update: MetadataUpdate, *gone: Ints) -> MetadataUpdate | None:
    """What is left of an update when these rows get other samples, or none."""
    stays = ~np.isin(update.rows, np.concatenate(gone))
    if stays.all():
        return update
    sources = {f: (data, samples[stays]) for f, (data, samples) in update.sources.items()}
    return MetadataUpdate(update.rows[stays], sources) if stays.any() else None
