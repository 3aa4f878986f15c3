"""The groups of a buffer as map-style datasets, live views."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from ..arrays import Ints
from ..samples.schema import Schema
from .reading import Reach, Read, View


class Grouped(Protocol):
    """What is needed of a buffer."""

    view: View
    schema: Schema | None

    def group_rows(self, group: int) -> Ints: ...
    def group_sizes(self) -> dict[int, int]: ...


class Group:
    """The samples of one group of a buffer as a map-style dataset: what `buffer[i]` gives, for the
    rows of this group at that time.

    Where the group has fewer rows by then, indices up to the largest length that this dataset told
    are answered by other rows of the group, drawn as `leanreplay.torch.BufferDataset` does, which
    takes a group too. RowError once it has none.
    """

    with_metadata = True

    def __init__(self, buffer: Grouped, group: int) -> None:
        self.buffer, self.group = buffer, group
        self._reach = Reach()
        len(self)  # GroupError for one never seen
        self.group = operator.index(group)

    @property
    def view(self) -> View:
        """What shows the rows."""
        return self.buffer.view

    @property
    def schema(self) -> Schema | None:
        """What a sample looks like."""
        return self.buffer.schema

    @property
    def rows(self) -> Ints:
        """The rows, ascending."""
        return self.buffer.group_rows(self.group)

    def __len__(self) -> int:
        return self._reach.told(int(self.rows.shape[0]))

    def __getitem__(self, index: int) -> Read:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Read]:
        return self.view.items_at(indices, self._reach.now(), group=self.group)

    def __iter__(self) -> Iterator[Read]:
        for i in range(len(self)):
            yield self[i]

    def __repr__(self) -> str:
        return f"Group({self.group}, len={len(self)})"


class Groups(Mapping[int, Group]):
    """The groups of a buffer by id, in ascending order."""

    def __init__(self, buffer: Grouped) -> None:
        self.buffer = buffer

    def __getitem__(self, group: int) -> Group:
        return Group(self.buffer, group)

    def __iter__(self) -> Iterator[int]:
        return iter(self.buffer.group_sizes())

    def __len__(self) -> int:
        return len(self.buffer.group_sizes())

    def __repr__(self) -> str:
        return f"Groups({self.buffer.group_sizes()})"
