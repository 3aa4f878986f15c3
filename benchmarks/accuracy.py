"""Published accuracies on MNIST, with the library's own learners and a buffer on disk: `python -m benchmarks.accuracy --data DIR --all`.

    python -m benchmarks.accuracy --data DIR --setting s-mnist --method er --buffer 200 --seeds 5

DIR holds the four IDX files of MNIST. The protocol is that of the authors of Dark Experience Replay (Buzzega et al., NeurIPS 2020),
whose results and settings stand here, and those of CLS-ER from its own authors (Arani et al., ICLR 2022): a 784-100-100-10 network,
one epoch, SGD without momentum, a reservoir. The score is the mean over tasks of the test accuracy after the last one.

s-mnist: five tasks of two digits each, one head for all ten. p-mnist: all digits under 20 random permutations of the pixels.

A cell passes if the mean over the seeds is no more than 1.5 points below the published one (CLS-ER: 1; plain SGD on s-mnist: within
2 points of it). With --all a cell that misses gets 15 more seeds. Runs that are done are kept in the output folder, so
an interrupted command goes on; other code or other data start anew. Nothing here was chosen by a result on the test images.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import leanreplay
from benchmarks.common import machine, table, write_section
from leanreplay import ReservoirBuffer
from leanreplay.torch import CLSLearner, DERLearner, ERLearner

MORE_SEEDS = 15  # for a cell that misses
Data = dict[str, torch.Tensor]
Results = dict[str, dict[str, Any]]  # cell -> seed -> {"accuracy", "seconds"}


# -- what was published --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One published figure, and the settings that its authors chose. weights: alpha and beta of the losses, as in the paper."""

    setting: str
    method: str
    buffer: int | None
    published: float
    lr: float
    replay: int = 0
    weights: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"{self.setting} {self.method}" + (f" {self.buffer}" if self.buffer else "")

    @property
    def batch_size(self) -> int:
        return {"s-mnist": 10, "p-mnist": 128}[self.setting]

    def passed(self, mean: float) -> bool:
        if (self.setting, self.method) == ("s-mnist", "sgd"):
            return abs(mean - self.published) <= 2.0
        return mean >= self.published - (1.0 if self.method == "cls-er" else 1.5)


CELLS = [
    Cell("s-mnist", "sgd", None, 19.60, lr=0.03),
    Cell("s-mnist", "er", 200, 80.43, lr=0.01, replay=10),
    Cell("s-mnist", "er", 500, 86.12, lr=0.1, replay=10),
    Cell("s-mnist", "der", 200, 84.55, lr=0.03, replay=10, weights=(0.2,)),
    Cell("s-mnist", "der", 500, 90.54, lr=0.03, replay=128, weights=(1.0,)),
    Cell("s-mnist", "der++", 200, 85.61, lr=0.03, replay=128, weights=(0.2, 1.0)),
    Cell("s-mnist", "der++", 500, 91.00, lr=0.03, replay=10, weights=(1.0, 0.5)),
    Cell("s-mnist", "cls-er", 500, 92.05, lr=0.1, replay=32, weights=(2.0,)),
    Cell("p-mnist", "sgd", None, 40.70, lr=0.2),
    Cell("p-mnist", "er", 200, 72.37, lr=0.2, replay=128),
    Cell("p-mnist", "er", 500, 80.60, lr=0.2, replay=128),
    Cell("p-mnist", "der", 200, 81.74, lr=0.2, replay=128, weights=(1.0,)),
    Cell("p-mnist", "der", 500, 87.29, lr=0.2, replay=128, weights=(1.0,)),
    Cell("p-mnist", "der++", 200, 83.58, lr=0.1, replay=128, weights=(1.0, 1.0)),
    Cell("p-mnist", "der++", 500, 88.21, lr=0.2, replay=128, weights=(1.0, 0.5)),
]


# -- one run -------------------------------------------------------------------------------------------------------------------


class Plain:
    """No replay at all."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        cross_entropy(self.model(x), y).backward()
        self.optimizer.step()


def make_learner(cell: Cell, model: torch.nn.Module, optimizer: torch.optim.Optimizer, buffer: ReservoirBuffer, seed: int) -> Any:
    """The learner of a cell. The papers' losses are plain weighted sums, without normalisation."""
    options: dict[str, Any] = {"replay_batch_size": cell.replay, "loss_normalization": False, "seed": seed}
    if cell.method == "er":
        return ERLearner(model, optimizer, buffer, alpha=None, **options)
    if cell.method == "cls-er":
        return CLSLearner(
            model, optimizer, buffer, alpha=None, beta=cell.weights[0],
            stable_model_update_weight=0.99, plastic_model_update_weight=0.99,
            stable_model_update_probability=0.9, plastic_model_update_probability=1.0, **options,
        )  # fmt: skip
    alpha, beta = (*cell.weights, 0.0)[:2]
    return DERLearner(model, optimizer, buffer, alpha=alpha, beta=beta, **options)


class Scale(torch.nn.Module):
    """Bytes to numbers from 0 to 1: so that the buffer holds bytes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 255


def make_model(seed: int) -> torch.nn.Module:
    """The network of both settings: Xavier uniform weights, zero bias."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.nn.Linear(784, 100), torch.nn.Linear(100, 100), torch.nn.Linear(100, 10)]
    for layer in layers:
        torch.nn.init.xavier_uniform_(layer.weight, generator=generator)
        torch.nn.init.zeros_(layer.bias)
    return torch.nn.Sequential(Scale(), layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])


def tasks(setting: str, data: Data, seed: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """(x, y, x_test, y_test) of each task; the training part in the order of the stream, a function of the seed."""
    for task in range(5 if setting == "s-mnist" else 20):
        rng = np.random.default_rng([seed, task])
        if setting == "s-mnist":
            train, test = (torch.nonzero(data[y] // 2 == task)[:, 0] for y in ("y", "y_test"))
            order = train[torch.from_numpy(rng.permutation(len(train)))]
            yield data["x"][order], data["y"][order], data["x_test"][test], data["y_test"][test]
        else:
            pixels, order = rng.permutation(784), torch.from_numpy(rng.permutation(len(data["y"])))
            x, x_test = (torch.from_numpy(np.take(part.numpy(), pixels, axis=1)) for part in (data["x"][order], data["x_test"]))
            yield x, data["y"][order], x_test, data["y_test"]


@torch.no_grad()
def accuracy(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Percent of right answers, among all ten."""
    return 100 * (model(x).argmax(1) == y).double().mean().item()


def run(cell: Cell, seed: int, data: Data, folder: Path) -> float:
    """Train once through the whole stream; the mean over tasks of the test accuracy at the end."""
    model = make_model(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=cell.lr)
    with ExitStack() as stack:
        if cell.buffer is None:
            learner: Any = Plain(model, optimizer)
        else:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder))) / "replay.h5"
            learner = make_learner(cell, model, optimizer, stack.enter_context(ReservoirBuffer(cell.buffer, path, seed=seed)), seed)
        tests = []
        for x, y, *test in tasks(cell.setting, data, seed):
            for batch in zip(x.split(cell.batch_size), y.split(cell.batch_size), strict=True):
                learner.step(*batch)
            tests.append(test)
    scored = learner.stable_model if cell.method == "cls-er" else model
    return float(np.mean([accuracy(scored, *test) for test in tests]))


# -- data ----------------------------------------------------------------------------------------------------------------------


def read_idx(folder: Path, name: str) -> np.ndarray[Any, Any]:
    """One IDX file of unsigned bytes, compressed or not."""
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.exists()), None)
    if path is None:
        raise SystemExit(f"{folder} holds neither {name}.gz nor {name}")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def load(folder: Path) -> Data:
    """x (n, 784) bytes and y (n,), x_test and y_test likewise."""
    folder = folder / "mnist" if (folder / "mnist").is_dir() else folder
    data = {}
    for end, part in (("", "train"), ("_test", "t10k")):
        images, labels = read_idx(folder, f"{part}-images-idx3-ubyte"), read_idx(folder, f"{part}-labels-idx1-ubyte")
        if images.shape != (len(labels), 28, 28) or set(labels.tolist()) != set(range(10)):
            raise SystemExit(f"{folder}: {part} images of shape {images.shape} with labels {sorted(set(labels.tolist()))} are not MNIST")
        data["x" + end], data["y" + end] = torch.tensor(images).flatten(1), torch.tensor(labels).long()
    return data


# -- many runs -----------------------------------------------------------------------------------------------------------------


def fingerprint(data: Data) -> str:
    """Of the data, and of all code that has a say in a result."""
    found = hashlib.blake2b(digest_size=16)
    for path in [Path(__file__), *sorted(Path(leanreplay.__file__).parent.rglob("*.py"))]:
        found.update(path.read_bytes())
    for name in sorted(data):
        found.update(data[name].numpy().tobytes())
    return found.hexdigest()


class Finished:
    """Results of finished runs, in a file that is replaced as a whole after each."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.results: Results = {}
        if path.exists():
            found = json.loads(path.read_text())
            if found["fingerprint"] == fingerprint:
                self.results = found["results"]
            else:
                print(f"{path} holds results of other code or data; starting anew")

    def add(self, cell: Cell, seed: int, accuracy: float, seconds: float) -> None:
        self.results.setdefault(str(cell), {})[str(seed)] = {"accuracy": accuracy, "seconds": seconds}
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(json.dumps({"fingerprint": self.fingerprint, "results": self.results}, indent=1))
        os.replace(new, self.path)

    def of(self, cell: Cell, seeds: int) -> list[dict[str, float]]:
        """Those of a cell's first seeds that are there."""
        found = self.results.get(str(cell), {})
        return [found[str(seed)] for seed in range(seeds) if str(seed) in found]


_DATA: Data = {}  # of a worker process


def _start(folder: Path) -> None:
    torch.set_num_threads(1)
    _DATA.update(load(folder))


def _run(cell: Cell, seed: int, folder: Path) -> tuple[float, float]:
    start = time.perf_counter()
    return run(cell, seed, _DATA, folder), time.perf_counter() - start


def run_missing(wanted: list[tuple[Cell, int]], finished: Finished, options: argparse.Namespace) -> None:
    """Those of the wanted (cell, seed) that are not finished, several processes side by side."""
    todo = [(cell, seed) for cell, seed in wanted if str(seed) not in finished.results.get(str(cell), {})]
    todo.sort(key=lambda job: job[0].setting == "s-mnist")  # the long ones first
    if not todo:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(options.processes, len(todo)), context, initializer=_start, initargs=(options.data,)) as pool:
        jobs = {pool.submit(_run, cell, seed, options.out): (cell, seed) for cell, seed in todo}
        try:
            for number, job in enumerate(as_completed(jobs)):
                cell, seed = jobs[job]
                finished.add(cell, seed, *job.result())
                print(f"{number + 1}/{len(todo)}  {cell}, seed {seed}: {job.result()[0]:.2f} % in {job.result()[1]:.0f} s", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def seeds_of(cell: Cell, finished: Finished, seeds: int) -> int:
    """How many seeds a cell has, or should have: more where the first ones miss."""
    found = finished.of(cell, seeds)
    missed = len(found) == seeds and not cell.passed(float(np.mean([r["accuracy"] for r in found])))
    return seeds + MORE_SEEDS if missed else seeds


def report(cells: list[Cell], finished: Finished, seeds: dict[Cell, int]) -> str:
    """Measured beside published, as a table."""
    rows = []
    for cell in cells:
        found = finished.of(cell, seeds[cell])
        accuracies = [r["accuracy"] for r in found]
        mean, spread = float(np.mean(accuracies)), float(np.std(accuracies, ddof=1)) if len(found) > 1 else float("nan")
        rows.append((
            cell.setting, cell.method, str(cell.buffer or ""), f"{cell.published:.2f}", f"{mean:.2f}", f"{spread:.2f}",
            f"{mean - cell.published:+.2f}", str(len(found)), "pass" if cell.passed(mean) else "miss",
            f"{np.median([r['seconds'] for r in found]):.0f}",
        ))  # fmt: skip
    return table(rows, ("setting", "method", "buffer", "published", "measured", "spread", "difference", "seeds", "", "seconds a run"))


def main(argv: list[str] | None = None) -> None:
    """Run a cell, or all of them, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST in IDX files (.gz or not)")
    parser.add_argument("--setting", choices=["s-mnist", "p-mnist"])
    parser.add_argument("--method", choices=["er", "der", "der++", "cls-er", "sgd"])
    parser.add_argument("--buffer", type=int, help="rows of the reservoir: 200 or 500")
    parser.add_argument("--seeds", type=int, default=5, help="runs of a cell, seeds from 0 on (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="every cell; the table goes into benchmarks/RESULTS.md")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="side by side (default: one per core, %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"), help="finished runs, and buffers (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("RESULTS.md"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    cells = [c for c in CELLS if options.all or (c.setting, c.method) == (options.setting, options.method)]
    if not options.all:
        cells = [c for c in cells if c.buffer in (None, options.buffer)]
    if not cells:
        parser.error("nothing was published for that; there is: " + ", ".join(str(c) for c in CELLS) + "; or --all")
    if options.seeds < 1 or options.processes < 1:
        parser.error("--seeds and --processes must be at least 1")

    options.out.mkdir(parents=True, exist_ok=True)
    finished = Finished(options.out / "finished.json", fingerprint(load(options.data)))
    seeds = dict.fromkeys(cells, options.seeds)
    run_missing([(cell, seed) for cell in cells for seed in range(options.seeds)], finished, options)
    if options.all:
        seeds = {cell: seeds_of(cell, finished, options.seeds) for cell in cells}
        run_missing([(cell, seed) for cell in cells for seed in range(seeds[cell])], finished, options)
    found = report(cells, finished, seeds)
    print()
    print(found)
    if options.all:
        write_section(options.results, "accuracy", section(found, options.seeds))


def section(found: str, seeds: int) -> str:
    """For RESULTS.md."""
    return f"""## Accuracy

    python -m benchmarks.accuracy --data DIR --all --seeds {seeds}

Final average accuracy on MNIST in %: the mean over tasks of the test accuracy after the last task; mean and standard deviation
over seeds 0, 1, and so on. Published: Buzzega et al. 2020, CLS-ER Arani et al. 2022; settings and protocol are theirs. A cell passes if
its mean is no more than 1.5 points below the published one (CLS-ER: 1; SGD on s-mnist: within 2 points of it); one that misses with
{seeds} seeds gets {MORE_SEEDS} more. The buffer is a `ReservoirBuffer` on disk; a run has one thread.

{found}

{machine()}, torch {torch.__version__}"""


if __name__ == "__main__":
    main()
