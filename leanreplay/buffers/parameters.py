"""What a buffer is made with: size, seed, stream and parameters of the policy; given, or found."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import NamedTuple

from ..arguments import integer
from ..errors import ArgumentError, MismatchError
from ..keys import MAX_STREAM, STREAM_BITS
from ..policies.base import Parameter, Params, Policy, optional_int
from ..samples.schema import Schema
from ..storage.create import plan_file
from ..storage.layout import Layout

Pieces = list[tuple[int, bytes]]


def _is_streams(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(type(n) is int and 0 <= n <= MAX_STREAM for n in value))


# What `merge` adds to the parameters in a file: the streams that went in, and `seen` when they did.
MERGED = (Parameter("streams", None, _is_streams), Parameter("merged", None, optional_int(0, 2**STREAM_BITS)))


class Kind(NamedTuple):
    """What a class of buffers declares.

    whole_journal: one commit may overwrite all rows, so the journal is as large as the data.
    sized: the buffer has a `max_size`. Without one each part has `rows_per_part` rows.
    stored_schema: makes of the schema of samples the one of the file.
    """

    name: str
    policy_class: type[Policy]
    whole_journal: bool
    sized: bool
    stored_schema: Callable[[Schema], Schema]

    def table_problem(self, table: Layout) -> str | None:
        """Return what is impossible about the table of a file: kernels believe its numbers."""
        rules = {p.name: p.allowed for p in (*self.policy_class.parameters, *(MERGED if self.sized else ()))}
        wrong = {k: v for k, v in table.params.items() if k not in rules} or {
            k: table.params.get(k) for k, allowed in rules.items() if not allowed(table.params.get(k))
        }
        if wrong:
            return f"a {self.name} has no parameters {wrong!r:.200}"
        if self.whole_journal and table.journal_rows < table.max_size:
            return f"a journal of {table.journal_rows} rows, but a commit may change all {table.max_size}"
        problem = self.policy_class.params_problem(table.params, table.max_size)
        if problem is None and self.policy_class.log_slots(table.max_size) and not table.log[1]:
            return f"a {self.name} keeps a log, but there is none"
        return problem


class Parameters:
    """The parameters of one buffer. Each is None until it was given, settled for a new buffer, or
    adopted from the file.

    own: those of the policy, by name. identity: hex digits by which the buffer's files and states
        are known.
    """

    def __init__(self, kind: Kind, max_size: int | None, seed: int | None, stream: int | None, own: Params) -> None:
        self.kind, self.own = kind, own
        self.given_size = integer("max_size", max_size, 1, 2**40)
        self.given_seed = integer("seed", seed, -(2**127), 2**127 - 1)
        self.given_stream = integer("stream", stream, 0, MAX_STREAM)
        self.max_size = 0 if kind.sized else None
        self.identity = uuid.uuid4().hex

    @property
    def seed(self) -> int:
        """The seed of all random choices."""
        return self.given_seed or 0

    @property
    def stream(self) -> int:
        """The number of the stream that is fed."""
        return self.given_stream or 0

    @property
    def capacity(self) -> int:
        """Rows that the policy plans for: of the buffer, or of one part."""
        return self.max_size if self.max_size is not None else int(self.own["rows_per_part"])

    def settle(self) -> None:
        """For a new buffer: give what is None its value. ArgumentError for a bad combination."""
        if self.kind.sized and self.given_size is None:
            raise ArgumentError("a new buffer needs max_size")
        self.max_size, self.given_seed, self.given_stream = self.given_size, self.seed, self.stream
        self.own = self.kind.policy_class.settle(self.own, self.given_size or 0)

    def resize_empty(self, max_size: int) -> None:
        """For a buffer without a file: take another size. ArgumentError for a bad combination."""
        self.own = self.kind.policy_class.settle(self.own, max_size)
        self.max_size = self.given_size = max_size

    def forget(self) -> None:
        """Count all as not given, for `adopt` to take them from a file."""
        self.given_size = self.given_seed = self.given_stream = None
        self.own = {}

    def _in(self, table: Layout) -> Params:
        """What the table of a file says."""
        return {"max_size": self._size_in(table), "seed": table.seed, "stream": table.stream, **table.params}

    def _size_in(self, table: Layout) -> int | None:
        return table.max_size if self.kind.sized else None

    def adopt(self, table: Layout, schema: Schema | None, path: str | None) -> None:
        """Take the parameters of a file. Raises MismatchError where others were given."""
        given = {"max_size": self.given_size, "seed": self.given_seed, "stream": self.given_stream, **self.own}
        found = self._in(table)
        differing = [f"{k}={v!r} (file: {found.get(k)!r})" for k, v in given.items() if v is not None and v != found.get(k)]
        if table.kind != self.kind.name:
            differing.insert(0, f"{self.kind.name} (file: {table.kind})")
        if schema is not None and schema != table.schema:
            differing.append(f"schema={schema} (file: {table.schema})")
        if differing:
            raise MismatchError(f"{path} was created with other parameters: {', '.join(differing)}; leave them out, or use another path")
        self.given_seed, self.given_stream = table.seed, table.stream
        names = {p.name for p in self.kind.policy_class.parameters}
        self.own = {name: value for name, value in table.params.items() if name in names}
        self.own.pop("first", None)  # which differs from part to part
        self.take_size(table)

    def take_size(self, table: Layout) -> None:
        """Take the size and the identity of a file that has replaced another one."""
        self.max_size = self.given_size = self._size_in(table)
        self.identity = table.uuid

    def compare(self, table: Layout, schema: Schema | None, path: str) -> None:
        """Raise MismatchError unless a saved file fits. schema: of the buffer, if it has any."""
        own = {k: v for k, v in self.own.items() if v is not None}
        mine = {"max_size": self.max_size, "seed": self.seed, "stream": self.stream, "kind": self.kind.name}
        found = {**self._in(table), "kind": table.kind}
        if schema is not None:
            mine["schema"], found["schema"] = str(schema), str(table.schema)
        mine |= own
        differing = [f"{k}={found.get(k)!r} (this buffer: {v!r})" for k, v in mine.items() if found.get(k) != v]
        if differing:
            raise MismatchError(f"{path} is a copy of a buffer with {', '.join(differing)}; load it into one created like that")

    def new_policy(self, own: Params | None = None) -> Policy:
        """Make a policy that has seen nothing. own: its parameters, if a file says more."""
        return self.kind.policy_class(self.capacity, self.seed, self.own if own is None else own)

    def plan_file(self, schema: Schema, size: int | None = None, own: Params | None = None, slots: int = 0) -> tuple[Layout, Pieces]:
        """Plan a file for samples of a schema. slots: the least entries that its log can hold."""
        kind, size = self.kind, size or self.capacity
        slots = max(slots, kind.policy_class.log_slots(size))
        own = self.own if own is None else own
        journal_rows = size if kind.whole_journal else None
        return plan_file(kind.name, own, size, self.seed, self.stream, kind.stored_schema(schema), self.identity, slots, journal_rows)
