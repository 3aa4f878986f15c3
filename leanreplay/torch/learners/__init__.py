"""Learners: one file for each method. `step` is one training step; `loss` and `after_step` are the same in pieces."""

from __future__ import annotations

from .base import ReplayLearner, Step
from .cls import CLSLearner
from .consistency import Consistency
from .der import DERLearner
from .er import ERLearner
from .pod import PODLearner
from .replay import Forward, Replay
from .super_er import SuperERLearner
from .term import Term
from .terms import LogitMatching, PooledOutputDistillation, ReplayLoss, ShrinkAndPerturb

__all__ = [
    "CLSLearner",
    "Consistency",
    "DERLearner",
    "ERLearner",
    "Forward",
    "LogitMatching",
    "PODLearner",
    "PooledOutputDistillation",
    "Replay",
    "ReplayLearner",
    "ReplayLoss",
    "ShrinkAndPerturb",
    "Step",
    "SuperERLearner",
    "Term",
]
