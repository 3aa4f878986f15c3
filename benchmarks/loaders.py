"""Loaders beside what torch offers: `python -m benchmarks.loaders [--quick]`.

Every line is measured in turn with its rival; figures are medians. "wanted" was set before the code was written.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from benchmarks.common import interleaved, machine, median, quartiles, table
from leanreplay.torch import AsyncReservoir

Row = tuple[str, ...]

LOADING = STEP = 0.005  # seconds of work, both on the processor


def work(seconds: float) -> None:
    """Keep one core busy."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def load(i: int) -> torch.Tensor:
    """A sample that takes 5 ms of decoding, and says which one it is."""
    work(LOADING)
    return torch.full((3, 32, 32), float(i))


class Slow(Dataset[torch.Tensor]):
    """The same for a DataLoader."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> torch.Tensor:
        return load(i)


def busy(loader: Iterable[torch.Tensor], seconds: float, batch_size: int, n: int) -> float:
    """The part of the time in which a training step of 5 ms runs, starting the workers included."""
    spent, batches = 0.0, []
    start = time.perf_counter()
    until = start + seconds
    while time.perf_counter() < until:
        for batch in loader:
            began = time.perf_counter()
            work(STEP)
            ended = time.perf_counter()
            spent += ended - began
            batches.append(batch)
            if ended > until:
                break
    taken = time.perf_counter() - start
    samples = torch.cat(batches).flatten(1)
    numbers = samples[:, 0].unique()
    if samples.shape[0] != batch_size * len(batches) or (samples != samples[:, :1]).any():
        raise SystemExit("a batch was not of whole samples")
    if numbers[0] < 0 or numbers[-1] >= n or numbers.shape[0] < seconds / LOADING / 100:
        raise SystemExit(f"{numbers.shape[0]} of {n} samples were seen, {numbers[0]} to {numbers[-1]}")
    return spent / taken


def reservoir(batch_size: int, seconds: float, repetitions: int, wanted: str) -> Row:
    """How much of the time a step of 5 ms runs, with samples that take 5 ms to load and one worker."""
    n = 1000

    def ours() -> float:
        def batches(entries: Any, generator: torch.Generator) -> BatchSampler:
            return BatchSampler(RandomSampler(entries, generator=generator), batch_size, drop_last=True)

        with AsyncReservoir(range(n), load, 64, min_reservoir_samples=batch_size, sampler=batches) as loader:
            return busy(loader, seconds, batch_size, n)

    def theirs() -> float:
        return busy(DataLoader(Slow(n), batch_size, shuffle=True, num_workers=1, drop_last=True), seconds, batch_size, n)

    found = interleaved({"ours": ours, "DataLoader": theirs}, repetitions)
    mine, other = ([100 * part for part in found[name]] for name in ("ours", "DataLoader"))
    return (
        f"step of 5 ms busy, 5 ms to load a sample, 1 worker, batches of {batch_size}", f"{median(mine):.1f}% ({quartiles(mine, 1)})",
        f"DataLoader, 1 worker {median(other):.1f}% ({quartiles(other, 1)})", f"{median(mine) / median(other):.2f}", wanted,
    )  # fmt: skip


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter, and fewer repetitions")
    quick = parser.parse_args().quick
    seconds, repetitions = (3, 1) if quick else (10, 5)
    rows = [
        reservoir(1, seconds, repetitions, ">= 95%"),
        reservoir(8, seconds, repetitions, ""),
    ]
    print(f"{machine()}, torch {torch.__version__}")
    print()
    print(table(rows, ("work", "ours, median (quartiles)", "rival", "ratio", "wanted")))


if __name__ == "__main__":
    main()
