"""The torch side: tensors out of buffers, transforms, DataLoader workers."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tensors import equal, held
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from leanreplay import ArgumentError, InfiniteBuffer, ModeError, ReservoirBuffer, RowError, SlidingWindowBuffer
from leanreplay.torch import BufferDataset, sample

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


def loaded(loader):
    """Everything a DataLoader of (x, y), meta gives, as arrays."""
    batches = list(loader)
    x, y = (torch.cat([b[0][i] for b in batches]) for i in (0, 1))
    meta = {k: torch.cat([b[1][k] for b in batches]) for k in batches[0][1]}
    assert x.dtype == torch.float32 and y.dtype == meta["idx"].dtype == meta["position"].dtype == torch.int64
    return x.numpy(), y.numpy(), *(meta[k].numpy() for k in sorted(meta))


# -- the room ----------------------------------------------------------------------------------------------------------


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


# -- tensors -----------------------------------------------------------------------------------------------------------


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
    inner, seen = first.view.sample, []
    monkeypatch.setattr(first.view, "sample", lambda *a, **k: seen.append(inner(*a, **k)) or seen[-1])
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


# -- transforms --------------------------------------------------------------------------------------------------------


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


# -- DataLoader --------------------------------------------------------------------------------------------------------


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
