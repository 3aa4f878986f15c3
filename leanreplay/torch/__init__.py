"""The torch side: buffers as Datasets, batches as tensors, learners for a training loop of your own."""

from __future__ import annotations

from .data import BufferDataset, sample
from .features import features
from .learners import ERLearner, Step
from .loader import MixedLoader, ReplayLoader

__all__ = ["BufferDataset", "ERLearner", "MixedLoader", "ReplayLoader", "Step", "features", "sample"]
