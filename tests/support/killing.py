"""Writers that are killed, stopped at every step and interrupted: what they feed, and what must be there."""

from __future__ import annotations

import functools
import gc
import glob
import io
import os
import random
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from children import child, killed, result
from nightly import times
from paths import in_memory
from storage_kernels import kernel

import leanreplay
from leanreplay import (
    GreedyClassBalancingBuffer,
    InfiniteBuffer,
    ReservoirBuffer,
    SlidingWindowBuffer,
)
from leanreplay.storage import layout as fmt
from leanreplay.storage import (
    paging,
    restore_points,
    system,
)
from leanreplay.storage import writer as writer_module

HOME = os.path.dirname(leanreplay.__file__)
ROWS = 48
BATCH = 30
KINDS = {
    "reservoir": lambda path, **o: ReservoirBuffer(ROWS, path, seed=3, **o),
    "window": lambda path, **o: SlidingWindowBuffer(ROWS, path, seed=3, **o),
    "greedy": lambda path, **o: GreedyClassBalancingBuffer(ROWS, path, seed=3, verify="always", **o),
    "infinite": lambda path, **o: InfiniteBuffer(path, rows_per_part=70, seed=3, **o),
}
BOUNDED = [kind for kind in KINDS if kind != "infinite"]


def stream(start: int, stop: int) -> dict[str, Any]:
    """What `add` gets for these positions."""
    return stream_at(np.arange(start, stop))


def stream_at(p: Any) -> dict[str, Any]:
    """Bytes of an odd number, labels that are not balanced, and metadata."""
    x = ((p[:, None] * 40503 + np.arange(1021) * 2654435761) >> 9).astype(np.uint8)
    y = np.minimum(p * 7919 % 11, 5)
    z = np.stack([p, -p, p % 17], 1).astype(np.float32)
    return {"batch": (x, y), "metadata": {"logits": z}}


def feed(buffer: Any, start: int, stop: int, at: bool = False) -> None:
    for here in range(start, stop, BATCH):
        buffer.add(**stream(here, min(stop, here + BATCH)), at=here if at else None)


def image(path: str) -> list[Any]:
    """The live bytes of a buffer's files and their index, from the bytes on disk alone: state words, then columns."""
    parts = sorted(glob.glob(os.path.join(glob.escape(path), "part-*.h5"))) if os.path.isdir(path) else [path]
    found: list[Any] = []
    for part in parts:
        data = np.fromfile(part, np.uint8)
        data.flags.writeable = False
        table = fmt.decode(lambda at, n, data=data: data[at : at + n].tobytes(), data.shape[0], part)
        words = [np.zeros(fmt.HEADER_WORDS, np.uint64) for _ in fmt.HEADERS]
        valid = [w for w, at in zip(words, fmt.HEADERS, strict=True) if kernel.read_block(data, at, w) and w[fmt.H_TAG] == table.tag]
        head = max(valid, key=lambda w: int(w[fmt.H_SEQ]))
        assert head[fmt.H_TARGET] == 0
        at, _ = table.columns[-3]
        if part is not path and head[fmt.H_SIZE] == 0:
            continue  # a part that was made, but holds nothing yet
        found.append(head[fmt.H_STATE : -1].tobytes())
        live = np.flatnonzero(data[at : at + 8 * table.max_size].view(np.int64) >= 0)
        found.append(live.tobytes())
        found += [data[at : at + n * table.max_size].reshape(-1, n)[live].tobytes() for at, n in table.columns]
    return found


@functools.cache
def expected(kind: str, seen: int) -> list[Any]:
    """The image of a buffer that was fed the first `seen` samples in one piece, without interruption."""
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        path = os.path.join(folder, "b.h5")
        with KINDS[kind](path) as buffer:
            buffer.add(**stream(0, seen))
        return image(path)


def assert_prefix(kind: str, buffer: Any, note: str) -> None:
    """The buffer is clean and holds exactly what its `seen` says."""
    assert [str(p) for p in buffer.check()] == [], note
    seen = buffer.seen
    if seen == 0:
        assert len(buffer) == 0, note
        return
    assert image(buffer.path) == expected(kind, seen), f"{note}, seen={seen}"
    if kind == "infinite":  # and not only by our own bookkeeping
        assert len(buffer) == seen, note
    (x, y), meta = buffer.get(buffer.get_metadata("idx"))
    right = stream_at(meta["position"])
    assert (x == right["batch"][0]).all(), note
    assert (y == right["batch"][1]).all(), note
    assert (meta["logits"] == right["metadata"]["logits"]).all(), note


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


class Steps:
    """What this process would leave if it were killed: around or within a call of a kernel or of the system, or at a line of the store.

    "Within" a kernel: its stores done but for a random part of their cache lines, because a compiled kernel's stores come in any
    order. A kill leaves nothing but the files, so a step is one that changes their bytes, and a copy of them is what a kill there
    leaves; one run gives all copies. With `at`, the process is killed indeed, at that step.
    """

    FILES = frozenset(name for room in ("storage", "buffers") for name in glob.glob(os.path.join(HOME, room, "*.py")))

    def __init__(self, folder: str, copies: str, at: int | None = None) -> None:
        self.folder, self.copies, self.at, self.count = folder, copies, at, 0
        self.last: Any = None

    def step(self) -> None:
        now = contents(self.folder)
        if now == self.last:
            return
        if self.at is None:
            lay_out(os.path.join(self.copies, str(self.count)), now)
        elif self.count == self.at:
            die()
        self.last, self.count = now, self.count + 1

    def install(self) -> None:
        gc.disable()  # which might run a destructor in between
        writer_module.ONE_CALL = False  # a commit in steps, each a call
        paging.SLOW_ROW = 1e9  # a read that is slow because it is traced must not count as one from a cold file, and take other steps
        for name, target in (("save_rows", 0), ("seal_block", 0), ("write_field", 0), ("write_index", 0), ("restore_rows", -1)):
            setattr(kernel, name, self._kernel(getattr(kernel, name), target))
        for module, name in (
            (system, "write_all"), (system, "allocate"), (system, "copy_file"), (system, "publish"), (os, "unlink"), (os, "replace"),
            (os, "link"), (os, "fsync"), (os, "ftruncate"), (writer_module.Writer, "publish"), (restore_points.RestorePoints, "keep"),
        ):  # fmt: skip
            setattr(module, name, self._call(getattr(module, name)))
        sys.settrace(self._trace)
        frame = sys._getframe(1)
        while frame is not None:  # the caller may stand in a traced file itself
            frame.f_trace, frame = self._trace(frame, "call", None), frame.f_back

    def _call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            self.step()
            if function.__name__ == "write_all":  # cut off in the middle
                data = memoryview(args[1]).cast("B")
                for part in (1, 2, 3):
                    os.pwrite(args[0], data[: len(data) * part // 4], args[2])
                    self.step()
            result = function(*args, **named)
            self.step()
            return result

        return call

    def _kernel(self, function: Any, target: int) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.step()
            mem = args[target]
            before = mem.copy()
            result = function(*args)
            for seed in range(3):
                self._tear(mem, before, random.Random(f"{self.count} {seed}"))
            self.step()
            return result

        return call

    def _tear(self, mem: Any, before: Any, rng: random.Random) -> None:
        """A step with a random part of the changed lines as they were."""
        words, old = mem[: mem.shape[0] // 8 * 8].view(np.uint64), before[: mem.shape[0] // 8 * 8].view(np.uint64)
        changed = [int(i) for i in np.unique(np.flatnonzero(words != old) // 8)]
        lines = [slice(8 * i, 8 * i + 8) for i in rng.sample(changed, rng.randint(0, len(changed)))]
        new = [words[line].copy() for line in lines]
        for line in lines:
            words[line] = old[line]
        self.step()
        for line, value in zip(lines, new, strict=True):
            words[line] = value

    def _trace(self, frame: Any, event: str, _: Any) -> Any:
        return self._line if frame.f_code.co_filename in self.FILES else None

    def _line(self, frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            self.step()
        return self._line


def contents(folder: str, inner: str = "") -> dict[str, bytes | None]:
    """The bytes of all files below a folder; None for a folder."""
    found: dict[str, bytes | None] = {}
    for name in sorted(os.listdir(folder)):
        path = f"{folder}/{name}"
        fd = os.open(path, os.O_RDONLY)
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            found[inner + name] = None
            found |= contents(path, f"{inner}{name}/")
        else:
            found[inner + name] = os.read(fd, status.st_size)
        os.close(fd)
    return found


def lay_out(folder: str, found: dict[str, bytes | None]) -> None:
    """A folder with these contents."""
    os.makedirs(folder)
    for name, data in found.items():
        if data is None:
            os.mkdir(os.path.join(folder, name))
        else:
            with open(os.path.join(folder, name), "wb") as file:
                file.write(data)


def stop_everywhere(work: Callable[[Callable[[], None]], None], scene: Scene, examine: Callable[[str], None], most: int = 10**6) -> int:
    """Run `work` in a child, and `examine` what it would leave at each step from its call of its argument on; two of them by a kill.

    Of more than `most` steps evenly many are taken. Returns how many.
    """
    copies = tempfile.mkdtemp(dir=os.path.dirname(scene.folder))

    def run(_: int, at: int | None = None) -> int:
        steps = Steps(scene.folder, copies, at)
        try:
            work(steps.install)
        finally:
            sys.settrace(None)
        return steps.count

    scene.reset()
    count = result(*child(run))
    examine("not stopped")
    chosen = range(0, count, -(-count // most))
    for at in chosen:
        scene.take(os.path.join(copies, str(at)))
        examine(f"step {at}")
    for at in (count // 3, count * 2 // 3):
        scene.reset()
        killed(*child(functools.partial(run, at=at)))
        examine(f"killed at step {at}")
    shutil.rmtree(copies)
    return len(chosen)


SOME = times(20, 30)  # steps, of kinds of buffers of which another one is stopped at every step


class Scene:
    """A folder that each trial begins with anew."""

    def __init__(self, tmp_path: Any, kind: str) -> None:
        self.base, self.folder, self.kind = str(tmp_path / "base"), str(tmp_path / "now"), kind
        os.mkdir(self.base)
        self.path = os.path.join(self.folder, "b.h5")

    def first(self) -> Any:
        """The buffer from which trials begin: fill it, and close it."""
        return KINDS[self.kind](os.path.join(self.base, "b.h5"))

    def reset(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.base, self.folder)

    def take(self, folder: str) -> None:
        """Go on from this folder, which is nobody else's."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.rename(folder, self.folder)

    def open(self, mode: str = "r+", **options: Any) -> Any:
        return KINDS[self.kind](self.path, mode=mode, **options)


def finish(buffer: Any, kind: str, note: str, end: int = 180) -> None:
    """Feed the rest: it ends as an uninterrupted run does."""
    feed(buffer, buffer.seen, end)
    assert image(buffer.path) == expected(kind, end), note


class Interrupts:
    """Raises KeyboardInterrupt at the given line or return events of the store's and buffers' code, counted from the last one."""

    def __init__(self, *after: int) -> None:
        self.after, self.count = list(after), 0

    def __enter__(self) -> Interrupts:
        gc.disable()  # an error in a destructor that it runs would not arrive
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        gc.enable()

    def _trace(self, frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in Steps.FILES or frame.f_code.co_name == "<genexpr>":
            return None
        if isinstance(frame.f_locals.get("self"), io.RawIOBase):
            return None  # which HDF5 calls: no exception comes through it as what it is
        return self._line

    def _line(self, frame: Any, event: str, _: Any) -> Any:
        if event in ("line", "return") and self.after:
            self.count += 1
            if self.count > self.after[0]:
                del self.after[0]
                self.count = 0
                sys.settrace(self._trace)
                raise KeyboardInterrupt
        return self._line


def interrupted(action: Callable[[], Any], *after: int) -> bool:
    """Run an action with interrupts; whether the first of them came."""
    with Interrupts(*after) as left:
        try:
            action()
        except KeyboardInterrupt:
            return True
    return len(left.after) < len(after)


def place(buffer: Any) -> str:
    """Where the bytes of a buffer are: its path, or its shared memory."""
    return buffer.path or buffer.current.store.mapping.link
