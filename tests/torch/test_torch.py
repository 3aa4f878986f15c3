"""The torch side: tensors out of buffers, DataLoader workers, experience replay."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset

import leanreplay
from leanreplay import ArgumentError, InfiniteBuffer, LeanReplayError, ModeError, ReservoirBuffer, RowError, SlidingWindowBuffer, StateError
from leanreplay.errors import LossError
from leanreplay.torch import BufferDataset, ERLearner, sample

pytestmark = pytest.mark.usefixtures("kernels")
WORKERS = [
    pytest.param({"num_workers": 0}, id="0"),
    pytest.param({"num_workers": 2, "multiprocessing_context": "fork"}, id="fork"),
    pytest.param({"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True}, id="fork-persistent"),
    pytest.param({"num_workers": 2, "multiprocessing_context": "forkserver", "persistent_workers": True}, id="forkserver-persistent"),
]  # a fork server hands over what a spawned process would be sent, but has torch imported already
FORK, FORKSERVER = (pytest.param({"num_workers": 1, "multiprocessing_context": c}, id=c) for c in ("fork", "forkserver"))


def batch(start, n):
    """x[i] holds only the number y[i], so that a torn or misplaced row shows."""
    y = np.arange(start, start + n)
    return np.repeat(y[:, None], 5, 1).astype(np.float32), y


def held(buffer):
    """All samples and metadata in row order, as arrays."""
    (x, y), meta = buffer.get(buffer.get_metadata("idx"))
    return x, y, *(meta[k] for k in sorted(meta))


def same(a, b):
    return all(p.dtype == q.dtype and p.shape == q.shape and p.tobytes() == q.tobytes() for p, q in zip(held(a), held(b), strict=True))


def loaded(loader):
    """Everything a DataLoader of (x, y), meta gives, as arrays."""
    batches = list(loader)
    x, y = (torch.cat([b[0][i] for b in batches]) for i in (0, 1))
    meta = {k: torch.cat([b[1][k] for b in batches]) for k in batches[0][1]}
    assert x.dtype == torch.float32 and y.dtype == meta["idx"].dtype == meta["position"].dtype == torch.int64
    return x.numpy(), y.numpy(), *(meta[k].numpy() for k in sorted(meta))


def equal(a, b):
    return all(np.array_equal(p, q, equal_nan=True) for p, q in zip(a, b, strict=True))


# -- the room --------------------------------------------------------------------------------------------------------------


def test_core_without_torch():
    """G8: nothing that a buffer does imports torch."""
    code = (
        "import sys, numpy as np, leanreplay\n"
        "b = leanreplay.ReservoirBuffer(5)\n"
        "b.add((np.zeros((9, 2)), np.arange(9)), metadata={'z': np.zeros(9)})\n"
        "b.sample(3), b[0], b.state_dict(), b.check()\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- tensors -----------------------------------------------------------------------------------------------------------------

LEAVES = ["uint8", "int16", "int32", "int64", "float16", "float32", "float64", "bool", "complex64"]


@pytest.mark.parametrize("dtype", LEAVES)
@pytest.mark.parametrize("shape", [(), (3, 2)])
def test_dtypes(dtype, shape):
    """Tensors keep dtype, shape and bits, one by one, collated, and sampled; scalars too."""
    values = np.random.default_rng(0).integers(0, 2, (6, *shape)).astype(dtype)
    buffer = SlidingWindowBuffer(6)
    buffer.add({"a": [values, np.arange(6)]}, metadata={"m": values})
    dataset = BufferDataset(buffer, metadata=True)
    item, meta = dataset[2]
    assert list(item) == ["a"] and type(item["a"]) is list and sorted(meta) == ["idx", "m", "position"]
    for tensor in (item["a"][0], meta["m"]):
        assert tensor.dtype == getattr(torch, dtype) and tensor.shape == shape and np.array_equal(tensor.numpy(), values[2])
    collated, metas = next(iter(DataLoader(dataset, batch_size=6)))
    for tensor in (collated["a"][0], metas["m"]):
        assert tensor.dtype == getattr(torch, dtype) and np.array_equal(tensor.numpy(), values)
    drawn, meta = sample(buffer, 4)
    assert type(drawn["a"]) is list and np.array_equal(drawn["a"][0].numpy(), values[meta["idx"].numpy()])
    assert drawn["a"][0].dtype == meta["m"].dtype == getattr(torch, dtype) and meta["idx"].dtype == torch.int64


def test_bfloat16():
    """torch.bfloat16 comes back bit for bit, NaN and infinity included, in data and metadata, however it is read."""
    z = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    z[0, 0], z[1, 1], z[2, 2] = float("nan"), float("inf"), -0.0
    w = torch.arange(8).bfloat16()
    buffer = SlidingWindowBuffer(8)
    buffer.add((z, w), metadata={"logits": 2 * z, "bits": torch.arange(8, dtype=torch.int16)})
    (a, b), meta = sample(buffer, 8)
    for got, wanted in ((a, z), (b, w), (meta["logits"], 2 * z)):
        assert got.dtype == torch.bfloat16
        assert torch.equal(got.view(torch.int16), wanted[meta["idx"]].view(torch.int16))
    assert meta["bits"].dtype == torch.int16
    (a, b), meta = BufferDataset(buffer, metadata=True)[1]
    assert a.dtype == b.dtype == meta["logits"].dtype == torch.bfloat16 and b.shape == () and torch.equal(a.isinf(), z[1].isinf())
    a, b = next(iter(DataLoader(BufferDataset(buffer), batch_size=8)))
    assert torch.equal(a.view(torch.int16), z.view(torch.int16)) and torch.equal(b, w)
    buffer.add((a, b), metadata={"logits": z, "bits": torch.zeros(8, dtype=torch.int16)})  # and what came out goes in again


def test_bytes_stay():
    """Fixed-width bytes are no tensors: they come as NumPy's."""
    buffer = SlidingWindowBuffer(3)
    buffer.add((np.array([b"ab", b"c", b"def"], "S3"), np.arange(3)), metadata={"words": np.array([[b"x", b"y"]] * 3, "S1")})
    text, label = next(iter(DataLoader(BufferDataset(buffer), batch_size=3)))
    assert list(text) == [b"ab", b"c", b"def"] and torch.equal(label, torch.arange(3))
    (texts, _), meta = sample(buffer, 3)
    assert isinstance(texts, np.ndarray) and isinstance(meta["words"], np.ndarray) and meta["words"].shape == (3, 2)


def test_sample_is_the_buffers_sample_and_shares_its_memory(monkeypatch):
    """sample() draws what buffer.sample draws, and copies nothing on the CPU."""
    first, second = (ReservoirBuffer(50, seed=3) for _ in range(2))
    for buffer in (first, second):
        buffer.add(batch(0, 200), metadata={"z": np.ones((200, 2))})
    inner, seen = first._sample, []
    monkeypatch.setattr(first, "_sample", lambda *a, **k: seen.append(inner(*a, **k)) or seen[-1])
    for replace in (False, True):
        (x, y), meta = sample(first, 10, replace=replace)
        (xs, ys), metas = second.sample(10, replace)
        assert equal((x, y, meta["z"], meta["idx"], meta["position"]), (xs, ys, metas["z"], metas["idx"], metas["position"]))
        arrays, array_meta = seen[-1]
        assert [x.data_ptr(), y.data_ptr()] == [a.ctypes.data for a in arrays]
        assert all(meta[k].data_ptr() == array_meta[k].ctypes.data for k in meta)
    assert len(sample(first, 60, replace=True)[1]["idx"]) == 60


def test_sample_moves_to_the_device():
    """Every tensor, metadata too, goes to `device`."""
    buffer = ReservoirBuffer(5)
    buffer.add(batch(0, 5), metadata={"z": torch.zeros(5, 2, dtype=torch.bfloat16)})
    (x, y), meta = sample(buffer, 3, device="meta")
    assert {t.device.type for t in (x, y, *meta.values())} == {"meta"} and meta["z"].dtype == torch.bfloat16


def test_bad_calls():
    """Errors of our own."""
    buffer = ReservoirBuffer(5)
    with pytest.raises(ArgumentError, match="takes a buffer"):
        BufferDataset([1, 2])
    with pytest.raises(ArgumentError, match="add samples first"):
        sample(buffer, 1)
    assert len(BufferDataset(buffer)) == 0
    buffer.add(batch(0, 3))
    dataset = BufferDataset(buffer)
    with pytest.raises(ArgumentError, match="draw at most 3"):
        sample(buffer, 4)
    for i in (3, -4):
        with pytest.raises(RowError, match="buffer of 3"):
            dataset[i]
    assert [int(y) for _, y in dataset] == [0, 1, 2] and int(dataset[-1][1]) == 2  # an IndexError ends iteration
    with pytest.raises(ArgumentError, match="integer"):
        dataset["x"]


# -- transforms --------------------------------------------------------------------------------------------------------------


def flip(x):
    assert x.shape == (5,) and isinstance(x, torch.Tensor), "a transform gets the tensor of one sample"
    return (x.numpy() + np.arange(5))[::-1]  # negative strides, which torch refuses


def to_name(y):
    return f"class {int(y)}"


def test_transforms_per_sample():
    """Transforms see one sample at a time, on reading only; what they make of it may be an array, a tensor or anything else."""
    calls = []

    def transform(x):
        calls.append(x.shape)
        assert isinstance(x, torch.Tensor)
        return x * 2

    buffer = ReservoirBuffer(8, transform=transform, target_transform=lambda y: int(y) + 100)
    buffer.add(batch(0, 8))
    assert not calls
    x, y = BufferDataset(buffer)[3]
    assert torch.equal(x, torch.full((5,), 6.0)) and y == 103 and calls == [(5,)]
    x, y = next(iter(DataLoader(BufferDataset(buffer), batch_size=8)))
    assert torch.equal(x[:, 0], 2.0 * torch.arange(8)) and torch.equal(y, torch.arange(100, 108)) and len(calls) == 9
    (x, y), meta = sample(buffer, 4)
    assert isinstance(x, torch.Tensor) and torch.equal(x[:, 0], 2.0 * meta["position"]) and torch.equal(y, 100 + meta["position"])
    assert len(calls) == 13 and set(calls) == {(5,)}
    assert buffer.schema is not None and np.array_equal(buffer.get_metadata("position"), np.arange(8))


@pytest.mark.parametrize("workers", [WORKERS[0], FORK, FORKSERVER])
def test_transforms_in_workers(workers, tmp_path):
    """Transforms go along to the workers."""
    buffer = SlidingWindowBuffer(8, tmp_path / "b.h5", transform=flip, target_transform=to_name)
    buffer.add(batch(0, 8))
    (x, y) = next(iter(DataLoader(BufferDataset(buffer), batch_size=8, **workers)))
    assert list(y) == [f"class {i}" for i in range(8)] and torch.equal(x, torch.arange(8.0)[:, None] + torch.arange(4.0, -1, -1))


def test_bfloat16_beside_a_transform():
    """A transform of one element leaves the other one's dtype alone."""
    buffer = SlidingWindowBuffer(4, transform=lambda x: np.float32(x).mean())
    buffer.add((np.ones((4, 2)), torch.arange(4).bfloat16()))
    for x, y in (BufferDataset(buffer)[1], sample(buffer, 4)[0]):
        assert x.dtype == torch.float32 and y.dtype == torch.bfloat16


# -- DataLoader ----------------------------------------------------------------------------------------------------------------


def make_buffer(where, path):
    if where == "parts":
        return InfiniteBuffer(path / "parts", rows_per_part=16)
    return SlidingWindowBuffer(40, path / "b.h5" if where == "disk" else None)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("where", ["disk", "ram", "parts"])
def test_data_loader_sees_commits(where, workers, tmp_path):
    """Workers of every kind read what the buffer holds now: samples added or overwritten, set_metadata, a rollback, in old workers too."""
    with make_buffer(where, tmp_path) as buffer:
        buffer.add(batch(0, 20), metadata={"z": np.arange(20.0)})
        loader = DataLoader(BufferDataset(buffer, metadata=True), batch_size=7, **workers)
        plain = DataLoader(BufferDataset(buffer), batch_size=7)
        assert len(loader) == 3 and equal(loaded(loader), held(buffer))
        state = buffer.state_dict()
        for start in (20, 45):  # a window of 40: first more rows (and parts), then others in the same rows
            buffer.add(batch(start, 25), metadata={"z": -np.arange(25.0)})
            assert len(loader.dataset) == len(buffer) and equal(loaded(loader), held(buffer)), f"after {start}"
        assert loaded(loader)[1].max() == 69
        buffer.set_metadata("z", np.arange(len(buffer)) + 0.5)
        assert equal(loaded(loader), held(buffer))
        buffer.load_state_dict(state)
        assert len(loader) == 3 and equal(loaded(loader), held(buffer)) and torch.equal(torch.cat([y for _, y in plain]), torch.arange(20))
        assert not buffer.check()


def test_spawned_workers(tmp_path):
    """Files and shared memory are opened anew by spawned workers; a resize of the latter in the meantime is an error that says so."""
    buffer = ReservoirBuffer(10)
    dataset = BufferDataset(buffer)
    with pytest.raises(ModeError, match="first batch"):
        next(iter(DataLoader(dataset, num_workers=1, multiprocessing_context="forkserver")))
    buffer.add(batch(0, 8))
    with ReservoirBuffer(10, tmp_path / "b.h5") as on_disk:
        on_disk.add(batch(8, 8))
        both = ConcatDataset([dataset, BufferDataset(on_disk)])
        loader = DataLoader(both, batch_size=16, num_workers=1, multiprocessing_context="spawn", persistent_workers=True)
        assert torch.equal(next(iter(loader))[1], torch.arange(16))
    buffer.resize(4)
    with pytest.raises(ModeError, match="resized"):
        next(iter(loader))


def test_resize_on_disk_is_followed(tmp_path):
    """Workers notice the new file of a resize or a new metadata field."""
    with SlidingWindowBuffer(40, tmp_path / "b.h5") as buffer:
        buffer.add(batch(0, 40))
        loader = DataLoader(BufferDataset(buffer, metadata=True), batch_size=7, **WORKERS[2].values[0])
        assert equal(loaded(loader), held(buffer))
        buffer.resize(15)
        assert equal(loaded(loader), held(buffer)) and len(loader) == 3
        buffer.set_metadata("z", np.arange(15.0))
        assert equal(loaded(loader), held(buffer))


@pytest.mark.parametrize("where", ["disk", "ram"])
def test_reading_while_writing(where, tmp_path):
    """Items read while the same rows are being overwritten are whole: old or new, never a mixture."""
    with make_buffer(where, tmp_path) as buffer:
        buffer.add(batch(0, 40), metadata={"z": np.arange(40.0)})
        loader = DataLoader(BufferDataset(buffer, metadata=True), batch_size=4, **WORKERS[2].values[0])
        start, seen = 40, set()
        for _ in range(15):
            for (x, y), meta in loader:
                assert (x == y[:, None]).all() and torch.equal(y, meta["position"]) and torch.equal(meta["z"], y.double())
                seen |= set(y.tolist())
                for _ in range(5):
                    buffer.add(batch(start, 13), metadata={"z": np.arange(start, start + 13.0)})
                    start += 13
        assert len(seen) > 300


class Writes(Dataset):
    """Tries to write from wherever it is read."""

    def __init__(self, buffer):
        self.buffer = buffer

    def __len__(self):
        return 4

    def __getitem__(self, i):
        assert len(self.buffer) == 3
        outcomes = []
        for write in (
            lambda: self.buffer.add(batch(90, 5)),
            lambda: self.buffer.set_metadata("z", np.zeros(3)),
            lambda: self.buffer.resize(2),
            lambda: self.buffer.state_dict(),
        ):
            try:
                write()
                outcomes.append("written")
            except ModeError as error:
                outcomes.append("reading only" if "open for reading only" in str(error) else str(error))
            except Exception as error:
                outcomes.append(repr(error))
        return [os.getpid(), *outcomes]


@pytest.mark.parametrize("workers", [FORK, FORKSERVER])
@pytest.mark.parametrize("where", ["disk", "ram"])
def test_workers_cannot_write(where, workers, tmp_path):
    """One writer: in a worker every way of writing is a ModeError, the buffer is unchanged, and its own process goes on writing."""
    with make_buffer(where, tmp_path) as buffer:
        buffer.add(batch(0, 3))
        before = held(buffer)
        for pid, *outcomes in DataLoader(Writes(buffer), batch_size=None, **workers):
            assert pid != os.getpid() and outcomes == ["reading only"] * 4
        assert equal(held(buffer), before) and buffer.seen == 3
        buffer.add(batch(3, 3))
        assert len(buffer) == 6 and not buffer.check()


def test_shuffled_epoch_holds_everything_once(tmp_path):
    """An ordinary shuffled DataLoader over a reservoir on disk: every held sample once, in a pinned generator's order."""
    buffer = ReservoirBuffer(50, tmp_path / "b.h5", seed=1)
    buffer.add(batch(0, 300))
    orders = []
    for workers in (0, 2):
        generator = torch.Generator().manual_seed(0)
        loader = DataLoader(BufferDataset(buffer), batch_size=8, shuffle=True, generator=generator, num_workers=workers)
        orders.append(torch.cat([y for _, y in loader]).tolist())
    assert orders[0] == orders[1] and sorted(orders[0]) == sorted(buffer.get_metadata("position").tolist())
    assert orders[0] != sorted(orders[0])


# -- experience replay ---------------------------------------------------------------------------------------------------------

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


# -- state ---------------------------------------------------------------------------------------------------------------------


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
