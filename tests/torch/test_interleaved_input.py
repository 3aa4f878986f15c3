"""InterleavedSampler in several processes, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle

import numpy as np
import pytest
import torch
from interleaved_oracle import KINDS, STARTS, STOPS, Numbers, Order, naive, own_numbers, resumed_everywhere
from interpreter import Script
from torch.utils.data import IterableDataset, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from leanreplay import ArgumentError
from leanreplay.torch import (
    InterleavedSampler,
    InterleavedSamplerConfig,
    SamplerIntervalConfig,
)

# -- torch.distributed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("rank", "drop_last"), [(0, False), (1, False), (2, True)])
def test_distributed_sampler(rank, drop_last, shuffle):
    """Each rank's share of each epoch, and of each callback; resumed at every position; the same schedule on all ranks."""

    def build(rank):
        train = DistributedSampler(Numbers(20), 3, rank, shuffle, seed=5, drop_last=drop_last)
        test = DistributedSampler(Numbers(7, 100), 3, rank, shuffle=False)
        callbacks = [SamplerIntervalConfig(test, every_n_samples=5, batch_size=2)]
        return InterleavedSampler(train, InterleavedSamplerConfig(2, drop_last, max_epochs=3), callback_samplers=callbacks)

    def order(epoch):
        other = DistributedSampler(Numbers(20), 3, rank, shuffle, seed=5, drop_last=drop_last)
        other.set_epoch(epoch)
        return list(other)

    sampler = build(rank)
    callback = sampler.callback_samplers[0]
    expected = naive(order, len(order(0)), sampler.config, [(callback, list(callback.sampler), 20)])
    if shuffle:
        assert order(0) != order(1)
    assert list(sampler.batch_sampler) == expected
    resumed_everywhere(lambda: build(rank), own_numbers(expected, sampler), lambda s: s.get_data_loader(), lambda b: b.tolist())
    shapes = {tuple(len(batch) for batch in build(r).batch_sampler) for r in range(3)}
    assert len(shapes) == 1  # else a collective call would wait for ever
    assert build(0).state_dict() == build(1).state_dict()  # so the checkpoint of one rank serves all


DISTRIBUTED = """
import sys, torch, torch.distributed as dist
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler
from leanreplay.torch import InterleavedSampler, InterleavedSamplerConfig, SamplerIntervalConfig

class Numbers(Dataset):
    def __init__(self, n, base): self.n, self.base = n, base
    def __len__(self): return self.n
    def __getitem__(self, i): return self.base + i

rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)

def build():
    train, test = Numbers(21, 0), Numbers(5, 100)
    callbacks = [SamplerIntervalConfig(DistributedSampler(test, shuffle=False), every_n_updates=3)]
    return InterleavedSampler(DistributedSampler(train, seed=2), InterleavedSamplerConfig(4, False, max_epochs=2), None, callbacks)

def gathered(batch):
    both = [torch.zeros_like(batch) for _ in range(2)]
    dist.all_gather(both, batch)  # fails if the ranks are not in step
    return [b.tolist() for b in both]

whole = [gathered(b) for b in build().get_data_loader()]
stopped, sampler = [], build()
for batch in sampler.get_data_loader():
    stopped.append(gathered(batch))
    if len(stopped) == 5:
        break
state = [sampler.state_dict()]
dist.broadcast_object_list(state, src=0)
sampler = build()
sampler.load_state_dict(state[0])
stopped += [gathered(b) for b in sampler.get_data_loader()]
assert stopped == whole, (stopped, whole)
epochs = [[], []]
count = 0
for both in whole:
    if both[0][0] < 100:
        epochs[count // 3] += both[0] + both[1]
        count += 1
assert count == 6 and all(sorted(set(e)) == list(range(21)) and len(e) == 22 for e in epochs), epochs
assert epochs[0] != epochs[1]
assert [b for b in whole if b[0][0] >= 100] == [[[100, 102, 104], [101, 103, 100]]] * 2, whole
dist.destroy_process_group()
print("in step")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_torch_distributed(tmp_path):
    """Two real processes: in step, every sample once an epoch (but for the padding), resumed from the state of one rank."""
    runs = [Script(DISTRIBUTED, rank, tmp_path / "meet") for rank in range(2)]
    try:
        for run in runs:
            out, errors = run.communicate(timeout=240)
            assert (run.returncode, out) == (0, "in step\n"), errors
    finally:
        for run in runs:
            run.kill()


# -- checks ------------------------------------------------------------------------------------------------------------


FIVE = SequentialSampler(range(5))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "exactly one of every_n_epochs, every_n_updates, every_n_samples is needed, got none"),
        ({"every_n_epochs": 1, "every_n_updates": 1}, "got every_n_epochs, every_n_updates"),
        ({"every_n_epochs": 1, "every_n_samples": 1, "batch_size": 1}, "got every_n_epochs, every_n_samples"),
        ({"every_n_samples": 4}, "every_n_samples needs a batch_size"),
        *(({kind: bad, "batch_size": 2}, f"{kind} must be") for kind in KINDS for bad in (0, -1, 1.5, "2", True)),
        *(({"every_n_epochs": 1, "batch_size": bad}, "batch_size must be") for bad in (0, -3, 2.0, False)),
        ({"every_n_epochs": 1, "pipeline": 3}, "pipeline must be a function"),
        ({"every_n_epochs": 1, "sampler": None}, "sampler must be a torch sampler"),
        ({"every_n_epochs": 1, "sampler": iter([1])}, "sampler must be a torch sampler"),
        ({"every_n_epochs": 1, "sampler": 5}, "sampler must be a torch sampler"),
    ],
)
def test_interval_is_checked(arguments, says):
    with pytest.raises(ArgumentError, match=says):
        SamplerIntervalConfig(**{"sampler": FIVE, **arguments})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"max_epochs": None}, "at least one of max_epochs, max_updates, max_samples is needed, got none"),
        ({"max_epochs": None, "evaluation": True}, "at least one of max_epochs"),
        ({"start_epoch": 0, "start_update": 0}, "at most one of start_epoch, .*, got start_epoch, start_update"),
        ({"start_sample": 4, "start_update": 0}, "got start_update, start_sample"),
        *(({"batch_size": bad}, "batch_size must be") for bad in (0, -1, None, 2.5, "4", True)),
        *(({name: bad}, f"{name} must be") for name in STOPS + STARTS for bad in (-1, 1.0, "1", True)),
        *(({name: bad}, f"{name} must be True or False") for name in ("drop_last", "evaluation") for bad in (None, 1, "yes")),
    ],
)
def test_config_is_checked(arguments, says):
    with pytest.raises(ArgumentError, match=says):
        InterleavedSamplerConfig(**{"batch_size": 4, "max_epochs": 1, **arguments})


@pytest.mark.parametrize(
    ("config", "name", "bad", "good"),
    [
        (SamplerIntervalConfig(FIVE, every_n_epochs=2), "every_n_epochs", 0, 3),
        (SamplerIntervalConfig(FIVE, every_n_epochs=2), "every_n_epochs", None, np.int64(3)),
        (SamplerIntervalConfig(FIVE, every_n_epochs=2), "every_n_updates", 2, None),
        (SamplerIntervalConfig(FIVE, every_n_samples=2, batch_size=3), "batch_size", None, 1),
        (SamplerIntervalConfig(FIVE, every_n_samples=2, batch_size=3), "sampler", 3, range(4)),
        (SamplerIntervalConfig(FIVE, every_n_samples=2, batch_size=3), "pipeline", 3, list),
        (InterleavedSamplerConfig(4, max_epochs=1), "max_epochs", None, 0),
        (InterleavedSamplerConfig(4, max_epochs=1), "batch_size", 0, 1),
        (InterleavedSamplerConfig(4, max_epochs=1, start_epoch=3), "start_sample", 0, None),
        (InterleavedSamplerConfig(4, max_epochs=1), "drop_last", 0, False),
        (InterleavedSamplerConfig(4, max_epochs=1), "evaluation", None, np.bool_(True)),
        (InterleavedSamplerConfig(4, max_epochs=1), "max_epoch", 3, None),
        (InterleavedSamplerConfig(4, max_epochs=1), "_trains", 3, None),
    ],
)
def test_assignment_is_checked(config, name, bad, good):
    """What is refused leaves the config as it was; integers of NumPy become plain ones."""
    before = dataclasses.asdict(config)
    with pytest.raises(ArgumentError):
        setattr(config, name, bad)
    assert dataclasses.asdict(config).keys() == before.keys()
    assert all(v is before[k] or v == before[k] for k, v in vars(config).items() if k != "sampler")
    if name in before:
        for other in (config, copy.copy(config)):
            setattr(other, name, good)
            assert getattr(other, name) == good
            assert not isinstance(getattr(other, name), np.generic)
    assert dataclasses.replace(config) == config and dataclasses.is_dataclass(config)


def test_configs_are_plain_dataclasses():
    config = InterleavedSamplerConfig(batch_size=4, max_epochs=1)
    assert config == pickle.loads(pickle.dumps(config)) and config != InterleavedSamplerConfig(4, max_epochs=2)
    assert repr(config).startswith("InterleavedSamplerConfig(batch_size=4, drop_last=True, max_epochs=1, max_updates=None")
    restored = pickle.loads(pickle.dumps(config))
    with pytest.raises(ArgumentError, match="max_epochs"):
        restored.max_epochs = -1
    assert [f.name for f in dataclasses.fields(InterleavedSamplerConfig)] == ["batch_size", "drop_last", *STOPS, *STARTS, "evaluation"]
    assert [f.name for f in dataclasses.fields(SamplerIntervalConfig)] == ["sampler", "pipeline", *KINDS, "batch_size"]


class Endless(IterableDataset):
    def __len__(self):
        return 5

    def __iter__(self):
        return itertools.count()


@pytest.mark.parametrize(
    ("train", "callback", "says"),
    [
        (range(5), FIVE, "train_sampler: range has neither data_source nor dataset"),
        (FIVE, range(5), r"callback_samplers\[0\]: range has neither data_source nor dataset"),
        (iter([]), FIVE, "train_sampler must be a torch sampler"),
        (None, FIVE, "train_sampler must be a torch sampler"),
        (SequentialSampler([]), FIVE, "train_sampler is empty; .*evaluation=True"),
    ],
)
def test_samplers_are_checked(train, callback, says):
    with pytest.raises(ArgumentError, match=says):
        InterleavedSampler(
            train, InterleavedSamplerConfig(4, max_epochs=1), callback_samplers=[SamplerIntervalConfig(callback, every_n_epochs=1)]
        )


def test_arguments_are_checked():
    config = InterleavedSamplerConfig(4, max_epochs=1)
    with pytest.raises(ArgumentError, match="config must be an InterleavedSamplerConfig, got dict"):
        InterleavedSampler(FIVE, {"batch_size": 4})
    with pytest.raises(ArgumentError, match="SamplerIntervalConfigs, got SequentialSampler"):
        InterleavedSampler(FIVE, config, callback_samplers=[FIVE])
    with pytest.raises(ArgumentError, match="train_collator must be a function"):
        InterleavedSampler(FIVE, config, train_collator=3)
    for dataset in (Endless(), iter([])):
        sampler = Order(5)
        sampler.dataset = dataset
        with pytest.raises(ArgumentError, match="train_sampler: its dataset must have a length and be read by index"):
            InterleavedSampler(sampler, config)


class Given(SequentialSampler):
    """Gives these, says another length."""

    def __init__(self, indices, says, dataset):
        self.indices, self.says, self.data_source = indices, says, dataset

    def __len__(self):
        return self.says

    def __iter__(self):
        return iter(self.indices)


@pytest.mark.parametrize(
    ("indices", "says", "error"),
    [
        ([0, 1, 2], 4, "fewer indices"),
        ([], 4, "fewer indices"),
        ([0, 1, 2, 5], 4, r"out of range \(2 to 5\), but its dataset has 5|out of range \(0 to 5\), but its dataset has 5"),
        ([0, 1, 2, -1], 4, r"out of range \(-1 to 2\)"),
        ([0, 1, 2, (3, 4)], 4, "single indices"),
        ([[0, 1], [2, 3]], 2, "single indices"),
    ],
)
@pytest.mark.parametrize("where", ["train", "callback"])
def test_indices_that_would_read_the_neighbour(where, indices, says, error):
    """A sampler that is wrong about its dataset would silently read another one's samples."""
    bad = Given(indices, says, range(5))
    train, callback = (bad, FIVE) if where == "train" else (FIVE, bad)
    name = {"train": "train_sampler", "callback": r"callback_samplers\[0\]"}[where]
    sampler = InterleavedSampler(
        train, InterleavedSamplerConfig(2, max_epochs=1), callback_samplers=[SamplerIntervalConfig(callback, every_n_epochs=1)]
    )
    with pytest.raises(ArgumentError, match=f"{name} gave .*({error})"):
        list(sampler)


def test_a_callback_that_grows():
    """All of an evaluation, or an error: never silently a part of it."""
    samples = list(range(3))
    callbacks = [SamplerIntervalConfig(SequentialSampler(samples), every_n_updates=1)]
    sampler = InterleavedSampler(FIVE, InterleavedSamplerConfig(2, max_epochs=1), callback_samplers=callbacks)
    assert len(list(sampler.batch_sampler)) == 6
    samples.append(3)
    with pytest.raises(ArgumentError, match="more than the 3 indices"):
        list(sampler)
