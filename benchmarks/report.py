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
    """How many of the wanted ratios were met, and which could not be: where a limit itself is not that much faster than the rival."""
    judged = [line for line in lines if isinstance(line, Line) and line.wanted is not None]
    limits: dict[str, Line] = {}  # of each work the fastest
    for line in lines:
        if isinstance(line, Line) and line.rival in LIMITS and (line.work not in limits or line.ratio < limits[line.work].ratio):
            limits[line.work] = line
    missed = []
    for line in judged:
        if not line.met and line.wanted is not None:
            limit = limits.get(line.work)
            best = median(line.theirs) / median(limit.theirs) if limit is not None and limit.rival != line.rival else np.inf
            out_of_reach = f"; out of reach here, {limit.rival} is {best:.3g}" if limit is not None and best < line.wanted else ""
            missed.append(f"- {line.work}, beside {line.rival}: {line.ratio:.3g} of {line.wanted:g}{out_of_reach}")
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
