"""durable=True: what a state needs is on the disk when `state_dict` returns, and errors of the device agree with `seen`."""

from __future__ import annotations

import os
import pathlib
import random
import stat
from typing import Any

import pytest
from test_power import KINDS, expected, feed, rows_of

import leanreplay


class Disk:
    """What a power cut cannot take away: bytes of files and names in folders, as of the last sync of each."""

    def __init__(self, folder: str, patched: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.bytes: dict[int, bytes] = {}
        self.names: dict[str, dict[str, int]] = {folder: {}}
        for name in ("fsync", "fdatasync"):
            patched.setattr(os, name, self._noting(getattr(os, name)))

    def _noting(self, real: Any) -> Any:
        def sync(fd: int) -> None:
            real(fd)
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                folder = os.readlink(f"/proc/self/fd/{fd}")
                self.names[folder] = {e.name: e.inode() for e in os.scandir(folder)}
            else:
                self.bytes[status.st_ino] = os.pread(fd, status.st_size, 0)

        return sync

    def cut(self, to: str, rng: random.Random) -> str:
        """Files as a power cut now may leave them, in another folder: each as of its last sync, or, by chance, as it is now."""
        share = rng.choice([1.0, 0.5])
        os.mkdir(to)
        self._fill(self.folder, to, rng, share)
        return to

    def _fill(self, folder: str, to: str, rng: random.Random, share: float) -> None:
        now = {e.name: e.inode() for e in os.scandir(folder)}
        synced = self.names.get(folder, {})
        for name in sorted({*now, *synced}):
            there = synced if rng.random() < share else now
            if name not in there:
                continue
            path = os.path.join(folder, name)
            if os.path.isdir(path):
                os.mkdir(os.path.join(to, name))
                self._fill(path, os.path.join(to, name), rng, share)
                continue
            as_now = name in now and now[name] == there[name] and rng.random() >= share
            data = pathlib.Path(path).read_bytes() if as_now else self.bytes.get(there[name], b"")
            pathlib.Path(to, name).write_bytes(data)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="names of descriptors")
@pytest.mark.parametrize("kind", ["reservoir", "infinite", "balanced"])
def test_states_survive_a_power_cut(kind: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once `state_dict` has returned, a power cut at any time leaves a way back to it, and to the one before."""
    rng = random.Random(f"states {kind}")
    home = str(tmp_path / "home")
    os.mkdir(home)
    disk = Disk(home, monkeypatch)
    trials = 0

    def try_all(states: list[dict[str, Any]]) -> None:
        nonlocal trials
        for state in states:
            for _ in range(2):
                trials += 1
                with monkeypatch.context() as patched:
                    patched.setattr(os, "fsync", lambda _: None)
                    patched.setattr(os, "fdatasync", lambda _: None)
                    path = os.path.join(disk.cut(str(tmp_path / f"cut-{trials}"), rng), "b.h5")
                    with leanreplay.open(path, mode="r+") as buffer:
                        assert buffer.check() == []
                        buffer.load_state_dict(state)
                        assert buffer.check() == []
                        assert buffer.seen == state["seen"]
                    assert rows_of(path)[1] == expected(kind, state["seen"])[1]

    path = os.path.join(home, "b.h5")
    with KINDS[kind](path, durable=True) as buffer:
        feed(buffer, 60)
        first = buffer.state_dict()
        try_all([first])
        feed(buffer, 77)
        try_all([first])
        second = buffer.state_dict()
        try_all([first, second])
        feed(buffer, 150)
        try_all([first, second])
        buffer.load_state_dict(first)
        feed(buffer, 64)
        third = buffer.state_dict()
        try_all([first, third])
        feed(buffer, 81)
        try_all([first, third])
    with leanreplay.open(path, mode="r+") as buffer:  # not durable
        fourth = buffer.state_dict()
        feed(buffer, 90)
    with leanreplay.open(path, mode="r+", durable=True) as buffer:
        fifth = buffer.state_dict()
        try_all([fourth, fifth])
    with leanreplay.open(path, mode="r+") as buffer:
        feed(buffer, 107)
        last = buffer.state_dict()
        buffer.flush()
        try_all([fifth, last])
