"""Writers of grouped buffers that are killed: what they feed, and what must be there."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from grouped_oracle import BORROW, LARGEST, QUOTA, Grouped
from killing import Steps, image, place
from paths import in_memory
from storage_kernels import kernel

from leanreplay import (
    ClassBalancedBuffer,
    ClassBalancingReservoirBuffer,
)

ROWS = 24
BATCH = 20
TOTAL = 6
KINDS: dict[str, Callable[..., Any]] = {
    "class": lambda path, **o: ClassBalancedBuffer(ROWS, path, seed=3, **o),
    "fixed": lambda path, **o: ClassBalancedBuffer(ROWS, path, seed=3, adaptive_size=False, total_num_classes=TOTAL, **o),
    "borrow": lambda path, **o: ClassBalancedBuffer(ROWS, path, seed=3, borrow=True, **o),
    "cbrs": lambda path, **o: ClassBalancingReservoirBuffer(ROWS, path, seed=3, **o),
}
MODES = {"class": QUOTA, "fixed": QUOTA, "borrow": BORROW, "cbrs": LARGEST}


def label(kind: str, p: int) -> int:
    """Groups come in as the square root of the position, most samples are of old ones; ids of any sign and size."""
    newest = min(int((p + 1) ** 0.5), TOTAL - 1 if kind == "fixed" else 10**9)
    rank = newest if p % 5 == 0 else p * 7919 % 104729 % (newest + 1)
    return rank * (-1) ** rank * (2**40 if rank % 3 == 0 else 1)


def stream(kind: str, start: int, stop: int) -> dict[str, Any]:
    """What `add` gets for these positions: bytes of an odd number, groups, and metadata."""
    p = np.arange(start, stop)
    x, z = samples(p)
    return {"batch": x, "group": np.array([label(kind, int(i)) for i in p], np.int64), "metadata": {"z": z}}


def samples(p: Any) -> tuple[Any, Any]:
    x = ((p[:, None] * 40503 + np.arange(301) * 2654435761) >> 9).astype(np.uint8)
    return x, np.stack([p, -p, p % 17], 1).astype(np.float32)


def feed(kind: str, buffer: Any, start: int, stop: int, at: bool = False) -> None:
    for here in range(start, stop, BATCH):
        buffer.add(**stream(kind, here, min(stop, here + BATCH)), at=here if at else None)


@functools.cache
def models(kind: str) -> list[Any]:
    """What the model holds after each number of samples: rows, and the rows of each group. The list grows when asked."""
    return [Grouped(ROWS, 3, MODES[kind], TOTAL if kind == "fixed" else 0), []]


def wanted(kind: str, seen: int) -> tuple[dict[int, int], dict[int, list[int]]]:
    model, found = models(kind)
    while len(found) <= seen:
        found.append((dict(model.rows), {g: model.members(g) for g in sorted(model.streams)}))
        model.add([label(kind, model.seen)])
    return found[seen]


@functools.cache
def expected(kind: str, seen: int) -> list[Any]:
    """The bytes of a buffer that was fed the first `seen` samples in one piece, without interruption."""
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        path = os.path.join(folder, "b.h5")
        with KINDS[kind](path) as buffer:
            buffer.add(**stream(kind, 0, seen))
        return image(path)


def assert_prefix(kind: str, buffer: Any, note: str, among: Any = None) -> None:
    """The buffer is clean and holds exactly what its `seen` says: the model's rows and groups, the bytes of one add."""
    assert [str(p) for p in buffer.check()] == [], note
    seen = buffer.seen
    note = f"{kind}, {note}, seen={seen}"
    assert among is None or seen in among, note
    rows, groups = wanted(kind, seen)
    assert len(buffer) == len(rows), note
    assert buffer.group_sizes() == {g: len(r) for g, r in groups.items()}, note
    assert {g: buffer.group_rows(g).tolist() for g in buffer.groups} == groups, note
    if seen == 0:
        return
    assert dict(zip(buffer.get_metadata("idx").tolist(), buffer.get_metadata("position").tolist(), strict=True)) == rows, note
    x, meta = buffer.get(buffer.get_metadata("idx"))
    right = samples(meta["position"])
    assert (x == right[0]).all(), note
    assert (meta["z"] == right[1]).all(), note
    assert image(place(buffer)) == expected(kind, seen), note


def finish(kind: str, buffer: Any, note: str, end: int = 220) -> None:
    """Feed the rest: it ends as an uninterrupted run does."""
    feed(kind, buffer, buffer.seen, end)
    assert_prefix(kind, buffer, f"{note}, finished", [end])


class AllSteps(Steps):
    """Also within the kernels that free rows."""

    def install(self) -> None:
        for name, target in (("save_freed", 0), ("restore_freed", -1)):
            setattr(kernel, name, self._kernel(getattr(kernel, name), target))
        super().install()
