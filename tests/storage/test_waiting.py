"""Readers wait for a change that a living writer makes, however long that takes; a killed one they do not wait for."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest
from children import child, outcome, result
from storage_kernels import kernel
from test_faults import batch, contents, make

import leanreplay
from leanreplay import RecoveryError, merge
from leanreplay.storage import locks, system
from leanreplay.storage import writer as writer_module

pytest.importorskip("fcntl")
pytestmark = [pytest.mark.usefixtures("kernels"), pytest.mark.skipif(not system.LINUX, reason="locks of open files")]


def stopped_writer(kind: str, path: str) -> tuple[int, int, Any]:
    """A process that has stopped in the middle of going back from 40 samples to 30; its pid and pipe, and what it is going to hold."""
    with make(kind, path) as buffer:
        buffer.add(batch(0, 30))
        wanted = contents(buffer)

    def work(_: int) -> int:
        real = writer_module.Writer.apply_rollback

        def apply(*arguments: Any) -> None:
            os.kill(os.getpid(), signal.SIGSTOP)
            real(*arguments)

        with leanreplay.open(path, mode="r+") as buffer:
            state = buffer.state_dict()
            buffer.add(batch(30, 40))
            writer_module.Writer.apply_rollback = apply  # type: ignore[method-assign]
            buffer.load_state_dict(state)
            return buffer.seen

    pid, pipe = child(work)
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    return pid, pipe, wanted


@pytest.mark.parametrize("kind", ["reservoir", "balanced", "infinite"])
def test_a_writer_that_is_slow(kind: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer stands still in the middle of a rollback for many times the patience: a reader waits, and gets the right rows."""
    monkeypatch.setattr(locks, "PATIENCE", 0.02)
    path = str(tmp_path / "b.h5")
    pid, pipe, wanted = stopped_writer(kind, path)
    later = threading.Timer(0.4, os.kill, (pid, signal.SIGCONT))
    later.start()
    with leanreplay.open(path) as reader:
        assert contents(reader) == wanted
        assert reader.check() == []
    later.join()
    assert result(pid, pipe) == 30


@pytest.mark.parametrize("kind", ["reservoir", "balanced"])
@pytest.mark.parametrize("ends", [signal.SIGCONT, signal.SIGKILL])
def test_check_within_a_commit(kind: str, ends: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer stands still within a commit: rows are read as they were, and check() waits for its end, or says that none will come."""
    monkeypatch.setattr(locks, "PATIENCE", 0.02)
    path = str(tmp_path / "b.h5")
    with make(kind, path) as buffer:
        buffer.add(batch(0, 30))
        before = contents(buffer)

    def work(_: int) -> int:
        real = kernel.write_field

        def write_field(*arguments: Any) -> None:
            kernel.write_field = real
            os.kill(os.getpid(), signal.SIGSTOP)
            real(*arguments)

        with leanreplay.open(path, mode="r+") as buffer:
            buffer.state_dict()  # then a commit is no single kernel call
            kernel.write_field = write_field
            buffer.add(batch(30, 40))
            return buffer.seen

    pid, pipe = child(work)
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    later = threading.Timer(0.3, os.kill, (pid, ends))
    with leanreplay.open(path) as reader:
        assert contents(reader) == before
        later.start()
        problems = reader.check()
    later.join()
    if ends == signal.SIGCONT:
        assert problems == [] and result(pid, pipe) == 40
    else:
        assert "cut off" in str(problems[0]) and outcome(pid, pipe)[0] == signal.SIGKILL


@pytest.mark.parametrize("kind", ["reservoir", "infinite"])
def test_a_writer_that_is_killed(kind: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody will end that rollback: an error says who could."""
    monkeypatch.setattr(locks, "PATIENCE", 0.02)
    path = str(tmp_path / "b.h5")
    pid, pipe, wanted = stopped_writer(kind, path)
    os.kill(pid, signal.SIGKILL)
    assert outcome(pid, pipe)[0] == signal.SIGKILL
    with pytest.raises(RecoveryError, match="open it for writing once"):
        leanreplay.open(path)
    with leanreplay.open(path, mode="r+") as buffer:
        assert contents(buffer) == wanted


def test_merge_waits(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.02)
    path = str(tmp_path / "b.h5")
    pid, pipe, wanted = stopped_writer("reservoir", path)
    later = threading.Timer(0.4, os.kill, (pid, signal.SIGCONT))
    later.start()
    with merge([path]) as merged:
        assert merged.seen == wanted[0]
    later.join()
    assert result(pid, pipe) == 30


def test_who_has_a_writer(tmp_path: Any) -> None:
    """Only another process counts: nobody is to wait for himself."""
    path = str(tmp_path / "b.h5")
    with make("reservoir", path) as buffer:
        buffer.add(batch(0, 9))
        assert not locks.has_writer(path)
        assert result(*child(lambda _: locks.has_writer(path)))
        assert not locks.has_writer(str(tmp_path / "other"))
    assert not result(*child(lambda _: locks.has_writer(path)))
