"""Which state a run of `fit` goes on from, and how everything is brought to it."""

from __future__ import annotations

import os
import random
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ...errors import ExistsError, MissingError, StateError
from ..learners import ReplayLearner
from .settings import Settings, TaskId
from .states import StateFolder

# What a state holds besides a position.
_KINDS = {"format": int, "settings": dict, "learner": dict, "model": dict, "optimizer": dict, "random": dict}

# The state that each learner wrote or loaded last: its folder and number.
_latest: weakref.WeakKeyDictionary[ReplayLearner, tuple[str, int]] = weakref.WeakKeyDictionary()


@dataclass
class Position:
    """Where a run is: the part of a state that is of the run alone.

    epoch, step: which comes next. sums: of each loss in this epoch its sum over samples, and their
    number. best: the weights of the best epoch, if they are to be put back. records: see `History`.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    stopped_early: bool = False
    finished: bool = False


def saved_task(folder: str | os.PathLike[str]) -> TaskId:
    """Return the task of the state in a folder that `fit` wrote, begun or finished; None without a
    state.

    Under torchrun all ranks must call it. With it, a run of several tasks that was killed at any
    time is simply started again (tasks being numbers):

        for task in range(saved_task("run") or 0, 5):
            fit(learner, datasets[task], task_id=task, input_state_folder="run", output_state_folder="run")
    """
    states = StateFolder(folder)
    number = states.newest()
    return None if number is None else _load(states, number)["task_id"]


def find_state(settings: Settings) -> tuple[dict[str, Any], int] | None:
    """Return the state to go on from and its number; None to begin with the learner as it is.

    Raises ExistsError, MissingError or StateError if it is not clear where to begin.
    """
    learner, task_id, states, output = settings.learner, settings.task_id, settings.input, settings.output
    same = states is not None and output is not None and states.real_path == output.real_path
    if output is not None and not same:
        number = output.newest()
        if number is not None and not _is_latest(learner, output, number):
            raise ExistsError(
                f"{output.folder} holds a state already, which would be lost; give it as input_state_folder to go on from it, or remove it"
            )
    if states is None:
        return None
    number = states.newest()
    if number is None:
        if same:
            return None
        raise MissingError(f"{states.folder} holds no state of fit; only where it is output_state_folder, too, may that be")
    state, own = _load(states, number), _is_latest(learner, states, number)
    if state["task_id"] == task_id and state["finished"] and own:
        raise StateError(f"this learner has just finished task_id={task_id!r}; give each task a task_id of its own")
    if state["task_id"] != task_id and not state["finished"]:
        raise StateError(
            f"{states.folder} holds a state in the middle of task_id={state['task_id']!r} (epoch {state['epoch']}, step {state['step']}), "
            f"but this is task_id={task_id!r}; finish that task first (saved_task says which it is)"
        )
    return None if state["task_id"] != task_id and own else (state, number)


def resume(settings: Settings) -> Position | None:
    """Bring learner, optimizer and scheduler to the state to go on from, if any.

    Returns where the run is; None if its task begins.
    """
    found = find_state(settings)
    if found is None or settings.input is None:
        return None
    state, number = found
    begun = state["task_id"] == settings.task_id
    mine, parts = settings.fingerprint(), settings.parts
    if not begun:  # scheduler, scaler and the other settings of another task are over
        mine = {"optimizer": mine["optimizer"]}
        parts = {name: part for name, part in parts.items() if name in ("model", "optimizer")}
    theirs = state["settings"]
    differing = [f"{name}={value!r} (state: {theirs.get(name)!r})" for name, value in mine.items() if theirs.get(name) != value]
    if differing:
        raise StateError(f"the state is of a run with other settings: {', '.join(differing)}; give the same, or begin anew")
    _restore(settings, parts, state, settings.input, number)
    remember(settings.learner, settings.input, number)
    return Position(**{name: state[name] for name in vars(Position())}) if begun else None


def state_of(settings: Settings, position: Position) -> dict[str, Any]:
    """Everything that a state holds."""
    return {
        "format": 1,
        "settings": settings.fingerprint(),
        "task_id": settings.task_id,
        **vars(position),
        "learner": settings.learner.state_dict(),
        "val_memory": settings.buffers["val_memory"].state_dict() if "val_memory" in settings.buffers else None,
        "random": _random_states(settings.device),
        **{name: part.state_dict() for name, part in settings.parts.items()},
    }


def remember(learner: ReplayLearner, folder: StateFolder, number: int) -> None:
    """Note that this learner wrote or loaded a state."""
    _latest[learner] = folder.real_path, number


def _is_latest(learner: ReplayLearner, folder: StateFolder, number: int) -> bool:
    return _latest.get(learner) == (folder.real_path, number)


def _load(states: StateFolder, number: int) -> dict[str, Any]:
    """Load a state, and check that it looks like one of `fit`."""
    state = states.load(number)
    kinds = _KINDS | {name: type(value) for name, value in vars(Position()).items()}
    wrong = [k for k, kind in kinds.items() if not isinstance(state, dict) or not isinstance(state.get(k), kind)]
    if wrong or "task_id" not in state:
        raise StateError(f"{states.folder}: state {number} was not written by fit: no {(wrong or ['task_id'])[0]} in it")
    if state["format"] != 1:
        raise StateError(f"{states.folder}: a state of format {state['format']}, but this release reads 1; upgrade leanreplay")
    return state


def _restore(settings: Settings, parts: Mapping[str, Any], state: Mapping[str, Any], states: StateFolder, number: int) -> None:
    """Bring everything to a state. states, number: where it is from.

    Raises StateError for a state that does not fit, mostly before anything has changed.
    """
    mine, theirs = ({k: getattr(v, "shape", None) for k, v in m.items()} for m in (parts["model"].state_dict(), state["model"]))
    if mine != theirs:
        name = next(k for k in [*mine, *theirs] if mine.get(k) != theirs.get(k) or k not in mine or k not in theirs)
        raise StateError(
            f"the state is of another model: {name} has shape {theirs.get(name)} there and {mine.get(name)} here; make the model alike"
        )
    for name, buffer in settings.buffers.items():
        owner, own = (settings.learner, state["learner"]) if name == "buffer" else (buffer, state.get(name))
        if own is None:  # of a task that was trained without this buffer
            continue
        try:
            owner.load_state_dict(own)
        except StateError:
            copy = states.buffer_copy(number, name)
            if not os.path.isdir(copy):
                raise
            buffer.load(copy)
            owner.load_state_dict(own)
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise StateError(f"the state does not fit the {name} {type(part).__name__}: {error}") from error
    _set_random_states(state["random"], settings.device)


def _random_states(device: torch.device) -> dict[str, Any]:
    """The states of all global generators: `fit` uses none, but transforms and dropout may."""
    kind, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    kind, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
