"""Accuracy matrices against their definitions, computed by hand; and their picture."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from interpreter import Script
from torch.utils.data import Dataset, IterableDataset

from leanreplay import ArgumentError, LeanReplayError, StorageError
from leanreplay.torch import Evaluation, evaluate, plot

MATRIX = [[0.9, 0.1, 0.2, 0.0], [0.5, 0.8, 0.3, 0.1], [0.95, 0.4, 0.7, 0.2], [0.6, 0.6, 0.1, 1.0]]


class Pairs(Dataset):
    """Samples one by one, images as bytes."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def test_measures_by_hand():
    evaluation = Evaluation(MATRIX)
    assert evaluation.average_accuracy == pytest.approx((0.6 + 0.6 + 0.1 + 1.0) / 4)
    # the best of the three rows before the last, minus the last: for task 0 that is row 2, not the diagonal
    assert evaluation.forgetting == pytest.approx(((0.95 - 0.6) + (0.8 - 0.6) + (0.7 - 0.1)) / 3)
    assert evaluation.backward_transfer == pytest.approx(((0.6 - 0.9) + (0.6 - 0.8) + (0.1 - 0.7)) / 3)


def test_measures_in_between():
    """After two of four tasks, with all tasks evaluated and with those learned so far: forgetting and transfer are the same."""
    for rows in (MATRIX[:2], [[0.9, math.nan], [0.5, 0.8]]):
        evaluation = Evaluation(rows)
        assert evaluation.forgetting == pytest.approx(0.4) and evaluation.backward_transfer == pytest.approx(-0.4)
    assert Evaluation([[0.9, math.nan], [0.5, 0.8]]).average_accuracy == pytest.approx(0.65)
    assert Evaluation(MATRIX[:2]).average_accuracy == pytest.approx(1.7 / 4)
    assert math.isnan(Evaluation(MATRIX[:1]).forgetting) and math.isnan(Evaluation(MATRIX[:1]).backward_transfer)


def test_a_task_that_was_left_out():
    evaluation = Evaluation([[0.9, 0.1], [math.nan, 0.8]])
    assert evaluation.average_accuracy == 0.8
    with pytest.raises(ArgumentError, match="task 0 was not evaluated"):
        _ = evaluation.forgetting


@pytest.mark.parametrize("matrix", [[], [[]], [0.5], [[0.5], [0.5]], [[0.5, 0.1], [0.5]], "abc", None, np.zeros((2, 2, 2))], ids=str)
def test_no_matrix(matrix):
    with pytest.raises(ArgumentError, match="matrix must"):
        Evaluation(matrix)


@pytest.mark.parametrize("value", [87.5, -0.1, math.inf])
def test_no_fractions(value):
    with pytest.raises(ArgumentError, match=r"fractions from 0 to 1.*divide percentages by 100"):
        Evaluation([[0.5, value], [math.nan, 1.0]])


def test_the_matrix_is_a_copy_that_stays():
    rows = np.array(MATRIX)
    evaluation = Evaluation(rows)
    rows[:] = 0
    assert evaluation.matrix.tolist() == MATRIX
    with pytest.raises(ValueError, match="read-only"):
        evaluation.matrix[0, 0] = 1
    assert Evaluation(evaluation.matrix.tolist()).matrix.tolist() == MATRIX


class Shift(torch.nn.Module):
    """Answers (x + shift) % 4; counts batches; has a layer in each mode."""

    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(()))
        self.frozen = torch.nn.Dropout().eval()
        self.sizes = []

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        self.sizes.append(len(x))
        return torch.nn.functional.one_hot(((x + self.shift) % 4).long(), 4).float()


def test_rows_of_accuracies():
    """Two tasks, of which the model knows one after the other; datasets of each kind; batches; the model is left as it was."""
    x = torch.arange(10) % 4
    wrong = torch.where(torch.arange(10) < 3, (x + 2) % 4, x)
    tasks = [(x, x), Pairs(x.numpy().astype("uint8"), (wrong + 1).numpy() % 4), [(int(i), int(i)) for i in x]]
    model = Shift().train()
    model.frozen.eval()
    first = evaluate(model, tasks[:2], batch_size=4)
    assert model.sizes == [4, 4, 2] * 2 and model.training and not model.frozen.training
    with torch.no_grad():
        model.shift += 1
    second = evaluate(model, tasks, first)
    assert first.matrix.tolist() == [[1.0, 0.0]]
    np.testing.assert_array_equal(second.matrix, [[1.0, 0.0, np.nan], [0.0, 0.7, 0.0]])
    assert second.forgetting == 1.0 and second.backward_transfer == -1.0
    assert "2 of 3 tasks" in repr(second)
    third = evaluate(model, tasks[1:2], second)  # fewer than before: the rest was not evaluated
    np.testing.assert_array_equal(third.matrix[2], [0.7, np.nan, np.nan])


def test_a_distributed_model(tmp_path):
    """Is evaluated without its wrapper, which would talk to the other ranks: one alone may evaluate."""
    if not torch.distributed.is_available():
        pytest.skip("no torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        model.forward = None
        assert evaluate(model, [(X, Y)]).matrix.shape == (1, 1) and model.training and model.module.training
    finally:
        torch.distributed.destroy_process_group()


def test_transforms_and_collate():
    """transform and target_transform see single samples, as tensors, after collation."""
    x = torch.arange(8) % 4
    model, seen = Shift(), []

    def collate(samples):
        return torch.stack([a for a, _ in samples]), torch.stack([b for _, b in samples])

    def forth(value):
        seen.append(value)
        return value + 1

    data = Pairs(x, (x + 3) % 4)
    result = evaluate(model, [data], transform=forth, target_transform=lambda y: (y + 2) % 4, collate_fn=collate, batch_size=3)
    assert result.matrix.tolist() == [[1.0]]
    assert [v.shape for v in seen] == [torch.Size([])] * 8 and torch.stack(seen).equal(x)


def test_a_failing_model_is_left_as_it_was():
    class Fails(torch.nn.Linear):
        def forward(self, x):
            raise RuntimeError("no")

    model = Fails(2, 2)
    with pytest.raises(RuntimeError, match="no"):
        evaluate(model, [(torch.zeros(3, 2), torch.zeros(3).long())])
    assert model.training and torch.is_grad_enabled()


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


X, Y = torch.zeros(3, 2), torch.zeros(3).long()


class Several(torch.nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.uint8])
def test_one_output_a_sample(column, dtype):
    """Logits and probabilities against targets 0 and 1, in one column or none, as any numbers."""
    x = torch.linspace(-1, 1, 100)
    y = (x > 0).to(dtype)
    y[:10] = 1 - y[:10].to(torch.uint8)  # of which the model gets 10 wrong
    x = x[:, None] if column else x
    for targets in (y, y[:, None]) if column else (y,):
        assert evaluate(torch.nn.Identity(), [(x, targets)], threshold=0, batch_size=7).matrix.tolist() == [[0.9]]
        assert evaluate(torch.nn.Sigmoid(), [(x, targets)], threshold=0.5).matrix.tolist() == [[0.9]]
        assert evaluate(torch.nn.Sigmoid(), [(x, targets)], threshold=0.0).average_accuracy < 0.9  # the wrong one for these


def test_nan_is_no_answer():
    """A model that diverged is right nowhere, not where the class is 0."""
    x, y = torch.eye(4), torch.zeros(4).long()
    x[1:] = math.nan
    assert evaluate(torch.nn.Identity(), [(x, y)]).matrix.tolist() == [[0.25]]
    assert evaluate(torch.nn.Identity(), [(x[:, 0], y)], threshold=2.0).matrix.tolist() == [[0.25]]


def test_targets_that_do_not_count():
    """Left out of both numbers; in segmentation too; without any that counts there is no accuracy."""
    x, y = torch.eye(4), torch.tensor([0, 1, 3, -100])
    assert evaluate(torch.nn.Identity(), [(x, y)], batch_size=3).matrix.tolist() == [[2 / 3]]
    assert evaluate(torch.nn.Identity(), [(x, y.clamp(min=0))], ignore_index=0).matrix.tolist() == [[0.5]]
    result = evaluate(torch.nn.Identity(), [(x, y * 0 - 100), (x, torch.arange(4))])
    np.testing.assert_array_equal(result.matrix, [[np.nan, 1.0]])
    assert math.isnan(evaluate(torch.nn.Identity(), [(x, y * 0 - 100)]).average_accuracy)
    images = torch.rand(5, 3, 4, 6)
    masks = images.argmax(1)
    masks[0, 0], masks[1, 1] = 255, (masks[1, 1] + 1) % 3
    assert evaluate(torch.nn.Identity(), [(images, masks)], ignore_index=255).matrix.tolist() == [[108 / 114]]
    with pytest.raises(ArgumentError, match="a target is 255, but the model has classes 0 to 2; give ignore_index="):
        evaluate(torch.nn.Identity(), [(images, masks)])
    ones = (images[:, :1] > 0.5).float()
    assert evaluate(torch.nn.Identity(), [(images[:, :1], ones)], threshold=0.5).matrix.tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None, [(X, Y)]), {}, "model must be a torch.nn.Module, got NoneType"),
        ((torch.nn.Linear(2, 2), (X, Y)), {}, r"give a list of that one"),
        ((torch.nn.Linear(2, 2), []), {}, "at least one"),
        ((torch.nn.Linear(2, 2), X), {}, "tasks must be a list of datasets"),
        ((torch.nn.Linear(2, 2), [X[:0]]), {}, r"tasks\[0\] has no samples"),
        ((torch.nn.Linear(2, 2), [(X, Y), (X, Y[:2])]), {}, r"tasks\[1\]: x has 3 samples, y has 2"),
        ((torch.nn.Linear(2, 2), [Endless()]), {}, r"tasks\[0\] must be a dataset .* got Endless"),
        ((torch.nn.Linear(2, 2), [{"x": X}]), {}, r"tasks\[0\] must be a dataset .* got dict"),
        ((torch.nn.Linear(2, 2), [3]), {}, r"tasks\[0\] must be a dataset"),
        ((torch.nn.Linear(2, 2), [list(X)]), {}, r"tasks\[0\]: expected pairs"),
        ((torch.nn.Linear(2, 2), [(X, Y.float())]), {}, "targets, got outputs of shape"),
        ((torch.nn.Linear(2, 2), [(X, X.long())]), {}, "n integers as targets"),
        ((torch.nn.Linear(2, 1), [(X, Y)]), {}, "needs threshold=0.0 if it is a logit, 0.5"),
        ((torch.nn.Linear(2, 1), [(X, Y[:, None])]), {}, "needs threshold=0.0"),
        ((torch.nn.Flatten(0), [(X[:, 0], Y)]), {}, "needs threshold=0.0"),
        ((torch.nn.Linear(2, 1), [(X, Y + 0.5)]), {"threshold": 0}, "not all of them 0 or 1"),
        ((torch.nn.Linear(2, 1), [(X, Y + math.nan)]), {"threshold": 0}, "not all of them 0 or 1"),
        ((torch.nn.Linear(2, 1), [(X, Y + 2)]), {"threshold": 0}, "a target is 2, but the model has classes 0 to 1"),
        ((torch.nn.Linear(2, 2), [(X, Y)]), {"threshold": 0}, "one output a sample needs"),
        ((torch.nn.Linear(2, 3), [(X, torch.zeros(3, 3).bool())]), {"threshold": 0}, "n integers as targets"),
        ((torch.nn.Linear(2, 2), [(X, Y + 0j)]), {}, "n integers as targets, .*complex"),
        ((torch.nn.Identity(), [(X + 0j, Y)]), {}, "n integers as targets, got outputs of shape"),
        ((torch.nn.Identity(), [(X[:, :1] + 0j, Y)]), {"threshold": 0}, "n integers as targets, got outputs of shape"),
        ((torch.nn.Linear(2, 2), [(X, Y + 2)]), {}, "a target is 2, but the model has classes 0 to 1.* ignore_index="),
        ((torch.nn.Linear(2, 2), [(X, Y - 1)]), {}, "a target is -1"),
        ((torch.nn.Linear(2, 2), [(X, Y - 100)]), {"ignore_index": None}, "a target is -100"),
        ((torch.nn.Linear(2, 2), [(X, Y - 100)]), {"ignore_index": 0.5}, "ignore_index must be an integer"),
        ((torch.nn.Linear(2, 2), [(X, Y)]), {"threshold": "half"}, "threshold must be a number"),
        ((Several(), [(X, Y)]), {}, "needs one tensor of outputs .* tuple"),
        ((torch.nn.Flatten(0), [(X, Y)]), {}, r"tasks\[0\]: .* n being 3, .* got torch.float32 of shape \(6,\)"),
        ((torch.nn.Linear(2, 2), [(X, Y)]), {"collate_fn": lambda s: ("a", "b")}, "expected tensors of inputs"),
        ((torch.nn.Linear(2, 2), [(X, Y)]), {"collate_fn": lambda s: X}, "the collate function gave Tensor"),
        ((torch.nn.Linear(2, 2), [(X, Y)]), {"collate_fn": 3}, "collate_fn must be a function"),
        ((torch.nn.Linear(2, 2), [(X, Y)]), {"transform": 3}, "transform must be a function"),
        ((torch.nn.Linear(2, 2), [(X, Y)]), {"target_transform": "a"}, "target_transform must be a function"),
        ((torch.nn.Linear(2, 2), [(X, Y)]), {"device": "nowhere"}, "device: "),
        ((torch.nn.Linear(2, 2), [(np.array(["a", "b"]), Y[:2])]), {}, r"tasks\[0\]: not an array that torch takes"),
        ((torch.nn.Linear(2, 2), [[(X[0], 0), (X[0, :1], 0)]]), {}, r"tasks\[0\]: its samples do not make a batch.*collate"),
        ((torch.nn.Linear(2, 2), [[(X[0], None)]]), {}, r"tasks\[0\]: its samples do not make a batch"),
        ((torch.nn.Linear(2, 2), [(X, Y)]), {"target_transform": lambda y: "a"}, "target_transform: its results cannot be stacked"),
        ((torch.nn.Linear(2, 2), [(X, Y)]), {"batch_size": 0}, "batch_size must be from 1"),
        ((torch.nn.Linear(2, 2), [(X, Y)], [[0.5]]), {}, "previous must be what evaluate returned"),
        ((torch.nn.Linear(2, 2), [(X, Y)], Evaluation([[0.5]])), {}, "evaluate once after each task"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(ArgumentError, match=message):
        evaluate(*arguments, **options)


# -- the picture ---------------------------------------------------------------------------------------------------------


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "matrix.png"
    figure = plot.accuracy_matrix(Evaluation([[0.925, math.nan], [0.5, 0.8]]), path, names=["cats", "dogs"])
    assert path.read_bytes().startswith(b"\x89PNG")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["92.5", "50.0", "80.0"]
    assert [(text.get_position()) for text in axes.texts] == [(0, 0), (0, 1), (1, 1)]  # column, row
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["cats", "dogs"]
    assert axes.get_title() == "65.0% on average" and axes.get_xlabel() == "tested on task"
    np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan), [[92.5, np.nan], [50, 80]])


@pytest.mark.parametrize(("evaluation", "options"), [([[1.0]], {}), (Evaluation([[1.0, 0.0]]), {"names": ["a"]})])
def test_no_picture(evaluation, options):
    with pytest.raises(ArgumentError):
        plot.accuracy_matrix(evaluation, **options)


def test_no_file_for_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ArgumentError, match="path must be a str"):
        plot.accuracy_matrix(Evaluation([[1.0]]), 3)
    with pytest.raises(ArgumentError, match=r"matrix\.foo.*is not supported"):
        plot.accuracy_matrix(Evaluation([[1.0]]), tmp_path / "matrix.foo")
    with pytest.raises(StorageError, match="create the folder first"):
        plot.accuracy_matrix(Evaluation([[1.0]]), tmp_path / "none" / "matrix.png")


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LeanReplayError, match="pip install matplotlib"):
        plot.accuracy_matrix(Evaluation([[1.0]]))


def test_importing_is_light():
    """matplotlib is imported when something is drawn, not before."""
    program = "import sys, leanreplay.torch.plot; print('matplotlib' in sys.modules)"
    assert Script(program).communicate(60) == ("False\n", "")
