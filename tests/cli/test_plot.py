"""Pictures of buffers: what is drawn is what the buffer holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from leanreplay import ArgumentError, ClassBalancedBuffer, ReservoirBuffer, SchemaError, StorageError

pytest.importorskip("matplotlib")

from leanreplay import plot


@pytest.fixture(scope="module")
def buffer() -> ClassBalancedBuffer:
    made = ClassBalancedBuffer(30, seed=0)
    made.add((np.arange(90 * 16, dtype=np.uint8).reshape(90, 4, 4), np.arange(90) // 30))
    return made


def heights(axes: object) -> float:
    return sum(patch.get_height() for patch in axes.patches)  # type: ignore[attr-defined]


def test_every_row_is_in_the_composition_once(buffer: ClassBalancedBuffer) -> None:
    axes = plot.composition(buffer).axes[0]
    assert heights(axes) == 30
    for container, group in zip(axes.containers, range(3), strict=True):  # a group came in its third of the stream
        low, high = 30 * group - 3, 30 * (group + 1) + 3
        assert all(low <= bar.get_x() <= high for bar in container if bar.get_height())


def test_ages_and_sizes(buffer: ClassBalancedBuffer) -> None:
    assert heights(plot.ages(buffer).axes[0]) == 30
    assert [bar.get_height() for bar in plot.sizes(buffer).axes[0].patches] == [10, 10, 10]
    assert len(plot.overview(buffer).axes) == 3


def test_images(buffer: ClassBalancedBuffer) -> None:
    figure = plot.images(buffer, 4)
    for axes, i in zip(figure.axes, (0, 9, 19, 29), strict=True):
        (x, y), _ = buffer[i]
        np.testing.assert_array_equal(axes.images[0].get_array(), x)
        assert axes.get_title() == str(y)


def test_a_buffer_without_groups_and_bad_input(tmp_path: Path) -> None:
    plain = ReservoirBuffer(10)
    with pytest.raises(ArgumentError, match="empty"):
        plot.ages(plain)
    plain.add(np.zeros((20, 5)))
    assert len(plot.overview(plain, tmp_path / "o.svg").axes) == 2 and (tmp_path / "o.svg").exists()
    with pytest.raises(SchemaError):
        plot.sizes(plain)
    with pytest.raises(ArgumentError, match=r"float64\[5\]"):
        plot.images(plain)
    with pytest.raises(ArgumentError, match="path"):
        plot.ages(plain, tmp_path / "o.xyz")
    with pytest.raises(StorageError):
        plot.ages(plain, tmp_path / "none" / "o.png")
    with pytest.raises(ArgumentError, match="buffer must be"):
        plot.ages([1, 2])  # type: ignore[arg-type]
