"""Selection strategies: orders against a direct implementation of the definition; ties; input."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import torch
from compiled import call_helpers
from selection_oracle import FEATURES

from leanreplay import (
    ArgumentError,
    ClosestToCenterSelection,
    HerdingSelection,
    RandomSelection,
)
from leanreplay.kernels import herding
from leanreplay.policies import herding as ordering


def scaled(x):
    """Times a power of two, so that squares neither overflow nor underflow: that changes no rounding."""
    x = np.asarray(x, np.float64)
    return np.ldexp(x, -math.frexp(np.abs(x).max(initial=0.0))[1])


def direct(x, count=None):
    """Herding by the definition, in float64, as anybody would write it."""
    x = scaled(x)
    mean, chosen, taken, order = x.mean(0), np.zeros(x.shape[1]), np.zeros(len(x), bool), []
    for k in range(1, (len(x) if count is None else count) + 1):
        distance = np.linalg.norm(mean - (chosen + x) / k, axis=1)
        best = int(np.argmin(np.where(taken, np.inf, distance)))
        order.append(best)
        taken[best] = True
        chosen = chosen + x[best]
    return order


def direct_center(x):
    x = scaled(x)
    return np.argsort(np.linalg.norm(x - x.mean(0), axis=1), kind="stable").tolist()


def herd(x, count=None, **options):
    order = HerdingSelection(**options).sorted_indices(x, count)
    assert order.dtype == np.int64
    return order.tolist()


def center(x, count=None, **options):
    order = ClosestToCenterSelection(**options).sorted_indices(x, count)
    assert order.dtype == np.int64
    return order.tolist()


# -- orders ------------------------------------------------------------------------------------------------------------


RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(8, 3))
# Ties of equal rows and of distinct ones; cancellation; magnitudes whose squares overflow, underflow or differ beyond float64.
HARD = {
    "random": RNG.normal(size=(24, 4)),
    "one": RNG.normal(size=(1, 4)),
    "pair": RNG.normal(size=(2, 5)),
    "pairs": RNG.normal(size=(2, 40)),
    "constant": np.full((7, 3), 0.1),
    "zeros": np.zeros((5, 2)),
    "signed zeros": np.array([[0.0, 1.0], [-0.0, 1.0], [0.0, -1.0], [-0.0, 1.0], [0.0, -1.0], [0.0, 3.0]]),
    "integers": RNG.integers(0, 3, (40, 3)),
    "tenths": RNG.integers(0, 3, (30, 3)) * 0.1,
    "sums of tenths": RNG.integers(0, 3, (25, 3)) * 0.1 + RNG.integers(0, 2, (25, 3)) * 0.3,
    "roots": np.sqrt(RNG.integers(0, 3, (30, 3))),
    "cube": np.array(list(itertools.product([0.0, math.pi], repeat=4))),
    "cube off the grid": np.array(list(itertools.product([1.0, 1.0 + 2**-40], repeat=4))),
    "simplex": np.eye(10) * 0.3 + np.eye(10)[::-1] * 0.7,
    "repeated": POINTS[RNG.integers(0, 8, 30)],
    "mirrored": np.concatenate([POINTS, -POINTS]),
    "mirrored and swapped": np.concatenate([POINTS, -POINTS, POINTS[:, [1, 0, 2]], POINTS[:, [1, 0, 2]]]),
    "half": RNG.normal(size=(20, 1)).astype(np.float16),
    "far away": RNG.normal(size=(24, 4)) + 1e9,
    "far away and close": RNG.integers(0, 3, (24, 4)) * 2.0**-20 + 1e9 / 3,
    "outlier": np.concatenate([RNG.normal(size=(15, 3)), [[1e17, -1e17, 1e16]]]),
    "tiny": RNG.normal(size=(16, 3)) * 1e-200,
    "huge": RNG.normal(size=(16, 3)) * 1e200,
    "largest": np.array([[1.7e308, -1.7e308], [1.6e308, 1.7e308], [-1.7e308, 0.0], [0.0, 5e-324], [5e-324, 1.0]]),
    "denormal": RNG.integers(-3, 4, (16, 2)) * 5e-324,
    "every size": RNG.normal(size=(14, 3)) * 10.0 ** RNG.integers(-300, 300, (14, 3)),
    "one column": RNG.integers(0, 50, (30, 1)) / 7,
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.usefixtures("run", "path")
def test_hard_cases(name):
    x = HARD[name]
    order = direct(x)
    assert herd(x) == order
    for count in range(len(x)):
        assert herd(x, count) == order[:count]
    assert center(x) == direct_center(x)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("path")
def test_integers(seed):
    """Many duplicates and many ties of distinct rows."""
    rng = np.random.default_rng(seed)
    for n, d, high in ((300, 4, 3), (200, 6, 2), (300, 2, 9), (150, 40, 2)):
        x = rng.integers(-high if seed % 2 else 0, high + 1, (n, d))
        order = direct(x)
        assert herd(x) == order
        for dtype in (np.int8, np.float16, np.float32, np.float64, np.int64):
            assert herd(x.astype(dtype), 60) == order[:60]
        assert herd(x * 0.7, 90) == direct(x * 0.7, 90)
        assert center(x) == direct_center(x)


def test_pixels():
    for n, d in ((120, 3072), (60, 12)):
        x = np.random.default_rng(n).integers(0, 256, (n, d)).astype(np.uint8)
        assert herd(x) == direct(x)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (3, 2), (50, 8), (200, 64), (600, 5), (300, 512)])
@pytest.mark.usefixtures("path")
def test_random_direct(n, d, dtype):
    """The same order as a direct float64 implementation of the definition; rectified features too, which are far from the origin."""
    x = np.random.default_rng([n, d]).normal(size=(n, d)).astype(dtype)
    order = direct(x)
    assert herd(x) == order
    assert herd(x, n // 3) == order[: n // 3]
    assert center(x) == direct_center(x)
    y = np.maximum(x, 0) + dtype(0.5)
    assert herd(y) == direct(y)
    assert center(y) == direct_center(y)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.usefixtures("path")
def test_duplicates_direct(dtype):
    """Equal rows tie in any implementation: the lowest index first."""
    rng = np.random.default_rng(3)
    for n, distinct in ((200, 7), (200, 60), (300, 290), (90, 1)):
        x = rng.normal(size=(distinct, 16)).astype(dtype)[rng.integers(0, distinct, n)]
        order = herd(x)
        assert order == direct(x)
        assert center(x) == direct_center(x)
        for row in np.unique(x, axis=0):
            mine = [i for i in order if np.array_equal(x[i], row)]
            assert mine == sorted(mine)


def test_count_does_not_matter():
    """A few of many are chosen by products of all rows with one vector, many by a matrix: the order is one."""
    x = np.random.default_rng(5).normal(size=(1200, 24))
    x[600:] = x[:600]  # every row twice
    order = herd(x)
    for count in (1, 2, 20, 149, 150, 151, 152, 300, 1199, 1200, 5000, np.int64(7)):
        assert herd(x, count) == order[:count]
    assert 150 * ordering.STEPS_PER_MATRIX <= 1200 < 151 * ordering.STEPS_PER_MATRIX
    assert sorted(order) == list(range(1200))


def test_prefixes_have_the_mean():
    """What herding is for: the mean of 20 chosen is far closer to the mean of all than that of 20 random ones."""
    x = np.random.default_rng(0).normal(size=(2000, 32))
    gap = np.linalg.norm(x[herd(x, 20)].mean(0) - x.mean(0))
    assert gap < 0.5 * min(np.linalg.norm(x[RandomSelection(s).sorted_indices(x, 20)].mean(0) - x.mean(0)) for s in range(20))


def test_normalize():
    """Each row by its length first; rows of zeros stay."""
    x = np.random.default_rng(2).normal(size=(80, 6)) * np.random.default_rng(3).uniform(0.1, 10, (80, 1))
    y = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert herd(x, normalize=True) == direct(y) != direct(x)
    assert center(x, normalize=True) == direct_center(y) != direct_center(x)
    for scale in (1e-200, 1e200, 2.0**-1040):
        assert herd(x * scale, normalize=True, count=40)[:5] == direct(y)[:5]
    x[7] = 0
    x[9] = 0
    y[[7, 9]] = 0
    assert herd(x, normalize=True) == direct(y)
    assert herd(np.array([[3.0, 4], [6, 8], [3, 4]]), normalize=True) == [0, 1, 2]


@pytest.mark.parametrize("name", ["random", "mirrored", "integers", "cube", "far away", "tenths"])
def test_without_the_definition_ties_would_go_wrong(name, monkeypatch):
    """The scores alone cannot tell: where the case has ties of distinct rows, the definition is asked."""
    asked = []
    original = ordering.choose_by_definition
    monkeypatch.setattr(ordering, "choose_by_definition", lambda *a: asked.append(len(a[-1])) or original(*a))
    monkeypatch.setattr(ordering, "STEPS_PER_MATRIX", 10**9)
    herd(HARD[name])
    assert bool(asked and max(asked) > 1) == (name in ("mirrored", "integers", "cube", "tenths"))


@pytest.mark.parametrize("name", ["random", "repeated", "signed zeros", "constant", "integers"])
def test_marks_may_collide(name, monkeypatch):
    """A mark only says where to look for equal rows."""
    twins = ordering.find_twins
    monkeypatch.setattr(ordering, "find_twins", lambda phi, squares, marks: twins(phi, squares, np.zeros_like(marks)))
    monkeypatch.setattr(ordering, "STEPS_PER_MATRIX", 10**9)
    assert herd(HARD[name]) == direct(HARD[name])


@pytest.mark.usefixtures("run")
def test_marks_tell_rows_apart():
    """Of equal rows, and those that differ in the sign of a zero, only the first is looked at; each of the others has its turn."""
    x = np.random.default_rng(3).integers(-2, 3, (500, 6)).astype(np.float64)
    squares, marks = np.empty(500), np.empty(500)
    herding.measure(x, x.mean(axis=0), np.cos(np.arange(6.0)), squares, marks)
    assert np.allclose(squares, ((x - x.mean(axis=0)) ** 2).sum(axis=1)) and np.allclose(
        marks, (x - x.mean(axis=0)) @ np.cos(np.arange(6.0))
    )
    x[x == 0] *= np.random.default_rng(4).choice([-1.0, 1.0], (x == 0).sum())
    left, twin = ordering.find_twins(x, squares, marks)
    first: dict[tuple[float, ...], list[int]] = {}
    for i, row in enumerate(x.tolist()):
        first.setdefault(tuple(row), []).append(i)
    assert [i for same in first.values() for i in same[1:]] != [] and np.isfinite(left).sum() == len(first)
    for same in first.values():
        assert np.isfinite(left[same[0]]) and np.isinf(left[same[1:]]).all() and twin[same].tolist() == [*same[1:], -1]


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_make_rows(dtype):
    """Rows around their mean, divided by their lengths; those of length 0 are zeros."""
    w = RNG.normal(size=(50, 7))
    w[3] = 0
    lengths, rows = np.linalg.norm(w, axis=1), np.empty((50, 7), dtype)
    herding.make_rows(w + 3, np.full(7, 3.0), lengths, rows)
    np.testing.assert_allclose(rows, w / np.where(lengths > 0, lengths, 1)[:, None], rtol=1e-5, atol=1e-6)
    assert not rows[3].any()


class Herd:
    """The kernel alone, on rows of mean 0, with what it keeps from call to call."""

    def __init__(self, w, twin=None, matrix=True, dtype=np.float32):
        n, d = w.shape
        self.w, self.squares = w, (w * w).sum(axis=1)
        self.twin = np.full(n, -1, np.int64) if twin is None else twin
        self.left, self.dots, self.error = self.squares.copy(), np.zeros(n), np.zeros(3)
        self.total, self.moved = np.zeros(d), np.zeros(d)
        self.order, self.close = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.lengths = np.sqrt(self.squares)
        self.rows = (w / self.lengths[:, None]).astype(dtype)
        self.products = self.rows @ self.rows.T if matrix else np.empty((0, 0), dtype)

    def __call__(self, done, chosen=-1, rough=1e-6, allowed=10**9):
        return herding.herd(
            self.w, np.zeros(self.w.shape[1]), self.lengths, self.squares, self.rows, self.products, self.twin, self.left, self.dots,
            self.total, self.moved, self.error, self.order, done, self.w.shape[0], chosen, rough, self.lengths.max(), allowed, self.close,
        )  # fmt: skip


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("matrix", [True, False])
def test_herd_stops_in_doubt(matrix):
    """The kernel alone: it goes as far as scores are further apart than the slack, and says which rows are in question."""
    clear = Herd(np.array([[3.0], [-3], [1], [-0.5]]), matrix=matrix)
    assert clear(0) == (4, 0)
    assert clear.order.tolist() == [3, 2, 1, 0] and np.isinf(clear.left).all()

    tied = Herd(np.array([[3.0], [-3], [1], [-1]]), matrix=matrix)
    assert tied(0) == (0, 2) and sorted(tied.close[:2].tolist()) == [2, 3]
    assert tied(0, chosen=2) == (2, 2)  # -1 follows; then 3 and -3 tie
    assert tied.order[:2].tolist() == [2, 3] and sorted(tied.close[:2].tolist()) == [0, 1]
    assert tied.total.tolist() == [0.0] and np.abs(tied.dots[:2]).max() <= 3 * tied.error[0]
    assert tied(2, chosen=0) == (4, 0)
    assert tied.order.tolist() == [2, 3, 0, 1]

    equal = Herd(np.array([[1.0], [-2], [1]]), twin=np.array([2, -1, -1]), matrix=matrix)
    equal.left[2] = np.inf
    assert equal(0) == (3, 0)
    assert equal.order.tolist() == [0, 1, 2]


@pytest.mark.parametrize("single", [0.0, 2.0**-24])
def test_what_single_precision_cannot_tell(single, monkeypatch):
    """Scores that differ by less than float32 holds: exact ones decide, and are what makes the difference."""
    monkeypatch.setitem(ordering.ROUNDING, np.float32, single)
    x = np.random.default_rng(4).normal(size=(300, 32))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x = np.concatenate([x, -x]) * (1 + 1e-9 * np.random.default_rng(5).normal(size=(600, 1)))
    assert (herd(x) == direct(x)) == (single > 0)


@pytest.mark.parametrize("scale", [1e-80, 1e-25, 1.0, 1e25, 1e80])
def test_beyond_the_range_of_single_precision(scale, path):
    """Where squares fit into float64 but features, or their squares, not into float32."""
    x = np.random.default_rng(6).normal(size=(90, 7)) * scale
    assert herd(x) == direct(x)


def test_far_out():
    """So far from 0 that what the definition's sum loses to rounding grows with the square of the step, and decides."""
    for seed in (167, 239, 306, 383):
        rng = np.random.default_rng(seed)
        n, e = int(rng.integers(100, 260)), int(rng.integers(-8, 3))
        x = 1e6 + rng.normal(size=(n, 1)) * 10.0**e
        assert herd(x) == direct(x)
    for seed in range(1, 40):  # a few units in the last place apart
        rng = np.random.default_rng(seed)
        n, c = int(rng.integers(75, 150)), 10.0 ** rng.uniform(2, 14)
        x = c + np.spacing(c) * 2.0 ** rng.integers(0, 9) * rng.integers(0, int(rng.integers(2, 6)), (n, 1))
        assert herd(x) == direct(x)


@pytest.mark.parametrize("sign", [1, -1])
def test_one_sign_and_far_out(sign):
    """Squares that do not fit into float64, of numbers of one sign."""
    x = sign * np.abs(np.random.default_rng(7).normal(size=(40, 3))) * 1e200
    assert herd(x) == direct(x) and center(x) == direct_center(x)


@pytest.mark.usefixtures("run")
def test_the_worst_that_rough_products_could_be():
    """Each off by as much as is allowed, up or down."""
    rng = np.random.default_rng(8)
    x = rng.normal(size=(120, 5))
    w = x - x.mean(axis=0)
    for rough in (1e-5, 1e-3, 1e-2):
        found = Herd(w)
        found.products += (0.99 * rough * rng.choice([-1, 1], (120, 120))).astype(np.float32)
        assert found(0, rough=rough) == (120, 0)
        assert found.order.tolist() == direct(x)


@pytest.mark.usefixtures("run")
def test_no_more_exact_products_than_allowed():
    """Then rows in float64 are asked for, with nothing chosen wrongly before; where they are given, none are made."""
    x = np.random.default_rng(9).normal(size=(60, 5))
    w = x - x.mean(axis=0)
    found = Herd(w)
    done, doubt = found(0, rough=1e-2, allowed=20)
    assert doubt == -1 and 0 < done < 60 and found.order[:done].tolist() == direct(x)[:done] and 0 < found.error[2] <= 20
    double = Herd(w, dtype=np.float64)
    assert double(0, rough=1e-15, allowed=0) == (60, 0) and double.order.tolist() == direct(x) and double.error[2] == 0


@pytest.mark.parametrize("count", [None, 30])
def test_from_single_to_double(count, path, monkeypatch):
    """Where too many rows are close together for float32, the rest is done in float64; the order is the same."""
    made = []
    rows = ordering.unit_rows
    monkeypatch.setattr(ordering, "unit_rows", lambda *a: made.append(a[-1]) or rows(*a))
    x = np.eye(70) + 1e-6 * np.random.default_rng(1).normal(size=(70, 70))
    assert herd(x, count) == direct(x, count) and made == [np.float32, np.float64]
    made.clear()
    x = np.random.default_rng(1).normal(size=(70, 20))
    x[0] *= 1e4  # an outlier takes nothing from the others
    assert herd(x, count) == direct(x, count) and made == [np.float32]


def test_read_only_features_compile_nothing():
    """As they come from np.load(mmap_mode="r"), or a broadcast."""
    x = np.random.default_rng(0).normal(size=(30, 4))
    order = herd(x)
    before = [len(kernel.signatures) for kernel in (herding.measure, herding.make_rows, herding.herd)]
    x.flags.writeable = False
    assert herd(x) == order
    assert [len(kernel.signatures) for kernel in (herding.measure, herding.make_rows, herding.herd)] == before


@pytest.mark.parametrize("looks", [0, 8, 10**9])
def test_products_made_anew(looks, monkeypatch):
    """Rows by the dozen within what has been lost to rounding: then all products are made anew, or all rows are looked at closely."""
    monkeypatch.setattr(herding, "_LOOKS", looks)  # the uncompiled kernel reads it
    call_helpers(herding, monkeypatch)
    plain, anew = herding.herd.py_func, [0]
    dot = herding._dot

    def counted(a, b):
        anew[0] += a.dtype == np.float32
        return dot(a, b)

    monkeypatch.setattr(herding, "_dot", counted)
    monkeypatch.setattr(herding, "herd", plain)
    rng = np.random.default_rng(8)
    x = rng.normal(size=(120, 5))
    found = Herd(x - x.mean(axis=0))
    found.products += (0.99e-2 * rng.choice([-1, 1], (120, 120))).astype(np.float32)
    assert found(0, rough=1e-2) == (120, 0)
    assert found.order.tolist() == direct(x) and (anew[0] > 0) == (looks > 0)


# -- input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", FEATURES)
def test_kinds_of_input(strategy):
    x = np.random.default_rng(1).integers(0, 9, (30, 4))
    order = strategy().sorted_indices(x).tolist()
    dtypes = [np.bool_, *(np.dtype(c) for c in "bBhHiIlLefd"), np.dtype(">f4"), np.dtype(">i2")]
    for dtype in dtypes:
        y = x.astype(dtype)
        assert strategy().sorted_indices(y).tolist() == (strategy().sorted_indices(x > 0).tolist() if dtype == np.bool_ else order)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int64):
        tensor = torch.from_numpy(x).to(dtype)
        assert strategy().sorted_indices(tensor).tolist() == order
    assert strategy().sorted_indices(torch.from_numpy(x).float().requires_grad_()).tolist() == order
    assert strategy().sorted_indices(x.tolist()).tolist() == order
    assert strategy().sorted_indices(np.asfortranarray(x)).tolist() == order
    assert strategy().sorted_indices(np.repeat(x, 2, 1)[:, ::2]).tolist() == order
    assert strategy().sorted_indices(x[::-1][::-1]).tolist() == order
    fixed = x.astype(np.float64)
    fixed.setflags(write=False)
    assert strategy().sorted_indices(fixed).tolist() == order


@pytest.mark.parametrize("strategy", FEATURES)
def test_input_is_not_changed(strategy):
    for x in (np.random.default_rng(1).normal(size=(40, 4)), np.random.default_rng(1).normal(size=(40, 4)) + 1e6, np.ones((5, 2))):
        before = x.copy()
        for normalize in (False, True):
            strategy(normalize=normalize).sorted_indices(x)
        assert np.array_equal(x, before)


@pytest.mark.parametrize("strategy", FEATURES)
def test_empty_and_single(strategy):
    for d in (0, 1, 5):
        for count in (None, 0, 3):
            order = strategy().sorted_indices(np.zeros((0, d)), count)
            assert order.shape == (0,) and order.dtype == np.int64
        assert strategy().sorted_indices(np.ones((1, d))).tolist() == [0]
        assert strategy(normalize=True).sorted_indices(np.ones((1, d), np.float32), 5).tolist() == [0]
    assert strategy().sorted_indices(np.zeros((4, 0))).tolist() == [0, 1, 2, 3]
    assert strategy().sorted_indices(np.full((500, 3), 1 / 3)).tolist() == list(range(500))
    assert strategy().sorted_indices(np.ones((4, 2)), 0).tolist() == []


@pytest.mark.parametrize("strategy", FEATURES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(strategy, dtype, bad):
    """Refused, naming the row."""
    x = np.ones((10, 3), dtype)
    x[7, 1] = bad
    x[8, 0] = np.nan
    for count in (None, 0, 2):
        with pytest.raises(ArgumentError, match=rf"row 7 holds {bad} in column 1"):
            strategy().sorted_indices(x, count)


@pytest.mark.parametrize("strategy", FEATURES)
def test_wrong_input(strategy):
    s = strategy()
    for x in (np.zeros(3), np.zeros((2, 3, 4)), 5, np.float64(3)):
        with pytest.raises(ArgumentError, match=r"expected \(n, d\)"):
            s.sorted_indices(x)
    for x in (np.zeros((2, 2), complex), np.array([["a", "b"]]), np.zeros((2, 2), object), np.zeros((1, 1), "M8[s]")):
        with pytest.raises(ArgumentError, match="real numbers"):
            s.sorted_indices(x)
    if np.dtype(np.longdouble).itemsize > 8:
        with pytest.raises(ArgumentError, match="64 bits"):
            s.sorted_indices(np.zeros((2, 2), np.longdouble))
    for x in ([[1.0], [1.0, 2.0]], torch.zeros(2, 2, device="meta"), torch.zeros(2, 2).to_sparse()):
        with pytest.raises(ArgumentError, match="cannot become an array"):
            s.sorted_indices(x)
    with pytest.raises(ArgumentError, match="masked"):
        s.sorted_indices(np.ma.masked_array(np.zeros((2, 2)), mask=np.eye(2)))
    for count, words in ((-1, "from 0"), (1.0, "an integer"), (True, "an integer"), ("3", "an integer"), (2**63, "from 0")):
        for x in (np.zeros((3, 2)), np.zeros((0, 2))):
            with pytest.raises(ArgumentError, match=f"count must be {words}"):
                s.sorted_indices(x, count)


def test_memory():
    """No matrix of all products beyond the limit: here it would take 36 MB."""
    x = np.random.default_rng(0).normal(size=(3000, 4))
    tracemalloc.start()
    order = herd(x, 600)
    matrix = tracemalloc.get_traced_memory()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ordering, "MATRIX_BYTES", 35_000_000)
        tracemalloc.reset_peak()
        assert herd(x, 600) == order
        vectors = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert matrix > 36_000_000 and vectors < 4_000_000
