"""WeightedReservoirBuffer: the law of Efraimidis and Spirakis, exactly, for any weights that a double can hold.

The law is weighted sampling without replacement one after the other; its probabilities are worked out by recursion. What a buffer
holds is compared with a plain Python oracle: sort everything by exact rational keys.
"""

from __future__ import annotations

import decimal
import functools
import itertools
import math
import os
import pickle
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compiled import as_python, call_helpers

import leanreplay
from leanreplay import (
    ArgumentError,
    CapacityWarning,
    CorruptionError,
    Schema,
    SchemaError,
    WeightedReservoirBuffer,
    WeightedReservoirPolicy,
)
from leanreplay.kernels import weighted
from leanreplay.keys import key_pair
from leanreplay.storage.store import Change

M64 = 2**64 - 1
TINY, HUGE = 5e-324, 1.7976931348623157e308
LIMIT = 4.5  # of z: 1 in 300,000 for a right implementation with new seeds; these seeds are fixed
NONE = np.zeros(0, np.int64)


# -- oracle ------------------------------------------------------------------------------------------------------------


def fin(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & M64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & M64
    return x ^ x >> 31


def fin_inverse(x: int) -> int:
    """What `fin` came from."""
    x ^= x >> 31 ^ x >> 62
    x = x * pow(0x94D049BB133111EB, -1, 2**64) & M64
    x ^= x >> 27 ^ x >> 54
    x = x * pow(0xBF58476D1CE4E5B9, -1, 2**64) & M64
    return x ^ x >> 30 ^ x >> 60


@functools.cache
def uniform(position: int, seed: int) -> Fraction:
    """v of a position: the middle of one of 2**52 parts of (0, 1)."""
    k0, k1 = (int(k) for k in key_pair("weighted reservoir", seed))
    h = fin(fin(position * 0x9E3779B97F4A7C15 + k0 & M64) + k1 & M64)
    return Fraction(2 * (h >> 12) + 1, 2**53)


@functools.cache
def exponential(position: int, seed: int) -> Fraction:
    """-log1p(-v) to 50 digits."""
    with decimal.localcontext(decimal.Context(prec=50)):
        u = 1 - uniform(position, seed)
        return Fraction(-(decimal.Decimal(u.numerator) / decimal.Decimal(u.denominator)).ln())


def oracle(weights: Sequence[float], size: int, seed: int = 0, stream: int = 0) -> list[int]:
    """Indices kept of a stream, ascending: those of the smallest E / w, to 50 digits."""
    found = [i for i, w in enumerate(weights) if w > 0]
    best = sorted(found, key=lambda i: (exponential((stream << 48) + i, seed) / Fraction(float(weights[i])), i))
    return sorted(best[:size])


def law(weights: Sequence[Fraction | int], size: int) -> dict[frozenset[int], Fraction]:
    """Probability of each set that drawing `size` samples one after the other, in proportion to weight, can come to."""
    total: dict[frozenset[int], Fraction] = {}

    def draw(taken: tuple[int, ...], chance: Fraction) -> None:
        left = [i for i in range(len(weights)) if i not in taken and weights[i] > 0]
        if len(taken) == size or not left:
            total[frozenset(taken)] = total.get(frozenset(taken), Fraction(0)) + chance
            return
        among = sum(Fraction(weights[i]) for i in left)
        for i in left:
            draw((*taken, i), chance * Fraction(weights[i]) / among)

    draw((), Fraction(1))
    return total


def assert_law(counts: dict[frozenset[int], int], weights: Sequence[Fraction | int], size: int, note: str = "") -> None:
    """Counts of kept sets against the law, by chi-square; sets that are too rare for it are taken together."""
    chances, trials = law(weights, size), sum(counts.values())
    assert sum(chances.values()) == 1
    assert set(counts) <= set(chances), f"{note}: impossible sets {set(counts) - set(chances)}"
    cells, rest = [], [0.0, 0.0]
    for kept, chance in chances.items():
        if trials * chance >= 10:
            cells.append((counts.get(kept, 0), float(trials * chance)))
        else:
            rest[0] += counts.get(kept, 0)
            rest[1] += float(trials * chance)
    if rest[1] >= 5:
        cells.append((int(rest[0]), rest[1]))
    df = len(cells) - 1
    statistic = sum((n - mean) ** 2 / mean for n, mean in cells)
    z = ((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))
    assert abs(z) < LIMIT, f"{note}: z={z:.1f} over {df + 1} cells"


@pytest.fixture(params=["compiled", "python"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a test with compiled kernels, and with the Python functions that they are made from."""
    if request.param == "python":
        as_python(monkeypatch, weighted)
    with np.errstate(over="ignore" if request.param == "python" else "warn"):  # unsigned words wrap around, as they should
        call_helpers(weighted, monkeypatch)
        yield


def planned(weights: Any, size: int, seed: int, cuts: Sequence[int] = (), most: int = 2**40, start: int = 0) -> list[int]:
    """Indices that the policy alone comes to hold, the stream cut into batches at `cuts`."""
    policy = WeightedReservoirPolicy(size, seed, {})
    policy.load(NONE, NONE)
    bits = np.asarray(weights, np.float64).view(np.int64)
    holds: dict[int, int] = {}
    for first, last in itertools.pairwise([0, *cuts, len(bits)]):
        done = first
        while done < last:
            rows = policy.plan(start + done, bits[done:last], most).rows
            assert 1 <= len(rows) <= last - done
            holds |= {int(r): done + i for i, r in enumerate(rows) if r >= 0}
            done += len(rows)
    return sorted(holds.values())


def samples(start: int, stop: int) -> Any:
    p = np.arange(start, stop)
    return np.repeat(p[:, None], 3, 1).astype(np.float32), p % 5


def some_weights(n: int, seed: int = 0) -> Any:
    """Weights over the whole range of doubles, denormal and huge ones, zeros, and many of one size."""
    rng = np.random.default_rng([11, seed])
    found = rng.choice([1.0, 3.0, 0.25], n)
    wild = rng.random(n) < 0.3
    found[wild] = np.ldexp(rng.random(n) + 0.5, rng.integers(-1070, 1023, n))[wild]
    found[rng.random(n) < 0.1] = 0.0
    return found


def held(buffer: Any) -> list[int]:
    """Stream indices held, ascending, every row checked."""
    if not len(buffer):
        return []
    assert buffer.check() == []
    (x, y), meta = buffer.get(buffer.get_metadata("idx"))
    p = meta["position"] & (2**48 - 1)
    assert (x == p[:, None]).all()
    assert (y == p % 5).all()
    return sorted(p.tolist())


# -- kernels -----------------------------------------------------------------------------------------------------------


def test_keys(run: None) -> None:
    """Keys are E / w to a relative 1e-15 at every magnitude, and in that order."""
    positions = np.concatenate([np.arange(300), (7 << 48) + np.arange(100)])
    weights = np.concatenate([some_weights(350), [TINY, HUGE] * 25])
    weights[weights == 0] = 2.0
    keys = np.empty(400, np.uint64)
    assert weighted.weighted_keys(positions, weights, *key_pair("weighted reservoir", 5), keys)
    for position, weight, key in zip(positions.tolist(), weights.tolist(), keys.tolist(), strict=True):
        exact = exponential(position, 5) / Fraction(weight)
        code = key ^ M64
        exponent = (code >> 52) - 2048
        found = Fraction(2**52 + (code & (2**52 - 1)), 2**53) * Fraction(2) ** exponent
        assert abs(found / exact - 1) < 1e-15, (position, weight)


def test_logarithm_at_its_ends(run: None) -> None:
    """The smallest and largest v, and those beside the cut of the mantissa."""
    near = [int(math.sqrt(0.5) * 2**53) + d for d in (-2, 0, 2)]
    for k in [1, 3, 2**53 - 1, 2**53 - 3, 2**52 - 1, 2**52 + 1, *[2**53 - n - (n % 2 == 0) for n in near]]:
        with decimal.localcontext(decimal.Context(prec=50)):
            exact = -((decimal.Decimal(2**53) - k) / decimal.Decimal(2**53)).ln()
        found = weighted._exponential(k / 2**53)
        assert abs(decimal.Decimal(float(found)) / exact - 1) < decimal.Decimal("5e-16"), k


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_plan(run: None, size: int) -> None:
    """Whatever the batches and the journal, the policy holds what sorting by exact keys gives."""
    for seed in range(6):
        weights = some_weights(90, seed)
        wanted = oracle(weights, size, seed)
        for cuts, most in (((), 2**40), ((1, 2, 50), 2**40), (range(1, 90), 2**40), ((30,), 3)):
            assert planned(weights, size, seed, cuts, most) == wanted, (seed, cuts, most)


def test_the_heap_and_its_ties(run: None) -> None:
    """A heap is built of live rows only, the worst on top; of equal keys the younger is the worse."""
    k0, k1 = key_pair("weighted reservoir", 0)
    positions = np.random.default_rng(0).permutation(60)
    positions[::7] = -1
    with np.errstate(over="ignore"):
        weights = np.array([weighted._exponential(weighted._uniform(max(p, 0), k0, k1)) for p in positions.tolist()])  # E / w = 1 for all
    for a in (positions, weights):
        a.flags.writeable = False
    keys, kept, rows = np.empty(60, np.uint64), np.empty(60, np.int64), np.empty(60, np.int64)
    size = weighted.build_weighted_heap(positions, weights, k0, k1, keys, kept, rows)
    assert sorted(rows[:size]) == np.flatnonzero(positions >= 0).tolist()
    assert (positions[rows[:size]] == kept[:size]).all()
    assert len(set(keys[:size].tolist())) == 1
    assert kept[0] == positions.max()
    assert all(kept[(j - 1) // 2] > kept[j] for j in range(1, size))
    for wrong in (0.0, -1.0, math.inf, math.nan):
        weights = weights.copy()
        weights[1] = wrong
        weights.flags.writeable = False
        assert weighted.build_weighted_heap(positions, weights, k0, k1, keys, kept, rows) == -1


@pytest.mark.parametrize("size", [1, 4, 30])
def test_equal_keys(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all keys are equal the oldest stay, in any batches, through `resize` and reloading."""
    call_helpers(weighted, monkeypatch)
    k0, k1 = key_pair("weighted reservoir", 0)
    weights = np.array([weighted._exponential(weighted._uniform(p, k0, k1)) for p in range(200)])
    for cuts in ((), (1, 5, 6, 100), range(1, 200)):
        assert planned(weights, size, 0, cuts) == list(range(size))
    with WeightedReservoirBuffer(2 * size) as buffer:
        for start in range(0, 200, 11):
            buffer._policy_at = -1  # derive the heap anew
            buffer.add(samples(start, min(200, start + 11)), weights=weights[start : start + 11])
        assert held(buffer) == list(range(2 * size))
        buffer.resize(size)
        assert held(buffer) == list(range(size))


def test_the_short_way_out_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that are rejected without a logarithm are those that would be rejected with it."""
    streams = [(np.ldexp(1.0 + np.arange(3000) % 7, e), 20) for e in (-1070, -1000, -500, 0, 500, 1000)] + [(some_weights(3000), 50)]
    found = [planned(w, k, 1) for w, k in streams]
    as_python(monkeypatch, weighted)
    monkeypatch.setattr(weighted, "_bound", lambda key: np.inf)
    with np.errstate(over="ignore"):
        assert [planned(w, k, 1) for w, k in streams] == found


@pytest.mark.parametrize("v", [1, 3, 2**20 + 1, 2**33 + 1, 2**51 + 1, 2**53 - 1])
@pytest.mark.parametrize("weight", [TINY, 2.0**-1030, 1e-250, 1.0, 3e250, 2.0**1020, HUGE])
def test_by_a_hair(run: None, v: int, weight: float) -> None:
    """A sample enters if its key is better than the worst by one unit, however small or large both are, and only then."""
    x = fin_inverse((v - 1) // 2 << 12)  # the hash that leads to this v: choose k1 so that position 0 has it
    k0, k1 = np.uint64(7), np.uint64((x - fin(7)) & M64)
    assert weighted._uniform(0, k0, k1) * 2**53 == v
    best, weights = np.empty(1, np.uint64), np.array([weight])
    assert weighted.weighted_keys(np.zeros(1, np.int64), weights, k0, k1, best)
    for step in (1, 2, 2**20, 2**33, 2**44, 2**52):
        for sign in (1, -1):
            keys, kept, rows, out = best - np.uint64(sign * step & M64), np.array([9]), np.array([0]), np.empty(1, np.int64)
            used, size, dropped = weighted.plan_weighted(keys, kept, rows, 1, 1, k0, k1, 0, 5, weights, out)
            assert (used, size, dropped) == (1, 1, True)
            assert out[0] == (0 if sign == 1 else -1), (step, sign)


# -- the law -----------------------------------------------------------------------------------------------------------


def test_the_recursion() -> None:
    """Two of three samples of weights 1, 2, 3, by hand."""
    chances = law([1, 2, 3], 2)
    assert chances[frozenset({1, 2})] == Fraction(2, 6) * Fraction(3, 4) + Fraction(3, 6) * Fraction(2, 3)
    assert law([1, 1, 1, 1], 2) == dict.fromkeys(map(frozenset, itertools.combinations(range(4), 2)), Fraction(1, 6))


CASES = {
    "even": ([1, 1, 1, 1, 1, 1], 3),
    "few": ([1, 2, 3], 1),
    "rising": ([1, 2, 3, 4, 5], 2),
    "falling": ([5, 4, 3, 2, 1], 3),
    "one heavy": ([1, 1, 50, 1, 1], 2),
    "with zeros": ([0, 2, 0, 1, 3, 0, 1], 2),
    "denormal": ([Fraction(TINY) * w for w in (1, 2, 3, 4, 2)], 2),
    "huge": ([Fraction(2) ** 1021 * w for w in (1, 2, 3, 4, 2)], 2),
    "fewer than rows": ([1, 0, 2], 4),
}


@pytest.mark.parametrize("case", CASES)
def test_inclusion(case: str) -> None:
    """Every set that may stay does so with its exact probability, over 6,000 seeds."""
    weights, size = CASES[case]
    counts: dict[frozenset[int], int] = {}
    if case == "fewer than rows":
        assert all(planned([float(w) for w in weights], size, seed) == [0, 2] for seed in range(100))
        return
    for seed in range(6000):
        kept = frozenset(planned([float(w) for w in weights], size, seed, (2,)))
        counts[kept] = counts.get(kept, 0) + 1
    assert_law(counts, weights, size, case)


def test_the_test_notices_what_is_wrong() -> None:
    """A sample by v ** (1 / w) with the wrong order, one by E * w and one of the keys without their weights are noticed."""
    weights, size = [1, 2, 3, 4, 5], 2
    rng = np.random.default_rng(0)
    v = rng.random((20_000, 5))
    for wrong in (-np.log1p(-v), -np.log1p(-v) * weights, -np.log1p(-v) / np.sqrt(weights), v / weights):
        counts: dict[frozenset[int], int] = {}
        for kept in map(frozenset, np.argsort(wrong, 1)[:, :size].tolist()):
            counts[kept] = counts.get(kept, 0) + 1
        with pytest.raises(AssertionError):
            assert_law(counts, weights, size)


def test_inclusion_in_every_stream_and_moment() -> None:
    """One seed, far positions: 20,000 places in the streams, the law of what is held after 4, 5 and 6 samples."""
    weights = [3, 1, 1, 2, 4, 1]
    for n in (4, 5, 6):
        counts: dict[frozenset[int], int] = {}
        for place in range(20_000):
            start = ((place % 32768) << 48) + place * 6
            kept = frozenset(planned([float(w) for w in weights[:n]], 2, 9, start=start))
            counts[kept] = counts.get(kept, 0) + 1
        assert_law(counts, weights[:n], 2, f"after {n}")


def test_inclusion_in_buffers_after_resizing() -> None:
    """Shrunk and grown again in the middle of the stream, whole buffers hold the law of the smallest size (the capacity rule)."""
    weights = [2, 1, 3, 1, 2, 4]
    counts: dict[frozenset[int], int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CapacityWarning)
        for seed in range(300):
            with WeightedReservoirBuffer(4, seed=seed) as buffer:
                buffer.add(samples(0, 3), weights=weights[:3])
                buffer.resize(2)
                buffer.resize(5)
                buffer.add(samples(3, 6), weights=weights[3:])
                kept = frozenset(buffer.get_metadata("position").tolist())
                counts[kept] = counts.get(kept, 0) + 1
    assert_law(counts, weights, 2)


# -- buffers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "disk"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return None if request.param == "memory" else tmp_path / "w.h5"


@pytest.mark.parametrize("cuts", [1, 7, 300])
def test_any_batches(cuts: int, where: Path | None) -> None:
    """G2: in memory and on disk, by `add` and `update`, in any batches: the oracle's samples, each in the row it always has."""
    n, weights = 300, some_weights(300, 3)
    with WeightedReservoirBuffer(25, seed=4, stream=6) as one:
        one.add(samples(0, n), weights=weights)
        rows = one.get_metadata("position").tolist()
    with WeightedReservoirBuffer(25, where, seed=4, stream=6) as buffer:
        for start in range(0, n, cuts):
            stop = min(n, start + cuts)
            if start % 2:
                buffer.update([(x, int(y)) for x, y in zip(*samples(start, stop), strict=True)], weights=weights[start:stop])
            else:
                buffer.add(samples(start, stop), weights=weights[start:stop])
        assert held(buffer) == oracle(weights, 25, 4, 6)
        assert buffer.get_metadata("position").tolist() == rows
        assert buffer.seen == n


def test_the_weight_of_each_sample(where: Path | None) -> None:
    """`sample`, `get`, `[i]`, `get_metadata` and the file give each sample's weight, bit for bit."""
    weights = some_weights(100, 1)
    with WeightedReservoirBuffer(20, where) as buffer:
        buffer.add(samples(0, 100), weights=weights, metadata={"z": np.arange(100)})
        for _ in range(5):
            _, meta = buffer.sample(8)
            assert sorted(meta) == ["idx", "position", "weight", "z"]
            assert meta["weight"].dtype == np.float64
            assert (meta["weight"] == weights[meta["position"]]).all()
            assert (buffer.get_metadata("weight", meta["idx"]) == meta["weight"]).all()
        assert (buffer.get_metadata("weight") == weights[buffer.get_metadata("position")]).all()
        item = buffer[3][1]
        assert type(item["weight"]) is float
        assert item["weight"] == weights[item["position"]]
        again = pickle.loads(pickle.dumps(buffer))
        assert (again.get_metadata("weight") == buffer.get_metadata("weight")).all()
        again.close()
        if where is not None:
            h5py = pytest.importorskip("h5py")
            with h5py.File(where) as file:
                live = file["index/position"][:] >= 0
                assert (file["index/group"][:][live].view(np.float64) == buffer.get_metadata("weight")).all()


def test_going_on(where: Path | None, tmp_path: Path) -> None:
    """Reopened, resized, rolled back and loaded from a copy, it holds what the oracle says, and goes on from there."""
    weights = some_weights(200, 8)

    def feed(buffer: Any, stop: int) -> None:
        start = buffer.seen
        buffer.add(samples(start, stop), weights=weights[start:stop])

    with WeightedReservoirBuffer(20, where, seed=1) as buffer:
        feed(buffer, 60)
        state = buffer.state_dict()
        feed(buffer, 120)
        assert held(buffer) == oracle(weights[:120], 20, 1)
        buffer.load_state_dict(state)
        assert held(buffer) == oracle(weights[:60], 20, 1)
        buffer.save(tmp_path / "copy")
        feed(buffer, 120)
        buffer.resize(12)
        assert held(buffer) == oracle(weights[:120], 12, 1)
        feed(buffer, 150)
        assert held(buffer) == oracle(weights[:150], 12, 1)
        with pytest.warns(CapacityWarning, match="12"):
            buffer.resize(20)
        feed(buffer, 200)
        assert held(buffer) == oracle(weights, 12, 1)
    if where is not None:
        with leanreplay.open(where, "r+") as buffer:
            assert type(buffer) is WeightedReservoirBuffer
            buffer.add(samples(150, 260), weights=np.concatenate([weights[150:], np.full(60, HUGE)]), at=150)
            assert held(buffer) == oracle([*weights, *[HUGE] * 60], 12, 1)
    with WeightedReservoirBuffer(20, seed=1) as buffer:
        buffer.load(tmp_path / "copy")
        feed(buffer, 200)
        assert held(buffer) == oracle(weights, 20, 1)


def test_killed(tmp_path: Path) -> None:
    """G3: killed at any time, it opens, holds the oracle's samples of the first `seen`, and goes on to the same end."""
    path, n = tmp_path / "w.h5", 12_000
    weights = some_weights(n, 2)
    weights = np.where(weights < 1e-3, 1.0, np.minimum(weights, 4.0))
    for kill in range(12):
        pid = os.fork()
        if pid == 0:
            try:
                buffer = WeightedReservoirBuffer(40, path, mode="a", seed=2)
                for start in range(buffer.seen, n, 3):
                    buffer.add(samples(start, start + 3), weights=weights[start : start + 3])
            finally:
                os._exit(0)
        time.sleep(0.02 + 0.01 * kill)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if not path.exists():
            continue
        with WeightedReservoirBuffer(path=path, mode="r+") as buffer:
            assert held(buffer) == planned(weights[: buffer.seen], 40, 2)
    with WeightedReservoirBuffer(40, path, mode="a", seed=2) as buffer:
        start = buffer.seen
        buffer.add(samples(start, n), weights=weights[start:])
        assert held(buffer) == planned(weights, 40, 2)


def test_zero_weights() -> None:
    """They count as seen and are never kept; passing them over is no reason for the capacity rule."""
    with WeightedReservoirBuffer(5) as buffer:
        buffer.add(samples(0, 50), weights=np.zeros(50))
        assert (len(buffer), buffer.seen) == (0, 50)
        buffer.add(samples(50, 53), weights=[1, TINY, -0.0])
        buffer.add(samples(53, 300), weights=[0] * 247)
        assert held(buffer) == [50, 51]
        buffer.resize(2)
        buffer.add(samples(300, 310), weights=np.zeros(10))  # the buffer is full, and yet has dropped nothing
        assert buffer._store.policy[0] == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error", CapacityWarning)
            buffer.resize(30)
        buffer.add(samples(310, 330), weights=np.ones(20))
        assert held(buffer) == [50, 51, *range(310, 330)]
        assert buffer._store.policy[0] == 0
        buffer.add(samples(330, 350), weights=np.ones(20))
        assert len(buffer) == 30
        assert buffer._store.policy[0] == 30


def test_scale_does_not_matter() -> None:
    """Weights times a power of two keep the same samples, from denormal to huge ones."""
    weights = np.arange(1, 401) % 17 + 1.0
    wanted = planned(weights, 30, 0)
    assert wanted == oracle(weights, 30, 0)
    for e in (-1074, -1040, -1000, -300, 300, 1000, 1018):
        assert planned(np.ldexp(weights, e), 30, 0) == wanted, e


def test_only_survivors_are_loaded() -> None:
    """`update` asks the dataset for what stays, nothing else."""
    asked = []

    class Data:
        targets = np.zeros(1000)

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, i: int) -> Any:
            asked.append(i)
            return tuple(a[0] for a in samples(i, i + 1))

    with WeightedReservoirBuffer(10) as buffer:
        buffer.update(Data(), weights=np.ones(1000))
        assert held(buffer) == oracle(np.ones(1000), 10)
        assert sorted(asked[1:]) == held(buffer)  # the first was asked for the schema


@pytest.mark.parametrize("kind", ["list", "float32", "int", "tensor", "bool", "bfloat16", "strided"])
def test_weights_of_any_kind(kind: str) -> None:
    """Numbers of any type count as their doubles; the caller's array is not touched."""
    plain = np.array([1.0, 0.5, 0.0, 2.0, 4.0] * 10)
    given: Any = {
        "list": plain.tolist(),
        "float32": plain.astype(np.float32),
        "int": (plain * 2).astype(np.int64),
        "tensor": torch.tensor(plain, requires_grad=True),
        "bool": plain > 0,
        "bfloat16": torch.tensor(plain).float(),
        "strided": np.repeat(plain, 2)[::2],
    }[kind]
    wanted = {"int": plain * 2, "bool": (plain > 0) * 1.0}.get(kind, plain)
    with WeightedReservoirBuffer(6) as buffer:
        buffer.add(samples(0, 50), weights=given)
        assert held(buffer) == oracle(wanted, 6)
        assert (buffer.get_metadata("weight") == wanted[buffer.get_metadata("position")]).all()


@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        (None, ArgumentError, ["weights=(n,)", "ReservoirBuffer"]),
        ([1, -1, 2, 3], ArgumentError, ["weights[1]", "-1.0", "1 of 4"]),
        ([1, 2, math.nan, -1], ArgumentError, ["weights[2]", "nan", "2 of 4"]),
        ([1, 2, 3, math.inf], ArgumentError, ["weights[3]", "inf"]),
        ([1, 2, 3, -TINY], ArgumentError, ["weights[3]", "-5e-324"]),
        (np.array([1, 2, 3, HUGE * np.longdouble(4)], np.longdouble), ArgumentError, ["weights[3]", "inf"]),
        ([1, 2, 3], SchemaError, ["expected 4", "(3,)"]),
        (np.ones((4, 1)), SchemaError, ["expected 4", "(4, 1)"]),
        (2.0, SchemaError, ["expected 4", "()"]),
        (["a", "b", "c", "d"], SchemaError, ["expected 4 real numbers", "<U1"]),
        (np.ones(4, complex), SchemaError, ["real", "complex128"]),
        (np.ma.masked_array(np.ones(4), [0, 1, 0, 0]), SchemaError, ["weights", "masked", "filled"]),
        ([[1], [2, 3], [1], [1]], SchemaError, ["weights"]),
    ],
    ids=lambda v: str(v)[:24],
)
@pytest.mark.parametrize("how", ["add", "update"])
def test_refused_weights(weights: Any, error: type[Exception], words: list[str], how: str, tmp_path: Path) -> None:
    """Each is refused with its reason, for the first batch and for a later one; nothing of the batch is kept, no file appears."""
    path = tmp_path / "w.h5"
    with WeightedReservoirBuffer(5, path) as buffer:
        for _ in range(2):
            before = buffer.seen
            with pytest.raises(error) as caught:
                if how == "add":
                    buffer.add(samples(0, 4), weights=weights)
                else:
                    buffer.update([(x, int(y)) for x, y in zip(*samples(0, 4), strict=True)], weights=weights)
            assert all(word in str(caught.value) for word in words), caught.value
            assert buffer.seen == before
            assert path.exists() == bool(before)
            buffer.add(samples(0, 4), weights=np.ones(4))
        assert buffer.get_metadata("weight").tolist() == [1.0] * 5


def test_refused_otherwise() -> None:
    """`group` is no argument here, datasets need a length, "weight" is no name for metadata, whichever way it comes."""
    with WeightedReservoirBuffer(5) as buffer:
        with pytest.raises(TypeError, match="group"):
            buffer.add(samples(0, 4), weights=np.ones(4), group=np.ones(4))  # type: ignore[call-arg]
        with pytest.raises(ArgumentError, match="map-style"):
            buffer.update(iter([1]), weights=[1])
        with pytest.raises(SchemaError, match="weight"):
            buffer.add(samples(0, 4), weights=np.ones(4), metadata={"weight": np.ones(4)})
        with pytest.raises(leanreplay.RowError, match="empty"):
            buffer.get_metadata("weight")
        buffer.add(samples(0, 4), weights=np.ones(4))
        with pytest.raises(SchemaError, match="weight"):
            buffer.set_metadata("weight", np.ones(4))
        with pytest.raises(SchemaError, match="no metadata"):
            buffer.get_metadata("weights")
        buffer.set_metadata("loss", np.arange(4.0))
        assert (buffer.get_metadata("weight") == 1).all()
    with pytest.raises(SchemaError, match="weight"):
        WeightedReservoirBuffer(5, schema=Schema.from_sample(0, {"weight": 1.0}))


def test_a_file_that_lies() -> None:
    """Weights that no weighted reservoir can hold, with checksums that fit: an error, whatever is done next."""
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with WeightedReservoirBuffer(5) as buffer:
            buffer.add(samples(0, 4), weights=np.ones(4))
            store = buffer._store
            arrays, index = store.read(np.arange(4))
            index[1, 2] = np.array(wrong).view(np.int64)
            sources = [(np.ascontiguousarray(a).ravel().view(np.uint8), np.arange(4)) for a in arrays]
            store.commit(Change(4, store.policy, np.arange(4), index[0], index[1], sources))
            with pytest.raises(CorruptionError, match="weights"):
                buffer.add(samples(4, 8), weights=np.ones(4))
