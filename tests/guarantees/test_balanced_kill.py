"""G3 for grouped buffers: whatever stops a writer while groups come and go, what is there is the model after the first `seen` samples.

Writers run in forked children, as in test_kill.py, and are killed at random instants and at every step: of commits that free rows
and append to the log of groups, of marks, rollbacks, recoveries, `resize`, and of the rewriting for a longer log. Then what readers
see of commits that never ended, and buffers that are opened again at every position of the stream.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import warnings
from collections.abc import Callable
from typing import Any

import killing
import numpy as np
import pytest
from children import child, killed, outcome
from grouped_killing import BATCH, KINDS, MODES, ROWS, assert_prefix, feed, finish, label, stream, wanted
from grouped_oracle import Grouped
from killing import Interrupts, interrupted
from nightly import times

import leanreplay
from leanreplay import (
    CapacityWarning,
    ExperienceBalancedBuffer,
)
from leanreplay.policies import (
    balanced,
)

pytestmark = [pytest.mark.usefixtures("grouped_kernels", "all_steps"), pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
END = 3000


# -- helpers -----------------------------------------------------------------------------------------------------------


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
            killing.die()

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
    """Ctrl-C at every so manieth line of an add that rewrites the file for a longer log: the same object goes on, and back."""
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
        step += times(17, 9)
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
    """Ctrl-C at every so manieth line of `resize`: the old buffer or the new one, and feeding goes on in it."""
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
        step += times(9, 5)
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


def test_interrupts_come() -> None:
    """What the tests above rely on."""
    with KINDS["class"](None) as buffer, pytest.raises(KeyboardInterrupt), Interrupts(30):
        buffer.add(**stream("class", 0, 20))
