"""Keys of weighted reservoirs: the law of Efraimidis and Spirakis, exactly, for any weights that a double can hold."""

from __future__ import annotations

import decimal
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import pytest
from compiled import as_python, call_helpers
from weighted_oracle import HUGE, M64, TINY, exponential, fin, held, oracle, planned, samples, some_weights

from leanreplay import (
    CapacityWarning,
    WeightedReservoirBuffer,
)
from leanreplay.kernels import weighted
from leanreplay.keys import key_pair

LIMIT = 4.5  # of z: 1 in 300,000 for a right implementation with new seeds; these seeds are fixed


def fin_inverse(x: int) -> int:
    """What `fin` came from."""
    x ^= x >> 31 ^ x >> 62
    x = x * pow(0x94D049BB133111EB, -1, 2**64) & M64
    x ^= x >> 27 ^ x >> 54
    x = x * pow(0xBF58476D1CE4E5B9, -1, 2**64) & M64
    return x ^ x >> 30 ^ x >> 60


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
        found = weighted.exponential_of(k / 2**53)
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
    with np.errstate(over="ignore"):  # E / w = 1 for all
        weights = np.array([weighted.exponential_of(weighted.uniform_of(max(p, 0), k0, k1)) for p in positions.tolist()])
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
    weights = np.array([weighted.exponential_of(weighted.uniform_of(p, k0, k1)) for p in range(200)])
    for cuts in ((), (1, 5, 6, 100), range(1, 200)):
        assert planned(weights, size, 0, cuts) == list(range(size))
    with WeightedReservoirBuffer(2 * size) as buffer:
        for start in range(0, 200, 11):
            buffer.feeder.forget_policy()  # derive the heap anew
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
    assert weighted.uniform_of(0, k0, k1) * 2**53 == v
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
