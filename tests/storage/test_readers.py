"""Readers in other processes never get a torn row, of groups as of plain buffers."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from beside import GROUPED, KINDS, assert_whole, feed, feed_groups, group, stream
from children import child, killed, result
from nightly import times
from storage_kernels import kernel

import leanreplay
from leanreplay import (
    RecoveryError,
    RowError,
    SlidingWindowBuffer,
)
from leanreplay.storage import (
    locks,
)
from leanreplay.storage import writer as writer_module

pytestmark = [pytest.mark.usefixtures("shared_kernels"), pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

READS = times(400, 4000)  # of each of two readers beside a writer, at least
LIMIT = 300  # seconds until a process that hangs is ended


class Flag:
    """Set in one process, and seen in all that were forked since it was made."""

    def __init__(self) -> None:
        self._there = mmap.mmap(-1, 1)

    def set(self) -> None:
        self._there[0] = 1

    def __bool__(self) -> bool:
        return self._there[0] != 0


# -- readers -----------------------------------------------------------------------------------------------------------


def test_a_writer_and_two_readers(path: str) -> None:
    """However often they read, no reader gets a torn row, and both see the writer's progress."""
    ended = Flag()

    def write(pipe: int) -> int:
        rng = random.Random(0)
        with SlidingWindowBuffer(60, path, seed=1) as buffer:
            feed(buffer, 60)
            os.write(pipe, b" ")
            n = -1
            while not ended or buffer.seen <= 1000:
                n += 1
                feed(buffer, buffer.seen + rng.randint(1, 60), 60)
                if n % 50 == 49:
                    state = buffer.state_dict()
                    feed(buffer, buffer.seen + 90)
                    buffer.load_state_dict(state)
                    if n % 100 == 99:  # commits are one call again
                        buffer.current.store.drop_points()
                if n % 20 == 19:
                    p = buffer.get_metadata("position")
                    buffer.set_metadata("z", np.stack([p, -p], 1).astype(np.float64))
            return int(buffer.seen)

    def read_on(number: int) -> Callable[[int], list[int]]:
        def work(_: int) -> list[int]:
            rows, reads, moments = 0, 0, set()
            with leanreplay.open(path) as reader:
                while reads < READS or len(moments) <= 10:
                    reads += 1
                    if number:
                        assert_whole(reader.sample(24))
                        rows += 24
                    else:
                        for item in reader.__getitems__([0, 7, -1, 30]):
                            (x, y), meta = item
                            assert_whole(((x[None], np.array([y])), {"position": np.array([meta["position"]]), "z": meta["z"][None]}))
                        rows += 4
                    moments.add(reader.seen)
            return [rows, len(moments)]

        return work

    writer = child(write, LIMIT)
    assert os.read(writer[1], 1) == b" "
    readers = [child(read_on(number), LIMIT) for number in range(2)]
    results = [result(*reader) for reader in readers]
    ended.set()
    seen = result(*writer)
    assert seen > 1000
    for rows, moments in results:
        assert rows > 200, results
        assert moments > 10, results
    with leanreplay.open(path, mode="r+") as buffer:
        assert buffer.check() == []
        assert_whole(buffer.get(np.arange(60)))


def test_readers_follow_a_resize(path: str) -> None:
    """A reader in another process goes over to the file that a resize put in place, again and again."""
    followed = Flag()
    with SlidingWindowBuffer(60, path, seed=1) as buffer:
        feed(buffer, 60)
        done, over = os.pipe()
        os.set_blocking(done, False)

        def work(pipe: int) -> list[int]:
            sizes = set()
            with leanreplay.open(path) as reader:
                os.write(pipe, b" ")
                while True:
                    with contextlib.suppress(BlockingIOError):
                        if os.read(done, 1):
                            return [len(sizes), len(reader), reader.max_size]
                    assert_whole(reader.sample(10))
                    sizes.add(reader.max_size)
                    if len(sizes) > 3:
                        followed.set()

        pid, read = child(work, LIMIT)
        assert os.read(read, 1) == b" "
        rng = random.Random(3)
        n = 0
        while n < 60 or (not followed and n < 100_000):
            size = 20 + n % 60
            n += 1
            buffer.resize(size)
            feed(buffer, buffer.seen + rng.randint(20, 60))
            time.sleep(0.002)
        os.write(over, b"!")
        sizes, held, most = result(pid, read)
        os.close(done)
        os.close(over)
        assert (held, most) == (len(buffer), size)
        assert sizes > 3


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["reservoir", "window", "greedy"])
def test_reading_after_a_writer_was_killed_within_a_commit(kind: str, calls: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the writes of two fields: a reader gets the old rows from the journal, or RecoveryError, never torn ones."""
    monkeypatch.setattr(locks, "PATIENCE", 0.02)  # nobody will end what it began
    with KINDS[kind](path) as buffer:
        feed(buffer, 100)
        rows = buffer.get_metadata("idx")
        (x, y), meta = buffer.get(rows)

    def work(_: int) -> None:
        whole, count = kernel.write_field, 0

        def write_field(*args: Any) -> None:
            nonlocal count
            if count == calls:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            count += 1
            whole(*args)
            if count == calls == 3:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)

        with leanreplay.open(path, mode="r+") as writer:
            kernel.write_field, writer_module.ONE_CALL = write_field, False
            writer.add(**stream(100, 130))

    killed(*child(work))
    with leanreplay.open(path) as reader:
        assert reader.seen == 100
        assert any("cut off" in str(p) for p in reader.check())
        try:
            drawn = reader.get(rows)
        except RecoveryError as error:
            assert "middle of a commit" in str(error)
        else:
            assert (drawn[0][0] == x).all()
            assert (drawn[0][1] == y).all()
            assert (drawn[1]["position"] == meta["position"]).all()
        for row in range(0, 60, 7):
            with contextlib.suppress(RecoveryError):
                assert_whole(reader.get([row]))
    with leanreplay.open(path, mode="r+") as buffer:
        assert buffer.check() == []
        assert buffer.seen == 100
        assert (buffer.get(rows)[0][0] == x).all()
    with leanreplay.open(path) as reader:
        assert reader.check() == []


# -- readers of groups -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GROUPED)
def test_groups_that_come_and_go_beside_two_readers(kind: str, path: str) -> None:
    """While a writer adds groups, and rolls back to when there were three: whole rows, and sizes that are those of one moment."""
    ends, first, last = time.monotonic() + 1.5, 100, 1000
    ended = Flag()

    def write(pipe: int) -> int:
        rng = random.Random(0)
        turns = 0
        with GROUPED[kind](path) as buffer:
            feed_groups(buffer, first)
            state = buffer.state_dict()
            os.write(pipe, b" ")
            while turns < 3 or not ended:
                while buffer.seen < last:
                    feed_groups(buffer, min(last, buffer.seen + rng.randint(1, 40)), 40)
                buffer.load_state_dict(state)
                turns += 1
        return turns

    def read_on(number: int) -> Callable[[int], Any]:
        def work(_: int) -> Any:
            found, items, rng = {}, 0, random.Random(number)
            with leanreplay.open(path) as reader:
                while time.monotonic() < ends or (items <= 200 if number else len(found) <= 20):
                    if number:
                        drawn = reader.sample(20)
                        assert_whole(drawn)
                        items += 20
                        with contextlib.suppress(RowError):  # they may be free by now
                            g = rng.randrange(3)
                            for (x, y), meta in reader.groups[g].__getitems__([0, -1]):
                                assert_whole(((x[None], np.array([y])), {"position": np.array([meta["position"]]), "z": meta["z"][None]}))
                                assert group(meta["position"]) == g, (g, meta["position"])
                        continue
                    before = reader.seen, reader.current.store.sequence
                    sizes, held = reader.group_sizes(), len(reader)
                    if (reader.seen, reader.current.store.sequence) == before:
                        assert sum(sizes.values()) == held
                        text = json.dumps(sorted(sizes.items()))
                        assert found.setdefault(before[0], text) == text, before
            return [items, sorted(found.items())]

        return work

    writer = child(write, LIMIT)
    assert os.read(writer[1], 1) == b" "
    readers = [child(read_on(number), LIMIT) for number in range(2)]
    (_, moments), (items, _) = [result(*reader) for reader in readers]
    ended.set()
    assert result(*writer) > 2
    assert items > 200
    assert len(moments) > 20
    with GROUPED[kind](None) as model:
        for seen, sizes in moments:
            feed_groups(model, seen)
            assert sizes == json.dumps(sorted(model.group_sizes().items())), seen
    with leanreplay.open(path, mode="r+") as buffer:
        assert buffer.check() == []
        assert buffer.seen == first


STAGES = ["seal", "field 0", "field 2", "index", "log"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", GROUPED)
def test_groups_after_a_writer_was_killed_within_a_commit(kind: str, stage: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the journal, a field, the index with the freed rows, or the log: a reader gets the old rows and groups."""
    monkeypatch.setattr(locks, "PATIENCE", 0.02)  # nobody will end what it began
    with GROUPED[kind](path) as buffer:
        feed_groups(buffer, 158)
        rows, sizes = buffer.get_metadata("idx"), buffer.group_sizes()
        (x, y), meta = buffer.get(rows)
        members = {g: buffer.group_rows(g).tolist() for g in sizes}
    assert group(164) not in sizes

    def work(_: int) -> None:
        write_field, seal_block, append_log, fields = kernel.write_field, kernel.seal_block, writer_module.Writer.append_log, 0

        def die(here: str) -> None:
            if here == stage:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)

        def sealing(mem: Any, at: int, words: Any, state: int) -> None:
            seal_block(mem, at, words, state)
            die("seal" if words.shape[0] == 8 else "")

        def writing(*args: Any) -> None:
            nonlocal fields
            write_field(*args)
            die(f"field {fields}")
            fields += 1

        def logging(*args: Any) -> None:
            die("index")
            append_log(*args)
            die("log")

        writer_module.ONE_CALL = False
        with leanreplay.open(path, mode="r+") as writer:
            kernel.write_field, kernel.seal_block, writer_module.Writer.append_log = writing, sealing, logging  # type: ignore[method-assign]
            feed_groups(writer, 170)

    killed(*child(work))
    with leanreplay.open(path) as reader:
        assert reader.seen == 158
        assert any("cut off" in str(p) for p in reader.check())
        assert reader.group_sizes() == sizes
        assert {g: reader.group_rows(g).tolist() for g in sizes} == members
        drawn = reader.get(rows)
        assert (drawn[0][0] == x).all()
        assert (drawn[0][1] == y).all()
        assert (drawn[1]["position"] == meta["position"]).all()
        for g, n in sizes.items():
            assert [group(m["position"]) for _, m in reader.groups[g]] == [g] * n
        for n in (5, len(rows)):
            drawn = reader.sample(n)
            assert_whole(drawn)
            assert drawn[1]["position"].max() < 158
    with leanreplay.open(path, mode="r+") as buffer:
        assert buffer.check() == []
        assert (buffer.seen, buffer.group_sizes()) == (158, sizes)
        assert (buffer.get(rows)[0][0] == x).all()
        feed_groups(buffer, 300)
        assert buffer.check() == []
