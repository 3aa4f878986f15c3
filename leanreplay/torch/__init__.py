"""The torch side: buffers as Datasets, batches as tensors, learners for a training loop of your own."""

from __future__ import annotations

from .data import BufferDataset, sample
from .learners import ERLearner, Step

__all__ = ["BufferDataset", "ERLearner", "Step", "sample"]
