"""How well a model does on each task, after each task."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...arguments import LARGEST, function_or_none, instance, integer, integers, number, required
from ...arrays import Ints
from ...errors import ArgumentError
from .. import nests
from ..data import Transforms, device_named
from ..distributed import unwrapped
from ..models import ForwardFunction, run_model, single
from .reading import Reader


class Evaluation:
    """Accuracies a[i, j] on task j after learning task i, and what the literature makes of them.
    All are fractions from 0 to 1.

    matrix: (rows, tasks), a row for each call of `evaluate`, NaN where a task was not evaluated.
    Row i is meant to be taken after the i-th task in the order of columns; there are at most as
    many rows as columns. To keep one: `evaluation.matrix.tolist()`.

    >>> from leanreplay.torch import Evaluation
    >>> evaluation = Evaluation([[0.9, 0.1, 0.0], [0.6, 0.8, 0.1], [0.5, 0.7, 0.9]])
    >>> round(evaluation.average_accuracy, 3), round(evaluation.forgetting, 3), round(evaluation.backward_transfer, 3)
    (0.7, 0.25, -0.25)
    """

    def __init__(self, matrix: Any) -> None:
        try:
            self.matrix = np.array(matrix, np.float64)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"matrix must be rows of accuracies, one for each task: {error}") from None
        if self.matrix.ndim != 2 or not 1 <= self.matrix.shape[0] <= self.matrix.shape[1]:
            raise ArgumentError(
                f"matrix must have a column for each task, and from one row to as many as columns, got shape {self.matrix.shape}; "
                "evaluate once after each task"
            )
        if np.any((self.matrix < 0) | (self.matrix > 1)):
            raise ArgumentError(
                f"matrix must hold accuracies as fractions from 0 to 1, got {np.nanmin(self.matrix):g} to {np.nanmax(self.matrix):g}; "
                "divide percentages by 100"
            )
        self.matrix.setflags(write=False)

    @property
    def average_accuracy(self) -> float:
        """Mean of the last row, over the tasks evaluated in it.

        With all T tasks learned this is ACC of Lopez-Paz and Ranzato 2017, 1/T * sum_j a[T, j]. For
        A_k of Chaudhry et al. 2018 in between (the mean over the k tasks learned so far), evaluate
        on those: `evaluate(model, tasks[:k], previous)`.
        """
        last = self.matrix[-1]
        return math.nan if np.isnan(last).all() else float(np.nanmean(last))

    @property
    def forgetting(self) -> float:
        """F_k of Chaudhry et al. 2018 ("Riemannian Walk for Incremental Learning"), k being the
        number of rows; NaN for k = 1.

        F_k = 1/(k-1) * sum over j < k of (max over l < k of a[l, j] - a[k, j]): how far tasks
        before the last one lie below their best so far. From -1 to 1, lower is better. Rows that
        lack a task do not count for its maximum.
        """
        earlier, last = self._past()
        return float(np.mean([np.nanmax(column) - now for column, now in zip(earlier.T, last, strict=True)])) if last.size else np.nan

    @property
    def backward_transfer(self) -> float:
        """BWT of Lopez-Paz and Ranzato 2017 ("Gradient Episodic Memory"), after k tasks, k being
        the number of rows; NaN for k = 1.

        BWT = 1/(k-1) * sum over i < k of (a[k, i] - a[i, i]): what later tasks did to earlier ones.
        From -1 to 1, higher is better.
        """
        earlier, last = self._past()
        return float(np.mean(last - np.diagonal(earlier))) if last.size else np.nan

    def _past(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Of the tasks before the last one: all rows but the last, (k-1, k-1), and the last one,
        (k-1,)."""
        k = self.matrix.shape[0]
        past = self.matrix[:, : k - 1]
        missing = [j for j in range(k - 1) if np.isnan(past[j, j]) or np.isnan(past[-1, j])]
        if missing:
            raise ArgumentError(
                f"task {missing[0]} was not evaluated right after it was learned and in the last row; evaluate all tasks so far"
            )
        return past[:-1], past[-1]

    def __repr__(self) -> str:
        k, tasks = self.matrix.shape
        return (
            f"Evaluation({k} of {tasks} tasks, average_accuracy={self.average_accuracy:.4f}, forgetting={self.forgetting:.4f}, "
            f"backward_transfer={self.backward_transfer:.4f})"
        )


def evaluate(
    model: torch.nn.Module,
    tasks: Sequence[Any],
    previous: Evaluation | None = None,
    *,
    batch_size: int = 256,
    transform: Callable[[Any], Any] | None = None,
    target_transform: Callable[[Any], Any] | None = None,
    batch_transform: Callable[[Any], Any] | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    label: str | None = None,
    forward: ForwardFunction | None = None,
    ignore_index: int | None = -100,
    threshold: float | None = None,
    mask: Sequence[Sequence[int]] | None = None,
    device: torch.device | str | None = None,
) -> Evaluation:
    """The accuracy of a model on each of a list of tasks, as a new row below the rows of
    `previous`.

    tasks: a list of datasets, as `train_dataset` of `fit`: map-style ones of pairs (x, y), or pairs
    of tensors or arrays; label: of dicts, whose entry of this name is y. The first k of all tasks
    will do, too: the row has NaN for the rest. forward: a function of (model, x), as a learner has
    it. The model gives (n, classes), or (n, classes, ...) for targets (n, ...), segmentation say;
    its answer is the largest of all classes, and each target counts as much as another.
    mask: for each task its classes, among which the answer then is (task-incremental learning).
    ignore_index: targets of this value do not count, as in torch's cross_entropy; None: there is
    none. A task of such targets only has NaN.
    threshold: for a model that gives one number a sample, (n,) or (n, 1), and targets 0 and 1: its
    answer is 1 where that is larger. There is no default: it is 0.0 for logits, and 0.5 for
    probabilities.
    transform, target_transform: of the x and of the y of each sample, as tensors, like those of a
    learner; then batch_transform, of the x of a batch, (n, ...). collate_fn: of a list of samples,
    gives (x, y). device: where the model goes, and stays; default: where its first parameter is.

    The model runs in eval mode and without gradients, and is left in the mode it was in. Costs one forward pass
    over all samples. Raises ArgumentError for tasks, outputs or targets of another kind, and for
    targets that are no class of the model's.

    >>> import torch
    >>> from leanreplay.torch import evaluate
    >>> x, model = torch.eye(4), torch.nn.Identity()
    >>> first = evaluate(model, [(x, torch.arange(4)), (x, torch.zeros(4, dtype=torch.int64))])
    >>> evaluate(model, [(x, torch.tensor([0, 1, 0, 0])), (x, torch.arange(4))], first)
    Evaluation(2 of 2 tasks, average_accuracy=0.7500, forgetting=0.5000, backward_transfer=-0.5000)
    """
    instance(model, torch.nn.Module, "model must be a torch.nn.Module")
    if previous is not None and not isinstance(previous, Evaluation):
        raise ArgumentError(f"previous must be what evaluate returned for the tasks before, got {type(previous).__name__}")
    if not isinstance(tasks, (list, tuple)) or not tasks:
        raise ArgumentError(f"tasks must be a list of datasets, at least one, got {type(tasks).__name__} {tasks!r:.100}")
    if isinstance(tasks, tuple) and any(isinstance(task, (torch.Tensor, np.ndarray)) for task in tasks):
        raise ArgumentError("tasks is a pair of arrays; for a single task give a list of that one: [(x, y)]")
    functions = {
        "transform": transform, "target_transform": target_transform, "batch_transform": batch_transform, "collate_fn": collate_fn,
        "forward": forward,
    }  # fmt: skip
    for name, function in functions.items():
        function_or_none(name, function)
    required("batch_size", batch_size, 1, 2**40)
    integer("ignore_index", ignore_index, -(2**63), 2**63 - 1)
    if threshold is not None:
        number("threshold", threshold, -LARGEST, wanted="a number, 0.0 for logits and 0.5 for probabilities")
    if mask is not None and (not isinstance(mask, (list, tuple)) or len(mask) != len(tasks) or threshold is not None):
        raise ArgumentError(f"mask is a list of the classes of each task, {len(tasks)} lists, and needs no threshold; got {mask!r:.200}")
    masks = [None if mask is None else integers(mask[i], len(mask[i]), f"mask[{i}]") for i in range(len(tasks))]
    readers = [
        Reader(f"tasks[{i}]", task, collate_fn, Transforms(transform, target_transform, batch_transform, f"tasks[{i}]: "), label)
        for i, task in enumerate(tasks)
    ]
    place = device_named(device)
    model = unwrapped(model if place is None else model.to(place))
    row = []
    with evaluating(model):
        for reader, classes in zip(readers, masks, strict=True):
            batches = predictions(model, reader, np.arange(len(reader)), batch_size, device_of(model), forward)
            row.append(_accuracy(batches, reader.name, ignore_index, threshold, classes))
    rows = [] if previous is None else previous.matrix.tolist()
    width = max(map(len, [*rows, row]))
    return Evaluation([r + [np.nan] * (width - len(r)) for r in [*rows, row]])


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model's first parameter is."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode, without gradients; afterwards every module is in the mode that it was in."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, training in modes:
            m.training = training


def predictions(
    model: torch.nn.Module,
    reader: Reader,
    indices: Ints,
    batch_size: int,
    device: torch.device,
    forward: ForwardFunction | None,
) -> Iterator[tuple[Any, Any]]:
    """(outputs, targets) of each batch, on the device. To be used within `evaluating`."""
    for start in range(0, len(indices), batch_size):
        x, y = nests.placed(reader.batch(indices[start : start + batch_size]), device)
        try:
            yield run_model(model, x, forward), y
        except ArgumentError as error:
            raise ArgumentError(f"{reader.name}: {error}") from error


def _accuracy(batches: Iterator[tuple[Any, Any]], name: str, ignored: int | None, threshold: float | None, classes: Ints | None) -> float:
    """The share of right answers among the targets that count; NaN if none does. classes: to choose
    among; None: all."""
    right, counted, low, high, most = 0, 0, 0, 0, 2
    for batch in batches:
        outputs, targets = (single(values, name) for values in batch)
        answers, most = _answers(name, outputs, targets, threshold, classes)
        labels = targets.reshape(answers.shape).long()
        counts = torch.ones_like(labels, dtype=torch.bool) if ignored is None else labels != ignored
        if targets.is_floating_point() and not bool((labels == targets.reshape(answers.shape)).all()):
            raise ArgumentError(f"{name}: targets are {targets.dtype}, but not all of them 0 or 1; give classes")
        found = torch.stack([*torch.aminmax(labels * counts), ((answers == labels) & counts).sum(), counts.sum()]).tolist()
        low, high, right, counted = min(low, found[0]), max(high, found[1]), right + found[2], counted + found[3]
    if low < 0 or high >= most:
        raise ArgumentError(
            f"{name}: a target is {low if low < 0 else high}, but the model has classes 0 to {most - 1}; give ignore_index= for "
            "targets that do not count, map them with target_transform, or evaluate the tasks that it has learned: tasks[:k]"
        )
    return right / counted if counted else math.nan


def _answers(
    name: str, outputs: torch.Tensor, targets: torch.Tensor, threshold: float | None, classes: Ints | None
) -> tuple[torch.Tensor, int]:
    """The model's answer for each target, and how many classes it has. NaN answers nothing (-1): it
    would be class 0 otherwise."""
    shape, kinds = outputs.shape[:1] + outputs.shape[2:], f"outputs of shape {tuple(outputs.shape)} and {targets.dtype} targets of shape"
    column = outputs.ndim == 1 or outputs.shape[1] == 1
    if threshold is not None and column and not (targets.is_complex() or outputs.is_complex()) and targets.shape in (shape, outputs.shape):
        value = outputs.reshape(shape)
        return (value > threshold).long().masked_fill(value.isnan(), -1), 2
    numbers = not targets.is_floating_point() and not targets.is_complex() and not outputs.is_complex()
    if column or threshold is not None or targets.shape != shape or not numbers:
        raise ArgumentError(
            f"{name}: expected outputs (n, classes) and n integers as targets, got {kinds} {tuple(targets.shape)}; one output a sample "
            "needs threshold=0.0 if it is a logit, 0.5 if it is a probability, and several need none"
        )
    if classes is None:
        most, answers = outputs.max(1)
    else:
        if not len(classes) or classes.min() < 0 or classes.max() >= outputs.shape[1]:
            raise ArgumentError(f"{name}: its mask is {classes.tolist()!r:.200}, but the model has classes 0 to {outputs.shape[1] - 1}")
        among = torch.from_numpy(classes).to(outputs.device)
        most, answers = outputs[:, among].max(1)
        answers = among[answers]
    return answers.masked_fill(most.isnan(), -1), outputs.shape[1]
