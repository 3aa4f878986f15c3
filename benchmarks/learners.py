"""What replay costs a training step: `python -m benchmarks.learners [--quick] [--device cuda]`.

A learner's whole step (draw, forward, backward, optimizer, adding to a buffer on disk), beside the same forward passes, backward and
optimizer without any buffer, the batches at hand (with `--device cuda` they are there, while the learner's come from the CPU). Measured
in turn, one thread, float32 images; figures are medians. "wanted" was set before the code was written.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, mse_loss

from benchmarks.common import interleaved, machine, median, quartiles, table
from leanreplay import ReservoirBuffer
from leanreplay.torch import CLSLearner, DERLearner, ERLearner, PODLearner, SuperERLearner

Row = tuple[str, ...]
Step = Callable[[], Any]
Batches = list[tuple[torch.Tensor, torch.Tensor]]

BATCH = 32  # from the stream, and replayed
CAPACITY, SEEN = 2000, 8000  # of the buffer, before the first step
LAYER = "layer4"  # of the ResNet-18: what pooled output distillation compares


# -- networks ------------------------------------------------------------------------------------------------------------------


class MLP(torch.nn.Sequential):
    """784-100-100-10."""

    def __init__(self) -> None:
        hidden = [torch.nn.Linear(784, 100), torch.nn.ReLU(), torch.nn.Linear(100, 100), torch.nn.ReLU()]
        super().__init__(torch.nn.Flatten(), *hidden, torch.nn.Linear(100, 10))


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> torch.nn.Sequential:
    """Convolution and batch norm."""
    return torch.nn.Sequential(torch.nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False), torch.nn.BatchNorm2d(outputs))


class Block(torch.nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = conv(inputs, outputs, 3, stride), conv(outputs, outputs, 3)
        self.shortcut = torch.nn.Identity() if (inputs, stride) == (outputs, 1) else conv(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


class ResNet18(torch.nn.Module):
    """He et al. 2016, with the stem for small images: one 3x3 convolution, no pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 64, 3)
        widths = [64, 64, 128, 256, 512]
        for i in range(1, 5):
            stride = 1 if i == 1 else 2
            self.add_module(f"layer{i}", torch.nn.Sequential(Block(widths[i - 1], widths[i], stride), Block(widths[i], widths[i], 1)))
        self.head = torch.nn.Linear(512, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        return self.head(x.mean((2, 3)))


# -- the least that each method must compute -----------------------------------------------------------------------------------


class Minimal:
    """A method's forward passes, backward and optimizer on batches at hand: no buffer, no checks, nothing else."""

    def __init__(self, model: torch.nn.Module, stream: Batches, z: torch.Tensor, layer: str) -> None:
        self.model, self.stream, self.z = model, stream, z
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        self.copies = [copy.deepcopy(model).requires_grad_(False) for _ in range(2)]
        self.both = [(torch.cat([x, x]), torch.cat([y, y])) for x, y in stream]
        self.activation = torch.empty(0)
        if layer:
            model.get_submodule(layer).register_forward_hook(lambda _, __, out: setattr(self, "activation", out))
        self.number = 0

    def update(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def next(self, batches: Batches) -> tuple[torch.Tensor, torch.Tensor]:
        self.number = (self.number + 1) % len(batches)
        return batches[self.number]

    def concatenated(self) -> torch.Tensor:
        x, y = self.next(self.both)
        return cross_entropy(self.model(x), y)

    def replayed(self) -> torch.Tensor:
        x, y = self.next(self.stream)
        return cross_entropy(self.model(x), y)

    def matched(self) -> torch.Tensor:
        return mse_loss(self.model(self.next(self.stream)[0]), self.z)

    def consistency(self, outputs: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            stable, plastic = (net(x) for net in self.copies)
            right = [z.softmax(1).gather(1, y[:, None]) for z in (stable, plastic)]
            z = torch.where(right[0] > right[1], stable, plastic)
        return mse_loss(outputs, z)

    def average(self) -> None:
        with torch.no_grad():
            for net in self.copies:
                torch._foreach_lerp_(list(net.parameters()), list(self.model.parameters()), 0.001)

    def pooled(self, old: torch.Tensor) -> torch.Tensor:
        def pool(a: torch.Tensor) -> torch.Tensor:
            a = a**2
            return torch.nn.functional.normalize(torch.cat([a.sum(2).flatten(1), a.sum(3).flatten(1)], 1))

        return torch.linalg.vector_norm(pool(self.activation) - pool(old), dim=1).mean()

    def er(self) -> None:
        self.update(self.concatenated())

    def er_weighted(self) -> None:
        x, y = self.next(self.both)
        outputs = self.model(x)
        self.update(cross_entropy(outputs[:BATCH], y[:BATCH]) + cross_entropy(outputs[BATCH:], y[BATCH:]))

    def der(self) -> None:
        self.update(self.replayed() + self.matched())

    def der_plus(self) -> None:
        self.update(self.replayed() + self.matched() + self.replayed())

    def cls(self) -> None:
        x, y = self.next(self.stream)
        self.update(self.concatenated() + self.consistency(self.model(x), x, y))
        self.average()

    def pod(self) -> None:
        loss = self.replayed()
        old = self.activation.detach()
        self.model(self.next(self.stream)[0])
        self.update(loss + self.pooled(old))

    def super_er(self) -> None:
        loss = self.replayed() + self.matched()
        old = self.activation.detach()
        x, y = self.next(self.stream)
        outputs = self.model(x)
        loss = loss + cross_entropy(outputs, y) + self.consistency(outputs, x, y)
        self.model(self.next(self.stream)[0])
        self.update(loss + self.pooled(old))
        self.average()


# -- measuring -----------------------------------------------------------------------------------------------------------------


def images(shape: tuple[int, ...]) -> Batches:
    """Batches of noise with labels."""
    rng = np.random.default_rng(0)
    batches = ((rng.random((BATCH, *shape), dtype=np.float32), rng.integers(0, 10, BATCH)) for _ in range(16))
    return [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in batches]


def measure(name: str, make: Callable[..., Any], model: torch.nn.Module, least: str, shape: tuple[int, ...], options: Any) -> Row:
    """One line of the table: blocks of steps of a learner and of its minimum, in turn."""
    device, steps = options.device, options.steps
    stream, model = images(shape), model.to(device)
    there = [(x.to(device), y.to(device)) for x, y in stream]
    minimal = Minimal(copy.deepcopy(model), there, torch.zeros(BATCH, 10, device=device), LAYER if least in ("pod", "super_er") else "")
    minimum: Step = getattr(minimal, least)
    path = Path(options.folder) / f"{name.replace(' ', '-')}.h5"
    with ReservoirBuffer(CAPACITY, path) as buffer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        learner = make(model, optimizer, buffer, replay_batch_size=BATCH, device=device)
        learner.step(*stream[0])
        metadata = {n: v[:1] for n, v in buffer.get(np.arange(1))[1].items() if n not in ("idx", "position", "group")}
        while buffer.seen < SEEN:
            x, y = (torch.cat(parts) for parts in zip(*stream, strict=True))
            buffer.add((x, y), metadata={n: np.repeat(v, len(x), 0) for n, v in metadata.items()})
        number = 0

        def step() -> None:
            nonlocal number
            number = (number + 1) % len(stream)
            learner.step(*stream[number])

        def timed(step: Step) -> float:
            start = time.perf_counter()
            for _ in range(steps):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return (time.perf_counter() - start) / steps

        found = interleaved({"ours": partial(timed, step), "minimum": partial(timed, minimum)}, options.repetitions)
    mine, other = (f"{median(found[k]) * 1e3:.3f} ms ({quartiles(found[k], 1e3)})" for k in ("ours", "minimum"))
    return name, mine, other, f"{median(found['ours']) / median(found['minimum']):.3f}"


LEARNERS: dict[str, tuple[Callable[..., Any], str]] = {
    "ER": (partial(ERLearner, alpha=None), "er"),
    "ER, weighted": (ERLearner, "er_weighted"),
    "DER": (partial(DERLearner, beta=0.0), "der"),
    "DER++": (DERLearner, "der_plus"),
    "CLS-ER": (partial(CLSLearner, alpha=None), "cls"),
}
WITH_LAYER: dict[str, tuple[Callable[..., Any], str]] = {
    "POD": (partial(PODLearner, layers=[LAYER]), "pod"),
    "Super-ER": (partial(SuperERLearner, pod_layers=[LAYER]), "super_er"),
}


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, only ER for the ResNet-18")
    parser.add_argument("--folder", default=None, help="where the buffers lie (default: a temporary folder)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="where the model lies (default: cpu)")
    options = parser.parse_args()
    quick, cpu = options.quick, options.device.type == "cpu"
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as options.folder:
        options.steps, options.repetitions = 100, 5 if quick else 30
        for name, (make, least) in LEARNERS.items():
            rows.append((*measure(f"{name}, MLP", make, MLP(), least, (1, 28, 28), options), "<= 1.25" if name == "ER" else ""))
            print(rows[-1], flush=True)
        options.steps = 1 if cpu else 50
        for name, (make, least) in ({"ER": LEARNERS["ER"]} if quick else LEARNERS | WITH_LAYER).items():
            options.repetitions = 3 if quick or (cpu and name != "ER") else 15
            rows.append((*measure(f"{name}, ResNet-18", make, ResNet18(), least, (3, 32, 32), options), "<= 1.03" if name == "ER" else ""))
            print(rows[-1], flush=True)
    print(f"{machine()}, torch {torch.__version__}, 1 thread" + ("" if cpu else f", {torch.cuda.get_device_name(options.device)}"))
    print()
    print(table(rows, (f"a step of {BATCH} + {BATCH}", "learner, median (quartiles)", "minimum", "ratio", "wanted")))


if __name__ == "__main__":
    main()
