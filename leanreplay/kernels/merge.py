"""Kernels of merging: the best samples of each group among all offered, in bounded heaps."""

from __future__ import annotations

from . import compile_kernel
from .heaps import is_worse, sift_down, sift_up, sink


@compile_kernel
def offer(keys, positions, groups, rows, source, starts, counts, best, held, places):
    """Offer n samples to the heaps of their groups, the worst of each on top.

    keys: uint64, positions, rows, groups: int64, (n,) each; groups[i] is the number of a heap.
    Heap g has counts[g] entries, which begin at starts[g] (both int64) of best (uint64, keys), held
    (int64, positions) and places (int64, source | row). It ends at starts[g + 1].
    """
    for i in range(keys.shape[0]):
        g = groups[i]
        a, b, n = starts[g], starts[g + 1], counts[g]
        key, position = keys[i], positions[i]
        if n < b - a:
            sift_up(best[a:b], held[a:b], places[a:b], n, key, position, source | rows[i])
            counts[g] = n + 1
        elif n > 0 and is_worse(best[a], held[a], key, position):
            sift_down(best[a:b], held[a:b], places[a:b], n, 0, key, position, source | rows[i])


@compile_kernel
def sort_places(held, places):
    """Sort both arrays (int64) by `held`, whose values are distinct, in place.

    A heapsort, because `argsort` would need half as much memory again. The heap has the smallest
    on top, so it holds the values inverted.
    """
    n = held.shape[0]
    for i in range(n):
        held[i] = ~held[i]
    for i in range(n // 2 - 1, -1, -1):
        sink(held, places, n, i)
    for last in range(n - 1, -1, -1):
        held[0], held[last] = held[last], ~held[0]
        places[0], places[last] = places[last], places[0]
        sink(held, places, last, 0)
