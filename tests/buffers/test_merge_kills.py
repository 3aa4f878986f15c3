"""merge: little memory, and kills and errors leave nothing."""

from __future__ import annotations

import glob
import importlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from merging import STREAMS, expected, feed, held, made

import leanreplay
from leanreplay import (
    ExistsError,
    ReservoirBuffer,
    merge,
)
from leanreplay.kernels import merge as kernel

MEMORY = """
import sys
import numpy as np
import leanreplay as lr

folder, rows = sys.argv[1], int(sys.argv[2])
schema = lr.Schema.from_sample(np.zeros(3000, np.uint8))

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1000

def parts(n, name):
    found = []
    for stream in range(3):
        found.append(f"{folder}/{name}{stream}.h5")
        with lr.ReservoirBuffer(n, found[-1], stream=stream, schema=schema) as buffer:
            images = np.arange(1000).astype(np.uint8)[:, None].repeat(3000, 1)
            while buffer.seen < n:
                buffer.add(images[: n - buffer.seen])
    return found

small, large = parts(500, "small"), parts(rows, "large")
lr.merge(small, folder + "/warm.h5").close()
before = peak = anonymous()
read = lr.storage.writer.Writer.read

def watched(self, *args):
    global peak
    peak = max(peak, anonymous())
    return read(self, *args)

lr.storage.writer.Writer.read = watched
with lr.merge(large, folder + "/all.h5") as buffer:
    peak = max(peak, anonymous())
    assert len(buffer) == rows, len(buffer)
    x, meta = buffer.sample(256)
    assert (x == (meta["position"] % 2**48 % 1000).astype(np.uint8)[:, None]).all()
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_stays_small(tmp_path: Path) -> None:
    """G4: merging three buffers of 180 MB takes under 40 MB of private memory: chunks of 8 MB and 24 bytes a row."""
    try:
        done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path), "60000"], capture_output=True, text=True, check=False)
    finally:
        for path in tmp_path.iterdir():
            path.unlink()
    assert done.returncode == 0, done.stderr[-4000:]
    assert float(done.stdout) < 40, f"private memory grew by {done.stdout} MB"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("mode", ["x", "w"])
def test_killed(mode: str, tmp_path: Path) -> None:
    """Killed at every step, the old file (or none) stands there, or the new one, whole; the next merge works and cleans up."""
    parts = made("classes", tmp_path, STREAMS)
    target = tmp_path / "all.h5"
    wanted = expected("classes", STREAMS, 30)
    old = b""
    if mode == "w":
        ReservoirBuffer(5, target, schema=leanreplay.Schema.from_sample(0)).close()
        old = target.read_bytes()
    merge(parts).close()  # compiled
    steps = [
        ("leanreplay.storage.writer", "Writer.commit"),
        ("leanreplay.storage.reader", "Reader.read"),
        ("leanreplay.storage.system", "publish"),
        ("os", "fsync"),
    ]
    steps += [
        ("leanreplay.storage.system", "allocate"),
        ("leanreplay.storage.system", "sync_folder"),
        ("leanreplay.storage.writer", "Writer.publish"),
    ]
    outcomes = set()
    for (where, name), after in itertools.product(steps, (False, True)):
        if mode == "w":
            target.write_bytes(old)
        else:
            target.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            try:
                holder: Any = importlib.import_module(where)
                *path, last = name.split(".")
                for step in path:
                    holder = getattr(holder, step)
                real = getattr(holder, last)

                def dying(*args: Any, real: Any = real, after: bool = after, **named: Any) -> None:
                    if after:
                        real(*args, **named)
                    os.kill(os.getpid(), signal.SIGKILL)

                setattr(holder, last, dying)
                merge(parts, target, mode=mode)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), (name, after)
        if target.exists() and target.read_bytes() != old:
            outcomes.add("new")
            with leanreplay.open(target) as buffer:
                assert held(buffer) == wanted, (name, after)
        else:
            outcomes.add("old")
            assert target.exists() == (mode == "w")
        with merge(parts, target, mode="w") as buffer:
            assert held(buffer) == wanted
        assert glob.glob(str(tmp_path / ".*.tmp")) == []
    assert outcomes == {"old", "new"}


def test_killed_at_random_instants(tmp_path: Path) -> None:
    """The same without any step in mind."""
    parts = made("reservoir", tmp_path, STREAMS)
    target = tmp_path / "all.h5"
    merge(parts, target).close()
    for i in range(25):
        pid = os.fork()
        if pid == 0:
            try:
                while True:
                    merge(parts, target, mode="w").close()
            finally:
                os._exit(1)
        time.sleep(0.01 + 0.003 * i)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with leanreplay.open(target, "r+") as buffer:
            assert held(buffer) == expected("reservoir", STREAMS, 30)
    merge(parts, target, mode="w").close()
    assert glob.glob(str(tmp_path / ".*.tmp")) == []


def test_an_error_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an exception in the middle there is no file, no temporary and no lock; the inputs stay usable."""
    parts = made("reservoir", None, STREAMS)
    real = leanreplay.storage.writer.Writer.commit

    def failing(*args: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(leanreplay.storage.writer.Writer, "commit", failing)
    with pytest.raises(KeyboardInterrupt):
        merge(parts, tmp_path / "all.h5")
    monkeypatch.setattr(leanreplay.storage.writer.Writer, "commit", real)
    assert [p.name for p in tmp_path.iterdir()] == ["all.h5.lock"]
    with merge(parts, tmp_path / "all.h5") as buffer:
        assert held(buffer) == expected("reservoir", STREAMS, 30)
    feed("reservoir", parts[0], 100)


def test_somebody_else_was_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With mode "x" a file that appears under the name meanwhile stays, whoever made it."""
    parts = made("reservoir", None, STREAMS)
    offer = kernel.offer
    monkeypatch.setattr(kernel, "offer", lambda *args: ((tmp_path / "all.h5").write_text("mine"), offer(*args)))
    with pytest.raises(ExistsError):
        merge(parts, tmp_path / "all.h5")
    assert (tmp_path / "all.h5").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.h5", "all.h5.lock"]
