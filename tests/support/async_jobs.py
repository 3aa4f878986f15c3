"""Jobs and sources for an AsyncReservoir."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from concurrent.futures import wait

from torch.utils.data import Dataset

from leanreplay.torch import AsyncReservoir

# A fork server hands over what a spawned process would be sent, but has torch imported already.
METHODS = [m for m in ("fork", "forkserver") if m in multiprocessing.get_all_start_methods()]
PATIENCE = 120  # seconds: no test waits so long unless it is wrong


def identity(sample):
    return sample


def threads(source, function=identity, most=10, **options):
    """A reservoir whose items are what the function returned, loaded by threads."""
    return AsyncReservoir(source, function, most, **{"executor": "thread", "collate_fn": None, **options})


def processes(source, function=identity, most=10, **options):
    return AsyncReservoir(source, function, most, **{"mp_context": "fork", "collate_fn": None, **options})


def settle(reservoir):
    """Wait until every job that was begun is done, and no longer held by its worker."""
    assert not wait(list(reservoir._intake.jobs.pending), PATIENCE).not_done


class Paths(Dataset):
    """Map-style, and without an end that __getitem__ would know."""

    def __init__(self, n):
        self.n = n
        self.closed = 0

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return {"uid": i}

    def close(self):
        self.closed += 1


class Again:
    """Can be iterated again and again; says how often it was."""

    def __init__(self, n):
        self.n, self.passes = n, 0

    def __iter__(self):
        self.passes += 1
        yield from range(self.n)


class Odd(Exception):
    """Pickles, but does not unpickle."""

    def __init__(self, a, b):
        super().__init__(f"odd {a} {b}")


def fails(i):
    if i == 2:
        raise KeyError("no such volume")
    if i == 5:
        raise Odd(1, 2)
    if i == 7:
        sys.exit("not so fast")
    return i


def nothing_left():
    assert multiprocessing.active_children() == []
    assert [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon] == []
