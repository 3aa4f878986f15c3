"""Opening a buffer with the class that its file names."""

from __future__ import annotations

import os
from typing import Any, cast

from ..arguments import as_path, choice
from ..errors import ArgumentError, MismatchError, MissingError
from ..storage.mapping import read_layout
from .base import KINDS, MODES, DataBuffer


def open_buffer(path: str | os.PathLike[str], mode: str = "r", **options: object) -> DataBuffer:
    """Open an existing buffer with the class that its file names. options: as for `DataBuffer`.

    Mode "a" is "r+": it creates nothing. A class of your own must have been imported before.

    >>> import leanreplay, numpy as np, tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "replay.h5")
    >>> with leanreplay.ReservoirBuffer(10, path) as buffer:
    ...     buffer.add(np.arange(5))
    >>> len(leanreplay.open(path))
    5
    """
    choice("mode", mode, MODES)
    if mode in ("x", "w"):
        raise ArgumentError(
            f"leanreplay.open opens existing buffers; create one with a class, for instance ReservoirBuffer(n, path, mode={mode!r})"
        )
    where = os.path.realpath(as_path(path))
    if mode == "a" and not os.path.lexists(where):
        raise MissingError(
            f"{path} does not exist, and leanreplay.open cannot tell what to create; "
            f"create it with its class, for instance ReservoirBuffer(n, path, mode='a')"
        )
    kind = "InfiniteBuffer" if os.path.isdir(where) else read_layout(where).kind
    if kind not in KINDS:
        raise unknown(where, kind)
    return KINDS[kind](path=path, mode="r+" if mode == "a" else mode, **cast("dict[str, Any]", options))


def unknown(name: str, kind: str) -> MismatchError:
    """Return the error for a file whose class is not known."""
    return MismatchError(f"{name} is a {kind}; import the module that defines this class first. Known here: {sorted(KINDS)}")
