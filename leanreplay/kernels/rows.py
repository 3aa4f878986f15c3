"""Kernels on the bytes of a mapped file: copy and checksum rows, keep and restore old rows, seal blocks.

A mapped file is one flat uint8 array `mem`; `cols`, (fields + 3, 2) uint64, says where its columns lie: (byte offset,
bytes per row) of each field, then of position (int64), group (int64) and checksums (uint64 per field). So every kernel
compiles once, whatever the dtypes. An undo record of a row is its bytes in all columns, each padded to 8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import config

from . import entry, inlined, njit
from .hashing import GOLDEN

_M0 = np.uint64(0xFF51AFD7ED558CCD)
_M1 = np.uint64(0xC4CEB9FE1A85EC53)
_FREE = np.uint64(0xFFFFFFFFFFFFFFFF)  # position -1
_LOW = np.uint64(0xFFFFFFFF)
_0, _1, _2, _3, _6, _7, _8, _32 = (np.uint64(i) for i in (0, 1, 2, 3, 6, 7, 8, 32))
_33, _63, _64 = np.uint64(33), np.uint64(63), np.uint64(64)
_NEAR = 16  # rows ahead that the index is fetched


def _prefetch(mem: Any, at: Any) -> None:
    """Nothing to hint at when Python itself runs the kernel."""


def _fence(mem: Any) -> None:
    """Nothing to hold back when Python itself runs the kernel."""


def _words(mem: Any) -> Any:
    """A byte array as uint64 words, bytes left over at the end not counted."""
    return mem[: mem.shape[0] - mem.shape[0] % 8].view(np.uint64)


def _load(mem: Any, at: Any) -> Any:
    """The 8 bytes at mem[at:] as a word, at any alignment."""
    return mem[int(at) : int(at) + 8].view(np.uint64)[0]


def _store(mem: Any, at: Any, word: Any) -> None:
    """Write a word to mem[at:], at any alignment."""
    mem[int(at) : int(at) + 8].view(np.uint64)[0] = word


PLAIN = {f.__name__: f for f in (_prefetch, _fence, _words, _load, _store)}  # what the instructions below do, in Python

if not config.DISABLE_JIT:  # type: ignore[attr-defined]
    from llvmlite import ir
    from numba.core import cgutils, types
    from numba.core.imputils import impl_ret_borrowed
    from numba.extending import intrinsic
    from numba.np.arrayobj import populate_array

    @intrinsic  # type: ignore[no-redef]
    def _prefetch(_context: Any, mem: Any, at: Any) -> Any:
        """Ask for the cache line of mem[at]: random rows come twice as fast so (measured)."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            address = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
            i32 = ir.IntType(32)
            hint = builder.module.declare_intrinsic(
                "llvm.prefetch", [address.type], ir.FunctionType(ir.VoidType(), [address.type, i32, i32, i32])
            )
            builder.call(hint, [address, i32(0), i32(2), i32(1)])  # into the second level: more of them at once
            return context.get_dummy_value()

        return types.void(mem, types.intp), generate

    @intrinsic  # type: ignore[no-redef]
    def _fence(_context: Any, mem: Any) -> Any:
        """Neither compiler nor processor moves stores over this, nor drops one before it because of one behind it."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.fence("acq_rel")
            return context.get_dummy_value()

        return types.void(mem), generate

    def _word_at(context: Any, builder: Any, kind: Any, mem: Any, at: Any) -> Any:
        data = context.make_array(kind)(context, builder, mem).data
        return builder.bitcast(builder.gep(data, [at]), ir.IntType(64).as_pointer())

    @intrinsic  # type: ignore[no-redef]
    def _load(_context: Any, mem: Any, at: Any) -> Any:
        """The 8 bytes at mem[at:] as a word, at any alignment."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load(_word_at(context, builder, signature.args[0], *args), align=1)

        return types.uint64(mem, types.uint64), generate

    @intrinsic  # type: ignore[no-redef]
    def _store(_context: Any, mem: Any, at: Any, word: Any) -> Any:
        """Write a word to mem[at:], at any alignment."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(args[2], _word_at(context, builder, signature.args[0], *args[:2]), align=1)
            return context.get_dummy_value()

        return types.void(mem, types.uint64, types.uint64), generate

    @intrinsic  # type: ignore[no-redef]
    def _words(_context: Any, mem: Any) -> Any:
        """A byte array as uint64 words, bytes left over at the end not counted. (A slice and a view compile in ten times the time.)"""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source = context.make_array(signature.args[0])(context, builder, args[0])
            made = context.make_array(signature.return_type)(context, builder)
            eight = context.get_constant(types.intp, 8)
            populate_array(
                made,
                data=builder.bitcast(source.data, ir.IntType(64).as_pointer()),
                shape=cgutils.pack_array(builder, [builder.udiv(source.nitems, eight)]),
                strides=cgutils.pack_array(builder, [eight]),
                itemsize=eight,
                meminfo=source.meminfo,
                parent=source.parent,
            )
            return impl_ret_borrowed(context, builder, signature.return_type, made._getvalue())

        return types.Array(types.uint64, 1, "C", readonly=not mem.mutable)(mem), generate


@njit
def _mix(x):
    """Scramble a uint64 (the finaliser of MurmurHash3, a bijection)."""
    x = (x ^ (x >> _33)) * _M0
    x = (x ^ (x >> _33)) * _M1
    return x ^ (x >> _33)


@njit
def _term(word, k):
    """What word i adds to a hash, k being (i + 1) * GOLDEN: itself plus the product of its halves, which no change of a single byte leaves
    the same. Loops count k up, because a vector multiplication for each word would cost more than all the rest."""
    y = word + k
    return y + (y & _LOW) * (y >> _32)


# The hash of n bytes is a sum over its 8-byte words, then over the bytes left, so that it runs in vector registers. Indices are
# unsigned (a test for negative ones would stay in the loop), and a kernel calls `_copy` in one place, where it becomes part of it.


@njit
def _copy(src, s, dst, d, n):
    """Copy n bytes from src[s:] to dst[d:] (uint8 arrays); the hash of the copy, read once because a writer may be changing it."""
    total = n
    k = _0
    whole = n >> _3 << _3
    for i in range(n >> _3):
        at = np.uint64(i) << _3
        word = _load(src, s + at)
        _store(dst, d + at, word)
        k += GOLDEN
        total += _term(word, k)
    for i in range(whole, n):
        byte = src[s + i]
        dst[d + i] = byte
        total += _term(np.uint64(byte), (i + _1) * GOLDEN)
    return _mix(total)


@njit
def _hash(src, s, n):
    """`_copy` without the copy."""
    total = n
    k = _0
    whole = n >> _3 << _3
    for i in range(n >> _3):
        k += GOLDEN
        total += _term(_load(src, s + (np.uint64(i) << _3)), k)
    for i in range(whole, n):
        total += _term(np.uint64(src[s + i]), (i + _1) * GOLDEN)
    return _mix(total)


@njit
def _hash_words(words, s, n):
    """`_hash` of n bytes, a multiple of 8, from byte s of `words` (uint64)."""
    total = n
    first = s >> _3
    k = _0
    for i in range(n >> _3):
        k += GOLDEN
        total += _term(words[first + i], k)
    return _mix(total)


@njit
def _tag(row, position, group):
    """One word for what a row is: its number, position and group (all uint64)."""
    return _mix(_mix(row * GOLDEN ^ group) + position)


@njit
def _checksum(data, tag, field):
    """Checksum of a row's field: the hash of its bytes, the row's tag, and which field it is."""
    return _mix((data + np.uint64(field)) ^ tag)


@njit
def _share(checksum):
    """What a checksum adds to the digest of its bucket."""
    return _mix(checksum ^ GOLDEN)


@njit
def seal_block(mem, at, words, state):
    """Write `words` (uint64) to mem[at:], the last of them replaced by the hash of the others: valid or not, as a whole.

    state > 0: words[state] is replaced by the hash of the words between it and the last.
    """
    last = words.shape[0] - 1
    if state > 0:
        words[state] = _hash_words(words, np.uint64(8 * (state + 1)), np.uint64(8 * (last - state - 1)))
    words[last] = _hash_words(words, np.uint64(0), np.uint64(8 * last))
    target = _words(mem)
    for i in range(last + 1):  # a slice assignment would take 2 s to compile
        target[(at >> 3) + i] = words[i]


@njit
def read_block(mem, at, words):
    """Copy a sealed block from mem[at:] into `words` (uint64); whether its seal holds."""
    last = words.shape[0] - 1
    source = _words(mem)
    for i in range(last + 1):
        words[i] = source[(at >> 3) + i]
    return words[last] == _hash_words(words, np.uint64(0), np.uint64(8 * last))


@njit
def read_rows(mem, cols, first, last, rows, out, places, index, sums, bad):
    """Copy fields first to last of rows out, verifying each.

    rows: (n,) int64 within the columns. out: uint8; field f of rows[i] goes to out[places[f - first] + i * its bytes].
    index: (2, n) int64, receives positions and groups; sums: (n,) uint64, sums of the stored checksums, for `find_changed`.
    bad: (n,) uint8, receives 1 for a free row or a wrong checksum. Returns the number of bad rows.
    """
    fields = cols.shape[0] - 3
    n = rows.shape[0]
    words = _words(mem)
    position, group, checksum = cols[fields, 0] >> _3, cols[fields + 1, 0] >> _3, cols[fields + 2, 0] >> _3
    width = np.uint64(fields)
    tags = np.empty(n, np.uint64)
    for i in range(n):
        if i + _NEAR < n:  # ask for cache lines before they are needed: random rows come twice as fast so
            r = np.uint64(rows[i + _NEAR])
            _prefetch(mem, (position + r) << _3)
            _prefetch(mem, (group + r) << _3)
            _prefetch(mem, (checksum + r * width) << _3)
        r = np.uint64(rows[i])
        p, g = words[position + r], words[group + r]  # read once, because a writer may be changing them
        index[0, i], index[1, i] = np.int64(p), np.int64(g)
        tags[i] = _tag(r, p, g)
        bad[i] = np.int64(p) < 0
        sums[i] = _0
    for f in range(first, last):
        offset, size, place = cols[f, 0], cols[f, 1], np.uint64(places[f - first])
        after = min(f + 1, last - 1)  # the entries of the next field come in while this one is copied
        check = checksum + np.uint64(f)
        for i in range(n):
            r = np.uint64(rows[i])
            if size > _64 and i + 1 < n:  # a large entry comes in while the one before is copied
                s = offset + np.uint64(rows[i + 1]) * size
                for j in range((size + _63) >> _6):
                    _prefetch(mem, s + (np.uint64(j) << _6))
            _prefetch(mem, cols[after, 0] + r * cols[after, 1])
            _prefetch(mem, cols[after, 0] + (r + _1) * cols[after, 1] - _1)
            h = _copy(mem, offset + r * size, out, place + np.uint64(i) * size, size)
            stored = words[check + r * width]
            sums[i] += stored
            bad[i] |= stored != _checksum(h, tags[i], f)
    wrong = 0
    for i in range(n):
        wrong += bad[i]
    return wrong


@njit
def find_changed(mem, cols, first, last, rows, index, sums, bad):
    """After `read_rows` for the same rows: bad[i] becomes 1 where position, group or a checksum is another by now.

    A commit between two fields of a row leaves each of them right, and the row wrong. Returns the number of bad rows.
    """
    fields = cols.shape[0] - 3
    words = _words(mem)
    position, group, checksum = cols[fields, 0] >> _3, cols[fields + 1, 0] >> _3, cols[fields + 2, 0] >> _3
    wrong = 0
    for i in range(rows.shape[0]):
        r = np.uint64(rows[i])
        total = _0
        for f in range(first, last):
            total += words[checksum + r * np.uint64(fields) + np.uint64(f)]
        same = total == sums[i] and words[position + r] == np.uint64(index[0, i]) and words[group + r] == np.uint64(index[1, i])
        if not same:
            bad[i] = 1
        wrong += bad[i]
    return wrong


@njit
def read_record(record, cols, row, out, places):
    """Copy the fields of one undo record out as `read_rows` does for row `row`; whether all its checksums hold.

    cols: byte offsets within the record.
    """
    fields = cols.shape[0] - 3
    words = _words(record)
    tag = _tag(np.uint64(row), words[cols[fields, 0] >> _3], words[cols[fields + 1, 0] >> _3])
    for f in range(fields):
        size, place = cols[f, 1], np.uint64(places[f])
        h = _copy(record, cols[f, 0], out, place, size)
        if words[(cols[fields + 2, 0] >> _3) + np.uint64(f)] != _checksum(h, tag, f):
            return False
    return words[cols[fields, 0] >> _3] != _FREE


@inlined
def _survivors(rows, slots, samples, taken):
    """The last sample of each row that is taken, see `keep_last`; slots[r] becomes 1 + the number of the survivor in row r."""
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
    return count


@njit
def keep_last(rows, freed, index, slots, start, samples, taken, positions):
    """The last sample of each row that is taken.

    rows: (n,) int64, the row that sample i takes, or -1. freed: int64, rows to be free. index: the positions of all rows. slots: int32
    per row of the buffer, all 0 before and after. samples, taken, positions: (n,) int64, receive sample, row and stream position
    (start + sample) of each survivor. Returns their number, -1 if some row is outside the buffer, or -2 if one of `freed` is, or is
    not live, taken, or there twice.
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
    """Write the undo records of `rows` (distinct) into mem, and take the checksums about to change off the digests.

    whole: how many of the rows, the first ones, change wholly; the others in the fields f where changing[f] (uint8) is 1.
    stamps: int32 per row of the buffer, or empty: a live row whose stamp differs from `stamp` is new and comes first; all are
    stamped. list_at: where the row numbers go; record_at: the records of live rows, `record` bytes each; free rows come last and
    have none. counts: (4,) int64, receives how many are new, how many live, how many in all, and one past the highest. Returns a
    hash over list and records.
    """
    fields = cols.shape[0] - 3
    words = _words(mem)
    position, checksum = cols[fields, 0] >> _3, cols[fields + 2, 0] >> _3
    listed, width, buckets = list_at >> 3, np.uint64(fields), np.uint64(digests.shape[0])
    for i in range(rows.shape[0]):  # small entries lie far apart: ask for all of them at once
        for c in range(cols.shape[0]):
            if cols[c, 1] <= _64:
                _prefetch(mem, cols[c, 0] + np.uint64(rows[i]) * cols[c, 1])
    done, top = 0, 0
    for kind in range(3):
        for i in range(rows.shape[0]):
            r = rows[i]
            top = max(top, r + 1)
            if words[position + np.uint64(r)] == _FREE:
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
        part, k = np.uint64(record), _0
        for c in range(cols.shape[0]):
            size = cols[c, 1]
            if size > _64 and i + 1 < live:
                s = cols[c, 0] + words[listed + i + 1] * size
                for j in range((size + _63) >> _6):
                    _prefetch(mem, s + (np.uint64(j) << _6))
            s = cols[c, 0] + words[listed + i] * size
            for j in range(size >> _3):
                word = _load(mem, s + (np.uint64(j) << _3))
                _store(mem, at + (np.uint64(j) << _3), word)
                k += GOLDEN
                part += _term(word, k)
            at += size >> _3 << _3
            if size & _7 != _0:  # the bytes left, padded with zeros: the last 8 of the entry without those that were copied
                word = _load(mem, s + size - _8) >> ((_8 - (size & _7)) << _3)
                _store(mem, at, word)
                k += GOLDEN
                part += _term(word, k)
                at += _8
        total = _mix(total + _mix(part))
    for i in range(rows.shape[0]):
        r = np.uint64(rows[i])
        if words[position + r] != _FREE:
            for f in range(fields):
                if i < whole or changing[f] == 1:
                    digests[np.int64(r % buckets)] -= _share(words[checksum + r * width + np.uint64(f)])
    if stamps.shape[0] > 0:
        for i in range(rows.shape[0]):
            stamps[rows[i]] = stamp
    return _mix(total + _hash_words(words, np.uint64(list_at), np.uint64(8 * done)))


save_rows = entry(_save_rows)


@njit
def hash_records(src, list_at, record_at, record, live, count):
    """The hash that `save_rows` returned for these records (src: uint8, the map itself or a copy of the records)."""
    words = _words(src)
    total = _0
    for i in range(live):
        total = _mix(total + _hash_words(words, np.uint64(record_at + i * record), np.uint64(record)))
    return _mix(total + _hash_words(words, np.uint64(list_at), np.uint64(8 * count)))


@njit
def save_freed(mem, cols, rows, at, digests):
    """Write (row, position, group) of `rows`, which are about to become free, to mem[at:]; take their checksums off the digests.

    Their bytes stay where they are, so that is all it takes to undo it. Returns the hash of these words.
    """
    fields = cols.shape[0] - 3
    words = _words(mem)
    position, group, checksum = cols[fields, 0] >> _3, cols[fields + 1, 0] >> _3, cols[fields + 2, 0] >> _3
    target, width, buckets = np.uint64(at) >> _3, np.uint64(fields), np.uint64(digests.shape[0])
    for i in range(rows.shape[0]):
        r, d = np.uint64(rows[i]), target + np.uint64(3 * i)
        words[d], words[d + _1], words[d + _2] = r, words[position + r], words[group + r]
        for f in range(fields):
            digests[np.int64(r % buckets)] -= _share(words[checksum + r * width + np.uint64(f)])
    return _hash_words(words, np.uint64(at), np.uint64(24 * rows.shape[0]))


@njit
def hash_freed(mem, at, count):
    """The hash that `save_freed` returned for `count` rows at mem[at:]."""
    return _hash_words(_words(mem), np.uint64(at), np.uint64(24 * count))


@njit
def restore_freed(src, cols, at, count, mem):
    """Give freed rows their positions and groups back."""
    fields = cols.shape[0] - 3
    words, source = _words(mem), _words(src)
    position, group = cols[fields, 0] >> _3, cols[fields + 1, 0] >> _3
    for i in range(count):
        s = (np.uint64(at) >> _3) + np.uint64(3 * i)
        words[position + source[s]], words[group + source[s]] = source[s + _1], source[s + _2]


@njit
def copy_records(mem, cols, rows, out, at, record):
    """Write the undo records of `rows` to out[at:] (zeros before), `record` bytes each."""
    place = np.uint64(at)
    for c in range(cols.shape[0]):
        offset, size = cols[c, 0], cols[c, 1]
        for i in range(rows.shape[0]):
            _copy(mem, offset + np.uint64(rows[i]) * size, out, place + np.uint64(i) * np.uint64(record), size)
        place += (size + _7) >> _3 << _3


@njit
def hash_log(start, entries):
    """Go on with the hash of a log, `start`, over more entries, (n, 2) int64."""
    h = start
    for i in range(entries.shape[0]):
        h = _mix(_mix(h + np.uint64(entries[i, 0]) * GOLDEN) + np.uint64(entries[i, 1]))
    return h


@njit
def restore_rows(src, cols, list_at, record_at, record, live, use, mem):
    """Write undo records back to the columns of mem where use (uint8) is 1: the first `live` with bytes, others become free."""
    fields = cols.shape[0] - 3
    words, source = _words(mem), _words(src)
    at = np.uint64(record_at)
    for c in range(cols.shape[0]):
        offset, size = cols[c, 0], cols[c, 1]
        for i in range(live):
            if use[i] == 1:
                _copy(src, at + np.uint64(i) * np.uint64(record), mem, offset + source[(list_at >> 3) + i] * size, size)
        at += (size + _7) >> _3 << _3
    for i in range(live, use.shape[0]):
        if use[i] == 1:
            words[(cols[fields, 0] >> _3) + source[(list_at >> 3) + i]] = _FREE


@njit
def exchange_digests(src, cols, list_at, record_at, record, live, use, mem, digests):
    """What `restore_rows` would do to the digests: the rows' present checksums go, the recorded ones come."""
    fields = cols.shape[0] - 3
    words, source = _words(mem), _words(src)
    position, checksum = cols[fields, 0] >> _3, cols[fields + 2, 0] >> _3
    width, buckets = np.uint64(fields), np.uint64(digests.shape[0])
    for i in range(use.shape[0]):
        if use[i] == 0:
            continue
        r = source[(list_at >> 3) + i]
        b = np.int64(r % buckets)
        for f in range(fields):
            if words[position + r] != _FREE:
                digests[b] -= _share(words[checksum + r * width + np.uint64(f)])
            if i < live:  # the checksums end a record
                digests[b] += _share(source[((record_at + (i + 1) * record) >> 3) - fields + f])


@inlined
def _write_field(mem, cols, field, rows, samples, src, positions, groups, digests):
    """Write one field of `rows`, its checksums, and their share of the digests.

    src: uint8; rows[i] gets the bytes of sample samples[i] in it. positions, groups: (n,) int64 of the rows.
    """
    fields = cols.shape[0] - 3
    offset, size = cols[field, 0], cols[field, 1]
    words = _words(mem)
    check = (cols[fields + 2, 0] >> _3) + np.uint64(field)
    width, buckets = np.uint64(fields), np.uint64(digests.shape[0])
    for i in range(rows.shape[0]):
        if size > _64 and i + 1 < rows.shape[0]:  # the next one comes in while this one is copied
            at = np.uint64(samples[i + 1]) * size
            for j in range((size + _63) >> _6):
                _prefetch(src, at + (np.uint64(j) << _6))
        r = np.uint64(rows[i])
        h = _copy(src, np.uint64(samples[i]) * size, mem, offset + r * size, size)
        h = _checksum(h, _tag(r, np.uint64(positions[i]), np.uint64(groups[i])), field)
        words[check + r * width] = h
        digests[np.int64(r % buckets)] += _share(h)


write_field = entry(_write_field)


@inlined
def _write_index(mem, cols, rows, positions, groups):
    """Write positions and groups of `rows`, (n,) int64 each."""
    fields = cols.shape[0] - 3
    words = _words(mem)
    position, group = cols[fields, 0] >> _3, cols[fields + 1, 0] >> _3
    for i in range(rows.shape[0]):
        r = np.uint64(rows[i])
        words[position + r], words[group + r] = np.uint64(positions[i]), np.uint64(groups[i])


write_index = entry(_write_index)


@njit
def commit_rows(
    mem, cols, rows, slots, start, positions, groups, first, s0, s1, s2, s3, seal, head, header_at, most, journal_ready, faulted, at
):  # fmt: skip
    """A commit in one call: `keep_last`, `save_rows`, the journal's seal, `write_field` for up to four fields, `write_index`, the header.

    rows: (n,) int64, the row that sample i takes, or -1; the later of two that take the same one stays. slots: int32 per row of the
    buffer, all 0. Sample i has stream position positions[i], or start + i where `positions` is empty; it is number first + i in
    `groups`, (at least first + n,) int64, and in s0 to s3, the sources of the fields.
    seal, head: words of the journal's seal and of the new header, which goes to mem[header_at:], complete but for what follows from
    the rows. most: rows that may change. journal_ready, faulted: how many records of the journal, and how many rows, have their pages.
    at: (12,) int64: `list_at`, `record_at`, `record` of `save_rows`; where the seal goes; which of its words say how many rows are
    live, how many there are, and the hash; which of the header's are size, end of the rows in use, hash, first digest; how many
    digests there are. Returns how many rows changed; or, nothing having happened, -1 if `rows` are wrong or too many, -2 if pages are
    missing.
    """
    stamps, kept, into = np.empty(0, np.int64), np.empty(rows.shape[0], np.int64), np.empty(rows.shape[0], np.int64)
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
    if count > most:
        return -1
    if top > faulted or min(np.uint64(count), head[at[7]]) > np.uint64(journal_ready):
        return -2
    digests, counts = head[at[10] : at[10] + at[11]], np.empty(4, np.int64)
    if count > 0:
        found = _save_rows(mem, cols, taken, count, s3, stamps, 0, at[0], at[1], at[2], digests, counts)  # s3 is not looked at
        live = np.uint64(counts[1])
        seal[at[4]], seal[at[5]], seal[at[6]] = live, np.uint64(count), found
        _fence(mem)
        seal_block(mem, at[3], seal, np.int64(0))
        _fence(mem)
        for f in range(cols.shape[0] - 3):
            source = s0
            if f == 1:
                source = s1
            elif f == 2:
                source = s2
            elif f == 3:
                source = s3
            _write_field(mem, cols, f, taken, samples, source, places, picked, digests)
        _write_index(mem, cols, taken, places, picked)
        head[at[7]] += np.uint64(count) - live
        head[at[8]] = max(head[at[8]], np.uint64(top))
        _fence(mem)
    seal_block(mem, header_at, head, at[9])
    return count


@njit
def scan_index(mem, cols, capacity, digests):
    """Add the digests of all live rows to `digests`; returns the number of live rows, and one past the highest."""
    fields = cols.shape[0] - 3
    words = _words(mem)
    position, checksum = cols[fields, 0] >> _3, cols[fields + 2, 0] >> _3
    live = 0
    high = 0
    for r in range(capacity):
        if np.int64(words[position + np.uint64(r)]) >= 0:
            live += 1
            high = r + 1
            for f in range(fields):
                digests[r % digests.shape[0]] += _share(words[checksum + np.uint64(r * fields + f)])
    return live, high


@njit
def verify_rows(mem, cols, start, stop, bad):
    """Check the stored checksums of rows start to stop: bad[r - start] (uint8) becomes 1 for a row that fails any."""
    fields = cols.shape[0] - 3
    words = _words(mem)
    position, group, checksum = cols[fields, 0] >> _3, cols[fields + 1, 0] >> _3, cols[fields + 2, 0] >> _3
    for i in range(start, stop):
        r = np.uint64(i)
        bad[i - start] = 0
        if words[position + r] == _FREE:
            continue
        tag = _tag(r, words[position + r], words[group + r])
        for f in range(fields):
            s, size = cols[f, 0] + r * cols[f, 1], cols[f, 1]
            h = _hash(mem, s, size)
            if words[checksum + r * np.uint64(fields) + np.uint64(f)] != _checksum(h, tag, f):
                bad[i - start] = 1
