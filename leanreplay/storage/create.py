"""The bytes of a new file: the HDF5 structure, which h5py writes into memory, and the table."""

from __future__ import annotations

import contextlib
import hashlib
import io
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import BytesLike
from ..errors import ArgumentError
from ..samples.schema import Schema
from .layout import FORMAT_VERSION, PAGE, TABLE_AT, Json, Layout, round_up, user_block_size

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


JOURNAL_BYTES = 8 << 20
_END, _CACHED = slice(40, 48), slice(72, 96)  # where in a superblock the end of the file stands, and what it caches of the root group


class _Sparse(io.RawIOBase):
    """A file in memory that keeps only the pages written to: 28 GB take milliseconds."""

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}
        self.at = 0
        self.end = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.end)[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def truncate(self, size: int | None = None) -> int:
        self.end = self.at if size is None else size
        return self.end

    def _spans(self, n: int) -> list[tuple[int, int, int]]:
        spans, at = [], self.at
        while at < self.at + n:
            stop = min(self.at + n, (at // PAGE + 1) * PAGE)
            spans.append((at // PAGE, at % PAGE, stop - at))
            at = stop
        return spans

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        done = 0
        for page, start, n in self._spans(len(view)):
            view[done : done + n] = self.pages.get(page, bytes(PAGE))[start : start + n]
            done += n
        self.at += done
        return done

    def write(self, data: ReadableBuffer) -> int:
        view = memoryview(data).cast("B")
        done = 0
        for page, start, n in self._spans(len(view)):
            self.pages.setdefault(page, bytearray(PAGE))[start : start + n] = view[done : done + n]
            done += n
        self.at += done
        self.end = max(self.end, self.at)
        return done


def plan_file(
    kind: str,
    params: Json,
    max_size: int,
    seed: int,
    stream: int,
    schema: Schema,
    identity: str | None = None,
    slots: int = 0,
    journal_rows: int | None = None,
) -> tuple[Layout, list[tuple[int, bytes]]]:
    """The layout of a new file, and the (offset, bytes) to write into zeros of `layout.file_size`
    to make it.

    slots: entries of the policy's log. journal_rows: rows that one commit may overwrite, by default
        what `JOURNAL_BYTES` hold.
    """
    fields = schema.fields
    record = sum(round_up(f.nbytes, 8) for f in fields) + 16 + 8 * len(fields)
    if max_size * record >= 2**60:
        raise ArgumentError(f"{max_size} rows of {record} bytes are more than a file can hold; lower max_size")
    layout = Layout(
        kind=kind,
        params=params,
        max_size=max_size,
        seed=seed,
        stream=stream,
        uuid=identity or uuid.uuid4().hex,
        schema=schema,
        columns=(*((0, f.nbytes) for f in fields), (0, 8), (0, 8), (0, 8 * len(fields))),
        log=(0, slots),
        journal=0,
        journal_rows=journal_rows or min(max_size, max(4, JOURNAL_BYTES // record)),
        file_size=0,
        user_block=0,
        structure=(),
        structure_hash="",
    )
    spare = 8192 + 100 * len(fields)  # for the offsets, which are known only once HDF5 has placed them
    layout = replace(layout, user_block=user_block_size(len(layout.encode()) - TABLE_AT + spare))
    memory = _Sparse()
    with _ctrl_c_later():
        offsets = _write_structure(memory, layout)
    layout = replace(
        layout,
        columns=tuple((at, size) for at, (_, size) in zip(offsets, layout.columns, strict=False)),
        journal=offsets[len(layout.columns)],
        log=(offsets[-1], slots) if slots else (0, 0),
        # A byte that HDF5 gives to nothing stands at the end: what HDF5 tools free before it never
        # makes the file shorter.
        file_size=round_up(memory.end + 1, PAGE),
    )
    _finish_superblock(memory, layout)
    pieces: list[tuple[int, bytes]] = []
    for page in sorted(memory.pages):
        if page * PAGE >= layout.user_block:
            if pieces and pieces[-1][0] + len(pieces[-1][1]) == page * PAGE:
                pieces[-1] = (pieces[-1][0], pieces[-1][1] + bytes(memory.pages[page]))
            else:
                pieces.append((page * PAGE, bytes(memory.pages[page])))
    for at, data in pieces:
        if any(at < stop and start < at + len(data) for start, stop in layout.regions):
            raise AssertionError("HDF5 placed its structure inside a page of data")
    layout = replace(layout, structure=tuple((at, len(data)) for at, data in pieces))
    layout = replace(layout, structure_hash=hash_structure(lambda at, n: dict(pieces)[at], layout))
    # Positions start as -1: those are the only column bytes of a new file that are not zero.
    # `Writer.create` writes them.
    return layout, [*pieces, (0, layout.encode())]


def _finish_superblock(memory: _Sparse, layout: Layout) -> None:
    """Make HDF5's superblock the one that HDF5 itself leaves when it opens the file for writing,
    changes nothing, and closes it.

    HDF5 then cuts the file to where it thinks it ends, so that must be where the table says; and it
    forgets what the superblock caches of the root group. The superblock of version 0 has no
    checksum; the end of the file in it is an absolute address.
    """
    memory.seek(layout.user_block)
    block = bytearray(_CACHED.stop)
    memory.readinto(block)
    if block[:9] != b"\x89HDF\r\n\x1a\n\0" or block[_END] != memory.end.to_bytes(8, "little"):
        raise AssertionError("HDF5 wrote another superblock than one of version 0")
    block[_END] = layout.file_size.to_bytes(8, "little")
    block[_CACHED] = bytes(24)
    memory.seek(layout.user_block)
    memory.write(block)


def hash_structure(read: Callable[[int, int], BytesLike], layout: Layout) -> str:
    """Hash of what HDF5 wrote. `check` compares it before it lets HDF5 near the file."""
    h = hashlib.blake2b(digest_size=16)
    for at, n in layout.structure:
        h.update(read(at, n))  # type: ignore[arg-type]  # likewise
    return h.hexdigest()


@contextlib.contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Let Ctrl-C wait for the end of a block, in which HDF5 calls Python: there a KeyboardInterrupt
    would become another error of HDF5's, such as AttributeError."""
    before, came = signal.getsignal(signal.SIGINT), []
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield  # no KeyboardInterrupt comes
        return
    try:
        signal.signal(signal.SIGINT, lambda *now: came.append(now))
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(*came[0])


def _attributes(layout: Layout) -> Json:
    """What the file says of itself to HDF5 tools. The library does not read it."""
    return {
        "class": layout.kind,
        "seed": layout.seed if -(2**63) <= layout.seed < 2**63 else str(layout.seed),
        "stream": layout.stream,
        "leanreplay_version": sys.modules["leanreplay"].__version__,
        "format": f"version {FORMAT_VERSION}, described in leanreplay/storage/layout.py; a row is live if its index/position is not -1",
    }


def _write_structure(memory: _Sparse, layout: Layout) -> list[int]:
    """Let h5py write the structure. Returns byte offsets of all columns, the journal, the log."""
    import h5py

    n = layout.max_size
    wanted: list[tuple[str, tuple[int, ...], Any]] = [(f.name, (n, *f.shape), f.dtype) for f in layout.schema.fields]
    wanted += [("index/position", (n,), np.int64), ("index/group", (n,), np.int64)]
    journal_bytes = layout.journal_end - layout.journal
    wanted += [("index/checksum", (n, len(layout.schema.fields)), np.uint64), ("journal", (journal_bytes,), np.uint8)]
    if layout.log[1]:
        wanted.append(("index/log", (layout.log[1], 2), np.int64))
    with h5py.File(memory, "w", userblock_size=layout.user_block, alignment_threshold=1, alignment_interval=PAGE) as file:
        file.attrs.update(_attributes(layout))
        offsets = []
        create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        create.set_layout(h5py.h5d.CONTIGUOUS)
        create.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        create.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        create.set_obj_track_times(False)
        links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        links.set_create_intermediate_group(True)
        links.set_char_encoding(h5py.h5t.CSET_UTF8)
        for name, shape, dtype in wanted:
            space = h5py.h5s.create_simple(shape)
            kind = h5py.h5t.py_create(np.dtype(dtype), logical=True)
            dataset = h5py.h5d.create(file.id, name.encode(), kind, space, create, links)
            offsets.append(int(dataset.get_offset()))
    return offsets
