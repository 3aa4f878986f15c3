"""The source of an AsyncReservoir: read sample by sample, again and again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import Subset

from ....arguments import call, length
from ....errors import ArgumentError

END = object()  # of a pass through the source


class Source:
    """Reads a source in passes. Raises ArgumentError if it cannot start over, or is empty."""

    def __init__(self, source: Any) -> None:
        if isinstance(source, Iterator):
            raise ArgumentError(f"source must be able to start over, but {type(source).__name__} can be iterated only once; give a list")
        if not isinstance(source, Iterable) and not (length(source) >= 0 and hasattr(source, "__getitem__")):
            raise ArgumentError(f"source must be iterable, or a map-style dataset with len(), got {type(source).__name__}")
        if length(source) == 0:
            raise ArgumentError("source is empty: there is nothing to load")
        self.source = source
        self.samples_of_a_pass = max(0, length(source))  # 0: not known yet
        self._items: Iterator[Any] | None = None
        self._given = 0  # in this pass

    @property
    def between_passes(self) -> bool:
        return self._items is None and not self._given

    @property
    def given(self) -> int | None:
        """How many samples this pass gave; None between passes."""
        return None if self.between_passes else self._given

    def end_pass(self) -> None:
        """Let the next sample be the first one again."""
        self._items, self._given = None, 0

    def resume(self, given: int | None, samples_of_a_pass: int) -> None:
        """Let the next sample be the one after the first `given` of a pass."""
        self._items, self._given, self.samples_of_a_pass = None, given or 0, samples_of_a_pass

    def next_sample(self) -> Any:
        """Read one sample; END at the end of each pass."""
        if self._items is None:
            source = self.source
            if isinstance(source, Iterable):
                self._items = itertools.islice(source, self._given, None)
            else:
                self._items = (call("source", source.__getitem__, i) for i in range(self._given, len(source)))
        try:
            sample = next(self._items)
        except BaseException as error:
            given = self._given
            self.end_pass()
            if not isinstance(error, StopIteration):
                raise
            if not given:
                raise ArgumentError("source is empty: there is nothing to load; it must be able to start over") from None
            self.samples_of_a_pass = given
            return END
        self._given += 1
        return sample


def subsample(source: Any, n: int, generator: torch.Generator) -> Any:
    """Draw n samples of a source without replacement, in its order."""
    if hasattr(source, "subsample"):
        return source.subsample(n)
    size = _size(source, "subsample")
    if n > size:
        raise ArgumentError(f"subsample({n}) of a source of {size} samples; ask for {size} at most")
    return Subset(source, sorted(torch.randperm(size, generator=generator)[:n].tolist()))


def subsample_uids(source: Any, uids: Iterable[Any], uids_name: str) -> Any:
    """Select the samples of a source whose `sample[uids_name]` is in uids, in the order of uids.

    Samples of one uid, or of all if uids is a set, stand in the order of the source.
    """
    if hasattr(source, "subsample_uids"):
        return source.subsample_uids(uids, uids_name)
    found: dict[Any, list[int]] = {_plain(uid): [] for uid in uids}
    for i in range(_size(source, "subsample_uids")):
        uid = _uid(source[i], i, uids_name)
        if uid in found:
            found[uid].append(i)
    chosen = [i for places in found.values() for i in places]
    if not chosen:
        raise ArgumentError(f"no sample of the source has a {uids_name!r} among {list(found)!r:.200}")
    return Subset(source, sorted(chosen) if isinstance(uids, (set, frozenset)) else chosen)


def _size(source: Any, name: str) -> int:
    size = length(source)
    if size < 0 or not hasattr(source, "__getitem__"):
        raise ArgumentError(f"{name} needs a source with len() and [i], or with a {name} of its own, got {type(source).__name__}")
    return size


def _uid(sample: Any, i: int, uids_name: str) -> Any:
    try:
        return _plain(sample[uids_name])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ArgumentError(f"sample {i} of the source has no {uids_name!r} that is one uid: {error!r:.200}") from error


def _plain(uid: Any) -> Any:
    """Make a uid a value that can be looked up: of an array or tensor its one number."""
    uid = uid.item() if hasattr(uid, "item") else uid
    hash(uid)
    return uid
