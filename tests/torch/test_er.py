"""Experience replay by hand: steps, pieces of steps, states."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tensors import equal, held

import leanreplay
from leanreplay import InfiniteBuffer, LeanReplayError, ReservoirBuffer, SlidingWindowBuffer, StateError
from leanreplay.errors import LossError
from leanreplay.torch import ERLearner, sample

pytestmark = pytest.mark.usefixtures("kernels")


def same(a, b):
    return all(p.dtype == q.dtype and p.shape == q.shape and p.tobytes() == q.tobytes() for p, q in zip(held(a), held(b), strict=True))


# -- experience replay -------------------------------------------------------------------------------------------------


CLASSES = 3


def stream(n, size, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 4, generator=g, dtype=dtype), torch.randint(0, CLASSES, (size,), generator=g)) for _ in range(n)]


def linear(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return torch.nn.Linear(4, CLASSES).to(dtype)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def by_hand(w, b, x, y):
    """Mean cross-entropy of a linear model, its gradients, and the logits, in NumPy."""
    logits = x @ w.T + b
    e = np.exp(logits - logits.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    loss = -np.log(p[np.arange(len(y)), y]).mean()
    d = (p - np.eye(CLASSES)[y]) / len(y)
    return loss, d.T @ x, d.sum(0), logits


@pytest.mark.parametrize("size, replayed, capacity", [(10, 16, 25), (5, 4, 8), (3, 32, 100), (4, 0, 10)])
def test_er_step_by_hand(size, replayed, capacity):
    """Loss, outputs, weights and buffer after every step are those computed by hand from the paper's equation."""
    model = linear()
    w, b = (p.detach().numpy().copy() for p in model.parameters())
    buffer, twin = ReservoirBuffer(capacity, seed=7), ReservoirBuffer(capacity, seed=7)
    learner = ERLearner(model, sgd(model), buffer, alpha=None, replay_batch_size=replayed)
    for i, (x, y) in enumerate(stream(12, size)):
        xs, ys = x.numpy(), y.numpy()
        m = min(replayed, len(twin))
        assert m == min(replayed, capacity, i * size)
        if m:
            (x_old, y_old), meta = twin.sample(m)
            assert len(set(meta["idx"])) == m and meta["position"].max() < i * size  # distinct, and none of this step's own
            xs, ys = np.concatenate([xs, x_old]), np.concatenate([ys, y_old])
        loss, dw, db, logits = by_hand(w, b, xs, ys)
        w, b = w - 0.1 * dw, b - 0.1 * db
        step = learner.step(x, y)
        twin.add((x, y))
        assert isinstance(step.loss, float) and step.loss == pytest.approx(loss, rel=1e-12), f"step {i}"
        assert not step.outputs.requires_grad and step.outputs.shape == (size, CLASSES)
        np.testing.assert_allclose(step.outputs.numpy(), logits[:size], rtol=1e-12)
        np.testing.assert_allclose(model.weight.detach().numpy(), w, rtol=1e-10)
        np.testing.assert_allclose(model.bias.detach().numpy(), b, rtol=1e-10)
        assert same(buffer, twin) and buffer.seen == (i + 1) * size == twin.seen and learner.steps == i + 1


def test_one_forward_for_both():
    """Stream and replay go through the model together, the stream first."""
    model = linear()
    shapes = []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[0]))
    learner = ERLearner(model, sgd(model), ReservoirBuffer(50), replay_batch_size=6)
    for x, y in stream(3, 4):
        learner.step(x, y)
    assert shapes == [4, 8, 10]


def test_loss_fn():
    """loss_fn takes (outputs, targets) of stream and replay together."""
    model = linear()
    calls = []

    def loss_fn(outputs, targets):
        calls.append((outputs.shape, targets.shape))
        return outputs.square().mean()

    learner = ERLearner(model, sgd(model), ReservoirBuffer(9), alpha=None, replay_batch_size=5, loss_fn=loss_fn)
    for x, y in stream(2, 4):
        learner.step(x, y)
    assert calls == [((4, 3), (4,)), ((8, 3), (8,))]


def test_loss_only_queues_and_pieces_make_a_step():
    """loss leaves the buffer alone; loss, backward, optimizer and after_step are `step`, bit for bit."""
    models = [linear(), linear()]
    buffers = [ReservoirBuffer(20, seed=2) for _ in models]
    whole, pieces = (ERLearner(m, sgd(m, momentum=0.9), b, replay_batch_size=8) for m, b in zip(models, buffers, strict=True))
    for x, y in stream(8, 6):
        step = whole.step(x, y)
        seen = buffers[1].seen
        pieces.optimizer.zero_grad()
        loss = pieces.loss(x, y)
        assert loss.requires_grad and loss.shape == () and buffers[1].seen == seen
        loss.backward()
        pieces.optimizer.step()
        assert buffers[1].seen == seen
        pieces.after_step()
        assert loss.item() == step.loss and torch.equal(pieces.outputs, step.outputs) and buffers[1].seen == seen + 6
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert same(*buffers) and whole.steps == pieces.steps == 8


def test_accumulation(monkeypatch):
    """Losses of several batches before one optimizer step: all are queued, and added in order by one call."""
    model = linear()
    buffer, twin = ReservoirBuffer(20, seed=2), ReservoirBuffer(20, seed=2)
    learner = ERLearner(model, sgd(model), buffer, replay_batch_size=8)
    inner, adds = buffer.add, []
    monkeypatch.setattr(buffer, "add", lambda b, **k: adds.append(len(b[1])) or inner(b, **k))
    batches = stream(9, 5)
    for i in range(0, 9, 3):
        learner.optimizer.zero_grad()
        for x, y in batches[i : i + 3]:
            (learner.loss(x, y) / 3).backward()
            assert buffer.seen == 5 * i
        learner.optimizer.step()
        learner.after_step()
        twin.add(tuple(torch.cat(parts) for parts in zip(*batches[i : i + 3], strict=True)))
    assert adds == [15, 15, 15] and learner.steps == 3 and same(buffer, twin)
    learner.after_step()
    assert adds == [15, 15, 15] and buffer.seen == 45  # nothing queued, nothing added


def test_skipped_optimizer_step():
    """after_step(stepped=False), as after an overflow in mixed precision: the samples were seen, the step is not counted."""
    model = linear()
    learner = ERLearner(model, sgd(model), ReservoirBuffer(20))
    (x, y), *_ = stream(1, 5)
    learner.loss(x, y)
    learner.after_step(stepped=False)
    assert learner.steps == 0 and learner.buffer.seen == 5


class Norm(torch.nn.Module):
    """With running statistics, which a forward pass changes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, CLASSES)).double()

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", ["step", "loss"])
@pytest.mark.parametrize("place", ["input", "replay", "loss_fn"])
def test_loss_that_is_not_finite(place, how, bad, tmp_path):
    """A LossError, with weights, running statistics, momentum, counts and buffer as before; and the next batch trains."""
    model = Norm()
    scale = [1.0]
    buffer = ReservoirBuffer(30, tmp_path / "b.h5", seed=1)
    if place == "replay":  # NaN may be stored
        buffer.add((torch.full((1, 4), bad, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)))

    def loss_fn(outputs, targets):
        return scale[0] * torch.nn.functional.cross_entropy(outputs, targets)

    learner = ERLearner(model, sgd(model, momentum=0.9), buffer, replay_batch_size=8, loss_fn=loss_fn)
    batches = stream(5, 6)
    if place != "replay":
        for x, y in batches[:3]:
            learner.step(x, y)
    x, y = (t.clone() for t in batches[3])
    if place == "input":
        x[2, 1] = bad
    elif place == "loss_fn":
        scale[0] = bad
    before = [t.clone() for t in model.state_dict().values()]
    momentum = [s["momentum_buffer"].clone() for s in learner.optimizer.state.values()]
    kept, seen, steps = held(buffer), buffer.seen, learner.steps
    with pytest.raises(LossError, match=rf"loss of step {steps} is (nan|inf).*neither trained on nor stored") as caught:
        getattr(learner, how)(x, y)
    assert isinstance(caught.value, LeanReplayError)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert all(torch.equal(a, s["momentum_buffer"]) for a, s in zip(momentum, learner.optimizer.state.values(), strict=True))
    assert equal(held(buffer), kept) and buffer.seen == seen and learner.steps == steps
    learner.after_step(stepped=False)
    assert buffer.seen == seen, "the refused batch was queued"
    scale[0] = 1.0
    if place != "replay":
        learner.step(*batches[4])
        assert buffer.seen == seen + 6 and all(torch.isfinite(p).all() for p in model.state_dict().values())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["backward", "optimizer"])
def test_failed_step_leaves_no_sample(where, error, monkeypatch):
    """A step that fails on its way is not added later: made again, it counts once."""
    model = linear()
    learner = ERLearner(model, sgd(model), ReservoirBuffer(30))
    first, second = stream(2, 6)
    learner.step(*first)

    def fail(*_, **__):
        raise error("out of memory")

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(*((torch.Tensor, "backward") if where == "backward" else (learner.optimizer, "step")), fail)
        learner.step(*second)
    assert learner.steps == 1 and learner.buffer.seen == 6
    learner.step(*second)
    assert learner.steps == 2 and learner.buffer.seen == 12


def test_device():
    """device: both parts of the batch are moved there; the buffer gets the batch as it came."""
    model = linear().to("meta")
    devices = []

    def loss_fn(outputs, targets):
        devices.append((outputs.device.type, targets.device.type))
        return torch.zeros((), requires_grad=True)

    learner = ERLearner(model, sgd(model), ReservoirBuffer(30), alpha=None, device="meta", loss_fn=loss_fn)
    batches = stream(3, 6)
    for x, y in batches:
        learner.step(x, y)
    assert devices == [("meta", "meta")] * 3 and learner.buffer.seen == 18
    assert np.array_equal(learner.buffer.get(np.arange(18))[0][0], torch.cat([x for x, _ in batches]).numpy())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda():
    """On a CUDA device, batches there or on the CPU: the same weights as on the CPU, but for rounding, and the same buffer."""
    models, buffers = [linear() for _ in range(3)], [ReservoirBuffer(30, seed=4) for _ in range(3)]
    models[1].cuda(), models[2].cuda()
    devices = (None, "cuda", None)
    learners = [ERLearner(m, sgd(m), b, replay_batch_size=8, device=d) for m, b, d in zip(models, buffers, devices, strict=True)]
    for x, y in stream(20, 6):
        learners[0].step(x, y), learners[1].step(x, y), learners[2].step(x.cuda(), y.cuda())
    for model, buffer in zip(models[1:], buffers[1:], strict=True):
        assert same(buffer, buffers[0]) and torch.allclose(model.weight.cpu(), models[0].weight, rtol=1e-9)
    (x, y), meta = sample(buffers[0], 5, "cuda")
    assert {t.device.type for t in (x, y, *meta.values())} == {"cuda"}


# -- state -------------------------------------------------------------------------------------------------------------


def plain(value):
    """Whether this is nested dicts and lists of Python's own strings and numbers."""
    if type(value) is dict:
        return all(type(k) is str and plain(v) for k, v in value.items())
    return all(map(plain, value)) if type(value) is list else value is None or type(value) in (int, str)


def new_learner(where, path, mode, dtype=torch.float32):
    model = torch.nn.Sequential(linear(dtype=dtype), torch.nn.Tanh(), torch.nn.Linear(CLASSES, CLASSES))
    buffer = ReservoirBuffer(25, path / "b.h5" if where == "disk" else None, seed=5, mode=mode)
    return ERLearner(model, sgd(model, momentum=0.9), buffer, replay_batch_size=8)


def run(learner, batches):
    return [learner.step(x, y).loss for x, y in batches]


def save(learner, path):
    torch.save({"model": learner.model.state_dict(), "opt": learner.optimizer.state_dict(), "learner": learner.state_dict()}, path)


def load(learner, path):
    state = torch.load(path, weights_only=True)
    learner.model.load_state_dict(state["model"])
    learner.optimizer.load_state_dict(state["opt"])
    learner.load_state_dict(state["learner"])
    assert plain(state["learner"])


@pytest.mark.parametrize("where", ["disk", "ram"])
@pytest.mark.parametrize("at, overrun", list(itertools.product([0, 1, 3, 9], [0, 1, 11])))
def test_resumed_run_is_the_same(where, at, overrun, tmp_path):
    """Checkpoint after `at` steps, train on, come back through torch.load(weights_only=True): losses, weights and buffer, bit for bit."""
    batches = stream(20, 6, dtype=torch.float32)
    (tmp_path / "whole").mkdir()
    whole = new_learner(where, tmp_path / "whole", "x")
    wanted = run(whole, batches)
    learner = new_learner(where, tmp_path, "x")
    losses = run(learner, batches[:at])
    save(learner, tmp_path / "c.pt")
    assert run(learner, batches[at : at + overrun]) == wanted[at : at + overrun]
    if where == "disk":
        learner.buffer.close()
        exists = at + overrun > 0  # the file appears with the first batch
        learner = new_learner(where, tmp_path, "r+" if exists else "x")
    load(learner, tmp_path / "c.pt")
    assert learner.steps == at and learner.buffer.seen == 6 * at
    losses += run(learner, batches[at:])
    assert losses == wanted and learner.steps == 20
    assert same(learner.buffer, whole.buffer) and not learner.buffer.check()
    for a, b in zip(learner.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_state_refusals():
    """A state while batches are queued would lack them; states that do not fit change nothing."""
    learner, other = (ERLearner(m, sgd(m), ReservoirBuffer(25)) for m in (linear(), linear()))
    batches = stream(4, 6)
    learner.loss(*batches[0])
    with pytest.raises(StateError, match="after_step"):
        learner.state_dict()
    learner.after_step()
    state = learner.state_dict()
    run(learner, batches[1:])
    run(other, batches)
    kept = held(learner.buffer)
    for wrong in ({}, [], {**state, "format": 2}, {**state, "steps": "1"}, {**state, "buffer": None}):
        with pytest.raises(StateError, match="not a state"):
            learner.load_state_dict(wrong)
    with pytest.raises(StateError, match="another buffer"):
        learner.load_state_dict(other.state_dict())
    assert learner.steps == 4 and equal(held(learner.buffer), kept)
    learner.loss(*batches[2])
    learner.load_state_dict(state)
    learner.after_step(stepped=False)
    assert learner.steps == 1 and learner.buffer.seen == 6, "what was queued before the load was added after it"


def test_every_buffer_will_do(tmp_path):
    """ERLearner takes any buffer."""
    for buffer in (SlidingWindowBuffer(20), leanreplay.GreedyClassBalancingBuffer(20), InfiniteBuffer(tmp_path / "p", rows_per_part=16)):
        model = linear()
        learner = ERLearner(model, sgd(model), buffer, replay_batch_size=8)
        run(learner, stream(8, 6))
        assert buffer.seen == 48 and len(buffer) == (buffer.max_size or 48)


def test_draws_of_a_learner_are_even():
    """balance="label": what a step replays is what `sample` would have given, each class its share."""
    made = [ReservoirBuffer(40, seed=7) for _ in range(2)]
    for buffer in made:
        buffer.add((np.zeros((40, 4)), np.repeat([0, 1, 2], [36, 3, 1])))
    seen, model = [], linear()
    options = {"alpha": None, "replay_batch_size": 9, "buffer_target_transform": lambda y: seen.append(int(y)) or y}
    learner = ERLearner(model, sgd(model), made[0], balance="label", **options)
    learner.step(*stream(1, 5)[0])
    wanted = sample(made[1], 9, balance="label")[0][1].tolist()
    assert sorted(wanted) == [0] * 3 + [1] * 3 + [2] * 3
    assert seen == wanted
    with pytest.raises(LeanReplayError, match="balance is"):
        ERLearner(model, sgd(model), made[0], balance=3)
