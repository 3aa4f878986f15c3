"""Groups of every kind of buffer: sizes, rows, labels, datasets, and draws that are spread evenly over them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import KINDS, Case
from laws import assert_even
from torch.utils.data import DataLoader

import leanreplay as lr
from leanreplay.buffers.values import Values
from leanreplay.errors import ArgumentError, SchemaError
from leanreplay.storage.columns import Columns
from leanreplay.torch import BufferDataset, MixedLoader, ReplayLoader

GROUPED = [kind for kind in KINDS if kind != "weighted"]


def group_of(kind: str, position: Any) -> Any:
    """The group of a sample of `contract`: its label, its experience, or one for all."""
    return {"experience": position // 30, "parametric": position * 0}.get(kind, position % 3)


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("kind", GROUPED)
def test_every_buffer_tells_its_groups(kind: str, where: str, tmp_path: Path) -> None:
    case = Case(kind, tmp_path / "b" if where == "disk" else None)
    with case.filled(50, seed=3) as buffer:
        position = buffer.get_metadata("position")
        wanted = group_of(kind, position)
        assert buffer.get_metadata("group").tolist() == wanted.tolist()
        assert buffer.get_metadata("group", buffer.get_metadata("idx")[3:5]).tolist() == wanted[3:5].tolist()
        assert buffer.labels().tolist() == buffer.get_metadata("label").tolist() == (position % 3).tolist()
        assert buffer.group_sizes() == dict(sorted(Counter(wanted.tolist()).items()))
        for group, dataset in buffer.groups.items():
            rows = buffer.get_metadata("idx")[wanted == group]
            assert buffer.group_rows(group).tolist() == dataset.rows.tolist() == rows.tolist()
            x, y = next(iter(DataLoader(BufferDataset(dataset), batch_size=len(dataset))))
            assert (x[:, 0, 0, 0].numpy() == position[wanted == group]).all() and (y.numpy() == position[wanted == group] % 3).all()
        with pytest.raises(lr.GroupError, match="no group 77"):
            buffer.group_rows(77)
        before = buffer.group_sizes()
        case.feed(buffer, 50, 60)
        assert buffer.group_sizes() == dict(sorted(Counter(group_of(kind, buffer.get_metadata("position")).tolist()).items()))
        assert before is not buffer.group_sizes()


def test_labels_and_sizes_read_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the index is looked at, in the writer and in a reader. Where groups are no classes, only the labels are read."""
    fields: list[int | None] = []
    read = Columns.read
    monkeypatch.setattr(Columns, "read", lambda self, rows, field=None, *rest: fields.append(field) or read(self, rows, field, *rest))
    with lr.ClassBalancedBuffer(40) as buffer:
        buffer.add((np.zeros((90, 3)), np.arange(90) % 4))
        assert Counter(buffer.labels().tolist()) == buffer.group_sizes() == dict.fromkeys(range(4), 10) and not fields
        assert buffer.groups[2].rows.shape == (10,) and not fields
    with lr.ExperienceBalancedBuffer(40) as other:
        other.add((np.zeros((9, 3)), np.arange(9) % 4), experience=5)
        assert other.labels().tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0] and set(fields) == {1}


def test_without_groups() -> None:
    """A buffer whose samples have none says so; -1 is a group like any other where a buffer balances."""
    with lr.WeightedReservoirBuffer(9) as buffer:
        buffer.add((np.zeros(5), np.arange(5)), weights=np.ones(5))
        assert buffer.labels().tolist() == [0, 1, 2, 3, 4]  # of the samples
        for action in (buffer.group_sizes, lambda: buffer.group_rows(0), lambda: buffer.sample(1, balance="group")):
            with pytest.raises(SchemaError, match="keeps no groups"):
                action()
    with lr.ReservoirBuffer(9) as plain:
        assert plain.group_sizes() == {} and list(plain.groups) == []
        plain.add(np.zeros(5))
        for action in (plain.labels, plain.group_sizes, lambda: plain.group_rows(-1), lambda: plain.sample(1, balance="label")):
            with pytest.raises(SchemaError, match="no group or label"):
                action()
    with lr.ClassBalancedBuffer(9) as balanced:
        balanced.add(np.zeros(5), group=[-1] * 5)
        assert balanced.group_sizes() == {-1: 5} and balanced.labels().tolist() == [-1] * 5


@pytest.mark.parametrize("make", [lr.ClassBalancedBuffer, lr.ReservoirBuffer, lr.GreedyClassBalancingBuffer], ids=lambda c: c.__name__)
def test_labels_of_any_samples(make: Any) -> None:
    """Triples, dicts with group=, labels of shape (n, 1), bool: in `add` and `update`, from arrays and items."""
    x, y = np.arange(6.0), np.array([0, 1, 1, 0, 1, 0])
    batches: list[tuple[Any, Any]] = [
        ((x, y, x > 2), None), ([x, y, y, y], None), ({"x": x, "y": y}, y), ((x, x), y[:, None]), ((x, y[:, None]), None),
        ((x, y == 1), None), ((x, torch.as_tensor(y[:, None])), None), ((x, (y == 1)[:, None]), None),
    ]  # fmt: skip
    for batch, group in batches:
        with make(6) as buffer:
            buffer.add(batch, group=group)
            assert buffer.labels().tolist() == y.tolist() and buffer.group_sizes() == {0: 3, 1: 3}
            (samples, _), seen = buffer.sample(4, balance="label"), Counter()
            first = samples["x"] if isinstance(samples, dict) else samples[0]
            seen.update(y[first.astype(int)].tolist())
            assert seen == {0: 2, 1: 2}
            items = [item for item, _ in buffer]
            with make(6) as again:
                again.update(items, group=group)
                assert again.labels().tolist() == y.tolist()


# -- draws -------------------------------------------------------------------------------------------------------------


def plainly(groups: list[list[int]], n: int, rows: list[int], replace: bool) -> None:
    """What must hold of one balanced draw: each group its share, one more for some, distinct where there are enough."""
    share, rest = divmod(n, len(groups))
    assert len(rows) == n
    counts = [sum(row in group for row in rows) for group in groups]
    assert sum(counts) == n and sorted(counts) == [share] * (len(groups) - rest) + [share + 1] * rest
    for group, count in zip(groups, counts, strict=True):
        assert replace or count > len(group) or len({row for row in rows if row in group}) == count


def test_the_law_of_a_balanced_draw() -> None:
    """At each place of a batch every group is equally likely, then every row of it; pairs of groups at two places too."""
    labels = np.array([0] * 9 + [1] * 3 + [2] * 1 + [5] * 6)
    with lr.ReservoirBuffer(len(labels), seed=8) as buffer:
        buffer.add((np.arange(19.0), labels), metadata={"task": np.arange(19) % 2})
        groups = [np.flatnonzero(labels == g).tolist() for g in (0, 1, 2, 5)]
        at: list[Counter[int]] = [Counter(), Counter()]
        extra: Counter[int] = Counter()
        for _ in range(4000):
            rows = buffer.sample(6, balance="group")[1]["idx"].tolist()
            plainly(groups, 6, rows, False)
            for place in (0, 1):
                at[place][rows[5 * place]] += 1
            extra.update(g for g in range(4) if sum(row in groups[g] for row in rows) == 2)
        for counts in at:
            assert_even([sum(counts[row] for row in group) for group in groups])
            for group in groups[:2] + groups[3:]:
                assert_even([counts[row] for row in group])
        assert_even([extra[g] for g in range(4)])
        for n, replace in ((1, False), (3, False), (40, False), (40, True), (0, False)):
            plainly(groups, n, buffer.sample(n, replace, balance="label")[1]["idx"].tolist(), replace)
        assert set(buffer.sample(40, balance="group")[1]["idx"].tolist()) >= set(groups[2] + groups[1])
        assert Counter((buffer.sample(7, balance="task")[1]["task"]).tolist()) in ({0: 4, 1: 3}, {0: 3, 1: 4})
        for wrong, error in ((3, ArgumentError), ("nothing", SchemaError)):
            with pytest.raises(error, match=r"balance|nothing"):
                buffer.sample(2, balance=wrong)  # type: ignore[arg-type]
    with lr.ReservoirBuffer(3) as empty, pytest.raises(ArgumentError, match="buffer of 0"):
        empty.sample(1, balance="group")


@pytest.mark.parametrize("kind", GROUPED)
def test_loaders_draw_evenly(kind: str, tmp_path: Path) -> None:
    """ReplayLoader, MixedLoader and leanreplay.torch.sample; also in a reader, and after the groups have changed."""
    case = Case(kind, tmp_path / "b")
    with case.filled(40, seed=3) as buffer, lr.open(tmp_path / "b") as reader:
        for _ in range(2):
            groups = [rows.tolist() for rows in map(buffer.group_rows, buffer.group_sizes()) if len(rows)]
            with ReplayLoader(buffer, 8, balance="group", prefetch=1) as loader:
                plainly(groups, 8, next(loader)[1]["idx"].tolist(), False)
            for one in (buffer, reader):
                plainly(groups, 5, lr.torch.sample(one, 5, balance="group")[1]["idx"].tolist(), False)
            stream = [(torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))]
            *_, meta = next(iter(MixedLoader(stream, buffer, 6, balance="group")))
            plainly(groups, 6, meta["idx"].tolist(), False)
            case.feed(buffer, 40, 75)


def test_groups_are_worked_out_once_per_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[str] = []
    live = Values.live
    monkeypatch.setattr(Values, "live", lambda self, store, name: times.append(name) or live(self, store, name))
    with lr.ClassBalancedBuffer(20) as buffer:
        buffer.add((np.zeros(30), np.arange(30) % 3))
        for _ in range(3):
            buffer.sample(4, balance="group")
        buffer.group_rows(1)
        assert times == ["group"]
        buffer.add((np.zeros(1), np.array([7])))
        assert 7 in buffer.sample(4, balance="group")[0][1]
