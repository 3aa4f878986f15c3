"""What a run of `fit` saw."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ...errors import ArgumentError
from .settings import TaskId


@dataclass
class History:
    """What `fit` saw, epoch by epoch. `history["loss"]` is one quantity over the epochs.

    records: a dict for each epoch: "epoch" (from 0), "lr" (of the first parameter group, at the
    epoch's end), "loss" and "loss/<term>" (means over the new samples, of the losses before each
    step) and "<metric>" of `train_metrics`, and with a validation set "val_loss" and "val_<metric>". monitor, mode: the quantity that
    early stopping looks at, if any. stopped_early: whether training ended before `max_epochs`.
    """

    task_id: TaskId = None
    records: list[dict[str, Any]] = field(default_factory=list)
    monitor: str | None = None
    mode: str = "min"
    stopped_early: bool = False

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, name: str) -> list[Any]:
        if not any(name in record for record in self.records):
            raise ArgumentError(
                f"no {name!r} in this history; it has {', '.join(sorted({k for r in self.records for k in r})) or 'no epochs'}"
            )
        return [record.get(name, math.nan) for record in self.records]

    @property
    def best_epoch(self) -> int | None:
        """The first epoch with the best value of the monitored quantity; None without one. NaN is
        never best."""
        if self.monitor is None:
            return None
        sign = 1 if self.mode == "min" else -1
        values = [(sign * record.get(self.monitor, math.nan), epoch) for epoch, record in enumerate(self.records)]
        return min((v for v in values if not math.isnan(v[0])), default=(0, None))[1]

    @property
    def best(self) -> float | None:
        """The best value of the monitored quantity."""
        epoch = self.best_epoch
        return None if epoch is None or self.monitor is None else self.records[epoch][self.monitor]
