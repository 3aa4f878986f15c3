"""Activations of a named layer: the right ones, whatever holds the samples, and a model left as it was."""

from __future__ import annotations

import collections
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

import leanreplay
from leanreplay import ArgumentError, HerdingSelection, ReservoirBuffer
from leanreplay.torch import BufferDataset, features


class Net(nn.Module):
    """Everything that a mode or a hook could be forgotten in."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.twice = nn.Linear(2, 2)
        self.unused = nn.Linear(1, 1)
        self.fc = nn.Linear(48, 2)
        self.pair = Pair()

    def forward(self, x):
        y = self.fc(self.body(x).flatten(1))
        return self.pair(self.twice(self.twice(y)))[0]


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net()
    model.body[1].running_mean.normal_()
    return model


@pytest.fixture
def x():
    return torch.from_numpy(np.random.default_rng(0).normal(size=(23, 1, 4, 4)).astype(np.float32))


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# -- what comes out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5, 23, 100, np.int64(7)])
def test_activations(net, x, batch_size):
    """Those of eval mode, (n, d) float32, flattened, in order."""
    net.eval()
    with torch.no_grad():
        conv = net.body[0](x).flatten(1)
        relu = torch.relu(net.body[1](net.body[0](x))).flatten(1)
        fc = net.fc(relu)
        whole = net(x)
    net.train()
    for layer, want in (("body.0", conv), ("body", relu), ("body.3", relu), ("fc", fc), ("", whole)):
        found = features(net, layer, x, batch_size, progress=False)
        assert type(found) is np.ndarray and found.dtype == np.float32 and found.shape == want.shape
        assert np.allclose(found, want.numpy(), atol=1e-5), layer


def test_next_layer_may_work_in_place(net, x):
    """body.1 comes before ReLU(inplace=True), which writes over what it gave."""
    assert (features(net, "body.1", x, progress=False) < 0).any()
    assert not (features(net, "body.2", x, progress=False) < 0).any()


def test_result_is_the_callers(net, x):
    """No gradients, no memory of the model or the data in it."""
    found = features(net, "fc", x, progress=False)
    again = found.copy()
    found[:] = 0
    assert np.array_equal(features(net, "fc", x, progress=False), again)

    class Same(nn.Module):
        def forward(self, x):
            return x

    data = x.clone()
    features(Same(), "", data, progress=False)[:] = 7
    assert torch.equal(data, x)


def test_a_buffer_of_bfloat16():
    """Its columns hold the bits of bfloat16, which are no inputs."""
    x = torch.linspace(-1, 1, 24).bfloat16().reshape(6, 4)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3)).bfloat16()
    with ReservoirBuffer(6) as buffer:
        buffer.add((x, torch.arange(6)))
        assert np.array_equal(features(model, "0", buffer, progress=False), features(model, "0", x, progress=False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = nn.Linear(3, 2).to(dtype)
    data = torch.ones(4, 3, dtype=dtype)
    found = features(model, "", data, progress=False)
    assert found.dtype == np.float32 and np.allclose(found, model(data).detach().float().numpy())


def test_shapes_of_activations():
    """(B,), (B, d) and (B, c, h, w) are all flattened to (B, d)."""

    class Shape(nn.Module):
        def __init__(self, shape):
            super().__init__()
            self.shape = shape

        def forward(self, x):
            return x.reshape(len(x), *self.shape)

    data = torch.arange(24.0).reshape(2, 12)
    for shape in ((12,), (3, 4), (2, 3, 2)):
        assert np.array_equal(features(Shape(shape), "", data, progress=False), data.numpy())
    assert features(Shape(()), "", data[:, :1], progress=False).shape == (2, 1)


def test_no_samples(net):
    for data in ([], torch.zeros(0, 1, 4, 4), np.zeros((0, 1, 4, 4)), ReservoirBuffer(5)):
        found = features(net, "fc", data)
        assert found.shape == (0, 0) and found.dtype == np.float32
    assert HerdingSelection(net, "fc").sorted_indices_of([]).tolist() == []


# -- what goes in ------------------------------------------------------------------------------------------------------


class Lone(Dataset):
    """len and [i] only."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        if not 0 <= i < len(self.samples):
            raise IndexError(i)
        return self.samples[i]


def test_kinds_of_data(net, x):
    """Arrays, tensors, datasets of inputs, of pairs, of pairs in pairs; NumPy or torch; Subset; buffers."""
    want = features(net, "fc", x, progress=False)
    y = torch.arange(23)
    named = collections.namedtuple("named", "x y")
    buffer = ReservoirBuffer(50)
    buffer.add((x, y))
    read_only = x.numpy().copy()
    read_only.setflags(write=False)
    kinds = {
        "array": x.numpy(),
        "read-only array": read_only,
        "backwards": x.numpy()[::-1].copy()[::-1],
        "list of tensors": list(x),
        "list of arrays": list(x.numpy()),
        "pairs": list(zip(x, y, strict=True)),
        "lists": [[a, b] for a, b in zip(x.numpy(), y.tolist(), strict=True)],
        "triples": [(a, 1, 2) for a in x],
        "singles": [(a,) for a in x],
        "named": [named(a, 0) for a in x],
        "nested": [((a, 1), {"position": 3}) for a in x],
        "dataset": Lone(x),
        "TensorDataset": TensorDataset(x, y),
        "Subset": Subset(TensorDataset(torch.cat([x, x]), torch.cat([y, y])), list(range(23))),
        "buffer": buffer,
        "BufferDataset": BufferDataset(buffer),
        "BufferDataset with metadata": BufferDataset(buffer, metadata=True),
    }
    for name, data in kinds.items():
        assert np.allclose(features(net, "fc", data, 5, progress=False), want, atol=1e-6), name


def test_inputs_stay_as_they_are():
    """Dtypes come to the transform, or the model, unchanged; numbers become tensors."""
    seen = []

    class Look(nn.Module):
        def forward(self, x):
            seen.append((x.dtype, tuple(x.shape)))
            return x.float()

    model = Look()
    for data, dtype, shape in (
        (np.zeros((2, 3), np.uint8), torch.uint8, (2, 3)),
        (np.zeros((2, 3)), torch.float64, (2, 3)),
        ([(np.int64(1), 0), (np.int64(2), 0)], torch.int64, (2,)),
        ([1.5, 2.5], torch.float64, (2,)),
        ([True, False], torch.bool, (2,)),
        (torch.zeros(2, 3, dtype=torch.bfloat16), torch.bfloat16, (2, 3)),
    ):
        features(model, "", data, progress=False)
        assert seen.pop() == (dtype, shape)
    images = np.full((4, 3), 255, np.uint8)
    found = features(model, "", images, 3, transform=lambda x: x.float() / 255, progress=False)
    assert np.array_equal(found, np.ones((4, 3))) and [s for _, s in seen] == [(3, 3), (1, 3)] and seen[0][0] == torch.float32


def test_device(net, x):
    """Inputs go to the model's device, or to the one given."""
    meta = torch.device("meta")
    with pytest.raises(NotImplementedError):  # a meta tensor has no values to come back
        features(nn.Linear(3, 2, device=meta), "", torch.zeros(2, 3), progress=False)
    moved = []
    features(net, "fc", x, transform=lambda b: moved.append(b.device) or b, device="cpu", progress=False)
    assert moved == [torch.device("cpu")]
    with pytest.raises((RuntimeError, NotImplementedError)):
        features(net, "fc", x, device=meta, progress=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu(net, x):
    want = features(net, "fc", x, progress=False)
    net.cuda()
    assert np.allclose(features(net, "fc", x, progress=False), want, atol=1e-4)
    assert np.allclose(features(net, "fc", x.cuda(), progress=False), want, atol=1e-4)
    assert HerdingSelection(net, "fc").sorted_indices(torch.from_numpy(want).cuda()).shape == (23,)


# -- the model stays as it was -----------------------------------------------------------------------------------------


def test_modes_come_back(net, x):
    """The mode of each module by itself, the running statistics, the gradients' switch, random numbers, and no hook."""
    net.train()
    net.body[1].eval()
    net.pair.eval()
    modes = [m.training for m in net.modules()]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    seed = torch.get_rng_state()
    features(net, "body.3", x, progress=False)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), seed)
    modes = []
    features(net, "fc", x, transform=lambda b: modes.append((net.training, torch.is_grad_enabled())) or b, progress=False)
    assert modes == [(False, False)]
    assert hooks(net) == 0


class Stop(Exception):
    pass


@pytest.mark.parametrize("where", ["data", "transform", "model", "layer"])
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_modes_come_back_after_an_exception(net, x, where, error):
    """Whatever raises, and in the second batch."""
    calls = []

    def fail(*args):
        calls.append(1)
        if len(calls) > 1:
            raise error

    class Data(Lone):
        def __getitem__(self, i):
            if i >= 10:
                raise error
            return super().__getitem__(i)

    net.body[3].eval()
    modes = [m.training for m in net.modules()]
    handle = {"model": net.body, "layer": net.fc}.get(where, net.unused).register_forward_pre_hook(fail)
    data = Data(x) if where == "data" else x
    with pytest.raises(error):
        features(net, "fc", data, 10, transform=(lambda b: fail() or b) if where == "transform" else None, progress=False)
    handle.remove()
    assert [m.training for m in net.modules()] == modes and hooks(net) == 0 and torch.is_grad_enabled()


def test_hooks_of_others_stay(net, x):
    seen = []
    net.fc.register_forward_hook(lambda *args: seen.append(1))
    features(net, "fc", x, 10, progress=False)
    assert len(seen) == 3 and hooks(net) == 1


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_unknown_layer(net, x):
    for layer in ("fc2", "body.9", None, 3, "fc.", "body.0.weight"):
        with pytest.raises(ArgumentError, match=r"Net has no layer .*; it has: body, body\.0, .*fc, pair"):
            features(net, layer, x)
    with pytest.raises(ArgumentError, match="it has: none"):
        features(nn.ReLU(), "0", x)
    with pytest.raises(ArgumentError, match="and 80 more"):
        features(nn.Sequential(*[nn.ReLU() for _ in range(100)]), "x", x)
    for model in (None, lambda x: x, nn.Linear):
        with pytest.raises(ArgumentError, match=r"must be a torch\.nn\.Module"):
            features(model, "fc", x)


@pytest.mark.parametrize(
    ("layer", "words"),
    [("twice", "ran 2 times"), ("unused", "ran 0 times"), ("pair", "gives a tuple")],
)
def test_layers_that_will_not_do(net, x, layer, words):
    modes = [m.training for m in net.modules()]
    with pytest.raises(ArgumentError, match=words):
        features(net, layer, x, progress=False)
    assert [m.training for m in net.modules()] == modes and hooks(net) == 0


def test_outputs_that_will_not_do():
    class Gives(nn.Module):
        def __init__(self, f):
            super().__init__()
            self.f = f

        def forward(self, x):
            return self.f(x)

    x = torch.arange(12.0).reshape(4, 3)
    for f, words in (
        (lambda x: x.sum(), r"gives shape \(\) for 4 samples"),
        (lambda x: x[:2], r"gives shape \(2, 3\) for 4 samples, expected \(4, \.\.\.\)"),
        (lambda x: x.T, r"gives shape \(3, 4\)"),
        (lambda x: {"a": x}, "gives a dict"),
        (lambda x: x.to(torch.complex64), "real numbers"),
        (lambda x: None, "gives a NoneType"),
    ):
        with pytest.raises(ArgumentError, match=words):
            features(Gives(f), "", x, progress=False)
    samples = [torch.zeros(3), torch.zeros(4)]
    with pytest.raises(ArgumentError, match="gave 3 features a sample, but 4 from sample 1 on"):
        features(nn.ReLU(), "", samples, 1, progress=False)


def test_data_that_will_not_do(net):
    for data, words in (
        (5, "map-style dataset with len"),
        (iter([1]), "map-style dataset with len"),
        ({"x": torch.zeros(2)}, "data is a dict"),
        ([{"image": 1, "label": 2}], r"sample 0 is a dict with keys image, label: which is the input"),
        ([({"image": 1}, 2)], "sample 0 is a dict"),
        ([torch.zeros(1), ()], "sample 1 is empty"),
        (["text"], "input 0: str cannot become a tensor"),
        ([(None, 1)], "input 0: NoneType cannot become a tensor"),
        ([np.zeros(2), np.zeros(3)], "inputs 0 to 1 cannot be stacked"),
    ):
        with pytest.raises(ArgumentError, match=words):
            features(net, "fc", data, progress=False)
    for size in (0, -1, 1.5, True, "8", None):
        with pytest.raises(ArgumentError, match="batch_size must be an integer"):
            features(net, "fc", [torch.zeros(1, 4, 4)], size)
    with pytest.raises(TypeError):
        features(net, "fc", [torch.zeros(1, 4, 4)], 1, "cpu")  # keyword-only


# -- the bar -----------------------------------------------------------------------------------------------------------


def test_progress(net, x, capsys, monkeypatch):
    """On stderr with tqdm, nothing without or if not wanted."""
    pytest.importorskip("tqdm")
    want = features(net, "fc", x, 5, progress=False)
    assert capsys.readouterr() == ("", "")
    assert np.array_equal(features(net, "fc", x, 5), want)
    out, err = capsys.readouterr()
    assert out == "" and "23/23" in err and "features" in err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert np.array_equal(features(net, "fc", x, 5), want)
    assert capsys.readouterr() == ("", "")


# -- with buffers ------------------------------------------------------------------------------------------------------


def test_strategy_shows_no_bar(net, x, capsys):
    strategy = HerdingSelection(net, "fc", batch_size=4)
    order = strategy.sorted_indices_of([(a, 0) for a in x], 6)
    assert order.tolist() == strategy.sorted_indices(features(net, "fc", x, 4, progress=False), 6).tolist()
    assert capsys.readouterr() == ("", "")


def test_public():
    assert "features" in leanreplay.torch.__all__ and leanreplay.torch.features is features
