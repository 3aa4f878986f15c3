"""Commands that only look at a buffer: info, check, head, watch, plot."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np

from .. import plot
from ..buffers.base import DataBuffer
from ..buffers.registry import open_buffer


def add_commands(commands: Any) -> None:
    """Add the parsers of these commands."""
    info = commands.add_parser("info", help="what a buffer is and holds")
    info.add_argument("file")
    info.add_argument("--json", action="store_true", help="for programs")
    info.set_defaults(run=run_info)

    check = commands.add_parser("check", help="read and verify everything; exit status 0 fine, 1 damaged, 2 not readable")
    check.add_argument("file")
    check.set_defaults(run=run_check)

    head = commands.add_parser("head", help="print the first samples, in the order of rows")
    head.add_argument("file")
    head.add_argument("-n", type=int, default=5, help="how many (default: 5)")
    head.set_defaults(run=run_head)

    watch = commands.add_parser("watch", help="a line now and then while another process trains; ends with Ctrl-C")
    watch.add_argument("file")
    watch.add_argument("--every", type=float, default=1.0, help="seconds between two lines (default: 1)")
    watch.add_argument("--lines", type=int, help="end after so many lines")
    watch.set_defaults(run=run_watch)

    plot = commands.add_parser("plot", help="draw composition, ages and sizes of groups (needs matplotlib)")
    plot.add_argument("file")
    plot.add_argument("--out", required=True, help="a .png, .pdf or .svg")
    plot.set_defaults(run=run_plot)


def facts(buffer: DataBuffer) -> dict[str, Any]:
    """Return what `info` tells, as plain values."""
    found: dict[str, Any] = {
        "class": type(buffer).__name__,
        "path": buffer.path,
        "max_size": buffer.max_size,
        "held": len(buffer),
        "seen": buffer.seen,
        "seed": buffer.seed,
        "stream": buffer.stream,
        "bytes": buffer.nbytes,
        "fields": {} if buffer.schema is None else {f.name: f"{f.dtype}{list(f.shape)}" for f in buffer.schema.fields},
    }
    if len(buffer):
        ages = plot.ages_of(buffer)
        found["age"] = {"youngest": int(ages.min()), "median": int(np.median(ages)), "oldest": int(ages.max())}
    sizes = plot.sizes_of(buffer)
    if sizes:
        found["groups"] = {str(group): size for group, size in sorted(sizes.items())}
    return found


def run_info(arguments: argparse.Namespace) -> int:
    with open_buffer(arguments.file) as buffer:
        found = facts(buffer)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    room = "" if found["max_size"] is None else f" of {found['max_size']:,} rows"
    print(f"{found['class']}  {found['path']}")
    print(f"holds    {found['held']:,}{room}, of {found['seen']:,} samples seen")
    print(f"bytes    {found['bytes']:,}")
    print(f"seed     {found['seed']}, stream {found['stream']}")
    for name, what in found["fields"].items():
        print(f"field    {name:24s} {what}")
    if "age" in found:
        print("age      youngest {youngest:,}, median {median:,}, oldest {oldest:,} samples ago".format(**found["age"]))
    for group, size in list(found.get("groups", {}).items())[:20]:
        print(f"group    {group:>8s} {size:8,}  {'#' * round(40 * size / max(found['groups'].values()))}")
    if len(found.get("groups", {})) > 20:
        print(f"         ... and {len(found['groups']) - 20} more groups")
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    with open_buffer(arguments.file) as buffer:
        problems = buffer.check()
        held = len(buffer)
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems" if problems else f"fine: {held:,} samples verified", file=sys.stderr)
    return 1 if problems else 0


def run_head(arguments: argparse.Namespace) -> int:
    with open_buffer(arguments.file) as buffer:
        for i in range(min(arguments.n, len(buffer))):
            print(f"{i}: {shown(buffer[i])}")
    return 0


def shown(value: Any) -> str:
    """Return a sample in one line: small leaves as they are, large ones by shape and range."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(shown, value)) + ")"
    array = np.asarray(value)
    if array.size <= 10:
        return str(array.tolist())
    spread = f" {array.min():.4g}..{array.max():.4g}" if array.dtype.kind in "iufb" else ""
    return f"{array.dtype}{list(array.shape)}{spread}"


def run_watch(arguments: argparse.Namespace) -> int:
    with open_buffer(arguments.file) as buffer:
        seen, then, lines = buffer.seen, time.monotonic(), 0
        while arguments.lines is None or lines < arguments.lines:
            time.sleep(arguments.every)
            now, clock = buffer.seen, time.monotonic()
            sizes = " ".join(f"{group}:{size}" for group, size in sorted(plot.sizes_of(buffer).items())[:10])
            print(f"held {len(buffer):,}  seen {now:,}  {(now - seen) / (clock - then):,.0f} samples/s  {sizes}".rstrip(), flush=True)
            seen, then, lines = now, clock, lines + 1
    return 0


def run_plot(arguments: argparse.Namespace) -> int:
    with open_buffer(arguments.file) as buffer:
        plot.overview(buffer, arguments.out)
    return 0
