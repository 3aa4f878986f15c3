"""InterleavedSampler: one stream of indices for training and its periodic evaluations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import Sampler

from ....arguments import instance
from ....errors import ArgumentError
from ..states import check_state, is_count
from .batches import Batches, Reader
from .config import InterleavedSamplerConfig, SamplerIntervalConfig, collator, dataset_of, interval_of, sampler_length, trains
from .loading import BatchSampler, Collator, Datasets, Loader, Progress
from .schedule import Epochs, Interval, Schedule


class InterleavedSampler(Sampler[tuple[bool, int]]):
    """One stream of indices for training and its periodic evaluations.

    So one DataLoader serves all of them, and its workers stay warm.

    train_sampler: read for ever, epoch by epoch. Before each epoch its `set_epoch(epoch)` is
        called, if it has one (DistributedSampler, ShuffleSampler).
    config: batch size, limits, start. train_collator: collates training samples; None: torch's.
    callback_samplers: after an update at which some are due, each of these is read once, in the
        order given. config and callbacks are copied: later changes of them change nothing here.

    Iterating yields (is_full_batch, index), with True for the last index of each batch. Indices
    count through the concatenated `dataset`: those of callback i begin at `index_offsets[i]`. Every
    pass begins at the start that the config gives; the pass after `load_state_dict` goes on from
    there. A start within an epoch skips the indices before it. If the order of the train_sampler
    follows from the epoch, this gives the same indices and callbacks as never stopping. (torch's
    RandomSampler draws a new order each time.)

    Costs about 0.1 microseconds an index, 0.2 a batch and 7 a pass over a callback. Memory: a batch
    or 64 indices. So many indices are read of a sampler ahead of smaller batches, but never beyond
    an epoch or an update at which a callback is due.

    dataset, collator, batch_sampler: for a DataLoader of your own. An item of `dataset` is
        (0, training sample) or (i + 1, sample of callback i).
    batch_size: that of the training, cut to len(train_sampler) if `drop_last`.
    start_epoch, start_update, start_sample: the start of the config, in all three units.

    Raises ArgumentError for a sampler without length or dataset, an empty train_sampler, a start
    between batches, and, while iterating, for a sampler that gives other indices than its length
    and its dataset allow.

    >>> from torch.utils.data import SequentialSampler
    >>> from leanreplay.torch import InterleavedSampler, InterleavedSamplerConfig
    >>> from leanreplay.torch import SamplerIntervalConfig
    >>> train, test = SequentialSampler(range(5)), SequentialSampler(range(100, 103))
    >>> config = InterleavedSamplerConfig(batch_size=2, max_epochs=1, drop_last=False)
    >>> callbacks = [SamplerIntervalConfig(test, every_n_updates=2)]
    >>> sampler = InterleavedSampler(train, config, callback_samplers=callbacks)
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
        instance(config, InterleavedSamplerConfig, "config must be an InterleavedSamplerConfig")
        for callback in callbacks:
            instance(callback, SamplerIntervalConfig, "callback_samplers must hold SamplerIntervalConfigs")
        self.config = config = dataclasses.replace(config)
        self.train_sampler = train_sampler
        self.callback_samplers = callbacks = [dataclasses.replace(callback) for callback in callbacks]

        n = sampler_length("train_sampler", train_sampler)
        self.start_epoch, self.start_update, self.start_sample = self.calculate_start(config, n)
        epochs = Epochs(n, config.batch_size, config.drop_last) if n else None
        self.batch_size = epochs.batch_size if epochs and config.drop_last else config.batch_size

        names = ["train_sampler", *(f"callback_samplers[{i}]" for i in range(len(callbacks)))]
        samplers = [train_sampler, *(callback.sampler for callback in callbacks)]
        datasets = [dataset_of(name, sampler) for name, sampler in zip(names, samplers, strict=True)]
        self.dataset = Datasets(datasets)
        self.index_offsets: list[int] = self.dataset.cumulative_sizes[:-1]
        self.collator = Collator([collator("train_collator", train_collator), *(collator("pipeline", c.pipeline) for c in callbacks)])

        sizes = [self.batch_size, *(callback.batch_size or self.batch_size for callback in callbacks)]
        readers = [Reader(*of) for of in zip(names, samplers, datasets, sizes, [0, *self.index_offsets], strict=True)]
        schedule = _schedule(config, epochs, callbacks, readers[1:]) if epochs and trains(config) else None
        self._batches = Batches(schedule, readers[0], readers[1:])
        self._progress = Progress(schedule.batches_after(self.start_update) if schedule else 0, self._batches.total)
        self.batch_sampler = BatchSampler(self._batches, self._progress)
        seed = getattr(train_sampler, "seed", None)
        self._settings: dict[str, Any] = {  # what a state must agree with
            "training": trains(config),
            "samples": n,
            "batch_size": self.batch_size,
            "drop_last": config.drop_last,
            "seed": seed if type(seed) is int else None,
            "callbacks": [
                {**dict([interval_of(callback)]), "samples": reader.length, "batch_size": reader.batch_size}
                for callback, reader in zip(callbacks, readers[1:], strict=True)
            ],
        }

    @staticmethod
    def calculate_start(config: InterleavedSamplerConfig, sampler_length: int) -> tuple[int, int, int]:
        """Give the start of `config` as (epoch, update, sample); all 0 if nothing is trained.

        sampler_length: the number of indices of the train_sampler. Raises ArgumentError if it is 0,
        or if `start_sample` is not at the end of a batch.

        >>> from leanreplay.torch import InterleavedSampler, InterleavedSamplerConfig
        >>> config = InterleavedSamplerConfig(4, drop_last=False, max_epochs=9, start_update=4)
        >>> InterleavedSampler.calculate_start(config, 10)
        (1, 4, 14)
        """
        if not trains(config):
            return 0, 0, 0
        if sampler_length < 1:
            raise ArgumentError("train_sampler is empty; give it samples, or set evaluation=True")
        epochs = Epochs(sampler_length, config.batch_size, config.drop_last)
        update = config.start_update or 0
        if config.start_epoch is not None:
            update = config.start_epoch * epochs.updates
        elif config.start_sample is not None:
            update = epochs.updates_for(config.start_sample)
            end = epochs.samples_after(update)
            if end != config.start_sample:
                before = epochs.samples_after(update - 1)
                raise ArgumentError(
                    f"start_sample={config.start_sample} lies within a batch of {epochs.batch_size} "
                    f"(epochs of {epochs.samples} samples); take {before} or {end}"
                )
        return update // epochs.updates, update, epochs.samples_after(update)

    def get_data_loader(self, num_workers: int = 0, pin_memory: bool = False, **dataloader_arguments: Any) -> Loader:
        """Make a DataLoader over all datasets. `state_dict` counts what the loader hands out.

        Its `start()` lets workers load before the first pass; `queued()` gives what they hold.
        The samples of each dataset go through its own collator. dataloader_arguments: any others of
        torch's DataLoader, for instance persistent_workers=True. Those that say what a batch is,
        and in_order=False, are an ArgumentError. A pass that ended with an error stays ended
        (ModeError).
        """
        ours = {"dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "collate_fn"} & set(dataloader_arguments)
        if ours:
            raise ArgumentError(
                f"{', '.join(sorted(ours))}: the InterleavedSampler decides that; set it in its config, or pass its dataset, batch_sampler "
                "and collator to a DataLoader of your own"
            )
        if not dataloader_arguments.get("in_order", True):
            raise ArgumentError("in_order=False cannot be resumed, as the batches delivered would not be the first ones; leave it out")
        options = {"num_workers": num_workers, "pin_memory": pin_memory, **dataloader_arguments}
        return Loader(self.dataset, self._batches, self._progress, self.collator, **options)

    def __iter__(self) -> Iterator[tuple[bool, int]]:
        position = self._progress.begin()
        for batch in self._batches.since(position):
            last = batch.pop()
            for index in batch:
                yield False, index
            position += 1
            self._progress.delivered = position
            yield True, last

    def __len__(self) -> int:
        """Count the batches of the next pass, training and callbacks, without reading a sampler."""
        return self._progress.remaining

    def state_dict(self) -> dict[str, Any]:
        """Give the place for a checkpoint: how many batches the last pass delivered. Plain values.

        Of a loader made by `get_data_loader`, batches that workers have ready do not count. Of the
        sampler itself and of `batch_sampler`, a batch is delivered with its last index.

        >>> from torch.utils.data import SequentialSampler
        >>> from leanreplay.torch import InterleavedSampler, InterleavedSamplerConfig
        >>> config = InterleavedSamplerConfig(2, max_epochs=1)
        >>> sampler = InterleavedSampler(SequentialSampler(range(6)), config)
        >>> loader = sampler.get_data_loader()
        >>> for batch in loader:
        ...     state = sampler.state_dict()
        ...     break
        >>> sampler.load_state_dict(state)
        >>> list(loader)
        [tensor([2, 3]), tensor([4, 5])]
        """
        settings = {**self._settings, "callbacks": [dict(c) for c in self._settings["callbacks"]]}
        return {"format": 1, "batches": self._progress.delivered, "of": settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass go on with the batch that would have come next.

        The start in the config does not matter then, and limits may differ. Raises StateError if
        batch sizes, lengths, intervals or the train_sampler's seed do.
        """
        check_state(state, "an InterleavedSampler", {"batches": is_count}, self._settings)
        self._progress.resume(state["batches"])


def _schedule(config: InterleavedSamplerConfig, epochs: Epochs, callbacks: list[SamplerIntervalConfig], readers: list[Reader]) -> Schedule:
    limits = (config.max_epochs, epochs.updates.__mul__), (config.max_updates, int), (config.max_samples, epochs.updates_for)
    end = min(updates(limit) for limit, updates in limits if limit is not None)
    intervals = [Interval(epochs, *interval_of(callback)) for callback in callbacks]
    return Schedule(epochs, end, [(interval, reader.batches) for interval, reader in zip(intervals, readers, strict=True)])
