"""The settings of an InterleavedSampler, and the checks of the samplers it is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, default_collate

from ....arguments import function_or_none, integer, length
from ....errors import ArgumentError
from .schedule import EVERY

_STOPS = ("max_epochs", "max_updates", "max_samples")
_STARTS = ("start_epoch", "start_update", "start_sample")


@dataclasses.dataclass
class _Checked:
    """A dataclass that checks itself when it is made and when a field is set.

    A value that is refused changes nothing.
    """

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        raise NotImplementedError

    def _to_integers(self, low: int, *names: str) -> None:
        for name in names:
            object.__setattr__(self, name, integer(name, getattr(self, name), low, 2**62))

    def __setattr__(self, name: str, value: Any) -> None:
        names = [f.name for f in dataclasses.fields(self)]
        if name not in names:
            raise ArgumentError(f"{type(self).__name__} has no field {name!r}; it has {', '.join(names)}")
        if all(n in self.__dict__ for n in names):  # __init__ is over
            value = getattr(dataclasses.replace(self, **{name: value}), name)
        object.__setattr__(self, name, value)


@dataclasses.dataclass
class SamplerIntervalConfig(_Checked):
    """Which indices are read between training batches, and how often: exactly one interval.

    sampler: any torch sampler with a length and a `data_source` or `dataset`. Each time it is due,
        it is read once. Its length must not change.
    pipeline: collates its samples; None: torch's default.
    batch_size: None: that of the training. `every_n_samples` needs one.
    every_n_epochs, every_n_updates: due after every n-th.
    every_n_samples: due after an update that reaches or passes a multiple of n.

    The config checks itself, on assignment too (ArgumentError). To go from one interval to another,
    use `dataclasses.replace`.

    >>> from torch.utils.data import SequentialSampler
    >>> from leanreplay.torch import SamplerIntervalConfig
    >>> config = SamplerIntervalConfig(SequentialSampler(range(5)), every_n_epochs=1)
    >>> config.every_n_epochs = 0
    Traceback (most recent call last):
    ...
    leanreplay.errors.ArgumentError: every_n_epochs must be from 1 to 4611686018427387904, got 0
    """

    sampler: Any
    pipeline: Callable[[Any], Any] | None = None
    every_n_epochs: int | None = None
    every_n_updates: int | None = None
    every_n_samples: int | None = None
    batch_size: int | None = None

    def _check(self) -> None:
        sampler_length("sampler", self.sampler)
        collator("pipeline", self.pipeline)
        self._to_integers(1, *EVERY, "batch_size")
        given = _given(self, EVERY)
        if len(given) != 1:
            raise ArgumentError(f"exactly one of {', '.join(EVERY)} is needed, got {', '.join(given) or 'none'}")
        if self.every_n_samples is not None and self.batch_size is None:
            raise ArgumentError("every_n_samples needs a batch_size")


@dataclasses.dataclass
class InterleavedSamplerConfig(_Checked):
    """How long an InterleavedSampler trains, from where, and in batches of what size.

    batch_size: samples of a training batch.
    drop_last: whether the short last batch of an epoch is dropped. If not, it is an update too.
    max_epochs, max_updates, max_samples: at least one. The first limit that is reached ends the
        training, after a whole batch. If a limit is 0, nothing is trained: each callback comes once.
    start_epoch, start_update, start_sample: at most one. So much counts as done. A start_sample
        must be the end of a batch.
    evaluation: True trains nothing either: each callback comes once.

    The config checks itself, on assignment too (ArgumentError).

    >>> from leanreplay.torch import InterleavedSamplerConfig
    >>> InterleavedSamplerConfig(batch_size=32)
    Traceback (most recent call last):
    ...
    leanreplay.errors.ArgumentError: at least one of max_epochs, max_updates, max_samples is needed, got none
    """

    batch_size: int
    drop_last: bool = True
    max_epochs: int | None = None
    max_updates: int | None = None
    max_samples: int | None = None
    start_epoch: int | None = None
    start_update: int | None = None
    start_sample: int | None = None
    evaluation: bool = False

    def _check(self) -> None:
        if self.batch_size is None:
            raise ArgumentError("batch_size must be an integer, got None")
        self._to_integers(1, "batch_size")
        self._to_integers(0, *_STOPS, *_STARTS)
        for name in ("drop_last", "evaluation"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise ArgumentError(f"{name} must be True or False, got {getattr(self, name)!r:.200}")
            object.__setattr__(self, name, bool(getattr(self, name)))
        if not _given(self, _STOPS):
            raise ArgumentError(f"at least one of {', '.join(_STOPS)} is needed, got none")
        given = _given(self, _STARTS)
        if len(given) > 1:
            raise ArgumentError(f"at most one of {', '.join(_STARTS)} can be given, got {', '.join(given)}")


def _given(config: Any, names: Iterable[str]) -> list[str]:
    return [name for name in names if getattr(config, name) is not None]


def trains(config: InterleavedSamplerConfig) -> bool:
    """Tell whether the config asks for training at all."""
    return not config.evaluation and all(getattr(config, name) != 0 for name in _STOPS)


def interval_of(callback: SamplerIntervalConfig) -> tuple[str, int]:
    """Find the one interval of a callback: (a name of EVERY, its number)."""
    (kind,) = _given(callback, EVERY)
    return kind, getattr(callback, kind)


def sampler_length(name: str, sampler: Any) -> int:
    """Measure a sampler. Raises ArgumentError if it has no length or cannot be iterated."""
    n = length(sampler)
    if n < 0 or not isinstance(sampler, Iterable):
        raise ArgumentError(f"{name} must be a torch sampler that can be iterated and has a length, got {sampler!r:.200}")
    return n


def collator(name: str, function: Any) -> Callable[[Any], Any]:
    """Take a collate function, or torch's default for None. Raises ArgumentError for others."""
    function_or_none(name, function, "a function of a list of samples, or None for torch's default")
    return default_collate if function is None else function


def dataset_of(name: str, sampler: Any) -> Any:
    """Find the dataset that a sampler's indices mean. Raises ArgumentError if there is none."""
    found = (getattr(sampler, attribute, None) for attribute in ("data_source", "dataset"))
    dataset = next((d for d in found if d is not None), None)
    if dataset is None:
        raise ArgumentError(f"{name}: {type(sampler).__name__} has neither data_source nor dataset; set one of them to its dataset")
    if isinstance(dataset, IterableDataset) or length(dataset) < 0:
        raise ArgumentError(f"{name}: its dataset must have a length and be read by index, got {type(dataset).__name__}")
    return dataset
