"""Class-incremental learning on handwritten digits: five tasks of two classes, fine-tuning beside experience replay.

    python examples/split_digits.py                         # scikit-learn's digits, a few seconds
    python examples/split_digits.py --data path/to/mnist    # MNIST in IDX files (.gz or not), one epoch

Prints the accuracy on every task after the last one, and writes results.json and accuracy.png into the output folder. Killed at any time,
it goes on with --resume and ends with the same results, bit for bit: a checkpoint holds models, optimizers, position and
the learner's state; the replay buffer is a file of its own, which that state brings back to the moment of the checkpoint.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from leanreplay import ReservoirBuffer
from leanreplay.torch import ERLearner

TASKS = 5
METHODS = ("fine-tuning", "ER")


def read_idx(folder: Path, name: str) -> np.ndarray[Any, Any]:
    """One IDX file of unsigned bytes, compressed or not."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise SystemExit(f"{folder} holds neither {name} nor {name}.gz")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise SystemExit(f"{path} is no IDX file of unsigned bytes")
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    if len(raw) != 4 + 4 * raw[3] + int(np.prod(shape, dtype=np.int64)):
        raise SystemExit(f"{path} is cut short or damaged: {len(raw)} bytes, shape {shape.tolist()}")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def load_data(folder: Path | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (uint8) and labels (int64) for training and testing."""
    if folder is not None:
        names = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
        x_train, y_train, x_test, y_test = (read_idx(folder, name) for name in names)
    else:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))  # the split is the same for every seed
        test, train = order[:450], order[450:]
        images = (digits.images * (255 / 16)).astype(np.uint8)
        x_train, y_train, x_test, y_test = images[train], digits.target[train], images[test], digits.target[test]
    for part, x, y in (("training", x_train, y_train), ("test", x_test, y_test)):
        if len(x) != len(y) or sorted(set(y.tolist())) != list(range(2 * TASKS)):
            raise SystemExit(f"{len(x)} {part} images with {len(y)} labels of classes {sorted(set(y.tolist()))}; every class 0-9 is needed")
    return torch.tensor(x_train), torch.tensor(y_train).long(), torch.tensor(x_test), torch.tensor(y_test).long()


class Scale(torch.nn.Module):
    """Bytes to numbers from 0 to 1: so that the buffer can hold bytes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() / 255


def make_model(pixels: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    hidden = [torch.nn.Linear(pixels, 100), torch.nn.ReLU(), torch.nn.Linear(100, 100), torch.nn.ReLU()]
    return torch.nn.Sequential(Scale(), torch.nn.Flatten(), *hidden, torch.nn.Linear(100, 2 * TASKS))


def stream(labels: torch.Tensor, epochs: int, batch_size: int, seed: int) -> Iterator[tuple[int, torch.Tensor, bool]]:
    """(task, rows of the batch, whether it is the task's last), in an order that is a function of the seed alone."""
    for task in range(TASKS):
        rows = np.flatnonzero(labels.numpy() // 2 == task)
        for epoch in range(epochs):
            order = torch.from_numpy(np.random.default_rng([seed, task, epoch]).permutation(rows))
            batches = order.split(batch_size)
            for i, batch in enumerate(batches):
                yield task, batch, epoch + 1 == epochs and i + 1 == len(batches)


@torch.no_grad()
def accuracies(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """Percent of right answers on the test images of every task."""
    right = (model(x).argmax(1) == y).double()
    return [100 * right[y // 2 == task].mean().item() for task in range(TASKS)]


def write(path: Path, save: Any) -> None:
    """Replace a file at once: a killed process leaves the old one or the new one."""
    new = path.with_name(path.name + ".new")
    save(new)
    os.replace(new, path)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train both methods side by side, from the checkpoint if there is one to resume."""
    x, y, x_test, y_test = load_data(args.data)
    epochs = args.epochs or (5 if args.data is None else 1)
    options = {"data": str(args.data), "seed": args.seed, "buffer_size": args.buffer_size, "epochs": epochs, "batch_size": args.batch_size}
    models = {name: make_model(x[0].numel(), args.seed) for name in METHODS}
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.1) for name, model in models.items()}
    matrices: dict[str, list[list[float]]] = {name: [] for name in METHODS}
    position = 0

    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint_path = args.out / "checkpoint.pt"
    if not args.resume:
        checkpoint_path.unlink(missing_ok=True)  # first: a checkpoint never outlives its buffer
    resumed = checkpoint_path.exists()
    checkpoint = torch.load(checkpoint_path, weights_only=True) if resumed else {}
    if resumed and checkpoint["options"] != options:
        raise SystemExit(f"{checkpoint_path} was written with {checkpoint['options']}, not {options}; leave --resume out to start over")

    with ReservoirBuffer(args.buffer_size, args.out / "replay.h5", seed=args.seed, mode="r+" if resumed else "w") as buffer:
        learner = ERLearner(models["ER"], optimizers["ER"], buffer, alpha=None, replay_batch_size=32)
        if resumed:
            for name in METHODS:
                models[name].load_state_dict(checkpoint["models"][name])
                optimizers[name].load_state_dict(checkpoint["optimizers"][name])
            learner.load_state_dict(checkpoint["learner"])
            matrices, position = checkpoint["matrices"], checkpoint["position"]

        def save() -> None:
            checkpoint = {
                "options": options,
                "models": {name: model.state_dict() for name, model in models.items()},
                "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
                "learner": learner.state_dict(),
                "matrices": matrices,
                "position": position,
            }
            write(checkpoint_path, lambda path: torch.save(checkpoint, path))

        batches = list(stream(y, epochs, args.batch_size, args.seed))
        bar = tqdm(batches[position:], initial=position, total=len(batches), unit="batch")
        for task, rows, last in bar:
            bar.set_description(f"task {task + 1} of {TASKS}", refresh=False)
            optimizers["fine-tuning"].zero_grad()
            cross_entropy(models["fine-tuning"](x[rows]), y[rows]).backward()
            optimizers["fine-tuning"].step()
            learner.step(x[rows], y[rows])
            position += 1
            if last:
                for name in METHODS:
                    matrices[name].append(accuracies(models[name], x_test, y_test))
            if position % args.checkpoint_every == 0 or position == len(batches):
                save()
    return {
        "options": options,
        "accuracy": matrices,
        "average": {name: sum(matrix[-1]) / TASKS for name, matrix in matrices.items()},
        "weights": {name: digest(model) for name, model in models.items()},
    }


def digest(model: torch.nn.Module) -> str:
    """Of all weights, to see that two runs agree in every bit."""
    return hashlib.sha256(b"".join(p.numpy().tobytes() for p in model.state_dict().values())).hexdigest()


def table(results: dict[str, Any]) -> str:
    """Accuracy on each task after the last one, in percent."""
    lines = ["accuracy %   " + "".join(f"{f'{2 * t}/{2 * t + 1}':>8}" for t in range(TASKS)) + f"{'average':>10}"]
    for name in METHODS:
        cells = "".join(f"{a:8.1f}" for a in results["accuracy"][name][-1])
        lines.append(f"{name:13}{cells}{results['average'][name]:10.1f}")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Both accuracy matrices: after task i, on task j."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(METHODS), figsize=(9, 4.2), layout="constrained")
    digits = [f"{2 * t}/{2 * t + 1}" for t in range(TASKS)]
    for ax, name in zip(axes, METHODS, strict=True):
        matrix = np.array(results["accuracy"][name])
        image = ax.imshow(matrix, vmin=0, vmax=100, cmap="viridis")
        for (i, j), value in np.ndenumerate(matrix):
            ax.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value < 60 else "black")
        ax.set_xticks(range(TASKS), digits)
        ax.set_yticks(range(TASKS), digits)
        ax.set(title=f"{name}: {results['average'][name]:.1f}% on average", xlabel="tested on digits", ylabel="after training on digits")
    figure.colorbar(image, ax=axes, label="accuracy %", shrink=0.8)
    figure.savefig(path, format="png", dpi=120)
    plt.close(figure)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {number}")
    return number


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/split_digits"), help="output folder (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder with MNIST in IDX files (default: scikit-learn's digits)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder, if there is one")
    parser.add_argument("--buffer-size", type=positive, default=200, help="samples in the replay buffer (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=10, help="samples from the stream in a step (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, help="passes over each task (default: 5, with --data 1)")
    parser.add_argument("--checkpoint-every", type=positive, default=50, metavar="STEPS", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the models are small; and the order of additions does not depend on the machine's cores
    torch.use_deterministic_algorithms(True)

    results = run(args)
    draw_to = args.out / "accuracy.png"
    write(args.out / "results.json", lambda path: path.write_text(json.dumps(results, indent=1)))
    write(draw_to, lambda path: draw(results, path))
    print(table(results))
    print(f"accuracy matrices: {draw_to}")


if __name__ == "__main__":
    main()
