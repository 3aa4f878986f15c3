"""Kernels on what rows were before a commit: undo records, and the three words of a freed row.

The undo record of a row is its bytes in all columns, each column padded to 8. A list holds the
numbers of the rows, live ones first. Their records follow; free rows have none. `commit` writes
both. `memory` says what `mem` and `cols` are; `src` and `out` are uint8 arrays like `mem`.
"""

from __future__ import annotations

import numpy as np

from . import compile_kernel
from .checksums import digest_of, hash_words, mix
from .memory import FREE, as_words, copy_memory, index_columns

_0, _1, _2, _3, _7 = (np.uint64(i) for i in (0, 1, 2, 3, 7))


@compile_kernel
def hash_records(src, list_at, record_at, record, live, count):
    """Return the hash that `save_rows` returned for `count` rows, `live` of them with a record.

    src: the map itself or a copy of the records. record: bytes of one record.
    """
    words = as_words(src)
    total = _0
    for i in range(live):
        total = mix(total + hash_words(words, np.uint64(record_at + i * record), np.uint64(record)))
    return mix(total + hash_words(words, np.uint64(list_at), np.uint64(8 * count)))


@compile_kernel
def copy_records(mem, cols, rows, out, at, record):
    """Write the undo records of `rows`, (n,) int64, to out[at:], `record` bytes each.

    There must be zeros before.
    """
    place = np.uint64(at)
    for c in range(cols.shape[0]):
        offset, size = cols[c, 0], cols[c, 1]
        for i in range(rows.shape[0]):
            copy_memory(out, place + np.uint64(i) * np.uint64(record), mem, offset + np.uint64(rows[i]) * size, size)
        place += (size + _7) >> _3 << _3


@compile_kernel
def restore_rows(src, cols, list_at, record_at, record, live, use, mem):
    """Write undo records of src back to the columns of mem.

    use: (n,) uint8, 1 for the records to write. The first `live` rows get their bytes, the others
    become free.
    """
    words, source = as_words(mem), as_words(src)
    _, position, _, _ = index_columns(cols)
    at = np.uint64(record_at)
    for c in range(cols.shape[0]):
        offset, size = cols[c, 0], cols[c, 1]
        for i in range(live):
            if use[i] == 1:
                r = source[(list_at >> 3) + i]
                copy_memory(mem, offset + r * size, src, at + np.uint64(i) * np.uint64(record), size)
        at += (size + _7) >> _3 << _3
    for i in range(live, use.shape[0]):
        if use[i] == 1:
            words[position + source[(list_at >> 3) + i]] = FREE


@compile_kernel
def exchange_digests(src, cols, list_at, record_at, record, live, use, mem, digests):
    """Do to the digests (uint64) what `restore_rows` would do to them.

    The digests lose the present checksums of these rows and gain the recorded ones.
    """
    words, source = as_words(mem), as_words(src)
    fields, position, _, checksum = index_columns(cols)
    width, buckets = np.uint64(fields), np.uint64(digests.shape[0])
    for i in range(use.shape[0]):
        if use[i] == 0:
            continue
        r = source[(list_at >> 3) + i]
        b = np.int64(r % buckets)
        for f in range(fields):
            if words[position + r] != FREE:
                digests[b] -= digest_of(words[checksum + r * width + np.uint64(f)])
            if i < live:  # the checksums end a record
                digests[b] += digest_of(source[((record_at + (i + 1) * record) >> 3) - fields + f])


@compile_kernel
def save_freed(mem, cols, rows, at, digests):
    """Write (row, position, group) of `rows`, (n,) int64, which are to become free, to mem[at:].

    These words undo it, because the rows keep their bytes. The digests (uint64) lose the rows'
    checksums. Returns the hash of the words.
    """
    words = as_words(mem)
    fields, position, group, checksum = index_columns(cols)
    target, width, buckets = np.uint64(at) >> _3, np.uint64(fields), np.uint64(digests.shape[0])
    for i in range(rows.shape[0]):
        r, d = np.uint64(rows[i]), target + np.uint64(3 * i)
        words[d], words[d + _1], words[d + _2] = r, words[position + r], words[group + r]
        for f in range(fields):
            digests[np.int64(r % buckets)] -= digest_of(words[checksum + r * width + np.uint64(f)])
    return hash_words(words, np.uint64(at), np.uint64(24 * rows.shape[0]))


@compile_kernel
def hash_freed(mem, at, count):
    """Return the hash that `save_freed` returned for `count` rows at mem[at:]."""
    return hash_words(as_words(mem), np.uint64(at), np.uint64(24 * count))


@compile_kernel
def restore_freed(src, cols, at, count, mem):
    """Give `count` freed rows, whose words stand at src[at:], their positions and groups back."""
    words, source = as_words(mem), as_words(src)
    _, position, group, _ = index_columns(cols)
    for i in range(count):
        s = (np.uint64(at) >> _3) + np.uint64(3 * i)
        words[position + source[s]], words[group + source[s]] = source[s + _1], source[s + _2]
