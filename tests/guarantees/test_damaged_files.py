"""G7: files cut short, of other versions, with tables, schemas and headers that lie, are refused."""

from __future__ import annotations

import json
import os

import h5py
import numpy as np
import pytest
from interpreter import Script
from stored_files import GROUP_SIZES, LOG, crafted, feed, feed_grouped, overwrite, table_of

import leanreplay as lr
from leanreplay.storage import layout as fmt


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
    from storage_kernels import kernel

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
    monkeypatch.setattr("leanreplay.storage.locks.PATIENCE", 0.0)
    headers(path, **changes)
    for mode in ("r", "r+"):
        with pytest.raises(lr.FormatError, match=word) as caught:
            lr.ReservoirBuffer(path=path, mode=mode)
        assert "restore the file" in str(caught.value)


@pytest.mark.parametrize("count", [lambda n: 4097, lambda n: 2**60, lambda n: 2**63, lambda n: 2**64 - 1])
def test_headers_that_count_too_many_entries_of_a_log(grouped, count, monkeypatch):
    """G7: a log longer than the file has room for is refused, whatever its hash."""
    monkeypatch.setattr("leanreplay.storage.locks.PATIENCE", 0.0)
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
    monkeypatch.setattr("leanreplay.storage.locks.PATIENCE", 0.0)
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
    monkeypatch.setattr("leanreplay.storage.locks.PATIENCE", 0.0)
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
    monkeypatch.setattr("leanreplay.storage.locks.PATIENCE", 0.0)
    headers(path, H_SIZE=3)
    with lr.open(path) as buffer:
        with pytest.raises(lr.CorruptionError, match="free"):
            buffer.sample(2)
        assert any("header" in p.what for p in buffer.check())
    with lr.open(path, "r+") as buffer:
        for action in (lambda: buffer.sample(2), lambda: buffer[0], lambda: feed(buffer, 40, 5), lambda: buffer.resize(3)):
            with pytest.raises(lr.CorruptionError):
                action()
