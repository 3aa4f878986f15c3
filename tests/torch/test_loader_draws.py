"""ReplayLoader and MixedLoader: draws, their state, and batches of two sources."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
from laws import assert_even, assert_inclusion
from loaders import SIZE, Fails, Oracle, feed, finish, make, needs_fork, plain, samples, take, through_a_file
from torch.utils.data import DataLoader, TensorDataset

import leanreplay
from leanreplay import (
    ArgumentError,
    LeanReplayError,
    ReservoirBuffer,
    SchemaError,
    SlidingWindowBuffer,
    StateError,
    WorkerError,
)
from leanreplay.torch import MixedLoader, ReplayLoader

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("kernels", "nothing_left")


# -- draws -------------------------------------------------------------------------------------------------------------


def test_seeds():
    """The same seed gives the same batches, another seed others; no draw of the buffer is used up."""
    buffer = make()
    with (
        ReplayLoader(buffer, SIZE) as a,
        ReplayLoader(buffer, SIZE, prefetch=4) as b,
        ReplayLoader(buffer, SIZE, seed=1) as c,
        ReplayLoader(buffer, SIZE, seed=-(2**127)) as d,
    ):
        lists = [[meta["position"].tolist() for _, meta in take(loader, 12)] for loader in (a, b, c, d)]
    assert lists[0] == lists[1] and all(p != q for p, q in itertools.combinations([lists[0], *lists[2:]], 2))
    assert len({tuple(p) for p in lists[0]}) == 12
    assert plain(buffer.sample(SIZE)) == plain(make().sample(SIZE))


def test_plain_draws_are_uniform():
    """Every row and pair of rows equally likely, distinct within a batch; first places independent of those of the batch before."""
    buffer = SlidingWindowBuffer(12)
    buffer.add(np.arange(12))
    kept, firsts = np.zeros((4000, 12), bool), np.zeros((12, 12))
    places, last = np.zeros((5, 12)), None
    with ReplayLoader(buffer, 5, prefetch=4) as loader:
        for i in range(4000):
            x, meta = next(loader)
            assert torch.equal(x, meta["idx"])
            kept[i, x] = True
            places[np.arange(5), x] += 1
            if last is not None:
                firsts[last, x[0]] += 1
            last = x[0]
    assert_inclusion(kept, 5, "rows of a batch")
    assert_even(firsts, "batches one after the other")
    for place in places:
        assert_even(place, "one place of the batch")


@pytest.mark.parametrize("balance, size", [("class", 12), ("class", 10), ("task", 7), ("task", 3), ("task", 64)])
def test_balanced_draws(balance, size):
    """Groups of 1 to 30 samples: each as often as the others in a batch, or once more; who that is, which of its samples, and where they
    stand is left to chance; samples repeat only where a group has too few.
    """
    lengths = [30, 1, 9, 4]
    y = np.repeat([5, -3, 7, 0], lengths)
    task = np.concatenate([np.repeat([2**40, 8], [20, 19]), [9, 10, 11, 12, 13]])  # other groups, and more of them
    order = np.random.default_rng(0).permutation(44)
    buffer = SlidingWindowBuffer(44)
    buffer.add((np.arange(44), y[order]), metadata={"task": task[order]})
    values = (y if balance == "class" else task)[order]
    names, number = np.unique(values, return_inverse=True)
    sizes = np.bincount(number)
    each, rest = divmod(size, len(names))
    more, rows, places = np.zeros(len(names)), np.zeros(44), np.zeros((size, len(names)))
    trials = 1500
    with ReplayLoader(buffer, size, balance=balance, prefetch=2) as loader:
        for _ in range(trials):
            (x, label), meta = next(loader)
            assert torch.equal(x, meta["idx"]) and np.array_equal(label.numpy(), y[order][x]) and x.shape == (size,)
            drawn = number[x]
            counts = np.bincount(drawn, minlength=len(names))
            assert ((counts == each) | (counts == each + 1)).all() and (counts > each).sum() == rest
            found = np.bincount(x, minlength=44)
            assert all(found[number == g].max() <= 1 for g in range(len(names)) if counts[g] <= sizes[g])
            more += counts > each
            rows += found
            places[np.arange(size), drawn] += 1
    if rest:
        # of `rest` out of so many groups, the counts' variance is smaller than of independent draws
        assert (abs(more - trials * rest / len(names)) < 5.5 * np.sqrt(trials * 0.25)).all(), more
    for g in np.flatnonzero(sizes > 1):
        counts = rows[number == g]
        assert (abs(counts - counts.mean()) < 5.5 * np.sqrt(counts.mean())).all(), (names[g], counts)
    expected = places.sum(0) / size  # of each group, in every place
    assert (abs(places - expected) < 5.5 * np.sqrt(expected) + 1).all()


def test_balanced_draws_of_one_group_are_uniform():
    """Pairs within a group, by the exact test; with another group beside it that gets its share too."""
    buffer = SlidingWindowBuffer(40)
    buffer.add((np.arange(40), (np.arange(40) < 28).astype(np.int64)))
    kept = np.zeros((3000, 12), bool)
    both = np.zeros((2, 2))
    with ReplayLoader(buffer, 8, balance="class") as loader:
        for i in range(3000):
            (x, y), _ = next(loader)
            kept[i, x[y == 0] - 28] = True
            both[int(x[y == 0][0] - 28 < 6), int(x[y == 1][0] < 14)] += 1
    assert_inclusion(kept, 4, "samples of a group")
    assert_even(both, "one group and the other")


def test_balance_by_other_columns():
    """A metadata field named "class" before the label; floats with NaN; what cannot be balanced over says why."""
    buffer = SlidingWindowBuffer(30)
    z = np.where(np.arange(30) % 10 == 0, np.nan, np.arange(30) % 2)
    buffer.add((np.arange(30), np.zeros(30, np.int64)), metadata={"class": np.arange(30) // 29, "z": z, "wide": np.zeros((30, 2))})
    with ReplayLoader(buffer, 4, balance="class") as loader:
        assert (next(loader)[1]["idx"] == 29).sum() == 2
    with ReplayLoader(buffer, 9, balance="z") as loader:
        found = next(loader)[1]["z"]
        assert found.isnan().sum() == 3 and (found == 0).sum() == 3 and (found == 1).sum() == 3
    for balance, message in (("wide", "single values"), ("nothing", "no metadata 'nothing'")):
        with ReplayLoader(buffer, 4, balance=balance) as loader, pytest.raises(SchemaError, match=message):
            next(loader)
    single = SlidingWindowBuffer(30)
    single.add(np.arange(30.0))
    with ReplayLoader(single, 4, balance="class") as loader, pytest.raises(SchemaError, match="pairs with an integer label"):
        next(loader)


# -- state -------------------------------------------------------------------------------------------------------------


WEIGHTED = {"by": "position", "alpha": 0.5, "where": ("position", slice(3, None))}


def play(loader, buffer, steps):
    """So many batches of a training loop that adds in between, and where each pass ended."""
    found, ends = [], []
    while len(found) < steps:
        for batch in loader:
            found.append(plain(batch))
            feed(buffer, 4)
            if len(found) == steps:
                break
        else:
            ends.append(len(found))
    return found, ends


@pytest.mark.parametrize("batches", [None, 3])
@pytest.mark.parametrize("how", [{}, {"balance": "class"}, {"balance": "task"}, WEIGHTED], ids=str)
@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_resume_at_every_position(prefetch, how, batches):
    """Checkpoint after p batches, train on, come back through torch.load(weights_only=True): the same batches and ends of passes."""
    options = {"prefetch": prefetch, "batches": batches, **how}
    whole = make()
    with ReplayLoader(whole, SIZE, **options) as loader:
        wanted, ends = play(loader, whole, 10)
    assert len({str(w) for w in wanted}) == 10 and ends == ([] if batches is None else [3, 6, 9])
    for p in range(9):
        buffer = make()
        with ReplayLoader(buffer, SIZE, **options) as loader:
            found, _ = play(loader, buffer, p)
            state = through_a_file({"loader": loader.state_dict(), "buffer": buffer.state_dict()})
            assert len(state["loader"]["ahead"]) <= prefetch
            assert found == wanted[:p]
            assert play(loader, buffer, 2)[0] == wanted[p : p + 2], "taking the state changed what comes"
            again = loader if p % 2 else ReplayLoader(buffer, SIZE, **options)
            if p % 3:
                buffer.load_state_dict(state["buffer"])
                again.load_state_dict(state["loader"])
            else:
                again.load_state_dict(state["loader"])
                buffer.load_state_dict(state["buffer"])
            assert plain(again.state_dict()["ahead"]) == plain(state["loader"]["ahead"])
            rest, later = play(again, buffer, 10 - p)
            again.close()
        assert rest == wanted[p:], p
        # a pass that was over when the state was taken has no end any more
        assert [p + end for end in later] in ([e for e in ends if e > p], [e for e in ends if e >= p]), (p, later)


@pytest.mark.parametrize("kind", ["reservoir", "infinite"])
def test_resume_in_a_new_process(kind, tmp_path):
    """On disk, the buffer opened anew and another prefetch: what was planned comes first, whatever else is asked for."""
    whole = make(kind)
    with ReplayLoader(whole, SIZE, prefetch=3) as loader:
        wanted, _ = play(loader, whole, 9)
    buffer = make(kind, "disk", tmp_path)
    path = buffer.path
    with ReplayLoader(buffer, SIZE, prefetch=3) as loader:
        play(loader, buffer, 4)
        state = through_a_file({"loader": loader.state_dict(), "buffer": buffer.state_dict()})
        play(loader, buffer, 3)
    buffer.close()
    with leanreplay.open(path, "r+") as buffer:
        buffer.load_state_dict(state["buffer"])
        with ReplayLoader(buffer, SIZE, prefetch=3) as loader:
            loader.load_state_dict(state["loader"])
            assert play(loader, buffer, 5)[0] == wanted[4:]
        buffer.load_state_dict(state["buffer"])
        with ReplayLoader(buffer, SIZE, prefetch=1) as loader:
            loader.load_state_dict(state["loader"])
            assert play(loader, buffer, 3)[0] == wanted[4:7]


def test_state_of_bfloat16_and_dicts():
    """What is planned keeps its dtypes and nesting in a state; a transform's random crops are in it as they were made."""
    buffer = SlidingWindowBuffer(20, transform=lambda s: {**s, "crop": s["x"][(k := next(draws) % 4) : k + 3]})
    draws = itertools.count()
    z = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    buffer.add({"x": np.arange(140.0).reshape(20, 7), "t": [z, np.arange(20)]}, metadata={"logits": -z})
    with ReplayLoader(buffer, SIZE, prefetch=3) as loader:
        next(loader)
        finish(loader)
        state = loader.state_dict()
        wanted = [plain(b) for b in take(loader, 3)]
        loader.load_state_dict(through_a_file(state))
        found = take(loader, 3)
        assert [plain(b) for b in found] == wanted
        assert all(b["t"][0].dtype == m["logits"].dtype == torch.bfloat16 and type(b["t"]) is list for b, m in found)


def test_a_state_is_not_changed_by_what_happens_to_batches():
    """Loops write into their batches. That is no concern of a checkpoint, before it is written or after it was loaded."""
    buffer = make()
    with ReplayLoader(buffer, SIZE, prefetch=2) as loader:
        next(loader)
        state = loader.state_dict()
        wanted = plain(state)
        for _ in range(2):
            for (x, y), meta in take(loader, 2):
                for tensor in (x, y, *meta.values()):
                    tensor.zero_()
            assert plain(state) == wanted
            loader.load_state_dict(state)
        assert [plain(b) for b in take(loader, 2)] == wanted["ahead"]


def test_state_with_errors_ahead():
    """A batch that failed is not in the state: it is planned again, as it would have been without."""
    buffer = make()
    oracle = Oracle(make(), SIZE, 3)
    with ReplayLoader(buffer, SIZE, prefetch=3, batch_transform=Fails(3)) as loader:
        assert plain(next(loader)) == next(oracle)
        state = through_a_file(loader.state_dict())
        assert len(state["ahead"]) == 1
        loader.load_state_dict(state)
        for _ in range(5):
            assert plain(next(loader)) == next(oracle)


def test_state_refusals():
    """States that are none are refused, and what was planned stays."""
    buffer, oracle = make(), Oracle(make(), SIZE, 2)
    with ReplayLoader(buffer, SIZE) as loader:
        assert plain(next(loader)) == next(oracle)
        state = loader.state_dict()
        wrong = [
            None, [], {}, {**state, "format": 2}, {**state, "delivered": "1"}, {**state, "delivered": -1}, {**state, "passed": -1},
            {**state, "delivered": 2**80}, {**state, "passed": True}, {**state, "ahead": [5]}, {**state, "ahead": [{}]},
            {**state, "ahead": [()]}, {**state, "ahead": ()}, {**state, "of": None}, buffer.state_dict(),
        ]  # fmt: skip
        feed(buffer, 20)
        for each in wrong:
            with pytest.raises(StateError, match="not a state"):
                loader.load_state_dict(each)
        for name, value in (("batch_size", SIZE + 1), ("balance", "class"), ("seed", 1), ("by", "position")):
            with (
                ReplayLoader(buffer, **{"batch_size": SIZE, name: value}) as other,
                pytest.raises(StateError, match="draw: None, here .*'position' .. 1.0" if name == "by" else f"{name}: .*, here {value!r}"),
            ):
                other.load_state_dict(state)
        wanted = oracle.ahead
        assert [plain(b) for b in take(loader, 2)] == wanted


def test_passes():
    """`batches` is what one loop gets; a loop that was broken off leaves the rest to the next; beyond the end only a new loop starts."""
    buffer, oracle = make(), Oracle(make(), SIZE, 2, batches=3)
    with ReplayLoader(buffer, SIZE, batches=3) as loader:
        found = [plain(b) for b in loader]
        assert len(found) == 3
        for _ in range(2):
            with pytest.raises(StopIteration):
                next(loader)
        for batch in loader:
            found.append(plain(batch))
            break
        found += [plain(b) for b in loader]
        assert len(found) == 6
        feed(buffer, 20)
        wanted = [next(oracle) for _ in range(6)]
        feed(oracle.buffer, 20)
        wanted += [next(oracle) for _ in range(3)]  # nothing of a new pass was planned before
        assert found + [plain(b) for b in loader] == wanted


# -- MixedLoader -------------------------------------------------------------------------------------------------------


def stream(n, size=4, start=1000):
    return [tuple(map(torch.from_numpy, samples(start + size * i, size))) for i in range(n)]


@pytest.mark.parametrize("how", [{}, WEIGHTED], ids=["uniform", "by"])
def test_mixed(how):
    """First the stream's samples as they are, then those that the buffer draws at that moment; is_replay and meta tell which they are."""
    buffer, twin = (SlidingWindowBuffer(30, seed=2) for _ in range(2))
    for b in (buffer, twin):
        b.add(samples(0, 30), metadata={"z": np.arange(30.0)})
    loader = MixedLoader(stream(6), buffer, 8, **how)
    assert len(loader) == 6
    for (x, y, is_replay, meta), (a, b) in zip(loader, stream(6), strict=True):
        (c, d), wanted = leanreplay.torch.sample(twin, 8, **how)
        assert plain([x, y, meta]) == plain([torch.cat([a, c]), torch.cat([b, d]), wanted])
        assert sorted(meta) == sorted(["idx", "position", "z", *(["probability"] if how else [])])
        assert is_replay.dtype == torch.bool and is_replay.tolist() == [False] * 4 + [True] * 8
        for target in (buffer, twin):
            target.add((x[~is_replay], y[~is_replay]), metadata={"z": y[~is_replay].double()})
    assert buffer.seen == 54


def test_mixed_while_the_buffer_fills():
    """Nothing, then as many as there are, then what was asked for; a sample is not replayed in the batch that it comes with."""
    assert counts_while_the_buffer_fills() == [0, 4, 8, 10, 10, 10]
    assert counts_while_the_buffer_fills(where=("position", slice(5, None))) == [0, 0, 3, 7, 10, 10]


def counts_while_the_buffer_fills(**how):
    buffer, counts = ReservoirBuffer(50), []
    for x, y, is_replay, meta in MixedLoader(stream(6, start=0), buffer, 10, **how):
        counts.append(int(is_replay.sum()))
        assert x.shape == (4 + counts[-1], 5) and y.shape == is_replay.shape == (4 + counts[-1],) and torch.equal(x[:, 0].long(), y)
        assert len(set(y.tolist())) == len(y) and meta.get("position", torch.zeros(0)).shape == (counts[-1],)
        assert (meta == {}) == (counts[-1] == 0)
        buffer.add((x[~is_replay], y[~is_replay]))
    return counts


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=needs_fork)])
def test_mixed_with_a_data_loader(workers):
    """A DataLoader of TensorDataset as stream (its batches are lists), with workers, and epoch after epoch."""
    x, y = samples(1000, 24)
    context = {"multiprocessing_context": "fork"} if workers else {}
    data = DataLoader(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), 8, num_workers=workers, **context)
    buffer = ReservoirBuffer(40)
    buffer.add(samples(0, 40))
    mixed = MixedLoader(data, buffer, 5)
    assert len(mixed) == 3
    for _ in range(2):
        got = []
        for a, b, is_replay, meta in mixed:
            assert torch.equal(a[:, 0].long(), b) and torch.equal(b[is_replay], meta["position"])
            got += b[~is_replay].tolist()
        assert got == y.tolist()


def test_mixed_of_lists_and_arrays():
    """Arrays in the stream become tensors; a buffer of what a DataLoader gives, which are lists, will do as well."""
    buffer = ReservoirBuffer(40)
    buffer.add(list(samples(0, 40)))
    for x, y, is_replay, meta in MixedLoader([samples(1000, 3), list(samples(1003, 3))], buffer, 2, device="cpu"):
        assert isinstance(x, torch.Tensor) and torch.equal(x[:, 0].long(), y) and torch.equal(y[is_replay], meta["position"])
        assert is_replay.tolist() == [False] * 3 + [True] * 2


def test_mixed_refusals():
    """Streams and buffers that do not fit, with errors of our own."""
    x, y = samples(0, 10)
    buffer, single = ReservoirBuffer(40), ReservoirBuffer(40)
    buffer.add((x, y))
    single.add(x)
    for arguments in (([], [1], 3), ([], buffer, 0), ([], buffer, None), ([], buffer, 1.5)):
        with pytest.raises(ArgumentError):
            MixedLoader(*arguments)
    pairs = [({"x": x}, y), (x, ["a"] * 10), (x[:, :3], y), (x, y[:4]), (x, y[:, None]), (x[0, 0], y[0])]
    for wrong in (x, (x, y, y), {"x": x, "y": y}, *pairs):
        with pytest.raises(LeanReplayError):
            list(MixedLoader([wrong], buffer, 4))
    with pytest.raises(ArgumentError, match="pairs"):
        list(MixedLoader([(x, y)], single, 4))
    for wrong in ((x.astype(np.float16), y), (x, y.astype(np.int16))):
        with pytest.raises(ArgumentError, match="differ in dtype"):
            list(MixedLoader([wrong], buffer, 4))


def test_mixed_device():
    """Everything on the device."""
    buffer = ReservoirBuffer(40)
    buffer.add(samples(0, 40))
    for x, y, is_replay, meta in MixedLoader(stream(2), buffer, 3, device="meta"):
        assert {t.device.type for t in (x, y, is_replay, *meta.values())} == {"meta"} and x.shape == (7, 5)


def test_a_thread_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more threads: an error of the library that names the limit, and the same loader goes on once there are."""

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with ReservoirBuffer(10) as buffer:
        buffer.add(np.arange(20))
        with ReplayLoader(buffer, 4) as loader:
            with monkeypatch.context() as patched:
                patched.setattr(threading.Thread, "start", start)
                with pytest.raises(WorkerError, match="ulimit -u"):
                    next(iter(loader))
            assert next(iter(loader))[0].shape == (4,)
