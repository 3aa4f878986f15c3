"""Any history of a grouped buffer: what it holds depends on the stream alone."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grouped import KINDS, Dataset, assert_agree, blocks, growing, ids, image, made, model, quiet, samples, tail, tiny
from grouped_oracle import Grouped
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nightly import times
from paths import in_memory
from storage_kernels import kernel

import leanreplay
from leanreplay import (
    ArgumentError,
    SchemaError,
)
from leanreplay.storage import writer as writer_module

OPS = st.one_of(
    st.tuples(st.just("feed"), st.integers(0, 40), st.sampled_from(["add", "update", "list"]), st.integers(0, 20)),
    st.tuples(st.just("feed"), st.integers(1, 40), st.just("add"), st.just(0)),
    st.tuples(
        st.just("interrupt"),
        st.integers(1, 40),
        st.sampled_from(["commit_rows", "save_rows", "save_freed", "write_field", "write_index", "seal_block", "hash_log", "keep_last"]),
        st.integers(0, 8),
        st.booleans(),
    ),
    st.tuples(st.just("reopen"), st.sampled_from(["close", "forget", "open"])),
    st.tuples(
        st.just("kill"), st.integers(1, 40), st.sampled_from(["save_freed", "write_field", "seal_block", "hash_log"]), st.integers(0, 6)
    ),
    st.tuples(st.just("resize"), st.integers(1, 12)),
    st.tuples(st.just("mark")),
    st.tuples(st.just("back")),
    st.tuples(st.just("save"), st.integers(0, 30)),
)


class History:
    """A buffer, its model, and what happens to both."""

    def __init__(self, kind: str, seed: int, size: int, folder: str | None) -> None:
        self.kind, self.seed, self.total = kind, seed, max(1, size // 2)
        rng = random.Random(seed)
        groups = rng.choice([2, 5, 25])
        groups = min(groups, self.total) if KINDS[kind][1] else groups
        numbers = ids(rng, groups)
        self.labels = [numbers[g] for g in itertools.islice(rng.choice([tail, blocks, growing])(rng, groups), 2000)]
        self.folder = folder
        self.path = None if folder is None else os.path.join(folder, "b.h5")
        self.model = model(kind, size, seed, self.total)
        self.points: list[tuple[Any, Grouped]] = []
        self.buffer: Any = made(kind, size, self.path, self.total, seed=seed)

    def feed(self, n: int, way: str = "add", back: int = 0) -> None:
        start = max(0, self.model.seen - back)
        stop = self.model.seen + n
        group, x = self.labels[start:stop], samples(start, stop)
        at = start if back else None
        if way == "add":
            self.buffer.add(x, group=np.array(group, np.int64), at=at)
        else:
            self.buffer.update(Dataset(x, group if way == "update" else None), group=group if way == "list" else None, at=at)

    def advance(self) -> None:
        """Bring the model to where the buffer is."""
        seen = self.buffer.seen
        assert seen >= self.model.seen
        self.model.add(self.labels[self.model.seen : seen])

    def do(self, name: str, *args: Any) -> None:
        if name == "feed":
            self.feed(*args)
            assert self.buffer.seen == self.model.seen + args[0]
        elif name == "interrupt":
            n, step, after, done = args
            with contextlib.suppress(KeyboardInterrupt), hooked(step, after, done, interrupt):
                self.feed(n)
        elif name == "reopen":
            self.reopen(*args)
        elif name == "kill":
            self.kill(*args)
        elif name == "resize":
            size = max(args[0], self.total) if KINDS[self.kind][1] else args[0]
            if self.model.seen:
                self.points = self.points if size == self.model.size else []
                quiet(self.buffer, size)
                self.model.resize(size)
        elif name == "mark" and self.model.seen:
            content = self.model.state()
            state = self.buffer.state_dict()
            if not self.points or self.points[-1][1].state() != content:
                self.points = [*self.points, (state, self.model.copy())][-2:]
        elif name == "back" and self.points:
            state, self.model = self.points[-1][0], self.points[-1][1].copy()
            self.buffer.load_state_dict(state)
            assert self.buffer.seen == self.model.seen
            if len(self.points) > 1 and self.model.seen % 2:
                self.points.pop()
        elif name == "save" and self.model.seen:
            with tempfile.TemporaryDirectory() as folder:
                self.buffer.save(folder)
                self.feed(args[0])
                self.buffer.load(folder)
            self.points = []
        self.advance()
        self.model.check()

    def reopen(self, how: str) -> None:
        if self.path is None or self.buffer.schema is None:
            return
        if how != "forget":
            self.buffer.close()
        self.buffer = None
        self.buffer = leanreplay.open(self.path, mode="r+") if how == "open" else made(self.kind, None, self.path, mode="a")

    def kill(self, n: int, step: str, after: int) -> None:
        """A child goes on, and is killed at some step of a commit."""
        if self.path is None or self.buffer.schema is None or not hasattr(os, "fork"):
            return
        self.buffer.close()
        pid = os.fork()
        if pid == 0:
            try:
                self.buffer = leanreplay.open(self.path, mode="r+")
                with hooked(step, after, False, die):
                    self.feed(n)
                die()
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), status
        self.buffer = leanreplay.open(self.path, mode="r+")


def interrupt() -> None:
    raise KeyboardInterrupt


def die() -> None:
    os.kill(os.getpid(), 9)


@contextlib.contextmanager
def hooked(step: str, after: int, done: bool, action: Callable[[], None]) -> Iterator[None]:
    """Do something at the given call of a kernel, before or after it has run."""
    real = getattr(kernel, step)
    calls = 0
    writer_module.ONE_CALL = step == "commit_rows"

    def call(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != after + 1:
            return real(*args)
        if done:
            real(*args)
        return action()

    setattr(kernel, step, call)
    try:
        yield
    finally:
        setattr(kernel, step, real)
        writer_module.ONE_CALL = True


FIXED = settings(derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("kind", KINDS)
@settings(FIXED, max_examples=times(5, 15))
@given(
    history=st.lists(OPS, min_size=2, max_size=14),
    seed=st.integers(0, 50),
    size=st.sampled_from([1, 2, 4, 9, 20]),
    journal=st.sampled_from([1, 8 << 20]),
    chunk=st.sampled_from([1, 5, 1 << 16]),
)
def test_any_history(kind: str, where: str, history: list[Any], seed: int, size: int, journal: int, chunk: int) -> None:
    """G2, G3: however the stream is cut, whatever is interrupted, killed, opened again and rolled back: the model after each step."""
    with tiny(journal, chunk), tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        h = History(kind, seed, size, folder if where == "disk" else None)
        try:
            for op in history:
                h.do(*op)
                assert_agree(h.buffer, h.model, str(op))
            h.do("feed", 60)
            h.do("reopen", "close")
            h.do("feed", 30)
            assert_agree(h.buffer, h.model, "in the end")
        finally:
            if h.buffer is not None:
                h.buffer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_do_not_depend_on_batches(kind: str, tmp_path: Path) -> None:
    """G2: the same bytes from one add in memory, from batches of one on disk, and from anything between."""
    for seed in range(16):
        rng = random.Random(seed)
        end = rng.choice([150, *range(8, 40)])  # with free rows at the end as well
        groups = 4 if KINDS[kind][1] else 12
        labels = np.array(list(itertools.islice(growing(rng, groups), end)))
        found = []
        for way in range(4):
            path = None if way == 0 else str(tmp_path / f"{kind} {seed} {way}.h5")
            with tiny(1 if way == 2 else 8 << 20, 3 if way == 3 else 1 << 16), made(kind, 9, path, 4, seed=seed) as buffer:
                start = 0
                while start < end:
                    n = min([end, 1, end, rng.randint(1, 30)][way], end - start)
                    buffer.add(samples(start, start + n), group=labels[start : start + n])
                    start += n
                found.append(image(buffer))
        assert all(other == found[0] for other in found[1:]), seed


@pytest.mark.parametrize("kind", KINDS)
def test_refused_batches_change_nothing(kind: str) -> None:
    """A batch with a wrong label, shape or group is refused whole, new groups included."""
    with made(kind, 6, total=3) as buffer:
        labels = np.arange(40) % 3
        buffer.add(samples(0, 40), group=labels)
        before = image(buffer)
        for wrong in (labels.astype(float), labels[:-1], labels[None], labels.astype(np.uint64) + 2**63, labels.astype(str)):
            with pytest.raises(SchemaError):
                buffer.add(samples(40, 80), group=wrong)
        with pytest.raises(SchemaError):
            buffer.add(samples(40, 80).astype(np.int16), group=labels + 7)
        if KINDS[kind][1]:
            with pytest.raises(ArgumentError, match="of a total of 3"):
                buffer.add(samples(40, 80), group=np.append(labels[:-1], 3))
            with pytest.raises(ArgumentError, match="of a total of 3"):
                buffer.update(Dataset(samples(40, 80), [0] * 39 + [99]))
        assert image(buffer) == before
        assert sorted(buffer.group_sizes()) == [0, 1, 2]
        assert buffer.check() == []
