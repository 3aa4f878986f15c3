"""Where all randomness comes from: 64-bit keys hashed from (purpose, seed). There is no generator
and no state."""

from __future__ import annotations

import functools
import hashlib

import numpy as np

STREAM_BITS = 48  # of a position: the stream's number stands in the bits above them
MAX_STREAM = 2**15 - 1


@functools.lru_cache(1024)
def key_pair(purpose: str, seed: int) -> tuple[np.uint64, np.uint64]:
    """Two 64-bit keys for one purpose: blake2b of the purpose and the 128-bit seed.

    >>> key_pair("reservoir", 0) == key_pair("reservoir", 0)
    True
    """
    text = seed.to_bytes(16, "little", signed=True) + purpose.encode()
    digest = hashlib.blake2b(text, digest_size=16, person=b"leanreplay").digest()
    return np.uint64(int.from_bytes(digest[:8], "little")), np.uint64(int.from_bytes(digest[8:], "little"))
