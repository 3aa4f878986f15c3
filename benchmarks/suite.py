"""The works of the suite: what is measured, beside whom, and what ratio was wanted before the code was written.

Each function measures one work, all contenders in turn in one process, and first checks that what they hold or return is right.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import leanreplay
from benchmarks import larger_than_ram, pagecache, rivals
from benchmarks.common import SAMPLE_BYTES, interleaved, samples, seconds
from benchmarks.compare import Calls, Line, Lines, Options, Skipped, WrongError, compare
from benchmarks.exemplars import Images
from benchmarks.replay import split_mnist

IMAGES = 20_000  # distinct samples; a longer stream repeats them, with numbers that do not


@cache
def images() -> tuple[Any, Any, Any]:
    """The samples of every work but two: images, classes, logits."""
    return samples(IMAGES)


def check_samples(name: str, contender: rivals.Contender, drawn: Any, n: int) -> Any:
    """Compare drawn samples with what was fed, whose number they carry; returns the numbers."""
    x, _, z = images()
    found = contender.arrays(drawn)
    numbers = found[1]
    same = len(numbers) == n and all(np.array_equal(a, b[numbers % IMAGES]) for a, b in zip((found[0], found[2]), (x, z), strict=True))
    if not same:
        raise WrongError(f"{name}: samples drawn differ from those added")
    return numbers


def feed(contender: rivals.Contender, rows: int, size: int) -> None:
    """Add so many samples in batches of `size`, images repeating, numbers not."""
    x, _, z = images()
    for start in range(0, rows, size):
        n = min(size, rows - start)
        part = slice(start % IMAGES, start % IMAGES + n)
        contender.add(contender.prepare(x[part], np.arange(start, start + n), z[part]))


def adding(o: Options) -> Lines:
    """A stream of 20,000 in batches of 32 into 5,000 rows: into a buffer at hand, and the making of the buffer counted in.

    cpprb writes all pages of its files when it is made, leanreplay as rows are filled.
    """
    stream, rows, size = (4_000, 1_000, 32) if o.quick else (20_000, 5_000, 32)
    x, _, z = images()
    wanted: dict[str, float | None] = {"cpprb": 1.2, "torchrl": 8.0, "avalanche": 100.0}
    names = ["ours", *rivals.present(list(wanted))]
    whole: dict[str, list[float]] = {name: [] for name in names}  # of each run, as `compare` has it of the adding alone

    def call(name: str) -> Callable[[], float]:
        first = rivals.BUFFERS[name](o.folder, rows)
        batches = [first.prepare(x[i : i + size], np.arange(i, min(i + size, stream)), z[i : i + size]) for i in range(0, stream, size)]
        rivals.remove(first)

        def run() -> float:
            start = time.perf_counter()
            contender = rivals.BUFFERS[name](o.folder, rows)

            def add() -> None:
                for batch in batches:
                    contender.add(batch)

            taken = seconds(add)
            whole[name].append(time.perf_counter() - start)
            n = min(rows, 256)
            numbers = check_samples(name, contender, contender.sample(n), n)
            if name in ("cpprb", "torchrl") and numbers.min() < stream - rows:
                raise WrongError(f"{name}: a ring of {rows} holds sample {numbers.min()} after {stream}")
            rivals.remove(contender)
            return taken

        return run

    work = f"add batches of {size} to {rows:,} rows, stream of {stream:,}"
    note = "ours and Avalanche decide for every sample whether it stays; the rings of cpprb and torchrl write all"
    lines = compare(work, {name: call(name) for name in names}, wanted, 3 if o.quick else 15, note=note)
    made = "cpprb writes the pages of its files when it is made, ours as rows are filled"
    for line in list(lines):
        if isinstance(line, Line):
            mine, theirs = whole["ours"][1:], whole[line.rival][1:]  # the first round is not counted
            lines.append(Line(f"make a buffer, and {work}", line.rival, mine, theirs, line.wanted, made))
    return lines


def saturated(o: Options) -> Lines:
    """Batches of 1,000 into a full buffer of 1,000 rows."""
    rows, rounds = 1_000, 10 if o.quick else 50
    x, _, z = images()
    wanted = {"cpprb": 3.0, "torchrl": 20.0, "avalanche": 20.0}
    contenders = {name: rivals.BUFFERS[name](o.folder, rows) for name in ["ours", *rivals.present(list(wanted))]}
    done = 20 if o.quick else 200
    for contender in contenders.values():
        feed(contender, done * 1_000, 1_000)
    position = dict.fromkeys(contenders, done * 1_000)

    def call(name: str) -> Callable[[], float]:
        contender = contenders[name]

        def run() -> float:
            first = position[name]
            batches = []
            for start in range(first, first + rounds * 1_000, 1_000):
                part = slice(start % IMAGES, start % IMAGES + 1_000)
                batches.append(contender.prepare(x[part], np.arange(start, start + 1_000), z[part]))
            position[name] += rounds * 1_000

            def add() -> None:
                for batch in batches:
                    contender.add(batch)

            return seconds(add)

        return run

    lines = compare(
        f"full buffer of {rows:,} rows, batches of 1,000",
        {name: call(name) for name in contenders},
        wanted,
        3 if o.quick else 15,
        note=f"per batch; after a stream of {done * 1_000:,}",
        scale=dict.fromkeys(contenders, rounds),
    )
    for name, contender in contenders.items():
        numbers = check_samples(name, contender, contender.sample(256), 256)
        if numbers.max() >= position[name]:
            raise WrongError(f"{name}: sample {numbers.max()} of a stream of {position[name]}")
        contender.close()
    return lines


def sampling(o: Options) -> Lines:
    """Batches of 256 from buffers that fit in memory."""
    lines: Lines = []
    wanted = {"np.take": 0.8, "cpprb": 4.0, "torchrl": 6.0, "avalanche": None, "one piece": None}
    for rows in (5_000, 20_000 if o.quick else 200_000):
        contenders = {name: rivals.BUFFERS[name](o.folder, rows) for name in rivals.present(list(wanted))}
        contenders = {"ours": rivals.OursRing(o.folder, rows), **contenders}
        for name, contender in contenders.items():
            feed(contender, rows, 1_000 if name != "avalanche" else min(rows, IMAGES))

        def call(contender: rivals.Contender) -> Callable[[], float]:
            held: list[Any] = [None]  # the batch lives until the next one is there, as in training

            def run() -> float:
                if isinstance(contender, rivals.Take):
                    contender.draw(256)
                start = time.perf_counter()
                held[0] = contender.sample(256)
                return time.perf_counter() - start

            return run

        for name, contender in contenders.items():
            if isinstance(contender, rivals.Take):
                contender.draw(256)
            check_samples(name, contender, contender.sample(256), 256)
        lines += compare(
            f"sample 256 of {rows:,} rows", {name: call(c) for name, c in contenders.items()}, wanted, 50 if o.quick else 500, budget=10
        )
        pair = {name: call(contenders[name]) for name in ("ours", "np.take")}  # whose code and tables no other evicts
        lines += compare(f"sample 256 of {rows:,} rows, in turn with np.take alone", pair, {"np.take": 0.8}, 50 if o.quick else 500)
        for contender in contenders.values():
            contender.close()
    return lines


def cold(o: Options) -> Lines:
    """Batches of 256 from files that are not in the page cache."""
    size = (0.3 if o.quick else 2.0) * 1e9
    work = f"sample 256 of a file of {size / 1e9:g} GB that is not in the page cache"
    wanted = {"pread pool, images only": 1.2, "torchrl": 40.0, "cpprb": 40.0, "h5py, images only": None, "np.memmap, images only": None}
    if not pagecache.available():
        return [Skipped(work, name, "this system cannot take files out of its page cache") for name in wanted]
    rows = int(size / SAMPLE_BYTES) // 1_000 * 1_000
    path = os.path.join(o.folder, "cold.h5")
    larger_than_ram.fill(path, rows)
    many, few = (10, 2) if o.quick else (50, 4)
    calls: Calls = {}
    scale: dict[str, float] = {}

    def add(name: str, where: Path, batches: int, read: Callable[[int], float]) -> None:
        def run() -> float:
            left = pagecache.forget(where)
            if left > 0.01:
                raise WrongError(f"{left:.0%} of the file of {name} stayed in the page cache, so it would not be cold")
            return read(batches)

        calls[name], scale[name] = run, batches

    readers = larger_than_ram.readers(path, rows)
    add("ours", Path(path), many, readers["ours"])
    add("pread pool, images only", Path(path), many, readers["pread pool"])
    add("h5py, images only", Path(path), few, readers["h5py"])
    add("np.memmap, images only", Path(path), few, readers["np.memmap"])
    contenders: list[rivals.Contender] = []
    for name in rivals.present(["torchrl", "cpprb"]):
        contender: Any = rivals.BUFFERS[name](o.folder, rows)
        feed(contender, rows, 1_000)
        contenders.append(contender)

        def read(batches: int, name: str = name, contender: Any = contender) -> float:
            taken = 0.0
            for _ in range(batches):
                start = time.perf_counter()
                drawn = contender.sample(256)
                taken += time.perf_counter() - start
                check_samples(name, contender, drawn, 256)
            return taken

        add(name, Path(contender.folder), few, read)
    lines = compare(
        work, calls, wanted, 2 if o.quick else 5, note="per batch; each file was dropped from the page cache before each round", scale=scale
    )
    for contender in contenders:
        contender.close()
    return lines


def class_balanced(o: Options) -> Lines:
    """5 x 10,000 images of two classes each into 2,000 rows."""
    each = 1_000 if o.quick else 10_000
    rows = each // 5
    n = 5 * each
    x, _, _ = samples(n)
    y = np.repeat(np.arange(10), n // 10)
    rng = np.random.default_rng(0)
    for e in range(5):
        rng.shuffle(y[e * each : (e + 1) * each])
    parts = [slice(e * each, (e + 1) * each) for e in range(5)]
    numbered = x.copy()
    numbered.reshape(n, -1)[:, :4] = np.arange(n, dtype=np.int32).view(np.uint8).reshape(n, 4)  # which sample an image is
    schema = leanreplay.Schema.from_batch((x[:1], y[:1]))

    def check(name: str, xs: Any, ys: Any) -> None:
        numbers = np.ascontiguousarray(xs.reshape(len(xs), -1)[:, :4]).view(np.int32)[:, 0]
        same = np.array_equal(xs, numbered[numbers]) and np.array_equal(ys, y[numbers]) and len(np.unique(numbers)) == rows
        if not same or set(np.bincount(ys, minlength=10)) != {rows // 10}:
            raise WrongError(f"{name}: {np.bincount(ys)} samples of the classes")

    def ours(how: str, feeds: list[Any]) -> Callable[[], float]:

        def run() -> float:
            with leanreplay.ClassBalancedBuffer(rows, os.path.join(o.folder, f"{how}.h5"), mode="w", schema=schema) as buffer:
                call = buffer.add if how == "arrays" else buffer.update
                taken = seconds(lambda: [call(data) for data in feeds])
                (xs, ys), _ = buffer.get(buffer.get_metadata("idx"))
            check("ours", xs, ys)
            return taken

        return run

    calls: Calls = {"arrays": ours("arrays", [(numbered[p], y[p]) for p in parts])}
    calls["items"] = ours("items", [Images(numbered[p], y[p]) for p in parts])
    if rivals.why_not("avalanche") is None:
        import torch
        from avalanche.benchmarks.utils import as_classification_dataset
        from avalanche.training.storage_policy import ClassBalancedBuffer
        from torch.utils.data import DataLoader, TensorDataset

        tensors = [(torch.from_numpy(numbered[part]), torch.from_numpy(y[part])) for part in parts]
        calls["tensors"] = ours("tensors", [TensorDataset(*pair) for pair in tensors])
        datasets = []
        for pair in tensors:
            data = TensorDataset(*pair)
            data.targets = pair[1].tolist()  # which Avalanche asks for
            datasets.append(as_classification_dataset(data))

        def avalanche() -> float:
            buffer = ClassBalancedBuffer(rows)
            taken = seconds(lambda: [buffer.update_from_dataset(data) for data in datasets])
            held = buffer.buffer
            drawn = next(iter(DataLoader(held, len(held), collate_fn=held.collate_fn)))
            check("avalanche", drawn[0].numpy(), drawn[1].numpy())
            return taken

        calls["avalanche"] = avalanche
    found = interleaved(calls, 3 if o.quick else 15, 20.0)
    lines: Lines = []
    works: list[tuple[str, str, float | None, str]] = [
        ("arrays", "arrays", 6.0, "ours copies to disk, Avalanche keeps indices"),
        ("tensors", "TensorDatasets", 6.0, "ours copies to disk, Avalanche keeps indices"),
        ("items", "a dataset of one's own", None, "ours makes each item that stays, Avalanche none"),
    ]
    for how, what, wanted, note in works:
        work = f"class-balanced, 5 x {each:,} into {rows:,} rows, {what}"
        if "avalanche" in found:
            lines.append(Line(work, "avalanche", found[how], found["avalanche"], wanted, note))
        else:
            lines.append(Skipped(work, "avalanche", rivals.why_not("avalanche") or ""))
    return lines


def herding(o: Options) -> Lines:
    """The full herding order of 2,000 features of 512 numbers."""
    n, d = (400, 128) if o.quick else (2_000, 512)
    features = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
    strategy = leanreplay.HerdingSelection()
    wide = features.astype(np.float64)
    calls: Calls = {"ours": lambda: seconds(lambda: strategy.sorted_indices(features, None))}
    calls["X @ X.T alone, float32"] = lambda: seconds(lambda: features @ features.T)
    if rivals.why_not("avalanche") is None:
        import torch
        from avalanche.training.storage_policy import HerdingSelectionStrategy

        theirs = HerdingSelectionStrategy(torch.nn.Sequential(torch.nn.Identity()), "0")
        given = torch.from_numpy(features)
        calls["avalanche"] = lambda: seconds(lambda: theirs.make_sorted_indices_from_features(given))
        orders = [np.asarray(strategy.sorted_indices(features, None)), np.asarray(theirs.make_sorted_indices_from_features(given))]
        distance = []
        for order in orders:
            if not np.array_equal(np.sort(order), np.arange(n)):
                raise WrongError("a herding order is no permutation")
            means = np.cumsum(wide[order], axis=0) / np.arange(1, n + 1)[:, None]
            distance.append(np.linalg.norm(means - wide.mean(0), axis=1))
        first = n // 10  # later both choose among what is left, and rounding in float32 may send them apart
        if not np.array_equal(orders[0][:first], orders[1][:first]) and distance[0][:first].mean() > 1.01 * distance[1][:first].mean():
            raise WrongError("the herding orders differ, and ours is the worse")
    wanted = {"avalanche": 100.0, "X @ X.T alone, float32": None}
    return compare(f"herding, full order of n={n:,}, d={d}", calls, wanted, 3 if o.quick else 15)


def checkpoint(o: Options) -> Lines:
    """A state of a buffer of 600 MB from which training resumes exactly; the buffer moved on by 1,000 samples since the last one."""
    rows = 20_000 if o.quick else 200_000
    x, _, z = images()
    names = rivals.present(["torchrl", "avalanche"])
    contenders: dict[str, Any] = {name: rivals.BUFFERS[name](o.folder, rows) for name in ["ours", *names]}
    dump = Path(o.folder) / "dump"
    if "torchrl" in contenders:
        (dump / "in place").mkdir(parents=True)
        contenders["torchrl, in place"] = rivals.TorchRL(o.folder, rows, str(dump / "in place" / "storage"))
    for name, contender in contenders.items():
        if name == "avalanche":
            for start in range(0, rows, IMAGES):  # images of its own for each part, or pickle would write one part alone
                contender.add(contender.prepare(x.copy(), np.arange(start, start + IMAGES), z.copy()))
        else:
            feed(contender, rows, 1_000)
    moved = dict.fromkeys(contenders, 0)

    def move(name: str) -> float:
        """Add 1,000 samples; the seconds that it takes."""
        moved[name] += 1
        numbers = np.arange(rows + 1_000 * moved[name], rows + 1_000 * (moved[name] + 1))
        part = slice(int(numbers[0]) % IMAGES, int(numbers[0]) % IMAGES + 1_000)
        batch = contenders[name].prepare(x[part], numbers, z[part])
        return seconds(lambda: contenders[name].add(batch))

    def avalanche() -> None:
        with open(dump / "avalanche.pickle", "wb") as file:
            pickle.dump(contenders["avalanche"].buffer, file, pickle.HIGHEST_PROTOCOL)

    dump.mkdir(exist_ok=True)
    saves: dict[str, Callable[[], Any]] = {"ours": contenders["ours"].buffer.state_dict}
    if "torchrl" in contenders:
        saves["torchrl"] = lambda: contenders["torchrl"].buffer.dumps(dump / "torchrl")
        saves["torchrl, in place"] = lambda: contenders["torchrl, in place"].buffer.dumps(dump / "in place")
    if "avalanche" in contenders:
        saves["avalanche"] = avalanche
    _check_resume(contenders, saves, move, dump, rows)

    after: dict[str, list[float]] = {name: [] for name in saves}

    def call(name: str) -> Callable[[], float]:
        def run() -> float:
            taken = seconds(saves[name])
            after[name].append(taken + move(name))
            return taken

        return run

    size = rows * SAMPLE_BYTES / 1e6
    wanted = {"torchrl": 100.0, "avalanche": 100.0, "torchrl, in place": None}
    calls = {name: call(name) for name in saves}
    notes = {"torchrl, in place": "no way back: what is added later overwrites the rows of this state"}
    lines: Lines = []
    for line in compare(f"checkpoint of {size:.0f} MB", calls, wanted, 3 if o.quick else 9):
        lines.append(line)
        if isinstance(line, Line):
            lines[-1] = replace(line, note=notes.get(line.rival, ""))
    for name in wanted:
        if name in saves:  # the first round is not counted here either
            work = f"the same, and adding the next 1,000 samples to {rows:,} rows"
            lines.append(Line(work, name, after["ours"][1:], after[name][1:], None, "ours then keeps the old bytes of rows that change"))
    for contender in contenders.values():
        contender.close()
    return lines


def _check_resume(
    contenders: dict[str, Any], saves: dict[str, Callable[[], Any]], move: Callable[[str], float], dump: Path, rows: int
) -> None:
    """Save, move on, come back: the numbers of the rows must be those of the moment of saving.

    Moves on once before: after its first update, Avalanche's buffer would pickle a tensor for each index, a hundred times slower.
    """

    def numbers(name: str, buffer: Any = None) -> Any:
        c = contenders[name]
        if name == "ours":
            return c.buffer.get_metadata("position")
        if name == "avalanche":
            return np.array([int(item[1]) for item in (c.buffer if buffer is None else buffer).buffer.subset(range(0, rows, rows // 50))])
        return (c.buffer if buffer is None else buffer)[:]["y"].numpy().copy()

    for name, save in saves.items():
        move(name)
        before = numbers(name)
        state = save()
        move(name)
        move(name)
        if name == "ours":
            contenders["ours"].buffer.load_state_dict(state)
            found = numbers(name)
        elif name == "torchrl":
            found = numbers(name, load_torchrl(dump / "torchrl", rows))
        elif name == "avalanche":
            with open(dump / "avalanche.pickle", "rb") as file:
                found = numbers(name, pickle.load(file))
        else:
            continue  # cannot come back
        if not np.array_equal(before, found):
            raise WrongError(f"{name}: the state that was saved does not come back")


def load_torchrl(folder: Path, rows: int, in_place: bool = False) -> Any:
    """A torchrl buffer from what `dumps` wrote: copied into files of its own, or used where it lies."""
    from torchrl.data import LazyMemmapStorage, ReplayBuffer

    storage = LazyMemmapStorage(rows, scratch_dir=folder / "storage") if in_place else LazyMemmapStorage(rows)
    buffer = ReplayBuffer(storage=storage, batch_size=256)
    buffer.loads(folder)
    return buffer


def opening(o: Options) -> Lines:
    """Open an existing buffer, in the page cache, and draw the first batch of 256."""
    rows = 20_000 if o.quick else 200_000
    work = f"open a buffer of {rows * SAMPLE_BYTES / 1e6:.0f} MB and draw the first batch"
    ours = rivals.OursRing(o.folder, rows)
    feed(ours, rows, 1_000)
    ours.close()
    held: list[Any] = [None]

    def mine() -> float:
        start = time.perf_counter()
        buffer = leanreplay.open(ours.path)
        drawn = buffer.sample(256)
        taken = time.perf_counter() - start
        check_samples("ours", ours, drawn, 256)
        buffer.close()
        return taken

    calls: Calls = {"ours": mine}
    if rivals.why_not("torchrl") is None:
        folder = Path(o.folder) / "dump"
        torchrl = rivals.TorchRL(o.folder, rows)
        feed(torchrl, rows, 1_000)
        torchrl.buffer.dumps(folder)

        def theirs(in_place: bool) -> float:
            start = time.perf_counter()
            held[0] = load_torchrl(folder, rows, in_place)
            drawn = held[0].sample()
            taken = time.perf_counter() - start
            check_samples("torchrl", torchrl, drawn, 256)
            held[0] = None
            return taken

        calls["torchrl loads"] = lambda: theirs(False)
        calls["torchrl loads, where the files lie"] = lambda: theirs(True)
    generator = np.random.default_rng(0)
    with leanreplay.open(ours.path) as buffer:
        columns = buffer.current.store.layout.columns[:3]  # no call of the library takes part in this

    def mapped() -> float:
        where = generator.choice(rows, 256, replace=False)
        start = time.perf_counter()
        maps = [np.memmap(ours.path, np.uint8, "r", at, (rows, size)) for at, size in columns]
        held[0] = [np.take(m, where, axis=0) for m in maps]
        return time.perf_counter() - start

    calls["np.memmap"] = mapped
    wanted = {"torchrl loads": 5.0, "torchrl loads, where the files lie": 5.0, "np.memmap": None}
    return compare(work, calls, wanted, 3 if o.quick else 15)


WORKS: dict[str, Callable[[Options], Lines]] = {
    "add": adding,
    "saturated": saturated,
    "sample": sampling,
    "cold": cold,
    "class-balanced": class_balanced,
    "herding": herding,
    "training": split_mnist,
    "checkpoint": checkpoint,
    "open": opening,
}
