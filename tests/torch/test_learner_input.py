"""The learners: what they refuse, and that a refused step changes nothing."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from learner_methods import ALL, METHODS, differing, everything, images, make, train
from learner_oracle import batches, dense, held, sgd

from leanreplay import (
    ArgumentError,
    ClassBalancedBuffer,
    ClassBalancingReservoirBuffer,
    ExperienceBalancedBuffer,
    GreedyClassBalancingBuffer,
    LeanReplayError,
    ModeError,
    ParametricBuffer,
    ReservoirBuffer,
    SchemaError,
    WeightedReservoirBuffer,
)
from leanreplay.errors import LossError
from leanreplay.torch import (
    CLSLearner,
    Consistency,
    DERLearner,
    ERLearner,
    LogitMatching,
    PODLearner,
    ReplayLearner,
    ReplayLoss,
    SuperERLearner,
    Term,
)
from leanreplay.torch.learners.checks import check_labels


@ALL
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_that_is_not_finite(method, bad):
    """A LossError that names the term; model, running statistics, copies, momentum, buffer and hooks are as before; and it trains on."""
    learner = make(method)
    train(learner, images(4))
    (x, y), (x1, y1) = images(2, seed=1)
    before, draws = everything(learner), learner.state_dict()
    x[2, 0, 1, 1] = bad
    for attempt in (learner.step, learner.loss):
        with pytest.raises(LossError, match=r"the stream(\+replay)? loss of step 4 is nan .*neither trained on nor stored"):
            attempt(x, y)
        assert not differing(everything(learner), before)
    assert (
        not any(m._forward_hooks for m in learner.model.modules())
        and not learner.pending
        and draws["classes"] == learner.state_dict()["classes"]
    )
    learner.step(x1, y1)
    assert learner.buffer.seen == 30 and all(np.isfinite(v).all() for k, v in everything(learner).items() if not k.startswith("buffer"))


@pytest.mark.parametrize("name", ["logits", "replay", "consistency", "pod"])
def test_loss_of_a_term_that_is_not_finite(name):
    """It is the term that is named."""
    learner = make("super")
    train(learner, images(4))
    term = next(t for t in learner.terms if t.name == name)
    loss = term.loss
    term.loss = lambda learner, replay: loss(learner, replay) * float("inf")
    before = everything(learner)
    with pytest.raises(LossError, match=f"the {name} loss of step 4 is inf"):
        learner.step(*images(1)[0])
    assert not differing(everything(learner), before)


def test_whole_loss_that_is_not_finite():
    """Terms that are finite may have a sum that is not."""
    model = dense().float()
    terms = [ReplayLoss(3e38)]
    learner = ReplayLearner(model, sgd(model), ReservoirBuffer(20), terms=terms, loss_normalization=False)
    with pytest.raises(LossError, match="the whole loss of step 1 is inf"):
        for x, y in batches(2, 6):
            learner.step(100 * x.float(), y)


@ALL
def test_batch_of_one(method):
    """With batch norm in train mode an error of ours, in the stream and in a replay draw; nothing changed. In eval mode it may be."""
    learner = make(method)
    (x, y), (x1, y1) = images(2)
    before = everything(learner)
    with pytest.raises(ArgumentError, match=r"a batch of 1 sample, but 1 is a BatchNorm2d in train mode.*drop_last=True"):
        learner.step(x[:1], y[:1])
    assert not differing(everything(learner), before)
    learner.step(x, y)
    if not method.startswith("er"):  # where the draw has a pass of its own
        learner.replay_batch_size = 1
        before = everything(learner)
        with pytest.raises(ArgumentError, match="a batch of 1 sample"):
            learner.step(x1, y1)
        assert not differing(everything(learner), before)
    learner.model[1].eval()
    if "consistency" in [t.name for t in learner.terms]:  # its copies stay in train mode
        learner.replay_batch_size = 4
    learner.step(x1[:1], y1[:1])
    with pytest.raises(ArgumentError, match="empty"):
        learner.step(x[:0], y[:0])


@ALL
@pytest.mark.parametrize("label", [3, -1, 100])
def test_labels_out_of_range(method, label):
    """In the batch, and in what is replayed."""
    learner = make(method)
    train(learner, images(2))
    before = everything(learner)
    (x, y), *_ = images(1, seed=1)
    bad = y.clone()
    bad[1] = label
    with pytest.raises(ArgumentError, match=rf"a label of the batch is {label}, but the model has 3 outputs"):
        learner.step(x, bad)
    assert not differing(everything(learner), before) and not learner.pending
    if method != "pod" and METHODS[method][1].get("beta", 1):
        learner.buffer_target_transform = lambda y: y * 0 + label
        with pytest.raises(ArgumentError, match=rf"a label of the replayed samples is {label}, but the model has 3 outputs"):
            learner.step(x, y)
        assert not differing(everything(learner), before)


def test_wrong_layers():
    """The near ones are listed."""
    model = torch.nn.Sequential()
    for name in ("conv1", "conv2", "head"):
        model.add_module(name, torch.nn.Linear(4, 4))
    for layers, message in [
        (["conv"], r"Sequential has no layer 'conv'; did you mean 'conv[12]', 'conv[12]'\?"),
        (["conv1", "zzz"], r"no layer 'zzz'; it has: conv1, conv2, head"),
        ([], "layers: name at least one; Sequential has conv1, conv2, head"),
        ("conv1", "layers is a list of names"),
        ([1], "layers is a list of names"),
        ([""], "no layer ''"),
    ]:
        for kind, name in ((PODLearner, "layers"), (SuperERLearner, "pod_layers")):
            with pytest.raises(ArgumentError, match=message):
                kind(model, sgd(model), ReservoirBuffer(9), **{name: layers})


def test_layers_of_an_own_term():
    """Are looked for when the learner is made; any iterable of names will do."""

    class Mean(Term):
        def __init__(self, layers):
            super().__init__("mean", 1.0, layers=layers)

        def loss(self, learner, replay):
            return replay.features[self.layers[0]].square().mean()

    model = dense()
    for layers, message in [
        (["4"], "Sequential has no layer '4'"),
        ("0", "layers is a list of names"),
        (3, "layers is a list of names"),
        ([3], "layers is a list of names"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            ReplayLearner(model, sgd(model), ReservoirBuffer(9), terms=[Mean(layers)])
    for batch in batches(2, 6):
        learner = ReplayLearner(model, sgd(model), ReservoirBuffer(9), terms=[Mean(name for name in ["0"])])
        learner.step(*batch)
    with pytest.raises(ArgumentError, match="terms must be a list of"):
        ReplayLearner(model, sgd(model), ReservoirBuffer(9), terms=Mean(["0"]))


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_terms_that_store_bfloat16(gamma):
    """Come back as bfloat16, not as its bits, and move as such."""
    found = []

    class Half(Term):
        def __init__(self):
            super().__init__("half", 1.0)

        def keep(self, learner, stream):
            return {"half": stream.outputs.detach().bfloat16()}

        def loss(self, learner, replay):
            found.append((replay.stored("half"), replay.outputs.detach()))
            return (replay.outputs - replay.stored("half")).square().mean()

    model = dense()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    learner = ReplayLearner(model, optimizer, ReservoirBuffer(9), terms=[Half()], ema_memory_update_gamma=gamma)
    for batch in batches(4, 6):
        learner.step(*batch)
    assert len(found) == 3
    for stored, outputs in found:
        assert stored.dtype == torch.bfloat16
        torch.testing.assert_close(stored.double(), outputs, rtol=0.02, atol=0.01)


class Odd(torch.nn.Module):
    """Layers that no activations can be taken of."""

    def __init__(self):
        super().__init__()
        self.twice, self.never, self.many = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.LSTM(4, 4)
        self.lines, self.norm = torch.nn.Flatten(0), torch.nn.BatchNorm1d(4)

    def forward(self, x):
        self.lines(x)
        return self.norm(self.many(self.twice(self.twice(x)))[0])


@pytest.mark.parametrize(
    "layer, kind, message",
    [
        ("twice", "pixel", "'twice' runs several times"),
        ("never", "pixel", "'never' did not run"),
        ("many", "pixel", "'many' gives a tuple"),
        ("lines", "pixel", r"'lines' gives shape \(24,\) for 6 samples"),
        ("norm", "spatial", r"'spatial' pools activations \(n, c, h, w\), but layer 'norm' gives shape \(6, 4\)"),
    ],
)
def test_odd_layers(layer, kind, message):
    """Errors of our own; nothing changed, no hook stays."""
    model = Odd()
    learner = PODLearner(model, sgd(model), ReservoirBuffer(20), layers=[layer], distillation_type=kind)
    x, y = torch.randn(6, 4), torch.randint(0, 4, (6,))
    with pytest.raises(ArgumentError, match=message):
        for _ in range(2):
            before = {k: v.clone() for k, v in model.state_dict().items()}
            seen = learner.buffer.seen
            learner.step(x, y)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items()) and learner.buffer.seen == seen
    assert not any(m._forward_hooks for m in model.modules())


def test_outputs_that_do_not_fit():
    """A head that grew without max_outputs, or beyond it; a model that returns no tensor; masks without classes; a loss that is no mean."""
    (x, y), *_ = batches(1, 6)
    model = dense()
    learner = DERLearner(model, sgd(model), ReservoirBuffer(20))
    learner.step(x, y)
    model[-1] = torch.nn.Linear(5, 4).double()
    with pytest.raises(ArgumentError, match=r"outputs have shape \(6, 4\), the stored logits \(6, 3\).*max_outputs"):
        learner.step(x, y)
    model = dense()
    with pytest.raises(ArgumentError, match=r"max_outputs=2, but the model's outputs have shape \(6, 3\)"):
        DERLearner(model, sgd(model), ReservoirBuffer(20), max_outputs=2).step(x, y)
    with pytest.raises(ArgumentError, match="mask_unused_classes needs"):
        ERLearner(model, sgd(model), ReservoirBuffer(20), mask_unused_classes=True).step(x, torch.rand(6, 3).double())
    with pytest.raises(ArgumentError, match=r"stream loss is of shape \(6,\)"):
        loss_fn = torch.nn.CrossEntropyLoss(reduction="none")
        ERLearner(model, sgd(model), ReservoirBuffer(20), loss_fn=loss_fn).step(x, y)
    with pytest.raises(ArgumentError, match="stream loss is of float"):
        ERLearner(model, sgd(model), ReservoirBuffer(20), loss_fn=lambda outputs, y: 1.0).step(x, y)
    learner = CLSLearner(model, sgd(model), ReservoirBuffer(20), loss_fn=torch.nn.functional.mse_loss)
    with pytest.raises(ArgumentError, match=r"'consistency' needs outputs \(n, classes\) and integer labels"):
        for _ in range(2):
            learner.step(x, torch.rand(6, 3).double())
    model = torch.nn.LSTM(4, 3).double()
    with pytest.raises(ArgumentError, match=r"must return a tensor of outputs.*got tuple"):
        ERLearner(model, sgd(model), ReservoirBuffer(20)).step(x, y)


def raises(value):
    raise ValueError("no image")


def test_batches_and_buffers_that_do_not_fit():
    """Anything but two tensors of one length; buffers that hold other metadata, or no pairs; transforms whose results do not stack."""
    (x, y), *_ = batches(1, 6)
    model = dense()

    def learner(buffer=None, kind=DERLearner, **options):
        return kind(model, sgd(model), ReservoirBuffer(20) if buffer is None else buffer, **options)

    with pytest.raises(ArgumentError, match="x and y, or nests of tensors; got ndarray"):
        learner().step(x.numpy(), y)
    for wrong in ((x, y[:5]), (x[0, 0], y)):
        with pytest.raises(ArgumentError, match="one entry per sample each"):
            learner().step(*wrong)
    buffer = ReservoirBuffer(20)
    buffer.add((x, y))
    with pytest.raises(ArgumentError, match=r"stores the metadata \['logits'\] with each sample, but the buffer has \[\]"):
        learner(buffer).step(x, y)
    learner(buffer, ERLearner).step(x, y)
    buffer = ReservoirBuffer(20)
    buffer.add(x)
    with pytest.raises(ArgumentError, match=r"a buffer of pairs"):
        learner(buffer, ERLearner).step(x, y)
    model.float()
    for bad in ((x.float(), y), (x, y.int())):
        buffer = ReservoirBuffer(20)
        buffer.add((x, y))
        er = learner(buffer, ERLearner)
        with pytest.raises(SchemaError, match=r"data/[01]: expected (float64|int64)"):
            er.step(*bad)
        assert buffer.seen == 6 and er.steps == 0
    er = learner(ReservoirBuffer(20), ERLearner)
    er.loss(x.float(), y)
    with pytest.raises(SchemaError, match="wait for after_step"):
        er.loss(x.float(), y.int())
    model.double()
    buffer = ReservoirBuffer(20, target_transform=lambda y: "name")
    buffer.add((x, y))
    with pytest.raises(ArgumentError, match=r"drawn were torch.float64 of shape .* and list.*: what does the buffer's transform return"):
        learner(buffer, ERLearner).step(x, y)
    with pytest.raises(ArgumentError, match="transform: its results cannot be stacked"):
        learner(transform=lambda v: v[: 1 + int(v[0] > 0)]).step(x, y)
    with pytest.raises(ArgumentError, match="target_transform: its results cannot be stacked"):
        learner(target_transform=lambda v: "name").step(x, y)
    with pytest.raises(ZeroDivisionError):  # an error of the function's own stays what it is
        learner(transform=lambda v: 1 / 0).step(x, y)
    with pytest.raises(ValueError, match=r"^no image$"):
        learner(transform=raises).step(x, y)


class Keeps(Term):
    """Stores whatever a function makes of the outputs."""

    def __init__(self, function):
        super().__init__("keeps", 0.0, None)
        self.function = function

    def keep(self, learner, stream):
        return self.function(stream.outputs.detach())


def grown(learner):
    learner.module[-1] = torch.nn.Linear(5, 4).double()
    learner.optimizer = sgd(learner.module)


REFUSED = {
    "name": (lambda out: {"idx": out}, None, SchemaError, "metadata/idx: the names .* are taken"),
    "length": (lambda out: {"a": out[:3]}, None, SchemaError, "differ in length"),
    "number": (lambda out: {"a": 3.0}, None, ArgumentError, "stores a float as 'a'"),
    "array": (lambda out: {"a": out.numpy()}, None, ArgumentError, "stores a ndarray as 'a'"),
    "sparse": (lambda out: {}, lambda x, y: (x.to_sparse(), y), SchemaError, "to_dense"),
    "model": (lambda out: {}, lambda x, y: (x.to("meta"), y), ArgumentError, "the batch is on meta, the model on cpu; give device="),
    "float32": (lambda out: {}, lambda x, y: (x.float(), y), ArgumentError, "does not take x of torch.float32.*torch.float64: convert x"),
    "integers": (lambda out: {}, lambda x, y: (x.long(), y), ArgumentError, "does not take x of torch.int64"),
    "labels": (
        lambda out: {},
        lambda x, y: (x, y.double()),
        ArgumentError,
        r"labels are torch.float64 of shape \(6,\).*int64 of shape \(6,\)",
    ),
    "bools": (lambda out: {}, lambda x, y: (x, y > 0), ArgumentError, "labels are torch.bool"),
    "column": (lambda out: {}, lambda x, y: (x, y[:, None]), ArgumentError, r"labels are torch.int64 of shape \(6, 1\)"),
    "complex": (lambda out: {}, lambda x, y: (x, y.to(torch.complex64)), ArgumentError, "labels are torch.complex64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_step(case):
    """What an empty buffer, the model or the loss will not take: an error of ours before the optimizer's step, not after it."""
    keep, change, error, message = REFUSED[case]
    model = dense(norm=True)
    learner = ReplayLearner(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), ReservoirBuffer(20), terms=[Keeps(keep)])
    x, y = batches(1, 6)[0]
    before = everything(learner)
    with pytest.raises(error, match=message):
        learner.step(*((x, y) if change is None else change(x, y)))
    assert not differing(everything(learner), before) and not learner.pending


@pytest.mark.parametrize("draws", [True, False])
def test_what_is_stored_must_keep_its_shape(draws):
    """A head that grew without max_outputs is refused before the step, too where nothing is drawn; so are batches queued together."""
    (x, y), (x1, y1) = batches(2, 6)
    model = dense()
    learner = DERLearner(model, sgd(model), ReservoirBuffer(20), replay_batch_size=4 if draws else 0)
    learner.step(x, y)
    learner.loss(x, y)
    grown(learner)
    weights, seen = model[-1].weight.clone(), learner.buffer.seen
    for _ in range(2):
        with pytest.raises(LeanReplayError, match="give max_outputs from the start" if draws else "with those that wait for after_step"):
            learner.loss(x1, y1)
        with pytest.raises(LeanReplayError):
            learner.step(x1, y1)
    learner.after_step()
    assert learner.buffer.seen == seen + 6
    with pytest.raises(
        LeanReplayError, match=r"max_outputs|metadata/logits: expected float32 of shape \(6, 3\), got float32 of shape \(6, 4\)"
    ):
        learner.step(x1, y1)
    assert torch.equal(model[-1].weight, weights) and learner.buffer.seen == seen + 6 and learner.steps == 2


def test_kinds_of_buffers(tmp_path):
    """Every buffer that needs nothing with a batch but the batch; one that refuses labels does so before the step."""
    (x, y), *_ = batches(1, 6)
    model = dense()
    for kind in (ClassBalancedBuffer, ClassBalancingReservoirBuffer, ExperienceBalancedBuffer, GreedyClassBalancingBuffer):
        learner = DERLearner(model, sgd(model), kind(20), replay_batch_size=4, ema_memory_update_gamma=0.5)
        learner.on_task_start()
        for batch in batches(4, 6):
            learner.step(*batch)
        assert learner.buffer.seen == 24 and not learner.buffer.check()
    for kind in (ParametricBuffer, WeightedReservoirBuffer):
        with pytest.raises(ArgumentError, match=f"no features or weights to give to a {kind.__name__}"):
            ERLearner(model, sgd(model), kind(20))
    learner = ERLearner(model, sgd(model), ClassBalancedBuffer(20, total_num_classes=2, adaptive_size=False))
    learner.step(x, y.clamp(max=1))
    weights = model[0].weight.clone()
    with pytest.raises(ArgumentError, match="of a total of 2 are there already"):
        learner.step(x, y * 0 + 2)
    learner = ReplayLearner(model, sgd(model), ClassBalancedBuffer(20), loss_fn=torch.nn.functional.mse_loss)
    with pytest.raises(ArgumentError, match=r"balances over classes, but labels are torch.float64 of shape \(6, 3\)"):
        learner.step(x, torch.zeros(6, 3).double())
    for kind in (ClassBalancedBuffer, ClassBalancingReservoirBuffer, GreedyClassBalancingBuffer):
        buffer = kind(20)
        buffer.add((x, torch.zeros(6, 3)), group=np.arange(6))
        with pytest.raises(ArgumentError, match="balances over classes, but the samples that it holds"):
            ERLearner(model, sgd(model), buffer, loss_fn=torch.nn.functional.mse_loss)
        ERLearner(model, sgd(model), buffer, loss_fn=torch.nn.functional.mse_loss, store=False)
    assert torch.equal(model[0].weight, weights)


def test_a_step_that_fails_in_the_backward_pass():
    """Its batch is not queued, and what `loss` queued before stays."""
    learner = make("der++")
    (x, y), (x1, y1) = images(2)
    learner.loss(x, y)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise KeyboardInterrupt

    inner = learner.loss_fn
    learner.loss_fn = lambda outputs, targets: Fails.apply(inner(outputs, targets))
    before = [p.clone() for p in learner.model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        learner.step(x1, y1)
    assert len(learner.pending) == 1 and all(map(torch.equal, before, learner.model.parameters()))
    learner.after_step()
    assert np.array_equal(np.sort(held(learner.buffer)["y"]), np.sort(y.numpy()))


def test_nothing_to_train():
    """Frozen parameters, no_grad, another model's optimizer."""
    model, (x, y) = dense(), batches(1, 6)[0]
    with pytest.raises(ArgumentError, match="none of the parameters of this Sequential; make it of"):
        ERLearner(model, sgd(dense()), ReservoirBuffer(9))
    learner = ERLearner(model, sgd(model), ReservoirBuffer(9))
    with pytest.raises(ArgumentError, match="nothing to train"), torch.no_grad():
        learner.step(x, y)
    model.requires_grad_(False)
    with pytest.raises(ArgumentError, match="nothing to train: all parameters are frozen"):
        learner.step(x, y)
    assert learner.buffer.seen == 0 and not learner.pending
    model[-1].requires_grad_(True)
    learner.step(x, y)


def test_ignored_labels():
    """Cross entropy leaves out labels of its ignore_index; others are out of range."""
    model, (x, y) = dense(), batches(1, 6)[0]
    for loss_fn, label in ((torch.nn.functional.cross_entropy, -100), (torch.nn.CrossEntropyLoss(ignore_index=-1), -1)):
        y[1] = label
        learner = ERLearner(model, sgd(model), ReservoirBuffer(9), loss_fn=loss_fn)
        learner.step(x, y)
        check_labels(learner.outputs, [("batch", y)], learner.ignore_index)  # what other devices ask before the loss
        with pytest.raises(ArgumentError, match="a label of the batch is -7"):
            check_labels(learner.outputs, [("batch", torch.where(y == label, y, -7))], learner.ignore_index)


@ALL
def test_labels_of_one_byte(method):
    """uint8, which cross entropy takes, is int64 to everything else, masks and slow copies too."""
    several = [make(method, mask_unused_classes=True) for _ in range(2)]
    for (x, y), size in zip(images(4), (3, 6, 3, 6), strict=True):  # as many samples as outputs: bytes are not a mask
        for learner, dtype in zip(several, (torch.int64, torch.uint8), strict=True):
            learner.step(x[:size], y[:size].to(dtype))
    assert [k for k in differing(*map(everything, several)) if k != "buffer y"] == []


def test_classes_in_a_buffer_that_others_filled():
    """What is drawn has occurred, too: its class is not masked, which would make the loss infinite."""
    model = dense()
    buffer = ReservoirBuffer(20)
    (x, y), *_ = batches(1, 6)
    buffer.add((x, y * 0 + 2))
    learner = ERLearner(model, sgd(model), buffer, mask_unused_classes=True)
    learner.step(x, y * 0)
    assert learner.state_dict()["classes"] == [0, 2]


PARAMETERS = [
    (ReplayLearner, {"replay_batch_size": -1}, "replay_batch_size must be from 0"),
    (ReplayLearner, {"replay_batch_size": 1.5}, "replay_batch_size must be an integer"),
    (ReplayLearner, {"loss_weight": -1.0}, "loss_weight must be a finite number"),
    (ReplayLearner, {"loss_weight": float("nan")}, "loss_weight must be a finite number"),
    (ReplayLearner, {"ema_memory_update_gamma": 1.1}, "ema_memory_update_gamma must be from 0 to 1"),
    (ReplayLearner, {"max_outputs": 0}, "max_outputs must be from 1"),
    (ReplayLearner, {"seed": "a"}, "seed must be an integer"),
    (ReplayLearner, {"device": "nowhere"}, "device"),
    (ReplayLearner, {"transform": 3}, "transform must be a function"),
    (ReplayLearner, {"buffer_target_transform": "x"}, "buffer_target_transform must be a function"),
    (ReplayLearner, {"loss_fn": None}, "loss_fn must be a function"),
    (ReplayLearner, {"terms": [3]}, "terms are objects of leanreplay.torch.Term, got int"),
    (ReplayLearner, {"terms": [ReplayLoss(), ReplayLoss()]}, "several terms are called 'replay'"),
    (ReplayLearner, {"terms": [ReplayLoss(name="stream")]}, "several terms are called 'stream'"),
    (ReplayLearner, {"terms": [ReplayLoss(None), ReplayLoss(1.0, together=True, name="other")]}, "only one term's draw"),
    (ERLearner, {"alpha": -0.5}, "weight of the term 'replay' must be a finite number of at least 0"),
    (DERLearner, {"alpha": float("inf")}, "weight of the term 'logits'"),
    (DERLearner, {"beta": "1"}, "weight of the term 'replay'"),
    (PODLearner, {"layers": ["0"], "distillation_type": "both"}, "distillation_type is one of .*'spatial'.*got 'both'"),
    (CLSLearner, {"stable_model_update_probability": 1.5}, "stable_model_update_probability must be from 0 to 1, got 1.5"),
    (CLSLearner, {"plastic_model_update_probability": -0.1}, "plastic_model_update_probability must be from 0 to 1"),
    (CLSLearner, {"stable_model_update_weight": float("nan")}, "stable_model_update_weight must be from 0 to 1"),
    (SuperERLearner, {"pod_alpha": 0.0, "sp_shrink_factor": 2.0}, "shrink_factor must be from 0 to 1"),
    (SuperERLearner, {"pod_alpha": 0.0, "sp_sigma": -1.0}, "sigma must be a finite number"),
    (SuperERLearner, {"pod_alpha": 0.0, "cls_plastic_model_update_probability": 2}, "plastic_model_update_probability must be from 0 to 1"),
]


@pytest.mark.parametrize(
    "kind, options, message", PARAMETERS, ids=[f"{k.__name__}-{next(iter(o))}-{i}" for i, (k, o, _) in enumerate(PARAMETERS)]
)
def test_parameters(kind, options, message):
    """Errors of our own, that say what was expected."""
    model = dense()
    with pytest.raises(ArgumentError, match=message) as caught:
        kind(model, sgd(model), ReservoirBuffer(9), **options)
    assert isinstance(caught.value, LeanReplayError)


def test_wrong_objects():
    """A model without parameters, and what is no model, optimizer or buffer; a term used twice; terms with bad names or draws."""
    model, buffer = dense(), ReservoirBuffer(9)
    for arguments, message in [
        ((torch.nn.Flatten(), sgd(model), buffer), "Flatten has no parameters"),
        ((print, sgd(model), buffer), "model must be a torch.nn.Module"),
        ((model, 3, buffer), "optimizer must be"),
        ((model, sgd(model), []), "buffer must be a buffer of leanreplay, got list"),
    ]:
        for kind in (ERLearner, DERLearner, CLSLearner):
            with pytest.raises(ArgumentError, match=message):
                kind(*arguments)
    term = Consistency()
    ReplayLearner(model, sgd(model), buffer, terms=[term])
    with pytest.raises(ArgumentError, match="already belongs to a learner"):
        ReplayLearner(model, sgd(model), buffer, terms=[term])
    with pytest.raises(ArgumentError, match="name is a non-empty str"):
        Term("", 1.0)
    with pytest.raises(ArgumentError, match="has no weight"):
        Term("mine", None)
    with pytest.raises(ArgumentError, match='draw is "own", "shared" or None'):
        LogitMatching(1.0, draw="mine")
    with pytest.raises(ArgumentError, match="the term 'mine' takes a draw, but Term has no loss"):
        ReplayLearner(model, sgd(model), buffer, terms=[Term("mine", 1.0)])
    buffer.add(batches(1, 6)[0])
    with pytest.raises(ModeError, match="adds to its buffer"):
        ERLearner(model, sgd(model), pickle.loads(pickle.dumps(buffer)))
