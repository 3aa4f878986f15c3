"""A commit in one kernel call, which is what most are, leaves the bytes of one made step by step."""

from __future__ import annotations

import contextlib
import glob
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from children import child, outcome, result
from nightly import times
from paths import import_path
from storage_kernels import FILES, kernel

import leanreplay
from leanreplay import (
    ClassBalancedBuffer,
    GreedyClassBalancingBuffer,
    ModeError,
    ReservoirBuffer,
    SlidingWindowBuffer,
    StateError,
    StorageError,
)
from leanreplay.storage import (
    system,
)
from leanreplay.storage import writer as writer_module
from leanreplay.storage.store import Change

STEPS = (*FILES, *glob.glob(os.path.join(os.path.dirname(system.__file__), "*.py")))
KINDS = [ReservoirBuffer, SlidingWindowBuffer, GreedyClassBalancingBuffer, ClassBalancedBuffer]
METADATA = {0: (), 1: ("a",), 2: ("a", "b"), 3: ("a", "b", "c")}


def stream(start: int, stop: int, names: tuple[str, ...] = ("a",)) -> dict[str, Any]:
    p = np.arange(start, stop)
    x = (p[:, None] * 40503 % 65521 * np.arange(1, 78) % 251).astype(np.uint8)
    values = {"a": (p % 7).astype(np.int8), "b": np.stack([p, -p], 1).astype(np.float32), "c": p.astype(np.float64)}
    return {"batch": (x, p * 7919 % (3 + p // 40)), "metadata": {name: values[name] for name in names}}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each commit changed that was one call."""
    found: list[int] = []
    whole = kernel.commit_rows

    def call(*args: Any) -> int:
        count = int(whole(*args))
        if count >= 0:
            found.append(count)
        return count

    monkeypatch.setattr(kernel, "commit_rows", call)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", [2, 3, 4, 5])
def test_the_same_bytes(kind: Any, fields: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    """Every byte of the file, journal and headers too, after each batch; five fields are one too many.

    In the balanced buffer classes come and rows are freed, with nothing to follow in a commit after one that freed some.
    """
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=7))
    names = METADATA[fields - 2]
    paths = [tmp_path / "once.h5", tmp_path / "steps.h5"]
    with kind(40, paths[0], seed=1) as once, kind(40, paths[1], seed=1) as steps:
        for start in range(0, 300, 12):
            for at_once, buffer in ((True, once), (False, steps)):
                monkeypatch.setattr(writer_module, "ONE_CALL", at_once)
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


def test_rows_that_become_free_want_the_steps(tmp_path: Path, calls: list[int]) -> None:
    """Even with nothing to append to the log, as a policy of somebody's own may have it."""
    with ClassBalancedBuffer(30, tmp_path / "b.h5") as buffer:
        buffer.add(**stream(0, 20))
        inside = buffer.current.store
        (x, y), samples = stream(20, 21)["batch"], np.zeros(1, np.int64)
        sources = [(a.reshape(-1).view(np.uint8), samples) for a in (x, y, np.zeros(1, np.int8))]
        one = np.array([3]), np.array([20]), np.array([0])
        buffer.feeder.forget_policy()
        before = len(calls)
        inside.commit(Change(21, inside.policy, *one, sources, np.array([7])))
        assert len(calls) == before
        assert len(buffer) == 19
        assert [str(p) for p in buffer.check()] == []


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
    """Dtypes, numbers of fields, tensors and arrays, groups however they lie: the same kernel."""
    if not hasattr(kernel.commit_rows, "signatures"):
        pytest.skip("kernels run as Python")
    for i, data in enumerate([np.zeros((3, 2)), np.zeros(3, "S5"), (np.zeros(3, "u1"), np.zeros((3, 1), "i4"))]):
        with leanreplay.ReservoirBuffer(10, tmp_path / f"{i}.h5") as buffer:
            buffer.add(data)
    fixed = np.arange(3)
    fixed.flags.writeable = False
    for group in (fixed, np.arange(6)[::2], np.broadcast_to(np.int64(4), 3), 5):
        with leanreplay.ReservoirBuffer(10) as buffer:
            buffer.add(np.zeros((3, 2)), group=group)
    assert len(kernel.commit_rows.signatures) == 1


# -- stopped within the call -------------------------------------------------------------------------------------------

SMALL = {
    "window": lambda path, **o: SlidingWindowBuffer(8, path, seed=1, **o),
    "reservoir": lambda path, **o: ReservoirBuffer(8, path, seed=1, **o),
    "balanced": lambda path, **o: ClassBalancedBuffer(8, path, seed=1, **o),
}


def few(start: int, stop: int) -> dict[str, Any]:
    p = np.arange(start, stop)
    x = (p[:, None] * np.arange(1, 12) % 251).astype(np.uint8)
    return {"batch": (x, (p >= 10) + p % 2), "metadata": {"z": p.astype(np.float32)}}


def cuts(start: int, end: int) -> list[int]:
    return [*range(start, end, 4), end]


def leave_copies(kind: str, path: str, copies: str) -> None:
    """In an interpreter without compiled kernels: what a kill would leave at each line of a commit, wherever the file has changed."""
    assert not hasattr(kernel.commit_rows, "py_func")
    one_call, calls, last, count = kernel.commit_rows, 0, b"", 0

    def commit_rows(*args: Any) -> int:
        nonlocal calls
        calls += 1
        return int(one_call(*args))

    def step(frame: Any, event: str, _: Any) -> Any:
        nonlocal last, count
        if frame.f_code.co_filename not in STEPS:
            return None
        now = Path(path).read_bytes()
        if now != last:
            Path(copies, f"{count}.h5").write_bytes(now)
            last, count = now, count + 1
        return step

    with SMALL[kind](path) as buffer:
        buffer.add(**few(0, 6))
        kernel.commit_rows = commit_rows
        for start, stop in zip(cuts(6, 30), cuts(6, 30)[1:], strict=False):
            sys.settrace(step)
            buffer.add(**few(start, stop))
            sys.settrace(None)
    print(calls)


@pytest.mark.parametrize("kind", SMALL)
def test_stopped_at_every_line(kind: str, tmp_path: Path) -> None:
    """G3: Python runs the kernel, which is stopped between any two of its stores: the commit before or this one, whole."""
    copies = tmp_path / "copies"
    copies.mkdir()
    code = "import sys, test_at_once as t; t.leave_copies(*sys.argv[1:])"
    folders = import_path(__file__)
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, kind, str(tmp_path / "b.h5"), str(copies)],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": folders}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > 2
    expected: dict[int, Any] = {}
    for seen in cuts(6, 30):
        with SMALL[kind](None) as buffer:
            buffer.add(**few(0, seen))
            expected[seen] = whole(buffer)
    undone, before = 0, 6
    for n in range(len(list(copies.iterdir()))):
        path = copies / f"{n}.h5"
        with leanreplay.open(path) as reader:
            undone += reader.current.store.pending()
        with leanreplay.open(path, mode="r+") as buffer:
            assert [str(p) for p in buffer.check()] == [], n
            assert buffer.seen >= before, n
            before = buffer.seen
            assert whole(buffer) == expected[before], n
    assert before == 30
    assert undone > 100


def whole(buffer: Any) -> list[Any]:
    (x, y), meta = buffer.get(buffer.get_metadata("idx"))
    return [a.tolist() for a in (x, y, meta["z"], meta["position"], meta["idx"])]


BIG = 100  # rows of 32 KiB


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", [SlidingWindowBuffer, GreedyClassBalancingBuffer])
def test_killed_within(kind: Any, tmp_path: Path) -> None:
    """G3: batches so large that many kills come within the compiled call: each time exactly what the first `seen` samples leave.

    Of rows of some bytes a call takes microseconds, which random kills miss.
    """
    path, rng, undone = tmp_path / "b.h5", random.Random(kind.__name__), 0
    labels = np.arange(BIG) % 3
    batches = [(np.repeat(np.arange(i * BIG, (i + 1) * BIG)[:, None], 4096, axis=1), labels) for i in range(7)]

    def feed(buffer: Any, until: int) -> None:
        while buffer.seen < until:
            buffer.add(batches[buffer.seen // BIG % 7])

    with kind(BIG, seed=2) as twin:
        with kind(BIG, path, seed=2) as buffer:
            feed(buffer, 2 * BIG)  # and compiles
            assert buffer.current.store.max_rows > BIG  # a batch is one commit
        trial = 0
        while trial < times(8, 20) or (undone < 4 and trial < 5000):  # on a busy machine most of them may come elsewhere
            trial += 1

            def work(pipe: int) -> None:
                with leanreplay.open(path, mode="r+") as buffer:
                    feed(buffer, buffer.seen + BIG)  # whose pages are not there yet
                    os.write(pipe, b".")
                    feed(buffer, 10**9)

            pid, read = child(work)
            assert os.read(read, 1) == b"."
            time.sleep(rng.random() * 0.008)
            os.kill(pid, signal.SIGKILL)
            assert "ERROR" not in outcome(pid, read)[1]
            with leanreplay.open(path) as reader:
                undone += reader.current.store.pending()
            with leanreplay.open(path, mode="r+") as buffer:
                assert [str(p) for p in buffer.check()] == [], trial
                feed(twin, buffer.seen)
                mine, right = (one.get(one.get_metadata("idx")) for one in (buffer, twin))
                assert buffer.seen == twin.seen, trial
                assert all((u == v).all() for u, v in zip(mine[0], right[0], strict=True)), trial
                assert (mine[1]["position"] == right[1]["position"]).all(), trial
    assert undone > 3


# -- used within ---------------------------------------------------------------------------------------------------------

USES = {
    "read": lambda b, path: (b.seen, len(b), b.get([0]), b.sample(2, replace=True)),
    "mark": lambda b, path: b.state_dict(),
    "add": lambda b, path: b.add(**stream(0, 8)),
    "go back": lambda b, path: b.load_state_dict(b.before),
    "check": lambda b, path: b.check(),
    "close": lambda b, path: b.close(),
}


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", [ReservoirBuffer, ClassBalancedBuffer])
def test_a_signal_handler(kind: Any, use: str, at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever one comes within `add` and uses the buffer, that is refused, or done as a whole before or after: as if there were none."""
    monkeypatch.setattr(writer_module, "ONE_CALL", at_once)
    files = {f.__code__.co_filename for f in (writer_module.Writer.commit, kind.add, kind.policy_class.plan)}
    outcomes: set[str] = set()

    def run(n: int) -> bool:
        """Come in at the n-th line; False if there are not as many."""
        path, count, done = tmp_path / f"{n}.h5", 0, ""

        def step(frame: Any, event: str, _: Any) -> Any:
            nonlocal count, done
            if frame.f_code.co_filename not in files:
                return None
            if event == "line" and not done:
                count += 1
                if count == n:
                    done = "done"
                    try:
                        USES[use](buffer, path)
                    except (ModeError, StateError) as error:
                        done = type(error).__name__
                        assert not buffer.current.closed
            return step

        with kind(10, path, seed=1) as buffer:
            buffer.add(**stream(0, 30))
            buffer.before = buffer.state_dict()
            sys.settrace(step)
            raised = ""
            try:
                buffer.add(**stream(30, 40))
            except ModeError as error:
                raised = str(error)
            finally:
                sys.settrace(None)
        assert done or not raised
        outcomes.add(f"{done} {bool(raised)}")
        with leanreplay.open(path, mode="r+") as buffer:
            assert [str(p) for p in buffer.check()] == [], (n, done, raised)
            went = 40 if not raised else 30
            if use == "add" and done == "done":
                assert buffer.seen == went + 8, (n, raised)
            elif not raised:
                assert buffer.seen in ({30, 40} if use == "go back" else {40}), (n, done)
            if use != "add" and buffer.seen in (30, 40):
                with kind(10, seed=1) as twin:
                    twin.add(**stream(0, buffer.seen))
                    assert mine(buffer) == mine(twin), (n, done, raised)
        path.unlink()
        return bool(done)

    n = 1
    while run(n):
        n += times(17, 5)  # some of all lines, others for others
    assert n > 60
    assert "ModeError False" in outcomes or at_once


def mine(buffer: Any) -> list[Any]:
    (x, y), meta = buffer.get(buffer.get_metadata("idx"))
    return [a.tolist() for a in (x, y, meta["a"], meta["position"], meta["idx"])]


# -- pages -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pages_of_the_journal(kind: Any, tmp_path: Path) -> None:
    """Zeros are written ahead over the journal's records, and over nothing else, however the commits grow."""
    path = tmp_path / "b.h5"
    with kind(40, path, seed=1) as buffer:
        buffer.add(**stream(0, 40))
        table, start = buffer.current.store.layout, 40
        size, extended = path.stat().st_size, []
        for n in (3, 5, 25, 26, 39, 40, 80):
            before = np.fromfile(path, np.uint8)
            ready = buffer.current.store.pages.journal_ready
            buffer.current.store.pages.extend_journal(min(n, 40))
            extended.append(buffer.current.store.pages.journal_ready)
            assert extended[-1] >= min(40, n, ready or 40)
            changed = np.flatnonzero(np.fromfile(path, np.uint8) != before)
            assert path.stat().st_size == size
            assert not changed.size or (table.journal_rows_at <= changed[0] and changed[-1] < table.freed_at)
            buffer.add(**stream(start, start + n))
            start += n
            assert buffer.check() == []
        assert extended[-1] == 40 == table.journal_rows


def test_a_disk_that_is_full_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G7: a file system that never overwrites in place may refuse the zeros ahead, of rows and journal: nothing has changed."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "b.h5"
    with SlidingWindowBuffer(40, path) as buffer:
        buffer.add(**stream(0, 20))
    for start in (20, 40):
        with SlidingWindowBuffer(None, path, mode="r+") as buffer:
            with monkeypatch.context() as patch:
                patch.setattr(system, "write_zeros", full)
                with pytest.raises(StorageError, match="free some space"):
                    buffer.add(**stream(start, start + 20))
            assert buffer.seen == start
            assert buffer.check() == []
            buffer.add(**stream(start, start + 20))
    with SlidingWindowBuffer(40) as twin, leanreplay.open(path) as buffer:
        twin.add(**stream(0, 60))
        assert (twin.get(range(40))[0][0] == buffer.get(range(40))[0][0]).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_between_two_headers(tmp_path: Path) -> None:
    """A child forked while another thread has half taken over the new header follows the writer all the same."""
    with SlidingWindowBuffer(50, tmp_path / "b.h5") as buffer:
        buffer.add(**stream(0, 30))
        copies: list[tuple[int, int]] = []
        start, wait = os.pipe()

        def work(_: int) -> Any:
            sys.settrace(None)
            os.read(start, 1)  # until the writer has gone on
            (_, y), meta = buffer.sample(20)
            return [len(buffer), buffer.seen, int(meta["position"].min()), len(y)]

        def step(frame: Any, event: str, _: Any) -> Any:
            if frame.f_code is not writer_module.Writer.swap_headers.__code__:
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False  # it is one line
            if event == "opcode":
                copies.append(child(work))
            return step

        sys.settrace(step)
        buffer.add(**stream(30, 40))
        sys.settrace(None)
        assert len(copies) > 1
        buffer.add(**stream(40, 90))
        os.write(wait, b"." * len(copies))
        found = [result(*copy) for copy in copies]
        os.close(start)
        os.close(wait)
    for held, seen, first, n in found:
        assert (held, seen, n) == (50, 90, 20)
        assert first >= 40


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_plan_leaves(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers per row that a plan in Python, which an exception may end anywhere, leaves behind do not count."""
    policy = kind.policy_class
    plan = policy.plan

    def cut_off(self: Any, *args: Any) -> int:
        plan(self, *args)
        buffer.current.store.scratch()[:] = 3
        raise KeyboardInterrupt

    with kind(20, seed=1) as buffer, kind(20, seed=1) as twin:
        for one in (buffer, twin):
            one.add(**stream(0, 50))
        with monkeypatch.context() as patch:
            patch.setattr(policy, "plan", cut_off)
            with pytest.raises(KeyboardInterrupt):
                buffer.add(**stream(50, 90))
        for one in (buffer, twin):
            one.add(**stream(50, 200))
        assert buffer.check() == []
        a, b = (one.get(one.get_metadata("idx")) for one in (buffer, twin))
        assert (a[0][0] == b[0][0]).all()
        assert (a[1]["position"] == b[1]["position"]).all()


@pytest.mark.parametrize("call", ["commit_rows", "seal_block"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_policy_remembers(kind: Any, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words are those of an uninterrupted run, when Ctrl-C comes once in each commit: which may have been the one to change them."""

    def cut_off(*_: Any) -> None:
        raise KeyboardInterrupt

    with kind(20, seed=1) as buffer, kind(20, seed=1) as twin:
        for one in (buffer, twin):
            one.add(**stream(0, 10))
        for start in range(10, 130, 10):
            with monkeypatch.context() as patch:
                patch.setattr(writer_module, "ONE_CALL", call == "commit_rows")
                patch.setattr(kernel, call, cut_off)
                with contextlib.suppress(KeyboardInterrupt):  # or nothing stays, which is no commit of rows
                    buffer.add(**stream(start, start + 10))
            if buffer.seen == start:
                buffer.add(**stream(start, start + 10))
            twin.add(**stream(start, start + 10))
            assert buffer.current.store.policy == twin.current.store.policy
            assert buffer.current.store.state_name() == twin.current.store.state_name()
