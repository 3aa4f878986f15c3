"""Buffers whose files are stored, and what must be in them."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
from paths import DATA

import leanreplay as lr
from leanreplay.storage import layout as fmt

GROUPED = os.path.join(DATA, "grouped_v1.h5.gz")


def batch(start, n):
    """Contents that follow from the position, of several dtypes and nested."""
    p = np.arange(start, start + n)
    image = (p[:, None, None] * 7 + np.arange(6).reshape(2, 3)).astype(np.uint8)
    words = np.char.encode(np.char.add("sample ", p.astype(str)), "utf-8").astype("S12")
    extra = [p % 2 == 0, (p[:, None] * np.array([0.5, -1])).astype(np.float16), p * (1 + 2j), words]
    return {"image": image, "label": p % 3, "more": (extra, p.astype(np.int8)[:, None])}


def logits(start, n):
    return {"logits": np.arange(start, start + n, dtype=np.float32)[:, None] + np.arange(2, dtype=np.float32)}


def feed(buffer, start, n):
    buffer.add(batch(start, n), metadata=logits(start, n))


def write_stored_file(path):
    with lr.ReservoirBuffer(6, path, seed=7, stream=3) as buffer:
        feed(buffer, 0, 40)
    os.unlink(path + ".lock")


def groups(start, n):
    """Labels of ever more classes: 7 after 60 samples, the last of a single one; negative and large ones among them."""
    p = np.arange(start, start + n)
    return np.where(p == 59, 11, np.array([-5, 0, 2**40, 3, 7, 8, 9, -(2**63), 1, 2])[p % (1 + p // 10)])


def feed_grouped(buffer, start, n):
    buffer.add(batch(start, n), metadata=logits(start, n), group=groups(start, n))


def write_grouped_file(path):
    with lr.ClassBalancedBuffer(15, path, seed=7, stream=3) as buffer:
        for start in range(0, 60, 10):
            feed_grouped(buffer, start, 10)
    os.unlink(path + ".lock")


GROUP_SIZES = {-5: 2, 0: 2, 2**40: 2, 3: 2, 7: 2, 8: 1, 11: 1}
LOG = [[0, -5], [0, 0], [1, 0], [0, 2**40], [1, 1], [0, 3], [1, 2], [0, 7], [1, 3], [0, 8], [1, 4], [0, 11]]


def table_of(path):
    with open(path, "rb") as file:
        data = file.read()
    return fmt.decode(lambda at, n: data[at : at + n], len(data), path)


def overwrite(path, at, data):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def crafted(table, **changes):
    """The table with changes, checksummed as if a hostile program had written it."""
    return dataclasses.replace(table, **changes).encode()
