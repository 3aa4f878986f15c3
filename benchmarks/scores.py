"""Draws and evictions by score, beside the rivals that are installed: `python -m benchmarks.scores [--quick]`.

Every line is measured in turn with what it stands beside; figures are medians. "wanted" was set before the code was written. cpprb and
torchrl are looked for, and left out where they are missing: `pip install cpprb torchrl`.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.common import interleaved, machine, median, quartiles, seconds, table
from leanreplay import ScoredBuffer, ScoredPolicy
from leanreplay.buffers.drawing import UNIFORM, Draw

Row = tuple[str, ...]
N, BY = 256, Draw.of(True, by="score", alpha=0.6)


def filled(rows: int, sample_bytes: int, path: str | None = None, **options: Any) -> Any:
    """A full buffer of samples of so many bytes."""
    buffer, rng = ScoredBuffer(rows, path, **options), np.random.default_rng(0)
    piece = rng.integers(0, 256, (min(rows, 10_000), sample_bytes), np.uint8)
    for start in range(0, rows, piece.shape[0]):
        n = min(piece.shape[0], rows - start)
        buffer.add(piece[:n], scores=rng.random(n))
    return buffer


def rivals(rows: int) -> dict[str, tuple[Callable[[], Any], Callable[[Any, Any], Any]]]:
    """By name: a draw of 256 by priority, and an update of priorities of rows."""
    found: dict[str, tuple[Callable[[], Any], Callable[[Any, Any], Any]]] = {}
    priorities = np.random.default_rng(0).random(rows)
    try:
        cpprb = importlib.import_module("cpprb").PrioritizedReplayBuffer(rows, {"x": {}}, alpha=0.6)
        cpprb.add(x=np.zeros(rows), priorities=priorities)
        found["cpprb"] = lambda: cpprb.sample(N, 0.4), cpprb.update_priorities
    except ImportError:
        pass
    try:
        samplers, storages = (importlib.import_module(f"torchrl.data.replay_buffers.{name}") for name in ("samplers", "storages"))
        torch = importlib.import_module("torch")
        storage = storages.LazyTensorStorage(rows)
        storage.set(range(rows), torch.zeros(rows))
        sampler = samplers.PrioritizedSampler(rows, alpha=0.6, beta=0.4)
        sampler.extend(torch.arange(rows))
        sampler.update_priority(torch.arange(rows), torch.from_numpy(priorities.astype(np.float32)))
        found["torchrl"] = (
            lambda: sampler.sample(storage, N),
            lambda which, new: sampler.update_priority(torch.from_numpy(which), torch.from_numpy(new.astype(np.float32))),
        )
    except ImportError:
        pass
    return found


def in_turn(calls: dict[str, Callable[[], Any]], repetitions: int) -> tuple[dict[str, float], str]:
    """Median microseconds of each call, and the quartiles of the first."""
    found = interleaved({name: lambda call=call: seconds(call) for name, call in calls.items()}, repetitions)  # type: ignore[misc]
    return {name: median(times) * 1e6 for name, times in found.items()}, quartiles(next(iter(found.values())), 1e6)


def line(what: str, found: dict[str, float], spread: str, wanted: str) -> Row:
    names = list(found)
    return what, f"{found[names[0]]:.0f} ({spread})", ", ".join(f"{name} {found[name]:.0f}" for name in names[1:]), wanted


def draws(rows: int, sample_bytes: int, repetitions: int) -> list[Row]:
    buffer = filled(rows, sample_bytes)
    both = in_turn({"by score": lambda: buffer.sample(N, by="score", alpha=0.6), "uniform": lambda: buffer.sample(N)}, repetitions)
    lines = [line(f"draw and copy, {N} of {rows:,} rows of {sample_bytes} bytes", *both, "1.5 x uniform")]

    def alone(draw: Draw) -> Any:
        store = buffer.current.reading()
        buffer.draws.check_size(store, N, draw)
        return buffer.draws.rows(store, N, draw, "sample", buffer.draws.next_number())

    others = {name: sample for name, (sample, _) in rivals(rows).items()}
    found = in_turn({"by score": lambda: alone(BY), "uniform": lambda: alone(UNIFORM), **others}, repetitions)
    lines.append(line(f"draw alone, {N} of {rows:,}", *found, "half of each rival"))
    values = np.random.default_rng(1).random(rows)

    def prefix() -> Any:
        sums = np.cumsum(values)
        return np.searchsorted(sums, np.random.default_rng(0).random(N) * sums[-1])

    lines.append(line(f"the same by a prefix sum made anew, {rows:,}", *in_turn({"numpy": prefix}, min(repetitions, 50)), ""))
    return lines


def updates(rows: int, sample_bytes: int, repetitions: int) -> list[Row]:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        buffer = filled(rows, sample_bytes, f"{folder}/scores.h5")
        positions = buffer.get_metadata("position")

        def ours() -> None:
            which = rng.integers(0, rows, N)
            buffer.set_scores(which, rng.random(N), positions=positions[which])

        def then_drawn() -> None:
            ours()
            buffer.draws.check_size(buffer.current.reading(), N, BY)

        calls: dict[str, Callable[[], Any]] = {"on disk": ours, "and for the next draw": then_drawn}
        for name, (_, update) in rivals(rows).items():
            calls[name] = lambda update=update: update(rng.integers(0, rows, N), rng.random(N))  # type: ignore[misc]
        return [line(f"{N} score updates, {rows:,} rows of {sample_bytes} bytes", *in_turn(calls, repetitions), "60")]


def evictions(rows: int, repetitions: int) -> list[Row]:
    """The plan of a batch of 32, and the whole `add`."""
    rng, policy = np.random.default_rng(0), ScoredPolicy(rows, 0, {"evict": "proportional", "admit": "all"})
    policy.load(np.arange(rows), rng.random(rows).view(np.int64))
    losses, buffer = rng.random(rows), filled(rows, 3072, evict="proportional")
    batch, at = np.zeros((32, 3072), np.uint8), iter(range(rows, 2**40, 32))

    def usual() -> None:
        for loss in rng.random(32):
            chances = losses.max() - losses
            losses[np.random.choice(rows, p=chances / chances.sum())] = loss

    calls = {
        "plan": lambda: policy.plan(next(at), rng.random(32).view(np.int64), 32),
        "add": lambda: buffer.add(batch, scores=rng.random(32)),
        "np.random.choice a sample": usual,
    }
    return [line(f"eviction by score, 32 into {rows:,} rows", *in_turn(calls, repetitions), "50")]


def memory(rows: int) -> Row:
    """Private bytes a row: what the policy and the draws keep, by their arrays."""
    buffer = filled(rows, 8, evict="proportional")
    weights = buffer.draws.weights(buffer.current.reading(), BY)
    policy = buffer.feeder.policy(buffer.current.writing())
    kept = sum(value.nbytes for value in vars(policy).values() if isinstance(value, np.ndarray) and value.size > 64)
    return f"bytes a row, {rows:,} rows", f"{kept / rows:.1f} + {weights.tree.nbytes / rows:.1f}", "policy + draws", "24"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows, and few repetitions")
    quick = parser.parse_args().quick
    large, repetitions = (20_000, 20) if quick else (1_000_000, 300)
    lines = [row for rows in (5000, large) for row in draws(rows, 3072, repetitions)]
    lines += [row for size in (8, 3072) for row in updates(5000, size, repetitions)]
    lines += [row for rows in (500, 5120) for row in evictions(rows, repetitions)]
    lines.append(memory(large))
    print(machine("torch", "cpprb", "torchrl"))
    print(table(lines, ("work", "us (quartiles)", "beside, us", "wanted")))


if __name__ == "__main__":
    main()
