"""G3 for grouped buffers: a writer is stopped at every step of every operation; readers beside it."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from typing import Any

import killing
import numpy as np
import pytest
from children import child, killed, outcome
from grouped_killing import KINDS, MODES, ROWS, assert_prefix, feed, finish, label, stream, wanted
from grouped_oracle import Grouped
from killing import Scene, stop_everywhere
from storage_kernels import kernel

import leanreplay
from leanreplay import (
    RecoveryError,
    StateError,
)
from leanreplay.policies import (
    balanced,
)
from leanreplay.storage import (
    create,
)
from leanreplay.storage import writer as writer_module

pytestmark = [pytest.mark.usefixtures("grouped_kernels", "all_steps"), pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


class GroupedScene(Scene):
    def first(self, **options: Any) -> Any:
        return KINDS[self.kind](os.path.join(self.base, "b.h5"), **options)

    def open(self, mode: str = "r+", **options: Any) -> Any:
        return KINDS[self.kind](self.path, mode=mode, **options)


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
    monkeypatch.setattr(create, "JOURNAL_BYTES", 1)
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
                killing.die()
            return found

        def run(_: int) -> None:
            setattr(kernel, after, wrapper)
            writer_module.ONE_CALL = False
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
        slots = buffer.current.store.layout.log[1]

    def work(arm: Any) -> None:
        with scene.open() as buffer:
            arm()
            buffer.add(**stream("class", 60, 120))
            assert buffer.current.store.layout.log[1] > slots

    longer = set()

    def examine(note: str) -> None:
        with scene.open() as buffer:
            longer.add(buffer.current.store.layout.log[1] > slots)
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
            buffer.current.store.publish = lambda words: killing.die()
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
            store = reader.current.store  # type: ignore[attr-defined]
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
