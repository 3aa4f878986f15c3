"""AsyncReservoir stopped, killed and resumed; and what it loads before the first epoch."""

from __future__ import annotations

import functools
import io
import itertools
import os
import random
import signal

import pytest
import torch
from async_jobs import METHODS, Again, processes, settle, threads
from children import child, killed, result
from nightly import times
from torch.utils.data import BatchSampler, RandomSampler

from leanreplay import SlidingWindowBuffer, StateError
from leanreplay.torch import AsyncReservoir

pytestmark = pytest.mark.skipif("fork" not in METHODS, reason="needs fork")

EPOCHS = 9


def load(i):
    """An entry, several, none, or an error."""
    if i % 5 == 3:
        raise ValueError(i)
    return [(i, k) for k in range(i % 3)] if i % 2 else (i, -1)


def draw(i):
    """The same, with a draw of the job's own seed, which only processes have."""
    entries = load(i)
    return [(*entry, random.random()) for entry in entries] if type(entries) is list else (*entries, float(torch.rand(())))


def shuffled(snapshot, generator):
    return BatchSampler(RandomSampler(snapshot, generator=generator), 3, drop_last=False)


OPTIONS = {
    "plain": {"min_reservoir_samples": 3},
    "batches": {
        "min_reservoir_samples": 4,
        "sampler": shuffled,
        "maximum_number_of_samples_per_epoch": 7,
        "max_reservoir_replacement_size": 2,
    },
    "a whole pass": {"min_reservoir_samples": 2, "max_jobs_at_once": 0},
}


def make(kind, begin=threads, function=load, source=None, **options):
    given = {
        "deterministic": True,
        "flatten": True,
        "on_error": "skip",
        "max_jobs_at_once": 5,
        "seed": 4,
        "workers": 2,
        **OPTIONS[kind],
        **options,
    }
    return begin(range(13) if source is None else source, function, most=8, **given)


def stored(state):
    """A state as a checkpoint has it."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def rest(reservoir):
    """All that is left of the run, batch by batch."""
    found = []
    while reservoir.epoch < EPOCHS or reservoir.state_dict()["batches"] is not None:
        found += reservoir
    return found


@pytest.mark.parametrize("kind", OPTIONS)
def test_resume_anywhere(kind):
    """At every batch, and between epochs: nothing is lost, nothing comes twice, with other workers and a source without a length too."""
    with make(kind) as whole:
        expected = rest(whole)
        skipped = whole.skipped
    for stop in range(0, len(expected) + 1, times(3, 1)):
        source = Again(13) if stop % 2 else None
        with make(kind, source=source) as one:
            run = batches(one)  # which is not broken off before the state is taken
            had = list(itertools.islice(run, stop))
            state = stored(one.state_dict())
        with make(kind, source=source, workers=1) as other:
            other.load_state_dict(state)
            assert stored(other.state_dict()) == state
            assert had + rest(other) == expected
            assert other.skipped == skipped


def batches(reservoir):
    """The batches of all epochs."""
    while reservoir.epoch < EPOCHS:
        yield from reservoir


def test_between_epochs():
    """A state between epochs begins a new one; so does one after an epoch that was broken off."""
    with make("plain") as one:
        list(one)
        for _ in one:
            break
        state, third = one.state_dict(), list(one)
        assert state["epoch"] == 2 and state["batches"] is None
        assert stored(state)["entries"] == state["entries"]
    with make("plain") as other:
        other.load_state_dict(state)
        assert list(other) == third


def test_killed_training(tmp_path):
    """A process that keeps a state with each batch, killed after any, and another that goes on: together what one run gives."""
    path, kept = tmp_path / "run.pt", tmp_path / "new.pt"
    run = functools.partial(make, "batches", processes, draw)
    with run() as whole:
        expected = rest(whole)

    def train(until):
        seen = []
        with run() as reservoir:
            if path.exists():
                checkpoint = torch.load(path, weights_only=True)
                seen = checkpoint["seen"]
                reservoir.load_state_dict(checkpoint["reservoir"])
            while reservoir.epoch < EPOCHS or reservoir.state_dict()["batches"] is not None:
                for batch in reservoir:
                    seen.append(batch)
                    if len(seen) == until:
                        os.kill(os.getpid(), signal.SIGKILL)
                    torch.save({"seen": seen, "reservoir": reservoir.state_dict()}, kept)
                    os.replace(kept, path)
        return seen

    for until in (1, 2, len(expected) // 2, len(expected)):
        killed(*child(lambda pipe, until=until: train(until)))
    found = result(*child(lambda pipe: train(0)))
    assert found == [[list(entry) for entry in batch] for batch in expected]


def test_entries_in_a_buffer(tmp_path):
    """Their state is the buffer's own, and goes back with the reservoir's."""
    options = {"min_reservoir_samples": 4, "max_jobs_at_once": 3, "deterministic": True}
    with SlidingWindowBuffer(6, tmp_path / "entries.h5") as buffer:
        with threads(range(50), float, most=5, buffer=buffer, **options) as one:
            list(one)
            epoch = iter(one)
            before = [next(epoch), next(epoch)]
            states = stored([one.state_dict(), buffer.state_dict()])
            expected = [*epoch], [*one], [*one]
        assert states[0]["entries"] is None and len(before) == 2
        with threads(range(50), float, most=5, buffer=buffer, **options) as other:
            other.load_state_dict(states[0])
            buffer.load_state_dict(states[1])
            assert ([*other], [*other], [*other]) == expected


def test_unordered_jobs_are_not_lost():
    """Without `deterministic` the order is that of the workers; every sample of the pass still comes once."""
    with threads(range(20), most=40, workers=3, max_jobs_at_once=7) as one:
        one.start()
        settle(one)
        had = list(one)
        state = stored(one.state_dict())
        assert sorted(had + one.queued()) == list(range(14))
    with threads(range(20), most=40, workers=3, max_jobs_at_once=7) as other:
        other.load_state_dict(state)
        settle(other)
        assert sorted(other) == list(range(14))


def test_loading_before_the_first_epoch():
    """`start` queues jobs, once; `queued` names them until an epoch takes them in, also in an order that is fixed."""
    for options in ({}, {"deterministic": True}):
        with threads(range(9), most=9, workers=2, max_jobs_at_once=3, **options) as reservoir:
            assert reservoir.queued() == []
            reservoir.start()
            reservoir.start()
            assert reservoir.queued() == [0, 1, 2] and reservoir.reservoir_size() == 0 and reservoir.epoch == 0
            settle(reservoir)
            assert sorted(reservoir) == [0, 1, 2]
            assert reservoir.queued() == [3, 4, 5]


def test_states_of_others():
    with make("plain") as reservoir:
        list(reservoir)
        state = reservoir.state_dict()
    with threads(range(13), most=8, min_reservoir_samples=3, max_jobs_at_once=5, flatten=True, seed=4) as other:
        with pytest.raises(StateError, match=r"another AsyncReservoir .*deterministic: True, here False"):
            other.load_state_dict(state)
        wrong = [None, {}, {**state, "format": 2}, {**state, "pending": [1]}, {**state, "good": -2}, {**state, "batches": -1}]
        for bad in wrong:
            with pytest.raises(StateError, match="not a state of an AsyncReservoir"):
                other.load_state_dict(bad)
        mine = other.state_dict()
        for bad in ({**mine, "entries": None}, {**mine, "entries": [0] * 9}):
            with pytest.raises(StateError, match="do not fit"):
                other.load_state_dict(bad)
        assert other.epoch == 0 and other.queued() == []
    assert isinstance(other, AsyncReservoir)
