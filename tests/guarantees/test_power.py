"""G3, power cuts: any subset of the pages written since the last sync is lost. Nothing wrong goes unnoticed.

Pages are lost by mixing the file's bytes of two moments. Without `durable` the file then holds what its header says, or
`check()` names every row that it does not; with `durable=True` every committed sample is there.
"""

from __future__ import annotations

import functools
import glob
import os
import pathlib
import random
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from nightly import times
from paths import in_memory
from storage_kernels import kernel

import leanreplay
from leanreplay import (
    BalancedBuffer,
    ClassBalancedBuffer,
    ClassBalancingReservoirBuffer,
    GreedyClassBalancingBuffer,
    InfiniteBuffer,
    LeanReplayError,
    ReservoirBuffer,
    SlidingWindowBuffer,
)
from leanreplay.storage import layout as fmt
from leanreplay.storage import (
    system,
)

PAGE = 4096
ROWS = 40
KINDS: dict[str, Callable[..., Any]] = {
    "reservoir": lambda path, **o: ReservoirBuffer(ROWS, path, seed=5, **o),
    "window": lambda path, **o: SlidingWindowBuffer(ROWS, path, seed=5, **o),
    "greedy": lambda path, **o: GreedyClassBalancingBuffer(ROWS, path, seed=5, verify="always", **o),
    "infinite": lambda path, **o: InfiniteBuffer(path, rows_per_part=70, seed=5, **o),
    "balanced": lambda path, **o: ClassBalancedBuffer(ROWS, path, seed=5, verify="always", **o),
    "cbrs": lambda path, **o: ClassBalancingReservoirBuffer(ROWS, path, seed=5, **o),
}
TRIALS = times(60, 170)  # per buffer: 1,020 in all


def stream(start: int, stop: int) -> tuple[Any, Any]:
    """What stands at these positions of the stream."""
    p = np.arange(start, stop)
    x = ((p[:, None] * 40503 + np.arange(901) * 2654435761) >> 9).astype(np.uint8)
    return x, np.minimum(p * 7919 % 11, 5)


def add(buffer: Any, start: int, stop: int) -> None:
    """Feed a batch; to buffers that balance, of ever more groups, so that commits free rows and lengthen the log."""
    p = np.arange(start, stop)
    if isinstance(buffer, BalancedBuffer):
        buffer.add(stream(start, stop), group=p * 31 % (1 + p // 20))
    else:
        buffer.add(stream(start, stop))


def feed(buffer: Any, stop: int, step: int = 17) -> None:
    while buffer.seen < stop:
        add(buffer, buffer.seen, min(stop, buffer.seen + step))


def files(path: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(path), "part-*.h5"))) if os.path.isdir(path) else [path]


def snapshot(path: str) -> dict[str, bytes]:
    return {name: pathlib.Path(name).read_bytes() for name in files(path)}


def rows_of(path: str) -> tuple[list[Any], list[tuple[bytes, ...]]]:
    """(states in the headers, bytes of every row and its index), from the bytes on disk; a free row is only its position."""
    heads, rows = [], []
    for name in files(path):
        data = np.fromfile(name, np.uint8)
        data.flags.writeable = False
        table = fmt.decode(lambda at, n, data=data: data[at : at + n].tobytes(), data.shape[0], name)
        words = [np.zeros(fmt.HEADER_WORDS, np.uint64) for _ in fmt.HEADERS]
        valid = [w for w, at in zip(words, fmt.HEADERS, strict=True) if kernel.read_block(data, at, w)]
        heads.append(max(valid, key=lambda w: int(w[fmt.H_SEQ]))[fmt.H_STATE : -1].tobytes())
        columns = [data[at : at + n * table.max_size].reshape(table.max_size, n) for at, n in table.columns]
        free = columns[-3].view(np.int64)[:, 0] < 0
        rows += [() if free[r] else tuple(c[r].tobytes() for c in columns) for r in range(table.max_size)]
    return heads, rows


@functools.cache
def expected(kind: str, seen: int) -> tuple[list[Any], list[tuple[bytes, ...]]]:
    """`rows_of` a buffer that was fed the first `seen` samples in one piece."""
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        path = os.path.join(folder, "b.h5")
        with KINDS[kind](path) as buffer:
            add(buffer, 0, seen)
        return rows_of(path)


def mix(old: dict[str, bytes], new: dict[str, bytes], lost: Callable[[str, int], bool]) -> dict[str, bytes]:
    """The files `new`, but with the page of `old` where lost(file, page)."""
    mixed = {}
    for name, data in new.items():
        pages = bytearray(data)
        before = old[name]
        for at in range(0, len(data), PAGE):
            if before[at : at + PAGE] != data[at : at + PAGE] and lost(name, at // PAGE):
                pages[at : at + PAGE] = before[at : at + PAGE]
        mixed[name] = bytes(pages)
    return mixed


def differing(old: dict[str, bytes], new: dict[str, bytes]) -> list[tuple[str, int]]:
    return [(n, at // PAGE) for n in new for at in range(0, len(new[n]), PAGE) if old[n][at : at + PAGE] != new[n][at : at + PAGE]]


def subset(rng: random.Random, pages: list[tuple[str, int]]) -> tuple[str, set[tuple[str, int]]]:
    """Which pages are lost: of many kinds, since each kind goes wrong in its own way."""
    headers = [p for p in pages if p[1] in (1, 2)]
    kind = rng.choice(["one", "all but one", "half", "few", "most", "headers", "a header", "all but headers", "all but a header", "all"])
    lost = {
        "one": lambda: {rng.choice(pages)},
        "all but one": lambda: set(pages) - {rng.choice(pages)},
        "half": lambda: {p for p in pages if rng.random() < 0.5},
        "few": lambda: {p for p in pages if rng.random() < 0.15},
        "most": lambda: {p for p in pages if rng.random() < 0.85},
        "headers": lambda: set(headers),
        "a header": lambda: {rng.choice(headers)} | {p for p in pages if rng.random() < 0.3},
        "all but headers": lambda: set(pages) - set(headers),
        "all but a header": lambda: set(pages) - {rng.choice(headers)},
        "all": lambda: set(pages),
    }[kind]()
    return kind, lost


def write(contents: dict[str, bytes]) -> None:
    for name, data in contents.items():
        pathlib.Path(name).write_bytes(data)


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers wait a second for a writer to end its commit; here there is none."""
    monkeypatch.setattr("leanreplay.storage.locks.PATIENCE", 0.01)


@pytest.fixture
def folder(tmp_path: Any) -> str:
    return str(tmp_path)


def examine(path: str, kind: str, mode: str, note: str) -> tuple[int, int]:
    """Open; every row that is not what the header's `seen` says is named by check(). (seen, number of wrong rows)."""
    with leanreplay.open(path, mode=mode) as buffer:
        problems = buffer.check()
        seen = buffer.seen
        if not problems and isinstance(buffer, BalancedBuffer):
            p = np.arange(seen)
            assert list(buffer.group_sizes()) == np.unique(p * 31 % (1 + p // 20)).tolist(), f"{note}, mode {mode!r}, seen={seen}"
        heads, rows = rows_of(path)
    right_heads, right = expected(kind, seen) if seen else ([], [])
    wrong = {r for r in range(max(len(rows), len(right))) if (rows[r : r + 1] or [()]) != (right[r : r + 1] or [()])}
    named = {r for p in problems for r in p.rows}
    assert wrong <= named, f"{note}, mode {mode!r}, seen={seen}: rows {sorted(wrong - named)} are wrong, check() said {problems}"
    if not problems:
        assert heads[: len(right_heads)] == right_heads, f"{note}, mode {mode!r}, seen={seen}"
    return seen, len(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_pages_lost_since_the_last_flush(kind: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """G3: the flushed state, or check() names every wrong row, stale ones too; in mode "r" and in mode "r+"."""
    rng = random.Random(kind)
    path = os.path.join(folder, "b.h5")
    made: dict[str, bytes] = {}
    whole = system.sync_folder

    def created(name: str, **_: Any) -> None:  # a part is durable from its creation on
        whole(name)
        if os.path.isfile(name):
            made.setdefault(name, pathlib.Path(name).read_bytes())

    moments = []
    with monkeypatch.context() as patched:
        patched.setattr(system, "sync_folder", created)
        for flushed, then in ((25, 60), (90, 110), (90, 400), (64, 150), (333, 334)):
            made.clear()
            where = os.path.join(folder, f"made-{flushed}-{then}")
            os.mkdir(where)
            path = os.path.join(where, "b.h5")
            with KINDS[kind](path) as buffer:
                feed(buffer, flushed)
                buffer.flush()
                old = snapshot(path)
                feed(buffer, then, rng.choice([1, 17]))
                new = snapshot(path)
            moments.append((path, flushed, {**made, **old}, new))
    restored = torn = 0
    for trial in range(TRIALS):
        path, flushed, old, new = rng.choice(moments)
        pages = differing(old, new)
        how, lost = subset(rng, pages)
        note = f"{kind}, trial {trial}, flushed at {flushed}, {how} of {len(pages)} pages lost: {sorted(p for _, p in lost)}"
        write(mix(old, new, lambda name, page, lost=lost: (name, page) in lost))
        seen, wrong = examine(path, kind, "r", note)
        if how == "all" and kind != "infinite":
            assert (seen, wrong) == (flushed, 0), note
        try:
            examine(path, kind, "r+", note)
        except leanreplay.CorruptionError as error:  # parts with a gap between them are not opened for writing
            assert kind == "infinite" and wrong and "there is a part after it" in str(error), note
        restored += seen == flushed and not wrong
        torn += wrong > 0
    assert restored > TRIALS // 20
    assert torn > TRIALS // 20  # and so there was something to notice


def test_writing_on_after_a_bad_power_cut_is_refused(folder: str) -> None:
    """G3: the writer notices before its first commit that rows do not add up, and touches nothing."""
    path = os.path.join(folder, "b.h5")
    with ReservoirBuffer(ROWS, path, seed=5) as buffer:
        feed(buffer, 90)
        buffer.flush()
        old = snapshot(path)
        feed(buffer, 200)
        new = snapshot(path)
    write(mix(old, new, lambda name, page: page not in (1, 2)))
    with leanreplay.open(path, mode="r+") as buffer:
        before = snapshot(path)
        with pytest.raises(leanreplay.CorruptionError, match="do not add up"):
            buffer.add(stream(200, 210))
        assert snapshot(path) == before


def test_a_lost_page_of_the_log(folder: str) -> None:
    """G3: rows, index and header are there, but the log is that of the flush: check() says so, and nothing is written on top."""
    path = os.path.join(folder, "b.h5")
    with ClassBalancedBuffer(ROWS, path, seed=5) as buffer:
        feed(buffer, 90)
        buffer.flush()
        old = snapshot(path)
        feed(buffer, 200)
        new, at = snapshot(path), buffer.current.store.layout.log[0]
    assert (path, at // PAGE) in differing(old, new)
    write(mix(old, new, lambda name, page: page == at // PAGE))
    for mode in ("r", "r+"):
        assert examine(path, "balanced", mode, "log") == (200, 0)
        with leanreplay.open(path, mode=mode) as buffer:
            assert ["log fails its checksum" in str(p) for p in buffer.check()] == [True]
            assert len(buffer.sample(30)[1]["idx"]) == 30
            if mode == "r+":
                before = snapshot(path)
                with pytest.raises(leanreplay.CorruptionError, match="log fails its checksum"):
                    add(buffer, 200, 210)
                assert snapshot(path) == before


class Syncs:
    """Snapshots of the buffer's files whenever something is made durable, each with what was committed by then."""

    def __init__(self, path: str) -> None:
        self.path, self.committed = path, 0
        self.moments: list[tuple[int, dict[str, bytes]]] = []

    def take(self, *_: Any) -> None:
        self.moments.append((self.committed, snapshot(self.path)))

    def install(self, patched: pytest.MonkeyPatch) -> None:
        sync, sync_folder = system.sync, system.sync_folder
        patched.setattr(system, "sync", lambda fd, view: (self.take(), sync(fd, view))[1])
        patched.setattr(system, "sync_folder", lambda name, **o: (sync_folder(name, **o), self.take())[0])

    def crashes(self, rng: random.Random, each: int) -> Iterator[tuple[str, int, dict[str, bytes]]]:
        """Files as a power cut between two syncs may leave them: the older one's bytes, and any pages of the newer one."""
        for i, ((_, old), (committed, new)) in enumerate(zip(self.moments[:-1], self.moments[1:], strict=True)):
            old = {name: old.get(name, data) for name, data in new.items()}  # a new part is complete from the beginning
            pages = differing(old, new)
            if not pages:
                continue
            for _ in range(each):
                share = rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])
                lost = {p for p in pages if rng.random() < share}
                note = f"after sync {i}, lost {sorted(lost)} of {len(pages)} pages"
                yield note, committed, mix(old, new, lambda name, page, lost=lost: (name, page) in lost)


@pytest.mark.parametrize("points", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_durable_commits_survive(kind: str, points: bool, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """G3: with durable=True a power cut at any moment loses no sample whose `add` has returned."""
    rng = random.Random(f"durable {kind} {points}")
    path = os.path.join(folder, "b.h5")
    syncs = Syncs(path)
    with KINDS[kind](path, durable=True) as buffer:
        feed(buffer, 30)
        syncs.committed = 30
        with monkeypatch.context() as patched:
            syncs.install(patched)
            syncs.take()
            for stop in (47, 64, 81, 82, 130):
                if points:
                    buffer.state_dict()
                feed(buffer, stop)
                syncs.committed = stop
            syncs.take()
    tried = 0
    for note, committed, contents in syncs.crashes(rng, 3):
        for name in files(path):
            os.unlink(name)
        write(contents)
        with leanreplay.open(path, mode="r+") as buffer:
            assert buffer.check() == [], note
            seen = buffer.seen
            assert seen >= committed, note
        heads, rows = rows_of(path)
        right_heads, right = expected(kind, seen)
        assert rows[: len(right)] == right, note
        assert heads[: len(right_heads)] == right_heads, note
        assert not any(rows[len(right) :]), note
        tried += 1
    assert tried > 20


@pytest.mark.parametrize(("kind", "stop"), [("reservoir", 77), ("balanced", 64)])
def test_power_cut_while_recovering(kind: str, stop: int, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """G3: with durable=True a second power cut, during recovery, finds the journal or the rows it restored, freed ones too."""
    rng = random.Random("recovery")
    path = os.path.join(folder, "b.h5")
    syncs = Syncs(path)
    with KINDS[kind](path, durable=True) as buffer:
        feed(buffer, 60)
        with monkeypatch.context() as patched:
            syncs.install(patched)
            feed(buffer, stop)
        at = buffer.current.store.layout.journal
    cut_off = syncs.moments[-2][1]  # journal and rows are there, the header is not
    seal = np.frombuffer(cut_off[path], np.uint64, fmt.SEAL_WORDS, at)
    assert bool(seal[fmt.J_FREED]) == (kind == "balanced")
    tried = 0
    for _ in range(10):
        write(cut_off)
        again = Syncs(path)
        again.take()
        with monkeypatch.context() as patched:
            again.install(patched)
            with leanreplay.open(path, mode="r+", durable=True) as buffer:
                assert buffer.seen == 60
            again.take()
        for note, _, contents in again.crashes(rng, 4):
            write(contents)
            assert examine(path, kind, "r+", note) == (60, 0)
            with leanreplay.open(path) as reader:
                assert reader.check() == [], note
            tried += 1
    assert tried > 20


@pytest.mark.parametrize("kind", ["reservoir", "balanced"])
def test_pages_lost_within_a_rollback(kind: str, folder: str) -> None:
    """G3: pages lost of a rollback since the last flush: an error that says so, or every wrong row is named."""
    rng = random.Random("rollback")
    path = os.path.join(folder, "b.h5")
    with KINDS[kind](path) as buffer:
        feed(buffer, 60)
        state = buffer.state_dict()
        feed(buffer, 120)
        buffer.flush()
        old = snapshot(path)
        buffer.load_state_dict(state)
        feed(buffer, 70)
        new = snapshot(path)
        undo = {name: pathlib.Path(name).read_bytes() for name in glob.glob(glob.escape(path) + ".undo.*")}
    refused = 0
    for trial in range(60):
        how, lost = subset(rng, differing(old, new))
        note = f"trial {trial}, {how}: {sorted(p for _, p in lost)}"
        write(mix(old, new, lambda name, page, lost=lost: (name, page) in lost))
        write(undo)
        try:
            leanreplay.open(path, mode="r+").close()
        except LeanReplayError as error:
            assert "rollback was cut off" in str(error), note
            refused += 1
            continue
        examine(path, kind, "r+", note)
    assert refused < 60
