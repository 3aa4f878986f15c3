"""The on-disk format, version 1, declared once. All numbers are little-endian.

    user block (a power of two of bytes, at least 16 KiB)
        0               preamble: magic, version, user block, length and digest of the table
        4096, 8192      two headers; the valid one with the higher sequence number counts
        12288           the table: JSON, see `Layout`
    HDF5: contiguous datasets, each at a multiple of 4096, fallocated when created
        data/...        one per field, (max_size, *shape); metadata/... likewise
        index/position  int64: stream number << 48 | index in the stream; -1 where the row is free
        index/group     int64: label or group, -1 without one; in a WeightedReservoirBuffer the bits
                        of the weight, float64
        index/checksum  uint64, (max_size, fields)
        index/log       int64, (slots, 2), in buffers whose policy keeps one. Entries are only ever
                        appended; the header says how many count. Grouped buffers: (0, g): group g
                        was seen for the first time; (1, i): the i-th group seen is full, it dropped
                        or rejected a sample and may not grow again
        journal         uint8: a seal, row numbers, undo records, then 3 words for each freed row:
                        row, position, group

The root group's attributes (class, seed, stream, leanreplay_version, format) tell people with HDF5
tools what the file is. They are written once, and never read here: the table counts.

A block (header, seal) is uint64 words, the last of which is the hash of the others, so it is valid
as a whole or not. A commit of sequence number q writes the journal (old bytes of the rows it
changes, sealed with q), the rows, then the header q. A valid journal newer than the header is
undone when a writer opens the file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ..arrays import POLICY_WORDS
from ..errors import FormatError, SchemaError
from ..keys import MAX_STREAM
from ..samples.schema import Schema

Json = dict[str, Any]  # plain values by name

# By kind of buffer: says what is impossible about a layout of this kind, which only the kind can
# know; None if nothing is.
KIND_CHECKS: dict[str, Callable[[Layout], str | None]] = {}

MAGIC = b"\x8aLRBUF\r\n"
FORMAT_VERSION = 1
PAGE = 4096
HEADERS = (PAGE, 2 * PAGE)
TABLE_AT = 3 * PAGE
_PREAMBLE = struct.Struct("<8sIIQQ32s")  # magic, version, 0, user block, table length, blake2b of these and the table

COMMIT_BYTES = 8 << 20  # of samples that are loaded for one commit, or for one piece of it
NO_LIMIT = 2**40

BUCKETS = 256  # digests: one sum of mixed checksums for the rows of each residue modulo this

# Words of a header. From H_SEEN to the checksum it is the state, which H_STATE is the hash of.
H_TAG, H_SEQ, H_TARGET, H_PREVIOUS, H_STATE, H_SEEN, H_SIZE, H_HIGH, H_LOG, H_LOG_HASH, H_POLICY = range(11)
H_DIGESTS = H_POLICY + POLICY_WORDS
HEADER_WORDS = H_DIGESTS + BUCKETS + 1

# Words of the journal's seal.
J_TAG, J_SEQ, J_PREVIOUS, J_LIVE, J_COUNT, J_FREED, J_HASH = range(7)  # live rows have records, the others were free
SEAL_WORDS = 8


def round_up(n: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-n // to) * to


@dataclass(frozen=True)
class Layout:
    """What never changes in a file: written once, as the table, and checked whenever the file is
    opened.

    columns: (fields + 3) pairs of byte offset and bytes per row: the fields, position, group,
        checksums.
    log: byte offset and number of entries of the policy's log; (0, 0) without one.
    journal: byte offset of the seal; row numbers follow it, then the undo records, then freed rows.
    journal_rows: how many records it holds, which is the most that one commit may overwrite. With a
        log, any number may be freed.
    structure: pairs of byte offset and length that hold what HDF5 itself wrote; structure_hash:
        their blake2b.
    """

    kind: str
    params: dict[str, Any]
    max_size: int
    seed: int
    stream: int
    uuid: str
    schema: Schema
    columns: tuple[tuple[int, int], ...]
    log: tuple[int, int]
    journal: int
    journal_rows: int
    file_size: int
    user_block: int
    structure: tuple[tuple[int, int], ...]
    structure_hash: str

    @functools.cached_property
    def fields(self) -> int:
        """Fields of a sample."""
        return len(self.schema.fields)

    @functools.cached_property
    def row_bytes(self) -> int:
        """Bytes of a row in all columns."""
        return sum(size for _, size in self.columns)

    @functools.cached_property
    def max_rows(self) -> int:
        """The most rows that a commit may overwrite. NO_LIMIT if the journal holds every row."""
        limit = max(1, min(self.journal_rows, COMMIT_BYTES // self.row_bytes))
        return limit if limit < self.max_size else NO_LIMIT

    @property
    def log_slots(self) -> int:
        """How many entries the policy's log has room for."""
        return self.log[1]

    @functools.cached_property
    def record_bytes(self) -> int:
        """Bytes of one undo record: a row's bytes in all columns, each padded to 8."""
        return sum(round_up(size, 8) for _, size in self.columns)

    @functools.cached_property
    def journal_rows_at(self) -> int:
        """Byte offset of the journal's row numbers."""
        return self.journal + 8 * SEAL_WORDS

    @functools.cached_property
    def records_at(self) -> int:
        """Byte offset of the journal's records."""
        return self.journal_rows_at + 8 * self.journal_rows

    @functools.cached_property
    def freed_at(self) -> int:
        """Byte offset of the journal's freed rows."""
        return self.records_at + self.journal_rows * self.record_bytes

    @functools.cached_property
    def journal_end(self) -> int:
        """One past the journal's last byte."""
        return self.freed_at + (24 * self.max_size if self.log[1] else 0)

    @functools.cached_property
    def tag(self) -> int:
        """First word of headers and seals, so that another file's do not count."""
        return int(self.uuid[:16], 16)

    def dataset_names(self) -> list[str]:
        """Names of the datasets of `columns`, in order."""
        return [f.name for f in self.schema.fields] + ["index/position", "index/group", "index/checksum"]

    @property
    def regions(self) -> list[tuple[int, int]]:
        """(start, stop) of everything that is mapped: columns, journal, log."""
        parts = [(at, at + size * self.max_size) for at, size in self.columns] + [(self.journal, self.journal_end)]
        return parts + ([(self.log[0], self.log[0] + 16 * self.log[1])] if self.log[1] else [])

    def to_json(self) -> Json:
        """The table as plain values."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"schema": self.schema.to_json()}

    def encode(self) -> bytes:
        """Preamble and table, as the bytes of [0, PAGE) and [TABLE_AT, ...): one string with the
        headers' pages zero."""
        text = json.dumps(self.to_json(), separators=(",", ":"), sort_keys=True).encode()
        preamble = _PREAMBLE.pack(MAGIC, FORMAT_VERSION, 0, self.user_block, len(text), _digest(self.user_block, text))
        return preamble.ljust(TABLE_AT, b"\0") + text


def _digest(user_block: int, text: bytes) -> bytes:
    return hashlib.blake2b(struct.pack("<IQ", FORMAT_VERSION, user_block) + text, digest_size=32).digest()


def user_block_size(table_length: int) -> int:
    """The user block that holds a table of this many bytes: a power of two, as HDF5 asks."""
    size = 4 * PAGE
    while size < TABLE_AT + table_length:
        size *= 2
    return size


def decode(read: Callable[[int, int], bytes], file_size: int, path: str) -> Layout:
    """The layout of a file, everything in it checked against the file's real size. `read(offset,
    length)` gives bytes.

    Raises FormatError: not ours, another version, cut short, or inconsistent.
    """
    if sys.byteorder != "little":
        raise FormatError(f"{path}: leanreplay files are little-endian; this machine is not")
    head = read(0, _PREAMBLE.size)
    if head[: len(MAGIC)] != MAGIC:
        what = "a plain HDF5 file" if head[:8] == b"\x89HDF\r\n\x1a\n" else "no leanreplay file"
        raise FormatError(f"{path}: {what} ({file_size} bytes); leanreplay opens only buffers that it created")
    if len(head) < _PREAMBLE.size:
        raise FormatError(f"{path}: cut short at {file_size} bytes")
    _, version, _, user_block, length, digest = _PREAMBLE.unpack(head)
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{path}: format version {version}, but this release reads {FORMAT_VERSION}; "
            + ("upgrade leanreplay" if version > FORMAT_VERSION else "the file is damaged")
        )
    if length > file_size or TABLE_AT + length > user_block or user_block > file_size:
        raise FormatError(f"{path}: cut short or damaged: table of {length}, user block of {user_block}, file of {file_size} bytes")
    text = read(TABLE_AT, length)
    if _digest(user_block, text) != digest:
        raise FormatError(f"{path}: the table's checksum does not match; restore the file from a copy")
    try:
        value = json.loads(text)
        pairs = {name: tuple((pair[0], pair[1]) for pair in value[name]) for name in ("columns", "structure")}
        log = (value["log"][0], value["log"][1])
        layout = Layout(**{**value, **pairs, "log": log, "schema": Schema.from_json(value["schema"])})
        _validate(layout, file_size, user_block)
        if layout.schema.to_json() != value["schema"]:
            raise ValueError("the schema is not written as this release writes it")
        problem = KIND_CHECKS[layout.kind](layout) if layout.kind in KIND_CHECKS else None
        if problem:
            raise ValueError(problem)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, SchemaError) as error:
        raise FormatError(f"{path}: inconsistent table: {error}") from None
    return layout


def _validate(t: Layout, file_size: int, user_block: int) -> None:
    """Raise ValueError unless every offset and count lies inside the file and nothing overlaps."""
    numbers = [t.max_size, t.stream, t.journal, t.journal_rows, t.file_size, t.user_block]
    numbers += [n for pair in [*t.columns, t.log, *t.structure] for n in pair]
    if any(type(n) is not int or not 0 <= n < 2**62 for n in numbers):
        raise ValueError("numbers out of range")
    if type(t.seed) is not int or not -(2**127) <= t.seed < 2**127 or t.stream > MAX_STREAM:
        raise ValueError(f"seed {t.seed}, stream {t.stream}")
    if not isinstance(t.kind, str) or not isinstance(t.params, dict) or not isinstance(t.structure_hash, str):
        raise ValueError("kind, params or structure hash")
    if not isinstance(t.uuid, str) or not re.fullmatch("[0-9a-f]{32}", t.uuid):
        raise ValueError(f"uuid {t.uuid!r}")
    if t.file_size > file_size:
        raise ValueError(f"the file is cut short: {file_size} bytes of {t.file_size}; restore it from a copy")
    if t.file_size % PAGE or t.user_block != user_block or t.max_size < 1:
        raise ValueError(f"file size {t.file_size}, user block {t.user_block}, max_size {t.max_size}")
    sizes = [f.nbytes for f in t.schema.fields]
    if [size for _, size in t.columns] != [*sizes, 8, 8, 8 * len(sizes)]:
        raise ValueError("columns do not match the schema")
    if t.journal_rows < 1:
        raise ValueError(f"journal of {t.journal_rows} rows")
    end = t.user_block
    for start, stop in sorted([*t.regions, *((at, at + length) for at, length in t.structure)]):
        if start < end or start % PAGE:
            raise ValueError(f"a column at {start} overlaps what ends at {end}")
        end = stop
    if end > t.file_size:
        raise ValueError(f"columns end at {end}, the file at {t.file_size}")
