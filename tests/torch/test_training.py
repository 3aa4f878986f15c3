"""fit against loops written by hand; killed anywhere and resumed to the same bits; its folders, its processes, its refusals."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, IterableDataset

import leanreplay as lr
from leanreplay import ArgumentError, ExistsError, LossError, MissingError, ModeError, ReservoirBuffer, StateError
from leanreplay.torch import CLSLearner, DERLearner, ERLearner, History, SuperERLearner, fit, saved_task
from leanreplay.torch.training.states import StateFolder

N = 103


class Super(SuperERLearner):
    """Copies of the model, logits that move, and weights that are perturbed when a task starts."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, pod_alpha=0.0, ema_memory_update_gamma=0.9, **options)


KINDS = [ERLearner, DERLearner, CLSLearner, Super]


def data(n=N, seed=0):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()


def network(dropout=0.0):
    torch.manual_seed(1)
    layers = [torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Dropout(dropout), torch.nn.Linear(16, 4)]
    return torch.nn.Sequential(*layers)


def make(kind=ERLearner, path=None, *, dropout=0.0, model=None, stream=0, **options):
    model = network(dropout) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return kind(model, optimizer, ReservoirBuffer(40, path, seed=3, stream=stream, mode="a"), **options)


def bits(learner):
    """Everything that training makes: weights, statistics, momenta, the method's own state, the buffer's rows."""
    digest = hashlib.sha256()
    state = {k: v for k, v in learner.state_dict().items() if k != "buffer"}
    buffer = learner.buffer
    (x, y), meta = buffer.get(buffer.get_metadata("idx")) if len(buffer) else ((0, 0), {})
    flat(digest, [learner.model.state_dict(), learner.optimizer.state_dict(), state, x, y, dict(meta), buffer.seen])
    return digest.hexdigest()


def flat(digest, value):
    if isinstance(value, dict):
        flat(digest, [v for k in sorted(value, key=str) for v in (k, value[k])])
    elif isinstance(value, (list, tuple)):
        for v in value:
            flat(digest, v)
    else:
        digest.update(np.asarray(value).tobytes() if isinstance(value, (torch.Tensor, np.ndarray)) else repr(value).encode())


def run(learner, task=0, **options):
    return fit(learner, data(seed=task), **{"max_epochs": 3, "batch_size": 20, "progress": False, "task_id": task, **options})


def recording(kind):
    """A kind of learner that keeps its batches."""

    class Recording(kind):
        def step(self, x, y):
            self.__dict__.setdefault("batches", []).append((x, y))
            return super().step(x, y)

    return Recording


# -- the loop ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["first epoch", "every epoch", False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_around_step(kind, store):
    """What fit does to a learner is what the same batches do, given to `step` one by one, and stored as it was asked for."""
    learner = make(recording(kind), replay_batch_size=7)
    history = run(learner, **({} if store == "first epoch" else {"store": store}))
    assert learner.replay_batch_size == 7 and learner.device is None and learner.store is True
    assert learner.buffer.seen == {"first epoch": N, "every epoch": 3 * N, False: 0}[store]

    by_hand, steps = make(kind, replay_batch_size=10), []
    by_hand.on_task_start(0)
    for i, (x, y) in enumerate(learner.batches):
        by_hand.store = store == "every epoch" or (store == "first epoch" and 3 * i < len(learner.batches))
        steps.append(by_hand.step(x, y))
    by_hand.on_task_end()
    assert bits(by_hand) == bits(learner)

    sizes = np.array([len(x) for x, _ in learner.batches])
    assert len(history) == 3 and history["epoch"] == [0, 1, 2] and history["lr"] == [0.05] * 3
    for epoch, (part, n) in enumerate(zip(np.split(np.array(steps), 3), np.split(sizes, 3), strict=True)):
        assert history["loss"][epoch] == pytest.approx(sum(s[0].loss * k for s, k in zip(part[:, None], n, strict=True)) / N)
        for name in steps[-1].losses:
            there = [(s.losses[name], k) for s, k in zip(part, n, strict=True) if name in s.losses]
            assert history[f"loss/{name}"][epoch] == pytest.approx(sum(v * k for v, k in there) / sum(k for _, k in there))


def orders(**options):
    """The order of samples in each epoch, as numbers."""
    learner = make(recording(ERLearner))
    task = options.pop("task", 0)
    fit(learner, (torch.arange(N).float()[:, None].expand(N, 6), data()[1]), batch_size=20, progress=False, task_id=task, **options)
    numbers = torch.cat([x[:, 0] for x, _ in learner.batches]).long().tolist()
    return [numbers[i : i + N] for i in range(0, len(numbers), N)], [len(x) for x, _ in learner.batches]


def test_the_order_of_samples():
    """Each sample once an epoch, in batches of nearly one size, in an order that depends on (seed, task_id, epoch)."""
    first, sizes = orders(max_epochs=2)
    assert [sorted(order) for order in first] == [list(range(N))] * 2
    assert len(sizes) == 2 * 11 and set(sizes) == {9, 10}
    again, _ = orders(max_epochs=3, batch_memory_frac=None)
    assert again[:2] == first  # however it is cut
    others = [
        order for options in ({"seed": 1}, {"task": 1}, {"task": "0"}, {"task": None}) for order in orders(max_epochs=2, **options)[0]
    ]
    everything = [tuple(order) for order in [*again, *others]]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize(
    ("batch_size", "fraction", "new", "replayed"),
    [(32, 0.5, 16, 16), (10, 0.25, 7, 3), (10, 0.24, 8, 2), (10, 0.01, 9, 1), (10, 0, 10, 0), (10, None, 10, 5), (2, 0.4, 1, 1)],
)
def test_the_share_of_replay(batch_size, fraction, new, replayed):
    """batch_size is the whole step's, replay included."""
    learner = make(recording(ERLearner), replay_batch_size=5, model=torch.nn.Linear(6, 4))
    sizes = []
    handle = learner.model.register_forward_hook(lambda m, x, out: sizes.append(len(out)))
    fit(learner, data(new * 8), max_epochs=1, batch_size=batch_size, batch_memory_frac=fraction, progress=False)
    handle.remove()
    assert {len(x) for x, _ in learner.batches} == {new}
    assert sizes[0] == new and sizes[-1] == new + replayed
    assert learner.replay_batch_size == 5


class Bytes(Dataset):
    """Samples one by one, of another kind than the model takes."""

    def __init__(self, n=30):
        self.x, self.y = data(n)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "y": int(self.y[i])}


def collate(samples):
    return torch.stack([s["x"] for s in samples]), torch.tensor([s["y"] for s in samples])


def test_datasets_and_collation():
    """Any map-style dataset, collated by hand or by torch; the same weights each way."""
    x, y = data(30)
    several = [(x, y), (x.numpy(), y.numpy()), torch.utils.data.TensorDataset(x, y), list(zip(x, y, strict=True))]
    several += [torch.utils.data.Subset(torch.utils.data.TensorDataset(x, y), range(30))]
    learners = [make() for _ in range(6)]
    for learner, dataset in zip(learners, several, strict=False):
        fit(learner, dataset, max_epochs=1, progress=False)
    fit(learners[-1], Bytes(), max_epochs=1, progress=False, train_collate_fn=collate)
    assert len({bits(learner) for learner in learners}) == 1


def by_hand(learner, batches, *, precision="32", clip=None):
    """A loop in pieces, as anyone would write it."""
    learner.on_task_start(0)
    for i, (x, y) in enumerate(batches):
        learner.store = 3 * i < len(batches)
        learner.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = learner.loss(x, y)
        loss.backward()
        if clip:
            clip(learner.model.parameters())
        learner.optimizer.step()
        learner.after_step()
    learner.on_task_end()
    return bits(learner)


CLIPS = {
    "norm": lambda p: torch.nn.utils.clip_grad_norm_(p, 0.1),
    None: lambda p: torch.nn.utils.clip_grad_norm_(p, 0.1),
    "value": lambda p: torch.nn.utils.clip_grad_value_(p, 0.1),
}


@pytest.mark.parametrize("algorithm", CLIPS)
def test_clipping(algorithm):
    learner, plain = make(recording(ERLearner), replay_batch_size=10), make()
    run(learner, gradient_clip_val=0.1, gradient_clip_algorithm=algorithm)
    run(plain)
    assert by_hand(make(replay_batch_size=10), learner.batches, clip=CLIPS[algorithm]) == bits(learner) != bits(plain)
    learner.step(*learner.batches[0])  # no hook is left behind
    assert not learner.optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind):
    """The whole step within autocast gives the bits of a loop that has only the forward pass in it."""
    learner, plain, seen = make(recording(kind)), make(kind), []
    validation = {"val_dataset": data(9), "metrics": {"m": lambda outputs, _: seen.append(outputs.dtype) or 0.0}}
    run(learner, precision="bf16", **validation)
    run(plain)
    assert seen == [torch.float32] * 3
    assert by_hand(make(kind, replay_batch_size=10), learner.batches, precision="bf16") == bits(learner) != bits(plain)
    assert all(p.dtype == torch.float32 for p in learner.model.parameters())


def test_schedulers():
    learner = make()
    history = run(learner, scheduler=torch.optim.lr_scheduler.StepLR(learner.optimizer, 2, 0.1), max_epochs=5)
    assert history["lr"] == pytest.approx([0.05, 0.05, 0.005, 0.005, 0.0005])
    learner = make()
    history = run(learner, scheduler=torch.optim.lr_scheduler.StepLR(learner.optimizer, 11, 0.1), scheduler_interval="step")
    assert history["lr"] == pytest.approx([0.005, 0.0005, 0.00005])


def scripted(values):
    """A metric that takes these values, epoch by epoch."""
    values = iter(values)
    return lambda outputs, targets: next(values)


def test_the_plateau_scheduler_gets_the_metric():
    learner = make()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(learner.optimizer, "max", 0.1, patience=0)
    options = {"metrics": {"m": scripted([1, 2, 2, 3])}, "metric": "m", "mode": "max", "val_dataset": data(5)}
    history = run(learner, scheduler=scheduler, max_epochs=4, **options)
    assert history["lr"] == pytest.approx([0.05, 0.05, 0.05, 0.005]) and history["val_m"] == [1, 2, 2, 3]
    learner = make()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(learner.optimizer, threshold=1e9, patience=0)
    assert run(learner, scheduler=scheduler, val_dataset=data(5))["lr"][-1] < 0.05  # the validation loss, if no metric is named


@pytest.mark.parametrize(
    ("mode", "patience", "values", "epochs", "best"),
    [
        ("min", 2, [3, 2, 2.5, 2, 1], 4, 1),  # as good is not better
        ("max", 1, [1, 2, 3, 2, 9], 4, 2),
        ("min", 1, [1, 0.5, 0.4, 0.3, 0.2], 5, 4),
        ("min", 2, [math.nan, 2, math.nan, 1, 3], 5, 3),
        ("max", 2, [math.nan] * 5, 2, None),
        ("max", True, [9, 8, 8, 8, 8, 8, 8, 8], 6, 0),
        ("min", False, [1, 2, 3, 4, 5, 6, 7, 8], 8, 0),
    ],
)
def test_early_stopping(tmp_path, mode, patience, values, epochs, best):
    """Training ends after so many epochs without a better value; the weights of the best one are in best.pt."""
    learner, weights = make(path=tmp_path / "b.h5"), []
    options = {"metrics": {"m": scripted(values)}, "metric": "m", "mode": mode, "early_stopping": patience, "val_dataset": data(5)}
    options |= {"logger": lambda record: weights.append({k: v.clone() for k, v in learner.model.state_dict().items()})}
    history = run(learner, max_epochs=len(values), output_state_folder=tmp_path / "run", **options)
    assert len(history) == epochs and history.stopped_early == (epochs < len(values))
    assert history.best_epoch == best and history.best == (None if best is None else values[best])
    assert (tmp_path / "run" / "best.pt").exists() == (best is not None)
    if best is not None:
        saved = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
        assert all(saved[name].equal(value) for name, value in weights[best].items())


def test_validation_by_hand():
    """Loss and metrics over the whole set at once, in eval mode, after the test transforms; the model's modes are as before."""
    learner, seen = make(dropout=0.5), []
    learner.model[3].eval()  # on purpose: it stays so
    x, y = data(37, seed=5)

    def spread(outputs, targets):
        seen.append((outputs, targets, torch.is_grad_enabled()))
        return outputs.std() * len(targets)

    options = {"test_transform": lambda v: v * 2, "test_target_transform": lambda v: 3 - v, "metrics": {"spread": spread}}
    history = run(learner, val_dataset=(x, y), max_epochs=2, **options)
    assert learner.model.training and not learner.model[3].training
    learner.model.eval()
    with torch.no_grad():
        outputs = learner.model(2 * x)
    assert seen[-1][0].shape == (37, 4) and seen[-1][1].equal(3 - y) and not seen[-1][2]
    assert history["val_loss"][-1] == pytest.approx(cross_entropy(outputs, 3 - y).item(), rel=1e-5)
    assert history["val_spread"][-1] == pytest.approx(outputs.std().item() * 37, rel=1e-5)
    assert history.best_epoch is None and history.best is None


def test_a_model_in_eval_mode_is_trained_in_train_mode():
    learner, other = make(), make()
    learner.model.eval()
    run(learner)
    run(other)
    assert bits(learner) == bits(other) and not any(m.training for m in learner.model.modules())


def test_the_logger_and_the_history():
    records = []
    history = run(make(), logger=records.append, task_id="cats")
    assert records == [{"task_id": "cats", **record} for record in history.records]
    assert json.loads(json.dumps(history.records)) == history.records
    with pytest.raises(ArgumentError, match="no 'acc' in this history; it has epoch, loss"):
        history["acc"]
    assert len(History()) == 0 and History(monitor="val_loss").best_epoch is None


def test_progress(capfd, monkeypatch):
    pytest.importorskip("tqdm")
    run(make(), max_epochs=2, progress=True)
    assert "epoch 2/2: 100%" in capfd.readouterr().err
    run(make())
    assert capfd.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    run(make(), progress=True)
    assert capfd.readouterr().err == ""


def test_deterministic_for_the_time_of_the_call():
    during = []

    class Looks(ERLearner):
        def step(self, x, y):
            during.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))
            if len(during) == 5:
                raise KeyboardInterrupt
            return super().step(x, y)

    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    with pytest.raises(KeyboardInterrupt):
        run(make(Looks), deterministic=True)
    assert during == [(True, False)] * 5
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == before


def test_a_step_that_fails_leaves_the_learner_whole():
    """A loss or a gradient that is not finite: the weights are those after the last whole step, its batch is not stored."""
    for options in ({}, {"gradient_clip_val": 1.0}):
        learner, plain = make(recording(ERLearner), replay_batch_size=3), make(replay_batch_size=10)
        inner = learner.loss_fn
        calls = []

        def loss_fn(outputs, targets, inner=inner, calls=calls, infinite=bool(options)):
            calls.append(1)
            if len(calls) < 9:
                return inner(outputs, targets)
            return (outputs - outputs.detach()).abs().sqrt().sum() if infinite else inner(outputs, targets) * math.nan  # sqrt'(0)

        learner.loss_fn = loss_fn
        with pytest.raises(LossError):
            run(learner, **options)
        for i, (x, y) in enumerate(learner.batches[: learner.steps]):
            plain.store = i < 11
            plain.optimizer.zero_grad()
            plain.loss(x, y).backward()
            if options:
                torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 1.0)
            plain.optimizer.step()
            plain.after_step()
        assert learner.steps == len(learner.batches) - 1 == plain.steps > 0
        assert learner.buffer.seen == plain.buffer.seen and learner.replay_batch_size == 3
        assert all(a.equal(b) for a, b in zip(learner.model.parameters(), plain.model.parameters(), strict=True))


def test_defaults():
    """Those that are documented."""
    given = {name: p.default for name, p in inspect.signature(fit).parameters.items() if p.default is not inspect.Parameter.empty}
    others = {"max_epochs": 50, "batch_size": 32, "batch_memory_frac": 0.5, "scheduler_interval": "epoch", "mode": "min", "precision": "32"}
    others |= {
        "store": "first epoch",
        "restore_best": False,
        "early_stopping": False,
        "progress": True,
        "seed": 0,
        "deterministic": False,
        "save_every": 500,
        "save_buffer": False,
    }
    nothing = (
        "val_dataset scheduler metric metrics gradient_clip_val gradient_clip_algorithm train_collate_fn val_collate_fn test_transform"
    )
    nothing += " test_target_transform test_batch_transform input_state_folder output_state_folder logger task_id"
    assert given == others | dict.fromkeys(nothing.split())


# -- killed and resumed --------------------------------------------------------------------------------------------------


class Augmented(Dataset):
    """Noise from every global generator, drawn when a sample is read."""

    def __init__(self, seed):
        self.x, self.y = data(seed=seed)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + 0.1 * (torch.randn(6) + random.random() + np.random.rand()), self.y[i]


def accuracy(outputs, targets):
    return (outputs.argmax(1) == targets).float().mean()


def job(kind, folder, tasks=1, after=lambda learner: None):
    """Some tasks, with everything that has a state; started again, it goes on. Of some kinds every epoch is stored."""
    learner = make(kind, folder / "buffer.h5", dropout=0.2)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(11)
    state, histories = folder / "run", []
    for task in range(saved_task(state) or 0, tasks):
        scheduler = torch.optim.lr_scheduler.OneCycleLR(learner.optimizer, 0.1, total_steps=40)
        options = {"val_dataset": data(20, 9), "metrics": {"accuracy": accuracy}, "metric": "accuracy", "mode": "max", "early_stopping": 2}
        options |= {"scheduler": scheduler, "scheduler_interval": "step", "gradient_clip_val": 1.0, "save_every": 4, "progress": False}
        options |= {"store": "every epoch" if kind is DERLearner else "first epoch", "restore_best": kind is not CLSLearner}
        options |= {"input_state_folder": state, "output_state_folder": state, "max_epochs": 3, "batch_size": 20, "task_id": task}
        histories.append(fit(learner, Augmented(task), **options))
        after(learner)
    return learner, histories


def new_optimizer(learner):
    learner.optimizer = torch.optim.SGD(learner.model.parameters(), lr=0.01, momentum=0.5)


def die_at(kind, when, name, call):
    """Make the call-th call of a function this process's last: before it, or right after it."""
    place = {"replace": os, "unlink": os, "save": StateFolder, "fsync": os}.get(name, kind)
    inner, calls = getattr(place, name), [0]

    def wrapped(*arguments, **options):
        calls[0] += 1
        if calls[0] == call and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = inner(*arguments, **options)
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(place, name, wrapped)


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
    "points", [[("after", "step", 40)], [("after", "on_task_end", 1), ("before", "on_task_start", 1), ("after", "step", 30)]]
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


# -- folders that do not fit ---------------------------------------------------------------------------------------------


def stopped(tmp_path, at=5, task=0, **options):
    """A run that ended in the middle of an epoch, and left its state."""

    class Stops(ERLearner):
        def step(self, x, y):
            if self.steps == at:
                raise KeyboardInterrupt
            return super().step(x, y)

    learner = make(Stops, tmp_path / "b.h5")
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


# -- bad arguments -------------------------------------------------------------------------------------------------------


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
    with pytest.raises(ArgumentError, match=r"val_dataset: the learner's loss_fn does not take outputs .* Target 9 is out of bounds"):
        run(make(), val_dataset=(x, y * 0 + 9))
    with pytest.raises(ArgumentError, match=r"val_dataset: the learner's loss_fn does not take outputs"):
        run(make(), val_dataset=(x, y.float()))


# -- several processes ---------------------------------------------------------------------------------------------------


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
    model.eval()
    with torch.no_grad():  # of the best epoch
        assert histories[-1]["val_loss"][histories[-1].best_epoch] == pytest.approx(
            cross_entropy(model(data(21, 9)[0]), data(21, 9)[1]).item(), rel=1e-5
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
