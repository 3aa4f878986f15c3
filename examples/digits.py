"""Data of the other examples: images of the digits 0 to 9, as five tasks of two digits each."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

TASKS = 5
Images = tuple[torch.Tensor, torch.Tensor]


def load(folder: Path | None) -> tuple[Images, Images]:
    """(x, y) for training and for testing: x (n, 1, height, width) from 0 to 1, y (n,).

    folder: MNIST as IDX files, .gz or not; None: the small digits that come with scikit-learn.
    """
    if folder is not None:
        return _mnist(folder, "train"), _mnist(folder, "t10k")
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.from_numpy(found.images).float()[:, None] / 16, torch.from_numpy(found.target).long()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(y)))  # the split is the same for every seed
    test, train = order[:450], order[450:]
    return (x[train], y[train]), (x[test], y[test])


def _mnist(folder: Path, part: str) -> Images:
    arrays = []
    for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
        path = folder / f"{name}.gz"
        raw = gzip.decompress(path.read_bytes()) if path.exists() else (folder / name).read_bytes()
        shape = np.frombuffer(raw, ">i4", raw[3], 4)
        arrays.append(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape))
    return torch.tensor(arrays[0])[:, None] / 255, torch.tensor(arrays[1]).long()


def split(x: torch.Tensor, y: torch.Tensor) -> Iterator[Images]:
    """The five tasks: digits 0 and 1, then 2 and 3, and so on."""
    for task in range(TASKS):
        rows = y // 2 == task
        yield x[rows], y[rows]


@torch.no_grad()
def accuracies(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """Percent of right answers on every task, among all ten digits."""
    device = next(model.parameters()).device
    right = (model(x.to(device)).argmax(1).cpu() == y).double()
    return [100 * right[y // 2 == task].mean().item() for task in range(TASKS)]


def table(found: list[float]) -> str:
    """Accuracies in one line."""
    parts = [f"{2 * task}/{2 * task + 1}: {a:.0f}%" for task, a in enumerate(found)]
    return f"accuracy on digits {', '.join(parts)}; average: {sum(found) / TASKS:.1f}%"
