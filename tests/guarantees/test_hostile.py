"""G7: files that lie under right checksums, number by number, for every kind of buffer.

A forked child opens each, reads, checks, feeds, marks, rolls back and resizes. Whatever a file says, that works, or it is a
LeanReplayError: never a crash, a hang, memory beyond what the file has, or a raw error.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import resource
import signal
import tempfile
import traceback
import tracemalloc
import warnings

import h5py  # noqa: F401  (loaded before children fork)
import numpy as np
import pytest
from children import child, result
from nightly import times
from paths import in_memory
from storage_kernels import kernel

import leanreplay as lr
from leanreplay import merge as merge_module
from leanreplay.storage import layout as fmt
from leanreplay.storage import locks, segment
from leanreplay.storage.create import plan_file

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="opens hostile files in forked children")

CAPACITY = 12
KINDS = {
    "reservoir": lambda path: lr.ReservoirBuffer(CAPACITY, path),
    "window": lambda path: lr.SlidingWindowBuffer(CAPACITY, path),
    "greedy": lambda path: lr.GreedyClassBalancingBuffer(CAPACITY, path),
    "class": lambda path: lr.ClassBalancedBuffer(CAPACITY, path),
    "total": lambda path: lr.ClassBalancedBuffer(CAPACITY, path, adaptive_size=False, total_num_classes=4),
    "borrow": lambda path: lr.ExperienceBalancedBuffer(CAPACITY, path, borrow=True),
    "cbrs": lambda path: lr.ClassBalancingReservoirBuffer(CAPACITY, path),
    "weighted": lambda path: lr.WeightedReservoirBuffer(CAPACITY, path),
    "scored": lambda path: lr.ScoredBuffer(CAPACITY, path, evict="proportional"),
    "parametric": lambda path: lr.ParametricBuffer(CAPACITY, path, groupby="class"),
    "folder": lambda path: lr.InfiniteBuffer(path, rows_per_part=CAPACITY),
}
NUMBERS = (0, 1, -1, 2, CAPACITY - 1, CAPACITY + 1, 2**31, 2**47, 2**61, 2**63, 2**64 - 1, 2**70)
OTHERS = (None, True, 1.0, float("nan"), "x", "", [], [1], [[0, 0]], {}, {"a": 1})
WORDS = (0, 1, CAPACITY - 1, CAPACITY + 1, 2**31, 2**62, 2**63 - 1, 2**64 - 1)


def feed(buffer, start, n):
    p = np.arange(start, start + n)
    batch = p[:, None] * np.ones(5, np.uint8), p % 4
    if isinstance(buffer, lr.WeightedReservoirBuffer):
        buffer.add(batch, weights=1.0 + p % 3)
    elif isinstance(buffer, lr.ScoredBuffer):
        buffer.add(batch, scores=1.0 + p % 3)
    elif isinstance(buffer, lr.ExperienceBalancedBuffer):
        buffer.add(batch, experience=start // 20)
    else:
        buffer.add(batch)


class Base:
    """The files of a buffer that has a restore point and rows changed since, and its state then."""

    def __init__(self, make, path):
        self.path, self.files = path, {}
        with make(path) as buffer:
            feed(buffer, 0, 10)
            self.state = buffer.state_dict()
            feed(buffer, 10, 14)
            store = buffer.current.store
            self.table = getattr(store, "stores", [store])[0].layout
        self.folder = os.path.isdir(path)
        self.main = os.path.join(path, "part-000000.h5") if self.folder else path
        parent = path if self.folder else os.path.dirname(path)
        for name in os.listdir(parent):
            full = os.path.join(parent, name)
            if full.startswith(path):
                with open(full, "rb") as file:
                    self.files[full] = file.read()

    def lay_out(self, changed):
        """Write the files, those in `changed` (path -> bytes) changed."""
        parent = self.path if self.folder else os.path.dirname(self.path)
        for name in os.listdir(parent):
            full = os.path.join(parent, name)
            if full not in self.files and full.startswith(self.path):
                os.unlink(full)
        for name, data in {**self.files, **changed}.items():
            with open(name, "wb") as file:
                file.write(data)


@pytest.fixture(scope="module")
def bases():
    made = {}
    with tempfile.TemporaryDirectory(dir=in_memory(), ignore_cleanup_errors=True) as folder:
        for name, make in KINDS.items():
            os.mkdir(os.path.join(folder, name))
            made[name] = Base(make, os.path.join(folder, name, "replay"))
            use(made[name])  # compiles what it takes before anything forks
        yield made


def use(base):
    """Do what can be done with a buffer; what went wrong, which is nothing if each error is a LeanReplayError."""
    wrong = []
    for mode in ("r", "r+"):
        try:
            buffer = lr.open(base.path, mode)
        except lr.LeanReplayError:
            continue
        actions = [
            lambda b=buffer: b.sample(min(4, len(b))),
            lambda b=buffer: b.get(np.arange(CAPACITY)),
            lambda b=buffer: b[0],
            lambda b=buffer: repr(b),
            lambda b=buffer: b.get_metadata("idx"),
            lambda b=buffer: b.check(),
            lambda b=buffer: b.group_sizes() if isinstance(b, lr.BalancedBuffer) else 0,
            lambda b=buffer: lr.merge([b], max_size=5).close(),
            lambda: lr.merge([base.path], max_size=5).close(),
        ]
        if mode == "r+":
            actions += [
                lambda b=buffer: feed(b, b.seen, 6),
                lambda b=buffer: b.load_state_dict(base.state),
                lambda b=buffer: b.state_dict(),
                lambda b=buffer: feed(b, b.seen, 30),
                lambda b=buffer: b.set_metadata("z", np.zeros(len(b))),
                lambda b=buffer: b.resize(CAPACITY - 3),
                lambda b=buffer: feed(b, b.seen, 30),
                lambda b=buffer: b.check(),
            ]
        for number, action in enumerate(actions):
            try:
                action()
            except lr.LeanReplayError:
                pass
            except BaseException:
                wrong.append(f"mode {mode}, action {number}: {traceback.format_exc()[-700:]}")
        buffer.close()
    return wrong


def survive(base, mutants, work=use):
    """Use some of `mutants(base)`, which are (name, changed files), in a forked child: which ones follows from the path, nightly all."""
    count = sum(1 for _ in mutants(base))
    chosen = set(random.Random(os.path.basename(os.path.dirname(base.path))).sample(range(count), min(count, times(8, count))))

    def run(pipe):
        locks.PATIENCE = 0.0
        merge_module._PATIENCE = 0.0
        with open("/proc/self/status") as file:
            used = next(int(line.split()[1]) for line in file if line.startswith("VmSize")) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), resource.RLIM_INFINITY))
        wrong = []
        for number, (name, changed) in enumerate(mutants(base)):
            if number not in chosen:
                continue
            os.pwrite(note, f"{name!s:.300}".ljust(300).encode(), 0)
            base.lay_out(changed)
            signal.alarm(20)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wrong += [f"{name}: {text}" for text in work(base)]
        return wrong[:4]

    note = os.memfd_create("note")
    try:
        wrong = result(*child(run))
    except AssertionError as error:
        pytest.fail(f"at {os.pread(note, 300, 0).decode().strip()}: {error}")
    finally:
        os.close(note)
    assert not wrong, "\n".join(wrong)


def with_table(base, value, user_block=None):
    """The main file with another table, any JSON, under a right checksum."""
    text = value if isinstance(value, bytes) else json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
    block = base.table.user_block if user_block is None else user_block
    data = bytearray(base.files[base.main])
    data[:64] = fmt._PREAMBLE.pack(fmt.MAGIC, fmt.FORMAT_VERSION, 0, block, len(text), fmt._digest(block, text))
    data[fmt.TABLE_AT : fmt.TABLE_AT + len(text)] = text
    return {base.main: bytes(data)}


def plain(table):
    return json.loads(json.dumps(table.to_json()))


def places_in(value, path=()):
    """Paths to all values within a JSON value."""
    yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places_in(part, (*path, key))


def put(value, path, new):
    made = copy.deepcopy(value)
    *before, last = path
    at = made
    for key in before:
        at = at[key]
    at[last] = new
    return made


def drop(value, path):
    made = copy.deepcopy(value)
    *before, last = path
    at = made
    for key in before:
        at = at[key]
    del at[last]
    return made


def tables(base):
    value = plain(base.table)
    for path in places_in(value):
        if path:
            for new in (*NUMBERS, *OTHERS):
                yield (path, new), with_table(base, put(value, path, new))
            yield (path, "missing"), with_table(base, drop(value, path))
    for name in ("unknown", "first", "max_size", "path", "record", "__class__"):
        yield ("top", name), with_table(base, {**value, name: 1})
    fields = [f.name for f in dataclasses.fields(fmt.Layout)]
    for name in (
        *fields,
        "unknown",
        "first",
        "streams",
        "merged",
        "adaptive_size",
        "borrow",
        "uniform",
        "total_num_classes",
        "durable",
        "mode",
    ):
        for new in (*NUMBERS, None, True, "x", [1], [2**40], ["x"]):
            yield ("params", name, new), with_table(base, put(value, ("params", name), new))


@pytest.mark.parametrize("kind", KINDS)
def test_tables(bases, kind):
    """Every value of the table, of the schema and of the parameters within it: another number, another type, missing, unknown."""
    survive(bases[kind], tables)


def sealed(data, at, count, state, change):
    """A block of `data` with some words changed, sealed as right ones are."""
    words = np.frombuffer(bytes(data[at : at + 8 * count]), np.uint64).copy()
    change(words)
    block = np.zeros(8 * count, np.uint8)
    kernel.seal_block(block, 0, words, state)
    made = bytearray(data)
    made[at : at + 8 * count] = block.tobytes()
    return bytes(made)


def headers(base):
    data = base.files[base.main]
    for word in (*range(fmt.H_SEQ, fmt.H_POLICY + 2), fmt.H_DIGESTS - 1, fmt.H_DIGESTS):
        for value in WORDS:
            yield (word, value), {base.main: with_header(data, {word: value})}
    pairs = [{fmt.H_SIZE: a, fmt.H_HIGH: b, fmt.H_SEEN: c} for a in (0, 1, CAPACITY) for b in (0, CAPACITY) for c in (0, 1, 2**48 - 1)]
    for changes in (*pairs, {fmt.H_SEQ: 2**64 - 1}, {fmt.H_SEQ: 2**64 - 2}, {fmt.H_SEQ: 2**63}, {fmt.H_SEQ: 2**62 - 1}):
        yield changes, {base.main: with_header(data, changes)}


def with_header(data, changes):
    def change(words):
        for word, value in changes.items():
            words[word] = value

    for at in fmt.HEADERS:
        data = sealed(data, at, fmt.HEADER_WORDS, fmt.H_STATE, change)
    return data


@pytest.mark.parametrize("kind", ["reservoir", "window", "class", "weighted", "parametric", "folder"])
def test_headers(bases, kind):
    """Every word of the headers, the policy's among them, and counts that cannot be together."""
    survive(bases[kind], headers)


def rows_of(base):
    """Positions, groups and fields of live rows changed, checksums, digests and header made right again."""
    t, data = base.table, base.files[base.main]
    (p, _), (g, _) = t.columns[-3:-1]
    for name, at, values in (
        ("position", p, (-(2**63), -2, -1, 2**47, 2**62, 2**63 - 1)),
        ("group", g, (-(2**63), -1, 0, 2**62, 2**63 - 1, *np.array([np.nan, -1.0, np.inf, -0.0, 5e-324]).view(np.int64).tolist())),
        *((f.name, t.columns[i][0], (-1, 0, 7, 2**62)) for i, f in enumerate(t.schema.fields) if f.dtype.kind in "if" and f.nbytes == 8),
    ):
        for value in values:
            for which in (slice(0, 1), slice(None)):
                made = np.frombuffer(data, np.uint8).copy()
                made[at : at + 8 * CAPACITY].view(np.int64)[which] = value
                positions, groups = (made[a : a + 8 * CAPACITY].view(np.int64) for a in (p, g))
                rows = np.flatnonzero(positions >= 0)
                digests, cols = np.zeros(fmt.BUCKETS, np.uint64), np.array(t.columns, np.uint64)
                for f, (start, size) in enumerate(t.columns[:-3]):
                    data_of = made[start : start + size * CAPACITY].copy()
                    kernel.write_field(made, cols, f, rows, rows, data_of, positions[rows], groups[rows], digests)
                live, high = rows.shape[0], int(rows.max(initial=-1)) + 1
                changes = dict(enumerate(digests.tolist(), fmt.H_DIGESTS)) | {fmt.H_SIZE: live, fmt.H_HIGH: high}
                yield (name, value, which), {base.main: with_header(made.tobytes(), changes)}


@pytest.mark.parametrize("kind", KINDS)
def test_rows(bases, kind):
    """Positions beyond what was seen or twice, groups of any 64 bits (of weights too), labels and ranks: all checksums right."""
    survive(bases[kind], rows_of)


@pytest.mark.parametrize("kind", ["reservoir", "weighted"])
def test_a_hole(bases, kind):
    """A free row where the policy fills rows in order: it can be read, and is not fed, which would overwrite a live row."""
    base = bases[kind]
    base.lay_out(next(changed for (name, value, which), changed in rows_of(base) if (name, value, which.stop) == ("position", -1, 1)))
    with lr.open(base.path, "r+") as buffer:
        assert len(buffer) == CAPACITY - 1 and len(buffer.sample(5)[1]["idx"]) == 5
        with pytest.raises(lr.CorruptionError, match="1 free rows among those in use"):
            feed(buffer, buffer.seen, 3)
        assert buffer.seen == 24
    base.lay_out({})


def undo_files(base):
    name = f"{base.main}.undo.0"
    data = base.files[name]
    control, tail = segment.CONTROL_WORDS, segment.TAIL_WORDS
    for word in range(2, 2 + fmt.H_DIGESTS + 1):
        for value in WORDS:

            def change(words, word=word, value=value):
                words[word] = value
                head = words[2:-1].copy()
                kernel.seal_block(np.zeros(8 * fmt.HEADER_WORDS, np.uint8), 0, head, fmt.H_STATE)
                words[2:-1] = head

            yield ("control", word, value), {name: sealed(data, 0, control, 0, change)}
    for at in segment.TAILS:
        for word in range(2, tail - 1):
            for value in (*WORDS, 2**64 - 2, 3, 57):
                made = sealed(data, at, tail, 0, lambda words, word=word, value=value: words.__setitem__(word, value))
                yield ("tail", at, word, value), {name: made}
    for word in range(segment.FRAME_WORDS - 1):
        for value in WORDS:
            made = sealed(
                data, segment.FRAMES, segment.FRAME_WORDS, 0, lambda words, word=word, value=value: words.__setitem__(word, value)
            )
            yield ("frame", word, value), {name: made}


def roll_back(base):
    """First of all roll back, and then the rest."""
    wrong = []
    try:
        with lr.open(base.path, "r+") as buffer:
            buffer.load_state_dict(base.state)
            buffer.sample(min(4, len(buffer)))
            for _ in range(3):
                buffer.state_dict()
                feed(buffer, buffer.seen, 4)
    except lr.LeanReplayError:
        pass
    except BaseException:
        wrong.append(traceback.format_exc()[-700:])
    return wrong + use(base)


@pytest.mark.parametrize("kind", ["reservoir", "class", "parametric", "folder"])
def test_undo_files(bases, kind):
    """Every word of an undo file's control block, of its tails (2**64 - 1 writes before, any length) and of a frame."""
    survive(bases[kind], undo_files, roll_back)


def logs(base):
    known = [(0, g) for g in range(4)]
    for entries in (
        known[::-1], [], known[:2], [*known, known[0]], [(1, 0), *known], [*known, (1, 4)], [*known, (1, -1)], [*known, (1, 2**62)],
        [*known, (2, 0)], [*known, (-(2**63), 2**63 - 1)], [*known, *[(1, 0)] * 50], [(0, 2**63 - 1 - i) for i in range(60)],
    ):  # fmt: skip
        log = np.array(entries, np.int64).reshape(-1, 2)
        data = bytearray(base.files[base.main])
        data[base.table.log[0] : base.table.log[0] + log.nbytes] = log.tobytes()
        hashed = int(kernel.hash_log(np.uint64(0), log))
        yield entries, {base.main: with_header(bytes(data), {fmt.H_LOG: len(log), fmt.H_LOG_HASH: hashed})}


@pytest.mark.parametrize("kind", ["class", "total", "borrow", "cbrs", "parametric"])
def test_logs(bases, kind):
    """Entries of a log, its hash right: groups twice, unknown, any number; for the kinds that trust it, merged too."""
    survive(bases[kind], logs)


# -- what is refused, and how -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("reservoir", {"params": {"max_size": 1}}),
        ("reservoir", {"params": {"seed": 5}}),
        ("reservoir", {"params": {"first": 0}}),
        ("reservoir", {"params": {"durable": True}}),
        ("reservoir", {"params": {"streams": [2**20], "merged": 3}}),
        ("reservoir", {"structure": [[0, 2**16]] * 100}),
        ("class", {"params": {}}),
        ("class", {"log": (0, 0)}),
        ("cbrs", {"params": {"adaptive_size": False}}),
        ("parametric", {"params": {"adaptive_size": True}}),
        ("parametric", {"journal_rows": 1}),
        ("parametric", {"journal_rows": CAPACITY - 1}),
    ],
    ids=str,
)
def test_refused(bases, kind, change):
    """What would let a kernel write where it must not: a FormatError in every mode, by every way in."""
    base = bases[kind]
    value = plain(base.table)
    base.lay_out(with_table(base, {**value, **change}))
    for action in (lambda: lr.open(base.path), lambda: lr.open(base.path, "r+"), lambda: lr.merge([base.path])):
        with pytest.raises(lr.FormatError, match="inconsistent table"):
            action()
    base.lay_out({})
    lr.open(base.path).close()


def test_load_looks_at_the_table_too(tmp_path):
    """`load` takes a copy's file over: its parameters are looked at like those of any other."""
    path, folder = str(tmp_path / "replay.h5"), str(tmp_path / "copy")
    with lr.ReservoirBuffer(CAPACITY, path) as buffer:
        feed(buffer, 0, 30)
        buffer.save(folder)
        table, copied = buffer.current.store.layout, os.path.join(folder, "buffer.h5")
        text = dataclasses.replace(table, params={"max_size": 1}).encode()
        with open(copied, "r+b") as file:
            file.write(text[: fmt.PAGE])
            file.seek(fmt.TABLE_AT)
            file.write(text[fmt.TABLE_AT :])
        with pytest.raises(lr.FormatError, match="no parameters"):
            buffer.load(folder)
        feed(buffer, 30, 3)
        assert buffer.seen == 33 and buffer.check() == []


@pytest.mark.parametrize(
    "text",
    [
        "", "5", "[]", "{}", '{"format": 2, "draws": {}}', '{"format": 1, "draws": []}', '{"format": 1, "draws": {"sample": Infinity}}',
        '{"format": 1, "draws": {"sample": NaN}}', '{"format": 1, "draws": {"sample": "5"}}', '{"format": 1, "draws": {"sample": -1}}',
        '{"format": 1, "draws": {"sample": 1e400}}', '{"format": 1, "draws": {"sample": true}}', "[" * 5000, '{"draws": {}}', "9" * 5000,
        '{"format": 1, "draws": {"sample": 1}, "parts": ["a"]}', '{"format": 1, "draws": {"sample": 1}, "parts": {}}',
        '{"format": 1, "draws": {"sample": 1}, "older": [{"draws": {"sample": 1}, "parts": null}]}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("cls", ["reservoir", "folder"])
def test_state_of_a_copy(tmp_path, cls, text):
    """The text file of a saved copy: anything else than what `save` writes is a FormatError, and the buffer stays."""
    with KINDS[cls](str(tmp_path / "replay")) as buffer:
        feed(buffer, 0, 30)
        buffer.save(tmp_path / "copy")
        (tmp_path / "copy" / "state.json").write_text(text)
        with pytest.raises(lr.FormatError, match=r"state\.json"):
            buffer.load(tmp_path / "copy")
        assert buffer.seen == 30 and buffer.check() == []
        buffer.save(tmp_path / "copy")
        buffer.load(tmp_path / "copy")


@pytest.mark.parametrize("free", [0, 1, 2**21, 2**22 - 5])
def test_a_sparse_file(tmp_path, monkeypatch, free):
    """A file of 80 KB on disk that claims 2**22 rows makes a reader get no memory for them."""
    monkeypatch.setattr(locks, "PATIENCE", 0.0)
    path, rows = str(tmp_path / "replay.h5"), 2**22
    schema = lr.Schema.from_sample((np.zeros(1, np.uint8), np.uint8(1)))
    table, pieces = plan_file("ReservoirBuffer", {}, rows, 0, 0, schema)
    head = np.zeros(fmt.HEADER_WORDS, np.uint64)
    head[fmt.H_TAG], head[fmt.H_SEEN], head[fmt.H_SIZE], head[fmt.H_HIGH] = table.tag, rows, rows - free, rows
    block = np.zeros(8 * fmt.HEADER_WORDS, np.uint8)
    kernel.seal_block(block, 0, head, fmt.H_STATE)
    with open(path, "wb") as file:
        file.truncate(table.file_size)
        for at, data in (*pieces, (fmt.HEADERS[0], block.tobytes())):
            file.seek(at)
            file.write(data)
    tracemalloc.start()
    try:
        with lr.open(path) as buffer:
            assert (len(buffer), buffer.seen) == (rows - free, rows)
            for action in (lambda: buffer.sample(4), lambda: buffer.get([0, 5]), lambda: lr.merge([buffer], max_size=9)):
                with pytest.raises(lr.LeanReplayError):
                    action()
        assert tracemalloc.get_traced_memory()[1] < 16 << 20  # pieces of the index, not 8 bytes for each row
    finally:
        tracemalloc.stop()


class Greedy(lr.SlidingWindowPolicy):
    kept = None

    def keep(self, capacity, positions, groups):
        return Greedy.kept


class OwnBuffer(lr.DataBuffer):
    policy_class = Greedy


@pytest.mark.parametrize("kept", [np.arange(9), [0, 0], [-1], [12], [0.5], None, [[0]], "x", np.array([2**63], np.uint64)], ids=str)
def test_keep_of_an_own_policy(kept):
    """Too many rows, rows twice or outside: an ArgumentError instead of rows written outside the new file."""
    Greedy.kept = kept
    with OwnBuffer(12) as buffer:
        feed(buffer, 0, 12)
        with pytest.raises(lr.ArgumentError, match=r"keep gave .* at most 8 different numbers from 0 to 11"):
            buffer.resize(8)
        assert len(buffer) == 12 and buffer.check() == []
        Greedy.kept = [3, 1]
        buffer.resize(8)
        assert buffer.get_metadata("position").tolist() == [3, 1]


def test_too_many_rows_for_groups():
    """Links between rows are 32 bits wide: more rows than that are refused, not wrapped around."""
    schema = lr.Schema.from_sample((np.zeros(1, np.uint8), 1))
    for kind in (lr.ClassBalancedBuffer, lr.ExperienceBalancedBuffer, lr.ClassBalancingReservoirBuffer, lr.ParametricBuffer):
        with pytest.raises(lr.ArgumentError, match="lower max_size"):
            kind(2**31, schema=schema)
        with pytest.raises(lr.ArgumentError, match="lower max_size"):
            kind(2**31 - 1)  # before the first batch, too
        with kind(4) as buffer:
            for _ in range(2):
                with pytest.raises(lr.ArgumentError, match="lower max_size"):
                    buffer.resize(2**31 - 1)
                assert buffer.max_size == 4
                buffer.add((np.zeros((3, 1), np.uint8), np.arange(3)))
