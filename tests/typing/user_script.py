"""What a user writes, for type checkers: `with` keeps the class, and no name of the package is unknown or untyped."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

import leanreplay
from leanreplay import ClassBalancedBuffer, HerdingSelection, InfiniteBuffer, LeanReplayError, ParametricBuffer, ReservoirBuffer, Schema


def labels_of(path: str) -> dict[int, int]:
    with ClassBalancedBuffer(6, path, seed=0, adaptive_size=True, mode="w") as buffer:
        buffer.add((np.zeros((90, 4)), np.repeat([0, 1], [80, 10])))
        return buffer.group_sizes()  # a method of this class, which its base does not have


def exemplars(x: npt.NDArray[np.float64]) -> list[int]:
    with ParametricBuffer(4, groupby="class", selection_strategy=HerdingSelection()) as buffer:
        buffer.update([(row, i % 2) for i, row in enumerate(x)], features=x)
        return [int(row) for row in buffer.group_rows(0)]


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    sizes: dict[int, int] = labels_of(str(folder / "classes.h5"))
    schema = Schema.from_sample((np.zeros(3), 0))
    with ReservoirBuffer(10, folder / "replay.h5", schema=schema) as buffer, InfiniteBuffer(rows_per_part=8) as all_of_them:
        buffer.add((np.zeros((20, 3)), np.arange(20)))
        all_of_them.add(np.arange(20))
        (x, y), meta = buffer.sample(4)
        found: int = len(buffer) + buffer.seen + buffer.max_size
        problems: list[leanreplay.Problem] = buffer.check()
        try:
            buffer.sample(1000)
        except LeanReplayError as error:
            print(error, x.shape, y.shape, sorted(meta), found, problems)
    with leanreplay.open(folder / "replay.h5") as reader:
        print(len(reader), sizes, exemplars(np.arange(12.0).reshape(6, 2)))


if __name__ == "__main__":
    main()
