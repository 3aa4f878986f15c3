"""The learners in use: resumed runs, the step in pieces (mixed precision, accumulation, DDP), transforms."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from learner_methods import ALL, differing, everything, images, make, train
from learner_oracle import batches, conv, dense, held, sgd

from leanreplay import (
    ArgumentError,
    InfiniteBuffer,
    ReservoirBuffer,
    StateError,
)
from leanreplay.errors import LossError
from leanreplay.torch import (
    DERLearner,
    ERLearner,
    ReplayLearner,
    Term,
)

# -- state -------------------------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("at, overrun", [(0, 0), (3, 5), (6, 2), (8, 0)])
def test_resumed_run_is_the_same(method, at, overrun, tmp_path):
    """Checkpoint after `at` batches, train on, come back in new objects through torch.load(weights_only=True): bit for bit the run
    that nothing interrupted, tasks' starts, moved metadata, masks and slow copies included."""
    stream = images(12)
    whole = make(method)
    wanted = train(whole, stream)

    learner = make(method, ReservoirBuffer(25, tmp_path / "b.h5", seed=5))
    losses = train(learner, stream[:at])
    state = {"model": learner.model.state_dict(), "optimizer": learner.optimizer.state_dict(), "learner": learner.state_dict()}
    torch.save(state, tmp_path / "c.pt")
    train(learner, stream[at : at + overrun], at)
    learner.buffer.close()

    learner = make(method, ReservoirBuffer(25, tmp_path / "b.h5", seed=5, mode="a"))
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    learner.model.load_state_dict(state["model"])
    learner.optimizer.load_state_dict(state["optimizer"])
    learner.load_state_dict(state["learner"])
    assert learner.steps == at and learner.buffer.seen == 6 * at
    losses += train(learner, stream[at:], at)
    assert losses == wanted and learner.task == 2
    assert not differing(everything(learner), everything(whole)) and not learner.buffer.check()


@ALL
def test_going_back_in_memory(method):
    """A state in memory does not move with the learner, and brings it back."""
    learner = make(method)
    train(learner, images(6))
    state = learner.state_dict()
    model = {k: v.clone() for k, v in learner.model.state_dict().items()}
    before = everything(learner)
    train(learner, images(3, seed=1), 8)
    learner.load_state_dict(state)
    learner.model.load_state_dict(model)
    assert not [k for k in differing(everything(learner), before) if not k.startswith("momentum")]
    assert learner.task == 1


def test_states_that_do_not_fit(tmp_path):
    """A StateError before anything changed: of other terms, another model's copies, wrong types, another buffer, or with batches queued."""
    learner, other = make("super"), make("super")
    train(learner, images(5)), train(other, images(5))
    state = learner.state_dict()
    train(learner, images(2, seed=3), 5)
    before = everything(learner)
    terms = state["terms"]
    copies = terms["consistency"]
    wider = {**copies, "stable": {**copies["stable"], "5.bias": torch.zeros(7)}}
    wrong = [
        {},
        [],
        None,
        {**state, "format": 2},
        {**state, "steps": "1"},
        {**state, "steps": -1},
        {**state, "task": 1.5},
        {**state, "classes": [0, -1]},
        {**state, "classes": ["a"]},
        {**state, "buffer": None},
        {k: v for k, v in state.items() if k != "terms"},
        {**state, "terms": {}},
        {**state, "terms": {**terms, "other": {}}},
        {**state, "terms": {**terms, "consistency": wider}},
        {**state, "terms": {**terms, "consistency": {"stable": copies["stable"]}}},
        {**state, "terms": {**terms, "consistency": {**copies, "plastic": {"5.bias": 1}}}},
        {**state, "terms": {**terms, "shrink and perturb": {"starts": -1}}},
        {**state, "terms": {**terms, "shrink and perturb": 3}},
        {**state, "buffer": other.state_dict()["buffer"]},
        make("er").state_dict(),
    ]
    for value in wrong:
        with pytest.raises(StateError):
            learner.load_state_dict(value)
        assert not differing(everything(learner), before), f"{value!r:.80}"
    learner.loss(*images(1)[0])
    with pytest.raises(StateError, match="1 batches wait for after_step"):
        learner.state_dict()


def test_tasks():
    """A task that is going on is not started again; without a name every call starts one; after its end the same name does."""
    starts = []

    class Counter(Term):
        def __init__(self):
            super().__init__("counter", 0.0, None)

        def on_task_start(self, learner):
            starts.append(learner.steps)

    model = dense()
    learner = ReplayLearner(model, sgd(model), ReservoirBuffer(9), terms=[Counter()])
    for task, count in [(0, 1), (0, 1), (1, 2), ("a", 3), ("a", 3), (None, 4), (None, 5), (0, 6)]:
        learner.on_task_start(task)
        assert len(starts) == count
    learner.on_task_end()
    learner.on_task_start(0)
    assert len(starts) == 7
    with pytest.raises(ArgumentError, match="task"):
        learner.on_task_start(1.5)


# -- in pieces ---------------------------------------------------------------------------------------------------------


@ALL
def test_pieces_make_a_step(method):
    """loss, backward, optimizer and after_step are `step`, bit for bit; until after_step nothing but running statistics changes."""
    whole, pieces = make(method), make(method)
    for x, y in images(5):
        step = whole.step(x, y)
        before = everything(pieces)
        pieces.optimizer.zero_grad()
        loss = pieces.loss(x, y)
        assert loss.requires_grad and loss.item() == step.loss and pieces.losses == step.losses
        assert not [k for k in differing(everything(pieces), before) if "running" not in k and "num_batches" not in k]
        loss.backward()
        pieces.optimizer.step()
        pieces.after_step()
    assert not differing(everything(whole), everything(pieces))


def test_accumulation():
    """Several losses before one step: batches, what is stored with them and what moved are written in one commit, the copies move once."""
    learner = make("super", loss_normalization=False)
    writes = []
    add = learner.buffer.add
    learner.buffer.add = lambda batch, **options: writes.append((len(batch[1]), options)) or add(batch, **options)
    stream = images(9)
    for i in range(0, 9, 3):
        learner.optimizer.zero_grad()
        for x, y in stream[i : i + 3]:
            (learner.loss(x, y) / 3).backward()
            assert learner.buffer.seen == 6 * i
        learner.optimizer.step()
        learner.after_step()
        assert learner.steps == i // 3 + 1 and learner.buffer.seen == 6 * i + 18
    assert [n for n, _ in writes] == [18] * 3
    assert writes[0][1]["moved"] is None and len(writes[2][1]["moved"][0]) == 3 * 3 * 8
    assert {k: v.shape[0] for k, v in writes[2][1]["metadata"].items()} == {"logits": 18, "features.2": 18}
    assert np.array_equal(np.sort(learner.buffer.get_metadata("position"))[-1:] < 54, [True])


def test_skipped_step():
    """after_step(stepped=False): the samples were seen, what is stored moved; the step does not count and no copy moves."""
    learner = make("super", cls_stable_model_update_probability=1.0, cls_plastic_model_update_probability=1.0)
    for x, y in images(3):
        learner.step(x, y)
    before = everything(learner)
    learner.loss(x, y)
    learner.after_step(stepped=False)
    changed = differing(everything(learner), before)
    assert learner.steps == 3 and learner.buffer.seen == 24
    assert not [k for k in changed if "running" not in k and "num_batches" not in k and not k.startswith("buffer") and k != "counts"]
    assert "buffer logits" in changed
    learner.loss(x, y)
    learner.after_step()
    assert learner.steps == 4 and "consistency 0 0.weight" in differing(everything(learner), before)


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="this torch scales gradients on CUDA only")
def test_mixed_precision():
    """autocast and GradScaler around `loss`: the first scales overflow and are skipped, then it trains; stored is float32."""
    model = conv().float()
    learner = make("super", model=model, loss_normalization=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
    skipped = 0
    for x, y in images(16):
        learner.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = learner.loss(x.float(), y)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(learner.optimizer)
        scaler.update()
        stepped = scaler.get_scale() >= scale
        learner.after_step(stepped)
        skipped += not stepped
    assert 1 <= skipped <= 14 and learner.steps == 16 - skipped and learner.buffer.seen == 96
    assert {str(f) for f in learner.buffer.schema.metadata} == {"metadata/logits: f4[3]", "metadata/features.2: f4[2, 3, 4]"}
    assert all(torch.isfinite(p).all() for p in learner.stable_model.parameters()) and np.isfinite(held(learner.buffer)["logits"]).all()


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available() or os.name != "posix", reason="no torch.distributed")
@ALL
def test_distributed(method, group):
    """In a DistributedDataParallel: layers' names, copies, batch norm; the same bits as without."""
    plain = make(method)
    model = conv()
    wrapped = make(method, model=torch.nn.parallel.DistributedDataParallel(model))
    passes = []
    model.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].shape[0]))
    stream = images(6)
    assert train(plain, stream) == train(wrapped, stream)
    assert not differing(everything(plain), everything(wrapped)) and passes
    assert wrapped.module is model and not any(m._forward_hooks for m in model.modules())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@ALL
def test_cuda(method):
    """On a CUDA device, batches from the CPU: as on the CPU, but for rounding; a label out of range leaves the device usable."""
    learners = make(method), make(method, model=conv().cuda(), device="cuda")
    for found in zip(*(train(learner, images(8)) for learner in learners), strict=True):
        assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)
    for p, q in zip(learners[0].model.parameters(), learners[1].model.parameters(), strict=True):
        torch.testing.assert_close(p, q.cpu(), rtol=1e-4, atol=1e-6)
    assert held(learners[0].buffer)["position"].tolist() == held(learners[1].buffer)["position"].tolist()
    (x, y), *_ = images(1, seed=1)
    with pytest.raises(ArgumentError, match="a label of the batch is 7"):
        learners[1].step(x, y * 0 + 7)
    with pytest.raises(LossError):
        learners[1].step(x * float("nan"), y)
    learners[1].step(x, y)
    assert learners[1].buffer.seen == 54


# -- transforms --------------------------------------------------------------------------------------------------------


def test_transforms():
    """The stream's are called for each sample before the model, the replay's anew for each draw; what is stored is raw; logits are
    those of the transformed batch."""
    model = dense()
    calls = {"x": 0, "y": 0, "old x": 0, "old y": 0}
    passes = []
    model.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].clone()))

    def counted(name, function):
        def transform(value):
            calls[name] += 1
            return function(value)

        return transform

    learner = DERLearner(
        model, sgd(model), ReservoirBuffer(30), beta=0.0, replay_batch_size=4,
        transform=counted("x", lambda x: 2 * x), target_transform=counted("y", lambda y: 2 - int(y)),
        buffer_transform=counted("old x", lambda x: x.numpy() + calls["old x"]), buffer_target_transform=counted("old y", lambda y: 2 - y),
    )  # fmt: skip
    targets = []
    learner.loss_fn = lambda outputs, y: targets.append(y) or torch.nn.functional.cross_entropy(outputs, y)
    stream = batches(3, 6)
    for x, y in stream:
        learner.step(x, y)
        assert torch.equal(targets[-1], 2 - y)
    assert calls == {"x": 18, "y": 18, "old x": 8, "old y": 8}
    assert all(torch.equal(p, 2 * x) for p, (x, _) in zip(passes[:2], stream, strict=False))
    (x_held, y_held), meta = learner.buffer.get(np.arange(18))
    assert np.array_equal(x_held, torch.cat([x for x, _ in stream])) and np.array_equal(y_held, torch.cat([y for _, y in stream]))
    replayed = passes[2] - torch.arange(1, 5)[:, None]  # the number of the call is what this transform adds
    assert all((replayed[i] - torch.from_numpy(x_held[:6])).abs().sum(1).min() < 1e-12 for i in range(4))
    np.testing.assert_allclose(meta["logits"][:6], dense()(2 * stream[0][0]).detach().numpy(), rtol=1e-5)


def test_float32_and_other_shapes():
    """Targets that are no classes, outputs of any shape: a denoising network with logit matching."""
    torch.manual_seed(0)
    model = torch.nn.Conv2d(1, 1, 3, padding=1)
    learner = DERLearner(model, sgd(model), ReservoirBuffer(20), loss_fn=torch.nn.functional.mse_loss)
    for _ in range(4):
        x = torch.randn(6, 1, 5, 5)
        step = learner.step(x, 0.5 * x)
    assert step.outputs.shape == (6, 1, 5, 5) and learner.buffer.get_metadata("logits").shape == (20, 1, 5, 5)


def test_every_buffer_will_do(tmp_path):
    """All stored fields and moves in a buffer that is a folder of parts."""
    learner = make("super", InfiniteBuffer(tmp_path / "parts", rows_per_part=16))
    train(learner, images(8))
    assert len(learner.buffer) == 48 and not learner.buffer.check()


def negative(y):
    return 2 - y


@pytest.mark.parametrize(
    "where", ["nowhere", "stream", "both, other dtype", "replay", "buffer", "targets", "replayed targets", "buffer's targets"]
)
def test_transforms_of_a_joint_pass(where):
    """Batch and draw in one pass: each of its own transforms, whichever there are, and of nobody else's."""
    model = dense()
    twice = {"stream": {"transform": lambda x: 2 * x, "buffer_transform": False}, "both, other dtype": {"transform": lambda x: x.double()}}
    twice |= {"replay": {"buffer_transform": lambda x: 2 * x}}
    twice |= {"targets": {"target_transform": negative, "buffer_target_transform": False}}
    twice |= {"replayed targets": {"buffer_target_transform": negative}}
    options = twice.get(where, {})
    of_buffer = {"buffer": {"transform": lambda x: 2 * x}, "buffer's targets": {"target_transform": negative}}.get(where, {})
    stored = torch.float32 if "dtype" in where else torch.float64
    buffer, twin = ReservoirBuffer(20, seed=1, **of_buffer), ReservoirBuffer(20, seed=1)
    passes, targets = [], []
    learner = ERLearner(model, sgd(model), buffer, alpha=None, replay_batch_size=6, **options)
    model.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].clone()))
    learner.loss_fn = lambda outputs, y: targets.append(y.clone()) or torch.nn.functional.cross_entropy(outputs, y)
    for i, (x, y) in enumerate(batches(3, 6)):
        x = x.to(stored)
        if i:
            (x_old, y_old), _ = twin.sample(6)
        twin.add((x, y))
        learner.step(x, y)
        assert torch.equal(passes[-1][:6], (2 * x if where == "stream" else x).double())
        assert torch.equal(targets[-1][:6], 2 - y if where == "targets" else y)
        if i:
            assert torch.equal(passes[-1][6:], torch.from_numpy(x_old * (2 if where in ("replay", "buffer") else 1)).double())
            assert targets[-1][6:].tolist() == (2 - y_old if where in ("replayed targets", "buffer's targets") else y_old).tolist()
    (x_kept, y_kept), _ = twin.get(twin.get_metadata("idx"))
    assert np.array_equal(held(learner.buffer)["y"], 2 - y_kept if where == "buffer's targets" else y_kept)
    assert np.array_equal(held(learner.buffer)["x"], 2 * x_kept if where == "buffer" else x_kept)
