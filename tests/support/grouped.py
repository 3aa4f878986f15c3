"""Grouped buffers and their models."""

from __future__ import annotations

import contextlib
import itertools
import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from grouped_oracle import BORROW, LARGEST, QUOTA, Grouped

from leanreplay import (
    BalancedBuffer,
    CapacityWarning,
    ClassBalancedBuffer,
    ClassBalancingReservoirBuffer,
)
from leanreplay.buffers import feeding
from leanreplay.storage import (
    create,
)

# kind -> (mode, whether quotas are fixed)
KINDS = {
    "adaptive": (QUOTA, False),
    "fixed": (QUOTA, True),
    "borrow": (BORROW, False),
    "fixed borrow": (BORROW, True),
    "cbrs": (LARGEST, False),
}


def made(kind: str, size: int | None, path: str | None = None, total: int = 0, **options: Any) -> BalancedBuffer:
    """A buffer of a kind."""
    mode, fixed = KINDS[kind]
    if mode == LARGEST:
        return ClassBalancingReservoirBuffer(size, path, **options)
    if fixed and size is not None:
        options |= {"adaptive_size": False, "total_num_classes": total}
    return ClassBalancedBuffer(size, path, borrow=None if size is None else mode == BORROW, **options)


def model(kind: str, size: int, seed: int, total: int = 0, **options: Any) -> Grouped:
    mode, fixed = KINDS[kind]
    return Grouped(size, seed, mode, total if fixed else 0, **options)


def samples(start: int, stop: int) -> Any:
    """What is fed at these positions: bytes of an odd number."""
    return ((np.arange(start, stop)[:, None] * 40503 + np.arange(13) * 2654435761) >> 9).astype(np.uint8)


def assert_agree(buffer: BalancedBuffer, wanted: Grouped, note: str = "") -> None:
    """The buffer is the model: rows, positions, samples, groups, and all it says of them."""
    assert [str(p) for p in buffer.check()] == [], note
    assert (buffer.seen, len(buffer), buffer.max_size) == (wanted.seen, len(wanted.rows), wanted.size), note
    sizes = buffer.group_sizes()
    assert list(sizes.items()) == sorted(wanted.sizes().items()), note
    if wanted.seen == 0:
        return
    assert buffer.current.store.high == max(wanted.rows, default=-1) + 1, note  # draws depend on it, and must not on how batches were cut
    rows, positions = buffer.get_metadata("idx").tolist(), buffer.get_metadata("position").tolist()
    assert dict(zip(rows, positions, strict=True)) == wanted.rows, note
    x, meta = buffer.get(rows)
    assert (x == np.concatenate([samples(p - wanted.first, p - wanted.first + 1) for p in positions] or [x])).all(), note
    assert meta["position"].tolist() == positions, note
    assert [buffer.group_rows(g).tolist() for g in wanted.streams] == [wanted.members(g) for g in wanted.streams], note


def tail(rng: random.Random, groups: int) -> Iterator[int]:
    """Labels with a long tail."""
    while True:
        yield min(groups - 1, int(rng.paretovariate(0.7)) - 1)


def blocks(rng: random.Random, groups: int) -> Iterator[int]:
    """One group after the other, some of them again."""
    while True:
        group = rng.randrange(groups)
        yield from [group] * rng.choice([1, 4, 15])


def growing(rng: random.Random, groups: int) -> Iterator[int]:
    """New groups all the time, among samples of those that are there."""
    for i in itertools.count():
        yield min(i // 3, groups - 1) if i % 3 == 0 else rng.randrange(min(i // 3 + 1, groups))


def ids(rng: random.Random, groups: int) -> list[int]:
    """Ids that groups may have: any integers."""
    wild = [-(2**63), 2**63 - 1, 2**40, -1, 0, -(2**40) + 7]
    return rng.choice([list(range(groups)), (wild + [rng.randrange(-(2**62), 2**62) for _ in range(groups)])[:groups]])


@contextlib.contextmanager
def tiny(journal: int, chunk: int = 1 << 16) -> Iterator[None]:
    """Small journals and plans, so that one add is many commits."""
    before = create.JOURNAL_BYTES, feeding.MAX_PLANNED
    create.JOURNAL_BYTES, feeding.MAX_PLANNED = journal, chunk
    try:
        yield
    finally:
        create.JOURNAL_BYTES, feeding.MAX_PLANNED = before


def quiet(buffer: BalancedBuffer, size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CapacityWarning)
        buffer.resize(size)


class Dataset:
    def __init__(self, x: Any, targets: Sequence[int] | None) -> None:
        self.x = x
        if targets is not None:
            self.targets = targets

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i]


def image(buffer: Any) -> list[Any]:
    """All live bytes: state, row numbers, fields, index, checksums, log."""
    store = buffer.current.reading()
    rows = np.flatnonzero(store.index()[0] >= 0)
    found = [store.state_name(), buffer.seen, rows.tolist(), store.policy_log().tolist()]
    return found + [store.mapping.mem[at : at + n * store.layout.max_size].reshape(-1, n)[rows].tobytes() for at, n in store.layout.columns]
