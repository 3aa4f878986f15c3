"""The numbers that tasks have in an ExperienceBalancedBuffer."""

from __future__ import annotations

from typing import Any

from ...buffers.balanced import ExperienceBalancedBuffer
from ...buffers.base import DataBuffer
from ...errors import ArgumentError


class Experiences:
    """Numbers tasks as experiences; for other buffers there are none.

    A task that is a number is the experience of that number. A task with another name, or without one,
    gets the next number, and a name keeps its number. now: the experience of the task that is going on.
    """

    def __init__(self, buffer: DataBuffer) -> None:
        self._buffer = buffer if isinstance(buffer, ExperienceBalancedBuffer) else None
        self.now: int | None = None
        self._named: dict[str, int] = {}

    def start(self, task: int | str | None) -> None:
        """A task begins."""
        if self._buffer is None:
            return
        number = task if isinstance(task, int) else self._named.get(task) if task is not None else None
        if number is None:  # beyond all that the buffer holds, and all that have begun and stored nothing yet
            begun = [*self._named.values(), *([] if self.now is None else [self.now])]
            number = max([int(self._buffer.experience_number(None, None, 1)), *(n + 1 for n in begun)])
            if isinstance(task, str):
                self._named[task] = number
        self.now = number

    def check(self) -> None:
        """Raise ArgumentError if the buffer needs experiences and no task has begun."""
        if self._buffer is not None and self.now is None:
            raise ArgumentError(
                f"{type(self._buffer).__name__} keeps the same number of samples of each task, but no task has begun: call "
                "on_task_start(task) before the first batch of each, as fit does"
            )

    def state(self) -> dict[str, Any]:
        """For the learner's state."""
        return {"experience": self.now, "experiences": [[name, number] for name, number in self._named.items()]}

    def load(self, state: Any) -> None:
        """Take a learner's state."""
        self.now, self._named = state["experience"], dict(state["experiences"])
