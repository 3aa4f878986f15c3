"""Several processes on one buffer: one writer, its lock across forks and kills, pickled copies."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from beside import KINDS, assert_whole, feed, stream
from children import child, killed, result
from interpreter import Script
from nightly import times
from storage_kernels import kernel

import leanreplay
from leanreplay import (
    LockedError,
    ModeError,
    RecoveryError,
    ReservoirBuffer,
    SlidingWindowBuffer,
)
from leanreplay.storage import (
    locks,
)
from leanreplay.storage import reader as reader_module
from leanreplay.storage import writer as writer_module

pytestmark = [pytest.mark.usefixtures("shared_kernels"), pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
FORKS = times(10, 30)  # per place, while a thread is busy


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

    def slow(
        view: Any, cols: Any, first: int, last: int, rows: Any, out: Any, places: Any, index: Any, sums: Any, bad: Any, *rest: Any
    ) -> int:  # fmt: skip
        if reader.current.store.mapping.view is not view or rows.shape[0] == 1:
            return int(plain(view, cols, first, last, rows, out, places, index, sums, bad, *rest))
        monkeypatch.setattr(kernel, "read_rows", plain)
        plain(view, cols, first, cut, rows, out, places, index, sums, bad, *rest)
        before, wrong = sums.copy(), bad.copy()
        act()
        plain(view, cols, cut, last, rows, out, places[cut:], index, sums, bad, *rest)
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
            newest = reader_module.newest_state

            def late(*args: Any, **named: Any) -> Any:
                found = newest(*args, **named)
                monkeypatch.setattr(reader_module, "newest_state", newest)
                add()
                return found

            monkeypatch.setattr(reader_module, "newest_state", late)
            assert reader.seen == 2 and reader.seen == writer.seen == 3


def test_a_rollback_that_was_cut_off_stays_so(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader says each time that the file is to be opened for writing once, and then reads on."""
    monkeypatch.setattr(locks, "PATIENCE", 0.1)

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
                writer_module.Writer.apply_rollback = lambda *_: os._exit(0)  # type: ignore[assignment, method-assign]
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
