"""Checks of arguments: each returns the argument as the library uses it, or raises ArgumentError.

A message says what came, what was expected, and the way out.
Tensors are recognised without importing torch.
"""

from __future__ import annotations

import difflib
import inspect
import operator
import os
import sys
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import numpy as np

from .arrays import Ints
from .errors import ArgumentError, LeanReplayError, SchemaError

LARGEST = sys.float_info.max  # of finite numbers


def integer(name: str, value: Any, low: int, high: int) -> int | None:
    """Return an integer from `low` to `high`, or None for None. A bool is no integer here."""
    return None if value is None else required(name, value, low, high)


def required(name: str, value: Any, low: int, high: int) -> int:
    """Return an integer from `low` to `high`. None is an error."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ArgumentError(f"{name} must be an integer, got {value!r:.200}") from None
    if not low <= number <= high:
        raise ArgumentError(f"{name} must be from {low} to {high}, got {number}")
    return number


def number(name: str, value: Any, low: float = 0.0, high: float = LARGEST, wanted: str = "") -> float:
    """Return a number from `low` to `high` as a float. wanted: what it must be, for the message."""
    real: Any = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not low <= value <= high:
        least = f"a finite number of at least {low:g}"
        wanted = wanted or (least if high == LARGEST else f"a number from {low:g} to {high:g}")
        raise ArgumentError(f"{name} must be {wanted}, got {value!r:.200}")
    return float(value)


def fraction(name: str, value: Any) -> float:
    """Return a number from 0 to 1 as a float."""
    return number(name, value, 0.0, 1.0, "from 0 to 1")


def choice(name: str, value: Any, choices: Iterable[Any], hint: str = "") -> Any:
    """Return `value` if it is one of `choices`: an equal string, or that same True, False, None."""
    if not any(value is c or (isinstance(value, str) and value == c) for c in choices):
        raise ArgumentError(f"{name} is one of {choices}, got {value!r:.200}{hint}")
    return value


def function_or_none(name: str, value: Any, wanted: str = "a function or None") -> Any:
    """Return `value` if it can be called, or is None. wanted: what it must be, for the message."""
    return None if value is None else required_function(name, value, wanted)


def required_function(name: str, value: Any, wanted: str = "a function") -> Any:
    """Return `value` if it can be called. None is an error."""
    if not callable(value):
        raise ArgumentError(f"{name} must be {wanted}, got {value!r:.200}")
    return value


def instance(value: Any, kind: type | tuple[type, ...], rule: str) -> None:
    """Raise ArgumentError unless `value` is of a class. rule: the first half of the message."""
    if not isinstance(value, kind):
        raise ArgumentError(f"{rule}, got {type(value).__name__}")


def as_path(path: Any, name: str = "path") -> str:
    """Return a path as str."""
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise ArgumentError(f"{name} must be a str or os.PathLike, got {path!r:.200}") from None
    if not text or "\0" in text:
        raise ArgumentError(f"{name} {text!r} cannot name a file; give a non-empty one without NUL characters")
    return text


def length(value: Any) -> int:
    """Return len(value), or -1 for a value without a length (or with a negative or huge one)."""
    try:
        return len(value)
    except (TypeError, ValueError, OverflowError):
        return -1


def call(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a user's function returns. Its StopIteration becomes an ArgumentError."""
    try:
        return function(*arguments)
    except StopIteration as error:  # which would end the caller's loop silently
        raise ArgumentError(f"{what} raised StopIteration: an iterator that it reads from has come to its end") from error


def check_call(cls: type, base: type, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Raise ArgumentError for arguments that `cls`, a class of this package, does not take.

    base: the class whose arguments the `**options` of `cls` are.
    """
    maker = next(c for c in cls.__mro__ if "__init__" in vars(c))
    if not maker.__module__.startswith("leanreplay."):
        return  # a user's own class checks its arguments itself
    own = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    kinds = [p.kind for p in own.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return
    name = cls.__name__
    places = [p for p in own if own[p].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD][1:]
    takes = [p for p in own if p not in ("self", "options", *places)]
    if inspect.Parameter.VAR_KEYWORD in kinds:
        more = inspect.signature(base.__init__).parameters  # type: ignore[misc]
        takes += [p for p in more if p not in ("self", *places, *takes)]
    if len(args) > len(places):
        raise ArgumentError(
            f"{name} takes only {' and '.join(places)} by position, got {len(args)} values: {args!r:.200}; "
            f"give the others by name: {', '.join(takes)}"
        )
    for option in options:
        if option not in (*places, *takes):
            near = difflib.get_close_matches(option, [*places, *takes], 1)
            raise ArgumentError(
                f"{name} takes no {option!r}{f'; did you mean {near[0]!r}?' if near else ''}; it takes: {', '.join([*places, *takes])}"
            )


def is_tensor(value: Any) -> bool:
    """Whether this is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def plain_array(values: Any, name: str, wrong: type[LeanReplayError] = SchemaError) -> np.ndarray[Any, Any]:
    """Return numbers (list, array, tensor on any device) as an array. Raises `wrong` otherwise."""
    if isinstance(values, np.ma.MaskedArray):
        raise wrong(f"{name}: a masked array has no values where it is masked; use .filled(value), or leave those samples out")
    try:
        if not is_tensor(values):
            return np.asarray(values)
        values = values.detach().cpu()
        if values.is_floating_point() and str(values.dtype).startswith(("torch.bfloat", "torch.float8")):
            values = values.float()  # NumPy has no such dtype; float32 holds all their values
        return values.resolve_neg().numpy()
    except Exception as error:  # whatever an object's own __array__ raises
        raise wrong(f"{name}: {type(values).__name__} cannot become an array: {error}") from error


def integers(values: Any, n: int, name: str) -> Ints:
    """Return n integers, (n,) or (n, 1), or one integer n times, as int64. Raises SchemaError for
    anything else."""
    if type(values) is int and -(2**63) <= values < 2**63:
        return np.full(n, values, np.int64)
    if type(values) is np.ndarray and values.dtype == np.int64 and values.shape == (n,):
        return values
    array = plain_array(values, name)
    if array.shape == (n, 1):
        array = array[:, 0]
    if array.shape != (n,) or (array.dtype.kind not in "iub" and n):
        raise SchemaError(f"{name}: expected {n} integers, got {array.dtype} of shape {array.shape}")
    if array.dtype == np.uint64 and n and array.max() >= 2**63:
        raise SchemaError(f"{name}: {array.max()} does not fit into int64")
    return array.astype(np.int64)
