"""What loaders and samplers check of a state that they are to go on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...errors import StateError


def is_count(value: Any) -> bool:
    """Whether a value is an int that can count batches, jobs or epochs."""
    return type(value) is int and value >= 0


def check_state(state: Any, owner: str, fields: Mapping[str, Callable[[Any], bool]], settings: Mapping[str, Any]) -> None:
    """Raise StateError unless this is a state of an `owner` with the same settings.

    fields: what a state holds beside `format` and `of` (the settings of its owner), and which
    values are right.
    """
    right = isinstance(state, Mapping) and state.get("format") == 1 and isinstance(state.get("of"), Mapping)
    if not right or not all(key in state and holds(state[key]) for key, holds in fields.items()):
        raise StateError(f"not a state of {owner}: expected a dict with format 1, of, {', '.join(fields)}, got {state!r:.200}")
    found = state["of"]
    wrong = [f"{key}: {found.get(key)!r}, here {value!r}" for key, value in settings.items() if found.get(key) != value]
    if wrong:
        raise StateError(
            f"the state is of another {owner.rsplit(maxsplit=1)[-1]} ({'; '.join(wrong)}); make this one with the same arguments"
        )
