"""The learners: every step against one computed by hand, on a twin of the model and a twin of the buffer, in float64."""

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
    conv,
    dense,
    descend,
    drawn,
    held,
    passed,
    pod_hand,
    pod_torch,
    sgd,
    spy,
    whole,
)

from leanreplay import ArgumentError, ReservoirBuffer, Schema, SlidingWindowBuffer, StateError, StorageError
from leanreplay.buffers import base as buffers
from leanreplay.storage import store, system
from leanreplay.torch import (
    CLSLearner,
    Consistency,
    DERLearner,
    ERLearner,
    LogitMatching,
    PODLearner,
    PooledOutputDistillation,
    Replay,
    ReplayLearner,
    ReplayLoss,
    ShrinkAndPerturb,
    SuperERLearner,
    Term,
)

NORMAL = pytest.mark.parametrize("normalise", [True, False])
NORM = pytest.mark.parametrize("norm", [True, False])


# -- the methods, step by step -----------------------------------------------------------------------------------------------


@NORMAL
@NORM
@pytest.mark.parametrize("size, m, capacity, alpha", [(6, 6, 15, 1.0), (5, 8, 15, 0.7), (4, 3, 9, None), (5, 32, 60, None)])
def test_er(norm, normalise, size, m, capacity, alpha):
    """Stream and replay in one pass; one mean over both, or a weighted sum of two means."""
    model, hand = dense(norm), dense(norm)
    twin = ReservoirBuffer(capacity, seed=3)
    buffer = ReservoirBuffer(capacity, seed=3)
    learner = ERLearner(model, sgd(model), buffer, alpha=alpha, replay_batch_size=m, loss_normalization=normalise, loss_weight=1.5)
    for x, y in batches(7, size):
        if len(twin):
            x_old, y_old, _ = drawn(twin, m)
            logits = hand(torch.cat([x, x_old]))
            if alpha is None:
                losses = {"stream+replay": ce(logits, torch.cat([y, y_old]))}
                total = whole([(1.5, losses["stream+replay"])], normalise)
            else:
                losses = {"stream": ce(logits[:size], y), "replay": ce(logits[size:], y_old)}
                total = whole([(1.5, losses["stream"]), (alpha, losses["replay"])], normalise)
        else:
            logits = hand(x)
            losses = {"stream" if alpha is not None else "stream+replay": ce(logits, y)}
            total = whole([(1.5, *losses.values())], normalise)
        descend(hand, total)
        twin.add((x, y))
        check_same(learner, hand, twin, learner.step(x, y), losses, total, logits[:size])


def test_er_one_mean_is_a_weighted_sum_for_equal_batches():
    """alpha=None and alpha=1 agree when as many are replayed as come."""
    models = dense(True), dense(True)
    learners = [ERLearner(m, sgd(m), ReservoirBuffer(20), alpha=a, replay_batch_size=6) for m, a in zip(models, (None, 1.0), strict=True)]
    for x, y in batches(6, 6):
        first, second = (learner.step(x, y).loss for learner in learners)
        assert first == pytest.approx(second, rel=1e-12)
    for p, q in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@NORMAL
@NORM
@pytest.mark.parametrize("alpha, beta", [(0.5, 0.0), (0.3, 0.8)])
def test_der(norm, normalise, alpha, beta):
    """DER and DER++: logits of the pass before the step, two independent draws, three passes."""
    model, hand = dense(norm), dense(norm)
    buffer, twin = ReservoirBuffer(20, seed=1), ReservoirBuffer(20, seed=1)
    learner = DERLearner(model, sgd(model), buffer, alpha=alpha, beta=beta, replay_batch_size=7, loss_normalization=normalise)
    for x, y in batches(7, 6):
        logits = hand(x)
        stored = logits.detach().float().numpy()
        losses, weighted = {"stream": ce(logits, y)}, [1.0]
        if len(twin):
            x1, _, meta = drawn(twin, 7)
            other = drawn(twin, 7) if beta else None
            losses["logits"] = ((hand(x1) - torch.from_numpy(meta["logits"])) ** 2).sum() / meta["logits"].size
            weighted.append(alpha)
            if other is not None:
                losses["replay"] = ce(hand(other[0]), other[1])
                weighted.append(beta)
        total = whole(list(zip(weighted, losses.values(), strict=True)), normalise)
        descend(hand, total)
        twin.add((x, y), metadata={"logits": stored})
        check_same(learner, hand, twin, learner.step(x, y), losses, total, logits)


def test_der_draws_are_independent():
    """DER++ draws twice: the second draw is another one."""
    model = dense()
    learner = DERLearner(model, sgd(model), ReservoirBuffer(30), replay_batch_size=8)
    seen = []
    learner.terms[0].loss = spy(learner.terms[0].loss, seen)
    learner.terms[1].loss = spy(learner.terms[1].loss, seen)
    for x, y in batches(4, 10):
        learner.step(x, y)
    first, second = seen[-2][1], seen[-1][1]
    assert first is not second and not np.array_equal(first.metadata["idx"], second.metadata["idx"]) and len(seen) == 6


@NORMAL
@NORM
@pytest.mark.parametrize("alpha", [None, 0.6])
@pytest.mark.parametrize("probabilities", [(1.0, 1.0), (0.4, 0.7)])
def test_cls(norm, normalise, alpha, probabilities):
    """CLS-ER: one draw, a pass with the stream and one alone; the better copy's logits; both copies' averages."""
    model, hand = dense(norm), dense(norm)
    copies = {which: copy.deepcopy(hand) for which in ("stable", "plastic")}
    rate = dict(zip(copies, probabilities, strict=True))
    weights = {"stable": 0.9, "plastic": 0.6}
    buffer, twin = ReservoirBuffer(20, seed=1), ReservoirBuffer(20, seed=1)
    learner = CLSLearner(
        model, sgd(model), buffer, alpha=alpha, beta=0.3, replay_batch_size=8, loss_normalization=normalise, seed=5,
        stable_model_update_weight=0.9, plastic_model_update_weight=0.6,
        stable_model_update_probability=rate["stable"], plastic_model_update_probability=rate["plastic"],
    )  # fmt: skip
    choices = []
    for i, (x, y) in enumerate(batches(9, 6), 1):
        weighted = [1.0]
        if len(twin):
            x1, y1, _ = drawn(twin, 8)
            logits = hand(torch.cat([x, x1]))
            if alpha is None:
                losses = {"stream+replay": ce(logits, torch.cat([y, y1]))}
            else:
                losses = {"stream": ce(logits[:6], y), "replay": ce(logits[6:], y1)}
                weighted.append(alpha)
            losses["consistency"], chosen = cls_hand(hand, copies, x1, y1)
            choices += chosen
            weighted.append(0.3)
        else:
            logits = hand(x)
            losses = {"stream" if alpha is not None else "stream+replay": ce(logits, y)}
        total = whole(list(zip(weighted, losses.values(), strict=True)), normalise)
        descend(hand, total)
        twin.add((x, y))
        average(copies, hand, i, weights, rate, 5)
        learner.stable_model.train(i == 1)  # an evaluation leaves it in eval mode
        check_same(learner, hand, twin, learner.step(x, y), losses, total, logits[:6])
        for which, mine in (("stable", learner.stable_model), ("plastic", learner.plastic_model)):
            assert mine.training and not any(p.requires_grad for p in mine.parameters())
            for p, q in zip(mine.state_dict().values(), copies[which].state_dict().values(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert True in choices and False in choices, "one copy was always chosen: the choice was not tested"


class Fixed(torch.nn.Module):
    """Gives the same outputs for any input."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = torch.nn.Parameter(torch.tensor(outputs, dtype=torch.float64))

    def forward(self, x):
        return self.outputs.expand(len(x), -1)


@pytest.mark.parametrize(
    "stable, plastic, labels, unused, chosen",
    [
        ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0, 1], [], "pp"),  # equal probabilities: not strictly more
        ([2.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0, 1], [], "sp"),  # sample by sample
        ([1.0, 0.0, 9.0], [0.9, 0.0, 0.0], [0, 1], [], "pp"),
        ([1.0, 0.0, 9.0], [0.9, 0.0, 0.0], [0, 1], [2], "sp"),  # a class that never occurred takes no probability
    ],
)
def test_which_copy_counts(stable, plastic, labels, unused, chosen):
    """Consistency for logits given directly."""
    model = Fixed([0.5, 0.25, -1.0])
    term = Consistency()
    learner = ReplayLearner(model, sgd(model), ReservoirBuffer(9), terms=[term])
    with torch.no_grad():
        for which, outputs in (("stable", stable), ("plastic", plastic)):
            term.copies[which].outputs.copy_(torch.tensor(outputs, dtype=torch.float64))
    learner.mask = torch.tensor([c not in unused for c in range(3)]) if unused else None
    x, y = torch.zeros(len(labels), 1), torch.tensor(labels)
    kept = [c for c in range(3) if c not in unused]
    squares = [(model.outputs[c].item() - (stable if which == "s" else plastic)[c]) ** 2 for which in chosen for c in kept]
    assert term.loss(learner, Replay(model, x, y, {}, ())).item() == pytest.approx(sum(squares) / len(squares), rel=1e-12)


@NORMAL
@NORM
@pytest.mark.parametrize("kind, unit", [("spatial", True), ("pixel", False)])
def test_pod(norm, normalise, kind, unit):
    """Activations of two layers, stored as they were at training, compared with those of a draw now."""
    model, hand = conv(norm), conv(norm)
    layers = ["2", "3"] if norm else ["1", "2"]
    buffer, twin = ReservoirBuffer(20, seed=1), ReservoirBuffer(20, seed=1)
    learner = PODLearner(
        model, sgd(model), buffer, layers=layers, alpha=0.7, distillation_type=kind, normalize=unit, replay_batch_size=7,
        loss_normalization=normalise,
    )  # fmt: skip
    for i, (x, y) in enumerate(batches(6, 5, (1, 5, 6))):
        logits, features = passed(hand, x, layers)
        stored = {f"features.{k}": v.detach().float().numpy() for k, v in features.items()}
        losses = {"stream": ce(logits, y)}
        weighted = [(1.0, losses["stream"])]
        if i:
            x1, _, meta = drawn(twin, 7)
            now = passed(hand, x1, layers)[1]
            losses["pod"] = pod_torch(now, meta, kind, unit)
            direct = [pod_hand(v.detach().numpy(), meta[f"features.{k}"].astype(float), kind, unit) for k, v in now.items()]
            assert losses["pod"].item() == pytest.approx(np.mean(direct), rel=1e-9) and np.mean(direct) > 0
            weighted.append((0.7, losses["pod"]))
        total = whole(weighted, normalise)
        descend(hand, total)
        twin.add((x, y), metadata=stored)
        check_same(learner, hand, twin, learner.step(x, y), losses, total, logits)


@NORMAL
def test_super_er(normalise):
    """Three draws, the consistency on the second one's pass; all stored fields; copies; shrunk and perturbed at the start."""
    model, hand = conv(), conv()
    buffer, twin = ReservoirBuffer(20, seed=1), ReservoirBuffer(20, seed=1)
    learner = SuperERLearner(
        model, sgd(model), buffer, der_alpha=0.3, der_beta=0.8, cls_alpha=0.4, pod_alpha=0.6, pod_layers=["2"],
        sp_shrink_factor=0.9, sp_sigma=0.0,
        cls_stable_model_update_probability=1.0, cls_plastic_model_update_probability=1.0, cls_plastic_model_update_weight=0.6,
        replay_batch_size=7, loss_normalization=normalise,
    )  # fmt: skip
    copies = {which: copy.deepcopy(hand) for which in ("stable", "plastic")}
    for i, (x, y) in enumerate(batches(7, 5, (1, 5, 6)), 1):
        if i in (1, 4):
            learner.on_task_start(i)
            with torch.no_grad():
                for p in hand.parameters():
                    p *= 0.9
        logits, features = passed(hand, x, ["2"])
        stored = {"logits": logits.detach().float().numpy(), "features.2": features["2"].detach().float().numpy()}
        losses, weights = {"stream": ce(logits, y)}, [1.0]
        if len(twin):
            (x1, _, meta1), (x2, y2, _), (x3, _, meta3) = drawn(twin, 7), drawn(twin, 7), drawn(twin, 7)
            losses["logits"] = ((hand(x1) - torch.from_numpy(meta1["logits"])) ** 2).mean()
            now = hand(x2)
            losses["replay"] = ce(now, y2)
            losses["consistency"], _ = cls_hand(lambda _, now=now: now, copies, x2, y2)
            losses["pod"] = pod_torch(passed(hand, x3, ["2"])[1], meta3, "spatial", True)
            weights += [0.3, 0.8, 0.4, 0.6]
        total = whole(list(zip(weights, losses.values(), strict=True)), normalise)
        descend(hand, total)
        twin.add((x, y), metadata=stored)
        average(copies, hand, i, {"stable": 0.999, "plastic": 0.6}, {"stable": 1.0, "plastic": 1.0}, 0)
        check_same(learner, hand, twin, learner.step(x, y), losses, total, logits)
        for which, mine in (("stable", learner.stable_model), ("plastic", learner.plastic_model)):
            for p, q in zip(mine.state_dict().values(), copies[which].state_dict().values(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert list(losses) == ["stream", "logits", "replay", "consistency", "pod"]


def test_super_er_without_pod():
    """pod_alpha=0 needs no layers, and stores no activations."""
    model = dense()
    learner = SuperERLearner(model, sgd(model), ReservoirBuffer(20), pod_alpha=0.0)
    for x, y in batches(3, 5):
        step = learner.step(x, y)
    assert list(step.losses) == ["stream", "logits", "replay", "consistency"] and learner.buffer.schema.metadata_names == ["logits"]


def settings(learner):
    """What a learner is set to: of its terms everything that counts, by name; and its own."""
    found = {}
    for term in learner.terms:
        of_term = {"weight": term.weight, "draw": term.draw, "together": term.together}
        names = ("weights", "probabilities", "distillation_type", "normalize", "shrink_factor", "sigma", "layers")
        found[term.name] = of_term | {name: getattr(term, name) for name in names if name in vars(term) and name != "layers"}
    names = (
        "replay_batch_size",
        "loss_weight",
        "loss_normalization",
        "ema_memory_update_gamma",
        "mask_unused_classes",
        "max_outputs",
        "seed",
    )
    return found, [getattr(learner, name) for name in names]


def term(weight, draw="own", together=False, **others):
    return {"weight": weight, "draw": draw, "together": together, **others}


def test_defaults():
    """Those that are documented; every parameter of a method arrives where it belongs."""
    slow = {"weights": dict.fromkeys(("stable", "plastic"), 0.999), "probabilities": {"stable": 0.7, "plastic": 0.9}}
    pod = {"distillation_type": "spatial", "normalize": True}
    logits, sp = {"logits": term(1.0)}, {"shrink and perturb": term(0.0, None, shrink_factor=0.95, sigma=0.001)}
    both = {"weights": {"stable": 0.1, "plastic": 0.2}, "probabilities": {"stable": 0.3, "plastic": 0.4}}
    slower = {f"{which}_model_update_{what}": value for what, of in (("weight", "weights"), ("probability", "probabilities"))
              for which, value in both[of].items()}  # fmt: skip
    super_er = logits | {"replay": term(1.0), "consistency": term(0.1, "shared", **slow), "pod": term(1.0, **pod)} | sp
    other = {"der_alpha": 2.0, "der_beta": 3.0, "cls_alpha": 4.0, "pod_alpha": 5.0, "pod_distillation_type": "gap", "pod_normalize": False,
             "sp_shrink_factor": 0.5, "sp_sigma": 0.25} | {f"cls_{name}": value for name, value in slower.items()}  # fmt: skip
    otherwise = {"logits": term(2.0), "replay": term(3.0), "consistency": term(4.0, "shared", **both)}
    otherwise |= {"pod": term(5.0, distillation_type="gap", normalize=False)}
    otherwise |= {"shrink and perturb": term(0.0, None, shrink_factor=0.5, sigma=0.25)}
    for kind, options, expected in [
        (ReplayLearner, {}, {}),
        (ERLearner, {}, {"replay": term(1.0, together=True)}),
        (DERLearner, {}, logits | {"replay": term(1.0)}),
        (PODLearner, {"layers": ["2"]}, {"pod": term(1.0, **pod)}),
        (PODLearner, {"layers": ["2"], "distillation_type": "gap", "normalize": False},
         {"pod": term(1.0, distillation_type="gap", normalize=False)}),
        (CLSLearner, {}, {"replay": term(0.5, together=True), "consistency": term(0.1, "shared", **slow)}),
        (CLSLearner, {"alpha": 2.0, "beta": 3.0, **slower},
         {"replay": term(2.0, together=True), "consistency": term(3.0, "shared", **both)}),
        (SuperERLearner, {"pod_layers": ["2"]}, super_er),
        (SuperERLearner, {"pod_layers": ["2"], **other}, otherwise),
    ]:  # fmt: skip
        model = conv()
        found, own = settings(kind(model, sgd(model), ReservoirBuffer(9), **options))
        assert found == expected and own == [32, 1.0, True, 1.0, False, None, 0]


# -- what is stored moves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.8, 0.0])
def test_memory_moves(gamma, monkeypatch):
    """Logits of all replayed rows move towards the present ones, in the call that adds the batch; of a row drawn twice the last counts."""
    model, hand = dense(True), dense(True)
    buffer, twin = ReservoirBuffer(12, seed=1), ReservoirBuffer(12, seed=1)
    learner = DERLearner(model, sgd(model), buffer, replay_batch_size=7, loss_normalization=False, ema_memory_update_gamma=gamma)
    writes = []
    monkeypatch.setattr(buffer, "add", spy(buffer.add, writes))
    monkeypatch.setattr(buffer, "set_metadata", None)
    for x, y in batches(9, 6):
        logits = hand(x)
        stored = logits.detach().float().numpy()
        losses = {"stream": ce(logits, y)}
        if len(twin):
            (x1, _, meta1), (x2, y2, meta2) = drawn(twin, 7), drawn(twin, 7)
            now1, now2 = hand(x1), hand(x2)
            losses["logits"] = ((now1 - torch.from_numpy(meta1["logits"])) ** 2).mean()
            losses["replay"] = ce(now2, y2)
            for now, meta in ((now1, meta1), (now2, meta2)):
                moved = gamma * meta["logits"] + (1 - gamma) * now.detach().float().numpy()
                twin.set_metadata("logits", moved.astype(np.float32), meta["idx"])
        total = sum(losses.values())
        descend(hand, total)
        twin.add((x, y), metadata={"logits": stored})
        check_same(learner, hand, twin, learner.step(x, y), losses, total, logits)
    assert len(writes) == 9


def test_memory_moves_of_a_joint_pass_and_features():
    """Activations move too, also those of a draw that went through the model together with the stream only."""
    model, hand = conv(), conv()
    buffer, twin = ReservoirBuffer(12, seed=1), ReservoirBuffer(12, seed=1)
    pod = PooledOutputDistillation(0.0, layers=["2"])
    learner = ReplayLearner(model, sgd(model), buffer, terms=[ReplayLoss(None), pod], replay_batch_size=7, ema_memory_update_gamma=0.7)
    for i, (x, y) in enumerate(batches(5, 6, (1, 5, 6))):
        (x1, y1, meta) = drawn(twin, 7) if i else (x[:0], y[:0], {})
        logits, features = passed(hand, torch.cat([x, x1]), ["2"])
        now = features["2"].detach().float().numpy()
        total = ce(logits, torch.cat([y, y1]))
        descend(hand, total)
        if i:
            twin.set_metadata("features.2", (0.7 * meta["features.2"] + 0.3 * now[6:]).astype(np.float32), meta["idx"])
        twin.add((x, y), metadata={"features.2": now[:6]})
        check_same(learner, hand, twin, learner.step(x, y), {"stream+replay": total}, total, logits[:6])


def test_memory_moves_only_where_the_sample_is_still_there():
    """A row that got another sample between `loss` and `after_step` keeps that one's logits."""
    model = dense()
    buffer = SlidingWindowBuffer(12)
    learner = DERLearner(model, sgd(model), buffer, beta=0.0, replay_batch_size=12, ema_memory_update_gamma=0.5)
    (x, y), (x1, y1), (x2, y2) = batches(3, 6)
    for batch in ((x, y), (x1, y1)):
        learner.step(*batch)
    before = buffer.get_metadata("logits")
    x_all = torch.from_numpy(buffer.get(np.arange(12))[0][0])
    now = model(x_all).detach().float().numpy()
    learner.loss(x2, y2)
    other = np.full((2, 3), 7.0, np.float32)
    buffer.add((x[:2], y[:2]), metadata={"logits": other})  # into rows 0 and 1
    learner.after_step()  # and six into rows 2 to 7
    after = buffer.get_metadata("logits")
    assert np.array_equal(after[:2], other)
    np.testing.assert_allclose(after[2:8], model(x2).detach().float().numpy(), rtol=1e-5)
    np.testing.assert_allclose(after[8:], (0.5 * before + 0.5 * now)[8:], rtol=1e-5)


# -- masks and growing heads ---------------------------------------------------------------------------------------------------


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


# -- terms ---------------------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(buffers, "_CHUNK", 4)
    model = dense()
    learner = ReplayLearner(model, sgd(model), ReservoirBuffer(40), terms=[Anchor()])
    plain, made = store.Store.commit_planned, [0]

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
        patch.setattr(store.Store, "commit_planned", full)
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
