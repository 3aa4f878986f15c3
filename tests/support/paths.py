"""Where things lie: the project, its examples, stored files, and what a fresh interpreter needs to import the tests."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = ROOT / "tests"
DATA = TESTS / "data"
EXAMPLES = ROOT / "examples"
MEMORY = "/dev/shm"


def in_memory() -> str | None:
    """A folder in memory for files whose durability is not what is tested; None where there is none, or little room."""
    return MEMORY if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2**30 else None


def import_path(file: str) -> str:
    """The PYTHONPATH with which a fresh interpreter can import this test file, its helpers and the library."""
    return os.pathsep.join(map(str, (Path(file).parent, TESTS / "support", ROOT)))
