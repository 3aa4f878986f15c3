"""The examples end to end, and the main job killed at any time and resumed."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import json
import random
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from interpreter import Script
from nightly import times
from paths import EXAMPLES

import leanreplay

SPLIT_DIGITS = EXAMPLES / "split_digits.py"
MNIST = EXAMPLES.parent.parent / "shared" / "data" / "mnist"
if importlib.util.find_spec("sklearn") is None:  # which takes long to import
    pytest.skip("needs scikit-learn", allow_module_level=True)


def held(path):
    """Bytes of every row, and of its index."""
    with leanreplay.open(path) as buffer:
        assert not buffer.check()
        (x, y), meta = buffer.get(buffer.get_metadata("idx"))
        return buffer.seen, x.tobytes(), y.tobytes(), meta["idx"].tobytes(), meta["position"].tobytes()


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("split_digits", SPLIT_DIGITS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# A process that has imported everything once, and forks a child for each run: that makes runs, and kills, cheap.
SERVER = """
import importlib.util, json, os, signal, sys, time, traceback
import matplotlib.pyplot, numpy, sklearn.datasets

spec = importlib.util.spec_from_file_location("split_digits", sys.argv[1])
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
example.torch.set_num_threads(1)
example.torch.optim.SGD([example.torch.nn.Parameter(example.torch.zeros(1))], lr=1).step()  # imports half of torch
matplotlib.pyplot.figure().savefig(os.devnull, format="png")
warm = example.ReservoirBuffer(2)
for _ in range(3):  # kernels
    warm.add((numpy.zeros((5, 2), "uint8"), numpy.zeros(5, "int64")))
    warm.sample(1)
state = warm.state_dict()
warm.add((numpy.zeros((5, 2), "uint8"), numpy.zeros(5, "int64")))
warm.load_state_dict(state)

def die_at(point, call):
    "Die before or after the call-th call of a function that the example uses (on a checkpoint, where it takes paths)."
    when, name = point.split()
    place = {"unlink": example.Path, "replace": example.os, "save": example.torch, "ReservoirBuffer": example}.get(name, example.ERLearner)
    inner, calls = getattr(place, name), [0]
    def wrapped(*a, **k):
        if name in ("unlink", "replace") and not str(a[-1]).endswith("checkpoint.pt"):
            return inner(*a, **k)
        calls[0] += 1
        if calls[0] == call and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = inner(*a, **k)
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(place, name, wrapped)

for line in sys.stdin:
    argv, log, point, call, delay = json.loads(line)
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(fd, 1), os.dup2(fd, 2)
            if point:
                die_at(point, call)
            example.main(argv)
            code = 0
        except SystemExit as error:
            print(error)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    print(json.dumps([code, time.monotonic() - started]), flush=True)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(out, *options) -> what it printed. at, call: the function where it kills itself; delay: seconds until it is killed."""
    log = tmp_path_factory.mktemp("log") / "log.txt"
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(SPLIT_DIGITS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(out, *options, at=None, call=1, delay=None, code=0):
        server.stdin.write(json.dumps([["--out", str(out), *options], str(log), at, call, delay]) + "\n")
        server.stdin.flush()
        line = server.stdout.readline()
        assert line, "the server ended"
        found, run.seconds = json.loads(line)
        printed = log.read_text()
        assert found == code or (delay is not None and found == 0), f"exit status {found}\n{printed[-3000:]}"
        return printed if delay is None else found

    yield run
    server.stdin.close()
    server.wait(timeout=60)
    server.stdout.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted, as by the command of the README: its folder, what it printed, and its progress."""
    out = tmp_path_factory.mktemp("whole")
    return out, *command("--out", out)


def command(*options):
    """Run the example as the command that it is, in an interpreter of its own. What it printed, and to its errors."""
    script = Script(SPLIT_DIGITS.read_text(encoding="utf-8"), *options, file=SPLIT_DIGITS, environment={"MPLBACKEND": "agg"})
    out, errors = script.communicate(120)
    assert script.returncode == 0, errors[-3000:]
    return out, errors


def test_split_digits(whole):
    """The table, the picture and the progress bar; experience replay is far above fine-tuning."""
    out, printed, progress = whole
    results = json.loads((out / "results.json").read_text())
    assert results["average"]["ER"] > results["average"]["fine-tuning"] + 40
    assert results["average"]["ER"] > 75 and results["accuracy"]["fine-tuning"][-1][4] > 90
    for name, matrix in results["accuracy"].items():
        assert np.shape(matrix) == (5, 5) and matrix[0][0] > 90, name
        cells = re.search(rf"^{name} +([0-9. ]+)$", printed, re.MULTILINE)
        assert cells is not None, printed
        shown = [float(cell) for cell in cells[1].split()]
        assert shown == pytest.approx([*matrix[-1], results["average"][name]], abs=0.051)
    picture = (out / "accuracy.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 10_000
    assert "task 5 of 5: 100%" in progress
    assert held(out / "replay.h5")[0] == 5 * 1347  # five epochs of all training samples


def test_resume_of_a_finished_run_and_starting_over(run, tmp_path):
    """--resume of a finished run tells the same again; without it, an existing folder is started over; other options are refused."""
    out, other = tmp_path / "out", tmp_path / "other"
    first = run(out, "--epochs", "1")
    wanted = (out / "results.json").read_text()
    again = run(out, "--epochs", "1", "--resume")
    assert again.splitlines()[-4:] == first.splitlines()[-4:] and (out / "results.json").read_text() == wanted
    refused = run(out, "--resume", "--epochs", "1", "--seed", "1", code=1)
    assert "leave --resume out to start over" in refused and "Traceback" not in refused
    assert (out / "results.json").read_text() == wanted
    options = ("--seed", "1", "--epochs", "1", "--buffer-size", "20")
    run(out, *options)  # on top of the other run's files
    run(other, *options)
    assert held(out / "replay.h5") == held(other / "replay.h5") and held(out / "replay.h5")[0] == 1347
    assert (other / "results.json").read_text() == (out / "results.json").read_text() != wanted


OPTIONS = ("--epochs", "2", "--checkpoint-every", "11", "--seed", "3")


@pytest.fixture(scope="module")
def wanted(run, tmp_path_factory):
    """Results and buffer of a run with these options that nothing interrupted, and how long it took."""
    out = tmp_path_factory.mktemp("wanted")
    run(out, *OPTIONS)
    return (out / "results.json").read_text(), held(out / "replay.h5"), run.seconds


def test_another_process_goes_on(run, wanted, tmp_path):
    """A run that was killed, gone on with by the command itself, ends like a run of another process that nothing interrupted."""
    run(tmp_path, *OPTIONS, at="after replace", code=-signal.SIGKILL)
    command("--out", tmp_path, *OPTIONS, "--resume")
    assert (tmp_path / "results.json").read_text() == wanted[0] and held(tmp_path / "replay.h5") == wanted[1]


def test_the_seed_decides_everything(run, wanted, tmp_path):
    """Another seed, another result (the same seed gives the same, says every test here)."""
    run(tmp_path, *OPTIONS, "--seed", "1")
    first, second = (json.loads(text)["weights"] for text in (wanted[0], (tmp_path / "results.json").read_text()))
    assert first["fine-tuning"] != second["fine-tuning"] and first["ER"] != second["ER"]


def test_killed_at_random_instants(run, wanted, tmp_path):
    """G3 in the main job: SIGKILLs at random instants, from loading data to drawing the picture: the same results, bit for bit."""
    seed, kills, wanted_kills = 0, 0, times(5, 15)
    rng = random.Random(seed)
    for _ in range(200):
        if kills == wanted_kills:
            break
        over = rng.random() < 0.1
        delay = rng.random() * wanted[2] * rng.choice([0.3, 1.0])
        kills += run(tmp_path, *OPTIONS, *([] if over else ["--resume"]), delay=delay, code=-signal.SIGKILL) != 0
        with contextlib.suppress(FileNotFoundError):
            (tmp_path / "results.json").unlink()
    assert kills == wanted_kills
    run(tmp_path, *OPTIONS, "--resume")
    assert (tmp_path / "results.json").read_text() == wanted[0], f"seed {seed}"
    assert held(tmp_path / "replay.h5") == wanted[1], f"seed {seed}"


def test_killed_at_every_seam(run, wanted, tmp_path):
    """Killed right before and after everything that changes a file, alone and in a row: the same results, bit for bit."""
    run(tmp_path, "--epochs", "1", "--checkpoint-every", "7")  # files of another run lie about
    for at in ("before unlink", "after unlink", "before ReservoirBuffer", "after ReservoirBuffer", "after step"):
        run(tmp_path, *OPTIONS, at=at, code=-signal.SIGKILL)
    (tmp_path / "results.json").unlink()
    for at, call in [
        ("before state_dict", 1), ("after state_dict", 1), ("after state_dict", 1), ("before replace", 1), ("after replace", 1),
        ("before load_state_dict", 1), ("after load_state_dict", 1), ("before after_step", 5), ("after after_step", 9),
        ("after load_state_dict", 1), ("after state_dict", 2), ("before replace", 2), ("after replace", 3), ("after state_dict", 1),
        ("after load_state_dict", 1), ("before save", 1), ("after save", 1), ("after step", 40),
    ]:  # fmt: skip
        run(tmp_path, *OPTIONS, "--resume", at=at, call=call, code=-signal.SIGKILL)
    run(tmp_path, *OPTIONS, "--resume")
    assert (tmp_path / "results.json").read_text() == wanted[0] and held(tmp_path / "replay.h5") == wanted[1]


# -- MNIST in IDX files --------------------------------------------------------------------------------------------------------


def write_idx(path, array):
    raw = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_data(folder, suffixes=(".gz", "")):
    """Stripes: class c is bright in row c. One part compressed, the other not."""
    folder.mkdir()
    for part, suffix, n in zip(("train", "t10k"), suffixes, (400, 60), strict=True):
        labels = np.arange(n) % 10
        images = np.random.default_rng(n).integers(0, 100, (n, 28, 28))
        images[np.arange(n), 2 * labels] += 150
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels)


def test_idx_data(example, run, tmp_path):
    """--data reads IDX files, compressed or not, as uint8 images and int64 labels; and trains on them."""
    write_data(tmp_path / "data")
    x, y, x_test, y_test = example.load_data(tmp_path / "data")
    assert x.shape == (400, 28, 28) and x_test.shape == (60, 28, 28) and y.tolist() == [i % 10 for i in range(400)]
    assert str(x.dtype) == "torch.uint8" and str(y_test.dtype) == "torch.int64"
    assert int(x[3, 6].min()) >= 150 and np.array_equal(x[7, 0], np.random.default_rng(400).integers(0, 100, (400, 28, 28))[7, 0])
    run(tmp_path / "out", "--data", str(tmp_path / "data"), "--epochs", "2")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["average"]["ER"] > 80 and results["average"]["fine-tuning"] < 40, results["average"]
    with leanreplay.open(tmp_path / "out" / "replay.h5") as buffer:
        assert buffer.seen == 800 and str(buffer.schema) == "Schema(data/0: u1[28, 28], data/1: i8[])"


def test_bad_idx_data(example, tmp_path):
    """Missing, damaged or unsuitable files end with a message."""
    with pytest.raises(SystemExit, match="neither train-images-idx3-ubyte nor"):
        example.load_data(tmp_path)
    write_data(tmp_path / "data", ("", ""))
    path = tmp_path / "data" / "t10k-images-idx3-ubyte"
    good = path.read_bytes()
    for bad, message in (
        (b"", "no IDX file"),
        (b"\0\0\x0d\x03" + good[4:], "no IDX file"),
        (good[:-1], "cut short or damaged"),
        (good + b"x", "cut short"),
    ):
        path.write_bytes(bad)
        with pytest.raises(SystemExit, match=message):
            example.load_data(tmp_path / "data")
    path.write_bytes(good)
    write_idx(tmp_path / "data" / "train-labels-idx1-ubyte", np.arange(400) % 9)
    with pytest.raises(SystemExit, match="every class 0-9 is needed"):
        example.load_data(tmp_path / "data")
    write_idx(tmp_path / "data" / "train-labels-idx1-ubyte", np.arange(399) % 10)
    with pytest.raises(SystemExit, match="400 training images with 399 labels"):
        example.load_data(tmp_path / "data")


@pytest.mark.skipif(not (MNIST / "train-images-idx3-ubyte.gz").exists(), reason="MNIST is not at hand")
def test_mnist(run, tmp_path):
    """The same on MNIST (with larger batches than the default, so that it is quick)."""
    run(tmp_path, "--data", str(MNIST), "--batch-size", "128")
    average = json.loads((tmp_path / "results.json").read_text())["average"]
    assert average["ER"] > average["fine-tuning"] + 30


def test_bad_options(example, capsys):
    """Numbers below 1 are refused."""
    for option in ("--checkpoint-every", "--batch-size", "--buffer-size", "--epochs"):
        with pytest.raises(SystemExit):
            example.main([option, "0"])
        assert "at least 1" in capsys.readouterr().err


# -- own policy ----------------------------------------------------------------------------------------------------------------


def test_own_policy_runs():
    """The example prints that the buffer, reopened in between, holds exactly the hardest samples."""
    path = EXAMPLES / "own_policy.py"
    done = Script(path.read_text(encoding="utf-8"), file=path)
    out, errors = done.communicate(60)
    assert done.returncode == 0, errors
    assert "the 50 hardest of all digits: yes" in out and "seen=1797" in out
    held, everything = map(int, re.search(r"difficulty: (\d+) of those held, (\d+) of all", out).groups())
    assert held > everything


@pytest.mark.parametrize("seed", range(5))
def test_own_policy_is_batch_invariant(seed, tmp_path):
    """G2 for the example's policy: any cut into batches, reopened or not, holds the highest groups, of equal ones the earlier."""
    spec = importlib.util.spec_from_file_location("own_policy", EXAMPLES / "own_policy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 30, 200)
    x = np.arange(200.0)
    wanted = np.lexsort((np.arange(200), -groups))
    contents = []
    for run_number in range(2):
        path, at = tmp_path / f"{run_number}.h5", 0
        buffer = module.HardestBuffer(20, path)
        while at < 200:
            n = int(rng.integers(1, 40))
            buffer.add(x[at : at + n], group=groups[at : at + n])
            at += n
            if rng.random() < 0.3:
                buffer.close()
                buffer = leanreplay.open(path, mode="r+")
        rows = buffer.get(np.arange(20))
        contents.append((rows[0].tolist(), rows[1]["position"].tolist()))
        assert sorted(contents[-1][1]) == sorted(wanted[:20].tolist()), f"seed {seed}"
        buffer.resize(7)
        assert sorted(buffer.get_metadata("position")) == sorted(wanted[:7].tolist()), f"seed {seed}"
        buffer.close()
    assert contents[0] == contents[1], f"seed {seed}"
