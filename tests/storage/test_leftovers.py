"""What killed savers and writers leave: a copy is of one moment, and who comes next clears up, but not behind the living."""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
import zlib
from typing import Any

import pytest
from children import child, killed, result
from nightly import times
from test_faults import Faults, batch, contents, make, temporaries

import leanreplay
from leanreplay import ReservoirBuffer
from leanreplay.storage import locks

pytest.importorskip("fcntl")


def look(kind: str, folder: str) -> tuple[Any, list[int]]:
    """A saved copy: its rows, and what is drawn next."""
    with make(kind, None) as buffer:
        buffer.load(folder)
        return contents(buffer), buffer.sample(4)[1]["position"].tolist()


def names(folder: str) -> list[str]:
    return sorted("parts" if n.startswith("parts-") else n for n in os.listdir(folder) if not n.endswith(".lock"))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("kind", ["reservoir", "infinite"])
def test_killed_within_save(kind: str, grown: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any system call, a copy has rows and draws of one moment: of this save, or of the one before. The next save clears up."""
    path, copy, spare = (str(tmp_path / name) for name in ("b.h5", "copy", "spare"))
    with make(kind, path) as buffer:
        buffer.add(batch(0, 30))
        buffer.sample(4)
        buffer.save(copy)
        if grown:
            buffer.add(batch(30, 40))
    shutil.copytree(copy, spare)
    old = look(kind, copy)
    faults = Faults(monkeypatch, kill=True)

    def save(at: int) -> int:
        with leanreplay.open(path, mode="r+") as buffer:
            for _ in range(3):
                buffer.sample(4)
            with faults.during(at, 0):
                buffer.save(copy)
        return len(faults.made)

    calls = result(*child(lambda _: save(-1)))
    new = look(kind, copy)
    assert new[1] != old[1]
    assert (new[0] == old[0]) == (not grown)
    clean = names(copy)
    first, tries, outcomes = zlib.crc32(kind.encode()) + grown, times(8, calls), set()
    for i in range(tries):
        at = (first + i * calls // tries) % calls
        shutil.rmtree(copy)
        shutil.copytree(spare, copy)
        killed(*child(lambda _, at=at: save(at)))
        found = look(kind, copy)
        assert found in (old, new), f"call {at}"
        outcomes.add(found == new)
        left = temporaries(copy)
        assert left == [] or i % 2 or names(copy) == clean, left  # loading has cleared up as well
        assert result(*child(lambda _: save(-1))) > 0
        assert temporaries(copy) == []
        assert names(copy) == clean, f"call {at}"
        assert look(kind, copy) == new
    assert False in outcomes


def test_a_copy_behind_the_living(tmp_path: Any) -> None:
    """What another process that saves there has begun stays; when that is gone, whoever comes next removes what it left."""
    with ReservoirBuffer(9, tmp_path / "b.h5") as buffer:
        buffer.add(batch(0, 9))
        copy = tmp_path / "copy"
        buffer.save(copy)
        begun = copy / f".buffer.h5.saved.{os.getpid()}-0123abcd.tmp"
        stranger = copy / ".buffer.h5.saved.mine.tmp"
        for path in (begun, stranger):
            path.touch()
        with locks.users_of(str(copy)):
            buffer.save(copy)
            assert begun.exists()
        buffer.save(copy)
        assert not begun.exists()
        begun.touch()
        buffer.load(copy)
        assert not begun.exists()
        begun.touch()
        link = tmp_path / "link"
        link.symlink_to(copy)
        buffer.save(link)  # a folder by another name of its user's
        assert not begun.exists()
        begun.touch()
        leanreplay.open(copy / "buffer.h5", mode="r+").close()
        assert not begun.exists()
        assert stranger.exists()


def test_a_folder_without_locks_is_not_waited_for(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a lock that another has is worth waiting for."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waited"))
    with ReservoirBuffer(9, tmp_path / "b.h5", lock=False) as buffer:
        buffer.add(batch(0, 9))
        buffer.save(tmp_path / "copy")
        buffer.load(tmp_path / "copy")


def test_opening_clears_up(tmp_path: Any) -> None:
    """Opened for writing, a buffer removes what killed writers of its file left, and nothing of other files."""
    path, other = tmp_path / "run", tmp_path / "run.h5"
    with ReservoirBuffer(9, path) as buffer:
        buffer.add(batch(0, 9))
    left, alien = tmp_path / ".run.77-0123abcd.tmp", tmp_path / f".{other.name}.77-0123abcd.tmp"
    left.touch()
    alien.touch()
    leanreplay.open(path).close()
    assert left.exists()
    leanreplay.open(path, mode="r+").close()
    assert not left.exists()
    assert alien.exists()
    folder = tmp_path / "parts"
    with make("infinite", str(folder)) as buffer:
        buffer.add(batch(0, 20))
    (folder / ".loading.tmp").mkdir()
    (folder / ".loading.tmp" / "part-000000.h5").touch()
    (folder / ".loading.tmp" / ".part-000001.h5.77-0123abcd.tmp").touch()
    (folder / ".loading.tmp" / "count").touch()
    (folder / ".part-000002.h5.77-0123abcd.tmp").touch()
    os.link(folder / "part-000001.h5", folder / ".part-000001.h5.77-0123abcd.tmp")  # killed between two names of a new part
    leanreplay.open(folder, mode="r+").close()
    assert names(str(folder)) == ["part-000000.h5", "part-000001.h5"]


def test_a_folder_of_ours_with_strange_things_in_it(tmp_path: Any) -> None:
    """Only what is ours is removed from it; where the folder is needed, the error says what is in the way."""
    path, copy = tmp_path / "b", tmp_path / "copy"
    with make("infinite", str(path)) as buffer:
        buffer.add(batch(0, 20))
        buffer.save(copy)
        older = next(copy.glob("parts-*"))
        strange = [path / ".loading.tmp" / "notes", older / "notes", path / ".loading.tmp" / "part-000009.h5"]
        strange[0].parent.mkdir()
        for one in strange[:2]:
            one.write_text("precious")
        strange[2].symlink_to(strange[1])
        with pytest.raises(leanreplay.StorageError, match="move away what stands there"):
            buffer.load(copy)
        buffer.save(copy)
        assert [one.read_text() for one in strange] == ["precious"] * 3
        assert os.listdir(older) == ["notes"]
        assert buffer.seen == 20 and buffer.check() == []
    leanreplay.open(path, mode="r+").close()
    assert strange[0].exists()


@pytest.mark.parametrize("mode", ["x", "a", "w", "r+", "r"])
def test_a_folder_over_a_file(mode: str, tmp_path: Any) -> None:
    path = tmp_path / "b"
    path.write_text("precious")
    with pytest.raises(leanreplay.FormatError, match="is a file; an InfiniteBuffer is a folder"):
        leanreplay.InfiniteBuffer(path, mode=mode)
    assert path.read_text() == "precious" and os.listdir(tmp_path) == ["b"]


def test_a_damaged_state_keeps_its_parts(tmp_path: Any) -> None:
    """A state.json that cannot be read may name the parts that are there: they stay until a whole copy replaces them."""
    with make("infinite", str(tmp_path / "b.h5")) as buffer:
        buffer.add(batch(0, 20))
        buffer.save(tmp_path / "copy")
        text = (tmp_path / "copy" / "state.json").read_text()
        (tmp_path / "copy" / "state.json").write_text(text[:-5])
        with pytest.raises(leanreplay.FormatError, match=r"state\.json"):
            buffer.load(tmp_path / "copy")
        pathlib.Path(tmp_path / "copy" / "state.json").write_text(text)
        buffer.load(tmp_path / "copy")
        assert len(buffer) == 20
