"""What would be a raw error of torch's or Python's, or none: labels, dtypes, compiled models, misspelt options, no torch at all."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
import torch
from learner_oracle import batches, dense, sgd

import leanreplay
from leanreplay import ArgumentError, DependencyError, ReservoirBuffer
from leanreplay.torch import (
    AsyncReservoir,
    BufferDataset,
    CLSLearner,
    DERLearner,
    ERLearner,
    InterleavedSampler,
    InterleavedSamplerConfig,
    MixedLoader,
    PODLearner,
    ReplayLearner,
    ReplayLoader,
    ReplayLoss,
    ShuffleSampler,
    SuperERLearner,
    evaluate,
    features,
    fit,
    sample,
)

METHODS = {
    "er": (ERLearner, {}),
    "der": (DERLearner, {}),
    "pod": (PODLearner, {"layers": ["0"], "distillation_type": "pixel"}),
    "plain": (ReplayLearner, {"terms": [ReplayLoss()]}),
}


def segmentation(method, **options):
    torch.manual_seed(0)
    kind, defaults = METHODS[method]
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 1))
    return kind(model, torch.optim.SGD(model.parameters(), 0.1), ReservoirBuffer(20), **{**defaults, **options})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("own", [False, True])
def test_segmentation_labels_out_of_range(method, own):
    """The label, the classes and the way out; also if torch's loss is called by a function of one's own; nothing is stored."""
    loss_fn = {"loss_fn": lambda outputs, y: torch.nn.functional.nll_loss(outputs.log_softmax(1), y)} if own else {}
    learner = segmentation(method, **loss_fn)
    x, y = torch.rand(6, 3, 5, 5), torch.randint(0, 4, (6, 5, 5))
    learner.step(x, y)
    weights = [p.clone() for p in learner.model.parameters()]
    y = y.clone()
    y[0] = 255
    message = (
        "Target 255 is out of bounds.: a label is no class" if own else "a label of the batch is 255, but the model has 4 .*ignore_index"
    )
    with pytest.raises(ArgumentError, match=message):
        learner.step(x, y)
    assert learner.buffer.seen == 6 and not learner.pending and all(map(torch.equal, weights, learner.model.parameters()))
    ignoring = segmentation(method, loss_fn=torch.nn.CrossEntropyLoss(ignore_index=255))
    for _ in range(2):
        ignoring.step(x, y)
    with pytest.raises(ArgumentError, match="a label of the batch is 4, but the model has 4"):
        ignoring.step(x, torch.where(y == 255, 255, y + 1))


OWN = {
    "margins": torch.nn.functional.multi_margin_loss,
    "one_hot": lambda outputs, y: torch.nn.functional.mse_loss(outputs, torch.nn.functional.one_hot(y, 3).double()),
    "gather": lambda outputs, y: -outputs.log_softmax(1).gather(1, y[:, None]).mean(),
}


@pytest.mark.parametrize("loss", OWN)
def test_labels_out_of_range_in_other_losses(loss):
    """Which torch says in many ways."""
    model, (x, y) = dense(), batches(1, 6)[0]
    learner = ERLearner(model, sgd(model), ReservoirBuffer(20), loss_fn=OWN[loss])
    learner.step(x, y)
    with pytest.raises(ArgumentError, match="a label of the batch is 7, but the model has 3 outputs"):
        learner.step(x, y.where(y != 0, 7))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without such a device")
def test_devices_that_are_not_there():
    """Refused when they are named, not in the first step."""
    model, (x, y) = dense(), batches(1, 6)[0]
    for use in (
        lambda: ERLearner(model, sgd(model), ReservoirBuffer(9), device="cuda"),
        lambda: evaluate(model, [(x, y)], device="cuda"),
    ):
        with pytest.raises(ArgumentError, match="device: "):
            use()


def test_nested_tensors():
    """Samples of several shapes make no batch."""
    model = dense()
    for options in ({}, {"layout": torch.jagged}):
        nested = torch.nested.nested_tensor([torch.rand(4), torch.rand(3)], **options)
        with pytest.raises(ArgumentError, match="samples of one shape, got a nested tensor; pad it"):
            ERLearner(model, sgd(model), ReservoirBuffer(9)).step(nested, torch.arange(2))


def test_labels_of_replayed_images():
    """It is said that they come from the buffer."""
    learner = segmentation("er", store=False)
    learner.buffer.add((np.random.rand(9, 3, 5, 5).astype("f4"), np.full((9, 5, 5), 7)))
    with pytest.raises(ArgumentError, match="a label of the replayed samples is 7"):
        learner.step(torch.rand(6, 3, 5, 5), torch.zeros(6, 5, 5).long())


def test_a_dtype_that_torch_lacks(monkeypatch):
    """Before version 2.3 torch had no uint16: the field, the dtype and the way out, wherever a buffer is read."""
    buffer = ReservoirBuffer(9)
    buffer.add((np.ones((9, 4), np.uint16), np.arange(9) % 3))
    inner = torch.from_numpy

    def from_numpy(array):
        if array.dtype == np.uint16:
            raise TypeError("can't convert np.ndarray of type numpy.uint16")
        return inner(array)

    monkeypatch.setattr(torch, "from_numpy", from_numpy)
    model = dense()
    learner = ERLearner(model, sgd(model), buffer, store=False)
    for read in (lambda: sample(buffer, 3), lambda: BufferDataset(buffer)[0], lambda: learner.step(*batches(1, 6)[0])):
        with pytest.raises(ArgumentError, match=r"data/0: torch .* has no uint16; upgrade torch, or convert"):
            read()


# -- StopIteration -------------------------------------------------------------------------------------------------------------


class Ends:
    """A data set of pairs; sample `at` raises StopIteration, as `next` of an iterator does that is exhausted."""

    def __init__(self, at=7):
        self.at = at

    def __len__(self):
        return 12

    def __getitem__(self, i):
        if i == self.at:
            next(iter(()))
        return torch.full((4,), float(i)).double(), i % 3


def ends(value):
    """A transform, collate function or the like that comes to its end."""
    raise StopIteration


def loops():
    """Loops over user's functions that come to an end, each of which would end in silence or as an error of another kind."""
    full, bad = ReservoirBuffer(20), ReservoirBuffer(20, transform=ends)
    for buffer in (full, bad):
        buffer.add(batches(1, 12)[0])
    model, pairs = dense(), [Ends(99)[i] for i in range(12)]
    learner = ERLearner(model, sgd(model), ReservoirBuffer(20))
    interleaved = InterleavedSamplerConfig(batch_size=4, max_epochs=1)
    endless = dense()
    endless.register_forward_hook(lambda module, inputs, outputs: ends(outputs))

    def through(dataset, collator=None):
        return InterleavedSampler(ShuffleSampler(dataset, seed=0), interleaved, train_collator=collator).get_data_loader(num_workers=0)

    return {
        "DataLoader": lambda: list(torch.utils.data.DataLoader(BufferDataset(bad), batch_size=4)),
        "BufferDataset": lambda: list(torch.utils.data.DataLoader(BufferDataset(full, batch_transform=ends), batch_size=4)),
        "ReplayLoader": lambda: list(ReplayLoader(bad, 4, batches=2)),
        "MixedLoader": lambda: list(MixedLoader([batches(1, 6)[0]], bad, 4)),
        "MixedLoader, batch": lambda: list(MixedLoader([batches(1, 6)[0]], full, 4, batch_transform=ends)),
        "model": lambda: list(map(ERLearner(endless, sgd(endless), ReservoirBuffer(9)).step, *zip(*batches(3, 6), strict=True))),
        "loss_fn": lambda: ERLearner(model, sgd(model), ReservoirBuffer(9), loss_fn=lambda outputs, y: ends(y)).step(*batches(1, 6)[0]),
        "fit": lambda: fit(learner, Ends(), progress=False),
        "fit, collate": lambda: fit(learner, pairs, progress=False, train_collate_fn=ends),
        "fit, validation": lambda: fit(learner, pairs, val_dataset=Ends(), progress=False),
        "fit, transform": lambda: fit(learner, pairs, val_dataset=pairs, test_transform=ends, progress=False),
        "evaluate": lambda: evaluate(model, [pairs, Ends()]),
        "evaluate, target": lambda: evaluate(model, [pairs], target_transform=ends),
        "InterleavedSampler": lambda: list(through(Ends())),
        "InterleavedSampler, collator": lambda: list(through(pairs, ends)),
        "AsyncReservoir": lambda: list(AsyncReservoir([1, 2, 3], float, 4, workers=1, executor="thread", collate_fn=ends)),
        "learner": lambda: ERLearner(model, sgd(model), bad).step(*batches(1, 6)[0]),
        "learner, transform": lambda: ERLearner(model, sgd(model), full, transform=ends).step(*batches(1, 6)[0]),
    }


@pytest.mark.parametrize("where", loops())
def test_what_comes_to_its_end(where):
    """StopIteration from a user's function is an error that names it, and ends no loop in silence."""
    with pytest.raises(ArgumentError, match="raised StopIteration: an iterator that it reads from") as caught:
        loops()[where]()
    assert isinstance(caught.value.__cause__, StopIteration)


# -- compiled models -----------------------------------------------------------------------------------------------------------


def pod(model, layers):
    learner = PODLearner(model, torch.optim.SGD(model.parameters(), 0.1), ReservoirBuffer(20), layers=layers, distillation_type="pixel")
    return [learner.step(x.float(), y).losses for x, y in batches(3, 6)]


@pytest.mark.parametrize("how", ["torch.compile", "in place"])
@pytest.mark.parametrize("name", ["0", "_orig_mod.0"])
def test_layers_of_a_compiled_model(how, name):
    """Under the names that its author gave, and under those of the compiled one: the same losses, because hooks fire."""
    expected = pod(dense().float(), ["0"])
    model = dense().float()
    if how == "in place":
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    assert pod(model, [name]) == expected and "pod" in expected[-1]
    activations = features(model, name, torch.ones(5, 4))
    assert activations.shape == (5, 5) and not np.array_equal(activations, features(dense().float(), "0", torch.ones(5, 4)))
    with pytest.raises(ArgumentError, match=r"Sequential has no layer '9'; it has: 0, 1, 2"):
        pod(model, ["9"])
    with pytest.raises(ArgumentError, match=r"Sequential has no layer '_orig_mod.9'; it has: 0, 1, 2"):
        features(model, "_orig_mod.9", torch.ones(5, 4))


def test_layers_of_a_compiled_model_of_several_processes(tmp_path):
    """The wrapper around it looks as it should; one with a compiled model within is refused before the first step."""
    if not torch.distributed.is_available():
        pytest.skip("no torch.distributed")
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel
        expected = pod(dense().float(), ["0"])
        for name in ("0", "module.0"):
            assert pod(torch.compile(wrapped(dense().float()), backend="eager"), [name]) == expected
        with pytest.raises(ArgumentError, match=r"put it around: torch.compile\(DistributedDataParallel"):
            pod(wrapped(torch.compile(dense().float(), backend="eager")), ["0"])
    finally:
        torch.distributed.destroy_process_group()


# -- options ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ERLearner, DERLearner, CLSLearner, SuperERLearner, ReplayLearner])
def test_misspelt_options(kind):
    """The class that was called, the option that was meant; terms only where there can be any."""
    model = dense()
    arguments = model, sgd(model), ReservoirBuffer(9)
    with pytest.raises(ArgumentError, match=f"{kind.__name__} takes no 'replay_batchsize'; did you mean 'replay_batch_size'"):
        kind(*arguments, replay_batchsize=8)
    with pytest.raises(ArgumentError, match=f"{kind.__name__} takes only model and optimizer and buffer by position, got 4 values"):
        kind(*arguments, 0.5)
    if kind is not ReplayLearner:
        with pytest.raises(ArgumentError, match=rf"{kind.__name__} has terms of its own; .*ReplayLearner\(\.\.\., terms="):
            kind(*arguments, terms=[ReplayLoss()])

    class Mine(kind):
        def __init__(self, *arguments, mine=1, **options):
            super().__init__(*arguments, **options)

    options = {"pod_alpha": 0.0} if kind is SuperERLearner else {}
    assert Mine(*arguments, mine=2, replay_batch_size=8, **options).replay_batch_size == 8


def test_without_torch(monkeypatch):
    """One error, of both kinds, that says what to install; the core works."""
    for name in [name for name in sys.modules if name.split(".")[:2] == ["leanreplay", "torch"]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(leanreplay, "torch")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DependencyError, match=r"leanreplay.torch needs PyTorch, .*pip install torch") as caught:
        importlib.import_module("leanreplay.torch")
    assert isinstance(caught.value, ImportError) and "leanreplay.torch" not in sys.modules
    buffer = ReservoirBuffer(9)
    buffer.add(np.arange(5))
    assert len(buffer) == 5
