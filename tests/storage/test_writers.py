"""One writer of a file, whatever its names are; one whose file is gone says so; readers whose file became another one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import shutil

import h5py
import numpy as np
import pytest
from children import child, result

import leanreplay as lr
from leanreplay.storage import locks, system
from leanreplay.storage import mapping as mapping_module

KINDS = {
    "reservoir": lambda path=None, **k: lr.ReservoirBuffer(50, path, **k),
    "balanced": lambda path=None, **k: lr.ClassBalancedBuffer(50, path, **k),
    "infinite": lambda path=None, **k: lr.InfiniteBuffer(path, rows_per_part=16, **k),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
ofd = pytest.mark.skipif(not hasattr(fcntl, "F_OFD_SETLK"), reason="this system has no locks of open files")


def feed(buffer, n=20):
    metadata = {} if buffer.schema is None else {name: np.zeros(n) for name in buffer.schema.metadata_names}
    buffer.add((np.arange(n, dtype=np.float32), np.arange(n) % 5), metadata=metadata)


def descriptors():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def refused(action):
    """In a forked child: the error that an action ends with."""

    def work(_=0):
        try:
            action()
        except lr.LeanReplayError as error:
            return f"{type(error).__name__}: {error}"
        return "done"

    return result(*child(work))


# -- a second writer -----------------------------------------------------------------------------------------------------


def by_a_link(path):
    if os.path.isdir(path):
        shutil.copytree(path, path + "2", copy_function=os.link)
    else:
        os.link(path, path + "2")
    return path + "2"


def by_a_symbolic_link(path):
    os.symlink(path, path + "2")
    return path + "2"


def by_another_name(path):
    os.rename(path, path + "2")
    return path + "2"


def without_the_lock_file(path):
    os.unlink(path + "/parts.lock" if os.path.isdir(path) else path + ".lock")
    return path


@ofd
@every_kind
@pytest.mark.parametrize("how", [by_a_link, by_a_symbolic_link, by_another_name, without_the_lock_file])
def test_one_writer_of_a_file(kind, how, tmp_path):
    """Whatever name a second writer takes, he is refused, here and in another process, before anything has changed; readers come in."""
    path = str(tmp_path / "b")
    with KINDS[kind](path) as buffer:
        feed(buffer)
        second = how(path)
        before = descriptors()
        for mode in ("r+", "a", "w"):
            with pytest.raises(lr.LockedError, match=f"this very process, by the {type(buffer).__name__}"):
                KINDS[kind](second, mode=mode)
            assert refused(lambda mode=mode: KINDS[kind](second, mode=mode)).startswith("LockedError")
        assert descriptors() == before
        with lr.open(second) as reader:
            assert reader.seen == 20 and reader.check() == []
        if how is not by_another_name:
            feed(buffer)
            assert buffer.seen == 40 and buffer.check() == []
    with lr.open(second, "r+") as buffer:  # closed, it is free
        feed(buffer)


@ofd
@pytest.mark.parametrize("change", ["resize", "field", "log", "load", "w", "merge"])
def test_a_file_that_takes_the_name_is_locked(change, tmp_path):
    """Each way in which a new file comes under the name: a second writer without the lock file is refused, also while it appears."""
    path = str(tmp_path / "b.h5")
    make = lr.ClassBalancedBuffer if change == "log" else lr.ReservoirBuffer
    seen = []

    def spied(temp, name, replace):
        publish(temp, name, replace)
        if name == path and os.path.exists(path + ".lock"):
            os.unlink(path + ".lock")
            seen.append(refused(lambda: make(path=path, mode="r+")))

    publish, system.publish = system.publish, spied
    try:
        if change == "merge":
            other = lr.ReservoirBuffer(50)
            feed(other)
            buffer = lr.merge([other], path)
        else:
            buffer = make(50, path, mode=change if change == "w" else "x")
            feed(buffer)
        if change == "resize":
            buffer.resize(30)
        elif change == "field":
            buffer.set_metadata("new", np.zeros(20))
        elif change == "log":
            buffer.add((np.zeros(5000, np.float32), np.arange(5000)))
        elif change == "load":
            buffer.save(tmp_path / "copy")
            buffer.load(tmp_path / "copy")
    finally:
        system.publish = publish
    assert seen and all(error.startswith("LockedError") for error in seen), seen
    assert refused(lambda: make(path=path, mode="r+")).startswith("LockedError")
    feed(buffer)
    buffer.close()
    make(path=path, mode="r+").close()


@ofd
def test_a_loaded_folder_is_locked(tmp_path):
    path = str(tmp_path / "b")
    with KINDS["infinite"](path) as buffer:
        feed(buffer, 40)
        buffer.save(tmp_path / "copy")
        buffer.load(tmp_path / "copy")
        os.unlink(path + "/parts.lock")
        assert refused(lambda: KINDS["infinite"](path, mode="r+")).startswith("LockedError")
        feed(buffer)
    lr.open(path, "r+").close()


@every_kind
def test_hdf5_reads_beside_a_writer(kind, tmp_path):
    """HDF5 locks files too; neither sees the other's lock."""
    path = str(tmp_path / "b")
    file = path + "/part-000000.h5" if kind == "infinite" else path
    with KINDS[kind](path) as buffer:
        feed(buffer)
        with h5py.File(file, "r") as found:
            assert found["data/0"].shape[0] and found["index/position"][0] >= 0
            feed(buffer)
            with h5py.File(file, "r"):
                pass
    with h5py.File(file, "r"), lr.open(path, "r+") as buffer:
        feed(buffer)


def test_a_lock_that_hdf5_would_see_is_let_go(tmp_path, monkeypatch):
    """On a network file system both kinds of locks may be one: then only the lock of the name is held."""
    path = str(tmp_path / "b.h5")
    flock = fcntl.flock

    def network(fd, operation):
        if operation & fcntl.LOCK_SH:
            raise BlockingIOError(errno.EWOULDBLOCK, "locked")
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", network)
    before = descriptors()
    with lr.ReservoirBuffer(50, path) as buffer:
        feed(buffer)
        assert buffer.current.store.guard.fd == -1
        with pytest.raises(lr.LockedError):
            lr.open(path, "r+")
    assert descriptors() == before


@contextlib.contextmanager
def living_fork():
    """A forked child that does nothing and lives on; what a fork calls in a child has run."""
    (read, write), (here, there) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        os.write(there, b"!")
        os.read(read, 1)
        os._exit(0)
    assert os.read(here, 1)
    try:
        yield
    finally:
        for fd in (read, write, here, there):
            os.close(fd)
        os.waitpid(pid, 0)


@every_kind
def test_a_fork_keeps_no_lock(kind, tmp_path):
    """A child that lives on does not keep the file locked."""
    path = str(tmp_path / "b")
    buffer = KINDS[kind](path)
    feed(buffer)
    with living_fork():
        buffer.close()
        lr.open(path, "r+").close()


@ofd
def test_a_fork_keeps_no_guard_of_a_buffer_to_be(tmp_path):
    """A file may be locked already and its buffer not there yet when another thread forks: the child lets that lock go too."""
    path = str(tmp_path / "b")
    (tmp_path / "b").touch()
    guard = locks.Guard(path)
    with living_fork():
        guard.close()
        locks.Guard(path).close()


@ofd
@every_kind
def test_a_store_that_becomes_a_reader_lets_its_lock_go(kind, tmp_path):
    path = str(tmp_path / "b")
    with KINDS[kind](path) as buffer:
        feed(buffer)
        store = buffer.current.store
        locked = os.path.join(path, "part-000000.h5") if kind == "infinite" else path
        with pytest.raises(lr.LockedError):
            locks.Guard(locked)
        reader = store.as_reader()
        locks.Guard(locked).close()
        assert not reader.writable


# -- this very process ---------------------------------------------------------------------------------------------------


@every_kind
def test_a_cell_that_is_run_again(kind, tmp_path):
    """A writer that only a cycle of references keeps is closed; one that a name refers to is named."""
    path = str(tmp_path / "b")
    gc.disable()
    try:
        buffer = KINDS[kind](path)
        feed(buffer)
        with pytest.raises(lr.LockedError, match=rf"by the {type(buffer).__name__} at {id(buffer):#x} \(mode 'x'\); close\(\)"):
            KINDS[kind](path, mode="w")
        assert buffer.seen == 20
        buffer.myself = [buffer]
        del buffer
        with KINDS[kind](path, mode="w") as again:
            feed(again, 7)
            assert again.seen == 7
    finally:
        gc.enable()


@ofd
@every_kind
def test_save_over_a_copy_with_a_writer(kind, tmp_path):
    with KINDS[kind](tmp_path / "b") as buffer:
        feed(buffer)
        buffer.save(tmp_path / "copy")
        name = next(n for n in os.listdir(tmp_path / "copy") if n != "state.json")
        with lr.open(tmp_path / "copy" / name, "r+") as other:
            feed(buffer)
            for remove in (False, True):
                if remove:
                    without_the_lock_file(str(tmp_path / "copy" / name))
                with pytest.raises(lr.LockedError, match="this very process"):
                    buffer.save(tmp_path / "copy")
                assert refused(lambda: buffer.save(tmp_path / "copy")).startswith("LockedError")
            feed(other)
            assert other.seen == 40 and other.check() == []
        buffer.save(tmp_path / "copy")
    with KINDS[kind](tmp_path / "c") as fresh:
        fresh.load(tmp_path / "copy")
        assert fresh.seen == 40


# -- a writer whose file is gone -----------------------------------------------------------------------------------------


def removed(path):
    shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


def renamed(path):
    os.rename(path, path + ".old")


def replaced(path):
    os.rename(path, path + ".old")
    KINDS["infinite" if os.path.isdir(path + ".old") else "reservoir"](path, lock=False, seed=3, schema=SCHEMA).close()


def replaced_at_once(path):
    other = path + ".new"
    lr.ReservoirBuffer(50, other, seed=3, schema=SCHEMA).close()
    os.replace(other, path) if os.path.isfile(path) else os.replace(other, path + "/part-000001.h5")


SCHEMA = lr.Schema.from_sample((np.float32(0), 0))
WRITES = {
    "add": feed,
    "add much": lambda b: feed(b, 200),
    "set_metadata": lambda b: b.set_metadata("m", np.zeros(len(b))),
    "state_dict": lambda b: b.state_dict(),
    "resize": lambda b: b.resize(20),
    "field": lambda b: b.set_metadata("new", np.zeros(len(b))),
}


@every_kind
@pytest.mark.parametrize("how", [removed, renamed, replaced, replaced_at_once])
def test_a_writer_whose_file_is_gone_says_so(kind, how, tmp_path, monkeypatch):
    """The next write is refused, and touches nothing that stands there by now; what was added can still be read and saved."""
    monkeypatch.setattr(mapping_module, "LOOK", 0.0)
    path = str(tmp_path / "b")
    buffer = KINDS[kind](path)
    state = None
    for _ in range(2):
        buffer.add((np.arange(10, dtype=np.float32), np.arange(10) % 5), metadata={"m": np.zeros(10)})
        state = state or buffer.state_dict()
    how(path)
    before = {n: os.stat(os.path.join(at, n)).st_mtime_ns for at, _, names in os.walk(tmp_path) for n in names}
    for name, write in {**WRITES, "load_state_dict": lambda b: b.load_state_dict(state)}.items():
        if kind == "infinite" and name in ("resize", "field"):
            continue
        with pytest.raises(lr.MissingError, match="stands there no more"):
            write(buffer)
        assert buffer.seen == 20
    assert {n: os.stat(os.path.join(at, n)).st_mtime_ns for at, _, names in os.walk(tmp_path) for n in names} == before
    assert len(buffer.sample(5)[0][0]) == 5
    buffer.save(tmp_path / "kept")
    with KINDS[kind](tmp_path / "c") as fresh:
        fresh.load(tmp_path / "kept")
        assert fresh.seen == 20 and fresh.check() == []
    buffer.close()


@every_kind
def test_a_writer_goes_on_once_its_file_is_back(kind, tmp_path):
    """Also without looking at the name every time: the file itself says that its names changed."""
    path = str(tmp_path / "b")
    file = path + "/part-000001.h5" if kind == "infinite" else path
    make = {**KINDS, "infinite": lambda path: lr.InfiniteBuffer(path, rows_per_part=3000)}[kind]
    with make(path) as buffer:
        feed(buffer, 3000)
        for _ in range(3):
            feed(buffer, 10)
            os.rename(file, file + ".old")
            with pytest.raises(lr.MissingError):
                for _ in range(1000):  # at once, or soon where the system's clock for such changes is slow
                    feed(buffer, 1)
            os.rename(file + ".old", file)
        os.link(file, file + ".link")
        os.chmod(file, 0o600)
        feed(buffer)
        assert buffer.check() == []


def test_a_next_part_does_not_come_into_another_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(mapping_module, "LOOK", 0.0)
    with KINDS["infinite"](tmp_path / "b") as buffer:
        feed(buffer, 16)
        os.rename(tmp_path / "b", tmp_path / "c")
        with KINDS["infinite"](tmp_path / "b", seed=9) as other:
            feed(other, 10)
            with pytest.raises(lr.MissingError, match="no more"):
                feed(buffer)
            assert [n for n in os.listdir(tmp_path / "b") if n.endswith(".h5")] == ["part-000000.h5"]


# -- readers whose file became another one -------------------------------------------------------------------------------


@every_kind
def test_a_reader_of_a_file_that_became_another_buffer(kind, tmp_path):
    """One of the same class is read wholly: parameters, draws and samples are those of a reader that is opened now."""
    path = str(tmp_path / "b")
    with KINDS[kind](path, seed=1) as buffer:
        feed(buffer)
    reader = lr.open(path)
    for _ in range(3):
        reader.sample(4)
    with KINDS[kind](path, seed=2, stream=3, mode="w") as buffer:
        buffer.add((np.zeros((30, 3)), np.arange(30) % 5, np.zeros(30, np.uint8)), group=np.arange(30) % 5)
        fresh = lr.open(path)
        assert (len(reader), reader.seen) == (len(fresh), 30)
        assert (reader.seed, reader.stream, reader.max_size, reader.schema) == (2, 3, fresh.max_size, buffer.schema)
        for _ in range(3):
            assert reader.sample(4)[1]["position"].tolist() == fresh.sample(4)[1]["position"].tolist()
        assert reader.check() == []


def test_a_reader_of_a_file_that_became_another_class(tmp_path):
    path = str(tmp_path / "b")
    with KINDS["reservoir"](path) as buffer:
        feed(buffer)
    reader = lr.open(path)
    KINDS["balanced"](path, mode="w", schema=SCHEMA).close()
    before = descriptors()
    for _ in range(2):
        with pytest.raises(lr.MismatchError, match=r"replaced by a ClassBalancedBuffer.*open it again"):
            reader.sample(1)
    assert descriptors() == before
    KINDS["reservoir"](path, mode="w", schema=SCHEMA, seed=4).close()
    assert (reader.seen, reader.seed) == (0, 4)


def test_datasets_and_loaders_of_a_file_that_became_another_buffer(tmp_path):
    torch = pytest.importorskip("torch")
    from leanreplay.torch import BufferDataset, ReplayLoader

    path = str(tmp_path / "b")
    with KINDS["reservoir"](path) as buffer:
        feed(buffer)
    dataset = BufferDataset(lr.open(path))
    assert len(dataset) == 20 and dataset[0][0].dtype == torch.float32
    with ReplayLoader(lr.open(path), 4, prefetch=1) as loader:
        assert next(iter(loader))[0][0].shape == (4,)
        with KINDS["reservoir"](path, mode="w", seed=8) as buffer:
            buffer.add((np.full((30, 3), 7.0), np.arange(30)))
        assert len(dataset) == 30 and dataset[29][0].tolist() == [7.0] * 3
        next(iter(loader))  # was read ahead
        assert next(iter(loader))[0][0].tolist() == [[7.0] * 3] * 4
        KINDS["balanced"](path, mode="w", schema=SCHEMA).close()
        with pytest.raises(lr.MismatchError):
            [next(iter(loader)) for _ in range(2)]
        with pytest.raises(lr.MismatchError):
            len(dataset)


# -- no locks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "number"),
    [("reservoir", errno.ENOLCK), ("balanced", errno.ENOSYS), ("infinite", errno.EOPNOTSUPP), ("reservoir", errno.EINVAL)],
)
def test_a_file_system_without_locks(kind, number, tmp_path, monkeypatch):
    """The error names the option to go on without; that works for every way to open for writing."""
    path = str(tmp_path / "b")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    before = descriptors()
    for mode in ("x", "a", "w"):
        with pytest.raises(lr.StorageError, match="no locks; give lock=False") as caught:
            KINDS[kind](path, mode=mode)
        assert isinstance(caught.value, OSError) and caught.value.errno == errno.ENOLCK
    assert descriptors() == before
    for mode in ("x", "a", "r+", "w"):
        with KINDS[kind](path, mode=mode, lock=False) as buffer:
            feed(buffer)
            assert buffer.check() == []
            buffer.save(tmp_path / "copy")
            buffer.save(tmp_path / "copy")
            buffer.load(tmp_path / "copy")
            feed(buffer)
            assert (lr.open(path).seen, lr.open(path).check()) == (buffer.seen, [])
    with lr.open(path, "r+", lock=False) as buffer:
        feed(buffer)
    with pytest.raises(lr.StorageError, match="lock=False"):
        lr.open(path, "r+")
    if kind != "infinite":
        with pytest.raises(lr.StorageError, match="lock=False"):
            lr.merge([path], tmp_path / "merged.h5")
        lr.merge([path], tmp_path / "merged.h5", lock=False).close()
        lr.merge([path], tmp_path / "merged.h5", mode="w", lock=False).close()


# -- messages ------------------------------------------------------------------------------------------------------------


def test_open_does_not_create(tmp_path):
    with pytest.raises(lr.MissingError, match=r"leanreplay.open cannot tell what to create.*ReservoirBuffer\(n, path, mode='a'\)"):
        lr.open(tmp_path / "b.h5", "a")
    assert os.listdir(tmp_path) == []
    with KINDS["reservoir"](tmp_path / "b.h5") as buffer:
        feed(buffer)
    with lr.open(tmp_path / "b.h5", "a") as buffer:
        feed(buffer)
        assert buffer.seen == 40


def test_a_file_that_was_copied_without_its_undo_files(tmp_path):
    """Going back says what is missing: the undo files that did not come along."""
    with KINDS["reservoir"](tmp_path / "b.h5") as buffer:
        feed(buffer)
        state = buffer.state_dict()
        feed(buffer)
    shutil.copy(tmp_path / "b.h5", tmp_path / "c.h5")
    with lr.open(tmp_path / "c.h5", "r+") as buffer:
        with pytest.raises(lr.StateError, match=r"ahead of the state by 20 .*no file .*c\.h5\.undo\.\* stands beside it.*copied or moved"):
            buffer.load_state_dict(state)
        shutil.copy(tmp_path / "b.h5.undo.0", tmp_path / "c.h5.undo.0")
    with lr.open(tmp_path / "c.h5", "r+") as buffer:
        buffer.load_state_dict(state)
        assert buffer.seen == 20
    with KINDS["reservoir"]() as buffer:
        feed(buffer)
        state = buffer.state_dict()
        feed(buffer)
        buffer.set_metadata("new", np.zeros(40))
        with pytest.raises(lr.StateError) as caught:
            buffer.load_state_dict(state)
        assert "copied" not in str(caught.value)
