"""The contract of policies: which row, if any, each incoming sample takes. A policy sees positions
and groups, never the samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from ..arrays import NO_LOG, NO_ROWS, POLICY_WORDS, Ints
from ..errors import ArgumentError, CorruptionError
from .union import Holder, Union

Params = dict[str, Any]  # values of JSON, by name

_NO_UNION = "its policy does not say which samples one buffer over all streams would hold"


class Parameter(NamedTuple):
    """A parameter of a policy, as it stands in the file.

    default: what a new buffer takes where none was given. allowed: whether a file may hold this
        value; a missing one counts as None. Where None is allowed, the policy must take it:
        `params.get(name)`.
    """

    name: str
    default: bool | int | str | None
    allowed: Callable[[object], bool]


def optional_int(low: int, high: int) -> Callable[[object], bool]:
    """Return the check of a parameter that is an integer from `low` to `high`, or missing."""
    return lambda value: value is None or (type(value) is int and low <= value <= high)


class Plan:
    """Where the next samples of a stream go: what `Policy.plan` returns.

    rows: (k,) int64. rows[i] is the row that the i-th sample takes, or -1 to reject it. k samples
        are planned.
    freed: (f,) int64, rows that are live now and free afterwards. Only a policy with a log may free
        rows.
    log: (e, 2) int64, the entries to append to the policy's log.
    """

    __slots__ = ("freed", "log", "rows")

    def __init__(self, rows: Ints, freed: Ints = NO_ROWS, log: Ints = NO_LOG) -> None:
        self.rows, self.freed, self.log = rows, freed, log


LOG_TOO_SHORT = Plan(NO_ROWS)  # nothing is planned: the file needs a longer log first, then `plan` is called again


class Policy:
    """Base class of policies. Override `load` and `plan`, and `keep` if the buffer is to be
    resized.

    A policy is a deterministic function of (seed, stream). Its plans must not depend on how the
    stream is cut into batches. `load` must bring it to the same state from the index alone, because
    the index is all that a killed process leaves behind.

    capacity: rows of the buffer. seed: the buffer's seed. needs_groups: whether `plan` looks at the
        groups.
    state: 8 non-negative ints, for what cannot be derived from the index. They are committed with
    every plan and are there again when `load` is called.
    parameters: what a buffer of this policy is made with, besides its size and seed; the file holds
        their values, `params`.
    no_union: why buffers of this policy cannot be merged; "" if they can, by `union`. A subclass
        says it anew, because what holds for its base need not hold for it.

    A policy whose state grows keeps a log: it overrides `log_slots`, and each plan says which
    entries to append. `log`, (entries, 2) int64, holds them when `load` is called; `slots` is the
    number of entries that the file can hold. A policy with a log may also free rows. It has
    `scratch`, int32 per row, all 0, for `plan` to use and to leave all 0 again.

    A policy that keeps the first `capacity` samples and rejects all others:

    >>> class First(Policy):
    ...     def load(self, positions, groups):
    ...         self.size = len(positions)
    ...     def plan(self, start, groups, max_rows):
    ...         rows = self.size + np.arange(min(len(groups), max_rows))
    ...         self.size = min(self.size + len(rows), self.capacity)
    ...         return Plan(np.where(rows < self.capacity, rows, -1))
    """

    needs_groups: ClassVar[bool] = False
    parameters: ClassVar[tuple[Parameter, ...]] = ()
    no_union: ClassVar[str] = _NO_UNION

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.no_union = vars(cls).get("no_union", _NO_UNION)

    def __init__(self, capacity: int, seed: int, params: Params) -> None:
        self.capacity, self.seed, self.params = capacity, seed, params
        self.state: list[int] = [0] * POLICY_WORDS
        self.log: Ints = NO_LOG
        self.slots = 0
        self.scratch: npt.NDArray[np.int32] = np.zeros(0, np.int32)

    @classmethod
    def settle(cls, given: Params, max_size: int) -> Params:
        """Return the parameters of a new buffer: defaults where None was given. Raises
        ArgumentError for a bad combination."""
        return given | {p.name: p.default for p in cls.parameters if given.get(p.name) is None}

    @classmethod
    def params_problem(cls, params: Params, max_size: int) -> str | None:
        """Return what is impossible about the parameters in a file, each of which is allowed by
        itself; None if nothing is."""
        return None

    @staticmethod
    def log_slots(capacity: int) -> int:
        """Return how many entries the log of a new file of this capacity can hold; 0 for a policy
        without a log."""
        return 0

    def check_groups(self, groups: Ints) -> None:
        """Raise ArgumentError if a batch of these groups must be refused as a whole. Called before
        its first plan."""

    def load(self, positions: Ints, groups: Ints) -> None:
        """Derive what `plan` needs from the index: (rows in use so far,) int64 each, position -1
        where a row is free. Positions are as in `plan`.

        Called before the first plan, and again after anything that interrupted a commit. Keep no
        reference to the arrays.
        """
        raise NotImplementedError

    def plan(self, start: int, groups: Ints, max_rows: int) -> Plan:
        """Say where the samples of positions start, start + 1, ... go. groups: (n,) int64, one for
        each sample on offer.

        A position has the stream's number in its bits from 48 on: `start % 2**48` counts samples.
        Plan at least one sample, and no more than take `max_rows` rows; the rest is offered again.
        Two samples may take the same row: the later one stays. Return LOG_TOO_SHORT, with nothing
        planned, if the log cannot hold the new entries.
        """
        raise NotImplementedError

    def retag(self, rows: Ints, groups: Ints) -> None:
        """Note that `rows` have other groups now, (k,) int64 both. Only of buffers whose groups may
        change: those with scores."""

    def keep(self, capacity: int, positions: Ints, groups: Ints) -> Ints:
        """For `resize`: return the rows to keep, at most `capacity`, in the order that they get
        their new rows in. Updates `state`."""
        raise NotImplementedError(f"{type(self).__name__} cannot be resized: its policy does not say which rows to keep")

    def union(self, holders: Sequence[Holder]) -> Union:
        """For `merge` into a buffer of this policy: say which samples stay of buffers of different
        streams. Called only where `no_union` is "".
        """
        raise NotImplementedError

    def size_limit(self, capacity: int) -> int:
        """Return how many rows a buffer of this capacity can come to hold, given the present
        state."""
        return capacity

    def capacity_warning(self, capacity: int) -> str | None:
        """Return what the user who resizes to this capacity should know of the capacity rule; None
        if the rule changes nothing."""
        limit = self.size_limit(capacity)
        if limit >= capacity:
            return None
        return (
            f"this buffer has already dropped samples at {limit} rows and will hold no more than that, because a larger sample would no "
            "longer be uniform; start a new buffer to use more rows"
        )


def check_plan(policy: Policy, plan: Plan) -> None:
    """Raise ArgumentError for a plan that no kernel must see, because kernels believe what they
    get."""
    name = type(policy).__name__
    if not isinstance(plan, Plan):
        raise ArgumentError(f"{name}.plan returned {plan!r:.200}: it must return a leanreplay.Plan, which holds the rows of the samples")
    if not _are_rows(plan.rows):
        raise ArgumentError(f"{name}.plan set rows to {plan.rows!r:.200}: it must be an (n,) int64 array of rows, contiguous and writeable")
    if plan.freed is not NO_ROWS and not _are_rows(plan.freed):
        raise ArgumentError(f"{name}.plan set freed to {plan.freed!r:.200}: it must be an (n,) int64 array of rows")
    if plan.freed.shape[0] and not policy.slots:  # the journal can hold freed rows only where there is a log
        raise ArgumentError(
            f"{name} frees rows, but its log_slots are 0, and so the file has no room to undo that; give it one slot or more"
        )


def _are_rows(rows: object) -> bool:
    return isinstance(rows, np.ndarray) and rows.ndim == 1 and rows.dtype == np.int64 and rows.flags.carray


def check_dense(live: int, positions: Ints) -> None:
    """Raise CorruptionError for free rows among those in use: a reservoir fills rows in order, and
    would take one that is live."""
    if live != positions.shape[0]:
        raise CorruptionError(
            f"{positions.shape[0] - live} free rows among those in use, which no reservoir leaves; restore the file from a copy"
        )
