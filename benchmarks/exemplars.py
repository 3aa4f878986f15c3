"""Exemplar buffers beside their limits: `python -m benchmarks.exemplars [--quick] [--folder DIR]`.

Every line is measured in turn with its limit; the figure is the ratio of the medians. "wanted" was set before the code was written.
"""

from __future__ import annotations

import argparse
import os
import tempfile

import numpy as np

import leanreplay
from benchmarks.common import interleaved, machine, median, quartiles, samples, seconds, table

Row = tuple[str, ...]
_CLASSES, _EXPERIENCES, _EACH = 10, 5, 10_000


class Images:
    """A map-style dataset of arrays, with targets."""

    def __init__(self, x: np.ndarray, targets: np.ndarray) -> None:
        self.x, self.targets = x, targets

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.int64]:
        return self.x[i], self.targets[i]


def updating(folder: str, repetitions: int) -> list[Row]:
    """5 x 10,000 samples of 2 classes each into 2,000 rows, against writing only what is in the buffer at the end of each update."""
    n = _EXPERIENCES * _EACH
    x, _, _ = samples(n)
    y = np.repeat(np.arange(_CLASSES), n // _CLASSES)
    rng = np.random.default_rng(0)
    for e in range(_EXPERIENCES):
        rng.shuffle(y[e * _EACH : (e + 1) * _EACH])
    schema = leanreplay.Schema.from_batch((x[:1], y[:1]))
    parts = [slice(e * _EACH, (e + 1) * _EACH) for e in range(_EXPERIENCES)]
    plain = np.zeros((2000, 3072), np.uint8)

    def feed(how: str) -> float:
        buffer = leanreplay.ClassBalancedBuffer(2000, os.path.join(folder, f"{how}.h5"), mode="w", schema=schema)
        taken = 0.0
        for part in parts:
            data = Images(x[part], y[part]) if how == "update" else (x[part], y[part])
            taken += seconds(lambda: getattr(buffer, how)(data))  # noqa: B023 (called at once)
        if set(buffer.group_sizes().values()) != {200} or buffer.check():
            raise SystemExit(f"the buffer is wrong: {buffer.group_sizes()}, {buffer.check()}")
        rows = buffer.get_metadata("idx")
        (xs, ys), meta = buffer.get(rows)
        if not (np.array_equal(xs, x[meta["position"]]) and np.array_equal(ys, y[meta["position"]])):
            raise SystemExit("the rows differ from what was fed")
        buffer.close()
        return taken

    def limit() -> float:
        """Only the copies: 2,000 samples at first, then the share of the new classes, from random places to random rows."""
        taken = 0.0
        for e, part in enumerate(parts):
            count = 2000 // (e + 1)
            source, target = rng.choice(_EACH, count, replace=False), rng.permutation(2000)[:count]
            flat = x[part].reshape(_EACH, -1)

            def copy() -> None:
                plain[target] = flat[source]  # noqa: B023 (called at once)

            taken += seconds(copy)
        return taken

    found = interleaved({"add": lambda: feed("add"), "update": lambda: feed("update"), "copies": limit}, repetitions)
    copies = median(found["copies"])
    rows = []
    for how, wanted in (("add", ">= 5 million/s"), ("update", "")):
        taken = median(found[how])
        what = "arrays" if how == "add" else "a dataset, item by item"
        rows.append((
            f"class-balanced, 5 x 10,000 images into 2,000 rows, {what}", f"{n / taken / 1e6:.1f} million samples/s ({taken * 1e3:.1f} ms)",
            f"copies alone {copies * 1e3:.1f} ms", f"{copies / taken:.2f}", wanted,
        ))  # fmt: skip
    return rows


def herding(repetitions: int) -> list[Row]:
    """Herding orders, against one matrix product of the same features with themselves."""
    rows = []
    strategy = leanreplay.HerdingSelection()
    for n, count, wanted in ((2000, None, "< 80 ms"), (5000, 20, "< 50 ms")):
        features = np.random.default_rng(n).normal(size=(n, 512))
        found = interleaved(
            {
                "ours": lambda f=features, c=count: seconds(lambda: strategy.sorted_indices(f, c)),
                "product": lambda f=features: seconds(lambda: f @ f.T),
            },
            repetitions,
        )
        mine, product = median(found["ours"]), median(found["product"])
        what = "full order" if count is None else f"first {count}"
        rows.append((
            f"herding n={n:,} d=512, {what}", f"{mine * 1e3:.1f} ms ({quartiles(found['ours'], 1e3)})",
            f"X @ X.T {product * 1e3:.1f} ms", f"{product / mine:.2f}", wanted,
        ))  # fmt: skip
    return rows


def many_groups(repetitions: int, n: int) -> list[Row]:
    """The cost of a sample with 10 groups and with 10,000, 64-byte samples in batches of 1,000 into 20,000 rows."""
    x = np.zeros((n, 8))
    labels = {groups: np.random.default_rng(groups).integers(0, groups, n) for groups in (10, 10_000)}

    def feed(groups: int) -> float:
        with leanreplay.ClassBalancedBuffer(20_000) as buffer:
            y = labels[groups]
            taken = 0.0
            for i in range(0, n, 1000):
                batch = (x[i : i + 1000], y[i : i + 1000])
                taken += seconds(lambda: buffer.add(batch))  # noqa: B023 (called at once)
            if len(buffer.group_sizes()) != groups or max(buffer.group_sizes().values()) != 20_000 // groups:
                raise SystemExit(f"the buffer is wrong: {buffer.group_sizes()}")
            return taken

    found = interleaved({"10": lambda: feed(10), "10000": lambda: feed(10_000)}, repetitions)
    few, many = (median(found[k]) / n * 1e9 for k in ("10", "10000"))
    return [(f"10,000 groups, stream of {n:,}", f"{many:.0f} ns a sample", f"10 groups {few:.0f} ns", f"{many / few:.2f}", "<= 2")]


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and samples")
    parser.add_argument("--folder", default=None, help="where the buffers lie (default: a temporary folder)")
    options = parser.parse_args()
    quick = options.quick
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = updating(folder, 3 if quick else 15)
    rows += herding(3 if quick else 15)
    rows += many_groups(1 if quick else 5, 200_000 if quick else 1_000_000)
    print(machine())
    print()
    print(table(rows, ("work", "ours, median (quartiles)", "beside", "ratio", "wanted")))


if __name__ == "__main__":
    main()
