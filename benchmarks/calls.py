"""How many functions of the library a call runs through: `python -m benchmarks.calls`.

Counted are Python functions of `leanreplay/` that are called; compiled kernels, NumPy, the standard library and comprehensions are not.
A figure "calls / files / moves / depth" says how many calls there are, in how many files these functions lie, how often the next call is
in another file than the one before, and how deep calls are nested below the public one. Beside it stand the figures that this script gave
for commit cfab542, before the library was divided into rooms, and what was wanted of the division.

Counts are the same in every run, so there is nothing to repeat and no --quick.
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np

import leanreplay
from benchmarks.common import table

PACKAGE = os.path.dirname(os.path.abspath(leanreplay.__file__)) + os.sep
BEFORE_AND_WANTED = {
    "add, fast way": ("29 / 7 / 19 / 4", "no more calls, at most 10 moves"),
    "add, with a restore point": ("94 / 10 / 37 / 6", "at most 45 calls, 15 moves"),
    "add, ParametricBuffer": ("193 / 13 / 110 / 9", "at most 80 calls, 40 moves"),
    "sample, in the writer": ("16 / 5 / 10 / 4", "no more"),
    "resize": ("266 / 10 / 59 / 10", "at most 120 calls"),
}


@dataclass
class Count:
    """What one call ran through. files: of its calls, in order."""

    files: list[str] = field(default_factory=list)
    depth: int = 0

    @property
    def calls(self) -> int:
        return len(self.files)

    @property
    def moves(self) -> int:
        return sum(a != b for a, b in itertools.pairwise(self.files))

    def __str__(self) -> str:
        return f"{self.calls} / {len(set(self.files))} / {self.moves} / {self.depth}"


def count(call: Callable[[], Any]) -> Count:
    """Run a call and count what of the library it runs through."""
    found, depth = Count(), -1

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal depth
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE) or code.co_name.startswith("<"):
            return
        if event == "call":
            depth += 1
            found.files.append(code.co_filename)
            found.depth = max(found.depth, depth)
        elif event == "return":
            depth -= 1

    gc.collect()
    gc.disable()  # what it collects may be ours, and would run in between
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
        gc.enable()
    return found


def measure() -> dict[str, Count]:
    """Each kind of call on a full buffer in a file, after enough of its kind that nothing is done for the first time."""
    x, y = np.zeros((200, 8), np.float32), np.arange(200) % 4
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():

        def path(name: str) -> str:
            return os.path.join(folder, f"{name}.h5")

        found = {}
        with leanreplay.ReservoirBuffer(100, path("simple")) as buffer:
            for _ in range(3):
                buffer.add((x, y))
                buffer.sample(32)
            found["add, fast way"] = count(lambda: buffer.add((x[:10], y[:10])))
            found["sample, in the writer"] = count(lambda: buffer.sample(32))
            state = buffer.state_dict()
            buffer.add((x[:10], y[:10]))
            found["add, with a restore point"] = count(lambda: buffer.add((x[:10], y[:10])))
            del state
            warnings.simplefilter("ignore", leanreplay.CapacityWarning)  # of more rows than samples that are left
            found["resize"] = count(lambda: buffer.resize(150))
        with leanreplay.ParametricBuffer(100, path("parametric"), groupby="class") as parametric:
            for _ in range(3):
                parametric.add((x, y))
            found["add, ParametricBuffer"] = count(lambda: parametric.add((x[:10], y[:10])))
    return found


def main() -> None:
    found = measure()
    rows = [(name, before, str(found[name]), wanted) for name, (before, wanted) in BEFORE_AND_WANTED.items()]
    print(table(rows, ("call", "cfab542", "now", "wanted")))


if __name__ == "__main__":
    main()
