"""G5, G6, G7: the file is plain HDF5, no HDF5 handle outlives its creation, opening needs no HDF5, and damaged files are refused.

`data/replay_v1.h5.gz` stands for all files of format version 1 in the world: later releases must open it and go on with it. It was made by

    PYTHONPATH=tests/guarantees:tests/support python -c "import test_format; test_format.write_stored_file('tests/data/replay_v1.h5')"
    gzip -9n tests/data/replay_v1.h5

and must not be made again while the version is 1. `data/grouped_v1.h5.gz`, by `write_grouped_file`, stands for those with groups and a log.
"""

from __future__ import annotations

import gzip
import os
import shutil
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
from paths import DATA
from stored_files import GROUP_SIZES, LOG, batch, crafted, feed, feed_grouped, groups, logits, overwrite, table_of, write_stored_file

import leanreplay as lr
from leanreplay.keys import STREAM_BITS
from leanreplay.samples.schema import Schema
from leanreplay.storage import layout as fmt
from leanreplay.storage.create import hash_structure

STORED = os.path.join(DATA, "replay_v1.h5.gz")


DATASETS = {
    "data/image": lambda b: b["image"],
    "data/label": lambda b: b["label"],
    "data/more/0/0": lambda b: b["more"][0][0],
    "data/more/0/1": lambda b: b["more"][0][1],
    "data/more/0/2": lambda b: b["more"][0][2],
    "data/more/0/3": lambda b: b["more"][0][3],
    "data/more/1": lambda b: b["more"][1],
}


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def matches(file, buffer):
    """Whether an open h5py file says what the buffer says, for every row."""
    rows = buffer.get_metadata("idx")
    held, meta = buffer.get(rows)
    assert np.array_equal(np.flatnonzero(file["index/position"][:] >= 0), rows)
    assert np.array_equal(file["index/position"][:][rows], meta["position"])
    for name, leaf in DATASETS.items():
        assert same(file[name][:][rows], leaf(held)), name
    assert same(file["metadata/logits"][:][rows], meta["logits"])


# -- plain HDF5 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [lr.ReservoirBuffer, lr.SlidingWindowBuffer, lr.GreedyClassBalancingBuffer])
@pytest.mark.parametrize("fed", [5, 60])
def test_h5py_reads_every_dtype(cls, fed, tmp_path):
    """G5: h5py alone reads nested bool, complex, float16 and fixed-width bytes, while the writer has the file open and after."""
    path = str(tmp_path / "replay.h5")
    with cls(9, path) as buffer:
        for start in range(0, fed, 5):
            values = {"group": np.arange(start, start + 5) % 3} if cls is lr.GreedyClassBalancingBuffer else {}
            buffer.add(batch(start, 5), metadata=logits(start, 5), **values)
        with h5py.File(path, "r") as file:
            matches(file, buffer)
            assert file["data/more/0/0"].dtype == bool and file["data/more/0/2"].dtype == np.complex128
            assert all(file[name].shape[0] == 9 and file[name].chunks is None for name in DATASETS)
            if cls is lr.GreedyClassBalancingBuffer:
                assert np.array_equal(file["index/group"][:][buffer.get_metadata("idx")], buffer.get_metadata("position") % 3)
    with h5py.File(path, "r") as file, lr.open(path) as buffer:
        matches(file, buffer)


def test_the_usual_pair(tmp_path):
    """G5: `h5py.File(p)["data/0"]` are the samples, as the README says; bfloat16 columns hold the bits; a bare array is `data`."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "replay.h5"
    x = torch.linspace(-3, 3, 8).bfloat16().reshape(4, 2)
    with lr.ReservoirBuffer(10, path) as buffer:
        buffer.add((x, torch.arange(4)))
        with h5py.File(path, "r") as file:
            assert np.array_equal(file["data/0"][:4], x.view(torch.int16).numpy().view(np.uint16))
            assert file["data/1"][:4].tolist() == [0, 1, 2, 3] and file["index/position"][:].tolist() == [0, 1, 2, 3, *[-1] * 6]
    with lr.ReservoirBuffer(3, tmp_path / "bare.h5") as buffer:
        buffer.add(np.arange(3.0))
        with h5py.File(tmp_path / "bare.h5", "r") as file:
            assert file["data"][:].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("seed", [7, 2**100])
def test_attributes_say_what_the_file_is(seed, tmp_path):
    """G5: class, seed, release, and where the format is described; of rewritten files and of parts too. Nothing depends on them."""
    path = tmp_path / "replay.h5"
    wanted = {"class": "ReservoirBuffer", "seed": seed if seed == 7 else str(seed), "stream": 2, "leanreplay_version": lr.__version__}
    with lr.ReservoirBuffer(10, path, seed=seed, stream=2) as buffer:
        buffer.add(np.arange(10.0))
        for change in (lambda: None, lambda: buffer.resize(8), lambda: buffer.set_metadata("z", np.arange(8))):
            change()
            with h5py.File(path, "r") as file:
                found = dict(file.attrs)
                assert "leanreplay/storage/layout.py" in found.pop("format")
                assert found == wanted
        assert buffer.check() == []
    with h5py.File(path, "r+") as file:
        for name in wanted:
            del file.attrs[name]
    with lr.open(path, mode="r+") as buffer:
        assert (buffer.seed, buffer.stream, len(buffer)) == (seed, 2, 8)
    with lr.InfiniteBuffer(tmp_path / "parts", rows_per_part=4) as buffer:
        buffer.add(np.arange(5.0))
    with h5py.File(tmp_path / "parts" / "part-000001.h5", "r") as file:
        assert file.attrs["class"] == "InfiniteBuffer"


def test_ctrl_c_within_hdf5(tmp_path, monkeypatch):
    """G6: a KeyboardInterrupt while HDF5 writes the structure stays one; it ended as AttributeError. No file appears."""
    original = h5py.File

    def interrupted(memory, *args, **options):
        write = type(memory).write
        monkeypatch.setattr(type(memory), "write", lambda self, data: (signal.raise_signal(signal.SIGINT), write(self, data))[1])
        return original(memory, *args, **options)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores SIGINT
    try:
        with lr.ReservoirBuffer(10, tmp_path / "replay.h5") as buffer:
            monkeypatch.setattr(h5py, "File", interrupted)
            with pytest.raises(KeyboardInterrupt):
                buffer.add(np.arange(10.0))
            monkeypatch.undo()
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            assert os.listdir(tmp_path) == ["replay.h5.lock"]
            buffer.add(np.arange(10.0))
    finally:
        signal.signal(signal.SIGINT, before)


READER = """
import sys, h5py, numpy as np
path, stop = sys.argv[1:]
rounds = 0
while rounds < 20 or not __import__("os").path.exists(stop):
    with h5py.File(path, "r") as file:
        position, x = file["index/position"][:], file["data"][:]
        # Rows change while they are read here, so position and data may be of different samples; but each of this row.
        row = np.arange(512)
        assert (position % 512 == row).all() and (x % 512 == row[:, None]).all(), (position, x)
    rounds += 1
print(rounds)
"""


def test_h5py_in_another_process_during_training(tmp_path):
    """G5: another process opens and reads the file with h5py alone, over and over, while the writer goes on."""
    path, stop = str(tmp_path / "replay.h5"), str(tmp_path / "stop")
    with lr.SlidingWindowBuffer(512, path) as buffer:
        values = np.repeat(np.arange(512.0)[:, None], 16, 1)
        buffer.add(values)
        child = subprocess.Popen([sys.executable, "-c", READER, path, stop], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            start, written = 512, 0
            while child.poll() is None and written < 200_000:
                buffer.add(np.repeat(np.arange(start, start + 16.0)[:, None], 16, 1))
                start, written = start + 16, written + 1
                if written == 2000:
                    open(stop, "w").close()
            out, err = child.communicate(timeout=60)
        finally:
            child.kill()
            child.wait()
        assert child.returncode == 0 and int(out) >= 20, err
        assert buffer.check() == []


def test_no_handle_after_creation(tmp_path):
    """G6: no HDF5 object is open after creation, feeding, sampling and check; the file is closed with the buffer."""

    def handles():
        return h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_ALL)

    def descriptors():
        found = []
        for name in os.listdir("/proc/self/fd"):
            try:
                found.append(os.readlink(f"/proc/self/fd/{name}"))
            except OSError:
                continue
        return sorted(f for f in found if str(tmp_path) in f)

    before = handles()
    path = str(tmp_path / "replay.h5")
    with lr.ReservoirBuffer(6, path) as buffer, lr.ReservoirBuffer(6) as other:
        feed(buffer, 0, 9)
        feed(other, 0, 9)
        assert handles() == before
        for made in (buffer, other):
            made.sample(3)
            assert made.check() == [] and handles() == before
            made.resize(4)
            made.set_metadata("new", np.zeros(4))
            made.save(tmp_path / "saved")
            assert handles() == before
        if os.path.isdir("/proc/self/fd"):
            # The store's, the lock of the file itself, and that of its name: the map has none of its own.
            assert descriptors() == [path, path, path + ".lock"]
    if os.path.isdir("/proc/self/fd"):
        assert descriptors() == []


NO_HDF5 = """
import sys
sys.modules["h5py"] = None  # importing it is an error from here on
import numpy as np
import leanreplay as lr
with lr.open(sys.argv[1], "r+") as buffer:
    before = buffer.get(buffer.get_metadata("idx"))[0]["label"].tolist()
    state = buffer.state_dict()
    sample, meta = buffer.sample(4)
    buffer.add({k: v for k, v in sample.items()}, metadata={"logits": meta["logits"]})
    buffer.set_metadata("logits", meta["logits"] * 0, meta["idx"])
    buffer.load_state_dict(state)
    buffer.flush()
    assert buffer.get(buffer.get_metadata("idx"))[0]["label"].tolist() == before
    buffer.save(sys.argv[2])
    buffer.load(sys.argv[2])
with lr.open(sys.argv[1]) as buffer:
    assert buffer[0] and len(list(buffer)) == 6
try:
    lr.ReservoirBuffer(3).add(np.arange(3))
except ImportError:
    print("only creation needs it")
"""


def test_opening_does_not_call_hdf5(tmp_path):
    """G6: opening, reading, feeding, rolling back, saving and loading work where h5py cannot be imported at all."""
    path = str(tmp_path / "replay.h5")
    write_stored_file(path)
    command = [sys.executable, "-c", NO_HDF5, path, str(tmp_path / "saved")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0 and ran.stdout == "only creation needs it\n", ran.stderr


# -- the file of version 1 ---------------------------------------------------------------------------------------------


HELD = [0, 16, 8, 37, 28, 9]
AFTER = [126, 118, 55, 101, 111, 88]
GROUPED_HELD = [0, 16, 59, 57, 53, 55, 28, 47, 58, 52, 26, 43]
GROUPED_AFTER = [101, 107, 59, 57, 126, 55, 118, 103, 99, 70, 94, 52, 88, 43]


@pytest.fixture
def stored(tmp_path):
    """A copy of the file of version 1."""
    assert os.path.getsize(STORED) < 100_000
    path = str(tmp_path / "replay.h5")
    with gzip.open(STORED) as packed, open(path, "wb") as file:
        shutil.copyfileobj(packed, file)
    return path


def test_stored_file_opens(stored):
    """A file of format version 1 opens, checks clean, and holds what was put in; also by h5py alone."""
    with lr.open(stored) as buffer, h5py.File(stored, "r") as file:
        assert type(buffer) is lr.ReservoirBuffer and (buffer.max_size, buffer.seed, buffer.stream, buffer.seen) == (6, 7, 3, 40)
        assert buffer.check() == []
        held, meta = buffer.get(range(6))
        positions = meta["position"] - (3 << STREAM_BITS)
        assert positions.tolist() == HELD
        for row, p in enumerate(positions.tolist()):
            wanted = batch(p, 1)
            assert all(same(leaf(held)[row : row + 1], leaf(wanted)) for leaf in DATASETS.values()), (row, p)
            assert same(meta["logits"][row : row + 1], logits(p, 1)["logits"])
        matches(file, buffer)


def test_stored_file_goes_on(stored):
    """Fed further, a file of version 1 makes the choices that it has always made: keys are part of the format."""
    with lr.open(stored, "r+") as buffer, lr.ReservoirBuffer(6, seed=7, stream=3) as anew:
        state = buffer.state_dict()
        feed(anew, 0, 40)
        for made in (buffer, anew):
            for start in range(40, 140, 20):
                feed(made, start, 20)
        assert (buffer.get_metadata("position") - (3 << STREAM_BITS)).tolist() == AFTER
        for a, b in zip(buffer.current.store.read(np.arange(6))[0], anew.current.store.read(np.arange(6))[0], strict=True):
            assert same(a, b)
        assert buffer.check() == []
        buffer.load_state_dict(state)
        assert (buffer.get_metadata("position") - (3 << STREAM_BITS)).tolist() == HELD


def log_of(path):
    """The entries of the log that the header counts, by h5py and the format's words alone."""
    table = table_of(path)
    with open(path, "rb") as file:
        data = file.read()
    heads = [np.frombuffer(data, np.uint64, fmt.HEADER_WORDS, at) for at in fmt.HEADERS]
    count = int(max(heads, key=lambda h: int(h[fmt.H_SEQ]))[fmt.H_LOG])
    with h5py.File(path, "r") as file:
        log = file["index/log"]
        assert log.dtype == np.int64 and log.shape == (table.log[1], 2) and log.chunks is None and not log[count:].any()
        return log[:count].tolist()


def test_grouped_file_opens(grouped):
    """A grouped file of format version 1 opens, checks clean, and holds groups, log and free rows as they were; also by h5py alone."""
    with lr.open(grouped) as buffer, h5py.File(grouped, "r") as file:
        assert type(buffer) is lr.ClassBalancedBuffer and (buffer.max_size, buffer.seed, buffer.stream, buffer.seen) == (15, 7, 3, 60)
        assert buffer.adaptive_size and buffer.check() == []
        assert buffer.group_sizes() == GROUP_SIZES
        rows = buffer.get_metadata("idx")
        held, meta = buffer.get(rows)
        positions = meta["position"] - (3 << STREAM_BITS)
        assert positions.tolist() == GROUPED_HELD
        for i, p in enumerate(positions.tolist()):
            assert all(same(leaf(held)[i : i + 1], leaf(batch(p, 1))) for leaf in DATASETS.values()), (i, p)
            assert same(meta["logits"][i : i + 1], logits(p, 1)["logits"])
        matches(file, buffer)
        assert np.array_equal(file["index/group"][:][rows], groups(0, 60)[positions])
        assert [g for what, g in log_of(grouped) if what == 0] == list(dict.fromkeys(groups(0, 60).tolist()))
        assert log_of(grouped) == LOG


def test_grouped_file_goes_on(grouped):
    """Fed further, a grouped file of version 1 makes the choices that it has always made, and has the log of one fed at once."""
    again = grouped + ".again"
    with lr.open(grouped, "r+") as buffer, lr.ClassBalancedBuffer(15, again, seed=7, stream=3) as anew:
        state = buffer.state_dict()
        feed_grouped(anew, 0, 60)
        for made in (buffer, anew):
            for start in range(60, 140, 20):
                feed_grouped(made, start, 20) if start < 100 else made.add(
                    batch(start, 20), metadata=logits(start, 20), group=groups(80, 20)
                )
        assert (buffer.get_metadata("position") - (3 << STREAM_BITS)).tolist() == GROUPED_AFTER
        assert buffer.group_sizes() == anew.group_sizes() and log_of(grouped) == log_of(again)
        rows = buffer.get_metadata("idx")
        for a, b in zip(buffer.current.store.read(rows)[0], anew.current.store.read(rows)[0], strict=True):
            assert same(a, b)
        assert buffer.check() == []
        buffer.load_state_dict(state)
        assert (buffer.get_metadata("position") - (3 << STREAM_BITS)).tolist() == GROUPED_HELD
        assert buffer.group_sizes() == GROUP_SIZES and buffer.check() == []


def test_a_longer_log(tmp_path):
    """More groups than the log has room for: the file gets a longer one, and h5py sees it; groups and rows are as of any buffer."""
    path, n = str(tmp_path / "many.h5"), 2500
    ids = np.random.default_rng(0).permutation(n) * 2**30 - 2**35
    with lr.ClassBalancedBuffer(5, path) as buffer:
        buffer.add((np.zeros((2000, 1)), ids[:2000]))
        slots = table_of(path).log[1]
        buffer.add((np.zeros((n - 2000, 1)), ids[2000:]))
        assert buffer.check() == [] and sum(buffer.group_sizes().values()) == 5 and list(buffer.group_sizes()) == sorted(ids.tolist())
        assert table_of(path).log[1] > slots
        log = log_of(path)
        assert [g for what, g in log if what == 0] == ids.tolist()
        full = [int(ids[i]) for what, i in log if what == 1]
        assert sorted(full) == [g for g, held in buffer.group_sizes().items() if not held]  # their one sample had to go, or found no room
    with lr.open(path, "r+") as buffer:
        assert buffer.check() == []
        buffer.add((np.ones((10, 1)), np.array(full[:10])))
        assert log_of(path) == log


# -- check and the HDF5 structure --------------------------------------------------------------------------------------


def test_check_reports_a_changed_structure(path, monkeypatch):
    """G6, G7: check() reports every changed byte of HDF5's own, and does not let the HDF5 library near it."""
    table = table_of(path)

    def never(*args, **kwargs):
        raise AssertionError("h5py was called with a damaged structure")

    monkeypatch.setattr(h5py, "File", never)
    with open(path, "rb") as file:
        data = file.read()
    for start, n in table.structure:
        for at in {start, start + 8, start + n // 3, start + n - 1}:
            overwrite(path, at, bytes([data[at] ^ 1]))
            with lr.open(path, "r+") as buffer:
                assert len(buffer.sample(6)[1]["idx"]) == 6  # leanreplay does not need it
                problems = buffer.check()
            assert len(problems) == 1 and "HDF5 structure" in str(problems[0])
            overwrite(path, at, data[at : at + 1])
    monkeypatch.undo()
    with lr.open(path) as buffer:
        assert buffer.check() == []


def test_check_compares_hdf5_with_the_table(path):
    """G7: a table and a structure that are each right but name different places are told apart."""
    table = table_of(path)
    columns = list(table.columns)
    columns[-3], columns[-2] = columns[-2], columns[-3]  # position and group have the same width
    data = crafted(table, columns=columns)
    overwrite(path, 0, data[: fmt.PAGE])
    overwrite(path, fmt.TABLE_AT, data[fmt.TABLE_AT :])
    with lr.open(path) as buffer:
        assert {str(p) for p in buffer.check()} >= {f"HDF5 sees index/{n} elsewhere than the table" for n in ("position", "group")}


def test_check_survives_a_structure_that_lies(path):
    """G7: structure bytes replaced together with their hash: what h5py then raises becomes a problem, not an exception."""
    table = table_of(path)
    at, n = table.structure[0]
    overwrite(path, at, bytes(n))
    with open(path, "rb") as file:
        data = file.read()
    made = crafted(table, structure_hash=hash_structure(lambda at, n: data[at : at + n], table))
    overwrite(path, 0, made[: fmt.PAGE])
    overwrite(path, fmt.TABLE_AT, made[fmt.TABLE_AT :])
    with lr.open(path) as buffer:
        assert any("HDF5 cannot read" in p.what for p in buffer.check())


def test_schema_survives(path):
    """The table gives back the schema it was made from, key order and all."""
    table = table_of(path)
    assert table.schema == Schema.from_batch(batch(0, 1), logits(0, 1))
    assert fmt.decode(lambda at, n: table.encode()[at : at + n], os.path.getsize(path), path) == table
