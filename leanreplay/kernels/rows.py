"""Kernels on the bytes of a mapped file: copy and checksum rows, keep and restore old rows, seal blocks.

A mapped file is one flat uint8 array `mem`; `cols`, (fields + 3, 2) int64, says where its columns lie: (byte offset,
bytes per row) of each field, then of position (int64), group (int64) and checksums (uint64 per field). So every kernel
compiles once, whatever the dtypes. An undo record of a row is its bytes in all columns, each padded to 8.
Helpers stand in the file that calls them because Numba's cache does not notice changes in another one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import config, njit

_G = np.uint64(0x9E3779B97F4A7C15)
_M0 = np.uint64(0xFF51AFD7ED558CCD)
_M1 = np.uint64(0xC4CEB9FE1A85EC53)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_33 = np.uint64(33)

if config.DISABLE_JIT:

    def _prefetch(mem: Any, at: Any) -> None:
        """Nothing to hint at when Python itself runs the kernel."""

else:
    from llvmlite import ir
    from numba.core import types
    from numba.extending import intrinsic

    @intrinsic
    def _prefetch(_context: Any, mem: Any, at: Any) -> Any:
        """Ask for the cache line of mem[at]: random rows come twice as fast so (measured)."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            address = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
            i32 = ir.IntType(32)
            hint = builder.module.declare_intrinsic(
                "llvm.prefetch", [address.type], ir.FunctionType(ir.VoidType(), [address.type, i32, i32, i32])
            )
            builder.call(hint, [address, i32(0), i32(3), i32(1)])
            return context.get_dummy_value()

        return types.void(mem, types.intp), generate


@njit(cache=True, nogil=True, error_model="numpy")
def _mix(x):
    """Scramble a uint64 (the finaliser of MurmurHash3, a bijection)."""
    x = (x ^ (x >> _33)) * _M0
    x = (x ^ (x >> _33)) * _M1
    return x ^ (x >> _33)


@njit(cache=True, nogil=True, error_model="numpy")
def _term(word, i):
    """What word i adds to a hash: itself plus the product of its halves, which no change of a single byte leaves the same."""
    y = word + np.uint64(i + 1) * _G
    return y + (y & _LOW) * (y >> _32)


@njit(cache=True, nogil=True, error_model="numpy")
def _hash(src, s, n):
    """Hash src[s : s + n]: a sum over its 8-byte words, then the bytes left over, so that it runs in vector registers."""
    words = src[s : s + n - n % 8].view(np.uint64)
    total = np.uint64(n)
    for i in range(words.shape[0]):
        total += _term(words[i], i)
    for j in range(n - n % 8, n):
        total += _term(np.uint64(src[s + j]), j)
    return _mix(total)


@njit(cache=True, nogil=True, error_model="numpy")
def _copy_hash(src, s, dst, d, n):
    """Copy src[s : s + n] to dst[d:] and return its `_hash`, in one pass.

    Rows that are no multiple of 8 bytes are loaded unaligned, which x86-64 and arm64 allow.
    """
    words = src[s : s + n - n % 8].view(np.uint64)
    out = dst[d : d + n - n % 8].view(np.uint64)
    total = np.uint64(n)
    for i in range(words.shape[0]):
        out[i] = words[i]
        total += _term(words[i], i)
    for j in range(n - n % 8, n):
        dst[d + j] = src[s + j]
        total += _term(np.uint64(src[s + j]), j)
    return _mix(total)


@njit(cache=True, nogil=True, error_model="numpy")
def _checksum(row_hash, field, row, position, group):
    """Checksum of a row's field: its bytes, which field it is, and which row, position and group it belongs to."""
    h = _mix(row_hash + np.uint64(field + 1) * _G)
    h = _mix(h ^ (np.uint64(row) * _G))
    h = _mix(h + np.uint64(position))
    return _mix(h ^ np.uint64(group))


@njit(cache=True, nogil=True, error_model="numpy")
def seal_block(mem, at, words, state):
    """Write `words` (uint64) to mem[at:], the last of them replaced by the hash of the others: valid or not, as a whole.

    state > 0: words[state] is replaced by the hash of the words between it and the last.
    """
    n = words.shape[0] - 1
    if state > 0:
        words[state] = _hash(words.view(np.uint8), 8 * (state + 1), 8 * (n - state - 1))
    words[n] = _hash(words.view(np.uint8), 0, 8 * n)
    target = mem[at : at + 8 * (n + 1)].view(np.uint64)
    for i in range(n + 1):  # a slice assignment would take 2 s to compile
        target[i] = words[i]


@njit(cache=True, nogil=True, error_model="numpy")
def read_block(mem, at, words):
    """Copy a sealed block from mem[at:] into `words` (uint64); whether its seal holds."""
    n = words.shape[0] - 1
    source = mem[at : at + 8 * (n + 1)].view(np.uint64)
    for i in range(n + 1):
        words[i] = source[i]
    return words[n] == _hash(words.view(np.uint8), 0, 8 * n)


@njit(cache=True, nogil=True, error_model="numpy")
def read_rows(mem, cols, first, last, rows, out, places, index, bad):
    """Copy fields first to last of rows out, verifying each.

    rows: (n,) int64 within the columns. out: uint8; field f of rows[i] goes to out[places[f - first] + i * its bytes].
    index: (2, n) int64, receives positions and groups. bad: (n,) uint8, receives 1 for a free row or a wrong checksum.
    Returns the number of bad rows.
    """
    fields = cols.shape[0] - 3
    n = rows.shape[0]
    words = mem.view(np.int64)
    position, group, checksum = cols[fields, 0] // 8, cols[fields + 1, 0] // 8, cols[fields + 2, 0] // 8
    for i in range(n):
        index[0, i] = words[position + rows[i]]
        index[1, i] = words[group + rows[i]]
        bad[i] = index[0, i] < 0
    for f in range(first, last):
        offset, size = cols[f, 0], cols[f, 1]
        for i in range(n):
            if i + 1 < n:
                ahead = offset + rows[i + 1] * size
                for j in range(0, size, 64):
                    _prefetch(mem, ahead + j)
            r = rows[i]
            h = _copy_hash(mem, offset + r * size, out, places[f - first] + i * size, size)
            if np.uint64(words[checksum + r * fields + f]) != _checksum(h, f, r, index[0, i], index[1, i]):
                bad[i] = 1
    count = 0
    for i in range(n):
        count += bad[i]
    return count


@njit(cache=True, nogil=True, error_model="numpy")
def read_record(record, cols, row, out, places, index):
    """Copy the fields of one undo record out as `read_rows` does for row `row`; whether all its checksums hold.

    cols: byte offsets within the record. index: (2, 1) int64, receives position and group.
    """
    fields = cols.shape[0] - 3
    words = record.view(np.int64)
    index[0, 0], index[1, 0] = words[cols[fields, 0] // 8], words[cols[fields + 1, 0] // 8]
    for f in range(fields):
        h = _copy_hash(record, cols[f, 0], out, places[f], cols[f, 1])
        if np.uint64(words[cols[fields + 2, 0] // 8 + f]) != _checksum(h, f, row, index[0, 0], index[1, 0]):
            return False
    return index[0, 0] >= 0


@njit(cache=True, nogil=True, error_model="numpy")
def keep_last(rows, slots, samples, taken):
    """The last sample of each row that is taken.

    rows: (n,) int64, the row that sample i takes, or -1. slots: int32 per row of the buffer, all 0 before and after.
    samples, taken: (n,) int64, receive sample and row of each survivor. Returns their number, or -1 if some row is
    outside the buffer.
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
            taken[count] = r
            samples[count] = i
            count += 1
            slots[r] = count
        else:
            samples[slots[r] - 1] = i
    for i in range(count):
        slots[taken[i]] = 0
    return count


@njit(cache=True, nogil=True, error_model="numpy")
def save_rows(mem, cols, first, last, rows, stamps, stamp, list_at, record_at, record, digests, counts):
    """Write the undo records of `rows` (distinct) into mem, and take their checksums off the digests.

    first, last: the range of fields about to change. stamps: int32 per row of the buffer, or empty: a live row whose
    stamp differs from `stamp` is new and comes first; all are stamped. list_at: where the row numbers go; record_at:
    the records of live rows, `record` bytes each; free rows come last and have none. counts: (3,) int64, receives
    how many are new, how many live, how many in all. Returns a hash over list and records.
    """
    fields = cols.shape[0] - 3
    words = mem.view(np.int64)
    position, checksum = cols[fields, 0] // 8, cols[fields + 2, 0] // 8
    buckets = digests.shape[0]
    total = np.uint64(0)
    done = 0
    for kind in range(3):
        for i in range(rows.shape[0]):
            r = rows[i]
            if words[position + r] < 0:
                found = 2
            else:
                found = 1 if stamps.shape[0] > 0 and stamps[r] == stamp else 0
            if found != kind:
                continue
            words[list_at // 8 + done] = r
            if kind < 2:
                at = record_at + done * record
                for c in range(cols.shape[0]):
                    size = cols[c, 1]
                    total = _mix(total + _copy_hash(mem, cols[c, 0] + r * size, mem, at, size))
                    at += size + (-size) % 8
                for f in range(first, last):
                    digests[r % buckets] -= _mix(np.uint64(words[checksum + r * fields + f]) ^ _G)
            done += 1
        counts[kind] = done
    if stamps.shape[0] > 0:
        for i in range(rows.shape[0]):
            stamps[rows[i]] = stamp
    return _mix(total + _hash(mem, list_at, 8 * done))


@njit(cache=True, nogil=True, error_model="numpy")
def hash_records(src, cols, list_at, record_at, record, live, count):
    """The hash that `save_rows` returned for these records (src: uint8, the map itself or a copy of the records)."""
    total = np.uint64(0)
    for i in range(live):
        at = record_at + i * record
        for c in range(cols.shape[0]):
            size = cols[c, 1]
            total = _mix(total + _hash(src, at, size))
            at += size + (-size) % 8
    return _mix(total + _hash(src, list_at, 8 * count))


@njit(cache=True, nogil=True, error_model="numpy")
def restore_rows(src, cols, list_at, record_at, record, live, use, mem):
    """Write undo records back to the columns of mem where use (uint8) is 1: the first `live` with bytes, others become free."""
    fields = cols.shape[0] - 3
    words = mem.view(np.int64)
    listed = src[list_at : list_at + 8 * use.shape[0]].view(np.int64)
    for i in range(use.shape[0]):
        if use[i] == 0:
            continue
        r = listed[i]
        if i < live:
            at = record_at + i * record
            for c in range(cols.shape[0]):
                size = cols[c, 1]
                _copy_hash(src, at, mem, cols[c, 0] + r * size, size)
                at += size + (-size) % 8
        else:
            words[cols[fields, 0] // 8 + r] = -1


@njit(cache=True, nogil=True, error_model="numpy")
def exchange_digests(src, cols, list_at, record_at, record, live, use, mem, digests):
    """What `restore_rows` would do to the digests: the rows' present checksums go, the recorded ones come."""
    fields = cols.shape[0] - 3
    words = mem.view(np.int64)
    position, checksum = cols[fields, 0] // 8, cols[fields + 2, 0] // 8
    listed = src[list_at : list_at + 8 * use.shape[0]].view(np.int64)
    recorded = src[record_at : record_at + live * record].view(np.uint64)
    for i in range(use.shape[0]):
        if use[i] == 0:
            continue
        r = listed[i]
        for f in range(fields):
            if words[position + r] >= 0:
                digests[r % digests.shape[0]] -= _mix(np.uint64(words[checksum + r * fields + f]) ^ _G)
            if i < live:  # the checksums end a record
                digests[r % digests.shape[0]] += _mix(recorded[((i + 1) * record) // 8 - fields + f] ^ _G)


@njit(cache=True, nogil=True, error_model="numpy")
def write_field(mem, cols, field, rows, samples, src, positions, groups, digests):
    """Write one field of `rows`, its checksums, and their share of the digests.

    src: uint8; rows[i] gets the bytes of sample samples[i] in it. positions, groups: (n,) int64 of the rows.
    """
    fields = cols.shape[0] - 3
    offset, size = cols[field, 0], cols[field, 1]
    words = mem.view(np.uint64)
    checksum = cols[fields + 2, 0] // 8
    buckets = digests.shape[0]
    for i in range(rows.shape[0]):
        r = rows[i]
        h = _copy_hash(src, samples[i] * size, mem, offset + r * size, size)
        h = _checksum(h, field, r, positions[i], groups[i])
        words[checksum + r * fields + field] = h
        digests[r % buckets] += _mix(h ^ _G)


@njit(cache=True, nogil=True, error_model="numpy")
def write_index(mem, cols, rows, positions, groups, freed):
    """Write position and group of `rows`, and set the rows in `freed` free. All (n,) int64."""
    fields = cols.shape[0] - 3
    words = mem.view(np.int64)
    for i in range(rows.shape[0]):
        words[cols[fields, 0] // 8 + rows[i]] = positions[i]
        words[cols[fields + 1, 0] // 8 + rows[i]] = groups[i]
    for i in range(freed.shape[0]):
        words[cols[fields, 0] // 8 + freed[i]] = -1


@njit(cache=True, nogil=True, error_model="numpy")
def scan_index(mem, cols, capacity, digests):
    """Add the digests of all live rows to `digests`; returns the number of live rows, and one past the highest."""
    fields = cols.shape[0] - 3
    words = mem.view(np.int64)
    position, checksum = cols[fields, 0] // 8, cols[fields + 2, 0] // 8
    live = 0
    high = 0
    for r in range(capacity):
        if words[position + r] >= 0:
            live += 1
            high = r + 1
            for f in range(fields):
                digests[r % digests.shape[0]] += _mix(np.uint64(words[checksum + r * fields + f]) ^ _G)
    return live, high


@njit(cache=True, nogil=True, error_model="numpy")
def verify_rows(mem, cols, start, stop, bad):
    """Check the stored checksums of rows start to stop: bad[r - start] (uint8) becomes 1 + the first wrong field."""
    fields = cols.shape[0] - 3
    words = mem.view(np.int64)
    position, group, checksum = cols[fields, 0] // 8, cols[fields + 1, 0] // 8, cols[fields + 2, 0] // 8
    for r in range(start, stop):
        bad[r - start] = 0
        if words[position + r] < 0:
            continue
        for f in range(fields):
            h = _hash(mem, cols[f, 0] + r * cols[f, 1], cols[f, 1])
            h = _checksum(h, f, r, words[position + r], words[group + r])
            if np.uint64(words[checksum + r * fields + f]) != h:
                bad[r - start] = f + 1
                break
