"""The torch side: buffers as Datasets, batches as tensors, learners for a training loop of your own."""

from __future__ import annotations

from . import plot
from .async_reservoir import AsyncReservoir
from .data import BufferDataset, sample
from .evaluation import Evaluation, evaluate
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
from .training import History, fit, saved_task

__all__ = [
    "AsyncReservoir",
    "BufferDataset",
    "CLSLearner",
    "Consistency",
    "DERLearner",
    "ERLearner",
    "Evaluation",
    "Forward",
    "History",
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
    "evaluate",
    "features",
    "fit",
    "plot",
    "sample",
    "saved_task",
]
