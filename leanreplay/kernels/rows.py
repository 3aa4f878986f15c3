"""Kernels that read rows and verify their checksums. `memory` says what `mem` and `cols` are."""

from __future__ import annotations

import numpy as np

from . import compile_kernel
from .checksums import checksum_of, copy_bytes, digest_of, hash_bytes, row_identity
from .memory import FREE, as_words, copy_memory, index_columns, prefetch, prefetch_bytes

_0, _1, _3, _64 = (np.uint64(i) for i in (0, 1, 3, 64))
_NEAR = 16  # rows ahead that the index is fetched
_KNOWN = 2  # in `bad`, while rows are read: it need not be verified


@compile_kernel
def read_rows(mem, cols, first, last, rows, out, places, index, sums, bad, high, verified):
    """Copy fields first to last of rows out, verifying each row that is not known to be right.

    rows: (n,) int64. out: uint8; field f of rows[i] goes to
    out[places[f - first] + i * its bytes]. index: (2, n) int64, receives positions and groups.
    sums: (n,) uint64, receives sums of the checksums that were looked at, for `find_changed`. bad:
    (n,) uint8, receives 1 for a free row or a wrong checksum. high: how many rows are in use.
    verified: uint8 per row of the buffer, 1 if it need not be verified; a row becomes so once all
    of its fields are. If it is empty, every row is verified. Returns the number of bad rows; -1,
    and nothing is read, if some are not in use.
    """
    n = rows.shape[0]
    for i in range(n):
        if rows[i] < 0 or rows[i] >= high:
            return -1
    words = as_words(mem)
    fields, position, group, checksum = index_columns(cols)
    width = np.uint64(fields)
    identities = np.empty(n, np.uint64)
    trusting = verified.shape[0] > 0
    for i in range(n):
        if i + _NEAR < n:  # ask for cache lines before they are needed: twice as fast
            r = np.uint64(rows[i + _NEAR])
            prefetch(mem, (position + r) << _3)
            prefetch(mem, (group + r) << _3)
            if trusting:
                prefetch(verified, r)
            else:
                prefetch(mem, (checksum + r * width) << _3)
        r = np.uint64(rows[i])
        p, g = words[position + r], words[group + r]  # once, because a writer may be changing them
        index[0, i], index[1, i] = np.int64(p), np.int64(g)
        sums[i], bad[i] = _0, 1 if np.int64(p) < 0 else _KNOWN if trusting and verified[r] == 1 else 0
        if bad[i] != _KNOWN:
            identities[i] = row_identity(r, p, g)
    for f in range(first, last):
        offset, size, place = cols[f, 0], cols[f, 1], np.uint64(places[f - first])
        after = min(f + 1, last - 1)  # the entries of the next field come in during this copy
        check = checksum + np.uint64(f)
        for i in range(n):
            r, to = np.uint64(rows[i]), place + np.uint64(i) * size
            if size > _64 and i + 1 < n:  # so does the next large entry of this field
                prefetch_bytes(mem, offset + np.uint64(rows[i + 1]) * size, size)
            prefetch(mem, cols[after, 0] + r * cols[after, 1])
            prefetch(mem, cols[after, 0] + (r + _1) * cols[after, 1] - _1)
            if bad[i] == _KNOWN:
                copy_memory(out, to, mem, offset + r * size, size)
            else:
                h = copy_bytes(mem, offset + r * size, out, to, size)
                stored = words[check + r * width]
                sums[i] += stored
                bad[i] |= stored != checksum_of(h, identities[i], f)
    wrong = 0
    for i in range(n):
        if trusting and bad[i] == 0 and last - first == fields:
            verified[rows[i]] = 1
        bad[i] &= 1
        wrong += bad[i]
    return wrong


@compile_kernel
def find_changed(mem, cols, first, last, rows, index, sums, bad):
    """Mark rows that changed since `read_rows`: bad[i] becomes 1. Returns the number of bad rows.

    A row changed if its position, group or a checksum did. A commit between two fields of a row
    leaves each of them right, and the row wrong.
    """
    words = as_words(mem)
    fields, position, group, checksum = index_columns(cols)
    wrong = 0
    for i in range(rows.shape[0]):
        r = np.uint64(rows[i])
        total = _0
        for f in range(first, last):
            total += words[checksum + r * np.uint64(fields) + np.uint64(f)]
        same_place = words[position + r] == np.uint64(index[0, i]) and words[group + r] == np.uint64(index[1, i])
        if total != sums[i] or not same_place:
            bad[i] = 1
        wrong += bad[i]
    return wrong


@compile_kernel
def read_record(record, cols, row, out, places):
    """Copy the fields of one undo record of row `row` out; whether all its checksums hold.

    record: uint8. cols: as of `mem`, but with byte offsets within the record. out: uint8; field f
    goes to out[places[f]].
    """
    words = as_words(record)
    fields, position, group, checksum = index_columns(cols)
    identity = row_identity(np.uint64(row), words[position], words[group])
    for f in range(fields):
        size, place = cols[f, 1], np.uint64(places[f])
        h = copy_bytes(record, cols[f, 0], out, place, size)
        if words[checksum + np.uint64(f)] != checksum_of(h, identity, f):
            return False
    return words[position] != FREE


@compile_kernel
def scan_index(mem, cols, capacity, digests):
    """Add the digests of all live rows to `digests` (uint64 per bucket).

    Returns the number of live rows, and one past the highest of them.
    """
    words = as_words(mem)
    fields, position, _, checksum = index_columns(cols)
    live = 0
    high = 0
    for r in range(capacity):
        if np.int64(words[position + np.uint64(r)]) >= 0:
            live += 1
            high = r + 1
            for f in range(fields):
                digests[r % digests.shape[0]] += digest_of(words[checksum + np.uint64(r * fields + f)])
    return live, high


@compile_kernel
def verify_rows(mem, cols, start, stop, bad):
    """Check rows start to stop: bad[r - start] (uint8) becomes 1 if a checksum is wrong, else 0."""
    words = as_words(mem)
    fields, position, group, checksum = index_columns(cols)
    for i in range(start, stop):
        r = np.uint64(i)
        bad[i - start] = 0
        if words[position + r] == FREE:
            continue
        identity = row_identity(r, words[position + r], words[group + r])
        for f in range(fields):
            h = hash_bytes(mem, cols[f, 0] + r * cols[f, 1], cols[f, 1])
            if words[checksum + r * np.uint64(fields) + np.uint64(f)] != checksum_of(h, identity, f):
                bad[i - start] = 1
