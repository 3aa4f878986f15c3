"""G3 for grouped buffers: whatever stops a writer while groups come and go, what is there is the model after the first `seen` samples.

Writers run in forked children, as in test_kill.py, and are killed at random instants and at every step: of commits that free rows
and append to the log of groups, of marks, rollbacks, recoveries, `resize`, and of the rewriting for a longer log. Then what readers
see of commits that never ended, and buffers that are opened again at every position of the stream.
"""

from __future__ import annotations

import functools
import itertools
import json
import mmap
import os
import random
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import test_kill
from children import child, killed, outcome
from grouped_oracle import BORROW, LARGEST, QUOTA, Grouped
from nightly import times
from paths import in_memory
from test_kill import Interrupts, Scene, Steps, image, interrupted, place, stop_everywhere

import leanreplay
from leanreplay import (
    CapacityWarning,
    ClassBalancedBuffer,
    ClassBalancingReservoirBuffer,
    ExperienceBalancedBuffer,
    RecoveryError,
    StateError,
)
from leanreplay.kernels import rows as kernel
from leanreplay.policies import (
    balanced,
)
from leanreplay.storage import (
    create,
    store,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

ROWS = 24
BATCH = 20
END = 3000
TOTAL = 6
KINDS: dict[str, Callable[..., Any]] = {
    "class": lambda path, **o: ClassBalancedBuffer(ROWS, path, seed=3, **o),
    "fixed": lambda path, **o: ClassBalancedBuffer(ROWS, path, seed=3, adaptive_size=False, total_num_classes=TOTAL, **o),
    "borrow": lambda path, **o: ClassBalancedBuffer(ROWS, path, seed=3, borrow=True, **o),
    "cbrs": lambda path, **o: ClassBalancingReservoirBuffer(ROWS, path, seed=3, **o),
}
MODES = {"class": QUOTA, "fixed": QUOTA, "borrow": BORROW, "cbrs": LARGEST}


# -- helpers -----------------------------------------------------------------------------------------------------------


def label(kind: str, p: int) -> int:
    """Groups come in as the square root of the position, most samples are of old ones; ids of any sign and size."""
    newest = min(int((p + 1) ** 0.5), TOTAL - 1 if kind == "fixed" else 10**9)
    rank = newest if p % 5 == 0 else p * 7919 % 104729 % (newest + 1)
    return rank * (-1) ** rank * (2**40 if rank % 3 == 0 else 1)


def stream(kind: str, start: int, stop: int) -> dict[str, Any]:
    """What `add` gets for these positions: bytes of an odd number, groups, and metadata."""
    p = np.arange(start, stop)
    x, z = samples(p)
    return {"batch": x, "group": np.array([label(kind, int(i)) for i in p], np.int64), "metadata": {"z": z}}


def samples(p: Any) -> tuple[Any, Any]:
    x = ((p[:, None] * 40503 + np.arange(301) * 2654435761) >> 9).astype(np.uint8)
    return x, np.stack([p, -p, p % 17], 1).astype(np.float32)


def feed(kind: str, buffer: Any, start: int, stop: int, at: bool = False) -> None:
    for here in range(start, stop, BATCH):
        buffer.add(**stream(kind, here, min(stop, here + BATCH)), at=here if at else None)


@functools.cache
def models(kind: str) -> list[Any]:
    """What the model holds after each number of samples: rows, and the rows of each group. The list grows when asked."""
    return [Grouped(ROWS, 3, MODES[kind], TOTAL if kind == "fixed" else 0), []]


def wanted(kind: str, seen: int) -> tuple[dict[int, int], dict[int, list[int]]]:
    model, found = models(kind)
    while len(found) <= seen:
        found.append((dict(model.rows), {g: model.members(g) for g in sorted(model.streams)}))
        model.add([label(kind, model.seen)])
    return found[seen]


@functools.cache
def expected(kind: str, seen: int) -> list[Any]:
    """The bytes of a buffer that was fed the first `seen` samples in one piece, without interruption."""
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        path = os.path.join(folder, "b.h5")
        with KINDS[kind](path) as buffer:
            buffer.add(**stream(kind, 0, seen))
        return image(path)


def assert_prefix(kind: str, buffer: Any, note: str, among: Any = None) -> None:
    """The buffer is clean and holds exactly what its `seen` says: the model's rows and groups, the bytes of one add."""
    assert [str(p) for p in buffer.check()] == [], note
    seen = buffer.seen
    note = f"{kind}, {note}, seen={seen}"
    assert among is None or seen in among, note
    rows, groups = wanted(kind, seen)
    assert len(buffer) == len(rows), note
    assert buffer.group_sizes() == {g: len(r) for g, r in groups.items()}, note
    assert {g: buffer.group_rows(g).tolist() for g in buffer.groups} == groups, note
    if seen == 0:
        return
    assert dict(zip(buffer.get_metadata("idx").tolist(), buffer.get_metadata("position").tolist(), strict=True)) == rows, note
    x, meta = buffer.get(buffer.get_metadata("idx"))
    right = samples(meta["position"])
    assert (x == right[0]).all(), note
    assert (meta["z"] == right[1]).all(), note
    assert image(place(buffer)) == expected(kind, seen), note


def finish(kind: str, buffer: Any, note: str, end: int = 220) -> None:
    """Feed the rest: it ends as an uninterrupted run does."""
    feed(kind, buffer, buffer.seen, end)
    assert_prefix(kind, buffer, f"{note}, finished", [end])


class AllSteps(Steps):
    """Also within the kernels that free rows."""

    def install(self) -> None:
        for name, target in (("save_freed", 0), ("restore_freed", -1)):
            setattr(kernel, name, self._kernel(getattr(kernel, name), target))
        super().install()


class GroupedScene(Scene):
    def first(self, **options: Any) -> Any:
        return KINDS[self.kind](os.path.join(self.base, "b.h5"), **options)

    def open(self, mode: str = "r+", **options: Any) -> Any:
        return KINDS[self.kind](self.path, mode=mode, **options)


@pytest.fixture(autouse=True)
def all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_kill, "Steps", AllSteps)


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    """Compile all kernels once, before any fork."""
    for kind, make in KINDS.items():
        with tempfile.TemporaryDirectory() as folder, make(os.path.join(folder, "b.h5")) as buffer:
            feed(kind, buffer, 0, 60)
            state = buffer.state_dict()
            feed(kind, buffer, 60, 120)
            buffer.load_state_dict(state)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                buffer.resize(10)
                buffer.resize(ROWS)
            buffer.sample(3)


def test_the_stream_does_what_it_is_for() -> None:
    """Between the positions used below groups come, and rows fall free or change hands, with and without borrowing."""
    for kind in KINDS:
        sizes = [len(wanted(kind, n)[1]) for n in (60, 80, 100, 150)]
        assert sizes == ([6] * 4 if kind == "fixed" else [8, 9, 10, 13]), sizes
    rows = [set(wanted("class", n)[0]) for n in range(60, 150)]
    assert any(before - after for before, after in itertools.pairwise(rows))
    assert any(len(r) < ROWS for r in rows)


# -- opened again ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_opened_again_at_every_position(kind: str, tmp_path: Any) -> None:
    """Who may grow, who holds no row, and the quotas are there again, wherever the stream is cut; each time a new object."""
    path = str(tmp_path / "b.h5")
    buffer: Any = None
    for p in range(150):
        buffer = leanreplay.open(path, mode="r+") if p else KINDS[kind](path)
        buffer.add(**stream(kind, p, p + 1))
        assert buffer.group_sizes() == {g: len(r) for g, r in wanted(kind, p + 1)[1].items()}
        if p % 10 == 9:
            assert_prefix(kind, buffer, "opened again", [p + 1])
        if p % 2:
            buffer.close()
        buffer = None  # or forgotten, like this
    with leanreplay.open(path, mode="r+") as buffer:
        finish(kind, buffer, "opened again")


def test_experiences_go_on_after_a_kill(tmp_path: Any) -> None:
    """The numbering of experiences goes on where it was: after a kill and after a rollback."""
    path = str(tmp_path / "b.h5")
    with ExperienceBalancedBuffer(10, path) as buffer:
        buffer.update(list(range(20)))
        state = buffer.state_dict()

    def work(_: int) -> None:
        with ExperienceBalancedBuffer(path=path, mode="r+") as buffer:
            buffer.update(list(range(20)))
            buffer.update(list(range(20)))
            test_kill.die()

    killed(*child(work))
    with ExperienceBalancedBuffer(path=path, mode="r+") as buffer:
        assert list(buffer.groups) == [0, 1, 2]
        buffer.update([1])
        assert list(buffer.groups) == [0, 1, 2, 3]
        buffer.load_state_dict(state)
        assert list(buffer.groups) == [0]
        buffer.add(np.arange(3))
        buffer.update([1])
        assert buffer.group_sizes() == {0: 5, 1: 1}
        assert buffer.check() == []


# -- killed at random instants -----------------------------------------------------------------------------------------


def kill_after_lines(pid: int, read: int, lines: int) -> list[str]:
    """Kill a child as soon as it has written so many lines: while it does what comes after them. All lines that it wrote."""
    text = b""
    while text.count(b"\n") < lines and (data := os.read(read, 1 << 16)):
        text += data
    os.kill(pid, signal.SIGKILL)
    found = text.decode() + outcome(pid, read)[1]
    assert "ERROR" not in found, found
    return found.split("\n")[:-1]


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_instants(kind: str, tmp_path: Any) -> None:
    """Kills of each kind while feeding; each time the model, and the end is that of an uninterrupted run."""
    rng = random.Random(kind)
    path, done, kills = str(tmp_path / "b0.h5"), 0, 0
    batches = [stream(kind, here, here + BATCH) for here in range(0, END, BATCH)]
    while kills < times(8, 25) or not done:

        def work(pipe: int, path: str = path) -> None:
            with KINDS[kind](path, mode="a") as buffer:
                os.write(pipe, b"\n")
                for i in range(buffer.seen // BATCH, len(batches)):
                    buffer.add(**batches[i], at=i * BATCH)
                    os.write(pipe, b"\n")

        kill_after_lines(*child(work), rng.choice([1, 2, 2, 3, 4, 9, 30]))
        kills += 1
        with KINDS[kind](path, mode="a") as buffer:
            assert_prefix(kind, buffer, f"kill {kills}")
            if buffer.seen > END - 500 or kills > times(30, 80):
                finish(kind, buffer, f"kill {kills}", END)
                done += 1
                path = str(tmp_path / f"b{done}.h5")


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_instants_with_restore_points(kind: str, tmp_path: Any) -> None:
    """A training loop that marks states, killed anywhere, goes back to its last one: the model, and draws, of then."""
    rng = random.Random(f"points {kind}")
    path = str(tmp_path / "b.h5")
    batches = [stream(kind, here, here + BATCH) for here in range(0, END, BATCH)]
    drawn: dict[int, Any] = {}

    def protocol(buffer: Any, first: int, stop: int, report: Callable[[int, Any], None]) -> None:
        for i in range(first, min(stop, len(batches))):
            buffer.add(**batches[i])
            found = buffer.sample(5)[1]["position"].tolist()
            assert drawn.setdefault(i, found) == found, i
            if i % 3 == 2:
                report(i + 1, buffer.state_dict())

    with KINDS[kind](str(tmp_path / "whole.h5")) as buffer:
        protocol(buffer, 0, len(batches), lambda i, s: None)
    with KINDS[kind](path) as buffer:
        protocol(buffer, 0, 3, lambda i, s: None)
        last = 3, buffer.state_dict()
    for trial in range(times(10, 30)):
        note = f"trial {trial}, back to batch {last[0]}"

        def work(pipe: int, last: Any = last) -> None:
            def report(i: int, state: Any) -> None:
                os.write(pipe, (json.dumps([i, state]) + "\n").encode())

            with KINDS[kind](path, mode="r+") as buffer:
                buffer.load_state_dict(last[1])
                report(*last)
                protocol(buffer, last[0], len(batches), report)

        last = json.loads(kill_after_lines(*child(work), rng.choice([1, 1, 2, 3]))[-1])
        with KINDS[kind](path, mode="r+") as buffer:
            assert_prefix(kind, buffer, note)
            if trial % 2:
                buffer.load_state_dict(last[1])
                assert_prefix(kind, buffer, note, [last[0] * BATCH])
                if trial % 4 == 1:
                    protocol(buffer, last[0], last[0] + 2, lambda i, s: None)
        if last[0] > len(batches) - 15:
            break
    assert last[0] > times(8, 30)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_while_going_back(kind: str, tmp_path: Any) -> None:
    """Killed anywhere in feeding and `load_state_dict`, over and over."""
    rng = random.Random(f"back {kind}")
    path = str(tmp_path / "b.h5")
    with KINDS[kind](path) as buffer:
        feed(kind, buffer, 0, 60)
        state = buffer.state_dict()
    batches = [stream(kind, here, here + BATCH) for here in range(60, 160, BATCH)]
    for trial in range(times(8, 20)):

        def work(pipe: int) -> None:
            with KINDS[kind](path, mode="r+") as buffer:
                while True:
                    for batch in batches[(buffer.seen - 60) // BATCH :]:
                        buffer.add(**batch)
                    os.write(pipe, b"\n")
                    buffer.load_state_dict(state)

        kill_after_lines(*child(work), rng.choice([1, 1, 1, 2, 5]))
        with KINDS[kind](path, mode="r+") as buffer:
            assert_prefix(kind, buffer, f"trial {trial}", range(60, 161, BATCH))
            buffer.load_state_dict(state)
            assert_prefix(kind, buffer, f"trial {trial}, back", [60])


# -- stopped at every step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_stopped_at_every_step_of_a_commit(kind: str, durable: bool, tmp_path: Any) -> None:
    """Of a commit in which groups come, rows fall free and change hands."""
    scene = GroupedScene(tmp_path, kind)
    with scene.first() as buffer:
        feed(kind, buffer, 0, 60)

    def work(arm: Any) -> None:
        with scene.open(durable=durable) as buffer:
            arm()
            buffer.add(**stream(kind, 60, 83))

    def examine(note: str) -> None:
        with scene.open() as buffer:
            assert_prefix(kind, buffer, note, (60, 83))
            finish(kind, buffer, note)

    assert stop_everywhere(work, scene, examine, 30 if durable or kind in ("fixed", "borrow") else 10**6) > 10


def test_stopped_between_small_commits(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a journal of few rows one add is many commits, each of them whole."""
    monkeypatch.setattr(create, "_JOURNAL_BYTES", 1)
    scene = GroupedScene(tmp_path, "class")
    with scene.first() as buffer:
        feed("class", buffer, 0, 60)

    def work(arm: Any) -> None:
        with scene.open() as buffer:
            arm()
            buffer.add(**stream("class", 60, 90))

    found = set()

    def examine(note: str) -> None:
        with scene.open() as buffer:
            found.add(buffer.seen)
            assert_prefix("class", buffer, note, range(60, 91))
            finish("class", buffer, note)

    assert stop_everywhere(work, scene, examine, 80) > 20
    assert len(found) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_at_every_step_with_restore_points(kind: str, tmp_path: Any) -> None:
    """Of commits, of marking another point, and of a commit that frees rows the first one did not touch."""
    scene = GroupedScene(tmp_path, kind)
    with scene.first() as buffer:
        feed(kind, buffer, 0, 60)
        state = buffer.state_dict()
        then = buffer.sample(4)[1]["position"].tolist()
        feed(kind, buffer, 60, 75)

    def work(arm: Any) -> None:
        with scene.open() as buffer:
            arm()
            buffer.add(**stream(kind, 75, 85))
            buffer.state_dict()
            buffer.add(**stream(kind, 85, 102))

    def examine(note: str) -> None:
        with scene.open() as buffer:
            assert_prefix(kind, buffer, note, (75, 85, 102))
            buffer.load_state_dict(state)
            assert_prefix(kind, buffer, f"{note}, back", [60])
            assert buffer.sample(4)[1]["position"].tolist() == then, note
            finish(kind, buffer, note)
            buffer.load_state_dict(state)  # the point is still there, and good
            assert_prefix(kind, buffer, f"{note}, back again", [60])

    assert stop_everywhere(work, scene, examine, 120 if kind == "class" else 30) > 15


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_at_every_step_of_a_rollback(kind: str, tmp_path: Any) -> None:
    """Groups that came go again, rows that fell free are live again."""
    scene = GroupedScene(tmp_path, kind)
    with scene.first() as buffer:
        feed(kind, buffer, 0, 60)
        state = buffer.state_dict()
        feed(kind, buffer, 60, 120)
        buffer.state_dict()
        feed(kind, buffer, 120, 150)

    def work(arm: Any) -> None:
        with scene.open() as buffer:
            arm()
            buffer.load_state_dict(state)

    step = 0

    def examine(note: str) -> None:
        nonlocal step
        step += 1
        with scene.open() as buffer:
            assert_prefix(kind, buffer, note, (60, 150))
            if step % 2:
                finish(kind, buffer, note)
            buffer.load_state_dict(state)
            assert_prefix(kind, buffer, f"{note}, back", [60])
            finish(kind, buffer, note)

    assert stop_everywhere(work, scene, examine, 10**6 if kind == "class" else 30) > 15


@pytest.mark.parametrize("kind", ["class", "cbrs"])
def test_stopped_while_recovering(kind: str, tmp_path: Any) -> None:
    """Undoing a commit that freed rows, and finishing a rollback, can themselves be killed at every step."""
    scene = GroupedScene(tmp_path, kind)
    with scene.first() as buffer:
        feed(kind, buffer, 0, 60)
        state = buffer.state_dict()
        feed(kind, buffer, 60, 80)

    def cut_off(action: Callable[[Any], None], after: str, at: int) -> None:
        """Leave the base folder as a kill in the middle of an action leaves it: after so many calls of a kernel."""
        calls = 0
        whole = getattr(kernel, after)

        def wrapper(*args: Any) -> Any:
            nonlocal calls
            found = whole(*args)
            calls += 1
            if calls == at:
                test_kill.die()
            return found

        def run(_: int) -> None:
            setattr(kernel, after, wrapper)
            store._AT_ONCE = False
            with KINDS[kind](os.path.join(scene.base, "b.h5"), mode="r+") as buffer:
                action(buffer)

        killed(*child(run))

    def work(arm: Any) -> None:
        arm()
        scene.open().close()

    def examine(note: str) -> None:
        with scene.open() as buffer:
            assert_prefix(kind, buffer, note, [target])
            buffer.load_state_dict(state)
            assert_prefix(kind, buffer, f"{note}, back", [60])
            finish(kind, buffer, note)

    target = 80
    cut_off(lambda b: b.add(**stream(kind, 80, 101)), "hash_log", 2)  # rows, index and log are written, the header is not
    assert stop_everywhere(work, scene, examine) > 3
    cut_off(lambda b: b.add(**stream(kind, 80, 101)), "write_field", 2)
    assert stop_everywhere(work, scene, examine) > 3
    target = 60
    cut_off(lambda b: b.load_state_dict(state), "restore_rows", 2)  # the first undoes the commit
    assert stop_everywhere(work, scene, examine) > 3


@pytest.mark.parametrize("kind", ["class", "borrow", "cbrs"])
def test_stopped_at_every_step_of_a_resize(kind: str, tmp_path: Any) -> None:
    """A resize happens whole or not at all, groups and who may grow included."""
    scene = GroupedScene(tmp_path, kind)
    with scene.first() as buffer:
        feed(kind, buffer, 0, 90)
    model = Grouped(ROWS, 3, MODES[kind])
    model.add([label(kind, p) for p in range(90)])
    resized = model.copy()
    resized.resize(11)
    ends = {}
    for size, start in ((ROWS, model), (11, resized)):
        ends[size] = start.copy()
        ends[size].add([label(kind, p) for p in range(90, 200)])

    def work(arm: Any) -> None:
        with scene.open() as buffer:
            arm()
            buffer.resize(11)

    def assert_is(buffer: Any, there: Grouped, note: str) -> None:
        assert buffer.check() == [], note
        assert buffer.seen == there.seen, note
        assert dict(zip(buffer.get_metadata("idx").tolist(), buffer.get_metadata("position").tolist(), strict=True)) == there.rows, note
        assert {g: buffer.group_rows(g).tolist() for g in buffer.groups} == {g: there.members(g) for g in sorted(there.streams)}, note

    sizes = set()

    def examine(note: str) -> None:
        with leanreplay.open(scene.path, mode="r+") as buffer:
            sizes.add(buffer.max_size)
            assert_is(buffer, resized if buffer.max_size == 11 else model, note)
            feed(kind, buffer, 90, 200)
            assert_is(buffer, ends[buffer.max_size], note)

    assert stop_everywhere(work, scene, examine, 40) > 10
    assert sizes == {11, ROWS}


def test_stopped_at_every_step_of_a_longer_log(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log without room is rewritten within an add: whole or not at all, and restore points live through it."""
    monkeypatch.setattr(balanced.BalancedPolicy, "log_slots", staticmethod(lambda capacity: 18))
    scene = GroupedScene(tmp_path, "class")
    with scene.first() as buffer:
        feed("class", buffer, 0, 40)
        state = buffer.state_dict()
        feed("class", buffer, 40, 60)
        slots = buffer._store.table.log[1]

    def work(arm: Any) -> None:
        with scene.open() as buffer:
            arm()
            buffer.add(**stream("class", 60, 120))
            assert buffer._store.table.log[1] > slots

    longer = set()

    def examine(note: str) -> None:
        with scene.open() as buffer:
            longer.add(buffer._store.table.log[1] > slots)
            seen = buffer.seen
            assert [str(p) for p in buffer.check()] == [], note
            assert 60 <= seen <= 120, note
            rows, groups = wanted("class", seen)
            assert dict(zip(buffer.get_metadata("idx").tolist(), buffer.get_metadata("position").tolist(), strict=True)) == rows, note
            assert {g: buffer.group_rows(g).tolist() for g in buffer.groups} == groups, note
            if hash(note) % 2:
                feed("class", buffer, seen, 200)
            buffer.load_state_dict(state)
            assert_prefix("class", buffer, f"{note}, back", [40])
            finish("class", buffer, note)
            buffer.load_state_dict(state)
            assert_prefix("class", buffer, f"{note}, back again", [40])

    assert stop_everywhere(work, scene, examine, 120) > 30
    assert longer == {False, True}


# -- interrupted in the same process -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ram", [False, True])
@pytest.mark.parametrize("kind", ["class", "borrow", "cbrs"])
def test_interrupted_in_add(kind: str, ram: bool, tmp_path: Any) -> None:
    """Ctrl-C at any line of `add`, once and twice in a row: the first `seen`, and feeding goes on."""
    if ram and not os.path.isdir("/proc/self/fd"):
        pytest.skip("no one place to compare its bytes in")
    rng = random.Random(f"{kind} {ram}")
    buffer, trials, made, twice = None, 0, 0, 0
    while trials < times(20, 50):
        if buffer is None or buffer.seen > 400:
            if buffer is not None:
                buffer.close()
            made += 1
            buffer = KINDS[kind](None if ram else str(tmp_path / f"b{made}.h5"))
            feed(kind, buffer, 0, 60)
            state = buffer.state_dict() if made % 2 else None
        start = buffer.seen
        first, second = rng.randrange(230), rng.randrange(100)
        note = f"ram={ram}, trial {trials}: interrupts after {first} and {second}"
        if not interrupted(lambda b=buffer, s=start: b.add(**stream(kind, s, s + BATCH)), first):
            continue
        trials += 1
        if trials % 2:
            twice += interrupted(lambda b=buffer, s=start: b.add(**stream(kind, s, s + BATCH), at=s), second)
        assert_prefix(kind, buffer, note, range(start, start + BATCH + 1))
        buffer.add(**stream(kind, start, start + BATCH), at=start)
        assert_prefix(kind, buffer, note, [start + BATCH])
        if state is not None and trials % 10 == 0:
            buffer.load_state_dict(state)
            assert_prefix(kind, buffer, f"{note}, back", [60])
    assert twice > times(4, 10)
    buffer.close()


@pytest.mark.parametrize("ram", [False, True])
def test_interrupted_in_a_longer_log(ram: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at every ninth line of an add that rewrites the file for a longer log: the same object goes on, and back."""
    monkeypatch.setattr(balanced.BalancedPolicy, "log_slots", staticmethod(lambda capacity: 18))
    step, came = 0, True
    while came:
        note = f"ram={ram}, interrupt after {step}"
        with KINDS["class"](None if ram else str(tmp_path / f"b{step}.h5")) as buffer:
            feed("class", buffer, 0, 40)
            state = buffer.state_dict()
            feed("class", buffer, 40, 60)
            came = interrupted(lambda b=buffer: b.add(**stream("class", 60, 120)), step)
            rows, groups = wanted("class", buffer.seen)
            assert {g: buffer.group_rows(g).tolist() for g in buffer.groups} == groups, note
            assert buffer.get_metadata("position").tolist() == [rows[r] for r in sorted(rows)], note
            buffer.add(**stream("class", 60, 120), at=60)
            assert buffer.group_sizes() == {g: len(r) for g, r in wanted("class", 120)[1].items()}, note
            buffer.load_state_dict(state)
            assert buffer.seen == 40, note
            assert {g: buffer.group_rows(g).tolist() for g in buffer.groups} == wanted("class", 40)[1], note
            feed("class", buffer, 40, 100)
            assert {g: buffer.group_rows(g).tolist() for g in buffer.groups} == wanted("class", 100)[1], note
            assert buffer.check() == [], note
        step += 9
    assert step > 200


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_in_state_dict_and_load_state_dict(kind: str, tmp_path: Any) -> None:
    """Ctrl-C while marking or going back: the next try is exact."""
    rng = random.Random(f"state {kind}")
    buffer = None
    for trial in range(times(14, 40)):
        if buffer is None or buffer.seen > 200:
            if buffer is not None:
                buffer.close()
            buffer = KINDS[kind](str(tmp_path / f"b{trial}.h5"))
            feed(kind, buffer, 0, 60)
            buffer.state_dict()
            feed(kind, buffer, 60, 90)
        start = buffer.seen
        note = f"trial {trial}, start {start}"
        interrupted(buffer.state_dict, rng.randrange(110))
        state = buffer.state_dict()
        feed(kind, buffer, start, start + 45)
        interrupted(lambda b=buffer, s=state: b.load_state_dict(s), rng.randrange(240), rng.randrange(100))
        assert_prefix(kind, buffer, note, (start, start + 45))
        buffer.load_state_dict(state)
        assert_prefix(kind, buffer, note, [start])
        feed(kind, buffer, start, start + 20)
        assert_prefix(kind, buffer, note, [start + 20])
    buffer.close()


@pytest.mark.parametrize("kind", ["class", "cbrs"])
def test_interrupted_in_resize(kind: str, tmp_path: Any) -> None:
    """Ctrl-C at every fifth line of `resize`: the old buffer or the new one, and feeding goes on in it."""
    models = {ROWS: Grouped(ROWS, 3, MODES[kind])}
    models[ROWS].add([label(kind, p) for p in range(90)])
    models[11] = models[ROWS].copy()
    models[11].resize(11)
    for model in models.values():
        model.add([label(kind, p) for p in range(90, 150)])
    step, came, sizes = 0, True, set()
    while came:
        with KINDS[kind](str(tmp_path / f"b{step}.h5")) as buffer:
            feed(kind, buffer, 0, 90)
            came = interrupted(lambda b=buffer: b.resize(11), step)
            sizes.add(buffer.max_size)
            feed(kind, buffer, 90, 150)
            model = models[buffer.max_size]
            assert {g: buffer.group_rows(g).tolist() for g in buffer.groups} == {g: model.members(g) for g in sorted(model.streams)}, step
            assert buffer.get_metadata("position").tolist() == [model.rows[r] for r in sorted(model.rows)], step
            assert buffer.check() == [], step
        step += 5
    assert sizes == {11, ROWS}


def test_a_full_log_is_not_forgotten_by_a_warning(tmp_path: Any) -> None:
    """A resize that an error-raising CapacityWarning stops leaves the buffer as it was, who may grow included."""
    with KINDS["class"](str(tmp_path / "b.h5")) as buffer:
        feed("class", buffer, 0, 60)
        with warnings.catch_warnings():
            warnings.simplefilter("error", CapacityWarning)
            with pytest.raises(CapacityWarning):
                buffer.resize(100)
        assert_prefix("class", buffer, "warned", [60])
        finish("class", buffer, "warned")


# -- readers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_readers_of_a_commit_that_never_ended(kind: str, tmp_path: Any) -> None:
    """A writer dies at any step; a reader sees the groups of the header's state, now and when it asks again."""
    scene = GroupedScene(tmp_path, kind)
    with scene.first() as buffer:
        feed(kind, buffer, 0, 60)

    def work(arm: Any) -> None:
        with scene.open() as buffer:
            arm()
            buffer.add(**stream(kind, 60, 83))

    def examine(note: str) -> None:
        with leanreplay.open(scene.path) as reader:
            seen = reader.seen
            groups = wanted(kind, seen)[1]
            for _ in range(2):
                assert reader.group_sizes() == {g: len(r) for g, r in groups.items()}, note
                assert {g: reader.group_rows(g).tolist() for g in reader.groups} == groups, note
        with scene.open() as buffer:
            assert_prefix(kind, buffer, note, [seen])

    assert stop_everywhere(work, scene, examine, 40 if kind == "class" else 15) > 10


def test_readers_of_a_group_get_no_other(tmp_path: Any) -> None:
    """A writer dies just before its header: what a reader's group gives is of that group, or recovery is needed."""
    path = str(tmp_path / "b.h5")
    with KINDS["class"](path) as buffer:
        feed("class", buffer, 0, 60)

    def work(_: int) -> None:
        with KINDS["class"](path, mode="r+") as buffer:
            buffer._store._write_header = lambda words: test_kill.die()
            buffer.add(**stream("class", 60, 83))

    killed(*child(work))
    with leanreplay.open(path) as reader:
        assert reader.group_sizes() == {g: len(r) for g, r in wanted("class", 60)[1].items()}
        for g in reader.groups:
            try:
                assert {label("class", item[1]["position"]) for item in reader.groups[g]} <= {g}
            except RecoveryError:
                continue


def test_readers_of_a_row_that_went_to_another_group(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit between looking up a group's rows and reading them: they are looked up again."""
    path = str(tmp_path / "b.h5")
    with leanreplay.ClassBalancedBuffer(8, path) as writer:
        writer.add(np.arange(8), group=0)
        with leanreplay.open(path) as reader:
            store = reader._store  # type: ignore[attr-defined]
            original, found = store.read, []

            def read(rows: Any, *rest: Any) -> Any:
                if writer.seen == 8:
                    writer.add(np.arange(8, 12), group=1)
                arrays, index = original(rows, *rest)
                found.append(index[1].tolist())
                return arrays, index

            monkeypatch.setattr(store, "read", read)
            items = reader.groups[0].__getitems__([0, 1, 2, 3])  # type: ignore[attr-defined]
    assert len(found) == 2
    assert 1 in found[0]
    assert [x for x, _ in items] == sorted(x for x, _ in items)
    assert all(x < 8 for x, _ in items)


def test_readers_of_a_busy_writer(tmp_path: Any) -> None:
    """While groups come and go, a reader sees some state of the stream, whole: sizes, rows and samples that belong together."""
    path = str(tmp_path / "b.h5")
    with KINDS["class"](path) as buffer:
        feed("class", buffer, 0, 40)
    wanted("class", 2000)
    found = mmap.mmap(-1, 1)  # how many states the reader has met

    def work(pipe: int) -> None:
        batches = [stream("class", p, p + 7) for p in range(40, 2000, 7)]
        with KINDS["class"](path, mode="r+") as buffer:
            os.write(pipe, b".")
            for i, batch in enumerate(batches):
                buffer.add(**batch)
                while i % 40 == 0 and found[0] <= i // 40:  # it meets one in each of seven stretches, however slow it is
                    time.sleep(0.0005)
        os.write(pipe, b"end")

    pid, read = child(work, 300)
    assert os.read(read, 1) == b"."
    states = set()
    try:
        with leanreplay.open(path) as reader:
            while reader.seen < 1900:
                before = reader.seen
                sizes = reader.group_sizes()
                after = reader.seen
                fitting = [n for n in range(before, after + 1) if {g: len(r) for g, r in wanted("class", n)[1].items()} == sizes]
                assert fitting, (before, after)
                states.add(before)
                found[0] = min(len(states), 255)
    finally:
        found[0] = 255
        outcome(pid, read)
    assert len(states) > 5


def test_states_of_a_resized_buffer_are_refused(tmp_path: Any) -> None:
    """`resize` ends all points, and says so; the buffer stays as it is."""
    with KINDS["class"](str(tmp_path / "b.h5")) as buffer:
        feed("class", buffer, 0, 60)
        state = buffer.state_dict()
        feed("class", buffer, 60, 80)
        buffer.resize(10)
        sizes = buffer.group_sizes()
        with pytest.raises(StateError, match="resized to 10"):
            buffer.load_state_dict(state)
        assert buffer.group_sizes() == sizes
        assert buffer.check() == []


def test_interrupts_come() -> None:
    """What the tests above rely on."""
    with KINDS["class"](None) as buffer, pytest.raises(KeyboardInterrupt), Interrupts(30):
        buffer.add(**stream("class", 0, 20))
