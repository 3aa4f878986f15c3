"""Random operations on every buffer, in RAM and on disk, against a model that is as naive as possible.

The model is a dict of rows. After every operation the buffer must hold exactly what the model holds, and `check()` be clean.
A failure prints the kind, the seed, and the operations up to there.
"""

from __future__ import annotations

import copy
import math
import os
import random
import signal
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nightly import times
from paths import in_memory
from storage_kernels import kernel

import leanreplay
from leanreplay import (
    ArgumentError,
    CapacityWarning,
    GreedyClassBalancingBuffer,
    InfiniteBuffer,
    MismatchError,
    ReservoirBuffer,
    RowError,
    Schema,
    SchemaError,
    SlidingWindowBuffer,
    StateError,
)
from leanreplay.keys import key_pair
from leanreplay.storage import (
    create,
)
from leanreplay.storage import writer as writer_module

M64 = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


# -- the stream --------------------------------------------------------------------------------------------------------


def sample(p: int) -> tuple[bytes, int]:
    """The sample at a position: 5 bytes and an unbalanced label."""
    return bytes((p * k + p // 7) % 256 for k in range(1, 6)), min(p * 7919 % 11, 5) - 1


def metadata(p: int) -> float:
    return float(p % 50)


def batch(start: int, stop: int) -> Any:
    samples = [sample(p) for p in range(start, stop)]
    x = np.array([list(s[0]) for s in samples], np.uint8).reshape(-1, 5)
    return x, np.array([s[1] for s in samples], np.int64)


def values(start: int, stop: int) -> Any:
    return np.array([metadata(p) for p in range(start, stop)], np.float32)


SCHEMA = Schema.from_sample((np.zeros(5, np.uint8), 0), {"z": np.float32(0)})


# -- the model ---------------------------------------------------------------------------------------------------------


def fin(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & M64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & M64
    return x ^ x >> 31


class Model:
    """What a buffer holds: row -> [position, sample, metadata by name]."""

    def __init__(self, size: float, seed: int) -> None:
        self.size, self.seed, self.seen, self.draws = size, seed, 0, 0
        self.bound = math.inf  # the capacity rule's
        self.names = ["z"]
        self.rows: dict[int, list[Any]] = {}

    def content(self) -> Any:
        return copy.deepcopy((self.size, self.seen, self.bound, self.names, self.rows))

    def snapshot(self) -> Any:
        return copy.deepcopy(self.__dict__)

    def key(self, purpose: str, position: int) -> int:
        k0, k1 = (int(k) for k in key_pair(purpose, self.seed))
        return fin(fin(position * GOLDEN + k0 & M64) + k1 & M64)

    def victim(self, p: int) -> int | None:
        """The row that a sample takes when all are taken; None if it is rejected."""
        raise NotImplementedError

    def kept(self, size: int, positions: list[int]) -> list[int]:
        """The `size` rows that stay in a resize, in their new order. positions: those that stayed, for where that is random."""
        raise NotImplementedError

    def add(self, start: int, stop: int) -> None:
        for p in range(max(start, self.seen), stop):
            row: int | None = len(self.rows)
            if len(self.rows) >= min(self.size, self.bound):
                self.bound = min(self.size, self.bound)
                row = self.victim(p)
            if row is not None:
                extra = {name: float(p) for name in self.names if name != "z"}
                self.rows[row] = [p, sample(p), {"z": metadata(p), **extra}]
            self.seen = p + 1

    def resize(self, size: int, positions: list[int]) -> None:
        if size != self.size:
            kept = self.kept(min(size, len(self.rows)), positions)
            assert len(kept) == min(size, len(self.rows))
            if size < len(self.rows):
                self.bound = size
            self.rows = {i: self.rows[r] for i, r in enumerate(kept)}
            self.size = size


class Reservoir(Model):
    def victim(self, p: int) -> int | None:
        lowest = min(self.rows, key=lambda r: self.key("reservoir", self.rows[r][0]))
        return lowest if self.key("reservoir", p) > self.key("reservoir", self.rows[lowest][0]) else None

    def kept(self, size: int, positions: list[int]) -> list[int]:
        return sorted(sorted(self.rows, key=lambda r: self.key("reservoir", self.rows[r][0]))[len(self.rows) - size :])


class Unbounded(Model):
    """No capacity rule."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, math.inf if name == "bound" else value)


class Window(Unbounded):
    def victim(self, p: int) -> int | None:
        return min(self.rows, key=lambda r: self.rows[r][0])

    def kept(self, size: int, positions: list[int]) -> list[int]:
        return sorted(self.rows, key=lambda r: self.rows[r][0])[len(self.rows) - size :]


class Greedy(Unbounded):
    def victim(self, p: int) -> int | None:
        base = self.key("greedy", p)
        labels = [self.rows[r][1][1] for r in range(len(self.rows))]
        top = max(labels.count(c) for c in labels)
        largest = max(
            (c for c in set(labels) if labels.count(c) == top), key=lambda c: fin(base + fin((c & M64) * GOLDEN + base & M64) & M64)
        )
        attempt = 0
        while True:
            row = fin(base + attempt * GOLDEN & M64) % len(labels)
            if labels[row] == largest:
                return row
            attempt += 1

    def kept(self, size: int, positions: list[int]) -> list[int]:
        """Whichever members left: always one of the largest class, so the sorted class counts are determined."""
        counts = self.counts(list(self.rows))
        for _ in range(len(self.rows) - size):
            counts[-1] -= 1
            counts = sorted(c for c in counts if c)
        rows = [r for r in sorted(self.rows) if self.rows[r][0] in positions]
        assert self.counts(rows) == counts
        return rows

    def counts(self, rows: list[int]) -> list[int]:
        labels = [self.rows[r][1][1] for r in rows]
        return sorted(labels.count(c) for c in set(labels))


class Infinite(Unbounded):
    pass


KINDS: dict[str, tuple[type[Model], Callable[..., Any]]] = {
    "reservoir": (Reservoir, lambda size, path, **o: ReservoirBuffer(size, path, **o)),
    "window": (Window, lambda size, path, **o: SlidingWindowBuffer(size, path, verify="always", **o)),
    "greedy": (Greedy, lambda size, path, **o: GreedyClassBalancingBuffer(size, path, **o)),
    "infinite": (Infinite, lambda size, path, **o: InfiniteBuffer(path, rows_per_part=size, **o)),
}


# -- buffer and model together -----------------------------------------------------------------------------------------


class Pair:
    """A buffer, its model, and the operations: each is done to both."""

    LIMIT = 2

    def __init__(self, kind: str, seed: int, folder: str | None) -> None:
        self.kind, self.random = kind, random.Random(f"{kind} {seed} {folder is None}")
        self.folder = folder
        self.path = None if folder is None else os.path.join(folder, "b.h5")
        size = self.random.choice([7, 20, 64] if kind == "infinite" else [1, 3, 8, 20])
        model, self.make = KINDS[kind]
        self.model = model(math.inf if kind == "infinite" else size, seed)
        schema = self.random.choice([None, SCHEMA])
        self.buffer: Any = self.make(size, self.path, seed=seed, schema=schema)
        self.points: list[Any] = []  # contents that must be restorable, newest last
        self.states: list[Any] = []  # (state, snapshot) of all state_dicts
        self.saved: list[Any] = []
        self.drawn: dict[Any, Any] = {}
        self.log: list[str] = []

    # Operations:

    def add(self) -> None:
        n, back = self.random.choice([0, 1, 2, 5, 30]), self.random.choice([0, 0, 4])
        self.log.append(f"add {n} back {back}")
        start = max(0, self.model.seen - back)
        stop = self.model.seen + n
        extra = self.extra(start, stop)
        self.buffer.add(batch(start, stop), metadata={"z": values(start, stop), **extra}, at=start if back else None)
        self.model.add(start, stop)

    def extra(self, start: int, stop: int) -> dict[str, Any]:
        return {name: np.arange(start, stop, dtype=np.float64) for name in self.model.names if name != "z"}

    def update(self) -> None:
        n, at = self.random.choice([0, 1, 12, 40]), self.random.choice([None, self.model.seen, max(0, self.model.seen - 6)])
        start = self.model.seen if at is None else at
        self.log.append(f"update {n} at {at}")
        x, y = batch(start, start + n)
        dataset = [(x[i], self.random.choice([int, np.int64])(y[i])) for i in range(n)]
        if self.buffer.schema is None:
            dataset = [(a, int(b)) for a, b in dataset]
        self.buffer.update(dataset, metadata={"z": values(start, start + n), **self.extra(start, start + n)}, at=at)
        self.model.add(start, start + n)

    def sample(self) -> None:
        held, replace = len(self.model.rows), self.random.random() < 0.3
        n = self.random.choice([0, 1, held, held + 1, 7])
        self.log.append(f"sample {n} {replace}")
        if n > held and not (replace and held):
            with pytest.raises(ArgumentError, match=f"sample of {n} from a buffer of {held}"):
                self.buffer.sample(n, replace=replace)
            return
        if self.buffer.schema is None:
            return
        (x, y), meta = self.buffer.sample(n, replace=replace)
        self.model.draws += 1
        self.compare_rows(meta["idx"].tolist(), x, y, meta)
        assert len(meta["idx"]) == n
        assert replace or len(set(meta["idx"].tolist())) == n
        # A draw depends on seen and the number of draws alone: after going back it comes again, a shorter one as its beginning.
        again = self.drawn.setdefault((self.model.seen, held, self.model.draws, replace), meta["idx"].tolist())
        common = min(len(again), n)
        assert again[:common] == meta["idx"].tolist()[:common]

    def get(self) -> None:
        rows = list(self.model.rows)
        self.log.append("get")
        if rows:
            chosen = [self.random.choice(rows) for _ in range(self.random.randint(0, 9))]
            (x, y), meta = self.buffer.get(chosen)
            self.compare_rows(chosen, x, y, meta)
            i = self.random.randrange(-len(rows), len(rows))
            (x, y), meta = self.buffer[i]
            row = sorted(rows)[i]
            assert (x.tobytes(), int(y)) == self.model.rows[row][1]
            assert (meta["idx"], meta["position"], float(meta["z"])) == (row, self.model.rows[row][0], self.model.rows[row][2]["z"])
        with pytest.raises(RowError):
            self.buffer.get([len(rows)])

    def set_metadata(self) -> None:
        rows = sorted(self.model.rows)
        if self.buffer.schema is None or not rows:
            return
        how = self.random.choice(["all", "rows", "positions", "twice"])
        name = self.random.choice(self.model.names)
        dtype = np.float32 if name == "z" else np.float64
        chosen = rows if how == "all" else [self.random.choice(rows) for _ in range(self.random.randint(0, 6))]
        if how != "twice":
            chosen = list(dict.fromkeys(chosen))
        new = [float(self.random.randrange(1000)) for _ in chosen]
        self.log.append(f"set_metadata {name} {how} {chosen}")
        positions = [self.model.rows[r][0] - self.random.randint(0, 1) for r in chosen] if how == "positions" else None
        self.buffer.set_metadata(name, np.array(new, dtype), rows=None if how == "all" else chosen, positions=positions)
        for i, r in enumerate(chosen):
            if positions is None or positions[i] == self.model.rows[r][0]:
                self.model.rows[r][2][name] = new[i]

    def new_field(self) -> None:
        if self.kind == "infinite" or not self.model.rows or len(self.model.names) > 3:
            return
        name = f"field{len(self.model.names)}"
        self.log.append(f"new field {name}")
        new = {r: float(self.random.randrange(1000)) for r in sorted(self.model.rows)}
        if len(new) > 1:
            with pytest.raises(SchemaError, match="values for all"):
                self.buffer.set_metadata(name, np.zeros(1), rows=[0])
        self.buffer.set_metadata(name, np.array(list(new.values())))
        self.model.names.append(name)
        for r, value in new.items():
            self.model.rows[r][2][name] = value
        self.points = []

    def resize(self) -> None:
        size = self.random.choice([1, 2, 5, 8, 13, 21])
        self.log.append(f"resize {size}")
        if self.kind == "infinite":
            with pytest.raises(ArgumentError, match="no max_size"):
                self.buffer.resize(size)
            return
        if size != self.model.size:
            self.points = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.buffer.resize(size)
        before = self.model.size
        held = self.buffer.get_metadata("position").tolist() if self.buffer.schema is not None else []
        self.model.resize(size, held)
        warned = [w for w in caught if w.category is CapacityWarning]
        assert len(warned) == (size != before and size > self.model.bound), caught

    def state_dict(self) -> None:
        self.log.append(f"state_dict {len(self.states)}")
        self.states.append((self.buffer.state_dict(), self.model.snapshot()))
        content = self.model.content()
        if not self.points or self.points[-1] != content:
            self.points = [*self.points, content][-self.LIMIT :]
        self.sample_all()

    def sample_all(self) -> None:
        """After marking a state and after going back to it: these draws must agree."""
        held = len(self.model.rows)
        if held:
            found = self.buffer.sample(held)[1]["idx"].tolist()
            self.model.draws += 1
            again = self.drawn.setdefault((self.model.seen, held, self.model.draws, False), found)
            common = min(len(again), held)
            assert again[:common] == found[:common]

    def load_state_dict(self) -> None:
        if not self.states:
            return
        number = self.random.choice([len(self.states) - 1, self.random.randrange(len(self.states))])
        state, snapshot = self.states[number]
        then = copy.copy(self.model)
        then.__dict__.update(copy.deepcopy(snapshot))
        must = then.content() in self.points
        self.log.append(f"load_state_dict {number}, must work: {must}")
        try:
            self.buffer.load_state_dict(state)
        except StateError as error:
            assert not must, error
            return
        before, content = self.model.content(), then.content()
        self.model = then
        if content in self.points:
            self.points = self.points[: len(self.points) - self.points[::-1].index(content)]
        elif content != before:
            self.points = []  # older than it had to work for: newer points are gone
        self.sample_all()

    def save(self) -> None:
        if self.buffer.schema is None:
            return
        self.log.append(f"save {len(self.saved)}")
        folder = tempfile.mkdtemp(dir=self.folder)
        self.buffer.save(folder)
        self.saved.append((folder, self.model.snapshot()))
        self.sample_all()

    def load(self) -> None:
        if not self.saved:
            return
        folder, snapshot = self.random.choice(self.saved)
        self.log.append(f"load {folder}")
        if snapshot["size"] != self.model.size or snapshot["names"] != self.model.names:
            with pytest.raises(MismatchError):
                self.buffer.load(folder)
            return
        self.buffer.load(folder)
        self.model.__dict__.update(copy.deepcopy(snapshot))
        self.points = []
        self.sample_all()

    def reopen(self) -> None:
        if self.path is None or self.buffer.schema is None:
            return
        how = self.random.choice(["close", "forget", "open"])
        self.log.append(f"reopen {how}")
        if how != "forget":
            self.buffer.close()
        self.buffer = None
        self.open(how)
        self.model.draws = 0

    def open(self, how: str) -> None:
        assert self.path is not None
        self.buffer = leanreplay.open(self.path, mode="r+") if how == "open" else self.make(None, self.path, mode="a")

    def kill(self) -> None:
        """A child takes over, feeds, and is killed: at once, or at some step of a commit. What it saw is there."""
        if self.path is None or self.buffer.schema is None or not hasattr(os, "fork"):
            return
        self.buffer.close()
        seen, steps, n = self.model.seen, self.random.randrange(12), self.random.choice([1, 10, 25])
        extra = self.extra(seen, seen + n)
        pid = os.fork()
        if pid == 0:
            try:
                signal.alarm(30)
                self.open("open")
                real, left = kernel.write_field, [steps]

                def die(*args: Any) -> None:
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    real(*args)

                kernel.write_field, writer_module.ONE_CALL = die, False
                self.buffer.add(batch(seen, seen + n), metadata={"z": values(seen, seen + n), **extra})
                os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), status
        assert os.WTERMSIG(status) == signal.SIGKILL
        self.open("r+")
        self.log.append(f"killed while adding {n}, after {self.buffer.seen - seen}")
        assert seen <= self.buffer.seen <= seen + n
        self.model.add(seen, self.buffer.seen)
        self.model.draws = 0

    # Comparing:

    def compare_rows(self, rows: list[int], x: Any, y: Any, meta: Any) -> None:
        wanted = [self.model.rows[r] for r in rows]
        assert [(x[i].tobytes(), int(y[i])) for i in range(len(rows))] == [w[1] for w in wanted]
        assert meta["idx"].tolist() == rows
        assert meta["position"].tolist() == [w[0] for w in wanted]
        assert sorted(meta) == sorted([*self.model.names, "idx", "position"])
        for name in self.model.names:
            assert meta[name].tolist() == [w[2][name] for w in wanted]

    def compare(self) -> None:
        model, b = self.model, self.buffer
        assert (len(b), b.seen) == (len(model.rows), model.seen)
        assert b.max_size == (None if self.kind == "infinite" else model.size)
        assert [str(p) for p in b.check()] == []
        if b.schema is None:
            return
        rows = sorted(model.rows)
        assert b.get_metadata("idx").tolist() == rows == list(range(len(rows)))
        (x, y), meta = b.get(rows)
        self.compare_rows(rows, x, y, meta)
        for name in (*model.names, "position"):
            assert b.get_metadata(name).tolist() == meta[name].tolist()


OPS = {
    "add": 8, "update": 3, "sample": 3, "get": 1, "set_metadata": 3, "new_field": 0.3, "resize": 1, "state_dict": 3,
    "load_state_dict": 3, "save": 0.5, "load": 0.5, "reopen": 2, "kill": 1,
}  # fmt: skip
SEEDS = times(3, 10)
STEPS = 30


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_model(kind: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All guarantees at once: whatever is done in whatever order, the buffer is the model."""
    for seed in range(SEEDS):
        if seed % 2:
            monkeypatch.setattr(create, "JOURNAL_BYTES", 1)  # an add is many commits
        else:
            monkeypatch.undo()
        with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
            pair = Pair(kind, seed, folder if where == "disk" else None)
            if where == "memory":
                pair.folder = folder  # for save
            try:
                for _ in range(STEPS):
                    getattr(pair, pair.random.choices(list(OPS), list(OPS.values()))[0])()
                    pair.compare()
            except BaseException as error:
                text = "\n  ".join([f"{kind} in {where}, seed {seed}:", *pair.log])
                raise AssertionError(f"{text}\n{error!r}") from error
            finally:
                if pair.buffer is not None:
                    pair.buffer.close()


def test_the_model_notices(tmp_path: Path) -> None:
    """A row, a position or metadata that differ are found."""
    pair = Pair("reservoir", 1, str(tmp_path))
    pair.buffer.add(batch(0, 9), metadata={"z": values(0, 9)})
    pair.model.add(0, 9)
    pair.compare()
    for change in ("position", "sample", "metadata", "seen"):
        before = copy.deepcopy(pair.model.__dict__)
        entry = pair.model.rows[0]
        if change == "position":
            entry[0] += 1
        elif change == "sample":
            entry[1] = sample(99)
        elif change == "metadata":
            entry[2]["z"] += 1
        else:
            pair.model.seen += 1
        with pytest.raises(AssertionError):
            pair.compare()
        pair.model.__dict__.update(before)
    pair.buffer.close()
