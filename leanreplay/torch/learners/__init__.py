"""Learners: one file for each method. `step` is one training step; `loss` and `after_step` are the same in pieces."""

from __future__ import annotations

from .cls import CLSLearner
from .der import DERLearner
from .er import ERLearner
from .forward import Forward
from .learner import ReplayLearner, Step
from .pod import PODLearner
from .replay import Replay
from .super_er import SuperERLearner
from .term import Term
from .terms import Consistency, LogitMatching, PooledOutputDistillation, ReplayLoss, ShrinkAndPerturb

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
