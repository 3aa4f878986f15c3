"""ParametricBuffer: the best prefix of each group's ranking, in one commit, whatever happens."""

from __future__ import annotations

import functools
import os

import numpy as np
import pytest
from grouped_oracle import keyed
from grouped_oracle import quotas as group_quotas_by_definition
from storage_kernels import kernel

import leanreplay as lr
from leanreplay.policies.quotas import group_hash, group_quotas
from leanreplay.storage import writer as writer_module


def data(n, classes, seed=0, d=6):
    rng = np.random.default_rng([seed, n, classes])
    return rng.normal(size=(n, d)).astype(np.float32), rng.integers(0, classes, n)


def ranking(buffer, group):
    """Stream positions of a group's samples, by rank; the ranks must be 0, 1, 2, ..."""
    rows = buffer.group_rows(group)
    ranks = buffer.get_metadata("rank", rows)
    assert sorted(ranks.tolist()) == list(range(rows.shape[0]))
    return buffer.get_metadata("position", rows)[np.argsort(ranks)].tolist()


class Model:
    """The definition: lists of positions by rank, per group."""

    def __init__(self, size, strategy, seed, features):
        self.size, self.strategy, self.seed, self.features = size, strategy, seed, features
        self.groups: dict[int, list[int]] = {}

    def feed(self, positions, groups):
        for g in groups.tolist():
            self.groups.setdefault(g, [])
        self.shrink(skip=set(groups.tolist()))
        quota = self.quotas()
        for g in np.unique(groups).tolist():
            both = self.groups[g] + positions[groups == g].tolist()
            order = self.strategy.sorted_indices(self.features[both])
            self.groups[g] = [both[i] for i in order][: quota[g]]

    def quotas(self):
        known = list(self.groups)
        return dict(zip(known, group_quotas(self.size, group_hash(known, self.seed)).tolist(), strict=True))

    def shrink(self, skip=()):
        for g, quota in self.quotas().items():
            if g not in skip:
                self.groups[g] = self.groups[g][:quota]


def same(buffer, model):
    assert buffer.group_sizes() == {g: len(p) for g, p in sorted(model.groups.items())}
    for g, positions in model.groups.items():
        assert ranking(buffer, g) == positions
    assert buffer.check() == []


@pytest.mark.parametrize("strategy", [lr.HerdingSelection(), lr.ClosestToCenterSelection()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("how", ["add", "update"])
def test_against_the_definition(tmp_path, strategy, where, how):
    for seed in range(6):
        x, y = data(300, 5, seed)
        y = np.minimum(y, np.arange(300) // 40)  # classes come one after the other, and again
        size = [3, 7, 20, 60, 299, 400][seed]
        path = None if where == "memory" else tmp_path / f"{seed}.h5"
        buffer = lr.ParametricBuffer(size, path, groupby="class", selection_strategy=strategy, seed=seed)
        model = Model(size, strategy, seed, x)
        start = 0
        for n in (30, 1, 50, 20, 99, 100):
            part = slice(start, start + n)
            if how == "add":
                buffer.add((x[part], y[part]), features=lambda batch: batch[0])
            else:
                buffer.update(list(zip(x[part], y[part], strict=True)), features=lambda batch: batch[0])
            model.feed(np.arange(start, start + n), y[part])
            same(buffer, model)
            start += n
        rows = buffer.get_metadata("idx")
        (xs, ys), meta = buffer.get(rows)
        assert np.array_equal(xs, x[meta["position"]]) and np.array_equal(ys, y[meta["position"]])
        buffer.close()


class LargestFirst(lr.SelectionStrategy):
    """Looks at the samples, gives all of them whatever the count; equal ones in the order they come in."""

    def sorted_indices_of(self, dataset, count=None):
        return sorted(range(len(dataset)), key=lambda i: -dataset[i][0].sum())


def order_of(strategy, x, positions, key):
    """The definition, in float64: indices into x, (n, d), the best first; of those that tie the first."""
    x = x.astype(np.float64)
    if strategy is LargestFirst:
        return sorted(range(len(x)), key=lambda i: -x[i].sum())
    if strategy is lr.RandomSelection:
        return sorted(range(len(x)), key=lambda i: -key(positions[i]))
    distances = np.linalg.norm(x - x.mean(axis=0), axis=1)
    if strategy is lr.ClosestToCenterSelection:
        return np.argsort(distances, kind="stable").tolist()
    chosen, total = [], np.zeros(x.shape[1])
    for k in range(1, len(x) + 1):
        distances = np.linalg.norm(x.mean(axis=0) - (x + total) / k, axis=1)
        distances[chosen] = np.inf
        chosen.append(int(np.argmin(distances)))
        total += x[chosen[-1]]
    return chosen


@pytest.mark.parametrize("strategy", [LargestFirst, lr.RandomSelection, lr.ClosestToCenterSelection, lr.HerdingSelection])
def test_any_history(tmp_path, strategy):
    """Groups that come and stay away, ties, resizing, reopening, going back, batches seen in part: always the definition's ranks."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        size = int(rng.choice([1, 3, 10, 40]))
        path = tmp_path / f"{seed}.h5" if seed % 2 else None
        buffer = lr.ParametricBuffer(size, path, groupby="class", selection_strategy=strategy(), seed=seed)
        key, hashed = keyed("reservoir", seed), keyed("group", seed)
        samples, groups, full, points = [], {}, set(), []  # all that was fed; positions by rank of each group; who may not grow

        def quotas(size, groups=groups, full=full, hashed=hashed):
            found = group_quotas_by_definition(size, list(groups), hashed)
            held = {g: len(p) for g, p in groups.items()}
            return {g: min(q, held[g]) if strategy is lr.RandomSelection and g in full else q for g, q in found.items()}

        for _ in range(8):
            what = rng.random()
            if what < 0.7 or not samples:
                n, seen = int(rng.choice([1, 3, 20, 50])), len(samples)
                x = rng.integers(-3, 4, (n, 3)) if rng.random() < 0.5 else rng.normal(size=(n, 3))
                x, y = x.astype(np.float32), rng.choice(rng.choice([-(2**63), -1, 0, 5, 2**40], int(rng.integers(1, 4))), n)
                again = int(rng.integers(0, min(seen, 4) + 1))  # samples before them, which the buffer has seen
                both = [*samples[seen - again :], *zip(x, y, strict=True)]
                batch = np.array([one for one, _ in both]), np.array([label for _, label in both])
                features = (lambda b: b[0]) if strategy in (lr.HerdingSelection, lr.ClosestToCenterSelection) else None
                buffer.add(batch, features=features, at=seen - again)
                samples += zip(x, y, strict=True)
                for g in y.tolist():
                    groups.setdefault(g, [])
                quota = quotas(size)
                for g, held in groups.items():
                    candidates = held + [seen + i for i in np.flatnonzero(y == g).tolist()]
                    if g in y:
                        values = np.array([samples[p][0] for p in candidates])
                        groups[g] = [candidates[i] for i in order_of(strategy, values, candidates, key)]
                    groups[g] = groups[g][: quota[g]]
                    full |= {g} if len(candidates) > quota[g] else set()
            elif what < 0.8:
                new = int(rng.choice([1, size + 7, max(1, size // 2)]))
                buffer.resize(new)
                points = []
                if new != size:
                    quota = quotas(new)
                    full |= {g for g in groups if len(groups[g]) > quota[g]}
                    groups.update({g: groups[g][: quota[g]] for g in groups})
                size = new
            elif what < 0.87 and path:
                buffer.close()
                buffer = lr.ParametricBuffer(path=path, mode="r+", selection_strategy=strategy())
            elif what < 0.93 or not points:
                points = [(buffer.state_dict(), len(samples), dict(groups), set(full))]
            else:
                state, seen, before, were_full = points[0]
                buffer.load_state_dict(state)
                del samples[seen:]
                groups.clear(), groups.update(before), full.clear(), full.update(were_full)
            assert buffer.check() == [] and buffer.seen == len(samples)
            assert buffer.group_sizes() == {g: len(p) for g, p in sorted(groups.items())}, seed
            for g, positions in groups.items():
                assert ranking(buffer, g) == positions, seed
            (xs, _), meta = buffer.get(buffer.get_metadata("idx"))
            assert all((one == samples[p][0]).all() for one, p in zip(xs, meta["position"].tolist(), strict=True))
        buffer.close()


def test_features_as_an_array_and_as_metadata():
    x, y = data(200, 3)
    strategy = lr.HerdingSelection()
    buffer = lr.ParametricBuffer(20, groupby="class", selection_strategy=strategy)
    model = Model(20, strategy, 0, x)
    for start in (0, 100):  # stored with the samples, so known for the old ones too
        part = slice(start, start + 100)
        features = x[part] if start else None  # as an argument or from the metadata
        buffer.add((x[part], y[part]), metadata={"features": x[part]}, features=features)
        model.feed(np.arange(start, start + 100), y[part])
        same(buffer, model)


def test_the_argument_comes_before_the_metadata():
    x = np.arange(9.0)[:, None]
    for features, wanted in ((None, 4), (x[[4, 1, 2, 3, 0, 5, 6, 7, 8]], 0), (lambda batch: np.roll(batch, 1, axis=0), 5)):
        buffer = lr.ParametricBuffer(1, selection_strategy=lr.ClosestToCenterSelection())
        buffer.add(x, metadata={"features": x}, features=features)
        assert buffer.get_metadata("position").tolist() == [wanted]


def test_an_array_will_not_do_for_a_group_fed_again():
    x, y = data(100, 2)
    buffer = lr.ParametricBuffer(10, groupby="class", selection_strategy=lr.HerdingSelection())
    buffer.add((x[:50], y[:50]), features=x[:50])
    before = buffer.get_metadata("position")
    with pytest.raises(lr.ArgumentError, match=r"fed again.*metadata"):
        buffer.add((x[50:], y[50:]), features=x[50:])
    with pytest.raises(lr.ArgumentError, match="features"):
        buffer.add((x[50:], y[50:]))
    assert np.array_equal(before, buffer.get_metadata("position")) and buffer.seen == 50
    buffer.add((x[50:], y[50:] + 2), features=x[50:])  # new groups
    assert buffer.seen == 100 and buffer.check() == []


@pytest.mark.parametrize(
    "features",
    [
        np.zeros((50, 2, 2)),
        np.zeros((49, 2)),
        lambda batch: np.zeros((3, 2)),
        lambda batch: np.zeros(50),
        np.full((50, 2), np.nan),
        "features",
    ],
    ids=["rank", "length", "rows", "flat", "nan", "text"],
)
def test_wrong_features_leave_the_buffer_alone(features):
    x, y = data(50, 2)
    buffer = lr.ParametricBuffer(10, groupby="class", selection_strategy=lr.HerdingSelection())
    buffer.add((x[:10], y[:10]), features=lambda batch: batch[0])
    rows = buffer.get_metadata("position")
    with pytest.raises((lr.SchemaError, lr.ArgumentError)):
        buffer.add((x, y), features=features)
    assert buffer.seen == 10 and np.array_equal(rows, buffer.get_metadata("position"))


def test_random_selection_is_the_reservoir():
    """One group, fed in any pieces, holds what a reservoir of the same seed would."""
    x, _ = data(500, 2)
    reservoir = lr.ReservoirBuffer(20, seed=3)
    reservoir.add(x)
    for step in (1, 7, 499):
        buffer = lr.ParametricBuffer(20, seed=3)
        for start in range(0, 500, step):
            buffer.add(x[start : start + step])
        assert sorted(buffer.get_metadata("position")) == sorted(reservoir.get_metadata("position"))


def test_random_selection_obeys_the_capacity_rule():
    x, y = data(400, 2)
    buffer = lr.ParametricBuffer(20, groupby="class", seed=1)
    buffer.add((x[:200], y[:200]))
    buffer.resize(6)
    assert buffer.group_sizes() == {0: 3, 1: 3}
    buffer.resize(30)
    buffer.add((x[200:], y[200:]))
    assert buffer.group_sizes() == {0: 3, 1: 3}
    best = lr.ParametricBuffer(6, groupby="class", seed=1)
    best.add((x, y))
    assert sorted(best.get_metadata("position")) == sorted(buffer.get_metadata("position"))
    resized = lr.ParametricBuffer(400, groupby="class", seed=1)  # nothing but `resize` drops samples of this one
    resized.add((x[:200], y[:200]))
    resized.resize(6)
    resized.resize(30)
    resized.add((x[200:], y[200:]))
    assert sorted(best.get_metadata("position")) == sorted(resized.get_metadata("position"))


def test_groupings():
    x, y = data(60, 3)
    task = np.arange(60) // 20
    buffer = lr.ParametricBuffer(12)
    buffer.add((x, y))
    assert buffer.group_sizes() == {0: 12} and buffer.groupby is None
    buffer = lr.ParametricBuffer(12, groupby="task")
    buffer.add((x, y), metadata={"task": task})
    assert buffer.group_sizes() == {0: 4, 1: 4, 2: 4}
    buffer = lr.ParametricBuffer(12, groupby="task")
    buffer.update(list(zip(x, y, task, strict=True)))
    assert buffer.group_sizes() == {0: 4, 1: 4, 2: 4}
    buffer = lr.ParametricBuffer(12, groupby="class")
    buffer.update(list(zip(x, y, task, strict=True)))
    assert set(buffer.group_sizes()) == set(y.tolist())
    buffer = lr.ParametricBuffer(12, groupby="experience")
    for part in (slice(0, 20), slice(20, 60)):
        buffer.update(list(zip(x[part], y[part], strict=True)))
    assert buffer.group_sizes() == {0: 6, 1: 6}
    buffer.update(list(zip(x, y, strict=True)), experience=7)
    assert buffer.group_sizes() == {0: 4, 1: 4, 7: 4}
    buffer = lr.ParametricBuffer(12)
    buffer.add((x, y), group=task * -(2**40))
    assert buffer.group_sizes() == {-(2**41): 4, -(2**40): 4, 0: 4}
    for by, sample in (("class", x), ("task", (x, y))):
        with pytest.raises(lr.SchemaError, match="group="):
            lr.ParametricBuffer(12, groupby=by).add(sample)
    with pytest.raises(lr.ArgumentError, match="groupby"):
        lr.ParametricBuffer(12, groupby="colour")


def test_a_strategy_that_looks_at_the_data():
    class Brightest(lr.SelectionStrategy):
        needs_features = False

        def sorted_indices_of(self, dataset, count=None):
            return np.argsort([-dataset[i][0].sum() for i in range(len(dataset))], kind="stable")[:count]

    x, y = data(90, 3)
    buffer = lr.ParametricBuffer(9, groupby="class", selection_strategy=Brightest())
    for start in (0, 30, 60):
        buffer.add((x[start : start + 30], y[start : start + 30]))
    for g in range(3):
        mine = np.flatnonzero(y == g)
        assert ranking(buffer, g) == mine[np.argsort(-x[mine].sum(axis=1), kind="stable")][:3].tolist()


@pytest.mark.parametrize("order", [[0, 0], [99], [-1], [0.5], [[0]]], ids=str)
def test_a_bad_strategy_is_named(order):
    class Bad(lr.SelectionStrategy):
        needs_features = False

        def sorted_indices_of(self, dataset, count=None):
            return np.array(order)

    buffer = lr.ParametricBuffer(9, selection_strategy=Bad())
    with pytest.raises(lr.ArgumentError, match="Bad"):
        buffer.add(np.arange(20))
    assert len(buffer) == 0


def test_reopening_goes_on_and_needs_the_strategy(tmp_path):
    class Mine(lr.HerdingSelection):
        pass

    x, y = data(200, 3)
    path = tmp_path / "p.h5"
    with lr.ParametricBuffer(20, path, groupby="class", selection_strategy=lr.HerdingSelection()) as buffer:
        buffer.add((x[:100], y[:100]), features=x[:100])
        held = {g: ranking(buffer, g) for g in buffer.groups}
    with lr.open(path, mode="r+") as buffer:
        assert isinstance(buffer.selection_strategy, lr.HerdingSelection) and buffer.groupby == "class"
        assert {g: ranking(buffer, g) for g in buffer.groups} == held
        buffer.add((x[100:], y[100:]), features=lambda batch: batch[0])
        model = Model(20, lr.HerdingSelection(), 0, x)
        model.feed(np.arange(100), y[:100])
        model.feed(np.arange(100, 200), y[100:])
        same(buffer, model)
    with pytest.raises(lr.MismatchError, match="selection_strategy"):
        lr.ParametricBuffer(path=path, mode="r+", selection_strategy=lr.RandomSelection())
    with pytest.raises(lr.MismatchError, match="groupby"):
        lr.ParametricBuffer(path=path, mode="r+", groupby="task")
    with lr.ParametricBuffer(5, tmp_path / "q.h5", selection_strategy=Mine()) as buffer:
        buffer.add(x, features=x)
    with lr.open(tmp_path / "q.h5", mode="r+") as buffer, pytest.raises(lr.ArgumentError, match="Mine"):
        buffer.add(x, features=x)
    with lr.ParametricBuffer(5, tmp_path / "n.h5", selection_strategy=lr.HerdingSelection(normalize=True)) as buffer:
        buffer.add(x, features=x)
    with lr.open(tmp_path / "n.h5", mode="r+") as buffer, pytest.raises(lr.ArgumentError, match="normalize"):
        buffer.add(x, features=x)
    with pytest.raises(lr.MismatchError, match="normalize"):
        lr.ParametricBuffer(path=tmp_path / "n.h5", mode="r+", selection_strategy=lr.HerdingSelection())


def test_rank_is_the_buffers_own():
    x, y = data(20, 2)
    buffer = lr.ParametricBuffer(9)
    with pytest.raises(lr.SchemaError, match="rank"):
        buffer.add((x, y), metadata={"rank": y})
    buffer.add((x, y))
    with pytest.raises(lr.SchemaError, match="rank"):
        buffer.set_metadata("rank", np.zeros(9, np.int64))
    buffer.set_metadata("note", np.arange(9))
    buffer.add((x, y), metadata={"note": np.zeros(20, np.int64)})
    assert set(buffer.sample(3)[1]) == {"idx", "position", "rank", "note"}


def test_resize_keeps_the_prefix():
    x, y = data(200, 4)
    buffer = lr.ParametricBuffer(40, groupby="class", selection_strategy=lr.HerdingSelection())
    buffer.add((x, y), features=x)
    model = Model(40, lr.HerdingSelection(), 0, x)
    model.feed(np.arange(200), y)
    for size in (39, 13, 2, 50):
        buffer.resize(size)
        model.size = size
        model.shrink()
        same(buffer, model)


def test_fixed_quotas():
    x, y = data(100, 3)
    buffer = lr.ParametricBuffer(20, groupby="class", adaptive_size=False, total_num_groups=3)
    buffer.add((x, y))
    assert buffer.group_sizes() == {0: 6, 1: 6, 2: 6} and buffer.get_group_lengths(2) == [6, 6]
    with pytest.raises(lr.ArgumentError, match="total of 3"):
        buffer.add((x, y + 1))
    assert buffer.seen == 100
    with pytest.raises(lr.ArgumentError):
        lr.ParametricBuffer(20, adaptive_size=False)


def test_more_groups_than_the_log_has_room_for(tmp_path):
    buffer = lr.ParametricBuffer(10, tmp_path / "p.h5")
    groups = np.arange(5000)
    for start in range(0, 5000, 1000):
        buffer.add(np.arange(start, start + 1000), group=groups[start : start + 1000])
    assert len(buffer.groups) == 5000 and sum(buffer.group_sizes().values()) == 10 and buffer.check() == []
    best = np.argsort(group_hash(groups, 0))[:10]
    assert sorted(buffer.get_metadata("position")) == sorted(best.tolist())


class Killed(BaseException):
    """What stands for a kill here: the buffer's own recovery is the same code."""


STEPS = ("save_rows", "seal_block", "write_field", "write_index", "save_freed", "read_rows")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_update_is_whole_or_not_at_all(tmp_path, monkeypatch, step, after):
    """Stopped at every call of every kernel of the commit; then fed again, as if nothing had been."""
    x, y = data(120, 3)
    y[60:] = np.r_[3, 1 + y[61:] % 2]  # class 3 comes new, with one sample, and 0 is not fed again: rows become free
    whole = lr.ParametricBuffer(20, groupby="class", selection_strategy=lr.HerdingSelection())
    for part in (slice(0, 60), slice(60, 120)):
        whole.add((x[part], y[part]), features=lambda batch: batch[0])
    monkeypatch.setattr(writer_module, "ONE_CALL", False)
    original = getattr(kernel, step)
    stopped = 0
    for number in range(40):
        path = tmp_path / f"{number}.h5"
        buffer = lr.ParametricBuffer(20, path, groupby="class", selection_strategy=lr.HerdingSelection())
        buffer.add((x[:60], y[:60]), features=lambda batch: batch[0])
        before = buffer.get(buffer.get_metadata("idx"))
        calls = iter(range(10**9))

        def hook(*arguments, calls=calls, number=number):
            if next(calls) == number:
                if after:
                    original(*arguments)
                raise Killed
            return original(*arguments)

        monkeypatch.setattr(kernel, step, hook)
        try:
            buffer.add((x[60:], y[60:]), features=lambda batch: batch[0])
        except Killed:
            stopped += 1
        else:
            break  # there are no more calls
        finally:
            monkeypatch.setattr(kernel, step, original)
        if number % 2:
            buffer.close()
            buffer = lr.open(path, mode="r+")
        assert buffer.check() == []
        if buffer.seen == 60:
            now = buffer.get(buffer.get_metadata("idx"))
            assert all(np.array_equal(a, b) for a, b in zip(before[0], now[0], strict=True))
            assert all(np.array_equal(before[1][k], now[1][k]) for k in before[1])
            buffer.add((x[60:], y[60:]), features=lambda batch: batch[0])
        rows = buffer.get_metadata("idx")
        assert np.array_equal(rows, whole.get_metadata("idx"))
        for a, b in zip(buffer.get(rows)[0], whole.get(rows)[0], strict=True):
            assert np.array_equal(a, b)
        assert np.array_equal(buffer.get_metadata("rank"), whole.get_metadata("rank"))
        buffer.close()
    assert stopped, f"{step} is never called"


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_restore_points(tmp_path, where):
    x, y = data(400, 8)
    y = np.minimum(y, np.arange(400) // 50)
    path = None if where == "memory" else tmp_path / "p.h5"
    buffer = lr.ParametricBuffer(30, path, groupby="class", selection_strategy=lr.ClosestToCenterSelection())
    held = []
    for start in range(0, 400, 50):
        held.append((buffer.state_dict(), start, buffer.group_sizes(), {g: ranking(buffer, g) for g in buffer.groups}, len(buffer)))
        buffer.add((x[start : start + 50], y[start : start + 50]), features=lambda batch: batch[0])
    final = {g: ranking(buffer, g) for g in buffer.groups}
    for state, start, sizes, ranks, count in (held[-1], held[-2]):
        buffer.load_state_dict(state)
        assert (buffer.seen, buffer.group_sizes(), len(buffer)) == (start, sizes, count) and buffer.check() == []
        assert {g: ranking(buffer, g) for g in buffer.groups} == ranks
    for start in range(300, 400, 50):
        buffer.add((x[start : start + 50], y[start : start + 50]), features=lambda batch: batch[0])
    assert {g: ranking(buffer, g) for g in buffer.groups} == final


def test_a_dataset_that_uses_the_buffer_is_stopped():
    class Meddling:
        def __init__(self, meddle):
            self.targets, self.meddle = np.arange(40) % 2, meddle

        def __len__(self):
            return 40

        def __getitem__(self, i):
            if i > 3:
                self.meddle()
            return np.float64(i), self.targets[i]

    for meddle in (lambda b: b.add((np.zeros(2), np.zeros(2, int))), lambda b: b.sample(1)):
        buffer = lr.ParametricBuffer(10, groupby="class")
        buffer.add((np.zeros(4), np.array([0, 1, 0, 1])))
        with pytest.raises(lr.ModeError, match="dataset"):
            buffer.update(Meddling(functools.partial(meddle, buffer)))
        assert buffer.check() == []


@pytest.mark.parametrize("meddle", ["features", "strategy"])
def test_features_and_strategies_that_use_the_buffer_are_stopped(meddle):
    """What they add stands, and is not planned over; reading is fine."""

    class Meddling(lr.HerdingSelection):
        def sorted_indices(self, features, count=None):
            if meddle == "strategy" and buffer.seen == 4:
                buffer.set_metadata("note", buffer.get_metadata("note") + 1)
            return super().sorted_indices(features, count)

    def features(batch):
        if meddle == "features" and buffer.seen == 4 and batch[0].shape[0] > 2:
            buffer.add((np.ones(2), np.ones(2, int)), features=np.ones((2, 1)), metadata={"note": np.zeros(2)}, group=7)
        buffer.sample(2)
        return batch[0][:, None]

    buffer = lr.ParametricBuffer(10, groupby="class", selection_strategy=Meddling())
    buffer.add((np.arange(4.0), np.array([0, 1, 0, 1])), features=np.ones((4, 1)), metadata={"note": np.zeros(4)})
    with pytest.raises(lr.ModeError, match="features"):
        buffer.add((np.arange(40.0), np.arange(40) % 2), features=features, metadata={"note": np.zeros(40)})
    assert buffer.check() == []
    assert buffer.group_sizes() == ({0: 2, 1: 2, 7: 2} if meddle == "features" else {0: 2, 1: 2})
    assert (buffer.get_metadata("note") == 0).all() == (meddle == "features")


def test_at_skips_what_was_seen():
    x, y = data(100, 2)
    one, two = (lr.ParametricBuffer(10, groupby="class") for _ in range(2))
    for start in (0, 50):
        one.add((x[start : start + 50], y[start : start + 50]))
        two.add((x[start : start + 50], y[start : start + 50]), at=start)
        two.add((x[:50], y[:50]), at=0)
    assert np.array_equal(one.get_metadata("position"), two.get_metadata("position")) and two.seen == 100


def test_only_exemplars_are_loaded():
    class Counting:
        def __init__(self, n):
            self.n, self.loaded, self.targets = n, 0, np.arange(n) % 4

        def __len__(self):
            return self.n

        def __getitem__(self, i):
            self.loaded += 1
            return np.float32(i), self.targets[i]

    dataset = Counting(1000)
    buffer = lr.ParametricBuffer(20, groupby="class", selection_strategy=lr.HerdingSelection())
    buffer.update(dataset, features=np.random.default_rng(0).normal(size=(1000, 4)))
    assert len(buffer) == 20 and dataset.loaded <= 22  # one for the schema


def test_the_file_is_larger_than_others_by_its_journal(tmp_path):
    """One commit may change every row, so the journal has room for all of them."""
    x = np.zeros((4000, 3000), np.uint8)
    with lr.ParametricBuffer(4000, tmp_path / "p.h5") as buffer:
        buffer.add(x)
        buffer.add(x)
        assert os.path.getsize(tmp_path / "p.h5") > 2 * x.nbytes and buffer.check() == []
