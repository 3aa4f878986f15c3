"""An existing training loop on MNIST that forgets, made to replay by five lines: those marked 1 to 5.

    python examples/existing_loop.py                         # scikit-learn's digits, a few seconds
    python examples/existing_loop.py --data path/to/mnist    # MNIST in IDX files (.gz or not)

Two digits after two digits, one head for all ten. Without the marked lines the network ends up knowing the last two only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from digits import accuracies, load, split, table
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from leanreplay import ReservoirBuffer  # 1
from leanreplay.torch import ERLearner  # 2


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with MNIST in IDX files (default: scikit-learn's digits)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    (x_train, y_train), (x_test, y_test) = load(args.data)
    model = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(x_train[0].numel(), 100), torch.nn.ReLU(),
        torch.nn.Linear(100, 100), torch.nn.ReLU(),
        torch.nn.Linear(100, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    learner = ERLearner(model, optimizer, ReservoirBuffer(500), replay_batch_size=32)  # 3

    for task in split(x_train, y_train):
        loader = DataLoader(TensorDataset(*task), batch_size=10, shuffle=True)
        for _ in range(5 if args.data is None else 1):
            for x, y in loader:
                optimizer.zero_grad()
                loss = learner.loss(x, y)  # 4, in place of: loss = cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                learner.after_step()  # 5

    found = accuracies(model, x_test, y_test)
    print(f"last loss {cross_entropy(model(x), y):.3f}; {table(found)}")
    return found


if __name__ == "__main__":
    main()
