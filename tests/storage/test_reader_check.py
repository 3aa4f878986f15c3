"""check() of a reader: one state of the file is audited, whatever a writer does beside it; and what readers need of memory."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import child, result
from storage_kernels import kernel

import leanreplay
from leanreplay import ClassBalancedBuffer, InfiniteBuffer, ReservoirBuffer
from leanreplay.storage import audit, locks, store
from leanreplay.storage import writer as writer_module

SIZE = 300
KINDS = {
    "reservoir": lambda where: ReservoirBuffer(SIZE, where),
    "balanced": lambda where: ClassBalancedBuffer(SIZE, where),
    "infinite": lambda where: InfiniteBuffer(where, rows_per_part=100),
}


def feed(buffer: Any, n: int, start: int = 0) -> None:
    p = np.arange(start, start + n)
    buffer.add((np.repeat(p[:, None] % 256, 50, 1).astype(np.uint8), p), group=p % 7 + p // 5000)


@pytest.mark.parametrize("kind", KINDS)
def test_beside_a_busy_writer(kind: str, tmp_path: Path) -> None:
    """Nothing is reported that is not there."""
    path = tmp_path / "b"
    with KINDS[kind](path) as writer:
        feed(writer, SIZE)
        ready, tell = os.pipe()

        def read(_: int) -> Any:
            locks.PATIENCE = 0.05
            os.write(tell, b"!")
            with leanreplay.open(path) as reader:
                return [str(problem) for _ in range(25) for problem in reader.check()]

        reader = child(read)
        os.read(ready, 1)
        state = writer.state_dict()
        while os.waitid(os.P_PID, reader[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            feed(writer, 20, writer.seen)
            if writer.seen > 5000:
                writer.load_state_dict(state)
        assert result(*reader) == []
        assert writer.check() == []
        os.close(ready)
        os.close(tell)


@pytest.mark.parametrize("what", ["row", "index", "position", "late"])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found_by_writers_and_readers(kind: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "b"
    with KINDS[kind](path) as writer:
        feed(writer, 90)
        part = writer.current.store.stores[0] if kind == "infinite" else writer.current.store
        if what == "row":
            part.mapping.mem[part.layout.columns[0][0] + 5 * part.layout.columns[0][1]] ^= 1
        elif what == "index":
            part.mapping.mem[part.layout.columns[-1][0] + 16 * 5] ^= 1
        else:
            part.mapping.positions[5] = part.mapping.positions[6] if what == "position" else 10**6
        with leanreplay.open(path) as reader:
            for buffer in (writer, reader):
                named = {p.what.replace("part 0: ", "").split(" ")[0]: p.rows for p in buffer.check()}
                assert 5 in named["bytes"]
                if what == "position":
                    assert set(named["positions"]) == {5, 6}
                if what == "late":
                    assert named["positions"] == (5,)


def test_damage_beside_a_writer_that_never_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong row is found all the same; it takes one moment in which no commit changes that one."""
    monkeypatch.setattr(locks, "PATIENCE", 0.02)
    with ReservoirBuffer(SIZE, tmp_path / "b") as writer, ReservoirBuffer(SIZE) as twin:
        feed(writer, SIZE)
        feed(twin, SIZE)
        with leanreplay.open(tmp_path / "b") as reader:
            changes = itertools.count(SIZE, 3)
            verify = kernel.verify_rows

            def busy(*arguments: Any) -> None:
                verify(*arguments)
                feed(writer, 3, next(changes))

            monkeypatch.setattr(kernel, "verify_rows", busy)
            scan = kernel.scan_index

            def busy_too(*arguments: Any) -> Any:
                found = scan(*arguments)
                feed(writer, 3, next(changes))
                return found

            monkeypatch.setattr(kernel, "scan_index", busy_too)
            assert reader.check() == []
            positions = writer.current.store.mapping.positions
            for _ in range(20):
                row = int(np.argmax(positions < SIZE))
                held = int(positions[row])
                writer.current.store.mapping.mem[writer.current.store.layout.columns[0][0] + row * 50] ^= 1
                problems = reader.check()
                if positions[row] == held:  # else one of the commits gave the row to another sample, and it is right again
                    break
            assert positions[row] == held
            assert [p.what for p in problems] == ["bytes do not match their checksums"]
            assert problems[0].rows == (row,)


def test_a_commit_that_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.02)
    monkeypatch.setattr(writer_module, "ONE_CALL", False)
    path = tmp_path / "b"
    with ReservoirBuffer(SIZE, path) as writer:
        feed(writer, SIZE)

    def cut(_: int) -> None:
        kernel.write_index = lambda *_: os._exit(0)
        with ReservoirBuffer(SIZE, path, mode="r+") as writer:
            feed(writer, 200, SIZE)

    result(*child(cut))
    with leanreplay.open(path) as reader:
        problems = reader.check()
        assert "cut off" in problems[0].what
        assert problems[0].rows
    with ReservoirBuffer(SIZE, path, mode="r+") as writer:
        assert writer.check() == []
        with leanreplay.open(path) as reader:
            assert reader.check() == []


# -- memory --------------------------------------------------------------------------------------------------------------


def private() -> int:
    """Bytes of private memory now."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))


class Peak:
    """The largest arrays that the library makes, whatever the allocator does with what was freed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = 0
        for name in ("empty", "full", "array", "concatenate", "flatnonzero", "arange", "zeros", "unique", "isin"):
            monkeypatch.setattr(store.np, name, self.watched(getattr(np, name)))

    def watched(self, make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*arguments: Any, **options: Any) -> Any:
            found = make(*arguments, **options)
            self.rows = max(self.rows, max(np.size(v) for v in (found if type(found) is tuple else (found,))))
            return found

        return made


@pytest.mark.parametrize("read", ["sample", "check", "group_sizes"])
def test_nothing_is_as_long_as_the_index(read: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers need memory of bounded size, where rows are free, too."""
    rows = 40_000
    with ClassBalancedBuffer(rows, tmp_path / "b") as writer:
        for group in range(3):
            writer.add(np.zeros(rows if group < 2 else 3, np.uint8), group=np.full(rows if group < 2 else 3, group))
        with leanreplay.open(tmp_path / "b") as reader:
            work = {
                "sample": lambda b: b.sample(64)[1]["idx"].shape,
                "check": lambda b: b.check(),
                "group_sizes": lambda b: b.group_sizes(),
            }[read]
            wanted = work(writer)
            monkeypatch.setattr(audit, "PIECE", 1000)
            monkeypatch.setattr(audit, "SORTED", 3000)
            with monkeypatch.context() as watched:
                peak = Peak(watched)
                assert work(reader) == wanted
            assert 0 < peak.rows < rows // 3
            if read == "check":
                reader_of_damaged = writer.current.store
                reader_of_damaged.mapping.positions[[7, 11_111, 13_000]] = reader_of_damaged.mapping.positions[5]
                twice = {p.what: p.rows for p in reader.check()}["positions held twice"]
                assert twice == (5, 7, 11_111, 13_000)


def test_a_draw_beside_free_rows_is_that_of_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a commit under way has freed already is live for a reader, and what it has taken is not."""
    monkeypatch.setattr(writer_module, "ONE_CALL", False)

    def made(where: Path | None) -> Any:
        buffer = ClassBalancedBuffer(90, where, seed=1)
        for group in range(2):
            buffer.add(np.full(90, group, np.uint8), group=np.full(90, group))
        buffer.add(np.zeros(3, np.uint8), group=np.full(3, 7))
        return buffer

    with made(tmp_path / "b") as writer, made(None) as twin, leanreplay.open(tmp_path / "b") as reader:
        assert writer.current.store.size < writer.current.store.high
        wanted = [twin.sample(8)[1]["idx"].tolist() for _ in range(3)], twin.group_sizes(), twin.current.store.live_rows().tolist()
        found = []

        def during(name: str) -> None:
            step = getattr(kernel, name)

            def look(*arguments: Any) -> Any:
                reader.draws.begin(0, 0)
                reader.current.store.gaps = reader._sizes_by_group = None
                drawn = [reader.sample(8)[1]["idx"].tolist() for _ in range(3)]
                found.append((drawn, reader.group_sizes(), reader.current.store.live_rows().tolist()))
                return step(*arguments)

            monkeypatch.setattr(kernel, name, look)

        for name in ("save_rows", "write_field", "write_index"):
            during(name)
        start = time.monotonic()
        writer.add(np.zeros(30, np.uint8), group=np.repeat([8, 7, 0], 10))
        assert len(found) >= 3
        assert all(f == wanted for f in found), time.monotonic() - start
