"""AsyncReservoir: whatever ends it, nothing is left behind."""

from __future__ import annotations

import contextlib
import errno
import gc
import multiprocessing
import os
import signal
import sys
import textwrap
import threading
import time
from multiprocessing.synchronize import SemLock

import pytest
from async_jobs import METHODS, PATIENCE, Paths, fails, identity, nothing_left, processes, settle, threads
from interpreter import Script

from leanreplay import ModeError, SlidingWindowBuffer, WorkerError
from leanreplay.torch import AsyncReservoir
from leanreplay.torch.loading.async_reservoir import pool

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif("fork" not in METHODS, reason="needs fork")


def descriptors():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def semaphore(name):
    """Where a named one lies."""
    return "/dev/shm/sem." + name.lstrip("/")


def start(make, method, load):
    options = {"mp_context": method} if make is processes else {}
    return make(range(9), load, workers=2, min_reservoir_samples=3, **options)


ENDS = [(m, method, how) for m, method in ((threads, ""), (processes, "fork")) for how in ("close", "fail", "abandon")]
ENDS += [(processes, m, "fail") for m in METHODS if m != "fork"]


@pytest.mark.parametrize(("make", "method", "how"), ENDS)
def test_nothing_is_left(make, method, how, monkeypatch):
    """No thread, process, descriptor or semaphore: after close, after an exception, after it was forgotten."""
    name, semaphores = SemLock._make_name, []
    monkeypatch.setattr(SemLock, "_make_name", staticmethod(lambda: semaphores.append(name()) or semaphores[-1]))
    gc.collect()  # what other tests left
    nothing_left()
    if sys.platform == "linux":
        lock = multiprocessing.get_context("spawn").Lock()
        assert os.path.exists(semaphore(semaphores[-1]))  # so those left would be noticed below
        del lock, semaphores[:]
    before = 0
    for attempt in range(3):
        reservoir = start(make, method, identity if how != "fail" else fails)
        found = None
        with contextlib.suppress(WorkerError):
            found = iter(reservoir)
            next(found)
            while how == "fail":
                list(reservoir)
        if how == "close":
            assert reservoir._intake.jobs.pool is not None
            reservoir.close()
        elif how == "abandon":
            del reservoir, found
            gc.collect()
        nothing_left()
        assert semaphores == [], "pipes need none, so that none can be left"
        if attempt == 0:
            before = descriptors()  # the first one starts multiprocessing's resource tracker and fork server, which stay
        assert descriptors() == before


def sleeps(i):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as libraries in C sometimes do
    if i:
        time.sleep(1000)
    return i


@pytest.mark.parametrize("method", METHODS)
def test_close_does_not_wait_for_long_jobs(method, monkeypatch):
    """Processes that are busy for longer are killed, those that wait in the queue never begin."""
    monkeypatch.setattr(pool, "PATIENCE", 0.2)
    with processes(range(1000), sleeps, workers=2, max_jobs_at_once=0, mp_context=method) as reservoir:
        assert list(reservoir) == [0]
    nothing_left()


def finishes(pair):
    path, i = pair
    if i:
        while not os.path.exists(path + ".go"):
            time.sleep(0.01)
        time.sleep(0.2)
        with open(path, "w", encoding="utf-8") as file:
            file.write("whole")
    return i


def test_close_lets_short_jobs_end(tmp_path, monkeypatch):
    """What a job is writing is not cut off."""
    monkeypatch.setattr(pool, "PATIENCE", PATIENCE)
    path = str(tmp_path / "cache")
    with processes([(path, 0), (path, 1)], finishes) as reservoir:
        assert list(reservoir) == [0]
        while not next(iter(reservoir._intake.jobs.pending)).running():
            time.sleep(0.01)
        open(path + ".go", "w").close()
    with open(path, encoding="utf-8") as file:
        assert file.read() == "whole"


def notes(path):
    with open(path, "ab") as file:
        file.write(b"x")
    while os.path.getsize(path) > 40:
        time.sleep(0.01)


def test_close_drops_what_has_not_begun(tmp_path, monkeypatch):
    """Of 400 jobs the first 40 end, two more run on until they are ended, and no other begins."""
    monkeypatch.setattr(pool, "PATIENCE", 0.2)
    path = str(tmp_path / "notes")
    with processes([path] * 400, notes, workers=2, max_jobs_at_once=0) as reservoir:
        assert set(reservoir) == {None}
        while os.path.getsize(path) < 42:
            time.sleep(0.01)
        reservoir.close()
    assert os.path.getsize(path) < 60


def test_close():
    source = Paths(9)
    with threads(source) as reservoir:
        found = iter(reservoir)
    assert source.closed == 1
    reservoir.close()
    assert source.closed == 1
    for use in (lambda: next(found), lambda: iter(reservoir), reservoir.reservoir_size, lambda: reservoir.subsample(1)):
        with pytest.raises(ModeError, match="closed"):
            use()
    assert reservoir.performance["sending"]["count"] > 0
    buffer = SlidingWindowBuffer(10)
    with threads(range(3), float, buffer=buffer) as reservoir:
        list(reservoir)
    assert len(buffer) == 1


def test_close_before_the_first_epoch():
    source = Paths(9)
    threads(source).close()
    assert source.closed == 1


def test_the_source_is_closed_whatever_happens(monkeypatch):
    source = Paths(9)
    reservoir = threads(source)
    iter(reservoir)
    stop = reservoir._intake.stop

    def broken():
        stop()
        raise OSError

    monkeypatch.setattr(reservoir._intake, "stop", broken)
    with pytest.raises(OSError):
        reservoir.close()
    assert source.closed == 1


def test_an_error_in_the_training_loop_ends_it():
    with pytest.raises(ZeroDivisionError), processes(range(9), workers=2) as reservoir:
        for _ in reservoir:
            raise ZeroDivisionError
    nothing_left()


def test_an_error_in_collate_ends_it():
    with processes(range(9), collate_fn=lambda e: e / 0) as reservoir:
        with pytest.raises(ZeroDivisionError):
            next(iter(reservoir))
        nothing_left()


def test_a_forked_copy():
    """Leaves the workers alone, and says that they are not its own."""
    with processes(range(9)) as reservoir:
        list(reservoir)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                iter(reservoir)
            except ModeError:
                reservoir.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        settle(reservoir)
        assert len(list(reservoir)) == 2


SCRIPT = """
    import os, signal, sys, time
    from leanreplay.torch import AsyncReservoir
    from leanreplay.torch.loading.async_reservoir import pool

    pool.PATIENCE = 0.5

    def load(i):
        if i > 1 and sys.argv[1] != "idle":
            time.sleep(1000)
        return i

    def say(text):
        os.write(1, f"{text}\\n".encode())  # print may not be interrupted while it holds its buffer

    if __name__ == "__main__":
        place, method, close = sys.argv[1:]
        most = 2 if place == "idle" else 0
        workers = 1 if (place, method) == ("train", "spawn") else 2  # which take seconds to start
        reservoir = AsyncReservoir(range(500), load, 9, workers=workers, max_jobs_at_once=most, min_reservoir_samples=2, mp_context=method)
        try:
            if place == "begin":
                reservoir._queue()
                say(f"children {[p.pid for p in reservoir._intake.jobs.pool.processes]}")
            for entry in reservoir:
                pass
            children = [p.pid for p in reservoir._intake.jobs.pool.processes]
            say(f"children {children}")
            if place == "wait":
                reservoir.min_reservoir_samples = 3
                iter(reservoir)
            elif place != "end":
                time.sleep(1000)
            say("the end")
        finally:
            if close == "close":
                reservoir.close()
"""


def gone(pids):
    """Wait until none of these processes runs."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if not [p for p in pids if os.path.exists(f"/proc/{p}") and "\nState:\tZ" not in read(f"/proc/{p}/status")]:
            return True
        time.sleep(0.05)
    return False


def read(path):
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return "\nState:\tZ"


def script(tmp_path, *arguments):
    path = tmp_path / "script.py"  # which spawned workers import
    path.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    run = Script(path.read_text(encoding="utf-8"), *arguments, file=path)
    line = run.stdout.readline()
    assert line.startswith("children"), run.stderr.read()
    return run, [int(c) for c in line.split("[")[1].rstrip("]\n").split(",")]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
@pytest.mark.parametrize(
    ("place", "method", "close"),
    [("wait", "fork", "close"), ("begin", "spawn", "no"), ("train", "fork", "close"), ("train", "fork", "no"), ("idle", "fork", "no")],
)
def test_ctrl_c(tmp_path, place, method, close):
    """To the whole group, as a terminal sends it: one traceback, no wait for the 500 jobs of 1,000 s, nothing left."""
    run, children = script(tmp_path, place, method, close)
    time.sleep(0.3)
    os.killpg(run.pid, signal.SIGINT)
    out, error = run.communicate(PATIENCE)
    assert error.count("KeyboardInterrupt") == 1, error
    assert error.count("Traceback") == 1, error
    assert run.returncode == -signal.SIGINT
    assert "the end" not in out
    assert "leaked" not in error
    assert gone(children)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_the_end_of_the_interpreter(tmp_path):
    """Without close, jobs that are queued are not waited for."""
    run, children = script(tmp_path, "end", "fork", "no")
    out, error = run.communicate(PATIENCE)
    assert (out, error, run.returncode) == ("the end\n", "", 0)
    assert gone(children)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_end_with_a_killed_parent(tmp_path, method):
    """Also those in the middle of a job."""
    run, children = script(tmp_path, "train", method, "no")
    run.kill()
    run.wait(PATIENCE)
    assert gone(children)
    for pipe in (run.stdout, run.stderr):
        pipe.close()


@pytest.mark.parametrize(("executor", "number"), [("thread", 0), ("process", 0), ("process", 1)])
def test_threads_that_cannot_start(executor, number, monkeypatch):
    """No more threads, for the first worker or for a further one: an error, no hang; later it works."""
    real, calls = threading.Thread.start, []

    def start(thread):
        calls.append(thread)
        if len(calls) == number + 1:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(pool, "PATIENCE", 0.2)
    with AsyncReservoir(list(range(10)), abs, 2, executor=executor, workers=number + 1, min_reservoir_samples=2) as reservoir:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", start)
            with pytest.raises(WorkerError, match="cannot start"):
                list(reservoir)
        assert len(list(reservoir)) == 2


def test_processes_that_cannot_start(monkeypatch):
    def fork():
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with AsyncReservoir(list(range(10)), abs, 2, mp_context="fork", min_reservoir_samples=2) as reservoir:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fork", fork)
            with pytest.raises(WorkerError, match=r"cannot start: .*ulimit"):
                list(reservoir)
        assert len(list(reservoir)) == 2
