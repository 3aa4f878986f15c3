"""Kernels of balanced buffers: one reservoir of the largest keys per group, over shared rows.

`groups`, (max_groups, 8) int64, has a record per group in order of appearance (columns below).
`table`, int32, finds them by id. The rows of a group are a skew heap (Sleator and Tarjan 1986) of
their keys: `links`, (capacity, 2) int32, are the children, -1 for none. So all groups share these
arrays of one entry per row, whatever their number and however their quotas move. Free rows below
counters[FRESH] are one more such heap, of their numbers: its root is counters[FREE] - 1. From
counters[FRESH] on all rows are free.
"""

from __future__ import annotations

import numpy as np

from . import compile_kernel, helper
from .hashing import key_of, scramble

# Columns of `groups`. FULL: the group dropped or rejected a sample, and may not grow again.
# EXTRA: the group has one row of the remainder.
ID, HASH, ROOT, HELD, FULL, EXTRA, LEAST = range(7)
COLUMNS = 8
# Entries of `counters`. SHARE: rows of each group, without the remainder. REST: groups that have
# one more, in the heap `rest`.
GROUPS, SHARE, REST, FRESH, FREE, VISITED, LOGGED = range(7)
COUNTERS = 8
_RECENT = 64
# What a quota means.
QUOTA, BORROW, LARGEST = range(3)


@helper
def find_group(groups, table, group, hashed):
    """Return where in `table` a group stands, or would."""
    mask = np.uint64(table.shape[0] - 1)
    at = hashed & mask
    while table[at] >= 0 and groups[table[at], ID] != group:
        at = (at + np.uint64(1)) & mask
    return at


@helper
def _new_group(groups, g, group, hashed):
    for c in range(COLUMNS):
        groups[g, c] = 0
    groups[g, ID], groups[g, HASH], groups[g, ROOT] = group, np.int64(hashed), -1


@helper
def _merge(keys, links, a, b):
    """Return the root of the union of two skew heaps. O(log n) amortised."""
    if a < 0:
        return b
    if b < 0:
        return a
    if keys[b] < keys[a]:
        a, b = b, a
    top = a
    while True:  # a stands right. b and the right child of a go to its left, its left to the right
        right = links[a, 1]
        links[a, 1] = links[a, 0]
        if right < 0:
            links[a, 0] = b
            return top
        if keys[b] < keys[right]:
            right, b = b, right
        links[a, 0] = right
        a = right


@helper
def insert_row(keys, links, groups, g, row, key):
    keys[row] = key
    links[row, 0] = links[row, 1] = -1
    top = _merge(keys, links, np.int64(groups[g, ROOT]), row)
    groups[g, ROOT], groups[g, LEAST] = top, np.int64(keys[top])
    groups[g, HELD] += 1


@helper
def remove_least(keys, links, groups, g):
    """Take the row of the smallest key from a group that has rows."""
    row = groups[g, ROOT]
    top = _merge(keys, links, np.int64(links[row, 0]), np.int64(links[row, 1]))
    groups[g, ROOT] = top
    groups[g, LEAST] = np.int64(keys[top]) if top >= 0 else 0
    groups[g, HELD] -= 1
    return row


@helper
def _replace_least(keys, links, groups, g, key):
    """Give the row of the smallest key another key, and let it sink; returns that row."""
    row = groups[g, ROOT]
    keys[row] = key
    above, place = np.int64(-1), 0
    while True:
        left, right = np.int64(links[row, 0]), np.int64(links[row, 1])
        side = 1 if left < 0 or (right >= 0 and keys[right] < keys[left]) else 0
        child, other = (right, left) if side == 1 else (left, right)
        if child < 0 or keys[child] >= key:
            break
        links[row, 0], links[row, 1] = links[child, 0], links[child, 1]
        links[child, side], links[child, 1 - side] = row, other
        if above < 0:
            groups[g, ROOT] = child
        else:
            links[above, place] = child
        above, place = child, side
    groups[g, LEAST] = np.int64(keys[groups[g, ROOT]])
    return row


@helper
def _add_free(keys, links, counters, row):
    keys[row] = np.uint64(row)
    links[row, 0] = links[row, 1] = -1
    counters[FREE] = _merge(keys, links, counters[FREE] - 1, row) + 1


@helper
def _take_free(keys, links, counters, capacity):
    """Take the lowest free row; -1 without one."""
    row = counters[FREE] - 1
    if row >= 0:
        counters[FREE] = _merge(keys, links, np.int64(links[row, 0]), np.int64(links[row, 1])) + 1
        return row
    row = counters[FRESH]
    if row == capacity:
        return np.int64(-1)
    counters[FRESH] += 1
    return row


@helper
def _rest_push(groups, rest, counters, g, extras):
    """Give group g a row of the remainder if its hash is among the `extras` smallest.

    rest: int64, a heap of the groups that have one, the largest hash on top. Returns the group that
    loses its row, or -1.
    """
    j = counters[REST]
    h = np.uint64(groups[g, HASH])
    if j < extras:
        counters[REST] += 1
        groups[g, EXTRA] = 1
        while j > 0 and np.uint64(groups[rest[(j - 1) // 2], HASH]) < h:
            rest[j] = rest[(j - 1) // 2]
            j = (j - 1) // 2
        rest[j] = g
        return np.int64(-1)
    if j == 0 or h > np.uint64(groups[rest[0], HASH]):
        return np.int64(-1)
    loser = rest[0]
    _rest_sink(groups, rest, j, g)
    groups[loser, EXTRA], groups[g, EXTRA] = 0, 1
    return loser


@helper
def _rest_pop(groups, rest, counters):
    """Take the row of the remainder from the group of the largest hash; that group."""
    loser = rest[0]
    counters[REST] -= 1
    n = counters[REST]
    if n > 0:
        _rest_sink(groups, rest, n, rest[n])
    groups[loser, EXTRA] = 0
    return loser


@helper
def _rest_sink(groups, rest, n, g):
    """Put group g on top of a heap of n in place of what is there, and let it sink."""
    h = np.uint64(groups[g, HASH])
    i = 0
    while 2 * i + 1 < n:
        child = 2 * i + 1
        if child + 1 < n and np.uint64(groups[rest[child + 1], HASH]) > np.uint64(groups[rest[child], HASH]):
            child += 1
        if np.uint64(groups[rest[child], HASH]) <= h:
            break
        rest[i] = rest[child]
        i = child
    rest[i] = g


@compile_kernel
def share(groups, rest, counters, capacity):
    """Work out SHARE and EXTRA of all groups anew. O(groups log groups).

    A group gets capacity // groups rows; the smallest hashes get one more of the remainder.
    """
    n = counters[GROUPS]
    counters[REST] = 0
    counters[SHARE] = capacity // n if n > 0 else 0
    for g in range(n):
        groups[g, EXTRA] = 0
    for g in range(n):
        _rest_push(groups, rest, counters, g, capacity % n)


@helper
def _log(groups, counters, log, g):
    """Note that group g may not grow any more."""
    if groups[g, FULL] == 0:
        groups[g, FULL] = 1
        log[counters[LOGGED], 0], log[counters[LOGGED], 1] = 1, g
        counters[LOGGED] += 1


@helper
def _visit(holder, visited, counters, row, live):
    """Note a row at its first touch in this plan: as row if it was live, as ~row if free."""
    if holder[row] == 0:
        visited[counters[VISITED]] = row if live else ~row
        counters[VISITED] += 1


@helper
def _cut(keys, links, holder, visited, groups, counters, log, g, out):
    """Drop the smallest keys of a group that has more rows than its quota."""
    while groups[g, HELD] > max(counters[SHARE] + groups[g, EXTRA], 0):
        _log(groups, counters, log, g)
        row = remove_least(keys, links, groups, g)
        _visit(holder, visited, counters, row, True)
        if holder[row] > 0:
            out[holder[row] - 1] = -1
        holder[row] = -1
        _add_free(keys, links, counters, row)


@helper
def largest_excess(groups, n, share, salt):
    """Return the group with most rows beyond its quota. O(groups).

    Of several the one of the smallest hash, mixed with `salt` (uint64) unless that is 0.
    """
    best, excess, least = np.int64(0), np.int64(0), np.uint64(0)
    for g in range(n):
        e = groups[g, HELD] - share - groups[g, EXTRA]
        if g > 0 and e < excess:
            continue
        h = np.uint64(groups[g, HASH])
        if salt != np.uint64(0):
            h = scramble(h ^ salt)
        if g == 0 or e > excess or h < least:
            best, excess, least = np.int64(g), e, h
    return best


@compile_kernel
def load_groups(log, groups, table, counters, g0, g1):
    """Fill `groups` and `table` (all -1) from a log, (n, 2) int64. False if it is no such log."""
    for i in range(log.shape[0]):
        what, value = log[i, 0], log[i, 1]
        n = counters[GROUPS]
        if what == 0:
            h = key_of(value, g0, g1)
            at = find_group(groups, table, value, h)
            if table[at] >= 0 or n == groups.shape[0]:
                return False
            table[at] = n
            _new_group(groups, n, value, h)
            counters[GROUPS] = n + 1
        elif what == 1 and 0 <= value < n:
            groups[value, FULL] = 1
        else:
            return False
    return True


@compile_kernel
def index_groups(groups, table, count):
    """Enter the first `count` groups into an empty table (all -1)."""
    for g in range(count):
        table[find_group(groups, table, groups[g, ID], np.uint64(groups[g, HASH]))] = g


@compile_kernel
def load_rows(positions, ids, keys, links, groups, table, counters, k0, k1, g0, g1):
    """Put live rows into the heaps of their groups, the others into that of free rows.

    positions, ids: int64 per row, keys: uint64 per row. Returns False if the group of a row is not
    there.
    """
    counters[FRESH] = positions.shape[0]
    counters[FREE] = 0
    for r in range(positions.shape[0]):
        if positions[r] < 0:
            _add_free(keys, links, counters, np.int64(r))
            continue
        g = table[find_group(groups, table, ids[r], key_of(ids[r], g0, g1))]
        if g < 0:
            return False
        insert_row(keys, links, groups, np.int64(g), np.int64(r), key_of(positions[r], k0, k1))
    return True


@compile_kernel
def plan_balanced(
    keys, links, holder, groups, max_groups, table, rest, counters, log,
    mode, fixed, capacity, k0, k1, g0, g1, start, max_rows, ids, out,
):  # fmt: skip
    """Offer positions start, start + 1, ... of groups ids[i] to the reservoirs of their groups.

    ids, out: (n,) int64; out[i] becomes the row taken, or -1. No row stands there twice. It stops
    after n samples, after `max_rows` of them took a row, or before a group beyond `max_groups`.
    mode: QUOTA, a group holds no more than its quota. BORROW, it may take free rows beyond, until
    others need them. LARGEST, it takes free rows, then rows of the largest group, until it has been
    that itself. fixed: whether SHARE stays as it is. log: (2 * groups, 2) int64, receives LOGGED
    entries to append to the file's log. holder: int32 per row, all 0 before and after. Returns the
    samples used, and the rows that were live and are free now.
    """
    visited = np.empty(capacity, np.int64)  # of which only the front is ever touched
    counters[VISITED] = counters[LOGGED] = 0
    used = out.shape[0]
    taken = 0
    recent = np.empty(_RECENT, np.int64)  # groups met, by the last bits of their ids
    for i in range(_RECENT):
        recent[i] = -1
    for i in range(out.shape[0]):
        if taken == max_rows:
            used = i
            break
        g = recent[ids[i] & (_RECENT - 1)]
        if g < 0 or groups[g, ID] != ids[i]:
            h = key_of(ids[i], g0, g1)
            at = find_group(groups, table, ids[i], h)
            g = recent[ids[i] & (_RECENT - 1)] = np.int64(table[at])
        if g < 0:
            g = counters[GROUPS]
            if g >= max_groups:
                used = i
                break
            table[at] = recent[ids[i] & (_RECENT - 1)] = g
            _new_group(groups, g, ids[i], h)
            counters[GROUPS] = g + 1
            log[counters[LOGGED], 0], log[counters[LOGGED], 1] = 0, ids[i]
            counters[LOGGED] += 1
            if not fixed:
                n = g + 1
                if counters[SHARE] == capacity // n:  # a few groups lose their row of the remainder
                    loser = _rest_push(groups, rest, counters, g, counters[REST] + 1)
                    while counters[REST] > capacity % n:
                        loser = _rest_pop(groups, rest, counters)
                        if mode == QUOTA:
                            _cut(keys, links, holder, visited, groups, counters, log, loser, out)
                else:
                    share(groups, rest, counters, capacity)
                    if mode == QUOTA:
                        for other in range(g):
                            _cut(keys, links, holder, visited, groups, counters, log, other, out)
        key = key_of(start + i, k0, k1)
        out[i] = -1
        if groups[g, FULL] != 0 and (groups[g, HELD] == 0 or key <= np.uint64(groups[g, LEAST])):
            continue
        row = np.int64(-1)
        sunk = False
        if groups[g, FULL] == 0:
            wants = groups[g, HELD] < counters[SHARE] + groups[g, EXTRA]
            if wants or mode != QUOTA:
                row = _take_free(keys, links, counters, capacity)
                if row >= 0:
                    _visit(holder, visited, counters, row, False)
            if row < 0 and mode == LARGEST:
                victim = largest_excess(groups, counters[GROUPS], np.int64(0), key)
                for other in range(counters[GROUPS]):
                    if groups[other, HELD] == groups[victim, HELD]:
                        _log(groups, counters, log, other)
                wants = groups[g, FULL] == 0
            if row < 0 and wants and mode != QUOTA:
                if mode == BORROW:
                    victim = largest_excess(groups, counters[GROUPS], counters[SHARE], np.uint64(0))
                if victim != g and groups[victim, HELD] > 0:
                    _log(groups, counters, log, victim)
                    row = remove_least(keys, links, groups, victim)
                    _visit(holder, visited, counters, row, True)
            if row < 0:
                _log(groups, counters, log, g)
        if row < 0 and groups[g, FULL] != 0 and groups[g, HELD] > 0 and key > np.uint64(groups[g, LEAST]):
            row = _replace_least(keys, links, groups, g, key)
            sunk = True
            _visit(holder, visited, counters, row, True)
        if row >= 0:
            if holder[row] > 0:
                out[holder[row] - 1] = -1
            if not sunk:
                insert_row(keys, links, groups, g, row, key)
            holder[row] = i + 1
            out[i] = row
            taken += 1
    freed = 0
    for v in range(counters[VISITED]):
        row = visited[v]
        live = row >= 0
        if not live:
            row = ~row
        if live and holder[row] < 0:
            visited[freed] = row
            freed += 1
        holder[row] = 0
    return used, visited[:freed]


@compile_kernel
def keep_balanced(keys, links, groups, counters, capacity, mode, lost):
    """Take rows of the smallest keys away, for a smaller `capacity`; returns their number.

    lost: int64, receives them. QUOTA takes of every group what exceeds its quota. Other modes take
    from the group with the largest excess, until the rest fits.
    """
    n = counters[GROUPS]
    count = 0
    held = 0
    for g in range(n):
        while mode == QUOTA and groups[g, HELD] > max(counters[SHARE] + groups[g, EXTRA], 0):
            groups[g, FULL] = 1
            lost[count] = remove_least(keys, links, groups, g)
            count += 1
        held += groups[g, HELD]
    while held > capacity:
        g = largest_excess(groups, n, counters[SHARE] if mode == BORROW else np.int64(0), np.uint64(0))
        groups[g, FULL] = 1
        lost[count] = remove_least(keys, links, groups, g)
        count += 1
        held -= 1
    return count
