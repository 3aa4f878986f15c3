"""State folders: checkpoints of a training run that appear whole, on all ranks or on none.

A rank writes `state-<number>.rank<rank>.pt`: aside, synced, then renamed. Older states are removed
only when all ranks have the number. So there is always a state that all ranks have, and it is one
of the last two. Every buffer has that many restore points.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Mapping
from typing import Any

import torch

from ...arguments import as_path
from ...buffers.base import DataBuffer
from ...errors import StateError
from ...storage import system
from ..distributed import gather, rank_and_size


class StateFolder:
    """The states of one run, as this rank sees them. folder: made when the first state is saved."""

    def __init__(self, folder: str | os.PathLike[str], name: str = "folder") -> None:
        self.folder = as_path(folder, name)
        self.rank = rank_and_size()[0]
        self._next: int | None = None

    @property
    def real_path(self) -> str:
        """The same for all names of one folder."""
        return os.path.realpath(self.folder)

    def newest(self) -> int | None:
        """Return the number of the newest state that all ranks have; None if there is none at all.

        All ranks must call it.
        """
        everyone = gather(self._numbers())
        if not any(everyone):
            return None
        common = set(everyone[0]).intersection(*everyone[1:])
        if not common:
            raise StateError(f"{self.folder}: no state is there for all of the {len(everyone)} processes; start as many as wrote it")
        return max(common)

    def load(self, number: int) -> dict[str, Any]:
        """Load a state, its tensors on the CPU."""
        return _read(self._path(number))

    def save(self, state: Mapping[str, Any], buffers: Mapping[str, DataBuffer] | None = None) -> int:
        """Write a state, with copies of buffers, by their names, and remove older states.

        Returns its number. All ranks must call it. Raises StateError, and leaves older states, for
        a state that could not be loaded.
        """
        if self._next is None:
            self._next = 1 + max(n for numbers in gather(self._numbers()) for n in [0, *numbers])
        number = self._next
        with system.storage_errors(f"saving a state to {self.folder}"):
            os.makedirs(self.folder, exist_ok=True)
            for name, buffer in (buffers or {}).items():
                buffer.save(self.buffer_copy(number, name))
            _write(self._path(number), state)
            self._next += 1
            gather(None)  # all ranks have it
            for older in self._numbers():
                if older < number:
                    os.unlink(self._path(older))
                    for name in ("buffer", "val_memory"):
                        shutil.rmtree(self.buffer_copy(older, name), ignore_errors=True)
        return number

    def buffer_copy(self, number: int, name: str) -> str:
        """Where the copy of a buffer is that belongs to a state, if it has one."""
        return os.path.join(self.folder, f"{name}-{number}.rank{self.rank}")

    def write(self, name: str, state: Any) -> None:
        """Write another file into the folder, whole or not at all."""
        with system.storage_errors(f"writing to {self.folder}"):
            _write(os.path.join(self.folder, name), state)

    def remove(self, name: str) -> None:
        """Remove a file that may not be there."""
        with system.storage_errors(f"removing from {self.folder}"), contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.folder, name))

    def _path(self, number: int) -> str:
        return os.path.join(self.folder, f"state-{number}.rank{self.rank}.pt")

    def _numbers(self) -> list[int]:
        """The numbers of this rank's states."""
        if not os.path.isdir(self.folder):
            return []
        found = [re.fullmatch(rf"state-([0-9]{{1,18}})\.rank{self.rank}\.pt", name) for name in os.listdir(self.folder)]
        return [int(match[1]) for match in found if match]


def _write(path: str, state: Any) -> None:
    """Save a state so that a kill leaves the old file or the new one, and that `weights_only` takes
    it."""
    system.remove_temporaries(path)
    fd, temp = system.temporary(path)
    try:
        with os.fdopen(fd, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        _read(temp)
        os.replace(temp, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temp)
        raise
    system.sync_folder(path)


def _read(path: str) -> dict[str, Any]:
    with system.storage_errors(f"reading {path}"), open(path, "rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise StateError(
                f"{path} cannot be loaded with weights_only=True ({str(error).splitlines()[0]:.300}); the states of model, optimizer and "
                "scheduler must be tensors and plain values"
            ) from error
