"""The learners: masks, heads that grow, and each term of the loss against its definition."""

from __future__ import annotations

import copy
import errno

import numpy as np
import pytest
import torch
from learner_oracle import (
    RATE,
    average,
    batches,
    ce,
    check_same,
    cls_hand,
    dense,
    descend,
    drawn,
    held,
    pod_hand,
    sgd,
    whole,
)

from leanreplay import ArgumentError, ReservoirBuffer, Schema, StateError, StorageError
from leanreplay.buffers import feeding
from leanreplay.storage import system
from leanreplay.storage import writer as writer_module
from leanreplay.torch import (
    CLSLearner,
    Consistency,
    DERLearner,
    ERLearner,
    LogitMatching,
    PODLearner,
    PooledOutputDistillation,
    ReplayLearner,
    ReplayLoss,
    ShrinkAndPerturb,
    Term,
)

# -- masks and growing heads -------------------------------------------------------------------------------------------


def labelled(groups):
    """Batches of 6 with labels of these classes."""
    g = torch.Generator().manual_seed(0)
    return [
        (x, torch.tensor(group)[torch.randint(0, len(group), (6,), generator=g)])
        for (x, _), group in zip(batches(len(groups), 6), groups, strict=True)
    ]


@pytest.mark.parametrize("method", ["der", "cls"])
def test_unused_classes(method):
    """Classes that never occurred count as -inf in the losses and are not matched; stored logits know no mask."""
    model, hand = dense(True, 5), dense(True, 5)
    copies = {which: copy.deepcopy(hand) for which in ("stable", "plastic")}
    buffer, twin = ReservoirBuffer(20, seed=1), ReservoirBuffer(20, seed=1)
    options = {"replay_batch_size": 7, "loss_normalization": False, "mask_unused_classes": True}
    if method == "der":
        learner = DERLearner(model, sgd(model), buffer, **options)
    else:
        ones = {f"{which}_model_update_probability": 1.0 for which in copies}
        learner = CLSLearner(model, sgd(model), buffer, alpha=None, beta=0.5, **options, **ones)
    used = set()
    for i, (x, y) in enumerate(labelled([[3, 1]] * 3 + [[0]] * 2 + [[1, 4]] * 2), 1):
        used |= set(y.tolist())
        unused = set(range(5)) - used
        if method == "der":
            logits = hand(x)
            losses = {"stream": ce(logits, y, unused)}
            if len(twin):
                (x1, _, meta), (x2, y2, _) = drawn(twin, 7), drawn(twin, 7)
                kept = sorted(used)
                losses["logits"] = ((hand(x1) - torch.from_numpy(meta["logits"]))[:, kept] ** 2).mean()
                losses["replay"] = ce(hand(x2), y2, unused)
            total = sum(losses.values())
            metadata = {"logits": logits.detach().float().numpy()}
        else:
            x1, y1, _ = drawn(twin, 7) if len(twin) else (x[:0], y[:0], {})
            logits = hand(torch.cat([x, x1]))
            losses = {"stream+replay": ce(logits, torch.cat([y, y1]), unused)}
            if len(twin):
                losses["consistency"], _ = cls_hand(hand, copies, x1, y1, unused)
            total = losses["stream+replay"] + 0.5 * losses.get("consistency", 0.0)
            metadata = None
        descend(hand, total)
        twin.add((x, y), metadata=metadata)
        average(copies, hand, i, dict.fromkeys(copies, 0.999), dict.fromkeys(copies, 1.0), 0)
        step = learner.step(x, y)
        check_same(learner, hand, twin, step, losses, total, logits[:6])
        assert torch.isfinite(step.outputs).all()
    assert used == {0, 1, 3, 4} and learner.state_dict()["classes"] == [0, 1, 3, 4]


def test_classes_count_when_their_batch_does():
    """A batch that was refused, or whose step failed, leaves no class behind; several losses before one step see each other's."""
    model = dense(outputs=5)
    learner = ERLearner(model, sgd(model), ReservoirBuffer(20), mask_unused_classes=True)
    (x, y), (x1, y1), (x2, y2) = labelled([[0], [1], [2]])
    learner.step(x, y)
    with pytest.raises(ArithmeticError):
        learner.loss(x1 * float("nan"), y1)
    learner.loss(x, y)
    learner.loss(x2, y2)
    learner.loss(x.clone(), y)
    assert [q.seen.tolist() for q in learner.pending] == [[True, False, seen, False, False] for seen in (False, True, True)]
    learner.after_step()
    assert learner.state_dict()["classes"] == [0, 2]


def grow(model, outputs):
    """A wider last layer that keeps what it had."""
    old = model[-1]
    torch.manual_seed(outputs)
    model[-1] = torch.nn.Linear(old.in_features, outputs).double()
    with torch.no_grad():
        model[-1].weight[: old.out_features] = old.weight
        model[-1].bias[: old.out_features] = old.bias


@pytest.mark.parametrize("gamma", [1.0, 0.6])
@pytest.mark.parametrize("mask", [False, True])
def test_growing_head(mask, gamma):
    """With max_outputs: stored that wide with a width for each row; matched are the columns both have, averaged over those."""
    model, hand = dense(True, 2), dense(True, 2)
    buffer, twin = ReservoirBuffer(20, seed=1), ReservoirBuffer(20, seed=1)
    learner = DERLearner(
        model, sgd(model), buffer, replay_batch_size=9, loss_normalization=False, max_outputs=6, mask_unused_classes=mask,
        ema_memory_update_gamma=gamma,
    )  # fmt: skip
    used, widths = set(), set()
    for outputs, (x, y) in zip([2, 2, 2, 4, 4, 4, 6, 6, 6], labelled([[0, 1]] * 3 + [[3]] * 3 + [[0, 4]] * 3), strict=True):
        if outputs != model[-1].out_features:
            grow(model, outputs), grow(hand, outputs)
            learner.optimizer = sgd(model)
        used |= set(y.tolist())
        unused = set(range(outputs)) - used if mask else set()
        logits = hand(x)
        losses = {"stream": ce(logits, y, unused)}
        if len(twin):
            (x1, _, meta), (x2, y2, meta2) = drawn(twin, 9), drawn(twin, 9)
            now, now2 = hand(x1), hand(x2)
            squares = [
                (z[c] - float(s[c])) ** 2
                for z, s, w in zip(now, meta["logits"], meta["logits_width"], strict=True)
                for c in range(min(w, outputs))
                if c not in unused
            ]
            losses["logits"] = sum(squares) / len(squares)
            losses["replay"] = ce(now2, y2, unused)
            widths |= {int(w) for w in meta["logits_width"]}
            for n, m in ((now, meta), (now2, meta2)) if gamma < 1 else ():
                moved = m["logits"].copy()
                for row, z, w in zip(moved, n.detach().float().numpy(), m["logits_width"], strict=True):
                    row[:w] = gamma * row[:w] + (1 - gamma) * z[:w]
                twin.set_metadata("logits", moved, m["idx"])
        total = sum(losses.values())
        descend(hand, total)
        stored = np.zeros((6, 6), np.float32)
        stored[:, :outputs] = logits.detach().numpy()
        twin.add((x, y), metadata={"logits": stored, "logits_width": np.full(6, outputs)})
        check_same(learner, hand, twin, learner.step(x, y), losses, total, logits)
    assert widths == {2, 4, 6}


def test_a_head_that_shrinks():
    """Of wider stored logits the columns that the model has are matched and moved, the others stay."""
    model = dense(outputs=4)
    learner = DERLearner(model, sgd(model), ReservoirBuffer(6), beta=0.0, replay_batch_size=6, max_outputs=5, ema_memory_update_gamma=0.5)
    (x, y), (x1, y1) = labelled([[0, 1], [0, 1]])
    learner.step(x, y)
    before = held(learner.buffer)
    model[-1] = torch.nn.Linear(5, 2).double()
    learner.optimizer = sgd(model)
    now = model(torch.from_numpy(before["x"])).detach().float().numpy()
    learner.loss(x1, y1)
    assert learner.losses["logits"] == pytest.approx(np.square(now - before["logits"][:, :2]).mean(), rel=1e-5)
    learner.after_step()
    after = held(learner.buffer)
    stayed = {int(p): i for i, p in enumerate(before["position"])}
    rows = [(i, stayed[int(p)]) for i, p in enumerate(after["position"]) if int(p) in stayed]
    assert rows
    for i, j in rows:
        np.testing.assert_allclose(after["logits"][i, :2], (before["logits"][j, :2] + now[j]) / 2, rtol=1e-5)
        assert np.array_equal(after["logits"][i, 2:], before["logits"][j, 2:]) and before["logits"][j, 2:4].all()


def test_copies_grow():
    """The slow copies follow a head that grows: their old columns stay, the new ones begin as the model's."""
    model = dense(outputs=2)
    learner = CLSLearner(model, sgd(model), ReservoirBuffer(20), mask_unused_classes=True)
    for x, y in labelled([[0, 1]] * 3):
        learner.step(x, y)
    old = copy.deepcopy(learner.stable_model)
    grow(model, 4)
    learner.optimizer = sgd(model)
    (x, y), (x1, y1) = labelled([[2, 3], [3]])
    learner.loss(x, y)
    stable = learner.stable_model
    assert torch.equal(stable[-1].weight[:2], old[-1].weight) and torch.equal(stable[-1].weight[2:], model[-1].weight[2:])
    assert torch.equal(stable[0].weight, old[0].weight) and stable.training and not stable[-1].weight.requires_grad
    learner.after_step()
    learner.step(x1, y1)
    assert learner.stable_model(x).shape == (6, 4)
    small = dense(outputs=2)
    resumed = CLSLearner(small, sgd(small), learner.buffer, mask_unused_classes=True)
    with pytest.raises(StateError, match="another model's"):
        resumed.load_state_dict(learner.state_dict())
    grow(small, 4)
    resumed.load_state_dict(learner.state_dict())
    assert torch.equal(resumed.stable_model[-1].weight, learner.stable_model[-1].weight) and resumed.steps == learner.steps == 5


# -- terms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("kind", ["pixel", "channel", "width", "height", "gap", "spatial"])
def test_poolings(kind, unit):
    """All six pools against NumPy, for activations whose width and height differ, and two layers of different shape."""
    rng = np.random.default_rng(0)
    old = {"a": rng.normal(size=(4, 3, 5, 2)), "b": rng.normal(size=(4, 2, 3, 6))}
    new = {k: rng.normal(size=v.shape) for k, v in old.items()}
    term = PooledOutputDistillation(layers=["a", "b"], distillation_type=kind, normalize=unit)

    class Draw:
        def __init__(self):
            self.features = {k: torch.from_numpy(v) for k, v in new.items()}

        def stored(self, name):
            return torch.from_numpy(old[name.removeprefix("features.")])

    wanted = np.mean([pod_hand(new[k], old[k], kind, unit) for k in old])
    assert term.loss(None, Draw()).item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("kind", ["pixel", "channel", "width", "height", "gap", "spatial"])
def test_pod_has_a_gradient(kind):
    """On a ConvNet the term alone moves the layers before those it names, and no others; and is finite where nothing changed."""
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    layers = {
        "conv1": torch.nn.Conv2d(3, 8, 3),
        "norm": torch.nn.BatchNorm2d(8),
        "relu1": torch.nn.ReLU(inplace=True),
        "conv2": torch.nn.Conv2d(8, 8, 3, 2),
        "relu2": torch.nn.ReLU(inplace=True),
        "flat": torch.nn.Flatten(),
        "head": torch.nn.Linear(8 * 36, 10),
    }
    for name, layer in layers.items():
        model.add_module(name, layer)
    learner = PODLearner(model, sgd(model), ReservoirBuffer(50), layers=["norm", "conv2"], distillation_type=kind, loss_weight=0.0)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 3, 16, 16, generator=g), torch.randint(0, 10, (12,), generator=g)
    learner.step(x, y)  # an empty buffer, and loss_weight=0: nothing moves
    model.zero_grad()
    model.eval()
    learner.buffer.set_metadata("features.norm", model[1](model[0](x)).detach().float())
    learner.buffer.set_metadata("features.conv2", model[:4](x).detach().float())
    learner.replay_batch_size = 12
    loss = learner.loss(x, y)
    loss.backward()
    assert learner.losses["pod"] < 1e-5 and all(torch.isfinite(p.grad).all() for p in model.parameters())
    learner.after_step()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)
    model.train()
    model.zero_grad()
    learner.loss(x, y).backward()
    grads = {name: p.grad.abs().max().item() for name, p in model.named_parameters()}
    assert learner.losses["pod"] > 1e-3
    assert all(v > 1e-6 for k, v in grads.items() if k in ("conv1.weight", "norm.weight", "norm.bias", "conv2.weight")), grads
    assert all(v == 0 for k, v in grads.items() if k.startswith("head"))


def test_features_are_what_the_layer_gave():
    """A layer after it that works in place does not change what is stored, nor what gradients reach."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(inplace=True), torch.nn.Flatten(), torch.nn.Linear(18, 3))
    learner = PODLearner(model, sgd(model), ReservoirBuffer(20), layers=["0"])
    x, y = torch.randn(4, 1, 5, 5), torch.tensor([0, 1, 2, 0])
    wanted = model[0](x).detach().numpy()
    learner.step(x, y)
    assert np.array_equal(learner.buffer.get_metadata("features.0"), wanted) and wanted.min() < 0
    assert not any(m._forward_hooks for m in model.modules())


class Anchor(Term):
    """A term of a user: pulls outputs on replayed samples to running means of its own."""

    def __init__(self):
        super().__init__("anchor", 0.5, "shared")
        self.mean, self.calls = torch.zeros(3, dtype=torch.float64), []

    def attach(self, learner):
        self.calls.append("attach")

    def loss(self, learner, replay):
        self.seen = replay
        return (replay.outputs - self.mean).square().mean()

    def keep(self, learner, stream):
        return {"first": stream.outputs[:, 0].detach()}

    def on_task_start(self, learner):
        self.calls.append("start")

    def on_task_end(self, learner):
        self.calls.append("end")

    def after_step(self, learner):
        self.calls.append(learner.steps)
        self.mean = self.mean + 1

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


def test_two_terms_that_store_one_name():
    """One would overwrite the other's."""
    model = dense()
    terms = [Anchor(), Anchor()]
    terms[1].name = "second"
    learner = ReplayLearner(model, sgd(model), ReservoirBuffer(20), terms=terms)
    with pytest.raises(ArgumentError, match=r"two terms store metadata as 'first'.*'second'"):
        learner.step(*next(iter(batches(1, 6))))
    assert not len(learner.buffer)


def test_a_full_disk_loses_no_batch(tmp_path, monkeypatch):
    """What the buffer cannot take stays queued: it is stored by another after_step, or with the next batch."""
    x, y = next(iter(batches(1, 6)))
    schema = Schema.from_batch((x, y))

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    for again in (True, False):
        model = dense()
        with ReservoirBuffer(40, tmp_path / f"{again}.h5", schema=schema) as buffer:
            learner = ERLearner(model, sgd(model), buffer, replay_batch_size=3)
            with monkeypatch.context() as patch:
                patch.setattr(system, "write_zeros", full)
                patch.setattr(system, "LINUX", True)
                with pytest.raises(StorageError, match="free some space"):
                    learner.step(x, y)
            assert buffer.seen == 0 and learner.steps == 0
            if again:
                learner.after_step()
            else:
                learner.step(x, y)
            assert buffer.seen == (6 if again else 12) and learner.steps == 1 and not learner.pending
            assert sorted(held(buffer)["position"]) == list(range(buffer.seen))


@pytest.mark.parametrize("commits", [0, 1, 2, 3])
def test_a_disk_that_fills_between_commits(commits, monkeypatch):
    """Of two queued batches that take several commits, what did not arrive stays queued, with what belongs to it; nothing comes twice."""
    monkeypatch.setattr(feeding, "MAX_PLANNED", 4)
    model = dense()
    learner = ReplayLearner(model, sgd(model), ReservoirBuffer(40), terms=[Anchor()])
    plain, made = writer_module.Writer.commit_planned, [0]

    def full(self, *args):
        if made[0] == commits:
            raise StorageError(errno.ENOSPC, "full")
        made[0] += 1
        return plain(self, *args)

    (x, y), (x1, y1) = batches(2, 6)
    y[:] = y1[:] = 0
    x[:, 0], x1[:, 0] = torch.arange(6), torch.arange(6, 12)
    learner.loss(x, y)
    learner.loss(x1, y1)
    with monkeypatch.context() as patch:
        patch.setattr(writer_module.Writer, "commit_planned", full)
        if commits < 3:
            with pytest.raises(StorageError):
                learner.after_step()
        else:
            learner.after_step()
    assert learner.buffer.seen == 4 * commits and learner.steps == (commits == 3)
    learner.after_step()
    assert learner.buffer.seen == 12 and not learner.pending
    found = held(learner.buffer)
    assert sorted(found["position"]) == list(range(12)) and (found["x"][:, 0] == found["position"]).all()
    outputs = torch.cat([model(x), model(x1)])[:, 0].detach().numpy()
    np.testing.assert_allclose(found["first"], outputs[found["position"]])


def test_terms_of_your_own():
    """A list of terms makes a learner: losses by name, what they keep, hooks in order, state; a shared draw and one pass for it."""
    model, hand = dense(), dense()
    buffer, twin = ReservoirBuffer(20, seed=1), ReservoirBuffer(20, seed=1)
    anchor = Anchor()
    learner = ReplayLearner(model, sgd(model), buffer, terms=[ReplayLoss(2.0), anchor], replay_batch_size=7, loss_normalization=False)
    passes = []
    model.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].shape[0]))
    learner.on_task_start()
    for i, (x, y) in enumerate(batches(3, 6)):
        logits = hand(x)
        losses, weights = {"stream": ce(logits, y)}, [1.0]
        if i:
            x1, y1, _ = drawn(twin, 7)
            now = hand(x1)
            losses |= {"replay": ce(now, y1), "anchor": ((now - i) ** 2).mean()}
            weights += [2.0, 0.5]
        total = whole(list(zip(weights, losses.values(), strict=True)), False)
        descend(hand, total)
        twin.add((x, y), metadata={"first": logits[:, 0].detach().numpy()})
        check_same(learner, hand, twin, learner.step(x, y), losses, total, logits)
    learner.on_task_end()
    assert anchor.calls == ["attach", "start", 1, 2, 3, "end"] and passes == [6, 6, 6, 6, 7]
    state = learner.state_dict()
    assert torch.equal(state["terms"]["anchor"]["mean"], torch.full((3,), 3.0).double())
    learner.step(*batches(1, 6)[0])
    learner.load_state_dict(state)
    assert torch.equal(anchor.mean, torch.full((3,), 3.0).double()) and learner.steps == 3


def test_weights_may_change():
    """A weight may be set while training; 0 leaves a term out, with its draw and pass; a shared draw then falls to the next term."""
    model = dense()
    learner = ReplayLearner(model, sgd(model), ReservoirBuffer(20), terms=[LogitMatching(1.0), ReplayLoss(1.0, draw="shared")])
    passes = []
    model.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].shape[0]))
    (x, y), *_ = batches(1, 6)
    learner.step(x, y)
    for weight, names in ((1.0, ["stream", "logits", "replay"]), (0.0, ["stream", "replay"])):
        learner.terms[0].weight = weight
        draws = learner.buffer.state_dict()["draws"].get("sample", 0)
        assert list(learner.step(x, y).losses) == names and learner.buffer.state_dict()["draws"]["sample"] == draws + 1
    assert passes == [6, 6, 6, 6, 12] and len(learner.buffer.get_metadata("logits")) == 18


def test_replay_weights_of_zero():
    """DER's beta=0 is one draw; a replay batch size of 0 is plain training."""
    model = dense()
    learner = DERLearner(model, sgd(model), ReservoirBuffer(20), beta=0.0, replay_batch_size=4)
    for x, y in batches(3, 6):
        step = learner.step(x, y)
    assert list(step.losses) == ["stream", "logits"] and learner.buffer.state_dict()["draws"] == {"sample": 2}
    learner.replay_batch_size = 0
    assert list(learner.step(x, y).losses) == ["stream"]


def test_shrink_and_perturb():
    """theta * factor + noise of the wanted spread: keyed by seed and start, the same at every resumption; frozen parameters stay."""
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.Linear(100, 100))
        model[1].requires_grad_(False)
        before = [p.clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model[0].parameters(), lr=RATE)
        learner = ReplayLearner(model, optimizer, ReservoirBuffer(9), terms=[ShrinkAndPerturb(0.9, 0.02)], seed=seed)
        torch.manual_seed(len(results))  # torch's own generator does not matter
        learner.on_task_start()
        noise = [(p - 0.9 * b).detach() for p, b in zip(model[0].parameters(), before, strict=False)]
        assert noise[0].std().item() == pytest.approx(0.02, rel=0.05) and abs(noise[0].mean().item()) < 0.001
        assert all(torch.equal(p, b) for p, b in zip(model[1].parameters(), before[2:], strict=True))
        first = model[0].weight.detach().clone()
        learner.on_task_start()
        again = (model[0].weight - 0.9 * first).detach()
        assert again.std().item() == pytest.approx(0.02, rel=0.05) and (again - noise[0]).abs().max() > 0.01
        results.append(model[0].weight.detach().clone())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_copies_move_as_often_as_they_should():
    """Update probabilities: over many steps, within four standard errors; the two copies' choices are independent."""
    model = torch.nn.Linear(1, 2)
    term = Consistency(stable_model_update_probability=0.3, plastic_model_update_probability=0.8, stable_model_update_weight=0.0,
                       plastic_model_update_weight=0.0)  # fmt: skip
    learner = ReplayLearner(model, sgd(model), ReservoirBuffer(9), terms=[term])
    moved = []
    for i in range(600):
        with torch.no_grad():
            model.weight.fill_(i)
        learner.after_step()
        moved.append([term.copies[which].weight[0, 0].item() == i for which in ("stable", "plastic")])
    stable, plastic = np.array(moved).mean(0)
    both = np.array(moved).all(1).mean()
    for found, wanted in ((stable, 0.3), (plastic, 0.8), (both, 0.24)):
        assert abs(found - wanted) < 4 * (wanted * (1 - wanted) / 600) ** 0.5
