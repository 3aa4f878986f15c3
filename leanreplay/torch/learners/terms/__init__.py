"""The terms that methods are made of, one in a file."""

from .consistency import Consistency
from .logit_matching import LogitMatching
from .pooled_outputs import PooledOutputDistillation
from .replay_loss import ReplayLoss
from .shrink import ShrinkAndPerturb

__all__ = ["Consistency", "LogitMatching", "PooledOutputDistillation", "ReplayLoss", "ShrinkAndPerturb"]
