"""How often a test repeats what it does at random: a few times by default, often in a nightly run.

`LEANREPLAY_NIGHTLY=1 pytest` runs everything in full, in about twice the time. Assertions are the same in both.
"""

from __future__ import annotations

import os

NIGHTLY = os.environ.get("LEANREPLAY_NIGHTLY", "") not in ("", "0")


def times(default: int, nightly: int) -> int:
    """The number of repetitions of this run."""
    return nightly if NIGHTLY else default
