"""Optimizers that evaluate a batch several times, and batches that are not to be stored: what counts, and how often."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from learner_oracle import batches, dense, held, sgd

from leanreplay import (
    ArgumentError,
    ClassBalancedBuffer,
    HerdingSelection,
    InfiniteBuffer,
    ModeError,
    ParametricBuffer,
    RandomSelection,
    ReservoirBuffer,
    WeightedReservoirBuffer,
)
from leanreplay import open as open_buffer
from leanreplay.torch import CLSLearner, DERLearner, ERLearner, LogitMatching, PODLearner, ReplayLearner, ReplayLoss, SuperERLearner

LEARNERS = {
    "er": (ERLearner, {}),
    "der": (DERLearner, {"ema_memory_update_gamma": 0.5}),
    "cls": (CLSLearner, {}),
    "pod": (PODLearner, {"layers": ["0"], "distillation_type": "pixel", "ema_memory_update_gamma": 0.5}),
    "super": (SuperERLearner, {"pod_layers": ["1"], "pod_distillation_type": "pixel"}),
}
MOVED = {"der": [0, 12, 14], "pod": [0, 6, 7]}  # rows, of all draws, at each step
ALL = pytest.mark.parametrize("method", LEARNERS)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization, as it is published: a first gradient, then one of a closure at the perturbed weights."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "rho": 0.05})

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.clone()
                p.add_(group["rho"] * p.grad / (p.grad.norm() + 1e-12))

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"]).sub_(group["lr"] * p.grad)

    def step(self, closure=None):
        assert closure is not None, "Sharpness Aware Minimization requires closure, but it was not provided"
        closure = torch.enable_grad()(closure)
        self.first_step()
        closure()
        self.second_step()


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, lr=0.1, max_iter=5)


def make(method="er", optimizer=sgd, buffer=None, **options):
    kind, defaults = LEARNERS[method]
    model = dense()
    buffer = ReservoirBuffer(200, seed=1) if buffer is None else buffer
    made = optimizer(model) if optimizer is sgd else optimizer(model.parameters())
    return kind(model, made, buffer, **{"replay_batch_size": 7, **defaults, **options})


def spied(learner):
    """The inputs and targets of all passes, one list for each call of `loss`."""
    calls, inner = [], learner.loss
    learner.model.register_forward_pre_hook(lambda _, inputs: calls[-1].append(inputs[0].clone()))

    def loss(x, y):
        calls.append([])
        return inner(x, y)

    learner.loss = loss
    return calls


@ALL
@pytest.mark.parametrize("optimizer", [lbfgs, SAM])
def test_a_batch_counts_once(method, optimizer):
    """However often a closure asks for its loss: stored once, drawn once, moved once, with the values of the first pass."""
    learner = make(method, optimizer)
    calls, writes, add = spied(learner), [], learner.buffer.add
    learner.buffer.add = lambda batch, **options: writes.append(options) or add(batch, **options)
    for i, (x, y) in enumerate(batches(3, 6)):
        calls.append([])
        with torch.no_grad():
            before = learner.model(x).float()
        calls.clear()

        def closure(x=x, y=y):
            learner.optimizer.zero_grad()
            loss = learner.loss(x, y)
            loss.backward()
            return loss

        if optimizer is SAM:
            closure()
        learner.optimizer.step(closure)
        assert learner.buffer.seen == 6 * i and len(learner.pending) == 1
        learner.after_step()
        assert learner.buffer.seen == 6 * i + 6 and learner.steps == i + 1
        if "logits" in (writes[-1]["metadata"] or {}):
            assert torch.equal(torch.as_tensor(writes[-1]["metadata"]["logits"]), before)
        assert len(calls) > 1 and all(torch.equal(torch.cat(passes), torch.cat(calls[0])) for passes in calls)
        moved = writes[-1]["moved"]
        assert (0 if moved is None else len(moved[0])) == MOVED.get(method, [0] * 3)[i]
    assert len(learner.buffer) == 18 and learner.buffer.draws.drawn == 2 * {"der": 2, "super": 3}.get(method, 1)


@pytest.mark.parametrize("optimizer", [lbfgs, SAM])
def test_step_with_a_closure(optimizer):
    """`step` is the loop in pieces, bit for bit; what it returns is the first evaluation."""
    whole, pieces = make("der", optimizer), make("der", optimizer)
    for x, y in batches(4, 6):

        def closure(x=x, y=y):
            pieces.optimizer.zero_grad()
            loss = pieces.loss(x, y)
            loss.backward()
            return loss

        first = closure().item()
        outputs = pieces.outputs
        pieces.optimizer.step(closure)
        pieces.after_step()
        step = whole.step(x, y)
        assert step.loss == first and torch.equal(step.outputs, outputs)
    assert all(map(torch.equal, whole.model.parameters(), pieces.model.parameters()))
    assert all(np.array_equal(a, b) for a, b in zip(held(whole.buffer).values(), held(pieces.buffer).values(), strict=True))
    assert whole.buffer.seen == 24 and whole.steps == 4


@pytest.mark.parametrize("asks", ["calls", "says so", "requires"])
def test_other_ways_to_ask_for_a_closure(asks):
    """Optimizers of others call it without a look, or raise what they like; x may hold NaN, which equals nothing."""

    def needs(closure):
        closure()

    class Asks(torch.optim.SGD):
        def step(self, *closure):
            if asks == "calls":
                (*closure, None)[0]()
            elif asks == "says so" and not closure:
                raise ValueError("this optimizer needs a closure")
            else:
                needs(*closure)
            return super().step()

    learner = make("er", lambda parameters: Asks(parameters, lr=0.1))
    learner.model.register_forward_pre_hook(lambda _, inputs: (inputs[0].nan_to_num(),))
    for x, y in batches(3, 6):
        x[0, 0] = float("nan")
        learner.step(x, y)
    assert learner.buffer.seen == 18 and learner.steps == 3


def test_an_error_of_the_optimizer_comes_through():
    learner = make()

    def fails():
        raise TypeError("no such thing")

    learner.optimizer.step = fails
    with pytest.raises(TypeError, match="no such thing"):
        learner.step(*batches(1, 6)[0])
    assert not learner.pending and learner.buffer.seen == 0


def test_what_is_another_batch():
    """Accumulation: equal values elsewhere, another part, memory that was refilled, another y; a view of the same is the same batch."""
    x, y = torch.randn(12, 4).double(), torch.arange(12) % 3
    several = [(x[:6], y[:6]), (x[:6].clone(), y[:6]), (x[6:], y[6:]), (x[:6], y[6:]), (x[:6].view(6, 4), y[:6])]
    learner = make()
    for n, batch in zip([1, 2, 3, 4, 4], several, strict=True):
        learner.loss(*batch)
        assert len(learner.pending) == n
    x.add_(1)
    learner.loss(x[:6], y[:6])
    assert len(learner.pending) == 5
    x.copy_(x.clone())  # filled again, with what happens to be the same
    learner.loss(x[:6], y[:6])
    assert len(learner.pending) == 6
    learner.after_step()
    assert learner.buffer.seen == 36
    learner.loss(x[:6], y[:6])  # after a step it counts again
    learner.after_step()
    assert learner.buffer.seen == 42
    with torch.inference_mode():
        z = torch.ones(6, 4).double()
    for _ in range(2):
        learner.loss(z, y[:6])
    assert len(learner.pending) == 1 and z.is_inference()


def test_a_closure_over_several_batches():
    """Each of them once, each with a draw of its own that stays."""
    learner = make("der", lbfgs)
    learner.step(*batches(1, 6, seed=3)[0])
    stream, calls = batches(3, 6), spied(learner)

    def closure():
        learner.optimizer.zero_grad()
        losses = [learner.loss(x, y) / 3 for x, y in stream]
        for loss in losses:
            loss.backward()
        return sum(losses)

    learner.optimizer.step(closure)
    learner.after_step()
    assert learner.buffer.seen == 24
    assert len(calls) > 3 and all(torch.equal(torch.cat(a), torch.cat(b)) for a, b in zip(calls[:3], calls[-3:], strict=True))


def test_random_transforms_within_a_closure():
    """The loss is one function of the weights: a batch is transformed once."""
    learner = make("er", lbfgs, transform=lambda v: v + torch.randn(4), buffer_transform=lambda v: v + torch.randn(4))
    calls = spied(learner)
    for x, y in batches(2, 6):
        calls.clear()
        learner.step(x, y)
        assert len(calls) > 1 and all(torch.equal(passes[0], calls[0][0]) for passes in calls)


# -- batches that are not stored -----------------------------------------------------------------------------------------------


@ALL
def test_store(method, tmp_path):
    """Nothing is offered while `store` is False; what moves, moves; the rest of the step is the same."""
    stream = batches(6, 6)
    for buffer in (None, InfiniteBuffer(tmp_path / "parts", rows_per_part=16)):
        learner = make(method, buffer=buffer)
        for x, y in stream[:3]:
            learner.step(x, y)
        before, steps = held(learner.buffer), []
        learner.store = False
        for x, y in stream[3:]:
            steps.append(learner.step(x, y))
        after = held(learner.buffer)
        assert learner.buffer.seen == 18 and learner.steps == 6 and all(len(s.losses) > 1 or method == "er" for s in steps)
        moving = {name for name in before if not np.array_equal(before[name], after[name])}
        assert moving == {"der": {"logits"}, "pod": {"features.0"}}.get(method, set())
        learner.store = True
        learner.step(*stream[0])
        assert learner.buffer.seen == 24 and not learner.buffer.check()


def test_batches_that_are_stored_and_some_that_are_not():
    """In one accumulation, also if the disk fills: what is stored is what was to be."""
    learner = make()
    for i, (x, y) in enumerate(batches(4, 6)):
        learner.store = i % 2 == 0
        learner.loss(x, y)
    learner.after_step()
    assert learner.buffer.seen == 12 and np.array_equal(held(learner.buffer)["y"][:6], batches(4, 6)[0][1])


def test_only_replayed_from(tmp_path):
    """Buffers that a learner cannot fill: open for reading, exemplars, weighted, of other dtypes than the stream."""
    x, y = torch.randn(40, 4).double(), torch.arange(40) % 3
    with ReservoirBuffer(40, tmp_path / "b.h5") as buffer:
        buffer.add((x, y))
    exemplars = ParametricBuffer(9, groupby="class", selection_strategy=RandomSelection())
    exemplars.update(list(zip(x, y, strict=True)))
    weighted = WeightedReservoirBuffer(9)
    weighted.add((x, y), weights=np.ones(40))
    for buffer, error in [(open_buffer(tmp_path / "b.h5"), ModeError), (exemplars, ArgumentError), (weighted, ArgumentError)]:
        with pytest.raises(error, match="store=False"):
            make(buffer=buffer)
        learner, seen = make(buffer=buffer, store=False), buffer.seen
        with pytest.raises(error, match="store=False"):
            learner.store = True
        for batch in batches(2, 6):
            assert set(learner.step(*batch).losses) == {"stream", "replay"}
        assert buffer.seen == seen and not learner.store and not buffer.check()
        with pytest.raises(ArgumentError, match=r"DERLearner replays samples with the metadata \['logits'\], but the buffer has \["):
            make("der", buffer=buffer, store=False, ema_memory_update_gamma=1.0).step(*batches(1, 6)[0])
    other = ReservoirBuffer(9)
    other.add((torch.randint(0, 255, (9, 4), dtype=torch.uint8), y[:9]))
    learner = make(buffer=other, store=False, buffer_transform=lambda v: v.double() / 255)
    learner.step(*batches(1, 6)[0])
    with pytest.raises(ModeError, match="ema_memory_update_gamma below 1"):
        make(buffer=open_buffer(tmp_path / "b.h5"), store=False, ema_memory_update_gamma=0.5)
    with pytest.raises(ArgumentError, match="store must be True or False, got 'no'"):
        make(store="no")


def test_exemplars_with_logits():
    """A buffer that others filled, with what the terms compare with and more, balanced over classes."""
    buffer = ClassBalancedBuffer(12)
    x, y = batches(1, 30)[0]
    buffer.add((x, y), metadata={"logits": np.zeros((30, 3), "f4"), "other": np.zeros(30)})
    model = dense()
    learner = ReplayLearner(model, sgd(model), buffer, terms=[ReplayLoss(), LogitMatching()], store=False)
    step = learner.step(*batches(1, 6)[0])
    assert set(step.losses) == {"stream", "replay", "logits"} and buffer.seen == 30
    with pytest.raises(Exception, match="stores the metadata"):
        learner.store = True
        learner.step(*batches(1, 6)[0])


@pytest.mark.parametrize(("method", "scale"), [*((method, 3e38) for method in LEARNERS), ("er", 1024.0)])
def test_a_scaler_of_gradients(method, scale):
    """Does what a loop by hand does; where gradients overflow, samples are stored, but neither model nor copies move."""
    kind, options = LEARNERS[method]
    learner, by_hand = (kind(model := dense().float(), sgd(model), ReservoirBuffer(20, seed=1), **options) for _ in range(2))
    scaler, other = (torch.amp.GradScaler("cpu", init_scale=scale) for _ in range(2))
    skipped = 0
    for x, y in batches(5, 6):
        x = 100 * x.float()  # for a loss above 1
        step = learner.step(x, y, scaler)
        by_hand.optimizer.zero_grad()
        other.scale(by_hand.loss(x, y)).backward()
        before = other.get_scale()
        other.step(by_hand.optimizer)
        other.update()
        by_hand.after_step(other.get_scale() >= before)
        assert step.stepped == (other.get_scale() >= before) and step.targets.equal(y)
        skipped += not step.stepped
    assert scaler.state_dict() == other.state_dict() and learner.steps == by_hand.steps == 5 - skipped
    assert bool(skipped) == (scale > 1e38) and skipped < 5 and learner.buffer.seen == 30
    for mine, theirs in ((held(learner.buffer), held(by_hand.buffer)), (states(learner), states(by_hand))):
        assert list(mine) == list(theirs) and all(np.array_equal(mine[name], theirs[name]) for name in mine)


def states(learner):
    """Weights of the model and of its copies."""
    copies = [] if not hasattr(learner, "stable_model") else [learner.stable_model, learner.plastic_model]
    return {f"{i} {name}": value for i, m in enumerate([learner.model, *copies]) for name, value in m.state_dict().items()}


def blobs(label, n, seed):
    """Samples around the corner of a class."""
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)).double() / 2
    x[:, label] += 3
    return x, torch.full((n,), label)


def test_herded_exemplars_that_are_only_read(tmp_path):
    """As iCaRL: exemplars nearest to their class means, in a file that is open for reading, keep old classes while a new one is learned."""
    with ParametricBuffer(6, tmp_path / "e.h5", groupby="class", selection_strategy=HerdingSelection()) as buffer:
        for label in range(2):
            x, y = blobs(label, 30, label)
            buffer.update(list(zip(x, y, strict=True)), features=x.float().numpy())
    before, old = (tmp_path / "e.h5").read_bytes(), [torch.cat(parts) for parts in zip(blobs(0, 50, 5), blobs(1, 50, 6), strict=True)]

    def trained(replayed):
        learner = make(buffer=open_buffer(tmp_path / "e.h5"), store=False, replay_batch_size=replayed)
        for i in range(40):
            learner.step(*blobs(2, 10, 10 + i))
        with torch.no_grad():
            found = [(learner.model(x).argmax(1) == y).float().mean().item() for x, y in (old, blobs(2, 50, 9))]
        assert not learner.buffer.check()
        return found

    assert min(trained(6)) > 0.9 and trained(0)[0] < 0.6
    assert (tmp_path / "e.h5").read_bytes() == before


def test_each_sample_is_stored_once_over_several_epochs():
    """`store` is set by the epoch: what is in the buffer is what one pass would have stored, and later epochs replay it."""
    stream, once, learner = batches(5, 6), make(), make()
    for epoch in range(3):
        learner.store = epoch == 0
        for x, y in stream:
            assert ("replay" in learner.step(x, y).losses) == (learner.buffer.seen > 6 or epoch > 0)
    for x, y in stream:
        once.step(x, y)
    assert learner.buffer.seen == once.buffer.seen == 30 and learner.steps == 15
    assert all(np.array_equal(held(learner.buffer)[name], held(once.buffer)[name]) for name in ("x", "y", "position"))


def test_batches_that_nobody_writes():
    """A thousand batches that wait for after_step are a warning, once; as many that were written are none."""
    learner, (x, y) = make(replay_batch_size=0), batches(1, 1)[0]
    learner.loss(x.clone(), y)
    learner.pending *= 998
    learner.loss(x.clone(), y)
    with pytest.warns(UserWarning, match="1000 batches wait for after_step"):
        learner.loss(x.clone(), y)
    learner.loss(x.clone(), y)
    learner.after_step()
    assert learner.buffer.seen == 1001


@pytest.mark.parametrize("normalise", [True, False])
def test_weight_of_the_stream_while_the_buffer_is_empty(normalise):
    """With normalisation the first step is the plain loss; without, its weight counts, as everywhere."""
    learner, (x, y) = make(loss_weight=3.0, loss_normalization=normalise), batches(1, 6)[0]
    wanted = torch.nn.functional.cross_entropy(learner.model(x), y).item()
    step = learner.step(x, y)
    assert step.loss == pytest.approx(wanted * (1 if normalise else 3)) and step.losses == {"stream": pytest.approx(wanted)}
