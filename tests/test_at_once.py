"""A commit in one kernel call, which is what most are, leaves the bytes of one made step by step."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

import leanreplay
from leanreplay import ClassBalancedBuffer, GreedyClassBalancingBuffer, ReservoirBuffer, SlidingWindowBuffer, store
from leanreplay.kernels import rows as kernel

KINDS = [ReservoirBuffer, SlidingWindowBuffer, GreedyClassBalancingBuffer, ClassBalancedBuffer]
METADATA = {0: (), 1: ("a",), 2: ("a", "b"), 3: ("a", "b", "c")}


def stream(start: int, stop: int, names: tuple[str, ...] = ("a",)) -> dict[str, Any]:
    p = np.arange(start, stop)
    x = (p[:, None] * 40503 % 65521 * np.arange(1, 78) % 251).astype(np.uint8)
    values = {"a": (p % 7).astype(np.int8), "b": np.stack([p, -p], 1).astype(np.float32), "c": p.astype(np.float64)}
    return {"batch": (x, p * 7919 % 5), "metadata": {name: values[name] for name in names}}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each commit that was one call."""
    found: list[int] = []
    whole = kernel.commit_rows

    def call(*args: Any) -> None:
        found.append(args[2].shape[0])
        whole(*args)

    monkeypatch.setattr(kernel, "commit_rows", call)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", [2, 3, 4, 5])
def test_the_same_bytes(kind: Any, fields: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    """Every byte of the file, journal and headers too, after each batch; five fields are one too many."""
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=7))
    names = METADATA[fields - 2]
    paths = [tmp_path / "once.h5", tmp_path / "steps.h5"]
    with kind(40, paths[0], seed=1) as once, kind(40, paths[1], seed=1) as steps:
        for start in range(0, 300, 12):
            for at_once, buffer in ((True, once), (False, steps)):
                monkeypatch.setattr(store, "_AT_ONCE", at_once)
                before = len(calls)
                buffer.add(**stream(start, start + 12, names))
                assert at_once or len(calls) == before
            files = [np.fromfile(path, np.uint8) for path in paths]
            assert files[0].shape == files[1].shape and np.flatnonzero(files[0] != files[1]).tolist() == []
        assert once.check() == [] and once.seen == 300
    assert (sum(calls) > 40) == (fields < 5)


def test_what_is_one_call(tmp_path: Path, calls: list[int]) -> None:
    """Batches in memory and datasets; not what needs something between the steps, or a kernel for memory of another kind."""

    def made(action: Any, **options: Any) -> int:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.h5"
        with SlidingWindowBuffer(30, path, **options) as buffer:
            before = len(calls)
            action(buffer)
            assert buffer.check() == []
            return len(calls) - before

    def twice(buffer: Any) -> None:
        buffer.add(**stream(0, 20))
        buffer.add(**stream(20, 40))

    def dataset(buffer: Any) -> None:
        whole = stream(0, 20)
        buffer.update(list(zip(*whole["batch"], strict=True)), metadata=whole["metadata"])

    def marked(buffer: Any) -> None:
        buffer.add(**stream(0, 20))
        buffer.state_dict()
        buffer.add(**stream(20, 40))

    def moved(buffer: Any) -> None:
        buffer.add(**stream(0, 20))
        buffer.add(**stream(20, 40), moved=([15], [15], {"a": np.ones(1, np.int8)}))

    def of(change: Any) -> Any:
        def action(buffer: Any) -> None:
            whole = stream(0, 20)
            (x, y) = whole["batch"]
            buffer.add((change(x), y), metadata=whole["metadata"])
            assert (buffer.get(np.arange(20))[0][0] == x).all()

        return action

    def read_only(x: Any) -> Any:
        x.flags.writeable = False
        return x

    assert made(twice) == 2
    assert made(dataset) == 1
    assert made(marked) == 1
    assert made(moved) == 1
    assert made(twice, durable=True) == 0
    assert made(of(lambda x: x)) == 1
    assert made(of(read_only)) == 0
    assert made(of(np.asfortranarray)) == 0


def test_fences_are_compiled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Journal, seal, rows and header reach the file in that order: a fence between each two of them."""
    if not hasattr(kernel.commit_rows, "py_func"):
        pytest.skip("kernels run as Python")
    with ReservoirBuffer(10) as buffer:
        buffer.add(np.arange(5.0))
    again = numba.njit(nogil=True)(kernel.commit_rows.py_func)  # what comes from the cache cannot be looked at
    again.compile(kernel.commit_rows.signatures[0])
    (code,) = again.inspect_llvm().values()
    assert code.count("fence acq_rel") == 3


def test_one_compilation(tmp_path: Path) -> None:
    """Dtypes, numbers of fields, tensors and arrays: the same kernel."""
    if not hasattr(kernel.commit_rows, "signatures"):
        pytest.skip("kernels run as Python")
    for i, data in enumerate([np.zeros((3, 2)), np.zeros(3, "S5"), (np.zeros(3, "u1"), np.zeros((3, 1), "i4"))]):
        with leanreplay.ReservoirBuffer(10, tmp_path / f"{i}.h5") as buffer:
            buffer.add(data)
    assert len(kernel.commit_rows.signatures) == 1
