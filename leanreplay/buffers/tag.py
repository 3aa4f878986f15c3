"""What a policy knows of a sample besides its position: its tag, one int64, the column
`index/group` of the file."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..arguments import integers, plain_array
from ..arrays import Floats, Ints
from ..errors import ArgumentError, SchemaError
from ..samples.batch import Batch
from ..samples.dataset import Items
from ..samples.schema import Schema

SCORE = "score"  # the metadata field of a ScoredBuffer


class Label:
    """The tag is what was given as `group`, else the integer that is the second element of a pair,
    else -1.

    buffer: the name of its class, for errors. required: whether the policy cannot do without.
    """

    shown: ClassVar[tuple[str, ...]] = ()  # names that `show` adds to the metadata of samples
    ranked: ClassVar[str] = ""  # a metadata field, one float64 a sample: the policy sees its bits, not tags
    groups: ClassVar[str] = "class"  # what samples of one tag are; "": they are no group

    def __init__(self, buffer: str, required: bool) -> None:
        self.buffer, self.required = buffer, required

    def of_batch(self, given: object, batch: Batch, schema: Schema) -> Ints:
        """The tags of a batch, (n,)."""
        n, field = batch.n, schema.label_field
        if given is not None:
            return integers(given, n, "group")
        if field is not None:
            labels = batch.plain[field]
            return integers(batch.leaves[field] if labels is None else labels, n, schema.fields[field].name)
        if self.required:
            raise SchemaError(
                f"{self.buffer} balances over classes: give group=(n,) integers, or samples that are pairs with an integer label"
            )
        return np.full(n, -1, np.int64)

    def of_dataset(self, given: object, items: Items, skip: int) -> Ints | None:
        """The tags of all items; None if each is found when its item is read. The first `skip` are
        not looked at."""
        return items.groups(given, self.required, skip)

    def show(self, tags: Ints) -> dict[str, npt.NDArray[Any]]:
        """What the metadata of samples says of their tags, by the names in `shown`."""
        return {}


class Experience(Label):
    """The tag is the number of an experience, given as `group`."""

    groups = "experience"


class Weight(Label):
    """The tag is the bits of a weight, float64."""

    shown = ("weight",)
    groups = ""

    def of_batch(self, given: object, batch: Batch, schema: Schema) -> Ints:
        return checked_weights(given, batch.n)

    def of_dataset(self, given: object, items: Items, skip: int) -> Ints:
        return checked_weights(given, items.n)

    def show(self, tags: Ints) -> dict[str, npt.NDArray[Any]]:
        return {"weight": tags.view(np.float64)}


class Score(Label):
    """The tag is a label. The policy sees the bits of the scores, which are metadata."""

    ranked = SCORE


def checked_weights(weights: object, n: int) -> Ints:
    """The bits of n weights, a copy. SchemaError for anything but n numbers, ArgumentError for a
    negative or non-finite one."""
    if weights is None:
        raise ArgumentError("a weighted reservoir needs weights=(n,) numbers with every batch; use ReservoirBuffer for equal ones")
    return _real_numbers("weights", weights, n, 0.0, "finite and not negative; 0 never stays").view(np.int64)


def checked_scores(scores: object, n: int | None = None) -> Floats:
    """n scores, a copy; None: however many come. SchemaError for anything but n numbers,
    ArgumentError for a non-finite one."""
    if scores is None:
        raise ArgumentError("a ScoredBuffer needs scores=(n,) numbers with every batch; give equal ones where nothing is known yet")
    return _real_numbers("scores", scores, n, -np.inf, "finite")


def _real_numbers(name: str, values: object, n: int | None, low: float, wanted: str) -> Floats:
    """The values as float64, a copy. Raises the errors of their checks, which name the first wrong
    one."""
    array = plain_array(values, name)
    if array.ndim != 1 or array.shape[0] != (array.shape[0] if n is None else n) or (array.dtype.kind not in "iufb" and array.size):
        raise SchemaError(f"{name}: expected {'(n,)' if n is None else n} real numbers, got {array.dtype} of shape {array.shape}")
    with np.errstate(over="ignore"):  # of a longdouble: it is then infinite, which is refused
        found = array.astype(np.float64)
    wrong = np.flatnonzero(~((found >= low) & (np.abs(found) < np.inf)))
    if wrong.shape[0]:
        i = int(wrong[0])
        raise ArgumentError(f"{name}[{i}] is {found[i]} ({wrong.shape[0]} of {found.shape[0]} are wrong): {name} must be {wanted}")
    return found
