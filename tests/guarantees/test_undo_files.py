"""G3: files that do not belong together are never taken for a buffer and its restore points."""

from __future__ import annotations

import glob
import os
import shutil
from typing import Any

import pytest
from children import child, killed
from killing import BOUNDED, KINDS, ROWS, assert_prefix, die, expected, feed, finish, image, stream
from storage_kernels import kernel
from stored_files import overwrite

import leanreplay
from leanreplay import (
    FormatError,
    LeanReplayError,
    RecoveryError,
    ReservoirBuffer,
    StateError,
)
from leanreplay.storage.layout import SEAL_WORDS
from leanreplay.storage.state import State

pytestmark = [pytest.mark.usefixtures("kill_kernels"), pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


def undo_files(path: str) -> list[str]:
    return sorted(glob.glob(glob.escape(path) + ".undo.*"))


def assert_exact_or_refused(path: str, kind: str, state: Any, note: str) -> str:
    """Loading a state gives that state, or a StateError with the buffer as it was. Which."""
    with leanreplay.open(path, mode="r+") as buffer:
        assert buffer.check() == [], note
        before, contents = buffer.seen, image(path)
        try:
            buffer.load_state_dict(state)
        except (StateError, RecoveryError) as error:
            assert str(error), note
            assert buffer.seen == before, note
            assert image(path) == contents, note
            assert buffer.check() == [], note
            return "refused"
        assert buffer.seen == state["seen"], note
        assert_prefix(kind, buffer, note)
        return "exact"


@pytest.mark.parametrize("kind", BOUNDED)
def test_backup_beside_a_newer_undo_file(kind: str, tmp_path: Any) -> None:
    """G3: the data file restored from a backup of any age; also one fed differently since. Never a silent wrong rollback."""
    path = str(tmp_path / "b.h5")
    backups = {}
    with KINDS[kind](path) as buffer:
        feed(buffer, 0, 60)
        states = [buffer.state_dict()]
        for n in range(1, 8):
            feed(buffer, buffer.seen, buffer.seen + 15)
            if n == 4:
                states.append(buffer.state_dict())
            backups[n] = str(tmp_path / f"backup{n}.h5")
            shutil.copy(path, backups[n])
    undo_now = {name: str(tmp_path / f"kept{i}") for i, name in enumerate(undo_files(path))}
    assert len(undo_now) == 2
    for name, kept in undo_now.items():
        shutil.copy(name, kept)
    outcomes = []
    for n, backup in backups.items():
        for extra in (0, 5, 15):  # samples of another stream, that the backup was fed since
            for i, state in enumerate(states):
                for name in undo_files(path):
                    os.unlink(name)
                shutil.copy(backup, path)
                if extra:
                    with leanreplay.open(path, mode="r+") as buffer:
                        buffer.add(**stream(10_000, 10_000 + extra))
                for name in undo_files(path):
                    os.unlink(name)
                for name, kept in undo_now.items():
                    shutil.copy(kept, name)
                note = f"{kind}: backup {n}, {extra} others, state {i}"
                if extra:
                    with leanreplay.open(path, mode="r+") as buffer:
                        before, contents = buffer.seen, image(path)
                        try:
                            buffer.load_state_dict(state)
                        except StateError:
                            assert (buffer.seen, image(path)) == (before, contents), note
                            outcomes.append("refused")
                        else:
                            assert image(path) == expected(kind, state["seen"]), note
                            outcomes.append("exact")
                else:
                    outcomes.append(assert_exact_or_refused(path, kind, state, note))
    assert "refused" in outcomes
    assert "exact" in outcomes  # the newest backup is the file itself


@pytest.mark.parametrize("kind", BOUNDED)
def test_moved_away_from_its_undo_file(kind: str, tmp_path: Any) -> None:
    """G3: without its undo file a moved file goes on, and says by how many samples it is ahead."""
    path, elsewhere = str(tmp_path / "b.h5"), str(tmp_path / "moved.h5")
    with KINDS[kind](path) as buffer:
        feed(buffer, 0, 60)
        state = buffer.state_dict()
        feed(buffer, 60, 100)
    os.rename(path, elsewhere)
    with KINDS[kind](elsewhere, mode="r+") as buffer:
        with pytest.raises(StateError, match="ahead of the state by 40 samples"):
            buffer.load_state_dict(state)
        assert_prefix(kind, buffer, "moved")
        finish(buffer, kind, "moved")


def test_moved_in_the_middle_of_a_rollback(tmp_path: Any) -> None:
    """G3: a rollback that was cut off cannot be finished without the undo file: an error, never rows half back."""
    path, elsewhere = str(tmp_path / "b.h5"), str(tmp_path / "moved.h5")
    with ReservoirBuffer(ROWS, path, seed=3) as buffer:
        feed(buffer, 0, 60)
        state = buffer.state_dict()
        feed(buffer, 60, 100)

    def run(_: int) -> None:
        with ReservoirBuffer(path=path, mode="r+") as buffer:
            kernel.restore_rows = lambda *args: die()
            buffer.load_state_dict(state)

    killed(*child(run))
    os.rename(path, elsewhere)
    with pytest.raises(RecoveryError, match="rollback was cut off"):
        ReservoirBuffer(path=elsewhere, mode="r+")
    with pytest.raises(RecoveryError, match="rollback was cut off"):
        ReservoirBuffer(path=elsewhere, mode="r")
    other = str(tmp_path / "other.h5")  # another buffer's undo file does not help, nor does it go
    with ReservoirBuffer(ROWS, other, seed=3) as buffer:
        feed(buffer, 0, 60)
        buffer.state_dict()
        feed(buffer, 60, 100)
    shutil.copy(undo_files(other)[0], elsewhere + ".undo.0")
    with pytest.raises(RecoveryError, match="rollback was cut off"):
        ReservoirBuffer(path=elsewhere, mode="r+")
    os.rename(elsewhere, path)
    with ReservoirBuffer(path=path, mode="r+") as buffer:
        assert buffer.seen == 60
        assert_prefix("reservoir", buffer, "moved back")
        finish(buffer, "reservoir", "moved back")


def test_released_points_free_their_disk_space(tmp_path: Any) -> None:
    """G3: what a point needs of later ones is moved to it, each row once; the files of released ones go."""
    path, states, row = str(tmp_path / "b.h5"), [], 1021 + 8 + 12 + 16 + 24 + 7  # its record, rounded up

    def on_disk() -> int:
        return sum(os.path.getsize(name) for name in undo_files(path))

    with KINDS["window"](path) as buffer:
        for n in range(1, 13):
            feed(buffer, buffer.seen, ROWS * n)  # all rows are others
            states.append(buffer.state_dict())
            if n in (2, 5, 9):
                buffer.keep(states[-1])
        assert len(undo_files(path)) == 3 + 2 + 1  # and the list
        assert 4 * ROWS * row < on_disk() < 4 * ROWS * (row + 100) + 5 * 3 * 4096 + 1000
        before = on_disk()
        buffer.release(states[4])
        assert before - on_disk() > ROWS * row
        buffer.load_state_dict(states[1])
        assert_prefix("window", buffer, "what it needs of the released one")
        buffer.load_state_dict(states[8])
        assert_prefix("window", buffer, "a newer one")
        buffer.release()
        assert len(undo_files(path)) == 2
        with open(path + ".undo.kept", "w") as file:
            file.write("{")
    with leanreplay.open(path, mode="r+") as buffer, pytest.raises(FormatError, match="which restore points are kept"):
        buffer.state_dict()


@pytest.mark.parametrize("kind", BOUNDED)
def test_undo_file_of_another_buffer(kind: str, tmp_path: Any) -> None:
    """G3: an undo file of another buffer, or of a copy that was fed differently, is not used."""
    a, b = str(tmp_path / "a.h5"), str(tmp_path / "b.h5")
    for path in (a, b):
        with KINDS[kind](path) as buffer:
            feed(buffer, 0, 60)
            state = buffer.state_dict()
            feed(buffer, 60, 100)
    with leanreplay.open(a) as buffer, pytest.raises(LeanReplayError):
        buffer.load_state_dict(state)
    shutil.copy(undo_files(a)[0], undo_files(b)[0])
    assert assert_exact_or_refused(b, kind, state, f"{kind}: of another buffer") == "refused"
    # Copies of one file share its uuid.
    twin = str(tmp_path / "twin.h5")
    with leanreplay.open(b, mode="r+") as buffer:
        state = buffer.state_dict()
        shutil.copy(b, twin)
        feed(buffer, 100, 130)
    with leanreplay.open(twin, mode="r+") as buffer:
        twin_state = buffer.state_dict()
        buffer.add(**stream(5000, 5030))
        contents = image(twin)
    assert state["state"] == twin_state["state"]
    shutil.copy(undo_files(b)[-1], undo_files(twin)[-1])
    with leanreplay.open(twin, mode="r+") as buffer:
        try:
            buffer.load_state_dict(state)
        except StateError:
            assert image(twin) == contents
            assert buffer.check() == []
        else:
            assert_prefix(kind, buffer, "twin")


@pytest.mark.parametrize("kind", BOUNDED)
def test_undo_file_of_a_copy_one_commit_apart(kind: str, tmp_path: Any) -> None:
    """G3: copies that differ by a single commit have undo files that lead to the same state, and only digests tell them apart."""
    path, copy = str(tmp_path / "b.h5"), str(tmp_path / "copy.h5")
    with KINDS[kind](path) as buffer:
        feed(buffer, 0, 60)
        state = buffer.state_dict()
        feed(buffer, 60, 75)
    for name in [path, *undo_files(path)]:
        shutil.copy(name, name.replace(path, copy))
    with leanreplay.open(path, mode="r+") as buffer:
        buffer.add(**stream(75, 80))
    with leanreplay.open(copy, mode="r+") as buffer:
        buffer.add(**stream(10_000, 10_030))
    for name in undo_files(path):
        shutil.copy(name, name.replace(path, copy))
    contents = image(copy)
    with leanreplay.open(copy, mode="r+") as buffer:
        with pytest.raises(StateError, match="does not lead back"):
            buffer.load_state_dict(state)
        assert buffer.check() == []
    assert image(copy) == contents


@pytest.mark.parametrize("kind", BOUNDED)
def test_journal_of_a_copy(kind: str, tmp_path: Any) -> None:
    """G3: a journal of the next commit counts only if that was made on top of the state that the file is in."""
    path, copy = str(tmp_path / "b.h5"), str(tmp_path / "copy.h5")
    with KINDS[kind](path) as buffer:
        feed(buffer, 0, 60)
    shutil.copy(path, copy)
    with leanreplay.open(path, mode="r+") as buffer:
        buffer.add(**stream(60, 75))
    with leanreplay.open(copy, mode="r+") as buffer:
        layout = buffer.current.store.layout
        for start in (10_000, 10_015):
            buffer.add(**stream(start, start + 15))
    with open(copy, "rb") as file:
        data = file.read()[: layout.journal_end]
    overwrite(path, layout.journal, data[layout.journal :])
    contents = image(path)
    with leanreplay.open(path, mode="r+") as buffer:
        assert_prefix(kind, buffer, "with the journal of a copy")
    assert image(path) == contents


def test_a_seal_counts_as_a_whole(tmp_path: Any) -> None:
    """G3: a journal whose seal differs in a single bit, of its checksum too, is none: recovery would write nothing back."""
    with ReservoirBuffer(ROWS, tmp_path / "b.h5") as buffer:
        feed(buffer, 0, 60)
        store = buffer.current.store
        before = State(store.state.words.copy())
        feed(buffer, 60, 75)
        seal = store.mapping.mem[store.layout.journal :][: 8 * SEAL_WORDS]
        assert store.journal.pending(before) is not None
        for byte in range(seal.shape[0]):
            seal[byte] ^= 1
            assert store.journal.pending(before) is None, byte
            seal[byte] ^= 1
        assert store.journal.pending(before) is not None
