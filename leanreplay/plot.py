"""Pictures of what a buffer holds. They need matplotlib, which is imported when one is drawn.

Each function returns matplotlib's Figure. No window is opened and no backend chosen, so a figure can
also be shown in a notebook, or saved later.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .arguments import as_path, integer
from .buffers.base import DataBuffer
from .errors import ArgumentError, DependencyError, LeanReplayError
from .keys import STREAM_BITS
from .storage import system

Path = str | os.PathLike[str] | None
Array = npt.NDArray[Any]

BINS = 40
MOST_GROUPS = 20  # that are told apart by colour


def new_figure(width: float, height: float) -> Any:
    """Return an empty Figure of this size in inches."""
    try:
        return importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    except ImportError:
        raise DependencyError("drawing needs matplotlib, which is not installed: pip install matplotlib") from None


def saved(figure: Any, path: Path) -> Any:
    """Save the figure as what the path's ending says (.png, .pdf, .svg), if there is one; return it."""
    if path is not None:
        name = as_path(path)
        with system.storage_errors(f"saving {name}"):
            try:
                figure.savefig(name, dpi=120)
            except ValueError as error:
                raise ArgumentError(f"path {name!r:.200}: {error}") from None
    return figure


def composition(buffer: DataBuffer, path: Path = None) -> Any:
    """Draw which parts of the stream the buffer's samples come from, by group: a stacked histogram.

    A reservoir is flat: each part of its stream is held with the same probability.

    >>> import numpy as np
    >>> from leanreplay import ReservoirBuffer, plot
    >>> buffer = ReservoirBuffer(100)
    >>> buffer.add((np.arange(1000), np.arange(1000) // 250))
    >>> figure = plot.composition(buffer)
    """
    return _drawn(buffer, path, _composition)


def ages(buffer: DataBuffer, path: Path = None) -> Any:
    """Draw how many samples ago the samples that are held came: a histogram."""
    return _drawn(buffer, path, _ages)


def sizes(buffer: DataBuffer, path: Path = None) -> Any:
    """Draw how many rows each group holds. SchemaError for samples without groups."""
    return _drawn(buffer, path, _sizes)


def images(buffer: DataBuffer, n: int = 25, path: Path = None) -> Any:
    """Draw n samples, evenly spread over the rows, with their labels.

    A sample, or its first element, is an image: (h, w), (h, w, c) or (c, h, w) with 1, 3 or 4
    channels.
    """
    n = integer("n", n, 1, 10_000) or 1
    _require_samples(buffer)
    chosen = np.unique(np.linspace(0, len(buffer) - 1, min(n, len(buffer))).astype(int))
    columns = int(np.ceil(np.sqrt(len(chosen))))
    rows = -(-len(chosen) // columns)
    figure = new_figure(1.1 * columns, 1.25 * rows)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, i in zip(figure.axes, chosen.tolist(), strict=False):
        sample = buffer[i][0] if buffer.with_metadata else buffer[i]
        pair = isinstance(sample, (tuple, list))
        axes.imshow(_image(sample[0] if pair else sample), cmap="gray")
        if pair and len(sample) > 1 and np.asarray(sample[1]).ndim == 0:
            axes.set_title(str(np.asarray(sample[1]).item()), fontsize=8)
    return saved(figure, path)


def overview(buffer: DataBuffer, path: Path = None) -> Any:
    """Draw composition, ages, and sizes of groups where there are any, side by side."""
    parts = [_composition, _ages, *([_sizes] if sizes_of(buffer) else [])]
    return _drawn(buffer, path, *parts)


def _drawn(buffer: DataBuffer, path: Path, *parts: Callable[[Any, DataBuffer], None]) -> Any:
    _require_samples(buffer)
    figure = new_figure(5 * len(parts), 3.2)
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False).flat, parts, strict=True):
        part(axes, buffer)
        axes.spines[["top", "right"]].set_visible(False)
    return saved(figure, path)


def _require_samples(buffer: DataBuffer) -> None:
    if not isinstance(buffer, DataBuffer):
        raise ArgumentError(f"buffer must be one of leanreplay's buffers, got {buffer!r:.200}")
    if not len(buffer):
        raise ArgumentError("the buffer is empty, so there is nothing to draw; add samples first")


def _positions(buffer: DataBuffer) -> Array:
    """Return where in their stream the samples stood."""
    return buffer.get_metadata("position") & ((1 << STREAM_BITS) - 1)


def ages_of(buffer: DataBuffer) -> Array:
    """Return how many samples ago those that are held came, (len,) int64."""
    return buffer.seen - 1 - _positions(buffer)


def sizes_of(buffer: DataBuffer) -> dict[int, int]:
    """Return `buffer.group_sizes()`; nothing where samples have no groups."""
    try:
        return buffer.group_sizes()
    except LeanReplayError:
        return {}


def _composition(axes: Any, buffer: DataBuffer) -> None:
    positions, groups = _positions(buffer), buffer.get_metadata("group") if sizes_of(buffer) else None
    names = [] if groups is None else np.unique(groups).tolist()
    split = 1 < len(names) <= MOST_GROUPS
    parts = [positions[groups == name] for name in names] if split else [positions]
    axes.hist(parts, bins=min(BINS, buffer.seen), range=(0, buffer.seen), stacked=True, label=names if split else None)
    axes.set(xlabel="position in the stream", ylabel="rows", title=f"{len(positions):,} held of {buffer.seen:,} seen")
    if split:
        axes.legend(fontsize=6, ncols=2, title="group", title_fontsize=7)


def _ages(axes: Any, buffer: DataBuffer) -> None:
    axes.hist(ages_of(buffer), bins=min(BINS, buffer.seen), color="#00796b")
    axes.set(xlabel="samples ago", ylabel="rows", title="ages")


def _sizes(axes: Any, buffer: DataBuffer) -> None:
    found = sorted(buffer.group_sizes().items())
    axes.bar(range(len(found)), [size for _, size in found], color="#00796b")
    if len(found) <= MOST_GROUPS:
        axes.set_xticks(range(len(found)), [str(name) for name, _ in found])
    axes.set(xlabel="group", ylabel="rows", title=f"{len(found):,} groups")


def _image(value: object) -> Array:
    array = np.asarray(value)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)) or array.dtype.kind not in "iufb":
        raise ArgumentError(
            f"images draws samples that are images, (h, w), (h, w, c) or (c, h, w); here one is {array.dtype}{list(array.shape)}"
        )
    if array.dtype == np.uint8 or array.ndim == 2:
        return array
    low, high = float(array.min()), float(array.max())
    return (array - low) / ((high - low) or 1.0)
