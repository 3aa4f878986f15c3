"""fit and evaluate on nests of tensors: dicts with a label, several inputs, a head for each sample, labels for each pixel."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from children import child, killed
from nested import IGNORED, KINDS, batches, loss_fn, model_of
from training_jobs import die_at

from leanreplay import ArgumentError, ReservoirBuffer
from leanreplay.torch import DERLearner, ERLearner, evaluate, fit, saved_task

HERE = [kind for kind in KINDS if kind != "transformers" or importlib.util.find_spec("transformers")]
LABEL = {"transformer": "labels", "transformers": "labels", "multi-head": "classes"}  # samples of these are dicts


def dataset(kind, task, n=640):
    """A task's samples: dicts one by one, columns by name, or a pair of nests."""
    x, y = batches(kind, task, 1, n)[0]
    if kind == "transformer":
        return [{"labels": y[i], **{name: value[i] for name, value in x.items()}} for i in range(n)]
    return {LABEL[kind]: y, **x} if kind in LABEL else (x, y)


def train(kind, method, folder=None, **options):
    """Two tasks, each for one epoch; started again it goes on."""
    model, path = model_of(kind), None if folder is None else folder / "b.h5"
    buffer = ReservoirBuffer(60, path, seed=3, mode="a")
    learner = method(model, torch.optim.Adam(model.parameters(), KINDS[kind][2]), buffer, loss_fn=loss_fn, ignore_index=IGNORED)
    if folder is not None:
        options |= {"input_state_folder": folder / "run", "output_state_folder": folder / "run", "save_every": 15}
    options |= {"label": LABEL.get(kind), "max_epochs": 1, "progress": False}
    for task in range((saved_task(folder / "run") if folder else 0) or 0, 2):
        history = fit(learner, dataset(kind, task), val_dataset=dataset(kind, 0, 60), task_id=task, **options)
    return learner, history


def accuracies(kind, model):
    """Of both tasks, in other samples."""
    tests = [dataset(kind, task, 700) for task in range(2)]
    return evaluate(model, tests, label=LABEL.get(kind), ignore_index=IGNORED).matrix[0]


@pytest.mark.parametrize(("kind", "method"), [(kind, DERLearner if kind == "two inputs" else ERLearner) for kind in HERE])
def test_forgets_less_and_goes_on(kind, method, tmp_path):
    """Two tasks: the first is known better than without rehearsal; killed in the second and started again: the same weights."""
    torch.set_num_threads(1)  # a fork has no other threads

    def work(_):
        die_at(method, "after", "step", 60)
        train(kind, method, tmp_path)

    killed(*child(work))
    learner, history = train(kind, method)
    again, resumed = train(kind, method, tmp_path)
    assert again.buffer.seen == 1280 and history == resumed
    assert all(map(torch.equal, learner.model.state_dict().values(), again.model.state_dict().values()))
    plain, _ = train(kind, method, batch_memory_frac=0, batch_size=16)  # as many steps, without replay
    with_replay, without = (accuracies(kind, model) for model in (learner.model, plain.model))
    assert with_replay[1] > 0.8 and with_replay[0] > without[0] + 0.1, (with_replay, without)
    x, y = batches(kind, 0, 1, 60)[0]
    assert history["val_loss"][0] == pytest.approx(loss_fn(run(learner.model.eval(), x), y).item(), rel=1e-4)


def run(model, x):
    """The outputs of a model, without the library."""
    with torch.no_grad():
        out = model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)
    return out["logits"] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else getattr(out, "logits", out)


def test_forward_and_mask():
    """evaluate calls the model through `forward`; with a mask it answers among the classes of each task."""
    x, outputs = {"a": torch.zeros(4, 1)}, torch.eye(4) + torch.tensor([0.0, 0.0, 0.0, 0.5])
    tasks = [(x, torch.arange(4) % 2), (x, torch.arange(4) % 2 + 2)]
    options = {"forward": lambda model, x: model(outputs)}
    assert evaluate(torch.nn.Identity(), tasks, **options).matrix.tolist() == [[0.5, 0.5]]
    masked = evaluate(torch.nn.Identity(), tasks, mask=[[0, 1], np.array([3, 2])], **options)
    assert masked.matrix.tolist() == [[0.75, 0.75]]
    for mask, message in [
        ([[0, 1]], "2 lists"),
        ([[0], [4]], "classes 0 to 3"),
        ([[0], []], r"its mask is \[\]"),
        ("ab", "mask"),
        (3, "mask is a list"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            evaluate(torch.nn.Identity(), tasks, mask=mask, **options)
    with pytest.raises(ArgumentError, match="needs no threshold"):
        evaluate(torch.nn.Identity(), tasks, mask=[[0], [1]], threshold=0.5, **options)


X, Y = {"a": torch.zeros(3, 2)}, torch.zeros(3).long()


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([{"a": torch.zeros(2), "y": 0}], {}, r"expected pairs \(x, y\), but its samples gave dict .*; label= names the entry that is y"),
        ([{"a": torch.zeros(2), "y": 0}], {"label": "z"}, "expected dicts with the label 'z', but its samples gave dict"),
        ([(torch.zeros(2), 0)], {"label": "y"}, "expected dicts with the label 'y', but its samples gave list"),
        ((X, Y), {"label": "y"}, "leave label='y' out"),
        ({"a": torch.zeros(3, 2)}, {"label": "y"}, "expected dicts with the label 'y'"),
        ({"a": torch.zeros(3, 2), "y": Y[:2]}, {"label": "y"}, "x has 3 samples, y has 2"),
        ([{"a": "text", "y": 0}], {"label": "y"}, "expected tensors of inputs and of targets"),
        (({"a": torch.zeros(2, 2), "b": torch.zeros(3)}, Y), {}, "x has 2 samples, y has 3"),
        ((X, Y), {"label": 3}, "label is the name of an entry"),
    ],
)
def test_samples_that_do_not_fit(data, options, message):
    with pytest.raises(ArgumentError, match=message):
        evaluate(torch.nn.Identity(), [data], forward=lambda model, x: x["a"], **options)
