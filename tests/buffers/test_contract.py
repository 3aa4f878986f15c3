"""The contract: what every buffer promises, shown for each kind in memory and on disk (a file, or a folder of parts).

`support/contract.py` lists the kinds. What only some buffers promise stands in files of their own.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from children import child, result
from contract import KINDS, Case, assert_samples, digits, held, logits

import leanreplay
from leanreplay import (
    ArgumentError,
    CapacityWarning,
    DataBuffer,
    ExistsError,
    LeanReplayError,
    LockedError,
    MismatchError,
    MissingError,
    ModeError,
    RowError,
    Schema,
    SchemaError,
    StateError,
)

pytestmark = pytest.mark.usefixtures("kernels")
CASES = [(kind, place) for kind in KINDS for place in ("memory", "disk")]


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    kind, place = request.param
    return Case(kind, None if place == "memory" else tmp_path / ("parts" if kind == "infinite" else "replay.h5"))


@pytest.fixture(params=KINDS)
def on_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return Case(request.param, tmp_path / ("parts" if request.param == "infinite" else "replay.h5"))


# -- reading -----------------------------------------------------------------------------------------------------------


def test_sample(case: Case) -> None:
    """With metadata, rows and positions; distinct without `replace`; none at all; what it returns can be asked for again."""
    with case.filled(seed=0) as buffer:
        batch, meta = buffer.sample(8)
        assert sorted(meta) == sorted(["idx", "logits", "position", *case.own])
        assert_samples(batch, meta)
        assert len(set(meta["idx"].tolist())) == 8
        assert_samples(*buffer.get(meta["idx"][::-1]))
        assert_samples(*buffer.get(torch.as_tensor(meta["idx"])))
        assert_samples(*buffer.sample(100, replace=True))
        assert buffer.sample(0)[0][0].shape == (0, 1, 4, 4)
        assert buffer.check() == []


def test_map_style_dataset(case: Case) -> None:
    """len, [i], negative i, iteration, and the batched __getitems__ that torch's DataLoader calls."""
    with case.filled() as buffer:
        n = len(buffer)
        (x, y), meta = buffer[3]
        assert x.shape == (1, 4, 4)
        assert (float(x[0, 0, 0]), int(y)) == (meta["position"], meta["position"] % 3)
        assert isinstance(meta["idx"], int)
        assert buffer[-1][1]["position"] == buffer[n - 1][1]["position"]
        assert [m["idx"] for _, m in buffer.__getitems__([2, 0, -1])] == [2, 0, n - 1]
        assert [m["position"] for _, m in buffer] == buffer.get_metadata("position").tolist()
        assert buffer.__getitems__([]) == []
        with pytest.raises(RowError, match=f"index {n} of a buffer of {n}"):
            buffer[n]
        with pytest.raises(IndexError):
            buffer[-n - 1]


def test_samples_are_copies(case: Case) -> None:
    """What a caller does to what he got, or to what he gave, does not reach the buffer."""
    with case.filled(10) as buffer:
        (x, _), meta = buffer.get([3])
        x[:] = -1
        meta["logits"][:] = -1
        assert_samples(*buffer.get([3]))
        data = digits(10, 11)
        buffer.add(data, metadata={"logits": logits(10, 11)}, **case.given(10, 11))
        data[0][:] = -1
        assert_samples(*buffer.get(buffer.get_metadata("idx")))


def test_transforms_apply_on_reading_only(case: Case) -> None:
    calls = []

    def double(x: Any) -> Any:
        calls.append(x.shape)
        return x * 2

    with case.filled(10, transform=double, target_transform=lambda y: y + 100) as buffer:
        assert not calls
        (x, y), meta = buffer.sample(4)
        assert calls == [(1, 4, 4)] * 4
        np.testing.assert_array_equal(x[:, 0, 0, 0], 2 * meta["position"])
        np.testing.assert_array_equal(y, meta["position"] % 3 + 100)
        (x1, y1), meta1 = buffer[2]
        assert (x1 == 2 * meta1["position"]).all() and y1 == meta1["position"] % 3 + 100
        buffer.transform = buffer.target_transform = None
        assert_samples(*buffer.get(range(10)))


def test_an_empty_buffer_says_so(case: Case) -> None:
    with case.make() as buffer:
        actions: list[tuple[str, Callable[[], Any]]] = [
            ("sample of 1", lambda: buffer.sample(1)),
            ("buffer of 0", lambda: buffer.sample(1, replace=True)),
            ("empty", lambda: buffer.get_metadata("idx")),
            ("empty", lambda: buffer.set_metadata("a", np.zeros(1))),
            ("index 0", lambda: buffer[0]),
            ("rows in use", lambda: buffer.get([0])),
            ("nothing to save", lambda: buffer.save("/nonexistent")),
        ]
        for word, action in actions:
            with pytest.raises(LeanReplayError, match=word):
                action()
        assert list(buffer) == [] and buffer.check() == []
        assert case.path is None or not case.files()


# -- feeding -----------------------------------------------------------------------------------------------------------


def test_any_batches(case: Case) -> None:
    """G2: however the stream is cut, and if part of it comes again with `at=`, the buffer holds the same in the same rows."""
    if case.kind == "parametric":
        pytest.skip("ranks what a call brings")
    with case.make(seed=3) as buffer, case.new(seed=3) as wanted:
        case.feed(wanted, 0, 75)
        for start, stop in ((0, 1), (1, 1), (1, 8), (8, 30), (30, 31), (31, 75)):
            case.feed(buffer, start, stop)
        assert held(buffer) == held(wanted)
        buffer.add(digits(70, 75), metadata={"logits": logits(70, 75)}, at=70, **case.given(70, 75))
        assert held(buffer) == held(wanted)
        assert buffer.check() == wanted.check() == []


def test_update_is_add(case: Case) -> None:
    """From a dataset of samples."""
    x, y = digits(0, 30)
    dataset = [(x[i], int(y[i])) for i in range(30)]
    with case.make(seed=5) as buffer, case.filled(seed=5) if case.path is None else case.new(seed=5) as wanted:
        if case.path is not None:
            case.feed(wanted, 0, 30)
        buffer.update(dataset, metadata={"logits": logits(0, 30)}, **case.given(0, 30))
        assert held(buffer) == held(wanted)


WRONG: dict[str, tuple[Callable[[Any, Any], Any], dict[str, Any] | None]] = {
    "shape": (lambda x, y: (x[:, :, :2], y), {}),
    "dtype": (lambda x, y: (x.astype(np.float64), y), {}),
    "structure": (lambda x, y: {"x": x, "y": y}, {}),
    "length": (lambda x, y: (x, y[:3]), {}),
    "no metadata": (lambda x, y: (x, y), None),
    "more metadata": (lambda x, y: (x, y), {"task": np.zeros(4)}),
    "metadata's shape": (lambda x, y: (x, y), {"logits": np.zeros((4, 1), np.float32)}),
    "text": (lambda x, y: ("ab", "cd"), {}),
}


def test_what_does_not_fit_changes_nothing(case: Case) -> None:
    """G7: a batch is refused as a whole, and the buffer goes on as if it had never come."""
    with case.filled(seed=2) as buffer, case.new(seed=2) as wanted:
        case.feed(wanted, 0, 30)
        for change, metadata in WRONG.values():
            given = None if metadata is None else {"logits": logits(30, 34), **metadata}
            with pytest.raises(SchemaError):
                buffer.add(change(*digits(30, 34)), metadata=given, **case.given(30, 34))
        for call in (lambda: buffer.sample(-1), lambda: buffer.sample(2.0), lambda: buffer.get([0.5]), lambda: buffer["x"]):
            with pytest.raises(ArgumentError):
                call()
        for other in (buffer, wanted):
            case.feed(other, 30, 50)
        assert held(buffer) == held(wanted)
        assert buffer.sample(5)[1]["idx"].tolist() == wanted.sample(5)[1]["idx"].tolist()
        assert buffer.check() == []


# -- metadata ----------------------------------------------------------------------------------------------------------


def test_set_metadata(case: Case) -> None:
    """All rows, some, a row twice (the last value counts), only where a position still stands; samples are untouched."""
    with case.filled(12) as buffer:
        before = buffer.get_metadata("logits")
        buffer.set_metadata("logits", before + 1)
        buffer.set_metadata("logits", np.full((3, 2), 7, np.float32), rows=[4, 1, 2])
        two = np.array([[1, 1], [2, 2]], np.float32)
        buffer.set_metadata("logits", two, rows=[5, 5])
        position = buffer.get_metadata("position", rows=[6, 7])
        buffer.set_metadata("logits", two, rows=[6, 7], positions=[position[0], position[1] + 1])
        wanted = before + 1
        wanted[[1, 2, 4]], wanted[5], wanted[6] = 7, 2, 1
        assert (buffer.get_metadata("logits") == wanted).all()
        assert (buffer.get(range(12))[0][0][:, 0, 0, 0] == buffer.get_metadata("position")).all()
        with pytest.raises(SchemaError, match=r"no metadata 'logit'; the buffer has \['logits'"):
            buffer.get_metadata("logit")
        with pytest.raises(RowError, match="rows in use are 0 to"):
            buffer.set_metadata("logits", two, rows=[0, 12])
        assert buffer.check() == []


def test_metadata_added_later(case: Case) -> None:
    """A new name adds a field, for all samples at once; later batches must give it too; restore points end."""
    with case.filled() as buffer:
        state, n = buffer.state_dict(), len(buffer)
        features = np.arange(n * 5, dtype=np.float64).reshape(n, 5)
        with pytest.raises(SchemaError, match=f"values for all {n} samples"):
            buffer.set_metadata("features", features[:2], rows=[0, 1])
        buffer.set_metadata("features", features)
        batch, meta = buffer.sample(5)
        assert_samples(batch, meta)
        assert (meta["features"] == features[meta["idx"]]).all()
        with pytest.raises(SchemaError, match=r"missing \['features'\]"):
            case.feed(buffer, 30, 31)
        case.feed(buffer, 30, 31, features=features[:1])
        with pytest.raises(StateError):
            buffer.load_state_dict(state)
        assert buffer.check() == []
        n = len(buffer)
    if case.path is not None:
        with leanreplay.open(case.path) as buffer:
            assert buffer.get_metadata("features").shape == (n, 5)


# -- states and copies -------------------------------------------------------------------------------------------------


def test_state_dict_in_a_checkpoint(case: Case, tmp_path: Path) -> None:
    """Train, checkpoint, train on, go back, and go on as if never interrupted: the same rows, the same draws."""
    with case.filled() as buffer:
        buffer.sample(3)
        torch.save(buffer.state_dict(), tmp_path / "checkpoint.pt")
        before = buffer.get_metadata("position").tolist()

        def go_on() -> list[Any]:
            found = [buffer.sample(4)[1]["idx"].tolist()]
            case.feed(buffer, 30, 55)
            buffer.set_metadata("logits", logits(0, len(buffer)))
            return [*found, buffer.sample(4)[1]["position"].tolist(), buffer.get_metadata("position").tolist()]

        first = go_on()
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        for _ in range(2):
            buffer.load_state_dict(state)
            assert (buffer.seen, buffer.get_metadata("position").tolist()) == (30, before)
            assert_samples(*buffer.get(buffer.get_metadata("idx")))
            assert go_on() == first
        assert buffer.check() == []
    with case.new() as other, pytest.raises(StateError, match="another buffer"):
        case.feed(other, 0, 1)
        other.load_state_dict(state)


def test_past_the_limit_of_restore_points(case: Case) -> None:
    """Older states are out of reach, which the error says by how many samples; the stream may be replayed instead."""
    if not case.bounded:
        pytest.skip("goes back to any state")
    with case.make(restore_points=2) as buffer:
        states = []
        for start in (0, 30, 60):
            case.feed(buffer, start, start + 30)
            states.append(buffer.state_dict())
        case.feed(buffer, 90, 100)
        with pytest.raises(StateError, match=r"ahead of the state by 70 samples.*restore_points.*at=position"):
            buffer.load_state_dict(states[0])
        assert buffer.seen == 100
        buffer.add(digits(30, 105), metadata={"logits": logits(30, 105)}, at=30, **case.given(30, 105))  # 70 of them are known
        assert buffer.seen == 105
        buffer.load_state_dict(states[1])
        assert buffer.seen == 60
        with pytest.raises(StateError, match="30 behind"):
            buffer.load_state_dict(states[2])


def test_kept_states(case: Case) -> None:
    """The best of 20 checkpoints, and another one, are there in the end, rows and draws, also in the next process."""
    buffer, then = case.filled(), {}
    for n in range(20):
        case.feed(buffer, 30 + 5 * n, 35 + 5 * n)
        state = buffer.state_dict()
        if n in (3, 8, 9):
            buffer.keep(state)
            then[n] = state, held(buffer), buffer.sample(4)[1]["position"].tolist()
    assert [kept["seen"] for kept in buffer.kept_states()] == [50, 75, 80]
    buffer.release(then[8][0])
    if case.path is not None:
        buffer.close()
        buffer = case.make(mode="r+")
    with buffer:
        for n in (9, 3, 9, 3) if case.bounded else (9, 3):  # kept states stay, unless parts of them go
            state, rows, drawn = then[n]
            buffer.load_state_dict(state)
            assert (held(buffer), buffer.sample(4)[1]["position"].tolist()) == (rows, drawn)
            case.feed(buffer, buffer.seen, buffer.seen + 40)
        if case.bounded:
            with pytest.raises(StateError, match=r"cannot be kept.*newest 2 \(restore_points\)"):
                buffer.keep(then[8][0])
            case.resize(buffer, 10)
        else:
            buffer.release()
        assert buffer.kept_states() == []
        assert buffer.check() == []


def test_save_and_load(case: Case, tmp_path: Path) -> None:
    """The whole buffer into a folder and back, draws included; into another buffer of the same parameters, and no other."""
    folder = tmp_path / "copies" / "1"
    with case.filled(seed=4) as buffer:
        buffer.sample(2)
        buffer.save(folder)
        drawn = buffer.sample(6)[1]["position"].tolist()
        kept = buffer.get_metadata("position").tolist()
        case.feed(buffer, 30, 90)
        buffer.load(folder)
        assert (buffer.seen, buffer.get_metadata("position").tolist()) == (30, kept)
        assert buffer.sample(6)[1]["position"].tolist() == drawn
        case.feed(buffer, 30, 31)
        assert buffer.check() == []
    with case.new(tmp_path / "other.h5" if case.path is None else None, seed=4) as other:
        other.load(folder)
        assert other.sample(6)[1]["position"].tolist() == drawn
        assert other.check() == []
    with case.new(seed=5) as other, pytest.raises(MismatchError, match="seed"):
        other.load(folder)
    with case.new(seed=4) as other, pytest.raises(MissingError, match=r"no state\.json"):
        other.load(tmp_path)


def test_copies_of_the_object_read(case: Case) -> None:
    """G3: a pickled buffer and a forked one read what the writer has, and refuse to write."""
    with case.filled(50) as buffer:
        wanted = held(buffer)

        def in_a_fork(_: int) -> list[Any]:
            with pytest.raises(ModeError, match=r"another process|reading only|fork"):
                case.feed(buffer, 50, 51)
            return [buffer.mode, held(buffer) == wanted, len(buffer.check())]

        assert result(*child(in_a_fork)) == ["r", True, 0]
        if case.kind == "infinite" and case.path is None:
            with pytest.raises(ModeError, match="cannot be sent to another process"):
                pickle.dumps(buffer)
        else:
            with pickle.loads(pickle.dumps(buffer)) as other:
                assert held(other) == wanted
                assert other.mode == "r"
                with pytest.raises(ModeError, match="reading only"):
                    case.feed(other, 50, 51)
        case.feed(buffer, 50, 60)
        assert_samples(*buffer.sample(5))


# -- files and modes ---------------------------------------------------------------------------------------------------


def test_modes(on_disk: Case) -> None:
    """h5py's modes: x creates and refuses, a opens or creates, r+ opens, r reads beside a writer, w replaces."""
    case, make = on_disk, on_disk.make
    for mode in ("r", "r+"):
        with pytest.raises(MissingError):
            make(mode=mode)
    case.filled(seed=6).close()
    with pytest.raises(ExistsError, match=r"mode='r\+' or 'a', or replace it with mode='w'"):
        make()
    with make(mode="r") as buffer:
        assert (buffer.seen, buffer.seed, buffer.mode) == (30, 6, "r")
        with pytest.raises(ModeError, match="reading only"):
            case.feed(buffer, 30, 31)
    with make(mode="a") as buffer:
        assert buffer.seen == 30
        with pytest.raises(LockedError, match="in this very process"):
            make(mode="a")
        with make(mode="r") as reader:
            case.feed(buffer, 30, 33)
            assert reader.seen == 33
            assert_samples(*reader.sample(5))
    with make(mode="r+", seed=6) as buffer:
        assert buffer.seen == 33
    with pytest.raises(MismatchError, match=r"seed=7 \(file: 6\)"):
        make(mode="r+", seed=7)
    with make(mode="w", seed=7) as buffer:
        buffer.add(np.zeros(3), **(case.given(0, 3) or {"group": [0, 0, 0]}))
        assert (buffer.seen, buffer.seed) == (3, 7)
    with case.new(str(case.path) + ".new", mode="a") as buffer:
        assert (len(buffer), buffer.schema) == (0, None)


def test_open_by_path_alone(on_disk: Case) -> None:
    """leanreplay.open finds class and parameters in the file, for reading and for going on."""
    case, path = on_disk, on_disk.path
    assert path is not None
    with case.filled(seed=2, stream=9) as buffer:
        cls, wanted = type(buffer), held(buffer)
    with leanreplay.open(path) as buffer:
        assert type(buffer) is cls
        assert (buffer.mode, buffer.seed, buffer.stream) == ("r", 2, 9)
        assert held(buffer) == wanted
    with leanreplay.open(str(path), mode="r+", transform=lambda x: -x) as buffer:
        case.feed(buffer, 30, 40)
        assert (buffer[0][0][0] <= 0).all()
    with pytest.raises(MissingError):
        leanreplay.open(path.with_name("none.h5"))


def test_forgotten_and_opened_again(on_disk: Case) -> None:
    """G3: a buffer that nobody closed is whole in its file, and goes on from there as if it had never ended."""
    case = on_disk
    buffer = case.filled(seed=8)
    wanted = held(buffer)
    del buffer
    with leanreplay.open(str(case.path), mode="r+") as buffer, case.new(seed=8) as other:
        assert held(buffer) == wanted
        case.feed(other, 0, 30)
        for one in (buffer, other):
            case.feed(one, 30, 60)
        assert held(buffer) == held(other)
        assert buffer.check() == []


def test_what_a_buffer_says(case: Case) -> None:
    """repr, path, schema, nbytes, before the first batch, after it, and closed."""
    buffer = case.make(seed=3)
    assert isinstance(buffer, DataBuffer)
    assert (len(buffer), buffer.seen, buffer.nbytes, buffer.schema) == (0, 0, 0, None)
    assert type(buffer).__name__ in repr(buffer)
    buffer.add(digits(0, 30), **case.given(0, 30))
    assert str(buffer.schema) == f"Schema(data/0: f4[1, 4, 4], data/1: i8[]{OWN_FIELDS.get(case.kind, '')})"
    assert buffer.path == (None if case.path is None else str(case.path))
    assert "seen=30" in repr(buffer)
    if case.path is None:
        assert buffer.nbytes > len(buffer) * (64 + 8)
    else:
        assert buffer.nbytes == case.bytes_on_disk()
        assert str(case.path) in repr(buffer)
    buffer.flush()
    with buffer as same:
        assert same is buffer
    buffer.close()  # once more
    assert "closed" in repr(buffer)
    with pytest.raises(ModeError, match="is closed; open it again"):
        len(buffer)


OWN_FIELDS = {"parametric": ", metadata/rank: i8[]", "scored": ", metadata/score: f8[]"}
WRITES: dict[str, Callable[[Case, Any], Any]] = {
    "add": lambda case, b: case.feed(b, 30, 31),
    "add nothing": lambda case, b: case.feed(b, 30, 30),
    "update": lambda case, b: b.update([(digits(0, 1)[0][0], 0)], metadata={"logits": logits(0, 1)}, **case.given(30, 31)),
    "set_metadata": lambda case, b: b.set_metadata("logits", logits(0, 12), rows=range(12)),
    "state_dict": lambda case, b: b.state_dict(),
    "load_state_dict": lambda case, b: b.load_state_dict({}),
    "load": lambda case, b: b.load("/nonexistent"),
    "resize": lambda case, b: b.resize(5),
}
USES: dict[str, Callable[[Case, Any], Any]] = {
    **WRITES,
    "sample": lambda case, b: b.sample(1),
    "len": lambda case, b: len(b),
    "seen": lambda case, b: b.seen,
    "schema": lambda case, b: b.schema,
    "nbytes": lambda case, b: b.nbytes,
    "[]": lambda case, b: b[0],
    "iter": lambda case, b: list(b),
    "get": lambda case, b: b.get([0]),
    "get_metadata": lambda case, b: b.get_metadata("logits"),
    "save": lambda case, b: b.save("/nonexistent"),
    "flush": lambda case, b: b.flush(),
    "check": lambda case, b: b.check(),
    "pickle": lambda case, b: pickle.dumps(b),
}


def test_writing_in_mode_r(case: Case) -> None:
    """G7: a buffer open for reading refuses every write, as do unpickled copies, and says how to get one that does not."""
    if case.kind == "infinite" and case.path is None:
        pytest.skip("has no readers in other processes")
    with case.filled() as buffer:
        wanted = held(buffer)
        readers = [pickle.loads(pickle.dumps(buffer)), *([leanreplay.open(case.path)] if case.path is not None else [])]
        for reader in readers:
            for name, write in WRITES.items():
                if case.bounded or name != "resize":
                    with pytest.raises(ModeError, match="reading only" if case.path is None else r"reading only.*mode='r\+'"):
                        write(case, reader)
                    assert held(reader) == wanted, name
            reader.close()


def test_closed(case: Case) -> None:
    """G7: a closed buffer refuses every use, and says so; closing twice is fine, and so is looking at its repr."""
    for fed in (30, 0):
        buffer = case.filled(fed) if fed else case.make(mode="w")
        buffer.close()
        for name, use in USES.items():
            if not case.bounded and name in ("resize", "pickle"):
                continue
            with pytest.raises(ModeError, match="closed") as caught:
                use(case, buffer)
            assert "leanreplay.open" in str(caught.value), name
        buffer.close()
        assert "closed" in repr(buffer)


# -- resize, threads ---------------------------------------------------------------------------------------------------


def test_resize(case: Case) -> None:
    """Down and up, samples intact; a reservoir that dropped some says that it cannot use more rows."""
    with case.filled() as buffer:
        if not case.bounded:
            with pytest.raises(ArgumentError, match="grows by itself"):
                buffer.resize(5)
            return
        before = set(buffer.get_metadata("position").tolist())
        buffer.resize(5)
        assert (len(buffer), buffer.max_size) == (5, 5)
        assert set(buffer.get_metadata("position").tolist()) <= before
        assert_samples(*buffer.sample(5))
        keeps_its_size = case.kind in ("reservoir", "weighted")
        if keeps_its_size:
            with pytest.warns(CapacityWarning, match="already dropped samples at 5 rows"):
                buffer.resize(20)
        else:
            case.resize(buffer, 20)
        case.feed(buffer, 30, 60)
        assert buffer.max_size == 20
        if keeps_its_size or case.kind in ("window", "greedy"):
            assert len(buffer) == (5 if keeps_its_size else 20)
        assert_samples(*buffer.sample(5))
        assert buffer.check() == []
    if case.path is not None:
        with leanreplay.open(case.path) as buffer:
            assert buffer.max_size == 20


def test_threads(case: Case) -> None:
    """Four threads add, four read at once: every batch counts once, no sample is torn, the file is clean."""
    buffer = case.make(schema=Schema.from_sample((np.zeros((1, 4, 4), np.float32), 0), {"mine": np.int64(0)}))
    errors: list[BaseException] = []
    adding = threading.Event()
    adding.set()

    def guarded(work: Callable[[int], None], number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    def add(number: int) -> None:
        for start in range(number * 1000, number * 1000 + 180, 3):
            value = np.arange(start, start + 3)
            x = np.ones((3, 1, 4, 4), np.float32) * value[:, None, None, None].astype(np.float32)
            buffer.add((x, value % 16), metadata={"mine": value}, **case.given(number * 30, number * 30 + 3))

    def read(number: int) -> None:
        while adding.is_set():
            if len(buffer) >= 3:
                (x, y), meta = buffer.sample(3)
                assert (x == meta["mine"][:, None, None, None]).all()
                assert (meta["mine"] % 16 == y).all()
                buffer.get_metadata("position")

    adders = [threading.Thread(target=guarded, args=(add, n)) for n in range(4)]
    readers = [threading.Thread(target=guarded, args=(read, n)) for n in range(4)]
    for thread in adders + readers:
        thread.start()
    for thread in adders:
        thread.join()
    adding.clear()
    for thread in readers:
        thread.join()
    assert errors == []
    assert buffer.seen == 4 * 180
    assert buffer.check() == []
    if case.kind == "infinite":
        assert sorted(buffer.get_metadata("mine").tolist()) == sorted(n * 1000 + i for n in range(4) for i in range(180))
    buffer.close()


def test_every_public_buffer_has_a_line() -> None:
    """Whoever adds a buffer adds it to the contract."""
    kinds = {type(make()).__name__ for make in KINDS.values()}
    public = {
        name
        for name in leanreplay.__all__
        if isinstance(getattr(leanreplay, name), type) and issubclass(getattr(leanreplay, name), DataBuffer)
    }
    assert kinds == public - {"DataBuffer", "BalancedBuffer"}
