"""Replay with gradients that are accumulated over several small batches, for models that do not fit otherwise.

    python examples/gradient_accumulation.py [--data path/to/mnist]

`loss` only computes and queues; `after_step`, once for each step of the optimizer, offers all queued batches to the buffer
in one commit. So a killed run never holds half a step, and no sample is replayed before the step that it belongs to is over.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from digits import accuracies, load, split, table

from leanreplay import ReservoirBuffer
from leanreplay.torch import DERLearner


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with MNIST in IDX files (default: scikit-learn's digits)")
    parser.add_argument("--batch-size", type=int, default=16, help="samples in a step (default: %(default)s)")
    parser.add_argument("--parts", type=int, default=4, help="small batches that a step is made of (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    (x_train, y_train), (x_test, y_test) = load(args.data)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(x_train[0].numel(), 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # Each small batch takes its own draw from the buffer: as many replayed samples as it has itself.
    learner = DERLearner(model, optimizer, ReservoirBuffer(500), alpha=0.2, beta=1.0, replay_batch_size=args.batch_size // args.parts)

    for x, y in split(x_train, y_train):
        for _ in range(5 if args.data is None else 1):
            for rows in torch.randperm(len(y)).split(args.batch_size):
                parts = rows.tensor_split(min(args.parts, len(rows)))
                optimizer.zero_grad()
                for part in parts:
                    loss = learner.loss(x[part], y[part])
                    (loss * len(part) / len(rows)).backward()
                optimizer.step()
                learner.after_step()

    found = accuracies(model, x_test, y_test)
    print(f"{learner.steps} steps, {learner.buffer.seen} samples offered to the buffer; {table(found)}")
    return found


if __name__ == "__main__":
    main()
