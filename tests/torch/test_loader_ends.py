"""ReplayLoader: however a pass ends, no thread outlives it."""

from __future__ import annotations

import contextlib
import gc
import linecache
import signal
import sys
import threading
import time
import weakref

import pytest
from loaders import (
    PATIENCE,
    SIZE,
    Fails,
    Gate,
    Oracle,
    Trouble,
    balanced_oracle,
    feed,
    finish,
    make,
    plain,
    script,
    take,
    threads,
    wait_for,
)

from leanreplay import (
    ArgumentError,
    LeanReplayError,
    ModeError,
)
from leanreplay.torch import ReplayLoader
from leanreplay.torch.loading import replay_loader as module

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("kernels", "nothing_left")


def test_close():
    """It joins the thread, at whatever the background is, takes back the hook, and may be called again; a closed loader says so."""
    for asked in range(4):
        buffer, slow = make(), lambda batch: (time.sleep(0.02), batch)[1]
        loader = ReplayLoader(buffer, SIZE, prefetch=3, batch_transform=slow)
        take(loader, asked)
        assert len(threads()) == (asked > 0) and len(buffer.current.before_write) == 1
        loader.close()
        assert not threads() and not buffer.current.before_write
        loader.close()
        for call in (loader.__next__, loader.state_dict):
            with pytest.raises(ModeError, match="closed"):
                call()
        feed(buffer, 5)
        buffer.close()


@pytest.mark.parametrize("how", ["close", "error", "load"])
def test_batches_that_nobody_will_get_are_not_made(how):
    """Closing waits for the batch that the background is at, not for all that are planned; nor do those after an error or a state."""
    buffer, gate, made = make(), Gate(), []
    loader = ReplayLoader(buffer, SIZE)
    state = loader.state_dict()
    loader.close()

    def transform(batch):
        made.append(gate(batch))
        if len(made) == 2 and how == "error":
            raise Trouble
        return batch

    loader = ReplayLoader(buffer, SIZE, prefetch=6, batch_transform=transform)
    with gate:
        gate.release()
        next(loader)
        if how == "close":
            release = threading.Timer(0.1, gate.release, [100])
            release.start()
            loader.close()
            release.join()
        elif how == "error":
            gate.release()
            with pytest.raises(Trouble):
                next(loader)
        else:
            loader.load_state_dict(state)
        assert loader._queue.qsize() <= 1  # the word to end
        gate.release(100)
        loader.close()
    assert len(made) <= 3


def test_context_manager_and_exceptions():
    """An exception in the loop ends the thread too; a loader within the loop of another is its own."""
    buffer = make()
    with pytest.raises(Trouble), ReplayLoader(buffer, SIZE) as loader:
        for _ in loader:
            with ReplayLoader(buffer, SIZE) as inner:
                next(inner)
            assert len(threads()) == 1
            raise Trouble
    assert not threads() and not buffer.current.before_write


def test_close_after_errors():
    """Errors that nobody asked for do not keep it from closing."""
    buffer = make()
    buffer.transform = Fails(SIZE + 2, 2 * SIZE + 2)
    loader = ReplayLoader(buffer, SIZE, prefetch=4)
    next(loader)
    finish(loader)
    loader.close()
    assert not threads()


@pytest.mark.parametrize("how", ["never asked", "in a loop", "planning", "transform", "error not asked for", "batches", "loaded"])
def test_forgotten_loaders(how):
    """Without `close`, the thread and the hook go with the loader, also after errors; the buffer can go as well."""
    buffer = make()
    options = {"batches": 2} if how == "batches" else {}
    if how == "transform":
        options["batch_transform"] = Fails(2, 3, 4)
    elif how == "error not asked for":
        options["batch_transform"] = Fails(2)
    loader = ReplayLoader(buffer, 100 if how == "planning" else SIZE, **options)
    if how == "in a loop":
        for _ in loader:
            break
    elif how == "batches":
        assert len(list(loader)) == 2
    elif how == "planning":
        with contextlib.suppress(ArgumentError):
            next(loader)
    elif how == "transform":
        next(loader)
        with contextlib.suppress(Trouble):
            next(loader)
    elif how == "error not asked for":
        next(loader)
        finish(loader)
    elif how == "loaded":
        next(loader)
        loader.load_state_dict(loader.state_dict())
        next(loader)
    gone = weakref.ref(loader)
    del loader
    gc.collect()
    assert wait_for(lambda: gc.collect() >= 0 and gone() is None), "something keeps the loader"
    assert wait_for(lambda: not threads()) and not buffer.current.before_write
    feed(buffer, 5)
    gone = weakref.ref(buffer)
    del buffer, options
    assert wait_for(lambda: gc.collect() >= 0 and gone() is None), "something keeps the buffer"


def test_the_end_of_the_interpreter():
    """A script that closes nothing ends at once and without a word, whatever the background does."""
    child = script(
        """
        loaders = [ReplayLoader(buffer, 8, prefetch=3, batch_transform=lambda b: (time.sleep(0.01), b)[1]) for _ in range(3)]
        next(loaders[0])
        for _ in range(5):
            next(loaders[1])
        feed(buffer, 5)
        print("end")
        """
    )
    out, err = child.communicate(timeout=PATIENCE)
    assert (child.returncode, out, err) == (0, "end\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("place", ["waiting", "adding"])
def test_ctrl_c(place):
    """SIGINT while the loop waits for a batch, or adds: KeyboardInterrupt, and the process ends."""
    child = script(
        """
        slow = 3600 if sys.argv[1] == "waiting" else 0
        loader = ReplayLoader(buffer, 8, prefetch=3, batch_transform=lambda b: (time.sleep(slow), b)[1])
        print("running", flush=True)
        while True:
            if not slow:
                next(loader)
                feed(buffer, 20)
            else:
                next(loader)
        """,
        place,
    )
    try:
        assert child.stdout.readline() == "running\n"
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=PATIENCE)
        assert child.returncode == -signal.SIGINT and err.rstrip().endswith("KeyboardInterrupt"), err
    finally:
        child.kill()


class Interrupt:
    """Raises KeyboardInterrupt when the n-th line of a file is about to run in this thread."""

    def __init__(self, n):
        self.n, self.count, self.where = n, 0, None

    def trace(self, frame, event, arg):
        if frame.f_code.co_filename != module.__file__:
            return None
        # Python looks for signals after calls, not where it leaves a `with`, enters a `try` or returns; these are lines all the same.
        text = linecache.getline(module.__file__, frame.f_lineno).lstrip()
        if event == "line" and not text.startswith(("with ", "try:", "return job.result")):
            self.count += 1
            if self.count == self.n:
                self.where = f"{frame.f_code.co_name}, line {frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(None)


@pytest.mark.parametrize("place", ["plain", "balance", "transform", "add"])
def test_ctrl_c_at_every_line(place):
    """Wherever Ctrl-C meets the loader, going on gives the same batches: none lost, doubled or waited for without end."""
    before = sys.gettrace()
    oracle = Oracle(make(), SIZE, 3) if place != "balance" else balanced_oracle(make(), SIZE, 3, "class")
    order = []
    for _ in range(6):
        order.append(next(oracle))
        if place == "add" and len(order) < 4:
            feed(oracle.buffer, 20)
    wrong, n, buffer = [], 0, make()
    done = False
    while not done:
        n += 1
        if place == "add":
            buffer = make()
        options = {"balance": "class"} if place == "balance" else {}
        if place == "transform":
            options["batch_transform"] = Fails(2, 5)
        loader = ReplayLoader(buffer, SIZE, prefetch=3, **options)
        got, interrupts, added = [], 0, 0
        with Interrupt(n) as interrupt:
            while len(got) < 4:
                try:
                    if added < len(got) and place == "add":
                        feed(buffer, 20, 60 + 20 * added)
                        added += 1
                        continue
                    got.append(next(loader))
                except KeyboardInterrupt:
                    interrupts += 1
                    added = (buffer.seen - 60) // 20
                except Trouble:
                    pass
                except LeanReplayError as error:
                    wrong.append(f"{interrupt.where}: {error!r}")
                    break
        done = interrupt.where is None
        if interrupts != (not done):
            wrong.append(f"{interrupt.where}: the interrupt was swallowed")
        found = [plain(batch) for batch in got]
        if found != order[: len(found)]:
            wrong.append(f"{interrupt.where}: {[order.index(f) if f in order else '?' for f in found]}")
        loader.close()
    sys.settrace(before)
    assert n > 30 and not wrong, "\n".join(wrong)


def test_ctrl_c_while_add_copies():
    """The interrupt comes out of `add`, which has done nothing, and not of some later batch; the batch is copied when `add` is repeated."""
    buffer, oracle = make("window"), Oracle(make("window"), SIZE, 3)
    gate = Gate()
    with ReplayLoader(buffer, SIZE, prefetch=3, batch_transform=gate) as loader, gate:
        gate.release()
        assert plain(next(loader)) == next(oracle)
        read = buffer.current.store.read
        main = threading.current_thread()

        def interrupted(*arguments):
            if threading.current_thread() is main:
                raise KeyboardInterrupt
            return read(*arguments)

        buffer.current.store.read = interrupted
        with pytest.raises(KeyboardInterrupt):
            feed(buffer, 40)
        buffer.current.store.read = read
        assert buffer.seen == 60
        feed(buffer, 40)
        gate.release(100)
        for wanted in oracle.ahead:
            assert plain(next(loader)) == wanted
