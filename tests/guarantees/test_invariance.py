"""G2, batch-invariant: rows, index, checksums and state depend on (seed, stream) and the samples alone.

A random history (hypothesis) feeds the same samples in random batches: by `add` or `update`, in RAM or on disk, with journals that
hold few rows, closed, forgotten and copied in between, with adds that fail or are interrupted anywhere, batches repeated with
`at=`, and detours that `load_state_dict` or `load` takes back. In the end all bytes are those of one `add` in RAM.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nightly import times
from paths import in_memory
from storage_kernels import kernel

import leanreplay
from leanreplay import GreedyClassBalancingBuffer, InfiniteBuffer, ReservoirBuffer, SchemaError, SlidingWindowBuffer
from leanreplay.buffers import feeding
from leanreplay.storage import create
from leanreplay.storage import writer as writer_module

END = 120
KINDS: dict[str, Callable[..., Any]] = {
    "reservoir": lambda path=None, **o: ReservoirBuffer(17, path, seed=3, stream=2, **o),
    "window": lambda path=None, **o: SlidingWindowBuffer(17, path, seed=3, stream=2, **o),
    "greedy": lambda path=None, **o: GreedyClassBalancingBuffer(17, path, seed=3, stream=2, **o),
    "infinite": lambda path=None, **o: InfiniteBuffer(path, rows_per_part=23, seed=3, stream=2, **o),
}


# -- helpers -----------------------------------------------------------------------------------------------------------


class Samples:
    """The samples of some positions of the stream, as a batch and as a dataset. fails_at: the item that cannot be loaded."""

    def __init__(self, start: int, stop: int, fails_at: int = END) -> None:
        p = np.arange(start, stop)
        self.x = ((p[:, None] * 40503 + np.arange(13) * 2654435761) >> 9).astype(np.uint8)
        self.targets = np.minimum(p * 7919 % 11, 5)
        self.metadata = {"logits": np.stack([p, -p, p % 17], 1).astype(np.float32), "task": p // 40}
        self.fails_at = fails_at

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> Any:
        if i >= self.fails_at:
            raise OSError("as wanted")
        return self.x[i], self.targets[i]

    @property
    def batch(self) -> Any:
        return self.x, self.targets


def image(buffer: Any) -> list[Any]:
    """All live bytes: state, row numbers, fields, index, checksums. Parts that hold nothing yet do not count."""
    assert [str(p) for p in buffer.check()] == []
    whole = buffer.current.reading()
    found: list[Any] = [buffer.seen, len(buffer)]
    for part in getattr(whole, "stores", [whole]):
        if part.seen:
            rows = np.flatnonzero(part.index()[0] >= 0)
            found += [part.state_name(), rows.tolist()]
            found += [part.mapping.mem[at : at + n * part.layout.max_size].reshape(-1, n)[rows].tobytes() for at, n in part.layout.columns]
    return found


@functools.cache
def expected(kind: str) -> list[Any]:
    """The image of a buffer in RAM that was fed everything at once."""
    with KINDS[kind]() as buffer:
        everything = Samples(0, END)
        buffer.add(everything.batch, metadata=everything.metadata)
        return image(buffer)


@contextlib.contextmanager
def tiny(journal: int, chunk: int) -> Iterator[None]:
    """Small journals and plans, so that one add is many commits."""
    before = create.JOURNAL_BYTES, feeding.MAX_PLANNED
    create.JOURNAL_BYTES, feeding.MAX_PLANNED = journal, chunk
    try:
        yield
    finally:
        create.JOURNAL_BYTES, feeding.MAX_PLANNED = before


STEPS = ["commit_rows", "save_rows", "write_field", "write_index", "seal_block", "keep_last"]


@contextlib.contextmanager
def interrupted(step: str, after: int, done: bool) -> Iterator[None]:
    """KeyboardInterrupt at the given call of a kernel, before or after it has run."""
    real = getattr(kernel, step)
    calls = 0

    def call(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == after + 1:
            if done:
                real(*args)
            raise KeyboardInterrupt
        return real(*args)

    setattr(kernel, step, call)
    writer_module.ONE_CALL = step == "commit_rows"
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        setattr(kernel, step, real)
        writer_module.ONE_CALL = True


class History:
    """A buffer to which things happen. It has always seen a prefix of the stream."""

    def __init__(self, kind: str, folder: str | None) -> None:
        self.kind, self.folder, self.copies = kind, folder, 0
        self.path = None if folder is None else os.path.join(folder, "b.h5")
        self.buffer: Any = KINDS[kind](self.path)

    def feed(self, n: int, way: str, back: int = 0, fails_at: int = END) -> None:
        seen = self.buffer.seen
        start = max(0, seen - back)
        s = Samples(start, min(END, seen + n), fails_at + seen - start)
        at = start if back else None
        if way == "add":
            self.buffer.add(s.batch, metadata=s.metadata, at=at)
        elif way == "update":
            self.buffer.update(s, metadata=s.metadata, at=at)
        elif way == "list":  # no targets: a buffer that balances reads the labels
            self.buffer.update([s[i] for i in range(len(s))], metadata=s.metadata, at=at)
        else:
            pieces = {k: v[::-1].copy()[::-1] for k, v in s.metadata.items()}  # not contiguous
            self.buffer.add([np.asfortranarray(s.x), s.targets.astype(">i8")], metadata=pieces, group=s.targets.tolist(), at=at)

    def reopen(self, how: str) -> None:
        if self.path is None or self.buffer.schema is None:
            return
        if how == "killed":  # as the file is at this moment, with an undo file if there is one
            self.copies += 1
            copy = os.path.join(str(self.folder), f"copy{self.copies}")
            os.mkdir(copy)
            for name in os.listdir(str(self.folder)):
                if name.startswith("b.h5"):
                    one = os.path.join(str(self.folder), name)
                    (shutil.copytree if os.path.isdir(one) else shutil.copy)(one, os.path.join(copy, name))
            self.buffer.close()
            self.path = os.path.join(copy, "b.h5")
            self.folder = copy
        elif how != "forget":
            self.buffer.close()
        self.buffer = None
        self.buffer = KINDS[self.kind](self.path, mode="r+") if how != "open" else leanreplay.open(str(self.path), mode="r+")


def do(h: History, op: tuple[Any, ...]) -> None:
    name, *args = op
    if name == "feed":
        h.feed(*args)
    elif name == "fail":
        n, fails_at = args
        with contextlib.suppress(OSError):
            h.feed(n, "update", 0, fails_at)
    elif name == "refused":
        before = h.buffer.seen
        s = Samples(0, 3)
        with pytest.raises(SchemaError):
            h.buffer.add((s.x, s.targets[:2]), metadata=s.metadata)
        if h.buffer.schema is not None:
            with pytest.raises(SchemaError):
                h.buffer.add((s.x.astype(np.int16), s.targets), metadata=s.metadata)
        assert h.buffer.seen == before
    elif name == "interrupt":
        n, step, after, done, reopen = args
        with interrupted(step, after, done):
            h.feed(n, "add")
        if reopen:
            h.reopen(reopen)
    elif name == "reopen":
        h.reopen(*args)
    elif name == "detour":
        n, reopen, twice, cut = args
        state = h.buffer.state_dict()
        before = h.buffer.seen
        for i in range(1 + twice):
            if cut:
                with interrupted(*cut):
                    h.feed(n, "add")
            h.feed(n, "add")
            if reopen and before:
                h.reopen(reopen)
            if i < twice:
                h.buffer.state_dict()
        h.buffer.load_state_dict(state)
        assert h.buffer.seen == before
    elif name == "save":
        (n,) = args
        before = h.buffer.seen
        if before:
            with tempfile.TemporaryDirectory() as folder:
                h.buffer.save(folder)
                h.feed(n, "add")
                h.buffer.load(folder)
        assert h.buffer.seen == before
    elif name == "sample" and len(h.buffer):
        h.buffer.sample(min(len(h.buffer), 5))


COUNT = st.integers(0, 45)
REOPEN = st.sampled_from(["close", "forget", "open", "killed"])
WAYS = st.sampled_from(["add", "update", "list", "other"])
CUT = (st.sampled_from(STEPS), st.integers(0, 12), st.booleans())
OPS = st.one_of(
    st.tuples(st.just("feed"), COUNT, WAYS, st.integers(0, 30)),
    st.tuples(st.just("feed"), COUNT, WAYS, st.just(0)),
    st.tuples(st.just("interrupt"), st.integers(1, 45), *CUT, st.none() | REOPEN),
    st.tuples(st.just("reopen"), REOPEN),
    st.tuples(st.just("detour"), COUNT, st.none() | REOPEN, st.booleans(), st.none() | st.tuples(*CUT)),
    st.tuples(st.just("save"), COUNT),
    st.tuples(st.just("sample")),
)
FIXED = settings(derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def run(kind: str, folder: str | None, history: list[tuple[Any, ...]], journal: int, chunk: int) -> None:
    with tiny(journal, chunk):
        h = History(kind, folder)
        try:
            for op in history:
                do(h, op)
            h.feed(END, "update")
            assert image(h.buffer) == expected(kind)
            h.reopen("close")
            assert image(h.buffer) == expected(kind)
        finally:
            if h.buffer is not None:
                h.buffer.close()


# -- tests -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(FIXED, max_examples=times(16, 50))
@given(history=st.lists(OPS, max_size=14), journal=st.sampled_from([1, 4 << 20]), chunk=st.sampled_from([1, 5, 1 << 16]))
def test_any_history_in_memory(kind: str, history: list[tuple[Any, ...]], journal: int, chunk: int) -> None:
    """G2 in RAM: any history ends with the bytes of one add."""
    run(kind, None, history, journal, chunk)


@pytest.mark.parametrize("kind", KINDS)
@settings(FIXED, max_examples=times(16, 50))
@given(history=st.lists(OPS, max_size=14), journal=st.sampled_from([1, 4 << 20]), chunk=st.sampled_from([1, 5, 1 << 16]))
def test_any_history_on_disk(kind: str, history: list[tuple[Any, ...]], journal: int, chunk: int) -> None:
    """G2 on disk: any history, with the file closed, forgotten or copied in between, ends with the bytes of one add in RAM."""
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        run(kind, folder, history, journal, chunk)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
def test_interrupted_at_every_call(kind: str, step: str) -> None:
    """G2: the first 20 calls of each kernel of a commit, before and after; then again at once; the rest is fed as ever."""
    for after in range(times(7, 20)):
        with tiny(1, 1 << 16), KINDS[kind]() as buffer:
            s = Samples(0, 20)
            buffer.add(s.batch, metadata=s.metadata)
            for done in (False, True):
                with interrupted(step, after, done):
                    s = Samples(buffer.seen, 70)
                    buffer.add(s.batch, metadata=s.metadata)
            s = Samples(buffer.seen, END)
            buffer.add(s.batch, metadata=s.metadata)
            assert image(buffer) == expected(kind), f"{step} {after}"


@pytest.mark.parametrize("kind", KINDS)
def test_one_by_one(kind: str, tmp_path: Any) -> None:
    """G2: batches of one on disk."""
    with KINDS[kind](tmp_path / "b.h5") as buffer:
        for i in range(END):
            s = Samples(i, i + 1)
            buffer.add(s.batch, metadata=s.metadata)
        assert image(buffer) == expected(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_seed_and_stream_matter(kind: str) -> None:
    """The image does depend on them, so the tests above compare something."""
    everything = Samples(0, END)
    cls = type(KINDS[kind]())
    size = {"rows_per_part": 23} if kind == "infinite" else {"max_size": 17}
    for options in ({"seed": 4, "stream": 2}, {"seed": 3, "stream": 1}):
        with cls(**size, **options) as buffer:
            buffer.add(everything.batch, metadata=everything.metadata)
            found = image(buffer)
        same_rows = kind in ("window", "infinite") and options["stream"] == 2
        assert (found == expected(kind)) == same_rows


def test_small_journals_are_small() -> None:
    """What `tiny` is for: an add becomes many commits."""
    with tiny(1, 1 << 16), ReservoirBuffer(17) as buffer:
        s = Samples(0, 30)
        buffer.add(s.batch, metadata=s.metadata)
        assert isinstance(buffer.current.store, writer_module.Writer)
        assert buffer.current.store.max_rows == 4
        assert buffer.current.store.sequence >= 5
