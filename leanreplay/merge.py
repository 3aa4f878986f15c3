"""Exact union of buffers of different streams: the result holds what one buffer over all the
streams would hold.

That works because keys are functions of (seed, position): the largest of the union are the largest
of what the parts kept. Where that is not so (the order in which all streams arrived would matter),
a kind is refused.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from .arguments import as_path, integer
from .arrays import Ints
from .buffers.base import KINDS, DataBuffer
from .buffers.parameters import MERGED
from .buffers.registry import unknown
from .errors import ArgumentError, CapacityWarning, CorruptionError, LeanReplayError, MismatchError, ModeError, RecoveryError
from .kernels import merge as kernel
from .keys import MAX_STREAM, STREAM_BITS
from .policies.append import AppendPolicy
from .policies.base import Policy
from .policies.union import Union
from .samples.batch import flat
from .storage import locks, system
from .storage.layout import Layout
from .storage.opening import create_file
from .storage.reader import Reader
from .storage.store import Change
from .storage.writer import Writer

_CHUNK = 1 << 16  # entries of an index looked at in one go
_PIECE = 4 << 20  # bytes that are verified in one go
_ROW_BITS = 40  # a place is the number of its input << 40 | its row


@dataclass
class _Input:
    """A buffer to be merged."""

    name: str
    store: Reader | Writer
    sequence: int = field(init=False)

    def __post_init__(self) -> None:
        self.sequence = self.store.sequence

    @property
    def size(self) -> int:
        return self.store.size

    @property
    def state(self) -> list[int]:
        return self.store.policy

    @property
    def log(self) -> Ints:
        return self.store.policy_log()

    @property
    def table(self) -> Layout:
        return self.store.layout

    @property
    def streams(self) -> set[int]:
        """Streams whose samples went in. That of a merged buffer itself counts from its first
        sample on."""
        params, merged = self.table.params, self.table.params.get("merged")
        own = {self.table.stream} if merged is None or self.store.seen > merged else set()
        return own | set(params.get("streams") or [])

    @property
    def params(self) -> dict[str, Any]:
        return {k: v for k, v in self.table.params.items() if k not in [p.name for p in MERGED]}

    def changed(self) -> bool:
        """Whether another process has written to it, or is just doing so."""
        if isinstance(self.store, Writer):
            return False  # by this process, which waits for us
        self.store.refresh()
        return self.store.sequence != self.sequence or self.store.pending()

    def verify(self) -> None:
        """Raise CorruptionError if the index cannot be trusted: a wrong position would silently
        choose another sample.

        Checksums of position and group are those of the fields too, so the smallest field of all
        rows is read.
        """
        self.store.distrust()
        self.store.verify_index()
        sizes = [f.nbytes for f in self.table.schema.fields]
        smallest = int(np.argmin(sizes))
        step = max(1, _PIECE // sizes[smallest])
        for rows, _, _ in self.chunks():
            for start in range(0, rows.shape[0], step):
                self.store.read(rows[start : start + step], smallest)

    def chunks(self) -> Iterator[tuple[Ints, Ints, Ints]]:
        """(rows, positions, groups) of all live rows, in copies of bounded size."""
        for start in range(0, self.store.high, _CHUNK):
            positions, groups = (a[start : start + _CHUNK] for a in self.store.index())
            live = np.flatnonzero(positions >= 0)
            yield live + start, positions[live], groups[live]


def merge(
    paths: Iterable[str | os.PathLike[str] | DataBuffer],
    path: str | os.PathLike[str] | None = None,
    *,
    mode: str = "x",
    max_size: int | None = None,
    stream: int | None = None,
    lock: bool = True,
) -> DataBuffer:
    """One buffer that holds exactly the samples that one buffer over all the inputs' streams would
    hold; open, of the inputs' class.

    Inputs are reservoirs, weighted reservoirs, or class- or experience-balanced buffers (without
    `borrow`), all of one kind, schema, seed and parameters, and of different streams
    (`stream=rank`). Inputs are not changed. Rows stand in the order of stream positions.

    Parameters
    ----------
    paths: files or open buffers, at least one, in any order.
    path: the new file, which appears whole or not at all; None: in shared memory.
    mode: "x" refuse an existing file, "w" replace it.
    max_size: rows of the result; None: those of the smallest input. More than an input had that
        dropped samples cannot be filled (the capacity rule), which a CapacityWarning says: the
        result is then a sample of fewer rows.
    stream: number of the stream that the result is fed with afterwards; None: the smallest that is
        not among the inputs'.
    lock: as for a buffer, of the result.

    `seen` of the result is the sum. Which streams went in is kept in the file, so that it can be
    merged again.

    Raises MismatchError, naming the files and why, for buffers that do not fit together or cannot
    be merged at all; ArgumentError for no input, one given twice, or one that is the output;
    RecoveryError for one that a killed writer left; CorruptionError for damaged rows (all that are
    copied are verified); ModeError for one that is written to meanwhile. Costs a pass over the
    index and the smallest field of the inputs, and a copy of what stays; 24 bytes of memory for
    each row of the result.

    >>> import leanreplay, numpy as np
    >>> parts = []
    >>> for rank in range(4):
    ...     parts.append(leanreplay.ReservoirBuffer(100, seed=7, stream=rank))
    ...     parts[rank].add(np.arange(1000) + 1000 * rank)
    >>> merged = leanreplay.merge(parts)
    >>> merged.seen, len(merged), merged.stream
    (4000, 100, 4)
    """
    if mode not in ("x", "w"):
        raise ArgumentError(f"merge makes a new file: mode is 'x' or 'w', got {mode!r}")
    if isinstance(paths, (str, bytes, os.PathLike, DataBuffer)) or not isinstance(paths, Iterable):
        raise ArgumentError(f"merge takes a list of paths or buffers, got {paths!r:.200}")
    given = list(paths)
    if not given:
        raise ArgumentError("merge needs at least one buffer, got none")
    with contextlib.ExitStack() as stack:
        # In one order everywhere: two merges of the same open buffers must not wait for each other.
        for buffer in sorted((b for b in given if isinstance(b, DataBuffer)), key=lambda b: id(b.lock)):
            stack.enter_context(buffer.lock)
        inputs = [_input(one, number, stack) for number, one in enumerate(given)]
        _check_places(inputs, path)
        kind = _check_fit(inputs)
        size = integer("max_size", max_size, 1, 2**40) or min(i.table.max_size for i in inputs)
        number = _free_stream(inputs, stream)
        table = inputs[0].table
        params = {k: v for k, v in inputs[0].params.items() if v is not None}
        made = kind(size, path, seed=table.seed, stream=number, mode=mode, lock=lock, **params)
        try:
            _fill(made, inputs, size, number)
        except BaseException:
            made.close()
            raise
        return made


def _input(given: Any, number: int, stack: contextlib.ExitStack) -> _Input:
    """Open one input, and see that its index is sound."""
    if isinstance(given, DataBuffer):
        name = given.path or f"input {number} (in memory)"
        if not given.sized:
            raise _refused([name], given.kind, AppendPolicy)
        current = given.current.reading()
        if current.schema is None:
            raise ArgumentError(f"{name} is empty: it has no schema before its first batch; leave it out")
        store = cast("Reader | Writer", current)
    else:
        name = as_path(given, f"input {number}")
        if os.path.isdir(name):
            raise _refused([name], "InfiniteBuffer", AppendPolicy)
        store = Reader.open(os.path.realpath(name), name=os.path.abspath(name))
        stack.callback(store.close)
    waiting = locks.Patience(store.mapping.guarded)
    while isinstance(store, Reader) and store.pending():
        if waiting.over():
            raise RecoveryError(f"{name}: a commit was cut off; open it for writing once (leanreplay.open(path, 'r+')), to undo it")
        time.sleep(0.001)
        store.refresh()
    found = _Input(name, store)
    with _unchanged([found]):
        found.verify()
    return found


@contextlib.contextmanager
def _unchanged(inputs: Sequence[_Input]) -> Iterator[None]:
    """Say so if one of the inputs was written to, also where that is why something else went
    wrong."""
    failure = None
    try:
        yield
    except LeanReplayError as error:
        failure = error
    for one in inputs:
        if one.changed():
            raise ModeError(f"{one.name} was written to while it was being merged; close its writer first") from failure
    if failure is not None:
        raise failure


def _check_places(inputs: Sequence[_Input], path: Any) -> None:
    """Raise ArgumentError for an input given twice, or one that is the output."""
    output = None
    if path is not None:
        with contextlib.suppress(OSError):
            output = os.stat(as_path(path))
    seen: list[tuple[os.stat_result, str]] = []
    for one in inputs:
        with system.storage_errors(f"looking at {one.name}"), one.store.mapping.file.descriptor() as fd:
            status = os.fstat(fd)
        if output is not None and os.path.samestat(output, status):
            raise ArgumentError(f"{one.name} is the output and an input; merge into another file, then rename it")
        for other, name in seen:
            if os.path.samestat(other, status):
                raise ArgumentError(f"the same buffer is given twice: {name} and {one.name}")
        seen.append((status, one.name))


def _refused(names: Sequence[str], kind: str, policy: type[Policy]) -> MismatchError:
    return MismatchError(f"{' and '.join(names[:2])}: a {kind} cannot be merged: {policy.no_union}")


def _check_fit(inputs: Sequence[_Input]) -> type[DataBuffer]:
    """The class of all inputs. Raises MismatchError if they have no common one, or differ in what
    must be the same."""
    first = inputs[0]
    for other in inputs[1:]:
        pairs = [("kind", first.table.kind, other.table.kind), ("schema", first.table.schema, other.table.schema)]
        pairs.append(("seed", first.table.seed, other.table.seed))
        names = sorted({*first.params, *other.params})
        pairs += [(name, first.params.get(name), other.params.get(name)) for name in names]
        differing = [f"{name} {a} and {b}" for name, a, b in pairs if a != b]
        if differing:
            raise MismatchError(f"{first.name} and {other.name} cannot be merged: they differ in {'; '.join(differing)}")
    names = [i.name for i in inputs]
    kind = first.table.kind
    if kind not in KINDS:
        raise unknown(names[0], kind)
    policy = KINDS[kind].policy_class
    if policy.no_union:
        raise _refused(names, kind, policy)
    holder: dict[int, str] = {}
    for one in inputs:
        for number in sorted(one.streams):
            if number in holder:
                raise MismatchError(
                    f"{holder[number]} and {one.name} cannot be merged: both hold samples of stream {number}; "
                    "give each buffer its own, for instance stream=rank"
                )
            holder[number] = one.name
    return KINDS[kind]


def _free_stream(inputs: Sequence[_Input], given: int | None) -> int:
    """The result's own stream."""
    used = set().union(*(i.streams for i in inputs))
    number = integer("stream", given, 0, MAX_STREAM)
    if number is None:
        number = next((n for n in range(MAX_STREAM + 1) if n not in used), None)
        if number is None:
            raise ArgumentError(f"all {MAX_STREAM + 1} stream numbers are in use")
    elif number in used:
        raise ArgumentError(f"stream={number} is that of an input; the result is fed with another one, or None for the next that is free")
    return number


def _fill(made: DataBuffer, inputs: Sequence[_Input], size: int, stream: int) -> None:
    """Make the file of a new buffer, from what its inputs hold."""
    first = inputs[0].table
    seen = sum(i.store.seen for i in inputs)
    if seen >= 2**STREAM_BITS:
        raise ArgumentError(f"the inputs have seen {seen} samples together, but a buffer counts at most 2**{STREAM_BITS}")
    with _unchanged(inputs):
        union = type(made).policy_class(size, first.seed, first.params).union(inputs)
        positions, places = _choose(inputs, union)
    if union.size_limit < size:
        warnings.warn(
            f"merge into {size} rows: the inputs have already dropped samples, and the result will hold no more than {union.size_limit}, "
            "because a larger sample would no longer be uniform; give a smaller max_size",
            CapacityWarning,
            stacklevel=3,
        )
    params = first.params | {"streams": sorted(set().union(*(i.streams for i in inputs))), "merged": seen}
    table, pieces = made.parameters.plan_file(first.schema, size, params, 2 * union.log.shape[0])

    def fill(new: Writer) -> None:
        with _unchanged(inputs):
            for change in _changes(inputs, union, seen, positions, places, new.max_rows):
                new.commit(change)

    here, replace = made.location, made.mode == "w"
    with here.replacing() if replace else contextlib.nullcontext():
        made.current.store = create_file(here.file, table, pieces, here.options, replace=replace, fill=fill)
    made.parameters.forget()
    made.parameters.adopt(table, None, made.path)


def _changes(inputs: Sequence[_Input], union: Union, seen: int, positions: Ints, places: Ints, max_rows: int) -> Iterator[Change]:
    """Yield what fills a new file with the samples of these places."""
    for start in range(0, places.shape[0], max_rows):
        part = slice(start, start + max_rows)
        arrays, index = _read(inputs, places[part])
        if (index[0] != positions[part]).any():
            raise ModeError("an input changed while it was being merged; close its writer first")
        order = np.arange(index.shape[1])
        yield Change(seen, union.state, start + order, index[0], index[1], [(flat(a), order) for a in arrays])
    if not places.shape[0] or union.log.shape[0]:
        yield Change(seen, union.state, log=union.log)


def _choose(inputs: Sequence[_Input], union: Union) -> tuple[Ints, Ints]:
    """Positions of the samples that stay, ascending, and their places."""
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(union.caps)])
    counts = np.zeros(union.caps.shape[0], np.int64)
    best = np.empty(starts[-1], np.uint64)
    held, places = np.empty(starts[-1], np.int64), np.empty(starts[-1], np.int64)
    for number, one in enumerate(inputs):
        for rows, positions, groups in one.chunks():
            heap = np.zeros(rows.shape[0], np.int64) if union.ids is None else np.searchsorted(union.ids, groups)
            kernel.offer(
                union.keys(positions, groups), positions, heap, rows, number << _ROW_BITS, starts, counts, best, held, places
            )  # fmt: skip
    if (counts != union.caps).any():
        raise CorruptionError("the rows of the inputs do not add up to their headers; restore them from copies")
    kernel.sort_places(held, places)
    twice = np.flatnonzero(held[1:] == held[:-1])
    if twice.shape[0]:
        i = int(twice[0])
        names = [inputs[int(p) >> _ROW_BITS].name for p in places[i : i + 2]]
        raise MismatchError(
            f"{names[0]} and {names[1]} cannot be merged: both hold sample {held[i] % 2**STREAM_BITS} of stream {held[i] >> STREAM_BITS}"
        )
    return held, places


def _read(inputs: Sequence[_Input], places: Ints) -> tuple[list[np.ndarray[Any, Any]], Ints]:
    """The rows at these places, as `Store.read` gives them."""
    sources, rows = places >> _ROW_BITS, places & (2**_ROW_BITS - 1)
    touched = np.unique(sources)
    if touched.shape[0] == 1:
        return inputs[int(touched[0])].store.read(rows)
    arrays = [np.empty((rows.shape[0], *f.shape), f.dtype) for f in inputs[0].table.schema.fields]
    index = np.empty((2, rows.shape[0]), np.int64)
    for source in touched.tolist():
        where = np.flatnonzero(sources == source)
        some, index[:, where] = inputs[source].store.read(rows[where])
        for array, values in zip(arrays, some, strict=True):
            array[where] = values
    return arrays, index
