"""merge: the result holds exactly what one buffer over all the streams would hold."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiled import as_python
from grouped_oracle import keyed
from merging import KINDS, SEED, STREAM, STREAMS, expected, feed, held, label, largest, made, positions, quotas, weight

import leanreplay
from leanreplay import (
    CapacityWarning,
    ClassBalancedBuffer,
    ReservoirBuffer,
    WeightedReservoirBuffer,
    merge,
)
from leanreplay.kernels import merge as kernel

every_kind = pytest.mark.parametrize("kind", KINDS)


def full_groups(buffer: Any) -> list[int]:
    log = buffer.current.store.policy_log().tolist()
    ids = [g for what, g in log if what == 0]
    return sorted(ids[g] for what, g in log if what == 1)


def state(buffer: Any) -> Any:
    """What must be the same whichever way a buffer was made: rows, index, counts, policy words, groups, which of them are full."""
    ids = sorted(g for what, g in buffer.current.store.policy_log().tolist() if what == 0)
    return held(buffer), buffer.seen, buffer.current.store.policy, ids, full_groups(buffer)


# -- equal to one buffer -----------------------------------------------------------------------------------------------


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
        table = buffer.current.store.layout
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
        assert policy.state == buffer.current.store.policy
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
        assert buffer.current.store.layout.uuid != old.current.store.layout.uuid


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
        assert buffer.current.store.layout.params["streams"] == [0, 1, 2, 3]
    with leanreplay.open(tmp_path / "all.h5") as buffer, merge([buffer]) as again:
        assert again.current.store.layout.params["streams"] == [0, 1, 2, 3, 9]
        assert (again.stream, again.seen) == (4, 458)
        assert held(again) == sorted(held(buffer))


def test_open_buffers_and_paths() -> None:
    """Open buffers in memory, of which one is a reader's copy, merge like files; a buffer without rows takes part."""
    parts = made("reservoir", None, {0: 50, 1: 60, 2: 5})
    empty = ReservoirBuffer(30, seed=SEED, stream=7, schema=parts[0].schema)
    with merge([*parts, empty]) as buffer:
        assert held(buffer) == expected("reservoir", {0: 50, 1: 60, 2: 5}, 30)
        assert buffer.current.store.layout.params["streams"] == [0, 1, 2, 7]
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


# -- sizes and the capacity rule ---------------------------------------------------------------------------------------


def test_sizes() -> None:
    """By default the smallest input's; fewer rows keep the best; more rows are filled only if no input dropped."""
    a, b = (made("reservoir", None, {s: n}, size)[0] for s, n, size in ((0, 100, 40), (1, 30, 35)))
    streams = {0: 100, 1: 30}
    with merge([a, b]) as buffer:
        assert (buffer.max_size, held(buffer)) == (35, expected("reservoir", streams, 35))
    with merge([a, b], max_size=10) as buffer:
        assert (buffer.max_size, held(buffer), buffer.current.store.policy[0]) == (10, expected("reservoir", streams, 10), 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CapacityWarning)
        with merge([a, b], max_size=40) as buffer:
            assert (held(buffer), buffer.current.store.policy[0]) == (expected("reservoir", streams, 40), 40)
        with merge([b], max_size=100) as buffer:
            assert (len(buffer), buffer.current.store.policy[0]) == (30, 0)
            feed("reservoir", buffer, 30 + 100)
            assert len(buffer) == 100
    c = made("reservoir", None, {2: 30}, 35)[0]
    with merge([b, c]) as buffer:  # neither dropped a sample, but their union does
        assert (held(buffer), buffer.current.store.policy[0]) == (expected("reservoir", {1: 30, 2: 30}, 35), 35)
    with pytest.warns(CapacityWarning, match="no more than 40") as caught, merge([b, a], max_size=60) as buffer:
        assert caught[0].filename == __file__
        assert (held(buffer), buffer.current.store.policy[0]) == (expected("reservoir", streams, 40), 40)
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


# -- statistics --------------------------------------------------------------------------------------------------------


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


# -- kernels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [True, False])
def test_kernels(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heaps of several groups hold the best of each, equal keys by age; places are sorted by position."""
    if not compiled:
        as_python(monkeypatch, kernel)
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
