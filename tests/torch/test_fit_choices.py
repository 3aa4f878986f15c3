"""What fit stores, of data that its buffer may hold already; and which epoch's weights it ends with."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from leanreplay import ArgumentError, ClassBalancedBuffer, HerdingSelection, ParametricBuffer, RandomSelection, ReservoirBuffer
from leanreplay import open as open_buffer
from leanreplay.torch import BufferDataset, CLSLearner, DERLearner, ERLearner, evaluate, fit


class Hidden(Dataset):
    """Ten samples, of something that it does not show as one of its own."""

    def __len__(self):
        return 10


def data(n=40, seed=0):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(n) % 3


def make(buffer, kind=ERLearner, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3))
    return kind(model, torch.optim.SGD(model.parameters(), lr=0.1), buffer, **options)


def rows(buffer):
    (x, y), meta = buffer.get(buffer.get_metadata("idx"))
    return [x.tolist(), y.tolist(), {k: v.tolist() for k, v in meta.items()}, buffer.seen]


class Wrapped(Dataset):
    """A data set around another one, under a name of its own."""

    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, i):
        return self.inner[i]


def test_each_sample_is_stored_once():
    """By default as many epochs as one likes are one pass of the stream; the buffer is what `add` of that pass would make."""
    x, y = data()
    learner, seen = make(ReservoirBuffer(25, seed=3)), []
    fit(learner, (x, y), max_epochs=4, progress=False, logger=lambda record: seen.append(learner.buffer.seen))
    assert seen == [40] * 4 and len(np.unique(learner.buffer.get_metadata("position"))) == 25
    assert len({tuple(v) for v in learner.buffer.get(learner.buffer.get_metadata("idx"))[0][0].tolist()}) == 25
    fit(learner, data(seed=1), max_epochs=2, progress=False, task_id=1)  # another task: stored too
    assert learner.buffer.seen == 80
    learner.store = False
    fit(learner, data(seed=2), max_epochs=2, progress=False, task_id=2, store="every epoch")
    assert learner.buffer.seen == 80 and learner.store is False


def test_an_interrupt_leaves_the_learner_as_it_was():
    learner = make(ReservoirBuffer(25))

    def logger(record):
        if record["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(learner, data(), max_epochs=4, progress=False, logger=logger)
    assert learner.store is True


@pytest.mark.parametrize("kind", [ERLearner, DERLearner, CLSLearner])
def test_data_of_the_own_buffer(kind, tmp_path):
    """Refused wherever it is found, unless nothing is stored; then rows stay, bit for bit, whatever the number of epochs."""
    buffer = ClassBalancedBuffer(30, tmp_path / "b.h5")
    learner = make(buffer, kind)
    fit(learner, data(60), max_epochs=1, progress=False)
    before, mine = rows(buffer), BufferDataset(buffer)
    others = TensorDataset(*data())
    several = [mine, Subset(mine, [3, 1]), ConcatDataset([others, mine]), Wrapped(mine), Wrapped(Subset(ConcatDataset([mine]), range(20)))]
    several += [BufferDataset(open_buffer(tmp_path / "b.h5")), buffer, buffer.groups[1]]
    for hides in (lambda d: {"old": d}, lambda d: {d}, lambda d: d.__getitem__):
        several.append(Hidden())
        several[-1].inner = hides(mine)
    for dataset in several:
        for store in ("first epoch", "every epoch"):
            with pytest.raises(ArgumentError, match=r"rows of the learner's own buffer.* give store=False"):
                fit(learner, dataset, max_epochs=2, progress=False, store=store, task_id=1)
    for i, dataset in enumerate(several[:6]):
        assert len(fit(learner, dataset, max_epochs=5, batch_size=8, progress=False, store=False, task_id=2 + i)) == 5
    assert rows(buffer) == before and not buffer.check() and learner.store
    other = ReservoirBuffer(30)  # of another buffer's rows all are new
    other.add(data(30))
    fit(learner, BufferDataset(other), max_epochs=1, progress=False, task_id=9)
    assert buffer.seen == 90


def test_a_dataset_may_hold_the_buffer_for_another_purpose():
    """A buffer in an attribute of a dataset does not make its rows the samples: these are new, and stored."""
    learner = make(ReservoirBuffer(30))
    fit(learner, data(), max_epochs=1, progress=False)
    for i, held in enumerate((learner.buffer, {"replay": learner.buffer}, learner.buffer.sample, [learner.buffer, learner.buffer])):
        dataset = Wrapped(TensorDataset(*data(seed=i)))
        dataset.held = held
        fit(learner, Subset(dataset, range(20)), max_epochs=1, progress=False, task_id=i)
        assert learner.buffer.seen == 40 + 20 * (i + 1)
    for dataset in (learner.buffer, Subset(learner.buffer, [0, 1]), ConcatDataset([TensorDataset(*data()), learner.buffer])):
        with pytest.raises(ArgumentError, match="rows of the learner's own buffer"):
            fit(learner, dataset, max_epochs=1, progress=False, task_id=9)


def test_a_buffer_that_is_only_read(tmp_path):
    """Open for reading, or of exemplars: replayed from, by a learner with store=False."""
    with ReservoirBuffer(30, tmp_path / "b.h5") as buffer:
        buffer.add(data(30))
    exemplars = ParametricBuffer(9, groupby="class", selection_strategy=RandomSelection())
    exemplars.update(list(zip(*data(30), strict=True)))
    for buffer in (open_buffer(tmp_path / "b.h5"), exemplars):
        before, learner = rows(buffer), make(buffer, store=False)
        history = fit(learner, data(44, seed=5), max_epochs=3, batch_size=20, progress=False)
        assert len(history["loss/replay"]) == 3 and rows(buffer) == before
        assert learner.steps == 3 * (4 if buffer is exemplars else 5)  # 11 new samples a step, as it holds 9; else 10


def test_herded_exemplars(tmp_path):
    """As iCaRL does: exemplars of the first classes, herded and then only read, are rehearsed while others are learned."""
    x, y = data(400)
    x = x + 3 * torch.nn.functional.one_hot(y, 4)
    tasks = [(x[y < 2], y[y < 2]), (x[y == 2], y[y == 2])]
    with ParametricBuffer(20, tmp_path / "b.h5", groupby="class", selection_strategy=HerdingSelection()) as herded:
        herded.add(tasks[0], features=tasks[0][0].numpy())
    found = []
    for buffer in (open_buffer(tmp_path / "b.h5"), ReservoirBuffer(20)):
        before = rows(buffer) if len(buffer) else None
        learner = make(buffer, store=False)
        for task, each in enumerate(tasks):
            fit(learner, each, max_epochs=8, batch_size=20, task_id=task, progress=False)
        assert before is None or rows(buffer) == before
        found.append(evaluate(learner.model, tasks).matrix[0])
    assert found[0][1] > 0.9 and found[0][0] > found[1][0] + 0.3, found


def test_a_reader_is_resumed(tmp_path):
    """A run that only reads its buffer goes on after an interrupt like one that was never stopped."""
    with ReservoirBuffer(30, tmp_path / "b.h5") as buffer:
        buffer.add(data(30))
    both = {"input_state_folder": tmp_path / "run", "output_state_folder": tmp_path / "run", "save_every": 1, "progress": False}
    weights = []
    for stops in (None, 5, None):
        learner = make(open_buffer(tmp_path / "b.h5"), store=False)

        class Stops(ERLearner):
            def step(self, x, y, stops=stops):
                if self.steps == stops:
                    raise KeyboardInterrupt
                return super().step(x, y)

        learner.__class__ = Stops
        options = both if weights else {"progress": False}
        try:
            fit(learner, data(seed=5), max_epochs=3, **options)
        except KeyboardInterrupt:
            continue
        weights.append(learner.model.state_dict())
    assert len(weights) == 2 and all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


# -- the best weights --------------------------------------------------------------------------------------------------------------


def scripted(values):
    values = iter(values)
    return lambda outputs, targets: next(values)


@pytest.mark.parametrize(
    ("values", "best"), [([3, 1, 2, 4], 1), ([1, 2, 3, 4], 0), ([4, 3, 2, 1], 3), ([math.nan] * 4, 3), ([math.nan, 5, 1, 2], 2)]
)
def test_the_best_weights_come_back(values, best):
    """Weights and running statistics of the best epoch; without any the last ones. The same tensors, so the optimizer still has them."""
    learner, states = make(ReservoirBuffer(25)), []
    parameters = list(learner.model.parameters())
    options = {"val_dataset": data(9, 7), "metrics": {"m": scripted(values)}, "metric": "m", "max_epochs": 4, "progress": False}
    options["logger"] = lambda record: states.append({k: v.clone() for k, v in learner.model.state_dict().items()})
    history = fit(learner, data(), restore_best=True, **options)
    assert history.best_epoch == (None if best == 3 and math.isnan(values[0]) else best)
    assert all(torch.equal(value, states[best][name]) for name, value in learner.model.state_dict().items())
    assert best == 3 or not torch.equal(states[best]["1.running_mean"], states[3]["1.running_mean"])
    assert all(a is b for a, b in zip(parameters, learner.model.parameters(), strict=True))


def test_the_best_validation_loss():
    """Without a metric; and not if nobody asked for it."""
    ends = []
    for restore_best in (True, False):
        learner = make(ReservoirBuffer(25))
        learner.optimizer.param_groups[0]["lr"] = 50.0  # after which it can only be worse
        torch.nn.init.zeros_(learner.model[2].weight)
        history = fit(learner, data(), val_dataset=data(), max_epochs=3, progress=False, restore_best=restore_best)
        with torch.no_grad():
            ends.append(float(torch.nn.functional.cross_entropy(learner.model.eval()(data()[0]), data()[1])))
        losses = history["val_loss"]
        assert ends[-1] == pytest.approx(min(losses) if restore_best else losses[-1], rel=1e-4)
    assert ends[0] < ends[1]


def test_lbfgs():
    """An optimizer that needs a closure: each sample is stored once; gradients that nobody could clip are refused."""
    learner = make(ReservoirBuffer(100))
    learner.optimizer = torch.optim.LBFGS(learner.model.parameters(), lr=0.1, max_iter=3)
    fit(learner, data(), max_epochs=2, progress=False)
    assert learner.buffer.seen == 40 and learner.steps == 6
    with pytest.raises(ArgumentError, match="gradient_clip_val: LBFGS"):
        fit(learner, data(), max_epochs=2, progress=False, gradient_clip_val=1.0, task_id=1)
