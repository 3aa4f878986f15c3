"""Which samples become exemplars: at random, by herding, the closest to the centre, or by a
strategy of the user's own."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..arguments import required
from ..arrays import Floats, Ints
from ..errors import ArgumentError
from ..kernels import herding, reservoir
from ..keys import key_pair

__all__ = ["ClosestToCenterSelection", "FeatureBasedSelection", "HerdingSelection", "RandomSelection", "SelectionStrategy", "checked_order"]


_MATRIX_BYTES = 256 << 20  # the most that the products of all pairs of rows may take
_STEPS_PER_MATRIX = 8  # all of them in one product cost as much as n / 8 products of the rows with a vector (measured)
_ROUNDING = {np.float32: 2.0**-24, np.float64: 2.0**-53}


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
    """The base of strategies. One of your own overrides `sorted_indices`, or `sorted_indices_of` to
    look at the samples themselves.

    needs_features: False for a strategy that works without: a buffer then calls
        `sorted_indices_of`.
    uniform: True if each prefix of the order is a uniform sample of everything ranked so far;
        buffers then keep the capacity rule.

    >>> import numpy as np
    >>> class LargestNorm(SelectionStrategy):
    ...     def sorted_indices(self, features, count=None):
    ...         return np.argsort(-np.linalg.norm(features, axis=1), kind="stable")[:count]
    >>> LargestNorm().sorted_indices(np.array([[1.0, 0], [3, 4], [0, 2]]))
    array([1, 2, 0])
    """

    needs_features: bool = True
    uniform: bool = False

    @property
    def name(self) -> str:
        """What a buffer's file says of its strategy, and compares when it is opened with one
        again."""
        return type(self).__name__

    def sorted_indices(self, features: Any, count: int | None = None) -> Ints:
        """Indices of samples, (k,) int64, the best first, given their features, (n, d): all of
        them, or the first `count`."""
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
        """What a buffer calls, for the samples of one group: `sorted_indices` of their features, or
        `sorted_indices_of` the samples."""
        mine = type(self)
        by_features = mine.sorted_indices is not SelectionStrategy.sorted_indices
        by_samples = mine.sorted_indices_of is not SelectionStrategy.sorted_indices_of
        if by_samples and not (by_features and self.needs_features):
            return self.sorted_indices_of(candidates.dataset, count)
        return self.sorted_indices(candidates.features(), count)


def checked_order(order: Any, n: int, strategy: Any) -> Ints:
    """An order that a strategy gave for n samples, as (k,) int64. Raises ArgumentError unless it is
    distinct integers from 0 to n - 1."""
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

    In a buffer the order is that of the reservoir keys of the samples' stream positions, with the
    buffer's seed: so each group is at every moment an exact uniform sample of everything it was
    fed. Elsewhere it depends on `seed` and the number of samples alone.

    >>> RandomSelection(seed=1).sorted_indices(np.zeros((6, 2)), count=3)
    array([2, 3, 1])
    """

    needs_features = False
    uniform = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = required("seed", seed, -(2**127), 2**127 - 1)

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
    """The base of strategies that choose by features: overrides `sorted_indices`, and may hold what
    makes the features.

    model, layer: a torch module and the name of one of its layers (`model.named_modules()`), whose
    activations are the features where none are given. batch_size: samples that go through the model
    at a time. transform: makes of a batch of inputs, a tensor (B, ...), what the model wants
    (`lambda x: x.float() / 255` for images stored as uint8); default: inputs as they are.
    """

    def __init__(
        self, model: Any = None, layer: str | None = None, *, batch_size: int = 256, transform: Callable[[Any], Any] | None = None
    ) -> None:
        if (model is None) != (layer is None):
            raise ArgumentError(f"model and layer go together: got model={type(model).__name__}, layer={layer!r:.200}")
        self.model, self.layer, self.transform = model, layer, transform
        self.batch_size = required("batch_size", batch_size, 1, 2**63 - 1)

    def features_of(self, dataset: Any) -> npt.NDArray[np.float32]:
        """(n, d) float32: the layer's activations for the samples (the first element of each); see
        `leanreplay.torch.features`."""
        if self.model is None:
            raise ArgumentError(
                f"{type(self).__name__} chooses by features: give them, as (n, d), or make it with a model and the name of a layer: "
                f"{type(self).__name__}(model, layer)"
            )
        # The core never imports torch (it may be missing, and takes a second): only who has a torch
        # model in hand comes here.
        module = importlib.import_module("leanreplay.torch.features")
        return module.features(self.model, self.layer, dataset, self.batch_size, transform=self.transform, progress=False)

    def sorted_indices_of(self, dataset: Any, count: int | None = None) -> Ints:
        """`sorted_indices` of the activations of the layer. One pass of the samples through the
        model."""
        return self.sorted_indices(self.features_of(dataset), count)


class HerdingSelection(FeatureBasedSelection):
    """Herding, as in iCaRL (Rebuffi et al. 2017, "iCaRL: Incremental Classifier and Representation
    Learning", algorithm 4).

        p_k = argmin over x of || mu - (phi(x) + phi(p_1) + ... + phi(p_{k-1})) / k ||

    over the samples not chosen yet, mu being the mean of all phi(x): each prefix of the order has a
    mean close to mu.

    The order is that of a direct implementation in float64, `np.argmin(np.linalg.norm(mu - (phi +
    S) / k, axis=1))` with S the sum of those chosen, so of samples that tie, such as equal rows,
    the lowest index comes first. Scores are kept up to date in single precision; of rows closer
    together than rounding could take them apart they are made in double, and if that cannot tell
    either, the definition decides. `count` does not matter. (Features whose squares leave the range
    of float64 are scaled by a power of 2.)

    normalize: divide each row by its Euclidean length first, in float64 (rows of zeros stay), as
        iCaRL does; default: features as given.
    model, layer, batch_size, transform: as for `FeatureBasedSelection`.

    Costs, n samples of d features: one matrix product of n * n * d and n steps of O(n) for a full
    order (0.03 s for n=2,000, d=512 on two cores), or a matrix-vector product, O(n * d), for each
    of the first few. Memory: the features in float64, if they are not yet, a copy in float32, and 4
    * n * n bytes for the matrix, where that is at most 256 MB; else there is a matrix-vector
    product for each step. Where many rows are too close together for single precision, the copy and
    the matrix become float64.

    >>> HerdingSelection().sorted_indices(np.array([[0.0], [1], [2], [3], [9]]))
    array([3, 2, 1, 4, 0])
    """

    def __init__(self, model: Any = None, layer: str | None = None, *, normalize: bool = False, **options: Any) -> None:
        super().__init__(model, layer, **options)
        self.normalize = bool(normalize)

    @property
    def name(self) -> str:
        return super().name + ("(normalize=True)" if self.normalize else "")

    def sorted_indices(self, features: Any, count: int | None = None) -> Ints:
        """The order, (min(count, n),) int64. features: (n, d) of any real dtype up to 64 bits,
        finite. Raises ArgumentError otherwise."""
        phi, top = _checked_features(features, self.normalize)
        stop = _count(count, phi.shape[0])
        return _herd(phi, top, stop) if stop else np.zeros(0, np.int64)


class ClosestToCenterSelection(FeatureBasedSelection):
    """Samples by the distance of their features from the mean of all, the closest first.

    The order is that of the distances in float64, `np.argsort(np.linalg.norm(phi - mu, axis=1),
    kind="stable")`: where they tie, the lowest index comes first.
    All arguments are those of `HerdingSelection`. Costs O(n * d), and a float64 copy of features of
    other dtypes.

    >>> ClosestToCenterSelection().sorted_indices(np.array([[0.0], [1], [2], [3], [9]]))
    array([3, 2, 1, 0, 4])
    """

    def __init__(self, model: Any = None, layer: str | None = None, *, normalize: bool = False, **options: Any) -> None:
        super().__init__(model, layer, **options)
        self.normalize = bool(normalize)

    @property
    def name(self) -> str:
        return super().name + ("(normalize=True)" if self.normalize else "")

    def sorted_indices(self, features: Any, count: int | None = None) -> Ints:
        """The order, (min(count, n),) int64. features: (n, d) of any real dtype up to 64 bits,
        finite. Raises ArgumentError otherwise."""
        phi, _ = _checked_features(features, self.normalize)
        stop = _count(count, phi.shape[0])
        if stop == 0:
            return np.zeros(0, np.int64)
        return np.argsort(np.linalg.norm(phi - phi.mean(axis=0), axis=1), kind="stable")[:stop].astype(np.int64)


# -- input -------------------------------------------------------------------------------------------------------------


def _array(values: Any, name: str) -> np.ndarray[Any, Any]:
    """Lists, arrays and tensors on any device as an array. Raises ArgumentError for what cannot
    become one."""
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


def _checked_features(features: Any, normalize: bool) -> tuple[Floats, float]:
    """(n, d) float64, C-contiguous, finite, rows divided by their lengths if wanted, such that
    squares stay within float64; the largest absolute value."""
    array = _array(features, "features")
    if array.ndim != 2:
        raise ArgumentError(f"features: expected (n, d), one row for each sample, got shape {array.shape}; flatten with reshape(n, -1)")
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise ArgumentError(f"features: expected real numbers of up to 64 bits, got {array.dtype}; convert them: astype('float64')")
    x = np.ascontiguousarray(array, np.float64)
    if not x.flags.carray:  # read-only: the kernels would be compiled once more
        x = x.copy()
    top = _top(x)
    if not math.isfinite(top):
        row, column = np.argwhere(~np.isfinite(x))[0]
        raise ArgumentError(
            f"features: row {row} holds {array[row, column]} in column {column}; every number must be finite: leave such samples out, or "
            "look for the layer that made it"
        )
    if normalize:
        x = _normalized(x)
    elif top > 0.0 and not 2.0**-300 < top < 2.0**300:
        x = np.ldexp(x, -math.frexp(top)[1])  # times a power of two, which changes no order
    else:
        return x, top
    return x, _top(x)


def _top(x: Floats) -> float:
    """The largest absolute value; nan if there is one."""
    return float(max(x.max(initial=0.0), -x.min(initial=0.0)))


def _count(count: Any, n: int) -> int:
    """How many of n indices are wanted."""
    return n if count is None else min(n, required("count", count, 0, 2**63 - 1))


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


# -- herding -----------------------------------------------------------------------------------------------------------


def _herd(phi: Floats, top: float, count: int) -> Ints:
    """The first `count` of the order. phi: (n, d), n and count at least 1; top: the largest
    absolute value."""
    n, d = phi.shape
    mean = phi.mean(axis=0)
    # Distances do not change when all features are moved; around their mean they are small, and so
    # are rounding errors.
    squares, marks = np.empty(n), np.empty(n)
    herding.measure(phi, mean, np.cos(np.arange(d, dtype=np.float64)), squares, marks)
    lengths = np.sqrt(squares)
    left, twin = _twins(phi, squares, marks)
    order, close = np.empty(count, np.int64), np.empty(n, np.int64)
    dots, total, moved, error = np.zeros(n), np.zeros(d), np.zeros(d), np.zeros(3)
    rows, products, rough = _rows(phi, mean, lengths, count, np.float32)
    done, chosen = 0, -1
    while done < count:
        done, doubt = herding.herd(
            phi, mean, lengths, squares, rows, products, twin, left, dots, total, moved, error, order, done, count, chosen,
            rough, math.sqrt(d) * top, n + n * count // 16, close,
        )  # fmt: skip
        chosen = -1
        if doubt > 0:
            chosen = _by_definition(phi, mean, total, done + 1, np.sort(close[:doubt]))
        elif doubt < 0:
            rows, products, rough = _rows(phi, mean, lengths, count, np.float64)
            dots, error[0] = lengths * (rows @ moved), math.sqrt(moved @ moved) * rough
    return order


def _rows(phi: Floats, mean: Floats, lengths: Floats, count: int, dtype: Any) -> tuple[Any, Any, float]:
    """The rows around their mean, of length 1; the products of all with all, if that pays; and how
    far off these may be."""
    n, d = phi.shape
    rows = np.empty((n, d), dtype)
    herding.make_rows(phi, mean, lengths, rows)
    many = _STEPS_PER_MATRIX * count > n and rows.itemsize * n * n <= _MATRIX_BYTES
    return rows, rows @ rows.T if many else np.empty((0, 0), dtype), 1.01 * (d + 4) * _ROUNDING[dtype]


def _by_definition(phi: Floats, mean: Floats, total: Floats, k: int, close: Ints) -> int:
    """Which of these rows is the k-th to choose, `total` being the sum of those chosen."""
    return int(close[np.argmin(np.linalg.norm(mean - (phi[close] + total) / k, axis=1))])


def _twins(phi: Floats, squares: Floats, marks: Floats) -> tuple[Floats, Ints]:
    """Of equal rows only the first need be looked at until it is chosen: (squares, inf for the
    others; the next equal row or -1).

    marks: (n,), the same for equal rows; few others share one.
    """
    n = phi.shape[0]
    left, twin = squares.copy(), np.full(n, -1, np.int64)
    found, which, times = np.unique(marks, return_inverse=True, return_counts=True)
    if found.shape[0] < n:
        by_mark = np.split(np.argsort(which, kind="stable"), np.cumsum(times)[:-1])
        for same in by_mark:
            if same.shape[0] > 1 and (phi[same] == phi[same[0]]).all():
                left[same[1:]] = np.inf
                twin[same[:-1]] = same[1:]
    return left, twin


def _normalized(y: Floats) -> Floats:
    """Rows divided by their lengths; rows of zeros stay."""
    y = np.ldexp(y, -np.frexp(np.abs(y).max(axis=1, keepdims=True, initial=0.0))[1])  # exact, so that no square overflows
    lengths = np.linalg.norm(y, axis=1)
    return y / np.where(lengths > 0, lengths, 1.0)[:, None]
