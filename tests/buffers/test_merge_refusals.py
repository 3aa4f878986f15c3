"""merge: what it refuses, and damaged or changing inputs."""

from __future__ import annotations

import functools
import hashlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from merging import SEED, STREAM, expected, feed, held, key, made, samples

import leanreplay
from leanreplay import (
    ArgumentError,
    ClassBalancedBuffer,
    ClassBalancingReservoirBuffer,
    CorruptionError,
    ExistsError,
    FormatError,
    GreedyClassBalancingBuffer,
    InfiniteBuffer,
    LockedError,
    MismatchError,
    MissingError,
    ModeError,
    RecoveryError,
    ReservoirBuffer,
    SlidingWindowBuffer,
    WeightedReservoirBuffer,
    merge,
)
from leanreplay.kernels import merge as kernel
from leanreplay.storage.store import Change

# -- refusals ----------------------------------------------------------------------------------------------------------


def refuse(error: type[Exception], words: Sequence[str], *args: Any, **options: Any) -> None:
    """`merge` raises this error with these words in its message."""
    with pytest.raises(error) as caught:
        merge(*args, **options)
    assert type(caught.value) is error
    assert all(str(word) in str(caught.value) for word in words), str(caught.value)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[str]]:
    yield made("reservoir", tmp_path, {0: 50, 1: 60})


def test_refused_arguments(pair: list[str], tmp_path: Path) -> None:
    """No input, one twice, the output among them, wrong kinds of arguments: nothing is made, nothing is changed."""
    a, b = pair
    out = tmp_path / "all.h5"
    refuse(ArgumentError, ["at least one"], [], out)
    refuse(ArgumentError, ["list of paths", "None"], None, out)
    refuse(ArgumentError, ["list of paths", "5"], 5, out)
    refuse(ArgumentError, ["list of paths", a], a, out)
    refuse(ArgumentError, ["'r+'"], pair, out, mode="r+")
    refuse(ArgumentError, ["given twice", a], [a, b, a], out)
    os.symlink(a, tmp_path / "link.h5")
    refuse(ArgumentError, ["given twice", "link.h5", a], [a, tmp_path / "link.h5"], out)
    with leanreplay.open(a) as buffer:
        refuse(ArgumentError, ["given twice"], [a, buffer], out)
        refuse(ArgumentError, ["given twice"], [buffer, buffer], out)
        refuse(ArgumentError, ["is the output", a], [buffer, b], a, mode="w")
    refuse(ArgumentError, ["is the output", a], pair, a, mode="w")
    refuse(ArgumentError, ["is the output", a], pair, tmp_path / "link.h5")
    refuse(ArgumentError, ["max_size", "0"], pair, out, max_size=0)
    refuse(ArgumentError, ["max_size", "'7'"], pair, out, max_size="7")
    refuse(ArgumentError, ["stream", "40000"], pair, out, stream=40_000)
    refuse(ArgumentError, ["stream=1", "an input"], pair, out, stream=1)
    refuse(ArgumentError, ["input 1", "str or os.PathLike"], [a, 7], out)
    refuse(MissingError, ["none.h5"], [a, tmp_path / "none.h5"], out)
    (tmp_path / "text.h5").write_text("no buffer" * 100)
    refuse(FormatError, ["text.h5"], [a, tmp_path / "text.h5"], out)
    with ReservoirBuffer(30, seed=SEED, stream=4) as empty:
        refuse(ArgumentError, ["input 1 (in memory)", "is empty", "leave it out"], [a, empty], out)
    refuse(ModeError, ["closed"], [a, empty], out)
    assert not out.exists()
    out.write_text("something")
    refuse(ExistsError, ["all.h5", "exists"], pair, out)
    assert out.read_text() == "something"
    with ReservoirBuffer(5, tmp_path / "open.h5"):
        refuse(LockedError, ["open.h5"], pair, tmp_path / "open.h5", mode="w")


def test_refused_pairs(pair: list[str], tmp_path: Path) -> None:
    """Other kinds, schemas, seeds, parameters and overlapping streams: both files are named, with what differs."""
    a, _ = pair
    out, schema = tmp_path / "all.h5", leanreplay.open(a).schema

    def other(kind: Any = ReservoirBuffer, size: int = 30, **options: Any) -> str:
        path = str(tmp_path / "other.h5")
        kind(size, path, mode="w", **{"seed": SEED, "stream": 4, "schema": schema, **options}).close()
        return path

    refuse(MismatchError, [a, other(seed=6), "seed 5 and 6"], [a, other(seed=6)], out)
    path = other(WeightedReservoirBuffer)
    refuse(MismatchError, [a, path, "kind ReservoirBuffer and WeightedReservoirBuffer"], [a, path], out)
    path = other(schema=leanreplay.Schema.from_sample(0))
    refuse(MismatchError, [a, path, "schema"], [a, path], out)
    path = other(stream=0)
    refuse(MismatchError, [a, path, "stream 0", "stream=rank"], [a, path], out)
    merged = str(tmp_path / "merged.h5")
    merge(pair, merged).close()
    refuse(MismatchError, [a, merged, "stream 0"], [a, merged], out)
    path = other(stream=2)  # the number that the merged buffer would be fed with, but it was not yet
    merge([merged, path], out, mode="w").close()
    with leanreplay.open(merged, "r+") as buffer:
        feed("reservoir", buffer, 111)
    refuse(MismatchError, [merged, path, "stream 2"], [merged, path], out, mode="w")

    groups = str(tmp_path / "groups.h5")
    fixed: dict[str, Any] = {"adaptive_size": False, "total_num_classes": 3}
    ClassBalancedBuffer(30, groups, seed=SEED, stream=0, schema=schema, **fixed).close()
    refuse(MismatchError, [groups, "adaptive_size False and True"], [groups, other(ClassBalancedBuffer)], out)
    path = other(ClassBalancedBuffer, adaptive_size=False, total_num_classes=4)
    refuse(MismatchError, [groups, path, "total_num_classes 3 and 4"], [groups, path], out)
    path = other(ClassBalancedBuffer, **fixed)
    merge([groups, path], out, mode="w").close()
    for name, first in ((groups, 0), (path, 2)):
        with leanreplay.open(name, "r+") as buffer:
            buffer.add(samples(0, 2), metadata={"m": np.arange(2)}, group=[first, first + 1])
    refuse(MismatchError, [groups, path, "4 groups", "total of 3"], [groups, path], out, mode="w")
    refuse(ArgumentError, ["3 groups in 2 rows"], [groups], out, mode="w", max_size=2)


REFUSED = {
    "window": (SlidingWindowBuffer, "last ones"),
    "greedy": (GreedyClassBalancingBuffer, "order"),
    "cbrs": (ClassBalancingReservoirBuffer, "order"),
    "borrow": (functools.partial(ClassBalancedBuffer, borrow=True), "borrow=True"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_kinds(kind: str, tmp_path: Path) -> None:
    """Kinds whose contents depend on the order of all streams, even a single one: with the reason."""
    make, why = REFUSED[kind]
    paths = [str(tmp_path / f"{i}.h5") for i in range(2)]
    for i, path in enumerate(paths):
        with make(5, path, stream=i) as buffer:
            buffer.add((np.zeros((9, 2)), np.arange(9) % 3))
    refuse(MismatchError, [*paths, why], paths, tmp_path / "all.h5")
    refuse(MismatchError, [paths[0], why], paths[:1], tmp_path / "all.h5")


def test_refused_folders_and_unknown_policies(tmp_path: Path) -> None:
    """An InfiniteBuffer, open or as a folder, and a user's policy that nobody can know how to merge."""
    folder = tmp_path / "infinite"
    with InfiniteBuffer(folder) as buffer:
        buffer.add(np.arange(5))
        refuse(MismatchError, [folder, "InfiniteBuffer", "keeps everything"], [buffer])
    refuse(MismatchError, [folder, "InfiniteBuffer", "keeps everything"], [folder])

    class MyPolicy(leanreplay.ReservoirPolicy):
        pass

    class MyBuffer(leanreplay.DataBuffer):
        policy_class = MyPolicy

    with MyBuffer(5) as buffer:
        buffer.add(np.arange(5))
        refuse(MismatchError, ["MyBuffer", "does not say"], [buffer])

    class MyReservoir(ReservoirBuffer):
        pass

    with MyReservoir(5) as own:
        own.add(np.arange(9))
        with merge([own]) as buffer:
            assert type(buffer) is MyReservoir


# -- damaged and changing inputs ---------------------------------------------------------------------------------------


def test_cut_off_input(pair: list[str], tmp_path: Path) -> None:
    """An input whose writer was killed within a commit is refused until a writer has opened it."""
    pid = os.fork()
    if pid == 0:
        try:
            buffer = leanreplay.open(pair[0], "r+")
            leanreplay.storage.writer.ONE_CALL = False
            leanreplay.storage.writer.Writer.publish = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
            feed("reservoir", buffer, 200)
        finally:
            os._exit(1)
    os.waitpid(pid, 0)
    refuse(RecoveryError, [pair[0], "cut off", "'r+'"], pair, tmp_path / "all.h5")
    leanreplay.open(pair[0], "r+").close()
    with merge(pair, tmp_path / "all.h5") as buffer:
        assert held(buffer) == expected("reservoir", {0: 50, 1: 60}, 30)


@pytest.mark.parametrize("column", ["data/x", "metadata/m", "index/position", "index/group", "index/checksum"])
def test_damaged_input(pair: list[str], column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped bit in a row that goes in, or anywhere in the index, is noticed, and no file appears."""
    monkeypatch.setattr(leanreplay.storage.locks, "PATIENCE", 0.02)  # there is no writer to wait for
    with merge(pair) as buffer:
        kept = next(p for p in held(buffer) if p < STREAM)
    with leanreplay.open(pair[0]) as source:
        row = int(np.flatnonzero(source.get_metadata("position") == kept)[0])
        table = source.current.store.layout
    at, size = dict(zip(table.dataset_names(), table.columns, strict=True))[column]
    with open(pair[0], "r+b") as file:
        file.seek(at + row * size + 1)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(CorruptionError, match="reservoir0"):
        merge(pair, tmp_path / "all.h5")
    assert not (tmp_path / "all.h5").exists()


def test_inputs_that_lie(pair: list[str]) -> None:
    """A sample of another input's stream, or of a group that no log knows, with checksums that fit, is an error."""
    with leanreplay.open(pair[1], "r+") as liar:
        store = liar.current.store
        arrays, index = store.read(np.arange(3))
        with leanreplay.open(pair[0]) as other:
            index[0] = other.get_metadata("position")[np.argsort([key(p) for p in other.get_metadata("position").tolist()])[-3:]]
        sources = [(np.ascontiguousarray(a).ravel().view(np.uint8), np.arange(3)) for a in arrays]
        store.commit(Change(store.seen, store.policy, np.arange(3), index[0], index[1], sources))
        refuse(MismatchError, [*pair, "both hold sample"], [pair[0], liar])
    (liar,) = made("classes", None, {0: 90})
    store = liar.current.store
    for wrong in (-(2**63), 4, 2**63 - 1):
        arrays, index = store.read(np.arange(3))
        index[1, 1] = wrong
        sources = [(np.ascontiguousarray(a).ravel().view(np.uint8), np.arange(3)) for a in arrays]
        store.commit(Change(store.seen, store.policy, np.arange(3), index[0], index[1], sources))
        refuse(CorruptionError, ["input 0", "log of groups"], [liar])


@pytest.mark.parametrize("when", ["index", "rows", "end"])
def test_input_that_is_written_to(pair: list[str], when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer of an input makes the merge fail, whatever it met, and no file appears."""
    with leanreplay.open(pair[0], "r+") as writer:
        done = []

        def meanwhile() -> None:
            if not done:
                done.append(True)
                feed("reservoir", writer, 200)

        if when == "index":
            offer = kernel.offer
            monkeypatch.setattr(kernel, "offer", lambda *args: (meanwhile(), offer(*args)))
        elif when == "rows":
            read = leanreplay.storage.reader.Reader.read
            monkeypatch.setattr(leanreplay.storage.reader.Reader, "read", lambda *args: (meanwhile(), read(*args))[1])
        else:
            commit = leanreplay.storage.writer.Writer.commit
            monkeypatch.setattr(leanreplay.storage.writer.Writer, "commit", lambda *args, **named: (commit(*args, **named), meanwhile())[0])
        refuse(ModeError, [pair[0], "written to", "close its writer"], pair, tmp_path / "all.h5")
        assert done
        assert not (tmp_path / "all.h5").exists()
    monkeypatch.undo()
    with merge(pair, tmp_path / "all.h5") as buffer:
        assert held(buffer) == expected("reservoir", {0: 200, 1: 60}, 30)


def test_input_fed_by_another_thread() -> None:
    """An open buffer that is given itself waits: the merge sees one state of it, and two merges in other orders do not block."""
    parts = made("reservoir", None, {0: 50, 1: 60})
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set() and parts[0].seen < 20_000:
            feed("reservoir", parts[0], parts[0].seen + 5, batch=5)

    def other() -> None:
        while not stop.is_set():
            merge(parts[::-1]).close()

    threads = [threading.Thread(target=work), threading.Thread(target=other)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(15):
            with merge(parts) as buffer:
                assert held(buffer) == expected("reservoir", {0: buffer.seen - 60, 1: 60}, 30)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_files_say_what_went_in(pair: list[str], tmp_path: Path) -> None:
    """The same bytes of rows and index whichever order the inputs came in; h5py reads the result."""
    h5py = pytest.importorskip("h5py")
    digests = set()
    for number, order in enumerate((pair, pair[::-1])):
        path = tmp_path / f"all{number}.h5"
        merge(order, path).close()
        with h5py.File(path) as file:
            parts = [file[name][:].tobytes() for name in ("data/x", "data/b", "data/s", "metadata/m", "index/position", "index/checksum")]
            assert (np.diff(file["index/position"][:]) > 0).all()
        digests.add(hashlib.sha256(b"".join(parts)).hexdigest())
    assert len(digests) == 1
