"""fit: what it refuses, and several processes."""

from __future__ import annotations

import math
import os
import signal
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import IterableDataset
from training_jobs import Bytes, N, Super, accuracy, bits, data, die_at, make, run

import leanreplay as lr
from leanreplay import ArgumentError, ModeError, ReservoirBuffer
from leanreplay.torch import CLSLearner, fit, saved_task

# -- bad arguments -----------------------------------------------------------------------------------------------------


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


BAD = [
    ({"learner": "ER"}, "learner must be a ReplayLearner"),
    ({"train_dataset": Endless()}, "train_dataset must be a dataset"),
    ({"train_dataset": []}, "train_dataset has no samples"),
    ({"train_dataset": (torch.zeros(3), torch.zeros(2))}, "train_dataset: x has 3 samples, y has 2"),
    ({"train_dataset": [1, 2, 3]}, "expected pairs"),
    ({"train_dataset": Bytes()}, "expected pairs"),
    ({"val_dataset": 3}, "val_dataset must be a dataset"),
    ({"max_epochs": 0}, "max_epochs must be from 1"),
    ({"max_epochs": None}, "max_epochs must be an integer"),
    ({"batch_size": 0}, "batch_size must be from 1"),
    ({"batch_size": 1}, "leaves no room for new samples"),
    ({"batch_memory_frac": 1.0}, "leaves no room for new samples; lower the fraction"),
    ({"batch_memory_frac": -0.1}, "batch_memory_frac must be a number from 0 to 1"),
    ({"batch_memory_frac": math.nan}, "batch_memory_frac must be a number"),
    ({"batch_memory_frac": "half"}, "batch_memory_frac must be a number"),
    ({"scheduler": "step"}, "scheduler must be a torch learning rate scheduler"),
    ({"scheduler": torch.optim.lr_scheduler.StepLR}, "scheduler must be a torch learning rate scheduler, made with learner.optimizer"),
    (
        {"scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), 1)},
        "belongs to another optimizer",
    ),
    ({"scheduler_interval": "batch"}, "scheduler_interval is one of"),
    ({"metric": "accuracy", "val_dataset": data(5)}, "metric is one of loss, got 'accuracy'"),
    ({"metric": "loss"}, "give a val_dataset"),
    ({"early_stopping": True}, "early_stopping: .* give a val_dataset"),
    ({"early_stopping": 0, "val_dataset": data(5)}, "early_stopping must be from 1"),
    ({"early_stopping": 1.5, "val_dataset": data(5)}, "early_stopping must be an integer"),
    ({"restore_best": True}, "restore_best: .* give a val_dataset"),
    ({"restore_best": 1}, "restore_best is one of"),
    ({"store": True}, "store is one of"),
    ({"store": "first"}, "store is one of"),
    ({"metrics": {"a": accuracy}}, "metrics: .* give a val_dataset"),
    ({"metrics": [accuracy], "val_dataset": data(5)}, "metrics must be a dict"),
    ({"metrics": {"a": 1}, "val_dataset": data(5)}, "metrics must be a dict"),
    ({"metrics": {"loss": accuracy}, "val_dataset": data(5)}, "another name"),
    ({"mode": "best"}, "mode is one of"),
    ({"gradient_clip_val": -1}, "gradient_clip_val must be a number from 0"),
    ({"gradient_clip_val": True}, "gradient_clip_val must be a number"),
    ({"gradient_clip_algorithm": "norm"}, "needs a gradient_clip_val"),
    ({"gradient_clip_algorithm": "both", "gradient_clip_val": 1}, "gradient_clip_algorithm is one of"),
    ({"precision": 16}, "precision is one of"),
    ({"train_collate_fn": 1}, "train_collate_fn must be a function"),
    ({"val_collate_fn": 1}, "val_collate_fn must be a function"),
    ({"test_transform": 1}, "test_transform must be a function"),
    ({"test_target_transform": 1}, "test_target_transform must be a function"),
    ({"logger": "print"}, "logger must be a function"),
    ({"seed": 0.5}, "seed must be an integer"),
    ({"seed": None}, "seed must be an integer"),
    ({"task_id": 1.0}, "task_id must be an integer, got 1.0"),
    ({"task_id": True}, "task_id must be an integer"),
    ({"save_every": 0}, "save_every must be from 1"),
    ({"output_state_folder": "run"}, "a buffer in memory ends with its process"),
    ({"output_state_folder": "", "save_buffer": True}, "output_state_folder '' cannot name"),
    ({"input_state_folder": 3}, "input_state_folder must be a str"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[f"{'-'.join(o)}-{i}" for i, (o, _) in enumerate(BAD)])
def test_bad_arguments(tmp_path, monkeypatch, options, message):
    """Refused before anything is trained, stored or written."""
    monkeypatch.chdir(tmp_path)
    learner = make()
    before = bits_of_model(learner)
    arguments = {"learner": learner, "train_dataset": data(20), "progress": False, **options}
    with pytest.raises(ArgumentError, match=message):
        fit(arguments.pop("learner"), arguments.pop("train_dataset"), **arguments)
    assert bits_of_model(learner) == before and learner.buffer.seen == 0 and not os.listdir(tmp_path)


def bits_of_model(learner):
    return [v.tolist() for v in learner.model.state_dict().values()]


def test_the_plateau_needs_something_to_look_at():
    learner = make()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(learner.optimizer)
    for options in ({}, {"val_dataset": data(5), "scheduler_interval": "step"}):
        with pytest.raises(ArgumentError, match="ReduceLROnPlateau needs"):
            run(learner, scheduler=scheduler, **options)
    with pytest.raises(ArgumentError, match=r"ReduceLROnPlateau\(mode='min'\) .* mode='max'; give both the same"):
        run(learner, scheduler=scheduler, val_dataset=data(5), mode="max")


def test_a_closed_buffer(tmp_path):
    """Is refused before the start of the task, which would perturb the weights."""
    learner = make(Super, tmp_path / "b.h5")
    before = bits_of_model(learner)
    learner.buffer.close()
    with pytest.raises(ModeError, match="closed"):
        run(learner)
    assert bits_of_model(learner) == before and learner.task is None


def test_a_metric_that_is_no_number():
    with pytest.raises(ArgumentError, match=r"metrics\['m'\] must give a number, got tensor"):
        run(make(), val_dataset=data(5), metrics={"m": lambda outputs, targets: outputs})


def test_validation_that_does_not_fit():
    """Labels that are no class, and a model that gives no tensor, are errors of our own that name the data."""
    x, y = data(5)
    with pytest.raises(ArgumentError, match=r"val_dataset: the learner's loss_fn does not take outputs, .* Target 9 is out of bounds"):
        run(make(), val_dataset=(x, y * 0 + 9))
    with pytest.raises(
        ArgumentError, match=r"val_dataset: the learner's loss_fn does not take outputs, torch.float32 of shape \(5, 4\), and targets"
    ):
        run(make(), val_dataset=(x, y.float()))


# -- several processes -------------------------------------------------------------------------------------------------


def worker(rank, folder, point=None):
    """Two tasks on one of two ranks; started again, it goes on. Rank 1 may be killed at a point."""

    class Learner(CLSLearner):
        def step(self, x, y):
            batches.append(x[:, 0].tolist())
            return super().step(x, y)

    learner, batches, logged, histories = make(Learner, folder / f"buffer{rank}.h5", stream=rank), [], [], []
    model, state = learner.model, folder / "run"
    if point is not None and rank == 1:
        die_at(Learner, *point)
    for task in range(saved_task(state) or 0, 2):
        options = {"val_dataset": data(21, 9), "metrics": {"accuracy": accuracy}, "metric": "accuracy", "mode": "max", "max_epochs": 2}
        options |= {"input_state_folder": state, "output_state_folder": state, "save_every": 2, "logger": logged.append}
        options["restore_best"] = True
        histories.append(run(learner, task, **options))
        assert learner.model is model
    stable = learner.stable_model.eval()  # what this method evaluates
    with torch.no_grad():  # of the best epoch
        assert histories[-1]["val_loss"][histories[-1].best_epoch] == pytest.approx(
            cross_entropy(stable(data(21, 9)[0]), data(21, 9)[1]).item(), rel=1e-5
        )
    weights = [v.tolist() for v in [*model.state_dict().values(), *learner.stable_model.parameters()]]
    torch.save((weights, histories[-1].records, bits(learner), len(logged), batches), folder / f"result{rank}.pt")


def refusals(rank):
    """What can be refused only by all ranks together."""
    biased = make(stream=rank)
    torch.nn.init.constant_(biased.model[0].bias, rank)
    other = make(stream=rank)
    other.buffer = ReservoirBuffer(40, seed=rank, stream=rank)
    several = [(make(stream=0), "streams"), (other, r"have seeds \[0, 1\]"), (biased, "different weights")]
    for learner, message in [*several, (make(stream=rank), "too few for 2 processes")]:
        with pytest.raises(ArgumentError, match=message):
            fit(learner, data(1 if "few" in message else 20), progress=False)


def two_forked(folder, **options):
    """`worker` on two ranks in forked children; how each ended. When one dies, the other is killed, as torchrun does."""
    folder.mkdir(exist_ok=True)
    store = folder / f"store{len(os.listdir(folder))}"
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            try:
                torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
                refusals(rank)
                worker(rank, folder, **options)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        children.append(child)
    first, status = os.wait()
    (other,) = {*children} - {first}
    if status:
        os.kill(other, signal.SIGKILL)
    ends = {first: status, other: os.waitpid(other, 0)[1]}
    return [ends[child] for child in children]


@pytest.mark.skipif(not torch.distributed.is_available() or not hasattr(os, "fork"), reason="needs torch.distributed and fork")
def test_two_processes(tmp_path):
    """Two ranks, each with its own buffer: equal weights and histories; rank 1 is killed, both resume; merged in the end."""
    straight, resumed = tmp_path / "straight", tmp_path / "killed"
    assert two_forked(straight) == [0, 0]
    for point in (("before", "replace", 5), ("after", "step", 16)):
        ends = two_forked(resumed, point=point)
        assert ends[1] == signal.SIGKILL and ends[0] != 0
        ours, theirs = (sorted(p.name.split(".")[0] for p in (resumed / "run").glob(f"state-*.rank{rank}.pt")) for rank in (0, 1))
        assert point[1] == "step" or (len(ours), len(theirs)) == (2, 1)  # the one that both have is not the newest of rank 0
    assert two_forked(resumed) == [0, 0]

    first, second = (torch.load(straight / f"result{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first[:2] == second[:2] and (first[3], second[3]) == (4, 0)  # weights, statistics and records; rank 0 alone logs
    epoch = [number for result in (first, second) for batch in result[4][:6] for number in batch]
    assert sorted(epoch) == sorted(data()[0][:, 0].tolist())  # each sample once, on one rank or the other
    assert {len(batch) for result in (first, second) for batch in result[4]} == {8, 9}
    for rank, expected in enumerate((first, second)):
        assert torch.load(resumed / f"result{rank}.pt", weights_only=True)[:3] == expected[:3]

    with lr.merge([resumed / f"buffer{rank}.h5" for rank in (0, 1)], tmp_path / "all.h5") as merged:
        assert merged.seen == 2 * N and len(merged) == 40 and not merged.check()


def test_torchrun_without_a_group(monkeypatch):
    """Two processes that do not know of each other would train two models."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(ArgumentError, match="init_process_group"):
        run(make())
