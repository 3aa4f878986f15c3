"""Signal handlers that read a buffer while it is being read: whatever line they come at, both readings are right.

No signals: a trace function calls the handler at the k-th line that the library runs, for every k.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import leanreplay
import leanreplay.storage.audit
from leanreplay import ClassBalancedBuffer, InfiniteBuffer, ModeError, ReservoirBuffer
from leanreplay.torch import ReplayLoader

HOME = os.path.dirname(leanreplay.__file__)
KINDS = {
    "reservoir": lambda where: ReservoirBuffer(60, where, seed=3),
    "balanced": lambda where: ClassBalancedBuffer(60, where, seed=3, adaptive_size=False, total_num_classes=3),
    "infinite": lambda where: InfiniteBuffer(where, rows_per_part=40, seed=3),
}


def at_line(k: int, work: Callable[[], Any], handler: Callable[[], Any]) -> tuple[Any, bool]:
    """What `work` returns, and whether it ran so many lines that the handler came."""
    lines, before = itertools.count(), sys.gettrace()
    called = False

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal called
        if not frame.f_code.co_filename.startswith(HOME):
            return None
        if event == "line" and next(lines) == k:
            sys.settrace(None)
            called = True
            handler()
        return trace

    sys.settrace(trace)
    try:
        result = work()
    finally:
        sys.settrace(before)
    return result, called


def everywhere(work: Callable[[], Any], handler: Callable[[], Any], step: int = 1) -> Iterator[Any]:
    """What `work` returns, with the handler at each of its lines, or at every so manieth."""
    for k in range(0, 20_000, step):
        result, called = at_line(k, work, handler)
        yield result
        if not called:
            return
    raise AssertionError("work without end")


def feed(buffer: Any, n: int, start: int = 0) -> None:
    p = np.arange(start, start + n)
    buffer.add((np.repeat(p[:, None], 9, 1), p), group=p % 2, metadata={"z": p.astype(np.float32)})


def whole(drawn: Any, n: int) -> list[int]:
    """The positions of a batch, which must be of one piece."""
    (x, y), meta = drawn
    position = meta["position"]
    assert x.shape == (n, 9)
    assert meta["idx"].shape == y.shape == (n,)
    assert (x == position[:, None]).all()
    assert (y == position).all()
    assert (meta["z"] == position).all()
    return position.tolist()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["writer", "reader"])
def buffer(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """A buffer that holds something, and a reader of its file."""
    with KINDS[kind](tmp_path / "b") as writer:
        feed(writer, 100)
        if request.param == "writer":
            yield writer
        else:
            with leanreplay.open(tmp_path / "b") as reader:
                yield reader


def test_a_sample_in_a_sample(buffer: Any) -> None:
    found: list[list[int]] = []

    def handler() -> None:
        found.append(whole(buffer.sample(5), 5))
        whole(buffer.sample(3, replace=True), 3)

    buffer.sample(4)
    count = 1
    for batch in everywhere(lambda: buffer.sample(5), handler):
        found.append(whole(batch, 5))
        count += 3
    assert len({tuple(b) for b in found}) == len(found)  # no number of a draw is used twice, so no draw comes twice
    assert buffer.draws.drawn == count - 2  # the last time the handler did not come


READS = {
    "sample": lambda b: whole(b.sample(30), 30),
    "get": lambda b: whole(b.get(np.arange(30)), 30),
    "items": lambda b: [meta["position"] for _, meta in b.__getitems__(range(3))],
    "metadata": lambda b: b.get_metadata("z").tolist(),
    "group_sizes": lambda b: b.group_sizes(),
    "groups": lambda b: [meta["position"] for _, meta in b.groups[1].__getitems__([0, 1, -1])],
    "check": lambda b: b.check(),
}


@pytest.mark.parametrize("read", READS)
def test_other_reads(buffer: Any, read: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind != "balanced" and read.startswith("group"):
        pytest.skip("no groups")
    monkeypatch.setattr(leanreplay.storage.audit, "structure_problems", lambda _: [])  # which reads with h5py
    others = [READS[name] for name in READS if kind == "balanced" or not name.startswith("group")]
    right = [other(buffer) for other in others]
    counts = itertools.count()

    def handler() -> None:
        which = next(counts) % len(others)
        found = others[which](buffer)
        assert which == 0 or found == right[which]

    wanted = READS[read](buffer)
    for found in everywhere(lambda: READS[read](buffer), handler):
        assert read == "sample" or found == wanted


@pytest.mark.filterwarnings("ignore::leanreplay.CapacityWarning")
@pytest.mark.parametrize("change", ["add", "resize", "rollback"])
def test_the_writer_goes_on_within_a_read(kind: str, change: str, tmp_path: Path) -> None:
    """The handler comes late: the writer, in another process in truth, has changed the file meanwhile."""
    if kind == "infinite" and change == "resize":
        pytest.skip("has no size")
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(KINDS[kind](tmp_path / "b"))
        feed(writer, 100)
        reader = stack.enter_context(leanreplay.open(tmp_path / "b"))
        state = writer.state_dict()
        sizes = itertools.cycle([50, 60])

        def handler() -> None:
            if change == "add":
                feed(writer, 2, writer.seen)
            elif change == "resize":
                writer.resize(next(sizes))
            else:
                writer.load_state_dict(state)
                feed(writer, 60, 100)
            whole(reader.sample(6), 6)
            assert reader.seen == writer.seen

        def work() -> Any:
            return reader.sample(5)

        for batch in everywhere(work, handler, 17 if kind == "infinite" else 1):
            whole(batch, 5)
        assert len(reader) == len(writer)
        assert reader.check() == []
        assert sorted(reader.get_metadata("position")) == sorted(writer.get_metadata("position"))
        if kind == "infinite":
            assert len(reader.current.store.stores) == len(writer.current.store.stores)


@pytest.mark.filterwarnings("ignore::leanreplay.CapacityWarning")
@pytest.mark.parametrize("change", ["resize", "add", "rollback"])
def test_a_read_within_a_change(kind: str, change: str, tmp_path: Path) -> None:
    """It is right, or a ModeError; and the change is not disturbed."""
    if kind == "infinite" and change == "resize":
        pytest.skip("has no size")
    with KINDS[kind](tmp_path / "b") as buffer, KINDS[kind](None) as twin:
        feed(buffer, 100)
        feed(twin, 100)
        state = buffer.state_dict()
        refused = []
        sizes = itertools.cycle([50, 40])

        def handler() -> None:
            try:
                whole(buffer.sample(5), 5)
            except ModeError as error:
                refused.append(str(error))

        def work() -> None:
            if change == "add":
                feed(buffer, 7, buffer.seen)
            elif change == "resize":
                buffer.resize(next(sizes))
            else:
                feed(buffer, 50, buffer.seen)
                buffer.load_state_dict(state)

        for _ in everywhere(work, handler, 43 if kind == "infinite" else 1 if change == "add" else 11):
            pass
        assert buffer.check() == []
        assert refused
        assert all("in the middle of a change" in text for text in refused)
        feed(twin, buffer.seen - 100, 100)
        if change != "resize":
            assert sorted(buffer.get_metadata("position")) == sorted(twin.get_metadata("position"))


def test_a_batch_of_a_loader_within_another() -> None:
    with ReservoirBuffer(60, seed=3) as buffer:
        feed(buffer, 100)
        with ReplayLoader(buffer, 5) as plain:
            wanted = [meta["position"].tolist() for _, meta in itertools.islice(plain, 500)]
        with ReplayLoader(buffer, 5) as loader:
            refused, found = [], []

            def handler() -> None:
                whole(buffer.sample(4), 4)
                try:
                    found.append(next(loader)[1]["position"].tolist())  # before or after the other one
                except ModeError as error:
                    refused.append(str(error))

            for _, meta in everywhere(lambda: next(loader), handler):
                found.append(meta["position"].tolist())
            assert len(refused) > 50
            assert all("in the middle" in text for text in refused)
            assert sorted(found) == sorted(wanted[: len(found)])
