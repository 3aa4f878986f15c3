"""The torch side: buffers as Datasets, batches as tensors, learners for a training loop of your own."""

from __future__ import annotations

from .async_reservoir import AsyncReservoir
from .data import BufferDataset, sample
from .features import features
from .interleaved import InterleavedSampler, InterleavedSamplerConfig, SamplerIntervalConfig, ShuffleSampler
from .learners import (
    CLSLearner,
    Consistency,
    DERLearner,
    ERLearner,
    Forward,
    LogitMatching,
    Replay,
    ReplayLearner,
    ReplayLoss,
    Step,
    Term,
)
from .loader import MixedLoader, ReplayLoader

__all__ = [
    "AsyncReservoir",
    "BufferDataset",
    "CLSLearner",
    "Consistency",
    "DERLearner",
    "ERLearner",
    "Forward",
    "InterleavedSampler",
    "InterleavedSamplerConfig",
    "LogitMatching",
    "MixedLoader",
    "Replay",
    "ReplayLearner",
    "ReplayLoader",
    "ReplayLoss",
    "SamplerIntervalConfig",
    "ShuffleSampler",
    "Step",
    "Term",
    "features",
    "sample",
]
