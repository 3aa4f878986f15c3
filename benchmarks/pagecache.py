"""Take a file out of the page cache although it is mapped, and see whether it is out. Linux; no root needed."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from pathlib import Path

import numpy as np

_MADV_DONTNEED = 4  # of a shared mapping of a file: unmaps the pages, loses nothing


def available() -> bool:
    """Whether this system has what it takes."""
    return hasattr(os, "posix_fadvise") and os.path.exists("/proc/self/maps")


def forget(where: Path) -> float:
    """Drop a file, or all files of a folder, from the page cache, mapped by this process or not; the part that stayed, 0 to 1.

    Tries for a second: pages that are being written, or just were, do not leave at once.
    """
    for _ in range(20):
        _drop(where)
        left = resident(where)
        if left < 0.001:
            break
        time.sleep(0.05)
    return left


def _drop(where: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    files = [where] if where.is_file() else [f for f in where.rglob("*") if f.is_file()]
    numbers = {str(f.stat().st_ino) for f in files}  # its path there may be another: the name that it was made under
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            parts = line.split(maxsplit=5)
            if parts[4] in numbers and parts[1].endswith("s"):  # of a like-numbered file elsewhere nothing is lost
                start, stop = (int(n, 16) for n in parts[0].split("-"))
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_DONTNEED)
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def resident(where: Path) -> float:
    """The part of a file, or of all files of a folder, that is in the page cache: 0 to 1."""
    libc = ctypes.CDLL(None, use_errno=True)
    files = [where] if where.is_file() else [f for f in where.rglob("*") if f.is_file()]
    pages = found = 0
    for file in files:
        size = file.stat().st_size
        if size:
            with open(file, "rb") as opened, mmap.mmap(opened.fileno(), size, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED) as mapped:
                view = np.frombuffer(mapped, np.uint8)
                state = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
                address = ctypes.c_void_p(view.ctypes.data)
                libc.mincore(address, ctypes.c_size_t(size), state.ctypes.data_as(ctypes.c_void_p))
                pages, found = pages + state.shape[0], found + int((state & 1).sum())
                del view
    return found / max(1, pages)
