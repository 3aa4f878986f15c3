"""The batches of a stream, each with a replay batch behind it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ...arguments import function_or_none, instance, required
from ...buffers.base import DataBuffer
from ...buffers.drawing import Draw
from ...errors import ArgumentError
from ..data import Function, device_named, draw_tensors, per_batch


class MixedLoader:
    """The batches of a stream, each with a replay batch behind it: (x, y, is_replay, meta).

    This is for the simplest loops. stream_loader: yields pairs (x, y) of tensors or arrays, for
    instance a DataLoader. Of each pair, x and y are followed by those of `replay_batch_size`
    samples, drawn from the buffer at that moment (fewer while it holds fewer). is_replay, (n,)
    bool, tells which samples these are, and meta is their metadata.
    balance, where, by, alpha: as for `buffer.sample`; as many samples come as can be drawn so.
    batch_transform: called with the x of both together, (n, ...). Before that, the buffer's own
    transforms get the tensors of each replayed sample. device: where the batch goes.

    The loop may change the batch. What goes into the buffer is up to the loop, after the step for
    instance, so no sample is replayed in the batch that it comes with. Draws are the buffer's own,
    so they are part of its state. Raises ArgumentError for anything but such pairs, and for samples
    of the stream and the buffer that differ in shape or dtype.

    >>> import torch
    >>> from leanreplay import ReservoirBuffer
    >>> from leanreplay.torch import MixedLoader
    >>> buffer, stream = ReservoirBuffer(100), [(torch.zeros(4, 3), torch.arange(4))] * 2
    >>> for x, y, is_replay, meta in MixedLoader(stream, buffer, 2):
    ...     print(tuple(x.shape), is_replay.tolist())
    ...     buffer.add((x[~is_replay], y[~is_replay]))
    (4, 3) [False, False, False, False]
    (6, 3) [False, False, False, False, True, True]
    """

    def __init__(
        self,
        stream_loader: Iterable[Any],
        buffer: DataBuffer,
        replay_batch_size: int,
        device: torch.device | str | None = None,
        *,
        balance: str | None = None,
        where: tuple[str, object] | None = None,
        by: str | None = None,
        alpha: float | None = None,
        batch_transform: Function | None = None,
    ) -> None:
        instance(buffer, DataBuffer, "MixedLoader takes a buffer of leanreplay")
        self.stream_loader, self.buffer, self.device = stream_loader, buffer, device_named(device)
        self.replay_batch_size = required("replay_batch_size", replay_batch_size, 1, 2**31)
        self.batch_transform = function_or_none("batch_transform", batch_transform)
        self._draw = Draw.of(False, balance, where, by, alpha)

    def __len__(self) -> int:
        return len(self.stream_loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]]:
        for item in self.stream_loader:
            x, y = self._pair(item, "the stream")
            n, meta = 0, dict[str, Any]()
            drawn = draw_tensors(self.buffer, self.replay_batch_size, self._draw, x.device, at_most=True)
            if drawn is not None:
                batch, meta = drawn
                n = len(meta["idx"])
                x_old, y_old = self._pair(batch, "the buffer")
                if x_old.shape[1:] != x.shape[1:] or y_old.shape[1:] != y.shape[1:]:
                    raise ArgumentError(
                        f"samples of the stream (x {tuple(x.shape[1:])}, y {tuple(y.shape[1:])}) and of the buffer "
                        f"(x {tuple(x_old.shape[1:])}, y {tuple(y_old.shape[1:])}) differ in shape; transform one of them"
                    )
                if x_old.dtype != x.dtype or y_old.dtype != y.dtype:  # torch would widen one
                    raise ArgumentError(
                        f"samples of the stream (x {x.dtype}, y {y.dtype}) and of the buffer (x {x_old.dtype}, y {y_old.dtype}) differ in "
                        "dtype; transform one of them"
                    )
                x, y = torch.cat([x, x_old]), torch.cat([y, y_old])
            else:
                x, y = x.clone(), y.clone()  # the loop may change them, the stream come again
            is_replay = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
            is_replay[x.shape[0] - n :] = True
            if self.batch_transform is not None:
                x = per_batch(self.batch_transform, x, "batch_transform")
            yield x, y, is_replay, meta

    def _pair(self, item: Any, where: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Make x and y of a batch tensors of equal length."""
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise ArgumentError(
                f"MixedLoader wants pairs (x, y), {where} gave a {type(item).__name__}; use ReplayLoader beside your loader"
            )
        try:
            x, y = (torch.as_tensor(part, device=self.device) for part in item)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(f"MixedLoader wants pairs of arrays or tensors, {where} gave others: {error}") from None
        if not x.ndim or not y.ndim or x.shape[0] != y.shape[0]:
            raise ArgumentError(f"{where} gave x of shape {tuple(x.shape)} and y of {tuple(y.shape)}: they must have the same length")
        return x, y
