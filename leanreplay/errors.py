"""The exceptions of leanreplay, all under `LeanReplayError`.

Each message says what came, what was expected, and the way out.
"""

from __future__ import annotations

from typing import Any


class LeanReplayError(Exception):
    """Base class of every error that leanreplay raises on purpose."""


class ArgumentError(LeanReplayError, ValueError):
    """An argument is out of range or of the wrong kind."""


class RowError(LeanReplayError, IndexError):
    """A row or index that the buffer does not hold."""


class GroupError(LeanReplayError, KeyError):
    """A group that the buffer has never seen."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


class SchemaError(LeanReplayError, ValueError):
    """A sample differs from the buffer's schema in structure, shape, dtype, length or metadata."""


class MismatchError(LeanReplayError, ValueError):
    """A parameter differs from the one in the file."""


class ExistsError(LeanReplayError, FileExistsError):
    """The file exists already and the mode does not allow that."""


class MissingError(LeanReplayError, FileNotFoundError):
    """The file does not exist; or a writer's file stands under its name no more."""


class StorageError(LeanReplayError, OSError):
    """The system refused: no space, no permission, an input/output error."""


class FormatError(LeanReplayError):
    """Not a leanreplay file, or one of another format version, cut short or inconsistent."""


class CorruptionError(LeanReplayError):
    """Stored bytes do not match their checksums."""


class RecoveryError(LeanReplayError):
    """A writer was killed in the middle of a commit, and only a writer can undo it."""


class LockedError(LeanReplayError):
    """Another writer has the file open. The message says whether it is one of this very process.

    Before that, objects of this process to which nothing else refers are collected, which closes
    them. Any other goes on, also for mode "w": `close()` it first.
    """


class ModeError(LeanReplayError):
    """Writing to a buffer that is open for reading, or using a closed one."""


class StateError(LeanReplayError, ValueError):
    """`load_state_dict` cannot bring the buffer to this state."""


class DependencyError(LeanReplayError, ImportError):
    """A package that this part of leanreplay needs is not installed."""


class LossError(LeanReplayError, ArithmeticError):
    """A loss that is not finite: going on would spoil the model."""


class WorkerError(LeanReplayError, RuntimeError):
    """A job failed in a background worker, or the worker was killed.

    sample: what the job was to load, None if that is not known.
    """

    sample: Any = None


class CapacityWarning(UserWarning):
    """`resize` cannot use the new rows, because samples were dropped (the capacity rule)."""


class VolatileStateWarning(UserWarning):
    """`state_dict` of a buffer in memory. Its samples end with this process."""
