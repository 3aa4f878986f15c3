"""Several processes on one buffer: one writer, its lock across forks and kills, readers that never get a torn row."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from children import child, killed, result
from interpreter import Script
from nightly import times

import leanreplay
from leanreplay import (
    ClassBalancedBuffer,
    ClassBalancingReservoirBuffer,
    GreedyClassBalancingBuffer,
    InfiniteBuffer,
    LockedError,
    ModeError,
    RecoveryError,
    ReservoirBuffer,
    RowError,
    SlidingWindowBuffer,
)
from leanreplay.kernels import rows as kernel
from leanreplay.storage import (
    store,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

READS = times(400, 4000)  # of each of two readers beside a writer, at least
LIMIT = 300  # seconds until a process that hangs is ended
FORKS = times(10, 30)  # per place, while a thread is busy
KINDS: dict[str, Callable[..., Any]] = {
    "reservoir": lambda path, **o: ReservoirBuffer(60, path, seed=1, **o),
    "window": lambda path, **o: SlidingWindowBuffer(60, path, seed=1, **o),
    "greedy": lambda path, **o: GreedyClassBalancingBuffer(60, path, seed=1, **o),
    "infinite": lambda path, **o: InfiniteBuffer(path, rows_per_part=100, seed=1, **o),
}


def stream(start: int, stop: int) -> dict[str, Any]:
    """Every byte is a function of position, so a row says whether it is whole."""
    p = np.arange(start, stop)
    x = ((p[:, None] * 40503 + np.arange(1500) * 2654435761) >> 9).astype(np.uint8)
    return {"batch": (x, p % 7), "metadata": {"z": np.stack([p, -p], 1).astype(np.float64)}}


def assert_whole(drawn: Any) -> None:
    """The rows of a sample are those of their positions."""
    (x, y), meta = drawn
    p = meta["position"]
    assert (x == ((p[:, None] * 40503 + np.arange(1500) * 2654435761) >> 9).astype(np.uint8)).all(), p
    assert (y == p % 7).all(), p
    assert (meta["z"] == np.stack([p, -p], 1)).all(), p


def feed(buffer: Any, stop: int, step: int = 20) -> None:
    while buffer.seen < stop:
        buffer.add(**stream(buffer.seen, min(stop, buffer.seen + step)))


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Compile all kernels once, before any fork."""
    for make in KINDS.values():
        with tempfile.TemporaryDirectory() as folder, make(os.path.join(folder, "b.h5")) as buffer:
            feed(buffer, 150)
            state = buffer.state_dict()
            feed(buffer, 200)
            buffer.load_state_dict(state)
            buffer.sample(3)
            assert buffer.check() == []
    for make in GROUPED.values():
        with tempfile.TemporaryDirectory() as folder, make(os.path.join(folder, "b.h5")) as buffer:
            feed_groups(buffer, 150)
            state = buffer.state_dict()
            feed_groups(buffer, 200)
            buffer.load_state_dict(state)
            buffer.group_sizes()


class Flag:
    """Set in one process, and seen in all that were forked since it was made."""

    def __init__(self) -> None:
        self._there = mmap.mmap(-1, 1)

    def set(self) -> None:
        self._there[0] = 1

    def __bool__(self) -> bool:
        return self._there[0] != 0


@pytest.fixture
def path(tmp_path: Any) -> str:
    return str(tmp_path / "b.h5")


# -- one writer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["x", "a", "r+", "w"])
@pytest.mark.parametrize("kind", KINDS)
def test_second_writer_is_refused(kind: str, mode: str, path: str) -> None:
    """A writer holds a lock: another one, in this or another process, gets a LockedError; readers do not care."""

    def second(_: int = 0) -> str:
        try:
            KINDS[kind](path, mode=mode)
        except LockedError as error:
            return str(error)
        return "opened"

    with KINDS[kind](path) as buffer:
        feed(buffer, 30)
        assert f"in this very process, by the {type(buffer).__name__} at {id(buffer):#x}" in second()
        assert "open for writing elsewhere" in result(*child(second))
        with leanreplay.open(path) as reader:
            assert_whole(reader.sample(5))
        feed(buffer, 60)  # undisturbed
        assert buffer.check() == []
    if mode in ("a", "r+"):
        with KINDS[kind](path, mode=mode) as buffer:
            assert buffer.seen == 60


def between_fields(monkeypatch: pytest.MonkeyPatch, reader: Any, cut: int, act: Callable[[], None]) -> None:
    """The reader's next read of all fields: those before `cut`, then `act`, then the others, as a slow one would meet a writer."""
    plain = kernel.read_rows

    def slow(view: Any, cols: Any, first: int, last: int, rows: Any, out: Any, places: Any, index: Any, sums: Any, bad: Any) -> int:
        if reader._store._view is not view or rows.shape[0] == 1:
            return int(plain(view, cols, first, last, rows, out, places, index, sums, bad))
        monkeypatch.setattr(kernel, "read_rows", plain)
        plain(view, cols, first, cut, rows, out, places, index, sums, bad)
        before, wrong = sums.copy(), bad.copy()
        act()
        plain(view, cols, cut, last, rows, out, places[cut:], index, sums, bad)
        sums += before
        bad |= wrong
        return int(np.count_nonzero(bad))

    monkeypatch.setattr(kernel, "read_rows", slow)


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("how", ["moved", "went back"])
def test_commits_between_the_fields_of_a_row(how: str, cut: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose position and group stay while its bytes change: a reader gets all of the old or all of the new ones."""

    def batch(value: float) -> tuple[Any, Any]:
        return (np.full((8, 2), value), np.full(8, int(value))), {name: np.full(8, value) for name in ("a", "b")}

    with SlidingWindowBuffer(8, path, seed=1) as writer:
        samples, metadata = batch(0.0)
        writer.add(samples, metadata=metadata, group=np.zeros(8, int))
        first = writer.state_dict()
        writer.add(samples, metadata=metadata, group=np.zeros(8, int))

        def act() -> None:
            if how == "moved":
                rows = np.arange(4)
                writer.add(
                    *[tuple(part[:1] for part in samples)], metadata={k: v[:1] for k, v in metadata.items()}, group=np.zeros(1, int),
                    moved=(rows, writer.get_metadata("position", rows), {k: np.full(4, 1.0) for k in metadata}),
                )  # fmt: skip
            else:
                writer.load_state_dict(first)
                new, stored = batch(1.0)
                writer.add(new, metadata=stored, group=np.zeros(8, int))

        with leanreplay.open(path) as reader:
            between_fields(monkeypatch, reader, cut, act)
            (x, y), meta = reader.sample(8)
            if how == "went back":
                assert (x[:, 0] == y).all() and (y == 1).all()
                assert (meta["a"] == y).all()
            assert (meta["a"] == meta["b"]).all() and meta["a"].any()


def test_a_commit_while_a_reader_takes_the_header(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader takes for known is what it has read, not what stands there a moment later."""
    with ReservoirBuffer(5, path) as writer:

        def add() -> None:
            writer.add((np.zeros((1, 2)), np.zeros(1, int)))

        add()
        with leanreplay.open(path) as reader:
            add()
            newest = reader._store._newest

            def late() -> Any:
                found = newest()
                monkeypatch.setattr(reader._store, "_newest", newest)
                add()
                return found

            monkeypatch.setattr(reader._store, "_newest", late)
            assert reader.seen == 2 and reader.seen == writer.seen == 3


def test_a_rollback_that_was_cut_off_stays_so(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader says each time that the file is to be opened for writing once, and then reads on."""
    monkeypatch.setattr(store, "_PATIENCE", 0.1)

    def add(buffer: Any, value: float) -> None:
        buffer.add((np.full((5, 2), value), np.zeros(5, int)))

    with SlidingWindowBuffer(5, path) as writer:
        add(writer, 0.0)
    with leanreplay.open(path) as reader:
        reader.sample(2)
        pid = os.fork()
        if pid == 0:
            with SlidingWindowBuffer(5, path, mode="r+") as writer:
                state = writer.state_dict()
                add(writer, 1.0)
                store.Store._apply_rollback = lambda *_: os._exit(0)  # type: ignore[assignment, method-assign]
                writer.load_state_dict(state)
            os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        for _ in range(3):
            with pytest.raises(RecoveryError, match="open it for writing once"):
                reader.sample(5)
        with SlidingWindowBuffer(5, path, mode="r+") as writer:
            assert writer.seen == 5
        (x, _), _ = reader.sample(5)
        assert not x.any()


LEFT_OPEN = """
import sys, numba, numpy, leanreplay
@numba.njit
def twice(x):
    return 2 * x
twice(1)  # numba keeps the names of this script until modules are torn down
buffer = leanreplay.ReservoirBuffer(5, *sys.argv[1:])
buffer.add((numpy.zeros((3, 2)), numpy.arange(3)))
"""


@pytest.mark.parametrize("ram", [True, False])
def test_a_buffer_that_outlives_the_modules(ram: bool, path: str) -> None:
    """A script that ends with a buffer open prints nothing, however late the buffer goes."""
    command = [sys.executable, "-c", LEFT_OPEN, *([] if ram else [path])]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == ran.stderr == ""


def test_worker_outlives_a_killed_trainer(path: str) -> None:
    """A forked worker that goes on after its trainer was killed keeps no lock: the next trainer opens the buffer at once."""
    to_worker, release = os.pipe()
    from_worker, answer = os.pipe()

    def trainer(pipe: int) -> None:
        buffer = ReservoirBuffer(60, path, seed=1)
        feed(buffer, 100)
        buffer.state_dict()  # and no descriptor of an undo file
        feed(buffer, 140)
        if os.fork() == 0:
            try:
                signal.alarm(60)
                os.close(pipe)
                os.write(answer, f"{len(buffer)} {buffer.mode}\n".encode())
                os.read(to_worker, 1)
                assert_whole(buffer.sample(8))
                os.write(answer, b"still here\n")
            finally:
                os._exit(0)
        signal.pause()

    pid, read = child(trainer)
    try:
        assert os.read(from_worker, 100) == b"60 r\n"
        os.kill(pid, signal.SIGKILL)
        killed(pid, read)
        with ReservoirBuffer(path=path, mode="r+") as buffer:
            assert buffer.seen == 140
            feed(buffer, 200)
            os.write(release, b"!")  # only now the worker ends
            assert os.read(from_worker, 100) == b"still here\n"
            assert buffer.check() == []
    finally:
        for fd in (to_worker, release, from_worker, answer):
            os.close(fd)


def test_forked_copies_read_only(path: str) -> None:
    """A fork's child reads what the parent commits later, and cannot write."""
    with ReservoirBuffer(60, path, seed=1) as buffer:
        feed(buffer, 100)
        go, told = os.pipe()

        def work(_: int) -> list[Any]:
            os.read(go, 1)
            assert_whole(buffer.sample(20))
            refused = []
            for write in (lambda: buffer.add(**stream(0, 5)), buffer.state_dict, lambda: buffer.resize(5)):
                try:
                    write()
                except ModeError as error:
                    refused.append(str(error))
            return [buffer.seen, refused]

        pid, read = child(work)
        feed(buffer, 300)
        os.write(told, b"!")
        seen, refused = result(pid, read)
        os.close(go)
        os.close(told)
        assert seen == 300
        assert len(refused) == 3
        assert all("open for reading only" in text for text in refused)
        feed(buffer, 400)
        assert buffer.check() == []


@pytest.mark.parametrize("ram", [False, True])
def test_fork_while_a_thread_is_busy(ram: bool, path: str) -> None:
    """A fork while another thread is inside `add` or `sample` does not hang the child, and the child gets whole rows."""
    with ReservoirBuffer(60, None if ram else path, seed=1) as buffer:
        feed(buffer, 100)
        stop = threading.Event()
        failures: list[BaseException] = []

        def busy() -> None:
            try:
                while not stop.is_set():
                    buffer.add(**stream(buffer.seen, buffer.seen + 300))
                    assert_whole(buffer.sample(200, replace=True))
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=busy)
        thread.start()
        try:

            def work(_: int) -> int:
                assert_whole(buffer.sample(4))
                return len(buffer)

            for _ in range(FORKS):
                assert result(*child(work, limit=20)) == 60
        finally:
            stop.set()
            thread.join()
        assert failures == []
        assert buffer.check() == []


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
                        buffer._store.drop_points()
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
    monkeypatch.setattr(store, "_PATIENCE", 0.02)  # nobody will end what it began
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
            kernel.write_field, store._AT_ONCE = write_field, False
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

GROUPED: dict[str, Callable[..., Any]] = {
    "balanced": lambda path, **o: ClassBalancedBuffer(60, path, seed=1, **o),
    "borrowing": lambda path, **o: ClassBalancedBuffer(60, path, seed=1, borrow=True, **o),
    "cbrs": lambda path, **o: ClassBalancingReservoirBuffer(60, path, seed=1, **o),
}


def group(p: Any) -> Any:
    """Ever more groups, 20 in the end."""
    return p * 31 % np.minimum(1 + p // 40, 20)


def feed_groups(buffer: Any, stop: int, step: int = 20) -> None:
    while buffer.seen < stop:
        start, end = buffer.seen, min(stop, buffer.seen + step)
        buffer.add(**stream(start, end), group=group(np.arange(start, end)))


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
                    before = reader.seen, reader._store.sequence
                    sizes, held = reader.group_sizes(), len(reader)
                    if (reader.seen, reader._store.sequence) == before:
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
    monkeypatch.setattr(store, "_PATIENCE", 0.02)  # nobody will end what it began
    with GROUPED[kind](path) as buffer:
        feed_groups(buffer, 158)
        rows, sizes = buffer.get_metadata("idx"), buffer.group_sizes()
        (x, y), meta = buffer.get(rows)
        members = {g: buffer.group_rows(g).tolist() for g in sizes}
    assert group(164) not in sizes

    def work(_: int) -> None:
        write_field, seal_block, append_log, fields = kernel.write_field, kernel.seal_block, store.Store._append_log, 0

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

        store._AT_ONCE = False
        with leanreplay.open(path, mode="r+") as writer:
            kernel.write_field, kernel.seal_block, store.Store._append_log = writing, sealing, logging  # type: ignore[method-assign]
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


# -- pickled buffers ---------------------------------------------------------------------------------------------------

READ = """
import json, pickle, sys
buffer = pickle.loads(bytes.fromhex(sys.argv[1]))
(x, y), meta = buffer.sample(16)
try:
    buffer.add((x, y), metadata={"z": meta["z"]})
    refused = ""
except Exception as error:
    refused = f"{type(error).__name__}: {error}"
print(json.dumps([x.sum(1).tolist(), meta["position"].tolist(), buffer.seen, len(buffer), buffer.mode, refused]))
"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ram", [False, True])
def test_pickled_buffers_read_in_a_new_process(kind: str, ram: bool, path: str) -> None:
    """On disk and in RAM: an unpickled copy reads in a process that shares nothing with this one, and cannot write."""
    if ram and not os.path.isdir("/proc/self/fd"):
        pytest.skip("shared memory is reachable by path only on Linux")
    with KINDS[kind](None if ram else path) as buffer:
        feed(buffer, 150)
        if ram and kind == "infinite":
            with pytest.raises(ModeError, match="cannot be sent"):
                pickle.dumps(buffer)
            return
        other = Script(READ, pickle.dumps(buffer).hex())
        out, errors = other.communicate(120)
        assert other.returncode == 0, errors
        sums, positions, seen, held, mode, refused = json.loads(out)
        assert (seen, held, mode) == (150, len(buffer), "r")
        assert refused.startswith("ModeError"), refused
        for total, p in zip(sums, positions, strict=True):
            assert total == int(stream(p, p + 1)["batch"][0].sum(dtype=np.int64))
        buffer.sample(1)
        feed(buffer, 200)
        assert buffer.check() == []


@pytest.mark.parametrize("ram", [False, True])
def test_unpickled_copies_cannot_write(ram: bool, path: str) -> None:
    """In the same process too: there is one writer, and the copy sees what it commits."""
    if ram and not os.path.isdir("/proc/self/fd"):
        pytest.skip("shared memory is reachable by path only on Linux")
    with ReservoirBuffer(60, None if ram else path, seed=1) as buffer:
        feed(buffer, 100)
        copy = pickle.loads(pickle.dumps(buffer))
        feed(buffer, 200)
        assert copy.seen == 200
        assert_whole(copy.sample(20))
        for write in (
            lambda: copy.add(**stream(200, 210)),
            lambda: copy.set_metadata("z", np.zeros((60, 2))),
            lambda: copy.resize(5),
            copy.state_dict,
        ):
            with pytest.raises(ModeError, match="open for reading only"):
                write()
        copy.close()
        feed(buffer, 300)
        assert buffer.check() == []
