"""Types of arrays that many rooms use, and the empty ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
BytesLike = bytes | memoryview | Bytes | Ints
Words = npt.NDArray[np.uint64]

NO_ROWS: Ints = np.zeros(0, np.int64)
NO_LOG: Ints = np.zeros((0, 2), np.int64)

POLICY_WORDS = 8  # integers that a policy may keep in a buffer's state
