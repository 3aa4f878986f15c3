"""fit against loops written by hand."""

from __future__ import annotations

import inspect
import json
import math
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from training_jobs import KINDS, Bytes, N, Super, bits, data, make, run

from leanreplay import ArgumentError, LossError
from leanreplay.torch import ERLearner, History, fit


def recording(kind):
    """A kind of learner that keeps its batches."""

    class Recording(kind):
        def step(self, x, y, scaler=None):
            self.__dict__.setdefault("batches", []).append((x, y))
            return super().step(x, y, scaler)

    return Recording


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
    [
        (32, 0.5, 16, 16), (10, 0.25, 7, 3), (10, 0.24, 8, 2), (10, 0.01, 9, 1), (10, 0, 10, 0), (10, None, 10, 5), (2, 0.4, 1, 1),
        (100, 0.6, 60, 40),
    ],
)  # fmt: skip
def test_the_share_of_replay(batch_size, fraction, new, replayed):
    """batch_size is the whole step's, replay included; a buffer of 40 never gives more."""
    learner = make(recording(ERLearner), replay_batch_size=5, model=torch.nn.Linear(6, 4))
    sizes = []
    handle = learner.model.register_forward_hook(lambda m, x, out: sizes.append(len(out)))
    fit(learner, data(new * 8), max_epochs=1, batch_size=batch_size, batch_memory_frac=fraction, progress=False)
    handle.remove()
    assert {len(x) for x, _ in learner.batches} == {new}
    assert sizes[0] == new and sizes[-1] == new + replayed
    assert learner.replay_batch_size == 5


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
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    for i, (x, y) in enumerate(batches):
        learner.store = 3 * i < len(batches)
        learner.optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16 if precision == "fp16" else torch.bfloat16, enabled=precision != "32"):
            loss = learner.loss(x, y)
        scaler.scale(loss).backward()
        scaler.unscale_(learner.optimizer)
        if clip:
            clip(learner.model.parameters())
        before = scaler.get_scale()
        scaler.step(learner.optimizer)
        scaler.update()
        learner.after_step(scaler.get_scale() >= before)
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


@pytest.mark.parametrize(("kind", "precision"), [*((kind, "bf16") for kind in KINDS), (ERLearner, "fp16"), (Super, "fp16")])
def test_mixed_precision(kind, precision):
    """The whole step within autocast gives the bits of a loop that has only the forward pass in it; float16 has a scaler."""
    learner, plain, seen = make(recording(kind)), make(kind), []
    validation = {"val_dataset": data(9), "metrics": {"m": lambda outputs, _: seen.append(outputs.dtype) or 0.0}}
    run(learner, precision=precision, gradient_clip_val=0.5, **validation)
    run(plain)
    assert seen == [torch.float32] * 3
    clip = lambda p: torch.nn.utils.clip_grad_norm_(p, 0.5)  # noqa: E731
    assert by_hand(make(kind, replay_batch_size=10), learner.batches, precision=precision, clip=clip) == bits(learner) != bits(plain)
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
    nothing += " device label train_metrics val_memory"
    assert given == others | dict.fromkeys(nothing.split())
