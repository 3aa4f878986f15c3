"""G3, kill-safe: whatever stops a writer, the file opens and holds exactly the first `seen` samples, and feeding goes on from there.

Writers run in forked children. They are killed at random instants; at every step under test control (before, after and within
each kernel and system call, and at every line of the store, a kernel being cut off with any part of its stores done); and
in the same process by KeyboardInterrupt. The stream is a function of position, so what must be there can be recomputed.
"""

from __future__ import annotations

import glob
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from children import child, outcome
from killing import BATCH, KINDS, ROWS, assert_prefix, expected, feed, finish, image, interrupted, place, stream
from nightly import times

import leanreplay

pytestmark = [pytest.mark.usefixtures("kill_kernels"), pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


def kill_after(pid: int, read: int, seconds: float) -> str:
    """Wait for the child's first byte, then so long, then kill it. What it wrote."""
    assert os.read(read, 1) == b"."
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return outcome(pid, read)[1]


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


# -- interrupted in the same process -----------------------------------------------------------------------------------


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
    """G3: Ctrl-C at every so manieth line while the file is created: the same buffer object goes on."""
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
        step += times(9, 5)
    assert step > 200


def test_interrupted_when_a_part_is_full(tmp_path: Any) -> None:
    """G3: Ctrl-C at every so manieth line of an `add` that makes a part: the same buffer object goes on."""
    step, came = 0, True
    while came:
        with KINDS["infinite"](str(tmp_path / f"b{step}")) as buffer:
            feed(buffer, 0, 60)
            came = interrupted(lambda b=buffer: b.add(**stream(60, 90)), step)
            assert_holds("infinite", buffer, (60, 70, 90), f"interrupt after {step}")
            buffer.add(**stream(60, 90), at=60)
            assert_holds("infinite", buffer, [90], f"interrupt after {step}")
        step += times(9, 5)
    assert step > 200


def test_interrupted_in_resize_and_load(tmp_path: Any) -> None:
    """G3: Ctrl-C at every so manieth line while another file takes the name: the buffer goes on with the one that has it."""
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
        step += times(13, 7)
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
