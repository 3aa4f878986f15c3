"""Files that belong to a buffer: whose temporaries are whose, their mode and owner, and strangers under their names."""

from __future__ import annotations

import gc
import os
import pathlib
import shutil
import socket
import stat

import numpy as np
import pytest

import leanreplay as lr
from leanreplay.storage import system


def feed(buffer, n=20):
    buffer.add((np.arange(n, dtype=np.float32), np.arange(n)))


def files(folder):
    """All files below a folder, by their names within it; locks too."""
    return {os.path.relpath(os.path.join(at, name), folder): os.path.join(at, name) for at, _, names in os.walk(folder) for name in names}


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.fixture
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


# -- temporaries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mine", "other"), [("run", "run.h5"), ("run.h5", "run.h5.old"), ("a", "a.1-1"), ("[x]", "[x].h5")])
def test_temporaries_of_a_longer_name_stay(mine, other, tmp_path, monkeypatch):
    """A buffer that is made while another one of a longer name is about to appear leaves that one's file alone."""
    link = os.link

    def slow(temp, path):
        monkeypatch.setattr(os, "link", link)
        with lr.ReservoirBuffer(5, tmp_path / mine) as buffer:
            feed(buffer)
        link(temp, path)

    monkeypatch.setattr(os, "link", slow)
    with lr.ReservoirBuffer(5, tmp_path / other) as buffer:
        feed(buffer)
        assert buffer.check() == [] and lr.open(tmp_path / mine).seen == 20


def test_own_temporaries_go(tmp_path):
    """What a killed creator left goes with the next one; what only looks like it stays."""
    fd, left = system.temporary(str(tmp_path / "run.h5"))
    os.close(fd)
    stay = [tmp_path / name for name in (".run.h5.1-0123456.tmp", ".run.h5.x-01234567.tmp", ".run.h5.h5.1-01234567.tmp")]
    for name in stay:
        name.write_bytes(b"mine")
    os.symlink("nowhere", tmp_path / ".run.h5.1-01234567.tmp")
    os.mkdir(tmp_path / ".run.h5.2-01234567.tmp")
    with lr.ReservoirBuffer(5, tmp_path / "run.h5") as buffer:
        feed(buffer)
    assert not os.path.exists(left) and all(name.exists() for name in stay)
    assert os.path.islink(tmp_path / ".run.h5.1-01234567.tmp") and os.path.isdir(tmp_path / ".run.h5.2-01234567.tmp")


# -- modes and owners ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o640])
def test_mode_lasts(mode, tmp_path, usual_umask):
    """Undo files, the file after resize, a new field, load and mode "w", and saved copies have the mode of the buffer's file."""
    path, copy = tmp_path / "a.h5", tmp_path / "copy"
    with lr.ReservoirBuffer(10, path) as buffer:
        feed(buffer)
        assert mode_of(path) == 0o644
        os.chmod(path, mode)
        buffer.state_dict()
        feed(buffer)
        assert mode_of(f"{path}.undo.0") == mode
        buffer.resize(8)
        assert mode_of(path) == mode
        buffer.set_metadata("new", np.zeros(8))
        assert mode_of(path) == mode
        for _ in range(2):  # over a copy too, which others could read
            buffer.save(copy)
            assert {mode_of(found) for found in files(copy).values()} == {mode}
            for found in files(copy).values():
                os.chmod(found, 0o644)
        buffer.load(copy)
        assert mode_of(path) == mode
        with lr.ReservoirBuffer(8, tmp_path / "fresh.h5", seed=0, mode="a") as fresh:
            os.chmod(copy / "buffer.h5", mode)
            fresh.load(copy)
        assert mode_of(tmp_path / "fresh.h5") == mode
    with lr.ReservoirBuffer(10, path, mode="w") as buffer:
        feed(buffer)
        assert mode_of(path) == mode
    lr.ReservoirBuffer(10, path, mode="w", schema=lr.Schema.from_sample((np.float32(0), 0))).close()
    assert mode_of(path) == mode


def test_mode_lasts_when_the_log_grows(tmp_path, usual_umask):
    with lr.ClassBalancedBuffer(10, tmp_path / "a.h5") as buffer:
        feed(buffer, 10)
        os.chmod(tmp_path / "a.h5", 0o600)
        before = os.stat(tmp_path / "a.h5").st_ino
        feed(buffer, 5000)
        assert os.stat(tmp_path / "a.h5").st_ino != before and mode_of(tmp_path / "a.h5") == 0o600


def test_mode_lasts_in_a_folder(tmp_path, usual_umask):
    path, copy = tmp_path / "parts", tmp_path / "copy"
    with lr.InfiniteBuffer(path, rows_per_part=8) as buffer:
        feed(buffer, 5)
        os.chmod(path / "part-000000.h5", 0o600)
        buffer.state_dict()
        feed(buffer, 30)
        buffer.state_dict()
        feed(buffer, 3)
        own = {name: found for name, found in files(path).items() if not name.endswith(".lock")}
        assert {"part-000004.h5", "part-000000.h5.undo.0", "part-000004.h5.undo.0"} <= own.keys()
        assert {mode_of(found) for found in own.values()} == {0o600}
        buffer.save(copy)
        assert {mode_of(found) for found in files(copy).values()} == {0o600}
        for found in files(copy).values():
            os.chmod(found, 0o644)
        buffer.load(copy)
        assert {mode_of(found) for name, found in files(path).items() if not name.endswith(".lock")} == {0o600}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_owner_lasts(tmp_path, usual_umask):
    path = tmp_path / "a.h5"
    with lr.ReservoirBuffer(10, path) as buffer:
        feed(buffer)
        os.chmod(path, 0o640)
        os.chown(path, 65534, 1)
        buffer.state_dict()
        feed(buffer)
        buffer.save(tmp_path / "copy")
        made = [os.stat(name) for name in (f"{path}.undo.0", *files(tmp_path / "copy").values())]
        buffer.resize(8)
        assert {(s.st_uid, s.st_gid, stat.S_IMODE(s.st_mode)) for s in [os.stat(path), *made]} == {(65534, 1, 0o640)}


def test_a_group_that_cannot_be_kept_gets_no_rights(tmp_path, monkeypatch):
    """A file that goes to another group than its model's gives that group what all others have."""
    model = os.stat(os.open(tmp_path / "model", os.O_CREAT | os.O_WRONLY))
    model = os.stat_result((0o100664, *model[1:5], model.st_gid + 1, *model[6:]))

    def refuse(*_):
        raise PermissionError(1, "not yours")

    monkeypatch.setattr(os, "fchown", refuse)
    os.close(system.create(str(tmp_path / "made"), model))
    assert mode_of(tmp_path / "made") == 0o644


# -- strangers -----------------------------------------------------------------------------------------------------------


def pipe(path, beside):
    os.mkfifo(path)


def folder(path, beside):
    os.mkdir(path)
    (path / "precious").write_bytes(b"precious")


def dangling_link(path, beside):
    os.symlink(beside / "nothing", path)


def link(path, beside):
    (beside / "precious").write_bytes(b"")
    os.symlink(beside / "precious", path)


def link_to_a_folder(path, beside):
    os.symlink(beside, path)


def listening(path, beside):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def device(path, beside):
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root can make devices")


def text(path, beside):
    path.write_bytes(b"precious text")


ALIENS = [pipe, folder, dangling_link, link, link_to_a_folder, listening, device]


def tree(*folders):
    """Everything below some folders: names, kinds, inodes, and what files hold."""
    found = {}
    for top in folders:
        for at, inner, names in os.walk(top):
            for name in [*inner, *names]:
                path = os.path.join(at, name)
                status = os.lstat(path)
                content = pathlib.Path(path).read_bytes() if stat.S_ISREG(status.st_mode) else os.path.realpath(path)
                found[path] = (status.st_mode, status.st_ino, content)
    return found


def descriptors():
    gc.collect()
    return sorted(os.listdir("/proc/self/fd"))


def refuses(action, *watched, error=lr.FormatError):
    """`action` raises that error, and neither leaves a descriptor nor changes anything in the folders."""
    before, open_before = tree(*watched), descriptors()
    with pytest.raises(error) as caught:
        action()
    assert isinstance(caught.value, lr.LeanReplayError) and str(watched[0].parent) in str(caught.value)
    assert (tree(*watched), descriptors()) == (before, open_before)


@pytest.fixture
def beside(tmp_path):
    (tmp_path / "beside").mkdir()
    return tmp_path / "beside"


@pytest.fixture
def here(tmp_path):
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


KINDS = {
    "file": lambda path, **k: lr.ReservoirBuffer(50, path, **k),
    "folder": lambda path, **k: lr.InfiniteBuffer(path, rows_per_part=16, **k),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("alien", [*ALIENS, text])
def test_a_stranger_under_the_name_of_the_lock(alien, kind, here, beside):
    path = here / "b"
    if kind == "folder":
        path.mkdir()
    alien(path / "parts.lock" if kind == "folder" else here / "b.lock", beside)
    for mode in ("x", "a", "w"):
        refuses(lambda mode=mode: KINDS[kind](path, mode=mode), here, beside)
    with KINDS[kind](path, lock=False) as buffer:  # which looks at none
        feed(buffer)
        assert buffer.check() == [] and lr.open(path).seen == 20


@every_kind
@pytest.mark.parametrize("alien", [*ALIENS, text])
def test_a_stranger_under_the_name_of_an_undo_file(alien, kind, here, beside):
    path = here / "b"
    part = path / "part-000001.h5" if kind == "folder" else path
    with KINDS[kind](path) as buffer:
        feed(buffer)
        alien(here / f"{part}.undo.0", beside)
        before = tree(beside), os.lstat(f"{part}.undo.0")[:3]
        with pytest.raises(lr.FormatError, match=r"undo\.0"):
            buffer.state_dict()
        assert buffer.seen == 20 and buffer.check() == []
    with lr.open(path, "r+") as buffer:
        with pytest.raises(lr.FormatError, match=r"undo\.0"):
            feed(buffer)
        assert buffer.seen == 20 and lr.open(path).seen == 20
    if kind == "file":
        with KINDS[kind](path, mode="w") as buffer:  # what removes all undo files of the old buffer
            feed(buffer, 7)
        assert lr.open(path).seen == 7
    assert (tree(beside), os.lstat(f"{part}.undo.0")[:3]) == before


@pytest.mark.parametrize("alien", ALIENS)
def test_a_stranger_under_the_name_of_the_buffer(alien, here, beside):
    """A symbolic link there is the file that it points to; a file of another kind is refused."""
    if "link" in alien.__name__ and alien is not link_to_a_folder:
        pytest.skip("a link to a file, or to one that is to be made, is followed")
    alien(here / "b", beside)
    for mode in ("a", "r+", "r"):
        refuses(lambda mode=mode: lr.ReservoirBuffer(50, here / "b", mode=mode, lock=False), here, beside)
    refuses(lambda: lr.ReservoirBuffer(50, here / "b", mode="w", lock=False, schema=SCHEMA), here, beside)
    with lr.ReservoirBuffer(50) as other:
        feed(other)
        refuses(lambda: lr.merge([other], here / "b", mode="w", lock=False), here, beside)


SCHEMA = lr.Schema.from_sample((np.float32(0), 0))


@every_kind
@pytest.mark.parametrize("alien", ALIENS)
@pytest.mark.parametrize("name", ["state.json", "copy"])
def test_a_stranger_in_a_saved_folder(alien, kind, name, here, beside, tmp_path):
    copy = here / "copy"
    with KINDS[kind](tmp_path / "b") as buffer:
        feed(buffer)
        buffer.save(copy)
        if name == "copy":
            name = next(n for n in os.listdir(copy) if n != "state.json")
        moved = shutil.move(copy / name, tmp_path / "moved")
        if alien is folder and kind == "folder" and name != "state.json":
            pytest.skip("that is what a copy is")
        alien(copy / name, beside)
        refuses(lambda: buffer.save(copy), here, beside)
        refuses(lambda: buffer.load(copy), here, beside)
        assert buffer.seen == 20 and buffer.check() == []
        feed(buffer)
        shutil.rmtree(copy / name) if os.path.isdir(copy / name) and not os.path.islink(copy / name) else os.unlink(copy / name)
        shutil.move(moved, copy / name)
        buffer.load(copy)
        assert buffer.seen == 20


@pytest.mark.parametrize("alien", ALIENS)
@pytest.mark.parametrize("name", [".loading", ".loading.tmp", ".loading/count", ".loading/part-000001.h5"])
def test_a_stranger_where_parts_are_loaded(alien, name, here, beside, tmp_path):
    with KINDS["folder"](tmp_path / "b") as buffer:
        feed(buffer)
        buffer.save(tmp_path / "copy")
    with KINDS["folder"](here / "b") as buffer:
        feed(buffer, 40)
    if "/" in name:
        shutil.copytree(next((tmp_path / "copy").glob("parts-*")), here / "b" / ".loading")
        (here / "b" / ".loading/count").write_bytes(b"2")
        os.unlink(here / "b" / name)
    if alien is folder and not name.startswith(".loading/"):
        pytest.skip("that is ours")
    alien(here / "b" / name, beside)
    if name == ".loading.tmp":
        buffer = lr.open(here / "b", "r+")
        refuses(lambda: buffer.load(tmp_path / "copy"), here, beside)
        assert buffer.seen == 40
        buffer.close()
    else:
        refuses(lambda: lr.open(here / "b", "r+"), here, beside)


def test_a_buffer_that_only_others_may_write(tmp_path):
    """The owner can write to what is made in the place of a file that nobody may write to."""
    path = tmp_path / "a.h5"
    lr.ReservoirBuffer(10, path, schema=SCHEMA).close()
    os.chmod(path, 0o444)
    with lr.open(path) as reader:
        reader.save(tmp_path / "copy")
    assert mode_of(tmp_path / "copy" / "buffer.h5") == 0o644
    with lr.ReservoirBuffer(10, path, mode="w") as buffer:
        feed(buffer)
        assert mode_of(path) == 0o644
