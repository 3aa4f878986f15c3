"""Checksums: hashes of bytes, of rows and of logs, and blocks that carry a hash of themselves.

The hash of n bytes is a sum over its 8-byte words, then over the bytes left. So the loops run in
vector registers. Their indices are unsigned: a test for negative ones would stay in the loop.
"""

from __future__ import annotations

import numpy as np

from . import compile_kernel, helper
from .hashing import GOLDEN
from .memory import as_words, copy_memory, load_word

_M0 = np.uint64(0xFF51AFD7ED558CCD)
_M1 = np.uint64(0xC4CEB9FE1A85EC53)
_LOW = np.uint64(0xFFFFFFFF)
_0, _1, _3, _32, _33 = (np.uint64(i) for i in (0, 1, 3, 32, 33))


@helper
def mix(x):
    """Scramble a uint64 by the finaliser of MurmurHash3, a bijection."""
    x = (x ^ (x >> _33)) * _M0
    x = (x ^ (x >> _33)) * _M1
    return x ^ (x >> _33)


@helper
def hash_word(word, k):
    """Return what word i adds to a hash, where k is (i + 1) * GOLDEN.

    It is word + k, plus the product of the two halves of that: no change of a single byte leaves
    it the same. Loops count k up, because a vector multiplication for each word would cost more
    than all the rest.
    """
    y = word + k
    return y + (y & _LOW) * (y >> _32)


@helper
def hash_bytes(src, s, n):
    """Return the hash of n bytes at src[s:] (uint8 array, uint64 indices)."""
    total = n
    k = _0
    whole = n >> _3 << _3
    for i in range(n >> _3):
        k += GOLDEN
        total += hash_word(load_word(src, s + (np.uint64(i) << _3)), k)
    for i in range(whole, n):
        total += hash_word(np.uint64(src[s + i]), (i + _1) * GOLDEN)
    return mix(total)


@helper
def copy_bytes(src, s, dst, d, n):
    """Copy n bytes from src[s:] to dst[d:]; the hash of the copy, which is in the cache.

    Not of the source: somebody may be changing that.
    """
    copy_memory(dst, d, src, s, n)
    return hash_bytes(dst, d, n)


@helper
def hash_words(words, s, n):
    """Return the hash of n bytes, a multiple of 8, from byte s of `words` (uint64)."""
    total = n
    first = s >> _3
    k = _0
    for i in range(n >> _3):
        k += GOLDEN
        total += hash_word(words[first + i], k)
    return mix(total)


@helper
def row_identity(row, position, group):
    """Return one word for what a row is: its number, position and group (all uint64)."""
    return mix(mix(row * GOLDEN ^ group) + position)


@helper
def checksum_of(data, identity, field):
    """Return the checksum of a row's field from the hash of its bytes and the row's identity."""
    return mix((data + np.uint64(field)) ^ identity)


@helper
def digest_of(checksum):
    """Return what a checksum adds to the digest of its bucket."""
    return mix(checksum ^ GOLDEN)


@compile_kernel
def seal_block(mem, at, words, state):
    """Write a block to mem[at:]. Its last word is the hash of the others: valid or not, as a whole.

    mem: uint8. words: (n,) uint64, whose last word is replaced. If state > 0, words[state] is
    replaced too, by the hash of the words between it and the last.
    """
    last = words.shape[0] - 1
    if state > 0:
        words[state] = hash_words(words, np.uint64(8 * (state + 1)), np.uint64(8 * (last - state - 1)))
    words[last] = hash_words(words, np.uint64(0), np.uint64(8 * last))
    target = as_words(mem)
    for i in range(last + 1):  # a slice assignment would take 2 s to compile
        target[(at >> 3) + i] = words[i]


@compile_kernel
def read_block(mem, at, words):
    """Copy a sealed block from mem[at:] (uint8) to `words`, (n,) uint64; whether its seal holds."""
    last = words.shape[0] - 1
    source = as_words(mem)
    for i in range(last + 1):
        words[i] = source[(at >> 3) + i]
    return words[last] == hash_words(words, np.uint64(0), np.uint64(8 * last))


@compile_kernel
def hash_log(start, entries):
    """Continue the hash of a log, `start` (uint64), over more entries, (n, 2) int64."""
    h = start
    for i in range(entries.shape[0]):
        h = mix(mix(h + np.uint64(entries[i, 0]) * GOLDEN) + np.uint64(entries[i, 1]))
    return h
