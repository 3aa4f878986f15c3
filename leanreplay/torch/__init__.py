"""The torch side: buffers as Datasets, batches as tensors, learners for a training loop of your own."""

from __future__ import annotations

from .async_reservoir import AsyncReservoir
from .data import BufferDataset, sample
from .features import features
from .interleaved import InterleavedSampler, InterleavedSamplerConfig, SamplerIntervalConfig, ShuffleSampler
from .learners import ERLearner, Step
from .loader import MixedLoader, ReplayLoader

__all__ = [
    "AsyncReservoir",
    "BufferDataset",
    "ERLearner",
    "InterleavedSampler",
    "InterleavedSamplerConfig",
    "MixedLoader",
    "ReplayLoader",
    "SamplerIntervalConfig",
    "ShuffleSampler",
    "Step",
    "features",
    "sample",
]
