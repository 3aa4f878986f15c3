"""G7: a file with a changed byte anywhere never crashes or hangs the interpreter, and never gives wrong rows without an error.

20,000 single-byte mutants, over every part of the file and of an undo file. Forked children work through them; a watchdog in the
parent names the mutant at which a child died or stood still. Then files with logs and journals that lie under right checksums.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import signal
import struct
import time
import traceback
from collections import Counter

import h5py  # noqa: F401  (loaded before the children fork)
import numpy as np
import pytest
from nightly import times
from storage_kernels import kernel

import leanreplay as lr
from leanreplay.storage import layout as fmt
from leanreplay.storage import locks
from leanreplay.storage import writer as writer_module

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs the mutants in forked children")

CAPACITY = 16
STANDSTILL = 30.0  # seconds at one mutant that count as a hang; a mutant takes about 3 ms


# -- files to mutate -----------------------------------------------------------------------------------------------------


def batch(start, n):
    """Samples whose contents follow from their position in the stream."""
    positions = np.arange(start, start + n)
    x = (positions[:, None] * 37 + np.arange(11)).astype(np.uint8)
    return {"batch": (x, positions % 5), "metadata": {"logits": (positions[:, None] * 0.5 + np.arange(3)).astype(np.float32)}}


def groups(positions):
    """Groups for buffers that want them: ever more come, and rows become free for them."""
    return positions % (1 + positions // 8)


def feed(buffer, start, n):
    values = batch(start, n)
    extra = {"group": groups(np.arange(start, start + n))} if isinstance(buffer, lr.BalancedBuffer) else {}
    buffer.add(values["batch"], metadata=values["metadata"], **extra)


def contents(buffer, rows_alone=False):
    """{row: position} of all rows. Raises AssertionError where one holds anything but the sample of its position, or groups differ."""
    (x, y), meta = buffer.sample(len(buffer))
    for i, position in enumerate(meta["position"].tolist()):
        true = batch(position, 1)
        same = np.array_equal(x[i], true["batch"][0][0]) and y[i] == true["batch"][1][0]
        assert same and np.array_equal(meta["logits"][i], true["metadata"]["logits"][0]), f"row {meta['idx'][i]} is not sample {position}"
    if isinstance(buffer, lr.BalancedBuffer) and not rows_alone:
        right, sizes = Counter(groups(meta["position"]).tolist()), buffer.group_sizes()
        assert {g: n for g, n in sizes.items() if n} == right, f"{sizes} of {right} rows"
        assert set(sizes) >= set(groups(np.arange(buffer.seen)).tolist()), f"{sizes} after {buffer.seen}"
    return dict(zip(meta["idx"].tolist(), meta["position"].tolist(), strict=True))


class Base:
    """An unharmed file (and its undo file), with what is true about it."""

    def __init__(self, name, folder, cls, fed, then=0, pending=False):
        self.name, self.pending, self.files, self.state, self.states = name, pending, {}, None, []
        path = os.path.join(folder, f"{name}.h5")
        with cls(CAPACITY, path) as buffer:
            for start in range(0, fed - 5, 5):
                feed(buffer, start, 5)
            self.states.append(contents(buffer))
            feed(buffer, fed - 5, 5)
            self.states.append(contents(buffer))
            if then:
                self.state = buffer.state_dict()
                self.at_state = contents(buffer)
                for start in range(fed, fed + then, 5):
                    self.states.append(contents(buffer))
                    feed(buffer, start, 5)
                self.states.append(contents(buffer))
            if pending:
                self._interrupt(buffer, path, fed)
            self.table, self.logged = buffer.current.store.layout, len(buffer.current.store.policy_log())
            self.fed, self.seen = fed, fed + then
        for suffix in ("", ".undo.0"):
            if os.path.exists(path + suffix):
                with open(path + suffix, "rb") as file:
                    self.files.setdefault(suffix, file.read())
            for left in (path + suffix, path + ".lock"):
                if os.path.exists(left):
                    os.unlink(left)
        self.size = {suffix: len(data) for suffix, data in self.files.items()}

    def _interrupt(self, buffer, path, fed):
        """Keep the bytes of the file in the middle of a commit: one field written, the others not."""
        write, calls = kernel.write_field, []

        def cut(*args):
            if calls:
                with open(path, "rb") as file:
                    self.files[""] = file.read()
                raise KeyboardInterrupt
            calls.append(1)
            write(*args)

        kernel.write_field, writer_module.ONE_CALL = cut, False
        try:
            feed(buffer, fed, 5)
        except KeyboardInterrupt:
            pass
        finally:
            kernel.write_field, writer_module.ONE_CALL = write, True
        assert self.files[""]

    def regions(self):
        """(name, suffix, byte ranges) of everything that a mutant can hit."""
        t = self.table
        data, index = t.columns[:-3], t.columns[-3:]
        head = 8 * fmt.HEADER_WORDS
        (text,) = struct.unpack_from("<Q", self.files[""], 24)
        spans = {
            "preamble": [(0, 64)],
            "table": [(fmt.TABLE_AT, fmt.TABLE_AT + text)],
            "headers": [(at, at + head) for at in fmt.HEADERS],
            "index": [(at, at + size * CAPACITY) for at, size in index],
            "rows": [(at, at + size * CAPACITY) for at, size in data],
            "journal": [(t.journal, t.records_at + t.journal_rows * t.record_bytes)],
            "seal": [(t.journal, t.journal_rows_at + 8 * t.journal_rows)],
            "structure": [(at, at + n) for at, n in t.structure],
            "anything": [(0, self.size[""])],
        }
        if t.log[1]:
            spans["log"] = [(t.log[0], t.log[0] + 16 * (self.logged + 4))]
            spans["freed"] = [(t.freed_at, t.freed_at + 24 * 6)]
        found = {name: ("", ranges) for name, ranges in spans.items()}
        if ".undo.0" in self.files:
            found["undo file"] = (".undo.0", [(0, self.size[".undo.0"])])
            found["undo tails"] = (".undo.0", [(2 * fmt.PAGE, 2 * fmt.PAGE + 48), (2 * fmt.PAGE + 512, 2 * fmt.PAGE + 560)])
            found["undo frames"] = (".undo.0", [(3 * fmt.PAGE, self.size[".undo.0"])])
        return found


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("bases"))
    made = [
        Base("full", folder, lr.ReservoirBuffer, 60),
        Base("partly", folder, lr.ReservoirBuffer, 10),
        Base("window", folder, lr.SlidingWindowBuffer, 40, pending=True),
        Base("greedy", folder, lr.GreedyClassBalancingBuffer, 40),
        Base("undo", folder, lr.SlidingWindowBuffer, 40, then=15),
        Base("balanced", folder, lr.ClassBalancedBuffer, 40, pending=True),
        Base("balanced undo", folder, lr.ClassBalancedBuffer, 40, then=15),
    ]
    return {b.name: b for b in made}


# -- what is done to each ------------------------------------------------------------------------------------------------


def read(base, path, check):
    """Open for reading, read all rows, check. Returns whether anything was reported."""
    with lr.open(path) as buffer:
        found = contents(buffer)
        assert any(found.items() <= state.items() for state in base.states) or base.pending, "rows of no state"
        return bool(check and buffer.check())


def write(base, path, check):
    """Open for writing, mark, read, feed on, check, and roll back."""
    with lr.open(path, "r+", verify="always" if check else "once") as buffer:
        before = contents(buffer)
        seen, state = buffer.seen, buffer.state_dict()
        feed(buffer, seen, 3)
        contents(buffer)
        wrong = bool(check and buffer.check())
        buffer.load_state_dict(state)
        assert contents(buffer) == before and buffer.seen == seen, "not the rows of the restore point"
        return wrong


def roll_back(base, path, check):
    """Load the state that the undo file leads to, and feed the rest again."""
    with lr.open(path, "r+") as buffer:
        contents(buffer)
        try:
            buffer.load_state_dict(base.state)
        except lr.StateError:
            contents(buffer)
            raise
        assert contents(buffer) == base.at_state and buffer.seen == base.fed, "not the rows of the restore point"
        feed(buffer, base.fed, base.seen - base.fed)
        assert contents(buffer) == base.states[-1], "not the rows after feeding the rest again"
        return bool(check and buffer.check())


def roll_back_damaged(base, path, check):
    """`roll_back` with a damaged undo file beside a file that is right: it leads to the right rows, or nowhere."""
    with lr.open(path, "r+") as buffer:
        try:
            buffer.load_state_dict(base.state)
        except lr.StateError:
            assert contents(buffer) == base.states[-1] and buffer.check() == [], "refused, but the rows changed"
            raise
        assert buffer.check() == [], "rolled back to damaged rows"
        assert contents(buffer) == base.at_state and buffer.seen == base.fed, "not the rows of the restore point"
        feed(buffer, base.fed, base.seen - base.fed)
        assert contents(buffer) == base.states[-1], "not the rows after feeding the rest again"
    return False


def outcome(work, base, path, check):
    """ "clean", "reported", or what is wrong."""
    try:
        return "reported" if work(base, path, check) else "clean"
    except lr.LeanReplayError:
        return "reported"
    except AssertionError as error:
        return f"WRONG ROWS: {error}"
    except BaseException:
        return f"FOREIGN ERROR: {traceback.format_exc()[-600:]}"


def lay_out(base, path):
    for name in os.listdir(os.path.dirname(path)):
        os.unlink(os.path.join(os.path.dirname(path), name))
    for suffix, data in base.files.items():
        with open(path + suffix, "wb") as file:
            file.write(data)


def mutants(base, region, n, seed):
    """n times (suffix, offset, new byte), spread over the region."""
    rng = random.Random(f"{base.name} {region} {seed}")
    suffix, ranges = base.regions()[region]
    places = [at for start, stop in ranges for at in range(start, stop)]
    for _ in range(n):
        at = rng.choice(places)
        old = base.files[suffix][at]
        new = rng.choice([old ^ (1 << rng.randrange(8)), rng.randrange(256), 0, 255, (old + 1) % 256])
        yield suffix, at, new if new != old else old ^ 0x80


def child(base, work, todo, first, progress, results, folder):
    """Work through the mutants from number `first`; one line per mutant that is worth one."""
    # A reader would wait a second for a writer that does not exist; it looks into the journal after some 3 ms.
    locks.PATIENCE = 0.01 if base.pending else 0.0
    path = os.path.join(folder, "replay.h5")
    lay_out(base, path)
    for i in range(first, len(todo)):
        suffix, at, new = todo[i]
        progress[0:8] = struct.pack("<q", i)
        with open(path + suffix, "r+b") as file:
            file.seek(at)
            file.write(bytes([new]))
        result = outcome(work, base, path, check=i % 2 == 0)
        results.write(json.dumps([i, result]) + "\n")
        if work is read:
            with open(path + suffix, "r+b") as file:
                file.seek(at)
                file.write(base.files[suffix][at : at + 1])
        else:
            lay_out(base, path)


def run_all(base, work, todo, folder):
    """Results of all mutants; a crash or standstill is the result of the mutant at which it happened."""
    found, first = {}, 0
    os.makedirs(folder)
    while first < len(todo):
        progress = mmap.mmap(-1, 8)
        progress[0:8] = struct.pack("<q", first)
        log = os.path.join(folder, "..", os.path.basename(folder) + ".log")
        pid = os.fork()
        if pid == 0:
            try:
                with open(log, "w") as results:
                    child(base, work, todo, first, progress, results, folder)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        at, since, status = first, time.monotonic(), None
        while status is None:
            done, code = os.waitpid(pid, os.WNOHANG)
            now = struct.unpack("<q", progress[0:8])[0]
            if done:
                status = "ended" if code == 0 else f"CRASH: wait status {code}"
            elif now != at:
                at, since = now, time.monotonic()
            elif time.monotonic() - since > STANDSTILL:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                status = f"HANG: {STANDSTILL} s"
            time.sleep(0.01)
        with open(log) as results:
            for line in results:
                if line.endswith("\n"):
                    i, result = json.loads(line)
                    found[i] = result
        if status == "ended":
            break
        found[at] = status
        first = at + 1
    shutil.rmtree(folder)
    return [found.get(i, "clean") for i in range(len(todo))]


# -- the test ------------------------------------------------------------------------------------------------------------

# (file, what is done, region, mutants)
PLAN = [
    ("full", read, "preamble", 1000),
    ("full", read, "table", 3000),
    ("full", read, "headers", 1200),
    ("full", read, "index", 2000),
    ("full", read, "rows", 2000),
    ("full", read, "structure", 1800),
    ("full", read, "anything", 800),
    ("partly", read, "index", 400),
    ("partly", read, "rows", 300),
    ("window", read, "seal", 300),
    ("window", read, "journal", 400),
    ("window", read, "headers", 250),
    ("window", read, "index", 200),
    ("full", write, "headers", 300),
    ("full", write, "index", 500),
    ("full", write, "rows", 300),
    ("partly", write, "index", 250),
    ("partly", write, "headers", 150),
    ("greedy", write, "index", 400),
    ("greedy", write, "headers", 150),
    ("window", write, "seal", 250),
    ("window", write, "journal", 250),
    ("window", write, "headers", 200),
    ("window", write, "index", 250),
    ("undo", roll_back_damaged, "undo tails", 200),
    ("undo", roll_back_damaged, "undo frames", 250),
    ("undo", roll_back_damaged, "undo file", 200),
    ("undo", roll_back, "headers", 250),
    ("undo", roll_back, "index", 250),
    ("undo", roll_back, "rows", 200),
    ("balanced", read, "log", 200),
    ("balanced", read, "seal", 200),
    ("balanced", read, "freed", 150),
    ("balanced", read, "headers", 200),
    ("balanced", read, "index", 200),
    ("balanced", read, "table", 300),
    ("balanced", write, "log", 150),
    ("balanced", write, "seal", 150),
    ("balanced", write, "freed", 120),
    ("balanced", write, "headers", 150),
    ("balanced", write, "index", 150),
    ("balanced undo", roll_back_damaged, "undo tails", 150),
    ("balanced undo", roll_back_damaged, "undo frames", 200),
    ("balanced undo", roll_back, "log", 150),
    ("balanced undo", roll_back, "headers", 150),
]
PLAN = [(name, work, region, max(30, times(n // 10, n))) for name, work, region, n in PLAN]


def test_number_of_mutants():
    """The promise is 20,000, in a nightly run."""
    assert sum(n for *_, n in PLAN) >= times(2_000, 20_000)


@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("full", read),
        ("full", write),
        ("partly", write),
        ("greedy", write),
        ("undo", roll_back),
        ("undo", roll_back_damaged),
        ("balanced undo", roll_back),
        ("balanced undo", roll_back_damaged),
    ],
)
def test_unharmed(bases, tmp_path, name, work):
    """The files are right to begin with; this also compiles the kernels before anything forks."""
    lay_out(bases[name], str(tmp_path / "replay.h5"))
    assert outcome(work, bases[name], str(tmp_path / "replay.h5"), True) == "clean"


@pytest.mark.parametrize("name", ["window", "balanced"])
@pytest.mark.parametrize("work", [read, write])
def test_unharmed_interrupted(bases, tmp_path, work, name, monkeypatch):
    """A file cut off in the middle of a commit reads as its last state, and is repaired by a writer."""
    monkeypatch.setattr(locks, "PATIENCE", 0.02)
    base, path = bases[name], str(tmp_path / "replay.h5")
    lay_out(base, path)
    with lr.open(path) as buffer:
        assert contents(buffer) == base.states[-1] and buffer.seen == base.seen and buffer.check()
    with lr.open(path, "r+") as buffer:
        assert contents(buffer) == base.states[-1] and buffer.seen == base.seen and buffer.check() == []


@pytest.mark.parametrize(("name", "work", "region", "n"), PLAN, ids=lambda v: getattr(v, "__name__", str(v)))
def test_mutants(bases, tmp_path, name, work, region, n):
    """G7: no mutant crashes, hangs, raises a foreign error, or gives rows other than the true ones without an error."""
    base, seed = bases[name], 0
    todo = list(mutants(base, region, n, seed))
    found = run_all(base, work, todo, str(tmp_path / "work"))
    bad = [(todo[i], result) for i, result in enumerate(found) if result not in ("clean", "reported")]
    assert not bad, f"seed {seed}: {len(bad)} of {n}, (suffix, offset, byte): {bad[:5]}"
    reported = found.count("reported")
    if name == "full" and work is read and region in ("preamble", "table"):
        assert reported == sum(not 12 <= at < 16 for _, at, _ in todo)  # four bytes are reserved
    elif name == "full" and work is read and region in ("rows", "index", "structure"):
        # Every live row is read, and its checksum covers every byte. Structure is compared by check() alone, run on every other one.
        wanted = range(0, n, 2) if region == "structure" else range(n)
        missed = [todo[i] for i in wanted if found[i] == "clean"]
        assert not missed, f"seed {seed}: {len(missed)} unreported: {missed[:5]}"
    elif region in ("undo frames", "undo tails", "seal", "freed"):
        assert reported
    elif region == "log":
        inside = [at < base.table.log[0] + 16 * base.logged for _, at, _ in todo]
        missed = [mutant for mutant, result, counts in zip(todo, found, inside, strict=True) if counts and result == "clean"]
        assert not missed and "clean" in found, f"seed {seed}: {len(missed)} unreported: {missed[:5]}"


# -- crafted logs and journals -------------------------------------------------------------------------------------------


def sealed(data, at, count, state, change):
    """Change the words of a block in `data` (a bytearray) and seal them as right ones are."""
    words = np.frombuffer(bytes(data[at : at + 8 * count]), np.uint64).copy()
    change(words)
    block = np.zeros(8 * count, np.uint8)
    kernel.seal_block(block, 0, words, state)
    data[at : at + 8 * count] = block.tobytes()


def with_log(base, entries):
    """The file with another log, both headers saying that it is right."""
    data, t = bytearray(base.files[""]), base.table
    log = np.array(entries, np.int64).reshape(-1, 2)
    data[t.log[0] : t.log[0] + 16 * len(log)] = log.tobytes()
    for at in fmt.HEADERS:

        def change(words):
            words[fmt.H_LOG], words[fmt.H_LOG_HASH] = len(log), kernel.hash_log(np.uint64(0), log)

        sealed(data, at, fmt.HEADER_WORDS, fmt.H_STATE, change)
    return data


def with_journal(base, freed=None, **counts):
    """The file in the middle of a commit whose journal frees other rows, or says other numbers, under a right seal."""
    data, t = bytearray(base.files[""]), base.table
    head = max((np.frombuffer(data, np.uint64, fmt.HEADER_WORDS, at).copy() for at in fmt.HEADERS), key=lambda w: int(w[fmt.H_SEQ]))
    words = np.frombuffer(bytes(data[t.journal : t.journal + 8 * fmt.SEAL_WORDS]), np.uint64).copy()
    assert words[fmt.J_SEQ] == head[fmt.H_SEQ] + np.uint64(1) and words[fmt.J_FREED]
    if freed is not None:
        data[t.freed_at : t.freed_at + 24 * len(freed)] = np.array(freed, np.int64).tobytes()
        words[fmt.J_FREED] = len(freed)
    for name, value in counts.items():
        words[getattr(fmt, name)] = value
    live, count, gone = (int(words[i]) for i in (fmt.J_LIVE, fmt.J_COUNT, fmt.J_FREED))
    if live <= count <= t.journal_rows and gone <= CAPACITY:
        view = np.frombuffer(bytes(data), np.uint8)
        found = int(kernel.hash_records(view, t.journal_rows_at, t.records_at, t.record_bytes, live, count)) + int(
            kernel.hash_freed(view, t.freed_at, gone)
        )
        words[fmt.J_HASH] = found % 2**64
    sealed(data, t.journal, fmt.SEAL_WORDS, 0, lambda block: block.__setitem__(slice(None), words))
    return data


KNOWN = [(0, g) for g in range(7)]  # the groups of the first 55 samples
MANY = [(0, g) for g in range(4096)]
CRAFTED = {
    "log empty": lambda b: with_log(b, []),
    "log short": lambda b: with_log(b, KNOWN[:3]),
    "log of none": lambda b: with_log(b, [*KNOWN, (2, 0)]),
    "log negative": lambda b: with_log(b, [*KNOWN, (-1, -1)]),
    "log huge": lambda b: with_log(b, [*KNOWN, (2**63 - 1, -(2**63))]),
    "log twice": lambda b: with_log(b, [*KNOWN, KNOWN[0]]),
    "log twice at once": lambda b: with_log(b, [KNOWN[0], *KNOWN]),
    "log full twice": lambda b: with_log(b, [*KNOWN, (1, 0), (1, 0), (1, 0)]),
    "log full before": lambda b: with_log(b, [(1, 0), *KNOWN]),
    "log full outside": lambda b: with_log(b, [*KNOWN, (1, 7)]),
    "log full negative": lambda b: with_log(b, [*KNOWN, (1, -1)]),
    "log full huge": lambda b: with_log(b, [*KNOWN, (1, 2**62)]),
    "log nobody full": lambda b: with_log(b, KNOWN),
    "log other order": lambda b: with_log(b, KNOWN[::-1]),
    "log strangers": lambda b: with_log(b, [*KNOWN, *((0, 2**40 + g) for g in range(2000))]),
    "log without room": lambda b: with_log(b, MANY),
    "log full of one": lambda b: with_log(b, [*KNOWN, *[(1, 0)] * 4000]),
    "freed below": lambda b: with_journal(b, [(-1, 1, 1)]),
    "freed beyond": lambda b: with_journal(b, [(CAPACITY, 1, 1)]),
    "freed far below": lambda b: with_journal(b, [(-(2**63), 1, 1)]),
    "freed far beyond": lambda b: with_journal(b, [(2**62, 1, 1), (0, 1, 1)]),
    "freed wraps": lambda b: with_journal(b, [(2**61, 1, 1)]),
    "freed twice": lambda b: with_journal(b, [(3, 1, 1), (3, 2, 0)]),
    "freed all": lambda b: with_journal(b, [(r, 2**40 + r, r) for r in range(CAPACITY)]),
    "freed positions": lambda b: with_journal(b, [(r, -5, 2**62) for r in range(CAPACITY)]),
    "freed none": lambda b: with_journal(b, []),
    "freed more than rows": lambda b: with_journal(b, J_FREED=CAPACITY + 1),
    "freed huge": lambda b: with_journal(b, J_FREED=2**62),
    "freed largest": lambda b: with_journal(b, J_FREED=2**64 - 1),
    "count huge": lambda b: with_journal(b, J_COUNT=2**62),
    "live huge": lambda b: with_journal(b, J_LIVE=2**62, J_COUNT=2**62),
    "live beyond count": lambda b: with_journal(b, J_LIVE=5, J_COUNT=2),
}
# What can be true of the rows, and so is not noticed.
TRUE_ENOUGH = ("log full twice", "log nobody full", "log other order", "log strangers", "freed none")


def look_around(path, mode):
    """Do everything that looks at groups and the journal, rows first; "right" if nothing raised and check() found nothing."""
    reported = False
    with lr.open(path, mode) as buffer:
        actions = [
            lambda: contents(buffer, rows_alone=True),
            buffer.check,
            lambda: [buffer.get(buffer.group_rows(g)) for g in buffer.groups],
        ]
        if mode == "r+":
            many = {"group": np.arange(9000) + 2**50}
            values = batch(0, 9000)
            actions += [
                lambda: feed(buffer, buffer.seen, 7),
                lambda: contents(buffer, rows_alone=True),
                lambda: buffer.add(values["batch"], metadata=values["metadata"], **many),
                buffer.group_sizes,
                lambda: buffer.resize(9),
                buffer.check,
            ]
        for action in actions:
            try:
                found = action()
                reported |= action == buffer.check and bool(found)
            except lr.LeanReplayError:
                reported = True
    return "reported" if reported else "right"


@pytest.mark.filterwarnings("ignore::leanreplay.CapacityWarning")
@pytest.mark.parametrize("case", CRAFTED)
def test_crafted_logs_and_journals(bases, tmp_path, case):
    """G7: entries that are no groups, rows outside, and counts that cannot be, with every checksum right: no crash, no wrong row."""
    base, path = bases["balanced undo" if case.startswith("log") else "balanced"], str(tmp_path / "replay.h5")
    for mode in ("r", "r+"):
        with open(path, "wb") as file:
            file.write(CRAFTED[case](base))
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                signal.alarm(int(4 * STANDSTILL))  # kernels may have to be compiled first
                locks.PATIENCE = 0.01
                text = look_around(path, mode)
            except lr.LeanReplayError:
                text = "refused"
            except BaseException:
                text = traceback.format_exc()[-2000:]
            finally:
                os.write(write_end, text.encode())
                os._exit(0)
        os.close(write_end)
        status = os.waitpid(pid, 0)[1]
        text = os.read(read_end, 4000).decode()
        os.close(read_end)
        assert status == 0, f"{case}, mode {mode!r}: crash or hang, wait status {status}"
        assert text in ("right", "reported", "refused"), f"{case}, mode {mode!r}: {text}"
        assert mode == "r" or (text == "right") == (case in TRUE_ENOUGH), f"{case}: {text}"
