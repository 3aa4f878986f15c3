"""Which samples become exemplars: at random, by herding, the closest to the centre, or by a strategy of the user's own."""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import ArgumentError
from .kernels import herding, reservoir
from .keys import key_pair

__all__ = ["ClosestToCenterSelection", "FeatureBasedSelection", "HerdingSelection", "RandomSelection", "SelectionStrategy", "checked_order"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_GRAM_BYTES = 256 << 20  # the most that the products of all pairs of rows may take
_GRAM_WORTH = 32  # u * u * d in one product of matrices costs as much as u / 32 products of the matrix with a vector (both measured)
_PIECE = 1 << 20  # numbers looked at in one piece where temporary copies are made
_UNIT = 1.01 * 2.0**-53  # of rounding, and what terms of higher order may add
_SHORTEST = 2.0**-499  # shorter rows count as this long: their squares underflow, but what that loses is below 2.0**-53 * _SHORTEST**2


class Candidates(Protocol):
    """What a buffer gives a strategy to choose from."""

    seed: int

    def __len__(self) -> int: ...

    @property
    def positions(self) -> Ints:
        """(n,) stream positions."""

    @property
    def dataset(self) -> Any:
        """A map-style dataset of the samples."""

    def features(self) -> Any:
        """(n, d), worked out when asked for. Raises ArgumentError where there are none."""


class SelectionStrategy:
    """The base of strategies. One of your own overrides `sorted_indices`, or `sorted_indices_of` to look at the samples themselves.

    needs_features: False for a strategy that works without: a buffer then calls `sorted_indices_of`.
    uniform: True if each prefix of the order is a uniform sample of everything ranked so far; buffers then keep the capacity rule.

    >>> import numpy as np
    >>> class LargestNorm(SelectionStrategy):
    ...     def sorted_indices(self, features, count=None):
    ...         return np.argsort(-np.linalg.norm(features, axis=1), kind="stable")[:count]
    >>> LargestNorm().sorted_indices(np.array([[1.0, 0], [3, 4], [0, 2]]))
    array([1, 2, 0])
    """

    needs_features: bool = True
    uniform: bool = False

    def sorted_indices(self, features: Any, count: int | None = None) -> Ints:
        """Indices of samples, (k,) int64, the best first, given their features, (n, d): all of them, or the first `count`."""
        raise ArgumentError(
            f"{type(self).__name__} does not choose by features: use sorted_indices_of(dataset), or override "
            "sorted_indices(features, count)"
        )

    def sorted_indices_of(self, dataset: Any, count: int | None = None) -> Ints:
        """The same for strategies that look at the samples: `dataset` has len() and [i]."""
        raise ArgumentError(
            f"{type(self).__name__} does not look at samples: give sorted_indices their features, or override "
            "sorted_indices_of(dataset, count)"
        )

    def order(self, candidates: Candidates, count: int | None = None) -> Ints:
        """What a buffer calls, for the samples of one group: `sorted_indices` of their features, or `sorted_indices_of` the samples."""
        mine = type(self)
        by_features = mine.sorted_indices is not SelectionStrategy.sorted_indices
        by_samples = mine.sorted_indices_of is not SelectionStrategy.sorted_indices_of
        if by_samples and not (by_features and self.needs_features):
            return self.sorted_indices_of(candidates.dataset, count)
        return self.sorted_indices(candidates.features(), count)


def checked_order(order: Any, n: int, strategy: Any) -> Ints:
    """An order that a strategy gave for n samples, as (k,) int64. Raises ArgumentError unless it is distinct integers from 0 to n - 1."""
    name = type(strategy).__name__
    array = _array(order, f"the order from {name}")
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ArgumentError(f"{name} must give the indices of samples, (k,) integers, got {array.dtype} of shape {array.shape}")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < n:
        raise ArgumentError(f"{name} must give indices from 0 to {n - 1}, got from {array.min()} to {array.max()}")
    checked = array.astype(np.int64)
    times = np.bincount(checked, minlength=1)
    if times.max() > 1:
        raise ArgumentError(f"{name} must give every index at most once, got {times.argmax()} {times.max()} times")
    return checked


class RandomSelection(SelectionStrategy):
    """A uniform random order. Features are not looked at.

    In a buffer the order is that of the reservoir keys of the samples' stream positions, with the buffer's seed: so each group is at
    every moment an exact uniform sample of everything it was fed. Elsewhere it depends on `seed` and the number of samples alone.

    >>> RandomSelection(seed=1).sorted_indices(np.zeros((6, 2)), count=3)
    array([2, 3, 1])
    """

    needs_features = False
    uniform = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = _integer("seed", seed, -(2**127), 2**127 - 1)

    def sorted_indices(self, features: Any, count: int | None = None) -> Ints:
        """The order of len(features) samples. O(n log n)."""
        n = _length(features)
        return _by_key(np.arange(n, dtype=np.int64), "random selection", self.seed)[: _count(count, n)]

    def sorted_indices_of(self, dataset: Any, count: int | None = None) -> Ints:
        """The order of len(dataset) samples, which are not looked at."""
        return self.sorted_indices(dataset, count)

    def order(self, candidates: Candidates, count: int | None = None) -> Ints:
        """Largest reservoir key first."""
        positions = np.ascontiguousarray(candidates.positions, np.int64)
        return _by_key(positions, "reservoir", candidates.seed)[: _count(count, len(candidates))]


class FeatureBasedSelection(SelectionStrategy):
    """The base of strategies that choose by features: overrides `sorted_indices`, and may hold what makes the features.

    model, layer: a torch module and the name of one of its layers (`model.named_modules()`), whose activations are the features where
    none are given. batch_size: samples that go through the model at a time. transform: makes of a batch of inputs, a tensor (B, ...), what
    the model wants (`lambda x: x.float() / 255` for images stored as uint8); default: inputs as they are.
    """

    def __init__(
        self, model: Any = None, layer: str | None = None, *, batch_size: int = 256, transform: Callable[[Any], Any] | None = None
    ) -> None:
        if (model is None) != (layer is None):
            raise ArgumentError(f"model and layer go together: got model={type(model).__name__}, layer={layer!r:.200}")
        self.model, self.layer, self.transform = model, layer, transform
        self.batch_size = _integer("batch_size", batch_size, 1, 2**63 - 1)

    def features_of(self, dataset: Any) -> npt.NDArray[np.float32]:
        """(n, d) float32: the layer's activations for the samples (the first element of each); see `leanreplay.torch.features`."""
        if self.model is None:
            raise ArgumentError(
                f"{type(self).__name__} chooses by features: give them, as (n, d), or make it with a model and the name of a layer: "
                f"{type(self).__name__}(model, layer)"
            )
        # The core never imports torch (it may be missing, and takes a second): only who has a torch model in hand comes here.
        module = importlib.import_module("leanreplay.torch.features")
        return module.features(self.model, self.layer, dataset, self.batch_size, transform=self.transform, progress=False)

    def sorted_indices_of(self, dataset: Any, count: int | None = None) -> Ints:
        """`sorted_indices` of the activations of the layer. One pass of the samples through the model."""
        return self.sorted_indices(self.features_of(dataset), count)


class HerdingSelection(FeatureBasedSelection):
    """Herding, as in iCaRL (Rebuffi et al. 2017, "iCaRL: Incremental Classifier and Representation Learning", algorithm 4).

        p_k = argmin over x of || mu - (phi(x) + phi(p_1) + ... + phi(p_{k-1})) / k ||

    over the samples not chosen yet, mu being the mean of all phi(x): each prefix of the order has a mean close to mu.

    The order is that of the definition in exact arithmetic on the features, taken as float64; of samples that tie exactly, such as equal
    rows, the lowest index comes first. So it depends neither on `count` nor on the machine. (A direct implementation in float64
    gives the same order except where two distinct rows are closer to a tie than its rounding.)

    normalize: divide each row by its Euclidean length first, in float64 (rows of zeros stay), as iCaRL does; default: features as given.
    model, layer, batch_size, transform: as for `FeatureBasedSelection`.

    Costs, n samples of d features: one matrix product of n * n * d and n steps of O(n) for a full order (0.05 s for n=2,000, d=512 on two
    cores), or a matrix-vector product, O(n * d), for each of the first few. Memory: a float64 copy of features of other dtypes, and
    8 * n * n bytes for the matrix, where that is at most 256 MB; else there is a matrix-vector product for each step. Distinct rows that
    tie cost 0.1 ms each and step at d=512, unless all features are small multiples of one number (integers, say): then nothing.

    >>> HerdingSelection().sorted_indices(np.array([[0.0], [1], [2], [3], [9]]))
    array([3, 2, 1, 4, 0])
    """

    def __init__(self, model: Any = None, layer: str | None = None, *, normalize: bool = False, **options: Any) -> None:
        super().__init__(model, layer, **options)
        self.normalize = bool(normalize)

    def sorted_indices(self, features: Any, count: int | None = None) -> Ints:
        """The order, (min(count, n),) int64. features: (n, d) of any real dtype up to 64 bits, finite. Raises ArgumentError otherwise."""
        x = _checked_features(features)
        stop = _count(count, x.shape[0])
        if stop == 0:
            return np.zeros(0, np.int64)
        return _herd(_Rows(x, self.normalize, stop), stop)


class ClosestToCenterSelection(FeatureBasedSelection):
    """Samples by the distance of their features from the mean of all, the closest first.

    The order is that of exact arithmetic on the features, taken as float64; where distances tie, the lowest index comes first.
    All arguments are those of `HerdingSelection`. Costs O(n * d), and a float64 copy of features of other dtypes.

    >>> ClosestToCenterSelection().sorted_indices(np.array([[0.0], [1], [2], [3], [9]]))
    array([3, 2, 1, 0, 4])
    """

    def __init__(self, model: Any = None, layer: str | None = None, *, normalize: bool = False, **options: Any) -> None:
        super().__init__(model, layer, **options)
        self.normalize = bool(normalize)

    def sorted_indices(self, features: Any, count: int | None = None) -> Ints:
        """The order, (min(count, n),) int64. features: (n, d) of any real dtype up to 64 bits, finite. Raises ArgumentError otherwise."""
        x = _checked_features(features)
        stop = _count(count, x.shape[0])
        if stop == 0:
            return np.zeros(0, np.int64)
        rows = _Rows(x, self.normalize, 1)
        places = rows.places(rows.scores - 2 * rows.drift)[rows.of]
        return np.lexsort((np.arange(x.shape[0]), places))[:stop].astype(np.int64)


# -- input -------------------------------------------------------------------------------------------------------------


def _array(values: Any, name: str) -> np.ndarray[Any, Any]:
    """Lists, arrays and tensors on any device as an array. Raises ArgumentError for what cannot become one."""
    try:
        if hasattr(values, "detach"):
            values = values.detach().cpu()
            # NumPy knows no bfloat16; float32 holds all of it.
            return np.asarray(values.float().numpy() if str(values.dtype) == "torch.bfloat16" else values.resolve_neg().numpy())
        if isinstance(values, np.ma.MaskedArray):
            raise ArgumentError(f"{name}: a masked array has no values where it is masked; use .filled(value), or leave those rows out")
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(f"{name}: {type(values).__name__} cannot become an array: {error}") from None


def _checked_features(features: Any) -> Floats:
    """(n, d) float64, C-contiguous, finite."""
    array = _array(features, "features")
    if array.ndim != 2:
        raise ArgumentError(f"features: expected (n, d), one row for each sample, got shape {array.shape}; flatten with reshape(n, -1)")
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise ArgumentError(f"features: expected real numbers of up to 64 bits, got {array.dtype}; convert them: astype('float64')")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row, column = np.argwhere(~np.isfinite(array))[0]
        raise ArgumentError(
            f"features: row {row} holds {array[row, column]} in column {column}; every number must be finite: leave such samples out, or "
            "look for the layer that made it"
        )
    return np.ascontiguousarray(array, np.float64)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ArgumentError(f"{name} must be an integer, got {value!r:.200}") from None
    if not low <= number <= high:
        raise ArgumentError(f"{name} must be from {low} to {high}, got {number}")
    return number


def _count(count: Any, n: int) -> int:
    """How many of n indices are wanted."""
    return n if count is None else min(n, _integer("count", count, 0, 2**63 - 1))


def _length(values: Any) -> int:
    try:
        return len(values)
    except TypeError:
        raise ArgumentError(f"expected features, (n, d), or a dataset with len(), got {type(values).__name__}") from None


def _by_key(positions: Ints, purpose: str, seed: int) -> Ints:
    """Indices of positions, the largest key first. Keys never tie."""
    keys = np.empty(positions.shape[0], np.uint64)
    reservoir.position_keys(positions, *key_pair(purpose, seed), keys)
    return np.argsort(keys)[::-1].astype(np.int64)


# -- distances from the mean, as far as they decide ------------------------------------------------------------------------


class _Rows:
    """The distinct rows of features, and their products: rounded with a known bound, or, on a grid, not rounded at all.

    With r = k * mean - sum of those chosen, || r - x || orders rows as |x|^2 - 2 r x does. The scores of all rows are known up to
    an error bound from a few products. `Exact` decides where the bound does not.
    """

    def __init__(self, x: Floats, normalize: bool, steps: int) -> None:
        self.n, d = x.shape
        self.first, self.of, self.follow = _distinct(x)
        u = self.first.shape[0]
        counts = np.bincount(self.of, minlength=u).astype(np.float64)
        y = x if u == self.n else x[self.first]
        if normalize:
            y = _normalized(y)
        self.exact = Exact(y, counts)
        w, exponent, squares = _well_scaled(y)
        # Sums of up to 4 * n * (steps + 1) products of rows: integers below 2**53 add up exactly, in any order.
        share = 2.0**53 / (4.0 * self.n * (steps + 1))
        least = math.sqrt(squares.max() / share)
        grid = _common_divisor(y, math.ldexp(min(least, 0.5), exponent) if exponent else least)
        whole = y / grid if grid else y
        self.rounded = not grid or _squares(whole).max() > share
        if self.rounded:
            mean = counts @ w / self.n
            spread = counts @ squares / self.n
            if spread - mean @ mean < spread / 16:  # far from the origin: distances would cancel
                w = w - mean
                mean = counts @ w / self.n
                squares = _squares(w)
            self.weight, self.scores, self.drift = 1.0, squares, w @ mean
        else:
            w, squares = whole, _squares(whole)
            self.weight, self.scores, self.drift = float(self.n), self.n * squares, w @ (counts @ w)
        self.w = w
        self.lengths = np.maximum(np.sqrt(squares), _SHORTEST)
        self.mean_length = float(counts @ self.lengths) / self.n
        self.terms = d + u
        self.unit = _UNIT if self.rounded else 0.0

    def bound(self, k: int, total: float) -> Floats:
        """How far scores of step k may be off, `total` being the sum of the lengths of rows chosen: the same as in `herding.herd`.

        The score is |x|^2, less k times 2 m x, plus 2 p x for each p chosen. A product of d numbers is off by (d + 3) u |p| |x| at most,
        rounding of the rows themselves included; the mean by (u + 3) units of the mean length; and each of 2 k additions by a
        unit of a partial sum, at most |x| (|x| + 2 k * mean length + 2 * total). (Higham 2002, "Accuracy and Stability", ch. 3.)
        """
        a = self.unit * (2.0 * k * self.mean_length * (self.terms + 4 + 2 * k) + 2.0 * total * (self.terms + 3 + 2 * k))
        b = self.unit * (self.terms + 4 + 2 * k)
        return self.lengths * (a + b * self.lengths)

    def places(self, scores: Floats) -> Ints:
        """The place of each distinct row in the order of scores at step 1, (u,); the same place for rows that tie exactly."""
        if not self.rounded:
            return np.unique(scores, return_inverse=True)[1].reshape(-1)
        bound = self.bound(1, 0.0)
        order = np.argsort(scores - bound)
        highest = np.maximum.accumulate((scores + bound)[order])
        # A run of rows whose intervals overlap ends where all before are surely less than all after.
        ends = np.concatenate([np.flatnonzero(highest[:-1] < (scores - bound)[order[1:]]) + 1, [order.shape[0]]])
        places = np.empty(order.shape[0], np.int64)
        places[order] = np.arange(order.shape[0])
        for begin, end in pairwise([0, *ends.tolist()]):
            if end - begin > 1:
                run = order[begin:end]
                exact = list(self.exact.scores(run, 1, run[:0]))
                place = {score: begin + i for i, score in enumerate(sorted(set(exact)))}
                places[run] = [place[score] for score in exact]
        return places


def _herd(rows: _Rows, stop: int) -> Ints:
    """The first `stop` indices of the order. Uses up the scores of `rows`."""
    u = rows.first.shape[0]
    order, head = np.empty(stop, np.int64), rows.first.copy()
    whole = stop * _GRAM_WORTH > u and 8 * u * u <= _GRAM_BYTES
    products: Floats = rows.w @ rows.w.T if whole else np.empty((1, u))
    step, last, total = 0, 0, 0.0
    while step < stop:
        if step and not whole:
            np.dot(rows.w, rows.w[last], out=products[0])
        aim = stop if whole else step + 1
        step, last, total = herding.herd(
            products, last if whole else 0, step, aim, rows.weight, rows.drift, rows.lengths, total, rows.mean_length, rows.terms,
            rows.unit, rows.scores, head, rows.follow, order,
        )  # fmt: skip
        if step < aim:  # too close to call
            bound = rows.bound(step + 1, total)
            among = np.flatnonzero(rows.scores - bound <= (rows.scores + bound).min())
            exact = rows.exact.scores(among, step + 1, rows.of[order[:step]])
            _, order[step], last = min(zip(exact, head[among].tolist(), among.tolist(), strict=True))
            head[last] = rows.follow[order[step]]
            if head[last] < 0:
                rows.scores[last] = np.inf
            total += float(rows.lengths[last])
            step += 1
    return order


def _distinct(x: Floats) -> tuple[Ints, Ints, Ints]:
    """Lowest index of each distinct row, (u,); for each index, (n,), its distinct row, and the next index of an equal row, or -1.

    Where all are distinct the rows stand in their own order.
    """
    n, d = x.shape
    factors, hashes = np.empty(d, np.uint64), np.empty(n, np.uint64)
    reservoir.position_keys(np.arange(d), *key_pair("equal rows", 0), factors)
    herding.hash_rows(x.view(np.uint64), factors | np.uint64(1), hashes)
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    none = np.full(n, -1, np.int64)
    if not same.shape[0]:
        return np.arange(n), np.arange(n), none
    piece = max(1, _PIECE // max(d, 1))
    pairs = (same[i : i + piece] for i in range(0, same.shape[0], piece))
    if all(np.array_equal(x[order[p]], x[order[p + 1]]) for p in pairs):
        new = np.ones(n, bool)
        new[same + 1] = False
        labels = np.empty(n, np.int64)
        labels[order] = np.cumsum(new) - 1
    else:  # distinct rows of one hash
        labels = np.unique(x + 0.0, axis=0, return_inverse=True)[1].reshape(-1)  # + 0.0: of -0.0 too
        order = np.argsort(labels, kind="stable")
    _, first = np.unique(labels, return_index=True)
    if first.shape[0] == n:
        return np.arange(n), np.arange(n), none
    equal = labels[order[1:]] == labels[order[:-1]]
    none[order[:-1][equal]] = order[1:][equal]
    return first, labels, none


def _normalized(y: Floats) -> Floats:
    """Rows divided by their lengths; rows of zeros stay."""
    y = np.ldexp(y, -np.frexp(np.abs(y).max(axis=1, keepdims=True, initial=0.0))[1])  # exact, so that no square overflows
    lengths = np.sqrt(_squares(y))
    return y / np.where(lengths > 0, lengths, 1.0)[:, None]


def _squares(y: Floats) -> Floats:
    """Squared lengths of rows, (u,)."""
    return np.einsum("ij,ij->i", y, y)


def _well_scaled(y: Floats) -> tuple[Floats, int, Floats]:
    """y / 2**e for an e such that squares stay within float64 (0 if they do); e; and the squared lengths of rows."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = _squares(y)
    if 2.0**-600 < squares.max() < 2.0**600:
        return y, 0, squares
    exponent = math.frexp(max(float(y.max(initial=0.0)), -float(y.min(initial=0.0))))[1]
    y = np.ldexp(y, -exponent)
    return y, exponent, _squares(y)


def _common_divisor(y: Floats, least: float) -> float:
    """The largest number of which all of y are exact multiples (1 if all are 0), or 0 if that is less than `least`. Most often O(1)."""
    values, divisor, begin, size = y.reshape(-1), 0.0, 0, 64
    while begin < values.shape[0]:
        piece = np.abs(values[begin : begin + size])
        begin, size = begin + size, _PIECE
        rest = piece
        while (found := rest[rest > 0]).shape[0]:
            low = float(found.min())
            while low > 0:  # Euclid's algorithm: fmod is exact
                divisor, low = low, math.fmod(divisor, low) if divisor else 0.0
            if divisor < least:
                return 0.0
            if (math.frexp(divisor)[0] * 2.0**27).is_integer():
                # Quotients are below 2**26, so this product is exact, and so is the difference. fmod takes five times as long.
                rest = np.abs(piece - np.rint(piece / divisor) * divisor)
            else:
                rest = np.fmod(piece, divisor)
    return divisor or 1.0


class Exact:
    """Scores without rounding, as Python integers: for the few rows that rounded ones do not tell apart. y: (u, d), counts: (u,).

    Every number of y is an integer times 2**low. The first score costs O(u * d), each 0.1 ms at d=512.
    """

    def __init__(self, y: Floats, counts: Floats) -> None:
        self.y, self.counts, self.n = y, counts, int(counts.sum())
        self.low = 0
        self.sum: list[int] = []
        self.chosen = [0] * y.shape[1]
        self.taken = 0

    def scores(self, among: Ints, k: int, chosen: Ints) -> Iterator[int]:
        """n * |x|^2 - 2 * (k * sum of all - n * sum of chosen) x, for each of the rows `among`.

        chosen: (k - 1,) rows; those of the call before come first.
        """
        if not self.sum:
            least = min(float(np.min(p, where=p > 0, initial=1.0)) for p in map(np.abs, self._pieces(self.y)))
            self.low = max(math.frexp(least)[1] - 53, -1074)
            self.sum = self._total(self.y, self.counts)
        more = chosen[self.taken :]
        self.chosen = [a + b for a, b in zip(self.chosen, self._total(self.y[more], np.ones(more.shape[0])), strict=True)]
        self.taken = chosen.shape[0]
        n = self.n
        twice = [2 * (k * a - n * b) for a, b in zip(self.sum, self.chosen, strict=True)]
        for i in among.tolist():
            yield sum(v * (n * v - t) for v, t in zip(self._integers(self.y[i], 0), twice, strict=True))

    @staticmethod
    def _pieces(y: Floats) -> Iterator[Floats]:
        rows = max(1, _PIECE // max(y.shape[1], 1))
        return (y[i : i + rows] for i in range(0, y.shape[0], rows))

    def _integers(self, values: Floats, shift: int) -> Iterable[int]:
        """values * 2**(shift - low), which are integers."""
        mantissas, exponents = np.frexp(values)
        for m, e in zip((mantissas * 2.0**53).astype(np.int64).tolist(), exponents.tolist(), strict=True):
            s = e - 53 + shift - self.low
            yield m << s if s >= 0 else m >> -s

    def _total(self, y: Floats, counts: Floats) -> list[int]:
        """Sums over columns, row i taken counts[i] times: exact, as integers times 2**low."""
        total = [0] * y.shape[1]
        bits = 52 - self.n.bit_length()  # sums of n integers up to 2**bits are exact
        begin = 0
        for piece in self._pieces(y):
            rest, times = piece, counts[begin : begin + piece.shape[0]]
            begin += piece.shape[0]
            while (top := float(np.abs(rest).max(initial=0.0))) > 0:
                shift = max(math.frexp(top)[1] - bits, self.low)
                high = np.rint(np.ldexp(rest, -shift))
                total = [a + b for a, b in zip(total, self._integers(times @ high, shift), strict=True)]
                rest = rest - np.ldexp(high, shift)
        return total
