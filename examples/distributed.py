"""Replay in several processes: DistributedDataParallel, one buffer a rank, merged into one at the end.

    torchrun --nproc-per-node 2 examples/distributed.py [--data path/to/mnist] [--out runs/distributed]

Each rank feeds and samples a buffer of its own (same seed, `stream=rank`); only gradients meet. The merged buffer holds exactly what
one buffer over all streams would hold.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from digits import accuracies, load, split, table
from torch.nn.parallel import DistributedDataParallel

import leanreplay
from leanreplay import ReservoirBuffer
from leanreplay.torch import ERLearner


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with MNIST in IDX files (default: scikit-learn's digits)")
    parser.add_argument("--out", type=Path, default=Path("runs/distributed"), help="where the buffers lie (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not dist.is_torchelastic_launched():
        raise SystemExit("start this with: torchrun --nproc-per-node 2 examples/distributed.py")

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    args.out.mkdir(parents=True, exist_ok=True)
    paths = [args.out / f"rank{r}.h5" for r in range(ranks)]

    torch.manual_seed(args.seed)
    (x_train, y_train), (x_test, y_test) = load(args.data)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(x_train[0].numel(), 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ReservoirBuffer(200, paths[rank], seed=args.seed, stream=rank, mode="w") as buffer:
        learner = ERLearner(wrapped, optimizer, buffer, replay_batch_size=16)
        for x, y in split(x_train, y_train):
            for _ in range(5 if args.data is None else 1):
                order = torch.randperm(len(y))  # the same on all ranks
                mine = order[: len(y) // ranks * ranks].view(-1, ranks)[:, rank]
                for rows in mine.split(10):
                    learner.step(x[rows], y[rows])
        print(f"rank {rank}: {buffer}", flush=True)
    dist.barrier()  # all buffers are closed

    if rank == 0:
        with leanreplay.merge(paths, args.out / "merged.h5", mode="w") as merged:
            print(f"merged: {merged}, problems: {merged.check()}")
        print(table(accuracies(model, x_test, y_test)), flush=True)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    copies = [torch.empty_like(weights) for _ in range(ranks)]
    dist.all_gather(copies, weights)
    if rank == 0:
        print("all ranks have the same weights:", "yes" if all(torch.equal(c, weights) for c in copies) else "no")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
