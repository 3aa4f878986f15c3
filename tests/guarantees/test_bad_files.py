"""G7, bad files: copies, modes, parameters and files of others are refused with a way out."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from refusing import X, feed, make, refuses, snapshot

import leanreplay as lr

torch = pytest.importorskip("torch")


# -- saved copies ------------------------------------------------------------------------------------------------------


def damage_json(text):
    return lambda folder: (folder / "state.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "error", "word"),
    [
        (lambda f: (f / "buffer.h5").unlink(), lr.MissingError, "does not exist"),
        (lambda f: (f / "state.json").unlink(), lr.MissingError, "save()"),
        (lambda f: (f / "buffer.h5").write_bytes(b"x" * 9000), lr.FormatError, "no leanreplay file"),
        (lambda f: os.truncate(f / "buffer.h5", 30000), lr.FormatError, "cut short"),
        (damage_json("{"), lr.FormatError, "state.json"),
        (damage_json("[]"), lr.FormatError, "state.json"),
        (damage_json("[" * 100000), lr.FormatError, "state.json"),
        (damage_json('{"format": 1, "draws": {"sample": -1}}'), lr.FormatError, "draws"),
        (damage_json('{"draws": {"sample": "x"}}'), lr.FormatError, "state.json"),
        (damage_json('{"draws": 5}'), lr.FormatError, "state.json"),
    ],
)
def test_damaged_copies(buffer, damage, error, word, tmp_path):
    """G7: load from a folder where something is missing or damaged."""
    folder = tmp_path / "saved"
    buffer.save(folder)
    damage(folder)
    feed(buffer, 20, 9)
    refuses(buffer, error, [word], lambda b: b.load(folder))


def test_copies_of_others(buffer, tmp_path):
    """G7: load of a copy with another max_size, seed, stream, policy or schema shows both."""
    for i, (other, word) in enumerate(
        [
            (lr.ReservoirBuffer(9), "max_size=9"),
            (lr.ReservoirBuffer(8, seed=1), "seed=1"),
            (lr.ReservoirBuffer(8, stream=1), "stream=1"),
            (lr.SlidingWindowBuffer(8), "SlidingWindowBuffer"),
        ]
    ):
        feed(other, 0, 3)
        other.save(tmp_path / str(i))
        refuses(buffer, lr.MismatchError, [word, "this buffer"], lambda b, f=tmp_path / str(i): b.load(f))
    with lr.ReservoirBuffer(8) as other:
        other.add(X)
        other.save(tmp_path / "schema")
    refuses(buffer, lr.MismatchError, ["schema="], lambda b: b.load(tmp_path / "schema"))


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [lr.ReservoirBuffer, lr.InfiniteBuffer])
def test_existing_and_missing_files(cls, tmp_path):
    """G7: mode x refuses an existing buffer, r and r+ a missing one; both say what to do."""
    path = tmp_path / "replay"
    with make(path, cls) as made:
        before = snapshot(made)
    with pytest.raises(lr.ExistsError, match=r"exists|holds a buffer") as caught:
        make(path, cls)
    assert all(f"'{m}'" in str(caught.value) for m in ("r+", "a", "w")) and isinstance(caught.value, FileExistsError)
    with lr.open(path) as made:
        assert snapshot(made) == before
    for mode in ("r", "r+"):
        with pytest.raises(lr.MissingError, match="'x' or 'a'") as caught:
            make(tmp_path / "none", cls, mode=mode)
        assert isinstance(caught.value, FileNotFoundError) and not (tmp_path / "none").exists()
        with pytest.raises(lr.MissingError):
            lr.open(tmp_path / "none", mode=mode)
    with pytest.raises(lr.ArgumentError, match="create one with a class"):
        lr.open(path, mode="x")
    with pytest.raises(lr.ArgumentError, match="mode"):
        lr.open(path, mode="q")


def test_file_that_appears_later(tmp_path):
    """G7: of two buffers created under mode x without a first batch, only one can ever be: the lock is there from the start."""
    path = str(tmp_path / "replay.h5")
    with lr.ReservoirBuffer(8, path) as first:
        with pytest.raises(lr.LockedError, match="this very process"):
            lr.ReservoirBuffer(8, path)
        with open(path, "wb") as other:  # something that knows no locks
            other.write(b"mine")
        with pytest.raises(lr.ExistsError, match="exists"):
            feed(first, 0, 5)
        assert first.schema is None and first.seen == 0
    with open(path, "rb") as other:
        assert other.read() == b"mine"
    assert not [n for n in os.listdir(tmp_path) if n.endswith(".tmp")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_size": 9}, ["max_size=9", "file: 8"]),
        ({"seed": 1}, ["seed=1", "file: 0"]),
        ({"stream": 2}, ["stream=2", "file: 0"]),
        ({"seed": 1, "stream": 2}, ["seed=1", "stream=2"]),
        ({"schema": lr.Schema.from_sample(X)}, ["schema="]),
        ({"schema": lr.Schema.from_sample((X[0], 1))}, ["schema="]),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["a", "r", "r+"])
def test_other_parameters_than_the_files(options, words, mode, tmp_path):
    """G7: parameters that differ from the file's are an error that shows both."""
    path = str(tmp_path / "replay.h5")
    make(path).close()
    with pytest.raises(lr.MismatchError) as caught:
        lr.ReservoirBuffer(path=path, mode=mode, **options)
    assert all(w in str(caught.value) for w in [*words, "leave them out"]), caught.value
    with lr.ReservoirBuffer(
        8, path, seed=0, stream=0, schema=lr.Schema.from_sample((X[0], 1), {"logits": np.zeros(2, "f4")}), mode="r+"
    ) as b:
        assert len(b) == 8


def test_other_policy_than_the_files(tmp_path):
    """G7: the class is one of the parameters; `rows_per_part` too; a class that is not imported is named."""
    path = str(tmp_path / "replay.h5")
    make(path).close()
    for mode in ("a", "r", "r+"):
        with pytest.raises(lr.MismatchError, match=r"SlidingWindowBuffer \(file: ReservoirBuffer\)"):
            lr.SlidingWindowBuffer(8, path, mode=mode)
    make(tmp_path / "parts", lr.InfiniteBuffer).close()
    with pytest.raises(lr.MismatchError, match=r"rows_per_part=9 \(file: 8\)"):
        lr.InfiniteBuffer(tmp_path / "parts", rows_per_part=9, mode="r+")

    from leanreplay.buffers import registry

    class Stranger(lr.DataBuffer):
        policy_class = lr.SlidingWindowPolicy

    strange = tmp_path / "strange.h5"
    make(strange, Stranger).close()
    del registry.KINDS["Stranger"]
    with pytest.raises(lr.MismatchError, match="import the module"):
        lr.open(strange)
    with pytest.raises(lr.ArgumentError, match="policy"):
        lr.DataBuffer(8)


@pytest.mark.parametrize("cls", [lr.ReservoirBuffer, lr.InfiniteBuffer])
def test_second_writer(cls, tmp_path):
    """G7: a second writer is refused, in the same process and in another; readers are welcome; closing frees the lock."""
    path = tmp_path / "replay"
    with make(path, cls) as made:
        before = snapshot(made)
        for mode in ("r+", "a", "x", "w"):
            with pytest.raises(lr.LockedError) as caught:
                make(path, cls, fed=0, mode=mode)
            assert all(w in str(caught.value) for w in ("open for writing in this very process", f"{id(made):#x}", "close()", "mode='r'"))
        code = "import leanreplay, sys\ntry: leanreplay.open(sys.argv[1], 'r+')\nexcept leanreplay.LockedError as e: print('refused')"
        ran = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True, timeout=60)
        assert ran.stdout == "refused\n"
        with lr.open(path) as reader:
            assert snapshot(reader)[0] == before[0]
        assert snapshot(made) == before
        feed(made, 20, 3)
    with lr.open(path, "r+") as made:
        feed(made, 23, 3)


def test_no_regular_file(tmp_path):
    """G7: a folder, a pipe and a device are refused at once, not waited for."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in (tmp_path / "pipe", tmp_path / "folder", "/dev/null", "/dev/zero"):
        if os.path.lexists(name):
            with pytest.raises(lr.FormatError, match=r"no regular file|no leanreplay file|a folder"):
                lr.ReservoirBuffer(path=name, mode="r")
    for mode in ("r+", "a"):
        for name in ("pipe", "folder"):
            with pytest.raises(lr.FormatError, match=r"no regular file|a folder"):
                lr.ReservoirBuffer(8, tmp_path / name, mode=mode)
    with pytest.raises(lr.StorageError, match="create the folder first"):
        lr.ReservoirBuffer(8, tmp_path / "no" / "replay.h5")
    with pytest.raises(lr.StorageError):
        lr.ReservoirBuffer(8, tmp_path / ("x" * 300))


def test_failed_resize_changes_nothing(buffer, monkeypatch):
    """G1, G7: a resize that fails leaves the reservoir's bound alone: the buffer goes on as if it had not been tried."""

    def full(*args, **kwargs):
        raise lr.StorageError(28, "no space")

    with make(None) as other:
        with monkeypatch.context() as patch:
            patch.setattr("leanreplay.buffers.location.create_file", full)
            refuses(buffer, lr.StorageError, ["no space"], lambda b: b.resize(3))
        with warnings.catch_warnings():
            warnings.simplefilter("error", lr.CapacityWarning)
            before = snapshot(buffer)
            with pytest.raises(lr.CapacityWarning):
                buffer.resize(20)
        assert snapshot(buffer) == before
        for made in (buffer, other):
            feed(made, 20, 500)
        assert snapshot(buffer) == snapshot(other) and len(buffer) == 8


# -- two creators ------------------------------------------------------------------------------------------------------


def _create(folder, number, barrier, results, rounds, locked):
    schema = lr.Schema.from_sample((X[0], 1))
    for i in range(rounds):
        barrier.wait(60)
        made = None
        try:
            made = lr.ReservoirBuffer(8, os.path.join(folder, f"{i}.h5"), seed=number, schema=schema, lock=locked)
            outcome = "won"
        except (lr.ExistsError, lr.LockedError) as error:
            outcome = type(error).__name__
        except BaseException as error:
            outcome = repr(error)
        results.put((i, number, outcome))
        barrier.wait(60)
        if made is not None:
            made.close()


@pytest.mark.parametrize("locked", [True, False], ids=["locks", "no locks"])
def test_two_creators_at_once(locked, tmp_path):
    """G7: of two processes that create the same file at once exactly one wins, also where locks do not work (some network disks)."""
    rounds = 60
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    children = [context.Process(target=_create, args=(str(tmp_path), n, barrier, results, rounds, locked), daemon=True) for n in (0, 1)]
    for child in children:
        child.start()
    outcomes = sorted(results.get(timeout=60) for _ in range(2 * rounds))
    for child in children:
        child.join(60)
    for i in range(rounds):
        both = outcomes[2 * i : 2 * i + 2]
        winners = [number for _, number, outcome in both if outcome == "won"]
        assert len(winners) == 1, both
        assert {outcome for _, _, outcome in both} <= {"won", "ExistsError", "LockedError"}, both
        with lr.open(tmp_path / f"{i}.h5") as made:
            assert made.seed == winners[0] and made.check() == []
    assert not [n for n in os.listdir(tmp_path) if n.endswith(".tmp")]
