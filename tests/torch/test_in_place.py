"""Code of users that works in place: what is stored, drawn and handed out later is as if it worked on copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from learner_oracle import batches, dense, sgd

from leanreplay import ClosestToCenterSelection, ReservoirBuffer
from leanreplay.torch import (
    AsyncReservoir,
    CLSLearner,
    Consistency,
    DERLearner,
    ERLearner,
    LogitMatching,
    MixedLoader,
    PODLearner,
    ReplayLearner,
    ReplayLoss,
    SuperERLearner,
    Term,
    features,
    fit,
)


class InPlace(torch.nn.Module):
    """A model that begins with this, in place or not."""

    def __init__(self, in_place):
        super().__init__()
        self.inner, self.in_place = dense(), in_place

    def forward(self, x):
        return self.inner(x.sub_(0.5).div_(0.25) if self.in_place else (x - 0.5) / 0.25)


class Keeps(Term):
    """Stores the very outputs."""

    def keep(self, learner, stream):
        return {"mine": stream.outputs}

    def move(self, learner, replay, now, gamma):
        return {"mine": now.outputs}


def relabel(in_place):
    def loss(outputs, y):
        outputs = outputs.clamp_(-0.3, 0.3) if in_place else outputs.clamp(-0.3, 0.3)
        y = y.sub_(7) if in_place else y - 7
        return torch.nn.functional.cross_entropy(outputs, y)

    return loss


def half(in_place):
    return (lambda v: v.mul_(2)) if in_place else (lambda v: v * 2)


METHODS = {
    "er": (ERLearner, {}),
    "er, one mean": (ERLearner, {"alpha": None}),
    "der": (DERLearner, {"ema_memory_update_gamma": 0.5}),
    "cls": (CLSLearner, {}),
    "cls, one mean": (CLSLearner, {"alpha": None}),
    "pod": (PODLearner, {"layers": ["inner.1"], "distillation_type": "pixel"}),
    "super": (SuperERLearner, {"pod_alpha": 0}),
    "shared": (ReplayLearner, {"terms": lambda: [ReplayLoss(), LogitMatching(draw="shared"), Consistency()]}),
    "own term": (ReplayLearner, {"terms": lambda: [ReplayLoss(), Keeps("mine", 0.0, None)], "ema_memory_update_gamma": 0.5}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["model", "transforms", "loss", "loop"])
def test_learners(method, where):
    """The same model and the same buffer, to the bit, wherever somebody works in place; `loop` overwrites all that it can reach."""
    found = []
    for in_place in (False, True):
        kind, options = METHODS[method]
        options = {k: v() if callable(v) else v for k, v in options.items()}
        model = InPlace(in_place and where == "model")
        if where == "transforms":
            names = ["transform", "target_transform", "buffer_transform", "buffer_target_transform"]
            options |= dict.fromkeys(names, half(in_place))
            model.inner[-1] = torch.nn.Linear(5, 5).double()
            torch.nn.init.ones_(model.inner[-1].weight)
            torch.nn.init.zeros_(model.inner[-1].bias)
        if where == "loss":
            options["loss_fn"] = relabel(in_place)
        learner = kind(model, sgd(model), ReservoirBuffer(20), replay_batch_size=4, **options)
        if where == "loss" and method in ("cls", "cls, one mean", "super", "shared"):
            learner.terms[-2 if method == "super" else -1].weight = 0.0  # labels of 7 are nothing to the copies
        x, y = torch.empty(6, 4, dtype=torch.float64), torch.empty(6, dtype=torch.int64)
        for new_x, new_y in batches(5, 6):
            x.copy_(new_x)
            y.copy_(new_y + 7 * (where == "loss"))
            if where == "transforms":
                kept = x.clone(), y.clone()
            learner.optimizer.zero_grad()
            learner.loss(x, y).backward()
            if where == "transforms":
                assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])
            learner.optimizer.step()
            if in_place and where == "loop":
                learner.outputs.zero_()
                x.zero_()
                y.fill_(9)
            learner.after_step()
        (x_held, y_held), meta = learner.buffer.get(learner.buffer.get_metadata("idx"))
        found.append([p.detach().numpy() for p in model.parameters()] + [x_held, y_held, *meta.values()])
        stream_x = torch.cat([x for x, _ in batches(5, 6)]).numpy()
        stream_y = torch.cat([y for _, y in batches(5, 6)]).numpy() + 7 * (where == "loss")
        assert np.array_equal(x_held, stream_x[meta["position"]]) and np.array_equal(y_held, stream_y[meta["position"]])
    assert [a.tobytes() for a in found[0]] == [b.tobytes() for b in found[1]]


@pytest.mark.parametrize("method", METHODS)
def test_closures(method):
    """A batch whose loss is asked for several times counts once, and is the same each time."""
    found = []
    for in_place in (False, True):
        kind, options = METHODS[method]
        model = InPlace(in_place)
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
        options = {k: v() if callable(v) else v for k, v in options.items()}
        learner = kind(model, optimizer, ReservoirBuffer(20), replay_batch_size=4, **options)
        losses = [learner.step(x, y).losses for x, y in batches(4, 6)]
        assert learner.buffer.seen == 24 and not learner.pending
        found.append((losses, [p.tolist() for p in model.parameters()], learner.buffer.get(np.arange(20))))
    assert str(found[0]) == str(found[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("leaf", [True, False])
def test_gradients_of_the_batch(method, leaf):
    """An x that requires gradients gets them, as adversarial training needs: those that a draw's samples leave it."""
    kind, options = METHODS[method]
    options = {k: v() if callable(v) else v for k, v in options.items()}
    model = InPlace(False)
    learner = kind(model, sgd(model), ReservoirBuffer(20), replay_batch_size=4, loss_normalization=False, **options)
    for x, y in batches(3, 6):
        delta = torch.zeros_like(x).requires_grad_()
        x = x.requires_grad_() if leaf else x + delta
        learner.optimizer.zero_grad()
        learner.loss(x, y).backward()
        mean = torch.nn.functional.cross_entropy(model(x), y, reduction="sum")
        expected = torch.autograd.grad(mean, x)[0] / (10 if "mean" in method and len(learner.buffer) else 6)
        torch.testing.assert_close(x.grad if leaf else delta.grad, expected)
        learner.optimizer.step()
        learner.after_step()
    assert np.array_equal(learner.buffer.get([12])[0][0], x[:1].detach())


@pytest.mark.parametrize("method", METHODS)
def test_batch_transforms(method):
    """They work on copies, of the stream and of draws."""
    found = []
    for in_place in (False, True):
        kind, options = METHODS[method]
        options = {k: v() if callable(v) else v for k, v in options.items()}
        model, names = InPlace(False), ("batch_transform", "buffer_batch_transform")
        learner = kind(model, sgd(model), ReservoirBuffer(20), replay_batch_size=4, **dict.fromkeys(names, half(in_place)), **options)
        for x, y in batches(3, 6):
            kept = x.clone()
            learner.step(x, y)
            assert torch.equal(x, kept)
        found.append([p.tolist() for p in model.parameters()] + [learner.buffer.get(np.arange(18))[0][0].tolist()])
    assert found[0] == found[1]


def test_validation_of_fit():
    """Neither the loss nor a metric changes what the next one sees, nor the data."""

    def loss(outputs, y):
        return torch.nn.functional.cross_entropy(outputs, y.clamp_(min=1))

    def spoils(outputs, y):
        outputs.zero_(), y.zero_()
        return 0.5

    model, (x, y) = InPlace(True), batches(1, 12)[0]
    learner, before = ERLearner(model, sgd(model), ReservoirBuffer(20), loss_fn=loss), (x.clone(), y.clone())
    metrics = {"a": spoils, "zeros": lambda outputs, y: (y == 0).double().mean(), "size": lambda outputs, y: outputs.abs().sum()}
    history = fit(learner, (x, y), val_dataset=(x, y), metrics=metrics, max_epochs=1, progress=False)
    assert history["val_zeros"] == [(y == 0).double().mean().item()] != [0] and history["val_size"][0] > 0
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


def test_one_batch_filled_again_and_again():
    """Several batches before one `after_step`, in memory that the loop uses again, which may be NumPy's."""
    model, stream = dense(), batches(3, 6)
    learner = ERLearner(model, sgd(model), ReservoirBuffer(18))
    x, y = np.empty((6, 4)), np.empty(6, np.int64)
    for new_x, new_y in stream:
        x[:], y[:] = new_x, new_y
        learner.loss(torch.from_numpy(x), torch.from_numpy(y)).backward()
    x[:], y[:] = 0, 9
    learner.after_step()
    (x_held, y_held), _ = learner.buffer.get(np.arange(18))
    assert np.array_equal(x_held, torch.cat([x for x, _ in stream])) and np.array_equal(y_held, torch.cat([y for _, y in stream]))


def test_terms_change_what_was_stored():
    """What `stored` gives is a copy: terms that share a draw, and what moves, do not see what another did with it."""

    class Scales(Term):
        def loss(self, learner, replay):
            replay.stored("logits").mul_(100)
            return replay.outputs.sum() * 0

    stored = []
    for terms in ([LogitMatching()], [Scales("scales", 1.0), LogitMatching(draw="shared")]):
        model = dense()
        learner = ReplayLearner(model, sgd(model), ReservoirBuffer(20), terms=terms, ema_memory_update_gamma=0.5, loss_normalization=False)
        for x, y in batches(3, 6):
            learner.step(x, y)
        stored.append(learner.buffer.get_metadata("logits"))
    assert np.array_equal(*stored)


@pytest.mark.parametrize("kind", ["array", "tensor", "dataset"])
def test_features(kind):
    """The inputs are the user's: neither the model nor `transform` changes them; also where a strategy asks."""
    x = batches(1, 6)[0][0]
    data = {"array": x.numpy().copy(), "tensor": x.clone(), "dataset": list(x.clone())}[kind]
    wanted = features(InPlace(False), "inner.2", x.clone(), transform=lambda v: v * 2, progress=False)
    for _ in range(2):
        found = features(InPlace(True), "inner.2", data, transform=lambda v: v.mul_(2), progress=False)
        assert np.array_equal(found, wanted)
        ClosestToCenterSelection(InPlace(True), "inner.2", transform=lambda v: v.mul_(2)).sorted_indices_of(data)
    assert torch.equal(torch.stack(list(map(torch.as_tensor, data))), x)


class Thing:
    def __init__(self, i):
        self.values = [i]


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list, tuple, dict, Thing])
@pytest.mark.parametrize("how", ["single", "as they are", "batches", "own collate"])
def test_reservoir(kind, how):
    """An epoch gets copies of the entries."""
    make = {
        np.array: lambda i: np.arange(5 * i, 5 * i + 5)[1:3],
        torch.tensor: lambda i: torch.arange(5 * i, 5 * i + 5)[1:3],
        list: lambda i: [np.full(2, i)],
        tuple: lambda i: (torch.full((2,), i), i),
        dict: lambda i: {"x": np.full(2, i)},
        Thing: Thing,
    }[kind]
    if kind is Thing and how in ("batches", "single"):
        return

    def change(value):
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            for v in value:
                if not isinstance(v, int):
                    change(v)
        elif isinstance(value, Thing):
            value.values.append(7)
        else:
            value += 100

    def plain(value):
        if isinstance(value, Thing):
            return value.values
        if isinstance(value, dict):
            value = list(value.values())
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else np.asarray(value).tolist()

    def collate(entries):
        change(entries)
        return entries

    options = {
        "single": {},
        "as they are": {"collate_fn": None},
        "batches": {"sampler": lambda snapshot: [range(len(snapshot))]},
        "own collate": {"sampler": lambda snapshot: [range(len(snapshot))], "collate_fn": collate},
    }[how]
    with AsyncReservoir(range(3), make, 3, min_reservoir_samples=3, executor="thread", deterministic=True, max_jobs_at_once=3,
                        **options) as reservoir:  # fmt: skip
        change(list(reservoir))
        entries = reservoir.state_dict()["entries"]
        assert sorted(map(str, map(plain, entries))) == sorted(str(plain(make(i))) for i in range(3))


def test_mixed_loader():
    """The batch is the loop's own, while the buffer is empty too."""
    x, y = batches(1, 6)[0]
    kept = x.clone(), y.clone()
    buffer = ReservoirBuffer(9)
    for _ in range(2):
        for x_all, y_all, is_replay, _ in MixedLoader([(x, y)], buffer, 3):
            buffer.add((x_all[~is_replay], y_all[~is_replay]))
            x_all.zero_()
            y_all.zero_()
    assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])
