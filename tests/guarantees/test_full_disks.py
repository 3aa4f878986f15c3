"""Folders without permission and full disks: a clean error, and the buffer stays as it was."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback

import h5py
import numpy as np
import pytest
from refusing import feed, make, refuses, snapshot

import leanreplay as lr
from leanreplay.storage import system

torch = pytest.importorskip("torch")


def in_child(function, other_user=True):
    """Run function() in a forked child, as another user if we are root; what it returned, its traceback, or the signal that ended it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        text = "nothing"
        try:
            signal.alarm(60)
            if other_user and os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            text = function()
        except BaseException:
            text = traceback.format_exc()
        os.write(write, json.dumps(text).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else f"ended by signal {os.WTERMSIG(status)}"


@pytest.fixture
def open_folder():
    """A folder that other users can reach, unlike pytest's own."""
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o755)
    yield folder
    os.chmod(folder, 0o755)
    shutil.rmtree(folder)


def error_of(action):
    try:
        action()
    except lr.LeanReplayError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_read_only_folder(open_folder):
    """G7: in a folder without permission to write, creating and opening for writing fail cleanly, and reading works."""
    path = os.path.join(open_folder, "replay.h5")
    with make(path) as made:
        made.state_dict()
        before = [a.tolist() for a in made.get([0, 1, 2])[0]]
    os.chmod(path, 0o444)
    os.chmod(path + ".lock", 0o444)
    os.chmod(open_folder, 0o555)
    tried = in_child(
        lambda: [
            error_of(lambda: make(os.path.join(open_folder, "new.h5"))),
            error_of(lambda: lr.open(path, "r+")),
            error_of(lambda: make(path, mode="w")),
            error_of(lambda: make(os.path.join(open_folder, "parts"), lr.InfiniteBuffer)),
            error_of(lambda: make(None).save(os.path.join(open_folder, "saved"))),
            [a.tolist() for a in lr.open(path).get([0, 1, 2])[0]],
            error_of(lambda: lr.open(path).check()),
        ]
    )
    assert isinstance(tried, list), tried
    for message in tried[:5]:
        assert message.startswith("StorageError") and "ermission" in message and "permissions" in message, message
    assert tried[5] == before and tried[6] == "no error"
    assert sorted(os.listdir(open_folder)) == ["replay.h5", "replay.h5.lock", "replay.h5.undo.0"]


def test_file_without_permission_to_read(open_folder):
    """G7: a file that may not be read, and a copy that may not."""
    path = os.path.join(open_folder, "replay.h5")
    with make(path) as made:
        made.save(os.path.join(open_folder, "saved"))
    os.chmod(path, 0)
    os.chmod(os.path.join(open_folder, "saved", "state.json"), 0)
    tried = in_child(lambda: [error_of(lambda: lr.open(path)), error_of(lambda: make(None).load(os.path.join(open_folder, "saved")))])
    assert isinstance(tried, list), tried
    assert all(message.startswith("StorageError") and "permissions" in message for message in tried), tried


FULL = ["No space", "free some space"]


def test_pages_come_before_anything_is_written(tmp_path, monkeypatch):
    """A disk that is full when a commit asks for pages, of any kind of commit: nothing has changed, and the same call works later."""

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    path = str(tmp_path / "replay.h5")
    with lr.ReservoirBuffer(5, path) as made:
        made.add((np.zeros((3, 2)), np.zeros(3, int)), metadata={"logits": np.zeros(3)})
        for values, rows in ((np.ones(3), None), (np.full(1, 2.0), [1])):
            before = snapshot(made)
            made.close()
            made = lr.open(path, mode="r+")  # it has asked for no pages yet
            with monkeypatch.context() as patch:
                patch.setattr(system, "write_zeros", full)
                patch.setattr(system, "LINUX", True)
                with pytest.raises(lr.StorageError, match="free some space"):
                    made.set_metadata("logits", values, rows)
            assert snapshot(made) == before and made.check() == []
            made.set_metadata("logits", values, rows)
            assert made.check() == []
        assert made.get_metadata("logits").tolist() == [1, 2, 1]
        made.close()


class Disk(str):
    """A folder on a small file system."""

    def fill(self):
        """Take all space that is left."""
        block = 1 << 16
        with open(self / "filler", "ab", buffering=0) as file:
            while block:
                try:
                    if file.write(b"x" * block) < block:
                        block //= 2
                except OSError:
                    block //= 2

    def free(self, n=None):
        """Give back n bytes, by default all."""
        if n is None:
            os.unlink(self / "filler")
        else:
            os.truncate(self / "filler", os.path.getsize(self / "filler") - n)

    def __truediv__(self, name):
        return os.path.join(self, name)

    def leftovers(self):
        return [n for n in os.listdir(self) if n.endswith(".tmp")]


def full_creation(disk, elsewhere):
    path = disk / "replay.h5"
    for room in (0, 30_000):
        disk.fill()
        if room:
            disk.free(room)
        made = make(path, fed=0)
        refuses(made, lr.StorageError, FULL, lambda b: feed(b, 0, 5))
        assert not os.path.exists(path) and disk.leftovers() == [] and made.schema is None
        disk.free()
        feed(made, 0, 5)
        assert len(made) == 5 and made.check() == []
        made.close()
        os.unlink(path)
    made = make(path, fed=0, mode="w")
    made.close()


def full_larger_than_the_disk(disk, elsewhere):
    path = disk / "replay.h5"
    made = lr.ReservoirBuffer(10**7, path)
    refuses(made, lr.StorageError, FULL, lambda b: feed(b, 0, 5))
    made.resize(8)
    feed(made, 0, 20)
    assert snapshot(made)[0] == snapshot(make(None))[0]


def full_new_undo_file(disk, elsewhere):
    path = disk / "replay.h5"
    with make(path) as made, make(None) as twin:
        disk.fill()
        for _ in range(2):
            refuses(made, lr.StorageError, FULL, lambda b: b.state_dict())
        assert not [n for n in os.listdir(disk) if "undo" in n]
        disk.free()
        for buffer in (made, twin):
            feed(buffer, 20, 200)
        state = made.state_dict()
        feed(made, 220, 50)
        made.load_state_dict(state)
        assert snapshot(made)[0] == snapshot(twin)[0] and made.check() == []


def full_growing_undo_file(disk, elsewhere):
    path = disk / "replay.h5"
    size = 4000

    def big(start, n):
        return np.arange(start, start + n)[:, None] * np.ones((1, size // 8), np.int64)

    with lr.SlidingWindowBuffer(40, path) as made, lr.SlidingWindowBuffer(40) as twin:
        for buffer in (made, twin):
            buffer.add(big(0, 60))
        state = made.state_dict()
        disk.fill()
        before = made.get(range(40))[0].tobytes(), made.seen, made.current.store.state_name(), made.current.store.policy
        for _ in range(3):
            try:
                made.add(big(60, 40))
            except lr.StorageError as error:
                assert all(word in str(error) for word in FULL), error
            else:
                raise AssertionError("no error on a full disk")
            assert (made.get(range(40))[0].tobytes(), made.seen, made.current.store.state_name(), made.current.store.policy) == before
        assert made.check() == []
        made.load_state_dict(state)
        disk.free()
        for buffer in (made, twin):
            buffer.add(big(60, 70))
        assert made.get(range(40))[0].tobytes() == twin.get(range(40))[0].tobytes() and made.check() == []
        made.load_state_dict(state)
        assert made.get(range(40))[0].tobytes() == before[0] and made.seen == 60 and made.check() == []


def full_resize_and_a_new_field(disk, elsewhere):
    path = disk / "replay.h5"
    with make(path) as made, make(None) as twin:
        disk.fill()
        refuses(made, lr.StorageError, FULL, lambda b: b.resize(4))
        refuses(made, lr.StorageError, FULL, lambda b: b.set_metadata("new", np.zeros(8)))
        assert disk.leftovers() == [] and made.check() == []
        feed(made, 20, 300)
        disk.free()
        feed(twin, 20, 300)
        for buffer in (made, twin):
            buffer.resize(4)
        assert snapshot(made)[0] == snapshot(twin)[0] and made.check() == []


def full_next_part(disk, elsewhere):
    with make(disk / "parts", lr.InfiniteBuffer, fed=8) as made, make(None, lr.InfiniteBuffer, fed=8) as twin:
        disk.fill()
        refuses(made, lr.StorageError, FULL, lambda b: feed(b, 8, 3))
        refuses(made, lr.StorageError, FULL, lambda b: feed(b, 8, 3))
        disk.free()
        for buffer in (made, twin):
            feed(buffer, 8, 20)
        assert snapshot(made)[0] == snapshot(twin)[0] and made.check() == []


def full_save_and_load(disk, elsewhere):
    path = disk / "replay.h5"
    with make(path) as made:
        made.save(elsewhere)
        feed(made, 20, 100)
        disk.fill()
        refuses(made, lr.StorageError, FULL, lambda b: b.save(disk / "saved"))
        refuses(made, lr.StorageError, FULL, lambda b: b.load(elsewhere))
        assert disk.leftovers() == [] and made.check() == []
        disk.free()
        made.load(elsewhere)
        assert made.seen == 20 and snapshot(made)[0] == snapshot(make(None))[0]
        made.save(disk / "saved")


def full_holes(disk, elsewhere):
    path = disk / "replay.h5"
    # A copy that made holes: opening for writing must take the blocks, or say that there are none.
    with make(path) as made:
        before = snapshot(made)[0]
    with open(path, "rb") as file:
        data = file.read()
    os.unlink(path)
    with open(path, "wb") as file:
        for at in range(0, len(data), 4096):
            if data[at : at + 4096].strip(b"\0"):
                file.seek(at)
                file.write(data[at : at + 4096])
        file.truncate(len(data))
    assert os.stat(path).st_blocks * 512 < len(data)
    disk.fill()
    try:
        lr.open(path, "r+")
    except lr.StorageError as error:
        assert all(word in str(error) for word in FULL), error
    else:
        raise AssertionError("no error on a full disk")
    with lr.open(path) as made:
        assert snapshot(made)[0] == before
    disk.free()
    with lr.open(path, "r+") as made:
        disk.fill()
        feed(made, 20, 200)
        assert made.check() == []


SCENARIOS = [
    full_creation,
    full_larger_than_the_disk,
    full_new_undo_file,
    full_growing_undo_file,
    full_resize_and_a_new_field,
    full_next_part,
    full_save_and_load,
    full_holes,
]


def mount_small(folder):
    """Mount 2 MiB of tmpfs in a mount namespace of this process alone. Raises OSError where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    newns, newuser, private, recursive = 0x00020000, 0x10000000, 1 << 18, 1 << 14

    def check(result):
        if result != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    user, group = os.geteuid(), os.getegid()
    check(libc.unshare(newns | (newuser if user else 0)))
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    check(libc.mount(None, b"/", None, recursive | private, None))
    check(libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, b"size=2m"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts a small file system, which this test can do on Linux only")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_full_disk(scenario, tmp_path):
    """G7: on a full disk every write fails cleanly (no SIGBUS), the buffer stays as it was and goes on once space is free."""
    for name in ("disk", "elsewhere"):
        (tmp_path / name).mkdir()

    def run():
        try:
            mount_small(tmp_path / "disk")
        except OSError as error:
            return f"cannot mount: {error}"
        scenario(Disk(tmp_path / "disk"), str(tmp_path / "elsewhere"))
        return "passed"

    outcome = in_child(run, other_user=False)
    if outcome.startswith("cannot mount"):
        pytest.skip(f"a small file system cannot be mounted here: {outcome}")
    assert outcome == "passed", outcome


def test_h5py_files_are_refused(tmp_path):
    """G7: HDF5 but not ours, under every mode that opens."""
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["data/0"] = np.zeros(3)
    before = (tmp_path / "other.h5").read_bytes()
    for mode in ("r", "r+", "a"):
        with pytest.raises(lr.FormatError, match="plain HDF5 file"):
            lr.ReservoirBuffer(8, tmp_path / "other.h5", mode=mode)
    assert (tmp_path / "other.h5").read_bytes() == before


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="Linux only")
def test_no_descriptor_is_left(tmp_path):
    """Of files that are refused, and of those that open."""
    good, cut = str(tmp_path / "good.h5"), tmp_path / "cut.h5"
    with lr.ReservoirBuffer(5, good) as buffer:
        buffer.add(np.zeros((3, 2)))
    cut.write_bytes((tmp_path / "good.h5").read_bytes()[:5000])
    before = len(os.listdir("/proc/self/fd"))
    for mode in ("r", "r+"):
        lr.open(good, mode=mode).close()
        with pytest.raises(lr.FormatError):
            lr.open(cut, mode=mode)
        with pytest.raises(lr.FormatError):
            lr.ReservoirBuffer(None, cut, mode=mode)
    assert len(os.listdir("/proc/self/fd")) == before
