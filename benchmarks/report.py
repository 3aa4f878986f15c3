"""What the suite found, as Markdown tables and a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.common import median, quartiles, table
from benchmarks.compare import Line, Lines, Skipped

_UNITS = ((1.0, "s"), (1e3, "ms"), (1e6, "us"))


def duration(values: list[float]) -> str:
    """Median and quartiles of seconds, in a unit that suits the median."""
    middle = median(values)
    scale, unit = next(((s, u) for s, u in _UNITS if middle * s >= 1), _UNITS[-1])
    return f"{middle * scale:.3g} {unit} ({quartiles(values, scale)}; n={len(values)})"


def verdict(line: Line) -> str:
    """What was wanted, and whether it was met."""
    return "" if line.wanted is None else f"{line.wanted:g}: {'met' if line.met else '**missed**'}"


def comparisons(lines: Lines) -> str:
    """The table of all lines; what was not measured follows with its reason."""
    rows, notes = [], []
    before = None
    for line in lines:
        if isinstance(line, Skipped):
            continue
        first = line.work != before
        before = line.work
        note = ""
        if line.note:
            if line.note not in notes:
                notes.append(line.note)
            note = f" [{notes.index(line.note) + 1}]"
        rows.append((
            line.work if first else "", duration(line.ours) if first else "", line.rival + note, duration(line.theirs),
            f"{line.ratio:.3g}", verdict(line),
        ))  # fmt: skip
    text = table(rows, ("work", "leanreplay", "rival", "its time", "its time / ours", "wanted, at least"))
    if notes:
        text += "\n\n" + "\n".join(f"[{i}] {note}." + "  " for i, note in enumerate(notes, 1))
    skipped = [f"- {line.work}, {line.rival}: skipped, {line.reason}" for line in lines if isinstance(line, Skipped)]
    return text + ("\n\n" + "\n".join(skipped) if skipped else "")


# What a work cannot do without, or do faster.
LIMITS = ("np.take", "one piece", "np.memmap", "torch alone, without a buffer", "X @ X.T alone, float32")


def summary(lines: Lines) -> str:
    """How many of the wanted ratios were met; of those missed, what the limits of the same work would be beside that rival."""
    measured = [line for line in lines if isinstance(line, Line)]
    judged = [line for line in measured if line.wanted is not None]
    missed = []
    for line in judged:
        if line.met or line.wanted is None:
            continue
        limits = [other for other in measured if other.work == line.work and other.rival in LIMITS and other.rival != line.rival]
        ratios = {limit.rival: median(line.theirs) / median(limit.theirs) for limit in limits}
        text = ", ".join(f"{name} is {ratio:.3g}" for name, ratio in ratios.items())
        beyond = " out of reach here," if ratios and max(ratios.values()) < line.wanted else ""
        missed.append(f"- {line.work}, beside {line.rival}: {line.ratio:.3g} of {line.wanted:g}" + (f";{beyond} {text}" if text else ""))
    head = f"{len(judged) - len(missed)} of {len(judged)} wanted ratios met"
    return f"{head}. Missed:\n\n" + "\n".join(missed) if missed else f"{head}."


def picture(lines: Lines, path: Path) -> None:
    """A bar for each line on a logarithmic axis, with a mark at what was wanted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [line for line in lines if isinstance(line, Line)][::-1]
    if not shown:
        return
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.26 * len(shown)), dpi=66)
    at = np.arange(len(shown))
    ratios = [line.ratio for line in shown]
    colours = ["tab:red" if line.met is False or line.ratio < 1 else "tab:blue" if line.met is None else "tab:green" for line in shown]
    axes.barh(at, [r - 1 for r in ratios], left=1, color=colours, height=0.7)
    for i, line in enumerate(shown):
        if line.wanted is not None:
            axes.plot([line.wanted] * 2, [i - 0.45, i + 0.45], color="black", linewidth=1.5)
        axes.annotate(f" {line.ratio:.3g} ", (max(line.ratio, 1), i), va="center", fontsize=7)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.5)
    axes.set_yticks(at, [f"{line.work} | {line.rival}" for line in shown], fontsize=7)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlim(min(0.5, min(ratios) / 1.5), max(ratios) * 3)
    axes.set_xlabel("rival's time / leanreplay's time", fontsize=7)
    axes.set_title("black: wanted; green: met; red: missed, or slower; blue: nothing wanted", fontsize=7, loc="right")
    axes.tick_params(axis="x", labelsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
