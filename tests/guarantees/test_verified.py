"""G7: the writer verifies a row once, at every read with verify="always"; readers and `check` verify at each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import child, result

import leanreplay as lr

KINDS: dict[str, Callable[..., Any]] = {
    "reservoir": lambda path, **o: lr.ReservoirBuffer(12, path, seed=1, **o),
    "infinite": lambda path, **o: lr.InfiniteBuffer(path, rows_per_part=8, seed=1, **o),
    "in memory": lambda path, **o: lr.ReservoirBuffer(12, seed=1, **o),
}
N, ROW = 12, 9  # of an infinite buffer in its second part
every_kind = pytest.mark.parametrize("kind", KINDS)


def feed(buffer: Any, start: int, n: int) -> None:
    p = np.arange(start, start + n)
    buffer.add((np.repeat(p[:, None], 100, 1).astype(np.uint8), p), metadata={"z": p})


def flip(buffer: Any, row: int = ROW) -> None:
    """Change a byte of a row's first field, in memory as on the disk."""
    store = buffer.current.store
    part, row = (store.stores[row // 8], row % 8) if hasattr(store, "stores") else (store, row)
    part.mapping.mem[part.layout.columns[0][0] + 100 * row + 55] ^= 8


def found(buffer: Any, rows: Any = (ROW,)) -> bool:
    """Whether a read of the row finds that it is wrong."""
    try:
        buffer.get(list(rows))
    except lr.CorruptionError as error:
        assert "do not match their checksums" in str(error)
        return True
    return False


@every_kind
@pytest.mark.parametrize("verify", ["once", "always"])
def test_damage_of_a_row_that_was_read_before(kind: str, verify: str, tmp_path: Path) -> None:
    """Only "always" sees it at the next read; `check`, readers and a buffer opened anew see it in any case."""
    path = tmp_path / "b"
    with KINDS[kind](path, verify=verify) as buffer:
        feed(buffer, 0, N)
        flip(buffer)
        assert found(buffer) == (verify == "always")  # the writer wrote it: that counts as verified
        flip(buffer)
    if kind == "in memory":
        return
    with lr.open(path, "r+", verify=verify) as buffer:
        flip(buffer)
        assert found(buffer)  # its first read
        flip(buffer)
        assert not found(buffer, range(N))
        assert not found(buffer, range(N))
        flip(buffer)
        assert found(buffer) == (verify == "always")
        buffer.get_metadata("z")
        with lr.open(path) as reader:
            assert found(reader)
        assert result(*child(lambda _: found(buffer)))  # a fork's child reads as a reader does
        problems = buffer.check()
        assert [p.rows for p in problems] == [(ROW,)]
        assert found(buffer)  # after `check` nothing is trusted
        flip(buffer)
        assert (buffer.check(), found(buffer, range(N))) == ([], False)
        flip(buffer)
    with lr.open(path, "r+", verify=verify) as buffer:
        assert found(buffer)


@pytest.mark.filterwarnings("ignore::leanreplay.VolatileStateWarning")
@every_kind
def test_rows_that_a_rollback_puts_back_are_verified_anew(kind: str, tmp_path: Path) -> None:
    with KINDS[kind](tmp_path / "b") as buffer:
        feed(buffer, 0, N)
        state = buffer.state_dict()
        feed(buffer, N, 3 * N)
        assert not found(buffer, range(N))
        buffer.load_state_dict(state)
        flip(buffer)
        assert found(buffer)


def test_reading_one_field_does_not_vouch_for_the_others(tmp_path: Path) -> None:
    with KINDS["reservoir"](tmp_path / "b") as buffer:
        feed(buffer, 0, N)
    with lr.open(tmp_path / "b", "r+") as buffer:
        flip(buffer)
        assert buffer.get_metadata("z")[ROW] == ROW
        buffer.set_metadata("z", np.zeros(N, np.int64))
        assert found(buffer)


@pytest.mark.parametrize("how", ["resize", "field", "merge", "parametric"])
def test_damage_gets_no_new_checksum(how: str, tmp_path: Path) -> None:
    """What reads rows to write them again verifies them, whenever they were verified before."""
    with KINDS["reservoir"](tmp_path / "b") as buffer, lr.ParametricBuffer(N, tmp_path / "p", groupby=None) as parametric:
        feed(buffer, 0, N)
        feed(parametric, 0, N)
        harmed = parametric if how == "parametric" else buffer
        assert not found(harmed, range(N))
        flip(harmed)
        assert not found(harmed)
        with pytest.raises(lr.CorruptionError, match="do not match"):
            if how == "resize":
                buffer.resize(20)
            elif how == "field":
                buffer.set_metadata("new", np.zeros(N))
            elif how == "merge":
                with KINDS["reservoir"](tmp_path / "c", stream=1) as other:
                    feed(other, 0, N)
                    lr.merge([buffer, other], tmp_path / "m")
            else:
                feed(parametric, N, 2 * N)
        assert found(harmed)
