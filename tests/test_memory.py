"""G4: private memory does not grow with the size of the buffer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import numpy as np
from leanreplay import ReservoirBuffer, Schema

ROW = 3 * 64 * 64
ROWS = int(sys.argv[2]) // ROW


def private() -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


rng = np.random.default_rng(0)
x = rng.integers(0, 256, (512, 3, 64, 64), dtype=np.uint8)


class Images:
    def __len__(self):
        return 4000

    def __getitem__(self, i):
        return x[i % 512], i


def use(buffer, samples):
    for start in range(0, samples, 512):
        buffer.add((x, np.arange(start, start + 512)))
        buffer.sample(64)
    buffer.update(Images())


with ReservoirBuffer(512, None) as small:
    use(small, 2048)
warm = private()
buffer = ReservoirBuffer(ROWS, sys.argv[1], schema=Schema.from_sample((x[0], 0)))
use(buffer, ROWS + ROWS // 4)
state = buffer.state_dict()
use(buffer, 4096)
buffer.load_state_dict(state)
(images, labels), meta = buffer.sample(256)
assert len(buffer) == ROWS and (images == x[meta["position"] % 512]).all()
print(private() - warm)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is Linux's")
def test_private_memory_stays_small(tmp_path: Path) -> None:
    """G4: filling, overfilling, sampling, update and going back, in a file of 2 GB: under 64 MB more than after warm-up."""
    size = 2_000_000_000
    if shutil.disk_usage(tmp_path).free < 2 * size:
        pytest.skip("needs 4 GB of disk")
    path = tmp_path / "large.h5"
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(path), str(size)], capture_output=True, text=True, check=False)
    for left in tmp_path.glob("large.h5*"):
        left.unlink()  # do not leave gigabytes in a kept folder
    assert run.returncode == 0, run.stderr
    grown = float(run.stdout)
    assert grown < 64, f"private memory grew by {grown:.0f} MB"
