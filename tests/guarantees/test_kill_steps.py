"""G3, kill-safe: a writer is stopped at every step of every operation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from children import child, killed
from killing import BOUNDED, KINDS, ROWS, SOME, Scene, assert_prefix, die, feed, finish, image, stop_everywhere, stream
from storage_kernels import kernel

import leanreplay
from leanreplay import (
    ReservoirBuffer,
    StateError,
)
from leanreplay.storage import writer as writer_module

pytestmark = [pytest.mark.usefixtures("kill_kernels"), pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


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

    assert stop_everywhere(work, scene, examine, SOME if durable else 10**6) > 10


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

    assert stop_everywhere(work, scene, examine, 10**6 if kind == "reservoir" else SOME) > 15


@pytest.mark.parametrize(("kind", "durable"), [("reservoir", False), ("window", True), ("infinite", False)])
def test_stopped_at_every_step_of_keep_and_release(kind: str, durable: bool, tmp_path: Any) -> None:
    """G3: whatever is kept, or one of the newest, can be loaded; a point that goes leaves to the older ones what they need."""
    scene = Scene(tmp_path, kind)
    states = []
    with scene.first() as buffer:
        for stop in (60, 75, 90, 100):
            feed(buffer, buffer.seen, stop)
            states.append(buffer.state_dict())
            if stop < 90:
                buffer.keep(states[-1])
        feed(buffer, 100, 110)

    def work(arm: Any) -> None:
        with scene.open(durable=durable) as buffer:
            arm()
            buffer.keep(states[3])
            buffer.state_dict()  # the point at 90 goes, its rows to the one at 75
            buffer.release(states[1])  # and from there to the one at 60
            buffer.release(states[0])

    def examine(note: str) -> None:
        with scene.open() as buffer:
            assert buffer.seen == 110, note
            kept = buffer.kept_states()
            with open(os.path.join(scene.path, "parts.undo.kept") if kind == "infinite" else scene.path + ".undo.kept") as file:
                assert kept == json.load(file), note
            assert [state["seen"] for state in kept] in ([60, 75], [60, 75, 100], [60, 100], [100]), note
            for state in [states[3], *kept[:1]]:
                buffer.load_state_dict(state)
                assert buffer.seen == state["seen"], note
                assert_prefix(kind, buffer, note)
                feed(buffer, buffer.seen, 105)
            buffer.release()
            buffer.state_dict()
            folder = scene.path if kind == "infinite" else scene.folder
            assert len([name for name in os.listdir(folder) if ".undo." in name]) <= 2 * (2 if kind == "infinite" else 1), note
            finish(buffer, kind, note)

    assert stop_everywhere(work, scene, examine, 25 if kind == "infinite" else 10**6) > 15


@pytest.mark.parametrize(("kind", "kept"), [*((kind, False) for kind in KINDS), ("window", True), ("infinite", True)])
def test_stopped_at_every_step_of_a_rollback(kind: str, kept: bool, tmp_path: Any) -> None:
    """G3: stopped within `load_state_dict` the buffer is where it was, or there; loading again, or going on, is exact. So is going
    back to a newer state that is kept."""
    scene = Scene(tmp_path, kind)
    with scene.first() as buffer:
        feed(buffer, 0, 60)
        state = buffer.state_dict()
        feed(buffer, 60, 120)
        newer = buffer.state_dict()
        if kept:
            buffer.keep(newer)
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
            if kept and kind != "infinite":
                buffer.load_state_dict(newer)
                assert buffer.seen == 120, note
                assert_prefix(kind, buffer, note)
            buffer.load_state_dict(state)
            assert buffer.seen == 60, note
            assert_prefix(kind, buffer, note)
            finish(buffer, kind, note)

    assert stop_everywhere(work, scene, examine, 25 if kept else 10**6) > 15


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
            writer_module.ONE_CALL = False
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

    assert stop_everywhere(work, scene, examine, 10**6 if kind == "reservoir" else SOME) > 10


@pytest.mark.parametrize("kind", ["reservoir", "infinite"])
def test_stopped_at_every_step_of_metadata(kind: str, tmp_path: Any) -> None:
    """G3: `set_metadata` of an old and of a new field: each whole or not at all (parts: the new one)."""
    scene = Scene(tmp_path, kind)
    with scene.first() as buffer:
        feed(buffer, 0, 60)
        state = buffer.state_dict()
        feed(buffer, 60, 90)
    rows = 90 if kind == "infinite" else ROWS
    old = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    new = np.arange(rows * 2, dtype=np.int16).reshape(rows, 2)
    with leanreplay.open(os.path.join(scene.base, "b.h5")) as buffer:
        before = buffer.get_metadata("logits")

    def work(arm: Any) -> None:
        with scene.open() as buffer:
            arm()
            if kind != "infinite":
                buffer.set_metadata("logits", old)
            buffer.set_metadata("task", new)

    def examine(note: str) -> None:
        with scene.open() as buffer:
            assert buffer.check() == [], note
            assert buffer.seen == 90, note
            names = [f.name for f in buffer.schema.metadata]
            logits = buffer.get_metadata("logits")
            if (logits == before).all():
                assert names == ["metadata/logits"] or kind == "infinite", note
                if len(names) == 1:
                    assert_prefix(kind, buffer, note)
            else:
                assert (logits == old).all(), note
            if len(names) == 2:
                assert (buffer.get_metadata("task") == new).all(), note
                with pytest.raises(StateError, match=r"resized|no restore point"):
                    buffer.load_state_dict(state)
            else:
                buffer.load_state_dict(state)
                assert_prefix(kind, buffer, note)
                finish(buffer, kind, note)

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

    assert stop_everywhere(work, scene, examine, 10**6 if (kind, mode) == ("reservoir", "x") else SOME) > 10
