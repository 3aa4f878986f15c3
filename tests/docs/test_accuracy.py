"""The accuracy benchmark: its protocol on made-up digits, its verdicts, and that an interrupted command goes on."""

from __future__ import annotations

import gzip
import json
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from benchmarks import accuracy
from benchmarks.common import write_section


def cell(name):
    return next(c for c in accuracy.CELLS if str(c) == name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stripes: digit c is bright in rows 2c and 2c + 1. As IDX files."""
    folder = tmp_path_factory.mktemp("data")
    for part, n in (("train", 800), ("t10k", 100)):
        labels = (np.arange(n) % 10).astype(np.uint8)
        images = np.random.default_rng(n).integers(0, 100, (n, 28, 28), dtype=np.uint8)
        for row in (0, 1):
            images[np.arange(n), 2 * labels + row] += 150
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return accuracy.load(folder)


def test_data(data, folder):
    """Bytes as they stand in the files, in their order; a folder above `mnist` will do; what is not MNIST is refused."""
    assert data["x"].shape == (800, 784) and data["x"].dtype == torch.uint8 and data["y"].tolist() == [i % 10 for i in range(800)]
    wanted = np.random.default_rng(800).integers(0, 100, (800, 28, 28), dtype=np.uint8)[13]
    wanted[6:8] += 150
    assert np.array_equal(data["x"][13].reshape(28, 28).numpy(), wanted)
    with pytest.raises(SystemExit, match="neither train-images-idx3-ubyte"):
        accuracy.load(folder / "missing")


def test_network():
    """Xavier uniform weights, zero bias, pixels / 255; a function of the seed."""
    model = accuracy.make_model(0)
    linear = [layer.requires_grad_(False) for layer in model if isinstance(layer, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(784, 100), (100, 100), (100, 10)]
    for m in linear:
        bound = (6 / (m.in_features + m.out_features)) ** 0.5
        assert 0.97 * bound < m.weight.abs().max() <= bound and m.weight.mean().abs() < bound / 10 and not m.bias.any()
        assert m.weight.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert torch.equal(accuracy.make_model(0)[1].weight, linear[0].weight) and not torch.equal(
        accuracy.make_model(1)[1].weight, linear[0].weight
    )
    x = torch.full((2, 784), 255, dtype=torch.uint8)
    assert torch.allclose(model(x), model[1:](torch.ones(2, 784)))


def test_tasks(data):
    """s-mnist: the digits two by two, each image once; p-mnist: all images, training and test pixels in the same new order."""
    found = list(accuracy.tasks("s-mnist", data, 0))
    assert [sorted(set(y.tolist())) for _, y, _, _ in found] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert sum(len(y) for _, y, _, _ in found) == 800 and sum(len(y) for _, _, _, y in found) == 100
    for x, y, x_test, y_test in found:
        for images, labels in ((x, y), (x_test, y_test)):
            assert torch.equal(images.reshape(-1, 28, 28).float().mean(2).argmax(1) // 2, labels)
    again, other = (next(accuracy.tasks("s-mnist", data, seed)) for seed in (0, 1))
    assert torch.equal(found[0][0], again[0]) and not torch.equal(found[0][1], other[1])

    permuted = list(accuracy.tasks("p-mnist", data, 0))
    assert len(permuted) == 20
    for x, y, x_test, y_test in permuted[:1] + permuted[-1:]:
        assert torch.equal(y.sort()[0], data["y"].sort()[0]) and torch.equal(y_test, data["y_test"])
        pixels = torch.stack([(x_test == column[:, None]).all(0) for column in data["x_test"].T]).float().argmax(1)  # where each went
        assert sorted(pixels.tolist()) == list(range(784)) and pixels.tolist() != list(range(784))
        back = x[:, pixels]
        assert torch.equal(back.double().mean(1).sort()[0], data["x"].double().mean(1).sort()[0])
        assert torch.equal(back.reshape(-1, 28, 28).float().mean(2).argmax(1) // 2, y)
    assert len({tuple(x_test[0].tolist()) for _, _, x_test, _ in permuted}) == 20


@pytest.mark.parametrize("name", ["s-mnist sgd", "s-mnist er 500", "s-mnist der 200", "s-mnist der++ 500", "s-mnist cls-er 500"])
def test_run(name, data, tmp_path, monkeypatch):
    """Every method trains once through the stream, offers each sample after its step to a buffer on disk; CLS-ER's stable model counts."""
    made, seen, scored = [], [], []
    learner_of, accuracy_of = accuracy.make_learner, accuracy.accuracy

    def make_learner(*args):
        made.append(learner_of(*args))
        step = made[0].step
        made[0].step = lambda x, y: (seen.append((made[0].buffer.seen, len(x))), step(x, y))
        return made[0]

    monkeypatch.setattr(accuracy, "make_learner", make_learner)
    monkeypatch.setattr(accuracy, "accuracy", lambda model, x, y: scored.append(model) or accuracy_of(model, x, y))
    found = accuracy.run(cell(name), 3, data, tmp_path)
    assert len(scored) == 5 and not list(tmp_path.iterdir())  # the buffer is removed
    if name == "s-mnist sgd":
        assert not made and found < 40
        return
    (learner,) = made
    assert seen == [(10 * i, 10) for i in range(80)] and learner.steps == 80
    assert learner.buffer.max_size == cell(name).buffer and learner.buffer.seed == 3 and learner.buffer.path.startswith(str(tmp_path))
    assert all(model is (learner.stable_model if "cls" in name else learner.model) for model in scored)
    if name == "s-mnist er 500":
        assert found > 60


def test_settings():
    """What the learners are given: the published settings, no normalisation."""
    model = accuracy.make_model(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for c in accuracy.CELLS:
        if c.buffer is None:
            continue
        made = accuracy.make_learner(c, model, optimizer, accuracy.ReservoirBuffer(c.buffer), 0)
        assert not made.loss_normalization and made.replay_batch_size == c.replay and made.loss_weight == 1
        weights = [term.weight for term in made.terms]
        assert weights == {"er": [None], "der": [*c.weights, 0], "der++": [*c.weights], "cls-er": [None, *c.weights]}[c.method]
    assert {c.lr for c in accuracy.CELLS if c.setting == "p-mnist"} == {0.1, 0.2} and all(c.lr <= 0.1 for c in accuracy.CELLS[:8])


def test_verdicts():
    """The published mean minus 1.5 points, minus 1 for CLS-ER; SGD on s-mnist on both sides."""
    for name, low, high in [
        ("s-mnist er 200", 78.93, 100), ("s-mnist cls-er 500", 91.05, 100), ("p-mnist sgd", 39.2, 100), ("s-mnist sgd", 17.6, 21.6),
    ]:  # fmt: skip
        c = cell(name)
        assert c.passed(low + 1e-9) and not c.passed(low - 0.01)
        assert c.passed(high - 1e-9) and c.passed(high + 0.01) == (name != "s-mnist sgd")


class Inline:
    """A process pool that is none."""

    def __init__(self, *_, initializer, initargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        job = Future()
        try:
            job.set_result(function(*args))
        except BaseException as error:
            job.set_exception(error)
        return job

    def shutdown(self, **_):
        pass


@pytest.fixture
def command(folder, tmp_path, monkeypatch):
    """command(*options) -> the runs it made. command.found: (cell, seed) -> accuracy, or an error."""
    runs = []

    def run(cell, seed, data, folder):
        runs.append((str(cell), seed))
        result = command.found(cell, seed)
        if isinstance(result, Exception):
            raise result
        return result

    def command(*options):
        runs.clear()
        args = ["--data", str(folder), "--out", str(tmp_path / "out"), "--results", str(tmp_path / "RESULTS.md"), "--processes", "1"]
        accuracy.main([*args, *options])
        return list(runs)

    monkeypatch.setattr(accuracy, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(accuracy, "as_completed", list)
    monkeypatch.setattr(accuracy, "run", run)
    command.runs = runs
    return command


def test_one_cell(command, capsys, tmp_path):
    """Mean and spread beside the published mean; no more seeds than asked for; RESULTS.md is left alone."""
    command.found = lambda cell, seed: 70.0 + seed
    assert command("--setting", "p-mnist", "--method", "er", "--buffer", "200", "--seeds", "3") == [("p-mnist er 200", s) for s in range(3)]
    assert "| p-mnist | er | 200 | 72.37 | 71.00 | 1.00 | -1.37 | 3 | pass |" in capsys.readouterr().out
    assert command("--setting", "p-mnist", "--method", "sgd", "--seeds", "1") == [("p-mnist sgd", 0)]
    assert not (tmp_path / "RESULTS.md").exists()
    for wrong in (["--setting", "s-mnist", "--method", "er", "--buffer", "300"], ["--method", "er"], ["--all", "--seeds", "0"]):
        with pytest.raises(SystemExit):
            command(*wrong)


def test_all(command, capsys, tmp_path):
    """Every cell; one that misses gets 15 more seeds and is judged by all 20; the table goes between its markers."""
    write_section(tmp_path / "RESULTS.md", "accuracy", "old")
    write_section(tmp_path / "RESULTS.md", "another", "stays")
    fixed, missed = "s-mnist er 200", "p-mnist der++ 200"

    def found(cell, seed):
        if str(cell) == missed:
            return 10.0
        return cell.published - (2.0 if str(cell) == fixed and seed < 5 else 0)

    command.found = found
    runs = command("--all", "--seeds", "5")
    assert len(runs) == len(set(runs)) == 15 * 5 + 2 * 15
    assert {name for name, seed in runs if seed >= 5} == {fixed, missed}
    text = (tmp_path / "RESULTS.md").read_text()
    assert "## Accuracy" in text.split("stays")[0] and "old" not in text
    assert text.count("| pass |") == 14 and "| 10.00 | 0.00 | -73.58 | 20 | miss |" in text
    assert "| s-mnist | er | 200 | 80.43 | 79.93 |" in text and "--all --seeds 5" in text
    assert command("--all", "--seeds", "5") == [] and (tmp_path / "RESULTS.md").read_text() == text


def test_goes_on(command, tmp_path, monkeypatch, capsys):
    """Finished runs count after an interruption, unless code or data changed."""
    cell = ("--setting", "s-mnist", "--method", "der", "--buffer", "500", "--seeds", "4")
    command.found = lambda cell, seed: RuntimeError("out of memory") if seed == 2 else 90.0 + seed
    with pytest.raises(RuntimeError, match="out of memory"):
        command(*cell)
    kept = [int(s) for s in json.loads((tmp_path / "out" / "finished.json").read_text())["results"]["s-mnist der 500"]]
    assert kept == [0, 1]
    command.found = lambda cell, seed: 90.0 + seed
    assert command(*cell) == [("s-mnist der 500", seed) for seed in (2, 3)]
    assert "| 91.50 | 1.29 |" in capsys.readouterr().out
    monkeypatch.setattr(accuracy, "fingerprint", lambda data: "other")
    assert len(command(*cell)) == 4


def test_fingerprint(data):
    """Of every image."""
    other = {**data, "x_test": data["x_test"].clone()}
    assert accuracy.fingerprint(other) == accuracy.fingerprint(data)
    other["x_test"][7, 100] += 1
    assert accuracy.fingerprint(other) != accuracy.fingerprint(data)


def test_write_section(tmp_path):
    """A section is added to a file, or replaces the one of that name; what stands around it stays."""
    path = tmp_path / "RESULTS.md"
    write_section(path, "one", "first")
    alone = path.read_text()
    write_section(path, "two", "second")
    both = path.read_text()
    assert both.startswith(alone.rstrip()) and both.count("<!--") == 4
    write_section(path, "one", "new")
    assert path.read_text() == both.replace("first", "new")
    path.write_text(both + "after\n")
    write_section(path, "two", "new")
    assert path.read_text() == both.replace("second", "new") + "after\n"
