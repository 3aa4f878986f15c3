"""What a library costs before and beside its work, each figure from fresh interpreters: import, first calls, private memory."""

from __future__ import annotations

import json
import tempfile

from benchmarks import rivals
from benchmarks.common import SAMPLE_BYTES, median, python

_IMPORTS = {
    "ours": "import leanreplay",
    "ours, with torch": "import leanreplay, leanreplay.torch",
    "avalanche": "from avalanche.training.storage_policy import ReservoirSamplingBuffer",
    "torchrl": "from torchrl.data import LazyMemmapStorage, ReplayBuffer",
    "cpprb": "import cpprb",
}

# What lets Avalanche import beside a torch for the processor alone; nothing where it imports as it is.
_PREPARE = {"avalanche": "from benchmarks.rivals import let_torchvision_import\nlet_torchvision_import()\n"}

_IMPORT = """
import json, time
start = time.perf_counter()
{imports}
took = time.perf_counter() - start
status = open("/proc/self/status").read()
print(json.dumps([took, int(status.split("RssAnon:")[1].split()[0]) / 1024]))
"""

# First batch and draw, then more, with samples made piece by piece so that the source does not count.
_CODE = """
import json, time
{imports}
import numpy as np
from benchmarks import rivals
from benchmarks.common import private_memory

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
before = private_memory()
for i in range(0, {rows}, 1000):
    contender.add(contender.prepare(*batch(i, 1000)))
for i in range(20):
    contender.sample(256)
print(json.dumps([first, private_memory() - before]))
"""


def starting(quick: bool, folder: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table; a library that is missing has a row that says why."""
    rows, repetitions = (10_000, 1) if quick else (50_000, 3)
    header = (
        "library", "import", "first add and sample, empty kernel cache", "the same, filled cache", "private memory after import",
        f"added by {rows * SAMPLE_BYTES / 1e6:.0f} MB of samples",
    )  # fmt: skip
    table: list[tuple[str, ...]] = []
    for name, imports in _IMPORTS.items():
        library = name.split(",")[0]
        reason = rivals.why_not(library)
        if reason:
            table.append((name, f"skipped: {reason}", "", "", "", ""))
            continue
        code = _CODE.format(imports=_PREPARE.get(library, "") + imports, library=library, rows=rows, folder=folder)
        cold, warm, imported = [], [], []
        for _ in range(repetitions):
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                for found in (cold, warm):
                    found.append(json.loads(python(code, NUMBA_CACHE_DIR=cache).splitlines()[-1]))
            imported.append(json.loads(python(_IMPORT.format(imports=_PREPARE.get(library, "") + imports)).splitlines()[-1]))
        table.append((
            "leanreplay" + name[4:] if library == "ours" else name,
            f"{median([took for took, _ in imported]):.2f} s",
            f"{median([first for first, _ in cold]):.2f} s" if library == "ours" else "compiles nothing",
            f"{median([first for first, _ in warm]) * 1e3:,.0f} ms",
            f"{median([private for _, private in imported]):.0f} MB",
            f"{median([added for _, added in warm]):.1f} MB",
        ))  # fmt: skip
    return header, table
