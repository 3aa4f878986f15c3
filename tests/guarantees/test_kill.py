"""G3, kill-safe: whatever stops a writer, the file opens and holds exactly the first `seen` samples, and feeding goes on from there.

Writers run in forked children. They are killed at random instants; at every step under test control (before, after and within
each kernel and system call, and at every line of the store, a kernel being cut off with any part of its stores done); and
in the same process by KeyboardInterrupt. The stream is a function of position, so what must be there can be recomputed.
"""

from __future__ import annotations

import functools
import gc
import glob
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from children import child, killed, outcome, result
from nightly import times
from paths import in_memory

import leanreplay
from leanreplay import (
    GreedyClassBalancingBuffer,
    InfiniteBuffer,
    LeanReplayError,
    RecoveryError,
    ReservoirBuffer,
    SlidingWindowBuffer,
    StateError,
)
from leanreplay.buffers import (
    base as buffers,
)
from leanreplay.buffers import (
    infinite,
)
from leanreplay.kernels import rows as kernel
from leanreplay.storage import layout as fmt
from leanreplay.storage import (
    restore_points as undo,
)
from leanreplay.storage import (
    store,
    system,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

ROWS = 48
BATCH = 30
KINDS = {
    "reservoir": lambda path, **o: ReservoirBuffer(ROWS, path, seed=3, **o),
    "window": lambda path, **o: SlidingWindowBuffer(ROWS, path, seed=3, **o),
    "greedy": lambda path, **o: GreedyClassBalancingBuffer(ROWS, path, seed=3, **o),
    "infinite": lambda path, **o: InfiniteBuffer(path, rows_per_part=70, seed=3, **o),
}
BOUNDED = [kind for kind in KINDS if kind != "infinite"]


# -- helpers -----------------------------------------------------------------------------------------------------------


def stream(start: int, stop: int) -> dict[str, Any]:
    """What `add` gets for these positions."""
    return stream_at(np.arange(start, stop))


def stream_at(p: Any) -> dict[str, Any]:
    """Bytes of an odd number, labels that are not balanced, and metadata."""
    x = ((p[:, None] * 40503 + np.arange(1021) * 2654435761) >> 9).astype(np.uint8)
    y = np.minimum(p * 7919 % 11, 5)
    z = np.stack([p, -p, p % 17], 1).astype(np.float32)
    return {"batch": (x, y), "metadata": {"logits": z}}


def feed(buffer: Any, start: int, stop: int, at: bool = False) -> None:
    for here in range(start, stop, BATCH):
        buffer.add(**stream(here, min(stop, here + BATCH)), at=here if at else None)


def image(path: str) -> list[Any]:
    """The live bytes of a buffer's files and their index, from the bytes on disk alone: state words, then columns."""
    parts = sorted(glob.glob(os.path.join(glob.escape(path), "part-*.h5"))) if os.path.isdir(path) else [path]
    found: list[Any] = []
    for part in parts:
        data = np.fromfile(part, np.uint8)
        data.flags.writeable = False
        table = fmt.decode(lambda at, n, data=data: data[at : at + n].tobytes(), data.shape[0], part)
        words = [np.zeros(fmt.HEADER_WORDS, np.uint64) for _ in fmt.HEADERS]
        valid = [w for w, at in zip(words, fmt.HEADERS, strict=True) if kernel.read_block(data, at, w) and w[fmt.H_TAG] == table.tag]
        head = max(valid, key=lambda w: int(w[fmt.H_SEQ]))
        assert head[fmt.H_TARGET] == 0
        at, _ = table.columns[-3]
        if part is not path and head[fmt.H_SIZE] == 0:
            continue  # a part that was made, but holds nothing yet
        found.append(head[fmt.H_STATE : -1].tobytes())
        live = np.flatnonzero(data[at : at + 8 * table.max_size].view(np.int64) >= 0)
        found.append(live.tobytes())
        found += [data[at : at + n * table.max_size].reshape(-1, n)[live].tobytes() for at, n in table.columns]
    return found


@functools.cache
def expected(kind: str, seen: int) -> list[Any]:
    """The image of a buffer that was fed the first `seen` samples in one piece, without interruption."""
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        path = os.path.join(folder, "b.h5")
        with KINDS[kind](path) as buffer:
            buffer.add(**stream(0, seen))
        return image(path)


def assert_prefix(kind: str, buffer: Any, note: str) -> None:
    """The buffer is clean and holds exactly what its `seen` says."""
    assert [str(p) for p in buffer.check()] == [], note
    seen = buffer.seen
    if seen == 0:
        assert len(buffer) == 0, note
        return
    assert image(buffer.path) == expected(kind, seen), f"{note}, seen={seen}"
    if kind == "infinite":  # and not only by our own bookkeeping
        assert len(buffer) == seen, note
    (x, y), meta = buffer.get(buffer.get_metadata("idx"))
    right = stream_at(meta["position"])
    assert (x == right["batch"][0]).all(), note
    assert (y == right["batch"][1]).all(), note
    assert (meta["logits"] == right["metadata"]["logits"]).all(), note


def kill_after(pid: int, read: int, seconds: float) -> str:
    """Wait for the child's first byte, then so long, then kill it. What it wrote."""
    assert os.read(read, 1) == b"."
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return outcome(pid, read)[1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    """Compile all kernels once, before any fork."""
    for kind, make in KINDS.items():
        with tempfile.TemporaryDirectory() as folder, make(os.path.join(folder, "b.h5")) as buffer:
            feed(buffer, 0, 90)
            state = buffer.state_dict()
            feed(buffer, 90, 180)
            buffer.load_state_dict(state)
            buffer.sample(3)
            assert_prefix(kind, buffer, "warm-up")


# -- killed at random instants -----------------------------------------------------------------------------------------

KILLS = times(10, 30)  # per buffer; 45 more each in the tests below, and 95 for each kind in test_balanced_kill.py
END = {"reservoir": 8_000, "window": 3_000, "greedy": 3_000, "infinite": 1_200}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_instants(kind: str, tmp_path: Any) -> None:
    """G3: killed while feeding; each time clean, exactly the first `seen`, and the end is that of an uninterrupted run."""
    rng = random.Random(kind)
    path, end, done = str(tmp_path / "b0.h5"), END[kind], 0
    for trial in range(KILLS):

        def work(pipe: int, path: str = path) -> None:
            with KINDS[kind](path, mode="a") as buffer:
                start = buffer.seen
                os.write(pipe, b".")
                feed(buffer, start - start % BATCH, end, at=True)

        kill_after(*child(work), rng.random() ** 2 * 0.02)
        note = f"{kind}, trial {trial}"
        with KINDS[kind](path, mode="a") as buffer:
            if buffer.seen:
                assert_prefix(kind, buffer, note)
            if buffer.seen == end or trial == KILLS - 1:
                feed(buffer, buffer.seen, end)
                assert_prefix(kind, buffer, note)
                done += 1
                path = str(tmp_path / f"b{done}.h5")
    assert done


def protocol(buffer: Any, first: int, stop: int, report: Callable[[int, dict[str, Any]], None] = lambda i, s: None) -> dict[int, Any]:
    """A training loop: batch i is added, some are drawn, every third time the state is reported. What was drawn after batch i."""
    drawn = {}
    for i in range(first, stop):
        feed(buffer, i * BATCH, (i + 1) * BATCH)
        (x, y), meta = buffer.sample(5)
        drawn[i] = (x.tobytes(), y.tobytes(), meta["logits"].tobytes(), meta["idx"].tolist(), meta["position"].tolist())
        if i % 3 == 2:
            report(i + 1, buffer.state_dict())
    return drawn


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_instants_with_restore_points(kind: str, tmp_path: Any) -> None:
    """G3: after a kill, going back to the last reported state and on from there is the uninterrupted run, draws included."""
    rng = random.Random(f"points {kind}")
    total = 40 if kind == "infinite" else 120
    with KINDS[kind](str(tmp_path / "whole.h5")) as buffer:
        whole = protocol(buffer, 0, total)
    path = str(tmp_path / "b.h5")
    with KINDS[kind](path) as buffer:
        protocol(buffer, 0, 3)
        last: tuple[int, Any] = (3, buffer.state_dict())
    ended = 0
    for trial in range(times(10, 30)):
        note = f"{kind}, trial {trial}, back to batch {last[0]}"

        def work(pipe: int, last: Any = last) -> None:
            def report(batch: int, state: dict[str, Any]) -> None:
                os.write(pipe, (json.dumps([batch, state]) + "\n").encode())

            with KINDS[kind](path, mode="r+") as buffer:
                os.write(pipe, b".")
                buffer.load_state_dict(last[1])
                protocol(buffer, last[0], total, report)

        text = kill_after(*child(work), rng.random() ** 2 * 0.02)
        assert "ERROR" not in text, text
        lines = text.split("\n")[:-1]
        if lines:
            last = tuple(json.loads(lines[-1]))
        with KINDS[kind](path, mode="r+") as buffer:
            assert_prefix(kind, buffer, note)
            if rng.random() < 0.5:
                buffer.load_state_dict(last[1])
                assert buffer.seen == last[0] * BATCH, note
                assert_prefix(kind, buffer, note)
                stop = total if last[0] > total - 12 else min(total, last[0] + rng.randrange(4))
                states = [last]
                for i, drawn in protocol(buffer, last[0], stop, lambda i, s, to=states: to.append((i, s))).items():
                    assert drawn == whole[i], f"{note}, draw after batch {i}"
                last = states[-1]
                if stop == total:
                    assert_prefix(kind, buffer, note)
                    ended += 1
        if ended and last[0] > total - 12:
            os.unlink(path) if os.path.isfile(path) else shutil.rmtree(path)
            for name in glob.glob(path + ".undo.*"):
                os.unlink(name)
            with KINDS[kind](path) as buffer:
                protocol(buffer, 0, 3)
                last = (3, buffer.state_dict())
            ended = 0


@pytest.mark.parametrize("kind", KINDS)
def test_killed_while_going_back(kind: str, tmp_path: Any) -> None:
    """G3: killed at random instants of `load_state_dict`, going back again gives the point exactly."""
    rng = random.Random(f"back {kind}")
    path = str(tmp_path / "b.h5")
    with KINDS[kind](path) as buffer:
        feed(buffer, 0, 90)
        state = buffer.state_dict()
    for trial in range(times(8, 15)):

        def work(pipe: int) -> None:
            with KINDS[kind](path, mode="r+") as buffer:
                os.write(pipe, b".")
                while True:
                    feed(buffer, buffer.seen, 90 + 5 * BATCH)
                    buffer.load_state_dict(state)

        text = kill_after(*child(work), rng.random() * 0.01)
        assert "ERROR" not in text, text
        with KINDS[kind](path, mode="r+") as buffer:
            assert_prefix(kind, buffer, f"{kind}, trial {trial}")
            buffer.load_state_dict(state)
            assert buffer.seen == 90
            assert_prefix(kind, buffer, f"{kind}, trial {trial}")


# -- stopped at every step ---------------------------------------------------------------------------------------------


class Steps:
    """What this process would leave if it were killed: around or within a call of a kernel or of the system, or at a line of the store.

    "Within" a kernel: its stores done but for a random part of their cache lines, because a compiled kernel's stores come in any
    order. A kill leaves nothing but the files, so a step is one that changes their bytes, and a copy of them is what a kill there
    leaves; one run gives all copies. With `at`, the process is killed indeed, at that step.
    """

    FILES = (store.__file__, undo.__file__, infinite.__file__, system.__file__, buffers.__file__)

    def __init__(self, folder: str, copies: str, at: int | None = None) -> None:
        self.folder, self.copies, self.at, self.count = folder, copies, at, 0
        self.last: Any = None

    def step(self) -> None:
        now = contents(self.folder)
        if now == self.last:
            return
        if self.at is None:
            lay_out(os.path.join(self.copies, str(self.count)), now)
        elif self.count == self.at:
            die()
        self.last, self.count = now, self.count + 1

    def install(self) -> None:
        gc.disable()  # which might run a destructor in between
        store._AT_ONCE = False  # a commit in steps, each a call
        store._COLD = 1e9  # a read that is slow because it is traced must not count as one from a cold file, and take other steps
        for name, target in (("save_rows", 0), ("seal_block", 0), ("write_field", 0), ("write_index", 0), ("restore_rows", -1)):
            setattr(kernel, name, self._kernel(getattr(kernel, name), target))
        for module, name in (
            (system, "write_all"), (system, "allocate"), (system, "copy_file"), (system, "publish"), (os, "unlink"), (os, "replace"),
            (os, "link"), (os, "fsync"), (os, "ftruncate"), (store.Store, "_write_header"), (undo.UndoLog, "append"),
        ):  # fmt: skip
            setattr(module, name, self._call(getattr(module, name)))
        sys.settrace(self._trace)
        frame = sys._getframe(1)
        while frame is not None:  # the caller may stand in a traced file itself
            frame.f_trace, frame = self._trace, frame.f_back

    def _call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            self.step()
            if function.__name__ == "write_all":  # cut off in the middle
                data = memoryview(args[1]).cast("B")
                for part in (1, 2, 3):
                    os.pwrite(args[0], data[: len(data) * part // 4], args[2])
                    self.step()
            result = function(*args, **named)
            self.step()
            return result

        return call

    def _kernel(self, function: Any, target: int) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.step()
            mem = args[target]
            before = mem.copy()
            result = function(*args)
            for seed in range(3):
                self._tear(mem, before, random.Random(f"{self.count} {seed}"))
            self.step()
            return result

        return call

    def _tear(self, mem: Any, before: Any, rng: random.Random) -> None:
        """A step with a random part of the changed lines as they were."""
        words, old = mem[: mem.shape[0] // 8 * 8].view(np.uint64), before[: mem.shape[0] // 8 * 8].view(np.uint64)
        changed = [int(i) for i in np.unique(np.flatnonzero(words != old) // 8)]
        lines = [slice(8 * i, 8 * i + 8) for i in rng.sample(changed, rng.randint(0, len(changed)))]
        new = [words[line].copy() for line in lines]
        for line in lines:
            words[line] = old[line]
        self.step()
        for line, value in zip(lines, new, strict=True):
            words[line] = value

    def _trace(self, frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in self.FILES:
            return None
        if event == "line":
            self.step()
        return self._trace


def contents(folder: str) -> dict[str, bytes | None]:
    """The bytes of all files below a folder; None for a folder."""
    found: dict[str, bytes | None] = {}
    for path, folders, files in os.walk(folder):
        inner = os.path.relpath(path, folder)
        found |= {os.path.join(inner, name): None for name in sorted(folders)}
        for name in sorted(files):
            with open(os.path.join(path, name), "rb") as file:
                found[os.path.join(inner, name)] = file.read()
    return found


def lay_out(folder: str, found: dict[str, bytes | None]) -> None:
    """A folder with these contents."""
    os.makedirs(folder)
    for name, data in found.items():
        if data is None:
            os.mkdir(os.path.join(folder, name))
        else:
            with open(os.path.join(folder, name), "wb") as file:
                file.write(data)


def stop_everywhere(work: Callable[[Callable[[], None]], None], scene: Scene, examine: Callable[[str], None], most: int = 10**6) -> int:
    """Run `work` in a child, and `examine` what it would leave at each step from its call of its argument on; two of them by a kill.

    Of more than `most` steps evenly many are taken. Returns how many.
    """
    copies = tempfile.mkdtemp(dir=os.path.dirname(scene.folder))

    def run(_: int, at: int | None = None) -> int:
        steps = Steps(scene.folder, copies, at)
        try:
            work(steps.install)
        finally:
            sys.settrace(None)
        return steps.count

    scene.reset()
    count = result(*child(run))
    examine("not stopped")
    chosen = range(0, count, -(-count // most))
    for at in chosen:
        scene.reset(os.path.join(copies, str(at)))
        examine(f"step {at}")
    for at in (count // 3, count * 2 // 3):
        scene.reset()
        killed(*child(functools.partial(run, at=at)))
        examine(f"killed at step {at}")
    shutil.rmtree(copies)
    return len(chosen)


class Scene:
    """A folder that each trial begins with anew."""

    def __init__(self, tmp_path: Any, kind: str) -> None:
        self.base, self.folder, self.kind = str(tmp_path / "base"), str(tmp_path / "now"), kind
        os.mkdir(self.base)
        self.path = os.path.join(self.folder, "b.h5")

    def first(self) -> Any:
        """The buffer from which trials begin: fill it, and close it."""
        return KINDS[self.kind](os.path.join(self.base, "b.h5"))

    def reset(self, base: str = "") -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(base or self.base, self.folder)

    def open(self, mode: str = "r+", **options: Any) -> Any:
        return KINDS[self.kind](self.path, mode=mode, **options)


def finish(buffer: Any, kind: str, note: str, end: int = 180) -> None:
    """Feed the rest: it ends as an uninterrupted run does."""
    feed(buffer, buffer.seen, end)
    assert image(buffer.path) == expected(kind, end), note


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_stopped_at_every_step_of_a_commit(kind: str, durable: bool, tmp_path: Any) -> None:
    """G3: without restore points, a part boundary of the InfiniteBuffer included."""
    scene = Scene(tmp_path, kind)
    with scene.first() as buffer:
        feed(buffer, 0, 60)

    def work(arm: Any) -> None:
        with scene.open(durable=durable) as buffer:
            arm()
            feed(buffer, 60, 90)

    def examine(note: str) -> None:
        with scene.open() as buffer:
            assert buffer.seen in ((60, 70, 90) if kind == "infinite" else (60, 90)), note
            assert_prefix(kind, buffer, note)
            finish(buffer, kind, note)

    assert stop_everywhere(work, scene, examine, 30 if durable else 10**6) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_at_every_step_of_a_commit_with_restore_points(kind: str, tmp_path: Any) -> None:
    """G3: marking a point, committing, marking another one and committing again."""
    scene = Scene(tmp_path, kind)
    with scene.first() as buffer:
        feed(buffer, 0, 60)
        drawn = buffer.sample(4)[1]["position"].tolist()
        state = buffer.state_dict()
        then = buffer.sample(4)[1]["position"].tolist()
        feed(buffer, 60, 75)
    assert drawn != then

    def work(arm: Any) -> None:
        with scene.open() as buffer:
            arm()
            buffer.add(**stream(75, 90))
            buffer.state_dict()
            buffer.add(**stream(90, 100))

    def examine(note: str) -> None:
        with scene.open() as buffer:
            assert buffer.seen in (75, 90, 100), note
            assert_prefix(kind, buffer, note)
            buffer.load_state_dict(state)
            assert buffer.seen == 60, note
            assert_prefix(kind, buffer, note)
            assert buffer.sample(4)[1]["position"].tolist() == then, note
            finish(buffer, kind, note)
            buffer.load_state_dict(state)  # the point is still there, and good
            assert_prefix(kind, buffer, note)

    assert stop_everywhere(work, scene, examine, 10**6 if kind == "reservoir" else 30) > 15


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_at_every_step_of_a_rollback(kind: str, tmp_path: Any) -> None:
    """G3: stopped within `load_state_dict` the buffer is where it was, or there; loading again, or going on, is exact."""
    scene = Scene(tmp_path, kind)
    with scene.first() as buffer:
        feed(buffer, 0, 60)
        state = buffer.state_dict()
        feed(buffer, 60, 120)
        buffer.state_dict()
        feed(buffer, 120, 150)

    def work(arm: Any) -> None:
        with scene.open() as buffer:
            arm()
            buffer.load_state_dict(state)

    step = 0

    def examine(note: str) -> None:
        nonlocal step
        step += 1
        with scene.open() as buffer:
            allowed = (60, 70, 140, 150) if kind == "infinite" else (60, 150)  # later parts go first, one by one
            assert buffer.seen in allowed, note
            assert_prefix(kind, buffer, note)
            if step % 2:
                finish(buffer, kind, note)
            buffer.load_state_dict(state)
            assert buffer.seen == 60, note
            assert_prefix(kind, buffer, note)
            finish(buffer, kind, note)

    assert stop_everywhere(work, scene, examine) > 15


def test_stopped_while_recovering(tmp_path: Any) -> None:
    """G3: the recovery of a rollback, and of a commit, can itself be killed at every step."""
    scene = Scene(tmp_path, "reservoir")
    with scene.first() as buffer:
        feed(buffer, 0, 60)
        state = buffer.state_dict()
        feed(buffer, 60, 120)

    def cut_off(action: Callable[[Any], None], after: str) -> None:
        """Leave the base folder as a kill in the middle of an action leaves it: at the second call of a kernel."""
        calls = 0
        whole = getattr(kernel, after)

        def wrapper(*args: Any) -> None:
            nonlocal calls
            whole(*args)
            calls += 1
            if calls == 2:
                die()

        def run(_: int) -> None:
            setattr(kernel, after, wrapper)
            store._AT_ONCE = False
            with ReservoirBuffer(path=os.path.join(scene.base, "b.h5"), mode="r+") as buffer:
                action(buffer)

        killed(*child(run))

    def work(arm: Any) -> None:
        arm()
        scene.open().close()

    def examine(note: str) -> None:
        with scene.open() as buffer:
            assert buffer.seen == target, note
            assert_prefix("reservoir", buffer, note)
            buffer.load_state_dict(state)
            finish(buffer, "reservoir", note)

    target = 120
    cut_off(lambda b: b.add(**stream(120, 150)), "write_field")
    assert stop_everywhere(work, scene, examine) > 3
    target = 60
    cut_off(lambda b: b.load_state_dict(state), "restore_rows")
    assert stop_everywhere(work, scene, examine) > 3


@pytest.mark.parametrize("kind", BOUNDED)
def test_stopped_at_every_step_of_a_resize(kind: str, tmp_path: Any) -> None:
    """G3: a resize happens whole or not at all."""
    scene = Scene(tmp_path, kind)
    with scene.first() as buffer:
        feed(buffer, 0, 60)
    old = image(os.path.join(scene.base, "b.h5"))
    scene.reset()
    with scene.open() as buffer:
        buffer.resize(20)
    new = image(scene.path)
    assert new != old

    def work(arm: Any) -> None:
        with scene.open() as buffer:
            arm()
            buffer.resize(20)

    def examine(note: str) -> None:
        with leanreplay.open(scene.path, mode="r+") as buffer:
            assert buffer.check() == [], note
            assert image(scene.path) == (new if buffer.max_size == 20 else old), note
            buffer.resize(20)
            assert image(scene.path) == new, note
            assert not [n for n in os.listdir(scene.folder) if n.endswith(".tmp")] or buffer.max_size == 20, note
            feed(buffer, 60, 90)
            assert buffer.check() == [], note

    assert stop_everywhere(work, scene, examine, 10**6 if kind == "reservoir" else 20) > 10


def test_stopped_at_every_step_of_metadata(tmp_path: Any) -> None:
    """G3: `set_metadata` of an old and of a new field: each whole or not at all."""
    scene = Scene(tmp_path, "reservoir")
    with scene.first() as buffer:
        feed(buffer, 0, 60)
        state = buffer.state_dict()
        feed(buffer, 60, 90)
    old = np.arange(ROWS * 3, dtype=np.float32).reshape(ROWS, 3)
    new = np.arange(ROWS * 2, dtype=np.int16).reshape(ROWS, 2)
    with leanreplay.open(os.path.join(scene.base, "b.h5")) as buffer:
        before = buffer.get_metadata("logits")

    def work(arm: Any) -> None:
        with scene.open() as buffer:
            arm()
            buffer.set_metadata("logits", old)
            buffer.set_metadata("task", new)

    def examine(note: str) -> None:
        with scene.open() as buffer:
            assert buffer.check() == [], note
            assert buffer.seen == 90, note
            names = [f.name for f in buffer.schema.metadata]
            logits = buffer.get_metadata("logits")
            if (logits == before).all():
                assert names == ["metadata/logits"], note
                assert_prefix("reservoir", buffer, note)
            else:
                assert (logits == old).all(), note
            if len(names) == 2:
                assert (buffer.get_metadata("task") == new).all(), note
                with pytest.raises(StateError, match=r"resized|no restore point"):
                    buffer.load_state_dict(state)
            else:
                buffer.load_state_dict(state)
                assert_prefix("reservoir", buffer, note)
                finish(buffer, "reservoir", note)

    assert stop_everywhere(work, scene, examine, 60) > 30


@pytest.mark.parametrize("kind", ["reservoir", "infinite"])
def test_stopped_at_every_step_of_save_and_load(kind: str, tmp_path: Any) -> None:
    """G3: a copy is the old or the new one; a buffer that loads one is the old or the new one (parts: the first of them)."""
    scene = Scene(tmp_path, kind)
    copy = os.path.join(scene.folder, "copy")
    with scene.first() as buffer:
        feed(buffer, 0, 60)
        buffer.save(os.path.join(scene.base, "copy"))
        feed(buffer, 60, 160)

    def save(arm: Any) -> None:
        with scene.open() as buffer:
            arm()
            buffer.save(copy)

    def saved(note: str) -> None:
        with scene.open() as buffer:
            assert buffer.seen == 160, note
            assert_prefix(kind, buffer, note)
            buffer.load(copy)
            assert buffer.seen in ((60, 70, 140, 160) if kind == "infinite" else (60, 160)), note
            assert_prefix(kind, buffer, note)
            finish(buffer, kind, note)

    assert stop_everywhere(save, scene, saved) > 3

    def load(arm: Any) -> None:
        with scene.open() as buffer:
            arm()
            buffer.load(copy)

    def loaded(note: str) -> None:
        with scene.open("a") as buffer:
            if kind == "infinite":
                assert buffer.seen in (0, 60, 70, 140, 160), note
            else:
                assert buffer.seen in (60, 160), note
            if buffer.seen:
                assert_prefix(kind, buffer, note)
            buffer.load(copy)
            assert buffer.seen == 60, note
            assert_prefix(kind, buffer, note)
            finish(buffer, kind, note)

    assert stop_everywhere(load, scene, loaded) > 3


@pytest.mark.parametrize("mode", ["x", "w"])
@pytest.mark.parametrize("kind", ["reservoir", "infinite"])
def test_stopped_at_every_step_of_creation(kind: str, mode: str, tmp_path: Any) -> None:
    """G3, G6: the file is not there (or the one to be replaced), or complete; what is left over goes with the next creation."""
    scene = Scene(tmp_path, kind)
    if mode == "w":
        with scene.first() as buffer:
            feed(buffer, 0, 60)

    def work(arm: Any) -> None:
        arm()
        with scene.open(mode) as buffer:
            feed(buffer, 0, 30)

    def examine(note: str) -> None:
        with scene.open("a") as buffer:
            assert buffer.seen in ((0, 30, 60) if mode == "w" else (0, 30)), note
            if buffer.seen:
                assert_prefix(kind, buffer, note)
            finish(buffer, kind, note)
        with scene.open("w") as buffer:
            finish(buffer, kind, note)
            names = os.listdir(scene.path if kind == "infinite" else scene.folder)
            assert not [n for n in names if n.endswith(".tmp")], note

    assert stop_everywhere(work, scene, examine, 10**6 if (kind, mode) == ("reservoir", "x") else 25) > 10


# -- interrupted in the same process -----------------------------------------------------------------------------------


class Interrupts:
    """Raises KeyboardInterrupt at the given line or return events of the store's and buffers' code, counted from the last one."""

    def __init__(self, *after: int) -> None:
        self.after, self.count = list(after), 0

    def __enter__(self) -> Interrupts:
        gc.disable()  # an error in a destructor that it runs would not arrive
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        gc.enable()

    def _trace(self, frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in Steps.FILES or frame.f_code.co_name == "<genexpr>":
            return None
        if event in ("line", "return") and self.after:
            self.count += 1
            if self.count > self.after[0]:
                del self.after[0]
                self.count = 0
                sys.settrace(self._trace)
                raise KeyboardInterrupt
        return self._trace


def interrupted(action: Callable[[], Any], *after: int) -> bool:
    """Run an action with interrupts; whether the first of them came."""
    with Interrupts(*after) as left:
        try:
            action()
        except KeyboardInterrupt:
            return True
    return len(left.after) < len(after)


def place(buffer: Any) -> str:
    """Where the bytes of a buffer are: its path, or its shared memory."""
    return buffer.path or buffer._store.link


def assert_holds(kind: str, buffer: Any, allowed: Any, note: str) -> None:
    assert buffer.seen in allowed, f"{note}, seen={buffer.seen}"
    if buffer.seen:
        assert image(place(buffer)) == expected(kind, buffer.seen), note


@pytest.mark.parametrize("ram", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_in_add(kind: str, ram: bool, tmp_path: Any) -> None:
    """G3: Ctrl-C at any line of `add`, once and twice in a row, the second in recovery: the first `seen`, and feeding goes on."""
    if ram and (kind == "infinite" or not os.path.isdir("/proc/self/fd")):
        pytest.skip("no one place to compare its bytes in")
    rng = random.Random(f"{kind} {ram}")
    buffer, trials, twice, made = None, 0, 0, 0
    while trials < times(24, 70):
        if buffer is None or buffer.seen > 400:
            if buffer is not None:
                assert buffer.check() == []
                buffer.close()
            made += 1
            buffer = KINDS[kind](None if ram else str(tmp_path / f"b{made}.h5"))
            feed(buffer, 0, 60)
            if made % 2:
                buffer.state_dict()
        start = buffer.seen
        first, second = rng.randrange(210), rng.randrange(100)
        note = f"{kind}, ram={ram}, trial {trials}: interrupts after {first} and {second}"
        if not interrupted(lambda b=buffer, s=start: b.add(**stream(s, s + BATCH)), first):
            continue
        trials += 1
        if trials % 2:  # the next call recovers: interrupt that as well
            twice += interrupted(lambda b=buffer, s=start: b.add(**stream(s, s + BATCH), at=s), second)
        assert_holds(kind, buffer, range(start, start + BATCH + 1), note)
        buffer.add(**stream(start, start + BATCH), at=start)
        assert_holds(kind, buffer, [start + BATCH], note)
    assert twice > times(6, 20)
    assert buffer.check() == []
    buffer.close()


@pytest.mark.parametrize(("kind", "ram"), [("reservoir", False), ("reservoir", True), ("infinite", False)])
def test_interrupted_in_the_first_add(kind: str, ram: bool, tmp_path: Any) -> None:
    """G3: Ctrl-C at every fifth line (in RAM ninth) while the file is created: the same buffer object goes on."""
    if ram and not os.path.isdir("/proc/self/fd"):
        pytest.skip("no one place to compare its bytes in")
    step, came = 0, True
    while came:
        note = f"{kind}, ram={ram}, interrupt after {step}"
        with KINDS[kind](None if ram else str(tmp_path / f"b{step}.h5")) as buffer:
            came = interrupted(lambda b=buffer: b.add(**stream(0, BATCH)), step)
            buffer.add(**stream(0, BATCH), at=0)
            assert_holds(kind, buffer, [BATCH], note)
            feed(buffer, BATCH, 90)
            assert_holds(kind, buffer, [90], note)
        step += 5 if not ram else 9
    assert step > 200


def test_interrupted_when_a_part_is_full(tmp_path: Any) -> None:
    """G3: Ctrl-C at every fifth line of an `add` that makes a part: the same buffer object goes on."""
    step, came = 0, True
    while came:
        with KINDS["infinite"](str(tmp_path / f"b{step}")) as buffer:
            feed(buffer, 0, 60)
            came = interrupted(lambda b=buffer: b.add(**stream(60, 90)), step)
            assert_holds("infinite", buffer, (60, 70, 90), f"interrupt after {step}")
            buffer.add(**stream(60, 90), at=60)
            assert_holds("infinite", buffer, [90], f"interrupt after {step}")
        step += 5
    assert step > 200


def test_interrupted_in_resize_and_load(tmp_path: Any) -> None:
    """G3: Ctrl-C at every seventh line while another file takes the name: the buffer goes on with the one that has it."""
    saved = str(tmp_path / "saved")
    with KINDS["window"](str(tmp_path / "first.h5")) as buffer:
        feed(buffer, 0, 60)
        buffer.save(saved)
    step, came = 0, True
    while came:
        path = str(tmp_path / f"b{step}.h5")
        with KINDS["window"](path) as buffer:
            feed(buffer, 0, 90)
            came = interrupted(lambda b=buffer: b.resize(20), step)
            assert len(buffer) == min(buffer.max_size, 48), step
            interrupted(lambda b=buffer: b.resize(ROWS), step)
            feed(buffer, 90, 300)
            size = buffer.max_size
            assert size in (20, ROWS), step
            assert sorted(buffer.get_metadata("position").tolist()) == list(range(300 - size, 300)), step
        with leanreplay.open(path) as buffer:  # all that went to the file that has the name
            assert buffer.seen == 300, step
            assert len(buffer) == size, step
            assert buffer.check() == [], step
        path = str(tmp_path / f"c{step}.h5")
        with KINDS["window"](path) as buffer:
            feed(buffer, 0, 90)
            came |= interrupted(lambda b=buffer: b.load(saved), step)
            assert_holds("window", buffer, (60, 90), f"load, {step}")
            finish(buffer, "window", f"load, {step}")
        step += 7
    assert step > 200


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_in_state_dict_and_load_state_dict(kind: str, tmp_path: Any) -> None:
    """G3: Ctrl-C while marking or going back: the next try is exact."""
    rng = random.Random(f"state {kind}")
    buffer = None
    for trial in range(110 if kind == "window" else times(16, 50)):
        if buffer is None or buffer.seen > 200:
            if buffer is not None:
                assert buffer.check() == []
                buffer.close()
            buffer = KINDS[kind](str(tmp_path / f"b{trial}.h5"))
            feed(buffer, 0, 60)
            buffer.state_dict()
            feed(buffer, 60, 90)
        start = buffer.seen
        note = f"{kind}, trial {trial}, start {start}"
        interrupted(buffer.state_dict, trial if kind == "window" else rng.randrange(110))
        state = buffer.state_dict()
        feed(buffer, start, start + 45)
        interrupted(lambda b=buffer, s=state: b.load_state_dict(s), rng.randrange(240), rng.randrange(100))
        assert_holds(kind, buffer, range(start, start + 46) if kind == "infinite" else (start, start + 45), note)
        buffer.load_state_dict(state)
        assert_holds(kind, buffer, [start], note)
        feed(buffer, start, start + 20)
        assert_holds(kind, buffer, [start + 20], note)
    buffer.close()


# -- files that do not belong together ---------------------------------------------------------------------------------


def undo_files(path: str) -> list[str]:
    return sorted(glob.glob(glob.escape(path) + ".undo.*"))


def assert_exact_or_refused(path: str, kind: str, state: Any, note: str) -> str:
    """Loading a state gives that state, or a StateError with the buffer as it was. Which."""
    with leanreplay.open(path, mode="r+") as buffer:
        assert buffer.check() == [], note
        before, contents = buffer.seen, image(path)
        try:
            buffer.load_state_dict(state)
        except (StateError, RecoveryError) as error:
            assert str(error), note
            assert buffer.seen == before, note
            assert image(path) == contents, note
            assert buffer.check() == [], note
            return "refused"
        assert buffer.seen == state["seen"], note
        assert_prefix(kind, buffer, note)
        return "exact"


@pytest.mark.parametrize("kind", BOUNDED)
def test_backup_beside_a_newer_undo_file(kind: str, tmp_path: Any) -> None:
    """G3: the data file restored from a backup of any age; also one fed differently since. Never a silent wrong rollback."""
    path = str(tmp_path / "b.h5")
    backups = {}
    with KINDS[kind](path) as buffer:
        feed(buffer, 0, 60)
        states = [buffer.state_dict()]
        for n in range(1, 8):
            feed(buffer, buffer.seen, buffer.seen + 15)
            if n == 4:
                states.append(buffer.state_dict())
            backups[n] = str(tmp_path / f"backup{n}.h5")
            shutil.copy(path, backups[n])
    undo_now = {name: str(tmp_path / f"kept{i}") for i, name in enumerate(undo_files(path))}
    assert len(undo_now) == 2
    for name, kept in undo_now.items():
        shutil.copy(name, kept)
    outcomes = []
    for n, backup in backups.items():
        for extra in (0, 5, 15):  # samples of another stream, that the backup was fed since
            for i, state in enumerate(states):
                for name in undo_files(path):
                    os.unlink(name)
                shutil.copy(backup, path)
                if extra:
                    with leanreplay.open(path, mode="r+") as buffer:
                        buffer.add(**stream(10_000, 10_000 + extra))
                for name in undo_files(path):
                    os.unlink(name)
                for name, kept in undo_now.items():
                    shutil.copy(kept, name)
                note = f"{kind}: backup {n}, {extra} others, state {i}"
                if extra:
                    with leanreplay.open(path, mode="r+") as buffer:
                        before, contents = buffer.seen, image(path)
                        try:
                            buffer.load_state_dict(state)
                        except StateError:
                            assert (buffer.seen, image(path)) == (before, contents), note
                            outcomes.append("refused")
                        else:
                            assert image(path) == expected(kind, state["seen"]), note
                            outcomes.append("exact")
                else:
                    outcomes.append(assert_exact_or_refused(path, kind, state, note))
    assert "refused" in outcomes
    assert "exact" in outcomes  # the newest backup is the file itself


@pytest.mark.parametrize("kind", BOUNDED)
def test_moved_away_from_its_undo_file(kind: str, tmp_path: Any) -> None:
    """G3: without its undo file a moved file goes on, and says by how many samples it is ahead."""
    path, elsewhere = str(tmp_path / "b.h5"), str(tmp_path / "moved.h5")
    with KINDS[kind](path) as buffer:
        feed(buffer, 0, 60)
        state = buffer.state_dict()
        feed(buffer, 60, 100)
    os.rename(path, elsewhere)
    with KINDS[kind](elsewhere, mode="r+") as buffer:
        with pytest.raises(StateError, match="ahead of the state by 40 samples"):
            buffer.load_state_dict(state)
        assert_prefix(kind, buffer, "moved")
        finish(buffer, kind, "moved")


def test_moved_in_the_middle_of_a_rollback(tmp_path: Any) -> None:
    """G3: a rollback that was cut off cannot be finished without the undo file: an error, never rows half back."""
    path, elsewhere = str(tmp_path / "b.h5"), str(tmp_path / "moved.h5")
    with ReservoirBuffer(ROWS, path, seed=3) as buffer:
        feed(buffer, 0, 60)
        state = buffer.state_dict()
        feed(buffer, 60, 100)

    def run(_: int) -> None:
        with ReservoirBuffer(path=path, mode="r+") as buffer:
            kernel.restore_rows = lambda *args: die()
            buffer.load_state_dict(state)

    killed(*child(run))
    os.rename(path, elsewhere)
    with pytest.raises(RecoveryError, match="rollback was cut off"):
        ReservoirBuffer(path=elsewhere, mode="r+")
    with pytest.raises(RecoveryError, match="rollback was cut off"):
        ReservoirBuffer(path=elsewhere, mode="r")
    other = str(tmp_path / "other.h5")  # another buffer's undo file does not help, nor does it go
    with ReservoirBuffer(ROWS, other, seed=3) as buffer:
        feed(buffer, 0, 60)
        buffer.state_dict()
        feed(buffer, 60, 100)
    shutil.copy(undo_files(other)[0], elsewhere + ".undo.0")
    with pytest.raises(RecoveryError, match="rollback was cut off"):
        ReservoirBuffer(path=elsewhere, mode="r+")
    os.rename(elsewhere, path)
    with ReservoirBuffer(path=path, mode="r+") as buffer:
        assert buffer.seen == 60
        assert_prefix("reservoir", buffer, "moved back")
        finish(buffer, "reservoir", "moved back")


@pytest.mark.parametrize("kind", BOUNDED)
def test_undo_file_of_another_buffer(kind: str, tmp_path: Any) -> None:
    """G3: an undo file of another buffer, or of a copy that was fed differently, is not used."""
    a, b = str(tmp_path / "a.h5"), str(tmp_path / "b.h5")
    for path in (a, b):
        with KINDS[kind](path) as buffer:
            feed(buffer, 0, 60)
            state = buffer.state_dict()
            feed(buffer, 60, 100)
    with leanreplay.open(a) as buffer, pytest.raises(LeanReplayError):
        buffer.load_state_dict(state)
    shutil.copy(undo_files(a)[0], undo_files(b)[0])
    assert assert_exact_or_refused(b, kind, state, f"{kind}: of another buffer") == "refused"
    # Copies of one file share its uuid.
    twin = str(tmp_path / "twin.h5")
    with leanreplay.open(b, mode="r+") as buffer:
        state = buffer.state_dict()
        shutil.copy(b, twin)
        feed(buffer, 100, 130)
    with leanreplay.open(twin, mode="r+") as buffer:
        twin_state = buffer.state_dict()
        buffer.add(**stream(5000, 5030))
        contents = image(twin)
    assert state["state"] == twin_state["state"]
    shutil.copy(undo_files(b)[-1], undo_files(twin)[-1])
    with leanreplay.open(twin, mode="r+") as buffer:
        try:
            buffer.load_state_dict(state)
        except StateError:
            assert image(twin) == contents
            assert buffer.check() == []
        else:
            assert_prefix(kind, buffer, "twin")
