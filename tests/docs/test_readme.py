"""The README's code blocks run as written, in order, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

from interpreter import Script
from paths import ROOT

README = ROOT / "README.md"


def test_readme_blocks_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    for i, block in enumerate(blocks):
        # Nothing that is shown of resuming may end with the process.
        run = Script("import warnings\nwarnings.simplefilter('error', UserWarning)\n" + block, cwd=tmp_path)
        _, errors = run.communicate(120)
        assert run.returncode == 0, f"block {i}:\n{block}\n{errors}"
    assert (tmp_path / "replay.h5").exists()


def test_readme_names_only_what_exists() -> None:
    text = README.read_text(encoding="utf-8")
    for name in re.findall(r"(?:examples|benchmarks|leanreplay)/[\w/]+\.(?:py|md)", text):
        assert (README.parent / name).exists(), name
