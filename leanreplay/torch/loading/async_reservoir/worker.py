"""What runs in a worker: a job; and in a worker process, the loop that takes jobs from a pipe."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pickle
import random
import signal
import threading
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Outcome = tuple[str | None, Any]  # (None, result), or (traceback, exception)


def attempt(function: Callable[[Any], Any], sample: Any) -> Outcome:
    """Load a sample; an exception of any kind is an outcome too."""
    try:
        return None, function(sample)
    except BaseException as error:
        return traceback.format_exc(), error


def serve(pipe: Any, function: Any) -> None:
    """Be a worker process: answer each job, (seed, pickled sample), until the pipe ends.

    function: pickled, unless it was forked. It is unpickled within a job, so that an error of that
    belongs to a sample.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends these
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork, and workers share the cores

    def load(sample: bytes) -> Any:
        nonlocal function
        if isinstance(function, bytes):
            function = pickle.loads(function)
        return function(pickle.loads(sample))

    with contextlib.suppress(EOFError, OSError):  # the parent has hung up
        while True:
            seed = pipe.recv()
            random.seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)
            torch.manual_seed(seed >> 1)
            pipe.send_bytes(_answer(load, pipe.recv_bytes()))


def _end_with_parent() -> None:
    """End with a killed parent: other workers hold the parent's pipes open, so none would end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _answer(load: Callable[[bytes], Any], sample: bytes) -> bytes:
    """Run a job and pickle its outcome, an exception by itself: perhaps it cannot be unpickled.

    multiprocessing's own pickling would send tensors by shared memory, with a descriptor each for
    as long as they live.
    """
    text, value = attempt(load, sample)
    if text is None:
        try:
            return dumps((None, value))
        except BaseException as error:
            text, value = traceback.format_exc(), error
    packed = None
    with contextlib.suppress(Exception):
        packed = dumps(value)
    return dumps((text, packed))


def read_answer(answer: bytes) -> Outcome:
    """Unpickle the outcome of a job. An exception that cannot be unpickled is None."""
    try:
        text, value = pickle.loads(answer)
    except Exception as unreadable:
        return traceback.format_exc(), unreadable
    if text is None:
        return None, value
    error = None
    with contextlib.suppress(Exception):
        error = pickle.loads(value)
    return text, error if isinstance(error, BaseException) else None


class _Pickler(pickle.Pickler):
    """Sends plain tensors as arrays, and a view without the tensor that it is a view of.

    For small tensors this is twenty times as fast as torch's own way.
    """

    def reducer_override(self, value: Any) -> Any:
        if type(value) is torch.Tensor:
            with contextlib.suppress(TypeError, RuntimeError):  # bfloat16, sparse, ...
                return _tensor, (value.numpy(),)
        return NotImplemented


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(array)  # itself it would be pickled at length


def dumps(value: Any) -> bytes:
    """Pickle a value."""
    file = io.BytesIO()
    _Pickler(file, 5).dump(value)
    return file.getvalue()
