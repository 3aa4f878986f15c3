"""A picture of an accuracy matrix. Needs matplotlib, which is imported when it is drawn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arguments import instance
from ..errors import ArgumentError
from ..plot import new_figure, saved
from .training.evaluation import Evaluation


def accuracy_matrix(
    evaluation: Evaluation, path: str | os.PathLike[str] | None = None, *, names: Sequence[str] | None = None, title: str | None = None
) -> Any:
    """Draw the accuracy on each task (columns) after each task (rows), in percent; returns matplotlib's Figure.

    path: where to save it, as what the ending says (.png, .pdf, .svg). names: of the tasks. title: default: the average accuracy.
    No window is opened and no backend chosen: the figure can also be shown in a notebook, or saved later.
    """
    instance(evaluation, Evaluation, "evaluation must be what evaluate returned")
    rows, tasks = evaluation.matrix.shape
    labels = [str(j) for j in range(tasks)] if names is None else [str(name) for name in names]
    if len(labels) != tasks:
        raise ArgumentError(f"names has {len(labels)} entries for {tasks} tasks; give one for each")
    figure = new_figure(1.8 + 0.7 * tasks, 1.4 + 0.7 * rows)
    axes = figure.add_subplot()
    image = axes.imshow(100 * evaluation.matrix, vmin=0, vmax=100, cmap="viridis")
    for (i, j), value in np.ndenumerate(100 * evaluation.matrix):
        if not np.isnan(value):
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if value < 60 else "black")
    axes.set_xticks(range(tasks), labels)
    axes.set_yticks(range(rows), labels[:rows])
    axes.set(xlabel="tested on task", ylabel="after training on task")
    axes.set_title(f"{100 * evaluation.average_accuracy:.1f}% on average" if title is None else title)
    figure.colorbar(image, ax=axes, label="accuracy %")
    return saved(figure, path)
