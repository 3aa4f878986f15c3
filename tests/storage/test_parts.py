"""The parts of an InfiniteBuffer: descriptors, replacement by mode "w", what else may stand in the folder, gaps."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import child, result

import leanreplay
from leanreplay import (
    CorruptionError,
    FormatError,
    InfiniteBuffer,
    LeanReplayError,
    ReservoirBuffer,
    RowError,
    Schema,
    SchemaError,
    StorageError,
)
from leanreplay.buffers import (
    infinite,
)
from leanreplay.storage import parts as storage_parts
from leanreplay.storage import (
    system,
)

pytestmark = pytest.mark.usefixtures("kernels")
needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")


def parts(path: Path | None, n: int, start: int = 0, rows: int = 4, **options: Any) -> InfiniteBuffer:
    buffer = InfiniteBuffer(path, rows_per_part=rows, **options)
    buffer.add(np.arange(start, start + n, dtype=float), metadata={"z": np.zeros(n)})
    return buffer


def values(buffer: leanreplay.DataBuffer) -> list[float]:
    return buffer.get(np.arange(len(buffer)))[0].tolist()


def listing(folder: Path) -> dict[str, Any]:
    """Everything in a folder: what it is, where it leads, what it holds."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
    return found


# -- descriptors -----------------------------------------------------------------------------------------------------------


def few_descriptors(work: Callable[[], Any], spare: int = 12) -> Any:
    """What `work` returns in a child that may open so many descriptors beside those that it has."""

    def limited(_: int) -> Any:
        import resource

        here = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (here + spare, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        return work()

    return result(*child(limited))


@needs_proc
@pytest.mark.parametrize("durable", [False, True])
def test_many_parts_need_few_descriptors(tmp_path: Path, durable: bool) -> None:
    """Making, marking, rolling back, changing metadata, reading, checking, saving, loading, reopening: 80 parts, 12 descriptors."""

    def work() -> list[Any]:
        with parts(tmp_path / "b", 318, durable=durable) as buffer:
            before = buffer.state_dict()
            buffer.set_metadata("z", np.arange(318.0))
            middle = buffer.state_dict()
            buffer.add(np.arange(318.0, 330.0), metadata={"z": np.zeros(12)})
            buffer.flush()
            buffer.load_state_dict(middle)
            found = [values(buffer) == list(range(318)), buffer.get_metadata("z").tolist() == list(range(318)), buffer.check()]
            buffer.save(tmp_path / "copy")
            reader = leanreplay.open(tmp_path / "b")
            found += [len(reader.sample(100)[0]), reader.check()]
            buffer.load_state_dict(before)
            found += [buffer.get_metadata("z").any(), reader.get_metadata("z").any()]
            reader.close()
            buffer.load(tmp_path / "copy")
            found += [buffer.get_metadata("z").tolist() == list(range(318)), buffer.check()]
        with leanreplay.open(tmp_path / "b", mode="r+") as buffer:
            buffer.add(np.arange(318.0, 330.0), metadata={"z": np.zeros(12)})
            found += [values(buffer) == list(range(330)), buffer.check()]
        return [bool(f) if isinstance(f, np.bool_) else f for f in found]

    assert few_descriptors(work) == [True, True, [], 100, [], False, False, True, [], True, []]


@needs_proc
def test_many_parts_in_memory_need_few_descriptors(tmp_path: Path) -> None:
    """In RAM neither parts nor their restore points have one."""

    def work() -> list[Any]:
        before = len(os.listdir("/proc/self/fd"))
        with parts(None, 318) as buffer:
            state = buffer.state_dict()
            buffer.set_metadata("z", np.ones(318))
            buffer.add(np.arange(318.0, 400.0), metadata={"z": np.zeros(82)})
            found = [len(os.listdir("/proc/self/fd")) - before]
            buffer.load_state_dict(state)
            found += [values(buffer) == list(range(318)) and not buffer.get_metadata("z").any(), buffer.check()]
            buffer.save(tmp_path / "copy")
            buffer.load(tmp_path / "copy")
            buffer.add(np.arange(318.0, 330.0), metadata={"z": np.zeros(12)})
            return [*found, values(buffer) == list(range(330)), buffer.check()]

    opened, *found = few_descriptors(work)
    assert (opened, *found) == (0, True, [], True, [])


@needs_proc
@pytest.mark.parametrize("over", [True, False])
def test_maps_need_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over: bool) -> None:
    """A map sees what is written to the file and the other way, after the descriptor is closed; also the plain one, the fallback."""
    if not over:
        monkeypatch.setattr(system, "_map_over", lambda *_: (_ for _ in ()).throw(OSError(12, "no memory")))
    path = tmp_path / "file"
    path.write_bytes(bytes(10_000))
    before = len(os.listdir("/proc/self/fd"))
    maps = []
    for writable in (True, False):
        fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        maps.append(system.map_file(fd, 10_000, writable, str(path)))
        os.close(fd)
    if over:
        assert len(os.listdir("/proc/self/fd")) == before
    first, second = maps
    first[9_990:9_993] = b"abc"
    assert second[9_988:9_995] == b"\0\0abc\0\0"
    assert path.read_bytes()[9_990:9_993] == b"abc"
    with pytest.raises(TypeError):
        second[0] = 1
    for one in maps:
        one.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_part_that_was_replaced_is_not_written_to(tmp_path: Path) -> None:
    """Where a descriptor is asked for again, another file under the name is told apart."""
    with parts(tmp_path / "b", 10) as buffer:
        part = tmp_path / "b" / "part-000000.h5"
        part.rename(tmp_path / "kept")
        with pytest.raises(LeanReplayError, match="put it back"):
            buffer.flush()
        shutil.copy(tmp_path / "kept", part)
        with pytest.raises(LeanReplayError, match="put it back"):
            buffer.flush()
        part.unlink()
        (tmp_path / "kept").rename(part)
        buffer.flush()
        assert values(buffer) == list(range(10))


# -- mode "w" --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marked", [False, True])
def test_w_waits_for_the_first_batch(tmp_path: Path, marked: bool) -> None:
    """The old parts stay, for readers too, until the first batch; then they are gone, with their restore points."""
    with parts(tmp_path / "b", 14) as old:
        old.state_dict()
    before = listing(tmp_path / "b")
    InfiniteBuffer(tmp_path / "b", mode="w", rows_per_part=3, seed=5).close()
    assert listing(tmp_path / "b") == before
    with InfiniteBuffer(tmp_path / "b", mode="w", rows_per_part=3, seed=5) as buffer, leanreplay.open(tmp_path / "b") as reader:
        state = buffer.state_dict() if marked else None
        assert (len(buffer), buffer.seen, values(reader)) == (0, 0, list(range(14)))
        with pytest.raises(SchemaError):
            buffer.add((np.zeros(3), np.zeros(2)))  # refused: nothing happens
        assert len(reader) == 14
        buffer.add(np.arange(100.0, 105.0))
        assert values(buffer) == list(range(100, 105)) and buffer.check() == []
        assert len(list((tmp_path / "b").glob("part-*.h5"))) == 2
        if state:
            buffer.load_state_dict(state)
            assert len(buffer) == 0
            buffer.add(np.arange(100.0, 105.0))
    with leanreplay.open(tmp_path / "b") as reader:
        assert (values(reader), reader.seed) == (list(range(100, 105)), 5)


def test_w_with_a_schema_goes_at_once(tmp_path: Path) -> None:
    parts(tmp_path / "b", 14).close()
    with InfiniteBuffer(tmp_path / "b", mode="w", schema=Schema.from_sample(1.0)):
        assert [p.name for p in sorted((tmp_path / "b").glob("part*"))] == ["part-000000.h5", "parts.lock"]
    with leanreplay.open(tmp_path / "b") as reader:
        assert len(reader) == 0


@pytest.mark.parametrize("call", range(6))
def test_w_cut_off_anywhere_is_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """G3: an exception at any rename or removal within the first `add` leaves the old buffer or the new one."""
    with parts(tmp_path / "b", 14) as old:
        old.state_dict()
    calls = 0

    def failing(inner: Any) -> Any:
        def function(*a: Any, **k: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call + 1:
                raise KeyboardInterrupt
            return inner(*a, **k)

        return function

    buffer = InfiniteBuffer(tmp_path / "b", mode="w", rows_per_part=4)
    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "unlink"):
            patch.setattr(os, name, failing(getattr(os, name)))
        with pytest.raises(KeyboardInterrupt):
            buffer.add(np.arange(100.0, 103.0))
    buffer.close()
    with leanreplay.open(tmp_path / "b", mode="r+") as buffer:
        assert values(buffer) in (list(range(14)), []) and buffer.check() == []
    with InfiniteBuffer(tmp_path / "b", mode="w", rows_per_part=4) as buffer:
        buffer.add(np.arange(100.0, 103.0))
        assert values(buffer) == [100, 101, 102] and buffer.check() == []


# -- what is not a part of this buffer -------------------------------------------------------------------------------------


def link(folder: Path, name: str, elsewhere: Path) -> None:
    (folder / name).symlink_to(elsewhere)


ALIENS: dict[str, Callable[[Path, Path], Any]] = {
    "link to a file": lambda folder, other: link(folder, "part-000004.h5", other / "part-000001.h5"),
    "link to nowhere": lambda folder, other: link(folder, "part-000004.h5", other / "none.h5"),
    "link behind a gap": lambda folder, other: link(folder, "part-000007.h5", other / "part-000001.h5"),
    "link instead of a part": lambda folder, other: (
        (folder / "part-000001.h5").rename(other / "moved.h5"),
        link(folder, "part-000001.h5", other / "moved.h5"),
    ),
    "folder": lambda folder, other: shutil.copytree(other, folder / "part-000004.h5"),
    "pipe": lambda folder, other: os.mkfifo(folder / "part-000004.h5"),
    "gap": lambda folder, other: shutil.copy(other / "part-000002.h5", folder / "part-000005.h5"),
    "own part behind a gap": lambda folder, other: shutil.copy(folder / "part-000002.h5", folder / "part-000009.h5"),
    "number of seven digits": lambda folder, other: shutil.copy(other / "part-000002.h5", folder / "part-0000004.h5"),
    "first part missing": lambda folder, other: (folder / "part-000000.h5").unlink(),
    "loading a link": lambda folder, other: link(folder, ".loading", other),
    "loading a file": lambda folder, other: (folder / ".loading").write_bytes(b"notes"),
}


@pytest.mark.parametrize("mode", ["r", "r+", "a", "x", "w"])
@pytest.mark.parametrize("alien", ALIENS)
def test_aliens_are_refused_and_not_touched(tmp_path: Path, alien: str, mode: str) -> None:
    """Links, folders, pipes and numbers that are not the next: one FormatError in every mode, and everything is as it was."""
    parts(tmp_path / "b", 14).close()
    parts(tmp_path / "other", 14, seed=1).close()
    ALIENS[alien](tmp_path / "b", tmp_path / "other")
    pipe = alien == "pipe"
    before = None if pipe else listing(tmp_path)
    with pytest.raises(FormatError, match=r"move|missing"):
        InfiniteBuffer(tmp_path / "b", mode=mode, rows_per_part=None if mode == "w" else 4)
    assert pipe or {n: v for n, v in listing(tmp_path).items() if not n.endswith(".lock")} == {
        n: v for n, v in (before or {}).items() if not n.endswith(".lock")
    }


def test_what_comes_where_the_next_part_goes(tmp_path: Path) -> None:
    """While the buffer is open: the batch that needs the next part is refused as far as it does, and after it is away all goes on."""
    parts(tmp_path / "other", 14, seed=1).close()
    with parts(tmp_path / "b", 3) as buffer, leanreplay.open(tmp_path / "b") as reader:
        for name, make in ALIENS.items():
            if name not in ("link to a file", "link to nowhere", "folder", "pipe"):
                continue
            alien = tmp_path / "b" / "part-000004.h5"
            make(tmp_path / "b", tmp_path / "other")
            here = tmp_path / "b" / f"part-{-(-len(buffer) // 4):06d}.h5"
            alien.rename(here)
            room = -len(buffer) % 4
            start = len(buffer)
            with pytest.raises(FormatError, match="move it away"):
                buffer.add(np.arange(start, start + room + 3.0), metadata={"z": np.zeros(room + 3)})
            assert buffer.seen == len(buffer) == start + room
            with pytest.raises(FormatError):
                len(reader)
            assert any("move it away" in str(p) for p in buffer.check())
            shutil.rmtree(here) if here.is_dir() and not here.is_symlink() else here.unlink()
            buffer.add(np.arange(start + room, start + room + 3.0), metadata={"z": np.zeros(3)})
            assert values(reader) == values(buffer) == list(range(len(buffer)))
        assert buffer.check() == []
    assert listing(tmp_path / "other").keys() == {"parts.lock", *(f"part-00000{i}.h5" for i in range(4))}


# -- gaps --------------------------------------------------------------------------------------------------------------------


def with_gap(tmp_path: Path) -> Path:
    """Part 1 as a power cut may leave it: in its state before the last commit, while part 2 is on the disk."""
    folder = tmp_path / "b"
    with parts(folder, 7) as buffer:
        shutil.copy(folder / "part-000001.h5", tmp_path / "early")
        buffer.add(np.arange(7.0, 11.0), metadata={"z": np.zeros(4)})
    shutil.copy(tmp_path / "early", folder / "part-000001.h5")
    return folder


def test_a_gap_is_refused_for_writing(tmp_path: Path) -> None:
    folder = with_gap(tmp_path)
    for mode in ("r+", "a"):
        with pytest.raises(CorruptionError, match=r"part 1 of .* holds 3 of 4 rows, but there is a part after it"):
            InfiniteBuffer(folder, mode=mode)
    with InfiniteBuffer(folder, mode="w") as buffer:  # whoever gives it up may
        buffer.add(np.arange(3.0))


def test_readers_of_a_gap_say_so(tmp_path: Path) -> None:
    """What is there can be read; the row that is missing is named as what it is, and `check` lists it."""
    with leanreplay.open(with_gap(tmp_path)) as reader:
        assert reader.get([0, 4, 6, 8, 10])[0].tolist() == [0, 4, 6, 8, 10]
        for ask in (lambda: reader.get([7]), lambda: reader.get([0, 7, 9]), lambda: reader[7], lambda: reader.sample(11)):
            with pytest.raises(CorruptionError, match="there is a part after it"):
                ask()
        assert [(p.rows, "there is a part after it" in p.what) for p in reader.check()] == [((7,), True)]
        with pytest.raises(RowError):
            reader.get([11])


def test_metadata_over_two_parts_is_a_commit_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the docstring says: each part changes whole or not at all. With positions, as without."""
    with parts(tmp_path / "b", 8) as buffer:
        commit = leanreplay.storage.writer.Writer.commit
        calls: list[int] = []

        def second_fails(self: Any, *a: Any, **k: Any) -> None:
            calls.append(1)
            if len(calls) == 2:
                raise StorageError(28, "no space")
            commit(self, *a, **k)

        monkeypatch.setattr(leanreplay.storage.writer.Writer, "commit", second_fails)
        with pytest.raises(StorageError):
            buffer.set_metadata("z", np.arange(1.0, 5.0), rows=[2, 3, 4, 5], positions=[2, 3, 4, 5])
        monkeypatch.undo()
        assert buffer.get_metadata("z").tolist() == [0, 0, 1, 2, 0, 0, 0, 0]
        assert buffer.check() == []


def test_check_tells_of_parts_that_are_not_the_buffers(tmp_path: Path) -> None:
    with parts(tmp_path / "b", 10) as buffer:
        shutil.copy(tmp_path / "b" / "part-000000.h5", tmp_path / "b" / "part-000003.h5")
        assert [str(p) for p in buffer.check()] == [f"{tmp_path / 'b'} holds 4 parts, of which 3 are this buffer's"]
        (tmp_path / "b" / "part-000003.h5").rename(tmp_path / "b" / "part-000008.h5")
        assert "part-000008.h5" in str(buffer.check()[0])


def test_other_buffers_are_not_parts(tmp_path: Path) -> None:
    """A file of another kind under the name of a part."""
    parts(tmp_path / "b", 4).close()
    with ReservoirBuffer(4, tmp_path / "b" / "part-000001.h5", seed=0) as other:
        other.add(np.arange(3.0), metadata={"z": np.zeros(3)})
    for mode in ("r", "r+"):
        with pytest.raises(FormatError, match="not part 1"):
            leanreplay.open(tmp_path / "b", mode=mode)
    assert storage_parts.parts_there(str(tmp_path / "b")) == 2


def test_a_reader_opens_while_parts_come_and_go(tmp_path, monkeypatch):
    """Parts that a rollback removes, or an `add` makes, while a reader lists and opens them are no error."""
    with InfiniteBuffer(tmp_path / "b", rows_per_part=4) as writer:
        writer.add(np.arange(6))
        state = writer.state_dict()
        writer.add(np.arange(6, 20))
        real, done = storage_parts.open_part, []

        def open_part(path, number, *arguments, **options):
            if number == 3 and not done:
                done.append(writer.load_state_dict(state))
            return real(path, number, *arguments, **options)

        monkeypatch.setattr(infinite, "open_part", open_part)
        with leanreplay.open(tmp_path / "b") as reader:
            assert done and len(reader) == 6
        listed = os.scandir

        def scandir(folder):
            found = list(listed(folder))
            if len(done) == 1:  # what a listing can give that a new part comes into: the newer one alone
                done.append(None)
                return [e for e in found if e.name != "part-000000.h5"]
            return found

        monkeypatch.setattr(os, "scandir", scandir)
        with leanreplay.open(tmp_path / "b") as reader:
            assert len(done) == 2 and len(reader) == 6


@pytest.mark.skipif(not system.LINUX or sys.version_info >= (3, 13), reason="Python maps the file itself")
@pytest.mark.parametrize("size", [system.HUGE_PAGE, 3 * system.HUGE_PAGE + 4096 * 7, 20 * system.HUGE_PAGE - 4096])
def test_large_maps_begin_at_a_huge_page(size, tmp_path):
    """Only there can the file system's huge pages be mapped as such, without which adding takes three times as long."""
    kept = []
    for number in range(3):
        with open(tmp_path / f"{number}", "w+b") as file:
            file.truncate(size)
            view = system.map_file(file.fileno(), size, True, "a file")
            kept.append(view)
            array = np.frombuffer(view, np.uint8, size)
            array[-1] = 7
            assert array.ctypes.data % system.HUGE_PAGE == 0
            assert file.seek(size - 1) and file.read() == b"\x07"
