"""Draws the pictures of the documentation from the library's own functions: python docs/pictures/draw.py [FOLDER]"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from leanreplay import ClassBalancedBuffer, ReservoirBuffer
from leanreplay.kernels.reservoir import position_keys
from leanreplay.keys import key_pair

TEAL, GREY, RED = "#00796b", "#9e9e9e", "#c62828"


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(
    axes: Axes, x: float, y: float, text: str, width: float = 1.5, height: float = 0.7, color: str = TEAL, filled: bool = False
) -> None:
    """A box around (x, y)."""
    style = {"boxstyle": "round,pad=0.02,rounding_size=0.08", "ec": TEAL, "fc": TEAL if filled else "white", "lw": 1.6}
    axes.add_patch(FancyBboxPatch((x - width / 2, y - 0.35), width, 0.7, **style))
    axes.text(x, y, text, ha="center", va="center", fontsize=10, color="white" if filled else "black")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#424242", "lw": 1.4})
    axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.12, text, ha="center", fontsize=8, color="#424242")


def flow() -> Figure:
    """Stream, policy, file, loader."""
    figure, axes = canvas(8.4, 2)
    box(axes, 0.85, 1, "stream\n(batches)")
    box(axes, 3, 1, "policy\nwhich row?")
    box(axes, 5.15, 1, "one HDF5 file\nmapped", filled=True)
    box(axes, 7.5, 1.55, "learners, loaders")
    box(axes, 7.5, 0.45, "h5py, any tool")
    arrow(axes, (1.65, 1), (2.2, 1), "add")
    arrow(axes, (3.8, 1), (4.35, 1), "commit")
    arrow(axes, (5.95, 1.1), (6.7, 1.5), "sample")
    arrow(axes, (5.95, 0.9), (6.7, 0.5))
    return figure


def keys() -> Figure:
    """The keys of 60 positions, of which the 10 largest are held: what a ReservoirBuffer of 10 rows really holds."""
    buffer = ReservoirBuffer(10, seed=1)
    buffer.add(np.arange(60))
    held = buffer.get_metadata("position")
    values = np.empty(60, np.uint64)
    position_keys(np.arange(60), *key_pair("reservoir", 1), values)
    heights = values / 2.0**64
    if set(np.argsort(heights)[-10:]) != set(held.tolist()):
        raise SystemExit("the picture would not show what the buffer does")
    figure = Figure(figsize=(7.5, 2.6), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(np.arange(60), heights, color=[TEAL if i in held else "#cfd8dc" for i in range(60)])
    axes.axhline(heights[held].min(), color=RED, lw=1, ls="--")
    axes.set(xlabel="position in the stream", ylabel="key", yticks=[0, 1], title="a reservoir of 10 rows holds the 10 largest keys of 60")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def commit() -> Figure:
    figure, axes = canvas(9, 1.9)
    steps = ["journal\nold bytes", "seal", "new rows", "index", "header"]
    for i, step in enumerate(steps):
        box(axes, 0.95 + 1.8 * i, 1.2, step, filled=i == 4)
        if i:
            arrow(axes, (1.8 * i - 0.05, 1.2), (1.8 * i + 0.17, 1.2))
    axes.annotate("", (7.2, 0.45), (0.1, 0.45), arrowprops={"arrowstyle": "|-|", "color": GREY})
    axes.text(3.6, 0.15, "a kill here: the state before the batch", ha="center", fontsize=9)
    axes.text(8.2, 0.35, "from here on:\nthe batch counts", ha="center", va="center", fontsize=9, color=TEAL)
    return figure


def restore() -> Figure:
    figure, axes = canvas(9, 2.3)
    axes.annotate("", (8.9, 1.5), (0.1, 1.5), arrowprops={"arrowstyle": "-|>", "color": "#424242"})
    for x in np.arange(0.5, 8.6, 0.5):
        axes.plot(x, 1.5, "|", color=GREY, ms=10)
    axes.plot(3, 1.5, "o", color=TEAL, ms=11)
    axes.text(3, 1.8, "state_dict()", ha="center", color=TEAL)
    axes.plot(7, 1.5, "x", color=RED, ms=11, mew=2)
    axes.text(7, 1.8, "kill", ha="center", color=RED)
    axes.annotate("", (3.1, 0.95), (7, 0.95), arrowprops={"arrowstyle": "-|>", "color": TEAL, "lw": 1.6})
    axes.text(5, 0.65, "load_state_dict(): old bytes go back, newest first", ha="center", fontsize=9)
    axes.text(5, 0.2, "between the two, the first change of each row keeps its old bytes", ha="center", fontsize=9, color="#616161")
    return figure


def processes() -> Figure:
    figure, axes = canvas(8, 2.8)
    box(axes, 1.2, 1.4, "training process\nthe writer", 1.9)
    box(axes, 4, 1.4, "replay.h5\nmapped", filled=True)
    for y, text in zip((2.4, 1.4, 0.4), ("DataLoader workers", "another terminal", "h5py"), strict=True):
        box(axes, 6.9, y, text, 1.8)
        arrow(axes, (4.8, 1.4 + (y - 1.4) * 0.2), (5.95, y), "read" if y > 2 else "")
    arrow(axes, (2.2, 1.4), (3.2, 1.4), "commits")
    return figure


def guarantee() -> Figure:
    """Positions held by 400 reservoirs, and the classes of a class-balanced buffer over its stream."""
    figure = Figure(figsize=(8.5, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    held = []
    for seed in range(400):
        with ReservoirBuffer(100, seed=seed) as buffer:
            buffer.add(np.arange(2000))
            held.append(buffer.get_metadata("position"))
    counts = left.hist(np.concatenate(held), bins=20, range=(0, 2000), color=TEAL, rwidth=0.9)[0]
    left.axhline(counts.mean(), color=RED, lw=1, ls="--")
    left.set(xlabel="position in the stream", ylabel="held", title="400 reservoirs: flat", ylim=(0, None))

    labels = np.repeat(np.arange(5), 400)
    seen, shares = composition(labels)
    right.stackplot(seen, *shares, labels=[f"class {c}" for c in range(5)], colors=["#004d40", "#00796b", "#26a69a", "#80cbc4", "#b2dfdb"])
    right.set(xlabel="samples seen", ylabel="rows", title="a class-balanced buffer of 100", xlim=(0, 2000), ylim=(0, 100))
    right.legend(loc="lower left", fontsize=7)
    return figure


def composition(labels: np.ndarray) -> tuple[Sequence[int], np.ndarray]:
    """Rows of each class of a ClassBalancedBuffer of 100 rows, after every 20 samples."""
    seen, shares = list(range(20, len(labels) + 1, 20)), []
    with ClassBalancedBuffer(100, seed=0) as buffer:
        for stop in seen:
            buffer.add((np.arange(stop - 20, stop), labels[stop - 20 : stop]))
            sizes = buffer.group_sizes()
            shares.append([sizes.get(c, 0) for c in range(5)])
    return seen, np.array(shares).T


BARS = {  # rows of benchmarks/RESULTS.md, and how they are called here
    "sample 256 of 200,000 rows": "draw 256",
    "make a buffer, and add batches of 32 to 5,000 rows, stream of 20,000": "make and fill",
    "class-balanced, 5 x 10,000 into 2,000 rows, arrays": "balance classes",
    "ER, MNIST, 60,000 samples once, MLP, batch 10 + 10": "train with ER",
}


def ratios() -> list[tuple[str, float]]:
    """What is beside which rival how many times as fast, as benchmarks/RESULTS.md says."""
    found, work = [], ""
    for line in (Path(__file__).parents[2] / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) < 7:
            continue
        work = cells[1] or work
        rival = cells[3].split(" [")[0]
        if work in BARS and rival in ("cpprb", "torchrl", "avalanche"):
            found.append((f"{BARS[work]}, beside {rival}", float(cells[5])))
    return found


def speed() -> Figure:
    names, values = zip(*reversed(ratios()), strict=True)
    figure = Figure(figsize=(6.5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(names, values, color=[TEAL if value >= 1 else RED for value in values])
    axes.bar_label(bars, labels=[f"{value:.3g}" for value in values], padding=3)
    axes.axvline(1, color=GREY, lw=1)
    axes.set(xscale="log", xlim=(0.5, 2 * max(values)), xlabel="times as fast as the other library")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = "leanreplay"  # the same picture is the same file
    for draw in (flow, keys, commit, restore, processes, speed):
        draw().savefig(folder / f"{draw.__name__}.svg", metadata={"Date": None})
    guarantee().savefig(folder / "guarantee.png", dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
