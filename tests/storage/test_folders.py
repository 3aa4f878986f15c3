"""Folders of parts, copies, links: what stands beside or instead of a buffer's files never passes for the buffer."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from storage_kernels import kernel

import leanreplay
from leanreplay import (
    ArgumentError,
    CorruptionError,
    FormatError,
    InfiniteBuffer,
    LockedError,
    ModeError,
    RecoveryError,
    ReservoirBuffer,
    StateError,
)
from leanreplay.buffers import (
    infinite,
)
from leanreplay.storage import parts as storage_parts
from leanreplay.storage.layout import H_HIGH, H_SEEN, H_SIZE, HEADER_WORDS, HEADERS, PAGE


def values(buffer: leanreplay.DataBuffer) -> list[float]:
    return buffer.get(np.arange(len(buffer)))[0].tolist()


def parts(path: Path, n: int, start: int = 0, rows: int = 4, **options: int) -> InfiniteBuffer:
    buffer = InfiniteBuffer(path, rows_per_part=rows, **options)
    buffer.add(np.arange(start, start + n, dtype=float))
    return buffer


def test_readers_follow_a_rollback(tmp_path: Path) -> None:
    """G3: a reader never goes on showing parts that a rollback removed."""
    with parts(tmp_path / "b", 3) as buffer:
        state = buffer.state_dict()
        buffer.add(np.arange(3.0, 10.0))
        reader = leanreplay.open(tmp_path / "b")
        assert values(reader) == list(range(10))
        buffer.load_state_dict(state)
        assert values(reader) == [0, 1, 2]
        buffer.add(np.arange(103.0, 112.0))
        assert values(reader) == values(buffer) == [0, 1, 2, *range(103, 112)]
        buffer.save(tmp_path / "copy")
        buffer.add(np.arange(5.0))
        assert len(reader) == 17
        buffer.load(tmp_path / "copy")
        assert values(reader) == values(buffer)
        reader.close()


def test_a_rollback_that_cannot_be_changes_nothing(tmp_path: Path) -> None:
    """A damaged restore point of one part is found before another part is touched."""
    buffer = parts(tmp_path / "b", 6, rows=4)
    state = buffer.state_dict()
    buffer.add(np.arange(6.0, 20.0))
    buffer.close()
    undo = next(iter((tmp_path / "b").glob("part-000001.h5.undo.*")))
    damaged = bytearray(undo.read_bytes())
    damaged[3 * PAGE + 60] ^= 1  # in the first frame
    undo.write_bytes(damaged)
    with leanreplay.open(tmp_path / "b", mode="r+") as buffer:
        with pytest.raises(StateError, match=r"checksum|damaged|outside"):
            buffer.load_state_dict(state)
        assert values(buffer) == list(range(20)) and buffer.check() == []


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_wrong_parts_are_refused(tmp_path: Path, mode: str) -> None:
    """G7: a missing part, swapped parts, a part twice, and a part of another buffer."""
    parts(tmp_path / "b", 14).close()
    parts(tmp_path / "other", 14, seed=1).close()
    part = storage_parts.part_path

    def broken(name: str) -> str:
        return str(shutil.copytree(tmp_path / "b", tmp_path / f"{name}{mode[-1]}"))

    missing, swapped, twice, foreign = map(broken, ("missing", "swapped", "twice", "foreign"))
    os.unlink(part(missing, 1))
    os.rename(part(swapped, 1), part(swapped, 9))
    os.rename(part(swapped, 2), part(swapped, 1))
    os.rename(part(swapped, 9), part(swapped, 2))
    shutil.copy(part(twice, 1), part(twice, 2))
    shutil.copy(part(str(tmp_path / "other"), 1), part(foreign, 1))
    for folder, message in ((missing, "missing"), (swapped, "not part 1"), (twice, "not part 2"), (foreign, "of another")):
        with pytest.raises(FormatError, match=message):
            leanreplay.open(folder, mode=mode)
    with leanreplay.open(tmp_path / "b", mode=mode) as whole:
        assert values(whole) == list(range(14))


def test_a_reader_does_not_take_up_a_foreign_part(tmp_path: Path) -> None:
    parts(tmp_path / "b", 4).close()
    parts(tmp_path / "other", 8, seed=1).close()
    with leanreplay.open(tmp_path / "b") as reader:
        assert len(reader) == 4
        shutil.copy(tmp_path / "other" / "part-000001.h5", tmp_path / "b" / "part-000001.h5")
        with pytest.raises(FormatError, match="not part 1"):
            len(reader)


def test_headers_that_promise_rows_of_a_part(tmp_path: Path) -> None:
    """G7: a valid seal does not make counts true."""
    parts(tmp_path / "b", 6).close()
    path = tmp_path / "b" / "part-000001.h5"
    block = np.frombuffer(path.read_bytes(), np.uint8).copy()
    for at in HEADERS:
        words = np.zeros(HEADER_WORDS, np.uint64)
        if kernel.read_block(block, at, words):
            words[H_SEEN] = 10**11
            kernel.seal_block(block, at, words, 4)
    path.write_bytes(block.tobytes())
    with pytest.raises(FormatError, match="header is wrong"):
        leanreplay.open(tmp_path / "b")


def test_a_crafted_restore_point_is_refused(tmp_path: Path) -> None:
    """G7: an undo file whose header counts rows that no file has."""
    buffer = ReservoirBuffer(8, tmp_path / "r.h5")
    buffer.add(np.arange(10.0))
    state = buffer.state_dict()
    buffer.add(np.arange(10.0, 60.0))
    before = values(buffer)
    buffer.close()
    path = tmp_path / "r.h5.undo.0"
    block = np.frombuffer(path.read_bytes(), np.uint8).copy()
    control = np.zeros(3 + HEADER_WORDS, np.uint64)
    assert kernel.read_block(block, 0, control)
    control[2 + H_SIZE] = control[2 + H_HIGH] = 2**40
    kernel.seal_block(block, 0, control, 0)
    path.write_bytes(block.tobytes())
    with leanreplay.open(tmp_path / "r.h5", mode="r+") as buffer:
        with pytest.raises(StateError):
            buffer.load_state_dict(state)
        assert values(buffer) == before and buffer.check() == []


def test_a_damaged_position_is_reported_soon(tmp_path: Path) -> None:
    """G7, never hangs: a reader waits for a commit under way once, not for each of its attempts."""
    with ReservoirBuffer(10, tmp_path / "r.h5") as buffer:
        buffer.add(np.arange(10.0))
        position = buffer.current.store.layout.columns[-3][0]
    with open(tmp_path / "r.h5", "r+b") as file:
        file.seek(position + 7)
        file.write(b"\x80")
    with leanreplay.open(tmp_path / "r.h5") as reader, pytest.raises(CorruptionError, match="free"):
        reader.sample(10)


def test_save_and_load_refuse_the_buffer_itself(tmp_path: Path) -> None:
    with ReservoirBuffer(10, tmp_path / "buffer.h5") as buffer:
        buffer.add(np.arange(5.0))
        with pytest.raises(ArgumentError, match="another folder"):
            buffer.save(tmp_path)
        buffer.save(tmp_path / "copy")
        shutil.copy(tmp_path / "copy" / "state.json", tmp_path)
        with pytest.raises(ArgumentError, match="another folder"):
            buffer.load(tmp_path)
        buffer.add(np.arange(5.0, 300.0))
    assert leanreplay.open(tmp_path / "buffer.h5").seen == 300
    with parts(tmp_path / "b", 20) as folder, pytest.raises(ArgumentError, match="another folder"):
        folder.save(tmp_path / "b")


def test_an_interrupted_save_leaves_the_older_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy is replaced as a whole: never parts of two states of the buffer."""
    with parts(tmp_path / "b", 3) as buffer:
        state = buffer.state_dict()
        buffer.add(np.arange(3.0, 14.0))
        buffer.save(tmp_path / "copy")
        buffer.load_state_dict(state)
        buffer.add(np.arange(103.0, 114.0))
        copies = []

        def cut_off(*args: object, **kwargs: object) -> None:
            if len(copies) == 2:
                raise KeyboardInterrupt
            copies.append(original(*args, **kwargs))

        original = infinite.copy_store
        monkeypatch.setattr(infinite, "copy_store", cut_off)
        with pytest.raises(KeyboardInterrupt):
            buffer.save(tmp_path / "copy")
        monkeypatch.undo()
        with InfiniteBuffer(rows_per_part=4) as other:
            other.load(tmp_path / "copy")
            assert values(other) == list(range(14))
        buffer.save(tmp_path / "copy")
        assert len(list((tmp_path / "copy").iterdir())) == 2  # the cut-off and the older copy are gone
        with InfiniteBuffer(rows_per_part=4) as other:
            other.load(tmp_path / "copy")
            assert values(other) == values(buffer)


@pytest.mark.parametrize("step", range(12))
def test_a_load_cut_off_anywhere_is_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Stopped before its n-th change of a name, `load` has happened or has not; the next writer ends it."""
    monkeypatch.setattr("leanreplay.storage.locks.PATIENCE", 0.02)
    parts(tmp_path / "new", 11, start=100).close()
    with leanreplay.open(tmp_path / "new") as new:
        new.save(tmp_path / "copy")
        loaded = values(new)
    buffer = parts(tmp_path / "b", 18)
    calls = []

    class Cut(BaseException):
        pass

    def counted(function):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            if str(tmp_path / "b") in str(args[0]):
                if len(calls) == step:
                    raise Cut
                calls.append(args)
            return function(*args, **kwargs)

        return call

    for name in ("replace", "unlink", "rename"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    with contextlib.suppress(Cut):
        buffer.load(tmp_path / "copy")
    monkeypatch.undo()
    buffer.current.unlock()  # as a kill would
    buffer.current.store.unguard()
    try:
        with leanreplay.open(tmp_path / "b") as reader:
            assert values(reader) in (list(range(18)), loaded)
    except RecoveryError:
        assert (tmp_path / "b" / ".loading").exists()
    with leanreplay.open(tmp_path / "b", mode="r+") as again:
        assert values(again) in (list(range(18)), loaded) and again.check() == []
        assert not (tmp_path / "b" / ".loading").exists()


def test_one_lock_for_all_names(tmp_path: Path) -> None:
    """A symbolic link is the file that it points to: one writer, and a resize replaces that file, not the link."""
    with ReservoirBuffer(10, tmp_path / "r.h5") as buffer:
        buffer.add(np.arange(5.0))
        os.symlink("r.h5", tmp_path / "link.h5")
        with pytest.raises(LockedError):
            leanreplay.open(tmp_path / "link.h5", mode="r+")
    with leanreplay.open(tmp_path / "link.h5", mode="r+") as buffer:
        buffer.resize(3)
        buffer.add(np.arange(5.0, 9.0))
    assert (tmp_path / "link.h5").is_symlink()
    assert leanreplay.open(tmp_path / "r.h5").seen == 9


@pytest.mark.parametrize("folder", [False, True])
def test_the_empty_state_can_be_loaded_again_and_again(tmp_path: Path, folder: bool) -> None:
    """A checkpoint from before the first batch: every restart goes back to nothing."""

    def start() -> leanreplay.DataBuffer:
        if folder:
            return InfiniteBuffer(tmp_path / "b", rows_per_part=4, mode="a")
        return ReservoirBuffer(5, tmp_path / "b.h5", mode="a")

    buffer = start()
    state = buffer.state_dict()
    for n in (0, 7, 12, 3):
        buffer.close()
        buffer = start()
        buffer.load_state_dict(state)
        assert (buffer.seen, len(buffer)) == (0, 0)
        if n:
            buffer.add(np.arange(n, dtype=float))
        assert buffer.seen == n and buffer.check() == []
    buffer.close()


def test_a_dataset_that_feeds_its_own_reader(tmp_path: Path) -> None:
    """Samples added from within `update` are kept, and the update says that it stopped."""
    buffer = ReservoirBuffer(10, tmp_path / "r.h5")
    buffer.add(np.arange(3.0))

    class Nested:
        def __len__(self) -> int:
            return 5

        def __getitem__(self, i: int) -> np.ndarray:
            buffer.add(np.full(1, 50.0 + i))
            return np.array(float(i))

    with pytest.raises(ModeError, match="dataset changed the buffer"):
        buffer.update(Nested())
    assert buffer.seen == 8 and values(buffer) == [0, 1, 2, 50, 51, 52, 53, 54] and buffer.check() == []
    buffer.close()


def test_targets_that_are_no_labels() -> None:
    """A reservoir does not need labels, so `dataset.targets` may be anything."""

    class MultiLabel(list):  # type: ignore[type-arg]
        targets = np.zeros((20, 4))

    with ReservoirBuffer(5) as buffer:
        buffer.update(MultiLabel(np.arange(20.0)))
        assert buffer.seen == 20


@pytest.mark.parametrize("folder", [False, True])
def test_a_load_that_fails_leaves_what_w_is_to_replace_to_the_first_batch(tmp_path: Path, folder: bool) -> None:
    """Opened with mode="w" a buffer is empty; a copy that does not fit does not make it the old one, to which batches would go."""

    def make(path: Path | None, mode: str, seed: int) -> leanreplay.DataBuffer:
        if folder:
            return InfiniteBuffer(path, rows_per_part=4, mode=mode, seed=seed)
        return ReservoirBuffer(20, path, mode=mode, seed=seed)

    for path, seed in (("old", 0), ("other", 1)):
        with make(tmp_path / path, "x", seed) as made:
            made.add(np.arange(9.0))
            made.save(tmp_path / f"copy of {path}")
    with make(tmp_path / "old", "w", 0) as buffer:
        with pytest.raises(leanreplay.MismatchError):
            buffer.load(tmp_path / "copy of other")
        assert (len(buffer), buffer.seen) == (0, 0)
        buffer.add(np.arange(100.0, 103.0))
        assert values(buffer) == [100, 101, 102] and buffer.check() == []
    with make(tmp_path / "old", "w", 0) as buffer:
        buffer.load(tmp_path / "copy of old")
        assert values(buffer) == list(range(9))


COUNTS = ["", "0", "1", "3", "-1", "02", "2.0", "two", "2" * 40, "9" * 14, " 2", "2\n", "\0", "\u0661"]


@pytest.mark.parametrize("moved", [0, 1])
@pytest.mark.parametrize("count", COUNTS)
def test_a_count_that_the_parts_belie(tmp_path: Path, count: str, moved: int) -> None:
    """How many parts a load has decides which others are removed: a number that cannot be removes nothing, and opens nothing."""
    parts(tmp_path / "copied", 6, start=100).close()
    parts(tmp_path / "b", 18).close()
    fresh = tmp_path / "b" / ".loading"
    fresh.mkdir()
    for number in range(2):
        target = tmp_path / "b" if number < moved else fresh
        shutil.copy(storage_parts.part_path(str(tmp_path / "copied"), number), target)
    (fresh / "count").write_text(count, encoding="utf-8")
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    for mode in ("r+", "a"):
        with pytest.raises(FormatError, match="count says"):
            InfiniteBuffer(tmp_path / "b", mode=mode)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.suffix != ".lock") == [p for p in before if p.suffix != ".lock"]
    (fresh / "count").write_text("2")
    with leanreplay.open(tmp_path / "b", "r+") as buffer:
        assert values(buffer) == [100.0 + i for i in range(6)] and buffer.check() == []


def test_a_count_that_is_no_file(tmp_path: Path) -> None:
    """A pipe under its name is an error, and nobody waits for it."""
    parts(tmp_path / "b", 6).close()
    (tmp_path / "b" / ".loading").mkdir()
    os.mkfifo(tmp_path / "b" / ".loading" / "count")
    with pytest.raises(leanreplay.LeanReplayError, match="count"):
        leanreplay.open(tmp_path / "b", "r+")
