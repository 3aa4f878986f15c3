"""The examples of training loops, in small."""

from __future__ import annotations

import importlib
import importlib.util
import re
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from interpreter import Script
from paths import EXAMPLES

import leanreplay
from leanreplay.torch import ReplayLearner

CIFAR10 = EXAMPLES.parent.parent / "shared" / "data" / "cifar10"
pytest.importorskip("sklearn")


@pytest.fixture
def example(monkeypatch):
    """example(name) -> the module. One thread, so that sums come out the same everywhere."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in [name for name, module in sys.modules.items() if str(getattr(module, "__file__", None)).startswith(str(EXAMPLES))]:
        del sys.modules[name]


def test_existing_loop_in_five_lines(example, capsys):
    """The loop as it stands replays. Without the five marked lines, it is an ordinary loop that runs, and forgets."""
    module = example("existing_loop")
    found = module.main([])
    assert np.mean(found) > 80 and min(found) > 60 and f"average: {np.mean(found):.1f}%" in capsys.readouterr().out

    lines, marked = [], []
    for line in Path(module.__file__).read_text().splitlines():
        mark = re.search(r"  # (\d)(?:, in place of: (.*))?$", line)
        if mark:
            marked.append(mark[1])
            if mark[2]:
                lines.append(line[: len(line) - len(line.lstrip())] + mark[2])
        else:
            lines.append(line)
    assert marked == list("12345")
    source = "\n".join(lines)
    assert "leanreplay" not in source and "learner" not in source
    before = {"__name__": "before"}
    exec(compile(source, "before", "exec"), before)
    found = before["main"]([])
    assert found[4] > 85 and max(found[:4]) < 20


def test_gradient_accumulation(example, capsys, monkeypatch):
    """A step of four small batches is one commit of all their samples, taken after the optimizer's step; it learns."""
    module = example("gradient_accumulation")
    added = []
    add = leanreplay.ReservoirBuffer.add
    monkeypatch.setattr(leanreplay.ReservoirBuffer, "add", lambda self, batch, **k: (added.append(len(batch[1])), add(self, batch, **k)))
    found = module.main([])
    assert np.mean(found) > 75 and min(found[:4]) > 50
    steps, seen = map(int, re.search(r"(\d+) steps, (\d+) samples", capsys.readouterr().out).groups())
    assert len(added) == steps and sum(added) == seen == 5 * 1347 and set(added[:10]) == {16}


def test_gradient_accumulation_equals_one_large_batch(example, monkeypatch):
    """For the stream's loss alone: four parts give the weights that one batch of sixteen gives."""
    module = example("gradient_accumulation")
    models = []
    monkeypatch.setattr(module, "DERLearner", lambda *a, **_: models.append(a[0]) or ReplayLearner(*a, replay_batch_size=0))
    monkeypatch.setattr(module, "split", lambda x, y: [(x[:66], y[:66])])
    for parts in ("1", "4"):
        module.main(["--parts", parts])
    one, four = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models)
    assert torch.allclose(one, four, atol=1e-5)


def test_mixed_precision(example, capsys, monkeypatch):
    """Reduced precision learns; a step that the scaler skipped does not count and moves no copy, but its samples were seen."""
    module = example("mixed_precision")
    loss, after_step, calls = module.CLSLearner.loss, module.CLSLearner.after_step, []

    def overflow(self, x, y):
        return loss(self, x, y) * (3e38 if len(calls) == 7 else 1)

    def watched(self, stepped=True):
        before = [p.clone() for p in self.stable_model.parameters()]
        after_step(self, stepped)
        moved = any(not torch.equal(p, q) for p, q in zip(before, self.stable_model.parameters(), strict=True))
        calls.append((stepped, moved, self.buffer.seen))

    monkeypatch.setattr(module.CLSLearner, "loss", overflow)
    monkeypatch.setattr(module.CLSLearner, "after_step", watched)
    found = module.main([])
    steps, skipped, seen = map(int, re.search(r"(\d+) steps, (\d+) skipped, (\d+) samples", capsys.readouterr().out).groups())
    assert calls[7] == (False, False, 80) and sum(moved for _, moved, _ in calls) > 300
    assert steps + skipped == len(calls) and skipped == sum(not stepped for stepped, _, _ in calls) and seen == 5 * 1347
    assert skipped == 1 or torch.cuda.is_available()
    assert np.mean(found) > 65


def test_cifar10_augmentation_on_digits(example, capsys, tmp_path):
    """Without CIFAR-10: digits; the buffer holds images as they came, each replay is a new version."""
    module = example("cifar10_augmentation")
    found = module.main(["--out", str(tmp_path), "--epochs", "2"])
    assert np.mean(found) > 55 and "after task 5" in capsys.readouterr().out
    x, _, _, _ = module.load_digits()
    known = {image.numpy().tobytes() for image in x}
    with leanreplay.open(tmp_path / "replay.h5") as buffer:
        (held, _), _ = buffer.get(np.arange(len(buffer)))
        assert buffer.seen == 2 * 1347 and held.dtype == np.uint8 and all(image.tobytes() in known for image in held)


def test_augmentation(example):
    """An image moves by at most the given pixels, the rest is black; in half the cases it is mirrored; the seed decides."""
    module = example("cifar10_augmentation")
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[:, 3, 2] = 255
    augment, again = (module.Augment(1, True, 5) for _ in range(2))
    places = []
    for _ in range(400):
        made = augment(image)
        assert torch.equal(made, again(image)) and made.shape == (3, 8, 8) and made.sum() == 3
        places.append(divmod(int(made[0].argmax()), 8))
    assert {row for row, _ in places} == {2, 3, 4} and {column for _, column in places} == {1, 2, 3, 4, 5, 6}
    mirrored = np.mean([column > 3 for _, column in places])
    assert 0.35 < mirrored < 0.65


@pytest.mark.skipif(not (CIFAR10 / "cifar10-jpeg.npz.xz").exists(), reason="CIFAR-10 is not at hand")
def test_cifar10(example, capsys, tmp_path):
    """A few images of CIFAR-10 (JPEG): decoded right, shuffled, and trained on."""
    pytest.importorskip("PIL")
    module = example("cifar10_augmentation")
    loaded = []
    load = module.load_cifar10
    module.load_cifar10 = lambda *args: loaded.append(load(*args)) or loaded[0]
    module.main(["--data", str(CIFAR10), "--limit", "500", "--out", str(tmp_path)])
    x, y, x_test, y_test = loaded[0]
    assert x.shape == (500, 3, 32, 32) and x.dtype == torch.uint8 and x_test.shape == (100, 3, 32, 32)
    assert set(y[:100].tolist()) == set(range(10)) and set(y_test.tolist()) == set(range(10))
    means = (x.float() / 255).mean((0, 2, 3))
    assert torch.allclose(means, torch.tensor([0.4913, 0.4821, 0.4465]), atol=0.03)
    assert "after task 5" in capsys.readouterr().out


def write_stripes(folder):
    """MNIST's files, with 810 images of which class c is bright in rows 2c and 2c + 1."""
    labels = np.arange(810) % 10
    images = np.random.default_rng(0).integers(0, 100, (810, 28, 28))
    for row in (0, 1):
        images[np.arange(810), 2 * labels + row] += 150
    for part in ("train", "t10k"):
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (folder / f"{part}-{name}-ubyte").write_bytes(head + array.astype(np.uint8).tobytes())


def test_distributed(tmp_path):
    """Two processes, as torchrun starts them: the same weights, and a merged buffer that equals one over both streams."""
    write_stripes(tmp_path)
    path = EXAMPLES / "distributed.py"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "tests"}
    runs = []
    for rank in "01":
        environment = {**place, "RANK": rank, "LOCAL_RANK": rank}
        options = ["--data", tmp_path, "--out", tmp_path]
        runs.append(Script(path.read_text(encoding="utf-8"), *options, cwd=EXAMPLES, file=path, environment=environment))
    out, errors = map("".join, zip(*(run.communicate(240) for run in runs), strict=True))
    assert [run.returncode for run in runs] == [0, 0], errors[-3000:]
    assert "all ranks have the same weights: yes" in out and "problems: []" in out
    assert float(re.search(r"average: ([0-9.]+)%", out)[1]) > 50
    with leanreplay.open(tmp_path / "merged.h5") as merged:
        positions = merged.get(np.arange(200))[1]["position"].tolist()
        assert len(merged) == 200
    held = []
    for rank in range(2):
        with leanreplay.open(tmp_path / f"rank{rank}.h5") as buffer:
            assert buffer.stream == rank and buffer.seen == 405 and len(buffer) == 200
            held.append(set(buffer.get(np.arange(200))[1]["position"].tolist()))
    assert set(positions) < held[0] | held[1] and all(len(part & set(positions)) > 60 for part in held)


def test_distributed_alone(example, capsys):
    """Started without torchrun, it says how to start it."""
    with pytest.raises(SystemExit, match="torchrun --nproc-per-node 2"):
        example("distributed").main([])
