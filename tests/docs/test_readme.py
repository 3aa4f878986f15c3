"""The code in the README and in the documentation runs as written, page by page, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from interpreter import Script
from paths import ROOT

README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def run(blocks: str, folder: Path) -> None:
    # Nothing that is shown of resuming may end with the process.
    script = Script("import warnings\nwarnings.simplefilter('error', UserWarning)\n" + blocks, cwd=folder)
    _, errors = script.communicate(120)
    assert script.returncode == 0, f"{blocks}\n{errors}"


def test_readme_blocks_run(tmp_path: Path) -> None:
    """Each block by itself: people copy one of them."""
    blocks = blocks_of(README)
    assert len(blocks) >= 4
    for block in blocks:
        run(block, tmp_path)
    assert (tmp_path / "replay.h5").exists()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.stem)
def test_blocks_of_the_documentation_run(page: Path, tmp_path: Path) -> None:
    """The blocks of a page in order, in one process: a page is read from its top."""
    run("\n".join(blocks_of(page)), tmp_path)


def test_only_what_exists_is_named() -> None:
    for page in [README, *PAGES]:
        for name in re.findall(r"(?:examples|benchmarks|leanreplay)/[\w/]+\.(?:py|md)", page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_every_public_name_has_its_place_in_the_reference() -> None:
    import leanreplay
    import leanreplay.torch

    text = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: ([\w.]+)", text, re.MULTILINE))
    errors = {name for name in leanreplay.__all__ if name.endswith(("Error", "Warning"))}
    assert all(f"`{name}`" in text for name in errors)
    core = {f"leanreplay.{name}" for name in leanreplay.__all__ if name not in errors} | {"leanreplay.open"}
    torch_side = {f"leanreplay.torch.{name}" for name in leanreplay.torch.__all__ if name != "plot"}
    assert core | torch_side <= shown, sorted((core | torch_side) - shown)
