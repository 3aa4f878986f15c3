"""The contenders of the suite behind one small interface, each with the calls that its documentation shows.

What a contender's `add` takes is made by `prepare`, which is never timed: arrays for leanreplay and cpprb, TensorDicts for torchrl,
datasets for Avalanche. Samples are (image, number, logits); the number says which image and logits belong to a row.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import tempfile
import warnings
from typing import Any, ClassVar, Protocol

import numpy as np

import leanreplay

# Name -> (module to import, distribution). renate is no rival here: all its releases (to 0.5.2) ask for Python below 3.11.
MODULES = {"avalanche": ("avalanche", "avalanche-lib"), "torchrl": ("torchrl", "torchrl"), "cpprb": ("cpprb", "cpprb")}

Arrays = tuple[Any, Any, Any]
_reasons: dict[str, str | None] = {}


def why_not(name: str) -> str | None:
    """Why a rival cannot take part, in a line; None if it can. Those that need no installation always can."""
    if name not in MODULES:
        return None
    if name not in _reasons:
        module, distribution = MODULES[name]
        _reasons[name] = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if module == "avalanche":
                    let_torchvision_import()
                importlib.import_module(module)
        except ImportError as error:
            _reasons[name] = f"{distribution} is not installed ({error}); pip install -e '.[bench]'"
        except Exception as error:
            _reasons[name] = f"{distribution} cannot be imported ({type(error).__name__}: {error})"
        if module == "torchrl":
            logging.getLogger("torchrl").setLevel(logging.WARNING)
    return _reasons[name]


_OPERATORS: list[Any] = []


def let_torchvision_import() -> None:
    """torchvision of the package index is built for CUDA; beside a torch for the processor alone, importing it fails.

    Its Python part looks for two operators of its compiled part. Avalanche imports torchvision, but what is measured here calls
    none of them: declared without an implementation, they let the import go on. Nothing is done where torchvision imports as it is.
    """
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _OPERATORS.append(library)  # the operators live as long as this does


class Contender(Protocol):
    """A buffer of a number of rows, its files in a folder."""

    def __init__(self, folder: str, rows: int) -> None: ...

    def prepare(self, x: Any, y: Any, z: Any) -> Any:
        """What `add` takes for these samples."""

    def add(self, batch: Any) -> None: ...

    def sample(self, n: int) -> Any:
        """n samples, as the library gives them."""

    def arrays(self, drawn: Any) -> Arrays:
        """The same as arrays of images, numbers and logits."""

    def close(self) -> None: ...


def remove(contender: Contender) -> None:
    """Close it, and delete its files: the memory of their pages is there for the next one, which need not wait for any.

    (In a virtual machine, memory that was never used comes from the host at a tenth of the speed.)
    """
    contender.close()
    folder = getattr(contender, "folder", None)
    if folder is not None:
        shutil.rmtree(folder)


class Ours:
    """A reservoir on disk."""

    kind: ClassVar[type[leanreplay.DataBuffer]] = leanreplay.ReservoirBuffer

    def __init__(self, folder: str, rows: int) -> None:
        schema = leanreplay.Schema.from_batch(
            (np.zeros((1, 3, 32, 32), np.uint8), np.zeros(1, np.int64)), {"logits": np.zeros((1, 10), "f4")}
        )
        self.folder = tempfile.mkdtemp(prefix="ours", dir=folder)
        self.path = os.path.join(self.folder, "ours.h5")
        self.buffer = self.kind(rows, self.path, schema=schema)

    def prepare(self, x: Any, y: Any, z: Any) -> Any:
        return (x, y), {"logits": z}

    def add(self, batch: Any) -> None:
        self.buffer.add(batch[0], metadata=batch[1])

    def sample(self, n: int) -> Any:
        return self.buffer.sample(n)

    def arrays(self, drawn: Any) -> Arrays:
        (x, y), meta = drawn
        return x, y, meta["logits"]

    def close(self) -> None:
        self.buffer.close()


class OursRing(Ours):
    """The last samples, on disk: all rows are known to be filled."""

    kind = leanreplay.SlidingWindowBuffer


class TorchRL:
    """torchrl's ReplayBuffer in memory-mapped files. It has no reservoir: its ring takes part, which decides nothing.

    The files are made before the clock runs, by one sample that is then forgotten.
    """

    def __init__(self, folder: str, rows: int, path: str | None = None) -> None:
        from torchrl.data import LazyMemmapStorage, ReplayBuffer

        self.folder = path or tempfile.mkdtemp(prefix="torchrl", dir=folder)
        self.buffer = ReplayBuffer(storage=LazyMemmapStorage(rows, scratch_dir=self.folder), batch_size=256)
        self.buffer.extend(self.prepare(np.zeros((1, 3, 32, 32), np.uint8), np.zeros(1, np.int64), np.zeros((1, 10), np.float32)))
        self.buffer.empty()

    def prepare(self, x: Any, y: Any, z: Any) -> Any:
        import torch
        from tensordict import TensorDict

        leaves = {name: torch.from_numpy(a) for name, a in (("x", x), ("y", y), ("logits", z))}
        return TensorDict(leaves, batch_size=[len(y)])

    def add(self, batch: Any) -> None:
        self.buffer.extend(batch)

    def sample(self, n: int) -> Any:
        return self.buffer.sample() if n == 256 else self.buffer.sample(n)

    def arrays(self, drawn: Any) -> Arrays:
        return drawn["x"].numpy(), drawn["y"].numpy(), drawn["logits"].numpy()

    def close(self) -> None:
        del self.buffer


class Cpprb:
    """cpprb's ReplayBuffer in memory-mapped files: a ring, which decides nothing."""

    def __init__(self, folder: str, rows: int) -> None:
        from cpprb import ReplayBuffer

        fields = {"x": {"shape": (3, 32, 32), "dtype": np.uint8}, "y": {"dtype": np.int64}, "logits": {"shape": 10, "dtype": np.float32}}
        self.folder = tempfile.mkdtemp(prefix="cpprb", dir=folder)
        self.buffer = ReplayBuffer(rows, fields, mmap_prefix=os.path.join(self.folder, "rb"))

    def prepare(self, x: Any, y: Any, z: Any) -> Any:
        return {"x": x, "y": y, "logits": z}

    def add(self, batch: Any) -> None:
        self.buffer.add(**batch)

    def sample(self, n: int) -> Any:
        return self.buffer.sample(n)

    def arrays(self, drawn: Any) -> Arrays:
        return drawn["x"], drawn["y"][:, 0], drawn["logits"]

    def close(self) -> None:
        del self.buffer


class Avalanche:
    """Avalanche's ReservoirSamplingBuffer. It lies in memory: it keeps references to the datasets that it was given, and indices.

    Drawn from by a shuffling DataLoader, one pass after another; starting a pass is part of a draw.
    """

    def __init__(self, folder: str, rows: int) -> None:
        from avalanche.training.storage_policy import ReservoirSamplingBuffer

        self.buffer = ReservoirSamplingBuffer(rows)
        self._batches: Any = iter(())

    def prepare(self, x: Any, y: Any, z: Any) -> Any:
        import torch
        from avalanche.benchmarks.utils import AvalancheDataset
        from torch.utils.data import TensorDataset

        return AvalancheDataset([TensorDataset(*map(torch.from_numpy, (x, y, z)))])

    def add(self, batch: Any) -> None:
        self.buffer.update_from_dataset(batch)
        self._batches = iter(())

    def sample(self, n: int) -> Any:
        from torch.utils.data import DataLoader

        drawn = next(self._batches, None)
        if drawn is None or len(drawn[1]) < n:
            data = self.buffer.buffer
            self._batches = iter(DataLoader(data, n, shuffle=True, collate_fn=data.collate_fn))
            drawn = next(self._batches)
        return drawn

    def arrays(self, drawn: Any) -> Arrays:
        x, y, z = (a.numpy() for a in drawn)
        return x, y, z

    def close(self) -> None:
        self._batches = iter(())


class Take:
    """No library: np.take of whole rows from one plain array in memory, the rows drawn before the clock runs."""

    def __init__(self, folder: str, rows: int) -> None:
        self.data = np.zeros((rows, 3 * 32 * 32 + 8 + 40), np.uint8)
        self._next = 0
        self._rng = np.random.default_rng(1)
        self.where = np.zeros(0, np.int64)

    def prepare(self, x: Any, y: Any, z: Any) -> Any:
        return np.concatenate([np.ascontiguousarray(a).reshape(len(y), -1).view(np.uint8) for a in (x, y.reshape(-1, 1), z)], axis=1)

    def add(self, batch: Any) -> None:
        self.data[self._next : self._next + len(batch)] = batch
        self._next += len(batch)

    def draw(self, n: int) -> None:
        """Choose the rows of the next sample."""
        self.where = self._rng.choice(self._next, n, replace=False)

    def sample(self, n: int) -> Any:
        return np.take(self.data, self.where, axis=0)

    def arrays(self, drawn: Any) -> Arrays:
        x, y, z = np.split(drawn, [3072, 3080], axis=1)
        return x.reshape(-1, 3, 32, 32), np.ascontiguousarray(y).view(np.int64)[:, 0], np.ascontiguousarray(z).view(np.float32)

    def close(self) -> None:
        del self.data


class Piece(Take):
    """No sample, the limit of any that is copied: as many rows, but those that lie one after the other."""

    def draw(self, n: int) -> None:
        first = int(self._rng.integers(0, self._next - n + 1))
        self.where = np.arange(first, first + n)

    def sample(self, n: int) -> Any:
        return self.data[self.where[0] : self.where[0] + n].copy()


BUFFERS: dict[str, type[Contender]] = {
    "ours": Ours,
    "avalanche": Avalanche,
    "torchrl": TorchRL,
    "cpprb": Cpprb,
    "np.take": Take,
    "one piece": Piece,
}


def present(names: list[str]) -> list[str]:
    """Those of these contenders that can take part."""
    return [name for name in names if why_not(name) is None]
