"""What a sample and a batch cost as the work grows.

    python -m benchmarks.scaling [--quick] [--only NAME] [--gb 40] [--folder DIR] [--out DIR]

Writes a section of RESULTS.md, and scaling.png with the curves, into --out (default: this folder). A --quick run ends earlier on every
axis, and writes RESULTS-quick.md and scaling-quick.png; --only prints and writes nothing. Beside each table stands what was expected.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import leanreplay
from benchmarks.common import SAMPLE_BYTES, machine, median, python, seconds, table, write_section

_HERE = Path(__file__).parent
_DRAW = 256


@dataclass(frozen=True)
class Options:
    """quick: shorter axes. gb: the largest buffer whose memory is measured. folder: where files go."""

    quick: bool
    gb: float
    folder: str


@dataclass(frozen=True)
class Curves:
    """One axis and what was measured along it. columns: name -> values, the first of which is the axis itself."""

    title: str
    expected: str
    columns: dict[str, list[float]]
    panels: tuple[tuple[str, ...], ...]  # the columns in the picture, those of a panel in one unit; the first goes into the upper row

    def markdown(self) -> str:
        """Title, what was expected, table."""
        rows = [tuple(_shown(v) for v in values) for values in zip(*self.columns.values(), strict=True)]
        return f"**{self.title}.** {self.expected}\n\n{table(rows, tuple(self.columns))}"


def _shown(value: float) -> str:
    """Three digits of small numbers, all of large ones."""
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"


def _feed(buffer: leanreplay.DataBuffer, batch: Any, samples: int) -> float:
    """Seconds to add so many samples, the same batch again and again."""
    n = len(batch[1])

    def add() -> None:
        for _ in range(samples // n):
            buffer.add(batch)

    return seconds(add)


def _draws(buffer: leanreplay.DataBuffer, n: int, count: int) -> float:
    """Median seconds of a draw of n."""
    buffer.sample(n)
    return median([seconds(lambda: buffer.sample(n)) for _ in range(count)])


def capacity(o: Options) -> Curves:
    """Reservoirs of 10^3 to 10^7 rows of 64 bytes."""
    batch = (np.zeros((1000, 56), np.uint8), np.zeros(1000, np.int64))
    schema = leanreplay.Schema.from_batch(batch)
    path = os.path.join(o.folder, "capacity.h5")
    names = ("rows", "filling, ns a sample", "full, ns a sample", "draw of 256, us", "open and draw, ms", "open and add, ms")
    columns: dict[str, list[float]] = {name: [] for name in names}
    with leanreplay.ReservoirBuffer(1_000, path, mode="w", schema=schema) as buffer:  # so that kernels are there
        _feed(buffer, batch, 2_000)
        buffer.sample(_DRAW)
    for rows in [10**e for e in range(3, 6 if o.quick else 8)]:
        times = max(1, min(20, 200_000 // rows))
        filling = full = 0.0
        for i in range(times):
            with leanreplay.ReservoirBuffer(rows, path, seed=i, mode="w", schema=schema) as buffer:
                filling += _feed(buffer, batch, rows)
                full += _feed(buffer, batch, rows)
                draw = _draws(buffer, _DRAW, 200)

        def reader() -> None:
            with leanreplay.open(path) as buffer:
                buffer.sample(_DRAW)

        def writer() -> None:
            with leanreplay.open(path, "r+") as buffer:
                buffer.add(batch)

        values = (filling / times / rows * 1e9, full / times / rows * 1e9, draw * 1e6)
        opened = (median([seconds(reader) for _ in range(15)]) * 1e3, median([seconds(writer) for _ in range(3)]) * 1e3)
        for name, value in zip(names, (rows, *values, *opened), strict=True):
            columns[name].append(value)
    os.unlink(path)
    return Curves(
        "Capacity (reservoir, rows of 64 bytes, batches of 1,000)",
        "Expected: adding is flat while rows and heap fit the processor's caches, then grows with the cost of a cache miss and with "
        "log2(rows): a sample that stays replaces the root of a binary heap, and is sifted down. 'full' is the second pass over as many "
        "samples as there are rows, of which ln 2 = 69% stay. Filling 1,000 rows is one call, which also touches the file for the first "
        "time. A draw is flat but for cache misses, and so is opening to read, which looks at the header and the table alone. The first "
        "write after opening is linear in the rows: it verifies the index and builds the heap.",
        columns,
        (names[1:3], names[3:4]),
    )


def stream(o: Options) -> Curves:
    """A reservoir of 5,000 rows planned over 10^4 to 10^9 samples, without data."""
    nothing, rows = np.zeros(0, np.int64), np.empty(1 << 16, np.int64)
    warm, policy = (leanreplay.ReservoirPolicy(5_000, 0, {}) for _ in range(2))
    for each in (warm, policy):
        each.load(nothing, nothing)
    warm.plan(0, rows, 1 << 40)  # so that the kernel is there
    names = ("samples seen", "ns a sample since the line before", "of which stay, expected")
    columns: dict[str, list[float]] = {name: [] for name in names}
    seen = 0
    for goal in [10**e for e in range(4, 8 if o.quick else 10)]:
        first, start = seen, time.perf_counter()
        while seen < goal:
            seen += len(policy.plan(seen, rows[: goal - seen], 1 << 40).rows)
        taken = time.perf_counter() - start
        stay = 5_000 * np.log(goal / max(5_000, first)) + max(0, 5_000 - first)
        for name, value in zip(names, (goal, taken / (goal - first) * 1e9, round(stay)), strict=True):
            columns[name].append(value)
    return Curves(
        "Length of the stream (reservoir of 5,000 rows, planned without data)",
        "Expected: falling, then flat. A sample costs its hash and one comparison; of those between a and b, 5,000 ln(b / a) stay, so that "
        "the heap's share goes to nothing.",
        columns,
        (names[1:2],),
    )


def groups(o: Options) -> Curves:
    """A class-balanced buffer of 200,000 rows, 1 to 10^5 groups."""
    rows, n = (20_000, 100_000) if o.quick else (200_000, 1_000_000)
    names = ("groups", "ns a sample", "draw of 256, us")
    columns: dict[str, list[float]] = {name: [] for name in names}
    x = np.zeros((1000, 56), np.uint8)
    path = os.path.join(o.folder, "groups.h5")
    with leanreplay.ClassBalancedBuffer(1_000, path, mode="w") as buffer:  # so that kernels are there
        _feed(buffer, (x, np.arange(1000) % 10), 3_000)
        buffer.sample(_DRAW)
    for number in [10**e for e in range(5 if o.quick else 6)]:
        y = np.random.default_rng(number).integers(0, number, 2 * n)
        with leanreplay.ClassBalancedBuffer(rows, path, mode="w") as buffer:
            for i in range(0, n, 1000):
                buffer.add((x, y[i : i + 1000]))

            def feed(buffer: leanreplay.DataBuffer = buffer, y: Any = y) -> None:
                for i in range(n, 2 * n, 1000):
                    buffer.add((x, y[i : i + 1000]))

            taken = seconds(feed)
            for name, value in zip(names, (number, taken / n * 1e9, _draws(buffer, _DRAW, 200) * 1e6), strict=True):
                columns[name].append(value)
    os.unlink(path)
    return Curves(
        f"Groups (class-balanced buffer of {rows:,} rows of 64 bytes, samples {n:,} to {2 * n:,})",
        "Expected: flat but for cache misses. A group is found in a hash table, its smallest key is the root of a heap of its own, so that "
        "more groups mean smaller heaps; with many groups, the record of each is a cache miss.",
        columns,
        (names[1:2], names[2:3]),
    )


def row_size(o: Options) -> Curves:
    """Rings of rows of 8 bytes to 1 MB."""
    names = ("bytes a row", "add, ns a row", "add, GB/s", "draw of 32, us", "draw, GB/s")
    columns: dict[str, list[float]] = {name: [] for name in names}
    path = os.path.join(o.folder, "row_size.h5")
    budget = (32 if o.quick else 256) << 20
    for size in [8, 64, 512, 4 << 10, 32 << 10, 256 << 10, 1 << 20]:
        rows = max(64, min(100_000, budget // size))
        n = max(1, min(1_000, rows, (4 << 20) // size))
        batch = (np.zeros((n, size), np.uint8), np.zeros(n, np.int64))
        with leanreplay.SlidingWindowBuffer(rows, path, mode="w") as buffer:
            _feed(buffer, batch, rows // n * n)
            buffer.add(batch)
            taken = _feed(buffer, batch, rows // n * n) / (rows // n * n)
            draw = _draws(buffer, 32, 100)
        for name, value in zip(names, (size, taken * 1e9, size / taken / 1e9, draw * 1e6, 32 * size / draw / 1e9), strict=True):
            columns[name].append(value)
    os.unlink(path)
    return Curves(
        "Size of a row (ring, every sample replaces one)",
        "Expected: a constant a row, then linear in its bytes: each is copied twice (the old one into the journal, the new one into the "
        "row) and checksummed once; a draw copies and verifies it.",
        columns,
        (names[1:2], names[3:4]),
    )


_FILL = """
import json, sys, time
import numpy as np
import leanreplay
from benchmarks.common import private_memory, samples
rows, path = {rows}, {path!r}
x, _, z = samples(2000)
y = np.arange(2000)
before = private_memory()
most = 0
start = time.perf_counter()
with leanreplay.ReservoirBuffer(rows, path) as buffer:
    for i in range(0, rows, 2000):
        n = min(2000, rows - i)
        buffer.add((x[:n], y[:n]), metadata={{"logits": z[:n]}})
        if i % 100_000 == 0:
            most = max(most, private_memory())
    taken = time.perf_counter() - start
    for _ in range(100):
        buffer.sample(256)
    most = max(most, private_memory())
    state = buffer.state_dict()
    buffer.add((x, y), metadata={{"logits": z}})
    most = max(most, private_memory())
    print(json.dumps([most - before, taken, buffer.nbytes]))
"""

_READ = """
import json
import leanreplay
from benchmarks.common import private_memory
before = private_memory()
with leanreplay.open({path!r}) as buffer:
    for _ in range(100):
        buffer.sample(256)
    print(json.dumps([private_memory() - before]))
"""


def memory(o: Options) -> Curves:
    """Private memory of a process that fills a buffer, and of one that reads it."""
    names = ("GB", "rows", "writer, MB", "writer without 24 bytes a row, MB", "reader, MB", "filled in, s")
    columns: dict[str, list[float]] = {name: [] for name in names}
    path = os.path.join(o.folder, "memory.h5")
    for size in [gb for gb in ((0.04, 0.4) if o.quick else (0.04, 0.4, 4.0, 40.0)) if gb <= o.gb]:
        if shutil.disk_usage(o.folder).free < (size + 5) * 1e9:
            print(f"memory: no room for {size:g} GB in {o.folder}: left out", file=sys.stderr)
            continue
        rows = int(size * 1e9 / (SAMPLE_BYTES + 40))
        added, taken, nbytes = json.loads(python(_FILL.format(rows=rows, path=path)))
        (reading,) = json.loads(python(_READ.format(path=path)))
        for entry in os.scandir(o.folder):
            os.unlink(entry.path)
        for name, value in zip(names, (nbytes / 1e9, rows, added, added - 24 * rows / 2**20, reading, taken), strict=True):
            columns[name].append(value)
    return Curves(
        "Private memory (reservoir of 3,120-byte samples, all rows filled; what the buffer added to the process, at most)",
        "Expected: flat for a reader; for a writer 24 bytes a row (16 of the heap, 4 + 4 to find rows taken twice and rows kept for a "
        "restore point) and at most 64 MB more, whatever the rows hold.",
        columns,
        ((), names[2:5]),
    )


MEASURES: dict[str, Callable[[Options], Curves]] = {
    "capacity": capacity,
    "stream": stream,
    "groups": groups,
    "row-size": row_size,
    "memory": memory,
}


def picture(found: list[Curves], path: Path) -> None:
    """Above what a sample costs, below what a batch does and the memory; all axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [[(curves, curves.panels[i]) for curves in found if len(curves.panels) > i and curves.panels[i]] for i in (0, 1)]
    figure, panels = plt.subplots(2, max(map(len, rows)), figsize=(14, 6.4), dpi=72, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for line, row in zip(panels, rows, strict=True):
        for axes, (curves, names) in zip(line, row, strict=False):
            axes.set_axis_on()
            (axis, xs), *_ = curves.columns.items()
            for name in names:
                axes.plot(xs, np.maximum(curves.columns[name], 1e-3), marker="o", label=name)
            axes.set_xscale("log")
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, high / 1000), high * 2)  # three decades at least: flat is to look flat
            axes.set_xlabel(axis, fontsize=8)
            axes.set_title(curves.title.split(" (")[0], fontsize=9)
            axes.legend(fontsize=7)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="shorter axes: under a minute")
    parser.add_argument("--only", action="append", choices=list(MEASURES), help="one axis; may be given several times")
    parser.add_argument("--gb", type=float, default=40.0, help="the largest buffer whose memory is measured (default: 40)")
    parser.add_argument("--folder", default=None, help="where the buffers lie (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=_HERE, help="where the results go")
    options = parser.parse_args()
    began = time.perf_counter()
    found = []
    for name, measure in MEASURES.items():
        if options.only is None or name in options.only:
            start = time.perf_counter()
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                found.append(measure(Options(options.quick, options.gb, folder)))
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    command = shlex.join(["python", "-m", "benchmarks.scaling", *("DIR" if a.startswith("/") else a for a in sys.argv[1:])])
    told = f"`{command}`, {time.perf_counter() - began:.0f} s, on {machine()}."
    text = "\n\n".join(curves.markdown() for curves in found)
    print(f"{told}\n\n{text}")
    if options.only is None:
        suffix = "-quick" if options.quick else ""
        picture(found, options.out / f"scaling{suffix}.png")
        title = f"## Cost as the work grows\n\n{told}\nOn paper, beyond what was measured: SCALING.md.\n\n![curves](scaling{suffix}.png)"
        write_section(options.out / f"RESULTS{suffix}.md", "scaling", f"{title}\n\n{text}")


if __name__ == "__main__":
    main()
