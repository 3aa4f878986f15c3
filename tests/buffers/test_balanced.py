"""Class- and experience-balanced buffers: resize, labels, groups, restore points."""

from __future__ import annotations

import itertools
import pickle
import random
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grouped import KINDS, Dataset, assert_agree, growing, image, made, model, quiet, samples, tail
from grouped_oracle import Grouped
from laws import assert_inclusion

import leanreplay
from leanreplay import (
    ArgumentError,
    BalancedBuffer,
    CapacityWarning,
    ClassBalancedBuffer,
    ClassBalancingReservoirBuffer,
    ExperienceBalancedBuffer,
    GroupError,
    MismatchError,
    ModeError,
    RowError,
    Schema,
    SchemaError,
    StateError,
)
from leanreplay.buffers.values import Values

# -- resize ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_resize(kind: str, tmp_path: Path) -> None:
    """Down, up and down again: the model each time; groups that have dropped samples do not grow, the others do."""
    for seed in range(6):
        rng = random.Random(f"{kind} {seed}")
        labels = list(itertools.islice(tail(rng, 4), 400))
        wanted = model(kind, 20, seed, 4)
        with made(kind, 20, str(tmp_path / f"{kind}{seed}.h5"), 4, seed=seed) as buffer:
            for size in [20, 9, 9, 33, 5, 4, 60]:
                quiet(buffer, size)
                if wanted.seen:
                    wanted.resize(size)
                    assert_agree(buffer, wanted, f"seed {seed}, size {size}")
                n = rng.choice([1, 12, 40])
                buffer.add(samples(wanted.seen, wanted.seen + n), group=np.array(labels[wanted.seen : wanted.seen + n]))
                wanted.add(labels[wanted.seen : wanted.seen + n])
                wanted.check()
                assert_agree(buffer, wanted, f"seed {seed}, size {size}, fed")


def test_groups_that_dropped_never_grow() -> None:
    """The capacity rule per group: a group of 3 that dropped stays at 3 in a larger buffer, one that did not takes the rows."""
    with ClassBalancedBuffer(6) as buffer:
        buffer.add(np.zeros(22, np.int8), group=np.repeat([7, 8], [20, 2]))
        assert buffer.group_sizes() == {7: 3, 8: 2}
        quiet(buffer, 20)
        buffer.add(np.zeros(60, np.int8), group=np.tile([7, 8], 30))
        assert buffer.group_sizes() == {7: 3, 8: 10}
        assert buffer.get_group_lengths(2) == [10, 10]


def test_a_warning_when_nothing_can_grow() -> None:
    """With fixed quotas and all groups there and full, more rows are of no use, and `resize` says so; otherwise it does not."""
    with ClassBalancedBuffer(4, adaptive_size=False, total_num_classes=2) as buffer:
        buffer.add(np.zeros(20, np.int8), group=np.arange(20) % 2)
        with pytest.warns(CapacityWarning, match="already dropped samples.* 4 rows"):
            buffer.resize(10)
        buffer.add(np.zeros(20, np.int8), group=np.arange(20) % 2)
        assert len(buffer) == 4
    with ClassBalancedBuffer(8) as buffer, warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer.add(np.zeros(6, np.int8), group=np.arange(6) % 2)
        buffer.resize(30)
        buffer.resize(6)


def test_resize_of_an_empty_buffer() -> None:
    """Before the first sample only the size changes, and it must fit a total."""
    with ClassBalancedBuffer(4) as buffer:
        buffer.resize(9)
        buffer.add(np.zeros(20, np.int8), group=np.zeros(20, int))
        assert buffer.group_sizes() == {0: 9}
    with ClassBalancedBuffer(10, adaptive_size=False, total_num_classes=5) as buffer:
        with pytest.raises(ArgumentError, match="5"):
            buffer.resize(3)
        buffer.add(np.zeros(20, np.int8), group=np.arange(20) % 5)
        before = image(buffer)
        with pytest.raises(ArgumentError, match="resize to 3 rows for 5 groups"):
            buffer.resize(3)
        assert image(buffer) == before
        assert buffer.check() == []


# -- the interface -----------------------------------------------------------------------------------------------------


def test_parameters() -> None:
    """What does not go together is refused before anything else, with a way out."""
    for options, words in [
        ({"adaptive_size": False}, "needs total_num_classes"),
        ({"adaptive_size": False, "total_num_classes": 0}, "from 1"),
        ({"adaptive_size": False, "total_num_classes": 11}, "raise max_size, or use adaptive_size=True"),
        ({"total_num_classes": 3}, "give adaptive_size=False too"),
        ({"adaptive_size": False, "total_num_classes": 2.0}, "must be an integer"),
        ({"adaptive_size": 1}, "True or False"),
        ({"borrow": "no"}, "True or False"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            ClassBalancedBuffer(10, **options)
    with pytest.raises(ArgumentError, match="needs num_experiences"):
        ExperienceBalancedBuffer(10, adaptive_size=False)
    with pytest.raises(ArgumentError, match="max_size"):
        BalancedBuffer()


@pytest.mark.parametrize(("kind", "total"), [(ClassBalancedBuffer, "total_num_classes"), (BalancedBuffer, "total_num_groups")])
def test_parameters_stand_in_the_file(kind: Any, total: str, tmp_path: Path) -> None:
    """Reopened without them they are those of the file; others are an error that shows both."""
    path = str(tmp_path / "b.h5")
    with kind(10, path, adaptive_size=False, borrow=True, **{total: 5}) as buffer:
        buffer.add((np.arange(30.0), np.arange(30) % 5))
    with kind(path=path, mode="r+") as buffer:
        assert not buffer.adaptive_size
        assert buffer.get_group_lengths(5) == [2] * 5
        with pytest.raises(ArgumentError, match="of a total of 5"):
            buffer.add((np.arange(1.0), np.array([5])))
    with kind(10, path, mode="a", adaptive_size=False, borrow=True, **{total: 5}) as buffer:
        assert buffer.seen == 30
    for options in ({"adaptive_size": True}, {total: 4}, {"borrow": False}, {"max_size": 11}, {"seed": 2}):
        with pytest.raises(MismatchError, match=next(iter(options))):
            kind(path=path, mode="r+", **options)
    with pytest.raises(MismatchError, match=rf"ExperienceBalancedBuffer \(file: {kind.__name__}\)"):
        ExperienceBalancedBuffer(path=path, mode="r+")
    with leanreplay.open(path) as buffer:
        assert type(buffer) is kind
        assert buffer.group_sizes() == dict.fromkeys(range(5), 2)
        with pytest.raises(ModeError):
            buffer.add((np.arange(1.0), np.array([1])))


LABELS: dict[str, Any] = {
    "negative and large": np.array([-1, -(2**63), 2**40, 2**63 - 1, 0, -1]),
    "bytes": np.array([255, 0, 1, 1, 1, 7], np.uint8),
    "unsigned": np.array([2**63 - 1, 0, 1, 1, 1, 7], np.uint64),
    "big-endian": np.array([3, 0, 1, 1, 1, 7], ">i4"),
    "not contiguous": np.arange(12)[::2],
    "read-only": np.broadcast_to(np.int64(5), 6),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels(name: str) -> None:
    """Any integers are labels, as arrays, tensors or lists, in the samples or beside them."""
    labels = LABELS[name]
    wanted = dict(sorted(Counter(labels.tolist()).items()))
    ways: list[Any] = [labels, labels.tolist()]
    if name not in ("unsigned", "big-endian", "read-only"):
        import torch

        ways.append(torch.as_tensor(labels.copy()))
    for given_labels in ways:
        with ClassBalancedBuffer(30) as buffer:
            buffer.add(np.zeros(6), group=given_labels)
            assert buffer.group_sizes() == wanted
            assert {type(g) for g in buffer.groups} == {int}
        with ClassBalancedBuffer(30) as buffer:
            buffer.update(Dataset(np.zeros(6), given_labels))
            assert buffer.group_sizes() == wanted
        if not isinstance(given_labels, list):
            with ClassBalancingReservoirBuffer(30) as cbrs:
                cbrs.add((np.zeros(6), given_labels))
                assert cbrs.group_sizes() == wanted
                assert cbrs.check() == []


def test_labels_that_are_not_integers() -> None:
    """Refused, with nothing kept and no file made: floats, text, objects, wrong shapes, unsigned ones beyond int64, none at all."""
    import torch

    n = 6
    wrong = [np.zeros(n), torch.zeros(n), np.array([2**63] * n, np.uint64), np.array(["a"] * n), np.zeros((n, 2), int), np.zeros(5, int)]
    masked = np.ma.masked_array(np.arange(n), [0, 1] * 3)
    for labels in [*wrong, np.array([None] * n), np.array([2**70] * n, object), [0.5] * n, "abcdef", 2**63, masked]:
        with ClassBalancedBuffer(30) as buffer:
            with pytest.raises(SchemaError):
                buffer.add(np.zeros(n), group=labels)
            assert buffer.schema is None
    for labels in wrong:
        with ClassBalancedBuffer(30) as buffer:
            with pytest.raises(SchemaError):
                buffer.add((np.zeros(n), labels))
            assert buffer.schema is None
    for batch in (np.zeros(n), {"x": np.zeros(n), "y": np.zeros(n, int)}, (np.zeros(n),)):
        with ClassBalancedBuffer(30) as buffer, pytest.raises(SchemaError, match="give group="):
            buffer.add(batch)
    with ClassBalancedBuffer(30) as buffer, pytest.raises(SchemaError, match="give group="):
        buffer.update([1.0, 2.0])


def test_one_label_for_all() -> None:
    with ClassBalancedBuffer(30) as buffer:
        buffer.add(np.zeros(6), group=-3)
        buffer.update([1.0, 2.0], group=4)
        assert buffer.group_sizes() == {-3: 6, 4: 2}


def test_a_refused_first_batch_leaves_nothing(tmp_path: Path) -> None:
    """Too many groups in the very first batch: no schema is taken from it, and no file is there."""
    path = tmp_path / "b.h5"
    with ClassBalancedBuffer(4, path, adaptive_size=False, total_num_classes=2) as buffer:
        with pytest.raises(ArgumentError, match="of a total of 2"):
            buffer.add((np.arange(6.0), np.arange(6)))
        with pytest.raises(ArgumentError, match="of a total of 2"):
            buffer.update([(1.0, 0), (1.0, 1), (1.0, 2)])
        assert buffer.schema is None
        assert not path.exists()
        buffer.add((np.arange(6, dtype=np.float32), np.arange(6) % 2))
        assert buffer.group_sizes() == {0: 2, 1: 2}


class Watched:
    """A dataset of pairs that notes which items are read."""

    def __init__(self, labels: Sequence[int], targets: Any) -> None:
        self.labels, self.read = labels, list[int]()
        if targets is not None:
            self.targets = targets

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Any:
        self.read.append(i)
        return float(i), self.labels[i]


def test_only_survivors_are_loaded() -> None:
    """Labels come from `group` or `targets` without a look at the samples; failing both, every item is read once more."""
    labels = [i % 5 for i in range(1000)]
    for targets, group in [(labels, None), (np.array(labels), None), (None, labels), (["cat"] * 1000, labels)]:
        data = Watched(labels, targets)
        with ClassBalancedBuffer(10, schema=Schema.from_sample((0.0, 0))) as buffer:
            buffer.update(data, group=group)
            assert sorted(data.read) == sorted(buffer.get_metadata("position").tolist())
            assert buffer.group_sizes() == dict.fromkeys(range(5), 2)
    for targets in (None, [0.5] * 1000, labels[:-1]):  # not one integer for each
        data = Watched(labels, targets)
        with ClassBalancedBuffer(10, schema=Schema.from_sample((0.0, 0))) as buffer:
            buffer.update(data)
            assert set(data.read) == set(range(1000))
            assert buffer.group_sizes() == dict.fromkeys(range(5), 2)


def test_groups_are_a_live_view() -> None:
    """A mapping of id to dataset; both follow what happens to the buffer."""
    with ClassBalancedBuffer(10, seed=1) as buffer:
        groups = buffer.groups
        assert (len(groups), list(groups), buffer.group_sizes()) == (0, [], {})
        for missing in (0, "a", None):
            with pytest.raises(GroupError, match="this buffer has seen 0"):
                groups[missing]  # type: ignore[index]
        buffer.add((np.arange(30.0), np.arange(30) % 3), metadata={"z": np.arange(30)})
        assert list(groups) == [0, 1, 2]
        assert (1 in groups, 9 in groups, "a" in groups) == (True, False, False)
        assert groups.get(9) is None
        with pytest.raises(GroupError, match=r"no group 9; this buffer has seen 3: \[0, 1, 2\]"):
            groups[9]
        with pytest.raises(KeyError):
            buffer.group_rows(-1)
        one = groups[np.int64(1)]
        assert len(one) == buffer.group_sizes()[1] == buffer.group_rows(1).shape[0] == one.rows.shape[0]
        (x, y), meta = buffer.get(buffer.group_rows(1))
        for i in range(-len(one), len(one)):
            (a, b), m = one[i]
            assert (a, b, m) == (x[i], y[i], {"z": meta["z"][i], "idx": meta["idx"][i], "position": meta["position"][i]})
        both = one.__getitems__([0, -1, 0])
        assert [m["position"] for _, m in both] == meta["position"][[0, -1, 0]].tolist()
        assert [s[1]["position"] for s in one] == meta["position"].tolist()
        for outside in (len(one), -len(one) - 1):
            with pytest.raises(RowError):
                one[outside]
        with pytest.raises(ArgumentError):
            one[0.5]  # type: ignore[index]
        rows = buffer.group_rows(1)
        rows[:] = 99  # a copy
        assert 99 not in buffer.group_rows(1)
        state = buffer.state_dict()
        before = one.rows.tolist()
        buffer.add((np.arange(100.0), np.arange(100)), metadata={"z": np.arange(100)})
        assert len(groups) == 100
        assert len(one) == buffer.group_sizes()[1] < len(before)
        buffer.load_state_dict(state)
        assert len(groups) == 3
        assert one.rows.tolist() == before
        quiet(buffer, 3)
        assert len(one) == 1
    with pytest.raises(ModeError):
        len(one)


def test_groups_in_a_data_loader() -> None:
    """What a group gives goes through torch's DataLoader, and through transforms."""
    import torch

    with ClassBalancedBuffer(12, transform=lambda x: x + 1000) as buffer:
        buffer.add((np.arange(60.0), np.arange(60) % 4))
        found = []
        for (x, y), meta in torch.utils.data.DataLoader(buffer.groups[2], batch_size=2):
            assert (y == 2).all()
            assert (x == meta["position"] + 1000).all()
            found += meta["idx"].tolist()
        assert found == buffer.group_rows(2).tolist()


def test_copies_that_read(tmp_path: Path) -> None:
    """A reader, a pickled copy and one in memory see the groups, and new ones as they come."""
    for path in (None, str(tmp_path / "b.h5")):
        with ClassBalancedBuffer(10, path) as buffer:
            buffer.add((np.arange(30.0), np.arange(30) % 3))
            copies = [pickle.loads(pickle.dumps(buffer))] + ([leanreplay.open(path)] if path else [])
            for round_ in range(3):
                for copy in copies:
                    assert copy.group_sizes() == buffer.group_sizes()
                    assert copy.groups[0][0] == buffer.groups[0][0]
                    assert copy.group_rows(1).tolist() == buffer.group_rows(1).tolist()
                buffer.add((np.arange(5.0), np.arange(5) + 10 * round_))
            for copy in copies:
                copy.close()


def test_get_group_lengths_wants_a_number() -> None:
    for buffer in (ClassBalancedBuffer(10), ClassBalancingReservoirBuffer(10)):
        for wrong in (-1, 2.5, "3", None, True):
            with pytest.raises(ArgumentError, match="num_groups"):
                buffer.get_group_lengths(wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="for a total of 3"):
        ClassBalancedBuffer(10, adaptive_size=False, total_num_classes=3).get_group_lengths(4)


def test_experiences() -> None:
    """Numbered on from 0: `update` begins the next one, `add` goes on with the newest; any can be named."""
    with ExperienceBalancedBuffer(100) as buffer:
        steps: list[tuple[str, dict[str, Any], int]] = [
            ("add", {}, 0), ("add", {}, 0), ("update", {}, 1), ("add", {}, 1), ("update", {}, 2),
            ("update", {"experience": 7}, 7), ("add", {}, 7), ("add", {"experience": 1}, 1), ("add", {}, 7),
            ("update", {"experience": -3}, -3), ("update", {}, 8), ("add", {"experience": 2**40}, 2**40), ("update", {}, 2**40 + 1),
        ]  # fmt: skip
        counts: Counter[int] = Counter()
        for way, options, number in steps:
            getattr(buffer, way)(np.arange(3.0) if way == "add" else [0.0, 1.0, 2.0], **options)
            counts[number] += 3
            assert buffer.group_sizes() == dict(sorted(counts.items())), (way, options)
        buffer.update([])
        assert buffer.group_sizes() == dict(sorted(counts.items()))
    with ExperienceBalancedBuffer(100) as buffer:
        buffer.update([0.0])
        assert list(buffer.groups) == [0]
    with ExperienceBalancedBuffer(100) as buffer:  # the labels of samples do not matter
        buffer.update([(0.0, 5), (0.0, 6)], experience=3)
        assert buffer.group_sizes() == {3: 2}


def test_numbering_experiences_looks_at_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """G4: the newest one stands in the log. A list of the rows of each would be ten times the memory of the heaps, every time."""
    with ExperienceBalancedBuffer(2) as buffer:
        monkeypatch.setattr(Values, "grouped", None)
        for _ in range(4):
            buffer.update([0.0, 1.0])
        buffer.add(np.arange(3.0))
        monkeypatch.undo()
        assert list(buffer.groups) == [0, 1, 2, 3]  # of which two have no row
        buffer.update([0.0])
        assert list(buffer.groups) == [0, 1, 2, 3, 4]
    with ExperienceBalancedBuffer(2) as buffer:
        buffer.update([0.0, 1.0, 2.0], experience=-9)  # full, which the log tells by the number of its entry
        buffer.add(np.arange(3.0))
        assert list(buffer.groups) == [-9]


def test_experiences_again_at_a_position() -> None:
    """A stream that is replayed from an older position names its experiences, and is counted once."""
    with ExperienceBalancedBuffer(100) as buffer:
        buffer.add(np.arange(4.0))
        buffer.add(np.arange(2.0, 8.0), experience=0, at=2)
        assert (buffer.seen, buffer.group_sizes()) == (8, {0: 8})
        for feed in (lambda: buffer.add(np.arange(3.0), at=8), lambda: buffer.update([0.0], at=8)):
            with pytest.raises(ArgumentError, match="experience="):
                feed()
        for wrong in (1.5, "1", 2**63, -(2**63) - 1, True):
            with pytest.raises(ArgumentError, match="experience"):
                buffer.add(np.arange(3.0), experience=wrong)  # type: ignore[arg-type]
        assert buffer.seen == 8


def test_experiences_are_balanced() -> None:
    """The same quotas and the same samples as with group ids by hand."""
    with ExperienceBalancedBuffer(10, seed=4) as one, ClassBalancedBuffer(10, seed=4) as other:
        for number, n in enumerate((100, 3, 40, 1, 60)):
            data = [float(i) for i in range(n)]
            one.update(data)
            other.update(data, group=number)
            assert one.group_sizes() == other.group_sizes()
            assert one.get_metadata("position").tolist() == other.get_metadata("position").tolist()
    with ExperienceBalancedBuffer(10, adaptive_size=False, num_experiences=2) as buffer:
        buffer.update([0.0] * 20)
        buffer.update([0.0] * 20)
        with pytest.raises(ArgumentError, match="of a total of 2"):
            buffer.update([0.0])
        assert buffer.group_sizes() == {0: 5, 1: 5}
        assert buffer.seen == 40


def test_the_rest_of_the_interface() -> None:
    """Rows given up are no samples: reading, drawing and metadata leave them out."""
    with ClassBalancedBuffer(20) as buffer:
        buffer.add((np.arange(20.0), np.zeros(20, int)), metadata={"z": np.arange(20)})
        buffer.add((np.arange(20.0, 21.0), np.ones(1, int)), metadata={"z": np.arange(20, 21)})
        assert len(buffer) == 11
        rows = buffer.get_metadata("idx")
        free = sorted(set(range(20)) - set(rows.tolist()))
        assert len(free) == 9
        assert [m["idx"] for _, m in buffer] == rows.tolist()
        drawn = Counter(i for _ in range(200) for i in buffer.sample(5)[1]["idx"].tolist())
        assert sorted(drawn) == rows.tolist()
        assert sorted(buffer.sample(11)[1]["idx"].tolist()) == rows.tolist()
        with pytest.raises(RowError):
            buffer.get([min(free)])
        with pytest.raises(RowError):
            buffer.set_metadata("z", np.zeros(1, int), rows=[min(free)])
        buffer.set_metadata("z", np.arange(11) * 3)
        buffer.set_metadata("new", np.arange(11) * 0.5)
        assert buffer.group_sizes() == {0: 10, 1: 1}
        assert (buffer.get_metadata("new") * 6 == buffer.get_metadata("z")).all()
        buffer.add((np.arange(21.0, 51.0), np.repeat([1, 2, 3], 10)), metadata={"z": np.arange(30), "new": np.arange(30.0)})
        assert buffer.group_sizes() == {0: 5, 1: 5, 2: 5, 3: 5}
        assert buffer.check() == []


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_draws_of_sparse_rows_are_even(where: str, tmp_path: Path) -> None:
    """Draws from a buffer with free rows between: each live row equally often."""
    path = None if where == "memory" else tmp_path / "b.h5"
    with ClassBalancedBuffer(40, path) as buffer:
        buffer.add(np.arange(41), group=np.array([0] * 40 + [1]))
        live = buffer.get_metadata("idx")
        assert live.shape[0] == 21
        kept = np.zeros((3000, 40), bool)
        for trial in range(3000):
            kept[trial, buffer.sample(4)[1]["idx"]] = True
        assert_inclusion(kept[:, live], 4)


@pytest.mark.parametrize("kind", KINDS)
def test_restore_points(kind: str) -> None:
    """Back to any of several marks, and on another way from there: groups, sizes and who may grow are those of then."""
    for seed in range(6):
        rng = random.Random(f"{kind} {seed}")
        groups = 4 if KINDS[kind][1] else 30
        labels = list(itertools.islice(growing(rng, groups), 300))
        wanted = model(kind, 12, seed, 4)
        with made(kind, 12, total=4, seed=seed, restore_points=4) as buffer:
            marks: list[tuple[Any, Grouped]] = [(buffer.state_dict(), wanted.copy())]
            for _ in range(25):
                if rng.random() < 0.3:
                    number = rng.randrange(len(marks))
                    state, then = marks[number]
                    buffer.load_state_dict(state)
                    wanted = then.copy()
                    del marks[number + 1 :]
                    rng.shuffle(labels)  # another stream from here
                else:
                    n = rng.randint(1, 20)
                    buffer.add(samples(wanted.seen, wanted.seen + n), group=np.array(labels[:n]))
                    wanted.add(labels[:n])
                    labels = labels[n:] + labels[:n]
                    if len(marks) < 4 and rng.random() < 0.5:
                        marks.append((buffer.state_dict(), wanted.copy()))
                assert_agree(buffer, wanted, f"{kind} {seed}")


def test_restore_points_of_many_groups(tmp_path: Path) -> None:
    """More groups than the log has room for: the way back is still there."""
    for path in (None, tmp_path / "b.h5"):
        with ClassBalancedBuffer(10, path) as buffer:
            buffer.add(np.arange(100), group=np.arange(100))
            state, before = buffer.state_dict(), image(buffer)
            buffer.add(np.arange(4000), group=np.arange(4000))
            assert len(buffer.group_sizes()) == 4000
            buffer.load_state_dict(state)
            assert image(buffer) == before


def test_states_of_others_are_refused() -> None:
    with ClassBalancedBuffer(10) as buffer, ClassBalancingReservoirBuffer(10) as other:
        buffer.add(np.arange(20), group=np.arange(20))
        other.add(np.arange(20), group=np.arange(20))
        with pytest.raises(StateError, match="ClassBalancingReservoirBuffer"):
            buffer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_a_row(kind: str) -> None:
    """G4: what policy and store keep in memory for each row, restore points included, is at most 24 bytes."""
    rows = 50_000
    with made(kind, rows, total=4) as buffer:
        for _ in range(2):
            buffer.add(np.zeros(40_000, np.uint8), group=np.arange(40_000) % 4)
            buffer.state_dict()
        buffer.add(np.zeros(40_000, np.uint8), group=np.arange(40_000) % 3)
        parts = [*vars(buffer.feeder.policy(buffer.current.store)).values(), *vars(buffer.current.store).values()]
        large = {id(a): a.nbytes for a in parts if isinstance(a, np.ndarray) and a.base is None and a.nbytes >= rows}
    assert 16 * rows <= sum(large.values()) <= 24 * rows
