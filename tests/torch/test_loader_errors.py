"""ReplayLoader: errors come in their turn; loaders in several processes."""

from __future__ import annotations

import gc
import os
import random
import signal
import time

import numpy as np
import pytest
from children import child, result
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
    needs_fork,
    plain,
    samples,
    script,
    take,
)
from torch.utils.data import DataLoader, TensorDataset

import leanreplay
from leanreplay import (
    ArgumentError,
    CorruptionError,
    ModeError,
    ReservoirBuffer,
)
from leanreplay.torch import ReplayLoader

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("kernels", "nothing_left")


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", [None, "class"])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_errors_of_planning(prefetch, balance):
    """A buffer that is empty, or too small: the error comes when asked for the batch, and again, and the batch when it can be drawn."""
    buffer, twin = (ReservoirBuffer(40, seed=1) for _ in range(2))
    with ReplayLoader(buffer, SIZE, prefetch=prefetch, balance=balance) as loader:
        for _ in range(2):
            with pytest.raises(ArgumentError, match=f"{SIZE} from a.* empty buffer|{SIZE} from a buffer of 0"):
                next(loader)
        if balance is None:
            feed(buffer, SIZE - 1)
            feed(twin, SIZE - 1)
            with pytest.raises(ArgumentError, match="at most 5"):
                next(loader)
        feed(buffer, 50)
        feed(twin, 50)
        oracle = Oracle(twin, SIZE, prefetch) if balance is None else balanced_oracle(twin, SIZE, prefetch, balance)
        for _ in range(5):
            assert plain(next(loader)) == next(oracle)


def test_an_error_of_planning_waits_for_its_turn():
    """Batches planned before come first; the one that could not be planned is planned when asked for again."""
    buffer, twin = (ReservoirBuffer(40, seed=1) for _ in range(2))
    states = []
    for b in (buffer, twin):
        feed(b, SIZE - 2)
        states.append(b.state_dict())
        feed(b, 30)
    oracle = Oracle(twin, SIZE, 2)
    with ReplayLoader(buffer, SIZE, prefetch=2) as loader:
        assert plain(next(loader)) == next(oracle)
        buffer.load_state_dict(states[0])
        assert plain(next(loader)) == oracle.ahead[0] and plain(next(loader)) == oracle.ahead[1]
        with pytest.raises(ArgumentError, match="buffer of 4"):
            next(loader)
        twin.load_state_dict(states[1])
        feed(buffer, 30)
        feed(twin, 30)
        oracle.ahead, oracle.delivered = [], 3
        for _ in range(4):
            assert plain(next(loader)) == next(oracle)


@pytest.mark.parametrize("prefetch", [1, 2, 4])
@pytest.mark.parametrize("place", ["transform", "target_transform", "batch_transform"])
@pytest.mark.parametrize("error", [Trouble, SystemExit, KeyboardInterrupt])
def test_errors_of_transforms(place, prefetch, error):
    """They reach the caller at that batch, not before, which then comes again: none is lost or doubled."""
    per_batch = 1 if place == "batch_transform" else SIZE
    function = Fails(2 * per_batch + 1, 3 * per_batch, error=error)
    buffer = make()
    options = {}
    if place == "batch_transform":
        options["batch_transform"] = function
    else:
        setattr(buffer, place, function)
    oracle = Oracle(make(), SIZE, prefetch)
    with ReplayLoader(buffer, SIZE, prefetch=prefetch, **options) as loader:
        raised = []
        for i in range(8):
            wanted = next(oracle)
            while True:
                try:
                    got = loader.__next__()
                    break
                except error as found:
                    assert "call" in str(found)
                    raised.append(i)
            assert plain(got) == wanted
    assert raised and raised[0] == 2 and len(raised) <= 2


def test_a_transform_that_runs_out():
    """StopIteration must not end the loop, as if there were no more batches."""
    buffer, numbers = make(), iter(range(3))
    seen = 0
    with ReplayLoader(buffer, SIZE, batch_transform=lambda batch: (next(numbers), batch)) as loader:
        with pytest.raises(ArgumentError, match="batch_transform raised StopIteration") as caught:
            for _ in loader:
                seen += 1
        assert seen == 3 and isinstance(caught.value.__cause__, StopIteration)
        numbers = iter(range(3, 9))
        oracle = Oracle(make(), SIZE, 2)
        wanted = [next(oracle) for _ in range(4)][3]
        number, batch = next(loader)[0]
        assert number == 3 and plain(batch) == wanted[0]  # the one that failed


def test_a_transform_that_always_fails():
    """It raises every time, until it is put right."""
    buffer = make()
    buffer.transform = lambda x: 1 / 0
    with ReplayLoader(buffer, SIZE, prefetch=3) as loader:
        for _ in range(5):
            with pytest.raises(ZeroDivisionError):
                next(loader)
        buffer.transform = None
        oracle = Oracle(make(), SIZE, 3)
        for _ in range(5):
            assert plain(next(loader)) == next(oracle)
        finish(loader)
        buffer.transform = lambda x: np.zeros(1 + int(x[0]) % 3)
        for _ in range(3):
            assert plain(next(loader)) == next(oracle)  # planned, and made, with the transform before
        with pytest.raises(ArgumentError, match="cannot be stacked"):
            take(loader, 4)


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_a_corrupted_row(prefetch, settled, tmp_path):
    """A batch that holds it raises CorruptionError when its turn comes, in the background or copied by `add`; repaired, it comes."""
    made = make("window", "disk", tmp_path)
    made.close()
    buffer = leanreplay.open(made.path, mode="r+")  # which trusts no row yet
    expected = Oracle(make("window"), SIZE, prefetch)
    order = [next(expected) for _ in range(10)]
    rows = [np.frombuffer(batch[1]["idx"][2], np.int64) for batch in order]
    row = int(next(r for r in rows[4] if not any(r in earlier for earlier in rows[:4])))
    at = buffer.current.store.layout.columns[0][0] + 20 * row
    with open(buffer.path, "r+b", buffering=0) as file, ReplayLoader(buffer, SIZE, prefetch=prefetch) as loader:

        def flip():
            byte = os.pread(file.fileno(), 1, at)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1]), at)

        flip()
        for i in range(4):
            if settled and i == 4 - prefetch + 1:
                finish(loader)
            assert plain(next(loader)) == order[i]
        if settled:
            loader._settle()
        for _ in range(2):
            with pytest.raises(CorruptionError, match=rf"\[{row}\]"):
                next(loader)
        flip()
        for i in range(4, 10):
            assert plain(next(loader)) == order[i]


def test_a_row_damaged_after_its_copy(tmp_path):
    """A batch that is made is made: what happens to its rows in the file is nothing to it."""
    buffer, oracle = make("window", "disk", tmp_path), Oracle(make("window"), SIZE, 2)
    with open(buffer.path, "r+b", buffering=0) as file, ReplayLoader(buffer, SIZE) as loader:
        assert plain(next(loader)) == next(oracle)
        finish(loader)
        at, nbytes = buffer.current.store.layout.columns[0][0], 20 * 40
        whole = os.pread(file.fileno(), nbytes, at)
        os.pwrite(file.fileno(), bytes(nbytes), at)
        loader._settle()  # as before an `add`
        assert plain(next(loader)) == next(oracle)
        os.pwrite(file.fileno(), whole, at)
        loader._planned[-1].ready.wait(PATIENCE)


def error_of(function):
    try:
        return function()
    except Exception as error:
        return error


def test_bad_arguments():
    """Errors of our own, when the loader is made."""
    buffer = make()
    wrong = [
        {"buffer": [1, 2]}, {"batch_size": 0}, {"batch_size": None}, {"batch_size": True}, {"batch_size": 2.5}, {"batch_size": 2**40},
        {"prefetch": 0}, {"prefetch": None}, {"prefetch": -1}, {"batches": 0}, {"batches": "x"}, {"seed": 2**127}, {"seed": "x"},
        {"batch_transform": 3}, {"balance": 3}, {"device": "nonsense"}, {"device": object()},
    ]  # fmt: skip
    for options in wrong:
        with pytest.raises(ArgumentError, match=next(iter(options))):
            ReplayLoader(**{"buffer": buffer, "batch_size": 4, **options})
    gc.collect()
    assert not buffer.current.before_write, "a loader that was refused is asked before every write"


# -- processes ---------------------------------------------------------------------------------------------------------


@needs_fork
@pytest.mark.parametrize("where", ["ram", "disk"])
def test_fork(where, tmp_path):
    """A child says that it must make its own loader, without waiting for a thread that it does not have; its own loader works. The parent
    goes on as if nothing had been.
    """
    buffer, twin = make("window", where, tmp_path), make("window")
    oracle, fresh = Oracle(twin, SIZE, 3), Oracle(twin, SIZE, 3)
    gate = Gate()
    with ReplayLoader(buffer, SIZE, prefetch=3, batch_transform=gate) as loader, gate:
        gate.release()
        assert plain(next(loader)) == next(oracle)  # the background is in a batch, two wait

        def fresh_one(_):
            said = [error_of(call) for call in (lambda: next(loader), loader.state_dict)]
            assert all(isinstance(e, ModeError) and "process" in str(e) for e in said), said
            assert isinstance(error_of(lambda: buffer.add(samples(0, 3))), ModeError)
            with ReplayLoader(buffer, SIZE, prefetch=3) as mine:
                found = [plain(next(mine)) for _ in range(4)]
            loader.close()
            return found == [next(fresh) for _ in range(4)]

        assert result(*child(fresh_one, 20)) is True
        feed(buffer, 20)
        feed(twin, 20)
        gate.release(100)
        for _ in range(6):
            assert plain(next(loader)) == next(oracle)


@needs_fork
def test_fork_at_any_moment(tmp_path):
    """The child's buffer and a loader of its own work wherever the parent's background is."""
    buffer = make("window", "disk", tmp_path)
    rng = random.Random(0)

    def draw(_):
        with ReplayLoader(buffer, SIZE) as mine:
            return sum(len(y) for (_, y), _ in take(mine, 3))

    with ReplayLoader(buffer, SIZE, prefetch=4) as loader:
        for _ in range(25):
            take(loader, rng.randrange(4))
            time.sleep(rng.random() * 0.001)
            assert result(*child(draw)) == 3 * SIZE


@needs_fork
def test_beside_data_loader_workers():
    """Workers that are forked while the background runs, as in most training loops."""
    x, y = samples(0, 60)
    stream = DataLoader(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), 10, num_workers=2, multiprocessing_context="fork")
    buffer, oracle = make(), Oracle(make(), SIZE, 2)
    with ReplayLoader(buffer, SIZE) as loader:
        for _ in range(2):
            for (a, b), got in zip(stream, loader, strict=False):
                assert plain(got) == next(oracle) and torch.equal(a[:, 0].long(), b)
                feed(buffer, 5)
                feed(oracle.buffer, 5)


@pytest.mark.parametrize("kind", ["window", "infinite"])
def test_reader_beside_a_writer(kind, tmp_path, monkeypatch):
    """A loader of a reader: samples are whole and distinct while another process adds, rolls back and resizes, and new ones come."""
    monkeypatch.setattr(leanreplay.storage.locks, "PATIENCE", PATIENCE / 2)  # on a busy machine a writer may stand still for long
    writer = script(
        """
        kind, path = sys.argv[1:]
        if kind == "window":
            buffer = leanreplay.SlidingWindowBuffer(40, path)
        else:
            buffer = leanreplay.InfiniteBuffer(path, rows_per_part=200)
        feed(buffer, 60)
        print("there", flush=True)
        i, parent = 0, os.getppid()
        while os.getppid() == parent:  # until it is killed, or left alone
            i += 1
            if i % 50 == 1:
                state = buffer.state_dict()
            feed(buffer, 7)
            if i % 50 == 30:
                buffer.load_state_dict(state)
            if i % 200 == 0 and kind == "window":
                buffer.resize(20)
                buffer.resize(40)
            time.sleep(0.001)
        """,
        kind,
        tmp_path / "b",
    )
    try:
        assert writer.stdout.readline() == "there\n", writer.stderr.read()
        with leanreplay.open(tmp_path / "b") as buffer:
            for balance in (None, "class"):
                with ReplayLoader(buffer, SIZE, prefetch=4, balance=balance) as loader:
                    seen, batches = set(), 0
                    while batches < 400 or len(seen) <= 100:
                        batches += 1
                        (x, y), meta = next(loader)
                        p = meta["position"]
                        assert (x == p[:, None]).all() and torch.equal(y, p % 5) and torch.equal(meta["z"], p + 0.5)
                        assert balance or len(set(p.tolist())) == SIZE
                        seen |= set(p.tolist())
    finally:
        writer.kill()
        writer.communicate(PATIENCE)
    assert writer.returncode == -signal.SIGKILL, "the writer had ended"


@pytest.mark.parametrize("kind", ["window", "infinite"])
def test_reader_of_fewer_rows(kind, tmp_path):
    """Rows that were planned and are no more, after a resize or a rollback in the writer, are drawn anew: no error."""
    buffer = make(kind, "disk", tmp_path, 8)
    state = buffer.state_dict()
    if kind == "window":
        buffer.resize(5000)
    feed(buffer, 5000 if kind == "window" else 200)
    gate = Gate()
    with leanreplay.open(buffer.path) as reader, ReplayLoader(reader, SIZE, prefetch=3, batch_transform=gate) as loader, gate:
        gate.release()
        next(loader)
        if kind == "window":
            buffer.resize(8)
        else:
            buffer.load_state_dict(state)
        gate.release(100)
        for i in range(8):
            (x, y), meta = next(loader)
            assert (x == meta["position"][:, None]).all() and torch.equal(y, meta["position"] % 5)
            assert i < 1 or meta["idx"].max() < 8
    assert not buffer.check()


def test_reader_of_what_stands_still(tmp_path):
    """A reader's batches are the writer's, as long as nothing changes."""
    buffer = make("window", "disk", tmp_path)
    with leanreplay.open(buffer.path) as reader, ReplayLoader(reader, SIZE, seed=3) as loader:
        oracle = Oracle(buffer, SIZE, 2, seed=3)
        assert [plain(b) for b in take(loader, 5)] == [next(oracle) for _ in range(5)]
        with pytest.raises(ModeError):
            feed(reader, 5)
        assert [plain(b) for b in take(loader, 5)] == [next(oracle) for _ in range(5)]
