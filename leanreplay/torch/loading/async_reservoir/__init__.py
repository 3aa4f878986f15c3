"""Slow loading in background workers, while training iterates over what is loaded.

`reservoir` has the epochs, `source` what to load, `pool` the workers as the caller sees them,
`worker` what runs in them, and `entries` what is loaded.
"""

from .reservoir import AsyncReservoir

__all__ = ["AsyncReservoir"]
