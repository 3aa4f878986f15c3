"""Replay with mixed precision: autocast and a GradScaler, on a GPU (float16) if there is one, otherwise on the CPU (bfloat16).

    python examples/mixed_precision.py [--data path/to/mnist]

A scaler skips the optimizer's step when gradients overflow. `after_step(stepped=False)` says so: the samples were seen and go into
the buffer, but the step does not count and no averaged copy of the model moves. Logits are stored as float32 in any case.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from digits import accuracies, load, split, table

from leanreplay import ReservoirBuffer
from leanreplay.torch import CLSLearner


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with MNIST in IDX files (default: scikit-learn's digits)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    torch.manual_seed(args.seed)
    (x_train, y_train), (x_test, y_test) = load(args.data)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(x_train[0].numel(), 100), torch.nn.ReLU(), torch.nn.Linear(100, 10)).to(
        device
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    learner = CLSLearner(
        model, optimizer, ReservoirBuffer(500), alpha=1.0, beta=1.0, replay_batch_size=32, device=device,
        stable_model_update_weight=0.95, plastic_model_update_weight=0.95,
    )  # fmt: skip
    scaler = torch.amp.GradScaler(device.type)

    skipped = 0
    for x, y in split(x_train, y_train):
        for _ in range(5 if args.data is None else 1):
            for rows in torch.randperm(len(y)).split(10):
                optimizer.zero_grad()
                with torch.autocast(device.type, dtype):
                    loss = learner.loss(x[rows], y[rows])
                scaler.scale(loss).backward()
                scale = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                stepped = scaler.get_scale() >= scale  # a smaller scale: the gradients were not finite, the step was skipped
                learner.after_step(stepped)
                skipped += not stepped

    found = accuracies(learner.stable_model, x_test, y_test)
    print(f"{device.type}, {dtype}: {learner.steps} steps, {skipped} skipped, {learner.buffer.seen} samples seen; {table(found)}")
    return found


if __name__ == "__main__":
    main()
