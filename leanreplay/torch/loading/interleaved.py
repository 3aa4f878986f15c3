"""Training and its periodic evaluations through one DataLoader: who is read when is a closed form, so any position can be resumed.

Everything comes from `_Interval.fired`, a pure function of the number of updates: what is due, how many batches there are, and where
the n-th batch lies.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Sampler, default_collate

from ...errors import ArgumentError, ModeError, RowError, StateError
from ...kernels import reservoir
from ...keys import key_pair
from ...samples.batch import call, integer, length

_MOST = 2**62
_CHUNK = 1 << 16  # indices that become Python integers at a time
_AHEAD = 64  # indices that small batches are cut from at a time


# -- settings ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Checked:
    """A dataclass that checks itself when it is made and when a field is set; what is refused changes nothing."""

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        raise NotImplementedError

    def _normal(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _integers(self, low: int, *names: str) -> None:
        for name in names:
            self._normal(name, integer(name, getattr(self, name), low, _MOST))

    def _given(self, *names: str) -> list[str]:
        return [name for name in names if getattr(self, name) is not None]

    def __setattr__(self, name: str, value: Any) -> None:
        names = [f.name for f in dataclasses.fields(self)]
        if name not in names:
            raise ArgumentError(f"{type(self).__name__} has no field {name!r}; it has {', '.join(names)}")
        if all(n in self.__dict__ for n in names):  # __init__ is over
            value = getattr(dataclasses.replace(self, **{name: value}), name)
        self._normal(name, value)


_EVERY = ("every_n_epochs", "every_n_updates", "every_n_samples")
_STOPS = ("max_epochs", "max_updates", "max_samples")
_STARTS = ("start_epoch", "start_update", "start_sample")


@dataclasses.dataclass
class SamplerIntervalConfig(_Checked):
    """Which indices are read between training batches, and how often: exactly one of the three intervals.

    sampler: any torch sampler with a length and a `data_source` or `dataset`; read once each time it is due. Its length must not change.
    pipeline: collates its samples (None: torch's default). batch_size: None: that of the training; needed with `every_n_samples`.
    every_n_epochs, every_n_updates: due after every n-th; every_n_samples: after an update that reaches or passes a multiple of n.

    Checks itself, on assignment too (ArgumentError). To go from one interval to another, use `dataclasses.replace`.

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
        _require_sampler("sampler", self.sampler)
        _require_collator("pipeline", self.pipeline)
        self._integers(1, *_EVERY, "batch_size")
        given = self._given(*_EVERY)
        if len(given) != 1:
            raise ArgumentError(f"exactly one of {', '.join(_EVERY)} is needed, got {', '.join(given) or 'none'}")
        if self.every_n_samples is not None and self.batch_size is None:
            raise ArgumentError("every_n_samples needs a batch_size")


@dataclasses.dataclass
class InterleavedSamplerConfig(_Checked):
    """How long an InterleavedSampler trains, from where, in batches of what size.

    batch_size: samples of a training batch. drop_last: whether an epoch's short last batch is dropped, or is an update too.
    max_epochs, max_updates, max_samples: at least one; the first one reached ends it, after a whole batch. If one is 0: no training,
    the callbacks once; evaluation=True: likewise.
    start_epoch, start_update, start_sample: at most one: that much is taken as done. A start_sample must lie on a batch boundary.

    Checks itself, on assignment too (ArgumentError).

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
        self._integers(1, "batch_size")
        self._integers(0, *_STOPS, *_STARTS)
        for name in ("drop_last", "evaluation"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise ArgumentError(f"{name} must be True or False, got {getattr(self, name)!r:.200}")
            self._normal(name, bool(getattr(self, name)))
        if not self._given(*_STOPS):
            raise ArgumentError(f"at least one of {', '.join(_STOPS)} is needed, got none")
        given = self._given(*_STARTS)
        if len(given) > 1:
            raise ArgumentError(f"at most one of {', '.join(_STARTS)} can be given, got {', '.join(given)}")

    @property
    def _trains(self) -> bool:
        return not self.evaluation and all(getattr(self, name) != 0 for name in _STOPS)


def _require_sampler(name: str, sampler: Any) -> int:
    """The length of a sampler."""
    n = length(sampler)
    if n < 0 or not isinstance(sampler, Iterable):
        raise ArgumentError(f"{name} must be a torch sampler that can be iterated and has a length, got {sampler!r:.200}")
    return n


def _require_collator(name: str, collator: Any) -> Callable[[Any], Any]:
    if collator is not None and not callable(collator):
        raise ArgumentError(f"{name} must be a function of a list of samples, or None for torch's default, got {collator!r:.200}")
    return default_collate if collator is None else collator


def _dataset_of(name: str, sampler: Any) -> Any:
    """What a sampler's indices mean."""
    for attribute in ("data_source", "dataset"):
        dataset = getattr(sampler, attribute, None)
        if dataset is not None:
            break
    else:
        raise ArgumentError(f"{name}: {type(sampler).__name__} has neither data_source nor dataset; set one of them to its dataset")
    if isinstance(dataset, IterableDataset) or length(dataset) < 0:
        raise ArgumentError(f"{name}: its dataset must have a length and be read by index, got {type(dataset).__name__}")
    return dataset


# -- who is read when ----------------------------------------------------------------------------------------------------


class _Epochs:
    """How an epoch of n samples is cut into updates, and how updates, samples and epochs count each other. n >= 1."""

    def __init__(self, n: int, batch_size: int, drop_last: bool) -> None:
        self.batch_size = min(batch_size, n)  # a short batch that is all of an epoch counts as a full one
        self.full = n // self.batch_size  # full batches
        self.samples = self.full * self.batch_size if drop_last else n
        self.updates = -(-self.samples // self.batch_size)

    def samples_after(self, updates: int) -> int:
        epochs, rest = divmod(updates, self.updates)
        return epochs * self.samples + rest * self.batch_size

    def updates_for(self, samples: int) -> int:
        """The fewest updates that reach so many samples."""
        epochs, rest = divmod(samples, self.samples)
        return epochs * self.updates + -(-rest // self.batch_size)


class _Interval:
    """One callback: how often it was due in the first so many updates. The kind is a name of `_EVERY`."""

    def __init__(self, epochs: _Epochs, kind: str, n: int) -> None:
        self.epochs, self.kind, self.n = epochs, kind, n
        self.passes_many = kind == "every_n_samples" and n < epochs.batch_size
        if self.passes_many:
            # Every full batch holds a multiple of n, so is due. The short last one of epoch e holds one if e * samples % n is less than
            # its size, which repeats after at most n epochs: hits[e] counts them.
            short, period = epochs.samples % epochs.batch_size, n // math.gcd(n, epochs.samples)
            self.hits = [0, *itertools.accumulate(int(e * epochs.samples % n < short) for e in range(1, period + 1))]

    def fired(self, updates: int) -> int:
        if self.kind == "every_n_updates":
            return updates // self.n
        epochs, rest = divmod(updates, self.epochs.updates)
        if self.kind == "every_n_epochs":
            return epochs // self.n
        if not self.passes_many:  # an update reaches at most one multiple
            return self.epochs.samples_after(updates) // self.n
        periods, beyond = divmod(epochs, len(self.hits) - 1)
        return epochs * self.epochs.full + rest + periods * self.hits[-1] + self.hits[beyond]

    def next_due(self, updates: int) -> int:
        """The first update after so many at which it is due."""
        if self.kind == "every_n_updates":
            return (updates // self.n + 1) * self.n
        if self.kind == "every_n_epochs":
            return (updates // self.epochs.updates // self.n + 1) * self.n * self.epochs.updates
        return self.epochs.updates_for((self.epochs.samples_after(updates) // self.n + 1) * self.n)


def _last(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The largest number from low to high for which `holds`, which does so for low and up to somewhere. (`bisect` ends at 63 bits.)"""
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


class _Schedule:
    """The order of all batches. sizes: batches of one pass over each callback."""

    def __init__(self, epochs: _Epochs | None, config: InterleavedSamplerConfig, callbacks: list[SamplerIntervalConfig], sizes: list[int]):
        self.sizes = sizes
        self.epochs = epochs
        self.end = 0  # in updates
        self.intervals: list[_Interval] = []
        if epochs is None:  # no training: the callbacks once
            self.total = sum(sizes)
            return
        for callback in callbacks:
            (kind,) = callback._given(*_EVERY)
            self.intervals.append(_Interval(epochs, kind, getattr(callback, kind)))
        limits = []
        if config.max_epochs is not None:
            limits.append(config.max_epochs * epochs.updates)
        if config.max_updates is not None:
            limits.append(config.max_updates)
        if config.max_samples is not None:
            limits.append(epochs.updates_for(config.max_samples))
        self.end = min(limits)
        self.total = self.batches(self.end)

    def batches(self, updates: int) -> int:
        """All batches up to and with what is due after so many updates."""
        return updates + sum(interval.fired(updates) * size for interval, size in zip(self.intervals, self.sizes, strict=True))

    def locate(self, position: int) -> tuple[int, int]:
        """Where batch `position` lies: in the update after so many, and behind so many batches of that one."""
        updates = _last(0, min(position, self.end), lambda u: self.batches(u) <= position)
        return updates, position - self.batches(updates)


# -- what the DataLoader takes -------------------------------------------------------------------------------------------


class _Datasets(ConcatDataset[Any]):
    """Datasets one after the other; an item is (number of the dataset, its sample), so that its own collator can take it."""

    def _place(self, index: int) -> tuple[int, int, int]:
        """Number of the dataset, and the indices that it reaches from and to."""
        if not 0 <= index < len(self):
            raise RowError(f"index {index} out of range: the datasets have {len(self)} samples")
        which = bisect.bisect_right(self.cumulative_sizes, index)
        return which, self.cumulative_sizes[which - 1] if which else 0, self.cumulative_sizes[which]

    def __getitem__(self, index: int) -> tuple[int, Any]:
        which, first, _ = self._place(index)
        return which, call(f"dataset {which}", self.datasets[which].__getitem__, index - first)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, Any]]:
        """A batch in one read, where its dataset can do that. All of a batch come from one dataset."""
        which, first, end = self._place(indices[0])
        dataset: Any = self.datasets[which]
        if not callable(getattr(dataset, "__getitems__", None)) or min(indices) < first or max(indices) >= end:
            return [self[i] for i in indices]
        return [(which, sample) for sample in call(f"dataset {which}", dataset.__getitems__, [i - first for i in indices])]


class _Collator:
    """Collates a batch of `_Datasets` with its dataset's own collator."""

    def __init__(self, collators: list[Callable[[Any], Any]]) -> None:
        self.collators = collators

    def __call__(self, items: Sequence[tuple[int, Any]]) -> Any:
        which = {number for number, _ in items}
        if len(which) != 1:
            raise ArgumentError(f"a batch must come from one dataset, got samples of datasets {sorted(which)}; use batch_sampler as it is")
        number = which.pop()
        return call(f"the collator of dataset {number}", self.collators[number], [sample for _, sample in items])


class _BatchSampler(Sampler[list[int]]):
    """Batches of indices for a DataLoader of the user's own: a batch counts as delivered when it is drawn."""

    def __init__(self, sampler: InterleavedSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        position = self.sampler._begin()  # at the first batch: a DataLoader with workers calls iter() twice
        for batch in self.sampler._batches(position):
            position += 1
            self.sampler._position = position
            yield batch

    def __len__(self) -> int:
        return len(self.sampler)


class _LoaderBatches(_BatchSampler):
    """Batches of indices for our own loader, which counts what it hands out; workers draw ahead of that."""

    position = 0

    def __iter__(self) -> Iterator[list[int]]:
        return self.sampler._batches(self.position)


class _Loader(DataLoader[Any]):
    """A DataLoader that tells its InterleavedSampler which batches were delivered."""

    def __init__(self, sampler: InterleavedSampler, **arguments: Any) -> None:
        self._sampler, self._indices = sampler, _LoaderBatches(sampler)
        super().__init__(sampler.dataset, batch_sampler=self._indices, collate_fn=sampler.collator, **arguments)

    def __iter__(self) -> Any:
        self._indices.position = self._sampler._next
        batches = super().__iter__()
        return _Delivery(self._sampler, self._sampler._begin(), batches)


class _Delivery:
    """One pass over a `_Loader`."""

    def __init__(self, sampler: InterleavedSampler, position: int, batches: Iterator[Any]) -> None:
        self._sampler, self._position, self._batches = sampler, position, batches
        self._failed = False

    def __iter__(self) -> _Delivery:
        return self

    def __next__(self) -> Any:
        if self._failed:  # going on would skip a batch, uncounted
            raise ModeError("this pass ended with an error; to try that batch again: sampler.load_state_dict(sampler.state_dict()), iter()")
        try:
            batch = next(self._batches)
        except StopIteration:
            raise
        except BaseException:
            self._failed = True
            raise
        self._position += 1
        self._sampler._position = self._position
        return batch


# -- the samplers --------------------------------------------------------------------------------------------------------


class InterleavedSampler(Sampler[tuple[bool, int]]):
    """One stream of indices for training and its periodic evaluations, so that one DataLoader serves all and its workers stay warm.

    train_sampler: read for ever, epoch by epoch, `set_epoch(epoch)` before each where it has that (DistributedSampler, ShuffleSampler).
    config: batch size, limits, start. train_collator: collates training samples; None: torch's default.
    callback_samplers: after an update at which some are due, each of these is read once, in the order given.
    Both are copied: later changes of them change nothing here.

    Iterating yields (is_full_batch, index), True on the last index of each batch; indices count through the concatenated `dataset`:
    those of callback i begin at `index_offsets[i]`. Every pass begins at the start that the config gives; the pass after
    `load_state_dict` goes on from there. Starting in the middle of an epoch skips the indices before, so with a train_sampler whose
    order is a function of the epoch, it gives the same indices and callbacks as never stopping. (torch's RandomSampler draws a new
    order each time.) Costs about 0.1 microseconds an index, 0.2 a batch and 7 a pass over a callback, and no memory beyond a batch or
    64 indices: that many are read of a sampler ahead of smaller batches, but never beyond an epoch or an update at which a callback is due.

    dataset, collator, batch_sampler: for a DataLoader of your own; an item of `dataset` is (0, training sample) or (i + 1, sample of
    callback i). batch_size: that of the training, cut to len(train_sampler) if `drop_last`.
    start_epoch, start_update, start_sample: of the config, in all three units.

    Raises ArgumentError for a sampler without length or dataset, an empty train_sampler, a start between batches, and, while iterating,
    for one that gives other indices than its length and its dataset allow.

    >>> from torch.utils.data import SequentialSampler
    >>> from leanreplay.torch import InterleavedSampler, InterleavedSamplerConfig, SamplerIntervalConfig
    >>> train, test = SequentialSampler(range(5)), SequentialSampler(range(100, 103))
    >>> config = InterleavedSamplerConfig(batch_size=2, max_epochs=1, drop_last=False)
    >>> sampler = InterleavedSampler(train, config, callback_samplers=[SamplerIntervalConfig(test, every_n_updates=2)])
    >>> list(sampler.batch_sampler), len(sampler)
    ([[0, 1], [2, 3], [5, 6], [7], [4]], 5)
    >>> [batch.tolist() for batch in sampler.get_data_loader()]
    [[0, 1], [2, 3], [100, 101], [102], [4]]
    """

    def __init__(
        self,
        train_sampler: Any,
        config: InterleavedSamplerConfig,
        train_collator: Callable[[Any], Any] | None = None,
        callback_samplers: Sequence[SamplerIntervalConfig] | None = None,
    ) -> None:
        callbacks = [] if callback_samplers is None else list(callback_samplers)
        if not isinstance(config, InterleavedSamplerConfig):
            raise ArgumentError(f"config must be an InterleavedSamplerConfig, got {type(config).__name__}")
        for callback in callbacks:
            if not isinstance(callback, SamplerIntervalConfig):
                raise ArgumentError(f"callback_samplers must hold SamplerIntervalConfigs, got {type(callback).__name__}")
        self.config = config = dataclasses.replace(config)
        self.train_sampler = train_sampler
        self.callback_samplers = callbacks = [dataclasses.replace(callback) for callback in callbacks]

        n = _require_sampler("train_sampler", train_sampler)
        self.start_epoch, self.start_update, self.start_sample = self.calculate_start(config, n)
        epochs = _Epochs(n, config.batch_size, config.drop_last) if n else None
        self.batch_size = epochs.batch_size if epochs and config.drop_last else config.batch_size

        names = ["train_sampler", *(f"callback_samplers[{i}]" for i in range(len(callbacks)))]
        samplers = [train_sampler, *(callback.sampler for callback in callbacks)]
        datasets = [_dataset_of(name, sampler) for name, sampler in zip(names, samplers, strict=True)]
        self.dataset = _Datasets(datasets)
        self.index_offsets: list[int] = self.dataset.cumulative_sizes[:-1]
        collators = [_require_collator("train_collator", train_collator), *(_require_collator("pipeline", c.pipeline) for c in callbacks)]
        self.collator = _Collator(collators)
        self.batch_sampler = _BatchSampler(self)

        self._lengths = [len(callback.sampler) for callback in callbacks]
        self._batch_sizes = [callback.batch_size or self.batch_size for callback in callbacks]
        sizes = [-(-length // size) for length, size in zip(self._lengths, self._batch_sizes, strict=True)]
        self._schedule = _Schedule(epochs if config._trains else None, config, callbacks, sizes)
        self._start = self._schedule.batches(self.start_update) if config._trains else 0
        seed = getattr(train_sampler, "seed", None)
        self._same: dict[str, Any] = {  # what a state must agree with
            "training": config._trains,
            "samples": n,
            "batch_size": self.batch_size,
            "drop_last": config.drop_last,
            "seed": seed if type(seed) is int else None,
            "callbacks": [
                {**{k: getattr(c, k) for k in c._given(*_EVERY)}, "samples": length, "batch_size": size}
                for c, length, size in zip(callbacks, self._lengths, self._batch_sizes, strict=True)
            ],
        }
        self._position = self._start  # batches delivered, counted from the start of a run that is never interrupted
        self._resume: int | None = None  # where the next pass begins, if not at the start

    @staticmethod
    def calculate_start(config: InterleavedSamplerConfig, sampler_length: int) -> tuple[int, int, int]:
        """The start of `config` as (epoch, update, sample), for a train_sampler of so many indices. All 0 if nothing is trained.

        Raises ArgumentError if the sampler is empty, or `start_sample` is not at the end of a batch.

        >>> from leanreplay.torch import InterleavedSampler, InterleavedSamplerConfig
        >>> InterleavedSampler.calculate_start(InterleavedSamplerConfig(4, drop_last=False, max_epochs=9, start_update=4), 10)
        (1, 4, 14)
        """
        if not config._trains:
            return 0, 0, 0
        if sampler_length < 1:
            raise ArgumentError("train_sampler is empty; give it samples, or set evaluation=True")
        epochs = _Epochs(sampler_length, config.batch_size, config.drop_last)
        if config.start_epoch is not None:
            update = config.start_epoch * epochs.updates
        elif config.start_update is not None:
            update = config.start_update
        elif config.start_sample is not None:
            update = epochs.updates_for(config.start_sample)
            end = epochs.samples_after(update)
            if end != config.start_sample:
                before = epochs.samples_after(update - 1)
                raise ArgumentError(
                    f"start_sample={config.start_sample} lies within a batch of {epochs.batch_size} "
                    f"(epochs of {epochs.samples} samples); take {before} or {end}"
                )
        else:
            update = 0
        return update // epochs.updates, update, epochs.samples_after(update)

    def get_data_loader(self, num_workers: int = 0, pin_memory: bool = False, **dataloader_arguments: Any) -> DataLoader[Any]:
        """A DataLoader over all datasets; each one's samples go through its own collator. `state_dict` counts what it hands out.

        dataloader_arguments: any others of torch's DataLoader, for instance persistent_workers=True, except those that say what a batch
        is, and in_order=False (ArgumentError). A pass that ended with an error stays ended (ModeError).
        """
        ours = {"dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "collate_fn"} & set(dataloader_arguments)
        if ours:
            raise ArgumentError(
                f"{', '.join(sorted(ours))}: the InterleavedSampler decides that; set it in its config, or pass its dataset, batch_sampler "
                "and collator to a DataLoader of your own"
            )
        if not dataloader_arguments.get("in_order", True):
            raise ArgumentError("in_order=False cannot be resumed, as the batches delivered would not be the first ones; leave it out")
        return _Loader(self, num_workers=num_workers, pin_memory=pin_memory, **dataloader_arguments)

    def __iter__(self) -> Iterator[tuple[bool, int]]:
        position = self._begin()
        for batch in self._batches(position):
            last = batch.pop()
            for index in batch:
                yield False, index
            position += 1
            self._position = position
            yield True, last

    def __len__(self) -> int:
        """Batches that the next pass will deliver, training and callbacks, without reading any sampler."""
        return max(0, self._schedule.total - self._next)

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: how many batches the last pass delivered (those that workers have ready do not count). Plain values.

        Of loaders made by `get_data_loader`; iterating the sampler itself or `batch_sampler`, a batch is delivered with its last index.

        >>> from torch.utils.data import SequentialSampler
        >>> from leanreplay.torch import InterleavedSampler, InterleavedSamplerConfig
        >>> sampler = InterleavedSampler(SequentialSampler(range(6)), InterleavedSamplerConfig(2, max_epochs=1))
        >>> loader = sampler.get_data_loader()
        >>> for batch in loader:
        ...     state = sampler.state_dict()
        ...     break
        >>> sampler.load_state_dict(state)
        >>> list(loader)
        [tensor([2, 3]), tensor([4, 5])]
        """
        return {"format": 1, "batches": self._position, "of": {**self._same, "callbacks": [dict(c) for c in self._same["callbacks"]]}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next pass goes on with the batch that would have come next; the start in the config does not matter then.

        Limits may differ. Raises StateError if batch sizes, lengths, intervals or the train_sampler's seed do.
        """
        if (
            not isinstance(state, Mapping)
            or state.get("format") != 1
            or type(state.get("batches")) is not int
            or state["batches"] < 0
            or not isinstance(state.get("of"), Mapping)
        ):
            raise StateError(f"not a state of an InterleavedSampler: expected a dict with format 1, batches and of, got {state!r:.200}")
        wrong = [f"{key}: {state['of'].get(key)!r}, here {value!r}" for key, value in self._same.items() if state["of"].get(key) != value]
        if wrong:
            raise StateError(f"the state is of another InterleavedSampler ({'; '.join(wrong)}); make this one with the same settings")
        self._resume = self._position = state["batches"]

    # -- batches -----------------------------------------------------------------------------------------------------

    @property
    def _next(self) -> int:
        """Where the next pass begins."""
        return self._start if self._resume is None else self._resume

    def _begin(self) -> int:
        """A new pass begins: where."""
        self._position = self._next
        self._resume = None
        return self._position

    def _batches(self, position: int) -> Iterator[list[int]]:
        """Batches of indices from batch `position` on."""
        if self._schedule.epochs is None:
            everything = itertools.chain.from_iterable(self._callback(i) for i in range(len(self.callback_samplers)))
            return itertools.islice(everything, position, None)
        update, delivered = self._schedule.locate(position)
        return itertools.islice(self._updates(update, self._schedule.epochs), delivered, None)

    def _updates(self, update: int, epochs: _Epochs) -> Iterator[list[int]]:
        """The batches of updates `update`, update + 1, ... and what is due after each."""
        schedule, size = self._schedule, len(self.dataset.datasets[0])  # type: ignore[arg-type]
        set_epoch = getattr(self.train_sampler, "set_epoch", None)
        due = [interval.next_due(update) for interval in schedule.intervals]
        while update < schedule.end:
            epoch, done = divmod(update, epochs.updates)
            if callable(set_epoch):
                set_epoch(epoch)
            indices = itertools.islice(self.train_sampler, done * epochs.batch_size, None)
            end = min(schedule.end, (epoch + 1) * epochs.updates)
            while update < end:
                stop = min([end, *due])
                count = epochs.samples_after(stop) - epochs.samples_after(update)
                yield from _cut(indices, count, epochs.batch_size, size, "train_sampler")
                update = stop
                for i, interval in enumerate(schedule.intervals):
                    if due[i] == update:
                        yield from self._callback(i)
                        due[i] = interval.next_due(update)

    def _callback(self, i: int) -> Iterator[list[int]]:
        """One pass over callback i."""
        name, n = f"callback_samplers[{i}]", self._lengths[i]
        size = len(self.dataset.datasets[i + 1])  # type: ignore[arg-type]
        indices = iter(self.callback_samplers[i].sampler)
        yield from _cut(indices, n, self._batch_sizes[i], size, name, self.index_offsets[i])
        if next(indices, None) is not None:
            raise ArgumentError(f"{name} gave more than the {n} indices that its length was; the length must be right, and stay the same")


def _cut(indices: Iterator[int], count: int, batch_size: int, size: int, name: str, offset: int = 0) -> Iterator[list[int]]:
    """The next `count` indices in batches. They must lie in the sampler's own dataset of `size`: beyond it lies another one."""
    step = batch_size * max(1, _AHEAD // batch_size)
    for start in range(0, count, step):
        n = min(step, count - start)
        some = list(itertools.islice(indices, n))
        if len(some) < n:
            raise ArgumentError(f"{name} gave fewer indices than its length says; the length must be right, and stay the same")
        try:
            low, high = min(some), max(some)
            inside = low >= 0 and high < size
        except TypeError:
            raise ArgumentError(f"{name} gave {some[0]!r:.200}; a sampler must give single indices") from None
        if not inside:
            raise ArgumentError(f"{name} gave an index out of range ({low} to {high}), but its dataset has {size} samples")
        if offset:
            some = [offset + index for index in some]
        for first in range(0, n, batch_size):
            yield some[first : first + batch_size]


class ShuffleSampler(Sampler[int]):
    """All indices of a dataset in an order that depends on (seed, epoch) alone, so that a run can be resumed in the middle of an epoch.

    dataset: anything with a length. seed: 128-bit integer. The order sorts 64-bit hashes of the indices, which never tie: the same on
    every machine and with every version of NumPy. Costs 16 bytes and about 0.1 microseconds per index at the start of an epoch.

    >>> from leanreplay.torch import ShuffleSampler
    >>> sampler = ShuffleSampler(range(8), seed=1)
    >>> sampler.set_epoch(3)
    >>> list(sampler) == list(sampler), sorted(sampler)
    (True, [0, 1, 2, 3, 4, 5, 6, 7])
    """

    def __init__(self, dataset: Any, seed: int = 0) -> None:
        if length(dataset) < 0:
            raise ArgumentError(f"ShuffleSampler takes a dataset with a length, got {type(dataset).__name__}")
        self.dataset, self.epoch = dataset, 0
        self.seed = integer("seed", seed, -(2**127), 2**127 - 1) or 0

    def set_epoch(self, epoch: int) -> None:
        """Which order the next `iter` gives; epochs count from 0."""
        self.epoch = integer("epoch", epoch, 0, _MOST) or 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        k0, k1 = key_pair(f"shuffle {self.epoch}", self.seed)
        keys = np.empty(len(self.dataset), np.uint64)
        reservoir.position_keys(np.arange(keys.shape[0]), k0, k1, keys)
        order = np.argsort(keys)
        for start in range(0, keys.shape[0], _CHUNK):
            yield from order[start : start + _CHUNK].tolist()
