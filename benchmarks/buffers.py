"""The buffer beside its limits: `python -m benchmarks.buffers [--quick] [--folder DIR]`.

CIFAR-shaped samples of 3,120 bytes, buffer on disk. Every line is measured in turn with its limit; the figure is the ratio of the
medians. "wanted" was set before the code was written.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

import numpy as np

import leanreplay
from benchmarks.common import SAMPLE_BYTES, interleaved, machine, median, python, quartiles, samples, seconds, table

Row = tuple[str, ...]


def sampling(folder: str, rows: int, repetitions: int) -> Row:
    """Batches of 256 from many rows, against np.take of the same bytes from a plain array."""
    x, y, z = samples(20_000)
    buffer = leanreplay.SlidingWindowBuffer(rows, os.path.join(folder, "sampling.h5"))
    plain = np.empty((rows, SAMPLE_BYTES), np.uint8)
    for start in range(0, rows, 1000):
        part = slice(start % 20_000, start % 20_000 + 1000)
        buffer.add((x[part], y[part]), metadata={"logits": z[part]})
        packed = [a[part].reshape(1000, -1).view(np.uint8) for a in (x, y.reshape(-1, 1), z)]
        plain[start : start + 1000] = np.concatenate(packed, axis=1)
    (xs, ys), meta = buffer.sample(256)
    at = meta["position"] % 20_000
    if not (np.array_equal(xs, x[at]) and np.array_equal(ys, y[at]) and np.array_equal(meta["logits"], z[at])):
        raise SystemExit("sampled rows differ from what was added")
    rng = np.random.default_rng(1)
    held: list[Any] = [None, None]

    def ours() -> float:
        def call() -> None:
            held[0] = buffer.sample(256)

        return seconds(call)

    def limit() -> float:
        where = rng.choice(rows, 256, replace=False)

        def call() -> None:
            held[1] = np.take(plain, where, axis=0)

        return seconds(call)

    found = interleaved({"ours": ours, "np.take": limit}, repetitions)
    buffer.close()
    mine, theirs = median(found["ours"]), median(found["np.take"])
    return (
        f"sample 256 of {rows:,} rows", f"{mine * 1e6:.0f} us ({quartiles(found['ours'], 1e6)})",
        f"np.take {theirs * 1e6:.0f} us ({quartiles(found['np.take'], 1e6)})", f"{theirs / mine:.2f}", ">= 0.75",
    )  # fmt: skip


def adding(folder: str, stream: int, repetitions: int) -> Row:
    """Batches of 32 into a reservoir of 5,000 rows, against memcpy: bytes offered a second."""
    x, y, z = samples(stream)
    schema = leanreplay.Schema.from_batch((x[:1], y[:1]), {"logits": z[:1]})
    source = np.ones(400_000_000, np.uint8)
    target = np.ones_like(source)
    path = os.path.join(folder, "adding.h5")

    def ours() -> float:
        buffer = leanreplay.ReservoirBuffer(5000, path, mode="w", schema=schema)

        def call() -> None:
            for i in range(0, stream, 32):
                buffer.add((x[i : i + 32], y[i : i + 32]), metadata={"logits": z[i : i + 32]})

        taken = seconds(call)
        problems = buffer.check()
        if problems or buffer.seen != stream:
            raise SystemExit(f"the buffer is wrong: {problems}")
        buffer.close()
        return taken

    found = interleaved({"ours": ours, "memcpy": lambda: seconds(lambda: np.copyto(target, source))}, repetitions)
    speed = stream * SAMPLE_BYTES / np.array(found["ours"]) / 1e9
    copy = source.nbytes / np.array(found["memcpy"]) / 1e9
    return (
        f"add batches of 32 to 5,000 rows, stream {stream:,}", f"{np.median(speed):.2f} GB/s ({quartiles(list(speed), 1)})",
        f"memcpy {np.median(copy):.1f} GB/s ({quartiles(list(copy), 1)})", f"{np.median(speed) / np.median(copy):.2f}", ">= 0.24",
    )  # fmt: skip


def saturated(folder: str, batches: int, repetitions: int) -> Row:
    """Batches of 1,000 into a full reservoir of 1,000 rows, against a loop that asks np.random for each sample."""
    x, y, z = samples(20_000)
    buffer = leanreplay.ReservoirBuffer(1000, os.path.join(folder, "saturated.h5"))
    batch = [((x[i : i + 1000], y[i : i + 1000]), {"logits": z[i : i + 1000]}) for i in range(0, 20_000, 1000)]
    for i in range(200):
        buffer.add(batch[i % 20][0], metadata=batch[i % 20][1])
    kept: dict[int, int] = {}

    def ours() -> float:
        def call() -> None:
            for i in range(batches):
                data, metadata = batch[i % 20]
                buffer.add(data, metadata=metadata)

        return seconds(call)

    def naive() -> float:
        rng = np.random.RandomState(0)

        def call() -> None:
            for seen in range(200_000, 220_000):
                slot = rng.randint(0, seen + 1)
                if slot < 1000:
                    kept[slot] = seen

        return seconds(call)

    found = interleaved({"ours": ours, "loop": naive}, repetitions)
    buffer.close()
    mine, theirs = batches * 1000 / median(found["ours"]) / 1e6, 0.02 / median(found["loop"])
    return (
        "saturated reservoir of 1,000, batches of 1,000", f"{mine:.1f} million samples/s",
        f"np.random loop {theirs:.2f} million/s", f"{mine / theirs:.0f}", ">= 20 million/s",
    )  # fmt: skip


def checkpoints(folder: str, rows: int, repetitions: int) -> list[Row]:
    """state_dict and load_state_dict of a large buffer that moved on by 1,000 samples, against copying its file."""
    x, y, z = samples(20_000)
    buffer = leanreplay.ReservoirBuffer(rows, os.path.join(folder, "checkpoints.h5"))
    for start in range(0, rows, 1000):
        part = slice(start % 20_000, start % 20_000 + 1000)
        buffer.add((x[part], y[part]), metadata={"logits": z[part]})
    names: list[float] = []
    copies: list[float] = []
    for _ in range(3):
        copies.append(seconds(lambda: buffer.save(os.path.join(folder, "copy"))))

    def load() -> float:
        state: dict[str, Any] = {}

        def mark() -> None:
            state.update(buffer.state_dict())

        names.append(seconds(mark))
        before = buffer.get_metadata("position")
        buffer.add((x[:1000], y[:1000]), metadata={"logits": z[:1000]})
        taken = seconds(lambda: buffer.load_state_dict(state))
        if not np.array_equal(before, buffer.get_metadata("position")):
            raise SystemExit("load_state_dict did not bring the rows back")
        # Move on, so that the next round makes a new restore point.
        buffer.add((x[:10], y[:10]), metadata={"logits": z[:10]})
        return taken

    loads = interleaved({"load": load}, repetitions)["load"]
    size = buffer.nbytes / 1e6
    buffer.close()
    copy = f"save() {median(copies) * 1e3:.0f} ms"
    return [
        (f"state_dict, {size:.0f} MB", f"{median(names[1:]) * 1e3:.2f} ms", copy, f"{median(copies) / median(names[1:]):.0f}", "< 5 ms"),
        (f"load_state_dict, {size:.0f} MB", f"{median(loads) * 1e3:.2f} ms", copy, f"{median(copies) / median(loads):.0f}", "< 5 ms"),
    ]


def starting(folder: str, repetitions: int) -> list[Row]:
    """Import, and the first add and sample, with an empty and a filled kernel cache."""
    imports = "import time; t = time.perf_counter(); import leanreplay; s = time.perf_counter() - t; import sys; "
    imports += "assert 'torch' not in sys.modules and 'h5py' not in sys.modules; print(s)"
    first = (
        "import time, numpy as np, leanreplay; t = time.perf_counter(); b = leanreplay.ReservoirBuffer(1000, {path!r}, mode='w'); "
        "b.add((np.zeros((32, 3, 32, 32), 'uint8'), np.arange(32)), metadata={{'logits': np.zeros((32, 10), 'float32')}}); "
        "b.sample(8); print(time.perf_counter() - t)"
    ).format(path=os.path.join(folder, "first.h5"))
    loaded = [float(python(imports)) for _ in range(repetitions)]
    cold, warm = [], []
    for i in range(repetitions):
        cache = os.path.join(folder, f"cache{i}")
        cold.append(float(python(first, NUMBA_CACHE_DIR=cache)))
        warm.append(float(python(first, NUMBA_CACHE_DIR=cache)))
    return [
        ("import leanreplay (no torch, no h5py, nothing compiled)", f"{median(loaded):.2f} s", "", "", ""),
        ("first add and sample, cold kernel cache", f"{median(cold):.2f} s", "", "", "< 4 s"),
        ("first add and sample, warm kernel cache", f"{median(warm):.2f} s", "", "", "< 0.6 s"),
    ]


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and rows")
    parser.add_argument("--folder", default=None, help="where the buffers lie (default: a temporary folder)")
    options = parser.parse_args()
    quick = options.quick
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = [sampling(folder, 20_000 if quick else 200_000, 50 if quick else 500)]
        rows.append(adding(folder, 20_000, 3 if quick else 15))
        rows.append(saturated(folder, 200, 3 if quick else 9))
        rows += checkpoints(folder, 20_000 if quick else 190_000, 5 if quick else 25)
        rows += starting(folder, 1 if quick else 3)
    print(machine())
    print()
    print(table(rows, ("work", "ours, median (quartiles)", "limit", "ratio", "wanted")))


if __name__ == "__main__":
    main()
