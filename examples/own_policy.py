"""An own buffer by writing one policy: keep the hardest samples of the stream, by a score that comes with each of them.

    python examples/own_policy.py

A policy says which row each incoming sample takes. It sees positions and groups, never the samples; here the group is
the sample's difficulty. Storage, crash safety, reading, restore points: all as in the buffers that come with the library.
"""

from __future__ import annotations

import heapq
import os
import tempfile

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits

import leanreplay

Ints = npt.NDArray[np.int64]


class HardestPolicy(leanreplay.Policy):
    """The `capacity` samples with the highest groups; of equal ones the earlier. A heap gives the easiest sample held."""

    needs_groups = True

    def load(self, positions: Ints, groups: Ints) -> None:
        """After opening, or an interrupted commit: all there is to know stands in the index."""
        self.heap = [(int(g), -int(p), row) for row, (p, g) in enumerate(zip(positions, groups, strict=True))]
        heapq.heapify(self.heap)

    def plan(self, start: int, groups: Ints, max_rows: int) -> leanreplay.Plan:
        """Plan.rows[i] is the row that sample start + i takes, -1 to reject it."""
        rows = np.full(min(len(groups), max_rows), -1)
        for i, group in enumerate(groups[: len(rows)].tolist()):
            if len(self.heap) < self.capacity:
                rows[i] = len(self.heap)
                heapq.heappush(self.heap, (group, -(start + i), int(rows[i])))
            elif (group, -(start + i)) > self.heap[0][:2]:
                rows[i] = self.heap[0][2]
                heapq.heapreplace(self.heap, (group, -(start + i), int(rows[i])))
        return leanreplay.Plan(rows)

    def keep(self, capacity: int, positions: Ints, groups: Ints) -> Ints:
        """For `buffer.resize`."""
        return np.lexsort((-positions, groups))[-capacity:]


class HardestBuffer(leanreplay.DataBuffer):
    """Keeps the hardest samples: `buffer.add(batch, group=difficulty)`, difficulty (n,) integers."""

    policy_class = HardestPolicy


def main() -> None:
    digits = load_digits()
    x, y = (digits.images * (255 / 16)).astype(np.uint8), digits.target
    # How hard a digit is: its distance from the mean of its class, in thousandths of a pixel's range.
    means = np.stack([digits.data[y == c].mean(0) for c in range(10)])
    difficulty = (1000 * np.linalg.norm(digits.data - means[y], axis=1) / 16).astype(np.int64)

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "hardest.h5")
        with HardestBuffer(50, path) as buffer:
            for start in range(0, 1000, 32):
                stop = min(start + 32, 1000)
                buffer.add((x[start:stop], y[start:stop]), group=difficulty[start:stop])
            print(buffer)

        # Closed and opened again (another process could do this): the file says which class it is, and the policy goes on.
        with leanreplay.open(path, mode="r+") as buffer:
            buffer.add((x[1000:], y[1000:]), group=difficulty[1000:])
            print(buffer)
            held = np.sort(buffer.get_metadata("position"))
            assert not buffer.check()

    hardest = np.sort(np.lexsort((np.arange(len(y)), -difficulty))[:50])
    print("the 50 hardest of all digits:", "yes" if np.array_equal(held, hardest) else "no")
    print(f"difficulty: {difficulty[held].mean():.0f} of those held, {difficulty.mean():.0f} of all")
    print("held of each digit:", np.bincount(y[held], minlength=10))


if __name__ == "__main__":
    main()
