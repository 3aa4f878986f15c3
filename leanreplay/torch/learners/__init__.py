"""Learners: one file for each method. `step` is one training step; `loss` and `after_step` are the same in pieces."""

from __future__ import annotations

from .base import ReplayLearner, Step
from .cls import CLSLearner
from .der import DERLearner
from .er import ERLearner
from .replay import Forward, Replay
from .terms import Consistency, LogitMatching, ReplayLoss, Term

__all__ = [
    "CLSLearner",
    "Consistency",
    "DERLearner",
    "ERLearner",
    "Forward",
    "LogitMatching",
    "Replay",
    "ReplayLearner",
    "ReplayLoss",
    "Step",
    "Term",
]
