"""merge: the result holds exactly what one buffer over all the streams would hold, or a refusal says why it cannot.

The oracle is plain Python: keys of all positions of all streams, the largest of each group. Groups and payload of a sample are
functions of its position, so every row can be verified.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import importlib
import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grouped_oracle import keyed

import leanreplay
from leanreplay import (
    ArgumentError,
    CapacityWarning,
    ClassBalancedBuffer,
    ClassBalancingReservoirBuffer,
    CorruptionError,
    ExistsError,
    ExperienceBalancedBuffer,
    FormatError,
    GreedyClassBalancingBuffer,
    InfiniteBuffer,
    LockedError,
    MismatchError,
    MissingError,
    ModeError,
    RecoveryError,
    ReservoirBuffer,
    SlidingWindowBuffer,
    WeightedReservoirBuffer,
    merge,
)
from leanreplay.kernels import merge as kernel
from leanreplay.keys import key_pair
from leanreplay.storage.store import Change

M64 = 2**64 - 1
STREAM = 2**48
SEED = 5


# -- oracle ------------------------------------------------------------------------------------------------------------


def fin(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & M64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & M64
    return x ^ x >> 31


@functools.cache
def key(number: int, purpose: str = "reservoir", seed: int = SEED) -> int:
    k0, k1 = (int(k) for k in key_pair(purpose, seed))
    return fin(fin(number * 0x9E3779B97F4A7C15 + k0 & M64) + k1 & M64)


def label(position: int) -> int:
    """Labels of a long tail, and more of them in later streams; negative and large ones too."""
    return [0, 0, 0, 0, -7, -7, 2**40, 3, *range(10, 15)][position * 7919 % min(13, 7 + 2 * (position // STREAM))]


def weight(position: int) -> float:
    return [1.0, 2.0, 0.0, 2.0**-1060, 2.0**1000, 3.0, 1.0][position * 31 % 7]


def positions(streams: dict[int, int]) -> list[int]:
    """All positions of streams: number -> length."""
    return [s * STREAM + i for s, n in streams.items() for i in range(n)]


def largest(among: Iterable[int], size: int) -> list[int]:
    return sorted(sorted(among, key=key)[-size:] if size else [])


def quotas(groups: Iterable[int], size: int) -> dict[int, int]:
    order = sorted(set(groups), key=lambda g: key(g & M64, "group"))
    return {g: size // len(order) + (i < size % len(order)) for i, g in enumerate(order)}


def expected(kind: str, streams: dict[int, int], size: int, more: Iterable[int] = ()) -> list[int]:
    """Positions that one buffer over all streams, and some more positions, holds, ascending."""
    everything = [*positions(streams), *more]
    if kind == "reservoir":
        return largest(everything, size)
    if kind == "weighted":
        v = {p: (2 * (key(p, "weighted reservoir") >> 12) + 1) / 2**53 for p in everything if weight(p)}
        return sorted(sorted(v, key=lambda p: Fraction(-math.log1p(-v[p])) / Fraction(weight(p)))[:size])
    each: dict[int, list[int]] = {}
    for p in everything:
        each.setdefault(label(p), []).append(p)
    limit = dict.fromkeys(each, size // 12) if kind == "fixed" else quotas(each, size)
    return sorted(p for g, members in each.items() for p in largest(members, limit[g]))


# -- buffers -----------------------------------------------------------------------------------------------------------

KINDS: dict[str, Any] = {
    "reservoir": ReservoirBuffer,
    "weighted": WeightedReservoirBuffer,
    "classes": ClassBalancedBuffer,
    "fixed": functools.partial(ClassBalancedBuffer, adaptive_size=False, total_num_classes=12),
    "experiences": ExperienceBalancedBuffer,
}
every_kind = pytest.mark.parametrize("kind", KINDS)
STREAMS = {0: 90, 1: 7, 2: 200, 3: 41}


def samples(start: int, stop: int) -> Any:
    """Payload of positions start to stop: floats of the position in its stream, bytes of an odd number, the stream."""
    p = np.arange(start, stop)
    return {
        "x": np.repeat((p % STREAM)[:, None], 3, 1).astype(np.float32),
        "b": (p[:, None] * [1, 3, 5] % 251).astype(np.uint8),
        "s": p // STREAM,
    }


def feed(kind: str, buffer: Any, stop: int, batch: int = 40) -> None:
    """Feed the buffer's own stream up to index `stop` of it."""
    start = buffer.seen
    for here in range(start, stop, batch):
        first, last = (buffer.stream * STREAM + i for i in (here, min(stop, here + batch)))
        data, meta = samples(first, last), {"m": np.arange(first, last)}
        if kind == "reservoir":
            buffer.add(data, metadata=meta)
        elif kind == "weighted":
            buffer.add(data, metadata=meta, weights=[weight(p) for p in range(first, last)])
        elif kind == "experiences":
            for p in range(first, last):
                one = {name: a[p - first : p - first + 1] for name, a in data.items()}
                buffer.add(one, metadata={"m": meta["m"][p - first : p - first + 1]}, experience=label(p))
        else:
            buffer.add(data, metadata=meta, group=[label(p) for p in range(first, last)])


def made(kind: str, folder: Any, streams: dict[int, int], size: int = 30, **options: Any) -> list[Any]:
    """A buffer per stream, fed: paths, or in memory the open buffers if `folder` is None."""
    found = []
    for number, n in streams.items():
        path = None if folder is None else os.path.join(folder, f"{kind}{number}.h5")
        buffer = KINDS[kind](size, path, seed=SEED, stream=number, **options)
        feed(kind, buffer, n)
        if path:
            buffer.close()
        found.append(path or buffer)
    return found


def held(buffer: Any) -> list[int]:
    """Positions in row order, every row and the file checked."""
    assert buffer.check() == []
    if not len(buffer):
        return []
    found = buffer.get_metadata("position")
    data, meta = buffer.get(buffer.get_metadata("idx"))
    for p, x, b, s, m in zip(found.tolist(), data["x"], data["b"], data["s"], meta["m"], strict=True):
        assert (x == p % STREAM).all()
        assert (b == samples(p, p + 1)["b"][0]).all()
        assert (s, m) == (p // STREAM, p)
    if isinstance(buffer, WeightedReservoirBuffer):
        assert buffer.get_metadata("weight").tolist() == [weight(p) for p in found.tolist()]
    elif not isinstance(buffer, ReservoirBuffer):
        for g in buffer.group_sizes():
            assert {label(p) for p in buffer.get_metadata("position", buffer.group_rows(g)).tolist()} <= {g}
    return found.tolist()


def full_groups(buffer: Any) -> list[int]:
    log = buffer._store.log().tolist()
    ids = [g for what, g in log if what == 0]
    return sorted(ids[g] for what, g in log if what == 1)


def state(buffer: Any) -> Any:
    """What must be the same whichever way a buffer was made: rows, index, counts, policy words, groups, which of them are full."""
    ids = sorted(g for what, g in buffer._store.log().tolist() if what == 0)
    return held(buffer), buffer.seen, buffer._store.policy, ids, full_groups(buffer)


# -- equal to one buffer -------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("size", [1, 12, 30, 100, 1000])
def test_four_streams(kind: str, size: int, tmp_path: Path) -> None:
    """Row for row, in order of position: what one buffer over all four streams holds. Inputs are not changed."""
    if kind == "fixed" and size < 12:
        pytest.skip("fewer rows than groups")
    parts = made(kind, tmp_path, STREAMS, size)
    before = [Path(p).read_bytes() for p in parts]
    with merge(parts, tmp_path / "all.h5") as buffer:
        assert held(buffer) == expected(kind, STREAMS, size)
        assert buffer.get_metadata("idx").tolist() == list(range(len(buffer)))
        assert (type(buffer), buffer.seen, buffer.stream, buffer.max_size) == (leanreplay.open(parts[0]).__class__, 338, 4, size)
    assert [Path(p).read_bytes() for p in parts] == before


@every_kind
def test_one_policy_that_saw_all(kind: str) -> None:
    """The policy itself, offered all four streams one after the other, holds the same, with the same bounds and groups full."""
    parts = made(kind, None, STREAMS)
    with merge(parts) as buffer:
        table = buffer._store.table
        policy = type(buffer).policy_class(30, SEED, table.params)
        policy.slots = table.log[1]
        policy.load(np.zeros(0, np.int64), np.zeros(0, np.int64))
        holds: dict[int, int] = {}
        log: list[list[int]] = []
        for p in positions(STREAMS):
            group = np.array([weight(p)]).view(np.int64) if kind == "weighted" else np.array([label(p)])
            plan = policy.plan(p, group, 2**40)
            assert plan.rows.shape == (1,)
            for r in plan.freed.tolist():
                del holds[r]
            if plan.rows[0] >= 0:
                holds[int(plan.rows[0])] = p
            log += plan.log.tolist()
        ids = [g for what, g in log if what == 0]
        assert sorted(holds.values()) == held(buffer)
        assert policy.state == buffer._store.policy
        assert state(buffer)[3:] == (sorted(ids), sorted(ids[g] for what, g in log if what == 1))


@every_kind
def test_any_order_and_any_chain(kind: str, tmp_path: Path) -> None:
    """Every order of inputs, and merges of merges, come to the same rows, counts, bounds and stream."""
    parts = made(kind, tmp_path, STREAMS)
    with merge(parts) as buffer:
        wanted = (*state(buffer), buffer.stream)
    for order in itertools.permutations(parts):
        with merge(order) as buffer:
            assert (*state(buffer), buffer.stream) == wanted
    for first, rest in (((0, 1), (2, 3)), ((3, 1), (0, 2)), ((2,), (0, 1, 3)), ((0, 2, 3), (1,))):
        with merge([parts[i] for i in first]) as a, merge([parts[i] for i in rest]) as b, merge([b, a]) as buffer:
            assert (*state(buffer), buffer.stream) == wanted
        with merge([parts[i] for i in first], tmp_path / "a.h5", mode="w") as a:
            path: Any = a.path
        for number, i in enumerate(rest):
            path, old = tmp_path / f"chain{number}.h5", path
            merge([parts[i], old], path, mode="w").close()
        with leanreplay.open(path) as buffer:
            assert (*state(buffer), buffer.stream) == wanted


@every_kind
def test_one_input_is_a_copy(kind: str, tmp_path: Path) -> None:
    """Same samples, same bounds; fed as another stream afterwards."""
    (path,) = made(kind, tmp_path, {3: 100})
    with leanreplay.open(path) as old, merge([path], tmp_path / "copy.h5") as buffer:
        assert held(buffer) == sorted(held(old)) == expected(kind, {3: 100}, 30)
        assert state(buffer)[1:] == state(old)[1:]
        assert buffer.stream == 0
        assert buffer._store.table.uuid != old._store.table.uuid


@every_kind
def test_it_goes_on(kind: str, tmp_path: Path) -> None:
    """A merged buffer is one like any other: fed on, reopened, rolled back, saved, loaded, resized, merged again."""
    parts = made(kind, tmp_path, STREAMS, 24)

    def check(buffer: Any, fed: int, size: int) -> None:
        assert sorted(held(buffer)) == expected(kind, STREAMS, size, range(9 * STREAM + 338, 9 * STREAM + 338 + fed))

    with merge(parts, tmp_path / "all.h5", stream=9) as buffer:
        check(buffer, 0, 24)
        feed(kind, buffer, 338 + 50)
        check(buffer, 50, 24)
        saved = buffer.state_dict()
        feed(kind, buffer, 338 + 90)
        buffer.load_state_dict(saved)
        check(buffer, 50, 24)
        buffer.save(tmp_path / "copy")
    with leanreplay.open(tmp_path / "all.h5", "r+") as buffer:
        assert (buffer.seen, buffer.stream) == (388, 9)
        feed(kind, buffer, 338 + 90)
        check(buffer, 90, 24)
        buffer.load(tmp_path / "copy")
        check(buffer, 50, 24)
        buffer.resize(18)
        check(buffer, 50, 18)
        feed(kind, buffer, 338 + 120)
        check(buffer, 120, 18)
        buffer.set_metadata("new", np.zeros(len(buffer)))
        assert buffer._store.table.params["streams"] == [0, 1, 2, 3]
    with leanreplay.open(tmp_path / "all.h5") as buffer, merge([buffer]) as again:
        assert again._store.table.params["streams"] == [0, 1, 2, 3, 9]
        assert (again.stream, again.seen) == (4, 458)
        assert held(again) == sorted(held(buffer))


def test_open_buffers_and_paths() -> None:
    """Open buffers in memory, of which one is a reader's copy, merge like files; a buffer without rows takes part."""
    parts = made("reservoir", None, {0: 50, 1: 60, 2: 5})
    empty = ReservoirBuffer(30, seed=SEED, stream=7, schema=parts[0].schema)
    with merge([*parts, empty]) as buffer:
        assert held(buffer) == expected("reservoir", {0: 50, 1: 60, 2: 5}, 30)
        assert buffer._store.table.params["streams"] == [0, 1, 2, 7]
        assert buffer.stream == 3
    with merge([empty]) as buffer:
        assert (len(buffer), buffer.seen, buffer.stream) == (0, 0, 0)
        feed("reservoir", buffer, 50)
        assert sorted(held(buffer)) == expected("reservoir", {0: 50}, 30)
    for part in parts:
        assert part.check() == []
        feed("reservoir", part, 70)


def test_inputs_that_saw_but_hold_nothing() -> None:
    """Samples of weight 0 count as seen in the result too."""
    parts = [WeightedReservoirBuffer(5, seed=SEED, stream=stream) for stream in range(2)]
    for part in parts:
        part.add(np.arange(20), weights=np.zeros(20))
    with merge(parts) as buffer:
        assert (len(buffer), buffer.seen) == (0, 40)
        assert buffer.check() == []
        buffer.add(np.arange(3), weights=np.ones(3))
        assert buffer.get_metadata("position").tolist() == [2 * STREAM + 40 + i for i in range(3)]


# -- sizes and the capacity rule -------------------------------------------------------------------------------------------


def test_sizes() -> None:
    """By default the smallest input's; fewer rows keep the best; more rows are filled only if no input dropped."""
    a, b = (made("reservoir", None, {s: n}, size)[0] for s, n, size in ((0, 100, 40), (1, 30, 35)))
    streams = {0: 100, 1: 30}
    with merge([a, b]) as buffer:
        assert (buffer.max_size, held(buffer)) == (35, expected("reservoir", streams, 35))
    with merge([a, b], max_size=10) as buffer:
        assert (buffer.max_size, held(buffer), buffer._store.policy[0]) == (10, expected("reservoir", streams, 10), 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CapacityWarning)
        with merge([a, b], max_size=40) as buffer:
            assert (held(buffer), buffer._store.policy[0]) == (expected("reservoir", streams, 40), 40)
        with merge([b], max_size=100) as buffer:
            assert (len(buffer), buffer._store.policy[0]) == (30, 0)
            feed("reservoir", buffer, 30 + 100)
            assert len(buffer) == 100
    c = made("reservoir", None, {2: 30}, 35)[0]
    with merge([b, c]) as buffer:  # neither dropped a sample, but their union does
        assert (held(buffer), buffer._store.policy[0]) == (expected("reservoir", {1: 30, 2: 30}, 35), 35)
    with pytest.warns(CapacityWarning, match="no more than 40") as caught, merge([b, a], max_size=60) as buffer:
        assert caught[0].filename == __file__
        assert (held(buffer), buffer._store.policy[0]) == (expected("reservoir", streams, 40), 40)
        feed("reservoir", buffer, 300)
        assert len(buffer) == 40


def test_sizes_of_groups() -> None:
    """A group that was full in some input gets no more rows than it had there; others get their quota of the new size."""
    a = ClassBalancedBuffer(10, seed=SEED, stream=0)
    a.add(np.arange(40), group=np.arange(40) % 2)  # groups 0 and 1 are full at 5
    b = ClassBalancedBuffer(20, seed=SEED, stream=1)
    b.add(np.arange(40), group=np.where(np.arange(40) % 2, 1, 2))  # groups 1 and 2 are full at 10
    with pytest.warns(CapacityWarning, match="no more than 20"), merge([a, b], max_size=30) as buffer:
        assert buffer.group_sizes() == {0: 5, 1: 5, 2: 10}
        assert full_groups(buffer) == [0, 1, 2]
        for g, sources in ((0, [0]), (1, [0, 1]), (2, [1])):
            everything = [s * STREAM + i for s in sources for i in range(40) if (i % 2 if s == 0 else 2 - i % 2) == g]
            found = buffer.get_metadata("position", buffer.group_rows(g))
            assert found.tolist() == largest(everything, buffer.group_sizes()[g])
        buffer.add(np.arange(100), group=np.arange(100) % 4)
        assert buffer.group_sizes()[0] == buffer.group_sizes()[1] == 5
        assert buffer.group_sizes()[3] in (7, 8)
        assert buffer.check() == []
    with warnings.catch_warnings():
        warnings.simplefilter("error", CapacityWarning)
        with merge([a, b]) as buffer:
            assert sorted(buffer.group_sizes().values()) == [3, 3, 4]


def test_fixed_quotas_that_leave_rows_over() -> None:
    """Rows that no quota covers were free in the inputs too: they are no reason for a warning, rows that full groups lack are."""
    parts = []
    for stream in range(2):
        part = ClassBalancedBuffer(10, seed=SEED, stream=stream, adaptive_size=False, total_num_classes=4)
        part.add(np.arange(40), group=np.arange(40) % 2)
        parts.append(part)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CapacityWarning)
        with merge(parts) as buffer:
            assert buffer.group_sizes() == {0: 2, 1: 2}
    with pytest.warns(CapacityWarning, match="no more than 14"), merge(parts, max_size=20) as buffer:
        assert buffer.group_sizes() == {0: 2, 1: 2}  # and 5 each for two more classes would go beside them


def test_groups_that_were_not_full() -> None:
    """Groups that no input dropped a sample of, but that have too many together, are full from now on."""
    parts = []
    for stream in range(2):
        part = ClassBalancedBuffer(10, seed=SEED, stream=stream)
        part.add(np.arange(4), group=[0, 0, 0, 1 + stream])
        parts.append(part)
    with merge(parts) as buffer:
        limit = quotas(range(3), 10)
        assert buffer.group_sizes() == {0: limit[0], 1: 1, 2: 1}
        assert full_groups(buffer) == [0]
        with pytest.warns(CapacityWarning):
            buffer.resize(60)
        buffer.add(np.arange(90), group=np.arange(90) % 3)
        assert buffer.group_sizes() == {0: limit[0], 1: 20, 2: 20}


def test_resized_inputs() -> None:
    """The bound of an input that was shrunk and grown again holds for the result."""
    parts = made("weighted", None, {0: 100, 1: 100})
    parts[0].resize(8)
    with pytest.warns(CapacityWarning):
        parts[0].resize(30)
    with pytest.warns(CapacityWarning, match="no more than 8"), merge(parts) as buffer:
        assert (buffer.max_size, held(buffer)) == (30, expected("weighted", {0: 100, 1: 100}, 8))


def test_more_groups_than_rows() -> None:
    """Which groups keep a row goes by their hashes, however they were spread over the inputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", CapacityWarning)
        for size in (1, 3, 5):
            parts = made("classes", None, STREAMS, size)
            with merge(parts) as buffer:
                assert held(buffer) == expected("classes", STREAMS, size)
                assert set(buffer.group_sizes()) == {label(p) for p in positions(STREAMS)}


def test_many_groups() -> None:
    """More groups than a new file's log has room for: it gets a longer one."""
    parts = []
    for stream in (0, 1):
        part = ClassBalancedBuffer(100, seed=SEED, stream=stream)
        part.add(np.arange(6000), group=np.arange(6000) + 3000 * stream)
        parts.append(part)
    with merge(parts) as buffer:
        assert len(buffer.group_sizes()) == 9000
        assert len(buffer) == 100
        wanted = sorted(g for g, n in quotas(range(9000), 100).items() if n)
        assert sorted(g for g, n in buffer.group_sizes().items() if n) == wanted
        buffer.add(np.arange(3000), group=np.arange(9000, 12000))
        assert buffer.check() == []


# -- statistics ----------------------------------------------------------------------------------------------------------


def test_inclusion() -> None:
    """Over 3,000 seeds every pair of the 6 samples of three streams has the largest keys equally often; and these merge keeps."""
    counts: dict[tuple[int, ...], int] = {}
    samples = [(stream, i) for stream, n in enumerate((3, 1, 2)) for i in range(n)]
    for seed in range(3000):
        key = keyed("reservoir", seed)
        best = sorted(samples, key=lambda s: key(s[0] * 2**48 + s[1]))[-2:]
        wanted = tuple(sorted(10 * stream + i for stream, i in best))
        counts[wanted] = counts.get(wanted, 0) + 1
        if seed < 50:
            parts = []
            for stream, n in enumerate((3, 1, 2)):
                part = ReservoirBuffer(2, seed=seed, stream=stream)
                part.add(np.arange(n) + 10 * stream)
                parts.append(part)
            with merge(parts) as buffer:
                assert tuple(buffer.get(range(2))[0].tolist()) == wanted, seed
            for part in parts:
                part.close()
    assert len(counts) == 15
    statistic = sum((n - 200) ** 2 / 200 for n in counts.values())
    assert statistic < 55, counts  # 14 degrees of freedom: p is 1e-6


# -- kernels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [True, False])
def test_kernels(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heaps of several groups hold the best of each, equal keys by age; places are sorted by position."""
    if not compiled:
        for name, value in list(vars(kernel).items()):
            if hasattr(value, "py_func"):
                monkeypatch.setattr(kernel, name, value.py_func)
    rng = np.random.default_rng(0)
    for caps in ([0], [1], [5, 0, 9, 1], [300, 2]):
        n = 400
        keys = rng.integers(0, 40, n).astype(np.uint64) + np.uint64(2**63)
        where, groups = rng.permutation(n), rng.integers(0, len(caps), n)
        starts = np.concatenate([[0], np.cumsum(caps)])
        counts, best = np.zeros(len(caps), np.int64), np.zeros(starts[-1], np.uint64)
        found, places = np.zeros(starts[-1], np.int64), np.zeros(starts[-1], np.int64)
        for source, part in enumerate(np.array_split(np.arange(n), 3)):
            kernel.offer(keys[part], where[part], groups[part], part, source << 40, starts, counts, best, found, places)
        for g, cap in enumerate(caps):
            wanted = sorted((int(-keys[i].astype(object)), int(where[i])) for i in np.flatnonzero(groups == g))[:cap]
            assert counts[g] == len(wanted)
            mine = slice(starts[g], starts[g] + counts[g])
            assert sorted(zip((-best[mine].astype(object)).tolist(), found[mine].tolist(), strict=True)) == wanted
            assert (where[places[mine] % 2**40] == found[mine]).all()
        full = np.concatenate([np.arange(starts[g], starts[g] + counts[g]) for g in range(len(caps))])
        a, b = found[full], places[full]
        pairs = sorted(zip(a.tolist(), b.tolist(), strict=True))
        kernel.sort_places(a, b)
        assert list(zip(a.tolist(), b.tolist(), strict=True)) == pairs


# -- memory and kills ------------------------------------------------------------------------------------------------------

MEMORY = """
import sys
import numpy as np
import leanreplay as lr

folder, rows = sys.argv[1], int(sys.argv[2])
schema = lr.Schema.from_sample(np.zeros(3000, np.uint8))

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1000

def parts(n, name):
    found = []
    for stream in range(3):
        found.append(f"{folder}/{name}{stream}.h5")
        with lr.ReservoirBuffer(n, found[-1], stream=stream, schema=schema) as buffer:
            images = np.arange(1000).astype(np.uint8)[:, None].repeat(3000, 1)
            while buffer.seen < n:
                buffer.add(images[: n - buffer.seen])
    return found

small, large = parts(500, "small"), parts(rows, "large")
lr.merge(small, folder + "/warm.h5").close()
before = peak = anonymous()
read = lr.store.Store.read

def watched(self, *args):
    global peak
    peak = max(peak, anonymous())
    return read(self, *args)

lr.store.Store.read = watched
with lr.merge(large, folder + "/all.h5") as buffer:
    peak = max(peak, anonymous())
    assert len(buffer) == rows, len(buffer)
    x, meta = buffer.sample(256)
    assert (x == (meta["position"] % 2**48 % 1000).astype(np.uint8)[:, None]).all()
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_stays_small(tmp_path: Path) -> None:
    """G4: merging three buffers of 180 MB takes under 40 MB of private memory: chunks of 8 MB and 24 bytes a row."""
    try:
        done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path), "60000"], capture_output=True, text=True, check=False)
    finally:
        for path in tmp_path.iterdir():
            path.unlink()
    assert done.returncode == 0, done.stderr[-4000:]
    assert float(done.stdout) < 40, f"private memory grew by {done.stdout} MB"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("mode", ["x", "w"])
def test_killed(mode: str, tmp_path: Path) -> None:
    """Killed at every step, the old file (or none) stands there, or the new one, whole; the next merge works and cleans up."""
    parts = made("classes", tmp_path, STREAMS)
    target = tmp_path / "all.h5"
    wanted = expected("classes", STREAMS, 30)
    old = b""
    if mode == "w":
        ReservoirBuffer(5, target, schema=leanreplay.Schema.from_sample(0)).close()
        old = target.read_bytes()
    merge(parts).close()  # compiled
    steps = [
        ("leanreplay.storage.store", "Store.commit"),
        ("leanreplay.storage.store", "Store.read"),
        ("leanreplay.storage.system", "publish"),
        ("os", "fsync"),
    ]
    steps += [
        ("leanreplay.storage.system", "allocate"),
        ("leanreplay.storage.system", "sync_folder"),
        ("leanreplay.storage.store", "Store._write_header"),
    ]
    outcomes = set()
    for (where, name), after in itertools.product(steps, (False, True)):
        if mode == "w":
            target.write_bytes(old)
        else:
            target.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            try:
                holder: Any = importlib.import_module(where)
                *path, last = name.split(".")
                for step in path:
                    holder = getattr(holder, step)
                real = getattr(holder, last)

                def dying(*args: Any, real: Any = real, after: bool = after, **named: Any) -> None:
                    if after:
                        real(*args, **named)
                    os.kill(os.getpid(), signal.SIGKILL)

                setattr(holder, last, dying)
                merge(parts, target, mode=mode)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), (name, after)
        if target.exists() and target.read_bytes() != old:
            outcomes.add("new")
            with leanreplay.open(target) as buffer:
                assert held(buffer) == wanted, (name, after)
        else:
            outcomes.add("old")
            assert target.exists() == (mode == "w")
        with merge(parts, target, mode="w") as buffer:
            assert held(buffer) == wanted
        assert glob.glob(str(tmp_path / ".*.tmp")) == []
    assert outcomes == {"old", "new"}


def test_killed_at_random_instants(tmp_path: Path) -> None:
    """The same without any step in mind."""
    parts = made("reservoir", tmp_path, STREAMS)
    target = tmp_path / "all.h5"
    merge(parts, target).close()
    for i in range(25):
        pid = os.fork()
        if pid == 0:
            try:
                while True:
                    merge(parts, target, mode="w").close()
            finally:
                os._exit(1)
        time.sleep(0.01 + 0.003 * i)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with leanreplay.open(target, "r+") as buffer:
            assert held(buffer) == expected("reservoir", STREAMS, 30)
    merge(parts, target, mode="w").close()
    assert glob.glob(str(tmp_path / ".*.tmp")) == []


def test_an_error_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an exception in the middle there is no file, no temporary and no lock; the inputs stay usable."""
    parts = made("reservoir", None, STREAMS)
    real = leanreplay.storage.store.Store.commit

    def failing(*args: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(leanreplay.storage.store.Store, "commit", failing)
    with pytest.raises(KeyboardInterrupt):
        merge(parts, tmp_path / "all.h5")
    monkeypatch.setattr(leanreplay.storage.store.Store, "commit", real)
    assert [p.name for p in tmp_path.iterdir()] == ["all.h5.lock"]
    with merge(parts, tmp_path / "all.h5") as buffer:
        assert held(buffer) == expected("reservoir", STREAMS, 30)
    feed("reservoir", parts[0], 100)


def test_somebody_else_was_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With mode "x" a file that appears under the name meanwhile stays, whoever made it."""
    parts = made("reservoir", None, STREAMS)
    offer = kernel.offer
    monkeypatch.setattr(kernel, "offer", lambda *args: ((tmp_path / "all.h5").write_text("mine"), offer(*args)))
    with pytest.raises(ExistsError):
        merge(parts, tmp_path / "all.h5")
    assert (tmp_path / "all.h5").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.h5", "all.h5.lock"]


# -- refusals ------------------------------------------------------------------------------------------------------------


def refuse(error: type[Exception], words: Sequence[str], *args: Any, **options: Any) -> None:
    """`merge` raises this error with these words in its message."""
    with pytest.raises(error) as caught:
        merge(*args, **options)
    assert type(caught.value) is error
    assert all(str(word) in str(caught.value) for word in words), str(caught.value)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[str]]:
    yield made("reservoir", tmp_path, {0: 50, 1: 60})


def test_refused_arguments(pair: list[str], tmp_path: Path) -> None:
    """No input, one twice, the output among them, wrong kinds of arguments: nothing is made, nothing is changed."""
    a, b = pair
    out = tmp_path / "all.h5"
    refuse(ArgumentError, ["at least one"], [], out)
    refuse(ArgumentError, ["list of paths", "None"], None, out)
    refuse(ArgumentError, ["list of paths", "5"], 5, out)
    refuse(ArgumentError, ["list of paths", a], a, out)
    refuse(ArgumentError, ["'r+'"], pair, out, mode="r+")
    refuse(ArgumentError, ["given twice", a], [a, b, a], out)
    os.symlink(a, tmp_path / "link.h5")
    refuse(ArgumentError, ["given twice", "link.h5", a], [a, tmp_path / "link.h5"], out)
    with leanreplay.open(a) as buffer:
        refuse(ArgumentError, ["given twice"], [a, buffer], out)
        refuse(ArgumentError, ["given twice"], [buffer, buffer], out)
        refuse(ArgumentError, ["is the output", a], [buffer, b], a, mode="w")
    refuse(ArgumentError, ["is the output", a], pair, a, mode="w")
    refuse(ArgumentError, ["is the output", a], pair, tmp_path / "link.h5")
    refuse(ArgumentError, ["max_size", "0"], pair, out, max_size=0)
    refuse(ArgumentError, ["max_size", "'7'"], pair, out, max_size="7")
    refuse(ArgumentError, ["stream", "40000"], pair, out, stream=40_000)
    refuse(ArgumentError, ["stream=1", "an input"], pair, out, stream=1)
    refuse(ArgumentError, ["input 1", "str or os.PathLike"], [a, 7], out)
    refuse(MissingError, ["none.h5"], [a, tmp_path / "none.h5"], out)
    (tmp_path / "text.h5").write_text("no buffer" * 100)
    refuse(FormatError, ["text.h5"], [a, tmp_path / "text.h5"], out)
    with ReservoirBuffer(30, seed=SEED, stream=4) as empty:
        refuse(ArgumentError, ["input 1 (in memory)", "is empty", "leave it out"], [a, empty], out)
    refuse(ModeError, ["closed"], [a, empty], out)
    assert not out.exists()
    out.write_text("something")
    refuse(ExistsError, ["all.h5", "exists"], pair, out)
    assert out.read_text() == "something"
    with ReservoirBuffer(5, tmp_path / "open.h5"):
        refuse(LockedError, ["open.h5"], pair, tmp_path / "open.h5", mode="w")


def test_refused_pairs(pair: list[str], tmp_path: Path) -> None:
    """Other kinds, schemas, seeds, parameters and overlapping streams: both files are named, with what differs."""
    a, _ = pair
    out, schema = tmp_path / "all.h5", leanreplay.open(a).schema

    def other(kind: Any = ReservoirBuffer, size: int = 30, **options: Any) -> str:
        path = str(tmp_path / "other.h5")
        kind(size, path, mode="w", **{"seed": SEED, "stream": 4, "schema": schema, **options}).close()
        return path

    refuse(MismatchError, [a, other(seed=6), "seed 5 and 6"], [a, other(seed=6)], out)
    path = other(WeightedReservoirBuffer)
    refuse(MismatchError, [a, path, "kind ReservoirBuffer and WeightedReservoirBuffer"], [a, path], out)
    path = other(schema=leanreplay.Schema.from_sample(0))
    refuse(MismatchError, [a, path, "schema"], [a, path], out)
    path = other(stream=0)
    refuse(MismatchError, [a, path, "stream 0", "stream=rank"], [a, path], out)
    merged = str(tmp_path / "merged.h5")
    merge(pair, merged).close()
    refuse(MismatchError, [a, merged, "stream 0"], [a, merged], out)
    path = other(stream=2)  # the number that the merged buffer would be fed with, but it was not yet
    merge([merged, path], out, mode="w").close()
    with leanreplay.open(merged, "r+") as buffer:
        feed("reservoir", buffer, 111)
    refuse(MismatchError, [merged, path, "stream 2"], [merged, path], out, mode="w")

    groups = str(tmp_path / "groups.h5")
    fixed: dict[str, Any] = {"adaptive_size": False, "total_num_classes": 3}
    ClassBalancedBuffer(30, groups, seed=SEED, stream=0, schema=schema, **fixed).close()
    refuse(MismatchError, [groups, "adaptive_size False and True"], [groups, other(ClassBalancedBuffer)], out)
    path = other(ClassBalancedBuffer, adaptive_size=False, total_num_classes=4)
    refuse(MismatchError, [groups, path, "total_num_classes 3 and 4"], [groups, path], out)
    path = other(ClassBalancedBuffer, **fixed)
    merge([groups, path], out, mode="w").close()
    for name, first in ((groups, 0), (path, 2)):
        with leanreplay.open(name, "r+") as buffer:
            buffer.add(samples(0, 2), metadata={"m": np.arange(2)}, group=[first, first + 1])
    refuse(MismatchError, [groups, path, "4 groups", "total of 3"], [groups, path], out, mode="w")
    refuse(ArgumentError, ["3 groups in 2 rows"], [groups], out, mode="w", max_size=2)


REFUSED = {
    "window": (SlidingWindowBuffer, "last ones"),
    "greedy": (GreedyClassBalancingBuffer, "order"),
    "cbrs": (ClassBalancingReservoirBuffer, "order"),
    "borrow": (functools.partial(ClassBalancedBuffer, borrow=True), "borrow=True"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_kinds(kind: str, tmp_path: Path) -> None:
    """Kinds whose contents depend on the order of all streams, even a single one: with the reason."""
    make, why = REFUSED[kind]
    paths = [str(tmp_path / f"{i}.h5") for i in range(2)]
    for i, path in enumerate(paths):
        with make(5, path, stream=i) as buffer:
            buffer.add((np.zeros((9, 2)), np.arange(9) % 3))
    refuse(MismatchError, [*paths, why], paths, tmp_path / "all.h5")
    refuse(MismatchError, [paths[0], why], paths[:1], tmp_path / "all.h5")


def test_refused_folders_and_unknown_policies(tmp_path: Path) -> None:
    """An InfiniteBuffer, open or as a folder, and a user's policy that nobody can know how to merge."""
    folder = tmp_path / "infinite"
    with InfiniteBuffer(folder) as buffer:
        buffer.add(np.arange(5))
        refuse(MismatchError, [folder, "InfiniteBuffer", "keeps everything"], [buffer])
    refuse(MismatchError, [folder, "InfiniteBuffer", "keeps everything"], [folder])

    class MyPolicy(leanreplay.ReservoirPolicy):
        pass

    class MyBuffer(leanreplay.DataBuffer):
        policy_class = MyPolicy

    with MyBuffer(5) as buffer:
        buffer.add(np.arange(5))
        refuse(MismatchError, ["MyBuffer", "does not say"], [buffer])

    class MyReservoir(ReservoirBuffer):
        pass

    with MyReservoir(5) as own:
        own.add(np.arange(9))
        with merge([own]) as buffer:
            assert type(buffer) is MyReservoir


# -- damaged and changing inputs --------------------------------------------------------------------------------------------


def test_cut_off_input(pair: list[str], tmp_path: Path) -> None:
    """An input whose writer was killed within a commit is refused until a writer has opened it."""
    pid = os.fork()
    if pid == 0:
        try:
            buffer = leanreplay.open(pair[0], "r+")
            leanreplay.storage.store._AT_ONCE = False
            leanreplay.storage.store.Store._write_header = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
            feed("reservoir", buffer, 200)
        finally:
            os._exit(1)
    os.waitpid(pid, 0)
    refuse(RecoveryError, [pair[0], "cut off", "'r+'"], pair, tmp_path / "all.h5")
    leanreplay.open(pair[0], "r+").close()
    with merge(pair, tmp_path / "all.h5") as buffer:
        assert held(buffer) == expected("reservoir", {0: 50, 1: 60}, 30)


@pytest.mark.parametrize("column", ["data/x", "metadata/m", "index/position", "index/group", "index/checksum"])
def test_damaged_input(pair: list[str], column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped bit in a row that goes in, or anywhere in the index, is noticed, and no file appears."""
    for name in ("storage.store", "merge"):
        monkeypatch.setattr(sys.modules[f"leanreplay.{name}"], "_PATIENCE", 0.02)  # there is no writer to wait for
    with merge(pair) as buffer:
        kept = next(p for p in held(buffer) if p < STREAM)
    with leanreplay.open(pair[0]) as source:
        row = int(np.flatnonzero(source.get_metadata("position") == kept)[0])
        table = source._store.table
    at, size = dict(zip(table.dataset_names(), table.columns, strict=True))[column]
    with open(pair[0], "r+b") as file:
        file.seek(at + row * size + 1)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(CorruptionError, match="reservoir0"):
        merge(pair, tmp_path / "all.h5")
    assert not (tmp_path / "all.h5").exists()


def test_inputs_that_lie(pair: list[str]) -> None:
    """A sample of another input's stream, or of a group that no log knows, with checksums that fit, is an error."""
    with leanreplay.open(pair[1], "r+") as liar:
        store = liar._store
        arrays, index = store.read(np.arange(3))
        with leanreplay.open(pair[0]) as other:
            index[0] = other.get_metadata("position")[np.argsort([key(p) for p in other.get_metadata("position").tolist()])[-3:]]
        sources = [(np.ascontiguousarray(a).ravel().view(np.uint8), np.arange(3)) for a in arrays]
        store.commit(Change(store.seen, store.policy, np.arange(3), index[0], index[1], sources))
        refuse(MismatchError, [*pair, "both hold sample"], [pair[0], liar])
    (liar,) = made("classes", None, {0: 90})
    store = liar._store
    for wrong in (-(2**63), 4, 2**63 - 1):
        arrays, index = store.read(np.arange(3))
        index[1, 1] = wrong
        sources = [(np.ascontiguousarray(a).ravel().view(np.uint8), np.arange(3)) for a in arrays]
        store.commit(Change(store.seen, store.policy, np.arange(3), index[0], index[1], sources))
        refuse(CorruptionError, ["input 0", "log of groups"], [liar])


@pytest.mark.parametrize("when", ["index", "rows", "end"])
def test_input_that_is_written_to(pair: list[str], when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer of an input makes the merge fail, whatever it met, and no file appears."""
    with leanreplay.open(pair[0], "r+") as writer:
        done = []

        def meanwhile() -> None:
            if not done:
                done.append(True)
                feed("reservoir", writer, 200)

        if when == "index":
            offer = kernel.offer
            monkeypatch.setattr(kernel, "offer", lambda *args: (meanwhile(), offer(*args)))
        elif when == "rows":
            read = leanreplay.storage.store.Store.read
            monkeypatch.setattr(leanreplay.storage.store.Store, "read", lambda *args: (meanwhile(), read(*args))[1])
        else:
            commit = leanreplay.storage.store.Store.commit
            monkeypatch.setattr(leanreplay.storage.store.Store, "commit", lambda *args, **named: (commit(*args, **named), meanwhile())[0])
        refuse(ModeError, [pair[0], "written to", "close its writer"], pair, tmp_path / "all.h5")
        assert done
        assert not (tmp_path / "all.h5").exists()
    monkeypatch.undo()
    with merge(pair, tmp_path / "all.h5") as buffer:
        assert held(buffer) == expected("reservoir", {0: 200, 1: 60}, 30)


def test_input_fed_by_another_thread() -> None:
    """An open buffer that is given itself waits: the merge sees one state of it, and two merges in other orders do not block."""
    parts = made("reservoir", None, {0: 50, 1: 60})
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set() and parts[0].seen < 20_000:
            feed("reservoir", parts[0], parts[0].seen + 5, batch=5)

    def other() -> None:
        while not stop.is_set():
            merge(parts[::-1]).close()

    threads = [threading.Thread(target=work), threading.Thread(target=other)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(15):
            with merge(parts) as buffer:
                assert held(buffer) == expected("reservoir", {0: buffer.seen - 60, 1: 60}, 30)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_files_say_what_went_in(pair: list[str], tmp_path: Path) -> None:
    """The same bytes of rows and index whichever order the inputs came in; h5py reads the result."""
    h5py = pytest.importorskip("h5py")
    digests = set()
    for number, order in enumerate((pair, pair[::-1])):
        path = tmp_path / f"all{number}.h5"
        merge(order, path).close()
        with h5py.File(path) as file:
            parts = [file[name][:].tobytes() for name in ("data/x", "data/b", "data/s", "metadata/m", "index/position", "index/checksum")]
            assert (np.diff(file["index/position"][:]) > 0).all()
        digests.add(hashlib.sha256(b"".join(parts)).hexdigest())
    assert len(digests) == 1
