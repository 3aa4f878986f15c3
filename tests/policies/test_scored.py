"""Who leaves a ScoredBuffer: the same samples as by definition, and chances as its docstring says."""

from __future__ import annotations

import itertools
import os
import signal
import time

import numpy as np
import pytest
from children import child, killed
from laws import assert_shares
from weighted_oracle import fin

import leanreplay as lr
from leanreplay.keys import key_pair

EVICT, ADMIT = ("lowest", "proportional", "oldest", "random"), ("all", "reservoir")
M64, GOLDEN = 2**64 - 1, 0x9E3779B97F4A7C15


class Oracle:
    """A scored buffer by definition: {row: [position, score]}, one sample after the other."""

    def __init__(self, size: int, evict: str, admit: str, seed: int = 0) -> None:
        self.size, self.evict, self.admit, self.held = size, evict, admit, {}
        self.k0, self.k1 = map(int, key_pair("scored eviction", seed))
        self.position = 0

    def number(self, k: int) -> int:
        """The k-th hash of the present position."""
        base = fin(fin(self.position * GOLDEN + self.k0 & M64) + self.k1 & M64)
        return fin(base + k * GOLDEN & M64)

    def leaving(self, score: float) -> int | None:
        """The row that the new sample takes; None if it is the one that leaves."""
        rows, here = list(range(self.size)), {r: s for r, (_, s) in self.held.items()}
        if self.admit == "reservoir":
            if self.number(0) % (self.position + 1) >= self.size:
                return None
        else:
            rows.append(self.size)
            here[self.size] = score
        age = {r: self.held[r][0] if r in self.held else self.position for r in rows}
        if self.evict == "random":
            row = rows[self.number(1) % len(rows)]
        elif self.evict == "oldest":
            row = min(rows, key=age.__getitem__)
        elif self.evict == "lowest":
            row = min(rows, key=lambda r: (here[r], age[r]))
        else:
            row = self.proportional(rows, here)
        return None if row == self.size else row

    def proportional(self, rows: list[int], here: dict[int, float]) -> int:
        top, low = max(here.values()), min(here.values())
        for attempt in range(64):
            row = rows[self.number(2 * attempt + 1) % len(rows)]
            if top == low or (self.number(2 * attempt + 2) >> 11) / 2**53 < (top - here[row]) / (top - low):
                return row
        target = (self.number(129) >> 11) / 2**53 * sum((top - here[r]) / (top - low) for r in rows)
        for row in rows:
            target -= (top - here[row]) / (top - low)
            if target < 0:
                break
        return row

    def add(self, scores) -> None:
        for score in scores:
            row = len(self.held) if len(self.held) < self.size else self.leaving(score)
            if row is not None:
                self.held[row] = [self.position, float(score)]
            self.position += 1

    def rows(self) -> list[list[float]]:
        return [self.held[r] for r in sorted(self.held)]


def rows_of(buffer):
    return [[p, s] for p, s in zip(buffer.get_metadata("position").tolist(), buffer.get_metadata("score").tolist(), strict=True)]


def some_scores(n: int, seed: int):
    """Many ties, negative ones, an outlier either way (so that drawing by rejection gives up now and then)."""
    rng = np.random.default_rng([7, seed])
    scores = rng.choice([0.0, 1.0, -2.0, 0.5], n) + rng.choice([0.0, 1e-3], n) * rng.random(n)
    scores[rng.random(n) < 0.02] = -1e6
    return scores


@pytest.mark.parametrize("admit", ADMIT)
@pytest.mark.parametrize("evict", EVICT)
def test_a_buffer_holds_what_the_definition_holds(evict, admit, tmp_path):
    """Cut into any batches, with scores that change, reopened, gone back and fed again."""
    for size, seed in itertools.product((1, 5, 40), range(2)):
        rng = np.random.default_rng([size, seed])
        path, oracle = tmp_path / f"{size} {seed}.h5", Oracle(size, evict, admit, seed)
        buffer = lr.ScoredBuffer(size, path, evict=evict, admit=admit, seed=seed)
        scores = some_scores(200, seed)
        done = 0
        while done < 200:
            n = int(rng.choice([1, 2, 17]))
            new = scores[done : done + n]
            update = rng.integers(0, 2**20, 3) % max(1, len(oracle.held))
            stale = np.array([oracle.held[r][0] if r in oracle.held else 0 for r in update.tolist()])
            stale[0] += 1  # another sample than the row holds: skipped
            given = rng.choice([0.25, -3.0, 7.0], 3)
            if len(oracle.held) > 1:
                for r, p, s in zip(update.tolist(), stale.tolist(), given.tolist(), strict=True):
                    if oracle.held[r][0] == p:
                        oracle.held[r][1] = s
                if done % 2:
                    buffer.set_scores(update, given, positions=stale)
                    buffer.add(np.arange(done, done + len(new)), scores=new)
                else:
                    buffer.add(np.arange(done, done + len(new)), scores=new, moved=(update, stale, {"score": given.astype(np.float32)}))
            else:
                buffer.add(np.arange(done, done + len(new)), scores=new)
            oracle.add(new)
            done += len(new)
            assert rows_of(buffer) == oracle.rows(), (size, seed, done)
            if done % 5 == 0:
                buffer.close()
                buffer = lr.ScoredBuffer(path=path, mode="r+")
            if done % 7 == 0:
                state = buffer.state_dict()
                buffer.add(np.arange(9), scores=some_scores(9, 99))
                buffer.load_state_dict(state)
        assert buffer.check() == []
        assert (buffer.get(buffer.get_metadata("idx"))[0] == buffer.get_metadata("position")).all()


def test_updates_read_scores_too():
    """A dataset with scores leaves what batches with them leave."""
    scores = some_scores(60, 3)
    first, second = (lr.ScoredBuffer(8, evict="lowest") for _ in range(2))
    first.update([(np.full(2, i), i % 3) for i in range(60)], scores=scores)
    second.update((np.arange(120.0).reshape(60, 2), np.arange(60) % 3), scores=scores)
    assert rows_of(first) == rows_of(second) == sorted(rows_of(first), key=lambda row: rows_of(first).index(row))
    assert sorted(s for _, s in rows_of(first)) == sorted(scores)[-8:]


def leaving(scores, seed: int, **params: str) -> int:
    """The row that a new sample, the last of these scores, takes from the others; -1 if it does not enter."""
    bits = np.array(scores).view(np.int64)
    policy = lr.ScoredPolicy(len(bits) - 1, seed, params)
    policy.load(np.arange(len(bits) - 1), bits[:-1])
    return int(policy.plan(len(bits) - 1, bits[-1:], 9).rows[0])


LAW = [0.0, 1.0, 3.0, 4.0]  # of three rows and the new sample


@pytest.mark.parametrize(
    ("evict", "admit", "chances"),
    [
        ("proportional", "all", [4, 3, 1, 0]),
        ("random", "all", [1, 1, 1, 1]),
        ("proportional", "reservoir", [9, 6, 0, 5]),  # 3/4 of [3, 2, 0] / 5; 1/4 does not enter
        ("random", "reservoir", [1, 1, 1, 1]),
    ],
)
def test_chances(evict, admit, chances):
    """Each leaves as often as the law says, by chi-square over 4,000 seeds."""
    left = np.zeros(4, np.int64)
    for seed in range(4000):
        left[leaving(LAW, seed, evict=evict, admit=admit)] += 1  # -1: the new sample itself
    assert_shares(left, chances, f"{evict}, {admit}")


def test_proportional_where_one_lies_far_below_the_others():
    """Nearly all tries fail then, and a pass over all rows decides, by the same law."""
    scores = np.array([0.0] + [0.998, 0.999] * 500 + [1.0])
    left = np.zeros(3, np.int64)
    for seed in range(400):
        row = leaving(scores, seed, evict="proportional")
        left[0 if row == 0 else 1 + row % 2] += 1
    assert_shares(left, [2, 1, 2])


def test_what_is_refused():
    buffer = lr.ScoredBuffer(4)
    for wrong, error in (
        (None, lr.ArgumentError),
        ([1.0, np.nan], lr.ArgumentError),
        ([1.0, np.inf], lr.ArgumentError),
        ([1.0], lr.SchemaError),
    ):
        with pytest.raises(error, match="score"):
            buffer.add(np.arange(2), scores=wrong)
    with pytest.raises(lr.SchemaError, match="twice"):
        buffer.add(np.arange(2), scores=[1, 2], metadata={"score": [1, 2]})
    with pytest.raises(lr.ArgumentError, match="evict"):
        lr.ScoredBuffer(4, evict="best")
    assert buffer.seen == 0
    buffer.add(np.arange(2), scores=[1, 2])
    with pytest.raises(lr.ArgumentError, match="finite"):
        buffer.set_scores([0], [np.nan])
    with pytest.raises(lr.ArgumentError, match="finite"):
        buffer.set_metadata("score", [1.0, -np.inf])
    with pytest.raises(lr.ArgumentError, match="finite"):
        buffer.add(np.arange(2), scores=[1, 2], moved=([0], [0], {"score": [np.nan]}))
    assert rows_of(buffer) == [[0, 1.0], [1, 2.0]]


def test_killed_at_any_instant(tmp_path):
    """A writer that moves scores and adds in one commit is killed again and again: always a state that it went through."""
    path, size, batch = tmp_path / "b.h5", 8, 6
    buffer, oracle = lr.ScoredBuffer(size, path, evict="proportional"), Oracle(size, "proportional", "all")
    buffer.add(np.arange(size), scores=some_scores(size, 1))
    oracle.add(some_scores(size, 1))
    buffer.close()

    def moved(seen: int):
        return np.arange(4) + seen % 4, np.array([-4.0, 0.5, seen, 2.0])

    def work(pipe: int) -> None:
        with lr.ScoredBuffer(path=path, mode="r+") as writer:
            os.write(pipe, b"!")
            while True:
                rows, given = moved(writer.seen)
                positions = writer.get_metadata("position", rows)
                writer.add(
                    np.arange(writer.seen, writer.seen + batch),
                    scores=some_scores(batch, writer.seen),
                    moved=(rows, positions, {"score": given}),
                )

    for trial in range(8):
        pid, read = child(work)
        os.read(read, 1)
        time.sleep(0.002 * trial)
        os.kill(pid, signal.SIGKILL)
        killed(pid, read)
        with lr.ScoredBuffer(path=path, mode="r+") as buffer:
            assert buffer.check() == []
            while oracle.position < buffer.seen:
                for row, score in zip(*(a.tolist() for a in moved(oracle.position)), strict=True):
                    oracle.held[row][1] = score
                oracle.add(some_scores(batch, oracle.position))
            assert rows_of(buffer) == oracle.rows(), trial
    assert oracle.position > size
