"""What a library costs before and beside its work, each figure from fresh interpreters: import, first calls, private memory."""

from __future__ import annotations

import json
import tempfile

from benchmarks import rivals
from benchmarks.common import SAMPLE_BYTES, median, python

_TORCHVISION = """
import torch
try:
    import torchvision
except RuntimeError:  # see rivals.let_torchvision_import
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
_IMPORTS = {
    "ours": "import leanreplay",
    "ours, with torch": "import leanreplay, leanreplay.torch",
    "avalanche": _TORCHVISION + "from avalanche.training.storage_policy import ReservoirSamplingBuffer",
    "torchrl": "from torchrl.data import LazyMemmapStorage, ReplayBuffer",
    "cpprb": "import cpprb",
}

# In one process: import, first batch and draw, then more, with samples made piece by piece so that the source does not count.
_CODE = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
start = time.perf_counter()
{imports}
imported = time.perf_counter() - start

def private():
    with open("/proc/self/status") as file:
        return int(file.read().split("RssAnon:")[1].split()[0]) / 1024

after_import = private()
if {rows} == 0:
    print(json.dumps([imported, after_import]))
    sys.exit()

import numpy as np
from benchmarks import rivals

def batch(first, n):
    x = np.empty((n, 3, 32, 32), np.uint8)
    x[...] = np.arange(n, dtype=np.uint8)[:, None, None, None]
    return x, np.arange(first, first + n), np.zeros((n, 10), np.float32)

b = batch(0, 32)
start = time.perf_counter()
contender = rivals.BUFFERS[{library!r}]({folder!r}, {rows})
contender.add(contender.prepare(*b))
contender.sample(8)
first = time.perf_counter() - start
before = private()
for i in range(0, {rows}, 1000):
    contender.add(contender.prepare(*batch(i, 1000)))
for i in range(20):
    contender.sample(256)
print(json.dumps([imported, after_import, first, private() - before]))
"""


def _run(name: str, rows: int, folder: str, cache: str) -> list[float]:
    """Seconds of the import and private MB after it; with rows also seconds of the first batch and draw, and private MB of the others."""
    library = name.split(",", maxsplit=1)[0]
    code = _CODE.format(imports=_IMPORTS[name], library=library, rows=rows, folder=folder)
    found: list[float] = json.loads(python(code, NUMBA_CACHE_DIR=cache).splitlines()[-1])
    return found


def starting(quick: bool, folder: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table; a library that is missing has a row that says why."""
    rows, repetitions = (10_000, 1) if quick else (50_000, 3)
    header = (
        "library", "import", "first add and sample, empty kernel cache", "the same, filled cache", "private memory after import",
        f"added by {rows * SAMPLE_BYTES / 1e6:.0f} MB of samples",
    )  # fmt: skip
    names = [name for name in _IMPORTS if rivals.why_not(name.split(",", maxsplit=1)[0]) is None]
    cold: list[list[float]] = []
    warm: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            cold.append(_run("ours", 1_000, folder, cache))
            for name in names:
                warm[name].append(_run(name, 0 if name == "ours, with torch" else rows, folder, cache))
    table: list[tuple[str, ...]] = []
    for name in _IMPORTS:
        if name not in names:
            table.append((name, f"skipped: {rivals.why_not(name)}", "", "", "", ""))
            continue
        columns = [median(list(values)) for values in zip(*warm[name], strict=True)]
        row = [name.replace("ours", "leanreplay"), f"{columns[0]:.2f} s", "", "", f"{columns[1]:.0f} MB", ""]
        if len(columns) > 2:
            row[2] = f"{median([c[2] for c in cold]):.2f} s" if name == "ours" else "compiles nothing"
            row[3], row[5] = f"{columns[2] * 1e3:,.0f} ms", f"{columns[3]:.1f} MB"
        table.append(tuple(row))
    return header, table
