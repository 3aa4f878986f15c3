"""Experience replay on Split-MNIST beside Avalanche: one epoch over five tasks of two classes, wall clock.

Both train the same MLP (784-100-100-10 for MNIST) from the same start with SGD on the same tensors in memory, batches of 10 from the
stream and 10 from a buffer of 500, one thread. Ours is a reservoir on disk that is drawn from at every step; Avalanche's plugin keeps its
buffer in memory, changes it between tasks, and replays from the second task on, so its first task costs it half a batch.
"""

from __future__ import annotations

import importlib.util
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

import leanreplay
from benchmarks import rivals
from benchmarks.compare import Calls, Line, Lines, Options, WrongError, compare
from leanreplay.torch import ERLearner

_BATCH, _ROWS, _TASKS = 10, 500, 5


def example() -> Any:
    """The module examples/split_digits.py, which reads the data."""
    path = Path(__file__).resolve().parent.parent / "examples" / "split_digits.py"
    spec = importlib.util.spec_from_file_location("split_digits", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model(pixels: int) -> torch.nn.Module:
    """The same MLP each time."""
    torch.manual_seed(0)
    hidden = [torch.nn.Linear(pixels, 100), torch.nn.ReLU(), torch.nn.Linear(100, 100), torch.nn.ReLU()]
    return torch.nn.Sequential(*hidden, torch.nn.Linear(100, 2 * _TASKS))


def split_mnist(o: Options) -> Lines:
    """Train both, in turn; each must end well above chance."""
    x, y, x_test, y_test = example().load_data(o.data)
    x, x_test = (a.flatten(1).float() / 255 for a in (x, x_test))
    if o.quick and o.data is not None:
        x, y = x[:3_000], y[:3_000]
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(y)))
    tasks = [order[y[order] // 2 == task] for task in range(_TASKS)]
    parts = [(x[rows], y[rows]) for rows in tasks]
    accuracy: dict[str, list[float]] = {}

    def check(name: str, net: torch.nn.Module) -> None:
        with torch.no_grad():
            right = 100 * (net(x_test).argmax(1) == y_test).float().mean().item()
        accuracy.setdefault(name, []).append(right)
        if right < 30:  # fine-tuning alone ends near 20: the last task
            raise WrongError(f"{name}: {right:.0f}% of the test images after all tasks")

    def ours() -> float:
        net = model(x.shape[1])
        with leanreplay.ReservoirBuffer(_ROWS, os.path.join(o.folder, "replay.h5"), mode="w") as buffer:
            learner = ERLearner(net, torch.optim.SGD(net.parameters(), lr=0.1), buffer, alpha=None, replay_batch_size=_BATCH)
            start = time.perf_counter()
            for xs, ys in parts:
                for xb, yb in zip(xs.split(_BATCH), ys.split(_BATCH), strict=True):
                    learner.step(xb, yb)
            taken = time.perf_counter() - start
            if buffer.seen != len(y) or len(buffer) != min(_ROWS, len(y)):
                raise WrongError(f"the buffer saw {buffer.seen} of {len(y)} samples")
        check("ours", net)
        return taken

    def bare() -> float:
        """What no library can be faster than: the same steps of torch, on batches of twice the size that are there already."""
        net = model(x.shape[1])
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        start = time.perf_counter()
        for xs, ys in parts:
            for xb, yb in zip(xs.split(_BATCH), ys.split(_BATCH), strict=True):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(net(torch.cat([xb, xb])), torch.cat([yb, yb]))
                loss.backward()
                optimizer.step()
        return time.perf_counter() - start

    calls: Calls = {"ours": ours, "torch alone, without a buffer": bare}
    if rivals.why_not("avalanche") is None:
        calls["avalanche"] = _avalanche(parts, x.shape[1], check)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data = "MNIST" if o.data is not None else "scikit-learn's digits"
        wanted = {"avalanche": 5.0, "torch alone, without a buffer": None}
        lines = compare(f"ER, {data}, {len(y):,} samples once, MLP, batch 10 + 10", calls, wanted, 1 if o.quick else 5, 90)
    finally:
        torch.set_num_threads(threads)
    note = "accuracy: " + ", ".join(f"{name} {np.mean(a):.0f}%" for name, a in accuracy.items())
    return [replace(line, note=note) if isinstance(line, Line) and line.rival == "avalanche" else line for line in lines]


def _avalanche(parts: list[tuple[Any, Any]], pixels: int, check: Callable[[str, torch.nn.Module], None]) -> Callable[[], float]:
    """The same with Naive and ReplayPlugin, without metrics and loggers."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.training import Naive
    from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin

    datasets = []
    for xs, ys in parts:
        data = TensorDataset(xs, ys)
        data.targets = ys.tolist()  # type: ignore[attr-defined]
        datasets.append(as_classification_dataset(data))
    benchmark = benchmark_from_datasets(train=datasets)

    def run() -> float:
        net = model(pixels)
        with warnings.catch_warnings(record=True):
            strategy = Naive(
                model=net,
                optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
                criterion=torch.nn.CrossEntropyLoss(),
                train_mb_size=_BATCH,
                train_epochs=1,
                plugins=[ReplayPlugin(mem_size=_ROWS, batch_size=_BATCH, batch_size_mem=_BATCH)],
                evaluator=EvaluationPlugin(),
            )
            start = time.perf_counter()
            for experience in benchmark.train_stream:
                strategy.train(experience)
            taken = time.perf_counter() - start
        check("avalanche", net)
        return taken

    return run
