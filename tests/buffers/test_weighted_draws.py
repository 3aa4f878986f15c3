"""Draws of some rows only, and in proportion to a value: against plain Python, by chi-square, and wherever rows are drawn."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
from children import child, killed
from laws import assert_shares
from weighted_oracle import fin

import leanreplay as lr
from leanreplay.buffers import drawing
from leanreplay.buffers.drawing import UNIFORM, Draw
from leanreplay.kernels import reservoir
from leanreplay.keys import key_pair

M64, GOLDEN = 2**64 - 1, 0x9E3779B97F4A7C15
KINDS = {
    "reservoir": lambda path=None, **o: lr.ReservoirBuffer(40, path, **o),
    "class": lambda path=None, **o: lr.ClassBalancedBuffer(40, path, **o),  # which frees rows
    "infinite": lambda path=None, **o: lr.InfiniteBuffer(path, rows_per_part=16, **o),
}
DRAWS = [
    Draw.of(where=("label", 3)),
    Draw.of(where=("label", [1, 2, 9]), replace=True),
    Draw.of(where=("position", range(20, 70))),
    Draw.of(where=("value", slice(2, None))),
    Draw.of(by="value", alpha=2),
    Draw.of(by="value", replace=True),
    Draw.of(by="value", alpha=0.5, where=("label", [0, 3])),
]


def feed(buffer, start: int, stop: int) -> None:
    p = np.arange(start, stop)
    buffer.add((np.repeat(p[:, None], 2, 1), p * 7 % 11 % 5), metadata={"value": (p % 4).astype(np.float32), "other": p})


def fits(draw: Draw, meta, labels) -> list[bool]:
    """By definition."""
    found = {"label": labels, "position": meta["position"], "value": meta["value"]}
    where = draw.where
    if where is None:
        return [True] * len(labels)
    column = found[where.name].tolist()
    if where.values is not None:
        return [v in where.values for v in column]
    return [(where.low is None or v >= where.low) and (where.high is None or v < where.high) for v in column]


def oracle(buffer, n: int, draw: Draw, number: int):
    """Rows and probabilities by definition."""
    rows = buffer.get_metadata("idx")
    (_, y), meta = buffer.get(rows)
    k0, k1 = key_pair(f"draw {buffer.stream} sample", buffer.seed)
    fit = fits(draw, meta, y)
    if draw.by is None:
        out = np.empty(n, np.int64)
        reservoir.draw(sum(fit), k0, k1, buffer.seen, number, draw.replace, out)
        return [[r for r, f in zip(rows.tolist(), fit, strict=True) if f][i] for i in out.tolist()], None
    weights = [float(v) ** draw.alpha if f else 0.0 for v, f in zip(meta["value"].tolist(), fit, strict=True)]
    base = fin(fin((fin((buffer.seen * GOLDEN + int(k0)) & M64) + number) & M64) + int(k1) & M64)
    found: list[int] = []
    i = 0
    while len(found) < n:
        target, i_row = (fin((base + i * GOLDEN) & M64) >> 11) / 2**53 * sum(weights), 0
        while target >= weights[i_row]:
            target -= weights[i_row]
            i_row += 1
        row = int(rows[i_row])
        if draw.replace or row not in found:
            found.append(row)
        i += 1
    share = dict(zip(rows.tolist(), weights, strict=True))
    return found, [share[r] / sum(weights) for r in found]


def drawn(buffer, n: int, draw: Draw, number: int):
    found = buffer.draws.rows(buffer.current.reading(), n, draw, "sample", number)
    return found.rows.tolist(), found.shown.get("probability")


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_those_of_the_definition(kind, tmp_path, monkeypatch):
    """After whatever changed the buffer, in its writer, which mends what it knows, and in a reader, which does not."""
    monkeypatch.setattr(drawing, "MAX_WEIGHTS", len(DRAWS))  # so that weights are there to be mended
    path = tmp_path / "b"
    buffer = KINDS[kind](path, seed=5, stream=0)
    rng = np.random.default_rng(0)
    number = 0

    def same() -> None:
        nonlocal number
        for draw in DRAWS:
            number += 1
            available = buffer.draws.available(buffer.current.reading(), draw)
            rows, shown = drawn(buffer, min(3, available), draw, number)
            wanted, shares = oracle(buffer, min(3, available), draw, number) if available else ([], None)
            assert rows == wanted, (draw, buffer.seen)
            assert shares is None or np.allclose(shown, shares, rtol=1e-12)
            assert drawn(reader, min(3, available), draw, number)[0] == rows, draw

    feed(buffer, 0, 30)
    reader = lr.open(path, "r")
    same()
    for step in range(12):
        start = buffer.seen
        if step % 4 == 0:
            feed(buffer, start, start + 9)
        elif step % 4 == 1:
            rows = rng.permutation(buffer.get_metadata("idx"))[:3]
            buffer.set_metadata("value", np.float32([0, 5, 1]), rows)
        elif step % 4 == 2:
            rows = rng.permutation(buffer.get_metadata("idx"))[:2]
            positions = buffer.get_metadata("position", rows)
            p = np.arange(start, start + 5)
            moved = (rows, positions, {"value": np.float32([7, 2])})
            buffer.add((np.repeat(p[:, None], 2, 1), p % 5), metadata={"value": (p % 4).astype(np.float32), "other": p}, moved=moved)
        else:
            state = buffer.state_dict()
            feed(buffer, start, start + 20)
            same()
            buffer.load_state_dict(state)
        same()
    if kind != "infinite":
        buffer.resize(20)
        same()


def test_sample_takes_part_in_states_and_copies():
    """Draws after a restore point are the same again; a fork draws of its own, by the same law; balance= goes with where=."""
    buffer = lr.ReservoirBuffer(50, seed=1)
    feed(buffer, 0, 50)
    state = buffer.state_dict()
    first = [buffer.sample(4, by="value")[1] for _ in range(3)]
    buffer.load_state_dict(state)
    again = [buffer.sample(4, by="value")[1] for _ in range(3)]
    assert all((a["idx"] == b["idx"]).all() and (a["probability"] == b["probability"]).all() for a, b in zip(first, again, strict=True))
    value = buffer.get_metadata("value")
    assert np.allclose(first[0]["probability"], first[0]["value"] / value.sum())
    (_, y), _ = buffer.sample(12, balance="label", where=("label", [1, 2]))
    assert np.bincount(y).tolist() == [0, 6, 6]
    assert sorted(buffer.sample(2)[1]) == ["idx", "other", "position", "value"]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_law(alpha):
    """With replacement each in proportion; without, the pairs are those of one draw after the other, also where few weigh it all."""
    value = np.array([0.0, 1.0, 4.0, 9.0, 16.0])
    shares = value**alpha / (value**alpha).sum()
    buffer = lr.SlidingWindowBuffer(5)
    buffer.add(np.arange(5), metadata={"value": value})
    x, meta = buffer.sample(4000, True, by="value", alpha=alpha)
    assert_shares(np.bincount(x, minlength=5), shares, "with replacement")
    assert np.allclose(meta["probability"], shares[x])
    pairs = np.zeros((5, 5))
    for _ in range(4000):
        x, _ = buffer.sample(2, by="value", alpha=alpha)
        pairs[x[0], x[1]] += 1
    wanted = shares[:, None] * shares[None, :] / (1 - shares[:, None])
    np.fill_diagonal(wanted, 0)
    assert_shares(pairs, wanted, "without replacement")


def test_few_rows_weigh_nearly_everything():
    """Numbers that hit rows drawn before give up: the rest is drawn in one pass, in proportion among those left."""
    value = np.array([1e12, 1.0, 2.0, 3.0])
    buffer = lr.SlidingWindowBuffer(4)
    buffer.add(np.arange(4), metadata={"value": value})
    orders = np.zeros((4, 4))
    for _ in range(2000):
        x, _ = buffer.sample(3, by="value")
        assert x[0] == 0
        orders[x[1], x[2]] += 1
    left = value[1:] / 6
    wanted = np.zeros((4, 4))
    wanted[1:, 1:] = left[:, None] * left[None, :] / (1 - left[:, None])
    np.fill_diagonal(wanted, 0)
    assert_shares(orders, wanted)


def test_what_is_refused():
    buffer = lr.SlidingWindowBuffer(5)
    for draw in (Draw.of(by="value"), Draw.of(where=("value", 1))):
        assert buffer.view.sample(3, draw, at_most=True) is None
        with pytest.raises(lr.LeanReplayError, match="add samples first"):
            buffer.view.sample(3, draw)
    bits = np.ones(4, np.float64)
    buffer.add(
        np.arange(4),
        metadata={"value": np.array([0.0, 1, 2, 0]), "pair": np.ones((4, 2)), "bad": np.array([1, 2, np.nan, 1]), "zero": bits * 0},
    )
    before = buffer.draws.drawn
    for how, text in (
        ({"where": ("value", 7)}, "sample of 3 from 0 rows with 'value' in \\[7\\]; the buffer holds 4"),
        ({"where": ("value", [0])}, "draw at most 2"),
        ({"where": ("label", 1)}, "0 rows"),
        ({"by": "value"}, "from 2 rows with 'value' \\*\\* 1.0 above 0"),
        ({"by": "zero"}, "0 rows"),
        ({"by": "bad"}, "row 2 holds nan"),
        ({"by": "value", "alpha": -1}, "alpha"),
        ({"alpha": 2}, "give by"),
        ({"by": 3}, "by is the name"),
        ({"where": "value"}, "a pair of a name"),
        ({"where": ("value", "x")}, "numbers"),
        ({"where": ("value", [np.nan])}, "numbers"),
        ({"where": ("value", slice(0, 3, 2))}, "no step"),
        ({"by": "value", "balance": "value"}, "two ways"),
    ):
        with pytest.raises(lr.ArgumentError, match=text):
            buffer.sample(3, **how)
    for how in ({"by": "pair"}, {"by": "none"}):
        with pytest.raises(lr.SchemaError):
            buffer.sample(2, **how)
    assert buffer.draws.drawn == before
    buffer.set_metadata("bad", np.array([1e300, 1e200, 1.0, 0.0]))
    with pytest.raises(lr.ArgumentError, match="beyond float64"):
        buffer.sample(1, by="bad", alpha=2)
    assert (buffer.view.sample(3, Draw.of(by="value"), at_most=True)[1]["idx"].tolist()) in ([1, 2], [2, 1])
    assert buffer.view.sample(3, Draw.of(by="zero"), at_most=True) is None
    assert Draw.of() == UNIFORM


def test_a_reader_beside_a_writer_gets_rows_that_fit(tmp_path):
    """The writer gives rows to samples of other labels all the time."""
    path = tmp_path / "b.h5"
    with lr.SlidingWindowBuffer(64, path) as buffer:
        feed(buffer, 0, 64)

    def work(pipe: int) -> None:
        with lr.SlidingWindowBuffer(path=path, mode="r+") as writer:
            feed(writer, writer.seen, writer.seen + 5)
            os.write(pipe, b"!")
            while True:
                feed(writer, writer.seen, writer.seen + 5)
                time.sleep(0.0005)  # else it leaves a reader on a busy machine no moment for seconds

    pid, read = child(work)
    os.read(read, 1)
    with lr.open(path, "r") as reader:
        for i in range(150):
            (_, y), _ = reader.sample(4, where=("label", i % 5))
            assert (y == i % 5).all()
            assert (reader.sample(4, by="value")[1]["idx"] < 64).all()
        assert reader.seen > 64
    os.kill(pid, signal.SIGKILL)
    killed(pid, read)
