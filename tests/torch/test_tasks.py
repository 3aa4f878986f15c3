"""Tasks as experiences: an ExperienceBalancedBuffer in a learner and in `fit`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from learner_oracle import batches, dense, sgd

from leanreplay import ArgumentError, ExperienceBalancedBuffer, StateError
from leanreplay.torch import CLSLearner, DERLearner, ERLearner, fit

KINDS = [ERLearner, DERLearner, CLSLearner]


def make(kind=ERLearner, buffer=None, **options):
    model = dense()
    buffer = ExperienceBalancedBuffer(12, seed=1) if buffer is None else buffer
    return kind(model, sgd(model), buffer, replay_batch_size=4, **options)


def train(learner, task, n=3):
    learner.on_task_start(task)
    for x, y in batches(n, 6):
        learner.step(x, y)


def sizes(learner):
    assert not learner.buffer.check()
    return learner.buffer.group_sizes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tasks", "numbers"),
    [
        ([0, 1, 2], [0, 1, 2]),
        ([3, 1, 3], [1, 3]),
        (["b", "a", "b"], [0, 1]),
        ([None, None, None], [0, 1, 2]),
        ([5, "a", None, "b", "a"], [5, 6, 7, 8]),
        ([np.int64(2), 2], [2]),
    ],
)
def test_each_task_is_an_experience(kind, tasks, numbers):
    """Numbers as they are, names in order of appearance, every call without a name the next one; each has the same rows."""
    learner = make(kind)
    for task in tasks:
        train(learner, task)
    assert list(sizes(learner)) == numbers and set(sizes(learner).values()) == {12 // len(numbers)}


def test_names_of_tasks_without_samples():
    """Two tasks are two numbers, also if the first one stored nothing."""
    learner = make()
    for task in ("a", "b", "a"):
        learner.on_task_start(task)
    train(learner, "a", 1)
    train(learner, "b", 1)
    assert sizes(learner) == {0: 6, 1: 6}


def test_before_and_after_a_task():
    """No task, no experience: refused before anything happens, and again after the task's end; not if nothing is stored."""
    learner, (x, y) = make(), batches(1, 6)[0]
    before = [p.clone() for p in learner.model.parameters()]
    with pytest.raises(ArgumentError, match=r"no task has begun: call on_task_start\(task\)"):
        learner.step(x, y)
    assert all(map(torch.equal, before, learner.model.parameters())) and learner.buffer.seen == 0
    train(learner, "a", 1)
    learner.on_task_end()
    with pytest.raises(ArgumentError, match="no task has begun"):
        learner.step(x, y)
    train(learner, "a", 1)
    assert sizes(learner) == {0: 12}
    make(buffer=learner.buffer, store=False).step(x, y)


@pytest.mark.parametrize("tasks", [(0, 1), (None, None), (None, "a"), ("a", None)])
def test_one_commit_of_two_tasks(tasks):
    """Batches that wait for one `after_step` belong to the task in which their loss was computed."""
    learner = make()
    for task in tasks:
        learner.on_task_start(task)
        for x, y in batches(2, 6):
            learner.loss(x, y).backward()
    learner.after_step()
    assert sizes(learner) == {0: 6, 1: 6} and learner.buffer.seen == 24


def test_resumed_states_go_on_with_the_numbers(tmp_path):
    """A learner that goes on from a state, in the middle of a task or between two, gives tasks the numbers that they had."""
    paths = [tmp_path / f"{i}.h5" for i in range(2)]
    learner = make(buffer=ExperienceBalancedBuffer(12, paths[0], seed=1))
    train(learner, "b")
    train(learner, "a")
    state = learner.state_dict()
    learner.buffer.close()
    again = make(buffer=ExperienceBalancedBuffer(12, paths[0], mode="a", seed=1))
    again.load_state_dict(state)
    x, y = batches(1, 6)[0]
    again.step(x, y)  # within "a"
    assert list(sizes(again)) == [0, 1] and again.buffer.seen == 42
    again.on_task_end()
    for task in ("b", "c", "a"):
        train(again, task)
    assert list(sizes(again)) == [0, 1, 2]
    for wrong in ({"experience": "a"}, {"experiences": {"a": 1}}, {"experiences": [["a", "b"]]}, {"experiences": [[1]]}):
        with pytest.raises(StateError, match="not a state"):
            again.load_state_dict({**state, **wrong})


def test_a_buffer_that_holds_experiences_already():
    """A name that the learner does not know is a new experience; a number is that one."""
    learner = make()
    learner.buffer.update([(np.zeros(4), i % 3) for i in range(6)])
    train(learner, "a")
    assert sizes(learner) == {0: 6, 1: 6}
    train(learner, 0)
    assert list(sizes(learner)) == [0, 1]


@pytest.mark.parametrize("names", [[0, 1, 2], ["x", "y", "x"], [None, None, None]])
def test_fit(names, tmp_path):
    """`fit` tells the task, also where it goes on from a state."""
    x, y = (torch.cat(column) for column in zip(*batches(4, 6), strict=True))
    learner = make(buffer=ExperienceBalancedBuffer(12, tmp_path / "b.h5", seed=1))
    for task in names:
        fit(learner, (x, y), task_id=task, max_epochs=1, batch_size=8, progress=False)
    assert list(sizes(learner)) == sorted({0: 0, 1: 1, 2: 2}) if names[0] != "x" else [0, 1]
