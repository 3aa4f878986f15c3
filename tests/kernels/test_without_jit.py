"""Where Python itself runs the kernels (NUMBA_DISABLE_JIT=1) buffers hold the same samples in the same rows, bit for bit."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from paths import import_path

import leanreplay as lr

MAKERS: list[Callable[..., Any]] = [
    lambda p, **o: lr.ReservoirBuffer(6, p, seed=5, **o),
    lambda p, **o: lr.SlidingWindowBuffer(6, p, seed=5, **o),
    lambda p, **o: lr.GreedyClassBalancingBuffer(6, p, seed=5, **o),
    lambda p, **o: lr.InfiniteBuffer(p, rows_per_part=5, seed=5, **o),
    lambda p, **o: lr.ClassBalancedBuffer(6, p, seed=5, **o),
    lambda p, **o: lr.ClassBalancedBuffer(6, p, seed=5, borrow=True, **o),
    lambda p, **o: lr.ClassBalancingReservoirBuffer(6, p, seed=5, **o),
    lambda p, **o: lr.ExperienceBalancedBuffer(6, p, seed=5, **o),
]


def batch(start: int, stop: int) -> tuple[Any, Any]:
    p = np.arange(start, stop)
    x = (p[:, None] * np.arange(1, 4)).astype(np.uint8)
    return (x, p * 7 % (3 + p // 4) - 2), {"z": np.stack([p, -p], 1).astype(np.float32)}


def held(buffer: Any) -> Any:
    assert buffer.check() == [], buffer.check()
    (x, y), meta = buffer.get(buffer.get_metadata("idx"))
    arrays = [np.ascontiguousarray(a).tobytes() for a in (x, y, meta["z"], meta["position"], meta["idx"])]
    return arrays, buffer.seen, len(buffer), buffer.group_sizes() if hasattr(buffer, "group_sizes") else 0


def whole_lives(folder: Path) -> Iterator[Any]:
    """Create, add, update, sample, state, resize and reopen, of buffers in RAM and on disk."""
    for i, make in enumerate(MAKERS):
        for path in (None, folder / f"{i}.h5"):
            buffer = make(path)
            for start, stop in ((0, 3), (3, 4), (4, 13)):
                data, meta = batch(start, stop)
                buffer.add(data, metadata=meta)
            state = buffer.state_dict()
            yield held(buffer)
            data, meta = batch(13, 20)
            buffer.update(list(zip(*data, strict=True)), metadata=meta)
            buffer.set_metadata("z", np.ones((2, 2), np.float32), rows=buffer.sample(2)[1]["idx"])
            yield held(buffer)
            buffer.load_state_dict(state)
            yield held(buffer)
            yield buffer.sample(4)[1]["idx"].tolist() + buffer.sample(4, replace=True)[1]["idx"].tolist()
            if i != 3:
                buffer.resize(4)
                yield held(buffer)
            buffer.close()
            if path:
                with lr.open(path, mode="r+") as buffer:
                    data, meta = batch(13, 15)
                    buffer.add(data, metadata=meta)
                    yield held(buffer)


def many_groups(_: Path) -> Iterator[Any]:
    """Groups that come, give way and go; quotas, borrowing, fixed numbers and CBRS."""
    for groups, make in (
        (15, lambda: lr.ClassBalancedBuffer(9, seed=3)),
        (15, lambda: lr.ClassBalancedBuffer(9, seed=3, borrow=True)),
        (4, lambda: lr.ClassBalancedBuffer(9, seed=3, adaptive_size=False, total_num_classes=4)),
        (15, lambda: lr.ClassBalancingReservoirBuffer(9, seed=3)),
    ):
        with make() as buffer:
            for start in range(0, 120, 13):
                p = np.arange(start, start + 13)
                buffer.add(p, group=p * p % groups * np.where(p % 2, 1, 2**40) % groups)
                yield buffer.get_metadata("position").tolist(), buffer.group_sizes()
                if start == 26:
                    state = buffer.state_dict()
            buffer.load_state_dict(state)
            buffer.resize(5)
            buffer.add(np.arange(50), group=np.arange(50) % groups)
            assert buffer.check() == []
            yield buffer.get_metadata("position").tolist(), buffer.group_sizes()


def weights(_: Path) -> Iterator[Any]:
    with lr.WeightedReservoirBuffer(9, seed=3) as buffer:
        for start in range(0, 120, 13):
            p = np.arange(start, start + 13)
            buffer.add(p, weights=np.ldexp(p % 5, p % 40 - 20))
            yield buffer.get_metadata("position").tolist(), buffer.get_metadata("weight").tolist()
        buffer.resize(5)
        yield buffer.get_metadata("position").tolist()


def everything(folder: Path) -> list[str]:
    """A digest of each moment."""
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of capacity; and unsigned words wrap around in NumPy too, but it warns of that
        moments = itertools.chain(whole_lives(folder), many_groups(folder), weights(folder))
        return [hashlib.sha256(repr(moment).encode()).hexdigest() for moment in moments]


def test_without_jit(tmp_path: Path) -> None:
    code = "import json, pathlib, sys, test_without_jit as t; print(json.dumps(t.everything(pathlib.Path(sys.argv[1]))))"
    path = import_path(__file__)
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "plain")],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    found, wanted = json.loads(ran.stdout), everything(tmp_path / "compiled")
    assert len(wanted) > 120
    assert found == wanted, [i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b]
