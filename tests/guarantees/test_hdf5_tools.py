"""HDF5 tools that open a buffer's file for writing: without changes it keeps every byte, with theirs it keeps every sample."""

from __future__ import annotations

import os

import h5py
import numpy as np
import pytest

import leanreplay as lr
from leanreplay.storage import layout as fmt
from leanreplay.storage.create import plan_file


def pairs(start, n):
    p = np.arange(start, start + n)
    return p[:, None] * 0.5 + np.arange(3), p % 5


def read(path):
    with open(path, "rb") as file:
        return file.read()


def opened_for_writing(path):
    """What pandas.HDFStore(path) does: open it for reading and writing, write nothing, close."""
    before = read(path)
    h5py.File(path, "r+").close()
    return read(path) == before


KINDS = {
    "reservoir": lambda path: lr.ReservoirBuffer(10, path),
    "one row": lambda path: lr.ReservoirBuffer(1, path),
    "window": lambda path: lr.SlidingWindowBuffer(700, path),
    "greedy": lambda path: lr.GreedyClassBalancingBuffer(513, path),
    "with a log": lambda path: lr.ClassBalancedBuffer(9, path),
    "experiences": lambda path: lr.ExperienceBalancedBuffer(9, path),
    "cbrs": lambda path: lr.ClassBalancingReservoirBuffer(9, path),
    "whole journal": lambda path: lr.ParametricBuffer(9, path, groupby="class"),
    "weighted": lambda path: lr.WeightedReservoirBuffer(9, path),
    "folder": lambda path: lr.InfiniteBuffer(path, rows_per_part=6),
}


def feed(buffer, start, n):
    buffer.add(pairs(start, n), **({"weights": np.ones(n)} if isinstance(buffer, lr.WeightedReservoirBuffer) else {}))


def files_of(path):
    return sorted(os.path.join(path, name) for name in os.listdir(path) if name.endswith(".h5")) if os.path.isdir(path) else [path]


@pytest.mark.parametrize("kind", KINDS)
def test_opened_for_writing_by_hdf5(kind, tmp_path):
    """The file keeps every byte, the writer beside it goes on, and so does the next one."""
    path = str(tmp_path / "replay.h5")
    with KINDS[kind](path) as buffer:
        feed(buffer, 0, 20)
        assert all(map(opened_for_writing, files_of(path)))
        feed(buffer, 20, 20)
        assert buffer.check() == []
    assert all(map(opened_for_writing, files_of(path)))
    with lr.open(path, "r+") as buffer:
        feed(buffer, 40, 5)
        assert buffer.seen == 45 and buffer.check() == []


def test_files_made_from_files(tmp_path):
    """Resized ones, ones with a new field, copies, what was loaded and merged."""
    path, folder, merged = str(tmp_path / "replay.h5"), str(tmp_path / "copy"), str(tmp_path / "merged.h5")
    with lr.ReservoirBuffer(50, path) as buffer:
        feed(buffer, 0, 40)
        buffer.resize(33)
        assert opened_for_writing(path) and buffer.check() == []
        buffer.set_metadata("z", np.zeros((33, 7), np.float16))
        assert opened_for_writing(path) and buffer.check() == []
        buffer.save(folder)
        assert opened_for_writing(os.path.join(folder, "buffer.h5"))
        buffer.load(folder)
        assert opened_for_writing(path) and buffer.check() == []
        lr.merge([buffer], merged, stream=1).close()
        assert opened_for_writing(merged)
    for name in (path, merged):
        with lr.open(name) as buffer:
            assert len(buffer) == 33 and buffer.check() == []


def test_the_superblock_ends_the_file_where_the_table_does():
    """For any size: also where HDF5's last byte is the last of a page, there is one behind it that it never gives away."""
    last = set()
    for n in (*range(1, 40), 511, 512, 513, 4095, 4096, 10**6, 10**12):
        schema = lr.Schema.from_sample((np.zeros(n % 7 + 1, np.uint8), 1), metadata={f"m{i}": 0.0 for i in range(n % 3)})
        table, pieces = plan_file("ReservoirBuffer", {}, n, 0, 0, schema, slots=n % 2)
        block = dict(pieces)[table.user_block]
        end = max(stop for _, stop in table.regions)
        assert int.from_bytes(block[40:48], "little") == table.file_size > end and table.file_size % fmt.PAGE == 0
        last.add(table.file_size - end)
    assert len(last) > 3


def change(path):
    """What an HDF5 user may add: attributes, large and small, and datasets, also within our groups."""
    with h5py.File(path, "a") as file:
        for i in range(30):
            file.attrs[f"note {i}"] = "x" * 2000
        file["data/0"].attrs["unit"] = "metres"
        for i in range(40):
            file[f"index/something else, of a long name, {i}"] = np.full(500, i)
            file[f"results of the day {i}"] = np.full(500, i)


def take_back(path):
    with h5py.File(path, "a") as file:
        for name in list(file.attrs):
            del file.attrs[name]
        for i in range(40):
            del file[f"index/something else, of a long name, {i}"], file[f"results of the day {i}"]


@pytest.mark.parametrize("kind", ["reservoir", "with a log", "whole journal", "folder"])
def test_attributes_and_datasets_of_others(kind, tmp_path):
    """Every sample stays, the writer beside it goes on, a copy has what was added, and check() says that the structure changed."""
    path, folder = str(tmp_path / "replay.h5"), str(tmp_path / "copy")
    with KINDS[kind](path) as buffer:
        feed(buffer, 0, 20)
        state = buffer.state_dict()
        held = buffer.get(buffer.get_metadata("idx"))
        changed = files_of(path)
        for name in changed:
            change(name)
        again = buffer.get(buffer.get_metadata("idx"))
        assert all(np.array_equal(a, b) for a, b in zip(held[0], again[0], strict=True))
        feed(buffer, 20, 10)
        for name in changed:
            with h5py.File(name) as file:
                assert file["results of the day 7"][3] == 7 and sum(key.startswith("note") for key in file.attrs) == 30
        buffer.save(folder)
        buffer.load_state_dict(state)
        again = buffer.get(buffer.get_metadata("idx"))
        assert all(np.array_equal(a, b) for a, b in zip(held[0], again[0], strict=True))
        assert all("structure was changed" in p.what for p in buffer.check()) and buffer.check()
    copies = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names]
    for name in (os.path.basename(name) for name in changed):
        (copy,) = (c for c in copies if os.path.basename(c) == (name if kind == "folder" else "buffer.h5"))
        with h5py.File(copy) as file:
            assert file["results of the day 39"][0] == 39
    for name in changed:
        take_back(name)
    with lr.open(path, "r+") as buffer:
        again = buffer.get(buffer.get_metadata("idx"))
        assert all(np.array_equal(a, b) for a, b in zip(held[0], again[0], strict=True))
        feed(buffer, 20, 10)
        buffer.load(folder)
        assert buffer.seen == 30
    with lr.open(path) as buffer:
        assert len(buffer.sample(4)[1]["idx"]) == 4


def test_a_dataset_of_ours_is_deleted(tmp_path):
    """If HDF5 gives our bytes away, the file is refused or what is wrong is said, never read as if nothing were."""
    path = str(tmp_path / "replay.h5")
    with lr.ReservoirBuffer(2000, path) as buffer:
        feed(buffer, 0, 2000)
    with h5py.File(path, "r+") as file:
        del file["data/0"], file["data/1"], file["index/checksum"]
        for i in range(20):
            file[f"new {i}"] = np.full(1000, 7.0)
    try:
        with lr.open(path) as buffer:
            assert len(buffer.check()) > 1
            with pytest.raises(lr.CorruptionError):
                buffer.get(np.arange(2000))
    except lr.FormatError as error:
        assert "cut short" in str(error)
