""""""

from __future__ import annotations

from leanreplay import (
    ClosestToCenterSelection,
    HerdingSelection,
)

FEATURES = [HerdingSelection, ClosestToCenterSelection]
