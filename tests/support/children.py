"""Forked children, which share all that is loaded: what they return, or the signal that ended them."""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable
from typing import Any

from leanreplay.storage import locks


def child(work: Callable[[int], Any], limit: int = 60) -> tuple[int, int]:
    """Fork; `work(pipe)` runs in the child, and what it returns, unless None, is written to the pipe as JSON. Its pid and the pipe.

    limit: seconds until SIGALRM ends a child that hangs.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    code = 70
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(limit)
        locks.PATIENCE = limit / 2  # on a busy machine a writer may stand still for long
        os.close(read)
        result = work(write)
        if result is not None:
            os.write(write, json.dumps(result).encode())
        code = 0
    except BaseException:
        os.write(write, ("\nERROR " + traceback.format_exc()).encode()[-60_000:])
    finally:
        os._exit(code)


def outcome(pid: int, read: int) -> tuple[int, str]:
    """Wait for a child: the signal that ended it, or 0, and what it wrote. A child that failed fails the test."""
    text = b""
    while data := os.read(read, 1 << 16):
        text += data
    os.close(read)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status), text.decode()
    assert os.WEXITSTATUS(status) == 0, text.decode()
    return 0, text.decode()


def result(pid: int, read: int) -> Any:
    """Wait for a child that is to end well; what it returned."""
    number, text = outcome(pid, read)
    assert number == 0, f"child ended by {signal.Signals(number).name}: {text}"
    return json.loads(text or "null")


def killed(pid: int, read: int) -> str:
    """Wait for a child that is to end by SIGKILL; what it wrote."""
    number, text = outcome(pid, read)
    assert number == signal.SIGKILL, (number, text)
    return text
