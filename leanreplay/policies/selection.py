"""Which samples become exemplars: at random, by herding, the closest to the centre, or by a
strategy of the user's own."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..arguments import length, plain_array, required
from ..arrays import NO_ROWS, Floats, Ints
from ..errors import ArgumentError
from ..kernels import reservoir
from ..keys import key_pair
from .herding import herd

__all__ = ["ClosestToCenterSelection", "FeatureBasedSelection", "HerdingSelection", "RandomSelection", "SelectionStrategy", "checked_order"]


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

    def features(self) -> object:
        """Return (n, d) numbers, worked out when asked for. Raises ArgumentError where there are
        none."""


class SelectionStrategy:
    """The base of strategies. Override `sorted_indices`, or `sorted_indices_of` to look at the
    samples.

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
        """Return what a buffer's file says of its strategy, and compares when it is opened with one
        again."""
        return type(self).__name__

    def sorted_indices(self, features: Any, count: int | None = None) -> Ints:
        """Return indices of samples, (k,) int64, the best first, given their features, (n, d): all,
        or the first `count`."""
        raise ArgumentError(
            f"{type(self).__name__} does not choose by features: use sorted_indices_of(dataset), or override "
            "sorted_indices(features, count)"
        )

    def sorted_indices_of(self, dataset: Any, count: int | None = None) -> Ints:
        """Return the same for a strategy that looks at the samples: `dataset` has len() and [i]."""
        raise ArgumentError(
            f"{type(self).__name__} does not look at samples: give sorted_indices their features, or override "
            "sorted_indices_of(dataset, count)"
        )

    def order(self, candidates: Candidates, count: int | None = None) -> Ints:
        """Return what a buffer asks for, the order of one group: `sorted_indices`, or
        `sorted_indices_of` the samples."""
        mine = type(self)
        by_features = mine.sorted_indices is not SelectionStrategy.sorted_indices
        by_samples = mine.sorted_indices_of is not SelectionStrategy.sorted_indices_of
        if by_samples and not (by_features and self.needs_features):
            return self.sorted_indices_of(candidates.dataset, count)
        return self.sorted_indices(candidates.features(), count)


class RandomSelection(SelectionStrategy):
    """A uniform random order. Features are not looked at.

    In a buffer the order is that of the reservoir keys of the samples' stream positions, with the
    buffer's seed. So each group is at every moment an exact uniform sample of everything it was
    fed. Elsewhere the order depends on `seed` and the number of samples alone.

    >>> RandomSelection(seed=1).sorted_indices(np.zeros((6, 2)), count=3)
    array([2, 3, 1])
    """

    needs_features = False
    uniform = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = required("seed", seed, -(2**127), 2**127 - 1)

    def sorted_indices(self, features: Any, count: int | None = None) -> Ints:
        """Return the order of len(features) samples. O(n log n)."""
        n = length(features)
        if n < 0:
            raise ArgumentError(f"expected features, (n, d), or a dataset with len(), got {type(features).__name__}")
        return _by_key(np.arange(n, dtype=np.int64), "random selection", self.seed)[: _checked_count(count, n)]

    def sorted_indices_of(self, dataset: Any, count: int | None = None) -> Ints:
        """Return the order of len(dataset) samples, which are not looked at."""
        return self.sorted_indices(dataset, count)

    def order(self, candidates: Candidates, count: int | None = None) -> Ints:
        """Return the order of the reservoir keys, the largest first."""
        positions = np.ascontiguousarray(candidates.positions, np.int64)
        return _by_key(positions, "reservoir", candidates.seed)[: _checked_count(count, len(positions))]


class FeatureBasedSelection(SelectionStrategy):
    """The base of strategies that choose by features. A subclass overrides `sorted_indices`.

    model, layer: a torch module and the name of one of its layers (`model.named_modules()`). Its
        activations are the features where none are given.
    batch_size: samples that go through the model at a time.
    transform: makes of a batch of inputs, a tensor (B, ...), what the model wants, for images
        stored as uint8 `lambda x: x.float() / 255`; default: inputs as they are.
    """

    def __init__(
        self, model: object = None, layer: str | None = None, *, batch_size: int = 256, transform: Callable[[Any], Any] | None = None
    ) -> None:
        if (model is None) != (layer is None):
            raise ArgumentError(f"model and layer go together: got model={type(model).__name__}, layer={layer!r:.200}")
        self.model, self.layer, self.transform = model, layer, transform
        self.batch_size = required("batch_size", batch_size, 1, 2**63 - 1)

    def features_of(self, dataset: Any) -> npt.NDArray[np.float32]:
        """Return the layer's activations for the samples' first elements, (n, d); see
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
        """Return `sorted_indices` of the layer's activations. One pass of the samples through the
        model."""
        return self.sorted_indices(self.features_of(dataset), count)


class _Normalizing(FeatureBasedSelection):
    """Features may be divided by their lengths first."""

    def __init__(
        self,
        model: object = None,
        layer: str | None = None,
        *,
        normalize: bool = False,
        batch_size: int = 256,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(model, layer, batch_size=batch_size, transform=transform)
        self.normalize = bool(normalize)

    @property
    def name(self) -> str:
        return super().name + ("(normalize=True)" if self.normalize else "")


class HerdingSelection(_Normalizing):
    """Herding, as in iCaRL (Rebuffi et al. 2017, "iCaRL: Incremental Classifier and Representation
    Learning").

        p_k = argmin over x of || mu - (phi(x) + phi(p_1) + ... + phi(p_{k-1})) / k ||    (algorithm
        4)

    over the samples not chosen yet, mu being the mean of all phi(x). Each prefix of the order has a
    mean close to mu.

    The order is that of a direct implementation in float64, `np.argmin(np.linalg.norm(mu - (phi +
    S) / k, axis=1))` with S the sum of those chosen. So of samples that tie, such as equal rows,
    the lowest index comes first. Scores are kept up to date in single precision. Rows closer
    together than rounding could take them apart get a score in double precision; if that cannot
    tell either, the definition decides. `count` does not matter. (Features whose squares leave the
    range of float64 are scaled by a power of 2.)

    normalize: divide each row by its Euclidean length first, in float64 (rows of zeros stay), as
        iCaRL does;
        default: features as given.
    model, layer, batch_size, transform: as for `FeatureBasedSelection`.

    Costs, n samples of d features: a full order takes one matrix product of n * n * d and n steps
    of O(n), 0.03 s for n=2,000, d=512 on two cores. The first few take a matrix-vector product, O(n
    * d), each. Memory: the features in float64, if they are not yet, a copy in float32, and 4 * n *
    n bytes for the matrix, where that is at most 256 MB; else there is a matrix-vector product for
    each step. Where many rows are too close together for single precision, the copy and the matrix
    become float64.

    >>> HerdingSelection().sorted_indices(np.array([[0.0], [1], [2], [3], [9]]))
    array([3, 2, 1, 4, 0])
    """

    def sorted_indices(self, features: Any, count: int | None = None) -> Ints:
        """Return the order, (min(count, n),) int64. features: (n, d), real numbers of up to 64
        bits, finite; else ArgumentError."""
        phi, top = _checked_features(features, self.normalize)
        stop = _checked_count(count, phi.shape[0])
        return herd(phi, top, stop) if stop else NO_ROWS.copy()


class ClosestToCenterSelection(_Normalizing):
    """Samples by the distance of their features from the mean of all, the closest first.

    The order is that of the distances in float64, `np.argsort(np.linalg.norm(phi - mu, axis=1),
    kind="stable")`: where they tie, the lowest index comes first. All arguments are those of
    `HerdingSelection`. Costs O(n * d), and a float64 copy of features of other dtypes.

    >>> ClosestToCenterSelection().sorted_indices(np.array([[0.0], [1], [2], [3], [9]]))
    array([3, 2, 1, 0, 4])
    """

    def sorted_indices(self, features: Any, count: int | None = None) -> Ints:
        """Return the order, (min(count, n),) int64. features: (n, d), real numbers of up to 64
        bits, finite; else ArgumentError."""
        phi, _ = _checked_features(features, self.normalize)
        stop = _checked_count(count, phi.shape[0])
        if not stop:
            return NO_ROWS.copy()
        return np.argsort(np.linalg.norm(phi - phi.mean(axis=0), axis=1), kind="stable")[:stop].astype(np.int64)


# -- input -------------------------------------------------------------------------------------------------------------


def checked_order(order: object, n: int, strategy: object) -> Ints:
    """Return the order that a strategy gave for n samples, (k,) int64. ArgumentError unless it is
    distinct integers from 0 to n - 1."""
    name = type(strategy).__name__
    array = order if type(order) is np.ndarray else plain_array(order, f"the order from {name}", ArgumentError)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ArgumentError(f"{name} must give the indices of samples, (k,) integers, got {array.dtype} of shape {array.shape}")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < n:
        raise ArgumentError(f"{name} must give indices from 0 to {n - 1}, got from {array.min()} to {array.max()}")
    checked = array.astype(np.int64)
    times = np.bincount(checked, minlength=1)
    if times.max() > 1:
        raise ArgumentError(f"{name} must give every index at most once, got {times.argmax()} {times.max()} times")
    return checked


def _checked_features(features: Any, normalize: bool) -> tuple[Floats, float]:
    """Return features as float64, (n, d), C-contiguous and finite, and their largest absolute
    value.

    Rows are divided by their lengths if wanted, and scaled so that squares stay within float64.
    """
    array = plain_array(features, "features", ArgumentError)
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
    """Return the largest absolute value; nan if there is one."""
    return float(max(x.max(initial=0.0), -x.min(initial=0.0)))


def _checked_count(count: int | None, n: int) -> int:
    """Return how many of n indices are wanted."""
    if type(count) is int and 0 <= count <= n:
        return count
    return n if count is None else min(n, required("count", count, 0, 2**63 - 1))


def _by_key(positions: Ints, purpose: str, seed: int) -> Ints:
    """Return the indices of positions, the largest key first. Keys never tie."""
    keys = np.empty(positions.shape[0], np.uint64)
    reservoir.position_keys(positions, *key_pair(purpose, seed), keys)
    return np.argsort(keys)[::-1].astype(np.int64)


def _normalized(y: Floats) -> Floats:
    """Return rows divided by their lengths; rows of zeros stay."""
    y = np.ldexp(y, -np.frexp(np.abs(y).max(axis=1, keepdims=True, initial=0.0))[1])  # exact, so that no square overflows
    lengths = np.linalg.norm(y, axis=1)
    return y / np.where(lengths > 0, lengths, 1.0)[:, None]
