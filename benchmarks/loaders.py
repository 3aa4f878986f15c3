"""Loaders beside what torch offers: `python -m benchmarks.loaders [--quick]`.

Every line is measured in turn with its rival; figures are medians. "wanted" was set before the code was written.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from benchmarks.common import interleaved, machine, median, quartiles, seconds, table
from leanreplay.torch import AsyncReservoir, InterleavedSampler, InterleavedSamplerConfig, SamplerIntervalConfig

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


def busy(loader: Iterable[torch.Tensor], duration: float, batch_size: int, n: int) -> float:
    """The part of the time in which a training step of 5 ms runs, starting the workers included."""
    spent, batches = 0.0, []
    start = time.perf_counter()
    until = start + duration
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
    if numbers[0] < 0 or numbers[-1] >= n or numbers.shape[0] < duration / LOADING / 100:
        raise SystemExit(f"{numbers.shape[0]} of {n} samples were seen, {numbers[0]} to {numbers[-1]}")
    return spent / taken


def reservoir(batch_size: int, duration: float, repetitions: int, wanted: str) -> Row:
    """How much of the time a step of 5 ms runs, with samples that take 5 ms to load and one worker."""
    n = 1000

    def ours() -> float:
        def batches(entries: Any, generator: torch.Generator) -> BatchSampler:
            return BatchSampler(RandomSampler(entries, generator=generator), batch_size, drop_last=True)

        with AsyncReservoir(range(n), load, 64, min_reservoir_samples=batch_size, sampler=batches) as loader:
            return busy(loader, duration, batch_size, n)

    def theirs() -> float:
        return busy(DataLoader(Slow(n), batch_size, shuffle=True, num_workers=1, drop_last=True), duration, batch_size, n)

    found = interleaved({"ours": ours, "DataLoader": theirs}, repetitions)
    mine, other = ([100 * part for part in found[name]] for name in ("ours", "DataLoader"))
    return (
        f"step of 5 ms busy, 5 ms to load a sample, 1 worker, batches of {batch_size}", f"{median(mine):.1f}% ({quartiles(mine, 1)})",
        f"DataLoader, 1 worker {median(other):.1f}% ({quartiles(other, 1)})", f"{median(mine) / median(other):.2f}", wanted,
    )  # fmt: skip


def indices(batch_size: int, n: int, repetitions: int) -> Row:
    """Millions of indices a second: an epoch of training with an evaluation after every tenth of it, beside the same order from torch."""

    def order() -> RandomSampler:
        return RandomSampler(range(n), generator=torch.Generator().manual_seed(0))

    def ours() -> Iterable[tuple[bool, int]]:
        config = InterleavedSamplerConfig(batch_size, max_epochs=1)
        evaluation = SamplerIntervalConfig(SequentialSampler(range(n // 100)), every_n_updates=n // 10 // batch_size)
        return InterleavedSampler(order(), config, callback_samplers=[evaluation])

    def theirs() -> Iterable[int]:
        return itertools.chain.from_iterable(BatchSampler(order(), batch_size, drop_last=True))

    mine, other = [index for _, index in ours()], list(theirs())
    if [index for index in mine if index < n] != other or len(mine) != len(other) + 10 * (n // 100):
        raise SystemExit("the indices differ")
    contenders = {"ours": (ours, len(mine)), "torch": (theirs, len(other))}
    calls = {name: lambda make=make: seconds(lambda: deque(make(), 0)) for name, (make, _) in contenders.items()}
    found = interleaved(calls, repetitions)
    fast, rival = ([count / taken / 1e6 for taken in found[name]] for name, (_, count) in contenders.items())
    return (
        f"InterleavedSampler, batches of {batch_size}", f"{median(fast):.1f} million indices/s ({quartiles(fast, 1)})",
        f"BatchSampler {median(rival):.1f} ({quartiles(rival, 1)})", f"{median(fast) / median(rival):.2f}", ">= 1 million/s",
    )  # fmt: skip


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter, and fewer repetitions")
    quick = parser.parse_args().quick
    duration, repetitions = (2, 1) if quick else (3.5, 4)
    rows = [
        reservoir(1, duration, repetitions, ">= 95%"),
        reservoir(8, duration, repetitions, ""),
        *(indices(batch_size, 100_000, 2 if quick else 8) for batch_size in (1, 16, 256)),
    ]
    print(f"{machine()}, torch {torch.__version__}")
    print()
    print(table(rows, ("work", "ours, median (quartiles)", "rival", "ratio", "wanted")))


if __name__ == "__main__":
    main()
