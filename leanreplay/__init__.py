"""leanreplay: replay buffers for continual learning in one memory-mapped HDF5 file. Imports neither torch nor h5py."""

from __future__ import annotations

from .buffers.balanced import (
    BalancedBuffer,
    ClassBalancedBuffer,
    ClassBalancingReservoirBuffer,
    ExperienceBalancedBuffer,
)
from .buffers.base import DataBuffer
from .buffers.exemplars import ParametricBuffer
from .buffers.infinite import InfiniteBuffer
from .buffers.registry import open_buffer
from .buffers.scored import ScoredBuffer
from .buffers.simple import GreedyClassBalancingBuffer, ReservoirBuffer, SlidingWindowBuffer
from .buffers.weighted import WeightedReservoirBuffer
from .errors import (
    ArgumentError,
    CapacityWarning,
    CorruptionError,
    DependencyError,
    ExistsError,
    FormatError,
    GroupError,
    LeanReplayError,
    LockedError,
    LossError,
    MismatchError,
    MissingError,
    ModeError,
    RecoveryError,
    RowError,
    SchemaError,
    StateError,
    StorageError,
    VolatileStateWarning,
    WorkerError,
)
from .merge import merge
from .policies.append import AppendPolicy
from .policies.balanced import BalancedPolicy, ClassBalancingReservoirPolicy
from .policies.base import Plan, Policy
from .policies.exemplars import ParametricPolicy
from .policies.greedy import GreedyClassBalancingPolicy
from .policies.reservoir import ReservoirPolicy
from .policies.scored import ScoredPolicy
from .policies.selection import (
    ClosestToCenterSelection,
    FeatureBasedSelection,
    HerdingSelection,
    RandomSelection,
    SelectionStrategy,
)
from .policies.weighted import WeightedReservoirPolicy
from .policies.window import SlidingWindowPolicy
from .samples.leaves import Field
from .samples.schema import Schema
from .storage.store import Problem

__version__ = "0.1.0"
open = open_buffer  # an assignment: type checkers take an import that is not in __all__ for private

__all__ = [
    "AppendPolicy",
    "ArgumentError",
    "BalancedBuffer",
    "BalancedPolicy",
    "CapacityWarning",
    "ClassBalancedBuffer",
    "ClassBalancingReservoirBuffer",
    "ClassBalancingReservoirPolicy",
    "ClosestToCenterSelection",
    "CorruptionError",
    "DataBuffer",
    "DependencyError",
    "ExistsError",
    "ExperienceBalancedBuffer",
    "FeatureBasedSelection",
    "Field",
    "FormatError",
    "GreedyClassBalancingBuffer",
    "GreedyClassBalancingPolicy",
    "GroupError",
    "HerdingSelection",
    "InfiniteBuffer",
    "LeanReplayError",
    "LockedError",
    "LossError",
    "MismatchError",
    "MissingError",
    "ModeError",
    "ParametricBuffer",
    "ParametricPolicy",
    "Plan",
    "Policy",
    "Problem",
    "RandomSelection",
    "RecoveryError",
    "ReservoirBuffer",
    "ReservoirPolicy",
    "RowError",
    "Schema",
    "SchemaError",
    "ScoredBuffer",
    "ScoredPolicy",
    "SelectionStrategy",
    "SlidingWindowBuffer",
    "SlidingWindowPolicy",
    "StateError",
    "StorageError",
    "VolatileStateWarning",
    "WeightedReservoirBuffer",
    "WeightedReservoirPolicy",
    "WorkerError",
    "merge",
]  # without `open`: after `from leanreplay import *` that name must still be Python's own
