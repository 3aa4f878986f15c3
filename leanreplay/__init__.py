"""leanreplay: replay buffers for continual learning in one memory-mapped HDF5 file. Imports neither torch nor h5py."""

from __future__ import annotations

from .balanced import (
    BalancedBuffer,
    BalancedPolicy,
    ClassBalancedBuffer,
    ClassBalancingReservoirBuffer,
    ClassBalancingReservoirPolicy,
    ExperienceBalancedBuffer,
)
from .buffers import (
    DataBuffer,
    GreedyClassBalancingBuffer,
    ReservoirBuffer,
    SlidingWindowBuffer,
)
from .buffers import open_buffer as open
from .errors import (
    ArgumentError,
    CapacityWarning,
    CorruptionError,
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
)
from .infinite import InfiniteBuffer
from .merge import merge
from .policies import (
    AppendPolicy,
    GreedyClassBalancingPolicy,
    Policy,
    ReservoirPolicy,
    SlidingWindowPolicy,
)
from .schema import Field, Schema
from .store import Problem
from .weighted import WeightedReservoirBuffer, WeightedReservoirPolicy

__version__ = "0.1.0"

__all__ = [
    "AppendPolicy",
    "ArgumentError",
    "BalancedBuffer",
    "BalancedPolicy",
    "CapacityWarning",
    "ClassBalancedBuffer",
    "ClassBalancingReservoirBuffer",
    "ClassBalancingReservoirPolicy",
    "CorruptionError",
    "DataBuffer",
    "ExistsError",
    "ExperienceBalancedBuffer",
    "Field",
    "FormatError",
    "GreedyClassBalancingBuffer",
    "GreedyClassBalancingPolicy",
    "GroupError",
    "InfiniteBuffer",
    "LeanReplayError",
    "LockedError",
    "LossError",
    "MismatchError",
    "MissingError",
    "ModeError",
    "Policy",
    "Problem",
    "RecoveryError",
    "ReservoirBuffer",
    "ReservoirPolicy",
    "RowError",
    "Schema",
    "SchemaError",
    "SlidingWindowBuffer",
    "SlidingWindowPolicy",
    "StateError",
    "StorageError",
    "WeightedReservoirBuffer",
    "WeightedReservoirPolicy",
    "merge",
    "open",
]
