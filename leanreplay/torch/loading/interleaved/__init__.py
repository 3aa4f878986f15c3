"""Training and its periodic evaluations through one DataLoader.

Read in this order: `schedule` (which batch comes when, as a closed form), `config` (the settings),
`batches` (the indices of the batches), `loading` (what the DataLoader gets), `sampler`.
"""

from .config import InterleavedSamplerConfig, SamplerIntervalConfig
from .sampler import InterleavedSampler
from .shuffle import ShuffleSampler

__all__ = ["InterleavedSampler", "InterleavedSamplerConfig", "SamplerIntervalConfig", "ShuffleSampler"]
