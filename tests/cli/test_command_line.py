"""The command line: what it prints, what it writes, and its exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT

import leanreplay
from leanreplay import ClassBalancedBuffer, ReservoirBuffer
from leanreplay.cli.main import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A balanced buffer of 12 rows that has seen 60 small images."""
    path = str(tmp_path / "replay.h5")
    with ClassBalancedBuffer(12, path, seed=3) as buffer:
        x = np.arange(60 * 16, dtype=np.uint8).reshape(60, 4, 4)
        buffer.add((x, np.arange(60) % 3), metadata={"loss": np.arange(60.0)})
    return path


def test_info(file: str, capsys: Capture) -> None:
    assert main(["info", file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["class"], found["held"], found["seen"], found["seed"]) == ("ClassBalancedBuffer", 12, 60, 3)
    assert found["groups"] == {"0": 4, "1": 4, "2": 4}
    assert found["fields"] == {"data/0": "uint8[4, 4]", "data/1": "int64[]", "metadata/loss": "float64[]"}
    assert 0 <= found["age"]["youngest"] <= found["age"]["median"] <= found["age"]["oldest"] < 60
    assert main(["info", file]) == 0
    text = capsys.readouterr().out
    assert "12 of 12 rows, of 60 samples seen" in text and text.count("group ") == 3


def test_check_tells_by_its_status(file: str, capsys: Capture) -> None:
    assert main(["check", file]) == 0
    with leanreplay.open(file) as buffer:
        row = int(buffer.get_metadata("idx")[0])
        stored = np.asarray(buffer.get([row])[0][0][0]).tobytes()
    data = bytearray(Path(file).read_bytes())
    assert data.count(stored) == 1
    data[data.index(stored)] ^= 1
    Path(file).write_bytes(data)
    assert main(["check", file]) == 1
    assert f"rows {row}" in capsys.readouterr().out


def test_errors_are_one_line_and_status_2(tmp_path: Path, file: str, capsys: Capture) -> None:
    (tmp_path / "text.h5").write_text("no buffer")
    for command in (["info", str(tmp_path / "none.h5")], ["check", str(tmp_path / "text.h5")], ["resize", file, "0"]):
        assert main(command) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("leanreplay: ") and captured.err.count("\n") == 1
    with pytest.raises(SystemExit) as left:
        main(["frobnicate"])
    assert left.value.code == 2


def test_head(file: str, capsys: Capture) -> None:
    assert main(["head", file, "-n", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "uint8[4, 4]" in lines[0] and "loss: " in lines[0]


def test_watch(file: str, capsys: Capture) -> None:
    assert main(["watch", file, "--every", "0.01", "--lines", "2"]) == 0
    assert capsys.readouterr().out.count("held 12  seen 60  0 samples/s  0:4 1:4 2:4") == 2


def test_merge_and_resize(tmp_path: Path, capsys: Capture) -> None:
    names = []
    for rank in range(2):
        names.append(str(tmp_path / f"rank{rank}.h5"))
        with ReservoirBuffer(10, names[-1], seed=0, stream=rank) as buffer:
            buffer.add(np.arange(50))
    out = str(tmp_path / "all.h5")
    assert main(["merge", *names, "--out", out]) == 0 and main(["resize", out, "4"]) == 0
    with leanreplay.open(out) as merged:
        assert (len(merged), merged.seen, merged.max_size) == (4, 100, 4)
    assert main(["merge", *names, "--out", out]) == 2  # it exists
    assert "exists" in capsys.readouterr().err


def test_export(file: str, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "replay.npz"
    command = ["export", file, "--to", "npz", "--out", str(out)]
    assert main(command) == 0
    with leanreplay.open(file) as buffer, np.load(out) as exported:
        (x, y), meta = buffer.get(buffer.get_metadata("idx"))
        for name, values in {"data/0": x, "data/1": y, "metadata/loss": meta["loss"], "position": meta["position"]}.items():
            np.testing.assert_array_equal(exported[name], values)
    assert main(command) == 2 and "exists" in capsys.readouterr().err


def test_export_of_images(file: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    out = tmp_path / "images"
    assert main(["export", file, "--to", "folder-of-images", "--out", str(out)]) == 0
    assert sorted(folder.name for folder in out.iterdir()) == ["0", "1", "2"]
    with leanreplay.open(file) as buffer:
        for (x, y), meta in buffer:
            np.testing.assert_array_equal(np.asarray(image.open(out / str(y) / f"{meta['idx']}.png")), x)


def test_plot(file: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["plot", file, "--out", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_as_a_program_without_torch(file: str) -> None:
    """`python -m leanreplay` in a process of its own: neither torch nor h5py is imported."""
    code = (
        "import sys, leanreplay.cli.main as m; s = m.main(sys.argv[1:]); print(sorted({'torch', 'h5py'} & set(sys.modules))); sys.exit(s)"
    )
    done = subprocess.run([sys.executable, "-c", code, "head", file], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.endswith("[]\n"), done.stderr
    done = subprocess.run([sys.executable, "-m", "leanreplay", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "examples:" in done.stdout
