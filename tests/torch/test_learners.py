"""The learners: every step against one computed by hand, on a twin of the model and a twin of the buffer, in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from learner_oracle import (
    average,
    batches,
    ce,
    check_same,
    cls_hand,
    conv,
    dense,
    descend,
    drawn,
    passed,
    pod_hand,
    pod_torch,
    sgd,
    spy,
    whole,
)

from leanreplay import ReservoirBuffer, SlidingWindowBuffer
from leanreplay.torch import (
    CLSLearner,
    Consistency,
    DERLearner,
    ERLearner,
    PODLearner,
    PooledOutputDistillation,
    Replay,
    ReplayLearner,
    ReplayLoss,
    SuperERLearner,
)

NORMAL = pytest.mark.parametrize("normalise", [True, False])
NORM = pytest.mark.parametrize("norm", [True, False])


# -- the methods, step by step -----------------------------------------------------------------------------------------


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


# -- what is stored moves ----------------------------------------------------------------------------------------------


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
