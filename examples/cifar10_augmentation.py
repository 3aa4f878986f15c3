"""Replay with augmentation: a small convolutional network on CIFAR-10, two classes after two classes.

    python examples/cifar10_augmentation.py                            # scikit-learn's digits, with shifts
    python examples/cifar10_augmentation.py --data path/to/cifar10     # folder with cifar10-jpeg.npz.xz; needs Pillow

The buffer holds images as they came, as bytes. `transform` augments each image of the stream, `buffer_transform` each replayed one, anew
every time that it is drawn: a sample that stays for long is seen in many versions.
"""

from __future__ import annotations

import argparse
import io
import lzma
from pathlib import Path

import numpy as np
import torch
from torch.nn import AdaptiveAvgPool2d, AvgPool2d, BatchNorm2d, Conv2d, Flatten, Linear, ReLU

from leanreplay import ReservoirBuffer
from leanreplay.torch import ERLearner

TASKS = 5


def load_cifar10(folder: Path, limit: int) -> tuple[torch.Tensor, ...]:
    """x, y, x_test, y_test of that many training images and a fifth as many test images: bytes (n, 3, 32, 32), labels (n,)."""
    from PIL import Image

    with lzma.open(folder / "cifar10-jpeg.npz.xz") as file:
        found = dict(np.load(io.BytesIO(file.read())))
    header, scans, ends = found["header"].tobytes(), found["scans"].tobytes(), np.cumsum(found["lengths"], dtype=np.int64)

    def decode(rows: np.ndarray) -> torch.Tensor:
        jpegs = [header + scans[ends[row] - int(found["lengths"][row]) : ends[row]] + b"\xff\xd9" for row in rows]
        return torch.from_numpy(np.stack([np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in jpegs])).permute(0, 3, 1, 2).contiguous()

    rng, n = np.random.default_rng(0), int(found["n_train"])  # the file is sorted by class
    train, test = rng.permutation(n)[:limit], n + rng.permutation(len(ends) - n)[: limit // 5]
    labels = torch.from_numpy(found["labels"].astype(np.int64))
    return decode(train), labels[train], decode(test), labels[test]


def load_digits() -> tuple[torch.Tensor, ...]:
    """The same of scikit-learn's digits: bytes (n, 1, 8, 8)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.from_numpy((found.images * (255 / 16)).astype(np.uint8))[:, None], torch.from_numpy(found.target).long()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(y)))
    return x[order[450:]], y[order[450:]], x[order[:450]], y[order[:450]]


class Augment:
    """One image (channels, height, width) of bytes: moved by a few pixels, flipped if wanted, and scaled to numbers from 0 to 1."""

    def __init__(self, pixels: int, flip: bool, seed: int) -> None:
        self.pixels, self.flip, self.rng = pixels, flip, np.random.default_rng(seed)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[1:]
        padded = torch.nn.functional.pad(image, [self.pixels] * 4)
        top, left = self.rng.integers(0, 2 * self.pixels + 1, 2).tolist()
        moved = padded[:, top : top + height, left : left + width]
        if self.flip and self.rng.random() < 0.5:
            moved = moved.flip(2)
        return moved / 255


def make_model(channels: int) -> torch.nn.Module:
    def block(inputs: int, outputs: int) -> list[torch.nn.Module]:
        return [Conv2d(inputs, outputs, 3, padding=1), BatchNorm2d(outputs), ReLU(), AvgPool2d(2)]

    return torch.nn.Sequential(*block(channels, 16), *block(16, 32), *block(32, 64), AdaptiveAvgPool2d(1), Flatten(), Linear(64, 10))


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with cifar10-jpeg.npz.xz (default: scikit-learn's digits)")
    parser.add_argument("--limit", type=int, default=50_000, help="training images of CIFAR-10 (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="passes over each task (default: 1, for digits 4)")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10_augmentation"), help="where the buffer lies (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    x_train, y_train, x_test, y_test = load_digits() if args.data is None else load_cifar10(args.data, args.limit)
    epochs = args.epochs or (4 if args.data is None else 1)
    pixels, flip = (1, False) if args.data is None else (4, True)
    torch.manual_seed(args.seed)
    model = make_model(x_train.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    args.out.mkdir(parents=True, exist_ok=True)

    with ReservoirBuffer(500, args.out / "replay.h5", seed=args.seed, mode="w") as buffer:
        learner = ERLearner(
            model, optimizer, buffer, replay_batch_size=32,
            transform=Augment(pixels, flip, args.seed), buffer_transform=Augment(pixels, flip, args.seed + 1),
        )  # fmt: skip
        for task in range(TASKS):
            mine = torch.nonzero(y_train // 2 == task)[:, 0]
            for _ in range(epochs):
                for rows in mine[torch.randperm(len(mine))].split(32):
                    if len(rows) > 1:  # batch norm
                        learner.step(x_train[rows], y_train[rows])
            model.eval()
            with torch.no_grad():
                right = torch.cat([model(part / 255).argmax(1) for part in x_test.split(500)]) == y_test
            model.train()
            found = [100 * right[y_test // 2 == t].double().mean().item() for t in range(task + 1)]
            print(f"after task {task + 1}: " + ", ".join(f"{a:.0f}%" for a in found), flush=True)
        print(buffer)
    return found


if __name__ == "__main__":
    main()
