"""What all benchmarks share: samples, interleaved repetitions, the machine, a table."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import leanreplay

SAMPLE_BYTES = 3 * 32 * 32 + 8 + 40  # uint8 image, int64 label, float32 logits


def samples(n: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """n CIFAR-shaped samples: images, labels, logits."""
    rng = np.random.default_rng([seed, n])
    return (
        rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8),
        rng.integers(0, 10, n),
        rng.random((n, 10), dtype=np.float32),
    )


def seconds(call: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(calls: dict[str, Callable[[], float]], repetitions: int, budget: float = np.inf) -> dict[str, list[float]]:
    """Measure in turn, each round in another (seeded) order: who comes after whom matters, because that finds the caches as the other
    left them. Each call returns its seconds; the first round is not counted.

    A call that has taken `budget` seconds in all sits out the rounds that are left, but never before it was measured twice.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    order, generator = list(calls), random.Random(0)
    for round_number in range(repetitions + 1):
        generator.shuffle(order)
        for name in order:
            call = calls[name]
            if spent[name] > budget and len(found[name]) >= 2:
                continue
            began = time.perf_counter()
            taken = call()
            spent[name] += time.perf_counter() - began
            if round_number:
                found[name].append(taken)
    return found


def median(values: list[float]) -> float:
    """The median."""
    return float(np.median(values))


def quartiles(values: list[float], scale: float) -> str:
    """'lower-upper' quartile of the scaled values."""
    low, high = np.percentile(values, [25, 75]) * scale
    return f"{low:.3g}-{high:.3g}"


def machine(*others: str) -> str:
    """Machine, versions (of these distributions too, where installed) and commit, in one line."""
    cpu = platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    versions = [f"Python {platform.python_version()}", f"leanreplay {leanreplay.__version__} ({commit or 'no commit'})"]
    for name in ("numpy", "numba", "h5py"):
        versions.append(f"{name} {__import__(name).__version__}")
    for name in others:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.release()}; {', '.join(versions)}"


def table(rows: list[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def write_section(path: Path, name: str, text: str) -> None:
    """Put a text between the markers of that name in a file, in place of what stands there; at its end, if they are missing."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = path.read_text(encoding="utf-8") if path.exists() else "# Results of the benchmarks\n"
    before, found, rest = old.partition(start)
    if not found:
        before, rest = old.rstrip("\n") + "\n\n", "\n"
    else:
        rest = rest.partition(end)[2] or "\n"
    path.write_text(f"{before}{start}\n{text}\n{end}{rest}", encoding="utf-8")


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return run.stdout.strip()


def private_memory() -> float:
    """MB of this process that no file backs."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024
