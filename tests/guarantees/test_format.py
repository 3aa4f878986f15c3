"""G5, G6, G7: the file is plain HDF5, no HDF5 handle outlives its creation, opening needs no HDF5, and damaged files are refused.

`data/replay_v1.h5.gz` stands for all files of format version 1 in the world: later releases must open it and go on with it. It was made by

    PYTHONPATH=tests/guarantees:tests/support python -c "import test_format; test_format.write_stored_file('tests/data/replay_v1.h5')"
    gzip -9n tests/data/replay_v1.h5

and must not be made again while the version is 1. `data/grouped_v1.h5.gz`, by `write_grouped_file`, stands for those with groups and a log.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
from interpreter import Script
from paths import DATA

import leanreplay as lr
from leanreplay.samples.schema import Schema
from leanreplay.storage import layout as fmt
from leanreplay.storage.create import hash_structure

STORED = os.path.join(DATA, "replay_v1.h5.gz")
GROUPED = os.path.join(DATA, "grouped_v1.h5.gz")


def batch(start, n):
    """Contents that follow from the position, of several dtypes and nested."""
    p = np.arange(start, start + n)
    image = (p[:, None, None] * 7 + np.arange(6).reshape(2, 3)).astype(np.uint8)
    words = np.char.encode(np.char.add("sample ", p.astype(str)), "utf-8").astype("S12")
    extra = [p % 2 == 0, (p[:, None] * np.array([0.5, -1])).astype(np.float16), p * (1 + 2j), words]
    return {"image": image, "label": p % 3, "more": (extra, p.astype(np.int8)[:, None])}


def logits(start, n):
    return {"logits": np.arange(start, start + n, dtype=np.float32)[:, None] + np.arange(2, dtype=np.float32)}


def feed(buffer, start, n):
    buffer.add(batch(start, n), metadata=logits(start, n))


def write_stored_file(path):
    with lr.ReservoirBuffer(6, path, seed=7, stream=3) as buffer:
        feed(buffer, 0, 40)
    os.unlink(path + ".lock")


def groups(start, n):
    """Labels of ever more classes: 7 after 60 samples, the last of a single one; negative and large ones among them."""
    p = np.arange(start, start + n)
    return np.where(p == 59, 11, np.array([-5, 0, 2**40, 3, 7, 8, 9, -(2**63), 1, 2])[p % (1 + p // 10)])


def feed_grouped(buffer, start, n):
    buffer.add(batch(start, n), metadata=logits(start, n), group=groups(start, n))


def write_grouped_file(path):
    with lr.ClassBalancedBuffer(15, path, seed=7, stream=3) as buffer:
        for start in range(0, 60, 10):
            feed_grouped(buffer, start, 10)
    os.unlink(path + ".lock")


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


# -- plain HDF5 ----------------------------------------------------------------------------------------------------------


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


# -- the file of version 1 -----------------------------------------------------------------------------------------------

HELD = [0, 16, 8, 37, 28, 9]
AFTER = [126, 118, 55, 101, 111, 88]
GROUPED_HELD = [0, 16, 59, 57, 53, 55, 28, 47, 58, 52, 26, 43]
GROUPED_AFTER = [101, 107, 59, 57, 126, 55, 118, 103, 99, 70, 94, 52, 88, 43]
GROUP_SIZES = {-5: 2, 0: 2, 2**40: 2, 3: 2, 7: 2, 8: 1, 11: 1}
LOG = [[0, -5], [0, 0], [1, 0], [0, 2**40], [1, 1], [0, 3], [1, 2], [0, 7], [1, 3], [0, 8], [1, 4], [0, 11]]


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
        positions = meta["position"] - (3 << fmt.STREAM_BITS)
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
        assert (buffer.get_metadata("position") - (3 << fmt.STREAM_BITS)).tolist() == AFTER
        for a, b in zip(buffer._store.read(np.arange(6))[0], anew._store.read(np.arange(6))[0], strict=True):
            assert same(a, b)
        assert buffer.check() == []
        buffer.load_state_dict(state)
        assert (buffer.get_metadata("position") - (3 << fmt.STREAM_BITS)).tolist() == HELD


@pytest.fixture
def grouped(tmp_path):
    """A copy of the file of version 1 with groups."""
    assert os.path.getsize(GROUPED) < 60_000
    path = str(tmp_path / "grouped.h5")
    with gzip.open(GROUPED) as packed, open(path, "wb") as file:
        shutil.copyfileobj(packed, file)
    return path


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
        positions = meta["position"] - (3 << fmt.STREAM_BITS)
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
        assert (buffer.get_metadata("position") - (3 << fmt.STREAM_BITS)).tolist() == GROUPED_AFTER
        assert buffer.group_sizes() == anew.group_sizes() and log_of(grouped) == log_of(again)
        rows = buffer.get_metadata("idx")
        for a, b in zip(buffer._store.read(rows)[0], anew._store.read(rows)[0], strict=True):
            assert same(a, b)
        assert buffer.check() == []
        buffer.load_state_dict(state)
        assert (buffer.get_metadata("position") - (3 << fmt.STREAM_BITS)).tolist() == GROUPED_HELD
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


# -- damaged files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    made = str(tmp_path / "replay.h5")
    write_stored_file(made)
    return made


def table_of(path):
    with open(path, "rb") as file:
        data = file.read()
    return fmt.decode(lambda at, n: data[at : at + n], len(data), path)


def refused(path, word):
    """Opening in every mode, and leanreplay.open, is a FormatError; the file keeps its bytes."""
    with open(path, "rb") as file:
        before = file.read()
    for action in (
        lambda: lr.open(path),
        lambda: lr.open(path, "r+"),
        lambda: lr.ReservoirBuffer(path=path, mode="r"),
        lambda: lr.ReservoirBuffer(6, path, mode="a"),
    ):
        with pytest.raises(lr.FormatError) as caught:
            action()
        assert word in str(caught.value) and path in str(caught.value), caught.value
    with open(path, "rb") as file:
        assert file.read() == before


def overwrite(path, at, data):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def test_other_files(tmp_path):
    """G7: HDF5 but not ours, not HDF5 at all, empty, one byte."""
    path = str(tmp_path / "other.h5")
    with h5py.File(path, "w") as file:
        file["data/0"] = np.zeros(1000)
    refused(path, "plain HDF5")
    for data in (b"", b"x", b"x" * 100_000, fmt.MAGIC, b"PK\3\4" + bytes(1000)):
        with open(path, "wb") as file:
            file.write(data)
        refused(path, "cut short" if data == fmt.MAGIC else "no leanreplay file")


def test_user_block_of_another_program(tmp_path):
    """G7: an HDF5 file with somebody else's user block."""
    path = str(tmp_path / "other.h5")
    with h5py.File(path, "w", userblock_size=16384) as file:
        file["data/0"] = np.zeros(10)
    refused(path, "no leanreplay file")


@pytest.mark.parametrize("version", [0, 2, 3, 2**32 - 1])
def test_other_versions(path, version):
    """G7: a newer format version says to upgrade, whatever else is in the file."""
    overwrite(path, 8, version.to_bytes(4, "little"))
    refused(path, f"format version {version}, but this release reads 1")
    with pytest.raises(lr.FormatError, match="upgrade" if version > 1 else "damaged"):
        lr.open(path)


def test_cut_short(path):
    """G7: a file that ends early, at any length, is refused; one with bytes added at the end is as good as before."""
    size = os.path.getsize(path)
    table = table_of(path)
    edges = [at for at, _ in table.columns] + [table.journal, table.user_block, fmt.TABLE_AT, fmt.TABLE_AT + 100, 63, 64, 8, 12, size]
    lengths = {0, 1, *range(0, size, 1111), *(e - 1 for e in edges), *(e for e in edges if e < size)}
    with open(path, "rb") as file:
        data = file.read()
    for length in sorted(lengths):
        with open(path, "wb") as file:
            file.write(data[:length])
        for mode in ("r", "r+"):
            with pytest.raises(lr.FormatError, match=r"cut short|no leanreplay file|checksum"):
                lr.ReservoirBuffer(path=path, mode=mode)
        assert os.path.getsize(path) == length
    with open(path, "wb") as file:
        file.write(data + b"appended")
    with lr.open(path, "r+") as buffer:
        assert len(buffer) == 6 and buffer.check() == []


def crafted(table, **changes):
    """The table with changes, checksummed as if a hostile program had written it."""
    made = copy.copy(table)
    for name, value in changes.items():
        setattr(made, name, value)
    return made.encode()


def lists(table, field, row, column, value):
    pairs = [list(p) for p in getattr(table, field)]
    pairs[row][column] = value
    return {field: pairs}


HUGE = 2**61
TABLES = {
    "max_size 0": lambda t: {"max_size": 0},
    "max_size negative": lambda t: {"max_size": -1},
    "max_size more": lambda t: {"max_size": t.max_size + 1000},
    "max_size huge": lambda t: {"max_size": HUGE},
    "max_size float": lambda t: {"max_size": 6.0},
    "max_size text": lambda t: {"max_size": "6"},
    "max_size None": lambda t: {"max_size": None},
    "max_size bool": lambda t: {"max_size": True},
    "file larger": lambda t: {"file_size": t.file_size + fmt.PAGE},
    "file huge": lambda t: {"file_size": HUGE},
    "file smaller": lambda t: {"file_size": t.file_size - fmt.PAGE * 3},
    "file odd": lambda t: {"file_size": t.file_size - 1},
    "column before": lambda t: lists(t, "columns", 0, 0, 0),
    "column negative": lambda t: lists(t, "columns", 0, 0, -fmt.PAGE),
    "column beyond": lambda t: lists(t, "columns", 0, 0, t.file_size),
    "column huge": lambda t: lists(t, "columns", 0, 0, HUGE),
    "column overflow": lambda t: lists(t, "columns", 0, 0, 2**63),
    "column overlaps": lambda t: lists(t, "columns", 0, 0, t.columns[1][0]),
    "column odd": lambda t: lists(t, "columns", 0, 0, t.columns[0][0] + 8),
    "column wide": lambda t: lists(t, "columns", 0, 1, t.columns[0][1] + 1),
    "index wide": lambda t: lists(t, "columns", -3, 1, 16),
    "column text": lambda t: lists(t, "columns", 0, 0, "4096"),
    "columns fewer": lambda t: {"columns": t.columns[1:]},
    "columns none": lambda t: {"columns": []},
    "columns no pairs": lambda t: {"columns": [[1]] * len(t.columns)},
    "columns number": lambda t: {"columns": 5},
    "journal beyond": lambda t: {"journal": t.file_size},
    "journal in the table": lambda t: {"journal": fmt.TABLE_AT},
    "journal rows 0": lambda t: {"journal_rows": 0},
    "journal rows more": lambda t: {"journal_rows": 10**6},
    "journal rows huge": lambda t: {"journal_rows": HUGE},
    "user block": lambda t: {"user_block": t.file_size},
    "structure beyond": lambda t: {"structure": [[t.file_size, 1]]},
    "structure negative": lambda t: {"structure": [[-1, 1]]},
    "structure text": lambda t: {"structure": "ab"},
    "structure hash": lambda t: {"structure_hash": 5},
    "seed huge": lambda t: {"seed": 2**127},
    "seed text": lambda t: {"seed": "0"},
    "stream": lambda t: {"stream": fmt.MAX_STREAM + 1},
    "kind": lambda t: {"kind": 5},
    "params": lambda t: {"params": []},
    "first": lambda t: {"params": {"first": "x"}},
    "uuid short": lambda t: {"uuid": "abc"},
    "uuid no hex": lambda t: {"uuid": "_" * 32},
    "uuid signed": lambda t: {"uuid": "+" + "0" * 31},
    "uuid None": lambda t: {"uuid": None},
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_that_lie(path, case):
    """G7: offsets, shapes and counts outside the file are refused though every checksum is right."""
    table = table_of(path)
    overwrite(path, 0, crafted(table, **TABLES[case](table))[: fmt.PAGE])
    overwrite(path, fmt.TABLE_AT, crafted(table, **TABLES[case](table))[fmt.TABLE_AT :])
    refused(path, "inconsistent table")


GROUPED_TABLES = {
    "log before": lambda t: {"log": (0, t.log[1])},
    "log in the table": lambda t: {"log": (fmt.TABLE_AT, t.log[1])},
    "log overlaps": lambda t: {"log": (t.columns[0][0], t.log[1])},
    "log in the journal": lambda t: {"log": (t.journal, t.log[1])},
    "log negative": lambda t: {"log": (-fmt.PAGE, t.log[1])},
    "log odd": lambda t: {"log": (t.log[0] + 16, t.log[1])},
    "log beyond": lambda t: {"log": (t.file_size, t.log[1])},
    "log huge offset": lambda t: {"log": (HUGE, t.log[1])},
    "log longer": lambda t: {"log": (t.log[0], t.file_size)},
    "log huge": lambda t: {"log": (t.log[0], HUGE)},
    "log overflow": lambda t: {"log": (t.log[0], 2**60 - 1)},
    "log of -1": lambda t: {"log": (t.log[0], -1)},
    "log float": lambda t: {"log": (t.log[0], 16.0)},
    "log bool": lambda t: {"log": (t.log[0], True)},
    "log text": lambda t: {"log": ["a", "b"]},
    "log number": lambda t: {"log": 5},
    "log None": lambda t: {"log": None},
    "log of one": lambda t: {"log": [t.log[0]]},
    "log over freed rows": lambda t: {"max_size": t.max_size + 2**20},
    "journal at the end": lambda t: {"journal": t.file_size - fmt.PAGE, "journal_rows": 2000},
}


@pytest.mark.parametrize("case", GROUPED_TABLES)
def test_tables_that_lie_about_the_log(grouped, case):
    """G7: a log, or a journal with room for freed rows, that lies outside the file or on top of something else is refused."""
    table = table_of(grouped)
    data = crafted(table, **GROUPED_TABLES[case](table))
    overwrite(grouped, 0, data[: fmt.PAGE])
    overwrite(grouped, fmt.TABLE_AT, data[fmt.TABLE_AT :])
    refused(grouped, "inconsistent table")


class Raw:
    """A schema of any JSON."""

    def __init__(self, value):
        self.value = value
        self.fields = ()

    def to_json(self):
        return self.value


def first(change):
    def apply(value):
        value["data"][0].update(change)

    return apply


def put(**change):
    return lambda value: value.update(change)


def nested(depth):
    structure = ["leaf", 0]
    for _ in range(depth):
        structure = ["list", structure]
    return structure


SCHEMAS = {
    "dtype object": first({"dtype": "|O"}),
    "dtype fields": first({"dtype": "f4,f8"}),
    "dtype call": first({"dtype": "( 08)f4"}),
    "dtype unicode": first({"dtype": "<U4"}),
    "dtype datetime": first({"dtype": "<M8[s]"}),
    "dtype big-endian": first({"dtype": ">f4"}),
    "dtype huge": first({"dtype": "|S99999999999"}),
    "dtype nothing": first({"dtype": "|S0"}),
    "dtype number": first({"dtype": 5}),
    "shape negative": first({"shape": [-1]}),
    "shape huge": first({"shape": [2**40, 2**40]}),
    "shape zero": first({"shape": [0]}),
    "shape text": first({"shape": "23"}),
    "shape float": first({"shape": [2.0]}),
    "shape deep": first({"shape": [1] * 40}),
    "shape other": first({"shape": [2, 4]}),
    "name": first({"name": "../x"}),
    "torch": first({"torch": "float8"}),
    "torch bits": first({"torch": "bfloat16"}),
    "no data": put(data=[]),
    "data None": put(data=None),
    "leaf twice": put(structure=["tuple", ["leaf", 0], ["leaf", 0]]),
    "leaf beyond": put(structure=["leaf", 10**9]),
    "structure text": put(structure="leaf"),
    "structure empty": put(structure=[]),
    "structure kind": put(structure=["set", ["leaf", 0]]),
    "structure deep": put(structure=nested(500)),
    "key path": put(structure=["dict", ["../..", ["leaf", 0]]]),
    "metadata name": lambda v: v["metadata"][0].update(name="metadata/a/b"),
    "metadata outside": lambda v: v["metadata"][0].update(name="index/position"),
    "metadata twice": lambda v: v["metadata"].append(dict(v["metadata"][0])),
    "no metadata list": put(metadata=5),
}


@pytest.mark.parametrize("case", SCHEMAS)
def test_schemas_that_lie(path, case):
    """G7: a schema of impossible dtypes, shapes, names or nesting is refused; nothing in it is evaluated."""
    table = table_of(path)
    value = json.loads(json.dumps(table.schema.to_json()))
    SCHEMAS[case](value)
    data = crafted(table, schema=Raw(value))
    overwrite(path, 0, data[: fmt.PAGE])
    overwrite(path, fmt.TABLE_AT, data[fmt.TABLE_AT :])
    refused(path, "inconsistent table")


@pytest.mark.parametrize("text", [b"[" * 3000, b"5", b"null", b'{"a": 1}', b"{", b"\xff\xfe", b'{"schema": []}', b"9" * 5000])
def test_tables_that_are_none(path, text):
    """G7: JSON that is no table, or no JSON, under a right checksum."""
    table = table_of(path)
    preamble = fmt._PREAMBLE.pack(fmt.MAGIC, 1, 0, table.user_block, len(text), fmt._digest(table.user_block, text))
    overwrite(path, 0, preamble)
    overwrite(path, fmt.TABLE_AT, text)
    refused(path, "inconsistent table")


def headers(path, **changes):
    """Write both headers with some words changed, sealed as right ones are; a function is given the word's value."""
    from leanreplay.kernels import rows as kernel

    for at in fmt.HEADERS:
        words = np.zeros(fmt.HEADER_WORDS, np.uint64)
        with open(path, "rb") as file:
            block = np.frombuffer(file.read()[at : at + 8 * fmt.HEADER_WORDS], np.uint8)
        if not kernel.read_block(block, 0, words):
            continue
        for name, value in changes.items():
            word = getattr(fmt, name)
            words[word] = value(int(words[word])) if callable(value) else value
        made = np.zeros(8 * fmt.HEADER_WORDS, np.uint8)
        kernel.seal_block(made, 0, words, fmt.H_STATE)
        overwrite(path, at, made.tobytes())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"H_SIZE": 7, "H_HIGH": 7}, "counts 7 of 6"),
        ({"H_SIZE": 2**63, "H_HIGH": 2**63}, "counts"),
        ({"H_SIZE": 2, "H_HIGH": 2**64 - 1}, "header"),
        ({"H_SIZE": 5, "H_HIGH": 4}, "counts 5"),
        ({"H_SEEN": 2**63}, "header"),
        ({"H_TAG": 5}, "neither header"),
        ({"H_LOG": 1}, "log has 1 of 0 entries"),
        ({"H_LOG": 2**64 - 1}, "of 0 entries"),
    ],
    ids=str,
)
def test_headers_that_lie(path, changes, word, monkeypatch):
    """G7: counts in the headers that do not fit the file, under right checksums."""
    monkeypatch.setattr("leanreplay.storage.store._PATIENCE", 0.0)
    headers(path, **changes)
    for mode in ("r", "r+"):
        with pytest.raises(lr.FormatError, match=word) as caught:
            lr.ReservoirBuffer(path=path, mode=mode)
        assert "restore the file" in str(caught.value)


@pytest.mark.parametrize("count", [lambda n: 4097, lambda n: 2**60, lambda n: 2**63, lambda n: 2**64 - 1])
def test_headers_that_count_too_many_entries_of_a_log(grouped, count, monkeypatch):
    """G7: a log longer than the file has room for is refused, whatever its hash."""
    monkeypatch.setattr("leanreplay.storage.store._PATIENCE", 0.0)
    headers(grouped, H_LOG=count)
    for mode in ("r", "r+"):
        with pytest.raises(lr.FormatError, match=r"its log has \d+ of 4096 entries; restore the file"):
            lr.open(grouped, mode)


@pytest.mark.parametrize(
    "changes",
    [{"H_LOG": lambda n: n + 1}, {"H_LOG": 0}, {"H_LOG": 4096}, {"H_LOG_HASH": lambda h: h ^ 1}],
    ids=["one more", "none", "all", "hash"],
)
def test_logs_that_do_not_match(grouped, changes, monkeypatch):
    """G7: a log whose hash is not the header's: rows can be read, but groups and writing are refused, and check() says so."""
    monkeypatch.setattr("leanreplay.storage.store._PATIENCE", 0.0)
    headers(grouped, **changes)
    for mode in ("r", "r+"):
        with lr.open(grouped, mode) as buffer:
            assert len(buffer.sample(12)[1]["idx"]) == 12
            assert any("log fails its checksum" in p.what for p in buffer.check())
            for action in (buffer.group_sizes, lambda b=buffer: b.group_rows(0), lambda b=buffer: b.groups[0]):
                with pytest.raises(lr.CorruptionError, match="log fails its checksum"):
                    action()
            if mode == "r+":
                before = snapshot_of(grouped)
                for action in (lambda b=buffer: feed_grouped(b, 60, 3), lambda b=buffer: b.resize(5)):
                    with pytest.raises(lr.CorruptionError, match="log fails its checksum"):
                        action()
                assert snapshot_of(grouped) == before


def snapshot_of(path):
    with open(path, "rb") as file:
        return file.read()


def test_every_byte_of_the_log_is_checked(grouped, monkeypatch):
    """G7: any changed byte of the entries that count is noticed; one behind them does not matter."""
    monkeypatch.setattr("leanreplay.storage.store._PATIENCE", 0.0)
    at = table_of(grouped).log[0]
    data = snapshot_of(grouped)
    for byte in range(16 * len(LOG) + 16):
        overwrite(grouped, at + byte, bytes([data[at + byte] ^ (1 << byte % 8)]))
        with lr.open(grouped) as buffer:
            if byte < 16 * len(LOG):
                with pytest.raises(lr.CorruptionError, match="log fails its checksum"):
                    buffer.group_sizes()
            else:
                assert buffer.group_sizes() == GROUP_SIZES
        overwrite(grouped, at + byte, data[at + byte : at + byte + 1])


def test_a_damaged_index_is_noticed_before_it_is_used(grouped):
    """G7: any changed byte of a live row's position or group: a writer neither plans with it nor tells of groups by it."""
    table = table_of(grouped)
    data = snapshot_of(grouped)
    with lr.open(grouped) as buffer:
        rows = buffer.get_metadata("idx").tolist()
    for at, _ in table.columns[-3:-1]:
        for byte in (at + 8 * row + i for row in rows for i in range(8)):
            overwrite(grouped, byte, bytes([data[byte] ^ (1 << byte % 7)]))
            with lr.open(grouped, "r+") as buffer:
                before = snapshot_of(grouped)
                for action in (buffer.group_sizes, lambda b=buffer: feed_grouped(b, 60, 3), lambda b=buffer: b.groups[0]):
                    with pytest.raises(lr.CorruptionError, match=r"checksums|do not add up|live rows"):
                        action()
            assert snapshot_of(grouped) == before, byte
            overwrite(grouped, byte, data[byte : byte + 1])
    with lr.open(grouped, "r+") as buffer:
        assert buffer.check() == []


PARAMS = {
    "total missing": {"adaptive_size": False},
    "total None": {"adaptive_size": False, "total_num_classes": None},
    "total 0": {"adaptive_size": False, "total_num_classes": 0},
    "total negative": {"adaptive_size": False, "total_num_classes": -5, "borrow": False},
    "total huge": {"adaptive_size": False, "total_num_classes": 2**70},
    "total more than rows": {"adaptive_size": False, "total_num_classes": 16},
    "total text": {"adaptive_size": False, "total_num_classes": "7"},
    "total float": {"adaptive_size": False, "total_num_classes": 7.5},
    "total list": {"adaptive_size": False, "total_num_classes": [7]},
    "total bool": {"adaptive_size": False, "total_num_classes": True},
    "adaptive text": {"adaptive_size": "no", "total_num_classes": 7},
    "adaptive list": {"adaptive_size": [], "total_num_classes": 7},
    "borrow list": {"adaptive_size": True, "borrow": [1]},
    "nothing": {},
    "another's": {"first": 3, "num_experiences": -1, "adaptive_size": False},
}
PARAMS_WORK = """
import sys, warnings
import numpy as np
import leanreplay as lr
warnings.simplefilter("ignore")
for mode in ("r", "r+"):
    try:
        buffer = lr.open(sys.argv[1], mode)
    except lr.FormatError as error:
        print("refused")
        continue
    x, _ = buffer.get(buffer.get_metadata("idx")[[0] * 9])
    z = {"logits": np.zeros((9, 2), np.float32)}
    for action in (
        lambda: buffer.get_group_lengths(3), buffer.group_sizes, buffer.check, lambda: buffer.adaptive_size, lambda: repr(buffer),
        lambda: buffer.add(x, metadata=z, group=np.array([0, 7, 11] * 3)), lambda: buffer.add(x, metadata=z, group=np.arange(9)),
        lambda: buffer.resize(9), lambda: buffer.resize(3), buffer.group_sizes, buffer.check,
    ):
        try:
            action()
        except lr.LeanReplayError as error:
            assert str(error)
    buffer.close()
print("done")
"""


@pytest.mark.parametrize("case", PARAMS)
def test_parameters_that_lie(grouped, case):
    """G7: parameters of the wrong kind or out of range under a right checksum: refused, or no worse than other parameters."""
    data = crafted(table_of(grouped), params=PARAMS[case])
    overwrite(grouped, 0, data[: fmt.PAGE])
    overwrite(grouped, fmt.TABLE_AT, data[fmt.TABLE_AT :])
    ran = Script(PARAMS_WORK, grouped)  # in a process of its own: a wrong number could crash a kernel
    out, errors = ran.communicate(60)
    assert ran.returncode == 0 and out.endswith("done\n"), (ran.returncode, errors[-600:])


def test_headers_that_count_too_few(path, monkeypatch):
    """G7: counts that fit the file but not its rows are errors of our own, in any call."""
    monkeypatch.setattr("leanreplay.storage.store._PATIENCE", 0.0)
    headers(path, H_SIZE=3)
    with lr.open(path) as buffer:
        with pytest.raises(lr.CorruptionError, match="free"):
            buffer.sample(2)
        assert any("header" in p.what for p in buffer.check())
    with lr.open(path, "r+") as buffer:
        for action in (lambda: buffer.sample(2), lambda: buffer[0], lambda: feed(buffer, 40, 5), lambda: buffer.resize(3)):
            with pytest.raises(lr.CorruptionError):
                action()


# -- check and the HDF5 structure ----------------------------------------------------------------------------------------


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
