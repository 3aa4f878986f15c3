"""fit killed anywhere and resumed to the same bits; folders that do not fit."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from training_jobs import KINDS, N, Super, accuracy, bits, data, die_at, make, network, run

from leanreplay import ExistsError, MissingError, ReservoirBuffer, StateError
from leanreplay.torch import CLSLearner, DERLearner, ERLearner, fit, saved_task
from leanreplay.torch.training.states import StateFolder

# -- killed and resumed ------------------------------------------------------------------------------------------------


class Augmented(Dataset):
    """Noise from every global generator, drawn when a sample is read."""

    def __init__(self, seed):
        self.x, self.y = data(seed=seed)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + 0.1 * (torch.randn(6) + random.random() + np.random.rand()), self.y[i]


def job(kind, folder, tasks=1, after=lambda learner: None):
    """Some tasks, with everything that has a state; started again, it goes on. Of some kinds every epoch is stored."""
    learner = make(kind, folder / "buffer.h5", dropout=0.2)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(11)
    memory = ReservoirBuffer(25, folder / "memory.h5", mode="a") if kind is DERLearner else None
    state, histories = folder / "run", []
    for task in range(saved_task(state) or 0, tasks):
        scheduler = torch.optim.lr_scheduler.OneCycleLR(learner.optimizer, 0.1, total_steps=40)
        options = {"val_dataset": data(20, 9), "metrics": {"accuracy": accuracy}, "metric": "accuracy", "mode": "max", "early_stopping": 2}
        options |= {"scheduler": scheduler, "scheduler_interval": "step", "gradient_clip_val": 1.0, "save_every": 4, "progress": False}
        options |= {"store": "every epoch" if kind is DERLearner else "first epoch", "restore_best": kind is not CLSLearner}
        options |= {"input_state_folder": state, "output_state_folder": state, "max_epochs": 3, "batch_size": 20, "task_id": task}
        options |= {"precision": "fp16"} if kind is Super else {}
        if kind is DERLearner:
            options |= {"val_memory": memory, "val_dataset": data(20, 9 + task), "train_metrics": {"accuracy": accuracy}}
        histories.append(fit(learner, Augmented(task), **options))
        after(learner)
    return learner, histories


def new_optimizer(learner):
    learner.optimizer = torch.optim.SGD(learner.model.parameters(), lr=0.01, momentum=0.5)


def killed(kind, point, function):
    """Run function() in a child that is killed at a point; whether it got there."""
    child = os.fork()
    if child == 0:
        try:
            die_at(kind, *point)
            function()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, "the child failed; see above"
    return os.WIFSIGNALED(status)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """What runs end with that nobody kills: kind, tasks, change between tasks -> (bits, histories)."""
    known = {}

    def get(kind, tasks, after):
        if (kind, tasks, after) not in known:
            learner, histories = job(kind, tmp_path_factory.mktemp("straight"), tasks, after)
            known[kind, tasks, after] = bits(learner), histories
        return known[kind, tasks, after]

    return get


def nothing(learner):
    pass


POINTS = [("before", "step", 1), ("after", "step", 1), ("before", "step", 9), ("after", "step", 22), ("after", "after_step", 18)]
POINTS += [("before", "save", 1), ("after", "save", 1), ("before", "replace", 3), ("after", "replace", 4), ("before", "fsync", 8)]
POINTS += [("after", "unlink", 2), ("before", "on_task_start", 1), ("before", "on_task_end", 1), ("after", "on_task_end", 1)]
POINTS += [("after", "state_dict", 3)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("kind", "point"),
    [*((ERLearner, point) for point in POINTS), *((k, p) for k in KINDS[1:] for p in (POINTS[3], POINTS[8]))],
    ids=lambda v: v.__name__ if isinstance(v, type) else "-".join(map(str, v)),
)
def test_killed_anywhere(tmp_path, straight, kind, point):
    """SIGKILL, and the same call once more: the same weights, optimizer, buffer and history as if nothing had happened."""
    assert killed(kind, point, lambda: job(kind, tmp_path))
    learner, (history,) = job(kind, tmp_path)
    expected, (straight_history,) = straight(kind, 1, nothing)
    assert bits(learner) == expected and history == straight_history
    assert not learner.buffer.check()
    assert sorted(name for name in os.listdir(tmp_path / "run") if name != "best.pt") == [
        f"state-{StateFolder(tmp_path / 'run').newest()}.rank0.pt"
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "points",
    [
        [("after", "step", 40)],
        [("after", "remember_task", 1), ("after", "on_task_end", 1), ("before", "on_task_start", 1), ("after", "step", 30)],
    ],
)
def test_several_tasks_killed_anywhere(tmp_path, straight, points):
    """A new optimizer for each task counts, in a run that was killed within and between tasks as in one that was not."""
    for point in points:
        killed(DERLearner, point, lambda: job(DERLearner, tmp_path, 3, new_optimizer))
    learner, histories = job(DERLearner, tmp_path, 3, new_optimizer)
    expected, straight_histories = straight(DERLearner, 3, new_optimizer)
    assert bits(learner) == expected and histories == straight_histories[-len(histories) :]


def test_an_exception_and_another_call(tmp_path, straight):
    """The same process goes on after an interrupt: from the last state."""
    learner = make(path=tmp_path / "buffer.h5", dropout=0.2)
    learner.buffer.close()

    class Interrupted(ERLearner):
        def step(self, x, y):
            if self.steps == 17:
                raise KeyboardInterrupt
            return super().step(x, y)

    with pytest.raises(KeyboardInterrupt):
        job(Interrupted, tmp_path)
    learner, (history,) = job(ERLearner, tmp_path)
    expected, (straight_history,) = straight(ERLearner, 1, nothing)
    assert bits(learner) == expected and history == straight_history


def test_a_finished_task_is_loaded_and_that_is_all(tmp_path, straight):
    job(ERLearner, tmp_path)
    calls = []

    class Counts(ERLearner):
        def step(self, x, y):
            calls.append(1)
            return super().step(x, y)

    before = sorted(os.listdir(tmp_path / "run"))
    learner, (history,) = job(Counts, tmp_path)
    expected, (straight_history,) = straight(ERLearner, 1, nothing)
    assert not calls and bits(learner) == expected and history == straight_history
    assert sorted(os.listdir(tmp_path / "run")) == before  # not even the state is written again
    learner.buffer.close()
    learner = make(Counts, tmp_path / "buffer.h5", dropout=0.2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(learner.optimizer, 0.1, total_steps=40)
    options = {"scheduler": scheduler, "scheduler_interval": "step", "max_epochs": 9, "input_state_folder": tmp_path / "run"}
    options |= {"val_dataset": data(5), "metrics": {"accuracy": accuracy}, "metric": "accuracy", "mode": "max", "restore_best": True}
    assert run(learner, **options).records == straight_history.records and not calls  # nor do more epochs begin it again


def test_a_chain_of_folders(tmp_path):
    """The state of one task is where the next begins, in another process as well as in this one."""

    def steps(learner):  # a scheduler of the task: it begins anew, also where the state of the task before had one
        return {"scheduler": torch.optim.lr_scheduler.StepLR(learner.optimizer, 2, 0.5)}

    first = make(path=tmp_path / "b.h5")
    run(first, output_state_folder=tmp_path / "0", **steps(first))
    first.buffer.close()
    second = make(path=tmp_path / "b.h5")
    assert not second.steps
    run(second, 1, input_state_folder=tmp_path / "0", output_state_folder=tmp_path / "1", **steps(second))
    plain = make()
    run(plain, **steps(plain))
    assert run(plain, 1, **steps(plain))["lr"] == [0.025, 0.025, 0.0125]
    assert bits(second) == bits(plain) and saved_task(tmp_path / "0") == 0 and saved_task(tmp_path / "1") == 1
    run(second, 2, output_state_folder=tmp_path / "1")  # its own
    assert saved_task(tmp_path / "1") == 2 and saved_task(tmp_path / "none") is None


def test_what_changes_between_tasks_counts(tmp_path):
    """A new optimizer and a larger head, in one process that gives the same folder for both: not undone by what that folder holds."""
    ours, plain = make(path=tmp_path / "b.h5"), make()
    both = {"input_state_folder": tmp_path / "run", "output_state_folder": tmp_path / "run"}
    for learner, options in ((ours, both), (plain, {})):
        run(learner, **options)
        learner.model[4] = torch.nn.Linear(16, 5)
        torch.nn.init.constant_(learner.model[4].weight, 0.1)
        torch.nn.init.zeros_(learner.model[4].bias)
        new_optimizer(learner)
        run(learner, 1, **options)
    assert bits(ours) == bits(plain)


def test_a_task_starts_once(tmp_path):
    """Not again when it is resumed, named or not."""

    class Counts(ERLearner):
        starts = 0

        def on_task_start(self, task=None):
            self.starts += 1
            super().on_task_start(task)

    stopped(tmp_path, task_id=None)
    learner = make(Counts, tmp_path / "b.h5")
    run(learner, input_state_folder=tmp_path / "run", task_id=None)
    assert learner.starts == 0 and learner.buffer.seen == N
    run(learner, task_id=None)
    assert learner.starts == 1


def test_a_copy_of_the_buffer(tmp_path):
    """save_buffer=True: the state is enough, without the buffer's file, in memory too; older copies go."""
    options = {"input_state_folder": tmp_path / "run", "output_state_folder": tmp_path / "run", "save_buffer": True, "save_every": 4}

    class Interrupted(DERLearner):
        def step(self, x, y):
            if self.steps == 17:
                raise KeyboardInterrupt
            return super().step(x, y)

    learner = make(Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(learner, **options)
    assert len(os.listdir(tmp_path / "run")) == 2
    again, plain = make(DERLearner), make(DERLearner)
    history = run(again, **options)
    assert history == run(plain) and bits(again) == bits(plain)


def large_loss(outputs, y):
    """Its scaled gradients overflow float16 in the first steps."""
    return 1000 * cross_entropy(outputs, y)


def test_a_scaler_is_resumed(tmp_path):
    """It goes on with the scale that overflows had brought it to: a step skipped is not skipped once more."""
    options = {"precision": "fp16", "gradient_clip_val": 0.1}
    stopped(tmp_path, 2, loss_fn=large_loss, **options)
    learner, plain = (make(path=path, loss_fn=large_loss) for path in (tmp_path / "b.h5", None))
    history = run(learner, input_state_folder=tmp_path / "run", **options)
    assert run(plain, **options) == history and bits(plain) == bits(learner)
    assert plain.steps < 3 * 11 and plain.buffer.seen == N  # some were skipped; their samples are stored


# -- folders that do not fit -------------------------------------------------------------------------------------------


def stopped(tmp_path, at=5, task=0, loss_fn=cross_entropy, **options):
    """A run that ended in the middle of an epoch, and left its state."""

    class Stops(ERLearner):
        def step(self, x, y, scaler=None):
            if self.steps == at:
                raise KeyboardInterrupt
            return super().step(x, y, scaler)

    learner = make(Stops, tmp_path / "b.h5", loss_fn=loss_fn)
    with pytest.raises(KeyboardInterrupt):
        run(learner, task, output_state_folder=tmp_path / "run", save_every=2, **options)
    learner.buffer.close()


def refused(tmp_path, error, message, learner=None, task=0, **options):
    """The run is refused, and has changed nothing."""
    learner = make(path=tmp_path / "b.h5") if learner is None else learner
    before, seen = [p.clone() for p in learner.model.parameters()], learner.buffer.seen
    with pytest.raises(error, match=message):
        run(learner, task, **options)
    assert all(a.equal(b) for a, b in zip(before, learner.model.parameters(), strict=True)) and learner.steps == 0
    assert learner.buffer.seen == seen
    learner.buffer.close()


def test_a_state_that_would_be_lost(tmp_path):
    stopped(tmp_path)
    refused(tmp_path, ExistsError, "holds a state already", output_state_folder=tmp_path / "run")
    refused(
        tmp_path, ExistsError, "give it as input_state_folder", input_state_folder=tmp_path / "other", output_state_folder=tmp_path / "run"
    )


def test_no_state(tmp_path):
    refused(tmp_path, MissingError, "holds no state", input_state_folder=tmp_path / "run")
    refused(tmp_path, MissingError, "holds no state", input_state_folder=tmp_path / "run", output_state_folder=tmp_path / "other")


def test_a_state_in_the_middle_of_another_task(tmp_path):
    stopped(tmp_path)
    both = {"input_state_folder": tmp_path / "run", "output_state_folder": tmp_path / "run"}
    refused(tmp_path, StateError, r"in the middle of task_id=0 \(epoch 0, step 4\), but this is task_id=1", task=1, **both)


def test_a_task_that_this_learner_has_just_finished(tmp_path):
    """Two data sets without names for the tasks: the second must not be taken for the first, finished one."""
    learner = make(path=tmp_path / "b.h5")
    both = {"input_state_folder": tmp_path / "run", "output_state_folder": tmp_path / "run", "task_id": None}
    run(learner, 0, **both)
    with pytest.raises(StateError, match="just finished task_id=None; give each task a task_id of its own"):
        run(learner, 1, **both)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, r"seed=1 \(state: 0\)"),
        ({"batch_size": 22}, r"new samples a step=11 \(state: 10\), replayed ones=11"),
        ({"precision": "bf16"}, "precision="),
        ({"scheduler": True}, "scheduler='StepLR'"),
        ({"store": False}, "store=False"),
        ({"val_dataset": data(5), "restore_best": True}, "restore_best='min val_loss'"),
    ],
)
def test_other_settings(tmp_path, options, message):
    stopped(tmp_path, seed=np.int64(0))
    learner = make(path=tmp_path / "b.h5")
    if "scheduler" in options:
        options = {"scheduler": torch.optim.lr_scheduler.StepLR(learner.optimizer, 1)}
    refused(tmp_path, StateError, message, learner, input_state_folder=tmp_path / "run", **options)


def test_the_state_of_another_model_method_or_optimizer(tmp_path):
    stopped(tmp_path)
    both = {"input_state_folder": tmp_path / "run", "output_state_folder": tmp_path / "run"}
    wider = torch.nn.Sequential(*network()[:4], torch.nn.Linear(16, 5))
    refused(
        tmp_path,
        StateError,
        r"another model: 4.weight has shape .*\[4, 16\].* there and .*\[5, 16\]",
        make(path=tmp_path / "b.h5", model=wider),
        **both,
    )
    refused(
        tmp_path,
        StateError,
        "another model: weight has shape None there",
        make(path=tmp_path / "b.h5", model=torch.nn.Linear(6, 4)),
        **both,
    )
    refused(tmp_path, StateError, "terms", make(DERLearner, path=tmp_path / "b.h5"), **both)
    learner = make(path=tmp_path / "b.h5")
    learner.optimizer = torch.optim.Adam(learner.model.parameters())
    refused(tmp_path, StateError, r"optimizer='Adam' \(state: 'SGD'\)", learner, **both)
    learner = make(path=tmp_path / "b.h5")
    history = run(learner, **both)  # and after all that, it can still go on
    plain = make()
    assert run(plain) == history and bits(plain) == bits(learner)


def test_the_state_of_another_buffer(tmp_path):
    stopped(tmp_path)
    refused(tmp_path, StateError, "another buffer", make(path=tmp_path / "other.h5"), input_state_folder=tmp_path / "run")


@pytest.mark.parametrize("damage", ["cut", "text", "pickle", "other", "kinds", "format"])
def test_damaged_states(tmp_path, damage):
    """What is no state of fit is refused, and runs no code."""
    stopped(tmp_path)
    (path,) = (tmp_path / "run").glob("state-*")
    state = torch.load(path, weights_only=True)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "pickle":
        torch.save({**state, "settings": Path("x")}, path)
    elif damage == "other":
        torch.save([1, 2], path)
    elif damage == "kinds":
        torch.save({**state, "epoch": "3"}, path)
    else:
        torch.save({**state, "format": 2}, path)
    message = {"other": "not written by fit", "kinds": "no epoch in it", "format": "of format 2"}.get(damage, "weights_only=True")
    refused(tmp_path, StateError, message, input_state_folder=tmp_path / "run")
    with pytest.raises(StateError, match=message):
        saved_task(tmp_path / "run")


def test_a_state_that_could_not_be_loaded_replaces_none(tmp_path):
    """An optimizer with an object in its state: refused when it is written, the older state stays, and no temporary file."""

    class Strange(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.state["x"]["object"] = Path("here")

    learner = make(path=tmp_path / "b.h5")
    learner.optimizer = Strange(learner.model.parameters(), lr=0.1)
    with pytest.raises(StateError, match="must be tensors and plain values"):
        run(learner, output_state_folder=tmp_path / "run", save_every=2)
    assert os.listdir(tmp_path / "run") == ["state-1.rank0.pt"] and saved_task(tmp_path / "run") == 0
