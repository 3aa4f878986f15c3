"""Kernels that commit: the steps, each as a kernel of its own, and all of them in one call.

`memory` says what `mem` and `cols` are, `before_images` what an undo record is.
"""

from __future__ import annotations

import numpy as np

from . import compile_kernel, inlined
from .checksums import checksum_of, copy_bytes, digest_of, hash_words, mix, row_identity, seal_block
from .memory import FREE, as_words, copy_memory, fence, index_columns, prefetch, prefetch_bytes

_0, _1, _3, _7, _64 = (np.uint64(i) for i in (0, 1, 3, 7, 64))


@inlined
def _survivors(rows, slots, samples, taken):
    """Find the last sample of each row, see `keep_last`; their number, or -1 for a wrong row.

    slots[r] becomes 1 + the number of the survivor in row r.
    """
    for i in range(rows.shape[0]):
        if rows[i] < -1 or rows[i] >= slots.shape[0]:
            return -1
    count = 0
    for i in range(rows.shape[0]):
        r = rows[i]
        if r < 0:
            continue
        if slots[r] == 0:
            count += 1
            slots[r], taken[count - 1] = count, r
        samples[slots[r] - 1] = i
    return count


@compile_kernel
def keep_last(rows, freed, index, slots, start, samples, taken, positions):
    """Find the last sample of each row that is taken.

    rows: (n,) int64, the row that sample i takes, or -1. freed: int64, rows to be free. index:
    int64, the positions of all rows. slots: int32 per row of the buffer, all 0 before and after.
    samples, taken, positions: (n,) int64, receive sample, row and stream position (start + sample)
    of each survivor. Returns their number. Returns -1 if a row is outside the buffer, and -2 if
    one of `freed` is, or is not live, is taken, or stands there twice.
    """
    count = _survivors(rows, slots, samples, taken)
    if count < 0:
        return count
    wrong = freed.shape[0]
    for i in range(freed.shape[0]):
        r = freed[i]
        if r < 0 or r >= slots.shape[0] or slots[r] != 0 or index[r] < 0:
            wrong = i
            break
        slots[r] = -1
    for i in range(wrong):
        slots[freed[i]] = 0
    for i in range(count):
        slots[taken[i]] = 0
        positions[i] = start + samples[i]
    return count if wrong == freed.shape[0] else -2


@inlined
def _save_rows(mem, cols, rows, whole, changing, stamps, stamp, list_at, record_at, record, digests, counts):
    """Write the undo records of `rows`, (n,) int64, distinct. Returns a hash over list and records.

    The digests (uint64) lose the checksums that are about to change. whole: how many of the rows,
    the first ones, change wholly. The others change in the fields f where changing[f] (uint8) is 1.
    stamps: uint8 per row of the buffer, or empty. A live row whose stamp differs from `stamp` is
    new, and comes first; all rows are stamped. list_at: where the numbers of the rows go.
    record_at: where the records of live rows go, `record` bytes each. Free rows come last and have
    none. counts: (4,) int64, receives how many rows are new, how many live, how many there are,
    and one past the highest.
    """
    words = as_words(mem)
    fields, position, _, checksum = index_columns(cols)
    listed, width, buckets = list_at >> 3, np.uint64(fields), np.uint64(digests.shape[0])
    for i in range(rows.shape[0]):  # small entries lie far apart: ask for all of them at once
        for c in range(cols.shape[0]):
            if cols[c, 1] <= _64:
                prefetch(mem, cols[c, 0] + np.uint64(rows[i]) * cols[c, 1])
    done, top = 0, 0
    for kind in range(3):
        for i in range(rows.shape[0]):
            r = rows[i]
            top = max(top, r + 1)
            if words[position + np.uint64(r)] == FREE:
                found = 2
            else:
                found = 1 if stamps.shape[0] > 0 and stamps[r] == stamp else 0
            if found == kind:
                words[listed + done] = np.uint64(r)
                done += 1
        counts[kind] = done
    counts[3], live = top, counts[1]
    total = _0
    for i in range(live):
        at = np.uint64(record_at) + np.uint64(i) * np.uint64(record)
        start = at
        for c in range(cols.shape[0]):
            size = cols[c, 1]
            if size > _64 and i + 1 < live:
                prefetch_bytes(mem, cols[c, 0] + words[listed + i + 1] * size, size)
            words[((at + size + _7) >> _3) - _1] = _0  # what the copy leaves of the last word is 0
            copy_memory(mem, at, mem, cols[c, 0] + words[listed + i] * size, size)
            at += (size + _7) >> _3 << _3
        total = mix(total + hash_words(words, start, np.uint64(record)))
    for i in range(rows.shape[0]):
        r = np.uint64(rows[i])
        if words[position + r] != FREE:
            for f in range(fields):
                if i < whole or changing[f] == 1:
                    digests[np.int64(r % buckets)] -= digest_of(words[checksum + r * width + np.uint64(f)])
    if stamps.shape[0] > 0:
        for i in range(rows.shape[0]):
            stamps[rows[i]] = stamp
    return mix(total + hash_words(words, np.uint64(list_at), np.uint64(8 * done)))


@inlined
def _write_field(mem, cols, field, rows, samples, src, positions, groups, digests):
    """Write one field of `rows`, (n,) int64, its checksums, and their part of the digests (uint64).

    src: uint8; rows[i] gets the bytes of sample samples[i] in it. samples, positions, groups: (n,)
    int64, of the rows.
    """
    words = as_words(mem)
    fields, _, _, checksum = index_columns(cols)
    offset, size = cols[field, 0], cols[field, 1]
    check = checksum + np.uint64(field)
    width, buckets = np.uint64(fields), np.uint64(digests.shape[0])
    for i in range(rows.shape[0]):
        if size > _64 and i + 1 < rows.shape[0]:  # the next one comes in while this one is copied
            prefetch_bytes(src, np.uint64(samples[i + 1]) * size, size)
        r = np.uint64(rows[i])
        h = copy_bytes(src, np.uint64(samples[i]) * size, mem, offset + r * size, size)
        h = checksum_of(h, row_identity(r, np.uint64(positions[i]), np.uint64(groups[i])), field)
        words[check + r * width] = h
        digests[np.int64(r % buckets)] += digest_of(h)


@inlined
def _write_index(mem, cols, rows, positions, groups, verified):
    """Write positions and groups of `rows`, (n,) int64 each, whose fields are all written.

    verified: as of `read_rows`. The rows are what their checksums say.
    """
    words = as_words(mem)
    _, position, group, _ = index_columns(cols)
    for i in range(rows.shape[0]):
        r = np.uint64(rows[i])
        words[position + r], words[group + r] = np.uint64(positions[i]), np.uint64(groups[i])
        if verified.shape[0] > 0:
            verified[r] = 1


save_rows = compile_kernel(_save_rows)
write_field = compile_kernel(_write_field)
write_index = compile_kernel(_write_index)


@compile_kernel
def commit_rows(
    mem, cols, rows, slots, start, positions, groups, first, s0, s1, s2, s3,
    seal, header, header_at, max_rows, journal_ready, faulted, at, verified,
):  # fmt: skip
    """Commit in one call, a memory fence between any two steps.

    The steps: `keep_last`; `save_rows`, which writes the journal; the journal's seal; `write_field`
    for up to four fields and `write_index`; the header.

    rows: (n,) int64, the row that sample i takes, or -1. The last of several samples that take the
    same row stays. slots: int32 per row of the buffer, all 0. Sample i has stream position
    positions[i] (int64), or start + i if `positions` is empty. It is number first + i in `groups`,
    (at least first + n,) int64, and in s0 to s3, uint8, the sources of the fields.
    seal, header: uint64, words of the journal's seal and of the new header. The header goes to
    mem[header_at:], and is complete but for what follows from the rows. max_rows: how many rows may
    change. journal_ready: how many records of the journal have their pages. faulted: how many rows
    of the columns have them.
    at: (12,) int64. at[0:3]: `list_at`, `record_at`, `record` of `save_rows`. at[3]: where the seal
    goes. at[4:7]: which of its words say how many rows are live, how many there are, and the hash.
    at[7:11]: which words of the header are size, end of the rows in use, hash, first digest.
    at[11]: how many digests there are. verified: as of `read_rows`.

    Returns how many rows changed. Having changed nothing, returns -1 if `rows` are wrong or too
    many, and -2 if pages are missing.
    """
    stamps, kept, into = np.empty(0, np.uint8), np.empty(rows.shape[0], np.int64), np.empty(rows.shape[0], np.int64)
    count = _survivors(rows, slots, kept, into)
    if count < 0:
        return -1
    taken, samples, places = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.int64)
    picked = np.empty(count, np.int64)
    top = 0
    for i in range(count):
        r, s = into[i], kept[i]
        slots[r] = 0
        top = max(top, r + 1)
        taken[i], samples[i], picked[i] = r, first + s, groups[first + s]
        places[i] = positions[s] if positions.shape[0] > 0 else start + s
    if count > max_rows:
        return -1
    if top > faulted or min(np.uint64(count), header[at[7]]) > np.uint64(journal_ready):
        return -2
    digests, counts = header[at[10] : at[10] + at[11]], np.empty(4, np.int64)
    if count > 0:
        # All rows change wholly, so nothing looks at `changing`: s3 stands in for it.
        found = _save_rows(mem, cols, taken, count, s3, stamps, 0, at[0], at[1], at[2], digests, counts)
        live = np.uint64(counts[1])
        seal[at[4]], seal[at[5]], seal[at[6]] = live, np.uint64(count), found
        fence(mem)
        seal_block(mem, at[3], seal, np.int64(0))
        fence(mem)
        for f in range(cols.shape[0] - 3):
            source = s0 if f == 0 else s1 if f == 1 else s2 if f == 2 else s3
            _write_field(mem, cols, f, taken, samples, source, places, picked, digests)
        _write_index(mem, cols, taken, places, picked, verified)
        header[at[7]] += np.uint64(count) - live
        header[at[8]] = max(header[at[8]], np.uint64(top))
        fence(mem)
    seal_block(mem, header_at, header, at[9])
    return count
