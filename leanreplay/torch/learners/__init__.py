"""Learners, a file for each method: `step`, or in pieces `loss` and `after_step`."""

from __future__ import annotations

from .cls import CLSLearner
from .der import DERLearner
from .er import ERLearner
from .forward import Forward, Replay
from .lars import LARSLearner
from .learner import ReplayLearner, Step
from .pod import PODLearner
from .super_er import SuperERLearner
from .term import Term
from .terms import Consistency, LogitMatching, PooledOutputDistillation, ReplayLoss, ShrinkAndPerturb

__all__ = [
    "CLSLearner",
    "Consistency",
    "DERLearner",
    "ERLearner",
    "Forward",
    "LARSLearner",
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
