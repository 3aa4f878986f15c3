"""Every system call of every operation fails once: the right error, the state before or after, nothing left, usable afterwards."""

from __future__ import annotations

import builtins
import contextlib
import errno
import itertools
import mmap
import os
import re
import shutil
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from nightly import times

import leanreplay
from leanreplay import ClassBalancedBuffer, InfiniteBuffer, LeanReplayError, ReservoirBuffer, merge

fcntl = pytest.importorskip("fcntl")
pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors")

NUMBERS = (errno.EIO, errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EINTR)
CALLS = [
    (os, "open read pread pwrite write lseek fstat stat lstat ftruncate posix_fallocate fsync fdatasync link replace rename unlink"),
    (os, "memfd_create makedirs mkdir rmdir listdir scandir dup fchmod fchown copy_file_range"),
    (mmap, "mmap"),
    (fcntl, "flock fcntl ioctl"),
    (builtins, "open"),
]


class Faults:
    """Counts the library's system calls; the one at `at` fails with the error `number`. Python's own, numba's and h5py's are left alone."""

    def __init__(self, patched: pytest.MonkeyPatch, kill: bool = False) -> None:
        self.made: list[str] = []
        self.kill = kill  # the process, instead
        self.at, self.number = -1, 0
        self.active = False
        for module, names in CALLS:
            for name in names.split():
                if hasattr(module, name):
                    patched.setattr(module, name, self._failing(f"{module.__name__}.{name}", getattr(module, name)))

    def _failing(self, name: str, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.active and self._ours():
                self.made.append(name)
                if len(self.made) - 1 == self.at and self.kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                if len(self.made) - 1 == self.at:
                    raise OSError(self.number, os.strerror(self.number))
            return real(*arguments, **options)

        return call

    def _ours(self) -> bool:
        frame: Any = sys._getframe(2)
        while frame is not None and frame.f_globals["__name__"] in ("shutil", "glob", "contextlib", "os", "posixpath", "genericpath"):
            frame = frame.f_back
        return frame is not None and frame.f_globals["__name__"].startswith("leanreplay.")

    @contextlib.contextmanager
    def during(self, at: int, number: int) -> Iterator[None]:
        self.made, self.at, self.number, self.active = [], at, number, True
        try:
            yield
        finally:
            self.active = False


def batch(start: int, stop: int) -> tuple[Any, Any]:
    p = np.arange(start, stop)
    return np.repeat(p.astype(np.uint8)[:, None], 50, 1), p % 5


def make(kind: str, path: str | None, **options: Any) -> Any:
    options["restore_points"] = 4
    if kind == "infinite":
        return InfiniteBuffer(path, rows_per_part=16, seed=3, **options)
    return {"reservoir": ReservoirBuffer, "balanced": ClassBalancedBuffer}[kind](20, path, seed=3, **options)


def contents(buffer: Any) -> tuple[Any, ...]:
    """All that a buffer says of itself, and its rows by position."""
    if not len(buffer):
        return (buffer.seen,)
    (x, y), meta = buffer.get(buffer.get_metadata("idx"))
    order = np.argsort(meta["position"])
    rest = {k: v[order].tobytes() for k, v in meta.items() if k != "idx"}
    return buffer.seen, buffer.max_size, x[order].tobytes(), y[order].tobytes(), rest


class Case:
    """One operation on a buffer: `start` makes what it needs, `act` is what fails, `again` ends it after an error."""

    def __init__(self, kind: str, where: str, folder: str, durable: bool) -> None:
        self.kind, self.where, self.durable = kind, where, durable
        self.home = os.path.join(folder, "home")
        self.path = os.path.join(self.home, "b.h5") if where == "file" else None
        self.copy = os.path.join(folder, "copy")
        self.states: list[Any] = []
        self.buffer: Any = None
        os.makedirs(self.home)

    def fed(self, stop: int) -> None:
        self.buffer = make(self.kind, self.path, durable=self.durable)
        self.buffer.add(batch(0, stop), metadata=self.metadata(0, stop))

    @staticmethod
    def metadata(start: int, stop: int) -> Any:
        return {"z": np.arange(start, stop, dtype=np.float32)}

    def end(self) -> None:
        if self.buffer is not None:
            self.buffer.close()


def op_create(case: Case) -> Callable[[], None]:
    schema = leanreplay.Schema.from_sample((np.zeros(50, np.uint8), 0), {"z": np.float32(0)})

    def act() -> None:
        case.buffer = make(case.kind, case.path, schema=schema, durable=case.durable)

    return act


def op_first_add(case: Case) -> Callable[[], None]:
    case.buffer = make(case.kind, case.path, durable=case.durable)
    case.buffer.state_dict()
    return lambda: case.buffer.add(batch(0, 9), metadata=case.metadata(0, 9))


def op_add(case: Case) -> Callable[[], None]:
    case.fed(32)
    return lambda: case.buffer.add(batch(32, 35), metadata=case.metadata(32, 35), at=32)


def op_add_after_a_mark(case: Case) -> Callable[[], None]:
    case.fed(32)
    case.states = [case.buffer.state_dict()]
    return lambda: case.buffer.add(batch(32, 35), metadata=case.metadata(32, 35), at=32)


def op_add_after_opening(case: Case) -> Callable[[], None]:
    case.fed(32)
    case.states = [case.buffer.state_dict()]
    if case.path is not None:
        case.buffer.close()
        case.buffer = leanreplay.open(case.path, mode="r+", durable=case.durable)
    return lambda: case.buffer.add(batch(32, 35), metadata=case.metadata(32, 35), at=32)


def op_mark(case: Case) -> Callable[[], None]:
    case.fed(20)
    for stop in (25, 30):
        case.states.append(case.buffer.state_dict())
        case.buffer.add(batch(stop - 5, stop), metadata=case.metadata(stop - 5, stop))
    return lambda: case.states.append(case.buffer.state_dict())


def op_rollback(case: Case) -> Callable[[], None]:
    case.fed(15)
    state = case.buffer.state_dict()
    for start in (15, 25):
        case.buffer.add(batch(start, start + 10), metadata=case.metadata(start, start + 10))
        case.buffer.state_dict()
    case.buffer.sample(3)
    return lambda: case.buffer.load_state_dict(state)


def op_flush(case: Case) -> Callable[[], None]:
    case.fed(30)
    case.states = [case.buffer.state_dict()]
    return lambda: case.buffer.flush()


def op_resize(case: Case) -> Callable[[], None]:
    case.fed(30)
    case.buffer.state_dict()
    return lambda: case.buffer.resize(12)


def op_new_field(case: Case) -> Callable[[], None]:
    case.fed(30)
    case.buffer.state_dict()
    return lambda: case.buffer.set_metadata("new", np.arange(len(case.buffer)))


def op_set_metadata(case: Case) -> Callable[[], None]:
    case.fed(14)
    case.states = [case.buffer.state_dict()]
    return lambda: case.buffer.set_metadata("z", np.arange(14, dtype=np.float32) * 2)


def op_save(case: Case) -> Callable[[], None]:
    case.fed(30)
    case.states = [case.buffer.state_dict()]
    return lambda: case.buffer.save(case.copy)


def op_load(case: Case) -> Callable[[], None]:
    case.fed(30)
    case.buffer.sample(2)
    case.buffer.save(case.copy)
    case.buffer.add(batch(30, 40), metadata=case.metadata(30, 40))
    case.buffer.state_dict()
    return lambda: case.buffer.load(case.copy)


def op_open(case: Case) -> Callable[[], None]:
    case.fed(30)
    case.states = [case.buffer.state_dict()]
    case.buffer.add(batch(30, 33), metadata=case.metadata(30, 33))
    case.buffer.close()
    case.buffer = None

    def act() -> None:
        case.buffer = leanreplay.open(str(case.path), mode="r+", durable=case.durable)

    return act


def op_read(case: Case) -> Callable[[], None]:
    case.fed(30)
    case.buffer.close()
    case.buffer = None

    def act() -> None:
        with leanreplay.open(str(case.path)) as reader:
            reader.sample(5)
            assert reader.check() == []

    return act


def op_merge(case: Case) -> Callable[[], None]:
    parts = []
    for number in range(2):
        part = os.path.join(case.home, f"part{number}.h5")
        with ReservoirBuffer(20, part, seed=3, stream=number) as buffer:
            buffer.add(batch(0, 30), metadata=case.metadata(0, 30))
        parts.append(part)

    def act() -> None:
        case.buffer = merge(parts, case.path)

    return act


EVERY = [op_create, op_first_add, op_add, op_add_after_a_mark, op_mark, op_rollback, op_flush, op_set_metadata]
EVERY += [op_save, op_load]
CASES = [(op, "reservoir", where) for op in [*EVERY, op_resize, op_new_field] for where in ("file", "memory")]
CASES += [(op, "infinite", where) for op in EVERY for where in ("file", "memory")]
CASES += [(op, "balanced", "file") for op in (op_add_after_a_mark, op_rollback, op_resize)]
CASES += [(op, "reservoir", "file") for op in (op_add_after_opening, op_open, op_read, op_merge)]
CASES += [(op, "infinite", "file") for op in (op_add_after_opening, op_open, op_read)]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def temporaries(folder: str) -> list[str]:
    return [os.path.join(f, n) for f, folders, names in os.walk(folder) for n in [*folders, *names] if n.endswith(".tmp")]


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize(("op", "kind", "where"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_each_call_fails(op: Any, kind: str, where: str, durable: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = Faults(monkeypatch)
    numbers = itertools.cycle(NUMBERS)
    before, calls = descriptors(), 0
    wanted: Any = None
    which = [-1]  # first none; then each that was counted, or some of them
    for at in which:
        number = next(numbers)
        folder = str(tmp_path / f"run{at}")
        case = Case(kind, where, folder, durable)
        act = op(case)
        old = None if case.buffer is None else contents(case.buffer)
        failed, found = "", number
        with faults.during(at, number):
            try:
                act()
            except LeanReplayError as error:  # not kept: its traceback holds descriptors
                failed, found = repr(error), getattr(error, "errno", 0)
        if at < 0:
            calls, wanted = len(faults.made), None if case.buffer is None else contents(case.buffer)
            tries = times(3, calls)
            first = zlib.crc32(f"{op.__name__} {kind} {where} {durable}".encode())
            which += sorted({(first + i * calls // tries) % calls for i in range(min(tries, calls))})
            assert not failed
        call = faults.made[at] if at >= 0 else ""
        note = f"call {at} of {calls}: {call}, {errno.errorcode[number]}: {failed}"
        if failed:
            assert found == number or "stat" in call, note  # os.path.exists and the like take any error for a no
            assert re.search(";|copy", failed), note
        if "unlink" not in call and "rmdir" not in call:
            assert temporaries(folder) == [], note
        if case.buffer is not None:
            now = contents(case.buffer)
            if not failed:
                assert now == wanted, note
            elif op is op_rollback or (op is op_load and kind == "infinite"):  # begun, the next call ends it
                assert now in (old, wanted) or kind == "infinite", note  # whose parts go back one after the other
            else:
                assert now == old, note
        if failed:  # and it can be done now
            act()
            assert temporaries(folder) == [], note
            if case.buffer is not None:
                assert contents(case.buffer) == wanted, note
        if case.buffer is not None:
            use(case, note)
        case.end()
        del case, act
        assert descriptors() == before, note
        shutil.rmtree(folder)


def use(case: Case, note: str) -> None:
    """The buffer is sound, goes on, goes back to its states, and opens again."""
    buffer = case.buffer
    assert buffer.check() == [], note
    seen = buffer.seen
    metadata = {k: np.resize(buffer.get_metadata(k)[:1], 7) for k in buffer.schema.metadata_names} if len(buffer) else case.metadata(0, 7)
    buffer.add(batch(seen, seen + 7), metadata=metadata)
    assert buffer.seen == seen + 7, note
    for state in reversed(case.states[-2:]):
        buffer.load_state_dict(state)
        assert buffer.check() == [], note
        assert buffer.seen == state["seen"], note
    if case.path is not None:
        last = contents(buffer)
        buffer.close()
        case.buffer = leanreplay.open(case.path, mode="r+")
        assert case.buffer.check() == [], note
        assert contents(case.buffer) == last, note
