"""What the suite measures and how: contenders in turn, one line for each rival, a reason for each that is missing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks import rivals
from benchmarks.common import interleaved, median


@dataclass(frozen=True)
class Options:
    """quick: smaller works, fewer repetitions. folder: where files go. data: a folder with MNIST in IDX files, or None."""

    quick: bool
    folder: str
    data: Path | None = None


@dataclass(frozen=True)
class Line:
    """One work beside one rival, in seconds. wanted: the least ratio theirs / ours; None: measured for completeness."""

    work: str
    rival: str
    ours: list[float]
    theirs: list[float]
    wanted: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times as long the rival takes."""
        return median(self.theirs) / median(self.ours)

    @property
    def met(self) -> bool | None:
        """Whether the ratio is as wanted; None where nothing was."""
        return None if self.wanted is None else self.ratio >= self.wanted


@dataclass(frozen=True)
class Skipped:
    """A rival that did not take part, and why."""

    work: str
    rival: str
    reason: str


Lines = list["Line | Skipped"]
Calls = dict[str, Callable[[], float]]


def compare(
    work: str,
    calls: Calls,
    wanted: Mapping[str, float | None],
    repetitions: int,
    budget: float = 20.0,
    note: str = "",
    scale: Mapping[str, float] | None = None,
) -> Lines:
    """A line for every rival in `wanted`: calls[rival] and calls["ours"] return seconds; a rival without a call was skipped.

    scale: what to divide a contender's seconds by, for calls that do a known part of the work.
    """
    found = interleaved(calls, repetitions, budget)
    for name, by in (scale or {}).items():
        if name in found:
            found[name] = [taken / by for taken in found[name]]
    lines: Lines = []
    for name, ratio in wanted.items():
        if name in found:
            lines.append(Line(work, name, found["ours"], found[name], ratio, note))
        else:
            lines.append(Skipped(work, name, rivals.why_not(re.split("[, ]", name)[0]) or "not measured here"))
    return lines


class WrongError(Exception):
    """What a contender holds or returns is not as it should be."""
