"""Fixtures that test files of this folder share."""

from __future__ import annotations

import gc
import signal

import pytest
from loaders import PATIENCE, threads, wait_for


@pytest.fixture
def nothing_left():
    """A loader that waits for ever is an error, and so is a thread that outlives the test."""
    if hasattr(signal, "setitimer"):
        kept = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"nothing happened for {PATIENCE} seconds"))
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    before = set(threads())  # of another test that failed
    yield
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, kept)
    gc.collect()
    assert wait_for(lambda: before.issuperset(threads())), "a test left the thread of a loader"
