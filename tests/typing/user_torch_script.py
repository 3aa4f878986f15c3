"""What a user of the torch side writes, for type checkers."""

from __future__ import annotations

import torch

from leanreplay import ReservoirBuffer
from leanreplay.torch import AsyncReservoir, BufferDataset, ERLearner, ReplayLoader, evaluate, fit, sample


def double(number: int) -> int:
    return 2 * number


def main() -> None:
    x = torch.randn(60, 4)
    y = (x[:, 0] > 0).long()
    model = torch.nn.Linear(4, 2)
    with ReservoirBuffer(20, seed=0) as buffer:
        learner = ERLearner(model, torch.optim.SGD(model.parameters(), lr=0.1), buffer, replay_batch_size=8)
        history = fit(learner, (x, y), max_epochs=1, batch_size=20, progress=False)
        loss: float = learner.step(x[:8], y[:8]).loss
        with ReplayLoader(buffer, 8) as loader:
            print(len(history["loss"]), loss, len(BufferDataset(buffer)), next(iter(loader)))
        print(evaluate(model, [(x, y)]).average_accuracy, sample(buffer, 4)[1]["idx"])
    with AsyncReservoir([1, 2, 3], double, 3, executor="thread") as reservoir:
        print(list(reservoir))


if __name__ == "__main__":
    main()
