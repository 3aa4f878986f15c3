"""Parses the command line, runs one command, and turns errors into one line and an exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import LeanReplayError
from . import look, write

EPILOG = """examples:
  leanreplay info replay.h5                      what it is, what it holds
  leanreplay check replay.h5 && echo fine        reads and verifies everything
  leanreplay head replay.h5 -n 3                 the first samples
  leanreplay merge rank0.h5 rank1.h5 --out all.h5
  leanreplay export replay.h5 --to npz --out replay.npz
  leanreplay plot replay.h5 --out replay.png
  leanreplay watch replay.h5                     while another process trains

exit status: 0 fine, 1 the file has a problem, 2 the command could not be run"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each sets `run`, a function of the parsed arguments."""
    top = argparse.ArgumentParser(
        "leanreplay",
        description="Look at, check and convert replay buffers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"leanreplay {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for room in (look, write):
        room.add_commands(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    arguments = parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except LeanReplayError as error:
        print(f"leanreplay: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `leanreplay head ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
