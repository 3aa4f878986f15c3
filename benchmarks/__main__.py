"""The whole suite beside its rivals: `python -m benchmarks [--quick] [--only NAME] [--data DIR] [--folder DIR] [--out DIR]`.

Measures every work in turn with its rivals, and writes RESULTS.md and ratios.png into --out (default: this folder). A --quick run is
smaller and shorter, so it writes RESULTS-quick.md and ratios-quick.png beside them; --only prints and writes nothing.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
import traceback
from pathlib import Path

from benchmarks import report, rivals
from benchmarks.common import machine, table, write_section
from benchmarks.compare import Lines, Options, Skipped
from benchmarks.starting import starting
from benchmarks.suite import WORKS

_HERE = Path(__file__).parent
_INTRO = """
## Beside the alternatives

Every work was measured in turn with its rivals, each round in another order (who comes after whom matters: it finds the caches as the
other left them), after a first round that only checked that each holds and returns the right samples. Figures are medians (lower and
upper quartile; n repetitions). Samples are CIFAR-shaped: uint8 3x32x32, int64, float32[10]. leanreplay's buffers are files, decide for
each sample, and verify the checksum of every row that is read.

torchrl and cpprb have no reservoir: their plain rings in memory-mapped files stand in. Avalanche's buffers lie in memory and hold
references to datasets. renate is left out: none of its releases installs on Python 3.11 or later.
"""


def main() -> int:
    """Run, print, write. Returns 1 if a work failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller works and fewer repetitions: under 2 minutes")
    parser.add_argument("--only", action="append", choices=[*WORKS, "start"], help="one work; may be given several times")
    parser.add_argument("--data", type=Path, default=None, help="a folder with MNIST in IDX files (default: scikit-learn's digits)")
    parser.add_argument("--folder", default=None, help="where the buffers lie (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=_HERE, help="where the results go")
    options = parser.parse_args()
    began = time.perf_counter()
    chosen = options.only or [*WORKS, "start"]
    lines: Lines = []
    failed = False
    for name, measure in WORKS.items():
        if name not in chosen:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=options.folder, ignore_cleanup_errors=True) as folder:
            try:
                found = measure(Options(options.quick, folder, options.data))
            except Exception as error:
                traceback.print_exc()
                found = [Skipped(name, "all", f"failed: {type(error).__name__}: {error}")]
                failed = True
        lines += found
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    text = f"{report.comparisons(lines)}\n\n{report.summary(lines)}\n" if lines else ""
    if "start" in chosen:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            header, rows = starting(options.quick, folder)
        text += f"\n### Before and beside the work\n\n{table(rows, header)}\n"
    versions = machine("torch", *[distribution for _, distribution in rivals.MODULES.values()], "tensordict")
    command = shlex.join(["python", "-m", "benchmarks", *("DIR" if a.startswith("/") else a for a in sys.argv[1:])])
    told = f"`{command}`, {time.perf_counter() - began:.0f} s, on {versions}."
    if options.quick:
        told += " Smaller and shorter than the full run, for which the wanted ratios were set."
    print(f"{told}\n\n{text}")
    if not options.only:
        suffix = "-quick" if options.quick else ""
        picture = f"ratios{suffix}.png"
        report.picture(lines, options.out / picture)
        write_section(options.out / f"RESULTS{suffix}.md", "rivals", f"{_INTRO}\n{told}\n\n![ratios]({picture})\n\n{text}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
