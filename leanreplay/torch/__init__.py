"""The torch side: buffers as Datasets, batches as tensors, learners for a training loop of your own."""

from __future__ import annotations

from ..errors import DependencyError as _DependencyError

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise _DependencyError(
        f"leanreplay.torch needs PyTorch, which cannot be imported ({error}): pip install torch; all else in leanreplay works without it"
    ) from error

from . import plot
from .data import BufferDataset, sample
from .features import features
from .learners import (
    CLSLearner,
    Consistency,
    DERLearner,
    ERLearner,
    Forward,
    LARSLearner,
    LogitMatching,
    PODLearner,
    PooledOutputDistillation,
    Replay,
    ReplayLearner,
    ReplayLoss,
    ShrinkAndPerturb,
    Step,
    SuperERLearner,
    Term,
)
from .loading.async_reservoir import AsyncReservoir
from .loading.interleaved import InterleavedSampler, InterleavedSamplerConfig, SamplerIntervalConfig, ShuffleSampler
from .loading.mixed_loader import MixedLoader
from .loading.replay_loader import ReplayLoader
from .training.evaluation import Evaluation, evaluate
from .training.fit import fit
from .training.history import History
from .training.resume import saved_task

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
    "LARSLearner",
    "LogitMatching",
    "MixedLoader",
    "PODLearner",
    "PooledOutputDistillation",
    "Replay",
    "ReplayLearner",
    "ReplayLoader",
    "ReplayLoss",
    "SamplerIntervalConfig",
    "ShrinkAndPerturb",
    "ShuffleSampler",
    "Step",
    "SuperERLearner",
    "Term",
    "evaluate",
    "features",
    "fit",
    "plot",
    "sample",
    "saved_task",
]
