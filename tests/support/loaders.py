"""What the tests of loaders share: buffers, an oracle of batches, a gate in the way of the background."""

from __future__ import annotations

import io
import os
import textwrap
import threading
import time

import numpy as np
import pytest
import torch
from interpreter import Script

from leanreplay import (
    ClassBalancedBuffer,
    GreedyClassBalancingBuffer,
    InfiniteBuffer,
    ReservoirBuffer,
    SlidingWindowBuffer,
    WeightedReservoirBuffer,
)
from leanreplay.buffers.drawing import UNIFORM
from leanreplay.torch import ReplayLoader

PATIENCE = 120  # seconds: no test waits so long unless it is wrong
SIZE = 6  # samples in a batch

KINDS = {
    "reservoir": lambda path: ReservoirBuffer(40, path, seed=1),
    "window": lambda path: SlidingWindowBuffer(40, path, seed=1),
    "greedy": lambda path: GreedyClassBalancingBuffer(40, path, seed=1),
    "balanced": lambda path: ClassBalancedBuffer(40, path, seed=1),
    "weighted": lambda path: WeightedReservoirBuffer(40, path, seed=1),
    "infinite": lambda path: InfiniteBuffer(path, rows_per_part=16, seed=1),
}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def wait_for(condition):
    """Until it holds; whether it does."""
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


def threads():
    return [t for t in threading.enumerate() if t.name == "leanreplay-loader"]


def samples(start, n):
    """x[i] holds only the number y[i], so that a torn, old or misplaced row shows."""
    y = np.arange(start, start + n)
    return np.repeat(y[:, None], 5, 1).astype(np.float32), y


def metadata(buffer, start, n):
    """For every metadata field that the buffer has, by default "z" and "task"."""
    names = ("z", "task") if buffer.schema is None else buffer.schema.metadata_names
    y = np.arange(start, start + n)
    return {name: y // 10 % 3 if name == "task" else y + 0.5 for name in names}


def feed(buffer, n, start=None):
    """The next n samples of the stream, with labels 0 to 4."""
    start = buffer.seen if start is None else start
    x, y = samples(start, n)
    options = {"weights": 1.0 + y % 3} if isinstance(buffer, WeightedReservoirBuffer) else {}
    buffer.add((x, y % 5), metadata=metadata(buffer, start, n), **options)


def make(kind="reservoir", where="ram", path=None, n=60):
    """A buffer that has seen n samples."""
    buffer = KINDS[kind](path / f"b{len(os.listdir(path))}" if where == "disk" else None)
    feed(buffer, n)
    return buffer


def plain(value):
    """Any nesting of tensors and arrays as one of (dtype, shape, bytes)."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
        value = value.view(torch.int16).numpy().view(np.uint16)  # as the buffer holds it
    array = np.asarray(value)
    return str(array.dtype), array.shape, array.tobytes()


class Oracle:
    """The batches of a loader without a background."""

    def __init__(self, buffer, size, prefetch=2, batches=None, seed=0, rows=None):
        self.buffer, self.size, self.prefetch, self.batches = buffer, size, prefetch, batches
        self.rows = rows or (lambda number: buffer.draws.rows(buffer.current.reading(), size, UNIFORM, f"loader {seed}", number).rows)
        self.ahead, self.delivered, self.passed = [], 0, 0

    def plan(self):
        count = self.prefetch if self.batches is None else min(self.prefetch, self.batches - self.passed)
        while len(self.ahead) < count:
            self.ahead.append(plain(self.buffer.get(self.rows(self.delivered + len(self.ahead)))))

    def __next__(self):
        if self.passed == self.batches:
            self.passed = 0
        self.plan()
        found = self.ahead.pop(0)
        self.delivered += 1
        self.passed += 1
        self.plan()
        return found


def balanced_oracle(buffer, size, prefetch, balance, **options):
    """Draws by a loader that is never iterated: it plans, and nothing else."""
    planner = ReplayLoader(buffer, size, balance=balance)
    return Oracle(buffer, size, prefetch, rows=lambda number: planner._rows(number).rows, **options)


class Gate:
    """A batch_transform in which the background waits until `release`: batches behind it are planned, and not copied."""

    def __init__(self):
        self.semaphore = threading.Semaphore(0)

    def __call__(self, batch):
        assert self.semaphore.acquire(timeout=PATIENCE)
        return batch

    def release(self, n=1):
        self.semaphore.release(n)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release(10_000)


def finish(loader):
    """Until the background has nothing to do."""
    for job in list(loader._planned):
        assert job.ready.wait(PATIENCE)


def clone(item):
    if isinstance(item, dict):
        return {k: clone(v) for k, v in item.items()}
    if isinstance(item, (tuple, list)):
        return type(item)(clone(v) for v in item)
    return item.clone() if isinstance(item, torch.Tensor) else item


def take(loader, n):
    return [next(loader) for _ in range(n)]


class Trouble(Exception):
    pass


class Fails:
    """A function of a batch or a sample that raises when its n-th calls come."""

    def __init__(self, *calls, error=Trouble):
        self.calls, self.n, self.error = calls, 0, error
        self.lock = threading.Lock()

    def __call__(self, value):
        with self.lock:
            self.n += 1
            if self.n in self.calls:
                raise self.error(f"call {self.n}")
        return value


def script(text, *arguments):
    """Run Python in another process."""
    return Script(textwrap.dedent(PRELUDE) + textwrap.dedent(text), *arguments)


PRELUDE = """
    import os, signal, sys, time
    import numpy as np, torch
    import leanreplay
    from leanreplay.torch import ReplayLoader
    def feed(buffer, n):
        y = np.arange(buffer.seen, buffer.seen + n)
        buffer.add((np.repeat(y[:, None], 5, 1).astype("f4"), y % 5), metadata={"z": y + 0.5})
    buffer = leanreplay.ReservoirBuffer(40)
    feed(buffer, 60)
"""


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
