"""Kernels of merging: the best samples of each group among all that are offered, in bounded heaps."""

from __future__ import annotations

from . import njit


@njit
def _worse(key, position, than, other):
    """Whether a sample of this key and position leaves before another: the smaller key does, of equal ones the younger."""
    return key < than or (key == than and position > other)


@njit
def offer(keys, positions, groups, rows, source, starts, counts, best, held, places):
    """Offer n samples to the heaps of their groups, the worst of each on top.

    keys: uint64, positions, rows: int64, groups: int64, each (n,); groups[i] is the number of a heap. Heap g lies in
    starts[g]:starts[g + 1] of best (uint64: keys), held (int64: positions) and places (int64: source | row), and has counts[g] entries.
    """
    for i in range(keys.shape[0]):
        g = groups[i]
        first, n, room = starts[g], counts[g], starts[g + 1] - starts[g]
        key, position = keys[i], positions[i]
        if n < room:
            j = n
            while j > 0:
                p = (j - 1) // 2
                if not _worse(key, position, best[first + p], held[first + p]):
                    break
                best[first + j], held[first + j], places[first + j] = best[first + p], held[first + p], places[first + p]
                j = p
            counts[g] = n + 1
        elif n > 0 and _worse(best[first], held[first], key, position):
            j = 0
            while 2 * j + 1 < n:
                c = 2 * j + 1
                if c + 1 < n and _worse(best[first + c + 1], held[first + c + 1], best[first + c], held[first + c]):
                    c += 1
                if not _worse(best[first + c], held[first + c], key, position):
                    break
                best[first + j], held[first + j], places[first + j] = best[first + c], held[first + c], places[first + c]
                j = c
        else:
            continue
        best[first + j], held[first + j], places[first + j] = key, position, source | rows[i]


@njit
def sort_places(held, places):
    """Sort both arrays by `held` (int64, distinct), in place: a heapsort, because `argsort` would need half as much memory again."""
    n = held.shape[0]
    for i in range(n // 2 - 1, -1, -1):
        _sink(held, places, i, n)
    for last in range(n - 1, 0, -1):
        held[0], held[last] = held[last], held[0]
        places[0], places[last] = places[last], places[0]
        _sink(held, places, 0, last)


@njit
def _sink(held, places, i, n):
    position, place = held[i], places[i]
    while 2 * i + 1 < n:
        c = 2 * i + 1
        if c + 1 < n and held[c + 1] > held[c]:
            c += 1
        if held[c] < position:
            break
        held[i], places[i] = held[c], places[c]
        i = c
    held[i], places[i] = position, place
