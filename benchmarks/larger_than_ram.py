"""Random reads of a file that is not in memory: `python -m benchmarks.larger_than_ram [--gb 30] [--folder DIR]`.

Fills a buffer of that size, drops it from the page cache (posix_fadvise; no root needed) before each contender, and reads random
batches of 256 images of 3 KB: our `sample`, a pool of 64 `pread` threads on the same file, a default `np.memmap` of it, and h5py.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np

import leanreplay
from benchmarks.common import SAMPLE_BYTES, interleaved, machine, median, private_memory, quartiles, samples, seconds, table
from leanreplay.storage import system
from leanreplay.torch import ReplayLoader

Row = tuple[str, ...]
_BATCH, _IMAGE = 256, 3 * 32 * 32


def fill(path: str, rows: int) -> None:
    """A buffer of that many rows; its label says which image a row holds."""
    x, _, z = samples(20_000)
    with leanreplay.SlidingWindowBuffer(rows, path) as buffer:
        for start in range(0, rows, 2000):
            n = min(2000, rows - start)
            part = slice(start % 20_000, start % 20_000 + n)
            buffer.add((x[part], np.arange(start, start + n)), metadata={"logits": z[part]})
        buffer.flush()


def drop(path: str) -> None:
    """Forget the file's pages: nobody may have it mapped."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def readers(path: str, rows: int) -> dict[str, Callable[[int], float]]:
    """Contenders by name: each reads so many random batches from the file, and returns the seconds that took. Images are checked."""
    with h5py.File(path) as file:
        offset = file["data/0"].id.get_offset()
    rng = np.random.default_rng(0)
    x, _, _ = samples(20_000)

    def check(images: np.ndarray, numbers: np.ndarray) -> None:
        if not np.array_equal(images.reshape(-1, 3, 32, 32), x[numbers % 20_000]):
            raise SystemExit("the images differ from what was added")

    def ours(count: int) -> float:
        with leanreplay.open(path) as buffer:
            taken = 0.0
            for _ in range(count):
                start = time.perf_counter()
                (images, numbers), _ = buffer.sample(_BATCH)
                taken += time.perf_counter() - start
                check(images, numbers)
        return taken

    def pread(count: int) -> float:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        with ThreadPoolExecutor(64) as pool:
            taken = 0.0
            for _ in range(count):
                where = rng.choice(rows, _BATCH, replace=False)
                start = time.perf_counter()
                parts = list(pool.map(lambda r: os.pread(fd, _IMAGE, offset + int(r) * _IMAGE), where))
                images = np.frombuffer(b"".join(parts), np.uint8)
                taken += time.perf_counter() - start
                check(images, where)
        os.close(fd)
        return taken

    def memmap(count: int) -> float:
        view = np.memmap(path, np.uint8, "r", offset, (rows, _IMAGE))
        taken = 0.0
        for _ in range(count):
            where = rng.choice(rows, _BATCH, replace=False)
            start = time.perf_counter()
            images = view[where]
            taken += time.perf_counter() - start
            check(images, where)
        return taken

    def hdf5(count: int) -> float:
        with h5py.File(path) as file:
            taken = 0.0
            for _ in range(count):
                where = np.sort(rng.choice(rows, _BATCH, replace=False))
                start = time.perf_counter()
                images = file["data/0"][where]
                taken += time.perf_counter() - start
                check(images, where)
        return taken

    return {"ours": ours, "pread pool": pread, "np.memmap": memmap, "h5py": hdf5}


def cold_reads(path: str, rows: int, batches: int) -> list[Row]:
    """Rows a second of each contender, from a cold file."""
    contenders = readers(path, rows)
    speed: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(3):
        for name, read in contenders.items():
            count = batches if name in ("ours", "pread pool") else max(2, batches // 20)
            drop(path)
            speed[name].append(count * _BATCH / read(count))
    before = private_memory()
    with leanreplay.open(path) as buffer:
        for _ in range(batches):
            buffer.sample(_BATCH)
        private = private_memory() - before
    mine = float(np.median(speed["ours"]))
    found: list[Row] = []
    for name, wanted in (("pread pool", ">= 1.2"), ("np.memmap", ">= 40"), ("h5py", "")):
        theirs = float(np.median(speed[name]))
        found.append((
            "cold batches of 256, all fields and checksums" if name == "pread pool" else "", f"{mine:,.0f} rows/s",
            f"{name}, images only: {theirs:,.0f} rows/s",
            f"{mine / theirs:.1f}", wanted,
        ))  # fmt: skip
    found.append(("private memory that sampling added", f"{private:.0f} MB", "", "", "< 64 MB"))
    return found


def warm_reads(folder: str, repetitions: int) -> Row:
    """A file in memory: with what is done for cold ones, and without."""
    path = os.path.join(folder, "warm.h5")
    fill(path, 100_000)
    with leanreplay.open(path) as with_it, leanreplay.open(path) as without:
        store = without.current.store
        system.advise(store.mapping.map, "NORMAL", 0, store.layout.file_size)
        store.columns.ahead.large = []
        without.draws.begin(10**9, 0)  # other rows than the first, which the caches of the processor now hold
        found = interleaved(
            {"with": lambda: seconds(lambda: with_it.sample(_BATCH)), "without": lambda: seconds(lambda: without.sample(_BATCH))},
            repetitions,
        )
    mine, theirs = median(found["with"]), median(found["without"])
    return (
        "batches of 256 from a file in memory", f"{mine * 1e6:.0f} us ({quartiles(found['with'], 1e6)})", f"without: {theirs * 1e6:.0f} us",
        f"{mine / theirs:.2f}", "<= 1.10",
    )  # fmt: skip


def training(path: str, steps: int) -> Row:
    """A step of 20 ms beside a buffer whose batches of 256 are copied ahead: cold, then the same rows again, warm."""

    def work() -> None:
        end = time.perf_counter() + 0.02
        a = np.ones((64, 64))
        while time.perf_counter() < end:
            a @ a

    def run() -> float:
        with leanreplay.open(path) as buffer, ReplayLoader(buffer, _BATCH) as loader:
            next(loader)
            taken = []
            for _ in range(steps):
                taken.append(seconds(lambda: (next(loader), work())))
            return float(np.median(taken))

    drop(path)
    cold, warm = run(), run()
    return (
        "training step of 20 ms, batch of 256 from a cold buffer",
        f"{cold * 1e3:.1f} ms",
        f"warm: {warm * 1e3:.1f} ms",
        f"{cold / warm:.2f}",
        "<= 1.2",
    )


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=30.0, help="size of the buffer (default: 30)")
    parser.add_argument("--folder", default=None, help="where the buffer lies (default: a temporary folder)")
    options = parser.parse_args()
    rows = int(options.gb * 1e9 / (SAMPLE_BYTES + 40))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = os.path.join(folder, "cold.h5")
        warm = warm_reads(folder, 500)
        took = seconds(lambda: fill(path, rows))
        found = cold_reads(path, rows, 400)
        found.append(training(path, 200))
        found.append(warm)
    print(machine())
    print(f"{options.gb:g} GB, {rows:,} rows; filled in {took:.0f} s")
    print()
    print(table(found, ("work", "ours", "beside", "ratio", "wanted")))


if __name__ == "__main__":
    main()
